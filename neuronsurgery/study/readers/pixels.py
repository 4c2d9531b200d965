"""From an image file to a tensor: how it is framed for evaluation, how it varies in training, how it is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)


@dataclass(frozen=True, repr=False)
class Framing:
    """How an image is brought to its size for evaluation, and then normalised.

    Attributes:
        steps: from first to last, ("resize", s): both sides to s pixels, the aspect not kept; or ("crop", s): the
            s x s pixels in the middle.
        mean: what is taken from red, green and blue in [0, 1]; by default ImageNet's.
        std: what they are then divided by, the same.
    """

    steps: tuple[tuple[Literal["resize", "crop"], int], ...]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __repr__(self) -> str:
        # What images are framed by is part of their digest; ImageNet's normalisation goes without saying there.
        usual = (self.mean, self.std) == (IMAGENET_MEAN, IMAGENET_STD)
        return f"Framing(steps={self.steps!r}{'' if usual else f', mean={self.mean!r}, std={self.std!r}'})"

    @property
    def size(self) -> int:
        """Height and width of the result."""
        return self.steps[-1][1]


@dataclass(frozen=True)
class RandomCrop:
    """How a training image varies from epoch to epoch: a random part is resized to `size`, one in two mirrored.

    `scale` and `ratio` are the smallest and the largest share of the image's area and width / height of the part.
    """

    size: int = 224
    scale: tuple[float, float] = (0.7, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True


def evaluation_transform(framing: Framing) -> Callable[[Image], Tensor]:
    """A function from a PIL image to float32 (3, size, size): framed, then normalised."""
    v2 = torchvision_transforms()
    steps = [v2.CenterCrop(size) if step == "crop" else v2.Resize((size, size)) for step, size in framing.steps]
    return _normalised_after(steps, framing.mean, framing.std)


def training_transform(
    crop: RandomCrop, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Callable[[Image], Tensor]:
    """A function from a PIL image to float32 (3, size, size), normalised, that draws from torch's global state."""
    v2 = torchvision_transforms()
    steps = [v2.RandomResizedCrop((crop.size, crop.size), scale=crop.scale, ratio=crop.ratio)]
    return _normalised_after(steps + [v2.RandomHorizontalFlip()] * crop.flip, mean, std)


def _normalised_after(steps: list[Any], mean: Sequence[float], std: Sequence[float]) -> Callable[[Image], Tensor]:
    v2 = torchvision_transforms()
    ends = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    # The plain tensor: torchvision's subclass of Tensor would go with the batch into the caller's model.
    composed: Callable[[Image], Tensor] = v2.Compose([*steps, *ends, v2.ToPureTensor()])
    return composed


def torchvision_transforms() -> Any:
    """The module of transforms; an ImportError that says what to install where it is missing."""
    try:
        import PIL.Image  # noqa: F401  # torchvision imports without it
        from torchvision.transforms import v2
    except ImportError as error:
        raise ImportError(
            f"images on disk need torchvision and Pillow ({error}): pip install 'neuronsurgery[study]'"
        ) from error
    return v2


def read_image(path: Path) -> Image:
    """The image in three channels of 8 bits, the right way up: as the camera says, where it does."""
    from PIL import ImageOps

    try:
        with open_image(path) as image:
            with contextlib.suppress(Exception):  # broken EXIF data; a broken image is found when it is converted
                ImageOps.exif_transpose(image, in_place=True)
            return image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise whatever a broken file leads them to: see `fault_of`
        said = str(error) or type(error).__name__
        raise ValueError(f"{path}: not a readable image ({said}): replace the file or leave out its row") from error


def fault_of(path: Path) -> str:
    """What is wrong with an image, header and body, or ""; a JPEG is decoded at an eighth of its size, which is cheap.

    Whatever Pillow raises is the fault: OSError and SyntaxError for most broken files, `DecompressionBombError` for
    very large ones, and EOFError, KeyError, struct.error and others where a plugin trusts what it reads.
    """
    try:
        with open_image(path) as image:
            image.draft("RGB", (1, 1))  # of other formats nothing happens
            image.load()
    except Exception as error:
        return str(error).replace(str(path), path.name) or type(error).__name__
    return ""


def open_image(path: Path) -> Image:
    """The image with only its header read."""
    from PIL import Image

    image = Image.open(path)
    if image.mode[0] in "IF":  # convert("RGB") would clip these at 255
        image.close()
        raise ValueError(f"its pixels are of mode {image.mode}, not 8 bits per channel")
    return image
