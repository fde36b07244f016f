import dataclasses
import functools
import json
import re

import pytest
import torch
from deepspeed.runtime import config as ds_runtime
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import BaseModel

from asrllm.errors import UserError
from asrllm.training.checkpoint.manifest import read_manifest
from asrllm.training.ds_config import check_settings, read_ds_config
from asrllm.training.ds_keys import (
    KNOWN_KEYS,
    MODELS,
    NESTED_MODELS,
    PLAIN_BLOCKS,
    annotated_types,
    check_block,
    check_model,
)
from asrllm.training.optimizers import part_of
from asrllm.training.run_config import OptimizerConfig, TrainerConfig
from tests.conftest import REPOSITORY
from tests.processes import assert_done, run_script

SHIPPED = sorted((REPOSITORY / "ds_configs").rglob("*.json"))


@functools.lru_cache(maxsize=1)
def default_config():
    return TrainerConfig()


def make_config(path, **changes):
    return dataclasses.replace(default_config(), deepspeed_config=str(path), **changes)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_every_shipped_file_is_filled_from_the_run(path, precision):
    changes = {"precision": precision, "gradient_accumulation_steps": 3}
    ds = read_ds_config(make_config(path, **changes), world_size=4)
    assert ds["zero_optimization"]["stage"] == int(re.search(r"zero(\d)", path.stem).group(1))
    assert ds["train_batch_size"] == 12
    assert ds["gradient_accumulation_steps"] == 3
    assert ds["gradient_clipping"] == 1.0
    assert ds["bf16"]["enabled"] == (precision == "bf16")
    assert ds["fp16"]["enabled"] is False
    assert "auto" not in json.dumps(ds)


def test_all_stages_are_shipped():
    assert {"zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"} <= {
        path.stem for path in SHIPPED
    }


def read(tmp_path, content, *, name="mine.json", world_size=1, **changes):
    """Write a file and return read_ds_config of it. The content is text or a JSON object."""
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return read_ds_config(make_config(tmp_path / name, **changes), world_size=world_size)


def adamw(**params):
    return {"optimizer": {"type": "AdamW", "params": params}}


def scheduler(kind, **params):
    return {"scheduler": {"type": kind, "params": params}}


