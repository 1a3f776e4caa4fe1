"""Files from others are read and never run: lpclip unpickles and evaluates nothing, and refuses what holds a pickle."""

from __future__ import annotations

import ast
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, Training, draw, refusal, run

# This import makes the type known to Arrow, as in every process of a job.
from ray.data.extensions.object_extension import ArrowPythonObjectType

from lpclip.config import SourceConfig, UserError
from lpclip.encoders.open_clip import register
from lpclip.encoders.weights import create_model, load_tokenizer
from lpclip.features.store import open_part
from lpclip.images.open import open_source
from lpclip.training.contrastive import resume_step
from lpclip.training.round_files import RoundFiles
from lpclip.training.trials import read_classifier

FOLDERS = ("lpclip", "jobs", "tune_spaces", "benchmarks")
UNPICKLING = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
RUNNING = {"eval", "exec", "run_path", "run_module", "system", "popen", "all_gather_object", "jit.load"}
EXCEPTIONS = {
    ("lpclip/encoders/weights.py", "pickle"),  # for the name of the error with which torch refuses one
    ("lpclip/training/search_space.py", "run_path"),  # a search space is a Python file, by its description
    ("lpclip/training/exchange.py", "all_gather_object"),  # between the workers of one training
}


def risks(code: str) -> Iterator[str]:
    """What in some code unpickles or runs what it is given."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = {
                part for name in (*modules, *(one.name for one in node.names)) for part in name.split(".")
            }
            yield from names & UNPICKLING
        elif isinstance(node, ast.Attribute) and node.attr in UNPICKLING:
            yield node.attr
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            # A method called eval is torch's own; the function of that name runs text.
            if called in RUNNING or any(called.endswith(f".{name}") for name in RUNNING - {"eval", "exec"}):
                yield called.rpartition(".")[2]
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            if called == "torch.load" and options.get("weights_only") != "True":
                yield called
            if called == "yaml.load":
                yield called
            unsafe = {
                "allow_pickle": "False",
                "shell": "False",
                "trust_remote_code": "False",
                "weights_only": "True",
            }
            yield from (name for name, safe in unsafe.items() if options.get(name, safe) != safe)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from ray import cloudpickle",
        "from joblib import load",
        "ray.cloudpickle.loads(x)",
        "eval(x)",
        "runpy.run_path(x)",
        "os.system(x)",
        "torch.jit.load(x)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x, allow_pickle=True)",
        "yaml.load(x, Loader=y)",
        "subprocess.run(x, shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=y)",
    ],
)
def test_the_search_finds(code: str) -> None:
    assert list(risks(code))


def test_nothing_is_unpickled_or_evaluated() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    found = {(str(path.relative_to(ROOT)), risk) for path in files for risk in risks(path.read_text())}
    assert found == EXCEPTIONS


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[bytes]:
    """A pickle that would write a file if anything loaded it; at the end of the test there is none."""

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    data = pickle.dumps(Bomb())
    pickle.loads(data)
    (tmp_path / "ran").unlink()
    yield data
    assert not (tmp_path / "ran").exists()


def objects(data: bytes, count: int) -> pa.Array:
    """A column of Ray's pickled objects. Arrow unpickles each as soon as Python asks for it."""
    dtype = ArrowPythonObjectType()
    return pa.ExtensionArray.from_storage(dtype, pa.array([data] * count, dtype.storage_type))


