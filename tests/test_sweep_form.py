"""The form of a grid, pressed by hand; with a mouse in `test_browser.py`."""

import json
import threading

import psutil
import pytest

from sparselab.experiment import FAILURE, RESULT
from sparselab.parameters import RUN_PARAMETERS, ParameterError
from sparselab.results import read_sweep
from sparselab.widgets import SweepForm
from sparselab.widgets.sweep_form import view

SECONDS = 200


@pytest.fixture
def form(small, tmp_path):
    """Of two runs."""
    return SweepForm(small | {"method": ["magnitude", "wanda"], "measure": "perplexity"}, tmp_path / "runs")


def finish(form):
    form.job.join(SECONDS)
    assert form.job.state != "running"


def test_there_is_a_field_for_each_parameter_and_it_says_at_once_what_it_comes_to(form, small):
    assert set(form.fields) == set(RUN_PARAMETERS) - {"out"} | {"exclude"}
    assert form.fields["percdamp"].placeholder == "0.01"
    assert form.grid == {name: [value] for name, value in small.items()} | {
        "method": ["magnitude", "wanda"],
        "measure": ["perplexity"],
    }
    assert "2 runs (2 × method)" in form.status.value
    form.fields["sparsity"].value = "50%, 0.6, 2:4"
    form.fields["exclude"].value = "{method: magnitude, sparsity: 2:4}"
    assert "5 runs (2 × method, 3 × sparsity; 1 excluded)" in form.status.value
    assert "sparsity: [50%, 0.6, 2:4]\n" in form.written.value
    assert "exclude: [{method: magnitude, sparsity: 2:4}]" in form.written.value
    form.fields["seed"].value = "0, one"
    assert "⚠ grid: seed: expected a whole number, received &#x27;one&#x27;" in form.status.value
    form.start()
    assert form.job is None
    assert "⚠ grid: seed" in form.status.value
    form.fields["seed"].value = "[0"
    assert "⚠ seed: expected values with commas between" in form.status.value


def test_a_grid_that_is_none_is_refused_at_once(tmp_path):
    with pytest.raises(ParameterError, match="did you mean sparsity"):
        SweepForm({"sparsty": 0.5}, tmp_path)


@pytest.mark.slow
def test_a_dry_run_then_the_runs_and_their_figure(form):
    form.plan_button.click()
    finish(form)
    assert "done: 2 runs (2 × method): 0 done, 2 to do; about" in form.status.value
    assert form.picture.value == b""
    form.run_button.click()
    finish(form)
    assert f"done: 2 runs in {form.out}, 0 of them failed" in form.status.value
    assert form.progress.value == 1
    assert bytes(form.picture.value).startswith(b"\x89PNG")
    assert "magnitude" in form.numbers.value
    assert (form.run_button.disabled, form.cancel_button.disabled) == (False, True)
    assert len(list(form.out.rglob(RESULT))) == 2
    [first, *_] = form.out.rglob(RESULT)
    kept = json.loads(first.read_text())
    kept["row"]["failure"] = "a reason"
    first.with_name(FAILURE).write_text(json.dumps(kept))
    first.unlink()
    with pytest.raises(ValueError, match=r"2 runs are kept in .*; a figure shows more than one"):
        view(form.out)
    form.refresh()
    assert "2 runs are kept" in form.status.value
    for retry, count in ((False, 1), (True, 0)):
        form.retry.value = retry
        form.start()
        finish(form)
        assert f"done: 2 runs in {form.out}, {count} of them failed" in form.status.value


@pytest.mark.slow
def test_cancel_ends_the_processes_and_keeps_what_is_finished(small, tmp_path):
    grid = small | {"method": "wanda", "seed": list(range(200)), "measure": "perplexity"}
    form = SweepForm(grid, tmp_path / "runs")
    seen, told = threading.Event(), form.say

    def say(text, failed=False):
        told(text, failed)
        if "of 200 runs, about" in text:
            seen.set()

    form.say = say
    form.start()
    assert seen.wait(SECONDS)
    form.cancel()
    finish(form)
    assert "cancelled: " in form.status.value
    assert "of 200 runs, all kept" in form.status.value
    assert 0 < len(read_sweep(form.out)) < 200
    assert not [each for each in psutil.Process().children(recursive=True) if "spawn_main" in str(each.cmdline())]
