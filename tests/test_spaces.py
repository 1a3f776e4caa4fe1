"""Search spaces: every mistake in one is a sentence, and what is drawn from it can be trained; a job is its flags."""

from __future__ import annotations

import ast
import json
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro

from lpclip.config import (
    ClassConfig,
    EncodeConfig,
    EncodeJob,
    EncoderConfig,
    EvaluateJob,
    PredictJob,
    SelfTrainingConfig,
    SelftrainJob,
    SourceConfig,
    TrackingConfig,
    TuneJob,
    flags,
)
from lpclip.jobs.cli import OPTIONS
from lpclip.training import search_space
from lpclip.training.search_space import (
    SEARCHABLE,
    SearchSpace,
    check_space,
    draw_trials,
    read_space,
    space_file,
    trial_config,
)

BASE = SelfTrainingConfig()
OWN = 0.01
HEADER = "import numpy as np\nfrom ray import tune\n"
SHIPPED = sorted((Path(__file__).parents[1] / "tune_spaces").glob("*.py"))

Write = Callable[[str | bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A file of that content, by its path."""

    def write(content: str | bytes) -> str:
        path = tmp_path / "space.py"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


@pytest.fixture
def space_of(write: Write) -> Callable[[str], SearchSpace]:
    """The space whose SPACE has these items."""
    return lambda items: read_space(write(f"{HEADER}SPACE = {{{items}}}\n"))


def mistake(call: Callable[[], object]) -> str:
    """The one line that a call fails with: a ValueError, which the command line tells without a traceback."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert " at 0x" not in message
    return message


def check(space: SearchSpace, *, base: SelfTrainingConfig = BASE) -> None:
    check_space(space, base=base, own_temperature=OWN)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"# caf\xe9\nSPACE = {}\n", ["is not UTF-8 text: save it as UTF-8"], id="not UTF-8"),
        pytest.param(b"SPACE = {}\0\n", ["does not run", "null"], id="null byte"),
        pytest.param("SPACE = {\n", ["does not run", "SyntaxError", "line 1"], id="syntax"),
        pytest.param("SPACE = {'rounds': tun.randint(1, 3)}\n", ["NameError", "'tun'"], id="name"),
        pytest.param(f"{HEADER}SPACE = {{'rounds': tune.rndint(1, 3)}}\n", ["rndint"], id="no such domain"),
        pytest.param("import no_such_module\n", ["no_such_module"], id="import"),
        pytest.param("raise KeyError('photos')\n", ["KeyError", "photos"], id="raises"),
        pytest.param("raise SystemExit(3)\n", ["does not run", "SystemExit"], id="exits"),
        pytest.param("", ["has no SPACE"], id="nothing"),
        pytest.param(
            f"{HEADER}space = {{'rounds': tune.randint(1, 3)}}\n", ["has no SPACE"], id="lower case"
        ),
        pytest.param("SPACE = ['rounds']\n", ["SPACE", "dict"], id="list"),
        pytest.param("SPACE = None\n", ["SPACE", "dict"], id="None"),
        pytest.param("SPACE = {}\n", ["SPACE", "search"], id="empty"),
        pytest.param("SPACE = {'rounds': 3, 'threshold': 0.2}\n", ["SPACE", "search"], id="constants"),
        pytest.param(f"{HEADER}SPACE = {{'batch_size': tune.choice([1])}}\n", ["batch_size"], id="unknown"),
        pytest.param(f"{HEADER}SPACE = {{'num_workers': tune.choice([1])}}\n", ["num_workers"], id="workers"),
        pytest.param(f"{HEADER}SPACE = {{1: tune.choice([1])}}\n", ["names 1,"], id="number"),
        pytest.param(
            f"{HEADER}SPACE = {{'temperature': 0.1, 'temperature_factor': tune.uniform(1, 2)}}\n",
            ["temperature and temperature_factor"],
            id="temperature twice",
        ),
    ],
)
def test_a_file_that_holds_no_space_is_named_with_the_reason(
    content: str | bytes, words: list[str], write: Write
) -> None:
    path = write(content)
    message = mistake(lambda: read_space(path))
    assert f"--space {path}" in message
    assert [word for word in words if word not in message] == []


