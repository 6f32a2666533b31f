"""Folders of several files, a contract for every such format: interrupted runs go on, and nothing is half there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.sharded import FORMATS, SHARDS, Sharded, contents, on_ranks
from wnconvert import errors, files, jobs
from wnconvert.errors import InputError, UsageError
from wnconvert.files import lock, parts
from wnconvert.files.finished import Finished
from wnconvert.files.written import Written
from wnconvert.jobs import Job

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=FORMATS, ids=lambda form: form.name)
def form(request: pytest.FixtureRequest) -> Sharded:
    return request.param


@pytest.fixture
def model(form: Sharded, tmp_path: Path) -> Path:
    return form.make(tmp_path / "in")


@pytest.fixture
def expected(model: Path, tmp_path: Path) -> dict[str, bytes]:
    jobs.convert_file(model, tmp_path / "whole", Job("apply"))
    return contents(tmp_path / "whole")


def interrupt(model: Path, target: Path, monkeypatch: pytest.MonkeyPatch, after: int = 2) -> None:
    """Run until some files are written, and then run out of space."""
    write, done = parts._write, []

    def fail(finished: Finished, name: str, part: parts.Part) -> Written:
        if len(done) == after:
            part.path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        done.append(name)
        return write(finished, name, part)

    with monkeypatch.context() as patched:
        patched.setattr(parts, "_write", fail)
        with pytest.raises(InputError, match=r"cannot be written \(No space left on device\); --resume goes on"):
            jobs.convert_file(model, target, Job("apply"))
    assert not target.exists()


def test_every_format_of_several_files_is_here() -> None:
    assert {form.format for form in FORMATS} == {row.name for row in files.FORMATS if row.folders}


def test_documents_can_be_shared_and_watched(model: Path) -> None:
    document = files.read(model)
    assert isinstance(document, files.Shared)
    assert isinstance(document, files.Watched)


def test_a_run_goes_on_at_the_first_unfinished_file(
    model: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, written, before = tmp_path / "out", [], contents(model)
    interrupt(model, target, monkeypatch)
    add = Finished.add
    monkeypatch.setattr(Finished, "add", lambda self, *given: (written.append(given[1]), add(self, *given))[1])

    report = jobs.convert_file(model, target, Job("apply", resume=True))

    assert len(written) == SHARDS - 2
    assert contents(target) == expected
    assert sum(row.zero_rows for row in report.rows) == 1
    assert [row.reason for row in report.rows if row.action == "skipped"] == ["row 3 holds NaN or infinity"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]
    assert contents(model) == before


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("command", ["fold", "rename"])
def test_the_other_verbs_go_on_too(
    command: str, after: int, model: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(command, names="parametrized")
    jobs.convert_file(tmp_path / "whole", tmp_path / "once", job)
    with monkeypatch.context() as patched:
        write, done = parts._write, []

        def fail(*given: object) -> Written:
            if len(done) == after:
                raise OSError(28, "No space left on device")
            done.append(given)
            return write(*given)  # type: ignore[arg-type]

        patched.setattr(parts, "_write", fail)
        with pytest.raises(InputError, match="No space left on device"):
            jobs.convert_file(tmp_path / "whole", tmp_path / "out", job)

    jobs.convert_file(tmp_path / "whole", tmp_path / "out", Job(command, names="parametrized", resume=True))

    assert contents(tmp_path / "out") == contents(tmp_path / "once")


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_finished_file_that_changed_is_written_again(
    damage: Callable[[bytes], bytes],
    form: Sharded,
    model: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "out"
    interrupt(model, target, monkeypatch)
    shard = form.files(tmp_path / ".out.partial.wnconvert" / "out")[0]
    shard.write_bytes(damage(shard.read_bytes()))

    jobs.convert_file(model, target, Job("apply", resume=True, check=False))

    assert contents(target) == expected


@pytest.mark.parametrize("note", ["", "{}", "[]", "null", "[1, 2, 3, 4, 5]", '["a", 1, 2, {"w": 3}, []]'])
def test_a_damaged_note_is_none(
    note: str, model: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(model, tmp_path / "out", monkeypatch)
    noted = list((tmp_path / ".out.partial.wnconvert" / ".finished").rglob("*.json"))
    for path in noted:
        path.write_text(note)

    jobs.convert_file(model, tmp_path / "out", Job("apply", resume=True))

    assert len(noted) == 2
    assert contents(tmp_path / "out") == expected


def test_what_the_input_does_not_have_does_not_get_into_the_output(
    model: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(model, tmp_path / "out", monkeypatch)
    staged = tmp_path / ".out.partial.wnconvert" / "out"
    for path in (staged / "gone.json", staged / "below" / "gone.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")

    jobs.convert_file(model, tmp_path / "out", Job("apply", resume=True))

    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_that_holds_the_input_is_not_replaced(
    linked: bool, form: Sharded, model: Path, tmp_path: Path
) -> None:
    outer = tmp_path / "in.wn"
    outer.mkdir()
    held = model.rename(outer / "in")
    source = held
    if linked:
        source = model
        source.mkdir()
        for path in held.iterdir():
            (source / path.name).symlink_to(path)
    before = contents(held)

    with pytest.raises(UsageError, match="would replace a folder that holds the input"):
        jobs.convert_file(source, tmp_path, Job("apply", overwrite=True))

    assert contents(held) == before
    assert form.files(held)


def test_a_folder_is_replaced_by_a_process_that_stands_in_it(
    model: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "in.wn"
    target.mkdir()
    (target / "old").write_text("old")
    monkeypatch.chdir(target)

    jobs.convert_file(Path("../in"), None, Job("apply", overwrite=True))

    assert contents(target) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "in.wn", "whole"]


def test_a_folder_does_not_replace_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    with pytest.raises(UsageError, match="file is a file, and the result a folder"):
        jobs.convert_file(model, tmp_path / "file", Job("apply", overwrite=True))

    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("change", ["options", "input"])
def test_another_job_does_not_go_on(
    change: str,
    form: Sharded,
    model: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "out"
    interrupt(model, target, monkeypatch)
    if change == "input":
        os.utime(form.files(model)[-1], ns=(1, 1))
    names = "parametrized" if change == "options" else "legacy"

    with pytest.raises(InputError, match="begun with other options or another input; run again without --resume"):
        jobs.convert_file(model, target, Job("apply", names=names, resume=True))  # type: ignore[arg-type]

    assert not target.exists()
    jobs.convert_file(model, target, Job("apply"))
    assert contents(target) == expected


def test_resume_without_a_beginning_begins(model: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    jobs.convert_file(model, tmp_path / "out", Job("apply", resume=True))

    assert contents(tmp_path / "out") == expected


def test_resume_is_for_several_files(tmp_path: Path) -> None:
    model = FORMATS[0].make(tmp_path / "in")
    with pytest.raises(UsageError, match="--resume is for folders of several files"):
        jobs.convert_file(FORMATS[0].files(model)[0], tmp_path / "x.safetensors", Job("apply", resume=True))


@pytest.mark.parametrize("error", [errors.PairError("p"), errors.VerificationError("v"), errors.NothingToDo("n")])
def test_what_would_fail_again_leaves_nothing(
    error: Exception, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object, **others: object) -> None:
        raise error

    monkeypatch.setattr(jobs, "_check", fail)

    with pytest.raises(type(error)):
        jobs.convert_file(model, tmp_path / "out", Job("apply"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("count", [1, 2])
def test_a_pair_that_cannot_be_multiplied_is_named_and_leaves_nothing(
    form: Sharded, count: int, tmp_path: Path
) -> None:
    shards = [
        {f"{i}.weight_g": torch.ones(form.rows, 1), f"{i}.weight_v": torch.ones(form.rows, 64)} for i in range(SHARDS)
    ]
    shards[2]["2.weight_v"][form.rows - 1] = 0
    (tmp_path / "in").mkdir()
    form.write(tmp_path / "in", shards)

    found = on_ranks(count, lambda crew: jobs.convert_file(tmp_path / "in", tmp_path / "out", Job("fold"), crew=crew))

    assert {type(error) for error in found} == {errors.PairError}
    assert re.search(r"/in: (model\.)?2\.weight(\[\d+:\d+\])?: row \d+ of v is zero but its g is not$", str(found[0]))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_input_that_vanishes_while_it_is_converted(
    form: Sharded, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Finished, "find", lambda self, path, name, mark: (model / name).unlink())

    with pytest.raises(InputError, match=r"cannot be read \(No such file") as raised:
        jobs.convert_file(model, tmp_path / "out", Job("apply"))
    assert str(form.files(tmp_path / "in")[0].parent) in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_input_that_vanishes_before_it_is_converted(
    form: Sharded, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = jobs._run

    def vanish(*given: object) -> object:
        report = run(*given)  # type: ignore[arg-type]
        form.files(model)[-1].unlink()
        return report

    monkeypatch.setattr(jobs, "_run", vanish)

    with pytest.raises(InputError, match=r"cannot be read \(No such file"):
        jobs.convert_file(model, tmp_path / "out", Job("apply"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def _truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "said"), [(_truncate, "damaged|cut short"), (Path.unlink, "missing, but .* names it")]
)
def test_a_damaged_file(damage: Callable[[Path], None], said: str, form: Sharded, model: Path, tmp_path: Path) -> None:
    shard = form.files(model)[2]
    damage(shard)

    with pytest.raises(InputError, match=said) as raised:
        jobs.convert_file(model, tmp_path / "out", Job("apply"))
    assert shard.name in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_full_disk(form: Sharded, model: Path, tmp_path: Path) -> None:
    before = contents(model)
    limit = max(path.stat().st_size for path in form.files(model)) - 500
    code = f"""
        import resource, signal, sys
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        from wnconvert.cli import main
        sys.exit(main(sys.argv[1:]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), "apply", str(model), "-o", str(tmp_path / "out")]

    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)

    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert "cannot be written (File too large)" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"in", ".out.partial.wnconvert"}
    assert contents(model) == before


