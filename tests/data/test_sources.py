import base64
import gzip
import json
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, MonoCut, MultiCut, Recording, SupervisionSegment

from asrllm.data.corpora import read_corpora
from asrllm.data.index import open_index
from asrllm.data.samples import make_sample
from asrllm.data.shards import write_shards
from asrllm.data.sources import SOURCES, RejectedError, Utterance, read_cuts, read_kaldi
from asrllm.data.sources import kaldi as kaldi_module
from asrllm.data.tars import scan_tar
from asrllm.errors import UserError
from asrllm.testing import kaldi_directory, tone, tone_sentences

# --- Kaldi ---


def test_kaldi_segments_are_cut_out_of_recordings(tmp_path):
    kaldi = kaldi_directory(
        tmp_path / "k", [("one two", np.concatenate([tone("one", 1.0), tone("two", 1.0)]))]
    )
    (kaldi / "segments").write_text("a utt0000 0.0 1.0\nb utt0000 1.0 1.75\nc utt0000 1.5 -1\n")
    (kaldi / "text").write_text("a one\nb two\nc two\n")
    (kaldi / "utt2spk").write_text("a s\nb s\n")
    (kaldi / "utt2lang").write_text("a en\nb en\n")
    a, b, c = read_kaldi(kaldi)
    assert (a.key, a.text, a.duration, a.fields, a.file) == (
        "a",
        "one",
        None,
        {"speaker": "s", "lang": "en", "recording": "utt0000"},
        None,
    )
    wave, rate = b.load()
    assert (rate, len(wave)) == (16000, 12000)
    np.testing.assert_allclose(wave, tone("two", 0.75), atol=1e-4)
    assert (c.duration, len(c.load()[0])) == (None, 8000)  # -1 means the end


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("wav.scp", None, r"k'.*wav\.scp"),
        ("wav.scp", "", r"k/wav\.scp' .*empty"),
        ("text", "\n", "k/text'"),
        ("text", "utt0000 one\n".encode("utf-16"), r"k/text' .*UTF-16.*UTF-8"),
        ("wav.scp", "utt0000 a.wav\rutt0001 b.wav\r", r"k/wav\.scp' .*carriage return"),
        ("text", "utt0000 one\rutt0001 one\r", r"k/text' .*carriage return"),
    ],
)
def test_an_invalid_kaldi_directory_is_reported(tmp_path, file, content, message):
    kaldi = kaldi_directory(tmp_path / "k", tone_sentences(2))
    (kaldi / file).unlink(missing_ok=True)
    if content is not None:
        (kaldi / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message):
        list(read_kaldi(kaldi))


@pytest.mark.parametrize(
    ("file", "content", "reason", "detail"),
    [
        (
            "wav.scp",
            "utt0000\nutt0001 {folder}/wav/utt0001.wav\n",
            "missing_audio",
            "recording 'utt0000'",
        ),
        (
            "wav.scp",
            "utt0000 touch ran |\nutt0001 {folder}/wav/utt0001.wav\n",
            "not_allowed",
            "--allow-pipes",
        ),
        (
            "segments",
            "utt0000 other 0 1\nutt0001 utt0001 0 -1\n",
            "missing_audio",
            "recording 'other'",
        ),
        (
            "segments",
            "utt0000 utt0000 0\nutt0001 utt0001 0 -1\n",
            "bad_segment",
            "'utt0000 0'",
        ),
        (
            "segments",
            "utt0000 utt0000 0 x\nutt0001 utt0001 0 -1\n",
            "bad_segment",
            "'utt0000 0 x'",
        ),
        (
            "segments",
            "utt0000 utt0000 2 1\nutt0001 utt0001 0 -1\n",
            "bad_segment",
            "2 to 1 s",
        ),
        (
            "segments",
            "utt0000 utt0000 -1 1\nutt0001 utt0001 0 -1\n",
            "bad_segment",
            " -1 s",
        ),
        (
            "segments",
            "utt0000 utt0000 0 nan\nutt0001 utt0001 0 -1\n",
            "bad_segment",
            "0 to nan s",
        ),
        (
            "wav.scp",
            "utt0000 https://host/a.wav\nutt0001 {folder}/wav/utt0001.wav\n",
            "missing_audio",
            "'https://host/a.wav'",
        ),
        ("text", "utt0001 one\nutt0000 one\rutt0002 two\n", "bad_row", "k/text has a carriage"),
        ("text", "utt0001 one\nutt0000\rutt0002 two\n", "empty_text", ""),
        ("text", "utt0001 one\nutt0000\xc2\x85utt0002 two\n", "empty_text", ""),
        (
            "wav.scp",
            "utt0000 a\0.wav\nutt0001 {folder}/wav/utt0001.wav\n",
            "missing_audio",
            r"'a\x00.wav'",
        ),
        ("utt2spk", "utt0000 \xff\nutt0001 s\n", "broken_text", "UTF-8"),
        ("text", "utt0000 \xff\nutt0001 one\n", "broken_text", "UTF-8"),
    ],
)
def test_a_bad_line_of_a_kaldi_table_rejects_one_utterance(tmp_path, file, content, reason, detail):
    kaldi = kaldi_directory(tmp_path / "k", tone_sentences(2))
    (kaldi / file).write_bytes(content.replace("{folder}", str(kaldi)).encode("latin-1"))
    write_shards(tmp_path / "out", read_kaldi(kaldi))
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text().strip()
    rows = [json.loads(line) for line in rejected.split("\n")]
    (row,) = [row for row in rows if row["key"] == "utt0000"]
    assert row["reason"] == reason
    assert detail in row["detail"]
    assert len(open_index(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("text", "utt0000 one\nutt0000 two\nutt0001 one\n"),
        ("text", "utt0000 one\nutt0001 one\nutt0000 two\n"),
        ("utt2spk", "utt0000 ann\nutt0000 bob\nutt0001 ann\n"),
        (
            "wav.scp",
            "utt0000 {folder}/wav/utt0000.wav\n"
            "utt0000 {folder}/wav/utt0001.wav\n"
            "utt0001 {folder}/wav/utt0001.wav\n",
        ),
        ("segments", "utt0000 utt0000 0 -1\nutt0001 utt0001 0 -1\nutt0000 utt0001 0 -1\n"),
    ],
)
@pytest.mark.parametrize("in_order", [True, False])
def test_a_key_with_several_lines_in_a_kaldi_table_is_rejected(tmp_path, file, content, in_order):
    kaldi = kaldi_directory(tmp_path / "k", tone_sentences(2))
    (kaldi / file).write_text(content.replace("{folder}", str(kaldi)))
    if not in_order:
        for table in kaldi.glob("[!w]*"):
            table.write_text("".join(reversed(table.read_text().splitlines(keepends=True))))
    summary = write_shards(tmp_path / "out", read_kaldi(kaldi))
    assert summary.rejected.keys() == {"duplicate_key"}
    (left,) = scan_tar(tmp_path / "out" / "shard-000000.tar")
    assert left.key == "utt0001"


