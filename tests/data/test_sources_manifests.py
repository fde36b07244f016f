"""Manifests of other toolkits: every form is written as its users write it, made into shards and read back."""

import json
import tarfile

import numpy as np
import pytest
import soundfile

from asrllm.data.index import scan_tar
from asrllm.data.shards import write_shards
from asrllm.data.sources import SOURCES, read_folder, read_nemo, read_slam, read_swift, read_wenet
from asrllm.errors import UserError
from asrllm.testing import tone


def audio(folder, *names, seconds=0.5):
    """Files of a tone each."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, tone("one", seconds), 16000)


def lines(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def shards(folder, utterances):
    """({key: fields}, [(key, reason)]) of the shards made from them."""
    write_shards(folder / "out", utterances, utterances_per_shard=2)
    samples = [s for path in sorted((folder / "out").glob("*.tar")) for s in scan_tar(path)]
    rows = [json.loads(line) for line in (folder / "out" / "rejected.jsonl").read_text().splitlines()]
    return {s.key: s.fields for s in samples}, [(row["key"], row["reason"]) for row in rows]


def about(text, seconds=0.5, **more):
    return {"text": text, "duration": seconds, "sampling_rate": 16000} | more


# --- NeMo ---


def test_nemo(tmp_path):
    audio(tmp_path, "wav/a.wav", "wav/b.flac", "wav/d.wav")
    path = lines(
        tmp_path / "manifest.json",
        {"audio_filepath": "wav/a.wav", "duration": 0.5, "text": "one", "lang": "en", "speaker": "s", "hotwords": "one, two"},
        {"audio_filepath": str(tmp_path / "wav/b.flac"), "duration": 0.2, "offset": 0.1, "text": "two"},
        {"audio_filepath": "wav/c.wav", "duration": 0.5, "text": "three"},
        {"audio_filepath": "../" + tmp_path.name + "/wav/d.wav", "duration": 3, "text": "four"},
    )
    assert SOURCES["nemo"].count(path) == 4
    b = f"{tmp_path}/wav/b-100".lstrip("/").replace(".", "_")
    d = f"{tmp_path.name}/wav/d"
    assert shards(tmp_path, read_nemo(path)) == (
        {"wav/a": about("one", lang="en", speaker="s", hotwords=["one", "two"]), b: about("two", 0.2)},
        [("wav/c", "missing_audio"), (d, "duration_mismatch")],
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"duration": 1, "text": "x"}', r"m\.json:1 has no 'audio_filepath'; it has: duration, text"),
        ('{"audio_filepath": "a.wav", "duration": 1}', r"m\.json:1 has no 'text'"),
        ('{"audio_filepath": "a.wav", "text": 3}', r"m\.json:1: 'text' is 3, which is not a text"),
        ('{"audio_filepath": "a.wav", "text": "x", "duration": "long"}', r"'duration' is 'long', which is not a number"),
        ('{"audio_filepath": "a.wav", "text": "x"}\n{"audio_filepath": "a.wav", "text": ', r"m\.json:2 is not valid JSON"),
        ('"x"', r"m\.json:1 is not a JSON object"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_a_broken_manifest_is_one_sentence_naming_its_line(tmp_path, content, message):
    (tmp_path / "m.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        list(read_nemo(tmp_path / "m.json"))


def test_paths_may_start_at_the_current_directory(tmp_path, monkeypatch):
    audio(tmp_path, "wav/a.wav")
    (tmp_path / "data").mkdir()
    path = lines(tmp_path / "data" / "m.json", {"audio_filepath": "wav/a.wav", "text": "one"})
    monkeypatch.chdir(tmp_path)
    (utterance,) = read_nemo(path)
    assert utterance.file == tmp_path / "wav/a.wav"


# --- wenet ---


def test_wenet_raw(tmp_path):
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


def wenet_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for member in members:
            tar.add(member, member.name)


def test_wenet_shards(tmp_path):
    for key in ("a.1", "b", "c", "d"):
        audio(tmp_path / "t", f"{key}.wav")
        (tmp_path / "t" / f"{key}.txt").write_text(f"text of {key}\n")
    (tmp_path / "t" / "d.txt").write_bytes(b"\xff")
    wenet_tar(tmp_path / "0.tar", [tmp_path / "t" / name for name in ("a.1.txt", "a.1.wav", "b.wav", "b.txt")])
    wenet_tar(tmp_path / "1.tar", [tmp_path / "t" / name for name in ("a.1.txt", "b.wav", "c.txt", "c.wav", "d.txt", "d.wav")])
    (tmp_path / "data.list").write_text(f"{tmp_path}/0.tar\n1.tar\n")
    samples, rejected = shards(tmp_path, read_wenet(tmp_path / "data.list"))
    assert samples == {key: about(f"text of {key.replace('_', '.')}") for key in ("a_1", "b", "c")}
    assert rejected == [("a.1", "missing_audio"), ("b", "no_transcript"), ("d", "no_transcript")]


def test_a_broken_wenet_list_is_one_sentence(tmp_path):
    path = tmp_path / "data.list"
    path.write_text("no.tar\n")
    with pytest.raises(UserError, match=r"data\.list:1 names 'no\.tar', which is no file"):
        list(read_wenet(path))
    (tmp_path / "no.tar").write_bytes(b"x" * 600)
    with pytest.raises(UserError, match=r"data\.list:1: .*no\.tar' cannot be read as a tar"):
        list(read_wenet(path))


# --- folders ---


def test_a_folder_of_texts_beside_the_audio(tmp_path):
    audio(tmp_path / "d", "b.flac", "sub.1/a.WAV", "c.wav")
    (tmp_path / "d" / "b.txt").write_text("b\n")
    (tmp_path / "d" / "sub.1" / "a.txt").write_text("\ufeffa")
    assert SOURCES["folder"].count(tmp_path / "d") == 3
    samples, rejected = shards(tmp_path, read_folder(tmp_path / "d"))
    assert samples == {"b": about("b"), "sub_1/a": about("a")}
    assert rejected == [("c", "no_transcript")]


@pytest.mark.parametrize(
    ("name", "where", "table", "more"),
    [
        ("train.tsv", "clips/", 'client_id\tpath\tsentence\tlocale\nS\ta.wav\t"quoted\ten\nS\tb.wav\ttwo\ten\n', True),  # Common Voice
        ("metadata.csv", "", 'file_name,transcription,Speaker_ID,lang\na.wav,"""quoted",S,en\nb.wav,two,S,en\n', True),  # audiofolder
        ("metadata.csv", "wavs/", 'a|ONE|"quoted\nb|two|two\n', False),  # LJSpeech
        ("metadata.tsv", "x/", 'audio\tlabel\tspeaker\tlanguage\nx/a.wav\t"quoted\tS\ten\nx/b.wav\ttwo\tS\ten\n', True),
        ("list.csv", "", 'audio_file|text|speaker_name|lang\na.wav|"quoted|S|en\nb.wav|two|S|en\n', True),  # Coqui
    ],
)
def test_a_folder_with_a_table(tmp_path, name, where, table, more):
    audio(tmp_path / "d", f"{where}a.wav", f"{where}b.wav")
    (tmp_path / "d" / name).write_text(table)
    given = None if name.startswith("metadata") else tmp_path / "d" / name
    samples, rejected = shards(tmp_path, read_folder(tmp_path / "d", table=given))
    fields = {"speaker": "S", "lang": "en"} if more else {}
    prefix = "x/" if where == "x/" else ""
    assert samples == {f"{prefix}a": about('"quoted', **fields), f"{prefix}b": about("two", **fields)}
    assert rejected == []


