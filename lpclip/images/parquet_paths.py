"""The paths and URIs in Parquet's column of images, read when the source is opened: what lies there may change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lpclip.files import open_input, split
from lpclip.images.columns import is_text, utf_8, without_views
from lpclip.images.fetch import under
from lpclip.images.listed_files import files_at_uris, local_files, note_on_links, only_paths
from lpclip.images.source import File, Listing

PATH_BYTES = 4096
"""Longer texts are images in base64: these need not be read to know that they change with the file."""


def files_behind(
    listing: Listing, column: str, *, chosen: np.ndarray | None, schemes: Sequence[str]
) -> tuple[list[File], tuple[str, ...]]:
    """The files behind a column of images, with a note on those of which nothing is known; none for images themselves.

    `chosen` holds the places of the rows to look at, counted over all files; by default all are.
    """
    found: list[File] = []
    notes: tuple[str, ...] = ()
    place = 0
    for file in listing.files:
        folder, _ = split(under(listing.root, file.path))
        rows = list(_paths(under(listing.root, file.path), column))
        kept = range(len(rows))
        if chosen is not None:
            low, high = np.searchsorted(chosen, [place, place + len(rows)])
            kept = (chosen[low:high] - place).tolist()
        place += len(rows)
        paths = only_paths(rows[row] for row in kept)
        found += [*local_files(paths, folder), *files_at_uris(paths, folder, schemes=schemes)]
        notes += note_on_links(paths, folder, schemes=schemes, name=file.path)
    return found, notes


def _paths(uri: str, column: str) -> Iterator[str | None]:
    """The path or URI of each row, None for an image itself."""
    with open_input(uri) as file:
        parquet = pq.ParquetFile(file, pre_buffer=False)
        dtype = parquet.schema_arrow.field(column).type
        is_struct = pa.types.is_struct(dtype)
        for number in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(number)
            if not _may_hold_paths(group, column, dtype):
                yield from [None] * group.num_rows
                continue
            leaf = f"{column}.path" if is_struct else column
            values = without_views(parquet.read_row_group(number, columns=[leaf]))[column]
            yield from utf_8(pc.struct_field(values, "path") if is_struct else values).to_pylist()


def _may_hold_paths(group: pq.RowGroupMetaData, column: str, dtype: pa.DataType) -> bool:
    """False where the metadata of a row group say that its column has images themselves."""
    chunks = {chunk.path_in_schema: chunk for chunk in map(group.column, range(group.num_columns))}
    if pa.types.is_struct(dtype):
        known = chunks[f"{column}.bytes"].statistics
        all_there = known is not None and known.has_null_count and known.null_count == 0
        return f"{column}.path" in chunks and not all_there
    text = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
    return is_text(text) and chunks[column].total_uncompressed_size <= PATH_BYTES * group.num_rows
