"""The pages: their links lead somewhere, and their commands are ones that this version takes."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import tyro
import yaml

from lpclip import config
from lpclip.jobs.cli import OPTIONS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
COMMANDS = ("encode", "selftrain", "evaluate", "tune", "predict", "pretrain", "ui")
# Their entries name files as they were.
HISTORY = ("CHANGELOG", "log")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them in links."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _commands(page: Path) -> list[list[str]]:
    """The command lines of lpclip in a page's shell blocks, each as a command's name and its flags."""
    found = []
    for language, block in FENCE.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines() if language == "sh" else []:
            words = shlex.split(line, comments=True)
            for place, word in enumerate(words):
                if word.endswith("bin/lpclip") or word == "lpclip":
                    found.append(words[place + 1 :])
                elif job := re.fullmatch(r"(?:.*/)?jobs/(\w+)\.py", word):
                    found.append([job[1], *words[place + 1 :]])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        place = page.parent / name if name else page
        assert place.exists(), target
        assert not anchor or anchor in _anchors(place), target


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem not in HISTORY], ids=lambda page: page.name
)
def test_files_that_are_named_are_there(page: Path) -> None:
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", page.read_text()):
        assert (ROOT / name).is_file() or (ROOT / "lpclip" / name).is_file(), name


@pytest.mark.parametrize("page", [page for page in PAGES if _commands(page)], ids=lambda page: page.name)
def test_commands_have_flags_that_the_jobs_know(page: Path) -> None:
    for name, *args in _commands(page):
        assert name in COMMANDS, name
        tyro.cli(getattr(config, f"{name.capitalize()}Job"), args=args, config=OPTIONS)


def test_the_readme_shows_the_way_in_on_one_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert [name for name, *_ in _commands(ROOT / "README.md")] == ["selftrain", "predict", "evaluate"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    used = re.findall(r"make ([a-z-]+)", " ".join(re.findall(r"`[^`]+`|```sh.*?```", text, re.DOTALL)))
    assert {"demo", "test"} <= set(used) <= set(targets)


def test_every_page_has_its_place_in_the_site() -> None:
    listed = re.findall(r"^[a-z]+$", (ROOT / "docs/index.md").read_text(), re.MULTILINE)
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} == {"index", *listed}


def test_the_citation_and_the_workflows_are_of_this_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step.get("run") for step in workflow["jobs"]["check"]["steps"]]
    assert [run for run in steps if run and run.startswith("make")] == ["make lint", "make test-all"]
    assert workflow["permissions"] == {"contents": "read"}
