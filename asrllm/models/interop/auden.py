"""Directories of Auden's audio LLM, read by renaming keys and configuration fields.

The layout is that of Auden's `LalmModel` (model_type "lalm") and of `AudioLLMModel` before it ("audio-llm"), as `examples/asr_llm/train.py`
writes it, in the public repository at commits b37b67e and fe07b55 (2025):

    config.json        audio_encoder_config, llm_config, audio_encoder_projector_ds_rate, tag_audio_boundary, audio_token, ...
    tokenizer files    with the audio token added; the chat is ChatML, whatever the tokenizer's own template
    pretrained.safetensors, model.safetensors, pretrained.pt or model.pt (the first that is there), flat or below "state_dict"
    audio_encoder/     the encoder by itself, where exclude_from_checkpoint names it
    llm/               a Hugging Face directory, where exclude_from_checkpoint names it

There are no adapters in that layout, and its config.json does not say whether training padded to 30 s: pad_to_30s is false. Prompts are
not kept either. Its projector drops the frames behind the last full stack (drop_ragged_frames).
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from asrllm.collator.chat import CHATML
from asrllm.errors import UserError
from asrllm.models.asr_llm.checks import check_fields, read_json
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.models.asr_llm.serialization import (
    as_dtype,
    assemble,
    prevailing_dtype,
    read_tensors,
    set_generation_config,
    weight_files,
)
from asrllm.models.encoders.whisper_weights import FIELDS as WHISPER_FIELDS
from asrllm.models.encoders.zipformer.configuration import FIELDS as ZIPFORMER_FIELDS
from asrllm.models.encoders.zipformer.configuration import ZipformerConfig
from asrllm.models.encoders.zipformer.weights import load_tensors, read_zipformer, without_dead_keys
from asrllm.models.hub_files import load_tokenizer

MODEL_TYPES = ("lalm", "audio-llm")
WEIGHTS = ("pretrained.safetensors", "model.safetensors", "pretrained.pt", "model.pt")
KEYS = {
    "encoder_projector.linear1.weight": "projector.mlp.linear1.weight",
    "encoder_projector.linear1.bias": "projector.mlp.linear1.bias",
    "encoder_projector.linear2.weight": "projector.mlp.linear2.weight",
    "encoder_projector.linear2.bias": "projector.mlp.linear2.bias",
    "audio_tag_embedding": "projector.boundary",  # (2, width): what stands before the audio, what stands behind it
}
PARTS = ("audio_encoder", "llm")  # their keys are the same here and there
READ = {"model_type", "audio_encoder_config", "llm_config", "audio_encoder_projector_ds_rate", "tag_audio_boundary", "audio_token",
        "exclude_from_checkpoint"}  # fmt: skip
NO_ARITHMETIC = {
    "use_flash_attn",
    "max_total_length",
    "max_length",
    "architectures",
    "transformers_version",
    "torch_dtype",
    "dtype",
}
ZIPFORMER_TRAINING = {"model_type", "warmup_batches", "dropout"}


def load_auden(
    folder: Path, *, weights: str | Path | None = None, dtype: Any = None
) -> AsrLlmModel:
    """The model of an Auden directory, in eval mode; strict about keys.

    weights: another file of the directory's model. dtype: as for AutoModel; None is the one that most of the numbers have.
    Raises UserError where the directory is not of the layout above, or has what would be computed otherwise.
    """
    fields = read_fields(folder)
    state = read_weights(folder, Path(weights) if weights else None, fields)
    chosen = as_dtype(dtype) or prevailing_dtype(state, str(folder))
    processor = read_processor(folder, fields)
    model = assemble(
        processor.config, processor, state, from_base=(), dtype=chosen, where=str(folder)
    )
    set_generation_config(model.llm, folder / "llm")
    return model


def read_auden_config(folder: Path) -> AsrLlmConfig:
    """What config.json says; the audio token's id is the tokenizer's to say."""
    return AsrLlmConfig(**read_fields(folder))


def read_fields(folder: Path) -> dict[str, Any]:
    fields = config_fields(read_json(folder / "config.json"), str(folder))
    check_fields(fields, str(folder / "config.json"))
    return fields


def config_fields(theirs: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Auden's config.json -> the fields of AsrLlmConfig, but for the tokenizer's. Raises UserError naming a field that is not known."""
    if unknown := sorted(theirs.keys() - READ - NO_ARITHMETIC):
        raise UserError(
            f"{where}/config.json: {unknown[0]!r} is no field of Auden's lalm that is known here, and may change what it computes"
        )
    for name in ("audio_encoder_config", "llm_config"):
        if not isinstance(theirs.get(name), dict):
            raise UserError(
                f"{where}/config.json has no {name}: copy the config.json that Auden's training wrote"
            )
    try:
        llm = AutoConfig.for_model(**theirs["llm_config"])
    except Exception as error:  # transformers raises AttributeError and KeyError as well
        raise UserError(
            f"{where}/config.json: llm_config is of no LLM that transformers knows: {' '.join(str(error).split())[:160]}"
        ) from error
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


