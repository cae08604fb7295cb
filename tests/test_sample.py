"""sample.py: Frechet distances in closed form, checkpoints of strangers, meshes, fair baselines."""
import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data                                                           # noqa: E402
import sample                                                         # noqa: E402
import train                                                          # noqa: E402
from autodecoder import AutoDecoder                                   # noqa: E402
from data import BadInput                                             # noqa: E402

F64 = torch.float64
NAMES = ["ann", "bob", "cy"]
SETTINGS = dataclasses.asdict(train.Settings(
    embed_dim=8, channels=16, volume_side=16, latent_side=4, decoder_depth=1, decoder_attention=(),
    unet_channels=8, unet_multipliers=(1, 2), unet_depth=1, unet_attention=(4,)))


@pytest.fixture
def folder(tmp_path):
    """A run's folder as train.py leaves it: both checkpoints of a tiny, untrained run."""
    torch.manual_seed(0)
    model = sample.build_autodecoder(SETTINGS, len(NAMES))
    torch.save(dict(stage=1, settings=SETTINGS, names=NAMES, captions=NAMES, source="synthetic",
                    fingerprint="f", view=dict(distance=4.0, elevation=0.3),
                    model=model.state_dict()),
               tmp_path / "stage1.pt")
    torch.save(dict(stage=2, settings=SETTINGS, decoder="f", m=torch.tensor(-3.0),
                    s=torch.tensor(2.0), vocabulary=[],
                    ema=sample.build_denoiser(SETTINGS).state_dict()),
               tmp_path / "stage2.pt")
    return tmp_path


def edit(path, **changes):
    checkpoint = torch.load(path, weights_only=True) | changes
    torch.save({k: v for k, v in checkpoint.items() if v is not None}, path)


def refused(call, *words):
    with pytest.raises(BadInput) as error:
        call()
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def exact_features(n, mean, covariance, seed=0):
    """n feature vectors whose mean and (n - 1) covariance are exactly as asked."""
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=F64)
    x = x - x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return x @ torch.linalg.cholesky(covariance).T + mean


# ---- Checkpoints --------------------------------------------------------------------------------


def test_a_run_is_rebuilt_with_the_weights_that_were_saved(folder):
    run = sample.load_run(folder)
    saved = torch.load(folder / "stage1.pt", weights_only=True)["model"]
    assert all(torch.equal(v, saved[k]) for k, v in run.autodecoder.state_dict().items())
    assert run.settings == SETTINGS and run.names == NAMES and run.normalizer.m == -3
    assert not run.autodecoder.training and not run.denoiser.training
    assert sample.training_latents(run).shape == (3, 16, 4, 4, 4)
    torch.testing.assert_close(sample.training_latents(run, chunk=2), sample.training_latents(run))
    assert sample.decode(run, sample.training_latents(run)).shape == (3, 4, 16, 16, 16)


def test_a_missing_checkpoint_is_bad_input_that_says_what_to_run(tmp_path):
    refused(lambda: sample.load_checkpoint(tmp_path, 2), "stage2.pt", "train.py --stage 2")
    assert sample.load_checkpoint(tmp_path, 2, resume=True) is None


def test_a_truncated_checkpoint_is_bad_input_at_every_length(folder):
    whole = (folder / "stage1.pt").read_bytes()
    for share in (0, 0.001, 0.1, 0.5, 0.9, 0.999):
        (folder / "stage1.pt").write_bytes(whole[:int(len(whole) * share)])
        refused(lambda: sample.load_checkpoint(folder, 1), "stage1.pt", "cannot be read")


@pytest.mark.parametrize("content", [b"not a checkpoint\n", bytes(100), b"PK\x03\x04" + bytes(50),
                                     b"\x89PNG\r\n\x1a\n" + bytes(30), b"stage: 1\n", b"MMMM"])
def test_a_file_that_is_no_checkpoint_is_bad_input(tmp_path, content):
    (tmp_path / "stage1.pt").write_bytes(content)
    refused(lambda: sample.load_checkpoint(tmp_path, 1), "stage1.pt", "cannot be read")


class Attack:
    def __reduce__(self):
        return exec, ("import builtins; builtins.attacked = True",)


