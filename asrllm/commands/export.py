"""asrllm export: a run -> a self-contained Hugging Face directory."""

import argparse
from pathlib import Path

from asrllm.writing import new_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="EXP", help="the run's exp_dir, an exported directory, or one of Auden's")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--weights", metavar="FILE", help="state dict; EXP/pretrained.pt by default, else the newest averaged-*.pt")
    parser.add_argument("--merge-adapter", action="store_true", help="merge the adapters into the layers; default: beside them")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights; default: %(default)s")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of each file; default: %(default)s")


def run(arguments: argparse.Namespace) -> None:
    from asrllm import AutoModel
    from asrllm.models.model import check_shard_size

    check_shard_size(arguments.max_shard_size)
    with new_folder(Path(arguments.output)) as partial:
        model = AutoModel.from_pretrained(arguments.source, weights=arguments.weights, dtype=arguments.dtype)
        model.save_pretrained(partial, merge_adapter=arguments.merge_adapter, max_shard_size=arguments.max_shard_size)
    print(f"{arguments.output}: load it with asrllm.AutoModel.from_pretrained({arguments.output!r})")
