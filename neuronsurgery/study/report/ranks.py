"""The section of 1b: where the critical neurons of one criterion rank by the other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from neuronsurgery.study import figures
from neuronsurgery.study.figures import number
from neuronsurgery.study.report.effects import Groups
from neuronsurgery.study.report.section import Section
from neuronsurgery.study.report.tables import html_table, p_text
from neuronsurgery.study.report.wording import times


def ranks(run: Mapping[str, Any], groups: Groups, split: str) -> Section:
    """Return the section of 1b: two histograms per group."""
    records = run["experiments"]["1b"][split]
    rows, findings, remarks = [], [], []
    for share in sorted({record["share"] for record in records}):
        of_share = [record for record in records if record["share"] == share]
        most = max(record["neurons"] for record in of_share)
        words = [_pile_words([r for r in of_share if r["chosen_by"] == by], by) for by in ("gradient", "magnitude")]
        told = "; ".join(word for word in words if word)
        findings.append(f"Of the top {100 * share:g} % ({times(most, 'neuron')} per group), {told}")
        if most == 1:
            remarks.append(f"The top {100 * share:g} % is one neuron: its percentile is in the table, and says little.")
        rows += [_rank_row(record, groups) for record in of_share]
    header = ["group", "top", "chosen by", "ranked by", "neurons", "above 90", "by chance", "p", "median percentile"]
    section = Section(f"The critical neurons were ranked by the other criterion. {'. '.join(findings)}.")
    section.table = html_table(header, rows)
    section.figures = _rank_figures(records, groups, split)
    remarks.append(
        "p: how often as many or more of these neurons would lie above the 90th percentile if their ranks were random "
        "(binomial); neurons of one layer are not independent, so read it as a guide."
    )
    section.remarks = remarks
    section.overview = _rank_overview(records, groups)
    return section


def _piled(record: Mapping[str, Any]) -> tuple[int, float]:
    """Return how many of a record's neurons lie in the last two bins, and the binomial p of as many or more."""
    from scipy.special import bdtrc

    n, above = record["neurons"], sum(record["histogram"][-2:])
    return above, float(bdtrc(above - 1, n, 0.1)) if above else 1.0


def _pile_words(records: Sequence[Mapping[str, Any]], chosen_by: str) -> str:
    if not records:
        return ""
    piled = [_piled(record) for record in records]
    other = "magnitude" if chosen_by == "gradient" else "gradient"
    above, total = sum(count for count, _ in piled), sum(record["neurons"] for record in records)
    more = sum(p < 0.05 for _, p in piled)
    verdict = "no clustering beyond chance is seen"
    if all(record["neurons"] == 1 for record in records):
        verdict = "too few to call a clustering"
    elif more:
        verdict = f"more than chance for {more} of {times(len(records), 'group')}"
    return f"{above} of {total} chosen by {chosen_by} lie above the 90th percentile by {other}, {verdict}"


def _rank_row(record: Mapping[str, Any], groups: Groups) -> list[str]:
    above, p = _piled(record)
    median = statistics.median(record["percentiles"]) if record["percentiles"] else math.nan
    name = record["group"]
    return [
        escape(groups.label(name) if name in groups.names else name),
        f"{100 * record['share']:g} %",
        escape(record["chosen_by"]),
        escape(record["ranked_by"]),
        str(record["neurons"]),
        f"<b>{above}</b>" if p < 0.05 else str(above),
        number(record["neurons"] / 10),
        p_text(p),
        number(median),
    ]


def _rank_overview(records: Sequence[Mapping[str, Any]], groups: Groups) -> tuple[str, str]:
    def said(names: Iterable[str]) -> str:
        side = [record for record in records if record["group"] in names]
        more = sum(_piled(record)[1] < 0.05 for record in side)
        return f"clustered above 90 in {more} of {len(side)} histograms" if side else "no such group"

    return said(groups.minority), said(groups.majority)


def _rank_figures(records: Sequence[Mapping[str, Any]], groups: Groups, split: str) -> list[tuple[str, str, str]]:
    """Return a pair of histograms per share and group; shares of a single neuron are left to the table."""
    drawn = []
    shares = sorted({record["share"] for record in records})
    for place, share in enumerate(shares):
        for name in dict.fromkeys(record["group"] for record in records):
            pair = [r for r in records if r["share"] == share and r["group"] == name]
            by = {record["chosen_by"]: record["histogram"] for record in pair}
            if max(record["neurons"] for record in pair) == 1 and len(shares) > 1:
                continue
            label = groups.label(name) if name in groups.names else name
            svg = figures.histogram_pair(
                f"Top {100 * share:g} %: {label}",
                ("magnitude rank of the top-gradient neurons", by.get("gradient", [0] * 20)),
                ("gradient rank of the top-magnitude neurons", by.get("magnitude", [0] * 20)),
            )
            number_of = groups.names.index(name) if name in groups.names else "all"
            drawn.append(
                (
                    f"1b-{split}-share{place}-group{number_of}",
                    "Hatched: the last two bins. Dashed: what random ranks would give.",
                    svg,
                )
            )
    return drawn
