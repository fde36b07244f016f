"""A model as a directory for others: whole, its parts by themselves, a card that says what it is."""

import json
import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from asrllm.atomic import new_folder
from asrllm.errors import UserError
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.asr_llm.network import PARTS
from asrllm.models.asr_llm.serialization import merged_names, weight_source, write_generation_config
from asrllm.models.auto import AutoModel, default_weights, model_folder
from asrllm.models.base_models import BasePaths
from asrllm.tensor_files import TensorSource, read_about, write_sharded
from asrllm.text_files import parse_json, read_yaml

logger = logging.getLogger(__name__)
PACKAGES = ("asrllm", "torch", "transformers", "peft", "deepspeed")
KEYS_THERE = {
    "whisper": "model.encoder."
}  # how the weights of an encoder begin in its own framework


def export(
    source: Path,
    output: Path,
    *,
    weights: str | Path | None = None,
    dtype: str = "bfloat16",
    merge_adapter: bool = False,
    parts: bool = False,
    max_shard_size: int | str = "5GB",
    repository: str | None = None,
    base_models: BasePaths | None = None,
) -> None:
    """Write a self-contained directory with a model card; it appears when it is complete.

    source: an exp_dir, a weights file in one, or an exported directory. parts: also audio_encoder/, projector/ and llm/, each by itself,
    with the adapters merged. repository: of the hub, by which the card loads the model. base_models: as for AutoModel; the directory names
    them by these paths.
    """
    folder = source.parent if source.is_file() else model_folder(source)
    chosen = source if source.is_file() else Path(weights) if weights else default_weights(folder)
    with new_folder(output) as partial:
        model = AutoModel.from_pretrained(
            folder, weights=chosen, dtype=dtype, base_models=base_models
        )
        card = model_card(
            model.config, folder, repository or output.name, weights=chosen
        )  # before much is written
        model.save_pretrained(partial, merge_adapter=merge_adapter, max_shard_size=max_shard_size)
        if parts:
            save_parts(model, partial, max_shard_size)
        (partial / "README.md").write_text(card, encoding="utf-8")


def save_parts(model: AsrLlmModel, folder: Path, max_shard_size: int | str) -> None:
    """The encoder as `model.audio_encoder.pretrained_model` reads it, the LLM as transformers does, the projector by its own names."""
    encoder, config = model.config.audio_encoder or {}, model.config
    size = {
        "input_size": model.audio_encoder.output_dim,
        "output_size": model.llm.config.get_text_config().hidden_size,
    }
    projector = {
        "projector": config.projector,
        "projector_hidden_size": config.projector_hidden_size,
    } | size
    projector["audio_encoder_projector_ds_rate"] = config.audio_encoder_projector_ds_rate
    for part in PARTS:
        (folder / part).mkdir()
        source = part_weights(
            model,
            part,
            KEYS_THERE.get(encoder["model_type"], "") if part == "audio_encoder" else "",
        )
        write_sharded(source, folder / part, max_shard_size=max_shard_size, what=part)
    (folder / "audio_encoder" / "config.json").write_text(json.dumps(encoder, indent=2) + "\n")
    (folder / "projector" / "config.json").write_text(json.dumps(projector, indent=2) + "\n")
    model.causal_lm.config.save_pretrained(folder / "llm")
    write_generation_config(model.llm.generation_config, folder / "llm")
    model.require_processor().tokenizer.save_pretrained(folder / "llm")


def part_weights(model: AsrLlmModel, part: str, prefix: str) -> TensorSource:
    """A part's weights without adapters, which are merged into their layers one at a time. prefix: put before every name."""
    state, tuned = model.weights(), dict[str, Any]()
    if model.config.lora or model.config.audio_encoder_lora:
        state, tuned = merged_names(model, state)
    own = {
        key: prefix + key.removeprefix(f"{part}.") for key in state if key.startswith(f"{part}.")
    }
    return weight_source(
        {name: state[key] for key, name in own.items()},
        {name: tuned[key] for key, name in own.items() if key in tuned},
    )


