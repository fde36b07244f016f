#!/usr/bin/env python3
"""Insert small faults into the core, and check that the tests detect each of them.

    python tests/mutations.py [--only AREA ...] [--repository DIR] [--jobs N] [--output FILE]

Each fault replaces one piece of one file in a copy of the repository. The tests of its area run in
the copy until the first failure, first the fast ones, then the slow ones. `--repository` uses
another checkout. If no test detects a fault, write one.
"""

import argparse
import concurrent.futures
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
LIMIT = 1800  # seconds for the tests of one area; a fault that makes them hang counts as caught
IGNORED = shutil.ignore_patterns(
    ".git", ".venv*", "__pycache__", ".*_cache", "quickstart", "exp", ".hypothesis", "*.egg-info"
)


class Fault(NamedTuple):
    """A fault.

    Attributes:
        area: key of TESTS.
        name: what the fault does.
        file: path in the repository.
        right: code that is in the file exactly once.
        wrong: its replacement.
    """

    area: str
    name: str
    file: str
    right: str
    wrong: str


TESTS = {
    "plan": ["tests/data/test_plan.py", "tests/test_data_end_to_end.py"],
    "packing": [
        "tests/collator",
        "tests/models/test_attention.py",
        "tests/models/asr_llm/test_modeling.py",
    ],
    "labels": ["tests/collator/test_chat.py", "tests/collator/test_loader.py"],
    "loss": [
        "tests/models/test_loss.py",
        "tests/training/test_trainer.py",
        "tests/training/callbacks/test_nonfinite.py",
        "tests/test_end_to_end.py",
    ],
    "zero": [
        "tests/checkpoints/test_consolidate.py",
        "tests/training/checkpoint/test_partitions.py",
    ],
    "average": [
        "tests/checkpoints/test_average.py",
        "tests/training/checkpoint/test_partitions.py",
        "tests/test_end_to_end.py",
    ],
    "resume": [
        "tests/collator/test_loader.py",
        "tests/data/test_plan.py",
        "tests/test_end_to_end.py",
    ],
    "score": ["tests/evaluation/test_score.py", "tests/evaluation/test_compare.py"],
    "normalize": ["tests/data/test_text.py", "tests/evaluation/test_score.py"],
    "cache": ["tests/data/test_storage.py"],
    "index": [
        "tests/audio/test_reader.py",
        "tests/data/test_index.py",
        "tests/data/test_shards.py",
        "tests/data/test_verify.py",
    ],
    "prompts": ["tests/data/test_prompts.py"],
    "augment": ["tests/audio/test_augment.py"],
    "segments": ["tests/audio/test_segments.py"],
    "export": ["tests/checkpoints/test_export.py"],
    "warm start": ["tests/models/test_projector_fit.py", "tests/test_warm_start_end_to_end.py"],
}

PLAN, BATCHING = "asrllm/data/plan.py", "asrllm/data/batching.py"
CORPORA, CORPUS_STREAM = "asrllm/data/corpora.py", "asrllm/data/corpus_stream.py"
AUGMENT, SEGMENTS = "asrllm/audio/augment.py", "asrllm/audio/segments.py"
BATCH, CHAT = "asrllm/collator/batch.py", "asrllm/collator/chat.py"
LOSS, TRAINER = "asrllm/models/loss.py", "asrllm/training/trainer.py"
ZERO, PARTITIONS = (
    "asrllm/training/checkpoint/zero_files.py",
    "asrllm/training/checkpoint/partitions.py",
)
AVERAGE, RUNNING = "asrllm/checkpoints/average.py", "asrllm/training/running_average.py"
SCORE, TEXT = "asrllm/evaluation/score.py", "asrllm/data/text.py"
CACHE, INDEX, READER = "asrllm/data/cache.py", "asrllm/data/index.py", "asrllm/audio/reader.py"
TARS = "asrllm/data/tars.py"
WARM_START, SPEECH = "asrllm/models/projector_fit.py", "asrllm/training/warm_start.py"

