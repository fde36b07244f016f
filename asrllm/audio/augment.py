"""Augmentation: speed, rooms and noise on the waveform, masks on the features.

Every draw depends only on (seed, pass_index, key) and has its own stream for each kind, so workers,
ranks and the order of calls do not change it, and enabling one kind leaves the draws of the others
as they are. `pass_index` counts the earlier passes over the corpus: the epoch, for a corpus of weight 1.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
import torch
from torch import Tensor

from asrllm.audio.stream import FORMATS, list_audio, open_audio, read_stretch, warn_of_skipped
from asrllm.data.sources import Utterance, read_cuts
from asrllm.defaults import RATE
from asrllm.errors import UserError

NO_MASKS: np.ndarray = np.zeros((0, 2), np.float32)
SYNTHETIC = "synthetic"
SILENCE = 1e-10  # mean square, 100 dB below full scale: what is fainter has no level to speak of
ROOM_SECONDS = 2.0  # of an impulse response that are heard
ROUNDING = 0.001  # seconds that are read beyond what is needed, so that rounding leaves no gap
CACHED_ROOMS = 256  # impulse responses kept decoded, at most 32 MiB in each reading process
DIRECT_DB = (
    -3.0,
    12.0,
)  # of synthetic rooms: the direct path over the rest, as from across a room to close to the microphone


@dataclass(frozen=True, kw_only=True)
class SpecAugmentConfig:
    prob: float
    time_masks: int
    time_mask_share: float
    freq_masks: int
    freq_mask_share: float

    def __post_init__(self) -> None:
        for key in ("prob", "time_mask_share", "freq_mask_share"):
            _check_share(f"spec_augment.{key}", getattr(self, key))
        for key in ("time_masks", "freq_masks"):
            if getattr(self, key) < 0:
                raise UserError(
                    f"data.augment.spec_augment.{key}={getattr(self, key)} must be 0 (none) or more"
                )


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    source: str | None
    prob: float
    snr_min: float
    snr_max: float

    def __post_init__(self) -> None:
        _check_share("noise.prob", self.prob)
        if self.prob and not self.source:
            raise UserError(
                f"data.augment.noise.prob={self.prob} needs data.augment.noise.source: a folder of audio files, or Lhotse cuts"
            )
        if not -100 <= self.snr_min <= self.snr_max <= 100:
            raise UserError(
                f"data.augment.noise.snr_min={self.snr_min} must not be above data.augment.noise.snr_max={self.snr_max}, "
                "both from -100 to 100 dB"
            )


@dataclass(frozen=True, kw_only=True)
class ReverbConfig:
    source: str | None
    prob: float
    rt60_min: float
    rt60_max: float

    def __post_init__(self) -> None:
        _check_share("reverb.prob", self.prob)
        if self.prob and not self.source:
            raise UserError(
                f"data.augment.reverb.prob={self.prob} needs data.augment.reverb.source: "
                f"'{SYNTHETIC}', a folder of impulse responses, or Lhotse cuts"
            )
        if not 0.05 <= self.rt60_min <= self.rt60_max <= ROOM_SECONDS:
            raise UserError(
                f"data.augment.reverb.rt60_min={self.rt60_min} must not be above data.augment.reverb.rt60_max={self.rt60_max}, "
                f"both from 0.05 to {ROOM_SECONDS:g} s"
            )


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    speed: list[float]
    noise: NoiseConfig
    reverb: ReverbConfig
    spec_augment: SpecAugmentConfig

    def __post_init__(self) -> None:
        if not self.speed or not all(0.5 <= factor <= 2 for factor in self.speed):
            raise UserError(
                f"data.augment.speed={self.speed} must be a list of factors from 0.5 to 2; [1.0] leaves the speed as it is"
            )


def _check_share(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"data.augment.{key}={value} must lie between 0 and 1")


class Augmenter:
    """Changes waveforms as the configuration says. Nothing stays open: it may be forked and pickled.

    limits: the fewest and the most samples that a change of speed may lead to. Raises UserError where a source is missing or empty.
    """

    def __init__(self, config: AugmentConfig, *, seed: int, limits: tuple[int, int]) -> None:
        self.config, self.seed, self.limits = config, seed, limits
        noise, reverb = config.noise, config.reverb
        self._noises = (
            Clips(noise.source, "data.augment.noise.source")
            if noise.source and noise.prob
            else None
        )
        recorded = reverb.source and reverb.prob and reverb.source != SYNTHETIC
        self._rooms = Clips(str(reverb.source), "data.augment.reverb.source") if recorded else None
        self._decoded_rooms: dict[int, tuple[np.ndarray, int]] = {}

    def __call__(self, wave: np.ndarray, *, key: str, pass_index: int) -> np.ndarray:
        """wave: (samples,) float32 at RATE -> likewise, longer or shorter by the speed. UserError names a clip that cannot be read."""
        # A faster voice speaks in a room, and noise reaches the microphone beside it. Noise comes last, neither sped up nor reverberated,
        # so that the SNR is that of what the model hears; icefall too changes the speed beforehand and mixes noise into the finished cut.
        wave = self._change_speed(wave, self._draws("speed", key, pass_index))
        if self.config.reverb.prob:
            wave = self._put_in_room(wave, self._draws("reverb", key, pass_index))
        if self._noises is not None:
            wave = self._add_noise(wave, self._noises, self._draws("noise", key, pass_index))
        return wave

    def masks(self, key: str, pass_index: int) -> np.ndarray:
        """(time_masks + freq_masks, 2) float32 for mask_features: where each begins and ends, as shares of the utterance or of the bins.

        SpecAugment (Park et al., 2019) without warping: widths uniform up to the longest, which for time masks is a share of the utterance
        (their p; Park et al., 2020). Without a mask: zeros.
        """
        config = self.config.spec_augment
        longest: np.ndarray = np.repeat(
            [config.time_mask_share, config.freq_mask_share], [config.time_masks, config.freq_masks]
        )
        draws = self._draws("masks", key, pass_index)
        if draws.random() >= config.prob:
            return np.zeros((len(longest), 2), np.float32)
        width = draws.random(len(longest)) * longest
        begin = draws.random(len(longest)) * (1 - width)
        return np.stack([begin, begin + width], 1).astype(np.float32)

    def _draws(self, kind: str, key: str, pass_index: int) -> np.random.Generator:
        digest = hashlib.blake2b(
            f"{self.seed}/{pass_index}/{kind}/{key}".encode(), digest_size=16
        ).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))

    def _change_speed(self, wave: np.ndarray, draws: np.random.Generator) -> np.ndarray:
        """Resampling: tempo and pitch (Ko et al., 2015)."""
        factor = self.config.speed[int(draws.integers(len(self.config.speed)))]
        if factor == 1:
            return wave
        changed = soxr.resample(wave, RATE * factor, RATE)
        return changed if self.limits[0] <= len(changed) <= self.limits[1] else wave

    def _put_in_room(self, wave: np.ndarray, draws: np.random.Generator) -> np.ndarray:
        config = self.config.reverb
        if draws.random() >= config.prob:
            return wave
        if self._rooms is None:
            response = synthetic_room(
                draws,
                rt60=draws.uniform(config.rt60_min, config.rt60_max),
                direct_db=draws.uniform(*DIRECT_DB),
            )
            return reverberate(wave, response, direct=0)
        return reverberate(wave, *self._room(self._rooms, int(draws.integers(len(self._rooms)))))

    def _room(self, rooms: "Clips", number: int) -> tuple[np.ndarray, int]:
        """An impulse response and where its direct path is: its loudest sample, here 1."""
        if number not in self._decoded_rooms:
            if len(self._decoded_rooms) >= CACHED_ROOMS:
                self._decoded_rooms.pop(next(iter(self._decoded_rooms)))
            response = rooms.read(number, seconds=ROOM_SECONDS)
            direct = int(np.abs(response).argmax())
            self._decoded_rooms[number] = (
                response / (abs(response[direct]) or np.float32(1)),
                direct,
            )
        return self._decoded_rooms[number]

    def _add_noise(
        self, wave: np.ndarray, noises: "Clips", draws: np.random.Generator
    ) -> np.ndarray:
        config = self.config.noise
        if draws.random() >= config.prob:
            return wave
        number, snr, start = (
            int(draws.integers(len(noises))),
            draws.uniform(config.snr_min, config.snr_max),
            draws.random(),
        )
        noise = noises.read(number, seconds=len(wave) / RATE, start=start)
        if len(noise) < len(wave):  # looped
            noise = np.roll(noise, int(start * len(noise)))
        return mix(wave, np.resize(noise, len(wave)), snr)


class Clips:
    """Recordings of noises or of rooms, by number: audio files anywhere below a folder, or the cuts of a Lhotse manifest.

    key: the configuration's key that names the source, for errors.
    """

    def __init__(self, source: str, key: str) -> None:
        if not Path(source).exists():
            raise UserError(
                f"{key}={source!r} does not exist: give a folder of audio files, or Lhotse cuts"
            )
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
                f"{key}={source!r} holds no audio: it needs audio files ({', '.join(FORMATS)}, ...), or cuts"
            )

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, number: int, *, seconds: float, start: float = 0.0) -> np.ndarray:
        """(samples,) float32 at RATE: `seconds` of a clip, or all of a shorter one. start: 0 to 1, from the first place to the last."""
        clip = self.clips[number]
        name = clip if isinstance(clip, str) else clip.key
        try:
            stretch, rate = (
                _read_file(clip, seconds, start)
                if isinstance(clip, str)
                else _read_cut(clip, seconds, start)
            )
        except Exception as error:  # Lhotse raises what its backends happen to
            raise UserError(
                f"{self.key}: {name!r} cannot be read ({error}): mend it or take it out"
            ) from error
        if not len(stretch) or not np.isfinite(stretch).all():
            raise UserError(
                f"{self.key}: {name!r} holds {'NaN or infinite values' if len(stretch) else 'no sample'}: take it out"
            )
        return stretch if rate == RATE else soxr.resample(stretch, rate, RATE)


def _cuts(manifest: str, key: str) -> list[str | Utterance]:
    """A cut that is the whole of a file is its path: then only the stretch that is wanted is decoded."""
    cuts = list(read_cuts(manifest))
    for cut in cuts:
        if cut.problem:
            raise UserError(f"{key}={manifest!r}: {cut.key!r} is no audio: {cut.problem[1]}")
    return [str(cut.file) if cut.file else cut for cut in cuts]


def _read_file(path: str, seconds: float, start: float) -> tuple[np.ndarray, int]:
    """The first channel: a mean over microphones would be a comb filter."""
    file = open_audio(path)
    begin, end = 0.0, None
    if file.seconds is not None and file.seconds > seconds:
        begin = start * (file.seconds - seconds)
        end = begin + seconds + ROUNDING
    wave, rate = read_stretch(file, begin, end)
    return wave[: math.ceil(seconds * rate), 0], rate


def _read_cut(cut: Utterance, seconds: float, start: float) -> tuple[np.ndarray, int]:
    wave, rate = cut.load()
    frames = math.ceil(seconds * rate)
    first = int(start * max(0, len(wave) - frames))
    return wave[first : first + frames], rate


def mix(wave: np.ndarray, noise: np.ndarray, snr: float) -> np.ndarray:
    """Noise of the wave's length added `snr` dB below it, by mean power; silence on either side leaves the wave as it is.

    Peaks above 1 stay: features take them as they are, and scaling would make speech faint wherever there is noise.
    """
    power, noise_power = mean_square(wave), mean_square(noise)
    if power < SILENCE or noise_power < SILENCE:
        return wave
    return wave + np.float32(math.sqrt(power / noise_power * 10 ** (-snr / 10))) * noise


def reverberate(wave: np.ndarray, response: np.ndarray, direct: int) -> np.ndarray:
    """The wave in a room, as long and as loud as before and not later. direct: where in the impulse response the direct path arrives."""
    size = _fast_size(len(wave) + len(response) - 1)
    wet = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(response, size), size)[
        direct : direct + len(wave)
    ]
    power = mean_square(wet)
    if not power:  # silence
        return wave
    return (wet * math.sqrt(mean_square(wave) / power)).astype(np.float32)


def synthetic_room(draws: np.random.Generator, *, rt60: float, direct_db: float) -> np.ndarray:
    """(samples,) float32: a direct path of 1, then Polack's (1988) reverberation, white noise that fades by 60 dB in `rt60` seconds.

    direct_db: the energy of the direct path over that of the rest.
    """
    time = np.arange(1, round(rt60 * RATE)) / RATE
    tail = draws.standard_normal(len(time)) * np.exp(-math.log(1000) / rt60 * time)
    tail *= math.sqrt(10 ** (-direct_db / 10) / np.square(tail).sum())
    return np.concatenate([[1.0], tail]).astype(np.float32)


def mean_square(wave: np.ndarray) -> float:
    return float(np.square(wave, dtype=np.float64).mean())


@functools.lru_cache(maxsize=4096)
def _fast_size(least: int) -> int:
    """The smallest length from `least` on that FFTs are quick at: few factors, all small."""
    return min(
        odd << max(0, -(-least // odd) - 1).bit_length()
        for odd in (1, 3, 5, 9, 15, 25, 27, 45, 75, 81, 125, 135, 225)
    )


def mask_features(features: Tensor, lengths: Tensor, masks: Tensor, time_masks: int) -> Tensor:
    """Masked frames and bins get the mean of their utterance's true frames; padding stays. On the features' device, without waiting for it.

    features: (N, T, F); lengths: (N,) true frames; masks: (N, M, 2) of Augmenter.masks, the first `time_masks` in time, the rest in bins.
    """
    frames = torch.arange(features.shape[1], device=features.device)
    bins = torch.arange(features.shape[2], device=features.device)
    real = frames < lengths[:, None]  # (N, T)
    in_time = _inside((frames + 0.5) / lengths[:, None], masks[:, :time_masks])  # (N, T)
    in_bins = _inside(
        ((bins + 0.5) / len(bins)).expand(len(masks), -1), masks[:, time_masks:]
    )  # (N, F)
    masked = (in_time[:, :, None] | in_bins[:, None]) & real[..., None]
    total = features.masked_fill(~real[..., None], 0).sum((1, 2), dtype=torch.float32)
    mean = total / (lengths * len(bins)).clamp(min=1)
    return torch.where(masked, mean.to(features.dtype)[:, None, None], features)


def _inside(places: Tensor, masks: Tensor) -> Tensor:
    """places (N, P), masks (N, M, 2) -> (N, P): whether any mask covers the place."""
    return ((masks[..., :1] <= places[:, None]) & (places[:, None] < masks[..., 1:])).any(1)
