"""Memory and time of the checkpoint tools.

    python benchmarks/checkpoints.py [--rounds R] [--tiny] [--output FILE]

Consolidation is compared with DeepSpeed's own converter, averages of 2 checkpoints with averages of
10, and merging without the comparison of logits with merging and comparing, which loads the LLM.
Verifying a checkpoint and the fingerprint of an LLM are measured per GB, from the page cache.

The checkpoint comes from a run of two processes with ZeRO-2: an LLM of SmolLM2-135M's shape with
random weights, fully trained in float32 with AdamW. The adapters (rank 16, every linear layer) come
from another run. The ten averaged checkpoints of each run are hard links with other step numbers.
Every tool runs in its own process, and the tools take turns. A peak is the largest anonymous memory
of the process (RssAnon, read every 2 ms) minus that after the imports. Pages of mapped files are
not in it, because the kernel drops them when memory is needed.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from saving import make_world, train

from asrllm.training.checkpoint.manifest import manifest_text, read_manifest

STEPS = 2
AVERAGE = "from asrllm.checkpoints.average import CheckpointSelection, average"
MERGE = """
from asrllm.checkpoints.llm_files import LlmFiles
from asrllm.checkpoints.merge import merge_lora
"""
TOOLS = {
    "consolidate": (
        "from asrllm.checkpoints.consolidate import consolidate",
        "consolidate(exp / 'checkpoint-2', out)",
    ),
    "deepspeed": (
        "from deepspeed.utils.zero_to_fp32 import "
        "convert_zero_checkpoint_to_fp32_state_dict as convert",
        "convert(str(exp), str(out), tag='checkpoint-2', max_shard_size='100GB')",
    ),
    "average 2": (AVERAGE, "average(exp, CheckpointSelection(iteration=10, avg=2), out)"),
    "average 10": (AVERAGE, "average(exp, CheckpointSelection(iteration=10, avg=10), out)"),
    "average 2, adapters": (
        AVERAGE,
        "average(lora, CheckpointSelection(iteration=10, avg=2), out)",
    ),
    "average 10, adapters": (
        AVERAGE,
        "average(lora, CheckpointSelection(iteration=10, avg=10), out)",
    ),
    "merge": (MERGE, "merge_lora(LlmFiles(lora), out, max_shard_size=shard, check=False)"),
    "merge, checked": (MERGE, "merge_lora(LlmFiles(lora), out, max_shard_size=shard)"),
    "verify": (
        "import torch; from asrllm.integrity import verify_weights",
        "for file in (exp / 'checkpoint-2').glob('*.pt'): verify_weights(file)",
    ),
    "fingerprint": (
        "from asrllm.models.fingerprint import fingerprint",
        "fingerprint(exp.parent / 'llm')",
    ),
}
SCRIPT = """
import sys, threading, time, warnings
from pathlib import Path
warnings.simplefilter("ignore")
exp, lora, out, shard = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
{imports}
def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
peak = before = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
began = time.perf_counter()
{call}
seconds = time.perf_counter() - began
done.set()
watcher.join()
print(); print(max(peak, anonymous()) - before, seconds)
"""


def make_runs(folder: Path, *, tiny: bool) -> tuple[Path, Path]:
    """Return the directories of the fully trained run and of the run with adapters."""
    make_world(folder, tiny=tiny)
    whole, lora = folder / "whole", folder / "lora"
    deepspeed = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus",
        "2",
        "--master_port",
        "29571",
    ]
    settings = {"trainer__num_steps": STEPS, "trainer__save_every": STEPS}
    train(folder, whole, *deepspeed, **settings, trainer__deepspeed_config="ds_configs/zero2.json")
    train(folder, lora, **settings, model__llm__lora__r=16, model__llm__frozen="true")
    return whole, lora


def link_checkpoints(exp: Path, count: int) -> None:
    """Make copies of a run's checkpoint with the steps 1 to `count`, as hard links."""
    made = exp / f"checkpoint-{STEPS}"
    for step in range(1, count + 1):
        if step == STEPS:
            continue
        copy = shutil.copytree(made, exp / f"checkpoint-{step}", copy_function=os.link)
        manifest = read_manifest(made) | {"step": step}
        (copy / "asrllm.json").unlink()  # a hard link, which must not be written through
        (copy / "asrllm.json").write_text(manifest_text(manifest))


def bytes_of(folder: Path, pattern: str) -> int:
    """Return the size of the files in a directory whose names match a pattern."""
    return sum(file.stat().st_size for file in folder.glob(pattern))


def measure(tool: str, exp: Path, lora: Path, shard: int, scratch: Path) -> tuple[float, float]:
    """Return the peak memory in MiB beyond the imports, and the seconds of a tool."""
    imports, call = TOOLS[tool]
    output = scratch / ("out.pt" if tool.startswith(("average", "consolidate")) else "out")
    command = [
        sys.executable,
        "-c",
        SCRIPT.format(imports=imports, call=call),
        *map(str, (exp, lora, output, shard)),
    ]
    cache = scratch / "cache"
    shutil.rmtree(cache, ignore_errors=True)  # it has fingerprints
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{tool}: {done.stderr[-3000:]}")
    peak, seconds = map(float, done.stdout.split()[-2:])
    shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
    return peak, seconds


def main() -> None:
    """Run the benchmark, and print and write its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="use a tiny LLM, to test the script")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    measured: dict[str, list[tuple[float, float]]] = {tool: [] for tool in TOOLS}
    shard = 10**5 if arguments.tiny else 10**8
    with tempfile.TemporaryDirectory() as name:
        exp, lora = make_runs(Path(name), tiny=arguments.tiny)
        link_checkpoints(exp, 10)
        link_checkpoints(lora, 10)
        for _ in range(arguments.rounds):
            for tool, values in measured.items():
                values.append(measure(tool, exp, lora, shard, Path(name)))
        size = bytes_of(exp / f"checkpoint-{STEPS}", "*")
        verified = bytes_of(exp / f"checkpoint-{STEPS}", "*.pt")
        hashed = bytes_of(Path(name) / "llm", "*.safetensors")
    peaks = {
        tool: round(statistics.median(peak for peak, _ in values), 1)
        for tool, values in measured.items()
    }
    seconds = {
        tool: round(statistics.median(s for _, s in values), 2) for tool, values in measured.items()
    }
    results = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}",
        "rounds": arguments.rounds,
        "checkpoint bytes": size,
        "LLM shard MiB": round(shard / 2**20, 1),
        "peak MiB": peaks,
        "seconds": seconds,
        "seconds per GB": {
            "verify": round(seconds["verify"] / verified * 1e9, 3),
            "fingerprint": round(seconds["fingerprint"] / hashed * 1e9, 3),
        },
        "ratios": {
            "consolidate to deepspeed, peak": round(peaks["consolidate"] / peaks["deepspeed"], 3),
            "consolidate to deepspeed, seconds": round(
                seconds["consolidate"] / seconds["deepspeed"], 3
            ),
            "average 10 to average 2, peak": round(peaks["average 10"] / peaks["average 2"], 3),
            "average 10 to average 2 of adapters, peak": round(
                peaks["average 10, adapters"] / peaks["average 2, adapters"], 3
            ),
            "merge to shard, peak": round(peaks["merge"] / (shard / 2**20), 3),
        },
    }
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
