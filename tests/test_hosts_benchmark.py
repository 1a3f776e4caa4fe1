"""The parts of benchmarks/hosts.py that need no namespaces: what becomes of packets, and what a comparison finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faults import Data, Trial
from hosts import Link, compare, trials


def packet(*, target: int, number: int = 0) -> bytes:
    """An IPv4 packet to a host, with a number to know it by."""
    return bytes([0x45]) + bytes(18) + bytes([target, number])


def numbers(link: Link, *, now: float) -> list[int]:
    return [found[20] for _, found in link.arrived(now)]


def test_packets_arrive_in_their_order_and_when_they_are_due() -> None:
    link = Link()
    link.take(packet(target=2, number=1), source=1, now=0.0)
    assert list(link.arrived(0.0)) == [(2, packet(target=2, number=1))]
    link.delay = 0.05
    link.take(packet(target=2, number=2), source=1, now=1.0)
    link.take(packet(target=3, number=3), source=1, now=1.01)
    assert link.wait(1.02) == pytest.approx(0.03)
    assert numbers(link, now=1.04) == []
    assert numbers(link, now=1.055) == [2]
    # The delay's end does not let the next packets overtake.
    link.delay = 0.0
    link.take(packet(target=3, number=4), source=1, now=1.056)
    assert numbers(link, now=1.057) == []
    assert numbers(link, now=1.07) == [3, 4]


def test_no_packet_leaves_or_reaches_a_host_that_is_cut_off_and_the_others_go_on() -> None:
    link = Link()
    link.cut = frozenset({2})
    for number, (source, target) in enumerate([(1, 2), (2, 1), (1, 3), (3, 1)]):
        link.take(packet(target=target, number=number), source=source, now=0.0)
    assert numbers(link, now=0.0) == [2, 3]
    link.cut = frozenset()
    link.take(packet(target=2, number=9), source=1, now=0.0)
    assert numbers(link, now=0.0) == [9]


def test_a_share_of_the_packets_is_lost_and_none_but_ipv4_travels() -> None:
    link = Link()
    link.loss = 0.05
    for _ in range(10_000):
        link.take(packet(target=2), source=1, now=0.0)
    assert 400 < link.lost < 600
    assert len(numbers(link, now=0.0)) == 10_000 - link.lost
    link.loss = 0.0
    link.take(bytes([0x60]) + bytes(40), source=1, now=0.0)
    assert numbers(link, now=0.0) == []


def write_sweep(out: Path, *names: str, weight: bytes = b"weight", seconds: float = 1.0) -> None:
    """As much of the output of a sweep as is compared."""
    (out / "trials").mkdir(parents=True)
    (out / "probe").mkdir()
    for name in names:
        (out / "trials" / f"{name}.json").write_text(json.dumps({"name": name, "seconds": seconds}))
        (out / "trials" / f"{name}.safetensors").write_bytes(weight)
    (out / "probe" / "probe.safetensors").write_bytes(b"probe")


def test_a_comparison_finds_what_is_lost_and_what_is_different(tmp_path: Path) -> None:
    write_sweep(tmp_path / "alone", "a", "b")
    write_sweep(tmp_path / "same", "a", "b", seconds=2.0)
    write_sweep(tmp_path / "lost", "a")
    write_sweep(tmp_path / "different", "a", "b", weight=b"other")
    data = Data(path=tmp_path, images={}, bad=frozenset(), flags=(), features={})
    trial = Trial(data, tmp_path / "trial", command=["true"])
    trial.run()
    found = {
        name: compare(tmp_path / "alone", tmp_path / name, rows=trials, trial=trial, note="")
        for name in ("same", "lost", "different")
    }
    assert [(row.lost, row.same_bytes) for row in found.values()] == [(0, "yes"), (1, "no"), (0, "no")]
    assert found["same"].wrong == ()
    assert "no row is lost or doubled" in found["lost"].wrong
    assert found["different"].wrong == ("rows and probe are those of one host",)
