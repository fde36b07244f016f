"""Write the LLM's adapter to files of its own, in the format of PEFT."""

import copy
from pathlib import Path

from asrllm.errors import UserError
from asrllm.models.asr_llm.merging import adapted_layers, weight_source
from asrllm.models.asr_llm.network import AsrLlmNetwork
from asrllm.models.state_dict import StateDict, plain_name
from asrllm.tensor_files import write_file

ADAPTER = "adapter"  # subdirectory of a saved model
PEFT_PREFIX = "base_model.model."  # begins the names of weights in PEFT's files


def check_separable(model: AsrLlmNetwork) -> None:
    """Raise UserError unless the LLM has an adapter, and is itself part of a saved model."""
    if not model.config.lora:
        raise UserError("separate_adapter=True, but the LLM has no adapter. Save without it.")
    if "llm" in (model.config.exclude_from_checkpoint or []):
        raise UserError(
            "separate_adapter=True, but exclude_from_checkpoint excludes the llm, to which the "
            "adapter belongs. Save without separate_adapter."
        )


def write_adapter(model: AsrLlmNetwork, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    PeftModel.from_pretrained and vLLM apply them to a saved model, whose LLM is named `llm`.

    Args:
        model: a model with an adapter in its LLM.
        folder: the directory to write, which must not exist.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir()
    state: StateDict = {}
    for name, tensor in get_peft_model_state_dict(model.llm, save_embedding_layers=False).items():
        state[f"{PEFT_PREFIX}llm.{name.removeprefix(PEFT_PREFIX)}"] = tensor
    write_file(weight_source(state, {}), folder / "adapter_model.safetensors")
    config = copy.deepcopy(model.llm.peft_config["default"])
    # the whole model has more layers with such names, in the encoder
    names = [plain_name(name) for name in adapted_layers(model) if name.startswith("llm.")]
    config.target_modules = names
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.inference_mode = True
    config.base_model_name_or_path = None  # a path of this machine, and of another model
    config.save_pretrained(folder)
