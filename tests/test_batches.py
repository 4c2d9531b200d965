"""What loaders yield and models return: every form is understood, and a batch taken apart and joined is itself."""

from __future__ import annotations

import sys
from collections import UserDict, namedtuple
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import neuronsurgery as ns
from neuronsurgery.batches import (
    Examples,
    group_members,
    group_names,
    join,
    map_tensors,
    move,
    ordered_groups,
    signature,
    unpack_batch,
)
from neuronsurgery.forward import default_predict, extract_logits
from neuronsurgery.loaders import iterate, iterate_groups

Pair = namedtuple("Pair", ["left", "right"])
X, Y, G = torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 2]), torch.tensor([5, 0, 5])


def tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(value, found.append)
    return found


def same(a: ns.Batch, b: ns.Batch) -> bool:
    mine, theirs = (tensors((batch.args, batch.kwargs, batch.targets)) for batch in (a, b))
    return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs)) and a.groups == b.groups


# --- forms of batches -----------------------------------------------------------------------------------------------

POSITIONAL = ns.Batch((X,), {}, Y, (5, 0, 5))
KEYWORD = ns.Batch((), {"x": X}, Y, (5, 0, 5))
FORMS = {
    "tuple": ((X, Y, G), POSITIONAL),
    "list": ([X, Y, G], POSITIONAL),
    "groups in a list": ((X, Y, [5, 0, 5]), POSITIONAL),
    "groups in an array": ((X, Y, np.array([5, 0, 5])), POSITIONAL),
    "groups as scalars": ((X, Y, [np.int64(5), torch.tensor(0), 5]), POSITIONAL),
    "targets in a list": ((X, [0, 1, 2], G), POSITIONAL),
    "several inputs": (((X, X), Y), ns.Batch((X, X), {}, Y)),
    "several inputs in a list": (([X, X], Y), ns.Batch((X, X), {}, Y)),
    "keyword inputs": (({"x": X}, Y, G), KEYWORD),
    "without groups": ((X, Y), ns.Batch((X,), {}, Y)),
    "a batch": (POSITIONAL, POSITIONAL),
    "labels": ({"x": X, "labels": Y, "groups": G}, KEYWORD),
    "label": ({"label": Y, "x": X, "group": G}, KEYWORD),
    "targets": ({"x": X, "targets": Y, "g": G}, KEYWORD),
    "y": ({"x": X, "y": Y}, ns.Batch((), {"x": X}, Y)),
    "a user's mapping": (UserDict({"x": X, "labels": Y, "groups": G}), KEYWORD),
}


@pytest.mark.parametrize(("raw", "expected"), FORMS.values(), ids=FORMS)
def test_every_form_is_unpacked(raw: Any, expected: ns.Batch) -> None:
    found = unpack_batch(raw)
    assert same(found, expected)
    assert (len(found.args), dict(found.kwargs).keys()) == (len(expected.args), expected.kwargs.keys())
    assert found.groups is None or {type(group) for group in found.groups} == {int}


def test_a_function_unpacks_any_other_form() -> None:
    found = unpack_batch("abc", lambda raw: ns.Batch((torch.zeros(len(raw), 1),), {}, torch.zeros(len(raw))))
    assert len(found) == 3


WRONG_FORMS: dict[str, tuple[Any, type[Exception], str]] = {
    "tensor": (X, TypeError, r"a loader yielded a Tensor; understood are \(inputs, targets\).*pass unpack="),
    "four": ((X, Y, G, G), TypeError, "a loader yielded a tuple of 4;"),
    "none": (None, TypeError, "a loader yielded a NoneType;"),
    "no target": ({"x": X}, ValueError, r"exactly one of \('labels', .*this one has the keys \['x'\]"),
    "two targets": ({"x": X, "labels": Y, "y": Y}, ValueError, "needs exactly one of .*'labels', 'x', 'y'"),
    "two groups": ({"x": X, "y": Y, "g": G, "group": G}, ValueError, "at most one of .*Rename them, or pass unpack="),
    "one number": ((X, torch.tensor(1)), ValueError, "targets are one per example, .* not a single number"),
    "short groups": ((X, Y, G[:2]), ValueError, "2 groups for 3 targets: give one group per example"),
    "float groups": ((X, Y, G.float()), TypeError, r"groups are integers or strings, not float: .*groups.long\(\)"),
    "bool groups": ((X, Y, G > 0), TypeError, "groups are integers or strings, not bool"),
    "nested groups": ((X, Y, G[:, None]), TypeError, "groups are integers or strings, not list"),
    "text groups": ((X, Y, "abc"), TypeError, "groups are one integer or string per example, not a str"),
    "one group": ((X, Y, torch.tensor(1)), TypeError, "one integer or string per example, not a int"),
}


