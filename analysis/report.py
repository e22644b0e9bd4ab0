"""One page with every verdict, table, figure and claim: paper/report.html, for a phone, a screen or a printer.

    python -m analysis.report [--check]

Gathers what `analysis.tables`, `analysis.plots` and `analysis.claims` wrote (`make paper` runs them all). The file
needs no other: figures are inlined, there is no script and nothing is fetched. --check writes nothing and exits with 1
where the page is not today's.
"""

import re
import sys
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from analysis import cli, figures, render, stats, tables, views
from liquiddiff.config import BadInput
from liquiddiff.record import write_atomic

if TYPE_CHECKING:
    from experiments.room import Experiment

WORDS = ("better", "worse", "equivalent", "undecided")
STYLE = """
:root { color-scheme: light; --line: #d5d9de; --soft: #f4f6f8; --ink: #16191d; --dim: #555c66; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink); background: white;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 2.5rem 0 0.5rem; padding-top: 0.75rem;
  border-top: 2px solid var(--ink); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 0.3rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
nav a { display: inline-block; padding: 0.35rem 0.7rem 0.35rem 0; }
a { color: #0b5cad; }
code { font-size: 0.9em; background: var(--soft); padding: 0 0.2em; border-radius: 3px; }
pre { background: var(--soft); padding: 0.6rem; border-radius: 6px; overflow-x: auto; font-size: 0.85rem; }
.note { color: var(--dim); font-size: 0.85rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin: 0.75rem 0; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: 0.4rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  white-space: nowrap; }
th { background: var(--soft); }
tr:last-child td { border-bottom: 0; }
td.text { white-space: normal; min-width: 15rem; }
th:first-child, td:first-child { position: sticky; left: 0; background: white; border-right: 1px solid var(--line); }
th:first-child { background: var(--soft); }
.figures { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  align-items: start; margin: 1rem 0; }
figure { margin: 0; max-width: 34rem; }
figure img { width: 100%; height: auto; display: block; }
@media (min-width: 601px) { wbr { display: none; } }
@media (max-width: 600px) {
  td.text { min-width: 11rem; }
  th:first-child, td:first-child { white-space: normal; max-width: 8rem; }
}
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  h2 { break-before: page; border: 0; }
  h2:first-of-type { break-before: auto; }
  .claims { columns: 2; column-gap: 10mm; }
  .claims .scroll, .claims .figures { column-span: all; }
  h2, h3, th { break-after: avoid; }
  .scroll { overflow: visible; border: 0; }
  table { font-size: 6.4pt; width: 100%; }
  th, td { padding: 1.5pt 3pt; white-space: normal; position: static !important; }
  td.text { min-width: 0; }
  tr, figure { break-inside: avoid; }
  .figures { grid-template-columns: 1fr 1fr 1fr; }
  figure img { max-height: 165mm; object-fit: contain; object-position: left top; }
}
"""


def html_of(markdown: str, pictures: Path | None = None) -> str:
    """The Markdown that this project's pages use (headings, paragraphs, code, pipe tables, inline marks) as HTML.

    Pictures are read from `pictures` by their names.
    """
    parts = []
    markdown = re.sub(r"(!\[.*\]\(.*\))\n+(?=!\[)", r"\1\n", re.sub(r"<!--.*?-->", "", markdown).strip())
    for block in re.split(r"\n\s*\n", markdown):
        lines = block.splitlines()
        table = [line for line in lines if line.startswith("|")]
        text = " ".join(line for line in lines if not line.startswith("|"))
        if heading := re.match(r"(#+) (.*)", text):
            level = min(4, len(heading[1]) + 1)
            anchor = re.sub(r"[^\w\- ]", "", heading[2].lower()).replace(" ", "-")
            parts.append(f'<h{level} id="{anchor}">{inline(heading[2])}</h{level}>')
        elif text.startswith("```"):
            parts.append(f"<pre>{escape(chr(10).join(lines[1:-1]), quote=False)}</pre>")
        elif pictures and (found := re.findall(r"!\[(.*?)\]\((.*?)\)", text)):
            shown = "\n".join(image(pictures / Path(path).name, title) for title, path in found)
            parts.append(f'<div class="figures">{shown}</div>')
        elif text:
            parts.append(f"<p>{inline(text)}</p>")
        if table:
            parts.append(table_html(table))
    return "\n".join(parts)


def inline(text: str) -> str:
    """Inline marks; a link to another file of the repository keeps its text alone, because the page stands alone."""
    text = escape(text, quote=False).replace("&lt;br&gt;", "<br>")
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"(?<![\w*])\*(\w[^*]*)\*(?![\w*])", r"<em>\1</em>", text)
    text = re.sub(r"\[([^\]]+)\]\((https?://[^)]+)\)", r'<a href="\2">\1</a>', text)
    text = re.sub(r"\[([^\]]+)\]\((#[^)]+)\)", r'<a href="\2">\1</a>', text)
    return re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)


