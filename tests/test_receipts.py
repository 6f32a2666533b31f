"""A check after a conversion reads what was computed back by its checksum, and still finds every damage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor

from tests.sharded import FORMATS, on_ranks
from tests.test_stream_engine import store
from wnconvert import files, jobs, weightnorm
from wnconvert.errors import VerificationError
from wnconvert.files import parts
from wnconvert.files.raw import Raw, Scattered
from wnconvert.jobs import Job
from wnconvert.stream import batches, engine, fileio
from wnconvert.stream.plan import Checksum, Compare, Fold, Pair, Place, Split, Stored, Task
from wnconvert.stream.receipts import Receipts

ROWS = 2 * batches.SMALL // 64


def plain(rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{i}.proj.weight": torch.randn(rows, 64, generator=generator) for i in range(3)}


def trained(rows: int = ROWS) -> dict[str, Tensor]:
    made = {}
    for name, w in plain(rows).items():
        made[f"{name}_g"], made[f"{name}_v"] = weightnorm.split(w, 0)
        made[f"{name}_g"] = made[f"{name}_g"] * 1.5
    return made


def write_onnx(tensors: dict[str, Tensor], path: Path) -> None:
    """A chain of Gemms whose weights are in a data file."""
    weights = [numpy_helper.from_array(w.numpy(), name) for name, w in tensors.items()]
    nodes, last = [], "x"
    for i, weight in enumerate(weights):
        nodes.append(helper.make_node("Gemm", [last, weight.name], [f"h{i}"], transB=i % 2))
        last = f"h{i}"
    sizes = [64, ROWS]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", sizes[k]]) for name, k in (("x", 0), (last, 1))
    ]
    for weight in weights[::2]:
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).T.copy(), weight.name))
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to write some tensors."""

    name: str
    write: Callable[[dict[str, Tensor], Path], object]
    rows: int = ROWS
    whole: bool = True


def _sharded(row: Any) -> Callable[[dict[str, Tensor], Path], object]:
    def write(tensors: dict[str, Tensor], path: Path) -> None:
        path.mkdir()
        names = list(tensors)
        first = len(names) // 3
        row.write(path, [{name: tensors[name] for name in part} for part in (names[:first], names[first:])])

    return write


FORMS = (
    Form("model.safetensors", save_file),
    Form("model.pt", torch.save),
    *(Form(row.name, _sharded(row), max(ROWS, row.rows), row.whole) for row in FORMATS),
)
WITH_RECEIPTS = [form for form in FORMS if form.whole]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """The tasks that checks give to the engine."""
    seen: list[Task] = []
    run = engine.run

    def spy(tasks: Sequence[Task], *given: Any, **named: Any) -> Any:
        seen.extend(task for task in tasks if isinstance(task, Compare) or _of_a_tensor(task))
        return run(tasks, *given, **named)

    monkeypatch.setattr(engine, "run", spy)
    return seen


def _of_a_tensor(task: Task) -> bool:
    """Whether it is a checksum of less than a file, which those of finished shards are."""
    return isinstance(task, Checksum) and task.source.size < task.source.path.stat().st_size


@pytest.mark.parametrize("form", WITH_RECEIPTS, ids=lambda form: form.name)
@pytest.mark.parametrize(("command", "tensors", "each"), [("apply", plain, 2), ("fold", trained, 1)])
def test_what_was_computed_is_read_back_and_not_computed_again(
    form: Form, command: str, tensors: Any, each: int, tmp_path: Path, checked: list[Task]
) -> None:
    form.write(tensors(form.rows), tmp_path / form.name)

    report = jobs.convert_file(tmp_path / form.name, tmp_path / f"out-{form.name}", Job(command))

    assert report.weights_verified
    assert report.tensors_verified == 3
    assert [type(task) for task in checked] == [Checksum] * 3 * each


@pytest.mark.parametrize("form", WITH_RECEIPTS[2:], ids=lambda form: form.name)
def test_ranks_know_what_the_others_computed(form: Form, tmp_path: Path, checked: list[Task]) -> None:
    form.write(trained(form.rows), tmp_path / "in")

    found = on_ranks(2, lambda crew: jobs.convert_file(tmp_path / "in", tmp_path / "out", Job("fold"), crew=crew))

    assert all(report.weights_verified for report in found)
    assert [type(task) for task in checked] == [Checksum] * 3


