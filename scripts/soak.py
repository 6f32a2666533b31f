"""Convert checkpoints back and forth for a long time in one process: scripts/soak.py --help."""

import os
import sys

from soak.command import main

if __name__ == "__main__":
    if "MALLOC_ARENA_MAX" not in os.environ:
        # glibc gives threads heaps of their own, whose holes fill up over hundreds of trips and would look like a leak.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "MALLOC_ARENA_MAX": "1"})
    main()
