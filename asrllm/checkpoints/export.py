"""Write a model as a directory to publish: complete, optionally with its parts, and with a card."""

import json
import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import yaml
from torch import nn

from asrllm.atomic import new_folder
from asrllm.defaults import MAX_SHARD_SIZE
from asrllm.errors import UserError
from asrllm.integrity import write_checksums
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.merging import merged_names, weight_source
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.asr_llm.network import PARTS
from asrllm.models.asr_llm.saving import write_generation_config
from asrllm.models.auto import AutoModel, chosen_weights, model_folder
from asrllm.models.base_models import BasePaths, public_name
from asrllm.models.encoders.hf_weights import PREPROCESSOR
from asrllm.tensor_files import TensorSource, read_about, write_sharded
from asrllm.text_files import JsonObject, read_json_object, read_yaml

logger = logging.getLogger(__name__)
PACKAGES = ("asrllm", "torch", "transformers", "peft", "deepspeed")
# how the names of an encoder's weights begin here, and in its own framework
ENCODER_PREFIXES = {"whisper": ("", "model.encoder."), "hf": ("model.", "")}
PIPELINE_EXAMPLE = """\
```python
from transformers import pipeline

transcribe = pipeline("automatic-speech-recognition", "{0}", trust_remote_code=True)
print(transcribe("speech.wav")["text"])
```

With [asrllm](https://pypi.org/project/asrllm) installed, for files of any length:

"""
ASRLLM_EXAMPLE = """\
```python
from asrllm import AutoModel

AutoModel.from_pretrained("{0}").transcribe(["speech.wav"])
```
"""
PEFT_EXAMPLE = """\
The LLM is the base model. Its adapter for speech is in the subdirectory `adapter`:

```python
import soundfile
from peft import PeftModel
from transformers import AutoModel, AutoProcessor

processor = AutoProcessor.from_pretrained("{0}", trust_remote_code=True)
base = AutoModel.from_pretrained("{0}", trust_remote_code=True)
model = PeftModel.from_pretrained(base, "{0}", subfolder="adapter")
audio, rate = soundfile.read("speech.wav", dtype="float32")  # mono, 16 kHz
inputs = processor.apply_transcription_request(audio=[audio])
print(processor.batch_decode(model.generate(**inputs), skip_special_tokens=True))
```
"""
ERROR_RATES_HEAD = [
    "| test set | WER % | 95 % | CER % | utterances | normalizer | decoding |",
    "| --- | --- | --- | --- | --- | --- | --- |",
]


def export(
    source: Path,
    output: Path,
    *,
    weights: str | Path | None = None,
    dtype: str = "bfloat16",
    merge_adapter: bool = True,
    separate_adapter: bool = False,
    parts: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    repository: str | None = None,
    base_models: BasePaths | None = None,
) -> None:
    """Write a self-contained directory with a model card. It appears when it is complete.

    Args:
        source: an exp_dir, a weights file in one, or an exported directory.
        output: the directory to write.
        weights: the weights file; default: the newest of the run.
        dtype: dtype of the weights.
        merge_adapter: merge the adapters into their layers, so that transformers can load the
            directory without this package. A model without adapters is written as it is.
        separate_adapter: write the LLM's adapter to the subdirectory `adapter` in PEFT's format
            instead of merging it.
        parts: also write audio_encoder/, projector/ and llm/ separately, with merged adapters.
        max_shard_size: maximum size of each file.
        repository: hub repository from which the card's example loads the model.
        base_models: paths of base models that moved, as for AutoModel. The directory names the base
            models by these paths.

    Raises:
        UserError: the model cannot be loaded, or the output is not empty.
    """
    folder = source.parent if source.is_file() else model_folder(source)
    chosen = chosen_weights(source if source.is_file() else folder, weights)
    with new_folder(output) as partial:
        model = AutoModel.from_pretrained(
            folder, weights=chosen, dtype=dtype, base_models=base_models
        )
        # before the weights are written, which takes longer
        has_adapters = bool(model.config.lora or model.config.audio_encoder_lora)
        merges = merge_adapter and has_adapters and not separate_adapter
        excluded = model.config.exclude_from_checkpoint
        is_portable = not excluded and (merges or not has_adapters)
        name = repository or output.name
        example = PEFT_EXAMPLE.format(name) if separate_adapter else own_example(name, is_portable)
        card = model_card(
            model.config,
            folder,
            name,
            weights=chosen,
            example=example,
            library="transformers" if is_portable or separate_adapter else "asrllm",
        )
        model.save_pretrained(
            partial,
            merge_adapter=merges,
            separate_adapter=separate_adapter,
            max_shard_size=max_shard_size,
        )
        if parts:
            save_parts(model, partial, max_shard_size)
        (partial / "README.md").write_text(card, encoding="utf-8")


