"""Build the model of a run's configuration, with pretrained parts."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from asrllm.collator.chat import CHATML
from asrllm.data.prompts import Prompt, check_prompts
from asrllm.defaults import ENCODER_KEY, LLM_KEY, PadTo30s
from asrllm.errors import UserError, nearest
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.asr_llm.processing import AsrLlmProcessor, load_llm_tokenizer
from asrllm.models.config_numbers import MAX_ENCODER_NUMBER, MAX_LLM_NUMBER, check_numbers
from asrllm.models.encoders.registry import (
    build_encoder,
    check_encoder_kind,
    encoder_class,
    encoder_sizes,
)
from asrllm.models.fingerprint import fingerprint, resolve_pretrained
from asrllm.models.hub_files import (
    CORRECT_CONFIG,
    check_directory,
    load_generation_config,
    load_hf_config,
)
from asrllm.models.init_from import load_initial_weights
from asrllm.models.loss import head_of
from asrllm.models.model_args import (
    EncoderPart,
    LoraPart,
    ModelConfig,
    is_directory_or_hub_id,
)
from asrllm.models.partitioning import gathered
from asrllm.models.pretrained import (
    check_encoder_state,
    check_family,
    initial_encoder,
    layer_without_bias,
    pretrained_llm,
)
from asrllm.models.state_dict import is_adapter
from asrllm.text_files import JsonObject, first_words, read_json_object, reading

GIVE_TOKENIZER = "Give the tokenizer that belongs to the LLM."

MAX_SAMPLED_EMBEDDINGS = 4096


def build_processor(
    config: ModelConfig, *, pad_to_30s: PadTo30s, prompts: tuple[str, ...]
) -> AsrLlmProcessor:
    """Return the processor of the configured model.

    Args:
        config: the `model` part of the run's configuration.
        pad_to_30s: whether Whisper's features are padded to 30 s, see WhisperEncoder.
        prompts: prompts that training mixes.

    Raises:
        UserError: for every mistake that can be found without loading the weights.
    """
    check_prompts(prompts, config.audio_token)
    encoder = config.audio_encoder
    paths: dict[str, str] = {}
    if encoder.size is None:
        found = resolve_pretrained(encoder.pretrained_model or "", file=True, what=ENCODER_KEY)
        paths["audio_encoder"] = str(found)
    llm_path = str(resolve_pretrained(config.llm.pretrained_model or "", what=LLM_KEY))
    paths["llm"] = llm_path
    check_directory(llm_path, LLM_KEY)
    llm = load_hf_config(llm_path, LLM_KEY)
    tokenizer = load_llm_tokenizer(
        llm_path, audio_token=config.audio_token, chat_template=config.llm.chat_template
    )
    _check_base_llm(config, llm, llm_path)
    if encoder.size is None:
        fields = _check_base_encoder(config, paths["audio_encoder"], pad_to_30s=pad_to_30s)
    else:
        fields = _fields_of_size(encoder, encoder.size, pad_to_30s=pad_to_30s)
    description = AsrLlmConfig(
        audio_encoder={"model_type": encoder.kind} | fields,
        llm=llm.to_dict(),
        lora=_peft_options(config.llm.lora),
        audio_encoder_lora=_peft_options(encoder.lora),
        projector=config.projector,
        projector_hidden_size=config.projector_hidden_size,
        audio_encoder_projector_ds_rate=config.audio_encoder_projector_ds_rate,
        audio_token=config.audio_token,
        audio_token_id=tokenizer.convert_tokens_to_ids(config.audio_token),
        tag_audio_boundary=config.tag_audio_boundary,
        pad_to_30s=pad_to_30s,
        exclude_from_checkpoint=config.exclude_from_checkpoint,
        base_models={
            part: {"path": path, "fingerprint": fingerprint(path)} for part, path in paths.items()
        },
        prompts=list(prompts),
    )
    processor = AsrLlmProcessor(tokenizer, description)
    check_vocabulary(processor, llm.get_text_config().vocab_size, llm_path)
    return processor


def _peft_options(lora: LoraPart | None) -> JsonObject | None:
    return None if lora is None else lora.as_peft()


def _check_base_llm(config: ModelConfig, llm: PreTrainedConfig, path: str) -> None:
    """Check the LLM's family, and build it without memory for its weights.

    Raises:
        UserError: the family is not the configured one or is not supported, config.json has values
            from which the LLM cannot be built, or generation_config.json is corrupted.
    """
    expected = config.llm.model_type
    if expected and is_directory_or_hub_id(expected):
        stated = resolve_pretrained(expected) / "config.json"
        expected = read_json_object(stated, "the LLM's configuration").get("model_type")
    if expected not in (None, llm.model_type):
        raise UserError(
            f"model.llm.model_type={config.llm.model_type!r}, but {path!r} is a "
            f"{llm.model_type!r} model. "
            "Correct model_type, or leave it null."
        )
    file = Path(path) / "config.json"
    fix = CORRECT_CONFIG
    check_numbers(llm.to_dict(), MAX_LLM_NUMBER, f"{str(file)!r}: ", fix)
    with reading(file, "the LLM's configuration", fix), torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(llm, trust_remote_code=False)
    check_family(empty)
    if (Path(path) / "generation_config.json").is_file():
        load_generation_config(path)


def _check_base_encoder(
    config: ModelConfig,
    path: str,
    *,
    pad_to_30s: PadTo30s,
) -> JsonObject:
    """Return the fields of the audio encoder at `path`.

    Raises:
        UserError: its files are corrupted, or its weights do not fit its configuration.
    """
    kind = config.audio_encoder.kind
    check_encoder_kind(kind, Path(path))
    fields, state = encoder_class(kind).read_pretrained(path)
    what = f"the configuration of {ENCODER_KEY}"
    fix = "Correct config.json, or download it again."
    check_numbers(fields, MAX_ENCODER_NUMBER, f"{path!r}: ", fix)
    with reading(path, what, fix), torch.device("meta"):
        encoder: nn.Module = build_encoder({"model_type": kind} | fields, pad_to_30s=pad_to_30s)
    check_encoder_state(state, encoder, path)
    if config.audio_encoder.model_type != kind:
        _check_same_encoder(config.audio_encoder.model_type, fields, path)
    return fields


def _check_same_encoder(model_type: str, fields: JsonObject, path: str) -> None:
    """Check that the config.json at `model_type` agrees with the pretrained encoder at `path`."""
    config = resolve_pretrained(model_type) / "config.json"
    stated = read_json_object(config, "the encoder's configuration")
    for name, value in fields.items():
        if stated.get(name, value) != value:
            raise UserError(
                f"model.audio_encoder.model_type={str(config)!r} has {name}={stated[name]}, but "
                f"{ENCODER_KEY}={path!r} has {value}. Set model_type={stated['model_type']} to use "
                "the fields of the pretrained model."
            )


def _fields_of_size(part: EncoderPart, size: str, *, pad_to_30s: PadTo30s) -> JsonObject:
    """Return the fields of an encoder without pretrained weights.

    Raises:
        UserError: a changed field is unknown, or no encoder can be built with it.
    """
    fields = encoder_sizes(part.kind)[size]
    changes = part.fields or {}
    where = "model.audio_encoder.fields"
    for name in changes:
        if name not in fields:
            raise UserError(f"{where}: {part.kind} has no field {name}. {nearest(name, fields)}")
    fields = fields | changes
    check_numbers(fields, MAX_ENCODER_NUMBER, f"{where}.", "See docs/models.md.")
    try:
        with torch.device("meta"):
            encoder = build_encoder({"model_type": part.kind} | fields, pad_to_30s=pad_to_30s)
            encoder.start_from_scratch()
    except UserError as error:
        raise UserError(f"{where}={changes}: {error}") from error
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"{where}={changes} does not describe a {part.kind}: {first_words(error)}. Correct it."
        ) from error
    return fields


def check_vocabulary(processor: AsrLlmProcessor, size: int, path: str) -> None:
    """Check that the LLM has an embedding for every token that it may be given.

    Args:
        processor: the processor.
        size: number of the LLM's embeddings.
        path: the LLM's directory, for error messages.

    Raises:
        UserError: a token of the chat or of the tokenizer has no embedding, or the chat is ChatML
            and the tokenizer has no tokens for it.
    """
    tokenizer = processor.tokenizer
    _check_chat_tokens(processor, size, path)
    beyond = words_beyond(tokenizer, size)
    if beyond:
        raise UserError(
            f"the LLM {path!r} has {size} embeddings (vocab_size in config.json), and its "
            f"tokenizer has {len(beyond)} tokens without one (first: {beyond[0]!r}). "
            f"{GIVE_TOKENIZER}"
        )
    _check_chatml(tokenizer, path)


def _check_chatml(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Raise UserError if the chat template is ChatML and the tokenizer has no tokens for it."""
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    if tokenizer.chat_template == CHATML and start in (None, tokenizer.unk_token_id):
        raise UserError(
            f"the chat template is ChatML, but {path!r} has no token '<|im_start|>'. Choose an "
            "instruction-tuned LLM."
        )


