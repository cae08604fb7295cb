"""What stands above the rule lines is the whole method, and needs nothing else."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mutants

ROOT = Path(__file__).resolve().parents[1]
RULE = "# ==== Second reading"
FILES = ["render", "data", "autodecoder", "normalize", "diffusion", "sample", "train"]
# Names of the second half of the paper: subjects that move, text, hashing.
BELOW = {"growth", "prior", "detail", "posenet", "skin", "prompt", "prompts", "text",
         "context", "codebooks", "hash_rule", "captions_of"}


def halves(name):
    """What stands above the rule line of a file, and what stands below it."""
    above, rule, below = (ROOT / f"{name}.py").read_text().partition(f"\n{RULE}")
    return above + "\n", below.partition("\n")[2]


def defined(tree):
    """Names that a module's own statements define."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def read(tree):
    """Names that a module's code reads and nowhere sets itself: those of modules and builtins."""
    loaded, stored = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (loaded if isinstance(node.ctx, ast.Load) else stored).add(node.id)
        if isinstance(node, ast.arg):
            stored.add(node.arg)
    return loaded - stored


PROGRAM = """
import torch
import sample
import train

values = train.MICRO | dict(
    n_objects=4, n_views=7, steps_stage1=4, steps_stage2=4, objects_per_step=2, batch_size=4)
train.learn(train.Settings(**values), "run")
trained = sample.load_run("run")
volumes, paths = sample.save_samples(trained, "samples", n=1, steps=3, seed=5, churn=40.0)
assert volumes.shape == (1, 4, 16, 16, 16) and volumes.isfinite().all()
print(*paths)
"""


def test_the_tops_alone_train_both_stages_and_sample_one_object(tmp_path):
    for name in FILES:
        (tmp_path / f"{name}.py").write_text(halves(name)[0])
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    *progress, paths = done.stdout.splitlines()
    assert sum(line.startswith("stage 1 | ") for line in progress) == 4
    assert sum(line.startswith("stage 2 | ") for line in progress) == 4
    assert len(paths.split()) >= 2
    for path in paths.split():
        assert (tmp_path / path).stat().st_size > 1000, path


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_one_rule_line_and_what_is_above_knows_nothing_of_what_is_below(name):
    text = (ROOT / f"{name}.py").read_text()
    assert text.count(f"\n{RULE}") == (0 if name == "normalize" else 1)
    above, below = halves(name)
    only_below = defined(ast.parse(below)) - defined(ast.parse(above))
    assert not read(ast.parse(above)) & only_below


@pytest.mark.parametrize("name", FILES)
def test_the_first_reading_does_not_speak_of_the_second_half_of_the_paper(name):
    names = set()
    for node in ast.walk(ast.parse(halves(name)[0])):
        for field in ("id", "arg", "attr"):
            names.add(getattr(node, field, None))
    assert not names & BELOW


def test_the_first_readings_stay_short_enough_for_an_evening():
    assert sum(len(halves(name)[0].splitlines()) for name in FILES) <= 1350


@pytest.mark.parametrize("name", FILES)
def test_no_file_imports_what_judges_it_and_all_import_in_order(name):
    tree, imported = ast.parse((ROOT / f"{name}.py").read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    judges = {path.stem for path in (ROOT / "tests").glob("*.py")} | {"tests"}
    assert not imported & judges
    assert imported & set(FILES) <= set(FILES[:FILES.index(name)])


@pytest.mark.parametrize("name", FILES)
def test_every_wrong_line_stands_for_one_line_that_is_there_and_is_a_program(name):
    text = (ROOT / f"{name}.py").read_text()
    wrong_lines = [mutant for mutant in mutants.MUTANTS if mutant[0] == name]
    assert len(wrong_lines) >= 8
    for _, right, wrong in wrong_lines:
        assert text.count(right) == 1 and right != wrong, right
        compile(text.replace(right, wrong), name, "exec")


def test_half_of_the_wrong_lines_are_in_what_connects_the_parts():
    """In train.py, sample.py, and those functions of data.py that load what the flags name."""
    wiring = {"load", "load_for", "find", "find_coil", "find_photos", "gather", "last_of",
              "number_frames", "build_each", "kind_of", "load_cache"}
    lines = (ROOT / "data.py").read_text().splitlines()
    loading = ""
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.FunctionDef) and node.name in wiring:
            loading += "\n".join(lines[node.lineno - 1:node.end_lineno]) + "\n"
    connected = [name for name, right, _ in mutants.MUTANTS
                 if name in ("train", "sample") or name == "data" and right in loading]
    assert len(mutants.MUTANTS) >= 98 and 2 * len(connected) >= len(mutants.MUTANTS)
    assert connected.count("data") >= 10
