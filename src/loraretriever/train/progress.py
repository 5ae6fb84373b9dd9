"""Steps of a training, told as parts of a progress bar."""

from __future__ import annotations

from collections.abc import Callable


def in_parts(advance: Callable[[], None], parts: int) -> Callable[..., None]:
    """What a training calls with the steps done, the steps in all, and more; `advance` is called `parts` times."""
    shown = 0

    def on_step(step: int, steps: int, *_: object) -> None:
        nonlocal shown
        while shown < parts * step // max(1, steps):
            advance()
            shown += 1

    return on_step
