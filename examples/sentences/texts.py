"""Texts and recordings of the sentences example, from Debian packages.

| package | content | licence |
| --- | --- | --- |
| wordnet-base | example sentences of WordNet, which synthetic voices read | WordNet |
| asterisk-core-sounds-en(-wav) | recorded telephone prompts and their texts | CC-BY-SA-3.0 |
| pocketsphinx-testdata | five sentences of a LibriVox recording, for testing only | BSD |
| flite, libflite1 | four synthetic voices | BSD-like |
"""

import gzip
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import soundfile
from weights import NewDirectory, check_sha256

PACKAGES = Path(__file__).with_name("packages.sha256")  # as sha256sum writes it
PROMPTS = "usr/share/asterisk/sounds/en_US_f_Allison"
LIBRIVOX = "usr/share/pocketsphinx/test/data/librivox"
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LONGEST = 22  # words of a sentence for training
FEWEST = 3  # words of a prompt for testing
LONGEST_PROMPT = 30.0  # seconds, the window of Whisper


class Recording(NamedTuple):
    """A recording and its words."""

    path: Path
    words: str


def packages() -> dict[str, str]:
    """Return the SHA-256 of each package by its file name."""
    lines = PACKAGES.read_text().splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


def unpack_packages(out: Path, debs: Path | None) -> None:
    """Get the Debian packages, check them, and unpack them without installing them.

    Args:
        out: the directory to write.
        debs: a directory with the files of the packages; None to download them with apt-get.
    """
    with NewDirectory(out) as folder:
        source = debs or download(folder / "debs")
        for name, expected in packages().items():
            deb = source / name
            if not deb.is_file():
                raise SystemExit(
                    f"{deb} not found. Download it from packages.debian.org/bookworm into the "
                    "directory of --debs."
                )
            check_sha256(deb, expected)
            subprocess.run(["dpkg-deb", "-x", str(deb), str(folder)], check=True)


def download(folder: Path) -> Path:
    """Download the packages with apt-get, without root rights, and return their directory."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SystemExit(
            "apt-get and dpkg-deb not found. Use Debian or Ubuntu, or give the packages' directory "
            "with --debs; dpkg-deb is in the package dpkg of most distributions."
        )
    folder.mkdir()
    wanted: list[str] = []
    for file in packages():
        name, version, _ = file.split("_")
        wanted.append(f"{name}={version.replace('%3a', ':')}")
    done = subprocess.run(
        ["apt-get", "download", "-q", *wanted], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(
            f"apt-get download failed: {done.stderr.strip()[-500:]}\n"
            "Run apt-get update, or give the packages' directory with --debs."
        )
    return folder


# --- texts ---


def plain_words(text: str) -> str | None:
    """Return a text in lower case without punctuation, or None if it cannot be read word by word.

    Single digits become words. A text with other figures, brackets or abbreviations is None.
    """
    text = re.sub(r"[-,;:!?\"]|\.+(?=\s|$)", " ", text.lower())
    text = re.sub(r"(?<!\S)\d(?!\S)", lambda digit: NUMBERS[int(digit[0])], text)
    text = " ".join(text.split())
    return text if re.fullmatch(r"[a-z]+(?:'[a-z]+)?(?: [a-z]+(?:'[a-z]+)?)*", text) else None


def wordnet_sentences(root: Path) -> list[str]:
    """Return the distinct example sentences of WordNet of 3 to LONGEST words, in plain words."""
    sentences: dict[str, None] = {}
    for kind in ("noun", "verb", "adj", "adv"):
        text = (root / "usr/share/wordnet" / f"data.{kind}").read_text()
        for example in re.findall(r'"([^"\n]+)"', text):
            words = plain_words(example)
            if words is not None and 3 <= len(words.split()) <= LONGEST:
                sentences[words] = None
    return list(sentences)


# --- recordings ---


def prompts(root: Path) -> dict[str, list[Recording]]:
    """Return Debian's recorded Asterisk prompts up to 30 s, in three parts without a common text.

    Returns:
        "test", one half: prompts of at least FEWEST words. "valid", a sixth, likewise. "train", the
        other third, with prompts of any length.
    """
    texts = root / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    parts: dict[str, list[Recording]] = {"test": [], "valid": [], "train": []}
    for line in gzip.decompress(texts.read_bytes()).decode("utf-8", "replace").splitlines():
        name, _, text = line.partition(": ")
        words = plain_words(text)
        path = root / PROMPTS / f"{name}.wav"
        if words is None or not path.is_file() or soundfile.info(path).duration > LONGEST_PROMPT:
            continue
        part = part_of(words)
        if part == "train" or len(words.split()) >= FEWEST:
            parts[part].append(Recording(path, words))
    return parts


def part_of(words: str) -> str:
    """Return the part that a text belongs to, which depends on the text only."""
    remainder = int(hashlib.sha256(words.encode()).hexdigest(), 16) % 6
    return {3: "train", 4: "train", 5: "valid"}.get(remainder, "test")


def librivox(root: Path) -> list[Recording]:
    """Return the recorded sentences of LibriVox."""
    recordings: list[Recording] = []
    for line in (root / LIBRIVOX / "transcription").read_text().splitlines():
        match = re.fullmatch(r"<s> (.+) </s> \((.+)\)", line)
        if match:
            recordings.append(Recording(root / LIBRIVOX / f"{match[2]}.wav", match[1]))
    return recordings


def without(sentences: Iterable[str], recordings: Iterable[Recording]) -> list[str]:
    """Return the sentences that are not the text of a recording."""
    known = {recording.words for recording in recordings}
    return [words for words in sentences if words not in known]
