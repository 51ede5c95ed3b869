"""What was read from files, rows and servers cannot act on the terminal."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from tokengrain.cli import main
from tokengrain.run.show import print_plan, print_result
from tokengrain.screen import Screen, labelled, progress_bar

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


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", r"\xfc \u2212 \ud83d \u2028"),
        ("latin-1", "\xfc \\u2212 \\ud83d \\u2028"),
        ("utf-8", "\xfc \u2212 \\ud83d \\u2028"),
    ],
)
def test_what_a_terminal_lacks_is_shown_as_an_escape(encoding: str, expected: str) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    Screen(file=out).print("\xfc \u2212 \ud83d \u2028")
    out.seek(0)
    assert out.read().strip() == expected


def test_tables_and_own_colours_stay(tmp_path: Path) -> None:
    out = io.StringIO()
    screen = Screen(file=out, force_terminal=True, color_system="standard", width=60)
    table = Table("name")
    table.add_row(f"row {EVIL}")
    screen.print(table)
    screen.print(labelled("error", "\x1b[2J", "bold red"))
    shown = out.getvalue()
    assert "\x1b[1;31merror:" in shown
    assert "␛[2J" in shown
    assert "row f␛]0;title" in shown
    assert "\x1b]0" not in shown
    assert "\x1b[2J" not in shown


@pytest.mark.parametrize("console", [Screen, Console])
def test_brackets_in_names_of_a_run_are_no_tags(console: type[Console]) -> None:
    """Rich would leave out `[v2]`, and stop the run at `[/x]`, which closes nothing."""
    out = io.StringIO()
    screen, name = console(file=out, width=120), "my/[v2]model[/x]"
    print_plan(screen, f"dpo: runs/{name}", [("train", "train", f"dpo from {name}", "run")])
    stages = {"train": {"before": {}, "after": {"accuracy": 0.5}}}
    print_result(screen, {"method": name, "seconds": 1, "stages": stages}, Path(name))
    assert out.getvalue().count(name) == 4


def test_brackets_in_the_table_of_an_evaluation() -> None:
    out = io.StringIO()
    table = Table("measure", "value")
    table.add_row("reward/my[/x].py", "0.5")
    Screen(file=out, width=80).print(table)
    with progress_bar("rows of a[/x].jsonl", 2, console=Screen(file=out, width=80, force_terminal=True)):
        pass
    assert "reward/my[/x].py" in out.getvalue()
    assert "rows of a[/x].jsonl" in out.getvalue()