def test_code_inside_a_checkpoint_is_refused_and_never_run(tmp_path):
    import builtins
    torch.save({"stage": 1, "settings": Attack()}, tmp_path / "stage1.pt")
    refused(lambda: sample.load_checkpoint(tmp_path, 1), "stage1.pt", "cannot be read")
    assert not hasattr(builtins, "attacked")


def test_a_checkpoint_of_another_stage_or_kind_is_bad_input(folder):
    (folder / "stage2.pt").write_bytes((folder / "stage1.pt").read_bytes())
    refused(lambda: sample.load_checkpoint(folder, 2), "stage2.pt", "stage 1, not 2")
    torch.save(torch.zeros(3), folder / "stage2.pt")
    refused(lambda: sample.load_checkpoint(folder, 2), "stage2.pt", "not 2")


def test_weights_that_do_not_fit_the_settings_are_bad_input(folder):
    model = sample.build_autodecoder(SETTINGS, len(NAMES))
    state = model.state_dict()
    wrong = [state | {"linear.bias": torch.zeros(7)}, {"unknown": torch.zeros(1)}, {}, [1, 2],
             sample.build_autodecoder(SETTINGS, 4).state_dict()]
    for bad in wrong:
        refused(lambda: sample.restore(lambda: model, bad, "x/stage1.pt"), "x/stage1.pt", "not fit")
    assert sample.restore(lambda: model, state, "x/stage1.pt") is model
    edit(folder / "stage1.pt", names=NAMES + ["dee"])
    refused(lambda: sample.load_run(folder), "stage1.pt", "does not fit")


@pytest.mark.parametrize("stage, key", [(1, "settings"), (1, "model"), (1, "names"), (2, "ema"),
                                        (2, "m"), (2, "decoder")])
def test_a_checkpoint_without_one_of_its_parts_is_bad_input(folder, stage, key):
    edit(folder / f"stage{stage}.pt", **{key: None})
    refused(lambda: sample.load_run(folder), f"stage{stage}.pt")


def test_a_stage_2_of_another_stage_1_is_bad_input(folder):
    edit(folder / "stage1.pt", fingerprint="g")
    refused(lambda: sample.load_run(folder), "stage2.pt", "--stage 2")
    assert not hasattr(sample.load_run(folder, stages=(1,)), "denoiser")


def test_a_device_that_is_not_there_is_bad_input():
    refused(lambda: sample.choose_device("gpu"), "--device gpu", "--device cpu")
    assert sample.choose_device("cpu") == "cpu"


# ---- Generating ---------------------------------------------------------------------------------


