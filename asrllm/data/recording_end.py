"""Find where a recording ends, to report what follows it in the same file.

Decoders stop at the end of a recording without an error. A file of two recordings, which cat makes,
would lose the second one.
"""

import re
from collections.abc import Callable

from asrllm.data.audio_headers import EBML, id3_size, problem_after, truncated, wav_problem
from asrllm.text_files import Buffer

UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # in the headers of streams
AU_HEADER = 12  # bytes up to the size of the audio
CAF_HEADER = 8  # bytes before the first chunk
# names of chunks, and of boxes that are in no other box; files may have others of their makers
CAF_CHUNKS = (
    b"desc data kuki pakt chan free strg mark regn midi info inst umid uuid ovvw peak edct"
).split()
MP4_BOXES = (
    b"ftyp styp pdin moov moof mfra mdat free skip wide meta uuid pnot PICT junk sidx ssix prft"
    b" emsg idat imda cmov wfex"
).split()
NAME = re.compile(rb"[0-9A-Za-z \xa9]{4}")
AST_HEADER = 64  # bytes
FLV_HEADER = 13  # bytes before the first tag
FLV_BACK = 4  # bytes of a tag's size after the tag
FLV_TAGS = (8, 9, 18)  # audio, video and data
TTA_HEADER = 22  # bytes
SEGMENT = b"\x18\x53\x80\x67"  # Matroska's element
TRACKS = b"\x16\x54\xae\x6b"
CODECS = re.compile(rb"A_[A-Z0-9/_]+|\xb5\x84.{4}|\xb5\x88.{8}", re.DOTALL)  # and sampling rates
OPEN_ELEMENTS = (SEGMENT, b"\x1f\x43\xb6\x75")  # and Cluster, which may have an unknown size
# other elements at the levels of these: EBML header, Void, CRC-32, SeekHead, Info, Cues,
# Chapters, Tags, Attachments, Timestamp, SimpleBlock, BlockGroup, PrevSize, Position,
# EncryptedBlock and SilentTracks
ELEMENTS = (
    *(EBML, b"\xec", b"\xbf", b"\x11\x4d\x9b\x74", b"\x15\x49\xa9\x66"),
    *(b"\x1c\x53\xbb\x6b", b"\x10\x43\xa7\x70", b"\x12\x54\xc3\x67", b"\x19\x41\xa4\x69"),
    *(b"\xe7", b"\xa3", b"\xa0", b"\xab", b"\xa7", b"\xaf", b"\x58\x54"),
)
FLAC_INFO = 8  # bytes before the fields of STREAMINFO
FLAC_SYNC = b"\xff\xf8"  # of a frame in a file whose blocks have one size
MOST_FRAMES = 0xD800  # frames whose numbers the search finds; 86 minutes at 44.1 kHz
FLAC_NUMBER = 4  # the place of the frame's number in its header


def tail_problem(content: Buffer) -> str:
    """Look for anything but tags and zeros after the end of the recording in a file.

    Returns:
        What is wrong, or "" if nothing is, or if the end is unknown.
    """
    begin = id3_size(content)
    first = content[begin : begin + 12]
    if first[:4] == b"RIFF" and first[8:] == b"WAVE":
        return wav_problem(content)
    for magic, place, find_end in ENDS:
        if first[place : place + len(magic)] == magic:
            end = find_end(content, begin)
            if end is not None and magic == b"FLV" and len(content) < end - FLV_BACK:
                return truncated(len(content), end)  # ffmpeg takes a part of a tag for a stream
            return "" if end is None else problem_after(content, end)
    return ""


def _form_end(content: Buffer, begin: int) -> int | None:
    size = int.from_bytes(content[begin + 4 : begin + 8], "big")
    return None if size in UNKNOWN_SIZES else begin + 8 + size + size % 2


def _riff_end(content: Buffer, begin: int) -> int | None:
    """Return the end of XWMA or AVI; the latter may have several chunks."""
    offset = begin
    while content[offset : offset + 4] == b"RIFF" and content[offset + 8 : offset + 12] != b"WAVE":
        size = int.from_bytes(content[offset + 4 : offset + 8], "little")
        if size in UNKNOWN_SIZES:
            return None
        offset += 8 + size + size % 2
    return offset


def _au_end(content: Buffer, begin: int) -> int | None:
    header = int.from_bytes(content[begin + 4 : begin + 8], "big")
    size = int.from_bytes(content[begin + 8 : begin + AU_HEADER], "big")
    return None if size in UNKNOWN_SIZES else begin + header + size


def _ast_end(content: Buffer, begin: int) -> int | None:
    size = int.from_bytes(content[begin + 4 : begin + 8], "big")
    return None if size in UNKNOWN_SIZES else begin + AST_HEADER + size


def _caf_end(content: Buffer, begin: int) -> int | None:
    """Walk over the chunks of a CAF file."""
    offset = begin + CAF_HEADER
    while name := content[offset : offset + 4]:
        size = int.from_bytes(content[offset + 4 : offset + 12], "big", signed=True)
        if not _is_chunk(name, CAF_CHUNKS, offset + 12 + size <= len(content)):
            break
        if size < 0:
            return None  # the audio reaches to the end of the file
        offset += 12 + size
    return offset


def _mp4_end(content: Buffer, begin: int) -> int | None:
    """Walk over the boxes of an MP4 file."""
    offset = begin
    while header := content[offset : offset + 16]:
        size = int.from_bytes(header[:4], "big")
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        if not _is_chunk(header[4:8], MP4_BOXES, offset + size <= len(content)):
            break
        if size < 8:
            return None  # the box reaches to the end of the file
        offset += size
    return offset


