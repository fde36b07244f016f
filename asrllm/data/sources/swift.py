"""Chats with one audio file each, in the formats of ms-swift and LLaMA-Factory."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asrllm.data.sources.files import (
    Row,
    key_from_path,
    read_json_manifest,
    sample_fields,
    text_field,
    text_or_int_field,
)
from asrllm.data.sources.utterance import AudioSegment, RejectedError, Utterance

ROLE = "the chat manifest"
SWIFT_AUDIO_TAG = "<audio>"
USERS = ("user", "human")
ASSISTANTS = ("assistant", "gpt")
SYSTEM = "system"
Turn = tuple[str, str]  # role, text


def read_swift(path: str | Path) -> Iterator[Utterance]:
    """Yield the utterances of a chat manifest.

    The file has JSON lines, or is a JSON list, of {messages | conversations, audios} or
    {query, response, audios}. The user's words other than <audio> become the prompt, and those of
    the assistant become the text. System messages are ignored: the run's prompts apply. The key is
    the row's id, or else consists of the path and a hash of the prompt. Chats with several turns or
    audio files are rejected. Relative paths start at the manifest's directory, or at the current
    directory if the first files are there.
    """
    yield from read_json_manifest(Path(path), ROLE, names=_audios, make=_utterance)


def _utterance(row: Row, where: str, root: Path) -> Utterance:
    turns = [(role, text) for role, text in _turns(row, where) if role != SYSTEM]
    audios = _audios(row, where)
    problem = _chat_problem(row, turns, audios, where)
    audio = audios[0] if audios else ""
    prompt = "" if problem else turns[0][1].replace(SWIFT_AUDIO_TAG, "").strip()
    key = _key(row, audio, prompt, where)
    if problem:
        return Utterance(key=key, text="", problem=problem)
    fields = sample_fields(row)
    if prompt:
        fields["prompt"] = prompt
    return Utterance(
        key=key,
        text=turns[1][1],
        load=AudioSegment(root / audio),
        fields=fields,
        file=root / audio,
    )


def _chat_problem(
    row: Row,
    turns: list[Turn],
    audios: list[str],
    where: str,
) -> tuple[str, str] | None:
    """Return (reason, detail) unless a chat is one question with one audio file and one answer."""
    if len(audios) != 1:
        return "not_one_audio", f"{where} has {len(audios)} audio files"
    if not audios[0]:
        return "missing_audio", f"{where} names no audio: the path is empty"
    if row.get("history"):
        return "not_one_turn", f"{where} is a chat with a history"
    roles = [role for role, _ in turns]
    if len(roles) != 2 or roles[0] not in USERS or roles[1] not in ASSISTANTS:
        return "not_one_turn", f"{where} is a chat of {', '.join(roles) or 'nobody'}"
    if turns[0][1].count(SWIFT_AUDIO_TAG) > 1:
        return "not_one_audio", f"{where} has one audio file, but several {SWIFT_AUDIO_TAG}"
    return None


def _key(
    row: Row,
    audio: str,
    prompt: str,
    where: str,
) -> str:
    """Return the row's id, or a key made of the audio file and the prompt, or the row's place.

    A manifest may contain the same audio file with several prompts.
    """
    if row.get("id") is not None:
        return str(row["id"])
    key = key_from_path(audio)
    if prompt:
        key += f"-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
    return key or where.rpartition("/")[2]


def _chat_field(row: Row, where: str) -> str:
    """Return the name of the field with the turns."""
    for name in ("messages", "conversations"):
        if name in row:
            return name
    present = ", ".join(row) or "nothing"
    raise RejectedError(
        "missing_field",
        f"{where} has no 'messages', 'conversations' or 'query'; it has: {present}",
    )


def _turns(row: Row, where: str) -> list[Turn]:
    """Return the turns of a chat."""
    if "query" in row:
        return [
            ("user", text_field(row, where, "query")),
            ("assistant", text_or_int_field(row, where, "response")),
        ]
    name = _chat_field(row, where)
    turns = row[name]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RejectedError(
            "bad_field", f"{where}: {name!r} is not a list of objects with a role and a text"
        )
    return [
        (
            text_field(turn, where, "role", "from"),
            text_or_int_field(turn, where, "content", "value"),
        )
        for turn in turns
    ]


def _audios(row: Row, where: str) -> list[str]:
    """Return the audio files of a chat."""
    values = (row.get(name) for name in ("audios", "audio"))
    audios: Any = next((value for value in values if value is not None), [])
    if isinstance(audios, str):
        return [audios]
    if not isinstance(audios, list) or not all(isinstance(audio, str) for audio in audios):
        raise RejectedError("bad_field", f"{where}: 'audios' is {audios!r}, not a list of paths")
    return audios