def test_sample_i_depends_on_seed_and_i_only(folder):
    run = sample.load_run(folder)
    few, many = sample.latent_noise(run, 2, 7), sample.latent_noise(run, 5, 7)
    assert few.shape == (2, 16, 4, 4, 4) and torch.equal(few, many[:2])
    everything = torch.cat([many] + [sample.latent_noise(run, 5, seed) for seed in (0, 1, 8)])
    distance = torch.cdist(everything.flatten(1), everything.flatten(1)) + 1e9 * torch.eye(20)
    assert distance.min() > 30                                # sqrt(2 x 1024) apart: all different
    assert many.std().item() == pytest.approx(1, abs=0.05)
    for churn in (0, 40):
        apart = sample.sample_latents(run, many, 4, churn, 7, chunk=2)
        for noise in (many, few):
            torch.testing.assert_close(apart[:len(noise)], sample.sample_latents(
                run, noise, 4, churn, 7), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("churn", [0.0, 40.0])
def test_samples_of_an_untrained_denoiser_are_the_gaussian_it_assumes_denormalized(folder, churn):
    """D = c_skip x is exact for N(0, 0.5^2), so latents are m + 0.5 s / scale N(0, 1)."""
    run = sample.load_run(folder)
    run.normalizer.scale = 0.8
    x = sample.sample_latents(run, sample.latent_noise(run, 8, 0), steps=64, churn=churn)
    assert x.dtype == torch.float32 and x.mean().item() == pytest.approx(-3, abs=0.05)
    assert x.std().item() == pytest.approx(0.5 * 2.0 / 0.8, rel=0.03)


@pytest.mark.parametrize("kind", ["fitted", "normal"])
def test_direct_latents_have_the_covariance_that_they_promise(kind):
    """With the linear layer as the identity and G1 nothing else, a latent IS its embedding."""
    model = AutoDecoder(7, embed_dim=8, channels=1, start_side=2, volume_side=4, latent_side=2)
    e = exact_features(7, torch.arange(4, dtype=F64), torch.diag(torch.tensor([4.0, 1, 9, 0.25],
                                                                              dtype=F64)))
    e = torch.cat([e, e @ torch.full((4, 4), 0.5, dtype=F64)], 1).float()          # rank 4 of 8
    with torch.no_grad():
        model.linear.weight.copy_(torch.eye(8))
        model.linear.bias.zero_()
        model.embedding.weight.copy_(e)
    run = SimpleNamespace(autodecoder=model, names=list("abcdefg"), device="cpu",
                          settings={"space": "latent"})
    draws = sample.direct_latents(run, 40_000, 3, kind).flatten(1)
    mean, covariance = torch.zeros(8), torch.eye(8)
    if kind == "fitted":
        mean, covariance = e.mean(0), e.T.cov()
    scale = covariance.diagonal().sqrt()
    torch.testing.assert_close(draws.mean(0) / scale, mean / scale, rtol=0, atol=0.025)
    torch.testing.assert_close(draws.T.cov() / scale / scale[:, None],
                               covariance / scale / scale[:, None], rtol=0, atol=0.04)
    assert torch.equal(draws, sample.direct_latents(run, 40_000, 3, kind).flatten(1))


def test_turntable_views_are_in_order_whatever_the_batches(folder):
    run = sample.load_run(folder)
    volumes = torch.zeros(18, 4, 8, 8, 8)
    volumes[:, 0, :, :, 6:], volumes[:, 1:] = 50, torch.rand(18, 3, 1, 1, 1)     # on the right, +x
    together = sample.render_views(run, volumes, [0.0, math.pi, 1.0], 8, extras=True)
    assert together["rgb"].shape == (18, 3, 3, 8, 8) and together["depth"].shape == (18, 3, 1, 8, 8)
    for i, v, azimuth in [(0, 0, 0.0), (17, 0, 0.0), (17, 2, 1.0), (3, 1, math.pi)]:
        alone = sample.render_views(run, volumes[i:i + 1], [azimuth], 8)["rgb"]
        torch.testing.assert_close(together["rgb"][i, v], alone[0, 0])
    half = together["occupancy"][:, :, 0, :, 4:].sum((2, 3)) > together["occupancy"][
        :, :, 0, :, :4].sum((2, 3))
    assert half[:, 0].all() and not half[:, 1].any()          # seen from behind: left


def test_the_nearest_training_object_of_a_copy_is_its_original(folder):
    run = sample.load_run(folder)
    volumes = torch.rand(3, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    index, distance = sample.nearest_training(run, volumes[[2, 0]] * 1.001, volumes)
    assert index.tolist() == [2, 0] and distance.max() < 0.01
    red, green = (torch.tensor([50.0, *rgb]).view(1, 4, 1, 1, 1).expand(1, 4, 8, 8, 8)
                  for rgb in ((1, 0, 0), (0, 1, 0)))
    _, distance = sample.nearest_training(run, red, green)
    assert 0.1 < distance.item() < (2 / 3)**0.5             # most: all off by (1, -1, 0)


# ---- Frechet distance ---------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_is_its_closed_form():
    zero = torch.zeros(3, dtype=F64)
    a = exact_features(50, zero, torch.diag(torch.tensor([1.0, 4, 9], dtype=F64)))
    b = exact_features(80, zero + 2, torch.diag(torch.tensor([4.0, 4, 1], dtype=F64)), seed=1)
    # Diagonal: |mean|^2 + sum (sqrt a - sqrt b)^2 = 12 + 1 + 0 + 4.
    assert sample.frechet_distance(a, b) == pytest.approx(17, rel=1e-10)
    assert sample.frechet_distance(b, a) == pytest.approx(17, rel=1e-10)
    A, B = (torch.tensor(m, dtype=F64) for m in ([[2, 1], [1, 3]], [[1, -0.5], [-0.5, 4]]))
    root = math.sqrt((A @ B).trace() + 2 * math.sqrt(A.det() * B.det()))   # tr sqrt(A B), 2 x 2
    a, b = exact_features(9, zero[:2], A), exact_features(30, zero[:2], B, seed=1)
    assert sample.frechet_distance(a, b) == pytest.approx(5 + 5 - 2 * root, rel=1e-10)


def test_frechet_distance_to_itself_is_zero_even_with_fewer_pictures_than_features():
    x = torch.randn(10, 40, generator=torch.Generator().manual_seed(0))
    assert sample.frechet_distance(x, x[torch.randperm(10)]) == pytest.approx(0, abs=1e-5)
    assert sample.frechet_distance(x, x + 1) == pytest.approx(40, rel=1e-6)
    for a, b in [(x, x[:, :3]), (x[:1], x), (x[0], x)]:
        with pytest.raises(ValueError, match="features"):
            sample.frechet_distance(a, b)


def test_frechet_distance_agrees_with_the_eigenvalues_of_the_product_on_real_features():
    # Another way to the same trace: sqrt(A B) has the roots of the eigenvalues of A B itself.
    images = torch.rand(300, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    a = sample.image_features(images).double().numpy()
    b = sample.image_features(images.flip(0) ** 1.5)[:280].double().numpy()
    A, B = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(A @ B).astype(complex)).real.sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * root
    ours = sample.frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert expected > 1e-3 and ours == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_is_its_definition_and_unbiased():
    a, b = normal(7, 5), normal(9, 5, seed=1) + 0.3
    k = lambda x, y: (float(x @ y) / 5 + 1) ** 3                                  # noqa: E731
    within = [sum(k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j)
              / (len(s) * (len(s) - 1)) for s in (a, b)]
    across = sum(k(x, y) for x in a for y in b) / (len(a) * len(b))
    assert sample.kernel_distance(a, b) == pytest.approx(sum(within) - 2 * across, rel=1e-12)
    many = [sample.kernel_distance(normal(20, 4, seed=2 * i), normal(20, 4, seed=2 * i + 1))
            for i in range(300)]
    mean, error = np.mean(many), np.std(many) / len(many) ** 0.5
    assert abs(mean) < 3 * error and min(many) < 0 < max(many)
    with pytest.raises(ValueError, match="n, m >= 2"):
        sample.kernel_distance(a[:1], b)


def test_ssim_is_one_for_equal_pictures_and_its_formula_for_flat_ones():
    picture = torch.rand(2, 3, 24, 24)
    torch.testing.assert_close(sample.ssim(picture, picture), torch.ones(2))
    flat = [torch.full((1, 3, 16, 16), v) for v in (0.2, 0.6)]
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)     # no variance: luminance alone
    assert sample.ssim(*flat).item() == pytest.approx(expected, rel=1e-4)
    assert sample.ssim(picture, 1 - picture).max() < 0


def test_shape_metrics_agree_with_brute_force():
    a, b = normal(6, 40, 3).float(), (normal(5, 40, 3, seed=1) * 1.1).float()

    def chamfer(x, y):
        d = (x[:, None] - y).square().sum(-1)
        return float(d.amin(1).mean() + d.amin(0).mean())

    D = np.array([[chamfer(x, y) for y in b] for x in a])
    assert np.allclose(sample.chamfer_distances(a, b).numpy(), D, rtol=1e-4)
    union, own = torch.cat([a, b]), [0] * 6 + [1] * 5
    full = np.array([[chamfer(x, y) for y in union] for x in union]) + np.diag([np.inf] * 11)
    nna = np.mean([own[i] == own[j] for i, j in enumerate(full.argmin(1))])
    scores = sample.shape_metrics(a, b)
    assert scores["cov"] == len(set(D.argmin(1))) / 5
    assert scores["mmd"] == pytest.approx(D.min(0).mean(), rel=1e-4)
    assert scores["nna"] == pytest.approx(nna)
    assert sample.shape_metrics(a, b, sample.nearest_clouds(b, b, same=True)) == scores


def test_nearest_clouds_are_those_of_all_pairs():
    shapes = torch.rand(40, 1, 3, generator=torch.Generator().manual_seed(3)) + 0.2  # ellipsoids
    a = torch.nn.functional.normalize(normal(40, 512, 3).float(), dim=-1) * shapes
    full = sample.chamfer_distances(a[:25], a[25:])
    near = sample.nearest_clouds(a[:25], a[25:])
    assert torch.equal(near.argmin(1), full.argmin(1))
    assert torch.equal(near.argmin(0), full.argmin(0))
    assert torch.equal(near.amin(1), full.amin(1)) and near.isinf().sum() > 50
    own = sample.nearest_clouds(a, a, same=True)
    full = sample.chamfer_distances(a, a).fill_diagonal_(torch.inf)
    assert torch.equal(own.argmin(1), full.argmin(1)) and own.diagonal().isinf().all()


def test_a_set_covers_itself_at_no_distance_and_far_sets_are_told_apart():
    a = normal(5, 64, 3).float()
    scores = sample.shape_metrics(a, a)
    assert scores["cov"] == 1 and scores["mmd"] == pytest.approx(0, abs=1e-5)
    assert sample.shape_metrics(a, a + 10)["nna"] == 1
    with pytest.raises(ValueError, match="generated must be"):
        sample.shape_metrics(a[:1], a)


def test_surface_points_of_a_ball_are_uniform_on_it():
    at = (torch.arange(48) + 0.5) / 24 - 1
    x, y, z = torch.meshgrid(at, at, at, indexing="ij")
    radius = (x**2 + y**2 + z**2).sqrt()
    # A density that falls linearly through the level at 0.6, so that the place is exact.
    density = math.log(2) * 24 * (1 + 10 * (0.6 - radius)).clamp(0, 5)
    points = sample.surface_points(torch.stack([density, *[density] * 3]), 4000)
    assert points.shape == (4000, 3)
    assert (points.norm(dim=1) - 0.6).abs().max() < 0.02
    # On a sphere every coordinate is uniform in [-r, r] (Archimedes).
    for c in (points / 0.6).T:
        assert c.mean().abs() < 0.05 and c.std().item() == pytest.approx(3**-0.5, abs=0.03)
    assert sample.surface_points(torch.zeros(4, 8, 8, 8), 10) is None


def test_image_features_tell_pictures_apart_but_not_chunks():
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features = sample.image_features(images)
    assert features.shape == (5, 240)
    torch.testing.assert_close(sample.image_features(images, chunk=2), features)
    assert torch.pdist(features).min() > 1e-3


# ---- Figures ------------------------------------------------------------------------------------


def test_pictures_are_white_where_there_is_nothing_and_normals_are_colours():
    occupancy = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    out = dict(rgb=torch.tensor([0.0, 0.3]).expand(1, 3, 1, 2), occupancy=occupancy,
               depth=torch.tensor([0.0, 2.0]).view(1, 1, 1, 2),
               normal=torch.tensor([[0, 0.0], [0, 1], [0, -1]]).view(1, 3, 1, 2))
    assert sample.on_white(out)[0, 0, 0].tolist() == pytest.approx([1, 0.3])
    assert sample.depth_picture(out)[0, :, 0, 0].tolist() == [1, 1, 1]
    assert sample.normal_picture(out)[0, :, 0].tolist() == [[1, 0.5], [1, 1], [1, 0]]
    assert sample.to_uint8(torch.tensor([-1, 0.5, 2.0]).view(3, 1, 1)).tolist() == [[[0, 128, 255]]]


# ---- Meshes -------------------------------------------------------------------------------------


def test_a_mesh_without_scikit_image_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)         # as where it was never installed
    monkeypatch.setitem(sys.modules, "skimage.measure", None)
    refused(lambda: sample.save_mesh(tmp_path / "m.ply", torch.zeros(4, 8, 8, 8)),
            "pip install scikit-image")
    assert not (tmp_path / "m.ply").exists()


