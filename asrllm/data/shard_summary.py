"""The result of writing or indexing shards."""

from dataclasses import dataclass

from asrllm.data.index import Index


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """The result of writing or indexing shards.

    Attributes:
        index: the index of the shards.
        rejected: number of rejected utterances by reason.
        reused: number of shards that an interrupted run had already finished.
        examples: lines that describe rejected utterances.
    """

    index: Index
    rejected: dict[str, int]
    reused: int = 0
    examples: tuple[str, ...] = ()
