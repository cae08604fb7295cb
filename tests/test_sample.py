"""sample.py: strangers' checkpoints, noise to latents, the baseline, prompts, views, flags, meshes,
the page.

Runs here are tiny and untrained: what is tested is that every number arrives where it belongs.
"""
import base64
import builtins
import contextlib
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import pytest
import torch
from torch import nn

import data
import render
import sample
import train
from autodecoder import AutoDecoder, PoseNet, build_decoder
from data import BadInput
from diffusion import build_denoiser

F64 = torch.float64
NAMES = ["ann", "bob", "cy"]
VOCABULARY = ["a", "blue", "chair", "red", "table", "with"]
TINY = dict(
    size=32, n_objects=3, n_views=6, embed_dim=8, channels=16, volume_side=16, latent_side=4,
    decoder_depth=1, decoder_attention=(), unet_channels=16, unet_multipliers=(1, 2), unet_depth=1,
    unet_attention=(4,), context_dim=16, keypoints=8, pose_width=8, body=(0.5, 0.8, 0.5),
    sample_steps=4)


def settings_of(**changes):
    return dataclasses.asdict(train.AllSettings(**TINY | changes))


def make_run(folder, source="synthetic", names=NAMES, lively=False, **changes):
    """Both checkpoints of an untrained run, as train.py leaves them.

    lively: the decoder's objects are dense, and the denoiser, unlike a new one, has an opinion
    """
    torch.manual_seed(0)
    values = settings_of(**changes)
    settings = SimpleNamespace(**values)
    decoder = build_decoder(settings, len(names))
    vocabulary = VOCABULARY if settings.text else []
    denoiser = build_denoiser(settings, decoder.latent_shape, vocabulary)
    posenet, poses = None, None
    if settings.parts:
        network = PoseNet.from_settings(settings)
        network.split()                                    # all parts are in use
        posenet = network.state_dict()
        poses = network.eval()(torch.rand(5, 3, 32, 32))[0].detach()
    if lively:
        decoder.head[-1].bias.data[0] = 6.0
        for weight in denoiser.parameters():
            weight.data += 0.05 * torch.randn_like(weight)
    folder.mkdir(parents=True, exist_ok=True)
    portraits = torch.zeros(len(names), 4, 4, 4)
    if source == "puppets":
        portraits = sample.portraits(data.load_for(settings, source))
    train.save(folder / "stage1.pt", {
        "stage": 1, "settings": values, "names": names, "captions": names, "source": source,
        "fingerprint": "f", "model": decoder.state_dict(), "posenet": posenet, "poses": poses,
        "view": {"distance": 4.0, "elevation": 0.3}, "portraits": portraits})
    train.save(folder / "stage2.pt", {
        "stage": 2, "settings": values, "decoder": "f", "m": torch.tensor(-3.0),
        "s": torch.tensor(2.0), "vocabulary": vocabulary, "ema": denoiser.state_dict()})
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path)


