"""What all graders share: what a claim is, and how an answer is compared with the right one.

A claim is tried in three steps. The student's code takes part in the second alone, in a process of
its own, so it never sees what is right, nor says whether it was:

    given(generator)      here      numbers, drawn anew for every check: no constant can be right
    ask(module, given)    there     calls the student's function, returns tensors and plain values
    judge(given, answer)  here      "" where the claim holds, else a hint

The text of `ask` alone is sent over: it may use torch, math and what it imports itself. With it
goes all that is given but for "right", where a claim keeps there what only its judge may know.

What is not finite has no points, nor has what is empty: see `flaw`.

A hint must be true. So a judge also works out what comes out if one makes this or that mistake, and
names a mistake only where the answer is exactly what it leads to.
"""
from dataclasses import dataclass
from typing import Callable

import torch


@dataclass(frozen=True)
class Claim:
    """One line of the check. The points of an exercise's claims add up to 10."""
    points: int
    words: str                   # what is claimed, as it is printed
    given: Callable
    ask: Callable
    judge: Callable
    if_stopped: str = ""         # a hint for those whose solution raises an error here


@dataclass(frozen=True)
class Picture:
    """What is drawn after a check, of the student's answer and beside it of the right one."""
    given: Callable
    ask: Callable
    draw: Callable               # (figure, given, answer)


def flaw(answer, shape):
    """"" where an answer is a tensor of this shape, of real and finite numbers; else what it lacks.

    TRAP: comparisons with nan are False, and of no numbers at all everything is true. So a judge
    that does not ask `compare` asks this first.
    """
    if not isinstance(answer, torch.Tensor):
        return f"a tensor is asked for, and this is {type(answer).__name__}"
    if answer.shape != torch.Size(shape):
        return f"its shape should be {tuple(shape)}, and is {tuple(answer.shape)}"
    if answer.numel() == 0:
        return "it has no numbers"
    if answer.is_complex():
        return "its numbers are complex"
    if not answer.isfinite().all():
        return "some of its numbers are not finite"
    return ""


def difference(answer, right, tolerance=1e-4):
    """"" where two tensors are equal up to rounding; else in words what is wrong with `answer`.

    Rounding is measured against each number itself, and where that is small, against a hundredth
    of the largest. What is right may be worked out from another number of the student's: where that
    is not finite, nothing is equal to it.
    """
    problem = flaw(answer, right.shape)
    if problem:
        return problem
    answer = answer.detach().double()
    right = right.detach().double()
    if not right.isfinite().all():
        return "what it is worked out from is not finite"
    size = right.abs()
    allowed = tolerance * (size + 0.01 * size.max())
    if ((answer - right).abs() > allowed).any():
        return "its numbers are others"
    return ""


def compare(answer, right, hint, mistakes=(), tolerance=1e-4):
    """"" where `answer` is right. Else a hint: of the first of `mistakes`, (outcome, hint) each,
    whose outcome it is; or what is wrong with its shape; or `hint`, which must be true of all else.
    """
    problem = difference(answer, right, tolerance)
    if not problem:
        return ""
    for outcome, named in mistakes:
        if not difference(answer, outcome, tolerance):
            return named
    if problem != "its numbers are others":
        return f"{problem}. {hint}"
    return hint
