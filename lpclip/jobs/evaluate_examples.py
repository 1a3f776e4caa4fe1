"""The page's examples: thumbnails of clean images that either zero-shot or the first probe gets right."""

from __future__ import annotations

import io

import numpy as np

from lpclip.evaluation.results import ZERO_SHOT
from lpclip.features.data import Data
from lpclip.images.pixels import decode_image
from lpclip.jobs.evaluate_measure import Clean
from lpclip.report.page import Example

EXAMPLES = 12
# Examples are looked for among this many images: more would be read for pictures alone.
EXAMPLE_ROWS = 2048
THUMBNAIL = 112


def find_examples(data: Data, clean: Clean, classes: tuple[str, ...]) -> list[tuple[str, list[Example]]]:
    """Captions and images on which zero-shot and the first probe disagree."""
    rival = next(name for name in clean.judgements if name != ZERO_SHOT)
    before, after = clean.judgements[ZERO_SHOT], clean.judgements[rival]
    groups: dict[str, np.ndarray] = {
        f"zero-shot wrong, {rival} right": ~before.correct & after.correct,
        f"zero-shot right, {rival} wrong": before.correct & ~after.correct,
    }
    images = _thumbnails(data, {title: clean.ids[rows].tolist() for title, rows in groups.items()})
    places = {name: place for place, name in enumerate(clean.ids.tolist())}

    def example(name: str, image: bytes) -> Example:
        place = places[name]
        answers = {
            who: (classes[found.predicted[place]], float(found.confidence[place]))
            for who, found in ((ZERO_SHOT, before), (rival, after))
        }
        truth = classes[clean.images.labels[place]]
        return Example(image=image, predictions=answers, truth=truth, name=name)

    return [
        (
            f"{title} ({len(items)} of {int(groups[title].sum()):,})",
            [example(name, image) for name, image in items.items()],
        )
        for title, items in images.items()
    ]


def _thumbnails(data: Data, wanted: dict[str, list[str]]) -> dict[str, dict[str, bytes]]:
    """Small JPEGs of up to EXAMPLES wanted ids each, in their order, from the images that come first in the source."""
    found: dict[str, dict[str, bytes]] = {title: {} for title in wanted}
    if data.source is None:
        return found
    rank = {title: {name: place for place, name in enumerate(ids)} for title, ids in wanted.items()}
    seen = 0
    for unit in data.source.units:
        for row in data.source.reader.rows(unit):
            seen += 1
            for title, ranks in rank.items():
                if row.id in ranks and row.image is not None:
                    found[title][row.id] = row.image
                    if len(found[title]) > EXAMPLES:
                        del found[title][max(found[title], key=ranks.__getitem__)]
        if seen >= EXAMPLE_ROWS:
            break
    small: dict[str, dict[str, bytes]] = {}
    for title, images in found.items():
        small[title] = {}
        for name in sorted(images, key=rank[title].__getitem__):
            image = decode_image(
                images[name], max_pixels=data.source.config.max_pixels, max_bytes=data.source.config.max_bytes
            )
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=80)
            small[title][name] = buffer.getvalue()
    return small
