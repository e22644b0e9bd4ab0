"""Two runs side by side: every difference is shown, and none that the protocols do not allow."""

import json

import numpy as np
import pytest
from test_collect import make

from analysis import compare, plots
from liquiddiff.config import BadInput


@pytest.fixture
def pair(tmp_path):
    """The baseline, and the convolution at half its distance."""
    records = [make(tmp_path, "baseline", fd=0.3), make(tmp_path, "conv", fd=0.1)]
    for k, record in enumerate(records):
        images = np.full((64, 1, 8, 8), 40 + 100 * k, np.uint8)
        plots.sample_sheet(images, record.folder / "samples.png")
    return records


def test_configuration_metrics_and_samples_are_set_side_by_side(pair, tmp_path, capsys):
    assert compare.main([str(pair[0].folder), pair[1].folder.name], tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["configuration", pair[0].folder.name, pair[1].folder.name]
    assert [line.split() for line in lines[1:3]] == [
        ["arm", "baseline", "conv"],
        ["model.relaxation", "liquid", "none"],
    ]
    assert lines[3].endswith("other keys agree")
    (row,) = [line.split() for line in lines if line.startswith("fd_digits at 32 NFE")]
    assert row[4:] == ["0.33125", "0.13125", "-0.2"]
    assert any(line.split() == ["val_loss", "0.123457", "0.123457", "+0"] for line in lines)
    assert "a column is one noise" in lines[-1]
    path = tmp_path / f"compare-{pair[0].folder.name}-{pair[1].folder.name}.png"
    from PIL import Image

    colors = Image.open(path).convert("L").histogram()  # the very pixels
    assert colors[40] > 1000 and colors[140] > 1000


def test_scores_of_another_protocol_get_no_difference(pair, tmp_path, capsys):
    path = pair[1].folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"n": 1797', '"n": 500'))
    assert compare.main([str(record.folder) for record in pair], tmp_path) == 0
    text = capsys.readouterr().out
    assert "scores are not comparable: n 1797 against 500" in text
    assert next(line for line in text.splitlines() if line.startswith("fd at 32")).split()[-1] == "—"


def test_losses_of_other_images_get_no_difference(pair, tmp_path, capsys):
    path = pair[1].folder / "env.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"data_fingerprint": "0000"}))
    assert compare.main([str(record.folder) for record in pair], tmp_path) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert next(line for line in lines if line[:1] == ["val_loss"])[-1] == "—"


def test_an_older_run_tells_less_and_other_losses_get_no_difference(pair, tmp_path, capsys):
    path = pair[0].folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"weights": "cd", ', ""))  # as rows were once
    other = pair[1].folder / "run.yaml"
    other.write_text(other.read_text().replace("loss: mse", "loss: pseudo_huber"))
    assert compare.main([str(record.folder) for record in pair], tmp_path) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert next(line for line in lines if line[:1] == ["loss"])[-1] == "—"
    assert next(line for line in lines if line[:4] == ["fd_digits", "at", "32", "NFE"])[-1] == "-0.2"


def test_other_seeds_and_unfinished_runs_are_named(pair, tmp_path, capsys):
    other = make(tmp_path, "conv", 1, done=False)
    assert compare.main([str(pair[0].folder), str(other.folder)], tmp_path) == 0
    text = capsys.readouterr().out
    assert "not paired" in text and f"no samples yet of {other.folder.name}" in text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "give two runs"),
        (["conv", "nothing"], "conv-.* begin so"),
        (["x", "y"], "x is not a run folder; give a"),
        (["/nowhere/[x]", "y"], r"/nowhere/\[x\] is not a run folder; give a"),
        (["x", "y", "out=z.txt"], "must end in .png"),
    ],
)
def test_bad_input_is_one_line(pair, tmp_path, names, message):
    with pytest.raises(BadInput, match=message) as error:
        compare.main(names, tmp_path)
    assert "\n" not in str(error.value)
