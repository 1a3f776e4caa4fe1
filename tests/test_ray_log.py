"""Ray's warnings are in OUT/ray.log and not on the terminal."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from lpclip.jobs.runtime import output_folder


@pytest.mark.usefixtures("cluster")
def test_an_error_of_ray_data_is_kept_and_not_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(table: pa.Table) -> pa.Table:
        raise RuntimeError("a stage that fails")

    for out in (str(tmp_path / "path"), (tmp_path / "uri").as_uri()):
        with output_folder(out) as folder, pytest.raises(ray.exceptions.RayTaskError):
            Path(folder.removeprefix("file://"), "result").touch()
            ray.data.range(1).map_batches(fails, batch_format="pyarrow").materialize()
    logging.getLogger("ray.data").warning("said when no job runs")
    logging.getLogger("ray").warning("said by Ray itself")
    assert "stage that fails" not in capfd.readouterr().err
    for name in ("path", "uri"):
        text = (tmp_path / name / "ray.log").read_text()
        assert "ERROR ray.data" in text
        assert "RuntimeError: a stage that fails" in text
    with output_folder(str(tmp_path / "next")):
        (tmp_path / "next" / "result").touch()
    text = (tmp_path / "next" / "ray.log").read_text()
    assert "WARNING ray.data: said when no job runs\n" in text
    assert "WARNING ray: said by Ray itself\n" in text


@pytest.mark.usefixtures("cluster")
def test_the_loss_of_a_trial_that_runs_again_is_kept_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    for handler in logging.getLogger("ray").handlers:
        if isinstance(handler, logging.StreamHandler):
            monkeypatch.setattr(handler, "stream", terminal)
    with output_folder(str(tmp_path)):
        (tmp_path / "result").touch()
        # Said where the machine of a trial is lost.
        logging.getLogger("ray.tune.execution.tune_controller").error("Trial task failed")
        logging.getLogger("ray").error("said by Ray itself")
    assert "Trial task failed" not in terminal.getvalue()
    assert "said by Ray itself" in terminal.getvalue()
    assert (tmp_path / "ray.log").read_text().count("Trial task failed") == 1


@pytest.mark.usefixtures("cluster")
def test_a_job_that_is_refused_leaves_no_log(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), output_folder(str(tmp_path / "out")):
        logging.getLogger("ray.data").warning("a warning")
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []
