"""Workers' runs of the row order, out of parts that one worker each has read.

The row order mixes the images, so every part has rows of every run. If each worker read its run alone, each would
read the whole store. Instead each reads its share of the parts, and the rows change hands once, between the workers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from lpclip.features.store import Features, permuted, row_keys


def exchange(read: Callable[[], Features], *, chunk: int) -> Features:
    """This worker's run of whole chunks of the row order, out of what all workers have read, ids included.

    `read` gives the rows of this worker's parts, in their row order. All workers of the process group call this at the
    same time. Labels are not exchanged: they are -1. Views travel one after the other, and each is let go when it has
    left: memory is that of the rows and of one view more.
    """
    mine = read()
    ids, origin, views = mine.ids, mine.origin, {"": mine.base, **mine.strong}
    del mine
    rank, size = dist.get_rank(), dist.get_world_size()
    places = _places(row_keys(ids))
    num_rows = sum(map(len, places))
    num_chunks = -(-num_rows // chunk)
    ends = [min(num_rows, chunk * (num_chunks * worker // size)) for worker in range(size + 1)]
    # Rows come in the order of their places, so what goes to one worker is a run of them.
    send = np.diff(np.searchsorted(places[rank], ends))
    pieces = [found[slice(*np.searchsorted(found, ends[rank : rank + 2]))] for found in places]
    receive = np.array([len(piece) for piece in pieces])
    order = np.argsort(np.concatenate(pieces))
    found = {}
    for view in list(views):
        found[view] = permuted(_swap(views.pop(view), send=send, receive=receive), order)
    return Features(
        ids=_swap_texts(ids, send=send, receive=receive)[order],
        labels=np.full(len(order), -1, np.int32),
        base=found.pop(""),
        strong=found,
        first_row=ends[rank],
        num_rows=num_rows,
        origin=origin,
    )


def _places(keys: np.ndarray) -> list[np.ndarray]:
    """The places of each worker's rows among all rows in the order of their keys, for every worker."""
    found: list[np.ndarray] = [keys] * dist.get_world_size()
    dist.all_gather_object(found, keys)
    places = np.argsort(np.argsort(np.concatenate(found), kind="stable"))
    return np.split(places, np.cumsum([len(part) for part in found])[:-1])


def _swap(rows: np.ndarray, *, send: np.ndarray, receive: np.ndarray) -> np.ndarray:
    """Send runs of rows, `send[w]` of them to worker w, and return those that come, `receive[w]` from worker w."""
    width = rows.dtype.itemsize * int(np.prod(rows.shape[1:]))
    given = torch.from_numpy(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).reshape(len(rows), width))
    found = torch.empty(int(receive.sum()), width, dtype=torch.uint8)
    dist.all_to_all_single(found, given, receive.tolist(), send.tolist())
    return found.numpy().reshape(-1).view(rows.dtype).reshape(-1, *rows.shape[1:])


def _swap_texts(texts: np.ndarray, *, send: np.ndarray, receive: np.ndarray) -> np.ndarray:
    """As `_swap`, for texts (n,) object, each a str."""
    encoded = [text.encode() for text in texts.tolist()]
    lengths = np.array([len(text) for text in encoded], np.int64)
    found = _swap(lengths, send=send, receive=receive)
    data = _swap(
        np.frombuffer(bytearray(b"".join(encoded)), np.uint8),
        send=_sums(lengths, send),
        receive=_sums(found, receive),
    ).tobytes()
    stops = np.cumsum(found).tolist()
    out = np.empty(len(found), object)
    out[:] = (
        [data[start:stop].decode() for start, stop in zip([0, *stops[:-1]], stops, strict=True)]
        if stops
        else []
    )
    return out


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums of the values (n,) over runs of so many of them."""
    ends = np.cumsum(counts)
    total = np.concatenate([[0], np.cumsum(values)])
    return total[ends] - total[ends - counts]
