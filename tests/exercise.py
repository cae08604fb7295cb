"""A course: functions are taken out of the project, and a student puts them back.

    python tests/exercise.py                        the exercises, in the order of the method
    python tests/exercise.py 3                      what is to be done in exercise 3
    python tests/exercise.py 3 --out FOLDER         makes FOLDER: the project without that function
    python tests/exercise.py 3 --check FOLDER       tries what was written there: points, hints
    python tests/exercise.py --all OUT              OUT/exercise-01 and so on: for a whole class
    python tests/exercise.py --grade FOLDER ...     points of many students' folders, as csv

An exercise is a file of tests/exercises/: what is to be written, what is claimed of it and how that
is tried, which mistakes are likely. Here is what they have in common: how a body is taken out, how
a solution is asked, how the answer is shown.

    here                                      in a process of its own: exercises/child.py
    numbers, drawn anew        ----------->   a copy of the project, with the student's one file
    how each claim asks        ----------->   calls the function: an answer, or what stopped it
    what is right, the points  <-----------   tensors and plain values

Of a student's folder one file is read, the exercise's; all others are the project's own, as handed
out. What is right never goes over. So a solution that hangs, ends or prints what it likes loses
points and does no harm; nor does one that looks for the original with Python's own functions.
--grade reads all files before the first solution runs, and judges each in a process of its own:
whatever ends that costs the points of one file, and the class goes on.

What this does not do. Whoever pastes the published function has a right solution, and the hand-out
of one exercise contains the published solutions of all others; --grade says so ("as published"), no
more. And it is a fence, not a prison: C code, such as torch.from_file, can read, and even write,
what the user may, the project and other hand-ins among it. Where a file of the graders has changed,
nothing more is judged. Grade strangers' work under an account of its own, and keep a copy of the
hand-ins elsewhere.

Read next: exercises/integrate.py, the first grader; exercises/child.py.
"""
import argparse
import ast
import contextlib
import csv
import inspect
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":               # Ctrl-C while torch is imported: an end, no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(HERE))
import torch  # noqa: E402


@contextlib.contextmanager
def from_source():
    """Modules are imported from their text alone, and byte code is neither read nor written: that
    in __pycache__ nobody looks at, so nobody would see if a solution had left other there."""
    before, sys.pycache_prefix = sys.pycache_prefix, os.devnull      # no folder can be there
    try:
        yield
    finally:
        sys.pycache_prefix = before


with from_source():
    import exercises  # noqa: E402
    from data import BadInput, Parser, check_number, make_folder, run_cli, writing  # noqa: E402

FILES = ("render", "data", "autodecoder", "normalize", "diffusion", "sample", "train")
# What a student gets. Not tests/, which hold the answers, nor docs/, nor the history.
COPIED = (*[f"{name}.py" for name in FILES], "README.md", "LICENSE", "requirements.txt")
SHEET = "TASK.md"                # in a student's folder: what to do
# By number of exercise, a figure of docs/ that shows what it is about.
FIGURES = {1: "figure-rays.png", 6: "figure-normalization.png", 7: "figure-preconditioning.png",
           9: "figure-path.png", 12: "figure-skinning.png"}
SECONDS = 60                     # a solution may take; the right ones take one or two
SECONDS_AROUND = 120             # to grade it may take besides: twice to begin, to judge
MOST_BYTES = 2 ** 26             # the file of an answer may have
MOST_BYTES_HANDED_IN = 2 ** 20   # a student's file; the project's longest has 0.2 million
MOST_NUMBERS = 2 ** 24           # and letters, of an answer
OBJECT = 2 ** 8                  # a list, a string counts as so many numbers, for it takes as long

EXERCISES = dict(enumerate(exercises.ALL, 1))

# A comment that begins with a shape, or several: "# (B, 3)", "# (B, 2K), (B, 2K, 6)".
SHAPE = r"#\s+(\([^()]*\)(?:, \([^()]*\))*)"


# ---- What is to be written -----------------------------------------------------------------------
# Nothing of the functions is written down a second time: where they begin, what stays of them and
# how long they are is read from the project's files. An exercise says only what they are called.
def original(exercise):
    """The file that an exercise is about, with the published solution in it."""
    return exercises.home(exercise, ROOT) / exercise.FILE


