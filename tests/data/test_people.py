"""Rows as other tools write them: the same rows give the same tokens, whatever holds them."""

from __future__ import annotations

import csv
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.tokenizers import CHATML, REWRITING_PLAIN, gpt2_like
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs, prepare_sft
from tokengrain.data.formats import canonical
from tokengrain.errors import DataError
from tokengrain.rank import candidates_of
from tokengrain.rollout.sampler import encode_prompts

# Writes tools, reasoning and tool calls, as Qwen3's template does.
TOOLS = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ROW = {"prompt": [user("the sky?")], "chosen": [assistant("It is blue.")], "rejected": [assistant("It is black.")]}


def ids(row, config=None, template=CHATML, prepare=prepare_pairs):
    sample = prepare([row], gpt2_like(template), config)[0]
    return sample.prompt_ids, [c.ids for c in sample.completions]


def text(row, config=None, template=CHATML, prepare=prepare_pairs):
    prompt, completions = ids(row, config, template, prepare)
    return gpt2_like().decode(prompt), gpt2_like().decode(completions[0])


# ---- nulls that Arrow makes


def call(name, **arguments):
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def tool(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def test_the_container_of_the_rows_does_not_change_their_tokens(tmp_path):
    first = {
        "prompt": [user("the sky?"), call("sky", at={"sea": "green"}), {"role": "tool", "content": "blue"}],
        "chosen": [call("night", end="it", parts=[{"a": "the"}, {"b": "sea"}])],
        "rejected": [call("sky", at={"colour": "black"})],
        "tools": [tool("sky", at={"type": "object"}), tool("night", end={"type": "string", "enum": ["it"]})],
        "chat_template_kwargs": {"loud": True},
    }
    rows = [
        first,
        {**first, "chosen": first["rejected"], "rejected": first["chosen"], "chat_template_kwargs": {"low": 1}},
    ]
    template = TOOLS + "{% if low is defined %}low{% endif %}"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    want = None
    for source in (rows, tmp_path / "a.jsonl", tmp_path / "a.parquet", datasets.Dataset.from_list(rows)):
        samples = prepare_pairs(source, gpt2_like(template)).samples
        got = [(s.prompt_ids, [c.ids for c in s.completions]) for s in samples]
        assert got == (want := want or got)
        prompts = [
            item.ids for item in encode_prompts(list(dict(enumerate(samples)) and _rows(source)), gpt2_like(template))
        ]
        assert prompts == [prompt for prompt, _ in want]
    assert "null" not in gpt2_like().decode(want[0][0] + want[0][1][0])
    assert gpt2_like().decode(want[1][1][0]).endswith("low</s>")


def _rows(source):
    from tokengrain.data.rows import load_rows

    return [row for _, row in load_rows(source)]


def test_json_text_in_place_of_objects():
    said = [{"role": "assistant", "tool_calls": [{"function": {"name": "sky", "arguments": '{"at":null,"n":[1]}'}}]}]
    row = {**ROW, "chosen": said, "tools": json.dumps([tool("sky", at={})])}
    prompt, completion = text(row, template=TOOLS)
    assert completion == '<call>sky {"at": null, "n": [1]}</call><|im_end|>', "text keeps its nulls"
    assert prompt == text({**row, "tools": [tool("sky", at={})]}, template=TOOLS)[0]
    assert prompt == text({**row, "tools": [json.dumps(tool("sky", at={}))]}, template=TOOLS)[0]
    with pytest.raises(DataError, match=r"row 0: field 'tools': is no JSON"):
        ids({**ROW, "tools": "[{"}, template=TOOLS)
    bad = [{**said[0], "tool_calls": [{"function": {"name": "sky", "arguments": "{"}}]}]
    with pytest.raises(DataError, match="row 0: field 'chosen': is no JSON"):
        ids({**ROW, "chosen": bad}, template=TOOLS)


# ---- other columns


ALIKE = {
    "prompt as text": {**ROW, "prompt": "the sky?"},
    "null prompt": {"prompt": None, **{k: ROW["prompt"] + ROW[k] for k in ("chosen", "rejected")}},
    "one message": {**ROW, "chosen": assistant("It is blue."), "rejected": assistant("It is black.")},
    "content parts": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "sky?"}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "It is blue.", "image_url": None}]}],
        "rejected": ROW["rejected"],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "the sky?"}],
        "chosen": {"from": "gpt", "value": "It is blue."},
        "rejected": {"from": "gpt", "value": "It is black."},
    },
    "alpaca": {"instruction": "the sky?", "input": "", "chosen": "It is blue.", "rejected": "It is black."},
}


