import pytest

from asrllm.data.text import basic, normalizer, zh
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
