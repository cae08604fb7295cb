"""Photos, clips or made-up objects in; one Dataset out: square frames, masks, cameras, indices.

Paper:      Sec. 3.1 (2D images with masks and cameras are all that the method sees), Sec. 4.1.
Shapes:     F frames, S image side, N objects, V views of one object, P primitives, K points.
Simplified: everything sits in memory as uint8 (16 KiB a frame at 64x64): Objaverse would not fit.
Read next:  render.py, whose first page holds the conventions (camera axes, pixel centres, cube).
In it:      What every source becomes, and Load: at a first reading, these are all. Between them a
            section a source: objects and puppets that are made up, photos, clips.

    python data.py --data PATH      tells what is in PATH and draws it: try this first
"""
import argparse
import difflib
import itertools
import json
import re
import struct
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial, partialmethod
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MARGIN = 0.93                    # OURS: largest half side of an object; the cube's is 1

# COIL-100, OURS: what makes the silhouettes agree best with their common visual hull (IoU 0.92 at
# 64x64, mean of 35 objects; its cameras were never published).
COIL_THRESHOLD = 34, 48          # of max(R, G, B); the background has 25 to 27; 48 loses dark
                                 # parts (obj49: 0.45, not 0.90), 34 floods some photos (obj99)
COIL_ELEVATION = 18.0            # degrees; 15 to 20 fit equally well, 5 and 30 visibly worse
COIL_DISTANCE = 12.0             # half sides of the cube: all but parallel; 6 fits worse
COIL_DEPTH = 0.5                 # share of the object's depth that its picture's height shows


# ---- A stranger's input -------------------------------------------------------------------------
class BadInput(Exception):
    """What a stranger gave us is wrong: one line saying what, where, and what to do."""


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one BadInput line, with a guess at the flag that was meant."""

    # A prefix of a flag must be an error: --step for --steps would pass silently otherwise.
    __init__ = partialmethod(argparse.ArgumentParser.__init__, allow_abbrev=False)

    def error(self, message):
        flags = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []
        for flag in flags:
            for guess in difflib.get_close_matches(flag, self._option_string_actions, 1):
                message += f" (did you mean {guess}?)"
        raise BadInput(message)


def run_cli(main):
    """Call main(); a BadInput, or a file that cannot be read or made, becomes one line on stderr
    and exit status 2, not a traceback."""
    try:
        main()
    except (BadInput, OSError) as err:
        print("error: " + " ".join(str(err).split()), file=sys.stderr)
        sys.exit(2)


# ---- What every source becomes ------------------------------------------------------------------
@dataclass
class Dataset:
    """F frames of N objects, each object inside [-1, 1]^3 with y up."""
    images: Tensor               # (F, S, S, 3) uint8, colour x mask, so the background is black
    masks: Tensor                # (F, S, S) uint8, 255 inside, in between on the edges
    cam2world: Tensor            # (F, 4, 4) float32, camera x right, y up, looking along -z
    intrinsics: Tensor           # (F, 4) float32 fx, fy, cx, cy as fractions of the image side
    object_index: Tensor         # (F,) int64 in 0..N-1
    heldout: Tensor              # (F,) bool
    names: list                  # N of str
    captions: list               # N of str or None
    layout: str                  # one line: what was detected
    skipped: list                # one line per reason, with counts
    shapes: list = None          # synthetic only: N lists of Primitive
    truth: dict = None           # puppets only, for scoring: see puppet_object
    moving: bool = False         # what is seen moves, cam2world and intrinsics tell nothing

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
SIDES = dict(box=torch.eye(3), cylinder=torch.tensor([[1., 0, 1], [0, 1, 0]]),   # see Primitive
             ball=torch.ones(1, 3))
CORNERS = torch.cartesian_prod(*[torch.tensor([-1., 1.])] * 3)           # (8, 3) of the cube


@dataclass
class Primitive:
    """A box, a cylinder about its own y axis or a ball: x = centre + rotation @ (half * unit),
    where SIDES[kind] @ unit^2 <= 1: x^2, y^2 and z^2 for a box, x^2 + z^2 and y^2 for a cylinder,
    x^2 + y^2 + z^2 for a ball."""
    kind: str                    # "box", "cylinder" or "ball"
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


def ball(centre, half, colour):
    """An upright ellipsoid of half axes `half`."""
    return replace(box(centre, half, colour), kind="ball")


def corners(part):
    """(8, 3) corners of the primitive's own box, in the world."""
    return part.centre + (CORNERS * part.half) @ part.rotation.T


def to_unit(part, points):
    """Points (n, 3) in the primitive's coordinates: it is [-1, 1]^3, or round in it."""
    return (points - part.centre) @ part.rotation / part.half


def hit(part, o, d):
    """Distance t (n,) at which rays o + t d, (n, 3) each, enter the primitive; inf for a miss.

    In unit coordinates a ray is still a line with the same t, so a box is three slabs, and what is
    round is one slab and one quadratic: it is hit where the last entry precedes the first exit.
    """
    o, d = to_unit(part, o), d @ part.rotation / part.half
    d = torch.where(d == 0, 1e-9, d)
    step = 1 / d
    enter, leave = -o * step - step.abs(), -o * step + step.abs()    # (n, 3) of the three slabs
    if part.kind != "box":
        bent = SIDES[part.kind][0] > 0                               # a ball's slab cuts nothing
        a, b = (d[:, bent] ** 2).sum(1), (o * d)[:, bent].sum(1)
        root = b ** 2 - a * ((o[:, bent] ** 2).sum(1) - 1)
        root = torch.where(root < 0, -torch.inf, root.clamp(min=0).sqrt())   # a miss never enters
        enter = torch.stack([(-b - root) / a, enter[:, 1]], 1)       # side, caps
        leave = torch.stack([(-b + root) / a, leave[:, 1]], 1)
    t = enter.amax(1)
    return torch.where((t < leave.amin(1)) & (t > 0), t, torch.inf)


def normal_at(part, points):
    """Outward normals (n, 3) at surface points (n, 3): of the face that a point is nearest to."""
    unit, sides = to_unit(part, points), SIDES[part.kind]
    normal = unit * sides[(unit ** 2 @ sides.T).argmax(1)]           # the side's gradient
    return F.normalize(normal / part.half @ part.rotation.T, dim=1)


def raytrace(parts, cam2world, intrinsics, size, supersample=3, moves=None, ambient=0.65):
    """Exact picture of P primitives: (V, size, size, 4) in [0, 1], colour x alpha, and alpha; and
    which of them each ray met: (V, n, n) int64, -1 none, where n = size supersample.

    moves (V, P, 4, 4): the rigid motion of each part in each view; None: all stay. A part that
    moved by M is seen from camera C as the unmoved one is from M^-1 C: so all views go at once.
    Lambert shading under one light fixed in the world, with enough ambient that no face is black:
    the colour of a point is the same from everywhere, as the paper's volumes assume (what moves
    breaks that, and the less the nearer ambient is to 1).
    """
    V, n = len(cam2world), size * supersample
    u = (torch.arange(n) + 0.5) / n                                  # pixel centres
    fx, fy, cx, cy = intrinsics[:, :, None, None].unbind(1)          # (V, 1, 1)
    local = torch.stack(torch.broadcast_tensors((u - cx) / fx, -(u[:, None] - cy) / fy,
                                                torch.tensor(-1.)), -1).reshape(-1, 3)   # v, y, x
    nearest, which = torch.full((V * n * n,), torch.inf), torch.full((V * n * n,), -1)
    rgb = torch.zeros(V * n * n, 3)
    moves = torch.eye(4).expand(V, len(parts), 4, 4) if moves is None else moves
    for i, part in enumerate(parts):
        pose, light = moves[:, i].inverse() @ cam2world, LIGHT @ moves[:, i, :3, :3]
        # Only the rays inside the rectangle around the part's corners: some 10x fewer.
        lo, hi = project(corners(part), pose, intrinsics).aminmax(dim=1)             # (V, 2)
        inside = (u >= lo[..., None]) & (u <= hi[..., None])         # (V, 2, n)
        rays = (inside[:, 1, :, None] & inside[:, 0, None, :]).reshape(-1).nonzero()[:, 0]
        view = rays // (n * n)
        o, d = pose[view, :3, 3], (pose[view, :3, :3] * local[rays, None]).sum(-1)
        t = hit(part, o, d)
        front = t < nearest[rays]
        rays, view, t = rays[front], view[front], t[front]
        normal = normal_at(part, o[front] + t[:, None] * d[front])
        shade = ambient + (1 - ambient) * (normal * light[view]).sum(1)
        nearest[rays], which[rays] = t, i
        rgb[rays] = shade[:, None] * torch.tensor(part.colour).float()
    rgba = torch.cat([rgb, nearest.isfinite()[:, None]], 1)
    rgba = rgba.reshape(V, size, supersample, size, supersample, 4).mean((2, 4))
    return rgba, which.reshape(V, n, n)