@pytest.mark.parametrize("name", ALIKE)
def test_other_formats_of_the_same_pair(name):
    assert ids(ALIKE[name]) == ids(ROW)


@pytest.mark.parametrize("chat", [False, True])
def test_messages_in_a_csv_file(tmp_path, chat):
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROW))
        writer.writeheader()
        writer.writerow({name: json.dumps(messages) for name, messages in ROW.items()})
    sample = prepare_pairs(path, gpt2_like(CHATML), TokenizeConfig(chat=chat))[0]
    assert (sample.prompt_ids, [c.ids for c in sample.completions]) == ids(ROW)
    online = encode_prompts([{"prompt": json.dumps(ROW["prompt"])}], gpt2_like(CHATML), chat=chat)
    assert online[0].ids == ids(ROW)[0]
    own = {"messages": json.dumps([*ROW["prompt"], *ROW["chosen"]])}
    assert ids(own, prepare=prepare_sft) == (ids(ROW)[0], ids(ROW)[1][:1])
    printed = {**ROW, "chosen": str(ROW["chosen"])}
    with pytest.raises(DataError, match=r"field 'chosen': holds messages as Python prints them; .*JSON text"):
        ids(printed)
    lists = {"prompt": "the sky?", "chosen": '[{"value": "blue"}]', "rejected": "[{'value': 'black'}]"}
    assert text(lists) == ("the sky?", '[{"value": "blue"}]</s>'), "an answer that is JSON stays text"


@pytest.mark.parametrize("template", [CHATML, REWRITING_PLAIN])
@pytest.mark.parametrize(("first", "second"), [({"weight": 0}, {}), ({}, {"train": False}), ({"weight": 1}, {})])
def test_messages_that_are_read_and_not_learned(template, first, second):
    said = [{**assistant("It is blue."), **first}, user("the sea?"), {**assistant("Green."), **second}]
    tokenizer = gpt2_like(template)
    (completion,) = prepare_sft([{"messages": [user("the sky?"), *said]}], tokenizer)[0].completions
    counted = completion.counted or [True] * len(completion.ids)
    learned = tokenizer.decode([i for i, counts in zip(completion.ids, counted, strict=True) if counts])
    assert ("blue" in learned, "Green" in learned) == (first != {"weight": 0}, not second)
    assert learned.count("<|im_end|>") == 2 - (first == {"weight": 0}) - bool(second)


def test_weights_of_messages_that_are_unknown():
    alone = {"messages": [user("the sky?"), {**assistant("blue"), "weight": 0}]}
    with pytest.raises(DataError, match="field 'messages': no token of the completion is left to count"):
        ids(alone, prepare=prepare_sft)
    with pytest.raises(DataError, match=r"the weight of message 0 is unknown; got 0\.5; expected 0 or 1"):
        ids({**ROW, "chosen": [{**assistant("blue"), "weight": 0.5}]})


def test_single_completions_of_other_formats():
    turns = [("human", "the sky?"), ("gpt", "It is blue."), ("human", "the sea?"), ("gpt", "Green.")]
    shared = {"conversations": [{"from": who, "value": what} for who, what in turns]}
    own = {"messages": [user("the sky?"), assistant("It is blue."), user("the sea?"), assistant("Green.")]}
    assert ids(shared, prepare=prepare_sft) == ids(own, prepare=prepare_sft)
    alpaca = {"instruction": "the sea?", "input": "and the sky", "output": "Green.", "history": [["the sky?", "Blue."]]}
    prompt = [user("the sky?"), assistant("Blue."), user("the sea?\nand the sky")]
    want = ids({"prompt": prompt, "completion": [assistant("Green.")]}, prepare=prepare_sft)
    assert ids(alpaca, prepare=prepare_sft) == want
    calls = [("human", "x"), ("function_call", '{"name": "sky", "arguments": {"at": "sea"}}'), ("observation", "blue")]
    shared = {"conversations": [{"from": who, "value": what} for who, what in [*calls, ("gpt", "It is blue.")]]}
    _, completion = text(shared, template=TOOLS, prepare=prepare_sft)
    assert completion.startswith('<call>sky {"at": "sea"}</call><|im_end|>\n<|im_start|>tool\nblue<|im_end|>')


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"history": [["the sky?", "Blue.", "?"]]}, r"field 'history': is no list of pairs; got \[\['the sky\?'"),
        ({"history": 5}, "field 'history': is no list of pairs; got 5"),
        ({"history": "[["}, "field 'history': is no JSON"),
        ({"input": 5}, "field 'input': is not text; got 5; expected a string"),
        ({"tools": 5}, "field 'tools': is no list; got 5; expected a list of tools"),
    ],
)
def test_columns_of_alpaca_that_are_none(columns, message):
    with pytest.raises(DataError, match=message):
        ids({"instruction": "the sea?", "output": "Green.", **columns}, prepare=prepare_sft)


