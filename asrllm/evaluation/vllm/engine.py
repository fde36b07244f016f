"""The engine that decodes with vLLM, for throughput on a GPU."""

import logging
import math
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asrllm.defaults import MAX_NEW_TOKENS, RATE, WHISPER_WINDOW
from asrllm.errors import UserError
from asrllm.evaluation.vllm import TESTED, installed_version, release
from asrllm.evaluation.vllm.limits import longest_samples
from asrllm.models.asr_llm.answers import MAX_LOOP_TOKENS, copies_of_loop, token_limit
from asrllm.models.asr_llm.generation import Answer, make_answer
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.models.asr_llm.saving import is_portable
from asrllm.models.auto import AutoModel, chosen_weights, load_model_config, model_folder
from asrllm.models.base_models import BasePaths
from asrllm.progress import waiting

MAX_PROMPT = 1024  # tokens of a prompt without its audio
CPU_CACHE = 2 << 30  # bytes of keys and values on a CPU
INSTALL = f"Install vLLM {TESTED} in a separate environment, as docs/vllm.md describes."


class VllmEngine:
    """Runs an exported model in vLLM, greedily. Its attributes are those of Engine."""

    parallel = 1

    def __init__(self, folder: Path, options: dict[str, Any], dtype: str) -> None:
        """Load the model.

        Args:
            folder: an exported directory with merged adapters.
            options: max_new_tokens, max_tokens_per_second and repetition_guard, as for
                `generation.generate`, and num_beams, which must be 1 or None.
            dtype: "float32" or "bfloat16".

        Raises:
            UserError: vLLM is not installed or too old, or an option is not supported.
        """
        check_vllm(options)
        processor = AsrLlmProcessor.from_pretrained(folder)
        config = processor.config
        self.renderer = processor.renderer
        self.max_new_tokens = options.get("max_new_tokens") or MAX_NEW_TOKENS
        self.max_tokens_per_second = options.get("max_tokens_per_second")
        self.guard = options.get("repetition_guard")
        self.padded_to = WHISPER_WINDOW if config.pad_to_30s else 0.0
        self.dtype = dtype
        self.llm = start_vllm(folder, dtype, MAX_PROMPT + self.max_new_tokens)
        self.limits = (config.sample_limits()[0], longest_samples(config))
        self.batch = VllmBatch(self)

    def answer(self, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Answer]:
        """Decode a batch, see Engine.answer.

        Raises:
            UserError: the model's logits are NaN.
        """
        batch = self.open_batch()
        rows = batch.join(waves, prompts)
        answers: dict[VllmRow, Answer] = {}
        while len(answers) < len(rows):
            answers.update(batch.step())
        return [answers[row] for row in rows]

    def close(self) -> None:
        """Shut down vLLM and its process groups. Call this before `distributed.finish`."""
        self.llm.llm_engine.engine_core.shutdown()

    def open_batch(self) -> "VllmBatch":
        """Return an empty batch. The utterances of the batch before it are dropped."""
        self.batch.clear()
        self.batch = VllmBatch(self)
        return self.batch

    def sampling(self, seconds: float) -> Any:
        """Return vLLM's options for an answer to some seconds of audio.

        vLLM knows only one number of copies for loops of any length. With the largest one it never
        ends an answer before the loop that `make_answer` removes.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RepetitionDetectionParams

        loops = None
        if self.guard:
            copies = copies_of_loop(1, self.guard)
            loops = RepetitionDetectionParams(max_pattern_size=MAX_LOOP_TOKENS, min_count=copies)
        return SamplingParams(
            temperature=0.0,
            max_tokens=token_limit(seconds, self.max_new_tokens, self.max_tokens_per_second),
            stop_token_ids=self.renderer.stop_ids,
            repetition_detection=loops,
            logprobs=0,
            detokenize=False,
        )


@dataclass(eq=False)
class VllmRow:
    """An utterance of a VllmBatch.

    Attributes:
        name: its name in vLLM.
        is_done: see PendingRow.
    """

    name: str
    is_done: bool = False


class VllmBatch:
    """The requests in vLLM, which joins them and removes them between its own steps."""

    can_join = True

    def __init__(self, engine: VllmEngine) -> None:
        self.engine = engine
        self.rows: dict[str, VllmRow] = {}

    def join(self, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> Sequence[VllmRow]:
        """Add utterances, see DecodingBatch.join.

        Raises:
            UserError: a prompt is too long.
        """
        renderer = self.engine.renderer
        requests: list[dict[str, Any]] = []
        for wave, prompt in zip(waves, prompts, strict=True):
            tokens = renderer.encode_prompt(renderer.user_messages(prompt), [1])
            if len(tokens) > MAX_PROMPT:
                raise UserError(
                    f"the prompt has {len(tokens)} tokens, but engine=vllm takes {MAX_PROMPT}. "
                    "Shorten the prompt or the list of hotwords, or use engine=torch."
                )
            requests.append({"prompt_token_ids": tokens, "multi_modal_data": {"audio": wave}})
        options = [self.engine.sampling(len(wave) / RATE) for wave in waves]
        names = self.engine.llm.enqueue(requests, options, use_tqdm=False)
        rows = [VllmRow(name) for name in names]
        # vLLM appends a random suffix to the names, which its outputs do not have
        self.rows |= {row.name.rpartition("-")[0]: row for row in rows}
        return rows

    def step(self) -> Sequence[tuple[VllmRow, Answer]]:
        """Decode one token of each utterance, see DecodingBatch.step."""
        self._drop([name for name, row in self.rows.items() if row.is_done])
        finished: list[tuple[VllmRow, Answer]] = []
        if not self.rows:
            return finished
        for output in self.engine.llm.llm_engine.step():
            row = self.rows.pop(output.request_id, None)
            if row is not None:
                finished.append((row, self._answer(output.outputs[0])))
        return finished

    def clear(self) -> None:
        """Remove all utterances."""
        self._drop(list(self.rows))

    def _drop(self, names: Sequence[str]) -> None:
        if names:
            dropped = [self.rows.pop(name).name for name in names]
            self.engine.llm.llm_engine.abort_request(dropped, internal=True)

    def _answer(self, completion: Any) -> Answer:
        """Return the answer in an output of vLLM, or raise UserError if its logits are NaN."""
        engine = self.engine
        tokens = list(completion.token_ids)
        logprobs = [
            of_step[token].logprob
            for of_step, token in zip(completion.logprobs, tokens, strict=True)
        ]
        if math.isnan(logprobs[0]):
            raise UserError(
                "the model's logits are NaN: its weights contain NaN, or numbers too large for "
                f"{engine.dtype}. Load other weights, or use float32."
            )
        renderer = engine.renderer
        return make_answer(renderer.tokenizer, tokens, renderer.stop_ids, engine.guard, logprobs)


def check_vllm(options: dict[str, Any]) -> None:
    """Raise UserError if vLLM is not installed or too old, or if a beam search is requested."""
    version = installed_version()
    if version is None:
        raise UserError(f"engine=vllm: vLLM is not installed. {INSTALL}")
    if release(version) < release(TESTED):
        raise UserError(f"engine=vllm: vLLM {version} is too old. {INSTALL}")
    if (options.get("num_beams") or 1) > 1:
        raise UserError(
            f"num_beams={options['num_beams']}: engine=vllm decodes greedily. Use engine=torch, or "
            "one beam."
        )


def start_vllm(folder: Path, dtype: str, text_tokens: int) -> Any:
    """Return vLLM with a model, in this process.

    Args:
        folder: an exported directory.
        dtype: dtype of the weights.
        text_tokens: maximum number of tokens of the prompt and the answer, without the audio.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # otherwise it keeps one core of a CPU free for a server in another process
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    logging.getLogger("vllm").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return _start_vllm(folder, dtype, text_tokens)


