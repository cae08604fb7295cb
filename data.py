"""Objects go in, made up or photographed; frames with their masks and cameras come out.

Paper: Sec. 3.1 and 4.1. Pictures with masks and cameras are all that the method ever sees of an
object: no shape, no mesh. At a first reading chairs are made up of boxes and then photographed, so
no files are needed. At a second come other objects, people who move, photos and clips.

Shapes: N objects, V views of one object, R rays, K points; `size` is the side of the pictures.
Simplified: all frames sit in memory as bytes, 16 KiB each at 64 x 64; those of a cache do not.
Read next: train.py
"""
import signal
from dataclasses import dataclass, replace

if __name__ == "__main__":               # Ctrl-C while torch is imported: an end, no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import numpy as np
import torch
import torch.nn.functional as F

from render import orbit, pixel_directions

# ---- What every source becomes -------------------------------------------------------------------
@dataclass
class Frames:
    """A dataset: pictures of N objects, each object inside [-1, 1]^3 with y up."""
    images: torch.Tensor         # (frames, size, size, 3) uint8, colour x mask: black outside
    masks: torch.Tensor          # (frames, size, size) uint8, 255 inside, in between on the edges
    cam2world: torch.Tensor      # (frames, 4, 4) float32, in render.py's conventions
    intrinsics: torch.Tensor     # (frames, 4) float32 fx, fy, cx, cy as fractions of the side
    object_index: torch.Tensor   # (frames,) int64 in 0..N-1: whose frame it is
    heldout: torch.Tensor        # (frames,) bool: for scoring, training never sees these
    names: list                  # N of str

    @property
    def n_objects(self):
        return len(self.names)

    def frames_of(self, k, heldout=None):
        """Frame numbers (V,) int64 of object k: all, or those whose `heldout` is this."""
        chosen = self.object_index == k
        if heldout is not None:
            chosen = chosen & (self.heldout == heldout)
        return chosen.nonzero()[:, 0]

    def batch(self, index, size):
        """Frames `index` (...): images (..., 3, size, size) and masks (..., 1, size, size)."""
        frames = index.flatten()
        rgba = torch.cat([self.images[frames], self.masks[frames, ..., None]], -1)
        rgba = rgba.permute(0, 3, 1, 2).float() / 255                # (frames, 4, ...) in [0, 1]
        rgba = F.interpolate(rgba, size=(size, size), mode="area")   # means, where smaller
        rgba = rgba.reshape(*index.shape, 4, size, size)
        return rgba[..., :3, :, :], rgba[..., 3:, :, :]


# ---- Boxes, and what rays see of them ------------------------------------------------------------
LIGHT = torch.tensor([0.48, 0.72, 0.50])                 # unit length, from the object to the light
AMBIENT = 0.65                                           # OURS: light that comes from everywhere


@dataclass
class Box:
    """The cube [-1, 1]^3, stretched, turned and moved: x = centre + rotation @ (half * unit)."""
    centre: torch.Tensor         # (3,)
    half: torch.Tensor           # (3,) half its width, height, depth
    colour: tuple                # rgb in [0, 1]
    rotation: torch.Tensor       # (3, 3)

    def to_unit(self, points):
        """World points (K, 3) in unit coordinates: R^T (x - centre) / half, for x in rows."""
        return (points - self.centre) @ self.rotation / self.half

    def hit(self, o, d):
        """t (R,) at which rays o + t d, (R, 3) each, enter; inf: they miss. Any length of d."""
        # In unit coordinates the box is the cube, and a ray is still straight, with the same t. It
        # is between x = -1 and 1 from t = -o / d - 1 / |d| to -o / d + 1 / |d|; so with y and z.
        o, d = self.to_unit(o), d @ self.rotation / self.half
        step = 1 / torch.where(d == 0, 1e-9, d)          # parallel to a side: never divide by 0
        enters = -o * step - step.abs()                  # (R, 3)
        leaves = -o * step + step.abs()
        last_entry, first_exit = enters.amax(1), leaves.amin(1)
        is_hit = (last_entry < first_exit) & (last_entry > 0)        # > 0: in front of the camera
        return torch.where(is_hit, last_entry, torch.inf)

    def normal_at(self, points):
        """Outward normals (K, 3) at surface points (K, 3): of the side that a point is on."""
        unit = self.to_unit(points)
        axis = unit.abs().argmax(1)                      # of x, y and z the one that is 1 or -1
        normal = F.one_hot(axis, 3) * unit.sign()
        return normal @ self.rotation.T


def box(centre, half, colour, tilt=0.0):
    """A box; tilt: radians about x, positive leans the top towards +z."""
    c, s = np.cos(tilt), np.sin(tilt)
    rotation = torch.tensor([[1, 0, 0], [0, c, -s], [0, s, c]]).float()
    centre, half = torch.tensor(centre).float(), torch.tensor(half).float()
    return Box(centre, half, colour, rotation)


def corners(part):
    """The corners of a box, in the world: (8, 3)."""
    ends = torch.tensor([-1.0, 1.0])
    units = torch.cartesian_prod(ends, ends, ends)
    return part.centre + (units * part.half) @ part.rotation.T


def raytrace(parts, cam2world, intrinsics, size, supersample=3):
    """Pictures (V, size, size, 4) in [0, 1]: colour x mask, and the mask. Their edges are soft:
    a pixel is the mean of supersample^2 rays."""
    n = size * supersample
    in_camera = pixel_directions(intrinsics, n)                      # (V, n, n, 3)
    in_world = cam2world[:, None, None, :3, :3] * in_camera[..., None, :]      # R times each vector
    d = in_world.sum(-1).reshape(-1, 3)                              # (R, 3), of any length
    o = cam2world[:, :3, 3].repeat_interleave(n * n, 0)              # (R, 3)
    nearest = torch.full((len(d),), torch.inf)                       # t of what rays see so far
    rgb = torch.zeros(len(d), 3)
    for part in parts:
        t = part.hit(o, d)
        seen = t < nearest
        nearest[seen] = t[seen]
        # Lambert: as bright as the cosine between normal and light. No highlights: a point has one
        # colour, from wherever it is seen, as in the paper's volumes.
        normal = part.normal_at(o[seen] + t[seen, None] * d[seen])
        cosine = (normal * LIGHT).sum(1)                 # negative where the light does not reach
        shade = AMBIENT + (1 - AMBIENT) * cosine         # not clamped: sides in the dark differ
        rgb[seen] = shade[:, None] * torch.tensor(part.colour).float()
    rgba = torch.cat([rgb, nearest.isfinite()[:, None]], 1)
    return rgba.reshape(-1, size, supersample, size, supersample, 4).mean((2, 4))


# ---- Chairs --------------------------------------------------------------------------------------
# PAPER: 15,576 chairs of ShapeNet, 200 views each. SIMPLIFIED: chairs of a dozen boxes, which need
# no download. As there, few kinds of parts are combined in endless ways.
MARGIN = 0.93                    # OURS: largest half side of an object; the cube's is 1
COLOURS = dict(red=(.80, .16, .14), orange=(.92, .50, .12), yellow=(.93, .82, .22),
               green=(.20, .62, .25), blue=(.17, .33, .80), purple=(.52, .24, .66),
               white=(.88, .88, .86), brown=(.45, .28, .16))


def pick_colours(rng, n):
    """n different colours: their names, and their rgb, a little different every time."""
    names = [str(name) for name in rng.choice(list(COLOURS), n, replace=False)]
    colours = [COLOURS[name] + rng.uniform(-.05, .05, 3) for name in names]
    return names, [tuple(rgb.clip(.08, .95)) for rgb in colours]


def four_legs(rng, x, z, top, colour):
    """Legs that carry the corners of a seat of half width x and half depth z at height `top`."""
    r, h = rng.uniform(.06, .08), top / 2
    return [box((x_leg, h, z_leg), (r, h, r), colour)
            for x_leg in (r - x, x - r) for z_leg in (r - z, z - r)]


def make_chair(rng, add_legs=four_legs):
    """The boxes of a chair that looks along +z and stands on y = 0. add_legs: as four_legs."""
    _, (main, second) = pick_colours(rng, 2)
    x, z = rng.uniform(.42, .55), rng.uniform(.42, .52)              # half width, half depth
    y, thick = rng.uniform(.75, .95), .06                # height of the seat, half its thickness
    is_low = rng.random() < .3
    height = rng.uniform(.35, .5) if is_low else rng.uniform(.7, .95)            # of the back
    parts = [box((0, y, 0), (x, thick, z), main)]
    parts += add_legs(rng, x, z, y - thick, second)
    lean = -rng.uniform(0, .15)                          # radians: the back's top leans backwards
    # The back's pieces: how far sideways, how far above the seat, half width, height and depth.
    pieces = [(0, height / 2, (x, height / 2, .06))]     # one plate
    if rng.random() < .4:                                # instead, three or four slats and a rail
        pieces = [(place * (x - .055), height / 2, (.055, height / 2, .055))
                  for place in np.linspace(-1, 1, rng.integers(3, 5))]
        pieces.append((0, height, (x, .07, .06)))
    for sideways, up, half in pieces:
        behind = -z + .06 + np.tan(lean) * up
        parts.append(box((sideways, y + thick + up, behind), half, main, lean))
    if rng.random() < .4:
        rise = min(rng.uniform(.25, .35), .8 * height)   # of the armrests above the seat
        for side in (.055 - x, x - .055):                # a rest, and the post that carries it
            parts.append(box((side, y + rise, 0), (.055, .05, z), second))
            parts.append(box((side, y + rise / 2, z - .08), (.055, rise / 2, .055), second))
    return parts


def put_into_cube(parts):
    """The same parts in the middle of the cube, as large as MARGIN allows, or less where a corner
    would be more than 1.25 from the middle: that far the cameras see."""
    points = torch.cat([corners(part) for part in parts])
    low, high = points.aminmax(dim=0)
    centre = (low + high) / 2
    farthest = (points - centre).norm(dim=1).max()
    scale = min(MARGIN / (high - low).max() * 2, 1.25 / farthest)
    return [replace(part, centre=(part.centre - centre) * scale, half=part.half * scale)
            for part in parts]


def cameras_all_round(n_views, rng):
    """Cameras 4 away that look at the middle: cam2world (V, 4, 4), intrinsics (V, 4)."""
    share = (np.arange(n_views) + rng.random(n_views)) / n_views     # one in each of V equal slices
    azimuth = torch.from_numpy(share * 2 * np.pi)
    elevation = torch.from_numpy(np.radians(rng.uniform(-5, 50, n_views)))
    # A sphere of radius 1.25 spans 2 * 1.45 tan(asin(1.25 / 4)) = 95 % of the picture.
    intrinsics = torch.tensor([[1.45, 1.45, 0.5, 0.5]]).repeat(n_views, 1)
    return orbit(azimuth, elevation, 4.0).float(), intrinsics


def load_synthetic(size, holdout=6, seed=0, n_objects=128, n_views=24):
    """Frames of n_objects chairs, n_views each; every holdout-th view is held out, 0: none. (What
    `python train.py` learns has tables and vehicles, too: second reading.)
    Chair k depends on k and the seed alone, so a larger set begins with the same chairs.
    """
    rgba, cam2world, intrinsics = [], [], []
    for k in range(n_objects):
        rng = np.random.default_rng([seed, k])
        parts = put_into_cube(make_chair(rng))
        poses, cameras = cameras_all_round(n_views, rng)
        pictures = raytrace(parts, poses, cameras, size)
        rgba.append((pictures * 255).round().byte())     # as photos are
        cam2world.append(poses)
        intrinsics.append(cameras)
    rgba = torch.cat(rgba)                               # (frames, size, size, 4)
    heldout = [holdout > 0 and v % holdout == 0 for v in range(1, n_views + 1)]
    return Frames(
        images=rgba[..., :3], masks=rgba[..., 3], cam2world=torch.cat(cam2world),
        intrinsics=torch.cat(intrinsics), heldout=torch.tensor(heldout).repeat(n_objects),
        object_index=torch.arange(n_objects).repeat_interleave(n_views),
        names=[f"{k:04d}" for k in range(n_objects)])


# ==== Second reading: other objects, what moves, photos and clips =================================
import argparse  # noqa: E402
import contextlib  # noqa: E402
import difflib  # noqa: E402
import hashlib  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import mmap  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import shlex  # noqa: E402
import shutil  # noqa: E402
import struct  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from collections import Counter  # noqa: E402
from dataclasses import field  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import imageio.v3 as iio  # noqa: E402
import imageio_ffmpeg  # noqa: E402
import PIL.Image  # noqa: E402

from render import project  # noqa: E402

# ---- A stranger's input --------------------------------------------------------------------------
class BadInput(Exception):
    """What a stranger gave us is wrong: one line saying what, where, and what to do."""


class Interrupted(BaseException):
    """Ctrl-C, or a signal to end. As KeyboardInterrupt it is no Exception: whoever catches those,
    because a stranger's file may raise any of them, does not catch this. number: the signal's."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one BadInput line, with a guess at the flag that was meant."""

    # TRAP: a prefix of a flag must be an error, or --step for --steps would pass in silence.
    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        for word in args:
            # TRAP: argparse takes "--" for the end of all flags even here: the value would be [].
            if re.fullmatch(r"--[\w-]+=--", word):
                raise BadInput(f"{word[:-3]} needs a value, got --")
        return super().parse_args(args, namespace)

    def error(self, message):
        if message.startswith("unrecognized"):
            for flag in re.findall(r"--[\w-]+", message):
                for guess in difflib.get_close_matches(flag, self._option_string_actions, 1):
                    message += f" (did you mean {guess}?)"
        raise BadInput(message)


def check_number(name, value, bounds):
    """Refuses a number outside of its bounds (least, most), and what is no number at all."""
    least, most = bounds
    # TRAP: nan compares as False with everything: so it is asked what is right, not what is wrong.
    if not least <= value <= most:
        raise BadInput(f"{name} must be between {least} and {most}, got {value}")


# What a signal leaves for a loop to see, and what run_cli says of it afterwards.
#     waits   whether a loop is running that looks at `asked` after each step
#     asked   the number of the signal that came meanwhile, or None
#     saved   what can be gone on from, in words; "" where nothing can
#     start   what a program is started with
STOP = SimpleNamespace(waits=False, asked=None, saved="", start="python")


def on_signal(number, frame):
    """What Ctrl-C and SIGTERM do: stop at once, or where a loop waits for it, after the step."""
    is_first = STOP.asked is None
    STOP.asked = number
    if STOP.waits and is_first:
        return
    raise Interrupted(number)                  # also by the second signal: somebody is in a hurry


@contextlib.contextmanager
def finishing_steps():
    """Around a loop that is to end between two steps: yields STOP, whose `asked` it looks at."""
    STOP.waits = True
    try:
        yield STOP
    finally:
        STOP.waits = False
    if STOP.asked is not None:                 # in the last step, or while pictures were drawn
        raise Interrupted(STOP.asked)


@contextlib.contextmanager
def writing(path):
    """Yields a temporary name beside `path`, which becomes `path` once all is written.

    To rename is one step for the file system: whoever is killed, or finds the disk full, in the
    middle of writing leaves the earlier file as it was. The name keeps the suffix, which tells
    writers of pictures what to write, and carries the number of the process: see remove_fragments.
    Raises BadInput, which names the file and the reason.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        # TRAP: the name may be on the disk before the content is: after a power cut the file would
        # be empty, and the earlier one gone.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = getattr(error, "strerror", None) or lines[0][:100]
        raise BadInput(f"{path} cannot be written: {reason}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def is_running(process):
    """Whether there is a process of this number besides our own."""
    if process == os.getpid():
        return False                           # an earlier one's, which had our number
    if os.name == "nt":
        return True                            # TRAP: on Windows os.kill would end it
    try:
        os.kill(process, 0)                    # no signal: it only asks
    except PermissionError:
        return True                            # somebody else's
    except (OSError, OverflowError):
        return False
    return True


def remove_fragments(folder):
    """Removes what a killed program was writing in a folder, and nobody is writing any more."""
    for path in Path(folder).glob(".*.tmp*"):
        name = re.fullmatch(r"\..+\.(\d+)\.tmp(\.\w+)?", path.name)
        if name and not is_running(int(name[1])):
            path.unlink(missing_ok=True)


def make_folder(path):
    """Makes a folder for results; BadInput where nothing can be written there: better now than
    after the work."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        remove_fragments(path)
        with tempfile.TemporaryFile(dir=path):             # it goes again by itself
            pass
    except OSError as error:
        raise BadInput(f"nothing can be written into {path}: {error.strerror}") from None


def run_cli(main):
    """Calls main(); what goes wrong becomes one line on stderr and an exit status, no traceback.

    2              BadInput, a file that cannot be read or made, no memory left
    130 and 143    Ctrl-C and SIGTERM: see on_signal. The line says how to go on, where one can
    """
    STOP.asked, STOP.saved = None, ""
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, on_signal)
    try:
        call(main)
    except Interrupted as interrupted:
        for number in before:
            signal.signal(number, signal.SIG_IGN)          # it is stopping already
        stopped(interrupted.number)
    finally:
        STOP.asked = None                      # or the next main() would stop in its first step
        for number, handler in before.items():
            signal.signal(number, handler)


def call(main):
    """Calls main(); of what run_cli names, the first line: BadInput, files, memory."""
    try:
        main()
    except (BadInput, OSError) as error:
        message = str(error)
    except MemoryError:
        message = "not enough memory"
    except RuntimeError as error:
        if "memory" not in str(error):         # as torch says it
            raise
        message = f"not enough memory: {error}"
    else:
        return
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def stopped(number):
    """The line and the exit status of a program that a signal has ended."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    line = f"stopped by {name}"
    if STOP.saved and Path(sys.argv[0]).name == "train.py":      # others have no --resume
        command = sys.argv if "--resume" in sys.argv else [*sys.argv, "--resume"]
        line += f"; {STOP.saved}; go on with: {STOP.start} {shlex.join(command)}"
    print(line, file=sys.stderr)
    sys.exit(128 + number)                     # as shells say it


# ---- What every source delivers, and what it becomes ---------------------------------------------
@dataclass
class Dataset(Frames):
    """What `load` returns: frames, and what is known besides."""
    captions: list               # N of str or None
    layout: str                  # one line: what was detected
    skipped: list                # lines: what was left out, with counts
    shapes: list = None          # N lists of primitives, if known, which tests/ need to judge
    truth: dict = None           # how puppets moved, for the same
    moving: bool = False         # whether what is seen moves before one camera, fixed_camera's:
                                 # of clips it is assumed
    remarks: list = field(default_factory=list)          # lines: what is used, and looks odd
    known_portraits: torch.Tensor = None                 # of a cache, see portraits
    mapped: mmap.mmap = None     # the file that a cache's frames are in; None: they are in memory

    def frames_of(self, k, heldout=None):
        """As Frames.frames_of, and as fast among 20,000 objects as among 20: an object's frames lie
        together, in the objects' order."""
        ends = torch.tensor([k, k + 1])
        first, behind = torch.searchsorted(self.object_index, ends).tolist()
        frames = torch.arange(first, behind)
        if heldout is not None:
            frames = frames[self.heldout[first:behind] == heldout]
        return frames

    def batch(self, index, size):
        """As Frames.batch, of any size up to the frames'. Where it is less they are averaged over
        areas: right for colour x mask, while plain colours would mix with the background's."""
        if not 0 < size <= self.images.shape[1]:
            raise ValueError(f"size {size} is not in 1..{self.images.shape[1]}, the frames' side")
        pictures = super().batch(index, size)
        if self.mapped is not None:
            give_back(self.mapped)
        return pictures


# What damaged or foreign files raise when they are read. (numpy's LinAlgError is a ValueError.)
FAULTS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError,
          RecursionError, struct.error)


