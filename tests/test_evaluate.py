"""evaluate.py: distances in closed form, shapes by brute force, perfect poses, runs compared.

Fast: pictures of 16 or 32 pixels and networks of random weights. With --slow, the reader of
attributes is learned from true objects, too.
"""
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import render
import sample
import train
from data import BadInput

F64 = torch.float64


def normal(*shape, seed=0):
    """Unit normal numbers, float64, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def uniform(*shape, seed=0):
    """Numbers in [0, 1), float32, the same at every call."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def refused(call, *words):
    """Bad input is one line that holds all these words."""
    with pytest.raises(BadInput) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


# ---- Pictures ------------------------------------------------------------------------------------
def test_ssim_is_one_for_equal_pictures_and_negative_for_a_picture_and_its_negative():
    picture = uniform(2, 3, 24, 24)
    torch.testing.assert_close(evaluate.ssim(picture, picture), torch.ones(2))
    assert evaluate.ssim(picture, 1 - picture).max() < 0


def test_ssim_of_flat_pictures_is_their_luminance_term():
    dark, light = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)     # variances are 0
    assert evaluate.ssim(dark, light).item() == pytest.approx(expected, rel=1e-4)


def test_ssim_of_a_picture_as_small_as_its_window_is_the_formula_of_weighted_moments():
    a, b = uniform(1, 1, 11, 11, seed=1).double(), uniform(1, 1, 11, 11, seed=2).double()
    y, x = torch.meshgrid(torch.arange(-5.0, 6), torch.arange(-5.0, 6), indexing="ij")
    weight = torch.exp(-(x**2 + y**2) / (2 * 1.5**2)).double()
    weight = weight / weight.sum()
    mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
    variance_a = (weight * (a - mean_a) ** 2).sum()
    variance_b = (weight * (b - mean_b) ** 2).sum()
    covariance = (weight * (a - mean_a) * (b - mean_b)).sum()
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    structure = (2 * covariance + 9e-4) / (variance_a + variance_b + 9e-4)
    found = evaluate.ssim(a.float(), b.float()).item()
    assert found == pytest.approx(float(luminance * structure), abs=1e-5)


VGG16_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))    # numbers of its layers


def vgg16_weights():
    """Random weights of torchvision's VGG-16 layout."""
    weights, channels = {}, 3
    generator = torch.Generator().manual_seed(0)
    for layers, width in zip(VGG16_STAGES, (64, 128, 256, 512, 512)):
        for layer in layers:
            weight = torch.randn(width, channels, 3, 3, generator=generator)
            weights[f"features.{layer}.weight"] = weight * (2 / (9 * channels))**0.5
            weights[f"features.{layer}.bias"] = torch.zeros(width)
            channels = width
    return weights


def lpips_weights():
    """Random weights of LPIPS's linear layers."""
    weights = {}
    for stage, width in enumerate((64, 128, 256, 512, 512)):
        weights[f"lin{stage}.model.1.weight"] = uniform(1, width, 1, 1, seed=stage)
    return weights