def test_a_recording_with_several_lines_rejects_its_segments(tmp_path):
    kaldi = kaldi_directory(tmp_path / "k", tone_sentences(2))
    (kaldi / "segments").write_text("utt0000 utt0000 0 -1\nutt0001 utt0001 0 -1\n")
    with (kaldi / "wav.scp").open("a") as table:
        table.write(f"utt0000 {kaldi}/wav/utt0001.wav\n")
    found = {utterance.key: utterance.problem for utterance in read_kaldi(kaldi)}
    assert found["utt0001"] is None
    assert found["utt0000"][0] == "duplicate_key"


def test_byte_order_marks_are_removed_from_keys(tmp_path):
    kaldi = kaldi_directory(tmp_path / "k", tone_sentences(2))
    for name in ("wav.scp", "text"):
        content = (kaldi / name).read_text()
        (kaldi / name).write_text("\ufeff" + content.replace("\n", "\n\ufeff", 1))
    assert [(u.key, u.problem) for u in read_kaldi(kaldi)] == [("utt0000", None), ("utt0001", None)]


def test_kaldi_tables_may_be_unsorted(tmp_path):
    sentences = tone_sentences(5)
    kaldi = kaldi_directory(tmp_path / "k", sentences)
    expected = [(u.key, u.text, u.fields) for u in read_kaldi(kaldi)]
    assert [text for _, text, _ in expected] == [words for words, _ in sentences]
    for name in ("text", "wav.scp"):
        lines = (kaldi / name).read_text().splitlines(keepends=True)
        (kaldi / name).write_text("".join(reversed(lines)))
        assert sorted((u.key, u.text, u.fields) for u in read_kaldi(kaldi)) == expected


@pytest.mark.parametrize("lost", ["utt0000a", "a", "z"])  # in the middle, first, last
def test_a_transcript_without_audio_is_rejected(tmp_path, lost):
    kaldi = kaldi_directory(tmp_path / "k", tone_sentences(2))
    (kaldi / "text").write_text("\n".join(sorted(["utt0000 one", "utt0001 one", f"{lost} two"])))
    *_, last = read_kaldi(kaldi)
    assert (last.key, last.text, last.problem[0]) == (lost, "two", "missing_audio")
    assert len(list(read_kaldi(kaldi))) == 3


def test_relative_paths_of_kaldi_may_start_at_the_current_directory(tmp_path, monkeypatch):
    kaldi = kaldi_directory(tmp_path / "k", tone_sentences(1))
    (kaldi / "wav.scp").write_text("utt0000 k/wav/utt0000.wav\n")
    monkeypatch.chdir(tmp_path)
    (utterance,) = read_kaldi(kaldi)
    assert utterance.file == tmp_path / "k/wav/utt0000.wav"


def test_kaldi_pipes_run_if_they_are_allowed(tmp_path, monkeypatch):
    kaldi = kaldi_directory(tmp_path / "k", [("one", tone("one", 0.5))])
    wav = kaldi / "wav" / "utt0000.wav"
    stream = bytearray(wav.read_bytes())
    stream[4:8] = stream[40:44] = b"\xff\xff\xff\xff"  # as ffmpeg writes to a pipe
    (kaldi / "stream.wav").write_bytes(stream)
    (kaldi / "wav.scp").write_text(
        f"a cat {wav} |\n"
        f"b cat {kaldi}/stream.wav | cat |\n"
        "c echo first >&2; echo no such codec >&2; exit 3 |\n"
        "d sleep 60 & sleep 60 |\n"
    )
    (kaldi / "text").write_text("a one\nb one\nc one\nd one\n")
    a, b, c, d = read_kaldi(kaldi, allow_pipes=True)
    for utterance in (a, b):
        np.testing.assert_allclose(utterance.load()[0], tone("one", 0.5), atol=1e-4)
        assert utterance.file is None
    with pytest.raises(RejectedError, match="3: no such codec") as failure:
        c.load()
    assert failure.value.args[0] == "failed_pipe"
    monkeypatch.setattr(kaldi_module, "PIPE_TIMEOUT", 0.2)
    with pytest.raises(RejectedError, match=r"sleep 60.* 0\.2 s"):
        d.load()


def test_the_output_of_a_pipe_is_bounded(monkeypatch):
    monkeypatch.setattr(kaldi_module, "MAX_PIPE_OUTPUT", 1 << 20)
    assert len(kaldi_module.run_command("head -c 1048576 /dev/zero")) == 1 << 20
    tracemalloc.start()
    try:
        with pytest.raises(RejectedError, match="1 MiB") as failure:
            kaldi_module.run_command("cat /dev/zero")
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
    assert failure.value.args[0] == "failed_pipe"


def test_the_output_of_a_pipe_is_held_once():
    size = 32 << 20
    tracemalloc.start()
    try:
        assert len(kaldi_module.run_command(f"head -c {size} /dev/zero")) == size
        assert tracemalloc.get_traced_memory()[1] < 1.3 * size
    finally:
        tracemalloc.stop()


def test_the_error_output_of_a_pipe_is_bounded():
    command = "head -c 3000000 /dev/zero >&2; echo >&2; echo the reason >&2; exit 4"
    with pytest.raises(RejectedError, match="4: the reason"):
        kaldi_module.run_command(command)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["too much", "too long"])
