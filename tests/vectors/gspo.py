from __future__ import annotations

from typing import Any

from tests.vectors.rows import Rows
from tests.vectors.runner import Case, adapter
from tokengrain.methods.gspo import gspo_loss


@adapter("gspo", "loss")
def loss(case: Case) -> dict[str, Any]:
    """One call serves both forms: with an advantage per row they are equal in value and gradient."""
    rows = Rows.of(case)
    vectors = rows.sampled(case, "ref_logps")
    settings = case.settings("epsilon_high", "beta", epsilon_low="epsilon")
    output = gspo_loss(segments=rows.segments, **vectors, **settings)
    plain = (
        output if not settings.get("beta") else gspo_loss(segments=rows.segments, **vectors, **settings | {"beta": 0.0})
    )
    total = rows.normalised(output, "mean")
    return {
        "seq_ratio": output.metrics["ratio/mean"],
        # The vectors' values per row and per token leave the KL term out; their loss has it.
        "gspo": {
            "loss": total,
            "per_row_loss": plain.losses,
            "clipped_rows": output.metrics["clip/tokens"],
        },
        "gspo_token": {"loss": total, "per_token_loss": rows.padded(plain.tokens["loss"])},
    }
