"""What is known of the images behind the paths and URIs of a list before they are read: their sizes and times."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence

import pyarrow as pa

from lpclip import files
from lpclip.config import StoreAwayError, counted
from lpclip.images.fetch import embedded, refuse_scheme, scheme, under
from lpclip.images.source import File

HTTP = ("http://", "https://")


def local_files(paths: Iterable[str], root: str) -> list[File]:
    """Sizes and times of the files on this machine, so that a change to one of them is seen."""
    local = [path for path in paths if "://" not in under(root, path)]
    return [_local_file(path, under(root, path)) for path in local]


def _local_file(path: str, place: str) -> File:
    """A file without size and time where there is none, or its name cannot be one."""
    try:
        status = os.stat(place)
    except (OSError, ValueError):
        return File(path, None, None)
    return File(path, status.st_size if stat.S_ISREG(status.st_mode) else None, status.st_mtime_ns)


def files_at_uris(paths: Iterable[str], root: str, *, schemes: Sequence[str]) -> list[File]:
    """The same of the files at URIs of these schemes, each once, in the order of their names.

    A store is asked for each. Servers of http(s) are not: they limit requests, refuse to answer for signed links, and
    the servers behind one address may give different answers.
    Raises StoreAwayError when a store does not answer.
    """
    places = {place: path for path in paths if "://" in (place := under(root, path))}
    asked = sorted(place for place in places if not place.lower().startswith(HTTP))

    def look(place: str) -> File:
        try:
            refuse_scheme(place, schemes)
            return File(places[place], *files.size_and_time(place))
        except StoreAwayError:
            raise
        except (OSError, ValueError, pa.ArrowException):
            return File(places[place], None, None)

    return list(files.ahead(look, asked, threads=files.READERS))


def note_on_links(paths: Iterable[str], root: str, *, schemes: Sequence[str], name: str) -> tuple[str, ...]:
    """A note on images of which only reading them would tell that they have changed."""
    links = (place for path in paths if (place := under(root, path)).lower().startswith(HTTP))
    count = sum(scheme(link) in schemes for link in links)
    if not count:
        return ()
    return (
        f"{name}: {counted(count, 'image')} behind http(s) links {'is' if count == 1 else 'are'} taken as unchanged "
        "where a feature store of this list is there: remove the store to read them again",
    )


def only_paths(cells: Iterable[str | None]) -> list[str]:
    """The cells that name a file, and do not hold the image itself."""
    return [text for text in cells if text and embedded(text) is None]
