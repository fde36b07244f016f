"""Sources of utterances for shards. A new source is a file here, an entry of SOURCES and a test."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from asrllm.data.sources.cuts import count_cuts, read_cuts
from asrllm.data.sources.files import count_lines
from asrllm.data.sources.folder import count_folder, read_folder
from asrllm.data.sources.kaldi import count_kaldi, read_kaldi
from asrllm.data.sources.nemo import read_nemo
from asrllm.data.sources.slam import read_slam
from asrllm.data.sources.swift import read_swift
from asrllm.data.sources.utterance import RejectedError, Utterance
from asrllm.data.sources.wenet import count_wenet, read_wenet

__all__ = [
    "SOURCES",
    "RejectedError",
    "Source",
    "Utterance",
    "read_cuts",
    "read_folder",
    "read_kaldi",
    "read_nemo",
    "read_slam",
    "read_swift",
    "read_wenet",
]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A kind of source, with its option of `asrllm shards make`.

    Attributes:
        read: yields the utterances; takes the path, and the `options` by name.
        count: returns their approximate number, or None; takes the same arguments.
        metavar: placeholder of the path in the help.
        help: its line in the help.
        options: names of further options.
    """

    read: Callable[..., Iterator[Utterance]]
    count: Callable[..., int | None] = count_lines
    metavar: str
    help: str
    options: tuple[str, ...] = ()


# the key is the option of `asrllm shards make`
SOURCES = {
    "cuts": Source(
        read=read_cuts,
        count=count_cuts,
        metavar="FILE",
        help="Lhotse cuts: jsonl or jsonl.gz",
        options=("allow_pipes", "allow_urls"),
    ),
    "kaldi": Source(
        read=read_kaldi,
        count=count_kaldi,
        metavar="DIR",
        help="Kaldi data directory: wav.scp, text, and optionally segments, utt2spk, utt2lang",
        options=("allow_pipes",),
    ),
    "nemo": Source(
        read=read_nemo,
        metavar="FILE",
        help="NeMo manifest: JSON lines of audio_filepath, duration, text, ...",
    ),
    "wenet": Source(
        read=read_wenet,
        count=count_wenet,
        metavar="FILE",
        help="wenet list: JSON lines of key, wav, txt; or paths of tars",
    ),
    "folder": Source(
        read=read_folder,
        count=count_folder,
        metavar="DIR",
        help="audio files with a table (see --table), or with KEY.txt beside each: "
        "Common Voice, LJSpeech, audiofolder, ...",
        options=("table",),
    ),
    "slam": Source(
        read=read_slam,
        metavar="FILE",
        help="SLAM-LLM manifest: JSON lines of key, source, target, prompt, task",
    ),
    "swift": Source(
        read=read_swift,
        metavar="FILE",
        help="ms-swift or LLaMA-Factory manifest: JSON of messages (or query, response) and audios",
    ),
}
