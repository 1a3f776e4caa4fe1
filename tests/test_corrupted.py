"""Published corrupted data sets: every image once, with its label, and only from files that are what they say."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import read_unit
from PIL import Image

from lpclip.config import SourceConfig
from lpclip.images import arrays
from lpclip.images import published as corrupted
from lpclip.images.published import Published, published_sets
from lpclip.images.source import ROWS, UNIT_ROWS, Source

CONFIG = SourceConfig()
N = 40


def pixels(seed: int = 0, *, rows: int = 5 * N, size: tuple[int, int] = (8, 6)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, *size, 3), np.uint8)


def labels(rows: int = 5 * N) -> np.ndarray:
    return np.tile(np.random.default_rng(9).integers(0, 10, rows // 5), 5)


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """Two corruptions of 40 images, in CIFAR-10-C's layout."""
    folder = tmp_path / "CIFAR-10-C"
    for seed, corruption in enumerate(("saturate", "gaussian_noise")):
        save(folder / f"{corruption}.npy", pixels(seed))
    save(folder / "labels.npy", labels())
    return folder


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, rows=1)[0]).save(path)


def write_imagenet(folder: Path, *places: str) -> Path:
    """Two classes of four images at each place, JPEG and PNG."""
    for place in places:
        for seed in range(8):
            name = ("n01440764", "n01443537")[seed % 2]
            write_image(folder / place / name / f"{seed}.{'JPEG' if seed < 4 else 'png'}".lower(), seed)
    return folder


def rows(source: Source) -> list[dict[str, Any]]:
    """All rows, as workers read them: the reader travels to them by pickle."""
    data = pickle.dumps(source.reader)
    assert len(data) < 2000
    tables = [read_unit(pickle.loads(data), unit) for unit in source.units]
    assert all(table.schema == ROWS and 0 < len(table) <= UNIT_ROWS for table in tables)
    read = pa.concat_tables(tables).to_pylist()
    assert source.num_rows == len(read) == len({row["id"] for row in read})
    return read


