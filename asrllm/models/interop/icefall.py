"""Import weights of icefall's ASR_LLM recipes by renaming keys.

The layout is that of `egs/speech_llm/ASR_LLM/whisper_llm_zh` in the public repository (2024).
DeepSpeed's zero_to_fp32 writes the trained weights to `pytorch_model.bin`: `encoder_projector.*`,
the LLM's adapters by PEFT's names and, if it was fine-tuned, the encoder by OpenAI's names. The
chat is ChatML without a system turn, with `<speech>` before a single prompt. Frames after the last
full stack are dropped. The scale of the adapters is only in train.py: alpha is 16.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from asrllm.atomic import new_folder
from asrllm.defaults import ICEFALL_LORA_ALPHA, ICEFALL_PROMPT
from asrllm.errors import UserError
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.loading import base_weights
from asrllm.models.asr_llm.merging import weight_source
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.models.auto import read_state
from asrllm.models.build import build_processor
from asrllm.models.encoders.whisper_weights import from_openai
from asrllm.models.interop.auden import AUDEN_KEYS
from asrllm.models.meta_device import parameters_on_meta
from asrllm.models.model_args import PRETRAINED_PARTS, EncoderPart, LlmPart, LoraPart, ModelConfig
from asrllm.models.pretrained import empty_llm
from asrllm.models.state_dict import StateDict, check_state, is_adapter, without_second_names
from asrllm.tensor_files import write_file

# icefall's key: the key here
ICEFALL_KEYS = {
    theirs: ours for theirs, ours in AUDEN_KEYS.items() if theirs.startswith("encoder_projector.")
}
POSITIONS = "audio_encoder.embed_positions.weight"
GIVE_ICEFALL = "Give a file of icefall's ASR_LLM, for example pytorch_model.bin."
ICEFALL_AUDIO_TOKEN = "<speech>"


def import_icefall(
    file: Path,
    output: Path,
    *,
    encoder: str,
    llm: str,
    lora_alpha: int = ICEFALL_LORA_ALPHA,
    prompt: str = ICEFALL_PROMPT,
) -> None:
    """Write a directory like that of a run, with pretrained.pt.

    Weights that were frozen stay in the base models.

    Args:
        file: icefall's weights.
        output: the directory.
        encoder: the Whisper model used in that training.
        llm: the LLM used in that training.
        lora_alpha: alpha of the adapters.
        prompt: the prompt of that training.

    Raises:
        UserError: a key is unknown, or the weights do not fit the base models.
    """
    state = from_icefall_names(read_state(file), str(file))
    processor = icefall_processor(
        state, encoder=encoder, llm=llm, lora_alpha=lora_alpha, prompt=prompt
    )
    state = checked(processor.config, state, str(file))
    with new_folder(output) as partial:
        processor.save_pretrained(partial)
        processor.config.save_pretrained(partial)
        write_file(weight_source(state, {}), partial / "pretrained.pt")


def from_icefall_names(state: Mapping[str, Tensor], where: str) -> StateDict:
    """Rename icefall's keys.

    Args:
        state: the weights.
        where: their file, for error messages.

    Raises:
        UserError: a key is unknown, or one of the projector's is missing.
    """
    ours: StateDict = {}
    encoder: StateDict = {}
    for theirs, tensor in state.items():
        key = theirs.removeprefix("module.")
        if key in ICEFALL_KEYS:
            ours[ICEFALL_KEYS[key]] = tensor
        elif key.startswith("encoder."):
            encoder[key] = tensor
        elif key.startswith("llm."):
            ours[key] = tensor
        else:
            raise UserError(f"{where!r}: the key {key!r} is not supported. {GIVE_ICEFALL}")
    missing = sorted(set(ICEFALL_KEYS.values()) - ours.keys())
    if missing:
        raise UserError(f"{where!r} has no {missing[0]!r} of the projector. {GIVE_ICEFALL}")
    for key, tensor in from_openai(encoder, where).items():
        ours[f"audio_encoder.{key}"] = tensor
    return ours


def checked(config: AsrLlmConfig, state: Mapping[str, Tensor], where: str) -> StateDict:
    """Check that weights fit the described model, and return them without second names.

    They must contain the whole projector and all adapters, and of the encoder and the LLM either
    everything or nothing. POSITIONS are a buffer in OpenAI's Whisper, which DeepSpeed's converter
    writes for a frozen encoder too.

    Args:
        config: the model's configuration.
        state: the weights under our names.
        where: their file, for error messages.

    Raises:
        UserError: a key is missing, unexpected or has another shape.
    """
    with parameters_on_meta():
        model = AsrLlmModel(config, llm=empty_llm(config.llm or {}))
    state = without_second_names(model, state, where)
    found = state.keys() - {POSITIONS}
    based = [part for part in PRETRAINED_PARTS if not base_weights(found, [part])]
    expected = model.weights()
    needed = expected.keys() - {POSITIONS} - base_weights(expected, based)
    what = f"the weights of {where!r}"
    fix = "Give the encoder and the LLM of that training."
    check_state(state, expected, what, fix, needed=needed)
    return state


def icefall_processor(
    state: Mapping[str, Tensor],
    *,
    encoder: str,
    llm: str,
    lora_alpha: int,
    prompt: str,
) -> AsrLlmProcessor:
    """Return the description of the trained model.

    Ranks, adapted layers and the number of stacked frames are derived from the weights.

    Args:
        state: the weights under our names.
        encoder: the Whisper model used in that training.
        llm: the LLM used in that training.
        lora_alpha: alpha of the adapters.
        prompt: the prompt of that training.
    """
    hidden, stacked = state["projector.mlp.linear1.weight"].shape
    config = ModelConfig(
        audio_encoder=EncoderPart(
            model_type="whisper", pretrained_model=encoder, frozen=True, lora=None
        ),
        llm=LlmPart(
            model_type=None,
            pretrained_model=llm,
            frozen=True,
            lora=_adapters(state, lora_alpha),
            chat_template="chatml",
        ),
        projector="mlp",
        projector_hidden_size=hidden,
        audio_encoder_projector_ds_rate=1,
        audio_token=ICEFALL_AUDIO_TOKEN,
        tag_audio_boundary=False,
        frozen_parameters=[],
        exclude_from_checkpoint=[],
    )
    processor = build_processor(config, pad_to_30s=False, prompts=(prompt,))
    width = (processor.config.audio_encoder or {})["d_model"]
    if stacked % width:
        raise UserError(
            f"the projector's input has the width {stacked}, which is not a multiple of {width}, "
            f"the width of the encoder {encoder!r}. Give the encoder of that training."
        )
    processor.config.audio_encoder_projector_ds_rate = stacked // width
    processor.config.drop_ragged_frames = True
    return processor


def _adapters(state: Mapping[str, Tensor], lora_alpha: int) -> LoraPart | None:
    factors = [name for name in state if is_adapter(name) and ".lora_A." in name]
    if not factors:
        return None
    targets = {name.split(".lora_A.")[0].rpartition(".")[2] for name in factors}
    rank = state[factors[0]].shape[0]
    return LoraPart(r=rank, lora_alpha=lora_alpha, lora_dropout=0.0, target_modules=sorted(targets))
