"""Exercise 2: the rays of a camera. Conventions, each of which looks right the wrong way round.

What is asked of camera_rays is judged by what the student's own pixel_directions says, so that a
mistake there costs its points once.
"""
import torch
import torch.nn.functional as F

from .common import Claim, Picture, compare, flaw

TITLE = "the rays of a camera"
PAPER = "Sec. 3.1; the conventions at the top of render.py"
EQUATION = """\
u = (column + 0.5) / size = cx + fx x / -z        seen from the camera
v = (row + 0.5) / size    = cy - fy y / -z        here with z = -1
o + t d = position + t R (x, y, -1) / |(x, y, -1)|"""
FILE = "render.py"
WRITE = ("pixel_directions", "camera_rays")
TAKEN_OUT = ()
CHANGED = (
    # Data are made with rays, too. There they are calculated again, in three places, with other
    # lengths: in a hand-out these ask the student's camera_rays.
    ("data.py", "from render import orbit, pixel_directions",
     "from render import camera_rays, orbit, pixel_directions"),
    ("data.py", """\
    in_camera = pixel_directions(intrinsics, n)                      # (V, n, n, 3)
    in_world = cam2world[:, None, None, :3, :3] * in_camera[..., None, :]      # R times each vector
    d = in_world.sum(-1).reshape(-1, 3)                              # (R, 3), of any length
    o = cam2world[:, :3, 3].repeat_interleave(n * n, 0)              # (R, 3)
""", """\
    o, d = camera_rays(cam2world, intrinsics, n)                     # (V, n, n, 3)
    o, d = o.reshape(-1, 3), d.reshape(-1, 3)                        # (R, 3)
"""),
    ("data.py", """\
        d = cam2world[view, :3, :3] * self.directions[rays, None]
        d = d.sum(-1)                                                # (rays, 3) in the world
""", """\
        _, d = camera_rays(cam2world, self.intrinsics, self.n)       # (V, n, n, 3)
        d = d.reshape(-1, 3)[rays]                                   # (rays, 3) in the world
"""),
    ("data.py", """\
    # Rows count downwards and the camera looks along -z, as in render.pixel_directions.
    rays = np.stack([(u - cx) / fx, -(v - cy) / fy, -np.ones(len(fx))], 1)
    return np.einsum("vij,vj->vi", poses[:, :3, :3], rays)
""", """\
    # A picture of one pixel, through a lens that is shifted so that u, v is in its middle.
    lens = np.stack([fx, fy, cx - u + 0.5, cy - v + 0.5], 1).astype(poses.dtype)
    _, d = camera_rays(torch.from_numpy(poses), torch.from_numpy(lens), 1)
    return d[:, 0, 0].numpy()
"""))
MINUTES = 25
TASK = """\
Two functions: where pixels look in the camera's own axes, and the same as rays in the world. R is
the upper left 3x3 of cam2world, the position its last column. The dots stand for any number of
axes, (V,) or (B, V): index from the end. Of a picture's axes the first is the row, the second the
column. Directions in the camera's axes have z = -1 and whatever length comes of it; rays in the
world have length 1."""

HALF = "a pixel is looked through at its middle: (column + 0.5) / size, not column / size"
ENDS = "size pixels lie side by side, each 1 / size wide: do not divide by size - 1"
DOWN = "rows count downwards while y points up: y has a minus, -(v - cy) / fy"
SWAPPED = "rows and columns are exchanged: axis -3 of the result is the row, axis -2 the column"
TURN = "camera to world is R v: with vectors as rows that is v @ R^T, and not v @ R"
UNTURNED = "directions are still in the camera's axes: turn them into the world by R"


# ---- In the camera's axes ------------------------------------------------------------------------
def by_hand(given, half=0.5, down=-1.0, last=0):
    """pixel_directions for each pixel. Mistakes: half a pixel, which way is up, size - last."""
    size = given["size"]
    rows = []
    for fx, fy, cx, cy in given["intrinsics"].double():
        centres = (torch.arange(size).double() + half) / (size - last)
        x = ((centres - cx) / fx).expand(size, size)
        y = (down * (centres - cy) / fy)[:, None].expand(size, size)
        rows.append(torch.stack([x, y, -torch.ones_like(x)], -1))
    return torch.stack(rows)


def pixels(render, given):
    return render.pixel_directions(given["intrinsics"], given["size"])


def middle_pixel(generator):
    """An odd number of pixels, so that one is in the middle; so is the lens."""
    focal = 1 + torch.rand(3, 2, generator=generator)
    return {"intrinsics": torch.cat([focal, torch.full((3, 2), 0.5)], 1), "size": 7}


