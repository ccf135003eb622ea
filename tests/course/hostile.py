"""Submissions to problem set 1 that try the grader: by mistake, by malice or by accident."""

from textwrap import dedent

from handed_in import answered, reference
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

RENAMED = """
def magnitude_masks(weight, sparsity):
    return weight > 0
"""
FAILING = """
def global_magnitude_masks(weights, sparsity):
    return weights[7]
"""
HUGE = """
def nm_mask(scores, n, m):
    return torch.zeros(10**13) > 0
"""
GROWING = """
def feature_norms(model, name, batches):
    held = []
    while True:
        held.append(bytearray(10**8))
"""
ANSWER_KEY = """
from sparselab import solvers

def wanda_mask(weight, feature_norm, sparsity):
    return solvers.wanda(weight, feature_norm, sparsity) != 0
"""
LEAVING = """
def perplexity(batches):
    raise SystemExit
"""
ENDLESS = """
def magnitude_mask(weight, sparsity):
    while True:
        pass
"""
ENDLESS_CELL = """
while True:
    pass
"""
UNSTOPPABLE = """
import time
while True:
    try:
        time.sleep(0.01)
    except BaseException:
        pass
"""
GONE = """
import os
os._exit(0)
"""
FLOOD = """
def nm_mask(scores, n, m):
    for _ in range(100):
        print("x" * 10**6)
"""
LOUD = """
import sys, warnings

def nm_mask(scores, n, m):
    warnings.warn("careful")
    print("working", file=sys.stderr)
    groups = scores.reshape(-1, m)
    keep = torch.zeros_like(groups, dtype=torch.bool)
    return keep.scatter(1, groups.topk(n, dim=1).indices, True).reshape(scores.shape)
"""
LEAKING = """
def nm_mask(scores, n, m):
    import inspect, sys
    raise ValueError(inspect.getsource(sys.modules["hidden"]))
"""
CHATTY = """
def nm_mask(scores, n, m):
    print("x" * 50_000)
    groups = scores.reshape(-1, m)
    keep = torch.zeros_like(groups, dtype=torch.bool)
    return keep.scatter(1, groups.topk(n, dim=1).indices, True).reshape(scores.shape)
"""
HELPER = """
def kept_places(groups, n):
    return groups.topk(n, dim=1).indices
"""
HELPED = """
def nm_mask(scores, n, m):
    groups = scores.reshape(-1, m)
    keep = torch.zeros_like(groups, dtype=torch.bool)
    return keep.scatter(1, kept_places(groups, n), True).reshape(scores.shape)
"""
CURIOUS = """
import inspect, sys
print(inspect.getsource(sys.modules["hidden"]))
print(sys.modules["hidden"].__file__)
"""
OTHER_CHECKS = """
import sys, types
from pathlib import Path
from sparselab.course import answers, ps1
check = types.SimpleNamespace(**{name: print for name in vars(ps1)})
for name in list(vars(ps1)):
    if not name.startswith("_"):
        setattr(ps1, name, lambda *_, **__: "passed")
answers.Answer.__call__ = lambda *_: None
sys.modules["hidden"] = types.SimpleNamespace(check=print, fresh=lambda _: check)
Path("hidden.py").write_text("check = fresh = print")
get_ipython().set_custom_exc((Exception,), lambda *_, **__: None)
print = lambda *_: None
"""
OTHER_TORCH = """
import importlib
import torch
torch.Tensor.__ne__ = torch.Tensor.__gt__ = lambda *_: False
load = importlib.import_module
def loaded(name, *arguments):
    module = load(name, *arguments)
    if name.endswith("ps1"):
        for each in ("magnitude_mask", "nm_mask", "wanda_mask"):
            setattr(module, each, lambda *_, **__: "passed")
    return module
importlib.import_module = loaded
"""


def submissions(blank: NotebookNode) -> dict[str, NotebookNode]:
    """By student; where nothing else is said, the other exercises are answered right."""

    def solved(**answers: str) -> NotebookNode:
        cells = {f"{exercise}-answer": dedent(source).strip() for exercise, source in answers.items()}
        return answered(blank, reference("ps1") | cells)

    six = {
        "magnitude_mask": RENAMED, "global_magnitude_masks": FAILING, "nm_mask": HUGE, "feature_norms": GROWING,
        "wanda_mask": ANSWER_KEY, "perplexity": LEAVING,
    }  # fmt: skip
    return {
        "six-ways": solved(**six),
        "endless": solved(magnitude_mask=ENDLESS),
        "endless-cell": solved(nm_mask=ENDLESS_CELL),
        "unstoppable": solved(feature_norms=UNSTOPPABLE),
        "gone": solved(wanda_mask=GONE),
        "flood": solved(nm_mask=FLOOD),
        "loud": solved(nm_mask=LOUD, question="Because."),
        "chatty": solved(nm_mask=CHATTY),
        "helped": answered(solved(nm_mask=HELPED), {"masks-picture": HELPER.strip()}),
        "leaking": solved(nm_mask=LEAKING),
        "curious": solved(perplexity=reference("ps1")["perplexity-answer"] + CURIOUS),
        "deleted": _deleted(solved()),
        "edited": _edited(blank),
        "checks": _with(blank, OTHER_CHECKS, 2),
        "torch": _with(blank, OTHER_TORCH, 2),
    }


def _with(notebook: NotebookNode, source: str, place: int) -> NotebookNode:
    made = answered(notebook, {})
    made.cells.insert(place, new_code_cell(source.strip()))
    return made


def _deleted(notebook: NotebookNode) -> NotebookNode:
    notebook.cells = [cell for cell in notebook.cells if not cell.id.startswith("magnitude_mask")]
    return notebook


def _edited(blank: NotebookNode) -> NotebookNode:
    """Checks and metadata changed to one's own advantage."""
    changes = {"nm_mask-visible": "print('passed')", "nm_mask-hidden": "pass", "question-answer": "By heart."}
    made = answered(blank, changes)
    for cell in made.cells:
        if "nbgrader" in cell.metadata:
            cell.metadata.nbgrader |= {"points": 100, "locked": False, "schema_version": 1}
    made.metadata.kernelspec = {"name": "no-such-kernel", "display_name": "?"}
    return made
