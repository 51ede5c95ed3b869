"""Rows: their tokens, positions and predictors, padding, budgets; masks against the rule in words."""

import random

import pytest
import torch

from tests.scoring.models import batch_of, standard_batch
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.scoring.layouts import (
    PACKED_WIDTH,
    MaskForm,
    NotShareableError,
    RowCosts,
    build_masks,
    mask_forms,
    mask_mod,
    plan_rows,
    visible,
)

COSTS = RowCosts(hidden_size=16)
MODES = [{"layout": "shared"}, {"layout": "separate"}, {"layout": "auto"}, {"layout": "shared", "pack": True}]
MODES += [{"layout": "auto", "one_forward": True}, {"layout": "separate", "pack": True, "max_row_tokens": 30}]
# Padding costs much and attention nothing: by parts, several prompts go into one row.
BY_PARTS = RowCosts(hidden_size=10**6, by_parts=True)
MODES += [{"layout": layout, "costs": BY_PARTS} for layout in ("shared", "auto")]


def batches() -> list[TokenBatch]:
    generator = random.Random(0)
    out = [standard_batch()]
    for seed in range(4):
        lengths = [
            (generator.randint(1, 9), tuple(generator.randint(1, 8) for _ in range(generator.randint(1, 4))))
            for _ in range(5)
        ]
        out.append(batch_of(*lengths, holes=bool(seed % 2), seed=seed))
    return out


def context(rows, source: int, window: int | None) -> list[int]:
    """Ids the token at a flat position sees, itself included, in order of logical position."""
    r, at = divmod(source, rows.input_ids.shape[1])
    seen = visible(rows, window)[r, at].nonzero().squeeze(1)
    positions = rows.position[r, seen]
    assert len(set(positions.tolist())) == len(positions)
    return rows.input_ids[r, seen[positions.argsort()]].tolist()


@pytest.mark.parametrize("mode", MODES)
def test_every_counted_token_is_predicted_from_its_own_text(mode):
    """The rule in words: what a predictor sees is exactly the text before the token it predicts."""
    for batch in batches():
        found = {}
        for rows in plan_rows(batch, **{"costs": COSTS, **mode}):
            for source, target in zip(rows.source.tolist(), rows.target.tolist()):
                assert target not in found
                found[target] = (context(rows, source, None), context(rows, source, 4))
        flat = 0
        for c, group in enumerate(batch.group.tolist()):
            prompt, completion = batch.prompt(group).tolist(), batch.completion(c).tolist()
            start = int(batch.completion_offsets[c])
            for t in range(len(completion)):
                if batch.counted[start + t]:
                    text = prompt + completion[:t]
                    assert found.pop(flat) == (text, text[-4:])
                    flat += 1
        assert not found
        assert flat == batch.segments.total


def test_shared_rows_hold_the_prompt_once():
    batch = batch_of((10, (4, 4)))
    (shared,) = plan_rows(batch, "shared", COSTS)
    assert shared.input_ids.shape == (1, 10 + 3 + 3)
    assert shared.position[0].tolist() == [*range(10), 10, 11, 12, 10, 11, 12]
    assert not shared.causal
    (separate,) = plan_rows(batch, "separate", COSTS)
    assert separate.input_ids.shape == (2, 13)
    assert separate.causal


def test_auto_shares_only_where_it_pays():
    costs = RowCosts(hidden_size=384)
    assert not plan_rows(batch_of((256, (80, 80))), "auto", costs)[0].causal
    assert plan_rows(batch_of((16, (256, 256))), "auto", costs)[0].causal


def test_rows_of_like_length_go_together_and_budgets_hold():
    batch = batch_of(*[(n, (3,)) for n in (2, 3, 2, 90, 92, 3)])
    chunks = plan_rows(batch, "separate", RowCosts(hidden_size=16, overhead_tokens=16))
    assert sorted(c.input_ids.shape for c in chunks) == [(2, 94), (4, 5)]
    small = plan_rows(batch, "separate", COSTS, max_row_tokens=10)
    assert all(c.input_ids.shape[0] == 1 or c.input_ids.numel() <= 10 for c in small)
    (whole,) = plan_rows(batch, "separate", COSTS, max_row_tokens=10, one_forward=True)
    assert whole.input_ids.shape == (6, 94)


