"""Volumes and cameras go in; pictures of colour and occupancy come out.

Paper: Sec. 3.1, Eq. 6 (colour) and Eq. 7 (occupancy): emission and absorption along the ray of
each pixel. It is NeRF's renderer with the network taken out: colour and density of a sample are
interpolated from a voxel grid, so the volume is what costs, not the ray.

Conventions, for the whole project; each is held by a test in tests/test_render.py
  world        x right, y up, z towards the viewer; the object lives in the cube [-1, 1]^3
  cam2world    (4, 4): its columns are the camera's x (right), y (up), z (BACKWARDS) and position;
               the camera looks along its own -z, as in OpenGL, Blender and NeRF
  intrinsics   (fx, fy, cx, cy) as fractions of the picture's side, so that one camera serves every
               resolution; in pixels of an S x S picture, multiply by S
  pixels       row 0 on top, centres at half integers: pixel (i, j) is at v = (i + 0.5) / S and
               u = (j + 0.5) / S
  volumes      stored (C, D, H, W) = (channel, z, y, x); channel 0 is density, >= 0 per world unit,
               channels 1 to 3 are colour in [0, 1]; voxel (k, j, i) of a volume of side N has its
               centre at x = (2 i + 1) / N - 1 and so on (align_corners=False: the outer voxels end
               exactly on the faces of the cube, whatever N is)
  background   black: a ray that meets nothing brings nothing

Shapes: B objects, V views, R = V size size rays of an object, S samples on a ray, C channels,
        K points.
Simplified: no empty-space skipping, no importance sampling. All S samples of a ray are spread
evenly between the two points where it crosses the cube; for volumes of 32^3 to 128^3 they suffice.
Read next: autodecoder.py
"""
import torch
import torch.nn.functional as F

# ---- Cameras -------------------------------------------------------------------------------------


def orbit(azimuth, elevation, distance):
    """Cameras on a sphere around the origin that look at it, y up.

    azimuth, elevation  radians, floats or (...,); azimuth 0 is in front (+z), pi/2 right (+x)
    distance            world units, float or (...,)
    returns             cam2world (..., 4, 4)
    """
    azimuth = torch.as_tensor(azimuth)
    elevation = torch.as_tensor(elevation, device=azimuth.device)
    azimuth, elevation = torch.broadcast_tensors(azimuth, elevation)
    sin_a = azimuth.sin()
    cos_a = azimuth.cos()
    sin_e = elevation.sin()
    cos_e = elevation.cos()
    zero = torch.zeros_like(sin_a)
    back = torch.stack([sin_a * cos_e, sin_e, cos_a * cos_e], -1)      # from the origin outwards
    right = torch.stack([cos_a, zero, -sin_a], -1)                     # level: cameras do not roll
    up = torch.linalg.cross(back, right)
    distance = torch.as_tensor(distance, dtype=back.dtype, device=back.device)
    position = back * distance[..., None]
    columns = torch.stack([right, up, back, position], -1)             # (..., 3, 4)
    last_row = columns.new_tensor([0.0, 0.0, 0.0, 1.0])
    last_row = last_row.expand(*columns.shape[:-2], 1, 4)
    return torch.cat([columns, last_row], -2)


def pixel_directions(intrinsics, size):
    """What the pixels of a size x size picture look at, one unit in front of the camera.

    intrinsics  (..., 4)
    returns     (..., size, size, 3) in the CAMERA's axes, z = -1: directions, not normalized
    """
    pixels = torch.arange(size, dtype=intrinsics.dtype, device=intrinsics.device)
    centres = (pixels + 0.5) / size
    v, u = torch.meshgrid(centres, centres, indexing="ij")             # (size, size) row, column
    fx, fy, cx, cy = intrinsics[..., None, None, :].unbind(-1)         # (..., 1, 1) each
    x = (u - cx) / fx                                                  # (..., size, size)
    y = -(v - cy) / fy                                                 # minus: rows count downwards
    z = -torch.ones_like(x)
    return torch.stack([x, y, z], -1)


