"""asrllm evaluate: decode and score test sets.

An evaluation chooses or averages the checkpoint, decodes the test sets, scores them and writes
the results.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from asrllm import AutoModel, distributed
from asrllm.checkpoints.average import is_exported, resolve_weights
from asrllm.data.cache import ShardCache
from asrllm.data.corpora import Corpus, read_corpora, read_entries
from asrllm.defaults import RATE
from asrllm.errors import UserError
from asrllm.evaluation.config import EvaluationRun
from asrllm.evaluation.engine import BatchEngine, TorchEngine
from asrllm.evaluation.run import Evaluation
from asrllm.evaluation.vllm.limits import longest_samples
from asrllm.hydra_app import run_app
from asrllm.integrity import verify_folder
from asrllm.models.auto import load_model_config
from asrllm.progress import waiting
from asrllm.training.checkpoint.manifest import check_exp_dir
from asrllm.training.wandb_login import check_wandb_login


def run(arguments: argparse.Namespace) -> None:
    """Run `asrllm evaluate`."""
    run_app("evaluate", arguments, EvaluationRun, evaluate)


def evaluate(config: EvaluationRun) -> dict[str, Any]:
    """Evaluate a checkpoint on the test sets.

    Returns:
        The content of results.json on the first rank.
    """
    check_wandb_login(config.wandb, "wandb")
    exp_dir = Path(config.exp_dir or "")
    choice = config.checkpoint.model
    check_exp_dir(exp_dir)
    # corrupted files and wrong paths are reported before checkpoints are averaged
    verify_folder(exp_dir)
    if config.model.paths:
        load_model_config(exp_dir, config.model.paths)
    read_entries(config.data.test_data_config or "", "data.test_data_config")
    weights = resolve_weights(exp_dir, filename=choice.filename, selection=choice.average)
    cache = ShardCache.from_config(config.data.cache)
    corpora = read_corpora(
        config.data.test_data_config or "",
        filters=None,
        shards_dir=exp_dir / "shards",
        cache=cache,
        what="data.test_data_config",
    )
    check_names([corpus.name for corpus in corpora])
    check_test_durations(corpora, sample_limits(config, exp_dir))
    device = distributed.start()
    evaluation = Evaluation(config, corpora, cache, weights=weights, device=device)
    with waiting("checking the test sets"):
        evaluation.check()
    is_whole = is_exported(exp_dir) and not choice.filename
    engine = evaluation_engine(config, exp_dir, None if is_whole else weights, device)
    with evaluation.watched():
        evaluation.decode(engine)
        engine.close()
        if config.whisper_baseline:
            evaluation.decode_baseline()
        evaluation.report()
    distributed.finish()
    return evaluation.results


def sample_limits(config: EvaluationRun, exp_dir: Path) -> tuple[int, int]:
    """Return the smallest and largest number of samples at 16 kHz that can be decoded."""
    description = load_model_config(exp_dir)
    shortest, longest = description.sample_limits()
    if config.engine == "vllm":
        longest = longest_samples(description)
    return shortest, longest


def evaluation_engine(
    config: EvaluationRun, exp_dir: Path, weights: Path | None, device: torch.device
) -> BatchEngine:
    """Load the model in the engine of the configuration.

    Args:
        config: configuration of the evaluation.
        exp_dir: the model's directory.
        weights: a file of weights in a run; None for an exported directory.
        device: where to decode.

    Raises:
        UserError: engine=vllm is set with several ranks, or vLLM cannot be used.
    """
    dtype = config.dtype(device)
    if config.engine == "vllm":
        if distributed.world_size() > 1:
            raise UserError(
                f"engine=vllm runs in one process, but there are {distributed.world_size()} ranks. "
                "Start 'asrllm evaluate' without a launcher."
            )
        from asrllm.evaluation.vllm.engine import load_vllm_engine

        with waiting(f"loading {exp_dir} in vLLM"):
            return load_vllm_engine(
                exp_dir,
                config.generation,
                dtype=str(dtype).removeprefix("torch."),
                weights=weights,
                base_models=config.model.paths,
            )
    with waiting(f"loading {exp_dir}"):
        model = AutoModel.from_pretrained(
            exp_dir, weights=weights, dtype=dtype, base_models=config.model.paths
        )
    return TorchEngine(model.to(device), config.generation)


def check_names(names: Sequence[str]) -> None:
    """Check that each test set has its own name, as result files are named after it.

    Raises:
        UserError: two sets have the same name, or one is named "all".
    """
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"data.test_data_config has several test sets named {name!r}. "
                "Set a different 'name' for each."
            )
        if name == "all":
            raise UserError(
                "data.test_data_config has a test set named 'all', which is reserved for the "
                "table of all sets. Set another 'name'."
            )


def check_test_durations(corpora: Sequence[Corpus], limits: tuple[int, int]) -> None:
    """Check, before the model loads, that its audio encoder supports every test utterance.

    Args:
        corpora: the test sets.
        limits: minimum and maximum number of samples at 16 kHz that the encoder supports.

    Raises:
        UserError: an utterance is too short or too long.
    """
    shortest, longest = limits
    for corpus in corpora:
        samples = corpus.index.rows["samples"]
        is_unfit = (samples < shortest) | (samples > longest)
        unfit = int(is_unfit.sum())
        if unfit:
            raise UserError(
                f"{unfit} utterances of the test set {corpus.name!r} are shorter than "
                f"{shortest / RATE:.2f} s or longer than {longest / RATE:.2f} s, the limits of "
                "the model. Remove them from the set."
            )