def find(text, name):
    """The syntax node of a function or method: "integrate", "ResidualBlock.forward"."""
    statements = ast.parse(text).body
    for part in name.split("."):
        for node in statements:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == part:
                break
        else:
            raise KeyError(name)
        statements = node.body
    return node


def is_check(statement):
    """Whether a statement only looks at the input: `if ...: raise ...`."""
    return isinstance(statement, ast.If) and isinstance(statement.body[0], ast.Raise)


def head_of(text, node):
    """Number of the last line of a function that a student is given.

    Signature, docstring, and the checks of the input, which are neither the method nor a lesson.
    """
    lines = text.splitlines()
    last = node.lineno                                   # counted from 1, as ast does
    while not lines[last - 1].rstrip().endswith(":"):
        last += 1
    if ast.get_docstring(node):
        last = node.body[0].end_lineno
    for statement in node.body:
        if is_check(statement):
            last = statement.end_lineno
    return last


def is_code(line):
    return line.strip() != "" and not line.strip().startswith("#")


def lines_to_write(exercise):
    """How many lines of code the published solution has."""
    text = original(exercise).read_text(encoding="utf8")
    lines = text.splitlines()
    count = 0
    for name in (*exercise.WRITE, *exercise.TAKEN_OUT):
        node = find(text, name)
        body = lines[head_of(text, node):node.end_lineno]
        count += sum(is_code(line) for line in body)
    return count


def waypoints(text, node):
    """Names of the body that carry a shape comment, with that shape: [("weight", "(B,)"), ...].

    They say by which stations one may go, and not how to get there.
    """
    lines = text.splitlines()
    found = []
    for statement in ast.walk(node):
        if not isinstance(statement, ast.Assign):
            continue
        shape = re.search(SHAPE, lines[statement.end_lineno - 1])
        if shape and statement.lineno > head_of(text, node):
            names = ast.unparse(statement.targets[0]).strip("()")
            found.append((statement.lineno, names, shape[1]))
    return [(names, shape) for _, names, shape in sorted(found)]


# ---- Taking it out -------------------------------------------------------------------------------
# By line numbers, not by ast.unparse: that would lose all comments, and they are the lesson.
def blank(text, name, number):
    """The text of a file without the body of one function. All else stays as it is, to the byte."""
    node = find(text, name)
    lines = text.splitlines(keepends=True)
    margin = " " * (node.col_offset + 4)
    instead = []
    stops = waypoints(text, node)
    if stops:
        instead.append(f"{margin}# Shapes on the way of the published solution:\n")
    for stop, shape in stops:
        instead.append(f"{margin}#     {stop:<14} {shape}\n")
    instead.append(f'{margin}raise NotImplementedError("exercise {number}: {name}")\n')
    return "".join(lines[:head_of(text, node)] + instead + lines[node.end_lineno:])


def without(text, name):
    """The text of a file without a whole function that would give the answer away."""
    node = find(text, name)
    lines = text.splitlines(keepends=True)
    first = node.lineno - 1
    while lines[first - 1].strip() == "":                # with the empty lines above it
        first -= 1
    return "".join(lines[:first] + lines[node.end_lineno:])


def replace_body(text, name, function):
    """The text of a file in which `name` has the body of another function: for the tests."""
    node = find(text, name)
    lines = text.splitlines(keepends=True)
    source = inspect.getsource(function)
    given = find(source, function.__name__)
    body = source.splitlines(keepends=True)[given.body[0].lineno - 1:]
    margin = " " * node.col_offset
    body = [margin + line if line.strip() else line for line in body]
    return "".join(lines[:head_of(text, node)] + body + lines[node.end_lineno:])


def changed(exercise, name, text):
    """The text of one file of the project as it is handed out in an exercise."""
    for file, right, instead in exercise.CHANGED:
        if file == name:
            if text.count(right) != 1:
                raise SystemExit(f"{name}: {text.count(right)} places say {right!r}")
            text = text.replace(right, instead)
    if name == exercise.FILE:
        for function in exercise.WRITE:
            text = blank(text, function, number_of(exercise))
        for function in exercise.TAKEN_OUT:
            text = without(text, function)
    return text


