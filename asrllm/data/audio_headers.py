"""Compare the length in the header of an audio file with the file, where libraries do not.

Accepted files of 60 that were cut at random places and lack at least 0.1 s, by libsndfile 1.2.2 and
by PyAV 18.1 (FFmpeg 8.1) with a check of the promised length:

    format                                    libsndfile  PyAV
    WAV, W64, AIFF, AU, SPHERE, IMA ADPCM             60     0
    Ogg Vorbis                                        58    46
    Opus                                              49    49
    MP3 without a frame count                          -    54
    AVI with MP3, .sox, DTS-HD                         -    26, 14, 11
    FLAC, MP3 with a frame count, AC-3                 0     0

Of 10 files each, PyAV accepts 10 of MP2 and TrueHD, 9 of MLP and SBC, 5 of MPEG transport streams
and 2 of DTS. mutagen 1.48 does not show 58 to 60 of 60 cuts of Ogg, AAC and MP3 without a count.

libsndfile returns the samples that are there without an error, and takes the length of Ogg from the
last page (https://github.com/libsndfile/libsndfile/issues/989). Of two recordings in one Ogg file
it reads the first (https://github.com/libsndfile/libsndfile/issues/277). So this module reads
headers, pages and frames itself.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from asrllm.text_files import Buffer

SHORTEST_MP3 = 0.99  # ratio of the promised bytes; encoders count the last frames differently
JOIN_WITH_SOX = "Join recordings with sox instead of cat."
LARGEST_TAIL = 1024  # bytes after the audio that may be anything, for example an ID3v1 tag
INCOMPLETE = "is truncated: its last page or frame is incomplete. Copy it again."
OGG_HEADER = 27  # bytes of a page's header before its lacing values
OGG_CHECKSUM = slice(22, 26)  # its place in the header
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
FRAME_HEADER = 7  # bytes that are read of a frame of AAC or MP3
ID3V1_SIZE = 128  # bytes
APE = b"APETAGEX"
APE_HEADER = 32  # bytes
CERTAIN = 4  # consecutive frames that are not there by chance
LARGEST_GAP = 2048  # bytes between two MP3s in one file
FRAME_COUNTS = (b"Xing", b"Info", b"VBRI")  # names of the frame that counts the others
LAYER_BITS = 6  # its bits in the second byte of a frame of MPEG audio
MP3_RATES = (44100, 48000, 32000)  # Hz, of MPEG 1
BITRATES = {  # kbit/s by the index in the header, from 1
    "MPEG 1, II": (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    "MPEG 1, III": (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    "MPEG 2": (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
WAV_SAMPLES = (1, 3, 6, 7, 0xFFFE)  # tags of integers, floats, A-law, mu-law; extensible
COMMON_RATES = (  # Hz
    *(8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 88200, 96000),
    *(176400, 192000, 352800, 384000),
)
LAW_TAGS = (6, 7)  # A-law and mu-law, whose samples have 8 bits whatever the header says
GSM_FRAME = 33  # bytes
GSM_MAGIC = 13  # its first four bits
DTS_SYNC = b"\x7f\xfe\x80\x01"
SBC_SYNC, MSBC_SYNC = 0x9C, 0xAD
MSBC_FRAME = 57  # bytes
MLP_SYNC = (b"\xf8\x72\x6f\xba", b"\xf8\x72\x6f\xbb")  # TrueHD and MLP, after four bytes
START_CODE = b"\0\0\1"  # of MPEG packets
PACK, PROGRAM_END = b"\xba", b"\xb9"  # after START_CODE
TS_SYNC = 0x47
TS_PACKETS = ((188, 0), (192, 4), (204, 0))  # bytes of a packet, and the place of TS_SYNC
ID3 = (b"ID3\x03", b"ID3\x04")
EBML = b"\x1aE\xdf\xa3"  # Matroska and WebM
# how a recording begins, by its first four bytes
BEGINNINGS = {
    b"RIFF": re.compile(rb"RIFF....(?:WAVE|AVI )", re.DOTALL),
    b"RF64": re.compile(rb"RF64....WAVE", re.DOTALL),
    b"riff": re.compile(rb"riff\x2e\x91\xcf\x11"),  # Sony Wave64
    b"FORM": re.compile(rb"FORM....AIF[FC]", re.DOTALL),
    b".snd": re.compile(rb"\.snd\0\0.{6}\0\0\0[\x01-\x1b]", re.DOTALL),
    b"caff": re.compile(rb"caff\0\x01\0\0"),
    # in Ogg FLAC, it follows the nine bytes of another header
    b"fLaC": re.compile(rb"(?<!\x7fFLAC....)fLaC[\0\x80]\0\0\x22", re.DOTALL),
    b"NIST": re.compile(rb"NIST_1A\n"),
    b"TTA1": re.compile(rb"TTA1[\x01-\x03]\0"),
    b"FLV\x01": re.compile(rb"FLV\x01.\0\0\0\t", re.DOTALL),
    # a block of WavPack whose first sample has the index 0
    b"wvpk": re.compile(rb"wvpk....[\x02-\x10]\x04......\0{4}(?!\0{4})", re.DOTALL),
    b"ftyp": re.compile(rb"(?<=\0\0\0.)ftyp[ -~]{4}", re.DOTALL),  # MP4 and its relatives
    b"OggS": re.compile(rb"OggS\0\x02\0{8}"),
    b"0&\xb2u": re.compile(rb"0&\xb2u\x8ef\xcf\x11\xa6\xd9"),  # ASF, the container of WMA
    EBML: re.compile(EBML + rb".{,40}(?:matroska|webm)", re.DOTALL),
    **{tag: re.compile(tag + rb"\0.[\0-\x7f]{4}", re.DOTALL) for tag in ID3},
}
# What may begin within one recording: codecs have their own headers in containers, and decoders
# read all parts of MP3, Ogg and Matroska. `wav_problem` checks WAV.
WITHIN = {
    b"RIFF": (b"OggS", *ID3),
    b"OggS": (b"OggS",),
    EBML: (EBML, b"fLaC", b"TTA1", b"wvpk"),
}
# whether one of BEGINNINGS has these first two bytes
FIRST_TWO: np.ndarray = np.zeros(1 << 16, bool)
FIRST_TWO[[int.from_bytes(magic[:2], "little") for magic in BEGINNINGS]] = True
UNKNOWN_SIZE = 0x7FFF0000  # bytes; headers of streams of unknown length promise at least this much
SEARCHED = 1 << 20  # bytes that are searched at a time
SHORTEST_RECORDING = 256  # bytes before a second recording
LARGEST_PADDING = 640  # samples, two blocks of GSM 06.10: libsndfile may write an empty one
W64_FIRST = 40  # bytes before the first chunk of a Wave64 file
W64_GUID = b"\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"  # end of its chunks' names
UNKNOWN = b"\xff\xff\xff\xff"  # the size in a WAV header whose writer did not know it
SPHERE_HEADER = 1024  # bytes
SPHERE_FIELDS = (b"sample_count", b"channel_count", b"sample_n_bytes")


def mp3_problem(content: Buffer) -> str:
    """Compare the size of an MP3 with the size in its Xing or Info header, if it has one.

    Returns:
        What is wrong, or "" if nothing is.
    """
    begin = id3_size(content)
    end = _promised_mp3_end(content)
    if end is None:
        return ""
    if len(content) - begin < SHORTEST_MP3 * (end - begin):
        return truncated(len(content), end)
    return problem_after(content, end)


def _promised_mp3_end(content: Buffer) -> int | None:
    """Return the end of an MP3 according to its Xing or Info header, or None without one."""
    begin = id3_size(content)
    first = content[begin : begin + (1 << 12)]
    tag = max(first.find(b"Xing"), first.find(b"Info"))
    if tag < 0:
        return None
    flags = int.from_bytes(first[tag + 4 : tag + 8], "big")
    if not flags & 2:
        return None
    field = tag + 8 + 4 * (flags & 1)  # after the number of frames, which bit 0 announces
    return begin + int.from_bytes(first[field : field + 4], "big")


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


def stream_problem(content: Buffer) -> str:
    """Check the pages of an Ogg file, or look for a cut in the last frame of a stream of frames.

    MP3, AAC, AC-3, DTS, SBC, TrueHD, MLP and MPEG streams do not state their length, so a stream
    that is cut between two frames looks complete.

    Returns:
        What is wrong, or "" if nothing is.
    """
    if content[:4] == b"OggS":
        return ogg_problem(content)
    if len(content) < FRAME_HEADER:
        return ""
    if content[0] == 0xFF and content[1] & 0xF6 == 0xF0:
        return _last_frame_problem(content, 0, adts_frame_size)
    if content[:4] == DTS_SYNC:
        return _last_frame_problem(content, 0, dts_frame_size)
    if content[4:8] in MLP_SYNC:
        return _last_frame_problem(content, 0, mlp_frame_size)
    if content[:4] == START_CODE + PACK:
        return _last_frame_problem(content, 0, mpeg_packet_size)
    if content[0] in (SBC_SYNC, MSBC_SYNC):
        return _last_frame_problem(content, 0, sbc_frame_size)
    for size, place in TS_PACKETS:
        if set(content[place : place + 4 * size : size]) == {TS_SYNC}:
            return INCOMPLETE if len(content) % size else ""
    begin = id3_size(content)
    if content[begin : begin + 1] == b"\xff" and not has_frame_count(content):
        return _last_frame_problem(content, begin, _size_of_same_layer(content, begin))
    return ""


def _size_of_same_layer(content: Buffer, begin: int) -> Callable[[Buffer, int], int]:
    """Return `mp3_frame_size` for frames of the layer of the first one: decoders skip others."""
    first = content[begin + 1] & LAYER_BITS

    def size(content: Buffer, offset: int) -> int:
        is_same = content[offset + 1] & LAYER_BITS == first
        return mp3_frame_size(content, offset) if is_same else 0

    return size


def ogg_problem(content: Buffer) -> str:
    """Return why an Ogg file is truncated or corrupted, or "" (RFC 3533, section 6).

    Decoders skip a page whose checksum is wrong, so the rest of the audio would start too early.
    """
    last_numbers: dict[bytes, int] = {}  # by stream
    is_last = False
    offset = 0
    while content[offset : offset + 4] == b"OggS":
        header = content[offset : offset + OGG_HEADER]
        if len(header) < OGG_HEADER:
            return INCOMPLETE
        lacing = content[offset + OGG_HEADER : offset + OGG_HEADER + header[26]]
        end = offset + OGG_HEADER + header[26] + sum(lacing)
        if end > len(content):
            return INCOMPLETE
        if _ogg_checksum(content[offset:end]) != header[OGG_CHECKSUM]:
            return _corrupted_at(offset, "its page does not match its checksum")
        stream = header[14:18]
        number = int.from_bytes(header[18:22], "little")
        is_first = bool(header[5] & 2)
        if not is_first and number != last_numbers.get(stream, -1) + 1:
            return _corrupted_at(offset, "the page before it is missing")
        last_numbers[stream] = number
        is_last = bool(header[5] & 4)
        offset = end
    if content.find(b"OggS", offset) >= 0:
        return _corrupted_at(offset, "no page begins there")
    return problem_after(content, offset) if is_last else INCOMPLETE


def _ogg_checksum(page: bytes) -> bytes:
    """Return the CRC-32 of an Ogg page as its header has it.

    zlib computes the same polynomial over reversed bits, and inverts the first and last value.
    """
    data = page[: OGG_CHECKSUM.start] + bytes(4) + page[OGG_CHECKSUM.stop :]
    reversed_crc = zlib.crc32(data.translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return reversed_crc.to_bytes(4, "big").translate(REVERSED_BITS)


def _corrupted_at(offset: int, problem: str) -> str:
    return f"is corrupted at byte {offset}: {problem}. Copy it again."


def find_second_recording(content: Buffer) -> int | None:
    """Return where a second recording begins in a file, or None.

    Such a file is made with cat, and decoders stop at the end of the first recording.
    """
    begin = id3_size(content)
    if content[begin + 4 : begin + 8] == b"ftyp":
        begin += 4
    first = content[begin : begin + 4]
    within = WITHIN.get(first, ())
    if first[:1] == b"\xff":  # frames of MP3 or AAC, between which tags may be
        within = ID3
    for place in _places_to_check(content, begin + SHORTEST_RECORDING):
        magic = content[place : place + 4]
        if magic in within or magic not in BEGINNINGS:
            continue
        if magic in ID3 and not _begins_mp3(content, place):
            continue
        if BEGINNINGS[magic].match(content, place):
            return place - 4 if magic == b"ftyp" else place
    return None


def _places_to_check(content: Buffer, begin: int) -> Iterator[int]:
    """Yield where one of BEGINNINGS may be, in ascending order.

    This takes 3 ns a byte. Calls of bytes.find, or a regular expression, take 12 ns.
    """
    for start in range(begin, len(content), SEARCHED):
        block = content[start : start + SEARCHED + 1]
        places: list[int] = []
        for shift in (0, 1):
            pairs = np.frombuffer(block[shift : len(block) - (len(block) - shift) % 2], "<u2")
            places += (2 * np.flatnonzero(FIRST_TWO[pairs]) + shift).tolist()
        for place in sorted(places):
            yield start + place


def _begins_mp3(content: Buffer, offset: int) -> bool:
    """Return whether two frames of an MP3 follow an ID3 tag."""
    first = offset + id3_size(content[offset : offset + 10])
    if first + FRAME_HEADER > len(content):
        return False
    second = first + mp3_frame_size(content, first)
    if second == first or second + FRAME_HEADER > len(content):
        return False
    return bool(mp3_frame_size(content, second))


def id3_size(content: Buffer) -> int:
    """Return the bytes of the ID3v2 tag with which a file begins, or 0."""
    if content[:3] != b"ID3":
        return 0
    size = 0
    for byte in content[6:10]:  # four times seven bits
        size = size << 7 | byte
    return size + 10


def has_frame_count(content: Buffer) -> bool:
    """Return whether an MP3 begins, after an ID3 tag, with a frame that counts the others.

    Xing, LAME and Fraunhofer's encoder write such frames.
    """
    begin = id3_size(content)
    first = content[begin : begin + (1 << 12)]
    return any(name in first for name in FRAME_COUNTS)


def _last_frame_problem(content: Buffer, offset: int, size: Callable[[Buffer, int], int]) -> str:
    """Walk over the frames of a stream, and return what is wrong in it or at its end, or ""."""
    first = content[offset : offset + 2]
    frames = 0
    while offset + FRAME_HEADER <= len(content):
        length = size(content, offset) or _tag_size(content, offset)
        if not length:  # an unknown tag at the end, or another kind of file
            if frames > 1 and _has_frames_after(content, offset, size):
                return _corrupted_at(offset, "no frame begins there")
            return problem_after(content, offset) if frames > CERTAIN else ""
        offset += length
        frames += 1
    rest = content[offset : offset + 2]
    has_part = any(rest) and first.startswith(rest)  # of another frame
    return INCOMPLETE if frames > 1 and (offset > len(content) or has_part) else ""


def problem_after(content: Buffer, end: int) -> str:
    """Look for anything but tags and zeros after the end of a recording.

    Args:
        content: the file.
        end: the first byte after the recording.

    Returns:
        What is wrong, or "" if nothing is.
    """
    begin = end
    while size := _tag_size(content, begin):
        begin += size
    if len(content) - begin <= LARGEST_TAIL or not any(content[begin : begin + SEARCHED]):
        return ""
    return (
        f"has {len(content) - end} bytes after the end of its recording at byte {end}, which a "
        f"decoder would not read. Copy it again. {JOIN_WITH_SOX}"
    )


def _tag_size(content: Buffer, offset: int) -> int:
    """Return the bytes of an ID3 tag (version 1 or 2) or an APE tag, or 0 if there is none."""
    if content[offset : offset + 3] == b"TAG":
        return ID3V1_SIZE
    if content[offset : offset + len(APE)] == APE:
        return APE_HEADER + int.from_bytes(content[offset + 12 : offset + 16], "little")
    return id3_size(content[offset : offset + 10])


def _has_frames_after(content: Buffer, offset: int, size: Callable[[Buffer, int], int]) -> bool:
    """Return whether frames follow something else in a stream."""
    first_byte = content[:1] if content[:1] != b"I" else b"\xff"
    while (offset := content.find(first_byte, offset + 1)) >= 0:
        end = offset
        for _ in range(CERTAIN):
            length = size(content, end) if end + FRAME_HEADER <= len(content) else 0
            if not length:
                break
            end += length
        else:
            return True
    return False


def adts_frame_size(content: Buffer, offset: int) -> int:
    """Return the bytes of an AAC frame (ISO/IEC 14496-3, adts_frame), or 0 if there is none."""
    if content[offset] != 0xFF or content[offset + 1] & 0xF6 != 0xF0:
        return 0
    high, middle, low = content[offset + 3 : offset + 6]
    return (high & 3) << 11 | middle << 3 | low >> 5


def is_gsm(content: Buffer) -> bool:
    """Return whether a file consists of frames of GSM 06.10, each of which begins with 13."""
    firsts = content[::GSM_FRAME]
    return len(content) % GSM_FRAME == 0 and all(byte >> 4 == GSM_MAGIC for byte in firsts)


def dts_frame_size(content: Buffer, offset: int) -> int:
    """Return the bytes of a frame of DTS (ETSI TS 102 114, section 5.3), or 0 if there is none."""
    header = content[offset : offset + 8]
    if header[:4] != DTS_SYNC or len(header) < 8:
        return 0
    return (int.from_bytes(header[5:8], "big") >> 4 & 0x3FFF) + 1


def mlp_frame_size(content: Buffer, offset: int) -> int:
    """Return the bytes of an access unit of TrueHD or MLP."""
    return 2 * ((content[offset] & 15) << 8 | content[offset + 1])


def sbc_frame_size(content: Buffer, offset: int) -> int:
    """Return the bytes of a frame of SBC (A2DP, section 12.9) or mSBC, or 0 if there is none."""
    sync, fields, bitpool = content[offset : offset + 3]
    if sync == MSBC_SYNC:
        return MSBC_FRAME
    if sync != SBC_SYNC:
        return 0
    blocks = 4 * (fields >> 4 & 3) + 4
    mode = fields >> 2 & 3  # 0: mono, 1: dual channel, 2: stereo, 3: joint stereo
    subbands = 8 if fields & 1 else 4
    channels = 1 if mode == 0 else 2
    bits = blocks * bitpool * (2 if mode == 1 else 1)
    if mode == 3:
        bits += subbands
    return 4 + subbands * channels // 2 + -(-bits // 8)


def mpeg_packet_size(content: Buffer, offset: int) -> int:
    """Return the bytes of a packet of an MPEG program stream, or 0 if there is none.

    This includes the headers of packs (ISO/IEC 13818-1, section 2.5.3, and 11172-1).
    """
    header = content[offset : offset + 14]
    code = header[3:4]
    if header[:3] != START_CODE or code < PROGRAM_END:
        return 0
    if code == PROGRAM_END:
        return 4
    if code != PACK:
        return 6 + int.from_bytes(header[4:6], "big")
    if header[4] >> 6 != 1:  # MPEG 1
        return 12
    return 14 + (header[13] & 7 if len(header) > 13 else 0)


def mp3_frame_size(content: Buffer, offset: int) -> int:
    """Return the bytes of a frame of MPEG audio layer II or III, or 0 if there is none."""
    if content[offset] != 0xFF or content[offset + 1] & 0xE0 != 0xE0:
        return 0
    version = content[offset + 1] >> 3 & 3  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    layer = content[offset + 1] >> 1 & 3  # 1: layer III, 2: layer II
    bitrate = content[offset + 2] >> 4
    rate = content[offset + 2] >> 2 & 3
    if version == 1 or layer not in (1, 2) or bitrate in (0, 15) or rate == 3:
        return 0
    table = BITRATES["MPEG 1, II" if layer == 2 else "MPEG 1, III"]
    if version != 3:
        table = BITRATES["MPEG 2"]
    samples_per_second = MP3_RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
    samples = 576 if version != 3 and layer == 1 else 1152
    padding = content[offset + 2] >> 1 & 1
    return samples // 8 * table[bitrate - 1] * 1000 // samples_per_second + padding


def is_several_mp3s(content: Buffer) -> bool:
    """Return whether an MP3 has frames after those that its Xing or Info header counts."""
    end = _promised_mp3_end(content)
    if end is None:
        return False
    size_of = _size_of_same_layer(content, id3_size(content))
    # encoders count with or without the header's own frame, and another ID3 tag may follow
    for offset in range(end, min(end + LARGEST_GAP, len(content) - 2 * FRAME_HEADER)):
        if content[offset : offset + 3] == b"ID3":
            return True
        size = size_of(content, offset)
        second = offset + size
        if size and second + FRAME_HEADER <= len(content) and size_of(content, second):
            return True
    return False


def truncated(size: int | str, promised: int | str) -> str:
    """Return the description of a file that has fewer bytes than its header promises."""
    return f"is truncated: it has {size} of the {promised} bytes in its header. Copy it again."


def wav_data(content: Buffer) -> tuple[int, int] | None:
    """Find the audio of a WAV file.

    Returns:
        The offset of the audio and its size in the header, both in bytes, or None if unknown.
    """
    return _wav_chunk(content, b"data")


def _wav_chunk(content: Buffer, name: bytes) -> tuple[int, int] | None:
    """Return the offset of the content of a WAV file's chunk and its size, or None."""
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        return None
    offset = 12
    while offset + 8 <= len(content):
        size = int.from_bytes(content[offset + 4 : offset + 8], "little")
        if content[offset : offset + 4] == name:
            return offset + 8, size
        offset += 8 + size + size % 2
    return None