def model_card(config: AsrLlmConfig, source: Path, name: str, *, weights: Path | None) -> str:
    """README.md in the form of Hugging Face's model cards: base models, training data, prompts, error rates, versions; what is known.

    name: by which the model is loaded. weights: the file of the run's that was taken; error rates of others are left out.
    """
    bases = {part: public_name(base["path"]) for part, base in (config.base_models or {}).items()}
    header = {
        "library_name": "asrllm",
        "pipeline_tag": "automatic-speech-recognition",
        "tags": ["asrllm", "speech", "llm"],
    }
    lines = ["---", yaml.safe_dump(header, sort_keys=False).rstrip(), "---", "", f"# {name}", ""]
    lines += [
        "An audio encoder, a projector and a large language model that writes what is said.",
        "",
        "```python",
    ]
    lines += [
        "from asrllm import AutoModel",
        "",
        f'AutoModel.from_pretrained("{name}").transcribe(["speech.wav"])',
        "```",
        "",
    ]
    kinds = {
        "audio_encoder": (config.audio_encoder or {}).get("model_type"),
        "llm": (config.llm or {}).get("model_type"),
    }
    lines += ["| part | kind | trained from |", "| --- | --- | --- |"]
    lines += [
        f"| {part} | {kind} | {bases.get(part, 'see above')} |" for part, kind in kinds.items()
    ]
    lines += [
        f"| projector | {config.projector}, {config.audio_encoder_projector_ds_rate} frames to a token | random weights |",
        "",
    ]
    lines += [
        *made_of(read_about(weights) if weights else {}),
        "The licences of the base models and of the training data apply to it.",
        "",
    ]
    for title, rows in (
        ("Training data", training_data(source)),
        ("Error rates", error_rates(source, weights.name if weights else "")),
    ):
        if rows:
            lines += [f"## {title}", "", *rows, ""]
    if config.prompts:
        lines += ["## Prompts", "", *(f"- {prompt}" for prompt in config.prompts), ""]
    return "\n".join(
        [
            *lines,
            "## Versions",
            "",
            ", ".join(f"{package} {version(package)}" for package in PACKAGES),
            "",
        ]
    )


def public_name(path: str) -> str:
    """A base model's hub id, or its directory's name: where it lay is nobody else's business."""
    cached = next((part for part in Path(path).parts if part.startswith("models--")), None)
    return cached.removeprefix("models--").replace("--", "/", 1) if cached else Path(path).name


def made_of(about: Mapping[str, Any]) -> list[str]:
    """A paragraph on the checkpoints of which the weights are, where their file names them."""
    names = [source["checkpoint"] for source in about.get("sources", [])]
    if not names:
        return []
    if about.get("mean") == "every step between":
        what = f"the mean over all steps {f'after {names[0]} ' if len(names) > 1 else ''}up to {names[-1]}"
    elif len(names) > 1:
        what = f"the mean of {', '.join(names[:-1])} and {names[-1]}"
    else:
        what = f"those of {names[0]}"
    return [f"The weights are {what}.", ""]


def training_data(exp_dir: Path) -> list[str]:
    """A table of the corpora that the run's configuration names, where its files are still there."""
    path = exp_dir / "config.yaml"
    try:
        run = read_yaml(path, "the run's configuration") if path.is_file() else {}
        if not (named := run.get("data", {}).get("train_data_config")):
            return []
        corpora: list[dict[str, Any]] = read_yaml(named, "the list of training data")
        rows = [
            (
                Path(str(c.get("shards") or c.get("manifest"))).name,
                c.get("hours", ""),
                c.get("lang", ""),
            )
            for c in corpora
        ]
    except (UserError, TypeError, AttributeError) as error:
        logger.warning(
            "the model card has no table of training data: what %s names is not there so (%s): export where it ran",
            path,
            error,
        )
        return []
    return [
        "| corpus | hours | language |",
        "| --- | --- | --- |",
        *(f"| {name} | {hours} | {lang or ''} |" for name, hours, lang in rows),
    ]


def error_rates(exp_dir: Path, weights: str) -> list[str]:
    """A table of what evaluations of the run have measured with these weights."""
    rows: dict[tuple[str, str], str] = {}
    # the newest results are last, and are in results.json too
    for path in sorted(exp_dir.glob("*/results*.json"), key=lambda path: path.stat().st_mtime):
        try:
            measured = parse_json(path.read_text(encoding="utf-8"))
            for test, found in measured.items():
                if Path(found["weights"]).name == weights:
                    rows[path.parent.name, test] = _error_rate(test, found, path.parent.name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning(
                "the model card has no error rates of %s, which 'asrllm evaluate' did not write so (%r)",
                path,
                error,
            )
    head = "| test set | WER % | 95 % | CER % | utterances | normalizer | decoding |"
    return [head, "| --- " * 7 + "|", *rows.values()] if rows else []


def _error_rate(test: str, found: Mapping[str, Any], decoding: str) -> str:
    low, high = found["wer_ci95"]
    rates = f"{found['wer']:.2f} | {low:.2f} to {high:.2f} | {found['cer']:.2f}"
    return f"| {test} | {rates} | {found['utterances']} | {found['normalizer']} | {decoding} |"


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a directory to the hub; gives its address. Raises UserError where the hub cannot be reached or refuses."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Model exported by asrllm"
        )
    except (
        Exception
    ) as error:  # the hub's own and its HTTP client's, which is another in other versions
        raise UserError(
            f"--push-to-hub {repository!r} failed ({' '.join(str(error).split())[:200]}): log in with 'hf auth login' and check the name; "
            f"{str(folder)!r} is complete, upload it with 'hf upload {repository} {folder}'"
        ) from error
    return str(address)
