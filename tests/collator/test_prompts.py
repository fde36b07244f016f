from collections import Counter

import pytest

from asrllm.collator.prompts import DEFAULT_PROMPTS, choose_prompt, read_prompts
from asrllm.errors import UserError


@pytest.mark.parametrize("text", ["Transcribe: all.\n\n 写下来。 \n", "- 'Transcribe: all.'\n- 写下来。\n"])
def test_prompts_are_lines_or_a_yaml_list(tmp_path, text):
    (tmp_path / "p.yaml").write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / "p.yaml") == ("Transcribe: all.", "写下来。")


def test_no_file_gives_the_default():
    assert read_prompts(None) == DEFAULT_PROMPTS


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_a_file_without_prompts_is_one_sentence(tmp_path, text):
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(UserError, match="holds no prompt: write one a line"):
        read_prompts(tmp_path / "p.txt")


def test_a_missing_file_and_a_mapping_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.txt").write_text("- {weight: 2}\n")
    with pytest.raises(UserError, match="other things than text"):
        read_prompts(tmp_path / "p.txt")


def test_the_choice_depends_on_seed_epoch_and_key_alone():
    def draw(seed, epoch):
        return [choose_prompt("abc", seed=seed, epoch=epoch, key=str(i)) for i in range(3000)]

    assert draw(1, 0) == draw(1, 0)
    assert draw(1, 0) != draw(1, 1)
    assert draw(1, 0) != draw(2, 0)
    assert all(900 < n < 1100 for n in Counter(draw(1, 0)).values())
