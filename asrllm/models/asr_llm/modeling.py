"""The model: audio encoder -> projector -> causal LLM."""

import contextlib
import difflib
import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from asrllm.audio.augment import mask_features
from asrllm.audio.waves import as_list
from asrllm.collator.chat import Messages
from asrllm.defaults import MAX_TOKENS_PER_SECOND, REPETITION_GUARD
from asrllm.errors import UserError, refuse_unknown
from asrllm.models.asr_llm.checks import check_given_config
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.generation import generate
from asrllm.models.asr_llm.processing import IGNORED_HUB_OPTIONS, AsrLlmProcessor
from asrllm.models.base_models import BasePaths
from asrllm.models.encoders.registry import build_encoder
from asrllm.models.loss import SupervisedLoss, head_of
from asrllm.models.pretrained import add_lora, empty_llm, with_lora
from asrllm.models.projectors import AudioProjector
from asrllm.models.state_dict import is_adapter

PARTS = ("audio_encoder", "projector", "llm")


def with_gradient(x: Tensor) -> Tensor:
    """ZeRO-3 lets a layer's weights go when the gradient of its input is done, and too early where the input has none."""
    return x if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_()


def check_shard_size(size: int | str) -> None:
    fits = isinstance(size, int) and not isinstance(size, bool) and size > 0
    if not fits and not (
        isinstance(size, str)
        and re.fullmatch(r"\s*(?=[\d.]*[1-9])\d+(\.\d+)?\s*[KMGT]B\s*", size, re.IGNORECASE)
    ):
        raise UserError(
            f"max_shard_size={size!r} is no size: give bytes above 0, or a text such as '5GB'"
        )


class StepOutput(
    NamedTuple
):  # a tuple, because DeepSpeed looks for the tensors that leave a module in tuples
    """Sums over a micro-batch's supervised tokens, float32 scalars: loss in nats, correct by the most probable token; losses: of each."""

    loss: Tensor
    correct: Tensor
    losses: Tensor


