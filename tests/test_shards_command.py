"""`asrllm shards ...` with its command line, in this process."""

import gzip
import json
import os
import re

import numpy as np
import pytest
import soundfile
from lhotse import Recording

from asrllm.commands.dispatch import main
from asrllm.data.index import open_index
from asrllm.data.sources import SOURCES
from asrllm.data.tars import scan_tar
from asrllm.testing import kaldi_directory, tone, tone_sentences
from tests.data.damage import change_about, read_rows, write_rows


@pytest.fixture
def kaldi(tmp_path):
    return kaldi_directory(tmp_path / "kaldi", tone_sentences(5))


def shards(*arguments):
    workers = [] if arguments[0] == "stats" else ["--workers", "1"]
    return main(["shards", *map(str, arguments), *workers])


def numbers(output, folder):
    """Return the numbers in an output that names a directory."""
    assert str(folder) in output
    return re.findall(r"\d+(?:\.\d+)?", output.replace(str(folder), ""))


def test_make_index_verify_and_stats_succeed(tmp_path, kaldi, capsys):
    out = tmp_path / "out"
    (kaldi / "wav" / "utt0001.wav").unlink()
    assert shards("make", out, "--kaldi", kaldi, "--lang", "en", "--utterances-per-shard", 2) == 0
    output = capsys.readouterr()
    written, rejected = output.out.splitlines()
    sizes = ["4", "0.00", "3"]  # utterances, hours, shards
    assert numbers(written, out) == sizes
    assert numbers(rejected, out / "rejected.jsonl") == ["1"]
    assert "missing_audio" in rejected
    assert "5/5" in output.err
    (sample, *_) = scan_tar(out / "shard-000000.tar")
    assert (sample.fields["corpus"], sample.fields["lang"]) == ("out", "en")

    assert shards("verify", out) == 0
    assert numbers(capsys.readouterr().out, out) == sizes

    before = (out / "index.bin").read_bytes()
    assert shards("index", *sorted(out.glob("*.tar"))) == 0
    assert numbers(capsys.readouterr().out, out) == sizes
    assert (out / "index.bin").read_bytes() == before

    assert shards("stats", out) == 0
    assert "4" in numbers(capsys.readouterr().out, out)
    assert shards("stats", "--json", out, out) == 0
    assert json.loads(capsys.readouterr().out)["corpora"]["out"]["utterances"] == 8


def test_verify_lists_problems_and_exits_with_status_2(tmp_path, kaldi, capsys):
    out = tmp_path / "out"
    shards("make", out, "--kaldi", kaldi)
    shard = json.loads((out / "index.json").read_text())["shards"][0]
    change_about(out, shards=[shard | {"sha256": "0" * 64}])
    capsys.readouterr()
    assert shards("verify", out, "--output", tmp_path / "problems.txt") == 2
    output = capsys.readouterr()
    assert output.out.startswith(f"{out}/shard-000000.tar: changed: ")
    assert repr(str(out)) in output.err
    assert "(1 changed)" in output.err
    assert (tmp_path / "problems.txt").read_text() == output.out


def test_verify_truncates_a_long_list_of_problems(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for i in range(30):
        soundfile.write(tmp_path / "a" / f"{i:02d}.wav", tone("one", 0.2), 16000)
        (tmp_path / "a" / f"{i:02d}.txt").write_text("one")
    out = tmp_path / "out"
    shards("make", out, "--folder", tmp_path / "a")
    write_rows(out, np.repeat(read_rows(out)[:1], 30))
    capsys.readouterr()
    assert shards("verify", out) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    assert " 9 " in lines[-1]
    assert "--output FILE" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--kaldi", "{kaldi}", "--table", "x"],
            "--table .*--folder.*--kaldi",
        ),
        (["--nemo", "x.json", "--allow-pipes"], "--allow-pipes .*--cuts or --kaldi"),
        (["--nemo", "x.json"], "'x.json'"),
    ],
)
def test_invalid_arguments_are_reported(tmp_path, kaldi, capsys, arguments, message):
    assert shards("make", tmp_path / "out", *(a.format(kaldi=kaldi) for a in arguments)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["kaldi"]


def test_names_of_directories_are_escaped(tmp_path, kaldi, capsys, monkeypatch):
    out = tmp_path / "a\x1b[31mb\nc"
    escaped = str(tmp_path / "a") + r"\x1b[31mb\nc"
    (kaldi / "text").write_text((kaldi / "text").read_text() + "lost one\n")
    assert shards("make", out, "--kaldi", kaldi) == 0
    assert shards("index", *out.glob("*.tar")) == 0
    assert shards("verify", out) == 0
    assert shards("stats", out) == 0
    shard = json.loads((out / "index.json").read_text())["shards"][0]
    change_about(out, shards=[shard | {"sha256": "0" * 64}])
    monkeypatch.setattr("asrllm.commands.shards.SHOWN_PROBLEMS", 0)
    assert shards("verify", out, "--output", f"{out}/problems") == 2
    output = capsys.readouterr()
    assert "\x1b" not in output.out + output.err
    lines = [line for line in output.out.splitlines() if "[31mb" in line]
    assert len([line for line in lines if line.startswith(f"{escaped}: ")]) == 4
    assert len([line for line in lines if f"{escaped}/rejected.jsonl" in line]) == 1
    assert len([line for line in lines if f"{escaped}/problems" in line]) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        *[("make", "{out}", f"--{name}", "") for name in SOURCES],
        ("make", "", "--kaldi", "{kaldi}"),
        ("make", "{out}", "--folder", "{kaldi}/wav", "--table", ""),
        ("index", ""),
        ("index", "x.tar", "--output", ""),
        ("verify", " "),
        ("verify", "{out}", "--output", ""),
        ("stats", "{out}", ""),
        ("stats", "{out}", "--output", ""),
    ],
)
def test_an_empty_path_is_rejected(tmp_path, kaldi, capsys, monkeypatch, arguments):
    """An unset variable of the shell would otherwise be the working directory."""
    monkeypatch.chdir(kaldi / "wav")
    given = [argument.format(out=tmp_path / "out", kaldi=kaldi) for argument in arguments]
    with pytest.raises(SystemExit) as end:
        shards(*given)
    assert end.value.code == 2
    name = next((word for word in given if word.startswith("--") and given[-1] == ""), "")
    assert name in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kaldi"]


