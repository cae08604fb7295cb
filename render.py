"""Volumes and cameras go in; pictures of colour and occupancy come out.

Paper: Sec. 3.1, Eq. 6 (colour) and Eq. 7 (occupancy: how opaque the object is along a ray, to be
compared with a photo's mask). It is NeRF's renderer without the network: the object is fog, whose
density and colour are interpolated from a grid of voxels.

Conventions, for the whole project; each is held by a test in tests/test_render.py
  world        x right, y up, z towards the viewer; the object lives in the cube [-1, 1]^3
  cam2world    (4, 4): its columns are the camera's x (right), y (up), z (BACKWARDS) and position;
               the camera looks along its own -z, as in OpenGL, Blender and NeRF
  intrinsics   (fx, fy, cx, cy) as fractions of the picture's side: one camera for any resolution
  pixels       row 0 on top; centres at u = (column + 0.5) / size, v = (row + 0.5) / size
  volumes      (C, D, H, W) = (channel, z, y, x): density, >= 0 per world unit, and red, green and
               blue in [0, 1]; voxel i of N along an axis is centred at (2 i + 1) / N - 1, so that
               the outer ones end exactly on the faces of the cube (align_corners=False)
  background   black: a ray that meets nothing brings nothing

Shapes: B objects, V views, S samples on a ray, C channels.
Simplified: no importance sampling. All S samples of a ray are spread evenly between the two points
where it crosses the cube; for volumes of 32^3 to 128^3 they suffice.
Read next: autodecoder.py
"""
import torch
import torch.nn.functional as F


# ---- Cameras: (x, y, z) in a camera's axes is seen at u = cx + fx x / -z, v = cy - fy y / -z -----
def orbit(azimuth, elevation, distance):
    """Cameras on a sphere around the origin that look at it, y up: cam2world (..., 4, 4).

    azimuth, elevation  radians, floats or (...,); azimuth 0 is in front (+z), pi/2 right (+x)
    distance            world units, float or (...,)
    """
    azimuth = torch.as_tensor(azimuth)
    elevation = torch.as_tensor(elevation, device=azimuth.device)
    azimuth, elevation = torch.broadcast_tensors(azimuth, elevation)
    x = azimuth.sin() * elevation.cos()
    y = elevation.sin()
    z = azimuth.cos() * elevation.cos()
    back = torch.stack([x, y, z], -1)                                  # from the origin outwards
    right = torch.stack([azimuth.cos(), torch.zeros_like(x), -azimuth.sin()], -1)  # level: no roll
    up = torch.linalg.cross(back, right)
    distance = torch.as_tensor(distance, dtype=back.dtype, device=back.device)
    position = back * distance[..., None]
    columns = torch.stack([right, up, back, position], -1)             # (..., 3, 4)
    last_row = columns.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*columns.shape[:-2], 1, 4)
    return torch.cat([columns, last_row], -2)


def pixel_directions(intrinsics, size):
    """Where pixels look, in the CAMERA's axes at z = -1: (..., 4) -> (..., row, column, 3)."""
    pixels = torch.arange(size, dtype=intrinsics.dtype, device=intrinsics.device)
    centres = (pixels + 0.5) / size
    v, u = torch.meshgrid(centres, centres, indexing="ij")
    fx, fy, cx, cy = intrinsics[..., None, None, :].unbind(-1)
    x = (u - cx) / fx
    y = -(v - cy) / fy                                                 # minus: rows count downwards
    return torch.stack([x, y, -torch.ones_like(x)], -1)


def camera_rays(cam2world, intrinsics, size):
    """Rays o + t d in the world, through the pixels' centres of a size x size picture.

    cam2world (..., 4, 4), intrinsics (..., 4) -> o, the camera's position for every pixel, and d,
    of length 1 so that t is a distance; (..., size, size, 3) each
    """
    if cam2world.shape[-2:] != (4, 4):
        raise ValueError(f"cam2world must end in (4, 4), got {tuple(cam2world.shape)}")
    views = cam2world.shape[:-2]
    if intrinsics.shape != (*views, 4):
        raise ValueError(f"intrinsics must be {(*views, 4)}, got {tuple(intrinsics.shape)}")
    rotation = cam2world[..., :3, :3]
    position = cam2world[..., None, None, :3, 3]
    in_camera = pixel_directions(intrinsics, size)
    d = torch.einsum("...ij,...hwj->...hwi", rotation, in_camera)      # R times each pixel's vector
    return position.expand_as(d), F.normalize(d, dim=-1)