def unit_maps(vgg, picture):
    """VGG-16 written out: of each stage the last map, its vectors at unit length."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = (picture - mean) / deviation
    maps = []
    for layers in VGG16_STAGES:
        for layer in layers:
            x = F.conv2d(x, vgg[f"features.{layer}.weight"], padding=1).relu()
        maps.append(x / x.square().sum(1, keepdim=True).sqrt())
        x = F.max_pool2d(x, 2)
    return maps


def test_lpips_is_its_formula(tmp_path):
    vgg, linear = vgg16_weights(), lpips_weights()
    torch.save(vgg, tmp_path / "vgg16.pth")
    torch.save(linear, tmp_path / "vgg.pth")
    lpips = evaluate.load_lpips(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")
    a, b = uniform(2, 3, 32, 32, seed=1), uniform(2, 3, 32, 32, seed=2)
    assert lpips(a, a).tolist() == [0, 0]
    expected = torch.zeros(2)
    for stage, (x, y) in enumerate(zip(unit_maps(vgg, a), unit_maps(vgg, b))):
        weight = linear[f"lin{stage}.model.1.weight"]
        expected += (weight * (x - y) ** 2).sum(1).mean((1, 2))
    assert expected.min() > 0
    torch.testing.assert_close(lpips(a, b), expected)


def test_lpips_says_which_of_its_files_is_wrong(tmp_path):
    vgg, linear = tmp_path / "vgg16.pth", tmp_path / "vgg.pth"
    torch.save(vgg16_weights(), vgg)
    torch.save(lpips_weights(), linear)
    torch.save(torch.zeros(3), tmp_path / "one.pth")                          # no dict
    refused(lambda: evaluate.load_lpips(linear, linear), "vgg16-397923af")
    refused(lambda: evaluate.load_lpips(vgg, vgg), "vgg.pth")
    refused(lambda: evaluate.load_lpips(vgg, tmp_path / "no.pth"), "no.pth")
    refused(lambda: evaluate.load_lpips(tmp_path / "one.pth", linear), "one.pth")


def test_inception_without_torch_fidelity_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)   # as where it was never installed
    refused(lambda: evaluate.load_inception(tmp_path / "w.pth"), "pip install torch-fidelity")


def test_inception_reads_numbers_only(tmp_path, monkeypatch):
    def trusting(*arguments):
        pytest.fail("a file with code in it was trusted")

    module = SimpleNamespace(FeatureExtractorInceptionV3=trusting)
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    torch.save(tmp_path, tmp_path / "w.pth")                   # a pickled path, not numbers
    refused(lambda: evaluate.load_inception(tmp_path / "w.pth"), "w.pth", "weights-inception")


# ---- Two sets of pictures ------------------------------------------------------------------------
def exact_features(n, mean, covariance, seed=0):
    """n feature vectors whose mean and (n - 1) covariance are exactly as asked."""
    x = normal(n, len(mean), seed=seed)
    x = x - x.mean(0)
    root = torch.linalg.cholesky(torch.cov(x.T))
    white = torch.linalg.solve_triangular(root, x.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_independent_features_is_its_closed_form():
    zero = torch.zeros(3, dtype=F64)
    a = exact_features(50, zero, torch.diag(torch.tensor([1.0, 4, 9], dtype=F64)))
    b = exact_features(80, zero + 2, torch.diag(torch.tensor([4.0, 4, 1], dtype=F64)), seed=1)
    # Diagonal: |mean|^2 + sum (sqrt a - sqrt b)^2 = 12 + 1 + 0 + 4.
    assert evaluate.frechet_distance(a, b) == pytest.approx(17, rel=1e-10)
    assert evaluate.frechet_distance(b, a) == pytest.approx(17, rel=1e-10)


def test_frechet_distance_of_two_correlated_features_is_its_closed_form():
    zero = torch.zeros(2, dtype=F64)
    A = torch.tensor([[2, 1], [1, 3]], dtype=F64)
    B = torch.tensor([[1, -0.5], [-0.5, 4]], dtype=F64)
    # Of 2 x 2 matrices: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    root = math.sqrt((A @ B).trace() + 2 * math.sqrt(A.det() * B.det()))
    a, b = exact_features(9, zero, A), exact_features(30, zero, B, seed=1)
    assert evaluate.frechet_distance(a, b) == pytest.approx(5 + 5 - 2 * root, rel=1e-10)


def test_frechet_distance_to_itself_is_zero_even_with_fewer_pictures_than_features():
    x = normal(10, 40).float()
    shuffled = x[torch.randperm(10, generator=torch.Generator().manual_seed(1))]
    assert evaluate.frechet_distance(x, shuffled) == pytest.approx(0, abs=1e-5)
    assert evaluate.frechet_distance(x, x + 1) == pytest.approx(40, rel=1e-6)


def test_frechet_distance_agrees_with_the_eigenvalues_of_the_product_on_real_features():
    # Another way to the same trace: sqrt(A B) has the roots of the eigenvalues of A B itself.
    images = uniform(300, 3, 32, 32)
    a = evaluate.image_features(images).double().numpy()
    b = evaluate.image_features(images.flip(0) ** 1.5)[:280].double().numpy()
    A, B = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(A @ B).astype(complex)).real.sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * root
    ours = evaluate.frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert expected > 1e-3 and ours == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("distance", [evaluate.frechet_distance, evaluate.kernel_distance])
def test_distances_refuse_what_is_no_two_sets_of_features(distance):
    x = normal(10, 40)
    for a, b in [(x, x[:, :3]), (x[:1], x), (x, x[:1]), (x[0], x)]:
        with pytest.raises(ValueError, match="n, m >= 2"):
            distance(a, b)


def test_kernel_distance_is_its_definition():
    a, b = normal(7, 5), normal(9, 5, seed=1) + 0.3

    def kernel(x, y):
        return (float(x @ y) / 5 + 1) ** 3

    def within(x):
        pairs = [kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]
        return np.mean(pairs)

    across = np.mean([kernel(x, y) for x in a for y in b])
    expected = within(a) + within(b) - 2 * across
    assert evaluate.kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_of_one_distribution_is_zero_on_average():
    found = []
    for i in range(300):
        a, b = normal(20, 4, seed=2 * i), normal(20, 4, seed=2 * i + 1)
        found.append(evaluate.kernel_distance(a, b))
    assert abs(np.mean(found)) < 3 * np.std(found) / len(found) ** 0.5
    assert min(found) < 0 < max(found)


def test_image_features_tell_pictures_apart_but_not_chunks():
    images = uniform(5, 3, 16, 16)
    features = evaluate.image_features(images)
    assert features.shape == (5, evaluate.N_FEATURES)
    torch.testing.assert_close(evaluate.image_features(images, chunk=2), features)
    assert torch.pdist(features).min() > 1e-3


# ---- Shapes --------------------------------------------------------------------------------------
def chamfer(x, y):
    """Eq. 3, written out."""
    square = (x[:, None] - y).square().sum(-1)
    return float(square.amin(1).mean() + square.amin(0).mean())


def test_chamfer_distances_are_those_of_eq_3():
    a, b = normal(6, 40, 3).float(), (normal(5, 40, 3, seed=1) * 1.1).float()
    expected = [[chamfer(x, y) for y in b] for x in a]
    torch.testing.assert_close(evaluate.chamfer_distances(a, b), torch.tensor(expected), rtol=1e-4,
                               atol=1e-6)


def test_shape_metrics_agree_with_brute_force():
    a, b = normal(6, 40, 3).float(), (normal(5, 40, 3, seed=1) * 1.1).float()
    across = np.array([[chamfer(x, y) for y in b] for x in a])
    union, kind = torch.cat([a, b]), [0] * 6 + [1] * 5
    full = np.array([[chamfer(x, y) for y in union] for x in union])
    np.fill_diagonal(full, np.inf)
    own_kind = [kind[i] == kind[j] for i, j in enumerate(full.argmin(1))]
    scores = evaluate.shape_metrics(a, b)
    assert scores["cov"] == len(set(across.argmin(1))) / 5
    assert scores["mmd"] == pytest.approx(across.min(0).mean(), rel=1e-4)
    assert scores["nna"] == pytest.approx(np.mean(own_kind))
    known = evaluate.nearest_clouds(b, b, same=True)
    assert evaluate.shape_metrics(a, b, known) == scores


def test_nearest_clouds_are_those_of_all_pairs():
    ellipsoids = uniform(40, 1, 3, seed=3) + 0.2
    a = F.normalize(normal(40, 512, 3).float(), dim=-1) * ellipsoids
    full = evaluate.chamfer_distances(a[:25], a[25:])
    near = evaluate.nearest_clouds(a[:25], a[25:])
    assert torch.equal(near.argmin(1), full.argmin(1))
    assert torch.equal(near.argmin(0), full.argmin(0))
    assert torch.equal(near.amin(1), full.amin(1))
    assert near.isinf().sum() > 50                           # or nothing was spared
    own = evaluate.nearest_clouds(a, a, same=True)
    full = evaluate.chamfer_distances(a, a).fill_diagonal_(torch.inf)
    assert torch.equal(own.argmin(1), full.argmin(1))
    assert own.diagonal().isinf().all()


def test_a_set_covers_itself_at_no_distance_and_far_sets_are_told_apart():
    a = normal(5, 64, 3).float()
    scores = evaluate.shape_metrics(a, a)
    assert scores["cov"] == 1
    assert scores["mmd"] == pytest.approx(0, abs=1e-5)
    assert evaluate.shape_metrics(a, a + 10)["nna"] == 1
    with pytest.raises(ValueError, match="generated must be"):
        evaluate.shape_metrics(a[:1], a)
    with pytest.raises(ValueError, match="reference must be"):
        evaluate.shape_metrics(a, a[..., :2])


def ball(side=48, radius=0.6):
    """A volume whose density falls linearly through the surface's level at a ball's radius."""
    centre = (torch.arange(side) + 0.5) * 2 / side - 1
    z, y, x = torch.meshgrid(centre, centre, centre, indexing="ij")
    distance = (x**2 + y**2 + z**2).sqrt()
    level = math.log(2) * side / 2                           # a voxel there stops half of the light
    density = level * (1 + 10 * (radius - distance)).clamp(0, 5)
    return torch.stack([density, density, density, density])


def test_surface_points_of_a_ball_are_uniform_on_it():
    points = evaluate.surface_points(ball(), 4000)
    assert points.shape == (4000, 3)
    assert (points.norm(dim=1) - 0.6).abs().max() < 0.02
    # On a sphere every coordinate is uniform in [-r, r] (Archimedes).
    for coordinate in (points / 0.6).T:
        assert coordinate.mean().abs() < 0.05
        assert coordinate.std().item() == pytest.approx(3**-0.5, abs=0.03)


def test_surface_points_follow_their_seed_and_an_empty_volume_has_none():
    volume = ball(side=16)
    assert torch.equal(evaluate.surface_points(volume, 50, seed=1),
                       evaluate.surface_points(volume, 50, seed=1))
    assert not torch.equal(evaluate.surface_points(volume, 50, seed=1),
                           evaluate.surface_points(volume, 50, seed=2))
    assert evaluate.surface_points(torch.zeros(4, 8, 8, 8), 10).shape == (0, 3)


def solid_at(*boxes, side=12):
    """A volume that is solid within boxes of voxels, ((z, z'), (y, y'), (x, x')) each."""
    volume = torch.zeros(4, side, side, side)
    for (z0, z1), (y0, y1), (x0, x1) in boxes:
        volume[0, z0:z1, y0:y1, x0:x1] = 1.01 * math.log(2) * side / 2
    return volume


def test_debris_is_what_does_not_hang_together_with_the_largest_piece():
    large, small = ((0, 3), (0, 3), (0, 3)), ((5, 7), (5, 7), (9, 11))
    assert evaluate.debris(solid_at(large)) == 0
    assert evaluate.debris(solid_at(large, small)) == pytest.approx(8 / 35)
    one = ((8, 9), (0, 1), (0, 1))
    assert evaluate.debris(solid_at(large, small, one)) == pytest.approx(9 / 36)
    corner = ((3, 4), (3, 4), (3, 4))                    # touches `large` with a corner
    assert evaluate.debris(solid_at(large, corner)) == 0
    assert math.isnan(evaluate.debris(solid_at()))
    assert math.isnan(evaluate.debris(0.98 * solid_at(large)))         # fog is not solid


def test_a_piece_may_be_long_and_winding():
    snake = []
    for row in range(0, 12, 2):                          # there and back again, in one layer
        snake.append(((0, 1), (row, row + 1), (0, 12)))
        end = 11 if row % 4 == 0 else 0
        snake.append(((0, 1), (row + 1, row + 2), (end, end + 1)))
    assert evaluate.debris(solid_at(*snake)) == 0
    assert evaluate.debris(solid_at(*snake, ((5, 6), (5, 6), (5, 6)))) == pytest.approx(1 / 79)


def test_points_on_a_box_are_as_many_on_each_face_as_its_area_says():
    box = data.box((0, 0, 0), (1, 2, 3), (1, 1, 1))
    points = evaluate.sample_surface([box], 20_000, np.random.default_rng(0))
    for axis, (half, area) in enumerate([(1, 6), (2, 3), (3, 2)]):
        share = (points[:, axis].abs() > half - 1e-5).float().mean().item()
        assert share == pytest.approx(area / 11, abs=0.015)


def test_points_on_a_cylinder_are_half_on_its_caps_if_it_is_as_wide_as_twice_its_height():
    cylinder = data.cylinder((0, 0, 0), 2, 1, (1, 1, 1))
    points = evaluate.sample_surface([cylinder], 20_000, np.random.default_rng(0))
    radius = points[:, [0, 2]].norm(dim=1)
    cap = points[:, 1].abs() > 1 - 1e-5
    assert cap.float().mean().item() == pytest.approx(0.5, abs=0.015)         # 2 pi r^2 : 2 pi r 2h
    within = radius[cap] < 2 / 2**0.5                                         # half of the area
    assert within.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert (radius[~cap] - 2).abs().max() < 1e-5


def test_no_point_lies_where_two_parts_touch():
    below = data.box((0, 0, 0), (1, 1, 1), (1, 1, 1))
    above = data.box((0, 1.5, 0), (1, 0.5, 1), (1, 1, 1))
    points = evaluate.sample_surface([below, above], 4000, np.random.default_rng(0))
    between = (points[:, 1] - 1).abs() < 1e-6
    assert not between.any()


def how_far_out(part, points):
    """1 on the surface of a primitive, less inside: the largest of its sides' sums of squares."""
    return evaluate.sums_of_sides(part, points).amax(1).sqrt()


def test_points_on_built_in_objects_are_on_some_part_and_inside_none():
    objects = data.load("synthetic", 16, 0, 0, 3, 1)
    for k in range(3):
        points = evaluate.true_surface(objects, k, 3000)
        assert points.shape == (3000, 3) and points.dtype == torch.float32
        out = torch.stack([how_far_out(part, points) for part in objects.shapes[k]])
        assert (out.amin(0) - 1).abs().max() < 1e-4
    assert not torch.equal(evaluate.true_surface(objects, 0, 9, seed=1),
                           evaluate.true_surface(objects, 0, 9))
    objects.shapes = None
    with pytest.raises(ValueError, match="true_surface"):
        evaluate.true_surface(objects, 0, 9)


# ---- Text ----------------------------------------------------------------------------------------
def test_what_a_caption_asks_for_is_read_from_its_words():
    caption = "an orange round table with blue legs and a shelf"
    assert evaluate.asked_for(caption) == (["orange", "blue"], {"round", "table", "legs", "shelf"})


def test_attribute_scores_count_what_was_asked_for_and_seen():
    caption = "an orange round table with blue legs and a shelf"
    seen = [(["orange", "red"], {"table", "round", "pedestal"}), (["orange", "blue"], {"car"})]
    assert evaluate.attribute_scores([caption, caption], seen) == (3 / 4, 2 / 8)


def test_chance_is_what_is_seen_against_the_captions_of_all_the_others():
    prompts = ["a red chair with blue legs", "a red table with green legs", "a blue car"]
    seen = [evaluate.asked_for(prompt) for prompt in prompts]
    # Shifted by one: colours 1 of 2, 0 of 1, 0 of 2; parts 1 of 2, 0 of 1, 0 of 2. By two: 0, 1 of
    # 2, 0 of 2 and so on.
    colours, parts = evaluate.chance_scores(prompts, seen)
    assert colours == pytest.approx((1 / 5 + 1 / 5) / 2)
    assert parts == pytest.approx((1 / 5 + 1 / 5) / 2)


def test_targets_of_captions_are_their_colours_kinds_and_details():
    colours, kind, details = evaluate.caption_targets(
        ["a blue car with black wheels", "a red chair with blue legs and armrests"])
    blue, red = evaluate.COLOURS.index("blue"), evaluate.COLOURS.index("red")
    assert colours.tolist() == [[blue, evaluate.NO_COLOUR], [red, blue]]
    assert [evaluate.KINDS[number] for number in kind] == ["car", "chair"]
    assert details.tolist() == [[0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0]]


def flat_objects(n=256, seed=0):
    """n objects of two flat colours, above and below, whose kind is the shade of the rest: Dataset
    of four 16 x 16 pictures each."""
    rng = np.random.default_rng(seed)
    images, captions = torch.zeros(n, 4, 16, 16, 3), []
    for picture in images:
        first, second = rng.choice(evaluate.COLOURS, 2, replace=False)
        kind = rng.integers(5)
        picture[:, :5] = torch.tensor(data.COLOURS[first])
        picture[:, 5:10] = torch.tensor(data.COLOURS[second])
        picture[:, 10:] = kind / 4
        captions.append(f"a {first} {evaluate.KINDS[kind]} with {second} legs")
    images = (images.flatten(0, 1) * 255).byte()
    return data.Dataset(
        images=images, masks=torch.full(images.shape[:3], 255), cam2world=torch.zeros(0),
        intrinsics=torch.zeros(0), object_index=torch.arange(n).repeat_interleave(4),
        heldout=torch.zeros(0), names=[str(k) for k in range(n)], captions=captions, layout="",
        skipped=[])


def test_a_reader_learns_attributes_and_reads_them_off_objects_that_it_has_not_seen():
    reader = evaluate.fit_reader(flat_objects(), epochs=12)
    others = flat_objects(n=64, seed=1)
    pictures, _ = others.batch(torch.arange(256).reshape(64, 4), 16)
    seen = evaluate.read_attributes(reader, pictures)
    colours, parts = evaluate.attribute_scores(others.captions, seen)
    assert min(colours, parts) > 0.9
    colours, _ = evaluate.chance_scores(others.captions, seen)
    assert colours < 0.3


def read_true_objects(reader, size, n):
    """What a reader says of n built-in objects of seed 0 -> share of their colours and of their
    parts that it sees; parts that it invents over parts that there are."""
    objects = data.load("synthetic", size, 0, 0, n, 8)
    frames = torch.stack([objects.frames_of(k) for k in range(n)])
    seen = evaluate.read_attributes(reader, objects.batch(frames, size)[0])
    colours, parts = evaluate.attribute_scores(objects.captions, seen)
    invented = there = 0
    for caption, (_, found) in zip(objects.captions, seen):
        _, asked = evaluate.asked_for(caption)
        invented += len(found - asked)
        there += len(asked)
    return colours, parts, invented / there


def test_the_reader_is_learned_once(tmp_path):
    settings = SimpleNamespace(size=16, seed=0)
    reader = evaluate.reader_of(tmp_path, settings, n_objects=32, epochs=1)
    path = tmp_path / "reader-16-0.pt"
    weights = torch.load(path, weights_only=True)
    again = evaluate.reader_of(tmp_path, settings).state_dict()               # of 2,000: minutes
    for name, value in reader.state_dict().items():
        assert torch.equal(value, again[name]) and torch.equal(value, weights[name])
    # A reader of another seed has learned from other objects: it is not taken for this one.
    settings.seed = 1
    evaluate.reader_of(tmp_path, settings, n_objects=32, epochs=1)
    assert (tmp_path / "reader-16-1.pt").exists()
    for content in ({"nothing": torch.zeros(1)}, None):
        torch.save(content, tmp_path / "reader-16-1.pt")
        refused(lambda: evaluate.reader_of(tmp_path, settings), "reader-16-1.pt", "delete it")
    (tmp_path / "reader-16-1.pt").write_bytes(b"nothing")
    refused(lambda: evaluate.reader_of(tmp_path, settings), "reader-16-1.pt", "delete it")


@pytest.mark.slow
def test_the_reader_reads_what_true_objects_have_and_invents_nothing(tmp_path):
    settings = SimpleNamespace(size=32, seed=0)
    reader = evaluate.reader_of(tmp_path, settings, n_objects=1500, epochs=14)    # of seed 1's
    colours, parts, invented = read_true_objects(reader, 32, 240)
    assert min(colours, parts) >= 0.98
    # What nobody asked for is not seen either, or "everything is there" would score 100 %.
    assert invented < 0.02


# ---- What moves, and cameras ---------------------------------------------------------------------
def pose_network(dataset, cameras):
    """A pose network that knows every frame of a dataset by heart: pictures -> (cameras, ...)."""
    size = dataset.images.shape[1]
    known = dataset.batch(torch.arange(len(dataset.images)), size)[0].flatten(1)

    def look(pictures, *arguments, **flags):
        apart = torch.cdist(pictures.flatten(1), known,
                            compute_mode="donot_use_mm_for_euclid_dist")
        return (cameras[apart.argmin(1)],)

    return look


@pytest.fixture(scope="module")
def puppets():
    """Two of them, 30 frames each, the last 5 held out."""
    return data.load("puppets", 32, 6, 0, 2, 30)


def trained_perfectly(puppets):
    """A trained run that has found their true poses and parts."""
    moves = torch.eye(4).repeat(len(puppets.images), 6, 1, 1)                 # (F, 6, 4, 4)
    moves[:, :, :3] = puppets.truth["poses"]
    # A part that moved by M is seen from camera C as the part at rest is from M^-1 C.
    cameras = torch.linalg.inv(moves) @ puppets.cam2world[:, None]
    return SimpleNamespace(posenet=pose_network(puppets, cameras), autodecoder=blobs,
                           device="cpu")


def blobs(k):
    """Puppet k of seed 0 as six opaque balls, each claimed by its part: (1, 10, 32, 32, 32)."""
    parts, _, _ = data.make_puppet(np.random.default_rng([0, 1000 + int(k)]))
    centres = [torch.stack([shape.centre for shape in part]).mean(0) for part in parts]
    centre = (torch.arange(32) + 0.5) / 16 - 1
    z, y, x = torch.meshgrid(centre, centre, centre, indexing="ij")
    xyz = torch.stack([x, y, z], -1)
    apart = torch.stack([(xyz - one).norm(dim=-1) for one in centres])        # (6, D, H, W)
    solid = 50.0 * (apart.amin(0, keepdim=True) < 0.15)
    black = torch.zeros(3, 32, 32, 32)
    return torch.cat([solid, black, -100 * apart])[None]


def test_perfect_poses_get_perfect_scores(puppets):
    scores = evaluate.score_poses(trained_perfectly(puppets), puppets)
    assert scores["yaw_correlation"] > 0.97 and scores["yaw_share"] == 1
    assert scores["yaw_slope"] == pytest.approx(1, abs=0.1)         # the arms turn by themselves
    assert scores["part_purity"] > 0.85                  # balls are smaller than limbs
    assert len(scores["limb_correlation"]) == 4 and min(scores["limb_correlation"]) > 0.9


def test_poses_of_other_frames_get_poor_scores(puppets):
    trained = trained_perfectly(puppets)
    perfect = trained.posenet
    trained.posenet = lambda pictures: (perfect(pictures)[0].roll(17, 0),)
    scores = evaluate.score_motion(trained, puppets, n_samples=16)
    assert abs(scores["yaw_correlation"]) < 0.9 and scores["yaw_share"] == 0
    assert scores["part_purity"] < 0.9


def test_parts_are_counted_where_both_are_seen():
    learned = torch.zeros(1, 2, 1, 4)                        # V = 1, P = 2, a picture of 1 x 4
    learned[0, 0, 0, :2] = 1
    learned[0, 1, 0, 2:] = 1
    occupancy = torch.tensor([1.0, 1, 1, 0]).view(1, 1, 1, 4)
    true = torch.tensor([3, 0, 6, 6]).view(1, 1, 4)          # 0: nothing is there
    table = evaluate.count_parts(learned, occupancy, true)
    assert table.tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]]


