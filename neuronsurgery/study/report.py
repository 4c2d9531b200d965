"""The report of a study run: `results.json` in, one self-contained page, its tables and its figures out.

Nothing else is read: no checkpoint, no data, no clock. Every sentence is derived from the numbers by the rules that the
page itself states under "How to read this": an effect on a group is seen where the interval of its change excludes 0.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Final, NamedTuple

from neuronsurgery.artifacts import write_atomically
from neuronsurgery.study import figures
from neuronsurgery.study.figures import Mark, Series, number, signed

SCHEMA: Final = 1
POINT: Final = 0.01
"""The paper's threshold of a sensitive layer, and what is called "next to nothing" here."""

ROWS_SHOWN: Final = 60
"""Rows of a long table on the page; the CSV file has all of them."""

TITLES: Final[Mapping[str, str]] = {
    "1a": "Zero the top neurons of the whole model",
    "1b": "Where the critical neurons rank",
    "1c": "Random initialisation of the top neurons",
    "1d": "Random noise on the top neurons",
    "1e": "Zero the top neurons within each layer",
    "1f": "Rewind one layer to an earlier epoch",
    "1g": "Controls: neurons that are not critical",
}
PRESETS: Final[Mapping[str, str]] = {
    "adam": "Adam without weight decay",
    "sgd": "SGD with momentum and weight decay 1e-3",
}
PROTOTYPE: Final[Mapping[str, str]] = {
    "adam": "in a prototype the magnitude criterion showed nothing under this preset",
    "sgd": "in a prototype the magnitude criterion showed an effect under this preset",
}
COLUMNS: Final = ("criterion", "chosen_for", "k", "fraction", "std", "relative_std", "layer", "distance", "with_norm")
"""What tells one intervention from another, draws aside."""


# Values


@dataclass(frozen=True)
class Groups:
    """The groups of a run, and how they are called in the report.

    Attributes:
        names: in the run's order.
        minority: the names of those where class and attribute disagree.
    """

    names: tuple[str, ...]
    minority: frozenset[str]

    def label(self, name: str) -> str:
        """Return "G2 waterbird on land (minority)"."""
        return f"G{self.names.index(name)} {name}" + (" (minority)" if name in self.minority else "")

    @property
    def places(self) -> tuple[int, ...]:
        """The positions of the minority groups."""
        return tuple(place for place, name in enumerate(self.names) if name in self.minority)

    @property
    def majority(self) -> tuple[str, ...]:
        """The names of the others."""
        return tuple(name for name in self.names if name not in self.minority)

    def series(self, marks: Mapping[str, Sequence[Mark | None]]) -> list[Series]:
        """Return one entry of a figure's legend per group that has marks, in the group's own colour."""
        colours = figures.GROUP_COLOURS
        return [
            Series(
                f"G{place} {name}", tuple(marks[name]), colours[place % len(colours)], f"{place}", name in self.minority
            )
            for place, name in enumerate(self.names)
            if name in marks
        ]


@dataclass(frozen=True)
class Effect:
    """What one intervention did to one group: a change with its interval, or the summary of several random draws.

    Attributes:
        group: whose accuracy.
        setting: the intervention in words, such as "top-1".
        change: in accuracy, after minus before, a share; the mean over the draws.
        low: lower end of the 95 % interval; with several draws, of the change over the draws.
        high: upper end.
        p: of the change; with several draws, their median; None where a record has none.
        draws: how many.
        seen_in: draws whose interval excludes 0, on the side where more of them do.
        within_a_point: whether every draw's interval lies within one point of 0.
        spread: standard deviation over the draws, 0 for one.
        widest: lowest and highest end of any draw's interval.
    """

    group: str
    setting: str
    change: float
    low: float
    high: float
    p: float | None
    draws: int
    seen_in: int
    within_a_point: bool
    spread: float
    widest: tuple[float, float]

    @property
    def seen(self) -> bool:
        """Whether the interval excludes 0; with several draws, in more than half of them and on the same side."""
        return 2 * self.seen_in > self.draws

    @property
    def mark(self) -> Mark:
        """The effect as a mark of a figure, in points."""
        return Mark(100 * self.change, 100 * self.low, 100 * self.high, self.seen)

    def __str__(self) -> str:
        if self.draws == 1:
            return f"{signed(100 * self.change)} points [{signed(100 * self.low)}, {signed(100 * self.high)}]"
        return f"{signed(100 * self.change)} points on the mean, seen in {self.seen_in} of {self.draws} draws"


class Cell(NamedTuple):
    """One intervention, draws taken together: columns, effects by group, neurons edited, and their names."""

    setting: Mapping[str, Any]
    effects: Mapping[str, Effect]
    neurons: int
    names: Sequence[str]


@dataclass
class Section:
    """One experiment on one split, as the page shows it. All text is plain and is escaped when the page is made.

    Attributes:
        finding: one sentence of what was done and what came out.
        figures: (file name, caption, SVG).
        more_figures: the same, folded away.
        table: HTML of the main table.
        full_table: HTML of every row, folded away.
        remarks: what follows from the numbers.
        overview: what was seen on minority groups, and on the others.
    """

    finding: str
    figures: list[tuple[str, str, str]] = field(default_factory=list)
    more_figures: list[tuple[str, str, str]] = field(default_factory=list)
    table: str = ""
    full_table: str = ""
    remarks: list[str] = field(default_factory=list)
    overview: tuple[str, str] = ("", "")


# From records to effects


def _setting_words(setting: Mapping[str, Any]) -> str:
    """Return an intervention's size, scale, layer and distance in words."""
    words = []
    if setting.get("layer") is not None:
        words.append(str(setting["layer"]))
    if setting.get("distance") is not None:
        words.append(f"{setting['distance']} epochs back" + (" with the norm" if setting.get("with_norm") else ""))
    if setting.get("k") is not None:
        words.append(f"top-{setting['k']}")
    if setting.get("fraction") is not None:
        words.append(f"{100 * setting['fraction']:g} %")
    if _scale_words(setting):
        words.append(_scale_words(setting))
    return ", ".join(words)


def _scale_words(setting: Mapping[str, Any]) -> str:
    if setting.get("std") is not None:
        return f"std {setting['std']:g}"
    if setting.get("relative_std") is not None:
        return f"std {setting['relative_std']:g} x RMS"
    return ""


def _cells(records: Iterable[Mapping[str, Any]]) -> list[Cell]:
    """Return the interventions in the order of their first record, the draws of each taken together."""
    together: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        together.setdefault(tuple(record.get(column) for column in COLUMNS), []).append(record)
    cells = []
    for key, drawn in together.items():
        setting = dict(zip(COLUMNS, key, strict=True))
        words = _setting_words(setting)
        names = [change["group"] for change in drawn[0]["changes"]]
        effects = {
            name: _effect(words, [next(c for c in one["changes"] if c["group"] == name) for one in drawn])
            for name in names
        }
        first = drawn[0].get("names", ())
        same = all(one.get("names", ()) == first for one in drawn)
        cells.append(Cell(setting, effects, drawn[0].get("neurons", 0), first if same else ()))
    return cells


def _effect(setting: str, changes: Sequence[Mapping[str, Any]]) -> Effect:
    values = [change["change"] for change in changes]
    lows, highs = [change["low"] for change in changes], [change["high"] for change in changes]
    ps = [change["p"] for change in changes if change.get("p") is not None]
    alone = len(changes) == 1
    return Effect(
        group=changes[0]["group"],
        setting=setting,
        change=statistics.fmean(values),
        low=lows[0] if alone else min(values),
        high=highs[0] if alone else max(values),
        p=statistics.median(ps) if ps else None,
        draws=len(changes),
        seen_in=max(sum(low > 0 for low in lows), sum(high < 0 for high in highs)),
        within_a_point=all(max(abs(low), abs(high)) < POINT for low, high in zip(lows, highs, strict=True)),
        spread=0.0 if alone else statistics.stdev(values),
        widest=(min(lows), max(highs)),
    )


