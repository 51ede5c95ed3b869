"""Recipes: reading, merging, overrides, and one clear error for every mistake."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml

from tokengrain.data.config import TokenizeConfig
from tokengrain.errors import RecipeError
from tokengrain.method import METHODS
from tokengrain.methods.grpo import grpo_loss
from tokengrain.recipe.check import FOREIGN, PENALTIES
from tokengrain.recipe.reading import find_recipe, merge, parse_override, parse_yaml, read_file, resolve
from tokengrain.recipe.schema import dump_recipe
from tokengrain.run.build import open_rows
from tokengrain.run.load import load_recipe, make_recipe, resolve_stages
from tokengrain.run.runner import run_recipe
from tokengrain.run.trained import Trained
from tokengrain.runs import TRAINED
from tokengrain.specs import DataSpec, LoraSpec, ModelSpec
from tokengrain.training.config import OnlineConfig

ROOT = Path(__file__).parent.parent
WORLD = "world://stories"
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))
EXAMPLES = sorted(p for p in ROOT.glob("examples/*/*.yaml") if p.stem != "base")

BASE: dict[str, Any] = {
    "method": "tgdpo",
    "model": "some/model",
    "data": {"train": "pairs.jsonl"},
    "output_dir": "runs/x",
    "training": {"learning_rate": 1e-4},
    "stages": {
        "sft": {"kind": "sft"},
        "guide": {"kind": "train", "objective": {"name": "dpo", "beta": 0.3}},
        "credit": {"kind": "annotate", "credit": {"name": "guide", "model": "@guide", "beta": 0.3}},
        "train": {"kind": "train", "data": "@credit", "objective": {"name": "tgdpo", "alpha": 0.5}},
    },
}


def write(folder: Path, values: Any, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False))
    return path


def error_of(folder: Path, *overrides: str, values: Any = None, **options: Any) -> str:
    """The message of the one RecipeError that loading gives."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, BASE if values is None else values), overrides=overrides, **options)
    return str(caught.value)


# ---- What is right ----


def test_stages_inherit(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, BASE), overrides=["stages.guide.training.max_steps=7", "data.max_length=99"])
    sft, guide, credit, train = resolve_stages(recipe)
    assert sft.model.path == "some/model"
    assert guide.model.path == "@sft"
    assert train.model.path == "@sft"
    assert guide.training == {"learning_rate": 1e-4, "max_steps": 7}
    assert train.training == {"learning_rate": 1e-4}
    assert train.data.train == "@credit"
    assert train.data.tokenize == {"max_length": 99}
    assert credit.inputs == ["sft", "guide"]
    assert train.inputs == ["sft", "credit"]


def test_a_model_from_scratch_gets_an_init_stage(tmp_path: Path) -> None:
    values = {
        **BASE,
        "model": {"config": {"model_type": "llama", "hidden_size": 64}, "tokenizer": {"type": "byte"}},
    }
    stages = resolve_stages(load_recipe(write(tmp_path, values)))
    assert [s.kind for s in stages] == ["init", "sft", "train", "annotate", "train"]
    assert stages[1].model.path == "@init"


def test_lora_null_in_a_stage_means_none(tmp_path: Path) -> None:
    values = {**BASE, "lora": {"r": 8}, "stages": {**BASE["stages"], "sft": {"kind": "sft", "lora": None}}}
    sft, guide, *_ = resolve_stages(load_recipe(write(tmp_path, values)))
    assert sft.lora is None
    assert guide.lora is not None
    assert guide.lora.r == 8


def test_the_resolved_recipe_loads_to_itself(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, BASE))
    again = load_recipe(write(tmp_path, dump_recipe(recipe), "again.yaml"))
    assert resolve_stages(again) == resolve_stages(recipe)


def test_a_runs_recipe_names_its_files_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "documents.jsonl").write_text('{"key": "a", "text": "b"}\n')
    recipe = load_recipe("ddro", overrides=["stages.index.documents=documents.jsonl"])
    named = yaml.safe_load(dump_recipe(recipe, anchored=True))["stages"]["index"]["documents"]
    assert named == str(tmp_path / "documents.jsonl")


