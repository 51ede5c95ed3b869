"""What wrong input gets: the kind of error, and what its message must name.

The cases are in `error_messages.yaml`. A case passes if the error is of the named class (of a command: has the status),
and its message holds every fragment of `names` (file, row, field, value, expectation) and the suggestion of `suggests`.
Wording may improve: `today` is the message when the case was written; it is not compared.

Everything goes through the command line and the top-level names of `tokengrain`, so the cases outlive any change below
them.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification, PreTrainedTokenizerFast

import tokengrain
from tokengrain.cli import main

CASES = yaml.safe_load(Path(__file__).with_name("error_messages.yaml").read_text(encoding="utf-8"))
BASES = CASES.pop("bases")
ALL = {f"{group}: {name}": case for group, cases in CASES.items() for name, case in cases.items()}

GOOD = {"prompt": "the sky is", "chosen": " blue today", "rejected": " black"}
CHAT = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


# ---- What the cases use: a tokenizer, two models and a finished run, all tiny ----


@cache
def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """One token per word; unknown words are all alike."""
    words = ["<unk>", "<s>", "</s>", "user", "assistant", "the", "sky", "is", "blue", "today", "black", "red"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT if chat else None
    return made


def config(**more: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return LlamaConfig(vocab_size=len(tokenizer()), max_position_embeddings=32, **sizes, **more)


def language_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(config())


def samples() -> list[tokengrain.Sample]:
    sides = [tokengrain.Completion(ids=[8, 9, 2]), tokengrain.Completion(ids=[10, 2])]
    return [tokengrain.Sample(prompt_ids=[5, 6, 7], completions=sides, row="r0", raw={"prompt": "the sky is"})]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model, a reward model, and a run of one step."""
    folder = tmp_path_factory.mktemp("shared")
    torch.manual_seed(0)
    made = {"model": language_model(), "reward": LlamaForTokenClassification(config(num_labels=1))}
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    write(folder / "pairs.jsonl", [GOOD] * 4)
    recipe = write(folder / "recipe.yaml", filled(BASES["finished"], {"shared": folder}))
    tokengrain.train(recipe, quiet=True)
    return folder


# ---- Running a case ----


def write(path: Path, content: Any) -> Path:
    """A file of text, of YAML, or of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def filled(value: Any, places: dict[str, Path]) -> Any:
    """The value with folders in the place of `{here}` and `{shared}`, and objects in that of their names."""
    if isinstance(value, dict):
        return {k: filled(v, places) for k, v in value.items()}
    if isinstance(value, list):
        return [filled(v, places) for v in value]
    if not isinstance(value, str):
        return value
    objects: dict[str, Any] = {
        "<model>": language_model,
        "<tokenizer>": tokenizer,
        "<samples>": samples,
        "<nothing>": object,
    }
    if value in objects:
        return objects[value]()
    for name, folder in places.items():
        value = value.replace(f"{{{name}}}", str(folder))
    return value


def recipe_values(given: dict[str, Any]) -> Any:
    """A base with the values of `with` laid over it, by dotted key, and without the keys of `without`."""
    if "text" in given:
        return given["text"]
    values = copy.deepcopy(BASES[given["base"]])
    for key, value in given.get("with", {}).items():
        *above, last = key.split(".")
        place = values
        for name in above:
            place = place[name]
        place[last] = value
    for key in given.get("without", []):
        *above, last = key.split(".")
        place = values
        for name in above:
            place = place[name]
        del place[last]
    return values


def run_recipe(given: dict[str, Any], here: Path, places: dict[str, Path]) -> None:
    """Load it and show its plan, which trains nothing."""
    path = write(here / "recipe.yaml", filled(recipe_values(given), places))
    recipe = tokengrain.load_recipe(path, overrides=filled(given.get("set", []), places))
    tokengrain.run_recipe(recipe, dry_run=True, console=Console(quiet=True))


def read_rows(given: dict[str, Any], here: Path) -> None:
    """Read a file of rows: two good ones and a changed one, or the text that is given."""
    path = here / given.get("file", "pairs.jsonl")
    if "text" in given:
        write(path, given["text"])
    elif "rows" in given:
        write(path, given["rows"])
    elif "change" in given or "drop" in given:
        bad = {k: v for k, v in {**GOOD, **given.get("change", {})}.items() if k not in given.get("drop", ())}
        write(path, [GOOD, GOOD, bad])
    if given["read"] == "load_rows":
        list(tokengrain.load_rows(str(path), **given.get("options", {})))
        return
    settings = tokengrain.TokenizeConfig(**given.get("tokenize", {}))
    prepare = getattr(tokengrain, given["read"])
    list(prepare(str(path), tokenizer(given.get("chat", False)), settings))


def score(given: dict[str, Any], places: dict[str, Path]) -> None:
    """Reward the two completions of a prompt."""
    rewards = [tokengrain.make_reward(r.pop("name"), **r) for r in filled(given["rewards"], places)]
    batch = tokengrain.TokenBatch.from_samples(samples())
    rows = given.get("rows", [{"prompt": "the sky is"}] * 2)
    tokengrain.RewardSuite(rewards, tokenizer=tokenizer()).score(batch, texts=["blue today", "black"], rows=rows)


def make_trainer(given: dict[str, Any], here: Path, places: dict[str, Path]) -> None:
    """A trainer of the tiny model; `args` are the settings, `options` what else it is given."""
    kinds = {
        "PreferenceTrainer": (tokengrain.PreferenceTrainer, tokengrain.PreferenceConfig),
        "OnlineTrainer": (tokengrain.OnlineTrainer, tokengrain.OnlineConfig),
    }
    kind, settings = kinds[given["class"]]
    args = settings(str(here / "out"), use_cpu=True, report_to="none", max_steps=1, **given.get("args", {}))
    kind(language_model(), args, **filled(given.get("options", {}), places)).train()


def call(given: dict[str, Any], places: dict[str, Path]) -> None:
    getattr(tokengrain, given["name"])(
        *filled(given.get("args", []), places), **filled(given.get("settings", {}), places)
    )


def run_python(case: dict[str, Any], here: Path, places: dict[str, Path]) -> None:
    if "recipe" in case:
        run_recipe(case["recipe"], here, places)
    elif "rows" in case:
        read_rows(case["rows"], here)
    elif "score" in case:
        score(case["score"], places)
    elif "trainer" in case:
        make_trainer(case["trainer"], here, places)
    else:
        call(case["call"], places)


def run_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """A command in this process: (status, what it says on standard error)."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    found = capsys.readouterr()
    assert "Traceback" not in found.out + found.err
    return int(stop.value.code or 0), found.err