def test_a_file_that_is_missing_or_a_folder_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.py")
    assert f"--space {missing} cannot be read" in mistake(lambda: read_space(missing))
    assert "No such file" in mistake(lambda: read_space(missing))
    folder = mistake(lambda: read_space(str(tmp_path)))
    assert f"--space {tmp_path} cannot be read" in folder
    assert mistake(lambda: read_space("qick")) == (
        "--space qick cannot be read (No such file or directory): give a Python file, or one of default, quick, wide, "
        "did you mean quick?"
    )
    assert "directory" in folder


def test_the_home_of_nobody_is_a_path_that_cannot_be_read() -> None:
    assert "~nobody-of-this-name/space.py" in mistake(lambda: read_space("~nobody-of-this-name/space.py"))


def test_a_typo_is_answered_with_what_there_is(space_of: Callable[[str], SearchSpace]) -> None:
    message = mistake(lambda: space_of("'temprature': tune.uniform(0.1, 1), 'treshold': 0.5"))
    assert "temprature, treshold" in message
    assert [name for name in SEARCHABLE if name not in message] == []
    assert "num_workers" not in message


def test_ctrl_c_while_the_file_runs_is_not_taken_for_a_mistake(write: Write) -> None:
    with pytest.raises(KeyboardInterrupt):
        read_space(write("raise KeyboardInterrupt\n"))


def test_a_byte_order_mark_does_no_harm(write: Write) -> None:
    code = f"{HEADER}SPACE = {{'rounds': tune.randint(1, 3)}}\n"
    plain, marked = (read_space(write(start + code)) for start in ("", "\ufeff"))
    assert list(marked.searched) == ["rounds"]
    assert marked.identity == plain.identity


def test_what_is_searched_is_told_from_what_is_fixed(space_of: Callable[[str], SearchSpace]) -> None:
    space = space_of("'rounds': tune.randint(1, 3), 'threshold': 0.2, 'neighbours': tune.grid_search([0, 5])")
    assert list(space.searched) == ["rounds", "neighbours"]
    assert space.fixed == {"threshold": 0.2}
    assert space.undrawable == ["neighbours"]
    assert not space_of("'rounds': tune.randint(1, 3), 'threshold': 0.2").undrawable
    assert space_of("'rounds': tune.sample_from(lambda: 3)").undrawable == ["rounds"]


@pytest.mark.parametrize(
    ("items", "name", "value"),
    [
        ("'rounds': 2.5", "rounds", "2.5"),
        ("'rounds': True", "rounds", "True"),
        ("'rounds': 'many'", "rounds", "'many'"),
        ("'rounds': None", "rounds", "None"),
        ("'rounds': [3, 4]", "rounds", "[3, 4]"),
        ("'rounds': 0", "rounds", "0"),
        ("'rounds': tune.randint(0, 5)", "rounds", "0"),
        ("'rounds': tune.uniform(1, 5)", "rounds", "4.99"),
        ("'rounds': tune.choice([3, 'many'])", "rounds", "'many'"),
        ("'rounds': tune.grid_search([3, 0])", "rounds", "0"),
        ("'threshold': 1.2", "threshold", "1.2"),
        ("'threshold': 1.0", "threshold", "1.0"),
        ("'threshold': -0.1", "threshold", "-0.1"),
        ("'threshold': tune.uniform(0.0, 1.2)", "threshold", "1."),
        ("'threshold': tune.uniform(-0.1, 0.5)", "threshold", "-0.1"),
        ("'threshold': tune.grid_search([0.5, 1.0])", "threshold", "1.0"),
        ("'threshold': tune.quniform(0.0, 1.0, 0.1)", "threshold", "1.0"),
        ("'threshold': tune.randn(0.5, 0.1)", "threshold", "inf"),
        ("'temperature': 0.0", "temperature", "0.0"),
        ("'temperature': tune.uniform(-1.0, 1.0)", "temperature", "-1.0"),
        ("'temperature': tune.choice([None, '0.1'])", "temperature", "'0.1'"),
        ("'temperature_factor': 0", "temperature_factor", "0"),
        ("'temperature_factor': tune.uniform(0.0, 1.0)", "temperature_factor", "0.0"),
        ("'temperature_factor': tune.uniform(-2.0, 1.0)", "temperature_factor", "-2.0"),
        ("'temperature_factor': tune.choice([1.0, True])", "temperature_factor", "True"),
        ("'temperature_factor': tune.choice([1.0, None])", "temperature_factor", "None"),
        ("'temperature_factor': tune.choice([float('nan')])", "temperature_factor", "nan"),
        ("'solver': tune.choice(['gaussian', 'magic'])", "solver", "'magic'"),
        ("'solver': 3", "solver", "3"),
        ("'neighbours': -1", "neighbours", "-1"),
        ("'neighbours': tune.randint(-1, 5)", "neighbours", "-1"),
        ("'neighbours': tune.grid_search([0, 5, -1])", "neighbours", "-1"),
        ("'prior': tune.choice(['uniform', 3])", "prior", "3"),
    ],
)
def test_a_value_that_a_parameter_cannot_have_is_refused_with_its_name(
    items: str, name: str, value: str, space_of: Callable[[str], SearchSpace]
) -> None:
    other = "rounds" if name != "rounds" else "neighbours"
    space = space_of(f"'{other}': tune.choice([1, 2]), {items}")
    message = mistake(lambda: check(space))
    assert name in message
    assert value in message


