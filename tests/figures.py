"""Figures that teach, drawn by the code that they are about: no number in them is made up.

    python tests/figures.py                                      all five, in two minutes
    python tests/figures.py rays path                            these
    python tests/figures.py --run runs/tiny-synthetic --out docs

    rays             a camera's rays through the cube, and the weights along one (render.py)
    normalization    what a few extreme latents do to mean and deviation (normalize.py)
    preconditioning  what F is fed and must answer, from little noise to much (diffusion.py)
    path             from noise to an object: sigma goes a little up and further down (edm_sampler)
    skinning         a puppet in several poses, and which part each place follows (render_moving)

A figure NAME has two functions. NAME_numbers asks the project's own functions and keeps what they
answer; draw_NAME draws that, and its docstring says how to read the picture. Where no run is given
a small one is trained first, in a minute (SHORT). The parts of `skinning` are those that a run has
learned, or else, as a rigid run has none, those of a built-in puppet, which are known.

Shapes: C channels, s side of a latent; D of a volume, S samples on a ray; P parts, T poses.
Simplified: all of it on the CPU.
Read next: the file that the figure is about.
"""
import contextlib
import inspect
import io
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":               # Ctrl-C while torch is imported: an end, no traceback
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import imageio.v3 as iio
import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import claims  # noqa: E402
import data  # noqa: E402
import diffusion  # noqa: E402
import evaluate  # noqa: E402
import render  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from autodecoder import voxel_positions  # noqa: E402
from data import BadInput  # noqa: E402
from normalize import RobustNormalizer  # noqa: E402
from sample import plt  # noqa: E402

# ---- One look for all ----------------------------------------------------------------------------
# Colours of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, YELLOW, AMBER = "#56B4E9", "#F0E442", "#E69F00"
DARK, GREY, PALE = "#333333", "#777777", "#CCCCCC"
PARTS = (SKY, BLUE, ORANGE, AMBER, PINK, GREEN, YELLOW, GREY)
STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9.5,
         "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
         "axes.edgecolor": DARK, "legend.frameon": False, "figure.facecolor": "white"}
WIDTH = 9.0                      # inches: 900 pixels of a README
DPI = 130                        # pixels an inch: 1170 in all, for fine screens


def new_figure(height, message):
    """A figure, as wide as all, under the one sentence that it is there to say."""
    figure = plt.figure(figsize=(WIDTH, height))
    figure.text(0.01, 1 - 0.1 / height, message, fontsize=11, fontweight="bold", color=DARK,
                va="top")
    return figure


def save(path, figure):
    """Writes a figure as PNG, its shades rounded to multiples of 5, which no eye can tell: a third
    fewer bytes."""
    figure.set_dpi(DPI)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    plt.close(figure)
    rounded = (pixels / 5).round() * 5                   # white, 255, is one
    with data.writing(path) as temporary:
        iio.imwrite(temporary, rounded.astype(np.uint8), optimize=True)


