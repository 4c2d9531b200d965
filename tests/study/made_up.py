"""Results made up for tests of what is made from them: a run of every stage, with effects of a known size."""

from __future__ import annotations

import base64
import copy
import io
import random
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

from PIL import Image

from neuronsurgery.study.report.figures import figures_of
from neuronsurgery.study.report.writing import page_of
from neuronsurgery.study.table import Run, combine

RULES = {
    "last epoch": "no labels",
    "class labels": "class labels of held-out images",
    "worst group": "group labels of validation images",
}

BIRDS = ("landbird on land", "landbird on water", "waterbird on land", "waterbird on water")
COUNTS = (1749, 92, 28, 528)
EXPERIMENTS = ("1a", "1b", "1c", "1d", "1e", "1f", "1g")


# A run made up: the schema's shape, with an effect of a known size


class MadeUp:
    """Results of the schema. `effect` is the change of a minority group's accuracy where its own neurons are cut."""

    def __init__(
        self,
        effect: float = -0.25,
        groups: Sequence[str] = BIRDS,
        counts: Sequence[int] = COUNTS,
        minority: Sequence[int] = (1, 2),
        layers: int = 10,
        splits: Sequence[str] = ("train",),
        draws: int = 10,
    ) -> None:
        self.effect, self.groups, self.counts, self.minority = effect, list(groups), list(counts), list(minority)
        self.layers = [f"block{place}.conv.weight" for place in range(layers)]
        self.splits, self.draws, self.random = list(splits), draws, random.Random(0)

    def change(self, place: int, size: float) -> dict[str, Any]:
        """A change in whole examples, with an interval that shrinks as the group grows."""
        n = self.counts[place]
        change = round(size * n) / n
        half = 0.0 if size == 0 and n > 1000 else (abs(change) * 0.5 + 1.5 / n)
        return {
            "group": self.groups[place],
            "before": 1.0,
            "after": 1.0 + change,
            "change": change,
            "low": change - half,
            "high": change + half,
            "p": 0.01 if abs(change) > half else 1.0,
            "count": n,
        }

    def record(self, criterion: str, chosen: int | None, scale: float = 1.0, **columns: Any) -> dict[str, Any]:
        empty = dict.fromkeys(("k", "fraction", "std", "relative_std", "layer", "distance"))
        changes = []
        for place in range(len(self.groups)):
            own = place in self.minority and chosen == place
            jitter = self.random.uniform(0.6, 1.4)
            changes.append(self.change(place, self.effect * scale * jitter if own else 0.0))
        return {
            "criterion": criterion,
            "chosen_for": "all" if chosen is None else self.groups[chosen],
            **empty,
            "with_norm": False,
            "draw": 0,
            "neurons": 1,
            "names": ["block1.conv.weight[13]"],
            **columns,
            "changes": changes,
        }

    def tops(self, scale: float = 1.0, **columns: Any) -> list[dict[str, Any]]:
        choices = [("gradient", place) for place in range(len(self.groups))] + [("magnitude", None)]
        return [
            self.record(criterion, chosen, scale * (1 + k) / 3, k=k, neurons=k, **columns)
            for criterion, chosen in choices
            for k in (1, 2, 3)
        ]

    def drawn(self, scale: float) -> list[dict[str, Any]]:
        scales = [{"std": 0.005}, {"std": 0.01}, {"std": 0.02}, {"relative_std": 1.0}]
        return [
            record
            for place, std in enumerate(scales)
            for draw in range(self.draws)
            for record in self.tops(scale * (place + 1) / 4, draw=draw, **std)
        ]

    def ranks(self) -> list[dict[str, Any]]:
        records = []
        for name in self.groups:
            for share, neurons in ((0.0001, 1), (0.05, 17)):
                for by, other in (("gradient", "magnitude"), ("magnitude", "gradient")):
                    power = 0.3 if by == "gradient" else 1
                    percentiles = [100 * self.random.random() ** power or 1.0 for _ in range(neurons)]
                    records.append(
                        {
                            "chosen_by": by,
                            "ranked_by": other,
                            "group": name,
                            "share": share,
                            "neurons": neurons,
                            "percentiles": percentiles,
                        }
                    )
        return records

    def rewinds(self) -> list[dict[str, Any]]:
        records = []
        for distance in (5, 10, 20, 30):
            for with_norm in (False, True):
                for place, layer in enumerate(self.layers):
                    size = distance / 30 * (place % 3) / 2
                    records.append(
                        self.record("rewind", None, layer=layer, distance=distance, with_norm=with_norm)
                        | {
                            "changes": [
                                self.change(g, self.effect * size * (g in self.minority) or 0.0)
                                for g in range(len(self.groups))
                            ]
                        }
                    )
        return records

    def controls(self) -> list[dict[str, Any]]:
        shares = (0.0001, 0.0002, 0.0003, 0.001, 0.002, 0.003, 0.01, 0.02, 0.03)
        records = [
            self.record("random", None, fraction=share, neurons=max(1, round(336 * share)), draw=draw)
            for share in shares
            for draw in range(self.draws)
        ]
        for place in range(len(self.groups)):
            for k in (1, 2, 3):
                for draw in range(self.draws):
                    scale = self.random.uniform(-0.2, 0.6)
                    records.append(self.record("same layers", place, scale, k=k, neurons=k, draw=draw))
                    records.append(self.record("random", place, scale / 4, k=k, neurons=k, draw=draw))
        return records

    def results(self, experiments: Sequence[str] = EXPERIMENTS) -> dict[str, Any]:
        rewinds = self.rewinds()
        made = {
            "1a": self.tops,
            "1b": self.ranks,
            "1c": lambda: self.drawn(0.8),
            "1d": lambda: self.drawn(0.2),
            "1e": lambda: [
                record for place, layer in enumerate(self.layers) for record in self.tops((place % 4) / 3, layer=layer)
            ],
            "1f": lambda: rewinds,
            "1g": self.controls,
        }
        low = [0.9 if place in self.minority else 1.0 for place in range(len(self.groups))]
        return {
            "version": "0.1.0",
            "settings": {
                "data": "synthetic",
                "arch": "small_resnet",
                "preset": "adam",
                "seed": 0,
                "epochs": 30,
                "splits": self.splits,
                "quick": False,
                "weights": None,
            },
            "environment": {"torch": "2.14.1", "python": "3.11.7", "threads": 2, "platform": "Linux-x86_64"},
            "seconds": {"train": 30.1, **dict.fromkeys(experiments, 2.25)},
            "groups": self.groups,
            "minority": self.minority,
            "counts": {"train": self.counts, "validation": [60] * len(self.groups), "test": [250] * len(self.groups)},
            "expected_counts": None,
            "accuracy": {
                "train": low,
                "validation": [x - 0.4 * (x < 1) for x in low],
                "test": [x - 0.5 * (x < 1) for x in low],
            },
            "trajectory": [{"epoch": 0, "loss": None}]
            + [{"epoch": e, "loss": 0.6 / e, "accuracy": 1 - 0.2 / e} for e in range(1, 31)],
            "layers": [{"name": name, "neurons": 32} for name in self.layers],
            "neurons": 32 * len(self.layers),
            "experiments": {name: {split: made[name]() for split in self.splits} for name in experiments},
            "missing_distances": [40] if "1f" in experiments else [],
        }


