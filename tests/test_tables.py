"""Tables: from a synthetic results.csv to Markdown, LaTeX and verdicts, and back by --check."""

import errno
from pathlib import Path

import numpy as np
import pytest

from analysis import cli, collect, render, tables
from analysis.render import Cell
from experiments.room import Experiment, load_experiment, select
from liquiddiff.config import BadInput

YAML = """
question: Is a plain convolution as good?
expectation: It is, within the margin.
arms: [baseline, good, bad, alike, absent]
seeds: [0, 1, 2, 3, 4]
metric: fd_pixel
nfe: 32
margin: 0.03
"""
SHIFT = {"baseline": 0.0, "good": -0.1, "bad": 0.2, "alike": 0.001}


@pytest.fixture
def root(tmp_path):
    return make_room(tmp_path / "experiments")


def make_room(root: Path, yaml: str = YAML, name: str = "room") -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(yaml)
    for arm in ("good", "bad", "alike", "absent"):
        (folder / f"{arm}.yaml").write_text(f"# A reason for {arm} | with a bar?\nmodel: {{relaxation: none}}\n")
    (folder / "README.md").write_text("# Room\n\n<!-- table:begin -->\n<!-- table:end -->\n\nAfter.\n")
    return root


def row(**values) -> dict[str, str]:
    same = {
        "tier": "laptop", "data": "digits", "data_fingerprint": "0071", "signature": "12345678", "commit": "1e10",
        "device": "a CPU, 2 threads", "images": 150000, "batch": 128, "n": 1797, "reference": "0071/1797",
        "extractor": "digits", "solver": "euler", "ema": 10000, "params": 601234, "macs": 9.1e6,
        "images_per_second": 700.5, "seconds": 240,
    }  # fmt: skip
    return {column: collect.text(column, (same | values).get(column)) for column in collect.COLUMNS}


def results(shift=SHIFT, seeds=5, **values) -> list[dict[str, str]]:
    rng = np.random.RandomState(0)
    shared = rng.normal(0, 0.05, seeds)
    rows = []
    for arm, by in shift.items():
        for seed in range(seeds):
            score = 1 + by + shared[seed] + rng.normal(0, 0.004)
            scores = {"fd": score, "fd_pixel": score, "kid": score / 100, "precision": 0.7, "val_loss": score / 4}
            rows += [row(**{"arm": arm, "seed": seed, "nfe": nfe, **scores, **values}) for nfe in (1, 32)]
    floor = {"arm": "real", "n": 898, "reference": "0071/898", "solver": None, "images": None, "batch": None}
    rows.append(row(**(values | floor), fd=0.2, fd_pixel=0.28, kid=1e-5, precision=0.95))
    return rows


def fill(root: Path, rows: list[dict[str, str]], name: str = "room") -> Path:
    collect.write(root / name / "results.csv", rows)
    return root / name


def one(root: Path) -> render.Table:
    (table,) = tables.tables_of(root / "room", load_experiment(root / "room"))
    return table


def cells(table: render.Table, arm: str) -> dict[str, Cell]:
    (found,) = [line for line in table.rows if line[0].text.removesuffix(" †") == arm]
    return dict(zip(table.header[:6], found[:6], strict=True)) | {"all": found}


def test_verdicts_are_what_was_built_in(root):
    fill(root, results())
    table = one(root)
    verdicts = {line[0].text.removesuffix(" †"): line[5].text for line in table.rows}
    assert verdicts == {
        "baseline": "—", "good": "better", "bad": "worse", "alike": "equivalent", "absent": "X", "real": "",
    }  # fmt: skip
    assert cells(table, "good")["fd_pixel ↓"].bold and not cells(table, "baseline")["fd_pixel ↓"].bold
    assert any(text.startswith("good: better; fd_pixel -0.") and "over 5 seeds" in text for text in table.verdicts)


def test_a_line_shows_what_the_arm_is_and_costs(root):
    fill(root, results())
    line = cells(one(root), "alike")
    assert line["what it changes"].text == "A reason for alike | with a bar?"
    assert line["seeds"].text == "5/5"
    assert [cell.text for cell in line["all"]][-3:] == ["601 K", "9.1 M", "700"]
    mean = np.mean([float(r["fd_pixel"]) for r in results() if r["arm"] == "alike" and r["nfe"] == "32"])
    assert float(line["fd_pixel ↓"].text.split(" ± ")[0]) == pytest.approx(mean, abs=0.001)
    assert line["fd_pixel ↓"].text.endswith("(5)")


