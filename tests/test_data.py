"""data.py: the synthetic set against closed forms, every layout against a known scene."""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from data import BadInput, box, cylinder  # noqa: E402

REAL = ROOT.parent / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real photos are not at {REAL}")


@pytest.fixture(scope="module")
def synthetic():
    return data.load("synthetic", 32, n_objects=12, n_views=7)


# ---------------------------------------------------------------- primitives, closed forms
def test_ray_enters_box_and_cylinder_at_known_distances():
    o, d = torch.tensor([[0.0, 0, 5], [0, 0, 5], [3, 0, 5]]), torch.tensor(
        [[0.0, 0, -2], [0, 0, 1], [0, 0, -1]]
    )
    t = data.hit(box((0, 0, 1), (1, 1, 0.5), (1, 1, 1)), o, d)
    assert t.tolist() == pytest.approx([(5 - 1.5) / 2, np.inf, np.inf])
    t = data.hit(
        cylinder((0, 0, 0), 0.5, 1, (1, 1, 1)),
        torch.tensor([[0.3, 0, 5]]),
        torch.tensor([[0.0, 0, -1]]),
    )
    assert t.item() == pytest.approx(5 - 0.4, abs=1e-5)  # sqrt(.5^2 - .3^2) = .4
    t = data.hit(
        cylinder((0, 0, 0), 0.5, 1, (1, 1, 1)),
        torch.tensor([[0.3, 4, 0]]),
        torch.tensor([[0.0, -1, 0]]),
    )
    assert t.item() == pytest.approx(3, abs=1e-4)  # the cap
    wheel = cylinder((0, 0, 0), 0.5, 0.1, (1, 1, 1), lying=True)  # thin along x
    t = data.hit(wheel, torch.tensor([[4.0, 0.2, 0]]), torch.tensor([[-1.0, 0, 0]]))
    assert t.item() == pytest.approx(3.9, abs=1e-4)


def test_normals_point_out_of_the_face_that_was_hit():
    part = box((1, 0, 0), (1, 2, 3), (1, 1, 1))
    points = torch.tensor([[2.0, 1.5, 2.5], [0.5, -2, 1], [0.2, 0.3, 3]])
    torch.testing.assert_close(
        data.normal_at(part, points), torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, 1]])
    )
    part = cylinder((0, 0, 0), 2, 1, (1, 1, 1))
    points = torch.tensor([[2 * 0.6, 0.5, 2 * 0.8], [0.1, 1, 0.1]])
    torch.testing.assert_close(
        data.normal_at(part, points), torch.tensor([[0.6, 0, 0.8], [0, 1, 0]])
    )


def test_a_box_seen_head_on_covers_its_exact_share_of_the_picture():
    part = box((0, 0, 0), (0.8, 0.4, 0.5), (0.9, 0.5, 0.1))
    rgba = data.raytrace(
        [part], data.look_at([[0, 0, 4.5]]), torch.tensor([[1.0, 1, 0.5, 0.5]]), 40, 5
    )[0][0]
    assert rgba[..., 3].mean().item() == pytest.approx(
        4 * 0.8 * 0.4 / 4**2, abs=1e-6
    )  # at distance 4
    row = rgba[20, 20]
    torch.testing.assert_close(row[:3] / row[0], torch.tensor([0.9, 0.5, 0.1]) / 0.9)
    assert rgba[0].sum() == 0


def test_a_picture_shows_up_right_and_near_where_they_are():
    up, right = box((0, 1, 0), (0.2, 0.2, 0.2), (1.0, 0, 0)), box(
        (0.8, 0, 0), (0.2, 0.2, 0.2), (0, 1.0, 0)
    )
    near, far = box((0, 0, 0.5), (0.2, 0.2, 0.2), (0, 0, 1.0)), box(
        (0, 0, -1), (0.25, 0.25, 0.2), (1.0, 1, 1)
    )
    rgba = data.raytrace(
        [far, up, right, near], data.look_at([[0, 0, 4]]), torch.tensor([[1.0, 1, 0.5, 0.5]]), 64
    )[0][0]
    y, x = (rgba[..., 0] > rgba[..., 3] / 3).nonzero().float().mean(0).tolist()
    assert y < 20 and abs(x - 31.5) < 1
    y, x = ((rgba[..., 1] > 0) & (rgba[..., 0] == 0)).nonzero().float().mean(0).tolist()
    assert x > 40 and abs(y - 31.5) < 1
    assert rgba[32, 32, 2] > 0 and rgba[32, 32, 0] == 0  # blue, the near one


def test_project_is_the_inverse_of_the_ray_through_a_pixel():
    pose, camera = data.synthetic_cameras(5, np.random.default_rng(0))
    points = torch.rand(20, 3) - 0.5
    u, v = data.project(points, pose, camera).unbind(-1)
    fx, fy, cx, cy = camera[:, :, None].unbind(1)
    ray = torch.stack([(u - cx) / fx, (cy - v) / fy, -torch.ones_like(u)], -1) @ pose[:, :3, :3].mT
    to = points - pose[:, None, :3, 3]
    assert torch.linalg.cross(ray, to).norm(dim=-1).max() < 1e-5 and (ray * to).sum(-1).min() > 0


def test_surface_points_are_uniform_on_a_box_and_a_cylinder():
    rng, n = np.random.default_rng(0), 20000
    p = data.sample_surface([box((0, 0, 0), (1, 2, 3), (1, 1, 1))], n, rng)
    for axis, (half, area) in enumerate([(1, 6), (2, 3), (3, 2)]):
        share = (p[:, axis].abs() > half - 1e-5).float().mean().item()
        assert share == pytest.approx(area / 11, abs=0.015)
    p = data.sample_surface([cylinder((0, 0, 0), 2, 1, (1, 1, 1))], n, rng)
    radius, cap = p[:, ::2].norm(dim=1), p[:, 1].abs() > 1 - 1e-5
    assert cap.float().mean().item() == pytest.approx(0.5, abs=0.015)  # 2 pi r^2 : 2 pi r 2h
    assert (radius[cap] < 2 / 2**0.5).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert (radius[~cap] - 2).abs().max() < 1e-5


def test_surface_points_keep_to_the_outside_of_the_union(synthetic):
    a, b = box((0, 0, 0), (1, 1, 1), (1, 1, 1)), box((0, 1.5, 0), (1, 0.5, 1), (1, 1, 1))
    p = data.sample_surface([a, b], 4000, np.random.default_rng(0))
    touching = (p[:, 1] - 1).abs() < 1e-6  # the faces between them
    assert not touching.any()
    for k in range(3):
        p = synthetic.surface_points(k, 3000)
        assert p.shape == (3000, 3) and p.dtype == torch.float32
        unit = torch.stack([data.to_unit(q, p) for q in synthetic.shapes[k]])  # (P, K, 3)
        level = torch.stack(
            [
                (
                    u.abs().amax(1)
                    if q.kind == "box"
                    else torch.maximum(u[:, 1].abs(), u[:, ::2].norm(dim=1))
                )
                for q, u in zip(synthetic.shapes[k], unit)
            ]
        )
        assert (level.amin(0) - 1).abs().max() < 1e-4  # on one, inside none
    assert not torch.equal(synthetic.surface_points(0, 9, seed=1), synthetic.surface_points(0, 9))


def test_ray_enters_a_ball_at_a_known_distance_and_its_normal_points_out():
    part = data.ball((1, 0, 0), (0.5, 0.5, 2), (1, 1, 1))
    o, d = torch.tensor([[1.3, 0, 9], [1.3, 0.41, 9]]), torch.tensor([[0.0, 0, -1]] * 2)
    t = data.hit(part, o, d)
    z = 2 * (1 - 0.6**2) ** 0.5  # x = 0.3 is 0.6 half axes off
    assert t.tolist() == pytest.approx([9 - z, np.inf], abs=1e-5)
    normal = data.normal_at(part, torch.tensor([[1.3, 0, z]]))
    gradient = torch.tensor([[0.3 / 0.5**2, 0, z / 2**2]])
    torch.testing.assert_close(normal, gradient / gradient.norm())


