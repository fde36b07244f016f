"""What a saved model says of itself, in transformers' config.json."""

from typing import Any

from transformers import PreTrainedConfig

from asrllm.models.encoders.registry import encoder_class


class AsrLlmConfig(PreTrainedConfig):
    """Configuration of an AsrLlmModel.

    audio_encoder: {"model_type", and the fields of that encoder}. llm: the causal LLM's own config.json. lora, audio_encoder_lora:
    options of PEFT's LoraConfig, or None.
    base_models: {part: {"path", "fingerprint"}} of the pretrained parts, for weights that a checkpoint leaves out.
    drop_ragged_frames: the frames behind the last full stack of audio_encoder_projector_ds_rate are dropped instead of padded with zeros.
    stored: of a run, how many weights of each part its checkpoints hold, adapters apart.
    prompts: those that training mixed; the first is the default of transcribe(). prompt_languages: {prompt: lang} of those for one.
    hotwords_template: what training filled its lists of hotwords into; None: it gave none. trained_seconds: all but one in a hundred of the
    utterances trained on are shorter; None: not known.
    """

    model_type = "asrllm"

    audio_encoder: dict[str, Any] | None = None
    llm: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    audio_encoder_lora: dict[str, Any] | None = None
    projector: str = "mlp"
    projector_hidden_size: int = 2048
    audio_encoder_projector_ds_rate: int = 8
    drop_ragged_frames: bool = False
    audio_token: str = "<|AUDIO|>"
    audio_token_id: int | None = None
    tag_audio_boundary: bool = False
    pad_to_30s: bool = False
    exclude_from_checkpoint: list[str] | None = None
    base_models: dict[str, Any] | None = None
    stored: dict[str, int] | None = None
    prompts: list[str] | None = None
    prompt_languages: dict[str, str] | None = None
    hotwords_template: str | None = None
    trained_seconds: float | None = None

    def num_audio_tokens(self, samples: Any) -> Any:
        """Samples of a waveform at 16 kHz -> tokens that the LLM sees of it; an int, array or tensor, as given. No forward is run.

        The last token may be part silence: no frame is cut off, unless drop_ragged_frames says so.
        """
        frames = encoder_class((self.audio_encoder or {})["model_type"]).frame_lengths(samples)
        rate = self.audio_encoder_projector_ds_rate
        tokens = frames // rate if self.drop_ragged_frames else -(-frames // rate)
        return tokens + (2 if self.tag_audio_boundary else 0)

    def sample_limits(self) -> tuple[int, int]:
        """The fewest and the most samples at 16 kHz that the audio encoder takes."""
        fields = self.audio_encoder or {}
        return encoder_class(fields["model_type"]).sample_limits(fields)
