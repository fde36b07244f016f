"""Find out which kind of source a path is, by its files or its first row."""

from pathlib import Path

from asrllm.data.sources.files import read_lines
from asrllm.data.sources.json_rows import json_rows
from asrllm.data.sources.utterance import RejectedError
from asrllm.errors import UserError
from asrllm.text_files import missing_problem

ROLE = "the manifest"
# fields by which the rows of a manifest differ from those of the other kinds
FIELDS_OF_FORMATS = {
    "cuts": ("type", "supervisions"),
    "nemo": ("audio_filepath",),
    "wenet": ("wav", "txt"),
    "slam": ("source", "target"),
}
SWIFT_FIELDS = ("messages", "conversations", "query")  # a row has one of them


def detect_source(path: Path) -> str:
    """Return the name of a path's source.

    A directory with wav.scp is a Kaldi directory, and any other directory is a folder of audio
    files. The kind of a manifest follows from the fields of its first row.

    Raises:
        UserError: the path does not exist, or its format is unknown.
    """
    if path.is_dir():
        return "kaldi" if (path / "wav.scp").exists() else "folder"
    if not path.exists():
        raise UserError(f"{str(path)!r} {missing_problem(path)}")
    _, line = next(read_lines(path, ROLE, strict=False))
    if line.lstrip().startswith(("{", "[")):
        return _kind_of_row(path)
    if line.strip().endswith(".tar"):
        return "wenet"
    raise UserError(
        f"{str(path)!r} is neither a directory nor a manifest of JSON lines. If it is a table of "
        f"audio files, name it metadata.csv or metadata.tsv, and use its directory."
    )


def _kind_of_row(path: Path) -> str:
    """Return the kind of a manifest by the first row that can be parsed."""
    row = next((row for _, row in json_rows(path, ROLE) if not isinstance(row, RejectedError)), {})
    for name, fields in FIELDS_OF_FORMATS.items():
        if all(field in row for field in fields):
            return name
    if any(field in row for field in SWIFT_FIELDS):
        return "swift"
    present = ", ".join(map(str, row)) or "nothing"
    raise UserError(
        f"{str(path)!r} is not a manifest of Lhotse, NeMo, wenet, SLAM-LLM or swift: its first row "
        f"has {present}. Convert it, for example to the fields audio_filepath and text."
    )