def test_a_moved_part_looks_like_the_same_part_built_where_it_went():
    rest = [box((0.1, 0, 0), (0.3, 0.2, 0.4), (0.9, 0.5, 0.1)),
            cylinder((-0.5, 0, 0), 0.2, 0.3, (0.2, 0.5, 0.9)),
            data.ball((0, 0.6, 0), (0.2, 0.3, 0.1), (0.4, 0.9, 0.3))]
    moves = torch.eye(4).repeat(1, 3, 1, 1)
    for i in range(3):
        moves[0, i, :3, :3] = data.turn(*torch.tensor([[0.3], [0.5 - i], [0.2]]))[0]
        moves[0, i, :3, 3] = torch.tensor([0.1 * i, -0.1, 0.2])
    there = [data.Primitive(p.kind, (M @ torch.cat([p.centre, torch.ones(1)]))[:3], p.half,
                            p.colour, M[:3, :3] @ p.rotation) for p, M in zip(rest, moves[0])]
    camera = data.fixed_camera(1)
    rgba, which = data.raytrace(rest, *camera, 48, moves=moves)
    expected, index = data.raytrace(there, *camera, 48)
    assert (which == index).float().mean() > 0.999  # rounding, on an edge or two
    assert (rgba - expected).abs().mean() < 1e-4 and rgba[..., 3].mean() > 0.1
    assert which.unique().tolist() == [-1, 0, 1, 2]


# ---------------------------------------------------------------- the synthetic set
def test_object_k_is_the_same_in_a_larger_set_and_differs_with_the_seed(synthetic):
    small = data.load("synthetic", 32, n_objects=2, n_views=7)
    assert (
        torch.equal(small.images, synthetic.images[:14])
        and small.captions == synthetic.captions[:2]
    )
    assert not torch.equal(small.images, data.load("synthetic", 32, 6, 1, 2, 7).images)


def test_dataset_has_the_promised_shapes_and_types(synthetic):
    d, n = synthetic, 12 * 7
    for name, shape, dtype in [
        ("images", (n, 32, 32, 3), torch.uint8),
        ("masks", (n, 32, 32), torch.uint8),
        ("cam2world", (n, 4, 4), torch.float32),
        ("intrinsics", (n, 4), torch.float32),
        ("object_index", (n,), torch.int64),
        ("heldout", (n,), torch.bool),
    ]:
        assert getattr(d, name).shape == shape and getattr(d, name).dtype == dtype, name
    assert d.n_objects == len(d.captions) == len(d.shapes) == 12


def test_every_object_is_inside_the_cube_and_in_frame_and_fills_them():
    d = data.load("synthetic", 64, n_objects=24, n_views=6)
    edge = torch.cat([d.masks[:, 0], d.masks[:, -1], d.masks[:, :, 0], d.masks[:, :, -1]])
    assert edge.max() == 0
    for parts in d.shapes:
        lo, hi = torch.cat([data.corners(p) for p in parts]).aminmax(dim=0)
        assert (lo + hi).abs().max() < 1e-5 and 0.7 < hi.max() <= data.MARGIN + 1e-5
    boxes = data.mask_box(d.masks)
    assert (boxes[:, 1::2] - boxes[:, ::2]).amax(1).mean() > 0.6 * 64


def test_images_are_colour_times_mask_with_soft_edges(synthetic):
    assert (synthetic.images.amax(-1) <= synthetic.masks).all()
    assert ((synthetic.masks > 0) & (synthetic.masks < 255)).any((1, 2)).all()
    inside = synthetic.images[synthetic.masks == 255]
    assert inside.amax(-1).min() > 0.02 * 255  # dark parts are not the background


def test_families_take_turns_and_captions_name_colours_that_are_there(synthetic):
    nouns = [("chair",), ("table",), ("car", "van", "truck")]
    for k, text in enumerate(synthetic.captions):
        assert any(f" {noun} with " in text for noun in nouns[k % 3])
        named = [data.COLOURS[w] for w in text.split() if w in data.COLOURS]
        used = torch.tensor(np.array([p.colour for p in synthetic.shapes[k]]))
        for colour in named:
            assert (used - torch.tensor(colour)).abs().amax(1).min() < 0.06, text


def test_every_sixth_view_is_held_out_and_short_objects_keep_all(synthetic):
    assert synthetic.heldout.view(12, 7).nonzero()[:, 1].unique().tolist() == [5]
    assert synthetic.frames_of(2).tolist() == list(range(14, 21))
    assert synthetic.frames_of(2, heldout=True).tolist() == [19]
    assert 19 not in synthetic.frames_of(2, heldout=False).tolist()
    assert not data.load("synthetic", 16, holdout=8, n_objects=1, n_views=7).heldout.any()
    assert not data.load("synthetic", 16, holdout=0, n_objects=1, n_views=7).heldout.any()


def test_batch_averages_over_area_and_keeps_the_shape_of_its_index(synthetic):
    index = torch.tensor([[3, 0], [7, 7]])
    images, masks = synthetic.batch(index, 8)
    assert images.shape == (2, 2, 3, 8, 8) and masks.shape == (2, 2, 1, 8, 8)
    truth = synthetic.images[7, 4:8, 8:12].double().mean((0, 1)) / 255
    torch.testing.assert_close(images[1, 0, :, 1, 2].double(), truth, atol=1e-6, rtol=0)
    assert torch.equal(synthetic.batch(index, 32)[1][0, 0, 0], synthetic.masks[3].float() / 255)
    with pytest.raises(ValueError, match="size 33"):
        synthetic.batch(index, 33)


def test_an_arc_goes_round_the_front_evenly_and_keeps_the_size_in_the_picture(synthetic):
    d = data.load("synthetic", 32, 0, n_objects=2, n_views=7, arc=60.0)
    for k in range(2):
        where = d.cam2world[d.frames_of(k), :3, 3]
        azimuth = torch.atan2(where[:, 0], where[:, 2]).rad2deg()
        torch.testing.assert_close(azimuth, torch.arange(-60.0, 61, 20), atol=1e-3, rtol=0)
        assert torch.asin(where[:, 1] / 12).rad2deg().numpy() == pytest.approx(15, abs=1e-3)
    assert not d.moving and [p.colour for p in d.shapes[0]] == [
        p.colour for p in synthetic.shapes[0]
    ]
    near, far = (data.mask_box(x.masks[:14]) for x in (synthetic, d))
    side = [(b[:, 1::2] - b[:, ::2]).amax(1).mean().item() for b in (near, far)]
    assert side[1] == pytest.approx(side[0], rel=0.12)


# ---------------------------------------------------------------- puppets
@pytest.fixture(scope="module")
def puppets():
    return data.load("puppets", 64, seed=1, n_objects=3, n_views=24)


def test_puppets_have_the_promised_shapes_and_captions(puppets):
    shapes = {k: (tuple(v.shape), v.dtype) for k, v in puppets.truth.items()}
    assert shapes == dict(yaw=((72,), torch.float32), angles=((72, 4), torch.float32),
                          poses=((72, 6, 3, 4), torch.float32), parts=((72, 64, 64), torch.uint8))
    assert puppets.images.shape == (72, 64, 64, 3) and puppets.names == ["0000", "0001", "0002"]
    for text in puppets.captions:
        assert text.startswith("a puppet with ") and text.endswith(" trousers")


def test_colours_shared_by_all_puppets_can_be_switched_off():
    def left_hand(k, **kw):
        return data.make_puppet(np.random.default_rng([0, 1000 + k]), **kw)[0][2][-1].colour
    shared = torch.tensor([left_hand(k) for k in range(8)])
    own = torch.tensor([left_hand(k, shared_colours=False) for k in range(8)])
    assert (shared - torch.tensor(data.PINK)).abs().max() < 0.051 and own.std(0).min() > 0.15


