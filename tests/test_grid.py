from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselab.experiment import RunConfig, TextConfig
from sparselab.grid import as_values, as_yaml, read_grid, read_values
from sparselab.parameters import ParameterError, SweepRun


def written(folder, text):
    path = folder / "grid.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_all_values_with_all_in_the_order_they_are_written(tmp_path):
    grid = read_grid(written(tmp_path, "method: [wanda, sparsegpt]\nsparsity: [0.5, 2:4]\nnsamples: 8\n"), "there")
    assert [(each.run.method, each.run.sparsity) for each in grid.runs] == [
        ("wanda", "50%"), ("wanda", "2:4"), ("sparsegpt", "50%"), ("sparsegpt", "2:4"),
    ]  # fmt: skip
    assert grid.runs[0] == SweepRun(RunConfig("wanda", "50%", nsamples=8), TextConfig(), out=Path("there"))
    assert str(grid) == "4 runs (2 × method, 2 × sparsity)"


def test_numbers_are_read_as_everybody_writes_them(tmp_path):
    """YAML 1.1 takes 2:4 for 124 and 1e-4 for a text."""
    grid = read_grid(written(tmp_path, "percdamp: [1e-4, .1, 1]\nsparsity: [2:4, 50%, '0=dense,*=70%']\nwbits: null\n"))
    assert [run.run.percdamp for run in grid.runs[::3]] == [1e-4, 0.1, 1.0]
    assert [run.run.sparsity for run in grid.runs[:3]] == ["2:4", "50%", "0=dense,*=70%"]


def test_one_run_stands_for_what_comes_out_the_same(tmp_path):
    grid = read_grid({"method": ["magnitude", "wanda"], "sparsity": [0.5, "50%"], "seed": [3, 1, 2]})
    assert [(each.run.method, each.run.seed) for each in grid.runs] == [
        ("magnitude", 3), ("wanda", 3), ("wanda", 1), ("wanda", 2),
    ]  # fmt: skip
    assert (grid.excluded, grid.same) == (0, 8)
    assert str(grid) == "4 runs (2 × method, 2 × sparsity, 3 × seed; 8 the same as others)"


def test_the_first_seed_that_is_not_left_out_stands_for_the_others():
    grid = read_grid({"method": "magnitude", "seed": [0, 1, 2], "exclude": {"seed": 0}})
    assert [each.run.seed for each in grid.runs] == [1]
    assert (grid.excluded, grid.same) == (1, 1)


def test_exclusions_leave_out_what_fits_all_they_say():
    values = {"method": ["wanda", "sparsegpt"], "sparsity": [0.5, 0.6], "percdamp": [0.01, 1], "seqlen": [64, 128]}
    rules = [{"method": "wanda", "percdamp": 1}, {"sparsity": "60%", "seqlen": [64, 7]}]
    grid = read_grid(values | {"exclude": rules})
    left = {(run.run.method, run.run.sparsity, run.run.percdamp, run.text.seqlen) for run in grid.runs}
    every = {(m, s, p, n) for m in values["method"] for s in ("50%", "60%") for p in (0.01, 1.0) for n in (64, 128)}
    assert left == {
        (m, s, p, n) for m, s, p, n in every if not (m == "wanda" and p == 1) and not (s == "60%" and n == 64)
    }
    assert grid.excluded == 16 - len(left) == 7
    assert read_grid(values | {"exclude": rules[0]}).excluded == 4, "one rule needs no list"


@given(st.sets(st.integers(0, 5), min_size=1), st.sets(st.sampled_from([0.1, 0.5, 0.9]), min_size=1), st.data())
def test_runs_and_exclusions_are_all_there_is(seeds, sparsities, data):
    seeds, out = list(seeds), data.draw(st.sets(st.sampled_from(sorted(seeds)), max_size=len(seeds) - 1))
    rules = {"exclude": {"seed": sorted(out)}} if out else {}
    grid = read_grid({"seed": seeds, "sparsity": list(sparsities)} | rules)
    assert len(grid.runs) + grid.excluded == len(seeds) * len(sparsities)
    assert {run.run.seed for run in grid.runs} == set(seeds) - out


