"""Manifests of other toolkits become shards, in each format that their users write."""

import json
import re
import tarfile

import numpy as np
import pytest
import soundfile

from asrllm.data.shards import write_shards
from asrllm.data.sources import (
    SOURCES,
    RejectedError,
    read_folder,
    read_nemo,
    read_slam,
    read_swift,
    read_wenet,
)
from asrllm.data.tars import scan_tar
from asrllm.errors import UserError
from asrllm.testing import tone


def audio(folder, *names, seconds=0.5):
    """Write audio files of a tone each."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, tone("one", seconds), 16000)


def lines(path, *rows):
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def shards(folder, utterances):
    """Write shards, and return ({key: fields}, [(key, reason)]) of their samples and rejects."""
    write_shards(folder / "out", utterances, utterances_per_shard=2)
    samples = [s for path in sorted((folder / "out").glob("*.tar")) for s in scan_tar(path)]
    rows = [
        json.loads(line) for line in (folder / "out" / "rejected.jsonl").read_text().splitlines()
    ]
    rejects = [(row["key"], row["reason"]) for row in rows]
    return {sample.key: sample.fields for sample in samples}, rejects


def about(text, seconds=0.5, **more):
    return {"text": text, "duration": seconds, "sampling_rate": 16000} | more


# --- NeMo ---


def test_nemo_manifest_becomes_shards(tmp_path):
    audio(tmp_path, "wav/a.wav", "wav/b.flac", "wav/d.wav")
    path = lines(
        tmp_path / "manifest.json",
        {
            "audio_filepath": "wav/a.wav",
            "duration": 0.5,
            "text": "one",
            "lang": "en",
            "speaker": "s",
            "hotwords": "one, two",
        },
        {
            "audio_filepath": str(tmp_path / "wav/b.flac"),
            "duration": 0.2,
            "offset": 0.1,
            "text": "two",
        },
        {"audio_filepath": "wav/c.wav", "duration": 0.5, "text": "three"},
        {"audio_filepath": "../" + tmp_path.name + "/wav/d.wav", "duration": 3, "text": "four"},
    )
    assert SOURCES["nemo"].count(path) == 4
    b = f"{tmp_path}/wav/b-100".lstrip("/").replace(".", "_")
    d = f"{tmp_path.name}/wav/d"
    assert shards(tmp_path, read_nemo(path)) == (
        {
            "wav/a": about("one", lang="en", speaker="s", hotwords=["one", "two"]),
            b: about("two", 0.2),
        },
        [("wav/c", "missing_audio"), (d, "duration_mismatch")],
    )


def problems(utterances):
    """Return (reason, detail) of each utterance that is rejected without its audio, or None."""
    return [utterance.problem for utterance in utterances]


GOOD = {
    "nemo": {"audio_filepath": "a.wav", "text": "one"},
    "wenet": {"key": "A", "wav": "a.wav", "txt": "one"},
    "slam": {"key": "A", "source": "a.wav", "target": "one"},
    "swift": {"query": "<audio>", "response": "one", "audios": ["a.wav"], "id": "A"},
}


def without(source, key):
    return {name: value for name, value in GOOD[source].items() if name != key}


@pytest.mark.parametrize(
    ("source", "row", "reason", "detail"),
    [
        (
            "nemo",
            without("nemo", "audio_filepath"),
            "missing_field",
            ":2 .*'audio_filepath'.* text",
        ),
        ("nemo", without("nemo", "text"), "missing_field", ":2 .*'text'"),
        (
            "nemo",
            GOOD["nemo"] | {"text": ["x"]},
            "bad_field",
            r":2: 'text' .*\['x'\]",
        ),
        ("nemo", GOOD["nemo"] | {"text": True}, "bad_field", r":2: 'text' .*True"),
        (
            "nemo",
            GOOD["nemo"] | {"audio_filepath": 3},
            "bad_field",
            r":2: 'audio_filepath' .*3",
        ),
        (
            "nemo",
            GOOD["nemo"] | {"duration": "long"},
            "bad_field",
            r":2: 'duration' .*'long'",
        ),
        (
            "nemo",
            GOOD["nemo"] | {"duration": -1},
            "bad_field",
            r":2: 'duration' .*-1",
        ),
        ("nemo", GOOD["nemo"] | {"offset": -0.5}, "bad_field", r"'offset' .*-0\.5"),
        ("nemo", GOOD["nemo"] | {"duration": 1e300}, "bad_field", r"'duration' .*1e\+300"),
        ("nemo", GOOD["nemo"] | {"duration": "inf"}, "bad_field", r"'duration' .*'inf'"),
        ("nemo", GOOD["nemo"] | {"audio_filepath": ""}, "missing_audio", "'audio_filepath'"),
        ("nemo", GOOD["nemo"] | {"audio_filepath": None}, "missing_audio", "'audio_filepath'"),
        ("nemo", GOOD["nemo"] | {"audio_filepath": "file:///a.wav"}, "missing_audio", "file:///a"),
        (
            "nemo",
            json.dumps(GOOD["nemo"] | {"audio_filepath": "\ud800"}),
            "missing_audio",
            r":2: .*'\\ud800'",
        ),
        ("slam", GOOD["slam"] | {"source": "a\0"}, "missing_audio", r":2: 'source' .*'a\\x00'"),
        ("swift", GOOD["swift"] | {"audios": ["a\0"]}, "missing_audio", r":2: .*'a\\x00'"),
        ("wenet", GOOD["wenet"] | {"wav": None}, "missing_audio", ":2: 'wav'"),
        ("wenet", GOOD["wenet"] | {"key": None}, "bad_key", ":2 .*'key'"),
        ("slam", GOOD["slam"] | {"source": ""}, "missing_audio", ":2: 'source'"),
        ("slam", GOOD["slam"] | {"key": ""}, "bad_key", ":2 .*'key'"),
        ("swift", GOOD["swift"] | {"audios": [""]}, "missing_audio", ":2: .* empty"),
        ("swift", GOOD["swift"] | {"audios": ["https://h/a.wav"]}, "missing_audio", "'https://h/"),
        ("swift", GOOD["swift"] | {"audios": [{"path": ""}]}, "missing_audio", ":2: .* empty"),
        ("swift", GOOD["swift"] | {"audios": [{"bytes": ""}]}, "bad_field", ":2: 'audios'"),
        ("nemo", '{"audio_filepath": "a.wav", "text": ', "bad_json", r"m\.jsonl:2 "),
        ("nemo", '"x"', "bad_json", r"m\.jsonl:2 "),
        ("nemo", "\udcff", "bad_json", r"m\.jsonl:2 "),
        ("wenet", without("wenet", "key"), "missing_field", ":2 .*'key'"),
        ("wenet", without("wenet", "txt"), "missing_field", ":2 .*'txt'"),
        (
            "wenet",
            GOOD["wenet"] | {"start": 2, "end": 1},
            "bad_field",
            r":2: 'end' .*1\.0 s",
        ),
        ("slam", without("slam", "target"), "missing_field", ":2 .*'target'"),
        ("slam", GOOD["slam"] | {"key": [1]}, "bad_field", r":2: 'key' .*\[1\]"),
        (
            "swift",
            {"text": "x"},
            "missing_field",
            ":2 .*'messages', 'conversations' or 'query'.* text",
        ),
        ("swift", without("swift", "response"), "missing_field", ":2 .*'response'"),
        ("swift", {"messages": ["x"]}, "bad_field", ":2: 'messages' "),
        ("swift", {"messages": None}, "bad_field", ":2: 'messages' "),
        ("swift", {"messages": [{"content": "x"}]}, "missing_field", ":2.* 'role' or 'from'"),
        (
            "swift",
            GOOD["swift"] | {"audios": [1]},
            "bad_field",
            r":2: 'audios' .*\[1\]",
        ),
        ("swift", GOOD["swift"] | {"audios": None}, "not_one_audio", ":2 .* 0 "),
        ("swift", GOOD["swift"] | {"query": "<audio><audio>"}, "not_one_audio", r":2 .*<audio>"),
        (
            "swift",
            GOOD["swift"] | {"history": [["<audio>", "two"]]},
            "not_one_turn",
            ":2 .*history",
        ),
    ],
)
def test_a_bad_row_of_a_manifest_is_rejected_alone(tmp_path, source, row, reason, detail):
    text = row if isinstance(row, str) else json.dumps(row)
    path = tmp_path / "m.jsonl"
    path.write_text(
        "\n".join([json.dumps(GOOD[source]), text, json.dumps(GOOD[source])]) + "\n",
        encoding="utf-8",
        errors="surrogateescape",
    )
    first, found, last = problems(SOURCES[source].read(path))
    assert (first, last) == (None, None)
    assert found[0] == reason
    assert re.search(detail, found[1])


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"prompt": ["Write."]}, ["'prompt'", "['Write.']"]),
        ({"lang": {"a": 1}}, ["'lang'", "{'a': 1}"]),
        ({"hotwords": [1]}, ["'hotwords'", "[1]"]),
        ({"hotwords": {"a": 1}}, ["'hotwords'", "{'a': 1}"]),
    ],
)
def test_field_of_the_wrong_type_rejects_its_row(tmp_path, fields, shown):
    audio(tmp_path, "a.wav", "b.wav")
    rows = GOOD["nemo"], {"audio_filepath": "b.wav", "text": "one"} | fields
    samples, rejects = shards(tmp_path, read_nemo(lines(tmp_path / "m.jsonl", *rows)))
    assert (list(samples), rejects) == (["a"], [("b", "bad_field")])
    detail = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())["detail"]
    for part in shown:
        assert part in detail


def test_numbers_are_valid_fields(tmp_path):
    audio(tmp_path, "a.wav")
    row = GOOD["nemo"] | {"prompt": 5, "lang": 9, "speaker": 12}
    samples, _ = shards(tmp_path, read_nemo(lines(tmp_path / "m.jsonl", row)))
    assert samples == {"a": about("one", prompt="5", lang="9", speaker="12")}


def test_place_in_an_archive_is_rejected_with_its_path(tmp_path):
    (tmp_path / "wav.ark").write_bytes(b"utt RIFF")
    rows = (GOOD["slam"] | {"source": "wav.ark:4"}, GOOD["slam"] | {"source": "no.ark:4"})
    details = []
    for utterance in read_slam(lines(tmp_path / "m.jsonl", *rows)):
        with pytest.raises(RejectedError) as error:
            utterance.load()
        details.append(error.value.args[1])
    assert "--kaldi" in details[0]
    assert "no.ark:4'" in details[1]


def test_integers_are_valid_keys_and_transcripts(tmp_path):
    audio(tmp_path, "a.wav")
    (slam,) = read_slam(lines(tmp_path / "slam.jsonl", GOOD["slam"] | {"key": 12, "target": 7}))
    (swift,) = read_swift(
        lines(
            tmp_path / "swift.jsonl",
            GOOD["swift"] | {"id": 5, "audios": None, "audio": "a.wav", "history": []},
        )
    )
    (nemo,) = read_nemo(lines(tmp_path / "nemo.jsonl", GOOD["nemo"] | {"text": 7}))
    assert (slam.key, slam.text) == ("12", "7")
    assert (swift.key, swift.text, swift.problem) == ("5", "one", None)
    assert (nemo.text, nemo.problem) == ("7", None)


def test_a_manifest_of_another_format_is_reported_with_its_first_row(tmp_path):
    path = lines(tmp_path / "m.json", *[{"wav": "a.wav", "text": "x"}] * 3)
    with pytest.raises(
        UserError,
        match=r"(?s)3 missing_field.*m\.json:1 .*'audio_filepath'.* wav, text",
    ):
        write_shards(tmp_path / "out", read_nemo(path))


@pytest.mark.parametrize("source", GOOD)
def test_byte_order_marks_are_removed_from_rows(tmp_path, source):
    row = json.dumps(GOOD[source])
    (tmp_path / "m.jsonl").write_text(f"\ufeff{row}\n\ufeff{row}\n", encoding="utf-8")
    assert problems(SOURCES[source].read(tmp_path / "m.jsonl")) == [None, None]


def test_a_utf_16_manifest_is_reported(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps(GOOD["nemo"]), encoding="utf-16")
    with pytest.raises(UserError, match=r"m\.json' .*UTF-16.*UTF-8"):
        list(read_nemo(tmp_path / "m.json"))


@pytest.mark.parametrize("source", ["nemo", "wenet", "slam", "swift"])
@pytest.mark.parametrize("place", [".", "data"])
def test_paths_start_at_the_manifest_or_at_the_current_directory(
    tmp_path, monkeypatch, source, place
):
    audio(tmp_path / place, "wav/a.wav")
    (tmp_path / "data").mkdir(exist_ok=True)
    row = json.loads(json.dumps(GOOD[source]).replace("a.wav", "wav/a.wav"))
    path = lines(tmp_path / "data" / "m.json", row)
    monkeypatch.chdir(tmp_path)
    (utterance,) = SOURCES[source].read(path)
    assert utterance.file == tmp_path / place / "wav/a.wav"


# --- wenet ---


def test_wenet_json_lines_become_shards(tmp_path):
    audio(tmp_path, "a.wav", "b.wav")
    path = lines(
        tmp_path / "data.list",
        {"key": "A", "wav": str(tmp_path / "a.wav"), "txt": "一"},
        {"key": "B", "wav": "b.wav", "txt": "二", "start": 0.1, "end": 0.4, "speaker": "s"},
    )
    assert SOURCES["wenet"].count(path) == 2
    samples, rejected = shards(tmp_path, read_wenet(path))
    assert samples == {"A": about("一"), "B": about("二", pytest.approx(0.3), speaker="s")}
    assert rejected == []


def test_wenet_rows_may_be_a_json_list(tmp_path):
    audio(tmp_path, "a.wav")
    path = tmp_path / "data.list"
    path.write_text(json.dumps([GOOD["wenet"]]))
    (utterance,) = read_wenet(path)
    assert (utterance.key, utterance.file) == (GOOD["wenet"]["key"], tmp_path / "a.wav")


def wenet_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for member in members:
            tar.add(member, member.name)


def test_wenet_tars_become_shards(tmp_path):
    for key in ("a.1", "b", "c", "d"):
        audio(tmp_path / "t", f"{key}.wav")
        (tmp_path / "t" / f"{key}.txt").write_text(f"text of {key}\n")
    (tmp_path / "t" / "d.txt").write_bytes(b"\xff")
    wenet_tar(
        tmp_path / "0.tar",
        [tmp_path / "t" / name for name in ("a.1.txt", "a.1.wav", "b.wav", "b.txt")],
    )
    wenet_tar(
        tmp_path / "1.tar",
        [
            tmp_path / "t" / name
            for name in ("a.1.txt", "b.wav", "c.txt", "c.wav", "d.txt", "d.wav")
        ],
    )
    (tmp_path / "data.list").write_text(f"{tmp_path}/0.tar\n1.tar\n")
    samples, rejected = shards(tmp_path, read_wenet(tmp_path / "data.list"))
    assert samples == {key: about(f"text of {key.replace('_', '.')}") for key in ("a_1", "b", "c")}
    assert rejected == [("a.1", "missing_audio"), ("b", "no_transcript"), ("d", "no_transcript")]


def test_an_invalid_wenet_list_is_reported(tmp_path):
    path = tmp_path / "data.list"
    path.write_text("no.tar\n")
    with pytest.raises(UserError, match=r"data\.list:1 names 'no\.tar'"):
        list(read_wenet(path))
    (tmp_path / "no.tar").write_bytes(b"x" * 600)
    with pytest.raises(UserError, match=r"data\.list:1: .*no\.tar'"):
        list(read_wenet(path))


# --- folders ---


def test_a_folder_with_text_files_becomes_shards(tmp_path):
    audio(tmp_path / "d", "b.flac", "sub.1/a.WAV", "c.wav")
    (tmp_path / "d" / "b.txt").write_bytes(b"b\rb\r\nb\r\n")
    (tmp_path / "d" / "sub.1" / "a.txt").write_text("\ufeffa")
    assert SOURCES["folder"].count(tmp_path / "d") == 3
    samples, rejected = shards(tmp_path, read_folder(tmp_path / "d"))
    assert samples == {"b": about("b\nb\nb"), "sub_1/a": about("a")}
    assert rejected == [("c", "no_transcript")]


@pytest.mark.parametrize(
    ("name", "where", "table", "more"),
    [
        (
            "train.tsv",
            "clips/",
            'client_id\tpath\tsentence\tlocale\nS\ta.wav\t"quoted\ten\nS\tb.wav\ttwo\ten\n',
            True,
        ),  # Common Voice
        (
            "metadata.csv",
            "",
            'file_name,transcription,Speaker_ID,lang\na.wav,"""quoted",S,en\nb.wav,two,S,en\n',
            True,
        ),  # audiofolder
        ("metadata.csv", "wavs/", 'a|ONE|"quoted\nb|two|two\n', False),  # LJSpeech
        (
            "metadata.tsv",
            "x/",
            'audio\tlabel\tspeaker\tlanguage\nx/a.wav\t"quoted\tS\ten\nx/b.wav\ttwo\tS\ten\n',
            True,
        ),
        (
            "list.csv",
            "",
            'audio_file|text|speaker_name|lang\na.wav|"quoted|S|en\nb.wav|two|S|en\n',
            True,
        ),  # Coqui
    ],
)
def test_a_folder_with_a_table_becomes_shards(tmp_path, name, where, table, more):
    audio(tmp_path / "d", f"{where}a.wav", f"{where}b.wav")
    (tmp_path / "d" / name).write_text(table)
    given = None if name.startswith("metadata") else tmp_path / "d" / name
    samples, rejected = shards(tmp_path, read_folder(tmp_path / "d", table=given))
    fields = {"speaker": "S", "lang": "en"} if more else {}
    prefix = "x/" if where == "x/" else ""
    assert samples == {
        f"{prefix}a": about('"quoted', **fields),
        f"{prefix}b": about("two", **fields),
    }
    assert rejected == []


