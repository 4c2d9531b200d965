"""The chapter of memorisation: the estimated memorisation score of training examples, of one run or over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from neuronsurgery.study import figures
from neuronsurgery.study.figures import Mark, Series, number
from neuronsurgery.study.report.effects import Groups
from neuronsurgery.study.report.levels import Found, Level, by_group, level_of
from neuronsurgery.study.report.section import Results, Section
from neuronsurgery.study.report.tables import html_table, level_cell
from neuronsurgery.study.report.wording import listed, percent, times

SHARES = ("right_when_seen", "right_when_not_seen")
NONE = "&ndash;"


def memorization(run: Results, groups: Groups) -> list[Section]:
    """Return the sections of memorisation: scores by group, minorities against others, and what goes with the score."""
    found = run.get("memorization")
    if not found:
        return []
    if "impossible" in found:
        return [Section(f"Memorisation could not be estimated: {found['impossible']}")]
    section = Section(_finding(run, found, groups))
    section.figures = _figure_over_seeds(found, groups) if _over_seeds(run) else _strips(found, groups)
    section.table = _table(run, found, groups)
    section.remarks = _remarks(run, found)
    section.rows = {"memorization": _plain_rows(found["groups"])}
    return [section, *_differences(run, found, groups), *_relation(run, found, groups)]


def _over_seeds(run: Results) -> bool:
    return run.get("kind") == "seeds"


def _finding(run: Results, found: Results, groups: Groups) -> str:
    """Return the mean scores, and whether the minority groups are memorised more than the rest of their class."""
    rows = {row["group"]: row for row in found["groups"] if row.get("mean") is not None}
    means = [f"{groups.label(name)} {_mean_words(rows[name])}" for name in groups.names if name in rows]
    start = "Mean memorisation score ± its standard error"
    if _over_seeds(run):
        start = f"Mean memorisation score over {times(len(run['seeds']), 'seed')} and its interval"
    return f"{start}: {listed(means, 12)}. {_sentence(found['minority_difference']['text'])}"


def _mean_words(row: Results) -> str:
    """Return the mean score of a group, with its standard error or over seeds its interval."""
    mean, error = level_of(row["mean"]), row.get("standard_error")
    behind = _interval(mean, 2) if error is None else f"± {number(error, 2)}"
    return f"{number(mean.value, 2)} {behind}".rstrip()


def _interval(level: Level, decimals: int) -> str:
    """Return the interval of a number that is no share, "[-0.10, 0.30]"; nothing where there is none."""
    if level.low is None or level.high is None:
        return ""
    return f"[{number(level.low, decimals)}, {number(level.high, decimals)}]"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _remarks(run: Results, found: Results) -> list[str]:
    """Return what the score is, and how its models differ from the run's own."""
    said = [
        f"The score of an example: of {times(found['models'], 'model')}, the accuracy on it of those that saw it minus "
        f"that of those that did not (Feldman and Zhang, 2020); every model saw {percent(found['share'])} of the "
        f"training images. Near 0: learnt from the others; near 1: right only because it was seen.",
        _epochs_remark(found["epochs"], run["settings"]["epochs"]),
    ]
    if _over_seeds(run):
        said.append(
            "Intervals are Student's 95 % intervals of the mean over the seeds; those in the report of a single seed "
            "are over its images and its models."
        )
    return said


def _epochs_remark(epochs: int, own: int) -> str:
    if epochs == own:
        return f"These models trained for {times(epochs, 'epoch')}, as the run's own did."
    return (
        f"These models trained for {times(epochs, 'epoch')}, the run's own for {own}. The scores are those of that "
        f"{'shorter' if epochs < own else 'longer'} training: where it has not fitted the images that it saw (right "
        f"when seen, beside the accuracy of the run's own model), it memorises less than a training that has."
    )


# By group


def _table(run: Results, found: Results, groups: Groups) -> str:
    seeds = _over_seeds(run)
    own = by_group(run, groups, "train", run["accuracy"]["train"]) if "train" in run["accuracy"] else {}
    rows = []
    for row in found["groups"]:
        rows.append(
            [
                escape(groups.label(row["group"])),
                _score(row.get("mean")),
                *([] if seeds else [_score(row["standard_error"])]),
                *(_share(row.get(share)) for share in SHARES),
                level_cell(own[row["group"]]) if row["group"] in own else NONE,
                _per_seed(row.get("mean")) if seeds else str(row["count"]),
            ]
        )
    shares = ["right when seen, %", "right when not seen, %", "right in the run's own model, %"]
    middle = [] if seeds else ["standard error"]
    return html_table(["group", "mean score", *middle, *shares, "score per seed" if seeds else "examples"], rows)


def _score(found: Found | None) -> str:
    """Return a table cell: a score, and over seeds its interval."""
    return NONE if found is None else _cell(level_of(found), 3)


def _cell(level: Level, decimals: int) -> str:
    interval = _interval(level, decimals)
    return number(level.value, decimals) + (f"<small>{interval}</small>" if interval else "")


def _share(found: Found | None) -> str:
    return NONE if found is None else level_cell(level_of(found))


def _per_seed(found: Found | None, decimals: int = 3) -> str:
    values = () if found is None else level_of(found).values
    return ", ".join(number(value, decimals) for value in values) or NONE


