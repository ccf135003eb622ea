"""Prune a checkpoint to a checkpoint, block by block: the model is never held whole, and no finished block is lost."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sparselab import files, manifest, preflight, sources
from sparselab.errors import OutputError, UnsupportedModelError
from sparselab.journal import Journal, read_journal
from sparselab.methods import Settings
from sparselab.models.blocks import Decoder
from sparselab.models.checkpoint import INDEX, checksum, write_index, write_shard
from sparselab.models.inputs import check_tokens
from sparselab.models.loading import quiet
from sparselab.models.streamed import StreamedModel
from sparselab.progress import Progress
from sparselab.pruning import Report, check_calib, check_model, walk_all
from sparselab.ranks import Ranks
from sparselab.saved import Witness
from sparselab.walk import Row

_CARD = """# {name}, pruned

{zeros:.2%} of the weights of {count} linear layers are zero, by {method} at {pattern}.
Embeddings, norms and head are as they were.

| | |
|---|---|
| method | {method} |
| pattern | {pattern} |
| mean relative error of the layers' outputs, on calibration tokens | {error:.4f} |
| calibration | {calibration} |
| perplexity | not measured; `sparselab eval` does |
| made by | sparselab {version} |

`report.csv` has a row for each layer, `journal.jsonl` the checksums, `sparselab.json` what this was made from and how:
`sparselab replay` does it again and compares. Zeros are stored like any number: the files are as large as before.
"""


def prune_checkpoint(
    model: StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    calib: Any,
    out: str | Path,
    settings: Settings | None = None,
    *,
    batch_size: int | None = None,
    spill: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    progress: Progress = True,
    tell: Callable[[str], object] = lambda _: None,
    record: Mapping[str, Any] = MappingProxyType({}),
    ranks: Ranks | None = None,
    request: manifest.Request | None = None,
) -> Report:
    """Prune a model that is not in memory, and write a checkpoint that `from_pretrained` opens.

    One block at a time is read, pruned as `prune` would, and written. Killed at any moment, it goes on after the last
    block that was written, with the same weights in the end as if it had not been.

    Before the output gets its name, it is opened again. Every tensor is read back when it is written and compared, bit
    for bit, with the one in memory; in the end, all files still have the checksums that they had then. And one window
    of 64 tokens, which has passed each block as it was written (from its file, if an earlier process wrote it), has the
    same logits by the reopened model's own forward. What is read back may come from the system's cache, not the drive.

    Args:
        model, tokenizer: from `stream`.
        calib: token windows; see `prune`. None for magnitude, whose layer errors are then not known.
        out: folder for the pruned model.
        settings: what to do to each layer.
        batch_size, progress: see `prune`.
        spill: keep hidden states on disk beside the output, not in memory.
        resume: go on where an earlier call with the same arguments was interrupted, if one was.
        overwrite: replace what an earlier call has written to `out`.
        force: begin even if memory or disk do not seem to suffice.
        tell: called with a line about what the work will take, and with one about anything that has to be done again.
        record: what else the output should say about how it was made, by the names of the command's options; with
            dataset="stdlib" and seed=0, say, `sparselab replay` can make it again.
        ranks: from `joined`, where several processes share the work; all are given the same arguments.
        request: who asked for it, in place of `record`.

    Returns:
        A report with one row a layer; its seconds are those of this call. Of several processes the first has it all.

    Raises:
        OutputError: `out` cannot be written, another process writes to it, or it holds what an earlier call has
            finished: without `resume`, or of other settings or inputs. Or what is read back is not what was written.
        ModelLoadError: a file is damaged.
        NotEnoughMemoryError: see `force`.
        LostRankError: another process has ended.
        ValueError, SparselabError: see `prune`.
    """
    settings, ranks = settings or Settings(), ranks or Ranks()
    if model.collective and ranks.world == 1:
        raise ValueError(
            "ranks: expected those from joined for a partitioned model, received none; each process has one"
        )
    check_calib(settings.method, calib)
    decoder = Decoder(model)
    windows = None if calib is None else check_tokens(decoder, calib)
    work = _work(model, settings, windows, batch_size, ranks)
    ranks.check_same("arguments", json.dumps(work).encode(), decoder.device)
    request = request or manifest.Request(arguments=record)
    made = manifest.begin(
        "prune",
        manifest.arguments_of(settings, windows)
        | {"model": model.name, "device": model.device.type, "dtype": model.model.dtype}
        | {"batch_size": batch_size, "spill": spill},
        _inputs(model, tokenizer, windows, work["inputs"], request.arguments.get("dataset")),
        manifest.machine_record(model.device, model.model.dtype, ranks.world),
        request,
    )
    finished = _finished(Path(out), work) if resume and ranks.leads else []
    if ranks.any(bool(finished), decoder.device):
        return Report(pd.DataFrame(finished), settings, 0.0, {}, 0)
    with _work_folder(out, overwrite, model, ranks) as folder:
        journal = Journal(folder / files.JOURNAL, work, resume) if ranks.leads else None
        shards = _Shards(folder, model, decoder, journal, ranks)
        if journal and journal.damage:
            tell(journal.damage)
        check_model(decoder, [settings], ranks=ranks)
        to_do = len(decoder.blocks) - shards.done
        needs = preflight.estimate(decoder, settings, windows, batch_size, to_do, shards.bytes_to_write(), spill, ranks)
        if not force:
            preflight.check(needs, decoder.device, folder)
        if ranks.leads:
            tell(f"{needs} to go; {shards.done} of {len(decoder.blocks)} blocks are done")
        shards.begin()
        hidden = folder / f"hidden-{ranks.rank}" if spill else None
        if hidden:
            hidden.mkdir()
        report = walk_all(
            decoder,
            settings,
            windows,
            {},
            batch_size,
            progress if ranks.leads else False,
            keeper=shards,
            spill=hidden,
            ranks=ranks,
        )
        if hidden:
            shutil.rmtree(hidden)
        ranks.wait(decoder.device)
        logits = shards.logits()
        if journal and logits is not None:
            shards.finish()
            _describe(folder, model, tokenizer, report, made)
            shards.check(logits)
            made["machine"] |= {"resumed_after_blocks": shards.done} if shards.done else {}
            sums = {entry["file"]: entry["sha256"] for entry in journal.entries}
            manifest.finish(folder, made, {"layers": report.layers, "checksums": sums}, ["report.csv"])
    return report


def _inputs(
    model: StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Int[Tensor, "n seqlen"] | None,
    hashes: dict[str, str],
    dataset: sources.Dataset | None,
) -> dict[str, Any]:
    """What goes in, for the manifest."""
    named = {"model": manifest.model_record(model.name, model.model.config, hashes)}
    return named if windows is None else named | {"calibration": manifest.windows_record(windows, tokenizer, dataset)}


def _work_folder(out: str | Path, overwrite: bool, model: StreamedModel, ranks: Ranks) -> AbstractContextManager[Path]:
    if ranks.leads:
        return files.resumable_output(out, overwrite, [model.checkpoint.folder])
    return nullcontext(files.unfinished_folder(out))


class _Shards:
    """The files of the output: one for each block, then those for the rest; a `Keeper`."""

    def __init__(
        self, folder: Path, model: StreamedModel, decoder: Decoder, journal: Journal | None, ranks: Ranks
    ) -> None:
        self._folder, self._model, self._decoder, self._journal = folder, model, decoder, journal
        self._witness: Witness | None = None
        blocks = [self._names(index) for index in range(len(decoder.blocks))]
        if len(set().union(*blocks)) < sum(map(len, blocks)):
            raise UnsupportedModelError("expected blocks with weights of their own; some share theirs")
        groups = blocks + _grouped(model, model.names(decoder.is_outside), max(map(self._bytes, blocks)))
        self._files = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
        self._shards = dict(zip(self._files, groups, strict=True))
        done = torch.tensor([self._undamaged(journal) if journal else 0], device=decoder.device)
        ranks.broadcast(done, 0)  # which holds the others up until the folder is as it should be
        self.done = int(done)  # blocks

    def bytes_to_write(self) -> int:
        """What is still to come."""
        return sum(self._bytes(self._shards[name]) for name in self._files[self.done :])

    def begin(self) -> None:
        """Send a window on its way through the pruned blocks; of those that are done, the files are at hand."""
        if self._journal is None and not self._model.collective:
            return
        self._witness = Witness(self._decoder)
        for index in range(self.done if self._journal else 0):
            with self._model.instead(self._pruned(index)):
                self._witness.follow(index)

    def kept(self, index: int) -> list[Row] | None:
        """See `Keeper`."""
        if index >= self.done:
            return None
        return self._journal.entries[index]["rows"] if self._journal else []

    def restore(self, index: int, block: nn.Module) -> None:
        """See `Keeper`."""
        prefix = self._decoder.block_prefix(index)
        block.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in self._pruned(index).items()})

    def keep(self, index: int, rows: list[Row]) -> None:
        """See `Keeper`."""
        if self._journal is None:
            return
        name = self._files[index]
        weights = {each: self._model.weight(each) for each in self._shards[name]}
        digest = write_shard(self._folder / name, self._model.layout.in_files(weights))
        self._journal.append({"block": index, "file": name, "sha256": digest, "rows": rows})
        if self._witness:
            self._witness.follow(index)

    def finish(self) -> None:
        """Write what is in no block, and the index."""
        for name in self._files[len(self._decoder.blocks) :]:
            weights = dict(self._model.read(self._shards[name]))
            digest = write_shard(self._folder / name, self._model.layout.in_files(weights))
            if self._journal:
                self._journal.append({"block": None, "file": name, "sha256": digest, "rows": []})
        stored = {shard: self._model.layout.in_files(self._absent(shard)) for shard in self._shards}
        write_index(self._folder, {shard: {n: t.nbytes for n, t in named.items()} for shard, named in stored.items()})

    def logits(self) -> Tensor | None:
        """What the pruned model says of the window; None in a process that has not followed it."""
        return self._witness.logits() if self._witness else None

    def check(self, logits: Tensor) -> None:
        """Look whether the output holds what was written, and opened again says the same of the window."""
        for entry in self._journal.entries if self._journal else ():
            if not _intact(self._folder, entry):
                raise OutputError(
                    f"{self._folder / entry['file']}: is not what was written any more; go on with --resume, which "
                    "does it again"
                )
        if self._witness:
            self._witness.check(logits, self._folder)

    def _undamaged(self, journal: Journal) -> int:
        """How many blocks' files are as they were written, one after the other; what else lies there is removed."""
        journal.drop(len(self._decoder.blocks))  # what is in no block is written anew
        for number, entry in enumerate(journal.entries):
            if not _intact(self._folder, entry):
                journal.drop(number, f"{entry['file']}: is missing or damaged")
                break
        files.clear(self._folder, keep=[entry["file"] for entry in journal.entries])
        return len(journal.entries)

    def _pruned(self, index: int) -> dict[str, Tensor]:
        """Weights of a block that is done, by their names in the model."""
        name = self._files[index]
        found = self._model.layout.in_model(load_file(self._folder / name), self._absent(name))
        return {each: tensor.to(self._model.device) for each, tensor in found.items()}

    def _absent(self, shard: str) -> dict[str, Tensor]:
        return {name: self._model.absent[name] for name in self._shards[shard]}

    def _names(self, index: int) -> list[str]:
        prefix = self._decoder.block_prefix(index)
        return self._model.names(lambda name: name.startswith(prefix))

    def _bytes(self, names: Iterable[str]) -> int:
        return sum(map(self._model.nbytes, names))


