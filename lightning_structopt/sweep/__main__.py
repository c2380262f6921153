"""A trial in a new interpreter: ``python -m lightning_structopt.sweep SPEC``.

Lightning's launchers run that command again for the other ranks of a trial on several devices.
"""

import sys

from lightning_structopt.sweep.trial import main

if __name__ == "__main__":
    main(sys.argv[1])
