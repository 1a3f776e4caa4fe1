"""A probe outside of lpclip: other programs give the probabilities that lpclip gives."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from conftest import ROOT
from open_clip_train import zero_shot
from PIL import Image

import lpclip
from lpclip.config import EncoderConfig, ExportJob, PredictJob, UserError, to_dict
from lpclip.encoders.again import config_again
from lpclip.encoders.zero_shot import load_noting
from lpclip.jobs.evaluate_probes import load_probes
from lpclip.jobs.export import export_job
from lpclip.jobs.predict import predict_job
from lpclip.method.probe import Probe, load_probe
from lpclip.serving import onnx_file
from lpclip.serving.classifier import Classifier
from lpclip.serving.model_card import model_card

NAMES = ("golden retriever", "tabby cat", 'a "fox", red', "ice bear", "axolotl")
PAGE = (ROOT / "docs/export.md").read_text()


def make_probe(
    folder: Path, name: str, *, views: str = "weak,mirror,strong", precision: str = "float32"
) -> str:
    """A saved probe with random weights, of lite or of an encoder with random weights."""
    from lpclip.encoders.open_clip import register

    torch.manual_seed(0)
    pretrained = None
    if name != "lite":
        import open_clip

        folder.mkdir(parents=True, exist_ok=True)
        pretrained = str(folder / "weights.pt")
        torch.save(open_clip.create_model(register(name)).state_dict(), pretrained)
    config = EncoderConfig(encoder=name, pretrained=pretrained, precision="float32", engine="torch")
    _, info = load_noting(config, device="cpu")
    probe = Probe(
        weight=5 * torch.randn(len(NAMES), info.identity["dim"]),
        bias=torch.randn(len(NAMES)),
        temperature=1.7,
        class_names=NAMES,
        encoder={
            "config": to_dict(config),
            "identity": {**info.identity, "precision": precision},
            "views": views,
            "templates": ["a photo of a {}."],
            "logit_scale": info.logit_scale,
        },
        summary={"method": "self-trained", "images": 60},
    )
    probe.save(str(folder / "probe"))
    return str(folder / "probe")


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved probe of lite."""
    return make_probe(tmp_path_factory.mktemp("lite"), "lite")


def expected(probe: str, pixels: np.ndarray) -> np.ndarray:
    """The probabilities that lpclip gives."""
    classifier = Classifier.load(probe, engine="torch", num_threads=1)
    return classifier.probe.predict_proba(classifier.features(pixels))


@pytest.mark.parametrize(
    ("name", "views"), [("lite", "weak,mirror"), ("tiny-32", "weak"), ("tiny-vit-32", "mirror,weak")]
)
def test_a_graph_gives_the_probabilities_of_lpclip(name: str, views: str, tmp_path: Path) -> None:
    probe, out = make_probe(tmp_path, name, views=views), tmp_path / "new" / "model.onnx"
    export_job(ExportJob(probe=probe, out=str(out), float16=True))
    known = load_probe(probe)
    size = known.encoder["identity"]["preprocess"]["size"]
    for path, tolerance in ((out, 1e-4), (out.with_suffix(".float16.onnx"), 1e-2)):
        session = onnxruntime.InferenceSession(path)
        for count in (1, 5):
            pixels = np.random.default_rng(count).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
            probabilities, features = session.run(None, {"pixels": pixels})
            np.testing.assert_allclose(probabilities, expected(probe, pixels), atol=tolerance)
            np.testing.assert_array_equal(features, features.astype(np.float16))
    if name != "lite":  # the text tower, here the larger part, is left out
        assert out.stat().st_size < 0.6 * (tmp_path / "weights.pt").stat().st_size
    assert out.with_suffix(".float16.onnx").stat().st_size < 0.65 * out.stat().st_size
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == list(NAMES)
    assert json.loads(about["encoder"]) == known.encoder["identity"]
    assert about["probe"] == json.loads(Path(probe, "probe.json").read_text())["digest"]
    assert (about["lpclip"], about["weights"]) == (lpclip.__version__, "float16")
    assert str(tmp_path) not in json.dumps(about)


