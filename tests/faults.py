"""A trained run and what can happen to it go in; a table comes out that says how often it was safe.

    python tests/faults.py                   every row, half an hour or so on two cores; Linux only
    python tests/faults.py kill9 values      these rows
    python tests/faults.py --first 3         three trials of each, in a minute

Each row does one kind of harm on purpose, many times over, and asks each time for what README
promises: nothing that was saved is lost, what is wrong is one line and an exit status, and --resume
goes on to the very bits of a run that was never disturbed.

    kill9      killed at random moments, and just before or after a file gets its name
    signals    Ctrl-C and SIGTERM at random moments
    writes     files that may not grow, a folder that may not be written, a disk that is full
    sharing    two runs in one folder; a run in the folder of another; forgotten flags
    values     numbers and words that no flag can mean
    runfiles   damaged checkpoints, metrics.json and log.csv
    inputs     1,000 data folders with a damaged file
    greedy     small files that ask for gigabytes, or never end
    flaws      data folders that are whole, and wrong: how many are loaded without a word

How: one process imports torch once and is forked for every run, which so takes a second, not five.
Only processes that were started here are killed.
"""
import argparse
import contextlib
import csv
import io
import itertools
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, fields
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")            # before torch is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import imageio.v3 as iio  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import render  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
import evaluate  # noqa: E402
import test_data  # noqa: E402
from test_train import write_photos  # noqa: E402

MAINS = {"train.py": train.main, "sample.py": sample.main, "evaluate.py": evaluate.main,
         "load": lambda: load_data()}
# The smallest run that has all parts; see also without_figures.
MADE_UP = "--n-objects 4 --n-views 6"
STAGE_1 = ("--preset micro --size 16 --finer-at= --holdout 3 --channels 16 --embed-dim 32 "
           "--n-samples 8 --objects-per-step 2 --views-per-step 2 --device cpu --save-every 4 "
           "--log-every 3")
STAGE_2 = "--unet-channels 16 --sample-steps 2 --n-sheet 2 --batch-size 4"
BOTH = f"{STAGE_1} {MADE_UP} {STAGE_2}".split()
FLAGS = [*BOTH, "--steps", "12"]

# ---- Runs that are forked ------------------------------------------------------------------------
@dataclass
class Ended:
    """How a run ended: exit status (-9: killed), what it printed, whether it took too long."""
    status: int
    out: str
    err: str
    hangs: bool
    told: bool = False           # whether it lived to get its signal
    gib: float = 0.0             # the most memory that it had

    def faults(self, *expected):
        """What breaks the promise: one line, an expected exit status, no more than 2 GiB."""
        found = []
        lines = self.err.splitlines()
        if self.hangs:
            found.append("hangs")
        if self.gib > 2:
            found.append(f"{self.gib:.1f} GiB")
        if "Traceback" in self.err:
            found.append("traceback")
        if self.status not in expected:
            found.append(f"exit status {self.status}")
        if self.status > 0 and len(lines) != 1:
            found.append(f"{len(lines)} lines on stderr")
        return found


def small_picture(path, *_):
    """In place of a figure, which takes matplotlib a second: as many bytes, written in its way."""
    with data.writing(path) as temporary:
        temporary.write_bytes(bytes(20_000))


def without_figures():
    """Called in a run: what is drawn says nothing of checkpoints, and takes most of the time."""
    train.plot_log = lambda folder: small_picture(folder / "loss.png")
    sample.save_latent_histogram = small_picture
    sample.save_training_sheet = small_picture
    sample.save_orbit = small_picture
    sample.save_noise_strip = lambda *_, **__: None
    sample.save_any_samples = lambda *_, **__: (torch.zeros(0), [])
    evaluate.evaluate = lambda *_: {}


class Run:
    """A script that runs in a child of this process; before: called in the child."""

    def __init__(self, script, arguments, before=None):
        # Not files, which must not grow where that is what is tried. A pipe holds 64 KiB.
        self.pipes = [os.pipe(), os.pipe()]
        sys.stdout.flush()
        self.began = time.time()
        self.pid = os.fork()
        if self.pid == 0:
            self.child(script, [str(word) for word in arguments], before)

    def child(self, script, arguments, before):
        """The rest of the child's life."""
        status = 1
        try:
            for number, (_, end) in zip((1, 2), self.pipes):
                os.dup2(end, number)
            sys.stdout = open(1, "w", buffering=1, closefd=False)
            sys.stderr = open(2, "w", buffering=1, closefd=False)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            limit = 16 * 2**30                           # bytes: the machine is to survive this
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            sys.argv = [script, *arguments]
            without_figures()
            if before is not None:
                before()
            data.run_cli(MAINS[script])
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def wait(self, after=None, number=signal.SIGKILL, limit=120):
        """Until it ends -> Ended; after so many seconds of its life it gets signal `number`."""
        hangs = told = False
        while True:
            done, status, used = os.wait4(self.pid, os.WNOHANG)
            if done:
                break
            age = time.time() - self.began
            if after is not None and age > after:
                os.kill(self.pid, number)
                after, told = None, True
            if age > limit and not hangs:
                hangs = True
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.002)
        texts = []
        for begin, end in self.pipes:
            os.close(end)
            with open(begin, errors="replace") as file:
                texts.append(file.read())
        out, err = texts
        gib = used.ru_maxrss / 2**20                     # Linux counts in KiB
        return Ended(os.waitstatus_to_exitcode(status), out, err, hangs, told, gib)


