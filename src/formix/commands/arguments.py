"""Configurations out of flags and YAML files."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from formix.commands.comments import comments
from formix.design import split_outside_brackets

# what a verb takes without a flag
USAGE = {
    "compare": "[STUDY.yaml ...]",
    "convert": "SOURCE | STUDY.yaml",
    "train": "[RUN.yaml | activator-cifar | bert-finetune | big-vision-i1k | deit | gpt2 | roberta-mlm | xcit]",
    "eval": "MODEL",
    "export": "MODEL",
    "predict": "MODEL [INPUT ...]",
    "report": "RESULTS ...",
    "analyze": "MODEL",
    "designs": "[DESIGN ...]",
    "data": "",
    "implementations": "",
}


def parse(config_class: Any, verb: str, flags: list[str]) -> Any:
    """The dataclass out of flags and YAML; both dashes and underscores are taken in flags' names.

    Raises:
        ValueError: an unknown name, or a value of another type; one sentence that names it and what is allowed.
    """
    return parse_several([config_class], verb, flags)[0]


def parse_several(config_classes: Sequence[Any], verb: str, flags: list[str]) -> list[Any]:
    """Several dataclasses whose fields stand side by side in the flags and the YAML; `--config` comes first."""
    try:
        return _parsed(config_classes, verb, [_underscored(flag) for flag in flags])
    except ValueError as error:
        if flags[:1] != ["--config"] or len(flags) == 1 or _is_of_a_flag(str(error), flags):
            raise
        raise ValueError(f"{flags[1]}: {error}") from None


def split_named(arguments: Sequence[str], *config_classes: Any) -> tuple[list[str], list[str]]:
    """What stands without a flag, and the flags, each with its value: --top 3 is --top=3; - is no flag."""
    kinds = {name: kind for config_class in config_classes for name, kind in get_type_hints(config_class).items()}
    named: list[str] = []
    flags: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if not argument.startswith("-") or argument == "-":
            named.append(argument)
            continue
        switch = kinds.get(_underscored(argument)[2:]) is bool and "".join(left[:1]).lower() not in ("true", "false")
        alone = switch or "=" in argument or argument in ("-h", "--help")
        if not alone and left and not left[0].startswith("--"):
            argument += f"={left.pop(0)}"
        flags.append(argument)
    return named, flags


def split_one(verb: str, arguments: Sequence[str], *config_classes: Any) -> tuple[str | None, list[str]]:
    """The one argument that stands without a flag, first or last, or None; and the flags.

    Raises:
        ValueError: several.
    """
    named, flags = split_named(arguments, *config_classes)
    if len(named) > 1:
        raise ValueError(
            f"{', '.join(map(repr, named))} stand without a flag, and formix {verb} takes one such argument; "
            f"formix {verb} --help lists the flags."
        )
    return (named[0] if named else None), flags


def parse_model(config_class: Any, verb: str, arguments: Sequence[str]) -> Any:
    """The dataclass whose `model` may stand without its flag."""
    model, flags = split_one(verb, arguments, config_class)
    return parse(config_class, verb, flags if model is None else [f"--model={model}", *flags])


def _parsed(config_classes: Sequence[Any], verb: str, flags: list[str]) -> list[Any]:
    from jsonargparse import ArgumentError, ArgumentParser

    _refuse_equal_keys()
    about = " ".join(config_class.__doc__ for config_class in config_classes)
    usage = f"{_call(verb)} [--FLAG=VALUE ...]"
    parser = ArgumentParser(prog=f"formix {verb}", usage=usage, exit_on_error=False, description=about)
    parser.add_argument("--config", action="config", help="a YAML file with these settings")
    for config_class in config_classes:
        parser.add_class_arguments(config_class)
    if {"-h", "--help"} & set(flags):
        for action in parser._actions:
            action.help = action.help or _explanation(action.dest, config_classes)
    switches = {
        field.name
        for config_class in config_classes
        for field in dataclasses.fields(config_class)
        if get_type_hints(config_class)[field.name] is bool
    }
    try:
        values = parser.parse_args(_with_values(flags, switches)).as_dict()
    except ArgumentError as error:
        raise ValueError(_sentence(str(error), config_classes, verb)) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"the file is no UTF-8 text ({error}).") from None
    return [_build(config_class, values) for config_class in config_classes]


def _call(verb: str) -> str:
    return f"formix {verb} {USAGE.get(verb, '')}".rstrip()


def _explanation(key: str, config_classes: Sequence[Any]) -> str | None:
    """The comment that stands beside a field, for --help."""
    group, _, name = key.rpartition(".")
    kinds = [_kind_of(config_class, group) for config_class in config_classes] if group else config_classes
    found = {k: text for kind in kinds if dataclasses.is_dataclass(kind) for k, text in comments(kind).items()}  # type: ignore[arg-type]
    return found.get(name, "").replace("%", "%%") or None


@functools.cache
def _refuse_equal_keys() -> None:
    """Of equal keys in YAML jsonargparse keeps the last without a word; with this they are an error."""
    import yaml
    from jsonargparse import get_loader, set_loader

    load = get_loader("yaml")

    def load_strictly(text: str) -> Any:
        value = load(text)
        if isinstance(value, dict):
            check(yaml.compose(text, yaml.SafeLoader))
        return value

    def check(node: yaml.Node | None) -> None:
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                check(item)
        elif isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"{key.value!r} is there twice, in line {line} again; keep one")
                seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
                check(value)

    set_loader("yaml", load_strictly, exceptions=(yaml.YAMLError,))


def _build(config_class: Any, values: dict[str, Any]) -> Any:
    kinds = get_type_hints(config_class)
    arguments = {}
    for field in dataclasses.fields(config_class):
        value, kind = values[field.name], kinds[field.name]
        if value is None and not _takes_none(kind):  # jsonargparse lets null pass for every type
            raise ValueError(f"{field.name} is null; it must be {_words(kind)}.")
        nested = dataclasses.is_dataclass(kind) and isinstance(value, dict)
        arguments[field.name] = kind(**value) if nested else value
    return config_class(**arguments)


def _is_of_a_flag(message: str, flags: Sequence[str]) -> bool:
    """Whether a message, which begins with a setting's name, is about one of the flags and not about the file."""
    given = {re.split(r"[=.]", _underscored(flag)[2:])[0] for flag in flags if flag.startswith("--")}
    return re.split(r"\W", message.removeprefix("--"))[0] in given


