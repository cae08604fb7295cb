"""Exercise 1: what a ray brings home (Eq. 6 and 7).

Fog whose answer is known: of one density, in two layers, so thin that rounding swallows it.
"""
import torch

from .common import Claim, Picture, compare

TITLE = "colour and occupancy of a ray"
PAPER = "Sec. 3.1, Eq. 6 and 7"
EQUATION = """\
C = sum_i w_i rgb_i                O = sum_i w_i
w_i = T_i (1 - exp(-tau_i))        T_i = exp(-sum_{j < i} tau_j)
tau_i = density_i (edges_{i+1} - edges_i)"""
FILE = "render.py"
WRITE = ("integrate",)
TAKEN_OUT = ()
CHANGED = ()
MINUTES = 20
TASK = """\
A ray crosses S intervals of fog. T_i is the light that reaches interval i, w_i the share of all
light that interval i stops. Any number of rays comes at once: all in front of the last axis is
theirs. A loop over intervals is a good first answer. Thin fog counts, too: tau may be 1e-9, in
float32."""

SHIFT = ("T_i must not contain interval i itself, only those before it: shift the sum by one "
         "before exp")
NO_T = "w_i lacks T_i, the light that reaches interval i: what is in front hides what is behind"
LENGTH = "tau_i is density_i times the length of interval i, edges_{i+1} - edges_i"
THIN = ("1 - exp(-tau) of a tau of 1e-9 is 0 in float32, as exp(-tau) is rounded to 1: "
        "-torch.expm1(-tau) is not")


# ---- What is right, and what comes out with a mistake -------------------------------------------
def by_hand(given, itself=False, dimmed=True, lengths=None):
    """Eq. 6 and 7, one interval after another, in float64: colour, occupancy, weights.

    Mistakes: itself, T_i contains interval i; dimmed False, there is no T_i; other lengths.
    """
    density = given["density"].double()
    if lengths is None:
        lengths = given["edges"].double().diff(dim=-1)
    light = torch.ones_like(density[..., 0])             # what is left of it
    weights = []
    for i in range(density.shape[-1]):
        tau = density[..., i] * lengths[..., i]
        left = light * torch.exp(-tau)
        reaches = left if itself else light
        weights.append(reaches * -torch.expm1(-tau))
        if dimmed:
            light = left
    weights = torch.stack(weights, -1)
    colour = (weights[..., None] * given["rgb"].double()).sum(-2)
    return {"colour": colour, "occupancy": weights.sum(-1), "weights": weights}


def judge_T(given, found, name, hint):
    """Whether `found`, the colour, occupancy or weights, is right, T_i and all."""
    without_length = by_hand(given, lengths=torch.ones_like(given["density"]).double())
    mistakes = [(by_hand(given, itself=True)[name], SHIFT),
                (by_hand(given, dimmed=False)[name], NO_T), (without_length[name], LENGTH)]
    return compare(found, by_hand(given)[name], hint, mistakes)


def judge_but_for_T(given, found, name, hint):
    """Whether `found` is right but perhaps for T_i: that is paid for in judge_T."""
    for mistake in ({}, {"itself": True}, {"dimmed": False}):
        if not compare(found, by_hand(given, **mistake)[name], hint):
            return ""
    return judge_T(given, found, name, hint)


# ---- What is asked -------------------------------------------------------------------------------
def integrate(render, given):
    """Asks the student's function."""
    answer = render.integrate(given["density"], given["rgb"], given["edges"])
    return dict(zip(("colour", "occupancy", "weights"), answer))


def random_rays(generator, *shape):
    """Rays (*shape[:-1]) of S = shape[-1] intervals of unequal lengths, all of them with fog."""
    density = 0.2 + 2 * torch.rand(*shape, generator=generator)
    rgb = torch.rand(*shape, 3, generator=generator)
    lengths = 0.1 + 0.4 * torch.rand(*shape[:-1], shape[-1] + 1, generator=generator)
    return {"density": density, "rgb": rgb, "edges": 1 + lengths.cumsum(-1)}


def one_density(generator):
    """Unequal intervals: what takes them for equal is found out further below."""
    given = random_rays(generator, 5, 12)
    given["density"] = given["density"][:, :1].expand(5, 12).contiguous()
    return given


def judge_one_density(given, answer):
    hint = "over a length L of one density, 1 - exp(-density L) is stopped: so Beer and Lambert say"
    return judge_T(given, answer["occupancy"], "occupancy", hint)


def two_layers(generator):
    """Something, nothing, something: three intervals can be worked out on paper."""
    given = random_rays(generator, 4, 3)
    given["density"][:, 1] = 0                           # in front, nothing, behind
    return given


def judge_two_layers(given, answer):
    hint = "two layers: w_0 = 1 - exp(-tau_0), w_1 = 0, w_2 = exp(-tau_0) (1 - exp(-tau_2))"
    return judge_T(given, answer["weights"], "weights", hint)


def many_layers(generator):
    return random_rays(generator, 6, 9)


def judge_colour(given, answer):
    """By the student's own weights, right or wrong; but there must be some."""
    if not answer["weights"].std() > 1e-3:
        return "all w_i are the same: colours are not weighted"
    weights = answer["weights"].double()
    right = (weights[..., None] * given["rgb"].double()).sum(-2)
    divided = right / weights.sum(-1, keepdim=True)
    named = "C is not divided by O: where little is stopped, little is seen, and the rest is black"
    return compare(answer["colour"], right, "C = sum_i w_i rgb_i, over the intervals",
                   [(divided, named)])


def thin_fog(generator):
    given = random_rays(generator, 3, 1)
    given["density"] = 1e-9 * (1 + torch.rand(3, 1, generator=generator))
    return given


