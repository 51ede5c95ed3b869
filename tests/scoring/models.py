"""Tiny random models and batches, and what plain transformers says about them."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.scoring.head import logits_quantities

os.environ.setdefault("HF_HUB_OFFLINE", "1")


VOCAB = 61
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    "initializer_range": 0.3,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}

# Models that share prompts.
SHARING: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 5},
    "gemma2": {**SLIDING, "head_dim": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0},
    "gemma3_text": {**SLIDING, "head_dim": 8},
    "phi3": {"sliding_window": 5},
    "gpt_oss": {**SLIDING, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": {"attention_dropout": 0.0, "hidden_dropout": 0.0},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.25},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 5},
}
# Models that cannot: ALiBi, recurrent, hybrid, chunked.
SEPARATE: dict[str, dict[str, Any]] = {
    "bloom": {"n_head": 2, "n_layer": 2},
    "falcon-alibi": {"model_type": "falcon", "alibi": True, "bias": True, "new_decoder_architecture": False},
    "mamba": {"state_size": 4, "conv_kernel": 3, "expand": 2, "time_step_rank": 4, "num_hidden_layers": 1},
    "recurrent_gemma": {
        "attention_window_size": 6,
        "block_types": ["recurrent", "attention"],
        "lru_width": 16,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "window_size": 5,
        "num_layers": 2,
        "num_heads": 2,
        "resid_dropout": 0.0,
        "embed_dropout": 0.0,
    },
}
EVERY = {**SHARING, **SEPARATE}


def tiny(name: str, *, dtype: torch.dtype = torch.float64, scorer: bool = False, **changes: Any) -> nn.Module:
    """A random model in training mode (no dropout), the same every time; `scorer`: for tokens, with one label."""
    settings = {**COMMON, **EVERY[name], **changes}
    config = transformers.AutoConfig.for_model(settings.pop("model_type", name), **settings)
    for dropout in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    if hasattr(config, "num_local_experts"):
        config._experts_implementation = "eager"  # the grouped product has no float64
    if scorer:
        config.num_labels = changes.get("num_labels", 1)
        config.classifier_dropout = changes.get("classifier_dropout", 0.0)
    auto = transformers.AutoModelForTokenClassification if scorer else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    return auto.from_config(config).to(dtype)


def batch_of(*lengths: tuple[int, tuple[int, ...]], holes: bool = False, seed: int = 0) -> TokenBatch:
    """Random prompts with completions of the given lengths; with holes, some tokens do not count."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(3, VOCAB, (n,), generator=generator).tolist()

    def counted(n: int) -> list[bool] | None:
        keep = torch.rand(n, generator=generator) > 0.4
        return keep.tolist() if holes else None

    return TokenBatch.from_samples(
        [Sample(ids(p), [Completion(ids(n), counted(n)) for n in ns], row=row) for row, (p, ns) in enumerate(lengths)]
    )


def standard_batch() -> TokenBatch:
    """One to four completions per prompt, one of a single token, some with holes, longer than the windows."""
    return joined(batch_of((9, (4, 7)), (3, (5,))), batch_of((6, (1, 3, 5, 2)), holes=True, seed=1))


def small_batch() -> TokenBatch:
    return batch_of((6, (4, 5)), (3, (3,)))


def joined(*batches: TokenBatch) -> TokenBatch:
    """One batch of the prompts of several."""
    samples = []
    for batch in batches:
        counted = batch.counted.split(batch.completion_offsets.diff().tolist())
        for g in range(batch.n_prompts):
            members = (batch.group == g).nonzero().squeeze(1).tolist()
            completions = [Completion(batch.completion(c).tolist(), counted[c].tolist()) for c in members]
            samples.append(Sample(batch.prompt(g).tolist(), completions, row=len(samples)))
    return TokenBatch.from_samples(samples)


def texts(batch: TokenBatch) -> list[tuple[Tensor, Tensor]]:
    """(whole text, position in it of every counted token) of each completion."""
    out = []
    counted = batch.counted.split(batch.completion_offsets.diff().tolist())
    for c, group in enumerate(batch.group.tolist()):
        prompt = batch.prompt(group)
        out.append((torch.cat([prompt, batch.completion(c)]), prompt.numel() + counted[c].nonzero().squeeze(1)))
    return out


def plain(model: nn.Module, batch: TokenBatch, ref: nn.Module | None = None) -> dict[str, Tensor]:
    """Each text alone through the model's own logits: `logps`, `entropy` and, given a reference, `kl`."""
    parts: dict[str, list[Tensor]] = {"logps": [], "entropy": [], "kl": []}
    for text, positions in texts(batch):
        logp = model(input_ids=text[None]).logits[0].log_softmax(-1)[positions - 1]
        parts["logps"].append(logp.gather(1, text[positions][:, None]).squeeze(1))
        parts["entropy"].append(-(logp.exp() * logp).sum(-1))
        if ref is not None:
            with torch.no_grad():
                logq = ref(input_ids=text[None]).logits[0].log_softmax(-1)[positions - 1]
            parts["kl"].append((logq.exp() * (logq - logp)).sum(-1))
    return {name: torch.cat(values) for name, values in parts.items() if values}


def gradients(model: nn.Module, out: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed random combination of the outputs, by parameter."""
    generator = torch.Generator().manual_seed(1)
    total: Any = 0.0
    for name in sorted(out):
        weights = torch.randn(out[name].shape, generator=generator, dtype=torch.float64)
        total = total + (out[name] * weights).sum()
    model.zero_grad()
    total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def reference_head_quantities(hidden, head, labels, want, reference=None, teacher=None):
    """The slow twin of `head_quantities`: same arguments and results, all `[N, V]` logits in memory."""
    return logits_quantities(head.logits(hidden), labels, want, reference, teacher)
