"""A strict world: warnings are errors, every test starts from one seed, none may leave a switch of torch flipped."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread only waits, and spins where cores are busy

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from snapshot import torch_flags
from study.forking import Forked, forker

from neuronsurgery.graph import trust

WARNINGS = [
    "error",
    "ignore:LSTM with projections is not supported with oneDNN:UserWarning",  # torch says so at each first forward
    "ignore::DeprecationWarning:timm.*",
    "ignore::DeprecationWarning:transformers.*",
    "ignore::FutureWarning:transformers.*",
]


def pytest_configure(config: pytest.Config) -> None:
    """Ahead of the project's own filters, so that those win."""
    config.getini("filterwarnings")[:0] = WARNINGS
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def strict_world() -> Iterator[None]:
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed asks every kind of device
    torch.use_deterministic_algorithms(True)
    before = torch_flags()
    yield
    after = torch_flags()
    reset(before)
    flipped = [f"{name}: {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
    assert not flipped, f"the test left switches of torch flipped: {flipped}"


@pytest.fixture(autouse=True)
def captures_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests have little to run, and it is the capture that they are to test."""
    monkeypatch.setattr(trust, "WORTH", 0.0)


@pytest.fixture(scope="session")
def forked() -> Iterator[Forked]:
    """What calls a function in a process of its own, which need not import torch; the xdist group is "forked"."""
    with forker() as call:
        yield call


def reset(flags: dict[str, object]) -> None:
    """The switches that would spoil the tests that follow."""
    torch.set_grad_enabled(bool(flags["grad mode"]))
    torch.backends.mha.set_fastpath_enabled(bool(flags["mha fast path"]))
    torch.use_deterministic_algorithms(bool(flags["deterministic"]), warn_only=bool(flags["deterministic warn only"]))
    torch.set_default_dtype(flags["default dtype"])  # type: ignore[arg-type]
    torch.set_num_threads(int(flags["threads"]))  # type: ignore[call-overload]
