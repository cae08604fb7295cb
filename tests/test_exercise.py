"""exercise.py: graders are graded. Right solutions pass, wrong ones lose points and learn why.

Each exercise has a process that answers for all of its solutions, as torch takes long to begin.
"""
import csv
import functools
import importlib.util
import io
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import data
import exercise
from data import BadInput
from exercise import EXERCISES

NUMBERS = list(EXERCISES)
ROOT = exercise.ROOT


def text_of(number):
    return exercise.original(EXERCISES[number]).read_text(encoding="utf8")


def with_bodies(number, functions):
    """The published file with other bodies, a function each, in place of those of the exercise."""
    text = text_of(number)
    for name, function in functions.items():
        text = exercise.replace_body(text, name, function)
    return text


def without_body(number, text=None):
    """A file as it is handed out in an exercise."""
    return exercise.changed(EXERCISES[number], EXERCISES[number].FILE, text or text_of(number))


def docstring_alone(*_, **__):
    """What stands in front of the body, once more: C = sum_i w_i rgb_i, and so on."""


def beside(number):
    """Other exercises of the same file."""
    return [n for n in NUMBERS if n != number and EXERCISES[n].FILE == EXERCISES[number].FILE]


@functools.cache
def tried(number):
    """All solutions of an exercise: what was given, {name: verdicts}, {name: answers}; the last of
    what was given and of the answers is of the picture."""
    one = EXERCISES[number]
    solutions = {"published": text_of(number), "blank": without_body(number),
                 "unusual": with_bodies(number, one.UNUSUAL),
                 "constant": with_bodies(number, one.CONSTANT),
                 "docstring": with_bodies(number, {name: docstring_alone for name in one.WRITE})}
    for i, (right, wrong, _) in enumerate(one.WRONG):
        assert text_of(number).count(right) == 1, right
        solutions[f"wrong {i}"] = text_of(number).replace(right, wrong)
    for n in beside(number):
        solutions[f"without {n}"] = without_body(n)
    contents = [text.encode() for text in solutions.values()]
    given, answers = exercise.ask(one, contents, seed=number, seconds=300, quiet=True)
    verdicts = [exercise.judge_all(one, given, answer) for answer in answers]
    return given, dict(zip(solutions, verdicts)), dict(zip(solutions, answers))


def points(number, name):
    return exercise.points_of(tried(number)[1][name])


def hints(number, name):
    return [verdict.hint for verdict in tried(number)[1][name] if verdict.hint]


# ---- Graders, graded -----------------------------------------------------------------------------
@pytest.mark.parametrize("number", NUMBERS)
def test_claims_are_worth_ten_points_in_all(number):
    claims = EXERCISES[number].CLAIMS
    assert sum(claim.points for claim in claims) == 10
    assert 4 <= len(claims) <= 7
    assert len(EXERCISES[number].WRONG) == 3


@pytest.mark.parametrize("name", ["published", "unusual"])
@pytest.mark.parametrize("number", NUMBERS)
def test_a_right_solution_has_all_points(number, name):
    assert hints(number, name) == []
    assert points(number, name) == 10


@pytest.mark.parametrize("number", NUMBERS)
def test_without_its_body_a_function_has_no_points_and_is_said_not_to_be_written(number):
    assert points(number, "blank") == 0
    assert set(hints(number, "blank")) == {"not written yet"}


PAIRS = [(number, other) for number in NUMBERS for other in beside(number)]


@pytest.mark.parametrize("number, other", PAIRS)
def test_only_the_claims_of_a_function_that_is_missing_fail(number, other):
    assert points(number, f"without {other}") == 10


@pytest.mark.parametrize("i", [0, 1, 2])
@pytest.mark.parametrize("number", NUMBERS)
def test_a_likely_mistake_loses_points_and_is_named_and_no_other_is(number, i):
    said = hints(number, f"wrong {i}")
    assert 0 < points(number, f"wrong {i}") < 10         # the rest of it is right, and paid for
    named = [words for _, _, words in EXERCISES[number].WRONG
             if any(words in hint for hint in said)]
    assert named == [EXERCISES[number].WRONG[i][2]]


