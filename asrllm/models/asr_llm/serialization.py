"""Save a model to a directory, and load it again with strict checks of its keys."""

import contextlib
import copy
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import GenerationConfig, PreTrainedModel

from asrllm.errors import UserError, nearest
from asrllm.integrity import verify_weights, write_checksums
from asrllm.models.asr_llm.checks import indexed_files
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.network import AsrLlmNetwork
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.models.base_models import BasePaths, base_paths, move_base_models
from asrllm.models.hub_files import LLM_SETTINGS, load_generation_config
from asrllm.models.portable.files import describe_code, write_code
from asrllm.models.pretrained import (
    empty_llm,
    layer_without_bias,
    pretrained_encoder,
    pretrained_llm,
)
from asrllm.models.state_dict import (
    StateDict,
    check_finite,
    check_state,
    is_adapter,
    plain_name,
    without_second_names,
)
from asrllm.tensor_files import Spec, TensorSource, write_sharded
from asrllm.text_files import first_words

# A directory with neither of these files does not contain a complete model.
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
REOPEN_BYTES = 1 << 26  # bytes read from a file before its memory-mapped pages are released
SIZE = re.compile(r"\s*(?=[\d.]*[1-9])\d+(\.\d+)?\s*[KMGT]B\s*", re.IGNORECASE)
PEFT_DEFAULT_RANK = 8  # rank of adapters whose configuration has no "r"

ModelT = TypeVar("ModelT", bound=AsrLlmNetwork)
Dtype: TypeAlias = torch.dtype | str | None
DeviceMap: TypeAlias = str | int | torch.device | dict[str, str | int | torch.device] | None

# --- saving ---


def check_shard_size(size: int | str) -> None:
    """Raise UserError unless `size` is a number of bytes above 0 or a text like "5GB"."""
    if isinstance(size, str):
        is_valid = SIZE.fullmatch(size) is not None
    else:
        is_valid = isinstance(size, int) and not isinstance(size, bool) and size > 0
    if not is_valid:
        raise UserError(
            f"max_shard_size={size!r} is not a size. Use a number of bytes above 0, or a text "
            "like '5GB'."
        )


