"""Exercise 8: the loss of diffusion (EDM). Judged by what the denoiser was shown.

Random numbers may be drawn in any order, so no loss is expected: from the noisy x and the sigma
that the denoiser was called with, it is worked out what the loss should have been.
"""
import torch

from .common import Claim, Picture, compare, flaw

TITLE = "the loss of diffusion"
PAPER = "Sec. 3.3, App. B.2; EDM, Table 1"
EQUATION = """\
ln sigma ~ N(P_mean, P_std^2)        n ~ N(0, 1)        weight = (sigma^2 + sd^2) / (sigma sd)^2
loss = mean of weight(sigma) |D(y + sigma n; sigma) - y|^2"""
FILE = "diffusion.py"
WRITE = ("edm_loss",)
TAKEN_OUT = ()
CHANGED = ()
MINUTES = 20
TASK = """\
Each object of the batch gets a sigma of its own, and each of its numbers noise of its own. sd is
sigma_data. `denoise` is called as denoise(x, sigma), with x as y and sigma (B,). The mean is over
all objects and all their numbers. All that is random is drawn with torch.randn(shape,
generator=generator), in any order, so that a seed repeats it; .to(y) brings it to y's device."""

ONE_SIGMA = "each object has a sigma of its own: draw B of them, not one for the whole batch"
SQUARE = "the weight's denominator is squared: (sigma sd)^2"
NO_WEIGHT = "the weight is missing: without it large sigma would decide everything"
UNSCALED = "x = y + sigma n: the noise has to be multiplied by its object's sigma"
GENERATOR = ("not all that is random comes from `generator`: torch.randn(..., generator=generator) "
             "for sigma and for n")
TARGET = "D must answer y, the clean latent, not the noise"
NOISY_TARGET = "D must answer y, the clean latent, not x"
VARIANCE = "P_std is a deviation: ln sigma = P_mean + P_std times a normal number"
SAME_NOISE = "each number of an object has noise of its own: torch.randn(y.shape)"


def loss(diffusion, given):
    """Asks for a loss, with a denoiser that remembers what it was shown and learns one number."""
    y = given["y"]
    seen = {"x": [], "sigma": []}
    theta = torch.tensor(0.3, requires_grad=True)

    def denoise(x, sigma):
        seen["x"].append(x.detach().clone())
        seen["sigma"].append(torch.as_tensor(sigma).detach().clone())
        return theta * x + 0.1

    losses = []
    for seed, chance in given["seeds"]:
        torch.manual_seed(chance)                        # of what does not ask the generator
        generator = torch.Generator().manual_seed(seed)
        value = diffusion.edm_loss(denoise, y, given["sigma_data"], generator, **given["P"])
        losses.append(value)
    answer = {"loss": torch.stack([value.detach() for value in losses])}
    if given["first_only"]:
        [answer["gradient"]] = torch.autograd.grad(losses[0], theta)
        answer["x"] = torch.cat(seen["x"])
        answer["sigma"] = torch.cat([sigma.flatten() for sigma in seen["sigma"]])
        answer["sigma_axes"] = seen["sigma"][0].ndim
    return answer


def make(generator, n_objects, sides, seeds=((1, 2),)):
    """What is given: latents, sigma_data, and how sigma is distributed."""
    numbers = torch.rand(3, generator=generator).tolist()
    y = 0.8 * torch.randn(n_objects, *sides, generator=generator)
    seeds = [[first + int(1e6 * numbers[0]), second] for first, second in seeds]
    return {"y": y, "sigma_data": 0.6 + 0.3 * numbers[1], "seeds": seeds,
            "P": {"P_mean": -1 + numbers[2], "P_std": 0.5 + 0.2 * numbers[0]},
            "first_only": len(seeds) == 1}


def many_objects(generator):
    """So many that mean and deviation of their noise levels are known to a few per cent."""
    return make(generator, 4000, (1, 2, 1, 1))