def camera_rays(cam2world, intrinsics, size):
    """The ray o + t d through the centre of every pixel of a size x size picture.

    cam2world  (..., 4, 4)     intrinsics (..., 4)
    returns    o and d, (..., size, size, 3) each, in the world: origins, which are the camera's
               position for all of its pixels, and unit directions, so that t is a distance
    """
    if cam2world.shape[-2:] != (4, 4):
        raise ValueError(f"cam2world must end in (4, 4), got {tuple(cam2world.shape)}")
    expected = tuple(cam2world.shape[:-2]) + (4,)
    if intrinsics.shape != expected:
        raise ValueError(f"intrinsics must be {expected} (fx, fy, cx, cy), "
                         f"got {tuple(intrinsics.shape)}")
    rotation = cam2world[..., :3, :3]
    position = cam2world[..., :3, 3]
    d = pixel_directions(intrinsics, size)                             # in the camera's axes
    d = torch.einsum("...ij,...hwj->...hwi", rotation, d)              # in the world's
    o = position[..., None, None, :].expand_as(d)
    return o, F.normalize(d, dim=-1)


def project(points, cam2world, intrinsics):
    """Where points of the world appear in pictures: camera_rays the other way round.

    points   (..., K, 3)     cam2world (..., 4, 4)     intrinsics (..., 4)
    returns  uv (..., K, 2), fractions of the side (column, row), and depth (..., K) along the view
             axis, world units, positive in front of the camera
    """
    rotation = cam2world[..., :3, :3]
    position = cam2world[..., None, :3, 3]
    # Points are rows, and rows @ R are the columns R^T p: from the world back to the camera.
    in_camera = (points - position) @ rotation
    x, y, z = in_camera.unbind(-1)                                     # (..., K), z < 0 in front
    fx, fy, cx, cy = intrinsics[..., None, :].unbind(-1)               # (..., 1)
    u = cx - fx * x / z
    v = cy + fy * y / z
    return torch.stack([u, v], -1), -z


# ---- Along one ray: colour (Eq. 6) and occupancy (Eq. 7) -----------------------------------------


def integrate(density, rgb, edges):
    """Colour (Eq. 6) and occupancy (Eq. 7) of rays through fog, constant within each interval.

    density  (..., S)    >= 0, per world unit     rgb (..., S, 3) in [0, 1]
    edges    (..., S+1)  increasing distances that bound the S intervals, world units
    returns  colour (..., 3) over black, occupancy (...,) in [0, 1], and weights (..., S), by which
             each interval counts in both
    """
    if rgb.shape != density.shape + (3,):
        raise ValueError(f"rgb must be {tuple(density.shape) + (3,)}, got {tuple(rgb.shape)}")
    if edges.shape != density.shape[:-1] + (density.shape[-1] + 1,):
        raise ValueError(f"edges must have one entry more than density {tuple(density.shape)} "
                         f"along the ray, got {tuple(edges.shape)}")
    # TRAP: the last interval ends where the volume ends. The 1e10 of the first NeRF code turns any
    # trace of fog in it into a wall: an occupancy of 0.095 into 1.
    tau = density * edges.diff(dim=-1)                  # tau_i = density_i dt_i, optical thickness
    # TRAP: interval i is dimmed by those before it and not by itself: shift before exp.
    tau_before = F.pad(tau.cumsum(-1)[..., :-1], (1, 0))               # (..., S), the first is 0
    T = torch.exp(-tau_before)                          # T_i = exp(-sum_{j < i} tau_j), light left
    stopped = -torch.expm1(-tau)                        # 1 - exp(-tau_i), without rounding to 0
    weights = T * stopped                               # w_i = T_i (1 - exp(-tau_i))
    colour = (weights[..., None] * rgb).sum(-2)         # C = sum_i w_i rgb_i    (Eq. 6)
    occupancy = weights.sum(-1)                         # O = sum_i w_i          (Eq. 7)
    return colour, occupancy, weights


# ---- Where rays and volume meet ------------------------------------------------------------------


