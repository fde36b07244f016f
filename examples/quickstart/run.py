"""The quickstart: real weights and speech in, a trained model and its error rates out. `make quickstart` runs it.

Every step leaves its result below ./quickstart and is skipped when that is there, so an interrupted run goes on where it stopped.
"""

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, SAVE_EVERY, AVERAGED = 220, 20, 3
TEST_SETS = {
    "synthesised": "held-out strings of the synthetic voice",
    "recorded": "a person's recorded digits, never trained on",
    "fsdd": "recorded digits of three other people (Free Spoken Digit Dataset)",
}
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",  # two processes on the processor, whatever else the machine has
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
}


def main() -> None:
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
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    fsdd = arguments.fsdd if (arguments.fsdd / "wav.scp").is_file() else None
    times = Times()
    times.step("weights", work / "weights", lambda: prepare_weights(work / "weights"))
    times.step("speech", work / "speech", lambda: prepare_speech(work / "speech", fsdd))
    times.step("shards", work / "test.yaml", lambda: make_shards(work))
    exp = work / "exp"
    times.step("training", exp / "pretrained.pt", lambda: train(work, exp, arguments.steps))
    results = exp / "greedy_search" / "results.json"
    times.step("evaluation", results, lambda: evaluate(work, exp, arguments.steps))
    recording = next((work / "speech" / "recorded" / "wav").glob("*.wav"))
    averaged = (
        exp / f"averaged-iter-{arguments.steps}-avg-{checkpoints_to_average(arguments.steps)}.pt"
    )
    text = times.step("transcription", None, lambda: transcribe(exp, averaged, recording))
    summarise(work, exp, averaged, json.loads(results.read_text()), recording, str(text), times)


