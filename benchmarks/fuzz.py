"""Does every damaged file get a clear answer? Files and checkpoints are changed at random and loaded.

    python benchmarks/fuzz.py                      # 10,000 files and 3,000 checkpoints: two minutes of one core
    python benchmarks/fuzz.py --count 100000 --seed 7

One file of every kind is changed: bytes of it, the header of safetensors, our part of that header, the tensors; in half
of the files the digest is made again, so that it is right for what is in the file. Each must give a value that can be
printed, compared, applied and saved again, or a ValueError with the file's name. Checkpoints, of safetensors and of
torch, are changed likewise and rewound to. Printed is how many had which outcome; what is foreign (another exception, a
value that cannot be used, one that takes ten seconds) is printed too, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from fuzzing import fuzz, fuzz_checkpoints

SHOWN = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="changed files (default: %(default)s)")
    parser.add_argument("--checkpoints", type=int, default=3_000, help="changed checkpoints (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the changes (default: %(default)s)")
    args = parser.parse_args()
    wrong = []
    for title, run, count in (("files", fuzz, args.count), ("checkpoints", fuzz_checkpoints, args.checkpoints)):
        with tempfile.TemporaryDirectory() as folder:
            outcomes, foreign = run(count, args.seed, Path(folder))
        print(f"{count} {title}:", ", ".join(f"{number} {outcome}" for outcome, number in outcomes.most_common()))
        wrong += foreign
    for line in wrong[:SHOWN]:
        print(f"  {line[:500]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
