"""What progress says, in a log and on a terminal."""

from __future__ import annotations

import io
import time

import pytest

from lpclip.features.pulse import Pulse, PulseTaker
from lpclip.progress import Progress, clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (3599, "0:59:59"), (3661, "1:01:01"), (360_000, "100:00:00")],
)
def test_seconds_as_a_clock(seconds: float, text: str):
    assert clock(seconds) == text


def test_the_last_line_of_a_log_has_the_whole_count():
    log = io.StringIO()
    progress = Progress("encoding", total=1500, stream=log)
    progress.advance(1000, bad=2)
    progress.advance(500)
    progress.close()
    (line,) = log.getvalue().splitlines()
    assert line.startswith("encoding: 1,500 of 1,500 (100%) images, ")
    assert line.endswith("a second, 2 quarantined")
    assert "\r" not in log.getvalue()


def test_short_work_does_not_flood_the_log():
    log = io.StringIO()
    progress = Progress("encoding", total=1000, stream=log)
    for _ in range(1000):
        progress.advance(1)
    assert log.getvalue() == ""
    progress.close()
    assert log.getvalue().count("\n") == 1


def test_an_unfinished_count_says_how_long_is_left():
    log = io.StringIO()
    progress = Progress("encoding", total=200, stream=log)
    progress.advance(100)
    progress.close()
    assert "100 of 200 (50%)" in log.getvalue()
    assert " left" in log.getvalue()


@pytest.mark.parametrize("total", [None, 0])
def test_without_a_total_there_is_neither_share_nor_end(total: int | None):
    log = io.StringIO()
    progress = Progress("encoding", total=total, stream=log)
    progress.advance(7)
    progress.close()
    assert log.getvalue().startswith("encoding: 7 images, ")
    assert "left" not in log.getvalue()


def test_images_that_were_done_before_count_for_the_share_but_not_for_the_rate():
    log = io.StringIO()
    progress = Progress("encoding", total=100, done=90, stream=log)
    assert progress.rate == 0
    time.sleep(0.05)
    progress.advance(10)
    assert progress.done == 100
    assert 0 < progress.rate <= 10 / 0.05
    progress.close()
    assert "100 of 100 (100%)" in log.getvalue()


def test_a_terminal_s_line_is_written_over():
    screen = Terminal()
    progress = Progress("encoding", total=10, stream=screen)
    progress.advance(10)
    progress.close()
    assert screen.getvalue().startswith("\rencoding: 10 of 10")
    assert screen.getvalue().count("\n") == 1
    assert screen.getvalue().endswith("\n")


def test_a_pulse_tells_what_was_done_since_the_one_before() -> None:
    told: list[Pulse] = []
    progress = Progress("encoding", total=100, done=10, stream=io.StringIO())
    taker = PulseTaker(progress, told.append)
    taker.look()
    assert told == []
    for images, bad in ((30, 2), (20, 0)):
        time.sleep(0.1)
        progress.advance(images, bad=bad)
        taker.look()
    assert [(pulse.images, pulse.quarantined) for pulse in told] == [(40, 2), (60, 2)]
    assert 0 < told[0].images_per_second <= 30 / 0.1
    assert 0 < told[1].images_per_second <= 20 / 0.1
    progress.done = 35  # a part was lost and is done again
    taker.look()
    assert len(told) == 2
