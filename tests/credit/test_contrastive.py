"""Contrastive prompting against a plain computation, and its edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.credit.small import llama, pairs, tokenizer
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import DataError, RecipeError
from tokengrain.method import make_credit
from tokengrain.methods.treg import TEMPLATES, ContrastiveTemplates, make_templates
from tokengrain.scoring.reference import FrozenReference

REVISE = ContrastiveTemplates(
    "revise better : {prompt} . {response} :", "revise worse : {prompt} . {response} :", "revise"
)
KIND = {"better": "write kindly{prompt}", "worse": "write rudely{prompt}", "drop_prefix": "write"}


def _plain(model: nn.Module, context: list[int], ids: list[int], counted: list[bool]) -> Tensor:
    """Log-probabilities of the counted ids after a context, by the model's own forward."""
    with torch.no_grad():
        logits = model(torch.tensor([context + ids])).logits[0]
    logps = torch.log_softmax(logits[len(context) - 1 : -1], -1)
    return logps.gather(1, torch.tensor(ids)[:, None])[:, 0][torch.tensor(counted)]


def _expected(model: nn.Module, tok: object, batch: TokenBatch, better: str, worse: str) -> Tensor:
    parts = []
    for c in range(batch.n_completions):
        ids = batch.completion(c).tolist()
        start, end = batch.completion_offsets[c : c + 2].tolist()
        counted = batch.counted[start:end].tolist()
        prompt = tok.decode(batch.prompt(int(batch.group[c])), skip_special_tokens=True)  # type: ignore[attr-defined]
        response = tok.decode(ids, skip_special_tokens=True)  # type: ignore[attr-defined]
        sides = []
        for template in (better, worse):
            text = template.replace("{prompt}", prompt).replace("{response}", response)
            context = [i for i in tok(text)["input_ids"] if i != 2]  # type: ignore[operator]
            sides.append(_plain(model, context, ids, counted))
        parts.append(torch.sigmoid(sides[0] - sides[1]) - 0.5)
    return torch.cat(parts)


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 40, 10_000])
def test_equals_a_plain_computation(chunk_tokens: int, holes: bool, eos: bool) -> None:
    model, tok = llama(), tokenizer(eos=eos)
    tok.add_eos_token = eos
    batch = pairs(tokenizer(), holes=holes)
    source = make_credit("contrastive", model=model, tokenizer=tok, templates=REVISE, chunk_tokens=chunk_tokens)
    credit = source(batch)
    assert not credit.requires_grad
    torch.testing.assert_close(credit, _expected(model, tok, batch, REVISE.better, REVISE.worse))
    assert (source.scored, source.shortened) == (4, 0)


def test_swapped_templates_negate_it_exactly_and_the_prompt_may_come_from_the_ids() -> None:
    model, tok = llama(), tokenizer()
    a = make_credit("contrastive", model=model, tokenizer=tok, templates=REVISE)(pairs(tok))
    b = make_credit("contrastive", model=model, tokenizer=tok, templates=REVISE.swapped())(pairs(tok, raw=False))
    assert torch.equal(a, -b)
    assert a.abs().max() > 1e-3


