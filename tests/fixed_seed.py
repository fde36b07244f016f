"""Record runs with fixed seeds, to compare two versions of the code bitwise.

The records have losses, gradient norms, texts and error rates.

    python -m tests.fixed_seed WORLD before.json     # in a checkout of the version before
    python -m tests.fixed_seed WORLD after.json      # in a checkout of the version after
    cmp before.json after.json

Both versions must run on the same machine with the same WORLD, a directory of tiny models and
corpora that the first call writes. A call takes some minutes on two cores.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import World, make_world
from tests.processes import assert_done, run_script

STEPS = 6
LORA_ENCODER = {
    "model__audio_encoder__lora__r": 2,
    "model__audio_encoder__lora__target_modules": "[q_proj,v_proj]",
}
# further options of World.overrides by name
RUNS: dict[str, dict[str, object]] = {
    **{f"ZeRO-{stage}, bf16": {"stage": stage} for stage in range(4)},
    **{f"ZeRO-{stage}, fp32": {"stage": stage, "trainer__precision": "fp32"} for stage in range(4)},
    "two ranks, ZeRO-2": {"stage": 2, "ranks": 2},
    "two ranks, ZeRO-3": {"stage": 3, "ranks": 2},
    "accumulation": {"stage": 2, "trainer__gradient_accumulation_steps": 2},
    "LoRA on the encoder": {"stage": 2, **LORA_ENCODER},
    "everything trained": {
        "stage": 2,
        "model__llm__frozen": "false",
        "model__llm__lora__r": 0,
        "model__audio_encoder__frozen": "false",
    },
    "augmentation, hotwords and prompts": {
        "stage": 2,
        "data__augment__speed": "[0.9,1.0,1.1]",
        "data__augment__spec_augment__prob": 1.0,
        "data__hotwords__prob": 0.5,
    },
    "endless data": {"stage": 1, "data__use_infinite_dataset": "true"},
    "running average": {
        "stage": 2,
        "trainer__use_averaged_model": "true",
        "trainer__average_period": 2,
    },
    "normed projector": {"stage": 2, "model__projector": "normed"},
}
RESUMED = ("ZeRO-2, bf16", "ZeRO-3, fp32")
DECODED = ("ZeRO-2, bf16", "ZeRO-3, bf16", "everything trained", "LoRA on the encoder")


def train(world: World, exp_dir: Path, options: dict[str, Any]) -> None:
    """Train for options["steps"] steps; default: STEPS."""
    options = dict(options)
    ranks = options.pop("ranks", 1)
    stage = options.pop("stage")
    steps = options.pop("steps", STEPS)
    overrides = world.overrides(
        exp_dir,
        trainer__num_steps=steps,
        trainer__save_every=2,
        trainer__keep_last_k=0,
        trainer__valid_every=3,
        trainer__deepspeed_config=f"ds_configs/zero{stage}.json",
        **options,
    )
    assert_done(
        run_script("train", *overrides, launcher="ranks" if ranks > 1 else "python", timeout=300)
    )


def logged(exp_dir: Path) -> list[dict[str, Any]]:
    """Return the part of the log that is the same for two runs of one version."""
    kept = ("step", "loss", "acc", "grad_norm", "lr")
    records = []
    for line in (exp_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        names = [name for name in record if name in kept or name.startswith("valid/")]
        records.append({name: record[name] for name in names})
    return records


def decode(world: World, exp_dir: Path) -> dict[str, Any]:
    """Return the texts and error rates of greedy and beam search from averaged weights."""
    test = f"data.test_data_config={world.root / 'test.yaml'}"
    found: dict[str, Any] = {}
    for method in ("greedy_search", "beam_search"):
        choice = [
            f"checkpoint.model.iter={STEPS}",
            "checkpoint.model.avg=2",
            f"decoding_method={method}",
            "max_new_tokens=20",
        ]
        assert_done(
            run_script(
                "evaluate",
                f"exp_dir={exp_dir}",
                test,
                "whisper_baseline=false",
                *choice,
                timeout=300,
            )
        )
        folder = exp_dir / method
        (texts,) = folder.glob("generations-*.jsonl")
        results = json.loads((folder / "results.json").read_text())
        found[method] = {
            "texts": [json.loads(line)["hyp"] for line in texts.read_text().splitlines()],
            "results": {
                name: {key: about[key] for key in ("wer", "cer", "utterances")}
                for name, about in results.items()
            },
        }
    return found


def record(world: World) -> Iterator[tuple[str, Any]]:
    """Yield the name of each run, and what it logged or decoded."""
    with tempfile.TemporaryDirectory(prefix="asrllm-fixed-seed-") as name:
        folder = Path(name)
        for number, (title, options) in enumerate(RUNS.items()):
            exp_dir = folder / str(number)
            train(world, exp_dir, options)
            yield title, logged(exp_dir)
            if title in DECODED:
                yield f"{title}: texts", decode(world, exp_dir)
            if title in RESUMED:
                resumed = folder / f"{number}-resumed"
                train(world, resumed, options | {"steps": STEPS // 2})
                train(world, resumed, options)
                yield f"{title}: resumed", logged(resumed)


def main() -> None:
    """Record all runs, and write the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "world", type=Path, metavar="WORLD", help="directory of the models and corpora"
    )
    parser.add_argument("output", type=Path, metavar="FILE", help="the JSON file to write")
    arguments = parser.parse_args()
    root = arguments.world.absolute()
    if not (root / "train.yaml").exists():
        root.mkdir(parents=True)
        make_world(root)
    found = {}
    for title, about in record(World(root)):
        print(title, file=sys.stderr, flush=True)
        found[title] = about
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
