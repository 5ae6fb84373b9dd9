"""Looks at everything in a pool: the database, the files, the admission of every adapter."""

from __future__ import annotations

import sys

from loraretriever.errors import AdmissionError, PoolAwayError, PoolError
from loraretriever.pool import records
from loraretriever.pool.admission import admit, check_shape
from loraretriever.pool.content import files, place_of
from loraretriever.pool.database import Database
from loraretriever.pool.layout import Layout
from loraretriever.pool.schema import AdapterRow
from loraretriever.pool.weights import module_shapes
from loraretriever.types import BaseModelSpec


def find_problems(layout: Layout, database: Database, base_model: str, spec: BaseModelSpec | None) -> list[str]:
    """What is wrong with the pool, in words; nothing when all is well."""
    problems = database.check()
    with database.read() as session:
        rows = records.current_rows(session)
        missing = records.names_without_samples(session)
        session.expunge_all()
    problems += [f"adapter {name!r} has no samples. Add it again with samples." for name in missing]
    for row in rows:
        found = _adapter_problem(layout, row, base_model, spec)
        if found and _is_still_there(database, row):
            problems.append(f"adapter {row.name!r}: {found}")
    return problems


def check_shapes(layout: Layout, database: Database, spec: BaseModelSpec) -> list[str]:
    """Compare the modules of enabled adapters with a base model's.

    With the pool's own base model: those admitted without it at hand, and what is found well is stored. With another
    one: all of them, and nothing is stored.
    """
    with database.read() as session:
        pool = records.pool_row(session)
        own = pool is not None and pool.base_model == spec.name
        due = [row for row in records.current_rows(session) if row.enabled and not (own and row.checked_shapes)]
        is_known = pool is not None and pool.spec is not None
        session.expunge_all()
    problems, passed = [], []
    for row in due:
        try:
            with files(layout, row.folder) as folder:
                for module, shape in module_shapes(folder).items():
                    check_shape(module, shape, spec, place_of(layout, row.folder))
            passed.append(row.id)
        except (AdmissionError, OSError) as error:
            problems.append(f"adapter {row.name!r}: {error}")
    if own and (passed or not is_known):
        with database.write() as session:
            pool = records.pool_row(session)
            if pool is not None and pool.spec is None and not problems:
                pool.spec = records.spec_json(spec)
            for number in passed:
                if (found := session.get(AdapterRow, number)) is not None:
                    found.checked_shapes = True
    return problems


def _adapter_problem(layout: Layout, row: AdapterRow, base_model: str, spec: BaseModelSpec | None) -> str | None:
    try:
        with files(layout, row.folder, fresh=True) as folder:
            admission = admit(folder, base_model, spec, allow_base_mismatch=row.base_mismatch, max_bytes=sys.maxsize)
    except PoolAwayError:
        raise
    except (AdmissionError, PoolError, OSError) as error:
        return str(error)
    if admission.digest != row.digest:
        return (
            f"the files in {place_of(layout, row.folder)} have the SHA-256 {admission.digest}; expected {row.digest}. "
            "They were changed: remove the adapter and add it again."
        )
    return None


def _is_still_there(database: Database, row: AdapterRow) -> bool:
    """False where the adapter was removed or revised while its files were read."""
    with database.read() as session:
        found = records.current_row(session, row.name)
        return found is not None and found.id == row.id
