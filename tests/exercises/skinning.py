"""Exercise 12: inverse skinning (App. B.1): where a frame's sample lies in the canonical volume."""
import torch
import torch.nn.functional as F

from .common import Claim, Picture, compare

TITLE = "inverse skinning"
PAPER = "App. B.1, Eq. 8 inverted"
EQUATION = """\
x_p = o_p + t d_p                  the sample, carried back as if it were of part p
w_p = softmax_p V_lbs,p(x_p)       how much part p claims it
x_c = sum_p w_p x_p"""
FILE = "render.py"
WRITE = ("carry_back",)
TAKEN_OUT = ()
CHANGED = ()
MINUTES = 25
TASK = """\
sample_skin, above it, reads V_lbs,p(x_p) for all parts at once. Parts are axis 1 of skin, o, d and
w. With a single part (o says how many there are) skin may have no channel at all: then x_c is the
x_p of that part, and w is 1. Where o_p and d_p come from is told at "What moves", above."""

OVER_PARTS = "the softmax is over the parts, axis 1: for each sample the w_p of all parts sum to 1"
AT_X_P = "V_lbs,p is read at x_p, each part at its own point, not all at the same"
HARD = "parts are blended: x_c = sum_p w_p x_p, not the x_p of the part with the largest w_p"
EVENLY = "parts are weighted with w_p, not all alike"
NO_T = "x_p lies at the distance t on the ray: o_p + t d_p"


# ---- Part by part, in float64 --------------------------------------------------------------------
def points_of_parts(given):
    """x_p (B, P, R, S, 3)."""
    o, d, t = given["o"].double(), given["d"].double(), given["t"].double()
    points = []
    for p in range(o.shape[1]):
        points.append(o[:, p, :, None] + t[..., None] * d[:, p, :, None])
    return torch.stack(points, 1)


def logits(given, x):
    """V_lbs,p(x_p): (B, P, R, S)."""
    skin = given["skin"].double()
    read = []
    for p in range(skin.shape[1]):
        points = x[:, p].flatten(1, 2)[:, None, None]                    # (B, 1, 1, R S, 3)
        values = F.grid_sample(skin[:, p:p + 1], points, align_corners=False,
                               padding_mode="border")
        read.append(values.view(x[:, p].shape[:-1]))
    return torch.stack(read, 1)


def ask(render, given):
    """Asks for the points and the weights."""
    points, w = render.carry_back(given["skin"], given["o"], given["d"], given["t"])
    return {"points": points, "w": w}


def make(generator, P):
    """What is given: 2 objects, P parts, 3 rays of 4 samples, inside the cube and beyond."""
    o = torch.randn(2, P, 3, 3, generator=generator)
    d = F.normalize(torch.randn(2, P, 3, 3, generator=generator), dim=-1)
    t = (0.2 + torch.rand(2, 3, 4, generator=generator)).cumsum(-1)
    skin = 2 * torch.randn(2, P, 4, 4, 4, generator=generator)
    return {"skin": skin, "o": o, "d": d, "t": t}


# ---- What is asked -------------------------------------------------------------------------------
def one_part(generator):
    """As rigid subjects are: four channels, none of them for skinning."""
    given = make(generator, 1)
    given["skin"] = given["skin"][:, :0].contiguous()    # volumes of one part have none
    return given


def judge_one_part(given, answer):
    right = points_of_parts(given)[:, 0]
    hint = "one part: x_c = o + t d, (B, R, S, 3), and w = 1, (B, 1, R, S), without asking skin"
    origins = given["o"][:, 0, :, None].expand(right.shape)
    problem = compare(answer["points"], right, hint, [(origins, NO_T)])
    return problem or compare(answer["w"], torch.ones(2, 1, 3, 4), hint)


def three_parts(generator):
    """Three, so that weights are no complements of one another."""
    return make(generator, 3)


def judge_sums(given, answer):
    """Whatever the weights are."""
    w = answer["w"]
    if w.shape != (2, 3, 3, 4):
        return f"w is (B, P, R, S), (2, 3, 3, 4) here, not {tuple(w.shape)}"
    problem = compare(w.sum(1), torch.ones(2, 3, 4), OVER_PARTS)
    if not problem and w.std() < 1e-3:
        return "all parts have the same w_p, whatever skin says"
    return problem


def judge_weights(given, answer):
    """In float64, part by part, without sample_skin."""
    x = points_of_parts(given)
    read = logits(given, x)
    at_first = logits(given, x[:, :1].expand_as(x))
    at_middle = logits(given, x.mean(1, keepdim=True).expand_as(x))
    mistakes = [(at_first.softmax(1), AT_X_P), (at_middle.softmax(1), AT_X_P),
                (read.softmax(3), OVER_PARTS), (read.softmax(2), OVER_PARTS),
                (read, "those are the logits: w_p is their softmax"),
                (read.sigmoid(), "softmax, not sigmoid: parts share a sample")]
    hint = "w_p = softmax over p of sample_skin(skin, x)"
    return compare(answer["w"], read.softmax(1), hint, mistakes, 1e-3)


