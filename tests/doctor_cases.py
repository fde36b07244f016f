"""Faults that `asrllm doctor` names, and good runs, with their tables in docs/doctor.md.

`python -m tests.doctor_cases` writes the tables. test_doctor_run.py examines every case.
"""

import re
import resource
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from asrllm.collator.chat import CHATML
from asrllm.conf.pages import table_lines
from asrllm.data.shards import write_shards
from asrllm.data.sources import Utterance
from asrllm.doctor import planned_run
from asrllm.models.encoders.whisper import WhisperEncoder
from asrllm.testing import data_config, tiny_tokenizer
from tests.conftest import REPOSITORY, World
from tests.models.encoders.test_hf import write
from tests.models.test_llm_families import FAMILIES, SIZE

PAGE = REPOSITORY / "docs" / "doctor.md"
TABLE = re.compile(r"(<!-- cases: (\w+) -->\n)(.*?)(\n<!-- end of cases -->)", re.S)
WORDS = (
    "we saw the river from an old bridge while rain fell on quiet fields and people walked home "
    "with bread under their arms because nobody had told them about storms or where boats wait"
)
CHARACTERS = "我们今天早上在河边看见很多人他说明年春会再来这里的天气好冷大家都想回去吃饭"
Rows = Sequence[tuple[str, dict[str, str]]]  # texts and fields of utterances
Keys = dict[str, Any]  # changed keys of a run


# --- texts ---


