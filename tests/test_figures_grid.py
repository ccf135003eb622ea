import pandas as pd
import pytest
from conftest import TEXTS

from sparselab.analysis import LayerStudy, Question, mask_update_grid
from sparselab.experiment import TextConfig
from sparselab.figures import grid as figures
from sparselab.figures import png

LAYERS = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"]


@pytest.fixture
def studies(llama, tokenizer):
    text = TextConfig(dataset=TEXTS, eval_dataset=TEXTS[:20], seqlen=16, eval_nsamples=5)
    return [LayerStudy(llama, tokenizer, "m", text, (4, 8), seed, progress=False) for seed in (0, 1)]


def test_the_grid_is_single_answers_set_beside_the_optimum_of_their_mask(studies):
    grid = mask_update_grid(studies, LAYERS, "50%", ("wanda", "admm"), ("none", "cg", "exact"), progress=False)
    assert len(grid) == 2 * 2 * 2 * 3
    for row in grid.itertuples():
        study = studies[row.seed]
        answer = study.ask(Question(row.layer, f"{row.mask}+{row.update}", "50%", nsamples=8))
        exact = study.ask(Question(row.layer, f"{row.mask}+exact", "50%", nsamples=8))
        assert (row.calibration_error, row.heldout_error) == (answer.calibration_error, answer.heldout_error)
        assert row.gap == answer.calibration_error / exact.calibration_error
    assert (grid.gap[grid["update"] == "exact"] == 1).all()
    assert (grid.gap[grid["update"] == "none"] > 1).all()


def test_the_table_has_a_row_a_mask_and_the_figure_a_line_an_update(studies):
    grid = mask_update_grid(studies[:1], LAYERS[:1], "50%", ("wanda", "ria"), ("none", "exact"), progress=False)
    table = figures.mask_update_table(grid, "gap")
    assert list(table.index) == ["wanda", "ria"]
    assert list(table.columns) == ["none", "exact"]
    assert (table["exact"] == 1).all()
    figure = figures.mask_update_grid(grid, "caption")
    left, right = figure.axes
    for ax, value in ((left, "calibration_error"), (right, "heldout_error")):
        drawn = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
        expected = figures.mask_update_table(grid, value)
        assert drawn == {"none": list(expected["none"]), "exact optimum": list(expected["exact"])}
    assert png(figure).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="expected rows of mask_update_grid, received none"):
        figures.mask_update_grid(pd.DataFrame(), "")
