"""Exercise 6: robust normalization (Fig. 9): median and quartiles, of all numbers or by channel."""
from types import SimpleNamespace

import numpy as np
import torch

from .common import Claim, Picture, compare

TITLE = "normalization that outliers cannot spoil"
PAPER = "Sec. 3.3, Fig. 9"
EQUATION = """\
F_hat = (F - m) / s
m = median of F        s = 0.7413 (Q75 - Q25)"""
FILE = "normalize.py"
WRITE = ("RobustNormalizer.fit",)
TAKEN_OUT = ("measure",)         # which does most of it
CHANGED = ()
MINUTES = 25
TASK = """\
Set self.m and self.s, tensors of the latents' type, and return self. self.mode says what they are:
"robust", as above; "meanstd", mean and standard deviation (torch's own, .std()); "none", 0 and 1.
Quartiles are torch.quantile's and numpy's: between two numbers, interpolated linearly.
m and s are of all numbers together, of shape (); with self.per_channel of each channel, of shape
(1, C, 1, 1, 1). Where s is 0 (half of the numbers are the same) set it to 1. self.spread is not
your matter: normalize uses it.
TRAP: torch.quantile refuses more than 16 million numbers; numpy's does not."""

FACTOR = "the interquartile range of a Gaussian is 1.349 deviations: times 0.7413"
MEAN = "m is the median: a mean is pulled along by a handful of extremes"
DEVIATION = "s comes from the quartiles: a standard deviation is decided by a handful of extremes"
BY_OBJECT = ("what is in a channel belongs together, of all objects: bring the channels to the "
             "front first; these are not the statistics of axis 1")
RETURN = "fit returns self, so that one can write RobustNormalizer().fit(latents)"
ZERO = "where Q75 = Q25, s would be 0 and F_hat not finite: divide by 1 there"


# ---- With numpy ----------------------------------------------------------------------------------
def by_hand(numbers):
    """Median, 0.7413 IQR; mean, deviation of a flat tensor."""
    numbers = numbers.double().numpy().ravel()
    q25, median, q75 = np.quantile(numbers, [0.25, 0.5, 0.75])
    return SimpleNamespace(m=median, s=0.7413 * (q75 - q25), mean=numbers.mean(),
                           std=numbers.std(ddof=1))


def as_tensor(*numbers):
    return torch.tensor(numbers).float()


def fit(normalize, given):
    """Asks for m, s, and what the normalizer then makes of latents."""
    normalizer = normalize.RobustNormalizer(given["mode"], given["per_channel"])
    # From the start they are 0 and 1, and should become just that where the mode is "none".
    normalizer.m, normalizer.s = torch.tensor(7.0), torch.tensor(5.0)
    returned = normalizer.fit(given["latents"].clone())
    answer = {"m": normalizer.m, "s": normalizer.s, "is_self": returned is normalizer}
    answer["latents_hat"] = normalizer.normalize(given["latents"])
    return answer


def fit_channels(normalize, given):
    """Asks for m and s per channel; and, all numbers together, of each channel alone."""
    latents = given["latents"]
    normalizer = normalize.RobustNormalizer("robust", True)
    normalizer.fit(latents.clone())
    answer = {"m": normalizer.m, "s": normalizer.s}
    pieces = {"alone": [latents[:, c:c + 1] for c in range(5)],
              "mixed": list(latents.reshape(5, 1, 3, 3, 3, 3).transpose(1, 2))}
    for name, parts in pieces.items():
        for part in parts:
            one = normalize.RobustNormalizer("robust", False)
            one.fit(part.contiguous())
            answer[name] = answer.get(name, []) + [[float(one.m), float(one.s)]]
    return answer