@dataclass
class Reading:
    """How a source is to be read, and what was found out on the way, for people to read."""
    size: int                    # side of the pictures that are wanted, in pixels
    root: str = ""               # the source's folder: names in what is said begin below it
    as_clips: bool = False       # whether folders of frames, and strips of them, are clips
    clip_filter: bool = False    # see clip_object
    max_megapixels: float = 64.0         # of a picture
    max_frames: int = 2000       # of an object
    losses: list = field(default_factory=list)           # (kind, number, reason): what is not used
    remarks: list = field(default_factory=list)          # what is used, and looks odd

    def leave_out(self, kind, reason, number=1):
        """So many of a kind, such as "view", are not used; this is why."""
        if number > 0:
            self.losses.append((kind, number, self.shortened(reason)))

    def remark(self, line):
        """Something looks odd; it is said once."""
        line = self.shortened(line)
        if line not in self.remarks:
            self.remarks.append(line)

    def shortened(self, text):
        """The text on one line, with names that begin below the source's folder."""
        text = " ".join(text.split())
        if not self.root:
            return text
        root = re.escape(self.root)                      # behind a letter it is another folder
        return re.sub(rf"(?<!\w){root}({re.escape(os.sep)}|: )", "", text)

    @contextlib.contextmanager
    def trying(self, kind, name):
        """What turns out to be wrong within costs this view, or object, and no other."""
        try:
            yield
        except BadInput as error:
            self.leave_out(kind, str(error))
        except FAULTS as error:
            self.leave_out(kind, f"{name}: missing, damaged or of another layout ({error!r})")

    def skipped(self):
        """A line for each kind of loss: how many, and the first three with their reasons."""
        lines = []
        for kind in dict.fromkeys(kind for kind, _, _ in self.losses):
            numbers = [number for one, number, _ in self.losses if one == kind]
            reasons = [reason for one, _, reason in self.losses if one == kind]
            what = kind if sum(numbers) == 1 else f"{kind}s"
            line = f"{sum(numbers)} {what} left out: {'; '.join(reasons[:3])}"
            if len(reasons) > 3:
                line += "; ..."
            lines.append(line)
        return lines


@dataclass
class Capture:
    """One object as its source delivers it: a picture, a pose and a camera for each of V views."""
    rgba: torch.Tensor           # (V, size, size, 4) uint8: colour x mask, and the mask
    cam2world: torch.Tensor      # (V, 4, 4) float32
    intrinsics: torch.Tensor     # (V, 4) float32
    caption: str = None
    shapes: list = None          # its primitives, of rigid made-up objects
    truth: dict = None           # how it moved, of puppets


def gather(names, captures, holdout, layout, reading, moving):
    """N names and Captures, and what was noted on reading them -> Dataset; holdout as in `load`."""
    views = [len(capture.rgba) for capture in captures]
    object_index, heldout = number_frames(views, holdout, moving)
    rgba = torch.cat([capture.rgba for capture in captures])         # (frames, size, size, 4)
    dataset = Dataset(
        images=rgba[..., :3], masks=rgba[..., 3],
        cam2world=torch.cat([capture.cam2world for capture in captures]),
        intrinsics=torch.cat([capture.intrinsics for capture in captures]),
        object_index=object_index, heldout=heldout, names=names,
        captions=[capture.caption for capture in captures],
        layout=layout, skipped=reading.skipped(), remarks=reading.remarks, moving=moving)
    if captures[0].shapes is not None:
        dataset.shapes = [capture.shapes for capture in captures]
    if captures[0].truth is not None:
        dataset.truth = {}
        for key in captures[0].truth:
            dataset.truth[key] = torch.cat([capture.truth[key] for capture in captures])
    return dataset


def number_frames(views, holdout, moving):
    """Whose each frame is, (frames,) int64, and whether it is held out, (frames,) bool.

    views: of each object how many; holdout as in `load`
    """
    views = torch.tensor(views)
    object_index = torch.arange(len(views)).repeat_interleave(views)
    first = views.cumsum(0) - views              # number of each object's first frame
    number = torch.arange(len(object_index)) - first[object_index]     # 0, 1, ... of an object
    if moving:
        return object_index, last_of(number, views[object_index], holdout)
    return object_index, every_nth(number, holdout)


def every_nth(number, holdout):
    """Which frames are held out: of each object every holdout-th; 0: none.

    number (frames,): each frame's, counted from 0 in its object
    """
    if holdout == 0:
        return torch.zeros_like(number, dtype=torch.bool)
    return (number + 1) % holdout == 0


def last_of(number, n_views, holdout):
    """Which frames of clips are held out: the last 1/holdout of each clip; 0: none.

    Neighbours in time are all but equal: every n-th frame would test nothing but memory.
    number (frames,) as above; n_views (frames,): how many its clip has
    """
    if holdout == 0:
        return torch.zeros_like(number, dtype=torch.bool)
    return number >= n_views - n_views // holdout


def portraits(dataset):
    """What is kept of the data to know it again: (N, 4, 4, 4), of each object the mean of its
    pictures and masks at 4 x 4 pixels, in [0, 1].

    OURS, instead of a hash: on another machine a photo is decoded a shade otherwise, and a made-up
    object drawn so.
    """
    if dataset.known_portraits is not None:
        return dataset.known_portraits
    means = []
    for k in range(dataset.n_objects):
        images, masks = dataset.batch(dataset.frames_of(k), 4)         # (V, 3, 4, 4), (V, 1, 4, 4)
        means.append(torch.cat([images, masks], 1).mean(0))
    return torch.stack(means)


# ---- Round things --------------------------------------------------------------------------------
# Together with boxes they are called primitives.

STANDING = torch.tensor([[1.0, 0, 1], [0, 1, 0]])        # the sides of an upright cylinder
ROUND = torch.ones(1, 3)                                 # the one side of an ellipsoid


@dataclass
class Round(Box):
    """A cylinder or an ellipsoid, which fills the box of the same measures.

    Each of its sides bounds a sum of squares by 1: that of an ellipsoid x^2 + y^2 + z^2 <= 1; an
    upright cylinder has two, x^2 + z^2 <= 1 round it and y^2 <= 1 at its ends.
    """
    sides: torch.Tensor          # (sides, 3): which squares each side adds up, STANDING or ROUND

    def hit(self, o, d):
        o, d = self.to_unit(o), d @ self.rotation / self.half
        d = torch.where(d == 0, 1e-9, d)                 # parallel to a side: never divide by 0
        crossings = [cross_side(side, o, d) for side in self.sides]
        last_entry = torch.stack([enter for enter, _ in crossings], 1).amax(1)
        first_exit = torch.stack([leave for _, leave in crossings], 1).amin(1)
        is_hit = (last_entry < first_exit) & (last_entry > 0)        # > 0: in front of the camera
        return torch.where(is_hit, last_entry, torch.inf)

    def normal_at(self, points):
        unit = self.to_unit(points)
        nearest = (unit ** 2 @ self.sides.T).argmax(1)   # (K,) the side whose sum is 1
        gradient = unit * self.sides[nearest] / self.half            # of half that sum
        return F.normalize(gradient @ self.rotation.T, dim=1)


def cross_side(side, o, d):
    """Where rays o + t d, in unit coordinates, enter and leave one side (3,): t (R,) each."""
    counted = side > 0
    o, d = o[:, counted], d[:, counted]
    if counted.sum() == 1:                               # as between two sides of a box
        step = 1 / d[:, 0]
        middle = -o[:, 0] * step
        return middle - step.abs(), middle + step.abs()
    a = (d ** 2).sum(1)                                  # |o + t d|^2 <= 1: a t^2 + 2 b t + c <= 0
    b = (o * d).sum(1)
    c = (o ** 2).sum(1) - 1
    discriminant = b ** 2 - a * c
    root = discriminant.clamp(min=0).sqrt()
    root = torch.where(discriminant < 0, -torch.inf, root)           # a miss: enters at infinity
    return (-b - root) / a, (-b + root) / a


def rounded(part, sides):
    """What fills a box and has these sides: STANDING or ROUND."""
    return Round(part.centre, part.half, part.colour, part.rotation, sides)


def cylinder(centre, radius, half_height, colour):
    """A cylinder that stands upright."""
    return rounded(box(centre, (radius, half_height, radius), colour), STANDING)


def wheel(centre, radius, half_width, colour):
    """A cylinder that lies along x."""
    y_to_x = torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])
    return replace(cylinder(centre, radius, half_width, colour), rotation=y_to_x)


def ball(centre, half, colour):
    """An upright ellipsoid of half axes `half`."""
    return rounded(box(centre, half, colour), ROUND)


# ---- Pictures: faster, and of what moves ---------------------------------------------------------
class Canvas:
    """The pictures that V cameras take, while they are drawn: n x n rays each, R rays in all."""

    def __init__(self, intrinsics, n):
        self.n = n
        self.intrinsics = intrinsics                                 # (V, 4)
        self.centres = (torch.arange(n) + 0.5) / n                   # (n,) of the rays' pixels
        self.directions = pixel_directions(intrinsics, n).reshape(-1, 3)         # (R, 3) in camera
        self.nearest = torch.full((len(self.directions),), torch.inf)            # how far they see
        self.rgb = torch.zeros(len(self.directions), 3)              # and what colour

    def draw(self, part, cam2world, light, ambient=AMBIENT):
        """Draws a primitive seen from cam2world (V, 4, 4) under light (V, 3), where it is in front
        of all others so far. Returns the numbers of the rays that see it.
        """
        # Only rays in the rectangle around its corners can meet it: some ten times fewer.
        uv, _ = project(corners(part), cam2world, self.intrinsics)   # (V, 8, 2)
        low, high = uv.aminmax(dim=1)                                # (V, 2)
        inside = (self.centres >= low[..., None]) & (self.centres <= high[..., None])
        columns, rows = inside.unbind(1)                             # (V, n) each
        rays = (rows[:, :, None] & columns[:, None, :]).reshape(-1).nonzero()[:, 0]
        view = rays // self.n ** 2
        o = cam2world[view, :3, 3]                                   # (rays, 3)
        d = cam2world[view, :3, :3] * self.directions[rays, None]
        d = d.sum(-1)                                                # (rays, 3) in the world
        t = part.hit(o, d)
        seen = t < self.nearest[rays]
        rays, view, o, d, t = rays[seen], view[seen], o[seen], d[seen], t[seen]
        normal = part.normal_at(o + t[:, None] * d)
        cosine = (normal * light[view]).sum(1)
        shade = ambient + (1 - ambient) * cosine
        self.rgb[rays] = shade[:, None] * torch.tensor(part.colour).float()
        self.nearest[rays] = t
        return rays

    def develop(self, size):
        """(V, size, size, 4) in [0, 1]: colour x mask, and the mask, averaged over each pixel."""
        mask = self.nearest.isfinite()[:, None]
        rgba = torch.cat([self.rgb, mask], 1)
        each = self.n // size                            # so many rays a pixel, down and across
        return rgba.reshape(-1, size, each, size, each, 4).mean((2, 4))


def draw_still(parts, cam2world, intrinsics, size, supersample=3):
    """What `raytrace` returns, bit for bit, three times as fast: see Canvas.draw."""
    canvas = Canvas(intrinsics, size * supersample)
    light = LIGHT.expand(len(cam2world), 3)
    for part in parts:
        canvas.draw(part, cam2world, light)
    return canvas.develop(size)


# ---- Made-up objects: other chairs, tables, vehicles; an arc of cameras --------------------------
BLACK = (.07, .07, .08)
GLASS = (.50, .68, .78)


def pedestal(foot, top, colour):
    """What carries a seat at height `top`: one column on a round foot of radius `foot`."""
    column = cylinder((0, top / 2 + .05, 0), .10, top / 2 - .05, colour)
    return [column, cylinder((0, .06, 0), foot, .06, colour)]


def square_or_round_legs(rng, x, z, top, colour):
    """four_legs, or four cylinders where they would stand."""
    legs = four_legs(rng, x, z, top, colour)
    if rng.random() < .4:
        legs = [rounded(leg, STANDING) for leg in legs]
    return legs


def any_legs(rng, x, z, top, colour):
    """A pedestal, or legs at the corners."""
    if rng.random() < .25:
        return pedestal(.8 * x, top, colour)
    return square_or_round_legs(rng, x, z, top, colour)


def colour_name(part):
    """The name of a part's colour, of which it is a little different: see pick_colours."""
    def difference(name):
        return np.abs(np.subtract(COLOURS[name], part.colour)).max()
    return min(COLOURS, key=difference)


def make_any_chair(rng):
    """A chair of make_chair, on any legs: its primitives; and its noun and details, for captions,
    which its parts tell."""
    parts = make_chair(rng, any_legs)
    seat, leg = parts[:2]
    if leg.centre[0] == 0:                               # a column in the middle, with a foot
        n_legs = 2
        details = [f"a {colour_name(leg)} pedestal"]
    else:
        n_legs = 4
        details = [f"{colour_name(leg)} legs"]
    others = parts[1 + n_legs:]                          # the back; armrests in the legs' colour
    n_back = sum(part.colour == seat.colour for part in others)
    if n_back > 1:
        details.append("a slatted back")
    if len(others) > n_back:
        details.append("armrests")
    return parts, f"{colour_name(seat)} chair", details


def table_plate(is_round, y, x, z, thick, colour):
    """A table's top or shelf at height y, of half width x and half depth z."""
    if is_round:
        return cylinder((0, y, 0), x, thick, colour)
    return box((0, y, 0), (x, thick, z), colour)


def make_table(rng):
    """A table: its primitives, noun and details, as make_any_chair's."""
    names, colours = pick_colours(rng, 2)
    is_round = rng.random() < .4
    has_pedestal = rng.random() < .35
    has_shelf = rng.random() < .35
    height, thick = rng.uniform(.7, 1.2), rng.uniform(.05, .07)
    if is_round:
        x = z = rng.uniform(.70, .85)                    # half width, half depth
        inset = .68                                      # the legs stand within the round rim
        noun = f"{names[0]} round table"
    else:
        x, z = rng.uniform(.75, .93), rng.uniform(.5, .7)
        inset = .95
        noun = f"{names[0]} table"

    parts = [table_plate(is_round, height, x, z, thick, colours[0])]
    if has_pedestal:
        parts += pedestal(.6 * z, height - thick, colours[1])
        details = [f"a {names[1]} pedestal"]
    else:
        parts += square_or_round_legs(rng, inset * x, inset * z, height - thick, colours[1])
        details = [f"{names[1]} legs"]
    if has_shelf:
        shelf = height * rng.uniform(.35, .5)
        parts.append(table_plate(is_round, shelf, .68 * x, .8 * z, thick, colours[0]))
        details.append("a shelf")
    return parts, noun, details


def cabin(back, front, x, y, rise, colour):
    """A vehicle's cabin from z = back to z = front on height y: glass all round, a painted roof."""
    middle, half = (back + front) / 2, (front - back) / 2
    windows = box((0, y + rise / 2, middle), (x * .9, rise / 2, half), GLASS)
    roof = box((0, y + rise + .05, middle), (x * .92, .05, half + .02), colour)
    return [windows, roof]


def make_vehicle(rng):
    """A car, van or truck that drives along +z: its primitives, noun and details."""
    names, colours = pick_colours(rng, 2)
    kind = str(rng.choice(["car", "van", "truck"]))
    x, z = rng.uniform(.36, .44), .93                    # half width, half length
    r = rng.uniform(.17, .23)                            # of the wheels
    bottom, h = r * .9, rng.uniform(.14, .18)            # of the body: lower face, half height
    top = bottom + 2 * h
    parts = [box((0, bottom + h, 0), (x, h, z), colours[0])]
    details = []
    if kind == "car":
        back, front = -.62 + rng.uniform(-.1, .1), rng.uniform(.2, .4)
        parts += cabin(back, front, x, top, rng.uniform(.2, .26), colours[0])
    elif kind == "van":
        front = rng.uniform(.45, .65)
        parts += cabin(-.91, front, x, top, rng.uniform(.35, .5), colours[0])
    else:
        front = rng.uniform(.8, .9)
        parts += cabin(.35, front, x, top, rng.uniform(.25, .35), colours[0])
        h_load = rng.uniform(.2, .35)                    # it lies behind the cabin
        middle, half = (.28 - z) / 2, (.28 + z) / 2
        parts.append(box((0, top + h_load, middle), (x, h_load, half), colours[1]))
        details.append(f"a {names[1]} box")
    for side in (-1, 1):
        lamp = (side * (x - .12), bottom + 1.2 * h, z)
        parts.append(box(lamp, (.08, .06, .03), COLOURS["yellow"]))
        for end in (-1, 1):
            hub = (side * x, r, end * rng.uniform(.54, .6))
            parts.append(wheel(hub, r, .075, BLACK))
    return parts, f"{names[0]} {kind}", details + ["black wheels"]


FAMILIES = (make_any_chair, make_table, make_vehicle)


def make_object(family, rng):
    """An object of a family such as make_table, put into the cube: its primitives, a caption."""
    if family is make_chair:                             # load_synthetic's: they have no captions
        return put_into_cube(make_chair(rng)), None
    parts, noun, details = family(rng)
    listed = details[-1]
    if len(details) > 1:
        listed = ", ".join(details[:-1]) + " and " + listed
    caption = f"a {noun} with {listed}".replace("a orange", "an orange")
    return put_into_cube(parts), caption


def cameras_on_an_arc(n_views, arc):
    """Cameras from -arc to arc degrees round the front, one step a view, as one films.

    They stand 12 away, and see the object as large as from 4: cam2world, intrinsics.
    """
    azimuth = torch.from_numpy(np.radians(np.linspace(-arc, arc, n_views)))
    f = 1.45 * 12 / 4
    intrinsics = torch.tensor([[f, f, 0.5, 0.5]]).repeat(n_views, 1)
    return orbit(azimuth, np.radians(15.0), 12.0).float(), intrinsics


def synthetic_object(k, seed, n_views, size, arc=0.0):
    """Object k, of FAMILIES in turn, and its pictures: a Capture. arc: see cameras_on_an_arc.

    It depends on k and the seed alone, so a larger set begins with the same objects.
    """
    rng = np.random.default_rng([seed, k])
    parts, caption = make_object(FAMILIES[k % len(FAMILIES)], rng)
    if arc == 0:
        cam2world, intrinsics = cameras_all_round(n_views, rng)
    else:
        cam2world, intrinsics = cameras_on_an_arc(n_views, arc)
    pictures = draw_still(parts, cam2world, intrinsics, size)
    rgba = (pictures * 255).round().byte()
    return Capture(rgba, cam2world, intrinsics, caption, shapes=parts)


# ---- Puppets: made-up people who move before one camera ------------------------------------------
# They stand in for the paper's CelebV-Text, with all that no film tells: who was in which pose.

PARTS = ("head", "torso", "left arm", "right arm", "left leg", "right leg")
TORSO, LEFT_ARM, RIGHT_ARM = 1, 2, 3

HAIR = dict(black=(.10, .09, .09), brown=(.36, .21, .11), blond=(.90, .75, .40),
            ginger=(.75, .33, .10), grey=(.62, .62, .64))
SKIN = ((.96, .78, .66), (.85, .62, .46), (.62, .41, .28), (.50, .33, .24))
PINK, CYAN = (.95, .42, .66), (.20, .74, .82)            # left and right: no shirt has these
LIPS, BADGE, SHOE = (.70, .14, .16), (.14, .12, .20), (.9, .9, .88)


