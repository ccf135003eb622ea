"""What a result was made from, how and where, and what it was: enough to make it again and to compare the numbers.

A manifest is the stamp of an output folder (`files.write_stamp`) that also has

- `line`: the command line as it was typed; None where Python code asked for the work,
- `date`: the day it was made on,
- `inputs`: model (name, commit on the hub, hashes of its weights) and token windows (hash, number, special tokens),
- `machine`: device, precision, threads, processes,
- `results`: the report's rows or the perplexity, and checksums of files with weights.

Nothing in it names the user or the machine's folders, but for paths that were typed.
"""

import hashlib
import json
import math
import platform
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sparselab import files, sources
from sparselab.methods import Settings
from sparselab.models.checkpoint import Checkpoint, checksum
from sparselab.models.loading import hub_revision
from sparselab.models.streamed import StreamedModel
from sparselab.resources import processor

Manifest = dict[str, Any]

# Commands whose outputs can be made again, and what has to be known for that.
REPLAYED = {
    "compare": ("model", "dataset", "eval_dataset"),
    "table": ("model", "dataset"),
    "prune": ("model", "dataset"),
    "eval": ("model",),
}
_PARTS = ("settings", "inputs", "machine", "versions", "results")
_EACH_WINDOW = "one at the beginning of each window"
# Of a configuration; the rest decides what the model computes. The first is a path, the others say who wrote it.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Request:
    """How the work was asked for.

    Args:
        words: the command line as typed, without the program's name; None where Python code asked.
        arguments: of the command, as it understood them, by the names of its options.
        before: told of the manifest, but for its results, when the inputs are at hand and before the work; what it
            raises stops that.
    """

    words: Sequence[str] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    before: Callable[[Manifest], object] = lambda _: None


def begin(
    command: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Any],
    machine: Mapping[str, Any],
    request: Request | None = None,
) -> Manifest:
    """Everything that is known before the work.

    Args:
        command: of the command line; a Python function is the one that does the same.
        settings: all arguments by the names of the command's options; those of the request stand above them.
        inputs: from `model_record` and `windows_record`.
        machine: from `machine_record`.
        request: who asked.

    Raises:
        Exception: whatever `request.before` does.
    """
    request = request or Request()
    manifest = {
        "command": command,
        "line": None if request.words is None else shlex.join(["sparselab", *request.words]),
        "date": date.today().isoformat(),
        "settings": _plain({**settings, **request.arguments}),
        "inputs": _plain(inputs),
        "machine": dict(machine),
        **files.versions(),
    }
    request.before(manifest)
    return manifest


def of_evaluation(
    model: StreamedModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Int[Tensor, "n seqlen"]],
    request: Request,
) -> Manifest:
    """What is known before an evaluation on texts, by their names; see `begin`."""
    whole = model.model if isinstance(model, StreamedModel) else model
    hashes = checkpoint_hashes(model.checkpoint) if isinstance(model, StreamedModel) else weights_hash(model)
    inputs = {"model": model_record(request.arguments["model"], whole.config, hashes)}
    for name, windows in texts.items():
        inputs["evaluation" if len(texts) == 1 else f"evaluation, {name}"] = windows_record(windows, tokenizer, name)
    return begin("eval", {}, inputs, machine_record(model.device, whole.dtype), request)


def finish(folder: Path, manifest: Manifest, results: Mapping[str, Any], tables: Iterable[str] = ()) -> None:
    """Write a manifest to the folder of the output that it speaks of.

    Args:
        folder: the output; complete, but for the manifest.
        manifest: from `begin`.
        results: numbers, tables of them, and `checksums`; see `replay`.
        tables: names of files with all columns of the tables, of which the manifest holds the checksums.
    """
    sums = {"tables": {name: checksum(folder / name) for name in tables}}
    more = manifest | {"results": _plain(results) | sums}
    files.write_stamp(folder, manifest["command"], manifest["settings"], more)


def save_report(
    folder: str | Path,
    layers: pd.DataFrame,
    settings: Settings,
    windows: Int[Tensor, "n seqlen"] | None,
    about: Mapping[str, Any],
) -> None:
    """Write a report of pruning in memory to a folder of its own, with its manifest; see `Report.save`."""
    if wrong := [name for name, value in about.items() if not isinstance(value, str | Path | int | float | None)]:
        raise TypeError(f"{wrong[0]}: expected a name or a number, received {type(about[wrong[0]]).__name__}")
    inputs: dict[str, Any] = {"model": {"name": about["model"]}} if "model" in about else {}
    if windows is not None:
        inputs["calibration"] = windows_record(windows, dataset=about.get("dataset"))
    made = begin("prune", arguments_of(settings, windows), inputs, machine_record(), Request(arguments=about))
    with files.finished_output(folder) as out:
        layers.to_csv(out / "report.csv", index=False)
        finish(out, made, {"layers": layers}, ["report.csv"])


