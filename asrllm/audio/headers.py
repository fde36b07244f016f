"""Compare the length in the header of an audio file with the file, where libsndfile does not."""

import mmap
import re

Buffer = bytes | mmap.mmap
SHORTEST_MP3 = 0.99  # of the bytes that its header promises; encoders count differently
LARGEST_TAIL = 1024  # bytes after the audio that may be anything, for example an ID3v1 tag
UNKNOWN = b"\xff\xff\xff\xff"  # the size in a WAV header whose writer did not know it
SPHERE_HEADER = 1024  # bytes
SPHERE_FIELDS = (b"sample_count", b"channel_count", b"sample_n_bytes")


def mp3_problem(content: Buffer) -> str:
    """Compare the size of an MP3 with the size in its Xing or Info header, if it has one.

    Returns:
        What is wrong, or "" if nothing is.
    """
    first = content[: 1 << 12]
    tag = max(first.find(b"Xing"), first.find(b"Info"))
    if tag < 0:
        return ""
    flags = int.from_bytes(first[tag + 4 : tag + 8], "big")
    if not flags & 2:
        return ""
    field = tag + 8 + 4 * (flags & 1)  # after the number of frames, which bit 0 announces
    promised = int.from_bytes(first[field : field + 4], "big")
    if len(content) >= SHORTEST_MP3 * promised:
        return ""
    return truncated(len(content), promised)


def sphere_problem(content: Buffer) -> str:
    """Compare the size of a NIST SPHERE file with the number of samples in its header.

    Returns:
        What is wrong, or "" if nothing is.
    """
    promised = 1
    for name in SPHERE_FIELDS:
        found = re.search(name + rb" -i (\d+)", content[:SPHERE_HEADER])
        if found is None:
            return ""
        promised *= int(found[1])
    promised += SPHERE_HEADER
    if len(content) >= promised:
        return ""
    return truncated(len(content), promised)


def truncated(size: int | str, promised: int | str) -> str:
    """Return the description of a file that has fewer bytes than its header promises."""
    return f"is truncated: it has {size} of the {promised} bytes in its header. Copy it again."


def wav_data(content: Buffer) -> tuple[int, int] | None:
    """Find the audio of a WAV file.

    Returns:
        The offset of the audio and its size in the header, both in bytes, or None if unknown.
    """
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        return None
    offset = 12
    while offset + 8 <= len(content):
        size = int.from_bytes(content[offset + 4 : offset + 8], "little")
        if content[offset : offset + 4] == b"data":
            return offset + 8, size
        offset += 8 + size + size % 2
    return None


def wav_problem(content: Buffer) -> str:
    """Look for audio after the end that the header of a WAV file gives.

    Returns:
        What is wrong, or "" if nothing is.
    """
    found = wav_data(content)
    if found is None:
        return ""
    begin, size = found
    if not size or _is_tail(content, begin + size):
        return ""
    return (
        f"has {len(content) - begin} bytes of audio, but {size} in its header. "
        "Correct the header: sox --ignore-length IN.wav OUT.wav"
    )


def with_unknown_size(content: Buffer) -> bytes | None:
    """Replace a WAV header's size of 0 by the size for "unknown".

    Returns:
        The corrected file, or None if the header is right or the file has no audio.
    """
    found = wav_data(content)
    if found is None:
        return None
    begin, size = found
    if size or _is_tail(content, begin):
        return None
    return content[:4] + UNKNOWN + content[8 : begin - 4] + UNKNOWN + content[begin:]


def _is_tail(content: Buffer, offset: int) -> bool:
    """Return whether only chunks of other kinds, or next to nothing, follow the audio."""
    if len(content) - offset <= LARGEST_TAIL:
        return True
    if not any(content[offset : offset + (1 << 20)]):
        return True
    offset += offset % 2
    while offset + 8 <= len(content):
        name = content[offset : offset + 4]
        if not all(32 <= byte < 127 for byte in name):
            return False
        size = int.from_bytes(content[offset + 4 : offset + 8], "little")
        offset += 8 + size + size % 2
    return offset <= len(content) + 1
