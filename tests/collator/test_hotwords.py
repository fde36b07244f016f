import re
from dataclasses import replace

import numpy as np
import pytest

from asrllm.collator.hotwords import HotwordConfig, Hotwords
from asrllm.errors import UserError
from asrllm.schema import build

CONFIG = HotwordConfig(
    file=None, prob=1.0, max_words=20, distractor_rate=0.0, template="Hotwords: {words}."
)
AUDIO = "<|AUDIO|>"


def hotwords(folder, words=(), seed=1, **changes):
    if words:
        (folder / "words.txt").write_text("\n".join(words), encoding="utf-8")
        changes["file"] = str(folder / "words.txt")
    return Hotwords(replace(CONFIG, **changes), seed=seed, forbidden=AUDIO)


def listed(context):
    return context.removeprefix("Hotwords: ").removesuffix(".").split(", ") if context else []


def lists(made, text, count=300, dealt=0, **more):
    return [listed(made.context(text, key=str(i), pass_index=dealt, **more)) for i in range(count)]


@pytest.mark.parametrize(
    ("phrase", "text", "found"),
    [
        ("New York", "We love NEW YORK.", True),
        ("new  york", "New York, new life", True),
        ("york", "New Yorker", False),
        ("art", "the start of it", False),
        ("new york", "new, york", False),
        ("Straße", "die STRASSE", True),
        ("北京", "我在北京大学", True),
        ("北京", "我在 北 京 大学", True),
        ("京北", "我在北京大学", False),
        ("ＡＳＲ", "我用ASR模型", True),
        ("東京タワー", "これは東京タワーです", True),
        ("서울", "나는 서울에서 왔다", True),
        ("กรุงเทพ", "ไปกรุงเทพครับ", True),
        ("हिन्दी", "मैं हिन्दी बोलता हूँ", True),
        ("हिन", "मैं हिन्दी बोलता हूँ", False),
        ("C++", "I write C++.", True),
        ("C", "I write Cobol.", False),
        ("AT&T", "call at&t now", True),
        ("don", "I don't know", False),
        ("don’t", "I don't know", True),
        ("McDonald", "at McDonald’s", True),
        ("McDonald's", "at mcdonald's", True),
        ("O'Neil", "Mr O'Neil's car", True),
    ],
)
def test_hotwords_match_whole_words_in_any_case(tmp_path, phrase, text, found):
    assert lists(hotwords(tmp_path, [phrase]), text, 1) == [[phrase] if found else []]


def test_index_finds_the_same_hotwords_as_a_plain_search(tmp_path):
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(12)]
    phrases = sorted({" ".join(rng.choice(vocabulary, rng.integers(1, 5))) for _ in range(80)})
    made = hotwords(tmp_path, phrases, max_words=1000)
    for key in range(50):
        text = " ".join(rng.choice(vocabulary, 30))
        expected = [phrase for phrase in phrases if re.search(rf"\b{phrase}\b", text)]
        assert sorted(listed(made.context(text, key=str(key), pass_index=0))) == expected


def test_lists_keep_the_spelling_of_the_file(tmp_path):
    made = hotwords(
        tmp_path,
        ["iPhone", " New York ", "", "IPHONE", "other"],
        template="Maybe: {words} {or not}",
    )
    contexts = {made.context("an iphone in new york", key=str(i), pass_index=0) for i in range(30)}
    assert contexts == {"Maybe: iPhone, New York {or not}", "Maybe: New York, iPhone {or not}"}
    assert made.context("nothing of it", key="k", pass_index=0) == ""


def test_lists_are_given_with_their_probability(tmp_path):
    made = hotwords(tmp_path, ["one", "two"], prob=0.3)
    assert 240 < sum(map(bool, lists(made, "one two", 1000))) < 360
    assert not any(lists(hotwords(tmp_path, ["one"], prob=0.0), "one"))


@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_distractors_have_their_rate_and_are_not_in_the_transcript(tmp_path, rate):
    made = hotwords(tmp_path, [f"w{i}" for i in range(500)], distractor_rate=rate, max_words=100)
    everything = lists(made, "w3 and w7", 1500)
    places = [word in ("w3", "w7") for words in everything for word in words]
    assert 1 - np.mean(places) == pytest.approx(rate, abs=0.03)
    assert all(len(set(words)) == len(words) <= 100 for words in everything)
    assert all({"w3", "w7"} <= set(words) for words in everything)