def test_a_line_break_in_a_key_makes_no_line_of_its_own(tmp_path, capsys):
    row = {"audio_filepath": "a\nasrllm shards: fine\nb.wav", "duration": 2.0, "text": "t"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    assert shards("make", tmp_path / "out", "--nemo", tmp_path / "m.jsonl") == 2
    error = capsys.readouterr().err
    assert r"a\nasrllm shards: fine\nb" in error
    assert "\nasrllm shards: fine" not in error


def test_an_output_that_is_a_file_is_reported_and_kept(tmp_path, kaldi, capsys):
    (tmp_path / "out").write_text("x")
    assert shards("make", tmp_path / "out", "--kaldi", kaldi) == 2
    assert repr(str(tmp_path / "out")) in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "x"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["loop", "gone"])
@pytest.mark.parametrize("name", [*SOURCES, "verify"])
def test_a_link_that_leads_nowhere_is_reported(tmp_path, capsys, name, target):
    (tmp_path / "loop").symlink_to(tmp_path / target)
    if name == "verify":
        status = shards("verify", tmp_path / "loop")
    else:
        status = shards("make", tmp_path / "out", f"--{name}", tmp_path / "loop")
    assert status == 2
    error = capsys.readouterr().err
    assert repr(str(tmp_path / "loop")) in error
    assert "link" in error


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("action", "name"), [("verify", "fifo"), ("stats", "fifo.png"), ("stats", "fifo.html")]
)
def test_an_output_that_is_a_fifo_is_reported_without_waiting(
    world, tmp_path, capsys, action, name
):
    os.mkfifo(tmp_path / name)
    assert shards(action, world.shards, "--output", tmp_path / name) == 2
    assert repr(str(tmp_path / name)) in capsys.readouterr().err


@pytest.mark.timeout(30)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["index.bin", "index.json", "rejected.jsonl"])
def test_an_index_file_that_cannot_be_replaced_is_reported_before_the_scan(
    world, tmp_path, capsys, name, make
):
    make(tmp_path / name)
    (tar, *_) = world.shards.glob("*.tar")
    assert shards("index", tar, "--output", tmp_path) == 2
    assert repr(str(tmp_path / name)) in capsys.readouterr().err
    assert os.listdir(tmp_path) == [name]


