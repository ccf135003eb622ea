"""Kill `sparselab prune` at random moments and let it go on: in the end, are the weights those of a quiet run.

    python benchmarks/kills.py --kills 25

Each process is a fork of this one, which has imported everything and computed nothing, and is ended by SIGKILL. When an
output is finished it is compared, file by file, and a new one is begun.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from sparselab.cli import main as sparselab
from sparselab.solvers.kernels import numba_sweep  # noqa: F401 - imported once for all processes
from sparselab.streaming import prune_checkpoint  # noqa: F401

PRUNE = ["prune", "tiny", "--nsamples", "32", "--seqlen", "128", "--resume", "--device", "cpu", "--out"]


def start(out: Path) -> int:
    """Begin pruning in a process of its own; its id."""
    if process := os.fork():
        return process
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os._exit(sparselab([*PRUNE, str(out)]))


def ended(process: int, wait: bool = False) -> int | None:
    """Its exit code, or None while it runs."""
    done, status = os.waitpid(process, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def checksums(folder: Path) -> dict[str, str]:
    """Of all files with weights."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def kill_often(kills: int, folder: Path, seed: int) -> tuple[int, float, int]:
    """Kill that many processes.

    Returns:
        Finished outputs that were compared, seconds of a quiet run, blocks that killed processes had finished.
    """
    draw, quiet, out = random.Random(seed), folder / "quiet", folder / "out"
    for _ in range(2):  # the first one compiles
        shutil.rmtree(quiet, ignore_errors=True)
        began = time.monotonic()
        assert ended(start(quiet), wait=True) == 0, "the quiet run failed"
        seconds = time.monotonic() - began
    expected, killed, compared, saved = checksums(quiet), 0, 0, 0
    while killed < kills or not compared or not saved:
        process = start(out)
        until = time.monotonic() + (draw.uniform(0, seconds) if killed < kills else 600)
        while (code := ended(process)) is None and time.monotonic() < until:
            time.sleep(0.001)
        if code is None:
            os.kill(process, signal.SIGKILL)
            ended(process, wait=True)
            killed += 1
            saved += len(list((folder / ".out.unfinished").glob("model-*.safetensors")))
            continue
        assert code == 0, f"exit code {code} after {killed} kills"
        assert checksums(out) == expected, f"other weights after {killed} kills"
        shutil.rmtree(out)
        compared += 1
    return compared, seconds, saved


def main() -> None:
    """Kill, and say what came of it."""
    parser = argparse.ArgumentParser(description="Kill sparselab prune at random moments.")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        compared, seconds, saved = kill_often(options.kills, options.folder or Path(temporary), options.seed)
    print(
        f"{options.kills} kills (seed {options.seed}), {saved} finished blocks found after them; {compared} finished "
        f"outputs, all with the checksums of the quiet run, which takes {seconds:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