# ---- Along one ray: colour (Eq. 6) and occupancy (Eq. 7) -----------------------------------------
def integrate(density, rgb, edges):
    """Colour (Eq. 6) and occupancy (Eq. 7) of rays through fog, constant within each interval.

    density (..., S), >= 0 per world unit, rgb (..., S, 3) in [0, 1]
    edges   (..., S+1), distances that bound the S intervals, never decreasing, world units
    returns colour (..., 3) over black, occupancy (...,) in [0, 1], the intervals' weights (..., S)
    """
    *rays, S = density.shape
    if rgb.shape != (*rays, S, 3):
        raise ValueError(f"rgb must be {(*rays, S, 3)}, got {tuple(rgb.shape)}")
    if edges.shape != (*rays, S + 1):
        raise ValueError(f"edges must be {(*rays, S + 1)}, got {tuple(edges.shape)}")
    # TRAP: the last interval ends with the cube. NeRF's endless one (1e10) makes thin fog a wall.
    dt = edges.diff(dim=-1)                             # of intervals, not from sample to sample
    tau = density * dt                                  # tau_i = density_i dt_i, optical thickness
    # TRAP: interval i is dimmed by those before it and not by itself: shift before exp.
    tau_through = tau.cumsum(-1)                        # sum_{j <= i} tau_j
    tau_before = F.pad(tau_through[..., :-1], (1, 0))   # sum_{j < i} tau_j, which begins with 0
    T = torch.exp(-tau_before)                          # T_i = exp(-sum_{j < i} tau_j), light left
    stopped = -torch.expm1(-tau)                        # 1 - exp(-tau_i), exact for thin fog, too
    weights = T * stopped                               # w_i = T_i (1 - exp(-tau_i))
    colour = (weights[..., None] * rgb).sum(-2)         # C = sum_i w_i rgb_i    (Eq. 6)
    occupancy = weights.sum(-1)                         # O = sum_i w_i          (Eq. 7)
    return colour, occupancy, weights


# ---- From a volume to pictures -------------------------------------------------------------------
def box_interval(o, d):
    """Distances near, far (...,), >= 0, where rays o + t d enter and leave the cube [-1, 1]^3."""
    # The cube is three slabs, -1 <= x <= 1 and so on: inside is in all three. Missed: near = far.
    d = torch.where(d.abs() < 1e-9, torch.full_like(d, 1e-9), d)       # no 0 / 0 along a face
    t_low = (-1 - o) / d                                # (..., 3) where x, y, z are -1
    t_high = (1 - o) / d                                # (..., 3) where x, y, z are +1
    enters = torch.minimum(t_low, t_high)
    leaves = torch.maximum(t_low, t_high)
    near = enters.amax(-1).clamp(min=0)                 # the last of three slabs entered
    far = leaves.amin(-1)                               # the first of three slabs left
    return near, torch.maximum(near, far)


def place_samples(near, far, n_samples, generator=None):
    """Cuts rays from near to far, (...,) each, into S equal intervals, with a sample in each.

    generator  draws where in its interval each sample lies, as in NeRF, so that over many steps
               training sees all of the volume; None: in the middle
    returns    t (..., S) of the samples, edges (..., S+1) of the intervals
    """
    fractions = torch.linspace(0, 1, n_samples + 1, dtype=near.dtype, device=near.device)
    edges = near[..., None] + (far - near)[..., None] * fractions
    starts = edges[..., :-1]
    lengths = edges.diff(dim=-1)
    if generator is None:
        return starts + lengths * 0.5, edges
    if near.device.type != "cpu":       # so many numbers: a GPU draws its own, seeded by the CPU's
        seed = torch.randint(2**62, (), generator=generator).item()
        generator = torch.Generator(near.device).manual_seed(seed)
    jitter = torch.rand(lengths.shape, generator=generator, dtype=near.dtype, device=near.device)
    return starts + lengths * jitter, edges


def sample_volume(volume, points):
    """Trilinear interpolation: volume (B, C, D, H, W), points (B, ..., 3) -> (B, ..., C)."""
    # Outside is nothing: on a face of the cube values are half of the outer voxel's, half a voxel
    # farther out they are 0.
    # TRAP: grid_sample takes (x, y, z) and indexes the LAST axis with x: hence volumes (z, y, x).
    # Objects that are symmetric would hide a swap.
    grid = points.reshape(len(points), 1, 1, -1, 3)     # grid_sample wants (B, depth, rows, n, 3)
    values = F.grid_sample(volume, grid, align_corners=False)          # (B, C, 1, 1, n)
    values = values[:, :, 0, 0].transpose(1, 2)
    return values.unflatten(1, points.shape[1:-1])