@pytest.mark.parametrize(
    "items",
    [
        "'rounds': tune.randint(5, 5)",
        "'rounds': tune.randint(9, 5)",
        "'rounds': tune.choice([])",
        "'rounds': tune.grid_search([])",
        "'rounds': tune.grid_search(5)",
        "'rounds': tune.sample_from(lambda: 1 // 0)",
        "'rounds': tune.sample_from(lambda: np.arange(3))",
        "'rounds': tune.sample_from(lambda: 0)",
    ],
)
def test_a_parameter_that_gives_nothing_to_train_with_is_named(
    items: str, space_of: Callable[[str], SearchSpace]
) -> None:
    def begin(space: SearchSpace) -> None:
        check(space)
        for parameters in draw_trials(space, count=3, seed=0):
            trial_config(parameters, base=BASE, own_temperature=OWN)

    space = space_of(f"'threshold': 0.1, {items}")
    assert "rounds" in mistake(lambda: begin(space))


@pytest.mark.parametrize(
    "items",
    [
        "'threshold': tune.uniform(0.0, 1.0)",
        "'threshold': tune.uniform(0, 1)",
        "'rounds': tune.randint(1, 2)",
        "'rounds': tune.qrandint(2, 10, 2)",
        "'rounds': tune.lograndint(1, 100)",
        "'temperature': tune.choice([None, 0.01, 1])",
        "'temperature': tune.loguniform(0.001, 0.1)",
        "'temperature_factor': tune.choice([1, 2.0])",
        "'neighbours': tune.choice([None, 0, 30])",
        "'prior': tune.grid_search(['auto', 'uniform', 'weak', 'none'])",
        "'solver': tune.grid_search(['gaussian', 'gradient'])",
        "'solver': 'gradient', 'neighbours': 0, 'rounds': tune.randint(1, 1000)",
        "'rounds': tune.sample_from(lambda: 3)",
    ],
)
def test_what_the_training_takes_can_be_searched(items: str, space_of: Callable[[str], SearchSpace]) -> None:
    space = space_of(items)
    check(space)
    for parameters in draw_trials(space, count=20, seed=0):
        config = trial_config(parameters, base=BASE, own_temperature=OWN)
        for name, value in parameters.items():
            assert name == "temperature_factor" or value is None or getattr(config, name) == value


def test_a_constant_and_the_base_count_in_the_check(space_of: Callable[[str], SearchSpace]) -> None:
    space = space_of("'threshold': 1.4, 'neighbours': tune.choice([0, 5])")
    assert "--threshold" in mistake(lambda: check(space))
    space = space_of("'neighbours': tune.choice([0, 5])")
    check(space)
    assert "--threshold" in mistake(lambda: check(space, base=replace(BASE, threshold=1.4)))


def test_the_ends_of_a_parameter_hold_all_that_is_drawn(space_of: Callable[[str], SearchSpace]) -> None:
    for domain in ("randint(5, 30)", "lograndint(5, 30)", "qrandint(5, 30, 5)", "qlograndint(5, 30, 5)"):
        space = space_of(f"'neighbours': tune.{domain}")
        drawn = {parameters["neighbours"] for parameters in draw_trials(space, count=100, seed=0)}
        assert min(space.values("neighbours")) <= min(drawn), domain
        assert max(space.values("neighbours")) >= max(drawn), domain


def test_all_values_that_are_listed_are_known(space_of: Callable[[str], SearchSpace]) -> None:
    space = space_of(
        "'prior': tune.choice(['weak', 'none']), 'rounds': tune.grid_search([3, 5]), 'threshold': 0.1,"
        "'neighbours': tune.sample_from(lambda: 3)"
    )
    assert space.values("prior") == ["weak", "none"]
    assert space.values("rounds") == [3, 5]
    assert space.values("threshold") == [0.1]
    assert space.values("neighbours") == []


