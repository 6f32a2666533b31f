"""Files of torch.save: what nests in them, what must stay, and what cannot be read."""

from __future__ import annotations

import argparse
import dataclasses
import pickle
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.checkpoints import assert_same_contents, converted, document, flat, state
from wnconvert import convert, jobs, weightnorm
from wnconvert.carriers.state_dict import StateDictCarrier
from wnconvert.errors import InputError, NothingToDo, PairError
from wnconvert.files import ReadOptions, tree
from wnconvert.files.torch_file import carrier_of
from wnconvert.sites import Selection


def _network() -> dict[str, Tensor]:
    return {"fc.weight": torch.rand(3, 4), "fc.bias": torch.rand(3)}


def _there_and_back(value: Any, folder: Path, **options: Any) -> Any:
    split = converted(value, folder, **options)
    assert any(path.endswith("_g") for path in flat(split))
    return converted(split, folder, "fold", **options)


@pytest.mark.parametrize(
    "value",
    [
        {"state_dict": _network(), "epoch": 3, "loss": 0.5, "name": "x", "none": None, "flag": True},
        {"generator": _network(), "discriminator": {"conv.weight": torch.rand(3, 2, 4)}},
        [_network(), {"deep": ({"er": _network()}, 1, "two")}],
        {"layers": {0: _network(), 1: _network()}, 2: "three"},
        {"": _network()},
        {"a.b": {"c": _network()}, "a": {"b.c": _network()}},
        {"naïve.weight": torch.rand(2, 3, 3), "名前.weight": torch.rand(2, 3, 3), "☃": [1]},
        OrderedDict(_network()),
        {"net": _network(), "empty": torch.rand(0, 3), "scalar": torch.tensor(1.5), "mask": torch.ones(2, 2).bool()},
        {"net": _network(), "spectrum": torch.rand(3, 3, dtype=torch.complex64), "ids": torch.arange(6).reshape(2, 3)},
        {"net": _network(), "fp8": {"weight": torch.rand(4, 4).to(torch.float8_e4m3fn)}},
        {"net": {"zero.weight": torch.zeros(2, 3, 1), "nan.weight": torch.full((2, 3, 1), torch.nan)}},
    ],
    ids=lambda value: "-".join(map(str, flat(value)))[:40].strip("/"),
)
def test_everything_but_the_weights_stays(value: Any, tmp_path: Path) -> None:
    after = _there_and_back(value, tmp_path)

    left, right = flat(value), flat(after)
    assert list(left) == list(right)
    for path, leaf in left.items():
        if isinstance(leaf, Tensor):
            assert torch.equal(_bytes(leaf), _bytes(right[path]))
        else:
            assert type(leaf) is type(right[path])
            assert leaf == right[path]


