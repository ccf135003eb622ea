import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from sparselab.experiment import RESULT, RunConfig, TextConfig
from sparselab.parameters import (
    REPORT_PARAMETERS,
    RUN_PARAMETERS,
    ParameterError,
    SweepRun,
    checked_run,
    checked_values,
)
from sparselab.results import read_sweep

ROOT = Path(__file__).parents[1]
RUN, REPORT = (ROOT / "notebooks" / f"{name}.ipynb" for name in ("sweep_run", "sweep_report"))


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def defaults(path):
    namespace = {}
    exec(code_cells(path)[0].source, namespace)
    del namespace["__builtins__"], namespace["__annotations__"]
    return namespace


# --- parameters


def test_the_template_names_every_parameter_with_the_defaults_of_the_package():
    assert set(defaults(RUN)) == set(RUN_PARAMETERS)
    assert checked_run(defaults(RUN)) == SweepRun(RunConfig(), TextConfig())
    assert set(defaults(REPORT)) == set(REPORT_PARAMETERS)


def test_parameters_become_settings(tmp_path):
    given = {
        "model": "m", "dataset": "stdlib", "method": "wanda", "sparsity": "2:4", "percdamp": 0.1, "nsamples": 3,
        "seqlen": 32, "seed": 5, "blocksize": 16, "propagate": "dense", "wbits": None, "true_sequential": False,
        "bos": "window", "eval_dataset": str(tmp_path), "eval_nsamples": 7, "measure": "errors+perplexity",
        "out": "x",
    }  # fmt: skip
    assert set(given) == set(RUN_PARAMETERS)
    run = RunConfig("wanda", "2:4", 0.1, 16, 3, 5, "dense")
    text = TextConfig("stdlib", str(tmp_path), 32, 7, "window")
    assert checked_run(given) == SweepRun(run, text, "m", "perplexity+errors", Path("x"))


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.6, "60%"), ("60%", "60%"), (1, "100%"), ("1:4", "1:4")])
def test_sparsity_may_be_a_number_or_text(sparsity, pattern):
    assert checked_run({"sparsity": sparsity}).run.sparsity == pattern


def test_a_whole_number_passes_for_a_number():
    percdamp = checked_run({"percdamp": 1}).run.percdamp
    assert (percdamp, type(percdamp)) == (1.0, float)


