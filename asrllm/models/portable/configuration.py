"""The configuration of a saved model as transformers loads it."""

from transformers import AutoConfig, PreTrainedConfig

from asrllm.models.asr_llm.configuration import AsrLlmConfig


class AsrLlmHubConfig(AsrLlmConfig):
    """AsrLlmConfig whose LLM is found by transformers' code."""

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> PreTrainedConfig:
        """Return the configuration of the LLM. The arguments are transformers' and change nothing."""
        if not self.llm:
            return self
        config = AutoConfig.for_model(**self.llm)
        config.dtype = self.dtype  # that of the whole model, not of the base model
        return config