def test_puppet_k_is_the_same_in_a_larger_set_and_differs_with_the_seed(puppets):
    alone = data.load("puppets", 64, 6, 1, 9, 24, objects="0002")
    assert torch.equal(alone.images, puppets.images[48:])
    assert all(torch.equal(alone.truth[k], puppets.truth[k][48:]) for k in alone.truth)
    other = data.load("puppets", 64, 6, 2, 1, 24)
    assert not torch.equal(other.images, puppets.images[:24])


def test_puppets_stay_in_frame_and_fill_it(puppets):
    masks = puppets.masks
    assert max(masks[:, i].max() for i in (0, -1)) == 0
    assert max(masks[:, :, i].max() for i in (0, -1)) == 0
    left, right, top, bottom = data.mask_box(masks).T
    assert (bottom - top).min() > 0.75 * 64


def test_part_labels_agree_with_the_mask_and_every_part_is_seen(puppets):
    parts, masks = puppets.truth["parts"], puppets.masks
    assert (parts[masks == 255] > 0).all() and (parts[masks == 0] == 0).all()
    assert parts.unique().tolist() == list(range(7))
    small, large = (data.load("puppets", s, 0, 1, 1, 2).truth["parts"] for s in (48, 144))
    assert torch.equal(small, large[:, 1::3, 1::3])  # the label is that of the pixel's centre


def test_yaw_covers_both_sides_smoothly_and_limbs_move_on_their_own(puppets):
    for k in range(3):
        f = puppets.frames_of(k)
        yaw, angles = puppets.truth["yaw"][f].rad2deg(), puppets.truth["angles"][f].rad2deg()
        assert -45.1 < yaw.min() < -30 and 30 < yaw.max() < 45.1
        assert yaw.diff().abs().max() < 30
        assert (angles.amin(0) >= torch.tensor([-0.1, -0.1, -25.1, -25.1])).all()
        assert (angles.amax(0) <= torch.tensor([100.1, 100.1, 25.1, 25.1])).all()
        alike = torch.corrcoef(torch.cat([yaw[None], angles.T])) - torch.eye(5)
        assert alike.abs().max() < 0.97


def test_true_poses_are_rigid_and_turn_the_chest_by_yaw(puppets):
    R = puppets.truth["poses"][..., :3]
    eye = torch.eye(3).expand_as(R)
    torch.testing.assert_close(R @ R.mT, eye, atol=1e-5, rtol=0)
    ahead = R[:, 1, :, 2]  # where the torso's +z went
    torch.testing.assert_close(torch.atan2(ahead[:, 0], ahead[:, 2]), puppets.truth["yaw"],
                               atol=0.01, rtol=0)


def test_arms_rise_to_their_own_side_by_the_true_angle(puppets):
    M, angles = puppets.truth["poses"], puppets.truth["angles"]
    turned = M[:, 1, :, :3].mT[:, None] @ M[..., :3]  # (F, 6, 3, 3) as seen from the torso
    down = -turned[:, 2:4, :, 1]  # (F, 2, 3) where the arms, which hang at rest, point
    side = down[..., 0] * torch.tensor([1.0, -1])  # the left arm goes to +x
    torch.testing.assert_close(torch.atan2(side, -down[..., 1]), angles[:, :2], atol=1e-4, rtol=0)
    forward = -turned[:, 4:, 2, 1]  # the legs' main angle is forwards, to +z
    torch.testing.assert_close(forward, angles[:, 2:].sin(), atol=0.01, rtol=0)


def test_true_poses_carry_a_hand_onto_its_pixels(puppets):
    for k in range(3):
        parts, _, _ = data.make_puppet(np.random.default_rng([1, 1000 + k]))
        f = puppets.frames_of(k)
        for limb in (2, 3):
            M, hand = puppets.truth["poses"][f, limb], parts[limb][-1].centre
            where = M[:, :, :3] @ hand + M[:, :, 3]  # (V, 3)
            at = data.project(where, puppets.cam2world[f[:1]], puppets.intrinsics[f[:1]])[0]
            x, y = (at * 64).long().T
            aside = puppets.truth["angles"][f, limb - 2] > 0.9  # the body does not hide it
            seen = puppets.truth["parts"][f, y, x] == limb + 1
            assert aside.sum() > 3 and seen[aside].float().mean() > 0.9
            # The left hand (pink) is redder than blue-green, the right one (cyan) the reverse.
            red, green, _ = puppets.images[f, y, x].float().T
            assert ((red > green) == (limb == 2))[aside & seen].float().mean() > 0.9


# ---------------------------------------------------------------- one known scene in every layout
SCENE = [
    box((3, 1, -2), (0.5, 0.9, 0.3), (0.8, 0.2, 0.2)),
    box((3.6, 0.4, -1.8), (0.3, 0.3, 0.5), (0.2, 0.8, 0.2)),
    cylinder((2.7, 1.6, -1.6), 0.25, 0.3, (0.2, 0.3, 0.9)),
]  # lopsided, off centre, y up
LOW, HIGH = torch.cat([data.corners(p) for p in SCENE]).aminmax(dim=0)
TURN = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # our y up -> a z-up world


@pytest.fixture(scope="module")
def shots():
    """RGBA (12, 96, 96, 4) uint8 straight colour, cam2world (12, 4, 4) of SCENE, fx fy cx cy."""
    a = np.arange(12) * 2 * np.pi / 12
    e = np.radians(np.tile([3.0, 45.0, 25.0], 4))
    where = ((LOW + HIGH) / 2).numpy() + 5 * np.stack(
        [np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)], 1
    )
    poses = data.look_at(where, ((LOW + HIGH) / 2).numpy())
    camera = torch.tensor([[1.6, 1.6, 0.52, 0.47]]).repeat(12, 1)
    rgba, _ = data.raytrace(SCENE, poses, camera, 96)
    rgba[..., :3] /= rgba[..., 3:].clamp(min=1e-6)
    return (
        (rgba * 255).round().byte().numpy(),
        poses.double().numpy(),
        camera[0].double().numpy() * 96,
    )


def save(folder, rgba, masks=None, pattern="{:03d}.png"):
    """Photos, RGBA or RGB with masks in a folder beside."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(rgba):
        if masks:
            (folder.parent / masks).mkdir(exist_ok=True)
            iio.imwrite(folder.parent / masks / pattern.format(i), image[..., 3])
        iio.imwrite(folder / pattern.format(i), image[..., :3] if masks else image)


def turned(poses):
    """The same cameras in a world whose up is z."""
    poses = poses.copy()
    poses[:, :3] = TURN @ poses[:, :3]
    return poses


def write_transforms(root, rgba, poses, camera, masks=None, **extra):
    save(root / "images", rgba, masks)
    keys = dict(zip(("fl_x", "fl_y", "cx", "cy"), camera)) | {"w": 96, "h": 96} | extra
    frames = [
        {"file_path": f"./images/{i:03d}", "transform_matrix": p.tolist()}
        for i, p in enumerate(turned(poses))
    ]
    (root / "transforms.json").write_text(json.dumps({**keys, "frames": frames}))


def write_srn(root, rgba, poses, camera):
    over_white = rgba.copy()
    alpha = rgba[..., 3:] / 255.0
    over_white[..., :3] = rgba[..., :3] * alpha + 255 * (1 - alpha)
    save(root / "rgb", over_white[..., :3], pattern="{:06d}.png")
    (root / "pose").mkdir()
    for i, pose in enumerate(turned(poses)):
        (root / "pose" / f"{i:06d}.txt").write_text(" ".join(map(str, (pose @ data.FLIP).ravel())))
    f, _, cx, cy = camera
    (root / "intrinsics.txt").write_text(f"{f} {cx} {cy} 0.\n0. 0. 0.\n1.\n96 96\n")


def write_llff(root, rgba, poses, camera):
    save(root / "images_2", rgba, "masks_2")
    right, up, back, where = poses[:, :3].transpose(2, 0, 1)
    hwf = np.tile([192, 192, 2 * camera[0]], (len(poses), 1))  # of originals twice as large
    rows = np.stack([-up, right, back, where, hwf], -1).reshape(len(poses), 15)
    np.save(root / "poses_bounds.npy", np.concatenate([rows, np.full((len(poses), 2), 3.0)], 1))


def quaternion(R):
    """w, x, y, z: the eigenvector of the largest eigenvalue of Bar-Itzhack's matrix."""
    K = (
        np.array(
            [
                [R[0, 0] - R[1, 1] - R[2, 2], 0, 0, 0],
                [R[0, 1] + R[1, 0], R[1, 1] - R[0, 0] - R[2, 2], 0, 0],
                [R[0, 2] + R[2, 0], R[1, 2] + R[2, 1], R[2, 2] - R[0, 0] - R[1, 1], 0],
                [R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1], np.trace(R)],
            ]
        )
        / 3
    )
    if not np.isfinite(K).all():
        return np.full(4, np.nan)
    q = np.linalg.eigh(K)[1][:, -1]
    return q[[3, 0, 1, 2]]