def test_resumed_files_are_compared(tmp_path: Path, checked: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMS[2]
    form.write(trained(form.rows), tmp_path / "in")
    with monkeypatch.context() as patched:
        patched.setattr(jobs, "_check", _no_space)
        with pytest.raises(jobs.InputError, match="--resume"):
            jobs.convert_file(tmp_path / "in", tmp_path / "out", Job("fold"))

    report = jobs.convert_file(tmp_path / "in", tmp_path / "out", Job("fold", resume=True))

    assert report.weights_verified
    assert [type(task) for task in checked] == [Compare] * 3


@pytest.mark.parametrize("form", WITH_RECEIPTS[2:], ids=lambda form: form.name)
def test_only_what_is_resumed_is_compared(
    form: Form, tmp_path: Path, checked: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    form.write(trained(form.rows), tmp_path / "in")
    write, done = parts._write, []

    def fail(*given: Any) -> Any:
        if done:
            raise OSError(28, "No space left on device")
        done.append(given)
        return write(*given)

    with monkeypatch.context() as patched:
        patched.setattr(parts, "_write", fail)
        with pytest.raises(jobs.InputError, match="--resume"):
            jobs.convert_file(tmp_path / "in", tmp_path / "out", Job("fold"))

    assert jobs.convert_file(tmp_path / "in", tmp_path / "out", Job("fold", resume=True)).weights_verified
    kinds = [type(task) for task in checked]
    assert kinds.count(Checksum)
    assert kinds.count(Compare)
    assert len(kinds) == 3


def _no_space(*given: Any, **named: Any) -> None:
    raise OSError(28, "No space left on device")


def test_folded_onnx_data_is_read_back(tmp_path: Path, checked: list[Task]) -> None:
    (tmp_path / "a").mkdir()
    write_onnx(plain(), tmp_path / "m.onnx")
    jobs.convert_file(tmp_path / "m.onnx", tmp_path / "a" / "m.onnx", Job("apply"))
    model = onnx.load(tmp_path / "a" / "m.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and not tensor.external_data:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1.5, tensor.name))
    onnx.save(model, tmp_path / "a" / "m.onnx")
    checked.clear()

    (tmp_path / "b").mkdir()
    report = jobs.convert_file(tmp_path / "a" / "m.onnx", tmp_path / "b" / "m.onnx", Job("fold"))

    assert report.weights_verified
    assert [type(task) for task in checked].count(Checksum) == 3


def second(path: Path) -> Any:
    """Where the second weight lies."""
    weights = files.read(path).carrier.effective()
    return next(found.source() for name, found in weights.items() if name.endswith("layers.1.proj.weight"))


def _flip(raw: Any) -> None:
    """Change a bit of a tensor."""
    first = raw.parts[0][1] if isinstance(raw, Scattered) else raw
    content = bytearray(first.path.read_bytes())
    content[first.start + first.size // 3] ^= 64
    first.path.write_bytes(content)


@pytest.mark.parametrize("half", ["g", "v"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize(("command", "tensors"), [("apply", plain), ("fold", trained)])
def test_a_damaged_byte_is_found(
    form: Form, command: str, tensors: Any, half: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form.write(tensors(form.rows), tmp_path / form.name)
    check = jobs._check

    def damage(path: Path, result: Path, *given: Any, **named: Any) -> None:
        made = second(result)
        _flip((made if isinstance(made, Stored) else getattr(made, half)).raw)
        check(path, result, *given, **named)

    monkeypatch.setattr(jobs, "_check", damage)
    with pytest.raises(VerificationError, match=r"layers\.1\.proj\.weight differs in [1-9]"):
        jobs.convert_file(tmp_path / form.name, tmp_path / f"out-{form.name}", Job(command))
    assert [path.name for path in tmp_path.iterdir()] == [form.name]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_an_input_that_changes_meanwhile_is_found(form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / form.name
    form.write(trained(form.rows), source)
    check = jobs._check

    def train(path: Path, *given: Any, **named: Any) -> None:
        _flip(second(source).v.raw)
        check(path, *given, **named)

    monkeypatch.setattr(jobs, "_check", train)
    with pytest.raises(VerificationError, match=r"layers\.1\.proj\.weight differs in [1-9]"):
        jobs.convert_file(source, tmp_path / f"out-{form.name}", Job("fold"))


@pytest.mark.parametrize("form", WITH_RECEIPTS, ids=lambda form: form.name)
def test_a_file_that_is_written_twice_has_the_receipts_of_the_second_time(
    form: Form, tmp_path: Path, checked: list[Task]
) -> None:
    tensors = plain(form.rows)
    tensors["layers.1.proj.weight"][3, 4] = float("nan")
    form.write(tensors, tmp_path / form.name)

    report = jobs.convert_file(tmp_path / form.name, tmp_path / f"out-{form.name}", Job("apply"))

    assert report.weights_verified
    assert (report.count("split"), report.count("skipped")) == (2, 1)
    kinds = [type(task) for task in checked]
    assert (kinds.count(Checksum), kinds.count(Compare)) == (4, 1)


def test_magnitudes_of_one_direction_are_each_proven(tmp_path: Path, checked: list[Task]) -> None:
    g, v = weightnorm.split(torch.randn(ROWS, 64), 0)
    torch.save({"a.weight_g": g * 2, "a.weight_v": v, "b.weight_g": g * 3, "b.weight_v": v}, tmp_path / "m.pt")

    report = jobs.convert_file(tmp_path / "m.pt", tmp_path / "out.pt", Job("fold"))

    assert report.weights_verified
    assert report.tensors_verified == 2
    folded = torch.load(tmp_path / "out.pt")
    assert not torch.equal(folded["a.weight"], folded["b.weight"])
    assert [type(task) for task in checked] == [Checksum] * 2


def run(folder: Path, tasks: Sequence[Task], size: int) -> Receipts:
    fileio.create(folder / "out", size)
    return Receipts(tasks).taken(engine.run(tasks))


def test_a_receipt_proves_only_what_it_is_for(tmp_path: Path) -> None:
    w = torch.randn(256, 256)
    g, v = weightnorm.split(w, 0)
    weight, out = store(tmp_path / "w", w), tmp_path / "out"
    pair = Pair("w", store(tmp_path / "g", g * 2), store(tmp_path / "v", v))
    split = Split("w", weight, 0, 1, "float32", Place(out, 0), Place(out, g.nbytes))
    folded_to = Place(out, g.nbytes + v.nbytes)
    receipts = run(tmp_path, [split, Fold(pair, folded_to)], g.nbytes + 2 * v.nbytes)
    made = Pair("w", Stored(Raw(out, 0, g.nbytes), "float32", (256, 1)), Stored(Raw(out, g.nbytes, v.nbytes), *form(w)))
    folded = Stored(Raw(out, folded_to.start, v.nbytes), *form(w))

    assert len(receipts.proof(weight, made) or ()) == 2
    assert len(receipts.proof(pair, folded) or ()) == 1

    other = store(tmp_path / "other", w)
    short = dataclasses.replace(folded, raw=Raw(out, folded_to.start, v.nbytes - 4))
    for before, after in [
        (other, made),
        (weight, folded),
        (pair, made),
        (weight, dataclasses.replace(made, g=dataclasses.replace(made.g, shape=(1, 256)))),
        (weight, dataclasses.replace(made, g=dataclasses.replace(made.g, dtype="int32"))),
        (weight, dataclasses.replace(made, v=dataclasses.replace(made.v, dtype="int32"))),
        (pair, dataclasses.replace(folded, shape=(128, 512))),
        (weight, Pair("w", made.v, made.v)),
        (weight, Pair("w", folded, made.v)),
        (pair, made.v),
        (pair, short),
        (dataclasses.replace(pair, v=other), folded),
        (dataclasses.replace(pair, g=made.g), folded),
    ]:
        assert receipts.proof(before, after) is None


def form(w: Tensor) -> tuple[str, tuple[int, ...]]:
    return str(w.dtype).removeprefix("torch."), tuple(w.shape)


def test_a_split_that_changed_a_row_is_compared(tmp_path: Path) -> None:
    w = torch.randn(256, 256)
    w[7] = 0
    weight, out = store(tmp_path / "w", w), tmp_path / "out"
    split = Split("w", weight, 0, 1, "float32", Place(out, 0), Place(out, 1024))
    receipts = run(tmp_path, [split], 1024 + w.nbytes)
    made = Pair("w", Stored(Raw(out, 0, 1024), "float32", (256, 1)), Stored(Raw(out, 1024, w.nbytes), *form(w)))

    assert receipts.proof(weight, made) is None
