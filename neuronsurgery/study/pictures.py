"""Small pictures of a data set for the report, as PNG files in base64."""

from __future__ import annotations

import base64
import io
from typing import Any, Final

from torch import Tensor
from torch.nn import functional

from neuronsurgery.study import readers

PER_GROUP: Final = 8
"""Images of each group at the top of a report."""


def pictures_of(data: Any) -> list[dict[str, Any]]:
    """Return the first training images of each group: its name, and the images, of which a group may have none."""
    split, rows = data.splits["train"], []
    for group, name in enumerate(data.group_names):
        places = (split.groups == group).nonzero().flatten()[:PER_GROUP]
        rows.append({"group": name, "images": [shown(split, place) for place in places]})
    return rows


def shown(split: Any, place: Tensor) -> str:
    """Return one image of a split, normalised or not, small, its darkest pixel black and its brightest white."""
    from PIL import Image

    # One by one: a loader is free to give its images in an order of its own.
    image = next(iter(readers.batches(split.subset(place[None]), 1)))[0][0]
    small = functional.avg_pool2d(image[None], max(1, max(image.shape[-2:]) // 64))[0]
    low, high = small.min(), small.max()
    shades = ((small - low) / (high - low).clamp(min=1e-6) * 255).round().byte()
    file = io.BytesIO()
    Image.fromarray(shades.movedim(0, -1).cpu().numpy()).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