def test_a_system_column():
    with_message = {**ROW, "prompt": [{"role": "system", "content": "Be kind."}, *ROW["prompt"]]}
    for row in (ROW, with_message, ALIKE["prompt as text"], ALIKE["null prompt"], ALIKE["alpaca"]):
        assert ids({**row, "system": "Be kind."}) == ids(with_message)
    with pytest.raises(DataError, match=r"field 'system': the row has two system messages; got 'Be blue\.'"):
        ids({**with_message, "system": "Be blue."})
    plain = {"prompt": "the sky?", "chosen": " blue", "rejected": " black", "system": "Be kind."}
    with pytest.raises(
        DataError, match=r"field 'system': the column's text has no place in a row of text; .*chat: true"
    ):
        ids(plain)
    assert ids({**plain, "prompt": "Be kind. the sky?"}, template=None), "columns: may have put it there"
    assert ids({**plain, "system": None}, template=None)
    assert text(plain, TokenizeConfig(chat=True))[0].startswith("<|im_start|>system\nBe kind.<|im_end|>")


def test_completions_that_are_not_wanted_are_not_imitated():
    """TRL's unpaired preferences."""
    row = {"prompt": [user("the sky?")], "completion": [assistant("It is black.")]}
    assert ids({**row, "label": True}, prepare=prepare_sft) == ids({**row, "label": "sky"}, prepare=prepare_sft)
    with pytest.raises(DataError, match=r"field 'label': says that the completion is not wanted, .* expected true"):
        ids({**row, "label": False}, prepare=prepare_sft)
    assert ids({**ROW, "label": False}, prepare=prepare_sft) == ids(ROW, prepare=prepare_sft), "of pairs it is another"


def test_a_history_beside_a_prompt():
    turns, pairs = [user("the sea?"), assistant("Green.")], [["the sea?", "Green."]]
    rules = {"role": "system", "content": "Be kind."}
    want = ids({**ROW, "prompt": [rules, *turns, *ROW["prompt"]]})
    assert want == ids({**ROW, "history": pairs, "system_prompt": "Be kind."})
    assert want == ids({**ROW, "prompt": [rules, *ROW["prompt"]], "history": pairs})
    assert want == ids({**ROW, "prompt": [rules, *turns, *ROW["prompt"]], "history": pairs}), "said already"
    assert want == ids({**ALIKE["prompt as text"], "history": pairs, "system": "Be kind."})
    assert ids(ROW) == ids({**ROW, "history": []}) == ids({**ROW, "history": "of the row"}), "somebody's own column"
    assert canonical({"prompt": "the sky?", "history": []})["prompt"] == "the sky?"
    plain = {"prompt": "the sky?", "chosen": " blue", "rejected": " black", "history": pairs}
    with pytest.raises(DataError, match=r"field 'history': the column's text has no place .* `chat: true`"):
        ids(plain, template=None)
    assert ids({**plain, "prompt": "the sea? Green. the sky?"}, template=None)
    asked = text(plain, TokenizeConfig(chat=True))[0]
    assert asked.index("the sea?") < asked.index("Green.") < asked.index("the sky?")


@pytest.mark.parametrize("value", [[{"type": "text", "text": "Be kind."}], {"role": "system", "content": "Be kind."}])
@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_that_is_no_text(column, value):
    with pytest.raises(DataError, match=f"field '{column}': is not text; .* expected the system message's text"):
        ids({**ROW, column: value})


