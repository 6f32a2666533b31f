"""Keep what README.md shows true: run the commands in its marked blocks and put in what they print.

A block starts with a line `<!-- run: COMMAND | COMMAND -->` and ends with `<!-- end -->`. The commands run where the
demo has its files. `--check` changes nothing and fails if a block is stale.
"""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path

from demo import prepare, run

README = Path(__file__).parent.parent / "README.md"
_BLOCK = re.compile(r"<!-- run: (?P<commands>[^\n]+) -->\n.*?<!-- end -->", re.DOTALL)


def regenerated(text: str, folder: Path) -> str:
    """The text with every block filled anew."""

    def block(match: re.Match[str]) -> str:
        commands = match["commands"].split(" | ")
        shown = "\n".join(f"$ {command}\n{run(command, folder)}" for command in commands)
        return f"<!-- run: {match['commands']} -->\n```text\n{shown}```\n<!-- end -->"

    return _BLOCK.sub(block, text)


def main(*, check: bool) -> int:
    """Rewrite README.md, or say what is stale in it."""
    old = README.read_text()
    new = regenerated(old, prepare())
    if not check:
        README.write_text(new)
        return 0
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "README.md", "as it should be", lineterm="")
    print("\n".join(lines) or "README.md is current")
    return int(old != new)


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
