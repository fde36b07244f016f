from collections import Counter

import pytest

from asrllm.data.prompts import DEFAULT_PROMPTS, Prompt, choose_prompt, parse_prompts, read_prompts
from asrllm.errors import UserError


def write(folder, text, name="p.txt"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def draw(prompts, count=3000, *, seed=1, pass_index=0, **sample):
    return [
        choose_prompt(prompts, seed=seed, pass_index=pass_index, key=str(i), **sample)
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "Transcribe: all.\n\n 写下来。 \n"),
        ("p.txt", "\ufeffTranscribe: all.\r\n写下来。\r\n"),
        ("p.yaml", "\ufeff- 'Transcribe: all.'\n- 写下来。\n"),
        ("p.txt", "- 'Transcribe: all.'\n- 写下来。\n"),
        ("p.yaml", "# comments are not prompts\n- 'Transcribe: all.'\n- prompt: 写下来。\n"),
        ("p.yml", "['Transcribe: all.', 写下来。]"),
    ],
)
def test_prompts_are_lines_or_a_yaml_list(tmp_path, name, text):
    assert read_prompts(write(tmp_path, text, name)) == (
        Prompt(text="Transcribe: all."),
        Prompt(text="写下来。"),
    )


def test_yaml_sets_weight_language_and_task(tmp_path):
    path = write(
        tmp_path,
        "- {prompt: Transcribe., weight: 2}\n"
        "- {prompt: 写下来。, lang: zh, task: asr, weight: 0.5}\n",
        "p.yaml",
    )
    assert read_prompts(path) == (
        Prompt(text="Transcribe.", weight=2.0),
        Prompt(text="写下来。", weight=0.5, lang="zh", task="asr"),
    )


def test_without_a_file_the_default_prompt_is_used():
    assert read_prompts(None) == DEFAULT_PROMPTS


@pytest.mark.parametrize(
    ("name", "text"), [("p.txt", ""), ("p.txt", "\n  \n"), ("p.yaml", ""), ("p.yaml", "[]")]
)
def test_a_file_without_prompts_is_reported(tmp_path, name, text):
    with pytest.raises(UserError, match=f"prompt_file='{tmp_path}/{name}'"):
        read_prompts(write(tmp_path, text, name))


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/p.txt"):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize("name", ["p.yaml", "p.yml", "p.txt", "p"])
def test_a_file_that_is_not_a_yaml_list_is_read_line_by_line(tmp_path, name):
    text = "Transcribe the speech.\nWrite: what you hear\n\n# not a comment: {\n写下来。\n"
    found = read_prompts(write(tmp_path, text, name))
    assert [prompt.text for prompt in found] == [
        "Transcribe the speech.",
        "Write: what you hear",
        "# not a comment: {",
        "写下来。",
    ]


@pytest.mark.parametrize(
    "text", ["- Transcribe: it\nRepeat it\n", "[Transcribe] this\nRepeat it\n"]
)
def test_lines_that_only_begin_like_a_yaml_list_are_prompts(tmp_path, caplog, text):
    found = read_prompts(write(tmp_path, text, "p.yaml"))
    assert [prompt.text for prompt in found] == text.splitlines()
    assert "p.yaml" in caplog.text


