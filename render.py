"""Volumes and cameras go in; pictures of colour, occupancy, depth and normals come out.

Paper: Sec. 3.1, Eq. 6 (colour) and Eq. 7 (occupancy): emission-absorption along every ray, with
colour and density interpolated trilinearly from the decoder's voxel grids. There is no MLP per
sample, so the volume is what costs, not the ray.

Conventions, for the whole project; each is held by a test in tests/test_render.py
  world        x right, y up, z towards the viewer; the object lives in the cube [-1, 1]^3
  cam2world    (4, 4): columns are the camera's x (right), y (up), z (BACKWARDS) and its position;
               the camera looks along its own -z, as in OpenGL, Blender and NeRF
  intrinsics   (fx, fy, cx, cy) as fractions of the picture's side, so one camera serves every
               resolution; in pixels of an S x S picture, multiply by S
  pixels       row 0 on top, centres at half integers: pixel (i, j) is at v = (i + .5)/S and
               u = (j + .5)/S
  volumes      stored (C, D, H, W) = (channel, z, y, x); channel 0 density >= 0 per world unit,
               channels 1..3 colour in [0, 1]; voxel (k, j, i) of a side-N volume has its centre at
               x = (2 i + 1)/N - 1 and so on (grid_sample's align_corners=False: the outer voxels
               end exactly at the faces of the cube, whatever N is)
  background   black: light that crosses everything meets nothing

Subjects that move are carried back first: App. B.1, inverse skinning (carry_back).

Shapes: B objects, V views, P parts, R rays, S samples on a ray, C channels.
Simplified: no empty-space skipping and no importance sampling. All S samples of a ray are spread
evenly between the two points where it crosses the cube, which at 32^3 to 128^3 is enough.
Read next: autodecoder.py
"""
import math

import torch
import torch.nn.functional as F

# ---- Cameras -----------------------------------------------------------------------------------


def orbit(azimuth, elevation, distance):
    """Camera-to-world matrices of cameras on a sphere that look at the origin, y up.

    azimuth, elevation (...,) radians; azimuth 0 is in front (+z), pi/2 to the right (+x)
    distance           float or (...,), world units
    returns            (..., 4, 4)
    """
    azimuth, elevation = torch.broadcast_tensors(*map(torch.as_tensor, (azimuth, elevation)))
    back = torch.stack([azimuth.sin() * elevation.cos(), elevation.sin(),
                        azimuth.cos() * elevation.cos()], -1)              # (..., 3) camera's +z
    right = torch.stack([azimuth.cos(), torch.zeros_like(azimuth), -azimuth.sin()], -1)
    up = torch.linalg.cross(back, right)
    position = back * torch.as_tensor(distance, dtype=back.dtype, device=back.device)[..., None]
    cam2world = torch.eye(4, dtype=back.dtype, device=back.device).repeat(*azimuth.shape, 1, 1)
    cam2world[..., :3, :] = torch.stack([right, up, back, position], -1)   # (..., 3, 4)
    return cam2world


def turn_about(cam2world, azimuth, distance, elevation=0.0):
    """Cameras (..., 4, 4) carried around the point `distance` ahead of them, to their right and up.

    azimuth, elevation in radians. For the cameras of a subject's parts: all turn together, so the
    subject is seen, in the same pose, from another side.
    """
    front, moved = (orbit(*torch.tensor(angles, dtype=cam2world.dtype, device=cam2world.device),
                          distance) for angles in ((0.0, 0.0), (azimuth, elevation)))
    return cam2world @ torch.linalg.inv(front) @ moved


def camera_rays(cam2world, intrinsics, size):
    """The ray through the centre of every pixel of a size x size picture.

    cam2world (..., 4, 4), intrinsics (..., 4) as fractions of the side
    returns o (..., 3) origins and d (..., size, size, 3) unit directions, in the world
    """
    if cam2world.shape[-2:] != (4, 4):
        raise ValueError(f"cam2world must end in (4, 4), got {tuple(cam2world.shape)}")
    if intrinsics.shape != cam2world.shape[:-2] + (4,):
        raise ValueError(f"intrinsics must be {tuple(cam2world.shape[:-2]) + (4,)} "
                         f"(fx, fy, cx, cy), got {tuple(intrinsics.shape)}")
    centre = (torch.arange(size, dtype=cam2world.dtype, device=cam2world.device) + 0.5) / size
    v, u = torch.meshgrid(centre, centre, indexing="ij")                   # (size, size)
    fx, fy, cx, cy = intrinsics[..., None, None, :].unbind(-1)             # (..., 1, 1)
    # Rows count downwards and the camera looks along -z: hence the two minus signs.
    d = torch.stack(torch.broadcast_tensors((u - cx) / fx, -(v - cy) / fy, u.new_tensor(-1.0)), -1)
    d = torch.einsum("...ij,...hwj->...hwi", cam2world[..., :3, :3], d)
    return cam2world[..., :3, 3], F.normalize(d, dim=-1)


