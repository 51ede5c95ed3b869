"""The teacher of a distilling objective: two frozen models and how far to go beyond one of them."""

from __future__ import annotations

from typing import Any

from tokengrain.batch import TokenBatch
from tokengrain.errors import RecipeError
from tokengrain.objectives.aligndistil import TeacherForm, teacher_strength
from tokengrain.scoring import Teacher
from tokengrain.scoring.reference import Reference


class ContrastiveTeacher:
    """AlignDistil's teacher: logits z_target + s (z_target - z_contrast), s by form (arXiv 2503.02832).

    Args:
        target: the DPO model, as a `Reference`.
        contrast: the reverse DPO model (or, for "theorem1" and "interpolation", the starting model); None for
            "distil".
        form, r, epsilon, beta0, beta: see `tokengrain.objectives.aligndistil.teacher_strength`.
        temperature: divides the logits of student and teacher.

    Raises:
        RecipeError: a form without its second model, or with one that it does not use.
    """

    def __init__(
        self,
        *,
        target: Reference,
        contrast: Reference | None = None,
        form: TeacherForm = "adaptive",
        r: float = 20.0,
        epsilon: float = 1e-3,
        beta0: float = 0.1,
        beta: float | None = None,
        temperature: float = 1.0,
    ) -> None:
        if (contrast is None) != (form == "distil"):
            needs = "no second model" if form == "distil" else "a second model, the contrast"
            raise RecipeError(f"a teacher of form {form!r} needs {needs}")
        self.target, self.contrast, self.temperature = target, contrast, temperature
        self.strength = teacher_strength(form, r=r, epsilon=epsilon, beta0=beta0, beta=beta)

    def __call__(self, batch: TokenBatch) -> Teacher:
        """The teacher's distribution at every counted token of `batch`, without its logits."""
        return Teacher(
            target=self._distribution(self.target, batch),
            contrast=self._distribution(self.contrast, batch) if self.contrast is not None else None,
            slope=self.strength.slope,
            offset=self.strength.offset,
            shift=self.strength.shift,
            temperature=self.temperature,
        )

    @staticmethod
    def _distribution(model: Reference, batch: TokenBatch) -> Any:
        distribution = model(batch, {"distribution"}).distribution
        assert distribution is not None  # it was asked for
        return distribution
