"""Read configurations and tokenizers from directories in the layout of the Hugging Face hub.

Every call of transformers that reads a user's directory is in this module. A directory that is
corrupted or of another kind causes a UserError that names the file. Code in a directory is never
executed.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from asrllm.errors import UserError
from asrllm.integrity import verify_folder
from asrllm.models.state_dict import NOT_QUANTIZED, check_dense
from asrllm.tensor_files import BAD_TENSORS, SAFETENSORS
from asrllm.text_files import (
    JsonObject,
    check_no_bom,
    check_no_pointer,
    read_json_object,
    read_text,
    reading,
)

DOWNLOAD_AGAIN = "Download it again."
CORRECT_CONFIG = "Correct it, or download it again."
# Files that transformers reads as JSON objects. It ignores some of them if they are corrupted.
JSON_FILES = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
# Up to 30 MB, and therefore parsed only to explain an error.
LARGE_JSON_FILES = ("tokenizer.json", "vocab.json")
# Read by transformers as text. It rejects a byte-order mark, or makes it a part of a token.
TEXT_FILES = (
    *JSON_FILES,
    *LARGE_JSON_FILES,
    "preprocessor_config.json",
    "processor_config.json",
    "merges.txt",
    "vocab.txt",
)
BINARY_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
WEIGHTS = ("*.safetensors", "*.bin")
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the dtypes of plain weights
WHOLE_MODELS = ("*.safetensors.index.json", "model*.safetensors", "pytorch_model*.bin")
COPY_AGAIN = "Copy the directory again, or download it again."
GIVE_ORIGINAL = "Give the original Hugging Face directory with config.json and *.safetensors."
# What a directory without Hugging Face weights is, by a pattern of its files.
OTHER_KINDS = {
    "*.gguf": "a GGUF model",
    "*.onnx": "an ONNX model",
    "onnx/*.onnx": "an ONNX model",
    "shared_vocabulary.*": "a CTranslate2 model",
    "vocabulary.json": "a CTranslate2 model",
    "vocabulary.txt": "a CTranslate2 model",
}
# The LLM's own generation settings in a saved directory, whose generation_config.json has those of
# transcription.
LLM_SETTINGS = "llm_generation_config.json"
# Settings of a config.json that change only what transformers returns. Other values would give
# outputs without names, or need an attention that returns its weights.
PLAIN_OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def check_directory(folder: str | Path, key: str) -> None:
    """Check the small files of a pretrained model's directory before anything is built from them.

    Args:
        folder: the directory.
        key: the configuration key that names it, for the error message.

    Raises:
        UserError: a file is corrupted or is a git-LFS pointer, or the directory has another format.
    """
    folder = Path(folder)
    verify_folder(folder)
    check_kind(folder, key)
    if not (folder / "config.json").exists():
        raise UserError(f"{key}={str(folder)!r} has no config.json. {GIVE_ORIGINAL}")
    check_text_files(folder)
    for pattern in WEIGHTS:
        for file in sorted(folder.glob(pattern)):
            with reading(file, "the weights"):
                check_no_pointer(file)
            check_stored_dtypes(file)


def check_stored_dtypes(file: Path) -> None:
    """Raise UserError if a weight is sparse, or quantized.

    transformers would convert a quantized weight without its scale. A corrupted file passes:
    `verify_weights` reports it.
    """
    for name, dtype in _dtypes(file):
        if name.endswith(".weight") and dtype not in FLOATS:
            raise UserError(f"{str(file)!r}: {name!r} has the dtype {dtype}. {NOT_QUANTIZED}")


def _dtypes(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the names and dtypes of a file's weights without reading the weights."""
    if file.suffix == ".safetensors":
        with contextlib.suppress(SafetensorError), safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                yield name, tensors.get_slice(name).get_dtype()
        return
    try:
        state = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except BAD_TENSORS:
        return
    for name, tensor in state.items() if isinstance(state, dict) else ():
        if isinstance(tensor, torch.Tensor):
            check_dense({name: tensor}, file)
            yield name, SAFETENSORS.get(tensor.dtype, str(tensor.dtype))


def check_kind(folder: Path, key: str) -> None:
    """Raise UserError if a directory contains adapters, or a model in another program's format."""
    check_no_adapters(folder, key)
    if _has_model(folder):
        return
    for pattern, kind in OTHER_KINDS.items():
        if any(folder.glob(pattern)):
            raise UserError(
                f"{key}={str(folder)!r} is {kind}, which cannot be trained. {GIVE_ORIGINAL}"
            )


def check_no_adapters(folder: Path, key: str) -> None:
    """Raise UserError if a directory contains adapters, beside a model or alone."""
    path = folder / "adapter_config.json"
    if not path.exists():
        return
    if _has_model(folder):
        raise UserError(
            f"{key}={str(folder)!r} contains a model and adapter_config.json, whose adapters are "
            "not loaded. Merge the adapters into the model, or remove adapter_config.json."
        )
    base = read_json_object(path, "the adapter's configuration").get("base_model_name_or_path")
    raise UserError(
        f"{key}={str(folder)!r} contains PEFT adapters (adapter_config.json), not a whole "
        f"model. Give their base model, {base!r}, or a model with merged adapters."
    )


def _has_model(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in WHOLE_MODELS)


