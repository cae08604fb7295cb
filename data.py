"""Photos or made-up objects in; one Dataset out: square frames, masks, cameras, object indices.

Paper:      Sec. 3.1 (2D images with masks and cameras are all that the method sees), Sec. 4.1.
Shapes:     F frames, S image side, N objects, V views of one object, P primitives, K points.
Simplified: everything sits in memory as uint8 (24 KiB a frame at 64x64), so Objaverse does not fit.
Read next:  render.py, whose first page holds the conventions (camera axes, pixel centres, cube).

    python data.py --data PATH      tells what is in PATH and draws it: try this first
"""
import argparse
import difflib
import json
import re
import struct
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MARGIN = 0.93                    # OURS: largest half side of an object; the cube's is 1

# COIL-100, OURS: what makes the silhouettes agree best with their common visual hull (IoU 0.92 at
# 64x64, mean of 35 objects; its cameras were never published).
COIL_THRESHOLD = 34, 48          # of max(R, G, B); the background has 25 to 27. 48 loses dark parts
                                 # (obj49: 0.45, not 0.90); where 34 floods the photo, 48 (obj99)
COIL_ELEVATION = 18.0            # degrees; 15 to 20 fit equally well, 5 and 30 visibly worse
COIL_DISTANCE = 12.0             # half sides of the cube: all but parallel; 6 fits worse
COIL_DEPTH = 0.5                 # share of the object's depth that its picture's height shows


# ---- A stranger's input -------------------------------------------------------------------------
class BadInput(Exception):
    """What a stranger gave us is wrong: one line saying what, where, and what to do."""


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one BadInput line, with a guess at the flag that was meant."""

    def __init__(self, **kw):
        # A prefix of a flag must be an error: --step for --steps would pass silently otherwise.
        super().__init__(**{"allow_abbrev": False, **kw})

    def error(self, message):
        flags = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []
        for flag in flags:
            for guess in difflib.get_close_matches(flag, self._option_string_actions, 1):
                message += f" (did you mean {guess}?)"
        raise BadInput(message)


def run_cli(main):
    """Call main(); a BadInput becomes one line on stderr and exit status 2, without a traceback."""
    try:
        main()
    except BadInput as err:
        print("error: " + " ".join(str(err).split()), file=sys.stderr)
        sys.exit(2)


# ---- What every source becomes ------------------------------------------------------------------
@dataclass
class Dataset:
    """F frames of N objects, each object inside [-1, 1]^3 with y up.

    images       (F, S, S, 3) uint8, colour x mask, so the background is black
    masks        (F, S, S)    uint8, 255 inside, in between on the edges
    cam2world    (F, 4, 4)    float32, camera x right, y up, looking along -z
    intrinsics   (F, 4)       float32 fx, fy, cx, cy as fractions of the image side: the same at
                              every resolution; pixel centres at half integers, 0.5 is the middle
    object_index (F,)         int64 in 0..N-1          heldout (F,) bool
    """
    images: Tensor
    masks: Tensor
    cam2world: Tensor
    intrinsics: Tensor
    object_index: Tensor
    heldout: Tensor
    names: list
    captions: list               # N of str or None
    layout: str                  # one line: what was detected
    skipped: list                # one line per reason, with counts
    shapes: list = None          # synthetic only: N lists of Primitive

    @property
    def n_objects(self):
        return len(self.names)

    def frames_of(self, k, heldout=None):
        """Frame numbers (V,) int64 of object k: all, or only the (not) held-out ones."""
        keep = self.object_index == k
        if heldout is not None:
            keep = keep & (self.heldout == heldout)
        return keep.nonzero()[:, 0]

    def batch(self, index, size):
        """Frames `index` (...): images (..., 3, size, size), masks (..., 1, size, size) in [0, 1].

        Averages over area: images hold colour x mask, which is what may be averaged.
        """
        if not 0 < size <= self.images.shape[1]:
            raise ValueError(f"size {size} is not in 1..{self.images.shape[1]}, the frames' side")
        flat = index.reshape(-1)
        rgba = torch.cat([self.images[flat], self.masks[flat][..., None]], -1)
        rgba = rgba.permute(0, 3, 1, 2).float() / 255                # (n, 4, S, S)
        if size != rgba.shape[-1]:
            rgba = F.interpolate(rgba, size=(size, size), mode="area")
        rgba = rgba.reshape(*index.shape, 4, size, size)
        return rgba[..., :3, :, :], rgba[..., 3:, :, :]

    def surface_points(self, k, n, seed=0):
        """(n, 3) float32 points, uniform on the true outer surface of object k."""
        if self.shapes is None:
            raise ValueError("surface_points: only synthetic objects have a known surface")
        return sample_surface(self.shapes[k], n, np.random.default_rng([seed, k]))


# ---- Synthetic: primitives ----------------------------------------------------------------------
COLOURS = dict(red=(.80, .16, .14), orange=(.92, .50, .12), yellow=(.93, .82, .22),
               green=(.20, .62, .25), blue=(.17, .33, .80), purple=(.52, .24, .66),
               white=(.88, .88, .86), brown=(.45, .28, .16))
BLACK, GLASS = (.07, .07, .08), (.50, .68, .78)
LIGHT = torch.tensor([0.48, 0.72, 0.50])         # unit length, from the object to the light


@dataclass
class Primitive:
    """A box, or a cylinder about its own y axis: x = centre + rotation @ (half * unit)."""
    kind: str                    # "box": |unit| <= 1;  "cylinder": x^2 + z^2 <= 1, |y| <= 1
    centre: Tensor               # (3,)
    half: Tensor                 # (3,) half sides; a cylinder's x and z are its radius
    colour: tuple                # rgb in [0, 1]
    rotation: Tensor             # (3, 3)


def box(centre, half, colour, tilt=0.0):
    """A box; tilt: radians about x, positive leans the top towards +z."""
    c, s = np.cos(tilt), np.sin(tilt)
    R = torch.tensor([[1, 0, 0], [0, c, -s], [0, s, c]], dtype=torch.float32)
    return Primitive("box", torch.tensor(centre).float(), torch.tensor(half).float(), colour, R)


def cylinder(centre, radius, half_height, colour, lying=False):
    """An upright cylinder, or one that lies along x (a wheel)."""
    R = torch.tensor([[0., 1, 0], [-1, 0, 0], [0, 0, 1]]) if lying else torch.eye(3)
    half = torch.tensor([radius, half_height, radius]).float()
    return Primitive("cylinder", torch.tensor(centre).float(), half, colour, R)


def corners(part):
    """(8, 3) corners of the primitive's own box, in the world."""
    signs = torch.cartesian_prod(*[torch.tensor([-1., 1.])] * 3)
    return part.centre + (signs * part.half) @ part.rotation.T


def to_unit(part, points):
    """Points (n, 3) in the primitive's coordinates: it is [-1, 1]^3 or the unit cylinder."""
    return (points - part.centre) @ part.rotation / part.half