@pytest.mark.parametrize("name", ["constant", "docstring"])
@pytest.mark.parametrize("number", NUMBERS)
def test_neither_constants_nor_a_copied_docstring_earn_anything(number, name):
    assert points(number, name) == 0


def spoilt(value, how):
    """An answer, all of whose numbers are nan, or inf, or 0; or that has none."""
    if isinstance(value, dict):
        return {name: spoilt(part, how) for name, part in value.items()}
    if isinstance(value, torch.Tensor) and how == "empty":
        return value.new_zeros(0, *value.shape[1:])
    if isinstance(value, torch.Tensor):
        return torch.full_like(value.double(), float(how))
    if isinstance(value, list):
        return [] if how == "empty" else [spoilt(part, how) for part in value]
    if isinstance(value, (int, float)) and how != "empty":
        return float(how)
    return value


@pytest.mark.filterwarnings("ignore:std")                # of no numbers
@pytest.mark.parametrize("how", ["nan", "inf", "-inf", "0", "empty"])
@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_not_finite_or_empty_or_nothing_but_0_satisfies_no_claim(number, how):
    given, _, answers = tried(number)
    for claim, numbers, answer in zip(EXERCISES[number].CLAIMS, given, answers["published"]):
        assert exercise.judge(claim, numbers, answer) == ""
        nothing = {"answer": spoilt(answer["answer"], how)}
        assert exercise.judge(claim, numbers, nothing) != "", claim.words


def answered(number, i, **changes):
    """What is said of claim i where the published answer has been changed."""
    given, _, answers = tried(number)
    answer = dict(answers["published"][i]["answer"], **changes)
    return exercise.judge(EXERCISES[number].CLAIMS[i], given[i], {"answer": answer})


def test_where_what_is_right_follows_from_the_answer_nothing_beyond_measure_does():
    """Weights whose sum is infinite; no step, and a mu for which none is right; and the like."""
    weights = torch.full((6, 9), 1.5e308, dtype=torch.float64)
    weights[:, 0] = 0
    assert "not finite" in answered(1, 2, weights=weights)
    directions = torch.full((2, 3, 4, 4, 3), torch.nan)
    assert answered(2, 3, in_camera=directions, d=torch.ones_like(directions))
    given = tried(11)[0][1]
    still = {name: given[name] for name in ("R", "rho", "u")}
    for mu in (1e12, torch.inf):
        assert "more than 100 times" in answered(11, 1, mu=torch.full((3, 1, 1), mu), **still)
    error = torch.full((3,), 1e12)
    assert "100 times" in answered(11, 2, error=error, mu=(error / 144).view(3, 1, 1))


def test_where_m_and_s_are_what_they_should_become_they_have_been_set_before():
    """Exercise 6: `return self` leaves m and s as they were."""
    for i in (5, 6):
        latents_hat = (tried(6)[0][i]["latents"] - 7) / 5
        left = {"m": torch.tensor(7.0), "s": torch.tensor(5.0), "latents_hat": latents_hat}
        assert answered(6, i, **left) and answered(6, i) == ""


@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_right_is_not_sent(number, tmp_path):
    one, given = EXERCISES[number], tried(number)[0]
    exercise.write_questions(one, given, tmp_path)
    sent = torch.load(tmp_path / "given.pt", weights_only=True)
    assert [set(numbers) for numbers in sent] == [set(numbers) - {"right"} for numbers in given]
    if number == 11:                                     # the pose that eight steps should find
        assert not torch.equal(sent[5]["R"], given[5]["right"])


def test_numbers_are_drawn_anew_for_every_seed():
    for number in NUMBERS:
        for claim in EXERCISES[number].CLAIMS:
            one, other = [claim.given(torch.Generator().manual_seed(seed)) for seed in (1, 2)]
            assert any(isinstance(value, torch.Tensor) and not torch.equal(value, other[name])
                       for name, value in one.items()), (number, claim.words)


# ---- Pictures ------------------------------------------------------------------------------------
def page(number, answer):
    """One half of a picture, by itself: its pixels."""
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    exercise.draw_half(figure, EXERCISES[number].PICTURE, "", tried(number)[0][-1], answer)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


