import numpy as np
import pytest
import soundfile
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

from asrllm.data.sources import read_cuts, read_kaldi
from asrllm.errors import UserError
from asrllm.testing import kaldi_directory, tone, tone_sentences


def test_kaldi_segments_are_cut_out_of_recordings(tmp_path):
    kaldi = kaldi_directory(tmp_path / "k", [("one two", np.concatenate([tone("one", 1.0), tone("two", 1.0)]))])
    (kaldi / "segments").write_text("a utt0000 0.0 1.0\nb utt0000 1.0 1.75\n")
    (kaldi / "text").write_text("a one\nb two\n")
    (kaldi / "utt2spk").write_text("a s\nb s\n")
    a, b = read_kaldi(kaldi)
    assert (a.key, a.text, a.duration, a.fields) == ("a", "one", 1.0, {"speaker": "s"})
    wave, rate = b.load()
    assert (rate, len(wave)) == (16000, 12000)
    np.testing.assert_allclose(wave, tone("two", 0.75), atol=1e-4)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("wav.scp", None, r"the file wav\.scp is missing"),
        ("wav.scp", "", "is empty"),
        ("text", "\n", "is empty"),
        ("wav.scp", "utt0000 cat x.wav |\n", "is a pipe"),
        ("segments", "a other 0 1\n", "names the recording 'other'"),
        ("segments", "a utt0000 0\n", "is not 'utterance recording start end'"),
        ("text", "utt0000 one\nutt0000 two\n", "names 1 keys more than once"),
    ],
)
def test_a_broken_kaldi_directory_is_one_sentence(tmp_path, file, content, message):
    kaldi = kaldi_directory(tmp_path / "k", tone_sentences(2))
    (kaldi / file).unlink(missing_ok=True)
    if content is not None:
        (kaldi / file).write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_kaldi(kaldi))


def test_a_transcript_without_audio_is_not_dropped_in_silence(tmp_path):
    kaldi = kaldi_directory(tmp_path / "k", tone_sentences(1))
    (kaldi / "text").write_text("utt0000 one\nlost two\n")
    _, lost = read_kaldi(kaldi)
    assert lost.key == "lost"
    with pytest.raises(FileNotFoundError, match="lacks"):
        lost.load()


def test_a_broken_cuts_manifest_is_one_sentence(tmp_path):
    (tmp_path / "cuts.jsonl").write_text('{"id": ')
    with pytest.raises(UserError, match="cannot be read: JSONDecodeError"):
        list(read_cuts(tmp_path / "cuts.jsonl"))


def write_cuts(folder, name="cuts.jsonl.gz"):
    folder.mkdir(exist_ok=True)
    soundfile.write(folder / "r.wav", np.concatenate([tone("one", 1.0), tone("two", 0.5)]), 16000)
    recording = Recording.from_file(folder / "r.wav")

    def supervision(key, start, duration, text):
        return SupervisionSegment(key, recording.id, start, duration, text=text, language="en", speaker="s")

    whole = MonoCut("long", 0, 1.5, 0, [supervision("x", 0, 1.0, "one"), supervision("y", 1.0, 0.5, "two")], recording=recording)
    single = MonoCut("short", 1.0, 0.5, 0, [supervision("z", 0, 0.5, "two")], recording=recording)
    CutSet.from_cuts([whole, single]).to_file(folder / name)
    return folder / name


def test_a_cut_of_several_supervisions_gives_one_utterance_each(tmp_path):
    utterances = list(read_cuts(write_cuts(tmp_path)))
    assert [(u.key, u.text, u.duration, u.fields) for u in utterances] == [
        ("x", "one", 1.0, {"speaker": "s", "lang": "en"}),
        ("y", "two", 0.5, {"speaker": "s", "lang": "en"}),
        ("short", "two", 0.5, {"speaker": "s", "lang": "en"}),
    ]
    for u in utterances[1:]:
        wave, rate = u.load()
        np.testing.assert_allclose(wave, tone("two", 0.5), atol=1e-4)
        assert rate == 16000


def test_missing_and_empty_manifests_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        list(read_cuts(tmp_path / "no.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty"):
        list(read_cuts(tmp_path / "empty.jsonl"))