def chosen(arm: str, worst: float, epoch: int = 1) -> dict[str, Any]:
    test = [0.98, 0.9, worst, 0.96]
    average = sum(test) / 4
    means = {"plain": average, "balanced": average, "train-weighted": 0.97}
    return {"arm": arm, "epoch": epoch, "test": test, "worst": worst, **means}


def arm(name: str, family: str, worst: float, epochs: int = 2, **columns: Any) -> dict[str, Any]:
    path = [
        {"epoch": epoch, "loss": 0.1, "test": [0.98, 0.9, worst * epoch / epochs, 0.96], "validation": [0.5] * 4}
        for epoch in range(1, epochs + 1)
    ]
    return {
        "name": name,
        "family": family,
        "text": f"what {name} does",
        "labels": "class",
        "choice": None,
        "settings": {},
        "trajectory": path,
        "selected": {rule: chosen(name, worst, epochs) for rule in RULES},
        **columns,
    }


def stage_two(paper: float = 0.6, control: float = 0.3, more: int = 0) -> dict[str, Any]:
    """Stage 2 whose arm of the paper and whose controls are this good in the worst group."""
    arms = [
        arm("ERM", "control", 0.2, 1),
        arm("pruned by gradient", "paper", paper),
        arm("nothing pruned", "control", control),
        *(arm(f"control {place}", "control", control) for place in range(more)),
        arm("Group DRO", "comparison", 0.7, 3, labels="class, group"),
        arm("CnC", "comparison", 0.0, impossible="no image <is> an anchor", trajectory=[], selected={}),
    ]
    return {
        "fine_tuning_epochs": 2,
        "comparison_epochs": 3,
        "splits": ["validation", "test"],
        "selections": RULES,
        "class_labels_of": "held-out",
        "not_inferred": "nobody stands out",
        "arms": arms,
    }