def check_text_files(folder: Path) -> None:
    """Raise UserError if a JSON file or a chat template is corrupted or a git-LFS pointer."""
    for name in JSON_FILES:
        if (folder / name).exists():
            read_json_object(folder / name, "the file")
    for name in (*TEXT_FILES, *BINARY_FILES):
        if (folder / name).exists():
            with reading(folder / name, "the file"):
                check_no_pointer(folder / name)
    for name in TEXT_FILES:
        if (folder / name).exists():
            check_no_bom(folder / name)
    for file in [folder / TEMPLATE_FILE, *sorted((folder / TEMPLATE_FOLDER).glob("*"))]:
        if file.exists():
            read_text(file, "the chat template")
            check_no_bom(file)
    if (folder / TEMPLATE_FOLDER).is_file():
        raise UserError(
            f"{str(folder / TEMPLATE_FOLDER)!r} is a file, but must be a directory. Remove it."
        )


def load_hf_config(folder: str | Path, key: str) -> PreTrainedConfig:
    """Return the configuration of a causal LLM's directory.

    Args:
        folder: the directory.
        key: the configuration key that names it, for the error message.

    Raises:
        UserError: config.json is corrupted, or does not describe a causal LLM that transformers
            knows.
    """
    path = Path(folder) / "config.json"
    fields = read_json_object(path, "the LLM's configuration")
    check_not_quantized(fields, path)
    kind = fields.get("model_type")
    _check_model_type(fields, path, key)
    with reading(path, "the LLM's configuration", CORRECT_CONFIG):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **PLAIN_OUTPUTS)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{key}={str(folder)!r} is a {kind!r} model, which is not a causal LLM. Give a causal "
            "LLM."
        )
    return config


def _check_model_type(fields: JsonObject, path: Path, key: str) -> None:
    """Raise UserError if transformers does not know the model_type in a config.json."""
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        if "auto_map" in fields:
            raise UserError(
                f"{key}={str(path.parent)!r} is a {kind!r} model with custom code (auto_map in "
                "config.json), which is never executed. Choose a model that transformers includes."
            )
        raise UserError(
            f"{str(path)!r}: model_type={kind!r} is not a model that transformers "
            f"{transformers.__version__} knows. Correct it, choose another model, or upgrade "
            "transformers."
        )


def check_not_quantized(fields: JsonObject, path: Path) -> None:
    """Raise UserError if a config.json describes quantized weights."""
    method = fields.get("quantization_config")
    if method is None:
        return
    if isinstance(method, dict):
        method = method.get("quant_method")
    raise UserError(
        f"{str(path)!r}: the weights are quantized (quantization_config, {method!r}) and cannot be "
        "trained. Give the model that is not quantized."
    )


def load_tokenizer(
    folder: str | Path, *, config: PreTrainedConfig | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a directory. Its chat template is a single text or None.

    Args:
        folder: the directory.
        config: the model's configuration. It is needed if transformers does not know its kind.

    Raises:
        UserError: a file of the tokenizer is corrupted.
    """
    folder = Path(folder)
    check_text_files(folder)
    options: JsonObject = {"trust_remote_code": False}
    if config is not None:
        options["config"] = config
    try:
        with reading(folder, "the tokenizer in", COPY_AGAIN):
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            _check_special_tokens(tokenizer, folder)
            tokenizer("a", add_special_tokens=False)  # fails if a setting has a wrong type
    except UserError:
        _check_large_files(folder)
        raise
    tokenizer.chat_template = default_template(tokenizer.chat_template, folder)
    return tokenizer


def _check_special_tokens(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise UserError for an empty special token, with which every text is tokenized wrongly."""
    tokens = tokenizer.special_tokens_map
    empty = [name for name in SPECIAL_TOKENS if str(tokens.get(name, name)) == ""]
    if empty:
        raise UserError(
            f"the tokenizer in {str(folder)!r} has an empty {empty[0]!r}. Correct it in "
            "tokenizer_config.json, or set it to null."
        )


def _check_large_files(folder: Path) -> None:
    for name in LARGE_JSON_FILES:
        if (folder / name).is_file():
            read_json_object(folder / name, "the tokenizer's file")


def default_template(found: object, folder: Path) -> str | None:
    """Return the chat template to use. transformers writes chat_template.json for processors.

    Args:
        found: the tokenizer's template: a text, None, or a dict of several templates by name.
        folder: the tokenizer's directory. Its chat_template.json is used if `found` is empty.

    Raises:
        UserError: there are several templates and none is named "default", or one is not a text.
    """
    if not found and (folder / "chat_template.json").is_file():
        found = read_json_object(folder / "chat_template.json", "the file").get("chat_template")
    if isinstance(found, dict):
        if found and "default" not in found:
            raise UserError(
                f"the tokenizer in {str(folder)!r} has the chat templates "
                f"{', '.join(sorted(found))}, but none named 'default'. Rename one."
            )
        found = found.get("default")
    if found is not None and not isinstance(found, str):
        raise UserError(
            f"the chat template of the tokenizer in {str(folder)!r} is {str(found)[:60]!r}, not a "
            "text. Correct 'chat_template' in tokenizer_config.json."
        )
    return found or None


def load_generation_config(folder: str | Path) -> GenerationConfig:
    """Return the LLM's own settings in a directory.

    Raises:
        UserError: the file is corrupted.
    """
    path = Path(folder) / LLM_SETTINGS
    if not path.is_file():
        path = Path(folder) / "generation_config.json"
    read_json_object(path, "the generation settings")
    with reading(path, "the generation settings", "Correct it, or remove it."):
        return GenerationConfig.from_pretrained(folder, config_file_name=path.name)