def found_error(
    case: dict[str, Any], here: Path, shared: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[list[str], str]:
    """What a case gets: names of the error's classes (or the status of a command), and the message."""
    places = {"here": here, "shared": shared}
    for name, content in case.get("files", {}).items():
        write(here / name, filled(content, places))
    if "command" in case:
        status, text = run_command(filled(case["command"], places), capsys)
        kinds = [f"status {status}"]
        text = re.sub(r"[\s│╭╮╰╯─]+", " ", text).strip()  # click draws a box, rich may break lines
    else:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is the question
            run_python(case, here, places)
        kinds, text = [c.__name__ for c in type(caught.value).__mro__], str(caught.value)
    for name, folder in places.items():
        text = text.replace(str(folder), f"{{{name}}}")
    return kinds, text


def holds(message: str, fragment: str) -> bool:
    """Whether the fragment is there, and not as a part of a longer word or number."""
    before = r"(?<!\w)" if re.match(r"\w", fragment) else ""
    after = r"(?!\w)" if re.search(r"\w$", fragment) else ""
    if re.match(r"\d", fragment):
        before = r"(?<![\w.-])"
    if re.search(r"\d$", fragment):
        after = r"(?!\w|\.\d)"
    return re.search(before + re.escape(fragment) + after, message) is not None


@pytest.fixture(autouse=True)
def one_thread_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ALL)
def test_message(name: str, tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = ALL[name]
    kinds, message = found_error(case, tmp_path, shared, capsys)
    assert case["error"] in kinds, message
    missing = [f for f in case["names"] if not holds(message, f)]
    assert not missing, f"{missing} not in: {message}"
    if "suggests" in case:
        assert f"did you mean '{case['suggests']}'" in message, message


COMMAND_LINE = [name for name, case in ALL.items() if "recipe" in case and case["error"] == "RecipeError"][::4]


@pytest.mark.parametrize("name", COMMAND_LINE)
def test_the_command_line_says_the_same(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every fourth wrong recipe also as `tokengrain train RECIPE --dry-run`: status 2, the message, no traceback."""
    case, places = ALL[name], {"here": tmp_path, "shared": tmp_path}
    for file, content in case.get("files", {}).items():
        write(tmp_path / file, filled(content, places))
    path = write(tmp_path / "recipe.yaml", filled(recipe_values(case["recipe"]), places))
    sets = [part for text in case["recipe"].get("set", []) for part in ("--set", text)]
    status, message = run_command(filled(["train", str(path), *sets, "--dry-run"], places), capsys)
    message = re.sub(r"\s+", " ", message).replace(str(tmp_path), "{here}")
    assert status == 2
    assert [f for f in case["names"] if not holds(message, re.sub(r"\s+", " ", f))] == []


# ---- The cases themselves ----


@pytest.mark.parametrize("base", BASES)
def test_without_the_mistake_there_is_no_error(base: str, tmp_path: Path, shared: Path) -> None:
    run_recipe({"base": base}, tmp_path, {"here": tmp_path, "shared": shared})


def test_good_rows_and_rewards_are_none(tmp_path: Path) -> None:
    for read in ("load_rows", "prepare_pairs", "prepare_sft"):
        read_rows({"read": read, "change": {}}, tmp_path)
    score({"rewards": [{"name": "format", "pattern": "blue"}]}, {})


def test_fragments_are_found_as_whole_words() -> None:
    message = "pairs.jsonl: row 12: field 'beta': got -1.5; did you mean 'beta'?"
    assert all(holds(message, f) for f in ("row 12", "'beta'", "-1.5", "12", "pairs.jsonl"))
    assert not any(holds(message, f) for f in ("row 1", "bet", "1.5", "1", "-1", "airs.jsonl", "5"))


def test_every_case_names_something() -> None:
    for name, case in ALL.items():
        assert len(case["names"]) + ("suggests" in case) >= 2 or case["error"] == "Exception", name
        assert len({"recipe", "rows", "score", "trainer", "call", "command"} & case.keys()) == 1, name
    assert len(ALL) >= 300
