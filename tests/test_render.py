"""render.py: Beer-Lambert fog, lopsided volumes and every convention against closed forms."""
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import render                                                         # noqa: E402

F64 = torch.float64
COLOUR = torch.tensor([0.2, 0.5, 0.9], dtype=F64)


def voxel_centres(D, H, W):
    """x, y, z of the voxel centres, (D, H, W) each, straight from the stated convention."""
    z, y, x = torch.meshgrid(*((2 * torch.arange(n, dtype=F64) + 1) / n - 1 for n in (D, H, W)),
                             indexing="ij")
    return x, y, z


def as_volume(density, colour=COLOUR):
    return torch.cat([density[None], colour.view(3, 1, 1, 1).expand(3, *density.shape)])[None]


def cameras(*views, distance=4.0, lens=(1.3, 1.3, 0.5, 0.5)):
    """(azimuth, elevation) pairs -> cam2world (1, V, 4, 4), intrinsics (1, V, 4), float64."""
    azimuth, elevation = torch.tensor(views, dtype=F64).unbind(1)
    return (render.orbit(azimuth, elevation, distance)[None],
            torch.tensor(lens, dtype=F64).expand(1, len(views), 4))


# ---- Eq. 6 and 7 along one ray ------------------------------------------------------------------


def test_homogeneous_slab_obeys_beer_lambert_however_it_is_cut():
    cuts = torch.rand(5, 20, dtype=F64, generator=torch.Generator().manual_seed(0)).sort(1).values
    ends = torch.tensor([[0.0, 1.0]], dtype=F64).expand(5, 2)
    edges = torch.cat([ends[:, :1], cuts, ends[:, 1:]], 1) * 1.5 + 2
    density = torch.full((5, 21), 3.0, dtype=F64)
    rgb, occupancy = render.integrate(density, COLOUR.expand(5, 21, 3), edges)
    expected = 1 - math.exp(-3.0 * 1.5)
    torch.testing.assert_close(occupancy, torch.full_like(occupancy, expected), rtol=1e-13, atol=0)
    torch.testing.assert_close(rgb, (expected * COLOUR).expand(5, 3), rtol=1e-13, atol=0)


def test_sphere_of_fog_obeys_beer_lambert_at_every_impact_parameter():
    b = torch.linspace(0, 1.2, 25, dtype=F64)
    half = (1 - b**2).clamp(min=0).sqrt()
    edges = 3 + half[:, None] * torch.linspace(-1, 1, 41, dtype=F64)
    density = torch.full((25, 40), 2.0, dtype=F64)
    _, occupancy = render.integrate(density, torch.ones(25, 40, 3, dtype=F64), edges)
    torch.testing.assert_close(occupancy, -torch.expm1(-2.0 * 2 * half), rtol=1e-12, atol=1e-15)


def test_the_layer_in_front_dims_the_one_behind_and_not_itself():
    density = torch.tensor([[0.7, 0.0, 1.1]], dtype=F64)
    rgb = torch.tensor([[[1, 0, 0], [0, 0, 1], [0, 1, 0]]], dtype=F64)
    out, occupancy = render.integrate(density, rgb, torch.tensor([[1.0, 2, 5, 7]], dtype=F64))
    front, behind = 1 - math.exp(-0.7), math.exp(-0.7) * (1 - math.exp(-2.2))
    assert out[0].tolist() == pytest.approx([front, behind, 0], rel=1e-14)
    assert occupancy.item() == pytest.approx(front + behind, rel=1e-14)


def test_the_last_interval_is_as_long_as_the_others():
    edges = torch.linspace(0, 1, 11, dtype=F64)[None]
    thin = torch.full((1, 10), 0.1, dtype=F64)
    _, occupancy = render.integrate(thin, torch.ones(1, 10, 3, dtype=F64), edges)
    assert occupancy.item() == pytest.approx(1 - math.exp(-0.1), rel=1e-14)          # 0.095, not 1