def zero(**keys):
    return {"zero_optimization": {"stage": 2, **keys}}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("stage2.json", {}, r"stage2\.json .*stage 2, .*zero_optimization\.stage is 0"),
        ("zero3_mine.json", {"zero_optimization": {"stage": 1}}, r"stage 3, .*\.stage is 1"),
        (
            "mine.json",
            {"gradient_clipping": 5.5},
            r"gradient_clipping=5\.5 .*trainer\.gradient_clipping=1\.0",
        ),
        (
            "mine.json",
            {"train_micro_batch_size_per_gpu": 4},
            r"micro_batch_size_per_gpu=4 .* 1 \(data\.sampler",
        ),
        ("mine.json", {"train_batch_size": 64}, r"train_batch_size=64 .* 1 \("),
        (
            "mine.json",
            {"gradient_accumulation_steps": 2},
            r"=2 .*trainer\.gradient_accumulation_steps=1",
        ),
        (
            "mine.json",
            {"fp16": {"enabled": True}},
            r"fp16\.enabled=true .* false \(trainer\.precision=bf16\)",
        ),
        (
            "mine.json",
            {"bf16": {"enabled": False}},
            r"bf16\.enabled=false .* true \(",
        ),
        (
            "mine.json",
            zero(round_robin_gradients=True),
            r"zero_optimization\.round_robin_gradients",
        ),
        (
            "mine.json",
            zero(stage=3, offload_param={"device": "nvme"}),
            r"offload_param\.device='nvme' .*zero3_offload\.json",
        ),
        (
            "mine.json",
            zero(zero_hpz_partition_size="auto"),
            "zero_hpz_partition_size",
        ),
    ],
)
def test_file_that_contradicts_the_run_is_rejected(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, content, name=name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            zero(stage="2"),
            r"zero_optimization\.stage='2' .*quotes",
        ),
        (zero(stage=4), r"zero_optimization\.stage=4 .* 0, 1, 2, 3\."),
        (
            zero(stage="auto"),
            r'stage="auto" .* 0, 1, 2, 3\.',
        ),
        (zero(stage=True), r"zero_optimization\.stage=true "),
        (zero(stage=None), r"zero_optimization\.stage=null "),
        (
            zero(reduce_bucket_size="5e8"),
            r"reduce_bucket_size='5e8' .*quotes",
        ),
        (
            zero(reduce_bucket_size=-1),
            r"reduce_bucket_size=-1 .*0",
        ),
        (zero(overlap_comm="true"), r"overlap_comm='true' "),
        (
            zero(offload_optimizer="cpu"),
            r"zero_optimization\.offload_optimizer='cpu' .*object",
        ),
        (
            zero(offload_optimizer={"device": "gpu"}),
            r"offload_optimizer\.device='gpu' .* none, cpu\.",
        ),
        (
            zero(offload_optimizer={"device": "cpu", "ratio": 2}),
            r"offload_optimizer\.ratio=2 .* 1",
        ),
        (
            zero(offload_optimizer={"device": "cpu", "ratio": 0.5}),
            "zero_optimization .*Stage 3",
        ),
        ({"zero_optimization": None}, "zero_optimization=null "),
        ({"zero_optimization": True}, "zero_optimization=true "),
        ({"zero_optimization": []}, r"zero_optimization=\[\] "),
        ({"bf16": True}, "bf16=true "),
        ({"fp16": {"loss_scale": "x"}}, r"fp16\.loss_scale='x' "),
        (
            {"fp16": {"initial_scale_power": 1.5}},
            r"fp16\.initial_scale_power=1\.5 ",
        ),
        ({"optimizer": "AdamW"}, "optimizer='AdamW' "),
        (
            {"optimizer": {"type": "AdamW", "params": None}},
            r"optimizer\.params=null ",
        ),
        (
            {"gradient_clipping": "1.0"},
            r"gradient_clipping='1\.0' .*quotes",
        ),
        ({"gradient_clipping": None}, "gradient_clipping=null "),
        ({"train_batch_size": [1]}, r"train_batch_size=\[1\] "),
        ({"wall_clock_breakdown": 1}, "wall_clock_breakdown=1 "),
        ({"aio": {"block_size": 1}}, r"'aio' .*NVMe"),
        (
            zero(stage=2, offload_optimizer={"device": "cpu", "nvme_path": "/disk"}),
            r"offload_optimizer\.nvme_path.*NVMe",
        ),
        (
            {"communication_data_type": "fp8"},
            r"mine\.json .*DeepSpeed: .*communication_data_type.*fp8",
        ),
        (
            {"checkpoint": {"tag_validation": "x"}},
            r"mine\.json .*DeepSpeed: .*tag_validation.*X",
        ),
    ],
)
def test_wrong_value_is_reported_with_its_key(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, content)


def nested_fields(model, place):
    """Yield the full names of the fields of a pydantic model of DeepSpeed."""
    for name, field in model.model_fields.items():
        key = f"{place}.{field.alias or name}"
        yield key
        for kind in annotated_types(field.annotation):
            if issubclass(kind, BaseModel):
                yield from nested_fields(kind, key)


FIELDS = [
    name
    for place, model in (MODELS | NESTED_MODELS).items()
    for name in nested_fields(model, place)
]


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_value_of_a_checked_block_is_explained_in_our_words(tmp_path, name):
    rejected = 0
    for value in (-1, -0.5, "x", "1", [], {}, ["x"], None, True, 10**30):
        content = value
        for key in reversed(name.split(".")):
            content = {key: content}
        block, inner = next(iter(content.items()))
        if block in MODELS:
            check = functools.partial(check_model, MODELS[block])
        else:
            check = functools.partial(check_block, PLAIN_BLOCKS[block])
        try:
            check(inner, block, tmp_path / "mine.json")
        except UserError as error:
            rejected += 1
            message = str(error)
            assert "mine.json: " in message
            assert name.rpartition(".")[0] in message
            assert "Input should" not in message
            assert "validation error" not in message
            assert "pydantic" not in message
    assert rejected