class AsrLlmModel(PreTrainedModel):
    """Audio in, text out. The projector's tokens take the places of the audio token in the chat.

    processor: tokenizer, chat and prompts; set by from_pretrained and by the builder, needed to generate.
    label_smoothing: of the loss, in training alone. inherited: names of frozen parameters that no base model holds.
    cuda_graphs: greedy search records a step on CUDA and replays it; keys and values have places of fixed sizes.
    """

    config_class = AsrLlmConfig
    main_input_name = "waves"
    supports_gradient_checkpointing = True
    processor: AsrLlmProcessor | None = None
    label_smoothing: float = 0.0
    inherited: tuple[str, ...] = ()
    cuda_graphs: bool = False

    def __init__(
        self,
        config: AsrLlmConfig,
        audio_encoder: nn.Module | None = None,
        llm: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        encoder = audio_encoder or build_encoder(
            config.audio_encoder or {}, pad_to_30s=config.pad_to_30s
        )
        self.audio_encoder = cast(Any, encoder)
        self.llm = cast(Any, llm if llm is not None else empty_llm(config.llm or {}))
        if config.audio_encoder_lora:
            add_lora(self.audio_encoder, config.audio_encoder_lora, key="model.audio_encoder.lora")
        if config.lora:
            self.llm = with_lora(self.llm, config.lora)
        self.projector = AudioProjector(
            config.projector,
            input_size=self.audio_encoder.output_dim,
            output_size=self.llm.config.get_text_config().hidden_size,
            rate=config.audio_encoder_projector_ds_rate,
            hidden_size=config.projector_hidden_size,
            tag_boundary=config.tag_audio_boundary,
            drop_ragged=config.drop_ragged_frames,
        )
        self.loss = SupervisedLoss()

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
        embeddings = with_gradient(self.embed(input_ids, self.encode(features, lengths)))
        longest = int(cu_seqlens.diff().max())
        causal_lm = self.causal_lm
        hidden = causal_lm.base_model(
            inputs_embeds=embeddings,
            position_ids=position_ids,
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=longest,
            max_length_k=longest,
        ).last_hidden_state
        head, options = head_of(causal_lm, self.label_smoothing if self.training else 0.0)
        return StepOutput(*self.loss(hidden[0, target_positions], head, targets, options))

    @property
    def causal_lm(self) -> Any:
        """transformers' own model, below PEFT's wrapper if there is one."""
        return self.llm.get_base_model() if hasattr(self.llm, "get_base_model") else self.llm

    def encode(self, features: Tensor, lengths: Tensor) -> Tensor:
        """features (N, T, F), lengths (N,) -> (audio tokens of all utterances, LLM width), utterance after utterance."""
        parameters = list(self.audio_encoder.parameters())
        frozen, zero3 = (
            not any(p.requires_grad for p in parameters),
            any(hasattr(p, "ds_id") for p in parameters),
        )
        with torch.no_grad() if frozen else contextlib.nullcontext():
            frames, frame_lengths = self.audio_encoder(
                with_gradient(features) if zero3 and not frozen else features, lengths
            )
        return self.projector(frames, frame_lengths)

    def embed(self, input_ids: Tensor, audio: Tensor) -> Tensor:
        """Token embeddings with the audio's in the places of the audio token, which itself has no embedding."""
        is_audio = input_ids == self.config.audio_token_id
        assert int(is_audio.sum()) == len(audio), (int(is_audio.sum()), len(audio))
        embeddings = self.llm.get_input_embeddings()(input_ids.masked_fill(is_audio, 0))
        return embeddings.masked_scatter(is_audio[..., None], audio.to(embeddings.dtype))

    def stored_weights(self) -> dict[str, int]:
        """How many weights of encoder and LLM a checkpoint holds: those trained, and those inherited; adapters apart."""
        names = [
            name
            for name, p in self.named_parameters()
            if (p.requires_grad or name in self.inherited) and not is_adapter(name)
        ]
        return {
            part: sum(name.startswith(f"{part}.") for name in names)
            for part in ("audio_encoder", "llm")
        }

    def unsplit_modules(self) -> list[type[nn.Module]]:
        """The classes of the encoder's and the LLM's layers: what is best gathered, checkpointed or placed as a whole."""
        names = {*(self.llm._no_split_modules or ()), *self.audio_encoder.unsplit_modules}
        return list({type(module) for module in self.modules() if type(module).__name__ in names})

    def set_batch_count(self, step: int) -> None:
        """The steps done, before each training step: an encoder that is trained may change with them."""
        self.audio_encoder.set_batch_count(step)

    def freeze(self, *parts: str, patterns: Sequence[str] = ()) -> None:
        """Take parts, or parameters by glob patterns of their names, out of training. The adapters of a frozen part stay trainable.

        Raises UserError where a pattern fits no name.
        """
        names = [name for name, _ in self.named_parameters()]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                closest = difflib.get_close_matches(pattern, names, n=1, cutoff=0)[0]
                raise UserError(
                    f"model.frozen_parameters: {pattern!r} fits no parameter; names are such as {closest!r}"
                )
        for name, parameter in self.named_parameters():
            if (
                name.startswith(tuple(f"{part}." for part in parts)) and not is_adapter(name)
            ) or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "AsrLlmModel":
        """As nn.Module.train, but parts without a trainable parameter stay in eval mode."""
        super().train(mode)
        for part in PARTS:
            module = getattr(self, part)
            if not any(p.requires_grad for p in module.parameters()):
                module.eval()
                for layer in module.modules() if mode else ():
                    layer.training = getattr(
                        layer, "gradient_checkpointing", False
                    )  # transformers recomputes in training alone
        return self

    # --- text out ---

    def generate(
        self,
        inputs: Any,
        messages: Sequence[Messages],
        max_new_tokens: int | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        max_tokens_per_second: float | None = None,
        repetition_guard: int | None = None,
        **generation: Any,
    ) -> list[str]:
        """One text for each chat.

        inputs: features (x (N, T, F), x_lens (N,)), or a list of files, float arrays or tensors at 16 kHz, and pairs (array, rate), in the
        order in which their audio tokens stand in the chats. messages: chats, each with the audio token once for each of its audios.
        max_new_tokens: the longest answer, 200 where generation_config says nothing. max_tokens_per_second: an answer is at most so many
        tokens a second of its audio long, and ten more. repetition_guard: an answer that says nothing but the same few tokens for longer
        than so many tokens ends there and keeps one copy (see generation.first_loop). generation: options of transformers'
        GenerationConfig, such as num_beams; the LLM's own generation_config.json is not used, the default is greedy search.
        Raises UserError that names the audio or the chat, counted from 0.
        """
        limits = (max_new_tokens, generation_config, max_tokens_per_second, repetition_guard)
        return [answer.text for answer in generate(self, inputs, messages, *limits, **generation)]

    def transcribe(
        self,
        audio: Sequence[Any],
        max_new_tokens: int | None = None,
        *,
        max_tokens_per_second: float | None = MAX_TOKENS_PER_SECOND,
        repetition_guard: int | None = REPETITION_GUARD,
        **generation: Any,
    ) -> list[str]:
        """generate() of raw input with the checkpoint's default prompt, limited by duration and guarded against loops."""
        processor = self.require_processor()
        audio = as_list(audio)
        messages = [processor.renderer.user_messages(processor.default_prompt)] * len(audio)
        return self.generate(
            audio,
            messages,
            max_new_tokens,
            max_tokens_per_second=max_tokens_per_second,
            repetition_guard=repetition_guard,
            **generation,
        )

    def require_processor(self) -> AsrLlmProcessor:
        if self.processor is None:
            raise UserError(
                "this model has no processor: load it with from_pretrained, or set model.processor"
            )
        return self.processor

    # --- files ---

    def weights(self) -> dict[str, Tensor]:
        """The state dict without the second names of tied weights."""
        first_names = {name for name, _ in self.named_parameters()} | {
            name for name, _ in self.named_buffers()
        }
        return {name: tensor for name, tensor in self.state_dict().items() if name in first_names}

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        merge_adapter: bool = False,
        max_shard_size: int | str = "5GB",
        **unknown: Any,
    ) -> None:
        """Write a self-contained directory: weights (safetensors), config, tokenizer, chat template, generation config.

        Parts named in config.exclude_from_checkpoint are left out; they are loaded from where config.base_models says. merge_adapter:
        write the model with its adapters merged into its layers, as one without adapters; this model stays as it is. max_shard_size:
        bytes, or a text such as "5GB"; merging takes memory for one layer. Raises UserError where merging cannot be done.
        """
        from asrllm.models.asr_llm.serialization import save_model

        refuse_unknown("save_pretrained()", unknown, ("merge_adapter", "max_shard_size"))
        check_shard_size(max_shard_size)
        save_model(
            self, Path(save_directory), merge_adapter=merge_adapter, max_shard_size=max_shard_size
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | Path,
        *,
        dtype: Any = None,
        torch_dtype: Any = None,
        config: Any = None,
        base_models: BasePaths | None = None,
        **more: Any,
    ) -> "AsrLlmModel":
        """Return the model of a directory that save_pretrained wrote, in eval mode.

        Args:
            path: the directory.
            dtype: of the weights; None or "auto": as saved. torch_dtype is its old name.
            config: what transformers' AutoModel has read in the directory.
            base_models: where the base models of parts that the directory leaves out are now,
                {"audio_encoder" or "llm": path}.
            more: what transformers' AutoModel passes on (see IGNORED_HUB_OPTIONS).

        Raises:
            UserError: for another keyword, another config, or another base model.
        """
        from asrllm.models.asr_llm.serialization import load_directory

        if more.get("device_map") is not None:
            raise UserError(
                "from_pretrained() does not place weights by device_map: leave it out, and use .to(device) on the model"
            )
        if config is not None:
            check_given_config(config, path)
        unknown = {k: v for k, v in more.items() if k not in (*IGNORED_HUB_OPTIONS, "device_map")}
        refuse_unknown("from_pretrained()", unknown, ("dtype", "base_models"))
        dtype = torch_dtype if dtype is None else dtype
        return load_directory(path, dtype=dtype, base_models=base_models)