@contextlib.contextmanager
def small_pictures():
    """Sheets and films as always, but of few and small pictures: drawing takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "SIDE", 24)
        patch.setattr(sample, "FRAMES", 4)
        patch.setattr(sample, "ORBIT", 12)                 # of the page
        patch.setattr(sample, "ORBIT_SIDE", 16)
        yield


def edit(path, **changes):
    """Changes entries of a checkpoint; None takes one away."""
    checkpoint = torch.load(path, weights_only=True)
    for key, value in changes.items():
        if value is None:
            del checkpoint[key]
        else:
            checkpoint[key] = value
    train.save(path, checkpoint)


def refused(call, *words):
    """Bad input is one line that holds all these words."""
    with pytest.raises(BadInput) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- Checkpoints ---------------------------------------------------------------------------------
def test_a_run_is_rebuilt_with_the_weights_that_were_saved(folder):
    for trained in (sample.load_run(folder), sample.open_run(folder)):
        saved = torch.load(folder / "stage1.pt", weights_only=True)
        for name, value in trained.autodecoder.state_dict().items():
            assert torch.equal(value, saved["model"][name])
        averaged = torch.load(folder / "stage2.pt", weights_only=True)["ema"]
        for name, value in trained.denoiser.state_dict().items():
            assert torch.equal(value, averaged[name])
        assert vars(trained.settings) == settings_of()
        assert trained.names == NAMES and trained.view == saved["view"]
        assert trained.normalizer.m == -3 and trained.normalizer.s == 2
        assert not trained.autodecoder.training and not trained.denoiser.training


def test_a_run_opened_for_stage_1_alone_needs_no_stage_2(folder):
    (folder / "stage2.pt").unlink()
    trained = sample.open_run(folder, stages=(1,))
    assert not hasattr(trained, "denoiser") and trained.encode is None
    latents = sample.training_latents(trained.autodecoder, 3)
    assert sample.decode(trained, latents).shape == (3, 4, 16, 16, 16)


def test_a_missing_checkpoint_is_bad_input_that_says_what_to_run(tmp_path):
    refused(lambda: sample.load_checkpoint(tmp_path, 2), "stage2.pt", "train.py --stage 2")
    assert sample.load_checkpoint(tmp_path, 2, resume=True) is None


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_bad_input_at_every_length(folder, share):
    whole = (folder / "stage1.pt").read_bytes()
    (folder / "stage1.pt").write_bytes(whole[:int(len(whole) * share)])
    refused(lambda: sample.load_checkpoint(folder, 1), "stage1.pt", "cannot be read")


@pytest.mark.parametrize("content", [b"not a checkpoint\n", bytes(100), b"PK\x03\x04" + bytes(50),
                                     b"\x89PNG\r\n\x1a\n" + bytes(30), b"stage: 1\n", b"MMMM"])
def test_a_file_that_is_no_checkpoint_is_bad_input(tmp_path, content):
    (tmp_path / "stage1.pt").write_bytes(content)
    refused(lambda: sample.load_checkpoint(tmp_path, 1), "stage1.pt", "cannot be read")
    refused(lambda: sample.load_weights("--t5", tmp_path / "stage1.pt", "tokens"), "--t5", "tokens")


class Attack:
    def __reduce__(self):
        return exec, ("import builtins; builtins.attacked = True",)


def test_one_changed_bit_of_one_weight_is_noticed(folder):
    for name, key in (("stage1.pt", "model"), ("stage2.pt", "ema")):
        checkpoint = torch.load(folder / name, weights_only=True)
        weight = next(value for value in checkpoint[key].values() if len(value.flatten()) > 10)
        content = bytearray((folder / name).read_bytes())
        content[content.index(weight.numpy().tobytes()) + 9] ^= 1
        (folder / name).write_bytes(bytes(content))
        stage = int(name[5])
        refused(lambda: sample.load_checkpoint(folder, stage), name, "is damaged: what it holds")


def test_the_digest_of_a_checkpoint_is_of_all_its_content_and_of_nothing_else():
    content = {"a": torch.arange(3.0), "b": [1, 2.0, None, "x"], "c": {1: True, "n": (1, 2)}}
    other_order = {"c": {"n": [1, 2], 1: True}, "b": [1, 2.0, None, "x"], "a": torch.arange(3.0)}
    digest = sample.content_digest(content)
    assert digest == sample.content_digest(other_order | {"digest": "itself"})
    changed = [content | {"a": torch.arange(3)}, content | {"a": torch.arange(3.0)[:, None]},
               content | {"b": [12.0, None, "x"]}, content | {"b": [1, 2, None, "x"]},
               content | {"c": {1: True, "n": (1, 2), "d": {}}},
               content | {"c": {1: 1, "n": [1, 2]}},
               content | {"d": None}]
    digests = {sample.content_digest(other) for other in changed}
    assert len(digests) == len(changed) and digest not in digests


def test_code_inside_a_checkpoint_is_refused_and_never_run(tmp_path):
    torch.save({"stage": 1, "settings": Attack()}, tmp_path / "stage1.pt")
    refused(lambda: sample.load_checkpoint(tmp_path, 1), "stage1.pt", "cannot be read")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        sample.load_run(tmp_path)
    assert not hasattr(builtins, "attacked")


def test_a_checkpoint_of_another_stage_or_kind_is_bad_input(folder):
    (folder / "stage2.pt").write_bytes((folder / "stage1.pt").read_bytes())
    refused(lambda: sample.load_checkpoint(folder, 2), "stage2.pt", "stage 1, not 2")
    torch.save(torch.zeros(3), folder / "stage2.pt")
    refused(lambda: sample.load_checkpoint(folder, 2), "stage2.pt", "something else")


def test_weights_that_do_not_fit_the_settings_are_bad_input(folder):
    model = build_decoder(SimpleNamespace(**settings_of()), 3)
    other = build_decoder(SimpleNamespace(**settings_of()), 4)
    good = model.state_dict()
    wrong = [good | {"linear.bias": torch.zeros(7)}, {"unknown": torch.zeros(1)}, {}, [1, 2],
             other.state_dict()]
    for bad in wrong:
        refused(lambda: sample.restore(lambda: model, bad, "x/stage1.pt"), "x/stage1.pt", "not fit")
    assert sample.restore(lambda: model, good, "x/stage1.pt") is model
    edit(folder / "stage1.pt", names=NAMES + ["dee"])
    refused(lambda: sample.open_run(folder), "stage1.pt", "does not fit")


@pytest.mark.parametrize("stage, key", [
    (1, "settings"), (1, "model"), (1, "names"), (1, "view"), (2, "ema"), (2, "m"), (2, "decoder")])
def test_a_checkpoint_without_one_of_its_parts_or_with_a_wrong_one_is_bad_input(folder, stage, key):
    path = folder / f"stage{stage}.pt"
    edit(path, **{key: 7})
    refused(lambda: sample.open_run(folder), path.name, f"lacks {key}")
    edit(path, **{key: None})
    refused(lambda: sample.open_run(folder), path.name, f"lacks {key}")


@pytest.mark.parametrize("name", ["parts", "embed_dim", "guidance"])
def test_a_checkpoint_without_one_of_its_settings_is_bad_input(folder, name):
    values = settings_of()
    del values[name]
    edit(folder / "stage1.pt", settings=values)
    refused(lambda: sample.open_run(folder), "stage1.pt", name)


def test_a_run_keeps_the_settings_of_both_stages_apart(folder):
    edit(folder / "stage2.pt", settings=settings_of(seed=5, latent_scale=0.5))
    for trained in (sample.load_run(folder), sample.open_run(folder)):
        assert trained.settings.seed == 5 and trained.normalizer.spread == 0.5
    assert trained.data_settings.seed == 0                 # which objects there were to learn from


def test_resuming_needs_more_than_sampling(folder):
    assert sample.load_checkpoint(folder, 1)["stage"] == 1
    refused(lambda: sample.load_checkpoint(folder, 1, resume=True), "stage1.pt", "optimizer",
            "order")


def test_a_stage_2_of_another_stage_1_is_bad_input(folder):
    edit(folder / "stage1.pt", fingerprint="g")
    refused(lambda: sample.open_run(folder), "stage2.pt", "--stage 2")
    assert sample.open_run(folder, stages=(1,)).names == NAMES


def test_networks_are_in_their_mode_again_after_pictures_were_drawn(folder):
    trained = sample.open_run(folder)
    trained.posenet = nn.Identity()
    trained.autodecoder.train()
    trained.posenet.eval()
    with pytest.raises(KeyError), sample.evaluating(trained):
        assert not trained.autodecoder.training and not trained.posenet.training
        raise KeyError
    assert trained.autodecoder.training and not trained.posenet.training


# ---- Devices -------------------------------------------------------------------------------------
def test_a_device_that_is_not_there_is_bad_input():
    refused(lambda: sample.choose_device("gpu"), "--device gpu", "--device cpu")
    refused(lambda: sample.choose_device("meta"), "--device meta")
    assert sample.choose_device("cpu") == "cpu"


def test_a_device_without_double_precision_is_refused_before_any_work(monkeypatch):
    zeros = torch.zeros

    def zeros_of_a_mac(*shape, device="cpu", dtype=torch.float32):
        if device == "mps" and dtype == F64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return zeros(*shape, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", zeros_of_a_mac)
    refused(lambda: sample.main(["--run", "nowhere", "--device", "mps"]), "--device mps", "double")


def test_nothing_is_imported_that_one_system_alone_has():
    assert not hasattr(sample, "resource")                 # Windows has none


# ---- Noise -> latents -> volumes -----------------------------------------------------------------
def test_no_stream_repeats_the_numbers_that_embeddings_start_with():
    # With e ~ N(0, I) drawn like the initial table, "random" embeddings decode to training objects.
    torch.manual_seed(0)
    table = nn.functional.normalize(nn.Embedding(5, 16).weight.detach())
    for name in ("direct normal", "direct fitted", "noise 0", "churn", "stage 1"):
        drawn = torch.randn(5, 16, generator=sample.stream(0, name))
        cosine = nn.functional.normalize(drawn) @ table.T
        assert cosine.abs().max() < 0.95
        assert torch.equal(drawn, torch.randn(5, 16, generator=sample.stream(0, name)))
        assert not torch.equal(drawn, torch.randn(5, 16, generator=sample.stream(1, name)))


def test_noise_i_depends_on_seed_and_i_only_and_is_unit_normal(folder):
    trained = sample.load_run(folder)
    few = sample.latent_noise(trained, 2, 7)
    many = sample.latent_noise(trained, 5, 7)
    assert few.shape == (2, 16, 4, 4, 4) and torch.equal(few, many[:2])
    noise = [many] + [sample.latent_noise(trained, 5, seed) for seed in (0, 1, 8)]
    flat = torch.cat(noise).flatten(1)
    assert torch.pdist(flat).min() > 30                    # sqrt(2 x 1024) apart: all are different
    assert flat.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("churn", [0.0, 40.0])
def test_latent_i_depends_on_its_noise_and_i_only_however_many_there_are(tmp_path, churn):
    trained = sample.load_run(make_run(tmp_path, lively=True))
    noise = sample.latent_noise(trained, 66, 7)            # more than fit in one chunk
    many = sample.sample_latents(trained, noise, 3, churn, 7)
    for i in (0, 63, 64, 65):
        alone = sample.sample_latents(trained, noise[i:i + 1], 3, churn, 7, first=i)
        torch.testing.assert_close(many[i:i + 1], alone, rtol=1e-4, atol=1e-4)
    other_seed = sample.sample_latents(trained, noise[:1], 3, churn, 8)
    same = torch.allclose(other_seed, many[:1], rtol=1e-4, atol=1e-4)
    assert same == (churn == 0)                            # the seed is that of the fresh noise


@pytest.mark.parametrize("churn", [0.0, 40.0])
def test_latents_of_an_untrained_denoiser_are_the_gaussian_it_assumes_denormalized(folder, churn):
    """D = c_skip x is exact for N(0, 0.5^2), so latents are m + 0.5 s / spread N(0, 1)."""
    trained = sample.load_run(folder)
    trained.normalizer.spread = 0.8
    noise = sample.latent_noise(trained, 8, 0)
    latents = sample.sample_latents(trained, noise, steps=64, churn=churn)
    assert latents.dtype == torch.float32
    assert latents.mean().item() == pytest.approx(-3, abs=0.05)
    assert latents.std().item() == pytest.approx(0.5 * 2.0 / 0.8, rel=0.03)


def test_volumes_are_what_the_decoder_makes_of_latents(folder):
    trained = sample.open_run(folder)
    latents = sample.training_latents(trained.autodecoder, len(trained.names))
    assert latents.shape == (3, 16, 4, 4, 4)
    volumes = trained.autodecoder(torch.arange(3))
    torch.testing.assert_close(sample.decode(trained, latents), volumes)
    torch.testing.assert_close(sample.decode(trained, latents.repeat(6, 1, 1, 1, 1))[15:], volumes)


def test_a_latent_does_not_depend_on_the_objects_that_are_decoded_beside_it():
    decoder = build_decoder(SimpleNamespace(**settings_of(norm="batch", latent_side=8)), 5).train()
    together = sample.training_latents(decoder, 5)         # it was in training mode, and is not now
    one_by_one = [decoder.decode_latent(e[None]) for e in decoder.embed(torch.arange(5))]
    torch.testing.assert_close(together, torch.cat(one_by_one))
    decoder.train()
    assert torch.equal(sample.training_latents(decoder, 5), together)
    assert together.std(0).max() > 1e-3                    # and they do differ


def exact_rows(n, mean, covariance, seed=0):
    """n rows whose mean and (n - 1) covariance are exactly as asked."""
    x = torch.randn(n, len(mean), generator=generator(seed), dtype=F64)
    x = x - x.mean(0)
    root = torch.linalg.cholesky(torch.cov(x.T))
    white = torch.linalg.solve_triangular(root, x.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


@pytest.mark.parametrize("kind", ["fitted", "normal"])
def test_direct_latents_have_the_covariance_that_they_promise(kind):
    """With the linear layer as the identity and G1 nothing else, a latent IS its embedding."""
    model = AutoDecoder(nn.Embedding(7, 8), embed_dim=8, channels=1, start_side=2, volume_side=4,
                        latent_side=2)
    variances = torch.tensor([4.0, 1, 9, 0.25], dtype=F64)
    four = exact_rows(7, torch.arange(4, dtype=F64), torch.diag(variances))
    e = torch.cat([four, four @ torch.full((4, 4), 0.5, dtype=F64)], 1).float()    # rank 4 of 8
    with torch.no_grad():
        model.linear.weight.copy_(torch.eye(8))
        model.linear.bias.zero_()
        model.embedding.weight.copy_(e)
    trained = SimpleNamespace(autodecoder=model, names=list("abcdefg"), device="cpu")
    drawn = sample.direct_latents(trained, 40_000, 3, kind).flatten(1)
    mean, covariance = torch.zeros(8), torch.eye(8)
    if kind == "fitted":
        mean, covariance = e.mean(0), e.T.cov()
    scale = covariance.diagonal().sqrt()
    torch.testing.assert_close(drawn.mean(0) / scale, mean / scale, rtol=0, atol=0.025)
    unit = scale * scale[:, None]
    torch.testing.assert_close(drawn.T.cov() / unit, covariance / unit, rtol=0, atol=0.04)
    assert torch.equal(drawn, sample.direct_latents(trained, 40_000, 3, kind).flatten(1))


# ---- Text ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("text"), lively=True, text=True)


def test_a_prompt_is_heard_and_the_empty_one_is_no_prompt(text_run):
    trained = sample.open_run(text_run)
    noise = sample.latent_noise(trained, 2, 0)
    no_prompt = sample.sample_latents(trained, noise, 2, 0.0)
    red = sample.sample_prompts(trained, noise, ["a red chair"] * 2, 2, 0.0, guidance=1)
    blue = sample.sample_prompts(trained, noise, ["a blue table"] * 2, 2, 0.0, guidance=1)
    assert (red - blue).abs().max() > 0.05 and (red - no_prompt).abs().max() > 0.05
    for guidance in (0, 1, 7.0):                           # given and free answer alike
        null = sample.sample_prompts(trained, noise, [""] * 2, 2, 0.0, guidance=guidance)
        torch.testing.assert_close(null, no_prompt, rtol=0, atol=5e-3)
    unheard = sample.sample_prompts(trained, noise, ["a red chair"] * 2, 2, 0.0, guidance=0)
    torch.testing.assert_close(unheard, no_prompt, rtol=0, atol=5e-3)


def test_each_sample_hears_its_own_prompt_and_has_its_own_fresh_noise(text_run):
    trained = sample.open_run(text_run)
    noise = sample.latent_noise(trained, 66, 0)
    prompts = ["a red chair"] * 65 + ["a blue table"]
    many = sample.sample_prompts(trained, noise, prompts, 4, 40.0, 5)
    alone = sample.sample_prompts(trained, noise[:2], prompts[:2], 4, 40.0, 5)
    torch.testing.assert_close(many[:2], alone, rtol=0, atol=5e-3)
    swapped = sample.sample_prompts(trained, noise, prompts[::-1], 4, 40.0, 5)
    changed = (many - swapped).abs().flatten(1).amax(1) > 0.05
    assert changed.nonzero()[:, 0].tolist() == [0, 65]
    unheard = sample.sample_prompts(trained, noise, prompts, 4, 40.0, 5, guidance=0)
    no_prompt = sample.sample_latents(trained, noise, 4, 40.0, 5)
    torch.testing.assert_close(unheard, no_prompt, rtol=0, atol=5e-3)


def test_a_prompt_of_unknown_or_too_many_words_is_warned_of(text_run, folder, capsys):
    trained = sample.open_run(text_run)
    sample.check_prompt(trained, "a red chair")
    assert capsys.readouterr().err == ""
    sample.check_prompt(trained, "a crimson crimson chair")
    assert capsys.readouterr().err.count("crimson") == 1
    sample.check_prompt(trained, "red " * 40)
    assert "first 31 words" in capsys.readouterr().err
    refused(lambda: sample.check_prompt(sample.open_run(folder), "a red chair"), "--text")


# ---- Views ---------------------------------------------------------------------------------------
def test_turntable_views_are_in_order_whatever_the_batches(folder):
    trained = sample.load_run(folder)
    volumes = torch.zeros(18, 4, 8, 8, 8)
    volumes[:, 0, :, :, 6:] = 50                           # on the right, +x
    volumes[:, 1:] = torch.rand(18, 3, 1, 1, 1)
    rgb, occupancy = sample.render_views(trained, volumes, [0.0, math.pi, 1.0], 8)
    assert rgb.shape == (18, 3, 3, 8, 8) and occupancy.shape == (18, 3, 1, 8, 8)
    for i, v, azimuth in [(0, 0, 0.0), (17, 0, 0.0), (17, 2, 1.0), (3, 1, math.pi)]:
        alone, _ = sample.render_views(trained, volumes[i:i + 1], [azimuth], 8)
        torch.testing.assert_close(rgb[i, v], alone[0, 0])
    left = occupancy[..., :4].sum((2, 3, 4))               # (18, 3)
    right = occupancy[..., 4:].sum((2, 3, 4))
    assert (right > left)[:, 0].all() and (left > right)[:, 1].all()   # from behind: left


def test_the_turntable_shows_a_ball_of_radius_1_3_from_rim_to_rim(folder):
    trained = sample.open_run(folder)
    for distance in (1.8, 4.0, 20.0):
        trained.view = {"distance": distance, "elevation": 0.3}
        cam2world, intrinsics = sample.view_from(trained, 0.5)
        assert cam2world[:3, 3].norm().item() == pytest.approx(distance, rel=1e-5)
        assert cam2world[1, 3].item() == pytest.approx(distance * math.sin(0.3), rel=1e-5)
        # Where the ray through the middle of the picture's edge passes the origin.
        o, d = render.camera_rays(cam2world, intrinsics, 1001)
        along = (o * d).sum(-1, keepdim=True)
        passes = (o - along * d).norm(dim=-1)[500]         # (1001,) of the middle row
        assert passes[0].item() == pytest.approx(1.3, abs=0.01)
        assert passes[500].item() == pytest.approx(0, abs=1e-4)


def test_a_turntable_turns_once_evenly_and_shows_no_view_twice(folder, monkeypatch):
    seen = []

    def watched(trained, volumes, azimuths, size, renderer):
        assert renderer is render.render_skipping
        seen.extend(azimuths)
        return torch.zeros(1, 4, 3, 8, 8), torch.zeros(1, 4, 1, 8, 8)

    monkeypatch.setattr(sample, "render_views", watched)
    with small_pictures():                                 # of four frames
        sample.save_turntable(sample.load_run(folder), None, folder)
    assert seen == pytest.approx([0, math.pi / 2, math.pi, 3 * math.pi / 2])


def test_films_show_full_rows_of_four_in_order_of_time():
    values = torch.arange(12.0)                            # object o at time t: 2 o + t
    views = values.view(6, 2, 1, 1, 1).expand(6, 2, 3, 4, 4)
    frames = sample.film_frames(views)
    assert frames.shape == (2, 3, 6, 24)                   # a row of four; two objects are left out
    assert frames[0, 0, 3, 3::6].tolist() == [0, 2, 4, 6]
    assert frames[1, 0, 3, 3::6].tolist() == [1, 3, 5, 7]
    assert sample.film_frames(views[:3]).shape == (2, 3, 6, 18)
    assert sample.film_frames(views.repeat(2, 1, 1, 1, 1)).shape == (2, 3, 18, 24)


def test_the_sheet_shows_a_row_a_side_of_up_to_eight_objects():
    values = torch.arange(34.0)                            # object o from side v: 2 o + v
    views = values.view(17, 2, 1, 1, 1).expand(17, 2, 3, 4, 4)
    rows = [row[:, 0, 0, 0].tolist() for row in sample.rows_of_eight(views)]
    assert rows == [list(range(0, 16, 2)), list(range(1, 16, 2)),
                    list(range(16, 32, 2)), list(range(17, 32, 2))]


def test_the_nearest_training_object_of_a_copy_is_its_original(folder):
    trained = sample.open_run(folder)
    volumes = torch.rand(3, 4, 8, 8, 8, generator=generator())
    index, distance = sample.nearest_training(trained, volumes[[2, 0]] * 1.001, volumes)
    assert index.tolist() == [2, 0] and distance.max() < 0.01
    red = torch.tensor([50.0, 1, 0, 0]).view(1, 4, 1, 1, 1).expand(1, 4, 8, 8, 8)
    green = torch.tensor([50.0, 0, 1, 0]).view(1, 4, 1, 1, 1).expand(1, 4, 8, 8, 8)
    _, distance = sample.nearest_training(trained, red, green)
    assert 0.1 < distance.item() < math.sqrt(2 / 3)        # most: all off by (1, -1, 0)


def kept_sheets(monkeypatch):
    """{name of a file: the rows of the sheet that is written there}, while sheets are drawn."""
    rows = {}
    monkeypatch.setattr(sample, "save_sheet",
                        lambda path, given, *_: rows.update({path.name: given}))
    return rows


def test_below_a_sample_stands_the_training_object_that_looks_most_like_it(tmp_path, monkeypatch):
    trained = sample.open_run(make_run(tmp_path, lively=True))
    rows = kept_sheets(monkeypatch)
    volumes = trained.autodecoder(torch.tensor([2, 0]))    # as samples: training objects
    with small_pictures():
        sample.save_sample_sheet(tmp_path, trained, volumes, nearest=True)
    front, _, _, nearest = rows["samples.png"]
    torch.testing.assert_close(nearest, front)
    assert (front[0] - front[1]).abs().max() > 0.01        # the two differ


def test_the_strip_from_noise_to_object_ends_with_the_sample(tmp_path, monkeypatch):
    trained = sample.open_run(make_run(tmp_path, lively=True))
    decoded = []
    decode = sample.decode
    monkeypatch.setattr(sample, "decode", lambda trained, latents: (
        decoded.append(latents), decode(trained, latents))[1])
    rows = kept_sheets(monkeypatch)
    sample.save_noise_strip(tmp_path / "strip.png", trained, 9, n=2, seed=3)
    noise = sample.latent_noise(trained, 2, 3)
    assert len(decoded) == 8 and [len(row) for row in rows["strip.png"]] == [8, 8]
    torch.testing.assert_close(decoded[-1], sample.sample_latents(trained, noise, 9, 0.0))
    assert (decoded[0] - decoded[-1]).abs().max() > 0.1


def test_each_column_of_the_strip_says_its_noise(tmp_path, monkeypatch):
    trained = sample.open_run(make_run(tmp_path, lively=True))
    below = []
    monkeypatch.setattr(sample, "save_sheet", lambda *given: below.extend(given[-1]))
    sample.save_noise_strip(tmp_path / "strip.png", trained, 9, n=1)
    sigmas = [float(text.removeprefix("σ = ")) for text in below]
    assert len(sigmas) == 8 and sigmas[0] == 80 and sigmas[-1] == 0.002
    assert sigmas == sorted(sigmas, reverse=True)
    assert sample.middles(100, 4) == [12.5, 37.5, 62.5, 87.5]


def test_samples_are_drawn_without_decoding_a_single_training_object(tmp_path):
    trained = sample.open_run(make_run(tmp_path, lively=True))
    trained.autodecoder.embedding = None                   # any use of it is an error
    with small_pictures():
        _, paths = sample.save_any_samples(trained, tmp_path, 8, 2, 0, 40.0)
    assert all(path.stat().st_size > 100 for path in paths)
    with pytest.raises(TypeError):
        sample.save_sample_sheet(tmp_path, trained, torch.zeros(1, 4, 16, 16, 16), nearest=True)


def test_both_readings_draw_the_same_objects(tmp_path):
    run = make_run(tmp_path, lively=True)
    with small_pictures():
        above, paths = sample.save_samples(sample.load_run(run), tmp_path / "a", 2, 4, 3, 40.0)
        below, more = sample.save_any_samples(sample.open_run(run), tmp_path / "b", 2, 4, 3, 40.0)
    assert torch.equal(above, below)
    assert [str(tmp_path / "a" / name) for name in ("samples.png", "turntable.gif")] == paths
    assert tmp_path / "b" / "turntable.gif" in more
    # Above: the objects side by side, a quarter turn between the frames, which are also the sheet.
    azimuths = [0.6 + turn * math.pi / 2 for turn in range(4)]
    rgb, occupancy = sample.render_any_views(sample.open_run(run), below, azimuths, 24)
    expected = sample.to_uint8(sample.on_white(rgb, occupancy))      # (2, 4, 24, 24, 3)
    sheet = iio.imread(paths[0]).reshape(4, 24, 2, 24, 3).transpose(2, 0, 1, 3, 4)
    assert (sheet == expected).all()
    assert iio.imread(paths[1]).shape == (4, 24, 48, 3)


# ---- Scores of stage 1 ---------------------------------------------------------------------------
def test_an_empty_decoder_scores_what_black_pictures_score():
    images = torch.randint(0, 256, (10, 8, 8, 3), dtype=torch.uint8, generator=generator())
    masks = torch.randint(0, 256, (10, 8, 8), dtype=torch.uint8, generator=generator(1))
    cameras = render.orbit(torch.arange(10.0), torch.zeros(10), 4.0)
    dataset = data.Dataset(
        images, masks, cameras, torch.tensor([[1.0, 1.0, 0.5, 0.5]]).expand(10, 4),
        torch.arange(10) % 2, torch.arange(10) > 0, ["a", "b"], ["", ""], "", [])

    class Empty(nn.Module):
        def forward(self, k):
            return torch.zeros(len(k), 4, 8, 8, 8)

    state = SimpleNamespace(autodecoder=Empty(), posenet=None, device="cpu")
    scores = sample.score_heldout(state, dataset)
    error = (images[1:].double() / 255).square().mean((1, 2, 3))
    psnr = (-10 * error.log10()).mean()
    assert scores["psnr_heldout"] == pytest.approx(psnr.item(), abs=1e-3)
    covered = (masks[1:].double() / 255).mean()
    assert scores["mask_heldout"] == pytest.approx(covered.item(), abs=1e-4)
    dataset.heldout[:] = False
    assert sample.score_heldout(state, dataset) == {}


def test_of_very_many_held_out_frames_some_are_scored_of_all_objects_and_views():
    few = SimpleNamespace(heldout=torch.tensor([False, True, True, False, True]))
    assert sample.frames_to_score(few).tolist() == [1, 2, 4]
    assert sample.frames_to_score(SimpleNamespace(heldout=torch.zeros(3) > 0)).tolist() == []
    many = SimpleNamespace(heldout=torch.arange(2400) % 24 >= 20)        # 4 views of 100 objects
    frames = sample.frames_to_score(many, 30)
    assert len(frames) == 30 and many.heldout[frames].all() and (frames[1:] > frames[:-1]).all()
    assert torch.equal(frames, sample.frames_to_score(many, 30))
    assert torch.bincount(frames % 24 - 20, minlength=4).min() > 3       # of each view
    assert torch.bincount(frames // 600, minlength=4).min() > 3          # of each quarter


def test_a_frame_is_compared_with_its_own_object_through_its_own_camera_and_lens(tmp_path):
    trained = sample.open_run(make_run(tmp_path, lively=True))
    cameras = render.orbit(torch.arange(4.0), 0.2, 4.0)
    lenses = torch.tensor([[1.2, 1.3, 0.5, 0.5]]) + 0.02 * torch.arange(16.0).view(4, 4)
    dataset = SimpleNamespace(images=torch.zeros(4, 16, 16, 3), cam2world=cameras,
                              intrinsics=lenses, object_index=torch.tensor([0, 1, 2, 0]))
    frames = torch.tensor([3, 1])
    rgb, occupancy = sample.render_frames(trained, dataset, frames, 24)
    for i, frame in enumerate(frames):
        volume = trained.autodecoder(dataset.object_index[frame:frame + 1])
        expected = render.render(volume, cameras[frame][None, None], lenses[frame][None, None],
                                 16, 24)
        torch.testing.assert_close(rgb[i], expected[0][0, 0])
        torch.testing.assert_close(occupancy[i], expected[1][0, 0])


def test_scoring_in_the_middle_of_training_is_in_evaluation_mode_and_moves_nothing(folder):
    trained = sample.open_run(folder)
    dataset = data.load_for(trained.data_settings, "synthetic")
    scores = sample.score_heldout(trained, dataset)
    trained.autodecoder.train()
    before = {name: value.clone() for name, value in trained.autodecoder.state_dict().items()}
    assert sample.score_heldout(trained, dataset) == scores
    sample.save_training_sheet(folder / "training.png", trained, dataset)
    for name, value in trained.autodecoder.state_dict().items():
        assert torch.equal(value, before[name])


def test_frames_to_show_are_held_out_ones_where_there_are_any():
    dataset = SimpleNamespace(heldout=torch.arange(20) % 2 == 1)
    frames, kind = sample.frames_to_show(dataset, 4)
    assert kind == "held-out" and frames.tolist() == [1, 7, 13, 19]
    dataset.heldout[:] = False
    frames, kind = sample.frames_to_show(dataset, 30)
    assert kind == "training" and frames.tolist() == list(range(20))


# ---- Pictures ------------------------------------------------------------------------------------
def test_pictures_are_white_where_there_is_nothing_and_normals_are_colours():
    views = {
        "rgb": torch.tensor([0.0, 0.3]).expand(1, 3, 1, 2),
        "occupancy": torch.tensor([0.0, 1.0]).view(1, 1, 1, 2),
        "depth": torch.tensor([0.0, 2.0]).view(1, 1, 1, 2),
        "normal": torch.tensor([[0, 0.0], [0, 1], [0, -1]]).view(1, 3, 1, 2),
        "parts": torch.tensor([[0.0, 1.0], [0.0, 0.0]]).view(1, 2, 1, 2),
    }
    white = sample.on_white(views["rgb"], views["occupancy"])
    assert white[0, 0, 0].tolist() == pytest.approx([1, 0.3])
    assert sample.depth_picture(views)[0, :, 0, 0].tolist() == [1, 1, 1]
    assert sample.normal_picture(views)[0, :, 0].tolist() == [[1, 0.5], [1, 1], [1, 0]]
    part = [0.55 + 0.45 * math.cos(angle) for angle in (0.0, 2.1, 4.2)]
    assert sample.parts_picture(views)[0, :, 0, 1].tolist() == pytest.approx(part)
    assert sample.parts_picture(views)[0, :, 0, 0].tolist() == [1, 1, 1]
    assert sample.to_uint8(torch.tensor([-1, 0.5, 2.0]).view(3, 1, 1)).tolist() == [[[0, 128, 255]]]


def test_depth_is_grey_from_near_and_dark_to_far_and_light():
    views = {"rgb": torch.zeros(1, 3, 1, 4), "occupancy": torch.tensor([[[[1.0, 1, 1, 0]]]]),
             "depth": torch.tensor([[[[2.0, 3, 4, 0]]]])}
    assert sample.depth_picture(views)[0, 0, 0].tolist() == pytest.approx([0.1, 0.5, 0.9, 1])
    views["occupancy"][:] = 0
    assert sample.depth_picture(views).min() == 1


# ---- Between two objects -------------------------------------------------------------------------
def test_an_arc_between_noises_has_their_length_and_both_ends():
    a = torch.randn(1, 16, 4, 4, 4, generator=generator(1))
    b = torch.randn(1, 16, 4, 4, 4, generator=generator(2))
    arc = sample.arc_between(a, b, torch.linspace(0, 1, 5))
    torch.testing.assert_close(arc[[0, -1]], torch.cat([a, b]))
    length = arc.flatten(1).norm(dim=1)
    assert length.min() > 0.97 * min(a.norm(), b.norm())   # the chord's middle: 0.71


def test_the_last_picture_of_an_interpolation_is_the_object_of_its_last_seed(tmp_path):
    trained = sample.open_run(make_run(tmp_path, lively=True))
    with small_pictures():
        sample.save_interpolation(trained, tmp_path, (1, 2), 2)
    sheet = iio.imread(tmp_path / "interpolation.png")[..., :3].astype(int)
    height, width, _ = sheet.shape

    def places_of(seed):
        """The columns of the sheet in which the object of a seed begins."""
        latents = sample.sample_latents(trained, sample.latent_noise(trained, 1, seed), 2, 0.0)
        rgb, occupancy = sample.render_views(trained, sample.decode(trained, latents), [0.6], 24)
        picture = sample.to_uint8(sample.on_white(rgb, occupancy))[0, 0].astype(int)
        found = set()
        for y in range(height - 23):
            for x in range(width - 23):
                if abs(sheet[y:y + 24, x:x + 24] - picture).max() <= 2:
                    found.add(x)
        return found

    film = iio.imread(tmp_path / "interpolation.gif").astype(int)
    assert len(film) > 60 and abs(film - film[::-1]).max() < 16          # there, and back again
    (first,), (last,) = places_of(1), places_of(2)
    assert last - first == 8 * 26                          # the first and the last of nine
    assert not places_of(3)


# ---- What moves ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def moving_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("moving"), "puppets", ["0000", "0001", "0002"],
                    lively=True, parts=2)


def test_what_moves_is_seen_in_its_poses_and_from_all_parts_cameras(moving_run):
    trained = sample.open_run(moving_run)
    assert trained.poses.shape == (5, 2, 4, 4)
    volumes = trained.autodecoder(torch.arange(3))
    assert volumes.shape == (3, 6, 16, 16, 16)
    rgb, occupancy = sample.render_any_views(trained, volumes, [0.0, 0.3], 16, pose=3)
    assert rgb.shape == (3, 2, 3, 16, 16)
    # The same by hand: of azimuth 0 and elevation 0 is the clip's own camera.
    turned, lens = sample.moving_view_from(trained, 0.3, 3)
    torch.testing.assert_close(
        turned, render.turn_about(trained.poses[3], 0.3, trained.posenet.distance, 0.3))
    trained.view["elevation"] = 0.0
    rgb, occupancy = sample.render_any_views(trained, volumes, [0.0], 16, pose=3)
    focal = trained.posenet.focal
    lens = torch.tensor([focal, focal, 0.5, 0.5]).expand(3, 1, 4)
    cameras = trained.poses[3].expand(3, 1, 2, 4, 4)
    true, _ = render.render_moving(volumes, cameras, lens, 16, 64)
    torch.testing.assert_close(rgb, true, rtol=1e-3, atol=1e-3)
    views = sample.geometry_views(trained, volumes, 0.0, 16, pose=3)
    torch.testing.assert_close(views["rgb"], rgb[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(views["parts"].sum(1, keepdim=True), views["occupancy"])


def test_a_subject_is_driven_by_the_poses_that_the_clips_frames_show(moving_run):
    trained = sample.open_run(moving_run)
    pictures = sample.load_driving(trained, "0001")
    settings = SimpleNamespace(**settings_of(parts=2, objects="0001", holdout=0))
    clip = data.load_for(settings, "puppets")
    images, masks = clip.batch(torch.arange(6), 32)
    torch.testing.assert_close(pictures, images + 1 - masks)
    expected = sample.cameras_of(trained, clip, torch.arange(6))
    assert trained.poses.shape == (6, 2, 4, 4) and torch.equal(trained.poses, expected)
    refused(lambda: sample.load_driving(trained, "0007"), "0007")


def test_a_clip_that_is_no_longer_what_the_run_has_seen_is_refused(moving_run, tmp_path):
    trained = sample.open_run(moving_run)
    true = trained.portraits
    trained.portraits = 1 - true
    refused(lambda: sample.load_driving(trained, "0001"), "puppets", str(moving_run), "--data",
            "are not the photos that")
    trained.source = str(tmp_path / "gone")
    refused(lambda: sample.load_driving(trained, "0001"), "gone", "--data", "is not there")
    trained.portraits = true
    sample.load_driving(trained, "0001", "puppets")        # they are there now
    assert trained.poses.shape == (6, 2, 4, 4)


def test_any_clip_drives_with_all_of_its_frames_whatever_the_run_left_out(moving_run, tmp_path):
    rgba = torch.zeros(20, 32, 32, 4, dtype=torch.uint8)
    for i in range(20):
        rgba[i, 8:24, 4 + i % 8:12 + i % 8] = 255          # under 25 % of the frame
    (tmp_path / "clips" / "b").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / "clips" / name).mkdir(exist_ok=True)
        for i, frame in enumerate(rgba[:10] if name == "a" else rgba):
            iio.imwrite(tmp_path / "clips" / name / f"{i}.png", frame.numpy())
    trained = sample.open_run(moving_run)
    trained.data_settings.clip_filter = True
    pictures = sample.load_driving(trained, str(tmp_path / "clips" / "b"))
    assert len(pictures) == len(trained.poses) == 20
    assert trained.data_settings.clip_filter               # of the run, as it was


def test_a_film_of_motion_shows_pose_after_pose_beside_the_frames_that_drive(
        moving_run, tmp_path, monkeypatch):
    trained = sample.open_run(moving_run)
    rows = kept_sheets(monkeypatch)
    films = []
    monkeypatch.setattr(sample, "save_film", lambda folder, name, film: films.append(film) or [])
    volume = trained.autodecoder(torch.tensor([1]))
    driving = torch.rand(5, 3, 32, 32, generator=generator())
    with small_pictures():
        sample.save_motion(trained, tmp_path, volume, driving)
    (film,) = films
    assert film.shape == (5, 3, 24, 48)
    small = nn.functional.interpolate(driving, size=(24, 24), mode="nearest")
    assert torch.equal(film[..., :24], small)
    for pose in range(5):
        rgb, occupancy = sample.render_any_views(trained, volume, [0.0], 24, pose=pose)
        torch.testing.assert_close(film[pose, ..., 24:], sample.on_white(rgb, occupancy)[0, 0])
    first_row, colour = rows["motion.png"][:2]             # eight columns of five poses
    shown = [0, 0, 1, 1, 2, 2, 3, 4]
    assert torch.equal(first_row, small[shown])
    torch.testing.assert_close(colour, film[shown][..., 24:], rtol=1e-4, atol=1e-4)
    degrees = torch.tensor([-20, -10, 0, 10, 20]).deg2rad()
    for column, azimuth in enumerate(degrees):
        seen = sample.geometry_views(trained, volume, azimuth.item(), 24, pose=2)
        seen = sample.on_white(seen["rgb"], seen["occupancy"])[0]
        torch.testing.assert_close(rows["views.png"][0][column], seen)


def test_what_moves_goes_through_its_poses_while_it_swings(moving_run, monkeypatch, tmp_path):
    seen = []

    def watched(trained, volumes, azimuths, size, pose):
        seen.append((math.degrees(azimuths[0]), pose))
        return torch.zeros(1, 1, 3, 8, 8), torch.zeros(1, 1, 1, 8, 8)

    monkeypatch.setattr(sample, "render_any_views", watched)
    with small_pictures():                                 # of four frames
        sample.save_any_turntable(sample.open_run(moving_run), None, tmp_path)
    azimuths, poses = zip(*seen)
    assert azimuths == pytest.approx([0, 20, 0, -20], abs=1e-4) and poses == (0, 1, 2, 3)


# ---- Command line: no flag is ignored in silence -------------------------------------------------
@pytest.fixture(scope="module")
def drawn(tmp_path_factory, text_run, moving_run):
    """drawn(kind, *flags): what sample.py writes, {name: bytes}; each command is run once."""
    runs = {"text": text_run, "moving": moving_run}
    runs["rigid"] = make_run(tmp_path_factory.mktemp("rigid"), lively=True)
    runs["other"] = make_run(tmp_path_factory.mktemp("other"), lively=True, channels=32)
    known = {}

    def draw(kind, *flags):
        if (kind, flags) not in known:
            out = tmp_path_factory.mktemp("out")
            with small_pictures():
                sample.main(["--run", str(runs[kind]), "--out", str(out), *flags])
            known[kind, flags] = {path.name: path.read_bytes() for path in out.iterdir()}
        return known[kind, flags]

    return draw


# A flag, the kind of run, a command without it, and the same with it.
CHANGES = {
    "--n": ("rigid", ["--n", "1"], ["--n", "2"]),
    "--seed": ("rigid", ["--n", "1"], ["--n", "1", "--seed", "1"]),
    "--steps": ("rigid", ["--n", "1"], ["--n", "1", "--steps", "3"]),
    "--churn": ("rigid", ["--n", "1"], ["--n", "1", "--churn", "0"]),
    "--direct": ("rigid", ["--n", "1"], ["--n", "1", "--direct", "fitted"]),
    "--identity": ("rigid", ["--n", "1"], ["--identity", "1"]),
    "--interpolate": ("rigid", ["--n", "1"], ["--n", "1", "--interpolate", "1", "2"]),
    "--nearest": ("rigid", ["--n", "1"], ["--n", "1", "--nearest"]),
    "--prompt": ("text", ["--n", "1"], ["--n", "1", "--prompt", "a red chair"]),
    "--guidance": ("text", ["--n", "1", "--prompt", "a red chair"],
                   ["--n", "1", "--prompt", "a red chair", "--guidance", "9"]),
    "--drive": ("moving", ["--n", "1"], ["--n", "1", "--drive", "0001"]),
    "--page": ("rigid", ["--n", "1"], ["--n", "1", "--page"]),
}
NAMED_IN_AN_ERROR = {
    "--run": ["--run", "nowhere"],
    "--data": ["--data", "somewhere"],
    "--device": ["--device", "gpu"],
}


@pytest.mark.parametrize("flag", CHANGES)
def test_a_flag_changes_what_is_drawn(drawn, flag):
    kind, without, with_it = CHANGES[flag]
    assert drawn(kind, *without) != drawn(kind, *with_it)


def test_every_flag_is_tested_here():
    flags = set()
    for action in sample.make_parser()._actions:
        flags |= set(action.option_strings)
    tested = {*CHANGES, *NAMED_IN_AN_ERROR, "--out", "--mesh"}
    assert flags == tested | {"-h", "--help"}


def test_another_run_and_another_kind_of_direct_sampling_draw_other_objects(drawn):
    one, other = drawn("rigid", "--n", "1"), drawn("other", "--n", "1")
    assert one["samples.png"] != other["samples.png"]
    fitted = drawn("rigid", "--n", "1", "--direct", "fitted")
    normal = drawn("rigid", "--n", "1", "--direct", "normal")
    assert fitted["samples.png"] != normal["samples.png"]
    for flags in NAMED_IN_AN_ERROR.values():
        refused(lambda: sample.main(flags), flags[1])


def test_each_training_object_is_shown_by_its_number(drawn):
    films = [drawn("rigid", "--identity", k)["turntable.gif"] for k in "012"]
    assert len(set(films)) == 3


def test_the_run_is_opened_on_the_device_that_is_asked_for(folder, monkeypatch):
    seen = []

    def watched(run, device, stages):
        seen.append((run, device, stages))
        raise BadInput("that is enough")

    monkeypatch.setattr(sample, "choose_device", lambda name: f"the {name}")
    monkeypatch.setattr(sample, "open_run", watched)
    page = ["--page"]                                      # of a run without stage 2
    for flags in ([], ["--direct", "fitted"], ["--identity", "1"], page, page + ["--seed", "0"]):
        refused(lambda: sample.main(["--run", "r", "--device", "gpu", *flags]), "enough")
    both, one = ("r", "the gpu", (1, 2)), ("r", "the gpu", (1,))
    assert seen == [both, one, one, one, both]


def test_what_no_flag_says_is_taken_from_the_runs_settings():
    args = sample.parse(["--run", "runs/a", "--seed", "9"])
    sample.fill_in(args, SimpleNamespace(sample_steps=7, churn=3.0, guidance=5.0))
    assert (args.n, args.seed, args.steps, args.churn, args.guidance) == (8, 9, 7, 3.0, 5.0)


def test_what_is_not_asked_for_is_what_the_run_says(drawn):
    said = drawn("text", "--n", "1", "--prompt", "a red chair")
    asked = drawn("text", "--n", "1", "--prompt", "a red chair", "--steps", "4", "--churn", "40",
                  "--guidance", "3", "--seed", "0")
    assert said == asked


def test_the_files_of_a_moving_subject_and_of_a_training_object(drawn):
    motion = {"motion.png", "views.png", "motion.gif", "motion.mp4"}
    film = {"turntable.gif", "turntable.mp4"}
    assert set(drawn("rigid", "--identity", "1")) == film
    driven = drawn("moving", "--n", "1", "--drive", "0001")
    assert set(driven) == motion | film | {"samples.png", "geometry.png"}
    identity = drawn("moving", "--identity", "1", "--drive", "0001")
    assert set(identity) == motion | film
    assert identity["motion.png"] != driven["motion.png"]


def test_an_interpolation_is_of_the_prompt_too(drawn):
    path = ["--n", "1", "--interpolate", "1", "2"]
    heard = drawn("text", *path, "--prompt", "a red chair", "--guidance", "9")
    assert heard["interpolation.png"] != drawn("text", *path)["interpolation.png"]


def test_results_go_beside_the_run_where_no_folder_is_named(tmp_path):
    run = make_run(tmp_path)
    with small_pictures():
        sample.main(["--run", str(run), "--n", "1", "--direct", "normal"])
    assert (run / "samples-direct" / "samples.png").stat().st_size > 100
    assert not (run / "samples").exists()


VALUES = {"n": ["2"], "seed": ["1"], "steps": ["3"], "churn": ["0"], "direct": ["normal"],
          "prompt": ["a red chair"], "guidance": ["2"], "interpolate": ["1", "2"], "nearest": [],
          "identity": ["0"], "mesh": [], "drive": ["0001"]}
WITHOUT_DIFFUSION = ["steps", "churn", "prompt", "guidance", "interpolate"]
WITHOUT_CHANCE = WITHOUT_DIFFUSION + ["n", "seed", "direct", "nearest"]
NOT_ON_A_PAGE = ["identity", "direct", "drive", "interpolate", "nearest", "mesh"]


@pytest.mark.parametrize("flag, other", [("direct", other) for other in WITHOUT_DIFFUSION]
                         + [("identity", other) for other in WITHOUT_CHANCE]
                         + [("page", other) for other in NOT_ON_A_PAGE])
def test_flags_that_do_not_go_together_are_refused_by_name_before_anything_is_read(flag, other):
    flags = [f"--{flag}", *VALUES.get(flag, []), f"--{other}", *VALUES[other]]
    refused(lambda: sample.main(["--run", "nowhere", *flags]), f"--{flag}", f"--{other}")


@pytest.mark.parametrize("flags, words", [
    (["--steps", "0"], ["--steps", "between 1 and"]),
    (["--n", "0"], ["--n", "between 1 and"]),
    (["--n", "1001"], ["--n", "between 1 and 1000"]),
    (["--seed", "-1"], ["--seed", "between 0 and"]),
    (["--interpolate", "0", "-1"], ["--interpolate", "between 0 and"]),
    (["--data", "somewhere"], ["--data", "--drive", "--page"]),
    (["--page", "--n", "65"], ["--page", "--n", "between 1 and 64"]),
    (["--churn", "-5"], ["--churn"]),
    (["--churn", "nan"], ["--churn"]),
    (["--guidance", "2"], ["--guidance", "--prompt"]),
    (["--prompt", "a red chair", "--guidance", "inf"], ["--guidance"]),
    (["--interpolate", "3", "3"], ["two seeds"]),
    (["--evaluate"], ["--evaluate"]),
    (["--step", "3"], ["--step", "--steps"]),
])
def test_flags_that_cannot_work_are_refused_before_anything_is_read(flags, words):
    refused(lambda: sample.main(["--run", "nowhere", *flags]), *words)


@pytest.mark.parametrize("flags, words", [
    (["--prompt", "a red chair"], ["--text"]),
    (["--drive", "0003"], ["do not move"]),
    (["--identity", "5"], ["0 to 2"]),
    (["--identity", "-1"], ["0 to 2"]),
])
def test_what_a_run_cannot_do_is_refused_before_anything_is_made(folder, flags, words):
    refused(lambda: sample.main(["--run", str(folder), *flags]), *words)
    assert sorted(path.name for path in folder.iterdir()) == ["stage1.pt", "stage2.pt"]


# ---- The data of a run, once more ----------------------------------------------------------------
def test_the_data_of_a_run_is_read_again_only_where_it_is_still_that(moving_run, tmp_path):
    trained = sample.open_run(moving_run)
    assert sample.load_data(trained).names == trained.names
    trained.portraits = 1 - trained.portraits
    refused(lambda: sample.load_data(trained), "puppets", str(moving_run), "--data")
    refused(lambda: sample.load_data(trained, str(tmp_path / "gone")), "gone", "is not there")


# ---- One page of a run ---------------------------------------------------------------------------
LOG = """stage,step,loss,psnr,ms_per_step
1,10,4.0,10.0,5
1,20,2.0,20.0,5
1,30,nan,nan,5
2,10,1.5,,5
2,20,1.25,,5
2,30,1.0,,5
2,40
"""


class Page(HTMLParser):
    """A page as a browser reads it: tags with their attributes; all that is to be read; pictures,
    (3, H, W) in [0, 1] by their alt."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.words = [], [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == ["html"]                       # which may be left open
        self.pictures = {}
        for picture in self.all("img"):
            head, _, content = picture["src"].partition(",")
            assert head == "data:image/jpeg;base64"
            pixels = torch.tensor(iio.imread(base64.b64decode(content, validate=True)))
            assert pixels.shape == (int(picture["height"]), int(picture["width"]), 3)
            self.pictures[picture["alt"]] = pixels.movedim(-1, 0) / 255

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words += text

    def script(self):
        return self.source.split("<script>")[1].split("</script>")[0]


