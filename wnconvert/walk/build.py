"""Build the network that `--arch` names, without its data. Nothing here imports torch before that."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wnconvert.errors import Stopped, UsageError

if TYPE_CHECKING:
    from torch import nn

Builder = Callable[[], Any]
"""Somebody's code that makes a network, or fails in any way."""

_FORMS = "package.module:callable, timm:NAME or transformers"


def builder_for(spec: str, path: Path) -> Builder:
    """Tell what makes the network, without running it.

    Args:
        spec: `package.module:callable` or `timm:NAME`, with arguments if any as in
            `timm:resnet50?num_classes=10&in_chans=1`, or `transformers`.
        path: the checkpoint, a file or a folder; `transformers` reads `config.json` beside or in it.

    Raises:
        UsageError: the request is of none of these forms.
    """
    if spec == "transformers":
        return lambda: _from_config(path if path.is_dir() else path.parent)
    request, _, options = spec.partition("?")
    source, colon, name = request.partition(":")
    if not colon or not source or not name:
        hint = "; transformers reads config.json and takes nothing else" if source == "transformers" else ""
        raise UsageError(f"--arch {spec}: must be {_FORMS}{hint}")
    arguments = _arguments(spec, options)
    if source == "timm":
        return lambda: _from_timm(name, arguments)
    return lambda: _from_callable(source, name, arguments)


def without_data(spec: str, build: Builder) -> nn.Module:
    """Build a network on the meta device.

    A constructor that computes with values is run again on the CPU, first with nothing but its parameters on the meta
    device, so that the network takes no memory, then as it is.

    Raises:
        UsageError: it cannot be built, or is no network.
    """
    import torch

    def on_meta_device() -> contextlib.AbstractContextManager[object]:
        return torch.device("meta")

    for context in (on_meta_device, _parameters_on_meta, contextlib.nullcontext):
        try:
            made = _built(build, context())
            break
        except UsageError as error:
            raise UsageError(f"--arch {spec}: {error}") from error
        except _BuildFailed as error:
            failure = error
    else:
        raise UsageError(f"--arch {spec}: cannot be built: {failure}") from failure
    if isinstance(made, torch.jit.ScriptModule):
        raise UsageError(f"--arch {spec}: gives a TorchScript module; name what makes the module it was scripted from")
    if not isinstance(made, torch.nn.Module):
        found = f"the class {made.__name__}" if isinstance(made, type) else f"a {type(made).__name__}"
        raise UsageError(f"--arch {spec}: gives {found}, not an nn.Module")
    return made


class _BuildFailed(Exception):
    """Somebody's constructor raised something; the message is that in one line."""


def _built(build: Builder, context: contextlib.AbstractContextManager[object]) -> Any:
    import torch

    try:
        # Whatever it prints must not get into the report.
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(sys.stderr), context:
            return build()
    except (UsageError, Stopped):
        raise
    except (Exception, SystemExit) as error:
        # It is somebody's code, which may raise anything at all.
        lines = str(error).strip().splitlines() or [""]
        raise _BuildFailed(f"{type(error).__name__}: {lines[0][:300]}".removesuffix(": ")) from error


def timm_options(module: nn.Module, misfit: Mapping[str, tuple[int, ...]]) -> str:
    """What would make the head and the stem of a timm network fit a checkpoint, as it is written after a name.

    Args:
        module: the network.
        misfit: shapes that the checkpoint has, by the network's names, where they are not those of the network.
    """
    described = getattr(module, "pretrained_cfg", None) or {}
    found = {}
    for option, key, axis in (("num_classes", "classifier", 0), ("in_chans", "first_conv", 1)):
        layers = described.get(key) or ()
        for layer in (layers,) if isinstance(layers, str) else layers:
            shape = misfit.get(f"{layer}.weight", ())
            if len(shape) > axis and shape[axis] != module.get_parameter(f"{layer}.weight").shape[axis]:
                found[option] = shape[axis]
    return "&".join(f"{option}={size}" for option, size in found.items())