@pytest.mark.parametrize("stages", [None, 5, "x", [1], [{"name": 5}]])
def test_stages_that_are_none(stages: Any, tmp_path: Path) -> None:
    values = {**BASE, "settings": "paper"}
    for short in ((), ("lr=1e-5", "batch=2")):
        assert "stages: got" in error_of(tmp_path, *short, values={**values, "stages": stages})
        message = error_of(tmp_path, *short, values={**values, "paper": {"stages": stages}})
        assert "paper.stages: got" in message
        assert "expected a mapping of stages" in message


def test_a_stage_set_to_null_is_left_out(tmp_path: Path) -> None:
    assert list(load_recipe("timemaster", "M", "rows.jsonl", ["stages.sft=null"]).stages) == ["train"]
    assert "stages.trian is null, and there is no such stage; did you mean 'train'?" in error_of(
        tmp_path, "stages.trian=null"
    )


def test_a_key_of_a_stage_that_is_not_there(tmp_path: Path) -> None:
    message = error_of(tmp_path, "stages.trian.objective.beta=0.3")
    assert message == "--set stages.trian.objective.beta: no stage 'trian'; did you mean 'train'?"
    new = ["stages.more.objective.beta=0.3", "stages.more.objective.name=dpo", "stages.more.kind=train"]
    assert list(load_recipe("dpo", overrides=new).stages) == ["train", "more"]


def test_fsdp_is_true_or_text() -> None:
    """transformers means true, though it says that the type is text."""
    assert load_recipe("dpo", overrides=["training.fsdp=true"]).training["fsdp"] is True


def test_override_values_are_yaml() -> None:
    assert parse_override("a.b=1e-4") == (["a", "b"], 1e-4)
    assert parse_override("a=-2E+3") == (["a"], -2000.0)
    assert parse_override("a=1e5x") == (["a"], "1e5x")
    assert parse_override("a=[1, 2]") == (["a"], [1, 2])
    assert parse_override("a=null") == (["a"], None)
    assert parse_override("a=x=y") == (["a"], "x=y")
    assert parse_yaml("lr: 5e-7\nn: 12\nname: e5", "x") == {"lr": 5e-7, "n": 12, "name": "e5"}


def test_overrides_win_and_open_shorthands(tmp_path: Path) -> None:
    values = {**BASE, "data": "pairs.jsonl"}
    recipe = load_recipe(
        write(tmp_path, values), overrides=["data.eval_fraction=0.5", "model.dtype=bfloat16", "seed=3"]
    )
    assert recipe.data.train == "pairs.jsonl"
    assert recipe.data.eval_fraction == 0.5
    assert recipe.model.path == "some/model"
    assert recipe.model.dtype == "bfloat16"
    assert recipe.seed == 3


def test_model_and_data_overrides(tmp_path: Path) -> None:
    values = {
        **BASE,
        "model": {"path": "old", "dtype": "bfloat16"},
        "data": {"train": "old.jsonl", "eval": "old-eval.jsonl", "max_length": 9},
    }
    recipe = load_recipe(write(tmp_path, values), model="new", data="new.jsonl")
    assert (recipe.model.path, recipe.model.dtype) == ("new", "bfloat16")
    assert (recipe.data.train, recipe.data.eval, recipe.data.tokenize) == (
        "new.jsonl",
        None,
        {"max_length": 9},
    )


def test_on_world_counts_only_while_the_model_is_a_world(tmp_path: Path) -> None:
    values = {
        **BASE,
        "model": "world://stories",
        "on_world": {"training": {"max_steps": 5}, "stages": {"guide": {"objective": {"beta": 0.7}}}},
    }
    path = write(tmp_path, values)
    on = load_recipe(path)
    assert on.training == {"learning_rate": 1e-4, "max_steps": 5}
    assert on.stages["guide"].objective == {"name": "dpo", "beta": 0.7}
    off = load_recipe(path, model="some/model")
    assert off.training == {"learning_rate": 1e-4}
    assert off.stages["guide"].objective == {"name": "dpo", "beta": 0.3}
    assert load_recipe(path, overrides=["model=some/model"]).training == {"learning_rate": 1e-4}
    assert load_recipe(path, overrides=["training.max_steps=9"]).training["max_steps"] == 9
    assert load_recipe(path, data=f"{WORLD}?regime=noisy").training["max_steps"] == 5