def table_html(lines: list[str]) -> str:
    """A pipe table in a box that scrolls by itself; the wide text columns may wrap."""
    rows = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    body = [row for row in rows[1:] if set("".join(row)) - set("-: ")]

    def cells(row: list[str], tag: str) -> str:
        wide = [' class="text"' if len(cell) > 28 and not re.search(r"\d \[", cell) else "" for cell in row]
        text = [inline(cell) for cell in row]
        text[0] = text[0].replace("_", "_<wbr>")  # an arm's name may break there on a phone
        return "".join(f"<{tag}{w}>{cell}</{tag}>" for cell, w in zip(text, wide, strict=True))

    head = f"<thead><tr>{cells(rows[0], 'th')}</tr></thead>"
    lines = [f"<tr>{cells(row, 'td')}</tr>" for row in body]
    return "\n".join(['<div class="scroll"><table>', head, "<tbody>", *lines, "</tbody></table></div>"])


def image(path: Path, title: str) -> str:
    """A figure with the SVG in it. Raises BadInput where it was not drawn."""
    if not path.exists():
        raise BadInput(f"{path} is not there: python -m analysis.plots")
    # Not base64, of which git and gzip make nothing.
    data = quote(path.read_text(), safe=" \n!$'()*+,-./:;<=>?@[]^_`{|}~")
    return f'<figure><img alt="{escape(title)}" src="data:image/svg+xml,{data}"></figure>'


def section(folder: Path, experiment: "Experiment", pictures: Path) -> tuple[str, list[str], set[Path]]:
    """(a room's HTML, its line of the summary, the figures used). Raises BadInput where it has no results."""
    used, parts = set(), []
    words: dict[str, list[str]] = {word: [] for word in (*WORDS, "not run")}
    for table, view in zip(tables.tables_of(folder, experiment), views.views_of(folder, experiment), strict=True):
        each = view.experiment
        found = stats.compare(view.values(), each.arms[0], each.margin, each.lower_is_better)
        place = "" if view.slug == experiment.name else f" ({view.title})"
        for arm, d in found.items():
            words[d.verdict if d.n else "not run"].append(arm + place)
        *head, note = render.markdown(table).split("\n\n")
        parts += [html_of("\n\n".join(head)), f'<p class="note">{inline(note)}</p>', '<div class="figures">']
        for kind in figures.drawable(view):
            path = pictures / f"{view.slug}-{kind}.svg"
            parts.append(image(path, f"{figures.FIGURES[kind][1]}: {experiment.name}, {view.title}"))
            used.add(path)
        parts.append("</div>")
    head = [
        f'<h2 id="{experiment.name}">{escape(experiment.name)}: {escape(experiment.question)}</h2>',
        f"<p><strong>Expected, before this room's first run.</strong> {escape(experiment.expectation)}</p>",
    ]
    row = [f"`{experiment.name}`", *(", ".join(words[word]) or "—" for word in words)]
    return "\n".join([*head, *parts]), row, used


def page(root: Path) -> str:
    """The whole page, from the rooms under `root` and paper/ beside it."""
    pictures, used, sections, waiting = root.parent / "paper/figures", set(), {}, []
    summary = [["room", *WORDS, "not run yet"]]
    for experiment in cli.rooms("all", root):
        try:
            tables.load(root / experiment.name)
        except BadInput:
            waiting.append(experiment.name)
            continue
        sections[experiment.name], row, mine = section(root / experiment.name, experiment, pictures)
        summary.append(row)
        used |= mine
    for name, title in (("cost", "The cost: speed and memory"), ("claims", "Claims of the text under test")):
        path = root / name / "README.md"
        if path.exists() and (name != "cost" or (root / "cost/results.csv").exists()):
            text = "\n".join(path.read_text().splitlines()[1:])
            used |= {pictures / Path(found).name for found in re.findall(r"!\[.*?\]\((.*?)\)", text)}
            body = f'<div class="{name}">\n{html_of(text, pictures)}\n</div>'
            sections[name] = f'<h2 id="{name}">{title}</h2>\n{body}'
    others = sorted(path for path in pictures.glob("*.svg") if path not in used)
    if others:
        shown = "\n".join(image(path, path.stem.replace("_", " ").replace("-", " ")) for path in others)
        sections["other-figures"] = f'<h2 id="other-figures">Other figures</h2>\n<div class="figures">{shown}</div>'
    links = " ".join(f'<a href="#{name}">{name.replace("-", " ")}</a>' for name in sections)
    glance = table_html([f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in summary])
    rest = f"<p>No results yet: {', '.join(waiting)}.</p>" if waiting else ""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>liquiddiff: report</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            "<h1>liquiddiff: is an attention-free, liquid image generator better, compared with what?</h1>",
            "<p>Every number on this page is computed from committed results by <code>make paper</code>. How to read a "
            "verdict: <code>docs/reading.md</code>.</p>",
            f"<nav>{links}</nav>",
            "<h2>Verdicts at a glance</h2>",
            "<p>Each arm against the first of its room, by the rule of <code>analysis/stats.py</code> and the margin "
            "that was written down before these runs (docs/reading.md: what was fixed, and when).</p>",
            glance + rest,
            *sections.values(),
            "</body>\n</html>\n",
        ]
    )


def main(argv: list[str], root: Path = cli.ROOMS) -> int:
    """Entry point; returns the exit status."""
    _, flags = cli.arguments(argv, {}, ("--check",))
    path, text = root.parent / "paper/report.html", page(root)
    fresh = path.exists() and path.read_text() == text
    if flags:
        if not fresh:
            print(f"not of today's results: {path}; make paper", file=sys.stderr)
        return 0 if fresh else 1
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, text)
    print(f"{path}, {len(text.encode()) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__))
