"""Write the files with which transformers loads a saved directory without this package."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import asrllm
from asrllm.data.prompts import for_transcripts
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.decoding_options import decoding_config
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.models.base_models import public_name
from asrllm.models.encoders.registry import ENCODERS
from asrllm.models.portable.bundle import Bundle, Definition
from asrllm.text_files import JsonObject

AUTO_MAP = {
    "AutoConfig": "configuration_asrllm.AsrLlmHubConfig",
    "AutoModel": "modeling_asrllm.AsrLlmForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_asrllm.AsrLlmForConditionalGeneration",
    "AutoModelForSpeechSeq2Seq": "modeling_asrllm.AsrLlmForConditionalGeneration",
}
PROCESSOR_AUTO_MAP = {
    "AutoProcessor": "processing_asrllm.AsrLlmHubProcessor",
    "AutoFeatureExtractor": "processing_asrllm.AsrLlmFeatureExtractor",
}
PIPELINES = {
    "automatic-speech-recognition": {
        "impl": "pipeline_asrllm.AsrLlmPipeline",
        "pt": ["AutoModelForSpeechSeq2Seq"],
        "default": {"model": None},
        "type": "multimodal",
    }
}
NO_VERSION = 'CODE_VERSION = ""'
LICENSE = "SPDX-License-Identifier: Apache-2.0"
# what the saved code does without: files of other formats, training, and resampling
DROPPED = (
    "AsrLlmConfig.num_audio_tokens",
    "AsrLlmConfig.sample_limits",
    "ChatRenderer.encode_training",
    *(
        f"{encoder.__name__}.{name}"
        for encoder in ENCODERS.values()
        for name in ("read_pretrained", "sizes", "start_from_scratch")
    ),
    "ZipformerEncoder.from_pretrained",
    "ZipformerEncoder.load_state_dict",
)
FEATURES_ONLY = ("frame_lengths", "make_features")
REPLACEMENTS: dict[Definition, str] = {
    ("asrllm.audio.waves", "ExtractsFeatures"): """class ExtractsFeatures(nn.Module):
    \"\"\"An encoder that computes the features of raw audio.\"\"\"

    features: nn.Module""",
    ("asrllm.data.waveforms", "resample"): """def resample(
    wave: np.ndarray, rate: int
) -> np.ndarray:
    \"\"\"Return the samples unchanged: their rate is checked before.\"\"\"
    return wave""",
    ("asrllm.models.attention", "BACKENDS"): """BACKENDS = {"sdpa": _sdpa}""",
    ("asrllm.models.attention", "choose_backend"): """def choose_backend(
    query: Tensor, value: Tensor, options: AttentionOptions
) -> str:
    \"\"\"Return the backend that every machine has.\"\"\"
    return "sdpa\"""",
    ("asrllm.models.attention", "unsupported_reason"): """def unsupported_reason(
    backend: str, query: Tensor, value: Tensor, options: AttentionOptions
) -> str:
    \"\"\"Return "": the backend works everywhere.\"\"\"
    return \"\"""",
    ("asrllm.collator.template_process", "TemplateProcess"): """def TemplateProcess(
    render: Callable[..., str]
) -> Callable[..., str]:
    \"\"\"Return the function: the chat template of a saved model was used in training.\"\"\"
    return render""",
}


def code_files(encoder: str) -> dict[str, str]:
    """Return the Python files of a saved directory by name.

    The version in them is the package's, with a digest of the code.

    Args:
        encoder: name of the audio encoder in ENCODERS.
    """
    files = _files_without_version(encoder)
    name = "configuration_asrllm.py"
    files[name] = files[name].replace(NO_VERSION, f'CODE_VERSION = "{code_version(encoder)}"')
    return files


def code_version(encoder: str) -> str:
    """Return the version of the code in a saved directory."""
    text = "".join(_files_without_version(encoder).values())
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{asrllm.__version__}+{digest}"


