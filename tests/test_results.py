import json

import pandas as pd
import pytest

from sparselab.experiment import RESULT
from sparselab.parameters import ParameterError
from sparselab.results import panels, read_sweep


def row(method="sparsegpt", pattern="50%", seed=0, **changes):
    settings = {"percdamp": 0.01, "blocksize": 128, "nsamples": 16, "propagate": "pruned", "failure": ""}
    measured = {
        "sparsity": 0.5, "perplexity": 12.0, "stderr": 1.0, "ratio": 1.5, "relative_error": 0.1, "seconds": 1.0,
        "peak_memory_mb": 1.0,
    }  # fmt: skip
    return {"method": method, "pattern": pattern, "seed": seed} | settings | measured | changes


FAILED = dict.fromkeys(("sparsity", "perplexity", "ratio")) | {"failure": "layer 1: singular; raise percdamp"}


@pytest.fixture
def keep(tmp_path):
    """Writes results as a workbench does, and gives the folder."""

    def kept(*rows, **text):
        for each in rows:
            about = {"dataset": "stdlib", "eval_dataset": "stdlib", "seqlen": 64, "eval_nsamples": 8} | text
            path = tmp_path / f"{len(list(tmp_path.iterdir()))}" / RESULT
            path.parent.mkdir()
            known = {name: value for name, value in each.items() if value is not None}
            path.write_text(json.dumps({"model": "m", "text": about, "row": known, "layers": []}), encoding="utf-8")
        return tmp_path

    return kept


def test_results_are_read_sorted_and_chosen(keep):
    folder = keep(row("sparsegpt", "60%"), row("sparsegpt", "50%", 1), row("sparsegpt", "50%"), row("magnitude"))
    table = read_sweep(folder)
    assert table[["method", "pattern", "seed"]].to_numpy().tolist() == [
        ["magnitude", "50%", 0], ["sparsegpt", "50%", 0], ["sparsegpt", "50%", 1], ["sparsegpt", "60%", 0],
    ]  # fmt: skip
    assert read_sweep(folder, 'pattern == "60%"').method.tolist() == ["sparsegpt"]


def test_a_sweep_of_failures_has_all_columns(keep):
    table = read_sweep(keep(row(**FAILED)))
    assert table.perplexity.isna().tolist() == [True]
    assert panels(table, "percdamp") == []


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("seed > 3", "^where: expected a filter that leaves results, received 'seed > 3', which leaves none$"),
        ("sed > 3", "^where: expected a pandas query on model, .*; received 'sed > 3' \\(name 'sed' is not defined\\)"),
        ("seed >", "^where: expected a pandas query on model, .*; received 'seed >' \\(.*\\)$"),
    ],
)
def test_bad_filters(keep, where, message):
    with pytest.raises(ParameterError, match=message) as caught:
        read_sweep(keep(row()), where)
    assert len(str(caught.value).splitlines()) == 1


def test_no_results_are_named(tmp_path):
    with pytest.raises(ParameterError, match=r"^folder: .*: expected results of runs .*, found none"):
        read_sweep(tmp_path)


def test_a_panel_is_what_varies_in_one_setting(keep):
    swept = [row(pattern=pattern, seed=seed) for pattern in ("50%", "60%") for seed in (0, 1)]
    damped = [row(pattern="60%", percdamp=0.1), row(pattern="60%", percdamp=0.0, **FAILED)]
    keep(*swept, *damped)
    results = read_sweep(keep(row(pattern="70%"), seqlen=32))
    (panel,) = panels(results, "sparsity")
    assert panel.runs[["pattern", "seed"]].to_numpy().tolist() == [["50%", 0], ["50%", 1], ["60%", 0], ["60%", 1]]
    assert panel.dense == 8
    assert panel.caption == (
        "percdamp 0.01; m; calibrated on 16 × 64 tokens of stdlib (seeds 0, 1), evaluated on 8 × 64 tokens of stdlib"
    )
    (panel,) = panels(results, "percdamp")
    assert panel.runs.percdamp.tolist() == [0.0, 0.01, 0.01, 0.1]
    assert panel.caption.startswith("60% (realised 50.00%); m; calibrated on 16 × 64 tokens")
    assert panels(results, "nsamples") == []
    (panel,) = panels(pd.concat([results, results.assign(nsamples=4)]).query('pattern == "50%"'), "nsamples")
    assert "calibrated on 4–16 × 64 tokens" in panel.caption
    assert panel.caption.startswith("50% (realised 50.00%); percdamp 0.01; m;")
