"""The quickstart: train a model from real weights and speech, and print its error rates.

`make quickstart` runs it. Each step writes its result to ./quickstart and is skipped if the result
exists, so an interrupted run resumes with the step that it was in.
"""

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
from typing import Any

from asrllm.launchers import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 110
SAVE_EVERY = 10  # steps
AVERAGED = 3  # checkpoints
TEST_SETS = {
    "synthesised": "held-out strings of the synthetic voice",
    "recorded": "a person's recorded digits, never trained on",
    "fsdd": "recorded digits of three other people (Free Spoken Digit Dataset)",
}
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",  # two processes on the processor, on every machine
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, kw_only=True)
class Paths:
    """The directory of the quickstart and its parts.

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
    def speech(self) -> Path:
        """Directory of the Kaldi directories."""
        return self.work / "speech"

    @property
    def shards(self) -> Path:
        """Directory of the shards."""
        return self.work / "shards"

    @property
    def exp(self) -> Path:
        """Directory of the run."""
        return self.work / "exp"

    @property
    def averaged(self) -> Path:
        """Averaged weights."""
        count = checkpoints_to_average(self.steps)
        return self.exp / f"averaged-iter-{self.steps}-avg-{count}.pt"

    @property
    def results(self) -> Path:
        """Results of the evaluation."""
        return self.exp / "greedy_search" / "results.json"


def main() -> None:
    """Run all steps, and print a summary."""
    arguments = parse_arguments()
    os.environ.update(ENVIRONMENT)
    paths = Paths(work=arguments.work.resolve(), steps=arguments.steps)
    paths.work.mkdir(parents=True, exist_ok=True)
    fsdd = arguments.fsdd if (arguments.fsdd / "wav.scp").is_file() else None
    times = Times()
    times.step("weights", paths.weights, lambda: prepare_weights(paths.weights))
    times.step("speech", paths.speech, lambda: prepare_speech(paths.speech, fsdd))
    times.step("shards", paths.work / "test.yaml", lambda: make_shards(paths))
    times.step("training", paths.exp / "pretrained.pt", lambda: train(paths))
    times.step("evaluation", paths.results, lambda: evaluate(paths))
    recording = next((paths.speech / "recorded" / "wav").glob("*.wav"))
    text = times.step("transcription", None, lambda: transcribe(paths, recording))
    summarise(paths, recording, str(text), times)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("quickstart"),
        help="directory for everything (default: %(default)s)",
    )
    parser.add_argument(
        "--fsdd",
        type=Path,
        default=REPOSITORY.parent / "shared" / "data" / "fsdd",
        help="Kaldi directory of a further test set",
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)"
    )
    return parser.parse_args()


class Times:
    """Runs the steps whose results do not exist, and records how long each took."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float | None]] = []

    def step(self, name: str, result: Path | None, work: Callable[[], object]) -> object:
        """Run a step unless its result exists.

        Args:
            name: name of the step.
            result: file or directory that the step writes last; None to run it in any case.
            work: runs the step.

        Returns:
            What `work` returns; None if the step is skipped.
        """
        if result is not None and result.exists():
            print(f"== {name}: {result} exists", flush=True)
            self.rows.append((name, None))
            return None
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


def prepare_weights(out: Path) -> None:
    """Write the pretrained models."""
    from weights import NewDirectory, write_smollm2, write_whisper

    with NewDirectory(out) as folder:
        write_whisper(folder / "whisper-tiny.en")
        write_smollm2(folder / "smollm2-135m-instruct")


def prepare_speech(out: Path, fsdd: Path | None) -> None:
    """Write Kaldi directories of training and test speech, with progress bars."""
    from speech import write_speech

    from asrllm.progress import ProgressBar

    bars: list[ProgressBar] = []

    def progress(what: str, total: int) -> Callable[[], None]:
        for bar in bars:
            bar.close()
        bars.append(ProgressBar(what, total))
        return bars[-1].advance

    write_speech(out, fsdd, progress)
    bars[-1].close()


