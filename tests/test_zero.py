"""Models that DeepSpeed ZeRO-3 has partitioned between two processes, over gloo on the CPU."""

import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TEXTS, tiny_llama, tiny_opt
from safetensors.torch import load_file, save_file
from test_ranks import command, report

from sparselab import collect, perplexity, prune, prune_checkpoint
from sparselab.corpora import calibration_tokens
from sparselab.errors import ModelLoadError
from sparselab.models import stream

ALONE = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
TESTS = Path(__file__).parent
# On a CPU it compiles what it talks over when it is first used.
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="needs DeepSpeed (make scale) and a C++ compiler (g++)",
)


def two_processes(how, folder):
    tokens = torch.randint(0, 300, (9, 32), generator=torch.Generator().manual_seed(1))
    save_file({"tokens": tokens}, folder / "tokens")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(TESTS / "partitioned.py"), how, str(folder / "tokens"), str(folder)]
    return tokens, subprocess.run([*line, *script], capture_output=True, text=True, check=False, env=ALONE)


def whole(how):
    return tiny_opt().bfloat16() if how == "half" else tiny_llama(num_hidden_layers=6)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("how", ["made", "half", "served"])
def test_a_partitioned_model_is_pruned_and_measured_as_a_whole_one(tmp_path, how):
    tokens, done = two_processes(how, tmp_path)
    assert done.returncode == 0, done.stderr
    model = whole(how)
    dense, traces = perplexity(model, tokens, progress=False).nll, collect(model, tokens, progress=False).values()
    half = sum(weight.numel() for weight in model.parameters()) / 2
    expected = prune(model, tokens, progress=False).layers
    reports = [pd.read_csv(tmp_path / f"report-{rank}.csv") for rank in (0, 1)]
    assert reports[0].drop(columns="seconds").equals(reports[1].drop(columns="seconds")), "both know all"
    for column in ("block", "layer", "d_out", "d_in", "sparsity", "tokens"):
        assert reports[0][column].tolist() == expected[column].tolist()
    # Two processes add up XᵀX in another order than one; of 16-bit weights a few then round to other values, and later
    # layers see that. Against two processes that stream the model, below, no bit may differ.
    tolerance = 0.1 if how == "half" else 1e-4
    assert reports[0].relative_error.tolist() == pytest.approx(expected.relative_error.tolist(), rel=tolerance)
    weights, other = (load_file(tmp_path / f"weights-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(other[name], weight) for name, weight in weights.items())
    assert {weight.dtype for weight in weights.values()} == {model.dtype}
    for name, weight in model.named_parameters():
        assert "layers" in name or torch.equal(weights[name], weight)
    for rank in (0, 1):
        measured = load_file(tmp_path / f"measured-{rank}.safetensors")
        assert measured["elements"] == pytest.approx(half, rel=0.01), "each has half of the weights"
        assert torch.equal(measured["dense"], dense)
        assert measured["traces"].tolist() == pytest.approx([seen.hessian.trace().item() for seen in traces])
        assert not torch.equal(measured["pruned"], dense)
    model.load_state_dict(weights, strict=False)
    assert torch.equal(perplexity(model, tokens, progress=False).nll, measured["pruned"])
    if how == "served":  # by the engine's own forward, which gathers and lets go by itself
        with torch.no_grad():
            torch.testing.assert_close(measured["logits"], model(tokens).logits)


@pytest.mark.slow
@needs_deepspeed
def test_an_error_in_one_process_is_told_and_the_other_ends(tmp_path):
    started = time.monotonic()
    _, done = two_processes("fails", tmp_path)
    assert done.returncode == 1
    assert "NonFiniteError: model.layers.0." in done.stderr
    assert "this one fails" in done.stderr
    assert time.monotonic() - started < 90


def tied():
    return tiny_llama(tie_word_embeddings=True)


def with_biases():
    return tiny_opt().bfloat16()


@pytest.fixture(params=[tied, with_biases])
def files(request, tmp_path, tokenizer):
    """A model's folder and a text."""
    request.param().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(TEXTS) * 8)
    return tmp_path / "model", tmp_path / "text.txt"


@pytest.mark.slow
@needs_deepspeed
def test_the_command_line_partitions_a_model_itself(files, tmp_path, tokenizer):
    """The streamed run is the measure; a third one was interrupted before, by itself, after its first block."""
    tokens = calibration_tokens(tokenizer, files[1], 9, 32, 0)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(*stream(files[0], "cpu"), tokens, tmp_path / "resumed", progress=stopped)
    made = []
    for name, extra in [("streamed", []), ("partitioned", ["--zero"]), ("resumed", ["--zero", "--resume"])]:
        line = command(*files, tmp_path / name, *extra, ranks=2)
        done = subprocess.run(line, capture_output=True, text=True, check=False, env=ALONE)
        assert done.returncode == 0, done.stderr
        assert "DeepSpeed" not in done.stdout
        assert f"{int(name == 'resumed')} of 3 blocks are done" in done.stdout
        shards = (tmp_path / name).glob("*.safetensors")
        made.append((report(tmp_path / name), {k: w for path in shards for k, w in load_file(path).items()}))
    (expected, streamed), (got, weights), (resumed, _) = made
    assert got.drop(columns="seconds").equals(expected.drop(columns="seconds"))
    assert streamed.keys() == weights.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in streamed.items())
    assert resumed.relative_error.tolist() == pytest.approx(expected.relative_error.tolist(), rel=0.1)


def stopped(done, _):
    """Ends the work in the second block; the first has six layers or seven."""
    if done > 7:
        raise KeyboardInterrupt


def test_one_process_alone_partitions_nothing():
    with pytest.raises(ModelLoadError, match=r"--zero: expected several processes .* start them with torchrun"):
        stream("tiny", "cpu", zero=True)


def test_what_deepspeed_needs_is_said(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ModelLoadError, match=r"--zero: needs DeepSpeed; .*sparselab\[scale\]"):
        stream("tiny", "cpu", zero=True)


def test_a_whole_model_is_not_taken_for_a_partitioned_one(llama, tokens):
    with pytest.raises(ValueError, match="use_zero: expected a model that DeepSpeed ZeRO-3 has partitioned"):
        prune(llama, tokens, use_zero=True, progress=False)
