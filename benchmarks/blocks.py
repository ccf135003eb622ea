"""Seconds and memory of blocks of LLaMA-2-7B's shape in bfloat16, on a GPU.

    python benchmarks/blocks.py

A random Llama of a few such blocks is pruned on 128 × 2048 random tokens: whole runs in turns beside two forward passes
of its blocks, then what the seconds of SparseGPT went into. The published flow, which takes long, runs once, on one
block, beside the others on that block. Writes `benchmarks/blocks.md`.
"""

import argparse
import shlex
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparselab.bench import Record, bench_model, machine, published_flow
from sparselab.bench.models import two_forwards
from sparselab.bench.timing import interleaved
from sparselab.files import markdown_table
from sparselab.pruning import prune

HERE = Path(__file__).resolve().parent
VOCABULARY = 2048


def make(blocks: int, hidden: int, device: torch.device) -> LlamaForCausalLM:
    """A random model, always the same."""
    shape = {"hidden_size": hidden, "intermediate_size": hidden * 43 // 16, "num_attention_heads": hidden // 128}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=blocks, max_position_embeddings=4096, **shape)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def stages(model: LlamaForCausalLM, windows: torch.Tensor, sparsity: str, repeats: int) -> dict[str, object]:
    """What the seconds of SparseGPT's run of median length went into."""
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    reports = []
    for _ in range(repeats + 1):
        model.load_state_dict(dense)
        reports.append(prune(model, windows, "sparsegpt", sparsity, progress=False))
    report = sorted(reports[1:], key=lambda each: each.seconds)[(repeats - 1) // 2]
    model.load_state_dict(dense)
    parts = {stage: f"{seconds:.3f}" for stage, seconds in report.stages.items()}
    return {"sparsity": sparsity, "s": f"{report.seconds:.2f}"} | parts


def one_block(windows: torch.Tensor, hidden: int, device: torch.device) -> str:
    """The published flow on one block, once, and what it stands beside."""
    model = make(1, hidden, device)
    runs = {
        "two forwards": partial(two_forwards, model, windows),
        "SparseGPT": partial(prune, model, windows, progress=False),
    }
    seconds = {name: median(taken) for name, taken in interleaved(runs, 2, device).items()}
    started = time.perf_counter()
    published_flow(model, windows, "50%")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds["published flow, once"] = time.perf_counter() - started
    return "One block, 50%: " + ", ".join(f"{name} {taken:.2f} s" for name, taken in seconds.items()) + "."


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--tokens", type=int, nargs=2, default=(128, 2048))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--out", type=Path, default=HERE / "blocks.md")
    options = parser.parse_args()
    windows = torch.randint(0, VOCABULARY, options.tokens, generator=torch.Generator().manual_seed(0))
    model = make(options.blocks, options.hidden, options.device)
    rows = bench_model(model, windows, repeats=options.repeats, published=False, progress=False)
    parts = pd.DataFrame([stages(model, windows, sparsity, options.repeats) for sparsity in ("50%", "2:4")])
    del model
    about = (
        f"{options.blocks} blocks, {options.tokens[0]} × {options.tokens[1]} tokens; SparseGPT, Wanda, magnitude at 50%"
    )
    command = shlex.join(["python", "benchmarks/blocks.py", *sys.argv[1:]])
    record = Record(command, machine(options.device), model=rows, about=about, day=date.today().isoformat())
    text = record.markdown + "\nSparseGPT, the run of median length:\n\n" + markdown_table(parts)
    text += f"\n{one_block(windows, options.hidden, options.device)}\n"
    options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
