"""A process that does what may hang: parsing mathematics, matching patterns. Run as a script by `builtin.py`.

It reads one JSON request per line and writes one JSON answer per line. It imports nothing of this package, so
that it starts quickly.
"""

import json
import re
import sys
from collections.abc import Callable
from typing import Any


def math_equal(gold: str, answer: str) -> dict[str, bool]:
    """Whether the last answer in `answer` equals that in `gold`; what was understood of both."""
    from math_verify import parse, verify

    # Time-outs by signals would hide a hang of compiled code; the parent ends this process instead.
    golds = parse(gold, parsing_timeout=None)
    found = parse(answer, parsing_timeout=None)
    equal = bool(golds) and bool(found) and bool(verify(golds, found, timeout_seconds=None))
    return {"equal": equal, "gold": bool(golds), "found": bool(found)}


def matches(pattern: str, flags: int, whole: bool, text: str) -> bool:
    """Whether a pattern matches all of a text, or is found in it."""
    compiled = re.compile(pattern, flags)
    return (compiled.fullmatch(text) if whole else compiled.search(text)) is not None


TASKS: dict[str, Callable[..., Any]] = {"math_equal": math_equal, "matches": matches}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not get between the answers
    for line in sys.stdin:
        task, arguments = json.loads(line)
        try:
            answer = {"value": TASKS[task](*arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