def save_parts(model: AsrLlmModel, folder: Path, max_shard_size: int | str) -> None:
    """Write the parts of a model to subdirectories.

    Training reads the encoder as `model.audio_encoder.pretrained_model`, transformers reads the
    LLM, and the projector has its own names.

    Args:
        model: the model.
        folder: the directory with the subdirectories.
        max_shard_size: maximum size of each file.
    """
    config = model.config
    encoder = config.audio_encoder or {}
    projector = {
        "projector": config.projector,
        "projector_hidden_size": config.projector_hidden_size,
        "input_size": model.audio_encoder.output_dim,
        "output_size": model.llm.config.get_text_config().hidden_size,
        "audio_encoder_projector_ds_rate": config.audio_encoder_projector_ds_rate,
    }
    for part in PARTS:
        (folder / part).mkdir()
        prefixes = ("", "")
        if part == "audio_encoder":
            prefixes = ENCODER_PREFIXES.get(encoder["model_type"], prefixes)
        source = part_weights(model, part, *prefixes)
        write_sharded(source, folder / part, max_shard_size=max_shard_size, what=part)
    described = {"config.json": encoder}
    if encoder["model_type"] == "hf":
        described = {"config.json": encoder["config"], PREPROCESSOR: encoder["preprocessor"]}
    for name, fields in described.items():
        (folder / "audio_encoder" / name).write_text(json.dumps(fields, indent=2) + "\n")
    (folder / "projector" / "config.json").write_text(json.dumps(projector, indent=2) + "\n")
    model.causal_lm.config.save_pretrained(folder / "llm")
    write_generation_config(model.llm.generation_config, folder / "llm")
    model.require_processor().tokenizer.save_pretrained(folder / "llm")
    for part in PARTS:
        # last, because the checksums cover all files of a directory
        write_checksums(folder / part)


def part_weights(model: AsrLlmModel, part: str, own: str, prefix: str) -> TensorSource:
    """Return the weights of a part. Adapters are merged into their layers one at a time.

    Args:
        model: the model.
        part: its part.
        own: removed from the beginning of every name.
        prefix: prepended to every name.
    """
    state = model.weights()
    adapted: dict[str, nn.Module] = {}
    if model.config.lora or model.config.audio_encoder_lora:
        state, adapted = merged_names(model, state)
    names: dict[str, str] = {}
    for key in state:
        if key.startswith(f"{part}."):
            names[key] = prefix + key.removeprefix(f"{part}.{own}")
    return weight_source(
        {name: state[key] for key, name in names.items()},
        {name: adapted[key] for key, name in names.items() if key in adapted},
    )


def model_card(
    config: AsrLlmConfig,
    source: Path,
    name: str,
    *,
    weights: Path | None,
    example: str,
    library: str,
) -> str:
    """Return README.md in the format of Hugging Face's model cards.

    It states the base models, training data, prompts, error rates and versions as far as they are
    known.

    Args:
        config: the model's configuration.
        source: the run's directory, or an exported directory.
        name: the name to load the model by.
        weights: the run's weights file. Error rates of other weights are left out.
        example: how to load the model, in Markdown.
        library: the package that loads it.
    """
    lines = [
        *card_head(name, library=library),
        *example.splitlines(),
        "",
        *parts_table(config),
        "",
        *sources_paragraph(read_about(weights) if weights else {}),
        "The licences of the base models and of the training data apply to it.",
        "",
    ]
    training = training_data(source)
    if training:
        lines += ["## Training data", "", *training, ""]
    measured = error_rates(source, weights.name if weights else "")
    if measured:
        lines += ["## Error rates", "", *measured, ""]
    if config.prompts:
        lines += ["## Prompts", "", *(f"- {prompt}" for prompt in config.prompts), ""]
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    lines += ["## Versions", "", versions, ""]
    return "\n".join(lines)


def card_head(name: str, *, library: str) -> list[str]:
    """Return the metadata and the title of a card.

    Args:
        name: the name to load the model by.
        library: the package that loads it.
    """
    metadata = {
        "library_name": library,
        "pipeline_tag": "automatic-speech-recognition",
        "tags": ["asrllm", "speech", "llm"],
    }
    return [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {name}",
        "",
        "An audio encoder, a projector and a large language model that transcribe speech.",
        "",
    ]


def own_example(name: str, is_portable: bool) -> str:
    """Return the example that loads a model, in Markdown.

    Args:
        name: the name to load the model by.
        is_portable: whether transformers loads the model without this package.
    """
    own = ASRLLM_EXAMPLE.format(name)
    return PIPELINE_EXAMPLE.format(name) + own if is_portable else own