@pytest.fixture(scope="module")
def page_run(tmp_path_factory):
    """A run of built-in objects that knows its data, with a log."""
    run = make_run(tmp_path_factory.mktemp("page") / "small", lively=True,
                   names=["0000", "0001", "0002"])
    dataset = data.load_for(SimpleNamespace(**settings_of()), "synthetic")
    edit(run / "stage1.pt", portraits=sample.portraits(dataset))
    (run / "log.csv").write_text(LOG)
    return run


def draw_page(run, *flags):
    with small_pictures():
        sample.main(["--run", str(run), "--page", *flags])
    return Page(run / "samples" / "page.html")


@pytest.fixture(scope="module")
def page(page_run):
    return draw_page(page_run, "--n", "5", "--seed", "3")


def assert_alike(pictures, true):
    """Each of n pictures (n, 3, H, W) is, but for what JPEG takes away, the n-th of the true ones,
    and more like it than like any other."""
    pictures, true = torch.stack(list(pictures)).flatten(1), torch.stack(list(true)).flatten(1)
    distance = torch.cdist(pictures, true) / math.sqrt(pictures.shape[1])
    assert distance.diag().max() < 0.05
    assert torch.equal(distance.argmin(1), torch.arange(len(true)))


def rendered(trained, volumes, azimuths, size, **options):
    """(n, V, 3, size, size) over white."""
    rgb, occupancy = sample.render_any_views(trained, volumes, azimuths, size, **options)
    return sample.on_white(rgb, occupancy)


