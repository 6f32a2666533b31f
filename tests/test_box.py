"""Tensors that are stored in parts, against torch's own slices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wnconvert.files.box import Box, overlap
from wnconvert.files.raw import Raw, Scattered
from wnconvert.stream import engine, shares, work
from wnconvert.stream.fileio import Files, create
from wnconvert.stream.plan import Kept, PartPlace, Place, Split, Stored
from wnconvert.stream.workspace import Workspace


@st.composite
def cut_tensors(draw: Any) -> tuple[Tensor, list[Box]]:
    """A tensor of numbers, and boxes that have each of its elements once, in a grid or not."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    axes = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    edges = [list(itertools.pairwise(ends)) or [(0, 0)] for ends in axes]
    boxes = [
        Box(shape, tuple(low for low, _ in edge), tuple(high - low for low, high in edge))
        for edge in itertools.product(*edges)
    ]
    for _ in range(draw(st.integers(0, 3)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        first = draw(st.integers(0, box.sizes[axis]))
        for offset, size in ((0, first), (first, box.sizes[axis] - first)):
            boxes.append(Box(shape, _with(box.offsets, axis, box.offsets[axis] + offset), _with(box.sizes, axis, size)))
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape), draw(st.permutations(boxes))


def _with(numbers: tuple[int, ...], axis: int, number: int) -> tuple[int, ...]:
    return (*numbers[:axis], number, *numbers[axis + 1 :])


@st.composite
def boxes_anywhere(draw: Any) -> list[Box]:
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    ranges = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for _ in range(6) for n in shape]
    each = [ranges[i * len(shape) : (i + 1) * len(shape)] for i in range(draw(st.integers(0, 6)))]
    return [Box(shape, tuple(low for low, _ in own), tuple(high - low for low, high in own)) for own in each]


@given(st.one_of(boxes_anywhere(), cut_tensors().map(lambda cut: cut[1])))
def test_boxes_overlap_where_an_element_is_in_two(boxes: list[Box]) -> None:
    counts = torch.zeros(boxes[0].shape if boxes else (), dtype=torch.int32)
    for box in boxes:
        part_of(counts, box).add_(1)
    assert overlap(boxes) == bool((counts > 1).any())


def part_of(tensor: Tensor, box: Box) -> Tensor:
    for axis, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        tensor = tensor.narrow(axis, offset, size)
    return tensor


@pytest.fixture(params=[0, 64], ids=["each element by its index", "runs"], autouse=True, scope="module")
def few(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shares, "_FEW", request.param)
        yield


@given(cut_tensors(), st.data())
def test_shares_are_what_a_slice_has(cut: tuple[Tensor, list[Box]], data: Any) -> None:
    tensor, boxes = cut
    start = data.draw(st.integers(0, tensor.numel()))
    stop = data.draw(st.integers(start, tensor.numel()))
    seen = []
    for box in boxes:
        own = shares.share(box, start, stop)
        if own is None:
            continue
        values, stretch = part_of(tensor, box).reshape(-1), tensor.reshape(-1)[start:stop]
        found = [stretch[place] for place in own.places]
        found = torch.cat(found) if isinstance(own.places, list) else torch.stack(found)
        assert own.length > 0
        assert torch.equal(values[own.first : own.first + own.length], found)
        seen += found.tolist()
    assert sorted(seen) == list(range(start, stop))


@given(cut_tensors(), st.data())
def test_any_elements_of_a_tensor_in_parts_can_be_read(
    tmp_path_factory: Any, cut: tuple[Tensor, list[Box]], data: Any
) -> None:
    tensor, boxes = cut
    path = tmp_path_factory.mktemp("parts") / "data"
    parts = []
    with path.open("wb") as file:
        for box in boxes:
            file.write(b"between")
            content = part_of(tensor, box).contiguous().numpy().tobytes()
            parts.append((box, Raw(path, file.tell(), len(content))))
            file.write(content)
    stored = Scattered(tuple(parts), 4, tensor.nbytes)
    start = 4 * data.draw(st.integers(0, tensor.numel()))
    size = 4 * data.draw(st.integers(0, tensor.numel() - start // 4))
    with Files() as files:
        found = Workspace(files).read_bytes("v", stored, start, size)
        whole = Workspace(files).read("v", Stored(stored, "int32", tuple(tensor.shape)), 0, tuple(tensor.shape))
        assert torch.equal(whole, tensor)
    assert found.numpy().tobytes() == tensor.numpy().tobytes()[start : start + size]


@given(cut_tensors(), st.integers(1, 7))
def test_of_what_is_written_only_the_part_is_kept(
    tmp_path_factory: Any, cut: tuple[Tensor, list[Box]], step: int
) -> None:
    tensor, boxes = cut
    path: Path = tmp_path_factory.mktemp("parts") / "data"
    kept = Kept(bytearray(tensor.nbytes))
    for box in boxes:
        expected = b"\0" * 5 + part_of(tensor, box).contiguous().numpy().tobytes() + b"\0" * 3
        create(path, len(expected))
        with Files() as files:
            space = Workspace(files)
            for first in range(0, tensor.numel(), step):
                values = tensor.reshape(-1)[first : first + step].clone()
                space.write(PartPlace(Place(path, 5), box), first, values)
                space.write(kept, first, values)
        assert path.read_bytes() == expected
    assert kept.data == tensor.numpy().tobytes()


@pytest.mark.parametrize("axis", [0, 1])
def test_progress_ends_at_the_whole(axis: int, tmp_path: Path) -> None:
    weight = torch.randn(9000, 512)
    weight.numpy().tofile(tmp_path / "in")
    offsets, sizes = ((6000, 0), (3000, 512)) if axis == 0 else ((0, 100), (9000, 10))
    part = PartPlace(Place(tmp_path / "out", 0), Box((9000, 512), offsets, sizes))
    create(tmp_path / "out", 4 * sizes[0] * sizes[1])
    stored = Stored(Raw(tmp_path / "in", 0, weight.nbytes), "float32", (9000, 512))
    tasks = [Split("w", stored, 0, 1, "float32", None, part)]

    results = engine.run(tasks)

    pieces = list(work.units(tasks[0]))
    assert engine.size(tasks) == sum(size for size, _ in pieces)
    assert (engine.size(tasks) < weight.nbytes) == (axis == 0)
    assert len(results[0]) == len(pieces)
    assert torch.equal(
        torch.from_file(str(tmp_path / "out"), size=sizes[0] * sizes[1]), part_of(weight, part.box).reshape(-1)
    )
