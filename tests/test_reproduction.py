import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import tiny_llama

import sparselab
from sparselab import papers, reproduction
from sparselab.cli import main
from sparselab.errors import OutputError
from sparselab.experiment import RunConfig
from sparselab.papers import Figure
from sparselab.reproduction import TableConfig, papers_table

CONFIG = TableConfig(sparsities=("50%", "2:4"), nsamples=4, eval_nsamples=5, seqlen=16)
TEXTS, METHODS = ["wikitext2", "ptb", "c4"], ["magnitude", "wanda", "sparsegpt"]

pytestmark = pytest.mark.usefixtures("hub_copies")


@pytest.fixture
def calls(monkeypatch):
    """What is done, in order: method and pattern of what is pruned, and each evaluation."""
    calls = []

    def prune(model, calib, method, sparsity, **how):
        calls.append((method, sparsity))
        return sparselab.prune(model, calib, method, sparsity, **how)

    def perplexity(*args, **how):
        calls.append("perplexity")
        return sparselab.perplexity(*args, **how)

    monkeypatch.setattr(reproduction, "prune", prune)
    monkeypatch.setattr(reproduction, "perplexity", perplexity)
    return calls


def table(llama, tokenizer, config=CONFIG, name="m", **how):
    return papers_table(llama, tokenizer, config, name, progress=False, **how)


def stopped_at(calls, monkeypatch, which):
    """The call of `prune` with this method and pattern fails, the first time."""
    call = reproduction.prune

    def failing(model, calib, method, sparsity, **how):
        if (method, sparsity) == which and which not in calls:
            calls.append(which)
            raise RuntimeError("out of luck")
        return call(model, calib, method, sparsity, **how)

    monkeypatch.setattr(reproduction, "prune", failing)


def test_every_model_is_pruned_once_and_measured_on_every_text(llama, tokenizer, calls):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    rows = table(llama, tokenizer).rows
    torch.testing.assert_close(dict(llama.state_dict()), before, rtol=0, atol=0)
    pruned = [(method, pattern) for pattern in ("50%", "2:4") for method in METHODS]
    assert calls == ["perplexity"] * 3 + [each for run in pruned for each in (run, *["perplexity"] * 3)]
    asked = [(*run, text) for run in [("dense", ""), *pruned] for text in TEXTS]
    assert list(rows[["method", "pattern", "dataset"]].itertuples(index=False, name=None)) == asked
    assert (rows.windows == 5).all()
    for row in rows.itertuples():
        model = tiny_llama()
        if row.pattern:
            calib = sparselab.calibration_tokens(tokenizer, "c4", 4, 16, seed=0)
            sparselab.prune(model, calib, row.method, row.pattern, progress=False)
        ppl = sparselab.perplexity(model, sparselab.evaluation_tokens(tokenizer, row.dataset, 5, 16), progress=False)
        assert (row.perplexity, row.stderr) == (float(ppl), ppl.stderr)


def test_as_it_stands_it_is_the_papers_protocol_within_the_models_context(llama, tokenizer):
    assert [(run.method, run.sparsity) for run in TableConfig().runs()] == [
        (method, pattern) for pattern in ("50%", "4:8", "2:4") for method in METHODS
    ]
    assert TableConfig().runs()[0] == RunConfig("magnitude", "50%")
    bench = reproduction._Bench(llama, tokenizer, TableConfig())
    assert bench.used == papers.Protocol(seqlen=64), "of 2048 the model has 64"
    assert bench.calib.shape == (128, 64)
    for text in TEXTS:
        assert torch.equal(bench.held_out[text], sparselab.evaluation_tokens(tokenizer, text, None, 64))


