"""The configuration of a saved model, in transformers' config.json."""

from typing import Any

from transformers import PreTrainedConfig

from asrllm.defaults import PadTo30s
from asrllm.models.encoders.registry import encoder_class
from asrllm.models.projectors import count_audio_tokens

# what to do if a file of a saved model does not fit the others
COPY_CONFIG = "Copy the config.json that was saved with the model."
COPY_TOKENIZER = "Copy the tokenizer files that were saved with the model."


class AsrLlmConfig(PreTrainedConfig):
    """Configuration of an AsrLlmModel.

    Attributes:
        audio_encoder: {"model_type": ...} and the fields of that encoder.
        llm: the causal LLM's own config.json.
        lora: options of PEFT's LoraConfig for the LLM, or None.
        audio_encoder_lora: options of PEFT's LoraConfig for the encoder, or None.
        projector: a name in PROJECTORS.
        projector_hidden_size: width of the projector's hidden layer.
        audio_encoder_projector_ds_rate: number of encoder frames that make one audio token.
        drop_ragged_frames: drop the frames after the last full stack of
            audio_encoder_projector_ds_rate frames, instead of padding them with zeros.
        audio_token: text that marks the place of an audio in a chat.
        audio_token_id: its token id.
        tag_audio_boundary: put a learned embedding before and after each audio.
        pad_to_30s: pad Whisper's features to 30 s; "keep_silence": the LLM reads the silence too.
        exclude_from_checkpoint: parts that a saved directory does not contain.
        base_models: {part: {"path", "fingerprint"}} of the pretrained parts, for weights that a
            checkpoint does not contain. A part that started from random weights has none.
        stored: for a run, the number of weights of each part in its checkpoints, without adapters.
        prompts: prompts that training mixed. The first that is not for translations is the
            default of transcribe().
        prompt_languages: {prompt: language} of the prompts that are for one language.
        prompt_tasks: {prompt: task} of the prompts that are for one task.
        hotwords_template: text into which training inserted its lists of hotwords, or None if it
            had none.
        separate_adapter: the LLM's adapter is in the subdirectory `adapter`.
        trained_seconds: 99 % of the utterances in training were shorter; None if unknown.
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
    pad_to_30s: PadTo30s = False
    exclude_from_checkpoint: list[str] | None = None
    base_models: dict[str, Any] | None = None
    stored: dict[str, int] | None = None
    prompts: list[str] | None = None
    prompt_languages: dict[str, str] | None = None
    prompt_tasks: dict[str, str] | None = None
    hotwords_template: str | None = None
    separate_adapter: bool = False
    trained_seconds: float | None = None

    def num_audio_tokens(self, samples: Any) -> Any:
        """Return how many tokens of the LLM a waveform takes. No forward pass is run.

        The last token may be partly silence: no frame is dropped, unless drop_ragged_frames is set.

        Args:
            samples: length of the waveform in samples at 16 kHz, as an int, an array or a tensor.

        Returns:
            The number of tokens, in the type of `samples`.
        """
        fields = (self.audio_encoder or {}) | {"pad_to_30s": self.pad_to_30s}
        frames = encoder_class(fields["model_type"]).frame_lengths(samples, fields)
        return count_audio_tokens(
            frames,
            self.audio_encoder_projector_ds_rate,
            drop_ragged=self.drop_ragged_frames,
            tag_boundary=self.tag_audio_boundary,
        )

    def sample_limits(self) -> tuple[int, int]:
        """Return the smallest and largest number of samples at 16 kHz that the encoder accepts."""
        fields = self.audio_encoder or {}
        return encoder_class(fields["model_type"]).sample_limits(fields)
