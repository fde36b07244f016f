"""The adapters of the LLM merged into it, from files, a weight at a time; or by themselves, in PEFT's form."""

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from asrllm.errors import UserError
from asrllm.models.auto import AutoModel, load_state, newest_weights, read_state
from asrllm.models.configuration import AsrLlmConfig
from asrllm.models.description import read_config
from asrllm.models.files import (
    as_dtype,
    base_path,
    check_stored,
    is_base,
    merged_names,
    merged_parameter,
    open_tensors,
    parameters_on_meta,
    prevailing_dtype,
    rank_in_file,
    weight_files,
    weight_source,
    with_ranks,
)
from asrllm.models.fingerprint import resolve_pretrained
from asrllm.models.fingerprint import weight_files as base_files
from asrllm.models.model import AsrLlmModel
from asrllm.models.names import check_state, is_adapter, plain_name
from asrllm.models.parts import empty_llm, lora_config, pretrained_llm
from asrllm.tensor_files import Spec, TensorSource, write_file, write_sharded
from asrllm.writing import new_folder

LLM = "llm."
CHECKED = "The quick brown fox jumps over the lazy dog, and 17 others watch it."
COLUMNS = 64  # of each merged weight that are compared


class Parity(NamedTuple):
    """Logits (T, V) of the merged LLM and of the one with its adapters beside it, in float32: the root mean squares of their difference, of
    what the adapters change, and of the logits; at how many of T the same word is first.
    """

    difference: float
    change: float
    size: float
    same: int
    tokens: int


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

    def read(self, name: str) -> Tensor:
        place = self.where[name]
        if isinstance(place, Tensor):
            return place
        with open_tensors(place[0]) as tensors:
            return tensors.get_tensor(place[1]).clone()


