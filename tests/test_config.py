import dataclasses
import typing
from collections.abc import Iterator
from importlib import resources
from typing import Annotated

import pytest
from pydantic import Strict

from asrllm.commands.evaluate import EvaluationRun
from asrllm.conf.fields import field_docs
from asrllm.conf.pages import pages
from asrllm.conf.write import yaml_files
from asrllm.config_keys import help_text
from asrllm.errors import UserError
from asrllm.schema import (
    PositiveInt,
    build,
    component,
    keys_and_types,
    nested_component,
    shown,
)
from asrllm.training.run_config import TrainRun
from tests.composing import compose_config, load_config

GIVEN = [
    "exp_dir=e",
    "model.audio_encoder.pretrained_model=a",
    "model.llm.pretrained_model=l",
    "data.train_data_config=t",
]


def load(*overrides):
    return load_config("train", [*GIVEN, *overrides], TrainRun)


def fields_of(cls, prefix=""):
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield prefix + field.name
        for hint in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(hint):
                yield from fields_of(hint, f"{prefix}{field.name}.")


def keys_of(tree, prefix=""):
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")


@pytest.mark.parametrize(("name", "cls"), [("train", TrainRun), ("evaluate", EvaluationRun)])
def test_yaml_keys_match_dataclass_fields_and_have_help(name, cls):
    keys = set(keys_of(compose_config(name, [])))
    assert keys == set(fields_of(cls))
    text = help_text(name)
    for key in keys:
        assert f"{key.rpartition('.')[2]}:" in text


def components(cls: type) -> Iterator[type]:
    """Yield a component and those in it."""
    yield cls
    for hint in keys_and_types(cls).values():
        inner = nested_component(hint)
        if inner is not None:
            yield from components(inner)


@pytest.mark.parametrize("cls", [TrainRun, EvaluationRun])
def test_meaning_of_a_key_names_each_of_its_choices(cls):
    for component_ in components(cls):
        meanings = field_docs(component_)
        for key, hint in keys_and_types(component_).items():
            for alternative in (hint, *typing.get_args(hint)):
                if typing.get_origin(alternative) is typing.Literal:
                    for choice in typing.get_args(alternative):
                        assert choice in meanings[key], key