def test_a_page_has_all_sections_and_fetches_nothing(page, page_run):
    for words in ("Objects that never existed", "3DVADER \u00b7 small", "of 3 objects", "seed 3",
                  "16 x 4 x 4 x 4", "Turn it", "From noise to object", "Shapes",
                  "Beside the truth", "How it was learned", "Sec. 3.1", "Sec. 3.2", "Sec. 3.3"):
        assert words in page.words
    assert "left out" not in page.words
    assert len(page.all("h2")) == 5 and len(page.all("svg")) == 3 and len(page.all("script")) == 1
    # Nothing comes from elsewhere, and the browser is told so.
    assert "://" not in page.source
    assert all(set(tag) <= {"src", "alt", "width", "height"} for tag in page.all("img"))
    names = {name for name, _ in page.tags}
    assert not names & {"link", "iframe", "object", "a", "audio", "video"}
    assert "url(" not in page.source and "import" not in page.script()
    (policy,) = [tag for tag in page.all("meta") if "http-equiv" in tag]
    assert policy["content"].split(";")[0] == "default-src 'none'"
    assert str(page_run) not in page.source                # where it lies is nobody's business


def test_the_frames_of_a_page_are_one_turn_of_each_sample(page, page_run):
    trained = sample.open_run(page_run)
    noise = sample.latent_noise(trained, 5, 3)
    volumes = sample.decode(trained, sample.sample_latents(trained, noise, 4, 40.0, 3))
    azimuths = [0.6 + 2 * math.pi * t / 12 for t in range(12)]
    true = rendered(trained, volumes, azimuths, 16)        # (5, 12, 3, 16, 16)
    frames = []
    for i in range(5):
        sheet = page.pictures[f"sample {i}, turning"]      # 2 rows of 6
        assert sheet.shape == (3, 32, 96)
        frames += list(sheet.reshape(3, 2, 16, 6, 16).permute(1, 3, 0, 2, 4).flatten(0, 1))
    assert_alike(frames, true.flatten(0, 1))
    (turning,) = [tag for tag in page.all("div") if tag.get("data-columns") == "6"]
    assert turning["data-words"].split("|") == [f"{30 * t} degrees" for t in range(12)]
    styles = [tag["style"] for tag in page.all("div") if "style" in tag]
    assert styles.count("aspect-ratio: 16 / 16; --columns: 6") == 6      # and the first one large


