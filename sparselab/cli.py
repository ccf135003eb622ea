"""The command line: every subcommand is a thin layer over a function of the package."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import partial
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sparselab.arguments import Runs, build_parser
from sparselab.errors import SparselabError

if TYPE_CHECKING:
    import pandas as pd

    from sparselab.engines import Engine
    from sparselab.manifest import Request


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
        options = build_parser(_runs()).parse_args(arguments)
        options.words = sys.argv[1:] if arguments is None else list(arguments)
        options.run(options)
    except (KeyboardInterrupt, Exception) as error:  # whatever the libraries below raise, a user gets one line of it
        if options.debug and not isinstance(error, KeyboardInterrupt):
            raise
        _say(_one_line(options.command, error), sys.stderr)
        return 1
    return 0


def _runs() -> Runs:
    return {
        "compare": _compare,
        "table": _table,
        "sweep": _sweep,
        "report": _report,
        "prune": _prune,
        "eval": _eval,
        "samples": _samples,
        "inspect": _inspect,
        "replay": _replay,
        "bench": _bench,
        "train": _train,
    }


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
        seeds=tuple(options.seed),
        bos=options.bos,
    )
    with files.finished_output(options.out, options.overwrite, _inputs(options)) as folder:
        model, tokenizer = load(
            options.model, options.device, options.dtype, trust_remote_code=options.trust_remote_code
        )
        minutes = estimate_seconds(model, config) / 60
        runs = len(config.runs())
        _say(f"{runs} pruned models to make and to measure: about {minutes:.1f} minutes on this machine.")
        result = compare(model, tokenizer, config, options.model, folder, request=_request(options))
        drawn = {"perplexity.png": figures.sparsity_perplexity(result.runs, result.about_perplexity)}
        pattern = config.sparsities[(len(config.sparsities) - 1) // 2]
        drawn["layer_errors.png"] = figures.layer_errors(result.layers, pattern, result.about)
        for name, figure in drawn.items():
            figure.savefig(folder / name, dpi=144)
        result.save(folder)
    _say("\n" + result.table.to_string(index=False) + "\n\n" + result.caption)
    _say(f"Written to {options.out}: runs.csv, runs.md, layers.csv, {', '.join(drawn)}")


def _table(options: argparse.Namespace) -> None:
    from sparselab import files
    from sparselab.models import load
    from sparselab.reproduction import TableConfig, papers_table

    config = TableConfig(
        methods=tuple(options.methods),
        sparsities=tuple(str(pattern) for pattern in options.sparsity),
        dataset=options.dataset,
        eval_datasets=tuple(options.eval_dataset),
        nsamples=options.nsamples,
        eval_nsamples=options.eval_nsamples,
        seqlen=options.seqlen,
        seed=options.seed,
    )
    with files.resumable_output(options.out, options.overwrite, _inputs(options)) as folder:
        model, tokenizer = load(
            options.model, options.device, options.dtype, trust_remote_code=options.trust_remote_code
        )
        given = model, tokenizer, config, options.model, folder
        result = papers_table(*given, resume=options.resume, tell=_say, request=_request(options))
    _say("\n" + result.table.to_string(index=False) + "\n\n" + result.caption)
    _say(f"Written to {options.out}: table.csv, table.md")


def _sweep(options: argparse.Namespace) -> None:
    from sparselab import files, page, sweeps

    template = None if options.no_notebooks else files.bundled("notebooks/sweep_run.ipynb")
    with _engine(options) as engine:
        if options.dry_run:
            _say(str(sweeps.plan(options.grid, options.out, engine, template=template, retry=options.retry)))
            return
        with page.Renewed(options.out, _say) as watch:
            how = {"template": template, "retry": options.retry, "tell": _say, "watch": watch}
            table = sweeps.sweep(options.grid, options.out, engine, **how)
    _say(f"{len(table)} runs in {options.out}; look at {Path(options.out) / page.PAGE}")
    if failed := int((table.failure != "").sum()):
        raise SparselabError(
            f"{failed} of {len(table)} runs have failed; what ended in an error is done again with --retry"
        )


def _report(options: argparse.Namespace) -> None:
    from sparselab import page

    _say(f"Written: {', '.join(map(str, page.write_report(options.folder, options.where)))}")


def _engine(options: argparse.Namespace) -> "AbstractContextManager[Engine | None]":
    """Who does the runs of a sweep."""
    from sparselab.engines import Pool, dask_executor

    if options.scheduler:
        return dask_executor(options.scheduler, options.workers)
    return nullcontext(partial(Pool, options.workers) if options.workers > 1 else None)


def _prune(options: argparse.Namespace) -> None:
    from sparselab import corpora, files
    from sparselab.methods import Settings
    from sparselab.models import stream
    from sparselab.outliers import owl
    from sparselab.ranks import joined, own_device
    from sparselab.streaming import prune_checkpoint

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
        given = options.dataset, options.nsamples, options.seqlen, options.seed, options.bos
        calib = corpora.calibration_tokens(tokenizer, *given)
        if options.owl:  # from here on as if its rules had been typed, and so they stand in the manifest
            options.owl, options.sparsity = False, owl(model, calib, options.sparsity, batch_size=options.batch_size)
        report = prune_checkpoint(
            model,
            tokenizer,
            calib,
            options.out,
            Settings(
                options.method,
                options.sparsity,
                options.percdamp,
                options.blocksize,
                options.propagate,
                kernel=options.kernel,
                wbits=options.wbits,
                true_sequential=options.true_sequential,
                retries=options.retries,
                measure_gap=options.measure_gap,
            ),
            batch_size=options.batch_size,
            spill=options.spill,
            resume=options.resume,
            overwrite=options.overwrite,
            force=options.force,
            tell=_say,
            ranks=ranks,
            request=_request(options),
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

    from sparselab import corpora, files, manifest
    from sparselab.models import load, stream

    if options.dataset is None:
        options.dataset = [] if options.tasks else ["stdlib"]
    kept = files.finished_output(options.out, options.overwrite, _inputs(options)) if options.out else nullcontext()
    with kept as folder, TemporaryDirectory(prefix="sparselab-") as hidden:
        model, tokenizer = (load if options.tasks else stream)(
            options.model, options.device, options.dtype, trust_remote_code=options.trust_remote_code
        )
        how = options.nsamples, options.seqlen, options.bos
        texts = {name: corpora.evaluation_tokens(tokenizer, name, *how) for name in options.dataset}
        made = manifest.of_evaluation(model, tokenizer, texts, _request(options)) if folder else {}
        results: dict[str, Any] = {}
        for name, tokens in texts.items():
            numbers = _measured(options, model, tokenizer, name, tokens, Path(hidden) if options.spill else None)
            results |= {f"{name}, {each}" if len(texts) > 1 else each: value for each, value in numbers.items()}
        if options.tasks:
            results["tasks"] = _tasks(options, model, tokenizer)
        if folder:
            manifest.finish(folder, made, results)
    if options.out:
        _say(f"Written to {options.out}")


def _measured(
    options: argparse.Namespace, model: Any, tokenizer: Any, name: str, tokens: Any, spill: Path | None
) -> dict[str, Any]:
    """Perplexity on one text, said and given."""
    from sparselab import sources
    from sparselab.evaluation import bits_per_byte, perplexity

    result = perplexity(model, tokens, options.batch_size, spill=spill)
    bits = bits_per_byte(result, tokens, tokenizer)
    _say(
        f"{options.model}: perplexity {result}, {bits:.3f} bits per byte "
        f"({len(tokens)} windows of {options.seqlen} tokens of {sources.describe(name)})"
    )
    numbers = {"perplexity": float(result), "stderr": result.stderr, "bits_per_byte": bits}
    return numbers | {"nll of window": result.nll.tolist()}


def _tasks(options: argparse.Namespace, model: Any, tokenizer: Any) -> "pd.DataFrame":
    """The tasks' metrics, said and given."""
    from sparselab.tasks import evaluate_tasks

    table = evaluate_tasks(
        model,
        tokenizer,
        options.tasks,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        include_path=options.include_path,
        batch_size=options.batch_size,
    )
    _say(f"{options.model}:\n{table.round(4).to_string(index=False, na_rep='')}")
    return table


