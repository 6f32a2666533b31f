"""From file to file: the output appears complete and checked or not at all, and the input is never touched."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from tests import fake_files
from tests.fake_files import FakeDocument
from wnconvert.errors import InputError, NothingToDo, UsageError, VerificationError
from wnconvert.jobs import Job, convert_file, default_output
from wnconvert.report.model import OutputCheck
from wnconvert.sites import Selection
from wnconvert.watch import SILENT

pytestmark = pytest.mark.usefixtures("fake")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {"a.weight": torch.randn(4, 3, generator=generator), "a.bias": torch.zeros(4)}
    return fake_files.write(tmp_path / "model.fake", tensors | {"b.weight": torch.randn(2, 5, generator=generator)})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "command", "expected"),
    [
        ("model.pt", "apply", "model.wn.pt"),
        ("model.pt", "fold", "model.folded.pt"),
        ("generator.pth.tar", "fold", "generator.folded.pth.tar"),
        ("v1.0.onnx", "rename", "v1.0.renamed.onnx"),
        ("weights", "apply", "weights.wn"),
        ("g_02500000", "fold", "g_02500000.folded"),
    ],
)
def test_default_output(name: str, command: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    assert Path("x", expected) == default_output(Path("x", name), command)


def test_default_output_of_shards_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()

    for path in (tmp_path / "llama", tmp_path / "llama" / "model.safetensors.index.json"):
        assert default_output(path, "apply") == tmp_path / "llama.wn"


def test_apply_then_fold_gives_the_tensors_back(model: Path) -> None:
    split = convert_file(model, None, Job("apply"))
    folded = convert_file(model.with_name("model.wn.fake"), None, Job("fold"))

    assert (split.count("split"), split.weights_verified, split.tensors_verified) == (2, True, 3)
    assert {"model.wn.fake": model.with_name("model.wn.fake").stat().st_size} == split.files
    assert str(model.with_name("model.wn.folded.fake")) == folded.output
    before = fake_files.read(model, None).carrier.tensors
    after = fake_files.read(Path(folded.output), None).carrier.tensors
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_folder_as_output_gets_the_default_name(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    report = convert_file(model, tmp_path / "out", Job("apply"))

    assert str(tmp_path / "out" / "model.wn.fake") == report.output
    assert (tmp_path / "out" / "model.wn.fake").exists()


def test_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)

    report = convert_file(model, None, Job("apply", dry_run=True))

    assert (report.count("split"), report.output, report.files) == (2, None, {})
    assert before == contents(tmp_path)


@pytest.mark.parametrize("link", [None, "symlink_to", "hardlink_to"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_input_is_never_the_output(model: Path, tmp_path: Path, link: str | None, overwrite: bool) -> None:
    target = model
    if link:
        target = tmp_path / "same.fake"
        getattr(target, link)(model)
    before = contents(tmp_path)

    with pytest.raises(UsageError, match="would replace the input"):
        convert_file(model, target, Job("apply", overwrite=overwrite))

    assert before == contents(tmp_path)


def test_an_existing_output_needs_overwrite(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.fake").write_bytes(b"precious")

    with pytest.raises(UsageError, match="--overwrite"):
        convert_file(model, tmp_path / "out.fake", Job("apply"))

    assert (tmp_path / "out.fake").read_bytes() == b"precious"
    convert_file(model, tmp_path / "out.fake", Job("apply", overwrite=True))
    assert (tmp_path / "out.fake").read_bytes() != b"precious"


def test_a_file_beside_the_output_is_not_replaced_unasked(
    model: Path, tmp_path: Path, fake: type[FakeDocument]
) -> None:
    fake.companion = "data.bin"
    (tmp_path / "data.bin").write_bytes(b"precious")

    with pytest.raises(UsageError, match=r"data\.bin exists"):
        convert_file(model, None, Job("apply"))

    assert {"model.fake", "data.bin"} == set(contents(tmp_path))
    report = convert_file(model, None, Job("apply", overwrite=True))
    assert {"model.wn.fake", "data.bin"} == set(report.files)
    assert (tmp_path / "data.bin").read_bytes() == b"beside"


@pytest.mark.parametrize(
    ("path", "output", "error", "message"),
    [
        ("model.fake", "no/such/folder/out.fake", InputError, "no such folder"),
        ("model.fake", "out.other", UsageError, "format stays fake"),
        ("absent.fake", None, InputError, "no such file"),
        (".", None, InputError, "folder"),
    ],
)
def test_bad_paths(
    model: Path, tmp_path: Path, path: str, output: str | None, error: type[Exception], message: str
) -> None:
    before = contents(tmp_path)

    with pytest.raises(error, match=message):
        convert_file(tmp_path / path, output and tmp_path / output, Job("apply"))

    assert before == contents(tmp_path)


def test_an_unknown_command(model: Path) -> None:
    with pytest.raises(UsageError, match="no such command: squash"):
        convert_file(model, None, Job("squash"))


def test_nothing_to_do_says_what_was_found(model: Path) -> None:
    with pytest.raises(NothingToDo) as raised:
        convert_file(model, None, Job("fold"))
    assert raised.value.report is not None
    assert (str(model), "fake") == (raised.value.report.input, raised.value.report.format)

    with pytest.raises(NothingToDo, match="excluded") as raised:
        convert_file(model, None, Job("apply", selection=Selection(exclude=("*",))))
    assert raised.value.report is not None
    assert raised.value.report.count("skipped") == 2


def nudge(tensors: dict[str, torch.Tensor]) -> None:
    tensors["b.weight_v"] = torch.nextafter(tensors["b.weight_v"], torch.tensor(9.0))


def lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["a.bias"]


@pytest.mark.parametrize(("damage", "message"), [(nudge, "b.weight differs in"), (lose, "a.bias is on one side only")])
def test_a_wrong_result_is_not_written(
    model: Path, tmp_path: Path, fake: type[FakeDocument], damage: object, message: str
) -> None:
    fake.damage = damage
    before = contents(tmp_path)

    with pytest.raises(VerificationError, match=message):
        convert_file(model, None, Job("apply"))

    assert before == contents(tmp_path)
    report = convert_file(model, None, Job("apply", check=False))
    assert report.weights_verified is None
    assert (tmp_path / "model.wn.fake").exists()


def test_other_outputs_are_not_written(model: Path, tmp_path: Path, fake: type[FakeDocument]) -> None:
    fake.outputs = OutputCheck(False, 0.5, 1e-4)
    before = contents(tmp_path)

    with pytest.raises(VerificationError, match=r"outputs differ by 0\.5"):
        convert_file(model, None, Job("apply"))

    assert before == contents(tmp_path)


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_a_failure_while_writing_leaves_nothing(
    model: Path, tmp_path: Path, fake: type[FakeDocument], failure: BaseException
) -> None:
    fake.failure = failure
    before = contents(tmp_path)

    with pytest.raises((InputError, KeyboardInterrupt, MemoryError), match=r"No space left|^$"):
        convert_file(model, None, Job("apply"))

    assert before == contents(tmp_path)


def test_the_watcher_sees_every_stage_and_site(model: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.stages: list[str] = []
            self.items = 0

        def stage(self, label: str) -> None:
            self.stages.append(label)

        def each(self, items):
            for item in SILENT.each(items):
                self.items += 1
                yield item

    recorder = Recorder()
    convert_file(model, None, Job("apply"), recorder)

    assert recorder.stages == ["reading", "splitting", "writing", "checking weights", "checking outputs"]
    assert recorder.items == 2 + 3