def wav_sample_count(content: Buffer, blocks: int) -> int:
    """Return how many samples the blocks of a compressed WAV file have without padding.

    Args:
        content: the file.
        blocks: number of samples in all blocks. The count in the fact chunk is used if it is at
            most two blocks smaller, so that a wrong one cannot cut audio.
    """
    found = _wav_chunk(content, b"fact")
    if found is None:
        return blocks
    count = int.from_bytes(content[found[0] : found[0] + 4], "little")
    return count if blocks - LARGEST_PADDING <= count <= blocks else blocks


def wav_problem(content: Buffer) -> str:
    """Look for a header of a WAV file that contradicts itself, and for audio after its end.

    Returns:
        What is wrong, or "" if nothing is.
    """
    contradiction = _wav_contradiction(content)
    if contradiction:
        return contradiction
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


def _wav_contradiction(content: Buffer) -> str:
    """Look for a damaged number of channels, rate or sample size in a WAV file's header.

    libsndfile reads such a file with another length. Some writers give a wrong number of bytes per
    second, so the rate is checked only if no recording has it.
    """
    found = _wav_chunk(content, b"fmt ")
    if found is None or found[1] < 16:
        return ""
    fields = content[found[0] : found[0] + 16]
    if len(fields) < 16:
        return ""
    tag, channels, rate, byte_rate, block, bits = struct.unpack("<HHIIHH", fields)
    if tag not in WAV_SAMPLES or not channels or not block:
        return ""
    size = 1 if tag in LAW_TAGS else -(-bits // 8)  # bytes of a sample
    is_wider = bits == 24 and block == 4 * channels  # which libsndfile reads, unlike 20 bits
    if block != size * channels and not is_wider:
        return (
            f"has a header that contradicts itself: {channels} channels of {bits} bits, but "
            f"{block} bytes for a sample of all channels. Copy it again."
        )
    if rate not in COMMON_RATES and byte_rate / block in COMMON_RATES:
        return (
            f"has a header that contradicts itself: {rate} Hz, but {byte_rate} bytes per second "
            f"and {block} bytes for a sample of all channels. Copy it again."
        )
    return ""


def w64_problem(content: Buffer) -> str:
    """Look for anything after the audio of a Wave64 file, which libsndfile would read as audio.

    Returns:
        What is wrong, or "" if nothing is.
    """
    offset = W64_FIRST
    while offset + 24 <= len(content):
        size = int.from_bytes(content[offset + 16 : offset + 24], "little")  # with its 24 bytes
        end = offset + size + -size % 8
        if size < 24:
            return ""
        if content[offset : offset + 4] == b"data":
            is_chunk = content[end + 4 : end + 16] == W64_GUID
            if is_chunk or len(content) - end <= LARGEST_TAIL:
                return ""
            return (
                f"has {len(content) - offset - 24} bytes of audio, but {size - 24} in its header. "
                "Copy it again."
            )
        offset = end
    return ""


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
