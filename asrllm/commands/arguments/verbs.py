"""The verbs of `asrllm`. Importing this module loads neither torch nor numpy."""

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

from asrllm.commands.arguments.checkpoints import (
    add_average,
    add_consolidate,
    add_export,
    add_import_icefall,
    add_merge_lora,
)
from asrllm.commands.arguments.configured import add_evaluate, add_plan, add_train, add_warm_start
from asrllm.commands.arguments.decoding import add_serve, add_transcribe
from asrllm.commands.arguments.setup import add_dashboard, add_doctor, add_init
from asrllm.commands.arguments.shards import add_shards


class Verb(NamedTuple):
    """One verb of `asrllm`, implemented by `run` in `asrllm.commands.NAME`.

    Attributes:
        help: one line that describes the verb.
        add_arguments: adds the arguments of the verb to its parser, given the parser and the words
            that follow the verb.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser, Sequence[str]], None]


VERBS = {
    "init": Verb("write the configuration of a first training run", add_init),
    "doctor": Verb("check this machine before a training run", add_doctor),
    "shards": Verb("make, index, verify and describe WebDataset shards", add_shards),
    "plan": Verb("show steps, padding and memory by ZeRO stage before a run", add_plan),
    "warm-start": Verb("show the quality of a warm start of the projector", add_warm_start),
    "train": Verb("train a model", add_train),
    "dashboard": Verb("make a W&B workspace with a panel for every metric", add_dashboard),
    "evaluate": Verb("average checkpoints, decode test sets, score them", add_evaluate),
    "transcribe": Verb("transcribe audio files", add_transcribe),
    "serve": Verb("transcribe over HTTP, in the form of OpenAI's audio API", add_serve),
    "consolidate": Verb("convert one ZeRO checkpoint to a plain state dict", add_consolidate),
    "average": Verb("average several checkpoints", add_average),
    "merge-lora": Verb(
        "write the LLM with merged adapters as a Hugging Face directory", add_merge_lora
    ),
    "import-icefall": Verb(
        "convert weights of icefall's ASR_LLM to a run's directory", add_import_icefall
    ),
    "export": Verb("write a run as a self-contained Hugging Face directory", add_export),
}
