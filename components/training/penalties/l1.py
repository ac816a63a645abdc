"""L1: ``l1 * sum(abs(w))``.

Tibshirani, "Regression Shrinkage and Selection via the Lasso", J. Royal Statistical Society B 58(1), 1996.
"""

from __future__ import annotations

from components.training.penalties.kind import Kind
from components.training.penalties.l1_l2 import ELASTIC_NET, L1_STRENGTH

L1 = Kind(
    "l1",
    label="L1",
    choice="L1: zeros weights",
    formula=ELASTIC_NET,
    strengths=(L1_STRENGTH,),
    sparse=True,
    path=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
)