def judge_middle_pixel(given, answer):
    """Of that pixel alone: neither focal lengths nor which way is up can change its direction."""
    ahead = torch.tensor([0.0, 0.0, -1.0]).expand(3, 3)
    if not compare(answer, by_hand(given, half=0.0, last=1), "no"):
        return ENDS
    middle = answer[:, 3, 3]
    off = by_hand(given, half=0.0)[:, 3, 3]
    off_and_flipped = by_hand(given, half=0.0, down=1.0)[:, 3, 3]
    hint = "with cx = cy = 0.5 the middle pixel of 7 looks straight ahead, along (0, 0, -1)"
    return compare(middle, ahead, hint, [(off, HALF), (off_and_flipped, HALF)])


def lopsided_lens(generator):
    """Four different numbers for each camera: a symmetric lens would hide exchanged ones."""
    focal = 1 + torch.rand(2, 2, generator=generator)
    middle = 0.3 + 0.4 * torch.rand(2, 2, generator=generator)
    return {"intrinsics": torch.cat([focal, middle], 1), "size": 6}


def judge_right_and_up(given, answer):
    """By signs alone: sizes are judged below."""
    problem = flaw(answer[..., :2], (2, 6, 6, 2))
    if problem:
        return f"x and y of each pixel: {problem}"
    to_the_right = answer[:, 2, 1:, 0] - answer[:, 2, :-1, 0]
    downwards = answer[:, 1:, 2, 1] - answer[:, :-1, 2, 1]
    if not compare(answer, by_hand(given).transpose(1, 2), "no"):
        return SWAPPED
    if not (to_the_right > 0).all():
        return "x points to the right: in a row of the picture it grows from column to column"
    if not (downwards < 0).all():
        return DOWN
    return ""


def judge_lens(given, answer):
    """x and y, whatever the other claims say: half a pixel, which way is up, rows and columns."""
    answer = answer[..., :2]
    for half, last in ((0.5, 0), (0.0, 0), (0.0, 1)):
        for down in (-1.0, 1.0):
            right = by_hand(given, half, down, last)[..., :2]
            for also in (right, right.transpose(1, 2)):
                if not compare(answer, also, "no"):
                    return ""
    hint = "invert u = cx + fx x / -z with z = -1: x = (u - cx) / fx; y with fy and cy"
    return compare(answer, by_hand(given)[..., :2], hint)


# ---- In the world --------------------------------------------------------------------------------
def rays(render, given):
    """Asks for rays, and for the same pixels in the camera's axes."""
    o, d = render.camera_rays(given["cam2world"], given["intrinsics"], given["size"])
    flat = given["intrinsics"].flatten(0, -2)
    in_camera = render.pixel_directions(flat, given["size"])
    return {"o": o, "d": d, "in_camera": in_camera.reshape(d.shape)}


def turned_cameras(generator):
    """Two objects with three cameras each, turned and shifted in any way."""
    rotation, _ = torch.linalg.qr(torch.randn(2, 3, 3, 3, generator=generator))
    rotation = rotation * torch.linalg.det(rotation)[..., None, None]
    cam2world = torch.eye(4).repeat(2, 3, 1, 1)
    cam2world[..., :3, :3] = rotation
    cam2world[..., :3, 3] = 3 * torch.randn(2, 3, 3, generator=generator)
    given = lopsided_lens(generator)
    intrinsics = given["intrinsics"][:, None].expand(2, 3, 4).contiguous()
    return {"cam2world": cam2world, "intrinsics": intrinsics, "size": 4}


def judge_turn(given, answer):
    """By what the student's own pixel_directions says of the pixels."""
    rotation = given["cam2world"][..., :3, :3].double()
    in_camera = answer["in_camera"].double()
    if in_camera.norm(dim=-1).min() < 1e-3:
        return "pixel_directions answers no directions: their length is 0"
    right = F.normalize(torch.einsum("bvij,bvhwj->bvhwi", rotation, in_camera), dim=-1)
    back = F.normalize(torch.einsum("bvji,bvhwj->bvhwi", rotation, in_camera), dim=-1)
    unturned = F.normalize(in_camera, dim=-1)
    d = answer["d"]
    if d.shape == right.shape:
        d = F.normalize(d.double(), dim=-1)              # its length is another claim's matter
    return compare(d, right, "d is R times the pixel's direction", [(back, TURN),
                                                                    (unturned, UNTURNED)])


def judge_position(given, answer):
    position = given["cam2world"][..., None, None, :3, 3]
    right = position.expand(2, 3, 4, 4, 3)
    rotation = given["cam2world"][..., :3, :3]
    inverse = -(rotation.mT @ given["cam2world"][..., :3, 3:])[..., 0]
    inverse = inverse[:, :, None, None].expand(2, 3, 4, 4, 3)
    hint = "o is the last column of cam2world, the same for all pixels of a picture"
    named = "that is world to camera, -R^T position: cam2world holds the position as it is"
    return compare(answer["o"], right, hint, [(inverse, named)])


