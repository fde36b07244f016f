"""asrllm import-icefall: weights of icefall's ASR_LLM recipes -> a directory as a run leaves it."""

import argparse
from pathlib import Path

from asrllm.models.interop.icefall import import_icefall


def run(arguments: argparse.Namespace) -> None:
    options = {
        "encoder": arguments.audio_encoder,
        "llm": arguments.llm,
        "lora_alpha": arguments.lora_alpha,
        "prompt": arguments.prompt,
    }
    import_icefall(Path(arguments.file), Path(arguments.output), **options)
    print(
        f"{arguments.output}: load it with asrllm.AutoModel.from_pretrained({arguments.output!r})"
    )
