"""No penalty: the baseline of a sweep."""

from __future__ import annotations

from components.training.penalties.kind import Kind
from components.training.penalties.l1_l2 import ELASTIC_NET

NONE = Kind("none", label="no penalty", choice="none", formula=ELASTIC_NET)
