"""The output appears whole under its name, or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from tests.checkpoints import FORMATS, state
from wnconvert import jobs
from wnconvert.errors import InputError, UsageError
from wnconvert.files.staging import Staging


def test_nothing_appears_without_commit(tmp_path: Path) -> None:
    with Staging(tmp_path / "out.pt") as staging:
        (staging.folder / "out.pt").write_text("half")

    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_by_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with Staging(tmp_path / "out.pt") as staging:
            (staging.folder / "out.pt").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_target_moves_last_with_its_companions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: (moved.append(Path(to).name), replace(path, to))[1])

    with Staging(tmp_path / "a.onnx") as staging:
        for name in ("z.data", "a.onnx", "0.data"):
            (staging.folder / name).write_text(name)
        staging.commit()

    assert moved[-1] == "a.onnx"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.data", "a.onnx", "z.data"]


def test_a_folder_moves_as_a_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale").write_text("")

    with Staging(tmp_path / "out") as staging:
        (staging.folder / "out" / "deep").mkdir(parents=True)
        (staging.folder / "out" / "deep" / "file").write_text("new")
        sizes = staging.sizes()
        staging.commit()

    assert sizes == {"out/deep/file": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "out",
        "out/deep",
        "out/deep/file",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)

    with pytest.raises(InputError, match="cannot write here"), Staging(tmp_path / "out.pt"):
        pass


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "in.pt")

    with pytest.raises(InputError, match="no such folder to write to"):
        jobs.convert_file(tmp_path / "in.pt", tmp_path / "none" / "out.pt", jobs.Job("apply"))


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    pairs = []
    for form in FORMATS:
        pairs += [tmp_path / f"{form.name}-{form.file}", tmp_path / f"{form.name}-out{Path(form.file).suffix}"]
        form.write(pairs[-2], state())
    code = """
        import resource, sys, signal
        from pathlib import Path
        from wnconvert import jobs, errors
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        for source, target in zip(sys.argv[1::2], sys.argv[2::2]):
            try:
                jobs.convert_file(Path(source), Path(target), jobs.Job("apply"))
            except errors.InputError as error:
                print(str(error))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, pairs)]

    result = subprocess.run(command, capture_output=True, text=True, check=False)

    lines = result.stdout.splitlines()
    assert len(lines) == len(FORMATS), result.stderr
    assert all("cannot be written" in line for line in lines)
    assert sorted(tmp_path.iterdir()) == sorted(pairs[::2])


@pytest.mark.parametrize("form", [FORMATS[0], FORMATS[4], FORMATS[5]], ids=lambda form: form.name)
def test_a_killed_process_leaves_no_output(form: object, tmp_path: Path) -> None:
    source, target = tmp_path / form.file, tmp_path / f"out{Path(form.file).suffix}"  # type: ignore[attr-defined]
    form.write(source, state())  # type: ignore[attr-defined]
    before = {path: path.read_bytes() for path in [source, *source.rglob("*")] if path.is_file()}
    # Stops for good when everything is staged and the first file is about to move.
    code = """
        import sys, time
        from pathlib import Path
        from wnconvert import jobs
        from wnconvert.files import staging
        def wait(path):
            print("staged", flush=True)
            time.sleep(60)
        staging._flush = wait
        jobs.convert_file(Path(sys.argv[1]), Path(sys.argv[2]), jobs.Job("apply"))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(source), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "staged\n"
        process.send_signal(signal.SIGKILL)

    assert not target.exists()
    left = [path for path in tmp_path.iterdir() if path != source]
    assert all(path.name.startswith(".out") and path.name.endswith(".wnconvert") for path in left)
    assert {path: path.read_bytes() for path in before} == before
    jobs.convert_file(source, target, jobs.Job("apply"))
    assert target.exists()


def test_the_output_may_not_be_the_input(tmp_path: Path) -> None:
    for form in FORMATS:
        source = tmp_path / form.file
        form.write(source, state())
        job = jobs.Job("apply", overwrite=True)
        link = tmp_path / f"link{Path(form.file).suffix}"
        link.symlink_to(source)

        with pytest.raises(UsageError, match="the output would"):
            jobs.convert_file(source, source if source.is_file() else source.parent / source.name / ".", job)
        if source.is_file():
            with pytest.raises(UsageError, match="would replace the input"):
                jobs.convert_file(source, link, job)
        link.unlink()


def test_files_get_ordinary_permissions(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "in.pt")
    FORMATS[-1].write(tmp_path / "shards", state())

    jobs.convert_file(tmp_path / "in.pt", None, jobs.Job("apply"))
    jobs.convert_file(tmp_path / "shards", None, jobs.Job("apply"))

    assert (tmp_path / "in.wn.pt").stat().st_mode == (tmp_path / "in.pt").stat().st_mode
    assert (tmp_path / "shards.wn").stat().st_mode == (tmp_path / "shards").stat().st_mode
    assert time.time() - (tmp_path / "in.wn.pt").stat().st_mtime < 60