def test_extends_merges_and_places_stages(tmp_path: Path) -> None:
    write(tmp_path, {k: v for k, v in BASE.items() if k != "output_dir"}, "base.yaml")
    (tmp_path / "sub").mkdir()
    child = {
        "extends": "../base.yaml",
        "output_dir": "runs/child",
        "training": {"max_steps": 3},
        "stages": {
            "warmup": {"kind": "sft"},
            "sft": None,
            "guide": {"objective": {"name": "simpo"}},
            "second": {"kind": "train", "objective": "dpo"},
        },
    }
    recipe = load_recipe(write(tmp_path / "sub", child))
    assert list(recipe.stages) == ["warmup", "guide", "second", "credit", "train"]
    assert recipe.training == {"learning_rate": 1e-4, "max_steps": 3}
    assert recipe.stages["guide"].objective == {"name": "simpo"}  # another objective: no beta of dpo's


def test_merge_replaces_the_model_as_a_whole() -> None:
    assert merge({"model": {"config": {"a": 1}}}, {"model": {"path": "x"}}) == {"model": {"path": "x"}}


def test_named_recipes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("tgdpo").resolve() == (ROOT / "recipes" / "tgdpo.yaml").resolve()
    for slip, meant in (("tgdop", "tgdpo"), ("dop", "dpo")):
        with pytest.raises(RecipeError, match=f"did you mean '{meant}'"):
            find_recipe(slip)


# ---- What is wrong ----

UNKNOWN = [
    (["sed=1"], "sed: unknown key; did you mean 'seed'?"),
    (["learning_rate=1e-3"], "learning_rate: unknown key; did you mean 'training.learning_rate'?"),
    (["max_lenght=3"], "max_lenght: unknown key; did you mean 'data.max_length'?"),
    (["training.learning_rat=1e-3"], "training.learning_rat: unknown key; did you mean 'learning_rate'?"),
    (
        ["stages.guide.training.max_step=1"],
        "stages.guide.training.max_step: unknown key; did you mean 'max_steps'?",
    ),
    (["data.max_lenght=3"], "data.max_lenght: unknown key; did you mean 'max_length'?"),
    (["model.dtpye=float32"], "model.dtpye: unknown key; did you mean 'dtype'?"),
    (["stages.guide.objektive=dpo"], "stages.guide.objektive: unknown key; did you mean 'objective'?"),
    (
        ["stages.guide.objective.bta=1"],
        "stages.guide.objective: objective 'dpo': unknown setting 'bta'; did you mean 'beta'?",
    ),
    (
        ["stages.guide.objective.name=dpoo"],
        "stages.guide.objective: unknown objective 'dpoo'; did you mean 'dpo'?",
    ),
    (
        ["stages.credit.credit.bta=1"],
        "stages.credit.credit: credit 'guide': unknown setting 'bta'; did you mean 'beta'?",
    ),
    (
        ["stages.credit.credit.name=gide"],
        "stages.credit.credit: unknown credit 'gide'; did you mean 'guide'?",
    ),
    (["stages.guide.kind=trian"], "did you mean 'train'?"),
    (["lora.rank=3"], "lora.rank: unknown key"),
]

WRONG_TYPE = [
    (["seed=one"], "seed: got 'one' (text); expected a whole number"),
    (["seed=1.5"], "seed: got 1.5 (a number); expected a whole number"),
    (["data.eval_fraction=2"], "data.eval_fraction: got 2"),
    (["data.train=3"], "data.train: got 3 (a whole number); expected text"),
    (["training.learning_rate=fast"], "training.learning_rate: got 'fast' (text); expected a number"),
    (["training.max_steps=2.5"], "training.max_steps: got 2.5 (a number); expected a whole number"),
    (["training.bf16='yes'"], "training.bf16: got 'yes' (text); expected true or false"),
    (["training.learning_rate='1e-4'"], "without quotes it is a number: 0.0001"),
    (["training=5"], "training: got 5 (a whole number); expected a mapping"),
    (["stages.guide.objective.beta=big"], "stages.guide.objective: objective 'dpo': beta = 'big'"),
    (["stages.guide.objective.beta=-1"], "greater than 0"),
    (["data.on_invalid=ignore"], "data.on_invalid: got 'ignore' (text); expected one of error, skip"),
    (["model.dtype=float23"], "did you mean 'float32'?"),
    (["training.lr_scheduler_type=linearr"], "linearr"),
    (["data.max_length=1"], "max_length is 1"),
    (["training.save_strategy=true"], "training.save_strategy: got True (true/false); expected one of False or text"),
    (["training.adam_beta1=1.5"], "training: adam_beta1 must be at least 0 and below 1, got 1.5"),
    (["training.num_train_epochs=-1"], "num_train_epochs must be at least 0, or max_steps above 0, got -1"),
    (["training.lr_scheduler_type=cosine_with_min_lr"], "lr_scheduler_kwargs not set: One of min_lr or min_lr_rate"),
]

