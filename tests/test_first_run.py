"""The first hour: on 60 rows of one's own and a small model, every recipe learns in one command, without settings."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tokengrain
from tokengrain.cli import main
from tokengrain.errors import RecipeError
from tokengrain.models import train_tokenizer
from tokengrain.run import fit as fitting
from tokengrain.run.fit import Outlook, _kept, fit, fit_batch, fit_rollout, learning_rate
from tokengrain.screen import Screen, progress_bar
from tokengrain.specs import TokenizerSpec
from tokengrain.training.online import Groups

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = sorted(
    path.stem
    for path in (ROOT / "recipes").glob("*.yaml")
    if path.stem not in ("ddro", "rrpo_video")  # of documents, for encoder-decoders; of clips
    and all(stage.kind != "online" for stage in tokengrain.load_recipe(path).stages.values())
)
PAIRS = ROOT.parent / "shared/data/hh-harmless-pairs.jsonl.gz"
QUICK = ("dpo", "qrm", "simpo")
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    ((?:pip|tokengrain) .*)$", README.partition("## A method")[0], re.MULTILINE)
NOUNS = ["cat", "dog", "bird", "fish", "tree", "house", "river", "stone", "cloud", "lamp", "door", "road"]
ENDS = ("and small", "and old", "and green", "today", "in the rain")
CHAT = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `my/sft-model`, a llama of 0.2 M random parameters, and 60 rows in `pairs.jsonl`."""
    folder = tmp_path_factory.mktemp("mine")
    rows = [
        {"prompt": f"Tell me about the {noun}.", "chosen": f" It is kind {end}.", "rejected": f" It is rude {end}."}
        for noun in NOUNS
        for end in ENDS
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    random_llama(folder / "my" / "sft-model", rows, vocabulary=400, seed=0)
    return folder


def random_llama(folder: Path, rows: list[dict[str, str]], *, vocabulary: int, seed: int) -> None:
    """A model that cannot speak, with a tokenizer of the rows' text."""
    texts = (text for row in rows for text in row.values())
    tokenizer = train_tokenizer(TokenizerSpec(vocab_size=vocabulary), texts)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(folder)


def run(recipe: str, mine: Path, output: Path, **more: Any) -> Any:
    model, data = str(mine / "my" / "sft-model"), str(mine / "pairs.jsonl")
    return tokengrain.train(recipe, model=model, data=data, output=output, quiet=True, **more)


def check_learned(stage: dict[str, Any], log: list[dict[str, Any]]) -> None:
    """At least 50 steps, a falling loss with 20 points, and held-out pairs told apart (or a teacher come nearer)."""
    losses = [entry["loss"] for entry in log if "loss" in entry]
    few = len(losses) // 4
    before, after = stage["before"], stage["after"]
    assert stage["train"]["steps"] >= 50
    assert len(losses) >= 20
    assert sum(losses[-few:]) < sum(losses[:few])
    assert after["loss"] < before["loss"]
    if "rewards/margins" in after:
        assert after["rewards/margins"] > max(0.0, before["rewards/margins"])
        assert after["accuracy"] == 1.0
    else:
        assert after["kl/teacher"] < before["kl/teacher"]


@pytest.mark.parametrize(
    "recipe", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OFFLINE]
)
def test_every_offline_recipe_learns_without_settings(recipe: str, mine: Path, tmp_path: Path) -> None:
    run(recipe, mine, tmp_path / "run")
    for stage in tokengrain.read_run(tmp_path / "run").stages:
        if stage.kind != "annotate":
            check_learned(stage.metrics, stage.log())


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders, each with 60 real pairs, 240 others to judge by, and a llama of 0.2 M random parameters."""
    rows = [json.loads(line) for line in gzip.decompress(PAIRS.read_bytes()).splitlines()]
    sides = [[row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")] for row in rows]
    fit = [a[0] == b[0] and a[2].strip() and b[2].strip() and a[2] != b[2] for a, b in sides]
    rows = [row for row, fits in zip(rows, fit, strict=True) if fits and max(map(len, row.values())) < 1600]
    folders = []
    for draw in (1, 2):
        folder = tmp_path_factory.mktemp(f"draw-{draw}")
        drawn = rows.copy()
        random.Random(1000 + draw).shuffle(drawn)
        for name, part in (("pairs", drawn[:60]), ("others", drawn[60:300])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        random_llama(folder / "model", drawn[:60], vocabulary=1000, seed=draw)
        folders.append(folder)
    return folders


@pytest.mark.slow
@pytest.mark.skipif(not PAIRS.is_file(), reason=f"no {PAIRS.name} in ../shared/data")
@pytest.mark.parametrize("recipe", OFFLINE)
def test_every_offline_recipe_learns_from_sixty_real_pairs(recipe: str, real: list[Path], tmp_path: Path) -> None:
    """On average over two draws, judged by 240 pairs: of six, chance decides the sign (docs/fitting.md).

    `python -m pytest -m slow -k sixty -s tests/test_first_run.py` prints a line for each draw.
    """
    gains = []
    for folder in real:
        model, data, others = (str(folder / name) for name in ("model", "pairs.jsonl", "others.jsonl"))
        output = tmp_path / folder.name
        tokengrain.train(recipe, model=model, data=data, eval_data=others, output=output, quiet=True)
        stage = tokengrain.read_run(output).stages[-1]
        losses = [entry["loss"] for entry in stage.log() if "loss" in entry]
        first, last = (sum(part) / len(part) for part in (losses[: len(losses) // 4], losses[-len(losses) // 4 :]))
        key, sign = ("kl/teacher", -1) if "kl/teacher" in stage.metrics["after"] else ("rewards/margins", 1)
        before, after = (stage.metrics[when][key] for when in ("before", "after"))
        held_out = " -> ".join(f"{stage.metrics[when]['loss']:.3f}" for when in ("before", "after"))
        print(f"{recipe}: loss {first:.3f} -> {last:.3f}, held-out {held_out}, {key} {before:.4f} -> {after:.4f}")
        assert stage.metrics["train"]["steps"] >= 50
        assert last < first
        gains.append(sign * (after - before))
    assert sum(gains) > 0, gains


@pytest.mark.slow
def test_adapters_learn_without_settings(mine: Path, tmp_path: Path) -> None:
    run("dpo", mine, tmp_path / "run", lora={"r": 8})
    (stage,) = tokengrain.read_run(tmp_path / "run").stages
    check_learned(stage.metrics, stage.log())


def said(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command of the README prints when it is run as it stands there."""
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(line, comments=True)[1:])
    out = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0, out
    return out


