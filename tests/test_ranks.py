"""Several processes share the work on a folder of several files: the same bytes, said once, and none is waited for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.sharded import FORMATS, SHARDS, Sharded, contents, on_ranks
from wnconvert import compare, jobs, ranks
from wnconvert.errors import InputError, NothingToDo, PairError, RankDied, UsageError
from wnconvert.files import lock, parts
from wnconvert.files.staging import Staging
from wnconvert.jobs import Job

ROOT = Path(__file__).parents[1]
EVERY = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_part_falls_to_one_rank(count: int) -> None:
    sizes = {f"s{i}": random.Random(i).randrange(1, 100) for i in range(20)}
    dealt = ranks.shares(sizes, count)

    assert sorted(name for share in dealt for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in dealt]
    assert max(loads) - min(loads) <= max(sizes.values())


def test_empty_parts_are_dealt_out_too() -> None:
    assert [len(share) for share in ranks.shares(dict.fromkeys("abcdef", 0), 3)] == [2, 2, 2]


@EVERY
def test_three_ranks_write_the_same_bytes_and_each_its_own(
    form: Sharded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = form.make(tmp_path / "in")
    written: list[str] = []
    write = parts._write
    monkeypatch.setattr(parts, "_write", lambda *given: (written.append(given[1]), write(*given))[1])

    def both(command: str, source: Path, names: Any = "legacy") -> Path:
        job, one, three = Job(command, names=names), tmp_path / f"{command}.1", tmp_path / f"{command}.3"
        alone = jobs.convert_file(source, one, job)
        written.clear()
        together = on_ranks(3, lambda crew: jobs.convert_file(source, three, job, crew=crew))
        assert len(written) == len(set(written)) == SHARDS
        assert contents(three) == contents(one)
        for report in together:
            assert report == dataclasses.replace(alone, output=report.output, files=report.files)
        assert sum(together[0].files.values()) == sum(alone.files.values())
        return one

    both("fold", both("rename", both("apply", model), "parametrized"))
    assert len(list(tmp_path.iterdir())) == 7


@EVERY
def test_the_check_is_divided(form: Sharded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = form.make(tmp_path / "in")
    jobs.convert_file(model, tmp_path / "out", Job("apply"))
    compared: list[list[str]] = []
    each = compare._compare_each
    monkeypatch.setattr(compare, "_compare_each", lambda *given: (compared.append(list(given[0])), each(*given))[1])
    alone = compare.compare_files(model, tmp_path / "out")
    every = compared.pop()

    together = on_ranks(3, lambda crew: compare.compare_files(model, tmp_path / "out", crew=crew))

    assert all(verdict == alone for verdict in together)
    assert sorted(name for share in compared for name in share) == sorted(every)
    assert max(map(len, compared)) <= len(every) // 3 + 1


@EVERY
def test_a_difference_that_one_rank_finds_fails_all(form: Sharded, tmp_path: Path) -> None:
    model = form.make(tmp_path / "in")
    other = form.make(tmp_path / "other")
    shard = form.files(other)[-1]
    data = bytearray(shard.read_bytes())
    data[len(data) * 5 // 8] ^= 1
    shard.write_bytes(bytes(data))

    found = on_ranks(2, lambda crew: compare.compare_files(model, other, crew=crew))

    assert found[0] == found[1]
    assert len(found[0].weights.differing) == 1


@EVERY
def test_what_fails_on_one_rank_fails_on_all(form: Sharded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = form.make(tmp_path / "in")
    last = form.files(model)[-1].name
    write = parts._write

    def fail(finished: Any, name: str, part: parts.Part) -> Any:
        if name == last:
            raise OSError(28, "No space left on device")
        return write(finished, name, part)

    with monkeypatch.context() as patched:
        patched.setattr(parts, "_write", fail)
        found = on_ranks(2, lambda crew: jobs.convert_file(model, tmp_path / "out", Job("apply"), crew=crew))

    said = {str(error) for error in found}
    assert said == {
        f"{tmp_path / 'out'}: cannot be written (No space left on device); --resume goes on from what is done"
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial.wnconvert", "in"]
    jobs.convert_file(model, tmp_path / "whole", Job("apply"))
    on_ranks(2, lambda crew: jobs.convert_file(model, tmp_path / "out", Job("apply", resume=True), crew=crew))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@EVERY
def test_every_rank_holds_the_lock(form: Sharded, tmp_path: Path) -> None:
    staged = tmp_path / ".out.partial.wnconvert"

    def hold(crew: ranks.Ranks) -> Any:
        with Staging(tmp_path / "out", partial=True, crew=crew) as staging:
            crew.together(lambda: None)
            if crew.rank == 0 and staging._lock is not None:
                staging._lock.release()
            return crew.agreed(lambda: lock.take(staged, exclusive=True))

    assert on_ranks(2, hold) == [None, None]


def test_one_file_is_not_divided(tmp_path: Path) -> None:
    save_file({"a.proj.weight": torch.randn(16, 8)}, tmp_path / "in.safetensors")

    found = on_ranks(2, lambda crew: jobs.convert_file(tmp_path / "in.safetensors", None, Job("apply"), crew=crew))

    assert [type(error) for error in found] == [UsageError, UsageError]
    assert str(found[0]).endswith("one file is not divided among 2 processes; run it without torchrun")
    dry = on_ranks(
        2, lambda crew: jobs.convert_file(tmp_path / "in.safetensors", None, Job("apply", dry_run=True), crew=crew)
    )
    assert [report.count("split") for report in dry] == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_errors_travel_between_processes() -> None:
    import pickle

    for error in (InputError("a"), RankDied("b"), PairError("c"), NothingToDo("d", None), OSError(28, "e", "f")):
        back = pickle.loads(pickle.dumps(error))
        assert (type(back), str(back)) == (type(error), str(error))


def start(*program: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *program]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    return start("-m", "wnconvert", *arguments)


def test_every_verb_under_torchrun(tmp_path: Path) -> None:
    commands: list[tuple[int, list[str]]] = []
    single = str(tmp_path / "one.safetensors")
    save_file({"a.proj.weight": torch.randn(16, 8)}, single)
    commands += [(0, ["--help"]), (2, ["apply", "--nonsense"]), (2, ["apply", single]), (0, ["inspect", single])]
    commands += [(0, ["verify", single, single]), (0, ["apply", single, "--dry-run"]), (1, ["inspect", "none"])]
    for form in FORMATS:
        model, damaged = str(form.make(tmp_path / f"{form.name}.in")), form.make(tmp_path / f"{form.name}.bad")
        form.files(damaged)[1].unlink()
        out, back = str(tmp_path / f"{form.name}.out"), str(tmp_path / f"{form.name}.back")
        other = str(form.make(tmp_path / f"{form.name}.other", rows=form.rows + 1))
        commands += [
            (0, ["inspect", model]),
            (0, ["apply", model, "-o", out, "--dry-run"]),
            (0, ["apply", model, "-o", out, "--json"]),
            (2, ["apply", model, "--include", "nothing*"]),
            (0, ["verify", model, out]),
            (3, ["verify", other, out]),
            (0, ["fold", out, "-o", back, "--resume"]),
            (4, ["fold", back, "-o", str(tmp_path / "never"), "--json"]),
            (1, ["apply", str(damaged)]),
        ]
    (tmp_path / "said").mkdir()

    process = start(
        str(ROOT / "tests" / "rank_driver.py"), str(tmp_path / "said"), json.dumps([c for _, c in commands])
    )
    _, err = process.communicate(timeout=200)

    assert process.returncode == 0, err
    for i, (code, arguments) in enumerate(commands):
        said = {path.name.partition(".")[2]: path.read_text() for path in (tmp_path / "said").glob(f"{i}.*")}
        assert (said["0.code"], said["1.code"]) == (str(code), str(code)), (arguments, said)
        assert (said["1.out"], said["1.err"]) == ("", ""), arguments
        if "--json" in arguments:
            json.loads(said["0.out"])
        lines = said["0.err"].splitlines()
        if code in (1, 2, 4):
            assert len(lines) == 1 or arguments[1] == "--nonsense", arguments
    for form in FORMATS:
        whole, folded = tmp_path / f"{form.name}.whole", tmp_path / f"{form.name}.folded"
        jobs.convert_file(tmp_path / f"{form.name}.in", whole, Job("apply"))
        assert contents(tmp_path / f"{form.name}.out") == contents(whole)
        jobs.convert_file(whole, folded, Job("fold"))
        assert contents(tmp_path / f"{form.name}.back") == contents(folded)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def _processes_of(agent: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


@dataclasses.dataclass
class Kills:
    """How often what came of killing a process."""

    resumed: int = 0
    from_the_start: int = 0
    too_late: int = 0


class Killer:
    """Converts with two processes, kills one at a random moment, and goes on."""

    def __init__(self, form: Sharded, folder: Path, rows: int, seed: int) -> None:
        self.model, self.target = form.make(folder / "in", rows), folder / "out"
        self.staged = folder / ".out.partial.wnconvert"
        jobs.convert_file(self.model, folder / "whole", Job("apply", check=False))
        self.before, self.expected = _digests(self.model), _digests(folder / "whole")
        self.choose, self.tally = random.Random(seed), Kills()
        # How long there is something to disturb.
        process = self.begin()
        start = time.monotonic()
        while process.poll() is None and not self.target.exists():
            time.sleep(0.005)
        self.longest = time.monotonic() - start
        process.communicate(timeout=200)
        self.clear()

    def begin(self) -> subprocess.Popen[str]:
        process = torchrun("apply", str(self.model), "-o", str(self.target))
        while process.poll() is None and not self.staged.exists():
            time.sleep(0.005)
        return process

    def clear(self) -> None:
        assert _digests(self.model) == self.before
        assert _digests(self.target) == self.expected
        for folder in (self.target, self.staged):
            shutil.rmtree(folder, ignore_errors=True)

    def once(self) -> None:
        process = self.begin()
        time.sleep(self.choose.random() * self.longest)
        victims = _processes_of(process.pid)
        if len(victims) == 2:
            os.kill(victims[self.choose.randrange(2)], signal.SIGKILL)
        _, err = process.communicate(timeout=200)
        if self.target.exists():
            # It had its name already.
            self.tally.too_late += 1
        else:
            self.go_on(process.returncode, err)
        self.clear()

    def go_on(self, code: int, err: str) -> None:
        assert code != 0
        assert _digests(self.model) == self.before
        said = [line for line in err.splitlines() if line.startswith("wnconvert: ")]
        if list(self.staged.glob(".finished/*.json")):
            assert len(said) == 1 and said[0].endswith("; --resume goes on from what is done"), err
            self.tally.resumed += 1
        else:
            assert len(said) <= 1, err
            self.tally.from_the_start += 1
        again = torchrun("apply", str(self.model), "-o", str(self.target), "--resume")
        _, err = again.communicate(timeout=200)
        assert again.returncode == 0, err


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def kill_many(form: Sharded, folder: Path, times: int, *, rows: int = 100_000, seed: int = 0) -> Kills:
    killer = Killer(form, folder, rows, seed)
    for i in range(times):
        # Shown if it fails.
        print(f"seed {seed}, time {i}, within {killer.longest:.1f} s: {killer.tally}")  # noqa: T201
        killer.once()
    return killer.tally


_DIE_WHILE_THE_OTHER_WAITS = """
import os, signal, sys, time

