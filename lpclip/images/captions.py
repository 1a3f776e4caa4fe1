"""Texts for images that have labels alone: sentences that name the class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lpclip.config import UserError
from lpclip.images.classes import notes_on_names
from lpclip.images.source import Reader, Row, Source


@dataclass(frozen=True, kw_only=True)
class CaptionReader(Reader):
    """Gives the images of another reader the texts of their labels; an image without a label has none."""

    has_texts: bool = True
    reader: Reader
    captions: tuple[tuple[str, ...], ...]

    def rows(self, unit: str) -> Iterator[Row]:
        """The unit's images with their texts."""
        for row in self.reader.rows(unit):
            yield row._replace(texts=() if row.label is None else self.captions[row.label])

    def listed(self, unit: str) -> list[tuple[str, int | None]]:
        """Id and label of each image, as far as the other reader knows them."""
        return self.reader.listed(unit)


def with_captions(source: Source, *, templates: tuple[str, ...]) -> Source:
    """A labelled source with texts: one for each template, with the name of the image's class in place of `{}`.

    Raises UserError when the source's labels have no names.
    """
    if not source.label_names:
        raise UserError(
            f"{source.name} has no names of classes to make texts of: --caption-templates is for labelled images"
        )
    captions = tuple(tuple(t.replace("{}", name) for t in templates) for name in source.label_names)
    return replace(
        source,
        reader=CaptionReader(reader=source.reader, captions=captions),
        identity={**source.identity, "captions": [list(texts) for texts in captions]},
        notes=(*source.notes, *notes_on_names(source.label_names)),
    )
