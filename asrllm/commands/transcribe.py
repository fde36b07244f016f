"""asrllm transcribe: text for audio files."""

import argparse
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from asrllm.atomic import write_whole
from asrllm.audio.stream import AudioFile, find_audio, open_audio
from asrllm.audio.vad import Loudness, Silero, load_silero
from asrllm.data.index import RATE
from asrllm.distributed import default_device
from asrllm.errors import UserError, nearest
from asrllm.escape import escape
from asrllm.evaluation.engine import TorchEngine
from asrllm.evaluation.prompt import inference_prompt, prompt_of_language
from asrllm.evaluation.subtitles import FORMATS, as_json
from asrllm.evaluation.transcription import (
    FileTranscript,
    Segmentation,
    too_short,
    transcribe_files,
)
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.auto import AutoModel, describe
from asrllm.progress import ProgressBar

LONGEST = {
    True: 28.0,
    False: 30.0,
}  # seconds of a segment, with --vad and without; the model may take less
SHORTEST = 2.0  # seconds that a segment may always have, whatever was trained

logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> None:
    """Everything that can be wrong without the weights is found before they are loaded."""
    if arguments.repetition_guard < 0:
        raise UserError(
            f"--repetition-guard {arguments.repetition_guard} must not be below 0, which is no guard"
        )
    formats = chosen_formats(arguments.format)
    description = describe(arguments.model, arguments.base_models)
    shortest, longest = description.sample_limits()
    files, problems = open_all(find_audio(arguments.audio), shortest)
    check_output(formats, arguments.output_dir, files)
    if (
        arguments.prompt is None
        and arguments.language
        and prompt_of_language(description, arguments.language) is None
    ):
        logger.warning(
            "no prompt of training is for --language %s alone: the first is asked, as for any language",
            arguments.language,
        )
    prompt = inference_prompt(
        description,
        prompt=arguments.prompt,
        language=arguments.language,
        hotwords=arguments.hotwords,
    )
    detector = functools.partial(Silero, load_silero()) if arguments.vad else Loudness
    listening = Segmentation(
        detector=detector,
        longest=min(longest, round(segment_seconds(arguments, description) * RATE)),
    )
    engine, several = load_engine(arguments), len(files) + len(problems) > 1
    seconds, done, began = 0.0, 0, time.monotonic()
    with bar_over(files) as bar:
        advance = whole_seconds(bar)
        for transcript in transcribe_files(
            engine,
            files,
            listening,
            prompt=prompt,
            batch_size=arguments.batch_size,
            advance=advance,
        ):
            if transcript.problem:
                problems.append(transcript.problem)
                continue
            warn_of(transcript)
            write(transcript, formats, arguments, several=several)
            seconds += transcript.duration
            done += 1
    if seconds:
        took = time.monotonic() - began
        print(
            f"{seconds / 3600:.2f} h of audio transcribed in {took:.1f} s, {seconds / took:.1f} x real time",
            file=sys.stderr,
        )
    if problems:
        raise UserError(
            "; ".join(problems) + (f"; the other files ({done}) are transcribed" if done else "")
        )


def open_all(paths: Sequence[str], shortest: int) -> tuple[list[AudioFile], list[str]]:
    """The files, and what is wrong with those that cannot be heard. Raises UserError where none can."""
    files, problems = [], []
    for path in paths:
        try:
            file = open_audio(path)
            if file.seconds is not None and round(file.seconds * RATE) < shortest:
                raise too_short(file, file.seconds, shortest)
        except UserError as error:
            problems.append(str(error))
        else:
            files.append(file)
    if not files:
        raise UserError("; ".join(problems))
    for problem in problems:
        logger.warning("%s; the other files are transcribed first", problem)
    return files, problems


def segment_seconds(arguments: argparse.Namespace, description: AsrLlmConfig) -> float:
    """The longest segment: what was asked for, else as long as utterances in training were, beyond which a model leaves words out."""
    trained, longest = description.trained_seconds, LONGEST[arguments.vad]
    asked = arguments.max_segment
    if asked is None:
        return longest if trained is None else min(longest, max(trained, SHORTEST))
    if not SHORTEST <= asked <= LONGEST[False]:
        raise UserError(
            f"--max-segment {asked:g} must be from {SHORTEST:g} to {LONGEST[False]:g} seconds"
        )
    if trained is not None and asked > max(trained, SHORTEST):
        logger.warning(
            "--max-segment %g is longer than what the model was trained on (%g s): it may leave words out",
            asked,
            trained,
        )
    return float(asked)


