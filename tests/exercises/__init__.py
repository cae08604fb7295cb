"""The exercises, in the order of the method; each file is one, with its grader.

A file says what is to be written and what is claimed of it; how that is tried is in ../exercise.py.

    TITLE, PAPER, EQUATION, MINUTES, TASK    what a student reads
    FILE, WRITE       the file, and names of the functions whose bodies are taken out of it
    TAKEN_OUT         functions of the file that would give the answer away: they go as a whole
    CHANGED           (file, text, other text): what would give it away elsewhere
    CLAIMS, PICTURE   see common.py

and, to try the grader itself (../test_exercise.py):

    WRONG             (text, other text, what the hint must say) of three likely mistakes
    UNUSUAL           another right solution, by function
    CONSTANT          what returns the same whatever it is given, by function
"""
from pathlib import Path

from . import (camera_rays, edm_loss, fit, gauss_newton, guidance, hash_rows, heun, integrate,
               loader, preconditioning, pyramid_loss, residual_block, skinning)

ALL = [integrate, camera_rays, hash_rows, residual_block, pyramid_loss, fit, preconditioning,
       edm_loss, heun, guidance, gauss_newton, skinning, loader]
FIRST_READING = 10               # so many of them are of the paper's rigid method, and text


def home(exercise, root):
    """The folder where the published solution lies: the project's, or this one."""
    if (Path(root) / exercise.FILE).is_file():
        return Path(root)
    return Path(__file__).parent
