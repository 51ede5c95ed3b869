"""A user's own functions and classes by import string: loading them, and their source for fingerprints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import pytest

from tokengrain.settings import check_choice, load_callable, source_of

MODULE = """from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Setting:
    factor: float = FACTOR

    def __call__(self) -> float:
        return self.factor


def function() -> float:
    return FACTOR


made = Setting()
"""


def test_a_file_may_define_dataclasses(tmp_path: Path) -> None:
    file = tmp_path / "json.py"
    file.write_text(MODULE.replace("FACTOR", "2.5"))
    assert load_callable(f"{file}:Setting")(3.0).factor == 3.0
    assert load_callable(f"{file}:made")() == 2.5
    assert not hasattr(sys.modules["json"], "Setting")  # its name is a module's, whose place it does not take


@pytest.mark.parametrize("name", ["function", "Setting", "made"])
def test_another_body_is_another_source(name: str, tmp_path: Path) -> None:
    sources = []
    for folder, factor in (("a", "2.5"), ("b", "2.5"), ("c", "7.25")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(MODULE.replace("FACTOR", factor))
        sources.append(source_of(load_callable(f"{tmp_path}/{folder}/mine.py:{name}")))
    assert "2.5" in sources[0]
    assert sources[0] == sources[1] != sources[2]


def test_a_file_that_fails_leaves_no_module_behind(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("raise RuntimeError('of the user')\n")
    before = set(sys.modules)
    with pytest.raises(RuntimeError, match="of the user"):
        load_callable(f"{file}:anything")
    assert set(sys.modules) == before


def test_choices_of_an_argument() -> None:
    check_choice("pooling", "last", Literal["mean", "last"])
    with pytest.raises(ValueError, match="pooling must be 'mean', 'max' or 'last', got 'lst'"):
        check_choice("pooling", "lst", Literal["mean", "max", "last"])