@dataclass
class Puppet:
    """Measures and colours of a puppet. Its left is at +x; its feet stand at y = -0.85."""
    hip: float                   # height of the legs' joints
    shoulder: float              # height of the arms' ends
    chest: float                 # half of the shoulders' width
    head: float                  # radius
    limb: float                  # radius of an arm
    arm: float                   # length
    skin: tuple
    shirt: tuple
    trousers: tuple
    left: tuple                  # colour of what is on its left: hand, sleeve, shoe, earmuff
    right: tuple
    hair: tuple

    @property
    def leg(self):
        """Length of a leg."""
        return self.hip + 0.85

    @property
    def middle(self):
        """Height of the body's middle."""
        return (self.hip + self.shoulder) / 2

    @property
    def chin(self):
        """Height of the neck's joint."""
        return self.shoulder + .07


def make_head(puppet):
    """The head's primitives: hair on top and behind; nose, mouth, two eyes in front; earmuffs."""
    r, y = puppet.head, puppet.chin + 1.15 * puppet.head
    nose_size = (.2 * r, .2 * r, .2 * r)
    eye_size = (.18 * r, .24 * r, .15 * r)
    muff_size = (.35 * r, .55 * r, .5 * r)
    left_eye = ball((.4 * r, y + .05 * r, .86 * r), eye_size, BLACK)
    right_eye = ball((-.4 * r, y + .05 * r, .86 * r), eye_size, BLACK)
    left_muff = ball((.95 * r, y - .05 * r, 0), muff_size, puppet.left)
    right_muff = ball((-.95 * r, y - .05 * r, 0), muff_size, puppet.right)
    skull = ball((0, y, 0), (r, 1.2 * r, r), puppet.skin)
    hair = ball((0, y + .35 * r, -.25 * r), (1.06 * r, 1.05 * r, r), puppet.hair)
    nose = ball((0, y - .25 * r, r), nose_size, puppet.skin)
    mouth = box((0, y - .62 * r, .8 * r), (.36 * r, .11 * r, .12 * r), LIPS)
    return [left_eye, right_eye, left_muff, right_muff, skull, hair, nose, mouth]


def make_torso(puppet):
    """The torso's primitives: neck, shirt, hips, a badge; and a vest that is open in front: what is
    seen of its two halves, in two colours, tells how far the body has turned."""
    x, y = puppet.chest, puppet.middle + .03
    half = (puppet.shoulder - puppet.hip) / 2
    badge_height = (puppet.shoulder + puppet.middle) / 2
    vest_size = (.60 * x, half + .03, .19)
    neck = cylinder((0, puppet.chin, 0), .08, .07, puppet.skin)
    shirt = ball((0, y, 0), (x, half + .05, .20), puppet.shirt)
    hips = ball((0, puppet.hip + .02, 0), (.95 * x, .14, .19), puppet.trousers)
    badge = box((0, badge_height, .17), (.07, .07, .03), BADGE)
    left_vest = ball((.5 * x, y, .01), vest_size, puppet.left)
    right_vest = ball((-.5 * x, y, .01), vest_size, puppet.right)
    return [neck, shirt, hips, badge, left_vest, right_vest]


def make_arm(puppet, x, colour):
    """An arm that hangs down at x: sleeve, forearm and, last, the hand."""
    top, length, r = puppet.shoulder, puppet.arm, puppet.limb
    sleeve_size = (r + .02, .29 * length, r + .02)
    sleeve = ball((x, top - .25 * length, 0), sleeve_size, colour)
    forearm = ball((x, top - .68 * length, 0), (r, .27 * length, r), puppet.skin)
    hand = ball((x, top - .93 * length, 0), (.07, .085, .07), colour)
    return [sleeve, forearm, hand]


def make_leg(puppet, x, colour):
    """A leg that stands at x: thigh, shin, a sock and a shoe."""
    top, length, r = puppet.hip, puppet.leg, puppet.limb
    thigh_size = (r + .04, .33 * length, r + .04)
    shin_size = (r + .02, .30 * length, r + .02)
    thigh = ball((x, top - .25 * length, 0), thigh_size, puppet.trousers)
    shin = ball((x, top - .65 * length, 0), shin_size, puppet.trousers)
    sock = cylinder((x, -.73, 0), r + .01, .05, SHOE)
    shoe = ball((x, -.79, .04), (.075, .06, .13), colour)
    return [thigh, shin, sock, shoe]


def pick_shade(rng, rgb, shared_colours):
    """rgb, a little different every time; or, where colours are not shared, any colour at all."""
    if not shared_colours:
        rgb = rng.uniform(.05, .95, 3)
    return tuple((rgb + rng.uniform(-.05, .05, 3)).clip(.05, .97))


def make_puppet(rng, shared_colours=True):
    """A puppet at rest: six lists of primitives in the order of PARTS, joints (6, 3), a caption.

    At rest it looks along +z and lets its arms hang. OURS: colours differ, their roles do not (eyes
    in front, pink on the left, cyan on the right), as with real people, so that poses can be
    learned. Without shared_colours those of skin, hair, left and right are anything.
    """
    hair = str(rng.choice(list(HAIR)))
    names, (shirt, trousers) = pick_colours(rng, 2)
    skin = SKIN[rng.integers(len(SKIN))]
    skin = pick_shade(rng, skin, shared_colours)
    left = pick_shade(rng, PINK, shared_colours)
    right = pick_shade(rng, CYAN, shared_colours)
    puppet = Puppet(
        hip=rng.uniform(-.26, -.16), shoulder=rng.uniform(.18, .24), chest=rng.uniform(.22, .28),
        head=rng.uniform(.23, .26), limb=rng.uniform(.055, .075), arm=rng.uniform(.48, .56),
        skin=skin, shirt=shirt, trousers=trousers, left=left, right=right,
        hair=pick_shade(rng, HAIR[hair], shared_colours))

    arm_x, leg_x = puppet.chest + .03, .52 * puppet.chest            # of the left ones
    parts = [make_head(puppet), make_torso(puppet)]
    parts.append(make_arm(puppet, arm_x, left))
    parts.append(make_arm(puppet, -arm_x, right))
    parts.append(make_leg(puppet, leg_x, left))
    parts.append(make_leg(puppet, -leg_x, right))

    arm_y = puppet.shoulder - .03
    joints = [(0, puppet.chin, 0), (0, puppet.hip, 0)]               # of head and torso
    joints += [(arm_x, arm_y, 0), (-arm_x, arm_y, 0)]
    joints += [(leg_x, puppet.hip, 0), (-leg_x, puppet.hip, 0)]
    caption = f"a puppet with {hair} hair, a {names[0]} shirt and {names[1]} trousers"
    return parts, torch.tensor(joints).float(), caption.replace("a orange", "an orange")


def rotation_about(axis, angle):
    """Rotations (V, 3, 3) about axis 0, 1 or 2 by angles (V,), radians."""
    after, last = (axis + 1) % 3, (axis + 2) % 3
    R = torch.eye(3).repeat(len(angle), 1, 1)
    R[:, after, after] = angle.cos()
    R[:, after, last] = -angle.sin()
    R[:, last, after] = angle.sin()
    R[:, last, last] = angle.cos()
    return R


def rotations(pitch, yaw, roll):
    """Rotations (V, 3, 3) about x by pitch, then z by roll, then y by yaw; angles (V,) each."""
    return rotation_about(1, yaw) @ rotation_about(2, roll) @ rotation_about(0, pitch)


def swing(rng, n, low, high, pace=3):
    """Angles (n,), radians, that go to and fro between low and high degrees and reach both."""
    return torch.deg2rad(low + (high - low) / 2 * (1 + wave(rng, n, pace)))


def wave(rng, n, pace=3):
    """(n,) from -1 to 1: two sines of random pace and phase."""
    t = np.linspace(0, 2 * np.pi, n)
    slow = np.sin(rng.uniform(pace, 1.5 * pace) * t + rng.uniform(0, 2 * np.pi))
    fast = np.sin(rng.uniform(2 * pace, 3 * pace) * t + rng.uniform(0, 2 * np.pi))
    x = slow + .5 * fast
    x = 2 * (x - x.min()) / max(np.ptp(x), 1e-9) - 1
    return torch.from_numpy(x).float()


def move_puppet(joints, n, rng):
    """How a puppet moves in n frames: yaw (n,); angles (n, 4) of arms and legs, radians; poses
    (n, 6, 4, 4), each part's rigid motion from rest.

    Every part turns about its joint, then the whole body about 0, within +-45 degrees to both
    sides: one camera in front sees no more.
    """
    # All else is three times as fast as the body turns: over a clip the two are uncorrelated, so
    # what an arm does, or a step aside, cannot be mistaken for a turn.
    yaw = swing(rng, n, -45, 45, pace=1)
    still = torch.zeros(n)
    raise_left, raise_right = swing(rng, n, 0, 100), swing(rng, n, 0, 100)       # arms, sideways
    spread_left, spread_right = swing(rng, n, 0, 8), swing(rng, n, 0, 8)         # legs, sideways
    step_left, step_right = swing(rng, n, -25, 25), swing(rng, n, -25, 25)       # legs, forwards

    head = rotations(swing(rng, n, -8, 8), swing(rng, n, -10, 10), still)
    torso = rotations(still, still, still)
    left_arm = rotations(-swing(rng, n, 0, 40), still, raise_left)
    right_arm = rotations(-swing(rng, n, 0, 40), still, -raise_right)
    left_leg = rotations(-step_left, still, spread_left)
    right_leg = rotations(-step_right, still, -spread_right)
    R = torch.stack([head, torso, left_arm, right_arm, left_leg, right_leg], 1)  # (n, 6, 3, 3)

    # x -> R (x - joint) + joint: the joint stays where it is.
    about_joint = torch.eye(4).repeat(n, 6, 1, 1)
    about_joint[..., :3, :3] = R
    about_joint[..., :3, 3] = joints - (R @ joints[..., None])[..., 0]
    body = torch.eye(4).repeat(n, 1, 1, 1)
    body[:, 0, :3, :3] = rotations(swing(rng, n, -4, 4), yaw, swing(rng, n, -3, 3))
    body[:, 0, 0, 3] = 0.03 * wave(rng, n)               # a step aside
    angles = torch.stack([raise_left, raise_right, step_left, step_right], 1)
    return yaw, angles, body @ about_joint


def fixed_camera(n, distance=12.0, view=0.175):
    """n times the one camera in front. PAPER: its field of view is 0.175 radians.

    cam2world (n, 4, 4), intrinsics (n, 4)
    """
    f = 0.5 / np.tan(view / 2)
    intrinsics = torch.tensor([[f, f, 0.5, 0.5]]).float()
    return orbit(torch.zeros(n), 0.0, distance), intrinsics.repeat(n, 1)


def raytrace_moving(parts, moves, cam2world, intrinsics, size):
    """Pictures of P lists of primitives, list p moved by moves (V, P, 4, 4) from rest.

    returns rgba (V, size, size, 4) in [0, 1] and labels (V, size, size) uint8: 1 + the list that is
            seen at the pixel's centre, 0 for none
    """
    supersample = 3                                      # odd: the ray in the middle is the centre
    canvas = Canvas(intrinsics, size * supersample)
    labels = torch.zeros(canvas.nearest.shape, dtype=torch.uint8)    # (R,)
    for p, primitives in enumerate(parts):
        # What was moved by M looks from camera C as what stayed looks from M^-1 C; so does light.
        poses = moves[:, p].inverse() @ cam2world
        light = LIGHT @ moves[:, p, :3, :3]
        for primitive in primitives:
            # OURS: ambient nearly 1. A part that turns changes its shade, which no volume of one
            # colour a point can express.
            rays = canvas.draw(primitive, poses, light, ambient=0.85)
            labels[rays] = 1 + p
    labels = labels.reshape(-1, canvas.n, canvas.n)                  # (V, n, n)
    return canvas.develop(size), labels[:, 1::supersample, 1::supersample]


def puppet_object(k, seed, n_views, size, shared_colours=True):
    """Puppet k, whatever their number: a Capture, one clip from one fixed camera.

    Its truth, which only judges look at: yaw (V,) and angles (V, 4), radians (arms raised sideways,
    legs forwards: left arm, right arm, left leg, right leg); poses (V, 6, 3, 4) of PARTS from rest
    to the frame; parts (V, size, size) uint8, 1 + the part at the pixel's centre, 0 for none.
    """
    rng = np.random.default_rng([seed, 1000 + k])
    parts, joints, caption = make_puppet(rng, shared_colours)
    yaw, angles, moves = move_puppet(joints, n_views, rng)
    cam2world, intrinsics = fixed_camera(n_views)
    rgba, labels = raytrace_moving(parts, moves, cam2world, intrinsics, size)
    rgba = (rgba * 255).round().byte()
    truth = {"yaw": yaw, "angles": angles, "poses": moves[..., :3, :], "parts": labels}
    return Capture(rgba, cam2world, intrinsics, caption, truth=truth)


# ---- Files ---------------------------------------------------------------------------------------
# A stranger's folder holds more than its layout says: what systems leave behind, links that lead
# nowhere, pictures of 60,000 pixels. Whatever is opened goes through these functions.
PHOTOS = (".png", ".jpg", ".jpeg")
VIDEOS = (".mp4", ".gif", ".webm", ".avi", ".mov", ".mkv", ".m4v")


def listing(folder):
    """What lies in a folder, by name: files and folders, but none that are hidden (.DS_Store), and
    no pipes or devices, which would be waited for forever."""
    found = []
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and (path.is_file() or path.is_dir()):
            found.append(path)
    return found


def files_in(folder, suffixes):
    """The files in a folder that end so, in small letters or capitals; [] where it is none."""
    if not folder.is_dir():
        return []
    return [path for path in listing(folder)
            if path.suffix.lower() in suffixes and path.is_file()]


def photos_in(folder):
    """The photos in its folder images/, or else right in it, by name."""
    return files_in(folder / "images", PHOTOS) or files_in(folder, PHOTOS)


def check_file(path):
    """BadInput where there is no file of this name."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file")


def read_text(path, most=2 ** 26):
    """A text file's content. 64 MiB: the cameras of 60,000 photos as JSON."""
    check_file(path)
    size = path.stat().st_size
    if size > most:
        raise BadInput(f"{path}: {size / 2**20:.0f} MiB of text; no such file has over "
                       f"{most / 2**20:.0f}")
    return path.read_text(encoding="utf-8-sig", errors="replace")    # sig: some begin with a mark


def read_json(path):
    """What a JSON file holds."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: damaged, or not JSON ({error})") from None


def read_array(path, columns):
    """Rows of `columns` numbers (n, columns) float64, from .npy or text."""
    check_file(path)
    try:
        if path.suffix.lower() == ".npy":
            # Mapped, not read: a header may promise more numbers than there are in the world.
            array = np.load(path, mmap_mode="r")
        else:
            array = np.array(read_text(path, 2 ** 20).split(), float)
        if array.size > 10 ** 7:
            raise ValueError(f"{array.size} numbers")
        return np.array(array, float).reshape(-1, columns)
    except Exception as error:           # numpy's reader of headers raises anything
        raise BadInput(f"{path}: expected rows of {columns} numbers ({error})") from None


PIL.Image.MAX_IMAGE_PIXELS = None        # pillow's own limit: here check_shape has one


def picture_shape(path):
    """Height and width of a picture, which its first bytes tell."""
    check_file(path)
    try:
        return iio.improps(path, index=0, plugin="pillow").shape[:2]
    except Exception as error:           # decoders raise anything from SyntaxError to OSError
        raise BadInput(f"{path}: truncated, or not a picture ({error})") from None


def check_shape(path, height, width, reading, longest=4):
    """BadInput where a picture, or a film's frame, has over reading.max_megapixels, or where a side
    is over `longest` times the other: such a strip, made square, would fill the memory."""
    if height * width > reading.max_megapixels * 1e6:
        raise BadInput(f"{path}: {width}x{height} pixels; over {reading.max_megapixels:g} million "
                       "are read with a higher --max-megapixels only")
    if max(height, width) > longest * min(height, width):
        raise BadInput(f"{path}: {width}x{height} pixels: no photo is so long")


def read_image(path, reading, upright=False, longest=4):
    """(H, W, 4) uint8; alpha 255 where the file has none; of an animation, the first picture.

    upright  turned as its EXIF orientation says; else pixels as they are stored
    SIMPLIFIED: 16-bit grey is clipped.
    """
    height, width = picture_shape(path)
    check_shape(path, height, width, reading, longest)
    try:
        return iio.imread(path, index=0, mode="RGBA", rotate=upright, plugin="pillow")
    except Exception as error:           # as above
        raise BadInput(f"{path}: truncated, or not a picture ({error})") from None


def orientation(path):
    """EXIF's: 1 upright; 3 upside down; 6 its left side is up; 8 its right side is up; the others
    are mirrored."""
    try:
        metadata = iio.immeta(path, index=0, plugin="pillow", exclude_applied=False)
    except Exception as error:           # as above
        raise BadInput(f"{path}: truncated, or not a picture ({error})") from None
    found = metadata.get("Orientation", 1)
    return found if found in range(1, 9) else 1


# ---- Photos: what a layout tells of one view -----------------------------------------------------
#
# A photo needs three companions: its mask, its camera's pose, its camera's lens. Every layout tells
# them in its own way; here each becomes a list of View, and from there one path serves all layouts.

# OpenCV's camera: x right, y DOWN, looking along +z. Ours: x right, y up, looking along -z.
# cam2world @ FLIP leads from either to the other: it turns the axes and keeps the position.
FLIP = np.diag([1.0, -1, -1, 1])


@dataclass(eq=False)
class View:
    """One photo with its camera, as its layout tells; read_shot refuses what cannot be."""
    image: Path
    pose: np.ndarray                 # (4, 4) cam2world, our camera axes, the layout's own world
    camera: tuple                    # fx, fy, cx, cy in pixels of ...
    camera_size: tuple               # ... an image of this (width, height); the file may be smaller
    lens: tuple = (0, 0, 0, 0)       # k1, k2, p1, p2 of `undistort`
    mask: Path = None                # where the layout names it; None: `find_mask` looks for it
    white_background: bool = False   # what is white is not the object
    stored: bool = False             # whether the camera is of the pixels as stored, for certain:
                                     # COLMAP does not turn photos as their EXIF says
    size_is_told: bool = True        # whether camera_size is the layout's, not the file's own


def check_pose(image, pose):
    """BadInput unless pose is [R t; 0 1] with a rotation R: R R^T = I and det R = +1."""
    if pose.shape != (4, 4):
        raise BadInput(f"{image}: its pose has shape {pose.shape}, not (4, 4)")
    if not (np.abs(pose) < 1e12).all():  # false of nan, too
        raise BadInput(f"{image}: its pose is not finite")
    R = pose[:3, :3]
    error = np.abs(R @ R.T - np.eye(3)).max()
    mirrored = np.linalg.det(R) < 0
    if error > 0.02 or mirrored:         # OURS: files with few digits are forgiven
        raise BadInput(f"{image}: the 3x3 part of its pose is not a rotation")
    if np.abs(pose[3] - [0, 0, 0, 1]).max() > 1e-6:
        raise BadInput(f"{image}: the last row of its pose is not 0 0 0 1; is it transposed?")


def check_camera(image, camera, camera_size, lens):
    """BadInput unless focal lengths and sizes are positive, and no number is over a million."""
    numbers = np.array([*camera, *camera_size, *lens], float)
    fx, fy = camera[:2]
    width, height = camera_size
    too_large = not (np.abs(numbers) < 1e6).all()        # true of nan, too
    if min(fx, fy, width, height) < 1e-6 or too_large:
        raise BadInput(f"{image}: camera {camera} of an image {width:g} x {height:g}, lens {lens}: "
                       "the focal length and the size must be positive, all in pixels")


def to_4x4(matrix):
    """A pose (3, 4) = [R t] with the row 0 0 0 1 below, so that poses multiply and invert."""
    return np.vstack([matrix, [0, 0, 0, 1]])


# ---- Photos: where files and masks are -----------------------------------------------------------
def any_spelling(path):
    """The picture of this name, or None: a.jpg, or else a.jpg.png and so on, or else a.png and so
    on; suffixes in small letters or capitals."""
    if path.is_file():
        return path
    without_suffix = path
    if path.suffix.lower() in PHOTOS:
        without_suffix = path.with_suffix("")
    for name in (path, without_suffix):
        for suffix in PHOTOS:
            for spelling in (suffix, suffix.upper()):
                picture = Path(f"{name}{spelling}")
                if picture.is_file():
                    return picture
    return None


# Where a listed photo may lie, tried in this order: {listed} is its name in the layout's file.
PHOTO_PLACES = ["{listed}", "images/{listed}", "images/{name}", "{name}"]


def find_photo(folder, listed):
    """A photo of a layout's list, which may lack its suffix, or have Windows' separators. Where
    there is none, the path where it was looked for first."""
    listed = with_slashes(listed)
    name = listed.split("/")[-1]
    for place in PHOTO_PLACES:
        photo = any_spelling(folder / place.format(listed=listed, name=name))
        if photo is not None:
            return photo
    if "." not in name:
        listed += ".png"
    return folder / listed


def with_slashes(listed):
    """A path of a layout's list, which Windows may have written."""
    return str(listed).replace("\\", "/")


