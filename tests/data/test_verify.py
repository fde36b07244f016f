import contextlib
import io
import json
import os
import re
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import soundfile

from asrllm.data.index import open_index
from asrllm.data.shards import write_shards
from asrllm.data.sources import read_kaldi, read_wenet
from asrllm.data.tars import BLOCK, tar_files
from asrllm.data.verify import index_tars, verify_shards
from asrllm.defaults import RATE
from asrllm.errors import UserError
from asrllm.testing import kaldi_directory, tone, tone_sentences
from tests.data.damage import change_about, read_rows, write_rows
from tests.data.object_store import web_server


def wav(seconds=0.25, rate=8000):
    file = io.BytesIO()
    soundfile.write(file, tone("two", seconds, rate), rate, format="WAV")
    return file.getvalue()


def write_tar(path, members):
    """Write a tar of members {name: content}; the content of a directory is None."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.type, info.size = (
                (tarfile.REGTYPE, len(content)) if content is not None else (tarfile.DIRTYPE, 0)
            )
            tar.addfile(info, io.BytesIO(content or b""))
    return str(path)


def sample(key, text="二", **audio):
    return {f"{key}.wav": wav(**audio), f"{key}.txt": text.encode()}


def rejected(folder):
    return [
        (row["key"], row["reason"])
        for row in map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())
    ]


# --- indexing ---


def test_tars_of_other_tools_are_indexed(tmp_path):
    """wenet writes KEY.wav + KEY.txt in a folder, and a member for the folder itself."""
    members = {"d": None} | sample("d/0") | {"d/1.txt": "三\n".encode(), "d/1.wav": wav(0.5)}
    summary = index_tars([write_tar(tmp_path / "x.tar", members)])
    assert summary.index.rows["samples"].tolist() == [0.25 * RATE, 0.5 * RATE]
    assert summary.index.rows["text_bytes"].tolist() == [3, 3]
    assert summary.rejected == {}
    assert not (tmp_path / "rejected.jsonl").exists()
    assert verify_shards(open_index(tmp_path)) == []
    assert json.loads((tmp_path / "index.json").read_text())["shards"][0]["name"] == "x.tar"


def test_bad_samples_and_repeated_keys_are_left_out(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        sample("a") | {"b.wav": wav()} | {"c.wav": b"RIFF", "c.txt": b"x"} | sample("d"),
    )
    write_tar(tmp_path / "b.tar", sample("e") | sample("d", "other") | sample("f"))
    write_tar(tmp_path / "c.tar", sample("f") | sample("a"))
    summary = index_tars([str(tmp_path / f"{name}.tar") for name in "cab"])
    assert summary.rejected == {"no_transcript": 1, "unreadable_audio": 1, "duplicate_key": 3}
    assert rejected(tmp_path) == [
        ("b", "no_transcript"),
        ("c", "unreadable_audio"),
        ("d", "duplicate_key"),
        ("f", "duplicate_key"),
        ("a", "duplicate_key"),
    ]
    index = open_index(tmp_path)
    assert index.starts.tolist() == [0, 2, 4, 4]
    assert verify_shards(index) == []


def test_tars_of_several_directories_need_an_output_directory(tmp_path):
    tars = []
    for name in "ab":
        (tmp_path / name).mkdir()
        tars.append(write_tar(tmp_path / name / "x.tar", sample(name)))
    with pytest.raises(UserError, match=r"2 directories.*--output"):
        index_tars(tars)
    index_tars(tars, tmp_path / "deep" / "index")
    index = open_index(tmp_path / "deep" / "index")
    assert index.shards == [str(tmp_path / "deep" / "index" / name / "x.tar") for name in "ab"]
    # links, because an index may not name files outside its directory
    assert [os.path.realpath(shard) for shard in index.shards] == tars
    assert verify_shards(index) == []
    index_tars(tars, tmp_path / "deep" / "index")
    with pytest.raises(UserError, match=f"{tmp_path}/a/x.tar.*--output"):
        index_tars(tars, tmp_path / "a")
    os.rename(tmp_path / "b" / "x.tar", tmp_path / "b" / "y.tar")
    index_tars([tars[0], str(tmp_path / "b" / "y.tar")], tmp_path / "a")
    assert [
        shard["name"] for shard in json.loads((tmp_path / "a" / "index.json").read_text())["shards"]
    ] == ["x.tar", "y.tar"]


@pytest.mark.slow
def test_tars_at_urls_are_indexed_and_verified(tmp_path):
    tars = [Path(write_tar(tmp_path / f"{name}.tar", sample(name))) for name in "ab"]
    with web_server() as web:
        _index_at_urls([web.put(f"/far/{tar.name}", tar.read_bytes()) for tar in tars], tmp_path)


def test_changed_bytes_are_reported_when_tars_are_indexed_again(tmp_path, caplog):
    members = sample("a") | sample("b")
    tar = Path(write_tar(tmp_path / "x.tar", members))
    index_tars([str(tar)])
    index_tars([str(tar)])
    assert not caplog.records
    content = bytearray(tar.read_bytes())
    content[1500] ^= 1
    tar.write_bytes(content)
    index_tars([str(tar)])
    (record,) = caplog.records
    assert record.getMessage().startswith("1 samples")
    assert str(tmp_path) in record.getMessage()


def test_file_urls_are_indexed_as_local_files(tmp_path):
    tar = write_tar(tmp_path / "x.tar", sample("a"))
    assert index_tars([f"file://{tar}"]).index.shards == [tar]


def _index_at_urls(urls, tmp_path):
    with pytest.raises(UserError, match=r"URLs.*--output"):
        index_tars(urls)
    index_tars(urls, tmp_path / "near")
    index = open_index(tmp_path / "near")
    assert index.shards == urls
    assert verify_shards(index) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.tar", None, "/no.tar' "),
        ("x.tar", b"no tar" * 1000, "/x.tar' "),
        ("x.tar", b"\0" * 10240, "/x.tar'.*empty"),
    ],
)
def test_an_invalid_tar_is_reported(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        index_tars([str(tmp_path / name)])
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(("suffix", "program"), [("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")])
def test_a_compressed_tar_is_reported_with_the_command_that_unpacks_it(tmp_path, suffix, program):
    path = tmp_path / f"x.tar.{suffix}"
    with tarfile.open(path, f"w:{suffix}") as tar:
        for name, content in sample("a").items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(
        UserError,
        match=rf"x\.tar\.{suffix}' .*'{program} -d'",
    ):
        index_tars([str(path)])
    (tmp_path / "list").write_text(path.name + "\n")
    with pytest.raises(UserError, match=rf"list:1: '{path}' .*'{program} -d'"):
        list(read_wenet(tmp_path / "list"))


def test_byte_order_marks_are_removed_from_transcripts(tmp_path):
    tar = write_tar(
        tmp_path / "x.tar",
        sample("a", "\ufeff二")
        | {"b.wav": wav(), "b.json": b'\xef\xbb\xbf{"text": "\xe4\xba\x8c"}'},
    )
    assert index_tars([tar]).index.rows["text_chars"].tolist() == [1, 1]
    (tmp_path / "list").write_text("x.tar\n")
    assert next(read_wenet(tmp_path / "list")).text == "二"


def test_a_tar_without_transcripts_is_reported(tmp_path):
    tar = write_tar(tmp_path / "x.tar", {"a.wav": wav()})
    with pytest.raises(UserError, match=r"1 no_transcript\n  a: .*a\.txt.*a\.json"):
        index_tars([tar])
    assert rejected(tmp_path) == [("a", "no_transcript")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rejected.jsonl", "x.tar"]


def test_reasons_and_examples_are_reported_if_no_sample_of_tars_is_usable(tmp_path):
    names = ("a.wav", "b.wav", "c.wav", "a.txt", "b.txt")
    members = {name: wav() if name.endswith("wav") else b"two" for name in names}
    tar = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError) as error:
        index_tars([tar], tmp_path / "index")
    lines = str(error.value).splitlines()
    assert lines[0].endswith(": 2 no_audio, 3 no_transcript")
    assert [line.split(":")[0] for line in lines[1:4]] == ["  a", "  a", "  b"]
    assert "follow each other" in lines[4]
    reasons = [reason for _, reason in rejected(tmp_path / "index")]
    assert sorted(reasons) == 2 * ["no_audio"] + 3 * ["no_transcript"]


def test_examples_are_reported_if_most_samples_of_a_tar_are_rejected(tmp_path):
    tar = write_tar(tmp_path / "x.tar", sample("a") | {"b.wav": wav(), "c.wav": wav()})
    summary = index_tars([tar])
    assert summary.rejected == {"no_transcript": 2}
    assert [line.split(":")[0] for line in summary.examples] == ["  b", "  c"]


# --- verifying ---


@pytest.fixture
def shards(tmp_path):
    write_shards(
        tmp_path / "out",
        read_kaldi(kaldi_directory(tmp_path / "kaldi", tone_sentences(5))),
        utterances_per_shard=3,
    )
    return tmp_path / "out"


def problems(folder):
    return [(problem.key, problem.reason) for problem in verify_shards(open_index(folder))]


def overwrite(path, place, content):
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(content)


def test_valid_shards_have_no_problems(shards):
    advanced = []
    assert verify_shards(open_index(shards), advance=advanced.append) == []
    assert sum(advanced) == 5


def test_changed_audio_is_found(shards):
    row = open_index(shards).rows[1]
    overwrite(
        shards / "shard-000000.tar",
        (int(row["offset"]) + int(row["size"]) // 2) * BLOCK,
        b"\xff" * 600,
    )
    found = problems(shards)
    assert found[0] == ("", "changed")
    assert [key for key, _ in found[1:]] == ["utt0001"]


def test_a_changed_byte_outside_of_samples_is_found(shards):
    size = (shards / "shard-000001.tar").stat().st_size
    overwrite(shards / "shard-000001.tar", size - 1, b"x")  # after the last sample
    assert problems(shards) == [("", "changed")]


def test_a_nul_in_a_txt_file_rejects_its_sample(tmp_path):
    members = sample("a", "he\0llo") | sample("b", "he\ufffdllo")
    summary = index_tars([write_tar(tmp_path / "x.tar", members)])
    assert summary.rejected == {"broken_text": 1}
    assert rejected(tmp_path) == [("a", "broken_text")]


def test_a_nul_that_an_index_contains_is_found(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "x.tar", sample("a", "he\0llo"))
    with monkeypatch.context() as patch:
        patch.setattr("asrllm.data.index.nul_problem", lambda fields: "")
        index_tars([tar])
    assert problems(tmp_path) == [("a", "broken_text")]


def test_rows_that_do_not_match_their_samples_are_found(shards):
    rows = read_rows(shards)
    rows["samples"][0] += RATE
    rows["text_bytes"][1] += 1
    rows["offset"][2] += 1
    rows["size"][3] += rows["size"][4]  # two samples in one
    rows["offset"][4] = rows["offset"][3]
    rows["size"][4] = rows["size"][3] // 2
    write_rows(shards, rows)
    found = problems(shards)
    assert found[:3] == [
        ("utt0000", "duration_mismatch"),
        ("utt0001", "changed_text"),
        ("row 2", "unreadable_tar"),
    ]
    assert found[3] == ("row 0", "unreadable_tar")


def test_repeated_keys_are_found(shards):
    rows = read_rows(shards)
    rows[1] = rows[0]
    write_rows(shards, rows)
    assert problems(shards) == [("utt0000", "duplicate_key")]


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_workers(tmp_path, shards):
    overwrite(shards / "shard-000001.tar", 600, b"\xff" * 600)
    index = open_index(shards)
    assert verify_shards(index, workers=2) == verify_shards(index)
    tars = [str(shards / "shard-000001.tar"), str(shards / "shard-000000.tar")]
    for workers in (1, 2):
        index_tars(tars, tmp_path / f"i{workers}", workers=workers)
    assert (tmp_path / "i1" / "index.bin").read_bytes() == (
        tmp_path / "i2" / "index.bin"
    ).read_bytes()


# --- hostile tars and indexes ---


def write_headers(path, *records):
    """Write a tar of (header, content) pairs, whose lengths need not agree."""
    with open(path, "wb") as file:
        for info, content in records:
            file.write(info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % BLOCK))
        file.write(bytes(2 * BLOCK))
    return str(path)


def header(name, size, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info


def sparse_tar(path, size):
    """Write a sparse file of `size` bytes, of which none are stored, as GNU tar does."""
    info = header("a.wav", 0, tarfile.GNUTYPE_SPARSE)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:398] = b"%011o\0" % size  # the only stored part begins at the end
    block[398:410] = b"%011o\0" % 0
    block[483:495] = b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path.write_bytes(bytes(block) + bytes(2 * BLOCK))
    return str(path)


def extended_header(size):
    return header("x", size, tarfile.XHDTYPE)


# records of tars, as write_headers takes them
HOSTILE_RECORDS = {
    "pax sparse": [
        (extended_header(44), b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"),
        (header("a.wav", 512), b"1\n0\n"),
    ],
    "larger than the file": [(header("a.wav", 1 << 40), b"x")],
    "a long name of a gigabyte": [(header("x", 1 << 30, tarfile.GNUTYPE_LONGNAME), b"x")],
    "negative": [(header("a.wav", -1024), b"")],
    "a negative extended header": [(extended_header(-512), b"")],
    "many extended headers": [(extended_header(12), b"12 path=abc\n")] * 1500,
    "a length that is not a number": [
        (extended_header(12), b"99999 size=\xff"),
        (header("a.wav", 0), b""),
    ],
}
HOSTILE_TARS = ["sparse", *HOSTILE_RECORDS]


def write_hostile_tar(path, kind):
    if kind == "sparse":
        return sparse_tar(path, 4 << 30)
    return write_headers(path, *HOSTILE_RECORDS[kind])


@pytest.mark.parametrize("kind", HOSTILE_TARS)
def test_hostile_tars_are_rejected_with_bounded_memory(tmp_path, kind):
    tar = write_hostile_tar(tmp_path / "x.tar", kind)
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            index_tars([tar])
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert not (tmp_path / "index.json").exists()


def test_a_corrupted_header_is_not_taken_for_the_end_of_the_tar(tmp_path):
    tar = Path(write_tar(tmp_path / "x.tar", sample("a") | sample("b") | sample("c")))
    data = bytearray(tar.read_bytes())
    place = data.index(b"b.wav")
    data[place] ^= 1
    tar.write_bytes(data)
    with pytest.raises(UserError, match=rf"x\.tar'.*byte {place}") as caught:
        index_tars([str(tar)])
    assert "--concatenate" not in str(caught.value)  # which is the advice for joined tars


@pytest.fixture
def joined(tmp_path):
    """Return a tar to which another was appended with `cat`, and the size of the first."""
    first = write_tar(tmp_path / "a.tar", sample("a"))
    second = write_tar(tmp_path / "b.tar", sample("b"))
    content = [Path(tar).read_bytes() for tar in (first, second)]
    tar = tmp_path / "in" / "x.tar"
    tar.parent.mkdir()
    tar.write_bytes(b"".join(content))
    return tar, len(content[0])


def test_a_tar_that_was_appended_to_another_is_reported(joined):
    """Its samples would be neither indexed nor listed."""
    tar, place = joined
    with pytest.raises(UserError, match=rf"x\.tar'.*byte {place}.*--concatenate"):
        index_tars([str(tar)])
    (tar.parent / "list").write_text(f"{tar}\n")
    with pytest.raises(UserError, match=rf"x\.tar'.*byte {place}"):
        list(read_wenet(tar.parent / "list"))


@pytest.mark.parametrize("place", [0, 1, 511, 512, (1 << 20) + 7])
def test_garbage_after_the_end_mark_is_reported(tmp_path, place):
    tar = Path(write_tar(tmp_path / "x.tar", sample("a")))
    size = tar.stat().st_size
    tar.write_bytes(tar.read_bytes() + b"\0" * place + b"x")
    with pytest.raises(UserError, match=f"byte {size + place}"):
        index_tars([str(tar)])


@pytest.mark.parametrize("members", [1, 2, 3])
def test_a_tar_that_was_cut_between_two_members_is_reported(tmp_path, members):
    tar = Path(write_tar(tmp_path / "x.tar", sample("a") | sample("b")))
    with open(tar, "rb") as file:
        begins = [info.offset for info in tar_files(file)]
    os.truncate(tar, begins[members])
    with pytest.raises(UserError, match=re.escape(repr(str(tar)))):
        index_tars([str(tar)])


@pytest.mark.parametrize("padding", [0, 1, 512, 10240, (1 << 20) + 512])
def test_any_number_of_zeros_may_follow_the_end_mark(tmp_path, padding):
    tar = Path(write_tar(tmp_path / "x.tar", sample("a") | sample("b")))
    tar.write_bytes(tar.read_bytes() + b"\0" * padding)
    assert len(index_tars([str(tar)]).index) == 2
    assert problems(tmp_path) == []


@pytest.mark.slow
def test_the_end_of_a_tar_is_read_with_bounded_memory(tmp_path):
    tar = Path(write_tar(tmp_path / "x.tar", sample("a")))
    with open(tar, "ab") as file:
        file.truncate(50 << 20)
    tracemalloc.start()
    try:
        with open(tar, "rb") as file:
            assert list(tar_files(file))
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_headers_of_a_tar_are_read_with_bounded_memory(tmp_path):
    count = 8000
    tar = Path(write_tar(tmp_path / "x.tar", {f"{i}.txt": b"x" for i in range(count)}))
    tracemalloc.start()
    try:
        with open(tar, "rb") as file:
            assert sum(1 for _ in tar_files(file)) == count
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_deeply_nested_json_and_unprintable_keys_are_rejected(tmp_path):
    deep = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    members = {"a.wav": wav(), "a.json": deep} | sample("b\x1b[2J") | sample("c\nd") | sample("e")
    summary = index_tars([write_tar(tmp_path / "x.tar", members)])
    assert summary.rejected == {"broken_transcript": 1, "bad_key": 2}
    assert "\x1b" not in (tmp_path / "rejected.jsonl").read_text()


@pytest.mark.parametrize(
    "name", ["../x.tar", "/etc/passwd", "file:///etc/passwd", "a/../../x.tar", "nope://x/x.tar"]
)
def test_an_index_may_not_name_shards_outside_its_directory(tmp_path, name):
    index_tars([write_tar(tmp_path / "x.tar", sample("a"))])
    (shard,) = json.loads((tmp_path / "index.json").read_text())["shards"]
    change_about(tmp_path, shards=[shard | {"name": name}])
    with pytest.raises(UserError, match=re.escape(name)):
        open_index(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"utterances": "5"},
        {"utterances": 1.5},
        {"utterances": -1},
        {"utterances": True},
        {"speakers": "many"},
        {"speakers": None},
        {"corpora": []},
        {"corpora": {"a": None}},
        {"languages": {"en": {"utterances": 5}}},
        {"languages": {"en": {"utterances": 5, "hours": "1"}}},
        {"languages": {"en": {"utterances": 5, "hours": float("nan")}}},
        {"rows_sha256": {"x": 1}},
        {"shards": None},
        {"shards": ["shard-000000.tar"]},
    ],
    ids=str,
)
def test_an_index_with_an_entry_of_another_type_is_rejected(shards, changes):
    change_about(shards, **changes)
    with pytest.raises(UserError, match=r"out' is corrupted"):
        open_index(shards)


@pytest.mark.parametrize(
    "entry",
    [
        {"name": ""},
        {"name": "a\0b"},
        {"name": "\ud800"},
        {"name": 5},
        {"bytes": "many"},
        {"bytes": 1e308},
        {"utterances": [3]},
        {"sha256": None},
    ],
    ids=str,
)
def test_an_index_with_an_invalid_shard_is_rejected(shards, entry):
    about = json.loads((shards / "index.json").read_text())
    first, *others = about["shards"]
    change_about(shards, shards=[first | entry, *others])
    with pytest.raises(UserError, match=r"out' is corrupted"):
        open_index(shards)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["index.bin", "index.json"])
def test_every_flipped_bit_of_an_index_is_found(shards, file):
    original = open_index(shards)
    content = (shards / file).read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        (shards / file).write_bytes(changed)
        try:
            found = open_index(shards)
        except UserError:
            continue
        # White space between two entries of the JSON may change.
        assert file == "index.json"
        assert (found.about, found.shards) == (original.about, original.shards), place


@pytest.mark.parametrize("kind", HOSTILE_TARS)
def test_hostile_tars_of_a_wenet_list_yield_no_usable_utterance(tmp_path, kind):
    tar = write_hostile_tar(tmp_path / "x.tar", kind)
    (tmp_path / "list").write_text(f"{tar}\n")
    found = []
    with contextlib.suppress(UserError):
        found += read_wenet(tmp_path / "list")
    assert all(utterance.problem for utterance in found)


ODD_FIELDS = {
    "broken_transcript": [
        b'{"text": "\\ud800x"}',
        b'{"text": "x", "lang": "\\uDFFF"}',
        b'{"text": "x", "n": ' + b"9" * 5000 + b"}",
    ],
    "duration_mismatch": [
        b'{"text": "x", "duration": 1e999}',
        b'{"text": "x", "duration": ' + b"9" * 400 + b"}",
    ],
    "no_transcript": [b"[1]", b"null", b'{"text": 1}', b'{"text": null}'],
    "bad_field": [b'{"text": "x", "lang": {}}', b'{"text": "x", "hotwords": "y"}'],
    "broken_text": [
        b'{"text": "he\\u0000llo"}',
        b'{"text": "x", "prompt": "\\u0000"}',
        b'{"text": "x", "lang": "e\\u0000n"}',
        b'{"text": "x", "hotwords": ["y", "\\u0000z"]}',
    ],
    None: [
        b'{"text": "\\ufffd \\u0007 \\u200b"}',
        b'{"text": "\\ud83d\\ude00"}',
        b'{"text": "x", "duration": NaN}',
        b'{"text": "x", "duration": "long", "speaker": [1], "corpus": 5}',
        b'{"text": "x", "duration": true}',
    ],
}


@pytest.mark.parametrize(
    ("reason", "content"),
    [(reason, content) for reason, contents in ODD_FIELDS.items() for content in contents],
)
def test_invalid_fields_reject_only_their_sample(tmp_path, reason, content):
    summary = index_tars(
        [write_tar(tmp_path / "x.tar", {"a.wav": wav(), "a.json": content} | sample("b"))]
    )
    assert summary.rejected == ({reason: 1} if reason else {})
    assert verify_shards(open_index(tmp_path)) == []


@pytest.mark.parametrize("column", ["offset", "size", "shard"])
def test_rows_outside_their_shard_are_rejected(shards, column):
    rows = read_rows(shards)
    rows[column][1] = 1 << 31
    write_rows(shards, rows)
    with pytest.raises(UserError, match=f"{shards}"):
        open_index(shards)


def test_different_texts_in_txt_and_json_reject_the_sample(tmp_path):
    """Case, punctuation, white space and a byte-order mark make no difference."""
    members = (
        sample("a", text="one two")
        | {"a.json": b'{"text": "one three"}'}
        | sample("b", text="\ufeffone  two\n")
        | {"b.json": b'{"text": "one two"}'}
        | sample("c", text="")
        | {"c.json": b'{"text": "one"}'}
        | sample("d", text="One, two.")
        | {"d.json": b'{"text": "one two"}'}
    )
    tar = write_tar(tmp_path / "x.tar", members)
    summary = index_tars([tar])
    assert summary.rejected == {"different_texts": 2}
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").open()]
    assert [row["key"] for row in rejected] == ["a", "c"]
    assert "one two" in rejected[0]["detail"]
    assert "one three" in rejected[0]["detail"]
