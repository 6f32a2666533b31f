"""The command line as a process of its own: what it imports, how it starts, how it dies."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.sharded import FORMATS, Sharded

HEAVY = ("torch", "onnx", "onnxruntime", "onnx_ir", "transformers", "numpy", "ml_dtypes", "rich")


def start(*arguments: str | Path, **settings: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "wnconvert", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=settings.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        **settings,
    )


def run(*arguments: str | Path, **settings: object) -> tuple[int, str, str]:
    process = start(*arguments, **settings)
    out, err = process.communicate(timeout=120)
    return process.returncode, (out or b"").decode(), err.decode()


def make(path: Path, megabytes: float = 0.01) -> Path:
    rows = max(1, int(megabytes * 2**20 / 4 / 256))
    weights = {f"layers.{i}.weight": torch.randn(rows // 4 + 1, 256) for i in range(4)}
    safetensors.torch.save_file(weights, path)
    return path


@pytest.mark.parametrize(
    ("arguments", "light"),
    [
        (["--help"], HEAVY),
        (["--version"], HEAVY),
        (["inspect", "--help"], HEAVY),
        (["apply", "--help"], HEAVY),
        (["fold", "--help"], HEAVY),
        (["rename", "--help"], HEAVY),
        (["verify", "--help"], HEAVY),
        (["nonsense"], HEAVY),
        (["inspect", "FILE", "--json"], HEAVY),
        (["inspect", "FILE", "-v"], HEAVY[:-1]),
        # Its magnitudes are described with numpy.
        (["inspect", "SPLIT", "--json"], HEAVY[:-3]),
    ],
)
def test_heavy_libraries_stay_out(arguments: list[str], light: tuple[str, ...], tmp_path: Path) -> None:
    file = make(tmp_path / "model.safetensors")
    split = tmp_path / "split.safetensors"
    safetensors.torch.save_file({"a.weight_g": torch.ones(4, 1), "a.weight_v": torch.randn(4, 3)}, split)
    files = {"FILE": str(file), "SPLIT": str(split)}
    arguments = [files.get(word, word) for word in arguments]
    code = (
        "import sys; from wnconvert.cli import main; main(sys.argv[1:]); "
        "print([m for m in sys.modules if '.' not in m], file=sys.stderr)"
    )

    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)

    loaded = result.stderr.strip().splitlines()[-1]
    assert "'click'" in loaded
    assert [name for name in light if f"'{name}'" in loaded] == []


def test_what_inspect_is_made_of_imports_without_torch() -> None:
    code = "import sys, wnconvert.files, wnconvert.inspection, wnconvert.report.table; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_is_quick() -> None:
    def seconds() -> float:
        process = start("--help", stdout=subprocess.DEVNULL)
        # Processor time: the machine may be busy with something else.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return usage.ru_utime + usage.ru_stime

    assert min(seconds() for _ in range(3)) < 0.3


def test_version() -> None:
    from wnconvert import __version__

    assert run("--version") == (0, f"wnconvert {__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["--json"], ["--include", "nothing"]])
def test_a_closed_pipe_ends_quietly(arguments: list[str], tmp_path: Path) -> None:
    process = start("inspect", make(tmp_path / "model.safetensors"), *arguments)
    process.stdout.close()

    assert process.wait(timeout=120) == (2 if "nothing" in arguments else 141)
    assert b"Traceback" not in process.stderr.read()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        code, _, err = run("inspect", make(tmp_path / "model.safetensors"), stdout=full)

    assert (code, err) == (1, "wnconvert: cannot write to standard output: No space left on device\n")


def test_a_full_disk_behind_the_output(tmp_path: Path) -> None:
    import resource

    file = make(tmp_path / "model.safetensors", 4)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    code, out, err = run("apply", file, "--kind", "*", preexec_fn=limit)

    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "cannot be written" in err
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_more_files_than_may_be_open_at_first(form: Sharded, tmp_path: Path) -> None:
    import resource

    (tmp_path / "in").mkdir()
    form.write(tmp_path / "in", [{f"layers.{i}.weight": torch.randn(form.rows, 64)} for i in range(48)])

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (48, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    assert run("apply", tmp_path / "in", "--kind", "*", "-q", "-o", tmp_path / "out", preexec_fn=limit) == (0, "", "")
    assert len(form.files(tmp_path / "out")) == 48


def test_plain_text_without_a_terminal(tmp_path: Path) -> None:
    code, out, err = run("apply", make(tmp_path / "model.safetensors"), "--kind", "*")

    assert (code, err) == (0, "")
    assert out.isascii()
    assert "\x1b" not in out


def test_an_ascii_terminal_shows_any_name(tmp_path: Path) -> None:
    safetensors.torch.save_file({"слой.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}

    code, out, err = run("inspect", tmp_path / "model.safetensors", env=ascii_only)

    assert (code, err) == (0, "")
    assert r"\u0441\u043b\u043e\u0439.weight" in out


WAITING_TO_COMMIT = """
import signal, sys, time

