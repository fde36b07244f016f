"""Metrics of the server in the format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
WAITS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # seconds


class ServerMetrics:
    """Counters of one server.

    Attributes:
        requests: requests by path and status.
        audio_seconds: seconds of audio that were transcribed.
        decoding_seconds: seconds that the model was busy. Seconds of audio per second of decoding
            are the RTFx.
        queued_seconds: seconds of audio of the requests in progress.
        queue_seconds: how long a segment waited before it joined the batch, in seconds.
        batch_size: segments in the batch, observed at every step.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "asrllm_requests", "Requests.", ["path", "status"], registry=registry
        )
        self.audio_seconds = Counter(
            "asrllm_audio_seconds", "Seconds of audio transcribed.", registry=registry
        )
        self.decoding_seconds = Counter(
            "asrllm_decoding_seconds", "Seconds that the model was busy.", registry=registry
        )
        self.queued_seconds = Gauge(
            "asrllm_queued_audio_seconds",
            "Seconds of audio of the requests in progress.",
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "asrllm_queue_seconds",
            "Seconds that a segment waited before it joined the batch.",
            buckets=WAITS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "asrllm_batch_size",
            "Segments in the batch at each step.",
            buckets=BATCH_SIZES,
            registry=registry,
        )

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
