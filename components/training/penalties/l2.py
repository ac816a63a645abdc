"""L2: ``l2 * sum(w ** 2)``.

Hoerl and Kennard, "Ridge Regression: Biased Estimation for Nonorthogonal Problems", Technometrics 12(1), 1970.
"""

from __future__ import annotations

from components.training.penalties.kind import Kind
from components.training.penalties.l1_l2 import ELASTIC_NET, L2_STRENGTH

L2 = Kind(
    "l2",
    label="L2",
    choice="L2: spreads weights",
    formula=ELASTIC_NET,
    strengths=(L2_STRENGTH,),
    path=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
)
