"""Load directories of Auden's audio LLM by renaming keys and configuration fields.

The layout is that of Auden's `LalmModel` (model_type "lalm") and of its predecessor `AudioLLMModel`
("audio-llm"), as `examples/asr_llm/train.py` in the public repository writes it, at the commits
b37b67e and fe07b55 (2025):

    config.json        audio_encoder_config, llm_config, audio_encoder_projector_ds_rate,
                       tag_audio_boundary, audio_token, ...
    tokenizer files    with the audio token added; the chat is ChatML, whatever the tokenizer's own
                       template
    pretrained.safetensors, model.safetensors, pretrained.pt or model.pt
                       the first that exists; flat or below "state_dict"
    audio_encoder/     the encoder alone, if exclude_from_checkpoint names it
    llm/               a Hugging Face directory, if exclude_from_checkpoint names it

That layout has no adapters and does not store prompts. Its config.json does not contain whether
training padded to 30 s: pad_to_30s is false. Auden's projector drops the frames after the last full
stack (drop_ragged_frames).
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from asrllm.collator.chat import CHATML
from asrllm.errors import UserError
from asrllm.models.asr_llm.checks import check_config_fields, read_config_fields
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.loading import assemble, set_generation_config
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.asr_llm.placement import Dtype, as_dtype, prevailing_dtype
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.models.asr_llm.weight_files import read_tensors, weight_files
from asrllm.models.encoders.whisper_weights import WHISPER_FIELDS
from asrllm.models.encoders.zipformer.configuration import ZIPFORMER_FIELDS, ZipformerConfig
from asrllm.models.encoders.zipformer.modeling import plain_fields
from asrllm.models.encoders.zipformer.weights import load_tensors, read_zipformer, without_dead_keys
from asrllm.models.hub_files import load_tokenizer
from asrllm.models.model_args import PRETRAINED_PARTS
from asrllm.models.state_dict import StateDict
from asrllm.text_files import JsonObject, first_words

MODEL_TYPES = ("lalm", "audio-llm")
AUDEN_WEIGHT_NAMES = ("pretrained.safetensors", "model.safetensors", "pretrained.pt", "model.pt")
# Auden's key: the key here
AUDEN_KEYS = {
    "encoder_projector.linear1.weight": "projector.mlp.linear1.weight",
    "encoder_projector.linear1.bias": "projector.mlp.linear1.bias",
    "encoder_projector.linear2.weight": "projector.mlp.linear2.weight",
    "encoder_projector.linear2.bias": "projector.mlp.linear2.bias",
    # (2, width): the embeddings before and after the audio
    "audio_tag_embedding": "projector.boundary",
}
USED_FIELDS = {
    "model_type",
    "audio_encoder_config",
    "llm_config",
    "audio_encoder_projector_ds_rate",
    "tag_audio_boundary",
    "audio_token",
    "exclude_from_checkpoint",
}
# fields that do not change what the model computes.
IGNORED_FIELDS = {
    "use_flash_attn",
    "max_total_length",
    "max_length",
    "architectures",
    "transformers_version",
    "torch_dtype",
    "dtype",
}
IGNORED_ZIPFORMER_FIELDS = {"model_type", "warmup_batches", "dropout"}
COPY_AUDEN_CONFIG = "Copy the config.json that Auden's training wrote."
BOTH = "is both in the weights and in a subdirectory. Remove one of them."
NEITHER = "is neither in the weights nor in a subdirectory. Copy the directory again."
WHISPER_CONSTANTS = {"activation_function": "gelu", "scale_embedding": False}


def load_auden(
    folder: Path, *, weights: str | Path | None = None, dtype: Dtype = None
) -> AsrLlmModel:
    """Return the model in a directory of Auden, in eval mode. All keys must be known.

    Args:
        folder: the directory.
        weights: another weight file of the same model.
        dtype: dtype of the weights. None or "auto" means the most frequent one in the file.

    Raises:
        UserError: the directory does not have the layout above, or has a field or a key that would
            change what the model computes.
    """
    fields = read_fields(folder)
    state = read_weights(folder, Path(weights) if weights else None, fields)
    chosen = as_dtype(dtype) or prevailing_dtype(state, str(folder))
    processor = read_processor(folder, fields)
    model = assemble(
        AsrLlmModel,
        processor.config,
        processor,
        state,
        from_base=(),
        dtype=chosen,
        where=str(folder),
    )
    set_generation_config(model.llm, folder / "llm")
    return model


def read_auden_config(folder: Path) -> AsrLlmConfig:
    """Return the configuration in a directory of Auden, without the audio token's id.

    The id is only known to the tokenizer.
    """
    return AsrLlmConfig(**read_fields(folder))


def read_fields(folder: Path) -> JsonObject:
    """Return the fields of AsrLlmConfig that Auden's config.json determines."""
    fields = config_fields(read_config_fields(folder), str(folder))
    check_config_fields(fields, str(folder / "config.json"))
    return fields


