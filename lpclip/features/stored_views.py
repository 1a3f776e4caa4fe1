"""Views of one set of images, which may lie in several stores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lpclip.config import UserError
from lpclip.encoders.passes import mean_view
from lpclip.features.store import Store
from lpclip.images.views import View


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A complete feature store, and whether this run encoded it."""

    store: Store
    seconds: float
    reused: bool
    rate: float | None
    """Images a second, None when nothing was encoded."""


class Views:
    """Views of one set of images, spread over complete stores; a view is read when it is asked for.

    `ids` (N,) object, each a str, and `labels` (N,) int32, -1 for none, are in row order. `stores` are the stores that
    hold the views.
    Raises UserError when the stores do not hold the same images.
    """

    def __init__(self, encoded: dict[View, Encoded]) -> None:
        self.stores = list({item.store.path: item for item in encoded.values()}.values())
        self._stores = {view: item.store for view, item in encoded.items()}
        first, *others = (item.store for item in self.stores)
        self.ids, self.labels = first.ids_and_labels()
        for other in others:
            if not np.array_equal(other.ids(), self.ids):
                raise UserError(
                    f"{first.path} and {other.path} do not hold the same images; remove one of them, it is "
                    "encoded again"
                )

    @property
    def latest(self) -> Encoded:
        """The store that was encoded now, or the first of those that were found."""
        return next((item for item in self.stores if not item.reused), self.stores[0])

    def mean(self, *views: View) -> np.ndarray:
        """Unit-norm mean of some views, (N, d) float16."""
        stores = {self._stores[view] for view in views}
        if len(stores) == 1:
            return stores.pop().mean(*map(str, views))
        return mean_view([self._stores[view].mean(str(view)) for view in views])
