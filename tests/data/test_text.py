import pytest

from asrllm.data.text import basic, en, normalizer, normalizer_of, zh, zh_numbers
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
def test_basic_normalisation(text, expected):
    assert basic(text) == expected


def test_chinese_normalisation():
    pytest.importorskip("opencc")
    assert zh("開放 中文，ASR 模型。") == "开放中文 asr 模型"


def test_an_unknown_normalizer_is_one_sentence():
    with pytest.raises(UserError, match="did you mean 'basic'"):
        normalizer("basics")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mr. Smith's colour [laughs] isn't grey, um, it won't be", "mister smith is color is not gray it will not be"),
        ("twenty-five dollars", "$25"),
        ("(noise)", ""),
    ],
)
def test_english_normalisation_is_whispers(text, expected):
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer as Same

    spelling = Same().standardize_spellings.mapping
    assert en(text) == expected == EnglishTextNormalizer(spelling)(text)


def test_numbers_in_chinese_are_one_where_they_are_asked_for():
    pytest.importorskip("cn2an")
    assert zh("一百二十三個") == "一百二十三个"
    assert zh_numbers("一百二十三個，萬一") == "123个万一"
    assert zh_numbers("二零二四年") == zh_numbers("2024年") == "2024年"


@pytest.mark.parametrize(
    ("lang", "name"),
    [
        ("en", "en"), ("EN-us", "en"), ("English", "en"), ("eng", "en"), ("zh_TW", "zh"), ("Chinese", "zh"), ("cmn", "zh"), ("yue", "zh"),
        ("Cantonese", "zh"), ("de", "basic"), ("German", "basic"), ("Klingon", "basic"), (None, "basic"), ("", "basic"),
    ],
)  # fmt: skip
def test_languages_have_their_normalizers(lang, name):
    assert normalizer_of(lang) == name
