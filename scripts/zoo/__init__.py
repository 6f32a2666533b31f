"""Every architecture of timm, torchvision and transformers through one conversion and back. See scripts/zoo.py."""
