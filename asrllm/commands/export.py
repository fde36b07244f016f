"""asrllm export: a run -> a self-contained Hugging Face directory."""

import argparse
import shutil
import tempfile
from pathlib import Path

from asrllm.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="EXP", help="the run's exp_dir, an exported directory, or one of Auden's")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--weights", metavar="FILE", help="state dict; EXP/pretrained.pt by default, else the newest averaged-*.pt")
    parser.add_argument("--merge-adapter", action="store_true", help="merge the adapters into the layers; default: beside them")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights; default: %(default)s")


def run(arguments: argparse.Namespace) -> None:
    from asrllm import AutoModel

    output = Path(arguments.output).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {arguments.output!r} is not empty: choose another directory")
    model = AutoModel.from_pretrained(arguments.source, weights=arguments.weights, dtype=arguments.dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        model.save_pretrained(partial, merge_adapter=arguments.merge_adapter)
        partial.chmod(0o755)
        partial.replace(output)  # appears when it is complete
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"{arguments.output}: load it with asrllm.AutoModel.from_pretrained({arguments.output!r})")