WIDE = (
    "'temperature_factor': tune.loguniform(0.5, 2.0), 'threshold': tune.quniform(0.0, 0.6, 0.01),"
    "'rounds': tune.randint(3, 21), 'neighbours': tune.choice([0, 5, 10]), 'prior': 'weak',"
    "'solver': tune.sample_from(lambda: np.str_('gaussian'))"
)


def names(trials: list[dict[str, Any]]) -> list[str]:
    return [json.dumps(parameters, sort_keys=True) for parameters in trials]


def test_a_seed_draws_the_same_trials_and_more_of_them_begin_alike(
    space_of: Callable[[str], SearchSpace],
) -> None:
    space = space_of(WIDE)
    trials = draw_trials(space, count=40, seed=3)
    assert len(trials) == 40
    assert draw_trials(space, count=40, seed=3) == trials
    assert draw_trials(space_of(WIDE), count=15, seed=3) == trials[:15]
    assert len(set(names(trials))) == 40
    assert not set(names(trials)) & set(names(draw_trials(space, count=40, seed=4)))


def test_drawn_values_lie_where_they_may_and_are_plain_numbers(
    space_of: Callable[[str], SearchSpace],
) -> None:
    trials = draw_trials(space_of(WIDE), count=200, seed=0)
    kinds = {
        "temperature_factor": float,
        "threshold": float,
        "rounds": int,
        "neighbours": int,
        "prior": str,
        "solver": str,
    }
    assert all({k: type(v) for k, v in parameters.items()} == kinds for parameters in trials)
    assert [json.loads(name) for name in names(trials)] == trials
    assert all(0.5 <= p["temperature_factor"] <= 2.0 and 0 <= p["threshold"] <= 0.6 for p in trials)
    assert {p["rounds"] for p in trials} == set(range(3, 21))
    assert {p["neighbours"] for p in trials} == {0, 5, 10}
    assert {(p["prior"], p["solver"]) for p in trials} == {("weak", "gaussian")}


@pytest.mark.parametrize("kind", ["choice", "grid_search"])
def test_numbers_of_numpy_are_numbers(kind: str, space_of: Callable[[str], SearchSpace]) -> None:
    space = space_of(
        f"'neighbours': tune.{kind}(np.arange(5, 30, 5)), 'threshold': tune.{kind}(np.linspace(0, 0.5, 3))"
    )
    check(space)
    trials = draw_trials(space, count=100, seed=0)
    assert {type(p["neighbours"]) for p in trials} == {int}
    assert {type(p["threshold"]) for p in trials} == {float}
    assert {p["neighbours"] for p in trials} == {5, 10, 15, 20, 25}


def test_a_grid_is_crossed_with_itself_and_with_what_is_sampled(
    space_of: Callable[[str], SearchSpace],
) -> None:
    crossed = draw_trials(
        space_of("'rounds': tune.grid_search([3, 5]), 'neighbours': tune.grid_search([0, 5, 9])"),
        count=100,
        seed=0,
    )
    assert sorted((p["rounds"], p["neighbours"]) for p in crossed) == [
        (3, 0),
        (3, 5),
        (3, 9),
        (5, 0),
        (5, 5),
        (5, 9),
    ]
    sampled = draw_trials(
        space_of("'rounds': tune.grid_search([3, 5]), 'threshold': tune.uniform(0, 0.5)"), count=20, seed=0
    )
    assert [sum(p["rounds"] == rounds for p in sampled) for rounds in (3, 5)] == [10, 10]
    assert len({p["threshold"] for p in sampled}) == 20


def test_no_more_is_drawn_than_was_asked_for(space_of: Callable[[str], SearchSpace]) -> None:
    grid = space_of("'rounds': tune.grid_search([3, 5, 7]), 'threshold': tune.uniform(0, 0.5)")
    assert draw_trials(grid, count=2, seed=0) == draw_trials(grid, count=7, seed=0)[:2]
    assert [len(draw_trials(grid, count=count, seed=0)) for count in (0, 1, 2, 7)] == [0, 1, 2, 7]