@pytest.mark.parametrize("dtype, rel", [(F64, 1e-11), (torch.float32, 1e-6)])
def test_the_thinnest_fog_is_not_rounded_to_nothing(dtype, rel):
    edges = torch.tensor([[0.0, 1.0]], dtype=dtype)
    w = render.ray_weights(torch.tensor([[1e-12]], dtype=dtype), edges)
    assert w.item() == pytest.approx(1e-12, rel=rel, abs=0)


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
    torch.testing.assert_close(o[0, 0], torch.tensor([0, 0, 4.0], dtype=F64))
    assert d[0, 0, 0, 3, 0] > 0 > d[0, 0, 3, 0, 1]                     # columns go right, rows down


def test_project_inverts_camera_rays():
    cam2world, lens = cameras((0.7, 0.3), (-2.0, -0.6), lens=(1.5, 1.2, 0.45, 0.6))
    o, d = render.camera_rays(cam2world, lens, 5)
    t = torch.rand(1, 2, 5, 5, 1, dtype=F64, generator=torch.Generator().manual_seed(0)) * 5 + 1
    uv, depth = render.project((o[:, :, None, None] + t * d).flatten(2, 3), cam2world, lens)
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


def test_the_volume_is_one_half_on_its_faces_and_zero_half_a_voxel_outside():
    p = torch.tensor([[[1.0, 0, 0], [0, -1, 0], [0, 0, 1], [1.126, 0, 0], [0, 0, -1.26]]],
                     dtype=F64)
    out = render.sample_volume(torch.ones(1, 1, 4, 6, 8, dtype=F64), p)[0, :, 0]
    assert out.tolist() == pytest.approx([0.5, 0.5, 0.5, 0, 0], abs=1e-12)


def test_density_gradient_of_a_linear_field_is_exact_in_world_units():
    x, y, z = voxel_centres(6, 8, 10)
    slope = render.density_gradient((7 + 2 * x - 3 * y + 5 * z)[None, None])[..., 1:-1, 1:-1, 1:-1]
    expected = torch.tensor([2.0, -3, 5], dtype=F64).view(1, 3, 1, 1, 1).expand_as(slope)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-12)


# ---- Whole pictures -----------------------------------------------------------------------------


@pytest.mark.parametrize("view, n", [((0, 0), 4), ((0, math.pi / 2), 6), ((math.pi / 2, 0), 8)])
def test_rendered_slab_obeys_beer_lambert_along_z_y_and_x(view, n):
    """Half a voxel at each face fades from c / 2 to c: a path of 2 - 1 / (2 n) at full c."""
    out = render.render(as_volume(torch.full((4, 6, 8), 0.8, dtype=F64)), *cameras(view), 1, 96)
    assert out["occupancy"].item() == pytest.approx(1 - math.exp(-0.8 * (2 - 0.5 / n)), rel=1e-12)


def test_rendered_ball_obeys_beer_lambert_over_its_chords():
    x, y, z = voxel_centres(48, 48, 48)
    centre, R, c = torch.tensor([0.15, -0.1, 0.2], dtype=F64), 0.7, 1.5
    r = torch.stack([x, y, z], -1).sub(centre).norm(dim=-1)
    ball = c * ((R - r) * 24 + 0.5).clamp(0, 1)                        # edges cover part of a voxel
    cam2world, lens = cameras((0.5, 0.3), (-2.2, -0.4))
    out = render.render(as_volume(ball), cam2world, lens, 24, 128, extras=False)
    o, d = render.camera_rays(cam2world, lens, 24)
    to = (centre - o)[:, :, None, None]
    b2 = (to**2).sum(-1) - (to * d).sum(-1)**2
    expected = 1 - torch.exp(-c * 2 * (R**2 - b2).clamp(min=0).sqrt())
    off = (out["occupancy"][:, :, 0] - expected).abs()
    inner = b2 < (0.85 * R)**2                                         # the rim is steep
    assert off[inner].max() < 0.015 and off.mean() < 0.005 and inner.sum() > 80
    torch.testing.assert_close(out["rgb"], out["occupancy"] * COLOUR.view(3, 1, 1))


