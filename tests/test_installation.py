"""The locks hold what they should, and `make` installs from them, with PyTorch's CPU build where it finds one."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lpclip.encoders.lite import REINSTALL

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CUDA = re.compile(r"cuda-|nvidia-|triton$")


def read_lock(name: str) -> dict[str, list[str]]:
    """The hashes of each pin."""
    hashes: dict[str, list[str]] = {}
    pin = ""
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith(" "):
            hashes[pin].append(line.strip(" \\"))
        elif not line.startswith("#"):
            pin = line.removesuffix(" \\")
            hashes[pin] = []
    return hashes


USERS, DEVELOPERS = read_lock("requirements.lock"), read_lock("requirements-dev.lock")


def packages_here(lines: Iterable[str]) -> set[str]:
    """The packages of a lock that this machine needs, CUDA's left out: the CPU build of PyTorch does without."""
    pins = [Requirement(line) for line in lines]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    return {pin.name for pin in here if not CUDA.match(pin.name)}


def needed_here(requirements: Iterable[str]) -> set[str]:
    """Packages that installed ones need in turn, CUDA's left out."""
    todo = [(Requirement(text), "") for text in requirements]
    done: set[tuple[str, str]] = set()
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in ({"", *requirement.extras}) if not CUDA.match(name) else ():
            if (name, wanted) not in done:
                done.add((name, wanted))
                todo += [(Requirement(text), wanted) for text in importlib.metadata.requires(name) or ()]
    return {name for name, _ in done}


def test_the_users_lock_is_what_a_plain_installation_needs_and_nothing_else() -> None:
    assert packages_here(USERS) == needed_here(PROJECT["dependencies"])


def test_the_developers_lock_adds_to_the_users() -> None:
    # A tool may need a package on more machines than users do, so the conditions may differ.
    users, developers = ({line.partition(" ;")[0] for line in lines} for lines in (USERS, DEVELOPERS))
    assert users < developers
    tools = [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
    assert packages_here(DEVELOPERS) == needed_here([*PROJECT["dependencies"], *tools])


@pytest.mark.parametrize("lock", [USERS, DEVELOPERS])
def test_every_pin_has_hashes_and_nothing_else(lock: dict[str, list[str]]) -> None:
    assert all(hashes for hashes in lock.values())
    wrong = [
        line for hashes in lock.values() for line in hashes if not re.fullmatch(r"--hash=sha256:\w{64}", line)
    ]
    assert wrong == []


def test_what_lite_asks_for_is_what_the_project_installs() -> None:
    assert {word for word in REINSTALL.split() if "==" in word} <= set(PROJECT["dependencies"])


def write_wheel(folder: Path, name: str, version: str, *needs: str) -> str:
    """An empty package, listed in the index `folder`. Returns its pin in a lock."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    file, info = f"{stem}-py3-none-any.whl", f"{stem}.dist-info"
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    metadata += [f"Requires-Dist: {need}" for need in needs]
    with zipfile.ZipFile(folder / name / file, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(metadata))
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    with (folder / name / "index.html").open("a") as page:
        page.write(f'<a href="{file.replace("+", "%2B")}">{file}</a>\n')
    digest = hashlib.sha256((folder / name / file).read_bytes()).hexdigest()
    return f"{name}=={version} \\\n    --hash=sha256:{digest}\n"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """This Makefile beside the locks of a small project, an ordinary index and one with CPU builds."""
    lock = write_wheel(tmp_path / "ordinary", "nvidia-stand-in", "1.0")
    for name in ("torch", "torchvision"):
        lock += write_wheel(tmp_path / "ordinary", name, "1.0", "nvidia-stand-in")
        write_wheel(tmp_path / "cpu", name, "1.0+cpu")
    lock += write_wheel(tmp_path / "ordinary", "library", "1.0")
    tool = write_wheel(tmp_path / "ordinary", "tool", "1.0")
    write_wheel(tmp_path / "ordinary", "project", "1.0")
    folder = tmp_path / "clone"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "requirements.lock").write_text(lock)
    (folder / "requirements-dev.lock").write_text(lock + tool)
    system = 'build-backend = "backend"\nbackend-path = ["."]\nrequires = []'
    (folder / "pyproject.toml").write_text(
        f'[build-system]\n{system}\n[project]\nname = "project"\nversion = "1.0"'
    )
    built = tmp_path / "ordinary" / "project" / "project-1.0-py3-none-any.whl"
    (folder / "backend.py").write_text(
        "import shutil\ndef build_editable(folder, *others):\n"
        f"    return shutil.copy({str(built)!r}, folder).rpartition('/')[2]\n"
    )
    return folder


def make(clone: Path, stamp: str, *settings: str) -> tuple[int, str]:
    """The exit status and the output of `make` in the clone, where pip knows no index but the ordinary one."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "MAKE", "MFLAGS"))}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": (clone.parent / "ordinary").as_uri()}
    command = ["make", f".venv/{stamp}", f"PYTHON={sys.executable}", "TORCH=cpu", *settings]
    done = subprocess.run(
        command, cwd=clone, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def installed(clone: Path) -> set[str]:
    """The packages in the clone's environment, but for what a new one holds."""
    (site,) = (clone / ".venv" / "lib").glob("python*/site-packages")
    names = {path.name.removesuffix(".dist-info") for path in site.glob("*.dist-info")}
    return {name for name in names if not name.startswith(("pip-", "setuptools-"))}


@pytest.mark.slow
def test_pytorchs_cpu_build_comes_without_cuda_and_stays_when_the_tools_come(clone: Path) -> None:
    index = f"CPU_INDEX={(clone.parent / 'cpu').as_uri()}"
    status, said = make(clone, ".installed", index)
    assert status == 0, said
    assert "about 3 GB." in said
    users = {"torch-1.0+cpu", "torchvision-1.0+cpu", "library-1.0", "project-1.0"}
    assert installed(clone) == users
    status, said = make(clone, ".installed-dev", index)
    assert status == 0, said
    assert "Making .venv" not in said
    assert installed(clone) == users | {"tool-1.0"}


@pytest.mark.slow
def test_an_index_that_does_not_answer_costs_a_sentence_and_a_failure_leaves_no_stamp(clone: Path) -> None:
    index = "CPU_INDEX=http://127.0.0.1:9/whl/cpu"
    status, said = make(clone, ".installed", index)
    assert status == 0, said
    assert "pip finds no torch==1.0+cpu torchvision==1.0+cpu at http://127.0.0.1:9/whl/cpu, so it" in said
    users = {"torch-1.0", "torchvision-1.0", "nvidia_stand_in-1.0", "library-1.0", "project-1.0"}
    assert installed(clone) == users
    assert (clone / ".venv" / ".installed").exists()

    shutil.rmtree(clone.parent / "ordinary" / "tool")
    status, said = make(clone, ".installed-dev", index)
    assert status != 0
    assert "No matching distribution found for tool==1.0" in said
    assert not (clone / ".venv" / ".installed-dev").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["library", "torch"])
def test_a_file_that_is_not_the_locks_is_not_installed(name: str, clone: Path) -> None:
    write_wheel(clone.parent / "ordinary", name, "1.0", "something-else")
    status, said = make(clone, ".installed", "CPU_INDEX=http://127.0.0.1:9/whl/cpu")
    assert status != 0
    assert "DO NOT MATCH THE HASHES" in said
    assert not (clone / ".venv" / ".installed").exists()
