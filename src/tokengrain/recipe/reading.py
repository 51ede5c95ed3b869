"""A recipe: the YAML file that says what to train, on what, with which method, in which stages.

    method: tgdpo
    model: world://stories      # folder | hub name | world://NAME | {config: {...}, tokenizer: {...}}
    data: world://stories       # file | hub name | world://NAME | {train: ..., eval: ..., max_length: ...}
    output_dir: runs/tgdpo
    training: {...}             # PreferenceConfig: all of transformers' TrainingArguments, and a few more
    stages:                     # in order; `@guide` is what stage `guide` made
      guide:  {kind: train, objective: {name: dpo, beta: 0.3}}
      credit: {kind: annotate, credit: {name: guide, model: "@guide", beta: 0.3}}
      train:  {kind: train, data: "@credit", objective: {name: tgdpo, beta: 0.3, alpha: 0.5}}
    on_world: {...}             # laid over the rest while `model` is a world://
    settings: paper             # optional: `paper: {...}` fills what is not set; nothing is fitted to rows and model
    extends: other.yaml         # optional: start from another file

Relative paths of data and models are relative to the working directory; `extends` to the recipe's own folder.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tokengrain.errors import RecipeError, explained, read_text, require, shown
from tokengrain.runs import is_run
from tokengrain.settings import nearest, parse_yaml
from tokengrain.specs import WORLD

Values = dict[str, Any]


@explained(RecipeError)
def find_recipe(name: str | Path) -> Path:
    """The file of a recipe given as a path or as the name of one that comes with tokengrain ("tgdpo").

    Looks at the path itself, `recipes/NAME.yaml` in the working directory, then the recipes of the package.
    """
    require(str(name), RecipeError, "the recipe's name is empty; expected a file, or a name such as dpo")
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file() or len(path.parts) > 1:
        return path
    for folder in recipe_folders():
        if (found := folder / f"{name}.yaml").is_file():
            return found
    if path.exists():  # `read_file` says what it is
        return path
    names = sorted({p.stem for folder in recipe_folders() for p in folder.glob("*.yaml")})
    raise RecipeError(f"{name}: no such recipe file{nearest(str(name), names)}")


def recipe_folders() -> list[Path]:
    """Where recipes are looked for by name: the working directory's, the installed ones, the checkout's."""
    package = Path(__file__).resolve().parent.parent
    folders = [Path("recipes"), package / "recipes", package.parent.parent / "recipes"]
    return [folder for folder in folders if folder.is_dir()]


@explained(RecipeError)
def read_file(path: Path, above: tuple[Path, ...] = ()) -> Values:
    """Read one recipe file with everything that it extends; `above`: files that extend it."""
    again = " -> ".join(str(p) for p in (*above, path))
    require(path.resolve() not in above, RecipeError, f"{path}: extends itself ({again})")
    if not path.exists() or path.is_dir():
        by = f" (extended by {above[-1]})" if above else ""
        kind = "is a folder, not a recipe file" if path.is_dir() else "no such recipe file"
        raise RecipeError(f"{path}: {kind}{by}{_near_file(path)}")
    text = read_text(path, RecipeError)
    values = parse_yaml(text, str(path))
    what = f"{path}: got {shown(values)}; expected a mapping of keys such as `method:` and `model:`"
    require(isinstance(values, dict), RecipeError, what)
    if path.name == "recipe.yaml" and is_run(path.parent):  # of a run, which is where the file is now
        values["output_dir"] = str(path.parent)
    bases = values.pop("extends", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    named = isinstance(bases, list) and all(isinstance(b, str) for b in bases)
    require(named, RecipeError, f"{path}: extends: got {shown(bases)}; expected a file name or a list of them")
    merged: Values = {}
    for base in bases:
        merged = merge(merged, read_file(path.parent / base, (*above, path.resolve())))
    return merge(merged, values)


def _near_file(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    names = sorted(p.name for p in path.parent.glob("*.y*ml"))
    if near := get_close_matches(path.name, names, n=1):
        return f"; did you mean {path.parent / near[0]}?"
    return f"; {path.parent} has {', '.join(names[:12])}" if names else ""


def merge(base: Values, over: Values) -> Values:
    """`over` on top of `base`, mapping by mapping; anything else replaces what was there.

    - `model` is replaced as a whole.
    - An objective, credit source or stage of another `name` or `kind` replaces the old one.
    - A stage set to null is removed. A new stage stands right after the stage before it in `over`, or first.
    """
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        if key == "stages" and isinstance(old, dict) and isinstance(value, dict):
            out[key] = _merge_stages(old, value)
        elif isinstance(old, dict) and isinstance(value, dict) and key != "model" and not _other(old, value):
            out[key] = merge(old, value)
        else:
            out[key] = copy.deepcopy(value)
    return out


def _other(old: Values, new: Values) -> bool:
    return any(key in old and key in new and old[key] != new[key] for key in ("name", "kind"))


def _merge_stages(base: Values, over: Values) -> Values:
    order = list(base)
    position = 0
    for name in over:
        if name not in order:
            order.insert(position, name)
        position = order.index(name) + 1
    merged = merge(base, {name: stage for name, stage in over.items() if stage is not None})
    return {name: merged[name] for name in order if name not in over or over[name] is not None}


def model_path(model: Any) -> str | None:
    """The path, hub name or world of a `model:` value; None if it is built from scratch."""
    if isinstance(model, Mapping):
        model = model.get("path")
    return model if isinstance(model, str) else None


def resolve(values: Values, model: str | None, data: str | None, overrides: Sequence[tuple[list[str], Any]]) -> Values:
    """Apply `--model`, `--data`, `paper`, `on_world` (only where the model is a world by then) and the overrides.

    Overrides, as (path of keys, value), win over `on_world`, which wins over the rest, which wins over `paper`. Among
    themselves the more general comes first, in whatever order they are given, so that each has an effect.
    """
    named = [([key], value) for key, value in (("model", model), ("data", data)) if value is not None]
    _check_given_once([*named, *overrides])
    overrides = sorted(overrides, key=lambda one: (len(one[0]), one[0][-1] != "name"))
    values = copy.deepcopy(values)
    replaced = {"model": (model, ("path", "config", "tokenizer")), "data": (data, ("train", "eval"))}
    for key, (given, sources) in replaced.items():
        if given is not None:
            old = values.get(key)
            kept = {k: v for k, v in old.items() if k not in sources} if isinstance(old, dict) else {}
            values[key] = {sources[0]: given, **kept} if kept else given
    if model is not None or data is not None:
        _check_same_kind(values)
    # What decides whether `on_world` counts comes first; the rest once, on top of all: a list that `on_world` replaces
    # has its entries only then, and another name drops the settings of `on_world` too.
    early = ("model", "on_world", "settings", "paper")
    for keys, value in overrides:
        if keys[0] in early:
            set_path(values, keys, value)
    values = _on_world(_with_paper(values), data)
    for keys, value in overrides:
        if len(keys) == 1 and keys[0] in SHORT_NAMES:
            _set_short(values, keys[0], value)
        elif value is None and len(keys) == 2 and keys[0] == "stages":
            _leave_out(values.get("stages"), keys[1])
        elif keys[0] not in early:
            _check_stage(values.get("stages"), keys, overrides)
            set_path(values, keys, value)
    return values


def _check_stage(stages: Any, keys: list[str], overrides: Sequence[tuple[list[str], Any]]) -> None:
    """A key of a stage that is not there: a new one, if its kind is given as well."""
    if keys[0] == "stages" and len(keys) > 2 and isinstance(stages, dict) and keys[1] not in stages:
        made = any(others[:2] == keys[:2] and others[2:] in ([], ["kind"]) for others, _ in overrides)
        require(made, RecipeError, f"--set {'.'.join(keys)}: no stage {keys[1]!r}{nearest(keys[1], stages)}")


def _leave_out(stages: Any, name: str) -> None:
    """`stages.sft=null`: the recipe without that stage."""
    known = stages if isinstance(stages, dict) else {}
    require(name in known, RecipeError, f"stages.{name} is null, and there is no such stage{nearest(name, known)}")
    del known[name]


def _check_given_once(overrides: Sequence[tuple[list[str], Any]]) -> None:
    """What is given twice, in other words perhaps, is an error: one of the two would have no effect."""
    for number, (keys, value) in enumerate(overrides):
        for others, other in overrides[:number]:
            if _plain(keys) == _plain(others) or _covers(keys, others) or _covers(others, keys):
                first, second = ".".join(others), ".".join(keys)
                what = f"{first} is given twice" if first == second else f"{first} and {second} set the same"
                raise RecipeError(f"{what}: {shown(other)} and {shown(value)}; give one of the two")


def _plain(keys: list[str]) -> list[str]:
    """Keys without what can be left out: `data.train` is `data`."""
    return keys[:-1] if len(keys) > 1 and _SHORT.get(keys[-2]) == keys[-1] else keys


def _covers(keys: list[str], others: list[str]) -> bool:
    """Whether the first is a short name, for all stages, of what the others set, for all of them or for one."""
    known = SHORT_NAMES.get(keys[0], ("", ""))[1].split() if len(keys) == 1 else ()
    return others[-2:-1] == ["training"] and others[-1] in known


SHORT_NAMES = {
    "lr": ("learning_rate", "learning_rate"),
    "epochs": ("num_train_epochs", "num_train_epochs max_steps"),
    "batch": (
        "per_device_train_batch_size",
        "per_device_train_batch_size gradient_accumulation_steps prompts_per_rollout",
    ),
}
"""Short for a key of `training:`, for all stages; with those that say otherwise for one of them, or something else."""


def _set_short(values: Values, name: str, value: Any) -> None:
    key, others = SHORT_NAMES[name]
    stages = values.get("stages")
    named = stages.items() if isinstance(stages, dict) else ()
    for place, here in (([], values), *((["stages", stage], own) for stage, own in named if isinstance(own, dict))):
        if isinstance(training := here.get("training"), dict):
            kept = {k: v for k, v in training.items() if k not in others.split()}
            set_path(values, [*place, "training"], kept)
        if name == "batch" and here.get("kind") == "online":
            set_path(values, [*place, "training", "prompts_per_rollout"], value)
    set_path(values, ["training", key], value)


def _check_same_kind(values: Values) -> None:
    """Where one of model and rows is given, a world's toy must not be left as the other."""
    rows = values.get("data")
    rows = rows.get("train") if isinstance(rows, dict) else rows
    places = {"model": model_path(values.get("model")), "data": rows if isinstance(rows, str) else None}
    toys = {name for name, place in places.items() if str(place).startswith(WORLD)}
    what = f"the model is {places['model'] or 'a new one'}, the rows are {places['data']}"
    why = "one of them is a toy, made for trying methods, and the other is not; give --model and --data together"
    require(len(toys) != 1, RecipeError, f"{what}: {why}")


