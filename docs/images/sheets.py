"""Draw synthetic.png and digits.png: the first training images of each group, a row for each."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from neuronsurgery.study import data

SHEETS = {"synthetic": (data.synthetic, 9, 3), "digits": (data.digits, 10, 4)}
"""By file: the data, how many images of each group, how many pixels wide each of theirs is."""


def sheet(split: data.Split, per_group: int, scale: int, gap: int = 6) -> npt.NDArray[np.uint8]:
    """Return pixels (height, width, 3), white where a group has fewer images; between groups there is twice the gap."""
    side = split.images.shape[-1] * scale
    step = side + gap
    drawn = np.full((len(split.counts) * (step + gap), per_group * step + gap, 3), 255, np.uint8)
    for group in range(len(split.counts)):
        chosen = (split.images[split.groups == group][:per_group] * 255).round().byte().movedim(1, -1).numpy()
        top = gap + group * (step + gap)
        for place, image in enumerate(chosen.repeat(scale, axis=1).repeat(scale, axis=2)):
            left = gap + place * step
            drawn[top : top + side, left : left + side] = image
    return drawn


if __name__ == "__main__":
    for name, (make, per_group, scale) in SHEETS.items():
        pixels = sheet(make(0).train, per_group, scale)
        Image.fromarray(pixels).save(Path(__file__).with_name(f"{name}.png"), optimize=True)