def box_interval(o, d):
    """Where rays o + t d, (..., 3) each, enter and leave the cube [-1, 1]^3.

    The cube is three slabs, -1 <= x <= 1 and so on; a ray is inside while it is in all three.
    returns near, far (...,), distances >= 0; equal, an empty interval, for a ray that misses
    """
    # A ray that starts on a face and runs along it would give 0 / 0: no component is left at 0.
    d = torch.where(d.abs() < 1e-9, torch.full_like(d, 1e-9), d)
    t_low = (-1 - o) / d                                # (..., 3) where x, y, z are -1
    t_high = (1 - o) / d                                # (..., 3) where x, y, z are +1
    enters = torch.minimum(t_low, t_high)
    leaves = torch.maximum(t_low, t_high)
    near = enters.amax(-1).clamp(min=0)                 # the last of three slabs entered
    far = leaves.amin(-1)                               # the first of three slabs left
    return near, torch.maximum(near, far)


def place_samples(near, far, n_samples, generator=None):
    """Cuts rays from near to far, (B, R) each, into S equal intervals, with a sample in each.

    generator  draws where in its interval each sample lies (OURS), so that over many steps training
               sees all of the volume; None: in the middle
    returns    t (B, R, S) of the samples, edges (B, R, S+1) of the intervals
    """
    fractions = torch.linspace(0, 1, n_samples + 1, dtype=near.dtype, device=near.device)
    span = far - near
    edges = near[..., None] + span[..., None] * fractions              # (B, R, S+1)
    starts = edges[..., :-1]
    lengths = edges.diff(dim=-1)
    if generator is None:
        return starts + lengths * 0.5, edges
    if near.device.type != "cpu":
        # A GPU draws these millions of numbers itself, from a seed that the CPU's generator draws.
        seed = torch.randint(2**62, (), generator=generator).item()
        generator = torch.Generator(near.device).manual_seed(seed)
    jitter = torch.rand(lengths.shape, generator=generator, dtype=near.dtype, device=near.device)
    return starts + lengths * jitter, edges


def sample_volume(volume, points):
    """Trilinear interpolation: volume (B, C, D, H, W), points (B, ..., 3) -> (B, ..., C).

    Around the volume there is nothing: from the centres of the outer voxels on values fade, to half
    on a face of the cube and to 0 half a voxel outside.
    """
    # TRAP: grid_sample takes (x, y, z) and indexes the LAST axis with x. So volumes are stored
    # (z, y, x). Objects that are symmetric would hide a swap.
    grid = points.reshape(len(points), 1, 1, -1, 3)                    # (B, 1, 1, M, 3)
    values = F.grid_sample(volume, grid, align_corners=False)          # (B, C, 1, 1, M)
    values = values[:, :, 0, 0].transpose(1, 2)                        # (B, M, C)
    return values.unflatten(1, points.shape[1:-1])


# ---- A whole picture -----------------------------------------------------------------------------


def check_volume(volume, cam2world):
    if volume.ndim != 5 or volume.shape[1] != 4:
        raise ValueError(f"volume must be (B, 4, D, H, W), got {tuple(volume.shape)}")
    if len(volume) != len(cam2world):
        raise ValueError(f"{len(volume)} volumes but cameras for {len(cam2world)} objects")


def to_pictures(values, n_views, size):
    """What belongs to rays becomes pixels: (B, R, C) -> (B, V, C, size, size)."""
    values = values.unflatten(1, (n_views, size, size))
    return values.movedim(-1, 2)