@pytest.mark.parametrize("number", NUMBERS)
def test_a_right_solution_looks_right_and_of_the_wrong_ones_one_at_least_does_not(number):
    given, _, answers = tried(number)
    right = page(number, exercise.right_answer(EXERCISES[number], given[-1]))
    blank = page(number, answers["blank"][-1])
    assert (page(number, answers["published"][-1]) == right).all()
    assert (right < 250).mean() > 5 * (blank < 250).mean()       # not an empty page
    assert any((page(number, answers[f"wrong {i}"][-1]) != right).any() for i in range(3))


def test_where_nothing_is_written_the_picture_says_so_beside_the_right_one(tmp_path):
    given, _, answers = tried(1)
    exercise.draw_picture(EXERCISES[1], given[-1], answers["blank"][-1], tmp_path / "blank.png")
    picture = iio.imread(tmp_path / "blank.png")[40:]            # below the headings
    left, right = picture[:, :450], picture[:, 450:]
    assert 0 < (left < 128).any(-1).mean() < 0.02        # two lines of words
    assert (right < 128).any(-1).mean() > 0.05


# ---- What is handed out --------------------------------------------------------------------------
def code_of(line):
    """A line without its trailing comment."""
    return line.split("  #")[0].strip()


@pytest.mark.parametrize("number", NUMBERS)
def test_a_hand_out_is_the_project_to_the_byte_but_for_the_answer_which_is_nowhere(number,
                                                                                   tmp_path):
    one = EXERCISES[number]
    exercise.write_exercise(one, tmp_path / "new")
    paths = {path.name: path for path in (tmp_path / "new").iterdir()}
    if number in exercise.FIGURES:
        figure = exercise.FIGURES[number]
        assert paths.pop(figure).read_bytes() == (ROOT / "docs" / figure).read_bytes()
        assert f"]({figure})" in paths[exercise.SHEET].read_text(encoding="utf8")
    made = {name: path.read_text(encoding="utf8") for name, path in paths.items()}
    assert set(made) == {*exercise.COPIED, one.FILE, exercise.SHEET}
    changed = {one.FILE} | {name for name, _, _ in one.CHANGED}
    for name in set(made) - changed - {exercise.SHEET}:
        assert made[name] == (ROOT / name).read_text(encoding="utf8")
    for name, text in made.items():
        if name.endswith(".py"):
            compile(text, name, "exec")
    # No line of the answer is left. Short ones, as "return x", stand everywhere; this one tells
    # nothing.
    common = {"rotation = cam2world[..., :3, :3]"}
    published = text_of(number)
    lines = published.splitlines()
    left = [code_of(line) for text in made.values() for line in text.splitlines()]
    for name in (*one.WRITE, *one.TAKEN_OUT):
        node = exercise.find(published, name)
        for line in lines[exercise.head_of(published, node):node.end_lineno]:
            if exercise.is_code(line) and len(code_of(line)) >= 25:
                assert code_of(line) in common or code_of(line) not in left, line


@pytest.mark.parametrize("number", NUMBERS)
def test_signature_docstring_and_checks_stay_and_the_body_raises(number):
    one = EXERCISES[number]
    published, made = text_of(number), without_body(number)
    for name in one.WRITE:
        before, after = exercise.find(published, name), exercise.find(made, name)
        head = published.splitlines()[before.lineno - 1:exercise.head_of(published, before)]
        assert "\n".join(head) in made
        assert after.body[-1].exc.args[0].value == f"exercise {number}: {name}"
        kept = [statement for statement in before.body if exercise.is_check(statement)]
        assert sum(exercise.is_check(statement) for statement in after.body) == len(kept)
    # What stands outside is there as it was.
    first = exercise.find(published, one.WRITE[0]).lineno
    if not one.TAKEN_OUT:
        assert made.splitlines()[:first] == published.splitlines()[:first]