def test_the_mesh_of_a_ball_has_its_place_volume_colour_and_faces_outward(tmp_path):
    pytest.importorskip("skimage")
    c = (2 * torch.arange(32) + 1) / 32 - 1
    z, y, x = torch.meshgrid(c, c, c, indexing="ij")
    centre, R = torch.tensor([0.3, -0.2, 0.1]), 0.5
    r = torch.stack([x, y, z], -1).sub(centre).norm(dim=-1)
    volume = torch.zeros(4, 32, 32, 32)
    volume[0] = ((R - r) * 16 + 0.5).clamp(0, 1) * 2 * math.log(2) * 16    # half of it at r = R
    volume[1:, r < R + 0.05] = torch.tensor([[1.0], [0.5], [0.0]])
    skinning = torch.rand(2, 32, 32, 32)                                     # is not looked at
    sample.save_mesh(tmp_path / "m.ply", torch.cat([volume, skinning]))
    lines = (tmp_path / "m.ply").read_text().splitlines()
    n = int(next(line for line in lines if "vertex" in line).split()[-1])
    start = lines.index("end_header") + 1
    rows = torch.tensor([[float(v) for v in line.split()] for line in lines[start:start + n]])
    faces = torch.tensor([[int(v) for v in line.split()] for line in lines[start + n:]])[:, 1:]
    assert (rows[:, :3] - centre).norm(dim=1).sub(R).abs().max() < 0.02
    a, b, c = rows[:, :3][faces].unbind(1)
    inside = (torch.linalg.cross(a, b) * c).sum() / 6         # negative if the faces look inward
    assert inside.item() == pytest.approx(4 / 3 * math.pi * R**3, rel=0.02)
    assert (rows[:, 3:] - torch.tensor([255, 127.5, 0])).abs().max() <= 2
    refused(lambda: sample.save_mesh(tmp_path / "e.ply", torch.zeros(4, 8, 8, 8)), "empty")
    assert not (tmp_path / "e.ply").exists()


