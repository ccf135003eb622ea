import json

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file, save_file

from sparselab.errors import ModelLoadError
from sparselab.models.checkpoint import INDEX, SINGLE, Checkpoint, checksum, write_index, write_shard


@pytest.fixture(params=["one file", "shards"])
def folder(request, tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="1GB" if request.param == "one file" else "20KB")
    return tmp_path


def test_reads_what_was_saved(folder):
    expected, checkpoint = tiny_llama().state_dict(), Checkpoint(folder)
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name, tensor in checkpoint.read(["lm_head.weight", "model.layers.2.mlp.down_proj.weight"]):
        assert torch.equal(tensor, expected.pop(name))
    assert len(expected) == len(checkpoint.shapes) - 2
    assert set(checkpoint.files) == set(folder.glob("*.safetensors"))


def test_what_is_written_is_read(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    digest = write_shard(tmp_path / "one.safetensors", tensors)
    assert digest == checksum(tmp_path / "one.safetensors")
    write_shard(tmp_path / "two.safetensors", {"c": torch.zeros(1)})
    write_index(tmp_path, {"one.safetensors": {"a": 48, "b": 4}, "two.safetensors": {"c": 4}})
    read = dict(Checkpoint(tmp_path).read(["c", "a", "b"]))
    assert torch.equal(read["a"], tensors["a"])
    assert read["b"].dtype == torch.bfloat16
    assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == 48 + 4 + 4


def break_index(folder, **places):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= places
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "outside", ["../other.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\b.safetensors", "model.bin"]
)
def test_an_index_does_not_lead_out_of_its_folder(tmp_path, outside):
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    save_file({"lm_head.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    break_index(folder, **{"lm_head.weight": outside})
    with pytest.raises(ModelLoadError, match=r"expected .safetensors files below its own folder"):
        Checkpoint(folder)


def test_damage_is_named(tmp_path):
    with pytest.raises(ModelLoadError, match="found neither; weights in other formats can run code"):
        Checkpoint(tmp_path)
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    name = next(iter(load_file(shard)))
    break_index(tmp_path, **{name: sorted(tmp_path.glob("*.safetensors"))[0].name})
    with pytest.raises(ModelLoadError, match=f"lacks {name}"):
        Checkpoint(tmp_path)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelLoadError, match=f"{shard.name}: cannot be read"):
        Checkpoint(tmp_path)
    shard.unlink()
    with pytest.raises(ModelLoadError, match=f"{shard.name}: cannot be read"):
        Checkpoint(tmp_path)
    for text in ("{", "[]", '{"weight_map": 3}'):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(ModelLoadError, match=f"{INDEX}: cannot be read"):
            Checkpoint(tmp_path)
    (tmp_path / INDEX).unlink()
    (tmp_path / SINGLE).write_bytes(b"not tensors")
    with pytest.raises(ModelLoadError, match=f"{SINGLE}: cannot be read"):
        Checkpoint(tmp_path)