def render(volume, cam2world, intrinsics, size, n_samples, generator=None):
    """Pictures of each object's volume from each of its cameras.

    volume     (B, 4, D, H, W), cam2world (B, V, 4, 4), intrinsics (B, V, 4), size in pixels
    n_samples  on a ray (PAPER: 128)
    generator  of the CPU; for training: random places, see place_samples
    returns    rgb (B, V, 3, size, size) over black, occupancy (B, V, 1, size, size) in [0, 1]
    """
    B = len(cam2world)
    if volume.ndim != 5 or volume.shape[:2] != (B, 4):
        raise ValueError(f"volume must be ({B}, 4, D, H, W), got {tuple(volume.shape)}")
    o, d = camera_rays(cam2world, intrinsics, size)                    # (B, V, size, size, 3)
    near, far = box_interval(o, d)                                     # (B, V, size, size)
    t, edges = place_samples(near, far, n_samples, generator)          # (..., S), (..., S+1)
    points = o[..., None, :] + t[..., None] * d[..., None, :]          # (..., S, 3) o + t d
    values = sample_volume(volume, points)
    density = values[..., 0]
    rgb = values[..., 1:]
    colour, occupancy, _ = integrate(density, rgb, edges)
    return colour.movedim(-1, 2), occupancy[:, :, None]

# ==== Second reading: empty space; points in pictures; depth and normals; what moves ==============


# ---- No time for empty space ---------------------------------------------------------------------
# Nine of ten samples lie where a trained object is not: most of render's work changes nothing.
def not_empty(density, empty=1e-3):
    """Voxels in which a sample may find something: density (B, 1, D, H, W) -> (B, D, H, W) bool.

    empty  the optical thickness up to which a voxel counts as empty

    A sample is interpolated from its own voxel and those next to it: it finds nothing only where
    all of them are empty. TRAP: an object that has vanished could never come back, as what is not
    sampled gets no gradient: all of its voxels count.
    """
    side = density.shape[-1]
    full = largest_around(density[:, 0].detach() * (2 / side) > empty)
    vanished = ~full.any(-1).any(-1).any(-1)            # (B,)
    return full | vanished[:, None, None, None]


def largest_around(volumes):
    """Of each voxel and the 26 around it the largest: (B, D, H, W), of numbers or bool -> same."""
    for axis in (1, 2, 3):                              # F.max_pool3d takes twenty times as long
        side = volumes.shape[axis]
        first, last = volumes.narrow(axis, 0, 1), volumes.narrow(axis, side - 1, 1)
        before = torch.cat([first, volumes.narrow(axis, 0, side - 1)], axis)
        after = torch.cat([volumes.narrow(axis, 1, side - 1), last], axis)
        volumes = torch.maximum(volumes, torch.maximum(before, after))
    return volumes


def look_into(full, o, d, t):
    """Which samples lie in full voxels: full (D, D, D), rays o, d (..., 3), t (..., S) -> as t."""
    D = len(full)
    number = 0                                          # of a voxel, as they stand in memory
    for axis in (2, 1, 0):                              # z, y, x
        start = (o[..., axis, None] + 1) * (D / 2)      # in voxels, from the cube's lower face
        slope = d[..., axis, None] * (D / 2)
        place = start + slope * t
        number = number * D + place.int().clamp(0, D - 1)
    return full.flatten()[number.long()]


def render_skipping(volume, cam2world, intrinsics, size, n_samples, generator=None):
    """As render, but without fog that is thinner than not_empty's bound.

    On a GPU it is render: to ask the device how much there is to do would be to wait for it.
    """
    full = not_empty(volume[:, :1])
    if volume.device.type != "cpu" or full.float().mean() > 0.5:       # fog: nothing to gain
        return render(volume, cam2world, intrinsics, size, n_samples, generator)
    o, d = camera_rays(cam2world, intrinsics, size)                    # (B, V, size, size, 3)
    near, far = box_interval(o, d)
    t, edges = place_samples(near, far, n_samples, generator)          # (..., S), (..., S+1)
    pictures = []
    for b in range(len(volume)):
        seen = look_into(full[b], o[b], d[b], t[b])                    # (V, size, size, S)
        hits = seen.any(-1)                                            # (V, size, size)
        # From here on: the r rays that hit something, and of their samples those.
        seen = seen[hits]                                              # (r, S)
        points = o[b][hits, None] + t[b][hits, :, None] * d[b][hits, None]
        values = points.new_zeros(*seen.shape, 4)
        values[seen] = sample_volume(volume[b:b + 1], points[seen][None])[0]
        colour, occupancy, _ = integrate(values[..., 0], values[..., 1:], edges[b][hits])
        picture = points.new_zeros(*hits.shape, 4)
        picture[hits] = torch.cat([colour, occupancy[:, None]], -1)
        pictures.append(picture)
    pictures = torch.stack(pictures).movedim(-1, 2)                    # (B, V, 4, size, size)
    return pictures[:, :, :3], pictures[:, :, 3:]