@pytest.mark.parametrize(("raw", "error", "text"), WRONG_FORMS.values(), ids=WRONG_FORMS)
def test_a_wrong_form_is_named(raw: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        unpack_batch(raw)


def test_a_batch_takes_a_tuple_and_a_mapping() -> None:
    with pytest.raises(TypeError, match=r"tuple of positional .* not Tensor and dict: write Batch\(\(inputs,\), \{\}"):
        ns.Batch(X, {}, Y)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"unpack must return a neuronsurgery.Batch, not a tuple"):
        unpack_batch((X, Y), lambda raw: raw)


def test_a_batch_says_what_it_is() -> None:
    assert repr(POSITIONAL) == "Batch(3 examples, args=[3x2 float32], groups 0 5)"
    text = "Batch(3 examples, args=[], kwargs={x: 3x2 float32, flag: bool})"
    assert repr(ns.Batch((), {"x": X, "flag": True}, Y)) == text


def test_groups_in_order() -> None:
    assert group_names(np.array(["b", "a"])) == ("b", "a")
    assert ordered_groups(["b", 10, 9, "a", 9]) == [9, 10, "a", "b"]
    assert group_members([3, 1, 3]) == {3: [0, 2], 1: [1]}


# --- taking apart and joining ---------------------------------------------------------------------------------------


def rich(n: int, rows: int) -> ns.Batch:
    """Positional, nested and keyword inputs; a table of `rows` rows that belongs to the whole batch; plain values."""
    table = torch.randn(rows, 2)
    args = (torch.randn(n, 2), Pair(torch.randn(n), [torch.arange(n), table]), "text", None)
    return ns.Batch(args, {"x": {"deep": torch.randn(n, 1)}, "flag": True}, torch.arange(n), tuple(range(n)))


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 9), rows=st.integers(1, 9), cuts=st.lists(st.integers(0, 9), max_size=3))
def test_the_join_of_the_parts_is_the_batch(n: int, rows: int, cuts: list[int]) -> None:
    """Also where a part has as many examples as the table has rows."""
    batch = rich(n, rows)
    edges = [0, *sorted(min(cut, n) for cut in cuts), n]
    examples = Examples.of(batch)
    parts = [examples.take(range(a, b)) for a, b in pairwise(edges)]
    assert same(join(parts).batch(), batch)
    assert same(join([examples.take([i]) for i in range(n)]).batch(), batch)


@settings(deadline=None, max_examples=40)
@given(order=st.permutations(range(5)))
def test_taking_in_an_order_and_back_is_the_batch(order: list[int]) -> None:
    batch = rich(5, 3)
    back = [order.index(i) for i in range(5)]
    assert same(Examples.of(batch).take(order).take(back).batch(), batch)


def test_what_is_not_per_example_passes_through() -> None:
    batch = rich(4, 3)
    part = Examples.of(batch).take([2, 0]).batch()
    assert torch.equal(part.args[1].right[1], batch.args[1].right[1])
    assert part.args[1].right[0].tolist() == [2, 0]
    assert type(part.args[1]) is Pair
    assert (part.args[2], part.kwargs["flag"], part.groups) == ("text", True, (2, 0))


def test_a_taken_list_is_a_copy_and_a_range_is_a_view() -> None:
    examples = Examples.of(unpack_batch((X, Y, G)))
    assert examples.take(range(1, 3)).batch().args[0].data_ptr() == X[1:].data_ptr()
    assert examples.take([0, 1, 2]).batch().args[0].data_ptr() != X.data_ptr()


