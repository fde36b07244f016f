"""asrllm merge-lora: the LLM with its adapters in it, as a plain Hugging Face directory."""

import argparse
from pathlib import Path

from asrllm.commands.export import source_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="EXP_OR_FILE", help="a run's exp_dir, a weights file in it, or an exported directory")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--weights", metavar="FILE", help="of an exp_dir; EXP/pretrained.pt by default, else the newest averaged-*.pt")
    parser.add_argument("--adapter-only", action="store_true", help="write the adapters alone, in PEFT's form, instead of merging them")
    kept = "as they are in the base model, or in the run's weights where it trained them"
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help=f"of the weights; default: {kept}")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="of each file; 5GB by default")
    parser.add_argument(
        "--no-check", action="store_true", help="do not compare logits before and after, which reads the weights three times more"
    )


def run(arguments: argparse.Namespace) -> None:
    from asrllm.checkpoints.llm_files import LlmFiles
    from asrllm.checkpoints.merge import merge_lora, save_adapter
    from asrllm.errors import UserError
    from asrllm.models.model import check_shard_size

    size = arguments.max_shard_size
    check_shard_size(size or "5GB")
    how = {"--dtype": arguments.dtype, "--max-shard-size": size, "--no-check": arguments.no_check}
    if arguments.adapter_only and (given := [option for option, value in how.items() if value]):
        raise UserError(f"{given[0]} says how the LLM is merged, and --adapter-only merges nothing: leave out one of the two")
    source, output = source_of(arguments), Path(arguments.output)
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
    found = merge_lora(files, output, dtype=arguments.dtype, max_shard_size=size or "5GB", check=not arguments.no_check)
    if found:
        print(
            f"logits of {found.tokens} tokens before and after: {found.difference:.3g} apart (root mean square; of them {found.size:.3g}), "
            f"where the adapters change them by {found.change:.3g}; the same most probable word at {found.same}"
        )
    print(f"{output}: load it with transformers.AutoModelForCausalLM.from_pretrained({str(output)!r})")