FAULTS = [
    Fault(
        "plan",
        "a window loses its last utterance",
        PLAN,
        "epoch * total + (window + 1) * total // windows",
        "epoch * total + (window + 1) * total // windows - 1",
    ),
    Fault(
        "plan",
        "a rank loses its last micro-batch",
        PLAN,
        "range(rank, len(self.batches), self.ranks)",
        "range(rank, len(self.batches) - self.ranks + 1, self.ranks)",
    ),
    Fault(
        "plan",
        "batches are not sorted by length",
        PLAN,
        'entries[np.argsort(-lengths, kind="stable")]',
        "entries",
    ),
    Fault(
        "plan",
        "every epoch has the same batches",
        PLAN,
        "np.random.default_rng([self.seed, epoch, window])",
        "np.random.default_rng([self.seed, window])",
    ),
    Fault(
        "plan",
        "every pass has the same order of shards",
        CORPUS_STREAM,
        "rng = np.random.default_rng([*self.seed, pass_index])",
        "rng = np.random.default_rng(self.seed)",
    ),
    Fault(
        "plan",
        "batches exceed their budget",
        BATCHING,
        "(self.limit - slack) * ranks",
        "self.limit * ranks",
    ),
    Fault(
        "plan",
        "fillers are trained on",
        PLAN,
        "_item(entry, is_filler=True)",
        "_item(entry, is_filler=False)",
    ),
    Fault(
        "plan",
        "utterances without text pass the filters",
        CORPORA,
        '"empty_text": characters == 0',
        '"empty_text": characters < 0',
    ),
    Fault(
        "packing",
        "position ids continue across utterances",
        BATCH,
        "torch.cat([torch.arange(n) for n in lengths.tolist()])[None]",
        "torch.arange(int(lengths.sum()))[None]",
    ),
    Fault(
        "packing",
        "the last utterance is joined to the one before",
        BATCH,
        "torch.nn.functional.pad(lengths.cumsum(0), (1, 0))",
        "torch.nn.functional.pad(torch.cat([lengths.cumsum(0)[:-2], lengths.sum()[None]]), (1, 0))",
    ),
    Fault(
        "packing",
        "padding keeps the earlier batch's samples",
        BATCH,
        "row[len(wave) :] = 0",
        "pass",
    ),
    Fault(
        "packing",
        "padding on the left is attended to",
        BATCH,
        "mask.append(padding + [1] * len(row))",
        "mask.append([1] * longest)",
    ),
    Fault(
        "packing",
        "packed attention sees the future",
        "asrllm/models/attention.py",
        "is_causal=options.causal and window is None",
        "is_causal=False",
    ),
    Fault(
        "labels",
        "labels are not shifted",
        BATCH,
        "torch.tensor([*labels[1:], IGNORE_INDEX])",
        "torch.tensor(labels)",
    ),
    Fault(
        "labels",
        "the prompt's last token is supervised",
        CHAT,
        "[IGNORE_INDEX] * len(prompt) + target",
        "[IGNORE_INDEX] * (len(prompt) - 1) + prompt[-1:] + target",
    ),
    Fault(
        "labels",
        "the end of the turn is not supervised",
        CHAT,
        "[IGNORE_INDEX] * len(prompt) + target",
        "[IGNORE_INDEX] * len(prompt) + target[:-1] + [IGNORE_INDEX]",
    ),
    Fault(
        "labels",
        "special tokens in a transcript are real ones",
        CHAT,
        "target = self._ids(answer, plain=True)",
        "target = self._ids(answer)",
    ),
    Fault(
        "loss",
        "accumulated micro-batches weigh too little",
        TRAINER,
        "distributed.world_size() * len(micro_batches) / total_targets",
        "distributed.world_size() / total_targets",
    ),
    Fault(
        "loss",
        "ranks weigh too little",
        TRAINER,
        "distributed.world_size() * len(micro_batches) / total_targets",
        "len(micro_batches) / total_targets",
    ),
    Fault(
        "loss",
        "each rank divides by its own tokens",
        TRAINER,
        "len(micro_batches) / total_targets.clamp(min=1)",
        "len(micro_batches) / max(targets, 1) / distributed.world_size()",
    ),
    Fault(
        "loss",
        "label smoothing misses a part of its gradient",
        LOSS,
        "grad -= smoothing / logits.shape[1]",
        "pass",
    ),
    Fault(
        "loss", "the last chunk's loss alone is counted", LOSS, "loss = loss + part", "loss = part"
    ),
    Fault(
        "loss",
        "dropout is the same in every step",
        TRAINER,
        'f"{seed}/{step}/{rank}"',
        'f"{seed}/{rank}"',
    ),
    Fault(
        "loss",
        "dropout is the same on every rank",
        TRAINER,
        'f"{seed}/{step}/{rank}"',
        'f"{seed}/{step}"',
    ),
    Fault(
        "zero",
        "parts of stage 3 are rounded down",
        ZERO,
        "-(-numel // ranks) if stage == 3",
        "numel // ranks if stage == 3",
    ),
    Fault(
        "zero",
        "a stretch ends with its rank's part",
        ZERO,
        "min(start + numel - rank * part, part)",
        "part",
    ),
    Fault(
        "zero",
        "a sub-group begins one weight late",
        ZERO,
        "offset >= vectors[group]",
        "offset > vectors[group]",
    ),
    Fault(
        "zero",
        "moments with padding are not recognised",
        ZERO,
        'size += self.optimizers[0]["group_paddings"][0]',
        "pass",
    ),
    Fault(
        "zero",
        "another world size fills sub-groups without padding",
        PARTITIONS,
        "offset += part",
        "offset += numel",
    ),
    Fault(
        "average",
        "rsLoRA adapters use plain LoRA scaling",
        AVERAGE,
        "scale = count**-0.5",
        "scale = 1.0",
    ),
    Fault(
        "average",
        "the mean between two checkpoints is weighted wrongly",
        AVERAGE,
        "(first / (last - first))",
        "(first / last)",
    ),
    Fault(
        "average",
        "the running average forgets too slowly",
        RUNNING,
        "alpha=self.period / step",
        "alpha=1 / step",
    ),
    Fault(
        "average",
        "a sum is not divided",
        AVERAGE,
        "(total.div_(count) for total",
        "(total for total",
    ),
    Fault(
        "resume",
        "the running average is not restored",
        "asrllm/training/checkpoint/resume.py",
        "average.load(checkpoint, manifest)",
        "pass",
    ),
    Fault(
        "resume",
        "a resumed run restarts the data",
        "asrllm/commands/train.py",
        'Position(**manifest["position"])',
        "Position()",
    ),
    Fault(
        "resume",
        "a window is re-batched for another world size",
        PLAN,
        "ranks=start.ranks or ranks",
        "ranks=ranks",
    ),
    Fault(
        "resume",
        "a step is trained on twice",
        "asrllm/collator/loader.py",
        "next_position=step.next_position",
        "next_position=position",
    ),
    Fault("score", "intervals are of 90 %", SCORE, "[2.5, 97.5]", "[5, 95]"),
    Fault(
        "score", "spaces count as characters", SCORE, 'list(text.replace(" ", ""))', "list(text)"
    ),
    Fault(
        "score",
        "insertions are counted as reference units",
        SCORE,
        "max(float(self.units.sum()), 1.0)",
        "max(float((self.units + self.ins).sum()), 1.0)",
    ),
    Fault(
        "score",
        "speakers are not drawn as a whole",
        SCORE,
        "np.bincount(groups, weights=counts)",
        "counts",
    ),
    Fault(
        "normalize",
        "compatibility forms differ",
        TEXT,
        'unicodedata.normalize("NFKC", text).lower()',
        'unicodedata.normalize("NFC", text).lower()',
    ),
    Fault("normalize", "apostrophes are removed", TEXT, '"PS" and character != "\'"', '"PS"'),
    Fault(
        "normalize",
        "Cantonese has the basic normalizer",
        TEXT,
        '"zh": "zh", "yue": "zh"}',
        '"zh": "zh"}',
    ),
    Fault("cache", "a file with other bytes is kept", CACHE, "found != expected.lower()", "False"),
    Fault(
        "cache",
        "the cache evicts the newest files",
        CACHE,
        "key=lambda file: file[0].st_mtime_ns",
        "key=lambda file: -file[0].st_mtime_ns",
    ),
    Fault(
        "cache",
        "cache hits do not update the access time",
        CACHE,
        "                os.utime(path)\n",
        "",
    ),
    Fault(
        "index",
        "keys end at the last dot",
        TARS,
        'base.partition(".")[0]',
        'base.rpartition(".")[0]',
    ),
    Fault(
        "index",
        "damaged bytes of a sample are read",
        READER,
        'zlib.crc32(data) != row["crc32"]',
        "False",
    ),
    Fault(
        "index",
        "a damaged header is taken for the end",
        TARS,
        "if any(block):",
        "if False:",
    ),
    Fault(
        "index",
        "ten seconds of difference are allowed",
        INDEX,
        "MAX_DURATION_ERROR = 0.1",
        "MAX_DURATION_ERROR = 10.0",
    ),
    Fault(
        "prompts",
        "prompts are drawn without their weights",
        "asrllm/data/prompts.py",
        "rng.choices(fitting, weights)",
        "rng.choices(fitting)",
    ),
    Fault(
        "augment",
        "noise begins at the start of its clip",
        AUGMENT,
        "start = draws.random()",
        "start = 0.0",
    ),
    Fault(
        "augment",
        "masks do not reach the end",
        AUGMENT,
        "begin = draws.random(len(widest)) * (1 - width)",
        "begin = draws.random(len(widest)) * width",
    ),
    Fault(
        "segments",
        "segments overlap",
        SEGMENTS,
        "max(begin - self.prefix, self.previous_end)",
        "begin - self.prefix",
    ),
    Fault(
        "export",
        "exported parts lack their adapters",
        "asrllm/checkpoints/export.py",
        "{name: adapted[key] for key, name in names.items() if key in adapted}",
        "{}",
    ),
    Fault(
        "warm start",
        "an alignment may skip a token",
        WARM_START,
        "before = torch.cat([never, scores[:, :-1]], 1)",
        "before = torch.cat([never, never, scores[:, :-2]], 1)",
    ),
    Fault(
        "warm start",
        "held-out utterances enter the regression",
        WARM_START,
        "if not batch.held_out]",
        "]",
    ),
    Fault(
        "warm start",
        "the regression is not penalized",
        WARM_START,
        "products.diagonal().add_(RIDGE)",
        "products.diagonal().add_(1e-6)",
    ),
    Fault(
        "warm start",
        "both hidden units of a pair have the same sign",
        WARM_START,
        "torch.cat([weight, -weight])",
        "torch.cat([weight, weight])",
    ),
    Fault(
        "warm start",
        "each rank has its own table of tokens",
        SPEECH,
        "set().union(*distributed.gather_objects(own))",
        "own",
    ),
    Fault(
        "warm start",
        "every rank reads all utterances",
        SPEECH,
        "for number in range(first, last):",
        "for number in range(len(items)):",
    ),
]


