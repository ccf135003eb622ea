import math
import weakref

import pandas as pd
import pytest
import torch
from conftest import tiny_llama, tiny_opt
from matplotlib.figure import Figure

from sparselab import figures
from sparselab.errors import NonFiniteError, UnsupportedModelError
from sparselab.figures.inheritance import block_errors as drawn
from sparselab.inheritance import block_errors
from sparselab.models.blocks import Decoder
from sparselab.models.streamed import StreamedModel
from sparselab.pruning import prune

QUIET = {"progress": False}
PARTS = ["local", "inherited", "total"]


def passing(model, tokens, index, enters=None):
    """What enters and leaves a block in the model's own forward; `enters` takes the place of the former."""
    seen = {}

    def before(_, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        seen["in"] = hidden if enters is None else enters
        return ((seen["in"], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": seen["in"]})

    def after(_module, _args, output):
        seen["out"] = output[0] if isinstance(output, tuple) else output

    block = Decoder(model).blocks[index]
    hooks = [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return seen["in"], seen["out"]


def square(output, reference=None):
    return (output.double() - (0 if reference is None else reference.double())).square().sum()


def by_hand(dense, pruned, tokens):
    rows = []
    for index in range(3):
        x, fx = passing(dense, tokens, index)
        x_hat, total = passing(pruned, tokens, index)
        _, local = passing(pruned, tokens, index, x)
        _, inherited = passing(dense, tokens, index, x_hat)
        rows.append([index, *(float(square(out, fx) / square(fx)) for out in (local, inherited, total, x))])
    return pd.DataFrame(rows, columns=["block", "local", "inherited", "total", "added"])


@pytest.mark.parametrize("batch_size", [None, 3])
def test_equals_the_models_own_forward_with_inputs_exchanged(family, tokens, batch_size):
    dense, pruned = family().double(), family().double()
    prune(pruned, tokens, "magnitude", "60%", **QUIET)
    table = block_errors(dense, pruned, tokens, batch_size, **QUIET)
    pd.testing.assert_frame_equal(table, by_hand(dense, pruned, tokens), rtol=1e-9, atol=0)
    assert (table[PARTS] > 0).to_numpy().sum() == 8, "all but what the first block inherits"
    assert len({f"{value:.6g}" for value in table[PARTS].to_numpy().flatten()}) >= 8, "which are told apart"


def test_sums_are_float64_whatever_the_models_are(tokens):
    exact = by_hand(tiny_llama(), pruned_llama(tokens), tokens)
    single = block_errors(tiny_llama(), pruned_llama(tokens), tokens, len(tokens), **QUIET)
    pd.testing.assert_frame_equal(single, exact, rtol=1e-10, atol=0)


def test_models_of_different_precision_compare(tokens):
    exact = by_hand(tiny_llama(), pruned_llama(tokens), tokens)
    mixed = block_errors(tiny_llama(), pruned_llama(tokens).bfloat16(), tokens, **QUIET)
    pd.testing.assert_frame_equal(mixed, exact, rtol=0.2, atol=1e-4)


def pruned_llama(tokens):
    model = tiny_llama()
    prune(model, tokens, "wanda", "60%", **QUIET)
    return model


def test_only_the_pruned_block_has_an_error_of_its_own_and_the_first_inherits_none(llama, tokens):
    pruned = tiny_llama()
    with torch.no_grad():
        pruned.model.layers[1].mlp.up_proj.weight.zero_()
    table = block_errors(llama, pruned, tokens, **QUIET)
    assert list(table.local > 0) == [False, True, False]
    assert list(table.inherited > 0) == [False, False, True]
    assert list(table.total) == [0, table.local[1], table.inherited[2]]


def test_a_model_without_errors_and_without_outputs(llama, tokens):
    assert (block_errors(llama, llama, tokens, **QUIET)[PARTS] == 0).to_numpy().all()
    with torch.no_grad():
        llama.model.embed_tokens.weight.zero_()
    assert block_errors(llama, llama, tokens, **QUIET)[[*PARTS, "added"]].isna().to_numpy().all()


def test_embeddings_that_differ_are_inherited_by_the_first_block(llama, tokens):
    other = tiny_llama()
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.01)
    table = block_errors(llama, other, tokens, **QUIET)
    assert (table.local == 0).all()
    assert (table.inherited > 0).all()


def test_hidden_states_are_held_at_one_depth(llama, tokens, monkeypatch):
    made, alive, run = [], [], Decoder.run_block

    def watched(*given):
        output = run(*given)
        made.append(weakref.ref(output))
        return output

    monkeypatch.setattr(Decoder, "run_block", watched)
    pruned = pruned_llama(tokens)
    made.clear()
    block_errors(llama, pruned, tokens, 5, lambda *_: alive.append(sum(each() is not None for each in made)))
    assert len(made) == 3 * 2 * 4, "four runs of each block on each of two batches"
    assert alive == [4, 4, 4], "two models, two batches"


def test_nothing_changes_and_progress_is_told(llama, tokens):
    pruned, told = pruned_llama(tokens), []
    llama.train()
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in (llama, pruned)]
    block_errors(llama, pruned, tokens, progress=lambda *units: told.append(units))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert llama.training
    assert not pruned.training
    for model, state in zip((llama, pruned), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.usefixtures("untyped")
def test_models_that_do_not_compare(llama, tokens, tmp_path):
    with pytest.raises(ValueError, match="expected a LlamaForCausalLM as the dense model is, received a OPTForCausal"):
        block_errors(llama, tiny_opt(), tokens, **QUIET)
    wider = tiny_llama(intermediate_size=64)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj\.weight of shape \(48, 32\) .* received \(64, 32"):
        block_errors(llama, wider, tokens, **QUIET)
    for one, other in ((3, 2), (2, 3)):
        with pytest.raises(ValueError, match=r"expected model\.layers\.2\..* None"):
            block_errors(tiny_llama(num_hidden_layers=one), tiny_llama(num_hidden_layers=other), tokens, **QUIET)
    with pytest.raises(ValueError, match="ids from 0 to 299"):
        block_errors(llama, llama, torch.full((2, 4), 300), **QUIET)
    from sparselab.models.checkpoint import Checkpoint

    llama.save_pretrained(tmp_path)
    streamed = StreamedModel(Checkpoint(tmp_path), torch.device("cpu"), None)
    for pair in ((llama, streamed), (streamed, llama)):
        with pytest.raises(UnsupportedModelError, match="whose weights are all in memory"):
            block_errors(*pair, tokens, **QUIET)


@pytest.mark.parametrize("which", [0, 1])
def test_the_block_that_is_not_finite_is_named(tokens, which):
    models = tiny_llama(), tiny_llama()
    with torch.no_grad():
        models[which].model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1: its outputs"):
        block_errors(*models, tokens, **QUIET)


def table(**columns):
    rows = {"block": range(4), "local": 0.1, "inherited": [0.0, 0.2, 0.3, 0.4], "total": 0.5, "added": 0.9}
    return pd.DataFrame(rows | columns)


def test_the_figure_draws_the_table(tmp_path):
    figure = drawn(table(), "a caption")
    assert isinstance(figure, Figure)
    (ax,) = figure.axes
    lines = {line.get_label().split(":")[0]: line.get_xydata() for line in ax.get_lines()}
    assert sorted(lines) == sorted(PARTS)
    assert lines["local"].tolist() == [[0, 0.1], [1, 0.1], [2, 0.1], [3, 0.1]]
    assert math.isnan(lines["inherited"][0, 1]), "no point for an error of zero on a log scale"
    assert lines["inherited"][1:].tolist() == [[1, 0.2], [2, 0.3], [3, 0.4]]
    assert ax.get_yscale() == "log"
    assert "log scale" in ax.get_ylabel()
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in ax.get_lines()}) == 3
    assert figure.get_supxlabel() == "a caption"
    assert len(figures.png(figure)) > 5000


def test_the_figure_has_a_panel_a_method():
    both = pd.concat([table(method="magnitude"), table(method="sparsegpt", local=0.01)])
    figure = drawn(both, "")
    assert [ax.get_title() for ax in figure.axes] == ["magnitude", "sparsegpt"]
    assert [ax.get_lines()[-1].get_ydata()[0] for ax in figure.axes] == [0.1, 0.01]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


@pytest.mark.parametrize("errors", [0.0, math.nan])
def test_no_error_needs_no_log_scale(errors, tmp_path):
    figure = drawn(table(local=errors, inherited=errors, total=errors), "")
    figure.savefig(tmp_path / "f.png")  # warnings are errors
    assert figure.axes[0].get_yscale() == "linear"
    assert "linear scale" in figure.axes[0].get_ylabel()
