import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from asrllm.data.index import open_index
from asrllm.data.keys import SeenKeys, hash_keys
from asrllm.data.parallel import run_parallel
from asrllm.data.samples import make_sample, write_sample
from asrllm.data.shards import write_shards
from asrllm.data.sources import Utterance, read_kaldi, read_nemo
from asrllm.data.sources.utterance import AudioSegment
from asrllm.data.tars import scan_tar
from asrllm.errors import UserError
from asrllm.testing import kaldi_directory, tone, tone_sentences
from tests.conftest import REPOSITORY, clean_environment


def utterance(key="a", text="one", wave=None, rate=16000, **more):
    wave = tone("one", 0.5, rate) if wave is None else wave
    return Utterance(key=key, text=text, load=lambda: (wave, rate), **more)


@dataclass(frozen=True)
class Tone:
    """A picklable `load` that returns a tone."""

    word: str

    def __call__(self):
        return tone(self.word, 0.2), 16000


@dataclass(frozen=True)
class Fatal:
    """A `load` that kills its process."""

    def __call__(self):
        os.kill(os.getpid(), signal.SIGKILL)


def tones(count):
    return [
        Utterance(key=f"k{i}", text=f"text {i}", load=Tone("one" if i % 2 else "two"))
        for i in range(count)
    ]


def rejected(folder):
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def keys(folder):
    return [sample.key for path in sorted(folder.glob("*.tar")) for sample in scan_tar(path)]


# --- content ---


def test_webdataset_reads_the_content_of_the_source_from_shards(tmp_path):
    sentences = tone_sentences(7, rate=8000)
    summary = write_shards(
        tmp_path / "out",
        read_kaldi(kaldi_directory(tmp_path / "kaldi", sentences, rate=8000)),
        utterances_per_shard=3,
        fields={"lang": "en"},
    )
    assert summary.rejected == {}
    assert summary.index.shards == [str(tmp_path / "out" / f"shard-{i:06d}.tar") for i in range(3)]
    urls = str(tmp_path / "out" / "shard-{000000..000002}.tar")
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [s["json"]["text"] for s in read] == [words for words, _ in sentences]
    assert read[0]["__key__"] == "utt0000"
    assert read[0]["json"] | {"text": ""} == {
        "text": "",
        "duration": len(sentences[0][1]) / 8000,
        "sampling_rate": 8000,
        "lang": "en",
        "speaker": "spk0",
    }
    wave, rate = soundfile.read(tmp_path / "kaldi" / "wav" / "utt0000.wav", dtype="float32")
    (first, *_) = scan_tar(summary.index.shards[0])
    flac, flac_rate = soundfile.read(io.BytesIO(first.audio), dtype="float32")
    assert (flac_rate, rate) == (8000, 8000)
    np.testing.assert_allclose(flac, wave, atol=1e-4)


def test_the_fields_of_a_sample_have_a_fixed_order():
    fields = {"hotwords": ["x"], "task": "asr", "prompt": "p", "speaker": "s", "corpus": "mine"}
    sample = make_sample(utterance("a.b", fields=fields), {"lang": "en", "corpus": "other"})
    assert sample["__key__"] == "a_b"
    about = json.loads(sample["json"])
    assert list(about) == [
        "text",
        "duration",
        "sampling_rate",
        "lang",
        "corpus",
        "speaker",
        "prompt",
        "task",
        "hotwords",
    ]
    assert about["corpus"] == "mine"


