"""Whatever students hand in is found, and put into the notebook that was handed out."""

import json

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from sparselab.course.grader.submission import assembled, find_submissions


def cell(name, source, **nbgrader):
    made = new_code_cell(source, id=name)
    if nbgrader:
        made.metadata.nbgrader = {"grade_id": name, "schema_version": 3} | nbgrader
    return made


HANDED_OUT = new_notebook(
    cells=[
        new_markdown_cell("# Title", id="title"),
        cell("imports", "import torch"),
        cell("mask-answer", "raise NotImplementedError()", solution=True, grade=False, locked=False),
        cell("mask-visible", "check.mask(mask)", solution=False, grade=True, locked=True, points=1),
        cell("mask-hidden", "# More checks", solution=False, grade=True, locked=True, points=2),
    ]
)


def write(folder, cells, name="n.ipynb"):
    path = folder / name
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def given_back(cells):
    return [dict(each) for each in nbformat.from_dict({"cells": cells})["cells"]]


def sources(notebook):
    return [each.source for each in notebook.cells]


def test_what_was_handed_out_comes_back_as_it_is(tmp_path):
    notebook, remarks = assembled(HANDED_OUT, write(tmp_path, HANDED_OUT.cells))
    assert (notebook.cells, remarks) == (HANDED_OUT.cells, [])


def test_answers_and_cells_of_ones_own_stay_where_they_are(tmp_path):
    cells = given_back(HANDED_OUT.cells)
    cells[1]["source"] = ["import torch\n", "import math"]
    cells[2]["source"] = "def mask(): ..."
    own = [{"cell_type": "code", "source": "helper = 1"}, {"cell_type": "markdown", "source": "Why?"}]
    notebook, remarks = assembled(HANDED_OUT, write(tmp_path, [own[0], *cells[:2], own[1], *cells[2:], own[0]]))
    assert sources(notebook) == [
        "helper = 1", "# Title", "import torch\nimport math", "Why?", "def mask(): ...", "check.mask(mask)",
        "# More checks", "helper = 1",
    ]  # fmt: skip
    assert remarks == []
    assert [each.cell_type for each in notebook.cells][:4] == ["code", "markdown", "code", "markdown"]


def test_checks_are_as_they_were_handed_out(tmp_path):
    cells = given_back(HANDED_OUT.cells)
    cells[3]["source"] = "print('passed')"
    cells[3]["metadata"]["nbgrader"] |= {"points": 100, "locked": False, "solution": True}
    del cells[4]
    notebook, remarks = assembled(HANDED_OUT, write(tmp_path, cells))
    assert notebook.cells == HANDED_OUT.cells
    assert remarks == [
        "cells deleted, and put back: mask-hidden",
        "cells changed, and run as they were handed out: mask-visible",
    ]


def test_a_copy_of_a_cell_is_a_cell_of_ones_own(tmp_path):
    cells = given_back(HANDED_OUT.cells)
    again = cells[2] | {"source": "second try"}
    notebook, _ = assembled(HANDED_OUT, write(tmp_path, [*cells, again]))
    assert sources(notebook)[2] == "raise NotImplementedError()"
    assert (sources(notebook)[-1], dict(notebook.cells[-1].metadata)) == ("second try", {})


def test_cells_that_are_not_graded_are_run_if_answers_may_need_them(tmp_path):
    out = nbformat.from_dict(HANDED_OUT)
    out.cells[1].metadata.tags = ["not-graded"]

    def tags(cells):
        return assembled(out, write(tmp_path, cells))[0].cells[1].metadata.get("tags")

    assert tags(out.cells) == ["not-graded"]
    assert tags([*out.cells, {"cell_type": "markdown", "source": "Why?"}]) == ["not-graded"]
    cells = given_back(out.cells)
    assert tags([*cells, {"cell_type": "code", "source": "plot()"}]) is None
    cells[1]["source"] = "def helper(): ..."
    assert tags(cells) is None