def _own(cells: Iterable[Cell], criterion: str) -> list[Effect]:
    """Return each group's effect under the neurons chosen for it: its own gradient's, or those chosen for all."""
    return [
        effect
        for cell in cells
        if cell.setting["criterion"] == criterion
        for name, effect in cell.effects.items()
        if cell.setting["chosen_for"] in (name, "all")
    ]


# From effects to words


def _listed(items: Sequence[str], most: int = 4) -> str:
    """Return "a, b and c", and how many more where there are more than `most`."""
    shown = list(items[:most]) + ([f"{len(items) - most} more"] if len(items) > most else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}" if shown else "none"


def _times(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' * (count != 1)}"


def _strongest(effects: Sequence[Effect]) -> Effect:
    return max(effects, key=lambda effect: abs(effect.change))


def _outcome(effects: Sequence[Effect], groups: Groups) -> str:
    """Return on which groups an effect is seen, on which none, and which are undecided, in words."""
    by_group = {name: [e for e in effects if e.group == name] for name in groups.names}
    by_group = {name: found for name, found in by_group.items() if found}
    seen, undecided, none = [], [], []
    for name, found in by_group.items():
        visible = [effect for effect in found if effect.seen]
        if visible:
            best = _strongest(visible)
            share = f", {len(visible)} of {len(found)} times" if len(found) > 1 else ""
            seen.append(f"{groups.label(name)}{share} ({best} {_where(best)})".replace(" )", ")"))
        elif all(effect.within_a_point for effect in found):
            none.append(groups.label(name))
        else:
            undecided.append(groups.label(name))
    parts = [f"an effect is seen on {_listed(seen)}"] if seen else ["no effect seen on any group"]
    if undecided:
        parts.append(f"undecided on {_listed(undecided)}, whose intervals include 0 and more than a point")
    if none and seen:
        parts.append(f"no effect of a point or more on {_listed(none)}")
    return "; ".join(parts)


def _where(effect: Effect) -> str:
    return f"at {effect.setting}" if effect.setting else ""


def _comparison(effects: Sequence[Effect], groups: Groups) -> str:
    """Return how the minority groups compare with the others, as far as the intervals allow; "" if one is missing."""
    minority = [effect for effect in effects if effect.group in groups.minority]
    majority = [effect for effect in effects if effect.group not in groups.minority]
    if not minority or not majority:
        return ""
    seen = [any(effect.seen for effect in side) for side in (minority, majority)]
    if not any(seen):
        return "Neither the minority nor the majority groups show an effect."
    few, many = (_strongest([effect for effect in side if effect.seen] or side) for side in (minority, majority))
    said = {
        (True, False): "An effect is seen on minority groups only",
        (False, True): "An effect is seen on majority groups only",
        (True, True): "Effects are seen on minority and on majority groups",
    }[seen[0], seen[1]]
    larger = "larger in size" if abs(few.change) > abs(many.change) else "not larger in size"
    return (
        f"{said}; the strongest change of a minority group ({groups.label(few.group)}: {few}) is {larger} than that of "
        f"a majority group ({groups.label(many.group)}: {many}), and {_overlap(few, many)}."
    )


def _overlap(few: Effect, many: Effect) -> str:
    """Return whether the sizes of two changes can be told apart by their intervals, in words."""
    kind = "95 % intervals" if few.draws == 1 else "ranges over the draws"
    least = [0.0 if e.low <= 0 <= e.high else min(abs(e.low), abs(e.high)) for e in (few, many)]
    most = [max(abs(e.low), abs(e.high)) for e in (few, many)]
    apart = least[0] > most[1] or least[1] > most[0]
    return f"the {kind} of their sizes {'do not overlap' if apart else 'overlap: this run does not settle it'}"


def _overview(effects: Sequence[Effect], groups: Groups) -> tuple[str, str]:
    """Return what was seen on the minority groups and on the others, for the table at the top."""

    def said(side: Sequence[Effect]) -> str:
        if not side:
            return "no such group"
        seen = sum(effect.seen for effect in side)
        best = _strongest([effect for effect in side if effect.seen] or side)
        words = f"seen {seen} of {len(side)} times" if seen else "no effect seen"
        return f"{words}; largest change {signed(100 * best.change)} points"

    return said([e for e in effects if e.group in groups.minority]), said(
        [e for e in effects if e.group not in groups.minority]
    )


def _step_remark(results: Mapping[str, Any], split: str, groups: Groups) -> list[str]:
    """Return what one example of a small group is worth."""
    counts = dict(zip(groups.names, results["counts"].get(split, ()), strict=False))
    coarse = {name: 100 / count for name, count in counts.items() if count and 100 / count >= 1}
    if not coarse:
        return []
    said = [f"{groups.label(name)} ({counts[name]} examples): {number(step)} points" for name, step in coarse.items()]
    return [f"One example of a small group is 100/n points, and its changes move in such steps: {_listed(said, 12)}."]


def _preset_remark(results: Mapping[str, Any], effects: Sequence[Effect], groups: Groups) -> list[str]:
    """Return what this run shows by magnitude, beside what its preset led one to expect."""
    preset = str(results["settings"].get("preset"))
    if not effects:
        return []
    told = f" ({PRESETS[preset]}); {PROTOTYPE[preset]}" if preset in PRESETS else ""
    return [f"This run used the preset {preset}{told}. By magnitude, this run: {_outcome(effects, groups)}."]


def _chance_remark(effects: Sequence[Effect]) -> list[str]:
    """Return how many intervals would exclude 0 without any effect, where there are many."""
    looks = sum(effect.draws for effect in effects)
    if looks < 20:
        return []
    return [f"Of {looks} intervals of 95 %, up to about {looks / 20:.0f} exclude 0 by chance alone."]


# Tables


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], heads: int = 1) -> str:
    """Return an HTML table that scrolls sideways; cells are HTML already, the first `heads` of a row are its head."""
    kinds = [' class="head"' if place < heads else "" for place in range(len(header))]
    top = "".join(f'<th scope="col"{kind}>{cell}</th>' for kind, cell in zip(kinds, header, strict=True))
    body = []
    for row in rows:
        cells = [f'<th scope="row">{cell}</th>' for cell in row[:heads]] + [f"<td>{cell}</td>" for cell in row[heads:]]
        body.append(f"<tr>{''.join(cells)}</tr>")
    lines = "\n".join(body)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def _effect_cell(effect: Effect | None) -> str:
    """Return a table cell: the change, bold where an effect is seen, over its interval and p or its draws."""
    if effect is None:
        return "&ndash;"
    change = signed(100 * effect.change)
    change = f"<b>{change}</b>" if effect.seen else change
    p = "" if effect.p is None else f" p&nbsp;{_p_text(effect.p)}"
    low, high = effect.widest
    interval = f"[{signed(100 * low)}, {signed(100 * high)}]"
    if effect.draws == 1:
        return f"{change}<small>{interval}{p}</small>"
    spread = number(100 * effect.spread)
    return f"{change} &plusmn; {spread}<small>{effect.seen_in} of {effect.draws} {interval}{p}</small>"


def _p_text(p: float) -> str:
    return "&lt;0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _group_headers(groups: Groups) -> list[str]:
    return [escape(groups.label(name)) for name in groups.names]


def _own_table(cells: Sequence[Cell], groups: Groups) -> str:
    """Return the table of own effects: one row per setting, one column per group."""
    rows = []
    for criterion, words in (("gradient", "each group's own gradient"), ("magnitude", "magnitude")):
        by_setting: dict[str, dict[str, Effect]] = {}
        for effect in _own(cells, criterion):
            by_setting.setdefault(effect.setting, {})[effect.group] = effect
        for setting, found in by_setting.items():
            rows.append([words, escape(setting), *(_effect_cell(found.get(name)) for name in groups.names)])
    return _table(["chosen by", "edited", *_group_headers(groups)], rows, heads=2)


