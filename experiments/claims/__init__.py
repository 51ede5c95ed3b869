"""The papers' claims against their baselines: small experiments, paired by seed, with verdicts."""