def render(volume, cam2world, intrinsics, size, n_samples, generator=None):
    """Pictures of each object's volume from each of its cameras.

    volume     (B, 4, D, H, W)    cam2world (B, V, 4, 4)    intrinsics (B, V, 4)
    size       side of the pictures in pixels      n_samples on a ray (PAPER: 128)
    generator  of the CPU: jitters the samples, for training; None: they stay in the middle
    returns    rgb (B, V, 3, size, size) over black, occupancy (B, V, 1, size, size) in [0, 1]
    """
    check_volume(volume, cam2world)
    o, d = camera_rays(cam2world, intrinsics, size)                    # (B, V, size, size, 3)
    o = o.flatten(1, 3)                                                # (B, R, 3)
    d = d.flatten(1, 3)
    near, far = box_interval(o, d)                                     # (B, R)
    t, edges = place_samples(near, far, n_samples, generator)          # (B, R, S), (B, R, S+1)
    points = o[:, :, None] + t[..., None] * d[:, :, None]              # (B, R, S, 3) o + t d
    values = sample_volume(volume, points)                             # (B, R, S, 4)
    density = values[..., 0]
    rgb = values[..., 1:]
    colour, occupancy, _ = integrate(density, rgb, edges)              # (B, R, 3), (B, R)
    n_views = cam2world.shape[1]
    colour = to_pictures(colour, n_views, size)
    occupancy = to_pictures(occupancy[..., None], n_views, size)
    return colour, occupancy


# ==== Second reading: depth and normals; what moves ===============================================


# ---- Depth and normals ---------------------------------------------------------------------------


def density_gradient(density):
    """Central differences. density (B, 1, D, H, W) -> (B, 3, D, H, W): d/dx, d/dy, d/dz."""
    slopes = []
    for axis in (4, 3, 2):                              # x is the last axis, z the first
        side = density.shape[axis]
        nothing = torch.zeros_like(density.narrow(axis, 0, 1))         # what is outside
        padded = torch.cat([nothing, density, nothing], axis)
        ahead = padded.narrow(axis, 2, side)
        behind = padded.narrow(axis, 0, side)
        slopes.append((ahead - behind) * (side / 4))    # they lie two voxels of 2 / side apart
    return torch.cat(slopes, 1)


def uphill(volume, points):
    """Unit vectors towards denser fog: volume (B, C, D, H, W), points (B, R, S, 3) -> (B, R, S, 3).

    Of length 1 each, so that a steep place counts no more than a gentle one in a ray's mean.
    """
    gradient = density_gradient(volume[:, :1])
    return F.normalize(sample_volume(gradient, points), dim=-1)


def depth_and_normal(t, slope, weights, occupancy):
    """What each ray sees on average, its samples counted by what they add to the picture (Eq. 7).

    t (B, R, S), slope (B, R, S, 3) unit vectors uphill, weights (B, R, S), occupancy (B, R)
    returns depth (B, R, 1) and normal (B, R, 3), unit vectors; both 0 where a ray meets nothing
    """
    occupancy = occupancy[..., None]                                   # (B, R, 1)
    depth = (weights * t).sum(-1, keepdim=True) / occupancy.clamp(min=1e-3)
    # Density grows into the object: the outside is downhill.
    normal = F.normalize(-(weights[..., None] * slope).sum(-2), dim=-1)
    empty = occupancy <= 1e-3
    return depth.masked_fill(empty, 0), normal.masked_fill(empty, 0)


def render_geometry(volume, cam2world, intrinsics, size, n_samples):
    """Like render, and what is to be seen of the shape. Same arguments.

    returns a dict of (B, V, C, size, size): rgb (C = 3), occupancy (1), and
      depth (1)   mean distance along the ray from the camera, world units, 0 where nothing is hit
      normal (3)  unit vectors in the world that point out of the object, 0 where nothing is hit
    """
    # The lines of render; here t, points and weights are needed, too.
    check_volume(volume, cam2world)
    o, d = camera_rays(cam2world, intrinsics, size)
    o = o.flatten(1, 3)
    d = d.flatten(1, 3)
    near, far = box_interval(o, d)
    t, edges = place_samples(near, far, n_samples)
    points = o[:, :, None] + t[..., None] * d[:, :, None]
    values = sample_volume(volume, points)
    density = values[..., 0]
    rgb = values[..., 1:]
    colour, occupancy, weights = integrate(density, rgb, edges)
    slope = uphill(volume, points)
    depth, normal = depth_and_normal(t, slope, weights, occupancy)
    n_views = cam2world.shape[1]
    return {
        "rgb": to_pictures(colour, n_views, size),
        "occupancy": to_pictures(occupancy[..., None], n_views, size),
        "depth": to_pictures(depth, n_views, size),
        "normal": to_pictures(normal, n_views, size),
    }


