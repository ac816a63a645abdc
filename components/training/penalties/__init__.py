"""The penalties, one module each. The form, the sweep, the reports and the solvers read what they need from `KINDS`.

To add a penalty, write its module and list it here.
"""

from __future__ import annotations

from collections.abc import Mapping

from components.training.penalties.group import GROUP
from components.training.penalties.kind import Kind
from components.training.penalties.l1 import L1
from components.training.penalties.l1_l2 import L1_L2
from components.training.penalties.l2 import L2
from components.training.penalties.none import NONE

# In the order in which a sweep tries them and a report lists them.
KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        NONE,
        L1,
        L2,
        L1_L2,
        GROUP,
    )
}
