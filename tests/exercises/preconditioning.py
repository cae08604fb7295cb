"""Exercise 7: EDM's preconditioning (EDM, Table 1): four numbers for each noise level."""
import torch

from .common import Claim, Picture, compare, flaw

TITLE = "EDM's preconditioning"
PAPER = "App. B.2; EDM, Table 1"
EQUATION = """\
D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)
c_skip = sd^2 / (sigma^2 + sd^2)              c_in    = 1 / sqrt(sigma^2 + sd^2)
c_out  = sigma sd / sqrt(sigma^2 + sd^2)      c_noise = ln(sigma) / 4"""
FILE = "diffusion.py"
WRITE = ("preconditioning",)
TAKEN_OUT = ()
CHANGED = ()
MINUTES = 10
TASK = """\
sd is sigma_data, a number; sigma is a tensor of any shape. Return the four in the order c_skip,
c_out, c_in, c_noise. Before you begin: what must they be at sigma = 0.002, and at sigma = 80?
The ends of the curves in the picture tell whether you were right."""

ORDER = "the order is c_skip, c_out, c_in, c_noise"
NAMES = ("c_skip", "c_out", "c_in", "c_noise")


def by_hand(given):
    """The four of EDM's Table 1, in float64."""
    sigma, sd = given["sigma"].double(), given["sigma_data"]
    total = sigma**2 + sd**2
    return dict(zip(NAMES, (sd**2 / total, sigma * sd / total**0.5, total**-0.5, sigma.log() / 4)))


def ask(diffusion, given):
    answer = diffusion.preconditioning(given["sigma"], given["sigma_data"])
    return dict(zip(("c_skip", "c_out", "c_in", "c_noise"), answer))


def make(generator):
    """Noise levels from 0.005 to 50, and a sigma_data that is neither 0.5 nor 1."""
    sigma = (4.5 * (2 * torch.rand(12, generator=generator) - 1)).exp()
    return {"sigma": sigma, "sigma_data": 0.6 + 0.3 * float(torch.rand((), generator=generator))}


def judge_c_skip(given, answer):
    """The first of four that are judged alike: each mistake is another formula."""
    sigma, sd = given["sigma"].double(), given["sigma_data"]
    total = sigma**2 + sd**2
    hint = "c_skip is 1 where there is little noise, keep x, and 0 where there is nothing else"
    mistakes = [(sigma**2 / total, f"this is 1 - c_skip: {hint}"),
                (sd / total, "sd^2 stands above, not sd: c_skip must reach 1 at sigma 0"),
                (sd / total.sqrt(), "this is the root of c_skip")]
    return compare(answer["c_skip"], by_hand(given)["c_skip"], hint, mistakes)


def judge_c_out(given, answer):
    sigma, sd = given["sigma"].double(), given["sigma_data"]
    total = sigma**2 + sd**2
    hint = "c_out goes with sigma at little noise, and to sd where there is nothing else"
    mistakes = [(1 / total.sqrt(), f"this is c_in: {ORDER}"),
                (sigma * sd / total, "a root is missing: c_out = sigma sd / sqrt(sigma^2 + sd^2)"),
                (sigma / total.sqrt(), "sd is missing: c_out must reach the size of y, sd"),
                (sigma**2 * sd**2 / total, "this is c_out squared")]
    return compare(answer["c_out"], by_hand(given)["c_out"], hint, mistakes)


def judge_c_in(given, answer):
    sigma, sd = given["sigma"].double(), given["sigma_data"]
    total = sigma**2 + sd**2
    hint = "c_in times x has deviation 1, and x = y + sigma n has sqrt(sigma^2 + sd^2)"
    mistakes = [(sigma * sd / total.sqrt(), f"this is c_out: {ORDER}"),
                (1 / total, "a root is missing: variances add up, deviations are their roots"),
                (1 / (sigma + sd), "variances add up, deviations do not: sqrt(sigma^2 + sd^2)"),
                (1 / sigma, "y is in x, too, not only noise: sigma^2 + sd^2")]
    return compare(answer["c_in"], by_hand(given)["c_in"], hint, mistakes)


def judge_c_noise(given, answer):
    sigma = given["sigma"].double()
    hint = "c_noise = ln(sigma) / 4, the natural logarithm: -1.6 at 0.002, 1.1 at 80"
    mistakes = [(sigma.log(), "a quarter of it: ln(sigma) / 4"),
                (sigma.log10() / 4, "the natural logarithm, torch.log, not log10"),
                (sigma.log2() / 4, "the natural logarithm, torch.log, not log2")]
    return compare(answer["c_noise"], by_hand(given)["c_noise"], hint, mistakes)


def of_other_shapes(generator):
    """As the denoiser hands it over, (B, 1, 1, 1, 1), but for one axis more that is not 1."""
    given = make(generator)
    given["sigma"] = given["sigma"].view(4, 1, 3, 1, 1)
    return given


def judge_shapes(given, answer):
    """Whatever the numbers: each as sigma."""
    for name in NAMES:
        shape = tuple(getattr(answer[name], "shape", ()))
        if shape != (4, 1, 3, 1, 1):
            return f"sigma is (4, 1, 3, 1, 1), so {name} should be, too, and is {shape}"
        problem = flaw(answer[name], shape)
        if problem:
            return f"{name}: {problem}"
        if answer[name].std() < 1e-6:
            return f"{name} is the same at all noise levels"
    return ""


CLAIMS = (
    Claim(2, "c_skip: how much of x is kept", make, ask, judge_c_skip),
    Claim(3, "c_out: how far what is kept is from y", make, ask, judge_c_out),
    Claim(2, "c_in: the network is fed numbers of deviation 1", make, ask, judge_c_in),
    Claim(2, "c_noise: how it is told the noise level", make, ask, judge_c_noise),
    Claim(1, "each has the shape of sigma", of_other_shapes, ask, judge_shapes))


# ---- The picture: the four over the noise level -------------------------------------------------
def levels(generator):
    return {"sigma": torch.logspace(-2.7, 1.9, 100), "sigma_data": 0.5}


def draw(figure, given, answer):
    axes = figure.subplots()
    for name in NAMES:
        axes.plot(given["sigma"].numpy(), answer[name].numpy(), label=name)
    axes.set_xscale("log")
    axes.set_ylim(-2, 2.5)
    axes.set_xlabel("sigma")
    axes.set_title("from little noise to nothing else, sigma_data 0.5", fontsize=9)
    axes.legend(fontsize=8)


PICTURE = Picture(levels, ask, draw)


# ---- Solutions that are wrong, and what must be said of them; and one that is right -------------
WRONG = (
    ("c_skip = sigma_data**2 / total ", "c_skip = sigma**2 / total ", "this is 1 - c_skip"),
    ("c_out = sigma * sigma_data / total.sqrt() ", "c_out = sigma * sigma_data / total ",
     "a root is missing: c_out"),
    ("c_noise = sigma.log() / 4 ", "c_noise = sigma.log() ", "a quarter of it"))


def by_an_angle(sigma, sigma_data):
    angle = torch.atan2(sigma, torch.full_like(sigma, sigma_data))
    return (angle.cos() ** 2, sigma_data * angle.sin(), angle.cos() / sigma_data,
            sigma.pow(0.25).log())


UNUSUAL = {"preconditioning": by_an_angle}


def constants(sigma, sigma_data):
    return torch.full_like(sigma, 0.5), sigma * 0 + 0.4, sigma * 0 + 0.9, sigma * 0


CONSTANT = {"preconditioning": constants}
