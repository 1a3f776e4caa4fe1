"""The page of `lpclip review`: its style and program are in it, and it asks its server for everything else."""

from __future__ import annotations

from importlib import resources

from jinja2 import Environment, StrictUndefined


def review_page(*, token: str, nonce: str) -> str:
    """The page, whose program sends `token` with each request; `nonce` marks its program and style as its own."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    source = resources.files(__package__).joinpath("review.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(token=token, nonce=nonce)
