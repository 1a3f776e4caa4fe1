"""Images, features and results in an S3-compatible store, by URI options and by the environment alike."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SECRET, Throttle, refusal, run, start
from pyarrow import fs
from safetensors.torch import load as load_tensors

from lpclip import files
from lpclip.config import SourceConfig, StoreAwayError, UserError
from lpclip.features.pairs import PairStore
from lpclip.features.store import Store
from lpclip.features.store_writer import DIGEST_MODULUS
from lpclip.images.folders import FilesReader
from lpclip.images.open import open_source
from lpclip.images.parquet_reader import ParquetReader
from lpclip.images.tars import TarReader
from lpclip.method.probe import load_probe


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The text that was printed since the last call. It must not hold the secret."""
    stdout, stderr = capsys.readouterr()
    assert SECRET not in stdout + stderr
    return stdout


def test_files_come_back_and_folders_list_what_is_in_them(options: str) -> None:
    folder = f"s3://bucket/files/a folder{options}"
    files.make_folder(folder)
    assert files.list_names(folder) == files.list_folders(folder) == []
    names = ("plain.bin", "with 100%, a space.bin")
    for name in names:
        path = files.join(folder, name)
        assert not files.exists(path)
        for data in (b"", b"\x00\xff" * 1000, b"shorter"):
            files.write_bytes(path, data)
            assert files.read_bytes(path) == data
    files.write_json(files.join(folder, "below", "value.json"), {"a": 1})
    assert files.read_json(files.join(folder, "below", "value.json")) == {"a": 1}
    table = pa.table({"id": ["a", "b"]})
    files.write_parquet(files.join(folder, "table.parquet"), table)
    assert pq.read_table(pa.BufferReader(files.read_bytes(files.join(folder, "table.parquet")))) == table
    assert files.list_names(folder) == [names[0], "table.parquet", names[1]]
    assert files.list_folders(folder) == ["below"]
    files.delete(files.join(folder, names[0]))
    assert not files.exists(files.join(folder, names[0]))
    files.delete_folder(folder)
    assert not files.exists(files.join(folder, names[1]))
    with pytest.raises(FileNotFoundError):
        files.read_bytes(files.join(folder, names[1]))
    with pytest.raises(ValueError, match="cannot write to the output folder .*nowhere"):
        files.make_folder(f"s3://nowhere/out{options}")


def test_a_file_is_written_with_one_request(options: str, throttle: Throttle) -> None:
    path = f"s3://bucket/files/once.bin{options}"
    throttle.methods.clear()
    files.write_bytes(path, b"1" * 1_000_000)
    assert throttle.methods == ["PUT"]
    assert len(files.read_bytes(path)) == 1_000_000


@pytest.mark.parametrize("where", ["beside", "here"])
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_change_behind_a_uri_in_a_list_is_seen(
    where: str, form: str, tmp_path: Path, options: str, throttle: Throttle
) -> None:
    folder = f"s3://bucket/{where}-{form}{options}"
    names = [f"{number}.png" for number in range(3)]
    for name in names:
        files.write_bytes(files.join(folder, name), b"old")
    paths = names if where == "beside" else [files.join(folder, name) for name in names]
    path = files.join(folder if where == "beside" else str(tmp_path), f"list.{form}")
    if form == "csv":
        files.write_bytes(path, "\n".join(["path", *paths]).encode())
    else:
        files.write_parquet(path, pa.table({"path": paths}))

    def identity(schemes: str) -> Any:
        return open_source(path, config=SourceConfig(schemes=schemes)).identity

    before = identity("s3")
    assert identity("s3") == before
    files.write_bytes(files.join(folder, names[1]), b"newer")
    assert identity("s3") != before
    if where == "here" and form == "parquet":
        # What is not followed is not asked for either.
        throttle.methods.clear()
        identity("https")
        assert throttle.methods == []


def work_in(folder: str, image: bytes) -> list[Callable[[], object]]:
    """All that lpclip does with a bucket, on a folder with a.png, a.parquet and a.tar."""
    table, picture = files.join(folder, "a.parquet"), files.join(folder, "a.png")
    limits: dict[str, Any] = {"max_bytes": 1 << 20, "root": folder}
    follow: dict[str, Any] = {"schemes": ("s3",), "timeout": 1.0}
    one, span = json.dumps({"paths": ["a.png"]}), {"group": 0, "first": 0, "start": 0, "stop": 1}

    def read_table() -> object:
        with files.open_parquet(table, remedy="") as found:
            return found.read()

    return [
        lambda: files.read_bytes(picture) == image,
        lambda: files.write_bytes(files.join(folder, "b"), b"1"),
        lambda: files.list_names(folder) and files.list_folders(folder) == [],
        lambda: files.exists(picture),
        lambda: files.delete(files.join(folder, "c")),
        lambda: files.make_folder(files.join(folder, "d")),
        read_table,
        lambda: open_source(table, config=SourceConfig()),
        lambda: [row.error for row in FilesReader(**limits, **follow).rows(one)],
        lambda: [row.error for row in TarReader(**limits).rows(json.dumps({"file": "a.tar"}))],
        lambda: [
            row.error
            for row in ParquetReader(**limits, **follow, image_column="image").rows(
                json.dumps([{"file": "a.parquet", **span}])
            )
        ],
    ]


