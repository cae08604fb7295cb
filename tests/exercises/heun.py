"""Exercise 9: EDM's sampler (EDM, Algorithm 2): Heun's step, and churn.

The denoiser remembers at which sigma it was called with which x. Without churn all of it can be
worked out. With churn, a denoiser that answers x itself leaves x alone, so that what changes is the
fresh noise and nothing else.
"""
import math

import torch

from .common import Claim, Picture, compare, flaw

TITLE = "the sampler: Heun's step, with churn"
PAPER = "App. C.2; EDM, Algorithm 2"
EQUATION = """\
gamma = min(S_churn / N, sqrt(2) - 1) if S_min <= sigma_i <= S_max, else 0
sigma_hat = (1 + gamma) sigma_i
x_hat = x_i + sqrt(sigma_hat^2 - sigma_i^2) S_noise n                   n ~ N(0, 1)
d = (x_hat - D(x_hat; sigma_hat)) / sigma_hat
x_{i+1} = x_hat + (sigma_{i+1} - sigma_hat) d
if sigma_{i+1} > 0:
    d' = (x_{i+1} - D(x_{i+1}; sigma_{i+1})) / sigma_{i+1}
    x_{i+1} = x_hat + (sigma_{i+1} - sigma_hat) (d + d') / 2"""
FILE = "diffusion.py"
WRITE = ("edm_sampler",)
TAKEN_OUT = ()
CHANGED = ()
MINUTES = 35
TASK = """\
Below it stand sigma_steps(steps, sigma_min, sigma_max, rho), which gives sigma_0 ... sigma_{N-1}
and then 0, and fresh_noise(x, generator), for n: use both. x_0 is `noise` times sigma_0, in float64
from there on; return what is reached at sigma 0. D is called as denoise(x, sigma), sigma a
float. N is `steps`. Where gamma is 0, n is not needed: whether it is drawn there is up to you."""

EULER = "that is Euler's step alone: Heun's takes the mean of the slopes at both ends"
HALF = "the mean of the two slopes is half of their sum"
AT_HAT = "the second slope is that at sigma_{i+1}, of the x that Euler's step led to"
S_NOISE = "the fresh noise lacks its factor S_noise"
ROOT = "variances add up: the fresh noise has the deviation sqrt(sigma_hat^2 - sigma_i^2)"
CAP = "gamma is at most sqrt(2) - 1, however large S_churn / N"
BOUNDS = "churn only where S_min <= sigma_i <= S_max"
FROM_SIGMA = "with churn the step begins at sigma_hat: (sigma_{i+1} - sigma_hat) d"
LAST = "there is no slope at sigma 0: the last step is Euler's alone, 2 N - 1 calls of D in all"


# ---- Algorithm 2, with switches for mistakes -----------------------------------------------------
def schedule(given):
    """sigma_0 ... sigma_{N-1}, 0 as plain numbers."""
    n, rho = given["steps"], 7
    high, low = given["sigma_max"] ** (1 / rho), given["sigma_min"] ** (1 / rho)
    return [(high + i / (n - 1) * (low - high)) ** rho for i in range(n)] + [0.0]


def gamma_of(given, sigma, cap=math.sqrt(2) - 1, bounds=True):
    """How far sigma is raised. Mistakes: no cap, no bounds."""
    if bounds and not given["S_min"] <= sigma <= given["S_max"]:
        return 0.0
    return min(given["S_churn"] / given["steps"], cap)


def answer_of(x, sigma):
    """The denoiser of the asks below: a curve, so that the two slopes differ."""
    return torch.tanh(x) / (1 + sigma)


def without_churn(given, second="next", share=0.5):
    """Where the steps lead. Mistakes: no second slope, one that is of sigma_i, their sum."""
    sigmas = schedule(given)
    x = given["noise"].double() * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        d = (x - answer_of(x, sigma)) / sigma
        euler = x + (sigma_next - sigma) * d
        if sigma_next == 0 or second == "none":
            x = euler
            continue
        at = sigma_next if second == "next" else sigma
        d_next = (euler - answer_of(euler, at)) / at
        x = x + (sigma_next - sigma) * (d + d_next) * share
    return x