def test_missing_audio_of_a_table_is_rejected(tmp_path):
    audio(tmp_path / "d", "clips/b.wav")
    (tmp_path / "d" / "metadata.csv").write_text(
        "path,sentence,duration\na.wav,one,0.5\nb.wav,two,0.5\n,three,0.5\n"
    )
    assert SOURCES["folder"].count(tmp_path / "d") == 3
    samples, rejected = shards(tmp_path, read_folder(tmp_path / "d"))
    assert samples == {"b": about("two")}
    assert rejected == [("a", "missing_audio"), ("metadata.csv:4", "missing_audio")]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "name,text\nx,y\n",
            r"metadata\.csv' .*name, text, .*audio.*file_name, path, .* or wav",
        ),
        (
            "path,words\nx,y\n",
            r"metadata\.csv' .*path, words, .*text, sentence",
        ),
        ("", r"metadata\.csv' .*empty"),
        ("path,text\n", r"metadata\.csv' .*no utterance"),
        ('path,"text\nx,y\n', r"metadata\.csv' .*unexpected end of data"),
        ("path,Text,TEXT\nx,y,z\n", r"metadata\.csv' .*'text'"),
        ("path,text,lang,lang\nx,y,z,z\n", r"metadata\.csv' .*'lang'"),
        ("path,text,path,text\nx,y,x,y\n", r"metadata\.csv' .*'path' and 'text'"),
        ("path,text\rx,y\rz,y\r", r"metadata\.csv' .*carriage return"),
    ],
)
def test_an_invalid_table_is_reported(tmp_path, table, message):
    (tmp_path / "metadata.csv").write_text(table)
    with pytest.raises(UserError, match=message):
        list(read_folder(tmp_path))


