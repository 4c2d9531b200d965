"""From effects to sentences: what is seen on which groups, what is undecided, and what qualifies it.

Every sentence follows from the numbers by rule: an effect is seen where the interval of its change excludes 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from neuronsurgery.study.figures import number, signed
from neuronsurgery.study.report.effects import Effect, Groups

PRESETS: Final[Mapping[str, str]] = {
    "adam": "Adam without weight decay",
    "sgd": "SGD with momentum and weight decay 1e-3",
}
EXPECTED: Final[Mapping[str, str]] = {
    "adam": "over five seeds of the embedded data the magnitude criterion showed next to nothing under this preset",
    "sgd": "over five seeds of the synthetic data most neurons of largest gradient were among those of largest "
    "magnitude under this preset, as in the paper",
}

NO_SELECTIVITY: Final = (
    "To compare what a group loses under its own neurons with what the majority groups lose under theirs says nothing "
    "of whether a group's neurons spare the others: that is what 1h looks at."
)


def listed(items: Sequence[str], most: int = 4) -> str:
    """Return "a, b and c", and how many more where there are more than `most`."""
    shown = list(items[:most]) + ([f"{len(items) - most} more"] if len(items) > most else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}" if shown else "none"


def times(count: int, thing: str) -> str:
    """Return a number of things: "1 draw", "2 draws"."""
    return f"{count} {thing}{'s' * (count != 1)}"


def strongest(effects: Sequence[Effect]) -> Effect:
    """Return the effect of the largest change in size."""
    return max(effects, key=lambda effect: abs(effect.change))


def outcome(effects: Sequence[Effect], groups: Groups) -> str:
    """Return on which groups an effect is seen, on which none, and which are undecided, in words."""
    by_group = {name: [e for e in effects if e.group == name] for name in groups.names}
    by_group = {name: found for name, found in by_group.items() if found}
    seen, undecided, none = [], [], []
    for name, found in by_group.items():
        visible = [effect for effect in found if effect.seen]
        if visible:
            best = strongest(visible)
            share = f", {len(visible)} of {len(found)} times" if len(found) > 1 else ""
            seen.append(f"{groups.label(name)}{share} ({best} {where(best)})".replace(" )", ")"))
        elif all(effect.within_a_point for effect in found):
            none.append(groups.label(name))
        else:
            undecided.append(groups.label(name))
    parts = [f"an effect is seen on {listed(seen)}"] if seen else ["no effect seen on any group"]
    if undecided:
        parts.append(f"undecided on {listed(undecided)}, whose intervals include 0 and more than a point")
    if none and seen:
        parts.append(f"no effect of a point or more on {listed(none)}")
    return "; ".join(parts)


def where(effect: Effect) -> str:
    """Return under which intervention, in words."""
    return f"at {effect.setting}" if effect.setting else ""


def by_both(done: str, gradient: Sequence[Effect], magnitude: Sequence[Effect], groups: Groups) -> str:
    """Return the sentence of what was done and what came out by either criterion."""
    parts = []
    if gradient:
        parts.append(f"chosen by each group's own gradient, {outcome(gradient, groups)}")
    if magnitude:
        parts.append(f"chosen by magnitude, {outcome(magnitude, groups)}")
    return f"{done}: {'. And '.join(parts) or 'nothing was recorded'}."


def comparison(effects: Sequence[Effect], groups: Groups) -> str:
    """Return how the minority groups compare with the others, as far as the intervals allow; "" if one is missing."""
    minority = [effect for effect in effects if effect.group in groups.minority]
    majority = [effect for effect in effects if effect.group not in groups.minority]
    if not minority or not majority:
        return ""
    seen = [any(effect.seen for effect in side) for side in (minority, majority)]
    if not any(seen):
        return "Neither the minority nor the majority groups show an effect."
    few, many = (strongest([effect for effect in side if effect.seen] or side) for side in (minority, majority))
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
    kind = "intervals" if few.draws == 1 else "ranges over the draws"
    least = [0.0 if e.low <= 0 <= e.high else min(abs(e.low), abs(e.high)) for e in (few, many)]
    most = [max(abs(e.low), abs(e.high)) for e in (few, many)]
    apart = least[0] > most[1] or least[1] > most[0]
    return f"the {kind} of their sizes {'do not overlap' if apart else 'overlap: this run does not settle it'}"


def overview(effects: Sequence[Effect], groups: Groups) -> tuple[str, str]:
    """Return what was seen on the minority groups and on the others, for the table at the top."""

    def said(side: Sequence[Effect]) -> str:
        if not side:
            return "no such group"
        seen = sum(effect.seen for effect in side)
        best = strongest([effect for effect in side if effect.seen] or side)
        words = f"seen {seen} of {len(side)} times" if seen else "no effect seen"
        return f"{words}; largest change {signed(100 * best.change)} points"

    return said([e for e in effects if e.group in groups.minority]), said(
        [e for e in effects if e.group not in groups.minority]
    )


def step_remark(results: Mapping[str, Any], split: str, groups: Groups) -> list[str]:
    """Return what one example of a small group is worth."""
    counts = dict(zip(groups.names, results["counts"].get(split, ()), strict=False))
    coarse = {name: 100 / count for name, count in counts.items() if count and 100 / count >= 1}
    if not coarse:
        return []
    said = [f"{groups.label(name)} ({counts[name]} examples): {number(step)} points" for name, step in coarse.items()]
    return [f"One example of a small group is 100/n points, and its changes move in such steps: {listed(said, 12)}."]


def preset_remark(results: Mapping[str, Any], effects: Sequence[Effect], groups: Groups) -> list[str]:
    """Return what this run shows by magnitude, beside what its preset led one to expect."""
    preset = str(results["settings"].get("preset"))
    if not effects:
        return []
    told = f" ({PRESETS[preset]}); {EXPECTED[preset]}" if preset in PRESETS else ""
    return [f"This run used the preset {preset}{told}. By magnitude, this run: {outcome(effects, groups)}."]


def level_of(run: Mapping[str, Any]) -> float:
    """Return the level of the intervals of a run: 0.95 where the run does not say."""
    return float((run.get("intervals") or {}).get("level", 0.95))


def percent(share: float) -> str:
    """Return a share in percent with the digits that it has: "95 %", "99.9 %"."""
    return f"{100 * share:.6g} %"


def chance_remark(run: Mapping[str, Any], effects: Sequence[Effect]) -> list[str]:
    """Return how many intervals would exclude 0 without any effect, where there are many."""
    looks, level = sum(effect.draws for effect in effects), level_of(run)
    if looks < 20:
        return []
    expected = f"{looks * round(1 - level, 9):.0f}"
    return [f"Of {looks} intervals of {percent(level)}, up to about {expected} exclude 0 by chance alone."]


def plain_p(p: float) -> str:
    """Return a p-value for a sentence."""
    return f"{p:.4f}" if p < 0.01 else f"{p:.3f}"
