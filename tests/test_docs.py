"""The pages: links lead somewhere, commands are ones that this version takes, and layouts are read as they say."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tyro
import yaml
from conftest import draw, write_tar

from lpclip import config
from lpclip.config import counted
from lpclip.features.data import Data, open_data
from lpclip.images.classes import ClassList
from lpclip.jobs.cli import OPTIONS
from lpclip.jobs.inputs import class_indices, open_inputs, open_pairs

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
COMMANDS = (
    "encode",
    "selftrain",
    "evaluate",
    "tune",
    "predict",
    "pretrain",
    "export",
    "serve",
    "ui",
    "review",
    "suggest",
)
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


LAYOUTS = [
    block.splitlines()
    for language, block in FENCE.findall((ROOT / "docs/data.md").read_text())
    if language == "text" and "\nlpclip " in block
]


def _cell(text: str) -> Any:
    """A value of a Parquet column."""
    if text in ("bytes", "struct"):
        return draw(0, 0) if text == "bytes" else {"bytes": draw(0, 0), "path": None}
    return int(text) if text.isdecimal() else text


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tar":
        members = [word.partition("=") for word in text.split()]
        images = {
            name: value.replace("_", " ").encode() if equal else draw(0, 0) for name, equal, value in members
        }
        write_tar(path, images)
    elif path.suffix == ".parquet":
        rows = [dict(word.split("=") for word in row.split()) for row in text.split(" | ")]
        columns = {name: [_cell(row[name]) for row in rows] for name in rows[0]}
        pq.write_table(pa.table(columns), path)
    elif text:
        path.write_text(text.replace(" | ", "\n").replace("\\t", "\t") + "\n")
    else:
        path.write_bytes(draw(0, 0))


def _read(data: Data, classes: ClassList | None) -> str:
    """What is read, in words: every image is there, and no row has an error."""
    assert data.source is not None
    rows = [row for unit in data.source.units for row in data.source.reader.rows(unit)]
    assert [row.error for row in rows if row.image is None] == []
    count = counted(len(rows), "image")
    if data.source.has_texts:
        assert all(row.texts for row in rows)
        return f"{count}, with texts"
    raw = np.array([-1 if row.label is None else row.label for row in rows], np.int32)
    found = class_indices(raw, data=data, classes=classes) if classes else raw
    names = [classes.names[place] for place in sorted({*found.tolist()} - {-1})] if classes else []
    return f"{count}, labels {', '.join(names)}" if names else f"{count}, no labels"


@pytest.mark.parametrize("lines", LAYOUTS, ids=lambda lines: lines[-2])
def test_layouts_are_read_as_the_page_says(
    lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *files, command, expected = lines
    for name, _, text in (line.partition("  ") for line in files):
        _write(tmp_path / name, text)
    monkeypatch.chdir(tmp_path)
    _, kind, *args = shlex.split(command)
    job = tyro.cli(getattr(config, f"{kind.capitalize()}Job"), args=args, config=OPTIONS)
    if isinstance(job, config.SelftrainJob):
        inputs = open_inputs(job)
        found = _read(inputs.data, inputs.classes)
        if inputs.test is not None:
            found += f"; evaluated on {_read(inputs.test, inputs.classes)}"
    elif isinstance(job, config.PretrainJob):
        pairs = open_pairs(
            job.data,
            config=job.source,
            caption_templates=job.caption_templates,
            split="train",
            limit=job.limit,
        )
        found = _read(Data(pairs), None)
    else:
        found = _read(open_data(job.data, config=job.source, split="test"), None)
    assert found == expected


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
