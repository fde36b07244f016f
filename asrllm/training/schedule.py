"""The learning rate as a pure function of the step: a resumed run needs no state for it."""

import math


def warmup_cosine(step: float, *, total: int, warmup: int, floor: float = 0.0) -> float:
    """Factor on the peak learning rate for step 0, 1, ...: linear from 1/warmup to 1, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
