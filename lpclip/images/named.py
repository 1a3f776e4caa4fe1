"""Named data sets: downloaded once, kept as Parquet in the cache, and read like any other Parquet.

torchvision downloads and checks them. Fashion-MNIST is also in Debian's package `dataset-fashion-mnist`: it is taken
from there if that is installed, and if torchvision's download fails, apt fetches the package, without root.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import subprocess
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lpclip import files
from lpclip.config import UserError
from lpclip.images.fetch import reason
from lpclip.images.pixels import encode_png

CLASSES: dict[str, tuple[str, ...] | None] = {
    "fashion-mnist": (
        *("t-shirt", "trousers", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": None,  # torchvision's own names, as the archive has them
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = "usr/share/datasets/fashion-mnist"
RAW_FOLDER = "FashionMNIST/raw"
CONNECT_SECONDS = 5
STALL_SECONDS = 30
ROW_GROUP_ROWS = 1024


def named_parquet(name: str, *, split: str) -> Path:
    """The data set's Parquet file: id, image (PNG bytes), label, class names in the metadata `classes`.

    It is made on first use. Raises UserError when the data set can neither be downloaded nor kept.
    """
    folder = files.cache_folder() / "datasets" / name
    if not (folder / f"{split}.parquet").exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
                _make(name, folder, Path(temporary))
        except OSError as error:
            raise UserError(f"{name}: cannot be kept in the cache {folder} ({reason(error)})") from error
    return folder / f"{split}.parquet"


def _make(name: str, folder: Path, temporary: Path) -> None:
    try:
        parts = _load(name, temporary)
    except (OSError, RuntimeError) as error:
        failures = f"cannot be downloaded ({reason(error)})"
        if name == "fashion-mnist":
            try:
                _take_from_debian(temporary)
                parts = _load(name, temporary)
            except (OSError, RuntimeError, subprocess.SubprocessError) as second:
                failures += f", nor taken from Debian's package {DEBIAN_PACKAGE} ({_last_words(second)})"
                raise UserError(_advice(name, failures, folder)) from second
        else:
            raise UserError(_advice(name, failures, folder)) from error
    for split, part in parts.items():
        _write(temporary / "part.parquet", part, name=name, split=split)
        (temporary / "part.parquet").replace(folder / f"{split}.parquet")


def _advice(name: str, failures: str, folder: Path) -> str:
    return (
        f"{name} {failures}; connect this machine to the network, or copy train.parquet and test.parquet "
        f"from another machine's cache into {folder}"
    )


def _load(name: str, folder: Path) -> dict[str, Any]:
    """torchvision's train and test part. Only files that the folder lacks are downloaded."""
    from torchvision import datasets

    kinds = {
        "fashion-mnist": datasets.FashionMNIST,
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
    }
    kind = kinds[name]
    installed = Path("/") / DEBIAN_FOLDER
    if name == "fashion-mnist" and installed.is_dir():
        _unpack(installed, folder / RAW_FOLDER)
    before = socket.getdefaulttimeout()
    try:
        if not any(folder.iterdir()):
            socket.setdefaulttimeout(CONNECT_SECONDS)
            url = f"{kind.mirrors[0]}{kind.resources[0][0]}" if name == "fashion-mnist" else kind.url
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD")).close()
        socket.setdefaulttimeout(STALL_SECONDS)
        return {
            split: kind(str(folder), train=split == "train", download=True) for split in ("train", "test")
        }
    finally:
        socket.setdefaulttimeout(before)


def _take_from_debian(folder: Path) -> None:
    """Put the package's files where torchvision looks for them, without root and without installing the package."""
    options = ["APT::Sandbox::User=root", "Acquire::Retries=0", "Acquire::http::Timeout=10"]
    try:
        _run("apt-get", "download", DEBIAN_PACKAGE, options=options, cwd=folder)
    except subprocess.CalledProcessError:
        # Package lists are missing on a fresh machine and stale on an old one, so they are fetched, to our own folder.
        lists, cache = folder / "apt/lists", folder / "apt/cache"
        (lists / "partial").mkdir(parents=True)
        (cache / "archives/partial").mkdir(parents=True)
        options += [f"Dir::State::lists={lists}", f"Dir::Cache={cache}", "Debug::NoLocking=1"]
        _run("apt-get", "update", options=options, cwd=folder)
        _run("apt-get", "download", DEBIAN_PACKAGE, options=options, cwd=folder)
    (package,) = folder.glob(f"{DEBIAN_PACKAGE}_*.deb")
    _run("dpkg", "-x", str(package), str(folder / "package"), cwd=folder)
    _unpack(folder / "package" / DEBIAN_FOLDER, folder / RAW_FOLDER)


def _unpack(archives: Path, folder: Path) -> None:
    """Unpack Debian's archives: they were compressed again, so torchvision does not know their hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    for archive in archives.glob("*.gz"):
        with gzip.open(archive) as source, (folder / archive.stem).open("wb") as target:
            shutil.copyfileobj(source, target)


def _run(*command: str, cwd: Path, options: Sequence[str] = ()) -> None:
    flags = [word for option in options for word in ("-o", option)]
    environment = {**os.environ, "LC_ALL": "C"}
    subprocess.run(
        [*command, *flags], cwd=cwd, env=environment, check=True, capture_output=True, text=True, timeout=600
    )


def _last_words(error: Exception) -> str:
    lines = (
        (error.stderr or "").strip().splitlines() if isinstance(error, subprocess.CalledProcessError) else []
    )
    return lines[-1] if lines else reason(error)


def _write(path: Path, part: Any, *, name: str, split: str) -> None:
    """Write torchvision's data set, arrays `data` (N, H, W[, 3]) uint8 and `targets`, as Parquet."""
    fields = [("id", pa.string()), ("image", pa.binary()), ("label", pa.int32())]
    schema = pa.schema(fields, metadata={"classes": json.dumps(CLASSES[name] or part.classes)})
    images = np.asarray(part.data)
    ids = [f"{split}/{row:05d}" for row in range(len(images))]
    labels = [int(label) for label in part.targets]
    table = pa.table([ids, [encode_png(image) for image in images], labels], schema=schema)
    pq.write_table(table, path, row_group_size=ROW_GROUP_ROWS, compression="none")