# ---- Points in pictures --------------------------------------------------------------------------
def project(points, cam2world, intrinsics):
    """Where points of the world appear in pictures: camera_rays the other way round.

    points (..., K, 3), cam2world (..., 4, 4), intrinsics (..., 4)
    returns uv (..., K, 2) and depth (..., K) along the view axis, world units, > 0 in front
    """
    rotation = cam2world[..., :3, :3]
    position = cam2world[..., None, :3, 3]
    # From camera to world is R, so back is R^T. Points are rows here, and R^T p as a row is p R.
    x, y, z = ((points - position) @ rotation).unbind(-1)
    fx, fy, cx, cy = intrinsics[..., None, :].unbind(-1)
    u = cx + fx * x / -z
    v = cy - fy * y / -z
    return torch.stack([u, v], -1), -z


# ---- Depth and normals ---------------------------------------------------------------------------
def density_gradient(density):
    """Central differences. density (B, 1, D, H, W) -> (B, 3, D, H, W): d/dx, d/dy, d/dz."""
    slopes = []
    for axis in (4, 3, 2):                              # x is the last axis, z the first
        side = density.shape[axis]
        outside = torch.zeros_like(density.narrow(axis, 0, 1))
        padded = torch.cat([outside, density, outside], axis)
        ahead = padded.narrow(axis, 2, side)
        behind = padded.narrow(axis, 0, side)
        difference = ahead - behind                     # over two voxels, of 2 / side each
        slopes.append(difference * (side / 4))
    return torch.cat(slopes, 1)


def uphill(volume, points):
    """Unit vectors to denser fog: volume (B, C, D, H, W), points (B, ..., 3) -> (B, ..., 3)."""
    gradient = density_gradient(volume[:, :1])
    slope = sample_volume(gradient, points)
    return F.normalize(slope, dim=-1)       # else steep places would count more in a ray's mean


def depth_and_normal(t, slope, weights, occupancy):
    """What each ray sees on average, its samples counted by what they add to the picture (Eq. 7).

    t (..., S), slope (..., S, 3) unit vectors uphill, weights (..., S), occupancy (...,)
    returns depth (..., 1) and normal (..., 3), unit vectors; both 0 where a ray meets nothing
    """
    occupancy = occupancy[..., None]
    depth = (weights * t).sum(-1, keepdim=True) / occupancy.clamp(min=1e-3)
    inwards = (weights[..., None] * slope).sum(-2)
    normal = F.normalize(-inwards, dim=-1)              # density grows inwards
    empty = occupancy <= 1e-3
    depth = depth.masked_fill(empty, 0)
    normal = normal.masked_fill(empty, 0)
    return depth, normal


def render_geometry(volume, cam2world, intrinsics, size, n_samples):
    """The lines of render, and with its t, points and weights what is to be seen of the shape.

    returns a dict of (B, V, C, size, size): rgb (C = 3), occupancy (1), and
      depth (1)   mean distance along the ray from the camera, world units, 0 where nothing is hit
      normal (3)  unit vectors in the world that point out of the object, 0 where nothing is hit
    """
    B = len(cam2world)
    if volume.ndim != 5 or volume.shape[:2] != (B, 4):
        raise ValueError(f"volume must be ({B}, 4, D, H, W), got {tuple(volume.shape)}")
    o, d = camera_rays(cam2world, intrinsics, size)
    near, far = box_interval(o, d)
    t, edges = place_samples(near, far, n_samples)
    points = o[..., None, :] + t[..., None] * d[..., None, :]
    values = sample_volume(volume, points)
    density = values[..., 0]
    rgb = values[..., 1:]
    colour, occupancy, weights = integrate(density, rgb, edges)
    slope = uphill(volume, points)
    depth, normal = depth_and_normal(t, slope, weights, occupancy)
    colour = colour.movedim(-1, 2)
    occupancy = occupancy[:, :, None]
    depth = depth.movedim(-1, 2)
    normal = normal.movedim(-1, 2)
    return {"rgb": colour, "occupancy": occupancy, "depth": depth, "normal": normal}


