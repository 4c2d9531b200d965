"""Draw judged.svg: what the README measures of its two cuts, in points of accuracy on training images."""

from pathlib import Path

from neuronsurgery.study.pages import Figure, Look, exports

GROUPS = ("landbird on land", "landbird on water", "waterbird on land", "waterbird on water")
CUTS = {
    "3 neurons of the largest gradient": [
        (-21.8, None, None),
        (-72.8, None, None),
        (14.3, None, None),
        (0.2, None, None),
    ],
    "2 neurons searched for, judged on other images": [
        (-0.34, -0.84, 0.16),
        (-26.09, -38.54, -11.46),
        (28.57, -2.39, 52.39),
        (0, -1.04, 1.04),
    ],
}


def draw() -> bytes:
    """Return the picture."""
    rows = [
        {"cut": cut, "group": group, "value": value, "low": low, "high": high, "values": []}
        for cut, changes in CUTS.items()
        for group, (value, low, high) in zip(GROUPS, changes, strict=True)
    ]
    look = Look(list(CUTS), field="cut")
    figure = Figure(rows, look, axis="change of accuracy, points", by="group", columns={"group": "group"})
    (picture,) = exports({"judged": figure}).values()
    return picture


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_bytes(draw())