def test_the_first_commands_of_the_readme_as_they_are_printed(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(mine)
    out = said(COMMANDS[2], capsys)
    assert "54 rows, 6 held out; batch 4, 4 epochs: 56 steps, 5 of warm-up; rate" in out
    assert "chosen here: batch and epochs for at least 50 steps; rate for all weights of 0." in out
    assert "warning" not in out
    stages = {stage.name: stage for stage in tokengrain.read_run(mine / "runs" / "tgdpo").stages}
    for name in ("guide", "train"):
        check_learned(stages[name].metrics, stages[name].log())
    assert "most credit: " in said(COMMANDS[3], capsys)
    assert (mine / said(COMMANDS[4], capsys)).read_text().count("<section") >= 4


@pytest.mark.slow
def test_the_commands_of_the_readme_in_a_fresh_environment(mine: Path, tmp_path: Path) -> None:
    """As a stranger types them in a shell; what tokengrain needs pip finds where the tests have it, offline."""
    here = shutil.copytree(mine, tmp_path / "here", ignore=shutil.ignore_patterns("runs"))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "fresh"], check=True)
    home = next((tmp_path / "fresh" / "lib").glob("python*")) / "site-packages"
    for old in home.glob("setuptools*"):  # Python 3.11 brings one that is too old for torch
        shutil.rmtree(old)
    (home / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    given = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    given |= {"PATH": f"{tmp_path / 'fresh' / 'bin'}{os.pathsep}{given['PATH']}", "PIP_NO_INDEX": "1"}
    given |= {"PIP_NO_BUILD_ISOLATION": "0", "TOKENGRAIN_CACHE": str(tmp_path / "cache")}  # pip reads this 0 as "none"
    for number, line in enumerate(COMMANDS):
        where = ROOT if number == 0 else here
        done = subprocess.run(["bash", "-c", line], cwd=where, env=given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        quiet = "warning:" not in done.stdout + done.stderr
        assert quiet or "tokengrain demo" in line, (line, done.stdout, done.stderr)  # of TGDPO's weights, rightly
    installed = next(home.glob("tokengrain-*.dist-info"))
    assert ROOT.as_uri() in (installed / "direct_url.json").read_text()
    assert (here / "runs" / "demo" / "report.html").is_file()
    assert (here / "runs" / "tgdpo" / "report.html").is_file()


@pytest.mark.slow
def test_the_python_of_the_readme_as_it_is_printed(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mine)
    (block,) = (b for b in re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE) if ".train(" in b)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["result"].metrics["final"]["accuracy"] == 1.0


# ---- What is chosen ----


@pytest.mark.parametrize(
    ("rows", "given", "batch", "epochs", "steps"),
    [
        (10, {}, 1, 4, 40),
        (54, {}, 4, 4, 56),
        (200, {}, 8, 2, 50),
        (1_000, {}, 16, 1, 63),
        (7_200, {}, 128, 1, 57),
        (60_000, {}, 128, 1, 469),
        (54, {"num_train_epochs": 1}, 1, 1, 54),
        (54, {"per_device_train_batch_size": 16}, 16, 4, 16),
        (54, {"gradient_accumulation_steps": 2}, 4, 4, 56),
        (54, {"max_steps": 7}, 4, None, 7),
    ],
)
def test_batch_and_epochs_leave_steps_enough(
    rows: int, given: dict[str, Any], batch: int, epochs: int | None, steps: int
) -> None:
    found = Outlook(rows=rows)
    made = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, **given}
    made |= fit_batch(given, found, 1)
    assert made["per_device_train_batch_size"] * made["gradient_accumulation_steps"] == batch
    assert made.get("num_train_epochs") == epochs
    assert made["warmup_steps"] == steps // 10
    assert steps / made["logging_steps"] >= min(20, steps)


