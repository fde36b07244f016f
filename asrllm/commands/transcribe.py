"""asrllm transcribe: write text for audio files."""

import argparse
import functools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from asrllm.atomic import (
    check_text_output,
    check_writable_folder,
    writable_path,
    write_whole,
)
from asrllm.audio.vad import Loudness, Silero, load_silero
from asrllm.data.audio_file import AudioFile
from asrllm.data.audio_files import open_audio
from asrllm.data.find_audio import find_audio
from asrllm.defaults import RATE
from asrllm.distributed import default_device
from asrllm.errors import UserError, nearest
from asrllm.escape import escape
from asrllm.evaluation.engine import BatchEngine, TorchEngine
from asrllm.evaluation.prompt import inference_prompt, prompt_of_language
from asrllm.evaluation.subtitles import TRANSCRIPT_WRITERS, as_json
from asrllm.evaluation.transcription import (
    FileTranscript,
    Segmentation,
    too_short,
    transcribe_files,
)
from asrllm.evaluation.vllm.limits import longest_samples
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.auto import AutoModel, load_model_config
from asrllm.progress import ProgressBar, waiting

# Seconds of the longest segment; the model may support less.
LONGEST_WITH_VAD = 28.0
LONGEST_WITHOUT_VAD = 30.0
SHORTEST_LIMIT = 2.0  # seconds that a segment may always have, whatever the training data was

logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> None:
    """Run `asrllm transcribe`. Mistakes are reported before the weights load, if possible."""
    if arguments.repetition_guard < 0:
        raise UserError(
            f"--repetition-guard {arguments.repetition_guard} is negative. "
            "Use 0 to switch the guard off, or a value above 0."
        )
    formats = chosen_formats(arguments.format)
    config = load_model_config(arguments.model, arguments.base_models)
    shortest, _ = config.sample_limits()
    files, problems = open_all(find_audio(arguments.audio), shortest)
    check_output(formats, arguments.output_dir, files)
    warn_of_untrained_language(arguments, config)
    prompt = inference_prompt(
        config,
        prompt=arguments.prompt,
        language=arguments.language,
        hotwords=arguments.hotwords,
    )
    segmentation = make_segmentation(arguments, config)
    engine = load_engine(arguments.model, arguments)
    several = len(files) + len(problems) > 1
    began = time.monotonic()
    with audio_progress(files) as bar:
        transcripts = transcribe_files(
            engine,
            files,
            segmentation,
            prompt=prompt,
            batch_size=arguments.batch_size,
            advance=in_whole_seconds(bar),
        )
        done, seconds, failures = write_all(transcripts, formats, arguments, several=several)
    engine.close()
    if seconds:
        print_speed(seconds, time.monotonic() - began)
    problems += failures
    if problems:
        if done:
            problems.append(f"The other files ({done}) are transcribed.")
        raise UserError("\n".join(problems))


def write_all(
    transcripts: Iterable[FileTranscript],
    formats: Sequence[str],
    arguments: argparse.Namespace,
    *,
    several: bool,
) -> tuple[int, float, list[str]]:
    """Write transcripts as they become available. Arguments are those of `write`.

    Returns:
        The number of files that were transcribed, their seconds, and messages about the others.
    """
    done = 0
    seconds = 0.0
    problems: list[str] = []
    for transcript in transcripts:
        if transcript.problem:
            problems.append(transcript.problem)
            continue
        warn_of_transcript(transcript)
        write(transcript, formats, arguments, several=several)
        seconds += transcript.duration
        done += 1
    return done, seconds, problems


def print_speed(audio_seconds: float, seconds: float) -> None:
    """Print how much audio was transcribed, and how fast."""
    print(
        f"Transcribed {audio_seconds:.1f} s of audio in {seconds:.1f} s "
        f"({audio_seconds / seconds:.1f}x real time)",
        file=sys.stderr,
    )


def open_all(paths: Sequence[str], shortest: int) -> tuple[list[AudioFile], list[str]]:
    """Open audio files.

    Args:
        paths: the files.
        shortest: minimum number of samples at 16 kHz that the audio encoder supports.

    Returns:
        The usable files, and one message for each unusable one.

    Raises:
        UserError: no file is usable.
    """
    files: list[AudioFile] = []
    problems: list[str] = []
    for path in paths:
        try:
            files.append(_open_usable(path, shortest))
        except UserError as error:
            problems.append(str(error))
    if not files:
        raise UserError("\n".join(problems))
    for problem in problems:
        logger.warning("%s The other files are transcribed first.", problem)
    return files, problems


