"""Zero-shot and few-shot tasks, by lm-eval and its own class for transformers models."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselab.models import loading
from sparselab.models.blocks import evaluating
from sparselab.sources import offline


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: str | Path | None = None,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """What a model answers in the tasks of lm-eval (extra `eval`).

    Args:
        model, tokenizer: a causal language model in memory, and its tokenizer; not changed.
        tasks: their names, such as "arc_easy"; a pattern stands for all that fit it.
        num_fewshot: examples before each question; None is as the task says, mostly none.
        limit: of each task the first questions only.
        include_path: a folder with definitions of tasks of one's own.
        batch_size: requests at a time; None is one.

    Returns:
        A row a metric: task, metric (with its filter, if it has one), value, stderr (NaN if not known), samples.

    Raises:
        ValueError: lm-eval is not installed, there is no such task, or its data cannot be had.
    """
    evaluator, managers, models = _harness()
    with _quiet():
        manager, names = _known(tasks, managers.TaskManager, include_path)
        reachable = loading.hub_answers()
        with offline(not reachable):
            _fetch(manager, names, reachable)
            with evaluating(model):
                wrapped = models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or 1)
                found = evaluator.simple_evaluate(
                    wrapped, tasks=names, num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=False
                )
    return pd.DataFrame(_rows(found), columns=["task", "metric", "value", "stderr", "samples"])


def _harness() -> tuple[Any, Any, Any]:
    try:
        from lm_eval import evaluator, tasks
        from lm_eval.models import huggingface
    except ImportError as error:
        raise ValueError(f"tasks: need the package lm-eval ({error}); pip install 'sparselab[eval]'") from error
    return evaluator, tasks, huggingface


def _known(tasks: Sequence[str], make: Any, include_path: str | Path | None) -> tuple[Any, list[str]]:
    """What finds tasks, and their names; lm-eval's own thousands are only looked through if need be."""
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks: expected names in a list, received {tasks!r}")
    own = None if include_path is None else str(include_path)
    for defaults in (False, True) if own else (True,):
        manager = make(include_path=own, include_defaults=defaults)
        found = {task: manager.match_tasks([task]) for task in tasks}
        if all(found.values()):
            return manager, list(dict.fromkeys(name for names in found.values() for name in names))
    unknown = next(task for task, names in found.items() if not names)
    raise ValueError(
        f"tasks: {unknown!r} is none of lm-eval's {len(manager.all_tasks)}; `lm-eval ls tasks` lists them, and "
        "--include-path names a folder with others"
    )


def _fetch(manager: Any, names: list[str], reachable: bool) -> None:
    """Load the tasks' data: what fails here is no fault of the model."""
    try:
        manager.load(names)
    except Exception as error:  # whatever the libraries below raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0] if reachable else "the hub cannot be reached"
        raise ValueError(
            f"tasks: the data of {', '.join(names[:3])} cannot be had: {why}; tasks whose data lie on this disk can be "
            "used without it, see --include-path"
        ) from error


def _rows(found: Any) -> Iterator[dict[str, Any]]:
    for task, numbers in found["results"].items():
        for key, value in numbers.items():
            metric, _, how = key.partition(",")
            if not how or metric.endswith("_stderr"):
                continue
            stderr = numbers.get(f"{metric}_stderr,{how}")
            yield {
                "task": task,
                "metric": metric if how == "none" else f"{metric} ({how})",
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, int | float) else float("nan"),
                "samples": found["n-samples"].get(task, {}).get("effective", 0),
            }


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither its log nor the warnings of what it is made of; what matters raises."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with loading.quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