def seen_from(dataset, noise=0.0, mirrored=()):
    """Scores of cameras that are half as far round as the true ones, in a tilted world, each turned
    by up to `noise` radians, and the other way round for the mirrored objects."""
    azimuth = torch.atan2(dataset.cam2world[:, 0, 2], dataset.cam2world[:, 2, 2])
    zero = torch.zeros_like(azimuth)
    backwards = torch.isin(dataset.object_index, torch.tensor(mirrored, dtype=torch.int64))
    turn = torch.where(backwards, -azimuth, azimuth) / 2
    cameras = render.orbit(turn, zero + math.radians(15), 12.0)
    wrong = render.orbit(noise * torch.arange(len(azimuth)).cos(), zero, 1.0)
    tilt = render.orbit(torch.tensor(0.3), torch.tensor(0.2), 1.0)
    cameras[:, :3, :3] = tilt[:3, :3] @ wrong[:, :3, :3] @ cameras[:, :3, :3]
    trained = SimpleNamespace(posenet=pose_network(dataset, cameras[:, None]), device="cpu")
    return evaluate.score_poses(trained, dataset)


def test_learned_cameras_are_scored_up_to_one_rotation_and_one_scale_of_azimuth():
    dataset = data.load("synthetic", 16, 6, 0, 3, 24, arc=60)
    exact = seen_from(dataset)
    assert exact["rotation_error"] < 1
    assert exact["azimuth_scale"] == pytest.approx(2, 0.02)
    assert exact["mirrored"] == 0
    assert 3 < seen_from(dataset, noise=0.1)["rotation_error"] < 12
    one = seen_from(dataset, mirrored=[1])
    assert one["mirrored"] == pytest.approx(1 / 3)
    assert one["azimuth_scale"] == pytest.approx(2, 0.1)


