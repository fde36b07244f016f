"""Check the fields of a Lhotse cut's JSON, because Lhotse accepts almost any value.

Without these checks a value of a wrong type raises a Python error that does not name the field, and
a channel that does not exist gives the audio of another channel.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from asrllm.data.audio_file import MAX_RATE, MIN_RATE
from asrllm.data.sources.files import LONGEST_RECORDING, Row, check_encodable
from asrllm.data.sources.utterance import RejectedError
from asrllm.data.tars import SHOWN_FIELD

MAX_CHANNEL = 4096  # microphone arrays have hundreds of channels
MAX_TRACKS = 1000  # Lhotse takes more than 100 s for 20,000
FACTORS = (0.1, 10.0)  # the slowest and fastest that speech is played
# Lhotse's filter for a ratio of rates p/q in lowest terms has some p q taps: 282,000 for 11025 to
# 16000 Hz, but 256 million, several GiB, for a speed of 1.0001 at 16000 Hz
MAX_TAPS = 1 << 24
TELEPHONE_RATE = 8000  # Hz, to which Narrowband resamples
TEXT_SOURCES = ("file", "command", "url", "memory")  # types of audio sources that are a text


def check_cut(row: Row, where: str) -> None:
    """Check the types and values of the fields of a cut, and of the cuts in its tracks.

    Absent fields are left to Lhotse, whose message names them.

    Args:
        row: the JSON object of the cut.
        where: its place, as the beginning of messages.

    Raises:
        RejectedError: a field has a type or value that Lhotse does not expect, a channel does not
            exist, or the cut has no recording.
    """
    if row.get("id") is None:
        raise RejectedError("bad_field", f"{where} has no 'id'")
    if row.get("tracks") == []:
        raise RejectedError("bad_field", f"{where}: 'tracks' is []. It must have a track")
    for name in ("supervisions", "tracks"):
        _check(row, where, name, _is_list_of_objects, "a list of objects")
    count = len(row.get("tracks", []))
    if count > MAX_TRACKS:
        raise RejectedError(
            "bad_field",
            f"{where}: 'tracks' has {count} tracks. At most {MAX_TRACKS} are mixed. Split the cut",
        )
    _check(row, where, "type", _is_text, "a text")
    _check(row, where, "custom", _is_object_or_null, "an object")
    for supervision in row.get("supervisions", []):
        place = _supervision_place(supervision, where)
        _check(supervision, place, "custom", _is_object_or_null, "an object")
        _check(supervision, place, "alignment", _is_object, "an object")
    _check_times(row, where)
    if "recording" in row:
        _check_recording(row["recording"], where)
    _check_channels(row, where)
    for number, track in enumerate(row.get("tracks", [])):
        place = f"{where}: track {number}"
        _check(track, place, "cut", _is_object, "an object")
        _check(track, place, "offset", _is_seconds, "a number of seconds")
        if "cut" in track:
            check_cut(track["cut"], place)


# --- fields ---


def _check(
    row: Row,
    where: str,
    name: str,
    is_valid: Callable[[Any], bool],
    expected: str,
) -> None:
    """Raise RejectedError if a row has a field whose value is not valid.

    Args:
        row: the row.
        where: its place, as the beginning of the message.
        name: the field.
        is_valid: returns whether a value is valid.
        expected: what a valid value is.
    """
    if name not in row or is_valid(row[name]):
        return
    shown = repr(row[name])[:SHOWN_FIELD]
    raise RejectedError("bad_field", f"{where}: {name!r} is {shown}, not {expected}")


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_object_or_null(value: object) -> bool:
    return value is None or isinstance(value, dict)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _is_source_list(value: object) -> bool:
    return bool(value) and _is_list_of_objects(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_seconds(value: Any) -> bool:
    return _is_number(value) and 0 <= value < LONGEST_RECORDING


def _is_start(value: Any) -> bool:
    """Return whether a value is the start of a supervision, which may precede its cut."""
    return _is_number(value) and abs(value) < LONGEST_RECORDING


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_rate(value: Any) -> bool:
    return _is_positive_integer(value) and MIN_RATE <= value <= MAX_RATE


def _is_sample_count(value: Any) -> bool:
    return _is_positive_integer(value) and value < LONGEST_RECORDING * MAX_RATE


def _is_channel(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_CHANNEL


def _is_channel_list(value: Any) -> bool:
    if not isinstance(value, list) or not all(map(_is_channel, value)):
        return False
    return bool(value) and len(set(value)) == len(value)


def _is_channel_or_list(value: Any) -> bool:
    return _is_channel(value) or _is_channel_list(value)


def _is_channel_or_null(value: Any) -> bool:
    return value is None or _is_channel(value)


def _is_channel_list_or_null(value: Any) -> bool:
    return value is None or _is_channel_or_list(value)


# --- times ---


def _check_times(row: Row, where: str) -> None:
    for name in ("start", "duration"):
        _check(row, where, name, _is_seconds, "a number of seconds")
    for supervision in row.get("supervisions", []):
        place = _supervision_place(supervision, where)
        _check(supervision, place, "start", _is_start, "a number of seconds")
        _check(supervision, place, "duration", _is_seconds, "a number of seconds")


def _supervision_place(supervision: Row, where: str) -> str:
    return f"{where}: the supervision {supervision.get('id')!r}"


# --- recordings ---


def _check_recording(recording: Any, where: str) -> None:
    """Raise RejectedError if the recording of a cut is missing or has an unexpected field."""
    if recording is None:
        raise RejectedError("missing_audio", f"{where}: 'recording' is null")
    if not isinstance(recording, dict):
        shown = repr(recording)[:SHOWN_FIELD]
        raise RejectedError("bad_field", f"{where}: 'recording' is {shown}, not an object")
    place = f"{where}: the recording"
    rates = f"an integer of {MIN_RATE} to {MAX_RATE} Hz"
    _check(recording, place, "sampling_rate", _is_rate, rates)
    _check(recording, place, "num_samples", _is_sample_count, "a number of samples")
    _check(recording, place, "duration", _is_seconds, "a number of seconds")
    _check(recording, place, "sources", _is_source_list, "a list of audio sources")
    _check(recording, place, "transforms", _is_list_of_objects, "a list of objects")
    if recording.get("channel_ids") is not None:
        _check(recording, place, "channel_ids", _is_channel_list, "a list of channels")
    for source in recording.get("sources", []):
        check_source(source, place)
    for transform in recording.get("transforms") or []:
        _check_transform(transform, recording, place)


def _check_transform(transform: Row, recording: Row, where: str) -> None:
    """Raise RejectedError if a transform would take much memory.

    Args:
        transform: the JSON object of the transform; Lhotse checks its other fields.
        recording: the JSON object of its recording.
        where: its place, as the beginning of messages.
    """
    name = transform.get("name")
    place = f"{where}: the transform {repr(name)[:SHOWN_FIELD]}"
    _check(transform, place, "kwargs", _is_object, "an object")
    fields = transform.get("kwargs", {})
    slowest, fastest = FACTORS
    if name in ("Speed", "Tempo"):
        _check(fields, place, "factor", _is_factor, f"a number of {slowest} to {fastest}")
    rates = f"an integer of {MIN_RATE} to {MAX_RATE} Hz"
    for rate in ("source_sampling_rate", "target_sampling_rate"):
        _check(fields, place, rate, _is_rate, rates)
    if isinstance(fields.get("rir"), dict):
        _check_recording(fields["rir"], place)
    taps = _tap_count(str(name), fields, recording.get("sampling_rate", MIN_RATE))
    if taps > MAX_TAPS:
        shown = repr(fields)[:SHOWN_FIELD]
        raise RejectedError(
            "bad_field",
            f"{place} with {shown} needs a filter of {taps} values. Use rates or a factor with a "
            "small ratio, for example 0.9 or 1.1",
        )


def _is_factor(value: Any) -> bool:
    return _is_number(value) and FACTORS[0] <= value <= FACTORS[1]


def _tap_count(name: str, fields: Row, rate: int) -> int:
    """Return the approximate number of taps of the filter with which Lhotse resamples.

    Args:
        name: name of the transform.
        fields: its arguments.
        rate: sampling rate of its recording in Hz, after the transform.
    """
    if name == "Speed" and "factor" in fields:
        first = round(rate * fields["factor"])
        second = rate
    elif name in ("Resample", "Narrowband"):
        first = fields.get("source_sampling_rate", MIN_RATE)
        second = fields.get("target_sampling_rate", TELEPHONE_RATE)
    else:
        return 0
    common = math.gcd(first, second)
    return (first // common) * (second // common)


def check_source(source: Row, where: str) -> None:
    """Raise RejectedError if an audio source has an unexpected field.

    Args:
        source: the JSON object of the source.
        where: its place, as the beginning of messages.
    """
    place = f"{where}: an audio source"
    _check(source, place, "type", _is_text, "a text")
    _check(source, place, "channels", _is_channel_list, "a list of channels")
    if source.get("type") in TEXT_SOURCES:
        _check(source, place, "source", _is_text, "a text")
        if source.get("source") == "":
            raise RejectedError("missing_audio", f"{place}: 'source' is empty")
        check_encodable(source.get("source", ""), f"{place}: 'source'")


# --- channels ---


def _check_channels(row: Row, where: str) -> None:
    """Raise RejectedError if a cut or a supervision has a channel that does not exist."""
    expected = "a channel or a list of channels"
    if _is_mono(row):
        _check(row, where, "channel", _is_channel_or_null, "a channel")
    else:
        _check(row, where, "channel", _is_channel_or_list, expected)
    is_mono = _is_mono(row)
    is_valid = _is_channel_list_or_null if is_mono else _is_channel_or_list
    for supervision in row.get("supervisions", []):
        place = _supervision_place(supervision, where)
        _check(supervision, place, "channel", is_valid, expected)
    if "channel" not in row:
        return
    recording = row.get("recording")
    recorded = None
    if recording is not None and "sources" in recording:
        recorded = _recorded_channels(recording)
    if row["channel"] is None:
        if recorded is None:
            return
        own = recorded
    else:
        own = channel_list(row["channel"])
        if recorded is not None:
            _check_contained(own, recorded, f"{where}: 'channel'", "recording")
    for supervision in row.get("supervisions", []):
        channel = supervision.get("channel", None if is_mono else 0)  # Lhotse's default is 0
        if channel is None:
            continue
        channels = channel_list(channel)
        place = _supervision_place(supervision, where)
        _check_contained(channels, own, f"{place}: 'channel'", "cut")


def _is_mono(row: Row) -> bool:
    return row.get("type") in ("MonoCut", "Cut")


def fill_channels(row: Row) -> None:
    """Set the null or absent channels of a mono cut in place, after `check_cut`.

    A null channel of a cut means all channels of its recording, as Lhotse reads them. A supervision
    without a channel has those of its cut.
    """
    if not _is_mono(row) or "channel" not in row:
        return
    recording = row.get("recording")
    if row["channel"] is None and recording is not None:
        recorded = sorted(_recorded_channels(recording))
        if len(recorded) == 1:
            row["channel"] = recorded[0]
        elif recorded:
            row["type"] = "MultiCut"
            row["channel"] = recorded
    for supervision in row.get("supervisions", []):
        if supervision.get("channel") is None and row["channel"] is not None:
            supervision["channel"] = row["channel"]


def _check_contained(
    channels: Sequence[int], present: Sequence[int], where: str, owner: str
) -> None:
    missing = [channel for channel in channels if channel not in present]
    if missing:
        shown = channels[0] if len(channels) == 1 else list(channels)
        problem = f"{where} is {shown}, but its {owner} has {_words(present)}"
        raise RejectedError("missing_channel", problem)


def _words(channels: Sequence[int]) -> str:
    if len(channels) == 1:
        return f"only the channel {channels[0]}"
    return f"the channels {', '.join(map(str, channels)) or 'of no source'}"


def channel_list(channel: int | list[int]) -> list[int]:
    """Return the channels of a cut or supervision, which may be one number."""
    return channel if isinstance(channel, list) else [channel]


def _recorded_channels(recording: Row) -> list[int]:
    """Return the channels that can be read from a recording."""
    stored = [
        channel for source in recording.get("sources", []) for channel in source.get("channels", [])
    ]
    listed = recording.get("channel_ids")
    if listed is None:
        return stored
    if recording.get("transforms"):  # for example an impulse response of several channels
        return listed
    return [channel for channel in stored if channel in listed]
