"""How fast it is: solvers and whole runs beside what the published tools do, in turns on one machine."""

from sparselab.bench.layers import SHAPES, bench_layers, mean_ratio
from sparselab.bench.models import bench_model
from sparselab.bench.published import column_loop, published_flow
from sparselab.bench.record import Record
from sparselab.bench.timing import machine

__all__ = ["SHAPES", "Record", "bench_layers", "bench_model", "column_loop", "machine", "mean_ratio", "published_flow"]