def _start_vllm(folder: Path, dtype: str, text_tokens: int) -> Any:
    from vllm import LLM

    from asrllm.models.portable.configuration import AsrLlmHubConfig

    config = AsrLlmHubConfig.from_pretrained(folder)
    audio_tokens = config.num_audio_tokens(longest_samples(config))
    longest = config.get_text_config().max_position_embeddings
    keywords: dict[str, Any] = {}
    if not torch.accelerator.is_available():
        # compiling takes minutes on a CPU, and by default vLLM takes nearly all memory
        keywords = {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE}
    return LLM(
        str(folder),
        dtype=dtype,
        max_model_len=min(longest, audio_tokens + text_tokens),
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **keywords,
    )


def load_vllm_engine(
    path: str | Path,
    options: dict[str, Any],
    *,
    dtype: str,
    weights: str | Path | None = None,
    base_models: BasePaths | None = None,
) -> VllmEngine:
    """Return the engine of any directory that AutoModel loads.

    A run, or a directory with separate adapters, is exported to a temporary directory first.

    Args:
        path: as for AutoModel.
        options: as for VllmEngine.
        dtype: as for VllmEngine.
        weights: as for AutoModel.
        base_models: as for AutoModel.
    """
    check_vllm(options)  # before a model is loaded
    folder = model_folder(path)
    is_whole = chosen_weights(folder, weights) is None
    if is_whole and is_portable(load_model_config(folder, base_models)):
        return VllmEngine(folder, options, dtype)
    with tempfile.TemporaryDirectory(prefix="asrllm-vllm-") as exported:
        with waiting(f"exporting {folder} for vLLM"):
            model = AutoModel.from_pretrained(
                folder, weights=weights, dtype=dtype, base_models=base_models
            )
            has_adapters = bool(model.config.lora or model.config.audio_encoder_lora)
            model.config.exclude_from_checkpoint = []
            model.save_pretrained(exported, merge_adapter=has_adapters)
            del model
        return VllmEngine(Path(exported), options, dtype)
