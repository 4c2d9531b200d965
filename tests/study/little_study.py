"""The study on few images and with a tiny network, and what tests have done of it in processes of their own."""

from __future__ import annotations

import resource
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from neuronsurgery.study import cli, models, program
from neuronsurgery.study.network import Block
from neuronsurgery.study.report import write_report
from neuronsurgery.study.run import read_results

LITTLE = {"train": (24, 8, 6, 12), "validation": (4,) * 4, "test": (4,) * 4}
LITTLE_HELD_OUT = {"held-out": (24, 8, 6, 12)}


class TinyResNet(nn.Module):
    """The stem, the last block and the head of a `SmallResNet`, of 56 neurons."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.block = Block(8, 16, stride=2)
        self.head = nn.Linear(16, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.block(functional.relu(self.stem_norm(self.stem(images))))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def tiny_resnet(seed: int = 0, classes: int = 2) -> TinyResNet:
    """The same for a seed; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyResNet(classes)


def make_little() -> None:
    """Have `--quick` take few images, and `small_resnet` be tiny."""
    program.QUICK_COUNTS = LITTLE
    program.QUICK_HELD_OUT = LITTLE_HELD_OUT
    models.small_resnet = tiny_resnet


def study(*arguments: str) -> int:
    torch.set_num_threads(1)  # in every fork, or torch's own threads may find their pool broken
    make_little()
    return cli.main(arguments)


def study_on_a_full_disk(*arguments: str) -> int:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # a checkpoint is larger
    return study(*arguments)


def report_on_a_full_disk(folder: str) -> None:
    """A limit on the size of a file is the nearest thing to a full disk that a test may set up for itself."""
    results = read_results(Path(folder))
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    write_report(results, Path(folder))