def english(count: int, *, seed: int = 0) -> list[str]:
    """Return sentences of twelve words in lower case."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS.split(), 12)) for _ in range(count)]


def upper(count: int, *, seed: int = 0) -> list[str]:
    return [text.upper() for text in english(count, seed=seed)]


def sentences(count: int, *, seed: int = 0) -> list[str]:
    """Return sentences with a capital letter and a full stop, and some short answers."""
    found = [f"{text.capitalize()}." for text in english(count, seed=seed)]
    found[::5] = ["mhm" if i % 2 else "OK" for i in range(len(found[::5]))]
    return found


def names(count: int, *, seed: int = 0) -> list[str]:
    """Return sentences in lower case with a name."""
    return [f"{text} with Anna" for text in english(count, seed=seed + 7)]


def chinese(count: int, *, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(CHARACTERS), 18)) for _ in range(count)]


def with_ends(texts: Sequence[str], *ends: str) -> list[str]:
    """Return the texts with these ends by turns."""
    return [text + ends[i % len(ends)] for i, text in enumerate(texts)]


def plain(texts: Sequence[str], **fields: str) -> Rows:
    """Return rows of texts with the same fields."""
    return [(text, fields) for text in texts]


def make_shards(folder: Path, rows: Rows, *, seed: int) -> Path:
    """Write shards of utterances with 0.8 to 1.5 s of noise each."""
    rng = np.random.default_rng(seed)
    utterances = []
    for i, (text, fields) in enumerate(rows):
        wave = rng.normal(0, 0.1, 12800 + 1600 * (i % 8)).astype(np.float32)
        row = {"key": f"u{i:03d}", "text": text, "fields": fields}
        utterances.append(Utterance(load=lambda wave=wave: (wave, 16000), **row))
    write_shards(folder, utterances, utterances_per_shard=40)
    return folder


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where a case is prepared.

    Attributes:
        world: tiny models.
        shards: directory of the shards `train` and `valid` in English without punctuation.
        folder: the case's own directory.
        patch: changes this process.
    """

    world: World
    shards: Path
    folder: Path
    patch: pytest.MonkeyPatch

    def entry(
        self, name: str, rows: Rows | None = None, *, seed: int = 0, **more: Any
    ) -> dict[str, Any]:
        """Return an entry of a data configuration, with new shards if there are rows."""
        shards = self.shards / name
        if rows is not None:
            shards = make_shards(self.folder / name, rows, seed=seed or ord(name[0]))
        return {"name": name, "shards": str(shards)} | more

    def train(self, *entries: dict[str, Any], **keys: Any) -> Keys:
        """Return the keys of a run with these training data."""
        path = data_config(self.folder / "train.yaml", entries)
        return {"data.train_data_config": path} | dotted(keys)

    def valid(self, *entries: dict[str, Any]) -> Keys:
        return {"data.valid_data_config": data_config(self.folder / "valid.yaml", entries)}

    def llm(self, change: Callable[[Any], None]) -> Keys:
        """Return the keys of a run whose LLM has changed weights."""
        return {"model.llm.pretrained_model": self.model(self.world.llm, change)}

    def encoder(self, change: Callable[[Any], None]) -> Keys:
        return {"model.audio_encoder.pretrained_model": self.model(self.world.whisper, change)}

    def model(self, path: Path, change: Callable[[Any], None]) -> Path:
        copy = shutil.copytree(path, self.folder / path.name)
        weights = load_file(copy / "model.safetensors")
        change(weights)
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
        return copy

    def file(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path


@dataclass(frozen=True)
class Fault:
    """A planted fault.

    Attributes:
        what: the fault, for the table.
        check: the finding's check.
        level: the finding's level.
        says: a part of the finding's text or fix.
        plant: makes the fault; returns the changed keys of a run, or the arguments of
            `asrllm doctor` for a fault of the machine.
    """

    what: str
    check: str
    level: str
    says: str
    plant: Callable[[Bench], Keys | list[str]]


@dataclass(frozen=True)
class Good:
    """A run without a fault.

    Attributes:
        what: how it differs from a run with Whisper, an LLM with LoRA, and one corpus.
        keys: the changed keys.
        make: makes files, and returns more keys.
    """

    what: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    make: Callable[[Bench], Keys] = lambda bench: {}


def environment(**values: str) -> Callable[[Bench], list[str]]:
    """Return a function that sets variables, and returns no arguments."""

    def plant(bench: Bench) -> list[str]:
        for name, value in values.items():
            bench.patch.setenv(name, value.replace("{folder}", str(bench.folder)))
        return []

    return plant


def hostfile(text: str) -> Callable[[Bench], list[str]]:
    return lambda bench: ["--hostfile", str(bench.file("hostfile", text))]


def keys(**values: Any) -> Callable[[Bench], Keys]:
    """Return a function that returns keys with dots for double underscores."""
    return lambda bench: dotted(values)


# --- faults of the machine ---


def wrong_version(bench: Bench) -> list[str]:
    required = metadata.requires("asrllm") or []
    bench.patch.setattr(metadata, "requires", lambda name: [*required, "torch>=99"])
    return []


def missing_package(bench: Bench) -> list[str]:
    bench.patch.setattr(metadata, "requires", lambda name: ["asrllm-no-such-package>=1"])
    return []


def few_open_files(bench: Bench) -> list[str]:
    bench.patch.setattr(resource, "getrlimit", lambda kind: (20, 20))
    return []


def full_disk(bench: Bench) -> Any:
    full = SimpleNamespace(total=1 << 40, used=1 << 40, free=0)
    bench.patch.setattr(shutil, "disk_usage", lambda path: full)
    return []


# --- faults of the models ---


def value_in_one(value: float) -> Callable[[Any], None]:
    def change(weights: Any) -> None:
        name = min(name for name in weights if not name.startswith("decoder."))
        weights[name].view(-1)[0] = value

    return change


def without_one(weights: Any) -> None:
    del weights[max(name for name in weights if name.endswith(".q_proj.weight"))]


def zero(pattern: str) -> Callable[[Any], None]:
    """Return a function that sets the weights with a pattern in their names to zero."""

    def change(weights: Any) -> None:
        for name in weights:
            if re.search(pattern, name):
                weights[name].zero_()

    return change


def large_mlp(weights: Any) -> None:
    for name in weights:
        if ".mlp." in name:
            weights[name].mul_(1e30)


def tokenizer_of_another_llm(bench: Bench) -> Keys:
    path = shutil.copytree(bench.world.llm, bench.folder / "llm") / "config.json"
    path.write_text(re.sub(r'"vocab_size": \d+', '"vocab_size": 200', path.read_text()))
    return {"model.llm.pretrained_model": path.parent}


def other_frames(bench: Bench) -> Keys:
    right = WhisperEncoder.frame_lengths
    wrong = staticmethod(lambda *arguments: right(*arguments) + 1)
    bench.patch.setattr(WhisperEncoder, "frame_lengths", wrong)
    return {}


def other_prompt(bench: Bench) -> Keys:
    read = planned_run.as_decoding_reads

    def changed(processor: Any) -> Any:
        decoding = read(processor)
        decoding.tokenizer.chat_template = f"Listen. {CHATML}"
        return type(decoding)(decoding.tokenizer, decoding.config)

    bench.patch.setattr(planned_run, "as_decoding_reads", changed)
    return {}


# --- faults of the data ---


def manifest(bench: Bench) -> Keys:
    return bench.train({"manifest": str(bench.file("cuts.jsonl", "{}\n"))})


def damaged(bench: Bench, change: Callable[[Path], None]) -> Keys:
    """Return the keys of a run whose validation shard is changed."""
    shards = shutil.copytree(bench.shards / "valid", bench.folder / "valid")
    change(shards / "shard-000000.tar")
    return bench.valid({"name": "dev", "shards": str(shards)})


def flip(path: Path) -> None:
    """Change the content of a tar, but neither its size nor its headers."""
    content = bytearray(path.read_bytes())
    for place in range(600, len(content) - 10240, 512):
        content[place] ^= 0xFF
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10240])


