import threading

import pytest
from conftest import TEXTS

from sparselab.experiment import RunConfig, TextConfig, Workbench
from sparselab.widgets.curve_lab import CurveLab, State, view
from sparselab.widgets.job import Job

LIKE = RunConfig(nsamples=4, blocksize=16)
SMALL = State(("magnitude", "wanda"), ("50%", "2:4"), 2)
SECONDS = 60


@pytest.fixture
def bench(llama, tokenizer):
    text = TextConfig(dataset=TEXTS, eval_dataset=TEXTS[:20], seqlen=16, eval_nsamples=5)
    return Workbench(llama, tokenizer, "random llama", text)


def press(lab: CurveLab, button: str) -> None:
    getattr(lab, button).click()


def finish(lab: CurveLab) -> None:
    lab.job.join(SECONDS)
    assert lab.job.state != "running"


def test_what_a_state_runs():
    runs = SMALL.runs(LIKE)
    assert [(run.method, run.sparsity, run.seed) for run in runs] == [
        ("magnitude", "50%", 0), ("wanda", "50%", 0), ("magnitude", "2:4", 0), ("wanda", "2:4", 0),
        ("wanda", "50%", 1), ("wanda", "2:4", 1),
    ]  # fmt: skip
    assert {run.nsamples for run in runs} == {4}


def test_run_computes_what_is_missing_and_draws_it(bench):
    lab = CurveLab(bench, LIKE, SMALL)
    assert "press Run" in lab.status.value
    assert lab.picture.value == b""
    press(lab, "run_button")
    finish(lab)
    assert "done: 6 of 6 points" in lab.status.value
    assert lab.progress.value == 1
    assert bytes(lab.picture.value).startswith(b"\x89PNG")
    assert "50%" in lab.numbers.value
    assert (lab.run_button.disabled, lab.cancel_button.disabled) == (False, True)


def test_finished_points_are_never_computed_again(bench, monkeypatch):
    lab = CurveLab(bench, LIKE, SMALL)
    lab.start()
    finish(lab)
    monkeypatch.setattr("sparselab.experiment.prune", None)
    lab.start()
    finish(lab)
    assert "done: 6 of 6 points" in lab.status.value
    lab.patterns.value = ("60%",)
    lab.start()
    finish(lab)
    assert "failed after 0 of 3 points: TypeError" in lab.status.value, "a new point would need pruning"


def test_cancel_stops_between_layers_and_keeps_what_is_finished(bench, monkeypatch):
    lab = CurveLab(bench, LIKE, SMALL)
    gate, reached, layers = threading.Event(), threading.Event(), []
    run = bench.run

    def slow(config, progress):
        def watch(done, total):
            if config.seed == 1:
                layers.append(done)
                reached.set()
                gate.wait(SECONDS)
            progress(done, total)

        return run(config, watch)

    monkeypatch.setattr(bench, "run", slow)
    press(lab, "run_button")
    assert reached.wait(SECONDS)
    assert lab.run_button.disabled
    assert not lab.cancel_button.disabled
    press(lab, "cancel_button")
    gate.set()
    finish(lab)
    assert layers == [1], "it went on after the first layer"
    assert "cancelled: 4 of 6 points, all kept" in lab.status.value
    assert len(bench.runs) == 4
    monkeypatch.setattr(bench, "run", run)
    press(lab, "run_button")
    finish(lab)
    assert len(bench.runs) == 6


def test_an_error_in_the_background_is_shown(bench, monkeypatch):
    lab = CurveLab(bench, LIKE, SMALL)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("sparselab.experiment.prune", fail)
    lab.start()
    finish(lab)
    assert "⚠ failed after 0 of 6 points: RuntimeError: out of memory" in lab.status.value
    assert not lab.run_button.disabled


def test_nothing_chosen_is_said(bench):
    lab = CurveLab(bench, LIKE, SMALL)
    lab.methods.value = ()
    lab.start()
    assert "choose at least one method" in lab.status.value
    assert lab.job is None


def test_a_job_says_how_far_it_is_and_how_long_it_will_take():
    def work(watch):
        for done in range(2, 7):
            watch(done, 6)
        return "all of it"

    told = []
    job = Job(work, lambda job: told.append((job.state, job.finished, job.seconds_left)))
    assert job.seconds_left is None
    job.start()
    job.join(SECONDS)
    assert told[0] == ("running", 2, None), "nothing is known of how long those took that were done before"
    assert told[-1] == ("done", 6, 0)
    assert job.result == "all of it"
    assert [finished for _, finished, _ in told] == [2, 3, 4, 5, 6, 6]
    assert all(left > 0 for state, finished, left in told if state == "running" and 2 < finished < 6)


def test_the_view_states_model_tokens_seeds_and_numbers(bench):
    with pytest.raises(ValueError, match="press Run"):
        view(bench, LIKE)
    bench.run_all(SMALL.runs(LIKE), progress=False)
    shown = view(bench, LIKE)
    assert "random llama; calibrated on 4 × 16 tokens of 60 given texts (seeds 0, 1)" in shown.figure.get_supxlabel()
    assert shown.summary.startswith(f"6 points; dense {float(bench.dense):.2f}")
    numbers = shown.numbers.set_index("pattern")
    expected = bench.runs.query("method == 'wanda' and pattern == '2:4'").perplexity.mean()
    assert numbers.loc["2:4", "wanda"] == f"{expected:.2f}"
