"""Kill a training run many times, also while it writes a checkpoint, and compare it with one that was left alone.

    python scripts/kill_and_resume.py                  # 20 kills
    python scripts/kill_and_resume.py --kills=100 --epochs=150 --seed=1

A small model is trained on digits with augmentation, dropout, accumulation and a moving average. Every second kill
(SIGKILL: nothing can be tidied up) waits for a checkpoint's writing to begin; the others come at random, at the start
or later. Progress bounds them: a process stands still after its share of the checkpoints that remain, so the run has
all its kills before its end on any machine. The killed run is started again each time. Exit status 0 if its weights,
optimiser state, averages, losses and metrics equal those of the undisturbed run bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

STEPS, SAVED = 9, 3  # steps of an epoch; steps between checkpoints
RUN = [
    "train", "--data=digits", "--limit=256", "--design=relu", "--precision=float32", "--threads=1", "--batch-size=30",
    "--accumulation=2", "--ema=0.95", "--augmentation.shift=1", "--augmentation.erasing=0.25",
    "--augmentation.mixup=0.2", "--evaluations=6", f"--save-steps={SAVED}", "--save-minutes=0", "--log-steps=1",
    "--keep=2",
    '--model_args={"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 4, "drop_path_rate": 0.1}',
]  # fmt: skip
SERVER = multiprocessing.get_context("forkserver")  # imports once, so that a new process starts at once
SERVER.set_forkserver_preload(["formix.training.loop", "formix.comparison.models", "sklearn.datasets"])


def train(out: Path, epochs: int, last: float) -> None:
    """What a process does: exactly `formix train ...`, which stands still after the checkpoint of step `last`."""
    from formix.cli import main
    from formix.training import Checkpoints

    write, server = Checkpoints.write, os.getppid()

    def write_and_stand(self: Checkpoints, step: int, *rest: Any) -> None:
        write(self, step, *rest)
        while step >= last and os.getppid() == server:  # which ends with the script: then nobody kills this any more
            time.sleep(0.1)

    Checkpoints.write = write_and_stand  # type: ignore[method-assign]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    sys.exit(main([*RUN, f"--epochs={epochs}", f"--out={out}"]))


def undisturbed(out: Path, epochs: int) -> float:
    """Seconds that the run takes from its first checkpoint on."""
    child = SERVER.Process(target=train, args=(out, epochs, math.inf))
    child.start()
    wait_for_progress(child, out, 0, math.inf)
    begin = time.perf_counter()
    child.join()
    assert child.exitcode == 0, "the undisturbed run failed"
    return time.perf_counter() - begin


def killed(out: Path, epochs: int, kills: int, longest: float, draw: random.Random) -> int:
    """Kill and restart that many times, then let the run end; how many kills were while it was writing."""
    in_writing = 0
    for number in range(kills):
        before, remains = newest(out), partial(out)
        left = (STEPS * epochs - before) // SAVED  # checkpoints
        last = before + SAVED * max(1, left // (kills - number + 1))
        child = SERVER.Process(target=train, args=(out, epochs, last))
        child.start()
        moment = ("later", "in writing", "early", "in writing")[number % 4]
        if moment != "early":  # after some progress, else the run would never end
            wait_for_progress(child, out, before, last, until_writing=moment == "in writing")
        child.join(draw.uniform(0, 0.02 if moment == "in writing" else longest))
        if not child.is_alive():
            raise SystemExit(f"the run ended by itself with status {child.exitcode}")
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        inside = partial(out) not in (remains, {})
        in_writing += inside
        reached = f"after step {newest(out)}" if newest(out) else "at the start"
        print(f"kill {number + 1:3}: {reached}{', in the writing of the next' * inside}", flush=True)
    child = SERVER.Process(target=train, args=(out, epochs, math.inf))
    child.start()
    child.join()
    if child.exitcode != 0:
        raise SystemExit(f"the run ended by itself with status {child.exitcode}")
    return in_writing


def wait_for_progress(child: Any, out: Path, before: int, last: float, *, until_writing: bool = False) -> None:
    """Until there is a checkpoint after step `before`, and then the next is being written or that of `last` is done."""
    while child.is_alive() and newest(out) <= before:
        time.sleep(0.001)
    while until_writing and child.is_alive() and not partial(out) and newest(out) < last:
        time.sleep(0.001)


def newest(out: Path) -> int:
    """The step of the newest checkpoint, 0 before the first."""
    return max((int(p.name.removeprefix("step-")) for p in (out / "checkpoints").glob("step-*")), default=0)


def partial(out: Path) -> dict[str, int]:
    """The unfinished checkpoints, each with the directory's own number: those that a kill left differ from new ones."""
    found = {}
    for path in (out / "checkpoints").glob(".partial-0*"):
        with contextlib.suppress(FileNotFoundError):  # finished meanwhile
            found[path.name] = path.stat().st_ino
    return found


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same in two finished runs."""
    found = []
    last = f"checkpoints/step-{newest(one):09d}/training"
    shards = sorted(path.name for path in (one / last).iterdir())
    for path in ("model/model.safetensors", *(f"{last}/{shard}" for shard in shards)):
        mine, theirs = load_file(one / path), load_file(other / path)
        odd = [name for name in mine.keys() | theirs.keys() if not mine[name].equal(theirs[name])]
        found += [f"{path}: {name}" for name in odd]
        print(f"{path}: {len(mine) - len(odd)} of {len(mine)} tensors equal bit for bit")
    rows, others = metrics(one), metrics(other)
    print(f"metrics.csv: {sum(a == b for a, b in zip(rows, others, strict=False))} of {len(rows)} rows equal")
    found += ["metrics.csv"] if rows != others else []
    results = [json.loads((out / "result.json").read_text()) | {"seconds": 0} for out in (one, other)]
    print(f"result.json: {'equal' if results[0] == results[1] else 'different'}")
    return found + (["result.json"] if results[0] != results[1] else [])


def metrics(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return [row | {"seconds": ""} for row in csv.DictReader(file)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=30, help="9 steps and 3 checkpoints each")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    if arguments.epochs * STEPS // SAVED <= arguments.kills:
        parser.error(f"--epochs={arguments.epochs} has too few checkpoints for --kills={arguments.kills}; give more.")
    with tempfile.TemporaryDirectory() as folder:
        calm, disturbed = Path(folder, "calm"), Path(folder, "disturbed")
        seconds = undisturbed(calm, arguments.epochs)
        longest = seconds / (2 * arguments.kills + 1)
        draw = random.Random(arguments.seed)
        in_writing = killed(disturbed, arguments.epochs, arguments.kills, longest, draw)
        print(f"{arguments.kills} kills, {in_writing} of them inside the writing of a checkpoint")
        odd = differences(calm, disturbed)
    print("the killed run equals the undisturbed one" if not odd else f"DIFFERENT: {', '.join(odd[:5])}")
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main())
