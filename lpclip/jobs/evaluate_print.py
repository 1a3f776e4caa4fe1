"""The evaluation on the terminal: its plan first, its tables last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lpclip.config import counted
from lpclip.encoders.head import EncoderInfo
from lpclip.evaluation.results import Result, RetrievalResult, worse_than_zero_shot
from lpclip.features.data import Data
from lpclip.jobs import tracking
from lpclip.jobs.console import print_encoder, print_examples, print_places, shown
from lpclip.jobs.evaluate_measure import Rates
from lpclip.method.probe import Probe
from lpclip.report.evaluation_tables import corruption_table, ood_table, overview_table, retrieval_table
from lpclip.report.tables import format_table


def print_evaluation_plan(
    sets: Sequence[tuple[str, Data, int]], probes: Mapping[str, Probe], *, info: EncoderInfo, out: str
) -> None:
    """Print the plan of an evaluation: `sets` are a kind, images and the number of their views."""
    for kind, data, num_views in sets:
        size = ""
        if data.source is not None and data.source.num_rows:
            num_bytes = 2 * info.identity["dim"] * num_views * data.source.num_rows
            size = f", {num_views * data.source.num_rows:,} features, {num_bytes / 1e6:,.0f} MB"
        print(f"{kind:<9} {data.describe()}: {counted(num_views, 'view')}{size}")
        # Sets of published corruptions are dozens, and of foreign images no labels are read.
        if kind in ("clean", "shift"):
            print_examples(data)
    if probes:
        print(f"probes    {', '.join(probes)}")
    print_encoder(info)
    print(f"output    {shown(out)}")
    noted = [note for _, data, _ in sets if data.source for note in data.source.notes]
    for note in (*noted, *info.notes):
        print(f"note      {note}")
    print(end="", flush=True)


def print_evaluation(
    results: Sequence[Result],
    retrieval: Sequence[RetrievalResult],
    *,
    rates: Rates,
    out: str,
    run: tracking.Run,
) -> None:
    """Print the tables of an evaluation, and where its results lie."""
    if rates.images and rates.features:
        print(f"\nencoding: {rates.images:,.3g} images a second, {rates.features:,.3g} features a second")
    for rows in (corruption_table(results), ood_table(results), overview_table(results)):
        if rows:
            print(f"\n{format_table(rows)}")
    for gain in worse_than_zero_shot(results):
        assert gain.value is not None
        assert gain.interval is not None
        low, high = (100 * end for end in gain.interval)
        print(
            f"WORSE than zero-shot: {gain.probe} on {gain.place} by {-100 * gain.value:.1f} points "
            f"({low:+.1f} to {high:+.1f})"
        )
    if retrieval:
        print(f"\n{format_table(retrieval_table(retrieval))}")
    print()
    print_places(out, run, report="report.html", summary="summary.json")


def print_retrieval(results: Sequence[RetrievalResult], *, out: str, run: tracking.Run) -> None:
    """Print the table of an evaluation of retrieval alone, and where its results lie."""
    print(f"\n{format_table(retrieval_table(results))}\n")
    print_places(out, run, summary="summary.json")
