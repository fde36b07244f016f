"""The pipeline "automatic-speech-recognition" of a saved model."""

from typing import Any

from transformers import AutomaticSpeechRecognitionPipeline


class AsrLlmPipeline(AutomaticSpeechRecognitionPipeline):
    """Transcribes audio with the model's own processor. Options of generate() pass through."""

    _load_processor = True

    def _sanitize_parameters(self, **options: Any) -> tuple[dict, dict, dict]:
        preparation = {
            name: options.pop(name)
            for name in ("language", "prompt", "hotwords")
            if name in options
        }
        return preparation, options.pop("generate_kwargs", {}) | options, {}

    def preprocess(self, inputs: Any, **options: Any) -> Any:
        """Yield the inputs of the model. `inputs` is a file, bytes, samples, or a dict of samples.

        The options are those of apply_transcription_request.
        """
        for item in super().preprocess(inputs):
            is_last = item.pop("is_last")
            yield {"is_last": is_last, **self.processor.transcription_inputs(item, **options)}

    def _forward(self, model_inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
        is_last = model_inputs.pop("is_last")
        return {"is_last": is_last, "tokens": self.model.generate(**model_inputs, **options)}

    def postprocess(self, model_outputs: Any, **options: Any) -> dict[str, str]:
        """Return {"text": ...}."""
        texts: list[str] = []
        for output in model_outputs:
            texts += self.processor.batch_decode(output["tokens"], skip_special_tokens=True)
        return {"text": " ".join(texts)}