def _block(values: Values, name: str) -> Values:
    """Settings for a case of their own, taken out of the recipe."""
    block = values.pop(name, None) or {}
    require(isinstance(block, dict), RecipeError, f"{name}: got {shown(block)}; expected a mapping of settings")
    for key in ("model", "on_world", "paper", "settings", "extends"):
        where = f"{name}.{key}"
        require(key not in block, RecipeError, f"{where}: cannot be set there; set it at the top of the recipe")
    stages = block.get("stages", {})
    what = f"{name}.stages: got {shown(stages)}; expected a mapping of stages"
    require(isinstance(stages, dict), RecipeError, what)
    return block


def _with_paper(values: Values) -> Values:
    """`values` without `paper`, which fills what is not set if the recipe asks for the paper's settings."""
    paper = _block(values, "paper")
    if values.get("settings") != "paper":
        return values
    own = values.get("stages")
    stages = {k: v for k, v in paper.get("stages", {}).items() if isinstance(own, dict) and k in own}
    return merge({**paper, "stages": stages}, _opened(values, paper))


def _on_world(values: Values, data: str | None) -> Values:
    """`values` without `on_world`, which is laid over the rest if the model is a world."""
    on_world = _block(values, "on_world")
    path = model_path(values.get("model"))
    if not on_world or path is None or not path.startswith(WORLD):
        return values
    if data is not None and isinstance(on_world.get("data"), dict):
        on_world = {**on_world, "data": {k: v for k, v in on_world["data"].items() if k not in ("train", "eval")}}
    return merge(_opened(values, on_world), on_world)