def _with_values(flags: list[str], switches: set[str]) -> list[str]:
    """A switch that stands alone is true: `--plan` is `--plan=true`."""
    following = [*flags, "--"][1:]
    return [
        f"{flag}=true" if flag[2:] in switches and flag.startswith("--") and after.startswith("--") else flag
        for flag, after in zip(flags, following, strict=True)
    ]


def _underscored(flag: str) -> str:
    if not flag.startswith("--"):
        return flag
    name, equals, value = flag.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def names(text: str, what: str, *, empty: bool = False) -> tuple[str, ...]:
    """The parts of a list with commas; commas inside brackets belong to a design's options.

    Raises:
        ValueError: a part is there twice, or there is none and `empty` does not allow it.
    """
    found = tuple(part.strip() for part in split_outside_brackets(text, ",") if part.strip())
    if len(set(found)) < len(found):
        raise ValueError(f"{what} is {text!r}; something is named twice.")
    if not found and not empty:
        raise ValueError(f"{what} is empty; name at least one.")
    return found


def numbers(text: str, what: str) -> tuple[int, ...]:
    """The numbers of a list with commas.

    Raises:
        ValueError: one is no positive whole number or is there twice, or there is none.
    """
    found = names(text, what)
    if wrong := [part for part in found if not part.isdecimal() or int(part) < 1]:
        raise ValueError(f"{what} has {wrong[0]!r}; it must be positive whole numbers with commas, such as '197,785'.")
    return tuple(map(int, found))


def _sentence(message: str, config_classes: Sequence[Any], verb: str) -> str:
    """What jsonargparse says, with the allowed values in words."""
    text = " ".join(message.split())
    key = re.match(r'Parser key "([\w.]+)"', text)
    given = re.search(r".*(?:Given|Got) value: (.*)$", text)
    kinds = [_kind_of(config_class, key[1]) for config_class in config_classes] if key else []
    kind = next((kind for kind in kinds if kind is not None), None)
    if key and given and kind is not None:
        return f"{key[1]} is {given[1]}; it must be {_words(kind)}."
    if missing := re.match(r"the following arguments are required: (.*)", text):
        keys = missing[1].split(", ")
        what = f"{' and '.join(keys)} {'are' if len(keys) > 1 else 'is'} missing"
        return f"{what}; usage: {_call(verb)} [--FLAG=VALUE ...]; formix {verb} --help lists the flags."
    if text.startswith("Unexpected config"):
        return "the file holds no settings, which are lines of the form 'name: value'."
    if unknown := re.match(r"Option '(.+)' is not accepted|Group '(.+)' does not accept option '(.+)'", text):
        return _unknown(unknown[1] or f"{unknown[2]}.{unknown[3]}", config_classes, verb)
    if unknown := re.match(r"unrecognized arguments: --([\w.]+)", text):
        return "--" + _unknown(unknown[1], config_classes, verb)
    if text.startswith("unrecognized arguments"):
        return f"{text}; formix {verb} --help lists the flags."
    return text


def _unknown(key: str, config_classes: Sequence[Any], verb: str) -> str:
    """What to say of a setting that there is not, with the nearest of those beside it, else all."""
    group, _, name = key.rpartition(".")
    kinds = [_kind_of(config_class, group) for config_class in config_classes] if group else config_classes
    allowed = [field.name for kind in kinds if dataclasses.is_dataclass(kind) for field in dataclasses.fields(kind)]
    initials = "".join(word[:1] for word in name.split("_"))  # learning_rate is lr, or lrs
    near = [n for n in allowed if n.removesuffix("s") == initials]
    near = near or difflib.get_close_matches(name, allowed, cutoff=0.5)
    near, allowed = ([f"{group}.{n}" if group else n for n in found] for found in (near, allowed))
    if near:
        advice = f"did you mean {' or '.join(near)}?"
    else:
        advice = f"known are {', '.join(allowed)}." if allowed else "leave it out."
    return f"{key} is no setting of formix {verb}; {advice} formix {verb} --help explains all."


def _kind_of(config_class: Any, key: str) -> Any:
    """The annotation of a field, or of a field of a field (augmentation.mixup); None if there is none."""
    for name in key.split("."):
        if not dataclasses.is_dataclass(config_class):
            return None
        config_class = get_type_hints(config_class).get(name)
    return config_class


def _takes_none(kind: Any) -> bool:
    return kind is Any or kind is None or types.NoneType in get_args(kind)


def _words(kind: Any) -> str:
    """A type for people: `int | None` is "a whole number, or null"."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        parts = [_words(part) for part in arguments if part is not types.NoneType]
        return " or ".join(parts) + (", or null" if types.NoneType in arguments else "")
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is dict:
        return 'a mapping such as {"name": value}'
    if origin in (list, tuple):
        return "a list"
    return {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}.get(kind, "a mapping")
