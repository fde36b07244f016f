"""Make the tar members of an utterance, KEY.flac and KEY.json."""

import io
import json
import tarfile
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import soundfile

from asrllm.data.audio_file import OutsideError, decoder_error
from asrllm.data.index import MAX_DURATION_ERROR
from asrllm.data.keys import tar_key
from asrllm.data.sources import RejectedError, Utterance
from asrllm.data.sources.utterance import check_installed
from asrllm.data.tars import field_problem, nul_problem, unify_line_ends
from asrllm.defaults import STORED_EXTENSIONS
from asrllm.errors import UserError

MAX_TEXT_BYTES = 10_000
# (reason, detail) of a waveform with such values
NON_FINITE = ("non_finite_audio", "the audio contains NaN or infinite values")
FIELD_ORDER = (
    "text",
    "duration",
    "sampling_rate",
    "lang",
    "corpus",
    "speaker",
    "recording",
    "prompt",
    "task",
    "hotwords",
)
Codec = Literal["flac", "keep"]


def write_sample(tar: tarfile.TarFile, sample: dict[str, Any]) -> None:
    """Append one sample to a tar, with the same bytes as `webdataset.TarWriter`.

    webdataset itself would import torch, which takes 2 s in every worker process.

    Args:
        tar: a tar that is open for writing.
        sample: `__key__`, and the content of each member by its extension.
    """
    for extension in sorted(sample):
        if extension == "__key__":
            continue
        member = tarfile.TarInfo(f"{sample['__key__']}.{extension}")
        member.size = len(sample[extension])
        member.mode = 0o444
        tar.addfile(member, io.BytesIO(sample[extension]))


def make_sample(
    utterance: Utterance, fields: dict[str, Any], codec: Codec = "flac"
) -> dict[str, Any]:
    """Return the tar members of an utterance, as `write_sample` takes them.

    Args:
        utterance: the utterance.
        fields: default fields of its JSON.
        codec: see write_shards.

    Raises:
        RejectedError: the utterance cannot be used.
    """
    key = tar_key(utterance.key)
    text = unify_line_ends(utterance.text).strip()
    _check_without_audio(utterance, key, text)
    wave, rate = _load(utterance)
    duration = len(wave) / rate
    stated = utterance.duration
    if stated is not None and abs(duration - stated) > MAX_DURATION_ERROR:
        raise RejectedError(
            "duration_mismatch",
            f"the source says {stated:.3f} s, the audio has {duration:.3f} s",
        )
    measured = {"text": text, "duration": duration, "sampling_rate": rate}
    described = fields | utterance.fields | measured
    if problem := field_problem(described):
        raise RejectedError("bad_field", problem)
    content = _encode_json(described)
    extension, audio = _audio_member(utterance, wave, rate, codec)
    return {"__key__": key, extension: audio, "json": content}


def _encode_json(fields: Mapping[str, Any]) -> bytes:
    """Return the content of a KEY.json, with its fields in FIELD_ORDER."""
    ordered = {name: fields[name] for name in (*FIELD_ORDER, *fields) if name in fields}
    try:
        return json.dumps(ordered, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RejectedError(
            "broken_text", f"the transcript or a field is not UTF-8 text: {error}"
        ) from error


def _check_without_audio(utterance: Utterance, key: str, text: str) -> None:
    """Raise RejectedError for problems that can be found without reading the audio."""
    if utterance.problem is not None:
        raise RejectedError(*utterance.problem)
    if not key or key.endswith("/") or not key.isprintable():
        raise RejectedError("bad_key", f"the key {utterance.key!r} cannot be a file name")
    if not text:
        raise RejectedError("empty_text", "the transcript is empty")
    if problem := nul_problem(utterance.fields | {"text": text}):
        raise RejectedError("broken_text", problem)
    if len(text.encode("utf-8", "replace")) > MAX_TEXT_BYTES:
        raise RejectedError("long_text", f"the transcript has more than {MAX_TEXT_BYTES} bytes")


def _load(utterance: Utterance) -> tuple[np.ndarray, int]:
    """Return the waveform (samples,) and the sampling rate in Hz.

    Raises:
        RejectedError: the audio cannot be used.
        UserError: a package that reads it is missing.
    """
    try:
        wave, rate = utterance.load()
    except RejectedError:
        raise
    except UserError as error:
        reason = "outside_audio" if isinstance(error, OutsideError) else "unreadable_audio"
        raise RejectedError(reason, str(error)) from error
    except Exception as error:  # decoders raise many types; each affects one utterance
        check_installed(error, f"the utterance {utterance.key!r}")
        detail = f"{type(error).__name__}: {decoder_error(error)}"
        raise RejectedError("unreadable_audio", detail) from error
    if not len(wave):
        raise RejectedError("empty_audio", "the audio has no samples")
    if not np.isfinite(wave).all():
        raise RejectedError(*NON_FINITE)
    return wave, rate


def _audio_member(
    utterance: Utterance,
    wave: np.ndarray,
    rate: int,
    codec: Codec,
) -> tuple[str, bytes]:
    """Return the extension and the content of the audio member."""
    if codec == "keep" and utterance.file is not None:
        extension = utterance.file.suffix.lower().removeprefix(".")
        if extension in STORED_EXTENSIONS:
            return extension, utterance.file.read_bytes()
    flac = io.BytesIO()
    peak = np.abs(wave).max()
    if peak > 1:  # 16 bits would clip it
        wave = wave / peak
    try:
        soundfile.write(flac, wave, rate, format="FLAC", subtype="PCM_16")
    except (RuntimeError, ValueError) as error:
        raise RejectedError("not_encodable", f"{rate} Hz as FLAC: {error}") from error
    return "flac", flac.getvalue()