def noise_of(given, answer):
    """(x - y) / sigma, which should be n."""
    sigma = answer["sigma"].double().view(-1, 1, 1, 1, 1)
    return (answer["x"].double() - given["y"].double()) / sigma


def judge_sigma(given, answer):
    """Mean and deviation of ln sigma: 4000 of them are right within 6 standard errors."""
    sigma = answer["sigma"]
    if len(sigma) != 4000:
        return f"denoise wants a sigma for each object, ({len(given['y'])},), not ({len(sigma)},)"
    if answer["sigma_axes"] != 1:
        return f"denoise wants sigma as (B,), and is given one of {answer['sigma_axes']} axes"
    if len(sigma.unique()) < 2:
        return ONE_SIGMA
    problem = flaw(sigma, (4000,))
    if problem:
        return f"sigma: {problem}"
    if not (sigma > 0).all():
        return "sigma is positive: the exponential of a normal number"
    logs = sigma.double().log()
    mean, std = given["P"]["P_mean"], given["P"]["P_std"]
    if abs(logs.std() - std**2) < 6 * std / 8000**0.5:
        return VARIANCE
    if abs(logs.mean() - mean) > 6 * std / 4000**0.5:
        return "the mean of ln sigma is P_mean, which need not be its default"
    if abs(logs.std() - std) > 6 * std / 8000**0.5:
        return "the deviation of ln sigma is P_std, which need not be its default"
    return ""


def judge_noise(given, answer):
    """n is what was added, over sigma: its mean, its deviation, and whether it differs at all."""
    if answer["x"].shape != given["y"].shape:
        return f"x is as y, {tuple(given['y'].shape)}, not {tuple(answer['x'].shape)}"
    noise = noise_of(given, answer)
    problem = flaw(noise, given["y"].shape)
    if problem:
        return f"n, which is (x - y) / sigma: {problem}"
    added = answer["x"].double() - given["y"].double()
    bound = 6 / noise.numel()**0.5
    if abs(noise.std() - 1) > bound:
        return UNSCALED if abs(added.std() - 1) < bound else "x = y + sigma n, n of deviation 1"
    if abs(noise.mean()) > bound:
        return "n has the mean 0: torch.randn, not torch.rand"
    if (noise[:, :, :1] - noise).abs().max() < 1e-3:
        return SAME_NOISE
    return ""


def few_objects(generator):
    """Of several numbers each, so that sums over objects and over numbers differ."""
    return make(generator, 6, (2, 3, 3, 3))


def expected(given, answer, weighted="", target="y"):
    """The loss and its gradient to theta, for what the denoiser was shown; and mistakes in it."""
    sigma, sd = answer["sigma"].double().view(-1, 1, 1, 1, 1), given["sigma_data"]
    x, y = answer["x"].double(), given["y"].double()
    weight = (sigma**2 + sd**2) / (sigma * sd)**2
    if weighted == "no":
        weight = torch.ones_like(sigma)
    if weighted == "no square":
        weight = (sigma**2 + sd**2) / (sigma * sd)
    goal = {"y": y, "noise": (x - y) / sigma, "x": x}[target]
    error = 0.3 * x + 0.1 - goal
    return (weight * error**2).mean(), (weight * 2 * error * x).mean()


def judge_loss(given, answer):
    """Mistakes are worked out for the same x and sigma, so they can be told apart."""
    right, _ = expected(given, answer)
    n = given["y"].numel()
    mistakes = [(expected(given, answer, "no")[0], NO_WEIGHT),
                (expected(given, answer, "no square")[0], SQUARE),
                (expected(given, answer, target="noise")[0], TARGET),
                (expected(given, answer, target="x")[0], NOISY_TARGET),
                (right * n, "the mean over all numbers, not their sum"),
                (right * n / 6, "the mean over all numbers, not the sum over those of an object")]
    hint = "mean over all objects and numbers of weight(sigma) (D(x; sigma) - y)^2"
    return compare(answer["loss"][0], right, hint, mistakes, 1e-3)


