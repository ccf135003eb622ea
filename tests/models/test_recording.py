import math
from contextlib import suppress

import pytest
import torch
from torch import nn

from sparselab.errors import NonFiniteError, SparselabError, UnsupportedModelError
from sparselab.models.blocks import Call, Decoder, evaluating
from sparselab.models.recording import AllInputsSeen, collect_statistics, shared_tensors


class Block(nn.Module):
    """q and k see one tensor, o another of the same values, d one changed in place; `idle` is not called."""

    def __init__(self, idle: bool = False) -> None:
        super().__init__()
        for name in ("q", "k", "o", "d"):
            setattr(self, name, nn.Linear(6, 6, bias=False))
        if idle:
            self.idle = nn.Linear(6, 6)
        self.share = True

    def forward(self, x):
        y = self.q(x) + self.k(x if self.share else x.clone()) + self.o(x.clone())
        x.mul_(2)
        return y + self.d(x)


def test_shared_inputs_are_summed_once_and_others_apart():
    block, inputs = Block(), [torch.randn(2, 5, 6), torch.randn(1, 3, 6)]
    rows = torch.cat([x.flatten(0, 1) for x in inputs])
    with torch.no_grad(), collect_statistics(block, "b", True) as seen:
        for x in inputs:
            block(x.clone())
    assert seen["q"] is seen["k"]
    assert seen["o"] is not seen["q"]
    assert seen["d"] is not seen["q"], "changed in place between the two"
    torch.testing.assert_close(seen["q"].hessian, rows.T @ rows)
    torch.testing.assert_close(seen["o"].hessian, rows.T @ rows)
    torch.testing.assert_close(seen["d"].hessian, 4 * rows.T @ rows)
    assert {name: s.tokens for name, s in seen.items()} == dict.fromkeys("qkod", 13)
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_llama_has_four_distinct_inputs_a_block(llama, tokens):
    decoder = Decoder(llama)
    with evaluating(llama):
        hidden, calls = decoder.embed(tokens)
        with collect_statistics(decoder.blocks[0], "b", False) as seen:
            decoder.run_block(0, hidden, calls[0])
    assert len({id(s) for s in seen.values()}) == 4
    assert seen["self_attn.q_proj"] is seen["self_attn.v_proj"]
    assert seen["mlp.gate_proj"] is seen["mlp.up_proj"]


def test_inputs_that_count_no_changes_are_summed_apart():
    with torch.inference_mode():
        block, x = Block(), torch.randn(2, 5, 6)
        rows = x.flatten(0, 1).clone()
        with collect_statistics(block, "b", True) as seen:
            block(x)
    assert len({id(s) for s in seen.values()}) == 4
    torch.testing.assert_close(seen["k"].hessian, rows.T @ rows)
    torch.testing.assert_close(seen["d"].hessian, 4 * rows.T @ rows)


def test_a_pass_ends_when_all_inputs_are_seen():
    block, calls = Block(), []
    block.d.register_forward_hook(lambda *_: calls.append("d"))
    inputs = [torch.randn(2, 5, 6), torch.randn(1, 3, 6)]
    with torch.no_grad(), collect_statistics(block, "b", True) as whole:
        for x in inputs:
            block(x.clone())
    assert len(calls) == 2
    with torch.no_grad(), collect_statistics(block, "b", True, inputs_only=True) as ended:
        block(inputs[0].clone())
        with pytest.raises(AllInputsSeen):
            block(inputs[1].clone())
    assert len(calls) == 3, "in the second pass the last layer has multiplied nothing"
    assert all(torch.equal(ended[name].hessian, whole[name].hessian) for name in "qkod")
    block.o._hf_hook = None  # accelerate moves weights in and out by such hooks, which have to run to the end
    with torch.no_grad(), collect_statistics(block, "b", True, inputs_only=True):
        block(inputs[0].clone())
        block(inputs[1].clone())
    assert len(calls) == 5


def test_a_layer_called_twice_in_a_pass_sees_all_of_its_inputs():
    class Chunked(Block):
        def forward(self, x):
            return torch.cat([Block.forward(self, part.clone()) for part in x.split(2, dim=1)], dim=1)

    rows, block = torch.randn(4, 6, 6), Chunked()
    with torch.no_grad(), collect_statistics(block, "b", True, inputs_only=True) as seen:
        for x in rows.split(1):
            with suppress(AllInputsSeen):
                block(x)
    assert {name: s.tokens for name, s in seen.items()} == dict.fromkeys("qkod", 24)


def test_trouble_names_the_layer():
    block = Block()
    with pytest.raises(NonFiniteError, match=r"blocks\.3\.q: a layer's inputs are NaN"), torch.no_grad():
        with collect_statistics(block, "blocks.3", True):
            block(torch.full((1, 2, 6), math.nan))
    assert not block.q._forward_pre_hooks, "hooks stay behind after an error"
    idle = Block(idle=True)
    with pytest.raises(UnsupportedModelError, match=r"b\.idle: expected calibration tokens"), torch.no_grad():
        with collect_statistics(idle, "b", True):
            idle(torch.randn(1, 2, 6))
    with pytest.raises(SparselabError, match=r"b\.k: shares its input .* in some passes only"), torch.no_grad():
        with collect_statistics(block, "b", True):
            block(torch.randn(1, 2, 6))
            block.share = False
            block(torch.randn(1, 2, 6))


def test_equal_tensors_of_batches_are_kept_once():
    earlier = [Call((), {"mask": torch.ones(3), "rotary": (torch.zeros(2), torch.ones(2)), "flag": False})]
    now = [Call((), {"mask": torch.ones(4), "rotary": (torch.zeros(2), torch.full((2,), 5.0)), "flag": False})]
    (shared,) = shared_tensors(now, earlier)
    assert shared.kwargs["rotary"][0] is earlier[0].kwargs["rotary"][0]
    assert shared.kwargs["rotary"][1] is now[0].kwargs["rotary"][1]
    assert shared.kwargs["mask"] is now[0].kwargs["mask"]
    assert shared.kwargs["flag"] is False
