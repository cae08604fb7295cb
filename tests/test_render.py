"""render.py: Beer-Lambert fog, lopsided volumes and every convention against closed forms."""
import math

import pytest
import torch

import render

F64 = torch.float64
COLOUR = torch.tensor([0.2, 0.5, 0.9], dtype=F64)


def voxel_centres(D, H, W):
    """x, y, z of the voxel centres, (D, H, W) each, straight from the stated convention."""
    centres = [(2 * torch.arange(n, dtype=F64) + 1) / n - 1 for n in (D, H, W)]
    z, y, x = torch.meshgrid(*centres, indexing="ij")
    return x, y, z


def as_volume(density, colour=COLOUR):
    colours = colour.view(3, 1, 1, 1).expand(3, *density.shape)
    return torch.cat([density[None], colours])[None]


def cameras(*views, distance=4.0, lens=(1.3, 1.3, 0.5, 0.5)):
    """(azimuth, elevation) pairs -> cam2world (1, V, 4, 4), intrinsics (1, V, 4), float64."""
    azimuth, elevation = torch.tensor(views, dtype=F64).unbind(1)
    cam2world = render.orbit(azimuth, elevation, distance)[None]
    intrinsics = torch.tensor(lens, dtype=F64).expand(1, len(views), 4)
    return cam2world, intrinsics


def random_volume(parts=0, side=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    volume = torch.rand(1, 4 + parts, side, side, side, generator=g, dtype=F64)
    return torch.cat([2 * volume[:, :1], volume[:, 1:4], 4 * volume[:, 4:]], 1)


def moved(camera, axis, angle, shift):
    """The camera as a part sees it that was turned about a world axis, then shifted: M^-1 C."""
    M = torch.eye(4, dtype=F64)
    i, j = [k for k in range(3) if k != axis]
    M[i, i] = M[j, j] = math.cos(angle)
    M[i, j], M[j, i] = -math.sin(angle), math.sin(angle)
    M[:3, 3] = torch.tensor(shift, dtype=F64)
    return torch.linalg.inv(M) @ camera


# ---- Eq. 6 and 7 along one ray ------------------------------------------------------------------
def test_homogeneous_slab_obeys_beer_lambert_however_it_is_cut():
    cuts = torch.rand(5, 20, dtype=F64, generator=torch.Generator().manual_seed(0)).sort(1).values
    ends = torch.tensor([[0.0, 1.0]], dtype=F64).expand(5, 2)
    edges = torch.cat([ends[:, :1], cuts, ends[:, 1:]], 1) * 1.5 + 2
    density = torch.full((5, 21), 3.0, dtype=F64)
    rgb, occupancy, _ = render.integrate(density, COLOUR.expand(5, 21, 3), edges)
    expected = 1 - math.exp(-3.0 * 1.5)
    torch.testing.assert_close(occupancy, torch.full_like(occupancy, expected), rtol=1e-13, atol=0)
    torch.testing.assert_close(rgb, (expected * COLOUR).expand(5, 3), rtol=1e-13, atol=0)


def test_sphere_of_fog_obeys_beer_lambert_at_every_impact_parameter():
    b = torch.linspace(0, 1.2, 25, dtype=F64)
    half = (1 - b**2).clamp(min=0).sqrt()
    edges = 3 + half[:, None] * torch.linspace(-1, 1, 41, dtype=F64)
    density = torch.full((25, 40), 2.0, dtype=F64)
    _, occupancy, _ = render.integrate(density, torch.ones(25, 40, 3, dtype=F64), edges)
    torch.testing.assert_close(occupancy, -torch.expm1(-2.0 * 2 * half), rtol=1e-12, atol=1e-15)


def test_the_layer_in_front_dims_the_one_behind_and_not_itself():
    density = torch.tensor([[0.7, 0.0, 1.1]], dtype=F64)
    rgb = torch.tensor([[[1, 0, 0], [0, 0, 1], [0, 1, 0]]], dtype=F64)
    edges = torch.tensor([[1.0, 2, 5, 7]], dtype=F64)
    colour, occupancy, weights = render.integrate(density, rgb, edges)
    front = 1 - math.exp(-0.7)
    behind = math.exp(-0.7) * (1 - math.exp(-2.2))
    assert colour[0].tolist() == pytest.approx([front, behind, 0], rel=1e-14)
    assert weights[0].tolist() == pytest.approx([front, 0, behind], rel=1e-14)
    assert occupancy.item() == pytest.approx(front + behind, rel=1e-14)


def test_the_last_interval_is_as_long_as_the_others():
    edges = torch.linspace(0, 1, 11, dtype=F64)[None]
    thin = torch.full((1, 10), 0.1, dtype=F64)
    _, occupancy, _ = render.integrate(thin, torch.ones(1, 10, 3, dtype=F64), edges)
    assert occupancy.item() == pytest.approx(1 - math.exp(-0.1), rel=1e-14)          # 0.095, not 1


@pytest.mark.parametrize("dtype, rel", [(F64, 1e-11), (torch.float32, 1e-6)])
def test_the_thinnest_fog_is_not_rounded_to_nothing(dtype, rel):
    edges = torch.tensor([[0.0, 1.0]], dtype=dtype)
    thin = torch.tensor([[1e-12]], dtype=dtype)
    _, occupancy, weights = render.integrate(thin, torch.ones(1, 1, 3, dtype=dtype), edges)
    assert weights.item() == pytest.approx(1e-12, rel=rel, abs=0)
    assert occupancy.item() == pytest.approx(1e-12, rel=rel, abs=0)


# ---- Cameras ------------------------------------------------------------------------------------
def test_orbit_looks_at_the_origin_with_y_up_and_azimuth_from_front_to_right():
    for azimuth, elevation, place in [(0, 0, (0, 0, 3)), (math.pi / 2, 0, (3, 0, 0)),
                                      (math.pi, 0, (0, 0, -3)),
                                      (0, math.pi / 6, (0, 1.5, 6.75**0.5))]:
        cam2world, lens = cameras((azimuth, elevation), distance=3.0)
        assert cam2world[0, 0, :3, 3].tolist() == pytest.approx(place, abs=1e-6)
    cam2world, lens = cameras((0, 0), (1.1, 0.4), (-2.5, -0.9), distance=3.0)
    R = cam2world[..., :3, :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3, dtype=F64).expand_as(R))
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(1, 3, dtype=F64))
    points = torch.tensor([[0, 0, 0], [0, 0.5, 0], [0.5, 0, 0]], dtype=F64).expand(1, 3, 3, 3)
    uv, depth = render.project(points, cam2world, lens)
    torch.testing.assert_close(uv[..., 0, :], torch.full((1, 3, 2), 0.5, dtype=F64))
    torch.testing.assert_close(depth[..., 0], torch.full((1, 3), 3.0, dtype=F64))
    assert (uv[..., 1, 1] < 0.4).all()                                 # +y is higher up
    torch.testing.assert_close(uv[..., 1, 0], torch.full((1, 3), 0.5, dtype=F64))    # no roll
    assert uv[0, 0, 2].tolist() == pytest.approx([0.5 + 1.3 * 0.5 / 3, 0.5])         # +x is right