def hit(part, o, d):
    """Distance t (n,) at which rays o + t d, (n, 3) each, enter the primitive; inf for a miss.

    In unit coordinates a ray is still a line with the same t, so a box is three slabs and a
    cylinder one slab and one quadratic: it is hit where the last entry precedes the first exit.
    """
    o, d = to_unit(part, o), d @ part.rotation / part.half
    d = torch.where(d == 0, 1e-9, d)
    step = 1 / d
    enter, leave = -o * step - step.abs(), -o * step + step.abs()    # (n, 3) of the three slabs
    if part.kind == "cylinder":
        a, b = d[:, 0] ** 2 + d[:, 2] ** 2, o[:, 0] * d[:, 0] + o[:, 2] * d[:, 2]
        root = b ** 2 - a * (o[:, 0] ** 2 + o[:, 2] ** 2 - 1)
        root = torch.where(root < 0, -torch.inf, root.clamp(min=0).sqrt())   # a miss never enters
        enter = torch.stack([(-b - root) / a, enter[:, 1]], 1)       # side, caps
        leave = torch.stack([(-b + root) / a, leave[:, 1]], 1)
    t = enter.amax(1)
    return torch.where((t < leave.amin(1)) & (t > 0), t, torch.inf)


def normal_at(part, points):
    """Outward normals (n, 3) at surface points (n, 3): of the face that the point is nearest to."""
    unit = to_unit(part, points)
    if part.kind == "box":
        normal = unit * F.one_hot(unit.abs().argmax(1), 3)
    else:
        radial = unit * torch.tensor([1., 0, 1])
        side = radial.norm(dim=1, keepdim=True) > unit[:, 1:2].abs()
        normal = torch.where(side, radial, unit - radial)
    return F.normalize(normal / part.half @ part.rotation.T, dim=1)