def run(script, arguments, before=None, **how):
    """Runs a script to its end -> Ended."""
    return Run(script, arguments, before).wait(**how)


# ---- What a folder holds -------------------------------------------------------------------------
def content(path):
    """A hash of all of a checkpoint but its times, which no two runs share; "" where there is none;
    BadInput where it is damaged."""
    if not path.exists():
        return ""
    stage = int(path.name[5])
    with tempfile.TemporaryDirectory() as folder:        # under its usual name: it may be .old1
        os.symlink(path.resolve(), Path(folder) / f"stage{stage}.pt")
        checkpoint = sample.load_checkpoint(folder, stage)
    log = {name: value for name, value in checkpoint["log"].items() if name != "seconds"}
    return sample.content_digest(checkpoint | {"log": log, "seconds": 0.0})


def rows_of(path):
    """Rows of a log without their times; [] where there is none."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [tuple(row[:4]) for row in csv.reader(file)]


def everything(folder):
    """All that hours of training have left in a folder, under whatever names: a set."""
    found = set()
    for path in folder.glob("stage*.pt"):
        found.add(content(path))
    for path in folder.glob("log*.csv"):
        found |= set(rows_of(path))
    return found


class Reference:
    """What an undisturbed run leaves, and how long it takes."""

    def __init__(self, folder):
        began = time.time()
        ended = run("train.py", [*FLAGS, "--out", folder])
        if ended.status:
            raise SystemExit(f"the undisturbed run failed: {ended.err}")
        self.folder = folder
        self.seconds = time.time() - began
        self.contents = [content(folder / f"stage{stage}.pt") for stage in (1, 2)]
        self.rows = rows_of(folder / "log.csv")

    def compare(self, folder):
        """What differs in another run that should have come to the same end."""
        found = []
        for stage, expected in zip((1, 2), self.contents):
            try:
                if content(folder / f"stage{stage}.pt") != expected:
                    found.append(f"stage {stage} differs")
            except data.BadInput as error:
                found.append(str(error))
        if rows_of(folder / "log.csv") != self.rows:
            found.append("log differs")
        if list(folder.rglob(".*.tmp*")):
            found.append("fragments left")
        return found


def damaged_files(folder):
    """Checkpoints of a run that was just ended that cannot be read."""
    found = []
    for path in folder.glob("stage*.pt"):
        try:
            content(path)
        except data.BadInput as error:
            found.append(str(error))
    return found


def finish(reference, folder):
    """Resumes a run that was disturbed -> what is not as it would have been without."""
    ended = run("train.py", [*FLAGS, "--out", folder, "--resume"])
    return [f"--resume: {fault} {ended.err[-200:]}" for fault in ended.faults(0)] or (
        reference.compare(folder))


# ---- Rows: each yields (what was tried, list of what did not hold) -------------------------------
def kill_at_rename(number, is_after):
    """In a run: SIGKILL just before or after the number-th time that a file gets its name."""
    replace = os.replace
    calls = iter(range(10_000))

    def counted(a, b):
        is_due = next(calls) == number
        if is_due and not is_after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(a, b)
        if is_due:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted


def kill9(folder, reference, rng):
    """Killed; then resumed, and in between nothing may be half-written."""
    for i in range(50):
        out = folder / f"random{i}"
        after = rng.uniform(0, reference.seconds)
        run("train.py", [*FLAGS, "--out", out], after=after)
        yield f"at {after:.2f} s", damaged_files(out) + finish(reference, out)
    for i in range(20):
        out = folder / f"aimed{i}"
        number, is_after = i // 2 * 2, bool(i % 2)
        first = run("train.py", [*FLAGS, "--out", out], lambda: kill_at_rename(number, is_after))
        faults = damaged_files(out)
        # Once more, in the run that goes on.
        again = [*FLAGS, "--out", out, "--resume"]
        second = run("train.py", again, lambda: kill_at_rename(1, is_after))
        if (first.status, second.status) != (-9, -9):
            faults.append("was not killed")
        yield f"rename {number}, after: {is_after}", faults + damaged_files(out) + finish(
            reference, out)


def signals(folder, reference, rng):
    """Asked to stop: saved first, one line, the right exit status, no step lost."""
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        for i in range(20):
            out = folder / f"signal{number}-{i}"
            after = rng.uniform(0.1, 0.95) * reference.seconds
            ended = run("train.py", [*FLAGS, "--out", out], after=after, number=number)
            faults = ended.faults(status if ended.told else 0)
            faults += damaged_files(out)
            rows = rows_of(out / "log.csv")
            for stage in (1, 2):
                path = out / f"stage{stage}.pt"
                logged = [int(row[1]) for row in rows[1:] if int(row[0]) == stage]
                saved = sample.load_checkpoint(out, stage)["step"] if path.exists() else 0
                if logged and saved < logged[-1]:
                    faults.append(f"stage {stage}: step {logged[-1]} was lost")
            yield f"{signal.Signals(number).name} at {after:.2f} s", faults + finish(reference, out)


def half_way(folder, reference):
    """Copies of a run that was stopped in stage 1, and of one that had just ended it."""
    stopped, between = folder / "stopped", folder / "between"
    run("train.py", [*FLAGS, "--out", stopped], lambda: kill_at_rename(8, True))
    between.mkdir()
    for name in ("stage1.pt", "log.csv", "metrics.json"):
        shutil.copy(reference.folder / name, between)
    rows = (between / "log.csv").read_text().splitlines(keepends=True)
    (between / "log.csv").write_text("".join(row for row in rows if not row.startswith("2,")))
    return stopped, between


def may_not_write(start, out, reference, before, room=None):
    """Resumes a copy of `start` where writing fails -> what did not hold; room() ends that."""
    if not out.exists():
        shutil.copytree(start, out)
    had = everything(out)
    ended = run("train.py", [*FLAGS, "--out", out, "--resume"], before)
    faults = ended.faults(2, 0)                          # 0: there was room enough
    faults += damaged_files(out)
    before_it = {row for row in rows_of(out / "log.csv")}
    lost = [row for row in had if isinstance(row, tuple) and row not in before_it]
    # Rows of steps after the last checkpoint are done again.
    step = sample.load_checkpoint(start, 1)["step"]
    if any(row[0] == "1" and int(row[1]) <= step for row in lost):
        faults.append("rows of the log were lost")
    if list(out.rglob(".*.tmp*")):
        faults.append("fragments left")
    if room is not None:
        room()
    return faults + finish(reference, out)


def as_nobody():
    """In a run: no longer root, who may write everywhere."""
    os.setgid(65534)
    os.setuid(65534)


def limited_files(folder, reference, starts):
    """No file may grow beyond a limit, as with a quota."""
    most = max(path.stat().st_size for path in reference.folder.glob("*.pt"))
    for i in range(26):
        limit = int(20 * (most / 20) ** (i / 25))        # bytes, from 20 to all of it

        def before():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        start = starts[i % 2]
        out = folder / f"limit{i}"
        yield f"files up to {limit} bytes", may_not_write(start, out, reference, before)


def read_only(folder, reference, starts):
    """A folder that may only be read."""
    if os.geteuid() != 0:
        print("read-only folders: only root can become nobody, skipped")
        return
    for path in (folder.parent, folder):
        os.chmod(path, 0o755)
    out = folder / "read-only"
    shutil.copytree(reference.folder, out)
    os.chmod(out, 0o555)
    before = everything(out)
    for script, words in (
            ("train.py", [*FLAGS, "--out", out]), ("train.py", [*FLAGS, "--out", out, "--resume"]),
            ("train.py", [*FLAGS, "--out", out / "new"]),
            ("sample.py", ["--run", out, "--n", "1"]),
            ("evaluate.py", ["--run", out, "--n", "25", "--no-shapes"])):
        faults = run(script, words, as_nobody).faults(2)
        if everything(out) != before:
            faults.append("the run was changed")
        yield f"read-only: {script} {' '.join(map(str, words[-2:]))}", faults


def full_disk(folder, reference, starts):
    """A small disk of its own, all but full."""
    disk = folder / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in reference.folder.rglob("*") if path.is_file())
    rooms = (0, 4096, 60_000, 400_000, 1_000_000, 5_000_000, 7_000_000, 8_400_000, 8_500_000)
    for i, room in enumerate(rooms):
        command = ["mount", "-t", "tmpfs", "-o", f"size={3 * size}", "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True).returncode:
            print("a full disk: mounting is not allowed here, skipped")
            return
        try:
            out = disk / "run"
            shutil.copytree(starts[i % 2], out)
            free = os.statvfs(disk)
            filler = disk / "filler"
            filler.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - room)))
            yield f"{room} bytes left", may_not_write(starts[i % 2], out, reference, None,
                                                      filler.unlink)
        finally:
            subprocess.run(["umount", str(disk)])


def writes(folder, reference, rng):
    """What is being written does not fit."""
    starts = half_way(folder, reference)
    for row in (limited_files, read_only, full_disk):
        yield from row(folder, reference, starts)


def at_once(folder, reference, seconds, second):
    """Two runs in one folder, the second so many seconds later: one is refused, one is whole."""
    first = Run("train.py", [*FLAGS, "--out", folder])
    time.sleep(seconds)
    ended = [Run("train.py", [*FLAGS, *second, "--out", folder]).wait(), first.wait()]
    faults = []
    for one in ended:
        faults += one.faults(0, 2)
    refused = [one for one in ended if "in use by process" in one.err]
    if len(refused) != 1:
        faults.append(f"{len(refused)} were refused")
    rows = rows_of(folder / "log.csv")
    if len(rows) != len(set(rows)) or len(rows) != len(reference.rows):
        faults.append("the log is a mixture")
    return faults + damaged_files(folder)


def one_after_another(folder, reference, *runs):
    """Other runs in a copy of a folder: all that was there is there still; something was said."""
    shutil.copytree(reference.folder, folder)
    faults = []
    for words in runs:
        before = everything(folder)
        ended = run("train.py", [*words, "--out", folder])
        faults += ended.faults(0, 2)
        gone = before - everything(folder)
        if gone:
            faults.append(f"lost: {gone}")
        changed = everything(folder) != before
        if changed and ended.status == 0 and " -> " not in ended.out:
            faults.append("nothing was said")
    return faults


def sharing(folder, reference, rng):
    """Runs that get into each other's way."""
    for i, seconds in enumerate((0, 0.2, 0.6)):
        yield f"two, {seconds} s apart", at_once(folder / f"two{i}", reference, seconds,
                                                 ["--seed", "1"])
    yield "one and its --resume", at_once(folder / "resume", reference, 0.5, ["--resume"])

    short = [*BOTH, "--steps", "4"]
    first_only = [*STAGE_1.split(), *MADE_UP.split(), "--steps", "4", "--stage", "1"]
    photos = write_photos(folder / "here" / "set", 200)
    others = write_photos(folder / "there" / "set", 90)
    of_photos = [*STAGE_1.split(), *STAGE_2.split(), "--steps", "4", "--data", photos]
    longer = [*BOTH, "--steps", "16", "--resume"]
    another = folder / "another"
    run("train.py", [*first_only, "--seed", "7", "--out", another])
    sequences = {
        "another seed": [[*short, "--seed", "1"]],
        "another seed, twice": [[*short, "--seed", "1"], [*short, "--seed", "2"]],
        "--resume forgotten, twice": [short, short],
        "another decoder": [[*short, "--channels", "32"]],
        "photos": [of_photos],
        "photos, --resume": [[*of_photos, "--resume"]],
        "stage 1 alone": [first_only],
        "stage 2 again, twice": [[*short, "--stage", "2"], [*short, "--stage", "2"]],
        "more steps, --resume": [longer, longer],
        "another rate, --resume": [[*FLAGS, "--lr-stage2", "0.1", "--resume"]],
        "the decoder of another run": [[*short, "--stage", "2", "--decoder", another]],
        "data that is not there": [[*short, "--data", "nowhere"]],
        "it diverges at once": [[*short, "--lr-stage1", "1e9"]],
    }
    for i, (what, runs) in enumerate(sequences.items()):
        yield what, one_after_another(folder / f"sequence{i}", reference, *runs)

    os.chdir(folder)                                     # where runs/ will be
    for source in (photos, others):
        run("train.py", [*STAGE_1.split(), "--steps", "4", "--stage", "1", "--data", source])
    made = sorted(path.name for path in (folder / "runs").iterdir())
    yield "two sets of photos of one name", [] if len(made) == 2 else [f"runs: {made}"]