def make(generator, mode="robust", per_channel=False):
    """Skewed latents, 405 numbers, 81 a channel: so many that torch's quartiles are numbers of
    them, and most other ways to define a quartile agree."""
    latents = torch.randn(3, 5, 3, 3, 3, generator=generator).exp()
    latents = latents + torch.randn(1, 5, 1, 1, 1, generator=generator)
    scale = 2 + 18 * torch.rand((), generator=generator)
    return {"latents": scale * latents, "mode": mode, "per_channel": per_channel}


# ---- What is asked -------------------------------------------------------------------------------
def robust(generator):
    return make(generator)


def judge_m(given, answer):
    right = by_hand(given["latents"])
    hint = "m is the median of all numbers, a tensor of shape ()"
    mistakes = [(as_tensor(right.mean)[0], MEAN)]
    return compare(answer["m"], as_tensor(right.m)[0], hint, mistakes)


def judge_s(given, answer):
    right = by_hand(given["latents"])
    hint = ("s is 0.7413 times the difference of the quartiles of all numbers, those of "
            "torch.quantile, and a tensor of shape ()")
    mistakes = [(as_tensor(right.s / 0.7413)[0], FACTOR), (as_tensor(right.std)[0], DEVIATION)]
    return compare(answer["s"], as_tensor(right.s)[0], hint, mistakes)


def outliers(generator):
    """Two per cent of all numbers are a million: where densities have no bound, latents may be."""
    given = make(generator)
    given["latents"].view(-1)[::50] = 1e6
    return given


def judge_outliers(given, answer):
    """Not to the digit: quartiles do move a little. But a mean would be 20,000."""
    right = by_hand(given["latents"])
    if abs(float(answer["m"])) > 100:
        return MEAN
    if float(answer["s"]) > 1000:
        return DEVIATION
    near = as_tensor(right.m)[0] + 0.3 * as_tensor(right.s)[0] * torch.tensor([-1.0, 1.0])
    ratio = float(answer["s"]) / right.s
    if near[0] < answer["m"] < near[1] and 0.6 < ratio < 1.6:
        return ""
    return "nine numbers of 405 at 1e6 move median and quartiles very little"


def per_channel(generator):
    """Channels of different middles: what mixes them is seen."""
    return make(generator, per_channel=True)


def judge_per_channel(given, answer):
    """By what the student's own fit says of each channel alone: m and s are judged above."""
    shape = (1, 5, 1, 1, 1)
    hint = "one m and one s for each channel, of the shape (1, C, 1, 1, 1)"
    alone, mixed = as_tensor(*answer["alone"]), as_tensor(*answer["mixed"])      # (5, 2)
    if not alone.std(0).min() > 1e-3:
        return "m and s are the same for any latents"
    for number, name in enumerate(("m", "s")):
        right, wrong = alone[:, number].view(shape), mixed[:, number].view(shape)
        problem = compare(answer[name], right, hint, [(wrong, BY_OBJECT)], 1e-3)
        if problem:
            return problem
    return ""


def mean_and_deviation(generator):
    return make(generator, "meanstd")


def judge_meanstd(given, answer):
    """Within a per cent: whether a deviation divides by n or n - 1 is nobody's mistake here."""
    right = by_hand(given["latents"])
    hint = 'mode "meanstd": mean and standard deviation of all numbers'
    return (compare(answer["m"], as_tensor(right.mean)[0], hint, tolerance=1e-2)
            or compare(answer["s"], as_tensor(right.std)[0], hint, tolerance=1e-2))


def none(generator):
    return make(generator, "none")


def judge_none(given, answer):
    """By what becomes of latents: m and s were others before."""
    if not answer["is_self"]:
        return RETURN
    hint = 'mode "none": set m = 0 and s = 1, whatever they were'
    return compare(answer["latents_hat"], given["latents"], hint)


def constant_latents(generator):
    """Nine of ten numbers are 3, as where most of a volume is empty."""
    given = make(generator)
    given["latents"] = torch.full((3, 5, 3, 3, 3), 3.0)
    given["latents"].view(-1)[:40] = torch.randn(40, generator=generator)
    return given