def test_missing_runs_and_single_seeds_are_named_not_hidden(root):
    fill(root, results(seeds=1))
    table = one(root)
    assert cells(table, "baseline")["fd_pixel ↓"].text == "1.090 ± — (1)"
    assert cells(table, "good")["verdict"].text == "undecided (1 of 5 seeds)"
    assert cells(table, "absent")["fd_pixel ↓"].text == "X"
    assert not any(cell.bold for line in table.rows for cell in line)
    assert "unknown, with fewer than two seeds" in table.note


def test_a_verdict_of_the_seeds_that_are_left_says_so(root):
    rows = results()
    lost = [r for r in rows if (r["arm"], r["seed"]) != ("good", "4")]
    fill(root, lost)
    assert cells(one(root), "good")["verdict"].text == "better (4 of 5 seeds)"
    assert cells(one(root), "bad")["verdict"].text == "worse"
    fill(root, [r for r in rows if (r["arm"], r["seed"]) != ("baseline", "4")])  # then every difference has four
    assert cells(one(root), "bad")["verdict"].text == "worse (4 of 5 seeds)"


def test_a_speed_is_shown_where_the_seeds_of_an_arm_agree_on_it(root):
    rows = results()
    assert one(Path(fill(root, rows)).parent).header[-1] == "images/s"
    busy = [r | ({"images_per_second": "300"} if (r["arm"], r["seed"]) == ("bad", "2") else {}) for r in rows]
    fill(root, busy)
    table = one(root)
    assert table.header[-2:] == ["params", "MACs"] and "images/s" not in table.note
    assert len(cells(table, "alike")["all"]) == len(table.header)
    fill(root, [r | ({"device": "another"} if r["images_per_second"] == "300" else {}) for r in busy])
    assert one(root).header[-1] == "images/s"  # of the device that ran the most


def test_the_floor_has_its_own_n(root):
    fill(root, results())
    line = cells(one(root), "real")
    assert line["what it changes"].text == "one random half of the real images against the other, n=898"
    assert line["fd_pixel ↓"].text == "0.2800"


def test_the_floor_is_that_of_the_images_and_the_extractor_of_the_runs(root):
    rows = results()
    others = [rows[-1] | {"data_fingerprint": "0000", "fd_pixel": "99"}, rows[-1] | {"extractor": "inception"}]
    fill(root, [*others, *rows])  # the images changed, or another extractor was tried: their floors stay in the file
    assert cells(one(root), "real")["fd_pixel ↓"].text == "0.2800"
    of_fewer = {"n": "500", "reference": "0071/500", "fd_pixel": "99"}  # of an evaluation of fewer images, at first
    fill(root, [rows[-1] | of_fewer, *rows])
    assert cells(one(root), "real")["fd_pixel ↓"].text == "0.2800"
    fill(root, [*others, *rows[:-1]])
    line = cells(one(root), "real")
    assert line["fd_pixel ↓"].text == "" and line["seeds"].text == render.MISSING


def test_the_note_holds_protocol_command_and_power(root):
    fill(root, results())
    note = one(root).note
    for text in (
        "n=1797,", "32 NFE", "solver euler", "extractor digits", "0071/1797", "a CPU, 2 threads", "150000 images",
        "experiment=room", "margin: 0.03", "5 seeds show", "over 3 arms", "untuned",
    ):  # fmt: skip
        assert text in note


def test_tuned_arms_have_the_first_one_s_grid_and_the_rate_that_it_chose(root):
    rates = {"baseline": "0.002", "good": "0.002", "bad": "0.002", "alike": "0.001"}
    fill(root, [row | {"lr": rates.get(row["arm"], "")} for row in results()])
    grid = {"baseline": (0.001, 0.002), "good": (0.002, 0.001), "bad": (0.002,), "alike": (0.001, 0.002)}
    trials = [(tier, arm, lr) for tier in ("laptop", "hour") for arm, rates in grid.items() for lr in rates]
    # Of one rate alone `learning_rates.choose` chooses none.
    lines = [f"{tier},digits,{arm},{lr},{lr == 0.002 and arm != 'bad'}" for tier, arm, lr in trials]
    (root / "room/learning_rates.csv").write_text("\n".join(["tier,data,arm,lr,chosen", *lines]))
    names = [line[0].text for line in one(root).rows]
    assert names == ["baseline", "good", "bad †", "alike †", "absent †", "real"]