def number_of(exercise):
    return exercises.ALL.index(exercise) + 1


def hand_out(exercise, folder):
    """Fills a folder with the project, without what the student is to write."""
    for name in dict.fromkeys((*COPIED, exercise.FILE)):
        place = original(exercise) if name == exercise.FILE else ROOT / name
        text = place.read_text(encoding="utf8")
        (Path(folder) / name).write_text(changed(exercise, name, text), encoding="utf8")
    figure = FIGURES.get(number_of(exercise))
    if figure:
        shutil.copy(ROOT / "docs" / figure, folder)


def sheet(exercise, folder):
    """What the student reads: TASK.md of the folder, and what --out prints."""
    number = number_of(exercise)
    script = Path(__file__).resolve()
    functions = " and ".join(f"`{name}`" for name in exercise.WRITE)
    figure = ""
    if number in FIGURES:
        figure = f"\n![what it is about]({FIGURES[number]})\n"
    return f"""\
# Exercise {number}: {exercise.TITLE}

{exercise.PAPER}:

{textwrap.indent(exercise.EQUATION, "    ")}

Write {functions} in `{exercise.FILE}`.
It takes {lines_to_write(exercise)} lines or so, and {exercise.MINUTES} minutes.
The docstrings there say what goes in and what comes out. Where a body is missing, it says
`raise NotImplementedError`. What they say of tests/ and docs/ is in the project, not here.

{exercise.TASK}
{figure}
Check it, as often as you like, from the folder in which you had it made:

    python {shorter(script)} {number} --check {folder}

It tries what you write by itself, with other numbers every time, names what is wrong, and draws
`exercise-{number:02d}.png`: yours on the left, the right one beside it.
"""


def shorter(path):
    """A path as one would type it here."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def write_exercise(exercise, folder):
    """Makes a student's folder. It must not be there yet: it could hold a day's work."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder} is there already, and not empty: name another, or remove it")
    make_folder(folder)
    hand_out(exercise, folder)
    text = sheet(exercise, folder)
    (folder / SHEET).write_text(text, encoding="utf8")
    return text


# ---- Asking a solution ---------------------------------------------------------------------------
# The student's file is never imported here, only read as bytes and laid into a copy: to import is
# to run.
def write_questions(exercise, given, folder):
    """What the child needs to know: how to ask, and with which numbers. No answers."""
    asks = [claim.ask for claim in exercise.CLAIMS] + [exercise.PICTURE.ask]
    text = "import math\n\nimport torch\nimport torch.nn.functional as F\n"
    for ask in dict.fromkeys(asks):                      # several claims may ask alike
        text += "\n\n" + inspect.getsource(ask)
    text += "\n"
    for i, ask in enumerate(asks):
        text += f"\nask{i} = {ask.__name__}"
    (folder / "asks.py").write_text(text + "\n", encoding="utf8")
    shutil.copy(HERE / "exercises" / "child.py", folder)
    # What is right stays here: common.py.
    sent = []
    for numbers in given:
        sent.append({name: value for name, value in numbers.items() if name != "right"})
    torch.save(sent, folder / "given.pt")


def run_child(exercise, n_solutions, folder, seconds, quiet):
    """Lets the solutions 0, 1, ... of a folder answer. Returns what is wrong with the process."""
    # -E: without PYTHONPATH, which might lead to the original, and all that is called PYTHON...
    # -B: no byte code is written.
    command = [sys.executable, "-EB", "child.py", Path(exercise.FILE).stem, str(n_solutions)]
    printed = subprocess.DEVNULL if quiet else None
    try:
        done = subprocess.run(command, cwd=folder, timeout=seconds, stdin=subprocess.DEVNULL,
                              stdout=printed, stderr=printed)
    except subprocess.TimeoutExpired:
        return f"it was stopped after {seconds:g} s: does a loop ever end?"
    return f"its process ended by itself (exit status {done.returncode})"


def is_too_large(answer):
    """Whether an answer holds more than MOST_NUMBERS numbers and letters.

    It may do so in a small file: an expanded tensor has few bytes, and a list that holds another
    one twice, which does so in turn, has 2^40 items after 40 of them. So what is met again counts
    again, and the count ends as soon as it is too high.
    """
    count, waiting = 0, [answer]
    while waiting and count <= MOST_NUMBERS:
        part = waiting.pop()
        count += OBJECT
        if isinstance(part, torch.Tensor):
            count += part.numel()
        elif isinstance(part, (str, bytes)):
            count += len(part)
        elif isinstance(part, dict):
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple, set)):
            waiting += part
    return count > MOST_NUMBERS