def test_text_rows_as_messages():
    plain = {"prompt": "the sky?", "chosen": "It is blue.", "rejected": "It is black."}
    chat = TokenizeConfig(chat=True)
    assert ids(plain, chat) == ids(ROW)
    implicit = {"chosen": "the sky? blue.", "rejected": "the sky? black."}
    assert text(implicit, chat) == ("<|im_start|>user\nthe sky?<|im_end|>\n<|im_start|>assistant\n", " blue.<|im_end|>")
    start = "\n\nHuman: the sky?\n\nAssistant: which?\n\nHuman: the night's\n\nAssistant:"
    dialogue = {"chosen": f"{start} black.", "rejected": f"{start} blue."}
    turns = [user("the sky?"), assistant("which?"), user("the night's")]
    said = {"prompt": turns, "chosen": [assistant("black.")], "rejected": [assistant("blue.")]}
    apart = {"prompt": start, "chosen": " black.", "rejected": " blue."}
    assert ids(dialogue, chat) == ids(apart, chat) == ids(said)
    marked = {**dialogue, "chosen_spans": [{"start": 1, "end": 6}], "rejected_spans": []}
    assert text(marked, chat)[1] == " black.<|im_end|>"
    fields = "chosen", "rejected"
    numbers = {f"{side}_token_rewards": [0.5] * len(tokens) for side, tokens in zip(fields, ids(said)[1])}
    assert ids({**dialogue, **numbers, "chosen_score": 1.0}, chat) == ids(said), "numbers count tokens"
    assert encode_prompts([plain], gpt2_like(CHATML), chat=True)[0].ids == ids(ROW)[0]
    several = {"prompt": "the sky?", "completions": ["It is blue.", "It is black."]}
    assert [e.completions[0] for e in candidates_of(several, chat=True)] == [ROW["chosen"], ROW["rejected"]]
    spans = TokenizeConfig(chat=True, spans="column")
    row = {**plain, "chosen_spans": [{"start": 6, "end": 10}], "rejected_spans": []}
    sample = prepare_pairs([row], gpt2_like(CHATML), spans)[0]
    assert any(sample.completions[0].columns["spans"])
    assert not any(sample.completions[1].columns["spans"])


def test_a_rows_own_template_variables():
    template = CHATML + "{{ ending }}"
    config = TokenizeConfig(chat_template_kwargs={"ending": "the end"})
    row = {**ROW, "chat_template_kwargs": {"ending": "the sea"}}
    assert text(ROW, config, template)[1].endswith("the end</s>")
    assert text(row, config, template)[1].endswith("the sea</s>")
    with pytest.raises(DataError, match="field 'chat_template_kwargs': is of type list"):
        ids({**ROW, "chat_template_kwargs": ["a"]})


@pytest.mark.parametrize("other", [[], [{"start": 0, "end": 2, "reward": 1.0}], "[]"])
def test_no_spans_on_this_side(other):
    row = {"prompt": "The sky is", "chosen": " blue.", "rejected": " black."}
    sample = prepare_pairs([{**row, "chosen_token_rewards": [], "rejected_token_rewards": other}], gpt2_like())[0]
    assert not any(sample.completions[0].columns["token_rewards"])
    assert any(sample.completions[1].columns["token_rewards"]) == (len(other) == 1)


def test_images_are_not_dropped():
    parts = [{"type": "text", "text": "the sky?"}, {"type": "image_url", "image_url": "x"}]
    with pytest.raises(DataError, match=r"field 'prompt': the row has pictures, and \w+ reads text alone"):
        ids({**ROW, "prompt": [{"role": "user", "content": parts}]})
    parts[1] = {"type": "input_audio", "input_audio": "x"}
    with pytest.raises(
        DataError, match=r"content of message 0 has a part that is neither text nor a picture; got .*au"
    ):
        ids({**ROW, "prompt": [{"role": "user", "content": parts}]})


# ---- what a template drops


def thinks(text_, thought):
    return {**assistant(text_), "reasoning_content": thought}


DROPPING = {
    "content": CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"),
    "role": CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"),
    "arguments": TOOLS.replace("{{ c.function.arguments | tojson }}", ""),
}