def decode(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def pairs(sets: list[Published]) -> list[tuple[str, int]]:
    return [(item.corruption, item.severity) for item in sets]


class TestArrays:
    def test_all_severities_of_each_corruption_in_order(self, cifar: Path) -> None:
        sets, notes = published_sets(str(cifar))
        assert pairs(sets) == [(c, s) for c in ("gaussian_noise", "saturate") for s in range(1, 6)]
        assert notes == []
        assert [item.open(config=CONFIG).name for item in sets[2:6]] == [
            *(f"CIFAR-10-C-gaussian_noise-{severity}" for severity in (3, 4, 5)),
            "CIFAR-10-C-saturate-1",
        ]

    def test_rows_are_the_arrays_own_with_ids_and_labels(self, cifar: Path) -> None:
        arrays = {"saturate": pixels(0), "gaussian_noise": pixels(1)}
        for item in published_sets(str(cifar))[0]:
            source = item.open(config=CONFIG)
            assert (source.kind, source.num_rows) == ("npy", N)
            assert (source.has_labels, source.label_names) == (True, None)
            read = rows(source)
            severity = slice((item.severity - 1) * N, item.severity * N)
            assert [row["id"] for row in read] == [
                f"{item.corruption}-{item.severity}-{row:05d}" for row in range(N)
            ]
            assert [row["label"] for row in read] == labels()[severity].tolist()
            assert np.array_equal([decode(row["image"]) for row in read], arrays[item.corruption][severity])
            assert rows(item.open(config=CONFIG)) == read

    @pytest.mark.parametrize("dtype", ["uint8", ">i8", "int32"])
    def test_labels_of_any_integers(self, tmp_path: Path, dtype: str) -> None:
        save(tmp_path / "fog.npy", pixels(rows=10))
        save(tmp_path / "labels.npy", np.array([7, 3] * 5, dtype))
        source = published_sets(str(tmp_path))[0][4].open(config=CONFIG)
        assert [row["label"] for row in rows(source)] == [7, 3]

    def test_the_second_format_version_is_read_as_well(self, tmp_path: Path) -> None:
        with (tmp_path / "fog.npy").open("wb") as file:
            np.lib.format.write_array(file, pixels(rows=5), version=(2, 0))
        save(tmp_path / "labels.npy", labels(5))
        (row,) = rows(published_sets(str(tmp_path))[0][3].open(config=CONFIG))
        assert np.array_equal(decode(row["image"]), pixels(rows=5)[3])

    def test_units_are_small_in_rows_and_bytes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        count = 2 * UNIT_ROWS + 1
        array = pixels(rows=5 * count, size=(2, 2))
        save(tmp_path / "snow.npy", array)
        save(tmp_path / "labels.npy", labels(5 * count))
        (item,) = [item for item in published_sets(str(tmp_path))[0] if item.severity == 2]
        source = item.open(config=CONFIG)
        assert [len(read_unit(source.reader, unit)) for unit in source.units] == [UNIT_ROWS, UNIT_ROWS, 1]
        assert np.array_equal([decode(row["image"]) for row in rows(source)], array[count : 2 * count])
        monkeypatch.setattr(corrupted, "TABLE_BYTES", 1200)
        assert {len(read_unit(source.reader, unit)) for unit in item.open(config=CONFIG).units[:-1]} == {100}

    def test_a_unit_reads_the_bytes_of_its_rows_alone(
        self, cifar: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reads: list[tuple[int, int]] = []

        class Spy:
            def __init__(self, path: str) -> None:
                self.file = open(path, "rb")  # noqa: SIM115

            def __enter__(self) -> Spy:
                return self

            def __exit__(self, *error: object) -> None:
                self.file.close()

            def read_at(self, size: int, offset: int) -> bytes:
                reads.append((size, offset))
                self.file.seek(offset)
                return self.file.read(size)

        source = published_sets(str(cifar))[0][1].open(config=CONFIG)
        monkeypatch.setattr(arrays, "open_input", Spy)
        unit = json.dumps({"rows": [3, 4, 5, 9, 39], "labels": [0, 1, 2, 3, 4]})
        read = [decode(row.image) for row in source.reader.rows(unit) if row.image]
        assert np.array_equal(read, pixels(1)[N:][[3, 4, 5, 9, 39]])
        row_bytes, start = 8 * 6 * 3, 128 + N * 8 * 6 * 3
        assert reads == [(n * row_bytes, start + row * row_bytes) for n, row in ((3, 3), (1, 9), (1, 39))]

    def test_a_file_that_went_bad_after_opening_is_rows_with_reasons(self, cifar: Path) -> None:
        source = published_sets(str(cifar))[0][4].open(config=CONFIG)
        path = cifar / "gaussian_noise.npy"
        os.truncate(path, path.stat().st_size - 1)
        read = rows(source)
        assert {row["error"] for row in read} == {"npy: the file is shorter than it was at the start"}
        path.unlink()
        read = rows(source)
        assert all(row["image"] is None and "No such file" in row["error"] for row in read)
        assert [row["label"] for row in read] == labels()[:N].tolist()


class TestFolders:
    @pytest.mark.parametrize("group", ["", "noise/"])
    def test_severities_that_are_there_with_class_folders_as_labels(self, tmp_path: Path, group: str) -> None:
        places = (f"{group}shot_noise/5", f"{group}shot_noise/2", f"{group}gaussian_noise/1")
        sets, notes = published_sets(str(write_imagenet(tmp_path / "ImageNet C", *places)))
        assert pairs(sets) == [("gaussian_noise", 1), ("shot_noise", 2), ("shot_noise", 5)]
        assert notes == []
        for item in sets:
            source = item.open(config=CONFIG)
            assert source.name == f"ImageNet-C-{item.corruption}-{item.severity}"
            assert (source.kind, source.label_names) == ("folder", ("n01440764", "n01443537"))
            read = rows(source)
            assert {row["id"]: row["label"] for row in read} == {
                f"{('n01440764', 'n01443537')[seed % 2]}/{seed}.{'jpeg' if seed < 4 else 'png'}": seed % 2
                for seed in range(8)
            }
            images = {row["id"]: row["image"] for row in read}
            assert np.array_equal(decode(images["n01443537/5.png"]), pixels(5, rows=1)[0])

    def test_nothing_is_listed_before_it_is_opened(self, tmp_path: Path) -> None:
        write_imagenet(tmp_path, "blur/glass_blur/1")
        (tmp_path / "blur/glass_blur/2").mkdir()
        sets, _ = published_sets(str(tmp_path))
        assert pairs(sets) == [("glass_blur", 1), ("glass_blur", 2)]
        with pytest.raises(ValueError, match="glass_blur/2: the folder holds nothing"):
            sets[1].open(config=CONFIG)
        write_image(tmp_path / "blur/glass_blur/2/loose.png", 0)
        with pytest.raises(ValueError, match="2: the images lie in no class folders"):
            sets[1].open(config=CONFIG)

    def test_what_is_left_out_is_told(self, tmp_path: Path) -> None:
        write_imagenet(
            tmp_path, "blur/glass_blur/1", "blur/my_blur/1", "fog/3", "fog/6", "mine/1", ".hidden/1"
        )
        (tmp_path / "frost").mkdir()
        (tmp_path / "README.txt").write_text("about")
        save(tmp_path / "my_noise.npy", pixels())
        sets, notes = published_sets(str(tmp_path))
        assert pairs(sets) == [("fog", 3), ("glass_blur", 1)]
        assert notes == [
            f"left out of {tmp_path}: 5 names of no known corruption or severity "
            "(my_noise.npy, blur/my_blur, mine, fog/6, frost)"
        ]


class TestBoth:
    @pytest.mark.parametrize("layout", ["cifar", "imagenet"])
    def test_a_limit_takes_the_same_images_of_each_set(
        self, cifar: Path, tmp_path: Path, layout: str
    ) -> None:
        folder = write_imagenet(tmp_path / "c", "fog/1", "fog/5", "noise/shot_noise/1")
        path = cifar if layout == "cifar" else folder

        def chosen(limit: int) -> list[str]:
            sources = [item.open(config=CONFIG, limit=limit) for item in published_sets(str(path))[0]]
            ids = [
                [
                    row["id"].removeprefix(f"{source.name.removeprefix('CIFAR-10-C-')}-")
                    for row in rows(source)
                ]
                for source in sources
            ]
            assert all(names == sorted(names) == ids[0] for names in ids)
            return ids[0]

        larger, smaller = chosen(6), chosen(3)
        assert (len(larger), len(smaller)) == (6, 3)
        assert set(smaller) < set(larger)
        assert larger not in ([f"{row:05d}" for row in range(6)], chosen(8)[:6])

    def test_labels_and_pixels_belong_to_the_chosen_images(self, cifar: Path) -> None:
        for item in published_sets(str(cifar))[0][:5]:
            for row in rows(item.open(config=CONFIG, limit=7)):
                place = (item.severity - 1) * N + int(row["id"][-5:])
                assert row["label"] == labels()[place]
                assert np.array_equal(decode(row["image"]), pixels(1)[place])

    def test_a_file_uri_is_read_like_its_path(self, cifar: Path, tmp_path: Path) -> None:
        folder = write_imagenet(tmp_path / "with space", "noise/shot_noise/4")
        for path in (cifar, folder):
            by_path, by_uri = (published_sets(p)[0] for p in (str(path), path.as_uri() + "/"))
            assert pairs(by_uri) == pairs(by_path)
            for a, b in zip(by_path, by_uri, strict=True):
                first, second = a.open(config=CONFIG), b.open(config=CONFIG)
                assert (first.name, first.identity) == (second.name, second.identity)
                assert rows(first) == rows(second)

    def test_identity_tells_sets_apart_and_survives_a_move(self, tmp_path: Path) -> None:
        folder = tmp_path / "a"
        write_imagenet(folder, "fog/1", "fog/2", "snow/1")
        for corruption in ("frost", "contrast"):
            save(folder / f"{corruption}.npy", pixels())
        save(folder / "labels.npy", labels())
        for path in folder.rglob("*.*"):
            os.utime(path, (1, 1))  # as unpacked from a tar: sizes, names and times are all alike

        def identities(path: Path) -> list[dict[str, Any]]:
            sets = published_sets(str(path))[0]
            return [item.open(config=CONFIG, limit=n).identity for item in sets for n in (None, 5)]

        before = identities(folder)
        assert len({json.dumps(identity) for identity in before}) == 2 * (3 + 2 * 5)
        assert str(tmp_path) not in json.dumps(before)
        folder = folder.rename(tmp_path / "b")
        assert identities(folder) == before == json.loads(json.dumps(before))
        os.utime(folder / "labels.npy", (2, 2))
        changed = [old != new for old, new in zip(before, identities(folder), strict=True)]
        assert sum(changed) == 2 * 2 * 5


class TestBadInput:
    def message(self, path: Path | str) -> str:
        with pytest.raises(ValueError) as caught:
            published_sets(str(path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_paths(self, tmp_path: Path, cifar: Path) -> None:
        assert "nowhere: no such path" in self.message(tmp_path / "nowhere")
        assert "nowhere: no such path" in self.message((tmp_path / "nowhere").as_uri())
        assert "cannot be listed" in self.message("gopher://nowhere/x")
        assert "a file, where a folder" in self.message(cifar / "labels.npy")

    def test_neither_layout(self, tmp_path: Path) -> None:
        neither = (
            "no published corrupted data set; there should be folders CORRUPTION/SEVERITY/CLASS of images"
        )
        assert neither in self.message(tmp_path)
        write_imagenet(tmp_path, "val/1", "fog/0")
        save(tmp_path / "labels.npy", labels())
        save(tmp_path / "test.npy", pixels())
        message = self.message(tmp_path)
        assert neither in message
        assert "one of gaussian_noise, shot_noise" in message

    def test_a_set_that_is_there_twice(self, cifar: Path) -> None:
        write_imagenet(cifar, "extra/saturate/3")
        assert "saturate of severity 3 is there twice, as extra/saturate/3 and saturate.npy" in self.message(
            cifar
        )

    def test_labels(self, cifar: Path) -> None:
        path = cifar / "labels.npy"
        for array, what in (
            (labels(10), "labels.npy: 10 labels, but the images are 200"),
            (labels().astype(float), "labels.npy: float64 (200,), where a list of integers"),
            (labels() > 3, "labels.npy: bool (200,), where"),
            (labels()[:, None], "int64 (200, 1), where"),
            (labels() - 5, "labels from -5 to 4 are not"),
            (labels() + 2**40, "are not numbers of classes"),
            (np.sort(labels()), "not the same for each of the five severities"),
            (labels().astype(object), "holds Python objects, which are never unpickled"),
        ):
            save(path, array)
            assert what in self.message(cifar)
        path.unlink()
        assert "labels.npy: no such file" in self.message(cifar)

    def test_arrays(self, cifar: Path) -> None:
        path = cifar / "saturate.npy"
        for array, what in (
            (pixels(rows=201), "201 rows of 6x8 pixels are not five severities"),
            (pixels(rows=0), "0 rows of 6x8 pixels"),
            (pixels(size=(8, 0)), "200 rows of 0x8 pixels"),
            (pixels(rows=100), "200 labels, but the images are 100"),
            (pixels().astype(np.float32), "float32 (200, 8, 6, 3) in C order, not uint8"),
            (pixels()[..., :1], "uint8 (200, 8, 6, 1) in C order"),
            (pixels()[..., 0], "uint8 (200, 8, 6) in C order"),
            (np.asfortranarray(pixels()), "uint8 (200, 8, 6, 3) in Fortran order"),
        ):
            save(path, array)
            message = self.message(cifar)
            assert message.startswith(str(path if "labels" not in what else cifar / "labels.npy"))
            assert what in message

    def test_damaged_files(self, cifar: Path) -> None:
        path = cifar / "saturate.npy"
        whole = path.read_bytes()
        header = whole.index(b"}")
        for data, what in (
            (
                whole[:-1],
                f"cut or damaged, as it has {len(whole) - 1} bytes and its header says {len(whole)}",
            ),
            (whole + b"x", "cut or damaged"),
            (whole[:128], "cut or damaged"),
            (whole[:50], "not a .npy file that can be read"),
            (b"", "not a .npy file that can be read"),
            (b"PK\3\4" + whole, "not a .npy file that can be read"),
            (whole[:6] + b"\7" + whole[7:], "can be read (format version 7.0)"),
            (whole[:8] + b"\xff\xff" + whole[10:], "not a .npy file that can be read"),
            (whole.replace(b"{", b"(", 1), "not a .npy file that can be read"),
            (whole[:10] + b"(" * (header - 9) + whole[header + 1 :], "not a .npy file that can be read"),
            (whole.replace(b"(200, 8, 6, 3)", b"(-20, 8, 6, 3)"), "cut or damaged"),
        ):
            path.write_bytes(data)
            assert what in self.message(cifar)
        path.write_bytes(whole)
        assert len(published_sets(str(cifar))[0]) == 10

    def test_nothing_is_unpickled(self, cifar: Path, tmp_path: Path) -> None:
        trap = Trap(tmp_path / "sprung")
        path = save(cifar / "saturate.npy", np.array([trap] * 5, object))
        assert "holds Python objects, which are never unpickled" in self.message(cifar)
        path.write_bytes(pickle.dumps(trap))
        assert "not a .npy file that can be read" in self.message(cifar)
        assert not (tmp_path / "sprung").exists()

    def test_limits(self, cifar: Path, tmp_path: Path) -> None:
        for path in (cifar, write_imagenet(tmp_path / "c", "fog/1")):
            with pytest.raises(ValueError, match="the limit must be at least 1, not 0"):
                published_sets(str(path))[0][0].open(config=CONFIG, limit=0)


class Trap:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)
