import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from sparselab.figures.seeds import calibration_and_heldout, curves, over_seeds

LEVEL = {"wanda": 20.0, "sparsegpt": 10.0}


def run(method="sparsegpt", pattern="50%", sparsity=0.5, seed=0, ppl=None, **changes):
    ppl = ppl or LEVEL[method] * (1 + sparsity) + (0, 1, 5)[seed]
    row = {
        "model": "m", "dataset": "stdlib", "eval_dataset": "stdlib", "seqlen": 64, "eval_nsamples": 8,
        "method": method, "pattern": pattern, "percdamp": 0.01, "blocksize": 128, "nsamples": 16, "seed": seed,
        "propagate": "pruned", "sparsity": sparsity, "perplexity": ppl,
        "relative_error": 0.01 + 0.001 * seed, "failure": "",
    }  # fmt: skip
    return row | changes


def failed(**changes):
    nothing = {"sparsity": np.nan, "perplexity": np.nan, "relative_error": np.nan, "failure": "layer 1: singular"}
    return run(**nothing | changes)


def sparsities():
    points = [("75%", 0.75), ("50%", 0.5), ("2:4", 0.5), ("4:8", 0.5)]
    return pd.DataFrame([run(method, *point, seed) for method in LEVEL for point in points for seed in (0, 1, 2)])


def line(figure, label):
    (found,) = [each for each in figure.axes[0].get_lines() if each.get_label() == label]
    return found.get_xydata().tolist()


def band(figure, number):
    """The lower and upper edge of a band, as {x: (low, high)}."""
    corners = figure.axes[0].collections[number].get_paths()[0].vertices
    return {x: (corners[corners[:, 0] == x, 1].min(), corners[corners[:, 0] == x, 1].max()) for x in set(corners[:, 0])}


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_a_line_is_the_mean_over_seeds_and_its_band_their_range():
    figure = curves(sparsities(), "sparsity", "a caption")
    assert line(figure, "sparsegpt") == [[50, 17], [75, 19.5]], "sorted by sparsity, N:M apart"
    assert line(figure, "wanda") == [[50, 32], [75, 37]]
    # N:M bars are collections too: the bands are those with a face
    bands = [number for number, each in enumerate(figure.axes[0].collections) if len(each.get_facecolor())]
    assert band(figure, bands[1]) == {50: (15, 20), 75: (17.5, 22.5)}
    assert figure.get_supxlabel() == "a caption"


def test_patterns_stand_apart_with_names_and_bars():
    figure = curves(sparsities(), "sparsity", "")
    assert texts(figure) == ["4:8", "2:4"], "each name once, beside its highest marker"
    assert [text.get_horizontalalignment() for text in figure.axes[0].texts] == ["left", "right"]
    bars = [container for container in figure.axes[0].containers if container.has_yerr]
    assert [bar.lines[0].get_xydata().tolist() for bar in bars] == [[[50, 32]]] * 2 + [[[50, 17]]] * 2
    assert {bar.lines[0].get_markerfacecolor() for bar in bars} == {"white"}
    assert bars[-1].lines[2][0].get_segments()[0].tolist() == [[50, 15], [50, 20]]


def test_patterns_along_another_setting_are_lines():
    runs = pd.DataFrame([run(pattern="2:4", nsamples=n) for n in (16, 4, 8)])
    figure = curves(runs, "nsamples", "")
    assert [x for x, _ in line(figure, "sparsegpt")] == [4, 8, 16]
    assert not figure.axes[0].containers


@pytest.mark.parametrize("drawn", [True, False])
def test_the_dense_model_is_a_line_if_it_is_given(drawn):
    figure = curves(sparsities(), "sparsity", "", dense=8.0 if drawn else None)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["dense (8.00)"] * drawn + ["wanda", "sparsegpt"]
    if drawn:
        assert {y for _, y in line(figure, "dense (8.00)")} == {8}


def test_failures_are_marked_on_the_top_edge_and_left_out_of_the_mean():
    rows = [run(percdamp=0.01, seed=seed) for seed in (0, 1)] + [run(percdamp=0.001, seed=0)]
    rows += [failed(percdamp=0.001, seed=1), failed(percdamp=0.0, seed=0), failed(percdamp=0.0, seed=1)]
    figure = curves(pd.DataFrame(rows), "percdamp", "")
    ax = figure.axes[0]
    crosses = [
        each.get_xydata().tolist() for each in ax.get_lines() if each.get_marker() == "x" and len(each.get_xdata())
    ]
    assert crosses == [[[0, 1]], [[0.001, 1]]]
    assert texts(figure) == ["failed", "1 of 2 failed"]
    assert [each for each in line(figure, "sparsegpt") if each[1] == each[1]] == [[0.001, 15], [0.01, 15.5]]
    assert "failed" in [text.get_text() for text in ax.get_legend().get_texts()]
    assert ax.get_xscale() == "symlog", "0 has a place"


def test_a_failed_pattern_stands_where_it_was_asked_to_be():
    table = over_seeds(pd.DataFrame([run(), failed(pattern="60%"), failed(pattern="1:4")]), "sparsity")
    assert table["at"].tolist() == [50, 60, 75]
    assert table.failed.tolist() == [0, 1, 1]
    assert table["mean"].isna().tolist() == [False, True, True]


