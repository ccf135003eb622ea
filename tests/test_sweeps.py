import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
from filelock import FileLock

import sparselab
from sparselab import sweep, sweeps, worker
from sparselab.cli import main
from sparselab.engines import InProcess, Pool, dask_executor
from sparselab.errors import LostWorkerError, OutputError, SingularHessianError
from sparselab.experiment import FAILURE, RESULT, RunConfig, TextConfig, Workbench
from sparselab.grid import read_grid
from sparselab.parameters import ParameterError
from sparselab.results import read_sweep

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "notebooks" / "sweep_run.ipynb"
SETTINGS = ["method", "pattern", "seed"]
MEASURED = ["sparsity", "perplexity", "stderr", "ratio", "relative_error", "calibration_error"]


@pytest.fixture
def grid(small):
    """Of eight runs of a small model."""
    return small | {"method": ["wanda", "sparsegpt"], "sparsity": [0.5, "2:4"], "seed": [0, 1]}


def quiet(grid, out, *engine, **how):
    return sweep(grid, out, *engine, progress=False, **how)


def kept(out, name=RESULT):
    return sorted(out.rglob(name))


def numbers(table):
    return table.sort_values(SETTINGS)[[*SETTINGS, *MEASURED]].reset_index(drop=True)


def same(first, second):
    """Workers may have other numbers of threads, which add up in another order."""
    pd.testing.assert_frame_equal(numbers(first), numbers(second), rtol=1e-4)


def test_every_run_of_the_grid_is_what_a_workbench_makes_of_it(grid, tmp_path):
    told = []
    table = quiet(grid, tmp_path, tell=told.append)
    assert told[0].startswith("8 runs (2 × method, 2 × sparsity, 2 × seed): 0 done, 8 to do; about ")
    assert len(table) == len(kept(tmp_path)) == 8
    model, tokenizer = sparselab.load(grid["model"])
    text = TextConfig(grid["dataset"], grid["eval_dataset"], grid["seqlen"], grid["eval_nsamples"])
    bench = Workbench(model, tokenizer, grid["model"], text)
    for row in table.to_dict("records"):
        run = RunConfig(row["method"], row["pattern"], blocksize=16, nsamples=grid["nsamples"], seed=row["seed"])
        expected = bench.run(run).row
        assert {name: row[name] for name in MEASURED} == {name: expected[name] for name in MEASURED}
    assert {path.parent.parent for path in kept(tmp_path)} == {tmp_path}


