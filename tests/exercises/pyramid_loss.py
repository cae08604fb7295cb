"""Exercise 5: the pyramidal loss (Eq. 1): what is summed, what is averaged, what is halved."""
import torch
import torch.nn.functional as F

from .common import Claim, Picture, compare

TITLE = "the pyramidal perceptual loss"
PAPER = "Sec. 3.2, Eq. 1"
EQUATION = "loss = sum over l and i of mean |f_i(D_l(rendered)) - f_i(D_l(true))|"
FILE = "autodecoder.py"
WRITE = ("pyramid_loss",)
TAKEN_OUT = ()
CHANGED = ()
MINUTES = 15
TASK = """\
features(picture) is the list of all f_i(picture), maps of any shape. D_0 is the picture itself, and
D_{l+1} halves D_l: one pixel is the mean of 2 x 2 (F.avg_pool2d). A picture whose shorter side has
fewer than 4 pixels is compared, but not halved any more: that was the last level. The loss is one
number, with a gradient to `rendered`."""

SQUARED = "|a - b| is an absolute value, not a square"
HALVE = "each level sees pictures of half the side: halve rendered and true before the next one"
LAST = "all levels count: add them up; this is the last one alone"
FIRST = "all levels count, 1, 1/2, 1/4 of the side: this is the first one alone"
MEAN_OF_MAPS = "over the maps i Eq. 1 is a sum of means, not a mean of them"
MEAN_OF_LEVELS = "over the levels l Eq. 1 is a sum, not a mean"
SUMMED = "within a map it is the mean: a sum would grow with the size of the picture"
STRIDE = "a halved pixel is the mean of 2 x 2 pixels; every second one alone forgets three of four"
TOO_SMALL = "a picture of fewer than 4 pixels a side is the last level, however many were asked for"


# ---- Eq. 1, level by level -----------------------------------------------------------------------
def maps_of(image):
    """The same features as in the asks below."""
    return [image, 3 * image.diff(dim=-1)**2, image[:, :1] * image[:, 1:2]]


def by_hand(given, power=1, halve="mean", mean=True):
    """What each level and map adds, (levels, 3). Mistakes: a square, no or bad halving, sums."""
    rendered, true = given["rendered"].double(), given["true"].double()
    table = []
    for _ in range(given["levels"]):
        row = []
        for made, goal in zip(maps_of(rendered), maps_of(true)):
            distance = (made - goal).abs()**power
            row.append(distance.mean() if mean else distance.sum())
        table.append(torch.stack(row))
        if rendered.shape[-1] < 4:
            break
        if halve == "mean":
            rendered, true = F.avg_pool2d(rendered, 2), F.avg_pool2d(true, 2)
        if halve == "stride":
            rendered, true = rendered[..., ::2, ::2], true[..., ::2, ::2]
    return torch.stack(table)


def mistakes_of(given):
    """What the likely mistakes come out as, and what is to be said of each."""
    table = by_hand(given)
    mean_of_levels = table.sum(1).mean()
    return [(by_hand(given, power=2).sum(), SQUARED), (table.mean(1).sum(), MEAN_OF_MAPS),
            (by_hand(given, mean=False).sum(), SUMMED), (by_hand(given, halve="no").sum(), HALVE),
            (by_hand(given, halve="stride").sum(), STRIDE), (table[-1].sum(), LAST),
            (table[0].sum(), FIRST), (mean_of_levels, MEAN_OF_LEVELS)]


# ---- What is asked -------------------------------------------------------------------------------
def loss(autodecoder, given):
    """Asks for the loss of two pictures and its gradient to the rendered one."""
    def features(image):
        return [image, 3 * image.diff(dim=-1)**2, image[:, :1] * image[:, 1:2]]

    rendered = given["rendered"].clone().requires_grad_()
    if not given["all_maps"]:
        value = autodecoder.pyramid_loss(lambda image: [image], rendered, given["true"],
                                         given["levels"])
    else:
        value = autodecoder.pyramid_loss(features, rendered, given["true"], given["levels"])
    gradient = None
    if given["with_gradient"]:
        [gradient] = torch.autograd.grad(value, rendered)
    return {"loss": torch.as_tensor(value).detach(), "gradient": gradient}


def make(generator, side, levels, all_maps=True, with_gradient=False):
    """What is given: two pictures that differ in coarse and in fine."""
    rendered = torch.rand(2, 3, side, side, generator=generator)
    true = rendered + 0.3 * torch.rand(2, 3, 1, 1, generator=generator)
    true = true + 0.3 * torch.randn(2, 3, side, side, generator=generator)
    return {"rendered": rendered, "true": true, "levels": levels, "all_maps": all_maps,
            "with_gradient": with_gradient}


def one_level_one_map(generator):
    """Nothing but the distance of two pictures."""
    return make(generator, 8, 1, all_maps=False)


def judge_one_map(given, answer):
    right = by_hand(given)[0, 0]
    mistakes = [(by_hand(given, power=2)[0, 0], SQUARED),
                (by_hand(given, mean=False)[0, 0], SUMMED)]
    hint = "with one level and f(picture) = [picture] the loss is mean |rendered - true|"
    return compare(answer["loss"], right, hint, mistakes)