@pytest.mark.parametrize(
    ("table", "reason", "detail"),
    [
        (
            "path,text\nx.wav\ny.wav,y\n",
            "bad_row",
            r"metadata\.csv:2 .* 1 .* 2 .* path, text",
        ),
        (
            "path,text,duration\nx.wav,y,?\ny.wav,y,\n",
            "bad_field",
            r"metadata\.csv:2: 'duration' .*'\?'",
        ),
        (
            "path,text,duration\nx.wav,y,-3\ny.wav,y,1\n",
            "bad_field",
            r"metadata\.csv:2: 'duration' .*'-3'",
        ),
        ("a|b\nc\n", "bad_row", "metadata.csv:2 "),
        ('path,text\nx.wav,"a" b\ny.wav,y\n', "bad_row", "metadata.csv:2 "),
    ],
)
def test_a_bad_row_of_a_table_is_rejected(tmp_path, table, reason, detail):
    (tmp_path / "metadata.csv").write_text(table)
    found = problems(read_folder(tmp_path))
    (problem,) = filter(None, found)
    assert len(found) == 2
    assert problem[0] == reason
    assert re.search(detail, problem[1])


@pytest.mark.slow
@pytest.mark.parametrize("stray", ['x1.wav,"one', '"x1.wav,one', '"x1,1.wav,one'])
@pytest.mark.parametrize("later", [(), ('x4.wav,"a, b"',), ('x4.wav,four"',), ('x4.wav,"',)])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_stray_quotation_mark_rejects_one_row(tmp_path, stray, later, end):
    """Otherwise the row would contain all rows up to the next quotation mark."""
    rows = ["path,text", stray, "x2.wav,two", "", "x3.wav,three", *later, "x5.wav,five"]
    (tmp_path / "metadata.csv").write_bytes(end.join(rows).encode())
    found = list(read_folder(tmp_path))
    files = [utterance.file.name for utterance in found if utterance.problem is None]
    assert [name for name in files if name != "x4.wav"] == ["x2.wav", "x3.wav", "x5.wav"]
    first = found[0].problem
    assert first[0] == "bad_row"
    assert "metadata.csv:2 " in first[1]
    physical_lines = len([line for line in end.join(rows).split(end)[1:] if line])
    assert len(found) == physical_lines