# ---- What moves: inverse skinning (App. B.1, Eq. 8 inverted) -------------------------------------
# A subject is P rigid parts (P: parts, in the shapes below) in one canonical volume, at rest. In a
# frame, part p has moved by R_p, t_p. Eq. 8 carries a canonical point x_c into the frame:
#
#     x_d = sum_p w_p(x_c) (R_p x_c + t_p)
#
# A renderer has its samples x_d in the frame and wants x_c, but w_p is a function of x_c: Eq. 8
# would have to be solved for every sample. PAPER: an approximation, in the manner of HumanNeRF:
#
#     x_p = R_p^-1 (x_d - t_p)          x_d carried back as if it were of part p
#     w_p = softmax_p V_lbs,p(x_p)      how much part p claims it, asked AT x_p
#     x_c = sum_p w_p x_p               where density and colour are read
#
# R_p and t_p are within the cameras: seen from a part that has moved, the part stands still and the
# camera has moved the other way. So cam2world is (B, V, P, 4, 4), the camera as each part sees it;
# part p has rays o_p + t d_p of its own, and x_p lies on them where x_d lies on the frame's: at t.


def around_parts(near, far):
    """From where a ray enters the first part's cube to where it leaves the last one's.

    near, far (B, P, R) of each part's own ray -> (B, R); equal where no part's cube is met
    """
    missed = near >= far
    near = near.masked_fill(missed, torch.inf).amin(1)
    far = far.masked_fill(missed, 0).amax(1)
    return torch.minimum(near, far), far


def sample_skin(skin, x):
    """V_lbs,p(x_p), how much part p claims each sample, read where p sees the sample.

    skin (B, P, D, H, W), x (B, P, R, S, 3) -> logits (B, P, R, S)
    """
    B, P = skin.shape[:2]
    volumes = skin.flatten(0, 1)[:, None]                              # (B P, 1, D, H, W)
    grid = x.flatten(0, 1)[:, None]                                    # (B P, 1, R, S, 3)
    # border: outside the cube a part claims what it claims on the face. Zeros would be a claim,
    # too, and the largest of all where the other logits are negative.
    logits = F.grid_sample(volumes, grid, align_corners=False, padding_mode="border")
    return logits[:, 0, 0].unflatten(0, (B, P))


def carry_back(skin, o, d, t):
    """Where the samples of a frame lie in the canonical volume: x_c = sum_p w_p x_p.

    skin     (B, P, D, H, W) logits, V_lbs in the paper; not read if P = 1
    o, d     (B, P, R, 3) the rays as each part sees them
    t        (B, R, S) distances of the samples along them
    returns  x_c (B, R, S, 3) and w (B, P, R, S), which sums to 1 over the parts
    """
    x = o[..., None, :] + t[:, None, ..., None] * d[..., None, :]      # x_p = o_p + t d_p
    if x.shape[1] == 1:
        return x[:, 0], torch.ones_like(x[..., 0])                     # a softmax of one is 1
    logits = sample_skin(skin, x)                                      # V_lbs,p(x_p)
    w = logits.softmax(1)                                              # w_p, (B, P, R, S)
    # sum_p w_p x_p = sum_p w_p o_p + t sum_p w_p d_p: a small product for each ray, where w x would
    # be a second tensor as large as x.
    rays = torch.cat([o, d], -1)                                       # (B, P, R, 6)
    blended = torch.einsum("bprs,bprc->brsc", w, rays)                 # sum_p w_p (o_p, d_p)
    o, d = blended.chunk(2, -1)                                        # (B, R, S, 3) each
    return o + t[..., None] * d, w                                     # sum_p w_p x_p


