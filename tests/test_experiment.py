import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import TEXTS, tiny_llama

import sparselab
from sparselab import experiment
from sparselab.errors import SingularHessianError
from sparselab.experiment import RESULT, Result, RunConfig, TextConfig, Workbench
from sparselab.models.blocks import Decoder, read_weight
from sparselab.quality import layer_quality
from sparselab.results import read_results
from sparselab.solvers import relative_error

TEXT = TextConfig(dataset=TEXTS, eval_dataset=TEXTS[:20], seqlen=16, eval_nsamples=5)
RUN = RunConfig("sparsegpt", "60%", nsamples=6, blocksize=16)


@pytest.fixture
def bench(llama, tokenizer):
    return Workbench(llama, tokenizer, "random llama", TEXT)


def test_a_run_is_pruning_and_perplexity_on_the_same_windows(bench, tokenizer):
    result = bench.run(RUN)
    model = tiny_llama()
    held_out = sparselab.evaluation_tokens(tokenizer, TEXTS[:20], 5, 16)
    reference = sparselab.collect(model, held_out, progress=False)
    dense = {name: read_weight(linear).clone() for name, linear in Decoder(model).linears().items()}
    baseline = float(sparselab.perplexity(model, held_out, progress=False))
    calib = sparselab.calibration_tokens(tokenizer, TEXTS, 6, 16, seed=0)
    report = sparselab.prune(model, calib, "sparsegpt", 0.6, blocksize=16, progress=False)
    ppl = sparselab.perplexity(model, held_out, progress=False)
    row = result.row
    assert (row["perplexity"], row["stderr"], row["sparsity"]) == (float(ppl), ppl.stderr, report.sparsity)
    assert row["ratio"] == pytest.approx(float(ppl) / baseline)
    errors = [
        relative_error(dense[name], read_weight(linear), reference[name].hessian)
        for name, linear in Decoder(model).linears().items()
    ]
    assert [layer["relative_error"] for layer in result.layers] == pytest.approx(errors)
    assert row["relative_error"] == pytest.approx(sum(errors) / 21)
    assert (row["method"], row["pattern"], row["seed"], row["failure"]) == ("sparsegpt", "60%", 0, "")
    assert result.nll == ppl.nll.tolist()
    quality = layer_quality(model, dense, calib, progress=False)
    for name in ("calibration_error", "optimality_gap", "residual"):
        assert [layer[name] for layer in result.layers] == quality[name].tolist()
    assert row["calibration_error"] == pytest.approx(quality.calibration_error.mean())
    assert row["optimality_gap"] == pytest.approx(math.exp(quality.optimality_gap.map(math.log).mean()))


def test_layers_are_measured_after_the_run_or_not_at_all(llama, tokenizer, monkeypatch):
    order = []
    for name in ("prune", "layer_quality"):
        call = getattr(experiment, name)
        monkeypatch.setattr(experiment, name, lambda *a, name=name, call=call, **k: order.append(name) or call(*a, **k))
    row = Workbench(llama, tokenizer, "m", TEXT).run(RUN).row
    assert order == ["prune", "layer_quality"], "beside the run, whose seconds and memory are its own"
    monkeypatch.setattr(experiment, "layer_quality", None)
    monkeypatch.setattr(experiment, "collect", None)
    lean = Workbench(llama, tokenizer, "m", TEXT, measure="perplexity").run(RUN)
    assert lean.row["perplexity"] == row["perplexity"]
    assert set(lean.row) == set(row)
    for name in ("relative_error", "calibration_error", "optimality_gap"):
        assert math.isnan(lean.row[name])
        assert all(math.isnan(layer[name]) for layer in lean.layers)


def test_errors_alone_are_those_of_a_whole_run_and_nothing_else_is_measured(llama, tokenizer, monkeypatch, tmp_path):
    row = Workbench(llama, tokenizer, "m", TEXT, tmp_path).run(RUN).row
    monkeypatch.setattr(experiment, "layer_quality", None)
    monkeypatch.setattr(experiment, "perplexity", None)
    bench = Workbench(llama, tokenizer, "m", TEXT, tmp_path, measure="errors")
    result = bench.run(RUN)
    assert result.row["relative_error"] == row["relative_error"]
    assert result.nll == []
    assert len(list(tmp_path.glob("*/result.json"))) == 2, "what is measured is part of what a result is filed by"
    for name in ("perplexity", "stderr", "ratio", "calibration_error", "optimality_gap"):
        assert math.isnan(result.row[name])
    with pytest.raises(ValueError, match="perplexity: expected a workbench that measures it, received one of 'errors'"):
        bench.perplexity(RUN)


def test_what_is_measured_is_checked_and_put_in_order(llama, tokenizer):
    assert Workbench(llama, tokenizer, "m", TEXT, measure="gap+perplexity").measure == "perplexity+gap"
    for measure in ("", "ppl", "errors+"):
        with pytest.raises(ValueError, match="measure: expected some of perplexity, errors, gap, joined by "):
            Workbench(llama, tokenizer, "m", TEXT, measure=measure)


def test_difference_is_that_of_single_runs_paired_by_seed(bench):
    second, seeds = replace(RUN, method="wanda", seed=7), (1, 2, 0)
    for which in (seeds, (2,)):
        found = bench.difference(RUN, second, which)
        firsts, seconds = ([bench.perplexity(replace(run, seed=seed)) for seed in which] for run in (RUN, second))
        assert found == sparselab.difference(firsts, seconds)
    held_out = bench.held_out
    sparselab.prune(bench.model, bench.calibration(6, 2), "sparsegpt", 0.6, blocksize=16, progress=False)
    again = sparselab.perplexity(bench.model, held_out, progress=False)
    assert again.nll.tolist() == firsts[0].nll.tolist()
    assert firsts[0].seqlen == 16
    with pytest.raises(ValueError, match="seeds: expected at least one, received none"):
        bench.difference(RUN, second, ())


