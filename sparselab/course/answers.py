"""How a student's function is tried: on copies, for a limited time, without the answer key; and told in words."""

import ast
import inspect
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

SECONDS = 20.0
_PACKAGE = Path(__file__).resolve().parents[1]
_HERE = Path(__file__).resolve()


class CheckError(AssertionError):
    """An answer is wrong: in what, and where to look. Notebooks show the one line of it."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class Answer:
    """A student's function, called as often as a check needs it.

    Every call gets copies of the tensors among its arguments, must leave them as they are, must end within a limit of
    time, and may not call the package itself: sparselab is the key to its own exercises.

    Args:
        function: what the student wrote.
        seconds: for one call; there is no limit where the system has no alarm (Windows), or outside the main thread.

    Raises:
        CheckError: it is not a function, or its text names sparselab.
    """

    def __init__(self, function: Callable[..., Any], seconds: float = SECONDS) -> None:
        if not callable(function):
            raise CheckError(f"expected a function, received {type(function).__name__}; run the cell that defines it")
        self.name = getattr(function, "__name__", type(function).__name__)
        self._function, self._seconds = function, seconds
        if _uses_the_package(function):
            raise CheckError(f"{self.name} uses sparselab, which is the answer key; write it with torch alone")

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns.

        Raises:
            CheckError: it raises, takes too long, uses the answer key, or changes its arguments.
        """
        given = [_copied(argument) for argument in arguments]
        caught: list[str] = []
        try:
            with _within(self._seconds), _calls_into_the_package(caught):
                result = self._function(*given)
        except NotImplementedError as error:
            raise CheckError(f"{self.name} is not written yet") from error
        except _OutOfTime as error:
            raise CheckError(f"{self.name} ran for more than {self._seconds:g} s: does a loop never end?") from error
        except (Exception, SystemExit) as error:
            said = f"{type(error).__name__}: {error}".removesuffix(": ")
            words = ", ".join(map(_described, arguments))
            raise CheckError(f"{self.name} raised {said}; it was called with {words}") from error
        if isinstance(result, Iterator):  # whose body would run later, unseen
            raise CheckError(f"{self.name} returns a {type(result).__name__}; return all that it yields, in a list")
        if caught:
            raise CheckError(f"{self.name} calls {caught[0]}, which is the answer key; write it with torch alone")
        for number, (before, after) in enumerate(zip(arguments, given, strict=True), 1):
            if not _equal(before, after):
                raise CheckError(f"{self.name} changes its argument {number} in place; work on a copy: x = x.clone()")
        return result


class _OutOfTime(BaseException):
    """Not an Exception, so that no answer catches it in passing."""


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _calls_into_the_package(caught: list[str]) -> Iterator[None]:
    """Note the functions of sparselab that are called inside, by whatever name, as the interpreter sees it."""

    def look(frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call" and _of_the_package(frame.f_code.co_filename):
            caught.append(f"sparselab's {frame.f_code.co_name}")

    before = sys.getprofile()
    sys.setprofile(look)
    threading.setprofile(look)  # of threads to come
    try:
        yield
        if sys.getprofile() is not look:
            caught.append("sys.setprofile, which hides what else it calls: perhaps sparselab")
    finally:
        threading.setprofile(None)
        sys.setprofile(before)


def _of_the_package(filename: str) -> bool:
    path = Path(filename)
    return path.is_relative_to(_PACKAGE) and path != _HERE


def _uses_the_package(function: Callable[..., Any]) -> bool:
    try:
        nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))
    except (OSError, TypeError, SyntaxError):  # defined where there is no text to look at
        return False
    modules = [each.name for node in nodes if isinstance(node, ast.Import) for each in node.names]
    modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names = [node.id for node in nodes if isinstance(node, ast.Name)]
    return any(name.partition(".")[0] == "sparselab" for name in modules + names)


def _copied(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.clone()
    if isinstance(argument, list | tuple):
        return type(argument)(map(_copied, argument))
    return argument


def _equal(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return isinstance(after, Tensor) and before.dtype == after.dtype and torch.equal(before, after)
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(_equal, before, after))
    return True


def _described(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return f"a tensor {list(argument.shape)}"
    if isinstance(argument, list | tuple):
        return f"[{', '.join(map(_described, argument))}]"
    if isinstance(argument, nn.Module):
        return f"a {type(argument).__name__}"
    return f"{argument!r:.40}"
