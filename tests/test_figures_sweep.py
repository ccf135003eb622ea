import numpy as np
import pandas as pd
import pytest

from sparselab.figures import png
from sparselab.figures.sweep import Frame, factor_maps, sweep_step, sweep_strip


def frames(rows=3, columns=6, group=3) -> list[Frame]:
    draw = np.random.default_rng(0)
    made = []
    for q in range(columns):
        start = q // group * group
        lost = np.zeros((rows, columns), dtype=bool)
        lost[0, : start + group] = True
        done = np.arange(columns) <= q
        scores, change = draw.random((rows, group)) + 0.1, draw.normal(size=(rows, columns)) * ~done
        made.append(Frame(q, start, draw.normal(size=(rows, columns)), lost & done, lost & ~done, scores, change))
    return made


def errors(columns=6) -> pd.DataFrame:
    column = np.arange(columns)
    return pd.DataFrame({"column": column, "sweep": 0.02 * column, "optimum": 0.01 * column})


def panels(figure):
    return {ax.get_title(loc="left")[:1]: ax for ax in figure.axes if ax.get_title(loc="left")}


def marked(ax, marker):
    """Cells (column, row) that carry a marker."""
    lines = [line for line in ax.get_lines() if line.get_marker() == marker]
    return {tuple(cell) for line in lines for cell in line.get_xydata().astype(int).tolist()}


def outlines(ax):
    return {(patch.get_x() + 0.5, patch.get_width()) for patch in ax.patches if not patch.get_fill()}


@pytest.mark.parametrize("q", [0, 4, 5])
def test_a_step_shows_its_frame(q):
    all_frames = frames()
    frame = all_frames[q]
    figure = sweep_step(all_frames, q, errors(), "a caption")
    scores, moved, weights, error = (panels(figure)[number] for number in "1234")

    shown = scores.images[0].get_array()
    assert np.ma.getmaskarray(shown).all(axis=0).tolist() == [not frame.start <= j < frame.start + 3 for j in range(6)]
    np.testing.assert_array_equal(shown[:, frame.start : frame.start + 3], frame.scores)
    np.testing.assert_array_equal(weights.images[0].get_array(), frame.weight)
    shown = moved.images[0].get_array()
    assert np.ma.getmaskarray(shown).all(axis=0).tolist() == [j <= q for j in range(6)], "columns done do not move"
    np.testing.assert_array_equal(shown[:, q + 1 :], frame.compensation[:, q + 1 :])

    assert outlines(weights) == outlines(moved) == {(q, 1)}
    assert outlines(scores) == {(q, 1), (frame.start, 3)}
    assert marked(weights, "x") == {(j, 0) for j in range(q + 1)}
    assert marked(weights, "o") == {(j, 0) for j in range(q + 1, frame.start + 3)}
    assert marked(scores, "x") == {(j, 0) for j in range(frame.start, q + 1)}
    assert marked(scores, "o") == marked(weights, "o")
    assert marked(moved, "x") == {(q, 0)}

    sweep, optimum, here = error.get_lines()
    assert sweep.get_ydata().tolist() == pytest.approx([0, 2, 4, 6, 8, 10])
    assert optimum.get_ydata().tolist() == pytest.approx([0, 1, 2, 3, 4, 5])
    assert list(here.get_xdata()) == [q, q]
    assert figure.get_supxlabel() == "a caption"
    assert len(png(figure)) > 5000


def test_colours_mean_the_same_in_every_step():
    first, second = (sweep_step(frames(), q, errors(), "") for q in (0, 5))
    for number in "123":
        limits = [panels(figure)[number].images[0].get_clim() for figure in (first, second)]
        assert limits[0] == limits[1]
    low, high = panels(first)["3"].images[0].get_clim()
    assert high == -low == max(np.abs(frame.weight).max() for frame in frames())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_nothing_to_see_still_draws(value):
    """No compensation, all scores equal or zero (dead inputs only)."""
    flat = np.full((2, 2), value)
    nothing = np.zeros((2, 2), dtype=bool)
    frame = Frame(0, 0, flat, nothing, nothing, flat, np.zeros((2, 2)))
    figure = sweep_step([frame], 0, errors(1), "")
    assert panels(figure)["2"].images[0].norm(0.0) == 0.5, "no change has the colour of zero"
    assert len(png(figure)) > 5000


def test_the_strip_shows_the_chosen_steps():
    figure = sweep_strip(frames(), [1, 4], "a caption")
    above = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in above] == ["column 1 done", "column 4 done"]
    for ax, q in zip(above, (1, 4), strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), frames()[q].weight)
        assert outlines(ax) == {(q, 1)}
    assert figure.get_supxlabel() == "a caption"
    assert len(png(figure)) > 5000


def test_factor_maps_show_the_factor_its_inverse_and_three_scores():
    draw = np.random.default_rng(1)
    V = np.triu(draw.normal(size=(5, 5))) + 3 * np.eye(5)
    H, upper = V @ V.T, np.triu(np.ones((5, 5), dtype=bool))
    figure = factor_maps(H, V, "a caption")
    drawn = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    np.testing.assert_array_equal(drawn[0], H)
    for shown, matrix in zip(drawn[1:], (V, np.linalg.inv(V)), strict=True):
        assert (np.ma.getmaskarray(shown) == ~upper).all()
        np.testing.assert_allclose(shown[upper], matrix[upper])
    wanda, sparsegpt, obs = next(ax for ax in figure.axes if ax.get_yscale() == "log").get_lines()
    np.testing.assert_allclose(wanda.get_ydata(), H.diagonal())
    np.testing.assert_allclose(sparsegpt.get_ydata(), [1 / np.linalg.inv(H[q:, q:])[0, 0] for q in range(5)])
    np.testing.assert_allclose(obs.get_ydata(), 1 / np.linalg.inv(H).diagonal())
    assert figure.get_supxlabel() == "a caption"
    assert len(png(figure)) > 5000


def test_nothing_is_left_in_pyplot():
    import matplotlib.pyplot as plt

    sweep_step(frames(), 0, errors(), "")
    assert plt.get_fignums() == []