def photos(folder: Path) -> list[Path]:
    """Images of which each needs another step: reduced decoding, an orientation, enlarging, grey, an odd margin."""
    rng = np.random.default_rng(3)
    tall = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize((1301, 1807))
    tall.save(folder / "large.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    tall.resize((331, 205)).save(folder / "turned.jpg", exif=exif)
    tall.resize((40, 31)).save(folder / "small.png")
    tall.convert("L").resize((200, 333)).save(folder / "grey.png")
    return sorted(folder.iterdir())


def test_the_program_of_the_page_labels_images_without_lpclip_and_torch(lite: str, tmp_path: Path) -> None:
    out, images, packages = tmp_path / "model.onnx", tmp_path / "images", tmp_path / "packages"
    images.mkdir()
    packages.mkdir()
    paths = photos(images)
    # As a user does, and without a Ray that would take seconds.
    command = [sys.executable, ROOT / "jobs/export.py", "--probe", lite, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("numpy", "onnxruntime", "PIL"):
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        home = Path(spec.origin).parent
        # Wheels have their shared libraries beside the package.
        for part in [home, *home.parent.glob(f"{'pillow' if name == 'PIL' else name}.libs")]:
            (packages / part.name).symlink_to(part)
    (program,) = re.findall(r"^```python\n(import json, sys\n.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "label.py").write_text(program)
    environment = {"PYTHONPATH": str(packages), "PATH": ""}
    alone = [sys.executable, "-S"]
    for absent in ("torch", "lpclip"):
        command = [*alone, "-c", f"import {absent}"]
        assert subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, check=False
        ).returncode
    done = subprocess.run(
        [*alone, "label.py", out, *paths],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = Classifier.load(lite, engine="torch", num_threads=1)([path.read_bytes() for path in paths])
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [(path, label) for path, label, _ in lines] == [
        (str(path), answer.labels[0]) for path, answer in zip(paths, answers, strict=True)
    ]
    np.testing.assert_allclose(
        [float(found) for _, _, found in lines], [answer.probabilities[0] for answer in answers], atol=1e-4
    )
    assert len({answer.probabilities[0] for answer in answers}) == len(paths)
    done = subprocess.run(
        [*alone, "label.py", out],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "usage: python label.py MODEL.onnx IMAGE ...\n")


def test_a_graph_with_other_probabilities_is_not_written(
    lite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "MAX_DIFFERENCE", {"float32": -1.0})
    with pytest.raises(UserError, match="not written: onnxruntime gives probabilities that differ"):
        export_job(ExportJob(probe=lite, out=str(tmp_path / "model.onnx")))
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named_with_the_command_that_brings_it(
    lite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnx onnxruntime"):
        export_job(ExportJob(probe=lite, out=str(tmp_path / "model.onnx")))


def test_another_precision_is_told_and_another_encoder_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = make_probe(tmp_path, "tiny-vit-32", precision="bfloat16")
    export_job(ExportJob(probe=probe, out=str(tmp_path / "model.onnx")))
    assert "trained on features in bfloat16, and the graph computes float32" in capsys.readouterr().out
    changed = load_probe(probe)
    other = {**changed.encoder["identity"], "weights": "0" * 32}
    replace(changed, encoder={**changed.encoder, "identity": other}).save(probe)
    with pytest.raises(UserError, match="they differ in weights"):
        export_job(ExportJob(probe=probe, out=str(tmp_path / "other.onnx")))
    assert not (tmp_path / "other.onnx").exists()


def test_a_probe_of_an_earlier_version_and_a_checkpoint_that_has_moved_are_exported(tmp_path: Path) -> None:
    probe = Path(make_probe(tmp_path, "tiny-vit-32"))
    text = json.loads((probe / "probe.json").read_text())
    digest = text.pop("digest")
    (probe / "probe.json").write_text(json.dumps(text))
    (tmp_path / "weights.pt").rename(tmp_path / "moved.pt")
    out = tmp_path / "model.onnx"
    export_job(ExportJob(probe=str(probe), out=str(out), pretrained=str(tmp_path / "moved.pt")))
    assert onnxruntime.InferenceSession(out).get_modelmeta().custom_metadata_map["probe"] == digest
    export_job(ExportJob(probe=str(probe), out=str(tmp_path / "hub")))
    assert load_probe(str(tmp_path / "hub")).class_names == NAMES
    assert digest in (tmp_path / "hub" / "README.md").read_text()


@pytest.mark.parametrize("missing", ["views", "config"])
def test_a_probe_of_features_from_elsewhere_is_refused_wherever_it_would_need_its_encoder(
    missing: str, lite: str, tmp_path: Path
) -> None:
    known = load_probe(lite)
    encoder = {key: value for key, value in known.encoder.items() if key != missing}
    folder, out = str(tmp_path / "probe"), str(tmp_path / "out")
    replace(known, encoder=encoder).save(folder)
    for use in (
        lambda: export_job(ExportJob(probe=folder, out=out)),
        lambda: predict_job(PredictJob(probe=folder, data=("photos",), out=f"{out}.parquet")),
        lambda: load_probes((folder,)),
        lambda: Classifier.load(folder),
    ):
        with pytest.raises(UserError, match="does not say how its encoder sees images"):
            use()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [({"out": "model", "float16": True}, "--float16 is for an ONNX graph"), ({"out": ""}, "--out is empty")],
)
def test_flags_that_make_no_sense_are_refused(flags: dict[str, object], reason: str, lite: str) -> None:
    with pytest.raises(UserError, match=reason):
        export_job(ExportJob(probe=lite, **flags))


def test_a_folder_in_the_place_of_a_file_is_refused(lite: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(UserError, match="is a folder, and a file is written"):
        export_job(ExportJob(probe=lite, out=str(tmp_path / "model.onnx")))


def hostile(folder: Path, probe: str) -> tuple[str, tuple[str, ...]]:
    """A probe in a run's folder, whose names of classes and data mean something in Markdown, HTML or YAML."""
    names = (
        "--- \nlicense: mit",
        "<script>alert(1)</script> | ~~~~",
        "[x](http://evil.example) www.evil.example",
        "# d",
        "*e*",
    )
    data = "![](http://evil.example) <img src=x> | `a`"
    known = load_probe(probe)
    replace(known, class_names=names).save(str(folder / "probe"))
    metrics = {"accuracy": 0.5, "mean_recall": 0.25, "ece": 0.125, "nll": 1.5}
    summary = {
        "zero_shot": metrics,
        "probe": {**metrics, "accuracy": 0.75},
        "evaluated_on": {"data": data, "images": 40, "setting": "transductive", "shared": 40},
        "prior": {"name": "weak", "absent": [names[1]]},
        "classes": list(names),
        "encoder": known.encoder["identity"],
        "features": {"train": f"/private/place/{data.replace('/', '')}-0123456789ab", "eval": None},
        "versions": {"lpclip": "0.1.0"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder / "probe"), names


def test_a_folder_for_the_hub_holds_the_probe_as_it_is_and_a_card_of_plain_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from markdown_it import MarkdownIt

    probe, names = hostile(tmp_path, make_probe(tmp_path / "made", "tiny-vit-32"))
    out = tmp_path / "hub"
    for _ in range(2):  # its own files are written again
        export_job(ExportJob(probe=probe, out=str(out)))
        (out / ".gitattributes").write_text("")
    assert f"holds paths of this machine: {tmp_path}/made/weights.pt" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} - {".gitattributes"} == {
        "README.md",
        "config.json",
        "probe.json",
        "probe.safetensors",
    }
    for name in ("probe.json", "probe.safetensors"):
        assert (out / name).read_bytes() == Path(probe, name).read_bytes()
    assert load_probe(str(out)).class_names == names
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {str(place): name for place, name in enumerate(names)}
    assert [config["label2id"][name] for name in names] == [0, 1, 2, 3, 4]
    assert (config["library_name"], config["encoder"], config["pretrained"]) == (
        "lpclip",
        "tiny-vit-32",
        None,
    )
    _, front, card = (out / "README.md").read_text().split("---\n", 2)
    assert set(yaml.safe_load(front)) == {"library_name", "pipeline_tag", "tags"}
    for text in (front + card, json.dumps(config)):
        assert str(tmp_path) not in text
        assert "/private" not in text
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(card)
    kinds = {part.type for token in tokens for part in (token, *(token.children or ()))}
    assert not kinds & {"html_block", "html_inline", "image", "link_open"}
    (shown,) = (
        json.loads(token.content) for token in tokens if token.type == "fence" and token.info == "json"
    )
    assert shown == list(names)
    for said in (
        "transductive",
        "40 labelled images",
        "| this probe | 75.0 |",
        "self-trained",
        "not published here",
    ):
        assert said in card


CHANCE = {"agreement": 0.9, "kappa": 0.7, "entropy": 0.9, "confidence": 0.2, "chance": 0.3}


@pytest.mark.parametrize(
    ("method", "tried", "said", "unsaid"),
    [
        ("zero-shot (fallback)", CHANCE, ("fit these images no better than random ones",), ("repeated",)),
        (
            "zero-shot (fallback)",
            {**CHANCE, "kappa": 0.1, "chance": 0.1},
            ("the halves hardly confirm them",),
            ("random",),
        ),
        ("zero-shot (fallback)", {"kappa": 0.1}, ("not trusted\\*\\*\\. This is",), ("halves",)),
        ("zero-shot (chosen by a sweep)", CHANCE, ("fit these images no better than random ones",), ()),
        ("self-trained", {**CHANCE, "chance": 0.1}, ("repeated enough",), ("not trusted",)),
    ],
)
def test_a_card_gives_the_reason_of_the_training_itself(
    method: str, tried: dict[str, float], said: tuple[str, ...], unsaid: tuple[str, ...], lite: str
) -> None:
    summary = {"method": method, "training": {"solver": "gaussian", "rounds": 20, "seed": 7}, "rounds": 21}
    trusted = method == "self-trained"
    prior = {"name": "weak", "trusted": trusted, "absent": [NAMES[1]], "tried": {"weak": tried}}
    run = {"prior": prior, "versions": {"lpclip": "0.1.0"}}
    card = model_card(replace(load_probe(lite), summary=summary), name="probe", run=run, digest="0" * 64)
    for text in said:
        assert re.search(text, card)
    rows = ("| solver |", "| rounds run |", "| class prior |", "| seed |", "No images were found of these")
    for text in rows:
        assert (text in card) == trusted
    for text in unsaid:
        assert text not in card
    assert ("21\\: 20, and one more for the last student, with the strong views" in card) == trusted


def test_a_card_claims_nothing_of_a_training_that_nothing_is_known_of(lite: str) -> None:
    known = load_probe(lite)
    for summary, name, said in (
        ({}, "probe", "| method | unknown |"),
        ({}, "zero_shot", "| method | zero-shot |"),
        (known.summary, "probe", "is unknown"),
    ):
        card = model_card(replace(known, summary=summary), name=name, run=None, digest="0" * 64)
        assert said in card
        assert "repeated enough" not in card


def test_a_card_says_what_the_guard_decided_and_nothing_of_another_run(lite: str, tmp_path: Path) -> None:
    fallen = replace(load_probe(lite), summary={"method": "zero-shot (fallback)", "images": 60})
    fallen.save(str(tmp_path / "probe"))
    (tmp_path / "summary.json").write_text(
        json.dumps({"classes": ["others"], "encoder": {}, "probe": {"accuracy": 1}})
    )
    export_job(ExportJob(probe=str(tmp_path / "probe"), out=str(tmp_path / "hub")))
    card = (tmp_path / "hub" / "README.md").read_text()
    for said in ("The training was not trusted", "no labelled images", "lite, is not CLIP", "non-commercial"):
        assert said in card


def test_the_card_names_the_model_on_the_hub_that_it_rests_on(lite: str) -> None:
    known = load_probe(lite)
    for name, base in (("hf-hub:owner/model", "owner/model"), ("hf-hub:owner/model\nlicense: mit", None)):
        encoder = {**known.encoder, "identity": {**known.encoder["identity"], "name": name}}
        card = model_card(replace(known, encoder=encoder), name="probe", run=None, digest="0" * 64)
        front = yaml.safe_load(card.split("---\n")[1])
        assert front.get("base_model") == base
        assert "license" not in front


def test_the_line_to_upload_with_is_fit_for_a_shell_and_the_probe_itself_is_no_place(
    lite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_job(ExportJob(probe=lite, out=str(tmp_path / "demo hub")))
    assert f"`hf upload OWNER/NAME '{tmp_path}/demo hub'`" in capsys.readouterr().out
    (tmp_path / "link").symlink_to(lite)
    for out in (lite, f"{lite}/../probe/", str(tmp_path / "link")):
        with pytest.raises(UserError, match="is the probe's own folder"):
            export_job(ExportJob(probe=lite, out=out))
    assert {path.name for path in Path(lite).iterdir()} == {"probe.json", "probe.safetensors"}


@pytest.mark.parametrize(
    ("out", "form"), [("x.ONNX", "onnx"), ("x.Onnx", "onnx"), ("x.SAFETENSORS", "open_clip"), ("X", "folder")]
)
def test_capitals_in_the_end_of_a_name_mean_the_same(out: str, form: str) -> None:
    assert ExportJob(probe="probe", out=out).form == form


def test_a_checkpoint_that_is_not_there_is_named_with_the_flag_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    probe = str(tmp_path / make_probe(Path("oc probe"), "tiny-vit-32"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    relative = r"checkpoint oc probe/weights\.pt, which is not there from this folder: .* --pretrained"
    with pytest.raises(UserError, match=relative):
        export_job(ExportJob(probe=probe, out="x.onnx"))
    with pytest.raises(UserError, match=relative):
        Classifier.load(probe, engine="torch")
    probe = make_probe(tmp_path / "other", "tiny-vit-32")
    (tmp_path / "other" / "weights.pt").unlink()
    with pytest.raises(UserError, match=r"other/weights\.pt, which is not there: .* --pretrained"):
        export_job(ExportJob(probe=probe, out="x.onnx"))
    known = load_probe(probe).encoder
    # The machine with the GPU may have it.
    assert config_again(known, on_gpu=True).pretrained == str(tmp_path / "other" / "weights.pt")


def test_a_folder_with_other_files_is_left_alone(lite: str, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holds other files, such as photo\.jpg"):
        export_job(ExportJob(probe=lite, out=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_the_program_of_the_page_gives_open_clip_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = make_probe(tmp_path, "tiny-vit-32", views="weak")
    known, images = load_probe(probe), tmp_path / "labelled"
    export_job(ExportJob(probe=probe, out=str(tmp_path / "pets.safetensors")))
    assert "calls lpclip.encoders.open_clip.register('tiny-vit-32')" in capsys.readouterr().out
    for name in NAMES:
        (images / name).mkdir(parents=True)
    paths = photos(tmp_path / "labelled" / NAMES[0])
    classifier = Classifier.load(probe, engine="torch", num_threads=1)
    answers = classifier([path.read_bytes() for path in paths])
    for path, answer in zip(paths, answers, strict=True):
        # Three of four images lie where lpclip's label says, the last one elsewhere.
        place = NAMES.index(answer.labels[0]) + (path == paths[-1])
        path.rename(images / NAMES[place % len(NAMES)] / path.name)
    for name in NAMES:  # torchvision refuses a folder without images
        if not list((images / name).iterdir()):
            (images / name).rmdir()
    programs = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (program,) = (program for program in programs if "open_clip" in program)
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    with pytest.raises(RuntimeError, match=r"clip\.safetensors"):  # no random weights
        exec(program, {})
    exec(program.replace("clip.safetensors", f"{tmp_path}/weights.pt"), space)
    assert capsys.readouterr().out.endswith("75.0%\n")
    # open_clip's own count of right answers does not know NumPy 2.4.
    monkeypatch.setattr(
        zero_shot, "accuracy", lambda found, true, topk: [float((found.argmax(1) == true).sum())] * 2
    )
    loader, args = (
        torch.utils.data.DataLoader(space["data"], batch_size=3),
        SimpleNamespace(device="cpu", precision="fp32", batch_size=3),
    )
    assert zero_shot.run(space["model"], space["classifier"], loader, args)[0] == 0.75
    batch = torch.stack([image for image, _ in space["data"]])
    with torch.inference_mode():
        features = space["model"](batch)["image_features"]
    assert space["classifier"].shape == (known.weight.shape[1] + 1, len(NAMES))
    found = torch.softmax(100 * features @ space["classifier"], dim=1).numpy()
    np.testing.assert_allclose(found, known.predict_proba(features[:, :-1]), atol=1e-5)
    order = [Path(path).name for path, _ in space["data"].samples]
    wanted = {path.name: answer for path, answer in zip(paths, answers, strict=True)}
    for name, row in zip(order, found, strict=True):
        # open_clip decodes JPEGs whole, and leaves them as they lie.
        if not name.endswith(".jpg"):
            np.testing.assert_allclose(np.sort(row)[::-1], wanted[name].probabilities, atol=1e-3)
    assert space["known"]["encoder"] == "tiny-vit-32"
    assert str(tmp_path) not in json.dumps(space["known"])
    make_probe(tmp_path, "tiny-vit-32", views="weak,mirror")
    export_job(ExportJob(probe=probe, out=str(tmp_path / "pets.safetensors")))
    assert "mean of an image and its mirror image" in capsys.readouterr().out


def test_open_clip_has_no_lite(lite: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lite, which open_clip does not have"):
        export_job(ExportJob(probe=lite, out=str(tmp_path / "pets.safetensors")))
    assert list(tmp_path.iterdir()) == []