def world_to_camera(poses):
    """OpenCV's (4, 4), in a world turned about some skew axis."""
    a = 0.4
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) @ TURN
    poses = poses.copy()
    poses[:, :3] = turn @ poses[:, :3]
    return np.stack([np.linalg.inv(p @ data.FLIP) if np.isfinite(p).all() else p for p in poses])


def write_colmap(root, rgba, poses, camera, text=False, model="PINHOLE"):
    root = root / "chair" / "obj7"  # MVImgNet: class/object
    save(root / "images", rgba, "masks")
    sparse = root / "sparse" / "0"
    sparse.mkdir(parents=True)
    w2c = world_to_camera(poses)
    if text:
        (sparse / "cameras.txt").write_text(
            f"# a comment\n1 {model} 96 96 " + " ".join(map(str, camera))
        )
        lines = ["# a comment"]
        for i, m in enumerate(w2c):
            lines += [
                f"{i} {' '.join(map(str, [*quaternion(m[:3, :3]), *m[:3, 3]]))} 1 {i:03d}.png",
                "1 2 -1" * (i % 2),
            ]
        (sparse / "images.txt").write_text("\n".join(lines))
    else:
        (sparse / "cameras.bin").write_bytes(struct.pack("<QIiQQ4d", 1, 1, 1, 96, 96, *camera))
        blob = struct.pack("<Q", len(w2c))
        for i, m in enumerate(w2c):
            blob += (
                struct.pack("<I7dI", i, *quaternion(m[:3, :3]), *m[:3, 3], 1)
                + f"{i:03d}.png".encode()
                + b"\0"
            )
            blob += struct.pack("<Q", i % 3) + bytes(24 * (i % 3))
        (sparse / "images.bin").write_bytes(blob)


def write_colmap_text(root, rgba, poses, camera):
    write_colmap(root, rgba, poses, camera, text=True)


def write_objaverse(root, rgba, poses, camera):
    """Photos must have the layout's own focal length: see `centred`."""
    save(root, rgba)
    for i, pose in enumerate(turned(poses)):
        np.save(
            root / f"{i:03d}.npy", np.linalg.inv(pose)[:3] if np.isfinite(pose).all() else pose[:3]
        )


WRITERS = {
    "NeRF transforms": write_transforms,
    "SRN": write_srn,
    "LLFF": write_llff,
    "COLMAP": write_colmap,
    "COLMAP text": write_colmap_text,
    "Objaverse renders": write_objaverse,
}


def centred(shots):
    """The same shots with the principal point in the middle, and the focal length of a 35 mm lens
    before a 32 mm sensor (LLFF has no principal point, Objaverse renders neither of the two)."""
    poses = torch.from_numpy(shots[1]).float()
    camera = torch.tensor([[35 / 32, 35 / 32, 0.5, 0.5]])
    rgba, _ = data.raytrace(SCENE, poses, camera.repeat(12, 1), 96)
    rgba[..., :3] /= rgba[..., 3:].clamp(min=1e-6)
    return (rgba * 255).round().byte().numpy(), shots[1], camera[0].double().numpy() * 96


def similarity(dataset, poses):
    """s, R, c of loaded camera = s R (written - c), by Procrustes; and the worst residual."""
    a, b = poses[:, :3, 3], dataset.cam2world[:, :3, 3].double().numpy()
    U, S, Vt = np.linalg.svd((b - b.mean(0)).T @ (a - a.mean(0)))
    R = U @ np.diag([1, 1, np.linalg.det(U @ Vt)]) @ Vt
    s = np.trace(R.T @ (b - b.mean(0)).T @ (a - a.mean(0))) / ((a - a.mean(0)) ** 2).sum()
    c = a.mean(0) - R.T @ b.mean(0) / s
    return s, R, c, np.abs(s * (a - c) @ R.T - b).max()


@pytest.mark.parametrize("layout", WRITERS)
def test_loader_puts_the_known_scene_into_the_cube_upright(layout, shots, tmp_path):
    rgba, poses, camera = centred(shots) if layout in ("LLFF", "Objaverse renders") else shots
    WRITERS[layout](tmp_path / "thing", rgba, poses, camera)
    d = data.load(tmp_path / "thing", 64)
    assert d.layout == layout.replace(" text", "") and d.n_objects == 1 and len(d.images) == 12
    s, R, c, residual = similarity(d, poses)
    assert residual < 1e-4  # the cameras moved as one
    assert np.abs(d.cam2world[:, :3, :3].numpy() - R @ poses[:, :3, :3]).max() < 1e-5
    assert R[1, 1] > 0.999  # y is up
    # A visual hull holds the object, and more: 12 views from 5 away leave caps, up to 10 % here.
    fill = s * (HIGH - LOW).max().item() / (2 * data.MARGIN)
    assert 0.88 < fill < 1.02
    assert np.abs(s * (c - ((LOW + HIGH) / 2).numpy())).max() < 0.08
    # Every loaded camera must see the scene, moved likewise, as the loaded picture shows it.
    R, c = torch.from_numpy(R).float(), torch.from_numpy(c).float()
    scene = [
        data.Primitive(p.kind, s * (R @ (p.centre - c)), s * p.half, p.colour, R @ p.rotation)
        for p in SCENE
    ]
    again, _ = data.raytrace(scene, d.cam2world, d.intrinsics, 64)
    off = (again[..., 3] - d.masks / 255.0).abs().sum() / again[..., 3].sum()
    assert off < 0.05
    blue = lambda x: (x[..., 2] > 1.5 * x[..., 0]) & (x[..., 2] > 1.5 * x[..., 1])
    mine, theirs = blue(again[..., :3]), blue(d.images.float())
    assert (mine & theirs).sum() > 0.8 * (mine | theirs).sum()
    # A single known point, the middle of the blue cylinder, falls on blue where it is in front.
    at = (data.project(scene[2].centre[None], d.cam2world, d.intrinsics)[:, 0] * 64).long()
    on = theirs[torch.arange(12), at[:, 1], at[:, 0]]
    assert on.sum() >= 6 and (on == mine[torch.arange(12), at[:, 1], at[:, 0]]).sum() >= 11


def test_transforms_read_camera_angle_x_with_the_alpha_as_mask(shots, tmp_path):
    rgba, poses, camera = centred(shots)
    write_transforms(tmp_path, rgba, poses, camera)
    by_focal = data.load(tmp_path, 48)
    meta = json.loads((tmp_path / "transforms.json").read_text())
    meta = {"camera_angle_x": 2 * np.arctan(16 / 35), "frames": meta["frames"]}
    (tmp_path / "transforms.json").unlink()
    (tmp_path / "transforms_train.json").write_text(json.dumps(meta))
    by_angle = data.load(tmp_path, 48)
    torch.testing.assert_close(by_angle.intrinsics, by_focal.intrinsics)
    torch.testing.assert_close(by_angle.cam2world, by_focal.cam2world)


def test_absent_frames_and_absent_masks_are_skipped_and_counted(shots, tmp_path):
    write_transforms(tmp_path, *shots, masks="masks")
    for i in (2, 5, 7):
        (tmp_path / "images" / f"{i:03d}.png").unlink()
    (tmp_path / "masks" / "000.png").unlink()
    d = data.load(tmp_path, 32)
    assert len(d.images) == 8
    assert sorted(d.skipped) == ["1 views have no mask", "3 listed frames have no file"]


