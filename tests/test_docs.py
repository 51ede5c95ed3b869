"""The pages say what is true: their code parses, its imports exist, links lead somewhere, pictures are up to date."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tokengrain

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_on_a_page_parses_and_its_imports_exist(page: Path) -> None:
    for block in FENCE.findall(page.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("tokengrain", "experiments"):
                module = importlib.import_module(node.module or "")
                for name in node.names:
                    assert hasattr(module, name.name), f"{page.name}: {node.module} has no {name.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_picture_of_a_step_is_the_one_its_script_draws() -> None:
    spec = importlib.util.spec_from_file_location("step_picture", ROOT / "docs" / "step_picture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "images" / "step.svg").read_text(encoding="utf-8") == module.picture()


def test_the_navigation_lists_every_page() -> None:
    def pages(entries: Any) -> Iterator[str]:
        for entry in entries:
            for place in entry.values():
                yield from [place] if isinstance(place, str) else pages(place)

    config = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    listed = list(pages(config["project"]["nav"]))
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md"))


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^::: tokengrain\.(\w+)$", text, re.MULTILINE)) | set(re.findall(r"^`(\w+)`", text, re.M))
    assert {*tokengrain.__all__} - {"__version__"} <= named


def test_the_readme_keeps_to_its_plan() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    assert sum(line.startswith("|") for line in text.splitlines()) <= 30
    first = "\n".join(text.splitlines()[:45])
    assert all(command in first for command in ("make demo", "make test", "tokengrain demo", "my.py:loss"))
