"""Draw judged.svg: what the README measures of its two cuts, in points of accuracy on training images."""

from pathlib import Path

from neuronsurgery.study.figures import GREY, HIGHLIGHT, Mark, Series, dot_rows

groups = ["landbird on land", "landbird on water", "waterbird on land", "waterbird on water"]
gradient = (Mark(-69), Mark(-55), Mark(11), Mark(0))
judged = (Mark(0, -0.32, 0.32), Mark(4.35, -3.91, 12.25), Mark(-42.86, -66.87, -8.13), Mark(0, -1.04, 1.04))
series = [
    Series("3 neurons of the largest gradient", gradient, GREY),
    Series("3 neurons searched for, and judged on other images", judged, HIGHLIGHT),
]
svg = dot_rows("Two cuts meant for the waterbirds on land", groups, series, axis="change of accuracy, points")
Path(__file__).with_suffix(".svg").write_text(svg)