def test_lens_distortion_is_undone(shots, tmp_path):
    rgba, poses, camera = shots
    lens = dict(k1=-0.8, k2=0.3, p1=0.05, p2=-0.06)
    fx, fy, cx, cy = camera
    xd, yd = np.meshgrid((np.arange(96) + 0.5 - cx) / fx, (np.arange(96) + 0.5 - cy) / fy)
    x, y = xd, yd
    for _ in range(40):  # where a distorted pixel came from
        r2 = x * x + y * y
        radial = 1 + lens["k1"] * r2 + lens["k2"] * r2**2
        dx = 2 * lens["p1"] * x * y + lens["p2"] * (r2 + 2 * x * x)
        dy = lens["p1"] * (r2 + 2 * y * y) + 2 * lens["p2"] * x * y
        x, y = (xd - dx) / radial, (yd - dy) / radial
    grid = torch.from_numpy(
        np.stack([2 * (fx * x + cx) / 96 - 1, 2 * (fy * y + cy) / 96 - 1], -1)
    ).float()
    planes = torch.from_numpy(rgba).permute(0, 3, 1, 2).float()
    bent = torch.nn.functional.grid_sample(
        planes, grid.expand(12, -1, -1, -1), align_corners=False
    )
    bent = bent.permute(0, 2, 3, 1).round().byte().numpy()
    write_transforms(tmp_path, bent, poses, camera, **lens)
    views, _ = data.read_transforms(tmp_path, 64, Counter())
    straight = np.stack([data.read_view(v)[0] for v in views])
    true, straight, bent = (x[..., 3] > 127 for x in (rgba, straight, bent))
    assert (bent != true).sum() > 0.06 * true.sum()
    assert (straight != true).sum() < 0.01 * true.sum()


def test_windows_follow_small_objects_through_the_intrinsics(shots, tmp_path):
    rgba, poses, camera = shots
    wide = np.zeros((12, 150, 240, 4), np.uint8)  # not square, object off centre
    wide[:, 40:136, 100:196] = rgba
    write_transforms(tmp_path, wide, poses, camera + [0, 0, 100, 40], w=240, h=150)
    d = data.load(tmp_path, 64)
    boxes = data.mask_box(d.masks)
    assert ((boxes[:, 1::2] + boxes[:, ::2]) / 2 - 32).abs().max() < 1.5
    assert (boxes[:, 1::2] - boxes[:, ::2]).max() == pytest.approx(64 / 1.15, abs=1.5)
    middle = data.project(torch.zeros(1, 3), d.cam2world, d.intrinsics)[:, 0]
    assert (middle - 0.5).abs().max() < 0.15 and d.intrinsics[:, 2].std() > 0.005


def test_a_folder_of_many_objects_is_many_objects_in_order(shots, tmp_path):
    for name in ("b", "a"):
        write_transforms(tmp_path / name, *shots)
    d = data.load(tmp_path, 32)
    assert d.names == ["a", "b"] and d.object_index.bincount().tolist() == [12, 12]
    assert data.load(tmp_path, 32, objects="b").names == ["b"]
    with pytest.raises(BadInput, match="no object c; there are: a, b"):
        data.load(tmp_path, 32, objects="b,c")


def test_captions_are_read_from_three_places_and_bad_ones_refused_by_name(shots, tmp_path):
    for name in ("chair", "lamp", "vase"):
        write_transforms(tmp_path / name, *shots)
    (tmp_path / "chair" / "caption.txt").write_text("a chair\n")
    (tmp_path / "captions.txt").write_text("lamp: a lamp: green\n\n")
    (tmp_path / "captions.json").write_text('{"vase": "a vase"}')
    assert data.load(tmp_path, 16).captions == ["a chair", "a lamp: green", "a vase"]
    assert data.load(tmp_path, 16, objects="vase").captions == ["a vase"]
    for name, content, says in (("captions.txt", "lamp a lamp", "expected lines NAME: CAPTION"),
                                ("captions.txt", "sofa: a sofa", "no object is called sofa"),
                                ("captions.json", '["a lamp"]', 'expected {"NAME": "CAPTION"}'),
                                ("captions.json", '{"lamp": 3}', 'expected {"NAME": "CAPTION"}')):
        kept = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content)
        with pytest.raises(data.BadInput, match=re.escape(says)):
            data.load(tmp_path, 16)
        (tmp_path / name).write_text(kept)


def test_srn_takes_white_for_background(shots, tmp_path):
    write_srn(tmp_path, *shots)
    d = data.load(tmp_path, 96)
    assert d.images[d.masks == 0].max() == 0 and 0.02 < (d.masks > 0).float().mean() < 0.5


# ---------------------------------------------------------------- COIL-100
def test_components_separate_what_touches_only_at_corners():
    mask = np.zeros((2, 6, 7), bool)
    mask[0, 1:4, 1] = mask[0, 3, 1:6] = mask[0, 1:4, 5] = True  # a U: one component
    mask[0, 0, 0] = mask[1, 2, 2] = mask[1, 3, 3] = True  # corners do not connect
    label = data.components(mask)
    assert len(np.unique(label[0][mask[0]])) == 2 and len(np.unique(label[1][mask[1]])) == 2
    assert (label[~mask] == 0).all() and len(np.unique(label[0, 1:][mask[0, 1:]])) == 1


def test_holes_are_filled_up_to_their_limit_and_bays_never():
    mask = np.zeros((1, 12, 12), bool)
    mask[0, 1:11, 1:11] = True
    mask[0, 2:4, 2:4] = mask[0, 5:8, 5:8] = mask[0, 9:, 9] = False  # 4 and 9 pixels, and a bay
    filled = mask.copy()
    filled[0, 2:4, 2:4] = True
    assert (data.fill_holes(mask, 8) == filled).all()
    filled[0, 5:8, 5:8] = True
    assert (data.fill_holes(mask) == filled).all()


def test_coil_mask_fills_dark_holes_and_drops_specks():
    photo = np.full((1, 40, 40, 3), 26, np.uint8)
    photo[0, 10:30, 8:32] = 180
    photo[0, 15:20, 15:20] = 5  # a dark part of the object
    photo[0, 2:4, 2:4] = 200  # a speck
    truth = np.zeros((1, 40, 40), bool)
    truth[0, 10:30, 8:32] = True
    assert (data.coil_masks(photo) == truth).all()


def write_coil(root, angles=range(0, 360, 15)):
    """A lopsided thing on COIL's own turntable, then cut to its box as COIL's photos are."""
    parts = [
        box((0, 0, 0), (0.4, 0.9, 0.3), (0.9, 0.3, 0.3)),
        box((0, -0.6, 0.32), (0.15, 0.2, 0.1), (0.3, 0.3, 0.9)),
    ]
    a, e = np.radians(list(angles)), np.radians(data.COIL_ELEVATION)
    back = np.stack([np.sin(a) * np.cos(e), np.sin(e) + 0 * a, np.cos(a) * np.cos(e)], 1)
    camera = torch.tensor([[6.0, 6, 0.5, 0.5]]).repeat(len(a), 1)
    rgba, _ = data.raytrace(parts, data.look_at(data.COIL_DISTANCE * back), camera, 128)
    root.mkdir(parents=True, exist_ok=True)
    for angle, image in zip(angles, (rgba[..., :3] * 229 + 26).byte().numpy()):
        iio.imwrite(root / f"obj3__{angle}.png", image)
    return parts


