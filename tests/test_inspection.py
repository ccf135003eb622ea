import json

import pytest
import torch
from conftest import tiny_llama
from families import tiny
from safetensors.torch import load_file, save_file

import sparselab
from sparselab import inspect_checkpoint, prune, storage
from sparselab.cli import main
from sparselab.models.blocks import Decoder, read_weight

QUIET = {"progress": False}


@pytest.fixture
def saved(tokenizer, tmp_path):
    """Save a model with its tokenizer; returns the folder."""

    def save(model):
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_rows_are_what_the_weights_are(family, saved, tokens):
    model = tiny(family)
    prune(model, tokens, "magnitude", "0=dense,1:*=2:4", **QUIET)
    linears = Decoder(model).linears()
    found = inspect_checkpoint(saved(model), **QUIET)
    assert [f"{Decoder(model).block_prefix(row.block)}{row.layer}" for row in found.layers.itertuples()] == [*linears]
    for row, linear in zip(found.layers.itertuples(), linears.values(), strict=True):
        weight = read_weight(linear)
        assert (row.d_out, row.d_in) == weight.shape
        assert row.sparsity == (weight == 0).double().mean() == (0.5 if row.block else 0)
        assert (row.pattern, row.crowded) == (("2:4", 0) if row.block else ("", weight.numel() // 4))
        assert row.dense == weight.nbytes
        assert row.bitmask == storage.encode(weight, "bitmask").nbytes
        assert row.two_of_four == (storage.encode(weight, "2:4").nbytes if row.block else -1)
    assert found.sparsity == sum((read_weight(each) == 0).sum() for each in linears.values()) / sum(
        read_weight(each).numel() for each in linears.values()
    )


def test_one_group_too_many_is_seen(saved):
    model = tiny_llama()
    prune(model, None, "magnitude", "2:4", **QUIET)
    weight = read_weight(Decoder(model).linears()["model.layers.1.mlp.up_proj"])
    with torch.no_grad():
        weight[3, 4:8] = 1
    rows = inspect_checkpoint(saved(model), **QUIET).layers.set_index(["block", "layer"])
    assert rows.pattern.value_counts().to_dict() == {"2:4": len(rows) - 1, "": 1}
    changed = rows.loc[(1, "mlp.up_proj")]
    assert (changed.pattern, changed.crowded, changed.two_of_four) == ("", 1, -1)


def test_patterns_are_named_by_the_first_that_holds(saved):
    for pattern in ("1:4", "4:8"):
        model = tiny_llama()
        prune(model, None, "magnitude", pattern, **QUIET)
        assert inspect_checkpoint(saved(model), **QUIET).layers.pattern.eq(pattern).all()


def test_bytes_are_those_of_the_files(saved):
    model = tiny_llama(torch_dtype="float32")
    prune(model, None, "magnitude", "2:4", **QUIET)
    folder = saved(model.bfloat16())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    found = inspect_checkpoint(folder, **QUIET)
    size = (folder / "model.safetensors").stat().st_size
    assert found.file_bytes == size
    weights = sum(read_weight(linear).numel() for linear in Decoder(model).linears().values())
    halves, bits = 2 * weights, weights // 8
    assert found.totals.to_dict("index") == {
        "dense": {"layers": halves, "files": size},
        "bitmask": {"layers": halves // 2 + bits, "files": size - halves // 2 + bits},
        "2:4": {"layers": halves // 2 + bits, "files": size - halves // 2 + bits},
    }


def test_what_is_larger_in_a_form_stays_dense(saved):
    found = inspect_checkpoint(saved(tiny_llama()), **QUIET)
    assert (found.layers.bitmask > found.layers.dense).all()
    assert found.totals.files.nunique() == 1
    assert "how it was made is not known" in str(found)


def test_the_command_shows_layers_bytes_and_the_manifest(capsys, tmp_path):
    assert main(["prune", "tiny", "--out", str(tmp_path / "out"), "--method", "magnitude", "--sparsity", "2:4"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert len([line for line in shown.splitlines() if " × " in line and " 2:4 " in line]) == 42
    assert "50.00% zeros in 42 layers" in shown
    assert "made by sparselab prune tiny --out" in shown
    assert "model tiny, method magnitude, sparsity 2:4" in shown
    assert f"sparselab {sparselab.__version__}" in shown
    assert "8 files of weights, as they were written" in shown
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[2]
    weights = load_file(shard)
    name = next(iter(weights))
    weights[name].view(-1)[0] += 1
    save_file(weights, shard, {"format": "pt"})
    assert main(["inspect", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert f"8 files of weights, {shard.name} changed since" in captured.out
    assert captured.err.startswith(f"sparselab inspect: error: {tmp_path / 'out'}: {shard.name} is not the file")


def test_no_model(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / "empty")]) == 1
    assert "expected a model folder with a config.json" in capsys.readouterr().err
