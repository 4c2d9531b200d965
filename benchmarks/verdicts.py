"""How often a verdict says that a set carries its group where no group is anything: groups permuted within each class.

    python benchmarks/verdicts.py RUN [--permutations 100] [--first 0]

RUN is a run folder of the study on the synthetic data. The groups of its training images are permuted within each
class, so that the "minority" is a random part of the class; then a set is searched on one half and judged on the
other, as ever. At a level of 95 %, at most 5 of 100 verdicts should say *carries*.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

import neuronsurgery as ns
from neuronsurgery.study.data import batches, synthetic
from neuronsurgery.study.network import small_resnet
from neuronsurgery.study.training import checkpoint_epochs, load_checkpoint


def permuted(groups: torch.Tensor, targets: torch.Tensor, seed: int) -> torch.Tensor:
    """Return the groups permuted within each class."""
    generator = torch.Generator().manual_seed(seed)
    mixed = groups.clone()
    for target in targets.unique():
        members = (targets == target).nonzero().flatten()
        mixed[members] = groups[members[torch.randperm(len(members), generator=generator)]]
    return mixed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder of the study on the synthetic data")
    parser.add_argument("--seed", type=int, default=0, help="of that run")
    parser.add_argument("--permutations", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="go on from this one, where an earlier call was stopped")
    arguments = parser.parse_args()
    model = load_checkpoint(small_resnet(), arguments.run, max(checkpoint_epochs(arguments.run)))
    split, carries, found_none = synthetic(arguments.seed).train, 0, 0
    started = time.perf_counter()
    for number in range(arguments.first, arguments.permutations):
        groups = permuted(split.groups, split.targets, number)
        order = groups.argsort(stable=True)
        images = type(split)(split.images[order], split.targets[order], groups[order])
        search, rest = ns.halves(batches(images, 600), seed=number)
        group = (1, 2)[number % 2]
        found = ns.find_critical(model, search, group)
        found_none += found.found is None
        verdict = ns.judge(found, model, rest, group, draws=0)
        carries += verdict.carries
        seconds = time.perf_counter() - started
        sys.stdout.write(
            f"{number + 1}: {carries} carry, {found_none} without a set, {seconds:.0f} s; {verdict.sentence}\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
