"""The network that is audited: an architecture with weights, a function of the caller's, a folder of transformers."""

from __future__ import annotations

import functools
import json
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from neuronsurgery.state_dicts import find_dictionaries
from neuronsurgery.study.models import build_model, load_weights

LONGEST = 256
"""Tokens of a text that are read at most."""


@dataclass(frozen=True, eq=False)
class Network:
    """A network to audit, in evaluation mode, and what it is and where its weights come from, in one line.

    `class_names` is what it calls its classes, or None; one that reads texts has a tokenizer of transformers.
    """

    model: nn.Module
    note: str
    class_names: Sequence[str] | None = None
    tokenizer: Any = None

    def encoder(self, texts: Sequence[str]) -> Callable[..., Any]:
        """Return a function from texts to int64 (N, length) by name, of the length of the longest of these texts.

        All have one length, so that an example is the same in any batch.
        """
        longest = max(len(tokens) for tokens in self.tokenizer(list(texts))["input_ids"])
        length = min(LONGEST, -(-longest // 8) * 8)
        how = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        return functools.partial(self.tokenizer, **how)


def from_arch(arch: str, weights: Path) -> Network:
    """Return a network of torchvision or timm with the weights of a file, whose head says how many classes it has."""
    few = build_model(arch, 2)
    heads = {name: tensor.shape for name, tensor in few.model.state_dict().items() if name in few.head}
    classes = [
        max(2, int(tensor.shape[0]))
        for tensors in find_dictionaries(weights).values()
        for name, tensor in tensors.items()
        for head, shape in heads.items()
        if name.endswith(head) and tensor.dim() == len(shape) and tensor.shape[1:] == shape[1:]
    ]
    built = build_model(arch, classes[0], weights) if classes else None
    if built is None or "head included" not in built.note:
        raise ValueError(
            f"{weights} has no head of {arch} for two classes or more ({', '.join(sorted(heads))}): pass the weights "
            f"of the whole trained network, or the network itself with --model"
        )
    return Network(built.model.eval(), built.note)


def from_function(name: str, weights: Path | None) -> Network:
    """Return what a function "package.module:function" returns, with the weights of a file if one is given."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())  # as `python -m` has it
    try:
        made = pkgutil.resolve_name(name)
    except ImportError as error:
        raise ImportError(
            f"--model {name}: {module} cannot be imported ({error}): start in the folder that it is in"
        ) from error
    except AttributeError as error:
        raise ValueError(f"--model {name}: {module} has no {function!r}") from error
    finally:
        sys.path.remove(os.getcwd())
    try:
        model = made if isinstance(made, nn.Module) else made()
    except Exception as error:  # whatever a function of the caller's raises
        said = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"--model {name}: {function}() failed ({said}): name a function that makes the network without arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {name}: expected a torch module, found a {type(model).__name__}")
    if weights is not None:
        load_weights(model, weights, name)
    return Network(model.eval(), f"{name}, {f'weights of {weights}' if weights else 'as it comes'}")


def from_folder(folder: Path) -> Network:
    """Return the classifier of images or texts that a folder of Hugging Face's holds."""
    try:
        import transformers
    except ImportError as error:
        said = f"{folder} is a folder of transformers, which is not installed: pip install transformers"
        raise ImportError(said) from error
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    architecture = (config.architectures or [""])[0]
    of_texts = architecture.endswith("ForSequenceClassification")
    if not of_texts and not architecture.endswith("ForImageClassification"):
        raise ValueError(
            f"{folder} holds {architecture or 'no architecture'}: an audit needs a classifier of images or texts"
        )
    kind = transformers.AutoModelForSequenceClassification if of_texts else transformers.AutoModelForImageClassification
    model = kind.from_pretrained(folder, local_files_only=True).eval()
    names = [str(config.id2label[number]) for number in sorted(config.id2label)]
    named = any(name != f"LABEL_{number}" for number, name in enumerate(names))
    note = f"{architecture} of {folder}, {sum(p.numel() for p in model.parameters()):,} parameters"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True) if of_texts else None
    return Network(model, note, names if named else None, tokenizer)


def is_folder_of_transformers(path: Path) -> bool:
    """Return whether a path is a folder with a config of transformers."""
    try:
        return "architectures" in json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False
