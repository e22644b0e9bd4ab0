"""Figures from committed data: what they show, that they never change by themselves, and how the data get there."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_collect import ROOM, make, today
from test_tables import fill, make_room, results

from analysis import cli, collect, curves, figures, plots, runs, style, views
from experiments.room import load_experiment
from liquiddiff.config import BadInput, Run


def picture(arm: int, n: int = 64, side: int = 8, channels: int = 1) -> np.ndarray:
    return np.random.RandomState(arm).randint(0, 256, (n, channels, side, side)).astype(np.uint8)


@pytest.fixture
def root(tmp_path):
    """A room whose results, curves and strips are those of tests/test_tables.py: bad is bad, absent did not run."""
    root = make_room(tmp_path / "experiments")
    rows = [
        row | {"nfe": nfe} for row in results() for nfe in ([row["nfe"], "8"] if row["nfe"] == "1" else [row["nfe"]])
    ]
    rows = [row | ({"images_per_second": "350"} if row["arm"] == "bad" else {}) for row in rows]
    folder = fill(root, rows)
    readme = folder / "README.md"
    readme.write_text(readme.read_text() + "\n<!-- figures:begin -->\n<!-- figures:end -->\nThe end.\n")
    points = []
    for k, arm in enumerate(("baseline", "good", "bad", "alike")):
        same = {"arm": arm, "tier": "laptop", "data": "digits", "signature": "12345678"}
        for seed in range(3):
            for i in range(1, 9):
                losses = {"loss": f"{1 / i + 0.4:.5g}", "val_loss": f"{0.5 + k / i:.5g}"}
                points.append(same | {"seed": str(seed), "images": str(i)} | losses)
        strip = Image.fromarray(picture(k, 16)[:, 0].transpose(1, 0, 2).reshape(8, -1))
        facts = {"seed": 0, "nfe": 32, "solver": "euler", "signature": "12345678"}
        curves._save(strip, facts, folder / "samples" / f"laptop-digits-{arm}.png")
    collect.write(folder / "curves.csv", points, curves.COLUMNS)
    return root


def uncut(path: Path) -> bool:
    """Whether a white frame of two pixels or more is left around a figure."""
    ink = np.asarray(Image.open(path).convert("L")) < 250
    return not (ink[:2].any() or ink[-2:].any() or ink[:, :2].any() or ink[:, -2:].any())


def view_of(root: Path) -> views.View:
    (view,) = views.views_of(root / "room", load_experiment(root / "room"))
    return view


def texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


# --- the figures ------------------------------------------------------------------------------------------------------


def test_every_figure_is_written_shown_and_the_same_bytes_again(root, capsys):
    out, readme = root.parent / "paper/figures", root / "room/README.md"
    assert plots.main(["--check"], root) == 1
    assert "room-forest.svg" in capsys.readouterr().err
    assert plots.main(["experiment=room"], root) == 0
    names = {f"room-{kind}{suffix}" for kind in figures.FIGURES for suffix in (".svg", ".png")}
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(first) == names
    text = readme.read_text()
    assert "(../../paper/figures/room-forest.svg)" in text and "room-nfe.svg" in text and text.endswith("The end.\n")
    for path in out.iterdir():
        path.unlink()
    assert plots.main(["experiment=all"], root) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert plots.main(["--check"], root) == 0
    assert not any(word in first["room-nfe.svg"] for word in (b"dc:date", b"Matplotlib v"))
    assert max(map(len, first.values())) < 200_000
    assert all(uncut(path) for path in out.glob("*.png"))

    table = root / "room/results.csv"  # other results: every figure is out of date
    table.write_text(table.read_text().replace(",0.7,", ",0.71,"))
    capsys.readouterr()
    assert plots.main(["--check"], root) == 1
    assert capsys.readouterr().err.count(".svg") == len(figures.FIGURES)


def test_a_first_arm_without_a_value_at_the_rooms_nfe_costs_one_figure(root):
    assert "cost" in figures.drawable(view_of(root))
    rows = [row for row in collect.read(root / "room/results.csv") if (row["arm"], row["nfe"]) != ("baseline", "32")]
    collect.write(root / "room/results.csv", rows)
    assert "cost" not in figures.drawable(view_of(root)) and figures.costs(view_of(root))


def test_the_forest_shows_each_difference_with_its_verdict(root):
    figure = figures.forest(view_of(root))
    shown, (axes,) = texts(figure), figure.axes
    arms, says = shown[::2], shown[1::2]
    assert arms == ["good", "bad", "alike"]
    assert [text.split()[0] for text in says] == ["better", "worse", "equivalent"]
    assert "no run yet: absent" in axes.get_xlabel() and "±0.03" in axes.get_xlabel()
    dots = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert [round(float(line.get_xdata()[0]), 1) for line in dots] == [-0.1, 0.2, 0.0]
    assert dots[0].get_marker() != dots[1].get_marker()  # not by colour alone


def test_curves_are_named_where_they_end_and_paired_by_seed(root):
    figure = figures.nfe(view_of(root))
    above, below = figure.axes
    assert set(texts(figure)) - {"baseline", "good", "bad", "alike"} == {"real against real (n=898): 0.28"}
    of = views.series(view_of(root).rows, "nfe", "fd_pixel")
    relative = views.against(of, "baseline", True)
    assert relative["baseline"][0] == {1.0: 1.0, 8.0: 1.0, 32.0: 1.0}
    assert relative["good"][2][32.0] == pytest.approx(of["good"][2][32.0] / of["baseline"][2][32.0])
    line = next(line for line in below.lines if line.get_color() == style.looks(view_of(root).arms)["good"]["color"])
    assert line.get_ydata()[-1] == pytest.approx(np.mean([relative["good"][seed][32.0] for seed in range(5)]))
    assert above.get_yscale() == "log"


def test_a_cost_that_is_matched_is_no_axis(root):
    assert [name.split(" (")[0] for name in views.costs(view_of(root))] == ["training ms an image"]
    ((axes,),) = [figures.cost(view_of(root)).axes]
    assert axes.get_xlabel().split("\n")[0].endswith("(a CPU, 2 threads)")


def test_no_two_arms_look_alike_where_no_line_is_drawn():
    looks = style.looks([f"arm{k}" for k in range(22)])
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == len(looks)


def test_the_front_holds_whatever_nothing_beats():
    points = {"cheap": (1.0, 5.0), "good": (3.0, 1.0), "beaten": (2.0, 6.0), "middle": (2.0, 3.0), "dear": (9.0, 1.0)}
    assert views.pareto(points) == [(1.0, 5.0), (2.0, 3.0), (3.0, 1.0)]
    assert views.pareto(points, lower_is_better=False) == [(1.0, 5.0), (2.0, 6.0)]


def test_runs_of_another_configuration_lend_no_curve_and_no_sample(root):
    path = root / "room/results.csv"
    rows = [row | {"signature": "87654321"} if row["arm"] == "good" else row for row in collect.read(path)]
    collect.write(path, rows)
    view = view_of(root)
    assert "good" in view.arms and "good" not in view.strips and "good" not in set(view.curves["arm"])


@pytest.mark.parametrize("wanted", [[0.1, 0.1, 0.12, 0.5, 0.9, 1.0], [1.0] * 6, [0.0] * 6, [0.5], []])
def test_names_stand_apart_in_order_and_inside(wanted):
    places = style.spread(wanted, 0.1)
    assert len(places) == len(wanted) and all(b - a > 0.0999 for a, b in zip(places, places[1:], strict=False))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    if wanted[4:] == [0.9, 1.0]:
        assert places[3:] == pytest.approx([0.5, 0.9, 1.0])


def test_a_few_far_values_do_not_set_the_axis():
    low, high = style.focus([1.0, 1.1, 0.9, 1.05, 0.95, 50.0], 1.0)
    assert 0.8 < low < 0.9 and 1.1 < high < 1.2
    assert style.focus([1.0, 1.0], 1.0)[0] < 1.0 < style.focus([1.0, 1.0], 1.0)[1]


# --- how the data get there -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "side", "channels"), [(64, 8, 1), (1, 8, 1), (20, 32, 3), (64, 64, 3)])
def test_a_sheet_gives_its_pixels_back(tmp_path, n, side, channels):
    images = picture(0, n, side, channels)
    plots.sample_sheet(torch.from_numpy(images), tmp_path / "sheet.png")
    back, kept = plots.samples_of(tmp_path / "sheet.png", side), int(n**0.5) ** 2
    assert np.array_equal(back, np.broadcast_to(images[:kept].transpose(0, 2, 3, 1), (kept, side, side, 3)))


def test_another_picture_is_no_sheet(tmp_path):
    Image.new("RGB", (300, 200)).save(tmp_path / "sheet.png")
    with pytest.raises(BadInput, match="no sheet of samples of 8 pixels"):
        plots.samples_of(tmp_path / "sheet.png", 8)


def collect_room(out: Path, folder: Path) -> tuple[list[dict[str, str]], dict[str, bytes]]:
    folder.mkdir(exist_ok=True)
    collect.collect(runs.from_folders(out), ROOM, folder, today)
    strips = {path.name: path.read_bytes() for path in (folder / "samples").glob("*")}
    return collect.read(folder / "curves.csv", curves.COLUMNS), strips


def test_curves_and_strips_are_collected_once_and_kept(tmp_path):
    out, room = tmp_path / "runs", tmp_path / "room"
    out.mkdir()
    for k, (arm, seed) in enumerate((("baseline", 1), ("baseline", 0), ("conv", 0))):
        record = make(out, arm, seed)
        plots.sample_sheet(picture(k), record.folder / "samples.png")
        stretch = record.run.optim.images // curves.POINTS
        lines = [{"images": stretch // 2, "loss": 1.0}, {"images": stretch, "loss": 0.5, "val_loss": 0.5}]
        text = (record.folder / "metrics.jsonl").read_text().splitlines()[4:]  # evaluations
        (record.folder / "metrics.jsonl").write_text("\n".join([*map(json.dumps, lines), *text]) + "\n")
    rows, strips = collect_room(out, room)
    assert [(row["arm"], row["seed"], row["val_loss"]) for row in rows if row["val_loss"]] == [
        ("baseline", "0", "0.5"), ("baseline", "1", "0.5"), ("conv", "0", "0.5"),
    ]  # fmt: skip
    mine = [row for row in rows if row["arm"] == "baseline" and row["seed"] == "0"]
    assert mine[0]["loss"] == "0.75"  # the mean of both lines of the first stretch
    assert set(strips) == {"laptop-digits-baseline.png", "laptop-digits-conv.png"}
    strip = room / "samples/laptop-digits-baseline.png"
    assert curves.facts_of(strip)["seed"] == 0 and curves.facts_of(strip)["signature"] == Run().signature()
    expected = picture(1)[:16, 0].transpose(1, 0, 2).reshape(8, 128)
    assert np.array_equal(np.asarray(Image.open(strip)), expected)

    assert collect_room(out, room) == (rows, strips)
    elsewhere = tmp_path / "elsewhere"  # another machine, with one more seed: what is there stays
    elsewhere.mkdir()
    record = make(elsewhere, "conv", 1)
    plots.sample_sheet(picture(9), record.folder / "samples.png")
    more, same = collect_room(elsewhere, room)
    assert same == strips and [row for row in more if (row["arm"], row["seed"]) != ("conv", "1")] == rows
    assert len(more) > len(rows)


def test_a_curve_is_thinned_and_keeps_its_last_held_out_loss(tmp_path):
    record = make(tmp_path, done=False)
    text = [{"images": record.run.optim.images // 200 * k, "loss": 1.0, "val_loss": 1 / k} for k in range(1, 201)]
    (record.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    record.finish(seconds=1.0, peak_mib=1.0)
    (found,) = runs.from_folders(tmp_path)
    rows = curves.curve_of(found)
    assert len(rows) <= 100 and sum(bool(row["loss"]) for row in rows) == curves.POINTS
    assert {row["loss"] for row in rows} <= {"1", ""} and rows[-1]["val_loss"] == "0.005"


def test_the_committed_figures_are_of_the_committed_results():
    assert plots.main(["experiment=all", "--check"]) == 0


def test_no_committed_figure_is_cut():
    assert all(uncut(path) for path in (cli.ROOMS.parent / "paper/figures").glob("*.png"))
