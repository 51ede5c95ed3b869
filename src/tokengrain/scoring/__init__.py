"""Scoring: `(model, TokenBatch)` to per-token quantities, flat over the counted tokens: the hot path of every method.

Prompts are computed once for all their completions where the model can do it, the head is projected for completion
tokens only, and `[tokens, vocabulary]` never exists for more than a chunk.
"""