def test_the_children_of_a_pipe_are_killed_with_it(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(kaldi_module, "MAX_PIPE_OUTPUT", 1000)
    monkeypatch.setattr(kaldi_module, "PIPE_TIMEOUT", 0.3)
    last = "cat /dev/zero" if kind == "too much" else "sleep 60"
    with pytest.raises(RejectedError):
        kaldi_module.run_command(f"sleep 60 & echo $! > {tmp_path}/pid; {last}")
    wait_until_ended(int((tmp_path / "pid").read_text()))


@pytest.mark.slow
def test_the_children_of_a_pipe_are_killed_with_this_process(tmp_path):
    command = f"sleep 60 & echo $! > {tmp_path}/pid; mv {tmp_path}/pid {tmp_path}/child; sleep 60"
    script = f"from asrllm.data.sources.kaldi import run_command; run_command({command!r})"
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        wait_for((tmp_path / "child").exists)
        process.kill()
    wait_until_ended(int((tmp_path / "child").read_text()))


def wait_for(is_true):
    deadline = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_until_ended(process):
    """Wait until a process has ended; it may remain as a zombie of another parent."""
    stat = Path(f"/proc/{process}/stat")

    def has_ended():
        try:
            return stat.read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    wait_for(has_ended)


def test_a_pipe_runs_once_for_consecutive_segments(tmp_path):
    kaldi = kaldi_directory(tmp_path / "k", [("one", tone("one", 0.5))])
    (kaldi / "wav.scp").write_text(f"r echo x >> {kaldi}/runs; cat {kaldi}/wav/utt0000.wav |\n")
    (kaldi / "segments").write_text("a r 0 0.2\nb r 0.2 0.5\n")
    (kaldi / "text").write_text("a one\nb one\n")
    assert [len(u.load()[0]) for u in read_kaldi(kaldi, allow_pipes=True)] == [3200, 4800]
    assert (kaldi / "runs").read_text() == "x\n"


def test_wavs_are_read_from_kaldi_archives(tmp_path):
    kaldi = kaldi_directory(tmp_path / "k", [("one", tone("one", 0.5)), ("two", tone("two", 0.25))])
    ark, lines = b"", []
    for key in ("utt0000", "utt0001"):
        ark += f"{key} ".encode()
        lines.append(f"{key} wav.ark:{len(ark)}\n")
        ark += (kaldi / "wav" / f"{key}.wav").read_bytes()
    (kaldi / "wav.ark").write_bytes(ark)
    (kaldi / "wav.scp").write_text("".join(lines))
    one, two = read_kaldi(kaldi)
    np.testing.assert_allclose(one.load()[0], tone("one", 0.5), atol=1e-4)
    np.testing.assert_allclose(two.load()[0], tone("two", 0.25), atol=1e-4)
    (kaldi / "wav.scp").write_text("utt0000 wav.ark:3\n")
    with pytest.raises(RejectedError, match=r"wav\.ark:3"):
        next(read_kaldi(kaldi)).load()


# --- cuts ---


def write_cuts(folder, name="cuts.jsonl.gz"):
    folder.mkdir(exist_ok=True)
    soundfile.write(folder / "r.wav", np.concatenate([tone("one", 1.0), tone("two", 0.5)]), 16000)
    recording = Recording.from_file(folder / "r.wav")

    def supervision(key, start, duration, text):
        custom = {"prompt": "Write.", "other": 1} if key == "y" else None
        return SupervisionSegment(
            key, recording.id, start, duration, text=text, language="en", speaker="s", custom=custom
        )

    whole = MonoCut(
        "long",
        0,
        1.5,
        0,
        [supervision("x", 0, 1.0, "one"), supervision("y", 1.0, 0.5, "two")],
        recording=recording,
    )
    single = MonoCut(
        "short",
        1.0,
        0.5,
        0,
        [supervision("z", 0, 0.5, "two")],
        recording=recording,
        custom={"hotwords": ["two"]},
    )
    CutSet.from_cuts([whole, single]).to_file(folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("text", "expected"),
    [(5, "5"), (["one"], "bad_field"), ({"a": 1}, "bad_field"), (True, "bad_field")],
)
def test_supervision_whose_text_is_not_text_is_converted_or_rejected_alone(
    tmp_path, text, expected
):
    path = write_cuts(tmp_path, "cuts.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["supervisions"][0]["text"] = text
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    *good, changed = read_cuts(path)
    assert [utterance.text for utterance in good] == ["one", "two"]
    found = changed.problem[0] if changed.problem else changed.text
    assert found == expected


def test_a_cut_of_several_supervisions_gives_one_utterance_each(tmp_path):
    path = write_cuts(tmp_path)
    utterances = list(read_cuts(path))
    fields = {"speaker": "s", "lang": "en", "recording": "r"}
    assert [(u.key, u.text, u.duration, u.fields, u.file) for u in utterances] == [
        ("x", "one", 1.0, fields, None),
        ("y", "two", 0.5, fields | {"prompt": "Write."}, None),
        ("short", "two", 0.5, fields | {"hotwords": ["two"]}, None),
    ]
    assert SOURCES["cuts"].count(path) == 3
    for u in utterances[1:3]:
        wave, rate = u.load()
        np.testing.assert_allclose(wave, tone("two", 0.5), atol=1e-4)
        assert rate == 16000


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text": ["one"]}, "bad_field"),
        ({"duration": 0}, "outside_cut"),
        ({"start": 0, "duration": 1e-6}, "broken_cut"),  # Lhotse rounds it to 0
        ({"start": 1.5}, "outside_cut"),
    ],
)
def test_an_odd_supervision_is_rejected_without_the_others_of_its_cut(tmp_path, changes, reason):
    path = write_cuts(tmp_path, "cuts.jsonl")
    row = json.loads(path.read_text().splitlines()[0])
    row["supervisions"][0] |= changes
    path.write_text(json.dumps(row) + "\n")
    odd, other = read_cuts(path)
    assert (odd.key, odd.problem[0]) == ("x", reason)
    assert (other.key, other.problem, other.text) == ("y", None, "two")


def test_a_cut_that_is_a_whole_file_names_it(tmp_path):
    soundfile.write(tmp_path / "r.wav", np.stack([tone("one", 1.0), tone("two", 1.0)], 1), 16000)
    recording = Recording.from_file(tmp_path / "r.wav")
    cuts = [
        recording.to_cut(),
        MonoCut("left", 0, 1.0, 0, recording=recording),
        recording.perturb_speed(1.1).to_cut(),
    ]
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl")
    assert [u.file for u in read_cuts(tmp_path / "cuts.jsonl")] == [tmp_path / "r.wav", None, None]


def cut_of(tmp_path, seconds, *, stated, rate=16000, stated_rate=16000, span=None, transforms=()):
    """Return the utterance of a cut whose recording states other values than its file has.

    Args:
        seconds: of the file.
        stated: of the recording.
        rate: of the file.
        stated_rate: of the recording.
        span: start and duration of the cut; None is the whole recording.
        transforms: of the recording.
    """
    time = np.arange(round(seconds * rate)) / rate
    soundfile.write(tmp_path / "r.wav", 0.5 * np.sin(2 * np.pi * 440 * time), rate)
    recording = Recording.from_file(tmp_path / "r.wav").to_dict() | {
        "sampling_rate": stated_rate,
        "num_samples": round(stated * stated_rate),
        "duration": stated,
        "transforms": list(transforms),
    }
    start, duration = span or (0.0, stated)
    row = {"id": "a", "type": "MonoCut", "start": start, "duration": duration, "channel": 0}
    text = {"id": "a", "recording_id": "r", "start": 0.0, "duration": duration, "text": "one"}
    row |= {"recording": recording, "supervisions": [text]}
    (tmp_path / "cuts.jsonl").write_text(json.dumps(row))
    (utterance,) = read_cuts(tmp_path / "cuts.jsonl")
    return utterance


