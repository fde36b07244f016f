"""Steps that the quickstart and the sentences example share."""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from asrllm.launchers import free_port
from asrllm.progress import ProgressBar

T = TypeVar("T")
REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",  # two processes on the processor, on every machine
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The directory of an example, its parts, and the length of its training.

    Attributes:
        work: directory of everything.
        steps: optimizer steps of the training.
        save_every: optimizer steps between checkpoints.
        keep_last_k: last checkpoints to keep and to average.
    """

    work: Path
    steps: int
    save_every: int
    keep_last_k: int

    @property
    def weights(self) -> Path:
        """Directory of the pretrained weights."""
        return self.work / "weights"

    @property
    def speech(self) -> Path:
        """Directory of the Kaldi directories."""
        return self.work / "speech"

    @property
    def shards(self) -> Path:
        """Directory of the shards."""
        return self.work / "shards"

    @property
    def test_data(self) -> Path:
        """YAML file of the test sets, which is written after all shards."""
        return self.work / "test.yaml"

    @property
    def exp(self) -> Path:
        """Directory of the run."""
        return self.work / "exp"

    @property
    def pretrained(self) -> Path:
        """Last weights, which the training writes at its end."""
        return self.exp / "pretrained.pt"

    @property
    def checkpoints(self) -> int:
        """Number of checkpoints to average; a short training has fewer than `keep_last_k`."""
        return min(self.keep_last_k, -(-self.steps // self.save_every))

    @property
    def averaged(self) -> Path:
        """Averaged weights, which the evaluation writes and scores."""
        return self.exp / f"averaged-iter-{self.steps}-avg-{self.checkpoints}.pt"

    @property
    def results(self) -> Path:
        """Results of the evaluation."""
        return self.exp / "greedy_search" / "results.json"


def argument_parser(description: str, work: str, optimizer_steps: int) -> argparse.ArgumentParser:
    """Return a parser of the options that the examples share.

    Args:
        description: text above the options.
        work: default directory of everything.
        optimizer_steps: default length of the training.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(work),
        help="directory for everything (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=optimizer_steps,
        help="optimizer steps (default: %(default)s)",
    )
    return parser


def check_steps(experiment: Experiment) -> None:
    """Exit if a finished run has another number of steps: its results would be taken for these."""
    last = experiment.exp / f"checkpoint-{experiment.steps}"
    if experiment.pretrained.exists() and not last.exists():
        raise SystemExit(
            f"{experiment.exp} was trained with another number of steps. Remove it, or choose "
            "another --work."
        )