def test_a_space_with_few_trials_ends_with_them_and_soon(space_of: Callable[[str], SearchSpace]) -> None:
    begin = time.monotonic()
    few = draw_trials(space_of("'neighbours': tune.choice([0, 5, 9]), 'rounds': 4"), count=10_000, seed=0)
    assert sorted(p["neighbours"] for p in few) == [0, 5, 9]
    assert draw_trials(space_of("'rounds': tune.grid_search([4, 4])"), count=9, seed=0) == [{"rounds": 4}]
    ends = draw_trials(space_of("'threshold': tune.quniform(0.0, 0.2, 0.1)"), count=9, seed=0)
    assert sorted(p["threshold"] for p in ends) == [0.0, 0.1, 0.2]
    assert time.monotonic() - begin < 60, "ten thousand times it was drawn in vain"


def test_a_function_may_use_the_other_parameters(space_of: Callable[[str], SearchSpace]) -> None:
    space = space_of(
        "'neighbours': tune.choice([1, 5]), 'rounds': tune.sample_from(lambda c: c.neighbours + 1)"
    )
    assert sorted((p["neighbours"], p["rounds"]) for p in draw_trials(space, count=5, seed=0)) == [
        (1, 2),
        (5, 6),
    ]


def test_a_function_may_use_the_constants(space_of: Callable[[str], SearchSpace]) -> None:
    space = space_of("'neighbours': 5, 'rounds': tune.sample_from(lambda c: c['neighbours'] + 1)")
    assert draw_trials(space, count=5, seed=0) == [{"neighbours": 5, "rounds": 6}]


CODE = f"""{HEADER}SPACE = {{"rounds": tune.randint(1, 9), "threshold": tune.uniform(0.0, 0.5)}}
"""


@pytest.mark.parametrize(
    "code",
    [
        f'"""What is worth a try."""\n{CODE}',
        CODE.replace("SPACE", "# Few.\nSPACE"),
        CODE.replace(", ", ",\n    "),
        CODE.replace('"', "'") + "\n\n",
        CODE.replace("0.5", "0.50"),
    ],
    ids=["docstring", "comment", "layout", "quotes", "digits"],
)
def test_words_and_layout_leave_the_identity_as_it_is(code: str, write: Write, tmp_path: Path) -> None:
    assert code != CODE
    other = tmp_path / "other.py"
    other.write_text(CODE)
    assert read_space(write(code)).identity == read_space(str(other)).identity


@pytest.mark.parametrize(
    "code",
    [
        CODE.replace("9", "8"),
        CODE.replace("0.5", "0.4"),
        CODE.replace("uniform(0.0", "loguniform(0.1"),
        CODE.replace('"rounds"', '"neighbours"'),
        CODE.replace("SPACE = {", 'SPACE = {"prior": "weak", '),
        CODE + 'SPACE["neighbours"] = 3\n',
    ],
)
def test_another_space_has_another_identity(code: str, write: Write) -> None:
    assert read_space(write(CODE)).identity != read_space(write(code)).identity


def test_a_trial_is_the_base_with_the_trials_parameters() -> None:
    base = replace(BASE, rounds=7, prior="weak", seed=5, threshold=0.3, num_workers=2)
    found = trial_config({"rounds": 3, "neighbours": 9}, base=base, own_temperature=OWN)
    assert found == replace(base, rounds=3, neighbours=9, temperature=OWN)


def test_the_temperature_is_the_encoders_own_unless_it_is_given() -> None:
    hot = replace(BASE, temperature=0.5)
    assert trial_config({}, base=BASE, own_temperature=OWN).temperature == OWN
    assert trial_config({}, base=hot, own_temperature=OWN).temperature == 0.5
    assert trial_config({"temperature": 0.2}, base=hot, own_temperature=OWN).temperature == 0.2
    assert trial_config({"temperature": None}, base=hot, own_temperature=OWN).temperature == OWN
    assert trial_config({"temperature_factor": 3}, base=hot, own_temperature=OWN).temperature == 3 * OWN


def test_a_trials_parameters_are_not_changed_by_its_training() -> None:
    parameters = {"temperature_factor": 2.0, "rounds": 3}
    trial_config(parameters, base=BASE, own_temperature=OWN)
    assert parameters == {"temperature_factor": 2.0, "rounds": 3}