def _full_table(cells: Sequence[Cell], groups: Groups, file: str) -> str:
    """Return every intervention with its effect on every group, or the strongest ones where there are too many."""
    shown, note = list(cells), ""
    if len(shown) > ROWS_SHOWN:
        shown.sort(key=lambda cell: -max(abs(effect.change) for effect in cell.effects.values()))
        shown = shown[:ROWS_SHOWN]
        note = f"<p>The {ROWS_SHOWN} rows with the largest change, of {len(cells)}; all are in {escape(file)}.</p>"
    rows = [
        [
            escape(_chosen_by(cell.setting, groups)),
            escape(_setting_words(cell.setting)),
            _named(cell),
            *(_effect_cell(cell.effects.get(name)) for name in groups.names),
        ]
        for cell in shown
    ]
    return note + _table(["chosen by", "edited", "neurons", *_group_headers(groups)], rows, heads=2)


def _chosen_by(setting: Mapping[str, Any], groups: Groups) -> str:
    chosen_for, criterion = setting.get("chosen_for"), setting["criterion"]
    if criterion == "rewind":
        return "every layer in turn"
    if criterion in ("random", "same layers") and setting.get("k") is not None:
        words = "random" if criterion == "random" else "random of the same layers"
        return f"{words}, as many as for {groups.label(chosen_for) if chosen_for in groups.names else 'magnitude'}"
    return f"{criterion} of {groups.label(chosen_for)}" if chosen_for in groups.names else str(criterion)


def _named(cell: Cell) -> str:
    if not cell.names:
        return str(cell.neurons)
    more = f" and {cell.neurons - 3} more" if cell.neurons > 3 else ""
    return "<br>".join(f"<code>{escape(name)}</code>" for name in cell.names[:3]) + more


# The experiments


def _ks(cells: Iterable[Cell]) -> list[int]:
    return sorted({cell.setting["k"] for cell in cells if cell.setting["k"] is not None})


def _whole_model(run: Mapping[str, Any], groups: Groups, identifier: str, split: str) -> Section:
    """Return the section of 1a, 1c or 1d: the top neurons of the whole model are edited."""
    records = run["experiments"][identifier][split]
    cells = _cells(records)
    gradient, magnitude = _own(cells, "gradient"), _own(cells, "magnitude")
    tops = _listed([f"top-{k}" for k in _ks(cells)])
    draws = max((effect.draws for effect in gradient + magnitude), default=1)
    each = f" in {_times(draws, 'draw')} each" if draws > 1 else ""
    scales = list(dict.fromkeys(_scale_words(cell.setting) for cell in cells))
    done = {
        "1a": f"The {tops} neurons of the whole model were set to zero",
        "1c": f"The {tops} neurons of the whole model were replaced by Gaussian noise ({_listed(scales, 8)}){each}",
        "1d": f"Gaussian noise ({_listed(scales, 8)}) was added to the {tops} neurons of the whole model{each}",
    }[identifier]
    section = Section(_by_both(done, gradient, magnitude, groups), overview=_overview(gradient or magnitude, groups))
    drawn = _top_figures(cells, groups, f"{identifier}-{split}", scales)
    section.figures = [figure for figure in drawn if identifier == "1a" or figure[0].endswith("-gradient")]
    section.more_figures = [figure for figure in drawn if figure not in section.figures]
    section.table = _own_table(cells, groups)
    section.full_table = _full_table(cells, groups, f"tables/{identifier}.csv")
    section.remarks = [_comparison(gradient, groups), *_against_zero(run, groups, identifier, split, gradient)]
    section.remarks += _step_remark(run, split, groups) + _preset_remark(run, magnitude, groups)
    section.remarks += _chance_remark(gradient + magnitude)
    return section


def _by_both(done: str, gradient: Sequence[Effect], magnitude: Sequence[Effect], groups: Groups) -> str:
    """Return the sentence of what was done and what came out by either criterion."""
    parts = []
    if gradient:
        parts.append(f"chosen by each group's own gradient, {_outcome(gradient, groups)}")
    if magnitude:
        parts.append(f"chosen by magnitude, {_outcome(magnitude, groups)}")
    return f"{done}: {'. And '.join(parts) or 'nothing was recorded'}."


