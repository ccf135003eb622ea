"""Notebooks are thin and stored with their outputs; pytest runs them too, cell by cell: `notebooks/` is a test path."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from sparselab import widgets

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TEMPLATES = [path for path in NOTEBOOKS if path.stem.startswith("sweep_")]
GALLERY = [path for path in NOTEBOOKS if path not in TEMPLATES]
MARK = "# NBVAL_CHECK_OUTPUT"
MACHINE = re.compile(r"/(home|root|tmp|wor[k])/|(?<![\w.:/])/[\w-][\w./-]*\.(py|ipynb)\b")


def cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def name(path: Path) -> str:
    return path.stem


def test_there_are_both_kinds():
    assert [path.stem[:2] for path in GALLERY] == ["01", "02", "03", "04", "05", "06", "07", "08"]
    assert [path.stem for path in TEMPLATES] == ["sweep_report", "sweep_run"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_logic_lives_in_the_package(path):
    first, *rest = cells(path)
    assert first.metadata.tags == ["parameters"]
    assert all(line.count(" = ") == 1 for line in first.source.splitlines() if "=" in line), "a list, however long"
    for cell in rest:
        assert len(cell.source.splitlines()) <= 15, cell.source
    for cell in [first, *rest]:
        assert not any(line.startswith(("def ", "class ")) for line in cell.source.splitlines())


@pytest.mark.parametrize("path", GALLERY, ids=name)
def test_the_gallery_is_stored_as_executed(path):
    stored = cells(path)
    assert [cell.execution_count for cell in stored] == list(range(1, len(stored) + 1))
    outputs = [output for cell in stored for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    assert not [output for output in outputs if MACHINE.search(str(output))], "a path of somebody's machine"


def test_widgets_are_stored_with_their_picture():
    shown = set()
    for output in (output for path in GALLERY for cell in cells(path) for output in cell.outputs):
        kind = output.get("data", {}).get("text/plain", "").partition("(children=")[0]
        if hasattr(widgets, kind):
            assert "image/png" in output.data, "a page without a kernel would show nothing"
            shown.add(kind)
    assert shown == set(widgets.__all__) - {"Panel", "View"}


@pytest.mark.parametrize("path", TEMPLATES, ids=name)
def test_templates_are_stored_without_outputs(path):
    for cell in cells(path):
        assert cell.outputs == []
        assert cell.execution_count is None


@pytest.mark.parametrize("path", GALLERY, ids=name)
def test_checked_cells_have_something_to_check(path):
    checked = [cell for cell in cells(path) if MARK in cell.source]
    assert checked, "no cell's output is compared"
    for cell in checked:
        assert cell.source.startswith(MARK)
        assert any(output.output_type == "stream" and output.text.strip() for output in cell.outputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "stored", "passes"),
    [(f"{MARK}\nprint(1 + 1)", "2", True), (f"{MARK}\nprint(1 + 1)", "3", False), ("assert 1 + 1 == 3", None, False)],
)
def test_a_broken_notebook_fails(tmp_path, source, stored, passes):
    outputs = [] if stored is None else [new_output("stream", name="stdout", text=stored + "\n")]
    notebook = new_notebook(cells=[new_code_cell(source, outputs=outputs, execution_count=1)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "n.ipynb")
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), str(tmp_path / "n.ipynb"), "-q"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == (0 if passes else 1), done.stdout + done.stderr
    assert ("1 passed" if passes else "1 failed") in done.stdout


def test_the_readme_shows_the_recorded_run():
    table = (ROOT / "benchmarks" / "compare" / "runs.md").read_text(encoding="utf-8")
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")
