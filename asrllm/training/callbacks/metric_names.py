"""What is logged: each name with its unit and its meaning. {corpus} and {set} stand for names of the data configs."""

METRICS: dict[str, tuple[str, str]] = {
    "epoch": ("epochs", "that are done"),
    "loss": ("nats", "a supervised token, over all ranks"),
    "acc": ("share", "of the supervised tokens that are the most probable ones"),
    "loss/{corpus}": ("nats", "a supervised token of the corpus, where there are several"),
    "lr": ("", "learning rate of the step"),
    "grad_norm": ("", "of all gradients before clipping"),
    "utterances": ("utterances", "since the record before"),
    "audio_seconds": ("s", "of audio since the record before"),
    "text_tokens": ("tokens", "supervised, since the record before"),
    "padding": ("share", "of the waveforms that is padding"),
    "bad": ("utterances", "that could not be read"),
    "skipped": ("steps", "whose loss or gradient was not finite"),
    "tokens_per_second": ("tokens/s", "audio and text, of all ranks"),
    "audio_hours_per_hour": ("h/h", "audio trained on, of all ranks"),
    "seconds_per_step": ("s", "without validation"),
    "tflops": ("TFLOP/s", "a device does of what the model needs, forward and backward"),
    "mfu": ("share", "of the device's dense bfloat16 peak that tflops are"),
    "memory_gb": (
        "GB",
        "of the device at its peak so far; on a CPU of the process; the rank with the most",
    ),
    "data_wait": ("share", "of the time spent waiting for data, over ranks"),
    "data_wait_max": ("share", "of the time spent waiting for data, the rank that waits longest"),
    "slowest_rank": ("rank", "that waits longest for data"),
    "dropped/{reason}": ("utterances", "that data.filter leaves out"),
    "valid/{set}/loss": ("nats", "a supervised token"),
    "valid/{set}/acc": ("share", "of the supervised tokens that are the most probable ones"),
    "valid/{set}/wer": (
        "%",
        "errors to reference words, of trainer.valid_decode utterances decoded greedily",
    ),
}


def describe(name: str) -> str:
    unit, meaning = METRICS[name]
    return f"{unit} {meaning}".strip()
