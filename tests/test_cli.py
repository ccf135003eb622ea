import json
import math
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import TEXTS, tiny_llama
from transformers import AutoModelForCausalLM

from sparselab.cli import main
from sparselab.solvers import realised_sparsity

SMALL = ["--nsamples", "4", "--seqlen", "16"]


@pytest.fixture
def folder(tmp_path, tokenizer):
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("".join(TEXTS))
    return str(tmp_path / "text.txt")


def fails(capsys, arguments, code) -> str:
    """Run, expect the exit code and one line of complaint, and return that line."""
    try:
        got = main([str(argument) for argument in arguments])
    except SystemExit as left:
        got = left.code
    out, err = capsys.readouterr()
    assert got == code, err
    assert out == ""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1, err
    bars = [line for line in err.splitlines() if "%|" in line or not line]
    assert code == 2 or len(err.splitlines()) == len(lines + bars), err
    return lines[0]


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_prune_writes_a_checkpoint_that_opens(folder, text, tmp_path, capsys, method):
    out = tmp_path / "out"
    assert (
        main(
            [
                "prune",
                str(folder),
                "--out",
                str(out),
                "--method",
                method,
                "--sparsity",
                "2:4",
                "--dataset",
                text,
                *SMALL,
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert f"pruned by {method}: 50.00% zeros in 21 layers" in printed
    model = AutoModelForCausalLM.from_pretrained(out)
    assert realised_sparsity(model.model.layers[1].mlp.up_proj.weight) == 0.5
    assert realised_sparsity(model.lm_head.weight) == 0
    assert len(pd.read_csv(out / "report.csv")) == 21
    stamp = json.loads((out / "sparselab.json").read_text())
    assert stamp["settings"]["sparsity"] == "2:4"
    assert stamp["settings"]["seed"] == 0
    assert main(["eval", str(out), "--dataset", text, "--seqlen", "16", "--nsamples", "5"]) == 0
    assert "bits per byte (5 windows of 16 tokens of text.txt)" in capsys.readouterr().out


def test_compare_writes_tables_and_figures(folder, text, tmp_path, capsys):
    arguments = ["compare", str(folder), "--out", str(tmp_path / "out"), "--dataset", text, "--sparsity", "50%", "2:4"]
    arguments += ["--methods", "magnitude", "sparsegpt", "--eval-nsamples", "5", *SMALL]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("4 pruned models to make and to measure: about ")
    for words in (
        "method",
        "± ",
        "peak_memory_mb",
        "dense",
        "magnitude",
        "2:4",
        "calibrated on 4 × 16 tokens of text.txt (seed 0)",
    ):
        assert words in printed
    assert "nan" not in printed
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {"runs.csv", "runs.md", "layers.csv", "sparselab.json", "perplexity.png", "layer_errors.png"}
    assert fails(capsys, arguments, 1).endswith("pass --overwrite or another --out")
    assert main([*arguments, "--overwrite"]) == 0


def test_compare_averages_over_seeds(folder, text, tmp_path, capsys):
    arguments = ["compare", str(folder), "--out", str(tmp_path / "out"), "--dataset", text, "--sparsity", "50%"]
    arguments += ["--methods", "magnitude", "wanda", "sparsegpt", "--eval-nsamples", "5", "--seed", "0", "4", *SMALL]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("5 pruned models to make and to measure: about "), "magnitude reads no text"
    assert "(seeds 0, 4)" in printed
    runs, layers = (pd.read_csv(tmp_path / "out" / f"{name}.csv") for name in ("runs", "layers"))
    assert len(runs) == 4
    assert runs.difference.notna().tolist() == [False, True, True, False]
    assert len(layers) == 5 * 21
    assert "--seed: expected at least 0" in fails(capsys, [*arguments, "--overwrite", "--seed", "0", "-1"], 2)
    assert "seeds: expected different ones" in fails(capsys, [*arguments, "--overwrite", "--seed", "1", "1"], 1)


def test_train_and_resume(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sparselab.sources.stdlib_documents", lambda _: TEXTS)
    monkeypatch.setattr("sparselab.training.stdlib_documents", lambda _: TEXTS)
    shape = (
        "--vocab-size 280 --hidden-size 16 --intermediate-size 24 --blocks 1 --heads 2 --seqlen 32 --steps 2 --packages"
    )
    arguments = ["train", "--out", str(tmp_path / "m"), *shape.split()]
    assert main(arguments) == 0
    assert "held-out perplexity" in capsys.readouterr().out
    assert main([*arguments, "--resume"]) == 1, "it is finished"
    assert "no checkpoint.pt to go on from; choose another --out" in capsys.readouterr().err
    assert main(arguments) == 1
    assert "holds a finished output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "FOLDER", "--out", "OUT", "--method", "obs"], "expected one of magnitude, wanda, ria, sparsegpt"),
        (["prune", "FOLDER", "--out", "OUT", "--sparsity", "1.5"], "expected a fraction from 0 to 1, received 1.5"),
        (["prune", "FOLDER", "--out", "OUT", "--sparsity", "4:2"], "4:2"),
        (["prune", "FOLDER", "--out", "OUT", "--sparsity=nan"], "expected a fraction"),
        (["prune", "FOLDER"], "--out"),
        (["prune", "--out", "OUT"], "model"),
        (["shrink"], "shrink"),
        ([], "COMMAND"),
        (["eval", "FOLDER", "--nsamples", "many"], "invalid int value: 'many'"),
        (["prune", "FOLDER", "--out", "OUT", "--percdamp", "-1"], "--percdamp: expected at least 0, received -1"),
        (["prune", "FOLDER", "--out", "OUT", "--percdamp", "nan"], "--percdamp: expected at least 0, received nan"),
        (["prune", "FOLDER", "--out", "OUT", "--percdamp", "inf"], "--percdamp: expected at least 0, received inf"),
        (["prune", "FOLDER", "--out", "OUT", "--blocksize", "0"], "--blocksize: expected at least 1, received 0"),
        (["prune", "FOLDER", "--out", "OUT", "--nsamples", "0"], "--nsamples: expected at least 1, received 0"),
        (["prune", "FOLDER", "--out", "OUT", "--seqlen", "0"], "--seqlen: expected at least 1, received 0"),
        (["prune", "FOLDER", "--out", "OUT", "--batch-size", "0"], "--batch-size: expected at least 1, received 0"),
        (["prune", "FOLDER", "--out", "OUT", "--seed", "-1"], "--seed: expected at least 0, received -1"),
        (["prune", "FOLDER", "--out", "OUT", "--dataset", ""], "--dataset: expected 'stdlib', a text file or a folder"),
        (["compare", "FOLDER", "--out", "OUT", "--eval-dataset", ""], "--eval-dataset: expected 'stdlib'"),
        (["compare", "FOLDER", "--out", "OUT", "--batch-size", "4"], "unrecognized arguments: --batch-size"),
        (["eval", "FOLDER", "--trust"], "unrecognized arguments: --trust"),
        (["eval", "FOLDER", "--seqlen", "1"], "--seqlen: expected at least 2, received 1"),
        (["train", "--out", "OUT", "--steps", "-5"], "--steps: expected at least 1, received -5"),
        (["train", "--out", "OUT", "--learning-rate", "nan"], "--learning-rate: expected at least 0, received nan"),
    ],
)  # fmt: skip
def test_wrong_usage_is_2(folder, tmp_path, capsys, arguments, message):
    given = [{"FOLDER": folder, "OUT": tmp_path / "out"}.get(argument, argument) for argument in arguments]
    assert message in fails(capsys, given, 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "2:3"], "pattern 2:3: M must divide d_in, received d_in 32"),
        (["--sparsity", "2:4", "--blocksize", "6"], "M must divide blocksize"),
        (["--nsamples", "100000"], "too little text in text.txt: 100000 windows"),
        (["--seqlen", "65"], "64 positions, received windows of 65"),
        (["--dataset", "nowhere.txt"], "dataset 'nowhere.txt': expected 'stdlib', 'wikitext2'"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_failures_are_1_and_write_nothing(folder, text, tmp_path, capsys, arguments, message):
    out = tmp_path / "deep" / "out"
    given = ["prune", folder, "--out", out, "--dataset", text, *SMALL, *arguments]
    assert message in fails(capsys, given, 1)
    assert not (tmp_path / "deep").exists()


def test_bad_models_are_1(folder, tmp_path, capsys, text):
    for name in (tmp_path / "none", "no/such", tmp_path):
        assert str(name) in fails(capsys, ["eval", name], 1)
        assert str(name) in fails(capsys, ["inspect", name], 1)
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    model.save_pretrained(folder)
    message = fails(capsys, ["prune", folder, "--out", tmp_path / "out", "--dataset", text, *SMALL], 1)
    assert "model.layers.1.mlp.up_proj: the weight has NaN" in message
    message = fails(capsys, ["eval", folder, "--dataset", text, "--seqlen", "16"], 1)
    assert "that of model.layers.1;" in message


def test_debug_shows_the_traceback(tmp_path):
    from sparselab.errors import ModelLoadError

    with pytest.raises(ModelLoadError):
        main(["eval", str(tmp_path), "--debug"])


def test_tokens_of_another_vocabulary(tmp_path, tokenizer, capsys, text):
    tiny_llama(vocab_size=64).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    assert "ids from 0 to 63" in fails(capsys, ["eval", tmp_path / "m", "--dataset", text, "--seqlen", "16"], 1)


@pytest.mark.parametrize(
    "command", ["", "compare", "table", "prune", "eval", "samples", "inspect", "replay", "sweep", "report", "train"]
)
def test_help_is_one_screen_with_an_example(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as left:
        main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0
    assert len(out.splitlines()) <= 45
    assert command == "" or "example: sparselab " + command in out


def test_help_is_quick_and_the_module_runs():
    code = "import sys, sparselab.cli as cli\ntry: cli.main(['-h'])\nexcept SystemExit: print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("False\n")
    done = subprocess.run([sys.executable, "-m", "sparselab", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("sparselab 0.")


def test_a_failing_comparison_leaves_the_earlier_result_alone(folder, text, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        "compare",
        str(folder),
        "--out",
        str(out),
        "--dataset",
        text,
        "--sparsity",
        "50%",
        "--methods",
        "wanda",
    ]
    arguments += ["--eval-nsamples", "5", *SMALL]
    assert main(arguments) == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    capsys.readouterr()
    for wrong, message in (
        (["--dataset", "nowhere.txt"], "nowhere.txt"),
        (["--nsamples", "100000"], "lower nsamples or seqlen"),
    ):
        assert main([*arguments, "--overwrite", *wrong]) == 1
        assert message in capsys.readouterr().err
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert main([*arguments, "--overwrite", "--sparsity", "50%", "2:3"]) == 1
    assert "M must divide d_in" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text.txt"]


def test_what_finished_before_a_failure_is_kept_and_named(folder, text, tmp_path, capsys, monkeypatch):
    import sparselab.experiment

    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return prune(*args, **kwargs)

    prune = sparselab.experiment.prune
    monkeypatch.setattr("sparselab.experiment.prune", failing)
    arguments = ["compare", folder, "--out", tmp_path / "out", "--dataset", text, "--sparsity", "50%", *SMALL]
    assert main([str(argument) for argument in [*arguments, "--eval-nsamples", "5"]]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "RuntimeError: out of luck; what was finished is kept in " in message
    kept = message.rpartition(" ")[2]
    assert list(pd.read_csv(f"{kept}/runs.csv").method) == ["dense", "magnitude"]


def test_the_model_that_is_read_is_never_the_output(folder, text, capsys):
    for out in (folder, folder / "inside", folder / ".." / "model"):
        message = fails(capsys, ["prune", folder, "--out", out, "--overwrite", "--dataset", text, *SMALL], 1)
        assert "choose another --out" in message
    assert (folder / "model.safetensors").is_file()


def test_an_interruption_while_arguments_are_read_is_one_line(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparselab.arguments._method", interrupted)
    assert main(["prune", "tiny", "--out", "x", "--method", "wanda"]) == 1
    assert capsys.readouterr().err == "sparselab: interrupted\n"


def test_whatever_a_library_raises_is_one_line(folder, text, tmp_path, capsys, monkeypatch):
    class OddError(Exception):
        pass

    def odd(*args, **kwargs):
        raise OddError("no space\nleft on device")

    monkeypatch.setattr("sparselab.preflight.estimate", odd)
    message = fails(capsys, ["prune", folder, "--out", tmp_path / "out", "--dataset", text, *SMALL], 1)
    assert message.endswith("error: OddError: no space left on device")
    assert not (tmp_path / "out").exists()


def test_a_terminal_without_the_letters_gets_other_ones(folder, text):
    command = [sys.executable, "-m", "sparselab", "eval", str(folder), "--dataset", text, "--seqlen", "16"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert " ? " in done.stdout


@pytest.mark.parametrize("device", ["cuda:99", "meta", "abacus"])
def test_devices_that_are_not_there(folder, text, device, capsys):
    message = fails(capsys, ["eval", folder, "--dataset", text, "--device", device], 1)
    assert f"received '{device}'" in message
    assert "device: expected one of cpu" in message


def test_a_full_disk_shows_before_the_work(folder, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    message = fails(capsys, ["prune", folder, "--out", tmp_path / "out", "--dataset", text, *SMALL], 1)
    assert "found 0 MB free; make room or write elsewhere" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


def test_texts_that_are_read_are_not_written_to(folder, text, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for out, message in ((tmp_path / "texts", "which is read"), (tmp_path / "texts" / "out", "which is read")):
        given = ["compare", folder, "--out", out, "--dataset", tmp_path / "texts", *SMALL]
        assert message in fails(capsys, given, 1)
    assert list((tmp_path / "texts").iterdir()) == []


@pytest.mark.parametrize("read", [0, 1])
def test_the_work_goes_on_when_nobody_reads_the_output(folder, text, tmp_path, read):
    command = [sys.executable, "-m", "sparselab", "compare", folder, "--out", tmp_path / "out", "--dataset", text]
    command += ["--sparsity", "50%", "--methods", "magnitude", "--eval-nsamples", "5", *SMALL]
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for _ in range(read):
            process.stdout.readline()
        process.stdout.close()
        complaint = process.stderr.read().decode()
        assert process.wait() == 0, complaint
    assert "error" not in complaint.lower()
    assert (tmp_path / "out" / "layer_errors.png").is_file()


def test_an_interruption_says_what_is_kept(folder, text, tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparselab.figures.sparsity_perplexity", interrupted)
    arguments = ["compare", folder, "--out", tmp_path / "out", "--dataset", text, "--sparsity", "50%", *SMALL]
    arguments += ["--methods", "magnitude", "--eval-nsamples", "5"]
    assert main([str(argument) for argument in arguments]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("sparselab: interrupted; what was finished is kept in ")
    assert len(pd.read_csv(last.rpartition(" ")[2] + "/runs.csv")) == 2


def test_the_example_in_the_help_can_be_copied(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert "--sparsity 50% 2:4\n" in capsys.readouterr().out