# ---- What moves: inverse skinning (App. B.1, Eq. 8 inverted) -------------------------------------
# A subject is P rigid parts in one canonical volume, at rest. In a frame, part p has moved by R_p,
# t_p. Eq. 8 carries a canonical point x_c there: x_d = sum_p w_p(x_c) (R_p x_c + t_p). A renderer
# has x_d and wants x_c, but w_p is a function of x_c: Eq. 8 would have to be solved for every
# sample. PAPER: an approximation, in the manner of HumanNeRF:
#     x_p = R_p^-1 (x_d - t_p)          x_d carried back as if it were of part p
#     w_p = softmax_p V_lbs,p(x_p)      how much part p claims it, asked AT x_p
#     x_c = sum_p w_p x_p               where density and colour are read
#
# R_p and t_p are within the cameras: seen from a part that has moved, the part stands still and the
# camera has moved the other way. So cam2world is (B, V, P, 4, 4), the camera as each part sees it;
# part p has rays o_p + t d_p of its own, and x_p lies on them where x_d lies on the frame's: at t.
# Shapes: P parts, R = V size size rays of an object, all of its views in a row.


def around_parts(near, far):
    """Distances (B, P, R) of parts' cubes -> (B, R): from the first entered to the last left."""
    missed = near >= far
    near = near.masked_fill(missed, torch.inf).amin(1)
    far = far.masked_fill(missed, 0).amax(1)
    return torch.minimum(near, far), far                # equal where no part's cube is met


def sample_skin(skin, x):
    """V_lbs,p(x_p): skin (B, P, D, H, W), x (B, P, R, S, 3) -> logits (B, P, R, S)."""
    B, P = skin.shape[:2]
    volumes = skin.flatten(0, 1)[:, None]               # parts as if they were objects
    grid = x.flatten(0, 1)[:, None]
    # Outside the cube a part claims what it claims on the face: 0 would be a claim, too, and the
    # largest of all where the other logits are negative.
    logits = F.grid_sample(volumes, grid, align_corners=False, padding_mode="border")
    return logits[:, 0, 0].unflatten(0, (B, P))


def carry_back(skin, o, d, t):
    """Where the samples of a frame lie in the canonical volume: x_c = sum_p w_p x_p.

    skin (B, P, D, H, W) the logits V_lbs, o, d (B, P, R, 3) as each part sees them, t (B, R, S)
    returns x_c (B, R, S, 3) and w (B, P, R, S), which sums to 1 over the parts
    """
    x = o[..., None, :] + t[:, None, ..., None] * d[..., None, :]      # x_p = o_p + t d_p
    if x.shape[1] == 1:
        return x[:, 0], torch.ones_like(x[..., 0])                     # a softmax of one is 1
    logits = sample_skin(skin, x)
    w = logits.softmax(1)
    # sum_p w_p x_p = sum_p w_p o_p + t sum_p w_p d_p spares a second tensor as large as x.
    rays = torch.cat([o, d], -1)
    blended = torch.einsum("bprs,bprc->brsc", w, rays)
    o, d = blended.chunk(2, -1)
    x_c = o + t[..., None] * d
    return x_c, w


def blend_turned(vectors, w, rotation):
    """Vectors of the canonical volume in the camera's axes, turned as their parts are.

    vectors (B, R, S, 3), w (B, P, R, S) as of carry_back, rotation (B, V, P, 3, 3) of cam2world
    returns sum_p w_p R_p^T vector (B, R, S, 3)
    """
    B, R, S, _ = vectors.shape
    _, V, P = rotation.shape[:3]
    vectors = vectors.reshape(B, 1, V, -1, 3)
    rotation = rotation.transpose(1, 2)
    turned = vectors @ rotation                                        # R_p^T v: v is a row here
    w = w.reshape(B, P, V, -1, 1)
    blended = (w * turned).sum(1)
    return blended.reshape(B, R, S, 3)


