"""Ranges of characters by script, for the brackets of regular expressions."""

HAN = "\u3400-\u9fff\U00020000-\U0003ffff"
KANA = "\u3040-\u30ff"
SOUTHEAST_ASIAN = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Myanmar, Khmer
HANGUL = "\uac00-\ud7a3"
# scripts without spaces between words. Scores count their characters
UNSPACED = SOUTHEAST_ASIAN + KANA + HAN
# Chinese and Japanese, with their punctuation and full-width forms: joined without a space
EAST_ASIAN = f"\u3000-\u303f{KANA}{HAN}\uff00-\uff9f"
# Any character may begin or end a word: also Hangul, whose particles are written onto the word, and
# the small kana and compatibility ideographs that names contain.
JOINED = f"{UNSPACED}\u31f0-\u31ff{HANGUL}\uf900-\ufaff"
