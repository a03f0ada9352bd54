"""The search converts the layers that hurt least first, within its budgets."""

from __future__ import annotations

import pytest
from sources import inputs, make

from formix.conversion.search import search


def batches() -> tuple:
    source = make("bert-features").float()
    return source, [inputs(source)] * 2


def test_the_curve_grows_by_the_cheapest_layer() -> None:
    source, given = batches()
    found = search(source, "relu", given, most=3, metrics={"constant": lambda model: 1.0})
    order = sorted(range(3), key=found.costs.__getitem__)
    assert [p.layers for p in found.curve] == [sorted(order[:n]) for n in range(4)]
    assert found.curve[0].loss == pytest.approx(0, abs=1e-5)
    assert found.curve[1].loss == pytest.approx(min(found.costs), rel=1e-4)
    assert all(p.milliseconds > 0 and p.metrics == {"constant": 1.0} for p in found.curve)
    assert found.chosen == [0, 1, 2]
    assert "chosen: layers 0, 1, 2" in str(found)


def test_budgets_end_the_search() -> None:
    source, given = batches()
    free = search(source, "relu", given, most=3)
    limit = (free.curve[1].loss + free.curve[2].loss) / 2
    assert search(source, "relu", given, most=3, max_loss=limit).chosen == free.curve[1].layers
    assert search(source, "relu", given, most=3, max_loss=1e-9).chosen == []
    assert search(source, "relu", given, most=3, max_milliseconds=1e6).chosen == []
    with pytest.raises(ValueError, match="ms or less"):
        search(source, "relu", given, most=1, max_milliseconds=1e-6)
    with pytest.raises(ValueError, match="the model has 3"):
        search(source, "relu", given, most=4)
    with pytest.raises(ValueError, match="two batches"):
        search(source, "relu", given[:1], most=1)