def sample_surface(parts, n, rng):
    """(n, 3) points, uniform on the outside of the union of the parts.

    A line through two random points of a sphere enters what is in the sphere in proportion to its
    area (Crofton), so rays are all it takes: as many per area for every part's own sphere.
    """
    radius = np.array([part.half.norm() for part in parts])
    found = torch.zeros(0, 3)
    while len(found) < n:
        for part, r, m in zip(parts, radius, rng.multinomial(4 * n, radius**2 / sum(radius**2))):
            a, b = r * F.normalize(torch.from_numpy(rng.normal(size=(2, m, 3))).float(), dim=-1)
            t = hit(part, part.centre + a, b - a)[:, None]
            points = (part.centre + a + t * (b - a))[t[:, 0].isfinite()]
            # A hair outside: where two parts touch, neither face is on the outside of the union.
            outside = points + 1e-4 * normal_at(part, points)
            buried = [(to_unit(p, outside) ** 2 @ SIDES[p.kind].T <= 1).all(1) for p in parts]
            found = torch.cat([found, points[~torch.stack(buried).any(0)]])
    return found[torch.from_numpy(rng.permutation(len(found))[:n])]


# ---- Synthetic: three families ------------------------------------------------------------------
def pick_colours(rng, n):
    """n different (name, slightly jittered rgb)."""
    names = rng.choice(list(COLOURS), n, replace=False)
    return [(str(c), tuple(np.clip(np.add(COLOURS[c], rng.uniform(-.05, .05, 3)), .08, .95)))
            for c in names]


def stand(rng, central, x, z, foot, top, name, colour):
    """What carries a seat or a table top at height `top`, and its name: one column on a round foot
    of radius `foot`, or four legs at the corners of a half width x and half depth z."""
    h = top / 2
    if central:
        return [cylinder((0, h + .05, 0), .10, h - .05, colour),
                cylinder((0, .06, 0), foot, .06, colour)], f"a {name} pedestal"
    r, is_round = rng.uniform(.06, .08), rng.random() < .4
    at = [(sx * (x - r), h, sz * (z - r)) for sx in (-1, 1) for sz in (-1, 1)]
    legs = [cylinder(c, r, h, colour) if is_round else box(c, (r, h, r), colour) for c in at]
    return legs, f"{name} legs"


def make_chair(rng):
    """Primitives, noun, details of a chair: legs or pedestal, solid or slatted back, armrests."""
    (name, colour), (name2, colour2) = pick_colours(rng, 2)
    x, z, seat, t = rng.uniform(.42, .55), rng.uniform(.42, .52), rng.uniform(.75, .95), .06
    height = rng.uniform(.35, .5) if rng.random() < .3 else rng.uniform(.7, .95)     # of the back
    legs, words = stand(rng, rng.random() < .25, x, z, .8 * x, seat - t, name2, colour2)
    parts, details = [box((0, seat, 0), (x, t, z), colour), *legs], [words]
    lean = -rng.uniform(0, .15)                          # the top of the back leans backwards
    def back(at, up, half):                              # its foot stands on the seat's back edge
        where = (at, seat + t + up, -z + .06 + np.tan(lean) * up)
        parts.append(box(where, half, colour, lean))
    if rng.random() < .4:
        details.append("a slatted back")
        for i in np.linspace(-1, 1, rng.integers(3, 5)):
            back(i * (x - .055), height / 2, (.055, height / 2, .055))
        back(0, height, (x, .07, .06))
    else:
        back(0, height / 2, (x, height / 2, .06))
    if rng.random() < .4:
        details.append("armrests")
        rise = min(rng.uniform(.25, .35), .8 * height)
        for at in (-x + .055, x - .055):
            parts.append(box((at, seat + rise, 0), (.055, .05, z), colour2))
            parts.append(box((at, seat + rise / 2, z - .08), (.055, rise / 2, .055), colour2))
    return parts, f"{name} chair", details


def make_table(rng):
    """Primitives, noun, details of a table: round or not, legs or pedestal, perhaps a shelf."""
    (name, colour), (name2, colour2) = pick_colours(rng, 2)
    is_round, central, shelf = rng.random() < .4, rng.random() < .35, rng.random() < .35
    height, t = rng.uniform(.7, 1.2), rng.uniform(.05, .07)
    x = rng.uniform(.70, .85) if is_round else rng.uniform(.75, .93)
    z = x if is_round else rng.uniform(.5, .7)
    inset = .68 if is_round else .95                     # legs stand within a round top's rim
    def plate(y, x, z):
        return cylinder((0, y, 0), x, t, colour) if is_round else box((0, y, 0), (x, t, z), colour)
    legs, words = stand(rng, central, inset * x, inset * z, .6 * z, height - t, name2, colour2)
    parts, details = [plate(height, x, z), *legs], [words]
    if shelf:
        details.append("a shelf")
        parts.append(plate(height * rng.uniform(.35, .5), .68 * x, .8 * z))
    return parts, f"{name} {'round ' * is_round}table", details


def make_vehicle(rng):
    """Primitives, noun, details of a car, van or truck, looking along +z."""
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
        parts += [cylinder((s * x, r, end * rng.uniform(.54, .6)), r, .075, BLACK, lying=True)
                  for end in (-1, 1)]
    load = [f"a {name2} box"] if kind == "truck" else []
    return parts, f"{name} {kind}", load + ["black wheels"]


def synthetic_cameras(n_views, rng, arc=0.0):
    """Cameras on a sphere of radius 4 looking at 0: cam2world (V, 4, 4), intrinsics (V, 4).

    arc: degrees; then they go from -arc to arc round the front, one step a view, 12 away.
    """
    azimuth = (np.arange(n_views) + rng.random(n_views)) / n_views * 2 * np.pi     # stratified
    elevation, distance = np.radians(rng.uniform(-5, 50, n_views)), 4
    if arc:
        azimuth = np.radians(np.linspace(-arc, arc, n_views))
        elevation, distance = np.radians(15) + 0 * azimuth, 12
    where = distance * np.stack([np.sin(azimuth) * np.cos(elevation), np.sin(elevation),
                                 np.cos(azimuth) * np.cos(elevation)], 1)
    # A sphere of radius 1.25 seen from 4 spans 2 tan(asin(1.25 / 4)) = 0.658 at unit depth: 95 %.
    f = 1.45 * distance / 4
    return look_at(where), torch.tensor([[f, f, 0.5, 0.5]]).repeat(n_views, 1)


