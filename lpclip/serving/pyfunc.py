"""A probe as MLflow loads it: a table of images in, a table of labels out. Nothing here imports MLflow.

    FOLDER/probe/     the probe
    FOLDER/encoder/   the checkpoint of its encoder, where that was a file; published weights are found by their name

MLflow calls `_load_pyfunc` with this folder, so neither the model nor its code is pickled.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lpclip.config import Device, UserError
from lpclip.encoders.again import BESIDE
from lpclip.images.fetch import embedded, fetch_all, scheme, scheme_names
from lpclip.serving.classifier import Answer, Classifier

if TYPE_CHECKING:
    import pandas as pd

SCHEMES = "LPCLIP_SCHEMES"
"""Environment variable with the schemes that a model follows, for programs that load it without a configuration."""

TOP_K = 5
"""Labels of an image, where no other number is asked for."""

CONFIG: dict[str, Any] = {"schemes": "", "device": "auto", "num_threads": 0}
"""What a program that loads the model may set: comma-separated schemes to follow, the device (auto, cpu or gpu) and
the number of CPUs, 0 for all."""


class ProbeModel:
    """The model that MLflow calls."""

    def __init__(self, classifier: Classifier, *, schemes: str = "") -> None:
        """`schemes`, comma-separated, are those that are followed: file for paths, https, s3, ..."""
        self.classifier, self.schemes = classifier, tuple(scheme_names(schemes))

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A row of labels for each image in the column `image` of a table, or in its only column.

        An image is bytes, base64, or a path or URI of a scheme that is followed. The columns are label, probability,
        labels and probabilities (the `top_k` most probable, 5 by default), and error, which says in a line why an
        image has none of these. A cell may be a list of images: MLflow's server makes one of `inputs`. Raises UserError
        when there is no such column.
        """
        import pandas as pd

        top_k, images = (params or {}).get("top_k"), _images(model_input)
        if top_k is not None and top_k < 1:
            # MLflow's server would answer an exception with its own paths.
            answers = [Answer(error=f"top_k must be at least 1, not {top_k}")] * len(images)
        else:
            answers = self.classifier(self._read(images), top_k=int(top_k or TOP_K))
        found = pd.DataFrame([_row(answer) for answer in answers], columns=list(_row(Answer())))
        # A NaN where there is nothing would be no JSON.
        is_whole = found["label"].notna().all()
        return found if is_whole else found.astype(object).where(found.notna(), None)

    def _read(self, images: Sequence[Any]) -> list[bytes | Exception]:
        found = [self._known(image) for image in images]
        limits = self.classifier.limits
        fetched = fetch_all(
            [item for item in found if isinstance(item, str)],
            root=os.getcwd(),
            max_bytes=limits.max_bytes,
            schemes=self.schemes,
            timeout=limits.read_timeout,
        )
        return [next(fetched) if isinstance(item, str) else item for item in found]

    def _known(self, image: Any) -> bytes | str | Exception:
        """The bytes that are here already, the path or URI of others, or an error."""
        if isinstance(image, bytes | bytearray | memoryview):
            return bytes(image)
        if isinstance(image, os.PathLike):
            image = os.fspath(image)
        if not isinstance(image, str) or not image.strip():
            return UserError("no image in this row: it is bytes, base64, a path or a URI")
        data = embedded(image)
        if data is not None:
            return data
        if scheme(image) not in self.schemes:
            return UserError(
                f"{scheme(image)}:// is not followed: load the model with model_config={{'schemes': 'file,https'}}, or "
                f"set {SCHEMES}=file,https; images in base64 need neither"
            )
        return image


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> ProbeModel:
    """MLflow's way in. It takes the keys of CONFIG, with which the model is saved, and warns of others."""
    config = {**CONFIG, **(model_config or {})}
    device, num_threads, schemes = config["device"], config["num_threads"], config["schemes"]
    if device not in get_args(Device):
        raise UserError(
            f"model_config: device is {device!r}, and must be one of {', '.join(get_args(Device))}"
        )
    if not isinstance(num_threads, int) or num_threads < 0:
        raise UserError(f"model_config: num_threads is {num_threads!r}, and must be a number, 0 for all CPUs")
    if not isinstance(schemes, str):
        raise UserError(f"model_config: schemes is {schemes!r}, and must be a text such as 'file,https'")
    files = [file for file in sorted(Path(path, "encoder").glob("*")) if file.name != BESIDE]
    classifier = Classifier.load(
        str(Path(path, "probe")),
        pretrained=next((str(file) for file in files if file.suffix != ".json"), None),
        device=device,
        num_threads=num_threads or None,
    )
    return ProbeModel(classifier, schemes=schemes or os.environ.get(SCHEMES, ""))


def _images(model_input: Any) -> list[Any]:
    columns = getattr(model_input, "columns", None)
    if columns is None:
        cells = model_input
    elif "image" in columns or len(columns) == 1:
        cells = model_input["image" if "image" in columns else columns[0]]
    else:
        raise UserError(f"the table needs a column image, and has {', '.join(map(str, columns))}")
    return [image for cell in cells for image in (cell if isinstance(cell, list | tuple) else [cell])]


def _row(answer: Answer) -> dict[str, Any]:
    return {
        "label": answer.labels[0] if answer.labels else None,
        "probability": answer.probabilities[0] if answer.labels else None,
        "labels": list(answer.labels),
        "probabilities": list(answer.probabilities),
        "error": answer.error,
    }