def judge_length(given, answer):
    length = answer["d"].norm(dim=-1)
    hint = "divide d by its length: else t is no distance, and fog is thinner at the rim"
    return compare(length, torch.ones(2, 3, 4, 4), hint)


CLAIMS = (
    Claim(2, "a pixel is looked through at its middle", middle_pixel, pixels, judge_middle_pixel),
    Claim(2, "columns go right, rows go down", lopsided_lens, pixels, judge_right_and_up),
    Claim(2, "focal lengths and middle of the lens are in their places",
          lopsided_lens, pixels, judge_lens),
    Claim(2, "directions are turned from the camera's axes into the world",
          turned_cameras, rays, judge_turn),
    Claim(1, "o is the camera's position, for every pixel", turned_cameras, rays, judge_position),
    Claim(1, "d has length 1", turned_cameras, rays, judge_length))


# ---- The picture: a letter that is no other letter upside down or mirrored ----------------------
def letter(generator):
    """An F: no other letter upside down, mirrored or turned."""
    middles = (2 * torch.arange(32) + 1) / 32 - 1
    z, y, x = torch.meshgrid(middles, middles, middles, indexing="ij")
    thin = z.abs() < 0.15
    stem = (x + 0.4).abs() < 0.15
    top = ((y - 0.65).abs() < 0.15) & (x > -0.5) & (x < 0.6)
    arm = ((y - 0.1).abs() < 0.15) & (x > -0.5) & (x < 0.3)
    solid = thin & (y.abs() < 0.8) & (stem | top | arm)
    colour = torch.stack([(x + 1) / 2, (y + 1) / 2, torch.full_like(x, 0.4)])
    return {"volume": torch.cat([40.0 * solid[None].float(), colour])[None]}


def show(render, given):
    cam2world = render.orbit(0.5, 0.3, 4.0)[None, None]
    intrinsics = cam2world.new_tensor([[[1.5, 1.5, 0.5, 0.5]]])
    rgb, occupancy = render.render(given["volume"], cam2world, intrinsics, 96, 64)
    return rgb[0, 0] + 1 - occupancy[0, 0]               # over white


def draw(figure, given, answer):
    axes = figure.subplots()
    axes.imshow(answer.clamp(0, 1).movedim(0, -1).numpy())
    axes.set_axis_off()
    axes.set_title("an F, from its right and from above", fontsize=9)


PICTURE = Picture(letter, show, draw)


# ---- Solutions that are wrong, and what must be said of them; and one that is right -------------
WRONG = (
    ("centres = (pixels + 0.5) / size", "centres = pixels / size", HALF),
    ("y = -(v - cy) / fy ", "y = (v - cy) / fy ", DOWN),
    ("...ij,...hwj->...hwi", "...ji,...hwj->...hwi", TURN))


def directions_from_corners(intrinsics, size):
    first = 0.5 / size
    centres = torch.linspace(first, 1 - first, size).to(intrinsics)
    u = centres.view(1, size).expand(size, size)
    v = centres.view(size, 1).expand(size, size)
    pinhole = torch.stack([u, v], -1) - intrinsics[..., None, None, 2:]
    x, y = (pinhole / intrinsics[..., None, None, :2]).unbind(-1)
    return torch.stack([x, 0 - y, 0 * x - 1], -1)


def rays_as_rows(cam2world, intrinsics, size):
    far = torch.cat([pixel_directions(intrinsics, size).flatten(-3, -2),  # noqa: F821
                     torch.ones(*views, size * size, 1)], -1)             # noqa: F821
    points = (far @ cam2world.mT)[..., :3]               # in homogeneous coordinates, as rows
    o = cam2world[..., None, :3, 3].expand_as(points)
    d = points - o
    d = d / (d * d).sum(-1, keepdim=True).sqrt()
    return o.unflatten(-2, (size, size)), d.unflatten(-2, (size, size))


UNUSUAL = {"pixel_directions": directions_from_corners, "camera_rays": rays_as_rows}


def same_direction(intrinsics, size):
    return torch.tensor([0.1, 0.2, -1.0]).expand(*intrinsics.shape[:-1], size, size, 3)


def same_ray(cam2world, intrinsics, size):
    d = torch.tensor([0.1, 0.2, -1.0]).expand(*intrinsics.shape[:-1], size, size, 3)
    return 0 * d + 4, d


CONSTANT = {"pixel_directions": same_direction, "camera_rays": same_ray}
