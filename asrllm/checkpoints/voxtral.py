"""Export a model as transformers' VoxtralForConditionalGeneration, which needs no other code.

Voxtral (Liu et al., 2025) has Whisper's encoder, a projector of 4 stacked frames and a causal LLM,
which reads 375 tokens for 30 s of audio with its silence.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel as TransformersModel
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    VoxtralConfig,
    WhisperFeatureExtractor,
)

from asrllm.atomic import new_folder
from asrllm.checkpoints.export import model_card
from asrllm.collator.chat import CHATML, CONSTANT_DATE, ChatRenderer
from asrllm.defaults import KEEP_SILENCE, MAX_SHARD_SIZE
from asrllm.errors import UserError
from asrllm.integrity import write_checksums
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.decoding_options import decoding_config
from asrllm.models.asr_llm.merging import merged_names, weight_source
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.auto import AutoModel, chosen_weights, load_model_config, model_folder
from asrllm.models.base_models import BasePaths
from asrllm.models.encoders.whisper import WHISPER_FRAMES
from asrllm.models.loss import HeadOptions, head_of
from asrllm.models.pretrained import empty_llm
from asrllm.models.state_dict import StateDict
from asrllm.tensor_files import PIECE, Spec, TensorSource, write_sharded
from asrllm.text_files import JsonObject

STACKED_FRAMES = 4
AUDIO_TOKENS = WHISPER_FRAMES // STACKED_FRAMES  # of any audio up to 30 s
# how names of weights begin here, and in the published Voxtral
WEIGHT_PREFIXES = {
    "audio_encoder.": "audio_tower.",
    "projector.mlp.linear1.": "multi_modal_projector.linear_1.",
    "projector.mlp.linear2.": "multi_modal_projector.linear_2.",
    "llm.": "language_model.",
}
EMBEDDINGS = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
# fields of the encoder here, and in VoxtralEncoderConfig
ENCODER_FIELDS = {
    "num_mel_bins": "num_mel_bins",
    "d_model": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_dim": "intermediate_size",
    "max_source_positions": "max_source_positions",
}
# fields of the LLM that differ on purpose, or that describe the file and not the model
NOT_COMPARED = (
    "architectures",
    "dtype",
    "head_dim",
    "rope_theta",
    "tie_word_embeddings",
    "transformers_version",
    "vocab_size",
    "_name_or_path",
)
EXAMPLE = """\
```python
import soundfile
from transformers import AutoFeatureExtractor, AutoTokenizer, VoxtralForConditionalGeneration

extractor = AutoFeatureExtractor.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
model = VoxtralForConditionalGeneration.from_pretrained("{name}")
audio, rate = soundfile.read("speech.wav", dtype="float32")  # mono, 16 kHz, at most 30 s
features = extractor(audio, sampling_rate=rate, return_tensors="pt").input_features
chat = [{{"role": "user", "content": {token} * {count} + {prompt}}}]
options = {{"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}}
inputs = tokenizer.apply_chat_template(chat, **options)
tokens = model.generate(**inputs, input_features=features.to(model.dtype))
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""


def export_voxtral(
    source: Path,
    output: Path,
    *,
    weights: str | Path | None = None,
    dtype: str = "bfloat16",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    repository: str | None = None,
    base_models: BasePaths | None = None,
) -> None:
    """Write a directory that transformers loads as Voxtral, with merged adapters and a card.

    Args:
        source: see `export`, as for the other arguments.
        output: see there.
        weights: see there.
        dtype: see there.
        max_shard_size: see there.
        repository: see there.
        base_models: see there.

    Raises:
        UserError: the model does not have Voxtral's shape or cannot be loaded, or the output is not
            empty.
    """
    folder = source.parent if source.is_file() else model_folder(source)
    chosen = chosen_weights(source if source.is_file() else folder, weights)
    check_shape(load_model_config(folder, base_models))
    with new_folder(output) as partial:
        model = AutoModel.from_pretrained(
            folder, weights=chosen, dtype=dtype, base_models=base_models
        )
        model.config.exclude_from_checkpoint = None  # all parts are written
        write_voxtral(model, partial, max_shard_size=max_shard_size)
        name = repository or output.name
        card = model_card(
            model.config,
            folder,
            name,
            weights=chosen,
            example=example_of(model, name),
            library="transformers",
        )
        (partial / "README.md").write_text(card, encoding="utf-8")


def check_shape(config: AsrLlmConfig) -> None:
    """Raise UserError unless Voxtral's classes of transformers can compute the model.

    Args:
        config: the model's configuration.
    """
    encoder = config.audio_encoder or {}
    with torch.device("meta"):
        llm = empty_llm(config.llm or {})
    _check_settings(config, llm.config.get_text_config().hidden_size)
    sizes = {
        "encoder_ffn_dim": STACKED_FRAMES * encoder["d_model"],
        "max_source_positions": WHISPER_FRAMES,
    }
    for name, needed in sizes.items():
        if encoder[name] != needed:
            raise UserError(
                f"--as voxtral needs {name}={needed} in a Whisper encoder with "
                f"d_model={encoder['d_model']}, but this one has {encoder[name]}. Train with a "
                "published Whisper."
            )
    problem = llm_problem(llm)
    if problem:
        raise UserError(
            f"--as voxtral does not support the LLM, a {llm.config.model_type!r} model: {problem}. "
            "Train with a Qwen2, Qwen3, Llama or Mistral model, or export without --as."
        )


def _check_settings(config: AsrLlmConfig, width: int) -> None:
    """Raise UserError if the model was trained with settings that Voxtral does not have.

    Args:
        config: the model's configuration.
        width: width of the LLM.
    """
    kind = (config.audio_encoder or {})["model_type"]
    settings = {
        "model.audio_encoder.model_type": (kind, "whisper"),
        "model.projector": (config.projector, "voxtral"),
        "model.projector_hidden_size": (config.projector_hidden_size, width),
        "model.audio_encoder_projector_ds_rate": (
            config.audio_encoder_projector_ds_rate,
            STACKED_FRAMES,
        ),
        "model.tag_audio_boundary": (config.tag_audio_boundary, False),
        "data.pad_to_30s": (config.pad_to_30s, KEEP_SILENCE),
    }
    wrong: list[str] = []
    needed: list[str] = []
    for key, (value, right) in settings.items():
        if value != right:
            wrong.append(f"{key}={_as_written(value)}")
            needed.append(f"{key}={_as_written(right)}")
    if wrong:
        raise UserError(
            f"--as voxtral needs a model of Voxtral's shape, but this one has {' '.join(wrong)}. "
            f"Train it with {' '.join(needed)}, or export without --as."
        )


def _as_written(value: object) -> str:
    """Return a value as a user writes it in an override."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def llm_problem(llm: PreTrainedModel) -> str:
    """Return why Voxtral's classes cannot compute an LLM, or "" if they can.

    They use the LLM's base model below a plain head.

    Args:
        llm: the LLM, whose weights are not used.
    """
    config = llm.config
    if config.get_text_config() is not config:
        return "it is a part of a model for more than text"
    head, options = head_of(llm)
    if options != HeadOptions() or head.bias is not None:
        return "it scales or shifts the logits after its head"
    own = {name: tensor.shape for name, tensor in llm.state_dict().items()}
    text = VoxtralConfig(text_config=text_fields(config, config.vocab_size)).text_config
    changed = [
        name
        for name, value in config.to_dict().items()
        if name not in NOT_COMPARED and text.to_dict().get(name) != value
    ]
    if changed:
        return f"transformers changes {changed[0]} in a Voxtral configuration"
    with torch.device("meta"):
        base = TransformersModel.from_config(text)
    theirs = {f"model.{name}": tensor.shape for name, tensor in base.state_dict().items()}
    if own != theirs | {"lm_head.weight": head.weight.shape}:
        return "its weights are not those of a base model and a head"
    return ""


def text_fields(llm: PreTrainedConfig, rows: int) -> JsonObject:
    """Return the configuration of the LLM in a Voxtral configuration.

    VoxtralConfig sets missing fields to those of Voxtral Mini, so none may be missing.

    Args:
        llm: the LLM's configuration.
        rows: number of embeddings.
    """
    fields = llm.to_dict()
    fields.setdefault("head_dim", llm.hidden_size // llm.num_attention_heads)
    rope = fields.get("rope_parameters") or {}
    fields.setdefault("rope_theta", rope.get("rope_theta"))
    fields.pop("_name_or_path", None)
    # The head is written in any case, because Voxtral does not tie it.
    return fields | {"vocab_size": rows, "tie_word_embeddings": False}


def write_voxtral(model: AsrLlmModel, folder: Path, *, max_shard_size: int | str) -> None:
    """Write the files of a model that has Voxtral's shape.

    Args:
        model: the model.
        folder: an empty directory.
        max_shard_size: maximum size of each file.
    """
    processor = model.require_processor()
    text = model.causal_lm.config
    audio_token_id = model.config.audio_token_id
    assert audio_token_id is not None
    rows = max(text.vocab_size, audio_token_id + 1)
    fields = model.config.audio_encoder or {}
    audio = {theirs: fields[own] for own, theirs in ENCODER_FIELDS.items()}
    config = VoxtralConfig(
        text_config=text_fields(text, rows),
        audio_config={"model_type": "voxtral_encoder", "vocab_size": rows} | audio,
        audio_token_id=audio_token_id,
        tie_word_embeddings=False,
        architectures=["VoxtralForConditionalGeneration"],
        dtype=model.dtype,
    )
    # all fields, also those with Voxtral's defaults, see text_fields
    content = json.dumps(config.to_dict(), indent=2)
    (folder / "config.json").write_text(content + "\n", encoding="utf-8")
    WhisperFeatureExtractor(feature_size=fields["num_mel_bins"]).save_pretrained(folder)
    hub_tokenizer(processor.renderer).save_pretrained(folder)
    settings = decoding_config(None, None, processor.renderer.stop_ids)
    if rows > text.vocab_size:  # the logits of added rows are 0
        settings.suppress_tokens = list(range(text.vocab_size, rows))
    settings.save_pretrained(folder)
    source = voxtral_weights(model, rows)
    write_sharded(source, folder, max_shard_size=max_shard_size, what="model")
    write_checksums(folder)


def hub_tokenizer(renderer: ChatRenderer) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer whose own chat template renders the chats of training."""
    tokenizer = copy.deepcopy(renderer.tokenizer)
    template = tokenizer.chat_template or CHATML
    if "strftime_now" in template:
        template = CONSTANT_DATE + template
    tokenizer.chat_template = template
    chat = renderer.user_messages("?")
    expected = renderer.encode_prompt(chat, [1])
    rendered = _template_ids(tokenizer, chat)
    missing = len(expected) - len(rendered)
    if rendered != expected:  # the template does not write the BOS
        before = "".join(tokenizer.convert_ids_to_tokens(expected[:missing]))
        tokenizer.chat_template = "{{ " + repr(before) + " }}" + template
    if _template_ids(tokenizer, chat) != expected:
        raise UserError(
            "--as voxtral: the tokenizer does not encode the chat template as training did. Export "
            "without --as."
        )
    return tokenizer


def _template_ids(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> list[int]:
    """Return the tokens of a chat up to the answer, by the tokenizer's own template."""
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert isinstance(ids, list)
    return ids


def voxtral_weights(model: AsrLlmModel, rows: int) -> TensorSource:
    """Return the weights under the names of the published Voxtral, with merged adapters.

    Args:
        model: the model.
        rows: number of embeddings. Rows beyond those of the LLM are 0.
    """
    state: StateDict = model.weights()
    tuned: dict[str, nn.Module] = {}
    if model.config.lora or model.config.audio_encoder_lora:
        state, tuned = merged_names(model, state)
    names = {key: voxtral_name(key) for key in state}
    whole = {names[key]: tensor for key, tensor in state.items()}
    adapted = {names[key]: layer for key, layer in tuned.items()}
    if HEAD not in whole:  # tied
        whole[HEAD] = whole[EMBEDDINGS]
    return with_rows(weight_source(whole, adapted), (EMBEDDINGS, HEAD), rows)


def voxtral_name(key: str) -> str:
    """Return the name of a weight in the published Voxtral."""
    for own, theirs in WEIGHT_PREFIXES.items():
        if key.startswith(own):
            return theirs + key.removeprefix(own)
    raise KeyError(key)


def with_rows(source: TensorSource, names: tuple[str, ...], rows: int) -> TensorSource:
    """Return weights in which some matrices have zeros as further rows.

    Args:
        source: the weights.
        names: the matrices.
        rows: number of their rows.
    """
    specs: dict[str, Spec] = dict(source.specs)
    for name in names:
        spec = specs[name]
        specs[name] = Spec((rows, *spec.shape[1:]), spec.dtype)

    def pieces(name: str) -> Iterator[Tensor]:
        yield from source.pieces(name)
        missing = specs[name].numel - source.specs[name].numel
        while missing:
            piece = torch.zeros(min(missing, PIECE), dtype=specs[name].dtype)
            missing -= len(piece)
            yield piece

    return TensorSource(specs, pieces, source.about, source.check)


def example_of(model: AsrLlmModel, name: str) -> str:
    """Return the example of the card, in Markdown.

    Args:
        model: the model.
        name: the name to load it by.
    """
    processor = model.require_processor()
    prompt = f" {processor.default_prompt}".rstrip()
    token = json.dumps(model.config.audio_token, ensure_ascii=False)
    return EXAMPLE.format(
        name=name,
        token=token,
        count=AUDIO_TOKENS,
        prompt=json.dumps(prompt, ensure_ascii=False),
    )
