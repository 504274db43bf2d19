"""Entry point of the command line: commands, errors of one line, exit codes."""

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import version

import tyro
from tyro.conf import FlagCreatePairsOff

from cnf.cli.ablate import Ablate
from cnf.cli.evaluate import Certify, Sample, Score
from cnf.cli.fit import Fit
from cnf.cli.options import Command
from cnf.cli.plot import Plot

_FAILED, _MISUSED, _INTERRUPTED = 1, 2, 130

_COMMANDS: dict[str, type[Command]] = {
    command.__name__.lower(): command for command in (Fit, Score, Sample, Certify, Plot, Ablate)
}

_OPTIONS = {
    "header=True": "--header",
    "header=False": "--no-header",
    "replace=True": "--force",
    " (transforms_for in Python, --support NAME=integer of the command cnf)": (
        " (--support NAME=integer)"
    ),
    " (In Python, read_table(path, array=NAME) reads it here.)": "",
}
"""Replacements in messages: wording for Python, and wording for the command line."""

_HELP = """\
usage: cnf COMMAND ...

Densities of tables, by continuous normalizing flows.

commands:
{commands}

`cnf COMMAND --help` explains one, `cnf --version` prints the version. For a start:

  cnf fit data.csv --out model
  cnf score model new.csv --out scores.csv
  cnf sample model -n 1000 --out samples.csv
  cnf plot model data.csv --out picture.png
  cnf ablate data.csv --out ablation"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Arguments after ``cnf``; None for the arguments of the process.

    Returns:
        The exit code: 0; 1 for an error in data or model, or a failed check of `certify`; 2 for
        wrong arguments; 130 if interrupted.

    Raises:
        SystemExit: With code 2 if an option is wrong, with 0 after ``--help``.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(version("cnf-flows"))
        return 0
    if name not in _COMMANDS:
        wrong = f"there is no command {name!r}" if name else "a command is missing"
        _say(f"error: {wrong}; the commands are {', '.join(_COMMANDS)}. See: cnf --help")
        return _MISUSED
    try:
        command = tyro.cli(
            _COMMANDS[name], prog=f"cnf {name}", args=rest, config=(FlagCreatePairsOff,)
        )
    except ValueError as error:
        _say(f"error: {error} See: cnf {name} --help")
        return _MISUSED
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
        return _run(command)


def _run(command: Command) -> int:
    try:
        code = command.run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        _say("interrupted")
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except Exception as error:
        if command.debug:
            traceback.print_exc()
        else:
            text = str(error) or type(error).__name__
            if not isinstance(error, ValueError | TypeError | OSError | RuntimeError):
                text = f"{type(error).__name__}: {text} (--debug shows where)"
            _say(f"error: {text}")
        return _FAILED
    return code


def _help() -> str:
    summaries = {
        name: (command.__doc__ or "").partition("\n")[0] for name, command in _COMMANDS.items()
    }
    return _HELP.format(
        commands="\n".join(f"  {name:<9}{summary}" for name, summary in summaries.items())
    )


def _say(text: str) -> None:
    for argument, option in _OPTIONS.items():
        text = text.replace(argument, option)
    print("cnf:", " ".join(text.split()), file=sys.stderr)