def bad_words(field):
    """Words that the flag of a setting cannot mean."""
    least, most = train.BOUNDS.get(field.name, train.OTHER_BOUNDS)
    beyond = [str(least - 1), str(least - 1e6), f"{most * 10 + 1:.0f}", f"{most:.0f}0000"]
    anywhere = ["nan", "inf", "-inf", "1e400", "1" + "0" * 400, "x", "1 2", "--", "None", "1e",
                "0b1", "½"]
    if field.type is bool:
        return ["1", "yes", "nan"]
    if field.type is str:
        return ["\u2028", "no/such/thing", "nan", "x" * 5000] if field.name != "objects" else (
            ["no", "0000,nobody"])
    if field.type is tuple:
        return [*beyond, *anywhere, "1,,nan", "nan,1", "1;2", "1,x", "inf,inf"]
    return [*beyond, *anywhere, "", "1,2", "1e20" if field.type is int else "1e300"]


def bad_commands():
    """(script, words) of commands that must be refused, of every flag that takes a value."""
    for field in fields(train.AllSettings):
        if field.metadata["group"] is None:
            continue
        for word in bad_words(field):
            needs = ["--text"] if field.metadata["group"] == "text" else []
            if field.metadata["group"] == "moving" or field.name in ("shared_colours",):
                needs = ["--data", "puppets", "--size", "32"]
            if field.name in ("rows", "hash_rule"):
                needs = ["--codebooks", "16"]
            word = f"={word}" if field.type is not bool else f" {word}"
            yield "train.py", [*needs, *f"{train.flag(field.name)}{word}".split(" ", 1)]
    for word in ("0", "-1", "1e9", "nan", "x", "", "9999999999999"):
        yield "train.py", [f"--steps={word}"]
    for script, flags in (("sample.py", sample.BOUNDS), ("evaluate.py", evaluate.BOUNDS)):
        for name, (least, most) in flags.items():
            extra = ["--prompt", "a chair"] if (script, name) == ("sample.py", "guidance") else []
            beyond = (least - 1, most + 1, most * 1e4 + 1)
            for word in (*beyond, "nan", "inf", "-inf", "x", "", "1e400"):
                yield script, [*extra, f"--{name}={word}"]
    for word in ("-1 2", "1 -2", "1 x", "nan 1", "3 3", "1"):
        yield "sample.py", ["--interpolate", *word.split()]
    for word in ("-1", "x", "nan", "4", "99999999999999999999"):
        yield "sample.py", [f"--identity={word}"]