def project(points, cam2world, intrinsics):
    """Where world points appear: the inverse of camera_rays.

    points (..., n, 3), cam2world (..., 4, 4), intrinsics (..., 4)
    returns uv (..., n, 2) fractions of the side (column, row), depth (..., n) along the view axis,
    positive in front of the camera
    """
    R, t = cam2world[..., :3, :3], cam2world[..., None, :3, 3]
    x, y, z = ((points - t) @ R).unbind(-1)                 # row vectors, so @ R is R^T (p - t)
    fx, fy, cx, cy = intrinsics[..., None, :].unbind(-1)
    return torch.stack([cx - fx * x / z, cy + fy * y / z], -1), -z


def random_windows(images, masks, intrinsics, side, generator):
    """A random side x side window of every picture (B, V, C, H, W), as a picture of its own.

    OURS: a window is a camera with other intrinsics, so full resolution costs what `side` costs,
    and Eq. 1 still sees neighbouring pixels, as it would not with scattered rays.
    returns images, masks (B, V, C, side, side), intrinsics (B, V, 4)
    """
    B, V, _, size, _ = images.shape
    corner = torch.randint(size - side + 1, (B, V, 2), generator=generator)       # x, y
    b, v = torch.arange(B)[:, None, None, None], torch.arange(V)[:, None, None]
    x = (corner[..., 0, None] + torch.arange(side))[:, :, None, :]                # (B, V, 1, side)
    y = (corner[..., 1, None] + torch.arange(side))[:, :, :, None]                # (B, V, side, 1)
    images, masks = (p[b, v, :, y, x].movedim(-1, 2) for p in (images, masks))
    centre = (intrinsics[..., 2:] * size - corner) / side
    return images, masks, torch.cat([intrinsics[..., :2] * size / side, centre], -1)


# ---- Eq. 6 and 7: along one ray -----------------------------------------------------------------


def ray_weights(density, edges):
    """Share of the light that each interval of a ray sends back: T_i (1 - exp(-density_i dt_i)).

    density (..., S) >= 0 per world unit, constant within an interval
    edges   (..., S+1) increasing distances that bound the S intervals
    returns (..., S), each ray's sum is its occupancy
    """
    if edges.shape != density.shape[:-1] + (density.shape[-1] + 1,):
        raise ValueError(f"edges must have one entry more than density {tuple(density.shape)} "
                         f"along the ray, got {tuple(edges.shape)}")
    # TRAP: the last interval ends where the volume ends. The 1e10 of the first NeRF code turns any
    # trace of fog in it into a wall, and an occupancy of 0.095 into 1.0.
    tau = density * edges.diff(dim=-1)                      # (..., S) optical thickness
    # The light that reaches interval i has crossed intervals 0..i-1 only: shift before exp.
    T = torch.exp(-F.pad(tau.cumsum(-1)[..., :-1], (1, 0)))  # (..., S) transmittance
    return T * -torch.expm1(-tau)                           # expm1: exact for thin fog too


def integrate(density, rgb, edges):
    """Colour (Eq. 6) and occupancy (Eq. 7) of rays through piecewise-constant fog.

    density (..., S)    >= 0, per world unit   rgb (..., S, 3) in [0, 1]
    edges   (..., S+1)  increasing distances that bound the S intervals, world units
    returns rgb (..., 3) over black, occupancy (...,) in [0, 1]; ... are the rays
    """
    if rgb.shape != density.shape + (3,):
        raise ValueError(f"rgb must be {tuple(density.shape) + (3,)}, got {tuple(rgb.shape)}")
    w = ray_weights(density, edges)
    return (w[..., None] * rgb).sum(-2), w.sum(-1)


# ---- Where rays and volume meet ------------------------------------------------------------------


def box_interval(o, d):
    """Distances at which rays enter and leave the cube [-1, 1]^3 (the slab method).

    o, d (..., 3); returns near, far (...,) >= 0, equal (an empty interval) for a ray that misses
    """
    # A zero component would give 0/0 for an origin exactly on a face: nudge it off zero.
    d = torch.where(d.abs() < 1e-9, torch.full_like(d, 1e-9), d)
    a, b = (-1 - o) / d, (1 - o) / d
    near = torch.minimum(a, b).amax(-1).clamp(min=0)        # the last of three slabs entered
    far = torch.maximum(a, b).amin(-1)                      # the first of three slabs left
    return near, torch.maximum(near, far)