def synthetic_object(arc, seed, k, n_views, size, skipped):
    """Object k, whatever their number, as `load` collects it; families take turns."""
    rng = np.random.default_rng([seed, k])
    parts, noun, details = (make_chair, make_table, make_vehicle)[k % 3](rng)
    listed = ", ".join(details[:-1]) + " and " * (len(details) > 1) + details[-1]
    caption = f"a {noun} with {listed}".replace("a orange", "an orange")
    # Their common box is centred; its largest half side is MARGIN, or less where a corner would
    # be more than 1.25 from the middle: that far the cameras see.
    points = torch.cat([corners(part) for part in parts])
    lo, hi = points.aminmax(dim=0)
    centre = (lo + hi) / 2
    scale = min(MARGIN / (hi - lo).max() * 2, 1.25 / (points - centre).norm(dim=1).max())
    parts = [replace(p, centre=(p.centre - centre) * scale, half=p.half * scale) for p in parts]
    poses, intrinsics = synthetic_cameras(n_views, rng, arc)
    rgba, _ = raytrace(parts, poses, intrinsics, size)
    return (rgba * 255).round().byte(), poses, intrinsics, caption, parts


# ---- Synthetic: puppets -------------------------------------------------------------------------
PARTS = "head", "torso", "left arm", "right arm", "left leg", "right leg"
HAIR = dict(black=(.10, .09, .09), brown=(.36, .21, .11), blond=(.90, .75, .40),
            ginger=(.75, .33, .10), grey=(.62, .62, .64))
SKIN = (.96, .78, .66), (.85, .62, .46), (.62, .41, .28), (.50, .33, .24)
PINK, CYAN = (.95, .42, .66), (.20, .74, .82)    # left and right: no shirt has these


def make_head(y, r, skin, hair, sides):
    """A head at height y: hair on top and behind; nose, mouth, two eyes in front; earmuffs."""
    eyes = [ball((s * .4 * r, y + .05 * r, .86 * r), (.18 * r, .24 * r, .15 * r), BLACK)
            for s in (1, -1)]
    muffs = [ball((s * .95 * r, y - .05 * r, 0), (.35 * r, .55 * r, .5 * r), side)
             for s, side in zip((1, -1), sides)]
    return eyes + muffs + [ball((0, y, 0), (r, 1.2 * r, r), skin),
                   ball((0, y + .35 * r, -.25 * r), (1.06 * r, 1.05 * r, r), hair),
                   ball((0, y - .25 * r, r), (.2 * r, .2 * r, .2 * r), skin),
                   box((0, y - .62 * r, .8 * r), (.36 * r, .11 * r, .12 * r), (.70, .14, .16))]


def make_puppet(rng, shared_colours=True):
    """Six lists of Primitive in the order of PARTS, at rest; joints (6, 3); caption.

    At rest it stands on y = -0.85, looks along +z and lets its arms hang; its left is at +x.
    OURS: colours differ, their roles do not (eyes in front, pink left, cyan right), as with real
    people. Without shared_colours those of skin, hair, left and right are anything.
    """
    def jitter(rgb):
        rgb = rgb if shared_colours else rng.uniform(.05, .95, 3)
        return tuple(np.clip(np.add(rgb, rng.uniform(-.05, .05, 3)), .05, .97))
    hair = str(rng.choice(list(HAIR)))
    (shirt, top), (trousers, low) = pick_colours(rng, 2)
    skin, sides = jitter(SKIN[rng.integers(len(SKIN))]), [jitter(c) for c in (PINK, CYAN)]
    hip, shoulder = rng.uniform(-.26, -.16), rng.uniform(.18, .24)
    x, r = rng.uniform(.22, .28), rng.uniform(.23, .26)      # half of the shoulders, of the head
    thick, arm = rng.uniform(.055, .075), rng.uniform(.48, .56)
    leg, middle, chin = hip + .85, (hip + shoulder) / 2, shoulder + .07          # feet at -.85
    chest, half = (shoulder + middle) / 2, (shoulder - hip) / 2
    torso = [cylinder((0, chin, 0), .08, .07, skin),
             ball((0, middle + .03, 0), (x, half + .05, .20), top),
             ball((0, hip + .02, 0), (.95 * x, .14, .19), low),
             box((0, chest, .17), (.07, .07, .03), (.14, .12, .20))]
    # A vest that is open in front: what is seen of its two halves tells how far the body turned.
    torso += [ball((s * .5 * x, middle + .03, .01), (.60 * x, half + .03, .19), side)
              for s, side in zip((1, -1), sides)]
    head = make_head(chin + 1.15 * r, r, skin, jitter(HAIR[hair]), sides)
    parts, joints = [head, torso], [(0, chin, 0), (0, hip, 0)]
    for at, side in zip((x + .03, -x - .03), sides):
        sleeve, hand = thick + .02, shoulder - .93 * arm
        parts.append([ball((at, shoulder - .25 * arm, 0), (sleeve, .29 * arm, sleeve), side),
                      ball((at, shoulder - .68 * arm, 0), (thick, .27 * arm, thick), skin),
                      ball((at, hand, 0), (.07, .085, .07), side)])
        joints.append((at, shoulder - .03, 0))
    for at, side in zip((.52 * x, -.52 * x), sides):
        parts.append([ball((at, hip - .25 * leg, 0), (thick + .04, .33 * leg, thick + .04), low),
                      ball((at, hip - .65 * leg, 0), (thick + .02, .30 * leg, thick + .02), low),
                      cylinder((at, -.73, 0), thick + .01, .05, (.9, .9, .88)),
                      ball((at, -.79, .04), (.075, .06, .13), side)])
        joints.append((at, hip, 0))
    caption = f"a puppet with {hair} hair, a {shirt} shirt and {trousers} trousers"
    return parts, torch.tensor(joints).float(), caption.replace("a orange", "an orange")


def turn(x, y, z):
    """Rotations (n, 3, 3) by angles (n,) about x, then z, then y: pitch, roll, yaw."""
    def about(axis, a):
        R = torch.eye(3).repeat(len(a), 1, 1)
        R[:, 1, 1], R[:, 1, 2], R[:, 2, 1], R[:, 2, 2] = a.cos(), -a.sin(), a.sin(), a.cos()
        return R.roll((axis, axis), (1, 2))
    return about(1, y) @ about(2, z) @ about(0, x)


def move_puppet(joints, n, rng):
    """How a puppet moves in n frames: yaw (n,), angles (n, 4) of the limbs, radians, and poses
    (n, 6, 4, 4): each part's rigid motion from rest. Every part turns about its joint, then the
    whole body about 0, within +-45 degrees to both sides: one camera in front sees no more.
    """
    def wave(pace=3):                # (n,) from -1 to 1: two sines of random pace and phase
        t = np.linspace(0, 2 * np.pi, n)
        x = sum(a * np.sin(rng.uniform(p, 1.5 * p) * t + rng.uniform(0, 2 * np.pi))
                for a, p in ((1, pace), (.5, 2 * pace)))
        return torch.from_numpy(2 * (x - x.min()) / max(np.ptp(x), 1e-9) - 1).float()
    def swing(lo, hi, pace=3):       # (n,) radians between two angles in degrees, reaching both
        return torch.deg2rad(lo + (hi - lo) / 2 * (1 + wave(pace)))
    # All else is three times as fast as the body turns: over a clip the two are uncorrelated, so
    # what an arm does, or a step aside, cannot be mistaken for a turn.
    yaw, still = swing(-45, 45, pace=1), torch.zeros(n)
    up, out, step = [[swing(*span) for _ in "lr"] for span in ((0, 100), (0, 8), (-25, 25))]
    local = torch.stack([
        turn(swing(-8, 8), swing(-10, 10), still), turn(still, still, still),
        turn(-swing(0, 40), still, up[0]), turn(-swing(0, 40), still, -up[1]),
        turn(-step[0], still, out[0]), turn(-step[1], still, -out[1])], 1)       # (n, 6, 3, 3)
    body, part = torch.eye(4).repeat(n, 1, 1, 1), torch.eye(4).repeat(n, 6, 1, 1)
    body[:, 0, :3, :3] = turn(swing(-4, 4), yaw, swing(-3, 3))
    body[:, 0, 0, 3] = 0.03 * wave()
    part[..., :3, :3] = local
    part[..., :3, 3] = joints - (local @ joints[..., None])[..., 0]
    return yaw, torch.stack(up + step, 1), body @ part


