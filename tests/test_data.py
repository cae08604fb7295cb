"""data.py: made-up objects against closed forms, every layout of photos against a known scene."""

import gc
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import evaluate  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from data import BadInput, box, cylinder  # noqa: E402
from render import orbit, project  # noqa: E402

REAL = ROOT.parent / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real photos are not at {REAL}")

READING = data.Reading(size=64)
WHITE = (1.0, 1.0, 1.0)
RED, GREEN, BLUE = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


# ---------------------------------------------------------------- primitives, closed forms
def shoot(part, origin, direction):
    """The distance at which one ray enters the part."""
    return part.hit(torch.tensor([origin]), torch.tensor([direction])).item()


def test_a_ray_enters_a_box_at_a_known_distance():
    part = box((0, 0, 1), (1, 1, 0.5), WHITE)
    assert shoot(part, [0.0, 0, 5], [0.0, 0, -2]) == pytest.approx((5 - 1.5) / 2)
    assert shoot(part, [0.0, 0, 5], [0.0, 0, 1]) == np.inf           # it is behind
    assert shoot(part, [3.0, 0, 5], [0.0, 0, -1]) == np.inf          # it is beside
    assert shoot(part, [0.0, 0, 1], [0.0, 0, 1]) == np.inf           # the ray starts inside


def test_a_ray_enters_a_cylinder_through_its_side_or_its_cap():
    part = cylinder((0, 0, 0), 0.5, 1, WHITE)
    aside = (0.5**2 - 0.3**2) ** 0.5                     # z of the surface at x = 0.3
    assert shoot(part, [0.3, 0, 5], [0.0, 0, -1]) == pytest.approx(5 - aside, abs=1e-5)
    assert shoot(part, [0.3, 4, 0], [0.0, -1, 0]) == pytest.approx(3, abs=1e-4)
    assert shoot(part, [0.6, 4, 0], [0.0, -1, 0]) == np.inf


def test_a_wheel_is_a_cylinder_that_is_thin_along_x():
    part = data.wheel((0, 0, 0), 0.5, 0.1, WHITE)
    assert shoot(part, [4.0, 0.2, 0], [-1.0, 0, 0]) == pytest.approx(3.9, abs=1e-4)
    assert shoot(part, [0.0, 4, 0], [0.0, -1, 0]) == pytest.approx(3.5, abs=1e-4)


def test_a_ray_enters_a_ball_at_a_known_distance_and_its_normal_points_out():
    part = data.ball((1, 0, 0), (0.5, 0.5, 2), WHITE)
    z = 2 * (1 - 0.6**2) ** 0.5                          # x = 0.3 is 0.6 half axes off
    assert shoot(part, [1.3, 0, 9], [0.0, 0, -1]) == pytest.approx(9 - z, abs=1e-5)
    assert shoot(part, [1.3, 0.41, 9], [0.0, 0, -1]) == np.inf
    normal = part.normal_at(torch.tensor([[1.3, 0, z]]))
    gradient = torch.tensor([[0.3 / 0.5**2, 0, z / 2**2]])
    torch.testing.assert_close(normal, gradient / gradient.norm())


def test_a_box_leans_its_top_towards_the_front_by_its_tilt():
    part = box((0, 0, 0), (0.1, 1, 0.1), WHITE, tilt=0.3)
    points = data.corners(part)
    top = points[points[:, 1] > 0].mean(0)
    torch.testing.assert_close(top, torch.tensor([0, np.cos(0.3), np.sin(0.3)]).float())


def test_normals_point_out_of_the_face_that_is_nearest():
    part = box((1, 0, 0), (1, 2, 3), WHITE)
    points = torch.tensor([[2.0, 1.5, 2.5], [0.5, -2, 1], [0.2, 0.3, 3]])
    expected = torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, 1]])
    torch.testing.assert_close(part.normal_at(points), expected)
    part = cylinder((0, 0, 0), 2, 1, WHITE)
    points = torch.tensor([[2 * 0.6, 0.5, 2 * 0.8], [0.1, 1, 0.1]])
    expected = torch.tensor([[0.6, 0, 0.8], [0, 1, 0]])
    torch.testing.assert_close(part.normal_at(points), expected)


def test_inside_is_what_satisfies_every_side():
    points = torch.tensor([[0.9, 0.9, 0.9], [0.9, 0.9, 0], [0.6, 0.6, 0.5], [0, 1.1, 0]])
    boxed = evaluate.inside(box((0, 0, 0), (1, 1, 1), WHITE), points)
    standing = evaluate.inside(cylinder((0, 0, 0), 1, 1, WHITE), points)
    round_ = evaluate.inside(data.ball((0, 0, 0), (1, 1, 1), WHITE), points)
    assert boxed.tolist() == [True, True, True, False]
    assert standing.tolist() == [False, True, True, False]
    assert round_.tolist() == [False, False, True, False]


# ---------------------------------------------------------------- their pictures
FRONT = orbit(torch.zeros(1), 0.0, 4.0)                  # one camera, 4 in front
CAMERA = torch.tensor([[1.0, 1.0, 0.5, 0.5]])


def test_a_box_seen_head_on_covers_its_exact_share_of_the_picture():
    part = box((0, 0, -0.5), (0.8, 0.4, 0.5), (0.9, 0.5, 0.1))       # its face is 4 away
    rgba = data.raytrace([part], FRONT, CAMERA, 40, 5)[0]
    assert rgba[..., 3].mean().item() == pytest.approx(4 * 0.8 * 0.4 / 4**2, abs=1e-6)
    assert rgba[0].sum() == 0


def test_a_face_is_as_bright_as_the_cosine_to_the_light_and_ambient_light_say():
    colour = (0.9, 0.5, 0.1)
    part = box((0, 0, 0), (0.8, 0.4, 0.5), colour)
    middle = data.raytrace([part], FRONT, CAMERA, 40)[0, 20, 20]
    shade = data.AMBIENT + (1 - data.AMBIENT) * data.LIGHT[2]        # its normal is z
    expected = torch.tensor([*(shade * torch.tensor(colour)), 1.0])
    torch.testing.assert_close(middle, expected)
    assert data.LIGHT.norm().item() == pytest.approx(1, abs=1e-3)


def test_a_picture_shows_up_right_and_near_where_they_are():
    up = box((0, 1, 0), (0.2, 0.2, 0.2), RED)
    right = box((0.8, 0, 0), (0.2, 0.2, 0.2), GREEN)
    near = box((0, 0, 0.5), (0.2, 0.2, 0.2), BLUE)
    far = box((0, 0, -1), (0.25, 0.25, 0.2), WHITE)
    for parts in ([far, up, right, near], [near, right, up, far]):   # in any order
        rgba = data.raytrace(parts, FRONT, CAMERA, 64)[0]
        red, green, blue, _ = rgba.unbind(-1)
        y, x = ((red > 0) & (green == 0)).nonzero().float().mean(0).tolist()
        assert y < 20 and abs(x - 31.5) < 1
        y, x = ((green > 0) & (red == 0)).nonzero().float().mean(0).tolist()
        assert x > 40 and abs(y - 31.5) < 1
        assert blue[32, 32] > 0 and red[32, 32] == 0


def test_pictures_are_those_of_renders_cameras():
    poses = orbit(torch.tensor([0.4, 2.0, -1.0]), torch.tensor([0.3, -0.2, 1.0]), 5.0)
    cameras = torch.tensor([[1.3, 1.1, 0.45, 0.6]]).repeat(3, 1)
    where = torch.tensor([0.4, 0.3, -0.2])
    part = data.ball(where.tolist(), (0.05, 0.05, 0.05), WHITE)
    mask = data.raytrace([part], poses, cameras, 64)[..., 3]
    uv, _ = project(where[None], poses, cameras)
    for view in range(3):
        y, x = mask[view].nonzero().T
        weight = mask[view, y, x]
        middle = torch.stack([(x + 0.5) * weight, (y + 0.5) * weight], -1).sum(0) / weight.sum()
        torch.testing.assert_close(middle / 64, uv[view, 0], atol=0.004, rtol=0)


def test_a_moved_part_looks_like_the_same_part_built_where_it_went():
    rest = [box((0.1, 0, 0), (0.3, 0.2, 0.4), (0.9, 0.5, 0.1)),
            cylinder((-0.5, 0, 0), 0.2, 0.3, (0.2, 0.5, 0.9)),
            data.ball((0, 0.6, 0), (0.2, 0.3, 0.1), (0.4, 0.9, 0.3))]
    moves = torch.eye(4).repeat(1, 3, 1, 1)
    there = []
    for i, part in enumerate(rest):
        pitch, yaw, roll = torch.tensor([[0.3], [0.5 - i], [0.2]])
        R = data.rotations(pitch, yaw, roll)[0]
        t = torch.tensor([0.1 * i, -0.1, 0.2])
        moves[0, i, :3, :3], moves[0, i, :3, 3] = R, t
        there.append(replace(part, centre=R @ part.centre + t, rotation=R @ part.rotation))
    camera = data.fixed_camera(1)
    still = torch.eye(4).repeat(1, 3, 1, 1)
    moved, label = data.raytrace_moving([[part] for part in rest], moves, *camera, 48)
    built, expected = data.raytrace_moving([[part] for part in there], still, *camera, 48)
    assert (label == expected).float().mean() > 0.999    # rounding, on an edge or two
    assert (moved - built).abs().mean() < 1e-4 and moved[..., 3].mean() > 0.1
    assert label.unique().tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------- the synthetic set
@pytest.fixture(scope="module")
def synthetic():
    return data.load("synthetic", 32, n_objects=12, n_views=7)


def test_object_k_is_the_same_in_a_larger_set_and_differs_with_the_seed(synthetic):
    small = data.load("synthetic", 32, n_objects=2, n_views=7)
    assert torch.equal(small.images, synthetic.images[:14])
    assert small.captions == synthetic.captions[:2]
    other = data.load("synthetic", 32, seed=1, n_objects=2, n_views=7)
    assert not torch.equal(small.images, other.images)


def test_the_first_readings_dataset_is_what_load_makes_of_its_chairs(monkeypatch):
    monkeypatch.setattr(data, "FAMILIES", (data.make_chair,))
    for holdout in (6, 0):
        first = data.load_synthetic(32, holdout, n_objects=6, n_views=7)
        again = data.load("synthetic", 32, holdout, n_objects=6, n_views=7)
        for name in ("images", "masks", "cam2world", "intrinsics", "object_index", "heldout"):
            assert torch.equal(getattr(first, name), getattr(again, name)), name
        for size in (32, 16):
            for a, b in zip(first.batch(torch.arange(5), size), again.batch(torch.arange(5), size)):
                assert torch.equal(a, b)
    assert first.names == again.names and again.captions == [None] * 6
    other = data.load_synthetic(32, seed=1, n_objects=1, n_views=7)
    assert not torch.equal(other.images, first.images[:7])


def test_pictures_are_the_same_where_only_rays_near_a_part_are_followed(synthetic):
    for k in range(3):                                   # a chair, a table, a vehicle
        frames = synthetic.frames_of(k)
        poses, cameras = synthetic.cam2world[frames], synthetic.intrinsics[frames]
        rgba = data.raytrace(synthetic.shapes[k], poses, cameras, 32)
        rgba = (rgba * 255).round().byte()
        assert torch.equal(rgba[..., :3], synthetic.images[frames])
        assert torch.equal(rgba[..., 3], synthetic.masks[frames])


def test_a_chair_differs_from_that_of_the_second_reading_in_its_legs_alone():
    n_pedestals = 0
    for seed in range(20):
        plain = data.make_chair(np.random.default_rng(seed))
        full, _, details = data.make_any_chair(np.random.default_rng(seed))
        n_pedestals += "pedestal" in details[0]
        assert torch.equal(plain[0].centre, full[0].centre) and plain[0].colour == full[0].colour
        assert {type(part) for part in plain} == {data.Box}
        on_floor = [part for part in plain if data.corners(part)[:, 1].min().abs() < 1e-6]
        assert on_floor == plain[1:5] and all(part.colour == plain[1].colour for part in on_floor)
    assert 0 < n_pedestals < 20


def test_dataset_has_the_promised_shapes_and_types(synthetic):
    n = 12 * 7
    promised = {"images": ((n, 32, 32, 3), torch.uint8),
                "masks": ((n, 32, 32), torch.uint8),
                "cam2world": ((n, 4, 4), torch.float32),
                "intrinsics": ((n, 4), torch.float32),
                "object_index": ((n,), torch.int64),
                "heldout": ((n,), torch.bool)}
    for name, (shape, dtype) in promised.items():
        field = getattr(synthetic, name)
        assert field.shape == shape and field.dtype == dtype, name
    assert synthetic.n_objects == len(synthetic.captions) == len(synthetic.shapes) == 12
    assert not synthetic.moving and synthetic.truth is None and synthetic.skipped == []


def test_every_object_is_inside_the_cube_and_in_frame_and_fills_them():
    dataset = data.load("synthetic", 64, n_objects=24, n_views=6)
    masks = dataset.masks
    for edge in (masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]):
        assert edge.max() == 0
    for parts in dataset.shapes:
        low, high = torch.cat([data.corners(part) for part in parts]).aminmax(dim=0)
        assert (low + high).abs().max() < 1e-5 and 0.7 < high.max() <= data.MARGIN + 1e-5
    left, right, top, bottom = data.mask_box(masks).T
    assert torch.maximum(right - left, bottom - top).mean() > 0.6 * 64


def test_cameras_stand_4_away_in_equal_slices_and_look_at_the_middle(synthetic):
    positions = synthetic.cam2world[:, :3, 3]
    torch.testing.assert_close(positions.norm(dim=1), torch.full((84,), 4.0))
    elevation = torch.asin(positions[:, 1] / 4).rad2deg()
    assert -5 < elevation.min() < 5 and 40 < elevation.max() < 50
    azimuth = torch.atan2(positions[:, 0], positions[:, 2]) % (2 * np.pi)
    slices = (azimuth / (2 * np.pi) * 7).long().view(12, 7)
    assert (slices == torch.arange(7)).all()
    uv, _ = project(torch.zeros(1, 3), synthetic.cam2world, synthetic.intrinsics)
    torch.testing.assert_close(uv, torch.full_like(uv, 0.5))


def test_images_are_colour_times_mask_with_soft_edges(synthetic):
    images, masks = synthetic.images, synthetic.masks
    assert (images.amax(-1) <= masks).all()
    assert ((masks > 0) & (masks < 255)).any((1, 2)).all()
    inside = images[masks == 255]
    assert inside.amax(-1).min() > 0.02 * 255            # dark parts are not the background


def test_families_take_turns_and_captions_name_colours_that_are_there(synthetic):
    nouns = [("chair",), ("table",), ("car", "van", "truck")]
    for k, text in enumerate(synthetic.captions):
        assert any(f" {noun} with " in text for noun in nouns[k % 3])
        used = torch.tensor(np.array([part.colour for part in synthetic.shapes[k]]))
        for word in text.split():
            if word in data.COLOURS:
                nearest = (used - torch.tensor(data.COLOURS[word])).abs().amax(1).min()
                assert nearest < 0.06, text


def test_captions_name_the_parts_that_are_there():
    for seed in range(40):
        parts, noun, details = data.make_any_chair(np.random.default_rng(seed))
        details = " ".join(details)
        expected = 1 + (2 if "pedestal" in details else 4) + (4 if "armrests" in details else 0)
        slatted = "slatted" in details
        assert len(parts) - expected in ((4, 5) if slatted else (1,)), details       # the back
        parts, noun, details = data.make_table(np.random.default_rng(seed))
        details = " ".join(details)
        expected = 1 + (2 if "pedestal" in details else 4) + ("shelf" in details)
        assert len(parts) == expected and isinstance(parts[0], data.Round) == ("round" in noun)
        parts, noun, details = data.make_vehicle(np.random.default_rng(seed))
        wheels = [part for part in parts if isinstance(part, data.Round)]
        assert len(wheels) == 4 and details[-1] == "black wheels"
        assert len(parts) == 9 + ("truck" in noun) and len(details) == 1 + ("truck" in noun)


def test_a_caption_lists_details_with_commas_and_an_and():
    def made_of(*details):
        part = box((0, 0, 0), (1, 1, 1), WHITE)
        return data.make_object(lambda rng: ([part], "orange cube", list(details)), None)[1]
    assert made_of("a lid") == "an orange cube with a lid"
    assert made_of("a lid", "feet") == "an orange cube with a lid and feet"
    assert made_of("a lid", "a orange rim", "feet") == (
        "an orange cube with a lid, an orange rim and feet")


def test_every_sixth_view_is_held_out_and_short_objects_keep_all(synthetic):
    assert synthetic.heldout.view(12, 7).nonzero()[:, 1].unique().tolist() == [5]
    assert synthetic.frames_of(2).tolist() == list(range(14, 21))
    assert synthetic.frames_of(2, heldout=True).tolist() == [19]
    assert synthetic.frames_of(2, heldout=False).tolist() == [14, 15, 16, 17, 18, 20]
    for holdout in (8, 0):
        assert not data.load("synthetic", 16, holdout, n_objects=1, n_views=7).heldout.any()