def test_correlation_is_pearsons():
    a, b = normal(50), normal(50, seed=1)
    assert evaluate.correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert evaluate.correlation(a, 3 - 2 * a) == pytest.approx(-1)
    assert evaluate.correlation(a, torch.ones(50)) == 0


# ---- Runs side by side ---------------------------------------------------------------------------
def write_run(folder, settings, **numbers):
    """A run of which nothing but metrics.json is left -> its path."""
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(numbers | {"settings": settings}))
    return str(folder)


def compare(capsys, *arguments):
    """What --compare prints, a list of words for each line."""
    capsys.readouterr()
    evaluate.main(["--compare", *arguments])
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_compared_runs_are_grouped_by_what_differs_and_summed_up_over_seeds(tmp_path, capsys):
    runs = []
    for depth, seed, fd in [(1, 0, 3.0), (1, 1, 1.0), (1, 2, 2.5), (4, 0, 0.5)]:
        settings = {"seed": seed, "decoder_depth": depth, "size": 64}
        runs.append(write_run(tmp_path / str(len(runs)), settings, fd=fd, seconds_per_sample=0.1))
    rows = compare(capsys, *runs, "--out", str(tmp_path))
    assert rows[0] == ["runs", "fd", "seconds_per_sample"]
    assert rows[1][:6] == ["decoder_depth", "1", "3", "2.5", "(1,", "3)"]
    assert rows[2][:6] == ["decoder_depth", "4", "1", "0.5", "(0.5,", "0.5)"]
    assert (tmp_path / "compare.png").stat().st_size > 1000


