"""What is installed: declared dependencies, one version, a README that package indexes can show, a wheel that works."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

import tokengrain

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[>=<~! ]", one)[0].lower().replace("_", "-") for one in requirements}


def test_what_is_imported_at_the_top_is_declared() -> None:
    imported: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).split(".")[0])
    imported -= {*sys.stdlib_module_names, "tokengrain"}
    found = packages_distributions()
    missing = {name for name in imported if not names(found[name]) & names(PYPROJECT["project"]["dependencies"])}
    assert imported
    assert missing == set()


def test_the_version_stands_in_one_place() -> None:
    assert "version" in PYPROJECT["project"]["dynamic"]
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "src/tokengrain/__init__.py"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == tokengrain.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def published_readme() -> str:
    """The README as the build changes it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for one in PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        assert re.search(one["pattern"], text), f"nothing to replace: {one['pattern']}"
        text = re.sub(one["pattern"], one["replacement"], text)
    return text


def test_the_readme_of_package_indexes_has_no_dead_link() -> None:
    text = published_readme()
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert targets
    assert all(target.startswith("https://") for target in targets)
    assert "![" not in text
    assert "| DPO | preferred over rejected, near the reference | dpo |" in text
    assert "    pip install 'tokengrain[all]'       " in text
    assert "Getting started" not in text


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_forms_and_workflows_are_whole(path: Path) -> None:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "jobs" in found:  # `on` is read as true
        assert all({"runs-on", "steps"} <= set(job) for job in found["jobs"].values())
    elif path.name != "config.yml":
        assert {"name", "description", "body"} <= set(found)
        assert all({"type", "attributes"} <= set(part) and part["attributes"]["label"] for part in found["body"])


@pytest.mark.slow
def test_the_wheel_runs_the_demo(tmp_path: Path) -> None:
    """Built as it would be published, and installed where nothing else of tokengrain is: no checkout, no cache."""

    def run(*command: object, **environment: str) -> None:
        given = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
        subprocess.run([str(part) for part in command], cwd=tmp_path, env=given, check=True)

    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT)
    run(sys.executable, "-m", "venv", tmp_path / "fresh")
    home = next((tmp_path / "fresh" / "lib").glob("python*")) / "site-packages"
    (home / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    binaries = tmp_path / "fresh" / "bin"
    run(binaries / "pip", "install", "-q", "--no-deps", "--no-index", next(tmp_path.glob("*.whl")))
    run(binaries / "tokengrain", "demo", "--samples", "4", TOKENGRAIN_CACHE=str(tmp_path / "cache"))
    assert (tmp_path / "runs" / "demo" / "report.html").stat().st_size > 100_000
    assert [path.name for path in (tmp_path / "cache" / "worlds").iterdir() if path.is_dir()]