def sorted_by_language(bench: Bench) -> Keys:
    rows = [*plain(english(80), lang="en"), *plain(chinese(80), lang="zh")]
    return bench.train(bench.entry("two", rows), data__sampler__window=40)


def sorted_by_label(bench: Bench) -> Keys:
    rows = plain(["a dog barks in the yard"] * 80 + ["the rain falls on a roof"] * 80)
    return bench.train(bench.entry("sounds", rows), data__sampler__window=40)


def corpora(*rows: Rows, **keys: Any) -> Callable[[Bench], Keys]:
    """Return a function that makes the training corpora a, b ..., and returns their keys."""

    def make(bench: Bench) -> Keys:
        entries = [bench.entry("abc"[i], part) for i, part in enumerate(rows)]
        return bench.train(*entries) | dotted(keys)

    return make


def dotted(values: Mapping[str, Any]) -> Keys:
    """Return values by keys with dots for double underscores."""
    return {name.replace("__", "."): value for name, value in values.items()}


def few_checkpoints(bench: Bench) -> Keys:
    full_disk(bench)
    return {}


def validation_in_training(bench: Bench) -> Keys:
    same = bench.entry("same", plain(english(8, seed=3)), seed=2)  # other texts
    return bench.train(bench.entry("train"), same)


def texts_of_validation(bench: Bench) -> Keys:
    return bench.train(bench.entry("train"), bench.entry("same", plain(english(8, seed=1))))


def prompts_of_styles(bench: Bench) -> Keys:
    """Return the keys of two corpora of different styles, each with a prompt."""
    loud = bench.entry("loud", plain(upper(40)), prompts=["Transcribe in capitals."])
    return bench.train(bench.entry("train"), loud)


def encoder_of_transformers(bench: Bench) -> Keys:
    write(bench.folder / "encoder", "wav2vec2")
    path = bench.folder / "encoder"
    encoder = {"model_type": "hf", "pretrained_model": path}
    return {f"model.audio_encoder.{key}": value for key, value in encoder.items()}


def family(kind: str) -> Callable[[Bench], Keys]:
    """Return a function that writes an LLM of a family with random weights."""

    def make(bench: Bench) -> Keys:
        path = bench.folder / kind
        tokenizer = tiny_tokenizer()
        ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        config = AutoConfig.for_model(kind, **SIZE | FAMILIES[kind] | ids)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return {"model.llm.model_type": kind, "model.llm.pretrained_model": path}

    return make


def hotwords(bench: Bench) -> Keys:
    path = bench.file("hotwords.txt", "river\nbridge\n")
    return {"data.hotwords.file": path, "data.hotwords.prob": 0.5}


def zipformer(bench: Bench) -> Keys:
    encoder = {"model_type": "zipformer", "pretrained_model": bench.world.zipformer}
    return {f"model.audio_encoder.{key}": value for key, value in encoder.items()}


def languages_by_turns(bench: Bench) -> Keys:
    rows = []
    for pair in zip(plain(english(80), lang="en"), plain(chinese(80), lang="zh"), strict=True):
        rows += pair
    return bench.train(bench.entry("two", rows), data__sampler__window=40)


