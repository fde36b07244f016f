"""Evaluate a model and the Whisper that its encoder comes from: decode, score and report."""

import contextlib
import functools
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from filelock import Timeout

from asrllm import distributed
from asrllm.atomic import check_output_file, check_writable_folder, new_file
from asrllm.audio.reader import Reader, SampleError
from asrllm.data.cache import ShardCache
from asrllm.data.corpora import Corpus
from asrllm.data.plan import Item
from asrllm.data.text import normalizer
from asrllm.errors import UserError
from asrllm.evaluation.compare import compare_transcripts, comparison_text
from asrllm.evaluation.config import EvaluationRun
from asrllm.evaluation.decode import CorpusOptions, Decoded, decode_corpus
from asrllm.evaluation.engine import Engine
from asrllm.evaluation.journal import Journal
from asrllm.evaluation.prompt import inference_prompt
from asrllm.evaluation.references import check_test_set, choose_normalizer, language_of
from asrllm.evaluation.report import ReportSet, choose_audio, encode_audio, write_report
from asrllm.evaluation.result_files import result_files, write_results, write_summary
from asrllm.evaluation.score import UNITS, Transcript
from asrllm.evaluation.summary import Entry, Scored, score
from asrllm.evaluation.wandb_report import log_to_wandb
from asrllm.evaluation.whisper import WhisperEngine, find_whisper
from asrllm.locks import FileLock
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.auto import load_model_config
from asrllm.models.base_models import base_entry, base_paths
from asrllm.progress import waiting
from asrllm.text_files import read_json_object
from asrllm.watchdog import Watchdog

BASELINE = "whisper"  # directory of the baseline's journals, next to those of decoding methods