def test_the_way_from_noise_begins_with_noise_and_ends_with_the_samples(page, page_run):
    trained = sample.open_run(page_run)
    noise = sample.latent_noise(trained, 5, 3)
    latents = sample.sample_latents(trained, noise, 4, 40.0, 3)
    way = page.pictures["from noise to object: held above, believed below"]
    assert way.shape == (3, 4 * 48, 96)                    # levels; two rows of four objects
    held, believed = way.reshape(3, 4, 2, 24, 4, 24).permute(2, 1, 4, 0, 3, 5)     # (4, 4, 3, ...)
    samples = rendered(trained, sample.decode(trained, latents[:4]), [0.6], 24)[:, 0]
    assert_alike(believed[-1], samples)
    begin = trained.normalizer.denormalize(80 * noise[:4])
    assert_alike(held[0], rendered(trained, sample.decode(trained, begin), [0.6], 24)[:, 0])
    (levels,) = [tag for tag in page.all("div") if tag.get("data-columns") == "1"]
    first, *others, last = levels["data-words"].split("|")
    assert first == "sigma = 80" and last == "sigma = 0.002" and len(others) == 2


@pytest.mark.parametrize("prompt, steps", [(None, 1), (None, 20), ("a red chair", 3)])
def test_to_be_watched_changes_no_sample(text_run, prompt, steps):
    trained = sample.open_run(text_run)
    noise = sample.latent_noise(trained, 5, 1)
    latents, way = sample.watched_sampling(trained, noise, steps, 40.0, 1, prompt, 5.0)
    expected = sample.sample_prompt(trained, noise, steps, 40.0, 1, prompt, 5.0)
    assert torch.equal(latents, expected)
    assert len(way) == min(steps, 16)
    sigmas = [sigma for sigma, _, _ in way]
    assert sigmas[0] == 80 and (steps == 1 or sigmas[-1] == pytest.approx(0.002))
    last = trained.normalizer.denormalize(way[-1][2])
    torch.testing.assert_close(last, latents[:4])          # the last step goes to what is believed