def without_frame(axis):
    """No ticks and no frame, for pictures."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def show(axis, pixels):
    """A picture (3, H, W) in [0, 1]."""
    axis.imshow(sample.to_uint8(pixels))
    without_frame(axis)


def look_at(trained, latents_hat, size=128):
    """A normalized latent (1, C, s, s, s), decoded and seen from aside: (3, size, size)."""
    volumes = sample.decode(trained, trained.normalizer.denormalize(latents_hat.float()))
    rgb, occupancy = sample.render_any_views(trained, volumes, [0.6], size)
    return sample.on_white(rgb, occupancy)[0, 0]


# ---- rays: camera_rays, box_interval, place_samples, integrate (Eq. 6 and 7) ---------------------
PIXELS = 14                      # side of the camera's picture: few, so that each can be seen
SAMPLES = 24                     # S; PAPER: 128
CAMERA = render.orbit(0.6, 0.35, 3.0), torch.tensor([1.0, 1.0, 0.5, 0.5])
OBSERVER = render.orbit(1.6, 0.3, 12.0), torch.tensor([4.2, 4.2, 0.5, 0.5])
SCENE = 400                      # side of what the observer sees, in pixels
OTHER_RAYS = ((1, 1), (2, 9), (6, 3), (10, 6))           # row, column of their pixels


def cast_rays(volume):
    """The lines of render.render, for volume (4, D, D, D) and CAMERA; keeps what they compute.

    light (..., S): T_i, what no interval before i has stopped, so 1 - sum_{j < i} w_j
    """
    o, d = render.camera_rays(*CAMERA, PIXELS)                         # (PIXELS, PIXELS, 3)
    near, far = render.box_interval(o, d)
    t, edges = render.place_samples(near, far, SAMPLES)                # (..., S), (..., S+1)
    points = o[..., None, :] + t[..., None] * d[..., None, :]          # (..., S, 3)
    values = render.sample_volume(volume[None], points[None])[0]       # (..., S, 4)
    density, rgb = values[..., 0], values[..., 1:]
    colour, occupancy, weights = render.integrate(density, rgb, edges)
    stopped_before = weights.cumsum(-1) - weights
    return SimpleNamespace(
        o=o, d=d, near=near, far=far, t=t, edges=edges, points=points, density=density, rgb=rgb,
        colour=colour, occupancy=occupancy, weights=weights, light=1 - stopped_before)


def deviation(weights, values):
    """Of values (..., S, c) along rays, by weights (..., S): (...,), over all c together."""
    share = (weights / weights.sum(-1, keepdim=True).clamp(min=1e-6))[..., None]     # sums to 1
    mean = (share * values).sum(-2, keepdim=True)
    return (share * (values - mean)**2).sum((-2, -1)).sqrt()


def variety(rays):
    """How much a pixel mixes: deviation of place x deviation of colour; (PIXELS, PIXELS). Less, if
    the background shows through."""
    mixed = deviation(rays.weights, rays.t[..., None]) * deviation(rays.weights, rays.rgb)
    return mixed * rays.occupancy**2


@torch.no_grad()
def rays_numbers(trained):
    """CAMERA's rays through one of the run's first objects, and what OBSERVER sees of that object.
    Object and pixel are those for which the pixel mixes most."""
    n = min(12, len(trained.names))
    volumes = trained.autodecoder(torch.arange(n))[:, :4]              # of what moves: at rest
    rays = [cast_rays(volume) for volume in volumes]
    mixed = torch.stack([variety(each) for each in rays])              # (n, PIXELS, PIXELS)
    k, row, column = np.unravel_index(mixed.argmax().item(), mixed.shape)
    cam2world, lens = OBSERVER
    views = render.render_geometry(volumes[k:k + 1], cam2world[None, None], lens[None, None],
                                   SCENE, 64)
    seen = {name: pictures[0, 0] for name, pictures in views.items()}  # (C, SCENE, SCENE)
    return SimpleNamespace(rays=rays[k], pixel=(row, column), seen=seen, volume=volumes[k])


def project(seen, points):
    """Where OBSERVER sees points (K, 3): x, y (K,) in pixels; and whether the object, whose
    pictures are `seen`, does not hide them, (K,) bool."""
    cam2world, lens = OBSERVER
    uv, _ = render.project(points, cam2world, lens)
    size = seen["depth"].shape[-1]
    x, y = (uv * size).unbind(-1)
    column, row = x.long().clamp(0, size - 1), y.long().clamp(0, size - 1)
    away = (points - cam2world[:3, 3]).norm(dim=-1)
    is_solid = seen["occupancy"][0, row, column] > 0.5
    is_behind = away > seen["depth"][0, row, column]
    return x - 0.5, y - 0.5, ~(is_solid & is_behind)     # imshow counts from pixels' centres


def draw_line(axis, seen, a, b, **style):
    """The straight line from a to b (3,): faint, and once more where it is in sight."""
    points = torch.lerp(a, b, torch.linspace(0, 1, 120)[:, None])
    x, y, in_sight = project(seen, points)
    axis.plot(x, y, alpha=0.25, **style)
    axis.plot(x.masked_fill(~in_sight, torch.nan), y, **style)


def draw_cube(axis, seen):
    """The twelve edges of [-1, 1]^3: pairs of corners that differ in one of x, y and z."""
    ends = torch.tensor([-1.0, 1.0])
    corners = torch.cartesian_prod(ends, ends, ends)
    for i, a in enumerate(corners):
        for b in corners[i + 1:]:
            if (a != b).sum() == 1:
                draw_line(axis, seen, a, b, color=GREY, linewidth=0.9)
    x, y, _ = project(seen, corners)
    axis.text(x.mean(), y.max() + 6, "the cube $[-1, 1]^3$", ha="center", va="top")


def pixel_corners(ahead):
    """Corners of CAMERA's pixels on a pane so far ahead of it: (PIXELS+1, PIXELS+1, 3), world."""
    cam2world, (fx, fy, cx, cy) = CAMERA
    ticks = torch.arange(PIXELS + 1) / PIXELS
    v, u = torch.meshgrid(ticks, ticks, indexing="ij")
    x = (u - cx) / fx
    y = -(v - cy) / fy                                   # as in render.pixel_directions
    in_camera = torch.stack([x, y, -torch.ones_like(x)], -1)
    return cam2world[:3, 3] + ahead * in_camera @ cam2world[:3, :3].T


def draw_camera(axis, numbers):
    """CAMERA; and, in front of it, its picture, each pixel in the colour that its ray sees."""
    position = CAMERA[0][:3, 3]
    corners = pixel_corners(ahead=1.1)
    x, y, _ = project(numbers.seen, corners.reshape(-1, 3))
    grid = torch.stack([x, y], -1).reshape(PIXELS + 1, PIXELS + 1, 2)
    colour = sample.on_white(numbers.rays.colour, numbers.rays.occupancy[..., None]).clamp(0, 1)
    for row in range(PIXELS):
        for column in range(PIXELS):
            above, below = grid[row:row + 2, column:column + 2]
            around = torch.cat([above, below.flip(0)])                 # (4, 2)
            axis.fill(*around.T, facecolor=colour[row, column].tolist(), edgecolor="#AAAAAA",
                      linewidth=0.3)
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        draw_line(axis, numbers.seen, position, corners[row, column], color=DARK, linewidth=0.8)
    x, y, _ = project(numbers.seen, position[None])
    axis.plot(x, y, "o", color=DARK, markersize=5)
    axis.text(x, y - 9, "camera", ha="center", va="bottom")
    axis.text(x, grid[..., 1].min(), f"its picture, {PIXELS} x {PIXELS} pixels", va="bottom")


def draw_ray(axis, numbers, pixel, is_chosen):
    """The ray of a pixel (row, column) and its samples; the chosen one's as large as they weigh."""
    rays = numbers.rays
    o, d = rays.o[pixel], rays.d[pixel]
    colour, width = ("black", 1.8) if is_chosen else (SKY, 0.9)
    end = o + (rays.far[pixel] + 0.4) * d                # a little beyond the cube
    draw_line(axis, numbers.seen, o, end, color=colour, linewidth=width)
    x, y, in_sight = project(numbers.seen, rays.points[pixel])
    area = torch.full_like(x, 5.0)                       # of dots, in square points
    if is_chosen:
        area = area + 150 * rays.weights[pixel]
    opacity = torch.where(in_sight, 1.0, 0.35)
    axis.scatter(x, y, s=area, color=colour, alpha=opacity.numpy(), linewidths=0, zorder=5)
    if not is_chosen:
        return
    for name, t in (("near", rays.near[pixel]), ("far", rays.far[pixel])):
        x, y, _ = project(numbers.seen, (o + t * d)[None])
        axis.plot(x, y, "|", color="black", markersize=9)
        axis.text(x, y + 9, name, ha="center", va="top")


