"""Checks of a planned training run on the CPU. Nothing is written."""

import shutil
import tempfile
from pathlib import Path

import torch

from asrllm.atomic import check_output_folder
from asrllm.audio.reader import Sample
from asrllm.collator.batch import PackedBatch
from asrllm.collator.chat import IGNORE_INDEX
from asrllm.data.corpora import HIGH_DROP_RATIO, WIDEN_FILTER, Corpus, read_entries
from asrllm.data.storage import is_url
from asrllm.defaults import ENCODER_KEY, LLM_KEY, RATE
from asrllm.doctor.adapters import check_adapters
from asrllm.doctor.findings import Finding, ok, problem, warning
from asrllm.doctor.order import check_order
from asrllm.doctor.overlap import check_overlap
from asrllm.doctor.style import check_styles
from asrllm.doctor.system import amount
from asrllm.errors import UserError
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.models.build import assemble_model
from asrllm.models.encoders.registry import encoder_class
from asrllm.models.pretrained import initial_encoder, pretrained_llm
from asrllm.training.data import TrainingData
from asrllm.training.memory_estimate import count_sizes, on_meta
from asrllm.training.prepare import DescribedRun, describe_run, warmup_of
from asrllm.training.run_config import TrainRun
from asrllm.training.subset import PADDING_KEY

EXAMPLES = 3  # utterances of each corpus that are read
SMALL_BATCH = 2 * RATE  # samples of the example that runs through the model
OPTIMIZER_BYTES = 12  # of a trained weight in a checkpoint: float32 master weight and two moments

Examples = list[tuple[Sample, str]]  # with their prompts


def check_run(config: TrainRun) -> list[Finding]:
    """Check a planned run: its files, weights, texts, audio, data, schedule and disk."""
    try:
        check_nothing_is_written(config)
        check_output_folder(Path(config.exp_dir or ""), "exp_dir=")
        run = describe_run(config)
    except UserError as error:
        return [problem("configuration", str(error), "")]
    data = run.data
    findings = [ok("configuration", "the configuration, the models' files and the data are valid")]
    examples: Examples = []
    for corpus in data.corpora + data.valid:
        findings.append(check_filters(corpus))
        found = next(data.subset(corpus, EXAMPLES).batches(0, 1))
        findings.append(check_readable(corpus, found))
        examples += [example for example in found if example[0].key != PADDING_KEY]
    findings += check_texts(run.processor, examples)
    findings += check_base_models(config, run, examples)
    findings += check_local_data(data)
    total = data.total_steps(ranks=max(torch.accelerator.device_count(), 1))
    return [*findings, check_schedule(config, total), check_checkpoints(config, run, total)]


def check_nothing_is_written(config: TrainRun) -> None:
    """Raise UserError for a corpus from which training would first write shards."""
    for key in ("train_data_config", "valid_data_config"):
        path = getattr(config.data, key)
        for named in read_entries(path, f"data.{key}") if path else []:
            if named.entry.manifest is not None:
                raise UserError(
                    f"{named.where}: shards of the manifest {named.entry.manifest!r} do not exist "
                    "yet. Make them with 'asrllm shards make', and name them as shards."
                )


# --- data ---


def check_filters(corpus: Corpus) -> Finding:
    """Report how many utterances of a corpus data.filter drops, and why."""
    total = len(corpus.index)
    dropped = total - corpus.usable
    reasons = [f"{count} {reason}" for reason, count in corpus.dropped.items() if count]
    text = f"{corpus.name}: data.filter drops {dropped} of {total} utterances"
    if reasons:
        text = f"{text} ({', '.join(reasons)})"
    if dropped > HIGH_DROP_RATIO * total:
        return warning("filter", text, WIDEN_FILTER)
    return ok("filter", text)


def check_readable(corpus: Corpus, examples: Examples) -> Finding:
    """Report whether the examples of a corpus could be read."""
    unreadable = sum(sample.key == PADDING_KEY for sample, _ in examples)
    text = f"{corpus.name}: {len(examples) - unreadable} of {len(examples)} utterances were read"
    if unreadable:
        return problem("audio", text, "Run 'asrllm shards verify' on its shards.")
    return ok("audio", text)


def check_local_data(data: TrainingData) -> list[Finding]:
    """Check samples of all data, unless that would download shards."""
    corpora = data.corpora + data.valid
    if any(is_url(shard) for corpus in corpora for shard in corpus.index.shards):
        return [ok("data", "overlap, style and order of shards at URLs are not checked")]
    return [*check_overlap(data), *check_styles(data), check_order(data)]


# --- texts ---


def check_texts(processor: AsrLlmProcessor, examples: Examples) -> list[Finding]:
    """Compare the prompts of training and decoding, and the labels with the transcripts."""
    decoding = as_decoding_reads(processor)
    for sample, prompt in examples:
        tokens, labels = training_tokens(processor, sample, prompt)
        audio = processor.config.num_audio_tokens(len(sample.wave))
        messages = decoding.renderer.user_messages(prompt)
        (decoded,) = decoding.encode_prompts([messages], [1], [audio])
        if tokens[: len(decoded)] != decoded or any(
            label != IGNORE_INDEX for label in labels[: len(decoded)]
        ):
            text = f"the prompt {prompt!r} has other tokens in decoding than in training"
            fix = "Compare the tokenizer's files with those of the original model."
            return [problem("prompts", text, fix)]
    same = ok("prompts", "training and decoding have the same prompts, token for token")
    return [same, *check_labels(processor, examples)]


def training_tokens(
    processor: AsrLlmProcessor, sample: Sample, prompt: str
) -> tuple[list[int], list[int]]:
    """Return the tokens and labels of an utterance in training."""
    renderer = processor.renderer
    audio = processor.config.num_audio_tokens(len(sample.wave))
    return renderer.encode_training(renderer.user_messages(prompt), sample.text, [audio])


def as_decoding_reads(processor: AsrLlmProcessor) -> AsrLlmProcessor:
    """Return the processor that decoding reads from the files which training writes."""
    with tempfile.TemporaryDirectory() as folder:
        processor.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        return AsrLlmProcessor.from_pretrained(folder)


def check_labels(processor: AsrLlmProcessor, examples: Examples) -> list[Finding]:
    """Check that the labels decode to the transcripts."""
    for sample, prompt in examples:
        _, labels = training_tokens(processor, sample, prompt)
        answer = [label for label in labels if label != IGNORE_INDEX]
        answer = answer[: -len(processor.renderer.end_ids)]
        text = processor.tokenizer.decode(answer, clean_up_tokenization_spaces=False)
        if text.strip() != sample.text.strip():
            what = f"the labels of {sample.key!r} decode to {text!r}, not to {sample.text!r}"
            fix = (
                "Normalize the transcripts, or choose an LLM whose tokenizer knows the characters."
            )
            return [warning("labels", what, fix)]
    return [ok("labels", f"the labels of {len(examples)} utterances decode to their transcripts")]


# --- base models ---


def check_base_models(config: TrainRun, run: DescribedRun, examples: Examples) -> list[Finding]:
    """Load the base models, and check them with the examples."""
    processor = run.processor
    bases = processor.config.base_models or {}
    encoder_text = f"{ENCODER_KEY}: every weight is present and finite"
    if "audio_encoder" not in bases:
        start = "the weights of init_from" if config.init_from else "random weights"
        encoder_text = f"model.audio_encoder.size={config.model.audio_encoder.size}: {start}"
    findings: list[Finding] = []
    try:
        encoder = initial_encoder(processor.config, is_random=config.has_random_encoder).eval()
        findings.append(ok("encoder", encoder_text))
        findings.append(check_audio_tokens(encoder, processor, examples))
    except UserError as error:
        findings.append(problem("encoder", str(error), ""))
    try:
        llm = pretrained_llm(bases["llm"]["path"], config.trainer.dtype)
        findings.append(ok("llm", f"{LLM_KEY}: every weight is present and finite"))
    except UserError as error:
        findings.append(problem("llm", str(error), ""))
    if not examples or any(finding.level == "problem" for finding in findings):
        return findings
    try:
        model = assemble_model(
            processor,
            encoder,
            llm,
            frozen=config.model.frozen_parts,
            patterns=config.model.frozen_parameters,
            init_from=config.init_from,
        )
    except UserError as error:
        return [*findings, problem("model", str(error), "")]
    return [*findings, check_adapters(model, small_batch(run.data, examples))]


