"""A process in which a student's code answers, and can do no more than that.

    python child.py MODULE N      in a folder that exercise.py has filled:

    asks.py        how each claim asks: functions ask0, ask1, ...
    given.pt       what each claim asks with: a list
    0/ ... N-1/    solutions, each a copy of the project; MODULE is the file to ask
    0/answer0.pt   written here: {"answer": ...} or {"stopped": why}

Nothing of the graders is in that folder, neither the right answers nor the way to them: this file,
too, is run from a copy. It does not say how good an answer is; it does not know.
"""
import importlib
import io
import linecache
import os
import sys
from pathlib import Path

import torch

# What is never needed to calculate: other programs, other machines, other people's files.
REFUSED = ("os", "shutil", "subprocess", "socket", "ctypes", "gc", "pty", "winreg", "signal")
HARMLESS = {"os.listdir", "os.scandir", "os.walk", "os.putenv", "os.unsetenv", "os.getxattr"}


def fence(folder):
    """From here on files are written in `folder` only, and read there and where Python's own are.

    Python tells an audit hook of whatever it opens, starts or removes, before it does so, and a
    hook cannot be taken down again. It is a fence, not a prison: C code goes round it. But a
    solution that reads the original, or writes to the grader, does not do so by mistake.
    """
    own = os.path.realpath(folder)
    readable = [own]
    for place in sys.path[1:]:
        readable.append(os.path.realpath(place))
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def is_in(path, places):
        if not isinstance(path, (str, bytes, os.PathLike)):
            return True                          # a file that is open already
        path = os.path.realpath(os.fsdecode(path))
        for place in places:
            if path == place or path.startswith(place + os.sep):
                return True
        return False

    def hook(event, arguments):
        if event == "open":
            path, mode, flags = arguments
            writes = flags & writing if mode is None else set(mode) & set("wax+")
            if not is_in(path, [own] if writes else readable):
                raise PermissionError(f"it may not open {os.fsdecode(path)}: an answer is "
                                      "calculated from what the function is given")
        elif event.split(".")[0] in REFUSED and event not in HARMLESS:
            if event != "os.mkdir" or not is_in(arguments[0], [own]):
                raise PermissionError(f"it may not call {event}: an answer is calculated")

    sys.addaudithook(hook)


def in_words(error, folder):
    """What stopped a solution, in one line: which error, where in the student's files."""
    place = ""
    trace = error.__traceback__
    while trace is not None:                     # the last place that is the student's own
        path = trace.tb_frame.f_code.co_filename
        if Path(path).parent == folder:
            place = f" ({Path(path).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.filename:
        place = f" ({Path(error.filename).name}, line {error.lineno})"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:150]}{place}"


def answer_of(ask, module, given, folder):
    """What one solution answers to one claim, as the bytes of a file."""
    torch.manual_seed(0)
    file = io.BytesIO()
    try:
        torch.save({"answer": ask(module, given)}, file)
    except BaseException as error:               # sys.exit is one, too
        file = io.BytesIO()
        torch.save({"stopped": in_words(error, folder)}, file)
    return file.getvalue()


def import_from(folder, name):
    """A module of one solution. Those that another one left behind are forgotten first."""
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)
    linecache.clearcache()
    sys.path[0] = str(folder)
    importlib.invalidate_caches()
    return importlib.import_module(name)


def main():
    name, n_solutions = sys.argv[1], int(sys.argv[2])
    here = Path.cwd()
    torch.set_num_threads(1)                     # small tensors: more threads only wait
    import asks                                  # from here, before sys.path[0] is a solution's
    given = torch.load(here / "given.pt", weights_only=True)
    fence(here)
    for number in range(n_solutions):
        folder = here / str(number)
        failed = None
        try:
            module = import_from(folder, name)
        except BaseException as error:
            failed = in_words(error, folder)
        for i in range(len(given)):
            if failed:
                file = io.BytesIO()
                torch.save({"stopped": failed}, file)
                content = file.getvalue()
            else:
                content = answer_of(getattr(asks, f"ask{i}"), module, given[i], folder)
            (folder / f"answer{i}.pt").write_bytes(content)


if __name__ == "__main__":
    main()
