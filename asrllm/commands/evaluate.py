"""asrllm evaluate: choose the checkpoint, decode the test sets, score them, write the results."""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from asrllm.commands.overrides import add_override_arguments
from asrllm.config import load_config
from asrllm.data.cache import ShardCache
from asrllm.data.config import CacheConfig
from asrllm.data.corpora import Corpus, read_corpora
from asrllm.data.index import RATE
from asrllm.data.prompts import DEFAULT_PROMPTS
from asrllm.data.text import normalizer
from asrllm.errors import UserError
from asrllm.training import distributed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    filename: str | None
    iter: int
    epoch: int
    avg: int
    use_averaged_model: bool
    lora: Literal["product", "factors"]

    @property
    def average(self) -> Any:
        from asrllm.checkpoints.average import Average

        epoch = self.epoch if self.iter == 0 else 0
        return Average(iteration=self.iter, epoch=epoch, avg=self.avg, running=self.use_averaged_model, lora=self.lora)


@dataclass(frozen=True, kw_only=True)
class CheckpointChoice:
    model: ModelChoice


@dataclass(frozen=True, kw_only=True)
class TestData:
    test_data_config: str | None
    max_batch_duration: float
    cache: CacheConfig


@dataclass(frozen=True, kw_only=True)
class EvaluationRun:
    exp_dir: str | None
    checkpoint: CheckpointChoice
    data: TestData
    decoding_method: Literal["greedy_search", "beam_search"]
    num_beams: int
    max_new_tokens: int
    max_tokens_per_second: float
    repetition_guard: int | None
    prompt: str | None
    normalizer: str
    precision: Literal["bf16", "fp32"]

    def __post_init__(self) -> None:
        if not self.exp_dir:
            raise UserError("exp_dir is not set: give the directory of a trained run, exp_dir=exp/NAME")
        if not self.data.test_data_config:
            raise UserError("data.test_data_config is not set: give the YAML list of test sets")
        if self.num_beams < 1 or self.max_new_tokens < 1:
            raise UserError(f"num_beams={self.num_beams} and max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.repetition_guard is not None and self.repetition_guard < 1:
            raise UserError(f"repetition_guard={self.repetition_guard} must be at least 1, or null for no guard")
        for key, value in (
            ("max_tokens_per_second", self.max_tokens_per_second),
            ("data.max_batch_duration", self.data.max_batch_duration),
        ):
            if not 0 < value < float("inf"):
                raise UserError(f"{key}={value} must be a number above 0")
        for key, number in vars(self.checkpoint.model).items():
            if isinstance(number, int) and number < 0:
                raise UserError(f"checkpoint.model.{key}={number} must not be below 0")
        normalizer(self.normalizer)

    @property
    def suffix(self) -> str:
        """Of the result files: iter-I-avg-A, epoch-E-avg-A, or the weights file's stem."""
        choice = self.checkpoint.model
        if choice.filename:
            return Path(choice.filename).stem
        if choice.avg > 0:
            return choice.average.suffix
        return "pretrained"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_override_arguments(parser, "evaluate")


def run(arguments: argparse.Namespace) -> None:
    evaluate(load_config("evaluate", arguments.overrides, EvaluationRun))


def evaluate(config: EvaluationRun) -> dict[str, Any]:
    """Gives what results.json holds."""
    from asrllm import AutoModel
    from asrllm.checkpoints.average import resolve_weights
    from asrllm.evaluation.decode import decode_corpus
    from asrllm.evaluation.files import write_results, write_summary
    from asrllm.models.auto import describe

    exp_dir = Path(config.exp_dir or "")
    choice = config.checkpoint.model
    weights = resolve_weights(exp_dir, filename=choice.filename, what=choice.average)
    cache = ShardCache.of(config.data.cache)
    corpora = read_corpora(config.data.test_data_config or "", filters=None, made=exp_dir / "shards", cache=cache)
    check_names([corpus.name for corpus in corpora])
    check_lengths(corpora, describe(exp_dir).sample_limits())
    device = distributed.start()
    model = AutoModel.from_pretrained(exp_dir, weights=weights, dtype={"bf16": "bfloat16", "fp32": "float32"}[config.precision])
    model.to(device)
    options = decoding_options(config, model.config.prompts or [prompt.text for prompt in DEFAULT_PROMPTS])
    folder = exp_dir / config.decoding_method
    folder.mkdir(exist_ok=True)
    results = {}
    for corpus in corpora:
        transcripts, rtfx = decode_corpus(model, corpus, options, normalizer(config.normalizer), cache)
        about = {
            "normalizer": config.normalizer,
            "rtfx": round(rtfx, 2),
            "prompt": options.prompt,
            "weights": str(weights),
            "lang": corpus.lang,
        }
        if distributed.rank() == 0:
            results[corpus.name] = write_results(folder, corpus.name, config.suffix, transcripts, about)
            r = results[corpus.name]
            print(f"{corpus.name}: WER {r['wer']:.2f} % (95 %: {r['wer_ci95'][0]:.2f} to {r['wer_ci95'][1]:.2f}), CER {r['cer']:.2f} %, "
                  f"{r['utterances']} utterances, {r['rtfx']:g} x real time, normalizer {r['normalizer']}", flush=True)  # fmt: skip
    if distributed.rank() == 0:
        write_summary(folder, config.suffix, results)
        print(f"results: {folder}")
    distributed.finish()
    return results


def check_names(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data.test_data_config has two test sets named {name!r}: give each its own 'name'")


def check_lengths(corpora: list[Corpus], limits: tuple[int, int]) -> None:
    """An utterance that the model cannot take is found before it loads."""
    low, high = (n / RATE for n in limits)
    for corpus in corpora:
        samples = corpus.index.rows["samples"]
        if unfit := int(((samples < limits[0]) | (samples > limits[1])).sum()):
            raise UserError(
                f"{unfit} utterances of the test set {corpus.name!r} are shorter than {low:.2f} s or longer than {high:.2f} s, which the "
                "model takes: leave them out of the set"
            )


def decoding_options(config: EvaluationRun, prompts: list[str]) -> Any:
    from asrllm.evaluation.decode import DecodingOptions

    prompt = config.prompt if config.prompt is not None else prompts[0]
    if prompt not in prompts:
        logger.warning("prompt=%r was never seen in training; seen were: %s", prompt, "; ".join(prompts))
    return DecodingOptions(
        prompt=prompt,
        generation={
            "num_beams": config.num_beams if config.decoding_method == "beam_search" else 1,
            "max_new_tokens": config.max_new_tokens,
            "max_tokens_per_second": config.max_tokens_per_second,
            "repetition_guard": config.repetition_guard,
        },
        max_batch_duration=config.data.max_batch_duration,
    )