def outcome(work: Callable[[], object]) -> object:
    """What the work returns or raises."""
    try:
        return work()
    except Exception as error:
        return error


@pytest.mark.slow
def test_a_store_that_is_busy_is_waited_for_and_blames_no_image(
    photos: Path, options: str, throttle: Throttle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = f"s3://bucket/busy{options}"
    image = next(photos.rglob("*.png")).read_bytes()
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        info = tarfile.TarInfo("a.png")
        info.size = len(image)
        archive.addfile(info, io.BytesIO(image))
    for name, data in {"a.png": image, "a.tar": tar.getvalue(), "c": b""}.items():
        files.write_bytes(files.join(folder, name), data)
    files.write_parquet(files.join(folder, "a.parquet"), pa.table({"image": [image]}))
    with ThreadPoolExecutor(16) as threads:
        # pyarrow's own attempts end after six seconds.
        with throttle.refusing(1.0):
            monkeypatch.setenv("LPCLIP_PATIENCE", "0")
            refused = list(threads.map(outcome, work_in(folder, image)))
            monkeypatch.delenv("LPCLIP_PATIENCE")
            waiting = [threads.submit(outcome, work) for work in work_in(folder, image)]
            time.sleep(6.5)
        found = [item.result() for item in waiting]
    for error in refused:
        assert isinstance(error, StoreAwayError)
        assert "the store is busy or away" in str(error)
    assert [item for item in found if isinstance(item, Exception)] == []
    assert found[-3:] == [[None]] * 3


@pytest.mark.slow
def test_nothing_is_lost_when_a_fifth_of_the_requests_is_refused(
    photos: Path,
    cluster: None,
    lite_map: None,
    options: str,
    throttle: Throttle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    to_bucket(photos, options)
    plain = run(f"encode.py --data {photos} --out {tmp_path}", monkeypatch)
    before = throttle.refused
    with throttle.refusing(0.2):
        command = f"encode.py --data s3://bucket/photos{options} --out s3://bucket/busy-out{options}"
        found = run(command, monkeypatch)
        features = Store.open(found["features"]).features()
    assert throttle.refused > before + 10
    expected = Store.open(plain["features"]).features()
    assert (found["images"], found["quarantined"]) == (30, 0)
    assert features.ids.tolist() == expected.ids.tolist()
    assert np.array_equal(features.base.view(np.uint16), expected.base.view(np.uint16))


@pytest.mark.slow
def test_a_store_that_stays_away_ends_the_job_with_a_sentence_and_the_same_command_goes_on(
    photos: Path, options: str, throttle: Throttle, tmp_path: Path
) -> None:
    to_bucket(photos, options)
    command = f"encode.py --data s3://bucket/photos{options} --out {tmp_path}"
    with throttle.refusing(1.0, only=".png"):
        process = start(command, LPCLIP_PATIENCE="1")
        stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 1, stdout + stderr
    (line,) = (line for line in stderr.splitlines() if line.startswith("error:"))
    assert "the store is busy or away" in line
    assert "the same command goes on" in line
    assert "Traceback" not in stderr
    process = start(command)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stdout + stderr
    assert files.read_json(str(tmp_path / "summary.json"))["images"] == 30


def to_bucket(photos: Path, options: str) -> None:
    """Copy the photos to s3://bucket/photos."""
    filesystem, inner = files.resolve(f"s3://bucket/photos{options}")
    fs.copy_files(str(photos), inner, destination_filesystem=filesystem)


@pytest.fixture(scope="module")
def in_bucket(photos: Path, cluster: None, lite_map: None, options: str) -> tuple[dict[str, Any], str]:
    """The summary of a training that reads images from the bucket and writes all that it makes there; what it said."""
    to_bucket(photos, options)
    data, out = f"s3://bucket/photos{options}", f"s3://bucket/runs/photos{options}"
    told = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(told),
    ):
        summary = run(f"selftrain.py --data {data} --views weak --rounds 2 --out {out}", patch)
    return summary, told.getvalue()


def test_a_job_trains_in_a_bucket_and_its_probe_labels_images_from_there(
    photos: Path,
    in_bucket: tuple[dict[str, Any], str],
    options: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = f"s3://bucket/runs/photos{options}"
    returned, told = in_bucket
    assert SECRET not in told
    assert f"probe    s3://bucket/runs/photos/probe{options}" in told
    summary = files.read_json(files.join(out, "summary.json"))
    assert summary == returned
    assert summary["images"] == {"encoded": 30, "quarantined": 0, "eval_quarantined": None}
    expected = sum(
        int.from_bytes(
            hashlib.blake2b(
                str(path.relative_to(photos)).encode() + b"\0" + path.read_bytes(), digest_size=16
            ).digest(),
            "big",
        )
        for path in photos.rglob("*.png")
    )
    manifest = Store.open(summary["features"]["train"]).manifest
    assert manifest.content_digest == f"{expected % DIGEST_MODULUS:032x}"
    assert "rounds.png" in files.list_names(files.join(out, "figures"))
    probe = load_probe(files.join(out, "probe"))
    assert len(probe.class_names) == 3
    written = [files.read_bytes(files.join(out, name)) for name in ("summary.json", "job.json")]
    written.append(Path(os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")).read_bytes())
    assert not any(SECRET.encode() in data for data in written)

    table = f"s3://bucket/runs/labels.parquet{options}"
    run(f"predict.py --probe {files.join(out, 'probe')} --data {photos} --out {table}", monkeypatch)
    said(capsys)
    rows = pq.read_table(pa.BufferReader(files.read_bytes(table))).to_pylist()
    assert len(rows) == 30
    assert {row["label"] for row in rows} <= set(probe.class_names)
    assert not files.exists(files.add_suffix(table, ".features"))


@pytest.mark.slow
def test_the_environment_may_name_the_server(
    photos: Path, in_bucket: tuple[dict[str, Any], str], endpoint: str, options: str, tmp_path: Path
) -> None:
    process = start(
        f"predict.py --probe s3://bucket/runs/photos/probe --data {photos} --out s3://bucket/runs/found.parquet",
        AWS_ENDPOINT_URL=f"http://{endpoint}",
    )
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stdout + stderr
    assert SECRET not in stdout + stderr
    assert (
        len(pq.read_table(pa.BufferReader(files.read_bytes(f"s3://bucket/runs/found.parquet{options}"))))
        == 30
    )


@pytest.mark.slow
def test_a_model_is_trained_on_pairs_in_a_bucket(
    lake: Path,
    cluster: None,
    options: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = pq.read_table(lake / "unlabelled.parquet")
    table = table.append_column("text", pa.array([f"picture {i % 7}" for i in range(len(table))]))
    data, out = f"s3://bucket/pairs.parquet{options}", f"s3://bucket/runs/pairs{options}"
    files.write_parquet(data, table)
    run(
        f"pretrain.py --data {data} --encoder tiny-vit-32 --batch-size 20 --epochs 2 --out {out}", monkeypatch
    )
    assert "--encoder tiny-vit-32 --pretrained A-LOCAL-COPY" in said(capsys)
    summary = files.read_json(files.join(out, "summary.json"))
    assert (summary["steps"], summary["pairs"]["read"]) == (6, 60)
    pairs = PairStore(summary["pairs"]["store"])
    assert {text for texts in pairs.texts(range(60)) for text in texts} == {f"picture {i}" for i in range(7)}
    assert len(np.unique(pairs.pixels(range(60)).reshape(60, -1), axis=0)) == 60
    weights = load_tensors(files.read_bytes(summary["model"]))
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize(
    "flag",
    [
        f"--out s3://reader:{SECRET}@bucket/out",
        f"--data s3://reader:ab/{SECRET}@bucket/photos",
        f"--features abfs://container@account.dfs.core.windows.net/f?client_secret={SECRET}",
    ],
)
def test_a_secret_in_a_uri_is_refused_and_not_repeated(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(f"encode.py {flag}", monkeypatch, capsys)
    assert message.startswith(f"{flag.split()[0]} holds a password or a secret key")
    assert SECRET not in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        (f"s3://reader:{SECRET}@bucket/x", "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"),
        (f"abfs://reader:{SECRET}@account/x", "(AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET)"),
        (f"https://reader:{SECRET}@host/x", "leave it out of the URI"),
    ],
)
def test_a_secret_is_refused_with_advice_for_its_scheme(uri: str, advice: str) -> None:
    with pytest.raises(UserError) as refused:
        files.refuse_secrets(uri)
    assert str(refused.value).endswith(advice)


def test_user_names_ports_and_containers_are_no_secrets() -> None:
    for uri in (
        "s3://bucket/a@b:c.png",
        "abfs://container@account.dfs.core.windows.net/x",
        "hdfs://namenode:8020/user@x/y",
        "file:///a:b@c",
    ):
        files.refuse_secrets(uri)
    with pytest.raises(ValueError) as refused:
        files.resolve(f"s3://reader:{SECRET}@bucket/out")
    assert SECRET not in str(refused.value)