def small_batch(data: TrainingData, examples: Examples) -> PackedBatch:
    """Return a batch of one example.

    A long one takes time. In a very short one, attention has a single frame and no gradient.
    """
    samples = [sample for sample, _ in examples]
    sample = min(samples, key=lambda sample: abs(len(sample.wave) - SMALL_BATCH))
    return data.subset(data.corpora[0], 1).collator([sample])


@torch.no_grad()
def check_audio_tokens(
    encoder: torch.nn.Module, processor: AsrLlmProcessor, examples: Examples
) -> Finding:
    """Compare the frames that the encoder gives with those that the prompts have tokens for.

    Only the shortest, the median and the longest example are encoded: a Whisper of 0.3 billion
    weights takes a second for each second of audio on two cores.
    """
    features_of = encoder.get_submodule("features")
    config = processor.config
    fields = (config.audio_encoder or {}) | {"pad_to_30s": config.pad_to_30s}
    frame_lengths = encoder_class(fields["model_type"]).frame_lengths
    by_length = sorted((sample for sample, _ in examples), key=lambda sample: len(sample.wave))
    last = len(by_length) - 1
    chosen = [by_length[i] for i in sorted({0, last // 2, last}) if by_length]
    for sample in chosen:
        wave = torch.from_numpy(sample.wave)[None]
        _, lengths = encoder(*features_of(wave, torch.tensor([wave.shape[1]])))
        expected = int(frame_lengths(wave.shape[1], fields))
        if int(lengths[0]) != expected:
            text = (
                f"{sample.key!r} has {int(lengths[0])} encoder frames, but {expected} are expected"
            )
            fix = "Give the encoder that belongs to its configuration."
            return problem("audio tokens", text, fix)
    text = f"the audio tokens of {len(chosen)} utterances agree with the encoder's output"
    return ok("audio tokens", text)


# --- schedule and disk ---


def check_schedule(config: TrainRun, total: int) -> Finding:
    """Compare the warm-up with the number of steps on the accelerators of this machine."""
    key, warmup = warmup_of(config.trainer)
    text = f"the run has {total} steps, and the warm-up {warmup:g}"
    if warmup > total:
        return warning("schedule", text, f"Lower {key}, or train for more steps.")
    return ok("schedule", text)


def check_checkpoints(config: TrainRun, run: DescribedRun, total: int) -> Finding:
    """Compare the free space with the size of all checkpoints that are kept."""
    trainer = config.trainer
    model = on_meta(run.processor.config, config.model, trainer.dtype)
    each = count_sizes(model, threshold=0).trained * (OPTIMIZER_BYTES + trainer.dtype.itemsize)
    written = max(1, -(-total // trainer.save_every))
    kept = min(written, trainer.keep_last_k + 1) if trainer.keep_last_k else written
    folder = Path(config.exp_dir or "").absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = (
        f"{kept} checkpoints need {amount(kept * each)} in exp_dir, where {amount(free)} are free"
    )
    if kept * each > free:
        fix = "Set trainer.keep_last_k, raise trainer.save_every, or use a larger disk."
        return problem("checkpoints", text, fix)
    return ok("checkpoints", text)