def sample_volume(volume, points, padding="zeros"):
    """Trilinear interpolation. volume (B, C, D, H, W), points (B, M, 3) -> (B, M, C).

    Beyond the centres of the outer voxels values fade: half on a face, 0 half a voxel outside; with
    padding "border" they stay as they are on the face.
    """
    # TRAP: grid_sample wants (x, y, z) and indexes the LAST axis with x, which is just how volumes
    # are stored here, (z, y, x). A symmetric object would hide a swap.
    grid = points[:, None, None]                                            # (B, 1, 1, M, 3)
    out = F.grid_sample(volume, grid, align_corners=False, padding_mode=padding)
    return out[:, :, 0, 0].transpose(1, 2)                                  # (B, M, C)


def density_gradient(density):
    """Central differences. density (B, 1, D, H, W) -> (B, 3, D, H, W): d/dx, d/dy, d/dz."""
    p = F.pad(density, (1, 1, 1, 1, 1, 1))                  # zeros: there is nothing outside
    D, H, W = density.shape[2:]
    middle = slice(1, -1)
    dx = (p[:, :, middle, middle, 2:] - p[:, :, middle, middle, :-2]) * (W / 4)   # 2 steps of 2/W
    dy = (p[:, :, middle, 2:, middle] - p[:, :, middle, :-2, middle]) * (H / 4)
    dz = (p[:, :, 2:, middle, middle] - p[:, :, :-2, middle, middle]) * (D / 4)
    return torch.cat([dx, dy, dz], 1)


def place_samples(near, far, n_samples, jitter=None):
    """n_samples positions on every ray: near, far (B, R) -> t (B, R, S), edges (B, R, S+1)."""
    fraction = torch.linspace(0, 1, n_samples + 1, dtype=near.dtype, device=near.device)
    edges = near[..., None] + (far - near)[..., None] * fraction
    if near.device.type != "cpu" and jitter is not None:    # millions of numbers: a GPU draws them
        jitter = torch.Generator(near.device).manual_seed(
            int(torch.randint(2**62, (), generator=jitter)))
    share = 0.5 if jitter is None else torch.rand(
        edges[..., 1:].shape, generator=jitter, dtype=near.dtype, device=near.device)
    return edges[..., :-1] + edges.diff(dim=-1) * share, edges


# ---- Moving parts: inverse skinning (Sec. 3.2, Eq. 8 the other way round) ------------------------


def around_parts(near, far):
    """From where any part's cube is entered to where the last is left: (B, P, R) -> (B, R) each."""
    missed = near >= far
    near = near.masked_fill(missed, torch.inf).amin(1)
    far = far.masked_fill(missed, 0).amax(1)
    return torch.minimum(near, far), far


def carry_back(skin, o, d, t):
    """Inverse skinning: where the samples of a deformed frame lie in the undeformed volume.

    A part moves rigidly, so seen from part p only the camera has moved: p has its own rays, and the
    sample at distance t is x_p = o_p + t d_p. The part's skinning volume, read there, says how much
    it claims the sample: w = softmax over parts. The canonical point is sum_p w_p x_p (in the
    manner of HumanNeRF; Eq. 8 maps the other way and would have to be inverted).

    skin (B, P, D, H, W) logits, o, d (B, P, R, 3), t (B, R, S)
    returns points (B, R, S, 3) and w (B, P, R, S), which sums to 1 over the parts
    """
    x = o[..., None, :] + t[:, None, ..., None] * d[..., None, :]           # (B, P, R, S, 3)
    if x.shape[1] == 1:
        return x[:, 0], torch.ones_like(x[..., 0])
    # border: outside its cube a part claims what it claims on the face. Zeros would be a claim,
    # and where all other logits are negative even the largest.
    logits = sample_volume(skin.flatten(0, 1)[:, None], x.flatten(0, 1).flatten(1, 2), "border")
    w = logits.reshape(x.shape[:-1]).softmax(1)                             # (B, P, R, S)
    # sum_p w_p x_p = sum_p w_p o_p + t sum_p w_p d_p: two small products a ray, and no large x.
    o, d = (w.permute(0, 2, 3, 1) @ torch.cat([o, d], -1).transpose(1, 2)).chunk(2, -1)
    return o + t[..., None] * d, w                                          # (B, R, S, 3)


