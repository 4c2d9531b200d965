"""An edit that travels: its file, its card, and what is checked before it is applied."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from snapshot import assert_unchanged, snapshot
from torch import nn

import neuronsurgery as ns
from neuronsurgery.digests import digest
from neuronsurgery.folders import FACTS

GROUPS = torch.tensor([0] * 30 + [1] * 30)


def net(seed: int = 0, classes: int = 2) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes))


def data() -> list[Any]:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    return [(x, net()(x).argmax(1), GROUPS)]


def cut(model: nn.Module) -> ns.Edit:
    return ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": (1, 5)}))


def facts(folder: Path) -> dict[str, Any]:
    (line,) = (line for line in (folder / "README.md").read_text().splitlines() if line.startswith(FACTS))
    return json.loads(line.removeprefix(FACTS))  # type: ignore[no-any-return]


def rewrite(folder: Path, **changes: Any) -> None:
    said, card = facts(folder), folder / "README.md"
    card.write_text(card.read_text().replace(json.dumps(said, sort_keys=True), json.dumps({**said, **changes})))


def test_an_edit_goes_there_and_back(tmp_path: Path) -> None:
    model = net()
    before = snapshot(model)
    ns.save_folder(cut(model), model, tmp_path / "new" / "cut")
    assert sorted(path.name for path in (tmp_path / "new" / "cut").iterdir()) == ["README.md", "edit.safetensors"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ns.load_folder(tmp_path / "new" / "cut", model) == cut(model)
    assert_unchanged(before, model)
    assert ns.load_file(tmp_path / "new" / "cut" / "edit.safetensors") == cut(model)
    said = facts(tmp_path / "new" / "cut")
    assert said["layout"] == ns.find_layout(model).digest
    assert said["searched"] is said["judged"] is said["sentence"] is None
    assert said["versions"]["torch"] == torch.__version__


@pytest.mark.filterwarnings("ignore:groups of fewer")
def test_the_card_says_where_it_is_from_and_what_it_was_judged_to_do(tmp_path: Path) -> None:
    model = net()
    search, rest = ns.halves(data())
    found = ns.find_critical(model, search, 1, k=1, cap=1.0)
    verdict = ns.judge(found, model, rest, 1, draws=3)
    ns.save_folder(found, model, tmp_path, verdict=verdict)
    assert found.neurons and ns.load_folder(tmp_path, model) == found.edit
    card, said = (tmp_path / "README.md").read_text(), facts(tmp_path)
    for text in (verdict.sentence, repr(found.edit), found.sentence, f"`{said['weights']}`", "# An edit of 1 neuron\n"):
        assert text in card
    assert said["sentence"] == verdict.sentence
    assert said["searched"] == {"examples": len(found.searched), "digest": digest(*sorted(found.searched))}
    assert said["judged"] == {"examples": len(verdict.judged), "digest": digest(*sorted(verdict.judged))}
    assert len(found.searched) + len(verdict.judged) == 60 and not found.searched & verdict.judged
    with pytest.raises(ValueError, match="the set was searched for 0 and judged on 1: judge it on that"):
        ns.save_folder(ns.find_critical(model, search, 0, k=1), model, tmp_path, verdict=verdict)


def test_a_name_that_is_markdown_stays_text(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_module("---\n# x", nn.Linear(3, 3))

    model = Odd()
    ns.save_folder(ns.zero_out(ns.select(ns.find_layout(model), {"*": 0})), model, tmp_path)
    assert all(line.startswith("    ") for line in (tmp_path / "README.md").read_text().splitlines() if "# x" in line)
    assert ns.load_folder(tmp_path, model).neurons


def test_a_rewind_travels_with_its_rows(tmp_path: Path) -> None:
    model, then = net(), net(1)
    torch.save(then.state_dict(), tmp_path / "then.pt")
    back = ns.compose(cut(model), ns.rewind(cut(model).neurons, tmp_path / "then.pt", alpha=0.5))
    ns.save_folder(back, model, tmp_path / "back")
    (tmp_path / "then.pt").unlink()
    assert ns.load_folder(tmp_path / "back", model) == back


def test_another_model_is_refused_and_other_weights_are_warned_of(tmp_path: Path) -> None:
    model = net()
    ns.save_folder(cut(model), model, tmp_path)
    with pytest.raises(ValueError, match=r"made for a model with other layers than this one.*load_file\("):
        ns.load_folder(tmp_path, net(classes=3))
    with pytest.raises(ValueError, match="the neurons do not fit the model"):
        ns.load_folder(tmp_path, nn.Sequential(nn.Linear(4, 7)))
    with pytest.warns(UserWarning, match="touches are others than those that it was made for.*judge it on this model"):
        assert ns.load_folder(tmp_path, net(1)) == cut(model)
    with torch.no_grad():
        model[2].weight.add_(1)  # which the edit does not touch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ns.load_folder(tmp_path, model)


def test_a_card_of_another_edit_a_damaged_one_and_none_are_refused(tmp_path: Path) -> None:
    model = net()
    ns.save_folder(cut(model), model, tmp_path)
    ns.save_file(ns.scale(cut(model).neurons, 2.0), tmp_path / "edit.safetensors")
    with pytest.raises(ValueError, match=r"is the card of another file than the edit\.safetensors beside it"):
        ns.load_folder(tmp_path, model)
    ns.save_folder(cut(model), model, tmp_path)  # what is there is replaced
    rewrite(tmp_path, schema=2)
    with pytest.raises(ValueError, match="is of schema 2; this version reads up to 1: update neuronsurgery"):
        ns.load_folder(tmp_path, model)
    for changes in ({"schema": "1"}, {"schema": 1, "weights": 3}, {"file": None}):
        rewrite(tmp_path, **changes)
        with pytest.raises(ValueError, match=r"the card .*README\.md is damaged"):
            ns.load_folder(tmp_path, model)
    for text in ("", "neuronsurgery: {", "neuronsurgery: []", f"neuronsurgery: {'[' * 100000}"):
        (tmp_path / "README.md").write_text(text)
        with pytest.raises(ValueError, match=r"the card .*README\.md is damaged"):
            ns.load_folder(tmp_path, model)
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="damaged"):
        ns.load_folder(tmp_path, model)
    (tmp_path / "README.md").unlink()
    with pytest.raises(FileNotFoundError, match="no card at"):
        ns.load_folder(tmp_path, model)


def test_what_is_no_edit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = net()
    with pytest.raises(TypeError, match="save_folder takes an edit, or what find_critical returns, not a Neurons"):
        ns.save_folder(cut(model).neurons, model, tmp_path / "a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="verdict= is what judge returns, not a str"):
        ns.save_folder(cut(model), model, tmp_path / "a", verdict="it carries")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the neurons do not fit the model"):
        ns.save_folder(cut(model), nn.Linear(2, 2), tmp_path / "a")
    assert not (tmp_path / "a").exists()
