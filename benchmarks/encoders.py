"""Padding of transformers' audio encoders: what it changes, and what it costs.

    python benchmarks/encoders.py [--rounds R] [--layers L] [--output FILE]

For each family, in float32 with random weights of the published width and L layers: an utterance of
1 s is encoded alone, and in a batch with others of 3 and 2 s. `leak` is the root mean square of the
difference of its frames, relative to that of the frames. `theirs` is transformers with the padding
and the attention mask of its feature extractor, `ours` is asrllm. The seconds are those of the
forward pass over the batch, the median of R rounds.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import MODEL_MAPPING, AutoConfig

from asrllm.audio.waves import padded
from asrllm.models.encoders.hf import HfEncoder
from asrllm.models.encoders.hf_families import HF_FAMILIES

RATE = 16000
SECONDS = (1, 3, 2)
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
LARGE |= {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
# name: (model_type, fields besides those of the class)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2 (base)": ("wav2vec2", {}),
    "wav2vec2 (large, XLS-R)": ("wav2vec2", LARGE),
    "hubert (base)": ("hubert", {}),
    "hubert (large)": ("hubert", LARGE),
    "wavlm (base)": ("wavlm", {}),
    "wavlm (large)": ("wavlm", LARGE),
    "wav2vec2-conformer": ("wav2vec2-conformer", LARGE),
    "unispeech-sat (base)": ("unispeech-sat", {}),
    "data2vec-audio (base)": ("data2vec-audio", {}),
    "wav2vec2-bert": ("wav2vec2-bert", {}),
    "parakeet": ("parakeet_encoder", {}),
    "moonshine (tiny)": ("moonshine", {}),
    "qwen3_asr": ("qwen3_asr_encoder", {}),
    "qwen2_audio": ("qwen2_audio_encoder", {}),
    "voxtral": ("voxtral_encoder", {}),
}
EXTRACTORS: dict[str, Callable[..., Any]] = {
    "wave": transformers.Wav2Vec2FeatureExtractor,
    "seamless": transformers.SeamlessM4TFeatureExtractor,
    "parakeet": transformers.ParakeetFeatureExtractor,
    "mel": transformers.Qwen3ASRFeatureExtractor,
    "mel of 30 s": transformers.WhisperFeatureExtractor,
}
LAYER_FIELDS = ("num_hidden_layers", "encoder_layers", "encoder_num_hidden_layers")


def make_encoder(kind: str, fields: dict[str, Any], layers: int) -> tuple[HfEncoder, Any]:
    """Return our encoder with random weights in eval mode, and transformers' feature extractor."""
    config = AutoConfig.for_model(kind, **fields)
    for name in LAYER_FIELDS:
        if name in config.to_dict():
            setattr(config, name, layers)
    features = HF_FAMILIES[kind].features
    sizes = {"feature_size": 1} if features == "wave" else {}
    if features in ("mel", "mel of 30 s"):
        sizes = {"feature_size": config.num_mel_bins}
    extractor = EXTRACTORS[features](**sizes)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        MODEL_MAPPING[type(config)](config).save_pretrained(folder)
        extractor.save_pretrained(folder)
        values, state = HfEncoder.read_pretrained(folder)
    encoder = HfEncoder.from_fields(values, pad_to_30s=False)
    encoder.load_state_dict(state)
    return encoder.eval(), extractor


def padded_step(
    encoder: HfEncoder, extractor: Any, waves: list[np.ndarray]
) -> Callable[[], Tensor]:
    """Return a function that encodes a padded batch as transformers' users do."""
    options = {"sampling_rate": RATE, "return_tensors": "pt", "return_attention_mask": True}
    if not encoder.pad_to_30s:
        options["padding"] = True
    inputs = dict(extractor(waves, **options))
    if encoder.pad_to_30s:
        inputs.pop("attention_mask")
    if encoder.family.features == "mel":
        inputs["input_features_mask"] = inputs.pop("attention_mask")
        # the true frames of all utterances in one row
        return lambda: encoder.model(**inputs).last_hidden_state[None]
    return lambda: encoder.model(**inputs).last_hidden_state


def measure(step: Callable[[], Tensor], rounds: int) -> tuple[Tensor, float]:
    """Return the output of a step, and the median of its seconds."""
    seconds = []
    output = step()
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return output, statistics.median(seconds)


def leak(found: Tensor, alone: Tensor) -> float:
    """Return the relative difference of the frames (T, C) of an utterance."""
    difference = found[: len(alone)] - alone
    return float(difference.square().mean().sqrt() / alone.square().mean().sqrt())


@torch.no_grad()
def compare(name: str, layers: int, rounds: int) -> dict[str, Any]:
    """Return the numbers of a family."""
    encoder, extractor = make_encoder(*MODELS[name], layers)
    generator = np.random.default_rng(0)
    waves = [generator.normal(0, 0.1, s * RATE).astype(np.float32) for s in SECONDS]
    features, lengths = encoder.features(*padded(waves))
    ours, our_seconds = measure(lambda: encoder(features, lengths)[0], rounds)
    theirs, their_seconds = measure(padded_step(encoder, extractor, waves), rounds)
    own, own_length = encoder.features(*padded(waves[:1]))
    alone = encoder(own, own_length)[0][0]
    expected = padded_step(encoder, extractor, waves[:1])()[0][: len(alone)]
    return {
        "frames per second": round(len(alone) / SECONDS[0], 1),
        "leak of theirs": leak(theirs[0], expected),
        "leak of ours": leak(ours[0], alone),
        "seconds of theirs": their_seconds,
        "seconds of ours": our_seconds,
    }


def main() -> None:
    """Print the table, and write the numbers if a file is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", choices=MODELS, help="one family")
    arguments = parser.parse_args()
    results = {}
    for name in [arguments.only] if arguments.only else MODELS:
        results[name] = compare(name, arguments.layers, arguments.rounds)
        shown = ", ".join(f"{key} {value:.2g}" for key, value in results[name].items())
        print(f"{name}: {shown}", flush=True)
    if arguments.output:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        whole = {"versions": versions, "layers": arguments.layers, "encoders": results}
        arguments.output.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
