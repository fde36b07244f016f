"""A model's directory on disk: what save_pretrained writes, and loading it back, strict about keys."""

import contextlib
import copy
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import GenerationConfig, PreTrainedModel

from asrllm.errors import UserError, nearest
from asrllm.integrity import verify_weights
from asrllm.models.asr_llm.checks import indexed_files
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.models.base_models import BasePaths, base_paths, move_base_models
from asrllm.models.hub_files import load_generation_config
from asrllm.models.pretrained import (
    empty_llm,
    layer_without_bias,
    pretrained_encoder,
    pretrained_llm,
)
from asrllm.models.state_dict import check_state, is_adapter, plain_name, without_second_names
from asrllm.tensor_files import Spec, TensorSource, write_sharded

SINGLE, INDEX = (
    "model.safetensors",
    "model.safetensors.index.json",
)  # a directory with neither holds no complete model
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
REOPEN = 1 << 26  # bytes read of a file before its pages are let go

# --- writing ---


def save_model(
    model: AsrLlmModel,
    folder: Path,
    *,
    merge_adapter: bool = False,
    max_shard_size: int | str = "5GB",
) -> None:
    """See AsrLlmModel.save_pretrained. What stands in the directory is replaced when all is written, the weights' list last."""
    config = copy.deepcopy(model.config)
    config.architectures, config.stored = [type(model).__name__], None
    left_out = tuple(f"{part}." for part in config.exclude_from_checkpoint or [])
    state = {
        k: v for k, v in model.weights().items() if not k.startswith(left_out) or is_adapter(k)
    }
    tuned: dict[str, Any] = {}
    if merge_adapter:
        state, tuned = merged_names(model, state)
        config.lora = None
        if hasattr(config, "audio_encoder_lora"):
            config.audio_encoder_lora = None
        config.base_models = {
            part: base
            for part, base in (config.base_models or {}).items()
            if f"{part}." in left_out
        } or None
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file: give a directory to save to")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        model.require_processor().save_pretrained(partial)
        write_generation_config(model.llm.generation_config, partial)
        config.save_pretrained(partial)
        write_sharded(
            weight_source(state, tuned), partial, max_shard_size=max_shard_size, what="model"
        )
        put_in_place(partial, folder)
    except BaseException:
        shutil.rmtree(folder if made else partial, ignore_errors=True)
        raise


def write_generation_config(settings: GenerationConfig, folder: Path) -> None:
    try:
        settings.save_pretrained(folder)
    except ValueError as error:
        raise UserError(
            f"the LLM's generation settings cannot be saved: {' '.join(str(error).split())[:300]}: correct its generation_config.json"
        ) from error


def put_in_place(partial: Path, folder: Path) -> None:
    """Move everything from `partial`, which lies in `folder`, there. A death on the way leaves a directory that does not load."""
    for name in (SINGLE, INDEX):
        (folder / name).unlink(missing_ok=True)
    for stale in folder.glob("model-*-of-*.safetensors"):
        stale.unlink()
    for entry in sorted(partial.iterdir(), key=lambda entry: entry.name in (SINGLE, INDEX)):
        target = folder / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.replace(target)
    partial.rmdir()


def weight_source(state: Mapping[str, Tensor], tuned: Mapping[str, Any]) -> TensorSource:
    """A state dict to be written. tuned: key -> the layer whose adapters are merged into it, when it is written."""

    def pieces(key: str) -> Iterator[Tensor]:
        yield (
            merged_parameter(tuned[key], key.rpartition(".")[2]) if key in tuned else state[key]
        ).flatten()

    return TensorSource(
        {key: Spec(tuple(tensor.shape), tensor.dtype) for key, tensor in state.items()}, pieces
    )


