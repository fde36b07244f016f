"""Logs which utterances every step trains on."""

import json
from pathlib import Path

from asrllm import distributed
from asrllm.collator.loader import LoadedStep
from asrllm.training.callbacks.json_log import reopen_log
from asrllm.training.trainer import Callback, StepSums, Trainer


class Trace(Callback):
    """Writes exp_dir/keys-rank{r}.jsonl: keys and prompts of this rank's utterances by step."""

    def __init__(self, exp_dir: Path, step: int) -> None:
        """Open the file and remove records after the step from which the run resumes."""
        self.file = reopen_log(exp_dir / f"keys-rank{distributed.rank()}.jsonl", step)

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        """Write the utterances of a step."""
        keys: list[str] = []
        prompts: list[str] = []
        for batch in loaded.micro_batches:
            keys += batch.keys
            prompts += batch.prompts
        record = {"step": trainer.step, "keys": keys, "prompts": prompts}
        self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.file.flush()

    def at_end(self, trainer: Trainer) -> None:
        """Close the file."""
        self.file.close()
