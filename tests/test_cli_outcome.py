"""What each outcome of a verb prints, on which stream, with which exit code."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import fake_files
from tests.fake_files import FakeDocument
from wnconvert import cli
from wnconvert.cli import main
from wnconvert.report.model import OutputCheck

pytestmark = pytest.mark.usefixtures("fake")

SITE_KEYS = {
    *("name", "kind", "shape", "dtype", "axis", "groups", "g_shape", "state", "scheme", "action", "reason", "tied"),
    *("uses", "evidence", "zero_rows", "scaled_rows", "magnitude"),
}
REPORT_KEYS = {
    *("tool", "version", "command", "input", "output", "format", "walker", "walker_note", "sites", "counts"),
    *("files", "verified", "notes"),
}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    shapes = {"layer.weight": (4, 3), "layer.bias": (4,), "embed.weight": (7, 3)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    fake_files.write(tmp_path / "model.fake", tensors)
    return Path("model.fake")


@pytest.fixture
def split(model: Path) -> Path:
    assert main(["apply", str(model), "-q", "-o", "split.fake"]) == 0
    return Path("split.fake")


def test_done(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", str(model)]) == 0

    out, err = capsys.readouterr()
    assert err == ""
    assert "1 of 2 split" in out
    assert "identical bits in 3 tensors" in out
    assert "model.wn.fake" in out


@pytest.mark.parametrize("verb", ["apply", "fold", "rename", "inspect"])
def test_json_has_one_shape_for_every_verb(model: Path, split: Path, verb: str, capsys) -> None:
    file = model if verb == "apply" else split
    extra = ["--to", "parametrized"] if verb == "rename" else []
    capsys.readouterr()

    assert main([verb, str(file), "--json", *extra]) == 0

    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == ""
    assert set(report) == REPORT_KEYS
    assert all(set(site) == SITE_KEYS for site in report["sites"])
    assert sum(report["counts"].values()) == len(report["sites"])
    assert all((site["action"] == "skipped") == (site["reason"] is not None) for site in report["sites"])
    assert (report["command"], report["input"], report["format"]) == (verb, str(file), "fake")
    assert report["verified"]["weights"] is (None if verb == "inspect" else True)


def test_json_is_valid_for_infinite_magnitudes(split: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()

    assert main(["inspect", str(split), "--json"]) == 0

    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    (site,) = (site for site in report["sites"] if site["state"] == "split")
    assert site["magnitude"] == {"minimum": -1.5, "median": 0.25, "maximum": None, "negative": 2, "zero": 1}


def test_quiet(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", str(model), "-q"]) == 0
    assert main(["inspect", str(model), "-q"]) == 0
    assert main(["fold", "model.wn.fake", "-q"]) == 0
    assert main(["verify", str(model), "model.wn.fake", "-q"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["fold", "absent.fake"], 1, "absent.fake: no such file"),
        (["inspect", "absent.fake"], 1, "absent.fake: no such file"),
        (["verify", "model.fake", "absent.fake"], 1, "absent.fake: no such file"),
        (["inspect", "."], 1, "folder"),
        (["inspect", "text.txt"], 1, "not a model file of a known format"),
        (["apply", "model.fake", "-o", "no/where.fake"], 1, "no such folder"),
        (["apply", "model.fake", "--include", "nothing.*"], 2, "--include 'nothing.*' matches no weight"),
        (["apply", "model.fake", "--kind", "Conv*"], 2, "kinds found: Embedding, Linear"),
        (["inspect", "model.fake", "--exclude", "x"], 2, "--exclude 'x' matches no weight"),
        (["apply", "model.fake", "-o", "model.fake"], 2, "would replace the input"),
        (["fold", "model.fake"], 4, "nothing to fold"),
        (["rename", "model.fake", "--to", "legacy"], 4, "nothing to rename"),
        (["apply", "model.fake", "--exclude", "layer.*"], 4, "model.fake: no weight to split (an embedding"),
        (["inspect", "model.fake", "--include", "layer.*", "--exclude", "*"], 4, "the patterns leave no weight"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_errors_are_one_line(model: Path, arguments: list[str], code: int, message: str, as_json: bool, capsys) -> None:
    Path("text.txt").write_text("hello")
    before = sorted(Path().iterdir())

    assert main([*arguments, *(["--json"] if as_json else [])]) == code

    out, err = capsys.readouterr()
    assert err.startswith("wnconvert: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(Path().iterdir()) == before
    if as_json:
        data = json.loads(out)
        assert (data["error"], data["exit_code"]) == (err.removeprefix("wnconvert: ").rstrip("\n"), code)
        assert (data["tool"], data["command"]) == ("wnconvert", arguments[0])
    elif code != 4:
        assert out == ""


def test_nothing_to_do_still_reports(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", str(model), "--exclude", "layer.*", "--json"]) == 4

    report = json.loads(capsys.readouterr().out)
    assert set(report) == REPORT_KEYS | {"error", "exit_code"}
    assert {site["name"]: site["reason"] for site in report["sites"]}["layer.weight"] == "excluded"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["squash"],
        ["fold"],
        ["fold", "model.fake", "--nonsense"],
        ["apply", "model.fake", "--dim", "some"],
        ["apply", "model.fake", "--names", "x"],
        ["rename", "model.fake"],
    ],
)
def test_wrong_usage(model: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert "Usage: wnconvert" in err


@pytest.mark.parametrize("arguments", [["fold"], ["apply", "model.fake", "--dim", "some"], ["squash"]])
def test_wrong_usage_in_json(model: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--json"]) == 2

    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert (shown["tool"], shown["exit_code"]) == ("wnconvert", 2)
    assert shown["error"] in err


def test_a_pipe_is_no_model_file(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe.fake")

    assert main(["inspect", "pipe.fake"]) == 1
    assert "not a regular file" in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [False, True])
def test_failed_verification(model: Path, as_json: bool, fake: type[FakeDocument], capsys) -> None:
    fake.outputs = OutputCheck(False, 0.25, 1e-4)

    assert main(["apply", str(model), *(["--json"] if as_json else [])]) == 3

    out, err = capsys.readouterr()
    assert "outputs differ by 0.25" in err
    assert [path.name for path in Path().iterdir()] == ["model.fake"]
    assert (json.loads(out)["exit_code"] == 3) if as_json else (out == "")


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "model.fake"), 1, "model.fake: Permission denied"),
        (OSError("odd"), 1, "odd"),
        (MemoryError(), 1, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."), 1, "not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_from_outside(model: Path, error, code: int, message: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr("tests.fake_files.read", raising(error))

    assert main(["apply", str(model)]) == code
    assert capsys.readouterr() == ("", f"wnconvert: {message}\n")


def test_a_mistake_of_ours_is_not_hidden(model: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("tests.fake_files.read", raising(RuntimeError("a bug")))

    with pytest.raises(RuntimeError, match="a bug"):
        main(["apply", str(model), "--json"])
    assert capsys.readouterr().out == ""


def test_what_a_file_prints_stays_off_standard_output(model: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    read = fake_files.read

    def noisy(path: Path, options: object) -> FakeDocument:
        sys.stdout.write("unpickled code says hello")
        return read(path, options)

    monkeypatch.setattr("tests.fake_files.read", noisy)

    assert main(["inspect", str(model), "--json"]) == 0

    out, err = capsys.readouterr()
    json.loads(out)
    assert "hello" in err


def test_names_from_a_file_cannot_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "layer\x1b[2J\n[bold red].weight\u202e"
    file = fake_files.write(tmp_path / "x.fake", {evil: torch.ones(2, 2), f"embed{evil}": torch.ones(2, 2)})

    assert main(["inspect", str(file)]) == 0
    assert main(["apply", str(file), "-v"]) == 0
    assert main(["inspect", str(tmp_path / "no\x1b[2J\nsuch")]) == 1

    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "\u202e" not in out
    assert r"layer\x1b[2J\n[bold red].weight\u202e" in out
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "meant"), [("torch", "torch"), ("out", "out"), ("none", None), ("0", 0), ("1", 1), ("-1", -1)]
)
def test_dim_reaches_the_library(model: Path, given: str, meant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    sites = fake_files.FakeCarrier.sites
    monkeypatch.setattr(fake_files.FakeCarrier, "sites", lambda self, dim: seen.append(dim) or sites(self, dim))

    assert main(["inspect", str(model), "--dim", given, "-q"]) == 0
    assert seen[-1] == meant


def test_options_reach_the_reader(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    read = fake_files.read
    monkeypatch.setattr("tests.fake_files.read", lambda path, options: seen.append(options) or read(path, options))

    assert main(["inspect", str(split), "-q", "--unsafe-load", "--arch", "timm:resnet18"]) == 0
    assert main(["fold", str(split), "-q", "--optimizer", "drop"]) == 0

    assert (seen[0].unsafe_load, seen[0].arch, seen[0].drop_optimizer) == (True, "timm:resnet18", False)
    assert all((o.unsafe_load, o.arch, o.drop_optimizer) == (False, None, True) for o in seen[1:])


def test_names_and_rename(model: Path) -> None:
    assert main(["apply", str(model), "-q", "--names", "parametrized", "-o", "p.fake"]) == 0
    assert main(["rename", "p.fake", "-q", "--to", "legacy", "-o", "l.fake"]) == 0
    assert main(["rename", "p.fake", "-q", "--to", "parametrized"]) == 4

    keys = {file: set(fake_files.read(Path(file), None).carrier.tensors) for file in ("p.fake", "l.fake")}
    assert {"layer.parametrizations.weight.original0", "layer.parametrizations.weight.original1"} < keys["p.fake"]
    assert {"layer.weight_g", "layer.weight_v"} < keys["l.fake"]


def test_every_verb_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.group.commands:
        assert main([name, "--help"]) == 0
        assert f"  wnconvert {name} " in capsys.readouterr().out