@pytest.mark.slow
def test_overrides_set_dataclass_fields():
    config = load(
        "model.audio_token=<|A B|>",
        "model.llm.lora.r=64",
        "trainer.lr=1e-3",
        "trainer.num_steps=5",
        "data.trace=true",
    )
    assert config.model.audio_token == "<|A B|>"
    assert (
        config.model.llm.lora.r,
        config.trainer.lr,
        config.trainer.num_steps,
        config.data.trace,
    ) == (64, 1e-3, 5, True)
    assert load("model.llm.lora=null").model.llm.lora is None
    assert (
        load("prompt_file=/a dir/with=signs,(and)more.txt").prompt_file
        == "/a dir/with=signs,(and)more.txt"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.llm.lora.rank=4",
            r"'model\.llm\.lora\.rank'.* model\.llm\.lora\.r",
        ),
        ("trainer.learning_rate=1", "'trainer.learning_rate'"),
        (
            "modle.audio_token=x",
            r"'modle\.audio_token'.*'model\.audio_token'",
        ),
        ("+model.new=1", r"'model\.new'"),
        ("exp_dir", "'exp_dir' "),
        ("trainer.lr=fast", r"trainer\.lr='fast' "),
        ("trainer.num_steps=1.5", r"trainer\.num_steps=1\.5 "),
        ("data.trace=1", r"data\.trace=1 "),
        (
            "trainer.precision=bf17",
            r"trainer\.precision='bf17' .* 'bf16'",
        ),
        ("trainer.precision=16", r"trainer\.precision=16 .*'fp16'"),
        ("trainer.precision=null", r"trainer\.precision=null .*bf16, fp16, fp32"),
        ("model.llm.lora.target_modules=[]", r"model\.llm\.lora\.target_modules "),
        (
            "model.audio_encoder.lora.options.lora_bia=true",
            r"model\.audio_encoder\.lora\.options\.lora_bia'.*lora_bias'",
        ),
        ("model.audio_encoder.model_type=wisper", "'whisper'"),
        (
            "trainer=3",
            r"trainer=3 ",
        ),
        ("trainer.log_every=0", r"trainer\.log_every=0 "),
        ("trainer.profile_steps=[5,3]", r"trainer\.profile_steps=\[5, 3\] "),
        ("trainer.peak_tflops=0", r"trainer\.peak_tflops=0\.?0? "),
        ("trainer.gc_every=-1", r"trainer\.gc_every=-1 "),
        ("trainer.betas=[0.9]", r"trainer\.betas=\[0\.9\] "),
        ("trainer.warmup_steps=-1", r"trainer\.warmup_steps=-1 "),
        ("data.max_bad_share=2", r"data\.max_bad_share=2"),
        ("data.filter.min_duration=40", r"min_duration=40\.?0? .*data\.filter\.max_duration="),
        ("data.filter.max_chars_per_second=nan", "max_chars_per_second=nan "),
        ("data.sampler.max_duration=inf", "max_duration=inf .*null"),
        ("data.sampler.max_tokens=1000000000000", "max_tokens=1000000000000 "),
        ("data.cache.max_gb=nan", "max_gb=nan "),
        ("data.hotwords.max_words=1000000000", r"data\.hotwords\.max_words=1000000000.* 10000"),
        (
            "data.augment.noise.prob=0.5",
            r"data\.augment\.noise\.prob=0\.5 .* data\.augment\.noise\.source",
        ),
        ("data.augment.speed=[]", r"data\.augment\.speed=\[\]"),
        ("data.text_normalization=lower", r"data\.text_normalization='lower'"),
        ("seed=-1", "seed=-1 .* 0"),
        ("data.whisper_fbank=false", r"data\.whisper_fbank=false .*Whisper"),
        ("model.llm.lora.r=-1", r"lora\.r=-1 "),
        ("trainer.lr_of.llm=1e-5", r"trainer\.lr_of\.llm=1e-05 .*model\.llm\.frozen=true"),
        (
            "trainer.lr_of.audio_encoder=1e-5",
            r"trainer\.lr_of\.audio_encoder=1e-05 .*model\.audio_encoder\.frozen=true",
        ),
        (
            "model.exclude_from_checkpoint=[projector]",
            r"model\.exclude_from_checkpoint.*'projector'",
        ),
        ("model.llm.pretrained_model=null", r"^model\.llm\.pretrained_model "),
        ("exp_dir=null", "^exp_dir "),
        ("data.train_data_config=null", r"^data\.train_data_config "),
    ],
)
def test_wrong_override_is_reported_in_one_line_with_the_key(override, message):
    with pytest.raises(UserError, match=message) as raised:
        load(override)
    assert "\n" not in str(raised.value)


def test_rate_of_the_adapters_needs_adapters():
    rate = "trainer.lr_of.lora=1e-5"
    with pytest.raises(UserError, match=r"lr_of\.lora=1e-05 .*llm\.lora\.r=0 .*encoder\.lora\.r=0"):
        load(rate, "model.llm.lora.r=0")
    for overrides in ([], ["model.llm.lora=null", "model.audio_encoder.lora.r=8"]):
        assert load(rate, *overrides).trainer.lr_of.lora == 1e-5


def test_rate_of_a_part_needs_its_training():
    rate = "trainer.lr_of.audio_encoder=1e-5"
    assert load(rate, "model.audio_encoder.frozen=false").trainer.lr_of.audio_encoder == 1e-5


