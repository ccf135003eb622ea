import json

import pandas as pd
import pytest
import torch
from conftest import TEXTS, tiny_llama, tiny_opt
from families import tiny

from sparselab import inspect_checkpoint, prune
from sparselab.cli import main
from sparselab.models.blocks import Decoder, find_linears, read_weight, write_weight
from sparselab.solvers import realised_sparsity
from sparselab.storage import encode


def inspected(model, folder):
    model.save_pretrained(folder)
    return inspect_checkpoint(folder, progress=False)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2_moe"])
def test_layers_are_counted_as_in_memory_and_bytes_as_encoded(tmp_path, family):
    model = tiny(family).bfloat16()
    prune(model, method="magnitude", sparsity="0=2:4,1:*=60%", progress=False)
    layers = inspected(model, tmp_path).layers
    decoder = Decoder(model)
    assert list(zip(layers.block, layers.layer, strict=True)) == decoder.layers()
    for row, linear in zip(layers.to_dict("records"), decoder.linears().values(), strict=True):
        weight = read_weight(linear)
        assert (row["d_out"], row["d_in"]) == tuple(weight.shape)
        assert row["sparsity"] == pytest.approx(realised_sparsity(weight))
        assert (row["dense"], row["bitmask"]) == tuple(encode(weight, form).nbytes for form in ("dense", "bitmask"))
        broken = (weight.unflatten(1, (-1, 4)).count_nonzero(dim=2) > 2).sum()
        assert row["beyond_2_4"] == broken
        assert (broken == 0) == (row["block"] == 0)
        if row["block"] == 0:
            assert row["2:4"] == encode(weight, "2:4").nbytes
        else:
            assert pd.isna(row["2:4"])


def test_totals_have_all_weights_once(tmp_path):
    model = tiny_opt(tie_word_embeddings=True)  # its biases are zeros
    prune(model, method="magnitude", sparsity="2:4", progress=False)
    totals = inspected(model, tmp_path).totals
    parameters = list(model.parameters())
    size, zeros = (sum(count(each) for each in parameters) for count in (torch.numel, lambda p: int((p == 0).sum())))
    assert totals.weights["checkpoint"] == size
    assert totals.sparsity["checkpoint"] == pytest.approx(zeros / size)
    assert totals.sparsity["layers"] == 0.5
    assert totals.dense["checkpoint"] == 4 * size
    layers = totals.weights["layers"]
    assert totals["2:4"]["layers"] == totals.bitmask["layers"] == layers // 2 * 4 + layers // 8
    assert totals["2:4"]["checkpoint"] == 4 * (size - layers) + totals["2:4"]["layers"]


def test_forms_that_save_nothing_are_not_added_up(tmp_path):
    inspection = inspected(tiny_llama(), tmp_path)
    assert (inspection.layers.bitmask > inspection.layers.dense).all()
    assert (inspection.totals[["bitmask", "2:4"]].sub(inspection.totals.dense, axis=0) == 0).all(axis=None)


def test_patterns_that_hold_and_groups_that_break_them(tmp_path):
    model = tiny_llama(hidden_size=36, intermediate_size=42, num_attention_heads=2)
    layers = find_linears(model.model.layers[0])
    groups = {
        "self_attn.q_proj": [1, 0, 0, 0],
        "self_attn.k_proj": [1, 0, 0, 1],
        "self_attn.v_proj": [1, 1, 1, 1],
    }
    for name, group in groups.items():
        write_weight(layers[name], torch.tensor(group * 9).expand_as(layers[name].weight).float())
    layers["self_attn.k_proj"].weight.data[5, 6] = 1
    layers["mlp.down_proj"].weight.data.zero_()
    found = inspected(model, tmp_path).layers.query("block == 0").set_index("layer")
    assert found.pattern.to_dict() == dict.fromkeys(found.index, "") | {"self_attn.q_proj": "1:4"}
    assert found.beyond_2_4["self_attn.k_proj"] == 1
    assert found.beyond_2_4["self_attn.v_proj"] == 36 * 9
    assert pd.isna(found.beyond_2_4["mlp.down_proj"]), "42 inputs, all zero: no groups of four"
    wider = tiny_llama()
    keep = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]).repeat(4)
    wider.model.layers[1].mlp.up_proj.weight.data.mul_(keep)
    found = inspected(wider, tmp_path).layers.query("block == 1").set_index("layer")
    assert found.pattern["mlp.up_proj"] == "4:8"
    assert found.beyond_2_4["mlp.up_proj"] == 48 * 4


def test_bytes_are_those_of_the_files(tmp_path):
    model = tiny_llama().bfloat16()
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(said | {"dtype": "float32"}))
    inspection = inspect_checkpoint(tmp_path, progress=False)
    assert inspection.totals.dense["checkpoint"] == sum(each.nbytes for each in model.parameters())


@pytest.fixture
def out(tmp_path, tokenizer):
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(TEXTS))
    arguments = ["prune", tmp_path / "model", "--out", tmp_path / "out", "--method", "magnitude", "--sparsity", "2:4"]
    arguments += ["--dataset", tmp_path / "text.txt", "--nsamples", "2", "--seqlen", "16"]
    assert main([str(each) for each in arguments]) == 0
    return tmp_path / "out"


def shown(folder, capsys, code=0):
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == code
    return capsys.readouterr().out


def test_the_command_shows_layers_totals_and_manifest(out, capsys):
    printed = shown(out, capsys)
    lines = printed.splitlines()
    assert " ".join(lines[0].split()) == "block layer shape sparsity pattern beyond 2:4 dense bitmask 2:4"
    assert " ".join(lines[5].split()) == "0 mlp.gate_proj 48 × 32 50.00% 2:4 0 6,144 3,264 3,264"
    assert len(lines) == 1 + 21 + 1 + 3 + 1 + 4
    assert " ".join(lines[24].split()) == "layers 23,040 50.00% 92,160 48,960 48,960"
    assert "sparselab.json: sparselab prune" in printed
    assert (
        f"magnitude, sparsity 2:4, percdamp 0.01, dataset {out.parent / 'text.txt'}, nsamples 2, seqlen 16" in printed
    )
    assert "sparselab 0.1.0, torch " in printed
    assert lines[-1] == "7 of 7 files are as its checksums say"


def test_files_that_are_not_what_they_were(out, capsys):
    shard = out / "model-00001-of-00006.safetensors"
    held = bytearray(shard.read_bytes())
    held[-1] ^= 1
    shard.write_bytes(held)
    (out / "report.csv").unlink()
    last = shown(out, capsys, 1).splitlines()[-1]
    assert last == f"5 of 7 files are as its checksums say; {shard.name} is changed; report.csv is missing"


def test_a_manifest_may_come_from_anybody(out, capsys):
    stamp = json.loads((out / "sparselab.json").read_text())
    hostile = {"line": "rm \x1b[2J\n-rf", "settings": {"model": ["a"], "seed": None}, "versions": 3}
    results = {"results": {"checksums": {"../model/config.json": "", "/etc/passwd": ""}, "perplexity": 12.5}}
    (out / "sparselab.json").write_text(json.dumps(stamp | hostile | results))
    printed = shown(out, capsys)
    assert "\x1b" not in printed
    assert "sparselab.json: rm ?[2J -rf" in printed
    assert "model ['a']\n" in printed
    assert printed.endswith("perplexity 12.50\n"), "and no word of files elsewhere"
    (out / "sparselab.json").write_text("{")
    assert shown(out, capsys).endswith("no sparselab.json: what this was made from is not known\n")
