"""Chats with one audio file each, in the formats of ms-swift and LLaMA-Factory."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asrllm.data.sources.files import (
    Row,
    audio_path,
    check_audio_name,
    key_from_path,
    sample_fields,
    text_field,
    text_or_int_field,
)
from asrllm.data.sources.json_rows import read_json_manifest
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
    question, answer = _question_and_answer(row, where)
    audio = _only_audio(row, where)
    prompt = question.replace(SWIFT_AUDIO_TAG, "").strip()
    fields = sample_fields(row)
    if prompt:
        fields["prompt"] = prompt
    return Utterance(
        key=_key(row, audio, prompt),
        text=answer,
        load=AudioSegment(root / audio),
        fields=fields,
        file=root / audio,
    )


def _question_and_answer(row: Row, where: str) -> tuple[str, str]:
    """Return the texts of a chat.

    Raises:
        RejectedError: it is not one question about one audio file, and one answer.
    """
    if row.get("history"):
        raise RejectedError("not_one_turn", f"{where} is a chat with a history")
    turns = [(role, text) for role, text in _turns(row, where) if role != SYSTEM]
    roles = [role for role, _ in turns]
    if len(roles) != 2 or roles[0] not in USERS or roles[1] not in ASSISTANTS:
        raise RejectedError("not_one_turn", f"{where} is a chat of {', '.join(roles) or 'nobody'}")
    question, answer = (text for _, text in turns)
    if question.count(SWIFT_AUDIO_TAG) > 1:
        problem = f"{where} has several {SWIFT_AUDIO_TAG} in its question"
        raise RejectedError("not_one_audio", problem)
    return question, answer


def _key(row: Row, audio: str, prompt: str) -> str:
    """Return the row's id, or a key made of the audio file and the prompt.

    A manifest may contain the same audio file with several prompts.
    """
    if row.get("id") is not None:
        return str(row["id"])
    key = key_from_path(audio)
    if prompt:
        key += f"-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
    return key


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


def _only_audio(row: Row, where: str) -> str:
    """Return the audio file of a chat, or raise RejectedError."""
    audios = _audios(row, where)
    if len(audios) != 1:
        raise RejectedError("not_one_audio", f"{where} has {len(audios)} audio files")
    check_audio_name(audios[0], f"{where}: the audio")
    return audios[0]


def _audios(row: Row, where: str) -> list[str]:
    """Return the audio files that a chat names: one, or a list."""
    values = (row.get(name) for name in ("audios", "audio"))
    audios: Any = next((value for value in values if value is not None), [])
    paths = [audio_path(audio) for audio in (audios if isinstance(audios, list) else [audios])]
    names = [path for path in paths if isinstance(path, str)]
    if len(names) < len(paths):
        raise RejectedError("bad_field", f"{where}: 'audios' is {audios!r}, not a list of paths")
    return names