@pytest.mark.parametrize(
    ("change", "template", "field", "what"),
    [
        ({"chosen": [assistant("<think>the night</think>It is blue.")]}, DROPPING["content"], "chosen", "0: content"),
        ({"chosen": [thinks("It is blue.", "the night")]}, CHATML, "chosen", "0: reasoning_content"),
        ({"chosen": [{**call("sky", at="sea"), "content": "blue"}]}, CHATML, "chosen", "0: tool_calls"),
        ({"tools": [tool("sky")]}, CHATML, "tools", "tools"),
        ({"chosen": [call("sky", i=4)]}, DROPPING["arguments"], "chosen", "0: tool_calls"),
        ({"chat_template_kwargs": {"xml_tools": ["sky"]}}, CHATML, "chat_template_kwargs", "xml_tools"),
        ({"system": "Be kind."}, DROPPING["role"], "prompt", "0: content"),
    ],
)
def test_text_that_the_template_drops(change, template, field, what):
    row = {**ROW, **change}
    with pytest.raises(DataError, match=f"row 0: field '{field}': the chat template drops text of the row.*{what}"):
        ids(row, template=template)
    skipped = prepare_pairs([ROW, row], gpt2_like(template), TokenizeConfig(on_invalid="skip")).report
    assert skipped.skipped == {"dropped by the template": 1}
    report = prepare_pairs([ROW, row], gpt2_like(template), TokenizeConfig(on_dropped="keep")).report
    assert list(report.dropped.values()) == [1]
    assert report.notable
    assert f"the chat template drops {field}" in str(report)
    if field != "chosen":
        with pytest.raises(DataError, match="the chat template drops"):
            encode_prompts([row], gpt2_like(template))


def test_tools_beside_text():
    plain = {"prompt": "the sky?", "chosen": "It is blue.", "rejected": "It is black.", "tools": [tool("sea")]}
    with pytest.raises(
        DataError, match=r"row 0: field 'tools': has a tool that the row's text does not name; got 'sea'"
    ):
        ids(plain)
    with pytest.raises(DataError, match="does not name"):
        encode_prompts([plain], gpt2_like())
    assert ids({**plain, "prompt": "sea() the sky?"}) == ids({**plain, "prompt": "sea() the sky?", "tools": None})
    assert ids({"text": "sea() the sky?", "tools": plain["tools"]}, prepare=prepare_sft)
    report = prepare_pairs([plain], gpt2_like(), TokenizeConfig(on_dropped="keep")).report
    assert report.dropped == {"tools": 1}
    assert "sea" in text(plain, TokenizeConfig(chat=True), TOOLS)[0]


@pytest.mark.parametrize("empty", ["", " \n", None])
def test_where_nothing_is_said_nothing_is_dropped(empty):
    assert ids({**ROW, "chosen": [thinks("It is blue.", empty)]}) == ids({**ROW, "chosen": [assistant("It is blue.")]})


def test_what_a_template_writes_otherwise_is_not_dropped():
    """White space, JSON's escapes, and the reasoning of earlier answers, which templates leave out on purpose."""
    row = {
        "prompt": [user(' the\n\n"sky"? '), thinks("blue", "gone"), user("sea?")],
        "chosen": [thinks("It is\ngreen.", "the sea\n\nis")],
        "rejected": [assistant("It is black.")],
    }
    template = CHATML.replace("m['content']", "(m['content'] | trim | tojson if loop.first else m['content'])").replace(
        "\n{{", "\n{{ (m.reasoning_content or '').split() | join(' ') if loop.last else '' }}{{"
    )
    assert text(row, template=template)[1] == "the sea isIt is\ngreen.<|im_end|>"


def test_the_prompt_ends_as_generation_begins():
    """A template as DeepSeek-R1's, whose generation prompt opens the reasoning that it cuts out of answers."""
    template = DROPPING["content"].replace("assistant\n{%", "assistant\n<think>{%")
    row = {**ROW, "chosen": [assistant("<think>the sea</think>It is blue.")]}
    with pytest.raises(DataError, match="field 'chosen': the chat template drops text"):
        ids(row, template=template)
    kept = text(row, TokenizeConfig(on_dropped="keep"), template)
    assert kept == ("<|im_start|>user\nthe sky?<|im_end|>\n<|im_start|>assistant\n<think>", "It is blue.<|im_end|>")


