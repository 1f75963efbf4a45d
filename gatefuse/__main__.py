"""`python -m gatefuse`: the same as the `gatefuse` command."""

import sys

from gatefuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
