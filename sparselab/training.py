"""Train the bundled model: a small Llama on the Python source that every installation carries."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparselab import corpora, files
from sparselab.errors import OutputError
from sparselab.evaluation import Perplexity, bits_per_byte, perplexity
from sparselab.models import load, quiet
from sparselab.models.loading import existing_device
from sparselab.sources import stdlib_documents

_END = "<|endoftext|>"
_CHECKPOINT = "checkpoint.pt"
_MINUTES_BETWEEN_CHECKPOINTS = 3.0
_BYTES_A_PARAMETER = 26  # two checkpoints of weights and two moments in float32 for a moment, and the model in bfloat16


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what the trained weights are.

    Args:
        vocab_size: tokens of the byte-level BPE vocabulary.
        hidden_size, intermediate_size, blocks, heads: shape of the Llama.
        steps: optimizer steps, each on `batch_size` windows of `seqlen` tokens.
        learning_rate: the peak, reached after `warmup` steps; then a cosine down to zero.
        weight_decay: of the matrices, embeddings included; gains have none.
        stdlib_share: share of windows drawn from the standard library; the rest comes from `packages`.
        packages: installed packages whose sources are read besides; none means the standard library alone.
        seed: of the initial weights and of the windows drawn.
    """

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 768
    blocks: int = 6
    heads: int = 4
    seqlen: int = 512
    steps: int = 9000
    batch_size: int = 8
    learning_rate: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.1
    stdlib_share: float = 0.4
    packages: tuple[str, ...] = (
        "accelerate", "fsspec", "huggingface_hub", "jinja2", "matplotlib", "networkx", "numpy", "pandas", "torch",
    )  # fmt: skip
    seed: int = 0

    def __post_init__(self) -> None:
        packages: Any = self.packages
        if isinstance(packages, str):
            raise TypeError(f"packages: expected several names in a tuple, received {packages!r}")
        least = dict.fromkeys(("intermediate_size", "blocks", "heads", "steps", "batch_size", "hidden_size"), 1)
        for name, low in (least | {"vocab_size": 258, "seqlen": 2, "warmup": 0, "seed": 0}).items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, received {getattr(self, name)}")
        if self.hidden_size % (2 * self.heads):
            wanted = f"a multiple of 2 · heads, {2 * self.heads}"
            raise ValueError(f"hidden_size: expected {wanted}, received {self.hidden_size}")
        for name in ("stdlib_share", "learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) <= 1:  # NaN fails too
                raise ValueError(f"{name}: expected a number from 0 to 1, received {getattr(self, name)}")

    @property
    def tokens(self) -> int:
        """Tokens seen in training."""
        return self.steps * self.batch_size * self.seqlen


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine down to zero at the last step."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def train(
    out: str | Path,
    config: TrainConfig | None = None,
    resume: bool = False,
    compiled: bool = False,
    device: str | torch.device = "cpu",
) -> Perplexity:
    """Train a model from nothing and write it to a folder, with its tokenizer, its model card and its training log.

    A checkpoint is kept in the folder while training lasts, from some minutes on; the model then takes its place.
    Resumed runs end with the weights that an uninterrupted one would have had on the same machine.

    Args:
        out: folder to write; must be empty or absent, or hold the checkpoint of an earlier training to resume.
        config: see `TrainConfig`.
        resume: go on from the checkpoint in `out`; starts from nothing if there is nothing in it.
        compiled: compile the model first (a C++ compiler is needed); faster after a minute.
        device: where to train.

    Returns:
        Held-out perplexity of the model as written.

    Raises:
        OutputError: the folder holds anything else, or a checkpoint that is damaged or of another configuration.
        ValueError: there is no such device, a package is not installed, or there is less text than one window.
    """
    config = config or TrainConfig()
    place, folder = existing_device(device), _checked_folder(out, resume)
    state = _read_checkpoint(folder / _CHECKPOINT, config, place)
    for package in config.packages:
        _package_root(package)
    tokenizer = train_tokenizer(stdlib_documents("train"), config)
    sources = _sources(tokenizer, config)
    held_out = corpora.evaluation_tokens(tokenizer, "stdlib", seqlen=min(256, config.seqlen))
    run = _Run(config, folder, place, sources, held_out[:64], state)
    files.check_space(folder, _BYTES_A_PARAMETER * run.model.num_parameters())
    seconds = run.go(compiled)
    with files.finished_output(folder, overwrite=True) as finished:
        tokenizer.save_pretrained(finished)
        _write_model(run.model, finished)
        model, _ = load(finished, device=place)
        result = perplexity(model, held_out)
        bpb = bits_per_byte(result, held_out, tokenizer)
        files.write_text(finished / "training.jsonl", "".join(json.dumps(row) + "\n" for row in run.log))
        card = _card(config, result, bpb, seconds, sources, model.num_parameters())
        files.write_text(finished / "README.md", card)
        files.write_stamp(finished, "train", asdict(config))
    return result