def transformers_names(module: Any, keys: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Rename the keys of a checkpoint as the library itself does when it loads them.

    Args:
        module: a model of transformers.
        keys: names in the checkpoint.

    Returns:
        The name in the checkpoint by the name in the network, and the names in the network that several tensors of the
        checkpoint are merged or changed into.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return {}, set()  # before version 5, names in files are those of the network
    transforms = get_model_conversion_mapping(module)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamed: dict[str, str] = {}
    merged: set[str] = set()
    stored = module.state_dict()
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, module.base_model_prefix, stored)
        if pattern is None:
            renamed[name] = key
        else:
            merged.add(name)
    return renamed, merged


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Send every parameter to the meta device as soon as a module takes it; tied ones stay one."""
    from torch import nn
    from torch.nn.modules.module import register_module_parameter_registration_hook

    sent: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def send(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if type(parameter) is not nn.Parameter or parameter.is_meta:
            return parameter
        if id(parameter) not in sent:
            # The original is kept, or its id could go to another one.
            sent[id(parameter)] = parameter, nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        return sent[id(parameter)][1]

    # torch's annotation leaves out that a hook may give another parameter.
    handle = register_module_parameter_registration_hook(send)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _arguments(spec: str, options: str) -> dict[str, Any]:
    """Read `num_classes=10&act=relu` as keyword arguments. What is no Python literal is a string."""
    found: dict[str, Any] = {}
    for item in options.split("&") if options else ():
        name, equals, value = item.partition("=")
        if not name.isidentifier() or not equals:
            raise UsageError(f"--arch {spec}: {item!r} is not NAME=VALUE, as in '?num_classes=10&in_chans=1'")
        try:
            found[name] = ast.literal_eval(value.capitalize() if value in ("true", "false", "none") else value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found[name] = value
    return found


def _import(package: str) -> Any:
    """Import timm or transformers."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = error.name or package
        raise UsageError(f"needs the package {missing}, which is not installed: pip install {missing}") from error
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        # A compiled part of something it imports that was built for another torch; `torchvision::nms` is the usual one.
        raise UsageError(
            f"{package} cannot be imported here, as `python -c 'import {package}'` shows: {_first_line(error)}"
        ) from error


def _from_callable(source: str, name: str, arguments: Mapping[str, Any]) -> Any:
    try:
        found: Any = importlib.import_module(source)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"no module named {error.name}; run where `import {source}` works, e.g. PYTHONPATH=FOLDER"
        ) from error
    where = source
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(
                f"{where} has no {part}{_closest(part, vars(found) if hasattr(found, '__dict__') else ())}"
            )
        found, where = getattr(found, part), f"{where}.{part}"
    if not callable(found):
        raise UsageError(f"{name} cannot be called")
    _require_arguments(found, f"{source}:{name}", arguments)
    return found(**arguments)


def _require_arguments(function: Callable[..., Any], spec: str, arguments: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a builtin does not tell
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UsageError(
            f"{spec.partition(':')[2]}{signature} does not take these arguments ({error}); give them as "
            f"'{spec}?NAME=VALUE&NAME=VALUE', or name a function that needs none"
        ) from error


def _from_timm(name: str, arguments: Mapping[str, Any]) -> Any:
    timm = _import("timm")
    if ":" in name or "/" in name:
        raise UsageError(f"{name!r} is no name of a timm architecture, and nothing is downloaded: use the plain name")
    plain = name.partition(".")[0]
    if not timm.is_model(plain):
        raise UsageError(f"timm {timm.__version__} has no {plain}{_closest(plain, timm.list_models())}")
    return timm.create_model(name, pretrained=False, **arguments)


def _from_config(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"no config.json in {folder}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON: {_first_line(error)}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        timm = config.get("architecture") if isinstance(config, dict) else None
        classes = f"?num_classes={config['num_classes']}" if timm and "num_classes" in config else ""
        raise UsageError(
            f"{path} has no model_type" + (f"; it is one of timm: --arch 'timm:{timm}{classes}'" * bool(timm))
        )
    transformers = _import("transformers")
    remote = "its code comes with the checkpoint and is not run: import it yourself and name package.module:callable"
    try:
        parsed = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise UsageError(f"{path}: {remote if 'auto_map' in config else _first_line(error)}") from error
    named = config.get("architectures")
    if not named:
        return transformers.AutoModel.from_config(parsed, trust_remote_code=False)
    name = named[0] if isinstance(named, list) else named
    model = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(model, type) or not issubclass(model, transformers.PreTrainedModel):
        why = remote if "auto_map" in config else "set its architectures to a model class that it has"
        raise UsageError(f"{path}: transformers {transformers.__version__} has no model {name!r}; {why}")
    return model(parsed)


def _closest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 3, 0.5)
    return f"; the closest {'is' if len(close) == 1 else 'are'} {', '.join(close)}" if close else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
