"""A table as Markdown and as LaTeX, and the places in files where it stands."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from analysis.stats import Difference
from liquiddiff.config import BadInput
from liquiddiff.record import write_atomic

MISSING, NOT_APPLICABLE = "X", "—"
LATEX = {
    "±": r"$\pm$",
    "—": "---",
    "†": r"$^\dagger$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "…": r"\dots{}",
    "|": r"\textbar{}",
}


@dataclass(frozen=True)
class Cell:
    """Text, bold or not."""

    text: str
    bold: bool = False


@dataclass
class Table:
    """What a table shows, before it is either language."""

    title: str
    header: list[str]
    rows: list[list[Cell]]
    note: str
    slug: str  # of its .tex file
    verdicts: list[str] = field(default_factory=list)


def decimals(spread: float | None, value: float) -> int:
    """Decimal places: two digits of the spread, or four of the value where there is no spread."""
    digits, scale = (2, spread) if spread else (4, abs(value))
    return min(6, max(0, digits - 1 - int(f"{scale:.0e}".split("e")[1]))) if scale else 1


def mean_se(mean: float, se: float | None, n: int) -> str:
    """`0.341 ± 0.012 (5)`; a dash for the error of one seed; X for no run."""
    if not n:
        return MISSING
    places = decimals(se, mean)
    return f"{mean:.{places}f} ± {NOT_APPLICABLE if se is None else f'{se:.{places}f}'} ({n})"


def difference(mean: float, low: float, high: float, n: int) -> str:
    """`+0.12 [+0.08, +0.16]`; no interval for one pair; X for none."""
    if not n:
        return MISSING
    if n == 1:
        return f"{mean:+.{decimals(None, mean)}f} [{NOT_APPLICABLE}]"
    places = decimals((high - low) / 2, mean)
    return f"{mean:+.{places}f} [{low:+.{places}f}, {high:+.{places}f}]"


def label(name: str, extractor: str) -> str:
    """`fid` and `kid` are only ever Inception's."""
    if name in ("fd", "kid") and extractor != "inception":
        return f"{name}_{extractor}"
    return "fid" if name == "fd" else name


def sentence(arm: str, d: Difference, metric: str) -> str:
    """A verdict in words."""
    if not d.n:
        return f"{arm}: {MISSING}, no seed in common with the first arm"
    if d.n == 1:
        return f"{arm}: undecided, one seed: {metric} {difference(d.mean, d.low, d.high, 1)}"
    return (
        f"{arm}: {d.verdict}; {metric} {difference(d.mean, d.low, d.high, d.n)} over {d.n} seeds, "
        f"p = {d.holm:.2g} after Holm, probability of improvement {d.improvement:.2f}"
    )


def quantity(value: float) -> str:
    """Three digits and K, M or G; a dash for what is not known."""
    if value != value:
        return NOT_APPLICABLE
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " K")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def markdown(table: Table) -> str:
    """A pipe table under its title, with the note below."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rows = [line([f"**{c.text}**" if c.bold else c.text for c in row]) for row in table.rows]
    rule = "|" + "|".join("---" if k < 2 else "--:" for k in range(len(table.header))) + "|"
    return "\n".join([f"**{table.title}**", "", line(table.header), rule, *rows, "", table.note])


def latex(table: Table) -> str:
    """A booktabs tabular, with the note as comments, to be input in a table environment."""

    def line(cells: list[str]) -> str:
        return " & ".join(cells) + r" \\"

    rows = [line([rf"\textbf{{{escape(c.text)}}}" if c.bold else escape(c.text) for c in row]) for row in table.rows]
    return "\n".join(
        [
            *(f"% {text}" for text in (table.title, table.note)),
            rf"\begin{{tabular}}{{ll{'r' * (len(table.header) - 2)}}}",
            r"\toprule",
            line([escape(text) for text in table.header]),
            r"\midrule",
            *rows[:-1],
            r"\midrule",  # the floor stands apart
            rows[-1],
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def escape(text: str) -> str:
    """Plain text for LaTeX."""
    text = text.replace("\\", r"\textbackslash ")
    text = re.sub(r"([&%$#_{}])", r"\\\1", text)
    text = re.sub(r"(?<![\w-])([+-])(?=\d)", r"$\1$", text.replace("~", r"\textasciitilde{}").replace("^", r"\^{}"))
    for plain, command in LATEX.items():
        text = text.replace(plain, command)
    return text


def place(text: str, body: str, where: str, name: str = "", kind: str = "table") -> str:
    """`text` with `body` between its markers. Raises BadInput where they are not there, once each and in order."""
    middle = f":{name}" if name else ""
    begin, end = (f"<!-- {kind}{middle}:{edge} -->" for edge in ("begin", "end"))
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise BadInput(f"{where} must have the lines {begin} and {end} once each, in their place")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{body}\n{end}{after}"


def update(page: Path, tables: Mapping[str, str], check: bool, again: str) -> int:
    """Write the tables into the page, each in its place; `check` writes nothing, and `again` is the command that would.

    Returns 1 where `check` finds others, else 0.
    """
    before = text = page.read_text()
    for name, body in tables.items():
        text = place(text, body, str(page), name)
    if check and text != before:
        print(f"not of today's results: {page}; {again}", file=sys.stderr)
        return 1
    if not check:
        write_atomic(page, text)
        print(f"wrote {page}")
    return 0
