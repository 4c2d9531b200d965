"""On a GPU: the numbers of the CPU to rounding, the same draws, and nothing changed. Skipped where there is none."""

from __future__ import annotations

import copy

import pytest
import torch
from calls import Small, setting
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn

import neuronsurgery as ns

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:no part of the model's forward is shared"),
]
GPU = torch.device("cuda")


def moved(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(GPU)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-3, atol=1e-5)


@pytest.fixture(autouse=True)
def full_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def test_scores_are_those_of_the_cpu_and_the_data_may_stay_there() -> None:
    given = setting()
    model = moved(given.model)
    before = snapshot(model, given.data)
    for options in ({}, {"regroup": False}):
        found = ns.group_grad_norms(model, given.data, **options)  # type: ignore[arg-type]
        close(found.values, ns.group_grad_norms(given.model, given.data, **options).values)  # type: ignore[arg-type]
        assert found.values.device.type == "cpu"
    close(ns.magnitudes(model).values, ns.magnitudes(given.model).values)
    assert_unchanged(before, model, given.data)


def test_small_groups_share_batches() -> None:
    """Gradients are taken in a thread of the card's there."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 300, 3), nn.Tanh(), nn.Flatten(), nn.Linear(1200, 300)
    )
    images, labels, groups = torch.randn(64, 3, 6, 6), torch.randint(300, (64,)), torch.arange(64) % 32
    passes: list[int] = []
    model = moved(network)
    model.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    found = ns.group_grad_norms(model, [(images, labels, groups)])
    assert passes == [2, 1, 64]
    close(found.values, ns.group_grad_norms(network, [(images, labels, groups)]).values)
    right = ns.group_grad_norms(network, {g: [(images[groups == g], labels[groups == g])] for g in range(32)})
    close(found.values, right.values)


EDITS = {
    "zero_out": ns.zero_out,
    "scale": lambda neurons: ns.scale(neurons, 0.3),
    "random_init": lambda neurons: ns.random_init(neurons, std=0.02, seed=1),
    "random_noise": lambda neurons: ns.random_noise(neurons, std=0.1, seed=2),
}


@pytest.mark.parametrize("make", EDITS.values(), ids=EDITS)
def test_edits_draw_the_same_and_views_bakes_and_sweeps_agree(make: object) -> None:
    given = setting()
    model = moved(given.model)
    edit = make(ns.select(ns.find_layout(model), {"conv.weight": (0, 2), "head.weight": 1}))  # type: ignore[operator]
    before = snapshot(model)
    view, baked = ns.apply(edit, model).eval(), ns.bake(edit, model).eval()
    for name, weight in ns.bake(edit, given.model).state_dict().items():
        close(baked.state_dict()[name], weight)
    x = given.data[0][0].to(GPU)
    assert torch.equal(view(x), baked(x)) and view(x).device.type == "cuda"
    swept = ns.sweep(model, {"cut": edit}, given.data, metric=ns.cross_entropy)
    assert swept["cut"] == ns.evaluate(view, given.data, metric=ns.cross_entropy)
    assert swept.baseline == ns.evaluate(model, given.data, metric=ns.cross_entropy)
    assert_unchanged(before, model)


def test_random_states_of_the_gpu_are_kept() -> None:
    class Drawing(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.1 * torch.randn(len(x), 3, device=x.device)

    given = setting(Drawing)
    model = moved(given.model)
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    ns.evaluate(model, given.data)
    ns.group_grad_norms(model, given.data)
    ns.hard_batch(model, given.data, top=4, sample=2)
    assert ns.learned_mask(model, given.data, 1, steps=2).values.device.type == "cpu"
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks_are_scored_and_cut(kind: type[nn.RNNBase]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = kind(4, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])  # type: ignore[no-any-return]

    model = Recurrent()
    data = [(torch.randn(5, 7, 4), torch.tensor([0, 1, 0, 1, 1]))]
    on_gpu, enabled = moved(model), torch.backends.cudnn.enabled
    close(ns.group_grad_norms(on_gpu, data).values, ns.group_grad_norms(model, data).values)
    assert torch.backends.cudnn.enabled == enabled
    edit = ns.zero_out(ns.select(ns.find_layout(model), {"rnn.weight_hh_l0": slice(0, 3)}))
    x = data[0][0]
    close(ns.apply(edit, on_gpu).eval()(x.to(GPU)), ns.bake(edit, model).eval()(x))


def test_files_go_between_devices(tmp_path: object) -> None:
    given = setting()
    model = moved(given.model)
    scores = ns.group_grad_norms(model, given.data)
    ns.save_file(scores, f"{tmp_path}/scores.safetensors")
    assert ns.load_file(f"{tmp_path}/scores.safetensors") == scores
    rewind = ns.rewind(ns.topk(scores[0], 2), {name: tensor + 1 for name, tensor in model.state_dict().items()})
    ns.save_file(rewind, f"{tmp_path}/rewind.safetensors")
    assert ns.load_file(f"{tmp_path}/rewind.safetensors") == rewind
    close(ns.bake(rewind, model).state_dict()["head.weight"], ns.bake(rewind, given.model).state_dict()["head.weight"])