def _top_figures(cells: Sequence[Cell], groups: Groups, slug: str, scales: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return one figure of grouped bars per scale and criterion, all on one vertical scale."""
    drawn: list[tuple[str, str, list[Series]]] = []
    for place, scale in enumerate(scales):
        for criterion, words in (("gradient", "by each group's own gradient"), ("magnitude", "by magnitude")):
            found = [cell for cell in cells if _scale_words(cell.setting) == scale]
            series = [_top_series(found, criterion, k, shade, groups) for shade, k in enumerate(_ks(found))]
            if any(mark for one in series for mark in one.marks):
                title = f"Change of accuracy, neurons chosen {words}" + (f", {scale}" if scale else "")
                drawn.append((f"{slug}{f'-scale{place}' if scale else ''}-{criterion}", title, series))
    limits = figures.limits_of(one for _, _, series in drawn for one in series)
    whisker = (
        "ranges over the draws" if any(e.draws > 1 for c in cells for e in c.effects.values()) else "95 % intervals"
    )
    names = list(groups.names)
    return [
        (
            name,
            f"Bars: top-k, from light to dark. Whiskers: {whisker}. Hatched: minority groups.",
            figures.grouped_bars(title, names, series, axis=POINTS, minority=groups.places, limits=limits),
        )
        for name, title, series in drawn
    ]


POINTS: Final = "change, percentage points"


def _top_series(cells: Sequence[Cell], criterion: str, k: int, shade: int, groups: Groups) -> Series:
    own = {e.group: e.mark for e in _own([cell for cell in cells if cell.setting["k"] == k], criterion)}
    colours = figures.ORDERED_COLOURS
    marks = tuple(own.get(name) for name in groups.names)
    return Series(f"top-{k}", marks, colours[shade % len(colours)], str(k))


def _against_zero(
    run: Mapping[str, Any], groups: Groups, identifier: str, split: str, effects: Sequence[Effect]
) -> list[str]:
    """Return how large 1c or 1d are beside 1a on the minority groups: means of the absolute change."""
    zeroed = _own(_cells(run["experiments"].get("1a", {}).get(split, [])), "gradient")
    before = [abs(effect.change) for effect in zeroed if effect.group in groups.minority]
    after = [abs(effect.change) for effect in effects if effect.group in groups.minority]
    if identifier == "1a" or not before or not after:
        return []
    return [
        f"On the minority groups the mean absolute change over all scales and top-k is "
        f"{number(100 * statistics.fmean(after))} points here, and {number(100 * statistics.fmean(before))} points "
        f"where the same neurons were set to zero (1a)."
    ]


def _ranks(run: Mapping[str, Any], groups: Groups, split: str) -> Section:
    """Return the section of 1b: two histograms per group."""
    records = run["experiments"]["1b"][split]
    rows, findings, remarks = [], [], []
    for share in sorted({record["share"] for record in records}):
        of_share = [record for record in records if record["share"] == share]
        most = max(record["neurons"] for record in of_share)
        words = [_pile_words([r for r in of_share if r["chosen_by"] == by], by) for by in ("gradient", "magnitude")]
        told = "; ".join(word for word in words if word)
        findings.append(f"Of the top {100 * share:g} % ({_times(most, 'neuron')} per group), {told}")
        if most == 1:
            remarks.append(f"The top {100 * share:g} % is one neuron: its percentile is in the table, and says little.")
        rows += [_rank_row(record, groups) for record in of_share]
    header = ["group", "top", "chosen by", "ranked by", "neurons", "above 90", "by chance", "p", "median percentile"]
    section = Section(f"The critical neurons were ranked by the other criterion. {'. '.join(findings)}.")
    section.table = _table(header, rows)
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
    n, above = record["neurons"], sum(record["histogram"][-2:])
    tail = (
        sum(math.comb(n, hits) * 0.1**hits * 0.9 ** (n - hits) for hits in range(above, n + 1)) if n <= 1000 else None
    )
    if tail is None:
        tail = 0.5 * math.erfc((above - 0.5 - 0.1 * n) / math.sqrt(2 * 0.09 * n))
    return above, min(1.0, tail)


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
        verdict = f"more than chance for {more} of {_times(len(records), 'group')}"
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
        _p_text(p),
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


def _layer_order(run: Mapping[str, Any], cells: Sequence[Cell]) -> list[str]:
    """Return the layers that the cells touch, in order of depth; of appearance where the run does not know one."""
    met = list(dict.fromkeys(cell.setting["layer"] for cell in cells))
    known = [layer["name"] for layer in run.get("layers", ())]
    return [name for name in known if name in met] if set(met) <= set(known) else met


def _short(layer: str) -> str:
    return layer.removesuffix(".weight")


class Depth(NamedTuple):
    """One line plot over depth to be drawn: its file, its title, and the effects with their layers."""

    name: str
    title: str
    effects: Sequence[tuple[str, Effect]]


def _depth_figures(plots: Iterable[Depth], layers: Sequence[str], groups: Groups) -> list[tuple[str, str, str]]:
    """Return lines over depth, one per group, all plots on one vertical scale; plots without effects are left out."""
    drawn = []
    for plot in plots:
        found = {(layer, effect.group): effect.mark for layer, effect in plot.effects}
        marks = {name: [found.get((layer, name)) for layer in layers] for name in groups.names}
        drawn.append((plot, groups.series({name: line for name, line in marks.items() if any(line)})))
    limits = figures.drawn_limits(one for _, series in drawn for one in series)
    places = [_short(layer) for layer in layers]
    return [
        (plot.name, LINES_READ, figures.depth_lines(plot.title, places, series, axis=POINTS, limits=limits))
        for plot, series in drawn
        if series
    ]


LINES_READ: Final = (
    "Filled markers: the 95 % interval excludes 0 (drawn). Hollow: it includes 0. Thick: minority groups."
)


def _within_layers(run: Mapping[str, Any], groups: Groups, split: str) -> Section:
    """Return the section of 1e: the top neurons of each layer in turn."""
    cells = _cells(run["experiments"]["1e"][split])
    layers = _layer_order(run, cells)
    gradient, magnitude = _own(cells, "gradient"), _own(cells, "magnitude")
    tops = _listed([f"top-{k}" for k in _ks(cells)])
    done = f"In each of {_times(len(layers), 'layer')} in turn the {tops} neurons were set to zero"
    section = Section(_by_both(done, gradient, magnitude, groups), overview=_overview(gradient or magnitude, groups))
    section.figures = _depth_figures(_own_plots(cells, f"1e-{split}"), layers, groups)
    section.more_figures = _depth_figures(_choice_plots(cells, groups, f"1e-{split}"), layers, groups)
    section.table = _layer_table(gradient, magnitude, groups)
    section.full_table = _full_table(cells, groups, "tables/1e.csv")
    section.remarks = [_comparison(gradient, groups), *_step_remark(run, split, groups)]
    section.remarks += _preset_remark(run, magnitude, groups) + _chance_remark(gradient + magnitude)
    return section


def _own_plots(cells: Sequence[Cell], slug: str) -> Iterator[Depth]:
    """Yield the plots of each group's change under its own neurons, one per k."""
    for k in _ks(cells):
        chosen = [cell for cell in cells if cell.setting["k"] == k]
        effects = [(cell.setting["layer"], effect) for cell in chosen for effect in _own([cell], "gradient")]
        yield Depth(f"{slug}-own-top{k}", f"Top-{k} of each layer by each group's own gradient", effects)


def _choice_plots(cells: Sequence[Cell], groups: Groups, slug: str) -> Iterator[Depth]:
    """Yield the plots of every group's change under one choice: by magnitude, by the gradient of each group."""
    choices = [("magnitude", "all", "magnitude", "magnitude")]
    for place, name in enumerate(groups.names):
        choices.append(("gradient", name, f"the gradient of {groups.label(name)}", f"group{place}"))
    for k in _ks(cells):
        for criterion, chosen_for, words, short in choices:
            wanted = (criterion, chosen_for, k)
            chosen = [c for c in cells if tuple(c.setting[key] for key in ("criterion", "chosen_for", "k")) == wanted]
            effects = [(cell.setting["layer"], effect) for cell in chosen for effect in cell.effects.values()]
            yield Depth(f"{slug}-{short}-top{k}", f"Top-{k} of each layer by {words}", effects)


def _layer_table(gradient: Sequence[Effect], magnitude: Sequence[Effect], groups: Groups) -> str:
    """Return per group in how many layers (and top-k) an effect is seen, and the strongest."""
    rows = []
    for words, effects in (("each group's own gradient", gradient), ("magnitude", magnitude)):
        for name in groups.names:
            found = [effect for effect in effects if effect.group == name]
            if found:
                best = _strongest(found)
                seen = sum(effect.seen for effect in found)
                rows.append(
                    [
                        words,
                        escape(groups.label(name)),
                        f"{seen} of {len(found)}",
                        _effect_cell(best),
                        escape(best.setting),
                    ]
                )
    return _table(["chosen by", "effect on", "seen in", "largest change", "where"], rows, heads=2)


def _rewinding(run: Mapping[str, Any], groups: Groups, split: str) -> Section:
    """Return the section of 1f: sensitive layers per group and distance, and the changes over depth."""
    cells = _cells(run["experiments"]["1f"][split])
    plain = [effect for cell in cells if not cell.setting["with_norm"] for effect in cell.effects.values()]
    layers = _layer_order(run, cells)
    distances = sorted({cell.setting["distance"] for cell in cells})
    sensitive = run.get("sensitive_layers", {}).get(split, [])
    back = _listed([str(distance) for distance in distances], 12)
    done = f"Each of {_times(len(layers), 'layer')} in turn was put back by {back} epochs, the rest unchanged"
    section = Section(f"{done}: {_outcome(plain, groups)}.{_sensitive_words(sensitive, groups)}")
    section.overview = _overview(plain, groups)
    section.figures = _sensitive_figures(sensitive, groups, split)
    section.table = _sensitive_table(sensitive, groups)
    section.full_table = _full_table(cells, groups, "tables/1f.csv")
    section.figures += _depth_figures(_rewind_plots(cells, f"1f-{split}", with_norm=False), layers, groups)
    section.more_figures = _depth_figures(_rewind_plots(cells, f"1f-{split}", with_norm=True), layers, groups)
    section.remarks = [*_missing_remark(run), _comparison(plain, groups), *_lucky_layers(run, cells, split, groups)]
    section.remarks += _chance_remark(plain)
    return section


def _rewind_plots(cells: Sequence[Cell], slug: str, *, with_norm: bool) -> Iterator[Depth]:
    """Yield the plots of every group's change under rewinding each layer, one per distance."""
    for distance in sorted({cell.setting["distance"] for cell in cells}):
        chosen = [c for c in cells if c.setting["distance"] == distance and bool(c.setting["with_norm"]) == with_norm]
        effects = [(cell.setting["layer"], effect) for cell in chosen for effect in cell.effects.values()]
        title = f"Each layer put back by {distance} epochs" + (", its norm with it" if with_norm else "")
        yield Depth(f"{slug}-{distance}{'-norm' if with_norm else ''}", title, effects)


def _missing_remark(run: Mapping[str, Any]) -> list[str]:
    missing = run.get("missing_distances") or []
    if not missing:
        return []
    epochs = run["settings"].get("epochs")
    named = _listed([str(distance) for distance in missing], 12)
    return [
        f"Distances of the paper that this run of {epochs} epochs does not have: {named} epochs. They are not shown."
    ]


def _sensitive_words(sensitive: Sequence[Mapping[str, Any]], groups: Groups) -> str:
    """Return the mean number of sensitive layers of minority and majority groups, and whether it grows."""
    rows = sorted((row for row in sensitive if not row["with_norm"]), key=lambda row: row["distance"])
    if not rows or not groups.minority or not groups.majority:
        return ""
    sides = []
    for names in (groups.minority, groups.majority):
        counts = [row["sensitive"][groups.names.index(name)] for row in rows for name in names]
        sides.append(statistics.fmean(counts))
    order = "more often than" if sides[0] > sides[1] else "less often than" if sides[0] < sides[1] else "as often as"
    totals = [sum(row["sensitive"]) for row in rows]
    growth = ""
    if len(rows) > 1:
        grows = all(a <= b for a, b in itertools.pairwise(totals)) and totals[0] < totals[-1]
        growth = f"; the count {'grows' if grows else 'does not grow steadily'} with the distance"
    return (
        f" A layer is sensitive for a group where the change is 1 point or more: minority groups {order} majority "
        f"groups ({number(sides[0])} against {number(sides[1])} layers on the mean over distances){growth}."
    )


def _sensitive_figures(
    sensitive: Sequence[Mapping[str, Any]], groups: Groups, split: str
) -> list[tuple[str, str, str]]:
    drawn = []
    for norm in (False, True):
        rows = sorted((row for row in sensitive if bool(row["with_norm"]) == norm), key=lambda row: row["distance"])
        if rows:
            marks = {name: [Mark(row["sensitive"][place]) for row in rows] for place, name in enumerate(groups.names)}
            title = "Sensitive layers per group" + (", the norm put back too" if norm else "")
            places = [f"{row['distance']} epochs back" for row in rows]
            svg = figures.sensitive_bars(title, places, groups.series(marks), layers=max(row["layers"] for row in rows))
            caption = (
                "Layers whose change is 1 point or more. The number under a bar is its group's. Hatched: minority."
            )
            drawn.append((f"1f-{split}-sensitive{'-norm' if norm else ''}", caption, svg))
    return drawn


def _sensitive_table(sensitive: Sequence[Mapping[str, Any]], groups: Groups) -> str:
    if not sensitive:
        return ""
    rows = [
        [
            f"{row['distance']} epochs" + (", with the norm" if row["with_norm"] else ""),
            str(row["layers"]),
            *map(str, row["sensitive"]),
        ]
        for row in sensitive
    ]
    return _table(["put back by", "layers", *_group_headers(groups)], rows)


def _lucky_layers(run: Mapping[str, Any], cells: Sequence[Cell], split: str, groups: Groups) -> list[str]:
    """Return where one example alone makes a layer sensitive, and how many such changes an interval backs."""
    counts = dict(zip(groups.names, run["counts"].get(split, ()), strict=False))
    said = []
    for name in groups.names:
        effects = [cell.effects[name] for cell in cells if name in cell.effects and not cell.setting["with_norm"]]
        large = [effect for effect in effects if abs(effect.change) >= POINT - 1e-12]
        if large and counts.get(name) and 100 / counts[name] >= 1:
            seen = sum(effect.seen for effect in large)
            said.append(
                f"{groups.label(name)} has {counts[name]} examples, one of which is {number(100 / counts[name])} "
                f"points: a single one makes a layer sensitive; of its {len(large)} changes of a point or more, the "
                f"interval excludes 0 in {seen}."
            )
    return said


def _controls(run: Mapping[str, Any], groups: Groups, split: str) -> Section:
    """Return the section of 1g: random neurons, neurons of the same layers, and the empirical p-value."""
    cells = _cells(run["experiments"]["1g"][split])
    random = _shares(cells)
    effects = [effect for cell in random for effect in cell.effects.values()]
    tests = run.get("control_p", {}).get(split, [])
    section = Section(_control_finding(random, effects, groups) + _test_words(tests, groups))
    section.overview = _overview(effects, groups) if effects else ("", "")
    section.figures = _control_figures(run, cells, groups, split) + _test_figures(cells, tests, groups, split)
    section.table = _own_columns(random, groups) + _test_table(tests, groups)
    section.full_table = _full_table(cells, groups, "tables/1g.csv")
    section.remarks = _step_remark(run, split, groups)
    if tests:
        draws = max(test["draws"] for test in tests)
        section.remarks.append(
            f"The empirical p-value is (1 + draws that change as much or more) / (1 + draws): with {draws} draws it "
            f"cannot be below {_plain_p(1 / (1 + draws))}. The effect of a group's neurons on the other groups is in "
            f"tables/control_p.csv."
        )
    return section


def _shares(cells: Iterable[Cell]) -> list[Cell]:
    """Return the paper's controls, a share of the model: not those matched in number to a critical set."""
    return [cell for cell in cells if cell.setting["criterion"] == "random" and cell.setting["fraction"] is not None]


def _plain_p(p: float) -> str:
    return f"{p:.4f}" if p < 0.01 else f"{p:.3f}"


def _control_finding(random: Sequence[Cell], effects: Sequence[Effect], groups: Groups) -> str:
    if not effects:
        return "No control of random neurons was recorded."
    shares = [f"{100 * cell.setting['fraction']:g} %" for cell in random if cell.setting["fraction"] is not None]
    span = f"{shares[0]} to {shares[-1]}" if len(shares) > 1 else _listed(shares)
    draws = _times(max(effect.draws for effect in effects), "draw")
    largest = _strongest(effects)
    said = f"the largest mean change is {signed(100 * largest.change)} points, on {groups.label(largest.group)}"
    said = f"{said} {_where(largest)}" if abs(largest.change) > 1e-9 else "no example of any group changed"
    return (
        f"Random neurons that are not critical, {span} of the model, were set to zero in {draws} each: "
        f"{_outcome(effects, groups)}; {said}."
    )


def _own_tests(tests: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the tests of each group's own neurons, or of neurons chosen for all."""
    return [test for test in tests if test["chosen_for"] in (test["group"], "all")]


def _test_words(tests: Sequence[Mapping[str, Any]], groups: Groups) -> str:
    """Return against which controls the critical neurons stand out, in words."""
    said = []
    for kind, words in (
        ("same layers", "as many neurons of the same layers"),
        ("whole model", "as many of the whole model"),
    ):
        found = [test for test in _own_tests(tests) if test["kind"] == kind and test["criterion"] == "gradient"]
        if not found:
            continue
        small = []
        for name in groups.names:
            of_group = [test for test in found if test["group"] == name and test["p"] < 0.05]
            if of_group:
                tops = ", ".join(f"top-{test['k']} p = {_plain_p(test['p'])}" for test in of_group)
                small.append(f"{groups.label(name)} ({tops})")
        draws = max(test["draws"] for test in found)
        stand = "do not stand out for any group (every p at least 0.05)"
        if small:
            stand = f"stand out for {_listed(small, 6)}"
        elif 1 / (1 + draws) >= 0.05:
            stand = f"cannot stand out: {_times(draws, 'draw')} are too few for a p below 0.05"
        said.append(f" Against random draws of {words}, the neurons chosen by a group's own gradient {stand}.")
    return "".join(said)


def _own_columns(cells: Sequence[Cell], groups: Groups) -> str:
    """Return the table of the random controls: one row per share."""
    rows = [
        [
            escape(_setting_words(cell.setting)),
            str(cell.neurons),
            *(_effect_cell(cell.effects.get(name)) for name in groups.names),
        ]
        for cell in cells
    ]
    return _table(["share", "neurons", *_group_headers(groups)], rows) if rows else ""


def _test_table(tests: Sequence[Mapping[str, Any]], groups: Groups) -> str:
    """Return the table of empirical p-values of each group's own neurons, and of those chosen for all."""
    kinds = list(dict.fromkeys(test["kind"] for test in tests))
    by_row: dict[tuple[str, str, int], dict[str, Mapping[str, Any]]] = {}
    for test in _own_tests(tests):
        by_row.setdefault((test["criterion"], test["group"], test["k"]), {})[test["kind"]] = test
    rows = []
    for (criterion, name, k), found in by_row.items():
        change = next(iter(found.values()))["change"]
        row = [escape(groups.label(name)), f"top-{k} by {escape(criterion)}", signed(100 * change)]
        rows.append(row + [_test_cell(found.get(kind)) for kind in kinds])
    header = ["effect on", "critical neurons", "change, points", *(f"p, draws from the {escape(k)}" for k in kinds)]
    return _table(header, rows, heads=2) if rows else ""


def _test_cell(test: Mapping[str, Any] | None) -> str:
    if test is None:
        return "&ndash;"
    p = f"<b>{_p_text(test['p'])}</b>" if test["p"] < 0.05 else _p_text(test["p"])
    return f"{p}<small>{_times(test['draws'], 'draw')}</small>"


def _control_figures(
    run: Mapping[str, Any], cells: Sequence[Cell], groups: Groups, split: str
) -> list[tuple[str, str, str]]:
    """Return the figure of share against change, with the cuts of 1a at its right end where the run has them."""
    random = _shares(cells)
    if not random:
        return []
    places = [f"{_setting_words(cell.setting)} random" for cell in random]
    marks: dict[str, list[Mark | None]] = {
        name: [cell.effects[name].mark if name in cell.effects else None for cell in random] for name in groups.names
    }
    zeroed = _cells(run["experiments"].get("1a", {}).get(split, []))
    for k in _ks(zeroed):
        own = {e.group: e.mark for e in _own([c for c in zeroed if c.setting["k"] == k], "gradient")}
        places.append(f"critical top-{k}")
        for name in groups.names:
            marks[name].append(own.get(name))
    svg = figures.dot_ranges("Random neurons, and the critical ones", places, groups.series(marks), axis=POINTS)
    caption = (
        "Random neurons: mean and range over the draws; filled where more than half of the intervals exclude 0. "
        "Critical: each group's own, with its 95 % interval."
    )
    return [(f"1g-{split}-shares", caption, svg)]


MATCHED: Final = (("same layers", "same layers", figures.GREY), ("random", "whole model", figures.GROUP_COLOURS[0]))
"""Of the controls matched in number to a critical set: criterion, what they are drawn from, colour."""


def _test_figures(
    cells: Sequence[Cell], tests: Sequence[Mapping[str, Any]], groups: Groups, split: str
) -> list[tuple[str, str, str]]:
    """Return one figure per k, all on one scale: every group's critical change beside the draws matched to it."""
    own = [test for test in tests if test["chosen_for"] == test["group"] and test["criterion"] == "gradient"]
    plots = []
    for k in sorted({test["k"] for test in own}):
        found = {(test["group"], test["kind"]): test for test in own if test["k"] == k}
        cuts = {name: Mark(100 * test["change"]) for (name, _), test in found.items()}
        series = [Series("critical neurons", tuple(cuts.get(name) for name in groups.names), figures.HIGHLIGHT)]
        for criterion, source, colour in MATCHED:
            marks = tuple(_matched_mark(cells, criterion, name, k) for name in groups.names)
            series += [Series(f"draws from the {source}", marks, colour)] if any(marks) else []
        same = {name: found[name, "same layers"]["p"] for name in groups.names if (name, "same layers") in found}
        places = [
            f"{name}, p\N{NO-BREAK SPACE}{_plain_p(same[name])}" if name in same else name for name in groups.names
        ]
        plots.append((k, places, series))
    limits = figures.limits_of(one for _, _, series in plots for one in series)
    caption = "Whiskers: range of the draws, of as many neurons. Under a group: empirical p against the same layers."
    return [
        (
            f"1g-{split}-matched-top{k}",
            caption,
            figures.dot_ranges(
                f"Top-{k} against as many random neurons",
                places,
                series,
                axis=POINTS,
                minority=groups.places,
                limits=limits,
            ),
        )
        for k, places, series in plots
    ]


def _matched_mark(cells: Iterable[Cell], criterion: str, name: str, k: int) -> Mark | None:
    """Return the mean and range of the draws matched to a group's own top-k, on that group."""
    wanted = (criterion, name, k)
    return next(
        (
            cell.effects[name].mark
            for cell in cells
            if tuple(cell.setting[key] for key in ("criterion", "chosen_for", "k")) == wanted and name in cell.effects
        ),
        None,
    )


SECTIONS: Final[Mapping[str, Callable[[Mapping[str, Any], Groups, str], Section]]] = {
    "1a": lambda run, groups, split: _whole_model(run, groups, "1a", split),
    "1b": _ranks,
    "1c": lambda run, groups, split: _whole_model(run, groups, "1c", split),
    "1d": lambda run, groups, split: _whole_model(run, groups, "1d", split),
    "1e": _within_layers,
    "1f": _rewinding,
    "1g": _controls,
}


# The top of the page


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of `count` examples."""
    if not count:
        return share, share
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def _accuracy_figure(run: Mapping[str, Any], groups: Groups) -> str:
    series = []
    splits = [split for split in ("train", "test") if split in run["accuracy"]] or list(run["accuracy"])
    for place, split in enumerate(splits):
        counts = run["counts"].get(split, [0] * len(groups.names))
        marks = []
        for share, count in zip(run["accuracy"][split], counts, strict=True):
            low, high = _wilson(share, count)
            marks.append(Mark(100 * share, 100 * low, 100 * high))
        series.append(
            Series(split, tuple(marks), figures.ORDERED_COLOURS[2 * place % 3], split if len(split) < 6 else "")
        )
    names = list(groups.names)
    title = "Accuracy of the trained model per group"
    return figures.grouped_bars(title, names, series, axis="accuracy, %", minority=groups.places, limits=(0.0, 100.0))


def _accuracy_words(run: Mapping[str, Any], groups: Groups) -> str:
    """Return the train and test accuracy of minority and majority groups, and the gaps, in one sentence."""
    if not {"train", "test"} <= set(run["accuracy"]):
        return "The run has no accuracy on both training and test set yet."
    train, test = (dict(zip(groups.names, run["accuracy"][split], strict=True)) for split in ("train", "test"))
    parts = [
        f"{groups.label(name)} reaches {number(100 * train[name])} % in training and {number(100 * test[name])} % in "
        f"test (gap {signed(100 * (train[name] - test[name]))})"
        for name in groups.names
        if name in groups.minority
    ]
    gaps = [100 * (train[name] - test[name]) for name in groups.majority]
    rest = ""
    if gaps:
        ends = list(dict.fromkeys(f"{signed(gap)}" for gap in (min(gaps), max(gaps))))
        rest = f"the gap of the majority groups is {' to '.join(ends)} points"
    said = "; ".join(part for part in (_listed(parts, 6) if parts else "", rest) if part)
    return f"{said[0].upper()}{said[1:]}." if said else ""


def _groups_table(run: Mapping[str, Any], groups: Groups) -> str:
    """Return the table of the groups: counts found (expected), accuracy, the gap, and what one example is worth."""
    counts, accuracy, expected = run["counts"], run["accuracy"], run.get("expected_counts") or {}
    header = ["group", "kind", *(f"{escape(split)} examples" for split in counts)]
    header += [f"{escape(split)} accuracy, %" for split in accuracy] + [
        "gap train &minus; test",
        "one train example, points",
    ]
    rows = []
    for place, name in enumerate(groups.names):
        row = [escape(f"G{place} {name}"), "minority" if name in groups.minority else "majority"]
        for split, found in counts.items():
            row.append(_count_cell(found, expected.get(split), place))
        for split, shares in accuracy.items():
            low, high = _wilson(shares[place], counts.get(split, {place: 0})[place])
            row.append(f"{number(100 * shares[place])}<small>[{number(100 * low)}, {number(100 * high)}]</small>")
        both = {"train", "test"} <= set(accuracy)
        row.append(signed(100 * (accuracy["train"][place] - accuracy["test"][place])) if both else "&ndash;")
        size = counts.get("train", {}) and counts["train"][place]
        row.append(number(100 / size, 2) if size else "&ndash;")
        rows.append(row)
    return _table(header, rows)


def _count_cell(found: Sequence[int], expected: Sequence[int] | None, place: int) -> str:
    share = 100 * found[place] / sum(found) if sum(found) else 0.0
    cell = f"{found[place]}<small>{number(share)} %</small>"
    if expected is None:
        return cell
    match = "as the paper's" if expected[place] == found[place] else f"<b>the paper has {expected[place]}</b>"
    return f"{cell}<small>{match}</small>"


def _counts_words(run: Mapping[str, Any]) -> str:
    expected = run.get("expected_counts") or {}
    if not expected:
        return ""
    wrong = [split for split, counts in expected.items() if list(counts) != list(run["counts"].get(split, ()))]
    if wrong:
        return f"The group counts of {_listed(wrong)} differ from the paper's: both are in the table."
    return f"The group counts of {_listed(list(expected))} are the paper's."


def _settings_rows(run: Mapping[str, Any]) -> list[list[str]]:
    """Return the setting, the environment and the seconds as rows of name and value."""
    settings, environment, seconds = run["settings"], run.get("environment", {}), run.get("seconds", {})
    preset = str(settings.get("preset"))
    told = {
        "preset": f"{preset} ({PRESETS[preset]})" if preset in PRESETS else preset,
        "weights": settings.get("weights") or "none: random initialisation",
        "splits": ", ".join(settings.get("splits", ())),
        "quick": "yes: few epochs and draws" if settings.get("quick") else "no",
    }
    rows = [
        [escape(str(key)), escape(str(told.get(key, "none" if value is None else value)))]
        for key, value in settings.items()
    ]
    rows.append(["neurons", f"{run.get('neurons', '?')} in {_times(len(run.get('layers', ())), 'studied layer')}"])
    rows += [[escape(str(key)), escape(str(value))] for key, value in environment.items()]
    each = ", ".join(f"{key} {number(value)}" for key, value in seconds.items())
    rows.append(["seconds", f"{number(sum(seconds.values()))} ({escape(each)})" if seconds else "not recorded"])
    rows.append(["neuronsurgery", escape(str(run.get("version", "?")))])
    return rows


def _training_figures(run: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the figures of loss and accuracy as met in training, where the run recorded them."""
    steps = run.get("trajectory") or []
    drawn = []
    for key, axis, times in (("accuracy", "accuracy, %", 100.0), ("loss", "cross entropy", 1.0)):
        marks = [None if step.get(key) is None else Mark(times * step[key]) for step in steps]
        if sum(mark is not None for mark in marks) > 1:
            one = Series(f"{key} of the training batches as met", tuple(marks), figures.GROUP_COLOURS[0])
            title = f"{key.capitalize()} during training"
            places = [str(step["epoch"]) for step in steps]
            drawn.append(
                (f"training-{key}", "", figures.depth_lines(title, places, [one], axis=axis, below="epoch", spacing=14))
            )
    return drawn


def _model_figures(run: Mapping[str, Any], groups: Groups) -> list[tuple[str, str, str]]:
    """Return the figures of the trained model before any edit: accuracy per group, and how training went."""
    if not run["accuracy"]:
        return _training_figures(run)
    caption = "Whiskers: Wilson's 95 % intervals. Hatched: minority groups."
    return [("accuracy", caption, _accuracy_figure(run, groups)), *_training_figures(run)]


# The page


STYLE: Final = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 20px 16px 60px; max-width: 1320px; color: #1A1A1A; background: #FFFFFF;
  font: 17px/1.5 Helvetica, Arial, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 30px; line-height: 1.2; margin: 8px 0; }
h2 { font-size: 24px; line-height: 1.25; margin: 52px 0 10px; padding-top: 14px; border-top: 3px solid #0072B2; }
h3 { font-size: 19px; margin: 26px 0 8px; }
p, ul { max-width: 78ch; }
.finding { font-size: 18px; padding: 12px 16px; background: #EEF5FB; border-left: 5px solid #0072B2; max-width: 92ch; }
.warning { font-size: 18px; padding: 12px 16px; background: #FFF4E5; border-left: 5px solid #D55E00; max-width: 92ch; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 540px), 1fr)); gap: 18px;
  margin: 16px 0; }
figure { margin: 0; min-width: 0; border: 1px solid #DDDDDD; border-radius: 6px;
  padding: 8px; }
figure.wide { grid-column: 1 / -1; }
figure > div { overflow-x: auto; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { font-size: 15px; color: #444444; padding: 4px 8px; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-size: 15px; line-height: 1.35; }
th, td { text-align: right; vertical-align: top; padding: 5px 10px; border-bottom: 1px solid #DDDDDD; }
td { white-space: nowrap; font-variant-numeric: tabular-nums; }
th { font-weight: normal; text-align: left; }
thead th { text-align: right; vertical-align: bottom; border-bottom: 2px solid #1A1A1A; font-weight: bold;
  max-width: 190px; }
thead th.head { text-align: left; }
.words td { text-align: left; white-space: normal; }
.words thead th { text-align: left; }
tbody th { min-width: 112px; }
small { display: block; font-size: 13px; color: #555555; }
code { font: 13px/1.3 Menlo, Consolas, monospace; }
summary { cursor: pointer; color: #0B4A75; font-weight: bold; padding: 6px 0; }
@media (max-width: 640px) { body { font-size: 16px; padding: 12px 14px 40px; } h1 { font-size: 25px; }
  h2 { font-size: 21px; } figure { padding: 4px; } .finding, .warning { font-size: 16px; } }
@media print { figure, tr { break-inside: avoid; } }
"""

HOW_TO_READ: Final = (
    "A change is accuracy after the edit minus accuracy before it, of the same examples, in percentage points.",
    "Intervals are 95 % intervals over the examples of one training run. They are not over seeds: another seed trains "
    "another network, and only several runs can say how far that varies.",
    "An effect on a group is seen where the interval of its change excludes 0 (of several random draws: in more than "
    "half of them). No effect of a point or more: the interval lies within one point of 0. Undecided: neither.",
    "A group's own gradient: the neurons whose gradient of that group's mean loss is largest were edited, and the "
    "figure shows the accuracy of that same group. Magnitude chooses the same neurons for every group.",
    "In a table, bold: an effect is seen; in brackets the 95 % interval; p of McNemar's exact test. Of several draws: "
    "mean and standard deviation, in how many an effect is seen, the outermost ends of the intervals, the median p.",
    "Minority groups, where class and attribute disagree, are hatched or drawn thick, and named so.",
)


def _paragraph(text: str, kind: str = "") -> str:
    return f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escape(text)}</p>" if text else ""


def _bullets(texts: Iterable[str]) -> str:
    items = "\n".join(f"<li>{escape(text)}</li>" for text in texts if text)
    return f"<ul>\n{items}\n</ul>" if items else ""


def _figures_html(drawn: Sequence[tuple[str, str, str]]) -> str:
    """Return figures side by side where there is room, each no smaller than its text can be read."""
    if not drawn:
        return ""
    parts = []
    for _, caption, svg in drawn:
        width = float(svg.split('viewBox="0 0 ', 1)[1].split(" ", 1)[0])
        kind = "wide" if width > 700 else ""
        said = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        sizes = f"min-width:{0.72 * width:.0f}px;max-width:{1.25 * width:.0f}px"
        parts.append(f'<figure class="{kind}"><div><div style="{sizes}">{svg}</div></div>{said}</figure>')
    return f'<div class="figures">\n{"".join(parts)}\n</div>'


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>" if body else ""


def _section_html(identifier: str, split: str, section: Section) -> str:
    """Return one experiment on one split: sentence, figures, table, remarks, and the rest folded away."""
    return "\n".join(
        part
        for part in (
            f"<h3>On the {escape(split)} split</h3>",
            _paragraph(section.finding, "finding"),
            _figures_html(section.figures),
            section.table,
            _bullets(section.remarks),
            _folded(f"{_times(len(section.more_figures), 'more figure')}", _figures_html(section.more_figures)),
            _folded("Every intervention and its effect on every group", section.full_table),
            f'<p>All rows: <a href="tables/{identifier}.csv">tables/{identifier}.csv</a></p>',
        )
        if part
    )


def _overview_html(sections: Mapping[str, Mapping[str, Section]]) -> str:
    rows = [
        [
            f'<a href="#e{identifier}">{identifier} {escape(TITLES[identifier])}</a>',
            escape(split),
            *map(escape, section.overview),
        ]
        for identifier, of_split in sections.items()
        for split, section in of_split.items()
    ]
    table = _table(["experiment", "split", "minority groups", "majority groups"], rows)
    return table.replace('<div class="scroll">', '<div class="scroll words">') if rows else ""


def _top_html(run: Mapping[str, Any], groups: Groups, sections: Mapping[str, Mapping[str, Section]]) -> str:
    settings = run["settings"]
    missing = [f"{identifier} ({title})" for identifier, title in TITLES.items() if identifier not in sections]
    quick = "A quick run: few epochs and draws. It shows that the program runs; its numbers mean little."
    unfinished = f"This run has no result yet of {_listed(missing, 7)}."
    told = [str(settings.get(key)) for key in ("data", "arch")] + [f"preset {settings.get('preset')}"]
    told += [f"{settings.get('epochs')} epochs", f"seed {settings.get('seed')}"]
    table = _table(["setting", ""], _settings_rows(run)).replace('<div class="scroll">', '<div class="scroll words">')
    return "\n".join(
        part
        for part in (
            "<h1>Critical neurons: Stage 1</h1>",
            _paragraph(", ".join(told)),
            _paragraph(quick, "warning") if settings.get("quick") else "",
            _paragraph(unfinished, "warning") if missing else "",
            _paragraph(_accuracy_words(run, groups), "finding"),
            _figures_html(_model_figures(run, groups)),
            _groups_table(run, groups),
            _paragraph(_counts_words(run)),
            "<h2>What came out</h2>" if sections else "",
            _overview_html(sections),
            "<h3>How to read this</h3>",
            _bullets(HOW_TO_READ),
            _folded("Setting, environment and seconds", table),
        )
        if part
    )


def _page(run: Mapping[str, Any], groups: Groups, sections: Mapping[str, Mapping[str, Section]]) -> str:
    body = [_top_html(run, groups, sections)]
    for identifier, of_split in sections.items():
        body.append(f'<h2 id="e{identifier}">{identifier} {escape(TITLES[identifier])}</h2>')
        body += [_section_html(identifier, split, section) for split, section in of_split.items()]
    title = f"Stage 1: {run['settings'].get('data')}, seed {run['settings'].get('seed')}"
    newline = "\n"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{newline.join(body)}\n</body>\n</html>\n"
    )


# The files


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows as CSV, numbers in full; lists are joined by semicolons, null is empty."""
    text = io.StringIO()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: ";".join(map(str, v)) if isinstance(v, (list, tuple)) else v for k, v in row.items()})
    return text.getvalue().encode()


def _experiment_rows(by_split: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return one row per record and group, or per record where it has no changes (1b)."""
    rows = []
    for split, records in by_split.items():
        for record in records:
            plain = {"split": split} | {key: value for key, value in record.items() if key != "changes"}
            rows += [plain | change for change in record.get("changes", [{}])]
    return rows


def _group_rows(run: Mapping[str, Any], groups: Groups) -> list[dict[str, Any]]:
    """Return one row per split and group: the count found, the paper's, and the accuracy."""
    rows = []
    for split, counts in run["counts"].items():
        accuracy, expected = run["accuracy"].get(split), (run.get("expected_counts") or {}).get(split)
        for place, name in enumerate(groups.names):
            row = {"split": split, "group": name, "minority": name in groups.minority, "count": counts[place]}
            row["expected"] = expected[place] if expected else None
            rows.append(row | {"accuracy": accuracy[place] if accuracy else None})
    return rows


def _tables(run: Mapping[str, Any], groups: Groups) -> dict[str, bytes]:
    """Return the CSV files by name."""
    tables = {identifier: _experiment_rows(by_split) for identifier, by_split in run["experiments"].items()}
    tables["groups"] = _group_rows(run, groups)
    for key in ("sensitive_layers", "control_p"):
        tables[key] = [{"split": split} | row for split, rows in run.get(key, {}).items() for row in rows]
    tables["training"] = list(run.get("trajectory") or [])
    return {name: _csv(rows) for name, rows in tables.items() if rows}


def _checked(results: Mapping[str, Any]) -> tuple[Mapping[str, Any], Groups]:
    """Return the results with what an unfinished run may lack filled in, and its groups.

    Raises:
        ValueError: if the schema is another, or parts are missing that every run has.
    """
    schema = results.get("schema")
    if schema != SCHEMA:
        raise ValueError(
            f"results.json has schema {schema!r}, and this version reads schema {SCHEMA}: make the report with the "
            f"version of neuronsurgery that wrote it ({results.get('version', 'unknown')}), or run the study again"
        )
    missing = [key for key in ("settings", "groups", "counts") if key not in results]
    if missing:
        raise ValueError(f"results.json lacks {', '.join(missing)}: it is not of a finished or interrupted study run")
    run = {"accuracy": {}, "experiments": {}, "minority": []} | dict(results)
    unknown = sorted(set(run["experiments"]) - set(TITLES))
    if unknown:
        raise ValueError(f"results.json has experiments {', '.join(unknown)}; this version knows {', '.join(TITLES)}")
    names = tuple(map(str, run["groups"]))
    return run, Groups(names, frozenset(names[place] for place in run["minority"]))


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Return the path of `report.html`, written to a folder with `tables/*.csv` and `figures/*.svg`.

    The page holds its styles and figures and loads nothing. The same results give the same bytes.

    Args:
        results: the content of a run's `results.json` (schema 1); experiments may be missing.
        folder: made if it is not there. Files of these names are replaced, others left alone.

    Raises:
        ValueError: if the results are of another schema, or are not a run's.
        OSError: if the folder cannot be written to.
    """
    run, groups = _checked(results)
    sections: dict[str, dict[str, Section]] = {}
    for identifier, build in SECTIONS.items():
        by_split = run["experiments"].get(identifier) or {}
        found = {split: build(run, groups, split) for split, records in by_split.items() if records}
        if found:
            sections[identifier] = found
    drawn = [f for of in sections.values() for s in of.values() for f in s.figures + s.more_figures]
    drawn += _model_figures(run, groups)
    for part in ("tables", "figures"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, _, svg in drawn:
        write_atomically(folder / "figures" / f"{name}.svg", svg.encode())
    for name, table in _tables(run, groups).items():
        write_atomically(folder / "tables" / f"{name}.csv", table)
    path = folder / "report.html"
    write_atomically(path, _page(run, groups, sections).encode())
    return path
