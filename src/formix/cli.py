"""The command line: one verb, one function.

Verbs take flags and YAML files made from the same dataclasses; what is wrong with them is said in one sentence on
standard error, with exit status 2.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence

from formix.commands.analyze import analyze
from formix.commands.arguments import USAGE
from formix.commands.bench import bench
from formix.commands.compare import compare
from formix.commands.convert import convert
from formix.commands.evaluate import evaluate
from formix.commands.export import export
from formix.commands.lists import data, designs, implementations
from formix.commands.predict import predict
from formix.commands.report import report
from formix.commands.train import train

VERBS: dict[str, Callable[[list[str]], int]] = {
    "compare": compare,
    "convert": convert,
    "train": train,
    "eval": evaluate,
    "export": export,
    "predict": predict,
    "report": report,
    "analyze": analyze,
    "bench": bench,
    "designs": designs,
    "data": data,
    "implementations": implementations,
}
ALONE = ("compare", "convert")  # they train, and write to a directory, in one process
LISTS = ("designs", "data", "implementations")  # their arguments are no dataclass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    first = os.environ.get("RANK", "0") == "0"  # of several processes, which would all warn of the same
    logging.basicConfig(format="%(message)s", level=logging.WARNING if first else logging.ERROR)
    if not first:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # those of transformers' loading, too
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print("usage: formix VERB ...\n\n" + "\n".join(f"  {n:16} {_summary(f)}" for n, f in VERBS.items()))
        print("\nformix VERB --help lists the flags of a verb.")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from formix import __version__

        print(f"formix {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        return _fail(f"{verb!r} is no verb of formix; it has {', '.join(VERBS)}.")
    if verb in LISTS and rest in (["-h"], ["--help"]):
        print(f"usage: formix {verb} {USAGE[verb]}".rstrip() + f"\n\n{_summary(VERBS[verb])}")
        return 0
    if verb in ALONE and (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        return _fail(
            f"formix {verb} is one process, and WORLD_SIZE is {processes}; start it without torchrun or accelerate "
            "launch. formix train takes several."
        )
    try:
        status = VERBS[verb](rest)
        sys.stdout.flush()
        return status
    except ValueError as error:
        return _fail(" ".join(str(error).split()))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 1
        named = f"{error.filename}: {error.strerror}" if error.filename else " ".join(str(error).split())
        return _fail(named.rstrip(".") + ".")
    except KeyboardInterrupt as interrupt:
        number = getattr(interrupt, "number", signal.SIGINT)
        saved = str(interrupt)  # a training run says which signal ended it and what it saved, alike in all processes
        if first or not saved:
            print(f"formix: {saved or 'interrupted'}; the same command goes on from here.", file=sys.stderr)
        return 128 + number


def _summary(verb: Callable[..., int]) -> str:
    return (verb.__doc__ or "").splitlines()[0]


def _nobody_reads() -> bool:
    """Whether who read the output, `head` say, has ended; what is left of it is dropped then."""
    if not hasattr(select, "poll"):  # Windows
        return False
    output = select.poll()
    output.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _fail(sentence: str) -> int:
    process = os.environ.get("RANK", "0")  # of several, under torchrun
    print(f"formix: {sentence}" if process == "0" else f"formix (process {process}): {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