def _samples(options: argparse.Namespace) -> None:
    from sparselab import samples
    from sparselab.models import stream

    given = options.device, options.dtype
    prompts, text = options.prompt, None
    if not prompts:
        _, tokenizer = stream(options.models[0], *given, trust_remote_code=options.trust_remote_code)
        how = options.nsamples, options.prompt_tokens, options.max_new_tokens
        drawn = samples.held_out_prompts(tokenizer, options.dataset, *how)
        prompts, text = drawn.prompt.tolist(), drawn.text
    table = samples.completions(
        options.models, prompts, options.max_new_tokens, *given, trust_remote_code=options.trust_remote_code
    )
    if text is not None:
        table.insert(1, "what follows in the text", text)
    _say(samples.as_text(table))


def _inspect(options: argparse.Namespace) -> None:
    from sparselab.errors import OutputError
    from sparselab.inspection import inspect_checkpoint

    found = inspect_checkpoint(options.model, trust_remote_code=options.trust_remote_code)
    _say(str(found))
    if found.differing:
        raise OutputError(f"{options.model}: by its manifest's checksums, {found.differing[0]}; make or fetch it again")


def _replay(options: argparse.Namespace) -> None:
    from tempfile import TemporaryDirectory

    from sparselab import files, manifest
    from sparselab.errors import ReplayError
    from sparselab.replay import Replay, printable

    path, was = options.manifest
    if options.out:
        files.check_output(options.out, options.overwrite, [path])
    elif "RANK" in os.environ:
        raise ValueError("--out: expected a folder that all processes share, received none")
    screen, leads = sys.stdout, os.environ.get("RANK", "0") == "0"
    replay = Replay(was, options.force, lambda text: _say(text, screen) if leads else None)
    with TemporaryDirectory(prefix="sparselab-") as hidden:
        again = _again(replay.words(), options, options.out or str(Path(hidden, "again")))
        again.before = replay.before
        with redirect_stdout(StringIO()):  # the verdict is what was asked for; bars are elsewhere
            again.run(again)
        if not leads:
            return
        verdict = replay.verdict(manifest.read(again.out), options.tolerance)
    _say(printable(str(verdict)))
    if not verdict.agrees:
        raise ReplayError(verdict.complaint())


def _again(words: list[str], options: argparse.Namespace, out: str) -> argparse.Namespace:
    """The arguments of a command that is run again; what is not safe is for the one who does it to say.

    Arguments that are no options here, Python's or another version's, are left out: `Replay.before` tells if that
    makes a difference.
    """
    again, _ = build_parser(_runs()).parse_known_args([words[0], f"--out={out}", *words[1:]])
    again.words, again.debug = words, options.debug
    again.out, again.overwrite, again.resume = out, options.overwrite, False
    again.trust_remote_code = options.trust_remote_code
    return again


def _request(options: argparse.Namespace) -> "Request":
    """How this command was asked for."""
    from sparselab.manifest import Request

    not_asked = ("run", "command", "debug", "words", "before")
    arguments = {name: value for name, value in vars(options).items() if name not in not_asked}
    return Request(options.words, arguments, getattr(options, "before", lambda _: None))


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
        given = options.dataset, options.nsamples, options.seqlen, options.seed, options.bos
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

    given = options.dataset, getattr(options, "eval_dataset", [])
    texts = [text for each in given for text in ([each] if isinstance(each, str) else each)]
    model = tiny_folder() if options.model == "tiny" else options.model
    return [path for path in (model, *texts) if path and path != "stdlib"]