def test_the_dense_model_is_told_of_at_once_and_stands_beside_the_published_one(llama, tokenizer, calls, monkeypatch):
    config = replace(CONFIG, methods=("magnitude", "wanda"), sparsities=("50%",), eval_nsamples=None)
    measured = table(llama, tokenizer, config).rows.set_index(["method", "dataset"]).perplexity
    calls.clear()

    def figure(method, dataset, factor):
        read = ("c4", 4) if method == "wanda" else ("", None)
        pattern = "" if method == "dense" else "50%"
        return Figure("o/m", method, pattern, dataset, measured[method, dataset] * factor, None, 16, *read, "paper")

    known = [
        *(figure("dense", "wikitext2", 1), figure("magnitude", "wikitext2", 2), figure("wanda", "wikitext2", 1.1)),
        *(figure("dense", "ptb", 1.1), figure("wanda", "ptb", 1), figure("wanda", "c4", 1)._replace(seqlen=2048)),
    ]
    monkeypatch.setattr(papers, "_read", lambda: tuple(known))
    found = table(llama, tokenizer, config, tell=calls.append)
    assert calls[0] == "perplexity"
    assert calls[1].startswith(f"dense on wikitext2: {measured['dense', 'wikitext2']:.2f} ± ")
    assert calls[1].endswith("(paper): agrees")
    assert "differs by −9.1%; look at model, tokenizer and text before you trust" in calls[3]
    assert calls[5].endswith("; nothing is published")
    assert calls[6] == ("magnitude", "50%")
    rows = found.rows.set_index(["method", "dataset"])
    assert rows.verdict.to_dict() == {
        ("dense", "wikitext2"): "agrees",
        ("dense", "ptb"): "differs",
        ("dense", "c4"): "",
        ("magnitude", "wikitext2"): "order only",
        ("magnitude", "ptb"): "",
        ("magnitude", "c4"): "",
        ("wanda", "wikitext2"): "differs",
        ("wanda", "ptb"): "not comparable: the dense model differs",
        ("wanda", "c4"): "not comparable: seqlen 16 instead of 2048",
    }
    shown = found.table.set_index(["method", "dataset"])
    assert shown.difference["wanda", "wikitext2"] == "−9.1%"
    assert shown.difference["wanda", "ptb"] == "+0.0%"
    assert shown.published["wanda", "c4"] == f"{measured['wanda', 'c4']:g}"
    assert set(shown.loc["dense", "c4"][["published", "difference", "verdict", "source"]]) == {""}


def test_an_interrupted_table_goes_on_where_it_stopped(llama, tokenizer, tmp_path, calls, monkeypatch):
    whole = table(llama, tokenizer).rows
    calls.clear()
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    stopped_at(calls, monkeypatch, ("sparsegpt", "50%"))
    with pytest.raises(RuntimeError, match="out of luck"):
        table(llama, tokenizer, out=tmp_path)
    torch.testing.assert_close(dict(llama.state_dict()), before, rtol=0, atol=0)
    assert calls[-1] == ("sparsegpt", "50%")
    calls.clear()
    with pytest.raises(OutputError, match="pass --resume to go on"):
        table(llama, tokenizer, out=tmp_path)
    with pytest.raises(OutputError, match="holds the beginning of other work: calibration was"):
        table(llama, tokenizer, replace(CONFIG, nsamples=5), out=tmp_path, resume=True)
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(OutputError, match="holds the beginning of other work: model was"):
        table(other, tokenizer, out=tmp_path, resume=True)
    assert calls == []
    calls.append(("sparsegpt", "50%"))  # has failed once
    pd.testing.assert_frame_equal(table(llama, tokenizer, out=tmp_path, resume=True).rows, whole)
    assert [each for each in calls[1:] if each != "perplexity"] == [
        *[("sparsegpt", "50%"), ("magnitude", "2:4"), ("wanda", "2:4"), ("sparsegpt", "2:4")]
    ]
    assert calls.count("perplexity") == 12


def test_more_can_be_asked_of_what_is_finished(llama, tokenizer, tmp_path, calls):
    table(llama, tokenizer, replace(CONFIG, methods=("wanda",)), out=tmp_path)
    calls.clear()
    rows = table(llama, tokenizer, replace(CONFIG, methods=("wanda", "ria")), out=tmp_path, resume=True).rows
    assert [each for each in calls if each != "perplexity"] == [("ria", "50%"), ("ria", "2:4")]
    assert list(rows.method.unique()) == ["dense", "wanda", "ria"]


