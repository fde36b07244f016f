"""Names of configuration keys: those of other frameworks, and hints for unknown ones."""

import difflib
import functools
import itertools
import re
from collections.abc import Collection, Mapping
from importlib import resources

from asrllm.errors import UserError

MAX_LISTED = 12  # keys of a group in a message
# our keys, and what they are called in Hugging Face, NeMo, icefall, SLAM-LLM and ms-swift
NAMES_ELSEWHERE = {
    "trainer.lr": ["learning_rate", "base_lr"],
    "trainer.num_epochs": ["num_train_epochs", "max_epochs", "epochs"],
    "trainer.num_steps": ["max_steps", "total_steps"],
    "data.sampler.max_tokens": [
        "batch_size",
        "per_device_train_batch_size",
        "train_micro_batch_size_per_gpu",
        "batch_size_training",
    ],
    "data.sampler.max_duration": ["max_duration", "batch_duration"],
    "trainer.gradient_accumulation_steps": [
        "gradient_accumulation",
        "gradient_accumulation_steps",
        "accumulate_grad_batches",
        "accum_grad",
    ],
    "trainer.gradient_clipping": [
        "max_grad_norm",
        "grad_clip",
        "gradient_clip_val",
        "clip_grad_norm",
    ],
    "trainer.warmup_steps": ["warmup_ratio"],
    "trainer.schedule.name": ["lr_scheduler_type"],
    "trainer.optimizer.name": ["optim"],
    "trainer.precision": ["bf16", "fp16", "use_fp16", "torch_dtype"],
    "trainer.deepspeed_config": ["deepspeed", "strategy"],
    "exp_dir": ["output_dir"],
    "trainer.save_every": ["save_steps", "save_every_n", "every_n_train_steps"],
    "trainer.keep_last_k": ["save_total_limit", "keep_last_k", "save_top_k"],
    "trainer.log_every": ["logging_steps", "log_interval", "log_every_n_steps"],
    "trainer.valid_every": [
        "eval_steps",
        "valid_interval",
        "validation_interval",
        "val_check_interval",
    ],
    "trainer.resume": ["resume_from_checkpoint", "start_epoch", "resume_if_exists"],
    "data.num_workers": ["dataloader_num_workers", "num_workers_dataloader"],
    "model.llm.lora.r": ["lora_r", "rank", "lora_rank", "use_lora", "use_peft"],
    "model.llm.lora.lora_alpha": ["lora_alpha"],
    "model.llm.lora.lora_dropout": ["lora_dropout"],
    "model.audio_encoder.frozen": ["freeze_encoder", "freeze_vit"],
    "model.llm.frozen": ["freeze_llm", "unfreeze_llm"],
    "model.audio_encoder.model_type": ["encoder_name"],
    "model.llm.pretrained_model": [
        "llm_path",
        "model_name_or_path",
        "llm_path_or_name",
        "pretrained_llm",
    ],
    "data.train_data_config": ["train_data_path", "manifest_dir", "dataset"],
    "data.max_batch_duration": ["max_duration", "batch_size"],  # in evaluation
    "num_beams": ["beam_size"],
    "checkpoint.model.filename": ["ckpt_path"],
    "model.audio_encoder.pretrained_model": [
        "speech_encoder_path_or_name",
        "encoder_path",
        "pretrained_asr",
    ],
    "model.projector": ["encoder_projector", "modality_adapter"],
    "model.audio_encoder_projector_ds_rate": ["encoder_projector_ds_rate"],
    "model.audio_token": ["audio_locator_tag"],
    "model.llm.chat_template": ["prompt_format"],
    "data.valid_data_config": ["val_data_path", "val_dataset"],
    "trainer.lr_of.audio_encoder": ["vit_lr"],
    "trainer.lr_of.projector": ["aligner_lr"],
    "model.llm.attention": ["attn_impl", "attn_implementation", "use_flash_attn"],
    "data.augment.spec_augment.prob": ["enable_spec_aug"],
    "data.augment.noise.source": ["enable_musan", "musan"],
    "data.augment.speed": ["enable_speed_perturb"],
    "trainer.sinks": ["tensorboard"],
    "trainer.wandb.mode": ["use_wandb", "create_wandb_logger", "report_to"],
    "trainer.min_lr_ratio": ["min_lr"],
    "model.frozen_parameters": ["freeze_aligner"],
    "trainer.betas": ["adam_beta1", "adam_beta2"],
    "data.filter.max_duration": ["max_length"],
}
# a line of a packaged YAML file: a key, its value and the beginning of its meaning
KEY_LINE = re.compile(r"(?P<indent> *)(?P<key>\w+):.*?(  # (?P<meaning>.*))?")


def unknown_key(key: str, known: Collection[str], where: str = "") -> UserError:
    """Return an error for an unknown key, which hints at the right one.

    Args:
        key: the unknown key.
        known: the keys of the configuration.
        where: the place of the key, which messages put before it.
    """
    return UserError(f"{where}unknown key {key!r}. {_hint(key, known)}")


