"""Scoring: `(model, TokenBatch)` to per-token quantities. The hot path of every method.

`score` gives log-probabilities, entropies, hidden states, full-vocabulary KL to a reference or a teacher, a reward
model's token scores and a critic's values, flat over the counted tokens. Prompts are computed once for all their
completions where the model can do it, the head is projected for completion tokens only, and `[tokens, vocabulary]`
never exists for more than a chunk.
"""