@pytest.mark.parametrize("value", ["yes", 1, [], None])
def test_wrong_value_within_the_timers_is_named(tmp_path, value):
    with pytest.raises(UserError, match=r"timers\.throughput\.enabled=.* true or false"):
        read(tmp_path, {"timers": {"throughput": {"enabled": value}}})
    with pytest.raises(UserError, match=r"timers\.throughput\.enable'? .*'enabled'"):
        read(tmp_path, {"timers": {"throughput": {"enable": value}}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"zero_optimisation": {}},
            r"'zero_optimisation' .*DeepSpeed 0\.\d+\.\d+\. .*'zero_optimization'",
        ),
        (
            {"something_else_entirely": 1},
            r"'something_else_entirely' .*DeepSpeed [\d.]+\. ",
        ),
        (
            zero(overlap_com=True),
            r"zero_optimization\.overlap_com .*'overlap_comm'",
        ),
        (
            zero(offload_optimizer={"devise": "cpu"}),
            r"zero_optimization\.offload_optimizer\.devise .*'device'",
        ),
        ({"bf16": {"enable": True}}, r"bf16\.enable .*'enabled'"),
        ({"bfloat16": {"enabled": True}}, r"'bfloat16' .*'bf16'"),
        (
            zero(cpu_offload=True),
            r"zero_optimization\.cpu_offload .*zero_optimization\.offload_optimizer ",
        ),
        ({"log_level": "loud"}, r"log_level='loud' .*warning"),
        (zero(elastic_checkpoint=True), r"'zero_optimization\.elastic_checkpoint' "),
        (zero(zenflow={"topk_ratio": 0.1}), r"'zero_optimization\.zenflow' "),
        (
            zero(offload_optimizer={"device": "cpu", "super_offload": True}),
            r"'zero_optimization\.offload_optimizer\.super_offload' ",
        ),
        ({"amp": {"enabled": False}}, r"amp .*DeepSpeed.*trainer\.precision"),
        (zero(mics_shard_size=8), r"zero_optimization\.mics_shard_size .*DeepSpeed"),
    ],
)
def test_unknown_key_is_reported_with_the_most_similar_one(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"activation_checkpointing": {"partition_activations": True}},
            r" trainer\.gradient_checkpointing=true",
        ),
        (
            {"torch_autocast": {"enabled": True}},
            r"'torch_autocast' .*trainer\.precision",
        ),
        ({"tensor_parallel": {"autotp_size": 2}}, "'tensor_parallel' "),
        (
            {"checkpoint": {"load_universal": True}},
            r"'checkpoint\.load_universal' ",
        ),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op='sum' "),
        (zero() | {"prescale_gradients": True}, "prescale_gradients=True"),
        (zero() | {"gradient_predivide_factor": 2}, "gradient_predivide_factor=2"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor=0"),
        ({"steps_per_print": "auto"}, "steps_per_print"),
        ({"prescale_gradients": "auto"}, "prescale_gradients"),
        ({"steps_per_print": 0}, "steps_per_print=0"),
        ({"steps_per_print": -5}, "steps_per_print=-5"),
        ({"load_universal_checkpoint": True}, "'load_universal_checkpoint'"),
        ({"gradient_accumulation_dtype": "fp32"}, r"data_types\.grad_accum_dtype"),
        ({"managed_gradient_accumulation": False}, r" trainer\.gradient_accumulation_steps"),
        (
            zero(offload_param={"device": "cpu"}),
            r"offload_param .* 2\. .* 3\.",
        ),
        (
            zero(stage=0, offload_optimizer={"device": "cpu"}),
            r"offload_optimizer .* 0\. .* 1, 2 ",
        ),
        (
            {
                "scheduler": {
                    "type": "WarmupDecayLR",
                    "params": {
                        "warmup_max_lr": 0.001,
                        "warmup_num_steps": 100,
                        "total_num_steps": "auto",
                    },
                }
            },
            r"\.name=linear trainer\.lr=0\.001 trainer\.warmup_steps=100 trainer\.num_steps\.$",
        ),
        (scheduler("OneCycle"), r" trainer\.schedule\.name\.$"),
        ({"scheduler": None}, "scheduler=null "),
        ({"wandb": {"enabled": True}}, r"trainer\.wandb\.mode"),
        ({"comet": {"enabled": True}}, r"trainer\.sinks"),
        ({"tensorboard": {"enabled": True, "output_path": "x"}}, r"trainer\.sinks"),
        ({"csv_monitor": {"enabled": True}}, r"metrics\.jsonl"),
        ({"flops_profiler": {"enabled": True}}, r"trainer\.profile_steps"),
        ({"data_types": {"grad_accum_dtype": "x"}}, r"data_types\.grad_accum_dtype='x'.*fp32"),
        (zero(stage=3, zero_quantized_weights=True), r"zero_optimization\.zero_quantized_weights"),
        (zero(stage=3, zero_hpz_partition_size=2), "zero_hpz_partition_size"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, r"bf16\.bf16_master_weights_and_grads"),
        ({"fp16": {"fp16_master_weights_and_grads": True}}, r"fp16\.fp16_master_weights_and_grads"),
        ({"checkpoint": {"writer": {"type": "fast"}}}, r"checkpoint\.writer"),
        ({"checkpoint": {"parallel_write": {"pipeline_stage": True}}}, "parallel_write"),
        ({"checkpoint": {"use_node_local_storage": True}}, "use_node_local_storage"),
        (zero(stage=1, legacy_stage1=True), r"zero_optimization\.legacy_stage1"),
        (zero(stage=3, leaf_module={"classes": ["Block"]}), r"zero_optimization\.leaf_module'"),
        (zero(stage=3, stage3_module_granularity_threshold=9), "stage3_module_granularity"),
        (
            zero(stage=3, offload_optimizer={"device": "cpu", "ratio": 0.3}),
            r"optimizer\.ratio=0\.3",
        ),
    ],
)
def test_unsupported_key_is_reported_with_the_setting_that_replaces_it(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, content)


