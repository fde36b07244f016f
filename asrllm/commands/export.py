"""asrllm export: a run -> a self-contained Hugging Face directory."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="EXP", help="the run's exp_dir, or an exported directory")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--weights", metavar="FILE", help="state dict; EXP/pretrained.pt by default, else the newest averaged-*.pt")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights; default: %(default)s")


def run(arguments: argparse.Namespace) -> None:
    from asrllm import AutoModel

    AutoModel.from_pretrained(arguments.source, weights=arguments.weights, dtype=arguments.dtype).save_pretrained(arguments.output)
    print(f"{arguments.output}: load it with asrllm.AutoModel.from_pretrained({arguments.output!r})")
