"""The claims on the world `stories`. What they compare is in `stories.ARMS`; where they come from, in worlds.md."""

from __future__ import annotations

from typing import Any

from experiments.claims.framework import Claim

_WORLD = "worlds.md, first look over 2 seeds"
DPO, HALF = "DPO β 0.3", "DPO β 0.3, half step"
TGDPO, TREG, TDPO = "TGDPO β 0.3 α 0.5", "T-REG β 0.3 α 0.5", "TDPO2 β 0.1 α"
SEPO, ALIGN = "SePO k 0.3 γ 2", "AlignDistil β₀ 0.3 r 1"


def _claim(method: str, says: str, first: str, second: str, expect: Any, measure: str = "reward", **more: Any) -> Claim:
    return Claim(method, says, first, second, measure, expect, **{"source": _WORLD, **more})


def _sure(*arguments: Any, **more: Any) -> Claim:
    return _claim(*arguments, robust=True, **more)


TREG_CLAIMS = (
    _sure("treg", "Exact credit beats none (T-REG)", f"{TREG}, exact", DPO, "above"),
    _claim("treg", "T-REG α 0.25 is above DPO", "T-REG β 0.3 α 0.25", DPO, "above", source="arXiv 2412.02685"),
    _claim("treg", "T-REG α 0.5 is above α 0.25", TREG, "T-REG β 0.3 α 0.25", "above"),
    _claim("treg", "Random credit changes nothing (T-REG)", f"{TREG}, random", DPO, "same"),
    _sure("treg", "Swapped templates do harm", f"{TREG}, swapped", DPO, "below"),
    _claim("treg", "T-REG gains frontier share over DPO", "T-REG β 0.3 α 0.25", DPO, "above", "share"),
)
TGDPO_CLAIMS = (
    _sure("tgdpo", "Exact credit beats none (TGDPO)", f"{TGDPO}, exact", HALF, "above"),
    _claim("tgdpo", "Guided TGDPO is above DPO", TGDPO, HALF, "above", source="arXiv 2506.14574"),
    _claim("tgdpo", "Guided TGDPO is above DPO, β 1", "TGDPO β 1 α 0.5", "DPO β 1", "above", source="arXiv 2506.14574"),
    _claim("tgdpo", "Random credit changes nothing (TGDPO)", f"{TGDPO}, random", HALF, "same"),
    _sure("tgdpo", "Flipped credit does harm", f"{TGDPO}, flipped", HALF, "below"),
    _claim("tgdpo", "TGDPO gains frontier share over DPO", TGDPO, DPO, "above", "share"),
)
TDPO_CLAIMS = (
    _sure("tdpo", "TDPO2: α 0.1 diverges less than DPO", f"{TDPO} 0.1", "DPO β 0.1", "below", "kl"),
    _sure("tdpo", "TDPO2: α 0.25 diverges less than α 0.1", f"{TDPO} 0.25", f"{TDPO} 0.1", "below", "kl"),
    _sure("tdpo", "TDPO2: α 0.5 diverges less than α 0.25", f"{TDPO} 0.5", f"{TDPO} 0.25", "below", "kl"),
    _claim(
        "tdpo",
        "TDPO2 keeps more entropy than DPO",
        f"{TDPO} 0.5",
        "DPO β 0.1",
        "above",
        "entropy",
        source="arXiv 2404.11999",
    ),
)
NEW_CLAIMS = (
    _sure("sepo", "SePO's selection beats a random one", SEPO, f"{SEPO}, random tokens", "above"),
    _claim("sepo", "Selecting by exact credit is better still", f"{SEPO}, exact credit", SEPO, "above"),
    _claim("aligndistil", "AlignDistil is above DPO", ALIGN, DPO, "above", source="arXiv 2503.02832"),
    _claim("aligndistil", "AlignDistil gains frontier share over DPO", ALIGN, DPO, "above", "share"),
    _sure("aligndistil", "KL grows with r", "AlignDistil β₀ 0.3 r 4", ALIGN, "above", "kl", source="aligndistil.md 7"),
    _claim(
        "aligndistil",
        "Without extrapolation it is DPO, within 5 %",
        "DPO β 0.3 distilled",
        DPO,
        "within",
        form="ratio",
        threshold=0.05,
        source="aligndistil.md 7",
    ),
)
_OLD = (*TREG_CLAIMS, *TGDPO_CLAIMS, *TDPO_CLAIMS)
CLAIMS_BY_REGIME: dict[str, tuple[Claim, ...]] = {
    "noisy": (
        *_OLD,
        *NEW_CLAIMS,
        _claim(
            "sepo",
            "With few noisy labels SePO loses frontier share to DPO",
            SEPO,
            DPO,
            "below",
            "share",
            reported="worse",
        ),
    ),
    "clean": (
        *_OLD,
        *NEW_CLAIMS,
        _claim(
            "sepo",
            "With clean labels SePO gains frontier share over DPO",
            SEPO,
            DPO,
            "above",
            "share",
            reported="leads",
        ),
    ),
}