def make_shards(paths: Paths) -> None:
    """Write shards, and the YAML files that list them."""
    tests = [name for name in TEST_SETS if (paths.speech / name).is_dir()]
    for name in ["train", "valid", *tests]:
        out = paths.shards / name
        if not out.exists():
            source = ["--kaldi", str(paths.speech / name)]
            asrllm(
                "shards", "make", str(out), *source, "--lang", "en", "--corpus", f"digits-{name}"
            )
    train_data = f"- {{shards: {paths.shards / 'train'}, lang: en}}\n"
    (paths.work / "train.yaml").write_text(train_data)
    valid_data = f"- {{name: synthesised, shards: {paths.shards / 'valid'}}}\n"
    (paths.work / "valid.yaml").write_text(valid_data)
    test_data = [f"- {{name: {name}, shards: {paths.shards / name}}}\n" for name in tests]
    (paths.work / "test.yaml").write_text("".join(test_data))


def train(paths: Paths) -> None:
    """Train with ZeRO-3 on two processes. A second run resumes from the last checkpoint."""
    launcher = [executable("deepspeed"), "--num_gpus", "2", "--log_level", "error"]
    launcher += ["--master_port", str(free_port()), str(REPOSITORY / "launch" / "train.py")]
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
        "data.filter.min_duration=0.1",
        "data.sampler.max_tokens=330",
        "data.sampler.max_utterances=32",
        "data.num_workers=1",
        f"prompt_file={REPOSITORY / 'examples' / 'quickstart' / 'prompts.txt'}",
        f"trainer.deepspeed_config={REPOSITORY / 'ds_configs' / 'zero3.json'}",
        f"trainer.num_steps={paths.steps}",
        "trainer.num_epochs=null",
        "trainer.lr=1e-3",
        "trainer.warmup_steps=20",
        "trainer.valid_every=50",
        f"trainer.save_every={SAVE_EVERY}",
        f"trainer.keep_last_k={AVERAGED}",
        "trainer.wandb.mode=offline",
        f"trainer.precision={precision()}",
    ]
    run([*launcher, *overrides])


def precision() -> str:
    """Return bf16 if the processor has instructions for it; else it is about 20 times slower."""
    import torch

    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def evaluate(paths: Paths) -> None:
    """Average the last checkpoints, and decode and score the test sets."""
    asrllm(
        "evaluate",
        f"exp_dir={paths.exp}",
        f"checkpoint.model.iter={paths.steps}",
        f"checkpoint.model.avg={checkpoints_to_average(paths.steps)}",
        # Whisper's normalizer joins a string of digits into one word, and Whisper writes figures
        "normalizer=basic",
        "whisper_baseline=false",
        f"data.test_data_config={paths.work / 'test.yaml'}",
        "decoding_method=greedy_search",
    )


def checkpoints_to_average(steps: int) -> int:
    """Return the number of checkpoints to average; a short training has fewer than AVERAGED."""
    return min(AVERAGED, -(-steps // SAVE_EVERY))


def transcribe(paths: Paths, recording: Path) -> str:
    """Return the text of a recording."""
    command = [executable("asrllm"), "transcribe", str(paths.exp), str(recording)]
    command += ["--weights", str(paths.averaged)]
    return run(command, stdout=subprocess.PIPE).stdout.strip()


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


def summarise(paths: Paths, recording: Path, text: str, times: Times) -> None:
    """Print the error rates, an example, the times and the next commands."""
    texts = (paths.speech / "recorded" / "text").read_text().splitlines()
    reference = dict(line.split(maxsplit=1) for line in texts)[recording.stem]
    print("\n== summary")
    for name, result in json.loads(paths.results.read_text()).items():
        print(error_rate(name, result))
    print(f"transcript of {recording.name}: {text!r}, reference: {reference!r}")
    print(f"times: {times.text()}")
    print(f"weights {paths.weights}")
    print(f"speech  {paths.speech}")
    print(f"shards  {paths.shards}")
    print(f"run     {paths.exp}")
    program = Path(sys.executable).parent / "asrllm"
    output = paths.work / "model"
    print("next:")
    print(f"  {program} transcribe {paths.exp} YOUR.wav --weights {paths.averaged}")
    print(f"  {program} export {paths.exp} --weights {paths.averaged} --output {output}")
    print(f"  {program} train --help")


def error_rate(name: str, result: Mapping[str, Any]) -> str:
    """Return one line about the word error rate of a test set."""
    low, high = result["wer_ci95"]
    return (
        f"WER {result['wer']:5.2f} % (95 % CI {low:.2f} to {high:.2f})  {name}: {TEST_SETS[name]}, "
        f"{result['utterances']} utterances"
    )


if __name__ == "__main__":
    main()