def _files_without_version(encoder: str) -> dict[str, str]:
    kind = ENCODERS[encoder].__name__
    replacements = REPLACEMENTS | {
        ("asrllm.models.encoders.registry", "encoder_class"): (
            "def encoder_class(model_type: str) -> type[AudioEncoder]:\n"
            '    """Return the class of the audio encoder."""\n'
            f"    return {kind}"
        )
    }
    shared = {"AsrLlmHubConfig": "configuration_asrllm"}
    return {
        "configuration_asrllm.py": _file("configuration", ["AsrLlmHubConfig"], replacements),
        "modeling_asrllm.py": _file(
            "modeling", ["AsrLlmForConditionalGeneration"], replacements, elsewhere=shared
        ),
        "processing_asrllm.py": _file(
            "processing",
            ["AsrLlmHubProcessor", "AsrLlmFeatureExtractor"],
            replacements,
            dropped=_all_but_features(kind),
        ),
        "pipeline_asrllm.py": _file("pipeline", ["AsrLlmPipeline"], replacements),
    }


def _all_but_features(kind: str) -> list[str]:
    """Return the methods of an encoder that the processor does not need."""
    (encoder,) = [encoder for encoder in ENCODERS.values() if encoder.__name__ == kind]
    return [f"{kind}.{name}" for name in vars(encoder) if name not in FEATURES_ONLY]


def _file(
    module: str,
    names: Sequence[str],
    replacements: dict[Definition, str],
    *,
    dropped: Sequence[str] = (),
    elsewhere: dict[str, str] | None = None,
) -> str:
    entries = [(f"asrllm.models.portable.{module}", name) for name in names]
    bundle = Bundle(
        entries, replacements=replacements, dropped=[*DROPPED, *dropped], elsewhere=elsewhere
    )
    title = f"The {module} of a model saved by asrllm {asrllm.__version__}. {LICENSE}"
    return bundle.text(title)


def describe_code(config: AsrLlmConfig) -> None:
    """Add to a configuration where transformers finds the classes. The configuration is changed."""
    config.auto_map = AUTO_MAP
    config.custom_pipelines = PIPELINES
    config.code_version = code_version((config.audio_encoder or {})["model_type"])
    # without paths on the machine of training
    llm_fields = dict(config.llm or {})
    llm_fields.pop("_name_or_path", None)
    config.llm = llm_fields
    bases: JsonObject = {}
    for part, base in (config.base_models or {}).items():
        bases[part] = base | {"path": public_name(base["path"])}
    config.base_models = bases or None


def write_code(config: AsrLlmConfig, processor: AsrLlmProcessor, folder: Path) -> None:
    """Write the Python files, and the configurations of the processor and of generation.

    Args:
        config: the model's configuration.
        processor: the model's processor.
        folder: the directory.
    """
    encoder = config.audio_encoder or {}
    for name, text in code_files(encoder["model_type"]).items():
        (folder / name).write_text(text, encoding="utf-8")
    shared = {"processor_class": "AsrLlmHubProcessor", "auto_map": PROCESSOR_AUTO_MAP}
    extractor = {
        **shared,
        "feature_extractor_type": "AsrLlmFeatureExtractor",
        "audio_encoder": encoder | {"pad_to_30s": config.pad_to_30s},
    }
    _write_json(folder / "preprocessor_config.json", extractor)
    prompts = for_transcripts(config.prompts or [], config.prompt_tasks)
    trained = (config.prompt_languages or {}).items()
    languages = {text: language for text, language in trained if text in prompts}
    options = {
        **shared,
        "audio_token": config.audio_token,
        "frames_per_token": config.audio_encoder_projector_ds_rate,
        "drop_ragged_frames": config.drop_ragged_frames,
        "tag_audio_boundary": config.tag_audio_boundary,
        "prompts": prompts or None,
        "prompt_languages": languages or None,
        "hotwords_template": config.hotwords_template,
    }
    _write_json(folder / "processor_config.json", options)
    settings = decoding_config(None, None, processor.renderer.stop_ids)
    settings.save_pretrained(folder)


def _write_json(path: Path, values: JsonObject) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
