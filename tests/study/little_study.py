"""The study on few images, as a program: for tests that start processes of their own."""

from __future__ import annotations

import sys

from neuronsurgery.study import cli

LITTLE = {"train": (24, 8, 6, 12), "validation": (4,) * 4, "test": (4,) * 4}
LITTLE_HELD_OUT = {"held-out": (24, 8, 6, 12)}


def make_little() -> None:
    """Have `--quick` take few images."""
    cli.QUICK_COUNTS = LITTLE
    cli.QUICK_HELD_OUT = LITTLE_HELD_OUT


if __name__ == "__main__":
    make_little()
    sys.exit(cli.main(sys.argv[1:]))