# A shell that starts the tests in the background has these ignored in everything below it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

from wnconvert.cli import main
from wnconvert.files.staging import Staging

def commit(self):
    sys.stderr.write("staged\\n")
    sys.stderr.flush()
    time.sleep(60)

Staging.commit = commit
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    file = make(tmp_path / "model.safetensors")
    words = [sys.executable, "-c", WAITING_TO_COMMIT, "apply", str(file), "--kind", "*"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr.readline() == b"staged\n"
    assert any(tmp_path.glob(".model*/*"))
    process.send_signal(number)
    out, err = process.communicate(timeout=60)

    assert process.returncode == 128 + number
    assert (out, err) == (b"", b"wnconvert: interrupted\n" if number == signal.SIGINT else b"")
    assert list(tmp_path.iterdir()) == [file]


SLOW_TO_BUILD = """
import sys, time

def network():
    sys.stderr.write("building\\n")
    sys.stderr.flush()
    time.sleep(60)
"""


def test_a_signal_ends_the_building_of_a_network(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW_TO_BUILD)
    file = make(tmp_path / "model.safetensors")
    words = [sys.executable, "-m", "wnconvert", "apply", str(file), "--arch", "slow:network"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stderr.readline() == b"building\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)

    assert (process.returncode, out, err) == (128 + signal.SIGTERM, b"", b"")


@pytest.mark.parametrize(
    ("verb", "times"),
    [("fold", 4), *(pytest.param(v, 30, marks=pytest.mark.slow) for v in ("apply", "fold", "rename"))],
)
def test_kill_9_leaves_no_output_and_the_input_whole(verb: str, times: int, tmp_path: Path) -> None:
    rng = random.Random(verb)
    file = make(tmp_path / "model.safetensors", 8)
    if verb != "apply":
        assert run("apply", file, "--kind", "*", "-q", "-o", tmp_path / "split.safetensors")[0] == 0
        file = tmp_path / "split.safetensors"
    digest = hashlib.sha256(file.read_bytes()).digest()
    output = tmp_path / "out.safetensors"
    arguments = [verb, file, "--kind", "*", "-q", "-o", output, *(["--to", "parametrized"] if verb == "rename" else [])]
    began = time.monotonic()
    assert run(*arguments)[0] == 0
    whole, whole_bytes = time.monotonic() - began, output.read_bytes()
    output.unlink()

    staged = 0
    for turn in range(times):
        process = start(*arguments)
        if turn % 2:
            time.sleep(rng.uniform(0.3, 1.0) * whole)
        else:
            # As soon as it has begun to write, which is a short part of the time.
            while process.poll() is None and not any(tmp_path.glob(".out*")):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.1) if turn else 0)
        process.kill()
        process.communicate()
        staged += any(tmp_path.glob(".out*"))

        assert hashlib.sha256(file.read_bytes()).digest() == digest
        if output.exists():
            assert output.read_bytes() == whole_bytes
            output.unlink()
        for left in tmp_path.glob(".out*"):
            for path in left.iterdir():
                path.unlink()
            left.rmdir()

    assert staged, "no run was killed while it wrote"


def test_json_on_standard_output_is_all_there_is(tmp_path: Path) -> None:
    code, out, err = run("apply", make(tmp_path / "model.safetensors"), "--kind", "*", "--json", "-v")

    assert (code, err) == (0, "")
    assert json.loads(out)["counts"]["split"] == 4