class Evaluation:
    """Evaluates a model on test sets. All ranks decode, and the first one scores and writes.

    Attributes:
        results: the content of results.json, on the first rank.
    """

    def __init__(
        self,
        config: EvaluationRun,
        corpora: Sequence[Corpus],
        cache: ShardCache,
        *,
        weights: Path,
        device: torch.device,
    ) -> None:
        """
        Args:
            config: configuration of the evaluation.
            corpora: the test sets.
            cache: cache of remote shards.
            weights: what is evaluated.
            device: where to decode.
        """
        self.config = config
        self.corpora = corpora
        self.cache = cache
        self.weights = weights
        self.device = device
        self.dtype = config.dtype(device)
        self.exp_dir = Path(config.exp_dir or "")
        self.folder = self.exp_dir / config.decoding_method
        self.suffix = free_suffix(self.folder, config.suffix(weights), weights)
        self.lock = FileLock(self.folder / ".evaluating.lock", blocking=False)
        self.model_config = load_model_config(self.exp_dir, config.model.paths)
        self.prompts: dict[str, str] = {}
        self.normalizers: dict[str, str] = {}
        for corpus in corpora:
            self.prompts[corpus.name] = self._prompt(corpus)
            self.normalizers[corpus.name] = choose_normalizer(config.normalizer, corpus)
        self.scored: dict[str, Scored] = {}
        self.baselines: dict[str, Scored] = {}
        self.results: dict[str, Entry] = {}
        self.journals: list[Journal] = []
        self.watchdog = Watchdog()

    def _prompt(self, corpus: Corpus) -> str:
        language = language_of(corpus)
        return inference_prompt(
            self.model_config, prompt=self.config.prompt, language=language, hotwords=None
        )

    def check(self) -> None:
        """Check the test sets, and lock the result directory.

        Raises:
            UserError: the ranks have different settings, a test set cannot be scored, the results
                cannot be written, or another evaluation writes to the directory.
        """
        distributed.check_same(
            "in their settings", distributed.gather_objects(self.shared_settings())
        )
        for corpus in self.corpora:
            name = self.normalizers[corpus.name]
            distributed.first_rank_does(
                functools.partial(
                    check_test_set,
                    corpus,
                    self.cache,
                    name,
                    normalizer(name),
                    self.config.data.max_bad_share,
                )
            )
        distributed.first_rank_does(self._lock_folder)  # creates the directory

    def shared_settings(self) -> distributed.Signature:
        """Return the settings that all ranks must share. Paths may differ from node to node."""
        settings = {
            "engine": self.config.engine,
            "decoding_method": self.config.decoding_method,
            "max_batch_duration": self.config.data.max_batch_duration,
            "max_bad_share": self.config.data.max_bad_share,
            "whisper_baseline": self.config.whisper_baseline,
            "precision": str(self.dtype),
            "weights": self.weights.name,
            "options": self.config.generation,
            "prompts": self.prompts,
            "normalizers": self.normalizers,
            "test sets": {corpus.name: corpus_digest(corpus) for corpus in self.corpora},
        }
        return distributed.flat_settings(settings)

    def _lock_folder(self) -> None:
        check_writable_folder(self.folder)
        self.folder.mkdir(exist_ok=True)
        for name in result_files([corpus.name for corpus in self.corpora], self.suffix):
            check_output_file(self.folder / name)
        try:
            self.lock.acquire()
        except Timeout as error:
            raise UserError(
                f"another evaluation writes to {str(self.folder)!r}. Wait until it has finished."
            ) from error

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Require progress of this rank every step_timeout seconds within the block."""
        rank = distributed.rank()
        timeout = self.config.step_timeout
        with Watchdog(timeout, self.folder, rank=rank, key="step_timeout") as self.watchdog:
            yield

    def decode(self, engine: Engine) -> None:
        """Decode the test sets with the model, score them and write their result files."""
        settings = {
            "weights": file_stats(self.weights),
            "model": (self.exp_dir / "config.json").read_text(encoding="utf-8"),
            "engine": self.config.engine,
            "options": self.config.generation,
            "dtype": str(self.dtype),
        }
        for corpus in self.corpora:
            settings["corpus"] = corpus_digest(corpus)
            settings["prompt"] = self.prompts[corpus.name]
            journal = Journal(self.folder, corpus.name, settings)
            self.journals.append(journal)
            decoded = self._decode(engine, corpus, journal)
            if distributed.rank() == 0:
                self._write(corpus, decoded)

    def _decode(self, engine: Engine, corpus: Corpus, journal: Journal) -> Decoded:
        data = self.config.data
        options = CorpusOptions(
            prompt=self.prompts[corpus.name],
            max_batch_duration=data.max_batch_duration,
            max_bad_share=data.max_bad_share,
        )
        normalize = normalizer(self.normalizers[corpus.name])
        return decode_corpus(engine, corpus, options, normalize, self.cache, journal, self.watchdog)

    def _write(self, corpus: Corpus, decoded: Decoded) -> None:
        name = corpus.name
        self.watchdog.beat(f"scoring {name}")
        about = {
            "normalizer": self.normalizers[name],
            "rtfx": round(decoded.rtfx, 2),
            "unreadable": decoded.unreadable,
            "prompt": self.prompts[name],
            "weights": str(self.weights),
            "lang": language_of(corpus),
            "dtype": str(self.dtype).removeprefix("torch."),
            "options": self.config.generation,
        }
        with waiting(f"scoring {name}"):
            scored = score(decoded.transcripts)
        entry = write_results(self.folder, name, self.suffix, scored, about)
        self.scored[name] = scored
        self.results[name] = entry
        print(f"{name}: {entry_text(entry)}", flush=True)

    def decode_baseline(self) -> None:
        """Decode the test sets with the Whisper that the encoder comes from.

        Its journals are never removed, because it does not change with training.
        """
        self.watchdog.beat("loading the encoder's Whisper model")
        with waiting("loading the encoder's Whisper model"):
            whisper = self._load_whisper()
        if whisper is None:
            return
        for corpus in self.corpora:
            engine = whisper.with_language(language_of(corpus))
            settings = {
                "whisper": file_stats(whisper.folder),
                "options": engine.options,
                "dtype": str(self.dtype),
                "corpus": corpus_digest(corpus),
            }
            journal = Journal(self.exp_dir / BASELINE, corpus.name, settings)
            decoded = self._decode(engine, corpus, journal)
            if distributed.rank() == 0:
                self._add_baseline(corpus.name, decoded)

    def _load_whisper(self) -> WhisperEngine | None:
        """Return the baseline, or print why there is none if any rank cannot load it."""
        whisper = None
        problem = None
        try:
            whisper = WhisperEngine(
                find_whisper(encoder_path(self.model_config)),
                dtype=self.dtype,
                device=self.device,
                max_new_tokens=self.config.max_new_tokens,
            )
        except UserError as error:
            problem = str(error)
        problems = [each for each in distributed.gather_objects(problem) if each]
        if not problems:
            return whisper
        if distributed.rank() == 0:
            print(f"No Whisper baseline: {problems[0].rstrip('.')}.", flush=True)
        return None

    def _add_baseline(self, name: str, decoded: Decoded) -> None:
        self.watchdog.beat(f"scoring the baseline on {name}")
        baseline = score(self._same_utterances(name, decoded))
        comparison = compare_transcripts(
            baseline.transcripts, self.scored[name].transcripts, normalizer=self.normalizers[name]
        )
        entry = baseline.rates()
        entry["rtfx"] = round(decoded.rtfx, 2)
        entry["paired"] = comparison.entry()
        self.baselines[name] = baseline
        self.results[name]["baseline"] = entry
        print(
            f"  compared with the encoder's Whisper: {comparison_text(name, comparison)}",
            flush=True,
        )

    def _same_utterances(self, name: str, decoded: Decoded) -> list[Transcript]:
        """Return the baseline's transcripts of the utterances that the model has decoded."""
        rows = {transcript.row for transcript in self.scored[name].transcripts}
        same = [transcript for transcript in decoded.transcripts if transcript.row in rows]
        if len(same) < len(rows):
            raise UserError(
                f"{len(rows) - len(same)} utterances of the test set {name!r} could be read for "
                "the model, but not for the baseline. Evaluate again."
            )
        return same

    def report(self) -> None:
        """Write the summary and the report, log to W&B and release the lock, on the first rank."""
        if distributed.rank() != 0:
            return
        self.watchdog.beat("writing the report")
        write_summary(self.folder, self.suffix, self.results)
        newest = self.folder / "report.html"
        report = self.folder / f"report-{self.suffix}.html"
        with waiting("writing the report"):
            sets = [self._report_set(corpus) for corpus in self.corpora]
            write_report(report, f"{self.exp_dir.name}, {self.suffix}", sets)
        with new_file(newest) as partial:
            shutil.copyfile(report, partial)
        log_to_wandb(self.config.wandb, self.exp_dir, sets)
        for journal in self.journals:
            journal.remove()
        self.lock.release()
        print(f"Results are in {self.folder}. Open {newest} in a browser.")

    def _report_set(self, corpus: Corpus) -> ReportSet:
        scored = self.scored[corpus.name]
        reader = Reader([corpus], cache=self.cache)
        audio = {}
        for i in choose_audio(scored, self.config.report_audio):
            transcript = scored.transcripts[i]
            with contextlib.suppress(SampleError):  # the utterance was read before it was damaged
                sample = reader.read(Item(corpus=0, row=transcript.row))
                audio[transcript.key] = encode_audio(sample.wave)
        return ReportSet(
            name=corpus.name,
            scored=scored,
            entry=self.results[corpus.name],
            baseline=self.baselines.get(corpus.name),
            audio=audio,
        )