LOPSIDED = torch.tensor([0.5, -0.3, 0.15], dtype=F64)


@pytest.fixture(scope="module")
def blob():
    """Thin Gaussian fog at an asymmetric place in a box of unequal sides; optical depth 0.05."""
    x, y, z = voxel_centres(40, 48, 56)
    r2 = torch.stack([x, y, z], -1).sub(LOPSIDED).square().sum(-1)
    return as_volume(0.05 / (math.sqrt(2 * math.pi) * 0.16) * torch.exp(-r2 / (2 * 0.16**2)))


def test_lopsided_blob_lands_where_project_says_in_colour_occupancy_and_depth(blob):
    cam2world, lens = cameras((0, 0), (0.7, 0.4), (-2.1, -0.5), lens=(1.3, 1.5, 0.45, 0.6))
    out = render.render(blob, cam2world, lens, 48, 96)
    uv, _ = render.project(LOPSIDED.expand(1, 3, 1, 3), cam2world, lens)
    for key in ("rgb", "occupancy"):
        peak = out[key][0, :, -1].flatten(1).argmax(1)
        column, row = (uv[0, :, 0] * 48).floor().long().unbind(-1)
        assert (peak % 48 - column).abs().max() <= 1 and (peak // 48 - row).abs().max() <= 1
    o, d = render.camera_rays(cam2world, lens, 48)
    to = (LOPSIDED - o)[:, :, None, None]
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
    out = render.render(as_volume(4000 * (R - r).clamp(min=0)), cam2world, lens, 32, 400)
    o, d = render.camera_rays(cam2world, lens, 32)
    to = (LOPSIDED - o)[:, :, None, None]
    along = (to * d).sum(-1)
    b2 = (to**2).sum(-1) - along**2
    t = along - (R**2 - b2).clamp(min=0).sqrt()
    n = (o[:, :, None, None] + t[..., None] * d - LOPSIDED) / R
    front = b2 < (0.8 * R)**2
    assert front.sum() > 40
    assert (out["depth"][:, :, 0] - t)[front].abs().max() < 0.03
    cosine = (out["normal"].movedim(2, -1) * n).sum(-1)[front]
    assert cosine.min() > 0.99 and cosine.mean() > 0.998               # 8 degrees, 4 on average


def test_normals_of_a_density_ramp_are_exact_and_point_down_the_ramp():
    x, y, z = voxel_centres(8, 10, 12)
    n = torch.tensor([2.0, -3, 6], dtype=F64) / 7
    ramp = 60 * (2 + n[0] * x + n[1] * y + n[2] * z)
    out = render.render(as_volume(ramp), *cameras((0, 0), (2.0, 0.7), distance=0.0), 5, 64)
    torch.testing.assert_close(out["normal"], -n.view(3, 1, 1).expand(1, 2, 3, 5, 5), rtol=0,
                               atol=1e-9)


def test_depth_in_even_fog_is_one_over_density_along_every_ray():
    """A camera in the middle of fog sees 1 / density far, at the picture's corners too."""
    fog = as_volume(torch.full((16, 16, 16), 20.0, dtype=F64))
    depth = render.render(fog, *cameras((0, 0), distance=0.0), 5, 2000)["depth"]
    torch.testing.assert_close(depth, torch.full_like(depth, 1 / 20), rtol=1e-4, atol=0)


def test_a_ray_that_misses_is_exactly_black_and_empty():
    fog = as_volume(torch.full((4, 4, 4), 50.0, dtype=F64))
    out = render.render(fog, *cameras((0.3, 0.2), distance=6.0, lens=(0.8, 0.8, 0.5, 0.5)), 32, 16)
    for value in out.values():
        assert (value[..., :4] == 0).all() and (value[..., :4, :] == 0).all()
    assert out["occupancy"].max() > 0.99
    empty = render.render(torch.zeros(1, 4, 4, 4, 4), *(v.float() for v in cameras((0, 0))), 8, 8)
    assert all((value == 0).all() for value in empty.values())


def test_the_same_camera_at_two_sizes_sees_the_same(blob):
    view = cameras((0.7, 0.4))
    small, large = (render.render(blob * 20, *view, size, 48) for size in (15, 45))
    for key in small:                            # pixel i of 15 and 3 i + 1 of 45 share a centre
        torch.testing.assert_close(large[key][..., 1::3, 1::3], small[key], rtol=1e-9, atol=1e-9)


def test_objects_and_views_do_not_mix(blob):
    volumes = torch.cat([blob, blob.flip(2), blob.flip(4)])
    views, lens = (v.expand(3, *v.shape[1:]) for v in cameras((0, 0), (1, 0.5)))
    together = render.render(volumes, views, lens, 12, 24)
    for b in range(3):
        for v in range(2):
            alone = render.render(volumes[b:b + 1], views[b:b + 1, v:v + 1],
                                  lens[b:b + 1, v:v + 1], 12, 24)
            for key in alone:
                torch.testing.assert_close(together[key][b, v], alone[key][0, 0])
    lean = render.render(volumes, views, lens, 12, 24, extras=False)
    assert set(lean) == {"rgb", "occupancy"} and torch.equal(lean["rgb"], together["rgb"])


def test_jitter_is_drawn_evenly_within_each_interval_and_repeats_from_a_seed():
    fog = as_volume(torch.full((8, 8, 8), 5.0, dtype=F64))
    view = cameras((0, 0), distance=4.0, lens=(8.0, 8.0, 0.5, 0.5))
    a, b, c = (render.render(fog, *view, 40, 1, jitter=torch.Generator().manual_seed(seed))["depth"]
               for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    _, d = render.camera_rays(*view, 40)
    share = (a[:, :, 0] * -d[..., 2] - 3) / 2                          # 0 in front, 1 at the back
    assert share.min() > -1e-9 and share.max() < 1 + 1e-9
    assert share.mean() == pytest.approx(0.5, abs=0.03)
    assert share.std() == pytest.approx(12**-0.5, abs=0.02)
    middle = render.render(fog, *view, 40, 1)["depth"][:, :, 0] * -d[..., 2]
    torch.testing.assert_close(middle, torch.full_like(middle, 4.0))


def test_gradients_to_the_volume_match_finite_differences():
    volume = torch.rand(1, 4, 2, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) + 0.2
    view = cameras((0.5, 0.3))

    def pictures(v):
        out = render.render(v, *view, 3, 5)
        return out["rgb"], out["occupancy"], out["depth"]

    assert torch.autograd.gradcheck(pictures, (volume.requires_grad_(),))


def test_gradients_of_an_empty_volume_are_finite_and_can_fill_it():
    volume = torch.zeros(1, 4, 4, 4, 4, dtype=F64, requires_grad=True)
    sum(v.sum() for v in render.render(volume, *cameras((0.4, 0.2)), 6, 12).values()).backward()
    assert volume.grad.isfinite().all() and (volume.grad[:, 0] > 0).any()


def test_wrong_shapes_are_refused_by_name(blob):
    cam2world, lens = cameras((0, 0))
    for match, call in [
            ("volume", lambda: render.render(blob[0], cam2world, lens, 4, 4)),
            ("volume", lambda: render.render(blob[:, :3], cam2world, lens, 4, 4)),
            ("1 volumes.* 2 objects", lambda: render.render(
                blob, cam2world.repeat(2, 1, 1, 1), lens.repeat(2, 1, 1), 4, 4)),
            ("cam2world", lambda: render.camera_rays(cam2world[..., :3, :], lens, 4)),
            ("intrinsics", lambda: render.camera_rays(cam2world, lens[..., :3], 4)),
            ("edges", lambda: render.ray_weights(torch.ones(2, 3), torch.ones(2, 3))),
            ("rgb", lambda: render.integrate(torch.ones(2, 3), torch.ones(2, 3), None))]:
        with pytest.raises(ValueError, match=match):
            call()


def test_a_window_is_a_camera_with_other_intrinsics():
    # Rendering the window gives the pixels of the whole picture, cut out at the same place.
    volume = torch.rand(2, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    cameras = render.orbit(torch.arange(6.).reshape(2, 3), torch.tensor(0.4), 4.0)
    intrinsics = torch.tensor([1.4, 1.5, 0.5, 0.45]).expand(2, 3, 4)
    whole = render.render(volume, cameras, intrinsics, 32, 16, extras=False)
    rgb, occupancy, cut = render.random_windows(whole["rgb"], whole["occupancy"], intrinsics, 12,
                                               torch.Generator().manual_seed(1))
    out = render.render(volume, cameras, cut, 12, 16, extras=False)
    assert torch.allclose(out["rgb"], rgb, atol=1e-5)
    assert torch.allclose(out["occupancy"], occupancy, atol=1e-5)
    assert rgb.std() > 0.05


# ---- Moving parts -------------------------------------------------------------------------------


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


def test_one_moving_part_is_a_moving_camera():
    camera, lens = cameras((0.4, 0.3), (2.0, -0.2))
    rigid = render.render(random_volume(), camera, lens, 9, 12)
    moving = render.render(random_volume(), camera[:, :, None], lens, 9, 12)
    for key in ("rgb", "occupancy", "depth"):
        assert torch.equal(moving[key], rigid[key])
    in_camera = torch.einsum("bvij,bvihw->bvjhw", camera[..., :3, :3], rigid["normal"])
    torch.testing.assert_close(moving["normal"], in_camera, rtol=0, atol=1e-12)
    torch.testing.assert_close(moving["parts"], rigid["occupancy"], rtol=0, atol=1e-12)


def test_parts_that_all_stay_give_the_rigid_picture_whatever_the_skin():
    camera, lens = cameras((0.4, 0.3))
    rigid = render.render(random_volume(), camera, lens, 9, 12)
    volume = random_volume(parts=3)
    volume[:, :4] = random_volume()
    moving = render.render(volume, camera[:, :, None].expand(1, 1, 3, 4, 4), lens, 9, 12)
    for key in ("rgb", "occupancy", "depth"):
        torch.testing.assert_close(moving[key], rigid[key], rtol=0, atol=1e-12)


def test_two_boxes_with_hard_weights_move_as_two_objects_would():
    x, _, _ = voxel_centres(16, 16, 16)
    density = torch.zeros(16, 16, 16, dtype=F64)
    density[6:10, 6:10, 2:5] = density[6:10, 6:10, 11:14] = 20.0      # one on the left, one right
    skin = torch.stack([torch.where(x < 0, 60.0, -60.0), torch.where(x < 0, -60.0, 60.0)])
    camera, lens = cameras((0.0, 0.0), distance=6.0, lens=(2.4, 2.4, 0.5, 0.5))
    seen = [camera[0, 0], moved(camera[0, 0], 1, 0.3, (0.0, 0.2, 0.0))]
    poses = torch.stack([moved(seen[0], 2, 0.4, (0.0, -0.3, 0.1)), seen[1]])[None, None]
    volume = as_volume(density.clone())
    both = render.render(torch.cat([volume, skin[None]], 1), poses, lens, 24, 200)
    alone = []
    for part, half in enumerate((x < 0, x >= 0)):
        one = as_volume(torch.where(half, density, torch.zeros_like(density)))
        alone.append(render.render(one, poses[:, :, part], lens, 24, 200))
    expected = 1 - (1 - alone[0]["occupancy"]) * (1 - alone[1]["occupancy"])
    # The two runs cut their rays into other intervals: equal up to the quadrature.
    assert (both["occupancy"] - expected).abs().mean() < 2e-3
    assert (both["parts"][:, :, :1] - alone[0]["occupancy"]).abs().mean() < 2e-3
    assert alone[0]["occupancy"].mean() > 0.01 and alone[1]["occupancy"].mean() > 0.01
    # Two views at once are the views one by one.
    other = torch.stack([moved(seen[0], 0, 0.5, (0.2, 0.0, 0.0)), seen[0]])[None, None]
    pair = render.render(torch.cat([volume, skin[None]], 1), torch.cat([poses, other], 1),
                         lens.expand(1, 2, 4), 24, 200)
    second = render.render(torch.cat([volume, skin[None]], 1), other, lens, 24, 200)
    for key in both:
        assert torch.equal(pair[key], torch.cat([both[key], second[key]], 1)), key


def test_skinning_weights_sum_to_one_and_follow_the_largest_claim():
    g = torch.Generator().manual_seed(0)
    skin = torch.randn(2, 4, 5, 5, 5, generator=g, dtype=F64)
    o = torch.randn(2, 4, 7, 3, generator=g, dtype=F64)
    d = torch.randn(2, 4, 7, 3, generator=g, dtype=F64)
    t = torch.rand(2, 7, 6, generator=g, dtype=F64)
    points, w = render.carry_back(skin, o, d, t)
    torch.testing.assert_close(w.sum(1), torch.ones(2, 7, 6, dtype=F64), rtol=0, atol=1e-14)
    skin[:, 2] = 500
    points, w = render.carry_back(skin, o, d, t)
    torch.testing.assert_close(points, o[:, 2, :, None] + t[..., None] * d[:, 2, :, None])
    assert torch.equal(w[:, 2], torch.ones_like(t))


def test_normals_turn_with_the_part_that_claims_them():
    g = torch.Generator().manual_seed(0)
    B, V, P, rays, S = 2, 3, 4, 5, 6
    rotation = torch.linalg.qr(torch.randn(B, V, P, 3, 3, generator=g, dtype=F64))[0]
    vectors = torch.randn(B, V * rays, S, 3, generator=g, dtype=F64)
    owner = torch.randint(P, (B, V * rays, S), generator=g)
    share = torch.nn.functional.one_hot(owner, P).movedim(-1, 1).to(F64)
    turned = render.blend_turned(vectors, share, rotation)
    for b, r, s in ((0, 0, 0), (0, 7, 3), (1, 14, 5), (1, 9, 1)):      # ray r is of view r // rays
        R = rotation[b, r // rays, owner[b, r, s]]
        torch.testing.assert_close(turned[b, r, s], R.T @ vectors[b, r, s], rtol=0, atol=1e-12)


def test_cameras_are_made_where_the_angles_are():
    poses = torch.zeros(2, 4, 4, device="meta")        # as a GPU would, it refuses to mix with CPU
    assert render.turn_about(poses, 0.3, 12.0).device.type == "meta"


def test_turning_about_a_subject_keeps_its_middle_in_the_middle():
    camera, lens = cameras((0.0, 0.0), distance=12.0)
    turned = render.turn_about(camera[:, 0, None], 0.5, 12.0)          # one part, at rest
    torch.testing.assert_close(turned[0, 0], render.orbit(
        torch.tensor(0.5, dtype=F64), torch.tensor(0.0, dtype=F64), 12.0), rtol=0, atol=1e-12)
    raised = render.turn_about(camera[0, 0], 0.5, 12.0, 0.3)
    torch.testing.assert_close(raised, render.orbit(
        *torch.tensor([0.5, 0.3], dtype=F64), 12.0), rtol=0, atol=1e-12)
    M = moved(camera[0, 0], 1, 0.8, (0.1, 0.2, 0.3))
    ahead = torch.tensor([0.0, 0, -12], dtype=F64)
    for pose in (M, render.turn_about(M, 0.5, 12.0, 0.2)):
        assert torch.allclose(pose[:3, :3] @ ahead + pose[:3, 3],
                              M[:3, :3] @ ahead + M[:3, 3], atol=1e-12)
