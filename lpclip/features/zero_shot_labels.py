"""Zero-shot pseudo-labels of images that are encoded now, written beside their features. No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lpclip import files
from lpclip.encoders.head import Head
from lpclip.encoders.passes import mean_view
from lpclip.features.store import matrix
from lpclip.features.store_writer import Part
from lpclip.images.views import BASE_VIEWS


def pseudo_label(table: pa.Table, *, head: Head, dim: int) -> pa.Table:
    """Zero-shot pseudo-labels of rows with base-view columns: id, label, confidence."""
    base = [v for v in BASE_VIEWS if v in table.column_names]
    features = mean_view([matrix(table, view, dim) for view in base]).astype(np.float32)
    logits = features @ head.weight.T / head.temperature
    p = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    p /= p.sum(axis=1, keepdims=True)
    confidence = p.max(axis=1, initial=0).astype(np.float32)
    return pa.table({"id": table["id"], "label": p.argmax(axis=1).astype(np.int32), "confidence": confidence})


@dataclass(frozen=True, kw_only=True)
class ZeroShotLabels:
    """Zero-shot pseudo-labels to be written to `folder`, one file for each part of the features."""

    head: Head
    folder: str

    def write(self, part: Part, rows: pa.Table) -> None:
        """Label the rows of a part."""
        labels = pseudo_label(rows, head=self.head, dim=self.head.weight.shape[1])
        files.write_parquet(files.join(self.folder, part.name), labels)
