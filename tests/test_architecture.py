"""The directions of imports, and where an import may stand.

    cli -> run -> recipe -> training, report -> rewards, worlds -> rollout, annotation, models, retrieval -> methods
    -> method -> loss, data, evaluation -> scoring -> batch -> vision, errors, specs, settings

A module imports its own room and rooms to its right. `method` names no method: it finds them by being there.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "tokengrain"

# Rooms from the top of the house to its ground; rooms of one line may not import each other, unless `BESIDE` says so.
LEVELS = (
    ("__main__",),
    ("cli",),
    ("api", "demo", "bench", "generate"),
    ("run",),
    ("recipe",),
    ("report",),
    ("training", "tables"),
    ("rewards", "worlds", "rank", "runs"),
    ("rollout", "annotation", "corruption", "models", "retrieval"),
    ("methods",),
    ("method",),
    ("loss", "data", "evaluation"),
    ("scoring",),
    ("batch", "specs"),
    ("settings", "screen", "vision"),
    ("errors",),
)
HEIGHT = {room: len(LEVELS) - i for i, level in enumerate(LEVELS) for room in level}

# Packages that are installed only with an extra, or only on some machines: imported where they are used.
OPTIONAL = {"bitsandbytes", "deepspeed", "liger_kernel", "math_verify", "matplotlib", "sglang", "tensorboard", "trl"}
OPTIONAL |= {"PIL", "av", "flash_attn", "jupyter", "peft", "wandb"}

# Parts of torch and accelerate that not every build or version has.
SOMETIMES = ("torch.distributed.", "torch.nn.attention.flex_attention", "accelerate.utils.fsdp_utils")

# Where a quick start is worth an import inside a function.
COMMANDS = {"tokengrain", "tokengrain.cli", "tokengrain.bench.cli"}

# Where the house is not yet as drawn; an entry that is no longer needed fails the test. The aim is none.
UPWARD: dict[str, str] = {}
INSIDE: dict[str, str] = {
    "tokengrain.data.tokens": "transformers' template code, without which objectives and cards load in half a second",
}


def module_of(path: Path) -> str:
    parts = ("tokengrain", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "tokengrain"


FILES = {module_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """`(module that is imported, whether inside a function)`; imports for type checkers alone are left out."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield (name if name in FILES else str(node.module)), inside
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(tree, False)


def own_imports(module: str, *, inside: bool | None = None) -> set[str]:
    """The modules of tokengrain that it imports."""
    found = {name for name, within in imports(module) if inside is None or within is inside}
    return {name for name in found if name in FILES and name not in ("tokengrain", module)}


def test_every_room_has_a_place() -> None:
    assert {room_of(module) for module in FILES} - {"tokengrain"} == set(HEIGHT)


def test_nothing_imports_upwards() -> None:
    found: dict[str, set[str]] = {}
    for module in FILES:
        mine = room_of(module)
        for other in own_imports(module) if mine != "tokengrain" else ():
            theirs = room_of(other)
            if theirs != mine and HEIGHT[theirs] >= HEIGHT[mine]:
                found.setdefault(module, set()).add(other)
    assert {module: sorted(others) for module, others in found.items() if module not in UPWARD} == {}
    assert sorted(set(UPWARD) - set(found)) == [], "these exceptions are no longer needed"


def test_there_is_no_circle() -> None:
    """Among imports at the top of modules."""
    graph = {module: own_imports(module, inside=False) for module in FILES}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        if module in above:
            pytest.fail("a circle of imports: " + " -> ".join((*above[above.index(module) :], module)))
        if module in done:
            return
        for other in sorted(graph[module]):
            visit(other, (*above, module))
        done.add(module)

    for module in FILES:
        visit(module, ())


def test_imports_stand_at_the_top() -> None:
    """But those of optional packages, and in `cli.py` and `__init__.py`, where a quick start is worth it."""
    found: dict[str, set[str]] = {}
    for module in FILES:
        if module in COMMANDS:
            continue
        for name, inside in imports(module):
            top = name.partition(".")[0]
            allowed = top in OPTIONAL | sys.stdlib_module_names or name.startswith(SOMETIMES)
            if inside and not allowed:
                found.setdefault(module, set()).add(name)
    assert {module: sorted(names) for module, names in found.items() if module not in INSIDE} == {}
    assert sorted(set(INSIDE) - set(found)) == [], "these exceptions are no longer needed"


def test_general_code_imports_no_method() -> None:
    """Methods are found by name; only what several of them share has other users."""
    methods = {m for m in FILES if m.startswith("tokengrain.methods.") and not m.rpartition(".")[2].startswith("_")}
    found = {module: sorted(own_imports(module) & methods) for module in FILES if room_of(module) != "methods"}
    assert {module: names for module, names in found.items() if names} == {}
