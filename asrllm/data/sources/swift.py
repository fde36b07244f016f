"""Chats with one audio, as ms-swift and LLaMA-Factory read them."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asrllm.data.sources.files import key_of, sample_fields, take, take_words, utterances
from asrllm.data.sources.utterance import RejectedError, Stretch, Utterance

WHAT = "the chat manifest"
AUDIO_TOKEN = "<audio>"
USERS, ASSISTANTS, SYSTEM = ("user", "human"), ("assistant", "gpt"), "system"


def read_swift(path: str | Path) -> Iterator[Utterance]:
    """JSON lines, or a JSON list, of {messages | conversations, audios} or {query, response, audios}.

    The user's words beside <audio> become the prompt, the assistant's are the text; a system's are left to the run's own prompts. Key: the
    row's id, or made of the path and the prompt. Chats of several turns or audios are rejected. Relative paths as in the other manifests.
    """
    yield from utterances(Path(path), WHAT, names=_audios, make=_utterance)


def _utterance(row: dict[str, Any], where: str, root: Path) -> Utterance:
    turns, audios = _turns(row, where), _audios(row, where)
    said = [(role, text) for role, text in turns if role != SYSTEM]
    if len(audios) != 1:
        problem: tuple[str, str] | None = ("not_one_audio", f"{where} has {len(audios)} audios")
    elif row.get("history"):
        problem = ("not_one_turn", f"{where} is a chat with a history")
    elif [role in USERS for role, _ in said] != [True, False] or said[1][0] not in ASSISTANTS:
        problem = (
            "not_one_turn",
            f"{where} is a chat of {', '.join(role for role, _ in said) or 'nobody'}",
        )
    else:
        problem = None
    audio = audios[0] if audios else ""
    prompt = said[0][1].replace(AUDIO_TOKEN, "").strip() if not problem else ""
    # the same audio may stand there with several prompts
    stem = key_of(audio) + (f"-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}" if prompt else "")
    key = str(row["id"]) if row.get("id") is not None else stem or where.rpartition("/")[2]
    if problem:
        return Utterance(key=key, text="", problem=problem)
    fields = sample_fields(row) | ({"prompt": prompt} if prompt else {})
    return Utterance(
        key=key, text=said[1][1], load=Stretch(root / audio), fields=fields, file=root / audio
    )


def _turns(row: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """(role, text) of each."""
    if "query" in row:
        return [
            ("user", take(row, where, "query")),
            ("assistant", take_words(row, where, "response")),
        ]
    name = next((name for name in ("messages", "conversations") if name in row), None)
    if name is None:
        has = ", ".join(row) or "nothing"
        raise RejectedError(
            "missing_field",
            f"{where} has neither 'messages' nor 'conversations' nor 'query'; it has: {has}",
        )
    if not isinstance(row[name], list) or not all(isinstance(turn, dict) for turn in row[name]):
        raise RejectedError(
            "bad_field", f"{where}: {name!r} is not a list of objects with a role and a text"
        )
    return [
        (take(turn, where, "role", "from"), take_words(turn, where, "content", "value"))
        for turn in row[name]
    ]


def _audios(row: dict[str, Any], where: str) -> list[str]:
    audios: Any = next((row[name] for name in ("audios", "audio") if row.get(name) is not None), [])
    audios = [audios] if isinstance(audios, str) else audios
    if not isinstance(audios, list) or not all(isinstance(audio, str) for audio in audios):
        raise RejectedError(
            "bad_field", f"{where}: 'audios' is {audios!r}, which is not a list of paths"
        )
    return audios