FAULTS = [
    # --- the machine ---
    Fault(
        "`torch` is older than `pyproject.toml` requires",
        "torch",
        "problem",
        "torch>=99",
        wrong_version,
    ),
    Fault(
        "a required package is not installed",
        "asrllm-no-such-package",
        "problem",
        "is not installed",
        missing_package,
    ),
    Fault(
        "`WORLD_SIZE=2` outside of a launcher",
        "launcher",
        "problem",
        "WORLD_SIZE",
        environment(WORLD_SIZE="2"),
    ),
    Fault(
        "`RANK` is left over from an earlier job",
        "launcher",
        "warning",
        "unset RANK",
        environment(RANK="0"),
    ),
    Fault(
        "`NCCL_SOCKET_IFNAME` names no network interface",
        "NCCL_SOCKET_IFNAME",
        "problem",
        "none7",
        environment(NCCL_SOCKET_IFNAME="none7"),
    ),
    Fault(
        "`NCCL_P2P_DISABLE=1`",
        "NCCL_P2P_DISABLE",
        "warning",
        "NCCL_P2P_DISABLE",
        environment(NCCL_P2P_DISABLE="1"),
    ),
    Fault(
        "a host of the hostfile does not resolve",
        "host",
        "problem",
        "host.invalid",
        hostfile("host.invalid slots=2\n"),
    ),
    Fault(
        "a host is twice in the hostfile",
        "hostfile",
        "problem",
        "2 times",
        hostfile("localhost slots=2\nlocalhost slots=2\n"),
    ),
    Fault(
        "`TMPDIR` does not exist",
        "temporary files",
        "warning",
        "none",
        environment(TMPDIR="{folder}/none"),
    ),
    Fault(
        "ffmpeg is not installed",
        "ffmpeg",
        "warning",
        "ffprobe",
        environment(PATH="{folder}"),
    ),
    Fault(
        "at most 20 open files",
        "open files",
        "problem",
        "20",
        few_open_files,
    ),
    Fault(
        "the disk is full",
        "disk",
        "warning",
        "0.0 GiB",
        full_disk,
    ),
    # --- configuration and models ---
    Fault(
        "the LLM's directory does not exist",
        "configuration",
        "problem",
        "no/llm",
        keys(model__llm__pretrained_model="no/llm"),
    ),
    Fault(
        "LoRA names a layer that the LLM does not have",
        "configuration",
        "problem",
        "query_proj",
        keys(model__llm__lora__target_modules="[query_proj]"),
    ),
    Fault(
        "the tokenizer belongs to a larger LLM",
        "configuration",
        "problem",
        "Give the tokenizer",
        tokenizer_of_another_llm,
    ),
    Fault(
        "a weight of the LLM is NaN",
        "llm",
        "problem",
        "contains NaN",
        lambda bench: bench.llm(value_in_one(float("nan"))),
    ),
    Fault(
        "a weight of the LLM is missing",
        "llm",
        "problem",
        "missing key",
        lambda bench: bench.llm(without_one),
    ),
    Fault(
        "a weight of the encoder is infinite",
        "configuration",
        "problem",
        "infinite",
        lambda bench: bench.encoder(value_in_one(float("inf"))),
    ),
    Fault(
        "a weight of the encoder is missing",
        "configuration",
        "problem",
        "lack 1 key",
        lambda bench: bench.encoder(without_one),
    ),
    Fault(
        "`lora_bias` for layers without a bias",
        "configuration",
        "problem",
        "lora_bias",
        keys(
            model__llm__lora__target_modules="[o_proj]",
            model__llm__lora__options__lora_bias="true",
        ),
    ),
    Fault(
        "`init_from` is not an earlier run",
        "model",
        "problem",
        "init_from",
        lambda bench: {"init_from": bench.folder},
    ),
    Fault(
        "the adapters have no effect, because the layers after them are zero",
        "adapters",
        "problem",
        "do not change the logits",
        lambda bench: bench.llm(zero("o_proj")),
    ),
    Fault(
        "the adapters of one layer get no gradient",
        "adapters",
        "problem",
        "layers.1.self_attn",
        lambda bench: bench.llm(zero(r"layers\.1\.self_attn\.o_proj")),
    ),
    Fault(
        "the activations of the LLM overflow",
        "adapters",
        "problem",
        "not finite",
        lambda bench: bench.llm(large_mlp),
    ),
    Fault(
        "the encoder gives more frames than its formula",
        "audio tokens",
        "problem",
        "encoder frames",
        other_frames,
    ),
    Fault(
        "decoding reads another chat template",
        "prompts",
        "problem",
        "other tokens in decoding",
        other_prompt,
    ),
    Fault(
        "transcripts have decomposed accents, which the tokenizer composes",
        "labels",
        "warning",
        "decode to",
        corpora(plain(with_ends(english(60), " cafe\u0301"))),
    ),
    # --- data ---
    Fault(
        "a manifest without shards",
        "configuration",
        "problem",
        "cuts.jsonl",
        manifest,
    ),
    Fault(
        "a shard is truncated",
        "configuration",
        "problem",
        "is truncated",
        lambda bench: damaged(bench, cut),
    ),
    Fault(
        "the audio of a shard is corrupted",
        "audio",
        "problem",
        "dev: 0 of 3",
        lambda bench: damaged(bench, flip),
    ),
    Fault(
        "no prompt for a language of the data",
        "configuration",
        "problem",
        "no prompt fits",
        lambda bench: {"prompt_file": bench.file("prompts.yaml", "- {prompt: Écris., lang: fr}\n")},
    ),
    Fault(
        "`data.filter` drops short utterances",
        "filter",
        "warning",
        "too_short",
        keys(data__filter__min_duration=1.2),
    ),
    Fault(
        "`data.filter` drops long transcripts",
        "filter",
        "warning",
        "too_fast",
        keys(data__filter__max_chars_per_second=50),
    ),
    Fault(
        "audio of the validation data is in the training data",
        "overlap of audio",
        "warning",
        "8 of 8",
        validation_in_training,
    ),
    Fault(
        "texts of the validation data are in the training data",
        "overlap of text",
        "warning",
        "8 of 8",
        texts_of_validation,
    ),
    Fault(
        "a corpus is sorted by language, in windows of one shard",
        "order",
        "warning",
        "0% to 100%",
        sorted_by_language,
    ),
    Fault(
        "a corpus is sorted by label, in windows of one shard",
        "order",
        "warning",
        "text='",
        sorted_by_label,
    ),
    Fault(
        "a tenth of a corpus is in upper case",
        "style of case",
        "warning",
        "60 transcripts, 6 have upper-case",
        corpora(plain(english(54) + upper(6))),
    ),
    Fault(
        "a corpus is in upper case, another is not",
        "style of case",
        "warning",
        "transcripts of a have upper-case letters only",
        corpora(plain(upper(40)), plain(names(40)), data__valid_data_config="null"),
    ),
    Fault(
        "the training data are in lower case, the validation data have capital letters",
        "style of case",
        "warning",
        "those of train lower-case letters only",
        lambda bench: bench.valid(bench.entry("dev", plain(names(20)))),
    ),
    Fault(
        "half of a corpus has punctuation",
        "style of punctuation",
        "warning",
        "the others no punctuation",
        corpora(plain(english(30) + with_ends(english(30, seed=2), ".", "?"))),
    ),
    Fault(
        "a Chinese corpus has punctuation, another has not",
        "style of punctuation",
        "warning",
        "transcripts of b have punctuation",
        corpora(
            plain(chinese(40), lang="zh"),
            plain(with_ends(chinese(40, seed=2), "。", "？"), lang="zh-CN"),
        ),
    ),
    Fault(
        "numbers are digits or words",
        "style of numbers",
        "warning",
        "10 have digits",
        corpora(plain(english(20) + with_ends(english(20, seed=2), " 25", " twenty five"))),
    ),
    Fault(
        "Chinese numbers are digits in a corpus, and words in another",
        "style of numbers",
        "warning",
        "those of b numbers as words",
        corpora(
            plain(with_ends(chinese(40), "2015年"), lang="zh"),
            plain(with_ends(chinese(40, seed=2), "二零一五年"), lang="zh"),
        ),
    ),
    # --- schedule and disk ---
    Fault(
        "the warm-up is longer than the run",
        "schedule",
        "warning",
        "trainer.warmup_steps",
        keys(trainer__warmup_steps=9),
    ),
    Fault(
        "the warm-up of `eden` is longer than the run",
        "schedule",
        "warning",
        "trainer.schedule.warmup_batches",
        keys(trainer__schedule__name="eden", trainer__warmup_steps=500),
    ),
    Fault(
        "the checkpoints do not fit on the disk",
        "checkpoints",
        "problem",
        "trainer.keep_last_k",
        few_checkpoints,
    ),
]

