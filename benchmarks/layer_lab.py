"""How long the layer lab takes to answer a move of a slider, on the bundled model's largest layers.

    python benchmarks/layer_lab.py

Calibration is cached, as in the notebook. Every move is one that the lab has not seen before; its time runs from the
change of the slider to the new PNG bytes in the widget. Writes `benchmarks/layer_lab/moves.csv` and `moves.md`.
"""

import time
from pathlib import Path

import pandas as pd
import torch

import sparselab
from sparselab import files
from sparselab.analysis import LayerStudy
from sparselab.widgets.layer_lab import LayerLab, State

OUT = Path(__file__).parent / "layer_lab"
MOVES = [0.05 * step for step in range(2, 18) if step != 10]


def main() -> None:
    """Measure and write."""
    model, tokenizer = sparselab.load("tiny", device="cpu")
    study = LayerStudy(model, tokenizer, "tiny", blocks=[0, 5])
    rows = []
    for projection in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"):
        lab = LayerLab(study, State(5, projection, "sparsegpt", "50%"))
        for sparsity in MOVES:
            started = time.perf_counter()
            lab.sparsity.value = sparsity
            rows.append({"layer": projection, "sparsity": sparsity, "seconds": time.perf_counter() - started})
    moves = pd.DataFrame(rows)
    table = moves.groupby("layer", sort=False).seconds.agg(["count", "median", "min", "max"]).reset_index()
    OUT.mkdir(exist_ok=True)
    files.write_text(OUT / "moves.csv", moves.round(4).to_csv(index=False))
    files.write_text(OUT / "moves.md", files.markdown_table(table.round(3)))
    print(table.round(3).to_string(index=False), f"\n{torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
