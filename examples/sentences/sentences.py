"""Train a model that writes down English sentences, from packages alone, and print error rates.

`make sentences` runs it. Each step writes its result to ./sentences and is skipped if the result
exists, so an interrupted run resumes with the step that it was in.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

# this example shares the quickstart's weights, voice, distortions and steps
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))

import steps
from speech import Spoken, distort, read, write_kaldi
from steps import Experiment
from texts import Recording, librivox, prompts, unpack_packages, without, wordnet_sentences
from voices import draw_texts, synthesise
from weights import NewDirectory

TEXTS = 6000
STEPS = 2400
VALID_EVERY = 200  # steps
SAVE_EVERY = 50  # steps
AVERAGED = 5  # checkpoints
PROMPT_COPIES = 4  # distorted copies of each recorded prompt for training
TEST_SETS = {
    "prompts": "recorded telephone prompts, never trained on",
    "librivox": "sentences of a LibriVox recording, never trained on",
    "own": "the recordings of --own",
}


def main() -> None:
    """Run all steps, and print a summary."""
    arguments = parse_arguments()
    steps.use_cpu()
    sentences = Experiment(
        work=arguments.work.resolve(),
        steps=arguments.steps,
        save_every=SAVE_EVERY,
        keep_last_k=AVERAGED,
    )
    packages = sentences.work / "packages"
    steps.check_steps(sentences)
    sentences.work.mkdir(parents=True, exist_ok=True)
    times = steps.Times()
    times.step("weights", sentences.weights, lambda: steps.prepare_weights(sentences.weights))
    times.step("packages", packages, lambda: unpack_packages(packages, arguments.debs))
    times.step("speech", sentences.speech, lambda: prepare_speech(sentences, arguments.texts))
    times.step("shards", sentences.test_data, lambda: make_shards(sentences, arguments.own))
    times.step("training", sentences.pretrained, lambda: train(sentences))
    times.step("evaluation", sentences.results, lambda: evaluate(sentences))
    print("\n== summary")
    steps.print_error_rates(sentences, TEST_SETS)
    print(f"times: {times.text()}")
    print(f"report: {sentences.results.with_name('report.html')}")
    steps.print_next_commands(sentences)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = steps.argument_parser(__doc__ or "", "sentences", STEPS)
    parser.add_argument(
        "--texts",
        type=int,
        default=TEXTS,
        help="texts that the synthetic voices read (default: %(default)s, about 5 hours of speech)",
    )
    parser.add_argument(
        "--own", type=Path, help="Kaldi directory of your own recordings, as a further test set"
    )
    parser.add_argument(
        "--debs", type=Path, help="directory with the Debian packages, instead of apt-get download"
    )
    return parser.parse_args()


def prepare_speech(sentences: Experiment, count: int) -> None:
    """Write Kaldi directories of training, validation and test speech, with progress bars.

    Args:
        sentences: directories, with the unpacked packages.
        count: texts that the synthetic voices read.
    """
    packages = sentences.work / "packages"
    recorded = prompts(packages)
    tests = {"prompts": recorded["test"], "librivox": librivox(packages)}
    held_out = [*recorded["valid"], *tests["prompts"], *tests["librivox"]]
    texts = draw_texts(without(wordnet_sentences(packages), held_out), count, seed=3)
    with steps.ProgressBars() as bars:
        spoken = synthesise(texts, packages, sentences.work / "voices", bars.start)
        spoken += recorded["train"] * PROMPT_COPIES
        advance = bars.start("distorting speech", len(spoken))
        with NewDirectory(sentences.speech) as folder:
            for name, recordings in {"valid": recorded["valid"], **tests}.items():
                write_kaldi(folder / name, read_all(recordings))
            write_kaldi(folder / "train", distorted(spoken, advance))


def read_all(recordings: list[Recording]) -> Iterator[Spoken]:
    """Yield the words and the waveform of each recording."""
    for recording in recordings:
        yield recording.words, read(recording.path)


def distorted(recordings: list[Recording], advance: Callable[[], None]) -> Iterator[Spoken]:
    """Yield the words and a distorted waveform of each recording."""
    for number, (words, wave) in enumerate(read_all(recordings)):
        yield words, distort(np.random.default_rng([13, number]), wave)
        advance()


def make_shards(sentences: Experiment, own: Path | None) -> None:
    """Write shards, and the YAML files that list them.

    Args:
        sentences: directories, with the speech.
        own: a Kaldi directory of the user's recordings, or None.
    """
    sources = {name: sentences.speech / name for name in ("train", "valid", "prompts", "librivox")}
    if own is not None:
        sources["own"] = own
    steps.make_shards(sentences, sources, corpus="sentences", valid_name="prompts")


def train(sentences: Experiment) -> None:
    """Train with ZeRO-1. A second run resumes from the last checkpoint."""
    steps.train(
        sentences,
        1,
        "data.augment.speed=[0.9,1.0,1.1]",
        "data.sampler.max_tokens=500",
        f"prompt_file={Path(__file__).with_name('prompts.txt').resolve()}",
        "trainer.warmup_steps=50",
        f"trainer.valid_every={VALID_EVERY}",
    )


def evaluate(sentences: Experiment) -> None:
    """Average the last checkpoints, and score their texts and those of Whisper alone."""
    steps.evaluate(sentences, "en", whisper_baseline=True)


if __name__ == "__main__":
    main()