def accepted(*_):
    """In place of what comes after all checks."""
    raise AssertionError("accepted")


def refusal(script, words):
    """Calls a script in this process, up to where its work would begin -> what did not hold."""
    said = io.StringIO()
    sys.argv = [script, *map(str, words)]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            data.run_cli(MAINS[script])
    except SystemExit as end:
        lines = said.getvalue().splitlines()
        if end.code == 2 and len(lines) == 1 and lines[0].startswith("error: "):
            return []
        return [f"exit status {end.code}, {len(lines)} lines"]
    except Exception as error:
        return [f"{type(error).__name__}: {str(error)[:100]}"]
    return ["accepted"]


def values(folder, reference, rng):
    """800 commands with a value that its flag cannot mean."""
    commands = list(bad_commands())
    rng.shuffle(commands)
    while len(commands) < 800:                           # two bad values at once
        (script, words), (other, more) = rng.sample(commands, 2)
        if script == other:
            commands.append((script, words + more))
    with contextlib.ExitStack() as patches:
        for module, name in ((train, "train_stages"), (sample, "save_any_samples"),
                             (evaluate, "score_views")):
            patches.enter_context(mock.patch.object(module, name, accepted))
        for script, words in commands[:800]:
            words = with_folders(script, words, folder, reference.folder)
            yield f"{script} {' '.join(words)}"[:300], refusal(script, words)