@pytest.mark.parametrize(
    ("seconds", "stated", "stated_rate"), [(1.6, 2.0, 16000), (2.4, 2.0, 16000), (2.0, 4.0, 8000)]
)
@pytest.mark.parametrize("transforms", [(), [{"name": "Volume", "kwargs": {"factor": 0.5}}]])
def test_length_of_a_recording_that_is_not_that_of_its_file_is_rejected(
    tmp_path, seconds, stated, stated_rate, transforms
):
    """Lhotse repeats or cuts off up to half a second without a word."""
    utterance = cut_of(
        tmp_path, seconds, stated=stated, stated_rate=stated_rate, transforms=transforms
    )
    with pytest.raises(RejectedError) as found:
        make_sample(utterance, {})
    assert found.value.args[0] == "duration_mismatch"
    assert f"{seconds:.3f} s" in found.value.args[1]


def test_length_before_a_change_of_speed_is_that_of_the_file(tmp_path):
    speed = {"name": "Speed", "kwargs": {"factor": 1.25}}
    utterance = cut_of(tmp_path, 2.0, stated=1.6, transforms=[speed])
    wave, rate = utterance.load()
    assert (len(wave), rate) == (25600, 16000)


@pytest.mark.parametrize("stated_rate", [8000, 22050])
def test_part_of_a_file_has_the_sampling_rate_that_the_recording_states(tmp_path, stated_rate):
    """Lhotse would take the samples of another rate, and cut off or repeat the rest."""
    utterance = cut_of(tmp_path, 2.0, stated=2.0, stated_rate=stated_rate, span=(1.0, 0.5))
    wave, rate = utterance.load()
    assert (len(wave), rate) == (stated_rate // 2, stated_rate)
    assert np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave) == 440


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "a"}', r"cuts\.jsonl:1 .*lhotse cut simple"),
        ('{"audio_filepath": "a", "text": "b"}', r"cuts\.jsonl:1 .*--nemo"),
        ('{"key": "a", "wav": "b", "txt": "c"}', r"cuts\.jsonl:1 .*--wenet"),
        ('{"key": "a", "source": "b", "target": "c"}', r"cuts\.jsonl:1 .*--slam"),
        ("", r"cuts\.jsonl' .*empty"),
        ("\n\n", r"cuts\.jsonl'"),
        (None, r"cuts\.jsonl' "),
    ],
)
def test_an_invalid_cuts_manifest_is_reported(tmp_path, content, message):
    if content is not None:
        (tmp_path / "cuts.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_cuts(tmp_path / "cuts.jsonl"))


def test_a_truncated_gzip_file_is_reported(tmp_path):
    (tmp_path / "cuts.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1}\n' * 1000)[:-20])
    with pytest.raises(UserError, match=r"cuts\.jsonl"):
        list(read_cuts(tmp_path / "cuts.jsonl.gz"))


def cut_of_file(path, name):
    recording = Recording.from_file(path, recording_id=name)
    supervision = SupervisionSegment(name, name, 0.0, recording.duration, text="one")
    return MonoCut(name, 0, recording.duration, 0, [supervision], recording=recording)


@pytest.mark.parametrize("row", ["5", "null", '{"id":', "[" * 100_000])
def test_a_row_that_is_not_a_cut_is_rejected_alone(tmp_path, row):
    soundfile.write(tmp_path / "a.wav", tone("one", 1.0), 16000)
    CutSet.from_cuts([cut_of_file(tmp_path / "a.wav", "a")]).to_file(tmp_path / "c.jsonl")
    with open(tmp_path / "c.jsonl", "a") as manifest:
        manifest.write(f"{row}\n")
    summary = write_shards(tmp_path / "out", read_cuts(tmp_path / "c.jsonl"))
    assert summary.rejected == {"bad_json": 1}
    assert len(summary.index) == 1


def test_a_cut_whose_file_is_missing_is_rejected_alone(tmp_path):
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", tone("one", 1.0), 16000)
    cuts = [cut_of_file(tmp_path / f"{name}.wav", name) for name in ("a", "b")]
    CutSet.from_cuts(cuts).to_file(tmp_path / "c.jsonl")
    (tmp_path / "b.wav").unlink()
    summary = write_shards(tmp_path / "out", read_cuts(tmp_path / "c.jsonl"))
    assert summary.rejected == {"missing_audio": 1}
    (row,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert str(tmp_path / "b.wav") in row["detail"]


def test_a_cut_whose_recording_is_null_is_rejected(tmp_path):
    (utterance,) = read_cuts(write_row(tmp_path / "cuts.jsonl", recording=None))
    assert utterance.problem[0] == "missing_audio"


def test_a_cut_without_a_recording_is_rejected(tmp_path):
    cut = {
        "id": "a",
        "start": 0,
        "duration": 1.0,
        "channel": 0,
        "supervisions": [],
        "type": "MonoCut",
    }
    (tmp_path / "cuts.jsonl").write_text(json.dumps(cut))
    (utterance,) = read_cuts(tmp_path / "cuts.jsonl")
    assert utterance.problem[0] == "missing_audio"


def write_row(path, **changes):
    """Write a manifest of one cut of one second of r.wav, with changes of its JSON."""
    soundfile.write(path.parent / "r.wav", tone("one", 1.0), 16000)
    cut = Recording.from_file(path.parent / "r.wav").to_cut().to_dict()
    supervision = {
        "id": "s",
        "recording_id": "r",
        "start": 0.0,
        "duration": 1.0,
        "channel": 0,
        "text": "one",
    }
    path.write_text(json.dumps(cut | {"supervisions": [supervision]} | changes))
    return path


def with_source(folder, kind, source, wrap=lambda row: row):
    """Write a manifest of `wrap` of a cut whose recording has this source."""
    path = write_row(folder / "cuts.jsonl")
    row = json.loads(path.read_text())
    row["recording"]["sources"] = [{"type": kind, "channels": [0], "source": source}]
    path.write_text(json.dumps(wrap(row)))
    return path


def mixed(row):
    plain = json.loads(json.dumps(row))
    plain["recording"]["sources"][0] |= {"type": "file", "source": "r.wav"}
    return {
        "id": "m",
        "type": "MixedCut",
        "tracks": [
            {"cut": plain, "type": "MonoCut", "offset": 0.0},
            {"cut": row, "type": "MonoCut", "offset": 0.5, "snr": 10},
        ],
    }


def padded(row):
    padding = {
        "id": "p",
        "duration": 0.5,
        "sampling_rate": 16000,
        "feat_value": 0,
        "num_samples": 8000,
        "type": "PaddingCut",
    }
    return {
        "id": "m",
        "type": "MixedCut",
        "tracks": [
            {"cut": row, "type": "MonoCut", "offset": 0.0},
            {"cut": padding, "type": "PaddingCut", "offset": 1.0},
        ],
    }


def reverberant(row):
    recording = row["recording"]
    row["recording"] = recording | {
        "sources": [{"type": "file", "channels": [0], "source": "r.wav"}],
        "transforms": [{"name": "ReverbWithImpulseResponse", "kwargs": {"rir": recording}}],
    }
    return row


@pytest.mark.parametrize(
    ("name", "fields", "shown"),
    [
        ("Speed", {"factor": 1e-6}, "1e-06"),
        ("Speed", {"factor": 1e6}, "1000000.0"),
        ("Speed", {"factor": "1.1"}, "'1.1'"),
        ("Speed", {"factor": 1.0001}, "1.0001"),  # a filter of 256 million values
        ("Tempo", {"factor": 0.0}, "0.0"),
        ("Resample", {"source_sampling_rate": 1, "target_sampling_rate": 16000}, "is 1,"),
        ("Resample", {"source_sampling_rate": 16001, "target_sampling_rate": 16000}, "16001"),
        ("Narrowband", {"codec": "mulaw", "source_sampling_rate": 999983}, "999983"),
        ("Speed", [1.1], "[1.1]"),
    ],
)
@pytest.mark.parametrize("of_response", [False, True])
def test_transform_that_takes_much_memory_rejects_its_cut(
    tmp_path, name, fields, shown, of_response
):
    path = write_row(tmp_path / "cuts.jsonl")
    row = json.loads(path.read_text())
    row["recording"]["transforms"] = [{"name": name, "kwargs": fields}]
    if of_response:
        row = reverberant(row)
    path.write_text(json.dumps(row))
    (utterance,) = read_cuts(path)
    assert utterance.problem[0] == "bad_field"
    assert shown in utterance.problem[1]
    assert name in utterance.problem[1]


def test_factor_of_a_common_speed_perturbation_is_read(tmp_path):
    path = write_row(tmp_path / "cuts.jsonl")
    row = json.loads(path.read_text())
    row["recording"]["transforms"] = [{"name": "Speed", "kwargs": {"factor": 0.9}}]
    path.write_text(json.dumps(row))
    (utterance,) = read_cuts(path)
    assert utterance.problem is None


@pytest.mark.parametrize("field", ["offset", "duration"])
def test_mixed_cut_that_is_mostly_padding_is_rejected(tmp_path, field):
    path = write_row(tmp_path / "cuts.jsonl")
    row = padded(json.loads(path.read_text()) | {"supervisions": []})
    seconds = 1_000_000
    if field == "offset":
        row["tracks"][1]["offset"] = seconds
    else:
        row["tracks"][1]["cut"] |= {"duration": seconds, "num_samples": 16000 * seconds}
    path.write_text(json.dumps(row))
    (utterance,) = read_cuts(path)
    with pytest.raises(RejectedError) as raised:
        utterance.load()
    assert raised.value.args[0] == "bad_field"
    assert str(16000 * seconds)[:6] in raised.value.args[1]


@pytest.mark.parametrize("seconds", [-1, 1e300, float("nan"), "x", [1]])
@pytest.mark.parametrize("where", ["cut", "supervision", "track"])
def test_time_that_is_not_a_number_of_seconds_rejects_its_cut(tmp_path, where, seconds):
    path = write_row(tmp_path / "cuts.jsonl")
    row = json.loads(path.read_text())
    changed = row["supervisions"][0] if where == "supervision" else row
    changed["duration"] = seconds
    if where == "track":
        row = {"id": "m", "type": "MixedCut", "tracks": [{"cut": row, "offset": 0.0}]}
    path.write_text(json.dumps(row))
    (utterance,) = read_cuts(path)
    assert utterance.problem[0] == "bad_field"
    assert f"'duration' is {seconds!r}" in utterance.problem[1]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"supervisions": None}, "'supervisions' is None"),
        ({"recording": [1]}, "'recording' is [1]"),
        ({"id": None}, "'id'"),
        ({"type": "MixedCut", "tracks": []}, "'tracks' is []"),
        ({"type": "MixedCut", "tracks": [{"offset": 0.0}] * 1001}, "1001 tracks"),
        ({"recording": {"sampling_rate": "16000"}}, "'sampling_rate' is '16000'"),
        ({"recording": {"sampling_rate": 0}}, "'sampling_rate' is 0"),
        ({"recording": {"sampling_rate": 10**30}}, f"'sampling_rate' is {10**30}"),
        ({"recording": {"num_samples": 10**30}}, f"'num_samples' is {10**30}"),
        ({"recording": {"sources": [{"type": "file", "source": None}]}}, "'source' is None"),
        (
            {"recording": {"sources": [{"type": "memory", "channels": [0], "source": "x"}]}},
            "base64",
        ),
        ({"recording": {"sources": [{"type": "memory", "source": [1]}]}}, "'source' is [1]"),
        ({"start": None}, "'start' is None"),
        ({"start": "1.0"}, "'start' is '1.0'"),
    ],
)
def test_field_of_another_type_rejects_its_cut(tmp_path, changes, shown):
    (utterance,) = read_cuts(write_row(tmp_path / "cuts.jsonl", **changes))
    assert utterance.problem[0] == "bad_field"
    assert shown in utterance.problem[1]