def check_override(override: str, known: Collection[str]) -> None:
    """Raise UserError if an override sets an unknown key of a known group.

    Hydra finds the others: `name=...` may choose a group of --config-dir.

    Args:
        override: a word of the command line: trainer.lr=1e-4.
        known: the keys of the configuration.
    """
    key = override.partition("=")[0]
    group = key.rpartition(".")[0]
    is_plain = all(part.isidentifier() for part in key.split("."))  # not +KEY, ~KEY or KEY@PACKAGE
    if group and is_plain and key not in known and _keys_in(group, known):
        raise unknown_key(key, known)


def unknown_option(word: str, known: Collection[str]) -> str:
    """Return the message about an option that may be a key written with dashes.

    Args:
        word: the word of the command line: --learning-rate or --exp-dir=exp/a.
        known: the keys of the configuration.
    """
    key = word.lstrip("-").partition("=")[0].replace("-", "_")
    if _keys_in(key, known):
        hint = f"Set the keys of {key}, for example {key}.KEY=VALUE."
    elif key in known:
        hint = f"Use {key}=VALUE."
    else:
        hint = _hint(key, known)
    return f"unknown option {word}. Write keys without dashes, as KEY=VALUE. {hint}"


def dotted_keys(tree: object, prefix: str = "") -> list[str]:
    """Return the keys of nested mappings as dotted paths."""
    keys: list[str] = []
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            keys += [f"{prefix}{key}", *dotted_keys(value, f"{prefix}{key}.")]
    return keys


def help_text(name: str) -> str:
    """Return every key of `asrllm/conf/NAME.yaml` and its groups with its default and meaning."""
    root = resources.files("asrllm.conf")
    main = (root / f"{name}.yaml").read_text()
    parts = [main.partition("\n\n")[2]]
    for group, choice in re.findall(r"^  - (?:/)?(\w+): (\w+)$", main, flags=re.M):
        lines = (root / group / f"{choice}.yaml").read_text().splitlines()
        indented = [f"  {line}\n" if line else "\n" for line in lines]
        parts.append(f"{group}:\n" + "".join(indented))
    return "\n".join(parts)


@functools.cache
def meanings(name: str) -> dict[str, str]:
    """Return the meaning of every key of `asrllm/conf/NAME.yaml` and its groups, by dotted path."""
    found: dict[str, str] = {}
    path: list[str] = []
    for line in filter(None, help_text(name).splitlines()):
        if match := KEY_LINE.fullmatch(line):
            depth = len(match["indent"]) // 2  # spaces
            path = [*path[:depth], match["key"]]
            found[".".join(path)] = match["meaning"] or ""
        else:
            found[".".join(path)] += line.strip().replace("#", "", 1)
    return found


def meaning(name: str, key: str) -> str:
    """Return the meaning of a key of `asrllm/conf/NAME.yaml` or its groups, without a last stop."""
    return meanings(name)[key].removesuffix(".")


def _use(key: str, known: Collection[str]) -> str:
    """Return the advice to use a key, with its meaning in the configuration with `known` keys."""
    names = [name for name in ("train", "evaluate") if meanings(name).keys() >= set(known)]
    return f"Use {key}: {meaning(names[0] if names else 'train', key)}."


def _hint(key: str, known: Collection[str]) -> str:
    """Return what to write instead of an unknown key."""
    if key == "experiment":
        return "Write +experiment=NAME, which reads experiment/NAME.yaml in --config-dir."
    if ours := our_key(key.rpartition(".")[2], known):
        return _use(ours, known)
    return _similar_key(key, known)


def our_key(name: str, known: Collection[str]) -> str | None:
    """Return our key for a name in other frameworks, or None if there is none in `known`."""
    for key, names in NAMES_ELSEWHERE.items():
        if key in known and name in names:
            return key
    return None


def _similar_key(key: str, known: Collection[str]) -> str:
    """Return a hint with the most similar key or alias, or with the keys of the same group.

    Names are compared within a group, because a long group makes any two of its keys look alike.
    """
    group, _, name = key.rpartition(".")
    siblings = {known_key.rpartition(".")[2]: known_key for known_key in _keys_in(group, known)}
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    found = [siblings[name] for name in close]
    if not found:
        found = [known_key for known_key in known if known_key.rpartition(".")[2] == name]
    if not found and not siblings:
        found = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if found:
        return f"Did you mean {' or '.join(map(repr, found))}?"
    elsewhere = list(itertools.chain.from_iterable(NAMES_ELSEWHERE.values()))
    for alias in difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.8):
        if ours := our_key(alias, known):
            return _use(ours, known)
    if group and len(siblings) > MAX_LISTED:
        return f"--help lists the keys of {group}."
    if group and siblings:
        return f"Available in {group}: {', '.join(sorted(siblings))}."
    return f"Available: {', '.join(sorted(_keys_in('', known)))}."


def _keys_in(group: str, known: Collection[str]) -> set[str]:
    return {key for key in known if key.rpartition(".")[0] == group}