def test_shards_are_written_to_the_directory_behind_a_link(tmp_path, kaldi, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert shards("make", tmp_path / "link", "--kaldi", kaldi) == 0, capsys.readouterr().err
    assert (tmp_path / "link").is_symlink()
    assert len(open_index(tmp_path / "there")) == 5


def test_a_late_error_leaves_finished_shards_to_resume_from(tmp_path, capsys, caplog):
    soundfile.write(tmp_path / "a.wav", tone("one", 0.2), 16000)
    line = json.dumps({"audio_filepath": "a.wav", "text": "one"}) + "\n"
    whole = gzip.compress(line.encode() * 300)
    (tmp_path / "m.json.gz").write_bytes(whole + whole[:20])
    make = (
        "make",
        tmp_path / "out",
        "--nemo",
        tmp_path / "m.json.gz",
        "--utterances-per-shard",
        50,
    )
    assert shards(*make) == 2
    error = capsys.readouterr().err
    assert repr(str(tmp_path / "m.json.gz")) in error
    assert "line 300" in error
    (finished,) = numbers(caplog.messages[-1], tmp_path / ".out.partial")
    assert int(finished) >= 4
    (tmp_path / "m.json.gz").write_bytes(whole)
    assert shards(*make) == 0
    output = capsys.readouterr().out
    assert finished in output.splitlines()[0]
    assert "299 duplicate_key" in output


def test_command_in_a_manifest_is_not_run_without_the_option(tmp_path, kaldi, capsys):
    """Cuts and Kaldi's pipes; the other rows are used."""
    wav = kaldi / "wav" / "utt0000.wav"
    command = f"touch {tmp_path}/ran; cat {wav}"
    rows = []
    for kind, source in (("command", command), ("file", f"{command} |"), ("file", str(wav))):
        recording = Recording.from_file(wav).to_cut().to_dict()
        recording["id"] = f"c{len(rows)}"
        recording["recording"]["sources"][0] |= {"type": kind, "source": source}
        recording["supervisions"] = [
            {"id": "s", "recording_id": "r", "start": 0.0, "duration": 0.5, "text": "one"}
        ]
        rows.append(json.dumps(recording) + "\n")
    (tmp_path / "cuts.jsonl").write_text("".join(rows))
    scp = kaldi / "wav.scp"
    scp.write_text(re.sub("^utt0000 .*", f"utt0000 {command} |", scp.read_text()))
    for option, source, count in (("--cuts", tmp_path / "cuts.jsonl", 2), ("--kaldi", kaldi, 1)):
        out = tmp_path / option
        assert shards("make", out, option, source) == 0
        rejected = [json.loads(line) for line in (out / "rejected.jsonl").open()]
        assert [row["reason"] for row in rejected] == ["not_allowed"] * count
        assert all("--allow-pipes" in row["detail"] for row in rejected)
        assert not (tmp_path / "ran").exists()
        capsys.readouterr()
        assert shards("make", tmp_path / f"all{option}", option, source, "--allow-pipes") == 0
        assert (tmp_path / "ran").exists()
        (tmp_path / "ran").unlink()


def test_help_lists_every_source(capsys):
    with pytest.raises(SystemExit) as end:
        main(["shards", "make", "--help"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    for name in SOURCES:
        assert f"--{name} " in output


def test_examples_are_shown_if_most_utterances_are_rejected(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", tone("one", 0.5), 16000)
    rows = [
        {"audio_filepath": f"{name}.wav", "text": "one", "duration": 0.5}
        for name in ("a", "b", "c")
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert shards("make", tmp_path / "out", "--nemo", tmp_path / "m.jsonl") == 0
    assert str(tmp_path / "b.wav") in capsys.readouterr().out


def test_trust_audio_ignores_the_stated_duration(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone("one", 0.5), 16000)
    (tmp_path / "m.jsonl").write_text(
        json.dumps({"audio_filepath": "a.wav", "text": "one", "duration": 3.0})
    )
    assert shards("make", tmp_path / "no", "--nemo", tmp_path / "m.jsonl") == 2
    assert shards("make", tmp_path / "out", "--nemo", tmp_path / "m.jsonl", "--trust-audio") == 0
    assert open_index(tmp_path / "out").rows["samples"].tolist() == [8000]


def test_trust_audio_applies_to_cuts(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone("one", 0.5), 16000)
    source = {"type": "file", "channels": [0], "source": "a.wav"}
    recording = {"id": "a", "sources": [source], "sampling_rate": 16000, "num_samples": 48000}
    text = {"id": "a", "recording_id": "a", "start": 0.0, "duration": 3.0, "text": "one"}
    row = {"id": "a", "type": "MonoCut", "start": 0.0, "duration": 3.0, "channel": 0}
    row |= {"recording": recording | {"duration": 3.0}, "supervisions": [text]}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    assert shards("make", tmp_path / "no", "--cuts", tmp_path / "m.jsonl") == 2
    assert shards("make", tmp_path / "out", "--cuts", tmp_path / "m.jsonl", "--trust-audio") == 0
    assert open_index(tmp_path / "out").rows["samples"].tolist() == [8000]


@pytest.mark.parametrize(
    ("action", "path", "named"),
    [
        (["verify"], "shard-000000.tar", "asrllm shards index {folder}/shard-000000.tar"),
        (["stats"], "shard-000000.tar", "asrllm shards index {folder}/shard-000000.tar"),
        (["stats"], "index.json", "'{folder}'"),
        (["verify"], "index.bin", "'{folder}'"),
        (["index"], "", "asrllm shards index {folder}/*.tar"),
        (["make", "{folder}-new", "--folder"], "shard-000000.tar", "asrllm shards index {folder}"),
    ],
)
def test_path_of_the_wrong_kind_is_answered_with_its_command(world, capsys, action, path, named):
    words = [word.format(folder=world.shards) for word in action]
    assert main(["shards", *words, str(world.shards / path)]) == 2
    assert named.format(folder=world.shards) in capsys.readouterr().err
