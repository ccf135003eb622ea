import pandas as pd
import pytest
from matplotlib.figure import Figure

from sparselab import figures
from sparselab.figures.style import method_style, standing_apart


def runs() -> pd.DataFrame:
    rows = [("dense", "", 0.0, 10.0, 0.2)]
    for method, factor in (("magnitude", 3), ("wanda", 2), ("sparsegpt", 1.5)):
        rows += [(method, "70%", 0.7, 20 * factor, 0.3), (method, "50%", 0.5, 10 * factor, 0.2)]
        rows += [(method, "2:4", 0.5, 12 * factor, 0.2)]
    return pd.DataFrame(rows, columns=["method", "pattern", "sparsity", "perplexity", "stderr"])


def layers() -> pd.DataFrame:
    rows = [
        (method, pattern, block, layer, 0.5, 0.01 * (block + 1))
        for method in ("wanda", "sparsegpt")
        for pattern in ("50%", "2:4")
        for block in range(4)
        for layer in ("self_attn.q_proj", "mlp.up_proj")
    ]
    return pd.DataFrame(rows, columns=["method", "pattern", "block", "layer", "sparsity", "relative_error"])


def test_perplexity_figure_draws_the_table(tmp_path):
    figure = figures.sparsity_perplexity(runs(), "a caption")
    (ax,) = figure.axes
    assert ax.get_yscale() == "log"
    drawn = {container.get_label(): container.lines[0].get_xydata().tolist() for container in ax.containers}
    assert drawn["sparsegpt"] == [[50, 15], [70, 30]], "sorted by sparsity, N:M apart"
    assert ax.get_legend() is not None
    assert figure.get_supxlabel() == "a caption"
    figure.savefig(tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 5000


def test_layer_figure_has_a_panel_a_method_and_a_line_a_projection():
    figure = figures.layer_errors(layers(), "50%", "a caption")
    assert isinstance(figure, Figure)
    assert [ax.get_title() for ax in figure.axes] == ["wanda", "sparsegpt"]
    for ax in figure.axes:
        assert [line.get_label() for line in ax.get_lines()] == ["q_proj", "up_proj"]
        assert ax.get_lines()[0].get_ydata().tolist() == pytest.approx([0.01, 0.02, 0.03, 0.04])
        looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in ax.get_lines()}
        assert len(looks) == 2
    assert figure.get_supxlabel() == "50% (realised 50.00%); a caption"
    with pytest.raises(ValueError, match="expected one of 50%, 2:4, received '60%'"):
        figures.layer_errors(layers(), "60%", "")


def test_layer_errors_of_several_seeds_are_averaged():
    both = pd.concat(
        [layers().assign(seed=0), layers().assign(seed=1, relative_error=lambda row: 3 * row.relative_error)]
    )
    for ax in figures.layer_errors(both, "50%", "").axes:
        assert [line.get_label() for line in ax.get_lines()] == ["q_proj", "up_proj"]
        assert ax.get_lines()[0].get_xydata().tolist() == [pytest.approx([b, 0.02 * (b + 1)]) for b in range(4)]


UPDATED = [
    method + update
    for method in ("magnitude", "wanda", "sparsegpt", "ria", "admm")
    for update in ("", "+none", "+sweep", "+cg", "+exact")
]


@pytest.mark.parametrize(
    "told_by",
    [
        ("color", "linestyle"),  # lines without markers
        ("marker", "linestyle"),  # seen without colours
        ("marker", "fillstyle"),  # N:M: markers without lines
    ],
)
def test_methods_and_updates_can_be_told_apart(told_by):
    looks = {tuple(method_style(method).get(part) for part in told_by) for method in [*UPDATED, "unknown"]}
    assert len(looks) == len(UPDATED) + 1


def test_styles_stay_what_they_are_and_can_be_drawn(tmp_path):
    looks = [tuple(method_style(name)[part] for part in ("marker", "linestyle")) for name in UPDATED[::5]]
    assert looks[:4] == [("o", "-"), ("s", "--"), ("^", "-."), ("D", ":")]
    assert method_style("mine") == method_style("yours") != method_style("admm")
    table = pd.concat([runs()[:1], *(runs()[1:4].assign(method=name) for name in UPDATED)])
    figure = figures.sparsity_perplexity(table, "")
    figure.savefig(tmp_path / "f.png")  # warnings are errors
    assert len(figure.axes[0].get_legend().get_texts()) == 26
    assert standing_apart(method_style("wanda"))["markerfacecolor"] == "white"
    assert "markerfacecolor" not in standing_apart(method_style("wanda+cg"))


@pytest.mark.parametrize("errors", [0.0, float("nan")])
def test_layers_without_any_error_need_no_log_scale(errors, tmp_path):
    figure = figures.layer_errors(layers().assign(relative_error=errors), "50%", "")
    figure.savefig(tmp_path / "f.png")  # warnings are errors
    assert [ax.get_yscale() for ax in figure.axes] == ["linear", "linear"]
    assert figure.axes[0].get_ylabel() == "relative layer error (linear scale)"
    assert figures.layer_errors(layers(), "50%", "").axes[0].get_ylabel() == "relative layer error (log scale)"


def test_nothing_is_left_in_pyplot():
    import matplotlib.pyplot as plt

    figures.sparsity_perplexity(runs(), "")
    assert plt.get_fignums() == []
