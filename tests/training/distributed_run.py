"""A small run for tests with several processes; started alone, by torchrun, or by `launch` in new processes."""

import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import set_seed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import formix
from formix.data import load_data
from formix.training import Checkpoints, Interrupted, Step, TrainConfig, evaluate, train
from formix.training.parallel import gathered

TINY = {"embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0, "class_token": False, "global_pool": "avg"}
SERVER = multiprocessing.get_context("forkserver")  # imports once, then starts processes in no time
SERVER.set_forkserver_preload(["training.distributed_run", "timm", "transformers"])


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Train `designs` one after the other, stopped by a signal at step `stop_at`; what the runs showed."""
    data = load_data("digits", limit=300, **settings.get("data", {}))
    results = {}
    for design in settings["designs"]:
        set_seed(0)
        name, arguments = settings.get("model", ("vit_tiny_patch16_224", {**TINY, "img_size": 8, "patch_size": 4}))
        model = formix.create_model(name, design, **arguments, in_chans=1, num_classes=10)
        losses = {}

        def on_step(step: Step, losses: dict = losses) -> None:
            losses[step.step] = step.loss
            if step.step == settings.get("stop_at"):
                os.kill(os.getpid(), signal.SIGTERM)

        directory = settings.get("checkpoints")
        checkpoints = Checkpoints(Path(directory, design), minutes=0) if directory else None
        # odd batches, so that one process has a sample fewer, and the last batch of an epoch is smaller
        changes = settings.get("config", {})
        usual = {"epochs": 5.0, "batch_size": 31, "accumulation": 2, "ema": 0.9, "precision": "float32"}
        config = TrainConfig(**{**usual, "evaluations": 2, **changes})
        parallel = settings.get("parallel", "ddp")
        try:
            result = train(model, data, config, checkpoints=checkpoints, parallel=parallel, on_step=on_step)
        except Interrupted:
            continue
        results[design] = {
            "losses": list(losses.values()),
            "first": min(losses, default=0),  # steps are reported on the first process
            "curve": [point.validation for point in result.curve],
            "test": evaluate(model, data, "test", batch_size=50),
            "samples": result.samples,
            "statistics": gathered({n: b.tolist() for n, b in model.named_buffers() if b.is_floating_point()}),
            "ema": {name: tensor.tolist() for name, tensor in whole_weights(model).items()},
        }
    return results


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights on every process, of shards put together; at the end of a run they are its moving average."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def launch(processes: int, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """`main` on new processes."""
    for child in start(processes, _main, out, settings):
        child.join(600)
        assert child.exitcode == 0
    return json.loads(out.read_text())


def launch_command(processes: int, out: Path, arguments: list[str]) -> list[Any]:
    """The command line on new processes, whose standard error goes to the files 0, 1 ... in `out`."""
    out.mkdir()
    return start(processes, _command, out, arguments)


def start(processes: int, target: Any, *arguments: Any) -> list[Any]:
    """New processes that find one another by the environment, as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    ranks = [{**environment, "MASTER_PORT": port, "RANK": r} for r in range(processes)]
    children = [SERVER.Process(target=target, args=(rank, *arguments)) for rank in ranks]
    for child in children:
        child.start()
    return children


def _main(environment: dict[str, Any], out: Path, settings: dict[str, Any]) -> None:
    _enter(environment)
    results = main(settings)
    if not dist.is_initialized() or dist.get_rank() == 0:
        out.write_text(json.dumps(results))
    if dist.is_initialized():
        dist.destroy_process_group()


def _command(environment: dict[str, Any], out: Path, arguments: list[str]) -> None:
    from formix.cli import main

    _enter(environment)
    with (out / str(environment["RANK"])).open("w") as file:
        os.dup2(file.fileno(), 2)
        sys.exit(main(arguments))


def _enter(environment: dict[str, Any]) -> None:
    os.environ.update({key: str(value) for key, value in environment.items()}, CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)


if __name__ == "__main__":
    _main({}, Path(sys.argv[1]), json.loads(sys.argv[2]))
