"""The adapters of the LLM merged into it, from files, a weight at a time; or by themselves, in PEFT's form."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from asrllm.errors import UserError
from asrllm.models.auto import AutoModel, newest_weights, read_state
from asrllm.models.configuration import AsrLlmConfig
from asrllm.models.description import read_config
from asrllm.models.files import (
    as_dtype,
    base_path,
    is_base,
    merged_names,
    merged_parameter,
    parameters_on_meta,
    rank_in_file,
    weight_files,
    with_ranks,
)
from asrllm.models.fingerprint import resolve_pretrained
from asrllm.models.fingerprint import weight_files as base_files
from asrllm.models.model import AsrLlmModel
from asrllm.models.names import is_adapter, plain_name
from asrllm.models.parts import empty_llm, lora_config, pretrained_llm
from asrllm.tensor_files import Spec, TensorSource, write_sharded
from asrllm.writing import new_folder

LLM = "llm."
CHECKED = "The quick brown fox jumps over the lazy dog, and 17 others watch it."


class Parity(NamedTuple):
    """Logits (T, V) before and after merging: the largest difference, the largest of them, at how many of T the same word is first."""

    difference: float
    largest: float
    same: int
    tokens: int


class LlmFiles:
    """What a run, or an exported directory, and the base model say of the LLM; weights are read when they are wanted.

    source: an exp_dir, a weights file in one, or an exported directory. Raises UserError where it has no adapters on the LLM.
    """

    def __init__(self, source: Path, weights: Path | None = None) -> None:
        self.folder = source.parent if source.is_file() else source
        self.config = read_config(self.folder)
        if not self.config.lora:
            raise UserError(f"{str(source)!r} has no adapters on its LLM: 'asrllm export' writes it as it is")
        exported = weights is None and source.is_dir() and any(source.glob("model*.safetensors*"))
        self.weights = None if exported else (source if source.is_file() else weights or newest_weights(source))
        self.where: dict[str, Path | Tensor] = {}
        if self.weights is None:
            self._note(weight_files(source), prefix="")
        else:
            self.where = {_name(key): tensor for key, tensor in read_state(self.weights).items() if key.startswith(LLM)}
        self.model = self._model()
        if lost := [key for key in self._lacking() if is_adapter(key)]:
            raise UserError(f"the weights {str(self.weights or self.folder)!r} lack {lost[0]!r}: give those of a whole run")
        self.base = Path(resolve_pretrained(base_path(self.config, "llm"))) if self._lacking() else None
        if self.base is not None:
            self._note(base_files(self.base), prefix=LLM)
            if self._lacking():  # transformers renames keys of this family
                llm = pretrained_llm(str(self.base), as_dtype((self.config.llm or {}).get("dtype")) or torch.bfloat16)
                self.where = {LLM + key: tensor for key, tensor in llm.state_dict().items()} | self.where

    def _note(self, files: list[Path], prefix: str) -> None:
        for file in files:
            if file.suffix != ".safetensors":
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                self.where = {prefix + key: tensor for key, tensor in found.items()} | self.where
                continue
            with safe_open(file, "pt") as tensors:
                self.where = {_name(prefix + key): file for key in tensors.keys()} | self.where  # noqa: SIM118

    def _model(self) -> AsrLlmModel:
        """Without memory for its weights; its adapters have the rank of the file's."""
        adapters = {key: self.read(key) for key in self.where if is_adapter(key)}
        with parameters_on_meta():
            model = AsrLlmModel(self.config, llm=empty_llm(self.config.llm or {}))
            self.config = with_ranks(self.config, rank_in_file(model, adapters))
            self.config.exclude_from_checkpoint = None
            return AsrLlmModel(self.config, llm=empty_llm(self.config.llm or {}))

    def _lacking(self) -> list[str]:
        return [key for key in self.model.weights() if key.startswith(LLM) and _name(key) not in self.where]

    def read(self, name: str) -> Tensor:
        place = self.where[name]
        if isinstance(place, Tensor):
            return place
        with safe_open(place, "pt") as tensors:
            key = next(key for key in tensors.keys() if _name(key) == name or LLM + key == name)  # noqa: SIM118
            return tensors.get_tensor(key).clone()


