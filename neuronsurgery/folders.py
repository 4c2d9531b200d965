"""An edit that travels: a folder with its file, and a card that says what it does and which model it is for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from neuronsurgery.atomic import write_atomically
from neuronsurgery.checkpoints import Rewind
from neuronsurgery.checks import is_integer
from neuronsurgery.copies import readable
from neuronsurgery.critical import Critical
from neuronsurgery.digests import digest
from neuronsurgery.discovery import find_layout
from neuronsurgery.edits import Edit, compose, leaves
from neuronsurgery.errors import checked, counted, warn
from neuronsurgery.files import load_file, save_file
from neuronsurgery.judgement import Verdict
from neuronsurgery.plans import plan
from neuronsurgery.surveys import Survey, survey
from neuronsurgery.switches import restoring

EDIT, CARD = "edit.safetensors", "README.md"
"""The two files of a folder."""

SCHEMA: Final = 1
FACTS = "neuronsurgery: "
"""The line of the card that says, as JSON, what is checked when the folder is loaded."""

TAKES = "save_folder takes an edit, or what find_critical returns, not a {}: write save_folder(edit, model, folder)"


@restoring
def save_folder(
    edit: Edit | Critical, model: nn.Module, folder: str | os.PathLike[str], *, verdict: Verdict | None = None
) -> None:
    """Write an edit to a folder, with a card that says where it is from and what it was judged to do.

    `edit.safetensors` is what `save_file` writes (a rewind with its rows, not the path that they are from); `README.md`
    is for people, and has what `load_folder` checks: digests of the model's layers and of the weights that the edit
    touches, and of the examples of the search and the judgement. Each file is there whole or not at all, and a card of
    another edit is noticed.

    Args:
        edit: an edit, or what `find_critical` returned, which knows the examples that it was searched on.
        model: that the edit is for; not changed.
        folder: made if it is missing; what it has under the two names is replaced.
        verdict: what `judge` said of it.

    Raises:
        TypeError: if it is given something else.
        ValueError: if the edit does not fit the model, or the verdict is on another group than the search.
        OSError: if the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> from neuronsurgery import select, zero_out
        >>> model = nn.Linear(3, 4)
        >>> cut = zero_out(select(find_layout(model), {"weight": (0, 2)}))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_folder(cut, model, folder)
        ...     load_folder(folder, model) == cut
        True
    """
    found = edit if isinstance(edit, Critical) else None
    made = _with_rows(edit.edit if isinstance(edit, Critical) else checked(edit, Edit, TAKES))
    checked(verdict, Verdict | None, "verdict= is what judge returns, not a {}")
    if found is not None and verdict is not None and verdict.group != found.group:
        raise ValueError(f"the set was searched for {found.group!r} and judged on {verdict.group!r}: judge it on that")
    surveyed = survey(model)
    plan(made, surveyed)
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        **_digests(made, surveyed),
        "searched": None if found is None else _examples(found.searched),
        "judged": None if verdict is None else _examples(verdict.judged),
        "sentence": None if verdict is None else verdict.sentence,
        "versions": {
            "neuronsurgery": version("neuronsurgery"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(made, folder / EDIT)
    facts["file"] = hashlib.sha256((folder / EDIT).read_bytes()).hexdigest()
    write_atomically(folder / CARD, _card(made, facts, found, verdict).encode())


@restoring
def load_folder(folder: str | os.PathLike[str], model: nn.Module) -> Edit:
    """Return the edit that `save_folder` wrote, checked against the model that it is to be applied to.

    Args:
        folder: with the edit and its card.
        model: with the layers of the one that the edit was made for; not changed.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if a file is damaged, the card is one of another edit, or the model has other layers.

    Warns:
        UserWarning: if the weights that the edit touches are others than those that it was made for: what the card
            says of it was measured on these.

    Example:
        >>> import tempfile
        >>> from neuronsurgery import scale, select
        >>> model = nn.Linear(3, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_folder(scale(select(find_layout(model), {"weight": 1}), 2.0), model, folder)
        ...     load_folder(folder, model)
        scale(1 neuron in 1 layer: weight[1], factor=2)
    """
    folder = Path(folder)
    facts = _facts(folder / CARD)
    edit = load_file(folder / EDIT)
    if not isinstance(edit, Edit) or hashlib.sha256((folder / EDIT).read_bytes()).hexdigest() != facts["file"]:
        raise ValueError(
            f"{folder / CARD} is the card of another file than the {EDIT} beside it: save the folder again"
        )
    surveyed = survey(model)
    plan(edit, surveyed)
    digests = _digests(edit, surveyed)
    if digests["layout"] != facts["layout"]:
        raise ValueError(
            f"the edit in {folder} was made for a model with other layers than this one, although those that it "
            f"touches fit: load_file('{folder / EDIT}') gives the edit by itself"
        )
    if digests["weights"] != facts["weights"]:
        warn(
            f"the weights that the edit in {folder} touches are others than those that it was made for; what its card "
            f"says was measured on these: judge it on this model"
        )
    return edit


def _with_rows(edit: Edit) -> Edit:
    """Return the same edit, with the rows of its rewinds in the place of the paths that they were read from."""
    return compose(*(dataclasses.replace(e, path=None) if isinstance(e, Rewind) else e for e in leaves(edit)))


def _digests(edit: Edit, surveyed: Survey) -> dict[str, str]:
    """Return what says which model an edit is for: its layers, and the weights that the edit touches."""
    values = readable(surveyed)
    pieces: list[str | Tensor] = []
    for name in sorted(surveyed.first_names(edit.neurons.by_parameter()).values()):
        pieces += [f"{name}\0{values[name].dtype}\0{tuple(values[name].shape)}\0", values[name]]
    return {"layout": find_layout(surveyed.model).digest, "weights": digest(*pieces)}


def _examples(keys: Iterable[str]) -> dict[str, Any] | None:
    """Return the number of some examples and a digest of them; None where nothing tells them apart."""
    known = sorted(keys)
    return {"examples": len(known), "digest": digest(*known)} if known else None


# The card


def _card(edit: Edit, facts: dict[str, Any], found: Critical | None, verdict: Verdict | None) -> str:
    said = [
        f"---\ntags:\n- neuronsurgery\n{FACTS}{json.dumps(facts, sort_keys=True)}\n---",
        f"# An edit of {counted(len(edit.neurons), 'neuron')}",
        _quoted(repr(edit)),
        "## What it does",
        "Not judged." if verdict is None else _quoted(repr(verdict)),
    ]
    if found is not None:
        said += ["## How it was found", _quoted(repr(found))]
    said += [
        "## What it is for",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in _rows(facts)),
        "## How to apply it",
        "```python\nimport neuronsurgery as ns\n\nedit = ns.load_folder(folder, model)  # checked against the model\n"
        "view = ns.apply(edit, model)\n```",
    ]
    return "\n\n".join(said) + "\n"


def _rows(facts: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for name in ("layout", "weights", "file"):
        yield f"SHA-256 of the {name}", f"`{facts[name]}`"
    for name in ("searched", "judged"):
        data = facts[name]
        yield f"{name} on", "not known" if data is None else f"{data['examples']} examples, SHA-256 `{data['digest']}`"
    yield from facts["versions"].items()


def _quoted(text: str) -> str:
    """Return a text as a block of code, whatever is in it."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _facts(path: Path) -> dict[str, Any]:
    """Return what a card says of its edit, checked as far as it is read.

    Raises:
        FileNotFoundError: if there is no card.
        ValueError: if it is damaged, or of a newer version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no card at {path}: a folder has {EDIT} and {CARD}, see save_folder")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        facts = json.loads(next(line.removeprefix(FACTS) for line in lines if line.startswith(FACTS)))
        schema = facts["schema"]
        if not is_integer(schema, 1) or not all(isinstance(facts[key], str) for key in ("layout", "weights", "file")):
            raise TypeError("digests are strings")
    except (StopIteration, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"the card {path} is damaged ({error!r}): save the folder again") from error
    if schema > SCHEMA:
        raise ValueError(f"{path} is of schema {schema}; this version reads up to {SCHEMA}: update neuronsurgery")
    known: dict[str, Any] = facts
    return known
