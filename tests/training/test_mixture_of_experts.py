"""Training with an LLM whose layers are mixtures of experts."""

import json

import pytest
import torch
import transformers

from asrllm.testing import tiny_tokenizer
from tests.conftest import REPOSITORY
from tests.processes import assert_done, run_forked

pytestmark = pytest.mark.slow
EXPERTS = 512  # more than a batch has tokens, so that most of them get none


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """Write a Qwen3-MoE of two layers whose tokens use one expert each."""
    folder = tmp_path_factory.mktemp("experts")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        num_experts=EXPERTS,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def losses(world, llm, exp, stage, **more):
    """Return the losses of a run of two ranks."""
    overrides = world.overrides(
        exp,
        model__llm__model_type="qwen3_moe",
        model__llm__pretrained_model=llm,
        trainer__precision="fp32",
        trainer__num_steps=4,
        trainer__save_every=2,
        trainer__deepspeed_config=f"ds_configs/zero{stage}.json",
        **more,
    )
    assert_done(run_forked([REPOSITORY / "launch" / "train.py", *overrides], ranks=2))
    records = [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize(
    "parts", [{}, {"model__llm__frozen": "false", "model__llm__lora__r": 0}], ids=["lora", "full"]
)
def test_losses_are_those_of_every_stage_when_experts_get_no_token(world, llm, tmp_path, parts):
    expected = losses(world, llm, tmp_path / "0", 0, **parts)
    assert len(expected) == 4
    assert expected[-1] < expected[0]
    for stage in (2, 3):
        found = losses(world, llm, tmp_path / str(stage), stage, **parts)
        assert found == pytest.approx(expected, rel=1e-5)
