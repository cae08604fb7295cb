"""Exercise 11: one Gauss-Newton step of the pose solver (App. B.1)."""
import torch

from .common import Claim, Picture, compare, flaw

TITLE = "a Gauss-Newton step towards a pose"
PAPER = "App. B.1; Levenberg-Marquardt"
EQUATION = """\
g = J^T r / K        H = J^T J / K        d = -(H + mu I)^-1 g
mu = floor^2 + error / K^2 + eps trace(H)        error = |r|^2"""
FILE = "autodecoder.py"
WRITE = ("gauss_newton_step", "error_gradient")
TAKEN_OUT = ()
CHANGED = ()
MINUTES = 30
TASK = """\
residual_and_jacobian gives r and J, move makes a step d; K points have 2 K numbers r. eps is
torch.finfo(x.dtype).eps. error and mu are those of the pose that is given, before the step. After
it rho is clamped into [0, rho_max]. error_gradient is g alone, which the last step needs, too.
A NamedTuple is made anew: ScaledPose(R, rho, u)."""

SIGN = "d has a minus: the step leads downhill, against the gradient"
PER_POINT = "g and H are both divided by K, the number of points: mu then means the same for any K"
NO_MU = "mu I is missing: without it a step along what the points do not show may be endless"
CLAMP = "after the step rho is clamped into [0, rho_max]: at a negative one the camera is behind"
FLOOR = "mu contains the square of floor"
ERROR_MU = "mu contains error / K^2: poor points are believed less"
MU_IS_FAR = ("a step is judged with your own mu, right or wrong, but not where it is more than 100 "
             "times too large or too small, as here")
ERROR_IS_FAR = ("mu is judged with your own error, right or wrong, if only it is (B,), and neither "
                "100 times too large nor too small: it is not")
ONE_STEP_LATE = "error is that of the pose that is given, before the step"


# ---- The step, one object at a time, in float64 --------------------------------------------------
def seen_from(R, rho, u, Y):
    """Where points (K, 3) are seen: see `see` in autodecoder.py."""
    Z = Y @ R.T
    return (rho * Z[:, :2] + u) / (1 + rho * Z[:, 2:])


def turned(w):
    """The rotation that `move` makes of a small turn w: Cayley's, of w / 2."""
    x, y, z = (w / 2).unbind()
    o = torch.zeros_like(x)
    cross = torch.stack([o, -z, y, z, o, -x, -y, x, o]).view(3, 3)
    return torch.eye(3).to(w) + 2 * (cross + cross @ cross) / (1 + (w / 2).square().sum())


def by_hand(given, sign=-1, per_point=True, damped=True, floor_power=2, with_error=True, own=None):
    """R, rho, u after the step; error, mu and g before it: (B, ...) each. J by autograd.

    own  a student's answer, whose error and mu are taken, right or wrong: see is_near
    """
    rows = []
    for b in range(len(given["Y"])):
        R, rho, u, Y, x = (given[name][b].double() for name in ("R", "rho", "u", "Y", "x"))
        K = len(Y)

        def residual(d):
            moved = seen_from(turned(d[:3]) @ R, rho + d[3:4], u + d[4:], Y)
            return (moved - x).flatten()

        zero = torch.zeros(6, dtype=torch.float64)
        r, J = residual(zero), torch.autograd.functional.jacobian(residual, zero)
        divisor = K if per_point else 1
        g, H = J.T @ r / K, J.T @ J / divisor
        error = r.square().sum() if own is None else own["error"][b].double()
        mu = given["floor"] ** floor_power + torch.finfo(torch.float32).eps * H.trace()
        if with_error:
            mu = mu + error / K**2
        curvature = mu if own is None else own["mu"][b, 0, 0].double()
        eye = torch.eye(6, dtype=torch.float64)
        d = sign * torch.linalg.solve(H + curvature * eye * damped, g)
        rho = (rho + d[3:4]).clamp(min=0).minimum(given["rho_max"][b].double())
        rows.append((turned(d[:3]) @ R, rho, u + d[4:], error, mu.view(1, 1), g))
    names = ("R", "rho", "u", "error", "mu", "g")
    return {name: torch.stack(values) for name, values in zip(names, zip(*rows))}