def test_shape_comments_of_the_body_stay_with_the_names_that_they_belong_to():
    made = without_body(8)
    begin = made.index("    # Shapes on the way")
    end = made.index("raise NotImplementedError")
    assert made[begin:end].split("\n")[1:-1] == [
        "    #     sigma          (B,)", "    #     weight         (B,)",
        "    #     x              (B, C, s, s, s)"]
    assert "    #     r, J           (B, 2K), (B, 2K, 6)" in without_body(11)


def test_lines_to_write_are_the_lines_of_code_that_are_missing():
    for number in NUMBERS:
        one = EXERCISES[number]
        if one.TAKEN_OUT:
            continue                                     # their signatures go, too
        lines = [sum(map(exercise.is_code, text.splitlines()))
                 for text in (text_of(number), without_body(number))]
        assert exercise.lines_to_write(one) == lines[0] - lines[1] + len(one.WRITE)


def test_data_are_made_by_the_students_own_rays_and_are_the_same(tmp_path):
    """Exercise 2 changes three places of data.py that calculate rays once more."""
    changed = types.ModuleType("data_of_exercise_2")
    sys.modules[changed.__name__] = changed              # dataclasses look there
    source = exercise.changed(EXERCISES[2], "data.py", (ROOT / "data.py").read_text("utf8"))
    exec(compile(source, "data.py", "exec"), changed.__dict__)
    ours, theirs = data.load_synthetic(16, 0, 0, 1, 2), changed.load_synthetic(16, 0, 0, 1, 2)
    assert (ours.images.int() - theirs.images.int()).abs().max() <= 1
    parts = data.put_into_cube(data.make_vehicle(np.random.default_rng(0))[0])
    cameras, lens = data.cameras_all_round(3, np.random.default_rng(1))
    expected = data.draw_still(parts, cameras, lens, 16)
    found = changed.draw_still(parts, cameras, lens, 16)
    assert expected[..., 3].mean() > 0.05
    assert (found - expected).abs().max() < 0.02
    cameras, lens = data.fixed_camera(2)
    masks = torch.zeros(2, 8, 8, dtype=torch.uint8)
    masks[:, 1:4, 5:8] = 255
    cameras = cameras.double().numpy()
    expected = data.rays_through_masks(masks, cameras, lens)
    expected /= (expected**2).sum(1, keepdims=True)**0.5
    found = changed.rays_through_masks(masks, cameras, lens)
    assert abs(found - expected).max() < 1e-6


# ---- Solutions that do not calculate -------------------------------------------------------------
CHEATS = {
    "imports the original": f"""
    import importlib.util
    spec = importlib.util.spec_from_file_location("original", {str(ROOT / "render.py")!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.integrate(density, rgb, edges)
""",
    "imports it by its folder": f"""
    import sys
    sys.path.insert(0, {str(ROOT)!r})
    del sys.modules["render"]
    import render
    return render.integrate(density, rgb, edges)
""",
    "imports what PYTHONPATH leads to": """
    import planted
    return planted.integrate(density, rgb, edges)
""",
    "runs another program": """
    import subprocess
    subprocess.run(["python", "--version"])
""",
    "writes to the grader": f"""
    open({str(exercise.HERE / "exercises" / "integrate.py")!r}, "a").write("\\n")
""",
    "removes the grader": f"""
    import os
    os.remove({str(exercise.HERE / "exercises" / "integrate.py")!r})
""",
    "says that it is right": """
    import torch
    print("10 of 10 points")
    torch.equal = torch.allclose = lambda *_, **__: True
    torch.Tensor.__gt__ = lambda *_: torch.tensor(False)
    return density, density, density
""",
    "ends with the last claim": """
    import os
    print("10 of 10 points", flush=True)
    if density.ndim == 4:
        os._exit(0)
    dt = edges.diff(dim=-1)
    tau = density * dt
    T = torch.exp(-F.pad(tau.cumsum(-1)[..., :-1], (1, 0)))
    weights = T * -torch.expm1(-tau)
    return (weights[..., None] * rgb).sum(-2), weights.sum(-1), weights
"""}