def judge_gradient(given, answer):
    """Of the loss that it is: a wrong weight or goal, a sum, are paid for above."""
    ratio = answer["gradient"] / answer["loss"][0]
    for weighted in ("", "no", "no square"):
        for target in ("y", "noise", "x"):
            value, gradient = expected(given, answer, weighted, target)
            if not compare(ratio, (gradient / value).float(), "no", tolerance=1e-3):
                return ""
    return "to an answer D of the network, the loss has the gradient 2 weight (D - y)"


def the_same_seed(generator):
    """One seed twice, whatever else is random; then another."""
    return make(generator, 6, (2, 3, 3, 3), seeds=((1, 2), (1, 3), (4, 3)))


def judge_generator(given, answer):
    """To the bit: a seed that repeats a run nearly is of no use."""
    problem = flaw(answer["loss"], (3,))
    if problem:
        return f"the losses of three seeds: {problem}"
    first, again, other = answer["loss"].tolist()
    if first != again:
        return GENERATOR
    if first == other:
        return "another seed should give another loss"
    return ""


CLAIMS = (
    Claim(2, "each object has a sigma, and ln sigma ~ N(P_mean, P_std^2)", many_objects, loss,
          judge_sigma),
    Claim(2, "the denoiser is shown x = y + sigma n", many_objects, loss, judge_noise),
    Claim(3, "of what it answers, the loss is the weighted mean square", few_objects, loss,
          judge_loss),
    Claim(1, "the loss tells the denoiser what to change", few_objects, loss, judge_gradient),
    Claim(2, "a seed of the generator repeats it, another does not", the_same_seed, loss,
          judge_generator))


# ---- The picture: which noise levels training sees -----------------------------------------------
def standard(generator):
    given = make(torch.Generator().manual_seed(0), 2000, (1, 2, 1, 1))
    return given | {"P": {}, "sigma_data": 0.5}


def draw(figure, given, answer):
    upper, lower = figure.subplots(2, 1)
    upper.hist(answer["sigma"].log().numpy(), bins=40, range=(-6, 4))
    upper.set_title("how often each ln sigma is drawn, of 2000", fontsize=9)
    noisy = answer["x"][:, 0, 0, 0, 0]
    lower.scatter(answer["sigma"].numpy(), noisy.numpy(), s=2)
    lower.set_xscale("log")
    lower.set_xlim(0.005, 20)
    lower.set_ylim(-8, 8)
    lower.set_title("x over sigma: at first y, then ever more noise", fontsize=9)
    lower.set_xlabel("sigma (another draw has other dots)", fontsize=8)


PICTURE = Picture(standard, loss, draw)


# ---- Solutions that are wrong, and what must be said of them; and one that is right -------------
WRONG = (
    ("normal = torch.randn(len(y), generator=generator).to(y) ",
     "normal = torch.randn(1, generator=generator).to(y).expand(len(y)) ", ONE_SIGMA),
    ("weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data)**2 ",
     "weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ", SQUARE),
    ("noise = torch.randn(y.shape, generator=generator).to(y)", "noise = torch.randn_like(y)",
     GENERATOR))


def loss_object_by_object(denoise, y, sigma_data, generator=None, P_mean=-1.2, P_std=1.2):
    total = 0
    for clean in y:
        n = torch.randn(1, *clean.shape, generator=generator)
        log_sigma = P_mean + P_std * torch.randn((1,), generator=generator)
        sigma = torch.exp(log_sigma)
        answer = denoise(clean[None] + sigma.item() * n, sigma)
        c_out = sigma * sigma_data / torch.hypot(sigma, torch.tensor(float(sigma_data)))
        total = total + (((answer - clean[None]) / c_out)**2).mean()
    return total / len(y)


UNUSUAL = {"edm_loss": loss_object_by_object}


def constant(denoise, y, sigma_data, generator=None, P_mean=-1.2, P_std=1.2):
    return 0 * denoise(y, torch.ones(len(y))).sum() + 1.0


CONSTANT = {"edm_loss": constant}