def entry_text(entry: Entry) -> str:
    """Return the main numbers of an entry of results.json as one line."""
    metric = entry["metric"]
    low, high = entry[f"{metric}_ci95"]
    others = [f"{other.upper()} {entry[other]:.2f} %" for other in UNITS if other != metric]
    unreadable = f" ({entry['unreadable']} unreadable)" if entry["unreadable"] else ""
    return (
        f"{metric.upper()} {entry[metric]:.2f} % (95 % CI {low:.2f} to {high:.2f}), "
        f"{', '.join(others)}, {entry['utterances']} utterances{unreadable}, "
        f"{entry['rtfx']:g}x real time, normalizer {entry['normalizer']}"
    )


def encoder_path(config: AsrLlmConfig) -> str | None:
    """Return the path of the audio encoder's base model; None if the configuration names none.

    Raises:
        UserError: the base model does not exist or is a different one.
    """
    if base_entry(config, "audio_encoder") is None:
        return None
    return base_paths(config, ["audio_encoder"])["audio_encoder"]


def file_stats(path: Path) -> list[tuple[str, int, int]]:
    """Return name, size and modification time of a file, or of the files in a directory."""
    files = [path]
    if not path.is_file():
        files = sorted(file for file in path.iterdir() if file.is_file())
    stats = []
    for file in files:
        found = file.stat()
        stats.append((file.name, found.st_size, found.st_mtime_ns))
    return stats


def corpus_digest(corpus: Corpus) -> str:
    """Return a digest of the rows and shards of a corpus."""
    parts = [str(corpus.index.about["rows_sha256"]), *corpus.index.sha256]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def free_suffix(folder: Path, suffix: str, weights: Path) -> str:
    """Return a suffix under which no results of other weights are stored.

    Args:
        folder: directory of the results.
        suffix: the first choice.
        weights: what is evaluated. The checksum of its path is appended if results of another file
            have the first choice.
    """
    try:
        stored = read_json_object(folder / f"results-{suffix}.json", "the results")
        paths = {Path(entry["weights"]) for entry in stored.values()}
    except (UserError, KeyError, TypeError):
        return suffix  # there are no results, or they are corrupted
    if all(_is_same_file(path, weights, folder.parent) for path in paths):
        return suffix
    digest = hashlib.sha256(str(weights.absolute()).encode("utf-8", "surrogateescape"))
    return f"{suffix}-{digest.hexdigest()[:8]}"


def _is_same_file(stored: Path, weights: Path, exp_dir: Path) -> bool:
    """Return whether a stored path, perhaps relative or of a run that moved, names the file."""
    if stored.resolve() == weights.resolve():
        return True
    if stored.exists():
        return False
    is_own = weights.resolve().parent == exp_dir.resolve()
    return is_own and stored.name == weights.name