def with_folders(script, words, folder, run_folder):
    """A command with all that it needs besides the value that it is about."""
    if script != "train.py":
        return ["--run", str(run_folder), "--out", str(folder / "out"), *words]
    if "--stage" in words:
        return ["--preset", "micro", "--out", str(run_folder), *words]
    made_up = [] if "--data" in words else MADE_UP.split()
    return ["--preset", "micro", "--out", str(folder / "run"), *made_up, *words]


def damage(content, rng, how):
    """Bytes of a file that has been damaged in one of eight ways."""
    place = rng.randrange(max(1, len(content)))
    if how == 0:
        return content[:place]                           # cut off
    if how == 1:
        return b""
    if how == 2:
        return content[:place] + bytes(len(content) - place)           # the disk's zeros
    if how == 3:
        return content[:place] + rng.randbytes(64) + content[place + 64:]
    if how == 4:
        return rng.randbytes(len(content))
    if how == 5:
        return content + rng.randbytes(100)
    if how == 6:
        return content[:place] + content[place + 1:]     # one byte less
    flipped = bytearray(content)
    if flipped:
        flipped[place] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def is_whole(path, as_it_was):
    """Whether a checkpoint whose bytes were damaged still holds what it held."""
    try:
        return content(path) == as_it_was
    except data.BadInput:
        return False


