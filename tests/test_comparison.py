import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import TEXTS

import sparselab
from sparselab.comparison import CompareConfig, compare, estimate_seconds
from sparselab.models.blocks import read_weight
from sparselab.solvers import relative_error

CONFIG = CompareConfig(
    sparsities=("50%", "2:4"), dataset=TEXTS, eval_dataset=TEXTS[:20], nsamples=6, eval_nsamples=5, seqlen=16
)


@pytest.fixture
def result(llama, tokenizer, tmp_path):
    return compare(llama, tokenizer, CONFIG, "random llama", tmp_path, progress=False)


def test_one_row_a_run_after_the_dense_one(result):
    runs = result.runs
    assert list(runs.method) == ["dense"] + 2 * ["magnitude", "wanda", "sparsegpt"]
    assert list(runs.pattern) == [""] + 3 * ["50%"] + 3 * ["2:4"]
    assert runs.ratio[0] == 1
    assert (runs.ratio * runs.perplexity[0]).tolist() == pytest.approx(runs.perplexity.tolist())
    assert (runs.sparsity[1:] == 0.5).all()
    assert (runs.stderr > 0).all()
    assert runs.seconds[0] != runs.seconds[0], "the dense model was not pruned"
    assert (runs.seconds[1:] > 0).all()
    assert (runs.peak_memory_mb[1:] >= 0).all()


def test_the_model_is_dense_again_and_numbers_are_those_of_single_runs(result, llama, tokenizer):
    calib = sparselab.calibration_tokens(tokenizer, TEXTS, 6, 16)
    held_out = sparselab.evaluation_tokens(tokenizer, TEXTS[:20], 5, 16)
    assert float(sparselab.perplexity(llama, held_out)) == result.runs.perplexity[0]
    dense = {name: read_weight(linear).clone() for name, linear in sparselab.models.Decoder(llama).linears().items()}
    statistics = sparselab.collect(llama, held_out, progress=False)
    sparselab.prune(llama, calib, "sparsegpt", "2:4", progress=False)
    assert float(sparselab.perplexity(llama, held_out)) == result.runs.perplexity.iloc[-1]
    layers = result.layers.query("method == 'sparsegpt' and pattern == '2:4'")
    for row, (name, weight) in zip(layers.itertuples(), dense.items(), strict=True):
        pruned = read_weight(llama.get_submodule(name))
        assert row.relative_error == relative_error(weight, pruned, statistics[name].hessian)
    assert result.runs.relative_error.iloc[-1] == pytest.approx(layers.relative_error.mean())


def test_the_tables_are_written_after_every_run(llama, tokenizer, tmp_path, monkeypatch):
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return sparselab.prune(*args, **kwargs)

    before = {name: value.clone() for name, value in llama.state_dict().items()}
    monkeypatch.setattr("sparselab.experiment.prune", failing)
    with pytest.raises(RuntimeError, match="out of luck"):
        compare(llama, tokenizer, CONFIG, "m", tmp_path, progress=False)
    assert list(pd.read_csv(tmp_path / "runs.csv").method) == ["dense", "magnitude", "wanda"]
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


def test_what_is_written_can_be_read_back(result, tmp_path):
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "runs.csv").fillna({"pattern": ""}), result.runs)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "layers.csv"), result.layers)
    header, rule, *rows = (tmp_path / "runs.md").read_text().splitlines()
    assert header.startswith("| method | pattern | sparsity | perplexity | ratio | relative error |")
    assert rule.count("---") == header.count("|") - 1
    assert len(rows) == len(result.runs)
    assert f"| 50% | 50.00% | {result.runs.perplexity[1]:.2f} ± " in rows[1]
    assert json.loads((tmp_path / "sparselab.json").read_text())["settings"]["model"] == "random llama"


def test_caption_states_model_tokens_and_seed(result):
    assert result.caption == (
        "random llama; calibrated on 6 × 16 tokens of 60 given texts (seed 0), "
        "evaluated on 5 × 16 tokens of 20 given texts"
    )


def test_estimate_is_positive_and_grows_with_the_work(llama):
    little = estimate_seconds(llama, CompareConfig(nsamples=1, eval_nsamples=1, seqlen=16))
    much = estimate_seconds(llama, CompareConfig(nsamples=1000, eval_nsamples=1000, seqlen=16))
    assert 0 < 20 * little < much


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ("obc",)}, "method: expected one of magnitude, wanda, sparsegpt, received 'obc'"),
        ({"methods": ()}, "expected at least one of each, received none"),
        ({"sparsities": ()}, "expected at least one of each"),
        ({"sparsities": ("5:4",)}, "5:4"),
        ({"dataset": "same.txt", "eval_dataset": "same.txt"}, "would both read same.txt"),
    ],
)
def test_bad_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        CompareConfig(**arguments)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name", ["methods", "sparsities"])
def test_one_word_is_not_several(name):
    with pytest.raises(TypeError, match=f"{name}: expected several in a tuple, received 'wanda'"):
        CompareConfig(**{name: "wanda"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsities": ("50%", "2:3")}, "pattern 2:3: M must divide d_in"),
        ({"nsamples": 10**6}, "expected at most the .* windows"),
        ({"dataset": "nowhere.txt"}, "nowhere.txt"),
        ({"seed": -1}, "seed"),
        ({"seqlen": 65}, "64 positions"),
    ],
)
def test_what_can_be_known_is_checked_before_the_first_run(llama, tokenizer, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("sparselab.experiment.Workbench.run", lambda *_: pytest.fail("a run was begun"))
    with pytest.raises(ValueError, match=message):
        compare(llama, tokenizer, replace(CONFIG, **changes), "m", tmp_path, progress=False)
    with pytest.raises(ValueError, match="out: expected an existing folder"):
        compare(llama, tokenizer, CONFIG, "m", tmp_path / "none", progress=False)
    assert list(tmp_path.iterdir()) == []
