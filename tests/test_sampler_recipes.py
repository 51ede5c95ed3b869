"""The sampler of an online stage, in a recipe and on the command line: checked, used, fingerprinted, resumed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.test_cli import call
from tests.test_stages import LLAMA, run
from tests.training.online.tiny import make_online
from tokengrain.errors import DataError, RecipeError, RunError
from tokengrain.rewards.suite import RewardError
from tokengrain.run.folder import make_plan
from tokengrain.run.load import load_recipe, make_recipe
from tokengrain.run.runner import evaluate_run, run_recipe
from tokengrain.training.config import LAUNCHER

ROOT = Path(__file__).parents[1]
LETTERS = list(range(97, 109))
PAGES = {"page_size": 32, "num_blocks": 64, "max_batch_tokens": 64}
BRANCHING = {"name": "branching", "window": 1, "quantile": 0.5, "per_prompt": 2}
REWARD = """
from pathlib import Path

calls = Path(__file__).with_name("calls")
fault = Path(__file__).with_name("fault")


def low(completion_ids):
    calls.write_text(calls.read_text() + "." if calls.exists() else ".")
    if fault.exists() and len(calls.read_text()) >= int(fault.read_text()):
        raise RuntimeError("the machine was taken away")
    return [sum(i < 128 for i in ids) / len(ids) for ids in completion_ids]
