"""The LLM with its adapters in it, and the adapters alone, as others load them."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from asrllm.checkpoints.merge import LlmFiles, check_parity, merge_lora, save_adapter
from asrllm.errors import UserError
from tests.conftest import clean_environment
from tests.models.test_files import family_llm, lora_model
from tests.models.test_model import make_model

IDS = torch.tensor([[3, 5, 17, 100, 7, 9]])
ALONE = "import sys, transformers; print(type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"


@torch.no_grad()
def logits(llm):
    return llm(input_ids=IDS).logits


def run_of(model, folder):
    """What training leaves in an exp_dir: the description, and the trained weights by themselves."""
    model.require_processor().save_pretrained(folder)
    model.config.save_pretrained(folder)
    state = {name: tensor for name, tensor in model.weights().items() if "lora_" in name or name.startswith("projector")}
    torch.save(state, folder / "pretrained.pt")
    return folder


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_a_merged_llm_is_a_plain_one(world, tmp_path, options):
    model = lora_model(world, **options)
    exp = run_of(model, tmp_path / "exp")
    for source in (exp, exp / "pretrained.pt"):
        files = LlmFiles(source)
        out = tmp_path / "out" / source.name
        merge_lora(files, out, max_shard_size="20KB")
        assert len(list(out.glob("model-*.safetensors"))) > 1
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model.llm), rtol=1e-4, atol=1e-4)
        found = check_parity(files, out)
        assert (found.same, found.difference < 1e-3) == (found.tokens, True)
    environment = clean_environment()
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", ALONE, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, cwd=tmp_path)
    assert "Qwen2ForCausalLM" in done.stdout, done.stderr


@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_model_of_another_family_is_merged_too(world, tmp_path, tied):
    llm = family_llm(tmp_path / "llm", "llama", tied=tied)
    model = make_model(world, llm={"model_type": "llama", "pretrained_model": str(llm)})
    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    merge_lora(LlmFiles(tmp_path / "saved"), tmp_path / "merged", dtype="bfloat16")
    low = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    merge_lora(LlmFiles(tmp_path / "saved"), tmp_path / "exact")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "exact")), logits(model.llm), rtol=1e-4, atol=1e-4)


def test_adapters_alone_are_pefts(world, tmp_path):
    model = lora_model(world)
    files = LlmFiles(run_of(model, tmp_path / "exp"))
    save_adapter(files, tmp_path / "adapter")
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs), logits(model.llm))


def test_factors_of_several_checkpoints_are_merged_at_their_rank(world, tmp_path):
    model = lora_model(world)
    exp = run_of(model, tmp_path / "exp")
    state = torch.load(exp / "pretrained.pt", weights_only=True)
    for name in state:
        if "lora_" in name:  # the mean of the model with itself
            state[name] = torch.cat([state[name]] * 2, dim=0 if "lora_A" in name else 1)
    torch.save(state, exp / "averaged-iter-2-avg-2.pt")
    files = LlmFiles(exp / "averaged-iter-2-avg-2.pt")
    merge_lora(files, tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model.llm), rtol=1e-4, atol=1e-4)
    save_adapter(files, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.llm), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs), logits(model.llm), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_merged_is_said(world, tmp_path):
    plain = make_model(world, llm={"lora": None})
    with pytest.raises(UserError, match="has no adapters on its LLM"):
        LlmFiles(run_of(plain, tmp_path / "plain"))
    exp = run_of(lora_model(world), tmp_path / "exp")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="is not empty"):
        merge_lora(LlmFiles(exp), tmp_path / "full")
    state = torch.load(exp / "pretrained.pt", weights_only=True)
    state.pop(next(name for name in state if "lora_A" in name))
    torch.save(state, exp / "pretrained.pt")
    with pytest.raises(UserError, match="lora_A"):
        merge_lora(LlmFiles(exp), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