if hasattr(os, "pidfd_open"):                            # Linux
    LAST, BODY = CHEATS.popitem()
    CHEATS |= {
        "ends the grader": """
    import os
    import signal
    signal.pidfd_send_signal(os.pidfd_open(os.getppid()), signal.SIGKILL)
""",
        "signals by a number": """
    import signal
    signal.pidfd_send_signal(0, signal.SIGKILL)
""",
        "limits the grader": """
    import os
    import resource
    resource.prlimit(os.getppid(), resource.RLIMIT_FSIZE, (0, 0))
""",
        "starts a process by multiprocessing": """
    import multiprocessing
    process = multiprocessing.get_context("spawn").Process(target=print)
    process.start()
    process.join()
""",
        LAST: BODY}


def cheating(body):
    """render.py in which integrate has this body, given as text."""
    made = without_body(1)
    raises = '    raise NotImplementedError("exercise 1: integrate")\n'
    assert made.count(raises) == 1
    return made.replace(raises, body)


@functools.cache
def cheated():
    """Verdicts of all cheats, in one process but for the last, which ends it."""
    *names, last = CHEATS
    verdicts = {}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        shutil.copy(ROOT / "render.py", Path(folder) / "planted.py")
        patch.setenv("PYTHONPATH", folder)
        patch.setenv("PYTHONSAFEPATH", "1")              # would keep child.py from finding asks.py
        for group in (names, [last]):
            contents = [cheating(CHEATS[name]).encode() for name in group]
            given, answers = exercise.ask(EXERCISES[1], contents, seed=0, seconds=300, quiet=True)
            for name, answer in zip(group, answers):
                verdicts[name] = exercise.judge_all(EXERCISES[1], given, answer)
    return verdicts


@pytest.mark.parametrize("name", CHEATS)
def test_who_does_not_calculate_has_no_points_and_is_told_why(name):
    before = exercise.project_files()
    verdicts = cheated()[name]
    assert exercise.project_files() == before
    said = verdicts[0].hint
    if name == "ends with the last claim":               # what came before is paid for
        assert exercise.points_of(verdicts) == 9
        assert verdicts[-1].hint.startswith("its process ended by itself (exit status 0)")
        return
    assert exercise.points_of(verdicts) == 0
    if "PYTHONPATH" in name:
        assert "No module named 'planted'" in said
    elif name != "says that it is right":
        assert "PermissionError: it may not" in said and "(render.py, line " in said
    if "the original" in name or "by its folder" in name:
        assert f"open {ROOT / 'render.py'}" in said


def test_a_loop_without_end_is_ended():
    content = cheating("    while True:\n        pass\n").encode()
    given, [answers] = exercise.ask(EXERCISES[1], [content], 0, seconds=6, quiet=True)
    verdicts = exercise.judge_all(EXERCISES[1], given, answers)
    assert exercise.points_of(verdicts) == 0
    assert verdicts[0].hint == "it was stopped after 6 s: does a loop ever end?"


def test_answers_may_be_anything():
    claim = EXERCISES[1].CLAIMS[0]
    given = claim.given(torch.Generator().manual_seed(0))
    for answer in (None, 3, "yes", [], {}, {"occupancy": None}, {"occupancy": "all"},
                   {"occupancy": torch.zeros(0)}, {"occupancy": torch.full((5,), torch.nan)},
                   {"occupancy": torch.zeros(5, dtype=torch.complex64)}):
        assert exercise.judge(claim, given, {"answer": answer})


def test_an_answer_that_is_no_tensor_file_is_never_loaded(tmp_path):
    (tmp_path / "answer.pt").write_bytes(b"cos\nsystem\n(S'echo'\ntR.")
    assert "stopped" in exercise.read_answer(tmp_path / "answer.pt", "")
    torch.save({"answer": Path("x")}, tmp_path / "answer.pt")      # a class, not a plain value
    assert "neither tensors" in exercise.read_answer(tmp_path / "answer.pt", "")["stopped"]
    torch.save({"answer": [torch.zeros(1).expand(10**9, 10**9)]}, tmp_path / "answer.pt")
    assert "too large" in exercise.read_answer(tmp_path / "answer.pt", "")["stopped"]
    twice = [0]
    for _ in range(40):
        twice = [twice, twice]
    words = "x" * 10**6
    for answer in (twice, {"names": [words] * 20}, {words + str(i): 0 for i in range(20)}):
        torch.save({"answer": answer}, tmp_path / "answer.pt")
        assert "too large" in exercise.read_answer(tmp_path / "answer.pt", "")["stopped"]
    torch.save({"stopped": 3}, tmp_path / "answer.pt")
    assert exercise.read_answer(tmp_path / "answer.pt", "") == {"stopped": "3"}
    assert exercise.read_answer(tmp_path / "none.pt", "why") == {"stopped": "why"}


