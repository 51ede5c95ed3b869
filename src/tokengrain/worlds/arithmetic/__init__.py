"""The world `arithmetic`: multi-step sums with a chain of thought, whose first wrong token is known exactly."""

from tokengrain.worlds.arithmetic.audit import Audit
from tokengrain.worlds.arithmetic.rewards import correct, well_formed
from tokengrain.worlds.arithmetic.world import ArithmeticOptions, ArithmeticWorld

__all__ = ["ArithmeticOptions", "ArithmeticWorld", "Audit", "correct", "well_formed"]
