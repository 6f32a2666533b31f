"""Convert checkpoints back and forth for a long time in one process: scripts/soak.py --help."""

from soak.command import main

if __name__ == "__main__":
    main()
