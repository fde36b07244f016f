"""Speed of a training step on packed rows relative to padded batches in plain transformers code.

    python benchmarks/train_step.py [--rounds R] [--utterances N] [--output FILE]

Both have the same weights and data. On a CPU: Whisper-tiny's encoder and SmolLM2-135M's shape,
projector and LoRA (r=16 on q and v), 8 utterances of 3 to 15 s. On a CUDA GPU: Whisper-large-v3's
encoder and Qwen2.5-7B's shape, LoRA r=64 on all linear layers, bf16; every attention backend, with
and without gradient checkpointing. Weights are random and the audio is noise, which does not
change the time. The baseline does what such systems do today: it pads the audio to 30 s and the
batch of the LLM, and computes logits at all positions. Its features are computed in advance; ours
computes them in the step.

A step is forward, backward and AdamW. asrllm/models/flops.py counts its operations; only tokens
that are not padding count. MFU is their rate relative to that of a large matrix product in the
same run."""

import argparse
import functools
import gc
import importlib.metadata
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder as TheirEncoder

from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.flops import count_flops
from asrllm.models.loss import HeadOptions, SupervisedLoss
from asrllm.models.pretrained import with_lora

RATE, HOP = 16000, 160
WHISPER = {"model_type": "whisper", "num_mel_bins": 80, "max_source_positions": 1500}
TINY = WHISPER | {
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
}
LARGE = WHISPER | {
    "num_mel_bins": 128,
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
}
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and a batch."""

    encoder: dict[str, Any]
    llm: dict[str, Any]
    lora: dict[str, Any]
    utterances: int
    projector_rate: int = 5
    projector_hidden: int = 1024
    loss_vocabulary: int = 151936

    @property
    def audio_token(self) -> int:
        """Id of the audio token, as if it had been added to the tokenizer."""
        return self.llm["vocab_size"] + 1


CPU_LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
CPU = Shape(TINY, SMOLLM2, CPU_LORA, utterances=8)
FEW = Shape(
    TINY
    | {"d_model": 16, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "encoder_layers": 1},
    SMOLLM2
    | {"hidden_size": 36, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 99},
    CPU_LORA,
    utterances=2,
    loss_vocabulary=1000,
)  # to test the script
GPU = Shape(
    LARGE,
    QWEN,
    {"r": 64, "lora_alpha": 128, "target_modules": ALL_LINEAR},
    utterances=64,
    projector_hidden=2048,
)


# --- data ---


@dataclass(frozen=True)
class Utterance:
    """An utterance with its chat.

    Attributes:
        wave: (samples,).
        before: token ids before the audio.
        after: token ids between the audio and the answer.
        answer: token ids of the answer, with its end.
    """

    wave: Tensor
    before: Tensor
    after: Tensor
    answer: Tensor

    def frames(self, *, padded: bool) -> int:
        """Return the encoder's output length."""
        return 1500 if padded else (len(self.wave) // HOP + 1) // 2


def make_utterances(shape: Shape, seed: int = 0) -> list[Utterance]:
    """Return utterances of 3 to 15 s.

    An answer has 3.5 tokens per second, and prompt and chat template have 24 tokens.
    """
    rng, torch_rng = np.random.default_rng(seed), torch.Generator().manual_seed(seed)

    def tokens(count: int) -> Tensor:
        return torch.randint(0, shape.llm["vocab_size"], (count,), generator=torch_rng)

    seconds = np.linspace(3, 15, shape.utterances)
    return [
        Utterance(
            0.1 * torch.randn(round(s * RATE), generator=torch_rng),
            tokens(8),
            tokens(16),
            tokens(round(3.5 * s)),
        )
        for s in rng.permutation(seconds)
    ]


def row_of(utterance: Utterance, audio_tokens: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """Return the ids and labels of one chat."""
    audio = torch.full((audio_tokens,), shape.audio_token)
    prompt = torch.cat([utterance.before, audio, utterance.after])
    return torch.cat([prompt, utterance.answer]), torch.cat(
        [torch.full_like(prompt, -100), utterance.answer]
    )


# --- ours and the baseline, with the same weights ---


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> AsrLlmModel:
    """Return our model with random weights."""
    torch.manual_seed(0)
    config = AsrLlmConfig(
        audio_encoder=shape.encoder,
        llm=shape.llm,
        lora=shape.lora,
        projector_hidden_size=shape.projector_hidden,
        audio_encoder_projector_ds_rate=shape.projector_rate,
        audio_token_id=shape.audio_token,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = AsrLlmModel(config)
    finally:
        torch.set_default_dtype(before)
    model.freeze("audio_encoder", "llm")
    return model.to(device, dtype).train()


def packed_inputs(utterances: Sequence[Utterance], shape: Shape) -> dict[str, Any]:
    """Return the inputs of our model: one packed row."""
    rows = [
        row_of(u, -(-u.frames(padded=False) // shape.projector_rate), shape) for u in utterances
    ]
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    labels = torch.cat([torch.cat([labels[1:], torch.tensor([-100])]) for _, labels in rows])
    positions = torch.nonzero(labels != -100).flatten()
    return {
        "waves": nn.utils.rnn.pad_sequence([u.wave for u in utterances], batch_first=True),
        "wave_lengths": torch.tensor([len(u.wave) for u in utterances]),
        "input_ids": torch.cat([ids for ids, _ in rows])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
        "cu_seqlens": nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        "target_positions": positions,
        "targets": labels[positions],
    }


class Baseline(nn.Module):
    """A speech LLM in plain transformers code, with right padding.

    Args:
        ours: the model to copy the weights from.
        shape: its sizes.
        pad_to_30s: pad the audio to 30 s. The LLM reads the frames of this silence too.
    """

    def __init__(self, ours: AsrLlmModel, shape: Shape, *, pad_to_30s: bool) -> None:
        super().__init__()
        device, dtype = next(ours.parameters()).device, next(ours.parameters()).dtype
        fields = {k: v for k, v in shape.encoder.items() if k != "model_type"}
        self.encoder = (
            TheirEncoder(WhisperConfig(**fields)).to(device, dtype).eval().requires_grad_(False)
        )
        self.encoder.load_state_dict(ours.audio_encoder.state_dict())
        plain = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**shape.llm), attn_implementation="sdpa", dtype=dtype
        ).to(device)
        self.llm = with_lora(plain, shape.lora).to(dtype)
        self.llm.load_state_dict(ours.llm.state_dict())
        self.linear1, self.linear2 = ours.projector.mlp.linear1, ours.projector.mlp.linear2
        self.shape, self.pad_to_30s = shape, pad_to_30s

    def inputs(self, ours: AsrLlmModel, utterances: Sequence[Utterance]) -> dict[str, Tensor]:
        """Return features (N, mel, T), and ids, labels and mask (N, L)."""
        device = next(self.parameters()).device
        waves = nn.utils.rnn.pad_sequence([u.wave for u in utterances], batch_first=True).to(device)
        features, _ = ours.audio_encoder.features(
            waves, torch.full((len(waves),), waves.shape[1], device=device)
        )
        if self.pad_to_30s:
            features = nn.functional.pad(features, (0, 0, 0, 3000 - features.shape[1]))
        tokens = -(-((features.shape[1] + 1) // 2) // self.shape.projector_rate)
        rows = [row_of(u, tokens, self.shape) for u in utterances]
        ids = nn.utils.rnn.pad_sequence([ids for ids, _ in rows], batch_first=True)
        labels = nn.utils.rnn.pad_sequence(
            [labels for _, labels in rows], batch_first=True, padding_value=-100
        )
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {
            k: v.to(device)
            for k, v in {
                "features": features.transpose(1, 2),
                "ids": ids,
                "labels": labels,
                "mask": mask,
            }.items()
        }

    def forward(self, features: Tensor, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            frames = self.encode(features.to(self.linear1.weight.dtype))
        rate = self.shape.projector_rate
        frames = nn.functional.pad(frames, (0, 0, 0, -frames.shape[1] % rate))
        stacked = frames.reshape(len(frames), frames.shape[1] // rate, -1)
        audio = self.linear2(torch.relu(self.linear1(stacked)))
        is_audio = ids == self.shape.audio_token
        embeddings = self.llm.get_input_embeddings()(ids.masked_fill(is_audio, 0))
        embeddings = embeddings.masked_scatter(is_audio[..., None], audio.to(embeddings.dtype))
        return self.llm(
            inputs_embeds=embeddings, attention_mask=mask, labels=labels, use_cache=False
        ).loss

    def encode(self, features: Tensor) -> Tensor:
        """Run the encoder of transformers, which supports only 30 s; else run it layer by layer."""
        if self.pad_to_30s:
            return self.encoder(features).last_hidden_state
        x = nn.functional.gelu(
            self.encoder.conv2(nn.functional.gelu(self.encoder.conv1(features)))
        ).transpose(1, 2)
        x = x + self.encoder.embed_positions.weight[: x.shape[1]]
        for layer in self.encoder.layers:
            x = layer(x, None)
        return self.encoder.layer_norm(x)


# --- steps ---

Step = Callable[[], float]


def make_step(loss: Callable[[], Tensor], model: nn.Module) -> Step:
    """Return a function that runs forward, backward and AdamW, and returns the loss."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)

    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def packed_step(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "auto",
    recompute: bool = False,
) -> Step:
    model = build(shape, device, dtype)
    model.causal_lm.config.asrllm_attention = attention
    if recompute:
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})
        model.llm.enable_input_require_grads()
    inputs = {k: v.to(device) for k, v in packed_inputs(make_utterances(shape), shape).items()}
    count = len(inputs["targets"])
    return make_step(lambda: model(**inputs).loss / count, model)


def padded_step(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    pad_to_30s: bool,
    recompute: bool = False,
) -> Step:
    ours = build(shape, device, dtype)
    model = Baseline(ours, shape, pad_to_30s=pad_to_30s).train()
    model.encoder.eval()
    if recompute:
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})
        model.llm.enable_input_require_grads()
    inputs = model.inputs(ours, make_utterances(shape))
    return make_step(lambda: model(**inputs), model)


def variants(shape: Shape, device: torch.device) -> dict[str, Callable[[], Step]]:
    """Return the variants to compare by name. Each builds its model when it is called."""
    single, half = torch.float32, torch.bfloat16
    if device.type == "cpu":
        return {
            "padded to 30 s, float32": lambda: padded_step(shape, device, single, True),
            "padded to the longest, float32": lambda: padded_step(shape, device, single, False),
            "packed, float32": lambda: packed_step(shape, device, single),
            "packed, bf16": lambda: packed_step(shape, device, half),
        }
    from asrllm.models.attention import backends

    made: dict[str, Callable[[], Step]] = {}
    for recompute in (True, False):
        how = ", recomputing" if recompute else ""
        made[f"padded to 30 s, bf16{how}"] = lambda recompute=recompute: padded_step(
            shape, device, half, True, recompute
        )
        made[f"padded to the longest, bf16{how}"] = lambda recompute=recompute: padded_step(
            shape, device, half, False, recompute
        )
        for name in [name for name, reason in backends().items() if not reason]:
            made[f"packed, bf16, {name}{how}"] = lambda name=name, recompute=recompute: packed_step(
                shape, device, half, name, recompute
            )
    return made


# --- measuring ---


def synchronised(device: torch.device) -> float:
    """Return the time after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_steps(
    made: dict[str, Callable[[], Step]], device: torch.device, rounds: int
) -> dict[str, dict[str, Any]]:
    """Return the median seconds of a step of each variant.

    On a CPU the variants take turns. On a GPU they do not fit in memory together, so they run one
    after the other.
    """
    if device.type == "cpu":
        steps = {name: build_step() for name, build_step in made.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(rounds + 1):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                seconds[name] += [time.perf_counter() - began] if i else []
        return {
            name: {"seconds": statistics.median(times), "all": times}
            for name, times in seconds.items()
        }
    results: dict[str, dict[str, Any]] = {}
    for name, build_step in made.items():
        try:
            results[name] = time_alone(build_step, device, rounds)
        except torch.cuda.OutOfMemoryError:
            results[name] = {"seconds": None, "why": "out of memory"}
        gc.collect()
        torch.cuda.empty_cache()
    return results


def time_alone(build_step: Callable[[], Step], device: torch.device, rounds: int) -> dict[str, Any]:
    """Return the median seconds and the peak memory of a variant on a GPU."""
    step = build_step()
    for _ in range(2):
        step()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds):
        began = synchronised(device)
        step()
        times.append(synchronised(device) - began)
    return {
        "seconds": statistics.median(times),
        "all": times,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9,
    }


def cpu_peak(name: str, shape: Shape) -> float:
    """Return the peak memory in GB of a variant's steps beyond its model, in a new process."""
    command = [sys.executable, __file__, "--peak-of", name, "--utterances", str(shape.utterances)]
    command += ["--tiny"] if shape.loss_vocabulary == FEW.loss_vocabulary else []
    return float(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def print_peak(build_step: Callable[[], Step]) -> None:
    """Run a step, and print its peak memory in GB beyond its model."""
    step = build_step()
    gc.collect()
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    step()
    peak = next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    print((peak * 1024 - held) / 1e9)


def matmul_peak(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """Return the operations per second of a product of (n, n) matrices, the best of ten."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        began = synchronised(device)
        a @ b
        best = min(best, synchronised(device) - began)
    return 2 * n**3 / best


def step_operations(shape: Shape) -> float:
    """Return the number of operations of a step."""
    inputs = packed_inputs(make_utterances(shape), shape)
    return count_flops(build_meta(shape)).of_batch(
        inputs["wave_lengths"], inputs["cu_seqlens"], len(inputs["targets"])
    )


def build_meta(shape: Shape) -> AsrLlmModel:
    """Return our model on the meta device."""
    return build(shape, torch.device("meta"), torch.float32)


def loss_steps(device: torch.device, vocabulary: int) -> dict[str, Callable[[], Step]]:
    """Return steps of the head and the loss alone, ours and with logits at all positions.

    400 of 1600 tokens of width 896 are supervised. A step is forward and backward.
    """

    def build_step(ours: bool) -> Step:
        torch.manual_seed(0)
        head = nn.Linear(896, vocabulary, bias=False, device=device).requires_grad_(False)
        hidden = torch.randn(1600, 896, device=device, requires_grad=True)
        at, targets = (
            torch.arange(0, 1600, 4, device=device),
            torch.randint(0, vocabulary, (400,), device=device),
        )
        labels = torch.full((1600,), -100, device=device)
        labels[at] = targets

        def step() -> float:
            if ours:
                loss, *_ = SupervisedLoss()(hidden[at], head, targets, HeadOptions())
            else:
                loss = nn.functional.cross_entropy(head(hidden).float(), labels, reduction="sum")
            loss.backward()
            return loss.item()

        return step

    names = {True: "supervised tokens, in chunks", False: "logits everywhere"}
    return {
        f"head and loss: {name}": functools.partial(build_step, ours)
        for ours, name in names.items()
    }


def agreement(shape: Shape, device: torch.device) -> float:
    """Return the largest difference in float32 between our loss and the baseline's.

    Each utterance is alone in its batch, so nothing is padded.
    """
    ours = build(shape, device, torch.float32).eval()
    baseline = Baseline(ours, shape, pad_to_30s=False).eval()
    worst = 0.0
    for utterance in make_utterances(shape)[:3]:
        inputs = {k: v.to(device) for k, v in packed_inputs([utterance], shape).items()}
        with torch.no_grad():
            mine, theirs = (
                ours(**inputs).loss / len(utterance.answer),
                baseline(**baseline.inputs(ours, [utterance])),
            )
        worst = max(worst, abs(mine.item() - theirs.item()))
    return worst


def report(shape: Shape, device: torch.device, rounds: int) -> dict[str, Any]:
    """Run all measurements, and return the results."""
    results = {
        "steps": time_steps(variants(shape, device), device, rounds),
        "head and loss": time_steps(loss_steps(device, shape.loss_vocabulary), device, rounds),
    }
    operations, tokens = (
        step_operations(shape),
        packed_inputs(make_utterances(shape), shape)["input_ids"].shape[1],
    )
    n = (
        256
        if shape.loss_vocabulary == FEW.loss_vocabulary
        else 8192
        if device.type == "cuda"
        else 2048
    )
    peaks = {
        name: matmul_peak(device, dtype, n)
        for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16))
    }
    for name, result in (results["steps"] | results["head and loss"]).items():
        if device.type == "cpu":
            result["peak GB"] = cpu_peak(name, shape)
    for name, result in results["steps"].items():
        if result["seconds"] is not None:
            result["true tokens/s"] = tokens / result["seconds"]
            result["MFU"] = (
                operations / result["seconds"] / peaks["bf16" if "bf16" in name else "float32"]
            )
    about = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")
        },
        "vocabulary of head and loss": shape.loss_vocabulary,
        "operations of a step": operations,
        "matrix product, operations a second": peaks,
        "tokens of a step": tokens,
        "note": ""
        if device.type == "cuda"
        else "no GPU was at hand: the true shapes were not measured",
    }
    return {"about": about, **results}


def cpu_name() -> str:
    """Return the number and the name of the processors."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} x {names[0]}, {platform.system()}" if names else platform.processor()


def print_table(results: dict[str, Any]) -> None:
    """Print the results as a table."""
    steps = results["steps"]
    references = [name for name in steps if name.startswith("padded")]
    print(
        f"{'':44s} {'s/step':>9s} {'tokens/s':>9s} {'MFU':>6s} {'peak GB':>8s}  "
        "speed-up over each padded variant"
    )
    for name, result in steps.items():
        if result["seconds"] is None:
            print(f"{name:44s} {result['why']}")
            continue
        ratios = [
            f"{steps[r]['seconds'] / result['seconds']:.2f}"
            for r in references
            if steps[r]["seconds"]
        ]
        print(
            f"{name:44s} {result['seconds']:9.3f} {result['true tokens/s']:9.0f} "
            f"{100 * result['MFU']:5.1f}% {result['peak GB']:8.2f}  "
            f"{' '.join(ratios)}"
        )
    for name, result in results["head and loss"].items():
        print(f"{name:44s} {result['seconds']:9.3f} {'':16s} {result['peak GB']:8.2f}")
    print(json.dumps(results["about"], indent=1))


def main() -> None:
    """Run the benchmark, and print and write its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=5, help="steps of each kind; default: %(default)s"
    )
    parser.add_argument(
        "--utterances", type=int, help="utterances in a batch; default: 8, on a GPU 64"
    )
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    parser.add_argument(
        "--tiny", action="store_true", help="use models with few weights, to test the script"
    )
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = FEW if arguments.tiny else GPU if device.type == "cuda" else CPU
    shape = replace(shape, utterances=arguments.utterances or shape.utterances)
    if arguments.peak_of:
        print_peak(
            (variants(shape, device) | loss_steps(device, shape.loss_vocabulary))[arguments.peak_of]
        )
        return
    if device.type == "cpu":
        print(
            "largest difference of the losses of single utterances in float32: "
            f"{agreement(shape, device):.2e}"
        )
    results = report(shape, device, arguments.rounds)
    print_table(results)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
