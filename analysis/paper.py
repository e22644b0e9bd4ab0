"""Every table, figure and page from committed results alone, in one process: `make paper`.

    python -m analysis.paper [--check]

Runs analysis.tables, plots, dynamics, cost table, claims and report, in this order; nothing is trained or measured, and
a second run changes no byte. --check writes nothing and exits with 1 where a file is not what the results say.
"""

import contextlib
import io
import sys
from pathlib import Path

from analysis import cli


def main(argv: list[str], root: Path = cli.ROOMS) -> int:
    """Entry point; returns the exit status."""
    _, flags = cli.arguments(argv, {}, ("--check",))
    from analysis import claims, dynamics, plots, report, tables

    check = sorted(flags)
    failed = tables.main(check, root) + plots.main(check, root)
    for path in sorted(root.glob("*/dynamics.csv")):
        with contextlib.redirect_stdout(io.StringIO()):  # its tables stand in the claims page
            failed += dynamics.main([f"experiment={path.parent.name}", *check], root)
    if (root / "cost/results.csv").exists():
        from analysis import cost_room

        failed += cost_room.write_tables(root / "cost", bool(flags))
    failed += claims.main(check, root)
    return 1 if failed else report.main(check, root)


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__))
