"""How far a piece of work has come: shown as a bar, told to a function, or kept to itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

# True shows a bar, False nothing. A function is called with (units done, units in all) after every unit; what it
# raises stops the work, which is how a button cancels it.
Progress = bool | Callable[[int, int], None]


def in_time(seconds: float) -> str:
    """A duration, as short as it can be said."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


@contextmanager
def tracked(progress: Progress, total: int, what: str, unit: str) -> Iterator[Callable[[int], object]]:
    """Report units of work as they are done.

    Args:
        progress: who is told, and how.
        total: units in all.
        what, unit: the words beside a bar.

    Yields:
        A function to call with the number of units just done.
    """
    if not callable(progress):
        with tqdm(total=total, desc=what, unit=unit, disable=not progress) as bar:
            yield bar.update
        return
    done = 0

    def advance(units: int) -> None:
        nonlocal done
        done += units
        progress(done, total)

    yield advance