def is_near(own, right):
    """Whether a student's error or mu, where it is wrong, may yet stand in for the right one.

    It may within a factor of 100: with an endless mu it would be right not to step at all, and of
    an endless error nothing else would be seen in mu.
    """
    if flaw(own, right.shape):
        return False
    return bool((own > right / 100).all() and (own < right * 100).all())


def step(autodecoder, given):
    """Asks for g and for one step; or, with n_steps, for as many in a row."""
    pose = autodecoder.ScaledPose(given["R"], given["rho"], given["u"])
    answer = {}
    if given["n_steps"] == 0:
        answer["g"] = autodecoder.error_gradient(pose, given["Y"], given["x"])
    for _ in range(given["n_steps"]):
        pose, error, mu = autodecoder.gauss_newton_step(pose, given["Y"], given["x"],
                                                        given["rho_max"], given["floor"])
        answer |= {"error": error, "mu": mu, "R": pose.R, "rho": pose.rho, "u": pose.u}
    return answer


def make(generator, floor, n_steps=1, noise=0.02, off=0.25, K=12):
    """What is given: points, where they are seen from a true pose, and a pose that is off."""
    B = 3
    Y = torch.randn(B, K, 3, generator=generator)
    Y = Y / Y.norm(dim=-1, keepdim=True) * torch.rand(B, K, 1, generator=generator)
    R, _ = torch.linalg.qr(torch.randn(B, 3, 3, generator=generator))
    R = R * torch.linalg.det(R)[:, None, None]
    rho = 0.2 + 0.1 * torch.rand(B, 1, generator=generator)
    u = 0.1 * torch.randn(B, 2, generator=generator)
    x = torch.stack([seen_from(R[b], rho[b], u[b], Y[b]) for b in range(B)])
    x = x + noise * torch.randn(B, K, 2, generator=generator)
    turn = off * torch.randn(B, 3, generator=generator)
    start = torch.stack([turned(turn[b]) @ R[b] for b in range(B)])
    return {"Y": Y, "x": x, "R": start, "rho": rho + 0.05, "u": u + 0.03, "floor": floor,
            "rho_max": torch.full((B, 1), 0.8), "n_steps": n_steps, "right": R}


# ---- What is asked -------------------------------------------------------------------------------
def a_gradient(generator):
    """No step: the gradient alone."""
    return make(generator, 0.05, n_steps=0)


def judge_gradient(given, answer):
    """Against autograd; factors of 2 and K are the mistakes that do not show in a picture."""
    right = by_hand(given)["g"]
    mistakes = [(right * 12, "divided by K: the mean over points, and mu means the same for any K"),
                (-right, "g itself has no minus; d has"), (2 * right, "g is half of the gradient "
                 "of the mean |r|^2: J^T r / K"), (right / 2, "by K, not by 2 K")]
    return compare(answer["g"], right, "g = J^T r / K, (B, 6)", mistakes, 1e-3)


def strong_floor(generator):
    """mu is of the size of H: whether it is there is seen at once."""
    return make(generator, 0.3)


def judge_step(given, answer):
    """All three of the pose's parts, each against the same mistakes; with the student's own mu."""
    if answer["mu"].shape != (3, 1, 1) or not answer["mu"].min() > 0:
        return "mu is (B, 1, 1), and positive"
    if not is_near(answer["mu"], by_hand(given)["mu"]):
        return MU_IS_FAR
    right = by_hand(given, own=answer)
    named = [(by_hand(given, sign=1, own=answer), SIGN), (by_hand(given, damped=False), NO_MU),
             (by_hand(given, per_point=False, own=answer), PER_POINT)]
    hint = "solve (H + mu I) d = -g, then move(pose, d)"
    for name in ("R", "u", "rho"):
        mistakes = [(wrong[name], words) for wrong, words in named]
        problem = compare(answer[name], right[name], hint, mistakes, 2e-3)
        if problem:
            return problem
    return ""


