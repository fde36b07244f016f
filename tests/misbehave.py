"""launch/train.py with a model that misbehaves.

    python tests/misbehave.py '{"what": ..., "steps": [...], "ranks": [...]}' OVERRIDES

Values of `what`:

    loss       the loss is not finite in these steps (from 1) of these ranks
    gradient   the gradient is not finite in these steps of these ranks
    mode       the projector is in eval mode after these steps of these ranks
    build      building the model waits for exp_dir/go
    trace      trainer.compile traces the layers, but does not compile them
    nodes      each rank considers itself the only one on its node
    float16    DeepSpeed assumes that the processor supports float16
"""

import json
import math
import os
import sys
from pathlib import Path

from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from asrllm.commands import train
from asrllm.commands.dispatch import main
from asrllm.models.asr_llm.modeling import AsrLlmModel
from tests.processes import wait_for


def misbehave(what: str, steps: list[int], ranks: list[int]) -> None:
    now = 0
    count = AsrLlmModel.set_batch_count
    forward = AsrLlmModel.forward

    def set_batch_count(self, step):
        nonlocal now
        now = step + 1
        if what == "mode" and now in steps and int(os.environ.get("RANK", "0")) in ranks:
            self.projector.eval()
        count(self, step)

    def bad_forward(self, **batch):
        output = forward(self, **batch)
        if (
            what != "mode"
            and self.training
            and now in steps
            and int(os.environ.get("RANK", "0")) in ranks
        ):
            if what == "loss":
                return output._replace(loss=output.loss + math.inf)
            output.loss.register_hook(lambda gradient: gradient * math.inf)
        return output

    AsrLlmModel.set_batch_count = set_batch_count
    AsrLlmModel.forward = bad_forward


def wait_before_building(exp: Path) -> None:
    make = train.build_model

    def build_model(*arguments, **options):
        (exp / f"building-{os.environ.get('RANK', '0')}").touch()
        wait_for((exp / "go").exists, 60)
        return make(*arguments, **options)

    train.build_model = build_model


def trace(folder: Path) -> None:
    """Replace torch.compile's backend by one without C++, and count graphs in folder/traced."""
    import torch
    from torch import nn

    compile_ = nn.Module.compile
    graphs = 0

    def backend(graph, inputs):
        nonlocal graphs
        graphs += 1
        (folder / "traced").write_text(str(graphs))
        return torch._dynamo.lookup_backend("eager")(graph, inputs)

    nn.Module.compile = lambda self, **options: compile_(self, backend=backend, **options)


if __name__ == "__main__":
    how = json.loads(sys.argv[1])
    if how["what"] == "trace":
        trace(Path(how["log"]))
    elif how["what"] == "float16":
        CPU_Accelerator.is_fp16_supported = lambda self: True
    elif how["what"] == "nodes":
        os.environ["TORCHELASTIC_RUN_ID"] = os.environ["RANK"]
    elif how["what"] == "build":
        wait_before_building(
            Path(next(a for a in sys.argv if a.startswith("exp_dir=")).partition("=")[2])
        )
    else:
        misbehave(**how)
    sys.exit(main(["train", *sys.argv[2:]]))
