"""Ranges live beside the flags, and every job checks them before it starts anything."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray

from lpclip import config
from lpclip.config import (
    EncodeConfig,
    EncodeJob,
    EvaluateJob,
    PairsConfig,
    PredictJob,
    PretrainConfig,
    PretrainJob,
    SelfTrainingConfig,
    SelftrainJob,
    SourceConfig,
    TuneJob,
    UserError,
    check,
    counted,
    to_dict,
)
from lpclip.jobs.encode import encode_job
from lpclip.jobs.evaluate import evaluate_job
from lpclip.jobs.predict import predict_job
from lpclip.jobs.pretrain import pretrain_job
from lpclip.jobs.selftrain import selftrain_job
from lpclip.jobs.settle_prior import load_prior
from lpclip.jobs.tune import tune_job

PREDICT: dict[str, Any] = {"probe": "p", "data": ("d",), "out": "o.parquet"}
EVALUATE: dict[str, Any] = {"probe": ("p",), "data": ("d",)}
DEFAULTS = [
    EncodeJob(),
    SelftrainJob(),
    PretrainJob(),
    TuneJob(),
    EvaluateJob(**EVALUATE),
    PredictJob(**PREDICT),
]


@pytest.mark.parametrize("job", DEFAULTS, ids=lambda job: type(job).__name__)
def test_the_defaults_are_in_range(job: object) -> None:
    check(job)


@pytest.mark.parametrize(
    ("job", "sentence"),
    [
        (EncodeJob(limit=0), "--limit must be at least 1, not 0"),
        (EncodeJob(encode=EncodeConfig(batch_size=-1)), "--batch-size must be at least 1, not -1"),
        (EncodeJob(encode=EncodeConfig(num_actors=0)), "--num-actors must be at least 1, not 0"),
        (SelftrainJob(eval_limit=0), "--eval-limit must be at least 1, not 0"),
        (SelftrainJob(training=SelfTrainingConfig(temperature=0.0)), "--temperature must be above 0, not 0"),
        (
            SelftrainJob(training=SelfTrainingConfig(neighbours=-1)),
            "--neighbours must be at least 0, not -1",
        ),
        (
            SelftrainJob(source=SourceConfig(max_bad_fraction=1.5)),
            "--max-bad-fraction must be between 0 and 1",
        ),
        (SelftrainJob(source=SourceConfig(max_pixels=0)), "--max-pixels must be at least 1, not 0"),
        (SelftrainJob(source=SourceConfig(read_timeout=0.0)), "--read-timeout must be above 0, not 0"),
        (PretrainJob(source=PairsConfig(max_bytes=0)), "--max-bytes must be at least 1, not 0"),
        (PretrainJob(training=PretrainConfig(warmup=1.0)), "--warmup must be at least 0 and below 1, not 1"),
        (TuneJob(trials=0), "--trials must be at least 1, not 0"),
        (TuneJob(concurrent=0), "--concurrent must be at least 1, not 0"),
        (EvaluateJob(**EVALUATE, batch_size=0), "--batch-size must be at least 1, not 0"),
        (EvaluateJob(**EVALUATE, num_actors=0), "--num-actors must be at least 1, not 0"),
        (EvaluateJob(probe=("p",)), "there is nothing to measure"),
        (PredictJob(**PREDICT, top_k=0), "--top-k must be at least 1, not 0"),
        (PredictJob(**PREDICT, batch_size=-1), "--batch-size must be at least 1, not -1"),
        (PredictJob(**PREDICT | {"out": "labels.csv"}), "its name must end in .parquet"),
    ],
)
def test_a_job_refuses_what_is_out_of_range_before_it_starts(job: Any, sentence: str) -> None:
    runs = {
        EncodeJob: encode_job,
        SelftrainJob: selftrain_job,
        PretrainJob: pretrain_job,
        TuneJob: tune_job,
        EvaluateJob: evaluate_job,
        PredictJob: predict_job,
    }
    started = ray.is_initialized()
    with pytest.raises(UserError, match=re.escape(sentence)):
        runs[type(job)](job)
    assert ray.is_initialized() == started


def _variants(job: Any, name: str, value: object) -> Any:
    """The job with another value of a flag, wherever it is nested."""
    for item in fields(job):
        inner = getattr(job, item.name)
        if item.name == name:
            return replace(job, **{name: value})
        if is_dataclass(inner) and name in to_dict(inner):
            return replace(job, **{item.name: _variants(inner, name, value)})
    raise AssertionError(name)


def _hints(job: Any) -> dict[str, str]:
    """The type of every flag."""
    found: dict[str, str] = {}
    for item in fields(job):
        inner = getattr(job, item.name)
        found |= _hints(inner) if is_dataclass(inner) else {item.name: str(item.type)}
    return found


@pytest.mark.parametrize("job", DEFAULTS, ids=lambda job: type(job).__name__)
def test_every_number_has_a_range(job: Any) -> None:
    for name, hint in _hints(job).items():
        if re.match("(int|float)", hint):
            for value in (-1, float("nan")) if hint.startswith("float") else (-1,):
                with pytest.raises(UserError, match=f"--{name.replace('_', '-')} "):
                    check(_variants(job, name, value))
        if name == "seed":
            check(_variants(job, name, 2**32 - 1))
            with pytest.raises(UserError, match="--seed must be between 0 and 4294967295, not 4294967296"):
                check(_variants(job, name, 2**32))


@pytest.mark.parametrize("job", DEFAULTS, ids=lambda job: type(job).__name__)
def test_an_unset_shell_variable_is_refused_by_its_flag(job: Any) -> None:
    for name, hint in _hints(job).items():
        if not hint.startswith(("str", "tuple")) or name.endswith("_column") or name == "schemes":
            continue
        for value in ("", " "):
            with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is empty"):
                check(_variants(job, name, (value,) if hint.startswith("tuple") else value))


def test_two_stages_with_a_flag_of_one_name_are_a_fault() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Job:
        batch_size: int = 1
        encode: EncodeConfig = field(default_factory=EncodeConfig)

    with pytest.raises(AssertionError, match="batch_size"):
        to_dict(Job())


def test_every_flag_has_a_help_text_that_is_a_sentence() -> None:
    source = Path(config.__file__).read_text()
    for job in DEFAULTS:
        for name in to_dict(job):
            texts = re.findall(rf'^    {name}: [^\n]+\n    """(.+?)"""', source, re.MULTILINE | re.DOTALL)
            assert texts, name
            for text in texts:
                assert text.endswith("."), text
                assert not re.match("(Of|What|Whether|How) ", text), text


def test_a_misspelt_prior_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(
        UserError, match=r"^--prior unifrom is none of .* that can be read, did you mean uniform\?$"
    ):
        load_prior("unifrom", ("cat", "dog"))


def test_one_is_no_plural() -> None:
    assert [counted(count, "image") for count in (0, 1, 2, 1234)] == [
        "0 images",
        "1 image",
        "2 images",
        "1,234 images",
    ]