@pytest.mark.parametrize(
    ("rows", "given", "prompts", "epochs"),
    [
        (54, {}, 4, 4),
        (54, {"num_generations": 1}, 8, 4),
        (7_473, {}, 32, 1),
        (7_473, {"num_generations": 1}, 128, 1),
        (54, {"minibatches": 8}, 32, 4),
    ],
)
def test_rollouts_leave_steps_enough(rows: int, given: dict[str, Any], prompts: int, epochs: int) -> None:
    made = fit_rollout(given, Outlook(rows=rows), 1)
    assert (made["prompts_per_rollout"], made["num_train_epochs"]) == (prompts, epochs)


def test_processes_share_the_batch() -> None:
    made = fit_batch({}, Outlook(rows=60_000), 4)
    assert made["per_device_train_batch_size"] * made["gradient_accumulation_steps"] == 32
    assert fit_rollout({"minibatches": 2}, Outlook(rows=54), 3)["prompts_per_rollout"] % 6 == 0


def test_the_rate_falls_with_the_size_and_rises_for_adapters() -> None:
    sizes = (10**6, 10**8, 10**9, 8 * 10**9, 7 * 10**10)
    rates = [learning_rate("train", size, lora=False) for size in sizes]
    assert rates == sorted(rates, reverse=True)
    assert rates[3] == 5e-7
    assert learning_rate("train", sizes[3], lora=True) == 5e-6
    assert learning_rate("sft", 1, lora=True) == 1e-3


