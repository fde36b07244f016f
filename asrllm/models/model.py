"""The model: audio encoder -> projector -> causal LLM."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from asrllm.audio.augment import mask_features
from asrllm.collator.batch import pad_left
from asrllm.collator.chat import Messages
from asrllm.errors import UserError
from asrllm.models.attention import PACKED, register_packed_attention
from asrllm.models.configuration import AsrLlmConfig
from asrllm.models.encoders import build_encoder, encoder_class
from asrllm.models.fingerprint import check_fingerprint
from asrllm.models.processor import AsrLlmProcessor
from asrllm.models.projector import AudioProjector

PARTS = ("audio_encoder", "projector", "llm")


class StepOutput(NamedTuple):  # a tuple, because DeepSpeed looks for the tensors that leave a module in tuples
    """Sums over a micro-batch's supervised tokens, float32 scalars: loss in nats, correct by the most probable token."""

    loss: Tensor
    correct: Tensor


class AsrLlmModel(PreTrainedModel):
    """Audio in, text out. The projector's tokens take the places of the audio token in the chat.

    processor: tokenizer, chat and prompts; set by from_pretrained and by the builder, needed to generate.
    """

    config_class = AsrLlmConfig
    main_input_name = "waves"
    supports_gradient_checkpointing = True
    processor: AsrLlmProcessor | None = None

    def __init__(self, config: AsrLlmConfig, audio_encoder: nn.Module | None = None, llm: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        encoder = audio_encoder or build_encoder(config.audio_encoder or {}, pad_to_30s=config.pad_to_30s)
        self.audio_encoder = cast(Any, encoder)
        self.llm = cast(Any, llm if llm is not None else empty_llm(config.llm or {}))
        if config.lora:
            self.llm = with_lora(self.llm, config.lora)
        self.projector = AudioProjector(
            config.projector,
            input_size=self.audio_encoder.output_dim,
            output_size=self.llm.config.get_text_config().hidden_size,
            rate=config.audio_encoder_projector_ds_rate,
            hidden_size=config.projector_hidden_size,
            tag_boundary=config.tag_audio_boundary,
        )

    def forward(
        self,
        waves: Tensor,
        wave_lengths: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        target_positions: Tensor,
        targets: Tensor,
        masks: Tensor | None = None,
        time_masks: int = 0,
    ) -> StepOutput:
        """A packed batch (see PackedBatch for the shapes) -> summed loss. Logits exist for the supervised positions alone."""
        features, lengths = self.audio_encoder.features(waves, wave_lengths)
        if masks is not None and masks.shape[1]:
            features = mask_features(features, lengths, masks, time_masks)
        embeddings = self._embed(input_ids, self.encode(features, lengths))
        longest = int(cu_seqlens.diff().max())
        output = self.llm(
            inputs_embeds=embeddings,
            position_ids=position_ids,
            use_cache=False,
            logits_to_keep=target_positions,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=longest,
            max_length_k=longest,
        )
        logits = output.logits[0].float()  # (S, vocabulary)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        return StepOutput(loss=loss, correct=(logits.detach().argmax(-1) == targets).sum().float())

    def encode(self, features: Tensor, lengths: Tensor) -> Tensor:
        """features (N, T, F), lengths (N,) -> (audio tokens of all utterances, LLM width), utterance after utterance."""
        frozen = not any(p.requires_grad for p in self.audio_encoder.parameters())
        with torch.no_grad() if frozen else torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad():
            frames, frame_lengths = self.audio_encoder(features, lengths)
        return self.projector(frames, frame_lengths)

    def _embed(self, input_ids: Tensor, audio: Tensor) -> Tensor:
        """Token embeddings with the audio's in the places of the audio token, which itself has no embedding."""
        is_audio = input_ids == self.config.audio_token_id
        assert int(is_audio.sum()) == len(audio), (int(is_audio.sum()), len(audio))
        embeddings = self.llm.get_input_embeddings()(input_ids.masked_fill(is_audio, 0))
        return embeddings.masked_scatter(is_audio[..., None], audio.to(embeddings.dtype))

    def unsplit_modules(self) -> list[type[nn.Module]]:
        """The classes of the encoder's and the LLM's layers: what is best gathered, checkpointed or placed as a whole."""
        names = {*(self.llm._no_split_modules or ()), *self.audio_encoder.unsplit_modules}
        return list({type(module) for module in self.modules() if type(module).__name__ in names})

    def set_batch_count(self, step: int) -> None:
        """The steps done, before each training step: an encoder that is trained may change with them."""
        self.audio_encoder.set_batch_count(step)

    def freeze(self, *parts: str) -> None:
        """Take parts out of training: no gradients, eval mode for good. An LLM's adapters stay trainable."""
        for part in parts:
            for name, parameter in getattr(self, part).named_parameters():
                parameter.requires_grad_("lora_" in name)

    def train(self, mode: bool = True) -> "AsrLlmModel":
        """As nn.Module.train, but parts without a trainable parameter stay in eval mode."""
        super().train(mode)
        for part in PARTS:
            module = getattr(self, part)
            if not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self

    # --- text out ---

    @torch.no_grad()
    def generate(
        self, inputs: Any, messages: Sequence[Messages], max_new_tokens: int | Sequence[int] = 200, **generation: Any
    ) -> list[str]:
        """One text for each audio.

        inputs: features (x (N, T, F), x_lens (N,)), or a list of files and float arrays at 16 kHz. messages: N chats, each with the
        audio token once. max_new_tokens: the longest answer, one for all or one for each. generation: options of transformers'
        GenerationConfig, such as num_beams.
        """
        processor = self._require_processor()
        device = self.llm.get_input_embeddings().weight.device
        if isinstance(inputs, tuple):
            features, lengths = (x.to(device) for x in inputs)
            counts = self._tokens_of_features(lengths)
        else:
            waves, wave_lengths = processor.load_waves(inputs)
            features, lengths = self.audio_encoder.features(waves.to(device), wave_lengths.to(device))
            counts = self.config.num_audio_tokens(wave_lengths).tolist()
        prompts = processor.encode_prompts(messages, counts)
        input_ids, mask = (x.to(device) for x in pad_left(prompts))
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        output = self.llm.generate(
            inputs_embeds=self._embed(input_ids, self.encode(features, lengths)),
            attention_mask=mask,
            max_new_tokens=max(limits),
            eos_token_id=processor.renderer.stop_ids,
            pad_token_id=processor.renderer.stop_ids[0],
            **({"do_sample": False, "temperature": None, "top_p": None, "top_k": None} | generation),
        )
        rows = [row[:limit] for row, limit in zip(output, limits, strict=True)]
        return [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    def transcribe(self, audio: Sequence[Any], max_new_tokens: int = 200, **generation: Any) -> list[str]:
        """generate() with the checkpoint's default prompt."""
        processor = self._require_processor()
        messages = [processor.renderer.user_messages(processor.default_prompt)] * len(audio)
        return self.generate(list(audio), messages, max_new_tokens, **generation)

    def _require_processor(self) -> AsrLlmProcessor:
        if self.processor is None:
            raise UserError("this model has no processor: load it with from_pretrained, or set model.processor")
        return self.processor

    def _tokens_of_features(self, lengths: Tensor) -> list[int]:
        hop = 160  # samples a feature frame, for Whisper and for Kaldi features
        return self.config.num_audio_tokens(lengths.cpu() * hop).tolist()

    # --- files ---

    def weights(self) -> dict[str, Tensor]:
        """The state dict without the second names of tied weights."""
        first_names = {name for name, _ in self.named_parameters()} | {name for name, _ in self.named_buffers()}
        return {name: tensor for name, tensor in self.state_dict().items() if name in first_names}

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:  # type: ignore[override]
        """Write a self-contained directory: weights (safetensors), config, tokenizer, chat template, generation config.

        Parts named in config.exclude_from_checkpoint are left out; they are loaded from where config.base_models says.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self._require_processor().save_pretrained(folder)
        self.llm.generation_config.save_pretrained(folder)
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)
        left_out = tuple(f"{part}." for part in self.config.exclude_from_checkpoint or [])
        state = {k: v for k, v in self.weights().items() if not k.startswith(left_out) or "lora_" in k}
        save_torch_state_dict(state, folder)

    @classmethod
    def from_pretrained(cls, path: str | Path, *_: Any, dtype: Any = None, **__: Any) -> "AsrLlmModel":  # type: ignore[override]
        """A directory of save_pretrained, in eval mode. dtype: of the weights, as saved when None."""
        files = sorted(Path(path).glob("model*.safetensors"))
        if not files:
            raise UserError(f"{str(path)!r} holds no model*.safetensors: give a directory written by save_pretrained or 'asrllm export'")
        state: dict[str, Tensor] = {}
        for file in files:
            state |= load_file(file)
        return load_model(path, state, dtype=dtype)


def load_model(path: str | Path, state: Mapping[str, Tensor], *, dtype: Any = None) -> AsrLlmModel:
    """The model described in directory `path` with the weights `state`; parts that `state` leaves out come from the base models.

    Raises UserError naming a missing, unexpected or wrong-shaped key, or a base model that is not the one of training.
    """
    config = AsrLlmConfig.from_pretrained(path)
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    dtype = dtype if isinstance(dtype, torch.dtype) else next(iter(state.values())).dtype
    encoder, llm = None, None
    if not any(k.startswith("audio_encoder.") for k in state):
        encoder = pretrained_encoder(config, base_path(config, "audio_encoder"))
    if not any(k.startswith("llm.") and "lora_" not in k for k in state):
        llm = pretrained_llm(base_path(config, "llm"), dtype)
    model = AsrLlmModel(config, audio_encoder=encoder, llm=llm)
    given = tuple(f"{part}." for part, module in (("audio_encoder", encoder), ("llm", llm)) if module is not None)
    state = scalars_again(model, state)
    check_keys(model, state, from_base=given, where=str(path))
    model.load_state_dict(state, strict=False)
    model.llm.tie_weights()
    model.processor = AsrLlmProcessor.from_pretrained(path)
    return model.to(dtype).eval()


def scalars_again(model: AsrLlmModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the model's scalars as such: training holds them as vectors of one element."""
    scalars = {name for name, tensor in model.weights().items() if tensor.dim() == 0}
    return {name: tensor.reshape(()) if name in scalars and tensor.numel() == 1 else tensor for name, tensor in state.items()}


def check_keys(model: AsrLlmModel, state: Mapping[str, Tensor], *, from_base: tuple[str, ...], where: str) -> None:
    expected = {k: v for k, v in model.weights().items() if not k.startswith(from_base) or "lora_" in k}
    if missing := sorted(expected.keys() - state.keys()):
        raise UserError(f"the weights of {where!r} lack {len(missing)} keys, the first {missing[0]!r}: they are of another model")
    if extra := sorted(state.keys() - expected.keys()):
        raise UserError(f"the weights of {where!r} have {len(extra)} unexpected keys, the first {extra[0]!r}: they are of another model")
    for key, tensor in expected.items():
        if tensor.shape != state[key].shape:
            raise UserError(f"the weights of {where!r}: {key!r} has the shape {tuple(state[key].shape)}, expected {tuple(tensor.shape)}")


def base_path(config: AsrLlmConfig, part: str) -> str:
    base = (config.base_models or {}).get(part)
    if base is None:
        raise UserError(f"the weights leave out the {part}, and config.json names no base model for it: export the whole model")
    check_fingerprint(part, base["path"], base["fingerprint"])
    return base["path"]


def pretrained_encoder(config: AsrLlmConfig, path: str) -> nn.Module:
    """The encoder with a base model's weights; strict about keys."""
    fields = config.audio_encoder or {}
    _, state = encoder_class(fields["model_type"]).read_pretrained(path)
    encoder = cast(nn.Module, build_encoder(fields, pad_to_30s=config.pad_to_30s))
    encoder.load_state_dict(state)
    return encoder


def pretrained_llm(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """Under a live HfDeepSpeedConfig of stage 3, every rank keeps its partition alone."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=register_packed_attention())


def empty_llm(fields: dict[str, Any]) -> PreTrainedModel:
    register_packed_attention()
    config = AutoConfig.for_model(**fields)
    return AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)


def with_lora(llm: PreTrainedModel, options: dict[str, Any]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    try:
        return get_peft_model(llm, LoraConfig(task_type="CAUSAL_LM", **options))
    except ValueError as error:
        raise UserError(f"model.llm.lora does not fit the LLM: {' '.join(str(error).split())}") from error
