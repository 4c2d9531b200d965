"""The network that is audited: an architecture with weights, a function of the caller's, a folder of transformers."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from neuronsurgery.state_dicts import find_dictionaries
from neuronsurgery.study.models import build_model, load_weights

LONGEST = 256
"""Tokens of a text that are read at most."""


@dataclass(frozen=True, eq=False)
class Network:
    """A network to audit.

    Attributes:
        model: in evaluation mode.
        note: what it is and where its weights come from, in one line.
        class_names: what it calls its classes, or None.
        encode: texts -> what it takes, for a network that reads texts; else None.
    """

    model: nn.Module
    note: str
    class_names: Sequence[str] | None = None
    encode: Encoder | None = None


@dataclass(frozen=True)
class Encoder:
    """Texts to what a network takes, all of one length, so that an example is the same in any batch.

    Attributes:
        tokenizer: of transformers.
        length: tokens per text, padded or cut.
    """

    tokenizer: Any
    length: int = LONGEST

    def __call__(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the tokens of some texts, int64 (N, length) by name."""
        made = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return dict(made)

    def fitted(self, texts: Sequence[str]) -> Encoder:
        """Return the same for texts none of which is longer than the longest of these."""
        longest = max(len(tokens) for tokens in self.tokenizer(list(texts))["input_ids"])
        return replace(self, length=min(LONGEST, -(-longest // 8) * 8))


def from_arch(arch: str, weights: Path) -> Network:
    """Return a network of torchvision or timm with the weights of a file, head included.

    The number of classes is that of the file's head.

    Raises:
        ValueError: if the name is unknown, or the file does not fit; says what does not.
        FileNotFoundError: if there is no such file.
    """
    classes = _classes_in(arch, weights)
    built = build_model(arch, classes, weights)
    if "head included" not in built.note:
        raise ValueError(f"{weights} has no head of {arch}: an audit needs the whole trained network")
    return Network(built.model.eval(), built.note)


def _classes_in(arch: str, weights: Path) -> int:
    """Return how many classes the head in a file has, by the shapes of the last tensors that fit."""
    few = build_model(arch, 2)
    heads = {name: tensor.shape for name, tensor in few.model.state_dict().items() if name in few.head}
    for tensors in find_dictionaries(weights).values():
        for name, tensor in tensors.items():
            for head, shape in heads.items():
                if name.endswith(head) and tensor.dim() == len(shape) and tensor.shape[1:] == shape[1:]:
                    return max(2, int(tensor.shape[0]))
    raise ValueError(
        f"{weights} has no head of {arch} ({', '.join(sorted(heads))}): pass the weights of the whole trained network"
    )


def from_function(name: str, weights: Path | None) -> Network:
    """Return what a function "package.module:function" returns, with the weights of a file if one is given.

    Raises:
        ValueError: if the name is no such function, it returns no module, or the weights do not fit.
        ImportError: if the module cannot be imported.
        FileNotFoundError: if there is no such file.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(
            f"--model {name}: expected a function as package.module:function, such as my_package:make_network"
        )
    sys.path.insert(0, os.getcwd())  # as `python -m` has it
    try:
        made = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise ImportError(f"--model {name}: {module} cannot be imported ({error}): start where it can be") from error
    except AttributeError as error:
        raise ValueError(f"--model {name}: {module} has no {function!r}") from error
    finally:
        sys.path.remove(os.getcwd())
    model = made() if not isinstance(made, nn.Module) else made
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {name}: expected a torch module, found a {type(model).__name__}")
    if weights is not None:
        load_weights(model, weights, name)
    return Network(model.eval(), f"{name}, {'weights of ' + str(weights) if weights else 'as it comes'}")


def from_folder(folder: Path) -> Network:
    """Return the classifier of images or texts that a folder of Hugging Face's holds.

    Raises:
        ValueError: if its config names no classifier.
        ImportError: if transformers is not installed.
        OSError: if a file of it is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"{folder} is a folder of transformers, which is not installed: pip install transformers"
        ) from error
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    kinds = {
        "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
        "ForImageClassification": transformers.AutoModelForImageClassification,
    }
    architecture = (config.architectures or [""])[0]
    kind = next((kind for ending, kind in kinds.items() if architecture.endswith(ending)), None)
    if kind is None:
        raise ValueError(
            f"{folder} holds {architecture or 'no architecture'}: an audit needs a classifier of images or texts"
        )
    model = kind.from_pretrained(folder, local_files_only=True).eval()
    names = [str(config.id2label[number]) for number in sorted(config.id2label)]
    named = names if any(name != f"LABEL_{number}" for number, name in enumerate(names)) else None
    note = f"{architecture} of {folder}, {sum(p.numel() for p in model.parameters()):,} parameters"
    if architecture.endswith("ForImageClassification"):
        return Network(model, note, named)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Network(model, note, named, Encoder(tokenizer))


def is_folder_of_transformers(path: Path) -> bool:
    """Return whether a path is a folder with a config of transformers."""
    try:
        return "architectures" in json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False
