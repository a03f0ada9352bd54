"""Kill a training run many times, also while it writes a checkpoint, and compare it with one that was left alone.

    python scripts/kill_and_resume.py                  # 20 kills
    python scripts/kill_and_resume.py --kills=100 --seed=1

A small model is trained on digits with augmentation, dropout, accumulation and a moving average. Every second kill
(SIGKILL: nothing can be tidied up) waits for a checkpoint's writing to begin; the others come at random, at the start
or later. The killed run is started again each time. Exit status 0 if its weights, optimiser state, averages, losses
and metrics equal those of the undisturbed run bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
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

RUN = [
    "train", "--data=digits", "--limit=256", "--design=relu", "--precision=float32", "--threads=1", "--batch-size=30",
    "--accumulation=2", "--ema=0.95", "--augmentation.shift=1", "--augmentation.erasing=0.25",
    "--augmentation.mixup=0.2", "--evaluations=6", "--save-steps=3", "--save-minutes=0", "--log-steps=1", "--keep=2",
    '--model_args={"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 4, "drop_path_rate": 0.1}',
]  # fmt: skip
SERVER = multiprocessing.get_context("forkserver")  # imports once, so that a new process starts at once
SERVER.set_forkserver_preload(["formix.training.loop", "formix.comparison.models", "sklearn.datasets"])


def train(out: Path, epochs: int) -> None:
    """What a process does: exactly `formix train ...`."""
    from formix.cli import main

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    sys.exit(main([*RUN, f"--epochs={epochs}", f"--out={out}"]))


def undisturbed(out: Path, epochs: int) -> float:
    """Seconds that the run takes."""
    child = SERVER.Process(target=train, args=(out, epochs))
    begin = time.perf_counter()
    child.start()
    child.join()
    assert child.exitcode == 0, "the undisturbed run failed"
    return time.perf_counter() - begin


def killed(out: Path, epochs: int, kills: int, longest: float, draw: random.Random) -> tuple[int, int]:
    """Kill and restart until the run ends by itself: how many kills there were, and how many while it was writing."""
    done, in_writing = 0, 0
    while True:
        child, remains = SERVER.Process(target=train, args=(out, epochs)), partial(out)
        child.start()
        if done < kills:
            moment = ("later", "in writing", "early", "in writing")[done % 4]
            if moment != "early":  # after some progress, else the run would never end
                wait(child, out, newest(out), until_writing=moment == "in writing")
            child.join(draw.uniform(0, 0.02 if moment == "in writing" else longest))
        else:
            child.join()
        if not child.is_alive():
            if child.exitcode != 0:
                raise SystemExit(f"the run ended by itself with status {child.exitcode}")
            return done, in_writing
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        done += 1
        inside = partial(out) not in (remains, {})
        in_writing += inside
        print(f"kill {done:3}: after {newest(out) or 'the start'}{', in the writing of the next' * inside}", flush=True)


def wait(child: Any, out: Path, before: str, *, until_writing: bool) -> None:
    """Until there is another checkpoint than `before`, and then the next one is being written."""
    while child.is_alive() and (newest(out) == before or (until_writing and not partial(out))):
        time.sleep(0.001)


def newest(out: Path) -> str:
    return max((p.name for p in (out / "checkpoints").glob("step-*")), default="")


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
    last = newest(one)
    for path in ("model/model.safetensors", *(f"checkpoints/{last}/{p}" for p in shards(one / "checkpoints" / last))):
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


def shards(checkpoint: Path) -> list[str]:
    return sorted(f"training/{path.name}" for path in (checkpoint / "training").iterdir())


def metrics(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return [row | {"seconds": ""} for row in csv.DictReader(file)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=30, help="9 steps each, with a checkpoint every 3")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        calm, disturbed = Path(folder, "calm"), Path(folder, "disturbed")
        seconds = undisturbed(calm, arguments.epochs)
        longest = seconds / (2 * arguments.kills + 1)
        draw = random.Random(arguments.seed)
        kills, in_writing = killed(disturbed, arguments.epochs, arguments.kills, longest, draw)
        print(f"{kills} kills, {in_writing} of them inside the writing of a checkpoint")
        odd = differences(calm, disturbed)
    if kills < arguments.kills:
        print("the run ended before all kills; give it more --epochs")
        return 1
    print("the killed run equals the undisturbed one" if not odd else f"DIFFERENT: {', '.join(odd[:5])}")
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main())
