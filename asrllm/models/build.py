"""From the run's configuration to a model with pretrained parts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from asrllm.collator.chat import CHATML
from asrllm.data.prompts import Prompt
from asrllm.defaults import BASE_MODEL_KEYS
from asrllm.errors import UserError
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.asr_llm.processing import AsrLlmProcessor, load_llm_tokenizer
from asrllm.models.encoders.registry import build_encoder, encoder_class
from asrllm.models.fingerprint import fingerprint, resolve_pretrained
from asrllm.models.hub_files import check_directory, load_config, load_generation_config
from asrllm.models.init_from import take_over, whole
from asrllm.models.loss import head_of
from asrllm.models.model_args import ModelConfig
from asrllm.models.pretrained import (
    check_encoder_state,
    check_family,
    layer_without_bias,
    pretrained_encoder,
    pretrained_llm,
)
from asrllm.models.state_dict import is_adapter
from asrllm.text_files import read_json_object, reading

LLM_KEY = BASE_MODEL_KEYS["llm"]
ENCODER_KEY = BASE_MODEL_KEYS["audio_encoder"]


def describe_model(
    config: ModelConfig, *, pad_to_30s: bool, prompts: tuple[str, ...]
) -> AsrLlmProcessor:
    """Everything of the model but its weights; every mistake that can be found without loading them is found here."""
    check_prompts(prompts, config.audio_token)
    encoder_path = str(resolve_pretrained(config.audio_encoder.pretrained_model or "", file=True))
    llm_path = str(resolve_pretrained(config.llm.pretrained_model or ""))
    check_directory(llm_path, LLM_KEY)
    llm = load_config(llm_path, LLM_KEY)
    tokenizer = load_llm_tokenizer(
        llm_path, audio_token=config.audio_token, chat_template=config.llm.chat_template
    )
    if config.llm.model_type not in (None, llm.model_type):
        raise UserError(
            f"model.llm.model_type={config.llm.model_type!r}, but {llm_path!r} is a {llm.model_type!r} model: correct it, or leave it null"
        )
    check_buildable(llm, llm_path)
    fields = check_encoder(config, encoder_path, pad_to_30s=pad_to_30s)
    description = AsrLlmConfig(
        audio_encoder={"model_type": config.audio_encoder.kind} | fields,
        llm=llm.to_dict(),
        lora=config.llm.lora.as_peft() if config.llm.lora else None,
        audio_encoder_lora=config.audio_encoder.lora.as_peft()
        if config.audio_encoder.lora
        else None,
        projector=config.projector,
        projector_hidden_size=config.projector_hidden_size,
        audio_encoder_projector_ds_rate=config.audio_encoder_projector_ds_rate,
        audio_token=config.audio_token,
        audio_token_id=tokenizer.convert_tokens_to_ids(config.audio_token),
        tag_audio_boundary=config.tag_audio_boundary,
        pad_to_30s=pad_to_30s,
        exclude_from_checkpoint=config.exclude_from_checkpoint,
        base_models={
            "audio_encoder": {"path": encoder_path, "fingerprint": fingerprint(encoder_path)},
            "llm": {"path": llm_path, "fingerprint": fingerprint(llm_path)},
        },
        prompts=list(prompts),
    )
    processor = AsrLlmProcessor(tokenizer, description)
    check_vocabulary(processor, llm.get_text_config().vocab_size, llm_path)
    return processor


def check_buildable(config: PreTrainedConfig, path: str) -> None:
    """Build the LLM without memory for its weights.

    Raises:
        UserError: config.json holds values from which the LLM cannot be built, the family is not
            supported, or generation_config.json is damaged.
    """
    file = Path(path) / "config.json"
    with (
        reading(file, "the LLM's configuration", "Correct it, or download it again."),
        torch.device("meta"),
    ):
        llm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    check_family(llm)
    if (Path(path) / "generation_config.json").is_file():
        load_generation_config(path)


def check_encoder(config: ModelConfig, path: str, *, pad_to_30s: bool) -> dict[str, Any]:
    """Return the fields of the audio encoder at `path`.

    Raises:
        UserError: its files are damaged, or its weights do not fit its configuration.
    """
    kind = config.audio_encoder.kind
    fields, state = encoder_class(kind).read_pretrained(path)
    what = f"the configuration of {ENCODER_KEY}"
    with reading(path, what, "Correct config.json, or download it again."), torch.device("meta"):
        encoder = cast(
            nn.Module, build_encoder({"model_type": kind} | fields, pad_to_30s=pad_to_30s)
        )
    check_encoder_state(state, encoder, path)
    if config.audio_encoder.model_type != kind:
        check_same_encoder(config.audio_encoder.model_type, fields, path)
    return fields


def check_same_encoder(model_type: str, fields: dict[str, Any], path: str) -> None:
    """Raise UserError if the config.json at `model_type` contradicts the fields of the pretrained encoder at `path`."""
    config = resolve_pretrained(model_type) / "config.json"
    stated = read_json_object(config, "the encoder's configuration")
    for name, value in fields.items():
        if stated.get(name, value) != value:
            raise UserError(
                f"model.audio_encoder.model_type={str(config)!r} has {name}={stated[name]}, but {ENCODER_KEY}={path!r} has "
                f"{value}. Set model_type={stated['model_type']} to take what the pretrained model has."
            )


def check_vocabulary(processor: AsrLlmProcessor, size: int, path: str) -> None:
    """Raises UserError where the chat holds a token that the LLM has no embedding for, or is not written in tokens of its own."""
    renderer, tokenizer = processor.renderer, processor.tokenizer
    ids = [*renderer.encode_prompt(renderer.user_messages("?"), [1]), *renderer.stop_ids]
    for token in ids:
        if token >= size and token != renderer.audio_token_id:
            text = tokenizer.convert_ids_to_tokens(token)
            raise UserError(
                f"the LLM {path!r} has {size} embeddings, none for the token {text!r} ({token}) of its chat: give its own tokenizer"
            )
    beyond = words_beyond(tokenizer, size)
    if beyond:
        raise UserError(
            f"the LLM {path!r} has {size} embeddings (vocab_size in config.json), and its tokenizer has "
            f"{len(beyond)} tokens without one, the first {beyond[0]!r}. Give the tokenizer that belongs to the LLM."
        )
    if tokenizer.chat_template == CHATML and tokenizer.convert_tokens_to_ids("<|im_start|>") in (
        None,
        tokenizer.unk_token_id,
    ):
        raise UserError(
            f"the chat is ChatML, and {path!r} has no token '<|im_start|>': take an instruction-tuned LLM"
        )


def words_beyond(tokenizer: Any, size: int) -> list[str]:
    """Return the tokens that a text may hold and that have no embedding, in the order of their ids.

    Special tokens do not count, because texts are never encoded into them. Gemma 3 has one of them
    without an embedding.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = {
        i: word for word, i in tokenizer.get_vocab().items() if i >= size and i not in special
    }
    return [beyond[i] for i in sorted(beyond)]


