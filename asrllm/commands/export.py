"""asrllm export: write a run as a self-contained Hugging Face directory."""

import argparse
from pathlib import Path

from asrllm.checkpoints.export import export, push
from asrllm.checkpoints.voxtral import export_voxtral
from asrllm.errors import UserError
from asrllm.models.asr_llm.adapter_files import ADAPTER
from asrllm.models.asr_llm.saving import check_shard_size


def source_of(arguments: argparse.Namespace) -> Path:
    """Return the path that EXP_OR_FILE names.

    Raises:
        UserError: the path does not exist, or both it and --weights name a weights file.
    """
    source = Path(arguments.source)
    if not source.exists():
        raise UserError(
            f"{arguments.source!r} does not exist. Use a run's exp_dir, a weights file in it, "
            "or an exported directory."
        )
    if source.is_file() and arguments.weights:
        raise UserError(
            f"--weights {arguments.weights!r} and {arguments.source!r} are both weights files. "
            "Leave out --weights, or use the run's exp_dir."
        )
    return source


def how_to_load(arguments: argparse.Namespace) -> str:
    """Return a sentence about how to load the written directory."""
    name = arguments.output
    if arguments.form == "voxtral":
        readme = str(Path(name) / "README.md")
        return f"Load it with transformers.VoxtralForConditionalGeneration; see {readme}."
    if not arguments.separate_adapter:
        return f"Load it with asrllm.AutoModel.from_pretrained({name!r})."
    adapter = str(Path(name) / ADAPTER)
    return f"Serve it with vLLM: --model {name} --enable-lora --lora-modules NAME={adapter}"


def check_form(arguments: argparse.Namespace) -> None:
    """Raise UserError for options that Voxtral's form of a model does not have."""
    if arguments.form != "voxtral":
        return
    for name in ("keep_adapters", "separate_adapter", "parts"):
        if getattr(arguments, name):
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"--as voxtral merges the adapters and writes one model, but {option} asks for "
                f"other weights. Leave out {option}, or --as voxtral."
            )


def run(arguments: argparse.Namespace) -> None:
    """Run `asrllm export`."""
    check_shard_size(arguments.max_shard_size)
    if arguments.private and not arguments.push_to_hub:
        raise UserError(
            "--private has no effect without --push-to-hub. Add --push-to-hub REPO, "
            "or leave out --private."
        )
    check_form(arguments)
    source = source_of(arguments)
    output = Path(arguments.output)
    common = {
        "weights": arguments.weights,
        "dtype": arguments.dtype,
        "max_shard_size": arguments.max_shard_size,
        "repository": arguments.push_to_hub,
        "base_models": arguments.base_models,
    }
    if arguments.form == "voxtral":
        export_voxtral(source, output, **common)
    else:
        export(
            source,
            output,
            merge_adapter=not arguments.keep_adapters,
            separate_adapter=arguments.separate_adapter,
            parts=arguments.parts,
            **common,
        )
    name = arguments.output
    print(f"Wrote {name}. {how_to_load(arguments)}")
    if arguments.push_to_hub:
        print(push(output, arguments.push_to_hub, private=arguments.private))
