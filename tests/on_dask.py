"""A sweep on a Dask cluster of two processes, one of which is killed; a script, as Dask leaves threads behind.

Arguments: a file with the grid, and the folder for results.
"""

import os
import signal
import sys

from distributed import LocalCluster

from sparselab.engines import dask_executor
from sparselab.sweeps import sweep

if __name__ == "__main__":
    grid, out = sys.argv[1:]
    killed: list[int] = []
    with LocalCluster(2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster:

        def kill(done, total):
            if done == 2 and not killed:
                killed.append(cluster.workers[0].pid)
                os.kill(killed[0], signal.SIGKILL)
                sys.stdout.write(f"killed one of {cluster.scheduler_address}\n")

        with dask_executor(cluster.scheduler_address) as executor:
            table = sweep(grid, out, executor, progress=kill)
    sys.stdout.write(f"{len(table)} runs, {(table.failure != '').sum()} failed\n")
