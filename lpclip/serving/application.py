"""A probe behind Ray Serve: the replicas, each a classifier, and the application that has them.

`lpclip.serving.door` stands before them in Ray Serve's proxy and answers the requests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import ray
from PIL import Image
from ray import serve
from ray.serve import Application

from lpclip import files
from lpclip.config import ServeJob, SourceConfig, UserError, check
from lpclip.encoders.hub import local_probe
from lpclip.serving.batches import IN_WORK, JsonAnswer
from lpclip.serving.classifier import Classifier
from lpclip.serving.door import DEPLOYMENT, Facts

DOOR = "lpclip.serving.door:middlewares"
DOOR_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Names the door to Ray Serve's proxy, in the environment in which Ray starts."""


class Replica:
    """A classifier in a process of its own."""

    def __init__(self, job: ServeJob, num_threads: int) -> None:
        self._job = job
        self._classifier = Classifier.load(
            job.probe,
            pretrained=job.pretrained,
            engine=job.engine,
            device=job.device,
            num_threads=num_threads,
            pass_size=1,
            limits=SourceConfig(max_pixels=job.max_pixels, max_bytes=job.max_bytes),
        )
        known = files.read_json(files.join(local_probe(job.probe), "probe.json"))
        self._digest: str | None = known.get("digest")
        # A first pass takes longer than others, and would be a user's.
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64)).save(buffer, "PNG")
        (answer,) = self._classifier([buffer.getvalue()])
        assert answer.error is None, answer.error

    async def classify(self, images: Sequence[bytes | UserError], top_k: Sequence[int]) -> list[JsonAnswer]:
        """The answers for images of several requests, each with a number of labels of its own."""
        # In a thread: the event loop has other batches, and questions for the facts.
        found = await asyncio.to_thread(self._classifier, images, top_k=max(top_k))
        answers: list[JsonAnswer] = []
        for one, k in zip(found, top_k, strict=True):
            if one.error is not None:
                answers.append({"error": one.error})
                continue
            labels, probabilities = one.labels[:k], one.probabilities[:k]
            answers.append(
                {
                    "label": labels[0],
                    "probability": probabilities[0],
                    "labels": labels,
                    "probabilities": probabilities,
                }
            )
        return answers

    async def facts(self) -> dict[str, Any]:
        """The fields of `Facts`."""
        job, info = self._job, self._classifier.info
        names = {field.name for field in dataclasses.fields(Facts)}
        return {
            **{name: value for name, value in dataclasses.asdict(job).items() if name in names},
            "encoder": info.name,
            "precision": info.identity["precision"],
            "engine": info.engine,
            "classes": self._classifier.probe.class_names,
            "probe": self._digest,
            "notes": self._classifier.notes,
        }

    async def __call__(self, request: Any) -> str:
        """Answer a request that comes from a proxy without the door."""
        return f"Ray was started without {DOOR_VARIABLE}={DOOR} in its environment: set it on all nodes"


def build(args: dict[str, Any]) -> Application:
    """The application with the flags of `lpclip serve` as arguments: `probe`, `replicas`, `device` and so on.

    Raises UserError for arguments that it does not know, or that are out of range.
    """
    names = [field.name for field in dataclasses.fields(ServeJob)]
    if others := args.keys() - set(names):
        raise UserError(f"args has {', '.join(sorted(others))}; it may have {', '.join(names)}")
    job = ServeJob(**args)
    check(job)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    on_gpu = job.device == "gpu" or (job.device == "auto" and gpus > 0)
    if on_gpu:
        replicas = job.replicas or max(1, gpus)
        resources = {"num_cpus": 1, "num_gpus": min(1.0, max(1, gpus) / replicas)}
    else:
        replicas = job.replicas or 1
        largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        resources = {"num_cpus": max(1, int(largest) // replicas)}
    job = dataclasses.replace(job, replicas=replicas, device="gpu" if on_gpu else "cpu")
    deployment: Any = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=replicas,
        ray_actor_options=resources,
        # Each proxy of a cluster counts its own batches, and a question for the facts waits for no batch.
        max_ongoing_requests=4 * IN_WORK,
        # So many seconds a replica that died may go unnoticed.
        health_check_period_s=2,
    )(Replica)
    return deployment.bind(job, resources["num_cpus"])
