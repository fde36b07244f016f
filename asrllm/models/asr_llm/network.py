"""The network of an ASR LLM: audio encoder, projector and causal LLM, with the training loss."""

import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from asrllm.audio.augment import mask_features
from asrllm.errors import UserError
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.models.cpu_linear import use_onednn
from asrllm.models.encoders.registry import build_encoder
from asrllm.models.loss import SupervisedLoss, head_of
from asrllm.models.partitioning import is_partitioned
from asrllm.models.pretrained import add_lora, empty_llm, with_lora
from asrllm.models.projectors import AudioProjector
from asrllm.models.state_dict import is_adapter

PARTS = ("audio_encoder", "projector", "llm")


def with_gradient(x: Tensor) -> Tensor:
    """Return `x` as a tensor that requires a gradient, if gradients are enabled.

    ZeRO-3 releases a layer's weights once the gradient of the layer's input is computed. If the
    input needs no gradient, ZeRO-3 releases them too early.
    """
    if x.requires_grad or not torch.is_grad_enabled():
        return x
    return x.detach().requires_grad_()


# A tuple, because DeepSpeed looks for the tensors that leave a module in tuples.
class StepOutput(NamedTuple):
    """Sums over the supervised tokens of a micro-batch.

    Attributes:
        loss: summed cross-entropy in nats, a float32 scalar.
        correct: number of tokens whose prediction is correct, a float32 scalar.
        losses: cross-entropy of each token in nats (S,), float32.
    """

    loss: Tensor
    correct: Tensor
    losses: Tensor


