"""An evaluation: every test set decoded, by the model and by its encoder's own Whisper, scored, written and reported."""

import contextlib
import functools
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout

from asrllm import distributed
from asrllm.atomic import new_file
from asrllm.audio.reader import Reader
from asrllm.data.cache import ShardCache
from asrllm.data.corpora import Corpus
from asrllm.data.plan import Item
from asrllm.data.text import normalizer
from asrllm.errors import UserError
from asrllm.evaluation.compare import as_text, compare
from asrllm.evaluation.config import EvaluationRun
from asrllm.evaluation.decode import Decoded, DecodingOptions, decode_corpus
from asrllm.evaluation.engine import Engine
from asrllm.evaluation.files import write_results, write_summary
from asrllm.evaluation.journal import Journal
from asrllm.evaluation.prompt import prompt_to_ask
from asrllm.evaluation.references import check_test_set, choose_normalizer, language_of
from asrllm.evaluation.report import ReportSet, choose_audio, encode_audio, write_report
from asrllm.evaluation.score import UNITS
from asrllm.evaluation.summary import Scored, score
from asrllm.evaluation.wandb_report import log_to_wandb
from asrllm.evaluation.whisper import WhisperEngine, find_whisper
from asrllm.locks import FileLock
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.auto import describe
from asrllm.models.base_models import base_entry, base_paths
from asrllm.training.watchdog import Watchdog

BASELINE = "whisper"  # the folder beside the decoding methods' that keeps what the baseline said


