"""A table of features to parts of a store, with zero-shot pseudo-labels of the images that are encoded now."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lpclip import files, store
from lpclip.zero_shot import Head, pseudo_label


def commit(
    table: pa.Table, *, path: str, views: tuple[str, ...], head: Head | None, scores_path: str
) -> pa.Table:
    """Write the parts of a table, one a unit; returns counts."""
    counts = []
    for unit in table["unit"].unique().to_pylist():
        rows = table.filter(pc.equal(table["unit"], unit))
        place = rows["row"].to_numpy()
        assert (np.diff(place) == 1).all(), "a block holds a run of its unit's rows"
        part = store.Part(
            unit=unit, start=int(place[0]), stop=int(place[-1]) + 1, last=rows["last"][-1].as_py()
        )
        bad = rows.filter(rows["error"].is_valid())
        good = rows.filter(rows["error"].is_null()).select(["id", "label", *views])
        total = sum(int.from_bytes(value.as_py(), "big") for value in rows["digest"])
        if head is not None:
            labels = pseudo_label(good, head=head, dim=head.weight.shape[1])
            files.write_parquet(files.join(scores_path, part.name), labels)
        store.write_part(
            path,
            part,
            rows=good,
            quarantine=bad.select(["id", "stage", "error"]).to_pylist(),
            content_digest=total % store.DIGEST_MODULUS,
        )
        seconds = float(np.sum(rows["seconds"].to_numpy()))
        counts.append({"unit": unit, "images": len(rows), "bad": len(bad), "encode_seconds": seconds})
    return pa.Table.from_pylist(counts)
