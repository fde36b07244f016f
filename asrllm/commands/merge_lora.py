"""asrllm merge-lora: the LLM with its adapters in it, as a plain Hugging Face directory."""

import argparse
from pathlib import Path

from asrllm.checkpoints.llm_files import LlmFiles
from asrllm.checkpoints.merge import merge_lora, save_adapter
from asrllm.commands.export import source_of
from asrllm.errors import UserError
from asrllm.models.asr_llm.serialization import check_shard_size


def run(arguments: argparse.Namespace) -> None:
    size = arguments.max_shard_size
    check_shard_size(size or "5GB")
    how = {"--dtype": arguments.dtype, "--max-shard-size": size, "--no-check": arguments.no_check}
    if arguments.adapter_only and (given := [option for option, value in how.items() if value]):
        raise UserError(
            f"{given[0]} says how the LLM is merged, and --adapter-only merges nothing: leave out one of the two"
        )
    source, output = source_of(arguments), Path(arguments.output)
    weights = Path(arguments.weights) if arguments.weights else None
    files = LlmFiles(source, weights, base_models=arguments.base_models)
    if arguments.adapter_only:
        save_adapter(files, output)
        print(f"{output}: load it with peft.PeftModel.from_pretrained(LLM, {str(output)!r})")
        if files.times > 1:
            print(
                f"its rank is {files.rank}, that of {files.times} checkpoints together: vLLM needs a max_lora_rank of as much; "
                f"'asrllm average --lora factors' keeps {files.rank // files.times}"
            )
        return
    found = merge_lora(
        files,
        output,
        dtype=arguments.dtype,
        max_shard_size=size or "5GB",
        check=not arguments.no_check,
    )
    if found:
        print(
            f"logits of {found.tokens} tokens before and after: {found.difference:.3g} apart (root mean square; of them {found.size:.3g}), "
            f"where the adapters change them by {found.change:.3g}; the same most probable word at {found.same}"
        )
    print(
        f"{output}: load it with transformers.AutoModelForCausalLM.from_pretrained({str(output)!r})"
    )