def blend_turned(vectors, share, rotation):
    """Vectors of the undeformed volume, turned with the parts into the axes of each camera.

    vectors (B, R, S, 3), share (B, P, R, S) as of carry_back, rotation (B, V, P, 3, 3) of
    cam2world; R = V h w -> (B, R, S, 3)
    """
    (B, V, P), S = rotation.shape[:3], vectors.shape[2]
    turned = vectors.reshape(B, 1, V, -1, 3) @ rotation.transpose(1, 2)     # rows: R^T v
    return (share.reshape(B, P, V, -1, 1) * turned).sum(1).reshape(B, -1, S, 3)


# ---- A whole picture ----------------------------------------------------------------------------


def render(volume, cam2world, intrinsics, size, n_samples, jitter=None, extras=True):
    """Pictures of each object's volume from each of its cameras (Eq. 6 and 7).

    volume     (B, 4, D, H, W)  channel 0 density >= 0 per world unit, 1..3 colour in [0, 1]
    cam2world  (B, V, 4, 4)     intrinsics (B, V, 4), see the conventions above
    size       side of the pictures in pixels      n_samples  per ray (the paper: 128)
    jitter     a torch.Generator: sample positions are drawn within their intervals, so that
               training sees all of the volume; None: at the middles
    extras     False: colour and occupancy only, all that training needs
    returns a dict of (B, V, C, size, size):
      rgb (C = 3) over black, occupancy (1) in [0, 1],
      depth (1) mean distance along the ray from the camera, world units, 0 where nothing is hit,
      normal (3) unit vectors in the world pointing out of the object, 0 where nothing is hit

    Objects with P moving parts: cam2world (B, V, P, 4, 4), the camera as each part sees it, and
    volume (B, 4 + P, D, H, W), the last P channels skinning logits (P = 1 needs none: (B, 4, ...)).
    Normals are then in the axes of the camera, and the dict has parts (P): each part's share of the
    occupancy.
    """
    moving = cam2world.ndim == 5
    B, V, P = cam2world.shape[:3] if moving else (*cam2world.shape[:2], 1)
    channels = 4 + P if P > 1 else 4                                        # more are not read
    if volume.ndim != 5 or volume.shape[1] < channels:
        raise ValueError(f"volume must be (B, {channels}, D, H, W), got {tuple(volume.shape)}")
    if B != volume.shape[0]:
        raise ValueError(f"{volume.shape[0]} volumes but cameras for {B} objects")
    if moving:
        intrinsics = intrinsics[:, :, None].expand(B, V, P, 4)
    o, d = camera_rays(cam2world, intrinsics, size)
    o = o[..., None, None, :].expand_as(d)                                  # (B, V, [P,] h, w, 3)
    if moving:
        o, d = (x.transpose(1, 2).reshape(B, P, -1, 3) for x in (o, d))     # (B, P, R, 3)
        # Where samples lie is bookkeeping: no gradient flows through near and far.
        t, edges = place_samples(*around_parts(*box_interval(o.detach(), d.detach())), n_samples,
                                 jitter)                                    # (B, R, S), (B, R, S+1)
        points, share = carry_back(volume[:, 4:4 + P], o, d, t)
    else:
        o, d = o.reshape(B, -1, 3), d.reshape(B, -1, 3)                     # (B, R, 3)
        t, edges = place_samples(*box_interval(o, d), n_samples, jitter)
        points = o[:, :, None] + t[..., None] * d[:, :, None]               # (B, R, S, 3)
    values = sample_volume(volume[:, :4], points.flatten(1, 2)).unflatten(1, t.shape[1:])
    density, rgb = values[..., 0], values[..., 1:]                          # (B, R, S), (.., S, 3)

    def image(x):                                                           # (B, R, C) -> picture
        return x.reshape(B, V, size, size, -1).movedim(-1, 2)

    rgb, occupancy = integrate(density, rgb, edges)                         # (B, R, 3), (B, R)
    out = {"rgb": image(rgb), "occupancy": image(occupancy)}
    if extras:
        w, occupancy = ray_weights(density, edges), occupancy[..., None]    # (B, R, S), (B, R, 1)
        hit = occupancy > 1e-3
        depth = (w * t).sum(-1, keepdim=True) / occupancy.clamp(min=1e-3)
        slope = sample_volume(density_gradient(volume[:, :1]), points.flatten(1, 2))
        slope = F.normalize(slope, dim=-1).unflatten(1, t.shape[1:])        # (B, R, S, 3)
        if moving:
            out["parts"] = image((share * w[:, None]).sum(-1).transpose(1, 2))
            slope = blend_turned(slope, share, cam2world[..., :3, :3])
        normal = F.normalize(-(w[..., None] * slope).sum(2), dim=-1)        # density falls outwards
        out["depth"], out["normal"] = image(depth * hit), image(normal * hit)
    return out