def test_the_table_of_rates_in_the_docs_is_true() -> None:
    page = (ROOT / "docs" / "fitting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`( with LoRA)? \| (\S+) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for kind, lora, *shown in rows:
        sizes = (8e9, 134.5e6, 1.5e9, 8e9, 70e9)
        assert [float(s) for s in shown] == [learning_rate(kind, int(size), lora=bool(lora)) for size in sizes]


def test_what_is_set_stays_and_the_papers_settings_can_be_had(mine: Path, tmp_path: Path) -> None:
    where = {"model": str(mine / "my" / "sft-model"), "data": str(mine / "pairs.jsonl")}
    fitted, _ = fit(tokengrain.load_recipe("tgdpo", **where, overrides=["training.learning_rate=1e-5"]))
    assert fitted.training["learning_rate"] == 1e-5
    assert "learning_rate" not in fitted.stages["train"].training
    assert fitted.stages["train"].training["num_train_epochs"] == 4
    paper, outlooks = fit(
        tokengrain.load_recipe("tgdpo", **where, overrides=["settings=paper", "training.max_steps=9"])
    )
    assert paper.training["learning_rate"] == 7e-7
    assert paper.training["gradient_accumulation_steps"] == 16
    assert not outlooks["train"].chosen
    world, _ = fit(tokengrain.load_recipe("tgdpo"))
    assert world == tokengrain.load_recipe("tgdpo")


def test_what_was_fitted_holds_on_every_machine(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's recipe.yaml is read again by `evaluate`, perhaps where a GPU computes in bf16, or on more processes."""
    where = {"model": str(mine / "my" / "sft-model"), "data": str(mine / "pairs.jsonl")}
    fitted, _ = fit(tokengrain.load_recipe("dpo", **where))
    monkeypatch.setattr("tokengrain.run.fit._computes_in_bf16", lambda: True)
    assert fit(fitted, processes=2)[0] == fitted
    half = tokengrain.load_recipe("dpo", **where, overrides=["stages.train.training.fp16=true"])
    assert fit(half)[1]["train"].args.fp16
    assert fit(tokengrain.load_recipe("dpo", **where))[0].training["bf16"]


def test_rows_are_cut_to_what_the_model_reads(mine: Path) -> None:
    """Without a word about lengths a model of 2,048 positions or fewer is neither lifted nor warned of."""

    def lengths(recipe: str = "dpo", *settings: str) -> tuple[int | None, int | None]:
        where = {"model": str(mine / "my" / "sft-model"), "data": str(mine / "pairs.jsonl")}
        data = fit(tokengrain.load_recipe(recipe, **where, overrides=list(settings)))[0].data.tokenize
        return data.get("max_length"), data.get("max_prompt_length")

    path = mine / "my" / "sft-model" / "config.json"
    config = path.read_text()
    assert lengths() == (2048, 1800)
    try:
        path.write_text(json.dumps({**json.loads(config), "max_position_embeddings": 1024}))
        assert lengths() == (1024, 900)
        assert lengths("rto") == (1152, 1024)  # its prompts are cut at 1024 by the recipe
        assert lengths("dpo", "data.max_length=512") == (512, 450)
        assert lengths("dpo", "data.max_length=512", "data.max_prompt_length=500") == (512, 500)
        assert lengths("dpo", "data.max_prompt_length=100") == (1024, 100)
        assert lengths("dpo", "data.max_length=null") == (None, None)
        assert lengths("grpo") == (None, 1024)
        assert lengths("dpo", "settings=paper", "training.warmup_steps=0") == (2048, 1800)
    finally:
        path.write_text(config)


def test_a_rate_of_0_at_every_step_is_an_error_before_training(mine: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages\.train: the learning rate is 0 at every one of 1 steps"):
        run("dpo", mine, tmp_path / "run", settings="paper")
    with pytest.raises(RecipeError, match=r"every one of 56 steps.*learning_rate 0"):
        run("dpo", mine, tmp_path / "run", training__learning_rate=0.0)
    assert not (tmp_path / "run").exists()


# ---- What teaches nothing is said ----


def test_a_credit_that_tells_no_token_from_another_is_said(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(mine / "my" / "sft-model")
    recipe = {
        "method": "guided",
        "model": model,
        "data": str(mine / "pairs.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "stages": {"credit": {"kind": "annotate", "credit": {"name": "guide", "model": model}}},
    }
    recipe["stages"]["credit"]["self_check"] = True
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    result = tokengrain.train(tmp_path / "recipe.yaml")
    shown = capsys.readouterr().out
    assert shown.count("every token reward is 0, so all tokens count alike") == 1
    assert "warning: credit should be lower where an answer is corrupted" in " ".join(shown.split())
    checked = result.metrics["stages"]["credit"]["self_check"]
    assert (checked["auc"], checked["answers"]) == (0.5, 6)
    recipe["stages"]["credit"] = {"kind": "annotate", "credit": "column", "self_check": True}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match="self_check: credit column comes with the rows"):
        tokengrain.load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("kind", ["sft", "online"])
def test_swapping_what_is_no_pair_is_an_error(kind: str, mine: Path, tmp_path: Path) -> None:
    stage = {"kind": kind, "data": {"swap_pairs": True}, **({"rewards": ["numeric"]} if kind == "online" else {})}
    if kind == "online":
        stage["credit"] = ["group"]
    with pytest.raises(RecipeError, match="swap_pairs is true, but the stage reads no pairs"):
        run("dpo", mine, tmp_path / "run", stages={"train": stage})


def test_a_policy_that_did_not_move_has_no_accuracy(mine: Path, tmp_path: Path) -> None:
    """The rate is so small that float32 does not see the steps."""
    result = run("dpo", mine, tmp_path / "run", training__learning_rate=1e-30, training__max_steps=1)
    assert result.metrics["final"]["comparison"] == "no difference yet"
    assert result.metrics["final"]["accuracy"] == 0.5


# ---- What can be known before training ----


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    out, err = capsys.readouterr()
    return stop.value.code, " ".join(out.split()), " ".join(err.split())


def test_the_plan_and_the_dry_run(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = f"model={mine / 'my' / 'sft-model'}", f"data={mine / 'pairs.jsonl'}", "--dry-run", "-o", str(tmp_path / "run")
    status, out, _ = call(capsys, "train", "tgdpo", *own, "lora.r=4", "batch=8", "lr=1e-4")
    assert status == 0
    assert "credit guide as reward" in out
    assert "54 rows, 6 held out; batch 8, 4 epochs: 28 steps, 2 of warm-up; rate 0.0001; trains " in out
    trained, total = map(float, re.findall(r"trains (\d+) of (\S+) M parameters", out)[0])
    base = LlamaForCausalLM.from_pretrained(mine / "my" / "sft-model").num_parameters()
    assert total == pytest.approx((base + trained) / 1e6, rel=1e-3)
    assert "GiB and the activations of at most 16,384 tokens (up to 0.16 GiB)" in out
    assert not (tmp_path / "run").exists()
    for given, expected in (
        ("lora.target_modules=[q_porj]", "lora does not fit the model: Target modules"),
        ("lora.modules_to_save=[lm_haed]", "lora.modules_to_save has 'lm_haed', and"),
        ("training.optim=galore_adamw", "optim is 'galore_adamw', and the package galore_torch is not installed"),
        ("training.report_to=clearml", "report_to is 'clearml', and the package clearml is not installed"),
        ("data.eval=nothing.jsonl", "nothing.jsonl"),
    ):
        status, _, err = call(capsys, "train", "dpo", *own, "lora.r=4", given)
        assert status == 2, err
        assert expected in err


def test_a_pass_fits_the_machine(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token keeps 10 kB of this model; what is set stays."""
    own = f"model={mine / 'my' / 'sft-model'}", f"data={mine / 'pairs.jsonl'}", "--dry-run", "-o", str(tmp_path / "run")
    monkeypatch.setattr("tokengrain.run.fit._memory", lambda processes: 64 * 2**20)
    _, out, _ = call(capsys, "train", "dpo", *own)
    assert "activations of at most 2,048 tokens (up to 0.02 GiB)" in out
    assert "2,048 tokens at a time for 0.0625 GiB of memory" in out
    _, out, _ = call(capsys, "train", "dpo", *own, "training.max_tokens_per_microbatch=4096")
    assert "activations of at most 4,096 tokens (up to 0.039 GiB)" in out
    assert "at a time" not in out


@pytest.mark.parametrize(
    ("limits", "listed", "least"),
    [
        ({"memory.max": 2**30}, "0::/\n", 2**30),
        ({"memory.max": "max", "user/1/memory.max": 2**29}, "0::/user/1\n", 2**29),
        (
            {"memory/memory.limit_in_bytes": 2**62, "memory/a/memory.limit_in_bytes": 2**28},
            "4:memory:/a\n0::/\n",
            2**28,
        ),
    ],
)
def test_a_container_has_less_memory_than_its_machine(
    limits: dict[str, Any], listed: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control groups of both versions: that of the container is the root, or one that the process names."""
    for name, limit in limits.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(f"{limit}\n")
    (tmp_path / "own").write_text(listed)
    found = fitting._limits(tmp_path / "groups", tmp_path / "own")
    assert found == [tmp_path / "groups" / name for name in limits]
    monkeypatch.setattr(fitting, "_limits", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fitting._memory(2) == least / 2
    monkeypatch.setattr(fitting, "_limits", list)
    assert fitting._memory(1) > least


@pytest.mark.parametrize("twice", [False, True])
def test_the_memory_of_activations_is_what_autograd_keeps(twice: bool) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=4, use_cache=False, **sizes)).model.train()
    if twice:
        model.gradient_checkpointing_enable()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(torch.arange(256)[None] % 50).last_hidden_state
    found = sum(size for place, size in kept.items() if place not in weights) / out.shape[1]
    args = SimpleNamespace(bf16=False, fp16=False, gradient_checkpointing=twice)
    told = _kept(args, model.config) / 4
    assert found == pytest.approx(told, rel=0.2, abs=3 * 64)  # the last norm is behind the layers


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("dpo",), "dpo is a recipe: tokengrain train dpo"),
        (("train", "dpo", "--model_name_or_path", "x"), "the model_name_or_path of other libraries is here: --model"),
        (("train", "dpo", "--per_device_train_batch_size", "8"), "is here: --batch"),
        (("train", "dpo", "--weight_decay", "0.1"), "is here: training.weight_decay=VALUE"),
        (("train", "dpo", "pairs.jsonl"), "expected key=value"),
        (("train", "dpo", "model=a", "--model", "b"), "error: model is given twice: 'b' and 'a'"),
        (
            ("train", "dpo", "data=a", "-s", "data.train=b"),
            "error: data and data.train set the same: 'a' and 'b'",
        ),
        (
            ("train", "dpo", "-s", "seed=1", "--set", "seed=2"),
            "error: seed is given twice: 1 and 2; give one",
        ),
        (("train", "dpo", "-o", "a", "output_dir=b"), "error: output_dir is given twice: 'b' and 'a'"),
        (("train", "dpo", "lora.r=4", "--lora-r", "8"), "error: lora.r is given twice: 8 and 4"),
        (("train", "dpo", "--lr", "1", "-s", "training.learning_rate=2"), "lr and training.learning_rate set the same"),
        (("train", "rto", "stages.train.training.max_steps=9", "--epochs", "2"), "stages.train.training.max_steps set"),
        (
            ("train", "rto", "stages.train.training.prompts_per_rollout=9", "batch=8"),
            "prompts_per_rollout and batch",
        ),
        (("train", "dpo", "training.learning_rte=1"), "error: command line: training.learning_rte: unknown key"),
        (("train", "dpo", "-s", "stages.train.objective.bta=1"), "error: command line: stages.train.objective"),
        (("train", "dpo", "data.max_length=1"), "command line: stages.train.data: max_length is 1"),
        (("train", "dpo", "lr=fast"), "command line: training.learning_rate: got 'fast'"),
    ],
)
def test_what_is_typed_is_understood(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    status, _, err = call(capsys, *arguments)
    assert status == 2
    assert expected in err


def test_what_is_more_general_counts_first() -> None:
    """In whatever order they are typed, so that each of the settings has an effect."""
    typed = ["stages.train.objective.beta=3", "stages.train.objective.name=simpo", "data.limit=7", "data=pairs.jsonl"]
    recipe = tokengrain.load_recipe("dpo", overrides=[*typed, "model=my/model"])
    assert recipe.stages["train"].objective == {"name": "simpo", "beta": 3}
    assert (recipe.data.train, recipe.data.limit) == ("pairs.jsonl", 7)


def test_short_names_count_for_all_stages() -> None:
    recipe = tokengrain.load_recipe("rto", overrides=["lr=1e-5", "epochs=2", "batch=16"])
    for stage in recipe.stages.values():
        assert not {"learning_rate", "num_train_epochs", "max_steps"} & set(stage.training)
    assert recipe.training["learning_rate"] == 1e-5
    assert recipe.training["num_train_epochs"] == 2
    assert "max_steps" not in recipe.training
    assert (
        recipe.training["per_device_train_batch_size"] == recipe.stages["train"].training["prompts_per_rollout"] == 16
    )


def test_progress_without_a_terminal_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("base", 4, console=Screen()) as update:
        update(advance=1, description="DPO")
        update(completed=2)
        update(completed=2.1)
    assert capsys.readouterr().out.splitlines() == ["DPO: 1 of 4", "DPO: 2 of 4"]


def test_a_saved_recipe_works_from_any_folder(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mine)
    more: Any = {"quiet": True, "training__max_steps": 2}
    tokengrain.train("dpo", model="my/sft-model", data="pairs.jsonl", output="runs/here", **more)
    monkeypatch.chdir(tmp_path)
    again = tokengrain.train(mine / "runs" / "here" / "recipe.yaml", quiet=True)
    assert again.reused == ["train"]
    assert again.path == mine / "runs" / "here"
    assert list(tmp_path.iterdir()) == []


def test_prompts_that_nobody_solves_are_said(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"What is {n} + {n}?", "answer": "987654321"} for n in range(60)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokengrain.train(
        "grpo",
        model=str(mine / "my" / "sft-model"),
        data=str(tmp_path / "prompts.jsonl"),
        output=tmp_path / "run",
        training__max_steps=2,
        stages__train__training__max_new_tokens=4,
    )
    out = " ".join(capsys.readouterr().out.split())
    assert "rollouts of 4 prompts x 8 completions: 2 steps" in out
    assert re.search(r"all rewards equal in 8 of 8 groups, which teach nothing: \d+% of their completions are cut", out)


@pytest.mark.parametrize(
    ("correct", "truncated", "why"),
    [(0, 0, "rarely or never"), (0, 1, "100% of their completions are cut"), (1, 0, "solves"), (1, 1, "solves")],
)
def test_why_groups_teach_nothing(correct: int, truncated: int, why: str) -> None:
    group, same = torch.tensor([0, 0, 1, 1]), torch.ones(4)
    groups, batch = Groups(), SimpleNamespace(n_prompts=2)
    told = {"rewards": same * correct, "correct": same * correct, "truncated": same * truncated}
    groups.add(cast(Any, SimpleNamespace(batch=batch, group=group, **told)))
    assert (groups.seen, groups.equal) == (2, 2)
    assert why in str(groups)