def test_a_folder_that_is_too_deep_to_be_removed_stays_and_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(exercise.tempfile, "tempdir", str(tmp_path))
    with exercise.passing_folder() as folder:
        deep = folder
        for _ in range(1200):
            deep = deep / "a"
            deep.mkdir()
    while deep != tmp_path:
        deep.rmdir()
        deep = deep.parent


def test_an_error_message_cannot_talk_to_the_terminal():
    one = EXERCISES[1]
    answers = [{"stopped": "ValueError: \033[2J10 of 10 points\n"}] * len(one.CLAIMS)
    given = [None] * len(one.CLAIMS)
    for verdict in exercise.judge_all(one, given, answers):
        assert verdict.hint.isprintable() and verdict.points == 0


# ---- The commands --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A clone: what a lecturer has, without other pictures and history."""
    root = tmp_path_factory.mktemp("clone")
    for name in exercise.COPIED:
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "tests", root / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "docs").mkdir()
    for figure in exercise.FIGURES.values():
        shutil.copy(ROOT / "docs" / figure, root / "docs")
    return root


def test_where_a_file_of_the_project_changes_meanwhile_nothing_is_judged(project):
    """torch writes with C code, which does not ask the fence."""
    copied = run(project, 1, "--out", "vandal")
    assert copied.returncode == 0
    victim = project / "tests" / "exercises" / "common.py"
    content = cheating(f"    torch.save(density, {str(victim)!r})\n    return 0, 0, 0\n")
    (project / "vandal" / "render.py").write_text(content)
    done = run(project, 1, "--check", "vandal")
    assert done.returncode == 2 and "points" not in done.stdout
    assert f"{victim} has changed while a solution ran" in done.stderr
    shutil.copy(exercise.HERE / "exercises" / "common.py", victim)
    # Of a class, those who come before are graded, and nobody after.
    shutil.copytree(project / "vandal", project / "before")
    (project / "before" / "render.py").unlink()
    done = run(project, 1, "--grade", "before", "vandal", "before/../before")
    assert done.returncode == 2
    assert f"{victim} has changed while a solution ran" in done.stderr
    assert [line.split(",")[0] for line in done.stdout.splitlines()] == ["folder", "before"]
    shutil.copy(exercise.HERE / "exercises" / "common.py", victim)


def run(project, *words):
    """A command as it is typed, but for the time that a solution may take on a busy machine."""
    command = [sys.executable, "tests/exercise.py", *map(str, words), "--limit", "500"]
    environment = dict(os.environ, PYTHONIOENCODING="utf8:strict")
    return subprocess.run(command, cwd=project, capture_output=True, encoding="utf8",
                          env=environment, timeout=600)


def test_byte_code_that_a_solution_has_left_is_not_read(project, tmp_path):
    source = project / "tests" / "exercises" / "integrate.py"
    stat = source.stat()
    other = tmp_path / "integrate.py"                    # of the same size and time, as caches want
    other.write_text('raise SystemExit("planted")'.ljust(stat.st_size))
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    planted = py_compile.compile(str(other), importlib.util.cache_from_source(str(source)))
    done = subprocess.run([sys.executable, "-c", "import exercises"], cwd=project / "tests",
                          capture_output=True, text=True)
    assert done.stderr == "planted\n"                    # it would be read
    done = run(project)
    assert done.returncode == 0 and "planted" not in done.stderr
    Path(planted).unlink()


