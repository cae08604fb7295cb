"""Exercise 13: a reader for a layout that is described, not given. See exercise_13.py beside this.

Each check makes up a few photos of noise and cameras, writes them as described, and knows from that
what the reader must find.
"""
import math

import torch
import torch.nn.functional as F

from .common import Claim, Picture, compare

TITLE = "a reader for a layout that is only described"
PAPER = "Sec. 4.1: pictures, masks and cameras are all that the method sees"
EQUATION = """\
frames/0001.png ..., cameras.csv (frame, azimuth, elevation, distance, focal)  ->  data.Frames"""
FILE = "exercise_13.py"
WRITE = ("load_turntable",)
TAKEN_OUT = ()
CHANGED = ()
MINUTES = 40
TASK = """\
The top of exercise_13.py describes the files. data.Frames, in data.py, says what is to be returned;
render.orbit makes cameras. No such data are in your folder: the check makes some up, and draws what
was read."""

RADIANS = "azimuth and elevation are in degrees; orbit wants radians"
LEFT = "azimuth grows towards the object's left, -x, and orbit's to its right: it needs a minus"
ORDER = "frames are sorted by their names, whatever the order of the lines in cameras.csv"
FRACTION = "focal is in pixels of the photo; intrinsics are fractions of its side: divide by that"
OF_SIZE = "focal is in pixels of the photo, whose side is not `size`"
BLACK = "colours outside of the mask are black in Frames: multiply by the mask before reducing"
MEANS = "a reduced pixel is the mean of all photo's pixels in it: mode 'area', not every n-th"


# ---- Photos and cameras, made up -----------------------------------------------------------------
def made_up(generator):
    """What is given: 5 photos of 24 x 24 in another order than their names', cameras, a size."""
    n, side = 5, 24
    photos = torch.randint(256, (n, side, side, 4), generator=generator, dtype=torch.uint8)
    soft = F.interpolate(torch.rand(n, 1, 6, 6, generator=generator), size=side, mode="bilinear")
    photos[..., 3] = (255 * (3 * soft[:, 0] - 1).clamp(0, 1)).byte()
    numbers = torch.rand(n, 2, generator=generator)
    azimuth = 360 * numbers[:, 0]
    elevation = 60 * numbers[:, 1] - 10
    distance, focal = (3 + torch.rand(2, generator=generator)).tolist()
    names = ["0003", "0001", "0005", "0002", "0004"]
    lines = ["frame,azimuth,elevation,distance,focal"]
    for name, a, e in zip(names, azimuth.tolist(), elevation.tolist()):
        lines.append(f"{name},{a:.4f},{e:.4f},{distance:.4f},{8 * focal:.4f}")
    return {"photos": photos, "names": names, "csv": "\n".join(lines) + "\n", "size": 8,
            "azimuth": azimuth, "elevation": elevation, "distance": distance, "focal": 8 * focal}


def load(module, given):
    """Writes the files as described, and asks the reader."""
    import tempfile
    from pathlib import Path

    import imageio.v3 as iio

    folder = Path(tempfile.mkdtemp(dir=".")) / "mug"
    (folder / "frames").mkdir(parents=True)
    (folder / "cameras.csv").write_text(given["csv"], encoding="utf8")
    for name, photo in zip(given["names"], given["photos"]):
        iio.imwrite(folder / "frames" / f"{name}.png", photo.numpy())
    frames = module.load_turntable(folder, given["size"])
    return {name: getattr(frames, name) for name in (
        "images", "masks", "cam2world", "intrinsics", "object_index", "heldout", "names")}


def in_order(given):
    """Numbers of the photos, sorted by name."""
    return sorted(range(5), key=lambda i: given["names"][i])


def camera(azimuth, elevation, distance):
    """cam2world of one camera, as render.orbit makes it, from its definition."""
    back = torch.tensor([math.sin(azimuth) * math.cos(elevation), math.sin(elevation),
                         math.cos(azimuth) * math.cos(elevation)])
    right = torch.tensor([math.cos(azimuth), 0.0, -math.sin(azimuth)])
    columns = [right, torch.linalg.cross(back, right), back, distance * back]
    return torch.cat([torch.stack(columns, 1), torch.tensor([[0.0, 0.0, 0.0, 1.0]])])


def cameras(given, order, sign=-1, azimuth_unit=math.pi / 180, elevation_unit=math.pi / 180):
    """All cameras, in an order. Mistakes: azimuth the other way round, degrees for radians."""
    made = []
    for i in order:
        azimuth = sign * azimuth_unit * float(given["azimuth"][i])
        elevation = elevation_unit * float(given["elevation"][i])
        made.append(camera(azimuth, elevation, given["distance"]))
    return torch.stack(made)


