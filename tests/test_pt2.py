"""`.pt2` files: every command, damaged files, and files that would run code."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import wnconvert
from wnconvert import files
from wnconvert.cli import main
from wnconvert.errors import InputError, UsageError, VerificationError
from wnconvert.files import ReadOptions

pytestmark = pytest.mark.filterwarnings("ignore")


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(4, 3, 3, padding=1), nn.BatchNorm1d(3), nn.Dropout(), nn.ConvTranspose1d(3, 4, 2))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    shapes = ({0: torch.export.Dim("batch"), 2: 2 * torch.export.Dim("half", min=2)},)
    program = torch.export.export(_net(), (torch.randn(2, 4, 8),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "net.pt2", extra_files={"labels.txt": "cat dog"})
    return tmp_path / "net.pt2"


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]):
    """Run a command line: its exit code, and all that the process wrote to stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        return main([str(word) for word in words]), *capfd.readouterr()

    return run


def test_every_command_on_a_trained_network(path: Path, cli) -> None:
    before = torch.export.load(path)
    split, folded = path.with_name("net.wn.pt2"), path.with_name("net.wn.folded.pt2")

    code, out, _ = cli("apply", path, "--json")
    report = json.loads(out)
    assert code == 0 and report["walker"] == "export" and report["format"] == "pt2"
    assert report["verified"]["weights"] and report["verified"]["outputs"]["largest"] == 0
    assert [(site["name"], site["axis"]) for site in report["sites"]] == [("0.weight", 0), ("3.weight", 0)]
    _, out, _ = cli("inspect", split, "--json")
    g = torch.linalg.vector_norm(before.state_dict["0.weight"].double(), dim=(1, 2)).float()
    magnitude = json.loads(out)["sites"][0]["magnitude"]
    assert (magnitude["minimum"], magnitude["maximum"]) == (g.min().item(), g.max().item())
    assert cli("rename", split, "--to", "parametrized")[0] == 0
    renamed = torch.export.load(path.with_name("net.wn.renamed.pt2"))
    assert "0.parametrizations.weight.original0" in renamed.state_dict
    assert cli("fold", split)[0] == 0
    assert cli("verify", path, folded)[0] == 0
    extra = {"labels.txt": ""}
    after = torch.export.load(folded, extra_files=extra)
    assert extra == {"labels.txt": "cat dog"}
    assert after.state_dict.keys() == before.state_dict.keys()
    assert all(torch.equal(after.state_dict[name], value) for name, value in before.state_dict.items())
    x = torch.randn(5, 4, 12)
    torch.manual_seed(1)
    expected = before.module()(x)
    torch.manual_seed(1)
    assert torch.equal(after.module()(x), expected)


def test_a_changed_weight_is_seen_by_verify(path: Path, cli) -> None:
    split = torch.export.load(path)
    with torch.no_grad():
        split.state_dict["3.weight"][0, 0, 0] += 1
    torch.export.save(split, path.with_name("other.pt2"))

    code, out, _ = cli("verify", path, path.with_name("other.pt2"), "--json")

    outputs = files.read(path).compare_outputs(files.read(path.with_name("other.pt2")))
    assert code == 3 and outputs is not None and outputs.equal is False and outputs.largest > 1e-2
    assert VerificationError.exit_code == 3 and "3.weight" in out


def test_comparing_outputs_changes_no_statistics(path: Path) -> None:
    document = files.read(path)
    document.compare_outputs(document)

    assert torch.equal(document.carrier.rebuild().state_dict["1.running_mean"], torch.zeros(3))


def test_a_program_is_recognised_whatever_it_is_called(path: Path) -> None:
    for name in ("net.pt", "net", "net.safetensors.bin"):
        shutil.copy(path, path.with_name(name))
        assert files.recognise(path.with_name(name)).name == "pt2"
    torch.save({"a.weight": torch.randn(3, 4)}, path.with_name("state.pt2"))
    torch.jit.save(torch.jit.trace(nn.Linear(2, 3), torch.rand(1, 2)), path.with_name("script.pt2"))
    assert files.recognise(path.with_name("state.pt2")).name == "torch"
    assert files.recognise(path.with_name("script.pt2")).name == "torchscript"
    shutil.copy(path, path.with_name("other.pt"))
    assert wnconvert.convert_file(path.with_name("other.pt"), command="apply").output.endswith("other.wn.pt")