def test_a_target_that_cannot_be_written_to(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def refuse(path: Path, *given: object, **others: object) -> None:
        if path.parent == tmp_path:
            raise OSError(30, "Read-only file system")
        mkdir(path, *given, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", refuse)

    with pytest.raises(InputError, match=r"cannot write here \(Read-only file system\)"):
        jobs.convert_file(model, tmp_path / "out", Job("apply"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_only_one_run_at_a_time(
    model: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(model, tmp_path / "out", monkeypatch)
    staged = tmp_path / ".out.partial.wnconvert"
    before = contents(staged)
    held = lock.take(staged, exclusive=True)
    assert held is not None

    for job in (Job("apply"), Job("apply", resume=True)):
        with pytest.raises(InputError, match=r"another run is writing it, in \.out\.partial\.wnconvert; wait until it"):
            jobs.convert_file(model, tmp_path / "out", job)
        assert contents(staged) == before
    held.release()
    jobs.convert_file(model, tmp_path / "out", Job("apply", resume=True))

    assert contents(tmp_path / "out") == expected
    assert not staged.exists()


def test_the_lock_of_a_killed_process_is_gone(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from wnconvert.files import lock
        held = lock.take(Path(sys.argv[1]), exclusive=False)
        print("held", flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "x")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert lock.take(tmp_path / "x", exclusive=True) is None
        together = lock.take(tmp_path / "x", exclusive=False)
        assert together is not None
        together.release()
        process.send_signal(signal.SIGKILL)

    assert lock.take(tmp_path / "x", exclusive=True) is not None
