"""Attention by parts against attention under a dense mask: values, gradients, models, and where it is not used."""

import pytest
import torch
from torch.nn import functional as F

from tests.scoring.models import batch_of, gradients, standard_batch, tiny
from tests.scoring.test_models import check, expected_of, pair
from tokengrain.batch import TokenBatch
from tokengrain.scoring import layouts
from tokengrain.scoring.layouts import (
    MaskForm,
    RowCosts,
    Rows,
    TreeMask,
    build_masks,
    dense_mask,
    plan_rows,
    tree_spans,
)
from tokengrain.scoring.prepare import prepare
from tokengrain.scoring.score import score

COSTS = RowCosts(hidden_size=16)
BY_PARTS = RowCosts(hidden_size=384, by_parts=True)


def rectangle(batch: TokenBatch | None = None, **mode) -> Rows:
    (rows,) = plan_rows(batch or standard_batch(), "shared", COSTS, one_forward=True, **mode)
    return rows


def attend(rows: Rows, mask: torch.Tensor, dtype: torch.dtype, **kwargs) -> list[torch.Tensor]:
    """Outputs at real tokens, and gradients of queries, keys and values."""
    generator = torch.Generator().manual_seed(3)
    shape = (*rows.input_ids.shape, 3, 8)
    tensors = [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    real = (rows.tree >= 0)[:, None, :, None]
    out = F.scaled_dot_product_attention(*tensors, attn_mask=mask, **kwargs) * real
    grads = torch.autograd.grad(out, tensors, torch.randn(out.shape, generator=generator).to(dtype))
    return [out.detach(), *grads]


@pytest.fixture
def parts_used(monkeypatch) -> list[int]:
    """Every mask knows its trees, whatever it costs; one entry per attention that was done by parts."""
    used: list[int] = []
    real = layouts._TreeAttention.apply

    def counted(query, *rest):
        used.append(query.shape[2])
        return real(query, *rest)

    monkeypatch.setattr(layouts, "worth_it", lambda rows, trees, costs: True)
    monkeypatch.setattr(layouts._TreeAttention, "apply", counted)
    return used


def test_spans_of_trees():
    rows = rectangle(batch_of((5, (3, 1, 4)), (4, (2,))))
    assert [(t.row, t.start, t.end, t.ends) for t in tree_spans(rows)] == [(0, 0, 5, (7, 10)), (1, 0, 5, ())]
    assert tree_spans(rows)[0].completions == [(5, 7), (7, 10)]


def test_spans_of_packed_rows():
    rows = plan_rows(batch_of((5, (3, 2)), (4, (2,))), "shared", COSTS, pack=True)[0]
    assert [(t.start, t.end, t.ends) for t in tree_spans(rows)] == [(0, 5, (7, 8)), (8, 13, ())]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 4e-2)]
)
def test_parts_are_the_dense_attention(dtype, tolerance, pack, parts_used):
    rows = rectangle(pack=pack)
    mask = dense_mask(rows, None, dtype)
    expected = attend(rows, mask, dtype, scale=0.3)
    assert not parts_used
    found = attend(rows, TreeMask.of(mask, tree_spans(rows)), dtype, scale=0.3)
    assert parts_used
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_padding_is_finite_and_gets_no_gradient(parts_used):
    rows = rectangle(batch_of((9, (6, 7)), (3, (2,))))
    mask = TreeMask.of(dense_mask(rows, None, torch.float32), tree_spans(rows))
    query = torch.randn(2, 3, rows.input_ids.shape[1], 8, requires_grad=True)
    out = F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    out.sum().backward()
    padding = rows.tree[1] < 0
    assert padding.any()
    assert parts_used
    assert not out[1, :, padding].any()
    assert not query.grad[1, :, padding].any()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"dropout_p": 0.5},
        {"attn_mask": lambda m: m[..., :] + 0.0},
        {"attn_mask": lambda m: m.double().float()},
        {"attn_mask": lambda m: m.mul_(1.0)},
    ],
)
def test_what_parts_cannot_do_is_done_by_pytorch(kwargs, parts_used):
    rows = rectangle()
    mask = TreeMask.of(dense_mask(rows, None, torch.float32), tree_spans(rows))
    change = kwargs.pop("attn_mask", lambda m: m)
    torch.manual_seed(0)
    found = attend(rows, change(mask), torch.float32, **kwargs)
    torch.manual_seed(0)
    expected = attend(rows, dense_mask(rows, None, torch.float32), torch.float32, **kwargs)
    assert not parts_used
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox", "opt", "granite", "cohere"])
def test_models_give_the_numbers_of_plain_transformers(name, parts_used):
    model, ref = pair(name)
    batch = standard_batch()
    expected = expected_of(model, ref, batch)
    check(model, ref, batch, expected, layout="shared")
    assert parts_used


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_filled_rows_give_the_numbers_of_plain_transformers(name, parts_used, monkeypatch):
    model, ref = pair(name)
    batch = standard_batch()
    expected = expected_of(model, ref, batch)
    prepare(model), prepare(ref)
    parts_used.clear()
    monkeypatch.setattr(layouts, "_chunk_cost", lambda source, rows, costs: len(rows))
    check(model, ref, batch, expected, layout="shared")
    source = layouts.Source(batch)
    whole = sum(source.tree(p, completions).length for p, completions in enumerate(source.completions) if completions)
    assert set(parts_used) == {whole}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, parts_used):
    model, batch = tiny("llama"), standard_batch()
    expected = gradients(model, {"logps": score(model, batch, ("logps",), layout="separate").logps})
    assert not [w for w in parts_used if w > 20]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model, {"logps": score(model, batch, ("logps",), layout="shared").logps})
    assert parts_used
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6 * float(value.abs().max().clamp_min(1)))


