"""Peak memory of `sparselab prune` against depth, and its time beside pruning in memory, on random models.

    python benchmarks/streaming.py

Two models that differ only in their number of blocks are pruned from their files, each in a process of its own: its
peak resident memory above that of a process which only imports torch; and the smaller model's time, in turns, beside
that of opening it whole, pruning it, and saving it. Writes `benchmarks/streaming.md`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
SHAPE = {"hidden_size": 1280, "intermediate_size": 3456, "num_attention_heads": 20, "num_key_value_heads": 20}
BLOCKS, TOKENS, ROUNDS = (8, 48), (32, 256), 5


def torch_only(_: Path) -> None:
    """What Python and torch take by themselves."""
    import torch

    torch.ones(1)


def libraries(folder: Path) -> None:
    """What the package and the libraries under it take, its kernels compiled, with hardly a model."""
    import sparselab

    model, tokenizer = sparselab.stream("tiny", "cpu")
    sparselab.prune_checkpoint(model, tokenizer, windows()[:1, :8], folder / "tiny-pruned", progress=False)


def streamed(folder: Path) -> None:
    """Prune from files to files."""
    import sparselab

    model, tokenizer = sparselab.stream(folder, "cpu")
    sparselab.prune_checkpoint(model, tokenizer, windows(), f"{folder}-pruned", overwrite=True, progress=False)


def whole(folder: Path) -> None:
    """Open, prune and save the model as a whole."""
    import sparselab

    model, tokenizer = sparselab.load(folder, "cpu")
    sparselab.prune(model, windows(), progress=False)
    model.save_pretrained(f"{folder}-saved")
    tokenizer.save_pretrained(f"{folder}-saved")


RUNS = {run.__name__: run for run in (torch_only, libraries, streamed, whole)}


def windows():
    """Random calibration tokens, always the same."""
    import torch

    return torch.randint(0, 2048, TOKENS, generator=torch.Generator().manual_seed(0))


def make(folder: Path, blocks: int) -> int:
    """Save a random Llama; returns the bytes of its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import sparselab

    _, tokenizer = sparselab.stream("tiny")
    LlamaForCausalLM(LlamaConfig(vocab_size=2048, num_hidden_layers=blocks, **SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measured(run: str, folder: Path) -> dict[str, float]:
    """Seconds and peak resident bytes of a run in a process of its own."""
    command = [sys.executable, __file__, "--run", run, str(folder)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(printed.splitlines()[-1])
    return result


def peak_memory() -> int:
    """Most resident bytes so far of this program; what getrusage says would include the process that started it."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def compare() -> str:
    """Make the models, run everything, and tell."""
    lines = ["| blocks | checkpoint MB | peak MB above torch's | of the checkpoint |", "|" + " --- |" * 4]
    peaks, seconds = {}, {"streamed": [], "whole": []}
    with tempfile.TemporaryDirectory() as temporary:
        base = measured("torch_only", Path(temporary))["peak"]
        least = measured("libraries", Path(temporary))["peak"] - base
        sizes = {blocks: make(Path(temporary, str(blocks)), blocks) for blocks in BLOCKS}
        for blocks, size in sizes.items():
            peaks[blocks] = measured("streamed", Path(temporary, str(blocks)))["peak"] - base
            share = f"{peaks[blocks] / size:.0%}"
            lines.append(f"| {blocks} | {size / 1e6:.0f} | {peaks[blocks] / 1e6:.0f} | {share} |")
        for _ in range(ROUNDS):
            for run, taken in seconds.items():
                taken.append(measured(run, Path(temporary, str(BLOCKS[0])))["seconds"])
    growth = peaks[BLOCKS[1]] / peaks[BLOCKS[0]]
    medians = {run: median(taken) for run, taken in seconds.items()}
    ranges = {run: f"{medians[run]:.1f} s ({min(taken):.1f} to {max(taken):.1f})" for run, taken in seconds.items()}
    return "\n".join(
        [
            f"{time.strftime('%Y-%m-%d')}, `python benchmarks/streaming.py`: random Llamas, hidden size "
            f"{SHAPE['hidden_size']}, float32, {TOKENS[0]} × {TOKENS[1]} tokens, SparseGPT 50%",
            "",
            *lines,
            "",
            f"{BLOCKS[1]} blocks take {growth:.2f} times the memory of {BLOCKS[0]}. Torch alone takes "
            f"{base / 1e6:.0f} MB; of what is above it, {least / 1e6:.0f} MB are other libraries and compiled kernels "
            "(what pruning `tiny` on 8 tokens takes).",
            "",
            f"{BLOCKS[0]} blocks, imports aside, medians of {ROUNDS} processes in turns: from files to files "
            f"{ranges['streamed']}; opened whole, pruned and saved {ranges['whole']}; "
            f"ratio {medians['streamed'] / medians['whole']:.2f}.",
        ]
    )


def main() -> None:
    """Compare; or, called by itself, do one of the runs and print what it took as the last line."""
    parser = argparse.ArgumentParser(description="Peak memory and time of pruning from files to files.")
    parser.add_argument("--run", nargs=2, metavar=("WHICH", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.run:
        text = compare()
        (HERE / "streaming.md").write_text(text + "\n", encoding="utf-8")
        print(text)
        return
    which, folder = options.run
    if which != "torch_only":
        import sparselab.pruning
        import sparselab.streaming  # noqa: F401 - not part of the time
    started = time.perf_counter()
    RUNS[which](Path(folder))
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak": peak_memory()}))


if __name__ == "__main__":
    main()