"""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def online(folder: Path, sampler: Any = None, *, name: str = "run", **over: Any) -> dict[str, Any]:
    """A recipe of four steps, two rollouts, on 8 prompts."""
    rows, reward = folder / "prompts.jsonl", folder / "low.py"
    if not rows.exists():
        rows.write_text("".join(json.dumps({"prompt": f"Say {'x' * i}.", "id": i}) + "\n" for i in range(8)))
        reward.write_text(REWARD)
    stage = {"kind": "online", "rewards": [f"{reward}:low"], "objective": {"name": "grpo"}}
    return {
        "method": "sampled",
        "model": {"config": LLAMA, "tokenizer": {"type": "byte"}},
        "data": {"train": str(rows), "eval_fraction": 0.25},
        "output_dir": str(folder / name),
        "training": {
            "max_steps": 4,
            "learning_rate": 2e-2,
            "logging_steps": 1,
            "save_steps": 1,
            "use_cpu": True,
            "normaliser": "token_mean",
        },
        "stages": {
            "train": stage
            | ({"sampler": sampler} if sampler is not None else {})
            | {
                "training": {
                    "prompts_per_rollout": 3,
                    "num_generations": 4,
                    "minibatches": 1,
                    "max_new_tokens": 6,
                    "stop_ids": LETTERS,
                    "rollout_samples": 20,
                    "rollout_samples_every": 1,
                }
            }
        },
        **over,
    }


def log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "train" / "log.jsonl").read_text().splitlines()]
    return [entry for entry in lines if "loss" in entry]


def trained(folder: Path) -> dict[str, torch.Tensor]:
    found = next((folder / "train" / "model").glob("*.safetensors"))
    return dict(load_file(found))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- What is checked ----


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stages.train.samplr=hf"], "stages.train.samplr: unknown key; did you mean 'sampler'?"),
        (["stages.train.sampler=contnuous"], "stages.train.sampler: unknown sampler 'contnuous'; did you mean"),
        (["stages.train.sampler.name=branchin"], "unknown sampler 'branchin'; did you mean 'branching'?"),
        (["stages.train.sampler={cache: static}"], "stages.train.sampler: a sampler needs a name"),
        (["stages.train.sampler.cahce=static"], "sampler 'hf': unknown setting 'cahce'; did you mean 'cache'?"),
        (["stages.train.sampler={name: branching, windw: 3}"], "unknown setting 'windw'; did you mean 'window'?"),
        (["stages.train.sampler={name: server, model: m}"], "sampler 'server': setting 'url' is missing"),
        (
            ["stages.train.sampler={name: server, url: 'http://a', model: m}"],
            "sampler.refresh: missing; expected checkp",
        ),
        (
            ["stages.train.sampler={name: server, url: 'http://a', model: m, refresh: adapter}"],
            "sampler.refresh: got 'adapter', but no adapter is trained (no lora); expected checkpoint",
        ),
        (
            ["stages.train.sampler={name: server, url: 'http://a', model: m, refresh: nccl}", "lora={r: 2}"],
            "sampler.refresh: got 'nccl', but an adapter is trained; expected adapter",
        ),
        (
            [
                "stages.train.sampler={name: branching, sampler: {name: server, url: 'http://a', model: m}}",
                "lora={r: 2}",
            ],
            "stages.train.sampler.sampler.refresh: missing; expected adapter, or none",
        ),
        (
            ["stages.train.training.fsdp=full_shard"],
            "stages.train.training: fsdp is 'full_shard'; sampler 'hf' needs the whole model in every process",
        ),
    ],
)
def test_mistakes_are_named_in_a_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], expected: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(online(tmp_path, "hf")))
    sets = [part for one in overrides for part in ("--set", one)]
    status, _, err = call(capsys, "train", str(path), "--dry-run", *sets)
    assert status == 2
    assert expected in " ".join(err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("refresh", "lora"), [("checkpoint", "null"), ("nccl", "null"), ("adapter", "{r: 2}")])
def test_each_way_to_give_a_server_weights_may_stand_in_a_recipe(refresh: str, lora: str) -> None:
    server = f"stages.train.sampler={{name: server, url: 'http://a', model: m, refresh: {refresh}}}"
    stage: Any = load_recipe("grpo", overrides=[server, f"lora={lora}"]).stages["train"]
    assert stage.sampler["refresh"] == refresh


def test_another_name_drops_the_settings_of_the_old(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(online(tmp_path, {"name": "hf", "cache": "static"})))
    sampler = lambda *sets: load_recipe(path, overrides=list(sets)).stages["train"].sampler  # noqa: E731
    assert sampler() == {"name": "hf", "cache": "static"}
    assert sampler("stages.train.sampler.name=branching") == {"name": "branching"}
    status, out, _ = call(capsys, "train", str(path), "--dry-run", "--set", "stages.train.sampler.name=branching")
    assert status == 0
    assert "sampler branching" in " ".join(out.split())
    inner = "stages.train.sampler.sampler.name=continuous"
    assert sampler("stages.train.sampler.name=branching", inner)["sampler"] == {"name": "continuous"}
    path.write_text(yaml.safe_dump(online(tmp_path)))
    assert sampler() == {"name": "hf"}
    assert sampler("stages.train.sampler.name=continuous") == {"name": "continuous"}


def test_fsdp_of_the_launcher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAUNCHER, "ACCELERATE_USE_FSDP", "true")
    refused = r"started with FSDP; sampler 'hf' needs the whole model in every process.*Expected the sampler server"
    for sampler in (None, "hf", {"name": "hf"}):
        with pytest.raises(RecipeError, match=refused):
            make_online(tmp_path, sampler=sampler)
    with pytest.raises(RecipeError, match="sampler 'branching' needs the whole model"):
        make_online(tmp_path, sampler={"name": "branching", "sampler": {"name": "server", "url": "x", "model": "m"}})


# ---- What is run ----


@pytest.mark.parametrize("sampler", [None, {"name": "continuous", "settings": PAGES}, BRANCHING], ids=str)
def test_a_stage_trains_with_each_sampler_and_resumes_exactly(tmp_path: Path, sampler: Any) -> None:
    whole = run(online(tmp_path, sampler, name="whole"))
    assert whole.metrics["final"]["length"] > 0
    entries = log(tmp_path / "whole")
    assert len(entries) == 4
    assert all(entry["mismatch/max_abs"] < 1e-3 for entry in entries)
    more = [entry["rollout/completions"] > 12 for entry in entries]
    assert any(more) == (sampler is BRANCHING)
    (tmp_path / "calls").unlink()
    (tmp_path / "fault").write_text("4")  # the held-out prompts, then the third rollout
    with pytest.raises(RewardError, match="taken away"):
        run(online(tmp_path, sampler, name="parts"))
    (tmp_path / "fault").unlink()
    assert len(log(tmp_path / "parts")) == 2
    run(online(tmp_path, sampler, name="parts"))
    assert same(trained(tmp_path / "parts"), trained(tmp_path / "whole"))


def test_the_fingerprint_has_the_sampler(tmp_path: Path) -> None:
    run(online(tmp_path))
    assert make_plan(make_recipe(online(tmp_path, "hf")))[-1].action == "reuse"
    assert make_plan(make_recipe(online(tmp_path, {"name": "hf", "max_batch_tokens": 99})))[-1].action == "reuse"
    with pytest.raises(RunError, match=r"stage 'train' differs: online.sampler.name: 'hf' there, 'continuous' here"):
        make_plan(make_recipe(online(tmp_path, "continuous")))
    state = next((tmp_path / "run").rglob("stage.json")).parent.parent / "train" / "stage.json"
    assert json.loads(state.read_text())["settings"]["online"]["sampler"] == {"name": "hf", "cache": "dynamic"}


def test_a_checkpoint_knows_its_sampler(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    make_online(tmp_path, max_steps=2, **settings).train()
    other = make_online(tmp_path, sampler={"name": "hf", "cache": "static"}, max_steps=4, **settings)
    with pytest.raises(RunError, match="static"):
        other.train(resume_from_checkpoint=True)
    make_online(tmp_path, sampler="hf", max_steps=4, **settings).train(resume_from_checkpoint=True)


def test_the_branching_of_the_aepo_recipe_and_its_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is commented out in recipes/aepo.yaml works once the mark is taken off."""
    text = (ROOT / "recipes" / "aepo.yaml").read_text()
    switched, count = re.subn(r"(?m)^(    )# (sampler: .*?)( *#.*)?$", r"\1\2", text)
    assert count == 1
    (tmp_path / "aepo.yaml").write_text(switched)
    shutil.copy(ROOT / "recipes" / "grpo.yaml", tmp_path)
    recipe = load_recipe(tmp_path / "aepo.yaml", model="some/model", data="prompts.jsonl")
    assert recipe.stages["train"].sampler["name"] == "branching"
    small = "world://arithmetic?size=small"
    sizes = {"max_steps": 2, "prompts_per_rollout": 4, "num_generations": 4, "minibatches": 1}
    recipe = load_recipe(
        tmp_path / "aepo.yaml",
        model=small,
        data=small,
        overrides=[
            f"output_dir={tmp_path / 'run'}",
            "data.eval_fraction=0.0",
            "training.logging_steps=1",
            *(f"stages.train.training.{k}={v}" for k, v in sizes.items()),
            "training.max_steps=2",
        ],
    )
    result = run_recipe(recipe)
    assert max(entry["rollout/completions"] for entry in log(result.path)) > 16
    capsys.readouterr()
    status, out, err = call(capsys, "evaluate", str(result.path), "--samples", "2", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert {"accuracy", "pass@2", "maj@2"} <= found["world"].keys() & found["world_base"].keys()
    assert "pass@4" not in found["world"]
    for which in ("trained", "base"):
        assert f"samples of the {which} model in the world arithmetic" in err
    status, out, err = call(capsys, "evaluate", str(result.path), "--json")
    assert "pass@16" in json.loads(out)["world"]  # the world's own number


def test_samples_of_an_evaluation_outside_a_world(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = run(online(tmp_path))
    greedy, several = (evaluate_run(result.path, samples=n, trust_run_code=True) for n in (None, 4))
    assert greedy["sampling"] == {"samples": 1, "temperature": 0.0}
    assert greedy["held_out"]["reward"] == pytest.approx(result.metrics["final"]["reward"])
    assert several["sampling"] == {"samples": 4, "temperature": 1.0}, "greedy ones would all be alike"
    assert {"pass@1", "pass@2", "pass@4"} <= several["held_out"].keys()
    assert "pass@1" not in greedy["held_out"]
    status, out, _ = call(capsys, "evaluate", str(result.path), "--samples", "2", "--trust-run-code")
    assert status == 0
    assert re.search(r"held-out rows .*pass@2 .*their completions +samples +2 ", re.sub(r"\s+", " ", out))


def test_a_bad_prompt_is_named_by_its_row_in_the_file(tmp_path: Path) -> None:
    online(tmp_path)
    path = tmp_path / "prompts.jsonl"
    lines = path.read_text().splitlines()
    for number in range(8):  # some are held out; the others keep their numbers
        changed = [*lines[:number], '{"question": 1}', *lines[number + 1 :]]
        path.write_text("\n".join(["", *changed]) + "\n")
        with pytest.raises(DataError, match=rf"prompts\.jsonl: row {number} \(line {number + 2}\): field 'prompt'"):
            run(online(tmp_path, name=f"run{number}"))


def test_a_column_of_tasks_that_is_not_there_ends_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, rows = tmp_path / "recipe.yaml", tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Say x.", "answer": "1", "topic": "x"}) + "\n")
    path.write_text(yaml.safe_dump({**online(tmp_path), "data": {"train": str(rows), "eval_fraction": 0.0}}))
    status, _, err = call(capsys, "train", str(path), "--set", "stages.train.training.task_column=topik", "--dry-run")
    assert status == 2
    assert "rows.jsonl: row 0 (line 1): field 'topik'" in " ".join(err.split())
    assert "did you mean 'topic'" in " ".join(err.split())


@pytest.mark.parametrize("reward", ["numeric", "math"])
def test_right_answers_that_cannot_be_read_end_a_dry_run(
    reward: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if reward == "math":
        pytest.importorskip("math_verify")
    path, rows = tmp_path / "recipe.yaml", tmp_path / "golds.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "Say x.", "answer": a}) + "\n" for a in ("1", "2", "?!", "3")))
    path.write_text(yaml.safe_dump({**online(tmp_path), "data": {"train": str(rows), "eval_fraction": 0.0}}))
    given = ("train", str(path), "--set", f"stages.train.rewards=[{{name: {reward}}}]", "--dry-run")
    status, _, err = call(capsys, *given)
    assert status == 2
    assert f"row 2 (line 3): field 'answer': reward '{reward}'" in " ".join(err.split())
    rows.write_text(json.dumps({"prompt": "Say x.", "answer": ["1", "2"]}) + "\n")
    status, _, err = call(capsys, *given)
    assert status == 0, err