def test_three_commands_from_a_clone_to_red_and_to_green(project):
    made = run(project, 1, "--out", "mine")
    assert made.returncode == 0
    assert "python tests/exercise.py 1 --check mine" in made.stdout.replace("\\", "/")
    assert made.stdout.strip() == (project / "mine" / "TASK.md").read_text().strip()
    red = run(project, 1, "--check", "mine")
    assert red.returncode == 1
    lines = red.stdout.splitlines()
    assert len(lines) <= 12
    assert lines[1].split()[:2] == ["NO", "0/2"] and lines[-2] == "0 of 10 points"
    shutil.copy(ROOT / "render.py", project / "mine")
    green = run(project, 1, "--check", "mine")
    assert green.returncode == 0, green.stderr
    lines = green.stdout.splitlines()
    assert lines[1].split()[:2] == ["yes", "2/2"] and lines[-2] == "10 of 10 points"
    assert iio.imread(project / "mine" / "exercise-01.png").shape[:2] == (450, 900)


def test_the_list_has_a_line_for_everything_that_one_wants_to_know(capsys):
    exercise.main([])
    printed = capsys.readouterr().out
    for number, one in EXERCISES.items():
        begin = printed.index(f"\n{number:2d}  {one.TITLE}")
        entry = printed[begin:].split("\n\n")[0]
        assert one.FILE in entry and f"{one.MINUTES} minutes" in entry
        assert f"{exercise.lines_to_write(one)} lines" in entry
        assert all(line.strip() in entry for line in one.EQUATION.splitlines())
        assert all(name in entry for name in one.WRITE)


def test_a_number_alone_says_what_is_to_be_done(capsys):
    exercise.main(["3"])
    assert capsys.readouterr().out == exercise.sheet(EXERCISES[3], "FOLDER") + "\n"


def test_all_makes_every_exercise_and_grade_a_table_of_them(tmp_path, capsys):
    exercise.main(["--all", str(tmp_path / "class")])
    folders = sorted(path.name for path in (tmp_path / "class").iterdir())
    assert folders == [f"exercise-{number:02d}" for number in NUMBERS]
    anna, ben = tmp_path / "anna", tmp_path / "ben"
    for name in ("exercise-01", "exercise-07"):
        shutil.copytree(tmp_path / "class" / name, anna / name)
    shutil.copytree(tmp_path / "class" / "exercise-01", ben)
    # Anna writes over what Ben has handed in, by C code, which does not ask the fence.
    spoils = f"\ntorch.save(torch.zeros(1), {str(ben / 'render.py')!r})\n"
    (anna / "exercise-01" / "render.py").write_text(text_of(1) + spoils)
    right, wrong, words = EXERCISES[7].WRONG[0]
    (anna / "exercise-07" / "diffusion.py").write_text(text_of(7).replace(right, wrong))
    capsys.readouterr()
    exercise.main(["--grade", str(anna), str(ben), "--limit", "500"])
    heading, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert heading == ["folder", *map(str, NUMBERS), "sum", "remarks"]
    first, second = [dict(zip(heading, row)) for row in rows]
    assert (first["1"], first["7"], first["2"], first["sum"]) == ("10", "8", "", "18")
    assert "1: as published" in first["remarks"] and words in first["remarks"]
    assert "7: as published" not in first["remarks"]
    assert (second["1"], second["sum"], second["remarks"]) == ("0", "0", "1: not written yet")
    assert b"integrate" not in (ben / "render.py").read_bytes()


def test_what_ends_the_grading_of_one_file_is_remarked_and_is_not_the_end(monkeypatch):
    monkeypatch.setattr(exercise, "SECONDS_AROUND", -499.9)
    points, remarks = exercise.grade_apart(1, b"", 0, seconds=500)
    assert points == 0 and remarks == ["grading it ended: it was stopped after 0.1 s"]
    monkeypatch.setattr(exercise, "SECONDS_AROUND", 100)
    for program, status in (("false", 1), ("echo", 0)):  # it ends, or prints something else
        monkeypatch.setattr(sys, "executable", shutil.which(program))
        ended = f"grading it ended: exit status {status}"
        assert exercise.grade_apart(1, b"", 0, 500) == (0, [ended])


