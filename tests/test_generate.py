"""`generate` and `merge`: answers as benchmarks read them, resumed exactly; adapters as whole models."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.data.tokenizers import CHATML, gpt2_like
from tests.training.tiny import tiny_llama
from tokengrain import generate as module
from tokengrain import models
from tokengrain.cli import main
from tokengrain.errors import DataError, ModelError, RecipeError, RunError
from tokengrain.generate import generate
from tokengrain.rollout.local import HFGenerate

ROWS = [{"prompt": f"Question {n}: four?", "level": n} for n in range(5)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    def save(name: str, template: str | None) -> str:
        folder = tmp_path_factory.getbasetemp() / f"generate-{name}"
        if not folder.exists():
            tokenizer = gpt2_like(template) if template else gpt2_like()
            tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture
def plain(saved: Callable[..., str]) -> str:
    return saved("plain", None)


@pytest.fixture
def chat(saved: Callable[..., str]) -> str:
    return saved("chat", CHATML)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def greedy(folder: str, text: str, most: int) -> str:
    """By `transformers` alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=most, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False))


def test_rows_keep_their_columns(plain: str, tmp_path: Path) -> None:
    found = generate(plain, ROWS, tmp_path / "out.jsonl", max_new_tokens=6)
    rows = lines(found.output)
    assert [row["level"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["completion"] for row in rows] == [greedy(plain, row["prompt"], 6) for row in ROWS]
    assert list(tmp_path.iterdir()) == [found.output]
    several = generate(plain, ROWS[:2], tmp_path / "several.json", max_new_tokens=6, samples=3, temperature=1.0)
    assert [len(set(row["completions"])) for row in json.loads(several.output.read_text())] == [3, 3]


def test_messages_and_a_system_message(chat: str, tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "four?"}]}]
    generate(chat, rows, tmp_path / "a.jsonl", max_new_tokens=5)
    before = AutoTokenizer.from_pretrained(chat).apply_chat_template(
        rows[0]["prompt"], tokenize=False, add_generation_prompt=True
    )
    assert lines(tmp_path / "a.jsonl")[0]["completion"] == greedy(chat, before, 5)
    generate(chat, [{"prompt": "four?"}], tmp_path / "b.jsonl", max_new_tokens=5, chat=True)
    assert lines(tmp_path / "b.jsonl")[0]["completion"] == greedy(chat, before, 5)
    generate(chat, [{"prompt": "four?"}], tmp_path / "c.jsonl", max_new_tokens=5, chat=True, system="Be kind.")
    assert lines(tmp_path / "c.jsonl")[0]["completion"] != greedy(chat, before, 5)


def test_alpaca_eval(chat: str, tmp_path: Path) -> None:
    questions = [{"instruction": "Say four.", "dataset": "helpful", "output": "of another model", "generator": "gpt"}]
    generate(chat, questions, tmp_path / "out.json", max_new_tokens=5, name="mine")
    (answer,) = json.loads((tmp_path / "out.json").read_text())
    assert list(answer) == ["dataset", "instruction", "output", "generator"]
    assert (answer["generator"], answer["instruction"]) == ("mine", "Say four.")
    assert answer["output"] != "of another model"


def test_arena_hard(chat: str, tmp_path: Path) -> None:
    questions = [{"uid": "0a", "category": "hard_prompt", "subcategory": "coding", "prompt": "Say four."}]
    generate(chat, questions, tmp_path / "mine.jsonl", max_new_tokens=5)
    (answer,) = lines(tmp_path / "mine.jsonl")
    assert (answer["uid"], answer["model"]) == ("0a", Path(chat).name)
    assert answer["messages"][0] == {"role": "user", "content": "Say four."}
    assert isinstance(answer["messages"][-1]["content"]["answer"], str)