def test_rows_of_another_protocol_are_refused(root):
    rows = results()
    fill(root, [r | {"n": "500"} if r["arm"] == "bad" and r["seed"] == "2" else r for r in rows])
    with pytest.raises(BadInput, match=r"their n differs: 1797 in baseline \(seed 0\), 500 in bad \(seed 2\)"):
        one(root)


def test_each_tier_has_its_table_and_may_have_its_metric(root):
    yaml = YAML + "tiers: {hour: {metric: fd, nfe: 1, margin: 2, seeds: [0, 1]}}\n"
    (root / "room/experiment.yaml").write_text(yaml)
    fill(root, results(tier="hour", data="flowers", extractor="inception") + results())
    laptop, hour = tables.tables_of(root / "room", load_experiment(root / "room"))
    assert (laptop.slug, hour.slug) == ("room", "room-hour-flowers")
    assert hour.title == "hour tier, flowers, fid at 1 NFE" and hour.header[3] == "fid ↓" and "kid ↓" in hour.header
    assert laptop.header[3] == "fd_pixel ↓" and "kid_digits ↓" in laptop.header
    assert hour.rows[0][2].text == "2/2"


def test_files_are_written_once_and_checked(root, capsys):
    folder = fill(root, results())
    main_readme = root.parent / "README.md"
    main_readme.write_text("<!-- table:room:begin -->\nstale text\n<!-- table:room:end -->\n")
    assert tables.main(["experiment=room", "--check"], root) == 1
    error = capsys.readouterr().err
    assert "room/README.md" in error and "paper/tables/room.tex" in error and error.count("\n") == 1
    assert tables.main(["experiment=room"], root) == 0
    assert "good: better" in capsys.readouterr().out
    tex = root.parent / "paper/tables/room.tex"
    before = [path.read_bytes() for path in (folder / "README.md", main_readme, tex)]
    assert (
        b"| good" in before[0]
        and b"\nAfter.\n" in before[0]
        and b"| good" in before[1]
        and b"stale text" not in before[1]
    )
    assert tables.main(["experiment=all"], root) == 0
    assert before == [path.read_bytes() for path in (folder / "README.md", main_readme, tex)]
    assert tables.main(["--check"], root) == 0
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("better", "worse"))
    assert tables.main(["--check"], root) == 1


def test_another_question_of_the_same_rows_is_printed_and_written_nowhere(root, capsys):
    fill(root, [row | {"fd": str(2 - float(row["fd"]))} for row in results()])  # the other way round than fd_pixel
    assert tables.main(["experiment=room"], root) == 0
    before = {path: path.read_bytes() for path in root.parent.rglob("*") if path.is_file()}
    capsys.readouterr()

    def verdicts(*asked):
        assert tables.main(["experiment=room", *asked], root) == 0
        said = [line.split(";")[0].split(": ") for line in capsys.readouterr().out.splitlines() if " Holm" in line]
        return dict(said)

    assert verdicts() == {"good": "better", "bad": "worse", "alike": "equivalent"}
    assert verdicts("metric=fd", "nfe=1", "margin=0.03") == {"good": "worse", "bad": "better", "alike": "equivalent"}
    assert verdicts("margin=0.15") == {"good": "equivalent", "bad": "worse", "alike": "equivalent"}
    assert verdicts("arms=bad,baseline,good") == {"baseline": "better", "good": "better"}
    assert before == {path: path.read_bytes() for path in root.parent.rglob("*") if path.is_file()}
    room = Experiment("room", "?", "?", ["a", "b"], [0], "fd", 16, 0.1, tiers={"hour": {"margin": 0.5, "nfe": 32}})
    asked = tables.aside(room, {"arms": "a,b", "nfe": "8"})  # what is not asked stays, in every tier
    assert (asked.at("hour").margin, asked.at("hour").nfe, asked.nfe) == (0.5, 8, 8)
    wrongs = {"metric=kid": "give metric= with a margin=", "nfe=3": "nfe=1, 32", "arms=none": "unknown arm"}
    wrongs |= {"margin=wide": "numbers"}
    for wrong, reason in wrongs.items():
        with pytest.raises(BadInput, match=reason):
            tables.main(["experiment=room", wrong], root)
    with pytest.raises(BadInput, match="leave out margin="):
        tables.main(["--check", "margin=1"], root)