def test_under_autocast(parts_used):
    model, batch = tiny("llama", dtype=torch.float32).eval(), standard_batch()
    prepare(model)
    parts_used.clear()
    found = []
    for layout in ("shared", "separate"):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            found.append(score(model, batch, ("logps",), layout=layout).logps)
    assert parts_used
    torch.testing.assert_close(*found, rtol=0, atol=0.2)
    assert not torch.equal(*found)


@pytest.mark.parametrize(("form", "costs"), [(MaskForm({"": 3}), BY_PARTS), (MaskForm({"": None}), COSTS)])
def test_windows_and_other_devices_have_dense_masks(form, costs, parts_used):
    rows = rectangle()
    assert not isinstance(build_masks(rows, form, torch.float32, costs, flex=False), TreeMask)


def test_long_rows_are_worth_it_and_short_ones_are_not():
    for lengths, expected in (((256, (128,) * 8), True), ((12, (8,) * 8), False)):
        rows = rectangle(batch_of(lengths))
        mask = build_masks(rows, MaskForm({"": None}), torch.float32, BY_PARTS, flex=False)
        assert isinstance(mask, TreeMask) == expected


def test_cheaper_attention_makes_sharing_pay_more_often():
    batch = batch_of((128, (192,) * 8))
    assert plan_rows(batch, "auto", RowCosts(hidden_size=384))[0].causal
    assert not plan_rows(batch, "auto", BY_PARTS)[0].causal


def test_float64_gradients_are_float64s_where_the_models_norm_is(parts_used, monkeypatch):
    """transformers' RMSNorm goes through float32: a last bit there is 6e-8, whoever does the attention."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def exact(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", exact)
    batch, found = standard_batch(), {}
    for layout in ("shared", "separate"):
        model = tiny("llama")
        score(model, batch, ("logps",), layout=layout).logps.square().sum().backward()
        found[layout] = torch.cat([p.grad.flatten() for p in model.parameters()])
    error = (found["shared"] - found["separate"]).abs().max() / found["separate"].abs().max()
    assert error < 1e-13
