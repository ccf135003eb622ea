"""Open a causal language model and its tokenizer: the bundled one, a folder, or a hub id."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from sparselab.errors import ModelLoadError

_PACKAGE = Path(__file__).resolve().parents[1]


def load(
    name: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a model for pruning or evaluation, in evaluation mode.

    Args:
        name: "tiny" for the bundled model, a folder in the Hugging Face layout, or a hub id.
        device: where to put it; None is the first GPU if there is one, else the CPU.
        dtype: of the weights; "auto" takes what the model's configuration says.

    Raises:
        ModelLoadError: nothing there, a damaged file, missing weights, or not a causal language model.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    where = tiny_folder() if name == "tiny" else Path(name)
    source = str(where) if where.exists() else str(name)
    if where.exists() and not (where / "config.json").is_file():
        raise ModelLoadError(f"{name}: expected a model folder with a config.json, found none in it")
    with quiet():
        try:
            opened: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except Exception as error:  # transformers, safetensors, json and tokenizers each raise their own
            raise ModelLoadError(_why_not(name, where, error)) from error
    model, info = opened
    if missing := sorted(info["missing_keys"]):
        raise ModelLoadError(f"{name}: its files lack {len(missing)} weights, first {missing[0]}; fetch it again")
    return model.to(place).eval(), tokenizer


def tiny_folder() -> Path:
    """Where the bundled model lies: inside an installed package, or in `data/` of a checkout."""
    installed = _PACKAGE / "data" / "tiny"
    return installed if installed.exists() else _PACKAGE.parent / "data" / "tiny"


def _why_not(name: str | Path, where: Path, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if where.exists():
        return f"{name}: cannot be read as a causal language model: {type(error).__name__}: {reason}"
    return (
        f"{name}: expected 'tiny', a model folder or a hub id; "
        f"there is no such folder, and the hub gave nothing ({reason})"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the library's own bars and reports inside; what matters in them raises."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