def judge_constant(given, answer):
    """By s alone, which was another before: what m is, is another claim."""
    if not answer["is_self"]:
        return RETURN
    deviation = as_tensor(by_hand(given["latents"]).std)[0]
    if not compare(answer["s"], deviation, "no"):
        return ""                                        # not 0, and paid for above
    return compare(answer["s"], torch.tensor(1.0), ZERO, tolerance=1e-6)


CLAIMS = (
    Claim(2, "m is the median", robust, fit, judge_m),
    Claim(2, "s is 0.7413 times the interquartile range", robust, fit, judge_s),
    Claim(1, "a few numbers of a million are not seen", outliers, fit, judge_outliers),
    Claim(2, "per_channel: each channel by itself", per_channel, fit_channels,
          judge_per_channel),
    Claim(1, "mean and deviation where the mode says so", mean_and_deviation, fit, judge_meanstd),
    Claim(1, "mode none changes nothing; fit returns self", none, fit, judge_none),
    Claim(1, "an s of 0 becomes 1", constant_latents, fit, judge_constant))


# ---- The picture: the histogram of Fig. 9 --------------------------------------------------------
def bell_with_extremes(generator):
    """What the paper draws in Fig. 9: a bell, and a few numbers far out."""
    latents = 3 + 2 * torch.randn(20, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    latents.view(-1)[::200] = 1e4
    return {"latents": latents, "mode": "robust", "per_channel": False}


def draw(figure, given, answer):
    upper, lower = figure.subplots(2, 1)
    upper.hist(given["latents"].flatten().clamp(-6, 12).numpy(), bins=60, range=(-6, 12))
    upper.set_title("F; all beyond is in the last bar", fontsize=9)
    lower.hist(answer["latents_hat"].flatten().clamp(-4, 4).numpy(), bins=60, range=(-4, 4))
    lower.set_title("F_hat: a bell about 0, of deviation 1", fontsize=9)


PICTURE = Picture(bell_with_extremes, fit, draw)


# ---- Solutions that are wrong, and what must be said of them; and one that is right -------------
WRONG = (
    ("return median, 0.7413 * (q75 - q25) ", "return median, q75 - q25 ", FACTOR),
    ("return median, 0.7413 * (q75 - q25) ", "return rows.mean(1), 0.7413 * (q75 - q25) ", MEAN),
    ("rows = latents.transpose(0, 1).flatten(1) ", "rows = latents.reshape(latents.shape[1], -1) ",
     BY_OBJECT))


def fit_by_sorting(self, latents):
    groups = [latents]
    if self.per_channel:
        groups = latents.unbind(1)
    m, s = [], []
    for group in groups:
        ordered = group.double().flatten().sort().values
        last = len(ordered) - 1
        quartiles = []
        for share in (0.25, 0.5, 0.75):
            below = int(share * last)
            rest = share * last - below
            above = min(below + 1, last)
            quartiles.append(ordered[below] * (1 - rest) + ordered[above] * rest)
        spread = (quartiles[2] - quartiles[0]) / 1.349
        middle = quartiles[1]
        if self.mode == "meanstd":
            middle, spread = ordered.mean(), ordered.std()
        if self.mode == "none":
            middle, spread = torch.tensor(0.0), torch.tensor(1.0)
        m.append(middle)
        s.append(spread if spread > 0 else torch.ones_like(spread))
    shape = (1, -1, 1, 1, 1) if self.per_channel else ()
    self.m = torch.stack(m).to(latents).reshape(shape)
    self.s = torch.stack(s).to(latents).reshape(shape)
    return self


UNUSUAL = {"RobustNormalizer.fit": fit_by_sorting}


def constant_fit(self, latents):
    self.m, self.s = torch.tensor(1.5), torch.tensor(0.9)
    return self


CONSTANT = {"RobustNormalizer.fit": constant_fit}
