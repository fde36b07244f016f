"""Train a model that writes down English sentences, from packages alone, and print error rates.

`make sentences` runs it. Each step writes its result to ./sentences and is skipped if the result
exists, so an interrupted run resumes with the step that it was in.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# this example shares the quickstart's weights, voice, distortions and steps
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))

import run as quickstart
from speech import Spoken, distort, read, write_kaldi
from texts import Recording, librivox, prompts, unpack_packages, without, wordnet_sentences
from voices import draw_texts, synthesise
from weights import NewDirectory

from asrllm.launchers import free_port
from asrllm.progress import ProgressBar

HERE = Path(__file__).resolve().parent
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


@dataclass(frozen=True, kw_only=True)
class Paths:
    """The directory of the example and its parts.

    Attributes:
        work: directory of everything.
        steps: optimizer steps of the training.
    """

    work: Path
    steps: int

    @property
    def weights(self) -> Path:
        """Directory of the pretrained weights."""
        return self.work / "weights"

    @property
    def packages(self) -> Path:
        """Directory of the unpacked Debian packages."""
        return self.work / "packages"

    @property
    def speech(self) -> Path:
        """Directory of the Kaldi directories."""
        return self.work / "speech"

    @property
    def exp(self) -> Path:
        """Directory of the run."""
        return self.work / "exp"

    @property
    def results(self) -> Path:
        """Results of the evaluation."""
        return self.exp / "greedy_search" / "results.json"


def main() -> None:
    """Run all steps, and print a summary."""
    arguments = parse_arguments()
    os.environ.update(quickstart.ENVIRONMENT)
    paths = Paths(work=arguments.work.resolve(), steps=arguments.steps)
    paths.work.mkdir(parents=True, exist_ok=True)
    times = quickstart.Times()
    times.step("weights", paths.weights, lambda: quickstart.prepare_weights(paths.weights))
    times.step("packages", paths.packages, lambda: unpack_packages(paths.packages, arguments.debs))
    times.step("speech", paths.speech, lambda: prepare_speech(paths, arguments.texts))
    times.step("shards", paths.work / "test.yaml", lambda: make_shards(paths, arguments.own))
    times.step("training", paths.exp / "pretrained.pt", lambda: train(paths))
    times.step("evaluation", paths.results, lambda: evaluate(paths))
    summarise(paths, times)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("sentences"),
        help="directory for everything (default: %(default)s)",
    )
    parser.add_argument(
        "--texts",
        type=int,
        default=TEXTS,
        help="texts that the synthetic voices read (default: %(default)s, about 7 hours)",
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)"
    )
    parser.add_argument(
        "--own", type=Path, help="Kaldi directory of your own recordings, as a further test set"
    )
    parser.add_argument(
        "--debs", type=Path, help="directory with the Debian packages, instead of apt-get download"
    )
    return parser.parse_args()


def prepare_speech(paths: Paths, count: int) -> None:
    """Write Kaldi directories of training, validation and test speech, with progress bars.

    Args:
        paths: directories.
        count: texts that the synthetic voices read.
    """
    bars: list[ProgressBar] = []

    def progress(what: str, total: int) -> Callable[[], None]:
        for bar in bars:
            bar.close()
        bars.append(ProgressBar(what, total))
        return bars[-1].advance

    recorded = prompts(paths.packages)
    tests = {"prompts": recorded["test"], "librivox": librivox(paths.packages)}
    held_out = [*recorded["valid"], *tests["prompts"], *tests["librivox"]]
    sentences = without(wordnet_sentences(paths.packages), held_out)
    texts = draw_texts(sentences, count, seed=3)
    spoken = synthesise(texts, paths.packages, paths.work / "voices", progress)
    spoken += recorded["train"] * PROMPT_COPIES
    advance = progress("distorting speech", len(spoken))
    with NewDirectory(paths.speech) as folder:
        for name, recordings in {"valid": recorded["valid"], **tests}.items():
            write_kaldi(folder / name, read_all(recordings))
        write_kaldi(folder / "train", distorted(spoken, advance))
    bars[-1].close()


def read_all(recordings: list[Recording]) -> Iterator[Spoken]:
    """Yield the words and the waveform of each recording."""
    for recording in recordings:
        yield recording.words, read(recording.path)


def distorted(recordings: list[Recording], advance: Callable[[], None]) -> Iterator[Spoken]:
    """Yield the words and a distorted waveform of each recording."""
    for number, (words, wave) in enumerate(read_all(recordings)):
        yield words, distort(np.random.default_rng([13, number]), wave)
        advance()


def make_shards(paths: Paths, own: Path | None) -> None:
    """Write shards, and the YAML files that list them.

    Args:
        paths: directories.
        own: a Kaldi directory of the user's recordings, or None.
    """
    sources = {name: paths.speech / name for name in ("train", "valid", "prompts", "librivox")}
    if own is not None:
        sources["own"] = own
    shards = paths.work / "shards"
    for name, source in sources.items():
        if not (shards / name).exists():
            corpus = ["--lang", "en", "--corpus", f"sentences-{name}"]
            quickstart.asrllm("shards", "make", str(shards / name), "--kaldi", str(source), *corpus)
    (paths.work / "train.yaml").write_text(f"- {{shards: {shards / 'train'}, lang: en}}\n")
    (paths.work / "valid.yaml").write_text(f"- {{name: prompts, shards: {shards / 'valid'}}}\n")
    tests = [name for name in TEST_SETS if name in sources]
    lines = [f"- {{name: {name}, shards: {shards / name}}}\n" for name in tests]
    (paths.work / "test.yaml").write_text("".join(lines))


def train(paths: Paths) -> None:
    """Train on two processes. A second run resumes from the last checkpoint."""
    launcher = [quickstart.executable("deepspeed"), "--num_gpus", "2", "--log_level", "error"]
    launcher += ["--master_port", str(free_port())]
    launcher.append(str(quickstart.REPOSITORY / "launch" / "train.py"))
    overrides = [
        f"exp_dir={paths.exp}",
        "model.audio_encoder.model_type=whisper",
        f"model.audio_encoder.pretrained_model={paths.weights / 'whisper-tiny.en'}",
        f"model.llm.pretrained_model={paths.weights / 'smollm2-135m-instruct'}",
        "model.llm.chat_template=chatml",
        "model.llm.lora.r=16",
        "model.projector=normed",
        "model.projector_hidden_size=1152",  # twice the LLM's width, for an exact fit
        "model.projector_init=aligned",
        "model.audio_encoder_projector_ds_rate=5",
        f"data.train_data_config={paths.work / 'train.yaml'}",
        f"data.valid_data_config={paths.work / 'valid.yaml'}",
        "data.augment.speed=[0.9,1.0,1.1]",
        "data.filter.min_duration=0.1",
        "data.sampler.max_tokens=500",
        "data.sampler.max_utterances=32",
        "data.num_workers=1",
        f"prompt_file={HERE / 'prompts.txt'}",
        f"trainer.deepspeed_config={quickstart.REPOSITORY / 'ds_configs' / 'zero1.json'}",
        f"trainer.num_steps={paths.steps}",
        "trainer.num_epochs=null",
        "trainer.lr=1e-3",
        "trainer.warmup_steps=50",
        f"trainer.valid_every={VALID_EVERY}",
        f"trainer.save_every={SAVE_EVERY}",
        f"trainer.keep_last_k={AVERAGED}",
        "trainer.wandb.mode=offline",
        f"trainer.precision={quickstart.precision()}",
    ]
    quickstart.run([*launcher, *overrides])


def evaluate(paths: Paths) -> None:
    """Average the last checkpoints, and decode and score the test sets beside Whisper itself."""
    quickstart.asrllm(
        "evaluate",
        f"exp_dir={paths.exp}",
        f"checkpoint.model.iter={paths.steps}",
        f"checkpoint.model.avg={min(AVERAGED, -(-paths.steps // SAVE_EVERY))}",
        "normalizer=en",
        "whisper_baseline=true",
        f"data.test_data_config={paths.work / 'test.yaml'}",
        "decoding_method=greedy_search",
    )


def summarise(paths: Paths, times: "quickstart.Times") -> None:
    """Print the error rates, the times and the next commands."""
    print("\n== summary")
    for name, result in json.loads(paths.results.read_text()).items():
        low, high = result["wer_ci95"]
        print(
            f"WER {result['wer']:5.2f} % (95 % CI {low:.2f} to {high:.2f})  {name}: "
            f"{TEST_SETS[name]}, {result['utterances']} utterances"
        )
    print(f"times: {times.text()}")
    print(f"report: {paths.results.with_name('report.html')}")
    print("next:")
    command = [quickstart.executable("asrllm"), "transcribe", str(paths.exp), "YOUR.wav"]
    print(f"  {shlex.join(command)}")


if __name__ == "__main__":
    main()
