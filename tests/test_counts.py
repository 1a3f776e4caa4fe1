"""The count at the end of a job adds up, and --strict makes an error of what was quarantined."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CLASSES, Training, draw, refusal, run, write_tar

NAMES = ",".join(name.replace(" ", "_") for name in CLASSES)


@pytest.fixture
def mixed(photos: Path, tmp_path: Path) -> Path:
    """30 pictures with labels and one without, two that are none, a link to nothing, notes, and a hidden file."""
    folder = shutil.copytree(photos, tmp_path / "mixed")
    (folder / "loose.png").write_bytes(draw(0, 1))
    for name in ("stop_sign/broken.png", "empty.png", ".hidden.png"):
        (folder / name).write_bytes(b"")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for name in ("notes.txt", "stop_sign/more.txt", "list.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.slow
def test_what_was_found_is_what_was_left_out_quarantined_or_encoded(
    cluster: None,
    lite_map: None,
    mixed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = [draw(0, seed) for seed in range(3)]
    pq.write_table(
        pa.table({"image": [*images, b"none"], "label": [0, 1, None, 1]}), tmp_path / "rows.parquet"
    )
    write_tar(tmp_path / "some.tar", {"1.png": images[0], "1.cls": b"0", "2.png": images[1], "3.json": b"{}"})
    for data, line in (
        (
            mixed,
            "mixed: 37 found, 3 left out (2 .txt, 1 .json), 34 read, 3 quarantined (2 undecodable, 1 unreadable), "
            "31 encoded, 30 of them with a label",
        ),
        (
            tmp_path / "rows.parquet",
            "-rows: 4 found, 4 read, 1 quarantined (1 undecodable), 3 encoded, 2 of them with a label",
        ),
        (
            f"{tmp_path}/rows.parquet --limit 3 --label-column=",
            "-rows: 4 found, 1 left out (1 beyond --limit), 3 read, ",
        ),
        (
            tmp_path / "some.tar",
            "-some: 3 found, 3 read, 1 quarantined (1 unreadable), 2 encoded, 1 of them with a label",
        ),
        (f"{tmp_path}/some.tar --limit 1", "-some: 1 read, 0 quarantined, 1 encoded, 1 of them with a label"),
    ):
        for _ in range(2):  # The second time, features are found.
            run(f"encode.py --data {data} --views weak --out {tmp_path}/out", monkeypatch)
            assert line in capsys.readouterr().out
    (store,) = (tmp_path / "out" / "features").glob("mixed-*")
    (store / "quarantine.parquet").unlink()
    run(f"encode.py --data {mixed} --views weak --out {tmp_path}/out", monkeypatch)
    assert "34 read, 3 quarantined, 31 encoded" in capsys.readouterr().out


@pytest.mark.slow
def test_strict_jobs_end_with_an_error_when_everything_is_written(
    trained: Training,
    mixed: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = f"--features {tmp_path}/features"
    listed = (
        rf"--strict: 3 images in quarantine, as listed in {tmp_path}/features/mixed-\w+/quarantine.parquet; "
    )
    commands = {
        "encode": f"encode.py --data {mixed} --views weak,mirror {kept} --out {tmp_path}/encode",
        "selftrain": (
            f"selftrain.py --data {photos} --eval-data {mixed} --classes {NAMES} --views weak,mirror {kept} "
            f"--out {tmp_path}/selftrain"
        ),
        "tune": (
            f"tune.py --data {photos} --eval-data {mixed} --classes {NAMES} --views weak,mirror {kept} "
            f"--space quick --trials 1 --out {tmp_path}/tune"
        ),
        "evaluate": (
            f"evaluate.py --probe {trained.out}/probe --data {photos} --ood x={mixed} {kept} --out {tmp_path}/evaluate"
        ),
    }
    for job, command in commands.items():
        assert re.match(listed, refusal(f"{command} --strict", monkeypatch, capsys)), job
        summary = json.loads((tmp_path / job / "summary.json").read_text())
        assert summary["config"]["strict"]
    predict = f"predict.py --probe {trained.out}/probe --out {tmp_path}/labels.parquet --strict --data"
    assert refusal(f"{predict} {mixed}", monkeypatch, capsys) == (
        f"--strict: 3 images in quarantine, as listed in {tmp_path}/labels.quarantine.parquet; everything is written"
    )
    assert len(pq.read_table(tmp_path / "labels.parquet")) == 31
    assert run(f"{predict} {photos}", monkeypatch) == {"images": 30, "quarantined": 0}
    printed = capsys.readouterr().out
    assert "photos: 30 found, 30 read, 0 quarantined, 30 encoded, 30 of them with a label\n" in printed
    assert "as in stop_sign/100.png (stop_sign), " in printed