def test_nothing_but_failures_can_be_drawn(tmp_path):
    figure = curves(pd.DataFrame([failed(percdamp=p) for p in (0.0, 0.01)]), "percdamp", "")
    figure.savefig(tmp_path / "f.png")
    assert texts(figure) == ["failed", "failed"]


def test_the_numbers_as_a_table():
    table = over_seeds(sparsities(), "sparsity")
    assert table.columns.tolist() == ["method", "pattern", "at", "seeds", "failed", "mean", "min", "max"]
    assert table.method.tolist() == ["wanda"] * 4 + ["sparsegpt"] * 4, "as in the runs"
    assert table.iloc[-1].tolist() == ["sparsegpt", "75%", 75, 3, 0, 19.5, 17.5, 22.5]
    by_windows = over_seeds(pd.DataFrame([run(nsamples=n, seed=s) for n in (8, 4) for s in (0, 1)]), "nsamples")
    assert by_windows[["nsamples", "at", "seeds", "mean"]].to_numpy().tolist() == [[4, 4, 2, 15.5], [8, 8, 2, 15.5]]


def test_relative_error_can_be_drawn():
    figure = curves(sparsities(), "sparsity", "", y="relative_error")
    assert [y for _, y in line(figure, "wanda")] == pytest.approx([0.011, 0.011])
    assert figure.axes[0].get_ylabel().startswith("relative layer error")


@pytest.mark.parametrize(("high", "scale"), [(19.0, "linear"), (40.0, "log"), (5000.0, "log")])
def test_the_scale_follows_the_range(high, scale):
    figure = curves(pd.DataFrame([run(ppl=10.0), run("sparsegpt", "70%", 0.7, ppl=high)]), "sparsity", "")
    ax = figure.axes[0]
    assert ax.get_yscale() == scale
    assert ax.get_ylabel().endswith("(log scale)") == (scale == "log")
    assert sum(10.0 <= tick <= high for tick in ax.get_yticks()) >= 3


def test_ticks_stand_at_the_values():
    figure = curves(pd.DataFrame([run(percdamp=p) for p in (0.1, 0.001, 0.02)]), "percdamp", "")
    assert figure.axes[0].get_xticks().tolist() == [0.001, 0.02, 0.1]
    assert figure.axes[0].get_xscale() == "log"


@pytest.mark.parametrize(
    ("runs", "x", "y", "message"),
    [
        ([run()], "seed", "perplexity", "x: expected one of sparsity, percdamp, nsamples, received 'seed'"),
        (
            [run()],
            "sparsity",
            "seconds",
            "y: expected one of perplexity, relative_error, calibration_error, heldout_error, received 'seconds'",
        ),
        ([], "sparsity", "perplexity", "runs: expected a row a run, received none"),
        ([run(), run(percdamp=0.1)], "sparsity", "perplexity", "one percdamp along sparsity, received 0.01, 0.1"),
        ([run(), run(pattern="2:4")], "nsamples", "perplexity", "one pattern along nsamples, received 50%, 2:4"),
        ([run(), run("wanda", seqlen=8)], "sparsity", "perplexity", "one seqlen along sparsity, received 64, 8"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_compared_is_refused(runs, x, y, message):
    with pytest.raises(ValueError, match=message):
        curves(pd.DataFrame(runs), x, "", y)


def test_methods_may_differ_in_settings_of_their_own():
    figure = curves(pd.DataFrame([run(blocksize=64), run("wanda", blocksize=128)]), "sparsity", "")
    assert line(figure, "wanda") == [[50, 30]]


def test_nothing_is_left_in_pyplot():
    curves(sparsities(), "sparsity", "")
    assert plt.get_fignums() == []


def asked() -> pd.DataFrame:
    rows = [
        {"layer": "l", "method": "sparsegpt", "pattern": "60%", "percdamp": percdamp, "nsamples": 4, "blocksize": 128}
        | {"seed": seed, "failure": "" if percdamp else "singular", "calibration_error": error}
        for percdamp, error in ((0.0, None), (0.01, 0.1), (0.1, 0.2))
        for seed in (0, 1)
    ]
    table = pd.DataFrame(rows).astype({"calibration_error": float})
    return table.assign(heldout_error=3 * table.calibration_error)


def test_calibration_and_heldout_error_stand_side_by_side_on_one_scale():
    figure = calibration_and_heldout(asked(), "percdamp", "a caption")
    left, right = figure.axes
    assert left.get_title() == "on calibration tokens"
    assert left.get_ylim() == right.get_ylim()
    for ax, factor in ((left, 1), (right, 3)):
        line = next(line for line in ax.get_lines() if line.get_label() == "sparsegpt")
        drawn = {x: y for x, y in line.get_xydata().tolist() if y == y}
        assert drawn == pytest.approx({0.01: 0.1 * factor, 0.1: 0.2 * factor})
        assert "failed" in {text.get_text() for text in ax.texts}
    assert figure.get_supxlabel() == "a caption"