def _check_chat_tokens(processor: AsrLlmProcessor, size: int, path: str) -> None:
    renderer = processor.renderer
    prompt = renderer.encode_prompt(renderer.user_messages("?"), [1])
    for token in (*prompt, *renderer.stop_ids):
        if token >= size and token != renderer.audio_token_id:
            text = processor.tokenizer.convert_ids_to_tokens(token)
            raise UserError(
                f"the LLM {path!r} has {size} embeddings, and none for the token {text!r} "
                f"({token}) of its chat. {GIVE_TOKENIZER}"
            )


def words_beyond(tokenizer: PreTrainedTokenizerBase, size: int) -> list[str]:
    """Return the tokens that a text may contain and that have no embedding, in order of their ids.

    Special tokens do not count, because texts are never encoded into them. Gemma 3 has one without
    an embedding.

    Args:
        tokenizer: the LLM's tokenizer.
        size: number of the LLM's embeddings.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = {i: word for word, i in tokenizer.get_vocab().items() if i >= size}
    return [beyond[i] for i in sorted(beyond.keys() - special)]


def describe_prompts(description: AsrLlmConfig, prompts: Sequence[Prompt]) -> None:
    """Store the prompts in a configuration.

    Each text is stored once, with its language and task if it is for one language or task.
    """
    description.prompts = list(dict.fromkeys(prompt.text for prompt in prompts))
    languages = {prompt.text: prompt.lang for prompt in prompts if prompt.lang}
    description.prompt_languages = languages or None
    tasks = {prompt.text: prompt.task for prompt in prompts if prompt.task}
    description.prompt_tasks = tasks or None


def build_model(
    processor: AsrLlmProcessor,
    *,
    frozen: Sequence[str],
    patterns: Sequence[str] = (),
    init_from: str | None = None,
    attention: str = "auto",
    label_smoothing: float = 0.0,
    random_encoder: bool = True,
    dtype: torch.dtype,
) -> AsrLlmModel:
    """Return a model with its pretrained parts.

    Args:
        processor: the description of the model, from `build_processor`.
        frozen: parts that are not trained.
        patterns: glob patterns of the names of further parameters that are not trained.
        init_from: exp_dir of an earlier run whose trained weights are loaded.
        attention: backend of the LLM's attention over packed sequences.
        label_smoothing: label smoothing of the loss in training.
        random_encoder: see `initial_encoder`.
        dtype: dtype of the LLM's weights.

    Raises:
        UserError: a base model or the earlier run does not fit.
    """
    description = processor.config
    assert description.base_models is not None
    encoder = initial_encoder(description, is_random=random_encoder)
    llm = pretrained_llm(description.base_models["llm"]["path"], dtype)
    model = assemble_model(
        processor, encoder, llm, frozen=frozen, patterns=patterns, init_from=init_from
    )
    model.label_smoothing = label_smoothing
    model.causal_lm.config.asrllm_attention = attention
    return model


def assemble_model(
    processor: AsrLlmProcessor,
    encoder: nn.Module,
    llm: PreTrainedModel,
    *,
    frozen: Sequence[str],
    patterns: Sequence[str] = (),
    init_from: str | None = None,
) -> AsrLlmModel:
    """Return a model of loaded parts, with adapters and a projector.

    Args:
        processor: the description of the model, from `build_processor`.
        encoder: the encoder; changed in place.
        llm: the LLM; changed in place.
        frozen: see `build_model`, as for the other arguments.
        patterns: see there.
        init_from: see there.

    Raises:
        UserError: the adapters or the earlier run do not fit.
    """
    model = AsrLlmModel(processor.config, audio_encoder=encoder, llm=llm)
    _check_adapter_biases(model)
    model.processor = processor
    _scale_projector(model)
    loaded = load_initial_weights(model, Path(init_from)) if init_from else set()
    model.freeze(*frozen, patterns=patterns)
    model.inherited = _inherited_names(model, loaded)
    _check_excluded_parts(model)
    head_of(model.causal_lm)  # raises an error for a head that the loss does not support
    return model


def _check_adapter_biases(model: AsrLlmModel) -> None:
    biased = layer_without_bias(model)
    if biased:
        part = biased.partition(".")[0]
        raise UserError(
            f"model.{part}.lora.options.lora_bias=true, but {biased!r} has no bias into which the "
            "adapter's bias can be merged. Remove the layer from target_modules, or remove "
            "lora_bias."
        )


def _scale_projector(model: AsrLlmModel) -> None:
    """Scale the projector's output to the LLM's embeddings, if the projector supports it."""
    if not hasattr(model.projector.mlp, "match_embeddings"):
        return
    table = model.llm.get_input_embeddings()
    count = min(MAX_SAMPLED_EMBEDDINGS, table.num_embeddings)
    with gathered(table.weight), torch.no_grad():
        # the module's output and not its weight: Gemma 3 scales the rows
        embeddings = table(torch.arange(count, device=table.weight.device))
        model.projector.mlp.match_embeddings(embeddings)


def _inherited_names(model: AsrLlmModel, loaded: set[str]) -> tuple[str, ...]:
    """Return the names of frozen parameters that no base model contains.

    Args:
        model: the model.
        loaded: names of the parameters from an earlier run.
    """
    names: list[str] = []
    bases = model.config.base_models or {}
    for name, parameter in model.named_parameters():
        is_new = name.partition(".")[0] not in bases or is_adapter(name)
        if not parameter.requires_grad and (name in loaded or is_new):
            names.append(name)
    return tuple(names)


def _check_excluded_parts(model: AsrLlmModel) -> None:
    """Raise UserError if a part is excluded from checkpoints but has weights of an earlier run."""
    for part in model.config.exclude_from_checkpoint or []:
        for name in model.inherited:
            if name.startswith(f"{part}.") and not is_adapter(name):
                raise UserError(
                    f"model.exclude_from_checkpoint=[{part}], but init_from loads weights of that "
                    f"part (first: {name!r}). Remove it from the list."
                )