# It may come before the other one is seen to have died. There is no other thread yet that it could reach.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

from wnconvert.cli import main
from wnconvert.files.finished import Finished
from wnconvert.files.staging import Staging

add, end = Finished.add, Staging.__exit__

def die(*given):
    add(*given)
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)

def linger(*given):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    time.sleep(1)
    end(*given)

if os.environ["RANK"] == "1":
    Finished.add = die
else:
    Staging.__exit__ = linger
sys.exit(main())
"""


def test_what_torchrun_sends_when_a_rank_dies_does_not_silence_the_other(tmp_path: Path) -> None:
    model, program = FORMATS[0].make(tmp_path / "in"), tmp_path / "program.py"
    program.write_text(_DIE_WHILE_THE_OTHER_WAITS)

    process = start(str(program), "apply", str(model), "-o", str(tmp_path / "out"))
    _, err = process.communicate(timeout=200)

    assert process.returncode != 0
    said = [line for line in err.splitlines() if line.startswith("wnconvert: ")]
    assert said == ["wnconvert: another process of this run died; --resume goes on from what is done"], err


@pytest.mark.slow
@pytest.mark.timeout(3000)
@EVERY
def test_kill_9_of_a_rank_leaves_no_output_and_can_be_resumed(form: Sharded, tmp_path: Path) -> None:
    tally = kill_many(form, tmp_path, 4)

    assert tally.resumed + tally.from_the_start > 0