def fixed_camera(n, distance=12.0, view=0.175):
    """n times the camera in front, its field of view in radians: cam2world, intrinsics."""
    f = 0.5 / np.tan(view / 2)
    return (look_at([[0, 0, distance]]).repeat(n, 1, 1),
            torch.tensor([[f, f, 0.5, 0.5]]).float().repeat(n, 1))


def puppet_object(shared_colours, seed, k, n_views, size, skipped):
    """Puppet k, whatever their number, as `load` collects it: a clip from one fixed camera.

    Its truth, for scoring only: yaw (V,) and angles (V, 4), radians (arms raised sideways, legs
    forward: left arm, right arm, left leg, right leg); poses (V, 6, 3, 4) of PARTS from rest to
    the frame; parts (V, S, S) uint8, 1 + the part at the pixel's centre, 0 for none.
    """
    rng = np.random.default_rng([seed, 1000 + k])
    parts, joints, caption = make_puppet(rng, shared_colours)
    yaw, angles, moves = move_puppet(joints, n_views, rng)
    pose, camera = fixed_camera(n_views)
    of = torch.tensor([i for i, part in enumerate(parts) for _ in part])
    rgba, which = raytrace(sum(parts, []), pose, camera, size, 3, moves[:, of], ambient=0.85)
    label = torch.cat([of + 1, torch.tensor([0])])[which[:, 1::3, 1::3]]         # -1 is the last
    truth = dict(yaw=yaw, angles=angles, poses=moves[..., :3, :], parts=label.byte())
    return (rgba * 255).round().byte(), pose, camera, caption, truth


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
    """One photo as its layout describes it; BadInput if its camera cannot be one."""
    image: Path
    pose: np.ndarray             # (4, 4) cam2world, camera x right, y up, looking along -z
    camera: tuple                # fx, fy, cx, cy in pixels of ...
    of: tuple                    # ... an image of this (width, height)
    lens: tuple = (0, 0, 0, 0)   # k1, k2, p1, p2
    mask: Path = None            # where the layout names it; else see find_mask
    white: bool = False          # the background is white, and that is the mask

    def __post_init__(self):
        R, numbers = self.pose[:3, :3], np.array([*self.camera, *self.of, *self.lens], float)
        if self.pose.shape != (4, 4):
            wrong = f"its pose has shape {self.pose.shape}, not (4, 4)"
        elif not np.isfinite(self.pose).all():
            wrong = "its pose is not finite"
        elif np.abs(R @ R.T - np.eye(3)).max() > 0.02 or np.linalg.det(R) < 0:
            wrong = "the 3x3 part of its pose is not a rotation"
        elif not np.isfinite(numbers).all() or numbers[[0, 1, 4, 5]].min() <= 0:
            wrong = (f"focal length {self.camera[0]}, image {self.of[0]} x {self.of[1]}: "
                     "these must be finite and positive")
        else:
            return
        raise BadInput(f"{self.image}: {wrong}")


FLIP = np.diag([1.0, -1, -1, 1])             # camera x right, y down, along +z (OpenCV) <-> ours
LAST_ROW = [0, 0, 0, 1]                      # of a 4x4 pose
PHOTOS = (".png", ".jpg", ".jpeg")
TRANSFORMS = "transforms.json", "transforms_train.json"
SPARSE = "sparse/0/images.bin", "sparse/0/images.txt", "sparse/images.bin", "sparse/images.txt"


def read_array(path, columns):
    """Rows of `columns` numbers, from .npy or text."""
    try:
        npy = path.suffix == ".npy"
        array = np.load(path) if npy else np.array(path.read_text().split(), float)
        return array.astype(float).reshape(-1, columns)
    except (OSError, ValueError, EOFError) as err:
        raise BadInput(f"{path}: expected rows of {columns} numbers ({err})")


def read_image(path):
    """(H, W, 4) uint8; alpha 255 where the file has none. SIMPLIFIED: 16-bit grey is clipped."""
    try:
        return iio.imread(path, mode="RGBA")
    except Exception as err:             # decoders raise anything from SyntaxError to OSError
        raise BadInput(f"{path}: missing, truncated or not an image ({err})")


def photos_in(folder):
    """The photos in its folder images/, or else right in it, by name; [] where it is no folder."""
    paths = [*folder.glob("images/*")] or folder.glob("*")
    return sorted(path for path in paths if path.suffix.lower() in PHOTOS)


def find_mask(image):
    """The mask of images/a.jpg: masks/a.jpg, masks/a.png or masks/a.jpg.png, or None."""
    folders = image.parent.name.replace("image", "mask"), "masks", "mask"
    names = image.name, image.stem + ".png", image.name + ".png"
    paths = [image.parent.parent / folder / name for folder in folders for name in names
             if folder != image.parent.name]
    return next((path for path in paths if path.exists()), None)


def read_masked(path, mask=None):
    """(H, W, 4) uint8 of a photo; alpha is its mask, if one is given or found beside it."""
    image = read_image(path)
    if mask := mask or find_mask(path):
        alpha = read_image(mask)[..., :3].max(-1)
        if alpha.shape != image.shape[:2]:
            raise BadInput(f"{mask}: mask of {alpha.shape} pixels, photo of {image.shape[:2]}")
        image[..., 3] = 255 * (alpha > 127)
    return image


# Readers, one per layout: (folder, size, skipped) -> the object's views and the world's up vector,
# None where the layout leaves it open. `skipped` counts by reason what is listed and not there.
def read_transforms(folder, size, skipped):
    """NeRF and its heirs: one json; cam2world in our own axes; world z up."""
    path = next(p for n in TRANSFORMS if (p := folder / n).exists())
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
        fx = get.get("fl_x", w / (2 * np.tan(get["camera_angle_x"] / 2) or np.inf))
        camera = fx, get.get("fl_y", fx), get.get("cx", w / 2), get.get("cy", h / 2)
        lens = tuple(get.get(k, 0) for k in ("k1", "k2", "p1", "p2"))
        mask = folder / get["mask_path"] if "mask_path" in get else None
        views.append(View(image, np.array(get["transform_matrix"], float), camera, of, lens, mask))
    return views, (0, 0, 1)


def read_srn(folder, size, skipped):
    """SRN's ShapeNet renders: one text file a pose, OpenCV's cam2world; photos on white."""
    # f cx cy 0, origin, near, scale, height width
    f, cx, cy, *_, h, w = read_array(folder / "intrinsics.txt", 1)[:, 0]
    views = [View(folder / "rgb" / f"{path.stem}.png", read_array(path, 4) @ FLIP, (f, f, cx, cy),
                  (w, h), white=True) for path in sorted((folder / "pose").glob("*.txt"))]
    # OURS: its sets differ in which axis is up; but it is an axis, and the cameras stand upright.
    up = sum(view.pose[:3, 1] for view in views) + np.zeros(3)
    return views, np.where(np.abs(up) == np.abs(up).max(), np.sign(up), 0)


def read_llff(folder, size, skipped):
    """LLFF: poses_bounds.npy, a row a photo in the order of their names."""
    # The smallest copy of the photos (images, images_4, images_8 ...) that is still large enough.
    copies = sorted((min(read_image(photos[0]).shape[:2]), photos)
                    for copy in folder.glob("images*") if (photos := photos_in(copy)))
    if not copies:
        raise BadInput(f"{folder}: poses_bounds.npy, but no photos in images or images_8")
    photos = next((photos for side, photos in copies if side >= size), copies[-1][1])
    path = folder / "poses_bounds.npy"
    rows = read_array(path, 17)              # 3x5 [R | t | height, width, focal], near, far
    if len(rows) != len(photos):
        raise BadInput(f"{path}: {len(rows)} poses for {len(photos)} photos in {photos[0].parent}")
    views = []
    for image, row in zip(photos, rows):
        down, right, back, where, (h, w, f) = row[:15].reshape(3, 5).T
        pose = np.vstack([np.stack([right, -down, back, where], 1), LAST_ROW])
        views.append(View(image, pose, (f, f, w / 2, h / 2), (w, h)))
    return views, None