def train_tokenizer(texts: Sequence[str], config: TrainConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts one end-of-text token before each document."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{_END} $A", special_tokens=[(_END, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=_END, eos_token=_END, model_max_length=config.seqlen)


class _Run:
    """One training run: the model, the optimizer and where they stand."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        device: torch.device,
        sources: list[Int[Tensor, " _"]],
        held_out: Int[Tensor, "windows seqlen"],
        state: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.folder, self.device = config, folder, device
        self.sources, self.held_out = [source.numpy() for source in sources], held_out
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, float]] = []
        torch.manual_seed(config.seed)
        with device:
            self.model = _fresh_model(config)
        self.optimizer = _optimizer(self.model, config)
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]

    def go(self, compiled: bool) -> float:
        """Train to the last step; returns the seconds spent, those before a resume included."""
        compute_loss = torch.compile(self._loss) if compiled else self._loss
        saved = started = time.monotonic()
        first, before = self.step, self.seconds
        with tqdm(total=self.config.steps, initial=first, desc="train", unit="step", smoothing=0.05) as bar:
            while self.step < self.config.steps:
                loss = self._one_step(compute_loss)
                self.step += 1
                spent = time.monotonic() - started
                self.seconds = before + spent
                bar.update()
                if self.step % 20 == 0:
                    speed = (self.step - first) * self.config.batch_size * self.config.seqlen / spent
                    bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
                if self.step % 500 == 0 or self.step == self.config.steps:
                    self._log(loss)
                if time.monotonic() - saved > 60 * _MINUTES_BETWEEN_CHECKPOINTS:
                    self._save()
                    saved = time.monotonic()
        self._save()
        return self.seconds

    def _one_step(self, compute_loss: Any) -> float:
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        loss = compute_loss(self._batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    def _batch(self) -> Int[Tensor, "batch seqlen"]:
        # Drawn from the step's own seed, so that a resumed run sees the same windows.
        draw = np.random.default_rng([self.config.seed, self.step])
        rows = []
        for _ in range(self.config.batch_size):
            source = self.sources[0 if draw.random() < self.config.stdlib_share else -1]
            start = draw.integers(len(source) - self.config.seqlen + 1)
            rows.append(source[start : start + self.config.seqlen])
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def _loss(self, tokens: Int[Tensor, "batch seqlen"]) -> Float[Tensor, ""]:
        with _autocast(self.device):
            logits = self.model(input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

    def _log(self, loss: float) -> None:
        ppl = perplexity(self.model, self.held_out, progress=False)
        row = {"step": self.step, "loss": loss, "heldout_perplexity": float(ppl), "seconds": self.seconds}
        self.log.append({name: round(value, 4) for name, value in row.items()})
        tqdm.write(f"step {self.step}: loss {loss:.3f}, held-out perplexity {ppl} (first 64 windows)")

    def _save(self) -> None:
        state = {
            "config": _plain(self.config), "step": self.step, "seconds": self.seconds, "log": self.log,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        first = not (self.folder / _CHECKPOINT).exists()
        if first:  # nothing is written before that: somebody else may use the folder by now
            files.check_output(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
        with files.written_whole(self.folder / _CHECKPOINT) as partial:
            torch.save(state, partial)
        if first:  # later ones would claim files that others have put there
            files.write_stamp(self.folder, "train", asdict(self.config))


def _checked_folder(out: str | Path, resume: bool) -> Path:
    """The output's path, if nothing is there, or only the checkpoint of an earlier training that is to go on."""
    folder = files.check_output(out, overwrite=True)
    if files.read_stamp(folder) is not None:
        if not (folder / _CHECKPOINT).is_file():
            raise OutputError(
                f"{out}: holds a finished output, with no {_CHECKPOINT} to go on from; choose another --out"
            )
        if not resume:
            raise OutputError(f"{out}: holds an unfinished training; pass --resume to go on, or another --out")
    return folder


def _read_checkpoint(path: Path, config: TrainConfig, device: torch.device) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        state: Any = torch.load(path, map_location=device, weights_only=True)
        theirs = {name: state[name] for name in ("config", "step", "seconds", "log", "model", "optimizer")}["config"]
    except Exception as error:  # pickle, zip and torch each raise their own
        raise OutputError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}); choose another --out"
        ) from error
    if differing := [name for name, value in _plain(config).items() if theirs.get(name) != value]:
        raise OutputError(
            f"{path}: was made with other settings of {', '.join(differing)}; give those, or another --out"
        )
    return state  # type: ignore[no-any-return]


