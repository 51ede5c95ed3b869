"""All experiments by name. A new one is a module with a `Group` and an entry here."""

from __future__ import annotations

from experiments.claims import (
    aligndistil,
    library,
    online_aepo,
    online_arithmetic,
    online_chasing,
    online_digits,
    online_r3,
    online_r3_limits,
    online_revision,
    online_rto,
    online_slots,
    online_thr,
    qrm,
    rrpo,
    seeing,
    sepo,
    stories,
)
from experiments.claims.framework import Group

_OFFLINE = (rrpo.GROUP, sepo.GROUP, aligndistil.GROUP, qrm.GROUP, stories.NOISY, stories.CLEAN, library.GROUP)
_SEEING = (seeing.SERIES, seeing.CLIPS, seeing.SHAPES)
_ONLINE = (
    online_rto.GROUP,
    online_digits.GROUP,
    online_thr.GROUP,
    online_aepo.GROUP,
    online_chasing.GROUP,
    online_r3.GROUP,
    online_r3_limits.GROUP,
    online_slots.GROUP,
    online_arithmetic.GROUP,
    online_revision.GROUP,
)
GROUPS: dict[str, Group] = {group.name: group for group in (*_OFFLINE, *_ONLINE, *_SEEING)}