def test_a_text_that_was_not_reached_is_measured_and_the_others_are_not_again(llama, tokenizer, tmp_path, calls):
    config = replace(CONFIG, methods=("wanda",), sparsities=("50%",))
    whole = table(llama, tokenizer, config, out=tmp_path).rows
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]) + b"{")
    calls.clear()
    pd.testing.assert_frame_equal(
        table(llama, tokenizer, config, out=tmp_path, resume=True, tell=calls.append).rows, whole
    )
    assert "line 7 is damaged" in calls[0]
    assert calls[-2:] == [("wanda", "50%"), "perplexity"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("obc",)}, "method: expected one of magnitude, wanda, .*, received 'obc'"),
        ({"methods": ()}, "methods, sparsities, eval_datasets: expected at least one of each, received none"),
        ({"sparsities": ("5:4",)}, "5:4"),
        ({"eval_datasets": ()}, "expected at least one of each"),
        ({"eval_datasets": ("ptb", "nowhere.txt")}, "dataset 'nowhere.txt': expected 'stdlib', 'wikitext2'"),
        ({"dataset": "nowhere.txt"}, "dataset 'nowhere.txt'"),
        ({"dataset": "o/n", "eval_datasets": ("ptb", "o/n")}, "would both read o/n"),
        ({"nsamples": 0}, "nsamples: expected at least 1, received 0"),
        ({"eval_nsamples": 0}, "eval_nsamples: expected at least 1, received 0"),
        ({"seqlen": 1}, "seqlen: expected at least 2, received 1"),
        ({"seed": -1}, "seed: expected at least 0, received -1"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        TableConfig(**changes)


@pytest.mark.usefixtures("untyped")
def test_one_word_is_not_several():
    with pytest.raises(TypeError, match="eval_datasets: expected several in a tuple, received 'ptb'"):
        TableConfig(eval_datasets="ptb")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsities": ("50%", "2:3")}, "pattern 2:3: M must divide d_in"),
        ({"seqlen": 65}, "64 positions"),
        ({"eval_datasets": ("ptb", "owner/name")}, "the hub cannot be reached"),
        ({"eval_nsamples": 10**6}, "too little text in wikitext2"),
    ],
)
def test_what_can_be_known_is_checked_before_anything_is_measured(llama, tokenizer, tmp_path, calls, changes, message):
    with pytest.raises(ValueError, match=message):
        table(llama, tokenizer, replace(CONFIG, **changes), out=tmp_path)
    with pytest.raises(ValueError, match="out: expected an existing folder"):
        table(llama, tokenizer, out=tmp_path / "none")
    assert calls == []
    assert not (tmp_path / "journal.jsonl").exists()


ARGUMENTS = ["table", "tiny", "--methods", "magnitude", "wanda", "--sparsity", "2:4", "--nsamples", "2"]
ARGUMENTS += ["--seqlen", "32", "--eval-nsamples", "3", "--eval-dataset", "ptb", "c4", "--device", "cpu"]


def test_the_command_on_the_bundled_model_stopped_and_resumed_and_replayed(tmp_path, capsys, calls, monkeypatch):
    out, given = tmp_path / "out", [*ARGUMENTS, "--out", str(tmp_path / "out")]
    stopped_at(calls, monkeypatch, ("wanda", "2:4"))
    assert main(given) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("pass --resume to go on")
    assert not out.exists()
    done = len(calls)
    assert main([*given, "--resume"]) == 0
    assert calls[done:] == [("wanda", "2:4"), "perplexity", "perplexity"]
    printed = capsys.readouterr().out
    assert printed.startswith("dense on ptb: ")
    assert "tiny; calibrated on 2 × 32 tokens of c4 (seed 0), evaluated on windows of 32 tokens" in printed
    rows = pd.read_csv(out / "table.csv")
    assert list(rows.method) == ["dense"] * 2 + ["magnitude"] * 2 + ["wanda"] * 2
    assert (out / "table.md").read_text().count("\n| ") == 7
    made = json.loads((out / "sparselab.json").read_text())
    assert made["results"]["rows"][5]["perplexity"] == rows.perplexity[5]
    assert main(["replay", str(out)]) == 0
    assert "Agrees to the last bit: 19 numbers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (["--methods", "obs"], 2, "expected one of magnitude, wanda, ria, sparsegpt"),
        (["--sparsity", "4:2"], 2, "4:2"),
        (["--eval-dataset", "ptb", ""], 2, "--eval-dataset: expected 'stdlib'"),
        (["--eval-dataset", "nowhere"], 1, "dataset 'nowhere': expected 'stdlib'"),
        (["--dataset", "owner/name"], 1, "the hub cannot be reached"),
    ],
)
def test_the_command_with_wrong_names(tmp_path, capsys, calls, changes, code, message):
    try:
        assert main([*ARGUMENTS, "--out", str(tmp_path / "deep/out"), *changes]) == code
    except SystemExit as left:
        assert left.code == code
    out, err = capsys.readouterr()
    assert (out, calls) == ("", [])
    assert message in err.splitlines()[-1]
    assert code == 2 or len(err.splitlines()) == 1
    assert not (tmp_path / "deep").exists()


def test_without_copies_and_network_one_line_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SPARSELAB_DATASETS")
    assert main(["table", "tiny", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("sparselab table: error: dataset 'c4': no such file or folder here, so that the hub was")
    assert main(["table", "facebook/opt-125m", "--out", str(tmp_path / "out")]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "facebook/opt-125m: expected 'tiny', a model folder or a hub id" in line