@pytest.mark.parametrize(
    "content",
    [
        {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": None}},
        {
            "flops_profiler": {"enabled": False},
            "tensorboard": {"enabled": False},
            "data_efficiency": {"enabled": False},
        },
        {
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": {"device": "none", "nvme_path": None},
                "offload_param": None,
            }
        },
        {
            "steps_per_print": None,
            "wall_clock_breakdown": False,
            "data_types": {"grad_accum_dtype": None, "keep_in_fp32_modules": "auto"},
        },
    ],
)
def test_blocks_that_are_switched_off_are_accepted(tmp_path, content):
    assert "offload_optimizer" not in read(tmp_path, content)["zero_optimization"]


def test_every_key_that_deepspeed_reads_is_known():
    """This fails if another version of DeepSpeed reads further keys."""

    read = set()

    class Recorded(dict):
        def get(self, key, default=None):
            read.add(key)
            return super().get(key, default)

        def __contains__(self, key):
            read.add(key)
            return super().__contains__(key)

    DeepSpeedConfig(Recorded(train_batch_size=1))
    assert read - KNOWN_KEYS - set(ds_runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS) == set()
    assert len(read & KNOWN_KEYS) > 30


# --- reading the file ---


def test_comments_and_trailing_commas_are_read_as_deepspeed_reads_them(tmp_path):
    text = (
        '\ufeff# mine\n{"zero_optimization": {"stage": 2, // two\n "overlap_comm": true,}, '
        '/* none */ "gradient_clipping": 1.0,}'
    )
    ds = read(tmp_path, text)
    assert ds["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert ds["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", ":1:2 "),
        ("", r"JSON .*zero3\.json"),
        ("[]", r"JSON .*zero3\.json"),
        ('"zero3"', r"JSON .*zero3\.json"),
        (
            '{"gradient_clipping": 1.0, "gradient_clipping": 2.0}',
            "'gradient_clipping' .*twice",
        ),
        ('{"zero_optimization": {"stage": 3, "stage": 1}}', "'stage' .*twice"),
        ("[" * 100_000, "nested"),
    ],
)
def test_invalid_json_is_rejected(tmp_path, text, message):
    with pytest.raises(UserError, match=rf"trainer\.deepspeed_config.*mine\.json.*{message}"):
        read(tmp_path, text)