@pytest.mark.parametrize("name", ["", "a\0.wav", "\ud800.wav"])
def test_cut_whose_audio_no_file_can_be_named_is_rejected(tmp_path, name):
    source = {"type": "file", "channels": [0], "source": name}
    (utterance,) = read_cuts(write_row(tmp_path / "cuts.jsonl", recording={"sources": [source]}))
    assert utterance.problem[0] == "missing_audio"


CUT_FIELDS = [
    *[(None, name) for name in ("start", "duration", "channel", "recording", "supervisions")],
    (None, "custom"),
    *[("recording", name) for name in ("sampling_rate", "num_samples", "duration", "sources")],
    *[("recording", name) for name in ("channel_ids", "transforms")],
    *[("source", name) for name in ("type", "channels", "source")],
    *[("supervision", name) for name in ("start", "duration", "channel", "text", "custom")],
    ("supervision", "alignment"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "name"), CUT_FIELDS)
def test_the_field_of_a_bad_value_is_named(tmp_path, place, name):
    path = write_row(tmp_path / "cuts.jsonl")
    text = path.read_text()
    for value in (None, True, -1, 10**30, 1.5, float("nan"), "x", "", [], {}, [None], [[]], [{}]):
        row = json.loads(text)
        changed = {
            None: row,
            "recording": row["recording"],
            "source": row["recording"]["sources"][0],
            "supervision": row["supervisions"][0],
        }[place]
        changed[name] = value
        path.write_text(json.dumps(row))
        for utterance in read_cuts(path):
            if utterance.problem:
                reason, detail = utterance.problem
                is_named = f"'{name}'" in detail
                # Lhotse names absent fields
                assert is_named or reason == "outside_cut" or value in ({}, [{}]), value


