"""asrllm merge-lora: the LLM with its adapters in it, as a plain Hugging Face directory."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="EXP_OR_FILE", help="a run's exp_dir, a weights file in it, or an exported directory")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--weights", metavar="FILE", help="of an exp_dir; EXP/pretrained.pt by default, else the newest averaged-*.pt")
    parser.add_argument("--adapter-only", action="store_true", help="write the adapters alone, in PEFT's form, instead of merging them")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of the weights; default: the base model's")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of each file; default: %(default)s")
    parser.add_argument(
        "--no-check", action="store_true", help="do not compare logits before and after, which takes memory for the LLM in float32"
    )


def run(arguments: argparse.Namespace) -> None:
    from asrllm.checkpoints.merge import LlmFiles, merge_lora, save_adapter
    from asrllm.errors import UserError
    from asrllm.models.model import check_shard_size

    check_shard_size(arguments.max_shard_size)
    source, output = Path(arguments.source), Path(arguments.output)
    if not source.exists():
        raise UserError(f"{arguments.source!r} does not exist: give a run's exp_dir, a weights file in it, or an exported directory")
    files = LlmFiles(source, Path(arguments.weights) if arguments.weights else None)
    if arguments.adapter_only:
        save_adapter(files, output)
        print(f"{output}: load it with peft.PeftModel.from_pretrained(LLM, {str(output)!r})")
        if files.times > 1:
            print(
                f"its rank is {files.rank}, that of {files.times} checkpoints together: vLLM needs a max_lora_rank of as much; "
                f"'asrllm average --lora factors' keeps {files.rank // files.times}"
            )
        return
    found = merge_lora(files, output, dtype=arguments.dtype, max_shard_size=arguments.max_shard_size, check=not arguments.no_check)
    if found:
        print(
            f"logits of {found.tokens} tokens before and after: {found.difference:.3g} apart (root mean square; of them {found.size:.3g}), "
            f"where the adapters change them by {found.change:.3g}; the same most probable word at {found.same}"
        )
    print(f"{output}: load it with transformers.AutoModelForCausalLM.from_pretrained({str(output)!r})")
