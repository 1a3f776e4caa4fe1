"""The probes of an evaluation: read, named, and refused where they cannot be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from lpclip import files
from lpclip.config import UserError
from lpclip.encoders.again import refuse_unknown
from lpclip.encoders.hub import local_probe
from lpclip.evaluation.results import ZERO_SHOT
from lpclip.images.views import base_views
from lpclip.jobs.evaluate_names import parse_named
from lpclip.method.probe import Probe, load_probe


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Probes that share encoder, classes, views and templates."""

    by_name: Mapping[str, Probe]
    digests: Mapping[str, str]
    """SHA-256 of each probe's files, by name."""

    @property
    def reference(self) -> Probe | None:
        """Any probe, for what all of them share; None without probes."""
        return next(iter(self.by_name.values()), None)


def load_probes(specs: tuple[str, ...]) -> Probes:
    """Read the probes that --probe names. Raises UserError when two have one name or do not fit each other."""
    paths = {name: local_probe(path) for name, path in _name_paths(specs).items()}
    probes = {name: load_probe(path) for name, path in paths.items()}
    for probe in probes.values():
        refuse_unknown(probe.encoder)
    if probes:
        (first, reference), *others = probes.items()
        for name, probe in others:
            _check_fit(first, reference, name, probe)
    digests = {
        name: hashlib.sha256(
            files.read_bytes(files.join(path, "probe.safetensors"))
            + files.read_bytes(files.join(path, "probe.json"))
        ).hexdigest()
        for name, path in paths.items()
    }
    return Probes(by_name=probes, digests=digests)


def _name_paths(specs: tuple[str, ...]) -> dict[str, str]:
    """Folders by name: the one given, else the folder's own, with its parent's where two would be called the same."""
    paths: dict[str, str] = {}
    for spec in specs:
        name, path = parse_named(spec, flag="probe", optional=True, place="FOLDER")
        if name is None:
            parts = _parts(path)
            name = parts[-1]
            if name in paths or sum(_parts(other)[-1] == name for other in specs) > 1:
                name = "/".join(parts[-2:])
        if name in paths or name == ZERO_SHOT:
            raise UserError(
                f"two classifiers are called {name}: name one of them, as in --probe other={path}"
            )
        paths[name] = path
    return paths


def _parts(path: str) -> list[str]:
    return files.split_options(path)[0].rstrip("/").split("/")


def _check_fit(first: str, reference: Probe, name: str, probe: Probe) -> None:
    if probe.encoder["identity"] != reference.encoder["identity"]:
        raise UserError(f"the probes {first} and {name} are of different encoders: evaluate them one by one")
    if probe.class_names != reference.class_names:
        raise UserError(f"the probes {first} and {name} have different classes: evaluate them one by one")
    for key in ("views", "templates"):
        mine, theirs = (
            tuple(map(str, base_views(p.encoder[key]))) if key == "views" else p.encoder[key]
            for p in (reference, probe)
        )
        if mine != theirs:
            raise UserError(
                f"the probes {first} and {name} have different {key} ({mine} and {theirs}): "
                "evaluate them one by one"
            )