def test_batch_averages_over_area_and_keeps_the_shape_of_its_index(synthetic):
    index = torch.tensor([[3, 0], [7, 7]])
    images, masks = synthetic.batch(index, 8)
    assert images.shape == (2, 2, 3, 8, 8) and masks.shape == (2, 2, 1, 8, 8)
    blocks = synthetic.images[7].double().reshape(8, 4, 8, 4, 3)     # 4 x 4 pixels become one
    truth = blocks.mean((1, 3)).permute(2, 0, 1) / 255
    torch.testing.assert_close(images[1, 0].double(), truth, atol=1e-6, rtol=0)
    _, whole = synthetic.batch(index, 32)
    assert torch.equal(whole[0, 0, 0], synthetic.masks[3].float() / 255)
    for size in (0, 33):
        with pytest.raises(ValueError, match=f"size {size} is not in 1..32"):
            synthetic.batch(index, size)


def test_an_arc_goes_round_the_front_evenly_and_keeps_the_size_in_the_picture(synthetic):
    dataset = data.load("synthetic", 32, 0, n_objects=2, n_views=7, arc=60.0)
    for k in range(2):
        position = dataset.cam2world[dataset.frames_of(k), :3, 3]
        azimuth = torch.atan2(position[:, 0], position[:, 2]).rad2deg()
        torch.testing.assert_close(azimuth, torch.arange(-60.0, 61, 20), atol=1e-3, rtol=0)
        elevation = torch.asin(position[:, 1] / 12).rad2deg()
        torch.testing.assert_close(elevation, torch.full((7,), 15.0), atol=1e-3, rtol=0)
    assert not dataset.moving
    for arc_part, part in zip(dataset.shapes[0], synthetic.shapes[0], strict=True):
        assert arc_part.colour == part.colour            # the same objects
    def mean_side(masks):
        left, right, top, bottom = data.mask_box(masks).T
        return torch.maximum(right - left, bottom - top).mean().item()
    near, far = mean_side(synthetic.masks[:14]), mean_side(dataset.masks)
    assert far == pytest.approx(near, rel=0.12)


# ---------------------------------------------------------------- puppets
@pytest.fixture(scope="module")
def puppets():
    return data.load("puppets", 64, seed=1, n_objects=3, n_views=24)


def test_puppets_have_the_promised_shapes_and_captions(puppets):
    promised = {"yaw": ((72,), torch.float32), "angles": ((72, 4), torch.float32),
                "poses": ((72, 6, 3, 4), torch.float32), "parts": ((72, 64, 64), torch.uint8)}
    assert puppets.truth.keys() == promised.keys()
    for name, (shape, dtype) in promised.items():
        assert puppets.truth[name].shape == shape and puppets.truth[name].dtype == dtype, name
    assert puppets.images.shape == (72, 64, 64, 3) and puppets.names == ["0000", "0001", "0002"]
    assert puppets.moving and puppets.shapes is None
    for text in puppets.captions:
        assert text.startswith("a puppet with ") and text.endswith(" trousers")


def test_colours_shared_by_all_puppets_can_be_switched_off():
    def left_hands(shared_colours):
        colours = []
        for k in range(8):
            rng = np.random.default_rng([0, 1000 + k])
            parts, _, _ = data.make_puppet(rng, shared_colours)
            colours.append(parts[data.LEFT_ARM][-1].colour)
        return torch.tensor(colours)
    assert (left_hands(True) - torch.tensor(data.PINK)).abs().max() < 0.051
    assert left_hands(False).std(0).min() > 0.15


def test_a_puppets_left_is_at_plus_x_and_its_feet_stand_on_one_floor():
    parts, joints, _ = data.make_puppet(np.random.default_rng(3))
    for left, right in ((2, 3), (4, 5)):                 # arms, legs
        assert joints[left, 0] > 0 and joints[right, 0] == -joints[left, 0]
        for a, b in zip(parts[left], parts[right], strict=True):
            assert a.centre[0] > 0 and torch.equal(a.centre * torch.tensor([-1, 1, 1]), b.centre)
    for limb in (2, 3, 4, 5):
        assert evaluate.inside(parts[limb][0], joints[limb][None])   # it is joined where it begins
    for leg in (4, 5):
        lowest = min(data.corners(part)[:, 1].min().item() for part in parts[leg])
        assert lowest == pytest.approx(-0.85, abs=1e-6)


def test_a_puppets_sides_have_a_colour_each():
    parts, _, _ = data.make_puppet(np.random.default_rng(3))
    head, torso, left_arm, right_arm, left_leg, right_leg = parts
    for left in (head[2], torso[-2], left_arm[0], left_leg[-1]):     # earmuff, vest, sleeve, shoe
        assert left.colour == left_arm[-1].colour and left.centre[0] > 0
    for right in (head[3], torso[-1], right_arm[0], right_leg[-1]):
        assert right.colour == right_arm[-1].colour and right.centre[0] < 0


def test_puppet_k_is_the_same_in_a_larger_set_and_differs_with_the_seed(puppets):
    alone = data.load("puppets", 64, 6, 1, 9, 24, objects="0002")
    assert alone.names == ["0002"] and torch.equal(alone.images, puppets.images[48:])
    for name, values in alone.truth.items():
        assert torch.equal(values, puppets.truth[name][48:]), name
    other = data.load("puppets", 64, 6, 2, 1, 24)
    assert not torch.equal(other.images, puppets.images[:24])


def test_puppets_stay_in_frame_and_fill_it(puppets):
    masks = puppets.masks
    for edge in (masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]):
        assert edge.max() == 0
    _, _, top, bottom = data.mask_box(masks).T
    assert (bottom - top).min() > 0.75 * 64


def test_part_labels_agree_with_the_mask_and_every_part_is_seen(puppets):
    parts, masks = puppets.truth["parts"], puppets.masks
    assert (parts[masks == 255] > 0).all() and (parts[masks == 0] == 0).all()
    assert parts.unique().tolist() == list(range(7))
    small = data.load("puppets", 48, 0, 1, 1, 2).truth["parts"]
    large = data.load("puppets", 144, 0, 1, 1, 2).truth["parts"]
    assert torch.equal(small, large[:, 1::3, 1::3])      # the label is that of the pixel's centre


def test_yaw_covers_both_sides_smoothly_and_limbs_move_on_their_own(puppets):
    low, high = torch.tensor([0.0, 0, -25, -25]), torch.tensor([100.0, 100, 25, 25])
    for k in range(3):
        frames = puppets.frames_of(k)
        yaw = puppets.truth["yaw"][frames].rad2deg()
        angles = puppets.truth["angles"][frames].rad2deg()
        assert -45.1 < yaw.min() < -30 and 30 < yaw.max() < 45.1
        assert yaw.diff().abs().max() < 30
        assert (angles.amin(0) >= low - 0.1).all() and (angles.amax(0) <= high + 0.1).all()
        alike = torch.corrcoef(torch.cat([yaw[None], angles.T])) - torch.eye(5)
        assert alike.abs().max() < 0.97


def test_true_poses_are_rigid_and_turn_the_chest_by_yaw(puppets):
    R = puppets.truth["poses"][..., :3]
    eye = torch.eye(3).expand_as(R)
    torch.testing.assert_close(R @ R.mT, eye, atol=1e-5, rtol=0)
    ahead = R[:, data.TORSO, :, 2]                       # where the torso's +z went
    yaw = torch.atan2(ahead[:, 0], ahead[:, 2])
    torch.testing.assert_close(yaw, puppets.truth["yaw"], atol=0.01, rtol=0)


def test_limbs_turn_about_their_joints(puppets):
    _, joints, _ = data.make_puppet(np.random.default_rng([1, 1000]))
    poses = puppets.truth["poses"][puppets.frames_of(0)]
    torso = poses[:, data.TORSO]
    for limb in (2, 3, 4, 5):
        by_limb = poses[:, limb, :, :3] @ joints[limb] + poses[:, limb, :, 3]
        by_torso = torso[:, :, :3] @ joints[limb] + torso[:, :, 3]
        torch.testing.assert_close(by_limb, by_torso, atol=1e-5, rtol=0)


def test_arms_rise_to_their_own_side_by_the_true_angle(puppets):
    poses, angles = puppets.truth["poses"], puppets.truth["angles"]
    torso = poses[:, data.TORSO, :, :3]
    turned = torso.mT[:, None] @ poses[..., :3]          # (F, 6, 3, 3) as seen from the torso
    arms = -turned[:, 2:4, :, 1]                         # (F, 2, 3) where they point; at rest down
    aside = arms[..., 0] * torch.tensor([1.0, -1])       # the left arm goes to +x
    raised = torch.atan2(aside, -arms[..., 1])
    torch.testing.assert_close(raised, angles[:, :2], atol=1e-4, rtol=0)
    forward = -turned[:, 4:, 2, 1]                       # the legs' main angle is forwards, to +z
    torch.testing.assert_close(forward, angles[:, 2:].sin(), atol=0.01, rtol=0)


def test_true_poses_carry_a_hand_onto_its_pixels(puppets):
    for k in range(3):
        parts, _, _ = data.make_puppet(np.random.default_rng([1, 1000 + k]))
        frames = puppets.frames_of(k)
        for limb in (data.LEFT_ARM, data.RIGHT_ARM):
            pose, hand = puppets.truth["poses"][frames, limb], parts[limb][-1].centre
            position = pose[:, :, :3] @ hand + pose[:, :, 3]                     # (V, 3)
            first = frames[:1]                           # the camera stays
            uv, _ = project(position, puppets.cam2world[first], puppets.intrinsics[first])
            x, y = (uv[0] * 64).long().T
            aside = puppets.truth["angles"][frames, limb - 2] > 0.9  # the body does not hide it
            seen = puppets.truth["parts"][frames, y, x] == limb + 1
            assert aside.sum() > 3 and seen[aside].float().mean() > 0.9
            # The left hand (pink) is redder than blue-green, the right one (cyan) the reverse.
            red, green, _ = puppets.images[frames, y, x].float().T
            is_left = (red > green)[aside & seen]
            assert (is_left == (limb == data.LEFT_ARM)).float().mean() > 0.9


# ---------------------------------------------------------------- one known scene in every layout
# A lopsided thing, off centre, y up.
SCENE = [
    box((3, 1, -2), (0.5, 0.9, 0.3), (0.8, 0.2, 0.2)),
    box((3.6, 0.4, -1.8), (0.3, 0.3, 0.5), (0.2, 0.8, 0.2)),
    cylinder((2.7, 1.6, -1.6), 0.25, 0.3, (0.2, 0.3, 0.9)),
]
LOW, HIGH = torch.cat([data.corners(part) for part in SCENE]).aminmax(dim=0)
CENTRE = (LOW + HIGH) / 2
SIDE = 96                                                # of the photos, in pixels
TURN = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])    # our y up -> a z-up world
TURN4 = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])


def photograph(poses, camera):
    """SCENE as RGBA (V, SIDE, SIDE, 4) uint8, straight colour (not multiplied by alpha)."""
    intrinsics = camera.repeat(len(poses), 1)
    rgba = data.raytrace(SCENE, poses, intrinsics, SIDE)
    rgba[..., :3] /= rgba[..., 3:].clamp(min=1e-6)
    return (rgba * 255).round().byte().numpy()


@pytest.fixture(scope="module")
def shots():
    """RGBA (12, 96, 96, 4) uint8, cam2world (12, 4, 4), fx fy cx cy in pixels (4,) of SCENE."""
    azimuth = torch.arange(12, dtype=torch.float64) * 2 * np.pi / 12
    elevation = torch.deg2rad(torch.tensor([3.0, 45.0, 25.0], dtype=torch.float64).repeat(4))
    poses = orbit(azimuth, elevation, 5.0)
    poses[:, :3, 3] += CENTRE
    camera = torch.tensor([1.6, 1.6, 0.52, 0.47])
    rgba = photograph(poses.float(), camera)
    return rgba, poses.numpy(), camera.double().numpy() * SIDE


def centred(shots):
    """The same shots with the principal point in the middle, and the focal length of a 35 mm lens
    before a 32 mm sensor (LLFF has no principal point, Objaverse renders neither of the two)."""
    poses = torch.from_numpy(shots[1]).float()
    camera = torch.tensor([35 / 32, 35 / 32, 0.5, 0.5])
    return photograph(poses, camera), shots[1], camera.double().numpy() * SIDE


def save(folder, rgba, masks=None, pattern="{:03d}.png"):
    """Photos, RGBA or RGB with masks in a folder beside."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(rgba):
        name = pattern.format(i)
        if masks:
            (folder.parent / masks).mkdir(exist_ok=True)
            iio.imwrite(folder.parent / masks / name, image[..., 3])
            image = image[..., :3]
        iio.imwrite(folder / name, image)


def turned(poses):
    """The same cameras in a world whose up is z."""
    poses = poses.copy()
    poses[:, :3] = TURN @ poses[:, :3]
    return poses


def write_transforms(root, rgba, poses, camera, masks=None, **extra):
    save(root / "images", rgba, masks)
    keys = dict(zip(("fl_x", "fl_y", "cx", "cy"), camera))
    keys |= {"w": SIDE, "h": SIDE}
    keys |= extra
    frames = []
    for i, pose in enumerate(turned(poses)):
        frames.append({"file_path": f"./images/{i:03d}", "transform_matrix": pose.tolist()})
    (root / "transforms.json").write_text(json.dumps({**keys, "frames": frames}))


def write_srn(root, rgba, poses, camera):
    over_white = rgba.copy()
    alpha = rgba[..., 3:] / 255.0
    over_white[..., :3] = rgba[..., :3] * alpha + 255 * (1 - alpha)
    save(root / "rgb", over_white[..., :3], pattern="{:06d}.png")
    (root / "pose").mkdir()
    for i, pose in enumerate(turned(poses)):
        numbers = (pose @ data.FLIP).ravel()
        (root / "pose" / f"{i:06d}.txt").write_text(" ".join(map(str, numbers)))
    f, _, cx, cy = camera
    (root / "intrinsics.txt").write_text(f"{f} {cx} {cy} 0.\n0. 0. 0.\n1.\n{SIDE} {SIDE}\n")


def write_llff(root, rgba, poses, camera):
    save(root / "images_2", rgba, "masks_2")
    right, up, back, position = poses[:, :3].transpose(2, 0, 1)
    size_and_focal = [2 * SIDE, 2 * SIDE, 2 * camera[0]]         # of originals twice as large
    size_and_focal = np.tile(size_and_focal, (len(poses), 1))
    matrix = np.stack([-up, right, back, position, size_and_focal], -1)          # (V, 3, 5)
    bounds = np.full((len(poses), 2), 3.0)
    rows = np.concatenate([matrix.reshape(len(poses), 15), bounds], 1)
    np.save(root / "poses_bounds.npy", rows)


def quaternion(R):
    """w, x, y, z: the eigenvector of the largest eigenvalue of Bar-Itzhack's matrix."""
    if not np.isfinite(R).all():
        return np.full(4, np.nan)
    K = np.array([
        [R[0, 0] - R[1, 1] - R[2, 2], 0, 0, 0],
        [R[0, 1] + R[1, 0], R[1, 1] - R[0, 0] - R[2, 2], 0, 0],
        [R[0, 2] + R[2, 0], R[1, 2] + R[2, 1], R[2, 2] - R[0, 0] - R[1, 1], 0],
        [R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1], np.trace(R)],
    ])
    q = np.linalg.eigh(K / 3)[1][:, -1]
    return q[[3, 0, 1, 2]]


def world_to_camera(poses):
    """OpenCV's (V, 4, 4), in a world turned about some skew axis."""
    c, s = np.cos(0.4), np.sin(0.4)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ TURN
    poses = poses.copy()
    poses[:, :3] = turn @ poses[:, :3]
    return np.linalg.inv(poses @ data.FLIP)


def text_of(numbers):
    return " ".join(str(number) for number in numbers)


def write_colmap_text(root, rgba, poses, camera, model="PINHOLE"):
    sparse = start_colmap(root, rgba)
    cameras = f"# a comment\n1 {model} {SIDE} {SIDE} {text_of(camera)}"
    (sparse / "cameras.txt").write_text(cameras)
    lines = ["# a comment"]
    for i, matrix in enumerate(world_to_camera(poses)):
        numbers = text_of([*quaternion(matrix[:3, :3]), *matrix[:3, 3]])
        points = "1 2 -1" if i % 2 else ""                       # the line may be empty
        lines += [f"{i} {numbers} 1 {i:03d}.png", points]
    (sparse / "images.txt").write_text("\n".join(lines))