def test_coil_cameras_go_round_so_that_the_front_moves_left(tmp_path):
    write_coil(tmp_path)
    d = data.load(tmp_path, 64)
    assert d.layout == "COIL-100" and d.names == ["obj3"] and len(d.images) == 24
    angle = torch.atan2(d.cam2world[:, 0, 3], d.cam2world[:, 2, 3]).rad2deg() % 360
    torch.testing.assert_close(
        angle, torch.arange(0, 360.0, 15), atol=1e-3, rtol=0
    )  # by number, not text
    front = torch.tensor([[0.0, 0, 0.5]])
    x = data.project(front, d.cam2world[:3], d.intrinsics[:3])[:, 0, 0]
    assert (x.diff() < 0).all()
    blue = d.images[:6, ..., 2].float() - d.images[:6, ..., 0].float() > 0
    middle = torch.stack([b.nonzero()[:, 1].float().mean() / 64 for b in blue])
    expected = data.project(torch.tensor([[0.0, -0.6, 0.42]]), d.cam2world[:6], d.intrinsics[:6])[
        :, 0, 0
    ]
    assert (middle - expected).abs().max() < 0.05


@pytest.mark.parametrize("shape", [(64, 64, 3), (128, 64, 3), (64, 128, 3)])
def test_coil_photos_of_another_size_are_refused_by_name(tmp_path, shape):
    write_coil(tmp_path)
    iio.imwrite(tmp_path / "obj3__30.png", np.full(shape, 200, np.uint8))
    with pytest.raises(BadInput, match="obj3__30.png: .* pixels"):
        data.load(tmp_path, 32)


@pytest.mark.parametrize("grey", [0, 40])      # black; all corners bright enough to be flooded
def test_a_coil_view_without_an_object_is_refused_by_name(tmp_path, grey):
    write_coil(tmp_path)
    iio.imwrite(tmp_path / "obj3__30.png", np.full((128, 128, 3), grey, np.uint8))
    with pytest.raises(BadInput, match="obj3__30.png: this view is black"):
        data.load(tmp_path, 32)


def test_coil_zoom_keeps_the_object_one_size_in_the_world(tmp_path):
    write_coil(tmp_path)
    before = data.load(tmp_path, 64)
    for i, path in enumerate(sorted(tmp_path.glob("*.png"))):  # zoom half of the views by 2/3
        if i % 2:
            small = np.full((128, 128, 3), 26, np.uint8)
            photo = torch.from_numpy(iio.imread(path)).permute(2, 0, 1)[None].float()
            photo = torch.nn.functional.interpolate(
                photo, size=(86, 86), mode="bilinear", antialias=True
            )
            small[30:116, 10:96] = photo[0].permute(1, 2, 0).byte()
            iio.imwrite(path, small)
    after = data.load(tmp_path, 64)
    points = torch.rand(50, 3) - 0.5

    def relative(d):  # in units of the object's box
        left, right, top, bottom = data.mask_box(d.masks).T[..., None] / 64
        u, v = data.project(points, d.cam2world, d.intrinsics).unbind(-1)
        return torch.stack([(u - left) / (right - left), (v - top) / (bottom - top)], -1)

    assert (relative(before) - relative(after)).abs().max() < 0.06


# ---------------------------------------------------------------- clips
def made_clip(n=20, size=64, side=20, noise=3.0, still=False, seed=0):
    """A square that walks to and fro before a noisy wall: frames (n, S, S, 3), masks (n, S, S)."""
    rng = np.random.default_rng(seed)
    frames = np.array([120.0, 110, 95]) + rng.normal(0, noise, (n, size, size, 3))
    masks = np.zeros((n, size, size), bool)
    for i in range(n):
        x = 22 + (0 if still else round(14 * np.sin(i / 2)))
        masks[i, 24:24 + side, x:x + side] = True
    frames[masks] += np.array([60.0, -60, 20])
    return frames.clip(0, 255).round().astype(np.uint8), masks


def write_strip(path, frames):
    iio.imwrite(path, np.concatenate(list(frames), 1))


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_background_model_finds_a_square_that_walks_and_one_that_stands_still_in_part():
    frames, masks = made_clip()
    assert iou(data.subtract_background(frames, "clip"), masks) > 0.95
    body = np.zeros_like(masks)
    body[:, 44:, 26:38] = True  # legs that never move
    frames[body] = np.array([40, 50, 140])
    frames[3, 5:8, 5:8] = 255  # a speck, for a moment
    found = data.subtract_background(frames, "clip")
    assert iou(found, masks | body) > 0.95 and not found[3, :10, :10].any()


def test_background_model_leaves_shadows_out():
    frames, masks = made_clip(noise=1.0)
    shadow = np.roll(masks, 20, 1) & ~masks  # below the square, wherever it goes
    frames[shadow] = (0.87 * frames[shadow]).astype(np.uint8)
    assert iou(data.subtract_background(frames, "clip"), masks) > 0.95


