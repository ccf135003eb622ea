"""What each process of `test_zero.py` does: prune a model that DeepSpeed has partitioned, and say what came of it.

torchrun --nproc_per_node 2 partitioned.py HOW TOKENS OUT
"""

import sys
from pathlib import Path

import deepspeed
import pytest
import torch
from conftest import tiny_llama, tiny_opt
from deepspeed import zero
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from safetensors.torch import load_file, save_file

from sparselab import SparseGPT, collect, perplexity, prune, prune_checkpoint, stream
from sparselab.errors import NonFiniteError
from sparselab.methods import METHODS
from sparselab.ranks import joined

CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def partitioned(how: str):
    """Partitioned as it was made, with weights of 16 bits, or by the engine that runs it."""
    model = tiny_opt().bfloat16() if how == "half" else tiny_llama(num_hidden_layers=6)
    if how == "served":
        engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
        engine.eval()
        return engine.module
    config = CONFIG | ({"bf16": {"enabled": True}} if how == "half" else {})
    zero.Init(module=model, config_dict_or_path=config, mem_efficient_linear=False)
    return model


def hooks(model):
    return [list(kind) for each in model.modules() for kind in (each._forward_hooks, each._forward_pre_hooks)]


def check_refused(model, tokens, rank: int) -> None:
    with pytest.raises(ValueError, match="expected True for a model that DeepSpeed"):
        prune(model, tokens, progress=False)
    with pytest.raises(ValueError, match="leave use_zero out"):
        prune(tiny_llama(), tokens, use_zero=True, progress=False)
    with pytest.raises(ValueError, match="calib: expected the same in all 2 processes"):
        prune(model, tokens + rank, use_zero=True, progress=False)
    with pytest.raises(ValueError, match="ranks: expected those from joined for a partitioned model"):
        prune_checkpoint(*stream("tiny", "cpu", zero=True), tokens, "nowhere", progress=False)
    trained = tiny_llama()
    engine, *_ = deepspeed.initialize(model=trained, config=CONFIG, optimizer=torch.optim.AdamW(trained.parameters()))
    with pytest.raises(ValueError, match="expected a model without an optimizer"):
        prune(engine.module, tokens, use_zero=True, progress=False)


def main() -> None:
    with joined() as ranks:
        deepspeed.init_distributed(verbose=False)
        work(sys.argv[1], load_file(sys.argv[2])["tokens"], Path(sys.argv[3]), ranks.rank)


def work(how: str, tokens: torch.Tensor, out: Path, rank: int) -> None:
    model = partitioned(how)
    if how == "fails":  # in one process only: the other one must not be waited for
        solve = METHODS["sparsegpt"].solve

        def failing(*arguments):
            if rank == 1:
                raise NonFiniteError("this one fails")
            return solve(*arguments)

        METHODS["sparsegpt"] = METHODS["sparsegpt"]._replace(solve=failing)
        prune(model, tokens, use_zero=True, progress=False)
        raise AssertionError("it should have failed")
    if how == "made":
        check_refused(model, tokens, rank)
    before = hooks(model)
    dense = perplexity(model, tokens, progress=False)
    traces = [seen.hessian.trace().item() for seen in collect(model, tokens, progress=False).values()]
    pruner = SparseGPT(model)
    pruner.prune(tokens, 0.5, use_zero=True, progress=False)
    assert hooks(model) == before
    assert all(parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE for parameter in model.parameters())
    pruned = perplexity(model, tokens, progress=False)
    measured = {"dense": dense.nll, "pruned": pruned.nll, "traces": torch.tensor(traces)}
    if how == "served":
        with torch.no_grad():
            measured["logits"] = model(tokens).logits
    pruner.report.layers.to_csv(out / f"report-{rank}.csv", index=False)
    elements = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
    save_file(measured | {"elements": torch.tensor(elements)}, out / f"measured-{rank}.safetensors")
    with zero.GatheredParameters(list(model.parameters())):
        weights = {name: weight.detach().clone().contiguous() for name, weight in model.named_parameters()}
    save_file(weights, out / f"weights-{rank}.safetensors")


if __name__ == "__main__":
    main()
