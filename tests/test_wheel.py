"""The wheel, installed outside of the repository: its command runs from any folder, and so does the one it prints."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import CLASSES, ROOT, draw


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this repository, built of a copy, in which a build leaves its folders."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("lpclip", "tune_spaces", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", ROOT / name, sources], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, sources], check=True, capture_output=True)
    (found,) = folder.glob("lpclip-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path) -> dict[str, str]:
    """The environment of a shell that finds the installed package and its command, and no repository."""
    target = wheel.parent / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel]
    subprocess.run(command, check=True, capture_output=True)
    path = f"{target / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(target), "PATH": path}


def run(command: str, folder: Path, environment: dict[str, str]) -> str:
    """What a shell command prints in a folder."""
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_module_space_and_page(wheel: Path) -> None:
    files = [
        path for path in (ROOT / "lpclip").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    expected = {str(path.relative_to(ROOT)) for path in files}
    expected |= {f"lpclip/tune_spaces/{path.name}" for path in (ROOT / "tune_spaces").glob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert "lpclip/py.typed" in held


def test_the_installed_command_explains_itself(installed: dict[str, str], tmp_path: Path) -> None:
    listing = run("lpclip --help", tmp_path, installed)
    for name in (
        "encode",
        "selftrain",
        "evaluate",
        "tune",
        "predict",
        "pretrain",
        "export",
        "serve",
        "review",
        "suggest",
    ):
        assert f"• {name} " in listing
    assert "LPCLIP_TRACEBACK=1" in listing
    assert "--templates" in run("lpclip selftrain --help", tmp_path, installed)
    assert "--scheduler" in run("lpclip tune --space quick --help", tmp_path, installed)


def test_a_shipped_space_is_found_in_the_package(
    wheel: Path, installed: dict[str, str], tmp_path: Path
) -> None:
    code = "from lpclip.training.search_space import space_file; print(space_file('wide'))"
    found = run(shlex.join([sys.executable, "-c", code]), tmp_path, installed)
    assert found.strip() == str(wheel.parent / "site" / "lpclip" / "tune_spaces" / "wide.py")


@pytest.mark.slow
@pytest.mark.usefixtures("lite_map")
def test_a_sweep_and_the_command_it_prints_run_from_any_folder(
    wheel: Path, installed: dict[str, str], tmp_path: Path
) -> None:
    for place, name in enumerate(CLASSES):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for seed in range(12):
            (tmp_path / "photos" / name / f"{seed}.png").write_bytes(draw(place, seed))
    flags = f"--data photos --classes {shlex.quote(','.join(CLASSES))} --templates simple --views weak"
    said = run(f"lpclip tune --space quick {flags} --trials 2 --out swept", tmp_path, installed)
    chosen = json.loads((tmp_path / "swept" / "summary.json").read_text())["chosen"]
    (command,) = [line.removeprefix("again    ") for line in said.splitlines() if line.startswith("again ")]
    assert command == chosen["command"]
    assert command.startswith("lpclip selftrain ")
    run(command, tmp_path, installed)
    assert (tmp_path / "swept" / "again" / "probe" / "probe.safetensors").is_file()
    assert len(pq.read_table(tmp_path / "swept" / "again" / "pseudo_labels.parquet")) == 36