class Evaluation:
    """All ranks decode; the first one scores and writes. results: what results.json holds, on that rank."""

    def __init__(
        self,
        config: EvaluationRun,
        corpora: Sequence[Corpus],
        cache: ShardCache,
        *,
        weights: Path,
        device: torch.device,
    ) -> None:
        self.config, self.corpora, self.cache, self.weights = config, corpora, cache, weights
        self.device, self.dtype = device, config.dtype(device)
        self.exp_dir = Path(config.exp_dir or "")
        self.folder = self.exp_dir / config.decoding_method
        self.suffix = config.suffix(weights)
        self.lock = FileLock(self.folder / ".evaluating.lock", blocking=False)
        self.description = describe(self.exp_dir, config.model.paths)
        self.prompts = {corpus.name: self._prompt(corpus) for corpus in corpora}
        self.normalizers = {
            corpus.name: choose_normalizer(config.normalizer, corpus) for corpus in corpora
        }
        self.scored: dict[str, Scored] = {}
        self.baselines: dict[str, Scored] = {}
        self.results: dict[str, Any] = {}
        self.journals: list[Journal] = []
        self.watchdog = Watchdog()

    def _prompt(self, corpus: Corpus) -> str:
        return prompt_to_ask(
            self.description, prompt=self.config.prompt, language=language_of(corpus), hotwords=None
        )

    def check(self) -> None:
        """Raises UserError for a test set that cannot be scored, and where another evaluation writes to the same folder."""
        distributed.first_rank_does(self._claim)
        for corpus in self.corpora:
            name = self.normalizers[corpus.name]
            distributed.first_rank_does(
                functools.partial(check_test_set, corpus, self.cache, name, normalizer(name))
            )

    def _claim(self) -> None:
        self.folder.mkdir(exist_ok=True)
        try:
            self.lock.acquire()
        except Timeout as error:
            raise UserError(
                f"another evaluation writes to {str(self.folder)!r}: wait for its end"
            ) from error

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block this rank must make progress every step_timeout seconds."""
        rank = distributed.rank()
        timeout = self.config.step_timeout
        with Watchdog(timeout, self.folder, rank=rank, key="step_timeout") as self.watchdog:
            yield

    def decode(self, engine: Engine) -> None:
        of = {
            "weights": identity_of(self.weights),
            "model": (self.exp_dir / "config.json").read_text(encoding="utf-8"),
            "options": self.config.generation,
            "dtype": str(self.dtype),
        }
        for corpus in self.corpora:
            journal = Journal(
                self.folder,
                corpus.name,
                of | {"corpus": identity_of_corpus(corpus), "prompt": self.prompts[corpus.name]},
            )
            self.journals.append(journal)
            decoded = self._decode(engine, corpus, journal)
            if distributed.rank() == 0:
                self._write(corpus, decoded)

    def _decode(self, engine: Engine, corpus: Corpus, journal: Journal) -> Decoded:
        options = DecodingOptions(
            prompt=self.prompts[corpus.name], max_batch_duration=self.config.data.max_batch_duration
        )
        return decode_corpus(
            engine,
            corpus,
            options,
            normalizer(self.normalizers[corpus.name]),
            self.cache,
            journal,
            self.watchdog,
        )

    def _write(self, corpus: Corpus, decoded: Decoded) -> None:
        name = corpus.name
        self.watchdog.beat(f"scoring {name}")
        about = {
            "normalizer": self.normalizers[name],
            "rtfx": round(decoded.rtfx, 2),
            "prompt": self.prompts[name],
            "weights": str(self.weights),
            "lang": language_of(corpus),
            "dtype": str(self.dtype).removeprefix("torch."),
            "options": self.config.generation,
        }
        self.scored[name] = score(decoded.transcripts)
        r = self.results[name] = write_results(
            self.folder, name, self.suffix, self.scored[name], about
        )
        metric = r["metric"]
        low, high = r[f"{metric}_ci95"]
        others = ", ".join(
            f"{other.upper()} {r[other]:.2f} %" for other in UNITS if other != metric
        )
        print(f"{name}: {metric.upper()} {r[metric]:.2f} % (95 %: {low:.2f} to {high:.2f}), {others}, {r['utterances']} utterances, "
              f"{r['rtfx']:g} x real time, normalizer {r['normalizer']}", flush=True)  # fmt: skip

    def decode_baseline(self) -> None:
        """The encoder's own Whisper on the same utterances; kept beside, since training changes nothing about it."""
        self.watchdog.beat("loading the encoder's own Whisper")
        whisper, why_not = None, None
        try:
            whisper = WhisperEngine(
                find_whisper(encoder_path(self.description)),
                dtype=self.dtype,
                device=self.device,
                max_new_tokens=self.config.max_new_tokens,
            )
        except UserError as error:
            why_not = str(error)
        reasons = [reason for reason in distributed.gather_objects(why_not) if reason]
        if whisper is None or reasons:
            if distributed.rank() == 0:
                print(f"no Whisper baseline: {reasons[0]}", flush=True)
            return
        for corpus in self.corpora:
            engine = whisper.of_language(language_of(corpus))
            of = {
                "whisper": identity_of(whisper.folder),
                "options": engine.options,
                "dtype": str(self.dtype),
            }
            journal = Journal(
                self.exp_dir / BASELINE, corpus.name, of | {"corpus": identity_of_corpus(corpus)}
            )
            decoded = self._decode(engine, corpus, journal)
            if distributed.rank() == 0:
                self._add_baseline(corpus.name, decoded)

    def _add_baseline(self, name: str, decoded: Decoded) -> None:
        self.watchdog.beat(f"scoring the baseline on {name}")
        baseline = self.baselines[name] = score(decoded.transcripts)
        against = compare(
            baseline.transcripts, self.scored[name].transcripts, normalizer=self.normalizers[name]
        )
        self.results[name]["baseline"] = baseline.rates() | {
            "rtfx": round(decoded.rtfx, 2),
            "paired": against.entry(),
        }
        print(f"  from the encoder's own Whisper to it: {as_text(name, against)}", flush=True)

    def report(self) -> None:
        if distributed.rank() != 0:
            return
        self.watchdog.beat("writing the report")
        write_summary(self.folder, self.suffix, self.results)
        sets = [self._report_set(corpus) for corpus in self.corpora]
        suffix, newest = self.suffix, self.folder / "report.html"
        report = self.folder / f"report-{suffix}.html"
        write_report(report, f"{self.exp_dir.name}, {suffix}", sets)
        with new_file(newest) as partial:
            shutil.copyfile(report, partial)
        log_to_wandb(self.config.wandb, self.exp_dir, sets)
        for journal in self.journals:
            journal.remove()
        self.lock.release()
        print(f"results: {self.folder}, to be looked at in {newest}")

    def _report_set(self, corpus: Corpus) -> ReportSet:
        name, scored, reader = (
            corpus.name,
            self.scored[corpus.name],
            Reader([corpus], cache=self.cache),
        )
        heard = [scored.transcripts[i] for i in choose_audio(scored, self.config.report_audio)]
        audio = {t.key: encode_audio(reader.read(Item(corpus=0, row=t.row)).wave) for t in heard}
        return ReportSet(
            name=name,
            scored=scored,
            entry=self.results[name],
            baseline=self.baselines.get(name),
            audio=audio,
        )


def encoder_path(description: AsrLlmConfig) -> str | None:
    """Return the path of the audio encoder's base model; None if the configuration names none.

    Raises:
        UserError: it is missing, or another one.
    """
    if base_entry(description, "audio_encoder") is None:
        return None
    return base_paths(description, ["audio_encoder"])["audio_encoder"]


def identity_of(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a file, or of a directory's."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def identity_of_corpus(corpus: Corpus) -> str:
    return hashlib.sha256(
        "".join([str(corpus.index.about["rows_sha256"]), *corpus.index.sha256]).encode()
    ).hexdigest()
