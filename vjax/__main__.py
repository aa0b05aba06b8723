"""`python -m vjax` is the command `vjax`."""

import sys

from vjax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