def test_a_strip_is_cropped_once_for_the_whole_clip_and_fills_the_frame(tmp_path):
    frames, masks = made_clip()
    write_strip(tmp_path / "walk.png", frames)
    write_strip(tmp_path / "other.png", made_clip(9, size=80)[0])  # another size, another length
    d = data.load(tmp_path, 32)
    assert d.names == ["other", "walk"] and d.object_index.bincount().tolist() == [9, 20]
    walk = d.masks[d.frames_of(1)] > 127
    left, right = masks.any((0, 1)).nonzero()[0][[0, -1]]
    zoom = 0.95 * 32 / (right + 1 - left)  # wider than high: the width decides
    box = data.mask_box(walk.byte())
    assert box[:, 0].min() == pytest.approx(0.025 * 32, abs=1.1)
    assert (box[:, 1] - box[:, 0]).mean() == pytest.approx(20 * zoom, abs=1)
    centre = masks.any(1).argmax(1) - masks.any(1).argmax(1).mean()  # it moves as it did
    moved = (box[:, 0] - box[:, 0].mean()).numpy()
    assert np.abs(moved - centre * zoom).max() < 1.5
    assert (d.images[d.masks == 0] == 0).all()
    cam2world, intrinsics = data.fixed_camera(29)
    assert torch.equal(d.cam2world, cam2world) and torch.equal(d.intrinsics, intrinsics)
    u = data.project(torch.tensor([[1.0527, 0, 0]]), cam2world[:1], intrinsics[:1])[0, 0]
    torch.testing.assert_close(u, torch.tensor([1.0, 0.5]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webm", "a.avi"])
def test_videos_are_read_back_with_all_their_frames(name, tmp_path):
    frames, masks = made_clip(12, noise=0)
    how = dict(plugin="FFMPEG", fps=10, macro_block_size=1) if name != "a.gif" else dict(loop=0)
    how |= dict(codec="libvpx-vp9") if name == "a.webm" else {}
    iio.imwrite(tmp_path / name, frames, **how)
    clip = data.read_clip(tmp_path / name, 64)
    assert clip.shape == (12, 64, 64, 4)
    assert np.abs(clip[..., :3].astype(float) - frames).mean() < 8
    assert iou(data.subtract_background(clip[..., :3], "a"), masks) > 0.85
    assert data.read_clip(tmp_path / name, 32).shape == (12, 32, 32, 4)


@pytest.mark.parametrize("where", ["alpha", "beside images"])
def test_masks_of_a_folder_of_frames_are_used_as_they_are(where, tmp_path):
    frames, masks = made_clip(6, still=True)  # no motion: only masks can tell
    rgba = np.concatenate([frames, (255 * masks[..., None]).astype(np.uint8)], -1)
    if where == "alpha":
        save(tmp_path / "a", rgba)
    else:
        save(tmp_path / "a" / "images", rgba, "masks")
    clip = data.read_clip(tmp_path / "a", 64)
    np.testing.assert_array_equal(clip[..., 3] > 127, masks)
    cover = data.load(tmp_path, 30).masks.float().mean() / 255
    assert cover == pytest.approx(0.9**2, abs=0.03)  # a square 90 % as high as the frame


def test_frames_are_read_in_the_order_of_their_numbers_and_those_without_mask_left_out(tmp_path):
    frames, masks = made_clip(12, still=True)
    (tmp_path / "a" / "images").mkdir(parents=True)
    (tmp_path / "a" / "masks").mkdir()
    for i, (frame, mask) in enumerate(zip(frames, masks)):
        frame[:4] = 20 * i                                       # tells the frames apart
        iio.imwrite(tmp_path / "a" / "images" / f"{i}.png", frame)
        if i != 7:
            iio.imwrite(tmp_path / "a" / "masks" / f"{i}.png", (mask * 255).astype(np.uint8))
    clip = data.read_clip(tmp_path / "a", 64)
    assert clip[:, 0, 0, 0].tolist() == [20 * i for i in range(12)]
    d = data.load(tmp_path, 32)
    assert len(d.images) == 11 and any("1 frames have no mask" in line for line in d.skipped)


def test_clip_filter_drops_ends_thin_frames_and_short_clips(tmp_path):
    frames, masks = made_clip(20, side=24, still=True)
    for name, n in (("long", 20), ("short", 4)):
        mask = masks[:n].copy()
        mask[9 if n == 20 else 3, 26:] = False  # a thin frame each
        alpha = (255 * mask[..., None]).astype(np.uint8)
        save(tmp_path / name, np.concatenate([frames[:n], alpha], -1))
    d = data.load(tmp_path, 32)
    assert d.object_index.bincount().tolist() == [20, 4]
    d = data.load(tmp_path, 32, clip_filter=True)
    assert d.names == ["long"] and len(d.images) == 20 - 2 * 2 - 1
    assert any("1 clips have under 4" in line for line in d.skipped)
    assert any("25 % foreground" in line for line in d.skipped)
    with pytest.raises(BadInput, match="1 clips have under 4 frames left"):
        data.load(tmp_path, 32, objects="short", clip_filter=True)


def test_the_end_of_every_clip_is_held_out(puppets, tmp_path):
    assert torch.equal(puppets.heldout, (torch.arange(24) >= 20).repeat(3))
    write_strip(tmp_path / "a.png", made_clip(13)[0])
    write_strip(tmp_path / "b.png", made_clip(5)[0])  # too short: keeps all
    for holdout, expected in [(6, [11, 12]), (4, [10, 11, 12, 17]), (0, []), (14, [])]:
        d = data.load(tmp_path, 16, holdout)
        assert d.moving and d.truth is None and d.heldout.nonzero()[:, 0].tolist() == expected


def test_only_clips_are_taken_for_clips(tmp_path):
    photo = np.zeros((32, 32, 3), np.uint8)
    for name in ("coil/obj1__0.png", "coil/obj1__5.png", "loose/a.png", "loose/wide.png",
                 "scene/images/0.png", "scene/masks/0.png", "nerf/a/train/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(tmp_path / name, np.tile(photo, (1, 5, 1)) if "wide" in name else photo)
    (tmp_path / "nerf" / "a" / "transforms.json").write_text("{}")
    for name in ("loose", "scene", "scene/images"):
        with pytest.raises(BadInput, match="no layout recognised.*clips, which are videos"):
            data.load(tmp_path / name, 32)
    with pytest.raises(BadInput, match="coil.*black"):  # cameras come first
        data.load(tmp_path / "coil", 32)
    with pytest.raises(BadInput, match="nerf/a"):
        data.load(tmp_path / "nerf", 32)


def test_bad_clips_are_refused_by_name_in_one_line(tmp_path):
    def refuses(says, path="a"):
        with pytest.raises(BadInput, match=says) as err:
            data.load(tmp_path, 32)
        assert str(tmp_path / path) in str(err.value) and "\n" not in str(err.value).strip()
        for file in sorted(tmp_path.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
    frames = made_clip(6)[0]
    (tmp_path / "a").mkdir()
    iio.imwrite(tmp_path / "a" / "0.png", frames[0])
    refuses("1 frame.*at least 2")
    (tmp_path / "a").mkdir()
    iio.imwrite(tmp_path / "a" / "0.png", frames[0])
    iio.imwrite(tmp_path / "a" / "1.png", frames[1, :40])
    refuses("64x40 and 64x64.*all of one size")
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(500))
    refuses("not a readable video.*re-encode", "a.mp4")
    (tmp_path / "a.gif").write_bytes(b"GIF89a" + bytes(20))
    refuses("not a readable video", "a.gif")
    write_strip(tmp_path / "a.png", frames)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:9000])
    refuses("truncated or not an image", "a.png")
    write_strip(tmp_path / "a.png", made_clip(6, noise=1.0, still=True)[0])
    refuses("nothing moves.*give masks", "a.png")
    wall = made_clip(8, noise=1.0, side=0)[0]
    wall[::3, 20:40, 20:40] = (0.87 * wall[::3, 20:40, 20:40]).astype(np.uint8)  # only a shadow
    write_strip(tmp_path / "a.png", wall)
    refuses("nothing stands before the background in 8 of its 8", "a.png")


# ---------------------------------------------------------------- bad input
def damage_pose(rgba, poses, camera):
    poses = poses.copy()
    poses[3, 0, 3] = np.nan
    return rgba, poses, camera


def damage_rotation(rgba, poses, camera):
    poses = poses.copy()
    poses[3, :3, :3] *= 1.5
    return rgba, poses, camera


def damage_focal(rgba, poses, camera):
    return rgba, poses, camera * [0, 0, 1, 1]


def damage_mask(rgba, poses, camera):
    rgba = rgba.copy()
    rgba[4, ..., 3] = 0
    return rgba, poses, camera


def damage_size(rgba, poses, camera):
    return [*rgba[:5], rgba[5][:64, :64], *rgba[6:]], poses, camera


def damage_convention(rgba, poses, camera):
    return rgba, poses @ data.FLIP, camera


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize(
    "damage, says",
    [
        (damage_pose, "finite|numbers"),
        (damage_rotation, "not a rotation"),
        (damage_focal, "focal length"),
        (damage_mask, "mask is empty"),
        (damage_size, "96"),
        (damage_convention, "convention"),
    ],
)
def test_damaged_views_are_refused_in_one_line(layout, damage, says, shots, tmp_path):
    if (
        damage is damage_focal
        and layout == "Objaverse renders"  # has no focal length
        or damage is damage_rotation
        and layout.startswith("COLMAP")  # a quaternion is a rotation
        or damage is damage_convention
        and layout == "Objaverse renders"
    ):  # it takes either
        pytest.skip("cannot happen in this layout")
    rgba, poses, camera = shots
    if damage is damage_size and layout == "SRN":
        with pytest.raises(BadInput):
            WRITERS[layout](tmp_path, rgba, poses, camera)
            iio.imwrite(tmp_path / "rgb" / "000005.png", rgba[5, :64, :64, :3])
            data.load(tmp_path, 32)
        return
    WRITERS[layout](tmp_path, *damage(rgba, poses, camera))
    with pytest.raises(BadInput, match=says) as err:
        data.load(tmp_path, 32)
    assert str(tmp_path) in str(err.value) and "\n" not in str(err.value)


@pytest.mark.parametrize("layout", [*WRITERS, "COIL-100"])
def test_a_truncated_photo_is_refused_by_name(layout, shots, tmp_path):
    WRITERS.get(layout, lambda root, *_: write_coil(root))(tmp_path, *shots)
    photo = sorted(p for p in tmp_path.rglob("*.png") if "masks" not in p.parent.name)[1]
    photo.write_bytes(photo.read_bytes()[: -len(photo.read_bytes()) // 2])
    with pytest.raises(BadInput, match="truncated") as err:
        data.load(tmp_path, 32)
    assert str(photo) in str(err.value)


@pytest.mark.parametrize(
    "layout, file",
    [
        ("SRN", "intrinsics.txt"),
        ("LLFF", "images_2/003.png"),
        ("COLMAP", "chair/obj7/sparse/0/cameras.bin"),
        ("COLMAP text", "chair/obj7/sparse/0/cameras.txt"),
    ],
)
def test_a_missing_file_is_refused(layout, file, shots, tmp_path):
    WRITERS[layout](tmp_path, *shots)
    (tmp_path / file).unlink()
    with pytest.raises(BadInput, match=str(tmp_path)):
        data.load(tmp_path, 32)


@pytest.mark.parametrize(
    "layout, file, content",
    [
        ("NeRF transforms", "transforms.json", '{"frames": [{"file_path"'),
        ("NeRF transforms", "transforms.json", "[]"),
        ("NeRF transforms", "transforms.json", '{"frames": []}'),
        ("SRN", "pose/000002.txt", "1 0 0 0"),
        ("SRN", "pose/000002.txt", "1 0 0 x"),
        ("SRN", "intrinsics.txt", "131"),
        ("COLMAP", "chair/obj7/sparse/0/images.bin", "short"),
        ("COLMAP text", "chair/obj7/sparse/0/images.txt", "1 0 0"),
        ("LLFF", "poses_bounds.npy", "not numpy"),
        ("Objaverse renders", "002.npy", "not numpy"),
    ],
)
def test_a_damaged_text_or_array_is_refused(layout, file, content, shots, tmp_path):
    WRITERS[layout](tmp_path, *shots)
    (tmp_path / file).write_text(content)
    with pytest.raises(BadInput, match=str(tmp_path)):
        data.load(tmp_path, 32)


def test_a_matrix_of_the_wrong_shape_is_refused(shots, tmp_path):
    write_transforms(tmp_path / "a", *shots)
    path = tmp_path / "a" / "transforms.json"
    meta = json.loads(path.read_text())
    meta["frames"][1]["transform_matrix"] = np.eye(3).tolist()
    path.write_text(json.dumps(meta))
    with pytest.raises(BadInput, match=r"001.*shape \(3, 3\)"):
        data.load(tmp_path / "a", 32)
    write_objaverse(tmp_path / "b", *shots)
    np.save(tmp_path / "b" / "002.npy", np.eye(4))
    with pytest.raises(BadInput, match=r"002.*shape \(4, 4\)"):
        data.load(tmp_path / "b", 32)
    write_llff(tmp_path / "c", *shots)
    np.save(tmp_path / "c" / "poses_bounds.npy", np.zeros((12, 15)))
    with pytest.raises(BadInput, match="17 numbers"):
        data.load(tmp_path / "c", 32)


def test_photos_without_masks_are_refused_with_what_to_provide(shots, tmp_path):
    write_transforms(tmp_path, shots[0][..., :3], *shots[1:])
    with pytest.raises(BadInput, match="photos without masks: provide"):
        data.load(tmp_path, 32)


def test_an_unknown_colmap_model_is_refused_by_name(shots, tmp_path):
    write_colmap(tmp_path, *shots, text=True, model="OPENCV_FISHEYE")
    with pytest.raises(BadInput, match="OPENCV_FISHEYE is not known"):
        data.load(tmp_path, 32)


def test_no_path_no_folder_no_layout(tmp_path):
    with pytest.raises(BadInput, match="no such folder"):
        data.load(tmp_path / "nowhere", 32)
    with pytest.raises(BadInput, match="Known are: transforms.json"):
        data.load(tmp_path, 32)
    write_coil(tmp_path)
    iio.imwrite(tmp_path / "obj3__30.png", np.zeros((128, 128, 3), np.uint8))
    with pytest.raises(BadInput, match="obj3.*empty"):
        data.load(tmp_path, 32)


# ---------------------------------------------------------------- command line
def run(*args, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "data.py"), *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def test_command_line_names_what_it_found_and_draws_it(shots, tmp_path):
    write_transforms(tmp_path / "thing", *shots)
    (tmp_path / "thing" / "images" / "004.png").unlink()
    done = run("--data", tmp_path / "thing", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in (
        "NeRF transforms",
        "11: 11 to 11 an object",
        "64 x 64",
        "elevation",
        "1 listed frames have no file",
    ):
        assert word in done.stdout
    assert iio.imread(tmp_path / "out" / "sheet.png").shape == (64, 12 * 64, 3)
    assert iio.imread(tmp_path / "out" / "cameras.png").std() > 5


def test_command_line_errors_are_one_line_and_status_2(tmp_path):
    done = run("--data", tmp_path / "nowhere", cwd=tmp_path)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )
    assert not list(tmp_path.iterdir())  # nothing half-written
    done = run("--dat", "x", cwd=tmp_path)
    assert (
        done.returncode == 2
        and "did you mean --data?" in done.stderr
        and done.stderr.count("\n") == 1
    )


def test_command_line_says_of_clips_that_cameras_are_unknown(tmp_path):
    (tmp_path / "clips").mkdir()
    write_strip(tmp_path / "clips" / "a.png", made_clip(12)[0])
    args = "--data", tmp_path / "clips", "--size", 32, "--out", tmp_path / "out"
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("clips", "cameras   unknown", "12: 12 to 12 an object; 2 held out"):
        assert word in done.stdout
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["sheet.png"]
    done = run(*args, "--clip-filter", cwd=tmp_path)  # the square is too small for it
    assert done.returncode == 2 and "under 4 frames" in done.stderr


# ---------------------------------------------------------------- real photos
def silhouettes_explained(dataset, k):
    """Share of the masks that the masks' own visual hull covers when it is seen again."""
    frames = dataset.frames_of(k)
    masks, poses, camera = (
        dataset.masks[frames],
        dataset.cam2world[frames],
        dataset.intrinsics[frames],
    )
    inside = data.hull(masks, poses, camera, np.full(3, -1.05), np.full(3, 1.05))
    points = (inside.nonzero() + 0.5) / 48 * 2.1 - 1.05
    S, covered = 24, torch.zeros(len(frames), 24, 24, dtype=torch.bool)
    at = (data.project(points, poses, camera) * S).long().clamp(0, S - 1)
    covered[torch.arange(len(frames))[:, None], at[..., 1], at[..., 0]] = True
    truth = (
        torch.nn.functional.interpolate(masks[:, None].float(), size=(S, S), mode="area")[:, 0]
        > 127
    )
    return ((covered & truth).sum() / (covered | truth).sum()).item()


@needs_real
def test_llff_axes_agree_with_the_visual_hull_of_the_head(tmp_path):
    d = data.load(REAL / "ethiopian_head", 64)
    assert d.layout == "LLFF" and len(d.images) == 66 and int(d.heldout.sum()) == 11
    assert silhouettes_explained(d, 0) > 0.85
    rows = np.load(REAL / "ethiopian_head" / "poses_bounds.npy")
    matrix = rows[:, :15].reshape(-1, 3, 5).copy()
    # Written so that the right reading becomes the wrong one, [right, up, backwards].
    matrix[:, :, :2] = np.stack([-matrix[:, :, 1], matrix[:, :, 0]], -1)
    rows[:, :15] = matrix.reshape(-1, 15)
    np.save(tmp_path / "poses_bounds.npy", rows)
    for name in ("images_8", "masks_8"):
        (tmp_path / name).symlink_to(REAL / "ethiopian_head" / name)
    wrong = data.load(tmp_path, 64)  # looks nearly right
    assert silhouettes_explained(wrong, 0) < 0.75  # measured: 0.70, and 0.89 for the right one


@needs_real
def test_lego_fills_the_cube_upright():
    d = data.load(REAL / "lego", 64)
    assert len(d.images) == 100 and (d.cam2world[:, 1, 3] > 0).all()  # all photographed from above
    assert silhouettes_explained(d, 0) > 0.8


@needs_real
def test_coil_cameras_explain_the_silhouettes():
    d = data.load(REAL / "coil100", 64, objects="obj5,obj13,obj41,obj65")
    assert d.names == ["obj5", "obj13", "obj41", "obj65"]
    for k in range(4):
        assert silhouettes_explained(d, k) > 0.85, d.names[k]


@needs_real
def test_weizmann_is_28_clips_whose_masks_are_people():
    d = data.load(REAL / "weizmann", 64)
    assert d.n_objects == 28 and d.object_index.bincount().min() == 51
    cover = d.masks.float().mean((1, 2)) / 255
    assert 0.05 < cover.min() and cover.max() < 0.6
    left, right, top, bottom = data.mask_box(d.masks).T / 64
    tall = torch.stack([(bottom - top)[d.frames_of(k)].max() for k in range(28)])
    assert tall.min() > 0.5 and tall.max() < 0.95
