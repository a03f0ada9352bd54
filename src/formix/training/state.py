"""What a run needs to go on as if it had never stopped."""

from __future__ import annotations

import base64
import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from formix.training.ema import Ema
from formix.training.parallel import process_count


def named_tensors(model: nn.Module, optimizer: Optimizer, ema: Ema | None) -> dict[str, Tensor]:
    """Weights, optimiser state and averages by name: the tensors themselves, sharded ones as this process's shards.

    Weights that are used in two places (an embedding and the output layer) come once, under their first name.
    """
    once = {id(tensor): (name, tensor.detach()) for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    tensors = {f"model.{name}": tensor for name, tensor in once.values()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"optimizer.{names[parameter]}.{key}": value for key, value in state.items()}
    if ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in ema.weights.items()}
    return tensors


def make_optimizer_state(model: nn.Module, optimizer: Optimizer, stored: dict[str, tuple[int, ...]]) -> None:
    """Give a new optimiser the state tensors that are in a checkpoint, to be filled."""
    optimizer.state.clear()
    parameters = dict(model.named_parameters())
    for name, shape in stored.items():
        kind, _, rest = name.partition(".")
        owner, _, key = rest.rpartition(".")
        if kind == "optimizer" and owner in parameters:
            parameter = parameters[owner]
            like = parameter.detach()
            sized = torch.zeros_like(like) if shape == tuple(like.shape) else torch.zeros(shape, device=like.device)
            optimizer.state[parameter][key] = sized


def export(model: nn.Module, skeleton: nn.Module | None, write: Callable[[nn.Module], None]) -> None:
    """Write the model on the first process; of a sharded one, `skeleton` takes the whole weights."""
    if isinstance(model, FSDPModule):
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if skeleton is None:
            return
        skeleton.load_state_dict(weights)
        model = skeleton
    if process_count()[0] == 0:
        write(model)


def make_skeleton(model: nn.Module) -> nn.Module | None:
    """A copy of the model, before it is sharded, for `export`; on the first process."""
    return copy.deepcopy(model).cpu() if process_count()[0] == 0 else None


def random_states() -> dict[str, Any]:
    """Python's, NumPy's and PyTorch's generators, as JSON."""
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "torch": _text(torch.get_rng_state()),
        "cuda": [_text(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """What `random_states` gave."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = states["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.set_rng_state(_tensor(states["torch"]))
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_tensor(state) for state in states["cuda"]])


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
