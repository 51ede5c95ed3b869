"""Messages: chat templates, turns that count, end-of-turn tokens."""

import pytest

from tests.data.tokenizers import (
    CHATML,
    LLAMA2,
    REWRITING_MARKED,
    REWRITING_PLAIN,
    GreedyTokenizer,
    gpt2_like,
    llama_like,
    merging_bpe,
)
from tokengrain.batch import TokenBatch
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs, prepare_sft
from tokengrain.data.tokens import tokenizer_fingerprint
from tokengrain.errors import DataError, ModelError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


PAIR = {
    "prompt": [{"role": "system", "content": "Be kind."}, user("what colour is the sky?")],
    "chosen": [assistant("It is blue.")],
    "rejected": [assistant("It is black.")],
}
LLAMA_PAIR = {**PAIR, "prompt": [user("what colour is the sky?")]}


def chat_ids(tokenizer, text):
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def counted_text(tokenizer, completion):
    keep = completion.counted or [True] * len(completion.ids)
    return tokenizer.decode([i for i, k in zip(completion.ids, keep) if k])


@pytest.mark.parametrize("make", [gpt2_like, lambda t: merging_bpe(True, t)], ids=["gpt2", "merging, bos"])
def test_chatml(make):
    tokenizer = make(CHATML)
    sample = prepare_pairs([PAIR], tokenizer)[0]
    heading = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nwhat colour is the sky?<|im_end|>\n"
    prompt = heading + "<|im_start|>assistant\n"
    for text, completion in zip(("It is blue.", "It is black."), sample.completions):
        # The template's newline behind the end-of-turn token is left out, and no EOS follows the end of turn.
        assert sample.prompt_ids + completion.ids == chat_ids(tokenizer, prompt + text + "<|im_end|>")
        assert completion.counted is None
        assert completion.ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert sample.raw == PAIR


def test_llama2_template_brings_its_own_bos():
    tokenizer = llama_like(LLAMA2)
    sample = prepare_pairs([LLAMA_PAIR], tokenizer)[0]
    whole = "<s>[INST] what colour is the sky? [/INST] It is blue. </s>"
    assert sample.prompt_ids + sample.completions[0].ids == chat_ids(tokenizer, whole)
    assert sample.prompt_ids.count(tokenizer.bos_token_id) == 1
    assert sample.completions[0].ids.count(tokenizer.eos_token_id) == 1


def test_template_without_end_of_turn_gets_eos():
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    sample = prepare_pairs([PAIR], gpt2_like(template))[0]
    assert gpt2_like().decode(sample.completions[0].ids) == " It is blue.\n</s>"
    bare = prepare_pairs([PAIR], gpt2_like(template), TokenizeConfig(add_eos=False))[0]
    assert gpt2_like().decode(bare.completions[0].ids) == " It is blue.\n"


def test_tokenizer_without_offsets():
    letters = sorted(set("".join(m["content"] for k in PAIR.values() for m in k) + "systemassistantuser\n"))
    tokenizer = GreedyTokenizer([*letters, "It is ", "blue", "is b", "nt\n"])
    tokenizer.chat_template = CHATML
    sample = prepare_pairs([PAIR], tokenizer)[0]
    assert tokenizer.convert_ids_to_tokens(sample.completions[0].ids) == ["It is ", "blue", ".", "<|im_end|>"]
    several = {**PAIR, "chosen": [assistant("blue"), user("sky"), assistant("is blue.")]}
    completion = prepare_pairs([several], tokenizer)[0].completions[0]
    kept = [t for t, k in zip(completion.ids, completion.counted) if k]
    assert tokenizer.convert_ids_to_tokens(kept) == [
        "blue", "<|im_end|>", "is b", "l", "u", "e", ".", "<|im_end|>",
    ]  # fmt: skip


def test_no_template():
    with pytest.raises(ModelError, match=r"has no chat template; expected .*chat_template:"):
        prepare_pairs([PAIR], gpt2_like())