def test_the_line_of_a_stray_quotation_mark_is_named(tmp_path):
    table = 'path,text,lang\nx.wav,"one\ntwo","en\ny.wav,three,en\n'
    (tmp_path / "metadata.csv").write_text(table)
    found = [utterance.problem for utterance in read_folder(tmp_path)]
    assert "line 3 " in found[0][1]
    assert found[-1] is None


@pytest.mark.parametrize(
    "table",
    [
        "path,text\nu1,{text}\nu2,b\n",
        "path,text\nu1.wav,{text}\nu2.wav,b\n",
        "text;path\n{text};u1.wav\nb;u2.wav\n",
    ],
)
def test_csv_cells_with_line_breaks_are_not_taken_for_rows(tmp_path, table):
    text = "Hello\nWell, yes; no\n\nI said, stop it, now; then\nout.wav is a name"
    (tmp_path / "metadata.csv").write_text(table.format(text=f'"{text}"'))
    assert problems(read_folder(tmp_path)) == [None, None]


@pytest.mark.parametrize(
    ("table", "texts"),
    [
        ('path,text\nutt1,"at nine\n9:30, then"\nutt2,ok\n', ["at nine 9:30, then", "ok"]),
        ('path;text\nu1;"Preis: 5\n10; viel"\n', ["Preis: 5 10; viel"]),
        ('path,text\nutt1,"1,2,3\n4,5,6"\n', ["1,2,3 4,5,6"]),
        ('path,text\nab,"a list:\nred, blue"\n', ["a list: red, blue"]),
        ('path,text\nab,"a list:\nred, blue\nand more"\n', ["a list: red, blue and more"]),
        ('text,path\n"a list, red\nblue",u1\n', ["a list, red blue"]),
    ],
)
def test_lines_of_a_csv_cell_are_not_taken_for_rows_without_extensions(tmp_path, table, texts):
    (tmp_path / "metadata.csv").write_text(table)
    found = list(read_folder(tmp_path))
    assert [(utterance.text, utterance.problem) for utterance in found] == [
        (text, None) for text in texts
    ]


