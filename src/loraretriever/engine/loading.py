"""From settings to a local engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loraretriever.compose.merged import MergedStore
from loraretriever.config import Settings
from loraretriever.engine.local import LocalEngine
from loraretriever.errors import AdmissionError
from loraretriever.models import linear_modules, load_base_model
from loraretriever.pool import Pool


def load_local_engine(
    pool: Pool, settings: Settings, merged: MergedStore | None, routers: Sequence[Path]
) -> LocalEngine:
    """An engine for a pool's adapters, with the base model of the settings or else of the pool.

    Args:
        pool: where the adapters come from.
        settings: the model, and the engine's sizes.
        merged, routers: as in `LocalEngine`.

    Raises:
        AdmissionError: adapters of the pool do not fit the base model.
        ModelLoadError, InvalidInputError: as `LocalEngine`.
    """
    base = load_base_model(settings.base_model or pool.base_model, settings.dtype, settings.device)
    problems = pool.check_shapes(linear_modules(base.name, base.model))
    if problems:
        raise AdmissionError(
            "adapters of the pool do not fit the base model; disable or remove them, or name another base model:\n"
            + "\n".join(problems)
        )
    return LocalEngine(
        base,
        pool,
        slots=settings.slots,
        batch_size=settings.batch_size,
        step_tokens=settings.step_tokens,
        cache_mib=settings.cache_mib,
        prefix_mib=settings.prefix_mib,
        host_mib=settings.host_mib,
        queue=settings.queue,
        merged=merged,
        routers=routers,
    )