def test_row_0_is_on_top_and_pixel_centres_are_at_half_integers():
    cam2world, lens = cameras((0, 0), lens=(2.0, 1.0, 0.5, 0.25))
    o, d = render.camera_rays(cam2world, lens, 4)
    expected = torch.tensor([(0.125 - 0.5) / 2, -(0.125 - 0.25) / 1, -1], dtype=F64)
    torch.testing.assert_close(d[0, 0, 0, 0], expected / expected.norm())
    assert o.shape == d.shape == (1, 1, 4, 4, 3)
    position = torch.tensor([0, 0, 4.0], dtype=F64)
    torch.testing.assert_close(o, position.expand_as(o))               # of all pixels
    assert d[0, 0, 0, 3, 0] > 0 > d[0, 0, 3, 0, 1]                     # columns go right, rows down


def test_floats_tensors_and_a_shared_elevation_give_the_same_orbit():
    azimuths = torch.tensor([[0.4, 1.0], [2.0, 3.0]])
    cam2world = render.orbit(azimuths, 0.2, 3.0)
    assert cam2world.shape == (2, 2, 4, 4)
    torch.testing.assert_close(cam2world[0, 0], render.orbit(0.4, 0.2, 3.0))
    distances = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    position = render.orbit(azimuths, 0.2, distances)[..., :3, 3]
    torch.testing.assert_close(position.norm(dim=-1), distances)


def test_pixel_directions_are_the_stated_formula_to_the_bit():
    random = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    intrinsics = torch.tensor([1.3, 1.2, 0.45, 0.55]) + 0.1 * random
    directions = render.pixel_directions(intrinsics, 6)
    u = (torch.arange(6) + 0.5) / 6
    for camera in range(3):
        fx, fy, cx, cy = intrinsics[camera]
        for row in range(6):
            for column in range(6):
                x, y, z = directions[camera, row, column]
                assert x == (u[column] - cx) / fx
                assert y == -(u[row] - cy) / fy
                assert z == -1


def test_camera_rays_are_the_pixel_directions_turned_into_the_world():
    cam2world, lens = cameras((0.7, 0.3), (-2.0, -0.6), lens=(1.5, 1.2, 0.45, 0.6))
    _, d = render.camera_rays(cam2world, lens, 5)
    torch.testing.assert_close(d.norm(dim=-1), torch.ones(1, 2, 5, 5, dtype=F64))
    in_camera = render.pixel_directions(lens, 5)
    for view in range(2):
        back = d[0, view] @ cam2world[0, view, :3, :3]
        torch.testing.assert_close(back / -back[..., 2:], in_camera[0, view])


def test_project_inverts_camera_rays():
    cam2world, lens = cameras((0.7, 0.3), (-2.0, -0.6), lens=(1.5, 1.2, 0.45, 0.6))
    o, d = render.camera_rays(cam2world, lens, 5)
    t = torch.rand(1, 2, 5, 5, 1, dtype=F64, generator=torch.Generator().manual_seed(0)) * 5 + 1
    uv, depth = render.project((o + t * d).flatten(2, 3), cam2world, lens)
    centre = (torch.arange(5, dtype=F64) + 0.5) / 5
    v, u = torch.meshgrid(centre, centre, indexing="ij")
    torch.testing.assert_close(uv, torch.stack([u, v], -1).flatten(0, 1).expand(1, 2, 25, 2))
    along_axis = (t * d).flatten(2, 3) @ -cam2world[..., :3, 2:3]      # the view axis is -z
    torch.testing.assert_close(depth, along_axis[..., 0])


@pytest.mark.parametrize("o, d, near, far", [
    ((0, 0, 3), (0, 0, -1), 2, 4),                                     # hit
    ((0.2, -0.3, 0.5), (0, 0, -1), 0, 1.5),                            # from inside
    ((-2, -2, -2), (1 / 3**0.5,) * 3, 3**0.5, 3 * 3**0.5),             # corner to corner
    ((0.5, 0, 2), (-0.6, 0, -0.8), 1.25, 2.5),                         # in at z = 1, out at x = -1
    ((0, 1.5, 3), (0, 0, -1), 0, 0),                                   # parallel, outside the slab
    ((2, 0, 3), (0.6, 0, -0.8), 0, 0),                                 # passes by
    ((0, 0, 3), (0, 0, 1), 0, 0)])                                     # the cube is behind