def test_text_that_is_a_rendered_template_already_is_counted():
    row = {"prompt": "<|im_start|>user\nthe sky?<|im_end|>\n<|im_start|>assistant\n", "chosen": "blue<|im_end|>"}
    dataset = prepare_pairs([{**row, "rejected": "black"}], gpt2_like())
    assert dataset.report.ended == 1
    assert "1 texts end in a special token already" in str(dataset.report)
    assert gpt2_like().decode(dataset[0].completions[0].ids) == "blue<|im_end|></s>"
    assert prepare_pairs([{**row, "rejected": "black"}], gpt2_like(), TokenizeConfig(add_eos=False)).report.ended == 0


# ---- character spans and what a template strips


@pytest.mark.parametrize("around", [("", ""), (" \n", " "), ("", "\n\n")])
def test_spans_over_white_space_that_the_template_strips(around):
    """Gemma 3 and Llama 3 trim messages; the end-of-turn token stands where the white space was."""
    template = CHATML.replace("m['content']", "m['content'] | trim")
    whole = around[0] + "It is blue." + around[1]
    rewards = [{"start": 0, "end": len(around[0]) + 2, "reward": 2.0}, {"start": len(around[0]) + 6, "end": len(whole)}]
    rewards[1]["reward"] = 1.0
    row = {**ROW, "chosen": [assistant(whole)], "chosen_token_rewards": rewards, "rejected_token_rewards": []}
    tokenizer = gpt2_like(template)
    chosen = prepare_pairs([row], tokenizer)[0].completions[0]
    found = {r: "".join(tokenizer.decode([i]) for i, x in zip(chosen.ids, chosen.columns["token_rewards"]) if x == r)
             for r in (2.0, 1.0)}  # fmt: skip
    assert found == {2.0: "It", 1.0: " blue."}
    assert chosen.columns["token_rewards"][-1] == 0
    assert tokenizer.decode(chosen.ids[-1:]) == "<|im_end|>"
    only = {
        **row,
        "chosen": [assistant("It is blue.  ")],
        "chosen_token_rewards": [{"start": 11, "end": 13, "reward": 1.0}],
    }
    assert not any(prepare_pairs([only], tokenizer)[0].completions[0].columns["token_rewards"])
    # White space that the template leaves is the assistant's.
    kept = prepare_pairs([only], gpt2_like(CHATML))[0].completions[0]
    assert [r for r in kept.columns["token_rewards"] if r]
    assert kept.columns["token_rewards"][-1] == 0


# ---- dates


def test_a_template_that_writes_the_date_writes_the_same_for_all_rows_and_again_later():
    from datetime import datetime

    template = "{{ strftime_now('%H:%M:%S.%f') }}\n" + CHATML
    dataset = prepare_pairs([ROW] * 3, gpt2_like(template))
    assert len({tuple(s.prompt_ids) for s in dataset}) == 1
    other = prepare_pairs([ROW] * 3, gpt2_like(template))
    assert other.fingerprint != dataset.fingerprint
    assert dataset.clock is not None
    other.set_time(dataset.clock.now)
    assert other.fingerprint == dataset.fingerprint
    day = prepare_pairs([ROW], gpt2_like(template.replace("%H:%M:%S.%f", "%Y")))
    before = day.samples
    day.set_time(datetime.now())
    assert day.samples is before, "nothing is rendered again for the same year"
    day.set_time(datetime(1999, 1, 1))
    assert gpt2_like().decode(day[0].prompt_ids).startswith("1999")
    assert prepare_pairs([ROW], gpt2_like(CHATML)).clock is None


def test_a_date_is_written_as_strftime_writes_it_wherever_the_template_asks():
    formats = ("%e %B %Y", "%-d/%_m", "%A, %H:%M", "%d %b %Y")
    for form in formats:
        for template in (
            "{%set day = strftime_now('" + form + "') %}{%if strftime_now is defined%}{{ day }}{%endif%}|" + CHATML,
            CHATML.replace(
                "{% if add_generation_prompt %}",
                "{% if not day is defined %}{% set day = strftime_now('" + form + "') %}"
                "{% endif %}{% if add_generation_prompt %}{{ day }}|",
            ),
        ):
            dataset = prepare_pairs([ROW], gpt2_like(template), TokenizeConfig(on_dropped="keep"))
            assert dataset.clock.now.strftime(form) + "|" in gpt2_like().decode(dataset[0].prompt_ids), (form, template)
    given = prepare_pairs(
        [ROW], gpt2_like("{{ strftime_now(form) }}|" + CHATML), TokenizeConfig(chat_template_kwargs={"form": "%j"})
    )
    assert given.clock.now.strftime("%j|") in gpt2_like().decode(given[0].prompt_ids)


