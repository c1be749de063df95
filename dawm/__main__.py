"""``python -m dawm``."""

import sys

import dawm

if not hasattr(dawm, "__version__"):  # the current folder holds another folder of that name, which Python takes first
    sys.exit(
        "error: the folder ./dawm hides the installed package dawm; run from another folder (of a checkout: from inside)"
    )

from dawm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