def draw_scene(axis, numbers):
    """What OBSERVER sees: object, cube, camera and rays; faint, what the object hides."""
    show(axis, sample.on_white(numbers.seen["rgb"], numbers.seen["occupancy"]))
    draw_cube(axis, numbers.seen)
    draw_camera(axis, numbers)
    for pixel in OTHER_RAYS:
        draw_ray(axis, numbers, pixel, is_chosen=False)
    draw_ray(axis, numbers, numbers.pixel, is_chosen=True)
    axis.autoscale()
    axis.margins(0.06, 0.02)


def draw_along(axes, rays, pixel):
    """Density, T and w along the ray of a pixel: one step an interval."""
    edges = rays.edges[pixel].numpy()
    thickness, light, weight = axes
    thickness.stairs(rays.density[pixel].numpy(), edges, fill=True, color=GREY)
    thickness.set_yscale("log")
    thickness.set_ylim(0.3, 200)
    thickness.set_yticks([1, 10, 100], ["1", "10", "100"], minor=False)
    thickness.set_title(r"density$_i$, per world unit;  $\tau_i = $density$_i\,dt_i$")
    light.stairs(rays.light[pixel].numpy(), edges, baseline=None, color=BLUE, linewidth=1.8)
    light.set_ylim(0, 1.08)
    light.set_title(r"$T_i = \exp(-\Sigma_{j<i}\tau_j)$, the light that is left")
    colours = rays.rgb[pixel].clamp(0, 1).numpy()                      # (S, 3)
    weight.bar(edges[:-1], rays.weights[pixel].numpy(), np.diff(edges), align="edge",
               color=colours, edgecolor=DARK, linewidth=0.6)
    weight.set_title(r"$w_i = T_i\,(1 - \exp(-\tau_i))$, in the colour rgb$_i$")
    weight.set_xlabel("distance $t$ along the black ray, world units")
    for axis in axes:
        axis.set_xlim(edges[0], edges[-1])
    for axis in axes[:2]:
        axis.tick_params(labelbottom=False)


def draw_rays(numbers):
    """How to read it. Left: every pixel of the camera's picture has a ray. Between the two points
    where it crosses the cube it is cut into S equal intervals, with a sample in the middle of each.
    Right, the black ray: fog stops light, so T falls; a pixel sees what stops its light, w. Thin
    fog in front may weigh as much as a wall behind, and what is behind the wall weighs nothing."""
    figure = new_figure(4.5, "A pixel sees what stops the light of its ray (Eq. 6 and 7)")
    draw_scene(figure.add_axes([0.0, 0.01, 0.61, 0.9]), numbers)
    grid = figure.add_gridspec(3, 1, left=0.625, right=0.985, top=0.86, bottom=0.2, hspace=0.55)
    rays, pixel = numbers.rays, numbers.pixel
    draw_along([figure.add_subplot(grid[row]) for row in range(3)], rays, pixel)
    occupancy = f"{rays.occupancy[pixel]:.2f}"
    figure.text(0.625, 0.04, rf"Eq. 7: $O = \Sigma_i\, w_i = {occupancy}$      "
                r"Eq. 6: $C = \Sigma_i\, w_i\,$rgb$_i = $")
    colour = rays.colour[pixel].clamp(0, 1).tolist()
    swatch = plt.Rectangle((0.953, 0.025), 0.032, 0.055, transform=figure.transFigure,
                           facecolor=colour, edgecolor=DARK)
    figure.add_artist(swatch)
    return figure


# ---- normalization: RobustNormalizer (Sec. 3.3, Fig. 9) ------------------------------------------
EXTREMES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)     # so many of all numbers are +-1e4
SHOWN = 10                       # in the last panel; as in row 1 of claims.py
MODES = {"robust": (BLUE, "$m$ = median, $s$ = 0.7413 IQR (the paper)"),
         "meanstd": (ORANGE, "$m$ = mean, $s$ = standard deviation")}


def measure_latents(latents):
    """m and s (len(EXTREMES),) of latents (N, C, s, s, s) by both modes, as ever more of their
    numbers are made extreme; and the latents, SHOWN of their numbers extreme, normalized."""
    m, s, latents_hat = {}, {}, {}
    spoilt = claims.make_extreme(latents, SHOWN)
    for mode in MODES:
        fitted = [RobustNormalizer(mode).fit(claims.make_extreme(latents, n)) for n in EXTREMES]
        m[mode] = torch.stack([normalizer.m for normalizer in fitted])
        s[mode] = torch.stack([normalizer.s for normalizer in fitted])
        latents_hat[mode] = RobustNormalizer(mode).fit(spoilt).normalize(spoilt)
    return SimpleNamespace(latents=latents, m=m, s=s, latents_hat=latents_hat)


def normalization_numbers(trained):
    """Those of all the run's training objects: what stage 2 learns from."""
    latents = sample.training_latents(trained.autodecoder, len(trained.names))
    return measure_latents(latents)


def bell(x, m, s):
    """The density of N(m, s^2) at x."""
    return torch.distributions.Normal(m, s).log_prob(x).exp()


def draw_raw(axis, numbers):
    """All latents, and the bells that median and IQR, or mean and deviation, take them for."""
    limit = numbers.latents.abs().max().item()
    x = torch.linspace(-limit, limit, 101)
    axis.hist(numbers.latents.flatten().numpy(), x.numpy(), density=True, color=PALE)
    for mode, (colour, label) in MODES.items():
        curve = bell(x, numbers.m[mode][0], numbers.s[mode][0])
        axis.plot(x, curve, color=colour, linewidth=1.8, label=label)
    axis.set(yscale="log", ylim=(1e-7, 1), xlabel="latent $F$")
    axis.set_yticks([1e-6, 1e-4, 1e-2, 1])
    axis.set_title(f"as learned: {numbers.latents.numel():,}, share per unit")


