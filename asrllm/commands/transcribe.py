"""asrllm transcribe: text for audio files."""

import argparse

from asrllm.commands.shards import positive
from asrllm.errors import UserError
from asrllm.models.generation import MAX_NEW_TOKENS, MAX_TOKENS_PER_SECOND, REPETITION_GUARD


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR_OR_EXP", help="an exported directory, a run's exp_dir, or a directory of Auden's")
    parser.add_argument("audio", nargs="+", metavar="AUDIO", help="wav, flac, mp3, ... files of at most 30 s")
    parser.add_argument("--weights", metavar="FILE", help="state dict of a run; pretrained.pt by default, else the newest averaged-*.pt")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"),
        help="of the weights; default: bfloat16 on an accelerator, float32 on a CPU, where bfloat16 halves the memory and is often slower",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="files decoded at once; default: %(default)s")
    parser.add_argument(
        "--num-beams", type=positive, default=1, metavar="N", help="hypotheses of beam search; default: %(default)s, greedy"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=MAX_NEW_TOKENS, metavar="N", help="the longest text; default: %(default)s"
    )
    parser.add_argument(
        "--max-tokens-per-second", type=positive, default=MAX_TOKENS_PER_SECOND, metavar="N",
        help="a text is at most N tokens a second of audio long, and ten more; default: %(default)g",
    )  # fmt: skip
    parser.add_argument(
        "--repetition-guard", type=int, default=REPETITION_GUARD, metavar="N",
        help="a text that repeats a few tokens for longer than N tokens ends there, with one copy; 0: no guard; default: %(default)s",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    from asrllm import AutoModel
    from asrllm.audio.reader import read_audio
    from asrllm.data.index import RATE
    from asrllm.models.auto import describe
    from asrllm.progress import ProgressBar
    from asrllm.training.distributed import default_device

    if arguments.repetition_guard < 0:
        raise UserError(f"--repetition-guard {arguments.repetition_guard} must not be below 0, which is no guard")
    options = {name: getattr(arguments, name) for name in ("num_beams", "max_new_tokens", "max_tokens_per_second")}
    options["repetition_guard"] = arguments.repetition_guard or None
    files, device = arguments.audio, default_device()
    lengths = [len(read_audio(path)) for path in files]  # every file is checked before the model loads, and read again in its turn
    low, high = describe(arguments.model).sample_limits()
    for path, length in zip(files, lengths, strict=True):
        if not low <= length <= high:
            raise UserError(f"{path!r} has {length / RATE:.2f} s of audio, the model takes {low / RATE:.2f} to {high / RATE:.2f} s")
    dtype = arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    model = AutoModel.from_pretrained(arguments.model, weights=arguments.weights, dtype=dtype).to(device)
    with ProgressBar("transcribing", len(files)) as bar:
        for start in range(0, len(files), arguments.batch_size):
            batch = files[start : start + arguments.batch_size]
            for path, text in zip(batch, model.transcribe(batch, **options), strict=True):
                print(f"{path}\t{text}" if len(files) > 1 else text, flush=True)
            bar.advance(len(batch))