def one_level(generator):
    """Three maps of different sizes: a mean over all of their numbers is another one."""
    return make(generator, 8, 1)


def is_right_but_for_the_distance(given, answer):
    """Whether it is a square or a sum of all pixels, and else right: the first claim's matter."""
    for mistake in ({"power": 2}, {"mean": False}):
        if not compare(answer["loss"], by_hand(given, **mistake).sum(), "no"):
            return True
    return False


def judge_loss(given, answer):
    if is_right_but_for_the_distance(given, answer):
        return ""
    hint = "sum over levels l and maps i of mean |f_i(D_l(rendered)) - f_i(D_l(true))|"
    return compare(answer["loss"], by_hand(given).sum(), hint, mistakes_of(given))


def three_levels(generator):
    """From 16 to 4 pixels."""
    return make(generator, 16, 3)


def small_pictures(generator):
    """More levels are asked for than there are."""
    return make(generator, 8, 6)


def judge_small(given, answer):
    """8, 4 and 2 pixels: three levels."""
    if is_right_but_for_the_distance(given, answer):
        return ""
    hint = f"{TOO_SMALL}: from 8 x 8 there are 3 levels"
    return compare(answer["loss"], by_hand(given).sum(), hint, mistakes_of(given))


def gradients(generator):
    return make(generator, 8, 1, all_maps=False, with_gradient=True)


def judge_gradient(given, answer):
    """Up to a factor, and of a square, too: that is the first claim's matter."""
    difference = given["rendered"] - given["true"]
    gradient = answer["gradient"]
    hint = "of mean |a - b| the gradient to a is sign(a - b) over the number of pixels"
    if not gradient.abs().max() > 0:
        return "there is no gradient to rendered"
    for right in (difference.sign(), difference):
        factor = gradient.abs().mean() / right.abs().mean()
        if not compare(gradient, factor * right, hint):
            return ""
    return hint


CLAIMS = (
    Claim(2, "one level, one map: the mean of |rendered - true|", one_level_one_map, loss,
          judge_one_map),
    Claim(2, "several maps: the sum of their means", one_level, loss, judge_loss),
    Claim(3, "each level halves the pictures, and all levels count", three_levels, loss,
          judge_loss),
    Claim(1, "small pictures have fewer levels", small_pictures, loss, judge_small,
          "Are pictures halved that have fewer than 4 pixels a side?"),
    Claim(2, "the gradient reaches what was rendered", gradients, loss, judge_gradient,
          "Nothing may be detached on the way from the pictures to the loss"))


# ---- The picture: the loss of a square that is not where it should be ---------------------------
def squares(generator):
    """Nothing random: the picture is always the same."""
    return {}


def losses_of_shifts(autodecoder, given):
    """The loss of a square that is 0 to 24 pixels beside its place, with 1 to 4 levels."""
    def square(shift):
        picture = torch.zeros(1, 3, 32, 64)
        picture[..., 12:20, 16 + shift:24 + shift] = 1
        return picture

    curves = []
    for levels in (1, 2, 3, 4):
        losses = []
        for shift in range(25):
            losses.append(autodecoder.pyramid_loss(autodecoder.pixels_and_gradients, square(shift),
                                                   square(0), levels))
        curves.append(torch.stack([torch.as_tensor(value) for value in losses]))
    return torch.stack(curves)


def draw(figure, given, answer):
    axes = figure.subplots()
    for levels, curve in enumerate(answer.tolist(), 1):
        axes.plot(curve, label=f"{levels} levels")
    axes.set_ylim(0, 1)
    axes.set_xlabel("pixels beside its place")
    axes.set_title("loss of a square of 8 pixels", fontsize=9)
    axes.legend(fontsize=8)


PICTURE = Picture(squares, losses_of_shifts, draw)


# ---- Solutions that are wrong, and what must be said of them; and one that is right -------------
WRONG = (
    ("distance = distance + (made - goal).abs().mean()",
     "distance = distance + (made - goal).square().mean()", SQUARED),
    ("if min(rendered.shape[-2:]) < 4:\n            break",
     "if levels:\n            continue", HALVE),                         # never halved
    ("        loss = loss + distance\n        if min(rendered", "        loss = distance\n"
     "        if min(rendered", LAST))


def loss_by_recursion(features, rendered, true, levels=3):
    pairs = zip(features(rendered), features(true))
    own = torch.stack([F.l1_loss(made, goal) for made, goal in pairs]).sum()
    if levels == 1 or min(rendered.shape[-2:]) < 4:
        return own
    rendered = F.interpolate(rendered, scale_factor=0.5, mode="area")
    true = F.interpolate(true, scale_factor=0.5, mode="area")
    return own + pyramid_loss(features, rendered, true, levels=levels - 1)       # noqa: F821


UNUSUAL = {"pyramid_loss": loss_by_recursion}


def constant_loss(features, rendered, true, levels=3):
    return 0.3 + 0 * rendered.sum()


CONSTANT = {"pyramid_loss": constant_loss}
