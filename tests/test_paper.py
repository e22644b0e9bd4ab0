"""paper/report.html: it holds what the results say, stands alone, and is the same bytes again."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest
from test_tables import fill, make_room, results

from analysis import claims, cli, paper, report
from analysis.dynamics import COLUMNS
from liquiddiff.config import BadInput

PICTURE = '<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"></svg>'
VOID = {"meta", "img", "br", "wbr"}


class Page(HTMLParser):
    """Text by tag, all attributes, and whether every tag is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


@pytest.fixture
def root(tmp_path):
    root = make_room(tmp_path / "experiments")
    fill(root, results())
    pictures = root.parent / "paper/figures"
    pictures.mkdir(parents=True)
    for kind in ("forest", "nfe"):
        (pictures / f"room-{kind}.svg").write_text(PICTURE)
    (pictures / "gate_statistics.svg").write_text(PICTURE)
    (root / "claims").mkdir()
    (root / "claims/README.md").write_text(
        "# Claims\n\n## fast: holds\n\n**Claim.** It is <fast>, see [x](../y.md).\n\n"
        "[fast](#fast-holds)\n\n![gate statistics](../../paper/figures/gate_statistics.svg)\n"
    )
    return root


def test_the_page_holds_verdicts_tables_figures_and_claims(root):
    page = Page(text := report.page(root))
    assert page.open == []
    glance = page.cells[6:12]
    assert glance == ["room", "good", "bad", "alike", "—", "absent"]
    assert "A reason for good | with a bar?" in page.cells and any("better" == cell for cell in page.cells)
    pictures = [value for tag, key, value in page.attributes if (tag, key) == ("img", "src")]
    assert len(pictures) == 3 and {unquote(value) for value in pictures} == {f"data:image/svg+xml,{PICTURE}"}
    titles = [value for tag, key, value in page.attributes if (tag, key) == ("img", "alt")]
    assert titles[0] == "Paired differences: room, laptop tier, digits" and titles[-1] == "gate statistics"
    assert "<strong>Claim.</strong> It is &lt;fast&gt;, see x." in text
    assert 'id="fast-holds">fast: holds</h3>' in text and '<a href="#fast-holds">fast</a>' in text


def test_the_page_stands_alone(root):
    text = report.page(root)
    assert "<script" not in text and "@import" not in text and "url(" not in text and "<link" not in text
    for _, key, value in Page(text).attributes:
        assert key not in ("src", "srcset") or value.startswith("data:")
        assert key != "href" or value.startswith("#") and f'id="{value[1:]}"' in text
    assert 'name="viewport"' in text and "overflow-x: auto" in text and "@media print" in text
    assert text.count('<div class="scroll"><table>') == text.count("<table>") > 1


def test_it_is_written_once_and_checked(root, capsys):
    path = root.parent / "paper/report.html"
    assert report.main(["--check"], root) == 1
    assert report.main([], root) == 0
    before = path.read_bytes()
    assert report.main([], root) == 0 and path.read_bytes() == before
    assert report.main(["--check"], root) == 0
    path.write_bytes(before.replace(b"better", b"worse"))
    capsys.readouterr()
    assert report.main(["--check"], root) == 1
    assert re.fullmatch(r"not of today's results: \S+report.html; make paper\n", capsys.readouterr().err)


def test_a_missing_figure_is_one_clear_line(root):
    (root.parent / "paper/figures/room-nfe.svg").unlink()
    with pytest.raises(BadInput, match=r"room-nfe.svg is not there: python -m analysis.plots"):
        report.page(root)


def test_make_paper_makes_everything_and_the_second_time_the_same(root, capsys, monkeypatch):
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert "-m analysis.paper" in makefile.split("\npaper:")[1].split("\n\n")[0]
    monkeypatch.setattr(claims, "judge", lambda root: [])  # tests/test_claims.py
    readme = root / "room/README.md"
    readme.write_text(readme.read_text() + "<!-- figures:begin -->\n<!-- figures:end -->\n")
    pictures = root.parent / "paper/figures"
    for picture in pictures.glob("*.svg"):
        picture.unlink()
    frame = pd.DataFrame([dict.fromkeys(COLUMNS)] * 3)
    frame = frame.assign(tier="laptop", data="digits", arm="baseline", seed=0, layer="middle.0", t=[0.0, 0.05, 1.0])
    frame.assign(alpha_mean=0.5, alpha_min=0.4, alpha_max=0.6).to_csv(root / "claims/dynamics.csv", index=False)
    assert paper.main(["--check"], root) == 1
    assert not list(pictures.iterdir())
    assert paper.main([], root) == 0
    made = {path: path.read_bytes() for path in root.parent.rglob("*") if path.is_file()}
    names = {path.name for path in made}
    assert {"room.tex", "room-forest.png", "room-nfe.svg", "claims-alpha.svg", "report.html"} <= names
    assert b"claims-alpha.svg" in made[root / "claims/README.md"]
    assert paper.main([], root) == 0
    assert {path: path.read_bytes() for path in root.parent.rglob("*") if path.is_file()} == made
    assert paper.main(["--check"], root) == 0
    (root / "cost").mkdir()
    for name in ("README.md", "results.csv", "memory.csv"):
        shutil.copy(cli.ROOMS / "cost" / name, root / "cost")
    page = root / "cost/README.md"
    page.write_text(old := page.read_text().replace("| tiny 64x64 | fp32 |", "| tiny 64x64 | fp33 |"))
    capsys.readouterr()
    assert paper.main(["--check"], root) == 1 and page.read_text() == old
    assert f"not of today's results: {page}" in capsys.readouterr().err
    assert paper.main([], root) == 0 and "fp33" not in page.read_text()


def test_the_committed_page_is_of_the_committed_results():
    assert paper.main(["--check"]) == 0
