"""Small pictures: PNG files against the pixels that they were made from."""

from __future__ import annotations

import base64
import io
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neuronsurgery.study import data
from neuronsurgery.study.pictures import pictures_of, shown

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def decoded(file: bytes) -> np.ndarray:
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(file))
    assert image.mode == "RGB"
    return np.asarray(image)


def picture(image: Tensor) -> np.ndarray:
    """The picture that is shown of an image."""
    none = torch.zeros(1, dtype=torch.int64)
    return decoded(base64.b64decode(shown(data.Split(image[None], none, none), torch.tensor(0))))


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_pixels_are_rounded_and_read_back_as_they_were(height: int, width: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    pixels[0, 0], pixels[-1, -1] = 0, 255
    assert np.array_equal(picture(torch.tensor(pixels).movedim(-1, 0) / 255), pixels)


def test_a_normalised_image_has_its_darkest_pixel_black_and_its_brightest_white() -> None:
    image = torch.tensor([-2.0, -1.0, 0.0, 2.0]).repeat(3, 1).reshape(3, 2, 2)
    assert picture(image)[:, :, 0].tolist() == [[0, 64], [128, 255]]
    assert picture(torch.zeros(3, 2, 2)).max() == 0
    large = image.repeat_interleave(64, 1).repeat_interleave(64, 2)
    assert np.array_equal(picture(large), picture(image).repeat(32, 0).repeat(32, 1))


def test_the_first_images_of_each_group_are_pictured() -> None:
    birds = data.synthetic(0, counts={"train": (9, 1, 0, 2), "validation": (4,) * 4, "test": (4,) * 4})
    rows = pictures_of(birds)
    assert [row["group"] for row in rows] == list(birds.group_names)
    assert [len(row["images"]) for row in rows] == [8, 1, 0, 2]


# Pictures of the documentation


@pytest.fixture(scope="module")
def sheets() -> dict[str, Any]:
    return runpy.run_path(str(IMAGES / "sheets.py"))


def birds(*counts: int) -> data.Split:
    """Images of the synthetic data, as many of each group."""
    none = dict.fromkeys(data.SYNTHETIC_COUNTS, (0,) * 4)
    return data.synthetic(0, counts={**none, "few": counts}).splits["few"]  # type: ignore[dict-item]


def test_a_sheet_shows_the_first_images_of_each_group(sheets: dict[str, Any]) -> None:
    split = birds(3, 1, 0, 2)
    sheet = sheets["sheet"](split, per_group=2, scale=2, gap=5)
    assert sheet.shape == (4 * (64 + 10), 2 * 69 + 5, 3)
    expected = np.full(sheet.shape, 255, np.uint8)
    pixels = (split.images * 255).round().byte().numpy()
    for group, place, image in ((0, 0, 0), (0, 1, 1), (1, 0, 3), (3, 0, 4), (3, 1, 5)):
        top, left = 5 + group * 74, 5 + place * 69
        for row in range(64):
            for column in range(64):
                expected[top + row, left + column] = pixels[image, :, row // 2, column // 2]
    assert np.array_equal(sheet, expected)


@pytest.mark.parametrize("name", ["synthetic", "digits"])
def test_pictures_of_the_documentation_are_those_of_the_data(name: str, sheets: dict[str, Any]) -> None:
    if name == "digits":
        pytest.importorskip("sklearn")
    make, per_group, scale = sheets["SHEETS"][name]
    file = (IMAGES / f"{name}.png").read_bytes()
    assert np.array_equal(decoded(file), sheets["sheet"](make(0).train, per_group, scale))
    assert len(file) < 150_000