@pytest.mark.slow
@pytest.mark.parametrize("change", ["resample", "normalize"])
def test_cut_that_lhotse_changes_with_other_packages_is_read(tmp_path, change):
    pytest.importorskip("scipy")
    cut = cut_of_file(write_cuts(tmp_path).parent / "r.wav", "a")
    cut = cut.resample(8000) if change == "resample" else cut.normalize_loudness(-20)
    CutSet.from_cuts([cut]).to_file(tmp_path / "changed.jsonl")
    (utterance,) = read_cuts(tmp_path / "changed.jsonl")
    wave, rate = utterance.load()
    assert len(wave) == 1.5 * rate
    assert rate == (8000 if change == "resample" else 16000)


def test_error_while_an_optional_package_is_imported_is_not_a_missing_package():
    def load():
        try:
            raise ImportError("No module named 'nosuch'")
        except ImportError:
            raise ValueError("bad sample rate")  # noqa: B904

    with pytest.raises(RejectedError, match="bad sample rate"):
        make_sample(Utterance(key="b", text="one", load=load), {}, "flac")


@pytest.mark.parametrize(
    "error",
    [
        ImportError("No module named 'scipy'"),
        RuntimeError("This is not supported. Please install torchaudio and try again"),
    ],
)
def test_missing_package_ends_the_command_and_is_named(error):
    def load():
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("Lhotse cannot read the cut") from cause

    utterance = Utterance(key="b", text="one", load=load)
    with pytest.raises(UserError, match=r"'b'.*(scipy|torchaudio)"):
        make_sample(utterance, {}, "flac")


@pytest.mark.parametrize(
    ("source", "option"),
    [
        ("https://example.org/a.wav", "--allow-urls"),
        ("s3://bucket/a.wav", "--allow-urls"),
        ("cat r.wav |", "--allow-pipes"),
    ],
)
def test_file_that_is_a_url_or_a_pipe_needs_permission(tmp_path, source, option):
    path = with_source(tmp_path, "file", source)
    with path.open("a") as manifest:
        manifest.write("\n" + write_row(tmp_path / "good.jsonl").read_text())
    utterance, good = read_cuts(path)
    assert utterance.problem[0] == "not_allowed"
    assert option in utterance.problem[1]
    assert source.removesuffix("|") in utterance.problem[1]
    assert len(good.load()[0]) == 16000


def test_file_that_is_an_allowed_pipe_is_run(tmp_path):
    path = with_source(tmp_path, "file", f"cat {tmp_path}/r.wav |")
    (utterance,) = read_cuts(path, allow_pipes=True)
    assert len(utterance.load()[0]) == 16000


@pytest.mark.parametrize("wrap", [dict, mixed, padded, reverberant])
@pytest.mark.parametrize("kind", ["command", "url"])
def test_commands_and_urls_of_cuts_are_rejected_by_default(tmp_path, kind, wrap):
    source, option, shown = {
        "command": (
            f"touch {tmp_path}/ran; cat {tmp_path}/r.wav",
            "--allow-pipes",
            f"'touch {tmp_path}",
        ),
        "url": (f"pipe:touch {tmp_path}/ran", "--allow-urls", "'pipe:touch"),
    }[kind]
    path = with_source(tmp_path, kind, source, wrap)
    (utterance,) = read_cuts(path)
    assert utterance.problem[0] == "not_allowed"
    assert option in utterance.problem[1]
    with pytest.raises(RejectedError):
        utterance.load()
    with pytest.raises(UserError, match=shown):
        read_corpora(
            data_config(tmp_path, manifest=str(path)), filters=None, shards_dir=tmp_path / "made"
        )
    assert not (tmp_path / "ran").exists()


def data_config(folder, **entry):
    (folder / "data.yaml").write_text(json.dumps([entry]))
    return folder / "data.yaml"


def test_allowed_commands_run_with_a_time_limit(tmp_path, monkeypatch):
    (utterance,) = read_cuts(
        with_source(tmp_path, "command", f"cat {tmp_path}/r.wav"), allow_pipes=True
    )
    wave, rate = utterance.load()
    np.testing.assert_allclose(wave, tone("one", 1.0), atol=1e-4)
    assert (rate, utterance.file) == (16000, None)
    monkeypatch.setattr("asrllm.data.sources.kaldi.PIPE_TIMEOUT", 0.1)
    (utterance,) = read_cuts(with_source(tmp_path, "command", "sleep 60"), allow_pipes=True)
    with pytest.raises(RejectedError, match="failed_pipe"):
        utterance.load()


@pytest.mark.slow
@pytest.mark.parametrize("source", [None, 5, ["touch ran"], {"a": "touch ran"}, True])
@pytest.mark.parametrize("kind", ["command", "url", "file"])
def test_a_source_that_is_not_a_text_is_not_run(tmp_path, monkeypatch, kind, source):
    monkeypatch.chdir(tmp_path)
    path = with_source(tmp_path, kind, source)
    (utterance,) = read_cuts(path, allow_pipes=True, allow_urls=True)
    assert utterance.problem[0] == "bad_field"
    assert f"'source' is {source!r}" in utterance.problem[1]
    with pytest.raises(RejectedError):
        utterance.load()
    assert not (tmp_path / "ran").exists()


