"""Training a mixture of experts: its load-balancing loss over micro-batches and after a resume; and rows beyond the
positions that a model was made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from tests.data.tokenizers import gpt2_like
from tests.training.tiny import VOCABULARY, make_samples, make_trainer, tiny_llama, weights
from tokengrain.batch import TokenBatch
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs
from tokengrain.errors import DataError
from tokengrain.scoring.score import score

COEFFICIENT, MOST = 3.0, 70


def experts() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    routing = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=VOCABULARY,
        num_key_value_heads=2,
        router_aux_loss_coef=COEFFICIENT,
        initializer_range=0.2,
        **sizes,
        **routing,
    )
    return AutoModelForCausalLM.from_config(config)


def test_the_balance_of_a_step_is_that_of_its_micro_batches(tmp_path: Path) -> None:
    """Their mean by counted tokens, with its gradient; whatever the accumulation steps."""
    samples = make_samples(8)
    shared: dict[str, Any] = {"max_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    found = []
    for size, steps in ((8, 1), (4, 2)):
        trainer = make_trainer(
            tmp_path / str(size),
            samples,
            model=experts(),
            learning_rate=0.1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_tokens_per_microbatch=MOST,
            train_sampling_strategy="sequential",
            **shared,
        )
        trainer.train()
        found.append((trainer, next(e for e in trainer.state.log_history if "loss" in e)))
    for (trainer, entry), cuts in zip(found, ([samples], [samples[:4], samples[4:]])):
        model = experts()
        parts = [part for cut in cuts for part in TokenBatch.from_samples(cut).split(MOST)]
        assert len(parts) > 2
        tokens = sum(part.segments.total for part in parts)
        each = [score(model, part, ("aux_loss",)).aux_loss for part in parts]
        balance = COEFFICIENT * sum(aux * (part.segments.total / tokens) for aux, part in zip(each, parts))
        dpo = torch.log(torch.tensor(2.0))  # the policy is its reference
        assert entry["loss"] == pytest.approx(float((dpo + balance).detach()), rel=1e-5)
        (gradient,) = torch.autograd.grad(balance, [model.model.layers[0].mlp.gate.weight])
        moved = experts().model.layers[0].mlp.gate.weight - trainer.model.model.layers[0].mlp.gate.weight
        assert gradient.norm() > 1e-4
        # DPO's own gradient is there too: what is left of the balance must point along it.
        assert torch.nn.functional.cosine_similarity(moved.flatten() / 0.1, gradient.flatten(), dim=0) > 0.9


def test_its_statistics_after_a_resume_are_those_of_the_whole_run(tmp_path: Path) -> None:
    """A window of the log that a checkpoint cuts through, and the loss of the whole run."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    settings: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "logging_steps": 3}
    whole = make_trainer(tmp_path / "whole", make_samples(12), model=experts(), **settings)
    whole.train()
    make_trainer(tmp_path / "parts", make_samples(12), model=experts(), callbacks=[Stop()], **settings).train()
    parts = make_trainer(tmp_path / "parts", make_samples(12), model=experts(), **settings)
    parts.train(resume_from_checkpoint=True)
    ours, theirs = (
        [{k: v for k, v in e.items() if k in ("aux_loss", "loss", "train_loss", "step")} for e in t.state.log_history]
        for t in (parts, whole)
    )
    assert [e for e in ours if "aux_loss" in e] == [e for e in theirs if "aux_loss" in e]
    assert any("aux_loss" in e for e in ours)
    assert ours[-1]["train_loss"] == theirs[-1]["train_loss"]
    assert all(torch.equal(value, weights(whole.model)[name]) for name, value in weights(parts.model).items())


def test_max_length_by_hand_lifts_the_positions_of_policy_and_reference(tmp_path: Path) -> None:
    tokenizer = gpt2_like()
    rows = [{"prompt": "the sky " * 40, "chosen": f" blue {i}", "rejected": " black"} for i in range(4)]
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    own = prepare_pairs(rows, tokenizer)
    assert max(own.lengths) > 80
    with pytest.raises(DataError, match=r"longer than the model.s positions.*at most 64; set max_length"):
        make_trainer(tmp_path / "a", own, model=tiny_llama(**sizes))
    by_hand = prepare_pairs(rows, tokenizer, TokenizeConfig(max_length=200))
    with pytest.warns(UserWarning, match="max_length is 200, and LlamaForCausalLM was made for 64 positions"):
        trainer = make_trainer(
            tmp_path / "b", by_hand, model=tiny_llama(**sizes), reference=tiny_llama(1, **sizes), max_steps=1
        )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