def save_model(
    model: AsrLlmNetwork,
    folder: Path,
    *,
    merge_adapter: bool = False,
    max_shard_size: int | str = "5GB",
) -> None:
    """Save a model. The arguments are those of `AsrLlmModel.save_pretrained`.

    Existing files are replaced only once all new ones are written, the list of weights last.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.stored = None
    state = _saved_weights(model)
    tuned: dict[str, nn.Module] = {}
    if merge_adapter:
        state, tuned = merged_names(model, state)
        _describe_as_merged(config)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file. Give a directory to save the model to.")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        model.require_processor().save_pretrained(partial)
        write_generation_config(model.llm.generation_config, partial)
        if is_portable(config):
            (partial / "generation_config.json").replace(partial / LLM_SETTINGS)
            describe_code(config)
            write_code(config, model.require_processor(), partial)
        config.save_pretrained(partial)
        source = weight_source(state, tuned)
        write_sharded(source, partial, max_shard_size=max_shard_size, what="model")
        write_checksums(partial)
        _move_into_place(partial, folder)
    except BaseException:
        shutil.rmtree(folder if is_new else partial, ignore_errors=True)
        raise


def _saved_weights(model: AsrLlmNetwork) -> StateDict:
    """Return the weights of all parts that are not excluded, and all adapters."""
    excluded = tuple(f"{part}." for part in model.config.exclude_from_checkpoint or [])
    state: StateDict = {}
    for name, tensor in model.weights().items():
        if not name.startswith(excluded) or is_adapter(name):
            state[name] = tensor
    return state


def is_portable(config: AsrLlmConfig) -> bool:
    """Return whether transformers alone can load the model: without adapters, with all parts."""
    adapters = config.lora or config.audio_encoder_lora
    return not adapters and not config.exclude_from_checkpoint


def _describe_as_merged(config: AsrLlmConfig) -> None:
    """Remove from a configuration what a model with merged adapters no longer has."""
    config.lora = None
    config.audio_encoder_lora = None
    excluded = config.exclude_from_checkpoint or []
    bases = {part: base for part, base in (config.base_models or {}).items() if part in excluded}
    config.base_models = bases or None


def write_generation_config(settings: GenerationConfig, folder: Path) -> None:
    """Write generation_config.json, or raise UserError if transformers refuses the settings."""
    try:
        settings.save_pretrained(folder)
    except ValueError as error:
        raise UserError(
            f"the LLM's generation settings cannot be saved: {first_words(error, 300)}. "
            "Correct its generation_config.json."
        ) from error


def _move_into_place(partial: Path, folder: Path) -> None:
    """Move all files from `partial`, a subdirectory of `folder`, to `folder`.

    If the process dies on the way, the directory does not load.
    """
    for name in (SINGLE, INDEX):
        (folder / name).unlink(missing_ok=True)
    for stale in folder.glob("model-*-of-*.safetensors"):
        stale.unlink()
    # The list of weights comes last: until then the directory does not load.
    for entry in sorted(partial.iterdir(), key=lambda entry: entry.name in (SINGLE, INDEX)):
        target = folder / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.replace(target)
    partial.rmdir()


def weight_source(state: Mapping[str, Tensor], tuned: Mapping[str, nn.Module]) -> TensorSource:
    """Return a state dict in the form that the writers take.

    Args:
        state: the weights.
        tuned: by key, the layer whose adapters are merged into the weight when it is written.
    """

    def pieces(key: str) -> Iterator[Tensor]:
        tensor = state[key]
        if key in tuned:
            tensor = merged_parameter(tuned[key], key.rpartition(".")[2])
        yield tensor.flatten()

    specs: dict[str, Spec] = {}
    for key, tensor in state.items():
        specs[key] = Spec(tuple(tensor.shape), tensor.dtype)
    return TensorSource(specs, pieces)


def merged_names(
    model: AsrLlmNetwork, state: Mapping[str, Tensor]
) -> tuple[StateDict, dict[str, nn.Module]]:
    """Rename weights to their names in the model without adapters.

    Args:
        model: the model with adapters.
        state: its weights.

    Returns:
        The renamed state without the adapters, and the layers whose adapters change it, by the key
        of the changed weight.

    Raises:
        UserError: the model has no adapters, an adapted part is excluded from the checkpoint, or a
            layer cannot represent the merged adapter.
    """
    layers = _adapted_layers(model)
    _check_mergeable(model, state, layers)
    factors = _adapter_keys(layers)
    renamed = {plain_name(key): tensor for key, tensor in state.items() if key not in factors}
    return renamed, _tuned_weights(layers)


def _adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that have adapters by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            layers[name] = module
    return layers


def _adapter_keys(layers: Mapping[str, nn.Module]) -> set[str]:
    """Return the keys of the adapters' own weights."""
    factors: set[str] = set()
    for name, layer in layers.items():
        keys = [key for key, _ in layer.named_parameters(name)]
        factors.update(key for key in keys if not is_base_layer(key, name))
    return factors


