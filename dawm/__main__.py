"""``python -m dawm``."""

import sys

import dawm

if not hasattr(dawm, "__version__"):  # the current folder holds another of that name, which Python takes first
    sys.exit(
        "error: the folder ./dawm hides the installed package; run from another folder, of a checkout from inside it"
    )

from dawm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
