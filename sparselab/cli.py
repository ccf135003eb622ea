"""The command line: every subcommand is a thin layer over a function of the package."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from sparselab.arguments import Runs, build_parser
from sparselab.errors import SparselabError


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
        runs: Runs = {"compare": _compare, "prune": _prune, "eval": _eval, "bench": _bench, "train": _train}
        options = build_parser(runs).parse_args(arguments)
        options.words = sys.argv[1:] if arguments is None else list(arguments)
        options.run(options)
    except (KeyboardInterrupt, Exception) as error:  # whatever the libraries below raise, a user gets one line of it
        if options.debug and not isinstance(error, KeyboardInterrupt):
            raise
        _say(_one_line(options.command, error), sys.stderr)
        return 1
    return 0


def _one_line(command: str, error: BaseException) -> str:
    notes = getattr(error, "__notes__", [])
    if isinstance(error, KeyboardInterrupt):
        return "; ".join(["sparselab: interrupted", *notes])
    ours = isinstance(error, SparselabError | ValueError | TypeError | OSError) and str(error)
    words = "; ".join([str(error) if ours else f"{type(error).__name__}: {error}", *notes])
    return f"sparselab {command}: error: {' '.join(words.split())}"


def _say(text: str, stream: TextIO | None = None) -> None:
    """Print at once; if nobody reads any more, as in `sparselab compare | head`, the work goes on all the same."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
    with files.finished_output(options.out, options.overwrite, _inputs(options)) as folder:
        model, tokenizer = load(
            options.model, options.device, options.dtype, trust_remote_code=options.trust_remote_code
        )
        minutes = estimate_seconds(model, config) / 60
        runs = len(config.runs())
        _say(f"{runs} pruned models to make and to measure: about {minutes:.1f} minutes on this machine.")
        result = compare(model, tokenizer, config, options.model, folder)
        drawn = {"perplexity.png": figures.sparsity_perplexity(result.runs, result.caption)}
        pattern = config.sparsities[(len(config.sparsities) - 1) // 2]
        drawn["layer_errors.png"] = figures.layer_errors(result.layers, pattern, result.caption)
        for name, figure in drawn.items():
            figure.savefig(folder / name, dpi=144)
        result.save(folder)
    _say("\n" + result.table.to_string(index=False) + "\n\n" + result.caption)
    _say(f"Written to {options.out}: runs.csv, runs.md, layers.csv, {', '.join(drawn)}")


def _prune(options: argparse.Namespace) -> None:
    from sparselab import corpora, files
    from sparselab.methods import Settings
    from sparselab.models import stream
    from sparselab.ranks import joined, own_device
    from sparselab.streaming import prune_checkpoint

    given = {name: value for name, value in vars(options).items() if name not in ("run", "command", "debug", "words")}
    with joined() as ranks:
        if ranks.leads and not options.resume:
            files.check_output(options.out, options.overwrite, _inputs(options))  # before anything is read
        model, tokenizer = stream(
            options.model,
            own_device(options.device),
            options.dtype,
            zero=options.zero,
            trust_remote_code=options.trust_remote_code,
        )
        report = prune_checkpoint(
            model,
            tokenizer,
            corpora.calibration_tokens(tokenizer, options.dataset, options.nsamples, options.seqlen, options.seed),
            options.out,
            Settings(
                options.method,
                options.sparsity,
                options.percdamp,
                options.blocksize,
                options.propagate,
                kernel=options.kernel,
            ),
            batch_size=options.batch_size,
            spill=options.spill,
            resume=options.resume,
            overwrite=options.overwrite,
            force=options.force,
            tell=_say,
            record=given,
            ranks=ranks,
        )
    if not ranks.leads:
        return
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.stages.items())
    _say(
        f"{options.model} pruned by {options.method}: {report.sparsity:.2%} zeros in {len(report.layers)} layers, "
        f"mean relative layer error {report.relative_error:.4f}, {report.seconds:.1f} s ({stages}), "
        f"{report.peak_memory / 1e6:.0f} MB of memory; written to {options.out}"
    )


def _eval(options: argparse.Namespace) -> None:
    from tempfile import TemporaryDirectory

    from sparselab import corpora
    from sparselab.evaluation import bits_per_byte, perplexity
    from sparselab.models import stream

    model, tokenizer = stream(options.model, options.device, options.dtype, trust_remote_code=options.trust_remote_code)
    tokens = corpora.evaluation_tokens(tokenizer, options.dataset, options.nsamples, options.seqlen)
    with TemporaryDirectory(prefix="sparselab-") as hidden:
        result = perplexity(model, tokens, options.batch_size, spill=Path(hidden) if options.spill else None)
    _say(
        f"{options.model}: perplexity {result}, {bits_per_byte(result, tokens, tokenizer):.3f} bits per byte "
        f"({len(tokens)} windows of {options.seqlen} tokens of {corpora.describe(options.dataset)})"
    )


def _bench(options: argparse.Namespace) -> None:
    import torch

    from sparselab import bench, corpora
    from sparselab.models import load

    if options.json and (options.json.is_dir() or not options.json.parent.is_dir()):
        raise ValueError(f"--json: expected a file in an existing folder, received {options.json}")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    opened = layers = model = None
    if options.only != "layers":  # before anything is timed: a wrong name should not be found out after minutes
        loaded, tokenizer = load(options.model, str(device), options.dtype, trust_remote_code=options.trust_remote_code)
        given = options.dataset, options.nsamples, options.seqlen, options.seed
        opened = loaded, corpora.calibration_tokens(tokenizer, *given)
    if options.only != "model":
        patterns = [str(pattern) for pattern in options.patterns]
        layers = bench.bench_layers(options.shapes or bench.SHAPES, patterns, options.repeats, device, options.kernel)
    about = ""
    if opened is not None:
        model = bench.bench_model(*opened, repeats=options.repeats, kernel=options.kernel)
        about = f"{options.model}, {options.nsamples} × {options.seqlen} tokens, SparseGPT, Wanda and magnitude at 50%"
    record = bench.Record(shlex.join(["sparselab", *options.words]), bench.machine(device), layers, model, about)
    if options.json:
        record.save(options.json)
    _say(str(record))


def _train(options: argparse.Namespace) -> None:
    from dataclasses import fields

    from sparselab.training import TrainConfig, train

    given = {field.name: getattr(options, field.name, None) for field in fields(TrainConfig)}
    if given["packages"] is not None:
        given["packages"] = tuple(given["packages"])
    config = TrainConfig(**{name: value for name, value in given.items() if value is not None})
    _say(f"{config.tokens / 1e6:.1f}M tokens in {config.steps} steps; a checkpoint is kept in {options.out}.")
    result = train(options.out, config, options.resume, options.compile, options.device or "cpu")
    _say(f"held-out perplexity {result}; written to {options.out}")


def _inputs(options: argparse.Namespace) -> list[str | Path]:
    """Files and folders that a command reads, as far as its arguments name them."""
    from sparselab.models.loading import tiny_folder

    texts = [options.dataset, getattr(options, "eval_dataset", "stdlib")]
    model = tiny_folder() if options.model == "tiny" else options.model
    return [path for path in (model, *texts) if path and path != "stdlib"]