def test_no_stream_repeats_the_numbers_that_embeddings_start_with():
    # With e ~ N(0, I) drawn like the initial table, "random" embeddings decode to training objects.
    torch.manual_seed(0)
    table, unit = torch.nn.Embedding(5, 16).weight.detach(), torch.nn.functional.normalize
    for name in ("direct normal", "direct fitted", "noise 0", "churn", "stage 1"):
        drawn = torch.randn(5, 16, generator=sample.stream(0, name))
        assert float((unit(drawn) @ unit(table).T).abs().max()) < 0.95
        assert torch.equal(drawn, torch.randn(5, 16, generator=sample.stream(0, name)))
        assert not torch.equal(drawn, torch.randn(5, 16, generator=sample.stream(1, name)))


# ---- Text, and diffusion on volumes -------------------------------------------------------------


def test_what_a_caption_asks_for_is_read_from_its_words():
    ask = "an orange round table with blue legs and a shelf"
    assert sample.asked_for(ask) == (["orange", "blue"], {"round", "table", "legs", "shelf"})
    seen = [(["orange", "red"], {"table", "round", "pedestal"}), (["orange", "blue"], {"car"})]
    assert sample.attribute_scores([ask, ask], seen) == [3 / 4, 2 / 8]


def test_a_reader_learns_attributes_that_it_has_not_seen_together():
    # Objects of two flat colours, above and below; the kind is the shade of the rest.
    rng, colours = np.random.default_rng(0), list(data.COLOURS)
    picks = [rng.choice(8, 2, replace=False) for _ in range(256)]
    kinds = rng.integers(5, size=256)
    images = torch.zeros(256, 4, 16, 16, 3)
    for picture, (a, b), kind in zip(images, picks, kinds):
        picture[:, :5], picture[:, 5:10] = (torch.tensor(data.COLOURS[colours[i]]) for i in (a, b))
        picture[:, 10:] = kind / 4
    captions = [f"a {colours[a]} {sample.KINDS[k]} with {colours[b]} legs"
                for (a, b), k in zip(picks, kinds)]
    none = torch.zeros(0)
    dataset = data.Dataset((images.flatten(0, 1) * 255).byte(), torch.full((1024, 16, 16), 255),
                           none, none, torch.arange(256).repeat_interleave(4), none,
                           [str(i) for i in range(256)], captions, "", [])
    reader = sample.fit_reader(dataset, epochs=12)
    seen = sample.read_attributes(reader, images.movedim(-1, 2))
    assert min(sample.attribute_scores(captions, seen)) > 0.97
    assert max(sample.attribute_scores(captions[1:] + captions[:1], seen)[:1]) < 0.3