def _rewritten(path: Path, name: str, change) -> Path:
    """The archive with one entry changed, or left out if `change` gives None."""
    target = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.namelist():
            data = old.read(entry)
            data = change(data) if entry.endswith(name) else data
            if data is not None:
                new.writestr(entry, data)
    return target


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("models/model.json", lambda data: b"{"),
        ("models/model.json", lambda data: data.replace(b"aten.conv1d", b"aten.no_such_operator")),
        ("models/model.json", lambda data: None),
        ("weights_config.json", lambda data: None),
        ("weights/weight_0", lambda data: data[:4]),
        ("weights/weight_0", lambda data: None),
        ("archive_version", lambda data: b"99"),
        ("sample_inputs/model.pt", lambda data: data[:40]),
    ],
)
def test_damaged_programs_say_so_in_one_line(path: Path, name: str, change, cli) -> None:
    changed = _rewritten(path, name, change)

    code, out, err = cli("apply", changed)

    assert (code, out) == (1, "") and err.count("\n") == 1 and str(changed) in err, err
    assert not changed.with_name("changed.wn.pt2").exists()


def test_truncated_programs_say_so(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="cut short"):
        files.read(path)


def test_what_would_run_code_needs_the_flag(path: Path, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    file = io.BytesIO()
    torch.save(((Runs(),), {}), file)
    unsafe = _rewritten(path, "sample_inputs/model.pt", lambda data: file.getvalue())
    with pytest.raises(InputError, match="--unsafe-load"):
        files.read(unsafe)
    shape = json.dumps(f"__import__('pathlib').Path('{tmp_path}/ran').touch()").encode()
    formula = b"\"Mul(Integer(2), Symbol('s"
    assert formula in zipfile.ZipFile(path).read("net/models/model.json")
    unsafe = _rewritten(
        path, "models/model.json", lambda data: data.replace(b'"expr_str": "', b'"expr_str": ' + shape + b', "was": "')
    )
    with pytest.raises(InputError, match="a shape in it is no formula"):
        files.read(unsafe)
    assert not (tmp_path / "ran").exists()


def test_example_inputs_of_other_classes_need_the_flag(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(2, 3), (torch.rand(1, 2),))
    program.example_inputs = ((torch.rand(1, 2),), {})
    torch.export.save(program, tmp_path / "in.pt2")

    assert files.read(tmp_path / "in.pt2", ReadOptions(unsafe_load=True)).format == "pt2"
    with pytest.raises(UsageError, match="--arch is for checkpoints"):
        files.read(tmp_path / "in.pt2", ReadOptions(arch="torch.nn:Linear"))


def test_archives_of_several_programs_are_refused(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(2, 3), (torch.rand(1, 2),))
    from torch.export.pt2_archive._package import package_pt2

    package_pt2(str(tmp_path / "two.pt2"), exported_programs={"a": program, "b": program})

    with pytest.raises(InputError, match="found a, b"):
        files.read(tmp_path / "two.pt2")


def test_torch_writes_a_program_without_python_in_between(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's C++ calls write() of an open file, and ends the process where that raises KeyboardInterrupt.
    seen, save = [], torch.export.save
    monkeypatch.setattr(torch.export, "save", lambda program, f, **more: (seen.append(f), save(program, f, **more)))
    wnconvert.convert_file(path, command="apply")
    shutil.copy(path, path.with_name("other.pt"))
    wnconvert.convert_file(path.with_name("other.pt"), command="apply")
    assert [isinstance(f, (str, Path)) and str(f).endswith(".pt2") for f in seen] == [True, True]
    assert sorted(p.name for p in path.parent.iterdir()) == ["net.pt2", "net.wn.pt2", "other.pt", "other.wn.pt"]


def test_torch_says_nothing_in_its_own_log(path: Path, cli) -> None:
    file = io.BytesIO()
    torch.save(((torch.rand(2, 4, 8),), {"note": Path("x")}), file)
    pickled = _rewritten(path, "sample_inputs/model.pt", lambda data: file.getvalue())
    _, _, err = cli("inspect", pickled, "--unsafe-load")
    assert "Logging error" not in err and err.count("\n") <= 1, err
