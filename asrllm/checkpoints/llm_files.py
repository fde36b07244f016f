"""The files with an LLM and its adapters: those of a run or an export, and the base model's."""

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from asrllm.errors import UserError
from asrllm.models.asr_llm.checks import read_config
from asrllm.models.asr_llm.loading import (
    PEFT_DEFAULT_RANK,
    check_stored,
    rank_multiple,
    with_rank_multiple,
)
from asrllm.models.asr_llm.merging import is_base_layer, merged_names
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.asr_llm.placement import as_dtype
from asrllm.models.asr_llm.weight_files import weight_files
from asrllm.models.auto import chosen_weights, load_state, read_state
from asrllm.models.base_models import BasePaths, base_paths, move_base_models
from asrllm.models.fingerprint import pretrained_weight_files, resolve_pretrained
from asrllm.models.meta_device import parameters_on_meta
from asrllm.models.plain_tensors import open_tensors
from asrllm.models.pretrained import NOT_FINITE_BASE, empty_llm, pretrained_llm
from asrllm.models.state_dict import DIVERGED, check_finite, check_state, is_adapter, plain_name

LLM = "llm."


class SafetensorsKey(NamedTuple):
    """A tensor in a safetensors file."""

    file: Path
    key: str


class LazyTensors:
    """Tensors by name, which are read from their files on request.

    Attributes:
        sources: where each tensor is: in a safetensors file, or mapped into memory.
        meta: tensors on the meta device with the same names, shapes and dtypes.
    """

    def __init__(self) -> None:
        self.sources: dict[str, SafetensorsKey | Tensor] = {}
        self.meta: dict[str, Tensor] = {}

    def add_file(
        self, file: Path, name_of: Callable[[str], str], *, fix: str | None = None
    ) -> None:
        """Add the tensors of a file, except those whose names are already known.

        Args:
            file: a safetensors file, or a state dict of torch.save.
            name_of: returns the name for a key of the file.
            fix: the end of the error message if a weight is not finite; None: this is not checked.

        Raises:
            UserError: the file cannot be read, or a weight is not finite.
        """
        if file.suffix != ".safetensors":
            state = load_state(file, mapped=True)
            for key, tensor in state.items():
                if fix is not None:
                    check_finite(key, tensor, file, fix)
            self.add(state, name_of)
            return
        with open_tensors(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                tensor = tensors.get_tensor(key)
                if fix is not None:
                    check_finite(key, tensor, file, fix)
                self._add(name_of(key), SafetensorsKey(file, key), tensor)

    def add(self, state: Mapping[str, Tensor], name_of: Callable[[str], str]) -> None:
        """Add the tensors of a state dict, except those whose names are already known."""
        for key, tensor in state.items():
            self._add(name_of(key), tensor, tensor)

    def _add(self, name: str, source: SafetensorsKey | Tensor, tensor: Tensor) -> None:
        if name not in self.sources:
            self.sources[name] = source
            self.meta[name] = tensor.to("meta")

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor in a dtype; default: its own."""
        source = self.sources[name]
        if isinstance(source, Tensor):
            return source.to(dtype or source.dtype)
        with open_tensors(source.file) as tensors:
            tensor = tensors.get_tensor(source.key)
            return tensor.to(dtype or tensor.dtype, copy=True)


class LlmFiles:
    """The LLM of a run or an exported directory, with its adapters. Weights are read on request.

    Args:
        source: an exp_dir, a weights file in one, or an exported directory.
        weights: the weights file of the run; default: the newest.
        base_models: paths of base models that moved, as for AutoModel.

    Raises:
        UserError: the LLM has no adapters, or the weights have other ones than config.json
            describes.
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
                f"{str(source)!r} has no adapters on its LLM, so there is nothing to merge. "
                "Use 'asrllm export' to write it as it is."
            )
        self.weights = chosen_weights(source, weights)
        self.tensors = self._own_tensors()
        self.averaged_checkpoints = self._count_averaged()
        self.config = with_rank_multiple(self.config, self.averaged_checkpoints)
        self.config.exclude_from_checkpoint = None
        self.model = self._empty_model()
        expected = {
            stored_name(key): tensor
            for key, tensor in self.model.weights().items()
            if key.startswith(LLM)
        }
        own = {name: tensor for name, tensor in self.tensors.meta.items() if name.startswith(LLM)}
        self._check_own(own, expected)
        # the LLM was trained as well as its adapters, or in an earlier stage
        self.own_llm = self.weights is not None and not all(map(is_adapter, own))
        self.base: Path | None = None
        if expected.keys() - own.keys():
            self.base = resolve_pretrained(base_paths(self.config, ["llm"])["llm"])
            self._add_base(self.base, expected)

    def _check_own(self, own: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        """Check that the run's own weights of the LLM are the adapters of its configuration."""
        check_state(
            own,
            expected,
            f"the weights of {str(self.weights or self.folder)!r}",
            f"They do not match {str(self.folder / 'config.json')!r}.",
            needed=[name for name in expected if is_adapter(name)],
        )
        if self.weights is not None:
            trained = sum(not is_adapter(name) for name in own)
            check_stored(self.config, "llm", trained, str(self.folder))

    def _own_tensors(self) -> LazyTensors:
        """Return the tensors of the run or the exported directory."""
        tensors = LazyTensors()
        if self.weights is None:
            for file in weight_files(self.folder):
                tensors.add_file(file, stored_name, fix=DIVERGED)
        elif self.weights.suffix == ".json" or not self.weights.is_file():
            # an index of several files, or no file, which read_state reports
            tensors.add(read_state(self.weights), stored_name)
        else:
            tensors.add_file(self.weights, stored_name, fix=DIVERGED)
        return tensors

    def _add_base(self, base: Path, expected: Mapping[str, Tensor]) -> None:
        """Add the base model's tensors."""
        for file in pretrained_weight_files(base):
            self.tensors.add_file(file, lambda key: LLM + key, fix=NOT_FINITE_BASE)
        if expected.keys() - self.tensors.meta.keys():
            # transformers renames keys of this family when it loads the model
            dtype = as_dtype((self.config.llm or {}).get("dtype")) or torch.bfloat16
            llm = pretrained_llm(str(base), dtype)
            self.tensors.add(llm.state_dict(), lambda key: LLM + key)

    def _count_averaged(self) -> int:
        """Return of how many averaged checkpoints the file has the factors of the adapters."""
        return rank_multiple(self._empty_model(), self.tensors.meta)

    def _empty_model(self) -> AsrLlmModel:
        """Return the model of the configuration on the meta device."""
        with parameters_on_meta():
            llm = empty_llm(self.config.llm or {}, where=self.folder)
            return AsrLlmModel(self.config, llm=llm)

    @property
    def rank(self) -> int:
        """The highest rank of the adapters."""
        options = self.config.lora or {}
        other_ranks = options.get("rank_pattern") or {}
        return max([options.get("r", PEFT_DEFAULT_RANK), *other_ranks.values()])

    @cached_property
    def _merged_names(self) -> tuple[dict[str, Tensor], dict[str, BaseTunerLayer]]:
        weights = {key: t for key, t in self.model.weights().items() if key.startswith(LLM)}
        return merged_names(self.model, weights)

    @property
    def merged_weights(self) -> dict[str, Tensor]:
        """The LLM's weights without adapters by name, on the meta device."""
        return self._merged_names[0]

    @property
    def adapted_layers(self) -> dict[str, BaseTunerLayer]:
        """The layers on the meta device whose adapters change a weight, by the weight's name."""
        return self._merged_names[1]

    def layer(self, key: str) -> BaseTunerLayer:
        """Read the layer whose adapters change a weight.

        Args:
            key: the weight's name.

        Returns:
            The layer in eval mode, with its weights and its adapters.
        """
        empty = self.adapted_layers[key]
        prefix = next(name for name, module in self.model.named_modules() if module is empty)
        layer = copy.deepcopy(empty).eval()
        state: dict[str, Tensor] = {}
        for name, _ in layer.named_parameters():
            full_name = f"{prefix}.{name}"
            if is_base_layer(full_name, prefix):
                full_name = plain_name(full_name)
            state[name] = self.tensors.read(full_name)
        layer.load_state_dict(state, assign=True)
        return layer


def stored_name(key: str) -> str:
    """Return the name of a weight in files, which have base weights by their plain names."""
    return key if is_adapter(key) else plain_name(key)