class LlmFiles:
    """What a run, or an exported directory, and the base model say of the LLM; weights are read when they are wanted.

    source: an exp_dir, a weights file in one, or an exported directory. Raises UserError where it has no adapters on the LLM, and where its
    weights hold other ones than its configuration describes.
    """

    def __init__(self, source: Path, weights: Path | None = None) -> None:
        self.folder = source.parent if source.is_file() else source
        self.config = read_config(self.folder)
        if not self.config.lora:
            raise UserError(f"{str(source)!r} has no adapters on its LLM: 'asrllm export' writes it as it is")
        exported = weights is None and source.is_dir() and any(source.glob("model*.safetensors*"))
        self.weights = None if exported else (source if source.is_file() else weights or newest_weights(source))
        self.places = self._own_places()
        self.model = self._model()
        expected = {_name(key): tensor for key, tensor in self.model.weights().items() if key.startswith(LLM)}
        own = {name: tensor for name, tensor in self.places.meta.items() if name.startswith(LLM)}
        where, mend = f"the weights of {str(self.weights or self.folder)!r}", f"they are not of {str(self.folder / 'config.json')!r}"
        check_state(own, expected, where, mend, needed=[name for name in expected if is_adapter(name)])
        if self.weights is not None:
            check_stored(self.config, "llm", sum(not is_adapter(name) for name in own), str(self.folder))
        self.own_llm = self.weights is not None and not all(map(is_adapter, own))  # trained beside the adapters, or in a stage before
        self.base = Path(resolve_pretrained(base_path(self.config, "llm"))) if expected.keys() - own.keys() else None
        if self.base is not None:
            self._add_base(self.base, expected)

    def _own_places(self) -> Places:
        places = Places()
        if self.weights and (self.weights.suffix == ".json" or not self.weights.is_file()):  # several files, or none
            places.add(read_state(self.weights), _name)
            return places
        for file in [self.weights] if self.weights else weight_files(self.folder):
            places.add_file(file, _name)
        return places

    def _add_base(self, base: Path, expected: Mapping[str, Tensor]) -> None:
        for file in base_files(base):
            self.places.add_file(file, lambda key: LLM + key)
        if expected.keys() - self.places.meta.keys():  # transformers renames keys of this family
            llm = pretrained_llm(str(base), as_dtype((self.config.llm or {}).get("dtype")) or torch.bfloat16)
            self.places.add(llm.state_dict(), lambda key: LLM + key)

    def _model(self) -> AsrLlmModel:
        """Without memory for its weights; its adapters have the rank of the file's."""
        with parameters_on_meta():
            model = AsrLlmModel(self.config, llm=empty_llm(self.config.llm or {}))
            self.times = rank_in_file(model, self.places.meta)
            self.config = with_ranks(self.config, self.times)
            self.config.exclude_from_checkpoint = None
            return AsrLlmModel(self.config, llm=empty_llm(self.config.llm or {}))

    @property
    def rank(self) -> int:
        """The largest of the adapters'."""
        options = self.config.lora or {}
        return max([options.get("r", 8), *(options.get("rank_pattern") or {}).values()])  # PEFT's default

    @cached_property
    def merged(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As merged_names: the LLM's weights without adapters, and which of them adapters change, with their layers."""
        return merged_names(self.model, {key: t for key, t in self.model.weights().items() if key.startswith(LLM)})

    def layer(self, key: str) -> Any:
        """The layer whose adapters change the weight `key`, in eval mode, with its weights and its adapters'."""
        empty = self.merged[1][key]
        prefix = next(name for name, module in self.model.named_modules() if module is empty)
        layer = copy.deepcopy(empty).eval()
        names = {name: f"{prefix}.{name}" for name, _ in layer.named_parameters()}
        state = {name: self.places.read(plain_name(full) if is_base(full, prefix) else full) for name, full in names.items()}
        layer.load_state_dict(state, assign=True)
        return layer


def _name(key: str) -> str:
    return key if is_adapter(key) else plain_name(key)


def merged_llm(files: LlmFiles, dtype: torch.dtype | None = None) -> TensorSource:
    """The LLM's weights by transformers' names, its adapters in it, each in the dtype that it has in the base, or in `dtype`."""
    weights, tuned = files.merged

    def pieces(name: str) -> Iterator[Tensor]:
        key, kind = LLM + name, specs[name].dtype
        if key in tuned:
            yield merged_parameter(files.layer(key), key.rpartition(".")[2], kind).flatten()
        else:
            yield files.places.read(key).to(kind).flatten()

    held = {key.removeprefix(LLM): files.places.meta[key] for key in weights}
    specs = {name: Spec(tuple(t.shape), dtype if dtype and t.is_floating_point() else t.dtype) for name, t in held.items()}
    return TensorSource(specs, pieces)


def merge_lora(
    files: LlmFiles, output: Path, *, dtype: str | None = None, max_shard_size: int | str = "5GB", check: bool = True
) -> Parity | None:
    """Write a plain directory of the LLM, which transformers loads without this package; it appears when it is complete and right.

    check: compare logits, which takes memory for an LLM in float32; some columns of every merged weight are compared without it too.
    """
    with new_folder(output) as partial:
        source = merged_llm(files, as_dtype(dtype))
        write_sharded(source, partial, max_shard_size=max_shard_size, what="merged LLM")
        check_layers(files, partial)
        config = AutoConfig.for_model(**(files.config.llm or {}))
        config.dtype = as_dtype(dtype) or prevailing_dtype({key: files.places.meta[key] for key in files.merged[0]}, str(files.folder))
        config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
        config.save_pretrained(partial)
        write_tokenizer(files, partial)
        return check_parity(files, partial, config.dtype) if check else None


def write_tokenizer(files: LlmFiles, folder: Path) -> None:
    """Of the base model where it is read, with the chat template of the run; and the base model's generation settings."""
    home = files.base or files.folder
    tokenizer = AutoTokenizer.from_pretrained(home)
    tokenizer.chat_template = AutoTokenizer.from_pretrained(files.folder).chat_template
    tokenizer.save_pretrained(folder)
    name = "generation_config.json"
    homes = [home, Path((_base(files.config) or {}).get("path", home))]  # training writes none
    if settings := next((path / name for path in homes if (path / name).is_file()), None):
        shutil.copyfile(settings, folder / name)


def save_adapter(files: LlmFiles, output: Path) -> None:
    """Write the adapters in PEFT's own form: PeftModel.from_pretrained(base LLM, output).

    Raises UserError where they belong to an LLM that is not the base model any more.
    """
    if files.own_llm:
        raise UserError(
            f"the weights {str(files.weights)!r} hold weights of the LLM beside its adapters, which do not fit the base model without "
            "them: merge them (without --adapter-only), or take 'asrllm export --parts'"
        )
    with new_folder(output) as partial:
        names = [key for key in files.places.where if is_adapter(key) and key.startswith(LLM)]
        state = {key.removeprefix(LLM).replace(".default", ""): files.places.read(key) for key in names}
        write_file(weight_source(state, {}), partial / "adapter_model.safetensors")
        about = {"task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": (_base(files.config) or {}).get("path")}
        lora_config(files.config.lora or {}, **about).save_pretrained(partial)


def _base(config: AsrLlmConfig) -> dict[str, Any] | None:
    return (config.base_models or {}).get("llm")


# --- whether what was merged is what was trained ---


@torch.no_grad()
def check_layers(files: LlmFiles, merged: Path) -> None:
    """Some columns of every merged weight in the files of `merged` are what the layer computes with its adapters beside it, to half a
    step of their dtype. A layer at a time in memory. Raises UserError naming the weight.
    """
    found = Places()
    for file in weight_files(merged):
        found.add_file(file, lambda key: LLM + key)
    for key in (key for key in files.merged[1] if key.startswith(LLM) and key.endswith(".weight")):
        adapted, plain = files.layer(key).float(), copy.deepcopy(files.merged[1][key].get_base_layer())
        state = {name: found.read(f"{key.removesuffix('weight')}{name}").float() for name, _ in plain.named_parameters()}
        plain.load_state_dict(state, assign=True)
        there, here = some_columns(plain, plain, adapted.in_features), some_columns(adapted, plain, adapted.in_features)
        allowed = step(torch.maximum(there.abs(), here.abs()), found.meta[key].dtype) / 2 + 1e-5 * here.abs().max()
        if not ((there - here).abs() <= allowed).all():
            what = f"{float((there - here).abs().max()):.3g} off, where rounding makes at most {float(allowed.max()):.3g}"
            raise UserError(
                f"the merged {key!r} is not what its adapters make of it ({what}): they are damaged, or too large for the dtype; "
                "average other checkpoints, or choose --dtype float32"
            )


def some_columns(layer: nn.Module, plain: nn.Module, size: int) -> Tensor:
    """COLUMNS of the weight by which a layer of `size` inputs multiplies, and its bias. plain: the layer without adapters."""
    picked = torch.linspace(0, size - 1, min(size, COLUMNS)).long()
    if isinstance(plain, nn.Embedding):
        return layer(picked)
    bias = layer(torch.zeros(1, size))
    return torch.cat([layer(nn.functional.one_hot(picked, size).float()) - bias, bias])


def step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """How far the numbers of `dtype` are apart where `values` (float32, not negative) lie."""
    kind = torch.finfo(dtype)
    return (kind.eps * torch.exp2(torch.frexp(values).exponent - 1.0)).clamp(min=kind.tiny * kind.eps)


@torch.no_grad()
def check_parity(files: LlmFiles, merged: Path, dtype: torch.dtype) -> Parity:
    """The logits of the LLM in `merged` and of the one with its adapters beside it, both computed in float32, one after the other.

    dtype: of the merged weights. Raises UserError where they differ by more than rounding to it explains.
    """
    tokens = AutoTokenizer.from_pretrained(merged)(CHECKED, return_tensors="pt").input_ids
    llm = AutoModel.from_pretrained(files.folder, weights=files.weights, dtype=torch.float32).llm.eval()
    before = llm(input_ids=tokens).logits[0]
    with llm.disable_adapter():
        base = llm(input_ids=tokens).logits[0]
    del llm
    after = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()(input_ids=tokens).logits[0]
    difference, change, size = (float(logits.square().mean().sqrt()) for logits in (after - before, before - base, before))
    found = Parity(difference, change, size, int((after.argmax(-1) == before.argmax(-1)).sum()), len(before))
    allowed = 1e-4 * size if dtype.itemsize >= 4 else max(4 * torch.finfo(dtype).eps * size, change / 2)
    if not difference <= allowed:
        raise UserError(
            f"the merged LLM gives other logits: off by {difference:.3g}, where the adapters change them by {change:.3g} and rounding to "
            f"{dtype} explains {allowed:.3g}: choose --dtype float32, or leave the adapters beside the LLM with --adapter-only"
        )
    return found
