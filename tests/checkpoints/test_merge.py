"""Merged LLMs load with plain transformers, and saved adapters load with PEFT."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from asrllm.checkpoints.export import export
from asrllm.checkpoints.llm_files import LlmFiles
from asrllm.checkpoints.merge import merge_lora, save_adapter
from asrllm.commands.dispatch import main
from asrllm.errors import CorruptedError, UserError
from asrllm.models.asr_llm.loading import is_base_weight
from asrllm.models.asr_llm.merging import merged_parameter
from asrllm.models.auto import AutoModel
from tests.conftest import clean_environment
from tests.models.asr_llm.test_modeling import make_model
from tests.models.asr_llm.test_serialization import family_llm, lora_model

IDS = torch.tensor([[3, 5, 17, 100, 7, 9]])
LAST = "llm.model.layers.1.self_attn.v_proj.weight"
LOAD_WITH_TRANSFORMERS = """
import sys, transformers
print(type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
"""


@torch.no_grad()
def logits(llm):
    return llm(input_ids=IDS).logits


def run_of(model, folder):
    """Write the files of a run: configuration and trained weights, without the base model."""
    model.require_processor().save_pretrained(folder)
    model.config.save_pretrained(folder)
    state = {
        name: tensor
        for name, tensor in model.weights().items()
        if "lora_" in name or name.startswith("projector")
    }
    torch.save(state, folder / "pretrained.pt")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}]
)
def test_merged_llm_loads_with_plain_transformers(world, tmp_path, options):
    model = lora_model(world, **options)
    exp = run_of(model, tmp_path / "exp")
    for source in (exp, exp / "pretrained.pt"):
        files = LlmFiles(source)
        out = tmp_path / "out" / source.name
        found = merge_lora(files, out, max_shard_size="20KB")
        assert len(list(out.glob("model-*.safetensors"))) > 1
        torch.testing.assert_close(
            logits(AutoModelForCausalLM.from_pretrained(out)),
            logits(model.llm),
            rtol=1e-4,
            atol=1e-4,
        )
        assert (found.same, found.difference < 1e-5 < found.change) == (found.tokens, True)
    if options:
        return
    environment = clean_environment()
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", LOAD_WITH_TRANSFORMERS, str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, cwd=tmp_path
    )
    assert "Qwen2ForCausalLM" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_llm_of_an_exported_llama_model_is_merged(world, tmp_path, tied):
    llm = family_llm(tmp_path / "llm", "llama", tied=tied)
    model = make_model(world, llm={"model_type": "llama", "pretrained_model": str(llm)})
    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    merge_lora(LlmFiles(tmp_path / "saved"), tmp_path / "merged", dtype="bfloat16")
    low = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    merge_lora(LlmFiles(tmp_path / "saved"), tmp_path / "exact")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "exact")),
        logits(model.llm),
        rtol=1e-4,
        atol=1e-4,
    )


def test_saved_adapter_loads_with_peft(world, tmp_path):
    model = lora_model(world)
    files = LlmFiles(run_of(model, tmp_path / "exp"))
    save_adapter(files, tmp_path / "adapter")
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    ).eval()
    torch.testing.assert_close(logits(theirs), logits(model.llm))


def test_full_disk_while_writing_adapters_exits_and_leaves_nothing(
    world, tmp_path, monkeypatch, capsys
):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    exp = run_of(lora_model(world), tmp_path / "exp")
    monkeypatch.setattr("asrllm.tensor_files._bytes_of", full)
    assert (
        main(["merge-lora", str(exp), "--adapter-only", "--output", str(tmp_path / "adapter")]) == 2
    )
    error = capsys.readouterr().err
    assert os.strerror(errno.ENOSPC) in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["exp"]


def test_adapters_of_a_trained_llm_are_not_saved_alone(world, tmp_path):
    model = lora_model(world)
    exp = run_of(model, tmp_path / "exp")
    torch.save(model.weights(), exp / "pretrained.pt")
    files = LlmFiles(exp)
    with pytest.raises(UserError, match=rf"'{exp}/pretrained\.pt' .*--adapter-only"):
        save_adapter(files, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    merge_lora(files, tmp_path / "merged")
    settings = "generation_config.json"
    assert (tmp_path / "merged" / settings).read_bytes() == (world.llm / settings).read_bytes()


def test_missing_inherited_llm_is_not_replaced_by_the_base_model(world, tmp_path):
    model = lora_model(world)
    model.config.stored = {"llm": sum(is_base_weight(name, "llm") for name in model.weights())}
    exp = run_of(model, tmp_path / "exp")  # what zero_to_fp32.py makes of it
    (exp / "inherited_weights.pt").touch()
    with pytest.raises(
        UserError,
        match=rf"'{exp}' .* 0 .*llm.* 26\b.*'asrllm consolidate' .*inherited_weights\.pt",
    ):
        LlmFiles(exp)
    torch.save(model.weights(), exp / "pretrained.pt")
    LlmFiles(exp)


def test_merged_llm_has_the_chat_template_of_training(world, tmp_path):
    model = lora_model(world)
    model.require_processor().tokenizer.chat_template = "{{ messages[0]['content'] }}"
    merge_lora(LlmFiles(run_of(model, tmp_path / "exp")), tmp_path / "merged", check=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(world.llm).get_vocab()


def test_averaged_factors_are_merged_with_their_higher_rank(world, tmp_path, capsys):
    model = lora_model(world)
    exp = run_of(model, tmp_path / "exp")
    state = torch.load(exp / "pretrained.pt", weights_only=True)
    for name in state:
        if "lora_" in name:  # the average of the model with itself
            state[name] = torch.cat([state[name]] * 2, dim=0 if "lora_A" in name else 1)
    torch.save(state, exp / "averaged-iter-2-avg-2.pt")
    files = LlmFiles(exp / "averaged-iter-2-avg-2.pt")
    merge_lora(files, tmp_path / "merged")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")),
        logits(model.llm),
        rtol=1e-4,
        atol=1e-4,
    )
    adapter = tmp_path / "adapter"
    averaged = str(exp / "averaged-iter-2-avg-2.pt")
    assert main(["merge-lora", averaged, "--adapter-only", "--output", str(adapter)]) == 0
    printed = capsys.readouterr().out
    assert "rank 8" in printed
    assert "2 averaged checkpoints" in printed
    assert "max_lora_rank=8" in printed
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(world.llm), adapter
    ).eval()
    torch.testing.assert_close(logits(theirs), logits(model.llm), rtol=1e-4, atol=1e-4)


def test_models_that_cannot_be_merged_are_reported(world, tmp_path):
    plain = make_model(world, llm={"lora": None})
    with pytest.raises(UserError, match=rf"'{tmp_path}/plain' .*'asrllm export'"):
        LlmFiles(run_of(plain, tmp_path / "plain"))
    exp = run_of(lora_model(world), tmp_path / "exp")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match=f"--output '{tmp_path}/full' "):
        merge_lora(LlmFiles(exp), tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]
    state = torch.load(exp / "pretrained.pt", weights_only=True)
    missing = first_of(state, "lora_A")
    del state[missing]
    torch.save(state, exp / "pretrained.pt")
    with pytest.raises(UserError, match=re.escape(repr(missing))):
        merge_lora(LlmFiles(exp), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def low_base(world, folder, *kept):
    """Write a base LLM in bfloat16, except weights whose names contain one of `kept`."""
    shutil.copytree(world.llm, folder)
    state = load_file(folder / "model.safetensors")
    state = {
        name: tensor if any(part in name for part in kept) else tensor.bfloat16()
        for name, tensor in state.items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"dtype": "bfloat16"}))
    return folder


def run_on(llm, world, folder, std=0.1):
    """Write a run on another base LLM, with adapters of this standard deviation."""
    model = make_model(world, llm={"pretrained_model": str(llm)})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return run_of(model, folder)


def test_merged_weights_keep_their_dtype_and_are_rounded_once(world, tmp_path):
    exp = run_on(low_base(world, tmp_path / "llm", "norm"), world, tmp_path / "exp")
    merge_lora(LlmFiles(exp), tmp_path / "merged")
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert tensor.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    merge_lora(LlmFiles(exp), tmp_path / "exact", dtype="float32")
    weight = load_file(tmp_path / "exact" / "model.safetensors")[
        "model.layers.0.self_attn.q_proj.weight"
    ]
    assert not torch.equal(weight, weight.bfloat16().float()), "it went through bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
@pytest.mark.parametrize("std", [0.1, 0.003])
def test_unmerged_layer_is_detected(world, tmp_path, monkeypatch, dtype, std):
    files = LlmFiles(run_on(low_base(world, tmp_path / "llm"), world, tmp_path / "exp", std))
    found = merge_lora(files, tmp_path / "good", dtype=dtype)
    assert found.difference < found.change
    whole = merged_parameter

    def half_done(layer, name, kind):
        last = layer.out_features == 16 and torch.equal(
            layer.get_base_layer().weight, files.tensors.read(LAST)
        )
        return layer.get_base_layer().weight.detach().to(kind) if last else whole(layer, name, kind)

    monkeypatch.setattr("asrllm.checkpoints.merge.merged_parameter", half_done)
    with pytest.raises(UserError, match=f"'{re.escape(LAST)}' .*--dtype float32"):
        merge_lora(files, tmp_path / "bad", dtype=dtype, check=False)
    assert not (tmp_path / "bad").exists()


def test_unmerged_llm_is_detected_by_its_logits(world, tmp_path, monkeypatch):
    files = LlmFiles(run_on(low_base(world, tmp_path / "llm"), world, tmp_path / "exp"))
    monkeypatch.setattr(
        "asrllm.checkpoints.merge.merged_parameter",
        lambda layer, name, kind: layer.get_base_layer().weight.to(kind),
    )
    monkeypatch.setattr("asrllm.checkpoints.merge.check_layers", lambda *_: None)
    with pytest.raises(UserError, match=r"torch\.bfloat16 .*--dtype float32.*--adapter-only"):
        merge_lora(files, tmp_path / "bad")
    assert [path.name for path in tmp_path.iterdir() if "bad" in path.name] == []


@pytest.mark.slow
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite_are_not_used(world, tmp_path, value):
    model = make_model(world)
    exported = tmp_path / "exported"
    exp = run_of(model, tmp_path / "exp")
    names = []

    def spoil(state):
        names.append(first_of(state, "lora_A"))
        state[names[0]].view(-1)[-1] = float(value)

    change_weights(exp, spoil)
    file = exp / "pretrained.pt"
    model.save_pretrained(exported)
    state = load_file(exported / "model.safetensors")
    spoil(state)
    save_file(state, exported / "model.safetensors", metadata={"format": "pt"})
    uses = {
        file: (LlmFiles, AutoModel.from_pretrained, partial(export, output=tmp_path / "out")),
        exported / "model.safetensors": (LlmFiles, AutoModel.from_pretrained),
    }
    for weights, functions in uses.items():
        for use in functions:
            with pytest.raises(UserError) as caught:
                use(weights.parent)
            assert repr(names[0]) in str(caught.value)
            assert repr(str(weights)) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exp", "exported"]


def change_weights(exp, change):
    state = torch.load(exp / "pretrained.pt", weights_only=True)
    change(state)
    torch.save(state, exp / "pretrained.pt")


def first_of(state, part):
    return next(name for name in state if part in name)


def more_rows(state, count):
    name = first_of(state, "lora_B")
    state[name] = state[name][:count].clone()


CHANGES = {
    "a factor of other rows": (
        lambda state: more_rows(state, 31),
        r"'llm\..*lora_B\..*\(31, 4\).*\(32, 4\)",
    ),
    "another rank": (
        lambda state: state.update({k: t[:3].clone() for k, t in state.items() if "lora_A" in k}),
        r"'llm\..*lora_A\..*\(3, 32\).*\(4, 32\)",
    ),
    "a layer more": (
        lambda state: state.update({k.replace(".1.", ".7."): t for k, t in state.items()}),
        r" 4 .*'llm\..*layers\.7\.",
    ),
    "a key of nothing": (
        lambda state: state.update({"llm.model.bogus.weight": torch.ones(1)}),
        r" 1 .*'llm\.model\.bogus\.weight'",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_adapters_that_do_not_match_the_configuration_are_rejected(world, tmp_path, change):
    exp = run_of(make_model(world), tmp_path / "exp")
    change_weights(exp, CHANGES[change][0])
    with pytest.raises(UserError, match=CHANGES[change][1]):
        LlmFiles(exp)


def test_adapters_missing_from_the_configuration_are_rejected(world, tmp_path):
    exp = run_of(make_model(world), tmp_path / "exp")
    fields = json.loads((exp / "config.json").read_text())
    fields["lora"]["target_modules"] = ["q_proj"]
    (exp / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=rf"'{exp}/pretrained\.pt' .* 4 .*v_proj"):
        LlmFiles(exp)


def test_truncated_shard_is_reported(world, tmp_path):
    make_model(world).save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    shard = min((tmp_path / "saved").glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CorruptedError, match=re.escape(repr(str(shard)))):
        LlmFiles(tmp_path / "saved")