def read_answer(path, otherwise):
    """One answer: {"answer": ...} or {"stopped": why}. The file is a stranger's."""
    if not path.is_file():
        return {"stopped": otherwise}
    try:
        if path.stat().st_size > MOST_BYTES:
            return {"stopped": "its answer is too large"}
        found = torch.load(path, weights_only=True)      # tensors and plain types, never programs
        if is_too_large(found):
            return {"stopped": "its answer is too large"}
        if "stopped" in found:
            return {"stopped": str(found["stopped"])}
        return {"answer": found["answer"]}
    except Exception as error:                           # whatever a damaged file leads to
        return {"stopped": f"it returns neither tensors nor plain values ({type(error).__name__})"}


def project_files():
    """The bytes of all that judges, and of the originals."""
    paths = [*ROOT.glob("*.py"), *HERE.glob("*.py"), *(HERE / "exercises").glob("*.py")]
    return {path: path.read_bytes() for path in paths}


def check_unchanged(before):
    """Refuses to judge where a file of the project is not what it was before a solution ran.

    The fence of child.py keeps Python's own functions from writing here; C code could. Nothing is
    put back: it may as well have been you, with an editor.
    """
    after = project_files()
    for path in sorted({*before, *after}):
        if before.get(path) != after.get(path):
            raise BadInput(f"{path} has changed while a solution ran: nothing is judged by what "
                           "may be another grader; look at git status, and try again")


@contextlib.contextmanager
def passing_folder():
    """A folder that goes away again; but what a solution has piled up there may be too deep for
    that, and then it stays."""
    folder = tempfile.mkdtemp(prefix="exercise-")
    try:
        yield Path(folder).resolve()
    finally:
        with contextlib.suppress(OSError, RecursionError):
            shutil.rmtree(folder)


def ask(exercise, solutions, seed, seconds=SECONDS, quiet=False):
    """What solutions, the bytes of a file each, answer to the claims and for the picture.

    Each is laid into a copy of the project of its own, in a folder that goes away again. Several
    share a process, for it takes torch two seconds to begin: tests do that, students' work never.
    returns what was given, and for each solution a list of answers as of read_answer
    """
    generator = torch.Generator().manual_seed(seed)
    given = [claim.given(generator) for claim in exercise.CLAIMS]
    given.append(exercise.PICTURE.given(generator))
    before = project_files()
    with passing_folder() as folder:
        write_questions(exercise, given, folder)
        for number, content in enumerate(solutions):
            place = folder / str(number)
            place.mkdir()
            hand_out(exercise, place)
            (place / exercise.FILE).write_bytes(content)
        otherwise = run_child(exercise, len(solutions), folder, seconds, quiet)
        check_unchanged(before)
        answers = []
        for number in range(len(solutions)):
            paths = [folder / str(number) / f"answer{i}.pt" for i in range(len(given))]
            answers.append([read_answer(path, otherwise) for path in paths])
    return given, answers


# ---- Judging the answers -------------------------------------------------------------------------
# One mistake should cost the points of one claim. So judges take what another claim is about as the
# student has it, right or wrong; and where a claim fails, its hint is of that claim alone.
@dataclass
class Verdict:
    """What became of one claim. hint: "" where it holds."""
    claim: object
    hint: str

    @property
    def points(self):
        return 0 if self.hint else self.claim.points


def judge(claim, given, answer):
    """Whether a claim holds of an answer: "", or a hint. An answer may be anything."""
    if "stopped" in answer:                              # an error, or the end of the process
        reason = answer["stopped"]
        if reason.startswith("NotImplementedError: exercise"):
            return "not written yet"
        return f"{reason}. {claim.if_stopped}" if claim.if_stopped else reason
    try:
        return claim.judge(given, answer["answer"])
    except Exception as error:                           # wrong kind, wrong length, no such key
        return f"what it returns is not what the docstring says ({type(error).__name__}: {error})"