def test_codec_keep_copies_whole_files(tmp_path):
    """Parts of files, and files of other formats, become FLAC."""
    wave = tone("one", 0.5)
    for suffix, kind in (
        ("wav", "WAV"),
        ("flac", "FLAC"),
        ("ogg", "OGG"),
        ("mp3", "MP3"),
        ("aiff", "AIFF"),
    ):
        soundfile.write(tmp_path / f"{suffix}.{suffix}", wave, 16000, format=kind)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    names = ["wav.wav", "flac.flac", "ogg.ogg", "mp3.mp3", "aiff.aiff", "broken.wav"]
    rows = [{"audio_filepath": name, "text": "one"} for name in names]
    rows.append(rows[0] | {"offset": 0.1, "duration": 0.2})
    (tmp_path / "m.json").write_text("\n".join(map(json.dumps, rows)))
    summary = write_shards(tmp_path / "out", read_nemo(tmp_path / "m.json"), codec="keep")
    assert summary.rejected == {"unreadable_audio": 1}
    samples = {sample.key: sample for sample in scan_tar(summary.index.shards[0])}
    for suffix in ("wav", "flac", "ogg", "mp3"):
        assert samples[suffix].extension == suffix
        assert samples[suffix].audio == (tmp_path / f"{suffix}.{suffix}").read_bytes()
    assert samples["aiff"].extension == samples["wav-100"].extension == "flac"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (utterance("bad", text="  "), "empty_text"),
        (utterance("bad", text="x" * 10_001), "long_text"),
        (utterance("bad", text="\ud800"), "broken_text"),
        (utterance("bad", wave=np.zeros(0, np.float32)), "empty_audio"),
        (utterance("bad", wave=np.full(9, np.nan, np.float32)), "non_finite_audio"),
        (utterance("bad", duration=0.7), "duration_mismatch"),
        (utterance("good"), "duplicate_key"),
        (utterance("", text="x"), "bad_key"),
        (utterance("a\nb", text="x"), "bad_key"),
        (utterance("bad", rate=700_000), "not_encodable"),
        (utterance("bad", problem=("not_one_turn", "many")), "not_one_turn"),
        (Utterance(key="bad", text="one"), "missing_audio"),
    ],
)
def test_an_unusable_utterance_is_rejected_with_its_key_and_reason(tmp_path, bad, reason):
    summary = write_shards(tmp_path / "out", [utterance("good"), bad, utterance("last")])
    assert summary.rejected == {reason: 1}
    assert len(summary.index) == 2
    (row,) = rejected(tmp_path / "out")
    assert (row["key"], row["reason"]) == (bad.key, reason)


def test_unreadable_audio_is_rejected_with_its_key(tmp_path):
    kaldi = kaldi_directory(tmp_path / "kaldi", tone_sentences(3))
    (kaldi / "wav" / "utt0001.wav").write_bytes(b"RIFF, not really")
    (kaldi / "wav" / "utt0002.wav").unlink()
    write_shards(tmp_path / "out", read_kaldi(kaldi))
    assert [(r["key"], r["reason"]) for r in rejected(tmp_path / "out")] == [
        ("utt0001", "unreadable_audio"),
        ("utt0002", "missing_audio"),
    ]


def test_a_shard_without_usable_utterances_is_skipped(tmp_path):
    utterances = [utterance(str(i), text="" if i in (2, 3, 4) else "one") for i in range(6)]
    index = write_shards(tmp_path / "out", utterances, utterances_per_shard=2).index
    assert [os.path.basename(shard) for shard in index.shards] == [
        "shard-000000.tar",
        "shard-000002.tar",
    ]
    assert index.starts.tolist() == [0, 2, 3]
    assert keys(tmp_path / "out") == ["0", "1", "5"]
    assert [row["key"] for row in rejected(tmp_path / "out")] == ["2", "3", "4"]


def test_a_seed_shuffles_the_utterances(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2), ("d", None)):
        write_shards(tmp_path / name, tones(9), utterances_per_shard=4, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    orders = [keys(tmp_path / name) for name in "acd"]
    assert orders[0] != orders[1] != orders[2] == [f"k{i}" for i in range(9)]
    assert {frozenset(order) for order in orders} == {frozenset(orders[2])}


def test_seen_keys_behave_like_a_set():
    rng = np.random.default_rng(0)
    seen, known = SeenKeys(), set()
    for _ in range(200):
        some = [str(n) for n in rng.integers(0, 5000, rng.integers(0, 60))]
        expected = []
        for key in some:
            expected.append(key in known)
            known.add(key)
        assert seen.add(hash_keys(some)).tolist() == expected
    assert sum(map(len, seen.runs)) == len(known)
    assert len(seen.runs) < 14


# --- errors and resuming ---


def test_nothing_but_rejects_remains_if_nothing_could_be_written(tmp_path):
    with pytest.raises(UserError, match=f"'{tmp_path}/out': "):
        write_shards(tmp_path / "out", [])
    assert list(tmp_path.iterdir()) == []
    lost = Utterance(key="c", text="one", load=AudioSegment(Path("absent.wav")))
    with pytest.raises(
        UserError,
        match=rf"(?s){tmp_path}/out.*2 empty_text.*1 missing_audio.*absent\.wav",
    ):
        write_shards(tmp_path / "out", [utterance("a", text=""), utterance("b", text=""), lost])
    (kept,) = tmp_path.iterdir()
    assert kept.name == "out.rejected.jsonl"
    assert [json.loads(line)["key"] for line in kept.read_text().splitlines()] == ["a", "b", "c"]


def test_existing_shards_are_not_overwritten(tmp_path):
    write_shards(tmp_path / "out", [utterance()])
    with pytest.raises(UserError, match=f"{tmp_path}/out"):
        write_shards(tmp_path / "out", [utterance()])


def test_an_unwritable_directory_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path}/file/out"):
        write_shards(tmp_path / "file" / "out", [utterance()])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("line 5 is broken")])