# ---- What is asked -------------------------------------------------------------------------------
def judge_kinds(given, answer):
    """Types and shapes, and that there is something in them."""
    wanted = {"images": (5, 8, 8, 3), "masks": (5, 8, 8), "cam2world": (5, 4, 4),
              "intrinsics": (5, 4), "object_index": (5,), "heldout": (5,)}
    kinds = {"images": torch.uint8, "masks": torch.uint8, "cam2world": torch.float32,
             "intrinsics": torch.float32, "object_index": torch.int64, "heldout": torch.bool}
    for name, shape in wanted.items():
        value = answer[name]
        if tuple(value.shape) != shape or value.dtype != kinds[name]:
            return (f"{name} should be {shape} {kinds[name]}, and is {tuple(value.shape)} "
                    f"{value.dtype}")
    if answer["names"] != ["mug"]:
        return f"names is a list of the objects' names, here ['mug'], not {answer['names']}"
    if answer["heldout"].any() or answer["object_index"].any():
        return "all frames are of object 0, and none is held out"
    if len(answer["masks"].unique()) < 10:
        return "the masks are the photos' alpha"
    return ""


def judge_cameras(given, answer):
    """Each camera is one of the right ones, in whatever order."""
    right = cameras(given, range(5))
    found = answer["cam2world"]
    order = []
    for matrix in found:
        distances = (right - matrix).flatten(1).norm(dim=1)
        order.append(int(distances.argmin()))
    hint = "a camera on a sphere that looks at the middle, y up: render.orbit makes it"
    mistakes = []
    for guess in (in_order(given), list(range(5))):
        mistakes.append((cameras(given, guess, sign=1), LEFT))
        for sign in (-1, 1):
            mistakes.append((cameras(given, guess, sign, 1.0, 1.0), RADIANS))
            mistakes.append((cameras(given, guess, sign, azimuth_unit=1.0), RADIANS))
            mistakes.append((cameras(given, guess, sign, elevation_unit=1.0), RADIANS))
    return compare(found, right[order], hint, mistakes, 1e-2)


def are_equal(found, right):
    """Bytes against numbers: whether they differ by no more than rounding."""
    if found.shape != right.shape:
        return False
    return bool((found.double() - right).abs().max() < 1.6)


def expected_pictures(given, order, masked=True, mode="area"):
    """Colours and mask, (5, 8, 8, 4) from 0 to 255, as numbers."""
    photos = given["photos"][order].double().permute(0, 3, 1, 2)
    mask = photos[:, 3:] / 255
    colour = photos[:, :3] * mask if masked else photos[:, :3]
    both = torch.cat([colour, photos[:, 3:]], 1)
    if mode == "area":
        return F.avg_pool2d(both, 3).permute(0, 2, 3, 1)
    return both[:, :, ::3, ::3].permute(0, 2, 3, 1)


def judge_order(given, answer):
    """By the masks alone: they tell the photos apart."""
    found = answer["masks"]
    in_turn = False
    for mode in ("area", "stride"):
        if are_equal(found, expected_pictures(given, range(5), mode=mode)[..., 3]):
            return ORDER
        in_turn |= are_equal(found, expected_pictures(given, in_order(given), mode=mode)[..., 3])
    if not in_turn:
        return "masks are the photos' alpha, reduced, one for each frame, sorted by name"
    heights = given["distance"] * torch.sin(given["elevation"] * math.pi / 180)
    if not compare(answer["cam2world"][:, 1, 3], heights, "no", tolerance=1e-2):
        return "photos are sorted by their names, and cameras are not: they must go together"
    return ""


def judge_focal(given, answer):
    """Of the photo's side, 24, not of the size asked for, 8."""
    focal, side = given["focal"], 24
    right = torch.tensor([focal / side, focal / side, 0.5, 0.5]).expand(5, 4)
    pixels = torch.tensor([focal, focal, 0.5, 0.5]).expand(5, 4)
    all_pixels = torch.tensor([focal, focal, 12, 12]).expand(5, 4)
    of_size = torch.tensor([focal / 8, focal / 8, 0.5, 0.5]).expand(5, 4)
    hint = "fx, fy, cx, cy as fractions of the photo's side; the middle is 0.5"
    mistakes = [(pixels, FRACTION), (all_pixels, FRACTION), (of_size, OF_SIZE)]
    return compare(answer["intrinsics"], right, hint, mistakes, 1e-3)


def judge_colours(given, answer):
    """In the order of the names, or as listed; by means, or not: those are other claims."""
    found = answer["images"]
    for order in (in_order(given), range(5)):
        for mode in ("area", "stride"):
            if are_equal(found, expected_pictures(given, order, mode=mode)[..., :3]):
                return ""
            bare = expected_pictures(given, order, masked=False, mode=mode)[..., :3]
            if are_equal(found, bare):
                return BLACK
    return "images are the photos' colours times the mask, from 0 to 255; these are not"