@pytest.fixture
def hand_outs(tmp_path, monkeypatch):
    """Where exercises 1 and 2 are handed out; commands are typed there."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        exercise.write_exercise(EXERCISES[number], f"exercise-{number:02d}")
    return tmp_path


def remarks_of(capsys, *words):
    """Remarks of one student's folder where no solution is run."""
    exercise.main(["--grade", *words])
    heading, row = csv.reader(io.StringIO(capsys.readouterr().out))
    assert row[heading.index("sum")] == "0"
    return row[-1]


def test_a_folder_of_another_exercise_is_refused(hand_outs, capsys):
    """render.py of exercise 2 has the published solution of exercise 1 in it."""
    with pytest.raises(BadInput, match="exercise-02 is a folder of exercise 2, .* of exercise 1"):
        exercise.main(["1", "--check", "exercise-02"])
    (hand_outs / "anna").mkdir()
    shutil.move("exercise-02", "anna/exercise-01")
    said = remarks_of(capsys, "anna")
    assert said.startswith("1: anna") and "is a folder of exercise 2" in said.replace("\\", "/")
    assert exercise.number_on_sheet("anna") is None
    (hand_outs / "anna" / "TASK.md").write_bytes(b"# Exercise 2: \xff" + 10**6 * b"x")
    assert exercise.number_on_sheet("anna") == 2


def test_links_and_large_files_are_refused_by_name(hand_outs, capsys):
    render = hand_outs / "exercise-01" / "render.py"
    render.write_bytes(2**21 * b"#")
    assert "render.py is too large" in remarks_of(capsys, "exercise-01")
    render.unlink()
    assert "no render.py there" in remarks_of(capsys, "exercise-01")
    (hand_outs / "anna").mkdir()
    try:
        render.symlink_to(ROOT / "render.py")
        (hand_outs / "anna" / "exercise-02").symlink_to(hand_outs / "exercise-02")
    except OSError:
        pytest.skip("no links can be made here")
    assert "render.py is a link" in remarks_of(capsys, "exercise-01")
    assert "exercise-02 is a link" in remarks_of(capsys, "anna").replace("\\", "/")
    with pytest.raises(BadInput, match="render.py is a link, which is not followed"):
        exercise.main(["1", "--check", "exercise-01"])


def test_a_folder_whose_name_is_no_utf_8_is_printed_with_backslashes(project):
    name = os.fsdecode(b"J\xfcrgen")
    try:
        (project / name / "exercise-01").mkdir(parents=True)
    except OSError:
        pytest.skip("no such name can be made here")
    done = run(project, "--grade", name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("J\\udcfcrgen,0,")


def test_the_published_solution_is_recognized_but_not_another_one():
    one = EXERCISES[4]
    assert exercise.is_as_published(one, text_of(4).encode())
    other_words = text_of(4).replace("# before it is enlarged", "# first")
    assert exercise.is_as_published(one, other_words.encode())
    assert not exercise.is_as_published(one, with_bodies(4, one.UNUSUAL).encode())
    assert not exercise.is_as_published(one, b"def broken(:")
    assert not exercise.is_as_published(one, b"\xff\xfe")


@pytest.mark.parametrize("words, said", [
    (["14", "--out", "new"], "there is no exercise 14, only 1 to 13"),
    (["--out", "new"], "which exercise?"),
    (["1", "--out", "full"], "is there already, and not empty"),
    (["1", "--check", "nowhere"], "no render.py there"),
    (["1", "--all", "new"], "--all makes all of them"),
    (["1", "--check", "full", "--limit", "nan"], "--limit must be between 1 and 3600"),
    (["1", "--check", "full", "--seed", "-1"], "--seed must be between 0 and 2147483647"),
    (["--grade", "full"], "no exercise there"),
    (["--grade", "nowhere"], "no such folder"),
    (["1", "--chek", "full"], "did you mean --check?")])
def test_what_cannot_be_done_is_said_before_anything_is_written(words, said, tmp_path,
                                                                monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "work.txt").write_text("of a day")
    with pytest.raises(BadInput, match=said.replace("?", r"\?")):
        exercise.main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