def test_the_median_of_two_runs_is_their_mean(tmp_path, capsys):
    runs = [write_run(tmp_path / "a", {"seed": 0}, fd=1.0),
            write_run(tmp_path / "b", {"seed": 1}, fd=2.0)]
    rows = compare(capsys, *runs, "--out", str(tmp_path))
    assert rows[1] == ["all", "alike", "2", "1.5", "(1,", "2)"]


def test_runs_of_stage_1_alone_are_compared_without_a_figure(tmp_path, capsys):
    runs = [write_run(tmp_path / "a", {"seed": 0}, psnr_heldout=20.0),
            write_run(tmp_path / "b", {"seed": 1}, psnr_heldout=21.0)]
    rows = compare(capsys, *runs, "--out", str(tmp_path))
    assert rows[0] == ["runs", "psnr_heldout"] and len(rows) == 2
    assert not (tmp_path / "compare.png").exists()


def test_runs_of_other_numbers_of_samples_are_kept_apart(tmp_path, capsys):
    runs = [write_run(tmp_path / "a", {"seed": 0}, psnr_heldout=20.0),
            write_run(tmp_path / "b", {"seed": 0}, psnr_heldout=20.0, fd=1.0, samples=128),
            write_run(tmp_path / "c", {"seed": 0}, psnr_heldout=20.0, fd=2.0, samples=256)]
    rows = compare(capsys, *runs, "--out", str(tmp_path))
    assert [row[:3] for row in rows[1:4]] == [
        ["samples", "None", "1"], ["samples", "128", "1"], ["samples", "256", "1"]]


