"""Names of configuration keys: those of other frameworks, and hints for unknown ones."""

import difflib
from collections.abc import Collection, Mapping

from asrllm.errors import UserError

USE = "Use {}: {}."  # our key, its meaning
BATCH_BUDGET = (
    "data.sampler.max_tokens",
    "audio and text tokens in a micro-batch of one rank, for any number of utterances",
)
BATCH_DURATION = ("data.sampler.max_duration", "seconds of audio in a micro-batch of one rank")
ACCUMULATION = ("trainer.gradient_accumulation_steps", "micro-batches of an optimizer step")
ENCODER_PATH = ("model.audio_encoder.pretrained_model", "a directory, file or hub id")
PRECISION = ("trainer.precision", "the number format of weights and activations")
ATTENTION = ("model.llm.attention", "the implementation of attention over packed rows")
CLIPPING = ("trainer.gradient_clipping", "the largest norm of a step's gradient")
BETAS = ("trainer.betas", "a list of both decay rates, for example [0.9,0.98]")
DEEPSPEED = ("trainer.deepspeed_config", "a DeepSpeed JSON, for example ds_configs/zero2.json")
RESUME = ("trainer.resume", "auto, never or the path of a checkpoint")
SAVE_EVERY = ("trainer.save_every", "steps between checkpoints")
WANDB = ("trainer.wandb.mode", "whether Weights & Biases logs the run")
TRAINING_DATA = ("data.train_data_config", "a YAML list of corpora")
VALIDATION_DATA = ("data.valid_data_config", "a YAML list of corpora")
NOISE = ("data.augment.noise.source", "a directory of audio files, with data.augment.noise.prob")
LORA_RANK = ("model.llm.lora.r", "the rank of the LLM's adapters, 0 without them")
PROJECTOR = ("model.projector", "the kind of projector")
MAX_LISTED = 12  # keys of a group in a message
# keys of Hugging Face, NeMo, icefall and SLAM-LLM, with our key and its meaning
ALIASES = {
    "learning_rate": ("trainer.lr", "the peak learning rate"),
    "base_lr": ("trainer.lr", "the peak learning rate"),
    "num_train_epochs": ("trainer.num_epochs", "passes over the data"),
    "max_epochs": ("trainer.num_epochs", "passes over the data"),
    "epochs": ("trainer.num_epochs", "passes over the data"),
    "max_steps": ("trainer.num_steps", "optimizer steps"),
    "total_steps": ("trainer.num_steps", "optimizer steps"),
    "batch_size": BATCH_BUDGET,
    "per_device_train_batch_size": BATCH_BUDGET,
    "train_micro_batch_size_per_gpu": BATCH_BUDGET,
    "batch_size_training": BATCH_BUDGET,
    "max_duration": BATCH_DURATION,
    "batch_duration": BATCH_DURATION,
    "gradient_accumulation": ACCUMULATION,
    "gradient_accumulation_steps": ACCUMULATION,
    "accumulate_grad_batches": ACCUMULATION,
    "accum_grad": ACCUMULATION,
    "max_grad_norm": CLIPPING,
    "grad_clip": CLIPPING,
    "gradient_clip_val": CLIPPING,
    "warmup_ratio": ("trainer.warmup_steps", "steps of linear warm-up, as a number"),
    "lr_scheduler_type": ("trainer.schedule.name", "the learning-rate schedule"),
    "optim": ("trainer.optimizer.name", "the optimizer"),
    "bf16": PRECISION,
    "fp16": PRECISION,
    "use_fp16": PRECISION,
    "deepspeed": DEEPSPEED,
    "output_dir": ("exp_dir", "the directory that the run writes to"),
    "save_steps": SAVE_EVERY,
    "save_every_n": SAVE_EVERY,
    "save_total_limit": ("trainer.keep_last_k", "checkpoints to keep"),
    "keep_last_k": ("trainer.keep_last_k", "checkpoints to keep"),
    "logging_steps": ("trainer.log_every", "steps between log records"),
    "eval_steps": ("trainer.valid_every", "steps between validations"),
    "resume_from_checkpoint": RESUME,
    "dataloader_num_workers": ("data.num_workers", "reading processes of each rank"),
    "lora_r": LORA_RANK,
    "rank": LORA_RANK,
    "lora_rank": LORA_RANK,
    "lora_alpha": ("model.llm.lora.lora_alpha", "the scale of the LLM's adapters times their rank"),
    "lora_dropout": ("model.llm.lora.lora_dropout", "the dropout before the LLM's adapters"),
    "freeze_encoder": ("model.audio_encoder.frozen", "true: train only its adapters, if any"),
    "freeze_llm": ("model.llm.frozen", "true: train only its adapters, if any"),
    "encoder_name": ("model.audio_encoder.model_type", "the kind of audio encoder"),
    "llm_path": ("model.llm.pretrained_model", "a directory or hub id"),
    "model_name_or_path": ("model.llm.pretrained_model", "a directory or hub id"),
    "train_data_path": TRAINING_DATA,
    "beam_size": ("num_beams", "hypotheses of beam search"),
    "ckpt_path": ("checkpoint.model.filename", "a state dict file"),
    "speech_encoder_path_or_name": ENCODER_PATH,
    "encoder_path": ENCODER_PATH,
    "pretrained_asr": ENCODER_PATH,
    "llm_path_or_name": ("model.llm.pretrained_model", "a directory or hub id"),
    "pretrained_llm": ("model.llm.pretrained_model", "a directory or hub id"),
    "encoder_projector": PROJECTOR,
    "encoder_projector_ds_rate": (
        "model.audio_encoder_projector_ds_rate",
        "encoder frames that make one audio token",
    ),
    "audio_locator_tag": ("model.audio_token", "the text that marks the place of an audio"),
    "prompt_format": ("model.llm.chat_template", "null for the LLM's own, or chatml"),
    "log_interval": ("trainer.log_every", "steps between log records"),
    "log_every_n_steps": ("trainer.log_every", "steps between log records"),
    "valid_interval": ("trainer.valid_every", "steps between validations"),
    "validation_interval": ("trainer.valid_every", "steps between validations"),
    "val_check_interval": ("trainer.valid_every", "steps between validations"),
    "save_top_k": ("trainer.keep_last_k", "checkpoints to keep, the newest ones"),
    "num_workers_dataloader": ("data.num_workers", "reading processes of each rank"),
    "val_data_path": VALIDATION_DATA,
    "freeze_vit": ("model.audio_encoder.frozen", "true: train only its adapters, if any"),
    "vit_lr": ("trainer.lr_of.audio_encoder", "the peak learning rate of the audio encoder"),
    "aligner_lr": ("trainer.lr_of.projector", "the peak learning rate of the projector"),
    "torch_dtype": PRECISION,
    "attn_impl": ATTENTION,
    "attn_implementation": ATTENTION,
    "use_flash_attn": ATTENTION,
    "start_epoch": RESUME,
    "resume_if_exists": RESUME,
    "manifest_dir": TRAINING_DATA,
    "dataset": TRAINING_DATA,
    "val_dataset": VALIDATION_DATA,
    "enable_spec_aug": ("data.augment.spec_augment.prob", "the probability of SpecAugment"),
    "enable_musan": NOISE,
    "musan": NOISE,
    "enable_speed_perturb": ("data.augment.speed", "a list of factors, for example [0.9,1.0,1.1]"),
    "use_lora": LORA_RANK,
    "use_peft": LORA_RANK,
    "unfreeze_llm": ("model.llm.frozen", "false: train the whole LLM"),
    "use_wandb": WANDB,
    "create_wandb_logger": WANDB,
    "report_to": WANDB,
    "modality_adapter": PROJECTOR,
    "min_lr": ("trainer.min_lr_ratio", "the last learning rate as a ratio of its peak"),
    "strategy": DEEPSPEED,
    "every_n_train_steps": SAVE_EVERY,
    "freeze_aligner": ("model.frozen_parameters", "[projector.*]: do not train the projector"),
    "adam_beta1": BETAS,
    "adam_beta2": BETAS,
    "max_length": ("data.filter.max_duration", "seconds; longer utterances are dropped"),
    "clip_grad_norm": CLIPPING,
}


