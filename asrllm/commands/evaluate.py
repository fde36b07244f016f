"""asrllm evaluate: choose the checkpoint, decode the test sets, score them, write the results; or compare two results."""

import argparse
from pathlib import Path
from typing import Any

from asrllm import AutoModel, distributed
from asrllm.checkpoints.average import is_exported, resolve_weights
from asrllm.commands.parsers import COMPARE
from asrllm.data.cache import ShardCache
from asrllm.data.corpora import Corpus, read_corpora
from asrllm.data.index import RATE
from asrllm.errors import UserError
from asrllm.evaluation.compare import as_text, compare_results
from asrllm.evaluation.config import EvaluationRun
from asrllm.evaluation.engine import TorchEngine
from asrllm.evaluation.run import Evaluation
from asrllm.hydra_app import run_app
from asrllm.models.auto import describe
from asrllm.training.checkpoint.manifest import check_run
from asrllm.training.wandb_login import check_wandb_login


def run(arguments: argparse.Namespace) -> None:
    if arguments.overrides[:1] == [COMPARE]:
        compare(arguments.overrides[1:])
    else:
        run_app("evaluate", arguments, EvaluationRun, evaluate)


def compare(places: list[str]) -> None:
    if len(places) != 2:
        raise UserError(
            f"'{COMPARE}' takes two results, not {len(places)}: asrllm evaluate {COMPARE} A B"
        )
    for name, found in compare_results(*map(Path, places)).items():
        print(as_text(name, found))


def evaluate(config: EvaluationRun) -> dict[str, Any]:
    """Gives what results.json holds."""
    check_wandb_login(config.wandb, "wandb")
    exp_dir = Path(config.exp_dir or "")
    choice = config.checkpoint.model
    check_run(exp_dir)
    if config.model.paths:  # a wrong one is reported before checkpoints are averaged
        describe(exp_dir, config.model.paths)
    weights = resolve_weights(exp_dir, filename=choice.filename, what=choice.average)
    cache = ShardCache.from_config(config.data.cache)
    corpora = read_corpora(
        config.data.test_data_config or "", filters=None, made=exp_dir / "shards", cache=cache
    )
    check_names([corpus.name for corpus in corpora])
    description = describe(exp_dir)
    check_test_durations(corpora, description.sample_limits())
    device = distributed.start()
    evaluation = Evaluation(config, corpora, cache, weights=weights, device=device)
    evaluation.check()
    is_whole = is_exported(exp_dir) and not choice.filename
    model = AutoModel.from_pretrained(
        exp_dir,
        weights=None if is_whole else weights,
        dtype=config.dtype(device),
        base_models=config.model.paths,
    )
    model.cuda_graphs = config.cuda_graphs
    with evaluation.watched():
        evaluation.decode(TorchEngine(model.to(device), config.generation))
        if config.whisper_baseline:
            evaluation.decode_baseline()
        evaluation.report()
    distributed.finish()
    return evaluation.results


def check_names(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"data.test_data_config has two test sets named {name!r}: give each its own 'name'"
            )
        if name == "all":
            raise UserError(
                "data.test_data_config has a test set named 'all', as the table of all sets is: give it another 'name'"
            )


def check_test_durations(corpora: list[Corpus], limits: tuple[int, int]) -> None:
    """An utterance that the model cannot take is found before it loads."""
    low, high = (n / RATE for n in limits)
    for corpus in corpora:
        samples = corpus.index.rows["samples"]
        if unfit := int(((samples < limits[0]) | (samples > limits[1])).sum()):
            raise UserError(
                f"{unfit} utterances of the test set {corpus.name!r} are shorter than {low:.2f} s or longer than {high:.2f} s, which the "
                "model takes: leave them out of the set"
            )