def merged_names(
    model: AsrLlmModel, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the state by the names of the model without adapters, those of its keys that an adapter changes with their layers).

    Raises UserError where there are no adapters, where they are of a part that is left out, or where a layer cannot hold them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = dict(model.named_modules())
    layers = {
        name: module for name, module in modules.items() if isinstance(module, BaseTunerLayer)
    }
    if not layers:
        raise UserError("merge_adapter=True, but the model has no adapters: save it without")
    for part in model.config.exclude_from_checkpoint or []:
        if any(name.startswith(f"{part}.") for name in layers):
            raise UserError(
                f"merge_adapter=True puts the adapters into the {part}, which exclude_from_checkpoint leaves out: choose one"
            )
    if kept := next(
        (key for key in state if ".modules_to_save." in key or ".token_adapter." in key), None
    ):
        raise UserError(
            f"merge_adapter=True: {kept!r} is trained beside the adapters' layers and cannot be merged: save without merging"
        )
    if biased := layer_without_bias(model):
        raise UserError(
            f"merge_adapter=True: the adapter of {biased!r} has a bias (lora_bias), its layer has none: save without merging"
        )

    tied = model.causal_lm.get_output_embeddings().weight
    if tied is model.causal_lm.get_input_embeddings().weight and any(
        layer.get_base_layer().weight is tied for layer in layers.values()
    ):
        raise UserError(
            "merge_adapter=True: the adapter of the embeddings would change the head, which shares them: save unmerged"
        )

    factors = {
        key
        for name, layer in layers.items()
        for key, _ in layer.named_parameters(name)
        if not is_base(key, name)
    }
    tuned = {plain_name(f"{name}.base_layer.weight"): layer for name, layer in layers.items()}
    tuned |= {
        plain_name(f"{name}.base_layer.bias"): layer
        for name, layer in layers.items()
        if any(getattr(layer, "lora_bias", {}).values())
    }
    return {plain_name(key): tensor for key, tensor in state.items() if key not in factors}, tuned


def is_base(key: str, layer: str) -> bool:
    return key.startswith(f"{layer}.base_layer.")


@torch.no_grad()
def merged_parameter(layer: Any, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """The base layer's parameter with the adapters in it, computed in float32 at least and rounded once, to its own dtype or to `dtype`.

    The layer stays as it is.
    """
    own = getattr(layer.get_base_layer(), name).dtype
    layer = copy.deepcopy(layer).to(torch.promote_types(own, torch.float32))
    layer.merge()
    return getattr(layer.get_base_layer(), name).to(dtype or own).contiguous()


# --- reading ---


def load_directory(
    path: str | Path,
    *,
    dtype: Any = None,
    base_models: BasePaths | None = None,
) -> AsrLlmModel:
    """See AsrLlmModel.from_pretrained."""
    config, processor = read_description(path, base_models)
    files = weight_files(Path(path))
    state = {
        name: tensor
        for file in files
        for name, tensor in read_tensors(file, as_dtype(dtype)).items()
    }
    return assemble(
        config,
        processor,
        state,
        from_base=config.exclude_from_checkpoint or [],
        dtype=dtype,
        where=str(path),
    )


def load_model(
    path: str | Path,
    state: Mapping[str, Tensor],
    *,
    dtype: Any = None,
    base_models: BasePaths | None = None,
) -> AsrLlmModel:
    """Return the model described in a directory, in eval mode.

    Args:
        path: directory with config.json and the tokenizer.
        state: weights; those of the encoder and the LLM that it leaves out are read from the base
            models.
        dtype: of the weights; None or "auto": the one that most numbers of `state` have.
        base_models: as in move_base_models.

    Raises:
        UserError: a key is missing, unexpected or has another shape, or a base model is missing
            or is not the one of training.
    """
    config, processor = read_description(path, base_models)
    from_base = ("audio_encoder", "llm")
    return assemble(config, processor, state, from_base=from_base, dtype=dtype, where=str(path))


def read_description(
    path: str | Path,
    base_models: BasePaths | None = None,
) -> tuple[AsrLlmConfig, AsrLlmProcessor]:
    processor = AsrLlmProcessor.from_pretrained(path)
    config = processor.config
    move_base_models(config, base_models, where=str(path))
    found = processor.tokenizer.convert_tokens_to_ids(config.audio_token)
    if found != config.audio_token_id:
        raise UserError(
            f"the tokenizer in {str(path)!r} has {config.audio_token!r} as {found}, config.json as {config.audio_token_id}: copy the "
            "tokenizer files that were saved with the model"
        )
    return config, processor


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a directory that save_pretrained wrote."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise UserError(
            f"{str(folder)!r} holds both {SINGLE} and {INDEX}: remove the one that is not of this model"
        )
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(
            f"{str(folder)!r} holds neither {SINGLE} nor {INDEX}: give a directory written by 'asrllm export' to its end"
        )
    files = indexed_files(index)
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{str(folder)!r} lacks {missing[0]}, which {INDEX} names: copy it again")
    return files