def test_markdown_and_latex_are_well_formed(root):
    fill(root, results())
    table = one(root)
    lines = [line for line in render.markdown(table).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(table.rows)
    assert {line.replace("\\|", "").count("|") for line in lines} == {len(table.header) + 1}
    tex = render.latex(table)
    body = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert {line.replace(r"\&", "").count("&") for line in body} == {len(table.header) - 1}
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\textbf{", r"fd\_pixel $\downarrow$", r"95 \% CI"):
        assert rule in tex
    assert tex.replace("% ", "").isascii() or "−" not in tex
    assert all(character.isascii() for line in body for character in line)
    assert render.escape("-0.1 [+2, conv-3]") == "$-$0.1 [$+$2, conv-3]"


@pytest.mark.parametrize("content", [None, "", ",".join(collect.COLUMNS) + "\n"])
def test_no_results_is_one_clear_line(root, capsys, content):
    if content is not None:
        (root / "room/results.csv").write_text(content)
    with pytest.raises(BadInput, match=r"no rows yet: python experiments/run.py experiment=room"):
        tables.main(["experiment=room"], root)
    assert tables.main(["experiment=all"], root) == 0
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"arm,seed\nbaseline,0\n", "rows without tier, data, nfe, n: mend it"),
        (b"arm,tier,data,seed,nfe,n\n<<<<<<< HEAD\nconv,laptop,digits,0,1,4\n", "rows without tier, data: mend it"),
        (b"arm,tier\n\xff\xfe,1\n", "cannot be read .*: mend it"),
    ],
)
def test_a_damaged_file_of_results_is_one_line(root, content, said):
    (root / "room/results.csv").write_bytes(content)
    with pytest.raises(BadInput, match=said) as error:
        tables.main(["experiment=room"], root)
    assert "\n" not in str(error.value)


def test_rows_of_an_arm_that_has_another_name_now_make_no_table(root):
    fill(root, [*results(), row(arm="renamed", seed=0, nfe=32, tier="hour", data="flowers", fd_pixel=1.0)])
    assert one(root).title == "laptop tier, digits, fd_pixel at 32 NFE"


def test_a_full_disk_costs_no_page(root, monkeypatch):
    fill(root, results())
    page = root / "room/README.md"
    before = page.read_text()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        tables.main(["experiment=room"], root)
    assert page.read_text() == before and sorted(page.parent.glob(".README*")) == []


def test_a_readme_without_markers_is_refused(root):
    fill(root, results())
    (root / "room/README.md").write_text("no place\n")
    with pytest.raises(BadInput, match="must have the lines <!-- table:begin -->"):
        tables.main(["experiment=room"], root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("nfe:", "nef:"), "Did you mean nfe"),
        (("metric: fd_pixel", "metric: fd_pixle"), "Did you mean fd_pixel"),
        (("good, bad", "goood, bad"), "Did you mean good"),
        (("nfe: 32", ""), "lacks nfe"),
        (("seeds: [0, 1", "seeds: [0, 0"), "must not repeat"),
        (("seeds: [0, 1, 2, 3, 4]", "seeds: [true]"), "whole numbers"),
        (("margin: 0.03", "margin: 3e-2"), "must be a number"),
        (("margin: 0.03", "tiers: {hour: {metrics: fd}}\nmargin: 0"), "Did you mean metric"),
        (("question:", "question: ["), "not valid YAML"),
    ],
)
def test_a_bad_experiment_is_refused_in_one_line(root, change, message):
    (root / "room/experiment.yaml").write_text(YAML.replace(*change))
    with pytest.raises(BadInput, match=message) as error:
        load_experiment(root / "room")
    assert "\n" not in str(error.value)


def test_a_room_is_read_and_chosen(root):
    experiment = load_experiment(root / "room")
    assert isinstance(experiment, Experiment) and experiment.name == "room" and experiment.arms[0] == "baseline"
    assert experiment.lower_is_better and experiment.overrides == [] and experiment.at("hour") == experiment
    assert [each.name for each in select("all", root)] == ["room"]
    with pytest.raises(BadInput, match="Did you mean room"):
        select("rom", root)


def test_arguments_are_checked():
    assert cli.arguments(["experiment=x", "--check"], {"experiment": "all"}, ("--check",)) == (
        {"experiment": "x"},
        {"--check"},
    )
    for wrong in ("experimnt=x", "--chek"):
        with pytest.raises(BadInput, match="Did you mean"):
            cli.arguments([wrong], {"experiment": "all"}, ("--check",))


def test_the_committed_tables_show_the_committed_results():
    assert tables.main(["experiment=all", "--check"]) == 0