class TestFiles:
    @pytest.mark.parametrize("column", ["id", "image", "label", "struct"])
    def test_parquet_of_objects_is_refused_where_it_is_opened(
        self,
        column: str,
        bomb: bytes,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        path = write_parquet(tmp_path, column, bomb)
        said = refusal(f"encode.py --data {path} --out {tmp_path}/out", monkeypatch, capsys)
        assert "holds Python objects, which are never unpickled" in said or "not image bytes" in said

    @pytest.mark.parametrize("column", ["id", "struct"])
    def test_parquet_of_objects_is_quarantined_where_it_is_read(
        self, column: str, bomb: bytes, tmp_path: Path
    ) -> None:
        # The driver may open a file before Ray Data is imported: to Arrow, the column then holds bytes.
        name = ArrowPythonObjectType().extension_name
        path = write_parquet(tmp_path, column, bomb)
        pa.unregister_extension_type(name)
        try:
            source = open_source(str(path), config=SourceConfig())
        finally:
            pa.register_extension_type(ArrowPythonObjectType())
        (unit,) = source.units
        errors = [error for table in source.reader.tables(unit) for error in table["error"].to_pylist()]
        assert len(errors) == 2
        assert all("holds Python objects, which are never unpickled" in error for error in errors)

    def test_classes(
        self,
        bomb: bytes,
        photos: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "classes.txt").write_bytes(bomb)
        command = f"selftrain.py --data {photos} --classes {tmp_path}/classes.txt --out {tmp_path}/out"
        assert "classes.txt holds a byte of 0" in refusal(command, monkeypatch, capsys)


def write_parquet(folder: Path, column: str, bomb: bytes) -> Path:
    """Two images with a column of pickles; `struct` has them where images lie, in Hugging Face's layout."""
    columns = {
        "id": pa.array(["a", "b"]),
        "image": pa.array([draw(0, 0), draw(1, 1)]),
        "label": pa.array([0, 1]),
    }
    # With two pickles, for ids must differ.
    pickles = pa.concat_arrays([objects(bomb, 1), objects(bomb + b"\0", 1)])
    if column == "struct":
        columns["image"] = pa.StructArray.from_arrays([pickles, pa.array(["a", "b"])], ["bytes", "path"])
    else:
        columns[column] = pickles
    pq.write_table(pa.table(columns), folder / "images.parquet")
    return folder / "images.parquet"


class TestWhatJobsWrite:
    """Folders that somebody else wrote are as foreign as their images."""

    def test_probe(
        self,
        bomb: bytes,
        photos: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "probe.json").write_text("{}")
        (tmp_path / "probe.safetensors").write_bytes(bomb)
        command = f"predict.py --probe {tmp_path} --data {photos} --out {tmp_path}/labels.parquet"
        assert "probe.safetensors is damaged" in refusal(command, monkeypatch, capsys)

    def test_feature_store(self, bomb: bytes, tmp_path: Path) -> None:
        pq.write_table(pa.table({"id": objects(bomb, 2)}), tmp_path / "part-0.parquet")
        refused = "is damaged .column 'id' holds Python objects, which are never unpickled"
        with pytest.raises(UserError, match=refused), open_part(str(tmp_path), "part-0.parquet") as part:
            part.read()["id"].to_pylist()

    def test_rounds_trials_and_checkpoints(self, bomb: bytes, tmp_path: Path) -> None:
        for name in ("round-001", "trial", "state"):
            (tmp_path / f"{name}.safetensors").write_bytes(bomb)
        (tmp_path / "round-001.json").write_text("{}")
        folder = str(tmp_path)
        for name, read in (
            ("round-001", lambda: RoundFiles(folder).states()),
            ("trial", lambda: read_classifier(folder, "trial")),
            ("state", lambda: resume_step(folder)),
        ):
            with pytest.raises(UserError, match=f"{name}.safetensors is damaged"):
                read()

    @pytest.mark.slow
    def test_rays_own_record_of_a_sweep_is_not_read(
        self, bomb: bytes, trained: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = trained.summary["features"]["train"]
        command = f"tune.py --space quick --trials 2 --data {store} --classes tennis%20ball,stop%20sign,traffic%20cone"
        first = run(f"{command} --out {tmp_path}/first", monkeypatch)
        written = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first/ray").rglob("*.pkl")]
        assert written
        for path in written:
            (tmp_path / "second" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "second" / path).write_bytes(bomb)
        again = run(f"{command} --out {tmp_path}/second", monkeypatch)
        assert again["chosen"]["criterion"] == first["chosen"]["criterion"]


@pytest.mark.parametrize("asks", [True, False])
def test_code_beside_a_tokenizer_or_a_text_tower_is_not_run(asks: bool, tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    folder.mkdir()
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    mapped = {"AutoTokenizer": ["own.Tokenizer", None], "AutoConfig": "own.Config"}
    for name in ("tokenizer_config.json", "config.json"):
        (folder / name).write_text(json.dumps({"auto_map": mapped, "model_type": "own"}))
    config = open_clip.get_model_config("ViT-S-32")
    config["text_cfg"] = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder)}
    config["text_cfg"] |= {"tokenizer_kwargs": {"trust_remote_code": True}} if asks else {}
    (tmp_path / f"own-{asks}.json").write_text(json.dumps(config))
    name = register(str(tmp_path / f"own-{asks}.json"))
    with pytest.raises(UserError, match="the tokenizer of own.*custom code"):
        load_tokenizer(name)
    with pytest.raises(UserError, match="own.*custom code"):
        create_model(name, what=name, require_pretrained=False)
    assert not (tmp_path / "ran").exists()