# --- the optimizer block ---


@pytest.mark.parametrize(
    ("content", "changes"),
    [
        (adamw(lr="auto", betas="auto", eps="auto", weight_decay="auto"), {}),
        (
            adamw(lr=2e-4, betas=[0.9, 0.95], eps=1e-8, weight_decay=0),
            {"lr": 2e-4, "betas": [0.9, 0.95]},
        ),
        (adamw(torch_adam=True, adam_w_mode=True), {}),
        (adamw(torch_adam=False), {"optimizer": OptimizerConfig(name="deepspeed_adamw")}),
        ({"optimizer": {"type": "Adam", "params": {"lr": "auto"}}}, {}),
        ({"optimizer": {"type": "AdamW"}}, {}),
    ],
)
def test_optimizer_block_that_agrees_is_removed(tmp_path, content, changes):
    """The run builds its own optimizer with parameter groups, so that trainer.lr_of has effect."""
    assert "optimizer" not in read(tmp_path, content, **changes)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (
            adamw(lr=0.1),
            "adamw",
            r"optimizer\.params\.lr=0\.1 .*trainer\.lr=0\.0001\. .*trainer\.lr=0\.1\.",
        ),
        (
            adamw(betas=[0.9, 0.999]),
            "adamw",
            r"betas=\[0\.9, 0\.999\] .*trainer\.betas=\[0\.9, 0\.98\]",
        ),
        (
            adamw(weight_decay=0.1),
            "adamw",
            r"weight_decay=0\.1 .*trainer\.weight_decay=0\.0",
        ),
        (adamw(eps=1e-6), "adamw", r"optimizer\.params\.eps=1e-06 .* 1e-08 \("),
        (
            adamw(lr="1e-4"),
            "adamw",
            r"optimizer\.params\.lr='1e-4' .*quotes",
        ),
        (adamw(lr=None), "adamw", r"optimizer\.params\.lr=null "),
        (adamw(betas=["x", 0.98]), "adamw", r"betas=\['x', 0\.98\] .*numbers"),
        (adamw(betas=[0.9]), "adamw", r"betas=\[0\.9\] .*numbers"),
        (adamw(betas=[0.9, 1.5]), "adamw", r"betas=\[0\.9, 1\.5\] .*numbers"),
        (
            adamw(beta=[0.9, 0.98]),
            "adamw",
            r"optimizer\.params\.beta .*'betas'",
        ),
        (
            adamw(max_grad_norm=1.0),
            "adamw",
            r"max_grad_norm .*trainer\.gradient_clipping",
        ),
        (adamw(torch_adam=True), "deepspeed_adamw", r"torch_adam=true .* false \("),
        (
            adamw(),
            "scaled_adam",
            r"optimizer\.type='AdamW' .*trainer\.optimizer\.name=scaled_adam",
        ),
        (
            {"optimizer": {"type": "Lion"}},
            "adamw",
            r"optimizer\.type='Lion' .*trainer\.optimizer\.name=adamw",
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
            "adamw",
            r"adam_w_mode=false .* true \(",
        ),
        ({"optimizer": {"params": {"lr": 1e-4}}}, "adamw", r"optimizer\.type .*AdamW"),
        (
            zero(offload_optimizer={"device": "cpu"}) | {"zero_force_ds_cpu_optimizer": True},
            "adamw",
            r"zero_force_ds_cpu_optimizer=true .*trainer\.optimizer\.name=adamw",
        ),
    ],
)
def test_optimizer_block_that_contradicts_the_run_is_rejected(tmp_path, content, name, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, content, optimizer=OptimizerConfig(name=name))


@pytest.mark.parametrize(
    ("stage", "key", "name"),
    [(0, "grad_accum_dtype", "bf16"), (2, "param_dtype", "bf16"), (3, "param_dtype", "float16")],
)
def test_dtype_that_contradicts_the_precision_is_rejected(tmp_path, stage, key, name):
    content = zero(stage=stage) | {"data_types": {key: name}}
    with pytest.raises(UserError, match=rf"data_types\.{key}='{name}'.*trainer\.precision=fp32"):
        read(tmp_path, content, precision="fp32")