def test_pictures_in_texts_stay(tmp_path):
    cells = given_back(HANDED_OUT.cells)
    cells[0]["attachments"] = {"plot.png": {"image/png": "AAAA"}, "odd": 3}
    notebook, _ = assembled(HANDED_OUT, write(tmp_path, cells))
    assert notebook.cells[0].attachments == {"plot.png": {"image/png": "AAAA"}}


@pytest.mark.parametrize("text", ["", "{", "[]", '"cells"', '{"cells": 1}', '{"cells": {}}', "[" * 10_000, "\0\1"])
def test_what_is_no_notebook_counts_as_no_answers(tmp_path, text):
    (tmp_path / "n.ipynb").write_text(text)
    notebook, remarks = assembled(HANDED_OUT, tmp_path / "n.ipynb")
    assert (notebook.cells, remarks) == (HANDED_OUT.cells, ["n.ipynb cannot be read as a notebook"])
    assert assembled(HANDED_OUT, None)[1] == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["mask-answer", "mask-visible"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "nbgrader", "x"]), inner),
    max_leaves=6,
)
NAMES = ["id", "cell_type", "source", "metadata", "outputs", "attachments"]
ANY_CELL = st.dictionaries(st.sampled_from(NAMES), JSON) | JSON


@given(st.lists(ANY_CELL, max_size=6))
def test_any_cells_give_a_valid_notebook_with_all_checks(tmp_path_factory, cells):
    notebook, _ = assembled(HANDED_OUT, write(tmp_path_factory.mktemp("any"), cells))
    nbformat.validate(notebook)
    held = {each.id: each for each in notebook.cells}
    assert [held["mask-visible"], held["mask-hidden"]] == HANDED_OUT.cells[3:]


def test_submissions_are_found_in_all_the_ways_they_come(tmp_path):
    files = ("Ann/ps1.ipynb", "Ben/ps1/ps1.ipynb", "Carl/mine.ipynb", "Dan.ipynb", "Eve/a.ipynb", "Eve/b.ipynb")
    for name in (*files, "Carl/sweep_run.ipynb", "Ann/ps1/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "Ben" / "ps1" / "results.csv").write_text("1")
    (tmp_path / "Ben" / "ps1" / "torch.py").write_text("1")
    (tmp_path / "readme.txt").write_text("not a submission")
    (tmp_path / ".hidden").mkdir()
    found = {each.student: each for each in find_submissions(tmp_path, "ps1", ["results.csv"], ["sweep_run.ipynb"])}
    assert list(found) == ["Ann", "Ben", "Carl", "Dan", "Eve"]
    assert found["Ann"].notebook == tmp_path / "Ann" / "ps1.ipynb"
    assert found["Ben"].others == {"results.csv": tmp_path / "Ben" / "ps1" / "results.csv"}
    assert found["Carl"].remarks == ("mine.ipynb was taken for ps1.ipynb",)
    assert found["Dan"].notebook == tmp_path / "Dan.ipynb"
    assert (found["Eve"].notebook, found["Eve"].remarks) == (None, ("expected ps1.ipynb, found 2 other notebooks",))


def test_folders_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one folder or notebook for each student, found none"):
        find_submissions(tmp_path / "absent", "ps1", [])
    with pytest.raises(ValueError, match="found nothing of the kind"):
        find_submissions(tmp_path, "ps1", [])
    (tmp_path / "A b").mkdir()
    (tmp_path / "A b.ipynb").write_text("{}")
    with pytest.raises(ValueError, match="'A b' and 'A b' cannot be told apart"):
        find_submissions(tmp_path, "ps1", [])
    (tmp_path / "A b.ipynb").rename(tmp_path / "a_B.ipynb")
    with pytest.raises(ValueError, match="'A b' and 'a_B' cannot be told apart"):
        find_submissions(tmp_path, "ps1", [])