def test_template_from_the_configuration(tmp_path):
    path = tmp_path / "chatml.jinja"
    path.write_text(CHATML)
    want = prepare_pairs([PAIR], gpt2_like(CHATML))[0]
    for template in (CHATML, str(path)):
        assert prepare_pairs([PAIR], gpt2_like(), TokenizeConfig(chat_template=template))[0] == want
    with pytest.raises(ModelError, match=r"chat_template is '/nowhere/x\.jinja'; expected"):
        prepare_pairs([PAIR], gpt2_like(), TokenizeConfig(chat_template="/nowhere/x.jinja"))


def test_the_fingerprint_sees_what_is_in_a_templates_file(tmp_path):
    path = tmp_path / "chatml.jinja"
    path.write_text(CHATML)
    config = TokenizeConfig(chat_template=str(path))
    before = tokenizer_fingerprint(gpt2_like(), config)
    assert before == tokenizer_fingerprint(gpt2_like(), TokenizeConfig(chat_template=CHATML))
    path.write_text(CHATML + " ")
    assert tokenizer_fingerprint(gpt2_like(), config) != before


def test_rewards_by_character_find_a_short_message_behind_headings_with_the_same_letters():
    def several(last):
        return [assistant("Let me see."), {"role": "tool", "content": "9"}, assistant(last)]

    row = {
        "prompt": [user("x")],
        "chosen": several("a"),  # also a letter of "assistant" in the heading before it
        "rejected": several("no"),
        "chosen_token_rewards": [{"message": 2, "start": 0, "end": 1, "reward": 1.0}],
        "rejected_token_rewards": [{"message": 2, "start": 0, "end": 2, "reward": -1.0}],
    }
    tokenizer = merging_bpe(False, CHATML)
    chosen = prepare_pairs([row], tokenizer)[0].completions[0]
    counted = [i for i, counts in zip(chosen.ids, chosen.counted) if counts]
    rewarded = [tokenizer.decode([i]) for i, r in zip(counted, chosen.columns["token_rewards"]) if r]
    assert rewarded == ["a"]


def test_template_variables():
    template = CHATML + "{% if loud %}!{% endif %}"
    config = TokenizeConfig(chat_template=template, chat_template_kwargs={"loud": True})
    text = gpt2_like().decode(prepare_pairs([PAIR], gpt2_like(), config)[0].completions[0].ids)
    assert text.endswith("<|im_end|>\n!</s>")


def test_template_that_refuses_a_role():
    with pytest.raises(DataError, match=r"row 0: field 'prompt': the chat template cannot render.*only user and"):
        prepare_pairs([PAIR], llama_like(LLAMA2))


def test_template_that_changes_the_prompt():
    # As Mistral's, which writes the system message only while no answer follows: the prompt is what generation sees.
    template = "{% if messages[-1]['role'] == 'user' %}Be kind.{% endif %}" + CHATML
    sample = prepare_pairs([PAIR], gpt2_like(template))[0]
    assert gpt2_like().decode(sample.prompt_ids).startswith("Be kind.<|im_start|>system")
    assert gpt2_like().decode(sample.completions[0].ids) == "It is blue.<|im_end|>"
    template = CHATML.replace("assistant\n", "assistant").replace(
        "{{ m['content']", "{{ messages | length }}{{ m['content']"
    )
    with pytest.raises(DataError, match="field 'chosen': the chat template renders the prompt differently"):
        prepare_pairs([PAIR], gpt2_like(template))


def test_generation_prompt_that_says_more_than_an_answer_begins_with():
    template = CHATML.replace("assistant\n", "assistant\n<think></think>")
    sample = prepare_pairs([PAIR], gpt2_like(template))[0]
    # The prompt ends as generation would begin; an answer that begins with the same characters loses none of them.
    assert gpt2_like().decode(sample.prompt_ids).endswith("<|im_start|>assistant\n<think></think>")
    assert gpt2_like().decode(sample.completions[0].ids) == "It is blue.<|im_end|>"
    tagged = prepare_pairs([{**PAIR, "chosen": [assistant("<the sky>")]}], gpt2_like(template))[0]
    assert tagged.prompt_ids == sample.prompt_ids
    assert gpt2_like().decode(tagged.completions[0].ids) == "<the sky><|im_end|>"