def test_a_trial_whose_value_nobody_could_know_before_is_refused(
    space_of: Callable[[str], SearchSpace],
) -> None:
    space = space_of(
        "'rounds': tune.grid_search([3, 5]), 'neighbours': tune.sample_from(lambda c: c.rounds - 4)"
    )
    check(space)
    trials = draw_trials(space, count=9, seed=0)
    wrong = [p for p in trials if p == {"rounds": 3, "neighbours": -1}]
    assert len(trials) == 2
    assert "--neighbours" in mistake(lambda: trial_config(wrong[0], base=BASE, own_temperature=OWN))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_spaces_that_come_along_are_as_they_say(path: Path) -> None:
    space = read_space(str(path))
    check(space)
    words = ast.get_docstring(ast.parse(path.read_text())) or ""
    promised = [
        int(number)
        for number in re.findall(r"(\d+) (?:\w+ )?trials|--trials (\d+)", words)
        for number in number
        if number
    ]
    for count in promised or [20]:
        trials = draw_trials(space, count=count, seed=0)
        assert len(trials) == count
        for parameters in trials:
            trial_config(parameters, base=BASE, own_temperature=OWN)
    assert f"lpclip tune --space {path.stem}" in words


def test_the_shipped_spaces_have_names_and_stay_files() -> None:
    assert {path.stem for path in SHIPPED} == set(search_space.SHIPPED)
    assert TuneJob().space in search_space.SHIPPED
    for path in SHIPPED:
        assert space_file(path.stem).samefile(path)
        assert space_file(str(path)) == path
        assert read_space(path.stem).identity == read_space(str(path)).identity


TRAINING = SelfTrainingConfig(
    solver="gradient",
    rounds=3,
    temperature=1e-05,
    threshold=1 / 3,
    prior="my shares.txt",
    neighbours=0,
    num_workers=2,
    seed=-1,
)
JOBS = [
    SelftrainJob(training=TRAINING),
    SelftrainJob(training=replace(BASE, temperature=1)),
    SelftrainJob(
        data=("s3://bucket/a folder",), eval_data=("cifar10:test",), out="runs/it's", limit=0, supervised=True
    ),
    SelftrainJob(
        source=SourceConfig(id_column="the id", label_column="", max_bad_fraction=0.0, max_pixels=1),
        encoder=EncoderConfig(encoder="ViT-B-32", pretrained="openai", precision="float16"),
        encode=EncodeConfig(views="weak", batch_size=1, num_actors=3, features="/tmp/features"),
        names=ClassConfig(classes='a cat,a dog\'s "bone",$HOME', templates="openai"),
        tracking=TrackingConfig(experiment="None", run_name="two\nlines"),
    ),
    SelftrainJob(names=ClassConfig(classes="-1,0,1"), eval_limit=5),
    EncodeJob(data=("photos",), limit=5, seed=3, encode=EncodeConfig(num_actors=1)),
    TuneJob(
        space="my space.py", resume=True, search="optuna", scheduler="asha", criterion="class_ami", trials=8
    ),
    PredictJob(probe="runs/probe", data=("photos",), out="labels.parquet", top_k=1),
]


def parse(job: object, words: list[str]) -> object:
    return tyro.cli(type(job), config=OPTIONS, args=words)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: type(job).__name__)
def test_a_jobs_flags_give_the_job_again_also_through_a_shell(job: object) -> None:
    words = flags(job)
    assert parse(job, words) == job
    assert parse(job, shlex.split(shlex.join(words))) == job


def test_flags_that_take_many_values_give_the_job_again() -> None:
    job = EvaluateJob(probe=("runs/probe", "b=runs/supervised"), data=("photos",), ood=("x=1", "y=2"), seed=1)
    assert parse(job, flags(job)) == job


def test_a_value_that_looks_like_a_flag_gives_the_job_again() -> None:
    job = SelftrainJob(tracking=TrackingConfig(run_name="-x"), data=("--photos",))
    assert parse(job, flags(job)) == job


def test_only_what_differs_from_the_defaults_is_told() -> None:
    assert flags(SelftrainJob()) == flags(TuneJob()) == flags(EncodeJob()) == []
    job = SelftrainJob(training=replace(BASE, rounds=3, threshold=0.0), limit=7)
    assert sorted(flags(job)) == sorted(["--limit", "7", "--rounds", "3"])
    assert flags(PredictJob(probe="p", data=("d",), out="o")) == ["--probe", "p", "--data", "d", "--out", "o"]
    assert flags(SelftrainJob(supervised=True)) == ["--supervised"]
    assert flags(SelftrainJob(source=SourceConfig(max_pixels=9))) == ["--max-pixels", "9"]
