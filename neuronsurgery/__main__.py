"""The command line as `python -m neuronsurgery`."""

import sys

from neuronsurgery.study.cli import main

if __name__ == "__main__":
    sys.exit(main())
