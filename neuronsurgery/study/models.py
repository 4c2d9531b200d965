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

    `comparisons` are the recipes of methods that were published with settings for this data set and for pre-trained
    weights, whose epochs are not looked at; `contrast_temperature` is of Correct-n-Contrast, and DFR chooses its C from
    `strengths`.
    """

    arch: str
    recipe: Recipe
    comparisons: Mapping[str, Recipe] = field(default_factory=dict)
    contrast_temperature: float = 0.1
    strengths: Sequence[float] = STRENGTHS


def _published(rate: float, decay: float, batch_size: int) -> Recipe:
    return Recipe("sgd", rate, decay, momentum=0.9, batch_size=batch_size, schedule="constant")


# Waterbirds and CelebA: epochs of the paper; the rest is the ERM of DFR, Kirichenko et al. 2022
# (github.com/PolinaKirichenko/deep_feature_reweighting: README, and momentum 0.9 in train_classifier.py). DFR's
# learning rate is constant unless --scheduler is given, ours always falls along its cosine; DFR trains for 100 and 50
# epochs. Group DRO and JTT report ERM with batch 128 and 64, and on Waterbirds a weight decay of 1e-4. "folder" is for
# data sets of one's own: Waterbirds' settings, for want of better.
# JTT: README of github.com/anniesch/jtt. CnC: README of github.com/HazyResearch/correct-n-contrast, a batch being four
# blocks of its 17 and 64 images. Group DRO: the README of github.com/kohpangwei/group_DRO, standard regularisation.
_WATERBIRDS: Final = Recipe("sgd", learning_rate=1e-3, weight_decay=1e-3, momentum=0.9, epochs=40, batch_size=32)
DEFAULTS: Final[Mapping[str, Defaults]] = {
    "synthetic": Defaults("small_resnet", RECIPES["adam"]),  # 30 epochs
    "digits": Defaults("small_resnet", RECIPES["adam"]),
    "waterbirds": Defaults(
        "resnet50",
        _WATERBIRDS,
        {"JTT": _published(1e-5, 1.0, 64), "CnC": _published(1e-4, 1e-3, 68), "Group DRO": _published(1e-3, 1e-4, 128)},
    ),
    "celeba": Defaults(
        "resnet50",
        Recipe("sgd", learning_rate=1e-3, weight_decay=1e-4, momentum=0.9, epochs=20, batch_size=128),
        {"JTT": _published(1e-5, 0.1, 64), "CnC": _published(1e-5, 0.1, 256), "Group DRO": _published(1e-4, 1e-4, 128)},
        contrast_temperature=0.05,
        strengths=(3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003),  # a comment of DFR's dfr_evaluate_spurious.py
    ),
    "folder": Defaults("resnet50", _WATERBIRDS),
}


@dataclass(frozen=True, eq=False)
class Built:
    """A network, float32 in training mode on the CPU; prints as its note, which says where its weights come from.

    `pretrained` is whether that is a file; `head` has the parameters whose shape depends on the number of classes.
    """

    model: nn.Module = field(repr=False)
    note: str
    pretrained: bool
    head: frozenset[str]

    def __str__(self) -> str:
        return self.note


def build_model(arch: str, classes: int, weights: PathLike | None = None, seed: int = 0) -> Built:
    """A network for `classes` classes, with weights from a file or else random ones, and a note that says which.

    Its name is "small_resnet", or one of torchvision's or timm's: torchvision's, where both have it, unless it begins
    with "timm:". The head is left new where the file has none, or one for other classes; everything else must be there
    and fit. The seed is of the random weights, and of a new head; the global random state is left alone.
    """
    if classes < 2:
        raise ValueError(f"build_model: classes must be at least 2, found {classes}: pass the number of classes")
    construct = _find_constructor(arch)
    found = None if weights is None else _find_weights(weights)  # a bad file is found before a slow network
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would reseed the GPUs too
        model = construct(classes, seed).float()
    head = _head_names(construct, classes)
    title = f"{arch}, {sum(parameter.numel() for parameter in model.parameters()):,} parameters"
    if weights is None or found is None:
        return Built(model, f"{title}: RANDOM weights (seed {seed}), nothing pre-trained", False, head)
    loaded = _load(model, found, head, weights, arch)
    said = "head included" if head <= loaded else f"new head for {classes} classes (seed {seed})"
    return Built(model, f"{title}: weights of {weights}, {said}", True, head)


def load_weights(model: nn.Module, weights: PathLike, name: str) -> None:
    """Load the weights of a file into a network, all of them; what does not fit is listed in one ValueError."""
    _load(model, _find_weights(weights), frozenset(), weights, name)


def input_size(arch: str) -> int:
    """The height and width of the images that a network is made for: what timm says of its own, 224 for any other."""
    name = _timm_name(arch)
    if arch in ("small_resnet", *_names_of("torchvision")) or name not in _names_of("timm"):
        return 224
    from timm.models import get_pretrained_cfg

    said = get_pretrained_cfg(name)
    return 224 if said is None else int(max(said.input_size[1:]))


# Which network

Construct: TypeAlias = Callable[[int, int], nn.Module]
"""(classes, seed) -> network; draws from torch's global state, unless it has a way of its own with the seed."""

