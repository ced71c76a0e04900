"""Run the command line as `python -m lightning_hrnn`."""

import sys

from lightning_hrnn.cli import main

if __name__ == "__main__":
    sys.exit(main())
