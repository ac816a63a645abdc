from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from components.training.penalties import KINDS
from components.training.penalties.l1 import L1
from components.training.penalty import STRENGTHS, Penalty, regularizer


@pytest.mark.parametrize(
    ("kind", "strengths", "factors", "label"),
    [
        ("none", {}, {"l1": 0.0, "l2": 0.0}, "no penalty"),
        ("l1", {"l1": 0.001}, {"l1": 0.001, "l2": 0.0}, "L1 0.001"),
        ("l2", {"l2": 0.01}, {"l1": 0.0, "l2": 0.01}, "L2 0.01"),
        ("l1_l2", {"l1": 0.001, "l2": 0.01}, {"l1": 0.001, "l2": 0.01}, "L1 + L2 0.001 and 0.01"),
        ("group", {"group": 0.001}, {"group": 0.001}, "group lasso 0.001"),
    ],
)
def test_a_penalty_has_the_strengths_the_factors_and_the_label_of_its_kind(
    kind: str, strengths: dict[str, float], factors: dict[str, float], label: str
) -> None:
    penalty = Penalty.at(kind, *strengths.values())
    assert penalty.strengths == strengths
    assert penalty.factors == factors
    assert penalty.label == label
    assert {strength.name for strength in KINDS[kind].strengths} == strengths.keys()


def test_a_kind_needs_all_of_its_strengths() -> None:
    with pytest.raises(ValueError, match="argument"):
        Penalty.at("l1_l2", 0.001)


def test_the_first_of_several_strengths_that_do_not_apply_is_named() -> None:
    for names in (["l1", "l2", "group"], ["l2", "group"], ["group"]):
        with pytest.raises(ValueError, match=f"{names[0]}: expected 0 or the default .* with kind='none'"):
            Penalty(kind="none", **dict.fromkeys(reversed(names), 3.0))


def test_every_kind_has_its_own_name_and_each_strength_one_declaration() -> None:
    assert all(name == kind.name for name, kind in KINDS.items())
    assert set(Penalty.model_fields) == {"kind", *STRENGTHS}
    for kind in KINDS.values():
        assert all(STRENGTHS[strength.name] is strength for strength in kind.strengths)


def test_a_kind_that_could_not_act_is_refused_where_it_is_declared() -> None:
    smooth = replace(L1.formula, proximal_step=None)
    with pytest.raises(ValueError, match="proximal_step in the formula of the penalty l1, which is sparse; received n"):
        replace(L1, formula=smooth)
    assert replace(L1, formula=smooth, sparse=False).formula is smooth
    with pytest.raises(ValueError, match="strengths of the penalty l1 .* of its formula, slope; received l1. Use"):
        replace(L1, formula=replace(L1.formula, strengths=("slope",)))


@pytest.mark.parametrize(("kind", "strengths"), [("l1_l2", (0.5, 0.25)), ("group", (0.5,))])
def test_the_regularizers_strengths_can_be_changed(kind: str, strengths: tuple[float, ...]) -> None:
    penalty, weights = Penalty.at(kind, *strengths), np.ones((3, 4), np.float32)
    changing = regularizer(penalty.formula, smooth_only=False)
    assert float(changing(weights)) == 0.0
    for name, factor in penalty.factors.items():
        changing.strengths[name].assign(factor)
    assert penalty.value(weights) > 0
    assert float(changing(weights)) == pytest.approx(penalty.value(weights))