# ---- What is asked -------------------------------------------------------------------------------
def sampler(diffusion, given):
    """Asks for samples, with a denoiser that remembers its calls."""
    calls = {"x": [], "sigma": []}

    def denoise(x, sigma):
        calls["x"].append(x.clone())
        calls["sigma"].append(float(sigma))
        return x.clone() if given["leaves_x_alone"] else torch.tanh(x) / (1 + sigma)

    names = ("S_churn", "S_min", "S_max", "S_noise", "sigma_min", "sigma_max")
    settings = {name: given[name] for name in names}
    ends = []
    for chance in (1, 2):                                # of what does not ask the generator
        torch.manual_seed(chance)
        generator = torch.Generator().manual_seed(given["seed"])
        ends.append(diffusion.edm_sampler(denoise, given["noise"], given["steps"],
                                          generator=generator, **settings))
    n = len(calls["x"]) // 2                             # calls of the first time
    return {"end": ends[0], "again": ends[1], "x": torch.stack(calls["x"][:n]),
            "sigma": calls["sigma"][:n]}


def make(generator, shape, steps, S_churn, leaves_x_alone):
    """What is given: noise, and settings that are not the defaults."""
    numbers = torch.rand(4, generator=generator).tolist()
    return {"noise": torch.randn(shape, generator=generator), "steps": steps, "S_churn": S_churn,
            "S_min": 0.1, "S_max": 20.0, "S_noise": 1.2 + 0.2 * numbers[0],
            "sigma_min": 0.01 + 0.01 * numbers[1], "sigma_max": 40.0 + 20 * numbers[2],
            "leaves_x_alone": leaves_x_alone, "seed": int(1e6 * numbers[3])}


def no_churn(generator):
    """Nine steps, of a denoiser that is a curve."""
    return make(generator, (2, 3, 2, 2, 2), 9, 0, leaves_x_alone=False)


def judge_start(given, answer):
    """By the first call of D."""
    right = given["noise"].double() * given["sigma_max"]
    hint = "the first x is the noise times sigma_0 = sigma_max"
    mistakes = [(given["noise"].double(), "noise has deviation 1; the first x sigma_max")]
    if answer["x"].dtype != torch.float64:
        return "in float64: noise.double(); at sigma 80 float32 rounds what is seen at 0.002"
    return compare(answer["x"][0], right, hint, mistakes, 1e-9)


def judge_heun(given, answer):
    """By where it ends: each mistake in a step ends elsewhere."""
    mistakes = [(without_churn(given, "none"), EULER), (without_churn(given, share=1), HALF),
                (without_churn(given, "here"), AT_HAT)]
    hint = "without churn x_hat is x_i, and each step as above: compare the first by hand, D = 0"
    return compare(answer["end"], without_churn(given), hint, mistakes, 1e-6)


def judge_last(given, answer):
    """By the calls of D: two in each step, but for the last."""
    if flaw(answer["end"], given["noise"].shape) or min(answer["sigma"]) == 0:
        return LAST
    n_calls = len(answer["sigma"])
    if n_calls != 17:
        return f"9 steps call D 17 times, twice each but for the last, not {n_calls} times"
    smallest = [given["sigma_min"], given["sigma_min"]]
    if [round(sigma, 6) for sigma in answer["sigma"][-2:]] != [round(s, 6) for s in smallest]:
        return "the last two calls of D are at sigma_min: the second slope, then the last step"
    return ""


def strong_churn(generator):
    """S_churn / N is 0.8, more than the cap."""
    return make(generator, (40, 500), 20, 16.0, leaves_x_alone=True)


def weak_churn(generator):
    """S_churn / N is 0.25, less than the cap; D bends the way."""
    return make(generator, (4, 50), 8, 2.0, leaves_x_alone=False)


def levels_called(given, cap=math.sqrt(2) - 1, bounds=True):
    """The sigma of all calls of D, in order."""
    sigmas = schedule(given)
    levels = []
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        levels.append(sigma * (1 + gamma_of(given, sigma, cap, bounds)))
        if sigma_next > 0:
            levels.append(sigma_next)
    return torch.tensor(levels)


