import math

import pytest

from formix.training.schedules import lr_factor


def test_constant_holds_and_then_falls_linearly_to_the_floor():
    def factor(progress):
        return lr_factor(progress, "constant", warmup=0.1, cooldown=0.2, floor=0.1)

    assert [factor(p) for p in (0.05, 0.1, 0.5, 0.8)] == [0.5, 1, 1, 1]
    assert factor(0.9) == pytest.approx(0.55)
    assert factor(1.0) == pytest.approx(0.1)


def test_rsqrt_is_big_visions_with_its_timescale_at_the_warm_up():
    total, warmup, cooldown = 1000, 100, 200

    def big_vision(step):  # lr / sqrt((step + timescale - warmup) / timescale), times warm-up and cool-down
        decayed = 1 / math.sqrt(step / warmup) if step > warmup else 1.0
        return decayed * min(1, step / warmup) * min(1, (total - step) / cooldown)

    for step in (0, 50, 100, 400, 800, 900, 1000):
        ours = lr_factor(step / total, "rsqrt", warmup=warmup / total, cooldown=cooldown / total)
        assert ours == pytest.approx(big_vision(step), abs=1e-12)


def test_cosine_ends_at_the_floor():
    assert lr_factor(1.0, floor=0.01) == pytest.approx(0.01)
    assert lr_factor(0.5, floor=0.2) == pytest.approx(0.6)
    assert lr_factor(1.5, floor=0.01) == pytest.approx(0.01)