def test_audio_that_the_table_names_and_the_disk_lacks_is_rejected(tmp_path):
    audio(tmp_path / "d", "clips/b.wav")
    (tmp_path / "d" / "metadata.csv").write_text("path,sentence,duration\na.wav,one,0.5\nb.wav,two,0.5\n")
    assert SOURCES["folder"].count(tmp_path / "d") == 2
    samples, rejected = shards(tmp_path, read_folder(tmp_path / "d"))
    assert samples == {"b": about("two")}
    assert rejected == [("a", "missing_audio")]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("name,text\nx,y\n", r"has the columns name, text, and none for the audio: call it file_name, path, .* or wav$"),
        ("path,words\nx,y\n", r"has the columns path, words, and none for the text: call it text, sentence"),
        ("path,text\nx\n", "row 2 has 1 cells, its header has 2 columns: path, text"),
        ("path,text,duration\nx.wav,y,?\n", r"row 2: 'duration' is '\?'"),
        ("a|b\nc\n", r"metadata\.csv:2 is not 'id\|text'"),
        ("", "is empty"),
    ],
)
def test_a_broken_table_is_one_sentence(tmp_path, table, message):
    (tmp_path / "metadata.csv").write_text(table)
    with pytest.raises(UserError, match=message):
        list(read_folder(tmp_path))