def test_the_sheet_of_a_page_shows_colour_depth_and_normals_of_every_sample(page, page_run):
    trained = sample.open_run(page_run)
    noise = sample.latent_noise(trained, 5, 3)
    volumes = sample.decode(trained, sample.sample_latents(trained, noise, 4, 40.0, 3))
    rows, _ = sample.geometry_rows(sample.geometry_views(trained, volumes, 0.6, 24))
    columns = [page.pictures[f"sample {i}: colour, depth, normals"] for i in range(5)]
    assert_alike(columns, torch.cat(rows, -2))


def test_beside_the_truth_stands_what_is_made_of_the_same_object_by_the_same_camera(page, page_run):
    trained = sample.open_run(page_run)
    dataset = sample.load_data(trained)
    frames = dataset.heldout.nonzero()[:, 0]
    images, masks = dataset.batch(frames, 32)
    rgb, occupancy = sample.render_frames(trained, dataset, frames, 96)
    pairs = [page.pictures[f"{name}: truth above, render below"] for name in trained.names]
    assert_alike([pair[:, :32] for pair in pairs], sample.on_white(images, masks))
    assert_alike([pair[:, 32:] for pair in pairs], sample.on_white(rgb, occupancy))
    for i, name in enumerate(trained.names):
        psnr = -10 * (rgb[i] - images[i]).square().mean().log10()
        assert f"{name}: {psnr:.1f} dB" in page.words
    assert "These views were held out" in page.words


