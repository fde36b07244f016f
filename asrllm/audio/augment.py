"""Augmentation: speed, reverberation and noise on the waveform, masks on the features.

Every draw depends only on (seed, pass_index, key) and has its own stream for each kind, so workers,
ranks and the order of calls do not change it, and enabling one kind does not change the draws of
the others. `pass_index` counts the earlier passes over the corpus: the epoch, if its weight is 1.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import soxr
import torch
from pydantic import Field
from torch import Tensor

from asrllm.data.audio_file import FORMATS
from asrllm.data.audio_files import open_audio, read_segment
from asrllm.data.find_audio import list_audio, warn_of_skipped
from asrllm.data.sources import Utterance, read_cuts
from asrllm.data.waveforms import resample
from asrllm.defaults import RATE
from asrllm.errors import UserError
from asrllm.schema import NonNegativeInt, Ratio, component

NO_MASKS: np.ndarray = np.zeros((0, 2), np.float32)
SYNTHETIC = "synthetic"
SILENCE = 1e-10  # mean square, 100 dB below full scale; below it, a level is meaningless
ROOM_SECONDS = 2.0  # longest impulse response
ROUNDING = 0.001  # seconds that are read beyond what is needed, so that rounding leaves no gap
CACHED_ROOMS = 256  # decoded impulse responses, at most 32 MiB in each worker
# direct-to-reverberant ratio of synthetic rooms: from across a room to close to the microphone
DIRECT_DB = (-3.0, 12.0)
AUDIO_SOURCE = "a directory of audio files, or Lhotse cuts"
# FFTs are fast at these numbers times powers of 2
FAST_FACTORS = (1, 3, 5, 9, 15, 25, 27, 45, 75, 81, 125, 135, 225)


@component
class SpecAugmentConfig:
    """SpecAugment (Park et al., 2019) without time warping."""

    prob: Ratio = 0.0
    """ratio of utterances with masks"""
    time_masks: NonNegativeInt = 10
    """masks in time"""
    time_mask_share: Ratio = 0.05
    """longest mask in time, as a ratio of the utterance"""
    freq_masks: NonNegativeInt = 2
    """masks in frequency"""
    freq_mask_share: Ratio = 0.34
    """widest mask in frequency, as a ratio of the bins"""


@component
class NoiseConfig:
    """Additive noise."""

    source: str | None = None
    """directory of audio files, for example of MUSAN, or Lhotse cuts; set prob too"""
    prob: Ratio = 0.0
    """ratio of utterances with noise"""
    snr_min: float = Field(default=10.0, ge=-100)
    """lowest signal-to-noise ratio in dB"""
    snr_max: float = Field(default=20.0, le=100)
    """highest signal-to-noise ratio in dB"""

    def __post_init__(self) -> None:
        if self.prob and not self.source:
            raise UserError(
                f"data.augment.noise.prob={self.prob} needs data.augment.noise.source. "
                f"Set it to {AUDIO_SOURCE}."
            )
        if self.snr_min > self.snr_max:
            raise UserError(
                f"data.augment.noise.snr_min={self.snr_min} is above "
                f"data.augment.noise.snr_max={self.snr_max}. Set it to at most snr_max."
            )


@component
class ReverbConfig:
    """Reverberation."""

    source: str | None = None
    """synthetic, a directory of impulse responses, or Lhotse cuts of them"""
    prob: Ratio = 0.0
    """ratio of utterances with reverberation"""
    rt60_min: float = Field(default=0.1, ge=0.05)
    """shortest time in seconds in which a synthetic room decays by 60 dB"""
    rt60_max: float = Field(default=0.6, le=ROOM_SECONDS)
    """longest time in seconds in which a synthetic room decays by 60 dB"""

    def __post_init__(self) -> None:
        if self.prob and not self.source:
            raise UserError(
                f"data.augment.reverb.prob={self.prob} needs data.augment.reverb.source. "
                f"Set it to '{SYNTHETIC}', a directory of impulse responses, or Lhotse cuts."
            )
        if self.rt60_min > self.rt60_max:
            raise UserError(
                f"data.augment.reverb.rt60_min={self.rt60_min} is above "
                f"data.augment.reverb.rt60_max={self.rt60_max}. Set it to at most rt60_max."
            )


@component
class AugmentConfig:
    """Augmentation of training audio. Every draw depends only on (seed, epoch, key)."""

    speed: list[Annotated[float, Field(ge=0.5, le=2)]] = Field(default=[1.0], min_length=1)
    """factors to draw from, for example [0.9, 1.0, 1.1]"""
    reverb: ReverbConfig = ReverbConfig()
    noise: NoiseConfig = NoiseConfig()
    spec_augment: SpecAugmentConfig = SpecAugmentConfig()


class Augmenter:
    """Augments waveforms according to the configuration.

    It holds no open files, so it may be forked and pickled.
    """

    def __init__(self, config: AugmentConfig, *, seed: int, limits: tuple[int, int]) -> None:
        """
        Args:
            config: the kinds of augmentation.
            seed: seed of all draws.
            limits: minimum and maximum number of samples after a change of speed.

        Raises:
            UserError: a source does not exist or has no audio.
        """
        self.config = config
        self.seed = seed
        self.limits = limits
        # a source that is given is checked, whatever its probability
        self._noises: Clips | None = None
        if config.noise.source:
            self._noises = Clips(config.noise.source, "data.augment.noise.source")
        self._rooms: Clips | None = None  # None: synthetic
        if config.reverb.source and config.reverb.source != SYNTHETIC:
            self._rooms = Clips(config.reverb.source, "data.augment.reverb.source")
        self._decoded_rooms: dict[int, tuple[np.ndarray, int]] = {}

    def __call__(self, wave: np.ndarray, *, key: str, pass_index: int) -> np.ndarray:
        """Augment the waveform of an utterance.

        Args:
            wave: (samples,) float32 at RATE. It is not changed.
            key: key of the utterance.
            pass_index: how many passes over its corpus precede this one.

        Returns:
            (samples,) float32, whose length depends on the speed.

        Raises:
            UserError: a clip cannot be read.
        """
        # The order is physical: the faster voice is in the room, and noise reaches the microphone
        # directly. Because noise is added last, the SNR is that of the model's input. icefall also
        # changes the speed first and mixes noise into the finished cut.
        wave = self._change_speed(wave, self._draws("speed", key, pass_index))
        if self.config.reverb.prob:
            wave = self._reverberate(wave, self._draws("reverb", key, pass_index))
        if self._noises is not None:
            wave = self._add_noise(wave, self._noises, self._draws("noise", key, pass_index))
        return wave

    def masks(self, key: str, pass_index: int) -> np.ndarray:
        """Draw the masks of an utterance for mask_features.

        Widths are uniform up to the widest mask, which for time masks is a ratio of the utterance
        (p in Park et al., 2020).

        Returns:
            (time_masks + freq_masks, 2) float32, the beginning and end of each mask as ratios of
            the utterance or of the bins. All are 0 if the utterance is not masked.
        """
        config = self.config.spec_augment
        widest: np.ndarray = np.repeat(
            [config.time_mask_share, config.freq_mask_share], [config.time_masks, config.freq_masks]
        )
        draws = self._draws("masks", key, pass_index)
        if draws.random() >= config.prob:
            return np.zeros((len(widest), 2), np.float32)
        width = draws.random(len(widest)) * widest
        begin = draws.random(len(widest)) * (1 - width)
        return np.stack([begin, begin + width], 1).astype(np.float32)

    def _draws(self, kind: str, key: str, pass_index: int) -> np.random.Generator:
        seed = f"{self.seed}/{pass_index}/{kind}/{key}"
        digest = hashlib.blake2b(seed.encode(), digest_size=16).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))

    def _change_speed(self, wave: np.ndarray, draws: np.random.Generator) -> np.ndarray:
        """Change tempo and pitch by resampling (Ko et al., 2015)."""
        factors = self.config.speed
        factor = factors[int(draws.integers(len(factors)))]
        if factor == 1:
            return wave
        changed = soxr.resample(wave, RATE * factor, RATE)
        fewest, most = self.limits
        if not fewest <= len(changed) <= most:
            return wave
        return changed

    def _reverberate(self, wave: np.ndarray, draws: np.random.Generator) -> np.ndarray:
        config = self.config.reverb
        if draws.random() >= config.prob:
            return wave
        if self._rooms is None:
            rt60 = draws.uniform(config.rt60_min, config.rt60_max)
            direct_db = draws.uniform(*DIRECT_DB)
            response = synthetic_room(draws, rt60=rt60, direct_db=direct_db)
            return reverberate(wave, response, direct=0)
        number = int(draws.integers(len(self._rooms)))
        response, direct = self._room(self._rooms, number)
        return reverberate(wave, response, direct)

    def _room(self, rooms: "Clips", number: int) -> tuple[np.ndarray, int]:
        """Return an impulse response and the index of its direct path.

        The direct path is the loudest sample, which is scaled to 1.
        """
        if number not in self._decoded_rooms:
            if len(self._decoded_rooms) >= CACHED_ROOMS:
                self._decoded_rooms.pop(next(iter(self._decoded_rooms)))
            response = rooms.read(number, seconds=ROOM_SECONDS)
            direct = int(np.abs(response).argmax())
            response = response / (abs(response[direct]) or np.float32(1))
            self._decoded_rooms[number] = (response, direct)
        return self._decoded_rooms[number]

    def _add_noise(
        self, wave: np.ndarray, noises: "Clips", draws: np.random.Generator
    ) -> np.ndarray:
        config = self.config.noise
        if draws.random() >= config.prob:
            return wave
        number = int(draws.integers(len(noises)))
        snr = draws.uniform(config.snr_min, config.snr_max)
        start = draws.random()
        noise = noises.read(number, seconds=len(wave) / RATE, start=start)
        if len(noise) < len(wave):  # np.resize repeats it
            noise = np.roll(noise, int(start * len(noise)))
        return mix(wave, np.resize(noise, len(wave)), snr)


class Clips:
    """Recordings of noise or impulse responses, by number."""

    def __init__(self, source: str, key: str) -> None:
        """
        Args:
            source: a directory, whose audio files are found recursively, or a Lhotse manifest.
            key: the configuration key of the source, for error messages.

        Raises:
            UserError: the source does not exist or has no audio.
        """
        if not Path(source).exists():
            raise UserError(f"{key}={source!r} does not exist. Set it to {AUDIO_SOURCE}.")
        self.key = key
        self.clips: Sequence[str | Utterance]
        if Path(source).is_dir():
            files, skipped = list_audio(source)
            warn_of_skipped(source, skipped)
            self.clips = sorted(map(str, files))
        else:
            self.clips = _cuts(source, key)
        if not self.clips:
            raise UserError(
                f"{key}={source!r} has no audio. "
                f"Add audio files ({', '.join(FORMATS)}, ...), or use Lhotse cuts."
            )

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, number: int, *, seconds: float, start: float = 0.0) -> np.ndarray:
        """Read a part of a clip.

        Args:
            number: index of the clip.
            seconds: length of the part; a shorter clip is read completely.
            start: where the part begins, from 0 (first possible place) to 1 (last one).

        Returns:
            (samples,) float32 at RATE.

        Raises:
            UserError: the clip cannot be read, or has no samples or no finite ones.
        """
        clip = self.clips[number]
        name = clip if isinstance(clip, str) else clip.key
        try:
            if isinstance(clip, str):
                wave, rate = _read_file(clip, seconds, start)
            else:
                wave, rate = _read_cut(clip, seconds, start)
        except Exception as error:  # the backends of Lhotse raise exceptions of any type
            raise UserError(
                f"{self.key}: {name!r} cannot be read ({error}). Repair or remove it."
            ) from error
        if not len(wave):
            raise UserError(f"{self.key}: {name!r} has no samples. Remove it.")
        if not np.isfinite(wave).all():
            raise UserError(f"{self.key}: {name!r} has NaN or infinite values. Remove it.")
        return resample(wave, rate)


def _cuts(manifest: str, key: str) -> list[str | Utterance]:
    """Return the cuts of a manifest.

    A cut that is a whole file is represented by its path: then only the needed part is decoded.
    """
    clips: list[str | Utterance] = []
    for cut in list(read_cuts(manifest)):
        if cut.problem:
            raise UserError(
                f"{key}={manifest!r}: {cut.key!r} has no audio: {cut.problem[1]}. Remove it."
            )
        clips.append(str(cut.file) if cut.file else cut)
    return clips


def _read_file(path: str, seconds: float, start: float) -> tuple[np.ndarray, int]:
    """Read the first channel: the mean of several microphones would be a comb filter."""
    file = open_audio(path)
    begin = 0.0
    end = None
    if file.seconds is not None and file.seconds > seconds:
        begin = start * (file.seconds - seconds)
        end = begin + seconds + ROUNDING
    wave, rate = read_segment(file, begin, end)
    return wave[: math.ceil(seconds * rate), 0], rate


def _read_cut(cut: Utterance, seconds: float, start: float) -> tuple[np.ndarray, int]:
    wave, rate = cut.load()
    frames = math.ceil(seconds * rate)
    first = int(start * max(0, len(wave) - frames))
    return wave[first : first + frames], rate


def mix(wave: np.ndarray, noise: np.ndarray, snr: float) -> np.ndarray:
    """Add noise to a waveform of the same length.

    If either is silent, the waveform is unchanged. Peaks above 1 are not clipped or scaled:
    features accept them, and scaling would make speech quieter wherever there is noise.

    Args:
        wave: (samples,).
        noise: (samples,).
        snr: ratio of the mean powers in dB.
    """
    power = mean_square(wave)
    noise_power = mean_square(noise)
    if power < SILENCE or noise_power < SILENCE:
        return wave
    scale = math.sqrt(power / noise_power * 10 ** (-snr / 10))
    return wave + np.float32(scale) * noise


def reverberate(wave: np.ndarray, response: np.ndarray, direct: int) -> np.ndarray:
    """Convolve a waveform with an impulse response, keeping its length, power and timing.

    Args:
        wave: (samples,).
        response: the impulse response.
        direct: index of the direct path in the response.
    """
    size = _fast_size(len(wave) + len(response) - 1)
    spectrum = np.fft.rfft(wave, size) * np.fft.rfft(response, size)
    full = np.fft.irfft(spectrum, size)
    wet = full[direct : direct + len(wave)]
    power = mean_square(wet)
    if not power:  # silence
        return wave
    return (wet * math.sqrt(mean_square(wave) / power)).astype(np.float32)


def synthetic_room(draws: np.random.Generator, *, rt60: float, direct_db: float) -> np.ndarray:
    """Draw an impulse response.

    It is a direct path of 1 and Polack's (1988) reverberation: white noise that decays by 60 dB in
    `rt60` seconds.

    Args:
        draws: the random numbers.
        rt60: reverberation time in seconds.
        direct_db: direct-to-reverberant energy ratio in dB.

    Returns:
        (samples,) float32 at RATE.
    """
    time = np.arange(1, round(rt60 * RATE)) / RATE
    decay = np.exp(-math.log(1000) / rt60 * time)
    tail = draws.standard_normal(len(time)) * decay
    energy = 10 ** (-direct_db / 10)
    tail *= math.sqrt(energy / np.square(tail).sum())
    return np.concatenate([[1.0], tail]).astype(np.float32)


def mean_square(wave: np.ndarray) -> float:
    """Return the mean power of a waveform."""
    return float(np.square(wave, dtype=np.float64).mean())


@functools.lru_cache(maxsize=4096)
def _fast_size(least: int) -> int:
    """Return the smallest fast FFT size from `least` on: one with few, small prime factors."""
    sizes = []
    for factor in FAST_FACTORS:
        quotient = -(-least // factor)
        sizes.append(factor << max(0, quotient - 1).bit_length())
    return min(sizes)


def mask_features(features: Tensor, lengths: Tensor, masks: Tensor, time_masks: int) -> Tensor:
    """Replace masked frames and bins by the mean of their utterance's true frames.

    Padding is unchanged. Waveforms, which have one bin, are masked in time only. Nothing waits for
    the device.

    Args:
        features: (N, T, F).
        lengths: (N,) true frames.
        masks: (N, M, 2) from Augmenter.masks.
        time_masks: this many masks at the beginning are in time, the others in frequency.
    """
    frames = torch.arange(features.shape[1], device=features.device)
    bins = torch.arange(features.shape[2], device=features.device)
    real = frames < lengths[:, None]  # (N, T)
    frame_ratios = (frames + 0.5) / lengths[:, None]
    in_time = _inside(frame_ratios, masks[:, :time_masks])  # (N, T)
    bin_ratios = ((bins + 0.5) / len(bins)).expand(len(masks), -1)
    in_bins = _inside(bin_ratios, masks[:, time_masks:])  # (N, F)
    masked = in_time[:, :, None]
    if len(bins) > 1:
        masked = masked | in_bins[:, None]
    masked = masked & real[..., None]
    without_padding = features.masked_fill(~real[..., None], 0)
    total = without_padding.sum((1, 2), dtype=torch.float32)
    mean = total / (lengths * len(bins)).clamp(min=1)
    return torch.where(masked, mean.to(features.dtype)[:, None, None], features)


def _inside(ratios: Tensor, masks: Tensor) -> Tensor:
    """Return whether any mask (N, M, 2) covers each of the ratios (N, P), as (N, P)."""
    begins = masks[..., :1] <= ratios[:, None]
    ends = ratios[:, None] < masks[..., 1:]
    return (begins & ends).any(1)
