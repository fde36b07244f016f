"""Read the configuration and the weights of Hugging Face's audio encoders."""

import re
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig

from asrllm.defaults import ENCODER_KEY, RATE
from asrllm.errors import UserError
from asrllm.integrity import verify_folder
from asrllm.models.config_numbers import MAX_ENCODER_NUMBER, check_numbers
from asrllm.models.encoders.hf_families import HF_PARTS, HfFamily, feature_sizes, hf_family
from asrllm.models.encoders.zipformer.weights import load_tensors
from asrllm.models.fingerprint import pretrained_weight_files
from asrllm.models.hub_files import DOWNLOAD_AGAIN, check_kind, check_not_quantized
from asrllm.models.plain_tensors import open_tensors
from asrllm.models.state_dict import StateDict
from asrllm.text_files import JsonObject, read_json_object, reading

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
# What transformers writes about the file, and not about the model.
NOT_FIELDS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
# Its own SpecAugment and the dropping of layers: data.augment does the first for every encoder, and
# the second would make the ranks' random numbers differ from one process to the next.
TURNED_OFF = (
    "mask_time_prob",
    "mask_feature_prob",
    "layerdrop",
    "encoder_layerdrop",
)
# settings of a feature extractor that our code has as constants, by kind of features
CONSTANTS: dict[str, JsonObject] = {
    "wave": {},
    "seamless": {"stride": 2},
    "parakeet": {"hop_length": 160, "n_fft": 512, "win_length": 400, "preemphasis": 0.97},
    "mel": {"hop_length": 160, "n_fft": 400, "n_window": 50, "dither": 0.0},
    "mel of 30 s": {"hop_length": 160, "n_fft": 400, "chunk_length": 30},
}
# weights that only pretraining and the model's own SpecAugment use
UNUSED_WEIGHT = "masked_spec_embed"
# old names of weight norm's parameters
OLD_NAMES = {
    ".weight_g": ".parametrizations.weight.original0",
    ".weight_v": ".parametrizations.weight.original1",
}
LAYER_NAME = re.compile(r"(?:encoder\.)?layers\.(\d+)\.")


def read_hf(path: str) -> tuple[JsonObject, StateDict]:
    """Return an encoder's fields, and its weights by transformers' names below `model.`.

    Args:
        path: the directory of the encoder, or of a model that contains it.

    Raises:
        UserError: the files are corrupted, or the encoder is not supported.
    """
    folder = Path(path)
    config = _read_config(folder)
    family = hf_family_at(config, folder)
    preprocessor = _read_preprocessor(folder)
    _check_preprocessor(family, config, preprocessor, folder)
    state = _read_weights(family, folder)
    _check_layers(config, state, folder)
    return {"config": config, "preprocessor": preprocessor}, state