def config_fields(theirs: JsonObject, where: str) -> JsonObject:
    """Convert the fields of Auden's config.json to those of AsrLlmConfig.

    Args:
        theirs: the content of config.json.
        where: its directory, for error messages.

    Raises:
        UserError: a field is unknown or missing.
    """
    unknown = sorted(theirs.keys() - USED_FIELDS - IGNORED_FIELDS)
    if unknown:
        raise UserError(
            f"{where}/config.json: the field {unknown[0]!r} of Auden's lalm is not supported, and "
            "may change what the model computes. Remove it if it does not."
        )
    for name in ("audio_encoder_config", "llm_config"):
        if not isinstance(theirs.get(name), dict):
            raise UserError(f"{where}/config.json has no {name}. {COPY_AUDEN_CONFIG}")
    llm = _llm_config(theirs["llm_config"], where)
    return {
        "audio_encoder": encoder_fields(theirs["audio_encoder_config"], where),
        "llm": llm.to_dict(),
        "projector": "mlp",
        "projector_hidden_size": llm.get_text_config().hidden_size,
        "audio_encoder_projector_ds_rate": theirs.get("audio_encoder_projector_ds_rate", 8),
        "drop_ragged_frames": True,
        "audio_token": theirs.get("audio_token", "<|AUDIO|>"),
        "tag_audio_boundary": theirs.get("tag_audio_boundary", False),
    }


def _llm_config(theirs: JsonObject, where: str) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(**theirs)
    except Exception as error:  # transformers raises AttributeError and KeyError as well
        raise UserError(
            f"{where}/config.json: llm_config does not describe an LLM that transformers knows: "
            f"{first_words(error)}. {COPY_AUDEN_CONFIG}"
        ) from error


def encoder_fields(theirs: JsonObject, where: str) -> JsonObject:
    """Convert Auden's audio_encoder_config to the `audio_encoder` part of AsrLlmConfig."""
    kind = theirs.get("model_type")
    if kind == "zipformer":
        return _zipformer_fields(theirs, where)
    if kind == "whisper":
        return _whisper_fields(theirs, where)
    raise UserError(
        f"{where}/config.json: audio_encoder_config.model_type={kind!r} is neither 'zipformer' nor "
        "'whisper'. Give a model with one of them."
    )


def _zipformer_fields(theirs: JsonObject, where: str) -> JsonObject:
    unknown = sorted(theirs.keys() - IGNORED_ZIPFORMER_FIELDS - set(ZIPFORMER_FIELDS))
    if unknown:
        raise UserError(
            f"{where}/config.json: the field audio_encoder_config.{unknown[0]} of Auden's "
            "Zipformer is not supported, and may change what the model computes. Remove it if it "
            "does not."
        )
    known = {name: value for name, value in theirs.items() if name in ZIPFORMER_FIELDS}
    return {"model_type": "zipformer"} | plain_fields(ZipformerConfig(**known))


def _whisper_fields(theirs: JsonObject, where: str) -> JsonObject:
    whisper = AutoConfig.for_model(**theirs)
    for name, value in WHISPER_CONSTANTS.items():
        found = getattr(whisper, name)
        if found != value:
            raise UserError(
                f"{where}/config.json: audio_encoder_config.{name}={found!r} is not supported. Use "
                f"a model with {value!r}."
            )
    return {"model_type": "whisper"} | {name: getattr(whisper, name) for name in WHISPER_FIELDS}