def printable(hint):
    """One line of plain characters: a solution's error message may say anything to a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in hint[:400])


def judge_all(exercise, given, answers):
    """The verdicts of one solution."""
    verdicts = []
    for claim, numbers, answer in zip(exercise.CLAIMS, given, answers):
        verdicts.append(Verdict(claim, printable(judge(claim, numbers, answer))))
    return verdicts


def points_of(verdicts):
    return sum(verdict.points for verdict in verdicts)


def is_as_published(exercise, content):
    """Whether a student's functions are those of the project, but for comments and spaces."""
    published = original(exercise).read_text(encoding="utf8")
    for name in exercise.WRITE:
        try:
            own = find(content.decode("utf8"), name)
        except Exception:                                # no text, no Python, too deep to be read
            return False
        if ast.unparse(own) != ast.unparse(find(published, name)):
            return False
    return True


# ---- Showing what came out -----------------------------------------------------------------------
# A dozen lines and a picture. Who calls the function in turn does not appear: their tests would
# fail, too, and say nothing new.
def coloured(word, colour):
    """A word in red or green, where a person looks at it."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return word
    number = {"red": 31, "green": 32}[colour]
    return f"\033[{number}m{word}\033[0m"


def report(exercise, verdicts):
    """The lines of --check: one a claim, one a hint; the same hint is not said twice."""
    lines = [f"exercise {number_of(exercise)}: {' and '.join(exercise.WRITE)} ({exercise.FILE})"]
    said = set()
    for verdict in verdicts:
        mark = coloured("NO ", "red") if verdict.hint else coloured("yes", "green")
        lines.append(f"  {mark}  {verdict.points}/{verdict.claim.points}  {verdict.claim.words}")
        if verdict.hint and verdict.hint not in said:
            margin = 12 * " "
            lines.append(textwrap.fill(verdict.hint, 98, initial_indent=margin,
                                       subsequent_indent=margin))
            said.add(verdict.hint)
    points = points_of(verdicts)
    colour = "green" if points == 10 else "red"
    lines.append(coloured(f"{points} of 10 points", colour))
    return lines


def draw_half(figure, picture, title, given, answer):
    """One half of the picture. What a wrong solution answers may not even be a picture."""
    if "answer" in answer:
        try:
            picture.draw(figure, given, answer["answer"])
        except Exception as error:
            answer = {"stopped": f"cannot be drawn ({type(error).__name__})"}
    if "stopped" in answer:
        figure.clear()
        words = answer["stopped"].replace("NotImplementedError: ", "")[:60]
        figure.text(0.5, 0.5, f"nothing to see\n{words}", ha="center", va="center", fontsize=8)
    figure.suptitle(title)


def right_answer(exercise, given):
    """What the published solution answers for the picture."""
    home = str(exercises.home(exercise, ROOT))
    if home not in sys.path:
        sys.path.append(home)
    with from_source():
        module = __import__(Path(exercise.FILE).stem)
    torch.manual_seed(0)                                 # as in the child
    with tempfile.TemporaryDirectory() as folder:        # some ask with files
        before = Path.cwd()
        os.chdir(folder)
        try:
            return {"answer": exercise.PICTURE.ask(module, given)}
        finally:
            os.chdir(before)


def draw_picture(exercise, given, answer, path):
    """The student's answer on the left, the right one beside it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure = plt.figure(figsize=(9, 4.5), layout="constrained")
    left, right = figure.subfigures(1, 2)
    draw_half(left, exercise.PICTURE, "yours", given, answer)
    draw_half(right, exercise.PICTURE, "how it should look", given, right_answer(exercise, given))
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)


# ---- The commands --------------------------------------------------------------------------------
def print_list():
    print("In the order of the method. To begin: python tests/exercise.py 1 --out FOLDER")
    for number, exercise in EXERCISES.items():
        if number == exercises.FIRST_READING + 1:
            print("\nOf the second reading:")
        names = ", ".join(exercise.WRITE)
        print(f"\n{number:2d}  {exercise.TITLE} ({exercise.PAPER})")
        print(f"    {exercise.FILE}: {names}; {lines_to_write(exercise)} lines, "
              f"{exercise.MINUTES} minutes")
        print(textwrap.indent(exercise.EQUATION, "        "))