def weak_floor(generator):
    """error / K^2 is larger than floor^2: both of them show in mu."""
    return make(generator, 0.02, noise=0.1)


def judge_mu(given, answer):
    """With the student's own error, right or wrong."""
    if not is_near(answer["error"], by_hand(given)["error"]):
        return ERROR_IS_FAR
    right = by_hand(given, own=answer)["mu"]
    mistakes = [(by_hand(given, floor_power=1, own=answer)["mu"], FLOOR),
                (by_hand(given, with_error=False, own=answer)["mu"], ERROR_MU),
                (by_hand(given, per_point=False, own=answer)["mu"], PER_POINT),
                (right[:, 0, 0], "mu is (B, 1, 1), to stand in front of a matrix of each object")]
    return compare(answer["mu"], right, "mu = floor^2 + error / K^2 + eps trace(H), (B, 1, 1)",
                   mistakes, 1e-3)


def judge_error(given, answer):
    right = by_hand(given)
    mistakes = [(right["error"] / 12, "the sum over points, not the mean"),
                (right["error"].sqrt(), "|r|^2, not |r|")]
    hint = f"error = |r|^2, (B,): {ONE_STEP_LATE}"
    return compare(answer["error"], right["error"], hint, mistakes, 1e-3)


def too_far(generator):
    """Object 0 is seen inside out, so that rho wants to be negative; 1 and 2 want to come nearer
    than rho_max allows."""
    given = make(generator, 0.001, noise=0.0, off=0.0)
    given["x"][0] = 1.5 * given["x"][0].mean(0) - 0.5 * given["x"][0]
    given["rho_max"][1:] = 0.9 * (given["rho"][1:] - 0.05)
    given["rho"][1:] = 0.8 * (given["rho"][1:] - 0.05)
    return given


def judge_clamp(given, answer):
    """Only that it stays inside, and moves: whether it is the right step is another claim."""
    rho = answer["rho"]
    if rho.shape != (3, 1):
        return f"rho is (B, 1), (3, 1) here, not {tuple(rho.shape)}"
    problem = flaw(rho, (3, 1))
    if problem:
        return f"rho: {problem}"
    if (rho < -1e-6).any() or (rho > given["rho_max"] + 1e-6).any():
        return CLAMP
    if not compare(rho, given["rho"], "no"):
        return "rho is the same after the step"
    if not rho.max() > 0:
        return "rho is 0 for every object, also where a step leads beyond rho_max"
    return ""


def eight_steps(generator):
    return make(generator, 3e-4, n_steps=8, noise=0.0, off=0.15, K=30)


def judge_converged(given, answer):
    """What it is all for. A step that is a little wrong gets there, too: hence one point."""
    hint = "eight steps from a pose some degrees off lead to the true one"
    return compare(answer["R"], given["right"], hint, tolerance=0.02)


CLAIMS = (
    Claim(2, "error_gradient is J^T r / K", a_gradient, step, judge_gradient),
    Claim(3, "the step solves (H + mu I) d = -g", strong_floor, step, judge_step),
    Claim(2, "mu = floor^2 + error / K^2 + eps trace(H)", weak_floor, step, judge_mu),
    Claim(1, "error is |r|^2 of the pose that is given", weak_floor, step, judge_error),
    Claim(1, "rho stays within 0 and rho_max", too_far, step, judge_clamp),
    Claim(1, "eight steps find the pose", eight_steps, step, judge_converged))


