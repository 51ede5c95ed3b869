"""Models as people have them: mixtures of experts, stretched positions, wrapped embeddings, callers' autocast."""

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import ModelError
from tokengrain.scoring import prepare
from tokengrain.scoring.model import lift_positions, positions, positions_of
from tokengrain.scoring.score import score

SAMPLES = [
    Sample([3, 4, 5, 6, 7, 8, 9], [Completion([10, 11, 12, 2]), Completion([13, 14, 2])]),
    Sample([15, 16], [Completion([17, 18, 19]), Completion([20, 2])]),
]


def causal(model_type: str, **values):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    more = {
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes | more | values))


def experts(model_type: str = "mixtral", **values):
    counts = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    name = "num_local_experts" if model_type in ("mixtral", "granitemoe") else "num_experts"
    return causal(model_type, **{name: 4, **counts, **values})


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe", "granitemoe"])
def test_load_balancing_is_the_own_forwards_on_one_text(model_type):
    model = experts(model_type)
    batch = TokenBatch.from_samples([Sample(SAMPLES[0].prompt_ids, SAMPLES[0].completions[:1])])
    text = torch.tensor([[*SAMPLES[0].prompt_ids, *SAMPLES[0].completions[0].ids[:-1]]])
    ours = score(model, batch, ("logps", "aux_loss")).aux_loss
    torch.testing.assert_close(ours, model(input_ids=text).aux_loss)
    ours.backward()
    assert any("gate" in n or "router" in n for n, p in model.named_parameters() if p.grad is not None and p.grad.any())


def test_load_balancing_counts_a_prompt_once_in_every_layout():
    model, batch = experts(), TokenBatch.from_samples(SAMPLES)
    found = {layout: score(model, batch, ("aux_loss", "logps"), layout=layout) for layout in ("shared", "separate")}
    torch.testing.assert_close(found["shared"].aux_loss, found["separate"].aux_loss)
    small = score(model, batch, ("aux_loss",), layout="separate", max_row_tokens=12).aux_loss
    torch.testing.assert_close(small, found["shared"].aux_loss)


def test_a_load_balancing_loss_that_is_not_known_is_an_error(monkeypatch):
    model = experts()
    score(model, TokenBatch.from_samples(SAMPLES))
    monkeypatch.delattr(f"{type(model).__module__}.load_balancing_loss_func")
    with pytest.raises(ModelError, match="expected output_router_logits: false"):
        score(model, TokenBatch.from_samples(SAMPLES), ("aux_loss",))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"max_position_embeddings": 16, "rope_parameters": YARN}, 64),
        ({"max_position_embeddings": 64, "rope_parameters": YARN}, 64),
        ({"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 32),
        ({"max_position_embeddings": 16, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 32),
        ({"max_position_embeddings": 16}, 16),
    ],
)
def test_positions_are_those_after_scaling(values, expected):
    model = causal("llama", **values)
    assert positions_of(model.config) == positions(model) == expected
    score(model, TokenBatch.from_samples([Sample([3] * (expected - 1), [Completion([4])])]))
    over = TokenBatch.from_samples([Sample([3] * expected, [Completion([4])])])
    with pytest.raises(ModelError, match=f"at most {expected}"):
        score(model, over)
    lift_positions(model, expected + 1)
    score(model, over)


def test_autocast_of_a_caller_does_not_stay():
    batch, model, other = TokenBatch.from_samples(SAMPLES), causal("llama"), causal("llama")
    plain = score(model, batch).logps
    with torch.autocast("cpu", torch.bfloat16):
        rounded = score(other, batch).logps
    assert not torch.equal(plain, rounded)
    assert torch.equal(score(other, batch).logps, plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(score(model, batch).logps, rounded)


def test_sharing_is_found_out_for_each_precision(monkeypatch):
    """A leak that 16 bits take for rounding: float32 looks for itself, in either order."""
    monkeypatch.setattr(prepare, "_hidden_error", lambda *_: 0.01)
    for order in ([True, False, True], [False, True, False]):
        model = causal("llama")
        for rounded in order:
            with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, enabled=rounded):
                warnings.simplefilter("ignore")
                assert (prepare.prepare(model).masks is not None) == rounded
