import io
import json
import tarfile

import pytest
import soundfile

from asrllm.data.index import scan_shard
from asrllm.data.tars import BLOCK, _plain_members, read_sample, scan_tar
from asrllm.testing import tone

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path, keys, form):
    audio = io.BytesIO()
    soundfile.write(audio, tone("one", 0.25), 16000, format="FLAC")
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for key in keys:
            for name, data in (
                (f"{key}.flac", audio.getvalue()),
                (f"{key}.json", json.dumps({"text": key}).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("form", "key"),
    [
        (form, key)
        for form in FORMATS
        for key in ("short", "folder/short", "很长" * 10, "long" * 40)
        if (form, len(key)) != ("ustar", 160)
    ],
)
def test_a_sample_is_read_as_tarfile_reads_it(tmp_path, form, key):
    """Long names, and those in other scripts, have headers that only tarfile parses."""
    whole = write_tar(tmp_path / "x.tar", ["before", key, "after"], form).read_bytes()
    for sample in scan_tar(tmp_path / "x.tar"):
        content = whole[sample.offset * BLOCK :][: sample.size * BLOCK]
        found = read_sample(content)
        assert (found.key, found.fields, found.audio, found.extension) == (
            sample.key,
            sample.fields,
            sample.audio,
            "flac",
        )
    assert [s.key for s in scan_tar(tmp_path / "x.tar")] == ["before", key, "after"]


def test_plain_headers_are_read_without_tarfile(tmp_path):
    whole = write_tar(tmp_path / "x.tar", ["a"], "gnu").read_bytes()
    (sample,) = scan_tar(tmp_path / "x.tar")
    content = whole[: sample.size * BLOCK]
    assert [member.name for member in _plain_members(content)] == ["a.flac", "a.json"]


@pytest.mark.parametrize("keys", [["b", "b"], ["a.0", "a.1", "a.2"]])
def test_files_with_the_same_key_are_rejected(tmp_path, keys):
    """A key may be repeated, or agree with another one up to the first dot."""
    record, bad, found = scan_shard(
        write_tar(tmp_path / "x.tar", [*keys, "good"], "gnu"), name="x.tar"
    )
    assert (len(record.rows), found) == (1, ["good"])
    assert [(b.key, b.reason) for b in bad] == [(keys[0][0], "repeated_file")]


def test_members_that_webdataset_skips_are_skipped(tmp_path):
    write_tar(tmp_path / "x.tar", ["a", "b"], "gnu")
    others = ("__meta__.json", "README", ".DS_Store", "./._a.flac", "d/.hidden.json")
    with tarfile.open(tmp_path / "y.tar", "w") as tar, tarfile.open(tmp_path / "x.tar") as old:
        members = old.getmembers()
        for i, name in enumerate(others):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"{}\n"))
            if i < len(members):
                tar.addfile(members[i], old.extractfile(members[i]))
    record, bad, found = scan_shard(tmp_path / "y.tar", name="y.tar")
    assert (bad, found, len(record.rows)) == ([], ["a", "b"], 2)
    for row in record.rows:
        content = (tmp_path / "y.tar").read_bytes()[int(row["offset"]) * BLOCK :]
        assert read_sample(content[: int(row["size"]) * BLOCK]).key in ("a", "b")


def test_field_of_the_wrong_type_is_rejected(tmp_path):
    fields = {"text": "one", "lang": ["en"]}
    with tarfile.open(tmp_path / "y.tar", "w") as tar:
        for name, data in (("a.flac", b"fLaC"), ("a.json", json.dumps(fields).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    _, bad, _ = scan_shard(tmp_path / "y.tar", name="y.tar")
    assert [(b.key, b.reason) for b in bad] == [("a", "bad_field")]
    assert "'lang'" in bad[0].detail


@pytest.mark.parametrize(
    ("fields", "text", "expected"),
    [
        (b'{"lang": "en"}', b"one\n", {"lang": "en", "text": "one"}),
        (b"{}", b"one\r\ntwo\rthree\r", {"text": "one\ntwo\nthree"}),
        (b'{"text": "one\\r\\ntwo\\rthree"}', b"one two three", {"text": "one\ntwo\nthree"}),
    ],
)
def test_txt_supplies_the_text_that_json_lacks(tmp_path, fields, text, expected):
    write_tar(tmp_path / "x.tar", ["a"], "gnu")
    with tarfile.open(tmp_path / "y.tar", "w") as tar, tarfile.open(tmp_path / "x.tar") as old:
        tar.addfile(old.getmember("a.flac"), old.extractfile("a.flac"))
        for name, data in (("a.json", fields), ("a.txt", text)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (sample,) = scan_tar(tmp_path / "y.tar")
    assert sample.fields == expected


@pytest.mark.parametrize("damage", ["header", "truncated", "two", "other"])
def test_bytes_that_are_not_one_sample_raise(tmp_path, damage):
    whole = write_tar(tmp_path / "x.tar", ["a", "b"], "gnu").read_bytes()
    first, second = scan_tar(tmp_path / "x.tar")
    content = whole[: first.size * BLOCK]
    damaged = {
        "header": content[:3] + b"?" + content[4:],
        "truncated": content[: -2 * BLOCK],
        "two": whole[: second.offset * BLOCK + second.size * BLOCK],
        "other": whole[BLOCK : (first.size + 1) * BLOCK],
    }[damage]
    with pytest.raises((ValueError, tarfile.TarError)):
        read_sample(damaged)
