"""asrllm export: a run -> a self-contained Hugging Face directory."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="EXP_OR_FILE", help="the run's exp_dir, a weights file in it, an exported directory, or one of Auden's"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--weights", metavar="FILE", help="state dict; EXP/pretrained.pt by default, else the newest averaged-*.pt")
    parser.add_argument("--merge-adapter", action="store_true", help="merge the adapters into the layers; default: beside them")
    parser.add_argument("--parts", action="store_true", help="write audio_encoder/, projector/ and llm/ too, each by itself, merged")
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16", help="of the weights; default: %(default)s")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of each file; default: %(default)s")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the directory to this repository of the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="make that repository private, where it is new")


def source_of(arguments: argparse.Namespace) -> Path:
    """Raises UserError where it does not exist, and where weights are given twice."""
    from asrllm.errors import UserError

    source = Path(arguments.source)
    if not source.exists():
        raise UserError(f"{arguments.source!r} does not exist: give a run's exp_dir, a weights file in it, or an exported directory")
    if source.is_file() and arguments.weights:
        raise UserError(f"--weights {arguments.weights!r}, but {arguments.source!r} is a weights file too: leave out one of the two")
    return source


def run(arguments: argparse.Namespace) -> None:
    from asrllm.checkpoints.export import export, push
    from asrllm.errors import UserError
    from asrllm.models.model import check_shard_size

    check_shard_size(arguments.max_shard_size)
    if arguments.private and not arguments.push_to_hub:
        raise UserError("--private is of the repository that --push-to-hub uploads to: give that too, or leave it out")
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
    )
    print(f"{arguments.output}: load it with asrllm.AutoModel.from_pretrained({arguments.output!r})")
    if arguments.push_to_hub:
        print(push(output, arguments.push_to_hub, private=arguments.private))