# ---- a prompt that ends with the beginning of the answer

TRIMS = (  # as Llama 3 and Gemma 3 do
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKS = (  # as Qwen3 does: an empty thought where an answer has none, and none in the generation prompt
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if '</think>' in m.content %}{{ m.content }}{% else %}<think>\n\n</think>\n\n{{ m.content }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BEGUN = [user("the sky?"), assistant("It is")]


@pytest.mark.parametrize("template", [CHATML, TRIMS])
@pytest.mark.parametrize(("begun", "rest"), [("It is", " blue."), ("It is ", "blue.")])
def test_a_prompt_that_begins_the_answer(template, begun, rest):
    """What the template writes for the whole answer, cut behind its beginning: offline, alone and online."""
    prompt = [user("the sky?"), assistant(begun)]
    row = {"prompt": prompt, "chosen": [assistant(rest)], "rejected": [assistant(rest.replace("blue", "black"))]}
    opening, whole = "<|im_start|>user\nthe sky?<|im_end|>\n<|im_start|>assistant\nIt is", " blue.<|im_end|>"
    before, after = text(row, template=template)
    assert before + after == opening + whole
    assert before.rstrip() == opening
    online = encode_prompts([{"prompt": prompt}], gpt2_like(template))[0].ids
    assert gpt2_like().decode(online).rstrip() == opening
    single = {"prompt": prompt, "completion": [assistant(rest)]}
    assert "".join(text(single, template=template, prepare=prepare_sft)) == opening + whole


def test_rewards_by_character_are_those_of_the_rest():
    row = {"prompt": BEGUN, "chosen": [assistant(" blue.")], "rejected": [assistant(" black.")]}
    spans = {"chosen_token_rewards": [{"start": 1, "end": 5, "reward": 2.0}], "rejected_token_rewards": []}
    sample = prepare_pairs([row | spans], gpt2_like(CHATML))[0]
    tokens = zip(sample.completions[0].ids, sample.completions[0].columns["token_rewards"])
    assert gpt2_like().decode([i for i, value in tokens if value == 2.0]).strip() == "blue"
    several = {**row, "chosen": [assistant(" blue."), user("sure?"), assistant("It is.")]}
    completion = prepare_pairs([several], gpt2_like(CHATML))[0].completions[0]
    counted = gpt2_like().decode([i for i, c in zip(completion.ids, completion.counted) if c])
    assert counted == " blue.<|im_end|>It is.<|im_end|>"


def test_a_thought_that_is_begun_goes_on():
    thought, rest = [user("the sky?"), assistant("<think>\nwater")], [assistant(" is blue\n</think>\n\nblue.")]
    row = {"prompt": thought, "chosen": rest, "rejected": [assistant("</think>\n\nblack.")]}
    assert text(row, template=THINKS)[0].endswith("<|im_start|>assistant\n<think>\nwater")
    plain = {"prompt": BEGUN, "chosen": [assistant(" blue.")], "rejected": [assistant(" black.")]}
    assert text(plain, template=THINKS)[0].endswith("assistant\n<think>\n\n</think>\n\nIt is")
    opens = THINKS.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    online = encode_prompts([{"prompt": thought}], gpt2_like(opens))[0].ids
    assert gpt2_like().decode(online).endswith("assistant\n<think>\nwater")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen": [assistant("It is blue.")], "rejected": [assistant("It is black.")]},
            "begins with the assis",
        ),
        ({"prompt": [user("the sky?"), assistant(" ")]}, "ends with the assistant's message.*that an answer begins"),
    ],
)
def test_a_beginning_that_is_none(row, message):
    given = {"prompt": BEGUN, "chosen": [assistant(" blue.")], "rejected": [assistant(" black.")]}
    with pytest.raises(DataError, match=message):
        prepare_pairs([given | row], gpt2_like(CHATML))