# ---- The picture: where the points are seen, step by step ----------------------------------------
def a_cube(generator):
    given = make(torch.Generator().manual_seed(4), 3e-4, noise=0.0, off=0.4)
    ends = torch.tensor([-0.6, 0.6])
    Y = torch.cartesian_prod(ends, ends, ends).repeat(3, 1, 1)
    x = torch.stack([seen_from(R, rho - 0.05, u - 0.03, points) for R, rho, u, points
                     in zip(given["right"], given["rho"], given["u"], Y)])
    return given | {"Y": Y, "x": x}


def steps_of_a_pose(autodecoder, given):
    pose = autodecoder.ScaledPose(given["R"], given["rho"], given["u"])
    seen = [autodecoder.see(pose, given["Y"])[2]]
    for _ in range(3):
        pose, _, _ = autodecoder.gauss_newton_step(pose, given["Y"], given["x"],
                                                   given["rho_max"], given["floor"])
        seen.append(autodecoder.see(pose, given["Y"])[2])
    return torch.stack(seen)[:, 0]


def draw(figure, given, answer):
    axes = figure.subplots()
    axes.scatter(*given["x"][0].T.numpy(), s=80, facecolors="none", edgecolors="black",
                 label="where they are seen")
    for number, points in enumerate(answer):
        axes.scatter(*points.T.numpy(), s=15, label=f"after {number} steps")
    middle = given["x"][0].mean(0).tolist()
    axes.set_xlim(middle[0] - 0.4, middle[0] + 0.9)      # to the right, the legend
    axes.set_ylim(middle[1] - 0.4, middle[1] + 0.4)
    axes.legend(fontsize=7, loc="center right")
    axes.set_title("the corners of a cube", fontsize=9)


PICTURE = Picture(a_cube, steps_of_a_pose, draw)


# ---- Solutions that are wrong, and what must be said of them; and one that is right -------------
WRONG = (
    ("d = -torch.linalg.solve(H + mu * eye, g)", "d = torch.linalg.solve(H + mu * eye, g)", SIGN),
    ("    H = J.mT @ J / K  ", "    H = J.mT @ J  ", PER_POINT),
    ("rho = moved.rho.clamp(min=0).minimum(rho_max)", "rho = moved.rho", CLAMP))


def step_by_least_squares(pose, Y, x, rho_max, floor):
    r, J = residual_and_jacobian(pose, Y, x)                             # noqa: F821
    K = x.shape[1]
    r, J = r / K**0.5, J / K**0.5
    error = K * (r * r).sum(-1)
    curvatures = J.square().sum((1, 2))                  # the trace of J^T J
    mu = floor**2 + error / K**2 + torch.finfo(x.dtype).eps * curvatures
    ridge = torch.diag_embed(mu.sqrt()[:, None].expand(-1, 6))
    stacked = torch.cat([J, ridge], 1)                   # |J d + r|^2 + mu |d|^2, all in one
    goal = torch.cat([-r, r.new_zeros(len(r), 6)], 1)
    d = torch.linalg.lstsq(stacked, goal[..., None]).solution[..., 0]
    pose = move(pose, d)                                                 # noqa: F821
    inside = torch.minimum(torch.relu(pose.rho), rho_max)
    return pose._replace(rho=inside), error, mu.view(-1, 1, 1)


def gradient_by_einsum(pose, Y, x):
    r, J = residual_and_jacobian(pose, Y, x)                             # noqa: F821
    return torch.einsum("bn,bni->bi", r, J) / Y.shape[1]


UNUSUAL = {"gauss_newton_step": step_by_least_squares, "error_gradient": gradient_by_einsum}


def no_step(pose, Y, x, rho_max, floor):
    return pose, torch.full((len(Y),), 0.01), torch.full((len(Y), 1, 1), 0.01)


def no_gradient(pose, Y, x):
    return torch.zeros(len(Y), 6)


CONSTANT = {"gauss_newton_step": no_step, "error_gradient": no_gradient}
