"""`python -m tests.vectors PATH...`: run files or folders of test vectors; exit status 1 if a case failed."""

from __future__ import annotations

import sys

from tests.vectors.runner import run_paths


def main(arguments: list[str]) -> int:
    if not arguments:
        print("usage: python -m tests.vectors PATH...", file=sys.stderr)
        return 2
    try:
        return run_paths(arguments)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
