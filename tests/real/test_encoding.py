"""Rows become the tokens that the published templates write."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.real.models import NAMES, missing, place
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs, prepare_sft

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]
USER = {"role": "user", "content": "What is 17 + 25?  Say it in French, too."}
ANSWER = {"role": "assistant", "content": "17 + 25 = 42, quarante-deux.\n\nÇa va?"}
WRONG = {"role": "assistant", "content": "43, je crois 🤔"}
SYSTEM = {"role": "system", "content": "You are brief."}
PROMPTS = {
    "one question": [USER],
    "system": [SYSTEM, USER],
    "second turn": [USER, ANSWER, {"role": "user", "content": "Are you sure?"}],
}
TRL = {"qwen3": "qwen3", "gemma3": "gemma3", "llama3_1": "llama3"}  # tokenizer: template of TRL's for training


def tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(place(name))


def trl_template(name: str) -> str:
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("TRL is not installed")
    return (Path(found.origin).parent / "chat_templates" / f"{name}_training.jinja").read_text(encoding="utf-8")


def ids(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))


@pytest.mark.parametrize("shape", PROMPTS)
@pytest.mark.parametrize("name", NAMES)
def test_chat_rows_are_what_the_template_writes(name: str, shape: str) -> None:
    made, prompt = tokenizer(name), PROMPTS[shape]
    sample = prepare_pairs([{"prompt": prompt, "chosen": [ANSWER], "rejected": [WRONG]}], made)[0]
    assert list(sample.prompt_ids) == ids(made, prompt, add_generation_prompt=True)
    for completion, answer in zip(sample.completions, (ANSWER, WRONG), strict=True):
        whole, ours = ids(made, [*prompt, answer]), [*sample.prompt_ids, *completion.ids]
        assert whole[: len(ours)] == ours
        assert made.decode(whole[len(ours) :]).strip() == "", "only white space may follow the end of the turn"
        assert answer["content"] in made.decode(completion.ids)


@pytest.mark.parametrize("name", NAMES)
def test_plain_rows_are_prompt_and_completion_as_one_text(name: str) -> None:
    made, row = tokenizer(name), {"prompt": "The sky is", "chosen": " blue today.", "rejected": " made of 12 stones"}
    sample = prepare_pairs([row], made, TokenizeConfig(chat=False))[0]
    assert list(sample.prompt_ids) == made(row["prompt"])["input_ids"]
    for completion, side in zip(sample.completions, ("chosen", "rejected"), strict=True):
        expected = made(row["prompt"] + row[side])["input_ids"] + [made.eos_token_id]
        assert [*sample.prompt_ids, *completion.ids] == expected


@pytest.mark.parametrize("name", TRL)
def test_turns_that_count_are_those_of_trls_templates(name: str) -> None:
    """TRL marks what the assistant says in its own templates; ours counts the same tokens with them.

    But for the line break behind the end of a turn, which TRL counts in all turns but the last: no model says it.
    """
    made, template = tokenizer(name), trl_template(TRL[name])
    messages = [*PROMPTS["second turn"], WRONG]
    marked = made.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    sample = prepare_sft([{"messages": messages}], made, TokenizeConfig(chat_template=template))[0]
    completion = sample.completions[0]
    counted = [False] * len(sample.prompt_ids) + list(completion.counted or [True] * len(completion.ids))
    ours = [*sample.prompt_ids, *completion.ids]
    assert list(marked["input_ids"])[: len(ours)] == ours
    theirs = [bool(mark) for mark in marked["assistant_masks"]][: len(ours)]
    apart = [made.decode([token]) for token, our, their in zip(ours, counted, theirs, strict=True) if our != their]
    assert sum(counted) > 20
    assert apart == ["\n"] * (name != "llama3_1")
