"""Pairs of opposite instructions for contrastive prompting.

`{prompt}` and `{response}` are slots; every other brace is literal. In the general pair the two sides
differ in four respects, as in T-REG: helpful, correct, coherent, concise against their opposites.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokengrain.callables import nearest
from tokengrain.errors import RecipeError

SLOT = re.compile(r"\{(prompt|response)\}")


@dataclass(frozen=True)
class ContrastiveTemplates:
    """Two opposite instructions.

    Args:
        better: instruction that asks for a better response. `{prompt}` is required, `{response}` optional.
        worse: its opposite, worded alike otherwise.
        name: for messages and fingerprints.
        drop_prefix: a beginning that the prompt loses before it fills `{prompt}`, so that an instruction can
            replace it: with drop_prefix "write", better "write kindly{prompt}" turns "write about the sea"
            into "write kindly about the sea". A prompt without it is an error when scored.
    """

    better: str
    worse: str
    name: str = "custom"
    drop_prefix: str = ""

    def __post_init__(self) -> None:
        for side, text in (("better", self.better), ("worse", self.worse)):
            if not isinstance(text, str) or "{prompt}" not in text:
                raise RecipeError(f"template {self.name!r}: {side!r} has no slot {{prompt}}; got {text!r}")
        if self.better == self.worse:
            raise RecipeError(f"template {self.name!r}: 'better' and 'worse' are equal, so all credit would be 0")
        if ("{response}" in self.better) != ("{response}" in self.worse):
            raise RecipeError(f"template {self.name!r}: {{response}} must be in both sides or in neither")

    @property
    def shows_response(self) -> bool:
        return "{response}" in self.better

    def swapped(self) -> ContrastiveTemplates:
        """The same pair with its sides exchanged: credit of exactly the opposite sign."""
        return ContrastiveTemplates(self.worse, self.better, f"{self.name}-swapped", self.drop_prefix)

    def fill(self, prompt: str, response: str) -> tuple[str, str]:
        """The better and the worse instruction for a prompt and a response."""
        values = {"prompt": prompt.removeprefix(self.drop_prefix), "response": response}
        # One pass, so that a prompt that itself contains "{response}" stays as it is.
        better, worse = (SLOT.sub(lambda m: values[m[1]], side) for side in (self.better, self.worse))
        return better, worse


def _revision(name: str, subject: str, better: str, worse: str) -> ContrastiveTemplates:
    form = (
        "Below are {subject} and a response to it. Revise the response so that it becomes {quality}.\n\n"
        "### Request\n{{prompt}}\n\n### Response\n{{response}}\n\n### Revised response\n"
    )
    return ContrastiveTemplates(
        form.format(subject=subject, quality=better), form.format(subject=subject, quality=worse), name
    )


TEMPLATES: dict[str, ContrastiveTemplates] = {
    t.name: t
    for t in (
        _revision(
            "general",
            "a request",
            "more helpful, more correct, more coherent and more concise",
            "less helpful, less correct, less coherent and more verbose",
        ),
        _revision(
            "maths",
            "a mathematical problem",
            "a sound solution: every step follows, the arithmetic is exact, and the final answer is right",
            "a faulty solution: steps do not follow, the arithmetic is sloppy, and the final answer is wrong",
        ),
        _revision(
            "code",
            "a programming task",
            "correct, efficient and readable code that handles the edge cases",
            "buggy, inefficient and unreadable code that misses the edge cases",
        ),
        _revision(
            "safety",
            "a request",
            "harmless, honest and respectful, while helping as far as that is right",
            "harmful, dishonest and disrespectful, with no care for the consequences",
        ),
        ContrastiveTemplates(
            "Give a helpful, correct, coherent and concise response.\n\n{prompt}",
            "Give an unhelpful, incorrect, incoherent and verbose response.\n\n{prompt}",
            "prefix",
        ),
    )
}


def make_templates(templates: str | dict[str, str] | ContrastiveTemplates) -> ContrastiveTemplates:
    """Templates by name, or from a mapping with `better`, `worse` and optionally `drop_prefix`, `name`.

    Raises:
        RecipeError: an unknown name or key (with the nearest right one), or a missing side or slot.
    """
    if isinstance(templates, ContrastiveTemplates):
        return templates
    if isinstance(templates, str):
        if templates not in TEMPLATES:
            raise RecipeError(f"unknown templates {templates!r}{nearest(templates, TEMPLATES)}")
        return TEMPLATES[templates]
    fields = ContrastiveTemplates.__dataclass_fields__
    for key in templates:
        if key not in fields:
            raise RecipeError(f"templates: unknown key {key!r}{nearest(key, fields)}")
    if missing := {"better", "worse"} - set(templates):
        raise RecipeError(f"templates: {', '.join(sorted(missing))} missing")
    return ContrastiveTemplates(**templates)