def parts_table(config: AsrLlmConfig) -> list[str]:
    """Return a table of the model's parts and what they were trained from."""
    unknown = "random weights" if config.stored else "see above"  # of a run, or exported again
    bases: dict[str, str] = {}
    for part, base in (config.base_models or {}).items():
        bases[part] = public_name(base["path"])
    encoder = (config.audio_encoder or {}).get("model_type")
    llm = (config.llm or {}).get("model_type")
    frames = config.audio_encoder_projector_ds_rate
    return [
        "| part | kind | trained from |",
        "| --- | --- | --- |",
        f"| audio_encoder | {encoder} | {bases.get('audio_encoder', unknown)} |",
        f"| llm | {llm} | {bases.get('llm', 'see above')} |",
        f"| projector | {config.projector}, {frames} frames per token | |",
    ]


def sources_paragraph(about: Mapping[str, object]) -> list[str]:
    """Return a paragraph about the checkpoints that the weights come from, if they are known.

    Args:
        about: the record in the weights file.
    """
    sources = about.get("sources", [])
    assert isinstance(sources, list)
    names = [source["checkpoint"] for source in sources]
    if not names:
        return []
    if about.get("mean") == "every step between":
        begin = f"after {names[0]} " if len(names) > 1 else ""
        text = f"The weights are the mean over all steps {begin}up to {names[-1]}."
    elif len(names) > 1:
        text = f"The weights are the mean of {', '.join(names[:-1])} and {names[-1]}."
    else:
        text = f"The weights are those of {names[0]}."
    return [text, ""]


def training_data(exp_dir: Path) -> list[str]:
    """Return a table of the run's corpora. It is empty if the run's files no longer exist."""
    path = exp_dir / "config.yaml"
    if not path.is_file():
        return []
    lines = ["| corpus | hours | language |", "| --- | --- | --- |"]
    try:
        run = read_yaml(path, "the run's configuration")
        data_config = run.get("data", {}).get("train_data_config")
        if not data_config:
            return []
        corpora: list[JsonObject] = read_yaml(data_config, "the list of training data")
        for corpus in corpora:
            name = Path(str(corpus.get("shards") or corpus.get("manifest"))).name
            language = corpus.get("lang", "") or ""
            lines.append(f"| {name} | {corpus.get('hours', '')} | {language} |")
    except (UserError, TypeError, AttributeError) as error:
        logger.warning(
            "the model card has no table of training data, because the files that %s names cannot "
            "be read (%s). Export on the machine of the run.",
            path,
            error,
        )
        return []
    return lines


def error_rates(exp_dir: Path, weights: str) -> list[str]:
    """Return a table of the error rates that evaluations of the run measured.

    Args:
        exp_dir: the run's directory.
        weights: name of the weights file. Other weights are left out.
    """
    rows: dict[tuple[str, str], str] = {}
    # the newest results come last, and results.json repeats them
    for path in sorted(exp_dir.glob("*/results*.json"), key=lambda path: path.stat().st_mtime):
        decoding = path.parent.name
        try:
            measured = read_json_object(path, "the results")
            for test, result in measured.items():
                if Path(result["weights"]).name == weights:
                    rows[decoding, test] = _error_rate(test, result, decoding)
        except (UserError, KeyError, TypeError, AttributeError) as error:
            logger.warning(
                "the model card has no error rates of %s, which does not have the format of "
                "'asrllm evaluate' (%r)",
                path,
                error,
            )
    if not rows:
        return []
    return [*ERROR_RATES_HEAD, *rows.values()]


def _error_rate(test: str, result: JsonObject, decoding: str) -> str:
    low, high = result["wer_ci95"]
    rates = f"{result['wer']:.2f} | {low:.2f} to {high:.2f} | {result['cer']:.2f}"
    return f"| {test} | {rates} | {result['utterances']} | {result['normalizer']} | {decoding} |"


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a directory to the Hugging Face hub.

    Args:
        folder: the directory.
        repository: the repository, which is created if it does not exist.
        private: create it as a private repository.

    Returns:
        The address of the repository.

    Raises:
        UserError: the hub cannot be reached, or rejects the upload.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Model exported by asrllm"
        )
    except Exception as error:  # the hub's own, or of its HTTP client, which depends on its version
        problem = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"--push-to-hub {repository!r} failed: {problem}. Log in with 'hf auth login' and "
            f"check the name. {str(folder)!r} is complete. Upload it with "
            f"'hf upload {repository} {folder}'."
        ) from error
    return str(address)