def test_magnitude_reads_no_text_and_is_run_once_for_all_seeds(bench):
    found = bench.difference(replace(RUN, method="magnitude"), RUN, seeds=(3, 4))
    assert bench.runs[["method", "seed"]].values.tolist() == [["magnitude", 3], ["sparsegpt", 3], ["sparsegpt", 4]]
    alone = [bench.perplexity(run) for run in (replace(RUN, method="magnitude", seed=3), replace(RUN, seed=3))]
    assert found.half_width > 0
    assert found.mean != pytest.approx(sparselab.difference(*alone).mean)


def test_the_model_is_dense_again(bench, llama):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    bench.run(RUN)
    torch.testing.assert_close(dict(llama.state_dict()), before, rtol=0, atol=0)


def test_nothing_is_computed_twice(bench, monkeypatch):
    first = bench.run(RUN)
    monkeypatch.setattr("sparselab.experiment.prune", None)
    assert bench.run(replace(RUN, sparsity=0.6)) is first, "0.6 and 60% are one run"
    assert len(bench.runs) == 1
    with pytest.raises(TypeError):
        bench.run(replace(RUN, seed=1))


def test_a_folder_keeps_runs_for_the_next_session_of_the_same_model(llama, tokenizer, tmp_path, monkeypatch):
    first = Workbench(llama, tokenizer, "m", TEXT, tmp_path).run(RUN)
    again = Workbench(tiny_llama(), tokenizer, "m", TEXT, tmp_path)
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    strangers = [
        Workbench(other, tokenizer, "m", TEXT, tmp_path),
        Workbench(llama, tokenizer, "m", replace(TEXT, eval_nsamples=4), tmp_path),
        Workbench(llama, tokenizer, "m", replace(TEXT, dataset=[*TEXTS, "x = 1"]), tmp_path),
        Workbench(llama, tokenizer, "m", replace(TEXT, eval_dataset=["x = 1", *TEXTS[:20]]), tmp_path),
    ]
    monkeypatch.setattr("sparselab.experiment.prune", None)
    assert again.run(RUN) == first
    assert again.perplexity(RUN).nll.tolist() == first.nll
    dense = Workbench(tiny_llama(), tokenizer, "m", TEXT).dense
    monkeypatch.setattr("sparselab.experiment.perplexity", None)
    assert torch.equal(Workbench(tiny_llama(), tokenizer, "m", TEXT, tmp_path).dense.nll, dense.nll)
    for stranger in strangers:
        assert stranger.finished(RUN) is None
    assert again.finished(replace(RUN, percdamp=0.1)) is None
    read = read_results(tmp_path)
    assert read.loc[0, "perplexity"] == first.row["perplexity"]
    assert read.loc[0, "model"] == "m"


def test_a_stopped_run_leaves_a_dense_model_and_no_result(bench, llama, tmp_path):
    bench.folder = tmp_path
    before = {name: value.clone() for name, value in llama.state_dict().items()}

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(RUN, stop)
    torch.testing.assert_close(dict(llama.state_dict()), before, rtol=0, atol=0)
    assert bench.runs.empty
    assert list(tmp_path.rglob(RESULT)) == []


def test_a_failed_factorisation_is_a_result_that_says_so(bench, monkeypatch):
    def fail(*args, **kwargs):
        raise SingularHessianError("layer 3 is not positive definite; raise percdamp")

    monkeypatch.setattr("sparselab.experiment.prune", fail)
    result = bench.run(RUN)
    row = result.row
    assert result == Result(row, [], [])
    with pytest.raises(SingularHessianError, match="layer 3 is not positive definite; raise percdamp"):
        bench.difference(RUN, replace(RUN, method="wanda"))
    assert row["failure"] == "layer 3 is not positive definite; raise percdamp"
    assert "perplexity" not in row


def test_collected_statistics_serve_dense_runs(bench, monkeypatch):
    dense = replace(RUN, propagate="dense")
    by_walk = bench.run(dense).row
    other = Workbench(bench.model, bench.tokenizer, "random llama", TEXT, measure="perplexity")
    other.collect([2, 6], seed=0)
    monkeypatch.setattr(other, "calibration", None)
    served = other.run(dense).row
    assert served["perplexity"] == pytest.approx(by_walk["perplexity"], rel=1e-4)
    assert other.run(replace(dense, nsamples=2)).row["perplexity"] != served["perplexity"]


def test_damaged_and_missing_results_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"expected results of runs \(result.json in folders\), found none"):
        read_results(tmp_path)
    (tmp_path / "a").mkdir()
    for text in ('{"row": 1', json.dumps({"row": {}})):
        (tmp_path / "a" / "result.json").write_text(text)
        with pytest.raises(ValueError, match=r"result\.json: expected a result of a run, found a damaged file"):
            read_results(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "obc"}, "method: expected one of"),
        ({"sparsity": 2.0}, "sparsity: expected a fraction"),
        ({"percdamp": -1.0}, "percdamp"),
        ({"nsamples": 0}, "nsamples: expected at least 1, received 0"),
        ({"propagate": "both"}, "propagate"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_bad_runs(arguments, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**arguments)


@pytest.mark.parametrize("name", ["stdlib", "wikitext2", "ptb", "c4"])
def test_a_text_with_two_sides_may_be_calibrated_and_measured_on(name):
    assert TextConfig(dataset=name, eval_dataset=name).eval_dataset == name


@pytest.mark.parametrize("text", ["owner/name", TEXTS])
def test_other_texts_may_not(text):
    with pytest.raises(ValueError, match="calibration and evaluation would both read"):
        TextConfig(dataset=text, eval_dataset=text)
