"""NAME=PATH: how --probe, --shift, --ood, --corrupted and --retrieval name what they measure."""

from __future__ import annotations

from typing import NamedTuple

from lpclip.config import UserError


class NamedPath(NamedTuple):
    """A path, and the name that the user gave it."""

    name: str | None
    path: str


def parse_named(spec: str, *, flag: str, optional: bool, place: str = "PATH") -> NamedPath:
    """Parse NAME=PATH; where the name is `optional`, PATH alone as well, whose own = comes after a slash.

    `place` stands for PATH in the message. Raises UserError when the name or the path is missing.
    """
    name, separator, path = spec.partition("=")
    if optional and (not separator or "/" in name):
        return NamedPath(None, spec)
    if not (name and path):
        raise UserError(f"--{flag} {spec}: give it as NAME={place}")
    return NamedPath(name, path)