def _sources(tokenizer: PreTrainedTokenizerFast, config: TrainConfig) -> list[Int[Tensor, " _"]]:
    """Token streams to draw from: the standard library, and the packages if there are any."""
    texts = [stdlib_documents("train")]
    if config.packages:
        texts.append(list(_package_documents(config.packages)))
    streams = [corpora.token_stream(tokenizer, documents) for documents in tqdm(texts, desc="tokenise", unit="source")]
    if (shortest := min(len(stream) for stream in streams)) < config.seqlen:
        raise ValueError(f"seqlen: expected at most the {shortest} tokens of the text, received {config.seqlen}")
    return streams


def _package_root(package: str) -> Path:
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):  # the package that should hold it is missing, or it is no name
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"package {package!r} is not installed; install it, or train without it")
    return Path(spec.submodule_search_locations[0])


def _package_documents(packages: Sequence[str]) -> Iterator[str]:
    """Sources of installed packages without their tests and without copies of held-out modules."""
    held_out = {line for text in stdlib_documents("heldout") for line in _telling_lines(text)}
    for package in packages:
        root = _package_root(package)
        for path in sorted(root.rglob("*.py")):
            if {"test", "tests", "testing"} & set(path.relative_to(root).parts):
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            lines = _telling_lines(text)
            if sum(line in held_out for line in lines) <= 0.05 * len(lines):
                yield text


def _telling_lines(text: str) -> list[str]:
    """Lines long enough that two files share them only if one was copied from the other."""
    return [line.strip() for line in text.splitlines() if len(line.strip()) >= 30]


def _fresh_model(config: TrainConfig) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.blocks,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.seqlen,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _optimizer(model: LlamaForCausalLM, config: TrainConfig) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    gains = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if device.type in ("cpu", "cuda") else nullcontext()


def _write_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Weights in bfloat16, to be computed with in float32: half the bytes, and arithmetic to trust."""
    with quiet():
        model.bfloat16().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _plain(config: TrainConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(config)} | {"packages": list(config.packages)}


def _card(
    config: TrainConfig,
    result: Perplexity,
    bpb: float,
    seconds: float,
    sources: list[Int[Tensor, " _"]],
    parameters: int,
) -> str:
    sizes = " and ".join(f"{len(source) / 1e6:.1f}M" for source in sources)
    return f"""# tiny

A Llama of {parameters / 1e6:.2f}M parameters ({config.blocks} blocks, hidden size {config.hidden_size}, byte-level BPE
of {config.vocab_size}) that sparselab trained on Python source. It is small enough to prune in seconds and good enough
to show what pruning costs. It is of no other use.

| | |
|---|---|
| held-out perplexity | {result} ({len(result.nll)} windows of {result.seqlen} tokens of held-out modules) |
| bits per byte | {bpb:.3f} |
| trained on | {config.tokens / 1e6:.1f}M tokens, drawn from streams of {sizes} (the standard library; packages below) |
| time | {seconds / 60:.0f} minutes |
| seed | {config.seed} |
| weights | stored in bfloat16, loaded in float32 |

Trained by `sparselab train --out DIR` with

```json
{json.dumps(asdict(config), indent=2)}
```

Modules are held out by a hash of the top-level module's name (`sparselab.sources.is_heldout`). Files of the packages
that share lines with held-out modules were left out of training.
"""