def load_engine(arguments: argparse.Namespace) -> TorchEngine:
    options = {
        name: getattr(arguments, name)
        for name in ("num_beams", "max_new_tokens", "max_tokens_per_second")
    }
    options["repetition_guard"] = arguments.repetition_guard or None
    device = default_device()
    dtype = arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    model = AutoModel.from_pretrained(
        arguments.model,
        weights=arguments.weights,
        dtype=dtype,
        base_models=arguments.base_models,
    )
    return TorchEngine(model.to(device), options)


def chosen_formats(given: Sequence[str]) -> list[str]:
    """Each once, in the order given. Raises UserError for an unknown one."""
    names = [name.strip() for part in given for name in part.split(",")] or ["txt"]
    for name in names:
        if name not in FORMATS:
            raise UserError(f"--format {name!r} is unknown: {nearest(name, FORMATS)}")
    return list(dict.fromkeys(names))


def check_output(formats: Sequence[str], folder: Path | None, files: Sequence[AudioFile]) -> None:
    """Raises UserError where the output has no place, or two files would have the same."""
    if folder is None:
        if len(formats) > 1:
            raise UserError(
                f"--format {','.join(formats)} are several: give --output-dir, where each is a file"
            )
        if len(files) > 1 and formats[0] in ("srt", "vtt"):
            raise UserError(
                f"--format {formats[0]} of {len(files)} files does not fit on standard output: give --output-dir"
            )
        return
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"--output-dir {str(folder)!r}: {str(there)!r} is a file: give a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"--output-dir {str(folder)!r} cannot be written: change the permissions of {str(there)!r}, or give another"
        )
    sources: dict[str, str] = {}
    for file in files:
        first = sources.setdefault(Path(file.path).stem, file.path)
        if Path(first).resolve() != Path(file.path).resolve():
            raise UserError(
                f"{first!r} and {file.path!r} would both be written to {Path(file.path).stem}.{formats[0]} in --output-dir: rename one, "
                "or transcribe them one after the other into two directories"
            )


def write(
    transcript: FileTranscript,
    formats: Sequence[str],
    arguments: argparse.Namespace,
    *,
    several: bool,
) -> None:
    if arguments.output_dir is not None:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        for name in formats:
            path = arguments.output_dir / f"{Path(transcript.audio).stem}.{name}"
            write_whole(path, FORMATS[name](transcript, arguments.language))
        return
    if several and formats[0] == "json":
        text = as_json(transcript, arguments.language, indent=None)
    elif several:
        # a row, whatever the LLM and the file's name hold
        text = f"{escape(transcript.audio)}\t{escape(' '.join(transcript.text.split()))}\n"
    else:
        text = FORMATS[formats[0]](transcript, arguments.language)
    print(text, end="", flush=True)


def warn_of(transcript: FileTranscript) -> None:
    if not transcript.segments:
        logger.warning(
            "no speech was found in %r: its text is empty; --no-vad would hear all of it",
            transcript.audio,
        )
    if cut := sum(spoken.end_reason == "limit" for spoken in transcript.segments):
        logger.warning("%d of %d texts of %r were cut off at their longest: raise --max-new-tokens or --max-tokens-per-second", cut,
                       len(transcript.segments), transcript.audio)  # fmt: skip


def bar_over(files: Sequence[AudioFile]) -> ProgressBar:
    seconds = [file.seconds for file in files]
    return ProgressBar(
        "transcribing, seconds", None if None in seconds else int(sum(s or 0.0 for s in seconds))
    )


def whole_seconds(bar: ProgressBar) -> Callable[[float], None]:
    done = 0.0

    def advance(seconds: float) -> None:
        nonlocal done
        done += seconds
        if int(done) > bar.done:
            bar.advance(int(done) - bar.done)

    return advance