def judge_levels(given, answer):
    """By the sigma of all calls, whatever x was."""
    found = torch.tensor(answer["sigma"])
    mistakes = [(levels_called(given, cap=1e9), CAP), (levels_called(given, bounds=False), BOUNDS),
                (levels_called(given, 1e9, False), f"{CAP}; and {BOUNDS}"),
                (levels_called(given, cap=0.0), "churn raises sigma: D is asked at sigma_hat")]
    hint = "D is called at sigma_hat, then at sigma_{i+1}, and so on"
    if len(found) == given["steps"]:                     # Euler's calls are another claim's matter
        right = schedule(given)[:-1]
        right = torch.tensor([sigma * (1 + gamma_of(given, sigma)) for sigma in right])
        return compare(found, right, hint, tolerance=1e-6)
    return compare(found, levels_called(given), hint, mistakes, 1e-6)


def judge_noise(given, answer):
    """D leaves x alone: it changes only by fresh noise, whose deviation 20,000 numbers tell.

    By the sigma_hat that D was called at, right or wrong: that is another claim's matter.
    """
    sigmas, hats, x = schedule(given), answer["sigma"], answer["x"]
    calls = 1 if len(hats) == given["steps"] else 2      # a step, but for the last
    if len(hats) not in (given["steps"], 2 * given["steps"] - 1):
        return "D is called twice a step, at sigma_hat and at sigma_{i+1}, but for the last step"
    found, right, plain = [], [], []
    for i in range(1, given["steps"]):                   # sigma_0 is above S_max: no churn there
        k = calls * i
        found.append(float((x[k] - x[k - 1]).std()))
        variance = max(hats[k]**2 - sigmas[i]**2, 0.0)
        right.append(given["S_noise"] * math.sqrt(variance))
        plain.append(given["S_noise"] * (hats[k] - sigmas[i]))
    found, right, plain = torch.tensor(found), torch.tensor(right), torch.tensor(plain)
    if not found.max() > 1e-6 or not right.max() > 1e-6:
        return "with S_churn 16 of 20 steps there is churn: sigma goes up, and fresh noise comes in"
    hint = "where sigma_hat > sigma_i, sqrt(sigma_hat^2 - sigma_i^2) S_noise n comes in"
    mistakes = [(right / given["S_noise"], S_NOISE), (plain, ROOT)]
    problem = compare(found, right, hint, mistakes, 0.04)
    if not problem and not torch.equal(answer["end"], answer["again"]):
        problem = "n is not drawn from generator: use fresh_noise(x, generator)"
    return problem


def judge_from_hat(given, answer):
    """From each first call of a step to its second: Euler's step, from sigma_hat."""
    sigmas = schedule(given)
    x, found, right, wrong = answer["x"], [], [], []
    if len(x) != 2 * given["steps"] - 1:
        return "D is called twice in each step but the last: the second call is where Euler leads"
    if not x[0].std() > 1e-3:
        return "the first x that D is shown is the same everywhere, and not noise"
    for i in range(given["steps"] - 1):
        hat = sigmas[i] * (1 + gamma_of(given, sigmas[i]))
        d = (x[2 * i] - answer_of(x[2 * i], hat)) / hat
        found.append(x[2 * i + 1])
        right.append(x[2 * i] + (sigmas[i + 1] - hat) * d)
        wrong.append(x[2 * i] + (sigmas[i + 1] - sigmas[i]) * d)
    hint = "Euler's step leads from x_hat to x_hat + (sigma_{i+1} - sigma_hat) d"
    return compare(torch.stack(found), torch.stack(right), hint,
                   [(torch.stack(wrong), FROM_SIGMA)], 1e-6)


CLAIMS = (
    Claim(1, "it begins with noise of deviation sigma_max, in float64", no_churn, sampler,
          judge_start),
    Claim(3, "without churn: Heun's steps, along the mean of two slopes", no_churn, sampler,
          judge_heun),
    Claim(1, "the last step, to sigma 0, is Euler's", no_churn, sampler, judge_last),
    Claim(2, "churn raises sigma as gamma says", strong_churn, sampler, judge_levels),
    Claim(2, "churn's noise has the deviation it should have", strong_churn, sampler, judge_noise),
    Claim(1, "with churn a step leads from sigma_hat to sigma_{i+1}", weak_churn, sampler,
          judge_from_hat))


