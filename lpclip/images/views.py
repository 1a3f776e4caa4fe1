"""Views: the ways in which an image is seen, and their names in flags, in columns of feature stores and in JSON."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from lpclip.config import UserError

CORRUPTIONS = (
    *(
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
    ),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    *("speckle_noise", "gaussian_blur", "spatter", "saturate"),
)
"""ImageNet-C's 15 corruptions, then its 4 extra ones (Hendrycks and Dietterich, 2019)."""

SEVERITIES = ("1", "2", "3", "4", "5")
"""Severities of a corruption, as flags and folders name them."""

STRONG_VERSION = 3
"""Version of `strong_view`: strong features of another version are never reused."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One way to see an image. `View.parse` reads its name and `str` writes it.

    Names are `weak`, `strong`, `strong2`, `strong3`, ..., and `fog:3` for a corruption at a severity. The mirror image
    of `weak` is `mirror`, that of `fog:3` is `fog:3+mirror`.
    """

    name: str = "weak"
    """weak, strong, or one of CORRUPTIONS."""
    level: int = 1
    """Number of the strong view, from 1 on, or severity of the corruption, from 1 to 5."""
    mirrored: bool = False
    """The pixels are flipped from left to right before they are encoded."""

    @classmethod
    def parse(cls, text: str) -> View:
        """The view of that name. Raises UserError when there is none."""
        if text in BASE_VIEWS:
            return cls(mirrored=text == "mirror")
        name = text.removesuffix("+mirror")
        mirrored = name != text
        if match := re.fullmatch(r"strong([2-9]|[1-9]\d+)?", name):
            return cls(name="strong", level=int(match[1] or 1), mirrored=mirrored)
        name, _, severity = name.partition(":")
        if name not in CORRUPTIONS:
            raise UserError(
                f"unknown view {text!r}; known are weak, mirror, strong, strong2, ..., or corruption:severity with one "
                f"of {', '.join(CORRUPTIONS)}"
            )
        if severity not in SEVERITIES:
            raise UserError(f"view {text!r} needs a severity from 1 to 5, as in {name}:3")
        return cls(name=name, level=int(severity), mirrored=mirrored)

    def __str__(self) -> str:
        if self.is_base:
            return "mirror" if self.mirrored else "weak"
        number = "" if self.level == 1 else str(self.level)
        name = f"strong{number}" if self.is_strong else f"{self.name}:{self.level}"
        return f"{name}+mirror" if self.mirrored else name

    @property
    def is_base(self) -> bool:
        """True for weak and its mirror image, whose mean is an image's feature. Students see the others as well."""
        return self.name == "weak"

    @property
    def is_strong(self) -> bool:
        """True for seeded augmentations, mirrored or not."""
        return self.name == "strong"

    @property
    def is_random(self) -> bool:
        """True when the view draws random numbers, so that its pixels depend on a seed."""
        return not self.is_base

    @property
    def pixels(self) -> View:
        """The view whose pixels are encoded for this one, flipped first if this one is mirrored."""
        return replace(self, mirrored=False)


WEAK = View()
BASE_VIEWS = ("weak", "mirror")
"""Names of the base views."""


def parse_views(spec: str) -> tuple[View, ...]:
    """Views from comma-separated names, `weak` first.

    Raises UserError for unknown or repeated views, or when `weak` is missing.
    """
    views = [View.parse(name.strip()) for name in spec.split(",")]
    repeated = sorted({str(view) for view in views if views.count(view) > 1})
    if repeated:
        raise UserError(f"view named twice: {', '.join(repeated)}")
    if WEAK not in views:
        raise UserError(f"the views must include weak, and {spec!r} does not")
    return (WEAK, *(view for view in views if view != WEAK))


def base_views(spec: str) -> tuple[View, ...]:
    """The base views among comma-separated names: all that a probe needs to classify."""
    return tuple(view for view in parse_views(spec) if view.is_base)


def pixel_views(views: tuple[View, ...]) -> tuple[View, ...]:
    """The views that need pixels of their own: mirror images are flipped by the encoder's actor."""
    return tuple(dict.fromkeys(view.pixels for view in views))
