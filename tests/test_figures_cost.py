import pandas as pd
import pytest
import torch

from sparselab import cost
from sparselab.figures import png
from sparselab.figures.cost import method_costs, product_seconds, statistics_memory, stored_bytes
from sparselab.storage import storage_table


@pytest.fixture
def runs():
    rows = [("dense", 11.0, 0.4, None, None, None), ("magnitude", 16.0, 0.7, 0.052, 0.1, 15.0)]
    rows += [("wanda", 15.0, 0.6, 0.044, 5.0, 70.0), ("sparsegpt", 13.0, 0.5, 0.027, 7.0, 83.0)]
    return pd.DataFrame(rows, columns=["method", "perplexity", "stderr", "relative_error", "seconds", "peak_memory_mb"])


def times(csr):
    rows = []
    for tokens in (1, 16):
        for sparsity, seconds in zip((0.9, 0.0, 0.5), csr, strict=True):
            rows += [(tokens, sparsity, "dense", 0.002 * tokens), (tokens, sparsity, "CSR", seconds * tokens)]
    table = pd.DataFrame(rows, columns=["tokens", "sparsity", "form", "seconds"])
    return table.assign(fastest=table.seconds / 2, slowest=table.seconds * 3)


def test_method_costs_draws_the_table(runs):
    figure = method_costs(runs, "a caption")
    columns = ["perplexity", "relative_error", "seconds", "peak_memory_mb"]
    for ax, column in zip(figure.axes, columns, strict=True):
        assert [bar.get_height() for bar in ax.patches] == list(runs[column][1:])
        assert [label.get_text() for label in ax.get_xticklabels()] == ["magnitude", "wanda", "sparsegpt"]
        assert ax.get_ylim()[0] == 0
        assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in ax.patches}) == 3
    assert "dense 11.00" in figure.axes[0].get_title()
    bars = [group for group in figure.axes[0].containers if getattr(group, "has_yerr", False)]
    ends = [group.lines[2][0].get_segments()[0][:, 1].tolist() for group in bars]
    assert ends == [pytest.approx(pair) for pair in ([15.3, 16.7], [14.4, 15.6], [12.5, 13.5])]
    assert figure.get_supxlabel() == "a caption"
    assert len(png(figure)) > 5000


def test_statistics_memory_marks_every_width_on_both_lines():
    table = cost.statistics_table(cost.PUBLISHED)
    figure = statistics_memory(table, {"4 GB": 4e9}, "a caption")
    (ax,) = figure.axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    drawn = {tuple(point) for line in ax.get_lines() for point in line.get_xydata().tolist()}
    for width in {*table.hidden, *table.widest}:
        assert {(width, 4 * width**2), (width, 4 * width)} <= drawn
    markers = [line.get_marker() for line in ax.get_lines() if line.get_linestyle() == "None"][::2]
    assert len(set(markers)) == len(table)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "LLaMA-7B (d = 4096, 11008)" in labels
    assert [text.get_text() for text in ax.texts] == ["4 GB"]
    assert len(png(figure)) > 5000


@pytest.mark.parametrize(
    ("csr", "title"),
    [
        ((0.001, 0.008, 0.004), "1 token: CSR faster from 90% zeros"),
        ((0.003, 0.008, 0.004), "1 token: CSR never faster"),
    ],
)
def test_product_seconds_draws_medians_and_ranges(csr, title):
    figure = product_seconds(times(csr), "a caption")
    assert len(figure.axes) == 2
    ax = figure.axes[0]
    assert ax.get_title() == title
    assert figure.axes[1].get_title().startswith("16 tokens:")
    drawn = {container.get_label(): container for container in ax.containers}
    assert list(drawn) == ["dense", "CSR"]
    expected = [[0, 1000 * csr[1]], [50, 1000 * csr[2]], [90, 1000 * csr[0]]]
    assert drawn["CSR"].lines[0].get_xydata().tolist() == [pytest.approx(point) for point in expected]
    assert drawn["CSR"].lines[2][0].get_segments()[0][:, 1].tolist() == pytest.approx([500 * csr[1], 3000 * csr[1]])
    assert len(png(figure)) > 5000


def test_stored_bytes_has_a_panel_a_width_and_keeps_all_of_every_line():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    table = storage_table(weight, ["0%", "50%", "2:4", "90%"], [torch.float32, torch.bfloat16, torch.float16])
    figure = stored_bytes(table, "a caption")
    assert [ax.get_title() for ax in figure.axes] == ["float32", "bfloat16, float16"]
    for ax, dtype in zip(figure.axes, ("float32", "float16"), strict=True):
        lines = {line.get_label(): line.get_xydata() for line in ax.get_lines()}
        assert list(lines) == ["dense", "bitmask", "CSR", "2:4"]
        for form, points in lines.items():
            patterns = ["2:4"] if form == "2:4" else ["0%", "50%", "90%"]
            rows = table[(table.dtype == dtype) & (table.form == form) & table.pattern.isin(patterns)]
            assert points[:, 1].tolist() == rows.ratio.tolist()
            assert points[:, 0].tolist() == pytest.approx((100 * rows.sparsity).tolist())
        low, high = ax.get_ylim()
        assert low == 0
        assert high > table.ratio.max()
    assert len(png(figure)) > 5000