def number_on_sheet(folder):
    """Which exercise the TASK.md of a folder says that it is; None where there is none."""
    path = Path(folder) / SHEET
    if path.is_symlink() or not path.is_file():
        return None
    with open(path, encoding="utf8", errors="replace") as file:
        title = re.match(r"# Exercise (\d+):", file.readline(100))
    return int(title[1]) if title else None


def read_solution(exercise, folder):
    """The one file of a student's folder that is looked at, as bytes; BadInput where it is not."""
    number, other = number_of(exercise), number_on_sheet(folder)
    if other not in (None, number):
        # A folder of exercise 2 contains the published solution of exercise 1.
        raise BadInput(f"{folder} is a folder of exercise {other}, says its {SHEET}: not of "
                       f"exercise {number}")
    path = Path(folder) / exercise.FILE
    if path.is_symlink():                                # to a file that others may not read?
        raise BadInput(f"{path} is a link, which is not followed: the file itself must be there")
    if not path.is_file():
        raise BadInput(f"{folder}: no {exercise.FILE} there; --out makes such a folder")
    if path.stat().st_size > MOST_BYTES_HANDED_IN:
        raise BadInput(f"{path} is too large: more than {MOST_BYTES_HANDED_IN} bytes")
    return path.read_bytes()


def check(exercise, folder, seed, seconds):
    """Tries the solution in a folder, prints what came out, draws it. Returns the points."""
    content = read_solution(exercise, folder)
    given, answers = ask(exercise, [content], seed, seconds)
    verdicts = judge_all(exercise, given, answers[0])
    for line in report(exercise, verdicts):
        print(line)
    path = Path(folder) / f"exercise-{number_of(exercise):02d}.png"
    draw_picture(exercise, given[-1], answers[0][-1], path)
    print(f"picture: {path}")
    return points_of(verdicts)


def write_all(out):
    """The hand-out for a class: a folder for each exercise."""
    out = Path(out)
    for number, exercise in EXERCISES.items():
        write_exercise(exercise, out / f"exercise-{number:02d}")
    print(f"{len(EXERCISES)} exercises in {out}; a student needs them, and this project to check.\n"
          "The folder of one exercise contains the published solutions of all others: --grade says "
          '"as published" of those who hand one in.')