IMPOSSIBLE = [
    (["stages.train.data=@credits"], "no stage 'credits' comes before it; expected one of @credit"),
    (["stages.train.data=@guide"], "'@guide' is a stage of kind train, which makes a model, not rows"),
    (["stages.train.model=@credit"], "which makes token rewards, not a model"),
    (["stages.guide.model=@train"], "'@train' comes later"),
    (["stages.guide.model=@guide"], "'@guide' comes later than (or is) the stage"),
    (
        ["stages.credit.credit.model=@nothing"],
        "no stage 'nothing' comes before it; expected one of @sft, @guide",
    ),
    (["stages.credit.credit={name: guide}"], "stages.credit.credit.model: missing"),
    (["stages.credit.credit={name: random, model: '@guide'}"], "credit random asks no such model"),
    (["stages.train.credit={name: random}"], "have token rewards already"),
    (["stages.guide.credit={name: random}"], "say which: `as: weight` or `as: selection`"),
    (["stages.guide.reference=adapter_off"], "adapter_off needs lora"),
    (
        ["stages.guide.objective=tdpo2", "stages.guide.reference=columns"],
        "needs the reference's whole distribution",
    ),
    (["stages.guide.objective=simpo", "stages.guide.reference=copy"], "objective simpo has no reference"),
    (["model=@sft"], "the recipe's own model must exist before it"),
    (["data=@credit"], "name it in the data of the stage that uses it"),
    (["stages.init.kind=sft"], "stages.init: the name is taken"),
    (["model={path: x, config: {model_type: llama}}"], "got both of path and config"),
    (["model={config: {hidden_size: 3}}"], "config has no model_type"),
    (["model={config: {model_type: lama}}"], "did you mean 'llama'?"),
    (
        ["model={config: {model_type: llama, hiden_size: 3}}"],
        "model.config.hiden_size: unknown key of a llama config; did you mean 'hidden_size'?",
    ),
    (
        ["stages.guide.model={config: {model_type: llama}}"],
        "only the recipe's own model can be built from scratch",
    ),
    (["data.streaming=true"], "rows cannot be held out of a stream"),
    (["training.output_dir=x"], "cannot be set here; set output_dir at the top"),
    (["data.max_length=10", "data.max_prompt_length=10"], "leaves 0 tokens for a completion"),
    (["training.normaliser=constant", "training.normaliser_constant=0", "training.deepspeed=x.json"], "deepspeed"),
    (["model={path: x, freeze: vision}", "lora={r: 2}"], "model.freeze: no stage trains all weights of this model"),
    (["stages.credit.model={path: x, freeze: vision}"], "stages.credit.model.freeze: no stage trains all weights"),
]


ONLINE_STAGE = "stages={train: {kind: online, rewards: [exact]}}"
UNREAD = [
    (["training.normaliser_constant=5"], "training.normaliser_constant: is the divisor of normaliser: constant"),
    (["training.ref_model_sync_steps=5"], "training.ref_model_sync_steps: says how the reference follows the policy"),
    (["stages.guide.training.ref_model_mixup_alpha=0.5"], "stages.guide.training.ref_model_mixup_alpha: says how"),
    (["data.completions=both", "stages.sft=null"], "data.completions: completions is both, but no stage here learns"),
    (["stages.guide.data={completions: both}"], "stages.guide.data.completions: completions is both"),
    (["data.spans=diff", ONLINE_STAGE], "data.spans: sampled completions have no spans"),
    ([ONLINE_STAGE, "stages.train.data={completions: both}"], "stages.train.data.completions: completions is both"),
    ([ONLINE_STAGE, "stages.train.training.max_refills=3"], "stages.train.training.max_refills: says how often"),
    (
        [
            ONLINE_STAGE,
            "stages.train.training.max_refills=3",
            "stages.train.credit=[{name: filter_groups, refill: false}]",
        ],
        "stages.train.training.max_refills: says how often",
    ),
]
READ = [
    ["training.normaliser_constant=5", "stages.guide.training.normaliser=constant"],
    ["training.sync_ref_model=true", "training.ref_model_sync_steps=5", "stages.sft.training.sync_ref_model=false"],
    ["data.completions=both"],
    ["data.spans=diff"],
    ["stages.guide.data={completions: chosen}"],
    [ONLINE_STAGE, "stages.train.training.max_refills=3", "stages.train.credit=[filter_groups, group]"],
]


