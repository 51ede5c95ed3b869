"""All experiments by name. A new one is a module with a `Group` and an entry here."""

from __future__ import annotations

from tokengrain.bench.claims import aligndistil, qrm, rrpo, sepo, stories
from tokengrain.bench.claims.framework import Group

GROUPS: dict[str, Group] = {
    group.name: group for group in (rrpo.GROUP, sepo.GROUP, aligndistil.GROUP, qrm.GROUP, stories.NOISY, stories.CLEAN)
}
