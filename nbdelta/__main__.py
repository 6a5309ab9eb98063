"""``python -m nbdelta``: the command line."""

import sys

from nbdelta.cli import main

if __name__ == "__main__":
    sys.exit(main())
