"""Pictures: small images as PNG, side by side in one PNG or embedded in a figure with what is said of each."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from neuronsurgery.study.data import Split
from neuronsurgery.study.figures import svg
from neuronsurgery.study.figures.marks import HIGHLIGHT

Pixels = npt.NDArray[np.uint8]
"""Red, green and blue, (height, width, 3)."""

PAPER: Final = 255
SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"


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


def data_uri(file: bytes) -> str:
    """Return a PNG file as an address that holds it, for a page that loads nothing."""
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


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


@dataclass(frozen=True, eq=False)
class Picture:
    """An image of a figure.

    Attributes:
        pixels: uint8 (height, width, 3), or a PNG file as bytes; small, because the figure holds it whole.
        caption: short text under it, such as its fragility.
        note: what is said when one points at it.
        framed: whether a strong frame is drawn around it: of a minority group.
    """

    pixels: Pixels | bytes
    caption: str = ""
    note: str = ""
    framed: bool = False


def image_rows(title: str, rows: Sequence[tuple[str, Sequence[Picture]]], *, side: float = 88.0) -> str:
    """Return rows of images, each under its name, as SVG that holds them as PNG; pixels stay square.

    Args:
        title: above the figure.
        rows: name of a row and its images, from left to right.
        side: width and height of an image as drawn; one that is not square is fitted in.

    Raises:
        ValueError: if there is no image, or one is neither uint8 (height, width, 3) nor a PNG file.
    """
    most = max((len(pictures) for _, pictures in rows), default=0)
    if not most:
        raise ValueError(f"image_rows: {title!r} has no images: leave the figure out")
    width = max(svg.LEAST, 12 + most * (side + 8) + 4)
    drawn, top = svg.heading(title, width)
    captioned = any(picture.caption for _, pictures in rows for picture in pictures)
    for name, pictures in rows:
        lines = svg.wrapped(name, width - 24)
        drawn += [svg.text(12, top + 17 + 17 * place, line) for place, line in enumerate(lines)]
        top += 17 * len(lines) + 8
        for place, picture in enumerate(pictures):
            drawn.append(_embedded(picture, 12 + place * (side + 8), top, side))
        top += side + (18 if captioned else 0) + 12
    return svg.document(title, width, top, drawn)


def _embedded(picture: Picture, x: float, y: float, side: float) -> str:
    caption = svg.text(x + side / 2, y + side + 14, picture.caption, size=svg.TINY, anchor="middle")
    note = f"<title>{escape(picture.note)}</title>" if picture.note else ""
    image = (
        f'<image x="{svg.px(x)}" y="{svg.px(y)}" width="{svg.px(side)}" height="{svg.px(side)}" '
        f'style="image-rendering:pixelated" href="{data_uri(_file_of(picture))}"/>'
    )
    frame = svg.rectangle(x, y, side, side, "none", svg.stroke(HIGHLIGHT, 4)) if picture.framed else ""
    return f"<g>{note}{image}{frame}{caption if picture.caption else ''}</g>"


def _file_of(picture: Picture) -> bytes:
    if not isinstance(picture.pixels, bytes):
        return png(picture.pixels)
    if not picture.pixels.startswith(SIGNATURE):
        raise ValueError(f"image_rows: the image {picture.caption!r} is bytes, but no PNG file: pass pixels or a PNG")
    return picture.pixels
