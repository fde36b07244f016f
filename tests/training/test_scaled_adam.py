"""ScaledAdam against its definition, and the same on all partitions."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from asrllm.training.checkpoint.manifest import read_manifest
from tests.training.small_engine import Small, engine_of, start, train_step

STEPS = 204


class Reference:
    """The definition (Yao et al. 2023 and icefall's code), one whole weight at a time, for one group."""

    def __init__(self, weights):
        self.weights = weights
        self.kept = [
            {"delta": 0 * w, "v": 0 * w, "rms": w.square().mean().sqrt(), "size_v": 0.0, "dots": []}
            for w in weights
        ]
        self.step_number, self.norms, self.threshold = 0, [], float("inf")

    def clipping(self, grads, lr_scale=0.1):
        norm = sum(
            float((g * (lr_scale if w.numel() == 1 else k["rms"])).square().sum())
            for w, g, k in zip(self.weights, grads, self.kept, strict=True)
        )
        if self.step_number == 0:
            self.norms.append(0.0)  # the first step leaves its place empty
            return 1.0
        self.norms.append(norm**0.5)
        early = self.step_number in (10, 20, 40)
        if early or self.step_number % 100 == 0:
            # early, the median of as many norms as steps; later of the last hundred
            last = sorted(self.norms[1:] if early else self.norms[-100:])
            self.threshold = 2.0 * last[len(last) // 4 * 2] * (2 if early else 1)
        return min(1.0, self.threshold / self.norms[-1])

    def step(self, grads, lr, beta1=0.9, beta2=0.98):
        clip, t = self.clipping(grads), self.step_number
        for w, k, g in zip(self.weights, self.kept, [g * clip for g in grads], strict=True):
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
                    dots, k["dots"], b = torch.tensor(k["dots"]), [], beta2**4
                    k["size_v"] = b * k["size_v"] + (1 - b) * dots.square().mean()
                    share = (
                        -lr
                        * 0.1
                        * (1 - b ** ((t + 1) // 4)) ** 0.5
                        * dots.sum()
                        / (k["size_v"].sqrt() + 1e-8)
                    )
                    share = share.clamp(-0.1, 0.1) if k["rms"] >= 1e-5 else 0 * share
                    update += w * torch.minimum(share, (3.0 - k["rms"]) / k["rms"])
            k["delta"] = beta1 * k["delta"] + (1 - beta1) * update
            w += k["delta"]
            if w.numel() == 1:
                w.clamp_(-10.0, 10.0)
        self.step_number += 1


@pytest.mark.slow
def test_it_is_the_definition():
    from asrllm.training.scaled_adam import ScaledAdam, bind

    model = Small()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = ScaledAdam(parameters, lr=0.03)
    bind(
        optimizer,
        SimpleNamespace(
            module=model,
            optimizer=optimizer,
            device=torch.device("cpu"),
            zero_optimization_stage=lambda: 0,
        ),
    )
    weights = [p.detach().clone() for p in parameters]
    reference, clipped = Reference(weights), 0
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
            expected.copy_(found.detach())  # lest rounding add up
    assert 3 <= clipped < STEPS / 4


def train_all(out: str, stages: list, precision: str, source: str = "", steps: int = 12) -> None:
    """In every process: losses, weights and a checkpoint at step 6, from the beginning or from that of `source`."""
    from asrllm import distributed
    from asrllm.training.checkpoint.partitions import load_from_other_ranks
    from asrllm.training.checkpoint.saver import load_checkpoint
    from asrllm.training.checkpoint.zero_files import ZeroFiles
    from tests.training.checkpoint.test_partitions import save

    none = SimpleNamespace(files=dict)
    for stage in stages:
        engine, folder, begin = (
            engine_of(stage, precision, scaled_adam=True),
            Path(out) / str(stage),
            0,
        )
        if source:
            checkpoint, begin = Path(source) / str(stage) / "checkpoint-6", 6
            manifest = read_manifest(checkpoint)
            load = (
                load_checkpoint
                if manifest["world_size"] == distributed.world_size()
                else load_from_other_ranks
            )
            load(engine, checkpoint, manifest)
        losses = []
        for step in range(begin, steps):
            losses.append(train_step(engine, step))
            if step + 1 in (6, steps):
                save(engine, none, folder, f"checkpoint-{step + 1}", losses)
        if distributed.rank() == 0:
            files = ZeroFiles(
                folder / f"checkpoint-{steps}", read_manifest(folder / f"checkpoint-{steps}")
            )
            torch.save({name: files.read(name) for name in files.places}, folder / "weights.pt")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt")


@pytest.mark.slow
def test_it_is_the_same_at_every_stage_and_after_a_resume(tmp_path):
    stages = [0, 1, 2, 3]
    start(
        "training.test_scaled_adam:train_all",
        2,
        out=str(tmp_path / "two"),
        stages=stages,
        precision="fp32",
    )
    start(
        "training.test_scaled_adam:train_all",
        2,
        out=str(tmp_path / "again"),
        stages=stages,
        precision="fp32",
        source=str(tmp_path / "two"),
    )
    start(
        "training.test_scaled_adam:train_all",
        1,
        out=str(tmp_path / "one"),
        stages=[1, 2, 3],
        precision="fp32",
        source=str(tmp_path / "two"),
    )
    expected = weights_of(tmp_path / "two" / "0")
    for stage in stages:
        for name, found in weights_of(tmp_path / "two" / str(stage)).items():
            torch.testing.assert_close(found, expected[name], atol=1e-6, rtol=0)
            assert torch.equal(weights_of(tmp_path / "again" / str(stage))[name], found), (
                stage,
                name,
            )
            if stage:
                torch.testing.assert_close(
                    weights_of(tmp_path / "one" / str(stage))[name], found, atol=1e-6, rtol=0
                )


@pytest.mark.slow
def test_it_trains_and_resumes_in_bfloat16(tmp_path):
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