@pytest.mark.parametrize(("overrides", "expected"), UNREAD)
def test_what_no_stage_reads_is_named(overrides: list[str], expected: str, tmp_path: Path) -> None:
    assert expected in error_of(tmp_path, *overrides)


@pytest.mark.parametrize("overrides", READ)
def test_what_one_stage_reads_others_may_inherit(overrides: list[str], tmp_path: Path) -> None:
    load_recipe(write(tmp_path, BASE), overrides=overrides)


@pytest.mark.parametrize(("overrides", "expected"), UNKNOWN + WRONG_TYPE + IMPOSSIBLE)
def test_mistakes_are_named(tmp_path: Path, overrides: list[str], expected: str) -> None:
    message = error_of(tmp_path, *overrides)
    assert expected in message
    assert message.startswith(("command line: ", str(tmp_path / "recipe.yaml")))


@pytest.mark.parametrize(("overrides", "expected"), [(o, e) for o, e in UNKNOWN + WRONG_TYPE if len(o) == 1])
def test_one_mistake_is_one_line(tmp_path: Path, overrides: list[str], expected: str) -> None:
    assert "\n" not in error_of(tmp_path, *overrides)


def test_several_mistakes_are_listed_together(tmp_path: Path) -> None:
    message = error_of(tmp_path, "training.a=1", "data.b=1", "stages.guide.objective.c=1")
    assert message.count("\n") == 3
    assert all(f"{key}: unknown" in message for key in ("training.a", "data.b"))


@pytest.mark.parametrize("name", ["save_strategy", "eval_strategy", "logging_strategy"])
def test_no_may_stand_without_quotes(name: str, tmp_path: Path) -> None:
    stage = resolve_stages(load_recipe(write(tmp_path, BASE), overrides=[f"training.{name}=no"]))[1]
    assert isinstance(stage, Trained)
    assert getattr(stage.args("unused"), name) == "no"