def check_prompts(prompts: Sequence[str], audio_token: str) -> None:
    for prompt in prompts:
        if audio_token in prompt:
            raise UserError(
                f"the prompt {prompt!r} holds the audio token {audio_token!r}, which is put before it: take it out"
            )


def describe_prompts(description: AsrLlmConfig, prompts: Sequence[Prompt]) -> None:
    """What is stored of the prompts: each text once, and the language of those that are for one."""
    description.prompts = list(dict.fromkeys(prompt.text for prompt in prompts))
    description.prompt_languages = {
        prompt.text: prompt.lang for prompt in prompts if prompt.lang
    } or None


def build_model(
    processor: AsrLlmProcessor,
    *,
    frozen: Sequence[str],
    patterns: Sequence[str] = (),
    init_from: str | None = None,
    attention: str = "auto",
    dtype: torch.dtype,
) -> AsrLlmModel:
    """The described model with its pretrained parts, or with what the run `init_from` made of them.

    frozen: parts out of training; patterns: of further parameters' names. attention: the backend of the LLM's.
    """
    description = processor.config
    assert description.base_models is not None
    encoder = pretrained_encoder(description, description.base_models["audio_encoder"]["path"])
    llm = pretrained_llm(description.base_models["llm"]["path"], dtype)
    model = AsrLlmModel(description, audio_encoder=encoder, llm=llm)
    if biased := layer_without_bias(model):
        raise UserError(
            f"model.{biased.partition('.')[0]}.lora.options.lora_bias=true, but {biased!r} has no bias to merge the adapter's into: "
            "leave it out of target_modules, or leave lora_bias out"
        )
    model.processor = processor
    model.causal_lm.config.asrllm_attention = attention
    if hasattr(model.projector.mlp, "fit_embeddings"):
        table = model.llm.get_input_embeddings()
        with whole(table.weight), torch.no_grad():  # its output: Gemma 3 scales the rows
            model.projector.mlp.fit_embeddings(
                table(torch.arange(min(4096, table.num_embeddings), device=table.weight.device))
            )
    taken = take_over(model, Path(init_from)) if init_from else set()
    model.freeze(*frozen, patterns=patterns)
    model.inherited = tuple(
        name
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
        and (name in taken or name.startswith("projector.") or is_adapter(name))
    )
    for part in description.exclude_from_checkpoint or []:
        if name := next(
            (
                name
                for name in model.inherited
                if name.startswith(f"{part}.") and not is_adapter(name)
            ),
            None,
        ):
            raise UserError(
                f"model.exclude_from_checkpoint=[{part}], but init_from brings such as {name!r}: leave it out"
            )
    head_of(model.causal_lm)  # a head that the loss cannot take is found here
    return model