def read_processor(folder: Path, fields: JsonObject) -> AsrLlmProcessor:
    """Return the processor in a directory of Auden.

    Args:
        folder: the directory.
        fields: the fields of AsrLlmConfig, from `read_fields`.
    """
    AsrLlmProcessor.check_files(folder)
    config = AsrLlmConfig(**fields)
    # without config, transformers would read config.json, whose model_type it does not know
    tokenizer = load_tokenizer(folder, config=config)
    tokenizer.chat_template = CHATML
    token = fields["audio_token"]
    if token not in tokenizer.get_vocab():
        raise UserError(
            f"the tokenizer in {str(folder)!r} has no audio token {token!r}. Copy the tokenizer "
            "files that Auden wrote there."
        )
    config.audio_token_id = tokenizer.convert_tokens_to_ids(token)
    return AsrLlmProcessor(tokenizer, config)


def read_weights(folder: Path, file: Path | None, fields: JsonObject) -> StateDict:
    """Return all weights of a directory of Auden, under our names.

    Args:
        folder: the directory. Parts that the weight file does not contain are in subdirectories.
        file: the weight file; by default the first of AUDEN_WEIGHT_NAMES that exists.
        fields: the fields of AsrLlmConfig, from `read_fields`.
    """
    file = file or _default_file(folder)
    if file is None or not file.is_file():
        raise UserError(
            f"{str(file or folder)!r} has no weights (none of {', '.join(AUDEN_WEIGHT_NAMES)}). "
            "Give the file with weights=."
        )
    state = from_auden_names(load_tensors(file), str(file))
    for part in PRETRAINED_PARTS:
        is_in_file = any(key.startswith(f"{part}.") for key in state)
        is_beside = (folder / part).is_dir()
        if is_in_file == is_beside:
            raise UserError(f"{str(folder)!r}: the {part} {BOTH if is_in_file else NEITHER}")
        if is_beside:
            tensors = _read_part_weights(part, folder / part, fields)
            state |= {f"{part}.{key}": tensor for key, tensor in tensors.items()}
    return without_dead_keys(state)


def _default_file(folder: Path) -> Path | None:
    for name in AUDEN_WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    return None


def from_auden_names(state: Mapping[str, Tensor], where: str) -> StateDict:
    """Rename Auden's keys by AUDEN_KEYS. Those of pretrained parts are the same here.

    Args:
        state: the weights.
        where: their file, for error messages.

    Raises:
        UserError: a key is unknown, or belongs to an adapter.
    """
    result: StateDict = {}
    for theirs, tensor in state.items():
        key = theirs.removeprefix("module.")
        if "lora_" in key:
            raise UserError(
                f"{where!r} contains adapters ({key!r}), but Auden's config.json does not contain "
                "their scale. Merge them into the LLM first."
            )
        if key not in AUDEN_KEYS and key.partition(".")[0] not in PRETRAINED_PARTS:
            raise UserError(
                f"{where!r}: the key {key!r} of Auden's lalm is not supported. Give a file that "
                "Auden's training wrote."
            )
        result[AUDEN_KEYS.get(key, key)] = tensor
    return result


def _read_part_weights(part: str, folder: Path, fields: JsonObject) -> StateDict:
    """Read a part's subdirectory: the weights by their names within the part."""
    if part == "llm":
        return _read_llm(folder, fields)
    if fields["audio_encoder"]["model_type"] == "zipformer":
        return read_zipformer(folder)[1]
    tensors = _read_files(folder)
    return {
        key.removeprefix("model.").removeprefix("encoder."): tensor
        for key, tensor in tensors.items()
    }


def _read_llm(folder: Path, fields: JsonObject) -> StateDict:
    kind = read_config_fields(folder).get("model_type")
    expected = fields["llm"]["model_type"]
    if kind != expected:
        raise UserError(
            f"{str(folder)!r} is a {kind!r} model, but llm_config has {expected!r}. Copy the LLM "
            "that was used in training."
        )
    return _read_files(folder)


def _read_files(folder: Path) -> StateDict:
    state: StateDict = {}
    for file in weight_files(folder):
        state.update(read_tensors(file))
    return state