def test_allowed_urls_must_have_a_known_scheme(tmp_path):
    path = with_source(tmp_path, "url", f"file://{tmp_path}/r.wav")
    (utterance,) = read_cuts(path, allow_urls=True)
    np.testing.assert_allclose(utterance.load()[0], tone("one", 1.0), atol=1e-4)
    (utterance,) = read_cuts(with_source(tmp_path, "url", "pipe:id"), allow_urls=True)
    assert utterance.problem[0] == "not_allowed"
    assert "s3://" in utterance.problem[1]


@pytest.mark.parametrize("wrap", [dict, mixed, padded, reverberant])
def test_recording_in_memory_is_read_from_base64(tmp_path, wrap):
    path = with_source(tmp_path, "file", "r.wav", wrap)
    of_file, *_ = read_cuts(path)
    content = base64.b64encode((tmp_path / "r.wav").read_bytes()).decode()
    of_memory, *_ = read_cuts(with_source(tmp_path, "memory", content, wrap))
    np.testing.assert_array_equal(of_memory.load()[0], of_file.load()[0])
    assert of_memory.file is None


@pytest.mark.parametrize(
    "name", ["a.sph;touch ran;.sph", "$(touch ran).opus", "';touch ran;'.opus", "a.wav|touch ran"]
)
def test_a_file_name_is_not_run_as_a_command(tmp_path, monkeypatch, name):
    """Lhotse's own readers of .sph and .opus insert the name into a shell command."""
    monkeypatch.chdir(tmp_path)
    path = with_source(tmp_path, "file", name)
    (tmp_path / name).write_bytes(b"no audio")
    (utterance,) = read_cuts(path)
    with pytest.raises(Exception, match=r"Format not recognised|Error opening"):
        utterance.load()
    assert not (tmp_path / "ran").exists()


def test_files_are_found_beside_the_manifest_and_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    path = with_source(tmp_path / "data", "file", "r.wav")
    (utterance,) = read_cuts(path)
    assert utterance.file == tmp_path / "data" / "r.wav"
    monkeypatch.chdir(tmp_path / "data")
    (utterance,) = read_cuts(path)
    assert len(utterance.load()[0]) == 16000


@pytest.mark.parametrize(
    ("start", "duration", "expected"),
    [
        (0.0, 1.0, 1.0),
        (0.25, 0.5, 0.5),  # its cut is longer
        (0.5, 0.9, 0.5),  # ends 0.4 s after the audio, which Kaldi cuts off
        (0.5, 1.1, "outside_cut"),
        (-0.3, 1.0, "outside_cut"),
        (1.2, 0.1, "outside_cut"),
    ],
)
def test_a_supervision_selects_its_part_of_the_cut(tmp_path, start, duration, expected):
    supervision = {
        "id": "s",
        "recording_id": "r",
        "start": start,
        "duration": duration,
        "channel": 0,
        "text": "one",
    }
    (utterance,) = read_cuts(write_row(tmp_path / "cuts.jsonl", supervisions=[supervision]))
    if isinstance(expected, str):
        assert utterance.problem[0] == expected
    else:
        assert (utterance.problem, utterance.duration) == (None, pytest.approx(expected))
        begin = round(start * 16000)
        np.testing.assert_allclose(
            utterance.load()[0],
            tone("one", 1.0)[begin : begin + round(expected * 16000)],
            atol=1e-4,
        )


def test_a_bad_cut_is_rejected_alone(tmp_path):
    good = json.loads(write_row(tmp_path / "cuts.jsonl").read_text())
    odd = [{"id": 7, "type": "MonoCut"}, good | {"type": "NoCut"}, {"id": "s"}]
    (tmp_path / "cuts.jsonl").write_text(
        "\n".join(map(json.dumps, [good, *odd, good | {"id": "last"}]))
    )
    found = list(read_cuts(tmp_path / "cuts.jsonl"))
    assert [u.key for u in found if u.problem is None] == [good["id"], "last"]
    assert {u.problem[0] for u in found if u.problem} == {"broken_cut"}


def test_a_supervision_selects_its_channel(tmp_path):
    soundfile.write(tmp_path / "r.wav", np.stack([tone("one", 1.0), tone("two", 1.0)], 1), 16000)
    recording = Recording.from_file(tmp_path / "r.wav")
    segments = [SupervisionSegment(f"s{c}", "r", 0, 1.0, channel=c, text=str(c)) for c in (0, 1)]
    CutSet.from_cuts([MultiCut("m", 0, 1.0, [0, 1], segments, recording=recording)]).to_file(
        tmp_path / "cuts.jsonl"
    )
    for utterance, word in zip(read_cuts(tmp_path / "cuts.jsonl"), ("one", "two"), strict=True):
        np.testing.assert_allclose(utterance.load()[0], tone(word, 1.0), atol=1e-4)


def write_stereo(path, channel, supervised, sources=({"channels": [0, 1]},), files=2, **recording):
    """Write a manifest of a cut and its supervision with these channels, of a file of tones."""
    words = ["one", "two"][:files]
    soundfile.write(path.parent / "r.wav", np.stack([tone(w, 1.0) for w in words], 1), 16000)
    kind = "MultiCut" if isinstance(channel, list) else "MonoCut"
    times = {"start": 0.0, "duration": 1.0}
    supervision = {"id": "s", "recording_id": "r", **times, "channel": supervised, "text": "one"}
    sources = [{"type": "file", "source": "r.wav"} | source for source in sources]
    sizes = {"sampling_rate": 16000, "num_samples": 16000, "duration": 1.0}
    about = {"id": "r", "sources": sources} | sizes | recording
    cut = {"id": "c", "type": kind, "channel": channel, **times}
    path.write_text(json.dumps(cut | {"recording": about, "supervisions": [supervision]}))
    return path


def problem_of(path):
    """Return why the only utterance of a manifest is rejected, or None."""
    (utterance,) = read_cuts(path)
    if utterance.problem:
        return utterance.problem
    try:
        make_sample(utterance, {}, "flac")
    except RejectedError as error:
        return error.args
    return None


@pytest.mark.parametrize(
    ("channel", "supervised", "shown"),
    [
        (0, 1, "is 1,"),
        (0, 7, "is 7,"),
        (0, [0, 1], "is [0, 1],"),
        ([0, 1], [0, 7], "is [0, 7],"),
        ([0, 1], 2, "is 2,"),
        (2, 2, "is 2,"),
        ([0, 7], [0, 7], "is [0, 7],"),
    ],
)
def test_a_channel_that_does_not_exist_rejects_its_cut(tmp_path, channel, supervised, shown):
    reason, detail = problem_of(write_stereo(tmp_path / "cuts.jsonl", channel, supervised))
    assert reason == "missing_channel"
    assert f"'channel' {shown}" in detail