@pytest.mark.parametrize("entry", ["- {prompt: Say, weight: 1", "- prompt: Say: it"])
def test_a_mistake_in_a_yaml_list_is_not_trained_on(tmp_path, entry):
    with pytest.raises(UserError, match=r"p\.yaml:[23]:\d+"):
        read_prompts(write(tmp_path, f"- {{prompt: Write., weight: 2}}\n{entry}\n", "p.yaml"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (5, "data.yaml, entry 1, prompt 2: 5 "),
        (None, "prompt 2: None "),
        ({"weight": 2}, "'prompt'"),
        ({"prompt": "a", "wieght": 2}, "'wieght'"),
        ({"prompt": "a", 1: 2}, "key '1'"),
        ({"prompt": "a", "weight": "2"}, "weight='2' "),
        ({"prompt": "a", "weight": True}, "weight=true "),
        ({"prompt": "a", "weight": 0}, "weight=0 "),
        ({"prompt": "a", "weight": -1.5}, "weight=-1.5 "),
        ({"prompt": "a", "weight": float("nan")}, "weight=nan "),
        ({"prompt": "a", "weight": float("inf")}, "weight=inf "),
        ({"prompt": 3}, "prompt=3 "),
        ({"prompt": "a", "lang": False}, "lang=false "),  # YAML reads no as false
        ({"prompt": " "}, "prompt "),
        ("", "prompt "),
        ({"prompt": "a", "task": ""}, "task "),
    ],
)
def test_an_invalid_entry_is_reported(entry, message):
    with pytest.raises(UserError) as caught:
        parse_prompts(["fine", entry], "data.yaml, entry 1")
    assert message in str(caught.value)


def test_the_choice_depends_only_on_seed_pass_and_key():
    prompts = parse_prompts(["a", "b", "c"], "here")
    assert draw(prompts) == draw(prompts)
    assert draw(prompts) != draw(prompts, pass_index=1)
    assert draw(prompts) != draw(prompts, seed=2)
    assert all(900 < n < 1100 for n in Counter(draw(prompts)).values())


def test_weights_apply_to_the_prompts_that_fit():
    entries = ["a", {"prompt": "b", "weight": 3}, {"prompt": "c", "weight": 1000, "lang": "zh"}]
    counts = Counter(draw(parse_prompts(entries, "here"), lang="en"))
    assert set(counts) == {"a", "b"}
    assert 2150 < counts["b"] < 2350


@pytest.mark.parametrize(
    ("lang", "task", "expected"),
    [
        (None, None, {"any"}),
        ("en", None, {"any"}),
        ("zh", None, {"any", "zh"}),
        ("ZH-cn", None, {"any", "zh", "zh-CN"}),
        ("zh_CN", None, {"any", "zh", "zh-CN"}),
        ("Chinese", None, {"any", "zh"}),
        ("zha", None, {"any"}),  # Zhuang
        (None, "st", {"any", "st"}),
        ("zh", "st", {"any", "zh", "st", "zh st"}),
    ],
)
def test_prompts_fit_language_and_task(lang, task, expected):
    entries = [
        "any",
        {"prompt": "zh", "lang": "zh"},
        {"prompt": "zh-CN", "lang": "zh-CN"},
        {"prompt": "st", "task": "st"},
        {"prompt": "zh st", "lang": "Zh", "task": "st"},
    ]
    assert set(draw(parse_prompts(entries, "here"), 200, lang=lang, task=task)) == expected


def test_an_utterance_without_a_fitting_prompt_is_reported():
    prompts = parse_prompts([{"prompt": "写下来。", "lang": "zh"}], "here")
    with pytest.raises(
        UserError,
        match=r"'utt7' .*lang='en', task=None.*'写下来。' \(lang=zh, task=any\)",
    ):
        choose_prompt(prompts, seed=1, pass_index=0, key="utt7", lang="en")


@pytest.mark.parametrize(
    "text",
    ["# notes\nTranscribe.\n", "prompts:\n- A\n", "prompt: A\nweight: 2\n", '{"prompt": "A"}\n'],
)
def test_a_line_that_is_hardly_meant_as_a_prompt_is_named(tmp_path, caplog, text):
    found = read_prompts(write(tmp_path, text))
    assert [prompt.text for prompt in found] == text.splitlines()
    assert repr(text.splitlines()[0]) in caplog.text
    assert f"'{tmp_path}/p.txt'" in caplog.text


def test_plain_lines_are_read_without_a_warning(tmp_path, caplog):
    read_prompts(write(tmp_path, "Transcribe: all.\n写下来。\n"))
    assert not caplog.text