# COLMAP's camera models by number, and the order of their parameters; "?" where it is not known.
MODELS = dict(SIMPLE_PINHOLE="fxy", PINHOLE="ffxy", SIMPLE_RADIAL="fxyk", RADIAL="fxykk",
              OPENCV="ffxykkpp", OPENCV_FISHEYE=8 * "?", FULL_OPENCV=12 * "?", FOV=5 * "?",
              SIMPLE_RADIAL_FISHEYE=4 * "?", RADIAL_FISHEYE=5 * "?", THIN_PRISM_FISHEYE=12 * "?")


def read_colmap(folder, size, skipped):
    """COLMAP, as MVImgNet ships it: a sparse model, OpenCV's world-to-camera as a quaternion."""
    path = next(p for n in SPARSE if (p := folder / n).exists())
    cameras, images = colmap_model(path.parent, path.suffix)
    views = []
    for name, (w, *xyz), t, number in sorted(images):
        model, width, height, params = cameras[number]
        order = MODELS.get(model, "?")
        if "?" in order:
            raise BadInput(f"{folder}: camera model {model} is not known; run COLMAP's "
                           "image_undistorter, which makes PINHOLE cameras")
        image = folder / "images" / name
        if not image.is_file():
            skipped["listed frames have no file"] += 1
            continue
        K = np.cross(np.eye(3), xyz)         # K v = xyz x v
        R = np.eye(3) + 2 * w * K + 2 * K @ K
        pose = np.linalg.inv(np.vstack([np.column_stack([R, t]), LAST_ROW])) @ FLIP
        f, cx, cy, k, p = ([v for v, c in zip(params, order) if c == letter] for letter in "fxykp")
        lens = (*k, 0, 0)[:2] + (*p, 0, 0)[:2]
        views.append(View(image, pose, (f[0], f[-1], *cx, *cy), (width, height), lens))
    return views, None


def colmap_model(folder, suffix):
    """cameras: {number: (model, width, height, params)}; images: (name, quaternion, t, number)."""
    def rows(name):
        return [r.split() for r in (folder / name).read_text().splitlines() if r[:1] != "#"]
    def take(form):                          # the next numbers of a file, little-endian
        return struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))
    if suffix == ".txt":
        cameras = {r[0]: (r[1], int(r[2]), int(r[3]), [float(v) for v in r[4:]])
                   for r in rows("cameras.txt") if r}
        images = [(" ".join(r[9:]), [float(v) for v in r[1:5]], [float(v) for v in r[5:8]], r[8])
                  for r in rows("images.txt")[::2] if r]     # every other line lists 2D points
        return cameras, images
    cameras, images = {}, []
    with open(folder / "cameras.bin", "rb") as file:
        for _ in range(*take("Q")):
            number, model, width, height = take("IiQQ")
            name, order = list(MODELS.items())[model]
            cameras[number] = name, width, height, take(f"{len(order)}d")
    with open(folder / "images.bin", "rb") as file:
        for _ in range(*take("Q")):
            _, *qt, number = take("I7dI")
            name = b"".join(iter(lambda: take("s")[0], b"\0")).decode()
            images.append((name, qt[:4], qt[4:], number))
            file.seek(24 * take("Q")[0], 1)  # its 2D points
    return cameras, images


def read_objaverse(folder, size, skipped):
    """Renders of Objaverse (as for Zero-1-to-3): NNN.png, NNN.npy a (3, 4) world-to-camera."""
    views = []
    for path in sorted(folder.glob("???.npy")):
        RT = read_array(path, 4)
        if RT.shape != (3, 4):
            raise BadInput(f"{path}: its pose has shape {RT.shape}, not (3, 4)")
        # The object is in front: along -z in Blender's axes, which are ours; some scripts write
        # OpenCV's, where it is along +z.  The lens has 35 mm, the sensor 32.
        pose = np.linalg.inv(np.vstack([RT, LAST_ROW]))
        pose = pose @ FLIP if RT[2, 3] > 0 else pose
        views.append(View(path.with_suffix(".png"), pose, (35 / 32, 35 / 32, .5, .5), (1, 1)))
    return views, (0, 0, 1)


# ---- Photos: one path for all layouts -----------------------------------------------------------
def read_view(view):
    """RGBA (H, W, 4) uint8 without lens distortion and camera in its pixels; None: no mask."""
    image = read_masked(view.image, view.mask)
    h, w = image.shape[:2]
    if image[..., 3].min() == 255:           # neither a mask nor an alpha channel of its own
        if not view.white:
            return None
        image[..., 3] = 255 * (image[..., :3].min(-1) < 250)
    if image[..., 3].max() == 0:
        raise BadInput(f"{view.image}: its mask is empty; paint the object white, or remove this "
                       "view")
    sx, sy = w / view.of[0], h / view.of[1]
    if abs(sx / sy - 1) > 0.02 and view.of != (1, 1):
        raise BadInput(f"{view.image}: {w}x{h}, but its camera is for {view.of[0]}x{view.of[1]}")
    camera = np.array(view.camera, float) * [sx, sy, sx, sy]
    return undistort(image, camera, view.lens), camera


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
        planes = torch.from_numpy(photo).permute(2, 0, 1)[None].float()
        planes = F.pad(planes, (-x, x + side - w, -y, y + side - h))     # where negative, it cuts
        planes[:, :3] *= planes[:, 3:] / 255     # before averaging, or the background bleeds in
        out.append(F.interpolate(planes, size=(size, size), mode="bilinear", antialias=True))
    return torch.cat(out).permute(0, 2, 3, 1).round().clamp(0, 255).byte()


def photo_object(read, folder, size, skipped):
    """One object of one layout, as `load` collects it; None if no view has a mask.

    returns RGBA (V, size, size, 4) uint8, cam2world (V, 4, 4), intrinsics (V, 4), and two None
    """
    try:
        views, up = read(folder, size, skipped)
    except (ValueError, LookupError, TypeError, AttributeError, OSError, struct.error) as err:
        raise BadInput(f"{folder}: its files are missing, damaged or of another layout ({err!r})")
    found = [(view, *one) for view in views if (one := read_view(view))]
    skipped["views have no mask"] += len(views) - len(found)
    if views and not found:
        skipped["objects have no masks"] += 1
        return None
    if len(found) < 3:
        raise BadInput(f"{folder}: {len(found)} usable views; a shape needs at least 3")
    views, photos, cameras = zip(*found)
    height, width = photos[0].shape[:2]
    for view, photo in zip(views, photos):
        if photo.shape != photos[0].shape:
            raise BadInput(f"{view.image}: {photo.shape[:2]}, but the object's other photos are "
                           f"{height, width}: one object, one image size")
    boxes = torch.cat([mask_box(torch.from_numpy(photo[None, ..., 3])) for photo in photos])
    largest, side = (boxes[:, 1::2] - boxes[:, ::2]).max(), max(width, height)
    middle = torch.tensor([width, height]).expand(len(photos), 2) / 2
    if largest < 0.7 * side:                 # small in the frame: a window that follows the object
        side, middle = int(1.15 * largest), (boxes[:, 1::2] + boxes[:, ::2]) / 2
    corner = (middle - side / 2).round().int()                       # (V, 2) left, top
    rgba = resample(photos, corner.tolist(), side, size)
    intrinsics = np.stack(cameras) - np.pad(corner, ((0, 0), (2, 0)))
    intrinsics = torch.from_numpy(intrinsics).float() / side
    poses = np.stack([view.pose for view in views])
    poses = normalize_world(rgba[..., 3], poses, intrinsics, up, folder)
    return rgba, poses, intrinsics, None, None