def write_colmap(root, rgba, poses, camera):
    sparse = start_colmap(root, rgba)
    pinhole = 1
    cameras = struct.pack("<QIiQQ4d", 1, 1, pinhole, SIDE, SIDE, *camera)
    (sparse / "cameras.bin").write_bytes(cameras)
    images = struct.pack("<Q", len(poses))
    for i, matrix in enumerate(world_to_camera(poses)):
        images += struct.pack("<I7dI", i, *quaternion(matrix[:3, :3]), *matrix[:3, 3], 1)
        images += f"{i:03d}.png".encode() + b"\0"
        n_points = i % 3
        images += struct.pack("<Q", n_points) + bytes(24 * n_points)
    (sparse / "images.bin").write_bytes(images)


def start_colmap(root, rgba):
    """As in MVImgNet: class/object/images, masks, sparse/0; returns the latter."""
    folder = root / "chair" / "obj7"
    save(folder / "images", rgba, "masks")
    sparse = folder / "sparse" / "0"
    sparse.mkdir(parents=True)
    return sparse


def write_objaverse(root, rgba, poses, camera):
    """Photos must have the layout's own focal length: see `centred`."""
    save(root, rgba)
    for i, pose in enumerate(turned(poses)):
        np.save(root / f"{i:03d}.npy", np.linalg.inv(pose)[:3])


WRITERS = {
    "NeRF transforms": write_transforms,
    "SRN": write_srn,
    "LLFF": write_llff,
    "COLMAP": write_colmap,
    "COLMAP text": write_colmap_text,
    "Objaverse renders": write_objaverse,
}


def similarity(dataset, poses):
    """s, R, c of loaded camera = s R (written - c), by Procrustes; and the worst residual."""
    a = poses[:, :3, 3]
    b = dataset.cam2world[:, :3, 3].double().numpy()
    a_off, b_off = a - a.mean(0), b - b.mean(0)
    U, _, Vt = np.linalg.svd(b_off.T @ a_off)
    R = U @ np.diag([1, 1, np.linalg.det(U @ Vt)]) @ Vt
    s = np.trace(R.T @ b_off.T @ a_off) / (a_off ** 2).sum()
    c = a.mean(0) - R.T @ b.mean(0) / s
    return s, R, c, np.abs(s * (a - c) @ R.T - b).max()


def is_blue(rgb):
    red, green, blue = rgb.unbind(-1)
    return (blue > 1.5 * red) & (blue > 1.5 * green)


@pytest.mark.parametrize("layout", WRITERS)
def test_loader_puts_the_known_scene_into_the_cube_upright(layout, shots, tmp_path):
    if layout in ("LLFF", "Objaverse renders"):
        shots = centred(shots)
    rgba, poses, camera = shots
    WRITERS[layout](tmp_path / "thing", rgba, poses, camera)
    d = data.load(tmp_path / "thing", 64)
    assert d.layout == layout.replace(" text", "")
    assert d.n_objects == 1 and len(d.images) == 12
    s, R, c, residual = similarity(d, poses)
    assert residual < 1e-4                               # the cameras moved as one
    assert np.abs(d.cam2world[:, :3, :3].numpy() - R @ poses[:, :3, :3]).max() < 1e-5
    assert R[1, 1] > 0.999                               # y is up
    # A visual hull holds the object, and more: 12 views from 5 away leave caps, up to 10 % here.
    fill = s * (HIGH - LOW).max().item() / (2 * data.MARGIN)
    assert 0.88 < fill < 1.02
    assert np.abs(s * (c - CENTRE.numpy())).max() < 0.08
    # Every loaded camera must see the scene, moved likewise, as the loaded picture shows it.
    R, c = torch.from_numpy(R).float(), torch.from_numpy(c).float()
    scene = []
    for part in SCENE:
        scene.append(replace(part, centre=s * (R @ (part.centre - c)), half=s * part.half,
                             rotation=R @ part.rotation))
    again = data.raytrace(scene, d.cam2world, d.intrinsics, 64)
    off = (again[..., 3] - d.masks / 255.0).abs().sum() / again[..., 3].sum()
    assert off < 0.05
    mine, theirs = is_blue(again[..., :3]), is_blue(d.images.float())
    assert (mine & theirs).sum() > 0.8 * (mine | theirs).sum()
    # A single known point, the middle of the blue cylinder, falls on blue where it is in front.
    uv, _ = project(scene[2].centre[None], d.cam2world, d.intrinsics)
    column, row = (uv[:, 0] * 64).long().unbind(1)
    view = torch.arange(12)
    on_blue = theirs[view, row, column]
    assert on_blue.sum() >= 6
    assert (on_blue == mine[view, row, column]).sum() >= 11


def test_transforms_read_camera_angle_x_with_the_alpha_as_mask(shots, tmp_path):
    write_transforms(tmp_path, *centred(shots))
    by_focal = data.load(tmp_path, 48)
    meta = json.loads((tmp_path / "transforms.json").read_text())
    meta = {"camera_angle_x": 2 * np.arctan(16 / 35), "frames": meta["frames"]}
    (tmp_path / "transforms.json").unlink()
    (tmp_path / "transforms_train.json").write_text(json.dumps(meta))
    by_angle = data.load(tmp_path, 48)
    torch.testing.assert_close(by_angle.intrinsics, by_focal.intrinsics)
    torch.testing.assert_close(by_angle.cam2world, by_focal.cam2world)


def test_a_frame_may_have_a_camera_and_a_mask_of_its_own(shots, tmp_path):
    write_transforms(tmp_path, *shots)
    path = tmp_path / "transforms.json"
    meta = json.loads(path.read_text())
    meta["frames"][3] |= {"fl_x": 77.0, "cy": 11.0, "mask_path": "own/3.png"}
    path.write_text(json.dumps(meta))
    views, _ = data.read_transforms(tmp_path, READING)
    assert views[3].camera == (77.0, meta["fl_y"], meta["cx"], 11.0)
    assert views[3].mask == tmp_path / "own" / "3.png"
    assert views[2].camera[0] == meta["fl_x"] and views[2].mask is None


def test_absent_frames_and_absent_masks_are_skipped_and_counted(shots, tmp_path):
    write_transforms(tmp_path, *shots, masks="masks")
    for i in (2, 5, 7):
        (tmp_path / "images" / f"{i:03d}.png").unlink()
    (tmp_path / "masks" / "000.png").unlink()
    d = data.load(tmp_path, 32)
    assert len(d.images) == 8
    assert d.skipped == ["4 views left out: images/000.png: no mask, or one that is white "
                         "everywhere; images/002.png: no such file; images/005.png: no such file; "
                         "..."]


@pytest.mark.parametrize("place", ["masks_8/a.jpg", "masks_8/a.png", "masks_8/a.jpg.png",
                                   "masks/a.jpg", "masks/a.png", "masks/a.jpg.png",
                                   "mask/a.jpg", "mask/a.png", "mask/a.jpg.png"])
def test_a_mask_is_found_in_every_place_and_never_among_the_photos(place, tmp_path):
    photo = tmp_path / "images_8" / "a.jpg"
    other = tmp_path / "rgb" / "a.jpg"                   # its own folder is no folder of masks
    for path in (photo, other, other.with_suffix(".png")):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert data.find_mask(photo) is None and data.find_mask(other) is None
    mask = tmp_path / place
    mask.parent.mkdir()
    mask.touch()
    assert data.find_mask(photo) == mask
    twin = place.startswith("masks_8")                   # of images_8, so not of rgb
    assert data.find_mask(other) == (None if twin else mask)
    below = tmp_path / "images_8" / "cam0" / "b.jpg"     # a folder deeper
    deeper = mask.parent / "cam0" / mask.name.replace("a.", "b.")
    for path in (below, deeper):
        path.parent.mkdir()
        path.touch()
    assert data.find_mask(below) == deeper


# ---------------------------------------------------------------- cameras: closed forms
COLMAP_CAMERAS = [
    ("SIMPLE_PINHOLE", [9, 4, 5], (9, 9, 4, 5), (0, 0, 0, 0)),
    ("PINHOLE", [8, 9, 4, 5], (8, 9, 4, 5), (0, 0, 0, 0)),
    ("SIMPLE_RADIAL", [9, 4, 5, .1], (9, 9, 4, 5), (.1, 0, 0, 0)),
    ("RADIAL", [9, 4, 5, .1, .2], (9, 9, 4, 5), (.1, .2, 0, 0)),
    ("OPENCV", [8, 9, 4, 5, .1, .2, .3, .4], (8, 9, 4, 5), (.1, .2, .3, .4)),
]


@pytest.mark.parametrize("model, parameters, camera, lens", COLMAP_CAMERAS)
def test_colmap_models_keep_their_parameters_apart_in_text_and_binary(
        model, parameters, camera, lens, tmp_path):
    (tmp_path / "cameras.txt").write_text(f"7 {model} 64 48 {text_of(parameters)}\n\n")
    number = [name for name, _ in data.COLMAP_MODELS].index(model)
    one = struct.pack(f"<IiQQ{len(parameters)}d", 7, number, 64, 48, *parameters)
    (tmp_path / "cameras.bin").write_bytes(struct.pack("<Q", 1) + one)
    from_text = data.text_cameras(tmp_path / "cameras.txt")["7"]
    from_binary = data.binary_cameras(tmp_path / "cameras.bin", 9)[7]
    for found in (from_text, from_binary):
        assert found[:3] == (model, 64, 48)
        assert data.colmap_camera(model, found[3], tmp_path) == (camera, lens)


def test_quaternion_becomes_the_rotation_about_its_axis():
    c, s = np.cos(0.3), np.sin(0.3)                      # half of the angle
    R = data.quaternion_matrix(c, 0, 0, s)
    C, S = np.cos(0.6), np.sin(0.6)
    np.testing.assert_allclose(R, [[C, -S, 0], [S, C, 0], [0, 0, 1]], atol=1e-12)
    axis = np.array([1.0, 2, -2]) / 3
    R = data.quaternion_matrix(c, *(s * axis))
    np.testing.assert_allclose(R @ axis, axis, atol=1e-12)
    assert np.trace(R) == pytest.approx(1 + 2 * C)


@pytest.mark.parametrize("up", [(0, 1, 0), (0, 0, 3), (1, 2, -2), (0, -1, 0)])
def test_turn_to_y_is_the_shortest_rotation_that_takes_up_to_y(up):
    up = np.array(up, float)
    R = data.turn_to_y(up)
    np.testing.assert_allclose(R @ up, [0, np.linalg.norm(up), 0], atol=1e-8)
    np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-12)
    cosine = up[1] / np.linalg.norm(up)                  # of the angle between up and y
    assert np.trace(R) == pytest.approx(1 + 2 * cosine, abs=1e-8)


def test_nearest_point_is_where_lines_meet_and_between_two_that_do_not():
    rng = np.random.default_rng(0)
    point = np.array([1.0, -2, 3])
    directions = rng.normal(size=(5, 3))
    positions = point - rng.uniform(1, 4, (5, 1)) * directions
    np.testing.assert_allclose(data.nearest_point(positions, directions), point, atol=1e-9)
    crossing = data.nearest_point(np.array([[5.0, 0, 1], [0, 7, 2]]), np.eye(3)[:2])
    np.testing.assert_allclose(crossing, [0, 0, 1.5], atol=1e-9)


def test_nearest_axis_keeps_its_sign():
    assert data.nearest_axis(np.array([0.1, -0.9, 0.3])).tolist() == [0, -1, 0]
    assert data.nearest_axis(np.array([0.1, 0.2, 0.3])).tolist() == [0, 0, 1]


def test_lens_distortion_is_undone(shots, tmp_path):
    rgba, poses, camera = shots
    k1, k2, p1, p2 = -0.8, 0.3, 0.05, -0.06
    fx, fy, cx, cy = camera
    centre = np.arange(SIDE) + 0.5
    x_seen, y_seen = np.meshgrid((centre - cx) / fx, (centre - cy) / fy)
    x, y = x_seen, y_seen
    for _ in range(40):                                  # where a distorted pixel came from
        r2 = x * x + y * y
        radial = 1 + k1 * r2 + k2 * r2 ** 2
        dx = 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
        dy = p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
        x, y = (x_seen - dx) / radial, (y_seen - dy) / radial
    grid = np.stack([2 * (fx * x + cx) / SIDE - 1, 2 * (fy * y + cy) / SIDE - 1], -1)
    grid = torch.from_numpy(grid).float().expand(12, -1, -1, -1)
    planes = torch.from_numpy(rgba).permute(0, 3, 1, 2).float()
    bent = torch.nn.functional.grid_sample(planes, grid, align_corners=False)
    bent = bent.permute(0, 2, 3, 1).round().byte().numpy()
    write_transforms(tmp_path, bent, poses, camera, k1=k1, k2=k2, p1=p1, p2=p2)
    listed, _ = data.read_transforms(tmp_path, READING)
    straight = np.stack([shot.photo for shot in data.read_shots(listed, READING)])
    true, straight, bent = (x[..., 3] > 127 for x in (rgba, straight, bent))
    assert (bent != true).sum() > 0.06 * true.sum()
    assert (straight != true).sum() < 0.01 * true.sum()


# ---------------------------------------------------------------- windows
def test_mask_box_is_the_outer_edges_of_what_is_over_half():
    masks = torch.zeros(2, 8, 10, dtype=torch.uint8)
    masks[0, 2:5, 3:9] = 200
    masks[0, 1, 1] = 90                                  # under half of the largest
    masks[1, 7, 0] = 1
    assert data.mask_box(masks).tolist() == [[3, 9, 2, 5], [0, 1, 7, 8]]


def test_a_window_multiplies_before_it_averages_and_is_black_outside():
    photo = np.full((4, 4, 4), 200, np.uint8)            # a bright background ...
    photo[..., 3] = 0
    photo[:, :2] = [100, 50, 0, 255]                     # ... beside the object
    one = data.resample([photo], [(0, 0)], 4, 1)[0, 0, 0]
    assert one.tolist() == pytest.approx([50, 25, 0, 128], abs=1)
    shifted = data.resample([photo], [(-1, 2)], 4, 4)[0]
    assert shifted[:2, 1:3, 3].min() == 255
    assert shifted[2:].max() == 0 and shifted[:, 0].max() == 0


def test_windows_follow_small_objects_through_the_intrinsics(shots, tmp_path):
    rgba, poses, camera = shots
    wide = np.zeros((12, 150, 240, 4), np.uint8)         # not square, object off centre
    wide[:, 40:136, 100:196] = rgba
    write_transforms(tmp_path, wide, poses, camera + [0, 0, 100, 40], w=240, h=150)
    d = data.load(tmp_path, 64)
    boxes = data.mask_box(d.masks)
    assert ((boxes[:, 1::2] + boxes[:, ::2]) / 2 - 32).abs().max() < 1.5
    assert (boxes[:, 1::2] - boxes[:, ::2]).max() == pytest.approx(64 / 1.15, abs=1.5)
    uv, _ = project(torch.zeros(1, 3), d.cam2world, d.intrinsics)
    assert (uv - 0.5).abs().max() < 0.15
    assert d.intrinsics[:, 2].std() > 0.005


def test_llff_takes_the_smallest_copy_that_is_large_enough(tmp_path):
    for name, side in (("images", 40), ("images_2", 20), ("images_4", 10)):
        save(tmp_path / name, np.zeros((1, side, side, 4), np.uint8))
    for size, expected in ((8, "images_4"), (10, "images_4"), (11, "images_2"), (99, "images")):
        found = data.llff_photos(tmp_path, data.Reading(size=size))
        assert found == [tmp_path / expected / "000.png"]


def test_a_folder_of_many_objects_is_many_objects_in_order(shots, tmp_path):
    for name in ("b", "a"):
        write_transforms(tmp_path / name, *shots)
    d = data.load(tmp_path, 32)
    assert d.names == ["a", "b"] and d.object_index.bincount().tolist() == [12, 12]
    assert d.layout == "NeRF transforms" and not d.moving            # frames they are not
    assert d.images.shape == (24, 32, 32, 3)
    assert data.load(tmp_path, 32, objects="b").names == ["b"]
    with pytest.raises(BadInput, match="no object c; there are: a, b"):
        data.load(tmp_path, 32, objects="b,c")


def test_objects_are_named_by_where_they_lie_below_the_folder(shots, tmp_path):
    for name in ("chair/a", "table/a"):
        write_transforms(tmp_path / name, *shots)
    assert [one.name for one in data.find(tmp_path, 1)] == ["chair/a", "table/a"]
    assert [one.name for one in data.find(tmp_path / "chair", 1)] == ["a"]


BAD_CAPTIONS = [
    ("captions.txt", "lamp a lamp", "captions.txt, line 1: expected NAME: CAPTION"),
    ("captions.txt", "sofa: a sofa", "no object is called sofa"),
    ("captions.json", '["a lamp"]', 'expected {"NAME": "CAPTION"}'),
    ("captions.json", '{"lamp": 3}', 'expected {"NAME": "CAPTION"}'),
]