def test_missing_keys(tmp_path: Path) -> None:
    values = {k: v for k, v in BASE.items() if k not in ("method", "stages")}
    message = error_of(tmp_path, values=values)
    assert "method: missing" in message
    assert "stages: missing" in message
    assert "stages.s.kind: missing; expected one of sft, train, reward, online, annotate" in error_of(
        tmp_path, values={**BASE, "stages": {"s": {}}}
    )
    assert "stages.s.objective: missing" in error_of(tmp_path, values={**BASE, "stages": {"s": {"kind": "train"}}})


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    assert "line 3" in error_of(tmp_path, values="method: dpo\nmodel: x\n  data: [1\n")
    assert "key 'model' is given twice" in error_of(tmp_path, values="model: a\nmodel: b\n")
    assert "expected a mapping" in error_of(tmp_path, values="- a\n- b\n")
    with pytest.raises(RecipeError, match=r"no such recipe file; did you mean .*recipe.yaml"):
        load_recipe(tmp_path / "recipes.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"method: \xff\xfe")
    with pytest.raises(RecipeError, match="not a text file"):
        load_recipe(tmp_path / "bytes.yaml")


def test_bad_extends(tmp_path: Path) -> None:
    assert "extended by" in error_of(tmp_path, values={**BASE, "extends": "nothing.yaml"})
    assert "extends itself" in error_of(tmp_path, values={**BASE, "extends": "recipe.yaml"})
    assert "expected a file name or a list" in error_of(tmp_path, values={**BASE, "extends": 3})


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.learning_rate=.nan", "training.learning_rate: got nan; expected a finite number"),
        ("training.max_grad_norm=.inf", "training.max_grad_norm: got inf; expected a finite number"),
        ("stages.guide.objective.beta=1e999", "stages.guide.objective.beta: got inf; expected a finite number"),
        ("stages.checkpoint-1={kind: sft}", "stages.checkpoint-1: the name is that of a checkpoint"),
        ("stages.inputs={kind: sft}", "stages.inputs: the name is taken by what a run was given in memory"),
        ("stages.Train={kind: sft}", "stages.Train: the name differs from train in capitals alone"),
    ],
)
def test_numbers_and_names_that_mean_nothing(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in error_of(tmp_path, override)


@pytest.mark.parametrize("own", [{"model": "my/model"}, {"data": "pairs.jsonl"}, {"model": "my/model", "data": WORLD}])
def test_a_toy_is_not_left_beside_ones_own(tmp_path: Path, own: dict[str, str]) -> None:
    path = write(tmp_path, {**BASE, "model": WORLD, "data": WORLD})
    with pytest.raises(RecipeError, match=r"the model is .*, the rows are .*; give --model and --data together"):
        load_recipe(path, **own)
    assert load_recipe(path, model="my/model", data="pairs.jsonl").model.path == "my/model"
    assert load_recipe(path, model=f"{WORLD}?regime=noisy").model.is_world


@pytest.mark.parametrize("text", ["training", "=3", "training.=3"])
def test_bad_override_syntax(tmp_path: Path, text: str) -> None:
    assert "expected key=value" in error_of(tmp_path, text)


def test_override_below_a_value(tmp_path: Path) -> None:
    assert "training.learning_rate is 0.0001, which has no keys" in error_of(tmp_path, "training.learning_rate.x=1")


ONLINE: dict[str, Any] = {
    **{k: v for k, v in BASE.items() if k != "stages"},
    "stages": {
        "train": {
            "kind": "online",
            "rewards": [{"name": "numeric", "style": "last"}, "my.py:length"],
            "credit": "group",
        }
    },
}


def test_overrides_name_entries_of_lists_by_number(tmp_path: Path) -> None:
    def rewards(*overrides: str, **more: Any) -> Any:
        path = write(tmp_path, {**ONLINE, **more})
        return resolve(read_file(path), None, None, [parse_override(o) for o in overrides])["stages"]["train"][
            "rewards"
        ]

    assert rewards("stages.train.rewards.0.style=flexible", "stages.train.rewards.1.weight=0.5") == [
        {"name": "numeric", "style": "flexible"},
        {"name": "my.py:length", "weight": 0.5},
    ]
    assert rewards("stages.train.rewards.0.name=math", "stages.train.rewards.0.weight=2") == [
        {"name": "math", "weight": 2},  # another name: no style of numeric's
        "my.py:length",
    ]
    assert rewards("stages.train.rewards.1=format")[1] == "format"
    # The list that `on_world` brings is the one that is changed, however long the one below it is.
    world = {"model": "world://arithmetic", "on_world": {"stages": {"train": {"rewards": ["a", "b", "world"]}}}}
    assert rewards("stages.train.rewards.2.weight=2", **world) == ["a", "b", {"name": "world", "weight": 2}]


@pytest.mark.parametrize("place", ["2.weight", "2", "-1.weight", "first.weight", "name"])
def test_overrides_below_a_list_say_what_there_is(tmp_path: Path, place: str) -> None:
    message = error_of(tmp_path, f"stages.train.rewards.{place}=1", values=ONLINE)
    assert f"--set stages.train.rewards.{place}: stages.train.rewards is a list" in message
    assert "its entries are stages.train.rewards.0 to stages.train.rewards.1" in message
    assert "give the whole list: --set stages.train.rewards='[...]'" in message


def test_shorthands_open_wherever_a_recipe_has_them(tmp_path: Path) -> None:
    credit = "stages.guide.credit={name: surprise, as: selection}"
    recipe = load_recipe(write(tmp_path, BASE), overrides=[credit, "stages.guide.credit.as.share=0.3"])
    assert recipe.stages["guide"].credit["as"] == {"name": "selection", "share": 0.3}
    teacher = {"stages.guide.objective": "aligndistil", "stages.guide.teacher": "{target: a, contrast: b}"}
    overrides = [*(f"{k}={v}" for k, v in teacher.items()), "stages.guide.teacher.contrast.dtype=bfloat16"]
    spec = load_recipe(write(tmp_path, BASE), overrides=overrides).stages["guide"].teacher
    assert (spec.target.path, spec.contrast.path, spec.contrast.dtype) == ("a", "b", "bfloat16")


def test_another_name_drops_what_on_world_set_for_the_old_one(tmp_path: Path) -> None:
    on_world = {"stages": {"credit": {"credit": {"beta": 0.7}}}}
    path = write(tmp_path, {**BASE, "model": "world://stories", "on_world": on_world})
    recipe = load_recipe(path, overrides=["stages.credit.credit.name=surprise"])
    assert recipe.stages["credit"].credit == {"name": "surprise"}


def test_keys_below_a_text_say_what_the_text_is(tmp_path: Path) -> None:
    assert "data.eval: got {'limit': 5} (a mapping); expected text (held-out rows" in error_of(
        tmp_path, "data.eval.limit=5"
    )
    assert "data.eval is 'x.jsonl', which has no keys; set data.eval as a whole" in error_of(
        tmp_path, "data.eval=x.jsonl", "data.eval.limit=5"
    )


def test_a_stages_data_is_named_with_its_stage(tmp_path: Path) -> None:
    assert "stages.guide.data.limit: got 'x' (text); expected a whole number" in error_of(
        tmp_path, "stages.guide.data.limit=x"
    )
    assert "stages.guide.data.eval: got {'limit': 5}" in error_of(tmp_path, "stages.guide.data.eval.limit=5")


def test_the_offline_source_of_a_step_is_checked_and_counts_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a stage would be reused although its credit is another now."""
    monkeypatch.chdir(tmp_path)
    step = "stages.train.credit=[{{name: token_rewards, source: {}}}]"
    for source, message in (("surprize", "did you mean 'surprise'"), ("5", "got 5; expected a name, or a mapping")):
        found = error_of(tmp_path, step.format(source), values=ONLINE)
        assert "stages.train.credit[0].source: " in found
        assert message in found
    judged = "stages.train.rewards=[{name: timemaster, labels: [a, b], judge: 'my.py:credit'}]"
    for override in (step.format("my.py:credit"), step.format("{name: 'my.py:credit'}"), judged):
        decided = []
        for number in (1, 2):
            (tmp_path / "my.py").write_text(f"def credit(batch):\n    return batch.columns['x'] * {number}\n")
            recipe = load_recipe("grpo", overrides=[override])
            decided.append(resolve_stages(recipe)[-1].decides(tmp_path, {}))
        assert decided[0] != decided[1]


def test_a_folder_does_not_hide_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dpo").mkdir()
    assert find_recipe("dpo").name == "dpo.yaml"
    (tmp_path / "mine").mkdir()
    with pytest.raises(RecipeError, match="mine: is a folder, not a recipe file"):
        load_recipe("mine")


def test_a_run_until_a_stage_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="until is 'trian', no stage; did you mean 'train'"):
        run_recipe(load_recipe("dpo", output=tmp_path / "run"), until="trian", dry_run=True)


def test_settings_of_critic_and_world_reward_are_checked(tmp_path: Path) -> None:
    assert "stages.train.critic: critic: lr = -1: Input should be greater than 0" in error_of(
        tmp_path, "stages.train.critic={lr: -1}", values=ONLINE
    )
    assert "stages.train.critic: critic: unknown setting 'lrr'; did you mean 'lr'?" in error_of(
        tmp_path, "stages.train.critic={lrr: 1}", values=ONLINE
    )
    world = ["data=world://arithmetic", "stages.train.rewards=[{name: world, wieght: 2}]"]
    message = error_of(tmp_path, *world, values=ONLINE)
    assert "stages.train.rewards[0]: reward 'world': unknown setting 'wieght'; did you mean 'weight'?" in message


@pytest.mark.parametrize("folder", ["1e3", "2024", "a #b", "a: b", "runs/😀"])
def test_a_run_folder_of_any_name(tmp_path: Path, folder: str) -> None:
    recipe = load_recipe(write(tmp_path, BASE), output=folder)
    assert recipe.output_dir == folder
    assert load_recipe(write(tmp_path, dump_recipe(recipe), "again.yaml")).output_dir == folder


def test_override_of_malformed_yaml(tmp_path: Path) -> None:
    assert "--set seed=[1: line 1" in error_of(tmp_path, "seed=[1")


def test_on_world_cannot_change_the_model(tmp_path: Path) -> None:
    values = {**BASE, "model": "world://stories", "on_world": {"model": "x"}}
    assert "on_world.model: cannot be set there" in error_of(tmp_path, values=values)


# ---- The recipes that come with the project ----


def method_of(path: Path) -> str:
    """A recipe is called as its method is, or so with what the rows have behind it."""
    return path.stem.removesuffix("_images").removesuffix("_video")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_validate_on_the_world_and_on_other_models(path: Path) -> None:
    for recipe in (load_recipe(path), load_recipe(path, model="some/model", data="pairs.jsonl")):
        assert recipe.method == method_of(path)
        assert recipe.method in METHODS
        assert recipe.output_dir == f"runs/{path.stem}"
    assert all("max_steps" in s.training for s in resolve_stages(load_recipe(path)) if s.kind in TRAINED)
    others = resolve_stages(load_recipe(path, model="some/model", data="pairs.jsonl"))
    assert not any("max_steps" in s.training for s in others)


def test_every_method_has_a_recipe() -> None:
    recipes = {p.stem for p in RECIPES}
    assert {Path(m.recipe).stem for m in METHODS.values()} <= recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_run_what_the_registry_says(path: Path) -> None:
    method = METHODS[method_of(path)]
    objectives = [stage.objective for stage in resolve_stages(load_recipe(path)) if stage.objective is not None]
    assert objectives[-1]["name"] == method.objective


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_validate(path: Path) -> None:
    recipe = load_recipe(path)
    stages = resolve_stages(recipe)
    assert recipe.method == path.stem
    assert [s.kind for s in stages[:2]] == ["init", "sft"]
    assert stages[-1].model.path == "@sft"


def test_every_key_of_the_schema_is_documented() -> None:
    from tokengrain import specs
    from tokengrain.recipe import schema

    models = [specs.ModelSpec, specs.TokenizerSpec, specs.DataSpec, specs.SeriesSpec, specs.LoraSpec]
    models += [specs.TeacherSpec, specs.PromptSpec]
    models += [schema.Recipe, schema.RewardStage, schema.OnlineStage]
    models += [schema.SftStage, schema.TrainStage, schema.AnnotateStage]
    for model in models:
        for name, info in model.model_fields.items():
            assert info.description or name == "kind", f"{model.__name__}.{name} has no description"


@pytest.mark.parametrize(
    "path", [*RECIPES, *EXAMPLES, ROOT / "examples/hh/base.yaml"], ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_recipes_explain_themselves(path: Path) -> None:
    assert path.read_text().startswith("# ")


def test_make_recipe_takes_plain_values() -> None:
    assert make_recipe(BASE).method == "tgdpo"


def test_rows_of_several_files(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "x", "chosen": " {name}", "rejected": " c"}}\n')
    a, b = (str(tmp_path / f"{name}.jsonl") for name in "ab")
    for train, count in (([a, b], 2), ({a: 2.0, b: 1}, 3)):
        rows, _ = open_rows(DataSpec(train=train, eval_fraction=0), seed=0)
        assert len(list(rows)) == count
        assert DataSpec(train=train).stage is None


def test_names_that_other_libraries_have() -> None:
    """One table: each name gets its hint, and what it leads to is there."""
    for name in PENALTIES:
        with pytest.raises(RecipeError, match=f"training.{name}: unknown key; there is no such penalty"):
            load_recipe("grpo", overrides=[f"stages.train.training.{name}=1"])
    for name, target in FOREIGN.items():
        with pytest.raises(RecipeError) as error:
            load_recipe("grpo", overrides=[f"stages.train.training.{name}=1"])
        assert f"stages.train.training.{name}: unknown key" in str(error.value)
        assert str(error.value).endswith(f"is here: {target}")
        place, _, key = target.partition(",")[0].partition(".")
        there = {
            "training": OnlineConfig.__dataclass_fields__,
            "objective": {"name", *signature(grpo_loss).parameters},
            "data": {*TokenizeConfig.__dataclass_fields__, *DataSpec.model_fields},
            "lora": LoraSpec.model_fields,
            "model": ModelSpec.model_fields,
        }
        assert not key or place not in there or key in there[place], target
    for override, place in (
        ("beta=0.3", "objective.beta"),
        ("objective=grpo", "objective"),
        ("training.max_completion_length=9", "training.max_new_tokens"),
        ("training.max_new_tokens=9", "training.max_new_tokens"),
        ("max_new_tokens=9", "training.max_new_tokens"),
        ("actor_rollout_ref.rollout.n=8", "training.num_generations"),
        ("actor_rollout_ref.actor.kl_loss_coef=0.1", "objective.beta"),
        ("actor_rollout_ref.rollout.temperature=0.7", "training.temperature"),
        ("algorithm.kl_ctrl.kl_coef=0.1", "objective.beta"),
    ):
        with pytest.raises(RecipeError, match=rf"unknown key; .*: '?stages\.train\.{place}"):
            load_recipe("grpo", overrides=[override])
