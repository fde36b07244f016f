"""Defaults and choices that the command line shows and the models apply.

This module imports nothing of the package.
"""

from typing import Literal

MAX_NEW_TOKENS = 200  # tokens of one answer
MAX_TOKENS_PER_SECOND = 15.0  # an answer has at most this many tokens per second of audio, plus ten
REPETITION_GUARD = 32  # tokens of a repetition before decoding stops
BEAM_SIZE = 4  # hypotheses of a beam search
BATCH_SECONDS = 240.0  # seconds of audio in a decoded batch, padding included
STEP_TIMEOUT = 1800.0  # seconds without progress after which a run or an evaluation stops
WHISPER_WINDOW = 30.0  # seconds to which Whisper pads
HOTWORDS_TEMPLATE = "Hotwords: {words}."
ICEFALL_PROMPT = "请转写音频为文字"  # of icefall's recipes, as their LoRA alpha
ICEFALL_LORA_ALPHA = 16
MAX_SHARD_SIZE = "5GB"  # of each weight file in a directory
TRANSCRIPT_FORMATS = ("txt", "json", "srt", "vtt")
KEEP_SILENCE = "keep_silence"
# whether Whisper's features are padded to 30 s; "keep_silence": the LLM reads the padding too
PadTo30s = bool | Literal["keep_silence"]
LoraMean = Literal["product", "factors"]  # how adapters are averaged
EngineName = Literal["torch", "vllm"]  # what decodes
RATE = 16000  # Hz; every waveform reaches the model at this rate
# configuration keys with the paths of the pretrained models, by part
ENCODER_KEY = "model.audio_encoder.pretrained_model"
LLM_KEY = "model.llm.pretrained_model"
BASE_MODEL_KEYS = {
    "audio_encoder": ENCODER_KEY,
    "llm": LLM_KEY,
}
STORED_EXTENSIONS = ("flac", "wav", "opus", "ogg", "mp3")  # formats that shards store as they are
# extensions of audio files in a directory or tar; those after sph need ffmpeg
AUDIO_EXTENSIONS = (
    *STORED_EXTENSIONS,
    *("aiff", "aif", "aifc", "au", "caf", "w64", "oga", "sph"),
    *("m4a", "mp4", "aac", "webm", "mkv", "mka", "mov", "wma", "amr", "3gp", "ac3", "eac3", "ts"),
    *("flv", "mp2", "tta", "wv", "spx", "ape", "dts", "avi", "m4b"),
    *("raw", "pcm"),  # rejected with what to do
)
MAX_WORKERS = 1024  # reading processes of one process; more exceed the limits of most systems
MIN_DESCRIPTORS = 64  # open files; the sockets of a run need about as many