def handed_in(folder, number):
    """Folders of one student by the number of their exercise: {3: Path, ...}.

    As --all made them, exercise-03 and so on; or the folder is one itself, by number or TASK.md.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")
    if number is not None:
        part = folder / f"exercise-{number:02d}"
        return {number: part if part.is_dir() else folder}
    found = {}
    for n in EXERCISES:
        part = folder / f"exercise-{n:02d}"
        if part.is_dir():
            found[n] = part
    if not found and number_on_sheet(folder) in EXERCISES:
        found[number_on_sheet(folder)] = folder
    if not found:
        raise BadInput(f"{folder}: no exercise there, neither exercise-01 and so on nor {SHEET}; "
                       "if it is exercise 3, say: python tests/exercise.py 3 --grade FOLDER")
    return found


def read_all(folder, number):
    """What one student handed in, by exercise: {3: the bytes of a file, or in words why not}."""
    contents = {}
    for n, part in handed_in(folder, number).items():
        try:
            if part != Path(folder) and part.is_symlink():
                raise BadInput(f"{part} is a link, which is not followed")
            contents[n] = read_solution(EXERCISES[n], part)
        except (BadInput, OSError) as problem:
            contents[n] = str(problem)
    return contents


def grade_one(exercise, content, seed, seconds):
    """Points of one file, and remarks: hints of what was lost."""
    # quiet: standard output is the table's, and nobody else's.
    given, answers = ask(exercise, [content], seed, seconds, quiet=True)
    verdicts = judge_all(exercise, given, answers[0])
    remarks = [verdict.hint for verdict in verdicts if verdict.hint]
    if is_as_published(exercise, content):
        remarks.append("as published")
    return points_of(verdicts), list(dict.fromkeys(remarks))


def end_all(process):
    """Ends a process, and whatever it has started that is still there."""
    process.kill()
    if hasattr(os, "killpg"):
        with contextlib.suppress(OSError):               # nobody is left
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def grade_apart(number, content, seed, seconds):
    """As grade_one, in a process of its own: what ends that is not the end of the class."""
    command = [sys.executable, str(Path(__file__).resolve()), str(number), "--grade-one",
               "--seed", str(seed), "--limit", str(seconds)]
    # A session of its own: it is ended with all that it has started.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               start_new_session=True)
    most = seconds + SECONDS_AROUND
    try:
        printed, _ = process.communicate(content, timeout=most)
        return json.loads(printed)
    except subprocess.TimeoutExpired:
        reason = f"it was stopped after {most:g} s"
    except ValueError:                                   # nothing, or not only what it should print
        reason = f"exit status {process.returncode}"
    finally:
        end_all(process)
    return 0, [f"grading it ended: {reason}"]


def grade_student(folder, contents, seed, seconds):
    """A row of the table."""
    row, remarks = {}, []
    for n, content in contents.items():
        if isinstance(content, str):
            row[n], said = 0, [printable(content)]
        else:
            row[n], said = grade_apart(n, content, seed, seconds)
        remarks += [f"{n}: {words}" for words in said]
        print(f"{folder}, exercise {n}: {row[n]} of 10", file=sys.stderr)
    points = [row.get(n, "") for n in EXERCISES]
    return [folder, *points, sum(row.values()), "; ".join(remarks)]


def grade(folders, number, seed, seconds):
    """A table on standard output, a line a student: points by exercise, their sum, remarks.

    All are asked with the same numbers, so that the same work has the same points. The table is
    printed at the end, when no solution runs any more; after a Ctrl-C, of those graded before.
    """
    # First all is read: no solution can change what another student handed in, and a typing error
    # does not come up after an hour.
    students = {folder: read_all(folder, number) for folder in folders}
    before = project_files()
    rows = [["folder", *EXERCISES, "sum", "remarks"]]
    try:
        for folder, contents in students.items():
            row = grade_student(folder, contents, seed, seconds)
            check_unchanged(before)
            rows.append(row)
    finally:
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)


def make_parser():
    parser = Parser(prog="exercise.py", description=__doc__.splitlines()[0])
    parser.add_argument("number", nargs="?", type=int, help="of an exercise; none: list them all")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--out", metavar="FOLDER", help="make the exercise in this new folder")
    what.add_argument("--check", metavar="FOLDER", help="try what was written in this folder")
    what.add_argument("--all", metavar="OUT", help="make all exercises, a folder each, in OUT")
    what.add_argument("--grade", metavar="FOLDER", nargs="+",
                      help="points of students' folders as csv, on standard output")
    what.add_argument("--grade-one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=SECONDS, metavar="SECONDS",
                        help="a solution may take so long (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the numbers that are tried (default: others "
                        "every time; with --grade the same for all)")
    return parser


def main(arguments=None):
    args = make_parser().parse_args(arguments)
    if args.number is not None and args.number not in EXERCISES:
        raise BadInput(f"there is no exercise {args.number}, only 1 to {len(EXERCISES)}")
    if args.number is None and (args.out or args.check or args.grade_one):
        raise BadInput("which exercise? For example: python tests/exercise.py 1 --out FOLDER")
    if args.number is not None and args.all:
        raise BadInput(f"--all makes all of them; for one: {args.number} --out FOLDER")
    check_number("--limit", args.limit, (1, 3600))
    seed = secrets.randbits(31) if args.seed is None else args.seed
    check_number("--seed", seed, (0, 2**31 - 1))
    if args.all:
        write_all(args.all)
    elif args.grade:
        grade(args.grade, args.number, seed, args.limit)
    elif args.grade_one:                                 # see grade_apart
        content = sys.stdin.buffer.read()
        print(json.dumps(grade_one(EXERCISES[args.number], content, seed, args.limit)))
    elif args.number is None:
        print_list()
    elif args.out:
        print(write_exercise(EXERCISES[args.number], args.out))
    elif args.check:
        points = check(EXERCISES[args.number], args.check, seed, args.limit)
        sys.exit(0 if points == 10 else 1)
    else:
        print(sheet(EXERCISES[args.number], "FOLDER"))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")    # a folder's name may be no UTF-8
    run_cli(main)
