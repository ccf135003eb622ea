import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import TEXTS

import sparselab
from sparselab.comparison import CompareConfig, Comparison, as_text, compare, estimate_seconds
from sparselab.experiment import RunConfig, Workbench
from sparselab.models.blocks import read_weight
from sparselab.solvers import relative_error
from sparselab.uncertainty import pooled

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


def test_differences_are_to_the_baseline_at_the_same_pattern(result, llama, tokenizer):
    bench = Workbench(llama, tokenizer, "random llama", CONFIG)
    own = result.runs[result.runs.method.isin(["dense", "sparsegpt"])]
    assert own[["difference", "difference_half_width"]].isna().all(axis=None)
    for row in result.runs[result.runs.method.isin(["magnitude", "wanda"])].itertuples():
        runs = [RunConfig(method, row.pattern, nsamples=6) for method in (row.method, "sparsegpt")]
        found = bench.difference(*runs)
        assert (row.difference, row.difference_half_width) == (found.mean, found.half_width)
        beside = result.runs.query("method == 'sparsegpt' and pattern == @row.pattern").iloc[0]
        assert row.difference == pytest.approx(math.log(row.perplexity / beside.perplexity))
        assert row.optimality_gap == bench.run(runs[0]).row["optimality_gap"] > 1


def test_several_seeds_are_one_row_and_the_first_method_is_the_baseline_without_sparsegpt(llama, tokenizer, tmp_path):
    config = replace(CONFIG, methods=("wanda", "magnitude"), sparsities=("50%",), seeds=(2, 0, 1))
    result = compare(llama, tokenizer, config, "m", tmp_path, progress=False)
    bench = Workbench(llama, tokenizer, "m", config)
    runs = [RunConfig("wanda", "50%", nsamples=6, seed=seed) for seed in (2, 0, 1)]
    rows = pd.DataFrame([bench.run(run).row for run in runs])
    _, wanda, magnitude = result.runs.itertuples()
    assert wanda.perplexity == pytest.approx(math.exp(rows.perplexity.map(math.log).mean()))
    assert (wanda.perplexity, wanda.stderr) == pooled([bench.perplexity(run) for run in runs])
    assert wanda.stderr > rows.stderr.min() / 2
    assert wanda.ratio == pytest.approx(wanda.perplexity / result.runs.perplexity[0])
    for name in ("relative_error", "optimality_gap", "sparsity"):
        assert getattr(wanda, name) == pytest.approx(rows[name].mean())
    other = RunConfig("magnitude", "50%", nsamples=6, seed=2)
    found = bench.difference(other, runs[0], (2, 0, 1))
    assert (magnitude.difference, magnitude.difference_half_width) == (found.mean, found.half_width)
    seeds = result.layers.groupby("method").seed.unique()
    assert (seeds["wanda"].tolist(), seeds["magnitude"].tolist()) == ([2, 0, 1], [2]), "which reads no text"
    assert len(config.runs()) == 4
    assert json.loads((tmp_path / "sparselab.json").read_text())["settings"]["seed"] == [2, 0, 1]


def test_a_row_stands_when_all_its_seeds_are_done(llama, tokenizer, tmp_path, monkeypatch):
    tables, run = [], Workbench.run
    config = replace(CONFIG, methods=("wanda", "sparsegpt"), sparsities=("50%",), seeds=(0, 1))

    def watched(bench, config, *rest):
        if bench.finished(config) is None and (tmp_path / "runs.csv").exists():
            tables.append(pd.read_csv(tmp_path / "runs.csv"))
        return run(bench, config, *rest)

    monkeypatch.setattr(Workbench, "run", watched)
    final = compare(llama, tokenizer, config, "m", tmp_path, progress=False).runs
    assert [list(table.method) for table in tables] == [["dense"], ["dense", "wanda"], ["dense", "wanda"]]
    assert math.isnan(tables[-1].difference[1]), "there is nothing to compare it with yet"
    assert final.difference[1] == final.difference[1]


