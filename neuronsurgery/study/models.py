"""The networks of the study: its own, any of torchvision's or timm's, with a new head and weights from a file.

Nothing is downloaded. ImageNet weights come from a file that the user has; without one the network is random, which
`Built.note` says loudly, because the paper's results are of pre-trained networks.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn

from neuronsurgery.state_dicts import choose_dictionary, find_dictionaries
from neuronsurgery.study.last_layer import STRENGTHS
from neuronsurgery.study.network import small_resnet
from neuronsurgery.study.training import RECIPES, Recipe

PathLike: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True)
class Defaults:
    """What a data set is trained with where nothing else is asked for.

    Attributes:
        arch: for `build_model`.
        recipe: for `training.train`.
        comparisons: the recipes of methods that were published with settings for this data set and for pre-trained
            weights, by name; their epochs are not looked at.
        contrast_temperature: of Correct-n-Contrast.
        strengths: values of C that DFR chooses from.
    """

    arch: str
    recipe: Recipe
    comparisons: Mapping[str, Recipe] = field(default_factory=dict)
    contrast_temperature: float = 0.1
    strengths: Sequence[float] = STRENGTHS


# Waterbirds and CelebA: epochs of the paper; the rest is the ERM of DFR, Kirichenko et al. 2022
# (github.com/PolinaKirichenko/deep_feature_reweighting: README, and momentum 0.9 in train_classifier.py). DFR's
# learning rate is constant unless --scheduler is given, ours always falls along its cosine; DFR trains for 100 and 50
# epochs. Group DRO and JTT report ERM with batch 128 and 64, and on Waterbirds a weight decay of 1e-4. "folder" is for
# data sets of one's own: Waterbirds' settings, for want of better.
def _published(rate: float, decay: float, batch_size: int) -> Recipe:
    return Recipe("sgd", rate, decay, momentum=0.9, batch_size=batch_size, schedule="constant")


# JTT: README of github.com/anniesch/jtt. CnC: README of github.com/HazyResearch/correct-n-contrast, a batch being four
# blocks of its 17 and 64 images. Group DRO: the README of github.com/kohpangwei/group_DRO, standard regularisation.
_WATERBIRDS_COMPARISONS: Final[Mapping[str, Recipe]] = MappingProxyType(
    {"JTT": _published(1e-5, 1.0, 64), "CnC": _published(1e-4, 1e-3, 68), "Group DRO": _published(1e-3, 1e-4, 128)}
)
_CELEBA_COMPARISONS: Final[Mapping[str, Recipe]] = MappingProxyType(
    {"JTT": _published(1e-5, 0.1, 64), "CnC": _published(1e-5, 0.1, 256), "Group DRO": _published(1e-4, 1e-4, 128)}
)
# DFR: dfr_evaluate_spurious.py, where these stand in a comment for CelebA.
_CELEBA_STRENGTHS: Final = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
_WATERBIRDS: Final = Recipe("sgd", learning_rate=1e-3, weight_decay=1e-3, momentum=0.9, epochs=40, batch_size=32)
_CELEBA: Final = Recipe("sgd", learning_rate=1e-3, weight_decay=1e-4, momentum=0.9, epochs=20, batch_size=128)
DEFAULTS: Final[Mapping[str, Defaults]] = MappingProxyType(
    {
        "synthetic": Defaults("small_resnet", RECIPES["adam"]),  # 30 epochs
        "digits": Defaults("small_resnet", RECIPES["adam"]),
        "waterbirds": Defaults("resnet50", _WATERBIRDS, _WATERBIRDS_COMPARISONS),
        "celeba": Defaults("resnet50", _CELEBA, _CELEBA_COMPARISONS, 0.05, _CELEBA_STRENGTHS),
        "folder": Defaults("resnet50", _WATERBIRDS),
    }
)


@dataclass(frozen=True, eq=False)
class Built:
    """A network and where its weights come from; prints as its note.

    Attributes:
        model: float32, on the CPU, in training mode.
        note: one line for the user and for the report.
        pretrained: whether the weights come from a file.
        head: the names of the parameters whose shape depends on the number of classes.
    """

    model: nn.Module = field(repr=False)
    note: str
    pretrained: bool
    head: frozenset[str]

    def __str__(self) -> str:
        return self.note


def build_model(arch: str, classes: int, weights: PathLike | None = None, seed: int = 0) -> Built:
    """A network for `classes` classes, with weights from a file or else random ones, and a note that says which.

    Of the file, the prefixes `module.`, `_orig_mod.`, `model.`, `net.` and `backbone.` are taken off where the network
    has no such name, and a nested dictionary (`state_dict`, `model`, `ema`, ...) is opened if no other one fits. The
    head is left new where the file has none, or one for other classes; everything else must be there and fit. The
    global random state is left alone.

    Args:
        arch: "small_resnet", a classification network of torchvision, or a network of timm; where both have the name
            it is torchvision's, unless it begins with "timm:".
        classes: the number of logits, at least 2.
        weights: a safetensors file, a state dict that `torch.load(weights_only=True)` reads, the index of a sharded
            one, or a folder of Hugging Face's.
        seed: of the random weights, and of a new head.

    Returns:
        The network and the note.

    Raises:
        ValueError: if the name is unknown (the nearest are listed), `classes` is below 2, the file is not readable or
            does not fit (everything that does not is listed), or several dictionaries in it do.
        FileNotFoundError: if there is no such file.
        ImportError: if "timm:" is asked for and timm is not installed.

    Example:
        >>> built = build_model("small_resnet", classes=3)
        >>> built.note
        'small_resnet, 77,587 parameters: RANDOM weights (seed 0), nothing pre-trained'
        >>> built.model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 3])
    """
    if classes < 2:
        raise ValueError(f"build_model: classes must be at least 2, found {classes}: pass the number of classes")
    construct = _find_constructor(arch)
    found = None if weights is None else _find_weights(weights)  # a bad file is found before a slow network
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would reseed the GPUs too
        model = construct(classes, seed).float()
    count = sum(parameter.numel() for parameter in model.parameters())
    title = f"{arch}, {count:,} parameters"
    head = _head_names(construct, classes)
    if weights is None or found is None:
        return Built(model, f"{title}: RANDOM weights (seed {seed}), nothing pre-trained", False, head)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    chosen = choose_dictionary(found, lambda tensors: _fitting(tensors, shapes), weights)
    fitting = _fit(model, _strip_prefixes(chosen, shapes), head, f"{weights} does not fit {arch}")
    model.load_state_dict(fitting, strict=False)
    said = "head included" if head <= fitting.keys() else f"new head for {classes} classes (seed {seed})"
    return Built(model, f"{title}: weights of {weights}, {said}", True, head)


def load_weights(model: nn.Module, weights: PathLike, name: str) -> None:
    """Load the weights of a file into a network, all of them, with prefixes taken off as `build_model` does.

    Raises:
        ValueError: if the file is not readable or does not fit (everything that does not is listed).
        FileNotFoundError: if there is no such file.
    """
    shapes = {own: tensor.shape for own, tensor in model.state_dict().items()}
    chosen = choose_dictionary(_find_weights(weights), lambda tensors: _fitting(tensors, shapes), weights)
    fitting = _fit(model, _strip_prefixes(chosen, shapes), frozenset(), f"{weights} does not fit {name}")
    model.load_state_dict(fitting, strict=False)


def input_size(arch: str) -> int:
    """The height and width of the images that a network is made for: what timm says of its own, 224 for any other.

    Args:
        arch: as for `build_model`; a name that nobody knows is of 224, too.

    Example:
        >>> input_size("resnet50")
        224
    """
    if arch == "small_resnet" or arch in _torchvision_names():
        return _USUAL_SIZE
    name = arch.removeprefix("timm:").partition(".")[0]
    if name not in _timm_names():
        return _USUAL_SIZE
    from timm.models import get_pretrained_cfg

    said = get_pretrained_cfg(name)
    return _USUAL_SIZE if said is None else int(max(said.input_size[1:]))


_USUAL_SIZE: Final = 224


# Which network

Construct: TypeAlias = Callable[[int, int], nn.Module]
"""(classes, seed) -> network; draws from torch's global state, unless it has a way of its own with the seed."""