def test_runs_on_other_data_or_objects_are_kept_apart(tmp_path, capsys):
    many = ",".join(f"obj{number}" for number in range(9))
    runs = [write_run(tmp_path / "a", {"seed": 0}, psnr_heldout=20.0, source="synthetic"),
            write_run(tmp_path / "b", {"seed": 0, "objects": many + "1"}, psnr_heldout=20.0,
                      source="coil100"),
            write_run(tmp_path / "c", {"seed": 0, "objects": many + "2"}, psnr_heldout=20.0,
                      source="coil100")]
    rows = compare(capsys, *runs, "--out", str(tmp_path))
    assert [row[:5] for row in rows[1:4]] == [
        ["source", "synthetic,", "objects", "None", "1"],
        ["source", "coil100,", "objects", many + "1", "1"],
        ["source", "coil100,", "objects", many + "2", "1"]]


def test_a_curve_holds_all_numbers_of_sampler_steps_of_one_kind():
    runs = []
    for steps, depth, fd in [(32, 1, 1.0), (8, 1, 3.0), (8, 1, 5.0), (8, 2, 7.0)]:
        settings = {"sample_steps": steps, "decoder_depth": depth}
        runs.append({"settings": settings, "fd": fd, "seconds_per_sample": steps / 100})
    names = evaluate.what_differs(runs)
    curves = evaluate.compared_curves(evaluate.group_runs(runs, names), names)
    assert curves == {"decoder_depth 1": [(0.32, 1.0, 1.0, 1.0), (0.08, 4.0, 3.0, 5.0)],
                      "decoder_depth 2": [(0.08, 7.0, 7.0, 7.0)]}