def _read_config(folder: Path) -> JsonObject:
    """Return the encoder's part of config.json, with all fields that transformers knows."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(
            f"{ENCODER_KEY}={str(folder)!r} has no config.json. Give a Hugging Face directory."
        )
    verify_folder(folder)
    check_kind(folder, ENCODER_KEY)
    config = read_json_object(path, "the encoder's configuration")
    check_not_quantized(config, path)
    part = HF_PARTS.get(str(config.get("model_type")))
    if part is not None:
        inner = config.get(part)
        if not isinstance(inner, dict):
            raise UserError(f"{str(path)!r} has no {part!r}. {DOWNLOAD_AGAIN}")
        config = inner
    hf_family_at(config, folder)
    config = _without_vocabulary(config)
    fix = f"Correct it. {DOWNLOAD_AGAIN}"
    check_numbers(config, MAX_ENCODER_NUMBER, f"{str(path)!r}: ", fix)
    with reading(path, "the encoder's configuration", fix):
        fields = AutoConfig.for_model(**config).to_dict()
    for name in NOT_FIELDS:
        fields.pop(name, None)
    for name in TURNED_OFF:
        if name in fields:
            fields[name] = 0.0
    return _without_vocabulary(fields)


def _without_vocabulary(fields: JsonObject) -> JsonObject:
    """Return fields without a vocabulary of null: an LLM needs one, and an encoder does not."""
    return {k: v for k, v in fields.items() if not (k == "vocab_size" and v is None)}


def hf_family_at(config: JsonObject, folder: Path) -> HfFamily:
    """Return the family of the encoder in a directory, or raise UserError."""
    try:
        return hf_family(config)
    except UserError as error:
        raise UserError(f"{ENCODER_KEY}={str(folder)!r}: {error}") from error


def _read_preprocessor(folder: Path) -> JsonObject:
    """Return the settings of the feature extractor, without which the weights are useless."""
    if (folder / PREPROCESSOR).exists():
        return read_json_object(folder / PREPROCESSOR, "the feature extractor's configuration")
    if (folder / PROCESSOR).exists():
        whole = read_json_object(folder / PROCESSOR, "the processor's configuration")
        if isinstance(whole.get("feature_extractor"), dict):
            return whole["feature_extractor"]
    raise UserError(
        f"{ENCODER_KEY}={str(folder)!r} has no {PREPROCESSOR}, which describes the features. Copy "
        "it from the model that the weights belong to."
    )


def _check_preprocessor(
    family: HfFamily, config: JsonObject, preprocessor: JsonObject, folder: Path
) -> None:
    """Raise UserError for features that our code does not compute, or that the encoder lacks."""
    where = f"{ENCODER_KEY}={str(folder)!r}: the feature extractor has"
    rate = preprocessor.get("sampling_rate", RATE)
    if rate != RATE:
        raise UserError(
            f"{where} sampling_rate={rate!r}, but audio is read at {RATE} Hz. Choose an encoder "
            f"for {RATE} Hz."
        )
    for name, value in CONSTANTS[family.features].items():
        if preprocessor.get(name, value) != value:
            raise UserError(
                f"{where} {name}={preprocessor[name]!r}, but only {value!r} is supported. Choose "
                "another encoder."
            )
    width, _ = feature_sizes(config)
    size = preprocessor.get("feature_size", width)
    if family.features == "seamless":
        size = 2 * preprocessor.get("num_mel_bins", width // 2)
    if size != width:
        raise UserError(
            f"{where} {size} numbers in a feature, but the encoder in config.json takes {width}. "
            "Give files of the same model."
        )
    if family.features == "wave" and not isinstance(preprocessor.get("do_normalize", True), bool):
        raise UserError(
            f"{where} do_normalize={preprocessor['do_normalize']!r}. Use true or false."
        )


def _read_weights(family: HfFamily, folder: Path) -> StateDict:
    """Return the encoder's weights. Those of other parts of the model are not read."""
    tensors: StateDict = {}
    names: dict[Path, list[str]] = {}
    for file in pretrained_weight_files(folder):
        if file.suffix != ".safetensors":
            tensors |= load_tensors(file)
            continue
        with open_tensors(file) as opened:
            names[file] = list(opened.keys())
    every = [*tensors, *(name for found in names.values() for name in found)]
    prefix = ""
    for candidate in family.prefixes:
        if any(name.startswith(candidate) for name in every):
            prefix = candidate
            break
    for file, found in names.items():
        with open_tensors(file) as opened:
            for name in found:
                if name.startswith(prefix):
                    tensors[name] = opened.get_tensor(name)
    state: StateDict = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix) and name.removeprefix(prefix) != UNUSED_WEIGHT:
            state[f"model.{_present_name(name.removeprefix(prefix))}"] = tensor
    return state


def _present_name(name: str) -> str:
    for old, new in OLD_NAMES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _check_layers(config: JsonObject, state: dict[str, Tensor], folder: Path) -> None:
    """Check the number of layers before a model is built: a million layers take minutes."""
    layers = {int(m[1]) for name in state if (m := LAYER_NAME.match(name.removeprefix("model.")))}
    for field in ("encoder_num_hidden_layers", "encoder_layers", "num_hidden_layers"):
        if field in config:
            if len(layers) != config[field]:
                raise UserError(
                    f"{str(folder / 'config.json')!r} has {field}={config[field]}, but the weights "
                    f"have {len(layers)} layers. Give files of the same model."
                )
            return
