"""`structopt`: train, sweep, measure and shrink from YAML files and flags, by jsonargparse."""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from inspect import signature

from typing_extensions import override

from lightning_structopt import __version__
from lightning_structopt.cli.commands import COMMANDS
from lightning_structopt.cli.errors import one_line

LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `structopt`: a command, then its flags or ``--config FILE``.

    Args:
        arguments: Those of the command line if not given.

    Returns:
        The exit status: 0, or 2 after an error, of which one line is printed (with ``--debug`` the traceback).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    chosen = _parser().parse_args([argument for argument in given if argument != "--debug"])
    sys.path.insert(
        0, os.getcwd()
    )  # as `python -m` does, so that a `class_path` may be of a file that lies here
    try:
        _run(chosen.command, chosen.arguments)
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            own = [signature(COMMANDS[chosen.command]).parameters] if chosen.command in COMMANDS else []
            print(f"structopt {chosen.command}: {one_line(error, *own)}", file=sys.stderr)
        return 2
    finally:
        sys.path.remove(os.getcwd())
    return 0


def _parser() -> argparse.ArgumentParser:
    summaries = {name: (command.__doc__ or "").splitlines()[0] for name, command in COMMANDS.items()}
    summaries |= {
        name: f"Lightning's own `{name}`, with callbacks and wrappers of ours." for name in LIGHTNING_COMMANDS
    }
    lines = [f"  {name:10}{summaries[name]}" for name in sorted(summaries)]
    parser = argparse.ArgumentParser(
        prog="structopt",
        description="Make models smaller, faster or better from the command line.",
        epilog="commands:\n" + "\n".join(lines) + "\n\n`structopt COMMAND --help` lists what it takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("command", choices=sorted(summaries), metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its flags, or --config FILE")
    return parser


def _run(command: str, arguments: list[str]) -> None:
    if command == "doctor" and not arguments:  # which says what is missing, be it what the others need
        COMMANDS[command]()
        return
    try:
        import jsonargparse
    except ImportError as error:
        raise ImportError(
            'Commands need jsonargparse. Found none. Run `pip install "lightning-structopt[cli]"`.'
        ) from error
    if command in LIGHTNING_COMMANDS:
        _run_lightning(command, arguments)
        return

    class Brief(jsonargparse.DefaultHelpFormatter):
        """Leaves out the hundreds of modules that PyTorch itself has."""

        @override
        def _expand_help(self, action: argparse.Action) -> str:
            return re.sub(r", known subclasses: [^)]*", "", super()._expand_help(action))

    parser = jsonargparse.ArgumentParser(
        prog=f"structopt {command}", exit_on_error=False, formatter_class=Brief
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the below")
    parser.add_function_arguments(COMMANDS[command], as_group=False)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before 4.49
    found = instantiate(parser.parse_args(arguments))
    found.pop("config", None)
    COMMANDS[command](**found.as_dict())


def _run_lightning(command: str, arguments: list[str]) -> None:
    from lightning.pytorch.cli import LightningCLI

    before, sys.argv = sys.argv, ["structopt", command, *arguments]  # it warns of arguments from elsewhere
    try:
        LightningCLI(
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"exit_on_error": False}
            | dict.fromkeys(LIGHTNING_COMMANDS, {"exit_on_error": False}),
        )
    finally:
        sys.argv = before
