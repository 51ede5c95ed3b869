"""Policy losses as their papers have them, for the claims that train with them: settings of an arm."""

from __future__ import annotations

from typing import Any

DAPO: dict[str, Any] = {
    "objective": "grpo",
    "hyper": {"epsilon_high": 0.28, "reduction": "sum"},
    "normaliser": "token_mean",
}
"""Clip-higher, and one mean over all tokens (arXiv 2503.14476); dynamic sampling is the experiment's own."""
DCPO: dict[str, Any] = {"objective": "dcpo", "normaliser": "prompt_mean"}
"""Dynamic bounds, means within completions alone (arXiv 2509.02333); smoothed advantages are the experiment's own."""
