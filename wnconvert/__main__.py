"""`python -m wnconvert`."""

import sys

from wnconvert.cli import main

if __name__ == "__main__":
    sys.exit(main())