def place_in_canonical(volume, cam2world, intrinsics, size, n_samples, generator=None):
    """The samples of all rays of a frame, carried back. Arguments as of render_moving.

    returns t (B, R, S), edges (B, R, S+1), points (B, R, S, 3), w (B, P, R, S)
    """
    if cam2world.ndim != 5:
        raise ValueError(f"cam2world must be (B, V, P, 4, 4), got {tuple(cam2world.shape)}")
    B, V, P = cam2world.shape[:3]
    channels = 4 if P == 1 else 4 + P
    if volume.ndim != 5 or len(volume) != B or volume.shape[1] < channels:
        raise ValueError(f"volume must be ({B}, {channels}, D, H, W), got {tuple(volume.shape)}")
    intrinsics = intrinsics[:, :, None].expand(B, V, P, 4)
    o, d = camera_rays(cam2world, intrinsics, size)                    # (B, V, P, size, size, 3)
    o = o.transpose(1, 2).flatten(2, 4)                                # (B, P, R, 3)
    d = d.transpose(1, 2).flatten(2, 4)
    # Where samples lie is bookkeeping: no gradient of the (learned) cameras flows through t.
    near, far = box_interval(o.detach(), d.detach())
    near, far = around_parts(near, far)
    t, edges = place_samples(near, far, n_samples, generator)
    skin = volume[:, 4:4 + P]
    points, w = carry_back(skin, o, d, t)
    return t, edges, points, w


def to_pictures(values, n_views, size):
    """What belongs to rays becomes pixels: (B, R, C) -> (B, V, C, size, size)."""
    values = values.unflatten(1, (n_views, size, size))
    return values.movedim(-1, 2)


def render_moving(volume, cam2world, intrinsics, size, n_samples, generator=None):
    """Pictures of subjects of P moving parts (App. B.1). Like render, but for

    volume     (B, 4 + P, D, H, W): density, colour and P skinning logits, which P = 1 does not need
    cam2world  (B, V, P, 4, 4), the camera as each part sees it
    returns    rgb (B, V, 3, size, size) over black, occupancy (B, V, 1, size, size) in [0, 1]
    """
    t, edges, points, w = place_in_canonical(volume, cam2world, intrinsics, size, n_samples,
                                             generator)
    values = sample_volume(volume[:, :4], points)
    density = values[..., 0]
    rgb = values[..., 1:]
    colour, occupancy, _ = integrate(density, rgb, edges)
    n_views = cam2world.shape[1]
    colour = to_pictures(colour, n_views, size)
    occupancy = to_pictures(occupancy[..., None], n_views, size)
    return colour, occupancy


def render_moving_geometry(volume, cam2world, intrinsics, size, n_samples):
    """Like render_geometry, for the volumes and cameras of render_moving.

    returns a dict of (B, V, C, size, size): rgb, occupancy, depth as there, and
      normal (3)  in the axes of the CAMERA: the world's would be another one for each part
      parts (P)   how much of the occupancy is each part's
    """
    t, edges, points, w = place_in_canonical(volume, cam2world, intrinsics, size, n_samples)
    values = sample_volume(volume[:, :4], points)
    density = values[..., 0]
    rgb = values[..., 1:]
    colour, occupancy, weights = integrate(density, rgb, edges)
    parts = (w * weights[:, None]).sum(-1)
    slope = uphill(volume, points)
    rotation = cam2world[..., :3, :3]
    slope = blend_turned(slope, w, rotation)            # from the canonical to the camera's axes
    depth, normal = depth_and_normal(t, slope, weights, occupancy)
    n_views = cam2world.shape[1]
    colour = to_pictures(colour, n_views, size)
    occupancy = to_pictures(occupancy[..., None], n_views, size)
    depth = to_pictures(depth, n_views, size)
    normal = to_pictures(normal, n_views, size)
    parts = to_pictures(parts.transpose(1, 2), n_views, size)
    return {"rgb": colour, "occupancy": occupancy, "depth": depth, "normal": normal, "parts": parts}


# ---- What moves, from another side ---------------------------------------------------------------
def turn_about(cam2world, azimuth, distance, elevation=0.0):
    """Cameras (..., 4, 4) carried around the point `distance` ahead of them, to their right and up.

    azimuth, elevation in radians. All parts' cameras turn together: the pose stays the same.
    """
    zero = cam2world.new_tensor(0.0)
    front = orbit(zero, zero, distance)
    azimuth = cam2world.new_tensor(azimuth)
    elevation = cam2world.new_tensor(elevation)
    turned = orbit(azimuth, elevation, distance)
    return cam2world @ torch.linalg.inv(front) @ turned
