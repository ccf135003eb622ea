"""A student's notebook is run to be graded: within limits, by checks that it cannot replace, for a line of reason."""

import re
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_output
from nbgrader.preprocessors import Execute
from traitlets import Integer, Unicode

from sparselab.course.grader.submission import NOT_GRADED

REMARKS = "sparselab_remarks"
# Before each check, the checks are read from disk again; after it, a word that only a check that came so far can say.
_BEFORE = """
def _checks_from_disk():
    import sys
    sys.modules.pop("hidden", None)
    sys.path.insert(0, {instructor!r})
    import hidden
    sys.path.remove({instructor!r})
    return hidden.fresh({problem_set!r})
check = _checks_from_disk()
"""
_AFTER = "\n__import__('builtins').print({word!r})"
_HIDDEN = re.compile(r"### BEGIN HIDDEN TESTS.*?### END HIDDEN TESTS", re.DOTALL)
_LEFT_OUT = "(what shows the grader's files is left out)"
_MOST_OUTPUT = 2_000_000  # characters of one cell; what a loop prints beyond them is not kept


class GradedExecution(Execute):  # type: ignore[misc]
    """Runs all cells of a notebook; whatever a student's code does, every check has failed with a reason, or passed.

    A check fails without being run once the notebook's time is over or its process has ended. A warning on the way is
    no mistake (for nbgrader, anything on stderr is).

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
    iopub_timeout = Integer(30, help="seconds that a cell has to stop in, once it is interrupted").tag(config=True)

    def preprocess(self, nb: NotebookNode, resources: Any, km: Any = None) -> tuple[NotebookNode, Any]:
        """Run the notebook, and put what there is to say about it at its top."""
        self._problem_set = resources["nbgrader"]["assignment"]
        self._deadline = time.monotonic() + self.seconds
        self._ended, self._limited, self._word = "", False, ""
        self._remarks = list(nb.metadata.pop(REMARKS, []))
        lines = [line.strip() for path in Path(self.instructor).glob("*.py") for line in path.read_text().splitlines()]
        secret = [self.instructor, *(line for line in lines if len(line) > 30)]
        self._secret = {form for words in secret for form in (words, repr(words)[1:-1])}
        self.timeout_func = lambda _cell: self._left()
        nb, resources = super().preprocess(nb, resources, km)
        if self._remarks:
            listed = "".join(f"- {remark}\n" for remark in self._remarks)
            nb.cells.insert(0, new_markdown_cell(f"**Remarks of the grader**\n\n{listed}", id="remarks"))
        nb.metadata[REMARKS] = self._remarks
        return nb, resources

    def preprocess_cell(self, cell: NotebookNode, resources: Any, index: int) -> tuple[NotebookNode, Any]:
        """Run one cell, if it is to be run."""
        if cell.cell_type != "code" or NOT_GRADED in cell.metadata.get("tags", []):
            return cell, resources
        nbgrader = cell.metadata.get("nbgrader", {})
        if not nbgrader.get("grade"):
            self._run(cell, resources, index)
            outputs = cell.get("outputs", [])
            cell.outputs = [_stream(_LEFT_OUT) if self._shows_instructor(output) else output for output in outputs]
            return cell, resources
        source, self._word = cell.source, secrets.token_hex(16)
        before = _BEFORE.format(instructor=self.instructor, problem_set=self._problem_set)
        cell.source = before + source + _AFTER.format(word=self._word)
        self._run(cell, resources, index)
        cell.source = _HIDDEN.sub("", source)
        said = _verdict(cell.get("outputs", []), self._word, self._ended)
        if self._shows_instructor(said):  # which still has failed, or passed
            said = _failure(said.ename, _LEFT_OUT) if said.output_type == "error" else _stream(_LEFT_OUT)
        cell.outputs = [said]
        return cell, resources

    def _left(self) -> int:
        return max(1, min(self.timeout, round(self._deadline - time.monotonic())))

    def _run(self, cell: NotebookNode, resources: Any, index: int) -> None:
        if not self._ended and time.monotonic() > self._deadline:
            self._stop(f"the notebook took more than {self.seconds} s in all", cell)
        if self._ended:
            return
        if not self._limited:
            self._limit_memory()
        self._shown, given = 0, self._left()
        try:
            super().preprocess_cell(cell, resources, index)
        except DeadKernelError:
            self._stop("the process of the notebook ended (exit, a crash, or too much memory)", cell)
        except CellTimeoutError:
            self._stop("the notebook could not be stopped after its time was over: does a loop never end?", cell)
        for output in cell.outputs:
            if output.output_type == "error" and output.ename == "CellTimeoutError":
                output.evalue = f"stopped after {given} s: does a loop never end?"
                self._remarks.append(f"cell {cell.id} was {output.evalue}")

    def output(self, outs: list[NotebookNode], msg: dict[str, Any], display_id: str, cell_index: int) -> Any:
        """Keep an output, unless the cell has shown too much already."""
        content = str(msg["content"])
        if self._shown > _MOST_OUTPUT and not (self._word and self._word in content):
            return None
        self._shown += len(content)
        return super().output(outs, msg, display_id, cell_index)

    def _stop(self, reason: str, cell: NotebookNode) -> None:
        self._ended = f"{reason}, in cell {cell.id}"
        self._remarks.append(f"{self._ended}; nothing after it was run")

    def _limit_memory(self) -> None:
        self._limited = True
        if self.memory and sys.platform == "linux":
            import resource

            resource.prlimit(self.km.provisioner.pid, resource.RLIMIT_DATA, (self.memory, self.memory))

    def _shows_instructor(self, output: NotebookNode) -> bool:
        """Whether an output has something of the instructor's folder, as it is or as Python would write it."""
        shown = str(output)
        return any(words in shown for words in self._secret)


def _verdict(outputs: list[NotebookNode], word: str, ended: str) -> NotebookNode:
    """The outputs of a check as one: what it says if it came to its end, else why it did not, in a line."""
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    errors = [output for output in outputs if output.output_type == "error"]
    if errors:
        error = next((each for each in errors if each.ename == "CellTimeoutError"), errors[0])
        renamed = "; was it renamed, or its cell deleted?" if error.ename == "NameError" else ""
        return _failure(error.ename, (error.evalue or error.ename) + renamed)
    if word in text:
        said = "".join(output.text for output in outputs if output.get("name") == "stdout")
        return _stream(said.replace(word, "").strip())
    if ended:
        return _failure("NotReached", ended)
    return _failure("NotConfirmed", "the check did not come to its end: the notebook changes how errors are shown")


def _stream(text: str) -> NotebookNode:
    stream: NotebookNode = new_output("stream", name="stdout", text=text + "\n")
    return stream


def _failure(name: str, reason: str) -> NotebookNode:
    failure: NotebookNode = new_output("error", ename=name, evalue=reason, traceback=[f"{name}: {reason}"])
    return failure