def _name(key: str) -> str:
    return key if is_adapter(key) else plain_name(key)


def merged_llm(files: LlmFiles, dtype: torch.dtype | None = None) -> TensorSource:
    """The LLM's weights by transformers' names, its adapters in it, each in the dtype of the base or in `dtype`."""
    weights, tuned = merged_names(files.model, {key: t for key, t in files.model.weights().items() if key.startswith(LLM)})
    layers = {layer: name for name, layer in files.model.named_modules()}

    def read(name: str) -> Tensor:
        key = LLM + name
        if key not in tuned:
            return files.read(key)
        layer = copy.deepcopy(tuned[key])
        prefix = layers[tuned[key]]
        state = {p: f"{prefix}.{p}" for p, _ in layer.named_parameters()}
        layer.load_state_dict({p: files.read(plain_name(k) if is_base(k, prefix) else k) for p, k in state.items()}, assign=True)
        return merged_parameter(layer, key.rpartition(".")[2])

    def pieces(name: str) -> Iterator[Tensor]:
        yield read(name).to(specs[name].dtype).flatten()

    kept = {key.removeprefix(LLM): tensor for key, tensor in weights.items()}
    kind = dtype or files.read(next(iter(weights))).dtype
    specs = {name: Spec(tuple(t.shape), kind if t.is_floating_point() else t.dtype) for name, t in kept.items()}
    return TensorSource(specs, pieces)


def merge_lora(files: LlmFiles, output: Path, *, dtype: str | None = None, max_shard_size: int | str = "5GB") -> None:
    """Write a plain directory of the LLM, which transformers loads without this package; it appears when it is complete."""
    with new_folder(output) as partial:
        source = merged_llm(files, as_dtype(dtype))
        write_sharded(source, partial, max_shard_size=max_shard_size)
        config = AutoConfig.for_model(**(files.config.llm or {}))
        config.dtype = next(spec.dtype for spec in source.specs.values() if spec.dtype.is_floating_point)
        config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
        config.save_pretrained(partial)
        home = files.base or files.folder
        AutoTokenizer.from_pretrained(home).save_pretrained(partial)
        if (home / "generation_config.json").is_file():
            shutil.copyfile(home / "generation_config.json", partial / "generation_config.json")


def save_adapter(files: LlmFiles, output: Path) -> None:
    """Write the adapters in PEFT's own form: PeftModel.from_pretrained(base LLM, output)."""
    with new_folder(output) as partial:
        names = [key for key in files.where if is_adapter(key) and key.startswith(LLM)]
        state = {key.removeprefix(LLM).replace(".default", ""): files.read(key).contiguous() for key in names}
        save_file(state, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        about = {"task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": (_base(files.config) or {}).get("path")}
        lora_config(files.config.lora or {}, **about).save_pretrained(partial)


def _base(config: AsrLlmConfig) -> dict[str, Any] | None:
    return (config.base_models or {}).get("llm")


@torch.no_grad()
def check_parity(files: LlmFiles, merged: Path) -> Parity:
    """Both LLMs, one after the other, in memory. Raises UserError where they differ by more than rounding."""
    tokens = AutoTokenizer.from_pretrained(merged)(CHECKED, return_tensors="pt").input_ids
    llm = AutoModelForCausalLM.from_pretrained(merged).eval()
    after = llm(input_ids=tokens).logits[0].float()
    kind = llm.dtype
    del llm
    before = AutoModel.from_pretrained(files.folder, weights=files.weights, dtype=kind).llm.eval()(input_ids=tokens).logits[0].float()
    same = int((after.argmax(-1) == before.argmax(-1)).sum())
    found = Parity(float((after - before).abs().max()), float(before.abs().max()), same, len(before))
    if not found.difference <= (1e-3 if kind == torch.float32 else 0.1) * found.largest:
        what = f"off by {found.difference:.3g} of {found.largest:.3g}"
        raise UserError(f"the merged LLM in {str(merged)!r} gives other logits ({what}): do not use it")
    return found
