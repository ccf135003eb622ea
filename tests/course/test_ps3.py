"""What the checks of problem set 3 say of the mistakes that students make, and of the tables they hand in."""

import hidden
import ps3_answers
import pytest
import torch

from sparselab.course import CheckError, ps3

WRONG_TABLES = {
    "table_wrong_one_seed": r"wanda has seeds \[0\], expected at least 3",
    "table_wrong_copied": "the same perplexity to the last digit: is it one run, copied",
    "table_wrong_made_up": r"has ratio 1.8\d+; run again it has",
    "table_wrong_better": "the dense perplexity and one number",
    "table_wrong_percent": "a fraction, not percent",
    "table_wrong_left_out": r"sparsegpt has seeds \[0, 1\], expected at least 3",
    "table_wrong_other_seeds": r"runs cannot be paired, seeds differ: wanda \[0, 1, 2\], sparsegpt \[3, 4, 5\]",
    "table_wrong_failed": "a run failed: model.layers.0: not positive definite",
    "table_wrong_twice": "is there 2 times",
    "table_wrong_other_sparsity": "run again it has",
    "table_wrong_methods_swapped": "run again it has",
    "table_wrong_other_windows": "expected eval_nsamples 16 in every run, received 400",
    "table_wrong_few_columns": "has no column model",
}
HANDED_IN = [name for name in vars(ps3_answers) if name.startswith("table_")]


@pytest.fixture
def hand_in(sweep, tmp_path):
    """Writes the table as one of the instructor's functions changes it."""

    def write(name):
        getattr(ps3_answers, name)(sweep.copy()).to_csv(tmp_path / "results.csv", index=False)
        return tmp_path / "results.csv"

    return write


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("interval__wrong_population", "divided by n − 1, not by n"),
        ("interval__wrong_normal", "1.96 is for very many values"),
        ("interval__wrong_no_root", "divide by √n"),
        ("interval__wrong_half_alone", "expected two numbers: mean and half width"),
        ("paired_difference__wrong_unpaired", "take differences first"),
        ("paired_difference__wrong_order", "match them by seed"),
        ("paired_difference__wrong_sign", "b minus a, not a minus b"),
        ("paired_difference__wrong_perplexity", "take the logarithms first"),
        ("paired_difference__wrong_unmatched", "cannot be paired"),
        ("paired_difference__wrong_in_place", "changes the table that it is given"),
        ("best_settings__wrong_lowest", "the lowest mean alone"),
        ("best_settings__wrong_one_seed", "the best of one seed"),
        ("best_settings__wrong_overlap", "intervals that overlap say little"),
        ("best_settings__wrong_pooled", "in each nsamples by itself"),
        ("best_settings__wrong_unsorted", "sort them"),
        ("allocate__wrong_uniform", "the same sparsity everywhere"),
        ("allocate__wrong_budget_missed", r"prunes 0\.\d+ of all weights"),
        ("allocate__wrong_sizes_ignored", r"\(cost added\) / \(weights added\)"),
        ("allocate__wrong_indices", r"expected one of \[0.5, 0.6, 0.7, 0.8, 0.9\]"),
        ("allocate__wrong_in_place", "changes its argument 1 in place"),
        ("costs__wrong_shape", r"a torch.float32 tensor \[5\], expected a tensor of numbers \[5, 3\]"),
    ],
)
def test_the_message_says_what_to_look_at(answer, message):
    exercise = answer.partition("__")[0]
    with pytest.raises(CheckError, match=message):
        getattr(ps3, exercise)(getattr(ps3_answers, answer))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("costs__wrong_errors", "each in units of its own layer's outputs"),
        ("costs__wrong_relative", "as if each layer mattered alike"),
        ("costs__wrong_times_relative", "the measured loss where it was measured"),
        ("costs__wrong_flat", "does not grow with the sparsity"),
    ],
)
def test_the_message_says_what_to_look_at_on_tiny(answer, message):
    with pytest.raises(CheckError, match=message):
        ps3.costs(getattr(ps3_answers, answer))


def test_no_drawing_of_costs_is_beyond_a_greedy_answer():
    for seed in range(20):
        ps3.allocate(ps3_answers.allocate__right_greedy, seed)


def test_tiny_is_dense_again_after_its_layers_were_pruned(bundled):
    from sparselab.course import tiny

    sizes = tiny.measured_layers(0).sizes
    dense, pruned = (torch.tensor(tiny._loss(0, (sparsity,) * len(sizes))) for sparsity in (0.0, 0.7))
    assert (pruned > dense).all()
    model, *_ = bundled
    for name, weight in model.state_dict().items():
        assert torch.equal(tiny._model().state_dict()[name], weight)


def test_no_table_is_not_written_yet(tmp_path):
    with pytest.raises(CheckError, match=r"^results is not written yet$"):
        ps3.results(tmp_path / "results.csv")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in HANDED_IN if "_right_" in name])
def test_a_true_table_is_accepted_in_any_form(hand_in, name):
    path = hand_in(name)
    for seed in range(6):
        assert ps3.results(path, seed).startswith("results: 6 runs")
    hidden.check("ps3", "results", path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "message"),
    WRONG_TABLES.items(),
)
def test_a_wrong_table_is_told_what_is_wrong(hand_in, name, message, seed):
    with pytest.raises(CheckError, match=message):
        ps3.results(hand_in(name), seed)


def test_every_table_is_tried():
    assert set(WRONG_TABLES) == {name for name in HANDED_IN if "_wrong_" in name}
