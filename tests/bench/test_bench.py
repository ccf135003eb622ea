import json
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import tiny_llama

from sparselab.bench import Record, bench_layers, bench_model, machine, mean_ratio
from sparselab.bench.timing import interleaved, peak_memory
from sparselab.cli import main
from sparselab.pruning import prune
from sparselab.solvers import realised_sparsity

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_candidates_take_turns_after_a_round_that_does_not_count():
    told = []
    seconds = interleaved(
        {"a": lambda: told.append("a"), "b": lambda: told.append("b")}, 2, CPU, prepare=lambda: told.append("-")
    )
    assert "".join(told) == "-a-b" * 3
    assert [len(taken) for taken in seconds.values()] == [2, 2]
    assert min(seconds["a"]) > 0


def test_layers_and_their_ratios():
    rows = bench_layers([(48, 64), (32, 32)], ["50%", "2:4"], repeats=1, progress=False)
    assert list(rows[["d_out", "d_in", "sparsity"]].itertuples(index=False, name=None)) == [
        (48, 64, "50%"), (48, 64, "2:4"), (32, 32, "50%"), (32, 32, "2:4"),
    ]  # fmt: skip
    assert (rows.ratio == rows.loop_seconds / rows.seconds).all()
    assert rows.error.between(0.99, 1.01).all()
    assert rows.share.between(0, 1).all()
    assert mean_ratio(pd.DataFrame({"ratio": [2.0, 8.0]})) == pytest.approx(4)


def test_a_model_is_left_as_it_was_and_every_run_begins_with_it(tokens, monkeypatch):
    model, zeros = tiny_llama(), []
    weight = "model.layers.2.mlp.down_proj.weight"

    def watched(pruned, *arguments, **options):
        zeros.append(realised_sparsity(pruned.state_dict()[weight]))
        report = prune(pruned, *arguments, **options)
        zeros.append(realised_sparsity(pruned.state_dict()[weight]))
        return report

    monkeypatch.setattr("sparselab.bench.models.prune", watched)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rows = bench_model(model, tokens, repeats=1, progress=False).set_index("run")
    assert list(rows.index) == ["two forwards", "sparsegpt", "wanda", "magnitude", "published flow"]
    assert zeros == [0, 0.5] * 3 * 3, "three methods, in two rounds and once for the memory"
    assert rows.over_forwards["two forwards"] == 1
    assert (rows.seconds > 0).all()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_record_says_everything_and_comes_back(tmp_path):
    layers = bench_layers([(16, 16)], ["50%"], repeats=1, progress=False)
    record = Record("sparselab bench", machine(CPU), layers, about="nothing")
    record.save(tmp_path / "record.json")
    kept = json.loads((tmp_path / "record.json").read_text())
    assert kept["layers"][0]["seconds"] == layers.seconds[0]
    assert kept["command"] == "sparselab bench"
    assert kept["machine"]["torch"] == torch.__version__
    assert "model" not in kept
    assert "16×16" in str(record)
    assert Record.load(tmp_path / "record.json").markdown == record.markdown == (tmp_path / "record.md").read_text()
    assert "geometric mean of the ratios" in str(record)


def test_the_tables_that_are_kept_are_those_of_the_record():
    folder = ROOT / "benchmarks"
    assert (folder / "speed.md").read_text(encoding="utf-8") == Record.load(folder / "speed.json").markdown


def test_peak_memory_of_a_run():
    def run():
        ones = torch.ones(20_000_000)
        time.sleep(0.05)  # on a busy machine a shorter peak may fall between two samples
        return ones.sum()

    assert peak_memory(run, CPU) > 60e6


def test_the_command(tmp_path, capsys):
    out = tmp_path / "record.json"
    assert main(["bench", "--only", "layers", "--shapes", "16x32", "--repeats", "1", "--json", str(out)]) == 0
    assert "16×32" in capsys.readouterr().out
    assert [row["sparsity"] for row in json.loads(out.read_text())["layers"]] == ["50%", "2:4"]
    for wrong in (tmp_path, tmp_path / "absent" / "record.json"):
        assert main(["bench", "--json", str(wrong)]) == 1
        assert "--json: expected a file in an existing folder" in capsys.readouterr().err
    assert main(["bench", str(tmp_path / "absent"), "--json", str(out)]) == 1, "before anything is timed"
    assert main(["bench", "--only", "layers", "--patterns", "100%"]) == 1
    assert "patterns: expected less than everything" in capsys.readouterr().err
    for wrong in ("16", "0x4", "axb", "16x32x4"):
        with pytest.raises(SystemExit, match="2"):
            main(["bench", "--shapes", wrong])