def blend_turned(vectors, w, rotation):
    """Vectors of the canonical volume in the camera's axes, turned as their parts are.

    vectors (B, R, S, 3), w (B, P, R, S) as of carry_back, rotation (B, V, P, 3, 3) of cam2world
    returns sum_p w_p R_p^T vector (B, R, S, 3)
    """
    B, R, S, _ = vectors.shape
    _, V, P = rotation.shape[:3]
    vectors = vectors.reshape(B, 1, V, -1, 3)                          # a view's samples in a row
    rotation = rotation.transpose(1, 2)                                # (B, P, V, 3, 3)
    turned = vectors @ rotation                                        # R_p^T v: v is a row here
    w = w.reshape(B, P, V, -1, 1)
    blended = (w * turned).sum(1)                                      # (B, V, size size S, 3)
    return blended.reshape(B, R, S, 3)


def place_in_canonical(volume, cam2world, intrinsics, size, n_samples, generator=None):
    """The samples of all rays of a frame, carried back. Arguments as of render_moving.

    returns t (B, R, S), edges (B, R, S+1), points (B, R, S, 3), w (B, P, R, S)
    """
    if cam2world.ndim != 5:
        raise ValueError(f"cam2world must be (B, V, P, 4, 4), got {tuple(cam2world.shape)}")
    B, V, P = cam2world.shape[:3]
    channels = 4 if P == 1 else 4 + P
    if volume.ndim != 5 or volume.shape[1] < channels:
        raise ValueError(f"volume must be (B, {channels}, D, H, W), got {tuple(volume.shape)}")
    if len(volume) != B:
        raise ValueError(f"{len(volume)} volumes but cameras for {B} objects")
    intrinsics = intrinsics[:, :, None].expand(B, V, P, 4)             # one lens for all parts
    o, d = camera_rays(cam2world, intrinsics, size)                    # (B, V, P, size, size, 3)
    o = o.transpose(1, 2).flatten(2, 4)                                # (B, P, R, 3)
    d = d.transpose(1, 2).flatten(2, 4)
    # Where samples lie is bookkeeping: no gradient of the (learned) cameras flows through t.
    near, far = box_interval(o.detach(), d.detach())                   # (B, P, R)
    near, far = around_parts(near, far)                                # (B, R)
    t, edges = place_samples(near, far, n_samples, generator)
    skin = volume[:, 4:4 + P]
    points, w = carry_back(skin, o, d, t)
    return t, edges, points, w


def render_moving(volume, cam2world, intrinsics, size, n_samples, generator=None):
    """Pictures of subjects of P moving parts (App. B.1). Like render, but for

    volume     (B, 4 + P, D, H, W): density, colour and P skinning logits, which P = 1 does not need
    cam2world  (B, V, P, 4, 4), the camera as each part sees it
    returns    rgb (B, V, 3, size, size) over black, occupancy (B, V, 1, size, size) in [0, 1]
    """
    t, edges, points, w = place_in_canonical(volume, cam2world, intrinsics, size, n_samples,
                                             generator)
    values = sample_volume(volume[:, :4], points)                      # (B, R, S, 4)
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
    parts = (w * weights[:, None]).sum(-1)                             # (B, P, R)
    slope = uphill(volume, points)                                     # in the canonical volume
    slope = blend_turned(slope, w, cam2world[..., :3, :3])             # in the camera's axes
    depth, normal = depth_and_normal(t, slope, weights, occupancy)
    n_views = cam2world.shape[1]
    return {
        "rgb": to_pictures(colour, n_views, size),
        "occupancy": to_pictures(occupancy[..., None], n_views, size),
        "depth": to_pictures(depth, n_views, size),
        "normal": to_pictures(normal, n_views, size),
        "parts": to_pictures(parts.transpose(1, 2), n_views, size),
    }


# ---- What moves, from another side ---------------------------------------------------------------


def turn_about(cam2world, azimuth, distance, elevation=0.0):
    """Cameras (..., 4, 4) carried around the point `distance` ahead of them, to their right and up.

    azimuth, elevation in radians. For the cameras of a subject's parts: all turn together, so the
    subject is seen, in the same pose, from another side.
    """
    zero = cam2world.new_tensor(0.0)
    front = orbit(zero, zero, distance)
    turned = orbit(cam2world.new_tensor(azimuth), cam2world.new_tensor(elevation), distance)
    return cam2world @ torch.linalg.inv(front) @ turned