# With auxiliary heads a network returns something else in training mode; ImageNet's weights of these two were trained
# on images scaled to [-1, 1], and transform_input makes that of images normalised as for the others.
_INCEPTIONS: Final = {"aux_logits": False, "init_weights": True, "transform_input": True}


def _find_constructor(arch: str) -> Construct:
    if arch == "small_resnet":
        return lambda classes, seed: small_resnet(seed, classes)
    if arch in (theirs := _names_of("torchvision")):
        from torchvision.models import get_model

        options = _INCEPTIONS if arch in ("googlenet", "inception_v3") else {}
        return lambda classes, seed: get_model(arch, weights=None, num_classes=classes, **options)
    timms, name = _names_of("timm"), _timm_name(arch)
    if arch.startswith("timm:") and not timms:
        raise ImportError("timm is not installed: pip install 'neuronsurgery[study]'")
    if name in timms:
        from timm import create_model

        return lambda classes, seed: create_model(name, pretrained=False, num_classes=classes)
    names = {"small_resnet", *theirs, *timms}
    close = difflib.get_close_matches(name, sorted(names), n=5)
    raise ValueError(
        f"no network is called {arch!r}; the nearest of {len(names)} names: {', '.join(close) or 'none is near'}. "
        f"Pass small_resnet, a classification network of torchvision, or one of timm"
        + ("" if timms and theirs else " (not all installed: pip install 'neuronsurgery[study]')")
    )


def _timm_name(arch: str) -> str:
    return arch.removeprefix("timm:").partition(".")[0]  # what follows the dot names timm's own weights


def _names_of(library: str) -> Sequence[str]:
    """The networks of torchvision that classify, or of timm; none where the library is not installed."""
    try:
        if library == "timm":
            import timm

            return list(timm.list_models())
        from torchvision import models

        return list(models.list_models(module=models))
    except ImportError:
        return ()


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

_PREFIXES: Final = re.compile(r"(?:(?:module|_orig_mod|model|net|backbone)\.)*")
_AUXILIARY: Final = ("AuxLogits.", "aux1.", "aux2.")  # heads of the inceptions that only training looks at
_SHOWN: Final = 20  # names per kind of misfit in an error


def _find_weights(path: PathLike) -> Mapping[str, Mapping[str, Tensor]]:
    found = find_dictionaries(path)
    if not found:
        raise ValueError(f"{path} holds no tensors: save model.state_dict()")
    return found


def _load(
    model: nn.Module, found: Mapping[str, Mapping[str, Tensor]], head: frozenset[str], weights: PathLike, name: str
) -> set[str]:
    """Load the dictionary that fits a network, all of it but for a head that is not there; return what was loaded."""
    shapes = {own: tensor.shape for own, tensor in model.state_dict().items()}

    def fitting(tensors: Mapping[str, Tensor]) -> int:
        return sum(shapes.get(_bare_name(theirs, shapes)) == tensor.shape for theirs, tensor in tensors.items())

    chosen = _strip_prefixes(choose_dictionary(found, fitting, weights), shapes)
    fit = _fit(model, chosen, head, f"{weights} does not fit {name}")
    model.load_state_dict(fit, strict=False)
    return set(fit)


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
    """The name without as many prefixes of wrappers as it takes to be one of those expected, or else as it is."""
    bare, longest = name.replace("._orig_mod.", "."), max(map(len, expected), default=0)
    prefixes = _PREFIXES.match(bare)
    starts = [0, *(step.end() for step in re.finditer(r"\.", prefixes[0] if prefixes else ""))]
    for start in starts:
        # No name that is too long is cut off and compared: a file may have one with a million prefixes.
        if len(bare) - start <= longest and bare[start:] in expected:
            return bare[start:]
    # torchvision's own files of densenets are older than its densenets: "denselayer1.norm.1.weight".
    modern = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", bare[starts[-1] :])
    return modern if modern in expected else name


def _fit(model: nn.Module, tensors: Mapping[str, Tensor], head: frozenset[str], problem: str) -> dict[str, Tensor]:
    """The tensors to load; a head that is not there whole, with these shapes, is left out."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if any(name not in tensors or tensors[name].shape != expected[name] for name in head):
        tensors = {name: tensor for name, tensor in tensors.items() if name not in head}
        expected = {name: shape for name, shape in expected.items() if name not in head}
    fit = {name: tensor for name, tensor in tensors.items() if name in expected}
    misfits = {
        "missing in the file": [n for n in expected if n not in fit and not n.endswith("num_batches_tracked")],
        "in the file only": [name for name in tensors if name not in fit and not name.startswith(_AUXILIARY)],
        "of another shape": [
            f"{name} (file {_show(tensor.shape)}, network {_show(expected[name])})"
            for name, tensor in fit.items()
            if tensor.shape != expected[name]
        ],
        "of no plain numbers": [
            f"{name} ({tensor.dtype}, {tensor.layout}, on {tensor.device})".replace("torch.", "")
            for name, tensor in fit.items()
            if tensor.is_complex() or tensor.is_quantized or tensor.is_meta or tensor.is_sparse
        ],
    }
    lines = [
        f"  {len(names)} {kind}: {', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)}"
        for kind, names in misfits.items()
        if names
    ]
    if lines:
        raise ValueError("\n".join([f"{problem}:", *lines, "Pass weights of the same network"]))
    return fit


def _show(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "scalar"