@pytest.mark.parametrize("content", [None, "", "[1]", "{}", '{"settings": 3}',
                                     '{"settings": {}, "fd": "3.0"}'])
def test_a_run_without_numbers_cannot_be_compared(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    refused(lambda: evaluate.main(["--compare", str(tmp_path)]), "metrics.json", str(tmp_path))


# ---- Command line --------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments, words", [
    ("--n 8", "8 samples x 10 views|--n 25"),
    ("--n 1 --views 300", "1 samples|--n 2"),
    ("--inception FILE", "2048 features|--n 205"),
    ("--n 0", "--n must be between 1 and"), ("--steps 0", "--steps must be between 1 and"),
    ("--n 100001", "--n"), ("--views 0", "--views"), ("--views x", "--views"),
    ("--seed -1", "--seed"), ("--churn -5", "--churn"), ("--churn nan", "--churn"),
    ("--guidance inf", "--guidance"),
    ("--voxel RUN", "--voxel"), ("--stepz 3", "--steps"),
    ("--compare A B --n 256", "--compare|--n"), ("--compare A B --run R", "--compare|--run"),
    ("--compare A --no-shapes", "--compare|--no-shapes"), ("--compare A --seed 0", "--seed"),
    ("--compare A --churn 0", "--churn"), ("--compare A --device cpu", "--device")])
def test_flags_that_cannot_work_are_refused_by_name(arguments, words):
    if "--inception" in arguments:
        arguments += " --n 100"
    refused(lambda: evaluate.parse(arguments.split()), *words.split("|"))


def test_a_run_that_is_not_there_is_refused(tmp_path):
    refused(lambda: evaluate.main(["--run", str(tmp_path / "no")]), "stage1.pt is not there")
    assert not (tmp_path / "no").exists()


SMALL = ("--preset micro --n-objects 4 --n-views 6 --size 16 --volume-side 8 --latent-side 4 "
         "--embed-dim 16 --channels 16 --n-samples 8 --finer-at= --steps 2").split()
SMALL_2 = [*SMALL, *"--stage 2 --unet-channels 16 --unet-attention 4 --batch-size 4".split()]


