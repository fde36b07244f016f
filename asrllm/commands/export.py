"""asrllm export: a run -> a self-contained Hugging Face directory."""

import argparse
from pathlib import Path

from asrllm.checkpoints.export import export, push
from asrllm.errors import UserError
from asrllm.models.asr_llm.serialization import check_shard_size


def source_of(arguments: argparse.Namespace) -> Path:
    """Raises UserError where it does not exist, and where weights are given twice."""
    source = Path(arguments.source)
    if not source.exists():
        raise UserError(
            f"{arguments.source!r} does not exist: give a run's exp_dir, a weights file in it, or an exported directory"
        )
    if source.is_file() and arguments.weights:
        raise UserError(
            f"--weights {arguments.weights!r}, but {arguments.source!r} is a weights file too: leave out one of the two"
        )
    return source


def run(arguments: argparse.Namespace) -> None:
    check_shard_size(arguments.max_shard_size)
    if arguments.private and not arguments.push_to_hub:
        raise UserError(
            "--private is of the repository that --push-to-hub uploads to: give that too, or leave it out"
        )
    source, output = source_of(arguments), Path(arguments.output)
    export(
        source,
        output,
        weights=arguments.weights,
        dtype=arguments.dtype,
        merge_adapter=arguments.merge_adapter,
        parts=arguments.parts,
        max_shard_size=arguments.max_shard_size,
        repository=arguments.push_to_hub,
        base_models=arguments.base_models,
    )
    print(
        f"{arguments.output}: load it with asrllm.AutoModel.from_pretrained({arguments.output!r})"
    )
    if arguments.push_to_hub:
        print(push(output, arguments.push_to_hub, private=arguments.private))
