"""Small pictures: PNG files against the pixels that they were made from."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronsurgery.study import data
from neuronsurgery.study.pictures import contact_sheet, pictures_of, pixels_of, png


def decoded(file: bytes) -> np.ndarray:
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(file))
    assert image.mode == "RGB"
    return np.asarray(image)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_png_is_read_back_as_it_was(height: int, width: int, scale: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    large = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    assert np.array_equal(decoded(png(large)), large)


def test_png_of_something_else_is_refused() -> None:
    for wrong in (np.zeros((2, 2, 3)), np.zeros((2, 2), np.uint8), np.zeros((0, 2, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"png: expected uint8 of shape \(height, width, 3\), found"):
            png(wrong)


def test_pixels_are_rounded_and_normalised_images_refused() -> None:
    images = torch.tensor([0.0, 1 / 255, 0.5, 1.0]).repeat(3, 1).reshape(1, 3, 2, 2)
    assert pixels_of(images)[0, :, :, 0].tolist() == [[0, 1], [128, 255]]
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\], found -2 to 0: undo the normalisation first"):
        pixels_of(torch.tensor([-2.0, 0.0, 0.0]).reshape(3, 1, 1))
    with pytest.raises(ValueError, match=r"expected images \(..., 3, height, width\), found \(1, 28, 28\)"):
        pixels_of(torch.zeros(1, 28, 28))


def birds(*counts: int) -> data.Split:
    """Images of the synthetic data, as many of each group."""
    none = dict.fromkeys(data.SYNTHETIC_COUNTS, (0,) * 4)
    return data.synthetic(0, counts={**none, "few": counts}).splits["few"]  # type: ignore[dict-item]


def test_contact_sheet_shows_the_first_images_of_each_group() -> None:
    split = birds(3, 1, 0, 2)
    sheet = decoded(contact_sheet(split, per_group=2, scale=2, gap=5))
    assert sheet.shape == (4 * (64 + 10), 2 * 69 + 5, 3)
    expected = np.full(sheet.shape, 255, np.uint8)
    pixels = (split.images * 255).round().byte().numpy()
    for group, place, image in ((0, 0, 0), (0, 1, 1), (1, 0, 3), (3, 0, 4), (3, 1, 5)):
        top, left = 5 + group * 74, 5 + place * 69
        for row in range(64):
            for column in range(64):
                expected[top + row, left + column] = pixels[image, :, row // 2, column // 2]
    assert np.array_equal(sheet, expected)


def test_contact_sheet_refuses_what_it_cannot_show() -> None:
    with pytest.raises(ValueError, match="per_group must be at least 1, found 0; gap must be at least 0, found -1"):
        contact_sheet(birds(1, 1, 1, 1), per_group=0, gap=-1)
    with pytest.raises(ValueError, match="the split has no images: pass one that has"):
        contact_sheet(birds(0, 0, 0, 0))


@pytest.mark.parametrize(("name", "per_group", "scale"), [("synthetic", 9, 3), ("digits", 10, 4)])
def test_pictures_of_the_documentation_are_those_of_the_data(name: str, per_group: int, scale: int) -> None:
    if name == "digits":
        pytest.importorskip("sklearn")
    split = {"synthetic": data.synthetic, "digits": data.digits}[name](0).train
    file = (Path(__file__).parents[2] / "docs" / "images" / f"{name}.png").read_bytes()
    assert np.array_equal(decoded(file), decoded(contact_sheet(split, per_group=per_group, scale=scale)))
    assert len(file) < 150_000


def test_the_first_images_of_each_group_are_pictured() -> None:
    birds = data.synthetic(0, counts={"train": (9, 1, 0, 2), "validation": (4,) * 4, "test": (4,) * 4})
    rows = pictures_of(birds)
    assert [row["group"] for row in rows] == list(birds.group_names)
    assert [len(row["images"]) for row in rows] == [8, 1, 0, 2]
