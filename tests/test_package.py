"""The promises of the package as a whole: quick to import, little to install, names that stay."""

import subprocess
import sys
import tomllib
from inspect import signature
from pathlib import Path

import pytest

import sparselab

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_quick_and_loads_nothing_heavy():
    out = python(
        "import sys, time; start = time.perf_counter(); import sparselab\n"
        "print(time.perf_counter() - start, *sorted({'torch', 'transformers', 'pandas', 'numpy'} & set(sys.modules)))"
    ).split()
    assert float(out[0]) < 0.5
    assert out[1:] == []


def test_everything_works_without_optional_packages():
    absent = "('datasets', 'ipywidgets', 'matplotlib', 'papermill', 'IPython')"
    python(
        f"import sys; [sys.modules.__setitem__(name, None) for name in {absent}]\n"
        "import sparselab\n"
        "for name in sparselab.__all__: getattr(sparselab, name)\n"
        "import sparselab.cli, sparselab.experiment\n"
        "sparselab.load('tiny')"
    )


def test_public_names():
    assert set(sparselab.__all__) == {
        "Inspection", "Magnitude", "Perplexity", "Report", "SparseGPT", "Wanda", "bits_per_byte", "block_errors",
        "calibration_tokens", "check_saved", "collect", "compare", "completions", "difference", "evaluate_tasks",
        "evaluation_tokens", "inspect_checkpoint", "layer_quality", "load", "owl", "papers_table", "perplexity",
        "prune", "prune_checkpoint", "prune_gradually", "recover", "solvers", "stream", "sweep", "train",
    }  # fmt: skip
    for name in sparselab.__all__:
        assert getattr(sparselab, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'sparsify'"):
        _ = sparselab.sparsify


@pytest.mark.parametrize(
    ("function", "promised"),
    [
        (sparselab.load, "name device dtype"),
        (sparselab.calibration_tokens, "tokenizer dataset nsamples seqlen seed"),
        (sparselab.evaluation_tokens, "tokenizer dataset nsamples seqlen"),
        (sparselab.prune, "model calib method sparsity percdamp blocksize"),
        (sparselab.perplexity, "model tokens"),
        (sparselab.SparseGPT.prune, "self calib_data sparsity prunen prunem percdamp use_zero"),
        (sparselab.solvers.magnitude, "weight sparsity"),
        (sparselab.solvers.wanda, "weight feature_norm sparsity"),
        (sparselab.solvers.sparsegpt, "weight hessian sparsity percdamp blocksize keep"),
        (sparselab.solvers.reconstruct, "weight hessian keep"),
    ],
)
def test_promised_signatures(function, promised):
    assert list(signature(function).parameters)[: len(promised.split())] == promised.split()


def test_the_contract_as_a_user_types_it(tmp_path):
    model, tokenizer = sparselab.load("tiny", device="cpu")
    calib = sparselab.calibration_tokens(tokenizer, "stdlib", nsamples=8, seqlen=64, seed=0)
    held = sparselab.evaluation_tokens(tokenizer, "stdlib", nsamples=8, seqlen=64)
    report = sparselab.prune(model, calib, method="sparsegpt", sparsity=0.5, percdamp=0.01, blocksize=128)
    assert {"block", "layer", "sparsity", "relative_error", "seconds"} <= set(report.layers.columns)
    assert len(report.layers) == 42
    ppl = sparselab.perplexity(model, held)
    assert float(ppl) > 1
    assert ppl.stderr > 0
    assert ppl.nll.shape == (8,)


def test_every_pinned_package_satisfies_what_is_declared():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    declared = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    for requirement in map(Requirement, declared):
        if requirement.name != "sparselab":
            assert requirement.specifier.contains(pins[requirement.name]), requirement
    assert pins["torch"] == "2.13.0"
    assert set(project["optional-dependencies"]) == {"notebooks", "course", "sweep", "scale", "data", "eval", "test"}