def test_an_instruction_may_replace_the_prompts_beginning() -> None:
    model, tok = llama(), tokenizer()
    source = make_credit("contrastive", model=model, tokenizer=tok, templates=KIND)
    batch = pairs(tok)
    better, worse = source.preview("write about the sea :", "")
    assert better == "<s> write kindly about the sea :"
    assert worse == "<s> write rudely about the sea :"
    credit = source(batch)
    for c in (0, 3):
        ids = batch.completion(c).tolist()
        prompt = batch.raw[c // 2]["prompt"].removeprefix("write")
        sides = [
            _plain(model, tok(f"write {how}{prompt}")["input_ids"], ids, [True] * len(ids))
            for how in ("kindly", "rudely")
        ]
        expected = 0.5 * torch.tanh((sides[0] - sides[1]) / 2)
        torch.testing.assert_close(batch.segments.split(credit)[c], expected)
    odd = TokenBatch.from_samples([Sample([4], [Completion([4])], row="r9", raw={"prompt": "about the sea"})])
    with pytest.raises(DataError, match=r"row r9: field 'prompt': .*begins with 'write'"):
        source(odd)


def test_chat_models_get_the_instruction_as_a_message() -> None:
    model, tok = llama(), tokenizer(chat=True)
    source = make_credit("contrastive", model=model, tokenizer=tok, templates=REVISE)
    batch = pairs(tok)
    chat = [f"user : {side} ." for side in (REVISE.better, REVISE.worse)]
    expected = _expected(model, tokenizer(bos=False), batch, *chat)
    torch.testing.assert_close(source(batch), expected)
    plain = make_credit("contrastive", model=model, tokenizer=tok, templates=REVISE, chat=False)
    assert not torch.allclose(plain(batch), source(batch))
    with pytest.raises(RecipeError, match="no chat template"):
        make_credit("contrastive", model=model, tokenizer=tokenizer(), templates=REVISE, chat=True)


def test_a_conversation_is_the_prompt_of_a_multi_turn_row() -> None:
    tok = tokenizer()
    turns = [
        {"role": "user", "content": "write about the sea"},
        {"role": "assistant", "content": [{"type": "text", "text": "the sea was calm"}]},
        {"role": "user", "content": "not calm"},
    ]
    seen: list[str] = []
    source = make_credit("contrastive", model=llama(), tokenizer=tok, templates=REVISE)
    tokenised = source._tokenised
    source._tokenised = lambda text: seen.append(text) or tokenised(text)  # type: ignore[method-assign, func-returns-value]
    source(TokenBatch.from_samples([Sample([4], [Completion([4])], raw={"prompt": turns})]))
    assert "User: write about the sea\n\nAssistant: the sea was calm\n\nUser: not calm" in seen[0]
    source(TokenBatch.from_samples([Sample([4], [Completion([4])], raw={"prompt": turns[:1]})]))
    assert seen[-2].startswith("revise better : write about the sea . ")


def test_long_contexts_lose_the_copies_never_the_completion() -> None:
    tok = tokenizer()
    batch = pairs(tok)
    lengths = batch.completion_offsets.diff().tolist()  # 8, 6, 7, 10 with EOS
    source = make_credit("contrastive", model=llama(), tokenizer=tok, templates=REVISE, positions=26)
    seen: list[list[int]] = []
    tokenised = source._tokenised

    def watch(text: str) -> list[int]:
        seen.append(tokenised(text))
        return seen[-1]

    source._tokenised = watch  # type: ignore[method-assign]
    credit = source(batch)
    assert credit.shape == (sum(lengths),)
    assert torch.isfinite(credit).all()
    assert source.scored == 4
    # Instruction: 4 words, <s>, prompt of 8 or 5, ".", ":", copy; with the completion at most 26.
    needed = [
        5 + 8 + 2 + 2 * 8 - 1 - 1,
        5 + 8 + 2 + 2 * 6 - 1 - 1,
        5 + 5 + 2 + 2 * 7 - 2,
        5 + 5 + 2 + 2 * 10 - 2,
    ]
    assert source.shortened == sum(n > 26 for n in needed)
    full = make_credit("contrastive", model=llama(), tokenizer=tok, templates=REVISE)(batch)
    for c, n in enumerate(needed):
        same = torch.equal(batch.segments.split(full)[c], batch.segments.split(credit)[c])
        assert same == (n <= 26)


def test_prompts_are_shortened_next_and_then_it_is_an_error() -> None:
    tok = tokenizer()
    batch = pairs(tok)
    tight = make_credit("contrastive", model=llama(), tokenizer=tok, templates=REVISE, positions=18)
    tight(batch)
    assert tight.shortened == 4
    impossible = make_credit("contrastive", model=llama(), tokenizer=tok, templates=REVISE, positions=12)
    with pytest.raises(DataError, match=r"row r0: the completion leaves no room .*12 positions"):
        impossible(batch)


def test_positions_come_from_the_models_config() -> None:
    tok = tokenizer()
    assert make_credit("contrastive", model=llama(positions=77), tokenizer=tok).positions == 77
    assert make_credit("contrastive", model=FrozenReference(llama(positions=33)), tokenizer=tok).positions == 33


def test_the_scorer_is_left_as_it_was_and_gets_no_gradient() -> None:
    model, tok = llama().train(), tokenizer()
    make_credit("contrastive", model=model, tokenizer=tok, templates=REVISE)(pairs(tok))
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_adapter_off() -> None:
    peft = pytest.importorskip("peft")
    base, tok = llama(), tokenizer()
    plain = make_credit("contrastive", model=llama(), tokenizer=tok, templates=REVISE)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    off = make_credit("contrastive", model=model, tokenizer=tok, templates=REVISE)
    on = make_credit("contrastive", model=model, tokenizer=tok, templates=REVISE, adapter_off=False)
    batch = pairs(tok)
    torch.testing.assert_close(off(batch), plain(batch))
    assert not torch.allclose(on(batch), plain(batch))
    before = off.fingerprint(), on.fingerprint()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_" in n).add_(1.0)
    assert off.fingerprint() == before[0]
    assert on.fingerprint() != before[1]
    with pytest.raises(RecipeError, match="has no adapter"):
        make_credit("contrastive", model=llama(), tokenizer=tok, adapter_off=True)


def test_fingerprints_tell_settings_and_weights_apart() -> None:
    tok = tokenizer()

    def of(seed: int = 0, **kwargs: object) -> str:
        settings = {"templates": REVISE, **kwargs}
        return make_credit("contrastive", model=llama(seed), tokenizer=tok, **settings).fingerprint()  # type: ignore[arg-type]

    assert of() == of()
    assert len({of(), of(seed=1), of(templates=REVISE.swapped()), of(positions=50)}) == 4


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_templates_differ_and_fill(name: str) -> None:
    better, worse = TEMPLATES[name].fill("What is {response}?", "It is {prompt}.")
    assert better != worse
    for side in (better, worse):
        assert "What is {response}?" in side  # what a user wrote is not a slot
        if TEMPLATES[name].shows_response:
            assert "It is {prompt}." in side


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("generel", "unknown templates 'generel'; did you mean 'general'"),
        ({"better": "{prompt}"}, "worse missing"),
        (
            {"better": "a {prompt}", "worse": "b {prompt}", "wrose": ""},
            "unknown key 'wrose'; did you mean 'worse'",
        ),
        ({"better": "a", "worse": "b {prompt}"}, "'better' has no slot {prompt}"),
        ({"better": "{prompt}", "worse": "{prompt}"}, "are equal"),
        ({"better": "{prompt}{response}", "worse": "b {prompt}"}, "in both sides or in neither"),
    ],
)
def test_bad_templates(templates: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_templates(templates)  # type: ignore[arg-type]


def test_by_name() -> None:
    tok = tokenizer()
    source = make_credit("contrastive", model=llama(), tokenizer=tok, templates=KIND, scale=-1)
    swapped = make_templates(KIND).swapped()
    flipped = make_credit("contrastive", model=llama(), tokenizer=tok, templates=swapped)
    batch = pairs(tok)
    assert torch.equal(source(batch), flipped(batch))
