"""asrllm init: write the configuration of a first training run."""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

from asrllm.atomic import new_folder, replaceable_folder
from asrllm.commands.arguments.setup import INIT_FLAGS, Flag
from asrllm.commands.experiment_files import PROMPTS, DataSource, Experiment
from asrllm.commands.libraries import import_transformers
from asrllm.data.samples import make_sample
from asrllm.data.sources import SOURCES, RejectedError
from asrllm.data.sources.detect import detect_source
from asrllm.errors import UserError
from asrllm.escape import escape
from asrllm.progress import waiting

CHECKED = 10  # utterances of each source


def run(arguments: argparse.Namespace) -> None:
    """Run `asrllm init DIR`. Nothing is written before all checks have passed."""
    folder = Path(arguments.dir).absolute()
    replaceable_folder(folder, "")
    values = complete(vars(arguments))
    sources = {"train": check_data(values["data"], "--data")}
    if values["valid_data"]:
        sources["valid"] = check_data(values["valid_data"], "--valid-data")
    encoder = local_or_hub(values["encoder"])
    llm = local_or_hub(values["llm"])
    with waiting("checking the audio encoder and the LLM"):
        kind = check_models(encoder, llm)
    experiment = Experiment(
        folder=folder,
        sources=sources,
        lang=values["lang"],
        encoder_kind=kind,
        encoder=encoder,
        llm=llm,
        gpus=values["gpus"],
    )
    files = experiment.files()
    with new_folder(folder, "") as partial:
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")
    print(f"{escape(arguments.dir)}: wrote {', '.join(files)}. Next:\n")
    for command in experiment.commands():
        print(escape(command))


# --- values of the flags ---


def complete(given: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the flags, and ask at the terminal for those that are missing.

    Args:
        given: the parsed command line; None for a flag that is not given.

    Raises:
        UserError: a flag is missing, and standard input is not a terminal or its answer is invalid.
    """
    values = {name: given[name] for name in INIT_FLAGS}
    if sys.stdin.isatty():
        for name, flag in INIT_FLAGS.items():
            if values[name] is None:
                values[name] = ask(flag)
    missing = []
    for name, flag in INIT_FLAGS.items():
        if flag.required and values[name] is None:
            missing.append(f"{flag.option} {flag.metavar}")
    if missing:
        raise UserError(f"not given: {', '.join(missing)}. Add what is missing.")
    return values


def ask(flag: Flag) -> Any:
    """Ask for the value of a flag, and return None if the answer is empty.

    Raises:
        UserError: the answer is not valid, or standard input ends.
    """
    optional = "" if flag.required else " (press Enter for none)"
    try:
        answer = input(f"{flag.help}{optional}: ").strip()
    except EOFError as error:
        raise UserError(f"standard input ended. Give {flag.option} {flag.metavar}.") from error
    if not answer:
        return None
    try:
        return flag.type(answer)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{flag.option}: {error}. Run the same command again.") from error


def local_or_hub(text: str) -> str:
    """Return the absolute path of a model that exists, or else the text, which may be a hub id."""
    path = Path(text).expanduser()
    return str(path.absolute()) if path.exists() else text


# --- checks ---


def check_data(text: str, option: str) -> DataSource:
    """Read the first utterances of a source with their audio, as `asrllm shards make` does.

    Args:
        text: path of a directory or a manifest.
        option: the option that names it, for messages.

    Raises:
        UserError: the path is not a source, or an utterance cannot be used.
    """
    path = Path(text).expanduser().absolute()
    kind = detect_source(path)
    for utterance in itertools.islice(SOURCES[kind].read(path), CHECKED):
        try:
            make_sample(utterance, {})
        except RejectedError as error:
            reason, detail = error.args
            raise UserError(
                f"{option} {text!r}: the utterance {utterance.key!r} cannot be used ({reason}): "
                f"{detail.rstrip('.')}. Correct it, or remove the utterance."
            ) from error
    return DataSource(kind=kind, path=path)


def check_models(encoder: str, llm: str) -> str:
    """Check the files of the encoder and the LLM, as training does before it loads the weights.

    Returns:
        The name of the encoder in ENCODERS.

    Raises:
        UserError: a directory is not a supported model, or its files are corrupted.
    """
    import_transformers()
    from asrllm.models.build import build_processor
    from asrllm.models.encoders.registry import encoder_kind
    from asrllm.models.fingerprint import resolve_pretrained
    from asrllm.models.model_args import EncoderPart, LlmPart, ModelConfig

    resolve_pretrained(encoder, what="--encoder")
    resolve_pretrained(llm, what="--llm")
    kind = encoder_kind(encoder)
    config = ModelConfig(
        audio_encoder=EncoderPart(model_type=kind, pretrained_model=encoder),
        llm=LlmPart(pretrained_model=llm),
    )
    build_processor(config, pad_to_30s=False, prompts=PROMPTS)
    return kind