def test_the_reader_reads_99_percent_of_what_true_objects_have_and_is_learned_once(tmp_path):
    reader = sample.reader_of(tmp_path, dict(size=64, seed=0))                # of seed 1's objects
    true = data.load("synthetic", 64, 0, 0, 240, 8)
    frames = torch.stack([true.frames_of(k) for k in range(true.n_objects)])
    seen = sample.read_attributes(reader, true.batch(frames, 64)[0])
    colours, parts = sample.attribute_scores(true.captions, seen)
    assert min(colours, parts) >= 0.99
    # What nobody asked for is not seen either, or "everything is there" would score 100 %.
    invented = [found - sample.asked_for(c)[1] for c, (_, found) in zip(true.captions, seen)]
    assert sum(map(len, invented)) < 0.02 * sum(len(sample.asked_for(c)[1]) for c in true.captions)
    again = sample.reader_of(tmp_path, dict(size=64, seed=0)).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in reader.state_dict().items())


def test_diffused_volumes_are_the_decoders_own(folder):
    run = sample.load_run(folder)
    volumes = sample.decode(run, sample.training_latents(run))
    run.settings = SETTINGS | {"space": "volume"}
    raw = sample.training_latents(run)
    assert raw.shape == (3, 4, 16, 16, 16) and sample.diffused_shape(run.settings) == (4, 16)
    torch.testing.assert_close(sample.decode(run, raw), volumes)
    assert sample.latent_noise(run, 2, 0).shape == (2, 4, 16, 16, 16)


