"""The tables of README and documentation, written from what the methods say about themselves.

`python -m tokengrain.tables` (`make docs-tables`) writes them into their pages, between lines `<!-- name:begin -->` and
`<!-- name:end -->`; a test compares the pages with the code.
"""

from __future__ import annotations

import inspect
import sys
from itertools import product
from pathlib import Path

from tokengrain.errors import RunError, require, write_text
from tokengrain.loss import ROLES, SelectionRole, make_role
from tokengrain.method import CREDIT, METHODS, OBJECTIVES, PHASES, ROLLOUT_CREDIT, Objective, why_not


def methods_table() -> str:
    rows = [f"| [{m.title}]({m.page}) | {m.idea} | [{m.name}]({m.recipe}) |" for m in METHODS.values()]
    return "\n".join(["| method | idea | recipe |", "|---|---|---|", *rows])


def papers_table() -> str:
    head = ["| method | credit | objective | trains | paper |", "|---|---|---|---|---|"]
    rows = [
        f"| [{m.title}]({m.page.removeprefix('docs/')}) | {m.credit} | `{m.objective}` | {m.trains} | "
        f"[{m.paper_title}](https://arxiv.org/abs/{m.arxiv}), {m.venue} |"
        for m in METHODS.values()
    ]
    return "\n".join(head + rows)


def sources_table() -> str:
    """Every credit source: its models and settings with their defaults, in bold what a recipe must give."""
    head = ["| `name` | settings | what it gives |", "|---|---|---|"]
    rows = []
    for name, kind in CREDIT.items():
        found = []
        for key, parameter in inspect.signature(kind.function).parameters.items():
            given, default = key not in ("reference", "tokenizer", "reward_tokenizer"), parameter.default
            if default is parameter.empty and given and parameter.kind is parameter.KEYWORD_ONLY:
                found.append(f"`{key}`" if kind.judges_itself else f"**`{key}`**")
            elif default is not parameter.empty and given:
                found.append(f"`{key}`" if default is None else f"`{key}` {str(default).replace('-', '−')}")
        rows.append(f"| `{name}` | {', '.join(found) or '–'} | {kind.summary} |")
    return "\n".join(head + rows)


def steps_table() -> str:
    """Every rollout credit, in the order of the phases."""
    rows = [(kind.attributes({})["phase"], name, kind.summary) for name, kind in ROLLOUT_CREDIT.items()]
    rows.sort(key=lambda row: PHASES.index(row[0]))
    head = ["| phase | `name` | what it does |", "|---|---|---|"]
    return "\n".join(head + [f"| {phase} | `{name}` | {summary} |" for phase, name, summary in rows])


BLOCKS = {
    "README.md": {"methods": methods_table},
    "docs/index.md": {"papers": papers_table},
    "docs/credit.md": {"sources": sources_table},
    "docs/online.md": {"steps": steps_table},
}


def pages(root: Path) -> dict[Path, str]:
    """Every page with a generated part, and what should stand in it."""
    found = {root / "docs/credit-matrix.md": matrix_page()}
    for page, blocks in BLOCKS.items():
        text = (root / page).read_text(encoding="utf-8")
        for name, table in blocks.items():
            text = _with_block(text, name, table())
        found[root / page] = text
    return found


def _with_block(text: str, name: str, table: str) -> str:
    before, begin, rest = text.partition(f"<!-- {name}:begin -->\n")
    _, end, after = rest.partition(f"<!-- {name}:end -->")
    require(begin and end, RunError, f"the page has no place for the table {name!r}; expected {name}:begin and :end")
    return f"{before}{begin}{table}\n{end}{after}"


# Which credit source goes with which objective, in which role: computed from the code that refuses the others.


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


def matrix_page() -> str:
    columns = [name for name, objective in objectives().items() if objective.accepts]
    lines = [
        "# Any credit with any objective",
        "",
        "<!-- Written by `make docs-tables`; a test compares it with the code. -->",
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
        "- **importance**: the objective weighs tokens by how much they matter, which is at least 0.",
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
    for credit, objective in product(CREDIT, columns):
        for role, reason in roles_for(credit, objective).items():
            reasons.setdefault(reason, []).append(f"`{credit}` as {role}")
    reasons.pop("", None)
    lines += [f"- {', '.join(dict.fromkeys(who))}: {reason}." for reason, who in reasons.items()]
    lines += ["", "What the sources are:", "", *(f"- `{name}`: {kind.summary}" for name, kind in CREDIT.items()), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    for path, text in pages(Path(sys.argv[1] if len(sys.argv) > 1 else ".")).items():
        write_text(path, text)
