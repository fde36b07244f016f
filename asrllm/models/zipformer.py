"""The public import path of the Zipformer encoder. Its code is in `encoders/zipformer`."""

from asrllm.models.encoders.zipformer.configuration import ZipformerConfig
from asrllm.models.encoders.zipformer.modeling import ZipformerEncoder

__all__ = ["ZipformerConfig", "ZipformerEncoder"]
