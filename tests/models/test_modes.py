import pytest
from torch import nn

from formix.models.modes import evaluating


def test_every_part_is_in_its_own_mode_again_after_an_exception_too():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    model.train()[1][1].eval()  # frozen
    before, inside = [module.training for module in model.modules()], []

    def look():
        with evaluating(model):
            inside.extend(module.training for module in model.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look()
    assert not any(inside)
    assert [module.training for module in model.modules()] == before