def test_a_stray_quotation_mark_rejects_one_row_without_extensions(tmp_path):
    rows = [f"utt{i},two" for i in range(2, 300)]
    table = ["path,text", 'utt1,"one', *rows, 'utt300,three"']
    (tmp_path / "metadata.csv").write_text("\n".join(table))
    found = problems(read_folder(tmp_path))
    assert found[0][0] == "bad_row"
    assert found[1:] == [None] * 299


def test_a_csv_cell_may_have_as_many_lines_as_fit_into_a_transcript(tmp_path):
    lines = ["a"] * 4999
    table = 'path,text,lang\nu1,"{}",en\nu2,b,en\n'
    (tmp_path / "metadata.csv").write_text(table.format("\n".join(lines)))
    first, second = read_folder(tmp_path)
    assert first.problem is second.problem is None
    assert first.text == " ".join(lines)
    (tmp_path / "metadata.csv").write_text(table.format("\n".join(lines * 2)))
    reason, detail = next(read_folder(tmp_path)).problem
    assert reason == "bad_row"
    assert re.search(r"line 2 .* 10000 bytes", detail)


@pytest.mark.parametrize(
    "table",
    [
        "path,text,notes,notes\nx.wav,one,a,b\n",
        "path,text,Path\nx.wav,one,y.wav\n",
        "Text,path,text\ntwo,x.wav,one\n",
        "path,text,,\nx.wav,one,,\n",
    ],
)
def test_repeated_columns_that_are_not_used_are_ignored(tmp_path, table):
    (tmp_path / "metadata.csv").write_text(table)
    (utterance,) = read_folder(tmp_path)
    assert utterance.problem is None
    assert (utterance.file.name, utterance.text) == ("x.wav", "one")


def test_a_stray_quotation_mark_before_the_audio_column_rejects_one_row(tmp_path):
    (tmp_path / "metadata.csv").write_text('text,path\n"one,x1.wav\ntwo",x2.wav\nthree,x3.wav\n')
    found = list(read_folder(tmp_path))
    assert [utterance.problem is None for utterance in found] == [False, True, True]
    assert found[0].problem[0] == "bad_row"