def test_an_error_leaves_only_finished_shards(tmp_path, caplog, error):
    def source(count):
        yield from tones(count)
        raise error

    with pytest.raises(type(error)):
        write_shards(tmp_path / "out", source(1), utterances_per_shard=2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(type(error)):
        write_shards(tmp_path / "out", source(5), utterances_per_shard=2)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert re.search(rf"\b2 .*{tmp_path}/\.out\.partial", caplog.text)
    advanced, kept = [], []
    summary = write_shards(
        tmp_path / "out",
        tones(7),
        utterances_per_shard=2,
        advance=advanced.append,
        advance_reused=kept.append,
    )
    assert (summary.reused, sum(advanced), kept) == (2, 3, [2, 2])
    write_shards(tmp_path / "whole", tones(7), utterances_per_shard=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def interrupted(out, utterances, **more):
    """Write the shards of all these utterances, and interrupt the work before it is complete."""

    def source():
        yield from utterances
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(out, source(), utterances_per_shard=2, **more)


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (lambda out, u: None, 3),
        (lambda out, u: u.insert(0, utterance("new")), 0),  # every shard has other utterances now
        (lambda out, u: u.__setitem__(2, utterance("k2", "another text")), 2),
        (lambda out, u: u.__setitem__(slice(1, None), []), 0),  # fewer shards than before
        (lambda out, u: (out / "shards" / "shard-000001.tar").unlink(), 2),
        (lambda out, u: (out / "shards" / "shard-000001.tar").write_bytes(b"x"), 2),
        (lambda out, u: (out / "records" / "shard-000001.json").unlink(), 2),
        (lambda out, u: (out / "shards" / "shard-000001.tar.7").write_bytes(b"x"), 3),
    ],
)
def test_resume_reuses_only_shards_of_the_same_source(tmp_path, change, kept):
    utterances = tones(6)
    interrupted(tmp_path / "out", utterances)
    change(tmp_path / ".out.partial", utterances)
    assert write_shards(tmp_path / "out", utterances, utterances_per_shard=2).reused == kept
    write_shards(tmp_path / "whole", utterances, utterances_per_shard=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("options", [{"fields": {"lang": "en"}}, {"codec": "keep"}, {"seed": 1}])
def test_changed_options_rewrite_all_shards(tmp_path, options):
    interrupted(tmp_path / "out", tones(6))
    assert write_shards(tmp_path / "out", tones(6), utterances_per_shard=2, **options).reused == 0


def test_rejects_of_reused_shards_are_counted(tmp_path):
    utterances = [
        *tones(2),
        utterance("x", text=""),
        utterance("y", text="", fields={"lang": "\ud800"}),
        *tones(4),
    ]
    utterances = [u if u.text else Utterance(key=u.key, text="") for u in utterances]
    interrupted(tmp_path / "out", utterances[:4])
    summary = write_shards(tmp_path / "out", utterances, utterances_per_shard=2)
    assert (summary.reused, summary.rejected) == (2, {"empty_text": 2, "duplicate_key": 2})
    assert [row["key"] for row in rejected(tmp_path / "out")] == ["x", "y", "k0", "k1"]


# --- several processes ---


@pytest.mark.slow  # the first of these starts the server that the others fork from
def test_the_same_input_gives_the_same_bytes_for_any_number_of_workers(tmp_path):
    kaldi = kaldi_directory(tmp_path / "kaldi", tone_sentences(11))
    (kaldi / "wav" / "utt0003.wav").unlink()
    counts = {}
    for name, workers in (("a", 1), ("b", 2), ("c", 3)):
        advanced = []
        write_shards(
            tmp_path / name,
            read_kaldi(kaldi),
            utterances_per_shard=2,
            workers=workers,
            advance=advanced.append,
        )
        counts[name] = sum(advanced)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    assert counts == {"a": 11, "b": 11, "c": 11}


@pytest.mark.slow
def test_errors_in_workers_reach_the_user(tmp_path):
    fatal = [Utterance(key=f"f{i}", text="one", load=Fatal()) for i in range(3)]
    with pytest.raises(UserError, match=r"-9.*--workers"):
        write_shards(tmp_path / "out", [*tones(2), *fatal], utterances_per_shard=2, workers=2)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        list(run_parallel(divide, [1, 0], 2, lambda count: None))
    assert sorted(run_parallel(divide, [1, 2, 4, 5], 2, lambda count: None)) == [
        (0, 1.0),
        (1, 0.5),
        (2, 0.25),
        (3, 0.2),
    ]


def divide(number, advance):
    return 1 / number


def start_making(kaldi, out, workers, temporary):
    command = [
        sys.executable,
        REPOSITORY / "launch" / "make_shards.py",
        out,
        "--kaldi",
        kaldi,
        "--allow-pipes",
    ]
    command += ["--utterances-per-shard", "2", "--workers", str(workers)]

    def listen():  # background jobs of a shell ignore SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        [*map(str, command)],
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(TMPDIR=temporary),
        preexec_fn=listen,
    )


