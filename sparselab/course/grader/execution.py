"""A student's notebook is run to be graded: within limits, by checks that it cannot replace, for a line of reason."""

import resource
import secrets
import time
from pathlib import Path
from typing import Any

from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_output
from nbgrader.preprocessors import Execute
from traitlets import Integer, Unicode

from sparselab.course.answers import mentions_the_package
from sparselab.course.grader.submission import exercises

NOT_GRADED = "not-graded"  # tag of cells that no check needs, and that would take long
REMARKS = "sparselab_remarks"
# Before each check, the checks are read from disk again; after it, a word that only a check that came so far can say.
_BEFORE = """
import sys
sys.modules.pop("hidden", None)
sys.path.insert(0, {instructor!r})
import hidden
sys.path.remove({instructor!r})
check = hidden.fresh({problem_set!r})
"""
_AFTER = "\nimport builtins\nbuiltins.print({word!r})"
_MOST_OUTPUT = 2_000_000  # characters of one cell; what a loop prints beyond them is not kept


class GradedExecution(Execute):  # type: ignore[misc]
    """Runs all cells of a notebook; whatever a student's code does, every check has failed with a reason, or passed.

    A check fails without being run once the notebook's time is over or its process has ended, and where the answer uses
    the answer key. A warning on the way is no mistake (for nbgrader, anything on stderr is).

    Args:
        timeout: seconds for one cell.
        seconds: for the whole notebook.
        memory: bytes that the notebook's process may hold; 0 for any number. Only Linux can limit it.
        instructor: folder of the hidden checks.
    """

    timeout = Integer(120).tag(config=True)
    seconds = Integer(600).tag(config=True)
    memory = Integer(0).tag(config=True)
    instructor = Unicode().tag(config=True)

    def preprocess(self, nb: NotebookNode, resources: Any, km: Any = None) -> tuple[NotebookNode, Any]:
        """Run the notebook, and put what there is to say about it at its top."""
        self._problem_set = resources["nbgrader"]["assignment"]
        self._deadline = time.monotonic() + self.seconds
        self._ended, self._limited = "", False
        self._remarks = list(nb.metadata.pop(REMARKS, []))
        self._refused = {exercise for exercise, cell in _answers(nb) if _is_the_key(exercise, cell.source)}
        self.timeout_func = lambda _cell: max(1, min(self.timeout, round(self._deadline - time.monotonic())))
        nb, resources = super().preprocess(nb, resources, km)
        if self._remarks:
            lines = "".join(f"- {remark}\n" for remark in self._remarks)
            nb.cells.insert(0, new_markdown_cell(f"**Remarks of the grader**\n\n{lines}", id="remarks"))
        nb.metadata[REMARKS] = self._remarks
        return nb, resources

    def preprocess_cell(self, cell: NotebookNode, resources: Any, index: int) -> tuple[NotebookNode, Any]:
        """Run one cell, if it is to be run."""
        if cell.cell_type != "code" or NOT_GRADED in cell.metadata.get("tags", []):
            return cell, resources
        nbgrader = cell.metadata.get("nbgrader", {})
        if not nbgrader.get("grade"):
            self._run(cell, resources, index)
            cell.outputs = [self._without_instructor(output) for output in cell.get("outputs", [])]
            return cell, resources
        exercise = nbgrader["grade_id"].rpartition("-")[0]
        if exercise in self._refused:
            reason = f"{exercise} uses sparselab, which is the answer key; write it with torch alone"
            cell.outputs = [_failure("CheckError", reason)]
            return cell, resources
        source, word = cell.source, secrets.token_hex(16)
        before = _BEFORE.format(instructor=self.instructor, problem_set=self._problem_set)
        cell.source = before + source + _AFTER.format(word=word)
        self._run(cell, resources, index)
        cell.source, cell.outputs = source, _verdict(cell.get("outputs", []), word, self._ended)
        return cell, resources

    def _run(self, cell: NotebookNode, resources: Any, index: int) -> None:
        if not self._ended and time.monotonic() > self._deadline:
            self._stop(f"the notebook took more than {self.seconds} s in all", cell)
        if self._ended:
            return
        if not self._limited:
            self._limit_memory()
        self._shown = 0
        try:
            super().preprocess_cell(cell, resources, index)
        except DeadKernelError:
            self._stop("the process of the notebook ended (exit, a crash, or too much memory)", cell)
        except CellTimeoutError:
            self._stop("the notebook could not be stopped after its time was over: does a loop never end?", cell)
        for output in cell.outputs:
            if output.output_type == "error" and output.ename == "CellTimeoutError":
                output.evalue = f"stopped after {self.timeout} s: does a loop never end?"
                self._remarks.append(f"cell {cell.id} was {output.evalue}")

    def output(self, outs: list[NotebookNode], msg: dict[str, Any], display_id: str, cell_index: int) -> Any:
        """Keep an output, unless the cell has shown too much already."""
        if self._shown > _MOST_OUTPUT:
            return None
        self._shown += len(str(msg["content"]))
        return super().output(outs, msg, display_id, cell_index)

    def _stop(self, reason: str, cell: NotebookNode) -> None:
        self._ended = f"{reason}, in cell {cell.id}"
        self._remarks.append(f"{self._ended}; nothing after it was run")

    def _limit_memory(self) -> None:
        self._limited = True
        if self.memory and hasattr(resource, "prlimit"):
            resource.prlimit(self.km.provisioner.pid, resource.RLIMIT_DATA, (self.memory, self.memory))

    def _without_instructor(self, output: NotebookNode) -> NotebookNode:
        """An output of a student's own cell, unless it shows what lies in the instructor's folder."""
        lines = [line.strip() for path in Path(self.instructor).glob("*.py") for line in path.read_text().splitlines()]
        secret = [self.instructor, *(line for line in lines if len(line) > 30)]
        if any(words in str(output) or repr(words)[1:-1] in str(output) for words in secret):
            output = new_output(
                "stream", name="stdout", text="(this output shows the grader's files and is left out)\n"
            )
        return output


def _answers(notebook: NotebookNode) -> list[tuple[str, NotebookNode]]:
    """Cells that define the function an exercise is named for."""
    named = dict.fromkeys(exercise for exercise, _ in exercises(notebook))
    cells = {cell.get("id"): cell for cell in notebook.cells}
    return [(name, cells[f"{name}-answer"]) for name in named if f"{name}-answer" in cells]


def _is_the_key(exercise: str, source: str) -> bool:
    return f"def {exercise}(" in source and mentions_the_package(source)


def _verdict(outputs: list[NotebookNode], word: str, ended: str) -> list[NotebookNode]:
    """The outputs of a check as one: what it says if it came to its end, else why it did not, in a line."""
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    errors = [output for output in outputs if output.output_type == "error"]
    if errors:
        renamed = "; was it renamed, or its cell deleted?" if errors[0].ename == "NameError" else ""
        return [_failure(errors[0].ename, (errors[0].evalue or errors[0].ename) + renamed)]
    if word in text:
        said = "".join(output.text for output in outputs if output.get("name") == "stdout").replace(word + "\n", "")
        return [new_output("stream", name="stdout", text=said)] if said else []
    if ended:
        return [_failure("NotReached", ended)]
    return [_failure("NotConfirmed", "the check did not come to its end: the notebook changes how errors are shown")]


def _failure(name: str, reason: str) -> NotebookNode:
    failure: NotebookNode = new_output("error", ename=name, evalue=reason, traceback=[f"{name}: {reason}"])
    return failure