def judge_means(given, answer):
    """By the masks alone."""
    for order in (in_order(given), range(5)):
        if are_equal(answer["masks"], expected_pictures(given, order)[..., 3]):
            return ""
    return MEANS


CLAIMS = (
    Claim(1, "Frames has its fields, with their types and shapes", made_up, load, judge_kinds),
    Claim(3, "cameras stand where the file says, and look at the middle", made_up, load,
          judge_cameras),
    Claim(1, "frames come in the order of their names", made_up, load, judge_order),
    Claim(2, "intrinsics are fractions of the photo's side", made_up, load, judge_focal),
    Claim(2, "colours are black outside of the mask", made_up, load, judge_colours),
    Claim(1, "pictures are reduced by means", made_up, load, judge_means))


# ---- The picture: the photos, and the cameras from above -----------------------------------------
def a_round(generator):
    """A disc that is red on its right, before a grey wall that nobody should see."""
    given = made_up(torch.Generator().manual_seed(0))
    middles = (2 * torch.arange(24) + 1) / 24 - 1
    v, u = torch.meshgrid(middles, middles, indexing="ij")
    colour = torch.stack([128 + 120 * u, 0 * u + 80, 128 - 120 * v], -1)
    alpha = 255.0 * (u**2 + v**2 < 0.5)
    colour[alpha == 0] = 150
    photo = torch.cat([colour, alpha[..., None]], -1).byte()
    given["photos"] = photo.repeat(5, 1, 1, 1)
    given["azimuth"] = torch.arange(5) * 30.0
    lines = ["frame,azimuth,elevation,distance,focal"]
    for i, name in enumerate(sorted(given["names"])):
        lines.append(f"{name},{30 * i},{10 * i},3.5,60")
    return given | {"csv": "\n".join(lines) + "\n"}


def draw(figure, given, answer):
    left, right = figure.subplots(1, 2)
    left.imshow(answer["images"][0].numpy())
    left.set_axis_off()
    left.set_title("first frame", fontsize=9)
    x, _, z = answer["cam2world"][:, :3, 3].T.numpy()
    right.plot(x, z, "o-")
    right.plot([0], [0], "k+")
    right.text(x[0], z[0], " first")
    right.set_xlim(-4, 4)
    right.set_ylim(-4, 4)
    right.set_aspect("equal")
    right.set_title("cameras from above, front is up", fontsize=9)


PICTURE = Picture(a_round, load, draw)


# ---- Solutions that are wrong, and what must be said of them; and one that is right -------------
WRONG = (
    ('azimuth = -torch.deg2rad(torch.tensor(float(row["azimuth"])))',
     'azimuth = torch.deg2rad(torch.tensor(float(row["azimuth"])))', LEFT),
    ('focal = float(row["focal"]) / len(photo)', 'focal = float(row["focal"]) / size', OF_SIZE),
    ("colour = photos[:, :3] * photos[:, 3:]", "colour = photos[:, :3]", BLACK))


def load_with_numpy(folder, size):
    import numpy as np
    folder = Path(folder)                                                # noqa: F821
    names = sorted(path.stem for path in (folder / "frames").glob("*.png"))
    table = np.genfromtxt(folder / "cameras.csv", delimiter=",", names=True, dtype=None,
                          encoding="utf8", converters={0: lambda text: str(text).zfill(4)})
    rows = {str(row["frame"]): row for row in np.atleast_1d(table)}
    images, poses, lenses = [], [], []
    for name in names:
        photo = np.asarray(iio.imread(folder / "frames" / f"{name}.png"), np.float64)  # noqa: F821
        n = len(photo) // size
        photo[..., :3] *= photo[..., 3:] / 255
        images.append(photo.reshape(size, n, size, n, 4).mean((1, 3)))
        lens = rows[name]["focal"] / len(photo)
        lenses.append([lens, lens, 0.5, 0.5])
        azimuth = 2 * np.pi - np.radians(rows[name]["azimuth"])
        elevation = np.radians(rows[name]["elevation"])
        poses.append(orbit(float(azimuth), float(elevation), float(rows[name]["distance"])))  # noqa
    rgba = torch.from_numpy(np.rint(np.stack(images)).astype(np.uint8))
    return Frames(rgba[..., :3], rgba[..., 3], torch.stack(poses).float(),                    # noqa
                  torch.tensor(np.array(lenses), dtype=torch.float32),
                  torch.zeros(len(names), dtype=torch.long),
                  torch.zeros(len(names), dtype=torch.bool), [folder.name])


UNUSUAL = {"load_turntable": load_with_numpy}


def constant(folder, size):
    return Frames(torch.zeros(5, size, size, 3, dtype=torch.uint8),                           # noqa
                  torch.full((5, size, size), 255, dtype=torch.uint8),
                  torch.eye(4).repeat(5, 1, 1), torch.full((5, 4), 0.5),
                  torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.bool), ["mug"])


CONSTANT = {"load_turntable": constant}