def wait_for(path, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"{path} has not appeared"
        time.sleep(0.02)


@pytest.mark.slow
def test_writing_resumes_after_an_interruption_and_after_a_kill(tmp_path):
    """Utterance 4, in the third shard, is a pipe that blocks its worker until a file exists."""
    kaldi, out = kaldi_directory(tmp_path / "kaldi", tone_sentences(9)), tmp_path / "out"
    records = tmp_path / ".out.partial" / "records"
    wait = f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; cat {kaldi}/wav/utt0004.wav |"
    (kaldi / "wav.scp").write_text((kaldi / "wav.scp").read_text().replace("wav/utt0004.wav", wait))

    temporary = tempfile.mkdtemp()  # short, because a socket has at most 107 characters
    process = start_making(kaldi, out, 1, temporary)
    wait_for(records / "shard-000001.json", process)
    with pytest.raises(UserError, match=f"process .*'{out}'"):
        write_shards(out, read_kaldi(kaldi, allow_pipes=True), utterances_per_shard=2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(rf"\b2 .*{tmp_path}/\.out\.partial", errors)
    assert not out.exists()

    process = start_making(kaldi, out, 2, temporary)
    wait_for(records / "shard-000003.json", process)  # made by the other worker
    process.kill()
    # until the last worker has noticed and closed its standard error
    process.communicate(timeout=60)
    assert not out.exists()
    assert os.listdir(temporary) == []
    os.rmdir(temporary)

    (tmp_path / "go").touch()
    fields = {"corpus": "out"}
    source = {"utterances_per_shard": 2, "fields": fields}
    summary = write_shards(out, read_kaldi(kaldi, allow_pipes=True), **source)
    assert summary.reused in (3, 4)  # the fifth shard may have been finished before the kill
    assert not (tmp_path / ".out.partial").exists()
    write_shards(tmp_path / "whole", read_kaldi(kaldi, allow_pipes=True), **source)
    assert contents(out) == contents(tmp_path / "whole")
    assert keys(out) == [f"utt{i:04d}" for i in range(9)]


def test_temporary_directory_that_is_too_long_for_sockets_is_reported(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    monkeypatch.setattr("multiprocessing.util.get_temp_dir", lambda: str(long))
    with pytest.raises(UserError, match=f"'{long}' .*TMPDIR"):
        list(run_parallel(str, range(4), 2, lambda _: None))


# --- opening ---


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "index.json").unlink(), "out'.*index.json"),
        (lambda out: (out / "shard-000000.tar").unlink(), "/shard-000000.tar' "),
        (lambda out: (out / "index.json").write_text("{"), r"index\.json:1:2 .*JSON"),
        (lambda out: (out / "index.json").write_text("{}"), "out'.*KeyError"),
        (lambda out: (out / "index.bin").write_bytes(b"x"), "out'.*index.bin .* 1 bytes"),
        (
            lambda out: (out / "shard-000000.tar").write_bytes(b"x"),
            r"shard-000000.tar' is truncated.* 1 bytes.*Copy the shard again\.$",
        ),
        (
            lambda out: (out / "shard-000000.tar").write_bytes(bytes(1 << 20)),
            "shard-000000.tar' has changed.* index it again",
        ),
        (shutil.rmtree, "out' .*'asrllm shards make "),
    ],
)
def test_a_damaged_shard_directory_is_reported(tmp_path, damage, message):
    write_shards(tmp_path / "out", [utterance()])
    damage(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        open_index(tmp_path / "out")


def test_a_sample_has_the_same_bytes_as_from_webdatasets_writer(tmp_path):
    samples = [
        {"__key__": "a/b", "json": b'{"text": "x"}', "flac": bytes(1000)},
        {"__key__": "é" * 60, "wav": b"", "json": b"{}"},
    ]
    with tarfile.open(tmp_path / "ours.tar", "w|") as tar:
        for sample in samples:
            write_sample(tar, sample)
    with (
        open(tmp_path / "theirs.tar", "wb") as file,
        webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as writer,
    ):
        for sample in samples:
            writer.write(sample)
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()
