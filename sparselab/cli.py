"""The command line: every subcommand is a thin layer over a function of the package."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

from sparselab import __version__
from sparselab.errors import SparselabError

if TYPE_CHECKING:
    from sparselab.solvers import Pattern


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None reads those of the process.

    Returns:
        0 done, 1 it ran and failed. Wrong usage leaves through SystemExit with 2.
    """
    _tolerate_any_encoding()
    options = argparse.Namespace(debug=False, command="")
    try:
        options = _parser().parse_args(arguments)
        options.run(options)
    except KeyboardInterrupt:
        print("sparselab: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read our output has enough, as in `sparselab compare | head`; nothing is left to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # whatever the libraries below raise, a user gets one line of it
        if options.debug:
            raise
        ours = isinstance(error, SparselabError | ValueError | TypeError | OSError) and str(error)
        words = [str(error) if ours else f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]
        print(f"sparselab {options.command}: error: {' '.join('; '.join(words).split())}", file=sys.stderr)
        return 1
    return 0


def _tolerate_any_encoding() -> None:
    """Print ± and × as ? where the terminal has no such letters, rather than fail after the work is done."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def _compare(options: argparse.Namespace) -> None:
    from sparselab import figures, files
    from sparselab.comparison import CompareConfig, compare, estimate_seconds
    from sparselab.models import load

    config = CompareConfig(
        methods=tuple(options.methods),
        sparsities=tuple(str(pattern) for pattern in options.sparsity),
        percdamp=options.percdamp,
        blocksize=options.blocksize,
        dataset=options.dataset,
        eval_dataset=options.eval_dataset,
        nsamples=options.nsamples,
        eval_nsamples=options.eval_nsamples,
        seqlen=options.seqlen,
        seed=options.seed,
    )
    with files.finished_output(options.out, options.overwrite, [options.model]) as folder:
        model, tokenizer = load(options.model, options.device, options.dtype)
        minutes = estimate_seconds(model, config) / 60
        runs = len(config.runs())
        print(f"{runs} pruned models to make and to measure: about {minutes:.1f} minutes on this machine.", flush=True)
        result = compare(model, tokenizer, config, options.model, folder)
        drawn = {"perplexity.png": figures.sparsity_perplexity(result.runs, result.caption)}
        pattern = config.sparsities[(len(config.sparsities) - 1) // 2]
        drawn["layer_errors.png"] = figures.layer_errors(result.layers, pattern, result.caption)
        for name, figure in drawn.items():
            figure.savefig(folder / name, dpi=144)
        result.save(folder)
    print("\n" + result.table.to_string(index=False) + "\n\n" + result.caption)
    print(f"Written to {options.out}: runs.csv, runs.md, layers.csv, {', '.join(drawn)}")


def _prune(options: argparse.Namespace) -> None:
    from sparselab import corpora, files
    from sparselab.models import load, quiet
    from sparselab.pruning import prune

    with files.finished_output(options.out, options.overwrite, [options.model]) as folder:
        model, tokenizer = load(options.model, options.device, options.dtype)
        calib = corpora.calibration_tokens(tokenizer, options.dataset, options.nsamples, options.seqlen, options.seed)
        report = prune(
            model,
            calib,
            options.method,
            options.sparsity,
            options.percdamp,
            options.blocksize,
            propagate=options.propagate,
            batch_size=options.batch_size,
        )
        with quiet():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        report.layers.to_csv(folder / "report.csv", index=False)
        given = {name: value for name, value in vars(options).items() if name not in ("run", "command", "debug")}
        files.write_stamp(folder, "prune", given)
    print(
        f"{options.model} pruned by {options.method}: {report.sparsity:.2%} zeros in {len(report.layers)} layers, "
        f"mean relative layer error {report.relative_error:.4f}, {report.seconds:.1f} s, "
        f"{report.peak_memory / 1e6:.0f} MB of memory besides the model; written to {options.out}"
    )


def _eval(options: argparse.Namespace) -> None:
    from sparselab import corpora
    from sparselab.evaluation import bits_per_byte, perplexity
    from sparselab.models import load

    model, tokenizer = load(options.model, options.device, options.dtype)
    tokens = corpora.evaluation_tokens(tokenizer, options.dataset, options.nsamples, options.seqlen)
    result = perplexity(model, tokens, options.batch_size)
    print(
        f"{options.model}: perplexity {result}, {bits_per_byte(result, tokens, tokenizer):.3f} bits per byte "
        f"({len(tokens)} windows of {options.seqlen} tokens of {corpora.describe(options.dataset)})"
    )


def _train(options: argparse.Namespace) -> None:
    from dataclasses import fields

    from sparselab.training import TrainConfig, train

    given = {field.name: getattr(options, field.name, None) for field in fields(TrainConfig)}
    if given["packages"] is not None:
        given["packages"] = tuple(given["packages"])
    config = TrainConfig(**{name: value for name, value in given.items() if value is not None})
    print(
        f"{config.tokens / 1e6:.1f}M tokens in {config.steps} steps; a checkpoint is kept in {options.out}.", flush=True
    )
    result = train(options.out, config, options.resume, options.compile, options.device or "cpu")
    print(f"held-out perplexity {result}; written to {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparselab", description="One-shot pruning of language models: magnitude, Wanda and SparseGPT, measured."
    )
    parser.add_argument("--version", action="version", version=f"sparselab {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_compare(commands)
    _add_prune(commands)
    _add_eval(commands)
    _add_train(commands)
    return parser


def _add_compare(commands: Any) -> None:
    parser = _command(
        commands, "compare", _compare, "prune one model by every method and print what each cost",
        "sparselab compare tiny --out demo --sparsity 50% 2:4",
    )  # fmt: skip
    parser.add_argument("model", nargs="?", default="tiny", help="'tiny', a model folder or a hub id (default: tiny)")
    _add_output(parser, "folder for runs.csv, layers.csv and figures")
    parser.add_argument(
        "--methods",
        nargs="+",
        type=_method,
        default=["magnitude", "wanda", "sparsegpt"],
        metavar="M",
        help="some of magnitude, wanda and sparsegpt (default: all)",
    )
    parser.add_argument(
        "--sparsity", nargs="+", type=_sparsity, default=["50%", "60%", "70%", "2:4"],
        help="fractions, percentages or N:M (default: 50%% 60%% 70%% 2:4)", metavar="S",
    )  # fmt: skip
    _add_solver(parser)
    _add_calibration(parser)
    parser.add_argument("--eval-dataset", default="stdlib", help="text to evaluate on (default: stdlib, held-out part)")
    parser.add_argument("--eval-nsamples", type=int, default=400, help="evaluation windows (default: 400)")
    _add_machine(parser)


def _add_prune(commands: Any) -> None:
    parser = _command(
        commands, "prune", _prune, "prune a model and save it",
        "sparselab prune tiny --out tiny-24 --method sparsegpt --sparsity 2:4",
    )  # fmt: skip
    parser.add_argument("model", help="'tiny', a model folder or a hub id")
    _add_output(parser, "folder for the pruned model")
    parser.add_argument("--method", type=_method, default="sparsegpt", help="magnitude, wanda or sparsegpt")
    parser.add_argument("--sparsity", type=_sparsity, default="50%", help="0.5, 50%% or 2:4 (default: 50%%)")
    parser.add_argument(
        "--propagate", choices=("pruned", "dense"), default="pruned", help="what each block is calibrated on"
    )
    _add_solver(parser)
    _add_calibration(parser)
    _add_machine(parser)


def _add_eval(commands: Any) -> None:
    parser = _command(
        commands, "eval", _eval, "measure a model's perplexity", "sparselab eval tiny --dataset my-texts/ --seqlen 256"
    )
    parser.add_argument("model", help="'tiny', a model folder or a hub id")
    parser.add_argument("--dataset", default="stdlib", help="'stdlib' (held-out part), a text file or a folder")
    parser.add_argument("--nsamples", type=int, default=None, help="windows (default: all there are)")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens a window (default: 256)")
    _add_machine(parser)


def _add_train(commands: Any) -> None:
    parser = _command(
        commands, "train", _train, "train the bundled model again", "sparselab train --out my-tiny --steps 2000"
    )
    parser.add_argument("--out", required=True, help="folder for the model; its checkpoint is kept there meanwhile")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    parser.add_argument("--compile", action="store_true", help="compile first: faster, needs a C++ compiler")
    for name in ("vocab_size", "hidden_size", "intermediate_size", "blocks", "heads", "seqlen", "steps", "batch_size"):
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    for name in ("warmup", "seed"):
        parser.add_argument("--" + name, type=int)
    for name in ("learning_rate", "weight_decay", "stdlib_share"):
        parser.add_argument("--" + name.replace("_", "-"), type=float)
    parser.add_argument("--packages", nargs="*", help="installed packages to read besides the standard library")
    parser.add_argument("--device", default=None, help="where to train (default: cpu)")


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], what: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=what[0].upper() + what[1:] + ".", epilog=f"example: {example}"
    )
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    return parser


def _add_output(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--out", required=True, help=what)
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote there")


def _add_solver(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--percdamp", type=float, default=0.01, help="damping, of the mean diagonal (default: 0.01)")
    parser.add_argument("--blocksize", type=int, default=128, help="columns that compete in SparseGPT (default: 128)")


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", default="stdlib", help="calibration text: 'stdlib', a text file or a folder")
    parser.add_argument("--nsamples", type=int, default=128, help="calibration windows (default: 128)")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens a window (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration draw (default: 0)")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=None, help="windows at a time (default: by the device)")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"), help="of the weights"
    )


def _method(text: str) -> str:
    from sparselab.methods import METHODS

    if text not in METHODS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(METHODS)}, received {text!r}")
    return text


def _sparsity(text: str) -> "Pattern":
    from sparselab.solvers.sparsity import parse_sparsity

    try:
        return parse_sparsity(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