def test_some_of_the_data_has_the_numbers_of_its_objects_in_the_run(page_run):
    trained = sample.open_run(page_run)
    some = sample.some_data(trained, most=2)
    assert some.names == ["0000", "0002"] and some.object_index.unique().tolist() == [0, 2]
    everything = sample.load_data(trained)
    same = everything.images[everything.object_index != 1]
    assert torch.equal(some.images, same)
    trained.portraits = trained.portraits.roll(1, 0)
    refused(lambda: sample.some_data(trained, most=2), "synthetic", "are not the photos")


def test_curves_go_from_the_first_step_to_the_last_and_up_for_more(page, tmp_path):
    curves = [tag["aria-label"] for tag in page.all("svg")]
    assert curves == ["stage 1: PSNR, dB, from 10 to 20", "stage 1: loss, from 4 to 2",
                      "stage 2: loss, from 1.5 to 1"]
    places = []
    for line in page.all("polyline"):
        places.append([tuple(map(float, place.split(","))) for place in line["points"].split()])
    (left, low), (right, high) = places[0]
    assert (left, right) == (30, 230) and 140 >= low > high >= 20
    (x0, y0), (x1, y1), (x2, y2) = places[2]               # 1.5, 1.25, 1 at 10, 20, 30
    assert (x0, x1, x2) == (30, 130, 230) and y1 - y0 == pytest.approx(y2 - y1, abs=0.2) and y1 > y0
    (tmp_path / "log.csv").write_text("stage,step,loss,psnr,ms_per_step\n1,5,2.0,7.0,1\n")
    for path in (tmp_path / "log.csv", tmp_path / "none.csv"):
        section = sample.curves_section(path)
        assert "left out" in section and "log.csv" in section and "<svg" not in section
    flat = sample.curve_tag([(5, 1.0), (5, 1.0)], "the same step and number twice")
    assert "nan" not in flat and "inf" not in flat


HOSTILE = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "$body & ${run} $$"]


def test_names_and_prompts_are_shown_as_they_are_whatever_is_in_them(tmp_path, text_run):
    run = make_run(tmp_path / "<b>run<b>", lively=True, names=HOSTILE)
    (run / "stage2.pt").unlink()
    page = draw_page(run)
    assert len(page.all("script")) == 1 and page.all("b") == []
    assert all("onerror" not in tag for tag in page.all("img"))
    for name in HOSTILE:
        assert name in page.words and f"{name}, turning" in page.pictures
    assert "<b>run<b>" in page.words
    with small_pictures():
        sample.main(["--run", str(text_run), "--out", str(tmp_path), "--page", "--n", "1",
                     "--prompt", "a red <script>chair</script> & $run"])
    page = Page(tmp_path / "page.html")
    assert "a red <script>chair</script> & $run" in page.words and len(page.all("script")) == 1


def test_a_page_of_a_run_without_stage_2_shows_its_training_objects(tmp_path):
    run = make_run(tmp_path, lively=True)
    (run / "stage2.pt").unlink()
    page = draw_page(run, "--n", "2")
    assert "Objects that were learned" in page.words and "2 of 3" in page.words
    assert "From noise to object: left out" in page.words and "no stage 2" in page.words
    trained = sample.open_run(run, stages=(1,))
    true = rendered(trained, trained.autodecoder(torch.arange(2)), [0.6], 16)[:, 0]
    frames = [page.pictures[f"{name}, turning"][:, :16, :16] for name in NAMES[:2]]
    assert_alike(frames, true)
    # What only stage 2 hears is not ignored in silence.
    refused(lambda: draw_page(run, "--seed", "1"), "stage2.pt", "--stage 2")


def test_a_page_of_one_object_has_nothing_to_choose_from(tmp_path):
    run = make_run(tmp_path, lively=True, names=["ann"])
    (run / "stage2.pt").unlink()
    page = draw_page(run)
    assert page.all("button") == [] and "1 of 1" in page.words


def test_what_a_run_lacks_is_left_out_of_its_page_with_a_reason(tmp_path, capsys):
    run = make_run(tmp_path / "run", source=str(tmp_path / "photos of ann"), lively=True)
    page = draw_page(run, "--n", "1")
    assert "Beside the truth: left out, as the pictures" in page.words
    assert "How it was learned: left out, as this run has no log.csv" in page.words
    assert "photos of ann" not in page.source              # a path is told on the screen alone
    assert "photos of ann" in capsys.readouterr().out
    assert len(page.all("h2")) == 3


