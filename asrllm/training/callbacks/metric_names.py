"""Units and meanings of the logged metrics.

{corpus} and {set} are names from the data configs, {reason} is the name of a filter.
"""

import re

SAMPLES = "valid/samples"  # name of the table of decoded utterances
METRICS: dict[str, tuple[str, str]] = {
    "epoch": ("epochs", "passes over the data that are complete"),
    "loss": ("nats", "mean per supervised token over all ranks"),
    "acc": ("ratio", "token accuracy on supervised positions"),
    "loss/{corpus}": ("nats", "mean per supervised token of a corpus, with several corpora"),
    "lr": ("factor", "learning rate of the step"),
    "grad_norm": (
        "nats",
        "global gradient norm before clipping; null: unknown (ZeRO 0 in fp32), or a skipped step",
    ),
    "utterances": ("utterances", "trained on since the previous record"),
    "audio_seconds": ("s", "audio trained on since the previous record"),
    "text_tokens": ("tokens", "supervised tokens since the previous record"),
    "padding": ("ratio", "padding to all samples of the waveforms"),
    "bad": ("utterances", "could not be read"),
    "skipped": ("steps", "skipped because a loss or gradient was not finite"),
    "tokens_per_second": ("tokens/s", "audio and text tokens of all ranks"),
    "audio_hours_per_hour": ("h/h", "audio trained on by all ranks"),
    "seconds_per_step": ("s", "without validation"),
    "tflops": ("TFLOP/s", "operations that the model needs, forward and backward, per device"),
    "mfu": ("ratio", "tflops to the device's peak dense bf16 rate"),
    "memory_gb": ("GB", "peak of the device, or of the process on a CPU; the rank with the most"),
    "data_wait": ("ratio", "time spent waiting for data, mean over ranks"),
    "data_wait_max": ("ratio", "time spent waiting for data, on the rank that waits longest"),
    "slowest_rank": ("rank", "waits longest for data"),
    "dropped/{reason}": ("utterances", "dropped by data.filter"),
    "valid/{set}/loss": ("nats", "mean per supervised token"),
    "valid/{set}/acc": ("ratio", "token accuracy on supervised positions"),
    "valid/{set}/wer": ("%", "word error rate of trainer.valid_decode utterances, greedy search"),
}


def describe_metric(name: str) -> str:
    """Return the unit and the meaning of a metric."""
    unit, meaning = METRICS[name]
    return f"{unit} {meaning}"


def full_name(name: str) -> str:
    """Return a metric's name with its group. Metrics without a group belong to "train"."""
    return name if "/" in name else f"train/{name}"


def wandb_name(name: str) -> str:
    """Return W&B's pattern for a name in METRICS: a star replaces the variable part."""
    return re.sub(r"{\w+}.*", "*", full_name(name))
