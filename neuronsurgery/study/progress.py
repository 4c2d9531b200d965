"""How far a run is: which step of how many, and about how long the rest will take, as lines on standard error.

Costs are in epochs of training, for that is what is timed first. They are rough: what a sweep of edits, a pass over the
images or an epoch of a method took beside an epoch of training, on the embedded data.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from neuronsurgery.study.settings import Settings

TRAINING: Final = "training"

BY_LAYER: Final = 9
"""The layers of the embedded data's network; of others the costs of 1e and 1f are a guess."""

PAUSE: Final = 10.0
"""Seconds between two lines of a count that go to a file; a terminal has one line, which is written over."""


@dataclass
class Steps:
    """The steps of a run, counted as they begin and end; it says nothing of a step that it does not know.

    `costs` of each step in epochs of training, `names` to call them by, and the seconds of an epoch of training.
    """

    costs: Mapping[str, float] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    per_epoch: float = 0.0
    _done: set[str] = field(default_factory=set)
    _seconds: float = 0.0
    _cost: float = 0.0
    _began: float = 0.0

    def announce(self, found: Sequence[str], epochs: int) -> None:
        """Say what there is to do, how long that may take, and what of it the folder holds: steps and epochs."""
        left = [name for name in self.costs if name not in found]
        if found or epochs:
            said = [f"the training after epoch {epochs}"] * bool(epochs) + [_steps(len(found))] * bool(found)
            _say(f"found in the folder, and not done again: {' and '.join(said)}")
        cost = sum(self.costs[name] for name in left) - (epochs if TRAINING in left else 0)
        _say(f"{_steps(len(left))} to do{in_words(cost * self.per_epoch, ' in all')}")

    def begin(self, name: str) -> None:
        """Say which step begins."""
        self._began = time.perf_counter()
        if name in self.costs:
            place = min(len(self._done) + 1, len(self.costs))
            left = sum(cost for other, cost in self.costs.items() if other not in self._done)
            seconds = left * (self._seconds / self._cost if self._cost else self.per_epoch)
            _say(f"[{place}/{len(self.costs)}] {self.names.get(name, name)}{in_words(seconds, ' left')}")

    def end(self, name: str, worked: bool = True) -> None:
        """Note that a step is done; without work if it was found done."""
        if name in self.costs and name not in self._done:
            self._done.add(name)
            if worked:
                self._seconds += time.perf_counter() - self._began
                self._cost += self.costs[name]

    def epoch(self, report: object, epoch: int, epochs: int, seconds: float) -> None:
        """Say what an epoch of the training came to, and how long all that is left may take."""
        self.per_epoch = seconds
        rest = sum(cost for name, cost in self.costs.items() if name != TRAINING)
        _say(f"{report}{in_words((epochs - epoch + rest) * seconds, ' left')}")


def steps_of(settings: Settings, arms: Mapping[str, tuple[str, float]], splits: Iterable[str]) -> Steps:
    """Return the steps of a run, by the names that `RunFolder.remember` has for them.

    `arms` of Stage 2, by their names in files: what they are called, and their epochs, each counted as often as it
    passes the images. `splits` are those that the fragility stage looks at.
    """
    found = {TRAINING: (f"training: {settings.epochs} epochs", float(settings.epochs))}
    if "1" in settings.stages:
        for name in settings.experiments:
            for split in ("train",) if name == "1h" else settings.splits:
                found[f"{name}-{split}"] = f"{name} on {split}", _passes(settings)[name] / 3
    if "2" in settings.stages:
        found |= {name: (f"Stage 2, {said}", cost) for name, (said, cost) in arms.items()}
        found["stage-2-dfr"] = "Stage 2, DFR", 1.0
    if "fragility" in settings.stages:
        found |= {f"fragility-{split}": (f"fragility of the {split} images", 4.0 * settings.draws) for split in splits}
        found["fragility-mitigation"] = "last layers retrained", 2.0 * settings.draws
    return Steps({name: cost for name, (_, cost) in found.items()}, {name: said for name, (said, _) in found.items()})


def _passes(settings: Settings) -> dict[str, float]:
    """How many passes over the images each experiment takes: one for each different edit, a third of a training's."""
    draws, distances = settings.draws, sum(distance <= settings.epochs for distance in (5, 10, 20, 30, 40))
    layers = {"1e": 9.0 * BY_LAYER, "1f": 2.0 * distances * BY_LAYER}
    controls = {"1c": 28.0 * draws, "1d": 28.0 * draws, "1g": 6.0 * draws + 7 * settings.control_draws}
    return {"1a": 7.0, "1b": 3.0, "1h": 110.0 if settings.quick else 450.0, **layers, **controls}


def in_words(seconds: float, what: str) -> str:
    """Return about how long something takes, to stand behind other words; nothing for 0, which is not known.

    Example:
        >>> in_words(20, " left"), in_words(130, " left"), in_words(9000, " in all"), in_words(0, " left")
        (', less than a minute left', ', about 2 min left', ', about 2.5 h in all', '')
    """
    if not seconds:
        return ""
    if seconds < 60:
        return f", less than a minute{what}"
    return f", about {seconds / 60:.0f} min{what}" if seconds < 5400 else f", about {seconds / 3600:.1f} h{what}"


class Count:
    """Says how many of a total are done: on a terminal in one line, in a file as a line every few seconds."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what = total, what
        self._shown = time.monotonic()

    def at(self, done: int) -> None:
        """Say that so many are done, if it is time to."""
        terminal, last = sys.stderr.isatty(), done >= self.total
        if terminal or last or time.monotonic() - self._shown > PAUSE:
            self._shown = time.monotonic()
            end = "\n" if last or not terminal else ""
            sys.stderr.write(f"{chr(13) * terminal}  {done} of {self.total} {self.what}{end}")
            sys.stderr.flush()


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
