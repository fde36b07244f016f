"""Weights of icefall's ASR_LLM recipes, read by renaming keys.

The layout is that of `egs/speech_llm/ASR_LLM/whisper_llm_zh` in the public repository (2024). DeepSpeed's zero_to_fp32 writes what is
trained to `pytorch_model.bin`: `encoder_projector.*`, the LLM's adapters by PEFT's names, and the encoder by OpenAI's names where it was
fine-tuned. The chat is ChatML without a system turn, with `<speech>` before one prompt. Frames behind the last full stack are dropped. The
scale of the adapters is in train.py alone: alpha 16.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from asrllm.atomic import new_folder
from asrllm.errors import UserError
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.models.asr_llm.serialization import in_base, parameters_on_meta, weight_source
from asrllm.models.auto import read_state
from asrllm.models.build import describe_model
from asrllm.models.encoders.whisper_weights import from_openai
from asrllm.models.interop.auden import KEYS as AUDEN_KEYS
from asrllm.models.model_args import EncoderPart, LlmPart, LoraPart, ModelConfig
from asrllm.models.pretrained import empty_llm
from asrllm.models.state_dict import check_state, is_adapter, without_second_names
from asrllm.tensor_files import write_file

KEYS = {
    theirs: ours for theirs, ours in AUDEN_KEYS.items() if theirs.startswith("encoder_projector.")
}
POSITIONS = "audio_encoder.embed_positions.weight"
AUDIO_TOKEN, PROMPT, LORA_ALPHA = "<speech>", "请转写音频为文字", 16


def import_icefall(
    file: Path,
    output: Path,
    *,
    encoder: str,
    llm: str,
    lora_alpha: int = LORA_ALPHA,
    prompt: str = PROMPT,
) -> None:
    """Write a directory as a run leaves it, with pretrained.pt; what was frozen stays in the base models.

    encoder, llm: the base models of that training. Raises UserError naming a key that is not known, or what does not fit.
    """
    state = renamed(read_state(file), str(file))
    processor = describe(state, encoder=encoder, llm=llm, lora_alpha=lora_alpha, prompt=prompt)
    state = checked(processor.config, state, str(file))
    with new_folder(output) as partial:
        processor.save_pretrained(partial)
        processor.config.save_pretrained(partial)
        write_file(weight_source(state, {}), partial / "pretrained.pt")


def renamed(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """icefall's keys -> ours."""
    ours, encoder = dict[str, Tensor](), dict[str, Tensor]()
    for key, tensor in ((key.removeprefix("module."), tensor) for key, tensor in state.items()):
        if key in KEYS:
            ours[KEYS[key]] = tensor
        elif key.startswith("encoder."):
            encoder[key] = tensor
        elif key.startswith("llm."):
            ours[key] = tensor
        else:
            raise UserError(f"{where!r}: {key!r} is no key of icefall's ASR_LLM that is known here")
    if lacking := sorted(set(KEYS.values()) - ours.keys()):
        raise UserError(
            f"{where!r} lacks the projector's {lacking[0]!r}: give a file of icefall's ASR_LLM, such as pytorch_model.bin"
        )
    return ours | {
        f"audio_encoder.{key}": tensor for key, tensor in from_openai(encoder, where).items()
    }


def checked(config: AsrLlmConfig, state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The weights of the described model: all of the projector and of the adapters, and of the encoder and the LLM all or none. POSITIONS
    are a buffer of OpenAI's Whisper, which DeepSpeed's converter writes of a frozen encoder too.

    Raises UserError naming a key that is missing, unexpected or of another shape.
    """
    with parameters_on_meta():
        model = AsrLlmModel(config, llm=empty_llm(config.llm or {}))
    state = without_second_names(model, state, where)
    based = [
        part
        for part in ("audio_encoder", "llm")
        if not any(in_base(key, part) for key in state.keys() - {POSITIONS})
    ]
    expected = model.weights()
    needed = [
        key
        for key in expected
        if key != POSITIONS and not any(in_base(key, part) for part in based)
    ]
    check_state(
        state,
        expected,
        f"the weights of {where!r}",
        "give the encoder and the LLM of that training",
        needed=needed,
    )
    return state


def describe(
    state: Mapping[str, Tensor], *, encoder: str, llm: str, lora_alpha: int, prompt: str
) -> AsrLlmProcessor:
    """What training would have been configured as; ranks, layers and stacked frames are those of the weights."""
    lora = None
    if factors := {
        name: tensor for name, tensor in state.items() if is_adapter(name) and ".lora_A." in name
    }:
        targets = sorted({name.split(".lora_A.")[0].rpartition(".")[2] for name in factors})
        rank = next(iter(factors.values())).shape[0]
        lora = LoraPart(r=rank, lora_alpha=lora_alpha, lora_dropout=0.0, target_modules=targets)
    hidden, stacked = state["projector.mlp.linear1.weight"].shape

    config = ModelConfig(
        audio_encoder=EncoderPart(
            model_type="whisper", pretrained_model=encoder, frozen=True, lora=None
        ),
        llm=LlmPart(
            model_type=None, pretrained_model=llm, frozen=True, lora=lora, chat_template="chatml"
        ),
        projector="mlp",
        projector_hidden_size=hidden,
        audio_encoder_projector_ds_rate=1,
        audio_token=AUDIO_TOKEN,
        tag_audio_boundary=False,
        frozen_parameters=[],
        exclude_from_checkpoint=[],
    )
    processor = describe_model(config, pad_to_30s=False, prompts=(prompt,))
    width = (processor.config.audio_encoder or {})["d_model"]
    if stacked % width:
        raise UserError(
            f"the projector takes {stacked} numbers, which are no whole frames of {width} of the encoder {encoder!r}: give its own"
        )
    processor.config.audio_encoder_projector_ds_rate = stacked // width
    processor.config.drop_ragged_frames = True
    return processor