def draw_divisors(axis, numbers):
    """s, as ever more numbers are extreme."""
    shown = EXTREMES.index(SHOWN)
    for mode, (colour, _) in MODES.items():
        s = numbers.s[mode]
        axis.plot(EXTREMES, s, "o-", color=colour, linewidth=1.8, markersize=4)
        axis.annotate(f"{s[shown]:.1f}", (SHOWN, s[shown]), (0, 7), textcoords="offset points",
                      color=colour, ha="right")
    axis.set(yscale="log", xlabel="how many of them are ±10,000")
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(-0.3, 1500)
    axis.set_xticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1000"])
    axis.set_yticks([10, 100], ["10", "100"])
    axis.set_title("$s$, by which they are divided")


def draw_normalized(axis, numbers):
    """What diffusion would be given, SHOWN numbers being extreme: these lie far outside."""
    x = torch.linspace(-4, 4, 81)
    for mode, (colour, _) in MODES.items():
        counted = np.histogram(numbers.latents_hat[mode], x.numpy(), density=True)
        axis.stairs(*counted, color=colour, linewidth=1.8)
    axis.plot(x, bell(x, 0.0, 1.0), color=DARK, linewidth=1, linestyle="--", label="N(0, 1)")
    axis.set(xlabel=r"normalized: $\hat F = (F - m)\,/\,s$")
    axis.set_title(f"{SHOWN} being ±10,000: share per unit")
    axis.legend(loc="upper right")


def draw_normalization(numbers):
    """How to read it. Left: latents are bell-shaped but for their tails, and either pair of numbers
    describes the bell. Middle: a few of all numbers become 10,000, as the paper met them. The
    deviation grows with each of them; quartiles do not move. Right: what diffusion would then be
    given. It expects a spread that it knows, and one of the bells is squeezed to a spike."""
    figure = new_figure(3.7, "A few extreme latents decide mean and deviation; "
                        "median and quartiles do not see them")
    grid = dict(left=0.06, right=0.99, top=0.75, bottom=0.14, wspace=0.22)
    raw, divisors, normalized = figure.subplots(1, 3, gridspec_kw=grid)
    draw_raw(raw, numbers)
    draw_divisors(divisors, numbers)
    draw_normalized(normalized, numbers)
    figure.legend(*raw.get_legend_handles_labels(), loc="upper left", ncols=2,
                  bbox_to_anchor=(0.05, 0.93))
    return figure


# ---- preconditioning: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) --------------------------
SIGMAS = (0.02, 0.1, 0.5, 2.5, 12.5)
RATIO = 5                        # of each of them to the one before
GAP = 0.06                       # between the columns, in columns
# Rows of the figure: what of a noise level is shown, and what is written beside it.
ROWS = {"x": r"$x = y + \sigma n$" "\nthe latent with noise",
        "fed": r"$c_{in}\,x$" "\nwhat $F$ is fed",
        "wanted": r"$(y - c_{skip}\,x)\,/\,c_{out}$" "\nwhat $F$ must answer",
        "answered": r"$F(c_{in}\,x;\ c_{noise})$" "\nwhat it does answer",
        "picture": r"$D = c_{skip}\,x + c_{out}\,F$" "\nwhat that is, decoded"}


def precondition(y, noise, sigma, sigma_data):
    """One noise level. y (1, C, s, s, s) clean and normalized, noise ~ N(0, 1), as y.

    returns sigma, c_skip, c_out and, as y, x = y + sigma n; fed, c_in x; wanted, what F must answer
            to make D = y
    """
    c_skip, c_out, c_in, _ = diffusion.preconditioning(torch.tensor(sigma).to(y), sigma_data)
    x = y + sigma * noise
    wanted = (y - c_skip * x) / c_out                    # D = c_skip x + c_out F, solved for F
    return SimpleNamespace(sigma=sigma, c_skip=c_skip, c_out=c_out, x=x, fed=c_in * x,
                           wanted=wanted)


@torch.no_grad()
def preconditioning_numbers(trained, k=0, seed=0):
    """Training object k under the same noise at five levels, what F answers to each, and D."""
    sigma_data = trained.settings.sigma_data
    latents = sample.training_latents(trained.autodecoder, k + 1)[k:]
    y = trained.normalizer.normalize(latents).double()
    noise = sample.latent_noise(trained, 1, seed).double()
    levels = []
    for sigma in SIGMAS:
        level = precondition(y, noise, sigma, sigma_data)
        level.denoised = trained.denoiser(level.x, sigma)
        level.answered = (level.denoised - level.c_skip * level.x) / level.c_out
        level.picture = look_at(trained, level.denoised)
        levels.append(level)
    return SimpleNamespace(levels=levels, y=y, sigma_data=sigma_data)


