"""Load LLMs under ZeRO-3 in two processes."""

import json
import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from asrllm.testing import tiny_llm
from tests.training.small_engine import start

pytestmark = pytest.mark.slow
DS = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
}


def load(folders: list[str], out: str) -> None:
    """Return, in every process, its partitions of each LLM and the gathered weights."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    from asrllm import distributed
    from asrllm.errors import UserError
    from asrllm.models.pretrained import pretrained_llm

    alive = HfDeepSpeedConfig(DS)
    report = []
    for number, folder in enumerate(folders):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            llm = pretrained_llm(folder, torch.bfloat16)
        except UserError as error:
            report.append({"error": str(error)})
            continue
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        held = sum(p.ds_tensor.nbytes for p in llm.parameters())
        report.append({"held": held, "grown": grown, "eos": llm.generation_config.eos_token_id})
        if number < 2:
            names = [name for name, _ in llm.named_parameters()]
            with deepspeed.zero.GatheredParameters(list(llm.parameters())):
                if distributed.rank() == 0:
                    torch.save(
                        {
                            n: p.detach().clone()
                            for n, p in zip(names, llm.parameters(), strict=True)
                        },
                        f"{out}/{number}.pt",
                    )
    (Path(out) / f"rank{distributed.rank()}.json").write_text(json.dumps(report))
    del alive


def test_every_rank_reads_only_its_partition(tmp_path):
    tied, untied, large, cut, odd = (
        tmp_path / name for name in ("tied", "untied", "large", "cut", "odd")
    )
    tiny_llm(tied)
    tiny_llm(untied, seed=1, tied=False)
    config = Qwen2Config(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=40000,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(large, max_shard_size="60MB")
    for folder, change in (
        (cut, lambda s: s.pop("model.norm.weight")),
        (odd, lambda s: s.update({"model.norm.weight": torch.ones(31)})),
    ):
        tiny_llm(folder, seed=2)
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    folders = [tied, untied, large, cut, odd]
    start(
        "models.test_zero3_loading:load",
        2,
        folders=[str(f) for f in folders],
        out=str(tmp_path),
        timeout=150,
    )
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for number, folder in enumerate((tied, untied)):
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        found = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert found.keys() == dict(expected.named_parameters()).keys()
        for name, parameter in expected.named_parameters():
            assert torch.equal(found[name], parameter), name
    total = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    for rank in ranks:
        assert rank[2]["held"] == pytest.approx(total / 2, rel=0.01)
        assert rank[2]["grown"] < 1.2 * total  # its half, twice: while it is read, and in the model
        assert (
            rank[0]["eos"]
            == AutoModelForCausalLM.from_pretrained(tied).generation_config.eos_token_id
        )
        assert "missing key 'model.norm.weight'" in rank[3]["error"]
        assert "'model.norm.weight' in" in rank[4]["error"]
        assert re.search(r"\[31\].*\[32\]", rank[4]["error"])