def unknown_key(key: str, known: Collection[str], where: str = "") -> UserError:
    """Return an error for an unknown key, which hints at the right one.

    Args:
        key: the unknown key.
        known: the keys of the configuration.
        where: the place of the key, which messages put before it.
    """
    return UserError(f"{where}unknown key {key!r}. {_hint(key, known)}")


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


def _hint(key: str, known: Collection[str]) -> str:
    """Return what to write instead of an unknown key."""
    ours, meaning = ALIASES.get(key.rpartition(".")[2], ("", ""))
    if key == "experiment":
        return "Write +experiment=NAME, which reads experiment/NAME.yaml in --config-dir."
    if ours in known:
        return USE.format(ours, meaning)
    return _similar_key(key, known)


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
    for alias in difflib.get_close_matches(name, ALIASES, n=1, cutoff=0.8):
        if ALIASES[alias][0] in known:
            return USE.format(*ALIASES[alias])
    if group and len(siblings) > MAX_LISTED:
        return f"--help lists the keys of {group}."
    if group and siblings:
        return f"Available in {group}: {', '.join(sorted(siblings))}."
    return f"Available: {', '.join(sorted(_keys_in('', known)))}."


def _keys_in(group: str, known: Collection[str]) -> set[str]:
    return {key for key in known if key.rpartition(".")[0] == group}