# With auxiliary heads a network returns something else in training mode; ImageNet's weights of these two were trained
# on images scaled to [-1, 1], and transform_input makes that of images normalised as for the others.
_INCEPTIONS: Final = {"aux_logits": False, "init_weights": True, "transform_input": True}
_OPTIONS: Final[Mapping[str, Mapping[str, bool]]] = MappingProxyType(
    {"googlenet": _INCEPTIONS, "inception_v3": _INCEPTIONS}
)


def _find_constructor(arch: str) -> Construct:
    if arch == "small_resnet":
        return lambda classes, seed: small_resnet(seed, classes)
    if arch in _torchvision_names():
        return lambda classes, seed: _torchvision_model(arch, classes)
    name = arch.removeprefix("timm:").partition(".")[0]  # what follows the dot names timm's own weights
    if name in _timm_names(required=arch.startswith("timm:")):
        return lambda classes, seed: _timm_model(name, classes)
    names = ["small_resnet", *_torchvision_names(), *_timm_names()]
    close = difflib.get_close_matches(name, sorted(set(names)), n=5)
    raise ValueError(
        f"no network is called {arch!r}; the nearest of {len(set(names))} names: {', '.join(close) or 'none is near'}. "
        f"Pass small_resnet, a classification network of torchvision, or one of timm"
        + ("" if _timm_names() and _torchvision_names() else " (not all installed: pip install 'neuronsurgery[study]')")
    )


