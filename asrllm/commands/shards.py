"""asrllm shards make | index: WebDataset shards and their index."""

import argparse
from pathlib import Path

from asrllm.data.index import write_index
from asrllm.data.shards import write_shards
from asrllm.data.sources import read_cuts, read_kaldi
from asrllm.errors import UserError
from asrllm.progress import ProgressBar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    make = actions.add_parser("make", help="write shards, their index and rejected.jsonl")
    make.add_argument("out", metavar="OUT", help="directory to write; it appears when everything is in it")
    source = make.add_mutually_exclusive_group(required=True)
    source.add_argument("--cuts", metavar="FILE", help="Lhotse cuts, jsonl or jsonl.gz")
    source.add_argument("--kaldi", metavar="DIR", help="Kaldi data directory: wav.scp, text, optionally segments and utt2spk")
    make.add_argument("--lang", help="language written into every sample, where the source names none")
    make.add_argument("--corpus", help="corpus name written into every sample; the name of OUT by default")
    make.add_argument("--utterances-per-shard", type=positive, default=1000, metavar="N", help="default: %(default)s")
    make.add_argument("--workers", type=positive, default=2, metavar="N", help="threads that read and encode; default: %(default)s")
    make.set_defaults(act=make_shards)
    index = actions.add_parser("index", help="write an index beside tars that others made (KEY.flac/wav/... with KEY.json or KEY.txt)")
    index.add_argument("tars", nargs="+", metavar="TAR", help="all tars of one directory")
    index.set_defaults(act=index_tars)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def run(arguments: argparse.Namespace) -> None:
    arguments.act(arguments)


def make_shards(arguments: argparse.Namespace) -> None:
    utterances = read_cuts(arguments.cuts) if arguments.cuts else read_kaldi(arguments.kaldi)
    fields = {"corpus": arguments.corpus or Path(arguments.out).name}
    if arguments.lang:
        fields["lang"] = arguments.lang
    with ProgressBar("writing shards", None) as bar:
        summary = write_shards(
            arguments.out,
            utterances,
            utterances_per_shard=arguments.utterances_per_shard,
            workers=arguments.workers,
            fields=fields,
            advance=bar.advance,
        )
    index = summary.index
    print(f"{arguments.out}: {len(index)} utterances, {index.hours:.2f} h, {len(index.shards)} shards")
    if summary.rejected:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(summary.rejected.items()))
        print(f"rejected: {reasons}; see {arguments.out}/rejected.jsonl")


def index_tars(arguments: argparse.Namespace) -> None:
    tars = [Path(tar) for tar in arguments.tars]
    folders = {tar.parent for tar in tars}
    if len(folders) > 1:
        raise UserError(f"the tars lie in {len(folders)} directories: index each directory by itself")
    if missing := [tar for tar in tars if not tar.is_file()]:
        raise UserError(f"the tar {str(missing[0])!r} does not exist: check the path")
    (folder,) = folders
    with ProgressBar("indexing", len(tars)) as bar:
        index = write_index(folder, sorted(tars), advance=bar.advance)
    if not len(index):
        raise UserError(f"the tars in {str(folder)!r} hold no utterance")
    print(f"{folder}: {len(index)} utterances, {index.hours:.2f} h, {len(index.shards)} shards")