BAD = {
    "misspelt": ({"sparsty": 0.6}, "sparsty: expected the name .*; did you mean sparsity\\?$"),
    "unlike any": ({"zzz": 0.6}, "zzz: expected the name .*; there are model, dataset, .*, out$"),
    "text for a count": ({"nsamples": "many"}, "^nsamples: expected a whole number, received 'many'$"),
    "fraction for a count": ({"nsamples": 8.0}, "^nsamples: expected a whole number, received 8.0$"),
    "bool for a count": ({"seed": True}, "^seed: expected a whole number, received True$"),
    "bool for a number": ({"percdamp": True}, "^percdamp: expected a number, received True$"),
    "text for a number": ({"percdamp": "0.1"}, "^percdamp: expected a number, received '0.1'$"),
    "list for sparsity": ({"sparsity": [0.5]}, "^sparsity: expected a number or text, received \\[0.5\\]$"),
    "nothing for text": ({"model": None}, "^model: expected text, received None$"),
    "text for bits": ({"wbits": "4"}, "^wbits: expected a whole number or None, received '4'$"),
    "bits that no sweep rounds to": ({"wbits": 4, "method": "wanda"}, "^wbits: expected sparsegpt or an update"),
    "a count for yes or no": ({"true_sequential": 1}, "^true_sequential: expected True or False, received 1$"),
    "inputs": ({"propagate": "both"}, "^propagate: expected 'pruned' or 'dense', received 'both'$"),
    "measure": ({"measure": "perplexity+all"}, "^measure: expected some of perplexity, errors, gap, joined by \\+, re"),
    "token": ({"bos": "always"}, "^bos: expected 'document' or 'window', received 'always'$"),
    "method": ({"method": "wandaa"}, "^method: expected one of .*, received 'wandaa'; did you mean wanda\\?$"),
    "no such method": ({"method": "xyz"}, "^method: expected one of .*, received 'xyz'$"),
    "sparsity": ({"sparsity": 1.5, "method": "wandaa"}, "^sparsity: expected a fraction from 0 to 1, received 1.5$"),
    "sparsity in words": ({"sparsity": "half"}, "^sparsity: expected .*, received 'half'$"),
    "percdamp": ({"percdamp": -1}, "^percdamp: expected a finite number ≥ 0, received -1.0$"),
    "NaN": ({"percdamp": float("nan")}, "^percdamp: expected a finite number ≥ 0, received nan$"),
    "seqlen": ({"seqlen": 1}, "^seqlen: expected at least 2, received 1$"),
    "nsamples": ({"nsamples": 0}, "^nsamples: expected at least 1, received 0$"),
    "eval_nsamples": ({"eval_nsamples": 0}, "^eval_nsamples: expected at least 1, received 0$"),
    "blocksize": ({"blocksize": 0}, "^blocksize: expected at least 1, received 0$"),
    "dataset": ({"dataset": "stdlb"}, "^dataset: expected 'stdlib', .* existing .*, received 'stdlb'$"),
    "eval_dataset": ({"eval_dataset": "nowhere"}, "^eval_dataset: expected 'stdlib', .*, received 'nowhere'$"),
    "one text": ({"dataset": __file__, "eval_dataset": __file__}, "^dataset: calibration and evaluation would both"),
    "out is a file": ({"out": __file__}, "^out: expected a folder, received '.*'$"),
    "out below a file": ({"out": f"{__file__}/x"}, "^out: expected a folder, received '.*'$"),
    "no out": ({"out": ""}, "^out: expected a folder, received ''$"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
@pytest.mark.usefixtures("untyped")
def test_bad_parameters_are_one_line_that_names_them(given, message):
    with pytest.raises(ParameterError, match=message) as caught:
        checked_run(given)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value._render_traceback_() == [f"ParameterError: {caught.value}"]


def test_names_and_types_are_checked_without_torch():
    code = (
        "import sys\nfrom sparselab.parameters import checked_run\n"
        "try:\n    checked_run({'sparsty': 1})\nexcept ValueError as error:\n    print(error)\n"
        "print([name for name in ('torch', 'pandas', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("sparsty")
    assert second == "[]"


CHECK = "chosen = checked_run(globals())"


@pytest.mark.parametrize(
    ("cells", "wrong"),
    [
        (["seed = 0", "# Parameters\nseed = 1\nsparsty = 0.6\n", CHECK], "sparsty"),
        (["seed: int = 0\nsparsty: float = 0.6", CHECK], "sparsty"),
        (["seed = 0", "# Parameters\nseed = 1\n", CHECK], None),
        (["seed = 0", CHECK, "mine = 3", "print(mine)", "seed = 0", CHECK], None),
        (["seed = 0", CHECK, "mine = 3\nprint(mine)", CHECK], None),
        (["5 x", "seed = 0", CHECK], None),
    ],
    ids=["papermill", "by hand", "known", "again", "only the check again", "after a syntax error"],
)
def test_only_the_cells_of_parameters_are_searched_for_names(cells, wrong):
    namespace = {"In": ["", *cells], "seed": 1, "mine": 3, "sparsty": 0.6, "checked_run": checked_run, "Out": {}}
    if wrong is None:
        assert checked_run(namespace).run.seed == 1
    else:
        with pytest.raises(ParameterError, match=f"^{wrong}: "):
            checked_run(namespace)


def test_types_in_a_notebook_are_checked_wherever_they_were_set():
    with pytest.raises(ParameterError, match="folder: expected text, received 3"):
        checked_values({"In": ["", "print()", "x"], "folder": 3}, REPORT_PARAMETERS)


# --- the notebooks


@pytest.mark.parametrize("path", [RUN, REPORT], ids=lambda path: path.stem)
def test_templates_are_stored_without_outputs(path):
    cells = code_cells(path)
    assert cells[0].metadata.tags == ["parameters"]
    assert all("tags" not in cell.metadata for cell in cells[1:])
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def papermill(notebook, out, cwd, *parameters):
    pytest.importorskip("papermill")
    command = [sys.executable, "-m", "papermill", str(notebook), str(out), *map(str, parameters)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=300)


@pytest.fixture(scope="module")
def swept(small, tmp_path_factory):
    """A folder in which papermill was run four times, the last time for a run that is there already."""
    folder = tmp_path_factory.mktemp("swept")
    for number, changes in enumerate(("sparsity 0.5", "sparsity 2:4", "sparsity 75% seed 1", "sparsity 50%")):
        words = changes.split()
        pairs = [word for name, value in zip(words[::2], words[1::2], strict=True) for word in ("-p", name, value)]
        common = [word for name, value in small.items() for word in ("-p", name, value)]
        done = papermill(RUN, f"{number}.ipynb", folder, *common, *pairs)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_run_leaves_one_result_in_the_folder_of_its_parameters(swept, small):
    results = sorted((swept / "runs").rglob(RESULT))
    assert [path.name for path in results] == [RESULT] * 3, "the fourth run was the first again"
    table = read_sweep(swept / "runs")
    assert table[["pattern", "seed"]].to_numpy().tolist() == [["2:4", 0], ["50%", 0], ["75%", 1]]
    assert table.loc[0, ["model", "dataset"]].tolist() == [small["model"], small["dataset"]]
    assert table.loc[0, ["seqlen", "eval_nsamples", "nsamples", "blocksize"]].tolist() == [16, 5, 8, 16]


@pytest.mark.slow
def test_a_run_shows_its_row_and_its_layer_errors(swept):
    def shown(number):
        return [output for cell in code_cells(swept / f"{number}.ipynb") for output in cell.outputs]

    kept = json.loads(next((swept / "runs").rglob(RESULT)).read_text(encoding="utf-8"))
    assert set(kept) == {
        "model", "weights", "calibration_text", "evaluation_tokens", "measure", "version", "text", "row", "layers",
        "nll",
    }  # fmt: skip
    tables = [output.data["text/html"] for output in shown(0) if "text/html" in output.get("data", {})]
    assert "relative_error" in tables[0]
    assert "self_attn.q_proj" in tables[1]
    assert any("image/png" in output.get("data", {}) for output in shown(0))
    said = ["".join(output.text for output in shown(number) if output.output_type == "stream") for number in (0, 3)]
    assert said[0].startswith("Computing, then keeping in runs")
    assert said[1].startswith("Read from runs")


@pytest.mark.slow
def test_the_report_draws_what_varies_and_lists_what_failed(swept):
    damaged = json.loads(next((swept / "runs").rglob(RESULT)).read_text(encoding="utf-8"))
    damaged["row"] |= {"pattern": "90%", "failure": "layer 1: singular; raise percdamp"}
    damaged["row"] = {name: value for name, value in damaged["row"].items() if name not in ("perplexity", "sparsity")}
    (swept / "runs" / "failed").mkdir()
    (swept / "runs" / "failed" / RESULT).write_text(json.dumps(damaged), encoding="utf-8")
    done = papermill(REPORT, "report.ipynb", swept)
    assert done.returncode == 0, done.stderr
    outputs = [output for cell in code_cells(swept / "report.ipynb") for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1, "only sparsity varies"
    said = [output.text for output in outputs if output.output_type == "stream"]
    assert said[0] == "4 runs, 1 of them failed\n"
    assert "sparsegpt 90%, percdamp 0.01, 8 windows, seed" in said[-1]
    assert "layer 1: singular; raise percdamp" in said[-1]


@pytest.mark.slow
def test_a_report_of_nothing_says_so_in_one_line(tmp_path):
    done = papermill(REPORT, "report.ipynb", tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"ParameterError: folder: runs: expected results of runs ({RESULT} in folders), found none"


@pytest.mark.slow
def test_the_bundled_model_from_the_root_of_the_repository(tmp_path):
    words = ["-p", "sparsity", "0.6", "-p", "method", "wanda", "-p", "nsamples", "8", "-p", "eval_nsamples", "10"]
    done = papermill(RUN.relative_to(ROOT), tmp_path / "out.ipynb", ROOT, *words, "-p", "out", tmp_path / "kept")
    assert done.returncode == 0, done.stderr
    (result,) = read_sweep(tmp_path / "kept").to_dict("records")
    assert (result["model"], result["method"], result["pattern"]) == ("tiny", "wanda", "60%")
    assert 1 < result["ratio"] < 2


WRONG = {
    "sparsty 0.6": "sparsty: expected the name of a parameter, received another; did you mean sparsity?",
    "nsamples many": "nsamples: expected a whole number, received 'many'",
    "method wandaa": (
        "method: expected one of magnitude, wanda, ria, sparsegpt, admm, or one with an update "
        "(+none, +sweep, +cg, +exact), received 'wandaa'; did you mean wanda?"
    ),
    "percdamp -1": "percdamp: expected a finite number ≥ 0, received -1.0",
    "seqlen 0": "seqlen: expected at least 2, received 0",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("words", "message"), WRONG.items(), ids=WRONG)
def test_a_wrong_parameter_ends_papermill_with_one_line_and_no_result(words, message, tmp_path):
    done = papermill(RUN, "out.ipynb", tmp_path, "-p", *words.split())
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == f"ParameterError: {message}"
    assert [path.name for path in tmp_path.rglob("*")] == ["out.ipynb"], "no folder of results"
    assert code_cells(tmp_path / "out.ipynb")[3].execution_count is None, "nothing was loaded"


@pytest.mark.slow
def test_papermill_lists_the_parameters_with_types_and_help():
    done = papermill("--help-notebook", RUN, ROOT)
    listed = dict(line.strip().split(":", 1) for line in done.stdout.splitlines() if "(default" in line)
    assert set(listed) == set(RUN_PARAMETERS)
    assert {name: text.split()[0] for name, text in listed.items()} == {
        name: "|".join(kind.__name__ for kind in types) for name, types in RUN_PARAMETERS.items()
    }
    assert "calibration windows" in done.stdout