BAD = {
    "a misspelt name": ("sparsty: [0.5]", "sparsty: expected the name of a parameter.*; did you mean sparsity\\?$"),
    "where results go": ("out: there", "out: expected the name of a parameter"),
    "a value that cannot work": ("percdamp: [0.01, -1]", "percdamp: expected a finite number ≥ 0, received -1.0$"),
    "a combination that cannot": ("method: [sparsegpt, wanda]\nwbits: [4]", "wbits: expected sparsegpt or .* 'wanda'$"),
    "a type": ("nsamples: [8.5]", "nsamples: expected a whole number, received 8.5$"),
    "no values": ("method: []", "method: expected at least one value, received none$"),
    "lists in lists": ("seed: [[0, 1]]", "seed: expected values in one list, received \\[0, 1\\] in it$"),
    "the same name twice": ("seed: 1\nseed: 2", 'line 2: found duplicate key "seed"'),
    "half a list": ("seed: [1", "line 1: expected ',' or ']'"),
    "no mapping": ("- seed", "expected parameters and their values, as in .*, received list$"),
    "nothing": ("", "expected parameters and their values, as in .*, received nothing$"),
    "code": ("seed: !!python/object/apply:os.getpid []", "line 1: could not determine a constructor"),
    "an exclusion of a misspelt name": (
        "seed: [0, 1]\nexclude: [{sed: 1}]",
        "sed: expected the name .*; did you mean seed",
    ),
    "an exclusion of nothing": ("seed: [0, 1]\nexclude: [{seed: 2}]", "exclude: .* \\{'seed': 2\\} fits none$"),
    "an exclusion of all": ("seed: [0, 1]\nexclude: [{seed: [0, 1]}]", "exclude: expected to leave some runs"),
    "no exclusion": ("seed: [0, 1]\nexclude: 3", "exclude: expected a list of parameters and values, .*, received 3$"),
    "a name that is a number": ("5: [1]", "5: expected the name of a parameter, received another"),
    "a model of no kind": ("model: 3", "model: expected text, received 3$"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
@pytest.mark.usefixtures("untyped")
def test_what_is_wrong_is_named_in_one_line(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(ParameterError, match=message) as caught:
        read_grid(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1


VALUES = {
    "0.5, 60%, 2:4": [0.5, "60%", "2:4"], "1e-4": [0.0001], "null, 4": [None, 4], "'0=dense,*=60%'": ["0=dense,*=60%"],
    "true": [True], "": [], "{method: wanda, seed: [0, 1]}": [{"method": "wanda", "seed": [0, 1]}],
}  # fmt: skip


@pytest.mark.parametrize(("text", "values"), VALUES.items())
def test_values_are_read_from_a_line_and_written_as_one(text, values):
    assert read_values("name", text) == values
    assert read_values("name", as_values(values)) == values
    assert not as_values(values).startswith("[")


def test_values_that_cannot_be_read_are_named():
    with pytest.raises(ParameterError, match=r"^sparsity: expected values with commas .*, received '\*=6, \]' \("):
        read_values("sparsity", "*=6, ]")


def test_a_grid_is_written_as_it_is_read(tmp_path):
    described = {
        "method": ["wanda", "sparsegpt"],
        "sparsity": [0.5, "2:4"],
        "seed": 1,
        "exclude": [{"method": "wanda"}],
    }
    assert as_yaml({"seed": range(3), "sparsity": ("50%",)}) == "seed: [0, 1, 2]\nsparsity: [50%]\n"
    assert as_values(range(3)) == "0, 1, 2"
    text = as_yaml(described)
    assert text.splitlines()[0] == "method: [wanda, sparsegpt]"
    path = written(tmp_path, text)
    assert read_grid(path).given == described


def test_files_that_are_none(tmp_path):
    with pytest.raises(ParameterError, match=r"none.yaml: expected a grid in YAML, cannot read it \(No such file"):
        read_grid(tmp_path / "none.yaml")
    (tmp_path / "grid.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ParameterError, match="found a file that is no text"):
        read_grid(tmp_path / "grid.yaml")
