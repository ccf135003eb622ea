import json
from dataclasses import replace

import pytest
import torch
from conftest import TEXTS, tiny_llama

import sparselab
from sparselab.errors import SingularHessianError
from sparselab.experiment import RunConfig, TextConfig, Workbench, read_results
from sparselab.models.blocks import Decoder, read_weight
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
    ]
    monkeypatch.setattr("sparselab.experiment.prune", None)
    assert again.run(RUN) == first
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
    assert list(tmp_path.iterdir()) == []


def test_a_failed_factorisation_is_a_result_that_says_so(bench, monkeypatch):
    def fail(*args, **kwargs):
        raise SingularHessianError("layer 3 is not positive definite; raise percdamp")

    monkeypatch.setattr("sparselab.experiment.prune", fail)
    row = bench.run(RUN).row
    assert row["failure"] == "layer 3 is not positive definite; raise percdamp"
    assert "perplexity" not in row


def test_collected_statistics_serve_dense_runs(bench, monkeypatch):
    dense = replace(RUN, propagate="dense")
    by_walk = bench.run(dense).row
    other = Workbench(bench.model, bench.tokenizer, "random llama", TEXT)
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