OPENINGS = ["<think>\n", "<think>", "[THINK]", "<|channel|>analysis<|message|>"]  # of generation prompts
REASONS = (  # as Qwen3-Thinking: reasoning is taken out of the content and written behind the opening
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think>\n"
    "{{ m.reasoning_content or m['content'].split('</think>')[0].split('<think>')[-1] | trim }}\n</think>\n\n"
    "{{ m['content'].split('</think>')[-1] | trim }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def opens(opening, template=CHATML):
    return template.replace("assistant\n{% endif", f"assistant\n{opening}{{% endif")


def texts(row, template, prepare=prepare_pairs, config=None):
    """The prompt, and what counts of the first completion."""
    tokenizer = gpt2_like(template)
    sample = prepare([row], tokenizer, config)[0]
    return tokenizer.decode(sample.prompt_ids), counted_text(tokenizer, sample.completions[0])


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("before", ["", "\n"])
@pytest.mark.parametrize("behind", ["", "\n", " ", "\n\n"])
def test_a_thought_is_opened_once(opening, before, behind):
    """Whatever the white space around it, the content's opening is the generation prompt's."""
    content = before + opening.strip() + behind + "add</think>4"
    row = {**PAIR, "chosen": [assistant(content)], "rejected": [assistant("It is black.")]}
    single = {"prompt": PAIR["prompt"], "completion": row["chosen"]}
    for prompt, completion in (texts(row, opens(opening)), texts(single, opens(opening), prepare_sft)):
        assert prompt.endswith("<|im_start|>assistant\n" + opening)
        assert completion.lstrip() == "add</think>4<|im_end|>"


@pytest.mark.parametrize("content", ["<think>\nadd\n</think>\n\n4", "<think>add</think>4"])
def test_a_thought_that_the_template_writes_behind_its_opening(content):
    row = {**PAIR, "chosen": [assistant(content)]}
    reasoning = {**PAIR, "chosen": [{**assistant("4"), "reasoning_content": "add"}]}
    prompt, completion = texts(row, REASONS)
    assert prompt.endswith("assistant\n<think>\n")
    assert completion == "add\n</think>\n\n4<|im_end|>"
    assert texts(reasoning, REASONS) == (prompt, completion)
    dataset = prepare_pairs([row], gpt2_like(REASONS), TokenizeConfig(on_dropped="keep"))
    assert not dataset.report.dropped


def test_thoughts_in_several_turns():
    """Every turn begins behind its generation prompt, one without a thought as the template writes it."""
    chosen = [assistant("<think>\nadd</think>4"), user("and the sea?"), assistant("<think>\nsub</think>5")]
    counted = "add</think>4<|im_end|>sub</think>5<|im_end|>"
    assert texts({**PAIR, "chosen": chosen}, opens("<think>\n"))[1] == counted
    chosen[2] = assistant("<think>sub</think>5")
    assert texts({**PAIR, "chosen": chosen}, opens("<think>\n"))[1] == counted
    chosen[2] = assistant("<the sea>")
    assert texts({**PAIR, "chosen": chosen}, opens("<think>\n"))[1] == "add</think>4<|im_end|><the sea><|im_end|>"
    # A template that marks turns in a form of their own: none of the prompt counts.
    marked = opens("<think></think>", REWRITING_MARKED)
    assert texts(MULTI, marked)[1] == "It is blue.<|im_end|><think></think>Green.<|im_end|>"
    # The headings are no part of a later turn, nor are its first letters part of the heading.
    several = {**MULTI, "chosen": [*MULTI["chosen"][:2], assistant("<the sea>")]}
    plain = opens("<think>\n", REWRITING_PLAIN.replace("<think></think>", "{{ 'Well, ' }}"))
    assert texts(several, plain)[1] == "It is blue.<|im_end|>Well, <the sea><|im_end|>"


def test_a_call_keeps_its_first_letters():
    """It begins with a letter of the thought that the generation prompt opens."""
    template = opens(
        "<think>\n", CHATML.replace("<|im_end|>", "{% if m.tool_calls %}<tool>sky</tool>{% endif %}<|im_end|>")
    )
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "sky", "arguments": {}}}]}
    assert texts({**PAIR, "chosen": [call]}, template)[1] == "<tool>sky</tool><|im_end|>"


