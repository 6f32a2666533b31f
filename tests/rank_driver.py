"""Run several command lines one after the other in one group of processes: `rank_driver.py FOLDER COMMANDS_AS_JSON`.

What each process printed and returned goes to files `NUMBER.RANK.*` in the folder.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from wnconvert import cli, ranks

if __name__ == "__main__":
    with ranks.joined() as crew:
        for i, arguments in enumerate(json.loads(sys.argv[2])):
            stem = Path(sys.argv[1]) / f"{i}.{crew.rank}"
            with (
                stem.with_name(f"{stem.name}.out").open("w") as out,
                stem.with_name(f"{stem.name}.err").open("w") as err,
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                code = cli._main(arguments, crew)
            stem.with_name(f"{stem.name}.code").write_text(str(code))