FEW = ["--n", "3", "--views", "81"]          # as few pictures as the covariance allows


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def train_without_pictures(*flags):
    """train.main, but for the drawing, which takes longer than two steps."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("save_training_sheet", "save_orbit", "save_latent_histogram"):
            patch.setattr(sample, name, lambda *arguments: None)
        patch.setattr(train, "plot_log", lambda *arguments: None)
        train.main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of both stages, two steps each: it has learned nothing, but it can be scored."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    train_without_pictures(*SMALL, "--stage", 1, "--out", folder)
    train_without_pictures(*SMALL_2, "--out", folder)
    return folder


def test_every_kind_of_sample_gets_every_score(run, tmp_path, capsys):
    evaluate.main(["--run", str(run), *FEW, "--steps", "2", "--out", str(tmp_path)])
    metrics = metrics_of(tmp_path)
    for kind in evaluate.KINDS_OF_SAMPLES:
        for name in ("fd", "fd_unseen", "kd", "memorization"):
            assert math.isfinite(metrics[name + kind])
        assert 0 <= metrics["empty" + kind] <= 1
    for name in ("psnr_heldout", "ssim_heldout", "mask_heldout", "seconds_per_sample"):
        assert math.isfinite(metrics[name])
    assert metrics["samples"] == 3 and metrics["views"] == 81
    assert metrics["settings"]["sample_steps"] == 2
    assert metrics["memorization_train"] > 0          # a training object is not its own nearest one
    printed = capsys.readouterr().out
    for title in evaluate.KINDS_OF_SAMPLES.values():
        assert title in printed


def test_too_few_training_views_for_the_features_are_told(run, tmp_path, capsys):
    evaluate.main(["--run", str(run), *FEW, "--steps", "1", "--no-baselines", "--no-shapes",
                   "--out", str(tmp_path)])
    line = "only 20 training views for 240 features: fd is unreliable"
    assert line in capsys.readouterr().out.splitlines()
    evaluate.warn_of_few_views(241, 240)
    assert not capsys.readouterr().out


def test_scores_of_an_earlier_evaluation_do_not_stay_beside_those_of_this_one(run, tmp_path):
    earlier = {"fd": 1.0, "fd_direct": 1.0, "cov_train": 0.5, "empty": 0.0, "debris_train": 0.1,
               "seconds_stage1": 3.0}
    (tmp_path / "metrics.json").write_text(json.dumps(earlier))
    evaluate.main(["--run", str(run), *FEW, "--steps", "1", "--no-baselines", "--no-shapes",
                   "--out", str(tmp_path)])
    metrics = metrics_of(tmp_path)
    assert metrics["fd"] != 1.0 and metrics["seconds_stage1"] == 3.0
    assert not {"fd_direct", "cov_train", "empty", "debris_train"} & set(metrics)


def test_unseen_objects_are_as_many_and_none_that_was_learned(run):
    trained = sample.open_run(run)
    others = evaluate.others_of(trained)
    assert others.names == ["0004", "0005", "0006", "0007"]
    eight = data.load("synthetic", 16, 6, 0, 8, 6)
    assert torch.equal(others.images, eight.images[24:])
    for change in (dict(source="/photos"), dict(data_settings=train.AllSettings(objects="0001"))):
        changed = SimpleNamespace(**vars(trained) | change)
        assert evaluate.others_of(changed) is None


def test_samples_follow_the_seed_and_the_sampler_as_asked(run):
    trained = sample.open_run(run)
    trained.denoiser.unet.last[-1].weight.data.normal_(generator=torch.Generator().manual_seed(0))
    dataset = data.load_for(trained.data_settings, trained.source)
    found = {}
    for name, steps, churn, seed in [("a", 3, 40.0, 0), ("same", 3, 40.0, 0), ("seed", 3, 40.0, 1),
                                     ("steps", 4, 40.0, 0), ("churn", 3, 0.0, 0)]:
        scores = evaluate.evaluate(trained, dataset, 3, 2, steps, churn, seed, shapes=False,
                                   baselines=False)
        found[name] = scores["fd"]
    assert found["same"] == found["a"]
    assert len(set(found.values())) == 4


def test_a_run_without_stage_2_is_scored_on_its_heldout_views(run, tmp_path, capsys):
    (tmp_path / "stage1.pt").write_bytes((run / "stage1.pt").read_bytes())
    evaluate.main(["--run", str(tmp_path)])
    assert "no stage2.pt" in capsys.readouterr().out
    metrics = metrics_of(tmp_path)
    assert math.isfinite(metrics["psnr_heldout"]) and math.isfinite(metrics["ssim_heldout"])
    assert "fd" not in metrics
    refused(lambda: evaluate.main(["--run", str(tmp_path), "--guidance", "2"]), "--guidance")


def test_ssim_of_heldout_views_is_that_of_what_the_decoder_makes_of_them(run):
    trained = sample.open_run(run, stages=(1,))
    dataset = data.load_for(trained.data_settings, trained.source)
    frames = dataset.heldout.nonzero()[:, 0]
    ours, _ = sample.render_frames(trained, dataset, frames, 96)
    true, _ = dataset.batch(frames, 16)
    scores = evaluate.score_views(trained, dataset)
    assert scores["ssim_heldout"] == pytest.approx(evaluate.ssim(ours, true).mean().item(),
                                                   abs=1e-4)
    apart = evaluate.score_views(trained, dataset, lpips=lambda a, b: (a - b).abs().mean((1, 2, 3)))
    assert apart["lpips_heldout"] == pytest.approx((ours - true).abs().mean().item(), abs=1e-4)
    dataset.heldout[:] = False
    assert evaluate.score_views(trained, dataset) == {}


def test_data_that_is_no_longer_that_of_the_run_is_refused(run, tmp_path):
    first = torch.load(run / "stage1.pt", weights_only=True)
    train.save(tmp_path / "stage1.pt", first | {"portraits": 1 - first["portraits"]})
    refused(lambda: evaluate.main(["--run", str(tmp_path)]), "synthetic", str(tmp_path), "--data",
            "are not the photos that")
    train.save(tmp_path / "stage1.pt", first | {"source": str(tmp_path / "gone")})
    refused(lambda: evaluate.main(["--run", str(tmp_path)]), str(tmp_path / "gone"), "--data",
            "is not there")


def test_stage_2_of_another_seed_is_compared_with_the_objects_it_learned_from(run, tmp_path):
    (tmp_path / "stage1.pt").write_bytes((run / "stage1.pt").read_bytes())
    train_without_pictures(*SMALL_2, "--seed", 4, "--out", tmp_path)
    trained = sample.open_run(tmp_path)
    assert trained.settings.seed == 4
    assert sample.load_data(trained).captions == trained.captions


@pytest.fixture(scope="module")
def text_run(run, tmp_path_factory):
    """The same with text; and a reader of attributes that knows nothing."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "stage1.pt").write_bytes((run / "stage1.pt").read_bytes())
    train_without_pictures(*SMALL_2, "--text", "--context-dim", 16, "--out", folder)
    torch.save(evaluate.AttributeReader().state_dict(), folder / "reader.pt")
    return folder


def test_captions_are_scored_where_the_run_knows_text(text_run, tmp_path):
    evaluate.main(["--run", str(text_run), *FEW, "--steps", "1", "--guidance", "2",
                   "--no-baselines", "--no-shapes", "--out", str(tmp_path)])
    metrics = metrics_of(tmp_path)
    assert metrics["settings"]["guidance"] == 2
    for name in ("text_colour", "text_parts"):
        for key in ("", "_true", "_chance"):
            assert 0 <= metrics[name + key] <= 1
    assert metrics["text_diversity"] > 0


def test_captions_are_of_objects_beyond_those_of_the_run(text_run):
    trained = sample.open_run(text_run)
    objects, numbers = evaluate.unseen_objects(trained, 5)
    assert len(numbers) == 5 and min(numbers) >= len(trained.names)
    for number in numbers:
        assert objects.captions[number] not in trained.captions


def test_guidance_reaches_the_sampler(text_run):
    trained = sample.open_run(text_run)
    last = trained.text_denoiser.unet.last[-1]           # is 0 in an untrained network
    last.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    reader = evaluate.reader_of(text_run, trained.data_settings)
    found = []
    for guidance in (1.0, 1.0, 9.0):
        scores = evaluate.score_text(trained, reader, 2, 2, 0.0, guidance, 0)
        found.append(scores["text_diversity"])
    assert found[0] == found[1] != found[2]
