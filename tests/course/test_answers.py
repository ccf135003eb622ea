import sys
import threading
import time

import pytest
import torch

from sparselab import solvers
from sparselab.course import Answer, CheckError, ps1

WEIGHT = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def by_another_name(weight):
    prune = solvers.magnitude
    return prune(weight, 0.5)


def hidden_from_the_caller(weight):
    try:
        return getattr(solvers, "wan" + "da")(weight, torch.ones(8), 0.5)
    except Exception:
        return weight


def importing(weight):
    from sparselab.solvers import magnitude  # noqa: F401

    return weight


def in_a_thread(weight):
    found = []
    thread = threading.Thread(target=lambda: found.append(solvers.magnitude(weight, 0.5)))
    thread.start()
    thread.join()
    return found[0]


def unseen(weight):
    sys.setprofile(None)
    return by_another_name(weight)


def by_the_check(weight):
    return ps1.kind(weight)


def generating(weight):
    yield from solvers.magnitude(weight, 0.5)


def in_place(weight):
    return weight.zero_()


def in_a_list(weights):
    weights.append(1)


def unwritten(weight):
    raise NotImplementedError


def failing(weight):
    raise KeyError("no such thing")


def endless(weight):
    while True:
        try:
            time.sleep(0.01)
        except Exception:  # which would swallow an ordinary error
            continue


@pytest.mark.parametrize(
    ("function", "given", "message"),
    [
        (by_another_name, WEIGHT, "by_another_name calls sparselab's magnitude, which is the answer key"),
        (hidden_from_the_caller, WEIGHT, "calls sparselab's wanda, which is the answer key"),
        (importing, WEIGHT, "importing uses sparselab, which is the answer key"),
        (in_a_thread, WEIGHT, "in_a_thread calls sparselab's magnitude, which is the answer key"),
        (unseen, WEIGHT, "unseen calls sys.setprofile, which hides what else it calls"),
        (by_the_check, WEIGHT, "by_the_check calls sparselab's kind, which is the answer key"),
        (generating, WEIGHT, "generating returns a generator; return all that it yields, in a list"),
        (in_place, WEIGHT, "in_place changes its argument 1 in place; work on a copy"),
        (in_a_list, [WEIGHT], "in_a_list changes its argument 1 in place"),
        (unwritten, WEIGHT, "unwritten is not written yet"),
        (failing, WEIGHT, r"failing raised KeyError: 'no such thing'; it was called with a tensor \[4, 8\]"),
        (endless, WEIGHT, "endless ran for more than 0.2 s: does a loop never end"),
        (7, WEIGHT, "expected a function, received int; run the cell that defines it"),
    ],
)
def test_what_is_wrong_is_said(function, given, message):
    with pytest.raises(CheckError, match=message):
        Answer(function, seconds=0.2)(given)


def test_the_package_may_be_used_elsewhere():
    """Before, for a picture or a comparison; and what a library calls is no matter."""
    pruned = solvers.magnitude(WEIGHT, 0.5)
    assert torch.equal(Answer(lambda weight: weight.masked_fill(pruned == 0, 0))(WEIGHT), pruned)
    assert solvers.wanda(WEIGHT, torch.ones(8), 0.5).count_nonzero() == 16, "and afterwards"


def test_the_student_works_on_copies():
    kept = []
    assert Answer(lambda weight: kept.append(weight))(WEIGHT) is None
    kept[0].zero_()
    assert WEIGHT.all()