def test_many_rows_after_a_stray_quotation_mark_are_all_read(tmp_path):
    rows = [f"u{i}.wav,two one" for i in range(2, 299)]
    table = ["path,text", 'u1.wav,"hello', *rows, 'u299.wav,"a, b"', "u300.wav,three"]
    (tmp_path / "metadata.csv").write_text("\n".join(table))
    found = problems(read_folder(tmp_path))
    assert len(found) == 300
    assert found[0][0] == "bad_row"
    assert found[1:] == [None] * 299


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "path,text\na.wav,he\0llo\nb.wav,two\n"),
        ("metadata.tsv", "path\ttext\na.wav\the\0llo\nb.wav\ttwo\n"),
        (
            "metadata.jsonl",
            '{"path": "a.wav", "text": "he\\u0000llo"}\n{"path": "b.wav", "text": "two"}\n',
        ),
        (
            "metadata.jsonl",
            '{"path": "a.wav", "text": "x", "prompt": "\\u0000"}\n'
            '{"path": "b.wav", "text": "two"}\n',
        ),
    ],
)
def test_a_nul_in_a_text_rejects_its_utterance(tmp_path, name, content):
    audio(tmp_path / "d", "a.wav", "b.wav")
    (tmp_path / "d" / name).write_text(content)
    samples, rejected = shards(tmp_path, read_folder(tmp_path / "d"))
    assert samples == {"b": about("two")}
    assert rejected == [("a", "broken_text")]


def test_a_tsv_has_no_quotes(tmp_path):
    (tmp_path / "metadata.tsv").write_text('path\ttext\nx.wav\t"one\ny.wav\ttwo\nz.wav\tthree"\n')
    found = list(read_folder(tmp_path))
    assert [utterance.text for utterance in found] == ['"one', "two", 'three"']


def test_csv_cells_may_have_line_breaks_and_byte_order_marks(tmp_path):
    audio(tmp_path / "d", "a.wav", "b.wav")
    table = '\ufeff"file_name","text"\r\na.wav,"one\r\n\r\n two, ""three"""\r\n\r\nb.wav,four\r\n'
    (tmp_path / "d" / "metadata.csv").write_bytes(table.encode())
    samples, rejected = shards(tmp_path, read_folder(tmp_path / "d"))
    assert samples == {"a": about('one two, "three"'), "b": about("four")}
    assert rejected == []


def test_audiofolder_jsonl_becomes_shards(tmp_path):
    """Hugging Face's datasets expect file_name, and any other columns."""
    audio(tmp_path / "d", "data/a.wav", "data/b.wav")
    path = tmp_path / "d" / "metadata.jsonl"
    rows = [
        {"file_name": "data/a.wav", "transcription": "one", "speaker_id": "s"},
        {"file_name": "data/b.wav", "transcription": 2},
    ]
    lines(
        path, *rows, {"file_name": "data/a.wav"}, {"file_name": "data/c.wav", "transcription": "x"}
    )
    assert SOURCES["folder"].count(tmp_path / "d") == 4
    samples, rejected = shards(tmp_path, read_folder(tmp_path / "d"))
    assert samples == {"data/a": about("one", speaker="s"), "data/b": about("2")}
    assert rejected == [("metadata.jsonl:3", "missing_field"), ("data/c", "missing_audio")]


def test_audio_of_a_table_may_be_an_object_with_a_path(tmp_path):
    """Hugging Face's datasets write their audio columns so."""
    audio(tmp_path / "d", "data/a.wav")
    lines(
        tmp_path / "d" / "metadata.jsonl",
        {"audio": {"path": "data/a.wav", "bytes": None}, "text": "one"},
        {"audio": {"path": None, "bytes": None}, "text": "two"},
        {"audio": {"array": [0.0]}, "text": "three"},
    )
    samples, rejected = shards(tmp_path, read_folder(tmp_path / "d"))
    assert samples == {"data/a": about("one")}
    assert rejected == [
        ("metadata.jsonl:2", "missing_audio"),
        ("metadata.jsonl:3", "bad_field"),
    ]


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("metadata.csv", "file_name,text\nhttps://host/a.wav,one\n"),
        ("metadata.jsonl", '{"file_name": "https://host/a.wav", "text": "one"}\n'),
    ],
)
def test_url_of_a_table_is_rejected_unchanged(tmp_path, name, table):
    (tmp_path / name).write_text(table)
    ((reason, detail),) = problems(read_folder(tmp_path))
    assert reason == "missing_audio"
    assert "'https://host/a.wav'" in detail


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("path,text\na.wav,a\nb\0.wav,b\n", "missing_audio"),
        ("a|a\nb\0|b\n", "missing_audio"),
        ("a|a\nb|b\rc|c\n", "bad_row"),
        ("path,text\na.wav,a\nb.wav,b\rc.wav,c\n", "bad_row"),
        ("a|a\nb.mp3|b\n", "missing_audio"),
    ],
)
def test_bad_row_of_a_table_is_rejected_alone(tmp_path, table, reason):
    audio(tmp_path, "a.wav")
    (tmp_path / "metadata.csv").write_text(table, newline="")
    samples, rejects = shards(tmp_path, read_folder(tmp_path))
    assert list(samples) == ["a"]
    assert [reason for _, reason in rejects] == [reason]


def test_odd_rows_do_not_hide_where_paths_start(tmp_path, monkeypatch):
    audio(tmp_path, "here/a.wav", "absolute.wav")
    monkeypatch.chdir(tmp_path / "here")
    names = [".", "", str(tmp_path / "absolute.wav"), "a.wav"]
    (tmp_path / "elsewhere").mkdir()
    rows = [{"audio_filepath": name, "text": "a"} for name in names]
    manifest = lines(tmp_path / "elsewhere" / "m.jsonl", *rows)
    assert list(read_nemo(manifest))[-1].file == tmp_path / "here" / "a.wav"


