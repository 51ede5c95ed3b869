"""Which numbers of `tokengrain bench credit` stand in which table, and what is said about them."""

from __future__ import annotations

Column = tuple[str, str, int]
"""Heading, name of the measure, decimals."""

Group = tuple[str, tuple[Column, ...], str]
"""A table: title, columns, and the note under it."""

SIZE: Group = (
    "Size: calibration",
    (("scale", "scale", 2), ("R²", "r2", 2), ("skill", "skill", 2), ("ECE", "ece", 3)),
    "Scale: the factor that brings credit nearest to the truth; R²: what it then explains, below 0 if less than a "
    "constant. Skill: how much better a logistic function of credit predicts that a token lowers the reward than the "
    "base rate does (1 perfect, 0 nothing); ECE: how far its percentages are from the observed ones.",
)
COST: Group = (
    "Cost",
    (("s/1k", "seconds", 3), ("passes", "passes", 0), ("reads", "reads", 1), ("training s", "training_seconds", 0)),
    "Cost: s/1k, seconds per 1,000 credited tokens on this machine; forward passes per call with 64 prompts; tokens "
    "read by a model per credited token; seconds of training before there is any credit.",
)
WORLD_GROUPS: dict[str, tuple[Group, ...]] = {
    "pairs": (
        (
            "Order: agreement with the exact advantage",
            (
                ("ρ", "spearman", 2),
                ("AUC", "auc", 2),
                ("AUC harm", "auc_harm", 2),
                ("top-1", "top1", 2),
                ("alarm", "alarm", 2),
            ),
            "Mean over seeds, ± half of the 95 % t interval. ρ: Spearman rank correlation with the exact soft "
            "advantage over tokens at which something was decided. AUC: chance that a token with advantage above 0.3 "
            "has more credit than one below −0.3. AUC harm: chance that a token below −0.3 has less credit than any "
            "other decision token. top-1: in completions with a token below −0.3, how often the lowest credit is at "
            "the lowest advantage. Alarm: chance that a completion with such a token has a lower lowest credit than "
            "one without. Random credit reaches a top-1 of {top1_chance}.",
        ),
        SIZE,
        COST,
    ),
    "chain": (
        (
            "Place: is the first wrong token found?",
            (
                ("AUC inside", "auc_inside", 2),
                ("top-1", "place1", 2),
                ("top-3", "place3", 2),
                ("share", "share", 2),
                ("AUC harm", "auc_harm", 2),
                ("ρ", "spearman", 2),
            ),
            "Mean over seeds, ± half of the 95 % t interval, on groups of samples with right and wrong ones. AUC "
            "inside: chance that the first wrong token has less credit than another decision token of the same "
            "completion; an outcome that is spread over a completion has 0.5. top-1, top-3: how often it has the "
            "lowest credit of all tokens of its completion, or is among the three lowest; random credit: "
            "{place1_chance} and {place3_chance}. Share: its part of the completion's sum of |credit|; uniform "
            "credit: {place1_chance}. AUC harm: as AUC inside, against the decision tokens of all completions, right "
            "ones too. ρ: rank correlation with −1 at the first wrong token and 0 at other decision tokens.",
        ),
        SIZE,
        COST,
    ),
    "reference": (
        (
            "Reference: are the tokens found that depend on the reasoning?",
            (
                ("AUC", "auc", 2),
                ("AUC inside", "auc_inside", 2),
                ("top-1", "place1", 2),
                ("top-3", "place3", 2),
                ("share", "share", 2),
            ),
            "Mean over seeds, ± half of the 95 % t interval. The tokens are those of the reference answer behind each "
            "sampled chain. AUC: chance that a token which depends on the reasoning has more credit than one that "
            "does not; inside: in the same reference. top-1: how often such a token has the highest credit of its "
            "reference; top-3: how many of the three highest are such tokens; random credit: {place1_chance}. Share: "
            "of the sum of |credit|, what lies on them; uniform credit: {place1_chance}.",
        ),
        COST,
    ),
}
TEXT_COLUMNS: tuple[Column, ...] = (
    ("AUC", "auc", 2),
    ("AUC neighbours", "auc_neighbours", 2),
    ("AUC elsewhere", "auc_elsewhere", 2),
    ("drop", "drop", 2),
    ("drop neighbours", "drop_neighbours", 2),
    ("drop elsewhere", "drop_elsewhere", 2),
    ("top-1", "top1", 2),
    ("top-k", "topk", 2),
)
TEXT_NOTES = (
    "Mean over answers with its 95 % bootstrap interval. AUC: chance that a corrupted token has lower credit than an "
    "untouched one of the same answer; then against its next few neighbours only, and against all others only. Drop: "
    "credit in the clean answer minus credit in the corrupted one at the same place, in standard deviations of the "
    "source; then at the neighbours, and at later untouched tokens. top-1, top-k: share of the lowest token, and of "
    "the k lowest, that are corrupted.",
    "A source that is no better than surprise has found what is unusual, not what is wrong.",
)
CHANCES = ("top1_chance", "place1_chance", "place3_chance")
"""What notes are filled with."""

# In a terminal.
WORLD_SHORT = {
    "pairs": ("spearman", "auc", "top1", "skill", "seconds", "passes"),
    "chain": ("auc_inside", "place1", "place3", "share", "seconds", "passes"),
    "reference": ("auc", "auc_inside", "place3", "share", "seconds", "passes"),
}
TEXT_SHORT = ("auc", "drop", "drop_neighbours", "top1")
COSTS = ("seconds", "passes", "reads", "training_seconds")
