"""`python -m lightning_structopt`: the command line."""

import sys

from lightning_structopt.cli import main

sys.exit(main())
