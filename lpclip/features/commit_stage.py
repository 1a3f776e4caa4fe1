"""A table of images' features, or of their pixels and texts, to parts of a store."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lpclip.features.store_writer import DIGEST_MODULUS, Part, StoreWriter


def commit(
    table: pa.Table,
    *,
    writer: StoreWriter,
    columns: tuple[str, ...],
    beside: Callable[[Part, pa.Table], object] | None = None,
) -> pa.Table:
    """Write the parts of a table, one a unit, with those of these columns that there are.

    Returns counts, and the parts' `Facts` as JSON.

    `beside` writes other files that belong to a part's rows. It comes before the part, whose existence says that these
    files are there.
    """
    counts = []
    for unit in table["unit"].unique().to_pylist():
        rows = table.filter(pc.equal(table["unit"], unit))
        place = rows["row"].to_numpy()
        assert (np.diff(place) == 1).all(), "a block holds a run of its unit's rows"
        part = Part(unit=unit, start=int(place[0]), stop=int(place[-1]) + 1, last=rows["last"][-1].as_py())
        bad = rows.filter(rows["error"].is_valid())
        good = rows.filter(rows["error"].is_null())
        total = sum(int.from_bytes(value.as_py(), "big") for value in rows["digest"])
        if beside is not None:
            beside(part, good)
        facts = writer.write_part(
            part,
            rows=good.select([name for name in columns if name in good.column_names]),
            quarantine=bad.select(["id", "stage", "error"]).to_pylist(),
            content_digest=total % DIGEST_MODULUS,
        )
        told = {"part": part.name, "facts": json.dumps(vars(facts))}
        counts.append({"unit": unit, "images": len(rows), "bad": len(bad), **told})
    return pa.Table.from_pylist(counts)
