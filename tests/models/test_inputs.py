import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sparselab.models.blocks import Decoder
from sparselab.models.inputs import as_windows, batches, check_tokens

WINDOWS = torch.arange(12).view(3, 4)


@pytest.mark.parametrize(
    "form",
    [
        WINDOWS,
        list(WINDOWS),
        WINDOWS.tolist(),
        [row[None] for row in WINDOWS],
        [(row[None], row[None].clone()) for row in WINDOWS],
        [{"input_ids": row[None], "attention_mask": row[None]} for row in WINDOWS],
        DataLoader(TensorDataset(WINDOWS), batch_size=2),
        DataLoader(WINDOWS, batch_size=2),
    ],
    ids=["tensor", "rows", "lists", "batches of one", "pairs", "dicts", "dataset loader", "tensor loader"],
)
def test_every_form_gives_the_same_windows(form):
    assert torch.equal(as_windows(form), WINDOWS)


@pytest.mark.parametrize("nothing", [[], torch.empty(0, 4, dtype=torch.long), torch.empty(3, 0, dtype=torch.long)])
def test_empty_calibration_is_an_error(nothing):
    with pytest.raises(ValueError, match="at least one window"):
        as_windows(nothing)


def test_uneven_windows_and_wrong_types():
    with pytest.raises(ValueError, match=r"one length, received lengths \[3, 4\]"):
        as_windows([torch.zeros(3), torch.zeros(4)])
    for wrong in (7, "text", [None], [object()]):
        with pytest.raises(TypeError, match="expected token windows"):
            as_windows(wrong)


def test_tokens_must_suit_the_model(model):
    decoder = Decoder(model)
    with pytest.raises(ValueError, match="ids from 0 to 299, received 0 to 300"):
        check_tokens(decoder, torch.tensor([[0, 300]]))
    with pytest.raises(ValueError, match="received -1 to 1"):
        check_tokens(decoder, torch.tensor([[-1, 1]]))
    with pytest.raises(ValueError, match="64 positions, received windows of 65"):
        check_tokens(decoder, torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="whole numbers"):
        check_tokens(decoder, torch.zeros(1, 4))
    assert check_tokens(decoder, torch.zeros(1, 4, dtype=torch.int32)).dtype == torch.long


def test_batches_cover_all_in_order():
    cpu = torch.device("cpu")
    assert torch.equal(torch.cat(list(batches(WINDOWS, 2, cpu))), WINDOWS)
    assert [len(batch) for batch in batches(torch.zeros(9, 256, dtype=torch.long), None, cpu)] == [4, 4, 1]
    assert [len(batch) for batch in batches(torch.zeros(2, 4096, dtype=torch.long), None, cpu)] == [1, 1]
    with pytest.raises(ValueError, match="batch_size"):
        list(batches(WINDOWS, 0, cpu))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("wrong", [1.5, "2", True])
def test_a_batch_is_a_whole_number_of_windows(wrong):
    with pytest.raises(TypeError, match="batch_size: expected a whole number"):
        list(batches(WINDOWS, wrong, torch.device("cpu")))