def own_weights(folder: Path) -> Path:
    """Return the file by which the weights of a directory of save_pretrained are named: the only one, or their index."""
    weight_files(folder)
    return folder / (SINGLE if (folder / SINGLE).is_file() else INDEX)


def read_tensors(file: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A safetensors file in memory, floating numbers as `dtype` where one is given.

    The tensors are copies, so that the file may be replaced while the model lives; its pages are let go on the way, so that they do not
    take the room of a second model.
    """
    state: dict[str, Tensor] = {}
    with open_tensors(file) as tensors:
        names = list(tensors.keys())
    while len(state) < len(names):
        taken = 0
        with open_tensors(file) as tensors:
            for name in names[len(state) :]:
                tensor = tensors.get_tensor(name)
                taken += tensor.nbytes
                state[name] = tensor.to(
                    dtype if dtype and tensor.is_floating_point() else tensor.dtype, copy=True
                )
                if taken > REOPEN:
                    break
            del tensor
    return state


@contextlib.contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """A safetensors file, mapped. Raises UserError where it cannot be read, inside the block too."""
    try:
        verify_weights(file)
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"the weights {str(file)!r} cannot be read ({' '.join(str(error).split())[:160]}): copy the file again"
        ) from error


def as_dtype(dtype: Any) -> torch.dtype | None:
    """A user's dtype: None and "auto" are None."""
    if isinstance(dtype, str) and dtype != "auto":
        if dtype.removeprefix("torch.") not in DTYPES:
            raise UserError(f"dtype={dtype!r} is unknown: {nearest(dtype, DTYPES)}")
        dtype = DTYPES[dtype.removeprefix("torch.")]
    if isinstance(dtype, torch.dtype) and dtype not in DTYPES.values():
        raise UserError(f"dtype={dtype} is none for weights: choose from {', '.join(DTYPES)}")
    return dtype if isinstance(dtype, torch.dtype) else None


def prevailing_dtype(state: Mapping[str, Tensor], where: str) -> torch.dtype:
    numbers: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        numbers[tensor.dtype] += tensor.numel() if tensor.is_floating_point() else 0
    if not numbers.total():
        raise UserError(f"the weights of {where!r} are empty: save the model again")
    return numbers.most_common(1)[0][0]


def assemble(
    config: AsrLlmConfig,
    processor: AsrLlmProcessor,
    state: Mapping[str, Tensor],
    *,
    from_base: Sequence[str],
    dtype: Any,
    where: str,
) -> AsrLlmModel:
    """The model in eval mode. Its parameters are the tensors of `state`, not copies of them; none is initialised first.

    from_base: parts that `state` need not hold, or not whole; what it lacks of them comes from their base models.
    """
    chosen = as_dtype(dtype) or prevailing_dtype(state, where)
    with parameters_on_meta():
        model = AsrLlmModel(config, llm=empty_llm(config.llm or {}, chosen, where=where))
        if (times := rank_in_file(model, state)) > 1:
            config = processor.config = with_ranks(config, times)
            model = AsrLlmModel(config, llm=empty_llm(config.llm or {}, chosen, where=where))
    state = without_second_names(model, state, where)
    for part in config.stored or {}:
        check_stored(
            config,
            part,
            sum(in_base(key, part) for key in state.keys() & model.weights().keys()),
            where,
        )
    based = [
        part
        for part in from_base
        if any(in_base(key, part) for key in model.weights().keys() - state.keys())
    ]
    if based:
        model = with_base_parts(config, based, chosen)
    set_generation_config(model.causal_lm, Path(where))
    state = scalars_again(model, state)
    expected = model.weights()
    needed = [key for key in expected if not any(in_base(key, part) for part in based)]
    check_state(
        state, expected, f"the weights of {where!r}", of_another("model", where), needed=needed
    )
    for key in list(
        state
    ):  # a tensor at a time: the ones of another dtype are let go, where nobody else holds them
        state[key] = state[key].to(chosen) if state[key].is_floating_point() else state[key]
    model.load_state_dict(state, strict=False, assign=True)
    model.llm.tie_weights()
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.processor = processor
    return cast(AsrLlmModel, model.eval())


def check_stored(config: AsrLlmConfig, part: str, found: int, where: str) -> None:
    """Raises UserError where weights hold more or fewer of a part than the run's checkpoints do."""
    count = (config.stored or {}).get(part, found)
    if found != count:
        raise UserError(
            f"the weights of {where!r} hold {found} of the {part}, its checkpoints {count}: {of_another('run', where)}"
        )


def of_another(what: str, where: str) -> str:
    """Why weights do not fit the run in directory `where`."""
    without = " or, of zero_to_fp32.py, lack those in inherited_weights.pt: make them with 'asrllm consolidate'"
    return f"they are of another {what}{without if (Path(where) / 'inherited_weights.pt').is_file() else ''}"


def rank_in_file(model: AsrLlmModel, state: Mapping[str, Tensor]) -> int:
    """How many times the rank of the model's adapters those of `state` have: averaged ones hold several checkpoints' factors."""
    for key, tensor in model.weights().items():
        if (
            (".lora_A." in key or ".lora_embedding_A." in key)
            and key in state
            and tensor.shape[1:] == state[key].shape[1:]
        ):
            return (
                state[key].shape[0] // tensor.shape[0]
                if state[key].shape[0] % tensor.shape[0] == 0
                else 1
            )
    return 1


def with_ranks(config: AsrLlmConfig, times: int) -> AsrLlmConfig:
    """The configuration with adapters of so many times the rank, and the same alpha."""
    config = copy.deepcopy(config)
    for options in (config.lora, config.audio_encoder_lora):
        if options is not None:
            options["r"] = options.get("r", 8) * times  # PEFT's default
            options["rank_pattern"] = {
                name: rank * times for name, rank in (options.get("rank_pattern") or {}).items()
            }
    return config


def in_base(key: str, part: str) -> bool:
    return key.startswith(f"{part}.") and not is_adapter(key)


def with_base_parts(config: AsrLlmConfig, parts: Sequence[str], dtype: torch.dtype) -> AsrLlmModel:
    """The model with the pretrained weights of some parts, and without memory for the others."""
    encoder = llm = None
    paths = base_paths(config, parts)
    if "audio_encoder" in parts:
        encoder = cast_parameters(pretrained_encoder(config, paths["audio_encoder"]), dtype)
    if "llm" in parts:
        llm = pretrained_llm(paths["llm"], dtype)
    with parameters_on_meta():
        return AsrLlmModel(
            config, audio_encoder=encoder, llm=llm or empty_llm(config.llm or {}, dtype)
        )


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters made inside have a shape and no memory, and initialising them takes no time; buffers are made as ever."""

    def without_memory(
        module: nn.Module, name: str, parameter: nn.Parameter | None
    ) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # the same object again, where weights are tied
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(without_memory)
    try:
        yield
    finally:
        handle.remove()


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Buffers keep theirs: a rotary embedding's frequencies lose the far positions in bfloat16."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def set_generation_config(llm: PreTrainedModel, folder: Path) -> None:
    if (folder / "generation_config.json").is_file():
        llm.generation_config = load_generation_config(folder)


def scalars_again(model: AsrLlmModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the model's scalars as such: training holds them as vectors of one element."""
    scalars = {name for name, tensor in model.weights().items() if tensor.dim() == 0}
    return {
        name: tensor.reshape(()) if name in scalars and tensor.numel() == 1 else tensor
        for name, tensor in state.items()
    }
