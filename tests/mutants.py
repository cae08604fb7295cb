"""Are the tests any good? Wrong lines, one at a time, each of which some test must catch.

    python tests/mutants.py                 all of them, an hour or so on two cores
    python tests/mutants.py render train    those of these files
    python tests/mutants.py --list          which there are

A mutant is (file, right, wrong): `right` stands exactly once in the file, and is replaced by
`wrong` in a copy of the project, where the tests of that module then run. A mutant survives if
they all pass: then something is untested. The right answer to a survivor is a test, not to take
the mutant out.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ["render", "data", "autodecoder", "normalize", "diffusion", "sample", "train"]
# Tests of a module; those of sample.py's numbers are partly in the file that uses them most.
TESTS = {name: [f"tests/test_{name}.py"] for name in FILES}
SECONDS = 900                                # a mutant that hangs counts as caught after that long

MUTANTS = []


def copy_of_the_project(folder):
    """The tracked files, without runs and pictures."""
    for name in FILES:
        shutil.copy(ROOT / f"{name}.py", folder)
    shutil.copy(ROOT / "README.md", folder)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("*.png", "*.gif"))


def apply(folder, name, right, wrong):
    """Writes the mutant of one file; says so where `right` is not there exactly once."""
    path = folder / f"{name}.py"
    text = (ROOT / f"{name}.py").read_text()
    if text.count(right) != 1:
        raise SystemExit(f"{name}.py: {text.count(right)} places say {right!r}: this mutant is out "
                         "of date")
    path.write_text(text.replace(right, wrong))
    return path


def is_caught(folder, name):
    """Whether a test of the module fails in this copy."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS[name]]
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True,
                              timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="render, data, ...: mutants of these only")
    parser.add_argument("--list", action="store_true", help="print them and stop")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not args.files or mutant[0] in args.files]
    if args.list:
        for name, right, wrong in chosen:
            print(f"{name}.py: {right!r} -> {wrong!r}")
        return
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        copy_of_the_project(folder)
        for number, (name, right, wrong) in enumerate(chosen, 1):
            began = time.time()
            path = apply(folder, name, right, wrong)
            caught = is_caught(folder, name)
            shutil.copy(ROOT / f"{name}.py", path)
            survivors += not caught
            print(f"{number}/{len(chosen)} {'caught' if caught else 'SURVIVES'} {name}.py: "
                  f"{right!r} -> {wrong!r} ({time.time() - began:.0f} s)", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} wrong lines were caught")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