def test_numbers_that_say_nothing_are_put_into_words():
    pairs = [(math.nan, math.nan), (-0.13614, 0.0049), (0.001, 0.002), (0.0021, 0.002), (0.3, math.nan)]
    runs = pd.DataFrame(pairs, columns=["difference", "difference_half_width"])
    numbers = ["sparsity", "perplexity", "stderr", "ratio", "relative_error", "optimality_gap", "seconds"]
    text = as_text(runs.assign(**dict.fromkeys(numbers, 1.234), peak_memory_mb=math.nan))
    assert text.difference.tolist() == [
        "", "−0.1361 ± 0.0049", "not distinguishable", "0.0021 ± 0.0020", "not distinguishable"
    ]  # fmt: skip
    assert (text.gap == "1.23").all()
    assert (text.peak_memory_mb == "").all()


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
    assert header.strip("| ").split(" | ") == [
        "method", "pattern", "sparsity", "perplexity", "ratio", "difference", "relative error", "gap", "seconds",
        "peak memory mb",
    ]  # fmt: skip
    assert rule.count("---") == header.count("|") - 1
    assert len(rows) == len(result.runs)
    assert f"| 50% | 50.00% | {result.runs.perplexity[1]:.2f} ± " in rows[1]
    assert json.loads((tmp_path / "sparselab.json").read_text())["settings"]["model"] == "random llama"


def test_caption_states_model_tokens_and_seed(result):
    assert result.caption == (
        "random llama; calibrated on 6 × 16 tokens of 60 given texts (seed 0), "
        "evaluated on 5 × 16 tokens of 20 given texts; perplexity ± standard error over windows; "
        "difference: log perplexity minus sparsegpt's, ± half of its 95% interval"
    )
    assert result.caption.startswith(f"{result.about_perplexity}; difference: ")
    assert result.about_perplexity.startswith(f"{result.about}; perplexity ± ")
    several = Comparison(replace(CONFIG, seeds=(0, 3), methods=("magnitude", "wanda")), "m").caption
    assert "(seeds 0, 3)" in several
    assert "standard error over windows and seeds; difference: log perplexity minus magnitude's" in several
    assert "difference" not in Comparison(replace(CONFIG, methods=("wanda",)), "m").caption


def test_estimate_is_positive_and_grows_with_the_work(llama):
    little = estimate_seconds(llama, CompareConfig(nsamples=1, eval_nsamples=1, seqlen=16))
    much = estimate_seconds(llama, CompareConfig(nsamples=1000, eval_nsamples=1000, seqlen=16))
    assert 0 < 20 * little < much


@pytest.mark.parametrize("method", ["ria", "wanda+cg", "magnitude+none"])
def test_methods_that_nobody_has_timed_can_be_estimated(llama, method):
    config = CompareConfig(methods=(method,), sparsities=("50%",), nsamples=1, eval_nsamples=1, seqlen=16)
    assert estimate_seconds(llama, config) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ("obc",)}, "method: expected one of magnitude, wanda, .*, received 'obc'"),
        ({"methods": ()}, "expected at least one of each, received none"),
        ({"sparsities": ()}, "expected at least one of each"),
        ({"sparsities": ("5:4",)}, "5:4"),
        ({"seeds": ()}, "expected at least one of each"),
        ({"seeds": (1, 0, 1)}, "seeds: expected different ones, received 1, 0, 1"),
        ({"seeds": (0, -1)}, "seed: expected at least 0, received -1"),
        ({"dataset": "same.txt", "eval_dataset": "same.txt"}, "would both read same.txt"),
    ],
)
def test_bad_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        CompareConfig(**arguments)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name", ["methods", "sparsities", "seeds"])
def test_one_word_is_not_several(name):
    with pytest.raises(TypeError, match=f"{name}: expected several in a tuple, received 'wanda'"):
        CompareConfig(**{name: "wanda"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsities": ("50%", "2:3")}, "pattern 2:3: M must divide d_in"),
        ({"nsamples": 10**6}, "lower nsamples or seqlen"),
        ({"dataset": "nowhere.txt"}, "nowhere.txt"),
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
