"""The tables of the documentation, written from what the methods say about themselves."""

from __future__ import annotations

from tokengrain.loss import ROLES, SelectionRole, make_role
from tokengrain.method import CREDIT, OBJECTIVES, Objective, why_not


def objectives() -> dict[str, Objective]:
    """The offline objectives: those that the table has a column for, or a reason why not."""
    named = {o.function for o in OBJECTIVES.values() if o.fixed}
    return {name: o for name, o in OBJECTIVES.items() if not o.online and (o.fixed or o.function not in named)}


def roles_for(credit: str, objective: str) -> dict[str, str]:
    """Role by role: "" if the objective takes this credit so, else the reason why it is refused."""
    return {name: why_not(CREDIT[credit].values, make_role(name).uses) for name in OBJECTIVES[objective].accepts}


def cell(credit: str, objective: str) -> str:
    """The roles in which an objective takes a credit source; "(above: 0)" where only a threshold makes sense."""
    found = []
    for role, reason in roles_for(credit, objective).items():
        if not reason:
            found.append(role)
        elif issubclass(ROLES[role], SelectionRole):
            by_threshold = make_role(role, above=0.0)
            found += [] if why_not(CREDIT[credit].values, by_threshold.uses) else [f"{role} (above: 0)"]
    return ", ".join(found) or "–"


def markdown() -> str:
    """The table and the reasons, as a page of the documentation."""
    columns = [name for name, objective in objectives().items() if objective.accepts]
    lines = [
        "# Any credit with any objective",
        "",
        "<!-- Written by `tokengrain methods --matrix --markdown`; a test compares it with the code. -->",
        "",
        "Rows are credit sources (`credit: {name: ...}`), columns are objectives, and a cell says how the credit can "
        "enter (`as: ...`; where there is one way only it need not be said). `tokengrain methods --matrix` prints the "
        "same table.",
        "",
        "| credit | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name in CREDIT:
        lines.append(f"| `{name}` | " + " | ".join(cell(name, objective) for objective in columns) + " |")
    lines += [
        "",
        "- **reward**: the objective has a token reward in its formula.",
        "- **weight**: each token's log-ratio is multiplied by 1 + αr (chosen) or 1 − αr (rejected). Settings: "
        "`alpha`, `clamp_min`, `normalise`.",
        "- **selection**: only the best tokens of chosen and the worst of rejected completions are scored and trained. "
        "Settings: `share` (or `chosen`, `rejected`), or `above` for a threshold.",
        "- **span**: the same tokens, as spans. Settings: those of selection.",
        "",
        "## What is refused, and why",
        "",
    ]
    lines += [f"- `{name}` takes no credit: {o.takes_no_credit}." for name, o in objectives().items() if not o.accepts]
    reasons: dict[str, list[str]] = {}
    for credit in CREDIT:
        for objective in columns:
            for role, reason in roles_for(credit, objective).items():
                if reason:
                    reasons.setdefault(reason, []).append(f"`{credit}` as {role}")
    lines += [f"- {', '.join(dict.fromkeys(who))}: {reason}." for reason, who in reasons.items()]
    lines += [
        "",
        "What the sources are:",
        "",
        *(f"- `{name}`: {kind.summary}" for name, kind in CREDIT.items()),
        "",
    ]
    return "\n".join(lines)
