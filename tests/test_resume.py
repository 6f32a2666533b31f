"""Folders of shards: interrupted runs go on, several processes share the work, and nothing is ever half there."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wnconvert import jobs, ranks
from wnconvert.errors import InputError, UsageError
from wnconvert.files import streamed
from wnconvert.stream import fileio

ROOT = Path(__file__).parents[1]


def make(folder: Path, shards: int = 4, rows: int = 16) -> Path:
    """A folder with a zero row, and a weight with NaN in its second shard."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        tensors = {f"layers.{i}.{j}.proj.weight": torch.randn(rows, 64, generator=generator) for j in range(3)}
        if i == 1:
            tensors["layers.1.0.proj.weight"][2] = 0
            tensors["layers.1.2.proj.weight"][3, 4] = float("nan")
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make(tmp_path / "in")


@pytest.fixture
def expected(model: Path, tmp_path: Path) -> dict[str, bytes]:
    jobs.convert_file(model, tmp_path / "whole", jobs.Job("apply"))
    return contents(tmp_path / "whole")


def interrupt(model: Path, target: Path, monkeypatch: pytest.MonkeyPatch, after: int = 2) -> None:
    """Run until some shards are written, and then run out of space."""
    write, done = streamed.write, []

    def fail(output: streamed.Output, *rest: object) -> object:
        if len(done) == after:
            output.path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        done.append(output)
        return write(output, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(streamed, "write", fail)
        with pytest.raises(InputError, match=r"cannot be written \(No space left on device\); --resume goes on"):
            jobs.convert_file(model, target, jobs.Job("apply"))
    assert not target.exists()


def test_a_run_goes_on_at_the_first_unfinished_shard(
    model: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, written = tmp_path / "out", []
    interrupt(model, target, monkeypatch)
    write = streamed.write
    monkeypatch.setattr(
        streamed, "write", lambda output, *rest: (written.append(output.path.name), write(output, *rest))[1]
    )

    report = jobs.convert_file(model, target, jobs.Job("apply", resume=True))

    assert written == ["model-00003-of-00004.safetensors", "model-00004-of-00004.safetensors"]
    assert contents(target) == expected
    assert sum(row.zero_rows for row in report.rows) == 1
    assert [row.reason for row in report.rows if row.action == "skipped"] == ["row 3 holds NaN or infinity"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_finished_shard_that_changed_is_written_again(
    damage: object, model: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    interrupt(model, target, monkeypatch)
    shard = tmp_path / ".out.partial.wnconvert" / "out" / "model-00001-of-00004.safetensors"
    shard.write_bytes(damage(shard.read_bytes()))  # type: ignore[operator]

    jobs.convert_file(model, target, jobs.Job("apply", resume=True, check=False))

    assert contents(target) == expected


@pytest.mark.parametrize("change", ["options", "input"])
def test_another_job_does_not_go_on(
    change: str, model: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    interrupt(model, target, monkeypatch)
    if change == "input":
        os.utime(model / "model-00001-of-00004.safetensors", ns=(1, 1))
    names = "parametrized" if change == "options" else "legacy"

    with pytest.raises(InputError, match="begun with other options or another input; run again without --resume"):
        jobs.convert_file(model, target, jobs.Job("apply", names=names, resume=True))  # type: ignore[arg-type]

    assert not target.exists()
    jobs.convert_file(model, target, jobs.Job("apply"))
    assert contents(target) == expected


def test_resume_without_a_beginning_begins(model: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    jobs.convert_file(model, tmp_path / "out", jobs.Job("apply", resume=True))

    assert contents(tmp_path / "out") == expected


def test_resume_is_for_shards(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--resume is for folders of safetensors shards"):
        jobs.convert_file(
            model / "model-00001-of-00004.safetensors", tmp_path / "x.safetensors", jobs.Job("apply", resume=True)
        )


def test_an_input_that_vanishes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = fileio.create

    def vanish(path: Path, size: int) -> None:
        create(path, size)
        (model / path.name).unlink()

    monkeypatch.setattr(fileio, "create", vanish)

    with pytest.raises(InputError, match=r"model-00001-of-00004\.safetensors: cannot be read \(No such file"):
        jobs.convert_file(model, tmp_path / "out", jobs.Job("apply"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_truncated_shard(model: Path, tmp_path: Path) -> None:
    shard = model / "model-00003-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-9])

    with pytest.raises(InputError, match=r"model-00003-of-00004\.safetensors: damaged or cut short"):
        jobs.convert_file(model, tmp_path / "out", jobs.Job("apply"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_part_falls_to_one_rank(count: int) -> None:
    sizes = {f"s{i}": random.Random(i).randrange(1, 100) for i in range(20)}
    dealt = ranks.shares(sizes, count)

    assert sorted(name for share in dealt for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in dealt]
    assert max(loads) - min(loads) <= max(sizes.values())


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "wnconvert", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_two_ranks_write_the_same_bytes(model: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    process = torchrun("apply", str(model), "-o", str(tmp_path / "out"), "--json")
    out, err = process.communicate(timeout=120)

    assert process.returncode == 0, err
    assert contents(tmp_path / "out") == expected
    report = json.loads(out)
    assert report["counts"]["split"] == 11
    assert sum(row["zero_rows"] for row in report["sites"]) == 1


def _ranks_of(agent: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kill_9_of_a_rank_leaves_no_output_and_can_be_resumed(tmp_path: Path) -> None:
    model = make(tmp_path / "in", shards=12, rows=40_000)
    jobs.convert_file(model, tmp_path / "whole", jobs.Job("apply", check=False))
    expected = contents(tmp_path / "whole")
    choose, killed = random.Random(0), 0
    for _ in range(20):
        process = torchrun("apply", str(model), "-o", str(tmp_path / "out"), "--no-verify", "--overwrite")
        staged = tmp_path / ".out.partial.wnconvert"
        while process.poll() is None and not staged.exists():
            time.sleep(0.005)
        time.sleep(choose.random() * 0.8)
        victims = _ranks_of(process.pid)
        if len(victims) == 2:
            os.kill(victims[choose.randrange(2)], signal.SIGKILL)
        process.communicate(timeout=120)
        # Whoever is killed after the result got its name comes too late.
        if process.returncode and not (tmp_path / "out").exists():
            killed += 1
            again = torchrun("apply", str(model), "-o", str(tmp_path / "out"), "--no-verify", "--resume")
            _, err = again.communicate(timeout=120)
            assert again.returncode == 0, err
        assert contents(tmp_path / "out") == expected
        subprocess.run(["rm", "-r", str(tmp_path / "out")], check=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "whole"]
    assert killed > 10