# Where the mask of a photo may lie, in any_spelling, tried in this order; for scene/images_8/a.jpg:
MASK_PLACES = [
    "{twin}/{photo}",                # scene/masks_8/a.jpg: "mask" for "image"
    "masks/{photo}",                 # scene/masks/a.jpg
    "mask/{photo}",                  # scene/mask/a.jpg
]


def find_mask(image):
    """The file of a photo's mask, or None.

    Photos may lie a folder deeper: scene/images/cam0/a.jpg has scene/masks/cam0/a.jpg.
    """
    for folder in (image.parent, image.parent.parent):   # of the photos
        scene = folder.parent
        twin = folder.name.replace("image", "mask")
        photo = image.relative_to(folder).as_posix()
        for place in MASK_PLACES:
            path = scene / place.format(twin=twin, photo=photo)
            # Without "image" in its name the twin is the folder itself: those are photos.
            if folder in path.parents:
                continue
            mask = any_spelling(path)
            if mask is not None:
                return mask
    return None


def read_mask(path, shape, reading):
    """(H, W) bool of a file: its own alpha, if that says anything, or else what is bright.

    A mask of other size and the same shape as its photo, (height, width), is made as large.
    """
    mask = read_image(path, reading)
    red, green, blue, alpha = mask.transpose(2, 0, 1)
    inside = alpha if has_mask(mask) else np.maximum(np.maximum(red, green), blue)
    height, width = shape
    if inside.shape != shape:
        if abs(inside.shape[1] * height / (inside.shape[0] * width) - 1) > 0.02:
            raise BadInput(f"{path}: mask of {inside.shape}, photo of {shape} pixels; if one of "
                           "them is turned by EXIF, turn its pixels for good")
        plane = torch.from_numpy(inside)[None, None].float()
        inside = F.interpolate(plane, size=shape, mode="area")[0, 0].numpy()
    return inside > 127


def read_masked(path, reading, mask=None, upright=False):
    """(H, W, 4) uint8 of a photo; alpha is its mask, if one is given, or found beside it."""
    image = read_image(path, reading, upright)
    mask = mask or find_mask(path)
    if mask is not None:
        image[..., 3] = 255 * read_mask(mask, image.shape[:2], reading)
    return image


# ---- Photos: NeRF's transforms.json --------------------------------------------------------------
#
# From here on, one reader a layout: read_...(folder, reading) -> views, up.
#   up        (3,) the direction in the layout's world that is up; None: the layout leaves it open
# A view that cannot be read is left out by reading.trying; the others go on.
# Lenses that `undistort` knows, as camera_model; the pinhole is one without terms.
STRAIGHTENED = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE", "SIMPLE_RADIAL", "RADIAL")


def read_transforms(folder, reading):
    """NeRF and its heirs: one json; cam2world in our own camera axes; the world's z is up."""
    path = folder / "transforms.json"
    if not path.is_file():
        path = folder / "transforms_train.json"
    for other in files_in(folder, (".json",)):
        if other.name.startswith("transforms") and other != path:
            reading.remark(f"{other}: not read, as {path.name} is there")
    whole = read_json(path)
    if not isinstance(whole, dict) or not isinstance(whole.get("frames"), list):
        raise BadInput(f'{path}: no list "frames"')
    views = []
    for i, frame in enumerate(whole["frames"]):
        with reading.trying("view", f"{path}, frame {i}"):
            entry = {**whole, **frame}   # a frame may have its own camera, or share the file's
            views.append(transforms_view(entry, folder, path, reading))
    return views, (0, 0, 1)


def transforms_view(entry, folder, path, reading):
    """The View of one frame, with all that it shares with the others."""
    image = find_photo(folder, entry["file_path"])
    if "w" in entry and "h" in entry:
        width, height = float(entry["w"]), float(entry["h"])
    else:
        height, width = picture_shape(image)             # as it is stored
    camera = transforms_camera(entry, path, width, height)
    lens = transforms_lens(entry, path)
    mask = None
    if "mask_path" in entry:
        mask = folder / with_slashes(entry["mask_path"])
    pose = np.array(entry["transform_matrix"], float)
    return View(image, pose, camera, (width, height), lens, mask, size_is_told="w" in entry)


def transforms_camera(entry, path, width, height):
    """fx, fy, cx, cy in pixels; f from an angle of view: tan(angle / 2) = width / (2 f)."""
    given = {}
    for axis, side in (("x", width), ("y", height)):
        if f"fl_{axis}" in entry:
            given[axis] = float(entry[f"fl_{axis}"])
        elif f"camera_angle_{axis}" in entry:
            given[axis] = side / (2 * np.tan(float(entry[f"camera_angle_{axis}"]) / 2))
    if not given:
        raise BadInput(f"{path}: no focal length: neither fl_x nor camera_angle_x is given")
    fx = given.get("x", given.get("y"))                  # square pixels, where one is not given
    fy = given.get("y", fx)
    cx = float(entry.get("cx", width / 2))
    cy = float(entry.get("cy", height / 2))
    return fx, fy, cx, cy


def transforms_lens(entry, path):
    """k1, k2, p1, p2; other lenses are refused rather than bent wrongly."""
    model = entry.get("camera_model", "OPENCV")
    more_terms = entry.get("k3") or entry.get("k4")
    if more_terms or entry.get("is_fisheye") or model not in STRAIGHTENED:
        raise BadInput(f"{path}: a fisheye, or another lens than k1, k2, p1, p2 tell ({model}): "
                       "undistort the photos first")
    return tuple(float(entry.get(term, 0)) for term in ("k1", "k2", "p1", "p2"))


# ---- Photos: SRN ---------------------------------------------------------------------------------
def read_srn(folder, reading):
    """SRN's ShapeNet renders: a text file a pose, OpenCV's cam2world; photos on white."""
    # The file reads: f cx cy 0, then the origin, near and scale, then height width.
    numbers = read_array(folder / "intrinsics.txt", 1)[:, 0]
    f, cx, cy = numbers[:3]
    height, width = numbers[-2:]
    views = []
    for path in files_in(folder / "pose", (".txt",)):
        with reading.trying("view", str(path)):
            image = find_photo(folder / "rgb", path.stem)
            pose = read_array(path, 4) @ FLIP
            views.append(View(image, pose, (f, f, cx, cy), (width, height), white_background=True))
    # OURS: its sets differ in which axis is up; but it is an axis, and the cameras stand upright.
    return views, nearest_axis(mean_up(views))


def mean_up(views):
    """The mean (3,) of the views' own up, as unit vectors: people hold cameras level."""
    ups = [np.zeros(3)]
    for view in views:
        if view.pose.shape == (4, 4) and np.isfinite(view.pose).all():
            ups.append(view.pose[:3, 1])
    return np.sum(ups, 0) / max(1, len(ups) - 1)


def nearest_axis(direction):
    """The one of +-x, +-y, +-z that a direction (3,) is nearest to."""
    largest = np.abs(direction).argmax()
    axis = np.zeros(3)
    axis[largest] = np.sign(direction[largest])
    return axis


# ---- Photos: LLFF --------------------------------------------------------------------------------
def read_llff(folder, reading):
    """LLFF: poses_bounds.npy, a row a photo in the order of their names."""
    photos = llff_photos(folder, reading)
    path = folder / "poses_bounds.npy"
    rows = read_array(path, 17)          # a 3x5 matrix, then the nearest and farthest depth
    if len(rows) != len(photos):
        raise BadInput(f"{path}: {len(rows)} poses for {len(photos)} photos in {photos[0].parent}")
    views = []
    for image, row in zip(photos, rows):
        # TRAP: the columns are down, right, backwards. Read as right, up, backwards the pictures
        # look nearly right, and no shape explains them.
        columns = row[:15].reshape(3, 5).T
        down, right, back, position, (height, width, f) = columns
        pose = to_4x4(np.stack([right, -down, back, position], 1))
        camera = f, f, width / 2, height / 2
        views.append(View(image, pose, camera, (width, height), stored=True))
    return views, None


def llff_photos(folder, reading):
    """The smallest copy of the photos (images, images_4, images_8 ...) that is large enough for
    pictures of side reading.size, or else the largest."""
    copies = []
    for copy in listing(folder):
        photos = photos_in(copy)
        if copy.name.startswith("images") and photos:
            copies.append((shorter_side(photos), photos))
    if not copies:
        raise BadInput(f"{folder}: poses_bounds.npy, but no photos in images or images_8")
    copies.sort()
    for side, photos in copies:
        if side >= reading.size:
            return photos
    _, largest = copies[-1]
    return largest


def shorter_side(photos):
    """That of the first photo that is one; 0 if none is."""
    for photo in photos:
        try:
            return min(picture_shape(photo))
        except BadInput:                 # it is left out where it is read
            continue
    return 0


# ---- Photos: COLMAP ------------------------------------------------------------------------------
#
# COLMAP, as MVImgNet ships it, writes a sparse model as two files, in text or binary:
#   cameras   number -> model, width, height, parameters
#   images    name, rotation (a quaternion), translation, number of the camera

# COLMAP's camera models, in the order of its numbers, and how many parameters each has: the binary
# file must be read past all of them, but only those of `colmap_camera` can be used.
COLMAP_MODELS = [
    ("SIMPLE_PINHOLE", 3),
    ("PINHOLE", 4),
    ("SIMPLE_RADIAL", 4),
    ("RADIAL", 5),
    ("OPENCV", 8),
    ("OPENCV_FISHEYE", 8),
    ("FULL_OPENCV", 12),
    ("FOV", 5),
    ("SIMPLE_RADIAL_FISHEYE", 4),
    ("RADIAL_FISHEYE", 5),
    ("THIN_PRISM_FISHEYE", 12),
]


def read_colmap(folder, reading):
    """COLMAP's sparse model: OpenCV's camera axes, and world-to-camera, not camera-to-world."""
    sparse, images = largest_model(folder, reading)
    if (sparse / "images.bin").is_file():
        cameras = binary_cameras(sparse / "cameras.bin", reading.max_frames)
    else:
        cameras = text_cameras(sparse / "cameras.txt")
    views = []
    for name, quaternion, translation, number in sorted(images):
        with reading.trying("view", f"{sparse}: {name}"):
            model, width, height, parameters = cameras[number]
            camera, lens = colmap_camera(model, parameters, folder)
            image = find_photo(folder / "images", name)
            R = quaternion_matrix(*quaternion)
            world2cam = to_4x4(np.column_stack([R, translation]))
            pose = np.linalg.inv(world2cam) @ FLIP
            views.append(View(image, pose, camera, (width, height), lens, stored=True))
    return views, None


def largest_model(folder, reading):
    """The folder of the sparse model that has most photos, and these, as text_images has them.

    COLMAP writes several, sparse/0, sparse/1 ..., where it could not connect all photos.
    """
    models = []
    for sparse in [folder / "sparse", *listing(folder / "sparse")]:
        with reading.trying("COLMAP model", str(sparse)):
            if (sparse / "images.bin").is_file():
                models.append((sparse, binary_images(sparse / "images.bin", reading.max_frames)))
            elif (sparse / "images.txt").is_file():
                models.append((sparse, text_images(sparse / "images.txt")))
    if not models:
        raise BadInput(f"{folder}: no model in sparse/ can be read: {reading.losses[-1][-1]}")
    models.sort(key=lambda model: len(model[1]), reverse=True)       # of equal ones, the first
    if len(models) > 1:
        sparse, images = models[0]
        counts = ", ".join(f"{other.name} has {len(its)}" for other, its in models[1:])
        reading.remark(f"{sparse}: the largest of {len(models)} models is taken, of {len(images)} "
                       f"photos; {counts}")
    return models[0]


def colmap_camera(model, parameters, folder):
    """(fx, fy, cx, cy) in pixels and the lens (k1, k2, p1, p2) of one of COLMAP's models."""
    if model == "SIMPLE_PINHOLE":
        f, cx, cy = parameters
        return (f, f, cx, cy), (0, 0, 0, 0)
    if model == "PINHOLE":
        fx, fy, cx, cy = parameters
        return (fx, fy, cx, cy), (0, 0, 0, 0)
    if model == "SIMPLE_RADIAL":
        f, cx, cy, k1 = parameters
        return (f, f, cx, cy), (k1, 0, 0, 0)
    if model == "RADIAL":
        f, cx, cy, k1, k2 = parameters
        return (f, f, cx, cy), (k1, k2, 0, 0)
    if model == "OPENCV":
        fx, fy, cx, cy, k1, k2, p1, p2 = parameters
        return (fx, fy, cx, cy), (k1, k2, p1, p2)
    raise BadInput(f"{folder}: camera model {model} is not known; run COLMAP's image_undistorter, "
                   "which makes PINHOLE cameras")


def quaternion_matrix(w, x, y, z):
    """Rotation (3, 3) of a unit quaternion: R = I + 2 w K + 2 K K, where K v = (x, y, z) x v."""
    K = np.array([[0, -z, y],
                  [z, 0, -x],
                  [-y, x, 0]])
    return np.eye(3) + 2 * w * K + 2 * K @ K


def text_cameras(path):
    """cameras.txt, a camera a line -> {number: (model, width, height, parameters)}."""
    cameras = {}
    for line in colmap_lines(path):
        number, model, width, height, *parameters = line.split()
        parameters = [float(parameter) for parameter in parameters]
        cameras[number] = model, int(width), int(height), parameters
    return cameras


def text_images(path):
    """images.txt, two lines a photo -> [(name, quaternion, translation, number of the camera)].

    The second line lists 2D points, and may be empty, or missing: only the first has a name.
    """
    images = []
    for line in colmap_lines(path):
        fields = line.split()
        # A line of points ends with a point's number, one of a photo with its name.
        if len(fields) < 10 or fields[-1].lstrip("-").isdecimal():
            continue
        quaternion = [float(field) for field in fields[1:5]]
        translation = [float(field) for field in fields[5:8]]
        camera_number = fields[8]
        name = " ".join(fields[9:])      # a name may hold spaces
        images.append((name, quaternion, translation, camera_number))
    return images


def colmap_lines(path):
    """The lines of a text file without empty ones and comments."""
    lines = read_text(path, 2 ** 29).splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def take(file, form):
    """The next numbers of a binary file, little-endian; `form` is struct's: d a double (8 bytes),
    I an unsigned integer (4 bytes), i a signed one, Q an unsigned one of 8 bytes, s a byte."""
    form = "<" + form
    n_bytes = struct.calcsize(form)
    return struct.unpack(form, file.read(n_bytes))


def take_count(file, path, most):
    """How many things follow in a binary file. A damaged one may say 10^18."""
    (count,) = take(file, "Q")
    if count > most:
        raise BadInput(f"{path}: {count} entries; over {most} are read with a higher --max-frames "
                       "only")
    return count


def binary_cameras(path, most):
    """cameras.bin: how many, then one after another; returns what text_cameras does."""
    cameras = {}
    check_file(path)
    with open(path, "rb") as file:
        for _ in range(take_count(file, path, most)):
            number, model, width, height = take(file, "IiQQ")
            if not 0 <= model < len(COLMAP_MODELS):
                raise BadInput(f"{path}: camera model {model} is not known; run COLMAP's "
                               "image_undistorter, which makes PINHOLE cameras")
            name, n_parameters = COLMAP_MODELS[model]
            parameters = take(file, f"{n_parameters}d")
            cameras[number] = name, width, height, parameters
    return cameras


def binary_images(path, most):
    """images.bin: how many, then one after another; returns what text_images does."""
    images = []
    with open(path, "rb") as file:
        for _ in range(take_count(file, path, most)):
            # Its own number; then w, x, y, z and the translation; then its camera's number.
            _, *numbers, camera_number = take(file, "I7dI")
            quaternion, translation = numbers[:4], numbers[4:]
            name = take_name(file)
            (n_points,) = take(file, "Q")
            # Skip its 2D points: x, y and the number of a 3D point, 8 bytes each.
            file.seek(24 * n_points, 1)
            images.append((name, quaternion, translation, camera_number))
    return images


def take_name(file):
    """The text up to the next zero byte of a binary file, of at most 1000 bytes."""
    name = b""
    (byte,) = take(file, "s")
    while byte != b"\0":
        name += byte
        if len(name) > 1000:
            raise ValueError("a name without an end")
        (byte,) = take(file, "s")
    return os.fsdecode(name)


# ---- Photos: Objaverse renders -------------------------------------------------------------------
def read_objaverse(folder, reading):
    """Renders of Objaverse (as for Zero-1-to-3): NNN.png, and NNN.npy a (3, 4) world-to-camera."""
    views = []
    f = 35 / 32                          # a lens of 35 mm before a sensor of 32: the width is 1
    for path in files_in(folder, (".npy",)):
        if len(path.stem) != 3 or not path.stem.isdecimal():
            continue
        with reading.trying("view", str(path)):
            matrix = read_array(path, 4)
            if matrix.shape != (3, 4):
                raise BadInput(f"{path}: its pose has shape {matrix.shape}, not (3, 4)")
            pose = np.linalg.inv(to_4x4(matrix))
            # The world's origin, the object, is in front of the camera: along -z in Blender's axes,
            # which are ours. Some scripts write OpenCV's, where it is along +z.
            depth = matrix[2, 3]
            if depth > 0:
                pose = pose @ FLIP
            image = find_photo(folder, path.stem)
            views.append(View(image, pose, (f, f, 0.5, 0.5), (1, 1)))
    return views, (0, 0, 1)


# ---- Photos: one path for all layouts ------------------------------------------------------------
@dataclass(eq=False)
class Shot:
    """A view whose photo has been read."""
    view: View
    photo: np.ndarray                # (H, W, 4) uint8 without lens distortion; alpha is the mask
    camera: np.ndarray               # (4,) fx, fy, cx, cy in the photo's pixels
    up: np.ndarray                   # (3,) which way is up in the photo, in the layout's world


def photo_object(read, folder, reading):
    """One object in one layout, as a Capture. `read` is the layout's reader.

    Raises BadInput where files are damaged, or under three views can be used.
    """
    already = len(reading.losses)
    try:
        listed, up = read(folder, reading)
    except FAULTS as error:
        raise BadInput(f"{folder}: its files are missing, damaged or of another layout "
                       f"({error!r})") from None
    if len(listed) > reading.max_frames:
        raise BadInput(f"{folder}: {len(listed)} views; over {reading.max_frames} are read with a "
                       "higher --max-frames only")
    shots = read_shots(listed, reading)
    leave_out_other_sizes(shots, reading)
    look_at_photos(folder, shots, reading)
    name_unlisted(folder, listed, reading)
    check_enough(folder, shots, reading, already)
    look_at_cameras(folder, shots, reading)
    up = choose_up(folder, up, shots, reading)
    capture, agreement = into_cube_together(shots, up, folder, reading)
    # Built-in chairs, whose legs are thin, have 0.83 or more with 12 views; lego and head, 0.93.
    if len(agreement) >= 10 and agreement.median() < 0.8:
        reading.remark(f"{folder}: what the masks have in common, seen again, covers them to "
                       f"{100 * agreement.median():.0f} % only: are cameras and masks right?")
    return capture


