"""The engine gives the bits of `weightnorm` on whole tensors, however a tensor is cut."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference import same_bits
from wnconvert import sums, weightnorm
from wnconvert.errors import InputError, NotSplittable, PairError
from wnconvert.files.entries import Raw
from wnconvert.files.raw import Inline
from wnconvert.stream import engine, fileio, pieces, slabs
from wnconvert.stream.plan import Compare, Copy, Fold, Pair, Place, Put, Split, Stored
from wnconvert.stream.work import Mismatch, SplitPart

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}


def store(path: Path, tensor: Tensor) -> Stored:
    """Write a tensor into a file of its own, not at its start."""
    path.write_bytes(b"xyz" + data(tensor))
    return Stored(Raw(path, 3, tensor.nbytes), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def data(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def load(path: Path, like: Tensor, start: int = 0) -> Tensor:
    raw = path.read_bytes()[start : start + like.nbytes]
    return torch.frombuffer(bytearray(raw), dtype=like.dtype).reshape(like.shape) if raw else torch.empty_like(like)


def split(folder: Path, w: Tensor, axis: Any, groups: int = 1) -> tuple[Tensor, Tensor, list[Any]]:
    """Split through files, and check against the whole tensor."""
    g, v = weightnorm.split(w, axis, groups=groups, name="a.weight")
    stored = store(folder / "w", w)
    fileio.create(folder / "out", g.nbytes + v.nbytes)
    task = Split(
        "a.weight", stored, axis, groups, stored.dtype, Place(folder / "out", 0), Place(folder / "out", g.nbytes)
    )
    found = engine.run([task])
    assert same_bits(load(folder / "out", g), g)
    assert same_bits(load(folder / "out", v, g.nbytes), v)
    (folder / "out").unlink()
    return g, v, found.get(0, [])


def fold(folder: Path, g: Tensor, v: Tensor) -> None:
    """Fold through files, and check against the whole tensor."""
    w = weightnorm.fold(g, v, name="a.weight")
    pair = Pair("a.weight", store(folder / "g", g), store(folder / "v", v))
    fileio.create(folder / "out", w.nbytes + 5)
    engine.run([Fold(pair, Place(folder / "out", 5))])
    assert same_bits(load(folder / "out", w, 5), w)
    (folder / "out").unlink()
    plain = store(folder / "w", w)
    assert engine.run([Compare("a.weight", pair, plain), Compare("a.weight", plain, pair)]) == {}


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Any, int]:
    # About a thousand elements at most: single ones are worked on, one after the other.
    few, many = (st.lists(st.integers(1, top), min_size=1, max_size=axes) for top, axes in ((9, 3), (4, 5)))
    shape = tuple(draw(st.one_of(few, many)))
    groups = draw(st.sampled_from([n for n in range(1, shape[0] + 1) if shape[0] % n == 0]))
    rank = len(shape) + (groups > 1)
    axis = draw(st.one_of(st.none(), st.lists(st.integers(0, rank - 1), unique=True).map(tuple)))
    if groups > 1:
        axis = tuple({0, *(axis or ())})
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    w *= 10.0 ** draw(st.sampled_from([-3, 0, 0, 0, 2]))
    for _ in range(draw(st.integers(0, 3))):
        i = draw(st.integers(0, len(shape) - 1))
        index = (slice(None),) * i + (draw(st.integers(0, shape[i] - 1)),)
        w[index] *= draw(st.sampled_from([0.0, -0.0, 1e-24, 1e25]))
    w = w.to(DTYPES[draw(st.sampled_from(sorted(DTYPES)))])
    return torch.nan_to_num(w, nan=0.0, posinf=1.0, neginf=-1.0), axis, groups


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=weights(),
    run=st.sampled_from([1, 7, 64]),
    held=st.sampled_from([0, 64, 1 << 20]),
    slab=st.sampled_from([1, 3, 16, 50]),
)
def test_any_cut_gives_the_bits_of_the_whole(
    case: tuple[Tensor, Any, int], run: int, held: int, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, axis, groups = case
    defaults = {"run": run, "held": held, "slab": slab}
    monkeypatch.setattr(pieces.cut, "__kwdefaults__", defaults)
    monkeypatch.setattr(slabs, "SLAB", slab)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            g, v, parts = split(folder, w, axis, groups)
        except NotSplittable:
            return
        counts = weightnorm.row_counts(g, w.dtype)
        assert sum(part.counts.zero for part in parts) == counts.zero
        assert sum(part.counts.scaled for part in parts) == counts.scaled
        fold(folder, g, v)
        trained = torch.where(g == 0, g, g * 1.37 + g.abs().max() * 2**-9)
        if bool((trained.isfinite()).all()):
            fold(folder, trained, v)


@pytest.mark.parametrize("columns", [1, 2, 3, 17, 100, 1000, 4097])
@pytest.mark.parametrize("width", [1, 2, 5, 64, 5000])
def test_tree_by_pieces_adds_in_the_same_order(columns: int, width: int) -> None:
    x = torch.randn(3, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(columns))
    reads: list[int] = []

    def read(start: int, stop: int) -> Tensor:
        assert stop - start <= width
        reads.extend(range(start, stop))
        return x[:, start:stop].clone()

    total = sums.tree_by_pieces(read, columns, width)

    assert same_bits(total, sums.tree(x.clone()))
    assert sorted(reads) == list(range(columns))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3, 200_001), 0), ((20_001, 5), 1), ((70_001, 5), None), ((300, 7, 250), 1), ((2, 3, 70_000), 1)],
)
def test_long_rows(dtype: torch.dtype, shape: tuple[int, ...], axis: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(pieces.cut, "__kwdefaults__", {"run": 1 << 16, "held": 1 << 10, "slab": 1 << 12})
    monkeypatch.setattr(slabs, "SLAB", 1 << 12)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    w.movedim(axis or 0, 0)[1] = 0

    g, v, _ = split(tmp_path, w, axis)
    fold(tmp_path, g, v)
    fold(tmp_path, g * 1.5, v)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("held", [0, 1 << 20])
def test_a_weight_that_cannot_be_split_says_why(bad: float, held: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(pieces.cut, "__kwdefaults__", {"run": 8, "held": held, "slab": 4})
    w = torch.ones(6, 8)
    w[4, 3] = bad
    out = tmp_path / "out"
    fileio.create(out, 6 * 4 + w.nbytes)

    found = engine.run([Split("w", store(tmp_path / "w", w), 0, 1, "float32", Place(out, 0), Place(out, 24))])

    assert [part.problem for part in found[0] if isinstance(part, SplitPart) and part.problem] == [
        "row 4 holds NaN or infinity"
    ]


@pytest.mark.parametrize("held", [0, 1 << 20])
def test_a_pair_that_cannot_be_multiplied_is_named(held: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(pieces.cut, "__kwdefaults__", {"run": 8, "held": held, "slab": 4})
    for change, said in (
        (lambda g, v: v[4].zero_(), "x: row 4 of v is zero but its g is not"),
        (lambda g, v: v[5].fill_(math.nan), "x: row 5 of v holds NaN"),
        (lambda g, v: g[3].fill_(math.inf), "x: row 3 of g is NaN or infinite"),
    ):
        g, v = torch.ones(6, 1), torch.ones(6, 8)
        change(g, v)
        (tmp_path / "out").unlink(missing_ok=True)
        fileio.create(tmp_path / "out", v.nbytes)
        pair = Pair("x", store(tmp_path / "g", g), store(tmp_path / "v", v))

        with pytest.raises(PairError, match=said):
            engine.run([Fold(pair, Place(tmp_path / "out", 0))])


def test_differences_are_counted_over_pieces(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(pieces.cut, "__kwdefaults__", {"run": 8, "held": 1 << 20, "slab": 4})
    g, v = torch.ones(6, 1), torch.ones(6, 4)
    w = weightnorm.fold(g, v)
    w[0, 0] = torch.nextafter(w[0, 0], torch.tensor(9.0))
    w[5, 1:3] += 3 * torch.finfo(torch.float32).eps
    a = Pair("x", store(tmp_path / "g", g), store(tmp_path / "v", v))

    found = engine.run([Compare("x", a, store(tmp_path / "w", w))])

    mismatches = [part for part in found[0] if isinstance(part, Mismatch)]
    assert sum(part.values for part in mismatches) == 3
    assert max(part.ulp or 0 for part in mismatches) >= 3


@pytest.mark.parametrize("held", [0, 1 << 20])
def test_magnitudes_alone(held: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(pieces.cut, "__kwdefaults__", {"run": 8, "held": held, "slab": 4})
    w = torch.randn(6, 8)
    w[2] = 0
    out = tmp_path / "out"
    fileio.create(out, 6 * 4)

    found = engine.run([Split("w", store(tmp_path / "w", w), 0, 1, "float32", Place(out, 0), None)])

    assert same_bits(load(out, w[:, :1]), weightnorm.split(w, 0)[0])
    assert out.stat().st_size == 6 * 4
    assert engine.outcome_of(found[0]) == (1, 0)


def test_half_of_a_pair_need_not_be_in_a_file(tmp_path: Path) -> None:
    g, v = torch.rand(6, 1), torch.randn(6, 8)
    w = weightnorm.fold(g, v)
    out = tmp_path / "out"
    fileio.create(out, w.nbytes)

    engine.run([Fold(Pair("w", Stored(Inline(data(g)), "float32", (6, 1)), store(tmp_path / "v", v)), Place(out, 0))])

    assert same_bits(load(out, w), w)


def test_a_comparison_can_stop_at_the_first_difference(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(pieces.cut, "__kwdefaults__", {"run": 8, "held": 1 << 20, "slab": 4})
    g, v = torch.ones(60, 1), torch.randn(60, 8)
    sides = Pair("w", store(tmp_path / "g", g), store(tmp_path / "v", v)), store(tmp_path / "w", v + 1)

    stopped, whole = (engine.run([Compare("w", *sides, whether=whether)], workers=1)[0] for whether in (True, False))

    assert len(stopped) == 1
    assert len(whole) == 60


@pytest.mark.parametrize("kernel", [True, False])
def test_bytes_are_copied(kernel: bool, tmp_path: Path, monkeypatch: Any) -> None:
    if not kernel:
        monkeypatch.setattr(fileio, "_CANNOT_COPY", {1, 2, 18, 22, 38, 95})
        monkeypatch.setattr(fileio.os, "copy_file_range", lambda *_: (_ for _ in ()).throw(OSError(18, "cross-device")))
    content = bytes(range(256)) * 70_000
    (tmp_path / "in").write_bytes(content)
    out = tmp_path / "out"
    fileio.create(out, len(content) + 3)

    engine.run([Put(b"abc", Place(out, 0)), Copy(Raw(tmp_path / "in", 0, len(content)), Place(out, 3))])

    assert out.read_bytes() == b"abc" + content


@pytest.mark.parametrize("kernel", [True, False])
def test_an_input_that_became_shorter(kernel: bool, tmp_path: Path, monkeypatch: Any) -> None:
    if not kernel:
        monkeypatch.delattr(fileio.os, "copy_file_range")
    (tmp_path / "in").write_bytes(b"short")
    fileio.create(tmp_path / "out", 100)

    with pytest.raises(InputError, match="in: became shorter while it was read"):
        engine.run([Copy(Raw(tmp_path / "in", 0, 100), Place(tmp_path / "out", 0))])
    with pytest.raises(InputError, match="gone: cannot be read"):
        engine.run([Copy(Raw(tmp_path / "gone", 0, 100), Place(tmp_path / "out", 0))])