def judge_thin_fog(given, answer):
    """In float32, as in training: float64 would lose it only at 1e-17."""
    if not compare(answer["occupancy"], torch.zeros(3), "no"):
        return THIN
    hint = "fog of one interval and tau = 1e-9 stops 1e-9 of the light"
    return judge_but_for_T(given, answer["occupancy"], "occupancy", hint)


def last_interval(generator):
    """So thin that a wall would be seen."""
    given = random_rays(generator, 4, 8)
    given["density"] *= 0.1
    return given


def judge_last_interval(given, answer):
    """NeRF's first code had an interval of 1e10 here, for scenes without an end."""
    lengths = given["edges"].double().diff(dim=-1)
    lengths[:, -1] = 1e10
    endless = by_hand(given, lengths=lengths)["occupancy"]
    if not compare(answer["occupancy"], endless, "no"):
        return "the last interval ends where edges end; one of 1e10 makes thin fog a wall"
    hint = "S + 1 edges bound S intervals, of which none is longer than its edges say"
    return judge_but_for_T(given, answer["occupancy"], "occupancy", hint)


def grid_of_rays(generator):
    return random_rays(generator, 2, 3, 4, 5)


def grid_and_row(render, given):
    """Asks for the same rays twice: in a grid, and one after another."""
    colour, occupancy, weights = render.integrate(given["density"], given["rgb"], given["edges"])
    one_by_one = []
    for density, rgb, edges in zip(given["density"].flatten(0, 2), given["rgb"].flatten(0, 2),
                                   given["edges"].flatten(0, 2)):
        one_by_one.append(render.integrate(density, rgb, edges)[0])
    return {"colour": colour, "alone": torch.stack(one_by_one), "occupancy": occupancy}


def judge_grid_of_rays(given, answer):
    """By what the student's own function says of each ray alone."""
    hint = "rays may come alone or as (B, V, H, W): count axes from the end, -1 for the intervals"
    if not answer["alone"].std() > 1e-3:
        return "the colour is the same for all rays"
    if answer["occupancy"].shape != (2, 3, 4):
        return f"occupancy is (...,), (2, 3, 4) here, not {tuple(answer['occupancy'].shape)}"
    return compare(answer["colour"], answer["alone"].view(2, 3, 4, 3), hint)


CLAIMS = (
    Claim(2, "fog of one density stops 1 - exp(-density length), however it is cut",
          one_density, integrate, judge_one_density),
    Claim(2, "what is in front dims what is behind it, and not itself",
          two_layers, integrate, judge_two_layers),
    Claim(2, "colour is the sum of w_i rgb_i", many_layers, integrate, judge_colour),
    Claim(1, "the last interval is as long as edges say",
          last_interval, integrate, judge_last_interval),
    Claim(2, "fog of an optical thickness of 1e-9 is not lost", thin_fog, integrate,
          judge_thin_fog),
    Claim(1, "rays may stand in a grid of any shape", grid_of_rays, grid_and_row,
          judge_grid_of_rays))


# ---- The picture: a translucent red ball in front of a blue one ---------------------------------
def two_balls(generator):
    """Thin fog in front of something solid: T_i decides what is seen of the latter."""
    middles = (2 * torch.arange(24) + 1) / 24 - 1
    z, y, x = torch.meshgrid(middles, middles, middles, indexing="ij")
    red = (x + 0.25)**2 + y**2 + (z - 0.45)**2 < 0.2
    blue = (x - 0.25)**2 + y**2 + (z + 0.45)**2 < 0.25
    density = 2.5 * red + 40.0 * blue
    in_front = (z > 0).float()                           # red there, also where there is no fog
    colour = [0.9 * in_front, 0.3 * (1 - in_front), 0.9 * (1 - in_front)]
    return {"volume": torch.stack([density, *colour])[None].float()}


def show(render, given):
    cam2world = render.orbit(0.0, 0.2, 4.0)[None, None]
    intrinsics = cam2world.new_tensor([[[1.9, 1.9, 0.5, 0.5]]])
    rgb, occupancy = render.render(given["volume"], cam2world, intrinsics, 96, 64)
    return rgb[0, 0] + 1 - occupancy[0, 0]               # over white


def draw(figure, given, answer):
    axes = figure.subplots()
    axes.imshow(answer.clamp(0, 1).movedim(0, -1).numpy())
    axes.set_axis_off()
    axes.set_title("a ball of thin red fog in front of a blue one, over white", fontsize=9)


PICTURE = Picture(two_balls, show, draw)


# ---- Solutions that are wrong, and what must be said of them; and one that is right -------------
WRONG = (
    ("F.pad(tau_through[..., :-1], (1, 0))", "tau_through", SHIFT),
    ("stopped = -torch.expm1(-tau)", "stopped = 1 - torch.exp(-tau)", THIN),
    ("weights = T * stopped", "weights = stopped", NO_T))


def integrate_by_a_loop(density, rgb, edges):
    light = torch.ones_like(density[..., 0])
    colour = torch.zeros_like(rgb[..., 0, :])
    weights = []
    for i in range(density.shape[-1]):
        tau = density[..., i] * (edges[..., i + 1] - edges[..., i])
        weights.append(light * -torch.expm1(-tau))
        light = light * torch.exp(-tau)
        colour = colour + weights[-1][..., None] * rgb[..., i, :]
    return colour, sum(weights), torch.stack(weights, -1)


UNUSUAL = {"integrate": integrate_by_a_loop}


def constants(density, rgb, edges):
    return torch.full(rgb[..., 0, :].shape, 0.5), torch.full(edges[..., 0].shape, 0.5), density * 0


CONSTANT = {"integrate": constants}