def test_an_empty_folder_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"neither metadata\.csv nor metadata\.tsv nor an audio file"):
        list(read_folder(tmp_path))


# --- chats ---


def test_slam(tmp_path):
    audio(tmp_path, "a.wav", "b.wav")
    path = lines(
        tmp_path / "data.jsonl",
        {"key": "A", "source": "a.wav", "target": "one", "prompt": "Write.", "task": "asr"},
        {"key": "B", "source": str(tmp_path / "b.wav"), "target": "two"},
    )
    assert shards(tmp_path, read_slam(path)) == ({"A": about("one", prompt="Write.", task="asr"), "B": about("two")}, [])


def chat(*turns, audios=("a.wav",), names=("messages", "role", "content"), **more):
    return {names[0]: [{names[1]: role, names[2]: text} for role, text in turns], "audios": list(audios)} | more


def test_swift(tmp_path):
    audio(tmp_path, "a.wav")
    path = lines(
        tmp_path / "data.jsonl",
        chat(("user", "<audio>Write."), ("assistant", "one"), id="m"),
        chat(("system", "Be kind."), ("user", "<audio>"), ("assistant", "two")),
        chat(("human", "Write: <audio>"), ("gpt", "three"), names=("conversations", "from", "value")),
        {"query": "<audio>Say", "response": "four", "audios": ["a.wav"]},
        chat(("user", "x"), ("assistant", "y"), ("user", "x"), ("assistant", "y"), id="turns"),
        chat(("assistant", "y"), ("user", "x"), id="order"),
        chat(("user", "x"), ("assistant", "y"), audios=["a.wav", "a.wav"], id="audios"),
        chat(("user", "x"), ("assistant", "y"), audios=[]),
    )
    samples, rejected = shards(tmp_path, read_swift(path))
    assert sorted(map(json.dumps, samples.values())) == sorted(
        map(json.dumps, [about("one", prompt="Write."), about("two"), about("three", prompt="Write:"), about("four", prompt="Say")])
    )
    assert {"m", "a"} < samples.keys()
    keys = [("turns", "not_one_turn"), ("order", "not_one_turn"), ("audios", "not_one_audio"), ("data.jsonl:8", "not_one_audio")]
    assert rejected == keys


def test_swift_as_one_json_list(tmp_path):
    audio(tmp_path, "a.wav")
    path = tmp_path / "data.json"
    path.write_text(json.dumps([chat(("user", "<audio>"), ("assistant", "one"))], indent=2))
    assert SOURCES["swift"].count(path) is None
    (utterance,) = read_swift(path)
    assert (utterance.key, utterance.text, utterance.fields, utterance.file) == ("a", "one", {}, tmp_path / "a.wav")
    np.testing.assert_allclose(utterance.load()[0], tone("one", 0.5), atol=1e-4)
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"data\.json, entry 1 is not a JSON object"):
        list(read_swift(path))
    path.write_text("[{")
    with pytest.raises(UserError, match=r"data\.json is not valid JSON"):
        list(read_swift(path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r":1 has neither 'messages' nor 'conversations' nor 'query'; it has: text"),
        ({"query": "x"}, "has no 'response'"),
        ({"messages": ["x"]}, "'messages' is not a list of objects"),
        ({"messages": [{"content": "x"}]}, "has no 'role' or 'from'"),
        ({"query": "x", "response": "y", "audios": [1]}, r"'audios' is \[1\], which is not a list of paths"),
    ],
)
def test_a_broken_chat_is_one_sentence(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        list(read_swift(lines(tmp_path / "data.jsonl", row)))
