"""A process in which a student's code answers, and should do no more than that: see fence.

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
REFUSED = ("os", "shutil", "subprocess", "socket", "ctypes", "gc", "pty", "winreg", "signal",
           "resource")
HARMLESS = {"os.listdir", "os.scandir", "os.walk", "os.putenv", "os.unsetenv", "os.getxattr"}
# Functions that reach other processes, too, of which Python tells no hook: module, name.
SILENT = (("os", "pidfd_open"), ("posix", "pidfd_open"), ("signal", "pidfd_send_signal"),
          ("_signal", "pidfd_send_signal"), ("_posixsubprocess", "fork_exec"),
          ("subprocess", "_fork_exec"))


def is_inside(path, places):
    """Whether a path lies in one of these folders, or is one. Links are followed first."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        return True                              # the number of a file that is open already
    path = os.path.realpath(os.fsdecode(path))
    for place in places:
        if path == place or path.startswith(place + os.sep):
            return True
    return False


def fence(folder):
    """From here on files are written in `folder` only, and read there and where Python's own are.

    Python tells an audit hook of whatever it opens, starts or removes, before it does so, and a
    hook cannot be taken down again. It is a fence, not a prison: C code asks no hook, so that with
    torch.from_file, say, a solution can read, and even write, whatever its user may. But nobody
    reads the original by mistake, nor through a path that was left in sys.path, nor a second copy
    of the project on the same disk.
    """
    own = [os.path.realpath(folder)]
    readable = own + [os.path.realpath(place) for place in sys.path[1:]]
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def hook(event, arguments):
        if event == "open":
            path, mode, flags = arguments        # of open() and of os.open(), which has no mode
            writes = flags & writing if mode is None else set(mode) & set("wax+")
            if not is_inside(path, own if writes else readable):
                raise PermissionError(f"it may not open {os.fsdecode(path)}: an answer is "
                                      "calculated from what the function is given")
        elif event.split(".")[0] in REFUSED and event not in HARMLESS:
            # Exercise 13 is asked with files, which are made in a folder of their own.
            if event != "os.mkdir" or not is_inside(arguments[0], own):
                raise PermissionError(f"it may not call {event}: an answer is calculated")

    sys.addaudithook(hook)
    for module, name in SILENT:
        take_away(module, name)


def take_away(module, name):
    """Puts a refusal in the place of a function, if this Python has it."""
    def refuse(*_, **__):
        raise PermissionError(f"it may not call {module}.{name}: an answer is calculated")

    if hasattr(sys.modules.get(module), name):
        setattr(sys.modules[module], name, refuse)


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


def as_file(content):
    """The bytes of a file of torch's."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def answer_of(ask, module, given, folder):
    """What one solution answers to one claim, as the bytes of a file."""
    torch.manual_seed(0)                         # each claim by itself, in whatever order
    try:
        return as_file({"answer": ask(module, given)})
    except BaseException as error:               # sys.exit is one, too; or what cannot be saved
        return as_file({"stopped": in_words(error, folder)})


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
    fence(here)
    for number in range(n_solutions):
        given = torch.load(here / "given.pt", weights_only=True)      # anew: one may change it
        folder = here / str(number)
        module, failed = None, ""
        try:
            module = import_from(folder, name)
        except BaseException as error:           # above all, what Python cannot read
            failed = in_words(error, folder)
        # Each answer is written as soon as it is there: what hangs later does not take it away.
        for i, numbers in enumerate(given):
            if failed:
                content = as_file({"stopped": failed})
            else:
                content = answer_of(getattr(asks, f"ask{i}"), module, numbers, folder)
            (folder / f"answer{i}.pt").write_bytes(content)


if __name__ == "__main__":
    main()