def _open_usable(path: str, shortest: int) -> AudioFile:
    """Open an audio file, or raise UserError if it has fewer than `shortest` samples."""
    file = open_audio(path)
    if file.seconds is not None and round(file.seconds * RATE) < shortest:
        raise too_short(file, file.seconds, shortest)
    return file


def warn_of_untrained_language(arguments: argparse.Namespace, config: AsrLlmConfig) -> None:
    """Warn if --language would choose the prompt, but no training prompt is for that language."""
    if arguments.prompt is not None or not arguments.language:
        return
    if prompt_of_language(config, arguments.language) is None:
        logger.warning(
            "no training prompt is for --language %s alone. The first prompt is used, as for any "
            "language.",
            arguments.language,
        )


def segment_seconds(arguments: argparse.Namespace, config: AsrLlmConfig) -> float:
    """Return the longest segment in seconds.

    Raises:
        UserError: --max-segment is out of range.
    """
    trained = config.trained_seconds
    requested = arguments.max_segment
    if requested is None:
        return _default_segment_seconds(trained, vad=arguments.vad)
    if not SHORTEST_LIMIT <= requested <= LONGEST_WITHOUT_VAD:
        raise UserError(
            f"--max-segment {requested:g} is out of range. "
            f"Use a value from {SHORTEST_LIMIT:g} to {LONGEST_WITHOUT_VAD:g} seconds."
        )
    if trained is not None and requested > max(trained, SHORTEST_LIMIT):
        logger.warning(
            "--max-segment %g is longer than the training utterances (%g s). The model may omit "
            "words.",
            requested,
            trained,
        )
    return float(requested)


def _default_segment_seconds(trained: float | None, *, vad: bool) -> float:
    """Return the duration of long training utterances, within the supported range.

    A model omits words of longer ones.
    """
    longest = LONGEST_WITH_VAD if vad else LONGEST_WITHOUT_VAD
    if trained is None:
        return longest
    return min(longest, max(trained, SHORTEST_LIMIT))


def make_segmentation(arguments: argparse.Namespace, config: AsrLlmConfig) -> Segmentation:
    """Return how audio is cut into segments.

    Args:
        arguments: --vad, --max-segment and --engine are read.
        config: configuration of the model.

    Raises:
        UserError: --max-segment is out of range.
    """
    detector = functools.partial(Silero, load_silero()) if arguments.vad else Loudness
    seconds = segment_seconds(arguments, config)
    longest = config.sample_limits()[1]
    if arguments.engine == "vllm":
        longest = longest_samples(config)
    return Segmentation(detector=detector, longest=min(longest, round(seconds * RATE)))


def load_engine(path: str, arguments: argparse.Namespace) -> BatchEngine:
    """Load the model in a directory with the decoding options of the command line."""
    if arguments.engine == "vllm":
        return vllm_engine(path, arguments)
    return torch_engine(path, arguments)


def torch_engine(path: str, arguments: argparse.Namespace) -> TorchEngine:
    """Load the model in this process."""
    with waiting(f"loading {path}"):
        model = AutoModel.from_pretrained(
            path,
            weights=arguments.weights,
            dtype=chosen_dtype(arguments),
            base_models=arguments.base_models,
        )
    return TorchEngine(model.to(default_device()), decoding_options(arguments))


def vllm_engine(path: str, arguments: argparse.Namespace) -> BatchEngine:
    """Load the model in vLLM."""
    from asrllm.evaluation.vllm.engine import load_vllm_engine

    with waiting(f"loading {path} in vLLM"):
        return load_vllm_engine(
            path,
            decoding_options(arguments),
            dtype=chosen_dtype(arguments),
            weights=arguments.weights,
            base_models=arguments.base_models,
        )


def chosen_dtype(arguments: argparse.Namespace) -> str:
    """Return --dtype, by default bfloat16 on an accelerator and float32 on a CPU."""
    default = "float32" if default_device().type == "cpu" else "bfloat16"
    return str(arguments.dtype or default)


def decoding_options(arguments: argparse.Namespace) -> dict[str, int | float | None]:
    """Return the decoding options of the command line, as TorchEngine takes them."""
    return {
        "num_beams": arguments.num_beams,
        "max_new_tokens": arguments.max_new_tokens,
        "max_tokens_per_second": arguments.max_tokens_per_second,
        "repetition_guard": arguments.repetition_guard or None,
    }


