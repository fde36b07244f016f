"""A model as vLLM runs it: our audio encoder and projector, and vLLM's own LLM."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig, SpeechToTextConfig, VllmConfig
from vllm.config.speech_to_text import SpeechToTextParams
from vllm.inputs import TokensPrompt
from vllm.model_executor.models.interfaces import (
    SupportsLoRA,
    SupportsMultiModal,
    SupportsPP,
    SupportsTranscription,
)
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.model_executor.models.whisper import ISO639_1_SUPPORTED_LANGS
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.tokenizers import cached_tokenizer_from_config

from asrllm.defaults import RATE
from asrllm.errors import UserError
from asrllm.evaluation.prompt import (
    check_hotwords,
    check_language,
    inference_prompt,
    prompt_of_translation,
)
from asrllm.evaluation.vllm.limits import longest_samples
from asrllm.evaluation.vllm.processing import (
    PLACEHOLDER,
    AsrLlmDummyInputs,
    AsrLlmMultiModalProcessor,
    AsrLlmProcessingInfo,
    renderer_of,
)
from asrllm.models.encoders.registry import build_encoder
from asrllm.models.portable.configuration import AsrLlmHubConfig
from asrllm.models.projectors import AudioProjector

VLLM = "language_model."  # prefix of the LLM's weights in vLLM


@MULTIMODAL_REGISTRY.register_processor(
    AsrLlmMultiModalProcessor, info=AsrLlmProcessingInfo, dummy_inputs=AsrLlmDummyInputs
)
class AsrLlmForVllm(nn.Module, SupportsMultiModal, SupportsTranscription, SupportsLoRA, SupportsPP):
    """Audio encoder, projector and LLM. The projected audio replaces the audio tokens.

    Every rank of tensor parallelism has the whole encoder and projector.
    """

    supported_languages: ClassVar[Mapping[str, str]] = ISO639_1_SUPPORTED_LANGS
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"llm.": VLLM})

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """
        Args:
            vllm_config: vLLM's configuration, with the model's.
            prefix: prepended to the names of the modules.

        Raises:
            ValueError: the directory has adapters, or lacks a part of the model.
        """
        super().__init__()
        config: AsrLlmHubConfig = vllm_config.model_config.hf_config
        check_exported(config, vllm_config.model_config.model)
        self.config = config
        text_config = config.get_text_config()
        self.configure_mm_token_handling(text_config.vocab_size, [config.audio_token_id])
        with self._mark_tower_model(vllm_config, "audio"):
            self.audio_encoder = build_encoder(
                config.audio_encoder or {}, pad_to_30s=config.pad_to_30s
            )
            self.projector = AudioProjector.from_config(
                config,
                input_size=self.audio_encoder.output_dim,
                output_size=text_config.hidden_size,
            )
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text_config,
                prefix=maybe_prefix(prefix, VLLM.rstrip(".")),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        """Return the text that marks the place of an audio in a chat."""
        if modality != "audio":
            raise ValueError(f"the model takes audio and text, but no {modality}. Leave it out.")
        return PLACEHOLDER

    def get_mm_mapping(self) -> MultiModelKeys:
        """Return the names of the parts."""
        return MultiModelKeys.from_string_field(
            language_model=VLLM, connector="projector.", tower_model="audio_encoder."
        )

    def embed_multimodal(
        self, waves: Tensor | Sequence[Tensor] = (), **more: Any
    ) -> Sequence[Tensor]:
        """Return the embeddings of audios.

        Args:
            waves: samples of each audio (samples,), float32 at 16 kHz.
            more: other outputs of the processor.

        Returns:
            (audio tokens, LLM width) for each audio.
        """
        if len(waves) == 0:
            return []
        lengths = torch.tensor([len(wave) for wave in waves], device=waves[0].device)
        batch = nn.utils.rnn.pad_sequence(list(waves), batch_first=True)
        features, frames = self.audio_encoder.features(batch, lengths)
        audio = self.projector(*self.audio_encoder(features, frames))
        return audio.split(self.config.num_audio_tokens(lengths).tolist())

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **more: Any,
    ) -> Any:
        """Return the hidden states of the LLM. The arguments are those of vLLM's models."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return the logits of hidden states."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights of an exported directory, and return the names of all of them."""
        own: dict[str, dict[str, Tensor]] = {"audio_encoder": {}, "projector": {}}

        def of_llm() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                part, _, key = name.partition(".")
                if part == "llm":
                    yield key, tensor
                else:
                    own[part][key] = tensor

        names = AutoWeightsLoader(self.language_model).load_weights(of_llm())
        loaded = {VLLM + name for name in names}
        for part, state in own.items():
            getattr(self, part).load_state_dict(state)
            loaded |= {f"{part}.{key}" for key in state}
        self.eval()
        return loaded

    @classmethod
    def get_speech_to_text_config(
        cls, model_config: ModelConfig, task_type: str
    ) -> SpeechToTextConfig:
        """Return the sample rate, and the longest audio that is not cut into several."""
        longest = longest_samples(model_config.hf_config) / RATE
        trained = model_config.hf_config.trained_seconds or longest
        return SpeechToTextConfig(
            sample_rate=RATE, max_audio_clip_s=int(min(longest, max(trained, 2.0)))
        )

    @classmethod
    def get_num_audio_tokens(
        cls, audio_duration_s: float, stt_config: SpeechToTextConfig, model_config: ModelConfig
    ) -> int:
        """Return how many tokens some seconds of audio take."""
        return model_config.hf_config.num_audio_tokens(round(audio_duration_s * RATE))

    @classmethod
    def get_generation_prompt(cls, stt_params: SpeechToTextParams) -> TokensPrompt:
        """Return the prompt of a request for a transcript or a translation.

        Raises:
            ValueError: the prompt or the hotwords cannot be used, or the model does not translate.
        """
        config: AsrLlmHubConfig = stt_params.model_config.hf_config
        renderer = renderer_of(
            cached_tokenizer_from_config(stt_params.model_config), config.audio_token
        )
        prompt = request_prompt(config, stt_params)
        tokens = renderer.encode_prompt(renderer.user_messages(prompt), [1])
        return TokensPrompt(prompt_token_ids=tokens, multi_modal_data={"audio": stt_params.audio})


def check_exported(config: AsrLlmHubConfig, path: str) -> None:
    """Raise ValueError unless a directory has a whole model with merged adapters."""
    adapters = bool(config.lora or config.audio_encoder_lora)
    if adapters or config.exclude_from_checkpoint:
        raise ValueError(
            f"{path!r} has separate adapters, or lacks the weights of a base model. Export it with "
            "'asrllm export', which merges the adapters and writes all weights."
        )


def request_prompt(config: AsrLlmHubConfig, request: SpeechToTextParams) -> str:
    """Return the prompt of a request, as `asrllm serve` chooses it."""
    hotwords = request.hotwords or None
    prompt = request.request_prompt or None
    if request.task_type == "translate" and prompt is None:
        prompt = prompt_of_translation(config)
        if prompt is None:
            raise ValueError("the model was not trained to translate. Give a prompt for it.")
    try:
        if request.language:
            check_language(config, request.language, prompt)
        if hotwords:
            check_hotwords(config, hotwords)
        return inference_prompt(
            config, prompt=prompt, language=request.language, hotwords=hotwords, warn=False
        )
    except UserError as error:
        raise ValueError(str(error)) from error