def test_a_table_of_the_whole_batch_survives_the_reuse_of_its_memory() -> None:
    batch = rich(4, 3)
    table = batch.args[1].right[1]
    examples, kept = Examples.of(batch), table.clone()
    table.zero_()
    assert torch.equal(examples.batch().args[1].right[1], kept)


def test_batches_share_a_signature_where_they_may_be_joined() -> None:
    table = torch.randn(3, 2)

    def of(x: Tensor, **kwargs: Any) -> Any:
        return signature(ns.Batch((x,), {"table": table, **kwargs}, torch.zeros(len(x), dtype=torch.long)))

    first = of(torch.zeros(2, 4))
    assert first == of(torch.ones(5, 4)) == of(torch.ones(5, 4), table=table.clone())
    others = [
        of(torch.zeros(2, 5)),
        of(torch.zeros(2, 4, dtype=torch.float64)),
        of(torch.zeros(2, 4), table=table + 1),
        of(torch.zeros(2, 4), flag=True),
        of(torch.zeros(2, 4), flag=False),
        of(torch.zeros(2, 4), sizes=[1, 2]),
        of(torch.zeros(2, 4), scalar=torch.tensor(3.0)),
    ]
    assert len({first, *others}) == 1 + len(others)


def test_moving_to_where_it_is_copies_nothing() -> None:
    moved = move(unpack_batch(({"x": X}, Y)), torch.device("cpu"))
    assert moved.kwargs["x"] is X
    assert moved.targets is Y


# --- loaders --------------------------------------------------------------------------------------------------------


class Stream(IterableDataset[tuple[Tensor, int]]):
    """Examples without a number of them."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter([(torch.zeros(2), 0), (torch.zeros(2), 1), (torch.zeros(2), 1)])


@pytest.mark.parametrize("progress", [None, "label"])
def test_a_loader_of_a_stream_has_no_length(progress: str | None) -> None:
    assert [len(batch) for batch in iterate(DataLoader(Stream(), batch_size=2), progress=progress)] == [2, 1]


def test_batches_without_examples_are_left_out() -> None:
    assert [len(batch) for batch in iterate([(X[:0], Y[:0]), (X, Y), (X[:0], Y[:0])])] == [3]


def test_progress_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    list(iterate([(X, Y), (X, Y)], progress="scores of 3", edits=2))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("scores of 3: batch 2/2, 6 examples, ")
    assert err.endswith("edits/s\n")
    list(iterate([(X, Y)]))
    assert capsys.readouterr() == ("", "")


def test_groups_of_loaders_come_from_the_mapping_or_the_batches() -> None:
    def groups(loaders: Any) -> list[list[Any]]:
        return [list(g) for g, _ in iterate_groups(loaders, device=None, unpack=None, progress=None)]

    assert groups({"b": [(X, Y, G)], "a": [(X, Y)]}) == [["b"] * 3, ["a"] * 3]
    assert groups([(X, Y, G)]) == [[5, 0, 5]]
    assert groups([(X, Y)]) == [["all"] * 3]
    with pytest.raises(ValueError, match="some batches carry groups and some do not: give every batch its groups, or"):
        groups([(X, Y, G), (X, Y)])


# --- what models return ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "output", [X, SimpleNamespace(logits=X, loss=None), {"logits": X, "loss": 0}, (X, Y), [X]], ids=str
)
def test_logits_are_found(output: Any) -> None:
    assert default_predict(output) is X
    assert extract_logits(output, None, 3) is X


def test_logits_that_are_not_found_or_fit_not_the_examples() -> None:
    for output in (None, {"scores": X}, (), ("a",)):
        with pytest.raises(TypeError, match=f"no logits found in the model's output, a {type(output).__name__}"):
            default_predict(output)
    with pytest.raises(TypeError, match="predict must return the logits, a tensor, not a float"):
        extract_logits(X, lambda _: 1.0, 3)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match=r"logits of shape \(3, 2\) for 4 examples; .*pass predict="):
        extract_logits(X, None, 4)
    assert extract_logits({"scores": X}, lambda output: output["scores"], 3) is X


def test_importing_the_vocabulary_needs_no_other_part() -> None:
    """The file says what it imports: nothing of the package."""
    source = sys.modules["neuronsurgery.types"].__file__
    assert source is not None
    with open(source) as file:
        assert "from neuronsurgery" not in file.read()