def encoder_fields(theirs: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = theirs.get("model_type")
    if kind == "zipformer":
        if unknown := sorted(theirs.keys() - ZIPFORMER_TRAINING - set(ZIPFORMER_FIELDS)):
            raise UserError(
                f"{where}/config.json: audio_encoder_config.{unknown[0]} is no field of a Zipformer that is known here"
            )
        config = ZipformerConfig(**{k: v for k, v in theirs.items() if k in ZIPFORMER_FIELDS})
        return {"model_type": kind} | {
            k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()
        }
    if kind != "whisper":
        raise UserError(
            f"{where}/config.json: audio_encoder_config.model_type={kind!r} is neither 'zipformer' nor 'whisper'"
        )
    whisper = AutoConfig.for_model(**theirs)
    for name, value in (("activation_function", "gelu"), ("scale_embedding", False)):
        if getattr(whisper, name) != value:
            raise UserError(
                f"{where}/config.json: audio_encoder_config.{name}={getattr(whisper, name)!r} is not built here, only {value!r}"
            )
    return {"model_type": kind} | {name: getattr(whisper, name) for name in WHISPER_FIELDS}


def read_processor(folder: Path, fields: dict[str, Any]) -> AsrLlmProcessor:
    AsrLlmProcessor.check_files(folder)
    config = AsrLlmConfig(**fields)
    tokenizer = load_tokenizer(
        folder, config=config
    )  # else it reads config.json, whose kind it does not know
    tokenizer.chat_template = CHATML
    token = fields["audio_token"]
    if token not in tokenizer.get_vocab():
        raise UserError(
            f"the tokenizer in {str(folder)!r} lacks the audio token {token!r}: copy the tokenizer files that Auden wrote there"
        )
    config.audio_token_id = tokenizer.convert_tokens_to_ids(token)
    return AsrLlmProcessor(tokenizer, config)


def read_weights(folder: Path, file: Path | None, fields: dict[str, Any]) -> dict[str, Tensor]:
    """All weights by our names: of the weight file, and of the sub-directories of the parts that it leaves out."""
    file = file or next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None or not file.is_file():
        raise UserError(
            f"{str(file or folder)!r} holds no weights (none of {', '.join(WEIGHTS)}): give the file with weights="
        )
    state = renamed(load_tensors(file), str(file))
    for part, read in (("audio_encoder", read_encoder), ("llm", read_llm)):
        inside, beside = any(key.startswith(f"{part}.") for key in state), (folder / part).is_dir()
        if inside == beside:
            found = (
                "is both in the weights and in a sub-directory: remove one"
                if inside
                else "is neither in the weights nor a sub-directory"
            )
            raise UserError(f"{str(folder)!r}: the {part} {found}")
        if beside:
            state |= {
                f"{part}.{key}": tensor for key, tensor in read(folder / part, fields).items()
            }
    return without_dead_keys(state)


def renamed(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Auden's keys -> ours, by KEYS; those below PARTS stay. Raises UserError naming another."""
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    for key in state:
        if "lora_" in key:
            raise UserError(
                f"{where!r} holds adapters ({key!r}), whose scale Auden's config.json does not say: merge them into the LLM first"
            )
        if key not in KEYS and key.partition(".")[0] not in PARTS:
            raise UserError(f"{where!r}: {key!r} is no key of Auden's lalm that is known here")
    return {KEYS.get(key, key): tensor for key, tensor in state.items()}


def read_encoder(folder: Path, fields: dict[str, Any]) -> dict[str, Tensor]:
    if fields["audio_encoder"]["model_type"] == "zipformer":
        return read_zipformer(folder)[1]
    state = {
        key: tensor for file in weight_files(folder) for key, tensor in read_tensors(file).items()
    }
    return {
        key.removeprefix("model.").removeprefix("encoder."): tensor for key, tensor in state.items()
    }


def read_llm(folder: Path, fields: dict[str, Any]) -> dict[str, Tensor]:
    kind = read_json(folder / "config.json").get("model_type")
    if kind != fields["llm"]["model_type"]:
        raise UserError(
            f"{str(folder)!r} is a {kind!r} model, and llm_config says {fields['llm']['model_type']!r}: copy the one of training"
        )
    return {
        key: tensor for file in weight_files(folder) for key, tensor in read_tensors(file).items()
    }
