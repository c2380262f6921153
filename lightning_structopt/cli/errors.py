"""Errors of the command line in one line: what is wrong, and which names come near."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from inspect import signature

import lightning.pytorch as pl

_IN_CLASS = re.compile(r"class_path '(?P<owner>[\w.]+)': (?:Option|Key) '(?P<name>[\w.]+)'")
_NO_CLASS = re.compile(r"class_path '[\w.]+': module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'")
_OPTION = re.compile(r"(?:Option|Key|option) '(?P<name>[\w.]+)'|arguments: --(?P<flag>[\w.]+)")
_KEY = re.compile(r'Parser key "(?P<key>[\w.]+)"')
_LIGHTNINGS = ("seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler", "ckpt_path")
_TAIL = re.compile(
    r" (?:Not a valid subclass of|- Expected a|Given value type:|Check the documentation of).*"
)


def one_line(error: Exception, known: Iterable[str] = _LIGHTNINGS) -> str:
    """Return what ``error`` says in one line, with the names that come near one that is not known.

    Args:
        error: Whatever was raised.
        known: The arguments of the command.
    """
    message = " ".join(str(error).split()) or type(error).__name__
    key = _KEY.search(message)
    where = f"`{key['key']}`: " if key else ""
    if found := _IN_CLASS.search(message):
        names = _parameters_of(found["owner"])
        return f"{where}`{found['owner']}` has no argument '{found['name']}'.{_near(found['name'], names)}"
    if found := _NO_CLASS.search(message):
        names = [name for name in dir(import_module(found["module"])) if not name.startswith("_")]
        return f"{where}`{found['module']}` has no '{found['name']}'.{_near(found['name'], names)}"
    if found := _OPTION.search(message):
        name = found["name"] or found["flag"]
        return f"There is no '{name}'.{_near_key(name, known)}"
    if "Weights only load failed" in message:
        return "A checkpoint must be a file of tensors and plain data, so that loading it runs no code. Found another."
    return _TAIL.sub("", message)


def _near_key(name: str, known: Iterable[str]) -> str:
    """Return a hint for an argument of the command, or of its Trainer."""
    owner, _, last = name.rpartition(".")
    if owner == "trainer":
        return _near(last, signature(pl.Trainer).parameters)
    return _near(name.partition(".")[0], known)


def _near(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, known)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _parameters_of(class_path: str) -> Iterable[str]:
    module, _, name = class_path.rpartition(".")
    return signature(getattr(import_module(module), name)).parameters
