"""The models of a server."""

from collections.abc import Iterator, Sequence

from asrllm.serving.api_errors import ApiError
from asrllm.serving.metrics import ServerMetrics
from asrllm.serving.transcriber import Queue, Transcriber


class Models:
    """The models of a server by name. They share one queue and its metrics.

    Attributes:
        first: the model of clients that name none.
    """

    def __init__(self, transcribers: Sequence[Transcriber]) -> None:
        """
        Args:
            transcribers: one per model, with different names.
        """
        self.first = transcribers[0]
        self.by_name = {transcriber.name: transcriber for transcriber in transcribers}
        assert len(self.by_name) == len(transcribers)

    def __iter__(self) -> Iterator[Transcriber]:
        return iter(self.by_name.values())

    @property
    def queue(self) -> Queue:
        """The requests in progress."""
        return self.first.queue

    @property
    def metrics(self) -> ServerMetrics:
        """Counters of the server."""
        return self.first.metrics

    def get(self, name: str) -> Transcriber:
        """Return the model that a request names, or raise ApiError if it is not served."""
        if name not in self.by_name:
            known = ", ".join(map(repr, self.by_name))
            problem = f"the model {name!r} does not exist. Use {known}."
            raise ApiError(404, problem, param="model", code="model_not_found")
        return self.by_name[name]

    def close(self) -> None:
        """End the threads of all models after the work in progress."""
        for transcriber in self:
            transcriber.close()
