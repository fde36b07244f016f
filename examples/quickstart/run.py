"""The quickstart: train a model from real weights and speech, and print its error rates.

`make quickstart` runs it. Each step writes its result to ./quickstart and is skipped if the result
exists, so an interrupted run resumes with the step that it was in.
"""

import argparse
import subprocess
from pathlib import Path

import steps
from steps import Experiment

STEPS = 110
SAVE_EVERY = 10  # steps
AVERAGED = 3  # checkpoints
TEST_SETS = {
    "synthesised": "held-out strings of the synthetic voice",
    "recorded": "a person's recorded digits, never trained on",
    "fsdd": "recorded digits of three other people (Free Spoken Digit Dataset)",
}


def main() -> None:
    """Run all steps, and print a summary."""
    arguments = parse_arguments()
    steps.use_cpu()
    digits = Experiment(
        work=arguments.work.resolve(),
        steps=arguments.steps,
        save_every=SAVE_EVERY,
        keep_last_k=AVERAGED,
    )
    steps.check_steps(digits)
    digits.work.mkdir(parents=True, exist_ok=True)
    fsdd = arguments.fsdd if (arguments.fsdd / "wav.scp").is_file() else None
    times = steps.Times()
    times.step("weights", digits.weights, lambda: steps.prepare_weights(digits.weights))
    times.step("speech", digits.speech, lambda: prepare_speech(digits.speech, fsdd))
    times.step("shards", digits.test_data, lambda: make_shards(digits))
    times.step("training", digits.pretrained, lambda: train(digits))
    times.step("evaluation", digits.results, lambda: evaluate(digits))
    recording = next((digits.speech / "recorded" / "wav").glob("*.wav"))
    text = times.always("transcription", lambda: transcribe(digits, recording))
    summarise(digits, recording, text, times)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = steps.argument_parser(__doc__ or "", "quickstart", STEPS)
    parser.add_argument(
        "--fsdd",
        type=Path,
        default=steps.REPOSITORY.parent / "shared" / "data" / "fsdd",
        help="Kaldi directory of a further test set",
    )
    return parser.parse_args()


def prepare_speech(out: Path, fsdd: Path | None) -> None:
    """Write Kaldi directories of training and test speech, with progress bars."""
    from speech import write_speech

    with steps.ProgressBars() as bars:
        write_speech(out, fsdd, bars.start)


def make_shards(digits: Experiment) -> None:
    """Write shards, and the YAML files that list them."""
    tests = [name for name in TEST_SETS if (digits.speech / name).is_dir()]
    sources = {name: digits.speech / name for name in ("train", "valid", *tests)}
    steps.make_shards(digits, sources, corpus="digits", valid_name="synthesised")


def train(digits: Experiment) -> None:
    """Train with ZeRO-3. A second run resumes from the last checkpoint."""
    steps.train(
        digits,
        3,
        "data.sampler.max_tokens=330",
        f"prompt_file={Path(__file__).with_name('prompts.txt').resolve()}",
        "trainer.warmup_steps=20",
        "trainer.valid_every=50",
    )


def evaluate(digits: Experiment) -> None:
    """Average the last checkpoints, and decode and score the test sets."""
    # Whisper's normalizer joins a string of digits into one word, and Whisper writes figures
    steps.evaluate(digits, "basic", whisper_baseline=False)


def transcribe(digits: Experiment, recording: Path) -> str:
    """Return the text of a recording."""
    command = [steps.executable("asrllm"), "transcribe", str(digits.exp), str(recording)]
    command += ["--weights", str(digits.averaged)]
    return steps.run(command, stdout=subprocess.PIPE).stdout.strip()


def summarise(digits: Experiment, recording: Path, text: str, times: steps.Times) -> None:
    """Print the error rates, an example, the times and the next commands."""
    texts = (digits.speech / "recorded" / "text").read_text().splitlines()
    reference = dict(line.split(maxsplit=1) for line in texts)[recording.stem]
    print("\n== summary")
    steps.print_error_rates(digits, TEST_SETS)
    print(f"transcript of {recording.name}: {text!r}, reference: {reference!r}")
    print(f"times: {times.text()}")
    print(f"weights {digits.weights}")
    print(f"speech  {digits.speech}")
    print(f"shards  {digits.shards}")
    print(f"run     {digits.exp}")
    steps.print_next_commands(digits)


if __name__ == "__main__":
    main()