def test_captions_are_read_from_three_places_and_bad_ones_left_out_by_name(shots, tmp_path):
    few = shots[0][:4], shots[1][:4], shots[2]
    for name in ("chair", "lamp", "vase"):
        write_transforms(tmp_path / name, *few)
    (tmp_path / "chair" / "caption.txt").write_text("a chair\n")
    (tmp_path / "captions.txt").write_text("lamp: a lamp: green\n\n")
    (tmp_path / "captions.json").write_text('{"vase": "a vase"}')
    assert data.load(tmp_path, 16).captions == ["a chair", "a lamp: green", "a vase"]
    assert data.load(tmp_path, 16, objects="vase").captions == ["a vase"]
    (tmp_path / "captions.json").write_text('{"vase": "a vase", "lamp": "the last word"}')
    (tmp_path / "captions.txt").write_text("lamp: a lamp\nchair: a better chair")
    write_transforms(tmp_path / "chair", few[0][..., :3], *few[1:])      # it has no masks
    d = data.load(tmp_path, 16)
    assert d.names == ["lamp", "vase"] and d.captions == ["the last word", "a vase"]
    assert d.skipped[0].startswith("4 views left out: chair/images/000.png: no mask, ")
    assert d.skipped[1].startswith("1 object left out: chair: 0 usable views")
    write_transforms(tmp_path / "chair", *few)
    assert data.load(tmp_path, 16).captions == ["a better chair", "the last word", "a vase"]
    for name, content, says in BAD_CAPTIONS:
        kept = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content)
        dataset = data.load(tmp_path, 16)
        assert dataset.n_objects == 3 and says in dataset.skipped[0]
        (tmp_path / name).write_text(kept)


def test_srn_takes_white_for_background(shots, tmp_path):
    write_srn(tmp_path, *shots)
    d = data.load(tmp_path, 96)
    assert d.images[d.masks == 0].max() == 0
    assert 0.02 < (d.masks > 0).float().mean() < 0.5


# ---------------------------------------------------------------- COIL-100
def test_components_separate_what_touches_only_at_corners():
    mask = np.zeros((2, 6, 7), bool)
    mask[0, 1:4, 1] = mask[0, 3, 1:6] = mask[0, 1:4, 5] = True   # a U: one component
    mask[0, 0, 0] = mask[1, 2, 2] = mask[1, 3, 3] = True         # corners do not connect
    label = data.components(mask)
    assert len(np.unique(label[0][mask[0]])) == 2
    assert len(np.unique(label[1][mask[1]])) == 2
    assert (label[~mask] == 0).all()
    assert len(np.unique(label[0, 1:][mask[0, 1:]])) == 1
    area = data.component_area(label)
    assert area[0, 2, 5] == 9 and area[0, 0, 0] == 1 and area[0, 1, 2] == 0


def test_holes_are_filled_up_to_their_limit_and_bays_never():
    mask = np.zeros((1, 12, 12), bool)
    mask[0, 1:11, 1:11] = True
    mask[0, 2:4, 2:4] = mask[0, 5:8, 5:8] = mask[0, 9:, 9] = False   # 4 and 9 pixels, and a bay
    filled = mask.copy()
    filled[0, 2:4, 2:4] = True
    assert (data.fill_holes(mask, 8) == filled).all()
    filled[0, 5:8, 5:8] = True
    assert (data.fill_holes(mask) == filled).all()


def test_coil_mask_fills_dark_holes_and_drops_specks():
    photo = np.full((1, 40, 40, 3), 26, np.uint8)
    photo[0, 10:30, 8:32] = 180
    photo[0, 15:20, 15:20] = 5                           # a dark part of the object
    photo[0, 2:4, 2:4] = 200                             # a speck
    truth = np.zeros((1, 40, 40), bool)
    truth[0, 10:30, 8:32] = True
    assert (data.coil_masks(photo) == truth).all()


def test_a_flooded_coil_photo_is_masked_again_with_the_higher_threshold():
    photo = np.full((2, 40, 40, 3), 40, np.uint8)        # brighter than 34 everywhere
    photo[1] = 26
    photo[0, 10:30, 8:32] = 180
    photo[1, 10:30, 8:32] = 45                           # darker than 48, and not flooded
    truth = np.zeros((2, 40, 40), bool)
    truth[:, 10:30, 8:32] = True
    assert (data.coil_masks(photo) == truth).all()


def write_coil(root, angles=range(0, 360, 15)):
    """A lopsided thing on COIL's own turntable."""
    parts = [
        box((0, 0, 0), (0.4, 0.9, 0.3), (0.9, 0.3, 0.3)),
        box((0, -0.6, 0.32), (0.15, 0.2, 0.1), (0.3, 0.3, 0.9)),
    ]
    azimuth = torch.from_numpy(np.radians(list(angles)))
    elevation = torch.full_like(azimuth, np.radians(data.COIL_ELEVATION))
    poses = orbit(azimuth, elevation, data.COIL_DISTANCE).float()
    camera = torch.tensor([6.0, 6, 0.5, 0.5]).repeat(len(poses), 1)
    rgba = data.raytrace(parts, poses, camera, 128)
    photos = (rgba[..., :3] * 229 + 26).byte().numpy()   # COIL's background is not quite black
    root.mkdir(parents=True, exist_ok=True)
    for angle, photo in zip(angles, photos):
        iio.imwrite(root / f"obj3__{angle}.png", photo)


def test_coil_cameras_go_round_so_that_the_front_moves_left(tmp_path):
    write_coil(tmp_path)
    d = data.load(tmp_path, 64)
    assert d.layout == "COIL-100" and d.names == ["obj3"] and len(d.images) == 24
    angle = torch.atan2(d.cam2world[:, 0, 3], d.cam2world[:, 2, 3]).rad2deg() % 360
    by_number = torch.arange(0, 360.0, 15)               # not as text
    torch.testing.assert_close(angle, by_number, atol=1e-3, rtol=0)
    front = torch.tensor([[0.0, 0, 0.5]])
    uv, _ = project(front, d.cam2world[:3], d.intrinsics[:3])
    assert (uv[:, 0, 0].diff() < 0).all()
    blue = d.images[:6, ..., 2].float() > d.images[:6, ..., 0].float()
    middle = torch.stack([b.nonzero()[:, 1].float().mean() / 64 for b in blue])
    uv, _ = project(torch.tensor([[0.0, -0.6, 0.42]]), d.cam2world[:6], d.intrinsics[:6])
    assert (middle - uv[:, 0, 0]).abs().max() < 0.05


def test_coil_objects_come_in_the_order_of_their_numbers_with_all_their_angles(tmp_path):
    for name in ("obj10__0", "obj2__5", "obj2__350", "obj1__15", "other__0", "obj3__1b"):
        (tmp_path / f"{name}.png").touch()
    found = data.find(tmp_path, 1)
    assert [one.name for one in found] == ["obj1", "obj2", "obj10"]
    assert found[1].origin == {5: tmp_path / "obj2__5.png", 350: tmp_path / "obj2__350.png"}
    assert all(one.layout == "COIL-100" for one in found)


def test_a_quarter_turn_later_goes_round_and_takes_the_nearest_that_is_there():
    degrees = np.array([0, 85, 180, 275])
    assert data.quarter_turn_later(degrees).tolist() == [1, 2, 3, 0]


def test_coil_pixel_solves_its_equation_and_fills_the_cube():
    degrees = np.array([0, 90, 180, 270])
    width, height = np.array([40.0, 80, 40, 80]), np.array([128.0, 110, 128, 110])
    pixel = data.coil_pixel(degrees, width, height)
    slope = data.COIL_DEPTH * np.tan(np.radians(data.COIL_ELEVATION))
    body = pixel * height - slope * (pixel * width)[[1, 2, 3, 0]]    # H cos e
    np.testing.assert_allclose(body, body[0], rtol=1e-9)
    assert (pixel * np.maximum(width, height)).max() == pytest.approx(2 * data.MARGIN)


@pytest.mark.parametrize("photo, says", [
    (np.full((64, 64, 3), 200, np.uint8), "a side of 64 pixels, not 128"),
    (np.full((128, 64, 3), 200, np.uint8), "64x128 pixels"),
    (np.full((64, 128, 3), 200, np.uint8), "128x64 pixels"),
    (np.zeros((128, 128, 3), np.uint8), "black"),
    (np.full((128, 128, 3), 40, np.uint8), "black"),     # all corners bright enough to be flooded
])
def test_a_coil_photo_that_cannot_be_is_left_out_by_name(photo, says, tmp_path):
    write_coil(tmp_path)
    iio.imwrite(tmp_path / "obj3__30.png", photo)
    dataset = data.load(tmp_path, 32)
    assert len(dataset.images) == 23
    [line] = dataset.skipped
    assert line.startswith("1 view left out: obj3__30.png: ") and says in line
    for angle in range(30, 360, 15) if len(photo) == 128 else []:
        iio.imwrite(tmp_path / f"obj3__{angle}.png", photo)
    if len(photo) == 128:
        with pytest.raises(BadInput, match="at least 3"):
            data.load(tmp_path, 32)


def test_coil_zoom_keeps_the_object_one_size_in_the_world(tmp_path):
    write_coil(tmp_path)
    before = data.load(tmp_path, 64)
    for path in sorted(tmp_path.glob("*.png"))[1::2]:    # zoom half of the views by 2/3
        photo = torch.from_numpy(iio.imread(path)).permute(2, 0, 1)[None].float()
        photo = torch.nn.functional.interpolate(photo, (86, 86), mode="bilinear", antialias=True)
        small = np.full((128, 128, 3), 26, np.uint8)
        small[30:116, 10:96] = photo[0].permute(1, 2, 0).byte()
        iio.imwrite(path, small)
    after = data.load(tmp_path, 64)
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) - 0.5

    def relative(d):                                     # in units of the object's box
        left, right, top, bottom = data.mask_box(d.masks).T[..., None] / 64
        uv, _ = project(points, d.cam2world, d.intrinsics)
        u, v = uv.unbind(-1)
        return torch.stack([(u - left) / (right - left), (v - top) / (bottom - top)], -1)

    assert (relative(before) - relative(after)).abs().max() < 0.06


# ---------------------------------------------------------------- clips
def made_clip(n=20, size=64, side=20, noise=3.0, still=False, seed=0):
    """A square that walks to and fro before a noisy wall: frames (n, S, S, 3), masks (n, S, S)."""
    rng = np.random.default_rng(seed)
    frames = np.array([120.0, 110, 95]) + rng.normal(0, noise, (n, size, size, 3))
    masks = np.zeros((n, size, size), bool)
    for i in range(n):
        x = 22
        if not still:
            x += round(14 * np.sin(i / 2))
        masks[i, 24:24 + side, x:x + side] = True
    frames[masks] += np.array([60.0, -60, 20])
    return frames.clip(0, 255).round().astype(np.uint8), masks


def write_strip(path, frames):
    path.parent.mkdir(exist_ok=True)
    iio.imwrite(path, np.concatenate(list(frames), 1))


def with_alpha(frames, masks):
    """RGBA (V, H, W, 4) uint8 of frames (V, H, W, 3) and masks (V, H, W) bool."""
    alpha = (255 * masks[..., None]).astype(np.uint8)
    return np.concatenate([frames, alpha], -1)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_background_model_finds_a_square_that_walks_and_one_that_stands_still_in_part():
    frames, masks = made_clip()
    assert iou(data.subtract_background(frames, "clip"), masks) > 0.95
    body = np.zeros_like(masks)
    body[:, 44:, 26:38] = True                           # legs that never move
    frames[body] = np.array([40, 50, 140])
    frames[3, 5:8, 5:8] = 255                            # a speck, for a moment
    found = data.subtract_background(frames, "clip")
    assert iou(found, masks | body) > 0.95
    assert not found[3, :10, :10].any()


def test_background_model_leaves_shadows_out():
    frames, masks = made_clip(noise=1.0)
    shadow = np.roll(masks, 20, 1) & ~masks              # below the square, wherever it goes
    frames[shadow] = (0.87 * frames[shadow]).astype(np.uint8)
    assert iou(data.subtract_background(frames, "clip"), masks) > 0.95


def test_a_shadow_costs_no_distance_and_another_hue_or_a_deeper_dark_does():
    wall = np.array([[[100.0, 80, 60]]])                 # (1, 1, 3)
    hue = np.array([0.0, 60, -80])                       # at right angles to it, length 100
    half = 0.5 * np.linalg.norm(wall)
    seen = np.stack([0.9 * wall, 0.9 * wall + hue, 0 * wall, 0.28 * wall])       # (4, 1, 1, 3)
    distance = data.distance_but_for_shadow(seen, wall)[:, 0, 0]
    darkest = data.SHADOW[0] * np.linalg.norm(wall)      # black is far from the deepest shadow
    np.testing.assert_allclose(distance, [0, 100, darkest, half], atol=1e-9)


def test_a_walls_own_variation_counts_less_along_brightness_than_across():
    rng = np.random.default_rng(0)
    brightness = rng.normal(0, 20, (50, 40, 1))
    still = np.array([120.0, 110, 95]) + brightness + rng.normal(0, 1, (50, 40, 3))
    colour, whiten = data.model_wall(still, 1.0)
    assert colour.shape == (50, 1, 3)
    along = np.linalg.norm(np.ones(3) @ whiten)
    across = np.linalg.norm(np.array([1.0, 0, -1]) @ whiten)
    assert along * data.OUTLIER == pytest.approx(1 / 20, rel=0.15)
    assert across > 5 * along


def test_unknown_background_is_a_straight_line_between_what_its_row_knows():
    background = np.zeros((2, 5, 3), np.float32)
    background[0, 0] = 10
    background[0, 4] = 30
    background[1] = 7                                    # nothing known: kept
    known = np.zeros((2, 5), bool)
    known[0, [0, 4]] = True
    data.fill_along_rows(background, known)
    assert background[0, :, 2].tolist() == [10, 15, 20, 25, 30]
    assert (background[1] == 7).all()


def test_a_reduced_frame_is_the_mean_of_squares_and_opaque_without_a_mask():
    frame = np.full((7, 9, 4), 255, np.uint8)
    frame[..., :3] = np.arange(7 * 9 * 3, dtype=np.uint8).reshape(7, 9, 3)
    small, factor = data.reduce(frame, 3)                # 7 // 3: divided by 2
    assert factor == 2 and small.shape == (3, 4, 4) and (small[..., 3] == 255).all()
    mean = frame[2:4, 4:6, :3].astype(float).mean((0, 1))
    assert np.abs(small[1, 2, :3] - mean).max() <= 0.5
    same, factor = data.reduce(frame, 20)                # never enlarged
    assert same is frame and factor == 1


def test_a_large_clips_background_does_not_bleed_into_its_frames(tmp_path):
    frames = np.zeros((4, 128, 128, 4), np.uint8)
    frames[..., :3] = [0, 250, 0]                        # the background, green
    for i, frame in enumerate(frames):
        frame[31 + i:95 + i, 31:95] = [250, 0, 0, 255]   # somebody, red
        iio.imwrite(tmp_path / f"{i}.png", frame)
    clip = data.read_clip(tmp_path, data.Reading(size=16))
    assert clip.shape == (4, 32, 32, 4)
    inside = clip[clip[..., 3] > 0]
    assert (inside[:, 3] < 255).any() and inside[:, 1].max() == 0