def _bytes(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def test_plain_data_of_training_scripts_is_no_pickled_object(tmp_path: Path) -> None:
    value = {"net": _network(), "best": np.float64(0.5), "step": np.int64(3), "args": argparse.Namespace(lr=0.1)}
    torch.save(value, tmp_path / "in.pt")
    opened = document(tmp_path / "in.pt")
    convert.apply(opened.carrier)

    opened.save(tmp_path, "out.pt")

    after = torch.load(tmp_path / "out.pt", weights_only=False)
    assert (after["best"], after["step"], after["args"].lr) == (0.5, 3, 0.1)
    assert type(after["best"]) is np.float64


def test_containers_keep_their_types_and_attributes(tmp_path: Path) -> None:
    weights = state()
    assert weights._metadata  # type: ignore[attr-defined]

    split = converted({"net": weights, "pair": (1, [2])}, tmp_path)

    assert type(split["net"]) is OrderedDict
    assert split["net"]._metadata == weights._metadata  # type: ignore[attr-defined]
    assert type(split["pair"]) is tuple


@pytest.mark.parametrize("order", [("weight_g", "x", "weight_v", "y"), ("x", "weight_v", "y", "weight_g")])
def test_a_weight_stands_where_the_first_of_its_pair_stood(order: tuple[str, ...], tmp_path: Path) -> None:
    tensors = {"weight_g": torch.rand(3, 1), "weight_v": torch.rand(3, 4), "x": torch.rand(2), "y": torch.rand(2)}

    folded = converted({key: tensors[key] for key in order}, tmp_path, "fold")

    expected = dict.fromkeys("weight" if key.startswith("weight") else key for key in order)
    assert list(folded) == list(expected)


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning", "ignore:TypedStorage:UserWarning")
def test_special_tensors_are_left_as_they_are(tmp_path: Path) -> None:
    value = {
        "net": _network(),
        "sparse": {"weight": torch.eye(3).to_sparse()},
        "quantized": {"weight": torch.quantize_per_tensor(torch.rand(3, 3), 0.1, 0, torch.qint8)},
        "conj": {"weight": torch.rand(2, 2, dtype=torch.complex64).conj()},
    }

    split = converted(value, tmp_path)

    assert split["sparse"]["weight"].is_sparse
    assert split["quantized"]["weight"].is_quantized
    assert torch.equal(split["conj"]["weight"], value["conj"]["weight"])


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning", "ignore:TypedStorage:UserWarning")
def test_tied_pairs_stay_tied_beside_special_tensors(tmp_path: Path) -> None:
    g, v = torch.rand(4, 1), torch.randn(4, 5)
    tied = {"a.weight_g": g, "a.weight_v": v, "b.weight_g": g, "b.weight_v": v}
    special = {"quantized": {"weight": torch.quantize_per_tensor(torch.rand(3, 3), 0.1, 0, torch.qint8)}}

    folded = converted(tied | special, tmp_path, "fold")

    assert torch.equal(folded["a.weight"], weightnorm.fold(g, v))
    assert folded["a.weight"].data_ptr() == folded["b.weight"].data_ptr()


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_pair_of_any_strides_that_cannot_be_multiplied_leaves_nothing(
    memory: torch.memory_format, tmp_path: Path
) -> None:
    v = torch.ones(2, 3, 4, 4)
    v[1] = 0
    pair = {"a.weight_g": torch.ones(2, 1, 1, 1), "a.weight_v": v.contiguous(memory_format=memory)}
    torch.save(pair, tmp_path / "in.pt")

    with pytest.raises(PairError, match=r"in\.pt: a\.weight: row 1 of v is zero but its g is not$"):
        jobs.convert_file(tmp_path / "in.pt", tmp_path / "out.pt", jobs.Job("fold"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


def test_parameters_stay_parameters(tmp_path: Path) -> None:
    value = {"a.weight": nn.Parameter(torch.rand(2, 3, 1), requires_grad=False), "b.weight": torch.rand(2, 3, 1)}

    split = converted(value, tmp_path)
    folded = converted(split, tmp_path, "fold")

    for holder, keys in ((split, ("a.weight_g", "a.weight_v")), (folded, ("a.weight",))):
        assert all(type(holder[key]) is nn.Parameter and not holder[key].requires_grad for key in keys)
    assert type(split["b.weight_g"]) is Tensor


class TestTies:
    """Names of one tensor stay names of one tensor."""

    def test_tied_names_share_one_pair(self, tmp_path: Path) -> None:
        shared = torch.rand(5, 4)
        value = {"net": {"fc.weight": shared, "fc.bias": torch.rand(5), "head.weight": shared}, "ema": {"x": shared}}

        split = converted(value, tmp_path)

        halves = [split["net"]["fc.weight_g"], split["net"]["head.weight_g"], split["ema"]["x_g"]]
        assert len({half.data_ptr() for half in halves}) == 1
        assert split["net"]["fc.weight_v"].data_ptr() == split["ema"]["x_v"].data_ptr()

        folded = converted(split, tmp_path, "fold")
        weights = (folded["net"]["fc.weight"], folded["net"]["head.weight"], folded["ema"]["x"])
        assert len({weight.data_ptr() for weight in weights}) == 1
        assert torch.equal(folded["ema"]["x"], shared)

    def test_a_tie_counts_once_and_is_named(self, tmp_path: Path) -> None:
        shared = torch.rand(5, 4)
        torch.save({"embed.weight": shared, "head.weight": shared}, tmp_path / "tied.pt")

        (site,) = document(tmp_path / "tied.pt").carrier.sites("torch")

        assert (site.name, site.tied, site.kind) == ("embed.weight", ("head.weight",), "Linear")

    def test_views_of_one_storage_are_no_tie(self, tmp_path: Path) -> None:
        flat_memory = torch.rand(24)
        value = {"a.weight": flat_memory[:12].view(2, 3, 2), "b.weight": flat_memory[12:].view(2, 3, 2)}

        split = converted(value, tmp_path)

        assert not torch.equal(split["a.weight_g"], split["b.weight_g"])
        assert split["a.weight_v"].untyped_storage().data_ptr() == split["b.weight_v"].untyped_storage().data_ptr()

    def test_flat_memory_does_not_pile_up(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        flat_memory = torch.rand(2 * 100 * 100 + 100)
        value = {
            "a.weight": flat_memory[:10000].view(100, 100),
            "b.weight": flat_memory[10000:20000].view(100, 100),
            "a.bias": flat_memory[20000:],
            "b.bias": flat_memory[20000:],
        }
        split = converted(value, tmp_path)
        size = (tmp_path / "out.pt").stat().st_size

        folded = converted(split, tmp_path, "fold")

        assert (tmp_path / "out.pt").stat().st_size < size
        assert torch.equal(folded["b.weight"], value["b.weight"])
        assert folded["a.bias"].data_ptr() == folded["b.bias"].data_ptr()

    def test_one_dict_in_two_places(self, tmp_path: Path) -> None:
        weights = _network()

        split = converted({"model": weights, "best": weights}, tmp_path)

        assert list(split["model"]) == list(split["best"]) == ["fc.weight_g", "fc.weight_v", "fc.bias"]


class TestOptimizerState:
    """It belongs to the plain parameters, so it is never converted."""

    def _checkpoint(self) -> dict[str, Any]:
        module = nn.Linear(3, 4)
        optimizer = torch.optim.Adam(module.parameters())
        module(torch.rand(2, 3)).sum().backward()
        optimizer.step()
        return {
            "model": module.state_dict(),
            "optim_g": optimizer.state_dict(),
            "optimizer_states": [optimizer.state_dict()],
            "inner": {"opt": optimizer.state_dict(), "lr": 0.1},
        }

    def test_is_kept_with_one_note(self, tmp_path: Path) -> None:
        value = self._checkpoint()
        torch.save(value, tmp_path / "in.pt")
        opened = document(tmp_path / "in.pt")

        split = converted(value, tmp_path)

        assert opened.notes == [
            "optimizer state at 'optim_g', 'optimizer_states', 'inner.opt' is kept but refers to parameters that "
            "changed; --optimizer drop leaves it out"
        ]
        for key in ("optim_g", "optimizer_states", "inner"):
            assert_same_contents(value[key], split[key])
        assert "weight_g" in split["model"]

    def test_is_left_out_on_request(self, tmp_path: Path) -> None:
        split = converted(self._checkpoint(), tmp_path, drop_optimizer=True)

        assert list(split) == ["model", "inner"]
        assert split["inner"] == {"lr": 0.1}

    def test_change_in_it_is_noticed(self, tmp_path: Path) -> None:
        torch.save(self._checkpoint(), tmp_path / "in.pt")

        names = document(tmp_path / "in.pt").carrier.effective()

        assert "optim_g.state.0.exp_avg" in names

    def test_alone_is_no_network(self, tmp_path: Path) -> None:
        torch.save(self._checkpoint()["optim_g"], tmp_path / "in.pt")

        with pytest.raises(InputError, match="holds only optimizer state"):
            document(tmp_path / "in.pt")


class TestNames:
    """What cannot be spelled is skipped with the reason."""

    def test_tensors_without_names_of_their_own(self, tmp_path: Path) -> None:
        value = {"net": _network(), "list": [torch.rand(3, 4)], "numbered": {0: torch.rand(3, 4)}}
        torch.save(value, tmp_path / "in.pt")
        report = convert.apply(document(tmp_path / "in.pt").carrier, dry_run=True, selection=Selection(kinds=("*",)))

        skipped = {row.site.name: row.reason for row in report.rows if row.action == "skipped"}
        assert skipped.keys() == {"list.[0]", "numbered.[0]"}
        assert all("is held in a list or under a key that is no name" in str(reason) for reason in skipped.values())

    def test_names_that_are_taken(self, tmp_path: Path) -> None:
        value = {"fc.w": torch.rand(3, 4), "fc.w_g": torch.rand(9), "net.weight": torch.rand(3, 4, 1)}
        torch.save(value, tmp_path / "in.pt")
        report = convert.apply(document(tmp_path / "in.pt").carrier, dry_run=True, selection=Selection(kinds=("*",)))

        assert {row.site.name: row.reason for row in report.rows}["fc.w"] == "fc.w_g is the name of another tensor"


class TestWholeModules:
    """Pickled modules, alone or beside other things."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4))
        ema = nn.Linear(3, 4)
        value = {
            "model": module,
            "ema": ema,
            "epoch": 3,
            "raw": {"fc.weight": torch.rand(2, 3), "fc.bias": torch.rand(2)},
        }
        torch.save(value, tmp_path / "in.pt")
        return tmp_path / "in.pt"

    def test_are_converted_wherever_they_are(self, source: Path, tmp_path: Path) -> None:
        reading = ReadOptions(unsafe_load=True)
        before = torch.load(source, weights_only=False)

        applied = jobs.convert_file(source, tmp_path / "split.pt", jobs.Job("apply", reading=reading))
        folded = jobs.convert_file(tmp_path / "split.pt", tmp_path / "back.pt", jobs.Job("fold", reading=reading))

        assert [row.site.name for row in applied.rows if row.action == "split"] == [
            "model.0.weight",
            "model.2.weight",
            "ema.weight",
            "raw.fc.weight",
        ]
        assert folded.count("folded") == 4
        assert applied.format == "torch-module"
        split = torch.load(tmp_path / "split.pt", weights_only=False)
        after = torch.load(tmp_path / "back.pt", weights_only=False)
        x = torch.rand(5, 2, 6)
        assert torch.equal(split["model"](x), before["model"](x))
        assert "0.weight_g" in split["model"].state_dict()
        for key in ("model", "ema"):
            assert_same_contents(dict(before[key].state_dict()), dict(after[key].state_dict()))
        assert_same_contents(before["raw"], after["raw"])

    def test_folded_file_needs_no_wnconvert(self, source: Path, tmp_path: Path) -> None:
        reading = ReadOptions(unsafe_load=True)
        jobs.convert_file(source, tmp_path / "split.pt", jobs.Job("apply", reading=reading))
        jobs.convert_file(tmp_path / "split.pt", tmp_path / "back.pt", jobs.Job("fold", reading=reading))

        assert b"wnconvert" in _pickle_of(tmp_path / "split.pt")
        assert b"wnconvert" not in _pickle_of(tmp_path / "back.pt")

    def test_torch_weight_norm_inside_is_folded(self, tmp_path: Path) -> None:
        module = nn.Sequential(nn.utils.weight_norm(nn.Conv1d(2, 3, 3)))
        with torch.no_grad():
            module[0].weight_g.mul_(2)
        torch.save(module, tmp_path / "in.pt")

        jobs.convert_file(
            tmp_path / "in.pt", tmp_path / "out.pt", jobs.Job("fold", reading=ReadOptions(unsafe_load=True))
        )

        folded = torch.load(tmp_path / "out.pt", weights_only=False)
        assert [name for name, _ in folded.named_parameters()] == ["0.weight", "0.bias"]
        x = torch.rand(1, 2, 8)
        torch.testing.assert_close(folded(x), module(x))

    def test_other_objects_are_named(self, tmp_path: Path) -> None:
        torch.save({"net": _network(), "when": zipfile.ZipInfo("x")}, tmp_path / "in.pt")

        with pytest.raises(InputError, match=r"pickled Python object \(zipfile.ZipInfo\)"):
            document(tmp_path / "in.pt")
        assert document(tmp_path / "in.pt", unsafe_load=True).tensors().keys() == {"net.fc.weight", "net.fc.bias"}

    def test_nothing_runs_unasked(self, tmp_path: Path) -> None:
        class Bomb:
            def __reduce__(self) -> Any:
                return (Path.touch, (tmp_path / "bang",))

        torch.save({"net": Bomb()}, tmp_path / "in.pt")
        with pytest.raises(InputError, match="--unsafe-load"):
            document(tmp_path / "in.pt")
        with (tmp_path / "plain.pt").open("wb") as file:
            pickle.dump(Bomb(), file)
        with pytest.raises(InputError, match="--unsafe-load"):
            document(tmp_path / "plain.pt")

        assert not (tmp_path / "bang").exists()


def _pickle_of(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


class TestInMemory:
    """State dicts that come from no file."""

    def test_the_dict_is_left_alone_and_the_result_is_like_it(self) -> None:
        weights = state()
        before = dict(weights)
        value = {"net": weights, "epoch": 3}

        carrier = carrier_of(value)
        convert.apply(carrier)
        split = carrier.rebuild()

        assert list(weights) == list(before)
        assert all(weights[key] is before[key] for key in before)
        assert type(split["net"]) is OrderedDict
        assert split["net"]._metadata == weights._metadata  # type: ignore[attr-defined]
        assert split["epoch"] == 3
        assert split["net"]["conv.weight_v"].data_ptr() == weights["conv.weight"].data_ptr()

        carrier = carrier_of(split)
        convert.fold(carrier)
        assert_same_contents(value, carrier.rebuild())

    def test_a_dict_in_two_places_stays_one(self) -> None:
        weights = _network()
        carrier = carrier_of({"a": weights, "b": [weights]})
        convert.apply(carrier)

        split = carrier.rebuild()

        assert split["a"] is split["b"][0]


def test_nothing_to_do(tmp_path: Path) -> None:
    torch.save(_network(), tmp_path / "in.pt")

    with pytest.raises(NothingToDo, match="nothing to fold"):
        jobs.convert_file(tmp_path / "in.pt", None, jobs.Job("fold"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


def test_time_grows_with_the_number_of_tensors_only() -> None:
    g, v = torch.rand(2, 1, 1), torch.rand(2, 2, 1)

    def seconds(count: int) -> float:
        carrier = StateDictCarrier(tree.explore({f"layers.{i}.weight": v for i in range(count)}).entries)
        untied = StateDictCarrier(dataclasses.replace(entry, alias=None) for entry in carrier.entries())
        start = time.process_time()
        for site in untied.sites("torch"):
            untied.put_pair(site, g, v, "legacy")
        assert len(untied.effective()) == count
        return time.process_time() - start

    seconds(100)
    assert seconds(20_000) < 40 * max(seconds(2_000), 0.02)


def test_deep_nesting_is_no_problem() -> None:
    value: Any = {"weight": torch.rand(2, 3, 1)}
    for _ in range(5000):
        value = {"in": value}

    (entry,) = tree.explore(value).entries

    assert entry.name.endswith(".in.weight")


def test_a_pair_that_cannot_be_multiplied_is_named_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a.weight_g": torch.ones(2, 1), "a.weight_v": torch.zeros(2, 3)}, path)
    with pytest.raises(PairError, match=r"model\.pt: a\.weight: row 0 of v is zero but its g is not$"):
        jobs.convert_file(path, None, jobs.Job("fold"))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
