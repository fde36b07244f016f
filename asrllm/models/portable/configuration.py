"""The configuration of a saved model as transformers loads it."""

from transformers import AutoConfig, PreTrainedConfig

from asrllm.models.asr_llm.configuration import AsrLlmConfig

CODE_VERSION = ""  # version of the code in a saved directory; empty in this package


class AsrLlmHubConfig(AsrLlmConfig):
    """AsrLlmConfig whose LLM is found by transformers' code.

    Attributes:
        code_version: CODE_VERSION of the code that was saved with the weights.
    """

    code_version: str | None = None

    def check_code(self) -> None:
        """Raise ValueError if the code of the directory is not that of its weights."""
        if (self.code_version or "") != CODE_VERSION:
            raise ValueError(
                f"the code of this model has the version {CODE_VERSION!r}, but config.json was "
                f"saved with {self.code_version!r}. Copy all files of the directory again."
            )

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> PreTrainedConfig:
        """Return the configuration of the LLM. The arguments exist for transformers only."""
        if not self.llm:
            return self
        config = AutoConfig.for_model(**self.llm)
        config.dtype = self.dtype  # that of the whole model, not of the base model
        return config