@pytest.mark.parametrize(
    ("stage", "key", "name"),
    [
        (0, "grad_accum_dtype", "float32"),
        (2, "param_dtype", "fp32"),
        (2, "grad_accum_dtype", "bf16"),
    ],
)
def test_dtype_that_deepspeed_supports_is_accepted(tmp_path, stage, key, name):
    content = zero(stage=stage) | {"data_types": {key: name}}
    assert read(tmp_path, content, precision="fp32")["data_types"] == {key: name}


def test_offload_accepts_the_optimizer_of_the_run(tmp_path):
    """By default DeepSpeed would reject torch's AdamW with offload when the model is loaded."""
    offload = zero(offload_optimizer={"device": "cpu"})
    assert read(tmp_path, offload)["zero_force_ds_cpu_optimizer"] is False
    own = read(tmp_path, offload, optimizer=OptimizerConfig(name="deepspeed_adamw"))
    assert "zero_force_ds_cpu_optimizer" not in own


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (
            0,
            {"optimizer": OptimizerConfig(name="deepspeed_adamw")},
            r"trainer\.optimizer\.name=deepspeed_adamw .*ZeRO stage 0",
        ),
        (3, {"compile": True}, r"trainer\.compile=true .*ZeRO stage 3"),
    ],
)
def test_settings_that_a_stage_does_not_support_are_rejected(tmp_path, stage, changes, message):
    ds = read(tmp_path, zero(stage=stage), **changes)
    with pytest.raises(UserError, match=message):
        check_settings(make_config(tmp_path / "mine.json", **changes), ds)


@pytest.mark.slow
def test_run_with_an_optimizer_block_has_its_own_parameter_groups(world, tmp_path):
    """DeepSpeed's optimizer would have one group, so that trainer.lr_of had no effect.

    The test also shows that torch's AdamW is accepted with offload.
    """
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    (tmp_path / "mine.json").write_text(
        json.dumps({"zero_optimization": offload} | adamw(lr="auto"))
    )
    keys = {
        "trainer__deepspeed_config": tmp_path / "mine.json",
        "trainer__lr_of__projector": 1e-2,
        "trainer__num_steps": 1,
        "trainer__precision": "fp32",
        "data__valid_data_config": "null",
    }
    assert_done(run_script("train", *world.overrides(tmp_path / "exp", **keys)))
    groups = read_manifest(tmp_path / "exp" / "checkpoint-1")["param_groups"]
    parts = [set(map(part_of, group)) for group in groups]
    assert all(len(part) == 1 for part in parts)
    assert set().union(*parts) == {"projector", "lora"}


def test_file_for_the_transformers_trainer_is_filled_in(tmp_path):
    own = {
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": "auto",
                "betas": "auto",
                "eps": "auto",
                "weight_decay": "auto",
                "torch_adam": True,
            },
        },
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "sub_group_size": 1e9,
        },
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    }
    ds = read(tmp_path, own, world_size=2)
    assert "optimizer" not in ds
    assert ds["train_batch_size"] == 2
    assert ds["gradient_clipping"] == 1.0
    assert ds["bf16"]["enabled"] is True
    assert ds["zero_optimization"]["reduce_bucket_size"] == 50_000_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="float16 works on a GPU")
def test_fp16_is_rejected_on_a_device_without_it(tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(UserError, match=r"trainer\.precision=fp16 .*\(cpu\)"):
        read_ds_config(make_config(tmp_path / "mine.json", precision="fp16"), world_size=1)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_value_that_is_not_a_json_number_is_named(tmp_path, value):
    with pytest.raises(UserError, match=f"mine.json.* {value} "):
        read(tmp_path, f'{{"gradient_clipping": {value}}}')


def test_division_of_gradients_can_be_changed_without_zero(tmp_path):
    keys = {"prescale_gradients": True, "gradient_predivide_factor": 2.0}
    found = read(tmp_path, {"zero_optimization": {"stage": 0}} | keys)
    assert found.items() >= keys.items()
