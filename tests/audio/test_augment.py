"""Augmentation: reproducible draws, speed, noise, reverberation, masks and invalid values."""

import json
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from asrllm.audio.augment import (
    CACHED_ROOMS,
    AugmentConfig,
    Augmenter,
    Clips,
    NoiseConfig,
    ReverbConfig,
    SpecAugmentConfig,
    mask_features,
    mean_square,
    mix,
    reverberate,
    synthetic_room,
)
from asrllm.errors import UserError
from asrllm.schema import build

ANY_LENGTH = (1, 1 << 40)
OFF = AugmentConfig(
    speed=[1.0],
    noise=NoiseConfig(source=None, prob=0.0, snr_min=5.0, snr_max=20.0),
    reverb=ReverbConfig(source=None, prob=0.0, rt60_min=0.2, rt60_max=0.8),
    spec_augment=SpecAugmentConfig(
        prob=0.0, time_masks=3, time_mask_share=0.1, freq_masks=2, freq_mask_share=0.3
    ),
)
SPEEDS = replace(OFF, speed=[0.9, 1.0, 1.1])
SYNTHETIC = replace(OFF, reverb=replace(OFF.reverb, source="synthetic", prob=0.7))


def with_noise(source, prob=0.7, **more):
    return replace(OFF, noise=replace(OFF.noise, source=str(source), prob=prob, **more))


def with_masks(**more):
    return replace(OFF, spec_augment=replace(OFF.spec_augment, **more))


def augmenter(config, seed=1, limits=ANY_LENGTH):
    return Augmenter(config, seed=seed, limits=limits)


