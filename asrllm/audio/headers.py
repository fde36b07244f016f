"""What the headers of audio files say of their length, where libsndfile does not compare it."""

import mmap
import re

Buffer = bytes | mmap.mmap
SHORTEST_MP3 = 0.99  # of the bytes that its header promises; encoders count differently
LARGEST_TAIL = 1024  # bytes behind the sound that may be anything, such as an ID3v1 tag
UNKNOWN = b"\xff\xff\xff\xff"  # the size of a WAV whose writer did not know it


def mp3_problem(content: Buffer) -> str:
    """Compare an MP3's size with the one in its Xing or Info header, if that holds one.

    Returns:
        What is wrong, "" if nothing is.
    """
    first = content[: 1 << 12]
    place = max(first.find(b"Xing"), first.find(b"Info"))
    if place < 0:
        return ""
    flags = int.from_bytes(first[place + 4 : place + 8], "big")
    if not flags & 2:
        return ""
    field = place + 8 + 4 * (flags & 1)  # behind the number of frames, if that is there
    promised = int.from_bytes(first[field : field + 4], "big")
    if len(content) >= SHORTEST_MP3 * promised:
        return ""
    return f"is cut short, its header promises {promised} bytes and {len(content)} are there: copy it again"


def sphere_problem(content: Buffer) -> str:
    """Compare the size of a NIST SPHERE file with the number of samples in its header.

    Returns:
        What is wrong, "" if nothing is.
    """
    header = content[:1024]
    fields = {
        name: int(found[1])
        for name in (b"sample_count", b"channel_count", b"sample_n_bytes")
        if (found := re.search(name + rb" -i (\d+)", header))
    }
    if len(fields) < 3:
        return ""
    promised = 1024 + fields[b"sample_count"] * fields[b"channel_count"] * fields[b"sample_n_bytes"]
    if len(content) >= promised:
        return ""
    return f"is cut short, its header promises {promised} bytes and {len(content)} are there: copy it again"


def wav_data(content: Buffer) -> tuple[int, int] | None:
    """Return where the sound of a WAV begins and how many bytes its header says, None if unknown."""
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        return None
    place = 12
    while place + 8 <= len(content):
        size = int.from_bytes(content[place + 4 : place + 8], "little")
        if content[place : place + 4] == b"data":
            return place + 8, size
        place += 8 + size + size % 2
    return None


def wav_problem(content: Buffer) -> str:
    """Look for sound behind the end that a WAV's header says.

    Returns:
        What is wrong, "" if nothing is.
    """
    found = wav_data(content)
    if found is None or not found[1] or _is_tail(content, found[0] + found[1]):
        return ""
    return (
        f"has {len(content) - found[0]} bytes of sound, but its header says {found[1]}. "
        "Correct the header: sox --ignore-length IN.wav OUT.wav"
    )


def with_unknown_size(content: Buffer) -> bytes | None:
    """Return a WAV whose header says 0 bytes of sound with the size for "unknown".

    Returns:
        The content, None if the header is right and the file holds no sound.
    """
    found = wav_data(content)
    if found is None or found[1] or _is_tail(content, found[0]):
        return None
    begin = found[0]
    return content[:4] + UNKNOWN + content[8 : begin - 4] + UNKNOWN + content[begin:]


def _is_tail(content: Buffer, place: int) -> bool:
    """Whether what follows the sound is chunks of other kinds, or next to nothing."""
    if len(content) - place <= LARGEST_TAIL or not any(content[place : place + (1 << 20)]):
        return True
    place += place % 2
    while place + 8 <= len(content):
        name = content[place : place + 4]
        if not all(32 <= byte < 127 for byte in name):
            return False
        size = int.from_bytes(content[place + 4 : place + 8], "little")
        place += 8 + size + size % 2
    return place <= len(content) + 1