def read(path: str | Path) -> Manifest:
    """A manifest of work that can be done again, from its file or from the folder that holds it.

    Raises:
        ValueError: there is none, it is damaged, or it is of other work.
    """
    given = Path(path)
    place = given / files.STAMP if given.is_dir() else given
    expected = f"{path}: expected an output of compare, table, prune or eval with its {files.STAMP}, or that file"
    try:
        manifest = json.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{expected}; cannot read it ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{expected}; found a damaged file ({error})") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("command"), str):
        raise ValueError(f"{expected}; found something else")
    if manifest["command"] not in REPLAYED:
        raise ValueError(f"{expected}; found what `{manifest['command']}` made, which is not replayed")
    if "results" not in manifest:
        raise ValueError(f"{expected}; found one of an earlier version, without results to compare; make it again")
    if wrong := [name for name in _PARTS if not isinstance(manifest.get(name), dict)]:
        raise ValueError(f"{expected}; found a damaged file ({wrong[0]} is missing or no table)")
    settings, command = manifest["settings"], manifest["command"]
    if unnamed := [name for name in REPLAYED[command] if not settings.get(name) or not isinstance(settings[name], str)]:
        raise ValueError(
            f"{path}: cannot be replayed, as it does not name the {unnamed[0]}: Python code had that at hand; make the "
            "same call again"
        )
    return manifest


def model_record(name: str, config: PretrainedConfig, weights: str | Mapping[str, str]) -> dict[str, Any]:
    """Which model it is: its name, its commit if it came from the hub, and hashes.

    Args:
        name: as the user wrote it.
        config: the model's.
        weights: from `weights_hash` or `checkpoint_hashes`.
    """
    record = {"name": name, "revision": hub_revision(name), "weights": weights}
    if not isinstance(weights, str):  # the files of a checkpoint have the configuration
        return record
    stated = {key: value for key, value in config.to_diff_dict().items() if key not in _NOT_THE_MODEL}
    return record | {"config": hashlib.sha256(json.dumps(stated, sort_keys=True, default=str).encode()).hexdigest()}


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of every tensor's name, type, shape and whole content: one other bit makes another hash."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def checkpoint_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of each file that holds weights, and of the configuration."""
    paths = [checkpoint.folder / "config.json", *checkpoint.files]
    return {path.relative_to(checkpoint.folder).as_posix(): checksum(path) for path in paths}


def tokens_hash(windows: Int[Tensor, "n seqlen"]) -> str:
    """SHA-256 of token ids as 64-bit whole numbers, one window after another."""
    return hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest()


def windows_record(
    windows: Int[Tensor, "n seqlen"],
    tokenizer: PreTrainedTokenizerBase | None = None,
    dataset: sources.Dataset | None = None,
) -> dict[str, Any]:
    """Which token windows they are, and where begin-of-sequence tokens stand in them.

    Args:
        windows: token ids.
        tokenizer: that made them.
        dataset: the text; None if the windows were given as such.
    """
    record = {
        "dataset": None if dataset is None else sources.describe(dataset),
        "windows": windows.shape[0],
        "seqlen": windows.shape[1],
        "sha256": tokens_hash(windows),
    }
    if tokenizer is None:
        return record
    bos = tokenizer.bos_token_id
    found = torch.zeros_like(windows, dtype=torch.bool) if bos is None else windows == bos
    return record | {
        "bos": _EACH_WINDOW if len(found) > 1 and bool(found[:, 0].all()) else _bos_policy(tokenizer, dataset),
        "bos_id": bos,
        "windows_that_begin_with_bos": int(found[:, 0].sum()),
        "bos_in_all_windows": int(found.sum()),
    }


def machine_record(device: torch.device | None = None, dtype: torch.dtype | None = None, world: int = 1) -> Manifest:
    """Where the work is done.

    Args:
        device, dtype: of the model; None if they are not known.
        world: processes that share the work.
    """
    record: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "processes": world,
    }
    record["matmul_precision"] = torch.get_float32_matmul_precision()
    if device is not None:
        on_gpu = device.type == "cuda"
        record["device"] = device.type
        record["device_name"] = torch.cuda.get_device_name(device) if on_gpu else processor()
    record["instructions"] = torch.backends.cpu.get_cpu_capability()
    return record if dtype is None else record | {"dtype": _name(dtype)}


def arguments_of(settings: Settings, windows: Int[Tensor, "n seqlen"] | None) -> dict[str, Any]:
    """Settings of `prune` and the size of its calibration draw, by the names of the command's options."""
    given = {each.name: getattr(settings, each.name) for each in fields(settings)}
    size = {} if windows is None else {"nsamples": windows.shape[0], "seqlen": windows.shape[1]}
    return {("sparsity" if name == "pattern" else name): value for name, value in given.items()} | size


def rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows, without the seconds that each took: no two runs agree in these."""
    kept = table[[name for name in table if not is_cost(str(name))]]
    return [{str(name): value for name, value in row.items()} for row in kept.to_dict("records")]


def is_cost(column: str) -> bool:
    """Whether a column is about seconds or memory, which are never compared."""
    return "seconds" in column or "memory" in column


def _bos_policy(tokenizer: PreTrainedTokenizerBase, dataset: sources.Dataset | None) -> str:
    """How the tokenizer puts begin-of-sequence tokens into a text, in words."""
    if dataset is None:
        return "not known: windows were given, not made from text"
    if tokenizer.bos_token_id is None:
        return "none: the tokenizer has no such token"
    ids, bare = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
    if ids[:1] != [tokenizer.bos_token_id] or bare[:1] == ids[:1]:
        return "none: the tokenizer adds none"
    if isinstance(dataset, str) and dataset in sources.PAPERS:
        return "as in the papers: one before all documents joined (c4, calibration: one before each); none within"
    return "one before each document; windows are cut from the documents in a row, wherever these begin"


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


def _plain(value: Any) -> Any:
    """As JSON can hold it: NaN, which means that nothing was measured, as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, pd.DataFrame):
        return _plain(rows(value))
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if hasattr(value, "item"):  # numpy's numbers
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value if isinstance(value, str | int | float | None) else _name(value)
