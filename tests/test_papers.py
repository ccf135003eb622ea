import math

import pytest

from sparselab import papers, sources
from sparselab.methods import METHODS
from sparselab.papers import Figure, Protocol, beside, published
from sparselab.solvers import parse_sparsity


def figure(method="sparsegpt", pattern="50%", perplexity=20.0, **changes):
    calibration = {"calibration": "c4", "nsamples": 128} if method not in ("dense", "magnitude") else {}
    given = {"calibration": "", "nsamples": None, "uncertainty": None, "seqlen": 2048, "source": "paper"} | calibration
    return Figure("o/m", method, pattern, **({"dataset": "ptb", "perplexity": perplexity} | given | changes))


def row(method="sparsegpt", pattern="50%", perplexity=20.0, dataset="ptb"):
    return {"method": method, "pattern": pattern, "dataset": dataset, "perplexity": perplexity}


def verdicts(rows, known, **used):
    return [each["verdict"] for each in beside(rows, known, Protocol(**used))]


def test_the_table_of_published_figures():
    figures = published()
    assert len(figures) == len(set(figures)) == 63
    for each in figures:
        assert each.method == papers.DENSE or each.method in METHODS
        assert each.dataset in sources.PAPERS
        assert each.perplexity > 5
        assert each.source
        assert (each.method == papers.DENSE) == (each.pattern == "")
        assert not each.pattern or str(parse_sparsity(each.pattern)) == each.pattern
        assert (each.calibration, each.nsamples) == (
            ("c4", 128) if each.method in ("wanda", "sparsegpt") else ("", None)
        )
        dense = [one for one in published(each.model) if (one.method, one.dataset) == (papers.DENSE, each.dataset)]
        assert dense, "whatever is published of a model can be checked from its dense perplexity on"
    assert {each.seqlen for each in figures if each.source != "Wanda README"} == {2048}


def test_figures_of_the_two_traps():
    by_key = {(each.method, each.pattern): each.perplexity for each in published("huggyllama/llama-7b")}
    assert (by_key["magnitude", "50%"], by_key["sparsegpt", "50%"]) == (17.29, 7.22), "not 8.45 and 6.32"
    [longer] = [each for each in published("meta-llama/Llama-2-7b-hf") if each.seqlen == 4096]
    assert (longer.method, longer.perplexity) == (papers.DENSE, 5.12)
    dense = row("dense", "", 5.12, "wikitext2")
    known = published("Llama-2-7b-hf")
    assert verdicts([dense], known, seqlen=4096) == ["agrees"]
    assert verdicts([dense], known) == ["differs"], "5.47 is the one at 2048"


@pytest.mark.parametrize("name", ["facebook/opt-125m", "copies/OPT-125m/", "opt-125m"])
def test_a_model_is_known_by_the_last_part_of_its_name(name):
    assert {each.model for each in published(name)} == {"facebook/opt-125m"}


@pytest.mark.parametrize("name", ["tiny", "facebook/opt-125m-wanda", ".", ""])
def test_of_other_models_nothing_is_published(name):
    known = published(name)
    assert known == []
    [found] = beside([row()], known, Protocol())
    assert (found["verdict"], found["source"]) == ("", "")
    assert all(math.isnan(found[column]) for column in ("published", "uncertainty", "difference"))


@pytest.mark.parametrize(
    ("method", "pattern", "ratio", "verdict"),
    [
        ("sparsegpt", "50%", 1.019, "agrees"),
        ("sparsegpt", "50%", 0.981, "agrees"),
        ("sparsegpt", "50%", 1.021, "differs"),
        ("wanda", "2:4", 0.979, "differs"),
        ("dense", "", 1.004, "agrees"),
        ("dense", "", 1.006, "differs"),
        ("magnitude", "50%", 1.001, "order only"),
        ("magnitude", "50%", 3.0, "order only"),
    ],
)
def test_agreement_is_within_the_tolerance(method, pattern, ratio, verdict):
    [found] = beside([row(method, pattern, 20 * ratio)], [figure(method, pattern, uncertainty=0.5)], Protocol())
    assert found["verdict"] == verdict
    assert found["difference"] == pytest.approx(100 * (ratio - 1))
    assert (found["published"], found["uncertainty"], found["source"]) == (20, 0.5, "paper")


@pytest.mark.parametrize("other", [row("wanda"), row(pattern="2:4"), row(dataset="c4")])
def test_a_figure_is_of_its_method_pattern_and_text(other):
    assert verdicts([row(), other], [figure()]) == ["agrees", ""]


@pytest.mark.parametrize(
    ("used", "sparsegpt", "dense"),
    [
        ({"seqlen": 256}, "seqlen 256 instead of 2048", True),
        ({"eval_nsamples": 40}, "evaluation windows 40 instead of all", True),
        ({"calibration": "stdlib"}, "calibration text stdlib instead of c4", False),
        ({"nsamples": 8}, "calibration windows 8 instead of 128", False),
        ({"nsamples": 8, "seqlen": 64}, "seqlen 64 instead of 2048, calibration windows 8 instead of 128", True),
    ],
)
def test_what_was_measured_otherwise_is_not_compared(used, sparsegpt, dense):
    known = [figure("dense", ""), figure("magnitude"), figure()]
    found = verdicts([row("dense", ""), row("magnitude"), row()], known, **used)
    assert found[2] == f"not comparable: {sparsegpt}"
    assert [each.startswith("not comparable") for each in found[:2]] == [dense, dense], "these read no calibration text"


def test_a_wrong_dense_model_makes_the_rest_of_its_text_worthless():
    rows = [row("dense", "", 3021), row("dense", "", 30, "c4"), row(), row("magnitude"), row(dataset="c4")]
    known = [figure("dense", ""), figure("dense", "", 30, dataset="c4"), figure(), figure("magnitude")]
    found = verdicts(rows, [*known, figure(dataset="c4")])
    worthless = "not comparable: the dense model differs"
    assert found == ["differs", "agrees", worthless, worthless, "agrees"]


def test_of_several_figures_the_nearest_of_those_measured_alike_stands():
    known = [figure(perplexity=23.8), figure(perplexity=24.39, source="another"), figure(perplexity=30, nsamples=64)]
    [found] = beside([row(perplexity=24.5)], known, Protocol())
    assert (found["published"], found["source"], found["verdict"]) == (24.39, "another", "agrees")
    [found] = beside([row(perplexity=30)], known, Protocol())
    assert (found["published"], found["verdict"]) == (24.39, "differs")
    [found] = beside([row(perplexity=30)], known, Protocol(nsamples=64))
    assert (found["published"], found["verdict"]) == (30, "agrees")
