"""Which utterances every step had."""

import json
from pathlib import Path

from asrllm import distributed
from asrllm.collator.loader import LoadedStep
from asrllm.training.callbacks.json_log import reopen_log
from asrllm.training.trainer import Callback, StepSums, Trainer


class Trace(Callback):
    """exp_dir/keys-rank{r}.jsonl: which utterances this rank trained on, step by step, and with which prompts."""

    def __init__(self, exp_dir: Path, step: int) -> None:
        self.file = reopen_log(exp_dir / f"keys-rank{distributed.rank()}.jsonl", step)

    def after_step(self, trainer: Trainer, loaded: LoadedStep, sums: StepSums) -> None:
        batches = loaded.micro_batches
        keys, prompts = (
            [value for batch in batches for value in getattr(batch, name)]
            for name in ("keys", "prompts")
        )
        self.file.write(
            json.dumps({"step": trainer.step, "keys": keys, "prompts": prompts}, ensure_ascii=False)
            + "\n"
        )
        self.file.flush()

    def at_end(self, trainer: Trainer) -> None:
        self.file.close()
