"""Compare the length in the header with the file, for formats that soundfile does not check.

ffmpeg stops at the end of a truncated file of these formats without an error.
"""

import re
from collections.abc import Callable
from typing import Literal

from asrllm.data.audio_headers import INCOMPLETE, UNKNOWN_SIZE, problem_after, truncated
from asrllm.text_files import Buffer

ByteOrder = Literal["little", "big"]
VOC_MAGIC = b"Creative Voice File\x1a"
VOC_AUDIO = (1, 2, 9)  # types of VOC blocks: audio, more audio, audio with another header
VOC_GAPS = {3: "silence", 6: "repetition"}  # types that ffmpeg skips
SOX_MAGIC: dict[bytes, ByteOrder] = {b".SoX": "little", b"XoS.": "big"}  # byte order
SOX_SAMPLE = 4  # bytes
ADX_MAGIC = b"\x80\0"
ADX_HEADER = 20  # bytes of its fields
ADX_BLOCK = 32  # samples of each channel
AVI = re.compile(rb"RIFF....AVI ", re.DOTALL)
NUT_MAGIC = b"nut/multimedia container\0"
NUT_INDEX = b"NX\xddg/#\xe6N"
NUT_END = 12  # bytes from the distance to the index to the end of the file
DTSHD_MAGIC = b"DTSHDHDR"
LARGEST_SIZE = 1 << 62  # bytes; a writer of a stream puts larger ones for an unknown length


def length_problem(content: Buffer) -> str:
    """Compare the length of VOC, .sox, ADX, AVI, NUT or DTS-HD with the file.

    Returns:
        What is wrong, or "" if nothing is, or if the file has another format.
    """
    first = content[: len(NUT_MAGIC)]
    for magic, problem in CHECKS.items():
        if first.startswith(magic):
            return problem(content)
    return ""


def voc_problem(content: Buffer) -> str:
    """Walk over the blocks of a VOC file, the last of which has the type 0."""
    for offset, kind, size in voc_blocks(content):
        if kind == 0:
            return problem_after(content, offset)
        if kind in VOC_GAPS:
            return (
                f"has a block of {VOC_GAPS[kind]} at byte {offset}, which ffmpeg would skip. "
                "Convert it: sox IN.voc OUT.wav"
            )
        if offset + size > len(content):
            return truncated(len(content), offset + size)
    return INCOMPLETE


def voc_blocks(content: Buffer) -> list[tuple[int, int, int]]:
    """Return the offset, the type and the size of each block of a VOC file, until its end."""
    blocks = []
    offset = int.from_bytes(content[20:22], "little")
    while offset < len(content):
        kind = content[offset]
        size = 4 + int.from_bytes(content[offset + 1 : offset + 4], "little")
        if kind == 0:
            size = 1
        blocks.append((offset, kind, size))
        if kind == 0:
            break
        offset += size
    return blocks


def has_several_voc_blocks(content: Buffer) -> bool:
    """Return whether a VOC file has several blocks of audio.

    libsndfile reads the headers of all blocks after the first one as audio.
    """
    if content[: len(VOC_MAGIC)] != VOC_MAGIC:
        return False
    return sum(kind in VOC_AUDIO for _, kind, _ in voc_blocks(content)) > 1


def sox_problem(content: Buffer) -> str:
    """Compare the size of a .sox file with the number of samples of all channels in its header."""
    order = SOX_MAGIC[content[:4]]
    header = 4 + _number(content[4:8], order)
    samples = _number(content[8:16], order)
    return _size_problem(content, header, SOX_SAMPLE * samples)


def adx_problem(content: Buffer) -> str:
    """Compare the size of a file of CRI ADX with the number of samples in its header."""
    if not is_adx(content):
        return ""
    header = int.from_bytes(content[2:4], "big") + 4
    block_size, channels = content[5], content[7]
    samples = int.from_bytes(content[12:16], "big")
    blocks = -(-samples // ADX_BLOCK)
    return _size_problem(content, header, blocks * block_size * channels)


def is_adx(content: Buffer) -> bool:
    """Return whether a file is CRI ADX, whose header ends with the owner's name."""
    end = int.from_bytes(content[2:4], "big") + 4
    return end >= ADX_HEADER and content[:2] == ADX_MAGIC and content[end - 6 : end] == b"(c)CRI"


def avi_problem(content: Buffer) -> str:
    """Compare the size of an AVI file with that in its header."""
    if not AVI.match(content):
        return ""
    end = 8 + int.from_bytes(content[4:8], "little")
    return truncated(len(content), end) if len(content) < end < UNKNOWN_SIZE else ""


def nut_problem(content: Buffer) -> str:
    """Return what is wrong with a NUT file that lacks the index at its end, or ""."""
    distance = int.from_bytes(content[-NUT_END : -NUT_END + 8], "big")
    index = len(content) - distance
    if index > 0 and content[index : index + len(NUT_INDEX)] == NUT_INDEX:
        return ""
    return (
        "is truncated, or has no index at its end. "
        "Copy it again, or let ffmpeg write the index: ffmpeg -i IN.nut -c copy OUT.nut"
    )


def dtshd_problem(content: Buffer) -> str:
    """Walk over the chunks of a DTS-HD file."""
    offset = 0
    while offset + 16 <= len(content):
        end = offset + 16 + int.from_bytes(content[offset + 8 : offset + 16], "big")
        if len(content) < end < LARGEST_SIZE:
            return truncated(len(content), end)
        offset = end
    return ""


def _number(data: bytes, order: ByteOrder) -> int:
    return int.from_bytes(data, order)


def _size_problem(content: Buffer, header: int, size: int) -> str:
    """Return what is wrong with a file whose header promises `size` bytes after it."""
    if not size or size >= LARGEST_SIZE:  # the writer did not know it
        return ""
    end = header + size
    return truncated(len(content), end) if len(content) < end else problem_after(content, end)


CHECKS: dict[bytes, Callable[[Buffer], str]] = {
    VOC_MAGIC: voc_problem,
    **dict.fromkeys(SOX_MAGIC, sox_problem),
    ADX_MAGIC: adx_problem,
    b"RIFF": avi_problem,
    NUT_MAGIC: nut_problem,
    DTSHD_MAGIC: dtshd_problem,
}