def into_cube_together(shots, up, folder, reading):
    """into_cube of the shots that agree with each other; the rest is left out, in place."""
    capture = None
    try:
        capture, agreement = into_cube(shots, up, folder, reading.size)
    except BadInput:                     # a single view that was turned may leave nothing of a hull
        _, agreement = into_cube(shots, up, folder, reading.size, share=0.8)
    wrong = disagreeing(agreement)
    if capture is not None and not wrong.any():
        return capture, agreement
    for shot, is_wrong in zip(list(shots), wrong):
        if is_wrong:
            reading.leave_out("view", f"{shot.view.image}: its mask and camera disagree with those "
                              "of the other views")
            shots.remove(shot)
    return into_cube(shots, up, folder, reading.size)


def disagreeing(agreement):
    """Which views, (V,) bool, to leave out: a camera that was turned, another object's mask.

    agreement: see hull_agreement. Few views agree little although all is right; and where many
    disagree nobody can tell who is right.
    """
    wrong = agreement < 0.6 * agreement.median()
    if len(wrong) < 8 or wrong.float().mean() > 0.25:
        return torch.zeros_like(wrong)
    return wrong


def check_enough(folder, views, reading, already):
    """BadInput if under three views are left, with the first reason; `already`: how many losses
    were known before this object."""
    if len(views) >= 3:
        return
    reasons = [reason for _, _, reason in reading.losses[already:]]
    why = f" ({reasons[0]})" if reasons else ""
    raise BadInput(f"{folder}: {len(views)} usable views; a shape needs at least 3{why}")


def read_shots(listed, reading):
    """The Shots of all views that can be used; the others are left out, by name."""
    shots = []
    seen = set()
    for view in listed:
        with reading.trying("view", str(view.image)):
            if view.image in seen:
                raise BadInput(f"{view.image}: listed twice")
            seen.add(view.image)
            shots.append(read_shot(view, reading))
    return shots


def read_shot(view, reading):
    """One view with its photo; BadInput where its camera, mask or size cannot be right."""
    check_pose(view.image, view.pose)
    check_camera(view.image, view.camera, view.camera_size, view.lens)
    shape = picture_shape(view.image)
    turned = orientation(view.image)
    upright = turned != 1 and is_upright(view, shape, turned)
    photo = read_masked(view.image, reading, view.mask, upright)
    if not has_mask(photo):
        if not view.white_background:
            raise BadInput(f"{view.image}: no mask, or one that is white everywhere")
        photo[..., 3] = 255 * not_white(photo)
    camera = camera_in_pixels(view, photo)
    photo, factor = reduce(photo, 8 * reading.size)      # 24 photos of a phone would fill 1 GiB
    camera = camera / factor
    photo = undistort(photo, camera, view.lens)
    if photo[..., 3].max() <= 127:       # no ray through it could be explained
        raise BadInput(f"{view.image}: its mask is empty; is it 0 and 1, not 0 and 255?")
    x, y = (0, 1) if upright else EXIF_UP[turned]
    up = view.pose[:3, :3] @ np.array([x, y, 0.0])
    return Shot(view, photo, camera, up)


# Which way is up in a photo as it is stored, in its camera's x and y, by its EXIF orientation.
EXIF_UP = {1: (0, 1), 3: (0, -1), 6: (-1, 0), 8: (1, 0)}


def is_upright(view, shape, turned):
    """Whether the camera of a photo that its EXIF turns is of the turned photo.

    shape: of the photo as it is stored. BadInput where nothing tells, or it is mirrored, too.
    """
    if turned not in EXIF_UP:
        raise BadInput(f"{view.image}: mirrored by its EXIF orientation, {turned}; save it as seen")
    if view.stored:
        return False
    height, width = shape
    as_stored = fits(view.camera_size, (width, height))
    as_seen = turned in (6, 8) and fits(view.camera_size, (height, width))
    if as_stored == as_seen or turned == 3 or not view.size_is_told:
        raise BadInput(f"{view.image}: its EXIF orientation, {turned}, turns it, and whether its "
                       "camera is of the turned photo nobody tells; turn its pixels for good "
                       "(mogrify -auto-orient) and find cameras anew")
    return as_seen


def fits(size, other):
    """Whether two (width, height) have one shape; 2 %: sides of small copies are rounded."""
    return abs(size[0] * other[1] / (size[1] * other[0]) - 1) <= 0.02


def has_mask(photo):
    """Whether the alpha of a photo (H, W, 4) says anything: a file without alpha is read as 255."""
    return photo[..., 3].min() < 255


def not_white(photo):
    """The mask (H, W) bool of what stands before white, which is 255 in all three colours."""
    red, green, blue, _ = photo.transpose(2, 0, 1)
    return np.minimum(np.minimum(red, green), blue) < 250


def camera_in_pixels(view, photo):
    """fx, fy, cx, cy (4,) in pixels of the file, which may be a smaller copy of the original."""
    height, width = photo.shape[:2]
    camera_width, camera_height = view.camera_size
    if not fits(view.camera_size, (width, height)):
        raise BadInput(f"{view.image}: {width}x{height}, but its camera is for "
                       f"{camera_width:g}x{camera_height:g}")
    scale_x = width / camera_width
    scale_y = height / camera_height
    return np.array(view.camera, float) * [scale_x, scale_y, scale_x, scale_y]


