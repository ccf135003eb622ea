"""SparseGPT on the bundled model beside llm-compressor, in turns, each in an environment and processes of its own.

    python -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python benchmarks/llm_compressor.py peer/bin/python

The same float32 weights and the same 128 × 256 tokens, 50%, percdamp 0.01. A process prunes twice; the second time
counts. Writes `benchmarks/llm_compressor.md`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "data" / "tiny"
ROUNDS = 5


def sparselab_run(tokens: Path, out: Path) -> dict[str, object]:
    """Prune by sparselab; called in a process of its own."""
    import torch
    import transformers

    import sparselab

    windows = torch.load(tokens, weights_only=True)
    for _ in range(2):
        model, _ = sparselab.load(MODEL, "cpu", "float32")
        started = time.perf_counter()
        sparselab.prune(model, windows, "sparsegpt", 0.5, progress=False)
        seconds = time.perf_counter() - started
    model.save_pretrained(out)
    return {"seconds": seconds, "version": sparselab.__version__, "transformers": transformers.__version__}


def peer_run(tokens: Path, out: Path) -> dict[str, object]:
    """Prune by llm-compressor; called by the interpreter that has it."""
    import llmcompressor
    import torch
    import transformers
    from datasets import Dataset
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier

    windows = torch.load(tokens, weights_only=True)
    columns = {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
    for _ in range(2):
        model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        recipe = SparseGPTModifier(
            sparsity=0.5, mask_structure="0:0", block_size=128, dampening_frac=0.01, ignore=["re:.*lm_head"]
        )
        count, seqlen = windows.shape
        started = time.perf_counter()
        llmcompressor.oneshot(
            model=model,
            dataset=Dataset.from_dict(columns),
            recipe=recipe,
            num_calibration_samples=count,
            max_seq_length=seqlen,
        )
        seconds = time.perf_counter() - started
    model.save_pretrained(out)
    return {"seconds": seconds, "version": llmcompressor.__version__, "transformers": transformers.__version__}


RUNS = {"sparselab": sparselab_run, "llm-compressor": peer_run}


def compare(peer: str) -> str:
    """Let both take turns, and tell what came out."""
    import torch

    import sparselab

    _, tokenizer = sparselab.load(MODEL, "cpu")
    held_out = sparselab.evaluation_tokens(tokenizer, "stdlib", nsamples=400)
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    about, perplexities = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder, "tokens.pt")
        torch.save(sparselab.calibration_tokens(tokenizer, "stdlib", nsamples=128, seqlen=256), tokens)
        for _ in range(ROUNDS):
            for name, python in zip(RUNS, (sys.executable, peer), strict=True):
                command = [python, __file__, "--run", name, str(tokens), str(Path(folder, name))]
                printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                about[name] = json.loads(printed.splitlines()[-1])
                seconds[name].append(about[name]["seconds"])
        for name in RUNS:
            tokenizer.save_pretrained(Path(folder, name))
            pruned, _ = sparselab.load(Path(folder, name), "cpu")
            perplexities[name] = sparselab.perplexity(pruned, held_out, progress=False)
    lines = ["| | version | transformers | s | lowest–highest | over sparselab | perplexity |", "|" + " --- |" * 7]
    for name, taken in seconds.items():
        ratio = median(taken) / median(seconds["sparselab"])
        lines.append(
            f"| {name} | {about[name]['version']} | {about[name]['transformers']} | {median(taken):.2f} "
            f"| {min(taken):.2f}–{max(taken):.2f} | {ratio:.2f} | {perplexities[name]} |"
        )
    return f"{time.strftime('%Y-%m-%d')}, `python benchmarks/llm_compressor.py`, medians of {ROUNDS}\n\n" + "\n".join(
        lines
    )


def main() -> None:
    """Compare; or, called by itself, do one of the runs and print what it took as the last line."""
    parser = argparse.ArgumentParser(description="SparseGPT on the bundled model beside llm-compressor.")
    parser.add_argument("peer", nargs="?", help="Python interpreter of an environment that has llm-compressor")
    parser.add_argument("--run", nargs=3, metavar=("WHOSE", "TOKENS", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        whose, tokens, out = options.run
        print(json.dumps(RUNS[whose](Path(tokens), Path(out))))
    elif options.peer:
        table = compare(options.peer)
        (HERE / "llm_compressor.md").write_text(table + "\n", encoding="utf-8")
        print(table)
    else:
        parser.error("expected the Python interpreter of an environment that has llm-compressor")


if __name__ == "__main__":
    main()