def _tuned_weights(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the adapted layers by the plain names of the weights that the adapters change."""
    tuned: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        tuned[plain_name(f"{name}.base_layer.weight")] = layer
        if any(getattr(layer, "lora_bias", {}).values()):
            tuned[plain_name(f"{name}.base_layer.bias")] = layer
    return tuned


def _check_mergeable(
    model: AsrLlmNetwork, state: Mapping[str, Tensor], layers: Mapping[str, nn.Module]
) -> None:
    if not layers:
        raise UserError("merge_adapter=True, but the model has no adapters. Save it without.")
    for part in model.config.exclude_from_checkpoint or []:
        if any(name.startswith(f"{part}.") for name in layers):
            raise UserError(
                f"merge_adapter=True merges the adapters into the {part}, but "
                f"exclude_from_checkpoint excludes the {part}. Save without merging "
                "(asrllm export: --keep-adapters)."
            )
    for key in state:
        if ".modules_to_save." in key or ".token_adapter." in key:
            raise UserError(
                f"merge_adapter=True: {key!r} is trained beside the adapted layers and cannot be "
                "merged. Save without merging (asrllm export: --keep-adapters)."
            )
    biased = layer_without_bias(model)
    if biased:
        raise UserError(
            f"merge_adapter=True: the adapter of {biased!r} has a bias (lora_bias), but the layer "
            "has none. Save without merging (asrllm export: --keep-adapters)."
        )
    _check_untied(model, layers)


def _check_untied(model: AsrLlmNetwork, layers: Mapping[str, nn.Module]) -> None:
    """Raise UserError if adapted embeddings are tied to the head."""
    head = model.causal_lm.get_output_embeddings().weight
    is_tied = head is model.causal_lm.get_input_embeddings().weight
    if is_tied and any(layer.get_base_layer().weight is head for layer in layers.values()):
        raise UserError(
            "merge_adapter=True: the adapter of the embeddings would change the head, which is "
            "tied to them. Save without merging (asrllm export: --keep-adapters)."
        )


def is_base_layer(key: str, layer: str) -> bool:
    """Return whether a key belongs to the base layer inside the adapted layer `layer`."""
    return key.startswith(f"{layer}.base_layer.")


@torch.no_grad()
def merged_parameter(layer: nn.Module, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return a parameter of the base layer with the adapters merged into it.

    The merge is computed in at least float32 and rounded once. The layer does not change.

    Args:
        layer: the adapted layer.
        name: "weight" or "bias".
        dtype: dtype of the result; by default the parameter's own.
    """
    own = getattr(layer.get_base_layer(), name).dtype
    # PEFT merges in place and in the dtype of the layer.
    layer = copy.deepcopy(layer).to(torch.promote_types(own, torch.float32))
    layer.merge()
    return getattr(layer.get_base_layer(), name).to(dtype or own).contiguous()


# --- loading ---


def load_directory(
    model_class: type[ModelT],
    path: str | Path,
    *,
    dtype: Dtype = None,
    base_models: BasePaths | None = None,
) -> ModelT:
    """Load a directory that `save_model` wrote. See `AsrLlmModel.from_pretrained`."""
    config, processor = read_description(path, base_models)
    state: StateDict = {}
    for file in weight_files(Path(path)):
        state.update(read_tensors(file, as_dtype(dtype)))
    return assemble(
        model_class,
        config,
        processor,
        state,
        from_base=config.exclude_from_checkpoint or [],
        dtype=dtype,
        where=str(path),
    )


def load_model(
    model_class: type[ModelT],
    path: str | Path,
    state: Mapping[str, Tensor],
    *,
    dtype: Dtype = None,
    base_models: BasePaths | None = None,
) -> ModelT:
    """Return the model described in a directory with the weights of `state`, in eval mode.

    Args:
        model_class: class of the model.
        path: a directory with config.json and the tokenizer.
        state: the weights. Weights of the encoder and of the LLM that it does not contain are read
            from the base models.
        dtype: dtype of the weights. None or "auto" means the most frequent one in `state`.
        base_models: as in `move_base_models`.

    Raises:
        UserError: a key is missing, unexpected or has another shape, or a base model is missing
            or is not the one used in training.
    """
    config, processor = read_description(path, base_models)
    return assemble(
        model_class,
        config,
        processor,
        state,
        from_base=("audio_encoder", "llm"),
        dtype=dtype,
        where=str(path),
    )


def read_description(
    path: str | Path,
    base_models: BasePaths | None = None,
) -> tuple[AsrLlmConfig, AsrLlmProcessor]:
    """Return the configuration and the processor in a directory.

    Raises:
        UserError: a file is missing or damaged, or the tokenizer does not match the configuration.
    """
    processor = AsrLlmProcessor.from_pretrained(path)
    config = processor.config
    move_base_models(config, base_models, where=str(path))
    found = processor.tokenizer.convert_tokens_to_ids(config.audio_token)
    if found != config.audio_token_id:
        raise UserError(
            f"the tokenizer in {str(path)!r} has the id {found} for {config.audio_token!r}, but "
            f"config.json has {config.audio_token_id}. Copy the tokenizer files that were saved "
            "with the model."
        )
    return config, processor


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a directory that `save_pretrained` wrote.

    Raises:
        UserError: the directory is incomplete, or contains the weights of two models.
    """
    single = folder / SINGLE
    index = folder / INDEX
    if single.exists() and index.exists():
        raise UserError(
            f"{str(folder)!r} contains both {SINGLE} and {INDEX}. Remove the outdated one."
        )
    if single.exists():
        return [single]
    if not index.exists():
        raise UserError(
            f"{str(folder)!r} contains neither {SINGLE} nor {INDEX}. Give a directory that "
            "'asrllm export' has completed."
        )
    files = indexed_files(index)
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise UserError(f"{str(folder)!r} has no {missing[0]}, which {INDEX} names. Copy it again.")
    return files


def main_weight_file(folder: Path) -> Path:
    """Return the only weight file of a saved directory, or the index if there are several."""
    weight_files(folder)
    single = folder / SINGLE
    return single if single.exists() else folder / INDEX


def read_tensors(file: Path, dtype: torch.dtype | None = None) -> StateDict:
    """Read a safetensors file into memory.

    The tensors are copies, so that the file may be replaced while the model is in use. The file's
    memory-mapped pages are released on the way, so that they do not take the memory of a second
    model.

    Args:
        file: the file.
        dtype: dtype of the floating-point tensors; by default as saved.

    Raises:
        UserError: the file cannot be read, or a weight is not finite.
    """
    state: StateDict = {}
    with open_tensors(file) as tensors:
        names = list(tensors.keys())
    while len(state) < len(names):
        taken = 0
        with open_tensors(file) as tensors:
            for name in names[len(state) :]:
                tensor = tensors.get_tensor(name)
                check_finite(name, tensor, file)
                taken += tensor.nbytes
                state[name] = _copied(tensor, dtype)
                if taken > REOPEN_BYTES:
                    break
            del tensor
    return state


def _copied(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    return tensor.to(dtype, copy=True)


@contextlib.contextmanager
def open_tensors(file: Path) -> Iterator[safe_open]:
    """Open a safetensors file as a memory map.

    Raises:
        UserError: the file cannot be read. Errors inside the block are converted too.
    """
    try:
        verify_weights(file)
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"the weights {str(file)!r} cannot be read: {first_words(error)}. Copy the file again."
        ) from error


def device_of_map(device_map: DeviceMap) -> torch.device:
    """Return the device that a `device_map` in the sense of accelerate gives to a whole model.

    Args:
        device_map: a device, {"": device}, or "auto" for the first accelerator; None means the CPU.

    Raises:
        UserError: it divides the model, or is not a device of this machine.
    """
    if isinstance(device_map, dict):
        if set(device_map) != {""}:
            raise UserError(
                f"device_map={device_map} divides the model. Use one device: 'auto', 'cpu', 'cuda'."
            )
        device_map = device_map[""]
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return _usable_device(device_map)


def _usable_device(device_map: str | int | torch.device) -> torch.device:
    """Return a device of this machine, or raise UserError if an allocation on it fails."""
    try:
        device = torch.device(device_map)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"device_map={device_map!r} is not a device of this machine: {first_words(error)}. "
            "Use 'auto', 'cpu' or 'cuda'."
        ) from error
    return device


def as_dtype(dtype: Dtype) -> torch.dtype | None:
    """Return the dtype that a user asked for, or None for None and "auto".

    Raises:
        UserError: the dtype is unknown, or is not a floating-point dtype.
    """
    if isinstance(dtype, str) and dtype != "auto":
        name = dtype.removeprefix("torch.")
        if name not in DTYPES:
            raise UserError(f"dtype={dtype!r} is unknown. {nearest(dtype, DTYPES)}")
        return DTYPES[name]
    if not isinstance(dtype, torch.dtype):
        return None
    if dtype not in DTYPES.values():
        raise UserError(f"dtype={dtype} is not a dtype of weights. Available: {', '.join(DTYPES)}.")
    return dtype


def prevailing_dtype(state: Mapping[str, Tensor], where: str) -> torch.dtype:
    """Return the floating-point dtype that most elements of a state dict have."""
    elements: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        if tensor.is_floating_point():
            elements[tensor.dtype] += tensor.numel()
    if not elements.total():
        raise UserError(f"the weights of {where!r} are empty. Save the model again.")
    return elements.most_common(1)[0][0]


def assemble(
    model_class: type[ModelT],
    config: AsrLlmConfig,
    processor: AsrLlmProcessor,
    state: Mapping[str, Tensor],
    *,
    from_base: Sequence[str],
    dtype: Dtype,
    where: str,
) -> ModelT:
    """Build a model from its weights, in eval mode.

    The parameters are the tensors of `state`, not copies of them, and none is initialised first.

    Args:
        model_class: class of the model.
        config: its configuration.
        processor: its processor.
        state: its weights.
        from_base: parts of which `state` may lack weights. Those come from the base models.
        dtype: dtype of the weights. None or "auto" means the most frequent one in `state`.
        where: the directory of the model, for error messages.
    """
    chosen = as_dtype(dtype) or prevailing_dtype(state, where)
    model = _without_weights(model_class, config, chosen, where)
    multiple = rank_multiple(model, state)
    if multiple > 1:
        config = with_rank_multiple(config, multiple)
        processor.config = config
        model = _without_weights(model_class, config, chosen, where)
    state = without_second_names(model, state, where)
    for part in config.stored or {}:
        own = state.keys() & model.weights().keys()
        found = [key for key in own if is_base_weight(key, part)]
        check_stored(config, part, len(found), where)
    missing = model.weights().keys() - state.keys()
    based = [part for part in from_base if any(is_base_weight(key, part) for key in missing)]
    if based:
        model = _with_base_parts(model_class, config, based, chosen)
    set_generation_config(model.causal_lm, Path(where))
    state = _restore_scalars(model, state)
    _check_complete(model, state, based, where)
    # One tensor at a time: the original of a converted tensor is freed if nothing else holds it.
    for key in list(state):
        if state[key].is_floating_point():
            state[key] = state[key].to(chosen)
    model.load_state_dict(state, strict=False, assign=True)
    model.llm.tie_weights()
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.processor = processor
    return model.eval()


def _without_weights(
    model_class: type[ModelT], config: AsrLlmConfig, dtype: torch.dtype, where: str
) -> ModelT:
    with parameters_on_meta():
        return model_class(config, llm=empty_llm(config.llm or {}, dtype, where=where))


def _check_complete(
    model: AsrLlmNetwork, state: Mapping[str, Tensor], based: Sequence[str], where: str
) -> None:
    """Check keys and shapes of `state`, which may lack the base weights of the `based` parts."""
    expected = model.weights()
    needed = [key for key in expected if not any(is_base_weight(key, part) for part in based)]
    what = f"the weights of {where!r}"
    check_state(state, expected, what, _mismatch_reason("model", where), needed=needed)


def check_stored(
    config: AsrLlmConfig,
    part: str,
    found: int,
    where: str,
) -> None:
    """Raise UserError unless weights have as many tensors of a part as the run's checkpoints.

    Args:
        config: configuration of the run.
        part: "audio_encoder" or "llm".
        found: number of its tensors in the weights, without adapters.
        where: the directory of the run.
    """
    count = (config.stored or {}).get(part, found)
    if found != count:
        raise UserError(
            f"the weights of {where!r} contain {found} tensors of the {part}, but its checkpoints "
            f"contain {count}. {_mismatch_reason('run', where)}"
        )


def _mismatch_reason(what: str, where: str) -> str:
    """Return the likely reasons why weights do not fit the run in the directory `where`."""
    reason = f"They belong to another {what}."
    if (Path(where) / "inherited_weights.pt").is_file():
        reason += (
            " If zero_to_fp32.py wrote them, run 'asrllm consolidate' instead: that script drops "
            "the weights in inherited_weights.pt."
        )
    return reason


def rank_multiple(model: AsrLlmNetwork, state: Mapping[str, Tensor]) -> int:
    """Return how many times the rank of the model's adapters the adapters in `state` have.

    Averaged adapters contain the factors of several checkpoints.
    """
    for key, tensor in model.weights().items():
        is_factor = ".lora_A." in key or ".lora_embedding_A." in key
        if not is_factor or key not in state or tensor.shape[1:] != state[key].shape[1:]:
            continue
        multiple, rest = divmod(state[key].shape[0], tensor.shape[0])
        return multiple if rest == 0 else 1
    return 1


def with_rank_multiple(config: AsrLlmConfig, multiple: int) -> AsrLlmConfig:
    """Return a copy of the configuration with adapters of a multiple of the rank.

    Their alpha does not change.
    """
    config = copy.deepcopy(config)
    for options in (config.lora, config.audio_encoder_lora):
        if options is not None:
            options["r"] = options.get("r", PEFT_DEFAULT_RANK) * multiple
            pattern = options.get("rank_pattern") or {}
            options["rank_pattern"] = {name: rank * multiple for name, rank in pattern.items()}
    return config


def is_base_weight(key: str, part: str) -> bool:
    """Return whether a key belongs to the pretrained weights of a part, not to its adapters."""
    return key.startswith(f"{part}.") and not is_adapter(key)


def _with_base_parts(
    model_class: type[ModelT], config: AsrLlmConfig, parts: Sequence[str], dtype: torch.dtype
) -> ModelT:
    """Build a model with the pretrained weights of some parts, and the others on meta."""
    encoder = None
    llm = None
    paths = base_paths(config, parts)
    if "audio_encoder" in parts:
        encoder = _cast_parameters(pretrained_encoder(config, paths["audio_encoder"]), dtype)
    if "llm" in parts:
        llm = pretrained_llm(paths["llm"], dtype)
    with parameters_on_meta():
        llm = llm or empty_llm(config.llm or {}, dtype)
        return model_class(config, audio_encoder=encoder, llm=llm)


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Create parameters on the meta device inside the block; buffers are created as usual.

    The parameters take no memory and no time to initialise.
    """

    def to_meta(
        module: nn.Module, name: str, parameter: nn.Parameter | None
    ) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # a tied weight keeps its identity
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def _cast_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert the parameters and not the buffers.

    In bfloat16 a rotary embedding's frequencies would lose the far positions.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def set_generation_config(llm: PreTrainedModel, folder: Path) -> None:
    """Give an LLM the settings in a directory's generation_config.json, if there is one."""
    if (folder / "generation_config.json").is_file():
        llm.generation_config = load_generation_config(folder)


def _restore_scalars(model: AsrLlmNetwork, state: Mapping[str, Tensor]) -> StateDict:
    """Return the state dict with the shape () of the model's scalars.

    Training stores them as vectors of one element.
    """
    restored = dict(state)
    for name, tensor in model.weights().items():
        if tensor.dim() == 0 and name in state and state[name].numel() == 1:
            restored[name] = state[name].reshape(())
    return restored