def _is_chunk(name: bytes, known: list[bytes], fits: bool) -> bool:
    """Return whether there is a chunk, by its name and by whether it fits into the file."""
    return name in known or (fits and NAME.fullmatch(name) is not None)


def _flv_end(content: Buffer, begin: int) -> int:
    offset = begin + FLV_HEADER
    while offset < len(content) and content[offset] in FLV_TAGS:
        offset += 15 + int.from_bytes(content[offset + 1 : offset + 4], "big")
    return offset


def _wavpack_end(content: Buffer, begin: int) -> int:
    offset = begin
    while content[offset : offset + 4] == b"wvpk":
        offset += 8 + int.from_bytes(content[offset + 4 : offset + 8], "little")
    return offset


def _tta_end(content: Buffer, begin: int) -> int:
    """Sum up the sizes of the frames of a TTA file."""
    rate = int.from_bytes(content[begin + 10 : begin + 14], "little")
    samples = int.from_bytes(content[begin + 14 : begin + 18], "little")
    frames = -(-samples // max(rate * 256 // 245, 1))
    table = begin + TTA_HEADER
    end = table + 4 * frames + 4
    for place in range(table, min(end - 4, len(content)), 4):
        end += int.from_bytes(content[place : place + 4], "little")
    return end


def _matroska_end(content: Buffer, begin: int) -> int:
    """Walk over the elements of a Matroska file (RFC 8794 and 9559).

    ffmpeg reads a second segment as if it had the codec and the sampling rate of the first one. If
    they differ, the file ends before the second segment.
    """
    offset = segment = begin
    first_codecs: list[bytes] = []
    while offset < len(content):
        head = content[offset : offset + 12]
        name = head[: 9 - head[0].bit_length()]
        field = head[len(name) :]
        if not field or not field[0] or name not in (*OPEN_ELEMENTS, *ELEMENTS, TRACKS):
            return offset
        if name == EBML:
            segment = offset
        width = 9 - field[0].bit_length()
        size = int.from_bytes(field[:width], "big") & ((1 << 7 * width) - 1)
        is_unknown = size == (1 << 7 * width) - 1
        offset += len(name) + width
        if name == SEGMENT or (is_unknown and name in OPEN_ELEMENTS):
            continue  # with its children
        if name == TRACKS:
            codecs = CODECS.findall(content[offset : offset + size])
            first_codecs = first_codecs or codecs
            if codecs != first_codecs:
                return segment
        offset += size
    return offset


def _flac_end(content: Buffer, begin: int) -> int | None:
    """Find the end of the last frame of a FLAC file by its checksum (RFC 9639, section 9)."""
    info = content[begin + FLAC_INFO : begin + FLAC_INFO + 34]
    block = int.from_bytes(info[:2], "big")
    samples = int.from_bytes(info[10:18], "big") & ((1 << 36) - 1)
    if len(info) < 34 or not samples or not block or info[:2] != info[2:4]:
        return None  # without a count of samples, or with blocks of several sizes
    if samples > block * MOST_FRAMES:
        return None
    number = chr((samples - 1) // block).encode()
    largest = int.from_bytes(info[7:10], "big") or 1 << 20
    last = len(content)
    while (last := content.rfind(number, 0, last)) >= 0:
        start = last - FLAC_NUMBER
        if content[start : start + 2] == FLAC_SYNC and _has_header_checksum(content, start, number):
            return _frame_end(content, start, largest)
    return None


def _has_header_checksum(content: Buffer, start: int, number: bytes) -> bool:
    """Return whether the header of a FLAC frame matches its CRC-8."""
    codes = content[start + 2]
    more = {6: 1, 7: 2}.get(codes >> 4, 0) + {12: 1, 13: 2, 14: 2}.get(codes & 15, 0)
    header = content[start : start + FLAC_NUMBER + len(number) + more + 1]  # with the CRC-8
    crc = 0
    for byte in header:
        crc = CRC8[crc ^ byte]
    return crc == 0


def _frame_end(content: Buffer, start: int, largest: int) -> int | None:
    """Return the last place at most `largest` bytes after `start` at which the CRC-16 is right."""
    frame = content[start : start + largest]
    crc = 0
    end = None
    for place, byte in enumerate(frame, start + 1):
        crc = (crc << 8 & 0xFF00) ^ CRC16[crc >> 8 ^ byte]
        if not crc:
            end = place
    return end


def _crc_table(polynomial: int, bits: int) -> list[int]:
    table = []
    for byte in range(256):
        crc = byte << bits - 8
        for _ in range(8):
            crc = crc << 1 ^ (polynomial if crc >> bits - 1 else 0)
            crc &= (1 << bits) - 1
        table.append(crc)
    return table


CRC8 = _crc_table(0x07, 8)
CRC16 = _crc_table(0x8005, 16)
# how a file begins, the place of these bytes, and the function that finds the end
ENDS: tuple[tuple[bytes, int, Callable[[Buffer, int], int | None]], ...] = (
    (b"fLaC", 0, _flac_end),
    (b"FORM", 0, _form_end),
    (b"XWMA", 8, _riff_end),
    (b"AVI ", 8, _riff_end),
    (b".snd", 0, _au_end),
    (b"STRM", 0, _ast_end),
    (b"caff", 0, _caf_end),
    (b"ftyp", 4, _mp4_end),
    (b"FLV", 0, _flv_end),
    (b"wvpk", 0, _wavpack_end),
    (b"TTA1", 0, _tta_end),
    (EBML, 0, _matroska_end),
)
