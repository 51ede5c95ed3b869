"""Objectives: how token credit becomes a loss. Pure functions of flat tensors, one file per method.

output = dpo_loss(logps, batch.segments, ref_logps=ref_logps, beta=0.1)
loss = make_normaliser("mean")(output, Counts.of(batch.segments, pairs=True))
"""