GOOD = [
    Good("one corpus, Whisper, an LLM with LoRA"),
    Good("a Zipformer", make=zipformer),
    Good(
        "a Zipformer with adapters",
        {
            "model.audio_encoder.lora.r": 4,
            "model.audio_encoder.lora.target_modules": "[in_proj,out_proj]",
        },
        zipformer,
    ),
    Good("an encoder of transformers (wav2vec2)", make=encoder_of_transformers),
    Good("an LLM of the family Llama", make=family("llama")),
    Good("an LLM of the family Gemma 2", make=family("gemma2")),
    Good("a mixture of experts (Qwen3-MoE)", make=family("qwen3_moe")),
    Good("adapters of the encoder", {"model.audio_encoder.lora.r": 4}),
    Good(
        "the whole encoder is trained",
        {"model.audio_encoder.frozen": "false", "trainer.gradient_checkpointing": "true"},
    ),
    Good("only the projector is trained", {"model.llm.lora.r": 0}),
    Good("the whole LLM is trained", {"model.llm.lora.r": 0, "model.llm.frozen": "false"}),
    Good(
        "DoRA and rsLoRA of all linear layers",
        {
            "model.llm.lora.target_modules": "all-linear",
            "model.llm.lora.use_dora": "true",
            "model.llm.lora.use_rslora": "true",
        },
    ),
    Good(
        "a frozen projector",
        {"model.frozen_parameters": "[projector.*]"},
    ),
    Good(
        "`normed` with boundaries",
        {"model.projector": "normed", "model.tag_audio_boundary": "true"},
    ),
    Good("`conv`", {"model.projector": "conv", "model.audio_encoder_projector_ds_rate": 4}),
    Good("`qformer`", {"model.projector": "qformer"}),
    Good("`transformer`", {"model.projector": "transformer"}),
    Good("`swiglu`, ChatML", {"model.projector": "swiglu", "model.llm.chat_template": "chatml"}),
    Good("Whisper padded to 30 s", {"data.pad_to_30s": "true"}),
    Good(
        "Whisper with its silence",
        {"data.pad_to_30s": "keep_silence", "data.sampler.max_tokens": 800},
    ),
    Good(
        "fp32, ZeRO-3",
        {"trainer.precision": "fp32", "trainer.deepspeed_config": "ds_configs/zero3.json"},
    ),
    Good("ZeRO-2 with offload", {"trainer.deepspeed_config": "ds_configs/zero2_offload.json"}),
    Good(
        "ZeRO-0, gradient accumulation",
        {
            "trainer.deepspeed_config": "ds_configs/zero0.json",
            "trainer.gradient_accumulation_steps": 4,
        },
    ),
    Good("two epochs", {"trainer.num_steps": "null", "trainer.num_epochs": 2}),
    Good("`wsd`, one checkpoint", {"trainer.schedule.name": "wsd", "trainer.keep_last_k": 1}),
    Good(
        "`eden`, ScaledAdam",
        {
            "trainer.schedule.name": "eden",
            "trainer.schedule.warmup_batches": 4,
            "trainer.warmup_steps": 500,
            "trainer.optimizer.name": "scaled_adam",
        },
    ),
    Good("label smoothing", {"trainer.label_smoothing": 0.1}),
    Good(
        "speed and SpecAugment",
        {"data.augment.speed": "[0.9,1.0,1.1]", "data.augment.spec_augment.prob": 1},
    ),
    Good("hotwords", make=hotwords),
    Good("several prompts", make=lambda bench: {"prompt_file": bench.world.root / "prompts.txt"}),
    Good("no validation data", {"data.valid_data_config": "null"}),
    Good(
        "sentence case, with short answers",
        make=corpora(plain(sentences(60)), data__valid_data_config="null"),
    ),
    Good(
        "upper case and sentence case with `data.text_normalization=basic`",
        make=corpora(plain(upper(30)), plain(sentences(30)), data__text_normalization="basic"),
    ),
    Good("upper and lower case with prompts of their own", make=prompts_of_styles),
    Good(
        "small numbers as words and large ones as digits",
        make=corpora(plain(with_ends(english(60), " two", " 25"))),
    ),
    Good("Chinese", make=corpora(plain(chinese(60), lang="zh"))),
    Good(
        "English, and Chinese with punctuation, as an endless mix",
        make=corpora(
            plain(english(40), lang="en"),
            plain(with_ends(chinese(40), "。")),
            data__use_infinite_dataset="true",
        ),
    ),
    Good(
        "two languages, sorted, in one window",
        make=lambda bench: sorted_by_language(bench) | {"data.sampler.window": 1000},
    ),
    Good("two languages, not sorted, in windows of one shard", make=languages_by_turns),
]


def tables() -> dict[str, list[str]]:
    """Return the lines of both tables."""
    faults = [(case.what, case.check, case.level) for case in FAULTS]
    return {
        "faults": table_lines(("Planted fault", "Check", "Level"), faults),
        "runs": table_lines(("Good run",), [(case.what,) for case in GOOD]),
    }


def page() -> str:
    """Return docs/doctor.md with the tables of the cases."""
    text = PAGE.read_text(encoding="utf-8")
    lines = tables()
    return TABLE.sub(lambda match: "\n".join([match[1], *lines[match[2]], match[4]]), text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
