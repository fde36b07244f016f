"""The files that `asrllm init` writes, and the commands that use them."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

PROMPTS = (
    "Transcribe the speech.",
    "Write down what the speaker says.",
    "Convert the speech to text.",
)
CONFIG = """\
# Use it with: asrllm train --config-dir {folder_} --config-name experiment
# Every key with its meaning: asrllm train --help, or docs/configuration.md. A key on the command
# line has precedence, for example trainer.lr=2e-4.
defaults: [train, _self_]

exp_dir: {exp_dir}  # logs, checkpoints and results
prompt_file: {prompts}  # one prompt per line; each utterance gets one at random

model:
  audio_encoder:
    model_type: {encoder_kind}
    pretrained_model: {encoder}
    frozen: true  # false: fine-tune the whole encoder, with a lower trainer.lr_of.audio_encoder
  llm:
    pretrained_model: {llm}
    lora:
      r: 16  # rank of the adapters; 0: train the projector only

data:
  train_data_config: {train_data}
  valid_data_config: {valid_data}  # null: no validation
  sampler:
    max_tokens: 4000  # audio and text tokens of a GPU's micro-batch; `asrllm plan` shows the limit
  filter:
    min_duration: 1.0  # seconds
    max_duration: 30.0  # seconds

trainer:
  deepspeed_config: ds_configs/zero1.json  # zero3.json if the LLM does not fit on a GPU
  precision: bf16  # fp32 for tests on a CPU
  gradient_accumulation_steps: 1
  num_epochs: 1
  lr: 1.0e-4  # peak; for the adapters and the projector
  warmup_steps: 500  # lower it if `asrllm plan` shows fewer than 5000 steps
  valid_every: 1000  # steps
  save_every: 1000  # steps
"""
DATA = """\
# A list of corpora. Add an entry for each further one, see docs/data.md.
- name: {set}
  shards: {shards}
  lang: {lang}
"""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Data from which shards are made.

    Attributes:
        kind: its name in SOURCES, which is the option of `asrllm shards make`.
        path: its absolute path.
    """

    kind: str
    path: Path


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What the files of an experiment depend on.

    Attributes:
        folder: absolute path of the directory of the files.
        sources: data by the name of the set: "train", and optionally "valid".
        lang: language of the data.
        encoder_kind: name of the encoder in ENCODERS.
        encoder: path or hub id of the encoder.
        llm: path or hub id of the LLM.
        gpus: number of GPUs.
    """

    folder: Path
    sources: dict[str, DataSource]
    lang: str
    encoder_kind: str
    encoder: str
    llm: str
    gpus: int

    def files(self) -> dict[str, str]:
        """Return the content of each file by its name."""
        has_valid = "valid" in self.sources
        config = CONFIG.format(
            folder_=shlex.quote(str(self.folder)),
            exp_dir=hydra_text(self.folder / "exp"),
            prompts=hydra_text(self.folder / "prompts.txt"),
            encoder_kind=self.encoder_kind,
            encoder=hydra_text(self.encoder),
            llm=hydra_text(self.llm),
            train_data=hydra_text(self.folder / "train_data.yaml"),
            valid_data=hydra_text(self.folder / "valid_data.yaml") if has_valid else "null",
        )
        files = {"experiment.yaml": config, "prompts.txt": "\n".join(PROMPTS) + "\n"}
        for name in self.sources:
            files[f"{name}_data.yaml"] = DATA.format(
                set=name, shards=yaml_text(self.shards(name)), lang=yaml_text(self.lang)
            )
        return files

    def shards(self, name: str) -> Path:
        """Return the directory of a set's shards."""
        return self.folder / "shards" / name

    def commands(self) -> list[str]:
        """Return the commands to run next: make shards, plan and train."""
        commands = []
        for name, source in self.sources.items():
            make = ["asrllm", "shards", "make", str(self.shards(name))]
            options = [f"--{source.kind}", str(source.path), "--lang", self.lang]
            commands.append(shlex.join([*make, *options]))
        config = ["--config-dir", str(self.folder), "--config-name", "experiment"]
        launcher = ["asrllm"]
        if self.gpus > 1:
            launcher = ["torchrun", f"--nproc_per_node={self.gpus}", "-m", "asrllm"]
        commands.append(shlex.join(["asrllm", "plan", *config, f"+gpus={self.gpus}"]))
        commands.append(shlex.join([*launcher, "train", *config]))
        return commands


def yaml_text(value: object) -> str:
    """Return a text as a YAML scalar."""
    return json.dumps(str(value), ensure_ascii=False)


def hydra_text(value: object) -> str:
    """Return a text as a YAML scalar in which OmegaConf replaces nothing."""
    return yaml_text(str(value).replace("${", "\\${"))
