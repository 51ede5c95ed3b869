"""`import tokengrain` is quick: nothing heavier than torch."""

import subprocess
import sys

import pytest

import tokengrain

HEAVY = ("transformers", "datasets", "peft", "matplotlib", "accelerate", "trl", "pandas", "scipy")


def _loaded(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(' '.join(n for n in {HEAVY!r} if n in sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import tokengrain",
        "from tokengrain import TokenBatch, Sample, Completion, Segments, TokengrainError",
        "import tokengrain.methods.dpo, tokengrain.errors, tokengrain.batch",
        "from tokengrain import make_objective; make_objective('dpo', beta=0.3)",
        "from tokengrain import METHODS",
        "import tokengrain.cli",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert _loaded(code) == set()


@pytest.mark.parametrize("name", tokengrain.__all__)
def test_every_exported_name_is_there(name: str) -> None:
    assert getattr(tokengrain, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = tokengrain.trian
