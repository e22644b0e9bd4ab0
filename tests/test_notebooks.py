"""The notebooks run as committed, on the laptop tier with a tiny budget, and are committed with clean outputs."""

import json
import re

import nbformat
import pytest
from nbclient import NotebookClient

from analysis import cli

FOLDER = cli.ROOMS.parent / "analysis" / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def test_there_are_three():
    assert NOTEBOOKS == ["ablation_report.ipynb", "sampling_steps.ipynb", "train_on_t4.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_with_outputs_that_any_reader_can_use(name):
    path = FOLDER / name
    assert path.stat().st_size < 2_000_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = json.dumps([cell.outputs for cell in code])
    assert "image/png" in outputs
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert not re.search(r"Traceback|Warning|/(home|root|work|tmp|Users)/", outputs)
    assert "output_type" in json.dumps(code[-1].outputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's own packages
def test_they_run(tmp_path, monkeypatch):
    """All in one kernel, whose names are cleared between them: importing torch three times would take longer."""
    monkeypatch.setenv("LIQUIDDIFF_IMAGES", "256")
    monkeypatch.setenv("LIQUIDDIFF_OUT", str(tmp_path / "runs"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    together = nbformat.v4.new_notebook()
    for name in NOTEBOOKS:
        together.cells += nbformat.read(FOLDER / name, as_version=4).cells
        together.cells.append(nbformat.v4.new_code_cell("%reset -f"))
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(together, timeout=300, kernel_name="python3", resources=resources).execute()
    text = json.dumps([cell.get("outputs") for cell in together.cells])
    assert "gone after 128 images" in text
    assert "trained 256 images" in text