@component
class Entry:
    name: str
    size: PositiveInt | None = None
    tags: list[str] | str = "none"


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({}, ["'name'"]),
        ({"name": "a", "sise": 1}, ["'sise'", "'size'"]),
        ({"name": "a", "size": 0}, ["size=0", "1", "null"]),
        ({"name": "a", "size": True}, ["size=true", "integer"]),
        ({"name": "a", "tags": 1}, ["tags=1", "list", "string"]),
        ({"name": "a", "tags": ["b", 2]}, ["tags[1]=2"]),
    ],
)
def test_error_of_a_component_names_place_key_and_value(values, names):
    with pytest.raises(UserError) as raised:
        build(Entry, values, where="list.yaml, entry 2: ")
    for name in ["list.yaml, entry 2", *names]:
        assert name in str(raised.value)


def groups_of(cls, prefix=""):
    for key, hint in keys_and_types(cls).items():
        inner = nested_component(hint)
        if inner is not None:
            yield prefix + key
            yield from groups_of(inner, f"{prefix}{key}.")


@pytest.mark.parametrize("cls", [TrainRun, EvaluationRun])
@pytest.mark.parametrize("value", ["text", 5, True, [1]])
def test_group_that_is_not_a_mapping_is_reported_with_its_keys(cls, value):
    for group in groups_of(cls):
        values = value
        for key in reversed(group.split(".")):
            values = {key: values}
        with pytest.raises(UserError) as raised:
            build(cls, values)
        message = str(raised.value)
        assert message.startswith(f"{group}={shown(value)} "), message
        assert "nput should" not in message


def test_yaml_files_are_those_of_the_components():
    folder = resources.files("asrllm.conf")
    for name, text in yaml_files().items():
        assert (folder / name).read_text() == text, "run python -m asrllm.conf.write"


def test_pages_of_the_documentation_are_those_of_the_code():
    made = pages()
    assert {"cli.md", "configuration.md", "data.md", "metrics.md"} <= {page.name for page in made}
    for page, text in made.items():
        assert page.read_text() == text, "run python -m asrllm.conf.write"


@pytest.mark.slow
@pytest.mark.parametrize("key", ["whisper_fbank", "pad_to_30s"])
def test_whisper_feature_options_need_a_whisper_encoder(key):
    with pytest.raises(
        UserError,
        match=rf"data\.{key}=true .*model\.audio_encoder\.model_type=zipformer.* Kaldi",
    ):
        load("model.audio_encoder.model_type=zipformer", f"data.{key}=true")
    load("model.audio_encoder.model_type=zipformer", f"data.{key}=false")


@pytest.mark.slow
def test_kept_silence_needs_whisper_and_a_projector_without_a_warm_start():
    keep = "data.pad_to_30s=keep_silence"
    assert load(keep).data.pad_to_30s == "keep_silence"
    with pytest.raises(UserError, match=rf"{keep} .*model_type=zipformer"):
        load(keep, "model.audio_encoder.model_type=zipformer")
    with pytest.raises(UserError, match=rf"model\.projector_init=aligned .*{keep}"):
        load(keep, "model.projector_init=aligned")
    with pytest.raises(UserError, match=r"'keep'.*true or false or keep_silence"):
        load("data.pad_to_30s=keep")


@component
class Collections:
    pair: Annotated[tuple[int, float], Strict(False)] | None = None
    table: dict[str, PositiveInt] | None = None
    lists: dict[str, list[int]] | None = None


@pytest.mark.parametrize(
    ("values", "shown_parts"),
    [
        ({"pair": [3]}, ["group.pair=[3]", "2 items"]),
        ({"table": {"en": 1, "de": 0}}, ["group.table.de=0"]),
        ({"lists": {"en": [1, "x"]}}, ["group.lists.en[1]='x'"]),
    ],
)
def test_error_inside_a_value_names_the_entry(values, shown_parts):
    with pytest.raises(UserError) as error:
        build(Collections, values, group="group.")
    for part in shown_parts:
        assert part in str(error.value)