def _grouped(model: StreamedModel, names: list[str], most: int) -> list[list[str]]:
    """Names in groups of at most so many bytes, or of one weight."""
    groups: list[list[str]] = []
    size = most
    for name in names:
        size += model.nbytes(name)
        if size > most:
            groups.append([])
            size = model.nbytes(name)
        groups[-1].append(name)
    return groups


def _work(
    model: StreamedModel,
    settings: Settings,
    windows: Int[Tensor, "n seqlen"] | None,
    batch_size: int | None,
    ranks: Ranks,
) -> dict[str, Any]:
    """Everything that the result depends on."""
    folder = model.checkpoint.folder
    inputs = [folder / "config.json", *model.checkpoint.files]
    return {
        "settings": {name: str(value) for name, value in asdict(settings).items()} | {"pattern": str(settings.pattern)},
        "windows": None if windows is None else list(windows.shape),
        "tokens": None if windows is None else hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest(),
        "batch_size": batch_size,
        "dtype": str(model.model.dtype),
        "device": model.device.type,
        "versions": {name: version(name) for name in ("sparselab", "torch", "transformers")},
        "inputs": {
            str(path.relative_to(folder)): digest
            for path, digest in zip(inputs, _checksums(inputs, model.device, ranks), strict=True)
        },
    }


