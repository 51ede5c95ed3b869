"""What was read from files, rows and servers cannot act on the terminal."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import pytest
from rich.table import Table

from tokengrain.cli import main
from tokengrain.screen import Screen

EVIL = "f\x1b]0;title\x07\x1b[31mx\x9b2J\u202e"


@pytest.mark.parametrize("name", [f"{EVIL}.jsonl", "a:b:c.jsonl", "[red]x.jsonl"])
def test_a_files_name_in_an_error(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / name
    file.write_text("{bad\n")
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(file)])
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert not set(shown) & set("\x1b\x07\x9b\u202e")
    plain = name.replace("\x1b", "␛").replace("\x07", "").replace("\x9b", "\\x9b").replace("\u202e", "\\u202e")
    assert plain in shown


def test_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        with pytest.raises(SystemExit):
            main(["--version"])
        for _ in range(2):  # a change of the filters makes Python forget which warnings it has shown
            warnings.simplefilter("always")
            warnings.warn(f"the server says {EVIL} :smile:", stacklevel=1)
    shown = capsys.readouterr().err
    assert shown.count("the server says") == 1
    assert "␛]0;title␛[31mx\\x9b2J\\u202e :smile:" in shown
    assert "\x1b" not in shown


def test_tables_and_own_colours_stay(tmp_path: Path) -> None:
    out = io.StringIO()
    screen = Screen(file=out, force_terminal=True, color_system="standard", width=60)
    table = Table("name")
    table.add_row(f"row {EVIL}")
    screen.print(table)
    screen.print("[bold red]error:[/] \x1b[2J", highlight=False)
    shown = out.getvalue()
    assert "\x1b[1;31merror:" in shown
    assert "␛[2J" in shown
    assert "row f␛]0;title" in shown
    assert "\x1b]0" not in shown
    assert "\x1b[2J" not in shown