def test_packed_rows_hold_many_prompts_in_whole_blocks():
    batch = batch_of((20, (5, 6)), (30, (7,)), (10, (3, 3, 3)))
    (rows,) = plan_rows(batch, "shared", COSTS, pack=True)
    assert rows.input_ids.shape == (1, 128)
    several = plan_rows(batch, "shared", COSTS, pack=True, max_row_tokens=46)
    assert len(several) == 2


def test_where_attention_goes_by_parts_rows_are_filled():
    batch = batch_of((20, (5, 6)), (30, (7,)), (10, (3, 3, 3)))
    lengths = [20 + 4 + 5, 30 + 6, 10 + 2 + 2 + 2]
    (rows,) = plan_rows(batch, "shared", BY_PARTS)
    assert rows.input_ids.shape == (1, sum(lengths))
    assert (rows.tree >= 0).all()
    assert len(plan_rows(batch, "shared", BY_PARTS, max_row_tokens=40)) == 3, "a budget counts rows as they are"
    assert all(r.causal for r in plan_rows(batch, "separate", BY_PARTS))
    assert len(plan_rows(batch, "shared", RowCosts(hidden_size=16, by_parts=True))) > 1, "a part takes long to start"


def test_filled_rows_are_no_longer_than_their_masks_can_be():
    batch = batch_of(*[(100 + n, (30, 40)) for n in range(100)])
    (rows,) = plan_rows(batch, "shared", BY_PARTS)
    assert rows.input_ids.shape[1] <= 1.5 * PACKED_WIDTH
    assert (rows.tree >= 0).float().mean() > 0.98
    (long,) = plan_rows(batch_of((3000, (3, 4)), (10, (3, 4))), "shared", BY_PARTS)
    assert long.input_ids.shape == (1, 3005 + 15)


def test_empty_prompt():
    batch = TokenBatch.from_samples([Sample([], [Completion([3, 4])], row="r7")])
    with pytest.raises(ValueError, match="row r7: the prompt is empty"):
        plan_rows(batch, "auto", COSTS)


def test_a_completion_without_counted_tokens_costs_nothing():
    batch = TokenBatch.from_samples([Sample([5, 6], [Completion([3, 4], [False, False]), Completion([7])])])
    (rows,) = plan_rows(batch, "shared", COSTS)
    assert rows.input_ids.tolist() == [[5, 6]]
    assert (rows.source.tolist(), rows.target.tolist()) == ([1], [0])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("mode", MODES)
def test_block_mask_is_the_dense_mask(mode, window):
    from torch.nn.attention.flex_attention import create_mask

    for rows in plan_rows(standard_batch(), **{"costs": COSTS, **mode}):
        dense = build_masks(rows, MaskForm({"": window}), torch.float32, COSTS, flex=False)
        batch, width = rows.input_ids.shape
        allowed = create_mask(mask_mod(rows, window), batch, None, width, width, device="cpu")
        assert torch.equal(allowed, dense == 0)
        assert allowed.any(-1).all()
        block = build_masks(rows, MaskForm({"": window}), torch.float32, COSTS, flex=True)
        assert block.shape == (batch, 1, width, width)


def test_forms_of_masks():
    class Config:
        _attn_implementation = "sdpa"

        def __init__(self, **settings):
            self.__dict__.update(settings)

    mixed = Config(layer_types=["sliding_attention", "full_attention"], sliding_window=4)
    assert mask_forms(mixed) == [MaskForm({"full_attention": None, "sliding_attention": 4})]
    assert mask_forms(Config(sliding_window=4)) == [MaskForm({"": 4})]
    assert mask_forms(Config(sliding_window=4, use_sliding_window=False)) == [MaskForm({"": None})]
    for settings, reason in [
        ({"layer_types": ["chunked_attention"]}, "layers of type chunked_attention"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "layers of type linear_attention"),
        ({"_attn_implementation": "flash_attention_2"}, "takes no mask of its own"),
        ({"window_size": 4096}, "too long to test"),
    ]:
        with pytest.raises(NotShareableError, match=reason):
            mask_forms(Config(**settings))
