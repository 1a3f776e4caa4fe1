"""Labelled images as a folder with one folder for each class, as torchvision's ImageFolder and other tools read it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lpclip import files
from lpclip.config import UserError, counted, digest
from lpclip.features.data import Data
from lpclip.images.source import IMAGE_SUFFIXES, Source
from lpclip.jobs.console import shown

MARK = ".lpclip-export.json"
"""Says whose export a folder holds."""
# File systems take 255 bytes; a suffix and the name of an unfinished file need some of them.
MAX_NAME_BYTES = 160
HALF_FILE = re.compile(r".*\.[0-9a-f]{32}\.tmp")
SUFFIXES = {
    rb"\xff\xd8\xff": ".jpg",
    rb"\x89PNG": ".png",
    rb"GIF8": ".gif",
    rb"RIFF....WEBP": ".webp",
    rb"BM": ".bmp",
    rb"II\*\0|MM\0\*": ".tif",
}
"""The suffix of a file's name, by how the file begins."""


@dataclass(frozen=True)
class LabelledFolder:
    """A folder that the images of a source get a place in, by their label."""

    path: Path
    source: Source

    @classmethod
    def begin(cls, path: str, *, data: Data, named: Sequence[str], identity: object) -> LabelledFolder:
        """The folder at `path`, made and marked with the identity of the labels of `data`.

        Raises UserError when it holds anything but an earlier export of the same, is remote, or lies in a folder that
        was `named` as data, and when the data is a feature store.
        """
        source = data.source
        if source is None:
            raise UserError(
                f"--export-folder needs images, and {data.name} is a feature store: name its images"
            )
        if "://" in path:
            raise UserError(f"--export-folder {path}: it must be a folder of this machine")
        folder = Path(files.absolute(path))
        if any(folder.resolve().is_relative_to(Path(value).expanduser().resolve()) for value in named):
            raise UserError(
                f"--export-folder {path} lies in the folder of the images, of which it would become a part: name one "
                "outside"
            )
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            mark = folder / MARK
            if not mark.is_file() or files.read_json(str(mark)) != {"labels": digest(identity)}:
                raise UserError(
                    f"--export-folder {path} holds something else than an export of these labels: name an empty folder"
                )
        files.make_folder(str(folder))
        files.write_json(str(folder / MARK), {"labels": digest(identity)})
        for half in folder.glob("*/*.tmp"):
            if HALF_FILE.fullmatch(half.name):
                half.unlink()
        return cls(folder, source)

    def fill(self, labels: str, *, class_names: Sequence[str], min_probability: float) -> tuple[int, str]:
        """Give each image of the Parquet file of labels its place. What an interrupted export did is not done again.

        Returns the number of images that have a place, and a sentence that says what became of all.
        Raises UserError when the source no longer has an image that was labelled.
        """
        places = dict(zip(class_names, folder_names(class_names), strict=True))
        linked = copied = unlikely = lost = 0
        with files.open_parquet(labels, remedy="run the command again") as table:
            rows = (
                row
                for batch in table.iter_batches(columns=["id", "label", "probability"])
                for row in zip(*(column.to_pylist() for column in batch.columns), strict=True)
            )
            wanted, label, probability = next(rows, (None, "", 0.0))
            # The labels are in the order of the source; the images between them were quarantined.
            for name, target, image in self._images():
                if name != wanted:
                    continue
                if probability < min_probability:
                    unlikely += 1
                elif target is not None:
                    self._link(places[label], name, target)
                    linked += 1
                elif image is not None:
                    self._copy(places[label], name, image)
                    copied += 1
                else:
                    lost += 1
                wanted, label, probability = next(rows, (None, "", 0.0))
        if wanted is not None:
            raise UserError(f"the images changed while they were labelled: {wanted} is not where it was")
        told = [counted(unlikely, "image") + f" less probable than {min_probability:g}"] * bool(unlikely)
        told += [f"{counted(lost, 'image')} that could not be read again"] * bool(lost)
        left_out = f"; left out: {', '.join(told)}" if told else ""
        return linked + copied, (
            f"{counted(linked + copied, 'image')} in {shown(str(self.path))}/CLASS: {linked:,} linked, "
            f"{copied:,} copied{left_out}"
        )

    def _images(self) -> Iterator[tuple[str, str | None, bytes | None]]:
        """Id, path on this machine and else bytes of each image, in the order of the source."""
        reader = self.source.reader
        for unit in self.source.units:
            paths = reader.paths(unit)
            if paths and None not in paths:
                yield from (
                    (name, path, None) for (name, _), path in zip(reader.listed(unit), paths, strict=True)
                )
                continue
            for place, row in enumerate(reader.rows(unit)):
                yield row.id, paths[place] if paths else None, row.image

    def _link(self, label: str, name: str, target: str) -> None:
        with open(target, "rb") as file:
            start = file.read(16) if not _has_suffix(name) else b""
        for path in self._paths(label, name, start):
            if not os.path.lexists(path):
                path.symlink_to(target)
                return
            if path.is_symlink() and os.readlink(path) == target:
                return

    def _copy(self, label: str, name: str, image: bytes) -> None:
        for path in self._paths(label, name, image[:16]):
            if not os.path.lexists(path):
                files.write_bytes(str(path), image)
                return
            if not path.is_symlink() and path.read_bytes() == image:
                return

    def _paths(self, label: str, name: str, start: bytes) -> Iterator[Path]:
        """Where an image may be: the second place is for a name that differs from another one in capitals alone."""
        folder = self.path / label
        folder.mkdir(exist_ok=True)
        for always in (False, True):
            path = folder / file_name(name, start=start, numbered=always)
            yield path
        raise UserError(f"{path} is there and is another image: name an empty folder in --export-folder")


def folder_names(class_names: Sequence[str]) -> list[str]:
    """A name for the folder of each class; all differ, also where capitals do not count."""
    found: list[str] = []
    used: set[str] = set()
    for class_name in class_names:
        name = stem = _cleaned(class_name) or "class"
        number = 1
        while name.casefold() in used:
            number += 1
            name = f"{stem}-{number}"
        used.add(name.casefold())
        found.append(name)
    return found


def file_name(name: str, *, start: bytes, numbered: bool = False) -> str:
    """The name of the file of an image with this id, whose bytes begin with `start`.

    Folders in the id become a part of the name. An id that does not come out whole, or is `numbered`, has a digest: so
    two ids have the same name only where one of them lacks the suffix that the other one has.
    """
    flat = name.replace("/", "__").replace(":", "#")
    cleaned = _cleaned(flat)
    stem, suffix = os.path.splitext(cleaned) if _has_suffix(cleaned) else (cleaned, "")
    if numbered or cleaned != flat or not cleaned or "__" in name or "#" in name:
        stem = (
            (stem or "image")
            + "-"
            + hashlib.blake2b(name.encode(errors="replace"), digest_size=6).hexdigest()
        )
    if not suffix:
        found = (end for magic, end in SUFFIXES.items() if re.match(magic, start, re.DOTALL))
        suffix = next(found, "")
    return stem + suffix


def _has_suffix(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _cleaned(text: str) -> str:
    """A text without what a file system might not take in a name, or take for more than a name."""
    safe = "".join(letter if letter.isprintable() and letter not in '<>:"/\\|?*' else "_" for letter in text)
    stem, suffix = os.path.splitext(safe) if _has_suffix(safe) else (safe, "")
    short = stem.encode()[:MAX_NAME_BYTES].decode(errors="ignore").strip(" .")
    return short + suffix if short else ""