class Times:
    """Runs the steps that are not done yet and remembers how long each took."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float | None]] = []

    def step(self, name: str, result: Path | None, work: Callable[[], object]) -> object:
        if result is not None and result.exists():
            print(f"== {name}: {result} is there", flush=True)
            self.rows.append((name, None))
            return None
        print(f"== {name}", flush=True)
        began = time.monotonic()
        done = work()
        self.rows.append((name, time.monotonic() - began))
        return done

    def text(self) -> str:
        parts = [
            f"{name} {'reused' if seconds is None else f'{seconds:.0f} s'}"
            for name, seconds in self.rows
        ]
        return ", ".join(parts) + f"; total {sum(s or 0 for _, s in self.rows):.0f} s"


def prepare_weights(out: Path) -> None:
    from weights import NewDirectory, write_smollm2, write_whisper

    with NewDirectory(out) as folder:
        write_whisper(folder / "whisper-tiny.en")
        write_smollm2(folder / "smollm2-135m-instruct")


def prepare_speech(out: Path, fsdd: Path | None) -> None:
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


def make_shards(work: Path) -> None:
    tests = [name for name in TEST_SETS if (work / "speech" / name).is_dir()]
    for name in ["train", "valid", *tests]:
        out = work / "shards" / name
        if not out.exists():
            asrllm(
                "shards",
                "make",
                str(out),
                "--kaldi",
                str(work / "speech" / name),
                "--lang",
                "en",
                "--corpus",
                f"digits-{name}",
            )
    (work / "train.yaml").write_text(f"- {{shards: {work / 'shards' / 'train'}, lang: en}}\n")
    (work / "valid.yaml").write_text(
        f"- {{name: synthesised, shards: {work / 'shards' / 'valid'}}}\n"
    )
    (work / "test.yaml").write_text(
        "".join(f"- {{name: {name}, shards: {work / 'shards' / name}}}\n" for name in tests)
    )


def train(work: Path, exp: Path, steps: int) -> None:
    """ZeRO-3 on two processes; run again, it goes on from the last checkpoint."""
    command = [
        executable("deepspeed"),
        "--num_gpus",
        "2",
        "--log_level",
        "error",
        "--master_port",
        str(free_port()),
        str(REPOSITORY / "launch" / "train.py"),
    ]
    command += [
        f"exp_dir={exp}",
        "model.audio_encoder.model_type=whisper",
        f"model.audio_encoder.pretrained_model={work / 'weights' / 'whisper-tiny.en'}",
        f"model.llm.pretrained_model={work / 'weights' / 'smollm2-135m-instruct'}",
        "model.llm.chat_template=chatml",
        "model.llm.lora.r=16",
        "model.projector=normed",
        "model.projector_hidden_size=1024",
        "model.audio_encoder_projector_ds_rate=5",
        f"data.train_data_config={work / 'train.yaml'}",
        f"data.valid_data_config={work / 'valid.yaml'}",
        "data.filter.min_duration=0.1",
        "data.sampler.max_tokens=330",
        "data.sampler.max_utterances=32",
        "data.num_workers=1",
        f"prompt_file={REPOSITORY / 'examples' / 'quickstart' / 'prompts.txt'}",
        f"trainer.deepspeed_config={REPOSITORY / 'ds_configs' / 'zero3.json'}",
        f"trainer.num_steps={steps}",
        "trainer.num_epochs=null",
        "trainer.lr=1e-3",
        "trainer.warmup_steps=20",
        "trainer.valid_every=100",
        f"trainer.save_every={SAVE_EVERY}",
        f"trainer.keep_last_k={AVERAGED}",
        "trainer.wandb.mode=offline",
        f"trainer.precision={precision()}",
    ]
    run(command)


def precision() -> str:
    """A processor without instructions for bfloat16 takes some twenty times as long for it."""
    import torch

    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def evaluate(work: Path, exp: Path, steps: int) -> None:
    choice = [
        f"checkpoint.model.iter={steps}",
        f"checkpoint.model.avg={checkpoints_to_average(steps)}",
    ]
    # by themselves: Whisper's normaliser would make one word of a string of digits, and Whisper writes figures
    scoring = ["normalizer=basic", "whisper_baseline=false"]
    asrllm(
        "evaluate",
        f"exp_dir={exp}",
        *choice,
        *scoring,
        f"data.test_data_config={work / 'test.yaml'}",
        "decoding_method=greedy_search",
    )


def checkpoints_to_average(steps: int) -> int:
    """A short training has fewer checkpoints than are averaged otherwise."""
    return min(AVERAGED, -(-steps // SAVE_EVERY))


def transcribe(exp: Path, averaged: Path, recording: Path) -> str:
    command = [
        executable("asrllm"),
        "transcribe",
        str(exp),
        str(recording),
        "--weights",
        str(averaged),
    ]
    return run(command, stdout=subprocess.PIPE).stdout.strip()


def asrllm(*arguments: str) -> None:
    run([executable("asrllm"), *arguments])


def run(command: list[str], stdout: int | None = None) -> subprocess.CompletedProcess[str]:
    print("$ " + shlex.join(command), flush=True)
    try:
        return subprocess.run(command, check=True, text=True, stdout=stdout)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"the command above ended with status {error.returncode}; run it again to go on"
        ) from error


def executable(name: str) -> str:
    """A program of this interpreter's environment."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or name


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def summarise(
    work: Path, exp: Path, averaged: Path, results: dict, recording: Path, text: str, times: Times
) -> None:
    texts = (work / "speech" / "recorded" / "text").read_text().splitlines()
    reference = dict(line.split(maxsplit=1) for line in texts)[recording.stem]
    print("\n== summary")
    for name, result in results.items():
        low, high = result["wer_ci95"]
        print(
            f"WER {result['wer']:5.2f} % (95 %: {low:.2f} to {high:.2f})  {name}: {TEST_SETS[name]}, {result['utterances']} utterances"
        )
    print(f"transcribed {recording.name}: {text!r}; spoken were {reference!r}")
    print(f"times: {times.text()}")
    print(
        f"weights {work / 'weights'}\nspeech  {work / 'speech'}\nshards  {work / 'shards'}\nrun     {exp}"
    )
    program = Path(sys.executable).parent / "asrllm"
    print(f"next:\n  {program} transcribe {exp} YOUR.wav --weights {averaged}")
    print(f"  {program} export {exp} --weights {averaged} --output {work / 'model'}")
    print(f"  {program} train --help")


if __name__ == "__main__":
    main()
