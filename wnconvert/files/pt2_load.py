"""Load an exported program without running code from its file, and say why where that cannot be done."""

from __future__ import annotations

import ast
import io
import json
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._export.verifier import SpecViolationError
from torch.export import ExportedProgram

from wnconvert.errors import InputError
from wnconvert.files import sniff
from wnconvert.files.torch_load import DAMAGE, first_line

# What torch raises on an archive that is not what it claims to be.
_DAMAGE = (*DAMAGE, SpecViolationError, SyntaxError)

_OLD = "serialized_exported_program.json"
"""The program in an archive of torch 2.7 and before."""


def is_program(path: Path) -> bool:
    """Whether a file is an archive with an exported program in it, also an old or a compiled one."""
    names = sniff.archive_entries(path) or {}
    return "archive_format" in names or "models/model.json" in names or _OLD in names


def load(path: Path, *, unsafe: bool) -> tuple[ExportedProgram, dict[str, str]]:
    """Load an exported program, and the texts that were saved with it.

    Args:
        path: an archive.
        unsafe: unpickle anything, which can run code, if the file holds more than tensors and plain data.

    Raises:
        InputError: it is damaged, holds a compiled model or several programs, or cannot be loaded without running code
            and `unsafe` is not set.
    """
    names = sniff.archive_entries(path) or {}
    _require_one_program(path, names)
    # torch fills in every text that there is, but takes an empty mapping for none.
    extra: dict[str, Any] = {"": None}
    with told_by_torch() as told, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reason = None if unsafe else _runs_code(path, names)
            if reason is None:
                with path.open("rb") as file:
                    # torch goes by the suffix unless it is given an open file.
                    program = torch.export.load(file, extra_files=extra)
                return program, {name: str(text) for name, text in extra.items() if name}
        except _DAMAGE as error:
            cause = told[-1] if told else error
            raise InputError(
                f"{path}: not a program that torch {torch.__version__} can load: {_said(cause)}"
            ) from error
    raise InputError(f"{path}: {reason}; loading it can run code: --unsafe-load loads it")


def _require_one_program(path: Path, names: dict[str, str]) -> None:
    if any(name.startswith("data/aotinductor/") for name in names):
        raise InputError(f"{path}: holds a model compiled by AOTInductor: convert the program that it was made from")
    models = [name for name in names if name.startswith("models/")]
    if _OLD not in names and models != ["models/model.json"]:
        found = ", ".join(Path(name).stem for name in models[:5]) or "none"
        raise InputError(f"{path}: needs one program called model, as torch.export.save writes it; found {found}")


def _runs_code(path: Path, names: dict[str, str]) -> str | None:
    """What in an archive would run code when it is loaded, or None."""
    with zipfile.ZipFile(path) as archive:
        for name, full in names.items():
            if name.endswith("_config.json"):
                held = json.loads(archive.read(full)).get("config", {})
                pickled = next((key for key, payload in held.items() if payload.get("use_pickle")), None)
                if pickled is not None:
                    return f"{pickled} is a pickled Python object"
            elif name.endswith(".pt") and not _is_plain(archive.read(full)):
                return f"{name} holds a pickled Python object"
            elif name in ("models/model.json", _OLD):
                for text in _expressions(json.loads(archive.read(full))):
                    if not _is_formula(text):
                        return f"a shape in it is no formula ({text[:40]!r})"
    return None


def _is_plain(data: bytes) -> bool:
    if not data:
        return True
    try:
        torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:
        return False
    return True


def _expressions(value: Any) -> Iterator[str]:
    """Every text that torch evaluates as a formula of sympy."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if key == "expr_str":
            yield str(item)
        elif isinstance(item, (dict, list)):
            yield from _expressions(item)


def _is_formula(text: str) -> bool:
    """Whether a text calls nothing but classes, on numbers and names: `Max(Integer(1), Symbol('s0', integer=True))`."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except SyntaxError:
        return False
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return (
        all(isinstance(node, _FORMULA) for node in nodes)
        and all(isinstance(called, ast.Name) and (called.id[0].isupper() or called.id in _ROUNDING) for called in calls)
        and all(re.fullmatch(r"[\w.+-]*", value) for value in texts)
    )


_ROUNDING = ("floor", "ceiling")

_FORMULA = (
    ast.Expression,
    ast.Call,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.keyword,
    ast.UnaryOp,
    ast.BinOp,
    ast.Compare,
    ast.BoolOp,
    ast.operator,
    ast.unaryop,
    ast.cmpop,
    ast.boolop,
)


@contextmanager
def told_by_torch() -> Iterator[list[BaseException]]:
    """Collect the errors that torch logs, with their tracebacks, before it raises one that refers to the log."""
    told: list[BaseException] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1] is not None:
                told.append(record.exc_info[1])

    logger, collector = logging.getLogger("torch.export"), Collector()
    # It has a handler of its own, tells nothing of use, and one of its messages is not even well formed.
    other = logging.getLogger("torch._export.serde.serialize")
    before = logger.propagate, logger.handlers, other.disabled
    logger.propagate, logger.handlers, other.disabled = False, [collector], True
    try:
        yield told
    finally:
        logger.propagate, logger.handlers, other.disabled = before


def _said(error: BaseException) -> str:
    line = first_line(error)
    return line if isinstance(error, RuntimeError) else f"{type(error).__name__}: {line}"
