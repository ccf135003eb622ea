"""Open a causal language model and its tokenizer: the bundled one, a folder, or a hub id."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_session, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from sparselab import files
from sparselab.errors import ModelLoadError, SparselabError
from sparselab.models.checkpoint import Checkpoint
from sparselab.models.streamed import Misfit, StreamedModel
from sparselab.models.zero import PartitionedModel

_SECONDS_FOR_THE_HUB = 5
_WHAT_A_MODEL_NEEDS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken*", "spiece*")


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    *,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a model for pruning or evaluation, in evaluation mode.

    Args:
        name: "tiny" for the bundled model, a folder in the Hugging Face layout, or a hub id.
        device: where to put it; None is the first GPU if there is one, else the CPU.
        dtype: of the weights; "auto" takes what the model's configuration says.
        trust_remote_code: run Python code that comes with the model, with all your rights and a warning. Only for
            models that bring their own, and that you have looked at.

    Raises:
        ModelLoadError: nothing there, a damaged file, weights that are missing, do not fit or have no place, no
            tokenizer, code of its own that is not trusted, or not a causal language model.
        ValueError: there is no such device here.
    """
    place = existing_device(device)
    source, options = _found(name, trust_remote_code)
    _check_tokenizer(name, source)
    with _opening(name, source):
        # Tokenizer first: it is quick to open, and quick to miss.
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        opened: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    model, info = opened
    misfit = Misfit(*(sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")))
    if trouble := _misfit(model, misfit):
        raise ModelLoadError(f"{name}: {trouble}")
    return model.to(place).eval(), tokenizer


def stream(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    *,
    zero: bool = False,
    trust_remote_code: bool = False,
) -> tuple[StreamedModel, PreTrainedTokenizerBase]:
    """Open a model without reading its weights: each part of them is read when it is needed.

    Args:
        name, device, dtype, trust_remote_code: see `load`.
        zero: read all weights once, and partition them among processes; see `PartitionedModel`.

    Raises:
        ModelLoadError, ValueError: see `load`; also if weights are not in safetensors files, or under other names than
            current versions of transformers give them, and see `PartitionedModel.fill`.
    """
    place = existing_device(device)
    source, options = _found(name, trust_remote_code)
    _check_tokenizer(name, source)
    with _opening(name, source):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    streamed = _streamed(name, source, options, place, dtype, PartitionedModel if zero else StreamedModel)
    if isinstance(streamed, PartitionedModel):
        streamed.fill()
    return streamed, tokenizer


def stream_weights(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    *,
    trust_remote_code: bool = False,
) -> StreamedModel:
    """`stream`, of a model whose tokenizer is not needed and may not be there; the dtype "stored" is its files'."""
    place = existing_device(device)
    source, options = _found(name, trust_remote_code)
    return _streamed(name, source, options, place, dtype, StreamedModel)


def _streamed(
    name: str | Path,
    source: str,
    options: dict[str, Any],
    place: torch.device,
    dtype: str | torch.dtype,
    opened: type[StreamedModel],
) -> StreamedModel:
    with _opening(name, source):
        folder = Path(source)
        if not folder.exists():
            wanted = [*_WHAT_A_MODEL_NEEDS, *(["*.py"] if options["trust_remote_code"] else [])]
            folder = Path(
                snapshot_download(source, allow_patterns=wanted, local_files_only=options["local_files_only"])
            )
        checkpoint = Checkpoint(folder)
        kinds = {"auto": None, "stored": checkpoint.dtype}
        precision = kinds[dtype] if dtype in kinds else getattr(torch, str(dtype).removeprefix("torch."))
        streamed = opened(checkpoint, place, precision, options["trust_remote_code"])
        streamed.name = str(name)
    if trouble := _misfit(streamed.model, streamed.misfit):
        raise ModelLoadError(f"{name}: {trouble}")
    return streamed


@contextmanager
def _opening(name: str | Path, source: str) -> Iterator[None]:
    """Say in one way why a model cannot be opened: transformers, safetensors, json and tokenizers each raise theirs."""
    with quiet():
        try:
            yield
        except SparselabError:
            raise
        except Exception as error:
            raise ModelLoadError(f"{name}: {_why_not(source, error)}") from error


def existing_device(device: str | torch.device | None = None) -> torch.device:
    """The device that a name means on this machine; None is the first GPU if there is one, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    others = ["mps"] if torch.backends.mps.is_available() else []
    place = ("cuda" if gpus else "cpu") if device is None else str(device)
    if place not in ["cpu", *gpus, *others, *(["cuda"] if gpus else [])]:
        raise ValueError(
            f"device: expected one of {', '.join(['cpu', *gpus, *others])} on this machine, received {place!r}"
        )
    return torch.device(place)


def tiny_folder() -> Path:
    """Where the bundled model lies."""
    return files.bundled("data/tiny")


def hub_revision(name: str | Path) -> str | None:
    """The commit of a model that has come from the hub, where its cache keeps it; None for a folder."""
    try:
        if name == "tiny" or Path(name).exists():
            return None
        cached = try_to_load_from_cache(str(name), "config.json")
    except (ValueError, OSError):  # no id that the hub could have, and no path
        return None
    return Path(cached).parent.name if isinstance(cached, str) else None


def _found(name: str | Path, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """Where to open a model from, and with which options for that."""
    if trust_remote_code:
        warnings.warn(f"{name}: Python code that comes with this model is run, with all your rights", stacklevel=3)
    options = {"trust_remote_code": trust_remote_code}  # where it is not said, transformers asks at the terminal
    where = tiny_folder() if name == "tiny" else Path(name)
    if not where.exists():
        return str(name), options | {"local_files_only": not hub_answers()}
    if not (where / "config.json").is_file():
        raise ModelLoadError(f"{name}: expected a model folder with a config.json, found none in it")
    return str(where), options


def _check_tokenizer(name: str | Path, source: str) -> None:
    where = Path(source)
    if where.exists() and not any(next(where.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        raise ModelLoadError(
            f"{name}: has no tokenizer files; save the model's tokenizer there too (tokenizer.save_pretrained)"
        )


def hub_answers() -> bool:
    """Whether to ask the hub: one try in a few seconds, where its own client tries for half a minute."""
    try:
        if not constants.HF_HUB_OFFLINE:
            get_session().head(constants.ENDPOINT, timeout=_SECONDS_FOR_THE_HUB)
    except Exception:  # its client is of one HTTP library or another, each with its own errors
        return False
    return not constants.HF_HUB_OFFLINE


def _why_not(source: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "trust_remote_code" in str(error):
        return "brings Python code of its own; look at it, and if you trust it, pass trust_remote_code"
    if Path(source).exists():
        return f"cannot be read as a causal language model: {type(error).__name__}: {reason}; fetch or save it again"
    return (
        "expected 'tiny', a model folder or a hub id; there is no such folder, and the hub gave nothing "
        f"({reason}); check the name, and the network if it is a hub id"
    )


def _misfit(model: PreTrainedModel, misfit: Misfit) -> str:
    """In what the weights in the files are not those that the configuration asks for; empty if in nothing."""
    missing, surplus, mismatched = misfit
    if missing and {id(model.get_parameter(name)) for name in missing} <= {id(_head_weight(model))}:
        return f"has no weights for the head ({missing[0]}), so it is not a causal language model; use one that is"
    if missing:
        return f"its files lack {len(missing)} weights, first {missing[0]}; fetch it again"
    if surplus:
        return (
            f"its files hold {len(surplus)} weights for which its config.json has no place, first {surplus[0]}; "
            "fetch both from the same model"
        )
    for name, found, expected in mismatched:
        return (
            f"{name} is of shape {tuple(found)} in its files and of {tuple(expected)} by config.json; "
            "fetch both from the same model"
        )
    return ""


def _head_weight(model: PreTrainedModel) -> Any:
    return getattr(model.get_output_embeddings(), "weight", None)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the library's own bars and reports inside; what matters in them raises."""
    bars, verbosity, hub = logging.is_progress_bar_enabled(), logging.get_verbosity(), hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub)
        if bars:
            logging.enable_progress_bar()
