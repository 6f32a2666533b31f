"""Convert every architecture of timm, torchvision and transformers and back: scripts/zoo.py --help."""

from zoo.command import main

if __name__ == "__main__":
    main()
