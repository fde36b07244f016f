"""A small model under DeepSpeed in several processes: `start` runs a function in each."""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from tests.processes import Process, started


class Small(nn.Module):
    """A model whose weights have odd sizes. One of them is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(7, 5)
        self.second = nn.Linear(5, 13)
        self.last = nn.Linear(13, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.config = SimpleNamespace(base_models={}, prompts=[])
        self.inherited = ()
        self.warm_start = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x.to(self.scale.dtype)))))
        return (self.frozen(self.last(x)) * self.scale).float().pow(2).mean()


def engine_of(stage: int, precision: str, *, width: int = 0, scaled_adam: bool = False):
    """Return an engine. A width adds square layers of that size, to make the model larger."""
    import deepspeed

    from asrllm import distributed
    from asrllm.training.scaled_adam import ScaledAdam, bind

    model = Small()
    if width:
        sizes = [5, width, width, width, width, width, 13]
        model.second = nn.Sequential(*map(nn.Linear, sizes[:-1], sizes[1:]))
    model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    names = dict(model.named_parameters())
    matrices = [p for p in names.values() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in names.values() if p.requires_grad and p.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = ScaledAdam(groups, lr=0.03) if scaled_adam else torch.optim.AdamW(groups, lr=0.01)
    ds = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": distributed.world_size(),
        "gradient_clipping": 1.0,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 20},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=[*matrices, *vectors], optimizer=optimizer, config=ds
    )
    if scaled_adam:
        bind(optimizer, engine)
    return engine


def train_step(engine, step: int, *, rows: int = 8) -> float:
    """Train on the same batch with any number of ranks, and return its loss."""
    from asrllm import distributed

    rank = distributed.rank()
    ranks = distributed.world_size()
    x = torch.randn(rows, 7, generator=torch.Generator().manual_seed(step))[rank::ranks]
    loss = engine(x)
    engine.backward(loss)
    engine.step()
    return float(distributed.sum_over_ranks(loss.detach().clone())) / ranks


def start(
    function: str, ranks: int, *, timeout: float = 120, check: bool = True, **arguments: object
) -> list[Process]:
    """Run a function in several processes and wait for them.

    Args:
        function: "module:name" of a function in tests.
        ranks: number of processes.
        timeout: longest time in seconds to wait for each process.
        check: fail if a process has an exit status other than 0.
        arguments: arguments of the function, which must be JSON values.
    """
    command = ["-m", "tests.training.small_engine", function, json.dumps(arguments)]
    with tempfile.TemporaryDirectory() as name:
        logs = Path(name)
        with started(logs, *[command] * ranks) as processes:
            for process in processes:
                process.wait(timeout)
        for rank, process in enumerate(processes):
            process.output = (logs / str(rank)).read_text()
    for process in processes if check else []:
        assert process.returncode == 0, process.output[-3000:]
    return processes


if __name__ == "__main__":
    import importlib
    import warnings

    warnings.simplefilter("ignore")
    from asrllm import distributed

    module, _, name = sys.argv[1].partition(":")
    distributed.start()
    getattr(importlib.import_module(f"tests.{module}"), name)(**json.loads(sys.argv[2]))
    distributed.finish()