def reduce(photo, side):
    """A large photo or frame (H, W, 4), divided by a whole number, so that its shorter side is
    still at least `side`; and this number."""
    factor = max(1, min(photo.shape[:2]) // side)
    if factor > 1:
        photo = means_of_squares(photo, factor)
    return photo, factor


def means_of_squares(photo, factor):
    """Means of squares of pixels of a photo (H, W, 4); of colours, only those inside the mask."""
    small = np.zeros((photo.shape[0] // factor, photo.shape[1] // factor, 4), np.uint8)
    masked = torch.from_numpy(photo[None, ..., 3]) > 0
    left, right, top, bottom = mask_box(masked.byte())[0].int().tolist()
    # All else stays 0: in numbers of squares, which may end with the photo before the mask does.
    rows = slice(top // factor, min(-(-bottom // factor), small.shape[0]))
    columns = slice(left // factor, min(-(-right // factor), small.shape[1]))
    rgb, weight = 0, 0
    for y in range(factor):              # one pixel of every square at a time: little memory
        for x in range(factor):
            one = photo[y::factor, x::factor][rows, columns]
            inside = one[..., 3:].astype(np.float32)
            rgb = rgb + one[..., :3] * inside
            weight = weight + inside
    small[rows, columns, :3] = (rgb / np.maximum(weight, 1)).round()
    small[rows, columns, 3:] = (weight / factor ** 2).round()
    return small


def leave_out_other_sizes(shots, reading):
    """Leaves out, in place, photos of another size than most: another camera's, or cropped ones."""
    if not shots:
        return
    sizes = Counter(shot.photo.shape[:2] for shot in shots)
    (usual, _), *_ = sizes.most_common(1)
    for shot in list(shots):
        if shot.photo.shape[:2] != usual:
            reading.leave_out("view", f"{shot.view.image}: of another size than most of the "
                              "object's photos: one object, one image size")
            shots.remove(shot)


def name_unlisted(folder, listed, reading):
    """Says which photos lie beside those that are used, and have no camera."""
    known = set()
    for view in listed:
        known.add(view.image)
        known.add(view.mask)
    for place in dict.fromkeys(view.image.parent for view in listed):
        unknown = [path for path in files_in(place, PHOTOS) if path not in known]
        if unknown:
            reason = f"{unknown[0]} ...: no usable camera is listed"
            reading.leave_out("photo", reason, len(unknown))


# ---- Photos: what looks odd ----------------------------------------------------------------------
def look_at_cameras(folder, shots, reading):
    """Remarks on lenses and positions that are possible, and probably wrong."""
    height, width = shots[0].photo.shape[:2]
    fx, fy, cx, cy = np.stack([shot.camera for shot in shots]).T     # (V,) each
    angles = np.degrees(2 * np.arctan(np.maximum(width / fx, height / fy) / 2))
    usual = np.median(angles)
    if not 8 < usual < 120:
        reading.remark(f"{folder}: cameras see {usual:.1f} degrees: is the focal length right?")
    elif angles.max() > 3 * usual or angles.min() < usual / 3:
        reading.remark(f"{folder}: cameras see {angles.min():.1f} to {angles.max():.1f} degrees: "
                       "are all focal lengths right?")
    if not 0.8 < np.median(fx / fy) < 1.25:
        reading.remark(f"{folder}: focal lengths {fx[0]:.4g} across and {fy[0]:.4g} down: pixels "
                       "that are not square?")
    if max(np.abs(cx / width - 0.5).max(), np.abs(cy / height - 0.5).max()) > 0.25:
        reading.remark(f"{folder}: a camera's principal point (cx, cy) is far from its photo's "
                       "middle")
    ahead = -np.mean([shot.view.pose[:3, 2] for shot in shots], 0)
    if np.linalg.norm(ahead) > np.cos(np.radians(15)):
        reading.remark(f"{folder}: all cameras look in nearly one direction: the other sides are "
                       "not known")


def look_at_photos(folder, shots, reading):
    """Remarks on masks and photos that are possible, and probably wrong; black ones are left out,
    in place."""
    at_rim = []
    for shot in list(shots):
        inside = shot.photo[..., 3] > 127
        rim = np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
        at_rim.append(rim.mean())
        if shot.photo[inside, :3].max() < 8:
            reading.leave_out("view", f"{shot.view.image}: black where its mask is")
            shots.remove(shot)
    if at_rim and np.median(at_rim) > 0.5:
        reading.remark(f"{folder}: masks cover the edges of most photos: are they inverted? "
                       "White is the object")
    copies = len(shots) - len({hashlib.sha256(shot.photo.tobytes()).digest() for shot in shots})
    if copies:
        reading.remark(f"{folder}: {copies} photos are copies of others")


def choose_up(folder, up, shots, reading):
    """The direction (3,) in the layout's world that becomes y.

    up: what the layout says; None: it leaves it open. Then it is the mean of the photos' own up. A
    layout's axis gives way where photos stand upright along another.
    """
    seen = np.mean([shot.up for shot in shots], 0)
    length = np.linalg.norm(seen)
    if length < 0.1:
        reading.remark(f"{folder}: photos agree on no direction that is up")
    n_over = sum(float(shot.up @ seen) < -0.5 * length for shot in shots)
    if n_over:
        reading.remark(f"{folder}: {n_over} photos are upside down among the others")
    if up is None:
        return seen if length > 1e-6 else np.array([0, 0, 1.0])
    # Cameras look down, all from one side perhaps: up to 70 degrees their up is up by 0.3.
    if length > 0.5 and seen @ up < 0.3 * length:
        along = nearest_axis(seen)
        axis = "xyz"[np.abs(along).argmax()]
        sign = "-" if along.min() < 0 else ""
        reading.remark(f"{folder}: photos stand upright along {sign}{axis}, which is taken for up; "
                       "the layout has z")
        return along
    return np.array(up, float)


def into_cube(shots, up, folder, size, share=0.95):
    """Photos as square pictures, their cameras in the cube's world: a Capture, and how well each
    mask agrees with the others, (V,), see hull_agreement. share: see is_solid."""
    photos = [shot.photo for shot in shots]
    corners, side = choose_windows(photos)
    rgba = resample(photos, corners.tolist(), side, size)            # (V, size, size, 4)
    # A window is a picture of its own: its principal point moves, and its side is the new unit.
    intrinsics = np.stack([shot.camera for shot in shots])           # (V, 4) in the photos' pixels
    intrinsics[:, 2:] -= corners.numpy()
    intrinsics = torch.from_numpy(intrinsics).float() / side
    height, width = photos[0].shape[:2]
    frames = torch.cat([-corners, torch.tensor([width, height]) - corners], 1) / side
    poses = np.stack([shot.view.pose for shot in shots])             # (V, 4, 4)
    masks = rgba[..., 3]
    cam2world = normalize_world(masks, poses, intrinsics, frames, up, folder, share)
    agreement = hull_agreement(masks, cam2world, intrinsics, frames, share)
    return Capture(rgba, cam2world, intrinsics), agreement


def undistort(image, camera, lens):
    """What a pinhole with the same camera sees, (H, W, 4) uint8; the lens is OpenCV's.

    A pinhole sees a point at (x, y), r^2 = x^2 + y^2, in units of the focal length; the lens shows
    it at
        x' = x (1 + k1 r^2 + k2 r^4) + 2 p1 x y + p2 (r^2 + 2 x^2)
        y' = y (1 + k1 r^2 + k2 r^4) + p1 (r^2 + 2 y^2) + 2 p2 x y
    So each pixel of the new image is read from the old one at (x', y'): nothing is to be inverted.
    """
    if not any(lens):
        return image
    height, width = image.shape[:2]
    fx, fy, cx, cy = camera
    k1, k2, p1, p2 = lens
    x = (np.arange(width) + 0.5 - cx) / fx                           # pixel centres
    y = (np.arange(height) + 0.5 - cy) / fy
    x, y = np.meshgrid(x, y)                                         # (H, W)
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2 ** 2
    x_seen = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
    y_seen = y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
    u = fx * x_seen + cx                                             # pixels again
    v = fy * y_seen + cy
    # grid_sample counts from -1 to 1 between the image's outer edges; outside: 0, so no mask.
    grid = np.stack([2 * u / width - 1, 2 * v / height - 1], -1)     # (H, W, 2)
    grid = torch.from_numpy(grid).float()
    planes = torch.from_numpy(image).permute(2, 0, 1).float()        # (4, H, W)
    straight = F.grid_sample(planes[None], grid[None], align_corners=False)[0]
    return straight.permute(1, 2, 0).round().byte().numpy()


# ---- Photos: square windows ----------------------------------------------------------------------
def mask_box(masks):
    """The boxes around masks (V, H, W), where they are over half of their largest value.

    returns (V, 4) float: left, right, top, bottom, as the edges of pixels
    """
    inside = masks > masks.amax((1, 2), keepdim=True) / 2
    left, right = first_and_last(inside.any(1))                      # of columns (V, W)
    top, bottom = first_and_last(inside.any(2))                      # of rows (V, H)
    return torch.stack([left, right, top, bottom], 1).float()


def first_and_last(line):
    """Where the True of lines (V, n) bool begin, and one past where they end: two (V,) int64."""
    first = line.byte().argmax(1)                                    # the first of the largest
    behind = line.byte().flip(1).argmax(1)                           # how many follow the last
    return first, line.shape[1] - behind


def choose_windows(photos):
    """A square window of each photo (H, W, 4): corners (V, 2) int32 left, top, and their side.

    The whole photo; or, where the object is small in all photos, a window that follows it, or most
    of the pixels that are learned from would be background. All have one side, so that what is
    farther away stays smaller.
    """
    height, width = photos[0].shape[:2]
    alphas = [torch.from_numpy(photo[None, ..., 3]) for photo in photos]
    boxes = torch.cat([mask_box(alpha) for alpha in alphas])         # (V, 4)
    left_top, right_bottom = boxes[:, ::2], boxes[:, 1::2]           # (V, 2) each
    largest = (right_bottom - left_top).max()
    side = max(width, height)
    centre = torch.tensor([width, height]).expand(len(photos), 2) / 2
    if largest < 0.7 * side:
        side = int(1.15 * largest)                                   # OURS: 15 % of air
        centre = (left_top + right_bottom) / 2
    return (centre - side / 2).round().int(), side


def resample(photos, corners, side, size):
    """Square windows of photos (H, W, 4) uint8 as (V, size, size, 4) uint8, colour x mask.

    corners: V pairs (left, top), side: both in pixels; a window may reach outside, where all is 0
    """
    windows = []
    for photo, (left, top) in zip(photos, corners):
        height, width = photo.shape[:2]
        right = left + side
        bottom = top + side
        planes = torch.from_numpy(photo).permute(2, 0, 1)[None].float()          # (1, 4, H, W)
        # Padding by a negative number cuts.
        window = F.pad(planes, (-left, right - width, -top, bottom - height))
        # TRAP: multiply before averaging, or the background's colour bleeds in at the edges.
        window[:, :3] *= window[:, 3:] / 255
        windows.append(F.interpolate(window, size=(size, size), mode="bilinear", antialias=True))
    rgba = torch.cat(windows).permute(0, 2, 3, 1)                    # (V, size, size, 4)
    return rgba.round().clamp(0, 255).byte()


# ---- Photos: into the cube -----------------------------------------------------------------------
#
# Cameras found by structure from motion live in a world of their own: its origin, its unit and its
# up are arbitrary. The decoder's volume is [-1, 1]^3, so the object must be brought there, and the
# masks alone tell where it is: inside of all the cones that they cut out of space (visual hull).
# Without this step a scene of another size would lie outside the volume, or fill a corner of it.
def normalize_world(masks, poses, intrinsics, frames, up, folder, share=0.95):
    """Move, turn and scale the world so that the masks' visual hull fills the cube, y up.

    masks       (V, size, size) uint8
    poses       (V, 4, 4) numpy float64 cam2world, in any world
    intrinsics  (V, 4) as fractions of the side
    frames      (V, 4) where the photo lies in its picture, see hull; share: see is_solid
    up          (3,) in that world
    folder      whose cameras these are, for BadInput where the hull is empty
    returns     (V, 4, 4) float32 cam2world
    """
    turn = turn_to_y(np.array(up, float))
    poses = poses.copy()
    poses[:, :3] = turn @ poses[:, :3]                               # axes and positions alike
    rays = rays_through_masks(masks, poses, intrinsics)              # (V, 3)
    centre = nearest_point(poses[:, :3, 3], rays)
    # From here on the object is at the origin. TRAP: a world's own may be in another country, and
    # float32 has no millimetres left at 5,000 kilometres.
    poses[:, :3, 3] -= centre
    # At the object's distance half of a picture's side is 0.5 distance / fx, and its corner is
    # 0.71 distance / fx from its middle: nothing that is in frame is farther from the centre.
    distance = np.linalg.norm(poses[:, :3, 3], axis=1)
    reach = 0.75 * np.median(distance / intrinsics[:, 0].numpy())
    corner = np.full(3, reach)
    low, high = hull_box(masks, poses, intrinsics, frames, -corner, corner, folder, share)
    middle = (low + high) / 2
    longest = (high - low).max()
    scale = 2 * MARGIN / longest
    poses[:, :3, 3] = (poses[:, :3, 3] - middle) * scale
    return torch.from_numpy(poses).float()


def half_turn(axis):
    """Rotation (3, 3) by 180 degrees about an axis (3,), of any length: 2 a a^T / (a^T a) - I."""
    return 2 * np.outer(axis, axis) / (axis @ axis) - np.eye(3)


def turn_to_y(up):
    """The shortest rotation (3, 3) that takes the direction `up` (3,) to y.

    A half turn about `up` leaves it where it is, and one about the direction between `up` and y
    exchanges the two. Together they turn by twice the angle between their axes, in one plane.
    """
    y = np.array([0, 1, 1e-9])           # 1e-9: where up is -y there is no direction between
    between = up / np.linalg.norm(up) + y
    return half_turn(between) @ half_turn(up)


def rays_through_masks(masks, poses, intrinsics):
    """Directions (V, 3) in the world of the rays through the masks' middles, not normalized."""
    left, right, top, bottom = mask_box(masks).numpy().T             # (V,) each
    size = masks.shape[1]
    u = (left + right) / 2 / size
    v = (top + bottom) / 2 / size
    fx, fy, cx, cy = intrinsics.numpy().T
    # Rows count downwards and the camera looks along -z, as in render.pixel_directions.
    rays = np.stack([(u - cx) / fx, -(v - cy) / fy, -np.ones(len(fx))], 1)
    return np.einsum("vij,vj->vi", poses[:, :3, :3], rays)


def nearest_point(positions, directions):
    """The point c (3,) nearest to all the lines o_v + t d_v: positions o, directions d (V, 3).

    A_v = I - d d^T / (d^T d) removes what lies along the line, so |A_v (c - o_v)| is how far c is
    from it. The sum of the squares is least where  (sum_v A_v) c = sum_v A_v o_v. Of eight lines or
    more, those over five times as far from c as most are then left out: a camera that stands
    kilometres away by mistake would pull c with it.
    """
    kept = np.arange(len(positions))
    for _ in range(3):
        left = np.zeros((3, 3))
        right = np.zeros(3)
        for o, d in zip(positions[kept], directions[kept]):
            A = np.eye(3) - np.outer(d, d) / (d @ d)
            left += A
            right += A @ o
        c = np.linalg.lstsq(left, right, rcond=None)[0]  # lstsq: parallel lines have no one answer
        along = np.einsum("vi,vi->v", c - positions, directions)[:, None]
        length = np.einsum("vi,vi->v", directions, directions)[:, None]
        off = np.linalg.norm(c - positions - along / length * directions, axis=1)        # (V,)
        near = off <= 5 * np.median(off) + 1e-9
        if len(positions) < 8 or near[kept].all():
            return c
        kept = near.nonzero()[0]
    return c


def hull_box(masks, poses, intrinsics, frames, low, high, folder, share):
    """The box around the visual hull, looked for between the corners low and high: two (3,)."""
    poses = torch.from_numpy(poses).float()
    for _ in range(3):                   # coarse, then twice into the box that was found
        inside = hull(masks, poses, intrinsics, frames, low, high, share)
        if not inside.any():
            raise BadInput(f"{folder}: the masks' visual hull is empty: cameras and masks disagree"
                           "; is the camera convention (axes, world-to-camera) the layout's own?")
        cell = (high - low) / len(inside)                            # (3,) sides of a cell
        found = inside.nonzero().numpy()                             # (n, 3) numbers along x, y, z
        first, last = found.min(0), found.max(0)
        # One more cell on either side: its centre is outside, a part of it need not be.
        high = low + (last + 2) * cell
        low = low + (first - 1) * cell
    return low + cell, high - cell


def hull(masks, poses, intrinsics, frames, low, high, share=0.95, cells=48):
    """Visual hull between the corners low and high, (3,) each: which cells look like object.

    frames   (V, 4) where the photo lies in its picture: left, top, right, bottom, 0 to 1 if it is
             all of it. TRAP: a picture may be a window of its photo. What is beside the window was
             photographed, too, and is no object; only what is beside the photo is not known.
    returns  (cells, cells, cells) bool, in the order x, y, z
    """
    points = cell_centres(low, high, cells)                          # (K, 3), K = cells^3
    in_frames = torch.zeros(len(points))                             # counts of views
    in_masks = torch.zeros(len(points))
    for view in zip(masks, poses, intrinsics, frames):
        in_frame, in_mask, _ = see_points(points, *view)
        in_frames += in_frame
        in_masks += in_mask
    return is_solid(in_frames, in_masks, len(masks), share).reshape(cells, cells, cells)


def cell_centres(low, high, cells):
    """The middles of cells^3 cells between two corners (3,): (K, 3), the last axis fastest."""
    step = (torch.arange(cells) + 0.5) / cells                       # centres, from 0 to 1
    steps = torch.cartesian_prod(step, step, step)
    return torch.from_numpy(low).float() + steps * torch.from_numpy(high - low).float()


def see_points(points, mask, pose, camera, frame):
    """How one view sees points (K, 3): whether they are on its photo, and within its mask, (K,)
    each; and the numbers (K,) of their pixels in the picture, row by row, -1 beside it."""
    size = len(mask)
    uv, depth = project(points, pose, camera)                        # (K, 2), (K,)
    left_top, right_bottom = frame[:2], frame[2:]
    in_photo = ((uv >= left_top) & (uv < right_bottom)).all(1)
    in_frame = in_photo & (depth > 0)
    column, row = (uv * size).floor().long().unbind(1)
    in_picture = ((uv >= 0) & (uv < 1)).all(1) & in_frame
    pixel = torch.where(in_picture, row * size + column, -1)
    in_mask = in_picture & (mask.flatten()[pixel] > 127)
    return in_frame, in_mask, pixel


def is_solid(in_frames, in_masks, n_views, share):
    """Which points are object, from how many of the views have them on photo and within masks.

    Those within the mask in a share of the views that have them on photo, if these are over half of
    all: a mask or two may be wrong, a photo may cut the object. (Just half: of four views all
    round, two see what lies far before and behind the object.)
    """
    agreed = in_masks >= share * in_frames
    often_seen = in_frames > 0.5 * n_views
    return agreed & often_seen


def hull_agreement(masks, cam2world, intrinsics, frames, share=0.95, side=24):
    """How well each mask agrees with the visual hull of all OTHER masks, as its camera sees it:
    (V,), intersection over union at side x side pixels.

    Thin things are worth less; where a camera was turned, or a mask is another photo's, next to
    nothing is left.
    """
    low = np.full(3, -1.0)
    points = cell_centres(low, -low, 32)             # finer than pixels: no holes between them
    small = F.interpolate(masks[:, None].float(), size=(side, side), mode="area")[:, 0]
    views = [see_points(points, *view) for view in zip(small, cam2world, intrinsics, frames)]
    in_frames = sum(in_frame.float() for in_frame, _, _ in views)
    in_masks = sum(in_mask.float() for _, in_mask, _ in views)
    agreement = []
    for mask, (in_frame, in_mask, pixel) in zip(small, views):
        others = is_solid(in_frames - in_frame.float(), in_masks - in_mask.float(),
                          len(masks) - 1, share)
        covered = torch.zeros(side * side, dtype=torch.bool)
        covered[pixel[others & (pixel >= 0)]] = True
        inside = mask.flatten() > 127
        both, either = (covered & inside).sum(), (covered | inside).sum()
        agreement.append(both / either.clamp(min=1))
    return torch.stack(agreement)


# ---- COIL-100: masks -----------------------------------------------------------------------------
#
# Columbia's small things on a turntable have neither masks nor cameras. The background is all but
# black, so brightness tells the mask; what the camera must have been is below.
# OURS, both thresholds of max(R, G, B): the background has 25 to 27 of 255.
COIL_THRESHOLD = 34              # keeps dark parts of an object, but floods some photos
COIL_FLOODED_THRESHOLD = 48      # for those


def components(masks):
    """Connected components (4 neighbours) of masks (V, H, W) bool: int64 labels, 0 outside.

    Every pixel starts with a number of its own; sweeps down, up, right and left take the largest
    along until nothing changes: then all pixels of a component have the same.
    """
    label = np.arange(1, masks.size + 1).reshape(masks.shape) * masks
    # Three more ways to look at the same memory: what they change, changes in label.
    upwards = label[:, ::-1]
    across = label.transpose(0, 2, 1)
    backwards = across[:, ::-1]
    while True:
        before = label.copy()
        for way in (label, upwards, across, backwards):
            sweep_down(way)
        if (label == before).all():
            return label


def sweep_down(label):
    """Take larger labels (V, H, W) along from row to row, but not across zeros; in place."""
    for i in range(1, label.shape[1]):
        above = label[:, i - 1]
        here = label[:, i]
        label[:, i] = np.maximum(here, above) * (here > 0)


def component_area(label):
    """How many pixels the component of each pixel has, 0 outside: labels (V, H, W) -> (V, H, W)."""
    pixels_of = np.bincount(label.ravel())
    pixels_of[0] = 0
    return pixels_of[label]


def fill_holes(masks, largest=np.inf):
    """Masks (V, H, W) bool with their holes filled, those of at most `largest` pixels.

    A hole is a part of the outside that is not connected with the picture's frame.
    """
    frame = (0, 0), (1, 1), (1, 1)       # one pixel around every picture: joins all that is no hole
    outside = np.pad(~masks, frame, constant_values=True)
    label = components(outside)
    of_frame = label[:, :1, :1]                                      # the label of the corner
    hole = (label > 0) & (label != of_frame) & (component_area(label) <= largest)
    return masks | hole[:, 1:-1, 1:-1]


def coil_masks(photos):
    """Masks (V, H, W) bool of COIL's photos (V, H, W, 3)."""
    masks = bright_masks(photos, COIL_THRESHOLD)
    corners = masks[:, [0, 0, -1, -1], [0, -1, 0, -1]]               # (V, 4)
    flooded = corners.all(1)
    if flooded.any():
        masks[flooded] = bright_masks(photos[flooded], COIL_FLOODED_THRESHOLD)
    return masks


def bright_masks(photos, threshold):
    """What is brighter than the threshold: its largest component, with dark parts in it filled."""
    bright = photos.max(-1) > threshold                              # (V, H, W)
    area = component_area(components(bright))
    largest = area.max((1, 2), keepdims=True)
    return fill_holes((area == largest) & bright)


# ---- COIL-100: cameras ---------------------------------------------------------------------------
#
# The cameras were never published. OURS: a circle at elevation e, far away, so that a view is all
# but parallel. Every photo was cropped to the object's box and scaled to 128 pixels, so where the
# axis is seen and how large a pixel is differs from view to view and must be found again:
#   the axis     is seen in the middle of the box
#   the scale    follows from the object's height H, which is the same in all views: the box is
#                    H cos e + (a part of the depth) sin e     high,
#                where the depth is about the width that is seen a quarter turn later
# Elevation, distance and depth make the silhouettes agree best with their common visual hull.
COIL_ELEVATION = 18.0            # degrees
COIL_DISTANCE = 12.0             # world units; the cube's half side is 1
COIL_DEPTH = 0.5                 # the part of the depth, above


def coil_object(files, reading):
    """One object of COIL-100, {degrees: path}, as a Capture."""
    degrees, photos = read_coil_photos(files, reading)               # (V,), (V, H, H, 4)
    side = photos.shape[1]
    boxes = mask_box(torch.from_numpy(photos[..., 3])).numpy()
    left, right, top, bottom = boxes.T                               # (V,) each
    pixel = coil_pixel(degrees, right - left, bottom - top)
    focal = COIL_DISTANCE / pixel                                    # in pixels, as what follows
    middle_x = (left + right) / 2
    middle_y = (top + bottom) / 2
    intrinsics = np.stack([focal, focal, middle_x, middle_y], 1) / side
    # As the angle grows, the front moves left: the camera walks to the right.
    azimuth = torch.from_numpy(np.radians(degrees))                  # float64
    elevation = torch.full_like(azimuth, np.radians(COIL_ELEVATION))
    cam2world = orbit(azimuth, elevation, COIL_DISTANCE).float()
    whole = [(0, 0)] * len(photos)
    rgba = resample(photos, whole, side, reading.size)
    return Capture(rgba, cam2world, torch.from_numpy(intrinsics).float())


def read_coil_photos(files, reading):
    """Angles (V,) in degrees, in order, and photos (V, H, H, 4) uint8, alpha the mask.

    What is damaged, of another size than most, or black is left out; BadInput under three.
    """
    already = len(reading.losses)
    photos = {}
    for angle in sorted(files):                                      # as numbers: 5 before 10
        with reading.trying("view", str(files[angle])):
            photos[angle] = read_coil_photo(files[angle], reading)
    sizes = Counter(len(photo) for photo in photos.values())
    for angle, photo in list(photos.items()):
        usual = sizes.most_common(1)[0][0]
        if len(photo) != usual:
            reading.leave_out("view", f"{files[angle]}: a side of {len(photo)} pixels, not {usual} "
                              "as most")
            del photos[angle]
    if photos:
        masks = coil_masks(np.stack(list(photos.values()))[..., :3])
        for (angle, photo), mask in zip(list(photos.items()), masks):
            photo[..., 3] = 255 * mask
            if not mask.any():
                reading.leave_out("view", f"{files[angle]}: black: its mask is empty")
                del photos[angle]
    check_enough(f"{next(iter(files.values()))} ...", photos, reading, already)
    degrees = np.array(list(photos))
    gap = np.diff(degrees, append=degrees[0] + 360).max()
    if gap > 45:
        reading.remark(f"{files[degrees[0]]} ...: {gap} degrees of the turn have no photo")
    return degrees, np.stack(list(photos.values()))


def read_coil_photo(path, reading):
    """(H, H, 4) uint8. The masks below are made for 128 x 128, and slow for much more."""
    photo = read_image(path, reading)
    height, width = photo.shape[:2]
    if height != width or not 8 <= width <= 512:
        raise BadInput(f"{path}: {width}x{height} pixels; photos must be square, 128x128 in "
                       "COIL-100")
    return photo


def coil_pixel(degrees, width, height):
    """World units a pixel (V,), from the boxes' width and height (V,) in pixels.

    With H cos e = 1, and the view w a quarter turn after the view v:
        pixel_v height_v = 1 + COIL_DEPTH tan(e) pixel_w width_w
    which, put into itself again and again, converges; then all is scaled to fit into the cube.
    """
    later = quarter_turn_later(degrees)
    slope = COIL_DEPTH * np.tan(np.radians(COIL_ELEVATION))
    pixel = np.ones(len(degrees))
    for _ in range(50):
        depth = (width * pixel)[later]
        pixel = (1 + slope * depth) / height
    largest = (np.maximum(width, height) * pixel).max()
    return pixel * (2 * MARGIN / largest)


def quarter_turn_later(degrees):
    """For each view (V,) the number of the one whose angle is nearest to 90 degrees more."""
    turn = (degrees[:, None] + 90 - degrees) % 360                   # (V, V), 0 to 359
    apart = np.minimum(turn, 360 - turn)
    return apart.argmin(1)


# ---- Clips: frames -------------------------------------------------------------------------------
#
# Somebody moves before a fixed camera: PAPER, Sec. 3.2, learns such subjects from clips alone. A
# video is a clip. Pictures are clips only where that is asked for (--as-clips), for nothing tells
# them from photos taken all round: folders of frames, and strips of square frames side by side.
def find_clips(folder, root, reading, depth=3):
    """The clips in a folder, or else in those below it: a list of Found."""
    videos = files_in(folder, VIDEOS)
    paths = videos
    if reading.as_clips:
        pictures = strips_or_frames(folder, reading)
        if videos and pictures == [folder]:
            reading.leave_out("picture", f"{folder}: pictures beside a video are no frames",
                              len(photos_in(folder)))
            pictures = []
        paths = sorted(videos + pictures)
    found = []
    for path in paths:
        name = name_below(root, path)
        if path.is_file():
            name = name[:-len(path.suffix)]
        found.append(Found(name, CLIPS, path))
    if folder in paths or depth == 0:
        return found
    for below in listing(folder):
        if below.is_dir() and below not in paths:
            with reading.trying("folder", str(below)):
                found += find_clips(below, root, reading, depth - 1)
    return found


def name_below(root, path):
    """What an object is called: where it lies below the source's folder."""
    return root.name if path == root else path.relative_to(root).as_posix()


def strips_or_frames(folder, reading):
    """Those photos in a folder that are strips of at least 4 square frames; or, where none is, the
    folder itself, as a clip of frames; [] where it has no photos."""
    photos = photos_in(folder)
    strips, others = [], []
    for photo in photos:
        (strips if is_strip(photo) else others).append(photo)
    if not strips:
        return [folder] if others else []
    if others:
        reading.leave_out("picture", f"{others[0]} ...: no strip, as others there are", len(others))
    return strips


def is_strip(photo):
    """Whether a picture is at least four squares side by side; False, too, if it cannot be read."""
    try:
        height, width = picture_shape(photo)
    except BadInput:                     # it is left out where it is read
        return False
    return width >= 4 * height and width % height == 0


def read_frames(path, reading):
    """A clip's frames (H, W, 4) uint8, one by one: a video need not fit in memory."""
    if path.is_dir():
        return frames_of_folder(path, reading)
    if path.suffix.lower() in PHOTOS:
        return frames_of_strip(path, reading)
    return frames_of_video(path, reading)


def frames_of_folder(path, reading):
    """Its photos with their masks, if there are any, in the order of their numbers."""
    for photo in sorted(photos_in(path), key=by_number):
        frame = None
        with reading.trying("frame", str(photo)):
            frame = read_masked(photo, reading, upright=True)
        if frame is not None:
            yield frame


def by_number(path):
    """Key to sort by: frame 2 comes before frame 10, though not as text."""
    pieces = re.split(r"(\d+)", path.name)                           # a2.png -> "a", "2", ".png"
    return [int(piece) if piece.isdecimal() else piece for piece in pieces]


def frames_of_strip(path, reading):
    """The squares side by side in one picture, from the left."""
    if not is_strip(path):
        raise BadInput(f"{path}: no strip of four or more square frames side by side")
    strip = read_image(path, reading, longest=np.inf)
    height, width = strip.shape[:2]
    return np.split(strip, width // height, axis=1)


# ffmpeg's own decoders of these drop the transparency.
ALPHA_DECODERS = {"vp8": ["-c:v", "libvpx"], "vp9": ["-c:v", "libvpx-vp9"]}


def frames_of_video(path, reading):
    """A video's frames, from ffmpeg, which imageio brings along; it drops the transparency of GIFs,
    so these are pillow's."""
    try:
        if path.suffix.lower() == ".gif":
            check_shape(path, *picture_shape(path), reading)
            yield from iio.imiter(path, plugin="pillow", mode="RGBA")
            return
        told = iio.immeta(path, plugin="FFMPEG")
        width, height = told["size"]
        check_shape(path, height, width, reading)
        decoder = ALPHA_DECODERS.get(told["codec"], [])
        frames = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgba", bpp=4, input_params=decoder)
        next(frames)                     # first comes what immeta has told
        for frame in frames:
            pixels = np.frombuffer(frame, np.uint8).copy()           # what it gives is read-only
            yield pixels.reshape(height, width, 4)
    except BadInput:
        raise
    except Exception as error:           # as in read_image
        reason = " ".join(str(error).split())[-100:]
        raise BadInput(f"{path}: not a readable video: re-encode it, or give its frames as a "
                       f"folder of PNGs, with --as-clips ({reason})") from None


def read_clip(path, reading):
    """Frames (V, H, W, 4) uint8, alpha 255 where a clip has no masks. Their shorter side is not
    much over twice that of the pictures: enough to be cropped and resampled."""
    frames, sizes = [], []
    for frame in read_frames(path, reading):
        sizes.append(frame.shape[:2])
        frame, _ = reduce(frame, 2 * reading.size)
        frames.append(frame)
        if len(frames) > reading.max_frames:
            raise BadInput(f"{path}: over {reading.max_frames} frames, which are read with a "
                           "higher --max-frames only: cut it")
    usual = Counter(sizes).most_common(1)
    kept = [frame for frame, size in zip(frames, sizes) if size == usual[0][0]]
    reading.leave_out("frame", f"{path}: of another size than most", len(frames) - len(kept))
    if len(kept) < 2:
        raise BadInput(f"{path}: {len(kept)} frame(s); a clip has at least 2, all of one size")
    return np.stack(kept)


# ---- Clips: who moves before the wall ------------------------------------------------------------
#
# OURS: the median over time, the usual background, fails where a person stands still. So the wall
# is first modelled by its rows' colours at the picture's edges, and then, in rounds, by what every
# pixel shows while nobody stands before it. Distances from the model are in units of what the wall
# itself varies by: over 1 is somebody.
SHADOW = 0.78, 1.05              # in shadow a wall keeps this share of its brightness, and its hue
LIMIT = 9                        # of 255, or 7 x noise: with less, shadows come back
OUTLIER = 2.4                    # standard deviations of the wall; with 3, light trousers are lost


def subtract_background(frames, path):
    """Masks (V, H, W) bool of who moves before a plain, unmoving wall; frames (V, H, W, 3) uint8.

    Raises BadInput, naming the clip's path, where nothing moves.
    """
    x = frames.astype(np.float32)
    still = np.median(frames, 0)                                     # (H, W, 3) over time
    change = np.abs(x - still).max(-1)                               # (V, H, W)
    noise = 1.4826 * np.median(change)   # a Gaussian's deviation, from its median |error|
    limit = max(7 * noise, LIMIT)        # a larger change is no noise
    if (change > limit).mean() < 1e-3:
        raise BadInput(f"{path}: nothing moves, so the background cannot be told: give masks, as "
                       "alpha or in a folder masks/ beside images/")
    wall, whiten = model_wall(still, noise)
    distance = np.linalg.norm((x - wall) @ whiten, axis=-1)          # (V, H, W)
    for _ in range(3):
        free = distance < 1                                          # nobody is there
        known = free.mean(0) > 0.15                                  # (H, W) for long enough
        background = free_colour(frames, free)                       # (H, W, 3)
        fill_along_rows(background, known)
        # Where a pixel's own background is known, it is compared with that; else, with the wall's
        # variation, and with the rows above and below, as a row's guess may be wrong.
        from_own = distance_but_for_shadow(x, background) / limit
        from_row = np.linalg.norm((x - background) @ whiten, axis=-1)
        distance = np.where(known, from_own, median_of_three_rows(from_row))
    return without_specks(distance > 1)


def model_wall(still, noise):
    """The wall from a picture's left and right edges: its rows' colours (H, 1, 3), and a matrix W.

    |(x - colour) W| is the Mahalanobis distance sqrt((x - c)^T C^-1 (x - c)) / OUTLIER, in which
    brightness, which varies more over a wall than hue, counts less. C is the edges' covariance;
    with C^-1 = L L^T (Cholesky) that is |L^T (x - c)|, so W = L / OUTLIER.
    """
    margin = max(2, round(0.15 * still.shape[1]))                    # columns on either side
    edges = np.concatenate([still[:, :margin], still[:, -margin:]], 1)           # (H, 2 margin, 3)
    colour = np.median(edges, 1, keepdims=True).astype(np.float32)
    deviation = (edges - colour).reshape(-1, 3)
    floor = max(noise, 2) ** 2           # without it a wall of one colour has no inverse of C
    C = np.cov(deviation.T) + floor * np.eye(3)
    L = np.linalg.cholesky(np.linalg.inv(C))
    return colour, L.astype(np.float32) / OUTLIER


def free_colour(frames, free):
    """Each pixel's colour (H, W, 3) float32 in the frames where it is free (V, H, W) bool.

    The 75 % quantile of these, not the median: for half of the time a shadow may lie there.
    """
    # What is not free becomes 255, so it is sorted to the end, behind all that are free.
    others_last = np.where(free[..., None], frames, np.uint8(255))
    ordered = np.sort(others_last, 0)                                # (V, H, W, 3)
    rank = 0.75 * (free.sum(0) - 1)                                  # (H, W), among the free ones
    rank = rank.clip(0).astype(int)
    colour = np.take_along_axis(ordered, rank[None, ..., None], 0)[0]
    return colour.astype(np.float32)


def fill_along_rows(background, known):
    """Where a pixel of the background (H, W, 3) is not known (H, W) bool, draw a straight line
    between those of its row that are; in place. A row without any keeps what it has."""
    height, width = known.shape
    for row in range(height):
        columns = np.nonzero(known[row])[0]
        if len(columns) == 0:
            continue
        for channel in range(3):
            values = background[row, columns, channel]
            background[row, :, channel] = np.interp(range(width), columns, values)


def distance_but_for_shadow(x, background):
    """|x - a b| (V, H, W), where b is the background and a, within SHADOW, the best share of it.

    A shadow makes a wall darker and keeps its hue. |x - a b|^2 is least at a = (x b) / (b b).
    """
    dot = (x * background).sum(-1)                                   # (V, H, W)
    square = (background * background).sum(-1)                       # (H, W)
    share = dot / square.clip(1)                                     # 1: a black wall divides by 0
    share = share.clip(*SHADOW)
    return np.linalg.norm(x - share[..., None] * background, axis=-1)


def median_of_three_rows(values):
    """The median of every pixel of (V, H, W), the one above it and the one below."""
    above = np.roll(values, 1, axis=1)
    below = np.roll(values, -1, axis=1)
    return np.median([above, values, below], 0)


def without_specks(masks):
    """Masks (V, H, W) bool without components of under a tenth of their picture's largest, and with
    small holes filled; not large ones, as an arm may enclose wall."""
    area = component_area(components(masks))
    largest = area.max((1, 2), keepdims=True)                        # (V, 1, 1)
    return fill_holes(area > 0.1 * largest, 0.05 * area.max())


# ---- Clips: a clip is an object ------------------------------------------------------------------
def clip_object(path, reading):
    """One clip as a Capture: its frames are views of somebody who moves, all from one fixed camera.

    PAPER, reading.clip_filter: drop 10 % of the frames at either end, those under 25 % foreground,
    and a clip, by BadInput, that has under 4 left.
    """
    frames = masked_frames(path, reading)
    rgba = crop_once(frames, reading.size)                           # (V, size, size, 4)
    cover = rgba[..., 3].float().mean((1, 2)) / 255                  # (V,) share of foreground
    if reading.clip_filter:
        keep = cover >= 0.25
        reason = "under 25 % foreground"
    else:
        keep = cover > 0
        reason = "empty"
    reading.leave_out("frame", f"{path}: {reason}", int((~keep).sum()))
    n_kept = int(keep.sum())
    if reading.clip_filter and n_kept < 4:
        raise BadInput(f"{path}: under 4 frames left")
    cam2world, intrinsics = fixed_camera(n_kept)
    return Capture(rgba[keep], cam2world, intrinsics)


def masked_frames(path, reading):
    """A clip's frames (V, H, W, 4) uint8 with masks: their own, or else what moves."""
    frames = read_clip(path, reading)
    if reading.clip_filter:
        cut = len(frames) // 10
        frames = frames[cut:len(frames) - cut]
    if not has_mask(frames):
        frames[..., 3] = 255 * subtract_background(frames[..., :3], path)
    unmasked = frames[..., 3].min((1, 2)) == 255                     # masks/ may lack some
    reading.leave_out("frame", f"{path}: no mask", int(unmasked.sum()))
    frames = frames[~unmasked]
    if len(frames) < 2:
        raise BadInput(f"{path}: only {len(frames)} of its frames has a mask")
    n_empty = (frames[..., 3].max((1, 2)) <= 127).sum()
    if n_empty > len(frames) - 2:
        raise BadInput(f"{path}: nothing stands before the background in {n_empty} of its "
                       f"{len(frames)} frames: film before a plain wall, or give masks")
    return frames


def crop_once(frames, size):
    """One square for a whole clip, (V, size, size, 4) uint8: where anybody ever is, and some air.

    The camera did not move, so the crop must not either, or a step aside would be lost.
    """
    ever = torch.from_numpy(frames[..., 3]).amax(0)                  # (H, W) of all masks
    left, right, top, bottom = mask_box(ever[None])[0].tolist()
    by_height = (bottom - top) / 0.9
    by_width = (right - left) / 0.95
    side = round(max(by_height, by_width))
    corner_x = round((left + right - side) / 2)
    corner_y = round((top + bottom - side) / 2)
    corners = [(corner_x, corner_y)] * len(frames)
    return resample(frames, corners, side, size)


# ---- Captions ------------------------------------------------------------------------------------
def read_caption_lines(path, reading):
    """{name: caption} of a text file, a line NAME: CAPTION each."""
    captions = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        name, colon, caption = line.partition(":")
        if not colon:
            reading.leave_out("caption", f"{path}, line {number}: expected NAME: CAPTION")
            continue
        captions[name.strip()] = caption.strip()
    return captions


def read_caption_json(path, reading):
    """{name: caption} of a JSON file of just this form."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise BadInput(f'{path}: expected {{"NAME": "CAPTION"}}')
    captions = {}
    for name, caption in content.items():
        if isinstance(caption, str):
            captions[name.strip()] = caption.strip()
        else:
            reading.leave_out("caption", f'{path}, {name}: expected {{"NAME": "CAPTION"}}')
    return captions


def read_captions(folder, found, reading):
    """A user's captions, {name of an object: caption}; an object may have none. found: all objects.

    From a caption.txt in the object's own folder; from captions.txt; from captions.json. What is
    read later counts. A cache has them all.
    """
    if is_cache(folder):
        about = read_about(folder)
        return dict(zip(about["names"], about["captions"]))
    names = [one.name for one in found]
    captions = {}
    for one in found:
        own = folder / one.name
        if isinstance(one.origin, Path) and one.origin.is_dir():
            own = one.origin
        path = own / "caption.txt"
        if path.is_file():
            captions[one.name] = read_text(path).strip()
    for file, read in (("captions.txt", read_caption_lines), ("captions.json", read_caption_json)):
        path = folder / file
        if not path.is_file():
            continue
        with reading.trying("captions file", str(path)):
            found = read(path, reading)
            unknown = sorted(set(found) - set(names))
            if unknown:
                reading.leave_out("caption", f"{path}: no object is called {some_of(unknown, 3)}; "
                                  f"there are: {some_of(names, 9)}", len(unknown))
            captions.update(found)
    return captions


def some_of(names, n):
    """The first n names in a row, for a message."""
    listed = ", ".join(names[:n])
    if len(names) > n:
        listed += " ..."
    return listed


# ---- What a folder is ----------------------------------------------------------------------------
#
# One rule, which anybody can foresee: a folder is a photographed object if one of the files of
# LAYOUTS lies in it; a video is a clip. Objects are looked for in the folder that is given, and in
# those below. Pictures alone are nothing: they may be photos from all round, whose cameras are
# still to be found, or frames of a clip (--as-clips says so).

SYNTHETIC = "synthetic: chairs, tables and vehicles of boxes and cylinders"
PUPPETS = "puppets: articulated people before one camera, a clip each"
COIL = "COIL-100"
CLIPS = "clips: one object each, its camera unknown"
MADE_UP = (SYNTHETIC, PUPPETS)
MOVING = (PUPPETS, CLIPS)

NO_MASKS = ("photos without masks: provide an alpha channel, or a folder masks/ beside images/ "
            "with white objects on black, of the same names")

# Photos: the layout's name, its reader, and the files that tell it.
LAYOUTS = [
    ("NeRF transforms", read_transforms, ("transforms.json", "transforms_train.json")),
    ("SRN", read_srn, ("pose/*.txt",)),
    ("LLFF", read_llff, ("poses_bounds.npy",)),
    ("COLMAP", read_colmap, ("sparse/*/images.bin", "sparse/*/images.txt", "sparse/images.bin",
                             "sparse/images.txt")),
    ("Objaverse renders", read_objaverse, ("[0-9][0-9][0-9].npy",)),
]


@dataclass
class Found:
    """An object that `load` can build."""
    name: str
    layout: str
    origin: object               # what is made up: its number k; COIL-100: {degrees: path};
                                 # a clip: its path; other photos: their folder; in a cache: k
    read: object = None          # other photos: their layout's reader


def find_coil(folder, root, reading):
    """COIL-100's objects in a folder, in the order of their numbers: a list of Found. Below the
    source's folder they are called by where they lie, too."""
    photos = {}                                          # {number: {degrees: path}}
    for path in files_in(folder, (".png",)):
        match = re.fullmatch(r"obj(\d+)__(\d+)", path.stem)
        if match:
            number, degrees = int(match[1]), int(match[2])
            of_object = photos.setdefault(number, {})
            if degrees in of_object:
                reading.leave_out("photo", f"{path}: {degrees} degrees are there already")
            else:
                of_object[degrees] = path
    found = []
    for number in sorted(photos):
        name = f"obj{number}"
        if folder != root:
            name = f"{name_below(root, folder)}/{name}"
        found.append(Found(name, COIL, photos[number]))
    return found


def layout_of(folder):
    """The layout of a folder's photos and its reader; None, None where no file tells one."""
    for layout, read, signs in LAYOUTS:
        for sign in signs:
            if any(path.is_file() for path in folder.glob(sign)):
                return layout, read
    return None, None


def find_photos(folder, root, reading, depth=3):
    """All photographed objects in a folder, or else in those below it: a list of Found.

    A folder of photos that no file tells the cameras of is left out, by name; only find knows
    whether all are like this.
    """
    found = find_coil(folder, root, reading)
    if found:
        return found
    layout, read = layout_of(folder)
    if layout is not None:
        return [Found(name_below(root, folder), layout, folder, read)]
    already = len(reading.losses)
    for below in listing(folder):
        if below.is_dir() and depth > 0:
            with reading.trying("folder", str(below)):
                found += find_photos(below, root, reading, depth - 1)
    if not found and photos_in(folder):
        del reading.losses[already:]     # its images/ and masks/, say, are no objects
        reading.leave_out("object", f"{folder}: photos, but no cameras")
    return found


def find(source, n_objects, reading=None):
    """All objects of a source: a list of Found; BadInput where there is none.

    reading: takes note of what is left out, and tells whether pictures may be clips
    """
    reading = reading or Reading(size=64)
    if str(source) == "synthetic":
        return [Found(f"{k:04d}", SYNTHETIC, k) for k in range(n_objects)]
    if str(source) == "puppets":
        return [Found(f"{k:04d}", PUPPETS, k) for k in range(n_objects)]
    folder = Path(source).resolve()
    if folder.is_file():
        return [find_one_clip(folder, reading)]
    if not folder.is_dir():
        raise BadInput(f"{source}: no such folder (nor is it 'synthetic' or 'puppets')")
    if is_cache(folder):
        return found_in(read_about(folder))
    reading.root = str(folder)
    if not reading.as_clips:
        found = find_photos(folder, folder, reading)
        if found:
            videos = find_clips(folder, folder, Reading(reading.size))
            if videos:
                reading.leave_out("video", f"{videos[0].origin} ...: there are photos with cameras",
                                  len(videos))
            return found
    found = find_clips(folder, folder, reading)
    if not found:
        raise BadInput("; ".join([no_layout(source, folder), *reading.skipped()]))
    return names_once(found, reading)


def names_once(found, reading):
    """The same without those whose name another has: captions and --objects go by names."""
    kept = {}
    for one in found:
        if one.name in kept:
            reading.leave_out("object", f"{one.origin}: called {one.name}, as is "
                              f"{kept[one.name].origin}")
        kept.setdefault(one.name, one)
    return list(kept.values())


def find_one_clip(path, reading):
    """A file that is a clip by itself: a Found."""
    is_video = path.suffix.lower() in VIDEOS
    is_strip = path.suffix.lower() in PHOTOS and reading.as_clips
    if not (is_video or is_strip):
        raise BadInput(f"{path}: this is a file: give the folder that it lies in")
    reading.root = str(path.parent)
    return Found(path.stem, CLIPS, path)


def no_layout(source, folder):
    """Why a folder is refused: what lies there, and what would be known."""
    files = []                           # some, here and up to two folders below
    for path in itertools.islice(itertools.chain(
            folder.glob("*"), folder.glob("*/*"), folder.glob("*/*/*")), 5000):
        if path.is_file() and not path.name.startswith("."):
            files.append(path)
    pictures = [path for path in files if path.suffix.lower() in PHOTOS]
    others = [path.relative_to(folder).as_posix() for path in files
              if path.suffix.lower() not in PHOTOS]
    folders = [path.name for path in listing(folder) if path.is_dir()]
    there = [f"{len(pictures)} pictures"]
    if folders:
        there.append(f"folders {some_of(folders, 4)}")
    if others:
        there.append(f"and in no known form {some_of(sorted(others), 3)}")
    known = [f"{' or '.join(signs)} ({layout})" for layout, _, signs in LAYOUTS]
    known[-1] = known[-1].replace("[0-9]", "N")
    return (f"{source}: no layout that is known, here or up to three folders below; there are "
            f"{', '.join(there)}. An object is a folder with {'; '.join(known)}; or obj1__0.png "
            f"... (COIL-100). A video ({' '.join(VIDEOS)}) is a clip. Pictures alone tell no "
            "cameras: run COLMAP; or, if each folder of them is filmed by one fixed camera, or "
            "each is a strip of square frames, say --as-clips")


def choose(found, objects, source):
    """Those of a list of Found that are named in `objects`, such as "obj2,obj5"; None: all."""
    wanted = {name.strip() for name in (objects or "").split(",")}
    wanted.discard("")
    if not wanted:
        return found
    names = [one.name for one in found]
    unknown = wanted - set(names)
    if unknown:
        raise BadInput(f"{source}: no object {', '.join(sorted(unknown))}; there are: "
                       f"{some_of(names, 40)}")
    return [one for one in found if one.name in wanted]


def is_moving(source, as_clips=False):
    """Whether `load` would find puppets or clips; False, too, where it would find nothing."""
    try:
        found = find(source, 1, Reading(size=64, as_clips=as_clips))
    except BadInput:
        return False
    return found[0].layout in MOVING


# ---- Load ----------------------------------------------------------------------------------------
def telling(items, what, every=10.0):
    """The items of a list one by one; every ten seconds a line tells how many are done, and when
    the rest will be, if it takes as long."""
    began = told = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done > 0 and now - told >= every:
            left = (now - began) / done * (len(items) - done)
            print(f"{what} | {done}/{len(items)} | {left:.0f} s left", flush=True)
            told = now
        yield item


def load(source, size, holdout=6, seed=0, n_objects=128, n_views=24, objects=None, arc=0.0,
         shared_colours=True, clip_filter=False, as_clips=False, max_megapixels=64.0,
         max_frames=2000):
    """The Dataset of "synthetic", "puppets", a folder of photos or clips, or a cache of one.

    holdout: every n-th view of an object is held out, or the last 1/n of a clip; 0: none
    seed, n_objects, n_views: of what is made up           objects: "obj2,obj5" keeps these only
    arc: see cameras_on_an_arc; 0: cameras all round       shared_colours: see make_puppet
    clip_filter, as_clips, max_megapixels, max_frames: see Reading
    What cannot be used is left out and named in `skipped`; BadInput where nothing is left.
    """
    reading = Reading(size, "", as_clips, clip_filter, max_megapixels, max_frames)
    if is_cache(source):
        return load_cache(Path(source), reading, holdout, objects)

    def build(one):                                      # a Found -> its Capture
        if one.layout == SYNTHETIC:
            return synthetic_object(one.origin, seed, n_views, size, arc)
        if one.layout == PUPPETS:
            return puppet_object(one.origin, seed, n_views, size, shared_colours)
        return photographed_object(one, reading)
    found = find(source, n_objects, reading)
    chosen = choose(found, objects, source)
    names, captures = [], []
    for name, capture in build_each(chosen, build, reading):
        names.append(name)
        captures.append(capture)
    if not captures:
        raise BadInput(nothing_left(source, chosen, reading))
    if chosen[0].layout not in MADE_UP:
        own = read_captions(Path(source), found, reading)
        for name, capture in zip(names, captures):
            capture.caption = own.get(name)
        contents = [content_of(capture) for capture in captures]
        look_at_objects(names, contents, [own.get(name) for name in names], reading)
    layout, moving = kind_of(chosen)
    return gather(names, captures, holdout, layout, reading, moving)


def photographed_object(one, reading):
    """A Found that is not made up -> its Capture."""
    if one.layout == COIL:
        return coil_object(one.origin, reading)
    if one.layout == CLIPS:
        return clip_object(one.origin, reading)
    return photo_object(one.read, one.origin, reading)


def build_each(chosen, build, reading):
    """Yields name and Capture of each of a list of Found; what cannot be built is left out."""
    for one in telling(chosen, "data    | objects"):
        capture = None
        with reading.trying("object", one.name):
            capture = build(one)
        if capture is not None:
            yield one.name, capture


def kind_of(chosen):
    """The layouts of a list of Found, in a line, and whether what is seen moves."""
    layouts = dict.fromkeys(one.layout for one in chosen)            # each once, in order
    return ", ".join(layouts), chosen[0].layout in MOVING


def content_of(capture):
    """A hash of a Capture's pictures."""
    return hashlib.sha256(capture.rgba.numpy().tobytes()).digest()


def look_at_objects(names, contents, captions, reading):
    """Remarks on objects that are the same, and on captions that only some have."""
    seen = {}
    for name, content in zip(names, contents):
        if content in seen:
            reading.remark(f"{name}: the very same pictures as {seen[content]}")
        seen.setdefault(content, name)
    n_captions = sum(bool(caption) for caption in captions)
    if 0 < n_captions < len(captions):
        reading.remark(f"{n_captions} of {len(captions)} objects have a caption")


def nothing_left(source, chosen, reading):
    """Why nothing could be used: of one object, its reason; of more, what was left out."""
    line = f"{source}: nothing is left: {'; '.join(reading.skipped())}"
    if len(chosen) == 1:
        _, _, line = reading.losses[-1]
        line = f"{source}: {line}"
    if "no mask" in line:
        line += f"; {NO_MASKS}"
    return "; ".join([line, *reading.remarks])


def load_for(settings, source):
    """The Dataset of `source` as settings (train.py's, or a namespace with the same fields) say."""
    return load(source, settings.size, settings.holdout, settings.seed, settings.n_objects,
                settings.n_views, settings.objects, settings.arc, settings.shared_colours,
                settings.clip_filter, settings.as_clips, settings.max_megapixels,
                settings.max_frames)


# ---- Cache: a source that is read once -----------------------------------------------------------
#
# To decode the photos of 20,000 objects takes hours, and their frames fill 7.3 GiB. A cache is what
# `load` has made of them, two files in a folder:
#
#     frames.cache        the arrays of list_arrays, one behind another, byte by byte as in memory
#     frames.cache.json   all else: names, captions, how the source was read; and a hash of either
#
# The first is never read into memory as a whole, but mapped: its tensors are addresses that stand
# for the file, and the system fetches what somebody looks at. A frame's colour and mask lie
# together, 16 KiB at 64 x 64, so a step of 64 frames fetches 1 MiB, however many objects there are.
#
# Both are hashed whole whenever they are read: 7.3 GiB in 7 s. To look at size and date alone would
# be faster, and wrong: disks rot without a new date, and a copy has a new one though nothing has
# changed. No hash tells that the source has changed since: a cache stays what the source was.
FRAMES = "frames.cache"
ABOUT = "frames.cache.json"
FORMAT = 2                       # of both; a higher one where older caches would be misread
# Of Reading, and flags of `python data.py`: here what they are where nobody says anything else.
READ_AS = {"size": 64, "as_clips": False, "clip_filter": False, "max_megapixels": 64.0,
           "max_frames": 2000}


def is_cache(source):
    """Whether a source is a cache, whole or not."""
    if str(source) in ("synthetic", "puppets"):
        return False                     # even where a folder is called so
    return (Path(source) / ABOUT).is_file()


def list_arrays(views, size):
    """What frames.cache holds, in order: [(shape, dtype)]. views: of each object how many."""
    n_objects, n_frames = len(views), sum(views)
    return [((n_frames, size, size, 4), torch.uint8),                # colour x mask, and the mask
            ((n_frames, 4, 4), torch.float32),                       # cam2world
            ((n_frames, 4), torch.float32),                          # intrinsics
            ((n_objects, 4, 4, 4), torch.float32)]                   # portraits


def write_cache(source, folder, reading, objects=None):
    """Reads a source as `load` does, and writes a cache of it into a folder.

    reading: how the source is to be read; objects: as in `load`
    """
    folder = Path(folder)
    check_cacheable(source, folder)
    found = find(source, 0, reading)
    chosen = choose(found, objects, source)
    make_folder(folder)
    # What is opened last is renamed first: whoever is stopped in between leaves frames without
    # their json, which is no cache, or beside an older one, whose hash is not theirs.
    with writing(folder / ABOUT) as about_path, writing(folder / FRAMES) as frames_path:
        names, views, contents = write_frames(frames_path, chosen, reading)
        if not names:
            raise BadInput(nothing_left(source, chosen, reading))
        own = read_captions(Path(source), found, reading)
        captions = [own.get(name) for name in names]
        look_at_objects(names, contents, captions, reading)
        layout, moving = kind_of(chosen)
        about = {"format": FORMAT, "source": str(Path(source).resolve())}
        about["read_as"] = read_as(reading)
        about["objects"] = objects
        about |= {"names": names, "views": views, "captions": captions, "layout": layout,
                  "moving": moving, "skipped": reading.skipped(), "remarks": reading.remarks}
        about["frames_hash"] = hash_of(frames_path)
        about["own_hash"] = hash_of_plain(about)
        about_path.write_text(json.dumps(about))


def check_cacheable(source, folder):
    """BadInput where a cache would be of no use, or its folder holds something else."""
    if str(source) in ("synthetic", "puppets"):
        raise BadInput(f"--cache: {source} is made again in seconds; a cache is for a folder")
    if is_cache(source):
        raise BadInput(f"--cache: {source} is a cache already")
    others = []
    if folder.is_dir():
        others = [path.name for path in listing(folder) if path.name not in (FRAMES, ABOUT)]
    if others:
        raise BadInput(f"--cache {folder}: there is {some_of(others, 3)}; name a new folder, an "
                       "empty one, or an earlier cache")


def write_frames(path, chosen, reading):
    """Writes frames.cache, one object after another, so that only two are ever in memory: the next
    one is read while the last one is still there.

    chosen: a list of Found
    returns of those objects that can be used: names, how many views, hashes of their pictures
    """
    names, views, contents = [], [], []
    # TRAP: a small tensor that is kept lies behind a large one that is freed, whose place is then
    # too small for the next object: with one of each of 20,000 objects that took 15 GiB.
    cam2world, intrinsics, known_portraits = bytearray(), bytearray(), bytearray()

    def build(one):
        return photographed_object(one, reading)

    with open(path, "wb") as file:
        for name, capture in build_each(chosen, build, reading):
            names.append(name)
            views.append(len(capture.rgba))
            contents.append(content_of(capture))
            alone = gather([name], [capture], 0, "", reading, moving=False)
            file.write(capture.rgba.numpy().tobytes())
            cam2world += capture.cam2world.numpy().tobytes()
            intrinsics += capture.intrinsics.numpy().tobytes()
            known_portraits += portraits(alone).numpy().tobytes()
            check_room(file, len(names), len(chosen))
        for array in (cam2world, intrinsics, known_portraits):
            file.write(array)
    return names, views, contents


def check_room(file, n_written, n_objects):
    """BadInput where the disk will be full before all objects are written, if the rest of them are
    like those that are.

    OURS: asked from the 20th part on, as the first may be larger than most.
    """
    folder = Path(file.name).parent
    needed = file.tell() / n_written * n_objects
    free = file.tell() + shutil.disk_usage(folder).free
    if needed > free and n_written >= n_objects / 20:
        raise BadInput(f"{folder}: the cache would take about {needed / 2**30:.2f} GiB, and "
                       f"{free / 2**30:.2f} are free: another --cache, or a smaller --size")


def hash_of(path):
    """SHA-256 of a file, which is read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of_plain(about):
    """SHA-256 of what a JSON file holds, but for this hash itself."""
    others = {name: value for name, value in about.items() if name != "own_hash"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def read_as(reading):
    """How a source is to be read: {name: value} of READ_AS."""
    return {name: getattr(reading, name) for name in READ_AS}


def write_anew(folder, source="PATH", flags=(), objects=None):
    """What to do about a cache that is no good, in words; flags: as read_as gives them."""
    words = ["python", "data.py", "--data", source, "--cache", str(folder)]
    for name, value in dict(flags).items():
        if value == READ_AS[name]:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    if objects:
        words += ["--objects", objects]
    return f"write it anew: {shlex.join(words)}"


def read_about(folder):
    """What frames.cache.json holds; BadInput unless it is as it was written."""
    path = Path(folder) / ABOUT
    try:
        about = json.loads(read_text(path, most=2 ** 30))
        is_sealed = about["own_hash"] == hash_of_plain(about)
    except FAULTS:
        is_sealed = False
    if not is_sealed:
        raise BadInput(f"{path}: this cache is cut or changed; {write_anew(folder)}")
    if about["format"] != FORMAT:
        raise BadInput(f"{path}: a cache of another version; {write_anew(folder, about['source'])}")
    return about


def found_in(about):
    """A cache's objects: a list of Found."""
    return [Found(name, about["layout"], k) for k, name in enumerate(about["names"])]


def load_cache(folder, reading, holdout, objects):
    """What `load` made of the source when the cache was written, to the same bits.

    size and the rest of READ_AS must be as they were then. holdout may be another, and objects may
    name a part of those that are there; these come in the cache's order.
    """
    about = read_about(folder)
    check_same_reading(folder, about, reading)
    chosen = choose(found_in(about), objects, folder)
    path = folder / FRAMES
    arrays = list_arrays(about["views"], reading.size)
    if not is_whole(path, arrays, about["frames_hash"]):
        again = write_anew(folder, about["source"], about["read_as"], about["objects"])
        raise BadInput(f"{path}: this cache is cut or changed; {again}")
    views = torch.tensor(about["views"])
    tensors, mapped = map_arrays(path, arrays)
    rgba, cam2world, intrinsics, known_portraits = tensors
    numbers = [one.origin for one in chosen]             # k of those that are wanted
    if len(chosen) < len(views):
        # Copies, in memory: whoever names objects names a few.
        owner = torch.arange(len(views)).repeat_interleave(views)    # of each frame, its object
        frames = torch.isin(owner, torch.tensor(numbers))
        rgba, cam2world, intrinsics = rgba[frames], cam2world[frames], intrinsics[frames]
    object_index, heldout = number_frames(views[numbers].tolist(), holdout, about["moving"])
    captions = [about["captions"][k] for k in numbers]
    return Dataset(
        images=rgba[..., :3], masks=rgba[..., 3], cam2world=cam2world, intrinsics=intrinsics,
        object_index=object_index, heldout=heldout, names=[one.name for one in chosen],
        captions=captions, layout=about["layout"], skipped=about["skipped"],
        remarks=about["remarks"], moving=about["moving"],
        known_portraits=known_portraits[numbers], mapped=mapped)


def is_whole(path, arrays, its_hash):
    """Whether frames.cache is as it was written. Its size is asked first: nobody reads 1 TiB."""
    n_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays)
    return path.is_file() and path.stat().st_size == n_bytes and hash_of(path) == its_hash


def check_same_reading(folder, about, reading):
    """BadInput where a cache was made with another flag than it is read with."""
    for name, made in about["read_as"].items():
        asked = getattr(reading, name)
        if asked != made:
            again = write_anew(folder, about["source"], read_as(reading), about["objects"])
            raise BadInput(f"--{name.replace('_', '-')} is {asked} here, but {made} in the cache "
                           f"{folder}: give the same, or {again}")


def map_arrays(path, arrays):
    """Arrays [(shape, dtype)] that lie one behind another in a file -> tensors, and their map.

    TRAP: who writes into one of these tensors ends the program, by a signal. One could map them so
    that changes stay with us (torch.from_file does), but Linux refuses that to a file that is
    larger than the memory: all of it might be changed.
    """
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensors = []
    offset = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")              # torch says that they cannot be written into
        for shape, dtype in arrays:
            flat = torch.frombuffer(mapped, dtype=dtype, count=math.prod(shape), offset=offset)
            tensors.append(flat.view(shape))
            offset += flat.nbytes
    return tensors, mapped


def give_back(mapped):
    """Tells the system that what was looked at in a map is no longer needed.

    Until then it counts as this process's memory, and after an epoch that would be the whole file.
    The system itself keeps it while there is room: who looks again finds it at once. Windows, which
    has no such call, and macOS take it back when they are short of memory.
    """
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)


# ---- Command line --------------------------------------------------------------------------------
#
#     python data.py --data PATH                      tells what is in PATH and draws it
#     python data.py --data PATH --cache FOLDER       writes it once, for train.py --data FOLDER


def contact_sheet(dataset, rows=8, columns=12):
    """(rows size, columns size, 3) uint8: an object a row, views in order, grey around it."""
    sheet = []
    for k in range(min(rows, dataset.n_objects)):
        frames = dataset.frames_of(k)
        evenly = torch.linspace(0, len(frames) - 1, columns).round().long()
        frames = frames[evenly]
        images = dataset.images[frames].float()
        grey = 0.35 * (255 - dataset.masks[frames, ..., None].float())
        row = torch.cat(list(images + grey), 1)          # (size, columns size, 3)
        sheet.append(row)
    return torch.cat(sheet).byte().numpy()


def plot_cameras(dataset, path):
    """3D plot: the cube [-1, 1]^3, and up to 500 cameras with the direction that they look in."""
    from matplotlib.figure import Figure as Plot
    axes = Plot(figsize=(7, 7)).add_subplot(projection="3d")
    order = [2, 0, 1]                                    # matplotlib's vertical axis is its third
    position = dataset.cam2world[:500, :3, 3]
    ahead = -dataset.cam2world[:500, :3, 2]
    length = 0.25 * position.norm(dim=1).mean().item()
    axes.quiver(*position[:, order].T, *ahead[:, order].T, length=length, linewidth=0.6)
    ends = list(itertools.product([-1, 1], repeat=3))    # the cube's corners, in any order of axes
    for a, b in itertools.combinations(ends, 2):
        differing = sum(x != y for x, y in zip(a, b))
        if differing == 1:                               # an edge
            axes.plot(*zip(a, b), color="black", linewidth=0.8)
    axes.set(xlabel="z", ylabel="x", zlabel="y (up)", title="cameras look at the cube [-1, 1]^3")
    axes.set_aspect("equal")
    with writing(path) as temporary:
        axes.figure.savefig(temporary, dpi=110)


def span(x):
    """The least and the largest number of x, in words."""
    return f"{x.min():.3g} to {x.max():.3g}"


def describe_cameras(dataset):
    """Two lines on where cameras are and what they see."""
    position = dataset.cam2world[:, :3, 3]
    distance = position.norm(dim=1)
    elevation = torch.rad2deg(torch.asin(position[:, 1] / distance))
    fov = torch.rad2deg(2 * torch.atan(0.5 / dataset.intrinsics[:, 1]))
    uv, _ = project(torch.zeros(1, 3), dataset.cam2world, dataset.intrinsics)
    is_seen = ((uv > 0) & (uv < 1)).all(-1)
    share = 100 * is_seen.float().mean()
    return (f"cameras   distance {span(distance)}, elevation {span(elevation)} degrees,\n"
            f"          field of view {span(fov)} degrees; {share:.0f} % see the cube's middle")


def describe_hull(dataset, most=4):
    """A line on how well the first objects' masks and cameras agree."""
    agreement = []
    n_objects = min(most, dataset.n_objects)
    for k in range(n_objects):
        frames = dataset.frames_of(k)
        whole = torch.tensor([0.0, 0, 1, 1]).expand(len(frames), 4)
        agreement.append(hull_agreement(dataset.masks[frames], dataset.cam2world[frames],
                                        dataset.intrinsics[frames], whole))
    return (f"hull      masks of {n_objects} object(s) agree with what the others leave of space: "
            f"{span(100 * torch.cat(agreement))} %")


def describe(dataset):
    """What was found, in lines."""
    views = dataset.object_index.bincount()              # (N,) of each object
    n_frames, size = dataset.images.shape[:2]
    # Some at a time: as floats, all masks of a cache would fill the memory.
    cover = torch.cat([part.float().mean((1, 2)) for part in dataset.masks.split(1024)])
    cover = 100 * cover / 255
    lines = []
    lines.append(f"layout    {dataset.layout}")
    lines.append(f"objects   {dataset.n_objects} ({some_of(dataset.names, 6)})")
    lines.append(f"views     {n_frames}: {views.min()} to {views.max()} an object; "
                 f"{dataset.heldout.sum()} held out")
    lines.append(f"size      {size} x {size}")
    if dataset.moving:
        lines.append("cameras   unknown, as are the poses: to be learned")
    else:
        lines.append(describe_cameras(dataset))
        lines.append(describe_hull(dataset))
    lines.append(f"masks     cover {span(cover)} % of a frame")
    captions = [caption for caption in dataset.captions if caption]
    first = f", the first: {captions[0]}" if captions else ""
    lines.append(f"captions  {len(captions)}{first}")
    for reason in dataset.skipped or ["nothing"]:
        lines.append(f"skipped   {reason}")
    for remark in dataset.remarks:
        lines.append(f"odd       {remark}")
    return lines


# Least and most of the numbers.
BOUNDS = {"size": (8, 4096), "holdout": (0, 1_000_000), "max_megapixels": (0.001, 10_000),
          "max_frames": (3, 10_000_000)}


def make_parser():
    """The flags of `python data.py`."""
    parser = Parser(description="Tell what is in a dataset, and draw it.")
    add = parser.add_argument
    add("--data", default="synthetic",
        help="'synthetic', 'puppets', a folder of photos or of clips, or a cache")
    add("--cache", metavar="FOLDER", help="write the frames into this folder: named as --data, it "
        "is read in seconds, and takes hardly any memory")
    add("--size", type=int, help="side of the square frames (%(default)s)")
    add("--out", default="data-check", help="folder for the pictures (data-check)")
    add("--objects", help="only these, separated by commas")
    add("--holdout", type=int, default=6, help="every n-th view; 0: none (6)")
    add("--as-clips", action="store_true",
        help="folders of frames, and strips of square frames, are clips")
    add("--max-megapixels", type=float, help="of a picture (%(default)g)")
    add("--max-frames", type=int, help="of an object (%(default)s)")
    add("--clip-filter", action="store_true",
        help="of clips: drop the ends, frames under 25 %% foreground, short ones")
    parser.set_defaults(**READ_AS)
    return parser


def main(arguments=None):
    """Says what is in --data and draws it."""
    args = make_parser().parse_args(arguments)
    for name, bounds in BOUNDS.items():
        check_number(f"--{name.replace('_', '-')}", getattr(args, name), bounds)
    flags = read_as(args)
    source = args.data
    if args.cache is not None:
        write_cache(args.data, args.cache, Reading(**flags), args.objects)
        source = args.cache                  # what is told and drawn is what has been written
    dataset = load(source, holdout=args.holdout, objects=args.objects, **flags)
    print("\n".join(describe(dataset)))
    out = Path(args.out)
    make_folder(out)
    written = [out / "sheet.png"]
    if args.cache is not None:
        written.insert(0, Path(args.cache) / FRAMES)
    with writing(out / "sheet.png") as temporary:
        sheet = iio.imwrite("<bytes>", contact_sheet(dataset), extension=".png")
        temporary.write_bytes(sheet)
    if not dataset.moving:
        written.append(out / "cameras.png")
        plot_cameras(dataset, out / "cameras.png")
    print(f"wrote     {', '.join(str(path) for path in written)}")


if __name__ == "__main__":
    run_cli(main)
