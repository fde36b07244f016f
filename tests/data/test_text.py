import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asrllm.data.text import (
    basic,
    en,
    none,
    normalizer,
    normalizer_of,
    transcript_normalizer,
    word_errors,
    zh,
    zh_numbers,
)
from asrllm.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello,  WORLD!", "hello world"),
        ("Don't 'quote' me — it’s 5%", "don't quote me it's 5"),
        ("你好，世界。", "你好 世界"),
        ("ＡＢＣ", "abc"),
        ("...", ""),
    ],
)
def test_basic_normalizer(text, expected):
    assert basic(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Hello [noise] world",
        "<unk> hello <|en|> (laughs) there",
        "[a <b] c> d",
        "(a (b) c) d",
        "() [] <> x",
        "a[b]c (d)e",
        "5 < 6 and 7 > 3",
        "not [closed",
        "（笑）好［音乐］",
        "ÉCOLE (été) Straße ﬁne",
    ],
)
def test_bracketed_tags_are_dropped_as_by_whisper(text):
    assert basic(text) == whisper_basic(text)


@settings(max_examples=300, deadline=None)
@given(st.text("aB1é好 \t[](){}<>（）.,-_", max_size=20))
def test_basic_normalizer_matches_whisper_except_for_apostrophes_and_marks(text):
    assert basic(text) == whisper_basic(text)


def whisper_basic(text):
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return BasicTextNormalizer()(text).strip()


def test_basic_normalizer_preserves_combining_marks_and_apostrophes():
    """Whisper's replaces both by spaces, which splits Hindi words into letters."""
    assert basic("हिन्दी, don't") == "हिन्दी don't"
    assert whisper_basic("हिन्दी don't") != "हिन्दी don't"


INVISIBLE = {
    "zero-width space": "\u200b",
    "non-joiner": "\u200c",
    "joiner": "\u200d",
    "left-to-right mark": "\u200e",
    "right-to-left embedding": "\u202b",
    "first strong isolate": "\u2068",
    "word joiner": "\u2060",
    "byte-order mark": "\ufeff",
    "soft hyphen": "\u00ad",
    "Arabic letter mark": "\u061c",
    "tag": "\U000e0041",
    "variation selector": "\ufe0f",
    "grapheme joiner": "\u034f",
    "control": "\x08",
}


@pytest.mark.parametrize("mark", INVISIBLE.values(), ids=INVISIBLE.keys())
@pytest.mark.parametrize("name", ["basic", "en", "none", "zh", "zh-numbers"])
def test_invisible_characters_do_not_change_normalized_text(name, mark):
    if name.startswith("zh"):
        pytest.importorskip("opencc")
        pytest.importorskip("cn2an")
    normalize = normalizer(name)
    for text in ("colour one hundred", "你好 世界", "می خواهم"):
        marked = mark + mark.join(text) + f" {mark} "
        assert normalize(marked) == normalize(text)


def test_training_transcripts_preserve_joiners_unless_normalized():
    """Persian "I want" has a non-joiner. A model learns it, and scoring ignores it."""
    text = "می\u200cخواهم"
    assert transcript_normalizer("none")(f" {text} \n") == text
    assert none(text) == transcript_normalizer("basic")(text) == "میخواهم"
    assert word_errors(text, "میخواهم") == 0


def test_chinese_normalizer():
    pytest.importorskip("opencc")
    assert zh("開放 中文，ASR 模型。") == "开放中文 asr 模型"


def test_an_unknown_normalizer_is_reported():
    with pytest.raises(UserError, match=r"basics.*'basic'"):
        normalizer("basics")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Mr. Smith's colour [laughs] isn't grey, um, it won't be",
            "mister smith is color is not gray it will not be",
        ),
        ("twenty-five dollars", "$25"),
        ("(noise)", ""),
    ],
)
def test_english_normalizer_matches_whisper(text, expected):
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer as Same

    spelling = Same().standardize_spellings.mapping
    assert en(text) == expected == EnglishTextNormalizer(spelling)(text)


def test_zh_numbers_unifies_spoken_and_written_numbers():
    pytest.importorskip("cn2an")
    assert zh("一百二十三個") == "一百二十三个"
    assert zh_numbers("一百二十三個，萬一") == "123个万一"
    assert zh_numbers("二零二四年") == zh_numbers("2024年") == "2024年"


@pytest.mark.parametrize(
    ("lang", "name"),
    [
        ("en", "en"),
        ("EN-us", "en"),
        ("English", "en"),
        ("eng", "en"),
        ("zh_TW", "zh"),
        ("Chinese", "zh"),
        ("cmn", "zh"),
        ("yue", "zh"),
        ("Cantonese", "zh"),
        ("de", "basic"),
        ("German", "basic"),
        ("Klingon", "basic"),
        (None, "basic"),
        ("", "basic"),
    ],
)
def test_normalizer_of_a_language(lang, name):
    assert normalizer_of(lang) == name