def test_list_without_true_hotwords_has_distractors_only_and_the_same_length(tmp_path):
    made = hotwords(tmp_path, [f"w{i}" for i in range(500)], distractor_rate=0.7, max_words=30)
    none, one = lists(made, "nothing", 1500), lists(made, "only w3", 1500)
    assert all(none)
    assert [len(words) for words in none] == [len(words) for words in one]  # the same draws
    assert not any(lists(hotwords(tmp_path, ["one"], distractor_rate=0.0), "nothing"))


def test_position_in_the_list_does_not_reveal_true_hotwords(tmp_path):
    made = hotwords(tmp_path, [f"w{i}" for i in range(50)], distractor_rate=0.5)
    where = [
        words.index("w3") / (len(words) - 1)
        for words in lists(made, "w3 w4 w5", 1500)
        if len(words) > 1
    ]
    assert np.mean(where) == pytest.approx(0.5, abs=0.04)


def test_long_list_is_limited_to_randomly_chosen_true_hotwords(tmp_path):
    words = [f"w{i}" for i in range(30)]
    everything = lists(hotwords(tmp_path, words, max_words=5), " ".join(words))
    assert {len(words) for words in everything} == {5}
    assert {word for words in everything for word in words} == set(words)
    few = lists(hotwords(tmp_path, words[:3], distractor_rate=0.9), "w1")
    assert {word for words in few for word in words} == {"w0", "w1", "w2"}


def test_hotwords_of_the_sample_join_the_list(tmp_path):
    own = ["Zürich", "Bern", f"{AUDIO} ", "W1"]
    assert all(
        sorted(words) == ["W1", "Zürich"]
        for words in lists(hotwords(tmp_path, ["w1", "w2"]), "w1 zürich", own=own)
    )
    made = hotwords(tmp_path, [f"w{i}" for i in range(9)], distractor_rate=0.5)
    for words in lists(made, "zürich", own=own):
        assert len(words) == 1 or {"Bern", "W1"} & set(
            words
        )  # hotwords of the sample have priority
    assert lists(hotwords(tmp_path), "in bern", 1, own=["Bern"]) == [["Bern"]]
    assert lists(hotwords(tmp_path, distractor_rate=0.5), "nothing", 1, own=["Bern"]) == [["Bern"]]


def test_lists_depend_only_on_seed_pass_and_key(tmp_path):
    words = [f"w{i}" for i in range(100)]
    made = hotwords(tmp_path, words, prob=0.5, distractor_rate=0.5)
    first = lists(made, "w1 w2")
    assert lists(made, "w1 w2") == first
    assert lists(made, "w1 w2", dealt=1) != first
    assert lists(hotwords(tmp_path, words, seed=2, prob=0.5, distractor_rate=0.5), "w1 w2") != first
    assert listed(made.context("w1 w2", key="77", pass_index=0)) == first[77]


@pytest.mark.slow
def test_lookup_time_does_not_grow_with_the_number_of_phrases(tmp_path):
    rng = np.random.default_rng(0)
    phrases = [
        "".join(chr(c) for c in rng.integers(0x4E00, 0x4E00 + 3000, rng.integers(2, 7)))
        for _ in range(100_000)
    ]
    made = hotwords(tmp_path, phrases, distractor_rate=0.8)
    asked = []

    class Counting(dict):
        def __contains__(self, name):
            asked.append(name)
            return super().__contains__(name)

    made.phrases = Counting(made.phrases)
    text = "".join(phrases[i] for i in rng.integers(0, 100_000, 10))
    assert listed(made.context(text, key="k", pass_index=0))
    assert len(asked) < 6 * len(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"template": "Hotwords: {word}."},
            r"template='Hotwords: \{word\}\.'.*\{words\}",
        ),
        ({"template": f"{AUDIO} {{words}}"}, r"<\|AUDIO\|>"),
        ({"file": "/no/such"}, r"data\.hotwords\.file '/no/such'"),
    ],
)
def test_invalid_values_are_reported_with_their_keys(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        hotwords(tmp_path, **changes)


@pytest.mark.parametrize(
    ("key", "value"),
    [("prob", 2.0), ("max_words", 0), ("max_words", 10**9), ("distractor_rate", 1.0)],
)
def test_value_out_of_bounds_is_reported_with_its_key(key, value):
    with pytest.raises(UserError, match=rf"data\.hotwords\.{key}={value} "):
        build(HotwordConfig, {key: value}, group="data.hotwords.")


def test_file_without_words_or_with_the_audio_token_is_rejected(tmp_path):
    with pytest.raises(UserError, match=r"data\.hotwords\.file='.*words\.txt'"):
        hotwords(tmp_path, ["", " "])
    with pytest.raises(UserError, match=r"data\.hotwords\.file=.*, line 2: 'a <\|AUDIO\|>'"):
        hotwords(tmp_path, ["fine", f"a {AUDIO}"])
