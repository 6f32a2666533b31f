"""The options that verbs share, and what they become in the library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from wnconvert.files import ReadOptions
from wnconvert.sites import SCHEMES, Dim, Selection

Verb = TypeVar("Verb", bound=Callable[..., Any])


class DimType(click.ParamType):  # type: ignore[type-arg]
    """`torch`, `out`, `none` or a number."""

    name = "dim"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Turn the text into a `Dim`; `none` becomes a marker, since click takes None for an option not given."""
        if value in ("torch", "out", "none"):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is not torch, out, none or a number.", param, ctx)


def file_argument(name: str, metavar: str) -> Callable[[Verb], Verb]:
    """An input file. Whether it can be read is found out when it is opened, so that this is an input error."""
    return click.argument(name, metavar=metavar, type=click.Path(readable=False, path_type=Path))


def selecting(verb: Verb) -> Verb:
    """`--include`, `--exclude`, `--kind`."""
    for decorate in (
        click.option("--kind", "kinds", multiple=True, metavar="GLOB", help="Only weights of such a kind: 'Conv*'."),
        click.option("--exclude", multiple=True, metavar="GLOB", help="Leave out weights with such a name."),
        click.option("--include", multiple=True, metavar="GLOB", help="Only weights with such a name: 'encoder.*'."),
    ):
        verb = decorate(verb)
    return verb


def writing(verb: Verb) -> Verb:
    """What the verbs that make a file have in common."""
    for decorate in (
        click.option("--no-verify", is_flag=True, help="Do not read the result back and compare."),
        click.option(
            "--optimizer",
            type=click.Choice(["keep", "drop"]),
            default="keep",
            show_default=True,
            help="Optimizer state in a training checkpoint; it does not match the new parameters.",
        ),
        click.option("--single-file", is_flag=True, help="Take the data files of an ONNX model into it (up to 2 GB)."),
        click.option("--resume", is_flag=True, help="Go on from the shards that an interrupted run has finished."),
        click.option("--overwrite", is_flag=True, help="Replace an existing output."),
        click.option("--dry-run", is_flag=True, help="Say what would be done, write nothing."),
        click.option(
            "-o",
            "--output",
            type=click.Path(readable=False, path_type=Path),
            help="Result file or folder. Default: beside MODEL, as in model.wn.pt, model.folded.pt.",
        ),
    ):
        verb = decorate(verb)
    return verb


def arch(verb: Verb) -> Verb:
    """`--arch`."""
    return click.option(
        "--arch",
        metavar="MODEL",
        help="Build the module that the checkpoint belongs to, instead of telling kinds by names: "
        "package.module:callable, timm:NAME (both with arguments: 'timm:resnet50?num_classes=10') or transformers. "
        "Runs that code.",
    )(verb)


def dim(verb: Verb) -> Verb:
    """`--dim`."""
    return click.option(
        "--dim",
        type=DimType(),
        default="torch",
        show_default=True,
        metavar="[torch|out|none|INT]",
        help="Axis that keeps a magnitude: as in torch.nn.utils, output units, none (one in all), or a number.",
    )(verb)


def names(flag: str, **settings: Any) -> Callable[[Verb], Verb]:
    """`--names` of `apply`, which has a default, and `--to` of `rename`, which has none."""
    return click.option(
        flag,
        "names",
        type=click.Choice(SCHEMES),
        help="Names of the pair: weight_g and weight_v, or parametrizations.weight.original0 and original1.",
        **settings,
    )


def reporting(verb: Verb) -> Verb:
    """What every verb has: how to read, and how to report."""
    for decorate in (
        click.option("-v", "--verbose", is_flag=True, help="Every weight, and what tells its kind."),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors (and the JSON report)."),
        click.option("--json", "as_json", is_flag=True, help="JSON report on standard output, all else on stderr."),
        click.option("--unsafe-load", is_flag=True, help="Unpickle whole modules. This can run code from the file."),
    ):
        verb = decorate(verb)
    return verb


def selection(given: dict[str, Any]) -> Selection:
    """The patterns among the parsed options."""
    return Selection(given["include"], given["exclude"], given["kinds"])


def read_options(given: dict[str, Any]) -> ReadOptions:
    """How to read, from the parsed options."""
    return ReadOptions(
        given["unsafe_load"], given.get("arch"), given.get("optimizer") == "drop", given.get("single_file", False)
    )


def dim_of(value: Any) -> Dim:
    """The axis choice behind a parsed `--dim`."""
    return None if value == "none" else value