class Times:
    """Runs the steps whose results do not exist, and records how long each took."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float | None]] = []

    def step(self, name: str, result: Path, work: Callable[[], None]) -> None:
        """Run a step unless its result exists.

        Args:
            name: name of the step.
            result: file or directory that the step writes last.
            work: runs the step.
        """
        if result.exists():
            print(f"== {name}: {result} exists", flush=True)
            self.rows.append((name, None))
        else:
            self.always(name, work)

    def always(self, name: str, work: Callable[[], T]) -> T:
        """Run a step, whether its result exists or not, and return what `work` returns."""
        print(f"== {name}", flush=True)
        began = time.monotonic()
        done = work()
        self.rows.append((name, time.monotonic() - began))
        return done

    def text(self) -> str:
        """Return one line with the seconds of each step."""
        parts: list[str] = []
        total = 0.0
        for name, seconds in self.rows:
            if seconds is None:
                parts.append(f"{name} reused")
            else:
                parts.append(f"{name} {seconds:.0f} s")
                total += seconds
        return f"{', '.join(parts)}; total {total:.0f} s"


class ProgressBars:
    """Shows one progress bar at a time. As a context manager, it closes the last one."""

    def __init__(self) -> None:
        self.bar: ProgressBar | None = None

    def __enter__(self) -> "ProgressBars":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def start(self, what: str, total: int) -> Callable[[], None]:
        """Show a new bar.

        Args:
            what: what is counted.
            total: the count at the end.

        Returns:
            A function that advances the bar by one.
        """
        if self.bar is not None:
            self.bar.close()
        self.bar = ProgressBar(what, total)
        return self.bar.advance


def prepare_weights(out: Path) -> None:
    """Write the pretrained models."""
    from weights import NewDirectory, write_smollm2, write_whisper

    with NewDirectory(out) as folder:
        write_whisper(folder / "whisper-tiny.en")
        write_smollm2(folder / "smollm2-135m-instruct")


def make_shards(
    experiment: Experiment,
    sources: Mapping[str, Path],
    *,
    corpus: str,
    valid_name: str,
) -> None:
    """Write shards, and the YAML files that list them.

    Args:
        experiment: directories of the experiment.
        sources: Kaldi directories by name: train, valid, and the test sets.
        corpus: beginning of the names of the corpora.
        valid_name: name of the validation set.
    """
    shards = experiment.shards
    for name, source in sources.items():
        if not (shards / name).exists():
            about = ["--lang", "en", "--corpus", f"{corpus}-{name}"]
            asrllm("shards", "make", str(shards / name), "--kaldi", str(source), *about)
    train_data = f"- {{shards: {shards / 'train'}, lang: en}}\n"
    (experiment.work / "train.yaml").write_text(train_data)
    valid_data = f"- {{name: {valid_name}, shards: {shards / 'valid'}}}\n"
    (experiment.work / "valid.yaml").write_text(valid_data)
    tests = [name for name in sources if name not in ("train", "valid")]
    test_data = [f"- {{name: {name}, shards: {shards / name}}}\n" for name in tests]
    experiment.test_data.write_text("".join(test_data))


def train(experiment: Experiment, zero_stage: int, *overrides: str) -> None:
    """Train Whisper, a projector and SmolLM2 with LoRA on two processes.

    A second run resumes from the last checkpoint.

    Args:
        experiment: directories and length of the training.
        zero_stage: stage of ZeRO, 1 to 3.
        overrides: further arguments of `asrllm train`, in Hydra's syntax.
    """
    launcher = [executable("deepspeed"), "--num_gpus", "2", "--log_level", "error"]
    launcher += ["--master_port", str(free_port()), str(REPOSITORY / "launch" / "train.py")]
    common = [
        f"exp_dir={experiment.exp}",
        "model.audio_encoder.model_type=whisper",
        f"model.audio_encoder.pretrained_model={experiment.weights / 'whisper-tiny.en'}",
        f"model.llm.pretrained_model={experiment.weights / 'smollm2-135m-instruct'}",
        "model.llm.chat_template=chatml",
        "model.llm.lora.r=16",
        "model.projector=normed",
        "model.projector_hidden_size=1152",  # twice the LLM's width, for an exact fit
        "model.projector_init=aligned",
        "model.audio_encoder_projector_ds_rate=5",
        f"data.train_data_config={experiment.work / 'train.yaml'}",
        f"data.valid_data_config={experiment.work / 'valid.yaml'}",
        "data.filter.min_duration=0.1",
        "data.sampler.max_utterances=32",
        "data.num_workers=1",
        f"trainer.deepspeed_config={REPOSITORY / 'ds_configs' / f'zero{zero_stage}.json'}",
        f"trainer.num_steps={experiment.steps}",
        "trainer.num_epochs=null",
        "trainer.lr=1e-3",
        f"trainer.save_every={experiment.save_every}",
        f"trainer.keep_last_k={experiment.keep_last_k}",
        "trainer.wandb.mode=offline",
        f"trainer.precision={precision()}",
    ]
    run([*launcher, *common, *overrides])


def precision() -> str:
    """Return bf16 if the processor has instructions for it; else it is about 20 times slower."""
    import torch

    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def evaluate(experiment: Experiment, normalizer: str, *, whisper_baseline: bool) -> None:
    """Average the last checkpoints, and decode and score the test sets.

    Args:
        experiment: directories and length of the training.
        normalizer: normalizer of the words before they are scored.
        whisper_baseline: whether Whisper by itself decodes the test sets too.
    """
    asrllm(
        "evaluate",
        f"exp_dir={experiment.exp}",
        f"checkpoint.model.iter={experiment.steps}",
        f"checkpoint.model.avg={experiment.checkpoints}",
        f"normalizer={normalizer}",
        f"whisper_baseline={str(whisper_baseline).lower()}",
        f"data.test_data_config={experiment.test_data}",
        "decoding_method=greedy_search",
    )


def print_error_rates(experiment: Experiment, meanings: Mapping[str, str]) -> None:
    """Print one line for each test set.

    Args:
        experiment: an evaluated experiment.
        meanings: what each test set is, by its name.
    """
    for name, result in read_results(experiment).items():
        low, high = result["wer_ci95"]
        print(
            f"WER {result['wer']:5.2f} % (95 % CI {low:.2f} to {high:.2f})  {name}: "
            f"{meanings[name]}, {result['utterances']} utterances"
        )


def read_results(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Return the results of the evaluation by test set."""
    results: dict[str, dict[str, Any]] = json.loads(experiment.results.read_text())
    return results


def print_next_commands(experiment: Experiment) -> None:
    """Print what to type with the trained model."""
    program = executable("asrllm")
    exp = str(experiment.exp)
    weights = ["--weights", str(experiment.averaged)]
    output = ["--output", str(experiment.work / "model")]
    print("next:")
    for command in (
        [program, "transcribe", exp, "YOUR.wav", *weights],
        [program, "export", exp, *weights, *output],
        [program, "train", "--help"],
    ):
        print(f"  {shlex.join(command)}")


def asrllm(*arguments: str) -> None:
    """Run an asrllm command."""
    run([executable("asrllm"), *arguments])


def run(command: list[str], stdout: int | None = None) -> subprocess.CompletedProcess[str]:
    """Print and run a command."""
    print("$ " + shlex.join(command), flush=True)
    try:
        return subprocess.run(command, check=True, text=True, stdout=stdout)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"The command above exited with status {error.returncode}. "
            "Run the same program again to resume."
        ) from error


def executable(name: str) -> str:
    """Return the path of a program in this interpreter's environment."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or name


def use_cpu() -> None:
    """Set the environment of the commands that the example runs."""
    os.environ.update(ENVIRONMENT)