@pytest.mark.parametrize("chosen", [assistant("<think>add</think>4"), {**assistant("4"), "reasoning_content": "add"}])
def test_a_thought_behind_an_empty_one(chosen):
    thinks = CHATML.replace(
        "{{ m['content']",
        "{{ '<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '' }}{{ m['content']",
    )
    template = opens("<think>\n\n</think>\n\n", thinks)
    with pytest.raises(DataError, match=r"field 'chosen': the chat template renders the prompt differently.*goes with"):
        prepare_pairs([{**PAIR, "chosen": [chosen]}], gpt2_like(template))


def test_an_answer_begun_with_a_thought():
    """The prompt is the row's; the template may write other white space behind the opening."""
    prompt = [user("the sky?"), assistant("<think>the")]
    row = {"prompt": prompt, "chosen": [assistant(" sky</think>4")], "rejected": [assistant(" sea</think>4")]}
    before, after = texts(row, REASONS)
    assert before.endswith("assistant\n<think>the")
    assert after == " sky\n</think>\n\n4<|im_end|>"


@pytest.mark.parametrize("content", ["<think>\nadd</think>4", "<think>add</think>4", "\n<think> add</think>4"])
def test_rewards_by_character_in_a_thought_that_the_prompt_opens(content):
    spans = [{"start": 0, "end": content.index("add") + 3, "reward": 1.0}]
    at = len(content) - 1
    spans.append({"start": at, "end": at + 1, "reward": 2.0})
    row = {**PAIR, "chosen": [assistant(content)], "chosen_token_rewards": spans, "rejected_token_rewards": []}
    tokenizer = gpt2_like(opens("<think>\n"))
    chosen = prepare_pairs([row], tokenizer)[0].completions[0]
    found = {
        r: tokenizer.decode([i for i, x in zip(chosen.ids, chosen.columns["token_rewards"]) if x == r])
        for r in (1.0, 2.0)
    }
    assert found == {1.0: "add", 2.0: "4"}


def test_a_marked_turn_ends_with_its_end_of_turn_token():
    """Not with the heading of the next message, where the block includes white space behind the token."""
    marked = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
        "{% if loop.last %}<think></think>{% endif %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert texts(MULTI, marked)[1] == "It is blue.<|im_end|><think></think>Green.<|im_end|>"


MULTI = {
    "prompt": [user("the sky?")],
    "chosen": [assistant("It is blue."), user("and the sea?"), assistant("Green.")],
    "rejected": [assistant("It is black."), {"role": "tool", "content": "green"}, assistant("Six.")],
}


@pytest.mark.parametrize("make", [gpt2_like, lambda t: merging_bpe(False, t)], ids=["gpt2", "merging"])
def test_only_the_assistant_counts(make):
    tokenizer = make(CHATML)
    sample = prepare_pairs([MULTI], tokenizer)[0]
    chosen, rejected = sample.completions
    assert counted_text(tokenizer, chosen) == "It is blue.<|im_end|>Green.<|im_end|>"
    assert counted_text(tokenizer, rejected) == "It is black.<|im_end|>Six.<|im_end|>"
    whole = tokenizer.apply_chat_template(MULTI["prompt"] + MULTI["chosen"], tokenize=False)
    assert sample.prompt_ids + chosen.ids == chat_ids(tokenizer, whole.rstrip())
    batch = TokenBatch.from_samples([sample])
    assert batch.segments.lengths.tolist() == [chosen.n_counted, rejected.n_counted]
    assert batch.segments.total < batch.completion_ids.numel()