def _torchvision_names() -> Sequence[str]:
    try:
        from torchvision import models
    except ImportError:
        return ()
    names: list[str] = models.list_models(module=models)  # without those for detection, segmentation and video
    return names


def _torchvision_model(arch: str, classes: int) -> nn.Module:
    from torchvision import models

    model: nn.Module = models.get_model(arch, weights=None, num_classes=classes, **_OPTIONS.get(arch, {}))
    return model


def _timm_names(*, required: bool = False) -> Sequence[str]:
    try:
        import timm
    except ImportError:
        if required:
            raise ImportError("timm is not installed: pip install 'neuronsurgery[study]'") from None
        return ()
    names: list[str] = timm.list_models()
    return names


def _timm_model(name: str, classes: int) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes)
    return model


def _head_names(construct: Construct, classes: int) -> frozenset[str]:
    """The tensors whose shape depends on the number of classes."""
    few, more = _shapes(construct, classes), _shapes(construct, classes + 1)
    return frozenset(name for name, shape in few.items() if shape != more[name])


def _shapes(construct: Construct, classes: int) -> dict[str, torch.Size]:
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                model = construct(classes, 0)
        except RuntimeError:  # some networks compute with small tensors while they are made: torchvision's regnets
            model = construct(classes, 0)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


# The weights in a file

PREFIXES: Final = ("module.", "_orig_mod.", "model.", "net.", "backbone.")
_AUXILIARY: Final = ("AuxLogits.", "aux1.", "aux2.")  # heads of the inceptions that only training looks at
_SHOWN: Final = 20  # names per kind of misfit in an error


def _find_weights(path: PathLike) -> Mapping[str, Mapping[str, Tensor]]:
    found = find_dictionaries(path)
    if not found:
        raise ValueError(f"{path} holds no tensors: save model.state_dict()")
    return found


def _fitting(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> int:
    """How many tensors the network has, too."""
    return sum(shapes.get(_bare_name(name, shapes)) == tensor.shape for name, tensor in tensors.items())


def _strip_prefixes(tensors: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """The tensors by the names that the network has for them; a name that it does not have stays as it is."""
    stripped: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = _bare_name(name, expected)
        if bare in stripped:
            raise ValueError(f"the file has {bare!r} twice, once as {name!r}: keep only the tensors of one network")
        stripped[bare] = tensor
    return stripped


def _bare_name(name: str, expected: Collection[str]) -> str:
    bare, at, longest = name.replace("._orig_mod.", "."), 0, max(map(len, expected), default=0)
    # No name that is too long is cut off and compared: a file may have one with a million prefixes.
    while len(bare) - at > longest or bare[at:] not in expected:
        prefix = next((prefix for prefix in PREFIXES if bare.startswith(prefix, at)), None)
        if prefix is None:
            # torchvision's own files of densenets are older than its densenets: "denselayer1.norm.1.weight".
            modern = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", bare[at:])
            return modern if modern in expected else name
        at += len(prefix)
    return bare[at:]


def _fit(model: nn.Module, tensors: Mapping[str, Tensor], head: frozenset[str], problem: str) -> dict[str, Tensor]:
    """The tensors to load; a head that is not there whole, with these shapes, is left out."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if any(shapes.get(name) != expected[name] for name in head):
        shapes = {name: shape for name, shape in shapes.items() if name not in head}
        expected = {name: shape for name, shape in expected.items() if name not in head}
    misfits = {
        "missing in the file": [
            name for name in expected if name not in shapes and not name.endswith("num_batches_tracked")
        ],
        "in the file only": [
            name for name in shapes if name not in expected and name not in head and not name.startswith(_AUXILIARY)
        ],
        "of another shape": [
            f"{name} (file {_show(shapes[name])}, network {_show(shape)})"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ],
        "of no plain numbers": [
            f"{name} ({tensor.dtype}, {tensor.layout}, on {tensor.device})".replace("torch.", "")
            for name, tensor in tensors.items()
            if name in expected and (tensor.is_complex() or tensor.is_quantized or tensor.is_meta or tensor.is_sparse)
        ],
    }
    found = {kind: names for kind, names in misfits.items() if names}
    if found:
        lines = [f"  {len(names)} {kind}: {', '.join(names[:_SHOWN])}" for kind, names in found.items()]
        lines = [
            line + (", ..." if len(names) > _SHOWN else "") for line, names in zip(lines, found.values(), strict=True)
        ]
        raise ValueError(f"{problem}:\n" + "\n".join(lines) + "\nPass weights of the same network")
    return {name: tensors[name] for name in shapes if name in expected}


def _show(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "scalar"
