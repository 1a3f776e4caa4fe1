"""What a pipeline does about each of Ray's own errors when it loses a process or a machine."""

from __future__ import annotations

import pytest
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)

from lpclip.config import UserError
from lpclip.features.losses import LOSSES, MAX_LOSSES, Losses

ENCODER = (ActorDiedError(), ActorUnavailableError("no answer", None), RayActorError())
MACHINE = (NodeDiedError("gone"), OutOfMemoryError("full"), ObjectLostError("00", None, ""))
STALL = ExecutionTimeoutError(
    "Dataset execution made no progress for at least 600s.\nOperators still running:"
)


@pytest.mark.parametrize("error", [*ENCODER, *MACHINE, WorkerCrashedError(), STALL])
def test_the_third_loss_in_a_row_ends_the_work(error: Exception) -> None:
    assert isinstance(error, LOSSES)
    losses = Losses()
    for number in range(1, MAX_LOSSES):
        line = losses.go_on_after(error, lost_node=True)
        assert line.endswith(f"going on ({number} of {MAX_LOSSES - 1} times in a row)")
    with pytest.raises(
        UserError, match="3 times in a row, the last time with: .*the same command goes on"
    ) as end:
        losses.go_on_after(error, lost_node=True)
    assert "\n" not in str(end.value)
    assert end.value.__cause__ is error


@pytest.mark.parametrize(
    ("errors", "line"),
    [
        (ENCODER, "an encoder was lost, going on"),
        (MACHINE, "a machine or its memory was lost, going on"),
        ([WorkerCrashedError()], "a machine or its memory was lost, going on"),
        ([STALL], "the work stood still, going on"),
    ],
)
def test_the_line_names_what_was_lost(errors: list[Exception], line: str) -> None:
    assert {Losses().go_on_after(error, lost_node=True) for error in errors} == {
        f"{line} (1 of 2 times in a row)"
    }


def test_losses_between_which_something_was_finished_are_none_in_a_row() -> None:
    losses = Losses()
    for error in (ENCODER[0], MACHINE[0], STALL) * 5:
        assert "(1 of 2 times in a row)" in losses.go_on_after(error, lost_node=False)
        losses.forget()
    assert "(1 of 2" in losses.go_on_after(ENCODER[0], lost_node=False)
    assert "(2 of 2" in losses.go_on_after(MACHINE[0], lost_node=False)
    with pytest.raises(UserError, match="the work stood still 3 times in a row"):
        losses.go_on_after(STALL, lost_node=False)


def test_machines_that_are_taken_away_with_notice_do_not_count() -> None:
    losses = Losses()
    assert "(1 of 2" in losses.go_on_after(ENCODER[0], lost_node=True)
    for _ in range(10):
        line = losses.go_on_after(RayActorError(preempted=True), lost_node=True)
        assert line == "the machine of an encoder was taken away with notice, going on"
    assert "(2 of 2" in losses.go_on_after(ENCODER[0], lost_node=True)


def test_images_that_bring_their_process_down_end_the_work_where_no_machine_was_lost() -> None:
    with pytest.raises(UserError, match="died 3 times over the same ones"):
        Losses().go_on_after(WorkerCrashedError(), lost_node=False)