def with_fault(fault: Fault, repository: Path) -> str:
    """Return the content of the fault's file with the fault, for any wrapping of its lines.

    Raises:
        SystemExit: the file does not contain `fault.right` exactly once.
    """
    text = (repository / fault.file).read_text()
    words = re.findall(r"\w+|\s+|[^\w\s]", fault.right)
    pattern = r"\s*".join(re.escape(word) for word in words if not word.isspace())
    pattern = re.sub(r"(\\s\*)(\\[)\]}])", r"\1,?\1\2", pattern)  # a wrapped call ends in a comma
    if (found := len(re.findall(pattern, text))) != 1:
        raise SystemExit(
            f"{fault.name}: {fault.file} has {fault.right!r} {found} times instead of once"
        )
    return re.sub(pattern, lambda _: fault.wrong, text)


def first_failure(repository: Path, tests: list[str], fault: Fault | None) -> str | None:
    """Return the first of these tests that fails in a copy of the repository with the fault.

    Returns:
        The test; None if all pass.
    """
    with tempfile.TemporaryDirectory(prefix="asrllm-fault-") as name:
        folder = Path(name)
        shutil.copytree(repository, folder, ignore=IGNORED, dirs_exist_ok=True)
        if fault is not None:
            (folder / fault.file).write_text(with_fault(fault, repository))
        environment = os.environ | {"PYTHONPATH": name, "PYTHONDONTWRITEBYTECODE": "1"}
        for which in ("not slow", "slow"):
            # in one process and in the order of the files, without the options of pyproject.toml
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-x",
                "-q",
                "-m",
                which,
                "-p",
                "no:randomly",
                "-o",
                "addopts=",
            ]
            if "--longest" in (folder / "tests" / "conftest.py").read_text():
                command += [
                    "--longest",
                    "10000",
                ]  # on a slow machine, time-outs must not count as caught
            try:
                done = subprocess.run(
                    [*command, *tests],
                    cwd=folder,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=LIMIT,
                )
            except subprocess.TimeoutExpired:
                return f"no end after {LIMIT} s"
            failed = [
                line.split(" ")[1]
                for line in done.stdout.splitlines()
                if line.startswith(("FAILED ", "ERROR "))
            ]
            if done.returncode in (1, 2) and failed:  # 2: a file of tests cannot be imported
                return failed[0]
            if done.returncode not in (0, 5):  # 5: no test of this kind
                output = done.stdout[-1000:] + done.stderr[-1000:]
                raise SystemExit(f"pytest exited with status {done.returncode}:\n{output}")
    return None