def raytrace(parts, cam2world, intrinsics, size, supersample=3):
    """Exact picture of the primitives: (V, size, size, 4) in [0, 1], colour x alpha, and alpha.

    Lambert shading under one light fixed in the world, with enough ambient that no face is black:
    the colour of a point is the same from everywhere, as the paper's volumes assume.
    """
    V, n = len(cam2world), size * supersample
    u = (torch.arange(n) + 0.5) / n                                  # pixel centres
    fx, fy, cx, cy = intrinsics[:, :, None, None].unbind(1)          # (V, 1, 1)
    d = torch.stack(torch.broadcast_tensors((u - cx) / fx, -(u[:, None] - cy) / fy,
                                            torch.tensor(-1.)), -1)  # (V, n, n, 3) y, x
    d = (d.reshape(V, -1, 3) @ cam2world[:, :3, :3].mT).reshape(-1, 3)
    o = cam2world[:, :3, 3]
    nearest = torch.full((V * n * n,), torch.inf)
    rgb = torch.zeros(V * n * n, 3)
    for part in parts:
        # Only the rays inside the rectangle around the part's corners: some 10x fewer.
        lo, hi = project(corners(part), cam2world, intrinsics).aminmax(dim=1)        # (V, 2)
        inside = (u >= lo[..., None]) & (u <= hi[..., None])         # (V, 2, n)
        rays = (inside[:, 1, :, None] & inside[:, 0, None, :]).reshape(-1).nonzero()[:, 0]
        t = hit(part, o[rays // (n * n)], d[rays])
        front = t < nearest[rays]
        rays, t = rays[front], t[front]
        normal = normal_at(part, o[rays // (n * n)] + t[:, None] * d[rays])
        nearest[rays] = t
        rgb[rays] = (0.65 + 0.35 * normal @ LIGHT)[:, None] * torch.tensor(part.colour).float()
    rgba = torch.cat([rgb, nearest.isfinite()[:, None]], 1).reshape(V, n, n, 4)
    return rgba.reshape(V, size, supersample, size, supersample, 4).mean((2, 4))


def unit_surface(part, n, rng):
    """n points (n, 3) on one primitive in unit coordinates, uniform once scaled to its size."""
    x, y, z = part.half.tolist()
    areas = np.array([y * z, z * x, x * y] if part.kind == "box" else [2 * y, x])    # side, caps
    face = torch.from_numpy(rng.choice(len(areas), n, p=areas / areas.sum()))
    unit = torch.from_numpy(rng.uniform(-1, 1, (n, 3))).float()
    if part.kind == "box":
        return torch.where(F.one_hot(face, 3) > 0, unit.sign(), unit)
    radius = torch.where(face == 0, 1.0, unit[:, 2].abs().sqrt())     # sqrt: uniform on a disc
    angle, y = unit[:, 0] * torch.pi, torch.where(face == 0, unit[:, 1], unit[:, 1].sign())
    return torch.stack([radius * angle.cos(), y, radius * angle.sin()], 1)


def sample_surface(parts, n, rng):
    """(n, 3) uniform points on the outside of the union: those inside another part are dropped."""
    def area(p):
        x, y, z = p.half.tolist()
        return 8 * (x*y + y*z + z*x) if p.kind == "box" else 4 * np.pi * x * (x / 2 + y)
    def inside(p, points):
        unit = to_unit(p, points)
        return (unit.abs().amax(1) <= 1) & ((p.kind == "box") | (unit[:, ::2].norm(dim=1) <= 1))
    weight, found = np.array([area(p) for p in parts]), torch.zeros(0, 3)
    while len(found) < n:
        for part, m in zip(parts, rng.multinomial(2 * n, weight / weight.sum())):
            points = part.centre + (unit_surface(part, m, rng) * part.half) @ part.rotation.T
            # A hair outside: where two parts touch, neither face is on the outside of the union.
            outside = points + 1e-4 * normal_at(part, points)
            buried = [inside(q, outside) for q in parts if q is not part]
            keep = ~torch.stack(buried).any(0) if buried else torch.ones(m, dtype=torch.bool)
            found = torch.cat([found, points[keep]])
    return found[torch.from_numpy(rng.permutation(len(found))[:n])]


# ---- Synthetic: three families ------------------------------------------------------------------
def pick_colours(rng, n):
    """n different (name, slightly jittered rgb)."""
    names = rng.choice(list(COLOURS), n, replace=False)
    return [(str(c), tuple(np.clip(np.add(COLOURS[c], rng.uniform(-.05, .05, 3)), .08, .95)))
            for c in names]


def four_legs(rng, x, z, bottom, top, colour):
    """Four legs, square or round, at the corners of a half width x and half depth z."""
    r, is_round = rng.uniform(.06, .08), rng.random() < .4
    y, h = (bottom + top) / 2, (top - bottom) / 2
    at = [(sx * (x - r), y, sz * (z - r)) for sx in (-1, 1) for sz in (-1, 1)]
    return [cylinder(c, r, h, colour) if is_round else box(c, (r, h, r), colour) for c in at]


def pedestal(x, bottom, top, colour):
    """One column on a round foot of radius x."""
    return [cylinder((0, (bottom + top) / 2 + .05, 0), .10, (top - bottom) / 2 - .05, colour),
            cylinder((0, bottom + .06, 0), x, .06, colour)]


def make_chair(rng):
    """Primitives and caption of a chair: legs or pedestal, solid or slatted back, armrests."""
    (name, colour), (name2, colour2) = pick_colours(rng, 2)
    x, z, seat, t = rng.uniform(.42, .55), rng.uniform(.42, .52), rng.uniform(.75, .95), .06
    height = rng.uniform(.35, .5) if rng.random() < .3 else rng.uniform(.7, .95)     # of the back
    parts = [box((0, seat, 0), (x, t, z), colour)]
    central = rng.random() < .25
    parts += pedestal(.8 * x, 0, seat - t, colour2) if central else \
        four_legs(rng, x, z, 0, seat - t, colour2)
    lean = -rng.uniform(0, .15)                          # the top of the back leans backwards
    middle, slats = seat + t + height / 2, rng.random() < .4
    backwards = -z + .06 + np.tan(lean) * height / 2     # its foot stands on the seat's back edge
    if slats:
        for i in np.linspace(-1, 1, rng.integers(3, 5)):
            at = (i * (x - .055), middle, backwards)
            parts.append(box(at, (.055, height / 2, .055), colour, lean))
        rail = -z + .06 + np.tan(lean) * height
        parts.append(box((0, seat + t + height, rail), (x, .07, .06), colour, lean))
    else:
        parts.append(box((0, middle, backwards), (x, height / 2, .06), colour, lean))
    arms = rng.random() < .4
    if arms:
        rise = min(rng.uniform(.25, .35), .8 * height)
        for at in (-x + .055, x - .055):
            parts.append(box((at, seat + rise, 0), (.055, .05, z), colour2))
            parts.append(box((at, seat + rise / 2, z - .08), (.055, rise / 2, .055), colour2))
    legs = f"a {name2} pedestal" if central else f"{name2} legs"
    extra = ["a slatted back"] * bool(slats) + ["armrests"] * bool(arms)
    return parts, caption(f"{name} chair", [legs] + extra)


def make_table(rng):
    """Primitives and caption of a table: round or not, legs or pedestal, perhaps a shelf."""
    (name, colour), (name2, colour2) = pick_colours(rng, 2)
    is_round, central, shelf = rng.random() < .4, rng.random() < .35, rng.random() < .35
    height, t = rng.uniform(.7, 1.2), rng.uniform(.05, .07)
    x = rng.uniform(.70, .85) if is_round else rng.uniform(.75, .93)
    z = x if is_round else rng.uniform(.5, .7)
    inner = (.68 * x, .68 * x) if is_round else (.95 * x, .95 * z)
    def plate(y, x, z):
        return cylinder((0, y, 0), x, t, colour) if is_round else box((0, y, 0), (x, t, z), colour)
    parts = [plate(height, x, z)]
    parts += pedestal(.6 * z, 0, height - t, colour2) if central else \
        four_legs(rng, *inner, 0, height - t, colour2)
    if shelf:
        parts.append(plate(height * rng.uniform(.35, .5), .68 * x, .8 * z))
    legs = f"a {name2} pedestal" if central else f"{name2} legs"
    return parts, caption(f"{name} {'round ' * is_round}table", [legs] + ["a shelf"] * bool(shelf))


def make_vehicle(rng):
    """Primitives and caption of a car, van or truck, looking along +z."""
    (name, colour), (name2, colour2) = pick_colours(rng, 2)
    kind = str(rng.choice(["car", "van", "truck"]))
    x, z, r = rng.uniform(.36, .44), .93, rng.uniform(.17, .23)
    low, h = r * .9, rng.uniform(.14, .18)               # body: bottom, half height
    top = low + 2 * h
    parts = [box((0, low + h, 0), (x, h, z), colour)]
    def cabin(z0, z1, up):                               # glass all round under a painted roof
        at, half = (z0 + z1) / 2, (z1 - z0) / 2
        parts.append(box((0, top + up / 2, at), (x * .9, up / 2, half), GLASS))
        parts.append(box((0, top + up + .05, at), (x * .92, .05, half + .02), colour))
    if kind == "car":
        cabin(-.62 + rng.uniform(-.1, .1), rng.uniform(.2, .4), rng.uniform(.2, .26))
    elif kind == "van":
        cabin(-.91, rng.uniform(.45, .65), rng.uniform(.35, .5))
    else:
        cabin(.35, rng.uniform(.8, .9), rng.uniform(.25, .35))
        up = rng.uniform(.2, .35)
        parts.append(box((0, top + up, (.28 - z) / 2), (x, up, (.28 + z) / 2), colour2))
    for s in (-1, 1):
        parts.append(box((s * (x - .12), low + 1.2 * h, z), (.08, .06, .03), COLOURS["yellow"]))
        for end in (-1, 1):
            at = (s * x, r, end * rng.uniform(.54, .6))
            parts.append(cylinder(at, r, .075, BLACK, lying=True))
    load = [f"a {name2} box"] if kind == "truck" else []
    return parts, caption(f"{name} {kind}", load + ["black wheels"])


def caption(noun, details):
    """'a red chair with blue legs, a slatted back and armrests'."""
    listed = ", ".join(details[:-1]) + " and " * (len(details) > 1) + details[-1]
    return f"a {noun} with {listed}".replace("a orange", "an orange")


def fit_cube(parts):
    """Centre the parts' common box on 0; largest half side MARGIN, unless a corner would leave
    the frame of `synthetic_cameras`: then smaller."""
    points = torch.cat([corners(p) for p in parts])
    lo, hi = points.aminmax(dim=0)
    centre = (lo + hi) / 2
    scale = min(MARGIN / (hi - lo).max() * 2, 1.25 / (points - centre).norm(dim=1).max())
    return [Primitive(p.kind, (p.centre - centre) * scale, p.half * scale, p.colour, p.rotation)
            for p in parts]


def synthetic_cameras(n_views, rng):
    """Cameras on a sphere of radius 4 looking at 0: cam2world (V, 4, 4), intrinsics (V, 4)."""
    azimuth = (np.arange(n_views) + rng.random(n_views)) / n_views * 2 * np.pi     # stratified
    elevation = np.radians(rng.uniform(-5, 50, n_views))
    where = 4 * np.stack([np.sin(azimuth) * np.cos(elevation), np.sin(elevation),
                          np.cos(azimuth) * np.cos(elevation)], 1)
    # A sphere of radius 1.25 seen from 4 spans 2 tan(asin(1.25 / 4)) = 0.658 at unit depth: 95 %.
    return look_at(where), torch.tensor([[1.45, 1.45, 0.5, 0.5]]).repeat(n_views, 1)


def load_synthetic(size, seed, n_objects, n_views, wanted=()):
    """Object k is the same whatever n_objects is; families take turns."""
    names = [f"{k:04d}" for k in range(n_objects)]
    built, shapes, captions = [], [], []
    for k in choose(names, wanted, "synthetic"):
        rng = np.random.default_rng([seed, k])
        parts, text = (make_chair, make_table, make_vehicle)[k % 3](rng)
        parts = fit_cube(parts)
        pose, camera = synthetic_cameras(n_views, rng)
        rgba = (raytrace(parts, pose, camera, size) * 255).round().byte()
        built.append((rgba, pose, camera)), shapes.append(parts), captions.append(text)
    names = [names[k] for k in choose(names, wanted, "synthetic")]
    return collect(built, names, captions,
                   "synthetic: chairs, tables and vehicles of boxes and cylinders", [], shapes)


# ---- Cameras ------------------------------------------------------------------------------------
def look_at(where, target=(0., 0, 0)):
    """cam2world (n, 4, 4) of cameras at `where` (n, 3) that look at target, y up."""
    back = np.asarray(where, dtype=np.float64) - np.asarray(target)
    back /= np.linalg.norm(back, axis=1, keepdims=True)
    right = np.cross([0.0, 1, 0], back)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    pose = np.tile(np.eye(4), (len(back), 1, 1))
    pose[:, :3] = np.stack([right, np.cross(back, right), back, where], -1)
    return torch.from_numpy(pose).float()


def project(points, cam2world, intrinsics):
    """Points (K, 3) seen by V cameras: (V, K, 2) as fractions of the image, x right, y down."""
    local = (points - cam2world[:, None, :3, 3]) @ cam2world[:, :3, :3]          # (V, K, 3)
    fx, fy, cx, cy = intrinsics[:, :, None].unbind(1)
    return torch.stack([cx - fx * local[..., 0] / local[..., 2],
                        cy + fy * local[..., 1] / local[..., 2]], -1)


# ---- Photos: what a layout says -----------------------------------------------------------------
@dataclass
class View:
    """One photo as its layout describes it, before anything is done to it."""
    image: Path
    mask: Path                   # or None: the mask is the image's own alpha
    pose: np.ndarray             # (4, 4) cam2world, camera x right, y up, looking along -z
    camera: tuple                # fx, fy, cx, cy in pixels of ...
    of: tuple                    # ... an image of this (width, height)
    lens: tuple = (0, 0, 0, 0)   # k1, k2, p1, p2
    white: bool = False          # the background is white, and that is the mask


FLIP = np.diag([1.0, -1, -1, 1])             # camera x right, y down, along +z (OpenCV) <-> ours
PHOTOS = (".png", ".jpg", ".jpeg")


def read_array(path, columns):
    """Rows of `columns` numbers, from .npy or text."""
    try:
        npy = path.suffix == ".npy"
        array = np.load(path) if npy else np.array(path.read_text().split(), float)
        return array.astype(float).reshape(-1, columns)
    except (OSError, ValueError, EOFError) as err:
        raise BadInput(f"{path}: expected rows of {columns} numbers ({err})")


def read_image(path):
    """(H, W, 3 or 4) uint8."""
    try:
        image = np.asarray(iio.imread(path))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file")
    except Exception as err:             # decoders raise anything from SyntaxError to OSError
        raise BadInput(f"{path}: not a readable image, perhaps truncated ({err})")
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    if image.ndim == 2:
        image = np.stack([image] * 3, -1)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4):
        raise BadInput(f"{path}: expected RGB or RGBA, found {image.shape} {image.dtype}")
    return image


def photos_in(folder):
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in PHOTOS)


def to_pose(rotation, where):
    return np.vstack([np.column_stack([rotation, where]), [0, 0, 0, 1]])


def find_mask(image):
    """The mask of images/a.jpg: masks/a.jpg, masks/a.png or masks/a.jpg.png, or None."""
    for folder in {image.parent.name.replace("image", "mask"), "masks", "mask"}:
        for name in (image.name, image.stem + ".png", image.name + ".png"):
            path = image.parent.parent / folder / name
            if folder != image.parent.name and path.exists():
                return path
    return None


# Readers, one per layout: (folder, size, skipped) -> the object's views and the world's up vector,
# None where the layout leaves it open. `skipped` counts by reason what was listed and is not there.
def read_transforms(folder, size, skipped):
    """NeRF and its heirs: one json; cam2world in our own axes; world z up."""
    path = next(folder / n for n in TRANSFORMS if (folder / n).exists())
    meta, views, of = json.loads(path.read_text()), [], None
    for frame in meta["frames"]:
        get = {"camera_angle_x": 0, **meta, **frame}         # a frame may have its own camera
        stem = folder / get["file_path"]                     # often without its suffix
        image = next((p for s in ("", *PHOTOS) if (p := Path(f"{stem}{s}")).is_file()), None)
        if image is None:
            skipped["listed frames have no file"] += 1
            continue
        if get.get("k3") or get.get("k4") or "FISHEYE" in get.get("camera_model", ""):
            raise BadInput(f"{path}: of lens terms only k1, k2, p1, p2 are known: undistort first")
        of = (get["w"], get["h"]) if "w" in get and "h" in get else of
        w, h = of = of or read_image(image).shape[1::-1]
        fx = get["fl_x"] if "fl_x" in get else w / (2 * np.tan(get["camera_angle_x"] / 2) or np.inf)
        camera = fx, get.get("fl_y", fx), get.get("cx", w / 2), get.get("cy", h / 2)
        mask = folder / get["mask_path"] if "mask_path" in get else find_mask(image)
        lens = tuple(get.get(k, 0) for k in ("k1", "k2", "p1", "p2"))
        views.append(View(image, mask, np.array(get["transform_matrix"], float), camera, of, lens))
    return views, (0, 0, 1)


def read_srn(folder, size, skipped):
    """SRN's ShapeNet renders: one text file a pose, OpenCV's cam2world; photos on white."""
    path = folder / "intrinsics.txt"         # f cx cy 0, origin, near, scale, height width
    f, cx, cy, *_, h, w = read_array(path, 1)[:, 0]
    views = []
    for image in photos_in(folder / "rgb"):
        path = folder / "pose" / f"{image.stem}.txt"
        if not path.exists():
            skipped["photos have no pose"] += 1
            continue
        views.append(View(image, find_mask(image), read_array(path, 4) @ FLIP,
                          (f, f, cx, cy), (w, h), white=True))
    # OURS: its sets differ in which axis is up; but it is an axis, and the cameras stand upright.
    up = sum(v.pose[:3, 1] for v in views)
    return views, np.where(np.abs(up) == np.abs(up).max(), np.sign(up), 0) if views else None


def read_llff(folder, size, skipped):
    """LLFF: poses_bounds.npy, a row a photo in the order of their names."""
    # The smallest copy of the photos (images, images_4, images_8 ...) that is still large enough.
    copies = sorted((min(read_image(p[0]).shape[:2]), p) for d in folder.glob("images*")
                    if d.is_dir() and (p := photos_in(d)))
    if not copies:
        raise BadInput(f"{folder}: poses_bounds.npy, but no photos in images or images_8")
    photos = next((p for side, p in copies if side >= size), copies[-1][1])
    path = folder / "poses_bounds.npy"
    rows = read_array(path, 17)              # 3x5 [R | t | height, width, focal], near, far
    if len(rows) != len(photos):
        raise BadInput(f"{path}: {len(rows)} poses for {len(photos)} photos in {photos[0].parent}")
    views = []
    for image, row in zip(photos, rows):
        down, right, back, where, (h, w, f) = row[:15].reshape(3, 5).T
        pose = to_pose(np.stack([right, -down, back], 1), where)     # not [right, up, back]
        views.append(View(image, find_mask(image), pose, (f, f, w / 2, h / 2), (w, h)))
    return views, None


MODELS = {"SIMPLE_PINHOLE": "fxy", "PINHOLE": "ffxy", "SIMPLE_RADIAL": "fxyk", "RADIAL": "fxykk",
          "OPENCV": "ffxykkpp"}              # the order of COLMAP's parameters; ids 0 to 4
UNKNOWN = {"OPENCV_FISHEYE": 8, "FULL_OPENCV": 12, "FOV": 5, "SIMPLE_RADIAL_FISHEYE": 4,
           "RADIAL_FISHEYE": 5, "THIN_PRISM_FISHEYE": 12}    # ids 5 to 10: how many parameters


def read_colmap(folder, size, skipped):
    """COLMAP, as MVImgNet ships it: a sparse model, OpenCV's world-to-camera as a quaternion."""
    model = next(folder / m for m in SPARSE if (folder / m).exists())
    cameras, images = (colmap_text if model.suffix == ".txt" else colmap_binary)(model.parent)
    views = []
    for name, (w, x, y, z), t, number in sorted(images):
        model, width, height, params = cameras[number]
        if model not in MODELS:
            raise BadInput(f"{folder}: camera model {model} is not known; run COLMAP's "
                           f"image_undistorter, which makes one of {', '.join(MODELS)}")
        image = folder / "images" / name
        if not image.is_file():
            skipped["listed frames have no file"] += 1
            continue
        R = np.array([[1 - 2*(y*y + z*z), 2*(x*y - z*w), 2*(x*z + y*w)],
                      [2*(x*y + z*w), 1 - 2*(x*x + z*z), 2*(y*z - x*w)],
                      [2*(x*z - y*w), 2*(y*z + x*w), 1 - 2*(x*x + y*y)]])
        f, cx, cy, k, p = ([v for v, d in zip(params, MODELS[model]) if d == c] for c in "fxykp")
        lens = (*k, 0, 0)[:2] + (*p, 0, 0)[:2]
        views.append(View(image, find_mask(image), to_pose(R.T, -R.T @ t) @ FLIP,
                          (f[0], f[-1], *cx, *cy), (width, height), lens))
    return views, None


def colmap_text(folder):
    """cameras: {number: (model, width, height, params)}; images: (name, quaternion, t, number)."""
    def rows(name):
        return [r.split() for r in (folder / name).read_text().splitlines() if r[:1] != "#"]
    cameras = {r[0]: (r[1], int(r[2]), int(r[3]), [float(v) for v in r[4:]])
               for r in rows("cameras.txt") if r}
    images = [(" ".join(r[9:]), [float(v) for v in r[1:5]], [float(v) for v in r[5:8]], r[8])
              for r in rows("images.txt")[::2] if r]         # every other line lists 2D points
    return cameras, images


def colmap_binary(folder):
    """The same from cameras.bin and images.bin, little-endian."""
    data, at, cameras, images = (folder / "cameras.bin").read_bytes(), 8, {}, []
    while at < len(data):
        number, model, width, height = struct.unpack_from("<IiQQ", data, at)
        name = (*MODELS, *UNKNOWN)[model]
        count = UNKNOWN.get(name) or len(MODELS[name])
        params = struct.unpack_from(f"<{count}d", data, at + 24)
        cameras[number], at = (name, width, height, params), at + 24 + 8 * count
    data, at = (folder / "images.bin").read_bytes(), 8
    while at < len(data):
        _, *qt, number = struct.unpack_from("<I7dI", data, at)
        end = data.index(b"\0", at + 64)
        images.append((data[at + 64:end].decode(), qt[:4], qt[4:], number))
        at = end + 9 + 24 * struct.unpack_from("<Q", data, end + 1)[0]       # its 2D points
    return cameras, images


def read_objaverse(folder, size, skipped):
    """Renders of Objaverse (as for Zero-1-to-3): NNN.png, NNN.npy a (3, 4) world-to-camera."""
    views = []
    for image in photos_in(folder):
        path = image.with_suffix(".npy")
        if not path.exists():
            skipped["photos have no .npy pose"] += 1
            continue
        RT = read_array(path, 4)
        if RT.shape != (3, 4):
            raise BadInput(f"{path}: its pose has shape {RT.shape}, not (3, 4)")
        pose = to_pose(RT[:, :3].T, -RT[:, :3].T @ RT[:, 3])
        # The object is in front: along -z in Blender's axes, which are ours; some scripts write
        # OpenCV's, where it is along +z.  The lens has 35 mm, the sensor 32.
        pose = pose @ FLIP if RT[2, 3] > 0 else pose
        views.append(View(image, find_mask(image), pose, (35 / 32, 35 / 32, .5, .5), (1, 1)))
    return views, (0, 0, 1)


# ---- Photos: one path for all layouts -----------------------------------------------------------
def check(view):
    """BadInput unless the camera can be one."""
    pose = view.pose
    if pose.shape != (4, 4):
        raise BadInput(f"{view.image}: its pose has shape {pose.shape}, not (4, 4)")
    R = pose[:3, :3]
    if not np.isfinite(pose).all():
        raise BadInput(f"{view.image}: its pose is not finite")
    if np.abs(R @ R.T - np.eye(3)).max() > 0.02 or np.linalg.det(R) < 0:
        raise BadInput(f"{view.image}: the 3x3 part of its pose is not a rotation")
    try:
        camera = np.array([*view.camera, *view.of, *view.lens], float)
    except (ValueError, TypeError):
        camera = np.array([np.nan] * 6)
    if not np.isfinite(camera).all() or (camera[[0, 1, 4, 5]] <= 0).any():
        raise BadInput(f"{view.image}: focal length {view.camera[0]}, image {view.of[0]} x "
                       f"{view.of[1]}: these must be finite and positive")


def read_view(view):
    """RGBA (H, W, 4) uint8 without lens distortion and camera in its pixels; None: no mask."""
    image = read_image(view.image)
    h, w = image.shape[:2]
    if view.mask is not None:
        mask = read_image(view.mask)[..., :3].max(-1)
        if mask.shape != (h, w):
            raise BadInput(f"{view.mask}: mask is {mask.shape[1]}x{mask.shape[0]}, photo {w}x{h}")
        mask = np.where(mask > 127, 255, 0)
    elif image.shape[2] == 4 and image[..., 3].min() < 255:
        mask = image[..., 3]
    elif view.white:
        mask = np.where(image[..., :3].min(-1) < 250, 255, 0)
    else:
        return None
    if mask.max() == 0:
        raise BadInput(f"{view.mask or view.image}: the mask is empty; paint the object white, "
                       "or remove this view")
    sx, sy = w / view.of[0], h / view.of[1]
    if abs(sx / sy - 1) > 0.02 and view.of != (1, 1):
        raise BadInput(f"{view.image}: {w}x{h}, but its camera is for {view.of[0]}x{view.of[1]}")
    rgba = np.concatenate([image[..., :3], mask[..., None].astype(np.uint8)], -1)
    camera = np.array(view.camera, float) * [sx, sy, sx, sy]
    return undistort(rgba, camera, view.lens), camera


def undistort(image, camera, lens):
    """What a pinhole with the same camera sees (OpenCV's radial and tangential model)."""
    if not any(lens):
        return image
    (h, w), (fx, fy, cx, cy), (k1, k2, p1, p2) = image.shape[:2], camera, lens
    x, y = np.meshgrid((np.arange(w) + 0.5 - cx) / fx, (np.arange(h) + 0.5 - cy) / fy)
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2 ** 2
    u = fx * (x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)) + cx       # where it was seen
    v = fy * (y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y) + cy
    grid = torch.from_numpy(np.stack([2 * u / w - 1, 2 * v / h - 1], -1)).float()
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    out = F.grid_sample(planes, grid[None], align_corners=False)             # outside: no mask
    return out[0].permute(1, 2, 0).round().byte().numpy()


def mask_box(mask):
    """Left, right, top, bottom (V, 4) float of masks (V, H, W) > half, in pixels' edges."""
    mask = mask > mask.amax((1, 2), keepdim=True) / 2
    sides = [m.byte() for m in (mask.any(1), mask.any(2))]
    return torch.stack([x for m in sides for x in
                        (m.argmax(1), m.shape[1] - m.flip(1).argmax(1))], 1).float()


def resample(photos, corners, side, size):
    """Square windows of photos (H, W, 4) uint8 as (V, size, size, 4) uint8, colour x mask.

    corners: V (left, top) in pixels; a window may reach outside, where it is black.
    """
    out = []
    for photo, (x, y) in zip(photos, corners):
        h, w = photo.shape[:2]
        window = np.zeros((side, side, 4), np.uint8)
        window[max(-y, 0):h - y, max(-x, 0):w - x] = photo[max(y, 0):y + side, max(x, 0):x + side]
        planes = torch.from_numpy(window).permute(2, 0, 1)[None].float()
        planes[:, :3] *= planes[:, 3:] / 255     # before averaging, or the background bleeds in
        out.append(F.interpolate(planes, size=(size, size), mode="bilinear", antialias=True))
    return torch.cat(out).permute(0, 2, 3, 1).round().clamp(0, 255).byte()


def photo_object(folder, read, size, skipped):
    """One object of one layout: RGBA (V, size, size, 4), cam2world (V, 4, 4), intrinsics (V, 4);
    None if no view has a mask."""
    try:
        views, up = read(folder, size, skipped)
    except (ValueError, LookupError, TypeError, AttributeError, OSError, struct.error) as err:
        raise BadInput(f"{folder}: its files are missing, damaged or of another layout ({err!r})")
    if not views:
        raise BadInput(f"{folder}: none of its photos is there")
    kept, photos, cameras = [], [], []
    for view in views:
        check(view)
        found = read_view(view)
        if found is None:
            skipped["views have no mask"] += 1
            continue
        if photos and found[0].shape != photos[0].shape:
            raise BadInput(f"{view.image}: {found[0].shape[:2]}, but the object's other photos are "
                           f"{photos[0].shape[:2]}: one object, one image size")
        kept.append(view), photos.append(found[0]), cameras.append(found[1])
    if not kept:
        return None
    if len(kept) < 3:
        raise BadInput(f"{folder}: {len(kept)} usable views; a shape needs at least 3")
    boxes = torch.cat([mask_box(torch.from_numpy(p[None, ..., 3])) for p in photos])
    height, width = photos[0].shape[:2]
    largest, side = (boxes[:, 1::2] - boxes[:, ::2]).max(), max(width, height)
    middle = torch.tensor([width, height]).expand(len(kept), 2) / 2
    if largest < 0.7 * side:                 # small in the frame: a window that follows the object
        side, middle = int(1.15 * largest), (boxes[:, 1::2] + boxes[:, ::2]) / 2
    corner = (middle - side / 2).round().int().tolist()
    rgba = resample(photos, corner, side, size)
    intrinsics = torch.tensor([[fx, fy, cx - x, cy - y] for (fx, fy, cx, cy), (x, y)
                               in zip(cameras, corner)]).float() / side
    poses = normalize_world(rgba[..., 3], np.stack([v.pose for v in kept]), intrinsics, up, folder)
    return rgba, poses, intrinsics


def normalize_world(masks, poses, intrinsics, up, where):
    """Move, turn and scale the world so that the masks' visual hull fills the cube, y up.

    masks (V, S, S), poses (V, 4, 4) numpy float64 -> (V, 4, 4) float32
    """
    up = np.mean(poses[:, :3, 1], 0) if up is None else np.array(up, float)
    x, y, z = up / np.linalg.norm(up)        # the shortest turn that takes up to (0, 1, 0)
    a = 1 / max(1 + y, 1e-6)
    R = np.diag([1.0, -1, -1]) if y < -0.9999 else np.array(
        [[1 - a * x * x, -x, -a * x * z], [x, y, z], [-a * x * z, -z, 1 - a * z * z]])
    poses = poses.copy()
    poses[:, :3] = R @ poses[:, :3]
    # Rays through the middles of the masks: the point nearest to all of them.
    middle = mask_box(masks).unflatten(1, (2, 2)).mean(2).numpy() / masks.shape[1]
    fx, fy, cx, cy = intrinsics.numpy().T
    ray = np.stack([(middle[:, 0] - cx) / fx, -(middle[:, 1] - cy) / fy, -np.ones(len(fx))], 1)
    ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    ray = np.einsum("vij,vj->vi", poses[:, :3, :3], ray)
    across = np.eye(3) - ray[:, :, None] * ray[:, None]
    centre = np.linalg.lstsq(across.sum(0), (across @ poses[:, :3, 3:]).sum(0)[:, 0], rcond=None)[0]
    reach = np.linalg.norm(poses[:, :3, 3] - centre, axis=1) * 0.75 / fx     # of a frame's corner
    lo, hi = centre - np.median(reach), centre + np.median(reach)
    for _ in range(3):                       # coarse, then twice into the box that was found
        inside = hull(masks, torch.from_numpy(poses).float(), intrinsics, lo, hi)
        if not inside.any():
            raise BadInput(f"{where}: the masks' visual hull is empty: cameras and masks disagree; "
                           "is the camera convention (axes, world-to-camera) the layout's own?")
        cell = (hi - lo) / inside.shape[0]
        found = inside.nonzero().numpy()
        lo, hi = lo + (found.min(0) - 1) * cell, lo + (found.max(0) + 2) * cell
    lo, hi = lo + cell, hi - cell
    poses[:, :3, 3] = (poses[:, :3, 3] - (lo + hi) / 2) * (2 * MARGIN / (hi - lo).max())
    return torch.from_numpy(poses).float()


def hull(masks, poses, intrinsics, lo, hi, side=48):
    """Visual hull (side, side, side) bool, x y z: cells inside the mask in 95 % of the views that
    have them in frame, which must be half of all (a mask or two may be wrong)."""
    steps = torch.cartesian_prod(*[(torch.arange(side) + 0.5) / side] * 3)
    points = torch.from_numpy(lo).float() + steps * torch.from_numpy(hi - lo).float()
    seen, hits, S = torch.zeros(len(points)), torch.zeros(len(points)), masks.shape[1]
    for mask, pose, camera in zip(masks, poses, intrinsics):
        at = (project(points, pose[None], camera[None])[0] * S).floor().long()
        front = (points - pose[:3, 3]) @ pose[:3, 2] < 0
        frame = front & (at >= 0).all(1) & (at < S).all(1)
        at = at.clamp(0, S - 1)
        seen += frame
        hits += frame & (mask[at[:, 1], at[:, 0]] > 127)
    return ((hits >= 0.95 * seen) & (seen >= 0.5 * len(masks))).reshape(side, side, side)


# ---- Photos: coil-100 ---------------------------------------------------------------------------
def components(mask):
    """4-connected components of masks (V, H, W) bool: int64 labels, 0 outside.

    Every pixel starts with its own number; each run along rows, then columns, takes its maximum.
    """
    label = np.arange(1, mask.size + 1).reshape(mask.shape) * mask
    while True:
        before = label
        for axes in ((0, 1, 2), (0, 2, 1)):
            m, flat = mask.transpose(axes), label.transpose(axes).reshape(-1)
            start = np.ones(m.shape, bool)
            start[..., 1:] = m[..., 1:] != m[..., :-1]
            start = start.reshape(-1).nonzero()[0]
            flat = np.repeat(np.maximum.reduceat(flat, start), np.diff(start, append=flat.size))
            label = flat.reshape(m.shape).transpose(axes)
        if (label == before).all():
            return label


def coil_masks(images, threshold=COIL_THRESHOLD[0]):
    """Masks (V, H, W) bool of photos (V, H, W, 3): brighter than the background's 25 to 27 of 255;
    the largest component, with its holes filled (dark parts of the object)."""
    label = components(images.max(-1) > threshold)
    area = np.bincount(label.reshape(-1))[label] * (label > 0)
    object = (area == area.max((1, 2), keepdims=True)) & (label > 0)
    label = components(np.pad(~object, ((0, 0), (1, 1), (1, 1)), constant_values=True))
    mask = (label != label[:, :1, :1])[:, 1:-1, 1:-1]
    flooded = mask[:, ::mask.shape[1] - 1, ::mask.shape[2] - 1].all((1, 2))      # all four corners
    if flooded.any() and threshold != COIL_THRESHOLD[1]:
        mask[flooded] = coil_masks(images[flooded], COIL_THRESHOLD[1])
    return mask


def coil_object(files, size, skipped):
    """One object of COIL-100, {degrees: path}: as photo_object returns it.

    Its cameras were never published. OURS: a circle at elevation e, far away, so that a view is
    nearly parallel; every photo was cropped to the object's box and rescaled to 128 pixels, so the
    box's middle is where the axis is seen, and the scale follows from the object's height H, the
    same in all views: the box is  H cos e + (part of the depth) sin e  high, and the depth is about
    the width seen a quarter turn later.
    """
    degrees = sorted(files)
    images = np.stack([read_image(files[d])[..., :3] for d in degrees])
    masks = coil_masks(images)
    if not masks.any((1, 2)).all():
        raise BadInput(f"{files[degrees[0]]}: a view of this object is black: its mask is empty")
    left, right, top, bottom = mask_box(torch.from_numpy(masks).byte()).numpy().T
    width, height, S = right - left, bottom - top, images.shape[1]
    turn = (np.array(degrees)[:, None] + 90 - degrees) % 360
    later = np.minimum(turn, 360 - turn).argmin(1)               # the view nearest to + 90 degrees
    tilt, pixel = np.radians(COIL_ELEVATION), np.ones(len(degrees))
    for _ in range(50):                      # world units a pixel, H cos e = 1; contracts
        pixel = (1 + COIL_DEPTH * np.tan(tilt) * (width * pixel)[later]) / height
    pixel *= 2 * MARGIN / (np.maximum(width, height) * pixel).max()
    a = np.radians(degrees)
    back = np.stack([np.sin(a) * np.cos(tilt), np.sin(tilt) + 0 * a, np.cos(a) * np.cos(tilt)], 1)
    focal = COIL_DISTANCE / pixel / S
    intrinsics = np.stack([focal, focal, (left + right) / 2 / S, (top + bottom) / 2 / S], 1)
    rgba = np.concatenate([images, masks[..., None] * np.uint8(255)], -1)
    rgba = resample(rgba, [(0, 0)] * len(rgba), S, size)
    return rgba, look_at(COIL_DISTANCE * back), torch.from_numpy(intrinsics).float()


# ---- Load ---------------------------------------------------------------------------------------
TRANSFORMS = "transforms.json", "transforms_train.json"
SPARSE = [f"{d}/images.{e}" for d in ("sparse/0", "sparse") for e in ("bin", "txt")]
LAYOUTS = ("transforms.json or transforms_train.json (NeRF); rgb/ pose/ intrinsics.txt (SRN); "
           "poses_bounds.npy with images*/ masks*/ (LLFF); sparse/0 with images/ masks/ (COLMAP, "
           "MVImgNet); 000.png 000.npy (Objaverse renders); obj1__0.png (COIL-100)")


def find_objects(folder, root, depth=3):
    """All objects below a folder: (name, layout, function (size, skipped) -> RGBA, poses, ...)."""
    coil = {}
    for path in folder.glob("obj*__*.png"):
        if match := re.fullmatch(r"obj(\d+)__(\d+)", path.stem):
            coil.setdefault(int(match[1]), {})[int(match[2])] = path
    if coil:
        return [(f"obj{k}", "COIL-100", partial(coil_object, coil[k])) for k in sorted(coil)]
    if any((folder / n).exists() for n in TRANSFORMS):
        layout, read = "NeRF transforms", read_transforms
    elif (folder / "rgb").is_dir() and (folder / "pose").is_dir():
        layout, read = "SRN", read_srn
    elif (folder / "poses_bounds.npy").exists():
        layout, read = "LLFF", read_llff
    elif any((folder / m).exists() for m in SPARSE):
        layout, read = "COLMAP", read_colmap
    elif any(p.with_suffix(".png").exists() for p in folder.glob("*.npy")):
        layout, read = "Objaverse renders", read_objaverse
    else:
        return [found for sub in sorted(folder.iterdir()) if depth and sub.is_dir()
                for found in find_objects(sub, root, depth - 1)]
    name = folder.name if folder == root else folder.relative_to(root).as_posix()
    return [(name, layout, partial(photo_object, folder, read))]


def choose(names, wanted, path):
    """Indices of the wanted names, of all if none is named."""
    if unknown := set(wanted) - set(names):
        raise BadInput(f"{path}: no object {', '.join(sorted(unknown))}; there are: "
                       f"{', '.join(names[:40])}{' ...' * (len(names) > 40)}")
    return [k for k, name in enumerate(names) if name in wanted or not wanted]


def collect(built, names, captions, layout, skipped, shapes=None):
    """The Dataset of N objects (RGBA, cam2world, intrinsics), nothing held out."""
    rgba, poses, cameras = (torch.cat(parts) for parts in zip(*built))
    index = torch.cat([torch.full((len(b[0]),), k) for k, b in enumerate(built)])
    return Dataset(rgba[..., :3], rgba[..., 3], poses, cameras, index,
                   torch.zeros_like(index).bool(), names, captions, layout, skipped, shapes)


def load_photos(path, size, wanted):
    """The Dataset of a folder of photos, whatever its layout; nothing is held out yet."""
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise BadInput(f"{path}: no such folder (nor is it 'synthetic')")
    found = find_objects(folder, folder)
    if not found:
        raise BadInput(f"{path}: no layout recognised here or below. Known are: {LAYOUTS}")
    skipped, built, names = Counter(), [], []
    for k in choose([name for name, *_ in found], wanted, path):
        name, layout, build = found[k]
        if (one := build(size, skipped)) is None:
            skipped["objects have no masks"] += 1
        else:
            built.append(one), names.append(name)
    if not built:
        raise BadInput(f"{path}: photos without masks: provide an alpha channel, or a folder "
                       "masks/ beside images/ with white objects on black, of the same names")
    layouts = dict.fromkeys(layout for _, layout, _ in found)
    return collect(built, names, [None] * len(names), ", ".join(layouts),
                   [f"{n} {reason}" for reason, n in skipped.items()])


def load(source, size, holdout=6, seed=0, n_objects=128, n_views=24, objects=None):
    """The Dataset of "synthetic" or of a folder of photos, as square images of side `size`.

    holdout: every n-th view of an object is held out, 0: none, nor where there are fewer views
    seed, n_objects, n_views: of the synthetic set          objects: "obj2,obj5" keeps these only
    Raises BadInput where the folder is not what it should be.
    """
    wanted = [w.strip() for w in objects.split(",") if w.strip()] if objects else []
    if str(source) == "synthetic":
        dataset = load_synthetic(size, seed, n_objects, n_views, wanted)
    else:
        dataset = load_photos(source, size, wanted)
    for k in range(dataset.n_objects):
        frames = dataset.frames_of(k)
        if holdout and len(frames) >= holdout:
            dataset.heldout[frames[holdout - 1::holdout]] = True
    return dataset


# ---- Command line -------------------------------------------------------------------------------
def contact_sheet(dataset, rows=8, columns=12):
    """(rows S, columns S, 3) uint8: an object a row, views in order, grey where the mask is 0."""
    sheet = []
    for k in range(min(rows, dataset.n_objects)):
        frames = dataset.frames_of(k)
        frames = frames[torch.linspace(0, len(frames) - 1, columns).round().long()]
        grey = 0.35 * (255 - dataset.masks[frames, ..., None].float())
        sheet.append(torch.cat(list(dataset.images[frames].float() + grey), 1))
    return torch.cat(sheet).byte().numpy()


def plot_cameras(dataset, path):
    """3D plot: the cube [-1, 1]^3, and every camera with the direction it looks in."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(7, 7)).add_subplot(projection="3d")
    where, ahead = dataset.cam2world[:500, :3, 3], -dataset.cam2world[:500, :3, 2]
    order = [2, 0, 1]                                    # matplotlib's vertical axis is its third
    length = 0.25 * where.norm(dim=1).mean().item()
    axes.quiver(*where[:, order].T, *ahead[:, order].T, length=length, linewidth=0.6)
    ends = torch.cartesian_prod(*[torch.tensor([-1., 1])] * 3)
    for a in ends:
        for b in ends:
            if (a != b).sum() == 1:
                axes.plot(*torch.stack([a, b])[:, order].T, color="black", linewidth=0.8)
    axes.set(xlabel="z", ylabel="x", zlabel="y (up)", title="cameras look at the cube [-1, 1]^3")
    axes.set_aspect("equal")
    axes.figure.savefig(path, dpi=110)


def describe(dataset):
    """What was found, in lines."""
    d, views = dataset, dataset.object_index.bincount()
    where = d.cam2world[:, :3, 3]
    distance, S = where.norm(dim=1), d.images.shape[1]
    elevation = torch.rad2deg(torch.asin(where[:, 1] / distance))
    fov = torch.rad2deg(2 * torch.atan(0.5 / d.intrinsics[:, 1]))
    middle = project(torch.zeros(1, 3), d.cam2world, d.intrinsics)[:, 0]
    cover = d.masks.float().mean((1, 2)) / 2.55
    def span(x):
        return f"{x.min():.3g} to {x.max():.3g}"
    seen = 100 * ((middle > 0) & (middle < 1)).all(1).float().mean()
    yield f"layout    {d.layout}"
    yield f"objects   {d.n_objects} ({', '.join(d.names[:6])}{' ...' * (d.n_objects > 6)})"
    yield (f"views     {len(where)}: {views.min()} to {views.max()} an object; "
           f"{d.heldout.sum()} held out")
    yield f"size      {S} x {S}"
    yield f"cameras   distance {span(distance)}, elevation {span(elevation)} degrees, field of view"
    yield f"          {span(fov)} degrees; {seen:.0f} % have the cube's middle in frame"
    yield f"masks     cover {span(cover)} % of a frame"
    yield f"captions  {d.captions[0] or 'none'}"
    for line in d.skipped or ["nothing"]:
        yield f"skipped   {line}"


def main():
    """Says what is in --data and draws it."""
    parser = Parser(description="Tell what is in a dataset, and draw it.")
    parser.add_argument("--data", default="synthetic", help="'synthetic', or a folder of photos")
    parser.add_argument("--size", type=int, default=64, help="side of the square frames (64)")
    parser.add_argument("--out", default="data-check", help="folder for the pictures (data-check)")
    parser.add_argument("--objects", help="only these, separated by commas")
    parser.add_argument("--holdout", type=int, default=6, help="every n-th view; 0: none (6)")
    args = parser.parse_args()
    if args.size < 8 or args.holdout < 0:
        raise BadInput("--size must be at least 8, --holdout at least 0")
    dataset = load(args.data, args.size, args.holdout, objects=args.objects)
    print("\n".join(describe(dataset)))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    iio.imwrite(out / "sheet.png", contact_sheet(dataset))
    plot_cameras(dataset, out / "cameras.png")
    print(f"wrote     {out / 'sheet.png'}, {out / 'cameras.png'}")


if __name__ == "__main__":
    run_cli(main)
