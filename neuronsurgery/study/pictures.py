"""Small pictures of a data set: PNG files of a few images, for the report and the documentation."""

from __future__ import annotations

import base64
import io
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn import functional

from neuronsurgery.study import readers
from neuronsurgery.study.data import Split

Pixels = npt.NDArray[np.uint8]
"""Red, green and blue, (height, width, 3)."""

PAPER: Final = 255


def pixels_of(images: Tensor) -> Pixels:
    """Return uint8 (..., H, W, 3) of float images (..., 3, H, W) in [0, 1], rounded to the nearest.

    Raises:
        ValueError: if the shape is another, or values lie outside [0, 1]: those of a normalised image do.

    Example:
        >>> import torch
        >>> pixels_of(torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1)).tolist()
        [[[0, 128, 255]]]
    """
    if images.dim() < 3 or images.shape[-3] != 3:
        raise ValueError(f"pixels_of: expected images (..., 3, height, width), found {tuple(images.shape)}")
    if images.numel() and not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(
            f"pixels_of: expected values in [0, 1], found {float(images.min()):g} to {float(images.max()):g}: undo the "
            f"normalisation first"
        )
    plain: Pixels = (images.movedim(-3, -1) * 255).round().byte().cpu().numpy()
    return plain


def png(pixels: Pixels) -> bytes:
    """Return an image as a PNG file: 8 bits per channel, no alpha, no metadata.

    Args:
        pixels: uint8 (height, width, 3), at least one pixel.

    Raises:
        ValueError: if the shape or the type is another.

    Example:
        >>> png(np.zeros((2, 3, 3), np.uint8))[1:4]
        b'PNG'
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.size:
        raise ValueError(
            f"png: expected uint8 of shape (height, width, 3), found {pixels.dtype} of shape {pixels.shape}: see "
            f"pixels_of"
        )
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return file.getvalue()


def contact_sheet(split: Split, *, per_group: int = 10, scale: int = 4, gap: int = 6) -> bytes:
    """Return images of a split as one PNG file: a row per group, in their order, the first ones of each group.

    Each pixel becomes a square of `scale` x `scale`. A group with fewer images leaves the rest of its row white.

    Args:
        split: the images, of the embedded data.
        per_group: images per row, at least 1.
        scale: how many times larger, at least 1.
        gap: white pixels around every image, at least 0; between two groups there are twice as many.

    Returns:
        The bytes of the file; the same pixels for the same split.

    Raises:
        ValueError: if a number is below its least, or the split has no images.

    Example:
        >>> from neuronsurgery.study import data
        >>> sheet = contact_sheet(data.synthetic(0).train, per_group=8)
        >>> len(sheet) < 150_000, sheet[1:4]
        (True, b'PNG')
    """
    least = {"per_group": (per_group, 1), "scale": (scale, 1), "gap": (gap, 0)}
    wrong = [f"{name} must be at least {low}, found {value}" for name, (value, low) in least.items() if value < low]
    if wrong or not len(split):
        raise ValueError(f"contact_sheet: {'; '.join(wrong) or 'the split has no images: pass one that has'}")
    side = split.images.shape[-1] * scale
    groups = len(split.counts)
    step = side + gap
    sheet = np.full((groups * (step + gap), per_group * step + gap, 3), PAPER, np.uint8)
    for group in range(groups):
        chosen = pixels_of(split.images[split.groups == group][:per_group])
        top = gap + group * (step + gap)
        for place, image in enumerate(chosen.repeat(scale, axis=1).repeat(scale, axis=2)):
            left = gap + place * step
            sheet[top : top + side, left : left + side] = image
    return png(sheet)


PER_GROUP: Final = 8
"""Images of each group at the top of a report."""


def pictures_of(data: Any) -> list[dict[str, Any]]:
    """Return the first training images of each group: its name, and the images as PNG in base64.

    Args:
        data: the data set, embedded or read from disk; a group without training images has none.
    """
    split, rows = data.splits["train"], []
    for group, name in enumerate(data.group_names):
        places = (split.groups == group).nonzero().flatten()[:PER_GROUP]
        rows.append({"group": name, "images": [shown(split, place) for place in places]})
    return rows


def shown(split: Any, place: Tensor) -> str:
    """Return one image of a split, small, as PNG in base64."""
    # One by one: a loader is free to give its images in an order of its own.
    image = next(iter(readers.batches(split.subset(place[None]), 1)))[0][0]
    return base64.b64encode(png(thumbnail(image))).decode()


def thumbnail(image: Tensor) -> Pixels:
    """Return an image, normalised or not, as small pixels whose darkest is black and whose brightest is white."""
    factor = max(1, max(image.shape[-2:]) // 64)
    small = functional.avg_pool2d(image[None], factor)[0]
    low, high = small.min(), small.max()
    return pixels_of((small - low) / (high - low).clamp(min=1e-6))