def test_eos_counts_behind_several_turns():
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = gpt2_like(template)
    chosen, rejected = prepare_pairs([MULTI], tokenizer)[0].completions
    assert counted_text(tokenizer, chosen) == " It is blue.\n Green.\n</s>"
    assert counted_text(tokenizer, rejected) == " It is black.\n Six.\n</s>"


def test_template_that_rewrites_earlier_turns():
    # By their headings (Qwen 3's template is of this kind), or by `{% generation %}` blocks.
    for template in (REWRITING_PLAIN, REWRITING_MARKED):
        tokenizer = gpt2_like(template)
        chosen = prepare_pairs([MULTI], tokenizer)[0].completions[0]
        assert counted_text(tokenizer, chosen) == "It is blue.<|im_end|><think></think>Green.<|im_end|>"
    unmarked = REWRITING_PLAIN.replace("<|im_start|>{{ m['role'] }}\n", "").replace("<|im_start|>assistant\n", "")
    with pytest.raises(DataError, match=r"field 'chosen': the chat template rewrites earlier turns.*generation"):
        prepare_pairs([MULTI], gpt2_like(unmarked))
    # One turn needs no such marks.
    sample = prepare_pairs([PAIR], gpt2_like(REWRITING_PLAIN))[0]
    assert tokenizer.decode(sample.completions[0].ids) == "<think></think>It is blue.<|im_end|>"


def test_implicit_prompt_and_repeated_prompt():
    want = prepare_pairs([PAIR], gpt2_like(CHATML))[0]
    implicit = {side: PAIR["prompt"] + PAIR[side] for side in ("chosen", "rejected")}
    repeated = {**implicit, "prompt": PAIR["prompt"]}
    as_text = {**implicit, "prompt": "what colour is the sky?"}
    for row in (implicit, repeated, as_text):
        sample = prepare_pairs([row], gpt2_like(CHATML))[0]
        assert (sample.prompt_ids, sample.completions, sample.raw) == (
            want.prompt_ids,
            want.completions,
            want.raw,
        )


def test_keys_without_a_value_are_as_if_absent():
    row = {k: [{**m, "tool_calls": None, "name": None} for m in v] for k, v in PAIR.items()}
    assert prepare_pairs([row], gpt2_like(CHATML))[0] == prepare_pairs([PAIR], gpt2_like(CHATML))[0]


def test_sft_messages():
    row = {"messages": [*MULTI["prompt"], *MULTI["chosen"], user("thanks")]}
    tokenizer = gpt2_like(CHATML)
    sample = prepare_sft([row], tokenizer)[0]
    assert len(sample.completions) == 1
    assert sample.completions[0] == prepare_pairs([MULTI], tokenizer)[0].completions[0]
    assert sample.raw["prompt"] == MULTI["prompt"]


BAD = {
    "begins or ends with the role 'user'": {**PAIR, "rejected": [assistant("a"), user("b")]},
    "message 0 has no role": {**PAIR, "chosen": [{"content": "a"}]},
    "the content of message 0 is of type int": {**PAIR, "chosen": [{"role": "assistant", "content": 3}]},
    "message 0 is not an object": {**PAIR, "chosen": ["It is blue."]},
    "completion is empty": {**PAIR, "rejected": [assistant(" ")]},
    "has no messages": {**PAIR, "rejected": []},
    "is equal to 'chosen'": {**PAIR, "rejected": PAIR["chosen"]},
    "is messages while the prompt is text": {**PAIR, "prompt": "hello", "chosen": [user("no"), *PAIR["chosen"]]},
    "is text while the other completion is messages": {**PAIR, "chosen": "It is blue."},
    "there is no prompt": {"chosen": PAIR["chosen"], "rejected": PAIR["rejected"]},
}


@pytest.mark.parametrize("what", BAD)
def test_bad_messages(what):
    with pytest.raises(DataError, match=what) as caught:
        prepare_pairs([PAIR, BAD[what]], gpt2_like(CHATML))
    assert caught.value.row == "1"
    assert caught.value.field in ("prompt", "chosen", "rejected")