def _checksums(paths: list[Path], device: torch.device, ranks: Ranks) -> list[str]:
    """Of files that all processes can read; each reads some of them."""
    digests = torch.zeros(len(paths), hashlib.sha256().digest_size, dtype=torch.uint8)
    for number in range(ranks.rank, len(paths), ranks.world):
        digests[number] = torch.tensor(list(bytes.fromhex(checksum(paths[number]))), dtype=torch.uint8)
    digests = digests.to(device)
    ranks.add_up(digests)
    return [bytes(row).hex() for row in digests.tolist()]


def _finished(out: Path, work: dict[str, Any]) -> list[Row]:
    """The rows of an output that is finished and the result of this very work; none if it is not."""
    said, entries = read_journal(out / files.JOURNAL)
    if said != work or files.read_stamp(out) is None:
        return []
    index = json.loads((out / INDEX).read_text(encoding="utf-8"))["weight_map"]
    sound = {entry["file"] for entry in entries if _intact(out, entry)}
    if damaged := sorted(set(index.values()) - sound):
        raise OutputError(f"{out / damaged[0]}: is missing or damaged; prune again, with --overwrite")
    return [row for entry in entries for row in entry["rows"]]


def _intact(folder: Path, entry: dict[str, Any]) -> bool:
    path = folder / entry["file"]
    return path.is_file() and checksum(path) == str(entry["sha256"])


def _describe(
    folder: Path,
    model: StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    report: Report,
    made: manifest.Manifest,
) -> None:
    """Everything that belongs to a checkpoint besides its weights."""
    source, settings = model.checkpoint.folder, report.settings
    config = copy.deepcopy(model.model.config)
    config.architectures, config.dtype = [type(model.model).__name__], model.model.dtype
    with quiet():
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    if hasattr(config, "auto_map"):  # names code that comes with the model
        for path in source.glob("*.py"):
            shutil.copyfile(path, folder / path.name)
    report.layers.to_csv(folder / "report.csv", index=False)
    calib = made["inputs"].get("calibration")
    of = f" of {calib['dataset']}" if calib and calib["dataset"] else ""
    card = _CARD.format(
        name=made["settings"]["model"] or source.name,
        zeros=report.sparsity,
        count=len(report.layers),
        method=settings.method,
        pattern=settings.pattern,
        error=report.relative_error,
        calibration=f"{calib['windows']} × {calib['seqlen']} tokens{of}" if calib else "none",
        version=version("sparselab"),
    )
    files.write_text(folder / "README.md", card)