def make_wave(seconds=1.0, seed=0):
    """Noise in the low band, where all resamplers agree."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(round(seconds * 16000)))
    spectrum[round(0.3 * len(spectrum)) :] = 0
    return (0.1 * np.fft.irfft(spectrum, round(seconds * 16000))).astype(np.float32)


@pytest.fixture
def noises(tmp_path):
    """Four files of several rates, formats and channels; the last one lasts half a second."""
    folder = tmp_path / "noises"
    files = [
        ("a/one.wav", 4, 16000, 1),
        ("a/Two.FLAC", 5, 8000, 2),
        ("b/three.ogg", 6, 44100, 1),
        ("four.wav", 0.5, 16000, 1),
    ]
    for i, (name, seconds, rate, channels) in enumerate(files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        wave = 0.1 * np.random.default_rng(i).standard_normal((round(seconds * rate), channels))
        soundfile.write(folder / name, wave, rate)
    (folder / "README").write_text("not audio")
    (folder / "._one.wav").write_text("not audio")
    return folder


# --- draws ---


@pytest.fixture
def everything(noises):
    return replace(
        SPEEDS,
        noise=with_noise(noises).noise,
        reverb=SYNTHETIC.reverb,
        spec_augment=with_masks(prob=0.5).spec_augment,
    )


def test_draws_depend_only_on_seed_pass_and_key(everything):
    wave = make_wave(0.3)
    keys = [f"utt{i}" for i in range(12)]

    def draw(keys, pass_index=0, seed=1):
        augment = augmenter(everything, seed)
        drawn = {}
        for key in keys:
            augmented = augment(wave, key=key, pass_index=pass_index)
            drawn[key] = (augmented.tobytes(), augment.masks(key, pass_index).tobytes())
        return drawn

    first = draw(keys)
    assert len(set(first.values())) > 8
    assert draw(keys[::-1]) == first
    assert draw(keys[5:6]) == {keys[5]: first[keys[5]]}
    assert draw(keys, pass_index=1) != first
    assert draw(keys, seed=2) != first
    again = pickle.loads(pickle.dumps(augmenter(everything)))
    assert again(wave, key=keys[0], pass_index=0).tobytes() == first[keys[0]][0]


def test_enabling_one_kind_does_not_change_the_draws_of_the_others(noises):
    wave = make_wave(0.3)
    keys = range(40)
    plain = augmenter(SPEEDS)
    rooms = augmenter(replace(SPEEDS, reverb=SYNTHETIC.reverb))
    lengths = [len(plain(wave, key=str(key), pass_index=0)) for key in keys]
    assert len(set(lengths)) == 3
    assert [len(rooms(wave, key=str(key), pass_index=0)) for key in keys] == lengths
    noisy = augmenter(with_noise(noises))
    with_rooms = augmenter(replace(with_noise(noises), reverb=SYNTHETIC.reverb))
    dry = [key for key in keys if augmenter(SYNTHETIC)(wave, key=str(key), pass_index=0) is wave]
    assert 5 < len(dry) < 20
    for key in dry:
        expected = noisy(wave, key=str(key), pass_index=0)
        found = with_rooms(wave, key=str(key), pass_index=0)
        np.testing.assert_array_equal(found, expected)


def test_results_are_finite_float32_and_disabled_kinds_change_nothing(everything):
    wave = make_wave(0.3)
    before = wave.copy()
    augment = augmenter(everything)
    for key in range(30):
        changed = augment(wave, key=str(key), pass_index=0)
        assert changed.dtype == np.float32
        assert changed.ndim == 1
        assert np.isfinite(changed).all()
    np.testing.assert_array_equal(wave, before)
    assert augmenter(OFF)(wave, key="k", pass_index=0) is wave


class Augmented(torch.utils.data.Dataset):
    def __init__(self, augment):
        self.augment = augment

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return self.augment(make_wave(0.3), key=str(i), pass_index=0)


def test_workers_draw_the_same_as_one_process(everything, noises):
    config = replace(everything, speed=[1.0], reverb=replace(everything.reverb, source=str(noises)))
    dataset = Augmented(augmenter(config))
    alone = [dataset[i] for i in range(6)]  # this fills the cache before the fork
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    for wave, same in zip(alone, loader, strict=True):
        np.testing.assert_array_equal(wave, same)


# --- speed ---


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_speed_matches_lhotse(factor):
    from lhotse.augmentation import Speed

    wave = make_wave()
    ours = augmenter(replace(OFF, speed=[factor]))(wave, key="k", pass_index=0)
    theirs = Speed(factor)(wave[None], 16000)[0]
    assert abs(len(ours) - len(theirs)) <= 1
    n = min(len(ours), len(theirs))
    assert np.corrcoef(ours[:n], theirs[:n])[0, 1] > 0.999
    assert ours.std() == pytest.approx(theirs.std(), rel=0.01)


def test_speed_factors_are_drawn_uniformly_and_respect_the_limits():
    wave = make_wave(0.1)
    lengths = [len(augmenter(SPEEDS)(wave, key=str(i), pass_index=0)) for i in range(600)]
    assert {n: lengths.count(n) > 150 for n in set(lengths)} == {1455: True, 1600: True, 1778: True}
    for limits, expected in (
        ((1, 1777), {1455, 1600}),
        ((1456, 1778), {1600, 1778}),
        ((1600, 1600), {1600}),
    ):
        augment = augmenter(SPEEDS, limits=limits)
        found = {len(augment(wave, key=str(i), pass_index=0)) for i in range(50)}
        assert found == expected


# --- noise ---


@pytest.mark.parametrize("snr", [-5.0, 0.0, 12.5])
def test_mix_has_the_requested_snr(snr):
    wave, noise = make_wave(seed=1), 3 * make_wave(seed=2)
    added = mix(wave, noise, snr).astype(np.float64) - wave
    ratio = mean_square(wave) / mean_square(added)
    assert 10 * np.log10(ratio) == pytest.approx(snr, abs=0.01)
    assert np.corrcoef(added, noise)[0, 1] > 0.9999


def test_silence_is_not_changed():
    wave, silence = make_wave(), np.zeros(16000, np.float32)
    assert mix(wave, silence, 10.0) is wave
    assert mix(silence, wave, 10.0) is silence
    assert reverberate(silence, make_wave(0.1), 0) is silence
    assert reverberate(wave, silence, 0) is wave


def test_snrs_are_drawn_uniformly(noises):
    wave = make_wave(0.3)
    augment = augmenter(with_noise(noises, prob=0.5, snr_min=0.0, snr_max=20.0))
    snrs = []
    for key in range(300):
        added = augment(wave, key=str(key), pass_index=0).astype(np.float64) - wave
        if added.any():
            snrs.append(10 * np.log10(mean_square(wave) / mean_square(added)))
    assert 120 < len(snrs) < 180
    assert 0 <= min(snrs) < 2
    assert 18 < max(snrs) <= 20.01
    assert np.mean(snrs) == pytest.approx(10, abs=1.5)


def test_clips_read_the_requested_part_of_a_file(tmp_path):
    ramp = np.arange(32000) / 40000
    soundfile.write(tmp_path / "r.wav", np.stack([ramp, -ramp], 1), 16000, subtype="FLOAT")
    clips = Clips(str(tmp_path), "key")
    for start, first in ((0.0, 0), (0.5, 12000), (1.0, 24000)):
        part = clips.read(0, seconds=0.5, start=start)
        np.testing.assert_allclose(part, ramp[first : first + 8000], atol=1e-6)
    np.testing.assert_allclose(clips.read(0, seconds=5.0, start=0.9), ramp, atol=1e-6)


def test_clips_are_sorted_and_read_at_16_khz(noises):
    clips = Clips(str(noises), "key")
    names = ["a/Two.FLAC", "a/one.wav", "b/three.ogg", "four.wav"]
    assert clips.clips == [str(noises / name) for name in names]
    lengths = [len(clips.read(i, seconds=2.0, start=0.3)) for i in range(4)]
    assert lengths == [32000, 32000, 32000, 8000]


def test_short_noise_is_repeated(tmp_path):
    click = np.zeros(1600)
    click[100] = 0.5
    soundfile.write(tmp_path / "click.wav", click, 16000)
    wave = make_wave()
    added = augmenter(with_noise(tmp_path, prob=1.0))(wave, key="k", pass_index=0) - wave
    clicks = np.flatnonzero(np.abs(added) > 0.5 * np.abs(added).max())
    assert len(clicks) == 10
    assert set(np.diff(clicks)) == {1600}


def test_noise_begins_anywhere_in_its_clip(tmp_path):
    click = np.zeros(1600)
    click[0] = 0.5
    long = np.linspace(0, 1, 48000)  # its values are ratios of its length
    wave = make_wave()
    begins = {}
    for name, noise in (("short", click), ("long", long)):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "noise.wav", noise, 16000, subtype="FLOAT")
        augment = augmenter(with_noise(tmp_path / name, prob=1.0))
        added = [augment(wave, key=str(i), pass_index=0) - wave for i in range(100)]
        if name == "short":
            begins[name] = [np.abs(noise[:1600]).argmax() / 1600 for noise in added]
        else:  # the clip has 32,000 places for 16,000 samples
            begins[name] = [noise[0] / (noise[-1] - noise[0]) / 2 for noise in added]
    for ratios in begins.values():
        np.testing.assert_allclose(
            np.quantile(ratios, [0.05, 0.5, 0.95]), [0.05, 0.5, 0.95], atol=0.1
        )


def test_noise_can_come_from_lhotse_cuts(tmp_path, noises):
    from lhotse import CutSet, Recording

    whole = [Recording.from_file(noises / name).to_cut() for name in ("a/one.wav", "b/three.ogg")]
    cuts = [*whole, whole[0].truncate(offset=1.0, duration=0.5)]
    CutSet.from_cuts(cut.with_id(f"cut{i}") for i, cut in enumerate(cuts)).to_file(
        tmp_path / "cuts.jsonl.gz"
    )
    clips = Clips(str(tmp_path / "cuts.jsonl.gz"), "key")
    files = Clips(str(noises), "key")
    for cut, file in ((0, 1), (1, 2)):
        expected = files.read(file, seconds=2.0, start=0.3)
        np.testing.assert_array_equal(clips.read(cut, seconds=2.0, start=0.3), expected)
    one = files.read(1, seconds=4.0)
    np.testing.assert_allclose(clips.read(2, seconds=0.25, start=1.0), one[20000:24000], atol=1e-6)
    assert len(clips.read(2, seconds=2.0)) == 8000


# --- reverberation ---


def test_reverberation_is_a_convolution_aligned_to_the_direct_path():
    wave = make_wave(0.2)
    response = np.random.default_rng(3).standard_normal(500).astype(np.float32)
    expected = np.convolve(wave.astype(np.float64), response)[40 : 40 + len(wave)]
    expected *= np.sqrt(np.sum(wave.astype(np.float64) ** 2) / np.sum(expected**2))
    np.testing.assert_allclose(reverberate(wave, response, 40), expected, atol=1e-6)


def test_reverberated_impulse_is_the_recorded_response(tmp_path):
    response = synthetic_room(np.random.default_rng(0), rt60=0.3, direct_db=3.0)
    late = np.concatenate([np.zeros(77), 0.4 * response])
    soundfile.write(tmp_path / "room.wav", np.stack([late, 0 * late], 1), 16000, subtype="FLOAT")
    impulse = np.zeros(16000, np.float32)
    impulse[1000] = 1
    config = replace(OFF, reverb=replace(OFF.reverb, source=str(tmp_path), prob=1.0))
    wet = augmenter(config)(impulse, key="k", pass_index=0)
    assert len(wet) == 16000
    assert int(np.abs(wet).argmax()) == 1000
    assert mean_square(wet) == pytest.approx(mean_square(impulse), rel=1e-4)
    np.testing.assert_allclose(wet[1000 : 1000 + len(response)] / wet[1000], response, atol=1e-5)


@pytest.mark.parametrize("rt60", [0.2, 0.7])
def test_synthetic_room_decays_by_60_db_in_its_rt60(rt60):
    room = synthetic_room(np.random.default_rng(0), rt60=rt60, direct_db=4.0).astype(np.float64)
    assert 10 * np.log10(room[0] ** 2 / np.sum(room[1:] ** 2)) == pytest.approx(4.0, abs=0.01)
    decay = 10 * np.log10(np.cumsum(room[:0:-1] ** 2)[::-1])  # Schroeder's backward integration
    seconds = np.arange(1, len(room)) / 16000
    fit = (decay <= decay[0] - 5) & (decay >= decay[0] - 35)
    assert -60 / np.polyfit(seconds[fit], decay[fit], 1)[0] == pytest.approx(rt60, rel=0.1)


def test_synthetic_rooms_differ_by_utterance_and_keep_power():
    wave = make_wave()
    config = replace(SYNTHETIC, reverb=replace(SYNTHETIC.reverb, prob=1.0))
    rooms = [augmenter(config)(wave, key=str(key), pass_index=0) for key in range(5)]
    assert len({room.tobytes() for room in rooms}) == 5
    for room in rooms:
        assert len(room) == len(wave)
        assert mean_square(room) == pytest.approx(mean_square(wave), rel=1e-4)


def test_cache_of_decoded_rooms_is_bounded(noises, monkeypatch):
    monkeypatch.setattr("asrllm.audio.augment.CACHED_ROOMS", 2)
    config = replace(OFF, reverb=replace(OFF.reverb, source=str(noises), prob=1.0))
    augment = augmenter(config)
    first = [augment(make_wave(0.1), key=str(key), pass_index=0) for key in range(20)]
    assert len(augment._decoded_rooms) == 2 < CACHED_ROOMS
    np.testing.assert_array_equal(first[3], augment(make_wave(0.1), key="3", pass_index=0))


# --- masks ---


def test_masks_are_at_most_the_widest_and_half_of_it_on_average():
    augment = augmenter(
        with_masks(prob=1.0, time_masks=4, time_mask_share=0.1, freq_masks=2, freq_mask_share=0.3)
    )
    masks = np.stack([augment.masks(str(key), 0) for key in range(2000)])
    assert masks.shape == (2000, 6, 2)
    assert masks.dtype == np.float32
    assert masks.min() >= 0
    assert masks.max() <= 1 + 1e-6
    width = masks[..., 1] - masks[..., 0]
    assert width[:, :4].max() <= 0.1 + 1e-6
    assert width[:, 4:].max() <= 0.3 + 1e-6
    np.testing.assert_allclose(width.mean(0), [0.05] * 4 + [0.15] * 2, rtol=0.05)


def test_masks_begin_anywhere():
    augment = augmenter(with_masks(prob=1.0, time_mask_share=0.4))
    begin, end = np.stack([augment.masks(str(key), 0) for key in range(1000)]).T
    places = begin / (1 - (end - begin))  # 0: first possible place, 1: last one
    for ratio in (0.05, 0.5, 0.95):
        np.testing.assert_allclose(np.quantile(places, ratio, 1), ratio, atol=0.05)


def test_masks_are_drawn_with_their_probability():
    masks = np.stack([augmenter(with_masks(prob=0.3)).masks(str(key), 0) for key in range(1000)])
    assert 250 < sum(mask.any() for mask in masks) < 350
    assert not augmenter(OFF).masks("k", 0).any()
    assert augmenter(with_masks(prob=1.0, time_masks=0, freq_masks=0)).masks("k", 0).shape == (0, 2)


def is_inside(ratio, masks):
    return any(begin <= ratio < end for begin, end in masks.tolist())


def naive_masked(features, length, masks, time_masks):
    masked = features.clone()
    mean = features[:length].mean()
    for t in range(length):
        for f in range(features.shape[1]):
            in_time = is_inside((t + 0.5) / length, masks[:time_masks])
            in_bins = is_inside((f + 0.5) / features.shape[1], masks[time_masks:])
            if in_time or in_bins:
                masked[t, f] = mean
    return masked


def test_masked_features_match_a_plain_loop():
    torch.manual_seed(0)
    features, lengths = torch.randn(4, 50, 20) + 3, torch.tensor([50, 31, 7, 1])
    features[1, 31:] = torch.nan  # padding may have any value
    augment = augmenter(with_masks(prob=1.0, time_mask_share=0.4))
    masks = torch.from_numpy(np.stack([augment.masks(str(key), 0) for key in range(4)]))
    before = features.clone()
    masked = mask_features(features, lengths, masks, time_masks=3)
    for row, want in enumerate(lengths.tolist()):
        expected = naive_masked(features[row], want, masks[row], 3)
        torch.testing.assert_close(masked[row], expected, equal_nan=True)
        assert (masked[row, :want] != before[row, :want]).any() or want == 1
    torch.testing.assert_close(features, before, equal_nan=True)


def test_empty_masks_change_nothing():
    features, lengths = torch.randn(2, 10, 8, dtype=torch.bfloat16), torch.tensor([10, 4])
    for masks in (torch.zeros(2, 5, 2), torch.zeros(2, 0, 2)):
        masked = mask_features(features, lengths, masks, time_masks=min(3, masks.shape[1]))
        assert masked.dtype == torch.bfloat16
        assert torch.equal(masked, features)


def test_masking_does_not_read_values_back_from_the_device():
    features, lengths, masks = (
        torch.zeros(shape, device="meta") for shape in ((4, 300, 80), (4,), (4, 5, 2))
    )
    # reading a value of a meta tensor fails
    masked = mask_features(features, lengths.long(), masks, time_masks=3)
    assert masked.shape == features.shape


# --- errors ---


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("noise", {"prob": 1.5}, r"noise\.prob=1\.5 "),
        ("noise", {"prob": float("nan")}, r"noise\.prob=nan "),
        ("noise", {"prob": 0.5}, r"noise\.prob=0\.5 .*data\.augment\.noise\.source"),
        ("noise", {"snr_min": 30.0}, r"noise\.snr_min=30\.0 .*snr_max=20\.0"),
        ("reverb", {"prob": 0.5}, r"reverb\.prob=0\.5 .*reverb\.source.*'synthetic'"),
        ("reverb", {"rt60_min": 0.0}, r"reverb\.rt60_min=0\.0 .*0\.05"),
        ("spec_augment", {"time_mask_share": 10.0}, r"spec_augment\.time_mask_share=10\.0 "),
        ("spec_augment", {"freq_masks": -1}, r"spec_augment\.freq_masks=-1 "),
    ],
)
def test_invalid_values_are_reported_with_their_keys(part, changes, message):
    with pytest.raises(UserError, match=rf"data\.augment\.{message}"):
        build(AugmentConfig, {part: changes}, group="data.augment.")


@pytest.mark.parametrize(
    ("speed", "named"),
    [([], "speed=[]"), ([0.9, 0.0], "speed[1]=0.0"), ([110.0], "speed[0]=110.0")],
)
def test_invalid_speeds_are_reported_with_the_key(speed, named):
    with pytest.raises(UserError, match=rf"data\.augment\.{re.escape(named)} "):
        build(AugmentConfig, {"speed": speed}, group="data.augment.")


@pytest.mark.parametrize("prob", [0.0, 0.1])
def test_sources_are_checked_whatever_their_probability(tmp_path, prob):
    missing = str(tmp_path / "no")
    for config in (
        with_noise(missing, prob=prob),
        replace(OFF, reverb=replace(OFF.reverb, source=missing, prob=prob)),
    ):
        with pytest.raises(UserError, match=rf"data\.augment\.\w+\.source='{missing}'"):
            augmenter(config)
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(UserError, match=rf"data\.augment\.noise\.source='{tmp_path}'"):
        augmenter(with_noise(tmp_path, prob=prob))
    with pytest.raises(UserError, match=r"text\.txt"):
        augmenter(with_noise(tmp_path / "text.txt", prob=prob))


def test_cut_without_recording_is_reported(tmp_path):
    cut = {"id": "c", "type": "MonoCut", "start": 0, "duration": 1, "channel": 0}
    (tmp_path / "cuts.jsonl").write_text(json.dumps(cut | {"supervisions": []}) + "\n")
    with pytest.raises(UserError, match=r"noise\.source='.*cuts\.jsonl': 'c' "):
        augmenter(with_noise(tmp_path / "cuts.jsonl"))


def test_unusable_clip_is_reported_with_its_path(tmp_path):
    (tmp_path / "a.wav").write_text("hello")
    soundfile.write(tmp_path / "b.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "c.wav", np.full(100, np.nan, np.float32), 16000, subtype="FLOAT")
    clips = Clips(str(tmp_path), "data.augment.noise.source")
    for i, message in enumerate((r"a\.wav'", r"b\.wav' .*samples", r"c\.wav' .*NaN")):
        with pytest.raises(UserError, match=rf"data\.augment\.noise\.source: .*{message}"):
            clips.read(i, seconds=1.0)