def test_a_page_of_what_moves_swings_and_goes_through_its_poses(moving_run):
    page = draw_page(moving_run, "--n", "1")
    trained = sample.open_run(moving_run)
    latents = sample.sample_latents(trained, sample.latent_noise(trained, 1, 0), 4, 40.0, 0)
    volumes = sample.decode(trained, latents)
    (turning,) = [tag for tag in page.all("div") if tag.get("data-columns") == "6"]
    words = turning["data-words"].split("|")
    assert words[::3] == ["0 degrees", "20 degrees", "0 degrees", "-20 degrees"]
    sheet = page.pictures["sample 0, turning"]
    frames = sheet.reshape(3, 2, 16, 6, 16).permute(1, 3, 0, 2, 4).flatten(0, 1)
    for t in (0, 3, 9):
        azimuth = math.radians(20 * math.sin(2 * math.pi * t / 12))
        true = rendered(trained, volumes, [azimuth], 16, pose=t * 5 // 12)[0, 0]
        assert (frames[t] - true).square().mean().sqrt() < 0.05
    assert "sample 0: colour, depth, normals, parts" in page.pictures
    assert "filmed from ahead" in page.words and "Beside the truth: left out" not in page.words


@pytest.mark.slow
def test_a_page_of_eight_objects_is_smaller_than_five_megabytes(page_run, tmp_path):
    sample.main(["--run", str(page_run), "--page", "--out", str(tmp_path), "--n", "2"])
    assert 4 * (tmp_path / "page.html").stat().st_size < 5e6
    page = Page(tmp_path / "page.html")
    assert page.pictures["sample 1, turning"].shape == (3, 6 * 160, 6 * 160)


# ---- ... in a browser ----------------------------------------------------------------------------
def test_the_script_of_a_page_is_a_program(page, tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("node, which would read the script, is not installed")
    (tmp_path / "page.js").write_text(page.script())
    done = subprocess.run([node, "--check", tmp_path / "page.js"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def find_browser():
    """A Chromium, by its usual names, or one of playwright's; None where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if shutil.which(name):
            return shutil.which(name)
    for cache in (".cache/ms-playwright", "Library/Caches/ms-playwright"):
        for name in ("chrome", "headless_shell", "Chromium"):
            found = sorted(Path.home().glob(f"{cache}/chromium*/**/{name}"))
            if found:
                return str(found[-1])
    return None


# What somebody does with a page, and what is then to be seen.
VISIT = """<script>
const seen = {}, viewers = document.querySelectorAll(".viewer")
const [orbit, noise] = viewers
const stage = orbit.querySelector(".stage"), small = orbit.querySelectorAll("button img")
const large = stage.querySelector("img")
function told(viewer) { return viewer.querySelector("output").textContent }
function place() {                            // of the frame that shows: columns, rows
  const box = stage.querySelector(".frame").getBoundingClientRect()
  const sheet = large.getBoundingClientRect()
  return [(box.left - sheet.left) / box.width, (box.top - sheet.top) / box.height]
}
function move(share, kind) {
  const x = share * stage.clientWidth
  stage.dispatchEvent(new PointerEvent(kind || "pointermove", {clientX: x, pointerType: "touch"}))
}
function slide(viewer, frame) {
  const slider = viewer.querySelector("input")
  slider.value = frame
  slider.dispatchEvent(new Event("input"))
}
seen.begin = [told(orbit), told(noise), place(), large.src === small[0].src]
move(0.5); move(0.74); seen.right = [told(orbit), place()]    // once across is once around
move(0.41); seen.left = told(orbit)
move(0.9, "pointerleave"); move(0.1); seen.again = told(orbit)       // another finger, elsewhere
slide(orbit, 7); seen.slid = [told(orbit), place()]
move(0.26); seen.after = told(orbit)          // from where the slider was
slide(noise, 3); seen.noise = [told(noise), told(orbit)]
small[2].closest("button").click()
seen.chosen = [large.src === small[2].src, large.alt]
seen.pressed = [...orbit.querySelectorAll("button")].map(one => one.ariaPressed)
seen.hidden = [...document.querySelectorAll(".controls")].map(one => one.hidden)
seen.fits = document.documentElement.scrollWidth <= innerWidth
addEventListener("load", () => {
  seen.broken = [...document.images].filter(image => image.naturalWidth === 0).length
  document.title = JSON.stringify(seen)
})
</script>"""


@pytest.mark.parametrize("width", [400, 1200])
def test_a_page_turns_slides_and_shows_what_is_chosen(page, tmp_path, width):
    browser = find_browser()
    if browser is None:
        pytest.skip("no Chromium is installed")
    (tmp_path / "page.html").write_text(page.source + VISIT, encoding="utf-8")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom",
         (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120)
    if "Turn it" not in done.stdout:
        pytest.skip(f"{browser} could not open the page: it may not read pytest's folders")
    visited = tmp_path / "visited.html"
    visited.write_text(done.stdout, encoding="utf-8")
    seen = json.loads(done.stdout.split("<title>")[1].split("</title>")[0])
    assert seen["begin"] == ["0 degrees", "sigma = 80", [0, 0], True]
    # The nearer side follows the hand to the right: the camera goes left, 0.24 turns of 12 frames.
    assert seen["right"] == ["270 degrees", [3, 1]]
    assert seen["left"] == "30 degrees" and seen["again"] == "30 degrees"
    assert seen["slid"] == ["210 degrees", [1, 1]] and seen["after"] == "150 degrees"
    assert seen["noise"] == ["sigma = 0.002", "150 degrees"]
    assert seen["chosen"] == [True, "sample 2, turning"]
    assert seen["pressed"] == ["false", "false", "true", "false", "false"]
    assert seen["hidden"] == [False, False] and seen["fits"] and seen["broken"] == 0


# ---- Meshes --------------------------------------------------------------------------------------
def test_a_mesh_without_scikit_image_says_what_to_install_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)      # as where it was never installed
    monkeypatch.setitem(sys.modules, "skimage.measure", None)
    refused(lambda: sample.main(["--run", "nowhere", "--mesh"]), "pip install scikit-image")
    refused(lambda: sample.save_mesh(tmp_path / "m.ply", torch.zeros(4, 8, 8, 8)), "scikit-image")
    assert not (tmp_path / "m.ply").exists()


def test_corners_of_a_mesh_are_voxel_centres_of_the_unpadded_volume_in_x_y_z(tmp_path, monkeypatch):
    asked = {}

    def marching_cubes(density, level):                    # in place of scikit-image's
        asked["shape"], asked["level"] = density.shape, level
        assert density[:, :, 0].max() == density[0].max() == density[:, -1].max() == 0
        corners = torch.tensor([[1.0, 2, 3], [8, 1, 1], [1, 1, 1]])          # z, y, x
        return corners.numpy(), torch.tensor([[0, 1, 2]]).numpy(), None, None

    monkeypatch.setitem(sys.modules, "skimage", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "skimage.measure",
                        SimpleNamespace(marching_cubes=marching_cubes))
    sample.save_mesh(tmp_path / "m.ply", torch.full((6, 8, 8, 8), 50.0))
    assert asked["shape"] == (10, 10, 10)
    assert math.exp(-asked["level"] * 2 / 8) == pytest.approx(0.5)           # half of the light
    lines = (tmp_path / "m.ply").read_text().splitlines()
    corners = [[float(v) for v in line.split()[:3]] for line in lines[12:15]]
    assert corners == [[-0.375, -0.625, -0.875], [-0.875, -0.875, 0.875], [-0.875] * 3]


def test_of_an_empty_sample_no_mesh_is_written_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "skimage", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "skimage.measure", SimpleNamespace(marching_cubes=None))
    (tmp_path / "sample3.ply").write_text("of an earlier sampling")
    assert sample.save_mesh(tmp_path / "sample3.ply", torch.zeros(4, 8, 8, 8)) == []
    assert "sample3.ply: this sample is empty, no mesh written" in capsys.readouterr().out
    assert not (tmp_path / "sample3.ply").exists()


def ball_volume(side, centre, radius):
    """An orange ball whose density falls through ln 2 side / 2 just at its radius: (4, D, H, W)."""
    position = (2 * torch.arange(side) + 1) / side - 1
    z, y, x = torch.meshgrid(position, position, position, indexing="ij")
    r = (torch.stack([x, y, z], -1) - centre).norm(dim=-1)
    volume = torch.zeros(4, side, side, side)
    volume[0] = ((radius - r) * 16 + 0.5).clamp(0, 1) * math.log(2) * side
    volume[1:, r < radius + 0.05] = torch.tensor([[1.0], [0.5], [0.0]])
    return volume


def test_a_film_that_ffmpeg_could_not_finish_is_told(tmp_path, monkeypatch):
    def written(path, *_, **__):
        return b"GIF" if path == "<bytes>" else path.write_bytes(b"half a film")

    monkeypatch.setattr(iio, "imwrite", written)
    refused(lambda: sample.save_film(tmp_path, "film", torch.zeros(2, 3, 8, 8)), "film.mp4",
            "disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["film.gif"]


def test_more_samples_than_fit_into_memory_are_refused_at_once(folder, monkeypatch):
    monkeypatch.setattr(sample, "physical_memory", lambda: 2**30)
    refused(lambda: sample.main(["--run", str(folder), "--n", "900"]), "GiB of memory", "--n")


def test_surface_colours_are_those_of_what_is_dense_there():
    centre = torch.tensor([0.3, -0.2, 0.1])
    volume = ball_volume(32, centre, 0.5)
    direction = nn.functional.normalize(torch.randn(200, 3, generator=generator()), dim=1)
    colours = sample.surface_colours(volume, centre + 0.5 * direction)
    assert (colours - torch.tensor([255, 127.5, 0])).abs().max() <= 2


def test_a_ply_file_lists_corners_with_colours_and_then_faces(tmp_path):
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0.5]])
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [1, 2, 3]])
    sample.write_ply(tmp_path / "m.ply", points, colours, torch.tensor([[0, 1, 2]]).numpy())
    lines = (tmp_path / "m.ply").read_text().splitlines()
    assert lines[:3] == ["ply", "format ascii 1.0", "element vertex 3"]
    assert lines[3:9] == ["property float x", "property float y", "property float z",
                          "property uchar red", "property uchar green", "property uchar blue"]
    assert lines[9:12] == ["element face 1", "property list uchar int vertex_indices", "end_header"]
    assert lines[12:] == ["0.00000 0.00000 0.00000 255 0 0", "1.00000 0.00000 0.00000 0 255 0",
                          "0.00000 1.00000 0.50000 1 2 3", "3 0 1 2"]


def test_the_mesh_of_a_ball_has_its_place_volume_colour_and_faces_outward(tmp_path):
    pytest.importorskip("skimage")
    centre, radius = torch.tensor([0.3, -0.2, 0.1]), 0.5
    skinning = torch.rand(2, 32, 32, 32)                   # is not looked at
    volume = torch.cat([ball_volume(32, centre, radius), skinning])
    sample.save_mesh(tmp_path / "m.ply", volume)
    lines = (tmp_path / "m.ply").read_text().splitlines()
    n = int(lines[2].split()[-1])
    start = lines.index("end_header") + 1
    rows = torch.tensor([[float(v) for v in line.split()] for line in lines[start:start + n]])
    faces = torch.tensor([[int(v) for v in line.split()] for line in lines[start + n:]])[:, 1:]
    assert ((rows[:, :3] - centre).norm(dim=1) - radius).abs().max() < 0.02
    a, b, c = rows[:, :3][faces].unbind(1)
    inside = (torch.linalg.cross(a, b) * c).sum() / 6      # negative if the faces look inward
    assert inside.item() == pytest.approx(4 / 3 * math.pi * radius**3, rel=0.02)
    assert (rows[:, 3:] - torch.tensor([255, 127.5, 0])).abs().max() <= 2