def test_flags_that_cannot_work_are_refused_before_anything_is_made(folder):
    for flags, *words in [(["--evaluate", "--n", "8"], "8 samples x 10 views", "--n 25"),
                          (["--evaluate", "--direct", "normal"], "--direct"),
                          (["--prompt", "a red chair", "--identity", "0"], "--prompt"),
                          (["--prompt", "a red chair"], "--text"),
                          (["--interpolate", "1", "2", "--direct", "normal"], "--interpolate"),
                          (["--interpolate", "1", "2", "--identity", "0"], "--identity"),
                          (["--interpolate", "3", "3"], "two seeds"),
                          (["--churn", "-5"], "--churn"), (["--churn", "nan"], "--churn"),
                          (["--guidance", "inf"], "--guidance"), (["--device", "meta"], "meta"),
                          (["--drive", "0003"], "do not move"), (["--views", "x"], "--views")]:
        refused(lambda: sample.main(["--run", str(folder), *flags]), *words)
    assert sorted(p.name for p in folder.iterdir()) == ["stage1.pt", "stage2.pt"]


def test_an_interpolation_begins_and_ends_at_the_samples_of_its_seeds(folder, monkeypatch):
    run, shown = sample.load_run(folder), []
    run.denoiser.unet.last[-1].weight.data.normal_(generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(sample, "decode", lambda run, latents: shown.append(latents) or
                        torch.zeros(len(latents), 4, 16, 16, 16))
    sample.save_interpolation(run, folder, (1, 2), 3)
    ends = torch.cat([sample.latent_noise(run, 1, seed) for seed in (1, 2)])
    torch.testing.assert_close(shown[0][[0, -1]], sample.sample_latents(run, ends, 3), rtol=1e-4,
                               atol=1e-4)
    assert (shown[0][18] - shown[0][0]).norm() > 1 and shown[0].isfinite().all()


# ---- Weights that somebody else trained ---------------------------------------------------------


def vgg16_weights():
    """Random weights of torchvision's VGG-16 layout."""
    weights, c_in, generator = {}, 3, torch.Generator().manual_seed(0)
    for i, width in zip([0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28],
                        [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6):
        weight = torch.randn(width, c_in, 3, 3, generator=generator)
        weights[f"features.{i}.weight"] = weight * (2 / (9 * c_in))**0.5
        weights[f"features.{i}.bias"], c_in = torch.zeros(width), width
    return weights


def test_lpips_is_its_formula_and_says_which_file_is_wrong(tmp_path):
    vgg, linear = vgg16_weights(), {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in
                                    enumerate((64, 128, 256, 512, 512))}
    for name, state in (("vgg16.pth", vgg), ("vgg.pth", linear)):
        torch.save(state, tmp_path / name)
    lpips = sample.load_lpips(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")
    a, b = (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    assert lpips(a, a).tolist() == [0, 0] and lpips(a, b).min() > 0
    maps, expected = [], 0
    for x in (a, b):                         # the network, written out
        x = x.sub(torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        x, mine = x / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), []
        for stage in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
            for i in stage:
                x = torch.nn.functional.conv2d(x, vgg[f"features.{i}.weight"], padding=1).relu()
            mine.append(x / x.square().sum(1, keepdim=True).sqrt())
            x = torch.nn.functional.max_pool2d(x, 2)
        maps.append(mine)
    for i, (x, y) in enumerate(zip(*maps)):
        expected = expected + (linear[f"lin{i}.model.1.weight"] * (x - y)**2).sum(1).mean((1, 2))
    torch.testing.assert_close(lpips(a, b), expected)
    refused(lambda: sample.load_lpips(tmp_path / "vgg.pth", tmp_path / "vgg.pth"), "vgg16-397923af")
    refused(lambda: sample.load_lpips(tmp_path / "vgg16.pth", tmp_path / "no.pth"), "no.pth")
    refused(lambda: sample.load_lpips(tmp_path / "vgg16.pth", tmp_path / "vgg16.pth"), "vgg.pth")
    torch.save(torch.zeros(3), tmp_path / "one.pth")                          # no dict
    refused(lambda: sample.load_lpips(tmp_path / "one.pth", tmp_path / "vgg.pth"), "one.pth")


def test_inception_without_torch_fidelity_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)   # as where it was never installed
    refused(lambda: sample.load_inception(tmp_path / "w.pth"), "pip install torch-fidelity")


def test_inception_reads_numbers_only(tmp_path, monkeypatch):
    module = SimpleNamespace(FeatureExtractorInceptionV3=lambda *a: pytest.fail("it was trusted"))
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    torch.save(Path("code"), tmp_path / "w.pth")               # a pickled object, not numbers
    refused(lambda: sample.load_inception(tmp_path / "w.pth"), "w.pth", "weights-inception")


# ---- Runs side by side --------------------------------------------------------------------------


def test_compared_runs_are_grouped_by_what_differs_and_summed_up_over_seeds(tmp_path, capsys):
    for i, (depth, seed, fd) in enumerate([(1, 0, 3.0), (1, 1, 1.0), (1, 2, 2.0), (4, 0, 0.5)]):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "metrics.json").write_text(json.dumps({
            "fd": fd, "seconds_per_sample": 0.1,
            "settings": {"seed": seed, "decoder_depth": depth, "size": 64}}))
    sample.main(["--compare", *(str(tmp_path / str(i)) for i in range(4)), "--out", str(tmp_path)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["runs", "fd", "seconds_per_sample"]
    assert rows[1][:6] == ["decoder_depth", "1", "3", "2", "(1,", "3)"]
    assert rows[2][:6] == ["decoder_depth", "4", "1", "0.5", "(0.5,", "0.5)"]
    assert (tmp_path / "compare.png").stat().st_size > 1000
    refused(lambda: sample.main(["--compare", str(tmp_path)]), "metrics.json", str(tmp_path))


def test_runs_of_stage_1_alone_and_of_other_numbers_of_samples_are_kept_apart(tmp_path, capsys):
    for name, numbers in (("a", {}), ("b", {}), ("c", {"fd": 1.0, "samples": 128}),
                          ("d", {"fd": 2.0, "samples": 256})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(
            {"psnr_heldout": 20.0, "settings": {"seed": 0}} | numbers))
    runs = [str(tmp_path / name) for name in "abcd"]
    sample.main(["--compare", *runs[:2], "--out", str(tmp_path)])            # nothing to draw
    assert not (tmp_path / "compare.png").exists()
    capsys.readouterr()
    sample.main(["--compare", *runs, "--out", str(tmp_path)])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:3] for row in rows[1:4]] == [
        ["samples", "None", "2"], ["samples", "128", "1"], ["samples", "256", "1"]]