def normalize_world(masks, poses, intrinsics, up, folder):
    """Move, turn and scale the world so that the masks' visual hull fills the cube, y up.

    masks (V, S, S), poses (V, 4, 4) numpy float64 -> (V, 4, 4) float32
    """
    def half_turn(axis):
        return 2 * np.outer(axis, axis) / (axis @ axis) - np.eye(3)
    up = np.mean(poses[:, :3, 1], 0) if up is None else np.array(up, float)
    # Two half turns are the shortest turn that takes up to y; 1e-9 is for where that is downwards.
    between = up / np.linalg.norm(up) + [0, 1, 1e-9]
    poses = poses.copy()
    poses[:, :3] = half_turn(between) @ half_turn(up) @ poses[:, :3]
    # Rays through the middles of the masks: the point nearest to all of them.
    middle = mask_box(masks).unflatten(1, (2, 2)).mean(2).numpy() / masks.shape[1]
    fx, fy, cx, cy = intrinsics.numpy().T
    ray = np.stack([(middle[:, 0] - cx) / fx, -(middle[:, 1] - cy) / fy, -np.ones(len(fx))], 1)
    ray = np.einsum("vij,vj->vi", poses[:, :3, :3], ray)
    across = np.eye(3) - np.stack([np.outer(r, r) / (r @ r) for r in ray])       # (V, 3, 3)
    where = poses[:, :3, 3]
    centre = np.linalg.lstsq(across.sum(0), np.einsum("vij,vj->i", across, where), rcond=None)[0]
    reach = np.median(np.linalg.norm(where - centre, axis=1) / fx)
    lo, hi = centre - 0.75 * reach, centre + 0.75 * reach            # 0.75: a frame's corner
    for _ in range(3):                       # coarse, then twice into the box that was found
        inside = hull(masks, torch.from_numpy(poses).float(), intrinsics, lo, hi)
        if not inside.any():
            raise BadInput(f"{folder}: the masks' visual hull is empty: cameras and masks disagree"
                           "; is the camera convention (axes, world-to-camera) the layout's own?")
        cell = (hi - lo) / len(inside)
        found = inside.nonzero().numpy()
        lo, hi = lo + (found.min(0) - 1) * cell, lo + (found.max(0) + 2) * cell
    lo, hi = lo + cell, hi - cell
    poses[:, :3, 3] = (where - (lo + hi) / 2) * (2 * MARGIN / (hi - lo).max())
    return torch.from_numpy(poses).float()


def hull(masks, poses, intrinsics, lo, hi, side=48):
    """Visual hull (side, side, side) bool, x y z: cells inside the mask in 95 % of the views that
    have them in frame, which must be half of all (a mask or two may be wrong)."""
    steps = torch.cartesian_prod(*[(torch.arange(side) + 0.5) / side] * 3)
    points = torch.from_numpy(lo).float() + steps * torch.from_numpy(hi - lo).float()
    seen, hits, S = torch.zeros(len(points)), torch.zeros(len(points)), masks.shape[1]
    for mask, pose, camera in zip(masks, poses, intrinsics):
        at = (project(points, pose[None], camera[None])[0] * S).floor().long()
        frame = ((at >= 0) & (at < S)).all(1) & ((points - pose[:3, 3]) @ pose[:3, 2] < 0)
        at = at.clamp(0, S - 1)
        seen += frame
        hits += frame & (mask[at[:, 1], at[:, 0]] > 127)
    return ((hits >= 0.95 * seen) & (seen >= 0.5 * len(masks))).reshape(side, side, side)


# ---- Photos: coil-100 ---------------------------------------------------------------------------
def components(mask):
    """4-connected components of masks (V, H, W) bool: int64 labels, 0 outside.

    Every pixel starts with its own number; sweeps down, up, right and left take the largest along,
    stopping at zeros, until nothing changes.
    """
    label = np.arange(1, mask.size + 1).reshape(mask.shape) * mask
    across = label.transpose(0, 2, 1)                    # the same memory, so sweeps change label
    while True:
        before = label.copy()
        for sweep in (label, label[:, ::-1], across, across[:, ::-1]):
            for i in range(1, sweep.shape[1]):
                sweep[:, i] = np.maximum(sweep[:, i], sweep[:, i - 1]) * (sweep[:, i] > 0)
        if (label == before).all():
            return label


def fill_holes(mask, largest=np.inf):
    """Masks (V, H, W) bool with their holes filled, those of at most `largest` pixels."""
    label = components(np.pad(~mask, ((0, 0), (1, 1), (1, 1)), constant_values=True))
    hole = (label != label[:, :1, :1]) & (np.bincount(label.ravel()) <= largest)[label]
    return mask | hole[:, 1:-1, 1:-1]


def coil_masks(images, threshold=COIL_THRESHOLD[0]):
    """Masks (V, H, W) bool of photos (V, H, W, 3): brighter than the background's 25 to 27 of 255;
    the largest component, with its holes filled (dark parts of the object)."""
    label = components(images.max(-1) > threshold)
    area = np.bincount(label.reshape(-1))[label] * (label > 0)
    mask = fill_holes((area == area.max((1, 2), keepdims=True)) & (label > 0))
    flooded = mask[:, ::mask.shape[1] - 1, ::mask.shape[2] - 1].all((1, 2))      # all four corners
    if flooded.any() and threshold != COIL_THRESHOLD[1]:
        mask[flooded] = coil_masks(images[flooded], COIL_THRESHOLD[1])
    return mask


def coil_object(files, size, skipped):
    """One object of COIL-100, {degrees: path}: as photo_object returns it.

    Its cameras were never published. OURS: a circle at elevation e, far away, so that a view is
    nearly parallel; every photo was cropped to the object's box and rescaled to 128 pixels, so the
    box's middle is where the axis is seen, and the scale follows from the object's height H, the
    same in all views: the box is  H cos e + (part of the depth) sin e  high, where the depth is
    about the width seen a quarter turn later.
    """
    degrees = np.array(sorted(files))
    photos = [read_image(files[d]) for d in degrees]
    for d, photo in zip(degrees, photos):
        h, w, _ = photo.shape
        if h != w or w < 8 or photo.shape != photos[0].shape:
            raise BadInput(f"{files[d]}: {w}x{h} pixels; an object's photos must be square, all of "
                           "one size, 128x128 in COIL-100")
    photos = np.stack(photos)                                        # (V, S, S, 4)
    photos[..., 3] = 255 * coil_masks(photos[..., :3])
    for d, photo in zip(degrees, photos):
        if not photo[..., 3].any():
            raise BadInput(f"{files[d]}: this view is black: its mask is empty")
    left, right, top, bottom = mask_box(torch.from_numpy(photos[..., 3])).numpy().T
    width, height, S = right - left, bottom - top, photos.shape[1]
    turn = (degrees[:, None] + 90 - degrees) % 360
    later = np.minimum(turn, 360 - turn).argmin(1)               # the view nearest to + 90 degrees
    a, e, pixel = np.radians(degrees), np.radians(COIL_ELEVATION), np.ones(len(degrees))
    for _ in range(50):                      # world units a pixel, H cos e = 1; contracts
        pixel = (1 + COIL_DEPTH * np.tan(e) * (width * pixel)[later]) / height
    pixel *= 2 * MARGIN / (np.maximum(width, height) * pixel).max()
    back = np.stack([np.sin(a) * np.cos(e), np.sin(e) + 0 * a, np.cos(a) * np.cos(e)], 1)
    focal = COIL_DISTANCE / pixel
    intrinsics = np.stack([focal, focal, (left + right) / 2, (top + bottom) / 2], 1) / S
    rgba = resample(photos, [(0, 0)] * len(photos), S, size)
    return rgba, look_at(COIL_DISTANCE * back), torch.from_numpy(intrinsics).float(), None, None


# ---- Clips: somebody moves before a fixed camera ------------------------------------------------
VIDEOS = (".mp4", ".gif", ".webm", ".avi", ".mov")
SHADOW = 0.78, 1.05              # in shadow a wall keeps this share of its brightness, and its hue
LIMIT = 9                        # of 255, or 7 x noise: less brings back Weizmann's shadows
OUTLIER = 2.4                    # standard deviations of the wall; at 3 light trousers are lost


