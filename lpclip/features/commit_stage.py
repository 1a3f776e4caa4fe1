"""A table of images' features, or of their pixels and texts, to parts of a store."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lpclip.features import store


def commit(
    table: pa.Table,
    *,
    path: str,
    columns: tuple[str, ...],
    beside: Callable[[store.Part, pa.Table], object] | None = None,
) -> pa.Table:
    """Write the parts of a table, one a unit, with these columns as far as there are; returns counts.

    `beside` writes what goes with a part's rows into other files, before the part, which says that they are there.
    """
    counts = []
    for unit in table["unit"].unique().to_pylist():
        rows = table.filter(pc.equal(table["unit"], unit))
        place = rows["row"].to_numpy()
        assert (np.diff(place) == 1).all(), "a block holds a run of its unit's rows"
        part = store.Part(
            unit=unit, start=int(place[0]), stop=int(place[-1]) + 1, last=rows["last"][-1].as_py()
        )
        bad = rows.filter(rows["error"].is_valid())
        good = rows.filter(rows["error"].is_null())
        total = sum(int.from_bytes(value.as_py(), "big") for value in rows["digest"])
        if beside is not None:
            beside(part, good)
        store.write_part(
            path,
            part,
            rows=good.select([name for name in columns if name in good.column_names]),
            quarantine=bad.select(["id", "stage", "error"]).to_pylist(),
            content_digest=total % store.DIGEST_MODULUS,
        )
        counts.append({"unit": unit, "images": len(rows), "bad": len(bad)})
    return pa.Table.from_pylist(counts)