@pytest.mark.parametrize(
    ("layout", "hint"),
    [
        ('{"audio": "a.wav", "text": "a"}\r{"audio": "b.wav", "text": "b"}\r', "carriage return"),
        ('{\n "audio": "a.wav",\n "text": "a"\n}\n', "jq -c"),
        ('{"audio": "a.wav", "text": "a", "audio": "b.wav"}\n', "'audio' occurs twice"),
    ],
)
def test_json_that_is_not_one_object_a_line_is_explained(tmp_path, layout, hint):
    (tmp_path / "metadata.jsonl").write_text(layout, newline="")
    (reason, detail), *_ = problems(read_folder(tmp_path))
    assert reason == "bad_json"
    assert hint in detail


def test_empty_json_list_is_reported(tmp_path):
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(UserError, match=r"data\.json' .*no utterance"):
        list(read_slam(tmp_path / "data.json"))


def test_an_empty_folder_is_reported(tmp_path):
    with pytest.raises(
        UserError,
        match=r"metadata\.csv.*metadata\.tsv.*metadata\.jsonl.*wav.*--table",
    ):
        list(read_folder(tmp_path))


# --- chats ---


def test_slam_manifest_becomes_shards(tmp_path):
    audio(tmp_path, "a.wav", "b.wav")
    path = lines(
        tmp_path / "data.jsonl",
        {"key": "A", "source": "a.wav", "target": "one", "prompt": "Write.", "task": "asr"},
        {"key": "B", "source": str(tmp_path / "b.wav"), "target": "two"},
    )
    assert shards(tmp_path, read_slam(path)) == (
        {"A": about("one", prompt="Write.", task="asr"), "B": about("two")},
        [],
    )


def chat(*turns, audios=("a.wav",), names=("messages", "role", "content"), **more):
    return {
        names[0]: [{names[1]: role, names[2]: text} for role, text in turns],
        "audios": list(audios),
    } | more


def test_chat_manifest_becomes_shards(tmp_path):
    audio(tmp_path, "a.wav")
    path = lines(
        tmp_path / "data.jsonl",
        chat(("user", "<audio>Write."), ("assistant", "one"), id="m"),
        chat(("system", "Be kind."), ("user", "<audio>"), ("assistant", "two")),
        chat(
            ("human", "Write: <audio>"), ("gpt", "three"), names=("conversations", "from", "value")
        ),
        {"query": "<audio>Say", "response": "four", "audios": [{"path": "a.wav"}]},
        chat(("user", "x"), ("assistant", "y"), ("user", "x"), ("assistant", "y"), id="turns"),
        chat(("assistant", "y"), ("user", "x"), id="order"),
        chat(("user", "x"), ("assistant", "y"), audios=["a.wav", "a.wav"], id="audios"),
        chat(("user", "x"), ("assistant", "y"), audios=[]),
    )
    samples, rejected = shards(tmp_path, read_swift(path))
    assert sorted(map(json.dumps, samples.values())) == sorted(
        map(
            json.dumps,
            [
                about("one", prompt="Write."),
                about("two"),
                about("three", prompt="Write:"),
                about("four", prompt="Say"),
            ],
        )
    )
    assert {"m", "a"} < samples.keys()
    keys = [
        ("turns", "not_one_turn"),
        ("order", "not_one_turn"),
        ("audios", "not_one_audio"),
        ("data.jsonl:8", "not_one_audio"),
    ]
    assert rejected == keys


def test_a_chat_manifest_may_be_a_json_list(tmp_path):
    audio(tmp_path, "a.wav")
    path = tmp_path / "data.json"
    path.write_text(json.dumps([chat(("user", "<audio>"), ("assistant", "one"))], indent=2))
    assert SOURCES["swift"].count(path) is None
    (utterance,) = read_swift(path)
    assert (utterance.key, utterance.text, utterance.fields, utterance.file) == (
        "a",
        "one",
        {},
        tmp_path / "a.wav",
    )
    np.testing.assert_allclose(utterance.load()[0], tone("one", 0.5), atol=1e-4)
    path.write_text("[1]")
    ((reason, detail),) = problems(read_swift(path))
    assert reason == "bad_json"
    assert "data.json, entry 1 " in detail
    path.write_text("[{")
    with pytest.raises(UserError, match=r"data\.json:1:3 "):
        list(read_swift(path))


ROW = '{{"audio_filepath": "{0}.wav", "text": "{0}"}}'


@pytest.mark.parametrize(
    "bad",
    ['{"audio_filepath": "b.wav", "text": "b"', '{"audio_filepath": "b.wav" "text": 1}', "{b}"],
)
@pytest.mark.parametrize("begin", ["[", "[\n", "\n[\n\n"])
def test_bad_line_of_a_json_list_is_rejected_alone(tmp_path, bad, begin):
    path = tmp_path / "list.json"
    path.write_text(f"{begin}{ROW.format('a')},\n{bad},\n{ROW.format('c')}\n]\n")
    first, second, third = SOURCES["nemo"].read(path)
    assert [first.text, third.text] == ["a", "c"]
    assert second.problem[0] == "bad_json"
    first_line = begin.count("\n") + 2
    assert any(f"{path}:{number}:" in second.problem[1] for number in (first_line, first_line + 1))


@pytest.mark.parametrize("text", [ROW.format("a"), f"{ROW.format('a')},\n{{"])
def test_json_list_without_its_end_is_reported(tmp_path, text):
    path = tmp_path / "list.json"
    path.write_text(f"[{text}\n")
    with pytest.raises(UserError, match=r"list\.json:\d+:\d+"):
        list(SOURCES["nemo"].read(path))