def find_clips(folder, clip_filter):
    """The clips in a folder, as find_objects returns objects: videos, folders of frames and, if it
    has no other photos, strips of at least 4 square frames side by side."""
    if any((folder / name).is_dir() for name in ("images", "masks", "rgb")):     # half a layout
        return []
    photos = photos_in(folder)
    shapes = (read_image(photo).shape for photo in photos)
    strips = photos if all(w >= 4 * h and w % h == 0 for h, w, _ in shapes) else []
    return [(p.name if p.is_dir() else p.stem, CLIPS, partial(clip_object, p, clip_filter))
            for p in sorted(folder.iterdir())
            if p.suffix.lower() in VIDEOS or p in strips or photos_in(p)]


def read_frames(path):
    """A clip's frames (H, W, 3 or 4) uint8, one by one: a video need not fit in memory."""
    if path.is_dir():                    # frame 2 comes before frame 10
        yield from map(read_masked, sorted(photos_in(path), key=lambda photo: [
            int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", photo.name)]))
    elif path.suffix.lower() in PHOTOS:
        strip = read_image(path)
        yield from np.split(strip, strip.shape[1] // len(strip), 1)
    else:
        how = dict(mode="RGBA") if path.suffix.lower() == ".gif" else dict(plugin="FFMPEG")
        try:
            yield from iio.imiter(path, **how)
        except Exception as err:         # as in read_image
            raise BadInput(f"{path}: not a readable video: re-encode it, or give its frames as a "
                           f"folder of PNGs ({' '.join(str(err).split())[-100:]})")


def read_clip(path, side):
    """Frames (V, h, w, 4) uint8, alpha 255 where a clip has no masks; both sides are divided by a
    whole number, so that the shorter one is still at least `side`."""
    frames, sizes = [], set()
    for frame in read_frames(path):
        h, w, channels = frame.shape
        frame = np.pad(frame, ((0, 0), (0, 0), (0, 4 - channels)), constant_values=255)
        k = max(1, min(h, w) // side)
        frame = frame[:h // k * k, :w // k * k].reshape(h // k, k, w // k, k, 4)
        frames.append(frame.mean((1, 3)).round().astype(np.uint8))
        sizes.add(f"{w}x{h}")
    if len(frames) < 2 or len(sizes) > 1:
        raise BadInput(f"{path}: {len(frames)} frame(s) of {' and '.join(sorted(sizes))}: a clip "
                       "has at least 2, all of one size")
    return np.stack(frames)


def subtract_background(frames, path):
    """Masks (V, H, W) bool of who moves before a plain, unmoving wall; frames (V, H, W, 3) uint8.

    OURS: the median over time fails where a person stands still. So, first, the wall's colour in
    each row, from the picture's edges, and its covariance there (brightness varies more than hue);
    then, in rounds, each pixel's own background where it is free in over 15 % of the frames, else
    its neighbours' in the row.
    """
    x, still = frames.astype(np.float32), np.median(frames, 0)
    change = np.abs(x - still).max(-1)
    noise = 1.4826 * np.median(change)
    limit = max(7 * noise, LIMIT)
    if (change > limit).mean() < 1e-3:
        raise BadInput(f"{path}: nothing moves, so the background cannot be told: give masks, as "
                       "alpha or in a folder masks/ beside images/")
    e = max(2, round(0.15 * frames.shape[2]))
    edges = np.concatenate([still[:, :e], still[:, -e:]], 1)                     # (H, 2 e, 3)
    back = np.median(edges, 1, keepdims=True).astype(np.float32)                 # (H, 1, 3)
    spread = np.cov((edges - back).reshape(-1, 3).T) + max(noise, 2) ** 2 * np.eye(3)
    whiten = np.linalg.cholesky(np.linalg.inv(spread)).astype(np.float32) / OUTLIER
    far = np.linalg.norm((x - back) @ whiten, axis=-1)                           # (V, H, W)
    for _ in range(3):
        free, known = far < 1, (far < 1).mean(0) > 0.15                          # (H, W)
        seen = np.sort(np.where(free[..., None], frames, np.uint8(255)), 0)
        # The 75 % quantile: for half of the time a shadow may lie there.
        at = (0.75 * (free.sum(0) - 1)).clip(0).astype(int)[None, ..., None]
        back = np.take_along_axis(seen, at, 0)[0].astype(np.float32)             # (H, W, 3)
        for row, ok in zip(back, known):
            if ok.any():
                row.T[:] = [np.interp(range(len(ok)), *np.nonzero(ok), c[ok]) for c in row.T]
        share = ((x * back).sum(-1) / (back * back).sum(-1).clip(1)).clip(*SHADOW)
        near = np.linalg.norm(x - share[..., None] * back, axis=-1) / limit
        odd = np.linalg.norm((x - back) @ whiten, axis=-1)
        odd = np.median([np.roll(odd, i, 1) for i in (-1, 0, 1)], 0)     # a row may be wrong
        far = np.where(known, near, odd)
    label = components(far > 1)
    area = np.bincount(label.ravel())[label] * (label > 0)
    specks = area <= 0.1 * area.max((1, 2), keepdims=True)
    return fill_holes(~specks, 0.05 * area.max())                    # an arm may enclose wall


def clip_object(path, clip_filter, size, skipped):
    """One clip, as photo_object returns it. PAPER, clip_filter: drop 10 % of the frames at either
    end, those under 25 % foreground, and a clip, then None, that has under 4 left."""
    frames = read_clip(path, 2 * size)
    if clip_filter:
        frames = frames[len(frames) // 10:len(frames) - len(frames) // 10]
    if frames[..., 3].min() == 255:
        frames[..., 3] = 255 * subtract_background(frames[..., :3], path)
    unmasked = frames[..., 3].min((1, 2)) == 255          # masks/ may lack some
    skipped["frames have no mask"] += int(unmasked.sum())
    frames = frames[~unmasked]
    if len(frames) < 2:
        raise BadInput(f"{path}: only {len(frames)} of its frames has a mask")
    masks = torch.from_numpy(frames[..., 3])
    if (empty := (masks.amax((1, 2)) <= 127).sum()) > len(masks) - 2:
        raise BadInput(f"{path}: nothing stands before the background in {empty} of its "
                       f"{len(masks)} frames: film before a plain wall, or give masks")
    # One square for the whole clip: the camera did not move, so the crop must not either.
    left, right, top, bottom = mask_box(masks.amax(0)[None])[0].tolist()
    side = round(max((bottom - top) / 0.9, (right - left) / 0.95))
    corner = round((left + right - side) / 2), round((top + bottom - side) / 2)
    rgba = resample(frames, [corner] * len(frames), side, size)
    cover = rgba[..., 3].float().mean((1, 2)) / 255
    keep, why = (cover >= 0.25, "under 25 % foreground") if clip_filter else (cover > 0, "empty")
    skipped[f"frames are {why}"] += int((~keep).sum())
    if clip_filter and keep.sum() < 4:
        skipped["clips have under 4 frames left"] += 1
        return None
    return rgba[keep], *fixed_camera(int(keep.sum())), None, None


# ---- Load ---------------------------------------------------------------------------------------
LAYOUTS = [                                  # name, reader, and the files that tell it
    ("NeRF transforms", read_transforms, *TRANSFORMS), ("SRN", read_srn, "pose/*.txt"),
    ("LLFF", read_llff, "poses_bounds.npy"), ("COLMAP", read_colmap, *SPARSE),
    ("Objaverse renders", read_objaverse, "???.npy")]


def find_objects(folder, root, depth=3):
    """All objects below a folder: (name, layout, function (size, skipped) -> see photo_object)."""
    coil = {}
    for path in folder.glob("obj*__*.png"):
        if match := re.fullmatch(r"obj(\d+)__(\d+)", path.stem):
            coil.setdefault(int(match[1]), {})[int(match[2])] = path
    if coil:
        return [(f"obj{k}", "COIL-100", partial(coil_object, coil[k])) for k in sorted(coil)]
    for layout, read, *signs in LAYOUTS:
        if any(next(folder.glob(sign), None) for sign in signs):
            name = folder.name if folder == root else folder.relative_to(root).as_posix()
            return [(name, layout, partial(photo_object, read, folder))]
    return [found for sub in sorted(folder.iterdir()) if depth and sub.is_dir()
            for found in find_objects(sub, root, depth - 1)]


def read_captions(folder, names):
    """A user's captions, {name of the object: caption}: from captions.json, of just this form; from
    captions.txt, a line "NAME: CAPTION" each; from a caption.txt in an object's own folder."""
    found = {name: path.read_text(errors="replace").strip() for name in names
             if (path := folder / name / "caption.txt").is_file()}
    for path in (folder / "captions.txt", folder / "captions.json"):
        if not path.is_file():
            continue
        text = path.read_text(errors="replace")
        try:
            lines = [line.split(":", 1) for line in text.splitlines() if line.strip()]
            pairs = json.loads(text) if path.suffix == ".json" else dict(lines)
            pairs = {name.strip(): caption.strip() for name, caption in pairs.items()}
        except (ValueError, AttributeError):
            form = '{"NAME": "CAPTION"}' if path.suffix == ".json" else "lines NAME: CAPTION"
            raise BadInput(f"{path}: expected {form}") from None
        if unknown := set(pairs) - set(names):
            raise BadInput(f"{path}: no object is called {min(unknown)}; there are: "
                           f"{', '.join(names[:9])}{' ...' * (len(names) > 9)}")
        found |= pairs
    return found


MOVING = PUPPETS, CLIPS = ("puppets: articulated people before one camera, a clip each",
                           "clips: one object each, its camera unknown")


def find(source, seed, n_objects, n_views, arc, shared_colours, clip_filter):
    """What `load` is to build: (name, layout, function (size, skipped) -> see photo_object)."""
    made = dict(puppets=(PUPPETS, partial(puppet_object, shared_colours)), synthetic=(
        "synthetic: chairs, tables and vehicles of boxes and cylinders",
        partial(synthetic_object, arc)))
    if str(source) in made:
        layout, make = made[str(source)]
        return [(f"{k:04d}", layout, partial(make, seed, k, n_views)) for k in range(n_objects)]
    folder = Path(source).resolve()
    if not folder.is_dir():
        raise BadInput(f"{source}: no such folder (nor is it 'synthetic' or 'puppets')")
    if found := find_objects(folder, folder) or find_clips(folder, clip_filter):
        return found
    known = "; ".join(f"{' or '.join(signs)} ({layout})" for layout, _, *signs in LAYOUTS)
    raise BadInput(f"{source}: no layout recognised here or below. Known are: {known}; "
                   f"obj1__0.png (COIL-100); clips, which are videos ({' '.join(VIDEOS)}), strips "
                   "of square frames or folders of frames")


def is_moving(source):
    """Whether `load` would find puppets or clips; False, too, where it would find nothing."""
    try:
        return any(layout in MOVING for _, layout, _ in find(source, 0, 1, 1, 0.0, True, False))
    except BadInput:
        return False


def load(source, size, holdout=6, seed=0, n_objects=128, n_views=24, objects=None, arc=0.0,
         shared_colours=True, clip_filter=False):
    """The Dataset of "synthetic", "puppets" or a folder of photos or clips; square images.

    holdout: every n-th view of an object is held out, or the last 1/n of a clip, where neighbours
             in time are all but equal; 0: none, nor where there are fewer views
    seed, n_objects, n_views: of what is made up           objects: "obj2,obj5" keeps these only
    arc: degrees, see synthetic_cameras                    shared_colours: see make_puppet
    clip_filter: see clip_object
    Raises BadInput where the folder is not what it should be.
    """
    found = find(source, seed, n_objects, n_views, arc, shared_colours, clip_filter)
    moving = any(layout in MOVING for _, layout, _ in found)
    present = [name for name, *_ in found]
    if wanted := {name.strip() for name in (objects or "").split(",")} - {""}:
        if unknown := wanted - set(present):
            raise BadInput(f"{source}: no object {', '.join(sorted(unknown))}; there are: "
                           f"{', '.join(present[:40])}{' ...' * (len(present) > 40)}")
        found = [one for one in found if one[0] in wanted]
    skipped = Counter()
    built = [(name, *one) for name, _, build in found if (one := build(size, skipped))]
    skipped = [f"{n} {reason}" for reason, n in skipped.items() if n]
    if not built:
        raise BadInput(f"{source}: nothing is left ({', '.join(skipped)}); photos without masks: "
                       "provide an alpha channel, or a folder masks/ beside images/ with white "
                       "objects on black, of the same names")
    names, rgba, poses, intrinsics, captions, known = map(list, zip(*built))
    if str(source) not in ("synthetic", "puppets"):
        own = read_captions(Path(source), present)
        captions = [own.get(name) for name in names]
    n_frames = torch.tensor([len(pictures) for pictures in rgba])
    number = torch.cat([torch.arange(1, n + 1) for n in n_frames])   # of a view in its object
    n, every = n_frames.repeat_interleave(n_frames), holdout or len(number) + 1
    rgba, truth = torch.cat(rgba), isinstance(known[0], dict)
    return Dataset(
        rgba[..., :3], rgba[..., 3], torch.cat(poses), torch.cat(intrinsics),
        object_index=torch.arange(len(built)).repeat_interleave(n_frames),
        heldout=number > n - n // every if moving else number % every == 0,
        names=names, captions=captions, skipped=skipped, moving=moving,
        layout=", ".join(dict.fromkeys(layout for _, layout, _ in found)),
        shapes=None if None in known or truth else known,
        truth={k: torch.cat([one[k] for one in known]) for k in known[0]} if truth else None)


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
    for a, b in itertools.combinations(CORNERS[:, order], 2):
        if (a != b).sum() == 1:                          # an edge of the cube
            axes.plot(*torch.stack([a, b]).T, color="black", linewidth=0.8)
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
    yield "cameras   unknown, as are the poses: to be learned" if d.moving else (
        f"cameras   distance {span(distance)}, elevation {span(elevation)} degrees,\n"
        f"          field of view {span(fov)} degrees; {seen:.0f} % see the cube's middle")
    yield f"masks     cover {span(cover)} % of a frame"
    yield f"captions  {d.captions[0] or 'none'}"
    for line in d.skipped or ["nothing"]:
        yield f"skipped   {line}"


def main():
    """Says what is in --data and draws it."""
    parser = Parser(description="Tell what is in a dataset, and draw it.")
    parser.add_argument("--data", default="synthetic",
                        help="'synthetic', 'puppets', or a folder of photos or of clips")
    parser.add_argument("--size", type=int, default=64, help="side of the square frames (64)")
    parser.add_argument("--out", default="data-check", help="folder for the pictures (data-check)")
    parser.add_argument("--objects", help="only these, separated by commas")
    parser.add_argument("--holdout", type=int, default=6, help="every n-th view; 0: none (6)")
    parser.add_argument("--clip-filter", action="store_true",
                        help="of clips: drop the ends, frames under 25 %% foreground, short ones")
    args = parser.parse_args()
    if args.size < 8 or args.holdout < 0:
        raise BadInput("--size must be at least 8, --holdout at least 0")
    dataset = load(args.data, args.size, args.holdout, objects=args.objects,
                   clip_filter=args.clip_filter)
    print("\n".join(describe(dataset)))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    iio.imwrite(out / "sheet.png", contact_sheet(dataset))
    if not dataset.moving:
        plot_cameras(dataset, out / "cameras.png")
    print(f"wrote     {out / 'sheet.png'}{f', {out}/cameras.png' * (not dataset.moving)}")


if __name__ == "__main__":
    run_cli(main)
