"""The pages say what is true: their commands are understood, their code parses and its imports exist, links lead
somewhere, pictures are up to date."""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.doc_tables import benchmark_tables
from typer.main import get_command

import tokengrain
from tests.training.tiny import tiny_llama
from tokengrain import TokenBatch, TokenizeConfig, prepare_pairs, score
from tokengrain.cli import app
from tokengrain.loss import LossOutput
from tokengrain.models import train_tokenizer
from tokengrain.scoring.head import Distribution
from tokengrain.scoring.score import head_of
from tokengrain.specs import TokenizerSpec

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
NAMED = re.compile(r"^```(?:python|yaml)\n# ([\w.]+\.(?:py|yaml))\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^ {4,}(?:\S.*-m )?tokengrain (?=[a-z])(.*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_on_a_page_parses_and_its_imports_exist(page: Path) -> None:
    for block in FENCE.findall(page.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("tokengrain", "experiments"):
                module = importlib.import_module(node.module or "")
                for name in node.names:
                    assert hasattr(module, name.name), f"{page.name}: {node.module} has no {name.name}"


def commands(page: Path) -> list[str]:
    """The commands on a page, without `tokengrain`; a line may go on behind a backslash, or within quotes."""
    text = re.sub(r"\\\n *", "", page.read_text(encoding="utf-8"))
    text = re.sub(r"(?<=,)\n {20,}", " ", text)
    return [line.replace(" ... ", " ") for line in COMMAND.findall(text)]


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_on_a_page_are_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands and options exist, and so do the recipe and all keys that are set, as far as nothing is read or run."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for name, text in NAMED.findall(page.read_text(encoding="utf-8")):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tokengrain.run.runner.run_recipe", lambda recipe, **how: None)
    for line in commands(page):
        name, *arguments = shlex.split(line, comments=True)
        command: Any = get_command(app)
        command = command.commands[name]
        if name == "bench":
            command = command.commands[arguments.pop(0)]
        context = command.make_context(name, arguments)
        if name == "train":
            command.invoke(context)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a model and rows, and what code on pages means by `model`, `batch` and so on."""
    folder = tmp_path_factory.mktemp("docs")
    pairs = [{"prompt": f"Say {i}.", "chosen": f" nice {i}", "rejected": f" bad {i} oh"} for i in range(12)]
    prompts = [{"prompt": f"What is {i} + 2?", "answer": str(i + 2), "question": f"{i} + 2?"} for i in range(8)]
    for name, rows in (("pairs", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer(TokenizerSpec(type="byte"), ())
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=1024)
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    for name in ("sft-model", "chat-model"):
        model.save_pretrained(folder / "my" / name)
        tokenizer.save_pretrained(folder / "my" / name)
    samples = list(prepare_pairs(pairs[:2], tokenizer, TokenizeConfig(spans="diff")))
    batch = TokenBatch.from_samples(samples)
    logps = score(model, batch, ("logps",)).logps.detach()
    names = {name: copy.deepcopy(model) for name in ("model", "policy", "reference", "guide")}
    numbers = {name: logps.clone() for name in ("logps", "ref_logps", "scores")}
    names |= numbers | {"kl": logps.square(), "batch": batch, "tokenizer": tokenizer, "rows": prompts, "torch": torch}
    hidden = score(model, batch, ("hidden",)).hidden
    assert hidden is not None
    distribution = Distribution(hidden.detach(), head_of(model).detach())
    names |= {"tokengrain": tokengrain, "reference_distribution": distribution}
    names |= {"F": torch.nn.functional, "LossOutput": LossOutput, "objective": lambda *given, **more: lambda loss: loss}
    return folder, names


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if FENCE.search(p.read_text("utf-8"))], ids=lambda page: str(page.relative_to(ROOT))
)
def test_python_on_a_page_runs(
    page: Path, given: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block in one namespace; a block that begins with `# fragment` says that it needs what is not there."""
    folder, names = given
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    space = dict(names)
    for block in FENCE.findall(page.read_text(encoding="utf-8")):
        if not block.startswith("# fragment"):
            exec(compile(block, page.name, "exec"), space)


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


def test_tables_of_benchmarks_are_what_their_numbers_say() -> None:
    for page, name, table in benchmark_tables():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in page.read_text(), (
            f"python -m benchmarks.doc_tables: {page}"
        )