def main() -> int:
    """Try the chosen faults, and return 1 if one is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=sorted(TESTS),
        default=sorted(TESTS),
        metavar="AREA",
        help=", ".join(sorted(TESTS)),
    )
    parser.add_argument(
        "--repository",
        type=Path,
        default=REPOSITORY,
        metavar="DIR",
        help="default: that of this script",
    )
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="faults at a time; default: %(default)s"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table as JSON")
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if fault.area in arguments.only]
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        sound = pool.map(
            lambda area: first_failure(arguments.repository, TESTS[area], None), arguments.only
        )
        for area, test in zip(arguments.only, sound, strict=True):
            if test is not None:  # otherwise every fault of the area would count as caught
                raise SystemExit(f"{area}: {test} fails without a fault")
        found = pool.map(
            lambda fault: first_failure(arguments.repository, TESTS[fault.area], fault), chosen
        )
        table = []
        for fault, test in zip(chosen, found, strict=True):
            print(
                f"{'caught' if test else 'MISSED'}  {fault.area:10} {fault.name:60} {test or ''}",
                flush=True,
            )
            table.append({"area": fault.area, "fault": fault.name, "caught by": test})
    missed = sum(row["caught by"] is None for row in table)
    print(f"{len(table) - missed} of {len(table)} caught in {time.monotonic() - began:.0f} s")
    if arguments.output:
        result = {
            "date": f"{datetime.date.today()}",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "faults": table,
        }
        arguments.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