def chosen_formats(given: Sequence[str]) -> list[str]:
    """Return the output formats without duplicates, in the given order; by default txt.

    Args:
        given: values of --format, each one or several names separated by commas.

    Raises:
        UserError: a format is unknown.
    """
    names = [name.strip() for part in given for name in part.split(",")] or ["txt"]
    for name in names:
        if name not in TRANSCRIPT_WRITERS:
            raise UserError(f"--format {name!r} is unknown. {nearest(name, TRANSCRIPT_WRITERS)}")
    return list(dict.fromkeys(names))


def check_output(formats: Sequence[str], folder: Path | None, files: Sequence[AudioFile]) -> None:
    """Check that every transcript can be written, and that no two have the same path.

    Args:
        formats: the output formats.
        folder: --output-dir; None for standard output.
        files: the audio files.

    Raises:
        UserError: the output does not fit on standard output, the directory cannot be written, or
            two transcripts would have the same path.
    """
    if folder is None:
        check_standard_output(formats, files)
        return
    check_writable_folder(folder, "--output-dir ")
    sources: dict[str, str] = {}
    for file in files:
        stem = Path(file.path).stem
        first = sources.setdefault(stem, file.path)
        if Path(first).resolve() != Path(file.path).resolve():
            raise UserError(
                f"{first!r} and {file.path!r} would both be written to {stem}.{formats[0]} in "
                "--output-dir. Rename one, or transcribe them into two directories."
            )
        if folder.is_dir():
            for name in formats:
                check_text_output(folder / f"{stem}.{name}")


def check_standard_output(formats: Sequence[str], files: Sequence[AudioFile]) -> None:
    """Raise UserError if standard output cannot take these formats of these files."""
    if len(formats) > 1:
        raise UserError(
            f"--format {','.join(formats)} names several formats, but standard output takes one. "
            "Use --output-dir, or one format."
        )
    if len(files) > 1 and formats[0] in ("srt", "vtt"):
        raise UserError(
            f"--format {formats[0]} of {len(files)} files cannot be written to standard output. "
            "Use --output-dir."
        )


def write(
    transcript: FileTranscript,
    formats: Sequence[str],
    arguments: argparse.Namespace,
    *,
    several: bool,
) -> None:
    """Write a transcript to --output-dir in every format, or to standard output in the first one.

    Args:
        transcript: transcript of one file.
        formats: the output formats.
        arguments: --output-dir and --language are read.
        several: whether there are several files, each of which is one line of standard output.
    """
    if arguments.output_dir is not None:
        with writable_path(arguments.output_dir):
            arguments.output_dir.mkdir(parents=True, exist_ok=True)
        for name in formats:
            path = arguments.output_dir / f"{Path(transcript.audio).stem}.{name}"
            write_whole(path, TRANSCRIPT_WRITERS[name](transcript, arguments.language))
        return
    text = TRANSCRIPT_WRITERS[formats[0]](transcript, arguments.language)
    if several:
        text = _as_one_line(transcript, formats[0], arguments.language)
    print(text, end="", flush=True)


def _as_one_line(transcript: FileTranscript, name: str, language: str | None) -> str:
    """Return a JSON object, or the file and its text, whatever characters these contain."""
    if name == "json":
        return as_json(transcript, language, indent=None)
    return f"{escape(transcript.audio)}\t{escape(' '.join(transcript.text.split()))}\n"


def warn_of_transcript(transcript: FileTranscript) -> None:
    """Warn if a file has no speech, or if texts were cut at their maximum length."""
    if not transcript.segments:
        logger.warning(
            "no speech was found in %r, so its text is empty. Use --no-vad to transcribe all of "
            "it.",
            transcript.audio,
        )
    cut = sum(segment.end_reason == "limit" for segment in transcript.segments)
    if cut:
        logger.warning(
            "%d of %d texts of %r were cut at their maximum length. "
            "Raise --max-new-tokens or --max-tokens-per-second.",
            cut,
            len(transcript.segments),
            transcript.audio,
        )


def audio_progress(files: Sequence[AudioFile]) -> ProgressBar:
    """Return a progress bar over the seconds of all files."""
    total = 0.0
    for file in files:
        if file.seconds is None:
            return ProgressBar("transcribing, seconds", None)
        total += file.seconds
    return ProgressBar("transcribing, seconds", int(total))


def in_whole_seconds(bar: ProgressBar) -> Callable[[float], None]:
    """Return a function that advances the bar, which counts whole seconds, by fractions."""
    done = 0.0

    def advance(seconds: float) -> None:
        nonlocal done
        done += seconds
        if int(done) > bar.done:
            bar.advance(int(done) - bar.done)

    return advance