def test_what_is_done_is_not_done_again(grid, tmp_path, monkeypatch):
    first = quiet(grid | {"seed": 0}, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in kept(tmp_path)}
    done = []
    work = Workbench._compute
    monkeypatch.setattr(Workbench, "_compute", lambda self, run, *rest: done.append(run) or work(self, run, *rest))
    table = quiet(grid, tmp_path)
    assert sorted((run.method, run.sparsity, run.seed) for run in done) == sorted(
        (method, pattern, 1) for method in ("wanda", "sparsegpt") for pattern in ("50%", "2:4")
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before
    same(table[table.seed == 0], first)


def test_whoever_watches_is_told_of_new_results_and_ends_the_sweep_by_raising(grid, tmp_path):
    seen, asked = [], []

    def stop(done, total):
        asked.append((done, total))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(grid, tmp_path, progress=stop, watch=lambda *how: seen.append(how))
    assert asked == [(1, 8), (2, 8), (3, 8)]
    assert seen == [(0, 8), (1, 8), (2, 8)]
    assert len(kept(tmp_path)) == 3


def test_a_worker_opens_model_and_text_anew_for_each_sweep(grid, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text(Path(grid["dataset"]).read_text())
    [point, *_] = read_grid(grid | {"dataset": str(text)}, tmp_path).runs
    known = worker.survey("one", point)
    text.write_text(text.read_text() + "\nx = 1\n")
    assert worker.survey("one", point).identity == known.identity
    assert worker.survey("another", point).identity != known.identity
    worker.forget()


def test_another_text_is_another_sweep(grid, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text(Path(grid["dataset"]).read_text())
    given = grid | {"dataset": str(text), "seed": 0, "sparsity": 0.5}
    quiet(given, tmp_path / "out")
    assert sweeps.plan(given, tmp_path / "out").todo == 0
    text.write_text(text.read_text() + "\nx = 1\n")
    assert sweeps.plan(given, tmp_path / "out").todo == 2


@pytest.fixture
def failing(monkeypatch):
    """Wanda at 2:4 raises, as long as the list says so."""
    work, failing = Workbench._compute, [True]

    def compute(self, run, *rest):
        if failing[0] and (run.method, run.sparsity) == ("wanda", "2:4"):
            raise MemoryError("of two\nlines")
        return work(self, run, *rest)

    monkeypatch.setattr(Workbench, "_compute", compute)
    return failing


def test_a_run_that_fails_stops_no_other_and_is_done_again_on_request(grid, tmp_path, failing):
    told = []
    table = quiet(grid | {"seed": 0}, tmp_path, tell=told.append)
    assert len(table) == 4
    failed = table[table.failure != ""]
    assert failed[["method", "pattern", "failure"]].to_numpy().tolist() == [
        ["wanda", "2:4", "MemoryError: of two lines"]
    ]
    assert told[1:] == [f"{grid['model']}, wanda 2:4, percdamp 0.01, 8 windows, seed 0: MemoryError: of two lines"]
    [path] = kept(tmp_path, FAILURE)
    assert "raise MemoryError" in "".join(json.loads(path.read_text())["traceback"])

    failing[0] = False
    plan = sweeps.plan(grid | {"seed": 0}, tmp_path)
    assert (plan.todo, list(plan.failed.values())) == (0, ["MemoryError: of two lines"])
    assert str(plan).endswith("3 done, 0 to do, 1 failed before, which --retry does again")
    before = told.copy()
    assert (quiet(grid | {"seed": 0}, tmp_path, tell=told.append).failure != "").sum() == 1, "not unless asked"
    assert told[len(before) + 1 :] == before[1:], "it is listed again"
    assert (quiet(grid | {"seed": 0}, tmp_path, retry=True).failure == "").all()
    assert kept(tmp_path, FAILURE) == []


def test_a_notebook_that_failed_after_its_result_was_kept_is_not_run_again_unless_asked(grid, tmp_path):
    some = grid | {"seed": 0, "sparsity": 0.5, "method": "wanda"}
    quiet(some, tmp_path)
    [result] = kept(tmp_path)
    written = json.loads(result.read_text())
    written["row"]["failure"] = "RuntimeError: in the last cell"
    result.with_name(FAILURE).write_text(json.dumps(written))
    plan = sweeps.plan(some, tmp_path, template=TEMPLATE)
    assert (plan.todo, list(plan.failed.values())) == (0, ["RuntimeError: in the last cell"])
    assert sweeps.plan(some, tmp_path, template=TEMPLATE, retry=True).todo == 1
    plan = sweeps.plan(some, tmp_path)
    assert (plan.todo, plan.failed) == (0, {}), "without notebooks nothing has failed"
    assert quiet(some, tmp_path).failure.tolist() == [""]


def test_a_hessian_that_cannot_be_factored_is_a_result_and_is_told(grid, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise SingularHessianError("layer 3 is not positive definite; raise percdamp")

    monkeypatch.setattr("sparselab.experiment.prune", fail)
    (tmp_path / "grid.yaml").write_text(json.dumps(grid | {"seed": 0, "method": "sparsegpt"}))
    words = ["sweep", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "runs"), "--no-notebooks"]
    assert main(words) == 1
    said, err = capsys.readouterr()
    assert said.splitlines()[2].endswith(
        "2:4, percdamp 0.01, 8 windows, seed 0: layer 3 is not positive definite; raise percdamp"
    )
    assert said.splitlines()[-1] == f"2 runs in {tmp_path / 'runs'}; look at {tmp_path / 'runs' / 'report.html'}"
    assert "sparselab sweep: error: 2 of 2 runs have failed; what ended in an error is done again with --retry" in err
    assert len(kept(tmp_path / "runs")) == 2


def test_runs_on_dense_inputs_share_statistics_of_one_pass(grid, tmp_path, monkeypatch):
    passes = []
    collect = Workbench.collect
    monkeypatch.setattr(Workbench, "collect", lambda self, *given: passes.append(given) or collect(self, *given))
    shared = grid | {"propagate": "dense", "nsamples": [4, 8], "percdamp": [0.01, 0.1], "sparsity": 0.5}
    table = quiet(shared, tmp_path / "shared")
    assert passes == [([4, 8], 0), ([4, 8], 1)], "one for each draw"
    assert len(table) == 16
    passes.clear()
    errors = quiet(shared | {"measure": "errors"}, tmp_path / "errors")
    assert passes == [([4, 8], 0), ([4, 8], 1)]
    pd.testing.assert_series_equal(errors.relative_error, table.relative_error, rtol=1e-4)
    assert errors.perplexity.isna().all()
    passes.clear()
    alone = quiet(shared | {"nsamples": 8, "percdamp": 0.1, "method": "sparsegpt", "seed": 1}, tmp_path / "alone")
    assert passes == []
    same(table.query("nsamples == 8 and percdamp == 0.1 and method == 'sparsegpt' and seed == 1"), alone)


def test_what_one_run_cannot_have_is_no_loss_to_those_it_shares_with(grid, tmp_path):
    some = grid | {"propagate": "dense", "nsamples": [4, 10**6], "sparsity": 0.5, "seed": 0}
    table = quiet(some, tmp_path)
    assert (table[table.nsamples == 4].failure == "").all()
    assert table[table.nsamples == 10**6].failure.str.startswith("ValueError: too little text").all()
    assert len(table) == 4


def test_a_model_or_text_that_is_none_stops_the_sweep_before_it_begins(grid, tmp_path):
    with pytest.raises(sparselab.errors.ModelLoadError):
        quiet(grid | {"model": [grid["model"], str(tmp_path / "none")]}, tmp_path / "out")
    with pytest.raises(ValueError, match="too little text"):
        quiet(grid | {"eval_nsamples": 10**6}, tmp_path / "out")
    with pytest.raises(ParameterError, match="sparsty"):
        quiet(grid | {"sparsty": 1}, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"template: expected a notebook, received none\.ipynb"):
        quiet(grid, tmp_path / "out", template="none.ipynb")
    assert kept(tmp_path) == []


def test_one_sweep_at_a_time(grid, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(OutputError, match="another sweep writes to it; wait, or choose"):
        quiet(grid, tmp_path)


# --- engines


class Losing(InProcess):
    """Loses work of a kind, the first so many times."""

    def __init__(self, times, work=worker.do, of=lambda job: True):
        self.times, self.work, self.of = times, work, of

    def submit(self, work, /, *args, **kwargs):
        if work is self.work and self.times and self.of(args[0]):
            self.times -= 1
            lost = Future()
            lost.set_exception(BrokenProcessPool("a process ended"))
            return lost
        return super().submit(work, *args, **kwargs)


def test_work_of_lost_processes_is_done_by_others(grid, tmp_path):
    made = []

    def make():
        made.append(Losing(3 if len(made) < 2 else 0))
        return made[-1]

    assert (quiet(grid, tmp_path, make).failure == "").all()
    assert len(made) == 3
    assert len(kept(tmp_path)) == 8


def test_workers_that_are_lost_and_cannot_be_replaced_end_the_sweep(grid, tmp_path):
    with pytest.raises(LostWorkerError, match=r"1 runs are left, as .*, wanda 50%, .*; the same call goes on"):
        quiet(grid, tmp_path, Losing(1))
    assert len(kept(tmp_path)) == 7, "others were done"
    assert len(quiet(grid, tmp_path)) == 8


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_a_run_that_always_ends_its_process_has_failed_and_stops_no_other(grid, tmp_path, propagate):
    def deadly(job):
        return any((point.run.method, point.run.sparsity) == ("wanda", "2:4") for point in job.folders)

    some, told = grid | {"seed": 0, "propagate": propagate, "exclude": {"method": "sparsegpt", "sparsity": 0.5}}, []
    some["percdamp"] = [0.01, 0.1]  # where statistics are shared, all are one job at first
    table = quiet(some, tmp_path, lambda: Losing(10**6, of=deadly), tell=told.append)
    failed = table[table.failure != ""]
    assert set(zip(failed.method, failed.pattern, strict=True)) == {("wanda", "2:4")}
    assert len(failed) == len(told) - 1 == 2
    assert (len(table), len(kept(tmp_path))) == (6, 4)
    assert "LostWorkerError: its process has ended twice, as when memory is short" in told[1]
    assert (quiet(some, tmp_path, retry=True).failure == "").all()


def test_a_worker_that_is_lost_while_it_opens_the_model_is_replaced(grid, tmp_path):
    made = []

    def make(times):
        made.append(Losing(times, worker.survey))
        return made[-1]

    some = grid | {"seed": 0, "sparsity": 0.5}
    assert sweeps.plan(some, tmp_path, lambda: make(not made)).todo == 2
    assert len(made) == 2
    for engine in (partial(make, 1), Losing(1, worker.survey)):
        with pytest.raises(LostWorkerError, match="the process that was to open it has ended, as when memory is short"):
            sweeps.plan(some, tmp_path, engine)


class Busy(InProcess):
    """Never comes to an end with work of a kind."""

    def __init__(self, work):
        self.work, self.given = work, []

    def submit(self, work, /, *args, **kwargs):
        if work is not self.work:
            return super().submit(work, *args, **kwargs)
        self.given.append(Future())
        return self.given[-1]


@pytest.mark.parametrize(("work", "known"), [(worker.survey, (0, 0)), (worker.do, (0, 8))])
def test_who_ends_the_sweep_while_workers_are_busy_is_heard_and_nothing_more_is_begun(
    grid, tmp_path, monkeypatch, work, known
):
    monkeypatch.setattr(sweeps, "_SECONDS_BETWEEN_LOOKS", 0.01)
    asked = []

    def stop(*how):
        asked.append(how)
        if len(asked) == 3:
            raise KeyboardInterrupt

    engine = Busy(work)
    with pytest.raises(KeyboardInterrupt):
        sweep(grid, tmp_path, engine, progress=stop)
    assert asked == [known] * 3
    assert len(engine.given) == (8 if work is worker.do else 1)
    assert all(future.cancelled() for future in engine.given)


@pytest.mark.slow
def test_a_pool_ends_its_own_processes_and_no_others():
    with Pool(1) as other:
        assert other.submit(int).result() == 0
        pool = Pool(1)
        sleeping = pool.submit(time.sleep, 1000)
        assert other.submit(abs, -1).result() == 1
        pool.kill()
        assert isinstance(sleeping.exception(60), BrokenProcessPool)
        assert other.submit(abs, -2).result() == 2


def test_a_worker_that_finds_another_model_says_so(grid, tmp_path):
    plan = sweeps.plan(grid | {"seed": 0, "sparsity": 0.5, "method": "wanda"}, tmp_path)
    [job] = plan.jobs
    other = replace(job, identity=job.identity | {"weights": "0" * 64})
    with pytest.raises(OutputError, match="weights is another in this worker than where the sweep was planned"):
        worker.do(other)


def test_any_executor_does_and_one_of_several_threads_does_no_harm(grid, tmp_path):
    expected = quiet(grid, tmp_path / "alone")
    with ThreadPoolExecutor(3) as executor:
        same(quiet(grid, tmp_path / "threads", executor), expected)
        assert executor.submit(int).result() == 0, "it is left running"


@pytest.mark.slow
def test_processes_find_the_same_and_one_that_is_killed_costs_nothing(grid, tmp_path):
    expected = quiet(grid, tmp_path / "alone")
    killed = []

    def kill(done, total):
        if done == 2 and not killed:
            children = [
                each for each in psutil.Process().children(recursive=True) if "spawn_main" in str(each.cmdline())
            ]
            killed.append(children[0].pid)
            os.kill(children[0].pid, signal.SIGKILL)

    table = sweep(grid, tmp_path / "pool", partial(Pool, 2), progress=kill)
    assert killed
    same(table, expected)
    assert len(kept(tmp_path / "pool")) == 8
    assert not [each for each in psutil.Process().children(recursive=True) if "spawn_main" in str(each.cmdline())]


@pytest.mark.slow
def test_a_dask_worker_that_is_killed_costs_nothing(grid, tmp_path):
    pytest.importorskip("distributed")
    expected = quiet(grid, tmp_path / "alone")
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))  # JSON is YAML
    words = [sys.executable, str(ROOT / "tests" / "on_dask.py"), str(tmp_path / "grid.yaml"), str(tmp_path / "dask")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("killed one of tcp://127.0.0.1:")
    assert second == "8 runs, 0 failed"
    same(read_sweep(tmp_path / "dask"), expected)
    assert len(kept(tmp_path / "dask")) == 8


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer_is_named_in_a_line(grid, tmp_path):
    pytest.importorskip("distributed")
    process = command(grid, tmp_path / "runs", "--scheduler", "nonsense")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: scheduler: expected the address of a Dask scheduler, as tcp://host:8786" in err.splitlines()[-1]


def test_slurm_jobs_are_asked_for_as_dask_is_configured(monkeypatch):
    """There is no Slurm here: what stands in for it takes note of what is asked."""
    asked = []

    class Cluster(nullcontext):
        def __init__(self):
            super().__init__(self)

        def scale(self, jobs):
            asked.append(jobs)

    class Client(nullcontext):
        def __init__(self, place, timeout):
            assert isinstance(place, Cluster)
            super().__init__(self)

        get_executor = staticmethod(lambda pure: InProcess())

    monkeypatch.setitem(sys.modules, "distributed", SimpleNamespace(Client=Client))
    monkeypatch.setitem(sys.modules, "dask_jobqueue", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "dask_jobqueue.slurm", SimpleNamespace(SLURMCluster=Cluster))
    with dask_executor("slurm", 3) as executor:
        assert executor.submit(len, "ab").result() == 2
    assert asked == [3]


def test_without_dask_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=r"pip install 'sparselab\[sweep\]'"), dask_executor("tcp://127.0.0.1:1"):
        pass


# --- with notebooks


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_each_run_has_a_notebook_that_can_be_opened(grid, tmp_path):
    some = grid | {"seed": 0, "sparsity": 0.5}
    expected = quiet(some, tmp_path / "headless")
    table = quiet(some, tmp_path / "runs", template=TEMPLATE)
    same(table, expected)
    names = {str(path.relative_to(tmp_path / "headless")) for path in kept(tmp_path / "headless")}
    assert {str(path.relative_to(tmp_path / "runs")) for path in kept(tmp_path / "runs")} == names, "same folders"
    assert len(kept(tmp_path / "runs", "run.ipynb")) == 2
    assert kept(tmp_path / "runs", "run.partial.ipynb") == []
    plan = sweeps.plan(some, tmp_path / "headless", template=TEMPLATE)
    assert plan.todo == 2, "results are there, and notebooks are not"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_notebook_that_fails_is_kept_as_it_was(grid, tmp_path):
    text = TEMPLATE.read_text().replace("result = bench.run(chosen.run, progress=True)", "result = 1 / 0")
    assert "1 / 0" in text
    (tmp_path / "mine.ipynb").write_text(text)
    some = grid | {"seed": 0, "sparsity": 0.5, "method": "wanda"}
    table = quiet(some, tmp_path / "runs", template=tmp_path / "mine.ipynb")
    assert table.failure.tolist() == ["RuntimeError: ZeroDivisionError: division by zero"]
    [partial_notebook] = kept(tmp_path / "runs", "run.partial.ipynb")
    assert "ZeroDivisionError" in partial_notebook.read_text()


# --- killed from outside


def command(grid, out, *more):
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(grid))  # JSON is YAML
    words = [sys.executable, "-m", "sparselab", "sweep", str(path), "--out", str(out), "--no-notebooks", *more]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell ignore it
    try:
        return subprocess.Popen(words, cwd=out.parent, **piped)
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for_results(process, out, count):
    started = time.monotonic()
    while len(kept(out)) < count and process.poll() is None:
        assert time.monotonic() - started < 240, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_repeats_nothing(grid, tmp_path):
    expected, out = quiet(grid, tmp_path / "quiet"), tmp_path / "runs"
    process = command(grid, out, "--workers", "2")
    wait_for_results(process, out, 3)
    process.kill()
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in kept(out)}
    assert 3 <= len(before) < 8
    process = command(grid, out, "--workers", "2")
    said, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert f": {len(before)} done, {8 - len(before)} to do; " in said
    assert said.splitlines()[-1] == f"8 runs in {out}; look at {out / 'report.html'}"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    same(read_sweep(out), expected)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interruption_ends_it_within_seconds(grid, tmp_path, workers):
    process = command(grid | {"seed": list(range(200))}, tmp_path / "runs", "--workers", workers)
    wait_for_results(process, tmp_path / "runs", 1)
    others = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 15
    assert process.returncode == 1
    assert err.splitlines()[-1] == "sparselab: interrupted"
    _, alive = psutil.wait_procs(others, 10)
    assert alive == []