class AsrLlmNetwork(PreTrainedModel):
    """Audio encoder, projector and causal LLM. The projected audio replaces the audio tokens.

    `AsrLlmModel` adds text generation and files.

    Attributes:
        processor: tokenizer, chat template and prompts. `from_pretrained` and the builder set it.
            Generating text needs it.
        label_smoothing: label smoothing of the loss; it applies in training mode only.
        inherited: names of frozen parameters that are not in a base model.
        warm_start: result of the projector's warm start, or None if its weights began random.
    """

    config_class = AsrLlmConfig
    main_input_name = "waves"
    supports_gradient_checkpointing = True
    processor: AsrLlmProcessor | None = None
    label_smoothing: float = 0.0
    inherited: tuple[str, ...] = ()
    warm_start: dict[str, Any] | None = None

    def __init__(
        self,
        config: AsrLlmConfig,
        audio_encoder: nn.Module | None = None,
        llm: PreTrainedModel | None = None,
    ) -> None:
        """Build the network.

        Args:
            config: the configuration.
            audio_encoder: an encoder with its weights. By default one is built without weights.
            llm: an LLM with its weights. By default one is built without weights.
        """
        super().__init__(config)
        if audio_encoder is None:
            fields = config.audio_encoder or {}
            audio_encoder = build_encoder(fields, pad_to_30s=config.pad_to_30s)
        if llm is None:
            llm = empty_llm(config.llm or {})
        self.audio_encoder: nn.Module = audio_encoder
        self.llm = llm
        if config.audio_encoder_lora:
            add_lora(
                self.audio_encoder,
                config.audio_encoder_lora,
                key="model.audio_encoder.lora",
                not_called=getattr(self.audio_encoder, "not_called", ()),
            )
        if config.lora:
            self.llm = with_lora(self.llm, config.lora)
        self.projector = AudioProjector.from_config(
            config,
            input_size=self.audio_encoder.output_dim,
            output_size=self.llm.config.get_text_config().hidden_size,
        )
        self.loss = SupervisedLoss()
        use_onednn(self)

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
        """Return the summed loss of a packed batch.

        The arguments are the fields of `PackedBatch`, which documents their shapes. Logits are
        computed at the supervised positions only.
        """
        features, lengths = self.audio_encoder.features(waves, wave_lengths)
        if masks is not None and masks.shape[1]:
            features = mask_features(features, lengths, masks, time_masks)
        audio = self.encode(features, lengths)
        embeddings = with_gradient(self.embed(input_ids, audio))
        # Read once: in the attention, every layer would wait for the device.
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
        smoothing = self.label_smoothing if self.training else 0.0
        head, options = head_of(causal_lm, smoothing)
        return StepOutput(*self.loss(hidden[0, target_positions], head, targets, options))

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model of the LLM, inside PEFT's wrapper if there is one."""
        if hasattr(self.llm, "get_base_model"):
            return self.llm.get_base_model()
        return self.llm

    def encode(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Return the audio embeddings of a batch.

        Args:
            features: (N, T, F).
            lengths: number of frames of each utterance (N,).

        Returns:
            (audio tokens of all utterances, LLM width), one utterance after the other.
        """
        parameters = list(self.audio_encoder.parameters())
        is_trained = any(p.requires_grad for p in parameters)
        if is_trained and any(is_partitioned(p) for p in parameters):
            features = with_gradient(features)
        with torch.set_grad_enabled(is_trained and torch.is_grad_enabled()):
            frames, frame_lengths = self.audio_encoder(features, lengths)
        return self.projector(frames, frame_lengths)

    def embed(self, input_ids: Tensor, audio: Tensor) -> Tensor:
        """Return the embeddings of the tokens, with `audio` at the positions of the audio token.

        The audio token itself has no embedding.

        Args:
            input_ids: (N, T).
            audio: (number of audio tokens in `input_ids`, LLM width), as `encode` returns it.
        """
        is_audio = input_ids == self.config.audio_token_id
        count = int(is_audio.sum())
        assert count == len(audio), (count, len(audio))
        # The id of the audio token may be beyond the embeddings.
        embeddings = self.llm.get_input_embeddings()(input_ids.masked_fill(is_audio, 0))
        return embeddings.masked_scatter(is_audio[..., None], audio.to(embeddings.dtype))

    def stored_weights(self) -> dict[str, int]:
        """Return how many weights of the encoder and of the LLM a checkpoint contains.

        Trained and inherited weights count; adapters do not.
        """
        counts = {"audio_encoder": 0, "llm": 0}
        for name, parameter in self.named_parameters():
            part = name.partition(".")[0]
            is_stored = parameter.requires_grad or name in self.inherited
            if part in counts and is_stored and not is_adapter(name):
                counts[part] += 1
        return counts

    def unsplit_modules(self) -> list[type[nn.Module]]:
        """Return the classes of the layers of the encoder and of the LLM.

        A layer is best gathered, checkpointed or placed on a device as a whole.
        """
        names = {*(self.llm._no_split_modules or ()), *self.audio_encoder.unsplit_modules}
        classes = {type(module) for module in self.modules()}
        return [kind for kind in classes if kind.__name__ in names]

    def set_batch_count(self, step: int) -> None:
        """Set the number of completed steps, on which the encoder's training schedules depend.

        Call it before each training step.
        """
        self.audio_encoder.set_batch_count(step)

    def freeze(self, *parts: str, patterns: Sequence[str] = ()) -> None:
        """Exclude parameters from training. The adapters of a frozen part stay trainable.

        Args:
            parts: names of whole parts, as in `PARTS`.
            patterns: glob patterns of the names of further parameters.

        Raises:
            UserError: a pattern matches no name.
        """
        names = [name for name, _ in self.named_parameters()]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                closest = difflib.get_close_matches(pattern, names, n=1, cutoff=0)[0]
                raise UserError(
                    f"model.frozen_parameters: {pattern!r} matches no parameter. "
                    f"Correct it. The nearest name is {closest!r}."
                )
        prefixes = tuple(f"{part}." for part in parts)
        for name, parameter in self.named_parameters():
            is_in_part = name.startswith(prefixes) and not is_adapter(name)
            if is_in_part or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "AsrLlmNetwork":
        """Set the mode, but keep parts without a trainable parameter in eval mode."""
        super().train(mode)
        for part in PARTS:
            module = getattr(self, part)
            if any(p.requires_grad for p in module.parameters()):
                continue
            module.eval()
            if not mode:
                continue
            for layer in module.modules():
                # transformers recomputes activations in training mode only
                layer.training = getattr(layer, "gradient_checkpointing", False)
        return self

    def require_processor(self) -> AsrLlmProcessor:
        """Return the processor, or raise UserError if the model has none."""
        if self.processor is None:
            raise UserError(
                "this model has no processor. Load it with from_pretrained, or set model.processor."
            )
        return self.processor

    def weights(self) -> dict[str, Tensor]:
        """Return the state dict without the second names of tied weights."""
        first_names = {name for name, _ in self.named_parameters()}
        first_names |= {name for name, _ in self.named_buffers()}
        state = self.state_dict()
        return {name: tensor for name, tensor in state.items() if name in first_names}
