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


WRONG = {
    "no rank": (
        {"WORLD_SIZE": "2"},
        "WORLD_SIZE in the environment is 2 and RANK is not set; give each process one of 0",
    ),
    "rank too high": ({"WORLD_SIZE": "2", "RANK": "2"}, "is 2 and RANK is 2; give each process one of 0 to 1"),
    "a word": ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "abc"}, "MASTER_PORT in the environment is 'abc'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_environment_that_does_not_say_which_process_this_is(case, monkeypatch):
    environment, named = WRONG[case]
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=named):
        parallel.start()
