"""The site of docs/: Sphinx reads the Markdown pages as they are. `make docs` builds it."""

import tomllib
from pathlib import Path

project = "lpclip"
with Path(__file__).parents[1].joinpath("pyproject.toml").open("rb") as file:
    release = tomllib.load(file)["project"]["version"]

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3  # links to headings work as they do on GitHub

html_theme = "furo"
html_title = f"lpclip {release}"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
