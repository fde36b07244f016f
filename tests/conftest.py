"""What the tests share: tiny models, a tiny corpus, and a way to run commands as a user does."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: threads that wait for one another take minutes beside another job
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process that the tests start compiles asrllm again

import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from asrllm.data.shards import write_shards
from asrllm.data.sources import read_kaldi
from asrllm.testing import data_config, kaldi_directory, tiny_llm, tiny_whisper, tiny_zipformer, tone_sentences

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class World:
    """Where the tiny models and corpora of a test session lie."""

    root: Path

    @property
    def whisper(self) -> Path:
        return self.root / "whisper"

    @property
    def zipformer(self) -> Path:
        return self.root / "zipformer"

    @property
    def llm(self) -> Path:
        return self.root / "llm"

    @property
    def shards(self) -> Path:
        return self.root / "shards" / "train"

    def overrides(self, exp: Path, **more: object) -> list[str]:
        """A training run's overrides: 8 steps of the tiny models; more: further keys, dots as double underscores."""
        keys = {
            "exp_dir": exp,
            "model.audio_encoder.model_type": "whisper",
            "model.audio_encoder.pretrained_model": self.whisper,
            "model.llm.model_type": "qwen2",
            "model.llm.pretrained_model": self.llm,
            "model.llm.lora.r": 4,
            "model.projector_hidden_size": 32,
            "data.train_data_config": self.root / "train.yaml",
            "data.valid_data_config": self.root / "valid.yaml",
            "data.sampler.max_tokens": 150,
            "data.filter.min_duration": 0.1,
            "data.filter.max_chars_per_second": 100,
            "data.num_workers": 1,
            "trainer.num_steps": 8,
            "trainer.num_epochs": "null",
            "trainer.log_every": 1,
            "trainer.save_every": 4,
            "trainer.valid_every": 8,
            "trainer.warmup_steps": 2,
            "trainer.lr": 0.001,
            "trainer.tensorboard": "false",
        }
        keys |= {key.replace("__", "."): value for key, value in more.items()}
        return [f"{key}={value}" for key, value in keys.items() if value is not None]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    tiny_whisper(root / "whisper")
    tiny_zipformer(root / "zipformer")
    tiny_llm(root / "llm")
    for name, count, seed in (("train", 60, 0), ("valid", 7, 1), ("test", 9, 2)):
        write_shards(
            root / "shards" / name,
            read_kaldi(kaldi_directory(root / "kaldi" / name, tone_sentences(count, seed=seed))),
            utterances_per_shard=25,
        )
        data_config(root / f"{name}.yaml", [{"name": name, "shards": str(root / "shards" / name)}])
    (root / "prompts.txt").write_text("Transcribe.\nRepeat what you hear.\n写下来。\n")
    return World(root)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without a launcher's traces, on the processor, one thread a process."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in launchers}
    return environment | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def run_script(
    script: str, *arguments: object, launcher: str = "python", timeout: float = 150, **environment: str
) -> subprocess.CompletedProcess:
    """launch/SCRIPT.py run by a launcher: python, torchrun or deepspeed (the latter two with 2 processes)."""
    binaries = Path(sys.executable).parent
    start = {
        "python": [sys.executable],
        "torchrun": [str(binaries / "torchrun"), "--nproc_per_node=2", f"--master_port={free_port()}"],
        "deepspeed": [str(binaries / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())],
    }[launcher]
    command = [*start, str(REPOSITORY / "launch" / f"{script}.py"), *map(str, arguments)]
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=REPOSITORY, env=clean_environment(PATH=path, **environment)
    )


def assert_done(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return result
