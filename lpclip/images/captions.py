"""Texts for images that have labels alone: sentences that name the class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from lpclip.config import PairsConfig, SourceConfig
from lpclip.errors import UserError
from lpclip.images.source import Reader, Row, Source


@dataclass(frozen=True, kw_only=True)
class CaptionReader(Reader):
    """Reads like another; an image's texts are those of its label, none without a label."""

    reader: Reader
    captions: tuple[tuple[str, ...], ...]

    def rows(self, unit: str) -> Iterator[Row]:
        """The unit's images with their texts."""
        for row in self.reader.rows(unit):
            yield row._replace(texts=() if row.label is None else self.captions[row.label])


def images_config(config: PairsConfig) -> SourceConfig:
    """How the images alone are read."""
    return SourceConfig(**{item.name: getattr(config, item.name) for item in fields(SourceConfig)})


def with_captions(source: Source, *, templates: tuple[str, ...], config: PairsConfig) -> Source:
    """A labelled source as one of pairs: each image has a text a template, `{}` being the name of its class.

    Raises UserError when the source's labels have no names.
    """
    if not source.label_names:
        raise UserError(
            f"{source.name} has no names of classes to make texts of: --caption-templates is for labelled images"
        )
    captions = tuple(tuple(t.format(name) for t in templates) for name in source.label_names)
    return replace(
        source,
        reader=CaptionReader(reader=source.reader, captions=captions),
        config=config,
        identity={**source.identity, "captions": [list(texts) for texts in captions]},
    )