def _strips(found: Results, groups: Groups) -> list[tuple[str, str, str]]:
    points = {row["group"]: [score for score in row["scores"] if math.isfinite(score)] for row in found["points"]}
    names = [name for name in groups.names if name in points]
    if not any(points.values()):
        return []
    minority = [place for place, name in enumerate(names) if name in groups.minority]
    svg = figures.strips(
        "Memorisation score of the training images",
        names,
        [points[name] for name in names],
        axis="memorisation score",
        minority=minority,
    )
    return [("memorization", "Bar: median.", svg)]


def _figure_over_seeds(found: Results, groups: Groups) -> list[tuple[str, str, str]]:
    means = {row["group"]: level_of(row["mean"]) for row in found["groups"] if "mean" in row}
    names = [name for name in groups.names if name in means]
    if not names:
        return []
    marks = tuple(Mark(means[name].value, means[name].low, means[name].high) for name in names)
    svg = figures.dot_rows(
        "Mean memorisation score per group",
        [groups.label(name) for name in names],
        [Series("mean score", marks, figures.GROUP_COLOURS[0])],
        axis="mean memorisation score",
        each=[[means[name].values for name in names]],
    )
    return [("memorization", "Lines: Student's 95 % interval; strokes: the seeds.", svg)]


# Minorities against the rest of their class


def _differences(run: Results, found: Results, groups: Groups) -> list[Section]:
    """Return the section of by how much each minority scores above the rest of its class; none without any."""
    whole, alone = found["minority_difference"], list(found["minority_difference"].get("groups", ()))
    if not alone:
        return []
    named = [("minority images, on the mean of the classes", whole)]
    named += [(groups.label(row["group"]), row) for row in alone]
    said = " ".join(_sentence(row["text"]) for row in alone)
    section = Section(said, heading="Minorities and the rest of their class")
    errors = [] if _over_seeds(run) else ["models_error", "examples_error"]
    rows = []
    for name, row in named:
        level = Level(row["mean"], row.get("low"), row.get("high")) if row.get("mean") is not None else None
        each = [_per_seed(row if "values" in row else None)] if _over_seeds(run) else []
        each += [_score(row.get(error)) for error in errors]
        rows.append([escape(name), NONE if level is None else _cell(level, 3), *each])
    header = ["", "score above the rest of the class"]
    header += ["per seed"] if _over_seeds(run) else ["standard error over models", "over images"]
    section.table = html_table(header, rows)
    kept = [{key: value for key, value in row.items() if key != "groups"} for row in (whole, *alone)]
    section.rows = {"memorization_difference": [{"group": "all minorities", **kept[0]}, *kept[1:]]}
    return [section]


# What goes with the score


def _relation(run: Results, found: Results, groups: Groups) -> list[Section]:
    """Return the section of how the scores go with what each cut does to an image."""
    related = list(found.get("relation", ()))
    if not related:
        return []
    correlations = [_correlation(row) for row in related]
    rows = []
    for row, level in zip(related, correlations, strict=True):
        among = "all images" if row["group"] == "all" else escape(groups.label(row["group"]))
        said = [_not_given(row), ""]
        if level is not None:
            said = [_cell(level, 2), "seen" if _excludes_zero(level) else "no relation seen"]
        behind = _per_seed(row.get("spearman"), 2) if _over_seeds(run) else str(row["count"])
        rows.append([among, escape(row["cut"]), behind, *said])
    section = Section(_relation_words(correlations), heading="What goes with the score")
    behind = "per seed" if _over_seeds(run) else "images"
    section.table = html_table(["among", "cut, and what is measured", behind, "Spearman's correlation", ""], rows)
    section.rows = {"memorization_relation": _plain_rows(related)}
    return [section]


def _correlation(row: Results) -> Level | None:
    """Return a rank correlation with its interval; None where it could not be given."""
    found = row.get("spearman")
    if found is None:
        return None
    return level_of(found) if isinstance(found, Mapping) else Level(found, row["low"], row["high"])


def _excludes_zero(level: Level) -> bool:
    return level.low is not None and level.high is not None and (level.low > 0 or level.high < 0)


def _not_given(row: Results) -> str:
    why = row.get("impossible", "")
    return f"not given in {times(why, 'seed')}" if isinstance(why, int) else f"not given: {escape(why)}"


def _relation_words(correlations: Sequence[Level | None]) -> str:
    """Return how many of the correlations that were given have an interval that excludes 0."""
    given = [level for level in correlations if level is not None]
    lacking = len(correlations) - len(given)
    seen = sum(map(_excludes_zero, given))
    said = (
        f"Of {times(len(given), 'rank correlation')} between the score and what a cut does to an image, {seen} "
        f"{'has' if seen == 1 else 'have'} an interval that excludes 0"
    )
    said += f"; {lacking} more could not be given. " if lacking else ". "
    return f"{said}Among all images a relation may be no more than that of the groups."


# CSV


def _plain_rows(rows: Sequence[Results]) -> list[Results]:
    """Return rows as they are, or where some of their columns are summaries over seeds, one row per summary."""
    plain: list[Results] = []
    for row in rows:
        summaries = {key: value for key, value in row.items() if isinstance(value, Mapping)}
        rest = {key: value for key, value in row.items() if key not in summaries}
        plain += [{**rest, "measure": key, **found} for key, found in summaries.items()] or [rest]
    return plain
