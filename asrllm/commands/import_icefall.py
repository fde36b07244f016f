"""asrllm import-icefall: convert weights of icefall's ASR_LLM recipe to a run's directory."""

import argparse
from pathlib import Path

from asrllm.models.interop.icefall import import_icefall


def run(arguments: argparse.Namespace) -> None:
    """Run `asrllm import-icefall`."""
    import_icefall(
        Path(arguments.file),
        Path(arguments.output),
        encoder=arguments.audio_encoder,
        llm=arguments.llm,
        lora_alpha=arguments.lora_alpha,
        prompt=arguments.prompt,
    )
    output = arguments.output
    print(f"Wrote {output}. Load it with asrllm.AutoModel.from_pretrained({output!r}).")
