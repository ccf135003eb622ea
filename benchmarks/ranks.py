"""Two processes of one thread beside one process of one thread, on a random model, in turns.

    python benchmarks/ranks.py

`sparselab prune` by itself and under torchrun; the seconds are those of calibration and solve, as the command reports
them. Writes `benchmarks/ranks.md`.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import streaming

HERE = Path(__file__).resolve().parent
BLOCKS, ROUNDS = 4, 5
WINDOWS = ("64", "256")  # calibration windows, and tokens in each


def seconds(model: Path, ranks: int) -> float:
    """Of one run."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *several, "-m", "sparselab", "prune", str(model), "--out", f"{model}-out", "--overwrite"]
    command += ["--nsamples", WINDOWS[0], "--seqlen", WINDOWS[1], "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(re.search(r"layer error [\d.]+, ([\d.]+) s", done.stdout)[1])


def table(taken: Mapping[str, list[float]], what: str) -> str:
    """Seconds of each case over rounds, as Markdown."""
    rows = [f"| {name} | {median(each):.1f} | {min(each):.1f}–{max(each):.1f} |" for name, each in taken.items()]
    return "\n".join([f"| {what} | s | lowest–highest |", "| --- | --- | --- |", *rows])


def main() -> None:
    """Measure and write."""
    taken: dict[str, list[float]] = {"1": [], "2": []}
    with tempfile.TemporaryDirectory() as folder:
        streaming.make(Path(folder, "model"), BLOCKS)
        for _ in range(ROUNDS):
            for ranks, times in taken.items():
                times.append(seconds(Path(folder, "model"), int(ranks)))
    one, two = (median(times) for times in taken.values())
    text = (
        f"{time.strftime('%Y-%m-%d')}, `python benchmarks/ranks.py`: a random Llama of {BLOCKS} blocks, hidden size "
        f"{streaming.SHAPE['hidden_size']}, {WINDOWS[0]} × {WINDOWS[1]} tokens, SparseGPT 50%, gloo; medians of "
        f"{ROUNDS} runs in turns\n\n"
        + table(taken, "processes of one thread")
        + f"\n\nTwo are {one / two:.2f} times as fast as one.\n"
    )
    (HERE / "ranks.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
