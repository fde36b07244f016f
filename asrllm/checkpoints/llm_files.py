"""The files that hold an LLM and its adapters: those of a run or an export, and the base model's."""

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asrllm.errors import UserError
from asrllm.models.asr_llm.checks import read_config
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.asr_llm.serialization import (
    as_dtype,
    check_stored,
    is_base_layer,
    merged_names,
    open_tensors,
    parameters_on_meta,
    rank_multiple,
    weight_files,
    with_rank_multiple,
)
from asrllm.models.auto import load_state, newest_weights, read_state
from asrllm.models.base_models import BasePaths, base_paths, move_base_models
from asrllm.models.fingerprint import pretrained_weight_files, resolve_pretrained
from asrllm.models.pretrained import empty_llm, pretrained_llm
from asrllm.models.state_dict import check_state, is_adapter, plain_name

LLM = "llm."


class Places:
    """Tensors by name, read from their files when they are wanted. meta: their shapes and dtypes, by the same names."""

    def __init__(self) -> None:
        self.where: dict[str, tuple[Path, str] | Tensor] = {}
        self.meta: dict[str, Tensor] = {}

    def add_file(self, file: Path, name_of: Callable[[str], str]) -> None:
        """What is there already, by names of the file's keys, stays."""
        if file.suffix != ".safetensors":
            self.add(load_state(file, mapped=True), name_of)
            return
        with open_tensors(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                self._add(name_of(key), (file, key), tensors.get_tensor(key))

    def add(self, state: Mapping[str, Tensor], name_of: Callable[[str], str]) -> None:
        for key, tensor in state.items():
            self._add(name_of(key), tensor, tensor)

    def _add(self, name: str, place: tuple[Path, str] | Tensor, tensor: Tensor) -> None:
        if name not in self.where:
            self.where[name], self.meta[name] = place, tensor.to("meta")

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """dtype: its own when None."""
        place = self.where[name]
        if isinstance(place, Tensor):
            return place.to(dtype or place.dtype)
        with open_tensors(place[0]) as tensors:
            tensor = tensors.get_tensor(place[1])
            return tensor.to(dtype or tensor.dtype, copy=True)


class LlmFiles:
    """What a run, or an exported directory, and the base model say of the LLM; weights are read when they are wanted.

    source: an exp_dir, a weights file in one, or an exported directory. base_models: as for AutoModel. Raises UserError where it has no
    adapters on the LLM, and where its weights hold other ones than its configuration describes.
    """

    def __init__(
        self,
        source: Path,
        weights: Path | None = None,
        *,
        base_models: BasePaths | None = None,
    ) -> None:
        self.folder = source.parent if source.is_file() else source
        self.config = read_config(self.folder)
        move_base_models(self.config, base_models, where=str(self.folder))
        if not self.config.lora:
            raise UserError(
                f"{str(source)!r} has no adapters on its LLM: 'asrllm export' writes it as it is"
            )
        exported = weights is None and source.is_dir() and any(source.glob("model*.safetensors*"))
        self.weights = (
            None
            if exported
            else (source if source.is_file() else weights or newest_weights(source))
        )
        self.places = self._own_places()
        self.model = self._model()
        expected = {
            stored_name(key): tensor
            for key, tensor in self.model.weights().items()
            if key.startswith(LLM)
        }
        own = {name: tensor for name, tensor in self.places.meta.items() if name.startswith(LLM)}
        where, mend = (
            f"the weights of {str(self.weights or self.folder)!r}",
            f"They do not match {str(self.folder / 'config.json')!r}.",
        )
        check_state(
            own, expected, where, mend, needed=[name for name in expected if is_adapter(name)]
        )
        if self.weights is not None:
            check_stored(
                self.config, "llm", sum(not is_adapter(name) for name in own), str(self.folder)
            )
        self.own_llm = self.weights is not None and not all(
            map(is_adapter, own)
        )  # trained beside the adapters, or in a stage before
        self.base: Path | None = None
        if expected.keys() - own.keys():
            self.base = resolve_pretrained(base_paths(self.config, ["llm"])["llm"])
            self._add_base(self.base, expected)

    def _own_places(self) -> Places:
        places = Places()
        if self.weights and (
            self.weights.suffix == ".json" or not self.weights.is_file()
        ):  # several files, or none
            places.add(read_state(self.weights), stored_name)
            return places
        for file in [self.weights] if self.weights else weight_files(self.folder):
            places.add_file(file, stored_name)
        return places

    def _add_base(self, base: Path, expected: Mapping[str, Tensor]) -> None:
        for file in pretrained_weight_files(base):
            self.places.add_file(file, lambda key: LLM + key)
        if expected.keys() - self.places.meta.keys():  # transformers renames keys of this family
            llm = pretrained_llm(
                str(base), as_dtype((self.config.llm or {}).get("dtype")) or torch.bfloat16
            )
            self.places.add(llm.state_dict(), lambda key: LLM + key)

    def _model(self) -> AsrLlmModel:
        """Without memory for its weights; its adapters have the rank of the file's."""
        with parameters_on_meta():
            model = AsrLlmModel(
                self.config, llm=empty_llm(self.config.llm or {}, where=self.folder)
            )
            self.times = rank_multiple(model, self.places.meta)
            self.config = with_rank_multiple(self.config, self.times)
            self.config.exclude_from_checkpoint = None
            return AsrLlmModel(self.config, llm=empty_llm(self.config.llm or {}, where=self.folder))

    @property
    def rank(self) -> int:
        """The largest of the adapters'."""
        options = self.config.lora or {}
        return max(
            [options.get("r", 8), *(options.get("rank_pattern") or {}).values()]
        )  # PEFT's default

    @cached_property
    def merged(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As merged_names: the LLM's weights without adapters, and which of them adapters change, with their layers."""
        return merged_names(
            self.model, {key: t for key, t in self.model.weights().items() if key.startswith(LLM)}
        )

    def layer(self, key: str) -> Any:
        """The layer whose adapters change the weight `key`, in eval mode, with its weights and its adapters'."""
        empty = self.merged[1][key]
        prefix = next(name for name, module in self.model.named_modules() if module is empty)
        layer = copy.deepcopy(empty).eval()
        names = {name: f"{prefix}.{name}" for name, _ in layer.named_parameters()}
        state = {
            name: self.places.read(plain_name(full) if is_base_layer(full, prefix) else full)
            for name, full in names.items()
        }
        layer.load_state_dict(state, assign=True)
        return layer


def stored_name(key: str) -> str:
    return key if is_adapter(key) else plain_name(key)
