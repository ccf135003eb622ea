import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from sparselab import solvers, storage
from sparselab.storage import checkpoint_bytes, csr_parts, decode, encode, encoded_bytes, storage_table

DTYPES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


@st.composite
def weights(draw, multiple=1):
    """Any shape, sparsity and dtype; with NaN, infinities and a negative zero at times."""
    d_out, d_in = draw(st.integers(0, 9)), multiple * draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    weight = torch.randn(d_out, d_in, generator=generator).to(draw(st.sampled_from(list(DTYPES))))
    weight[torch.rand(d_out, d_in, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))] = 0
    if weight.numel():
        weight[-1, -1] = draw(st.sampled_from([1.0, 0.0, -0.0, float("nan"), float("inf"), 6e-8]))
    return weight


def same_bits(one, other) -> bool:
    """The same to the last bit, but for the sign of zero."""
    bits = {4: torch.int32, 2: torch.int16}[one.element_size()]
    return torch.equal((one + 0).view(bits), (other + 0).view(bits))


@given(weights(), st.sampled_from(["dense", "bitmask", "CSR"]))
def test_any_weight_comes_back_in_formula_many_bytes(weight, form):
    made = encode(weight, form)
    back = decode(made)
    assert back.dtype == weight.dtype
    assert back.shape == weight.shape
    assert same_bits(back, weight)
    n, k, b = weight.numel(), int((weight != 0).sum()), DTYPES[weight.dtype]
    sizes = {"dense": n * b, "bitmask": k * b + -(-n // 8), "CSR": k * (b + 4) + 4 * (len(weight) + 1)}
    assert made.nbytes == sizes[form] == encoded_bytes((len(weight), weight.shape[1]), k, b)[form]
    assert sum(len(part.view(torch.uint8).numpy().tobytes()) for part in made.parts.values()) == made.nbytes


@given(weights(multiple=4))
def test_two_of_four_comes_back_in_formula_many_bytes(weight):
    pruned = solvers.magnitude(weight.nan_to_num(1, 1, 1), "2:4")
    made = encode(pruned, "2:4")
    assert same_bits(decode(made), pruned)
    n = weight.numel()
    assert made.nbytes == n // 2 * DTYPES[weight.dtype] + -(-n // 8)
    k = int((pruned != 0).sum())
    assert made.nbytes == encoded_bytes((len(weight), weight.shape[1]), k, DTYPES[weight.dtype])["2:4"]


def test_two_of_four_places_are_two_bits_each():
    made = encode(torch.tensor([[0.0, 5, 0, 7], [1, 0, 0, 0]]), "2:4")
    assert made.parts["values"].tolist() == [5, 7, 1, 0]
    assert made.parts["places"].tolist() == [1 | 3 << 2 | 0 << 4 | 1 << 6]


def test_csr_is_what_torch_makes():
    weight = solvers.magnitude(torch.randn(7, 12, generator=torch.Generator().manual_seed(0)), 0.6)
    parts, sparse = csr_parts(weight), weight.to_sparse()
    assert parts["columns"].tolist() == sparse.indices()[1].tolist()
    assert parts["values"].tolist() == sparse.values().tolist()
    assert parts["rows"].diff().tolist() == (weight != 0).sum(dim=1).tolist()
    assert {part.dtype for name, part in parts.items() if name != "values"} == {torch.int32}


def test_an_encoded_weight_shares_no_memory_with_its_source():
    weight = torch.ones(2, 4)
    made = encode(weight, "dense")
    weight.zero_()
    back = decode(made)
    back.fill_(3)
    assert decode(made).tolist() == torch.ones(2, 4).tolist()


@pytest.mark.parametrize(
    ("weight", "form", "message"),
    [
        (torch.ones(2, 4), "zip", "expected one of dense, bitmask, 2:4, CSR, received 'zip'"),
        (torch.zeros(2, 6), "2:4", "d_in to be a multiple of 4, received 6"),
        (torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0]]), "2:4", "received 1 groups with more"),
    ],
)
def test_what_cannot_be_encoded(weight, form, message):
    with pytest.raises(ValueError, match=message):
        encode(weight, form)


def test_the_table_tries_every_form_that_fits():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    table = storage_table(weight, ["0%", "50%", "2:4"], list(DTYPES))
    assert len(table) == 3 * (3 + 3 + 4)
    assert table.exact.all()
    assert set(table.pattern[table.form == "2:4"]) == {"2:4"}
    assert (table.ratio[table.form == "dense"] == 1).all()
    sizes = table[table.dtype == "bfloat16"].set_index(["pattern", "form"]).bytes
    assert sizes["0%", "bitmask"] == 512 * 2 + 64
    assert sizes["50%", "bitmask"] == sizes["2:4", "2:4"] == 256 * 2 + 64
    assert sizes["50%", "CSR"] == 256 * 6 + 36


def test_the_table_reports_a_form_that_loses_something(monkeypatch):
    lossy = (storage.FORMS["dense"][0], lambda parts, _: parts["values"] * 0)
    monkeypatch.setitem(storage.FORMS, "dense", lossy)
    table = storage_table(torch.ones(2, 4), ["0%"], [torch.float32])
    assert dict(zip(table.form, table.exact, strict=True)) == {"dense": False, "bitmask": True, "CSR": True}


def test_zeros_do_not_make_a_checkpoint_smaller_but_compressible(llama):
    before = checkpoint_bytes(llama, torch.bfloat16)
    values = {name: value.clone() for name, value in llama.state_dict().items()}
    kept = sum(value.numel() for value in values.values())
    assert 2 * kept < before["safetensors"] < 2 * kept + 10_000
    for linear in (module for module in llama.model.layers.modules() if isinstance(module, torch.nn.Linear)):
        linear.weight.data = solvers.magnitude(linear.weight.data, 0.75)
    after = checkpoint_bytes(llama, torch.bfloat16)
    assert after["safetensors"] == before["safetensors"]
    assert after["zlib"] < 0.9 * before["zlib"]
    assert after["bitmask"] < 0.8 * before["bitmask"]
    assert before["bitmask"] <= 2 * kept, "matrices without zeros are kept dense"
    assert checkpoint_bytes(llama, torch.float32)["safetensors"] > 1.9 * after["safetensors"]


def test_the_file_is_the_one_that_would_be_saved(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert checkpoint_bytes(llama, torch.float32)["safetensors"] == pytest.approx(size, abs=100), "metadata apart"
    assert len(load_file(tmp_path / "model.safetensors")) == len(llama.state_dict())


def test_tied_tensors_count_once(llama):
    tied = LlamaForCausalLM(type(llama.config)(**llama.config.to_dict() | {"tie_word_embeddings": True}))
    less = 4 * llama.lm_head.weight.numel()
    difference = checkpoint_bytes(llama, torch.float32)["bitmask"] - checkpoint_bytes(tied, torch.float32)["bitmask"]
    assert difference == less
