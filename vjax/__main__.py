"""`python -m vjax` is the command `vjax`."""

import sys

from vjax.cli.main import main

sys.exit(main())