def test_mt_bench_answers_turn_by_turn(chat: str, plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [
        {"question_id": 81, "category": "math", "turns": ["Say four.", "Again."]},
        {"question_id": 82, "category": "writing", "turns": ["Say six.", "Again."]},
    ]
    heat = []
    sample = HFGenerate.sample
    monkeypatch.setattr(
        HFGenerate,
        "sample",
        lambda self, *a, **k: heat.append(k["sampling"].temperature) or sample(self, *a, **k),
    )
    generate(chat, questions, tmp_path / "mine.jsonl", max_new_tokens=5)
    assert sorted(heat) == [0, 0, 0.7, 0.7]
    first, second = lines(tmp_path / "mine.jsonl")
    assert [first["question_id"], second["question_id"]] == [81, 82]
    turns = first["choices"][0]["turns"]
    dialogue = [{"role": "user", "content": "Say four."}, {"role": "assistant", "content": turns[0]}]
    text = AutoTokenizer.from_pretrained(chat).apply_chat_template(
        [*dialogue, {"role": "user", "content": "Again."}], tokenize=False, add_generation_prompt=True
    )
    assert turns[1] == greedy(chat, text, 5).strip()
    with pytest.raises(ModelError, match="several turns need a chat template"):
        generate(plain, questions, tmp_path / "plain.jsonl", max_new_tokens=5)


def _stopped_at_call(number: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ctrl-C at the model's `number`th batch; returns how many answers each batch was asked for."""
    answers, calls = module.Speaker.answers, []

    def interrupted(self: Any, asked: Any, *more: Any) -> Any:
        calls.append(len(asked))
        if len(calls) == number:
            raise KeyboardInterrupt
        return answers(self, asked, *more)

    monkeypatch.setattr(module.Speaker, "answers", interrupted)
    return calls


def test_a_stop_costs_nothing(plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call goes on to the same answers; one with other settings does not take them."""
    how: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}
    whole = generate(plain, ROWS, tmp_path / "whole.jsonl", **how)
    calls = _stopped_at_call(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        generate(plain, ROWS, tmp_path / "out.jsonl", batch_rows=2, **how)
    assert not (tmp_path / "out.jsonl").exists()
    with open(tmp_path / "out.jsonl.part", "a") as file:
        file.write('{"row": 4, "te')  # a line that a kill cut off
    with pytest.raises(RunError, match="answers with other settings"):
        generate(plain, ROWS, tmp_path / "out.jsonl", **{**how, "seed": 4})
    found = generate(plain, ROWS, tmp_path / "out.jsonl", batch_rows=3, **how)
    assert (found.resumed, calls) == (4, [2, 2, 1, 1])
    assert found.output.read_text() == whole.output.read_text()
    assert not (tmp_path / "out.jsonl.part").exists()


def test_what_does_not_fit_is_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    def refused(kind: type[Exception], message: str, rows: Any = ROWS, output: str = "out.jsonl", **how: Any) -> None:
        with pytest.raises(kind, match=message):
            generate("nowhere", rows, tmp_path / output, **how)

    refused(DataError, r"row 0: the row is no prompt; got \['text'\]; expected prompt, or the columns", [{"text": "a"}])
    refused(DataError, r"row 1: the row is no prompt", [ROWS[0], {"question": "a"}])
    refused(RecipeError, r"expected a name that ends in \.json", [{"instruction": "a"}])
    refused(RecipeError, "expected a name that ends in .json or .jsonl", output="out.csv")
    refused(RecipeError, "samples is 2; expected 1", [{"instruction": "a"}], "out.json", samples=2)
    refused(RecipeError, "format is 'mtbench'; expected one of", format="mtbench")
    (tmp_path / "there.jsonl").write_text("mine")
    refused(RunError, "exists", output="there.jsonl")


def adapter(base: str, folder: Path) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_merge(dtype: str, plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = adapter(plain, tmp_path / "adapter")
    with pytest.raises(SystemExit) as stop:
        main(["merge", str(trained), "-o", str(tmp_path / "whole"), "--dtype", dtype])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "whole")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert merged.dtype == (torch.float32 if dtype == "auto" else torch.bfloat16)
    generate(trained, ROWS, tmp_path / "a.jsonl", max_new_tokens=6, limit=1)
    assert len(lines(tmp_path / "a.jsonl")) == 1
    if dtype == "auto":
        said = greedy(str(tmp_path / "whole"), ROWS[0]["prompt"], 6)
        assert lines(tmp_path / "a.jsonl")[0]["completion"] == said != greedy(plain, ROWS[0]["prompt"], 6)
    with pytest.raises(ModelError, match="no adapter"):  # a path as an object is a path
        models.merge(tmp_path / "whole", tmp_path / "again")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "whole").get_vocab()
        == AutoTokenizer.from_pretrained(plain).get_vocab()
    )


def test_a_merge_that_is_not_true_is_an_error(plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = adapter(plain, tmp_path / "adapter")
    with pytest.raises(ModelError, match="is no adapter"):
        models.merge(plain, tmp_path / "whole")
    shutil.copytree(trained, tmp_path / "full")
    with pytest.raises(RunError, match="exists; give another folder"):
        models.merge(str(trained), tmp_path / "full")
    load = models.load_model

    def other_weights(spec: Any, path: str, **options: Any) -> Any:
        model = load(spec, path, **options)
        if not options:  # the one that was saved
            torch.nn.init.normal_(model.get_input_embeddings().weight)
        return model

    monkeypatch.setattr(models, "load_model", other_weights)
    with pytest.raises(ModelError, match="the saved model gives other logits"):
        models.merge(str(trained), tmp_path / "whole", "float16")
    assert not (tmp_path / "whole").exists()
    assert not list(tmp_path.glob(".merging*"))


def test_env(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with pytest.raises(SystemExit):
        main(["env"])
    shown = capsys.readouterr().out
    assert "torch: " in shown
    assert "devices: " in shown
    assert "secret" not in shown


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": None}, "row 1: field 'prompt': the row is no prompt; got None; expected text or messages"),
        ({"prompt": 5}, "row 1: field 'prompt': the row is no prompt; got 5"),
        ({"prompt": [{"role": "user"}]}, "row 1: field 'prompt': "),
    ],
)
def test_a_row_that_is_no_prompt(chat: str, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        generate(chat, [ROWS[0], row], tmp_path / "out.jsonl", max_new_tokens=2, batch_rows=1)


@pytest.mark.parametrize("turns", [[], "Say four.", [4], None])
def test_turns_that_are_none(chat: str, tmp_path: Path, turns: Any) -> None:
    with pytest.raises(
        DataError, match=r"row 0: field 'turns': the row is no prompt; got .*; expected a list of texts"
    ):
        generate(chat, [{"question_id": 1, "turns": turns}], tmp_path / "out.jsonl", max_new_tokens=2)


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"limit": -1}, {"batch_rows": 0}, {"samples": 0}])
def test_counts_are_positive(plain: str, tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=f"{next(iter(wrong))} is "):
        generate(plain, ROWS, tmp_path / "out.jsonl", **wrong)


def test_answers_of_another_format_are_not_taken(chat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark's prompts go through the chat template; the same rows as plain ones do not."""
    rows = [{"uid": str(n), "prompt": f"Say {n}."} for n in range(2)]
    _stopped_at_call(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        generate(chat, rows, tmp_path / "out.jsonl", max_new_tokens=2, batch_rows=1)
    with pytest.raises(RunError, match="answers with other settings"):
        generate(chat, rows, tmp_path / "out.jsonl", format="rows", max_new_tokens=2, batch_rows=1)


def test_the_input_is_not_replaced(plain: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    before = file.read_text()
    with pytest.raises(RecipeError, match=r"output '.*rows\.jsonl' is the input"):
        generate(plain, file, file, overwrite=True, max_new_tokens=2)
    assert file.read_text() == before


def test_a_column_that_the_answers_replace_is_said(
    plain: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, out = [{**ROWS[0], "completion": " 4"}], tmp_path / "a.jsonl"
    generate(plain, rows, out, max_new_tokens=2, samples=2)
    assert not caplog.records
    assert lines(out)[0]["completion"] == " 4"
    generate(plain, rows, out, max_new_tokens=2, overwrite=True)
    assert "column 'completion'" in caplog.text


def test_halves_of_surrogate_pairs_stay_as_they_are(plain: str, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    generate(plain, [{**ROWS[0], "meta": "\ud800x"}], out, max_new_tokens=2)
    assert lines(out)[0]["meta"] == "\ud800x"


def test_a_refused_setting_leaves_nothing(plain: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="temperature"):
        generate(plain, ROWS, tmp_path / "a.jsonl", temperature=float("inf"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.jsonl.part").write_text('{"settings": "of another call that wrote no answer"}\n')
    assert generate(plain, ROWS[:1], tmp_path / "a.jsonl", max_new_tokens=2).rows == 1