def test_a_strip_is_cropped_once_for_the_whole_clip_and_fills_the_frame(tmp_path):
    frames, masks = made_clip()
    write_strip(tmp_path / "walk.png", frames)
    write_strip(tmp_path / "other.png", made_clip(9, size=80)[0])    # another size and length
    d = data.load(tmp_path, 32, as_clips=True)
    assert d.names == ["other", "walk"] and d.object_index.bincount().tolist() == [9, 20]
    walk = d.masks[d.frames_of(1)] > 127
    left, right = masks.any((0, 1)).nonzero()[0][[0, -1]]
    zoom = 0.95 * 32 / (right + 1 - left)                # wider than high: the width decides
    box = data.mask_box(walk.byte())
    assert box[:, 0].min() == pytest.approx(0.025 * 32, abs=1.1)
    assert (box[:, 1] - box[:, 0]).mean() == pytest.approx(20 * zoom, abs=1)
    written = masks.any(1).argmax(1)
    loaded = box[:, 0].numpy()                           # it moves as it did
    off = (loaded - loaded.mean()) - zoom * (written - written.mean())
    assert np.abs(off).max() < 1.5
    assert (d.images[d.masks == 0] == 0).all()
    cam2world, intrinsics = data.fixed_camera(29)
    assert torch.equal(d.cam2world, cam2world) and torch.equal(d.intrinsics, intrinsics)
    uv, _ = project(torch.tensor([[1.0527, 0, 0]]), cam2world[0], intrinsics[0])
    torch.testing.assert_close(uv, torch.tensor([[1.0, 0.5]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webm", "a.avi"])
def test_videos_are_read_back_with_all_their_frames(name, tmp_path):
    frames, masks = made_clip(12, noise=0)
    how = dict(plugin="FFMPEG", fps=10, macro_block_size=1)
    if name == "a.gif":
        how = dict(loop=0)
    if name == "a.webm":
        how["codec"] = "libvpx-vp9"
    iio.imwrite(tmp_path / name, frames, **how)
    clip = data.read_clip(tmp_path / name, data.Reading(size=32))
    assert clip.shape == (12, 64, 64, 4)
    assert np.abs(clip[..., :3].astype(float) - frames).mean() < 8
    assert iou(data.subtract_background(clip[..., :3], "a"), masks) > 0.85
    assert data.read_clip(tmp_path / name, data.Reading(size=16)).shape == (12, 32, 32, 4)


@pytest.mark.parametrize("where", ["alpha", "beside images"])
def test_masks_of_a_folder_of_frames_are_used_as_they_are(where, tmp_path):
    frames, masks = made_clip(6, still=True)             # no motion: only masks can tell
    if where == "alpha":
        save(tmp_path / "a", with_alpha(frames, masks))
    else:
        save(tmp_path / "a" / "images", with_alpha(frames, masks), "masks")
    clip = data.read_clip(tmp_path / "a", READING)
    np.testing.assert_array_equal(clip[..., 3] > 127, masks)
    cover = data.load(tmp_path, 30, as_clips=True).masks.float().mean() / 255
    assert cover == pytest.approx(0.9 ** 2, abs=0.03)    # a square 90 % as high as the frame


def test_frames_are_read_in_the_order_of_their_numbers_and_those_without_mask_left_out(tmp_path):
    frames, masks = made_clip(12, still=True)
    for i in range(12):
        frames[i, :4] = 20 * i                           # tells the frames apart
    save(tmp_path / "a" / "images", with_alpha(frames, masks), "masks", "{}.png")
    (tmp_path / "a" / "masks" / "7.png").unlink()
    clip = data.read_clip(tmp_path / "a", READING)
    assert clip[:, 0, 0, 0].tolist() == [20 * i for i in range(12)]
    d = data.load(tmp_path, 32, as_clips=True)
    assert len(d.images) == 11 and d.skipped == ["1 frame left out: a: no mask"]


def test_clip_filter_drops_ends_thin_frames_and_short_clips(tmp_path):
    frames, masks = made_clip(20, side=24, still=True)
    masks[9, 26:] = False                                # a thin frame in either
    masks[3, 26:] = False
    save(tmp_path / "long", with_alpha(frames[4:], masks[4:]))
    save(tmp_path / "short", with_alpha(frames[:4], masks[:4]))
    d = data.load(tmp_path, 32, as_clips=True)
    assert d.object_index.bincount().tolist() == [16, 4]
    d = data.load(tmp_path, 32, as_clips=True, clip_filter=True)
    assert d.names == ["long"] and len(d.images) == 16 - 2 * 1 - 1
    assert d.skipped == ["2 frames left out: long: under 25 % foreground; "
                         "short: under 25 % foreground",
                         "1 object left out: short: under 4 frames left"]
    with pytest.raises(BadInput, match="short: under 4 frames left"):
        data.load(tmp_path, 32, objects="short", as_clips=True, clip_filter=True)


def test_frames_are_counted_anew_in_each_object_however_many_it_has():
    whose, heldout = data.number_frames([2, 5, 1], 2, moving=False)
    assert whose.tolist() == [0, 0, 1, 1, 1, 1, 1, 2]
    assert heldout.tolist() == [False, True, False, True, False, True, False, False]
    whose, heldout = data.number_frames([2, 5, 1], 2, moving=True)
    assert whose.tolist() == [0, 0, 1, 1, 1, 1, 1, 2]
    assert heldout.tolist() == [False, True, False, False, False, True, True, False]


def test_the_end_of_every_clip_is_held_out(puppets, tmp_path):
    assert torch.equal(puppets.heldout, (torch.arange(24) >= 20).repeat(3))
    write_strip(tmp_path / "a.png", made_clip(13)[0])
    write_strip(tmp_path / "b.png", made_clip(5)[0])     # too short for some: keeps all
    for holdout, expected in [(6, [11, 12]), (4, [10, 11, 12, 17]), (0, []), (14, [])]:
        d = data.load(tmp_path, 16, holdout, as_clips=True)
        assert d.moving and d.truth is None and d.heldout.nonzero()[:, 0].tolist() == expected


def test_pictures_are_clips_only_where_that_is_asked_for(tmp_path):
    photo = np.zeros((32, 32, 3), np.uint8)
    for name in ("coil/obj1__0.png", "coil/obj1__5.png", "loose/a.png", "scene/images/0.png",
                 "scene/masks/0.png", "nerf/a/train/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(tmp_path / name, photo)
    (tmp_path / "nerf" / "a" / "transforms.json").write_text("{}")
    (tmp_path / "scene" / "cameras_sphere.npz").touch()
    for name in ("loose", "scene", "scene/images"):
        with pytest.raises(BadInput, match="no layout that is known.*say --as-clips"):
            data.load(tmp_path / name, 32)
    with pytest.raises(BadInput, match="2 pictures, folders images, masks, and in no known form "
                                       "cameras_sphere.npz"):
        data.load(tmp_path / "scene", 32)
    with pytest.raises(BadInput, match="coil.*black"):   # cameras come first
        data.load(tmp_path / "coil", 32)
    with pytest.raises(BadInput, match='nerf: a/transforms.json: no list "frames"'):
        data.load(tmp_path / "nerf", 32)


def found_names(folder, **how):
    """Names of what is found there, and the first thing that was left out."""
    reading = data.Reading(size=16, **how)
    names = [one.name for one in data.find(folder, 1, reading)]
    return names, reading.skipped()[:1]


def test_clips_are_found_in_folders_below_and_have_one_name_each(tmp_path):
    frames, masks = made_clip(6)
    write_strip(tmp_path / "train" / "a.png", frames)
    write_strip(tmp_path / "test" / "b.png", frames)
    assert found_names(tmp_path, as_clips=True) == (["test/b", "train/a"], [])
    iio.imwrite(tmp_path / "train" / "alone.png", frames[0])
    names, left_out = found_names(tmp_path, as_clips=True)
    assert names == ["test/b", "train/a"] and "train/alone.png ...: no strip" in left_out[0]
    (tmp_path / "videos").mkdir()
    iio.imwrite(tmp_path / "videos" / "id0.gif", frames, loop=0)
    save(tmp_path / "videos" / "id0", with_alpha(frames, masks))
    names, left_out = found_names(tmp_path / "videos")
    assert names == ["id0"]
    assert left_out == ["1 object left out: id0: photos, but no cameras"]
    names, left_out = found_names(tmp_path / "videos", as_clips=True)
    assert names == ["id0"]
    assert left_out == ["1 object left out: id0: called id0, as is id0.gif"]
    assert found_names(tmp_path / "videos" / "id0", as_clips=True)[0] == ["id0"]
    assert found_names(tmp_path / "videos" / "id0.gif")[0] == ["id0"]        # a file by itself


BAD_CLIPS = []


def bad_clip(says, name="a"):
    """Adds a function that writes a clip called `name` of which `says` must be said."""
    return lambda write: BAD_CLIPS.append((says, name, write))


@bad_clip("1 frame.*at least 2")
def one_frame(path):
    save(path, made_clip(1)[0])


@bad_clip("not a readable video.*re-encode", "a.mp4")
def an_empty_video(path):
    path.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(500))


@bad_clip("a.gif: truncated, or not a picture", "a.gif")
def an_empty_gif(path):
    path.write_bytes(b"GIF89a" + bytes(20))


@bad_clip("a.png: truncated, or not a picture", "a.png")
def half_a_strip(path):
    write_strip(path, made_clip(6)[0])
    path.write_bytes(path.read_bytes()[:9000])


@bad_clip("nothing moves.*give masks", "a.png")
def a_still(path):
    write_strip(path, made_clip(6, noise=1.0, still=True)[0])


@bad_clip("nothing stands before the background in 8 of its 8", "a.png")
def only_a_shadow(path):
    wall = made_clip(8, noise=1.0, side=0)[0]
    wall[::3, 20:40, 20:40] = (0.87 * wall[::3, 20:40, 20:40]).astype(np.uint8)
    write_strip(path, wall)


@pytest.mark.parametrize("says, name, write", BAD_CLIPS)
def test_bad_clips_are_refused_by_name_and_cost_no_others(says, name, write, tmp_path):
    write(tmp_path / name)
    with pytest.raises(BadInput, match=says) as err:
        data.load(tmp_path, 32, as_clips=True)
    assert f"{tmp_path}: {name}" in str(err.value) and "\n" not in str(err.value)
    write_strip(tmp_path / "others" / "good.png", made_clip(6)[0])
    dataset = data.load(tmp_path, 32, as_clips=True)
    assert dataset.names == ["others/good"] and re.search(says, dataset.skipped[-1])


def test_a_frame_of_another_size_is_left_out(tmp_path):
    frames = made_clip(6)[0]
    save(tmp_path / "a", with_alpha(*made_clip(6)))
    iio.imwrite(tmp_path / "a" / "003.png", frames[3, :40])
    dataset = data.load(tmp_path, 32, as_clips=True)
    assert len(dataset.images) == 5
    assert dataset.skipped == ["1 frame left out: a: of another size than most"]


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


DAMAGES = [
    (damage_pose, "finite|numbers"),
    (damage_rotation, "not a rotation"),
    (damage_mask, "mask is empty"),
    (damage_size, "one object, one image size|its camera is for"),
]
# A quaternion is a rotation.
CANNOT_HAPPEN = [("COLMAP", damage_rotation), ("COLMAP text", damage_rotation)]


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("damage, says", DAMAGES)
def test_one_damaged_view_is_left_out_and_named(layout, damage, says, shots, tmp_path):
    if (layout, damage) in CANNOT_HAPPEN:
        pytest.skip("cannot happen in this layout")
    if layout in ("LLFF", "Objaverse renders"):
        shots = centred(shots)
    if (layout, damage) == ("SRN", damage_size):
        write_srn(tmp_path, *shots)
        iio.imwrite(tmp_path / "rgb" / "000005.png", shots[0][5, :64, :64, :3])
    else:
        WRITERS[layout](tmp_path, *damage(*shots))
    dataset = data.load(tmp_path, 32)
    assert len(dataset.images) == 11 and dataset.n_objects == 1
    [line] = dataset.skipped
    assert line.startswith("1 view left out: ") and re.search(says, line)
    assert re.search(r"\b0*[345]\.(png|npy|txt)", line)


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("damage, says", [(damage_focal, "focal length"),
                                          (damage_convention, "convention")])
def test_what_is_wrong_with_all_views_refuses_the_object(layout, damage, says, shots, tmp_path):
    if layout == "Objaverse renders":
        pytest.skip("it has no focal length, and takes either convention")
    WRITERS[layout](tmp_path, *damage(*shots))
    with pytest.raises(BadInput, match=says) as err:
        data.load(tmp_path, 32)
    assert str(tmp_path) in str(err.value) and "\n" not in str(err.value)


def test_a_mirrored_pose_is_left_out(shots, tmp_path):
    rgba, poses, camera = shots
    poses = poses.copy()
    poses[3, :3, 0] *= -1                                # R R^T = I still
    write_transforms(tmp_path, rgba, poses, camera)
    dataset = data.load(tmp_path, 32)
    assert dataset.skipped == ["1 view left out: images/003.png: the 3x3 part of its pose is not a "
                               "rotation"]


@pytest.mark.parametrize("layout", [*WRITERS, "COIL-100"])
def test_a_truncated_photo_is_left_out_and_named(layout, shots, tmp_path):
    if layout == "COIL-100":
        write_coil(tmp_path)
    else:
        WRITERS[layout](tmp_path, *centred(shots))
    n = len(data.load(tmp_path, 32).images)
    photo = sorted(p for p in tmp_path.rglob("*.png") if "masks" not in p.parent.name)[1]
    content = photo.read_bytes()
    photo.write_bytes(content[:len(content) // 2])
    dataset = data.load(tmp_path, 32)
    assert len(dataset.images) == n - 1
    [line] = dataset.skipped
    assert "truncated" in line and photo.relative_to(tmp_path).as_posix() in line


# File, and whether the rest of the object can be used without it.
MISSING = [
    ("SRN", "intrinsics.txt", False),
    ("SRN", "rgb/000003.png", True),
    ("LLFF", "images_2/003.png", False),                 # which row is whose is not known then
    ("COLMAP", "chair/obj7/sparse/0/cameras.bin", False),
    ("COLMAP", "chair/obj7/images/003.png", True),
    ("COLMAP text", "chair/obj7/sparse/0/cameras.txt", False),
    ("Objaverse renders", "003.png", True),
]


@pytest.mark.parametrize("layout, file, usable", MISSING)
def test_a_missing_file_costs_its_view_or_its_object(layout, file, usable, shots, tmp_path):
    WRITERS[layout](tmp_path, *centred(shots))
    (tmp_path / file).unlink()
    if usable:
        dataset = data.load(tmp_path, 32)
        assert len(dataset.images) == 11 and f"{file}: no such file" in dataset.skipped[0]
    else:
        with pytest.raises(BadInput, match=str(tmp_path)):
            data.load(tmp_path, 32)


DAMAGED = [
    ("NeRF transforms", "transforms.json", '{"frames": [{"file_path"', False),
    ("NeRF transforms", "transforms.json", "[]", False),
    ("NeRF transforms", "transforms.json", '{"frames": []}', False),
    ("NeRF transforms", "transforms.json", "[" * 100_000, False),
    ("SRN", "pose/000002.txt", "1 0 0 0", True),
    ("SRN", "pose/000002.txt", "1 0 0 x", True),
    ("SRN", "intrinsics.txt", "131", False),
    ("COLMAP", "chair/obj7/sparse/0/images.bin", "short", False),
    ("COLMAP", "chair/obj7/sparse/0/images.bin", "\x7f" * 100, False),
    ("COLMAP", "chair/obj7/sparse/0/cameras.bin", "short", False),
    ("COLMAP text", "chair/obj7/sparse/0/images.txt", "1 0 0", False),
    ("COLMAP text", "chair/obj7/sparse/0/cameras.txt", "1 PINHOLE 96 96 150", False),
    ("LLFF", "poses_bounds.npy", "not numpy", False),
    ("Objaverse renders", "002.npy", "not numpy", True),
]


@pytest.mark.parametrize("layout, file, content, usable", DAMAGED)
def test_a_damaged_text_or_array_costs_its_view_or_its_object(
        layout, file, content, usable, shots, tmp_path):
    WRITERS[layout](tmp_path, *centred(shots))
    (tmp_path / file).write_text(content)
    if usable:
        dataset = data.load(tmp_path, 32)
        assert len(dataset.images) == 11 and Path(file).stem in dataset.skipped[0]
    else:
        with pytest.raises(BadInput, match=str(tmp_path)) as err:
            data.load(tmp_path, 32)
        assert "\n" not in str(err.value)


def test_a_binary_file_that_ends_within_a_name_is_refused(shots, tmp_path):
    write_colmap(tmp_path, *shots)
    path = tmp_path / "chair" / "obj7" / "sparse" / "0" / "images.bin"
    before_the_name = 8 + 4 + 7 * 8 + 4
    path.write_bytes(path.read_bytes()[:before_the_name + 3])
    with pytest.raises(BadInput, match="obj7: no model in sparse/ can be read.*damaged"):
        data.load(tmp_path, 32)


def test_a_matrix_of_the_wrong_shape_is_left_out_or_refused(shots, tmp_path):
    write_transforms(tmp_path / "a", *shots)
    path = tmp_path / "a" / "transforms.json"
    meta = json.loads(path.read_text())
    meta["frames"][1]["transform_matrix"] = np.eye(3).tolist()
    path.write_text(json.dumps(meta))
    assert re.search(r"001.*shape \(3, 3\)", data.load(tmp_path / "a", 32).skipped[0])
    write_objaverse(tmp_path / "b", *centred(shots))
    np.save(tmp_path / "b" / "002.npy", np.eye(4))
    assert re.search(r"002.*shape \(4, 4\)", data.load(tmp_path / "b", 32).skipped[0])
    write_llff(tmp_path / "c", *shots)
    np.save(tmp_path / "c" / "poses_bounds.npy", np.zeros((12, 15)))
    with pytest.raises(BadInput, match="17 numbers"):
        data.load(tmp_path / "c", 32)


def test_photos_without_masks_are_refused_with_what_to_provide(shots, tmp_path):
    write_transforms(tmp_path, shots[0][..., :3], *shots[1:])
    with pytest.raises(BadInput, match="photos without masks: provide"):
        data.load(tmp_path, 32)


def test_a_mask_of_another_shape_is_left_out_and_one_of_another_size_is_not(shots, tmp_path):
    write_transforms(tmp_path, *shots, masks="masks")
    mask = tmp_path / "masks" / "004.png"
    whole = iio.imread(mask)
    iio.imwrite(mask, whole[:48])
    assert "masks/004.png: mask of (48, 96), photo of" in data.load(tmp_path, 32).skipped[0]
    iio.imwrite(mask, whole.repeat(3, 0).repeat(3, 1))   # a full-size mask beside a smaller photo
    large = data.load(tmp_path, 32)
    iio.imwrite(mask, whole)
    assert torch.equal(data.load(tmp_path, 32).masks, large.masks) and not large.skipped


def test_two_views_are_too_few(shots, tmp_path):
    write_transforms(tmp_path, shots[0][:2], shots[1][:2], shots[2])
    with pytest.raises(BadInput, match=": 2 usable views; a shape needs at least 3"):
        data.load(tmp_path, 32)


def test_transforms_without_a_focal_length_or_of_another_lens_are_refused(shots, tmp_path):
    write_transforms(tmp_path, *shots)
    path = tmp_path / "transforms.json"
    meta = json.loads(path.read_text())
    for lens in ({"k3": 0.1}, {"k4": 0.1}, {"camera_model": "OPENCV_FISHEYE"},
                 {"is_fisheye": True}):
        path.write_text(json.dumps(meta | lens))
        with pytest.raises(BadInput, match="transforms.json: a fisheye, or another .* undistort"):
            data.load(tmp_path, 32)
    del meta["fl_x"], meta["fl_y"]
    path.write_text(json.dumps(meta))
    with pytest.raises(BadInput, match="transforms.json: no focal length"):
        data.load(tmp_path, 32)


def test_photos_of_another_shape_than_their_camera_are_refused(shots, tmp_path):
    write_transforms(tmp_path, *shots, w=96, h=120)
    with pytest.raises(BadInput, match="000.png: 96x96, but its camera is for 96x120"):
        data.load(tmp_path, 32)


def test_an_unknown_colmap_model_is_refused_by_name(shots, tmp_path):
    write_colmap_text(tmp_path, *shots, model="OPENCV_FISHEYE")
    with pytest.raises(BadInput, match="OPENCV_FISHEYE is not known"):
        data.load(tmp_path, 32)


def test_no_path_no_folder_no_layout(tmp_path):
    with pytest.raises(BadInput, match="no such folder"):
        data.load(tmp_path / "nowhere", 32)
    with pytest.raises(BadInput, match="An object is a folder with transforms.json"):
        data.load(tmp_path, 32)
    (tmp_path / "transforms.json").touch()
    with pytest.raises(BadInput, match="this is a file: give the folder that it lies in"):
        data.load(tmp_path / "transforms.json", 32)


# ---------------------------------------------------------------- inputs as people bring them
def write_exif(path, pixels, turned):
    """A JPEG whose EXIF orientation is `turned`, by Pillow, which imageio brings along."""
    from PIL import Image
    exif = Image.Exif()
    exif[0x0112] = turned
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95, exif=exif)


def test_photos_that_exif_turns_are_upright_where_cameras_are_of_stored_pixels(shots, tmp_path):
    rgba, poses, camera = shots
    lying = poses.copy()                                 # the camera on its side: its -x is up
    lying[:, :3, 0], lying[:, :3, 1] = -poses[:, :3, 1], poses[:, :3, 0]
    stored = np.rot90(rgba, 1, (1, 2))[:8]               # not all round: else no side is up
    fx, fy, cx, cy = camera
    write_colmap_text(tmp_path, stored, lying[:8], [fy, fx, cy, SIDE - cx])
    folder = tmp_path / "chair" / "obj7"
    for i in range(8):
        (folder / "images" / f"{i:03d}.png").unlink()
        write_exif(folder / "images" / f"{i:03d}.jpg", stored[i, ..., :3].copy(), 6)
    text = (folder / "sparse" / "0" / "images.txt").read_text().replace(".png", ".jpg")
    (folder / "sparse" / "0" / "images.txt").write_text(text)
    dataset = data.load(tmp_path, 64)
    s, R, _, residual = similarity(dataset, poses[:8])
    assert residual < 1e-3 and R[1, 1] > 0.98            # upright, though its pictures lie
    write_transforms(tmp_path / "json", *shots)          # square: nobody tells
    write_exif(tmp_path / "json" / "images" / "000.jpg", rgba[0, ..., :3], 6)
    (tmp_path / "json" / "images" / "000.png").unlink()
    [line] = data.load(tmp_path / "json", 32).skipped
    assert "images/000.jpg: its EXIF orientation, 6, turns it" in line


def test_a_photo_that_exif_turns_is_turned_where_its_camera_is_of_the_turned_one(tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :20] = 255                                 # stored: bright on the left
    write_exif(tmp_path / "a.jpg", pixels, 6)
    (tmp_path / "masks").mkdir()
    iio.imwrite(tmp_path / "masks" / "a.png", np.tri(60, 40, dtype=np.uint8) * 255)
    pose = np.eye(4)

    def read(size, stored=False):
        view = data.View(tmp_path / "a.jpg", pose, (50, 50, size[0] / 2, size[1] / 2), size,
                         mask=tmp_path / "masks" / "a.png", stored=stored)
        return data.read_shot(view, READING)
    shot = read((40, 60))
    assert shot.photo.shape == (60, 40, 4) and shot.photo[:15, :, :3].min() > 200    # on top
    assert shot.up.tolist() == [0, 1, 0]
    with pytest.raises(BadInput, match="turned by EXIF"):                # the mask is upright
        read((60, 40))
    for turned, says in ((2, "mirrored"), (3, "nobody tells")):
        write_exif(tmp_path / "a.jpg", pixels, turned)
        with pytest.raises(BadInput, match=says):
            read((60, 40))


def test_listed_names_are_found_where_that_is_plain(shots, tmp_path):
    names = ["images\\000.png", "./images/001.png", "/home/somebody/x/002.png", "images/003",
             "004.png", "images/005.png"]
    write_transforms(tmp_path, *shots)
    path = tmp_path / "transforms.json"
    meta = json.loads(path.read_text())
    for frame, name in zip(meta["frames"], names):
        frame["file_path"] = name
    meta["frames"][8]["file_path"] = "images/frame_007.png"
    path.write_text(json.dumps(meta))
    (tmp_path / "images" / "003.png").rename(tmp_path / "images" / "003.PNG")
    dataset = data.load(tmp_path, 32)
    assert len(dataset.images) == 11
    assert dataset.skipped == ["1 view left out: images/frame_007.png: no such file",
                               "1 photo left out: images/008.png ...: no usable camera is listed"]


def test_what_systems_leave_behind_is_no_photo_and_no_pipe_is_waited_for(shots, tmp_path):
    write_llff(tmp_path, *centred(shots))
    before = data.load(tmp_path, 32)
    (tmp_path / "images_2" / "._000.png").write_bytes(b"Mac OS X")
    (tmp_path / "images_2" / ".DS_Store").write_bytes(b"Bud1")
    (tmp_path / ".cache").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "images_2" / "099.png")
    after = data.load(tmp_path, 32)
    assert torch.equal(before.images, after.images) and not after.skipped


def test_a_mask_files_own_alpha_is_the_mask_and_an_animation_is_its_first_picture(tmp_path):
    photo = np.full((8, 8, 3), 240, np.uint8)
    iio.imwrite(tmp_path / "a.png", photo)
    cut_out = np.dstack([photo, np.tri(8, dtype=np.uint8) * 255])
    (tmp_path / "masks").mkdir()
    iio.imwrite(tmp_path / "masks" / "a.png", cut_out)
    masked = data.read_masked(tmp_path / "a.png", READING, tmp_path / "masks" / "a.png")
    assert (masked[..., 3] == cut_out[..., 3]).all() and (masked[..., :3] == photo).all()
    from PIL import Image
    pictures = [Image.fromarray(np.full((8, 8, 3), grey, np.uint8)) for grey in (10, 90)]
    pictures[0].save(tmp_path / "b.png", save_all=True, append_images=pictures[1:])
    assert data.read_image(tmp_path / "b.png", READING)[0, 0].tolist() == [10, 10, 10, 255]


def remarks_on(rgba, poses, camera, tmp_path, **extra):
    """What looks odd about these shots, as a transforms.json; and the dataset."""
    folder = tmp_path / "set"
    shutil.rmtree(folder, ignore_errors=True)
    write_transforms(folder, rgba, poses, camera, **extra)
    dataset = data.load(folder, 48)
    return " | ".join(dataset.remarks), dataset


def test_what_looks_odd_is_said(shots, tmp_path):
    rgba, poses, camera = shots
    said, _ = remarks_on(rgba, poses, camera, tmp_path)
    assert said == ""
    inverted = rgba.copy()
    inverted[..., 3] = 255 - rgba[..., 3]
    assert "are they inverted?" in remarks_on(inverted, poses, camera, tmp_path)[0]
    long = camera * [10, 10, 1, 1]
    assert "is the focal length right?" in remarks_on(rgba, poses, long, tmp_path)[0]
    corner = camera * [1, 1, 0, 0]
    with pytest.raises(BadInput, match="hull is empty.*principal point"):
        remarks_on(rgba, poses, corner, tmp_path)
    twice = np.concatenate([rgba, rgba[:1]]), np.concatenate([poses, poses[:1]])
    assert "1 photos are copies" in remarks_on(*twice, camera, tmp_path)[0]
    said, dataset = remarks_on(rgba, np.linalg.inv(TURN4) @ poses, camera, tmp_path)
    assert "photos stand upright along y, which is taken for up" in said
    assert similarity(dataset, poses)[1][1, 1] > 0.99


def test_a_view_that_disagrees_with_the_others_is_left_out(shots, tmp_path):
    rgba, poses, camera = shots
    clean = data.load(write_and_return(tmp_path / "clean", rgba, poses, camera), 48)
    assert not clean.skipped
    turned = poses.copy()
    turned[4, :3, :3] = turned[4, :3, :3] @ np.diag([-1.0, 1, -1])       # it looks away
    exchanged = rgba.copy()
    exchanged[2] = np.roll(rgba[2], 30, 1)                               # another object's, say
    for i, (name, pictures, cameras) in enumerate((("turned", rgba, turned),
                                                   ("exchanged", exchanged, poses))):
        dataset = data.load(write_and_return(tmp_path / name, pictures, cameras, camera), 48)
        [line] = dataset.skipped
        assert line.startswith("1 view left out: ") and "disagree with those of the other" in line
        assert f"images/{(4, 2)[i]:03d}" in line and len(dataset.images) == 11


def write_and_return(folder, *shots):
    write_transforms(folder, *shots)
    return folder


def test_the_largest_of_several_models_is_taken_and_photos_without_one_are_counted(
        shots, tmp_path):
    rgba, poses, camera = shots
    write_colmap_text(tmp_path, rgba[:3], poses[:3], camera)
    sparse = tmp_path / "chair" / "obj7" / "sparse"
    sparse.rename(tmp_path / "kept")
    write_colmap_text(tmp_path, rgba, poses, camera)
    sparse.joinpath("0").rename(sparse / "1")
    (tmp_path / "kept" / "0").rename(sparse / "0")
    text = (sparse / "1" / "images.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("11 ")]
    (sparse / "1" / "images.txt").write_text("\n".join(line for line in lines if line))
    dataset = data.load(tmp_path, 32)                    # without the empty lines, too
    assert len(dataset.images) == 11
    assert "the largest of 2 models is taken, of 11 photos; 0 has 3" in dataset.remarks[0]
    assert dataset.skipped == ["1 photo left out: chair/obj7/images/011.png ...: no usable camera "
                               "is listed"]


@pytest.mark.parametrize("n", [3, 4, 6])
def test_few_views_fill_the_cube_as_many_do(n, tmp_path):
    azimuth = torch.arange(n, dtype=torch.float64) * 2 * np.pi / n
    poses = orbit(azimuth, np.radians(20.0), 5.0)
    poses[:, :3, 3] += CENTRE
    camera = torch.tensor([1.6, 1.6, 0.5, 0.5])
    rgba = photograph(poses.float(), camera)
    write_transforms(tmp_path, rgba, poses.numpy(), camera.double().numpy() * SIDE)
    s, _, _, _ = similarity(data.load(tmp_path, 64), poses.numpy())
    assert 0.75 < s * (HIGH - LOW).max().item() / (2 * data.MARGIN) < 1.05


def test_where_the_worlds_origin_is_makes_no_difference(shots, tmp_path):
    rgba, poses, camera = shots
    here = data.load(write_and_return(tmp_path / "here", rgba, poses, camera), 32)
    far = poses.copy()
    far[:, :3, 3] += np.array([431207.25, 121.0, 5412038.5])             # metres
    there = data.load(write_and_return(tmp_path / "there", rgba, far, camera), 32)
    torch.testing.assert_close(here.cam2world, there.cam2world, atol=1e-4, rtol=0)


def test_what_is_beside_a_window_was_photographed_and_is_no_object():
    masks = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    poses = orbit(torch.tensor([0.0, np.pi / 2, np.pi]), 0.0, 9.0)       # front, right, back
    camera = torch.tensor([[9.0, 9, 0.5, 0.5]]).repeat(3, 1)             # each sees half a unit
    low = np.full(3, -1.0)
    whole = torch.tensor([0.0, 0, 1, 1]).expand(3, 4)
    window = torch.tensor([-1.0, -1, 2, 2]).expand(3, 4)
    seen_by_two = data.hull(masks, poses, camera, whole, low, -low, cells=8)
    seen_by_all = data.hull(masks, poses, camera, window, low, -low, cells=8)
    assert seen_by_two[3, 3].all()                       # from z = -1 to 1: the right is not asked
    assert seen_by_all[3, 3].tolist() == [False, False, True, True, True, True, False, False]


def test_large_photos_are_reduced_by_a_whole_number_and_only_what_is_masked_counts():
    photo = np.zeros((6, 9, 4), np.uint8)
    photo[..., :3] = 250                                 # the background
    photo[2, 2] = [30, 60, 90, 255]
    small, factor = data.reduce(photo, 2)
    assert small.shape == (2, 3, 4) and factor == 3
    assert small[0, 0].tolist() == [30, 60, 90, 28]      # a ninth of 255
    assert small[1:, :, 3].max() == 0
    same, _ = data.reduce(photo, 4)
    assert same is photo


def test_the_camera_of_a_reduced_photo_is_reduced_with_it(shots, tmp_path):
    rgba, poses, camera = shots[0][:6], shots[1][:6], shots[2]
    write_transforms(tmp_path / "small", rgba, poses, camera)
    large = rgba.repeat(4, 1).repeat(4, 2)
    write_transforms(tmp_path / "large", large, poses, 4 * camera, w=4 * SIDE, h=4 * SIDE)
    small = data.load(tmp_path / "small", 12)            # 96 pixels: as they are
    large = data.load(tmp_path / "large", 12)            # 384, of which 8 x 12 are enough
    torch.testing.assert_close(large.intrinsics, small.intrinsics)
    assert torch.equal(large.images, small.images)


def test_a_mask_that_is_listed_and_absent_is_not_replaced_by_the_photo(shots, tmp_path):
    rgba, poses, camera = shots
    write_transforms(tmp_path, rgba, poses, camera)
    whole = json.loads((tmp_path / "transforms.json").read_text())
    whole["frames"][3]["mask_path"] = "masks/003.png"    # there is images/003.png
    (tmp_path / "transforms.json").write_text(json.dumps(whole))
    dataset = data.load(tmp_path, 16)
    assert dataset.skipped == ["1 view left out: masks/003.png: no such file"]


@pytest.mark.parametrize("elevation", [50, 70])
def test_cameras_above_on_one_side_keep_the_up_that_the_layout_has(elevation, tmp_path):
    azimuth = torch.linspace(-0.6, 0.6, 8, dtype=torch.float64)
    height = torch.full_like(azimuth, np.radians(elevation))
    poses = orbit(azimuth, height, 5.0)
    poses[:, :3, 3] += CENTRE
    camera = torch.tensor([1.6, 1.6, 0.5, 0.5])
    rgba = photograph(poses.float(), camera)
    write_transforms(tmp_path, rgba, poses.numpy(), camera.double().numpy() * SIDE)
    dataset = data.load(tmp_path, 32)
    assert not any("upright" in remark for remark in dataset.remarks)
    up = dataset.cam2world[:, 1, 1]                      # of the cameras, along the world's y
    torch.testing.assert_close(up, height.cos().float(), rtol=0, atol=0.02)


def test_colmap_names_that_end_in_numbers_and_spaces_are_names(shots, tmp_path):
    write_colmap_text(tmp_path, *shots)
    folder = tmp_path / "chair" / "obj7"
    path = folder / "sparse" / "0" / "images.txt"
    text = path.read_text().replace("003.png", "1 (3).png").replace("004.png", "2023 01.png")
    path.write_text(text)
    for kind in ("images", "masks"):
        (folder / kind / "003.png").rename(folder / kind / "1 (3).png")
        (folder / kind / "004.png").rename(folder / kind / "2023 01.png")
    dataset = data.load(tmp_path, 16)
    assert len(dataset.images) == 12 and dataset.skipped == []


def test_a_mask_that_vanishes_when_it_is_reduced_costs_its_view_alone(shots, tmp_path):
    rgba = shots[0].repeat(4, 1).repeat(4, 2)
    rgba[2, ..., 3] = 0
    rgba[2, ::40, ::40, 3] = 255                         # specks
    write_transforms(tmp_path, rgba, shots[1], 4 * shots[2], w=4 * SIDE, h=4 * SIDE)
    dataset = data.load(tmp_path, 12)
    assert len(dataset.images) == 11
    assert "images/002.png: its mask is empty" in dataset.skipped[0]


def test_suffixes_may_be_other_than_listed(shots, tmp_path):
    write_transforms(tmp_path, *shots, masks="masks")
    whole = json.loads((tmp_path / "transforms.json").read_text())
    for frame in whole["frames"]:
        frame["file_path"] += ".PNG"                     # the files' is .png
    (tmp_path / "transforms.json").write_text(json.dumps(whole))
    for path in (tmp_path / "masks").iterdir():
        path.rename(path.with_suffix(".PNG"))
    assert len(data.load(tmp_path, 16).images) == 12


def test_clips_beside_photos_and_pictures_beside_videos_are_named(shots, tmp_path):
    write_transforms(tmp_path / "photos" / "a", *shots)
    frames, masks = made_clip()
    for name in ("a.gif", "b.gif"):
        (tmp_path / "photos" / "clips").mkdir(exist_ok=True)
        iio.imwrite(tmp_path / "photos" / "clips" / name, frames)
    dataset = data.load(tmp_path / "photos", 16)
    assert dataset.skipped == ["2 videos left out: clips/a.gif ...: there are photos with cameras"]
    folder = tmp_path / "video"
    folder.mkdir()
    iio.imwrite(folder / "walk.mkv", frames, fps=10, codec="libx264")
    iio.imwrite(folder / "still.png", frames[0])
    dataset = data.load(folder, 16, as_clips=True)
    assert dataset.names == ["walk"] and "still.png" not in dataset.names
    assert any("1 picture left out" in line for line in dataset.skipped)


def test_coils_objects_of_two_folders_have_two_names(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        write_coil(tmp_path / part)
    names = data.load(tmp_path, 16).names
    assert names == ["test/obj3", "train/obj3"]
    assert data.load(tmp_path / "test", 16).names == ["obj3"]


def test_a_large_strip_is_refused_for_its_size_and_in_one_line(tmp_path, recwarn):
    iio.imwrite(tmp_path / "strip.png", np.zeros((1000, 95_000), np.uint8))
    assert data.is_moving(tmp_path, as_clips=True)
    with pytest.raises(BadInput, match="strip.png: 95000x1000 pixels; .* --max-megapixels"):
        data.load(tmp_path, 16, as_clips=True)
    assert len(recwarn) == 0


def test_a_npy_with_another_name_is_no_layout(shots, tmp_path):
    write_transforms(tmp_path / "a", *shots)
    np.save(tmp_path / "ids.npy", np.arange(5))
    assert data.load(tmp_path, 16).names == ["a"]


def test_text_files_may_begin_with_windows_mark(shots, tmp_path):
    write_transforms(tmp_path / "a", *shots)
    path = tmp_path / "a" / "transforms.json"
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    (tmp_path / "captions.txt").write_text("\ufeffa: a scene", encoding="utf-8")
    assert data.load(tmp_path, 16).captions == ["a scene"]


def test_a_folder_that_may_not_be_read_costs_no_other(shots, tmp_path, monkeypatch):
    write_transforms(tmp_path / "a", *shots)
    (tmp_path / "lost+found").mkdir()
    listing = data.listing

    def guarded(folder):
        if folder.name == "lost+found":
            raise PermissionError(f"{folder}: permission denied")
        return listing(folder)

    monkeypatch.setattr(data, "listing", guarded)
    dataset = data.load(tmp_path, 16)
    assert dataset.names == ["a"] and "1 folder left out: lost+found" in dataset.skipped[0]


def test_a_damaged_first_photo_of_llff_costs_its_view_alone(shots, tmp_path):
    write_llff(tmp_path, *shots)
    (tmp_path / "images_2" / "000.png").write_bytes(b"no picture")
    assert len(data.load(tmp_path, 16).images) == 11


def test_a_refused_coil_object_gives_its_own_reason(tmp_path):
    write_coil(tmp_path)
    for path in list(tmp_path.glob("obj3__*"))[2:]:
        path.unlink()
    for angle in (0, 5, 10, 15):
        iio.imwrite(tmp_path / f"obj2__{angle}.png", np.zeros((128, 128, 3), np.uint8))
    with pytest.raises(BadInput) as refusal:
        data.load(tmp_path, 16)
    [reason] = [line for line in str(refusal.value).split("; ") if "obj3__" in line]
    assert "2 usable views" in reason and "obj2" not in reason


def test_a_photo_that_exif_turns_and_whose_size_is_not_told_is_left_out(shots, tmp_path):
    write_transforms(tmp_path, *shots, masks="masks")
    whole = json.loads((tmp_path / "transforms.json").read_text())
    del whole["w"], whole["h"]
    (tmp_path / "transforms.json").write_text(json.dumps(whole))
    write_exif(tmp_path / "images" / "000.jpg", shots[0][0, ..., :3], 6)
    (tmp_path / "images" / "000.png").unlink()
    [line] = data.load(tmp_path, 16).skipped
    assert "images/000.jpg: its EXIF orientation, 6, turns it" in line


def test_one_object_may_have_its_caption_beside_its_cameras(shots, tmp_path):
    write_transforms(tmp_path, *shots)
    (tmp_path / "caption.txt").write_text("a scene")
    dataset = data.load(tmp_path, 16)
    assert dataset.captions == ["a scene"]
    assert "captions  1, the first: a scene" in data.describe(dataset)


def test_a_pose_that_is_transposed_is_left_out_for_that(shots, tmp_path):
    poses = shots[1].copy()
    poses[4] = poses[4].T                                # its rotation is one, too
    write_transforms(tmp_path, shots[0], poses, shots[2])
    [line] = data.load(tmp_path, 16).skipped
    assert "images/004.png: the last row of its pose is not 0 0 0 1" in line


def test_a_picture_that_is_no_strip_is_refused_as_a_clip(tmp_path):
    iio.imwrite(tmp_path / "portrait.png", np.zeros((100, 40, 3), np.uint8))
    with pytest.raises(BadInput, match="portrait.png: no strip of four or more square frames"):
        data.load(tmp_path / "portrait.png", 16, as_clips=True)


def test_names_are_shortened_where_they_begin_with_the_folder_and_nowhere_else():
    reading = data.Reading(size=64, root="/data")
    assert reading.shortened("/data/scene/data/a.png: bad") == "scene/data/a.png: bad"
    assert data.Reading(size=64).shortened("a/b: bad") == "a/b: bad"


def test_small_files_that_ask_for_much_are_refused_before_they_get_it(tmp_path):
    wide = tmp_path / "wide.png"
    iio.imwrite(wide, np.zeros((4, 400, 3), np.uint8))
    with pytest.raises(BadInput, match="wide.png: 400x4 pixels: no photo is so long"):
        data.read_image(wide, READING)
    iio.imwrite(tmp_path / "large.png", np.zeros((1100, 1000), np.uint8))
    with pytest.raises(BadInput, match="large.png: 1000x1100 .* higher --max-megapixels"):
        data.read_image(tmp_path / "large.png", data.Reading(size=64, max_megapixels=1.0))
    header = np.lib.format.header_data_from_array_1_0(np.zeros((1, 17)))
    header["shape"] = (10 ** 12, 17)
    with open(tmp_path / "poses_bounds.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(BadInput, match="poses_bounds.npy: expected rows of 17"):
        data.read_array(tmp_path / "poses_bounds.npy", 17)
    (tmp_path / "images.bin").write_bytes(struct.pack("<Q", 10 ** 18) + bytes(100))
    with pytest.raises(BadInput, match="images.bin: 1000000000000000000 entries.*--max-frames"):
        data.binary_images(tmp_path / "images.bin", 2000)
    (tmp_path / "images.bin").write_bytes(struct.pack("<Q", 1) + bytes(64) + b"a" * 2000)
    with pytest.raises(ValueError, match="name without an end"):
        data.binary_images(tmp_path / "images.bin", 2000)
    with open(tmp_path / "long.json", "wb") as file:
        file.truncate(2 ** 40)                           # a terabyte that takes no room
    with pytest.raises(BadInput, match="long.json: 1048576 MiB of text"):
        data.read_json(tmp_path / "long.json")


def test_the_transparency_of_a_video_is_its_mask(tmp_path):
    frames, masks = made_clip(6, still=True)
    rgba = with_alpha(frames, masks)
    writer = imageio_ffmpeg.write_frames(
        str(tmp_path / "a.webm"), (64, 64), pix_fmt_in="rgba", pix_fmt_out="yuva420p", fps=6,
        codec="libvpx-vp9", macro_block_size=2, output_params=["-auto-alt-ref", "0"])
    writer.send(None)
    for frame in rgba:
        writer.send(frame.tobytes())
    writer.close()
    clip = data.read_clip(tmp_path / "a.webm", data.Reading(size=32))
    assert iou(clip[..., 3] > 127, masks) > 0.95


# ---------------------------------------------------------------- real photos
def silhouettes_explained(dataset, k):
    """Share of the masks that the masks' own visual hull covers when it is seen again."""
    frames = dataset.frames_of(k)
    masks = dataset.masks[frames]
    poses, camera = dataset.cam2world[frames], dataset.intrinsics[frames]
    whole = torch.tensor([0.0, 0, 1, 1]).expand(len(frames), 4)
    inside = data.hull(masks, poses, camera, whole, np.full(3, -1.05), np.full(3, 1.05))
    points = (inside.nonzero() + 0.5) / 48 * 2.1 - 1.05
    side = 24
    uv, _ = project(points, poses, camera)
    pixel = (uv * side).long().clamp(0, side - 1)
    view = torch.arange(len(frames))[:, None]
    covered = torch.zeros(len(frames), side, side, dtype=torch.bool)
    covered[view, pixel[..., 1], pixel[..., 0]] = True
    small = torch.nn.functional.interpolate(masks[:, None].float(), (side, side), mode="area")
    truth = small[:, 0] > 127
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
    wrong = data.load(tmp_path, 64)                      # looks nearly right
    assert silhouettes_explained(wrong, 0) < 0.75


@needs_real
def test_lego_fills_the_cube_upright():
    d = data.load(REAL / "lego", 64)
    assert len(d.images) == 100
    assert (d.cam2world[:, 1, 3] > 0).all()              # all photographed from above
    assert silhouettes_explained(d, 0) > 0.8


@needs_real
def test_coil_cameras_explain_the_silhouettes():
    d = data.load(REAL / "coil100", 64, objects="obj5,obj65")
    assert d.names == ["obj5", "obj65"]                  # of one height in all views; and not
    for k in range(2):
        assert silhouettes_explained(d, k) > 0.85, d.names[k]


def check_people(dataset):
    """Masks as people have them: neither specks nor walls, and one picture each stands tall."""
    cover = dataset.masks.float().mean((1, 2)) / 255
    assert 0.05 < cover.min() and cover.max() < 0.6
    _, _, top, bottom = data.mask_box(dataset.masks).T / dataset.masks.shape[1]
    height = bottom - top
    for k in range(dataset.n_objects):
        assert 0.5 < height[dataset.frames_of(k)].max() < 0.95


@needs_real
def test_weizmann_masks_are_people():
    d = data.load(REAL / "weizmann", 64, objects="clip00,clip10,clip24", as_clips=True)
    assert d.moving and d.n_objects == 3
    check_people(d)


@needs_real
@pytest.mark.slow
def test_weizmann_is_28_clips_whose_masks_are_people():
    d = data.load(REAL / "weizmann", 64, as_clips=True)
    assert d.n_objects == 28 and d.object_index.bincount().min() == 51
    check_people(d)


# ---------------------------------------------------------------- load: what settings say
def settings_of(**changed):
    """Settings as train.py's, of small built-in data."""
    chosen = dict(size=16, holdout=3, seed=2, n_objects=4, n_views=6, objects=None, arc=0.0,
                  shared_colours=True, clip_filter=False, as_clips=False, max_megapixels=64.0,
                  max_frames=2000)
    return SimpleNamespace(**chosen | changed)


def test_every_setting_reaches_the_data(tmp_path):
    plain = data.load_for(settings_of(), "synthetic")
    assert plain.images.shape == (24, 16, 16, 3) and plain.n_objects == 4
    assert plain.heldout.view(4, 6).nonzero()[:, 1].unique().tolist() == [2, 5]
    assert torch.equal(plain.images, data.load("synthetic", 16, 3, 2, 4, 6).images)
    assert data.load_for(settings_of(objects=" 0003,0001"), "synthetic").names == ["0001", "0003"]
    arc = data.load_for(settings_of(arc=30.0), "synthetic")
    assert arc.cam2world[:, :3, 3].norm(dim=1).min() > 11
    shared = data.load("puppets", 16, 3, 2, 4, 6, shared_colours=True)
    own = data.load("puppets", 16, 3, 2, 4, 6, shared_colours=False)
    assert not torch.equal(shared.images, own.images)
    assert torch.equal(data.load_for(settings_of(), "puppets").images, shared.images)
    settings = settings_of(shared_colours=False)
    assert torch.equal(data.load_for(settings, "puppets").images, own.images)
    write_strip(tmp_path / "a.png", made_clip(12)[0])
    assert data.load_for(settings_of(as_clips=True), tmp_path).n_objects == 1
    for changed, says in ((dict(as_clips=False), "no layout"), (dict(clip_filter=True), "under 4"),
                          (dict(max_megapixels=0.01), "higher --max-megapixels"),
                          (dict(max_frames=11), "higher --max-frames")):
        with pytest.raises(BadInput, match=says):
            data.load_for(settings_of(**dict(as_clips=True) | changed), tmp_path)


def test_what_moves_is_told_before_it_is_loaded(tmp_path):
    assert data.is_moving("puppets") and not data.is_moving("synthetic")
    assert not data.is_moving(tmp_path / "nowhere") and not data.is_moving(tmp_path)
    write_strip(tmp_path / "a.png", made_clip(12)[0])
    assert data.is_moving(tmp_path, as_clips=True) and not data.is_moving(tmp_path)
    iio.imwrite(tmp_path / "a.gif", made_clip(9)[0], loop=0)
    assert data.is_moving(tmp_path)


# ---------------------------------------------------------------- to know data again
def test_portraits_tell_other_photos_and_forgive_a_shade():
    dataset = data.load("synthetic", 16, 3, n_objects=3, n_views=3)
    ours = data.portraits(dataset)
    rgba = torch.cat([dataset.images, dataset.masks[..., None]], -1) / 255       # (9, 16, 16, 4)
    first = rgba[:3].reshape(3, 4, 4, 4, 4, 4).mean((0, 2, 4)).permute(2, 0, 1)
    assert ours.shape == (3, 4, 4, 4)
    torch.testing.assert_close(ours[0], first)
    shade = replace(dataset, images=dataset.images.clamp(max=251) + 3)
    assert sample.are_same(ours, data.portraits(shade))
    shape = replace(dataset, masks=255 - dataset.masks)
    colour = replace(dataset, images=dataset.images.roll(1, -1))
    swapped = replace(dataset, images=dataset.images.roll(3, 0), masks=dataset.masks.roll(3, 0))
    for other in (shape, colour, swapped, data.load("synthetic", 16, 3, 1, 3, 3)):
        assert not sample.are_same(ours, data.portraits(other))
    assert not sample.are_same(ours, ours[:2])


# ---------------------------------------------------------------- a cache
@pytest.fixture(scope="module")
def things(shots, tmp_path_factory):
    """A folder of three objects of 4, 5 and 6 views, two with captions; one view has no photo."""
    folder = tmp_path_factory.mktemp("things")
    rgba, poses, camera = shots
    for name, n in (("chair", 4), ("lamp", 6), ("vase", 6)):
        write_transforms(folder / name, rgba[:n], poses[:n], camera)
    (folder / "lamp" / "images" / "003.png").unlink()
    (folder / "captions.txt").write_text("lamp: a lamp\nvase: a vase \u00e9\n")
    return folder


@pytest.fixture(scope="module")
def kept(things, tmp_path_factory):
    """A cache of them, not to be written into: see kept_copy."""
    folder = tmp_path_factory.mktemp("kept")
    data.write_cache(things, folder, data.Reading(16))
    return folder


@pytest.fixture
def kept_copy(kept, tmp_path):
    return shutil.copytree(kept, tmp_path / "kept")


def check_same(a, b):
    """Every field of two Datasets is the same, but for what only a cache has."""
    for one in fields(data.Dataset):
        mine, other = getattr(a, one.name), getattr(b, one.name)
        if one.name in ("known_portraits", "mapped"):
            continue
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == other.dtype and torch.equal(mine, other), one.name
        else:
            assert mine == other, one.name


def test_a_cache_gives_the_same_dataset_to_the_same_bits(things, kept):
    source, cached = data.load(things, 16), data.load(kept, 16)
    check_same(source, cached)
    assert cached.skipped and cached.remarks == ["2 of 3 objects have a caption"]
    assert source.mapped is None and cached.mapped is not None
    assert torch.equal(data.portraits(source), cached.known_portraits)
    assert data.portraits(cached) is cached.known_portraits
    index = torch.tensor([[3, 0], [14, 9]])
    for size in (16, 5):
        for ours, theirs in zip(source.batch(index, size), cached.batch(index, size)):
            assert torch.equal(ours, theirs)


REAL_SOURCES = [("coil100", "obj2,obj93", False), ("weizmann", "clip04,clip05", True),
                pytest.param("ethiopian_head", None, False, marks=pytest.mark.slow)]


@needs_real
@pytest.mark.parametrize("name, objects, as_clips", REAL_SOURCES)
def test_a_cache_of_real_photos_and_clips_gives_them_back(name, objects, as_clips, tmp_path):
    reading = data.Reading(64, as_clips=as_clips)
    data.write_cache(REAL / name, tmp_path, reading, objects)
    source = data.load(REAL / name, 64, objects=objects, as_clips=as_clips)
    check_same(source, data.load(tmp_path, 64, as_clips=as_clips))
    assert data.is_moving(tmp_path) == as_clips == source.moving


def test_which_frames_are_held_out_and_which_objects_are_wanted_is_asked_for_at_reading(
        things, kept):
    for holdout in (0, 2):
        check_same(data.load(things, 16, holdout), data.load(kept, 16, holdout))
    source = data.load(things, 16, objects="vase, chair")
    cached = data.load(kept, 16, objects="vase, chair")
    cached.skipped, cached.remarks = source.skipped, source.remarks      # those of all objects
    check_same(source, cached)
    assert torch.equal(data.portraits(source), cached.known_portraits)
    with pytest.raises(BadInput, match="no object sofa; there are: chair, lamp, vase"):
        data.load(kept, 16, objects="sofa")


def test_what_is_known_of_a_cache_before_it_is_loaded(things, kept, tmp_path):
    assert [one.name for one in data.find(kept, 1)] == ["chair", "lamp", "vase"]
    captions = data.read_captions(kept, data.find(kept, 1), READING)
    assert captions == {"chair": None, "lamp": "a lamp", "vase": "a vase \u00e9"}
    assert not data.is_moving(kept)
    write_strip(tmp_path / "clips" / "a.png", made_clip(12)[0])
    data.write_cache(tmp_path / "clips", tmp_path / "kept", data.Reading(16, as_clips=True))
    assert data.is_moving(tmp_path / "kept")
    check_same(data.load(tmp_path / "clips", 16, 3, as_clips=True),
               data.load(tmp_path / "kept", 16, 3, as_clips=True))


def flip_byte(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def replace_text(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


CACHE_DAMAGES = {
    "a pixel": lambda at: flip_byte(at / data.FRAMES, 100),
    "a number of a camera": lambda at: flip_byte(at / data.FRAMES, 15 * 16 * 16 * 4 + 100),
    "the last byte": lambda at: flip_byte(at / data.FRAMES, -1),
    "cut": lambda at: os.truncate(at / data.FRAMES, 15000),
    "2 TiB, nearly all of them holes": lambda at: os.truncate(at / data.FRAMES, 2**41),
    "a byte too many": lambda at: (at / data.FRAMES).open("ab").write(b"0"),
    "no frames": lambda at: (at / data.FRAMES).unlink(),
    "empty": lambda at: os.truncate(at / data.FRAMES, 0),
    "no json": lambda at: os.truncate(at / data.ABOUT, 0),
    "json, cut": lambda at: os.truncate(at / data.ABOUT, 200),
    "json of another form": lambda at: (at / data.ABOUT).write_text("[1]"),
    "a name": lambda at: replace_text(at / data.ABOUT, '"lamp"', '"lame"'),
    "a caption": lambda at: replace_text(at / data.ABOUT, "a vase", "a vote"),
    "how it was read": lambda at: replace_text(at / data.ABOUT, '"size": 16', '"size": 17'),
    "the hash of the frames": lambda at: replace_text(at / data.ABOUT, 'h": "', 'h": "0'),
}


@pytest.mark.parametrize("damage", CACHE_DAMAGES)
def test_a_cache_that_was_cut_or_changed_is_named_and_what_to_do(damage, kept_copy):
    CACHE_DAMAGES[damage](kept_copy)
    folder = re.escape(str(kept_copy))
    says = rf"{folder}.frames.*: this cache is cut or changed; write it anew: python data.py " \
           rf"--data \S+ --cache {folder}( --size 16)?$"
    with pytest.raises(BadInput, match=says):
        data.load(kept_copy, 16)


@pytest.mark.parametrize("file", [data.FRAMES, data.ABOUT])
def test_a_file_of_another_cache_is_named(file, things, kept_copy, tmp_path):
    data.write_cache(things, tmp_path / "other", data.Reading(16, max_frames=500), "chair,lamp")
    shutil.copy(tmp_path / "other" / file, kept_copy)
    says = f"cut or changed; .* --data {re.escape(str(things))} --cache"
    with pytest.raises(BadInput, match=says):
        data.load(kept_copy, 16, max_frames=500 if file == data.ABOUT else 2000)


def test_a_cache_of_another_version_is_named(kept_copy, monkeypatch):
    monkeypatch.setattr(data, "FORMAT", data.FORMAT + 1)
    with pytest.raises(BadInput, match="of another version; write it anew"):
        data.load(kept_copy, 16)


@pytest.mark.parametrize("name, value", [("size", 32), ("as_clips", True), ("clip_filter", True),
                                         ("max_megapixels", 1.0), ("max_frames", 5)])
def test_a_cache_that_was_read_otherwise_is_refused_by_the_flag(name, value, kept):
    made = getattr(data.Reading(16), name)
    says = f"--{name.replace('_', '-')} is {value} here, but {made} in the cache {kept}: give the "
    with pytest.raises(BadInput, match=re.escape(says)):
        data.load(kept, **{"size": 16} | {name: value})


def test_who_writes_a_cache_anew_as_told_can_read_it(things, tmp_path, monkeypatch):
    """The command names what differs from data.py's defaults, and the objects that were chosen."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "small"
    data.write_cache(things, folder, data.Reading(16), "chair,lamp")
    wanted = {"size": 32, "max_megapixels": 1.5}
    with pytest.raises(BadInput) as refused:
        data.load(folder, **wanted)
    told = shlex.split(str(refused.value).partition("write it anew: ")[2])
    assert told[:2] == ["python", "data.py"]
    data.main(told[2:])
    dataset = data.load(folder, **wanted)
    assert sorted(dataset.names) == ["chair", "lamp"] and dataset.images.shape[1] == 32


def test_what_cannot_be_cached_is_refused_and_what_is_in_the_folder_stays(
        things, kept, shots, tmp_path):
    reading = data.Reading(16)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    for source, folder, says in ((things, "mine", "there is thesis.txt; name a new folder"),
                                 (kept, "new", "is a cache already"),
                                 ("synthetic", "new", "synthetic is made again in seconds"),
                                 ("puppets", "new", "puppets is made again in seconds"),
                                 (tmp_path / "none", "new", "no such folder")):
        with pytest.raises(BadInput, match=says):
            data.write_cache(source, tmp_path / folder, reading)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
    write_transforms(tmp_path / "bare", shots[0][..., :3], *shots[1:])   # photos without masks
    with pytest.raises(BadInput, match="0 usable views"):
        data.write_cache(tmp_path / "bare", tmp_path / "new", reading)
    assert not list((tmp_path / "new").iterdir())


def watch_writing(monkeypatch, watch):
    """Calls watch() whenever the writer, after an object, asks how much room the disk has."""
    real = shutil.disk_usage

    def disk_usage(path):
        return watch() or real(path)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)


def test_a_cache_is_written_object_by_object(things, tmp_path, monkeypatch):
    in_memory, on_disk = [], []

    def watch():
        captures = [one for one in gc.get_objects() if type(one) is data.Capture]
        in_memory.append(len(captures))
        (path,) = tmp_path.glob(".frames.*")
        on_disk.append(path.stat().st_size)

    watch_writing(monkeypatch, watch)
    data.write_cache(things, tmp_path, data.Reading(64))
    assert in_memory == [1, 1, 1]
    whole = [frames * 64 * 64 * 4 for frames in (4, 9, 15)]          # but for Python's own buffer
    assert on_disk == pytest.approx(whole, abs=2**13)


def test_writing_that_is_stopped_leaves_nothing_that_counts_as_a_cache(
        things, kept_copy, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in kept_copy.iterdir()}
    objects = iter(range(100))

    def watch():
        if next(objects) % 2 == 1:
            raise data.Interrupted(2)

    watch_writing(monkeypatch, watch)
    for folder in (tmp_path / "new", kept_copy):
        with pytest.raises(data.Interrupted):
            data.write_cache(things, folder, data.Reading(16))
    assert not list((tmp_path / "new").iterdir())
    assert {path.name: path.read_bytes() for path in kept_copy.iterdir()} == before
    with pytest.raises(BadInput, match="no layout that is known"):
        data.load(tmp_path / "new", 16)
    # Killed between the two files: frames without their json are no cache, and are replaced.
    (tmp_path / "new" / data.FRAMES).write_bytes(b"0")
    assert not data.is_cache(tmp_path / "new")
    monkeypatch.undo()
    data.write_cache(things, tmp_path / "new", data.Reading(16))
    check_same(data.load(things, 16), data.load(tmp_path / "new", 16))


def test_a_disk_that_will_be_full_is_refused_at_the_first_object(things, tmp_path, monkeypatch):
    first, all_three = 4 * 16 * 16 * 4, 3 * 4 * 16 * 16 * 4
    asked = []

    def watch():
        asked.append(1)
        return SimpleNamespace(free=all_three - first - 1)

    watch_writing(monkeypatch, watch)
    with pytest.raises(BadInput, match="the cache would take about 0.00 GiB, and 0.00 are free"):
        data.write_cache(things, tmp_path / "new", data.Reading(16))
    assert len(asked) == 1 and not list((tmp_path / "new").iterdir())


def test_frames_of_a_cache_stay_in_their_file_and_what_was_looked_at_is_given_back(kept_copy):
    dataset = data.load(kept_copy, 16)
    before = dataset.images[2, 8, 8].tolist()
    with open(kept_copy / data.FRAMES, "r+b") as file:
        file.seek((2 * 256 + 8 * 16 + 8) * 4)
        file.write(bytes([before[0] ^ 255]))
    assert dataset.images[2, 8, 8].tolist() == [before[0] ^ 255, *before[1:]]
    if not Path("/proc/self/smaps").exists():
        return                                           # no other system tells what is resident

    def resident():
        """KiB of the file that count as this process's memory."""
        of_file = Path("/proc/self/smaps").read_text().partition(str(kept_copy / data.FRAMES))[2]
        return int(re.search(r"Rss: +(\d+) kB", of_file)[1])

    assert resident() > 0
    dataset.batch(torch.tensor([0, 14]), 16)
    assert resident() == 0


@pytest.mark.parametrize("heldout", [None, True, False])
def test_frames_of_an_object_are_found_as_by_looking_at_all(heldout, kept):
    dataset = data.load(kept, 16, 3)
    for k in range(3):
        frames = dataset.frames_of(k, heldout)
        assert torch.equal(frames, data.Frames.frames_of(dataset, k, heldout))


def test_training_from_a_cache_is_training_from_its_source(things, kept, tmp_path, monkeypatch):
    for module, name in ((sample, "save_training_sheet"), (sample, "save_orbit"),
                         (train, "plot_log")):
        monkeypatch.setattr(module, name, lambda *_: None)
    flags = ["--stage", "1", "--preset", "micro", "--size", "16", "--finer-at", "", "--channels",
             "16", "--embed-dim", "8", "--n-samples", "4", "--log-every", "1"]

    def train_on(source):
        """Two steps, then two more with --resume -> the log's losses, and the run."""
        out = tmp_path / source.name
        arguments = [*flags, "--data", str(source), "--out", str(out)]
        train.main([*arguments, "--steps", "2"])
        train.main([*arguments, "--steps", "4", "--resume"])
        losses = [row.split(",")[:4] for row in (out / "log.csv").read_text().splitlines()]
        return losses, sample.open_run(out, stages=(1,))

    losses, trained = train_on(things)
    cached_losses, cached = train_on(kept)
    assert losses == cached_losses and len(losses) == 5
    # A cache stands for its source, and the other way round.
    assert cached.source == str(kept) and sample.load_data(cached).mapped is not None
    check_same(sample.load_data(cached, str(things)), sample.load_data(trained, str(kept)))


def test_command_line_writes_a_cache_and_tells_what_is_in_it(things, tmp_path, capsys):
    flags = ["--size", "16", "--out", str(tmp_path / "out")]
    data.main(["--data", str(things), *flags])
    told = capsys.readouterr().out.splitlines()
    data.main(["--data", str(things), "--cache", str(tmp_path / "kept"), *flags])
    told_while_writing = capsys.readouterr().out.splitlines()
    data.main(["--data", str(tmp_path / "kept"), *flags])
    assert capsys.readouterr().out.splitlines() == told
    assert told_while_writing[:-1] == told[:-1]
    assert told_while_writing[-1].startswith(f"wrote     {tmp_path / 'kept' / data.FRAMES}, ")
    dataset = data.load(tmp_path / "kept", 16)
    assert dataset.names == ["chair", "lamp", "vase"]


# ---------------------------------------------------------------- command line
def test_command_line_names_what_it_found_and_draws_it(shots, tmp_path, capsys):
    write_transforms(tmp_path / "thing", *shots)
    (tmp_path / "thing" / "images" / "004.png").unlink()
    data.main(["--data", str(tmp_path / "thing"), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    for words in ("NeRF transforms", "11: 11 to 11 an object", "64 x 64", "elevation",
                  "1 view left out: images/004.png: no such file", "100 % see the cube's middle"):
        assert words in said
    assert iio.imread(tmp_path / "out" / "sheet.png").shape == (64, 12 * 64, 3)
    assert iio.imread(tmp_path / "out" / "cameras.png").std() > 5


def test_command_line_says_of_clips_that_cameras_are_unknown(tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    write_strip(tmp_path / "clips" / "a.png", made_clip(12)[0])
    arguments = ["--data", str(tmp_path / "clips"), "--size", "32", "--out", str(tmp_path / "out"),
                 "--as-clips"]
    data.main(arguments)
    said = capsys.readouterr().out
    for words in ("clips", "cameras   unknown", "12: 12 to 12 an object; 2 held out"):
        assert words in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sheet.png"]
    with pytest.raises(BadInput, match="under 4 frames"):            # the square is too small
        data.main([*arguments, "--clip-filter"])


def test_command_line_refuses_what_cannot_be():
    for arguments, says in ((["--dat", "x"], "did you mean --data?"),            # no prefixes
                            (["--size", "4"], "--size must be between 8 and"),
                            (["--holdout", "-1"], "--holdout must be between 0"),
                            (["--max-frames", "0"], "--max-frames must be between"),
                            (["--max-megapixels", "nan"], "--max-megapixels must be")):
        with pytest.raises(BadInput, match=re.escape(says)):
            data.main(arguments)


def test_command_line_errors_are_one_line_and_status_2(tmp_path):
    command = [sys.executable, str(ROOT / "data.py"), "--data", str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())                  # nothing half-written


# ---- What takes long says so ---------------------------------------------------------------------
def test_every_ten_seconds_a_line_tells_how_long_the_rest_will_take(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(data.time, "monotonic", lambda: now[0])
    done = []
    for item in data.telling(list("abcdef"), "letters"):
        done.append(item)
        now[0] += 4                                      # seconds for each
    assert done == list("abcdef")
    assert capsys.readouterr().out.splitlines() == ["letters | 3/6 | 12 s left"]
    assert list(data.telling([], "letters")) == [] and not capsys.readouterr().out


def test_loading_tells_of_its_objects(monkeypatch, capsys):
    ticks = iter(range(0, 1000, 11))
    monkeypatch.setattr(data.time, "monotonic", lambda: next(ticks))
    data.load("synthetic", 8, n_objects=3, n_views=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["data    | objects | 1/3 | 44 s left", "data    | objects | 2/3 | 16 s left"]
