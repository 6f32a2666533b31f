"""The command line. A verb is a file; each imports the library only when it runs, so that `--help` is quick."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import warnings
from collections.abc import Sequence
from types import FrameType

import click

from wnconvert import __version__, ranks
from wnconvert.cli.apply import apply
from wnconvert.cli.fold import fold
from wnconvert.cli.inspect import inspect
from wnconvert.cli.outcome import INTERRUPTED, json_of_error
from wnconvert.cli.rename import rename
from wnconvert.cli.verify import verify
from wnconvert.errors import InputError, Stopped
from wnconvert.ranks import Ranks


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="wnconvert %(version)s")
def group() -> None:
    """Split and fold weight normalization in trained networks, bit for bit.

    MODEL is a torch checkpoint (.pt .pth .bin .ckpt .tar), an exported program (.pt2), TorchScript (.jit
    .torchscript), .safetensors, .onnx, or a folder of shards or of torch.distributed.checkpoint. The input is never
    changed; every result is read back and checked before it appears under its name.

    \b
    Exit codes:
      0  done
      1  bad input, or a file that cannot be read or written
      2  wrong usage
      3  verification failed, nothing written
      4  nothing to do
    """


for verb in (inspect, apply, fold, rename, verify):
    group.add_command(verb)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the arguments without the program's name; those of this process if None.
    """
    # A library's warning is no use to the person at the terminal, unless they asked Python for warnings.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if hasattr(sys.stdout, "reconfigure"):
        # Names in a file may hold what the terminal's encoding cannot show.
        sys.stdout.reconfigure(errors="backslashreplace")
    _clean_up_when_told_to_stop()
    _let_many_files_be_open()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with ranks.joined() as crew:
            return _main(arguments, crew)
    except InputError as error:
        click.echo(f"wnconvert: {error}", err=True)
        return error.exit_code


def _main(arguments: list[str], crew: Ranks) -> int:
    with contextlib.ExitStack() as stack:
        if crew.rank:
            # Rank 0 prints, also what click does by itself.
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        try:
            return int(group.main(arguments, prog_name="wnconvert", standalone_mode=False, obj=crew) or 0)
        except click.ClickException as error:
            if crew.rank == 0:
                error.show()
                if "--json" in arguments:
                    click.echo(json_of_error(error.format_message(), error.exit_code))
            return error.exit_code
        except click.Abort:
            return INTERRUPTED


def _clean_up_when_told_to_stop() -> None:
    """Let a terminating signal unwind the stack, so that no staging folder stays behind."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(128 + number)

    with contextlib.suppress(ValueError):  # not the main thread: whoever called us there handles signals
        for name in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_DFL:
                signal.signal(getattr(signal, name), stop)


def _let_many_files_be_open() -> None:
    """A map of a file holds it open, and a checkpoint of hundreds of files needs more than the usual 1,024."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit; others may not let us
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