def fragility(knockout: float = 0.99, margin: float = 0.9, inferred: float = 0.6) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (90, 90, 90)).save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()

    def detected(score: str, needs: str, auc: float) -> list[dict[str, Any]]:
        return [
            {"score": score, "needs": needs, "group": name, "auc": auc, "average_precision": 0.5, "count": 9, "of": 99}
            for name in ("landbird on water", "waterbird on land")
        ]

    def row(name: str, worst: float, labels: str = "class") -> dict[str, Any]:
        test = [0.98, 0.9, worst, 0.96]
        return {"name": name, "labels": labels, "images": "train", "chosen": None, "test": test, "worst": worst}

    return {
        "edit": ["block3.conv2.weight"],
        "detection": {
            "train": [*detected("knockout", "one edit", knockout), *detected("final margin", "the model", margin)]
        },
        "flagged": {"train": {"fragile": [3, 60, 20, 5], "thresholds": [-1.25, 0.75]}},
        "damage": {"train": [{"cut": "critical", "neurons": 8, "flips": 0.07}]},
        "points": [
            {"group": name, "of": count, "fragility": [-3.0 + place, -2.0], "final": [-4.0, -3.5]}
            for place, (name, count) in enumerate(
                {
                    "landbird on land": 1749,
                    "landbird on water": 2,
                    "waterbird on land": 2,
                    "waterbird on water": 2,
                }.items()
            )
        ],
        "audit": [
            {
                "class": target,
                "images": [
                    {"index": 7, "group": group, "fragility": 0.5, "png": image}
                    for group in ("landbird on water", "landbird on land")
                ],
            }
            for target in (0, 1)
        ],
        "images": "train",
        "mitigation": [
            row("ERM", 0.2),
            row("inferred by knockout", inferred),
            row("true groups", 0.9, "class, group"),
            {"name": "AFR", "labels": "class", "images": "train", "impossible": "it did not <converge>"},
        ],
    }


def one_run(**stages: Any) -> dict[str, Any]:
    made = MadeUp(draws=2).results([])
    made["settings"] |= {"stages": ["2", "fragility"]}
    for key in ("layers", "neurons", "experiments", "missing_distances"):
        del made[key]
    return made | stages


def seeds_of(runs: list[dict[str, Any]]) -> Run:
    """Runs of the seeds 0, 1 ... as one."""
    runs = copy.deepcopy(runs)
    for seed, run in enumerate(runs):
        run["settings"]["seed"] = seed
    return combine({seed: Run.of(run) for seed, run in enumerate(runs)})


def text_of(page: str) -> str:
    """The page's text as read: no tags, no scripts, single spaces."""

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.parts: list[str] = []
            self.hidden = False

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.hidden = tag in {"script", "style"}

        def handle_endtag(self, tag: str) -> None:
            self.hidden = False

        def handle_data(self, data: str) -> None:
            self.parts += [] if self.hidden else [data]

    reader = Reader()
    reader.feed(page)
    return " ".join(" ".join(reader.parts).split())


def html_of(run: Run) -> str:
    """The page of a run."""
    return page_of(run, figures_of(run))


def report_of(results: dict[str, Any] | Run) -> str:
    """The text of the page of some results."""
    return text_of(html_of(results if isinstance(results, Run) else Run.of(results)))
