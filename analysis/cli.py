"""What the commands of this folder share: key=value arguments, flags, one-line errors."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from liquiddiff.config import BadInput, choose

if TYPE_CHECKING:
    from experiments.room import Experiment

ROOMS = Path(__file__).resolve().parents[1] / "experiments"


def rooms(name: str, root: Path = ROOMS) -> list["Experiment"]:
    """The experiment `name`, or every one for `all`. Imported late: the arrow is experiments -> analysis."""
    from experiments.room import select

    return select(name, root)


def arguments(
    argv: list[str], defaults: dict[str, str], flags: tuple[str, ...] = ()
) -> tuple[dict[str, str], set[str]]:
    """({key: value}, flags given). Raises BadInput for what is neither a known key=value nor a known flag."""
    values, given = dict(defaults), set()
    for argument in argv:
        key, equals, value = argument.partition("=")
        if equals:
            values[choose("key", key, defaults)] = value
        else:
            given.add(choose("argument", argument, [*flags, *(f"{key}=..." for key in defaults)]))
    return values, given


def runs_folder(given: str) -> Path:
    """The folder of runs that out= gives, or runs/. Raises BadInput where the one given is none."""
    if given and not Path(given).expanduser().is_dir():
        raise BadInput(f"out={given} is no folder")
    return Path(given or "runs").expanduser()


def near(name: str, out: Path) -> str:
    """What to say of a run that is not there: those in `out` that begin like it, or what to give."""
    begin = [path.parent.name for path in out.glob("*/run.yaml") if path.parent.name.startswith(Path(name).name)]
    return f": {', '.join(sorted(begin)[:3])} begin so" if begin else f"; give a folder, or the name of one in {out}/"


def run(command: Callable[[list[str]], int], help_text: str | None) -> int:
    """Exit status of `command` on the command line: 2 and one line for bad input."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((help_text or "").strip())
        return 0
    try:
        return command(sys.argv[1:])
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that cannot be written to
        print(f"error: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}", file=sys.stderr)
        return 2