def test_a_channel_of_no_source_rejects_its_cut(tmp_path):
    path = tmp_path / "cuts.jsonl"
    one = [{"channels": [0]}]
    assert problem_of(write_stereo(path, 1, 1, one, channel_ids=[0, 1]))[0] == "missing_channel"
    assert problem_of(write_stereo(path, 1, 1, channel_ids=[0]))[0] == "missing_channel"


@pytest.mark.parametrize(("declared", "files"), [([0, 1], 1), ([0], 2)])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_file_with_other_channels_than_its_recording_is_rejected(
    tmp_path, declared, files, is_mixed
):
    """Lhotse would return no channel or the mean of all channels."""
    path = tmp_path / "cuts.jsonl"
    last = declared[-1]
    write_stereo(path, last, last, [{"channels": declared}], files)
    if is_mixed:
        path.write_text(json.dumps(mixed(json.loads(path.read_text()))))
    (utterance, *_) = read_cuts(path)
    with pytest.raises(RejectedError) as raised:
        utterance.load()
    assert raised.value.args[0] == "missing_channel"
    assert "r.wav" in raised.value.args[1]


@pytest.mark.parametrize(
    ("channel", "supervised"), [(0, 0), (0, [0]), (1, 1), ([0, 1], [0, 1]), ([0, 1], 1), ([1], 1)]
)
def test_a_channel_that_exists_is_read(tmp_path, channel, supervised):
    (utterance,) = read_cuts(write_stereo(tmp_path / "cuts.jsonl", channel, supervised))
    words = {0: "one", 1: "two"}
    chosen = supervised if isinstance(supervised, list) else [supervised]
    expected = np.mean([tone(words[number], 1.0) for number in chosen], 0)
    np.testing.assert_allclose(utterance.load()[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("channel", "supervised", "heard"),
    [
        (1, "absent", ["two"]),
        (1, None, ["two"]),
        (0, None, ["one"]),
        (None, 1, ["two"]),
        (None, "absent", ["one", "two"]),
        (None, None, ["one", "two"]),
    ],
)
def test_a_mono_cut_may_have_absent_and_null_channels(tmp_path, channel, supervised, heard):
    path = write_stereo(tmp_path / "cuts.jsonl", channel, supervised)
    row = json.loads(path.read_text())
    if supervised == "absent":
        del row["supervisions"][0]["channel"]
    path.write_text(json.dumps(row))
    (utterance,) = read_cuts(path)
    assert utterance.problem is None
    expected = np.mean([tone(word, 1.0) for word in heard], 0)
    np.testing.assert_allclose(utterance.load()[0], expected, atol=1e-4)


def test_null_channels_of_a_mono_file_are_its_channel(tmp_path):
    path = tmp_path / "cuts.jsonl"
    one = [{"channels": [0]}]
    assert problem_of(write_stereo(path, None, None, one, files=1)) is None
    assert problem_of(write_stereo(path, None, 1, one, files=1))[0] == "missing_channel"
    assert problem_of(write_stereo(path, 1, None, one, files=1))[0] == "missing_channel"


@pytest.mark.slow
@pytest.mark.parametrize("value", [None, "x", -1, 1.5, True, [], [[0]], [0, 0], ["0"], {}])
@pytest.mark.parametrize("place", ["cut", "supervision", "source", "track"])
def test_a_channel_of_another_type_rejects_its_cut(tmp_path, value, place):
    path = write_stereo(tmp_path / "cuts.jsonl", [0, 1], [0, 1])
    row = json.loads(path.read_text())
    changed = {
        "cut": row,
        "supervision": row["supervisions"][0],
        "source": row["recording"]["sources"][0],
        "track": row,
    }[place]
    name = "channels" if place == "source" else "channel"
    changed[name] = value
    path.write_text(json.dumps(mixed(row) if place == "track" else row))
    (utterance,) = read_cuts(path)
    assert utterance.problem[0] == "bad_field"
    assert f"{name!r} is {value!r}" in utterance.problem[1]


def test_a_list_of_channels_in_a_mono_cut_is_rejected(tmp_path):
    path = write_stereo(tmp_path / "cuts.jsonl", [0], [0])
    path.write_text(path.read_text().replace("MultiCut", "MonoCut"))
    assert problem_of(path)[0] == "bad_field"


# --- all sources ---


@pytest.mark.parametrize("name", SOURCES)
def test_a_missing_source_is_reported(tmp_path, name):
    assert SOURCES[name].count(tmp_path / "no") in (None, 0)
    with pytest.raises(UserError, match=f"{tmp_path}/no"):
        list(SOURCES[name].read(tmp_path / "no"))


def test_audio_formats_are_read_from_any_offset(tmp_path):
    """mp3, ogg and opus can be cut in the middle like wav and flac."""
    wave = np.concatenate([tone("one", 1.0), tone("two", 1.0)])
    for suffix, subtype in (
        ("wav", "PCM_16"),
        ("flac", "PCM_16"),
        ("ogg", "VORBIS"),
        ("opus", "OPUS"),
        ("mp3", "MPEG_LAYER_III"),
    ):
        file = tmp_path / f"a.{suffix}"
        soundfile.write(
            file, wave, 16000, format={"opus": "OGG"}.get(suffix, suffix.upper()), subtype=subtype
        )
        line = {"audio_filepath": file.name, "duration": 0.5, "offset": 1.25, "text": "two"}
        (tmp_path / "m.json").write_text(json.dumps(line))
        (utterance,) = SOURCES["nemo"].read(tmp_path / "m.json")
        cut, rate = utterance.load()
        assert len(cut) / rate == 0.5
        spectrum = np.abs(np.fft.rfft(cut))
        pitch = spectrum.argmax() * 2  # bins of 2 Hz
        assert abs(pitch - 312.5) < 8, suffix


def test_a_line_based_source_is_read_lazily(tmp_path):
    """A bad row late in a manifest does not affect the rows before it."""
    line = json.dumps({"audio_filepath": "a.wav", "duration": 1, "text": "x"}) + "\n"
    (tmp_path / "m.json").write_text(line * 500 + "broken\n" + line)
    utterances = SOURCES["nemo"].read(tmp_path / "m.json")
    assert [next(utterances).key for _ in range(300)] == ["a"] * 300
    *_, broken, last = utterances
    assert broken.problem[0] == "bad_json"
    assert "m.json:501 " in broken.problem[1]
    assert (last.key, last.problem) == ("a", None)
