"""``python -m dawm``."""

import sys

from dawm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
