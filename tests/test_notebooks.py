"""Notebooks are thin, stored with their outputs, and run; the README's numbers are those of the recorded run."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {
    "01_compare": 'model, sparsities = "tiny", ["60%", "70%"]\nnsamples, eval_nsamples, seqlen, seed = 32, 100, 128, 0'
}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param.stem, nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_logic_lives_in_the_package(notebook):
    first, *rest = code_cells(notebook[1])
    assert first.metadata.tags == ["parameters"]
    for cell in [first, *rest]:
        assert len(cell.source.splitlines()) <= 15
        assert not any(line.startswith(("def ", "class ")) for line in cell.source.splitlines())


def test_stored_as_executed_without_errors(notebook):
    cells = code_cells(notebook[1])
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the notebook machinery; the package's own run inside the kernel
def test_runs(notebook):
    name, cells = notebook
    code_cells(cells)[0].source = SMALL[name]
    NotebookClient(cells, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()


def test_the_readme_shows_the_recorded_run():
    assert (ROOT / "benchmarks" / "compare" / "runs.md").read_text(encoding="utf-8") in (ROOT / "README.md").read_text(
        encoding="utf-8"
    )