def runfiles(folder, reference, rng):
    """Files of a run that were damaged, each read by what reads it."""
    commands = (("train.py", [*FLAGS, "--resume", "--out"]),
                ("train.py", [*BOTH, "--steps", "16", "--resume", "--out"]),
                ("sample.py", ["--n", "1", "--steps", "1", "--run"]),
                ("evaluate.py", ["--n", "25", "--steps", "1", "--no-shapes", "--no-baselines",
                                 "--run"]))
    names = ("stage1.pt", "stage2.pt", "log.csv", "metrics.json")
    for i in range(100):
        out = folder / f"damaged{i}"
        name = names[i % 4]
        shutil.copytree(reference.folder, out)
        path = out / name
        path.write_bytes(damage(path.read_bytes(), rng, i // 4 % 8))
        script, words = commands[rng.randrange(4)]
        status = 0                                       # what can be measured again stops nobody
        if name.endswith(".pt") and not is_whole(path, content(reference.folder / name)):
            status = 2
        ended = run(script, [*words, out])
        faults = ended.faults(status)
        if ended.status == 2 and name not in ended.err:
            faults.append(f"says nothing of {name}: {ended.err}")
        yield f"{name}, damage {i // 4 % 8}, {script}", faults
        shutil.rmtree(out)


# ---- Rows of data folders ------------------------------------------------------------------------
def load_data():
    """In place of data.py, which also draws: loads the folder that sys.argv names."""
    data.load(sys.argv[1], 32, as_clips="--as-clips" in sys.argv)


def write_sets(folder):
    """A small valid set for every loader: {name: its folder}."""
    azimuth = torch.arange(6, dtype=torch.float64) * math.pi / 3
    poses = render.orbit(azimuth, 0.4, 5.0)
    poses[:, :3, 3] += test_data.CENTRE
    camera = torch.tensor([35 / 32, 35 / 32, 0.5, 0.5])
    rgba = test_data.photograph(poses.float(), camera)
    shots = rgba, poses.numpy(), camera.double().numpy() * test_data.SIDE
    sets = {}
    for layout, write in test_data.WRITERS.items():
        sets[layout] = folder / layout.replace(" ", "-")
        write(sets[layout], *shots)
    sets["captions"] = folder / "captions"
    for name in ("one", "two"):
        test_data.write_transforms(sets["captions"] / name, *shots)
    (sets["captions"] / "captions.txt").write_text("one: a red thing\ntwo: a blue thing\n")
    (sets["captions"] / "captions.json").write_text('{"one": "a red thing"}')
    sets["COIL-100"] = folder / "coil"
    test_data.write_coil(sets["COIL-100"], range(0, 360, 60))
    frames, masks = test_data.made_clip(8)
    for name in ("mp4", "gif", "frames", "strips"):
        sets[name] = folder / name
        sets[name].mkdir()
    for clip in ("a", "b"):
        iio.imwrite(sets["mp4"] / f"{clip}.mp4", frames, plugin="FFMPEG", fps=8, macro_block_size=1)
        iio.imwrite(sets["gif"] / f"{clip}.gif", frames, loop=0)
        test_data.save(sets["frames"] / clip, test_data.with_alpha(frames, masks))
        test_data.write_strip(sets["strips"] / f"{clip}.png", frames)
    sets["cache"] = folder / "cache"
    data.write_cache(sets["captions"], sets["cache"], data.Reading(size=32))
    return sets


ODD_WORDS = ("nan", "-1", "0", "1e400", "1e-300", "9" * 40, '""', "null", "[]", "{}", "\u2028", "x")


def damage_text(text, rng):
    """A text file with one wrong number or line."""
    how = rng.randrange(4)
    lines = text.splitlines()
    line = rng.randrange(max(1, len(lines)))
    if how == 0:
        del lines[line:line + 1]
    if how == 1:
        lines[line:line] = lines[line:line + 1]          # twice
    if how >= 2:
        places = [match.span() for match in re.finditer(r"-?\d+(\.\d+)?(e-?\d+)?", text)]
        if places:
            begin, end = rng.choice(places)
            return text[:begin] + rng.choice(ODD_WORDS) + text[end:]
    return "\n".join(lines)


def damage_input(path, rng):
    """Damages one file of a data folder -> in which way."""
    how = rng.randrange(14)
    if how < 8:
        path.write_bytes(damage(path.read_bytes(), rng, how))
        return f"damage {how}"
    if how < 12 and path.suffix in (".json", ".txt"):
        path.write_text(damage_text(path.read_text(), rng))
        return "text"
    path.unlink()
    if how == 8:
        path.mkdir()
        return "a folder"
    if how == 9:
        path.symlink_to("nowhere")
        return "a link to nowhere"
    if how == 10:
        os.mkfifo(path)
        return "a pipe"
    if how == 11:
        path.symlink_to("/dev/zero")
        return "a device"
    return "missing"


def inputs(folder, reference, rng):
    """1,000 data folders with one damaged file: they load, or are refused by name, in time."""
    sets = write_sets(folder / "sets")
    for i in range(1000):
        name = rng.choice(list(sets))
        out = folder / "set"
        shutil.copytree(sets[name], out)
        files = sorted(path for path in out.rglob("*") if path.is_file())
        told = [path for path in files if path.suffix not in (".png", ".mp4", ".gif")]
        path = rng.choice(told if told and rng.random() < 0.6 else files)
        how = damage_input(path, rng)
        words = [out, "--as-clips"] if name in ("frames", "strips") else [out]
        ended = run("load", words, limit=10)
        faults = ended.faults(0, 2)
        if ended.status == 2 and str(out) not in ended.err:
            faults.append(f"names no file: {ended.err}")
        yield f"{name}, {path.relative_to(out)}, {how}", faults
        shutil.rmtree(out)


def greedy(folder, reference, rng):
    """Small files that ask for gigabytes, or never end."""
    sets = write_sets(folder / "sets")

    def sparse(path):
        with open(path, "r+b") as file:
            file.truncate(2 ** 40)

    def pipe(path):
        path.unlink()
        os.mkfifo(path)

    def long_header(path):
        header = {"descr": "<f8", "fortran_order": False, "shape": (10 ** 10, 17)}
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)

    def many(path):
        path.write_bytes((10 ** 15).to_bytes(8, "little") + path.read_bytes()[8:])

    def bomb(path):
        iio.imwrite(path, np.zeros((12_000, 12_000), np.uint8))

    def long_picture(path):
        iio.imwrite(path, np.zeros((2, 60_000), np.uint8))

    def large_video(path):
        iio.imwrite(path, np.zeros((3, 9000, 9000), np.uint8), plugin="pillow")

    sparse_model = "chair/obj7/sparse/0"
    for name, file, change in (
            ("NeRF transforms", "transforms.json", sparse), ("SRN", "pose/000001.txt", sparse),
            ("COLMAP text", f"{sparse_model}/images.txt", sparse),
            ("COLMAP", f"{sparse_model}/images.bin", sparse), ("captions", "captions.json", sparse),
            ("NeRF transforms", "transforms.json", pipe), ("LLFF", "images_2/001.png", pipe),
            ("SRN", "intrinsics.txt", pipe), ("mp4", "a.mp4", pipe),
            ("LLFF", "poses_bounds.npy", long_header),
            ("Objaverse renders", "001.npy", long_header),
            ("COLMAP", f"{sparse_model}/images.bin", many),
            ("COLMAP", f"{sparse_model}/cameras.bin", many),
            ("NeRF transforms", "images/001.png", bomb), ("COIL-100", "obj3__60.png", bomb),
            ("COLMAP", "chair/obj7/masks/001.png", bomb), ("strips", "a.png", bomb),
            ("NeRF transforms", "images/001.png", long_picture),
            ("frames", "a/001.png", long_picture), ("gif", "a.gif", large_video),
            ("cache", data.FRAMES, sparse), ("cache", data.ABOUT, sparse),
            ("cache", data.FRAMES, pipe), ("cache", data.ABOUT, pipe)):
        out = folder / "set"
        shutil.copytree(sets[name], out)
        change(out / file)
        words = [out, "--as-clips"] if name in ("frames", "strips") else [out]
        yield f"{file}: {change.__name__}", run("load", words, limit=10).faults(0, 2)
        shutil.rmtree(out)


class Shots:
    """Twelve shots of one thing, to be spoiled and written: rgba, poses, camera, as test_data's."""

    def __init__(self):
        azimuth = torch.arange(12, dtype=torch.float64) * math.pi / 6
        elevation = torch.deg2rad(torch.tensor([3.0, 45, 25], dtype=torch.float64).repeat(4))
        poses = render.orbit(azimuth, elevation, 5.0)
        poses[:, :3, 3] += test_data.CENTRE
        camera = torch.tensor([1.6, 1.6, 0.52, 0.47])
        self.rgba = test_data.photograph(poses.float(), camera)
        self.poses = poses.numpy()
        self.camera = camera.double().numpy() * test_data.SIDE

    def write(self, folder, **extra):
        test_data.write_transforms(folder, self.rgba, self.poses, self.camera, **extra)

    def turn(self, i, axis):
        """Camera i turned by half a turn about one of its axes."""
        turned = np.eye(4)
        turned[:3, :3] = data.half_turn(np.eye(3)[axis])
        self.poses[i] = self.poses[i] @ turned


def edit_json(folder, change):
    """Rewrites a transforms.json; change: called with what it holds."""
    path = folder / "transforms.json"
    content = train.json.loads(path.read_text())
    change(content)
    path.write_text(train.json.dumps(content))


FLAWS = []


def flaw(write):
    """A function (folder, shots) that writes a data folder with a flaw, which its name tells."""
    FLAWS.append(write)
    return write


# ---- Cameras


@flaw
def a_camera_looks_the_other_way(folder, shots):
    shots.turn(4, 1)
    shots.write(folder)


@flaw
def a_camera_is_upside_down(folder, shots):
    shots.turn(4, 2)
    shots.write(folder)


@flaw
def a_camera_stands_elsewhere(folder, shots):
    shots.poses[4, 0, 3] += 1
    shots.write(folder)


@flaw
def a_camera_stands_a_little_elsewhere(folder, shots):
    shots.poses[4, 0, 3] += 0.3
    shots.write(folder)


@flaw
def a_camera_in_millimetres(folder, shots):
    shots.poses[4, :3, 3] *= 1000
    shots.write(folder)


@flaw
def a_mirrored_camera(folder, shots):
    shots.poses[3, :3, 0] *= -1
    shots.write(folder)


@flaw
def a_pose_of_nan(folder, shots):
    shots.poses[3, 0, 3] = np.nan
    shots.write(folder)


@flaw
def focal_lengths_ten_times_too_long(folder, shots):
    shots.camera[:2] *= 10
    shots.write(folder)


@flaw
def focal_lengths_ten_times_too_short(folder, shots):
    shots.camera[:2] /= 10
    shots.write(folder)


@flaw
def focal_lengths_half_again_too_long(folder, shots):
    shots.camera[:2] *= 1.5
    shots.write(folder)


@flaw
def one_focal_length_ten_times_too_long(folder, shots):
    shots.write(folder)
    longer = {"fl_x": 10 * shots.camera[0], "fl_y": 10 * shots.camera[1]}
    edit_json(folder, lambda content: content["frames"][3].update(longer))


@flaw
def one_focal_length_for_two(folder, shots):
    shots.camera[0] *= 2
    shots.write(folder)


@flaw
def a_principal_point_in_fractions(folder, shots):
    shots.camera[2:] /= test_data.SIDE
    shots.write(folder)


@flaw
def width_and_height_exchanged(folder, shots):
    wide = np.zeros((12, 96, 128, 4), np.uint8)
    wide[:, :, 16:112] = shots.rgba
    shots.rgba = wide
    shots.camera[2] += 16
    shots.write(folder, w=96, h=128)


@flaw
def a_lens_that_bends_by_mistake(folder, shots):
    shots.write(folder, k1=3.0)


@flaw
def world_to_camera(folder, shots):
    shots.poses = np.linalg.inv(test_data.TURN4) @ np.linalg.inv(test_data.TURN4 @ shots.poses)
    shots.write(folder)


@flaw
def axes_of_opencv(folder, shots):
    shots.poses = shots.poses @ data.FLIP
    shots.write(folder)


@flaw
def rotations_transposed(folder, shots):
    shots.poses[:, :3, :3] = shots.poses[:, :3, :3].transpose(0, 2, 1).copy()
    shots.write(folder)


@flaw
def another_up(folder, shots):
    shots.poses = np.linalg.inv(test_data.TURN4) @ shots.poses
    shots.write(folder)


@flaw
def all_upside_down(folder, shots):
    shots.poses = np.diag([1.0, -1, -1, 1]) @ shots.poses
    shots.write(folder)


@flaw
def cameras_on_one_side(folder, shots):
    azimuth = torch.linspace(0, 0.2, 12, dtype=torch.float64)
    poses = render.orbit(azimuth, 0.3, 5.0)
    poses[:, :3, 3] += test_data.CENTRE
    camera = torch.from_numpy(shots.camera / test_data.SIDE).float()
    shots.rgba, shots.poses = test_data.photograph(poses.float(), camera), poses.numpy()
    shots.write(folder)


@flaw
def rows_of_poses_shifted_by_one(folder, shots):
    test_data.write_llff(folder, shots.rgba, shots.poses, shots.camera)
    rows = np.load(folder / "poses_bounds.npy")
    np.save(folder / "poses_bounds.npy", np.roll(rows, 1, 0))


@flaw
def a_camera_that_is_not_listed(folder, shots):
    test_data.write_colmap_text(folder, shots.rgba, shots.poses, shots.camera)
    path = folder / "chair" / "obj7" / "sparse" / "0" / "images.txt"
    path.write_text(path.read_text().replace(" 1 003.png", " 9 003.png"))


# ---- Lists of photos


@flaw
def a_photo_listed_twice(folder, shots):
    shots.write(folder)
    edit_json(folder, lambda content: content["frames"].append(content["frames"][0]))


@flaw
def a_lost_line(folder, shots):
    shots.write(folder)
    edit_json(folder, lambda content: content["frames"].pop(3))


@flaw
def half_of_the_photos_unregistered(folder, shots):
    shots.write(folder)
    edit_json(folder, lambda content: content.update(frames=content["frames"][::2]))


@flaw
def half_of_the_turntable(folder, shots):
    test_data.write_coil(folder)
    for angle in range(180, 360, 15):
        (folder / f"obj3__{angle}.png").unlink()


@flaw
def two_angles_exchanged(folder, shots):
    test_data.write_coil(folder)
    (folder / "obj3__90.png").rename(folder / "obj3__91.png")
    (folder / "obj3__180.png").rename(folder / "obj3__90.png")
    (folder / "obj3__91.png").rename(folder / "obj3__180.png")


# ---- Masks and photos


@flaw
def masks_inverted(folder, shots):
    shots.rgba[..., 3] = 255 - shots.rgba[..., 3]
    shots.write(folder)


@flaw
def one_mask_inverted(folder, shots):
    shots.rgba[2, ..., 3] = 255 - shots.rgba[2, ..., 3]
    shots.write(folder)


@flaw
def one_mask_white(folder, shots):
    shots.rgba[2, ..., 3] = 255
    shots.write(folder)


@flaw
def one_mask_empty(folder, shots):
    shots.rgba[2, ..., 3] = 0
    shots.write(folder)


@flaw
def masks_of_the_next_photo(folder, shots):
    shots.rgba[..., 3] = np.roll(shots.rgba[..., 3], 1, 0)
    shots.write(folder)


@flaw
def masks_with_a_speck(folder, shots):
    shots.rgba[:, :3, :3, 3] = 255
    shots.write(folder)


@flaw
def one_mask_cut(folder, shots):
    shots.rgba[2, 45:, :, 3] = 0
    shots.write(folder)


@flaw
def two_photos_exchanged(folder, shots):
    shots.rgba[[2, 5]] = shots.rgba[[5, 2]]
    shots.write(folder)


@flaw
def one_photo_flipped(folder, shots):
    shots.rgba[1] = shots.rgba[1, :, ::-1]
    shots.write(folder)


@flaw
def one_photo_black(folder, shots):
    shots.rgba[2, ..., :3] = 0
    shots.write(folder)


@flaw
def one_photo_grey(folder, shots):
    shots.rgba[2, ..., :3] = shots.rgba[2, ..., :3].mean(-1, keepdims=True)
    shots.write(folder)


@flaw
def one_photo_of_another_size(folder, shots):
    shots.write(folder)
    iio.imwrite(folder / "images" / "004.png", shots.rgba[4, ::2, ::2])


# ---- Objects, captions, clips


@flaw
def a_caption_for_nobody(folder, shots):
    shots.write(folder / "a")
    (folder / "captions.txt").write_text("a: a red thing\nb: a blue thing\n")


@flaw
def two_objects_that_are_one(folder, shots):
    shots.write(folder / "a")
    shots.write(folder / "b")


@flaw
def a_clip_in_which_the_light_fades(folder, shots):
    frames, _ = test_data.made_clip(16)
    fading = frames * np.linspace(1, 0.5, 16)[:, None, None, None]
    test_data.write_strip(folder / "a.png", fading.astype(np.uint8))
    test_data.write_strip(folder / "b.png", frames)


def flaws(folder, reference, rng):
    """Data that is whole, and wrong: something is said of it, or it is refused."""
    for write in FLAWS:
        out = folder / "set"
        write(out, Shots())
        faults = []
        try:
            dataset = data.load(out, 48, as_clips=write.__name__.startswith("a_clip"))
            if not dataset.skipped + dataset.remarks:
                faults.append("loaded without a word")
        except data.BadInput:
            pass
        yield write.__name__, faults
        shutil.rmtree(out)


ROWS = {"kill9": kill9, "signals": signals, "writes": writes, "sharing": sharing,
        "values": values, "runfiles": runfiles, "inputs": inputs, "greedy": greedy, "flaws": flaws}


# So many may fail: nobody can tell a lens that bends a little by mistake.
ALLOWED = {"flaws": 8}


def main():
    """Tries the rows that are named, or all -> exit status 1 where more fail than are allowed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="NAME", help=f"{', '.join(ROWS)} (all)")
    parser.add_argument("--first", type=int, metavar="N", help="only so many trials of each row")
    args = parser.parse_args()
    unknown = set(args.rows) - set(ROWS)
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}; there are: {', '.join(ROWS)}")
    torch.set_num_threads(1)
    train.parse(FLAGS)                       # so torch has imported what nobody may not read
    failures = []
    too_many = False
    print(f"{'what':10}{'tried':>8}{'held':>8}", flush=True)
    with tempfile.TemporaryDirectory(prefix="faults-") as top:
        top = Path(top)
        reference = Reference(top / "reference")
        for name in args.rows or ROWS:
            folder = top / name
            folder.mkdir()
            tried, failed = 0, []
            trials = ROWS[name](folder, reference, random.Random(name))
            for what, faults in itertools.islice(trials, args.first):
                tried += 1
                if faults:
                    failed.append(f"{name}: {what}: {'; '.join(faults)}")
            print(f"{name:10}{tried:8}{tried - len(failed):8}", flush=True)
            failures += failed
            too_many = too_many or len(failed) > ALLOWED.get(name, 0)
            os.chdir(top)
            shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(failures) or "all held")
    sys.exit(1 if too_many else 0)


if __name__ == "__main__":
    main()