def mosaic(latent, columns=6, rows=3):
    """The middle slices of the first channels, side by side: (1, C, s, s, s) -> (rows s, columns
    s); of fewer channels fewer."""
    side = latent.shape[-1]
    slices = latent[0, :columns * rows, side // 2]                     # (channels, s, s)
    rows = max(1, len(slices) // columns)                              # full ones
    strips = [torch.cat(list(row), -1) for row in slices[:rows * columns].split(columns)]
    return torch.cat(strips)


def draw_scales(axis, sigma_data):
    """c_skip and c_out over sigma, each noise level above the middle of its column."""
    half_a_column = RATIO ** (0.5 / (1 + GAP))
    low, high = SIGMAS[0] / half_a_column, SIGMAS[-1] * half_a_column
    sigma = torch.logspace(np.log10(low), np.log10(high), 200)
    c_skip, c_out, _, _ = diffusion.preconditioning(sigma, sigma_data)
    axis.plot(sigma, c_skip, color=BLUE, linewidth=1.8)
    axis.plot(sigma, c_out, color=ORANGE, linewidth=1.8)
    axis.text(low * 1.2, 0.8, "$c_{skip}$: how much of $x$ is kept", color=BLUE, va="top")
    axis.text(high / 1.2, 0.8, "$c_{out}$: how much of $F$ is added", color=ORANGE, ha="right",
              va="top")
    axis.set(xscale="log", xlim=(low, high), ylim=(0, 1.1), yticks=(0, 0.5, 1))
    axis.set_xticks(SIGMAS, [rf"$\sigma = {level}$" for level in SIGMAS])
    axis.minorticks_off()


def draw_preconditioning(numbers):
    """How to read it. A column is a noise level, a row one side of D's formula; squares are numbers
    of the latent, the same ones everywhere. At little noise x is all but the object: D keeps it
    (c_skip 1); F is fed the object and must answer the noise, of which little is added (c_out 0).
    At much noise D keeps nothing; F is fed noise and must answer the object. So what F is fed and
    must answer has about the same size at every sigma; x has not. What F, trained, does answer is
    not right where hardly anything of it is added."""
    figure = new_figure(7.4, "Little noise: F is fed the object and asked for the noise. "
                        "Much noise: the other way round.")
    grid = figure.add_gridspec(6, 5, left=0.21, right=0.985, top=0.93, bottom=0.05, wspace=GAP,
                               hspace=0.3, height_ratios=(1, 1, 1, 1, 1, 1.75))
    draw_scales(figure.add_subplot(grid[0, :]), numbers.sigma_data)
    for row, (name, label) in enumerate(ROWS.items(), 1):
        for column, level in enumerate(numbers.levels):
            axis = figure.add_subplot(grid[row, column])
            values = getattr(level, name)
            if name == "picture":
                show(axis, values)
            else:
                axis.imshow(mosaic(values).numpy(), cmap="RdBu_r", vmin=-3, vmax=3)
                axis.set_xlabel(f"deviation {values.std():.2f}", fontsize=8, labelpad=2)
                without_frame(axis)
        place = axis.get_position()
        figure.text(0.012, (place.y0 + place.y1) / 2, label, va="center", linespacing=1.5)
    figure.text(0.012, 0.012, "F is the network. Squares: some numbers of the latent, the same in "
                "all rows; blue is −3, white 0, red 3. What F is fed and must answer has\n"
                f"deviation 1 at every σ if y has sigma_data, {numbers.sigma_data}; here y has "
                f"{numbers.y.std():.2f}. At little noise F may be wrong: hardly anything of it is "
                "added.",
                fontsize=8, color=GREY, linespacing=1.5)
    return figure


# ---- path: edm_sampler (App. C.2) ----------------------------------------------------------------
STEPS = 16                       # PAPER: 16, 32 or 64
SAMPLER = inspect.signature(diffusion.edm_sampler).parameters
S_MIN, S_MAX = SAMPLER["S_min"].default, SAMPLER["S_max"].default    # between them there is churn
ZERO = 6e-4                      # where sigma 0 stands on an axis of powers of ten


def record(denoise, noise, steps, **options):
    """edm_sampler, and what it asks on its way -> its end, as noise, and a list of sigma, x, D.
    It asks where each step begins and, but for the last one, where Euler's step ends (for Heun)."""
    asked = []

    def recording(x, sigma):
        denoised = denoise(x, sigma)
        asked.append(SimpleNamespace(sigma=sigma, x=x, denoised=denoised))
        return denoised

    end = diffusion.edm_sampler(recording, noise, steps, **options)
    return end, asked


def follow(denoise, begin, sigma_next, steps):
    """From what was asked at the begin of a step to sigma_next, in `steps` steps without churn ->
    what is asked at the begin of each and, last, at the end."""
    # As if the sampler began here; it would go on from sigma_next to 0, in one step more.
    _, asked = record(denoise, begin.x / begin.sigma, steps + 1, S_churn=0,
                      sigma_max=begin.sigma, sigma_min=sigma_next)
    return asked[0::2]


def magnify(denoise, sigmas, begins, trials):
    """The step that Heun's correction changes most, in relation to its length; of those with churn
    before and behind them. And that number of x which it changes most.

    returns i and number; what was asked: before, at sigma_i, in front of the churn; begin; trial,
            at Euler's end; end, at Heun's; curve, at many small steps between begin and end
    """
    ends, shares = [], []
    for i, trial in enumerate(trials):
        sigma_next = sigmas[i + 1].item()
        end = follow(denoise, begins[i], sigma_next, 1)[-1]
        corrected = (end.x - trial.x).norm() / (end.x - begins[i].x).norm()
        has_churn = begins[i].sigma > sigmas[i] and begins[i + 1].sigma > sigma_next
        ends.append(end)
        shares.append(corrected.item() if has_churn else 0.0)
    i = int(np.argmax(shares))
    number = (ends[i].x - trials[i].x).abs().argmax().item()
    curve = follow(denoise, begins[i], ends[i].sigma, 40)
    return SimpleNamespace(i=i, number=number, before=ends[i - 1], begin=begins[i],
                           trial=trials[i], end=ends[i], curve=curve)


@torch.no_grad()
def path_numbers(trained, seed=0, columns=8):
    """The path of object 0 of a seed, as sample.sample_latents makes it in STEPS steps."""
    noise = sample.latent_noise(trained, 1, seed)
    churn = [sample.stream(seed, "churn 0")]
    end, asked = record(trained.denoiser, noise, STEPS, generator=churn)
    begins, trials = asked[0::2], asked[1::2]
    sigmas = diffusion.sigma_steps(STEPS)                              # (STEPS + 1,)
    shown = [round(column * (STEPS - 1) / (columns - 1)) for column in range(columns)]
    pictures = [look_at(trained, begins[i].denoised) for i in shown]
    step = magnify(trained.denoiser, sigmas, begins, trials)
    return SimpleNamespace(sigmas=sigmas, begins=begins, trials=trials, end=end, shown=shown,
                           pictures=pictures, step=step)


def arrow(axis, start, end, colour, label=None):
    """From start to end, (x, y) each."""
    axis.plot(*zip(start, end), color=colour, linewidth=1.6, label=label)
    look = dict(arrowstyle="-|>", color=colour, linewidth=1.6, shrinkA=0, shrinkB=0,
                mutation_scale=9)
    axis.annotate("", end, start, arrowprops=look)


def draw_sigmas(axis, numbers):
    """Sigma over the steps: a little up (churn) and further down (Heun)."""
    sigmas = numbers.sigmas.clamp(min=ZERO).tolist()
    for i, begin in enumerate(numbers.begins):
        turn = i                                         # where on the axis of steps it turns down
        if begin.sigma > sigmas[i]:
            turn = i + 0.35
            arrow(axis, (i, sigmas[i]), (turn, begin.sigma), ORANGE)
        arrow(axis, (turn, begin.sigma), (i + 1, sigmas[i + 1]), BLUE)
    for limit, name in ((S_MAX, "S_{max}"), (S_MIN, "S_{min}")):
        axis.axhline(limit, color=GREY, linewidth=0.8, linestyle=":")
        axis.text(STEPS, limit * 1.15, f"${name}$", color=GREY, ha="right")
    axis.text(STEPS, 1, "churn between these", color=GREY, ha="right", va="center")
    axis.text(0, 0.004, "up: churn, fresh noise comes in", color=ORANGE)
    axis.text(0, 0.0013, "down: a step of Heun's", color=BLUE)
    axis.set(yscale="log", ylim=(ZERO, 150), xlim=(-0.3, STEPS + 0.3), xlabel="step $i$",
             title=r"$\sigma$: how much noise is in $x$")
    axis.set_yticks([ZERO, 0.002, S_MIN, 1, S_MAX], ["0", "0.002", f"{S_MIN}", "1", f"{S_MAX}"])
    axis.minorticks_off()


def draw_step(axis, step):
    """The magnified step, for one number of x."""
    def at(asked):
        return asked.sigma, asked.x.flatten()[step.number].item()

    axis.plot(*zip(*[at(asked) for asked in step.curve]), color=PALE, linewidth=6,
              label="the path, in 40 small steps")
    arrow(axis, at(step.before), at(step.begin), ORANGE, "churn: fresh noise")
    arrow(axis, at(step.begin), at(step.trial), GREEN, "Euler: straight to $D$")
    arrow(axis, at(step.begin), at(step.end), BLUE, "Heun: corrected")
    guess = 0, step.begin.denoised.flatten()[step.number].item()
    axis.plot(*guess, "o", color=GREEN, label="the guess $D$")
    axis.plot(*zip(at(step.trial), guess), color=GREEN, linewidth=1, linestyle=":")
    axis.invert_xaxis()
    axis.margins(0.08)
    axis.set(xlabel=r"$\sigma$", title=f"step {step.i}, magnified: one number of $x$")
    axis.legend(fontsize=8, loc="best", borderaxespad=0)


def draw_path(numbers):
    """How to read it. Left: sigma falls from 80 to 0, in 16 steps. Where churn is allowed each step
    goes up first, with fresh noise, which buries earlier errors. Right: the slope points at what D
    takes x for; Euler follows it straight, Heun corrects by the slope at the other end. Below: at
    much noise D is a vague mean of all objects, and churn may still change its mind; then the
    object is decided, and only details follow."""
    figure = new_figure(5.7, f"From noise to an object in {STEPS} steps: "
                        "a little up with fresh noise, and further down")
    above = figure.add_gridspec(1, 2, left=0.06, right=0.985, top=0.875, bottom=0.4,
                                width_ratios=(1.5, 1), wspace=0.13)
    draw_sigmas(figure.add_subplot(above[0]), numbers)
    draw_step(figure.add_subplot(above[1]), numbers.step)
    figure.text(0.012, 0.285, r"$D(x; \sigma)$: what the denoiser takes $x$ for, decoded",
                fontsize=STYLE["axes.titlesize"])
    below = figure.add_gridspec(1, len(numbers.shown), left=0.01, right=0.99, top=0.23,
                                bottom=0.01, wspace=0.02)
    for column, (i, pixels) in enumerate(zip(numbers.shown, numbers.pictures)):
        axis = figure.add_subplot(below[column])
        show(axis, pixels)
        axis.set_title(rf"$i = {i}$,  $\sigma = {numbers.begins[i].sigma:.2g}$", fontsize=8,
                       loc="center", pad=3)
    return figure


# ---- skinning: carry_back, render_moving (App. B.1) ----------------------------------------------
PUPPET, FRAMES = 5, 48           # of the built-in ones, and the length of its clip
CANONICAL = 18                   # of these the frame in which it looks ahead and holds its arms out
# SIMPLIFIED: frames in which inverse skinning goes well. It is an approximation: where an arm rests
# in the canonical volume there is nothing in a frame in which it hangs. If it is carried back from
# there into the torso, neither of the two wants the place, and a ghost of the arm may be seen.
OTHER_FRAMES = (4, 9, 36, 44)
GRID, VIEW = 80, 160             # sides: of its volume in voxels, and of its pictures in pixels
REACH = 0.05                     # world units over which one part's weight gives way to another's


def distance_to(shape, points):
    """From points (K, 3) to a primitive's surface: (K,), world units, < 0 inside. Roughly: as if it
    were a ball of its smallest radius."""
    radius = evaluate.sums_of_sides(shape, points).amax(1).sqrt()      # 1 on the surface
    return (radius - 1) * shape.half.amin()


def move(shape, pose):
    """A primitive, moved by pose (4, 4)."""
    R, t = pose[:3, :3], pose[:3, 3]
    return replace(shape, centre=R @ shape.centre + t, rotation=R @ shape.rotation)


def puppet_volume(parts):
    """P lists of primitives -> (1, 4 + P, GRID, GRID, GRID): density, colour, skinning logits.

    OURS: the logit of part p is how much nearer p is than any other part, in units of REACH. A
    trained decoder has to find such logits; here they are told.
    """
    points = voxel_positions(GRID).reshape(-1, 3)
    nearest = torch.full((len(points),), torch.inf)      # distance to what is nearest so far
    rgb = torch.zeros(3, len(points))
    to_parts = []                                        # distance to each part
    for shapes in parts:
        to_shapes = torch.stack([distance_to(shape, points) for shape in shapes])
        for shape, distance in zip(shapes, to_shapes):
            is_nearer = distance < nearest
            nearest[is_nearer] = distance[is_nearer]
            rgb[:, is_nearer] = torch.tensor(shape.colour).float()[:, None]
        to_parts.append(to_shapes.amin(0))
    to_parts = torch.stack(to_parts)                                   # (P, K)
    logits = []
    for p, to_part in enumerate(to_parts):
        to_others = torch.cat([to_parts[:p], to_parts[p + 1:]]).amin(0)
        logits.append((to_others - to_part) / REACH)
    depth = -nearest * GRID / 2                          # below the surface, in voxels
    density = depth.clamp(0, 1) * GRID                   # up to an optical thickness of 2 a voxel
    volume = torch.cat([density[None], rgb, torch.stack(logits)])
    return volume.reshape(1, -1, GRID, GRID, GRID)


def built_in_rig():
    """A puppet as a moving run would have it that has learned everything right.

    returns volume (1, 4 + P, D, D, D) in the canonical pose; intrinsics (4,); cameras (T, P, 4, 4)
            as each part sees them, first those of the canonical pose; names of the parts; and the
            truth: primitives of the parts, and moves (T, P, 4, 4) from the canonical pose
    """
    rng = np.random.default_rng([0, 1000 + PUPPET])      # as data.puppet_object's
    parts, joints, _ = data.make_puppet(rng)
    _, _, poses = data.move_puppet(joints, FRAMES, rng)                # (FRAMES, P, 4, 4) from rest
    canonical = poses[CANONICAL]
    parts = [[move(shape, pose) for shape in shapes] for shapes, pose in zip(parts, canonical)]
    moves = poses[[CANONICAL, *OTHER_FRAMES]] @ canonical.inverse()
    cam2world, intrinsics = data.fixed_camera(len(moves))
    # What has moved by M is seen from camera C as what stays is from M^-1 C.
    cameras = moves.inverse() @ cam2world[:, None]
    return SimpleNamespace(volume=puppet_volume(parts), intrinsics=intrinsics[0], cameras=cameras,
                           names=data.PARTS, parts=parts, moves=moves)


def learned_rig(trained):
    """The same of a moving run, but for the truth: what it has learned of its first subject."""
    n_poses = len(trained.poses)
    frames = torch.linspace(0, n_poses - 1, len(OTHER_FRAMES)).round().int()
    views = [sample.moving_view_from(trained, 0.0, frame) for frame in frames.tolist()]
    P = trained.data_settings.parts
    front = render.orbit(0.0, 0.0, trained.posenet.distance)           # nothing has moved
    cameras = [front.expand(P, 4, 4)]
    for of_parts, intrinsics in views:
        cameras.append(of_parts)
    names = [f"part {p}" for p in range(P)]
    volume = trained.autodecoder(torch.tensor([0]))
    return SimpleNamespace(volume=volume, intrinsics=intrinsics, cameras=torch.stack(cameras),
                           names=names)


def weights_on_a_line(volume, n=200):
    """Skinning weights w_p (P, n) at points (n, 3) from the subject's middle through that of part
    p*, the one farthest to the side, and beyond; and p*."""
    density, skin = volume[:, :1], volume[:, 4:]
    mass = density * skin.softmax(1)                                   # (1, P, D, D, D)
    moments = torch.einsum("bpzyx,zyxc->pc", mass, voxel_positions(volume.shape[-1]))
    masses = mass.sum((0, 2, 3, 4))                                    # (P,)
    middles = moments / masses.clamp(min=1e-6)[:, None]                # (P, 3)
    p = middles[:, 0].argmax().item()
    share = torch.linspace(0, 1.7, n)[:, None]                         # 1 is the middle of p*
    points = torch.lerp(moments.sum(0) / masses.sum(), middles[p], share)
    asked = points.expand(1, len(masses), 1, n, 3)       # at rest all parts are asked at one place
    logits = render.sample_skin(skin, asked)                           # (1, P, 1, n)
    return logits[0, :, 0].softmax(0), points, p


@torch.no_grad()
def skinning_numbers(trained):
    """What a run has learned, or the built-in puppet: views (T,) of the canonical pose, which is
    larger, and of others; and weights on a line. trained: may be None."""
    is_learned = (trained is not None and trained.posenet is not None
                  and trained.data_settings.parts > 1)
    rig = learned_rig(trained) if is_learned else built_in_rig()
    rig.views = []
    for cameras in rig.cameras:                                        # (P, 4, 4)
        side = VIEW if rig.views else VIEW * 3 // 2
        view = render.render_moving_geometry(rig.volume, cameras[None, None],
                                             rig.intrinsics[None, None], side, 48)
        rig.views.append({name: pictures[0, 0] for name, pictures in view.items()})
    rig.weights, rig.points, rig.part = weights_on_a_line(rig.volume)
    rig.origin = ("A built-in puppet, put into a volume: its parts, poses and weights are told, "
                  "not learned.")
    if is_learned:
        rig.origin = f"Parts, poses and weights as {Path(trained.run).name} has learned them."
    return rig


def colours_of_parts(P):
    """(P, 3) in [0, 1]; beyond eight parts they come again."""
    names = [PARTS[p % len(PARTS)] for p in range(P)]
    return torch.tensor([matplotlib.colors.to_rgb(name) for name in names])


def paint(view, colours):
    """Each part in its colour (P, 3), mixed as the weights are, over white: (3, size, size)."""
    mixed = torch.einsum("phw,pc->chw", view["parts"], colours)
    return sample.on_white(mixed, view["occupancy"])


def draw_weights(axis, rig):
    """Weights along the line, stacked: together they are 1 everywhere."""
    along = (rig.points - rig.points[0]).norm(dim=-1).numpy()
    axis.stackplot(along, rig.weights.numpy(), colors=colours_of_parts(len(rig.weights)).numpy())
    for name, weight in zip(rig.names, rig.weights):
        rules = weight.numpy() > 0.5
        if rules.mean() > 0.15:                          # there is room for its name
            axis.text(along[rules].mean(), 0.5, name, color="white", fontweight="bold",
                      ha="center", va="center")
    axis.set(xlim=(0, along[-1]), ylim=(0, 1), yticks=(0, 0.5, 1),
             xlabel="along the dashed line, world units", title="weights $w_p$: they sum to 1")


def draw_skinning(rig):
    """How to read it. Left: in the canonical volume every place has a weight for each part; at
    joints they blend. Right: in a frame parts have moved. A sample of a ray is carried back by each
    part, p asks for its weight where that leads (x_p), and the sample is read at the mean of all
    x_p, by weight. Rows: what is then seen, how much of it is whose, and one part alone."""
    figure = new_figure(5.1, "Which part does a place follow? At joints a mixture: "
                        "skinning weights (App. B.1)")
    by_part = colours_of_parts(len(rig.names))
    only_one = torch.full_like(by_part, 0.85)            # the others pale
    only_one[rig.part] = by_part[rig.part]
    canonical = figure.add_axes([0.01, 0.33, 0.33, 0.53])
    picture = paint(rig.views[0], by_part)
    show(canonical, picture)
    canonical.set_title("the canonical volume, by part")
    uv, _ = render.project(rig.points, rig.cameras[0, 0], rig.intrinsics)
    line = uv * picture.shape[-1] - 0.5                  # imshow counts from pixels' centres
    canonical.plot(*line.T, color=DARK, linestyle="--", linewidth=1.2)
    draw_weights(figure.add_axes([0.05, 0.145, 0.27, 0.14]), rig)

    figure.text(0.4, 0.88, r"in a frame:  $x_c = \Sigma_p\, w_p\, x_p$,  with $x_p = R_p^{-1}(x_d "
                r"- t_p)$  and  $w_p = $softmax$_p\, V_p(x_p)$", fontsize=STYLE["axes.titlesize"])
    seen = [sample.on_white(view["rgb"], view["occupancy"]) for view in rig.views]
    mixed = [paint(view, by_part) for view in rig.views]
    alone = [paint(view, only_one) for view in rig.views]
    labels = "what is\nseen", "by part", f"{rig.names[rig.part]}\nalone"
    grid = figure.add_gridspec(3, len(seen) - 1, left=0.455, right=1, top=0.86, bottom=0.03,
                               wspace=0, hspace=0.02)
    for row, (pictures, label) in enumerate(zip((seen, mixed, alone), labels)):
        for column, picture in enumerate(pictures[1:]):
            axis = figure.add_subplot(grid[row, column])
            show(axis, picture)
        place = axis.get_position()
        figure.text(0.45, (place.y0 + place.y1) / 2, label, ha="right", va="center")
    figure.text(0.012, 0.015, rig.origin, fontsize=8, color=GREY)
    return figure


# ---- A run, and the command line -----------------------------------------------------------------
FIGURES = {"rays": (rays_numbers, draw_rays),
           "normalization": (normalization_numbers, draw_normalization),
           "preconditioning": (preconditioning_numbers, draw_preconditioning),
           "path": (path_numbers, draw_path),
           "skinning": (skinning_numbers, draw_skinning)}
OF_DIFFUSION = {"preconditioning", "path"}               # these need stage 2
# Eight chairs, learned by heart: enough to see what the figures are about, not to judge by.
SHORT = train.MICRO | dict(n_objects=8, steps_stage1=160, steps_stage2=180)


def short_run():
    """A run of SHORT's settings, which is not kept -> trained, as of open_run."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):  # a line for every step
            train.learn(train.Settings(**SHORT), folder)
        trained = sample.load_run(folder)
    trained.posenet = None                               # cameras are known
    return trained


def find_run(run, names):
    """The run that figures of these names are drawn of; None where they need none."""
    if run is not None:
        stages = (1, 2) if OF_DIFFUSION.intersection(names) else (1,)
        return sample.open_run(run, stages=stages)
    if names == ["skinning"]:
        return None
    print("no --run: training a small one first, in a minute or so", flush=True)
    return short_run()


def draw(name, trained, folder):
    """Draws one figure -> its path."""
    ask, draw_numbers = FIGURES[name]
    numbers = ask(trained)
    path = Path(folder) / f"figure-{name}.png"
    with plt.rc_context(STYLE):
        save(path, draw_numbers(numbers))
    return path


def parse(arguments=None):
    parser = data.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help=f"these only: {', '.join(FIGURES)}")
    parser.add_argument("--run", help="a trained run (default: a small one is trained first)")
    parser.add_argument("--out", help="folder for the pictures (default: RUN/figures; without a "
                        "run, runs/figures)")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.names if name not in FIGURES]
    if unknown:
        raise BadInput(f"no figure {', '.join(unknown)}: there are {', '.join(FIGURES)}")
    if args.out is None:
        args.out = Path(args.run or "runs") / "figures"
    return args


def choose(args):
    """Names of the figures to draw: those asked for; or all, if the run has what they need."""
    if args.names:
        return args.names
    if args.run is None or (Path(args.run) / "stage2.pt").exists():
        return list(FIGURES)
    print(f"{args.run} has no stage 2: without {' and '.join(sorted(OF_DIFFUSION))}")
    return [name for name in FIGURES if name not in OF_DIFFUSION]


def main(arguments=None):
    args = parse(arguments)
    names = choose(args)
    trained = find_run(args.run, names)
    data.make_folder(args.out)
    for name in names:
        print(f"wrote {draw(name, trained, args.out)}", flush=True)


if __name__ == "__main__":
    data.run_cli(main)