def judge_points(given, answer):
    """By the student's own w, right or wrong."""
    x, w = points_of_parts(given), answer["w"].double()[..., None]
    if w.abs().sum(1).min() < 1e-3:
        return "all w_p of a sample are 0: nothing is blended"
    largest = F.one_hot(answer["w"].argmax(1), 3).movedim(-1, 1)[..., None]
    mistakes = [((largest * x).sum(1), HARD), (x.mean(1), EVENLY),
                ((w * given["o"].double()[..., None, :]).sum(1), NO_T)]
    hint = "x_c = sum over p of w_p x_p, (B, R, S, 3)"
    return compare(answer["points"], (w * x).sum(1), hint, mistakes, 1e-3)


CLAIMS = (
    Claim(2, "with one part nothing is bent", one_part, ask, judge_one_part,
          "With one part skin may have no channel: do not ask it"),
    Claim(2, "the weights of all parts sum to 1", three_parts, ask, judge_sums),
    Claim(3, "part p is asked at x_p how much it claims", three_parts, ask, judge_weights),
    Claim(3, "x_c is the mean of the x_p with these weights", three_parts, ask, judge_points))


# ---- The picture: a bent arm, straightened -------------------------------------------------------
def bent_arm(generator):
    """Two parts: the left half of a bar, and the right half, turned up about the middle."""
    side = 32
    middles = (2 * torch.arange(side) + 1) / side - 1
    x = middles.expand(side, side, side)
    skin = torch.stack([-6 * x, 6 * x])[None]            # left of the middle part 0, right part 1
    column = torch.linspace(-1.1, 1.1, 89)
    v, u = torch.meshgrid(column, column, indexing="ij")
    frame = torch.stack([u, v, torch.zeros_like(u)], -1).flatten(0, 1)   # points of the frame
    c, s = 0.5, 0.866                                    # 60 degrees; R^-1 x, as rows x R
    turn = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    o = torch.stack([frame, frame @ turn])[None]         # each as if it were of that part
    d = torch.zeros_like(o)
    return {"skin": skin, "o": o, "d": d, "t": torch.zeros(1, len(frame), 1), "frame": frame}


def draw(figure, given, answer):
    left, right = figure.subplots(1, 2)
    x_c = answer["points"][0, :, 0]
    on_bar = (x_c[:, 1].abs() < 0.2) & (x_c[:, 0].abs() < 0.9)
    first = answer["w"][0, 0, :, 0][on_bar].numpy()
    for axes, points, title in ((left, given["frame"], "in the frame; red: part 1"),
                                (right, x_c, "canonical")):
        axes.scatter(*points[on_bar, :2].T.numpy(), s=3, c=first, cmap="coolwarm", vmin=0, vmax=1)
        axes.set_xlim(-1.1, 1.1)
        axes.set_ylim(-1.1, 1.1)
        axes.set_aspect("equal")
        axes.set_title(title, fontsize=9)


PICTURE = Picture(bent_arm, ask, draw)


# ---- Solutions that are wrong, and what must be said of them; and one that is right -------------
WRONG = (
    ("w = logits.softmax(1)", "w = logits.softmax(-1)", OVER_PARTS),
    ("logits = sample_skin(skin, x)", "logits = sample_skin(skin, x[:, :1].expand_as(x))", AT_X_P),
    ('blended = torch.einsum("bprs,bprc->brsc", w, rays)',
     'blended = torch.einsum("bprs,bprc->brsc", F.one_hot(w.argmax(1), w.shape[1]).movedim(-1, 1)'
     ".to(w), rays)", HARD))


def carry_back_part_by_part(skin, o, d, t):
    P = o.shape[1]
    x = torch.stack([torch.addcmul(o[:, p, :, None], t[..., None], d[:, p, :, None])
                     for p in range(P)], 1)
    w = torch.ones_like(x[..., 0])
    if P > 1:
        claims = sample_skin(skin, x)                                    # noqa: F821
        w = torch.exp(claims - torch.logsumexp(claims, 1, keepdim=True))
    return sum(w[:, p, ..., None] * x[:, p] for p in range(P)), w


UNUSUAL = {"carry_back": carry_back_part_by_part}


def constants(skin, o, d, t):
    w = torch.full((*o.shape[:3], t.shape[-1]), 1 / o.shape[1])
    return torch.zeros(*t.shape, 3), w


CONSTANT = {"carry_back": constants}