def test_syntax_error_in_an_indented_json_list_has_its_line_and_column(tmp_path):
    path = tmp_path / "list.json"
    path.write_text('[\n\n  {\n    "audio_filepath": "a.wav",\n    "text" "a"\n  }\n]\n')
    ((reason, detail),) = problems(SOURCES["nemo"].read(path))
    assert reason == "bad_json"
    assert f"{path}:5:12 " in detail


# damages of the second of three objects; each contains objects and lists of its own
DAMAGES = [
    ('"b": [', '"b" ['),
    ('"x"}', '"x"'),
    ('{"audio_filepath": "b.wav"', '{"audio_filepath": "b.wav'),
    ('{"audio_filepath": "b.wav"', '"audio_filepath": "b.wav"'),
    ("]}", "]}}"),
    ("]}", "]}]"),
    ("]}", "}"),
    ("]}", ""),
    ('"x"', "x"),
    ('"x"', "9" * 5000),
    ('"x"', "[" * 100_000),
]


@pytest.mark.parametrize(("old", "new"), DAMAGES)
@pytest.mark.parametrize("indent", [None, 1])
def test_damage_in_a_json_list_costs_one_entry_in_any_layout(tmp_path, old, new, indent):
    rows = [{"audio_filepath": f"{name}.wav", "text": name} for name in "abc"]
    rows[1]["b"] = [{"audio_filepath": "x"}, 1]
    text = json.dumps(rows)
    assert text.count(old) == 1
    text = text.replace(old, new)
    if indent is not None:
        text = text.replace("{", "\n{\n").replace(", ", ",\n ")
    path = tmp_path / "list.json"
    path.write_text(text)
    first, second, third = SOURCES["nemo"].read(path)
    assert [first.text, third.text] == ["a", "c"]
    assert second.problem[0] == "bad_json"


@pytest.mark.parametrize("damaged", [0, 1, 4])
@pytest.mark.parametrize(("old", "new"), DAMAGES)
def test_damage_in_a_json_list_costs_no_row_with_fewer_fields(tmp_path, old, new, damaged):
    rows = [{"audio_filepath": f"{name}.wav", "text": name, "lang": "en"} for name in "aabcd"]
    del rows[1]["lang"], rows[3]["lang"]
    rows[damaged] |= {"audio_filepath": "b.wav", "text": "lost"}
    rows[damaged]["b"] = [{"audio_filepath": "x"}, 1]
    parts = [json.dumps(row) for row in rows]
    assert parts[damaged].count(old) == 1
    parts[damaged] = parts[damaged].replace(old, new)
    path = tmp_path / "list.json"
    path.write_text(f"[{', '.join(parts)}]")
    utterances = list(SOURCES["nemo"].read(path))
    expected = [row["text"] for row in rows if row is not rows[damaged]]
    assert [utterance.text for utterance in utterances if not utterance.problem] == expected
    assert len(utterances) == len(rows)


@pytest.mark.parametrize(
    "first",
    [
        # parts of the entry are valid entries, with fields that the others do not have
        '{"messages": "user", "content": "a"}, {"role": "x", "content": "y"}], "audios": ["a"]}',
        # the entry is valid without its end, and has more fields than the others
        '{"messages": [], "audios": ["a"], "lang": "en", "speaker": "x", "task": "y"}, "n": 1}',
        # two entries are merged
        '{"messages": [], "audios": ["a"], "messages": [], "audios": ["b"]}',
    ],
)
def test_damaged_first_entry_of_a_json_list_costs_no_other(tmp_path, first):
    rows = []
    for name in "bcd":
        messages = [{"role": "user", "content": "<audio>"}, {"role": "assistant", "content": name}]
        rows.append(json.dumps({"messages": messages, "audios": [f"{name}.wav"], "x": 1}))
    path = tmp_path / "list.json"
    path.write_text(f"[{', '.join([first, *rows])}]")
    *bad, b, c, d = SOURCES["swift"].read(path)
    assert [b.text, c.text, d.text] == ["b", "c", "d"]
    assert "bad_json" in [utterance.problem[0] for utterance in bad]


def test_damage_costs_one_entry_of_a_json_list_without_common_fields(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(f'[{ROW.format("a")}, {{"x": 1}}, {{"x" 1}}, {ROW.format("d")}]')
    utterances = list(SOURCES["nemo"].read(path))
    assert [u.problem and u.problem[0] for u in utterances] == [
        None,
        "missing_field",
        "bad_json",
        None,
    ]


def test_syntax_error_in_a_json_list_names_where_reading_resumes(tmp_path):
    path = tmp_path / "list.json"
    rows = [ROW.format(name) for name in "abc"]
    rows[1] = rows[1].replace(":", "")
    path.write_text("[\n" + ",\n".join(rows) + "\n]\n")
    _, damaged, _ = SOURCES["nemo"].read(path)
    assert f"{path}:3:" in damaged.problem[1]
    assert f"{path}:4:1 " in damaged.problem[1]


def test_json_list_with_many_syntax_errors_is_reported_at_once(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(f"[{'{x},' * 500_000}{ROW.format('a')}]")
    with pytest.raises(UserError, match="list"):
        list(SOURCES["nemo"].read(path))
    path.write_text("[x" + '{"a":' * 500_000 + "]")
    with pytest.raises(UserError, match="list"):
        list(SOURCES["nemo"].read(path))