def test_box_interval_of_hit_miss_inside_and_parallel(o, d, near, far):
    a, b = render.box_interval(torch.tensor(o, dtype=F64), torch.tensor(d, dtype=F64))
    assert b - a == pytest.approx(far - near, abs=1e-8) and a >= 0
    assert far == 0 or a.item() == pytest.approx(near, abs=1e-8)


# ---- Voxels -------------------------------------------------------------------------------------
def test_a_linear_volume_is_reproduced_exactly_between_voxel_centres():
    x, y, z = voxel_centres(6, 8, 10)
    volume = torch.stack([x, y, z, 1 + 2 * x - 3 * y + 4 * z])[None]
    inside = torch.tensor([1 - 1 / 10, 1 - 1 / 8, 1 - 1 / 6], dtype=F64)
    random = torch.rand(1, 50, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    p = (2 * random - 1) * inside
    px, py, pz = p.unbind(-1)
    expected = torch.stack([px, py, pz, 1 + 2 * px - 3 * py + 4 * pz], -1)
    torch.testing.assert_close(render.sample_volume(volume, p), expected, rtol=1e-12, atol=1e-12)
    # Points may have any shape: (B, R, S, 3) here.
    folded = render.sample_volume(volume, p.unflatten(1, (5, 10)))
    torch.testing.assert_close(folded, expected.unflatten(1, (5, 10)), rtol=1e-12, atol=1e-12)


def test_the_volume_is_one_half_on_its_faces_and_zero_half_a_voxel_outside():
    p = torch.tensor([[[1.0, 0, 0], [0, -1, 0], [0, 0, 1], [1.126, 0, 0], [0, 0, -1.26]]],
                     dtype=F64)
    ones = torch.ones(1, 1, 4, 6, 8, dtype=F64)
    out = render.sample_volume(ones, p)[0, :, 0]
    assert out.tolist() == pytest.approx([0.5, 0.5, 0.5, 0, 0], abs=1e-12)


def test_density_gradient_of_a_linear_field_is_exact_in_world_units():
    x, y, z = voxel_centres(6, 8, 10)
    density = 7 + 2 * x - 3 * y + 5 * z
    slope = render.density_gradient(density[None, None])
    inner = slope[..., 1:-1, 1:-1, 1:-1]
    expected = torch.tensor([2.0, -3, 5], dtype=F64).view(1, 3, 1, 1, 1).expand_as(inner)
    torch.testing.assert_close(inner, expected, rtol=1e-12, atol=1e-12)


def test_uphill_is_one_long_however_steep_it_is():
    x, y, z = voxel_centres(8, 8, 8)
    n = torch.tensor([2.0, -3, 6], dtype=F64) / 7
    points = torch.tensor([[[[0.1, 0.2, -0.3], [0, 0, 0]]]], dtype=F64)
    for steepness in (0.01, 100):
        ramp = as_volume(steepness * (2 + n[0] * x + n[1] * y + n[2] * z))
        slope = render.uphill(ramp, points)
        torch.testing.assert_close(slope, n.expand(1, 1, 2, 3), rtol=1e-12, atol=1e-12)


# ---- Whole pictures -----------------------------------------------------------------------------
@pytest.mark.parametrize("view, n", [((0, 0), 4), ((0, math.pi / 2), 6), ((math.pi / 2, 0), 8)])
def test_rendered_slab_obeys_beer_lambert_along_z_y_and_x(view, n):
    """Half a voxel at each face fades from c / 2 to c: a path of 2 - 1 / (2 n) at full c."""
    slab = as_volume(torch.full((4, 6, 8), 0.8, dtype=F64))
    _, occupancy = render.render(slab, *cameras(view), 1, 96)
    assert occupancy.item() == pytest.approx(1 - math.exp(-0.8 * (2 - 0.5 / n)), rel=1e-12)


def test_rendered_ball_obeys_beer_lambert_over_its_chords():
    x, y, z = voxel_centres(48, 48, 48)
    centre, R, c = torch.tensor([0.15, -0.1, 0.2], dtype=F64), 0.7, 1.5
    r = torch.stack([x, y, z], -1).sub(centre).norm(dim=-1)
    ball = c * ((R - r) * 24 + 0.5).clamp(0, 1)                        # edges cover part of a voxel
    cam2world, lens = cameras((0.5, 0.3), (-2.2, -0.4))
    rgb, occupancy = render.render(as_volume(ball), cam2world, lens, 24, 128)
    o, d = render.camera_rays(cam2world, lens, 24)
    to = centre - o
    b2 = (to**2).sum(-1) - (to * d).sum(-1)**2
    expected = 1 - torch.exp(-c * 2 * (R**2 - b2).clamp(min=0).sqrt())
    off = (occupancy[:, :, 0] - expected).abs()
    inner = b2 < (0.85 * R)**2                                         # the rim is steep
    assert off[inner].max() < 0.015 and off.mean() < 0.005 and inner.sum() > 80
    torch.testing.assert_close(rgb, occupancy * COLOUR.view(3, 1, 1))


LOPSIDED = torch.tensor([0.5, -0.3, 0.15], dtype=F64)


@pytest.fixture(scope="module")
def blob():
    """Thin Gaussian fog at an asymmetric place in a box of unequal sides; optical depth 0.05."""
    x, y, z = voxel_centres(40, 48, 56)
    r2 = torch.stack([x, y, z], -1).sub(LOPSIDED).square().sum(-1)
    return as_volume(0.05 / (math.sqrt(2 * math.pi) * 0.16) * torch.exp(-r2 / (2 * 0.16**2)))


def test_lopsided_blob_lands_where_project_says_in_colour_occupancy_and_depth(blob):
    cam2world, lens = cameras((0, 0), (0.7, 0.4), (-2.1, -0.5), lens=(1.3, 1.5, 0.45, 0.6))
    out = render.render_geometry(blob, cam2world, lens, 48, 96)
    uv, _ = render.project(LOPSIDED.expand(1, 3, 1, 3), cam2world, lens)
    for key in ("rgb", "occupancy"):
        peak = out[key][0, :, -1].flatten(1).argmax(1)
        column, row = (uv[0, :, 0] * 48).floor().long().unbind(-1)
        assert (peak % 48 - column).abs().max() <= 1 and (peak // 48 - row).abs().max() <= 1
    o, d = render.camera_rays(cam2world, lens, 48)
    to = LOPSIDED - o
    along = (to * d).sum(-1)                                           # distance ALONG THE RAY
    tau = 0.05 * torch.exp(-((to**2).sum(-1) - along**2) / (2 * 0.16**2))
    torch.testing.assert_close(out["occupancy"][:, :, 0], 1 - torch.exp(-tau), rtol=0, atol=7e-4)
    torch.testing.assert_close(out["rgb"], out["occupancy"] * COLOUR.view(3, 1, 1), rtol=0,
                               atol=3e-5)
    near = tau > 0.02
    assert (out["depth"][:, :, 0] - along)[near].abs().max() < 3e-3 and near.sum() > 50


def test_an_opaque_ball_shows_its_surface_in_depth_and_outward_normals():
    x, y, z = voxel_centres(40, 36, 44)
    R = 0.4
    r = torch.stack([x, y, z], -1).sub(LOPSIDED).norm(dim=-1)
    cam2world, lens = cameras((0.2, 0.1), (2.5, -0.6))
    ball = as_volume(4000 * (R - r).clamp(min=0))
    out = render.render_geometry(ball, cam2world, lens, 32, 400)
    o, d = render.camera_rays(cam2world, lens, 32)
    to = LOPSIDED - o
    along = (to * d).sum(-1)
    b2 = (to**2).sum(-1) - along**2
    t = along - (R**2 - b2).clamp(min=0).sqrt()
    n = (o + t[..., None] * d - LOPSIDED) / R
    front = b2 < (0.8 * R)**2
    assert front.sum() > 40
    assert (out["depth"][:, :, 0] - t)[front].abs().max() < 0.03
    cosine = (out["normal"].movedim(2, -1) * n).sum(-1)[front]
    assert cosine.min() > 0.99 and cosine.mean() > 0.998               # 8 degrees, 4 on average


def test_normals_of_a_density_ramp_are_exact_and_point_down_the_ramp():
    x, y, z = voxel_centres(8, 10, 12)
    n = torch.tensor([2.0, -3, 6], dtype=F64) / 7
    ramp = 60 * (2 + n[0] * x + n[1] * y + n[2] * z)
    inside = cameras((0, 0), (2.0, 0.7), distance=0.0)
    out = render.render_geometry(as_volume(ramp), *inside, 5, 64)
    torch.testing.assert_close(out["normal"], -n.view(3, 1, 1).expand(1, 2, 3, 5, 5), rtol=0,
                               atol=1e-9)


def test_depth_in_even_fog_is_one_over_density_along_every_ray():
    """A camera in the middle of fog sees 1 / density far, at the picture's corners too."""
    fog = as_volume(torch.full((16, 16, 16), 20.0, dtype=F64))
    depth = render.render_geometry(fog, *cameras((0, 0), distance=0.0), 5, 2000)["depth"]
    torch.testing.assert_close(depth, torch.full_like(depth, 1 / 20), rtol=1e-4, atol=0)


def test_what_is_next_to_nothing_has_neither_depth_nor_normal():
    density = torch.zeros(8, 8, 8, dtype=F64)
    density[:, :, :4] = 1.0                                            # a slope, to have normals
    view = cameras((0, 0), lens=(4.0, 4.0, 0.5, 0.5))
    for thinness, seen in ((4e-4, False), (4e-3, True)):
        out = render.render_geometry(as_volume(thinness * density), *view, 8, 32)
        left = {key: picture[..., :3] for key, picture in out.items()}
        assert (left["occupancy"] > 1e-4).all()
        assert (left["occupancy"] > 1e-3).all() == seen
        assert (left["depth"] > 3).all() == seen
        assert (left["depth"] != 0).any() == seen
        assert (left["normal"] != 0).any() == seen


def test_a_ray_that_misses_is_exactly_black_and_empty():
    fog = as_volume(torch.full((4, 4, 4), 50.0, dtype=F64))
    far_away = cameras((0.3, 0.2), distance=6.0, lens=(0.8, 0.8, 0.5, 0.5))
    out = render.render_geometry(fog, *far_away, 32, 16)
    for picture in out.values():
        assert (picture[..., :4] == 0).all()
        assert (picture[..., :4, :] == 0).all()
    assert out["occupancy"].max() > 0.99
    empty = render.render_geometry(torch.zeros(1, 4, 4, 4, 4, dtype=F64), *cameras((0, 0)), 8, 8)
    for picture in empty.values():
        assert (picture == 0).all()


def test_the_same_camera_at_two_sizes_sees_the_same(blob):
    view = cameras((0.7, 0.4))
    small = render.render_geometry(blob * 20, *view, 15, 48)
    large = render.render_geometry(blob * 20, *view, 45, 48)
    for key in small:                            # pixel i of 15 and 3 i + 1 of 45 share a centre
        torch.testing.assert_close(large[key][..., 1::3, 1::3], small[key], rtol=1e-9, atol=1e-9)


def test_objects_and_views_do_not_mix(blob):
    volumes = torch.cat([blob, blob.flip(2), blob.flip(4)])
    views, lens = cameras((0, 0), (1, 0.5))
    views = views.expand(3, 2, 4, 4)
    lens = lens.expand(3, 2, 4)
    together = render.render_geometry(volumes, views, lens, 12, 24)
    for b in range(3):
        for v in range(2):
            alone = render.render_geometry(volumes[b:b + 1], views[b:b + 1, v:v + 1],
                                           lens[b:b + 1, v:v + 1], 12, 24)
            for key in alone:
                torch.testing.assert_close(together[key][b, v], alone[key][0, 0])


def test_geometry_comes_with_the_picture_that_render_gives_bit_for_bit(blob):
    view = cameras((0, 0), (1, 0.5))
    rgb, occupancy = render.render(blob, *view, 12, 24)
    assert rgb.shape == (1, 2, 3, 12, 12)
    assert occupancy.shape == (1, 2, 1, 12, 12)
    out = render.render_geometry(blob, *view, 12, 24)
    assert torch.equal(out["rgb"], rgb)
    assert torch.equal(out["occupancy"], occupancy)
    assert out["depth"].shape == (1, 2, 1, 12, 12)
    assert out["normal"].shape == (1, 2, 3, 12, 12)
    volume = random_volume(parts=2)
    poses = torch.stack([view[0], moved(view[0], 1, 0.3, (0.1, 0.2, 0.0))], 2)
    rgb, occupancy = render.render_moving(volume, poses, view[1], 12, 24)
    assert rgb.shape == (1, 2, 3, 12, 12)
    assert occupancy.shape == (1, 2, 1, 12, 12)
    out = render.render_moving_geometry(volume, poses, view[1], 12, 24)
    assert torch.equal(out["rgb"], rgb)
    assert torch.equal(out["occupancy"], occupancy)
    assert out["parts"].shape == (1, 2, 2, 12, 12)


def test_samples_lie_in_the_middle_of_their_intervals_or_evenly_anywhere_in_them():
    near = torch.full((1, 2000), 3.0, dtype=F64)
    far = torch.full((1, 2000), 5.0, dtype=F64)
    t, edges = render.place_samples(near, far, 4)
    assert edges[0, 0].tolist() == [3, 3.5, 4, 4.5, 5]
    assert t[0, 0].tolist() == [3.25, 3.75, 4.25, 4.75]
    t, same_edges = render.place_samples(near, far, 4, torch.Generator().manual_seed(1))
    assert torch.equal(same_edges, edges)
    fraction = (t - edges[..., :-1]) / 0.5                             # 0 in front, 1 at the back
    assert fraction.min() >= 0
    assert fraction.max() <= 1
    for interval in fraction[0].unbind(-1):
        assert interval.mean() == pytest.approx(0.5, abs=0.03)
        assert interval.std() == pytest.approx(12**-0.5, abs=0.02)
    again, _ = render.place_samples(near, far, 4, torch.Generator().manual_seed(1))
    other, _ = render.place_samples(near, far, 4, torch.Generator().manual_seed(2))
    assert torch.equal(again, t)
    assert not torch.equal(other, t)


# ---- No time for empty space --------------------------------------------------------------------
def speckled(n_objects=2, side=12, speckles=9):
    """Volumes in which some single voxels are dense, and all others empty: faces, corners, too."""
    g = torch.Generator().manual_seed(0)
    volume = torch.rand(n_objects, 4, side, side, side, generator=g, dtype=F64)
    chosen = torch.rand(n_objects, side**3, generator=g).argsort(1)[:, :speckles]
    chosen[:, 0] = 0
    chosen[:, 1] = side**3 - 1
    density = torch.zeros(n_objects, side**3, dtype=F64)
    density.scatter_(1, chosen, 20.0)
    volume[:, 0] = density.view(n_objects, side, side, side)
    return volume


def both_ways(volume, size=14, n_samples=30, seed=None):
    """Pictures and gradients of render, and of render_skipping."""
    camera, lens = cameras((0.4, 0.2), (2.0, -0.7), (4.1, 1.2))
    camera, lens = (x.expand(len(volume), *x.shape[1:]) for x in (camera, lens))
    found = []
    for draw in (render.render, render.render_skipping):
        leaf = volume.clone().requires_grad_()
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        rgb, occupancy = draw(leaf, camera, lens, size, n_samples, generator)
        (rgb.square().sum() + occupancy.sum()).backward()
        found.append((rgb.detach(), occupancy.detach(), leaf.grad))
    return found


@pytest.mark.parametrize("seed", [None, 3])
def test_passing_over_empty_space_changes_no_picture_and_no_gradient_of_what_is_there(seed):
    volume = speckled()
    (rgb, occupancy, gradient), (same_rgb, same_occupancy, same_gradient) = both_ways(
        volume, seed=seed)
    assert occupancy.max() > 0.5 and (occupancy == 0).any()
    torch.testing.assert_close(same_rgb, rgb, rtol=0, atol=1e-12)
    torch.testing.assert_close(same_occupancy, occupancy, rtol=0, atol=1e-12)
    there = (volume[:, :1] > 0).expand_as(volume)
    torch.testing.assert_close(same_gradient[there], gradient[there], rtol=0, atol=1e-12)
    # And next to it, or nothing could grow; farther away there is none.
    near = render.not_empty(volume[:, :1])
    assert same_gradient[:, 0][near].abs().mean() > 0.1 * gradient[:, 0][near].abs().mean()
    reached = torch.nn.functional.max_pool3d(near.double(), 3, 1, 1) > 0
    assert (same_gradient[:, 0][~reached] == 0).all() and gradient[:, 0][~reached].abs().max() > 0


def test_a_voxel_is_full_if_it_or_one_next_to_it_is_thicker_than_the_bound():
    density = torch.zeros(1, 1, 8, 8, 8, dtype=F64)
    density[0, 0, 2, 5, 7] = 1.001e-3 / (2 / 8)
    density[0, 0, 6, 1, 1] = 0.999e-3 / (2 / 8)
    full = render.not_empty(density)[0]
    expected = torch.zeros(8, 8, 8, dtype=torch.bool)
    expected[1:4, 4:7, 6:] = True
    assert torch.equal(full, expected)


def test_only_what_is_near_something_is_looked_up(monkeypatch):
    looked_up = []
    sample_volume = render.sample_volume

    def counting(volume, points):
        looked_up.append(points.numel() // 3)
        return sample_volume(volume, points)

    monkeypatch.setattr(render, "sample_volume", counting)
    both_ways(speckled(speckles=3))
    everything, *parts = looked_up
    assert len(parts) == 2 and 0 < sum(parts) < 0.1 * everything
    looked_up.clear()
    both_ways(random_volume())                                         # fog: the same twice
    assert looked_up == [3 * 14 * 14 * 30] * 2


def test_an_object_that_has_vanished_gets_gradients_and_may_come_back():
    volume = speckled(n_objects=3)
    volume[1, 0] = 0
    dense, skipping = both_ways(volume)
    torch.testing.assert_close(skipping[2][1], dense[2][1], rtol=0, atol=1e-12)
    assert skipping[2][1, 0].abs().max() > 0


def test_cameras_may_look_past_all_that_is_there():
    volume = speckled(speckles=2)
    camera, lens = cameras((0.4, 0.2), lens=(9.0, 9.0, 0.5, 0.5))
    camera, lens = camera.expand(2, 1, 4, 4), lens.expand(2, 1, 4)
    rgb, occupancy = render.render_skipping(volume.requires_grad_(), camera, lens, 8, 20)
    assert (rgb == 0).all() and (occupancy == 0).all()
    occupancy.sum().backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_too_the_cpus_generator_decides_where_samples_lie():
    near = torch.full((1, 50), 3.0, device="cuda")
    generator = torch.Generator().manual_seed(1)
    first, edges = render.place_samples(near, near + 2, 4, generator)
    second, _ = render.place_samples(near, near + 2, 4, generator)
    again, _ = render.place_samples(near, near + 2, 4, torch.Generator().manual_seed(1))
    assert first.device.type == "cuda"
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert (first >= edges[..., :-1]).all()
    assert (first <= edges[..., 1:]).all()


def test_rendering_places_its_samples_with_the_generator_that_it_is_given(blob):
    camera, lens = cameras((0.4, 0.2))
    volume = blob * 20

    def rigid(generator):
        return render.render(volume, camera, lens, 9, 4, generator)[1]

    def moving(generator):
        return render.render_moving(volume, camera[:, :, None], lens, 9, 4, generator)[1]

    for occupancy in (rigid, moving):
        first = occupancy(torch.Generator().manual_seed(1))
        assert torch.equal(occupancy(torch.Generator().manual_seed(1)), first)
        assert not torch.equal(occupancy(torch.Generator().manual_seed(2)), first)
        assert not torch.equal(occupancy(None), first)
        assert torch.equal(occupancy(None), occupancy(None))


def test_gradients_to_the_volume_match_finite_differences():
    random = torch.rand(1, 4, 2, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    volume = (random + 0.2).requires_grad_()
    view = cameras((0.5, 0.3))

    def pictures(volume):
        out = render.render_geometry(volume, *view, 3, 5)
        return out["rgb"], out["occupancy"], out["depth"]

    assert torch.autograd.gradcheck(pictures, (volume,))


def test_gradients_of_an_empty_volume_are_finite_and_can_fill_it():
    volume = torch.zeros(1, 4, 4, 4, 4, dtype=F64, requires_grad=True)
    out = render.render_geometry(volume, *cameras((0.4, 0.2)), 6, 12)
    sum(picture.sum() for picture in out.values()).backward()
    assert volume.grad.isfinite().all()
    assert (volume.grad[:, 0] > 0).any()


def test_wrong_shapes_are_refused_by_name(blob):
    cam2world, lens = cameras((0, 0))
    two_cameras = cam2world.repeat(2, 1, 1, 1)
    two_lenses = lens.repeat(2, 1, 1)
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match="cam2world"):
        render.camera_rays(cam2world[..., :3, :], lens, 4)
    with pytest.raises(ValueError, match="intrinsics"):
        render.camera_rays(cam2world, lens[..., :3], 4)
    with pytest.raises(ValueError, match="edges"):
        render.integrate(ones, torch.ones(2, 3, 3), ones)
    with pytest.raises(ValueError, match="rgb"):
        render.integrate(ones, ones, torch.ones(2, 4))
    for draw in (render.render, render.render_geometry):
        with pytest.raises(ValueError, match="volume must be"):
            draw(blob[0], cam2world, lens, 4, 4)
        with pytest.raises(ValueError, match="volume must be"):
            draw(blob[:, :3], cam2world, lens, 4, 4)
        with pytest.raises(ValueError, match="volume must be"):
            draw(torch.cat([blob, blob], 1), cam2world, lens, 4, 4)
        with pytest.raises(ValueError, match="volume must be .2, 4, D, H, W., got .1, 4"):
            draw(blob, two_cameras, two_lenses, 4, 4)
    for draw in (render.render_moving, render.render_moving_geometry):
        poses = cam2world[:, :, None].expand(1, 1, 2, 4, 4)
        with pytest.raises(ValueError, match="cam2world"):
            draw(blob, cam2world, lens, 4, 4)
        with pytest.raises(ValueError, match="volume must be .1, 6, D, H, W., got .1, 4"):
            draw(blob, poses, lens, 4, 4)
        with pytest.raises(ValueError, match="volume must be .2, 6, D, H, W., got .1, 6"):
            draw(random_volume(parts=2), poses.repeat(2, 1, 1, 1, 1), two_lenses, 4, 4)


# ---- Moving parts -------------------------------------------------------------------------------
def test_one_moving_part_is_a_moving_camera():
    camera, lens = cameras((0.4, 0.3), (2.0, -0.2))
    rigid = render.render_geometry(random_volume(), camera, lens, 9, 12)
    moving = render.render_moving_geometry(random_volume(), camera[:, :, None], lens, 9, 12)
    for key in ("rgb", "occupancy", "depth"):
        assert torch.equal(moving[key], rigid[key])
    in_camera = torch.einsum("bvij,bvihw->bvjhw", camera[..., :3, :3], rigid["normal"])
    torch.testing.assert_close(moving["normal"], in_camera, rtol=0, atol=1e-12)
    torch.testing.assert_close(moving["parts"], rigid["occupancy"], rtol=0, atol=1e-12)


def test_parts_that_all_stay_give_the_rigid_picture_whatever_the_skin():
    camera, lens = cameras((0.4, 0.3))
    rigid = render.render_geometry(random_volume(), camera, lens, 9, 12)
    volume = random_volume(parts=3)
    volume[:, :4] = random_volume()
    poses = camera[:, :, None].expand(1, 1, 3, 4, 4)
    moving = render.render_moving_geometry(volume, poses, lens, 9, 12)
    for key in ("rgb", "occupancy", "depth"):
        torch.testing.assert_close(moving[key], rigid[key], rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def two_boxes():
    """One box on the left, one on the right; skins that claim a half each; and their cameras."""
    x, _, _ = voxel_centres(16, 16, 16)
    density = torch.zeros(16, 16, 16, dtype=F64)
    density[6:10, 6:10, 2:5] = 20.0
    density[6:10, 6:10, 11:14] = 20.0
    left = torch.where(x < 0, 60.0, -60.0).to(F64)
    skin = torch.stack([left, -left])
    volume = torch.cat([as_volume(density), skin[None]], 1)
    camera, lens = cameras((0.0, 0.0), distance=6.0, lens=(2.4, 2.4, 0.5, 0.5))
    camera = camera[0, 0]
    of_left = moved(camera, 2, 0.4, (0.0, -0.3, 0.1))
    of_right = moved(camera, 1, 0.3, (0.0, 0.2, 0.0))
    poses = torch.stack([of_left, of_right])[None, None]               # (1, 1, 2, 4, 4)
    return volume, poses, lens


def test_two_boxes_with_hard_weights_move_as_two_objects_would(two_boxes):
    volume, poses, lens = two_boxes
    both = render.render_moving_geometry(volume, poses, lens, 24, 200)
    alone = []
    for part in range(2):
        mine = volume[:, 4 + part] > 0
        density = torch.where(mine, volume[:, 0], torch.zeros_like(volume[:, 0]))
        _, occupancy = render.render(as_volume(density[0]), poses[:, :, part], lens, 24, 200)
        assert occupancy.mean() > 0.01
        alone.append(occupancy)
    expected = 1 - (1 - alone[0]) * (1 - alone[1])
    # The two runs cut their rays into other intervals: equal up to the quadrature.
    assert (both["occupancy"] - expected).abs().mean() < 2e-3
    assert (both["parts"][:, :, :1] - alone[0]).abs().mean() < 2e-3
    torch.testing.assert_close(both["parts"].sum(2, keepdim=True), both["occupancy"])


def test_two_views_of_what_moves_at_once_are_the_views_one_by_one(two_boxes):
    volume, poses, lens = two_boxes
    other_poses = poses.flip(2)
    first = render.render_moving_geometry(volume, poses, lens, 24, 50)
    second = render.render_moving_geometry(volume, other_poses, lens, 24, 50)
    pair = render.render_moving_geometry(volume, torch.cat([poses, other_poses], 1),
                                         lens.expand(1, 2, 4), 24, 50)
    assert not torch.equal(first["rgb"], second["rgb"])
    for key in pair:
        assert torch.equal(pair[key], torch.cat([first[key], second[key]], 1)), key


def test_rays_go_from_the_first_parts_cube_to_the_last_ones_and_skip_what_they_miss():
    near = torch.tensor([[[2.0, 5, 0, 4], [0.0, 1, 0, 3]]])            # (1, 2 parts, 4 rays)
    far = torch.tensor([[[4.0, 7, 0, 4], [0.0, 3, 0, 5]]])
    near, far = render.around_parts(near, far)
    assert near.tolist() == [[2, 1, 0, 3]]
    assert far.tolist() == [[4, 7, 0, 5]]


def test_carrying_back_is_the_papers_sum_over_parts():
    g = torch.Generator().manual_seed(0)
    B, P, R, S = 2, 3, 5, 4
    skin = torch.randn(B, P, 6, 5, 4, generator=g, dtype=F64)
    o = 0.6 * torch.rand(B, P, R, 3, generator=g, dtype=F64) - 0.3
    d = torch.nn.functional.normalize(torch.randn(B, P, R, 3, generator=g, dtype=F64), dim=-1)
    t = 0.3 * torch.rand(B, R, S, generator=g, dtype=F64)              # all samples are inside
    points, w = render.carry_back(skin, o, d, t)
    for b in range(B):
        for ray in range(R):
            for sample in range(S):
                x = o[b, :, ray] + t[b, ray, sample] * d[b, :, ray]    # (P, 3) x_p
                claims = []
                for p in range(P):
                    claims.append(render.sample_volume(skin[b:b + 1, p:p + 1], x[None, p:p + 1]))
                w_p = torch.stack(claims).flatten().softmax(0)
                torch.testing.assert_close(w[b, :, ray, sample], w_p, rtol=0, atol=1e-12)
                torch.testing.assert_close(points[b, ray, sample], w_p @ x, rtol=0, atol=1e-12)


def test_outside_its_cube_a_part_claims_what_it_claims_on_the_face():
    skin = torch.full((1, 2, 4, 4, 4), -5.0, dtype=F64)
    skin[:, 1] = -7.0                                                  # the other claims less
    o = torch.tensor([[[[3.0, 0, 0]], [[0.0, 0, 0]]]], dtype=F64)      # part 0 sees it outside
    d = torch.zeros_like(o)
    _, w = render.carry_back(skin, o, d, torch.zeros(1, 1, 1, dtype=F64))
    assert w[0, 0].item() == pytest.approx(1 / (1 + math.exp(-2)), rel=1e-12)


def test_skinning_weights_sum_to_one_and_follow_the_largest_claim():
    g = torch.Generator().manual_seed(0)
    skin = torch.randn(2, 4, 5, 5, 5, generator=g, dtype=F64)
    o = torch.randn(2, 4, 7, 3, generator=g, dtype=F64)
    d = torch.randn(2, 4, 7, 3, generator=g, dtype=F64)
    t = torch.rand(2, 7, 6, generator=g, dtype=F64)
    _, w = render.carry_back(skin, o, d, t)
    torch.testing.assert_close(w.sum(1), torch.ones(2, 7, 6, dtype=F64), rtol=0, atol=1e-14)
    skin[:, 2] = 500
    points, w = render.carry_back(skin, o, d, t)
    torch.testing.assert_close(points, o[:, 2, :, None] + t[..., None] * d[:, 2, :, None])
    assert torch.equal(w[:, 2], torch.ones_like(t))


def test_normals_turn_with_the_part_that_claims_them():
    g = torch.Generator().manual_seed(0)
    B, V, P, rays, S = 2, 3, 4, 5, 6
    rotation, _ = torch.linalg.qr(torch.randn(B, V, P, 3, 3, generator=g, dtype=F64))
    vectors = torch.randn(B, V * rays, S, 3, generator=g, dtype=F64)
    owner = torch.randint(P, (B, V * rays, S), generator=g)
    w = torch.nn.functional.one_hot(owner, P).movedim(-1, 1).to(F64)
    turned = render.blend_turned(vectors, w, rotation)
    for b, ray, sample in ((0, 0, 0), (0, 7, 3), (1, 14, 5), (1, 9, 1)):
        view = ray // rays
        R = rotation[b, view, owner[b, ray, sample]]
        torch.testing.assert_close(turned[b, ray, sample], R.T @ vectors[b, ray, sample], rtol=0,
                                   atol=1e-12)


def test_learned_cameras_get_gradients_through_the_picture_of_what_moves():
    camera, lens = cameras((0.4, 0.3))
    volume = random_volume(parts=2)
    poses = torch.stack([camera, moved(camera, 1, 0.2, (0.1, 0.0, 0.0))], 2)

    def mean_colour(poses):
        return render.render_moving(volume, poses, lens, 6, 12)[0].mean()

    poses.requires_grad_()
    mean_colour(poses).backward()
    assert poses.grad.isfinite().all()
    # Both parts' poses matter, and the last row, (0, 0, 0, 1), does not.
    assert (poses.grad[:, :, :, :3].abs().amax((-1, -2)) > 0).all()
    assert (poses.grad[:, :, :, 3] == 0).all()


def test_where_samples_lie_sends_no_gradient_to_learned_cameras():
    # The way through even fog grows as the camera turns; all samples see the same, so only through
    # their places could the camera learn of it.
    fog = as_volume(torch.full((16, 16, 16), 0.8, dtype=F64))
    camera, lens = cameras((0.4, 0.2), lens=(6.0, 6.0, 0.5, 0.5))
    poses = camera[:, :, None].clone().requires_grad_()
    _, occupancy = render.render_moving(fog, poses, lens, 3, 2)
    occupancy.sum().backward()
    assert poses.grad.abs().max() < 1e-12


def test_cameras_are_made_where_the_angles_are():
    poses = torch.zeros(2, 4, 4, device="meta")        # as a GPU would, it refuses to mix with CPU
    assert render.turn_about(poses, 0.3, 12.0).device.type == "meta"


def test_turning_about_a_subject_keeps_its_middle_in_the_middle():
    camera, lens = cameras((0.0, 0.0), distance=12.0)
    azimuth = torch.tensor(0.5, dtype=F64)
    elevation = torch.tensor(0.3, dtype=F64)
    # One part, at rest: turning about it is an orbit.
    turned = render.turn_about(camera[:, 0, None], 0.5, 12.0)[0, 0]
    expected = render.orbit(azimuth, torch.zeros_like(azimuth), 12.0)
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-12)
    raised = render.turn_about(camera[0, 0], 0.5, 12.0, 0.3)
    expected = render.orbit(azimuth, elevation, 12.0)
    torch.testing.assert_close(raised, expected, rtol=0, atol=1e-12)
    # Any camera: the point 12 ahead of it stays where it is.
    pose = moved(camera[0, 0], 1, 0.8, (0.1, 0.2, 0.3))
    turned = render.turn_about(pose, 0.5, 12.0, 0.2)
    ahead = torch.tensor([0.0, 0, -12, 1], dtype=F64)
    torch.testing.assert_close(turned @ ahead, pose @ ahead, rtol=0, atol=1e-12)
    assert (turned[:3, 3] - pose[:3, 3]).norm() > 5
