"""Exporting a module's graph, and saying where in the user's code that failed."""

import sysconfig
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from lightning_structopt._undisturbed import in_mode, without_fast_path


def export(
    module: nn.Module, inputs: tuple[Any, ...], training: bool = False, dynamic: Any = None
) -> torch.export.ExportedProgram:
    """Return the module's graph at the level of ATen operators, in the precision that it runs in.

    Raises:
        ValueError: If the module can't be traced.
    """
    with in_mode(module, training), without_fast_path(), torch.no_grad(), warnings.catch_warnings():
        # Recurrent layers keep a list of their weights, which they fill anew while they are traced.
        warnings.filterwarnings("ignore", message=".*were assigned during export", category=UserWarning)
        # torch 2.7 says so of a module that is held outside of `_modules`, such as a teacher.
        warnings.filterwarnings(
            "ignore", message="Unable to find the path of the module", category=UserWarning
        )
        try:
            return _flat(torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False))
        except Exception as error:  # whatever the user's code or torch raises
            first = str(error).strip().splitlines()
            raise ValueError(
                "Shrinking needs a module that runs on `example_input` and that `torch.export` can trace: no control "
                f"flow that depends on data. Found `{type(module).__name__}` with {type(error).__name__}"
                f"{_line_of(error)}: {first[0] if first else ''}. Give inputs as `forward` takes them (a tuple for "
                "several), or move the branch out of `forward`."
            ) from error


def _line_of(error: BaseException) -> str:
    """Return where in the user's code an error was raised, in words; nothing if it was in none."""
    libraries = (Path(torch.__file__).parent, Path(__file__).parents[1])
    standard = Path(sysconfig.get_path("stdlib"))
    theirs = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(Path(frame.filename).is_relative_to(each) for each in libraries)
        # Installed packages are in a folder of the standard library's.
        and (not Path(frame.filename).is_relative_to(standard) or "site-packages" in frame.filename)
    ]
    return f" in {theirs[-1].filename}:{theirs[-1].lineno} (`{theirs[-1].line}`)" if theirs else ""


def line_of_node(node: fx.Node) -> str:
    """Return the line of the user's code that ran an operator, in words; nothing if it is not known."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    return f" ({lines[-2]}: `{lines[-1]}`)" if len(lines) > 1 else ""


def _flat(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Return the graph without graphs within it, which regions of ``torch.autocast`` are: with casts in their place."""
    nested = any("wrap_with_autocast" in str(node.target) for node in program.graph.nodes)
    return program.run_decompositions({}) if nested else program
