"""Tiny random encoder-decoders and what their own forward says about a batch."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.scoring.models import VOCAB
from tokengrain.batch import TokenBatch
from tokengrain.scoring.encdec import start_id
from tokengrain.scoring.reference import disable_dropout

_T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_GEMMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "sliding_window": 64,
}

# (model type, settings, what its head's input is multiplied by)
FAMILIES: dict[str, tuple[str, dict[str, Any], float]] = {
    "t5": ("t5", _T5, 16**-0.5),
    "t5-untied": ("t5", {**_T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}, 1.0),
    "mt5": ("mt5", _T5, 1.0),
    "umt5": ("umt5", _T5, 16**-0.5),
    "switch": (
        "switch_transformers",
        {**_T5, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        16**-0.5,
    ),
    "longt5": ("longt5", {**_T5, "local_radius": 4}, 16**-0.5),
    "bart": ("bart", _BART, 1.0),
    "mbart": ("mbart", _BART, 1.0),
    "pegasus": ("pegasus", _BART, 1.0),
    "blenderbot": ("blenderbot", _BART, 1.0),
    "marian": ("marian", {**_BART, "decoder_vocab_size": VOCAB}, 1.0),
    "m2m_100": ("m2m_100", _BART, 1.0),
    "plbart": ("plbart", _BART, 1.0),
    "t5gemma": (
        "t5gemma",
        {
            "encoder": _GEMMA,
            "decoder": {**_GEMMA, "cross_attention_hidden_size": 16, "final_logit_softcapping": 2.0},
            "vocab_size": VOCAB,
        },
        1.0,
    ),
}


def tiny_seq2seq(name: str = "t5", *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """A random model in training mode (no dropout), the same every time, all of its weights trained."""
    kind, settings, _ = FAMILIES[name]
    config = transformers.AutoConfig.for_model(kind, **{**settings, **changes})
    torch.manual_seed(seed)
    model: Any = transformers.AutoModelForSeq2SeqLM.from_config(config).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter.requires_grad_(True), std=0.2)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return disable_dropout(model).train()


def alone(model: nn.Module, batch: TokenBatch) -> dict[str, Tensor]:
    """`logps` and `entropy` of every completion, each alone with its prompt, by the model's own forward."""
    logps, entropy = [], []
    start = torch.tensor([start_id(model)])
    counted = batch.counted.split(batch.completion_offsets.diff().tolist())
    for c, group in enumerate(batch.group.tolist()):
        ids = batch.completion(c)
        given = {"input_ids": batch.prompt(group)[None], "decoder_input_ids": torch.cat([start, ids[:-1]])[None]}
        logp = model(**given).logits[0].log_softmax(-1)
        logps.append(logp.gather(1, ids[:, None])[:, 0][counted[c]])
        entropy.append(-(logp.exp() * logp).sum(-1)[counted[c]])
    return {"logps": torch.cat(logps), "entropy": torch.cat(entropy)}