def _opened(values: Values, block: Values) -> Values:
    """`values` whose `data:`, if it is a source alone, can be laid over or under that of a block."""
    alone = isinstance(values.get("data"), str) and isinstance(block.get("data"), dict)
    return {**values, "data": {"train": values["data"]}} if alone else values


def parse_override(text: str) -> tuple[list[str], Any]:
    """`"a.b=c"` as `(["a", "b"], value)`, the value read as YAML."""
    name, equals, value = text.partition("=")
    keys = [key.strip() for key in name.split(".")]
    what = f"--set {text}: expected key=value with a dotted key, such as training.learning_rate=1e-4"
    require(equals and all(keys), RecipeError, what)
    if value.strip().startswith("@"):  # a stage's name, which YAML would want in quotes
        return keys, value.strip()
    return keys, parse_yaml(value, f"--set {text}")


def set_path(values: Values, keys: list[str], value: Any) -> None:
    """Set a dotted key; a number names an entry of a list. Whether the key is a legal one is for validation to say.

    Another `name` (of an objective, a credit source, a reward) drops the settings of the old one.
    """
    here: Any = values
    for depth, key in enumerate(keys[:-1]):
        place = _place(here, keys, depth)
        below = here[place] if isinstance(here, list) else here.get(key)
        short = _SHORT.get(keys[depth - 1] if isinstance(here, list) else key)
        if isinstance(below, str) and short is not None:
            below = {short: below}  # `data: file` is short for `data: {train: file}`
        below = {} if below is None else below
        at = ".".join(keys[: depth + 1])
        what = f"--set {'.'.join(keys)}: {at} is {shown(below)}, which has no keys; set {at} as a whole"
        require(isinstance(below, (dict, list)), RecipeError, what)
        here[place] = copy.copy(below)
        here = here[place]
    place = _place(here, keys, len(keys) - 1)
    if place == "name" and here.get("name") not in (None, value):
        here.clear()
    here[place] = value


def _place(here: Values | list[Any], keys: list[str], depth: int) -> Any:
    """Where `keys[depth]` is in `here`: the key, or the index of an entry that a list has."""
    key = keys[depth]
    if isinstance(here, dict):
        return key
    if key.isdecimal() and int(key) < len(here):
        return int(key)
    at = ".".join(keys[:depth])
    entries = f"its entries are {at}.0 to {at}.{len(here) - 1}" if len(here) > 1 else f"its entry is {at}.0"
    raise RecipeError(
        f"--set {'.'.join(keys)}: {at} is a list; {entries if here else 'it has no entries'}; to change which entries "
        f"it has, give the whole list: --set {at}='[...]'"
    )


_SHORT = {
    "data": "train",
    **dict.fromkeys(("model", "target", "contrast", "reverse"), "path"),
    **dict.fromkeys(("objective", "credit", "rewards", "sampler", "as"), "name"),
    "spans": "source",
}
