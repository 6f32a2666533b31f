"""What README.md says runs, and covers what there is. scripts/readme.py --check looks after its marked blocks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from wnconvert import cli, errors, files

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    codes = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(codes) == 2

    names: dict[str, object] = {}
    exec(codes[0], names)
    printed = capsys.readouterr().out
    assert "0.weight Conv1d (8, 4, 3) 0" in printed
    exec(codes[1], {"__name__": "readme"})
    assert capsys.readouterr().out == "eager torch.Size([4, 16, 1])\n"

    assert {path.name for path in tmp_path.iterdir()} == {"split.pt", "plain.pt"}
    assert "0.weight_g" in names["model"].state_dict()
    assert "2.weight" in names["model"].state_dict()


def test_it_names_every_verb_format_and_exit_code() -> None:
    assert all(f"\n  {name} " in README for name in cli.group.commands)
    assert all(suffix in README for row in files.FORMATS for suffix in row.suffixes)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    codes = {kind.exit_code for kind in kinds}
    assert all(f"| {code} |" in README for code in codes)


def test_its_links_and_scripts_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert all((ROOT / path).exists() for path in [*links, *re.findall(r"(?:\./)?(?:scripts|\.ci)/[\w.]+", README)])
