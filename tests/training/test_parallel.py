from types import SimpleNamespace

import pytest
from torch import nn

from formix.training import parallel


class Placed(nn.Sequential):
    """A model that takes any device for its own."""

    def to(self, device):
        return self


@pytest.mark.parametrize(("device", "kind"), [("cuda", nn.SyncBatchNorm), ("cpu", nn.BatchNorm1d)])
def test_batch_norm_is_synchronised_where_pytorch_can(monkeypatch, device, kind):
    monkeypatch.setattr(parallel, "process_count", lambda: (0, 2))
    monkeypatch.setattr(parallel, "DistributedDataParallel", lambda model, **options: model)
    model = Placed(nn.Linear(2, 2), nn.BatchNorm1d(2))
    weights = list(model.parameters())
    assert parallel.distribute(model, "ddp", SimpleNamespace(type=device)) is model
    assert type(model[1]) is kind
    assert all(mine is theirs for mine, theirs in zip(weights, model.parameters(), strict=True))
