"""What the command line takes: commands, options, and which values of them make no sense."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparselab import __version__
from sparselab.sources import PAPERS

if TYPE_CHECKING:
    from sparselab.allocation import Allocation
    from sparselab.solvers import Pattern

T = TypeVar("T")

_METHODS = "magnitude, wanda, ria, sparsegpt, admm; or one with other weights: +none, +sweep, +cg, +exact"
_TEXTS = f"stdlib, {', '.join(PAPERS)}, a file or folder, or owner/name[:config[:split[:column]]] on the hub"
Runs = dict[str, Callable[[argparse.Namespace], None]]


def build_parser(runs: Runs) -> argparse.ArgumentParser:
    """The parser of the command line; its result has the command's function as `run`.

    Args:
        runs: a function for each of the commands compare, table, sweep, report, prune, eval, samples, inspect, replay,
            bench and train.
    """
    parser = argparse.ArgumentParser(
        prog="sparselab", description="One-shot pruning of language models: magnitude, Wanda and SparseGPT, measured."
    )
    parser.add_argument("--version", action="version", version=f"sparselab {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_compare(commands, runs)
    _add_table(commands, runs)
    _add_sweep(commands, runs)
    _add_report(commands, runs)
    _add_prune(commands, runs)
    _add_eval(commands, runs)
    _add_samples(commands, runs)
    _add_inspect(commands, runs)
    _add_replay(commands, runs)
    _add_bench(commands, runs)
    _add_train(commands, runs)
    return parser


def _add_compare(commands: Any, runs: Runs) -> None:
    parser = _command(
        commands, "compare", runs, "prune one model by every method and print what each cost",
        "sparselab compare tiny --out demo --sparsity 50% 2:4",
    )  # fmt: skip
    _add_model(parser, optional=True)
    _add_output(parser, "folder for runs.csv, layers.csv and figures")
    _add_grid(parser, ["50%", "60%", "70%", "2:4"])
    _add_solver(parser)
    _add_calibration(parser, seeds=True)
    _add_bos(parser)
    parser.add_argument(
        "--eval-dataset", type=_dataset, default="stdlib", help="text to evaluate on (default: stdlib, held-out part)"
    )
    parser.add_argument("--eval-nsamples", type=_at_least(1), default=400, help="evaluation windows (default: 400)")
    _add_machine(parser)


def _add_table(commands: Any, runs: Runs) -> None:
    parser = _command(
        commands, "table", runs, "make the papers' tables for a model, beside the published figures",
        "sparselab table facebook/opt-125m --out opt",
    )  # fmt: skip
    parser.description = (
        "Prune a model by every method and pattern, and measure each on every text as the papers do; the dense model "
        "first. Verdicts beside published figures: 'agrees', within 2% (dense: 0.5%; draws of calibration text move "
        "SparseGPT at 50% by 0.5%); 'differs'; 'not comparable', and what was done otherwise, or because the dense "
        "model differs; 'order only' for magnitude, on whose figures papers do not agree; none where nothing is "
        "published. For other patterns than 50% it is not known what draws do: try other seeds there."
    )
    _add_model(parser)
    _add_output(parser, "folder for table.csv and table.md")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted table stopped, if one did")
    _add_grid(parser, ["50%", "4:8", "2:4"])
    _add_calibration(parser, dataset="c4", seqlen=None)
    parser.add_argument(
        "--eval-dataset", nargs="+", type=_dataset, default=list(PAPERS), metavar="TEXT",
        help=f"texts to evaluate on (default: {' '.join(PAPERS)})",
    )  # fmt: skip
    parser.add_argument("--eval-nsamples", type=_at_least(1), help="evaluation windows of each (default: all)")
    _add_machine(parser)


def _add_sweep(commands: Any, runs: Runs) -> None:
    parser = _command(
        commands, "sweep", runs, "do every run of a grid that is not done yet", "sparselab sweep grid.yaml --out runs"
    )
    parser.description = (
        "Do every run of a grid: parameters of notebooks/sweep_run.ipynb with a list of values each, all with all, but "
        "for what 'exclude' lists. Whatever ends it, the same command goes on; what is done is not done again."
    )
    parser.add_argument("grid", metavar="GRID", help="YAML, as in 'sparsity: [0.5, 2:4]', a line a parameter")
    parser.add_argument("--out", required=True, help="folder that collects results")
    parser.add_argument("--dry-run", action="store_true", help="only say how many runs there are, and what they take")
    parser.add_argument("--retry", action="store_true", help="also do again what has failed")
    parser.add_argument(
        "--no-notebooks",
        action="store_true",
        help="do without an executed notebook for each run: quicker, same numbers",
    )
    parser.add_argument(
        "--workers", type=_at_least(1), default=1, metavar="N", help="processes, which share the cores (default: 1)"
    )
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="of a Dask cluster, as tcp://host:8786; or slurm: --workers jobs, as Dask is configured",
    )


def _add_report(commands: Any, runs: Runs) -> None:
    parser = _command(
        commands, "report", runs, "show a sweep as one page: figures, failures, a table", "sparselab report runs"
    )
    parser.description = (
        "Write report.html into the folder of a sweep: curves with seed bands, cost beside quality, failures, all runs "
        "in a table with filters, and how they were made; and the results as results.csv and results.parquet."
    )
    parser.add_argument("folder", metavar="DIR", help="folder of results; below it others are found too")
    parser.add_argument("--where", default="", metavar="QUERY", help="""only some, as 'method != "magnitude"'""")


def _add_prune(commands: Any, runs: Runs) -> None:
    parser = _command(
        commands, "prune", runs, "prune a model and save it",
        "sparselab prune tiny --out tiny-24 --method sparsegpt --sparsity 2:4",
    )  # fmt: skip
    parser.usage = "sparselab prune model --out OUT [options]"  # with all of them the help would not fit on a screen
    _add_model(parser)
    _add_output(parser, "folder for the pruned model")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped, if one was")
    _add_spill(parser)
    parser.add_argument("--zero", action="store_true", help="with torchrun: partition the model among processes")
    parser.add_argument("--force", action="store_true", help="begin even if memory or disk do not seem to suffice")
    parser.add_argument("--method", type=_method, default="sparsegpt", metavar="M", help=_METHODS)
    parser.add_argument(
        "--sparsity", type=_allocation, default="50%", metavar="S",
        help="0.5, 50%% or 2:4; or rules by block and layer, the first that fits deciding: "
        "'0=dense,1-3:mlp.*=70%%,*=50%%' (default: 50%%)",
    )  # fmt: skip
    parser.add_argument("--owl", action="store_true", help="give blocks with more outliers a lower sparsity")
    parser.add_argument("--wbits", type=_at_least(1), help="also round weights to so many bits, while pruning")
    parser.add_argument(
        "--true-sequential",
        action="store_true",
        help="calibrate each layer on the pruned layers before it in the block",
    )
    parser.add_argument(
        "--retries",
        type=_at_least(0),
        default=0,
        help="times percdamp may be raised for a singular Hessian (default: 0)",
    )
    parser.add_argument(
        "--measure-gap", action="store_true", help="also report how far each layer is from the best under its mask"
    )
    _add_kernel(parser)
    parser.add_argument(
        "--propagate", choices=("pruned", "dense"), default="pruned", help="what each block is calibrated on"
    )
    _add_solver(parser)
    _add_calibration(parser)
    _add_bos(parser)
    _add_batch_size(parser)
    _add_machine(parser)


def _add_eval(commands: Any, runs: Runs) -> None:
    parser = _command(
        commands, "eval", runs, "measure a model's perplexity, and its answers in tasks",
        "sparselab eval tiny --dataset stdlib my-texts/ --seqlen 256",
    )  # fmt: skip
    _add_model(parser)
    parser.add_argument(
        "--dataset", nargs="+", type=_dataset, metavar="TEXT",
        help=f"{_TEXTS}; several one after another (default: stdlib, held-out part; with --tasks none)",
    )  # fmt: skip
    parser.add_argument("--nsamples", type=_at_least(1), default=None, help="windows of each (default: all there are)")
    parser.add_argument("--seqlen", type=_at_least(2), default=256, help="tokens a window (default: 256)")
    _add_bos(parser)
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="of lm-eval, such as arc_easy; opens the model whole"
    )
    parser.add_argument("--num-fewshot", type=_at_least(0), metavar="N", help="examples before each question")
    parser.add_argument("--limit", type=_at_least(1), metavar="N", help="of each task the first N questions only")
    parser.add_argument("--include-path", metavar="FOLDER", help="with definitions of tasks of your own")
    _add_output(parser, "folder for a manifest with the numbers, for sparselab replay (default: none)", needed=False)
    _add_spill(parser)
    _add_batch_size(parser)
    _add_machine(parser)


def _add_samples(commands: Any, runs: Runs) -> None:
    parser = _command(
        commands, "samples", runs, "let several models complete the same prompts",
        "sparselab samples tiny tiny-24 --prompt 'def main('",
    )  # fmt: skip
    parser.add_argument("models", nargs="+", metavar="MODEL", help="'tiny', model folders or hub ids")
    _add_trust(parser)
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="(default: beginnings of windows of --dataset)")
    parser.add_argument(
        "--dataset", type=_dataset, default="stdlib", metavar="TEXT", help=f"{_TEXTS} (default: stdlib)"
    )
    parser.add_argument("--nsamples", type=_at_least(1), default=3, help="prompts of the text (default: 3)")
    parser.add_argument("--prompt-tokens", type=_at_least(1), default=48, help="of each (default: 48)")
    parser.add_argument("--max-new-tokens", type=_at_least(1), default=40, help="of a completion (default: 40)")
    _add_machine(parser)


def _add_inspect(commands: Any, runs: Runs) -> None:
    parser = _command(
        commands, "inspect", runs, "show a model's zeros and bytes, layer by layer, and its manifest",
        "sparselab inspect tiny-24",
    )  # fmt: skip
    parser.description = (
        "Count the zeros of each layer, the groups that break 2:4, and the bytes it takes, or would take as a bitmask "
        "or in 2:4 form; then of the whole checkpoint; then what its manifest says. Exit code 1 if files are not as "
        "the manifest's checksums say."
    )
    _add_model(parser)


def _add_replay(commands: Any, runs: Runs) -> None:
    from sparselab.files import STAMP

    parser = _command(
        commands, "replay", runs, "run a command again as a manifest says, and compare the numbers",
        "sparselab replay demo --tolerance 1e-4",
    )  # fmt: skip
    parser.description = (
        f"Run compare, table, prune or eval again as a manifest says ({STAMP}, in every output), and compare: first "
        "model, text and settings, then versions and machine, then the numbers. If other things would go in, other "
        "weights or the text of another Python's library, nothing is run without --force. Seconds and memory are not "
        "compared. "
        "Relative paths in the manifest are read from the current folder. Exit code: 0 it agrees, 1 it does not or "
        "failed, 2 wrong usage."
    )
    parser.add_argument("manifest", type=_manifest, metavar="MANIFEST", help=f"an output folder, or its {STAMP}")
    _add_output(parser, "folder for what is made again (default: it is thrown away)", needed=False)
    parser.add_argument(
        "--tolerance", type=_at_least(0, float), default=0.01, metavar="T",
        help="relative difference that still is agreement (default: 0.01; 0: none but the same bits)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="go on though other things go in")
    _add_trust(parser)


def _add_bench(commands: Any, runs: Runs) -> None:
    parser = _command(
        commands, "bench", runs, "time solvers and whole runs beside the published column loop",
        "sparselab bench --shapes 2048x2048 --patterns 50% --json record.json",
    )  # fmt: skip
    _add_model(parser, optional=True)
    parser.add_argument("--only", choices=("layers", "model"), help="one of the two parts (default: both)")
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, metavar="D_OUTxD_IN", help="of layers (default: six from 768x768 on)"
    )
    parser.add_argument(
        "--patterns", nargs="+", type=_sparsity, default=["50%", "2:4"], metavar="S", help="(default: 50%% 2:4)"
    )
    _add_kernel(parser)
    parser.add_argument("--repeats", type=_at_least(1), default=5, help="rounds that count (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the record there, and its tables beside it")
    _add_calibration(parser)
    _add_bos(parser)
    _add_machine(parser)


def _add_train(commands: Any, runs: Runs) -> None:
    parser = _command(
        commands, "train", runs, "train the bundled model again", "sparselab train --out my-tiny --steps 2000"
    )
    parser.add_argument("--out", required=True, help="folder for the model; its checkpoint is kept there meanwhile")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    parser.add_argument("--compile", action="store_true", help="compile first: faster, needs a C++ compiler")
    for name in ("vocab_size", "hidden_size", "intermediate_size", "blocks", "heads", "seqlen", "steps", "batch_size"):
        parser.add_argument("--" + name.replace("_", "-"), type=_at_least(1))
    for name in ("warmup", "seed"):
        parser.add_argument("--" + name, type=_at_least(0))
    for name in ("learning_rate", "weight_decay", "stdlib_share"):
        parser.add_argument("--" + name.replace("_", "-"), type=_at_least(0, float))
    parser.add_argument("--packages", nargs="*", help="installed packages to read besides the standard library")
    parser.add_argument("--device", default=None, help="where to train (default: cpu)")


def _command(commands: Any, name: str, runs: Runs, what: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog=f"example: {example}",
        allow_abbrev=False,  # nobody should trust a model's code by a slip of the finger
    )
    parser.set_defaults(run=runs[name])
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    return parser


def _add_model(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    what = "'tiny', a model folder or a hub id"
    if optional:
        parser.add_argument("model", nargs="?", default="tiny", help=f"{what} (default: tiny)")
    else:
        parser.add_argument("model", help=what)
    _add_trust(parser)


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model (never abbreviated)"
    )


def _add_output(parser: argparse.ArgumentParser, what: str, needed: bool = True) -> None:
    parser.add_argument("--out", required=needed, help=what)
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote there")


def _add_grid(parser: argparse.ArgumentParser, patterns: list[str]) -> None:
    methods, shown = ["magnitude", "wanda", "sparsegpt"], " ".join(patterns).replace("%", "%%")
    parser.add_argument(
        "--methods", nargs="+", type=_method, default=methods, metavar="M",
        help=f"{_METHODS} (default: {' '.join(methods)})",
    )  # fmt: skip
    parser.add_argument(
        "--sparsity", nargs="+", type=_sparsity, default=patterns, metavar="S",
        help=f"fractions, percentages or N:M (default: {shown})",
    )  # fmt: skip


def _add_solver(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--percdamp", type=_at_least(0, float), default=0.01, help="damping, of the mean diagonal (default: 0.01)"
    )
    parser.add_argument(
        "--blocksize",
        type=_at_least(1),
        default=128,
        metavar="N",
        help="columns that compete in SparseGPT (default: 128)",
    )


def _add_kernel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kernel", choices=("auto", "numba", "torch", "triton"), default="auto", metavar="K",
        help="of SparseGPT's sweep: numba, torch or triton (default: the quickest here)",
    )  # fmt: skip


def _add_calibration(
    parser: argparse.ArgumentParser, seeds: bool = False, dataset: str = "stdlib", seqlen: int | None = 256
) -> None:
    context = "2048, or the model's context if that is shorter"
    parser.add_argument("--dataset", type=_dataset, default=dataset, help=f"calibration text: {_TEXTS}")
    parser.add_argument("--nsamples", type=_at_least(1), default=128, help="calibration windows (default: 128)")
    parser.add_argument(
        "--seqlen", type=_at_least(1), default=seqlen, help=f"tokens a window (default: {seqlen or context})"
    )
    if seeds:
        parser.add_argument(
            "--seed", nargs="+", type=_at_least(0), default=[0], help="one draw or several to average over (default: 0)"
        )
    else:
        parser.add_argument("--seed", type=_at_least(0), default=0, help="of the calibration draw (default: 0)")


def _add_bos(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bos", choices=("document", "window"), default="document", metavar="WHERE",
        help="begin-of-sequence token of each document (default) or window (for Gemma)",
    )  # fmt: skip


def _add_spill(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spill", action="store_true", help="keep hidden states on disk, not in memory")


def _add_batch_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", type=_at_least(1), metavar="N", help="windows at a time (default: by the device)"
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"), help="of the weights"
    )


def _at_least(least: int, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not least <= value < math.inf:  # NaN fails too
            raise argparse.ArgumentTypeError(f"expected at least {least}, received {text}")
        return value

    number.__name__ = kind.__name__  # argparse names it where a text is no number at all
    return number


def _dataset(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected 'stdlib', a text file or a folder, received an empty name")
    return text


def _manifest(text: str) -> tuple[str, dict[str, Any]]:
    from sparselab.manifest import read

    return text, _read(read, text)


def _shape(text: str) -> tuple[int, int]:
    d_out, _, d_in = text.partition("x")
    if not (d_out.isdecimal() and d_in.isdecimal() and int(d_out) and int(d_in)):
        raise argparse.ArgumentTypeError(f"expected D_OUTxD_IN, as in 4096x4096, received {text!r}")
    return int(d_out), int(d_in)


def _method(text: str) -> str:
    from sparselab.methods import find

    _read(find, text)
    return text


def _sparsity(text: str) -> "Pattern":
    from sparselab.solvers.sparsity import parse_sparsity

    return _read(parse_sparsity, text)


def _allocation(text: str) -> "Pattern | Allocation":
    from sparselab.allocation import parse_allocation

    return _read(parse_allocation, text)


def _read(parse: Callable[[str], T], text: str) -> T:
    """What a function of the package makes of a text, its complaint as argparse's."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