# ---- The picture: from noise to a world whose best denoiser is a formula -------------------------
def a_bell(generator):
    return {"noise": torch.randn(2000, generator=torch.Generator().manual_seed(0))}


def paths(diffusion, given):
    """Samples of a world of numbers y ~ N(1, 0.5^2): a few paths with churn, many ends without."""
    seen, levels = [], []

    def denoise(x, sigma):
        seen.append(x[:12].clone())
        levels.append(float(sigma))
        return 1 + (x - 1) * 0.25 / (0.25 + sigma**2)

    generator = torch.Generator().manual_seed(0)
    diffusion.edm_sampler(denoise, given["noise"][:12], 40, S_churn=100, generator=generator)
    answer = {"x": torch.stack(seen), "sigma": list(levels)}
    return answer | {"end": diffusion.edm_sampler(denoise, given["noise"], 8, S_churn=0)}


def draw(figure, given, answer):
    upper, lower = figure.subplots(2, 1)
    upper.plot(answer["sigma"], answer["x"].numpy(), linewidth=0.7)
    upper.set_xscale("log")
    upper.set_yscale("symlog", linthresh=3)
    upper.set_xlim(120, 0.002)
    upper.set_ylim(-400, 400)
    upper.set_title("12 samples as sigma falls; churn may draw other noise", fontsize=9)
    end = answer["end"]
    lower.hist(end.numpy(), bins=60, range=(-1, 3), density=True)
    y = torch.linspace(-1, 3, 100)
    bell = torch.exp(-2 * (y - 1)**2) / (0.5 * math.sqrt(2 * math.pi))
    lower.plot(y.numpy(), bell.numpy(), color="black")
    lower.set_ylim(0, 1.5)
    lower.set_title(f"ends of 8 steps, which are too few: deviation {float(end.std()):.2f}; black: "
                    "0.50", fontsize=9)


PICTURE = Picture(a_bell, paths, draw)


# ---- Solutions that are wrong, and what must be said of them; and one that is right -------------
WRONG = (
    ("added * S_noise * fresh_noise(x_hat, generator)", "added * fresh_noise(x_hat, generator)",
     S_NOISE),
    ("x_next = x_hat + (sigma_next - sigma_hat) * (slope + slope_next) / 2", "pass", EULER),
    ("gamma = min(S_churn / steps, math.sqrt(2) - 1)", "gamma = S_churn / steps", CAP))


def sampler_of_two_points(denoise, noise, steps, S_churn=40, S_min=0.05, S_max=50, S_noise=1.003,
                          sigma_min=0.002, sigma_max=80, rho=7, generator=None):
    levels = sigma_steps(steps, sigma_min, sigma_max, rho)                       # noqa: F821
    x = levels[0] * noise.to(torch.float64)
    for i in range(steps):
        here, there = float(levels[i]), float(levels[i + 1])
        churns = S_min <= here <= S_max
        raised = here + here * churns * min(S_churn / steps, 2 ** 0.5 - 1)
        variance = (raised - here) * (raised + here)
        if variance > 0:
            x = x + S_noise * variance ** 0.5 * fresh_noise(x, generator)        # noqa: F821
        ratio = there / raised
        guess = denoise(x, raised)
        end = torch.lerp(guess, x, ratio)                # the share of what is left of the noise
        if i + 1 < steps:
            second = (end - denoise(end, there)) / there
            end = 0.5 * (end + x + (there - raised) * second)
        x = end
    return x


UNUSUAL = {"edm_sampler": sampler_of_two_points}


def constant(denoise, noise, steps, S_churn=40, S_min=0.05, S_max=50, S_noise=1.003,
             sigma_min=0.002, sigma_max=80, rho=7, generator=None):
    return 0 * denoise(noise.double(), 1.0) + 0.5


CONSTANT = {"edm_sampler": constant}
