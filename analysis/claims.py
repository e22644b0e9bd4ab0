"""Every claim of the seed's text with its test and its verdict, computed from what is committed.

    python -m analysis.claims            print the page; write experiments/claims/README.md, and its short form into the
                                         main README.md between <!-- claims:begin --> and <!-- claims:end -->
    python -m analysis.claims --check    write nothing; exit with 1 where a page is not what the data say

The claims: experiments/claims/claims.yaml. The rules: analysis/claim_rules.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from analysis import cli
from liquiddiff.config import BadInput, choose
from liquiddiff.record import write_atomic

BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"
HEAD = """# Claims

What the seed's text claims, each as a statement that data can refute, with its test, its verdict and the numbers behind
it. Written by `python -m analysis.claims`, which computes every verdict from committed data: the rooms' `results.csv`
by the rules of `analysis/stats.py`, `dynamics.csv` beside this page, `experiments/cost/`, and exact counts on networks
that are built without memory. Nothing here is typed by hand, and `--check` runs in the tests.

A verdict is **holds**, **does not hold**, **undecided** (the data leave both open) or **not tested here**, with what it
needs. It speaks of the tier and the data set that its numbers name, and of no other. A part *earns its place* where
taking it out is worse by a room's own verdict; it does not where the interval shows that taking it out costs less than
the margin, which an arm may show that the room calls undecided (docs/reading.md tells when this rule was changed).
"""


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict."""

    id: str
    claim: str
    test: str
    command: str
    word: str
    numbers: str


def judge(root: Path) -> list[Judged]:
    """Every claim, in the order of claims.yaml. Raises BadInput where that file and the rules disagree."""
    from analysis.claim_rules import RULES
    from analysis.evidence import UNTESTED, Evidence, Missing

    path = root / "claims" / "claims.yaml"
    try:
        claims = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise BadInput(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    for name in claims:
        choose(f"claim in {path}", name, RULES)
    if lacking := sorted(set(RULES) - set(claims)):
        raise BadInput(f"{path} lacks the claims {', '.join(lacking)}")
    evidence, judged = Evidence(root), []
    for name, claim in claims.items():
        try:
            verdict = RULES[name](evidence)
            word, numbers = verdict.word, verdict.numbers
        except Missing as needed:
            word, numbers = UNTESTED, f"needs {needed}"
        judged.append(Judged(name, claim["claim"], claim["test"], claim["command"], word, numbers))
    return judged


def page(judged: list[Judged]) -> str:
    """The page as Markdown: a list by verdict, then each claim."""
    parts = [HEAD, short(judged, "")]
    for each in judged:
        parts.append(f"## {each.id}: {each.word}\n")
        parts.append(f"**Claim.** {each.claim}\n\n**Test.** {each.test}\n\n**Numbers.** {each.numbers}.\n")
        if each.command != "none":
            parts.append(f"`{each.command}`\n")
    return "\n".join(parts)


PARTS = """## dynamics: what the liquid parts do

`python -m analysis.dynamics` makes these figures and tables from `dynamics.csv`.

"""


def parts_of(root: Path) -> str:
    """The page's end: figures and tables of gate, alpha, gradient and straightness; "" where nothing was measured."""
    path = root / "claims" / "dynamics.csv"
    if not path.exists():
        return ""
    from analysis import dynamics_plots

    figures = root.parent / "paper/figures"
    shown = [svg.name for svg in dynamics_plots.drawable(path, figures, "claims")]
    pictures = [f"![{Path(name).stem.split('-', 1)[1]}](../../paper/figures/{name})" for name in shown]
    return "\n" + PARTS + "\n\n".join([*pictures, dynamics_plots.markdown(pd.read_csv(path))]) + "\n"


def short(judged: list[Judged], base: str) -> str:
    """One line a verdict, with links to the claims of the page at `base`."""
    from analysis.evidence import WORDS

    lines = ["| verdict | | claims |", "|---|--:|---|"]
    for word in WORDS:
        mine = [each for each in judged if each.word == word]
        anchor = word.replace(" ", "-")
        links = [f"[{each.claim.rstrip('.')}]({base}#{each.id}-{anchor})" for each in mine]
        lines.append(f"| **{word}** | {len(mine)} | {'<br>'.join(links) or '—'} |")
    return "\n".join(lines) + "\n"


def files_of(root: Path, judged: list[Judged]) -> dict[Path, str]:
    """{path: its text with these verdicts}. The main README takes part where it has the markers."""
    files = {root / "claims" / "README.md": page(judged) + parts_of(root)}
    readme = root.parent / "README.md"
    text = readme.read_text() if readme.exists() else ""
    if BEGIN in text or END in text:
        if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
            raise BadInput(f"{readme} must have the lines {BEGIN} and {END} once each, in this order")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        files[readme] = f"{before}{BEGIN}\n{short(judged, 'experiments/claims/README.md')}{END}{after}"
    return files


def main(argv: list[str], root: Path = cli.ROOMS) -> int:
    """Entry point; returns the exit status."""
    _, flags = cli.arguments(argv, {}, ("--check",))
    judged = judge(root)
    files = files_of(root, judged)
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    if flags and stale:
        print(f"not what the data say: {', '.join(map(str, stale))}; python -m analysis.claims", file=sys.stderr)
        return 1
    if not flags:
        for path in stale:
            write_atomic(path, files[path])
        for each in judged:
            print(f"{each.word.upper():>16}  {each.claim}\n{'':>16}  {each.numbers}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__))
