"""asrllm merge-lora: write the LLM with merged adapters as a plain Hugging Face directory."""

import argparse
from pathlib import Path

from asrllm.checkpoints.llm_files import LlmFiles
from asrllm.checkpoints.merge import merge_lora, save_adapter
from asrllm.checkpoints.parity import Parity
from asrllm.commands.export import source_of
from asrllm.defaults import MAX_SHARD_SIZE
from asrllm.errors import UserError
from asrllm.models.asr_llm.saving import check_shard_size


def run(arguments: argparse.Namespace) -> None:
    """Run `asrllm merge-lora`."""
    size = arguments.max_shard_size
    check_shard_size(size or MAX_SHARD_SIZE)
    check_merge_options(arguments)
    source = source_of(arguments)
    output = Path(arguments.output)
    weights = Path(arguments.weights) if arguments.weights else None
    files = LlmFiles(source, weights, base_models=arguments.base_models)
    if arguments.adapter_only:
        save_and_describe(files, output)
        return
    parity = merge_lora(
        files,
        output,
        dtype=arguments.dtype,
        max_shard_size=size or MAX_SHARD_SIZE,
        check=not arguments.no_check,
    )
    if parity:
        print(describe_parity(parity))
    print(
        f"Wrote {output}. Load it with "
        f"transformers.AutoModelForCausalLM.from_pretrained({str(output)!r})."
    )


def check_merge_options(arguments: argparse.Namespace) -> None:
    """Check that no option about merging is combined with --adapter-only.

    Raises:
        UserError: such an option is given.
    """
    if not arguments.adapter_only:
        return
    merge_options = {
        "--dtype": arguments.dtype,
        "--max-shard-size": arguments.max_shard_size,
        "--no-check": arguments.no_check,
    }
    for option, value in merge_options.items():
        if value:
            raise UserError(
                f"{option} has no effect with --adapter-only, which merges nothing. "
                "Leave out one of the two."
            )


def save_and_describe(files: LlmFiles, output: Path) -> None:
    """Write the adapters in PEFT's format, and print how to load them."""
    save_adapter(files, output)
    print(f"Wrote {output}. Load it with peft.PeftModel.from_pretrained(LLM, {str(output)!r}).")
    count = files.averaged_checkpoints
    if count > 1:
        print(
            f"The adapters have rank {files.rank}, the total of {count} averaged checkpoints. "
            f"vLLM needs max_lora_rank={files.rank} or more. "
            f"'asrllm average --lora factors' keeps rank {files.rank // count}."
        )


def describe_parity(parity: Parity) -> str:
    """Return one line about the logits before and after the merge."""
    return (
        f"Logits of {parity.tokens} tokens before and after the merge differ by "
        f"{parity.difference:.3g} (root mean square; the logits' own is {parity.size:.3g}). "
        f"The adapters change them by {parity.change:.3g}. "
        f"The most probable token is the same at {parity.same} of {parity.tokens} positions."
    )
