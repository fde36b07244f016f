"""ScaledAdam matches its definition, and gives the same result on all partitions."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from asrllm.training.checkpoint.manifest import read_manifest
from tests.training.small_engine import Small, engine_of, start, train_step

STEPS = 204


class Reference:
    """The definition (Yao et al. 2023 and icefall's code) for one group of whole weights."""

    def __init__(self, weights):
        self.weights = weights
        self.states = [
            {"delta": 0 * w, "v": 0 * w, "rms": w.square().mean().sqrt(), "size_v": 0.0, "dots": []}
            for w in weights
        ]
        self.step_number = 0
        self.norms = []
        self.threshold = float("inf")

    def clipping(self, grads, lr_scale=0.1):
        norm = 0
        for w, g, k in zip(self.weights, grads, self.states, strict=True):
            scale = lr_scale if w.numel() == 1 else k["rms"]
            norm += float((g * scale).square().sum())
        if self.step_number == 0:
            self.norms.append(0.0)  # the first step records no norm
            return 1.0
        self.norms.append(norm**0.5)
        early = self.step_number in (10, 20, 40)
        if early or self.step_number % 100 == 0:
            # at the start the median of all norms so far, later of the last hundred
            last = sorted(self.norms[1:] if early else self.norms[-100:])
            self.threshold = 2.0 * last[len(last) // 4 * 2] * (2 if early else 1)
        return min(1.0, self.threshold / self.norms[-1])

    def step(self, grads, lr, beta1=0.9, beta2=0.98):
        clip = self.clipping(grads)
        t = self.step_number
        for w, k, g in zip(self.weights, self.states, [g * clip for g in grads], strict=True):
            k["v"] = beta2 * k["v"] + (1 - beta2) * g**2
            correction = 1 - beta2 ** (t + 1)
            update = -lr * g / ((k["v"] / (correction if correction < 0.99 else 1)).sqrt() + 1e-8)
            if w.numel() == 1:
                update *= 0.1
            else:
                k["dots"].append(float((w * g).sum()))
                if t % 4 == 3:
                    k["rms"] = w.square().mean().sqrt()
                update *= k["rms"].clamp(min=1e-5)
                if t % 4 == 3:
                    update += w * self.scale_step(k, t, lr, beta2)
            k["delta"] = beta1 * k["delta"] + (1 - beta1) * update
            w += k["delta"]
            if w.numel() == 1:
                w.clamp_(-10.0, 10.0)
        self.step_number += 1

    def scale_step(self, k, t, lr, beta2):
        dots = torch.tensor(k["dots"])
        k["dots"] = []
        b = beta2**4
        k["size_v"] = b * k["size_v"] + (1 - b) * dots.square().mean()
        correction = (1 - b ** ((t + 1) // 4)) ** 0.5
        change = -lr * 0.1 * correction * dots.sum() / (k["size_v"].sqrt() + 1e-8)
        change = change.clamp(-0.1, 0.1) if k["rms"] >= 1e-5 else 0 * change
        return torch.minimum(change, (3.0 - k["rms"]) / k["rms"])


@pytest.mark.slow
def test_step_matches_the_definition():
    from asrllm.training.scaled_adam import ScaledAdam, bind

    model = Small()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = ScaledAdam(parameters, lr=0.03)
    engine = SimpleNamespace(
        module=model,
        optimizer=optimizer,
        device=torch.device("cpu"),
        zero_optimization_stage=lambda: 0,
    )
    bind(optimizer, engine)
    weights = [p.detach().clone() for p in parameters]
    reference = Reference(weights)
    clipped = 0
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 / (1 + step / 50)
        optimizer.zero_grad()
        x = torch.randn(8, 7, generator=torch.Generator().manual_seed(step))
        (model(x) * (50.0 if step % 17 == 16 else 1.0)).backward()
        reference.step([p.grad.clone() for p in parameters], 0.03 / (1 + step / 50))
        clipped += reference.norms[-1] > reference.threshold
        optimizer.step()
        for found, expected in zip(parameters, weights, strict=True):
            torch.testing.assert_close(found.detach(), expected, atol=1e-6, rtol=1e-4)
            expected.copy_(found.detach())  # so that rounding does not accumulate
    assert 3 <= clipped < STEPS / 4


def train_all(out: str, stages: list, precision: str, source: str = "", steps: int = 12) -> None:
    """Train and save checkpoints at step 6 and at the end. This runs in every process.

    Args:
        out: directory for the checkpoints and final weights of each stage.
        stages: ZeRO stages.
        precision: "fp32" or "bf16".
        source: `out` of a run whose checkpoints at step 6 are resumed, or "" to start at step 0.
        steps: number of steps.
    """
    from asrllm import distributed
    from asrllm.training.checkpoint.partitions import load_from_other_ranks
    from asrllm.training.checkpoint.saver import load_checkpoint
    from asrllm.training.checkpoint.zero_files import ZeroFiles
    from tests.training.checkpoint.test_partitions import save

    none = SimpleNamespace(files=dict)
    for stage in stages:
        engine = engine_of(stage, precision, scaled_adam=True)
        folder = Path(out) / str(stage)
        begin = 0
        if source:
            begin = 6
            checkpoint = Path(source) / str(stage) / "checkpoint-6"
            manifest = read_manifest(checkpoint)
            if manifest["world_size"] == distributed.world_size():
                load_checkpoint(engine, checkpoint, manifest)
            else:
                load_from_other_ranks(engine, checkpoint, manifest)
        losses = []
        for step in range(begin, steps):
            losses.append(train_step(engine, step))
            if step + 1 in (6, steps):
                save(engine, none, folder, f"checkpoint-{step + 1}", losses)
        if distributed.rank() == 0:
            checkpoint = folder / f"checkpoint-{steps}"
            files = ZeroFiles(checkpoint, read_manifest(checkpoint))
            torch.save({name: files.read(name) for name in files.locations}, folder / "weights.pt")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt")


@pytest.mark.slow
def test_result_is_the_same_at_every_stage_and_after_a_resume(tmp_path):
    stages = [0, 1, 2, 3]
    two = tmp_path / "two"
    again = tmp_path / "again"
    one = tmp_path / "one"
    train = "training.test_scaled_adam:train_all"
    start(train, 2, out=str(two), stages=stages, precision="fp32")
    start(train, 2, out=str(again), stages=stages, precision="fp32", source=str(two))
    start(train, 1, out=str(one), stages=[1, 2, 3], precision="fp32", source=str(two))
    expected = weights_of(two / "0")
    for stage in stages:
        resumed = weights_of(again / str(stage))
        for name, found in weights_of(two / str(stage)).items():
            torch.testing.assert_close(found, expected[name], atol=1e-6, rtol=0)
            assert torch.equal(resumed[name], found), (stage, name)
            if stage:
                on_one_rank = weights_of(one / str(stage))[name]
                torch.testing.assert_close(on_one_rank, found, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_training_in_bfloat16_resumes_bitwise(tmp_path):
    for out, source in (("first", ""), ("again", str(tmp_path / "first"))):
        start(
            "training.test_scaled_adam:train_all",
            2,
            out=str(tmp_path / out),
            stages=[0, 1, 2, 3],
            precision="bf16",
            source=source,
        )
    for stage in range(4):
        first = weights_of(tmp_path / "first" / str(stage))
        for name, found in weights_of(tmp_path / "again" / str(stage)).items():
            assert torch.equal(found, first[name]), (stage, name)
