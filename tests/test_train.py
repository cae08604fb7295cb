"""train.py: every flag is wired, the loops do what the paper says, resuming is exact, and a
stranger's mistakes get one line."""
import argparse
import csv
import dataclasses
import errno
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import data
import diffusion
import evaluate
import render
import sample
import train

ROOT = Path(__file__).resolve().parents[1]
# The smallest run that still goes through everything.
DATA = ["--n-objects", "4", "--n-views", "6", "--size", "16"]
DECODER = ["--volume-side", "16", "--embed-dim", "32", "--channels", "32", "--latent-side", "4",
           "--n-samples", "16", "--finer-at", ""]
DENOISER = ["--unet-channels", "32", "--unet-attention", "4,2", "--batch-size", "4",
            "--sample-steps", "4"]
OFTEN = ["--log-every", "2", "--save-every", "4"]
PUPPETS = ["--data", "puppets", "--n-objects", "2", "--n-views", "12", "--size", "32", "--parts",
           "2", "--keypoints", "8", "--views-per-step", "2", "--objects-per-step", "2"]


def run(*arguments, out, resume=False):
    """train.py in its smallest form; of two flags the later one counts."""
    flags = DATA + DECODER + OFTEN
    if "--stage" not in arguments or arguments[arguments.index("--stage") + 1] == "2":
        flags = flags + DENOISER
    if resume:
        flags = flags + ["--resume"]
    train.main([*flags, "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """A folder with a stage 1 of four steps, not to be written into: see copied."""
    folder = tmp_path_factory.mktemp("stage1")
    run("--stage", "1", "--steps", "4", out=folder)
    return folder


@pytest.fixture
def copied(stage1, tmp_path):
    """A run of one's own with that stage 1."""
    shutil.copytree(stage1, tmp_path, dirs_exist_ok=True)
    return tmp_path


def weights(out, stage, key="model"):
    return sample.load_checkpoint(out, stage)[key]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log_rows(folder):
    """Stage, step, loss and psnr of every row; times differ from run to run."""
    with open(folder / "log.csv") as file:
        return [row[:4] for row in csv.reader(file)]


@pytest.fixture
def no_pictures(monkeypatch):
    """Training without drawing, which takes longer than a few steps do."""
    for name in ("save_training_sheet", "save_orbit", "save_latent_histogram"):
        monkeypatch.setattr(sample, name, lambda *_: None)
    monkeypatch.setattr(train, "plot_log", lambda *_: None)
    monkeypatch.setattr(train, "first_sampling", lambda *_: [])


def interrupt_at(monkeypatch, step):
    """Makes training stop, as if killed, when it is about to log this step."""
    add = train.Log.add

    def killed(self, at, *numbers):
        if at > step:
            raise KeyboardInterrupt
        add(self, at, *numbers)

    monkeypatch.setattr(train.Log, "add", killed)


# ---- Every flag changes what is built, trained or drawn ------------------------------------------
RIGID = ["--n-objects", "3", "--n-views", "6", "--size", "16", "--volume-side", "16", "--embed-dim",
         "32", "--channels", "32", "--n-samples", "8", "--finer-at", "", "--window", "0",
         "--unet-channels", "16", "--batch-size", "2", "--sample-steps", "3", "--steps", "4",
         "--objects-per-step", "2", "--views-per-step", "2"]
MOVING = RIGID + ["--data", "puppets", "--size", "32", "--keypoints", "8", "--parts", "2",
                  "--split-at", "0.5", "--growth", "0.3,0.6", "--detail", "0.3,0.6",
                  "--settle-at", "0.6"]
TEXT = RIGID + ["--text", "--context-dim", "16"]


def everything(arguments):
    """All numbers that a run of these flags makes: frames, losses, weights, samples, in one row."""
    args, settings = train.parse(arguments)
    dataset = data.load_for(settings, args.data)
    settings = train.fit_to_data(settings, args.cameras, dataset)
    state = train.new_stage1(settings, dataset, "cpu")
    features = train.autodecoder.build_features(settings.perceptual, "cpu")
    loop = train.train_stage1 if state.posenet is None else train.train_moving
    numbers = [dataset.images, dataset.heldout, dataset.cam2world]
    steps = loop(settings, dataset, state, features, train.draw_coarse_to_fine)
    numbers += [torch.stack(pair) for pair in steps]
    numbers += list(state.autodecoder.state_dict().values())
    if state.posenet is not None:
        numbers += list(state.posenet.state_dict().values())
    latents = sample.training_latents(state.autodecoder, dataset.n_objects)
    first = {"captions": dataset.captions, "fingerprint": ""}
    settings, second = train.new_stage2(settings, latents, first, None, "cpu")
    loop = train.train_text if settings.text else train.train_stage2
    numbers += list(loop(settings, second))
    numbers += list(second.average.state_dict().values())
    if not settings.text:
        noise = torch.randn(2, *second.average.latent_shape,
                            generator=torch.Generator().manual_seed(settings.seed))
        generator = torch.Generator().manual_seed(0)
        numbers.append(diffusion.edm_sampler(second.average, noise, settings.sample_steps,
                                             S_churn=settings.churn, generator=generator))
    return torch.cat([number.flatten().double() for number in numbers])


FLAGS = {
    "size": (RIGID, "24"), "holdout": (RIGID, "3"), "n_objects": (RIGID, "4"),
    "n_views": (RIGID, "7"), "embed_dim": (RIGID, "16"), "channels": (RIGID, "16"),
    "start_side": (RIGID, "2"), "volume_side": (RIGID, "8"), "latent_side": (RIGID, "8"),
    "decoder_depth": (RIGID, "2"), "decoder_attention": (RIGID, "8"), "norm": (RIGID, "group"),
    "steps_stage1": (RIGID[:-6] + RIGID[-4:], "3"), "objects_per_step": (RIGID, "3"),
    "views_per_step": (RIGID, "1"), "n_samples": (RIGID, "9"), "lr_stage1": (RIGID, "1e-3"),
    "betas": (RIGID, "0.9,0.999"), "perceptual_weight": (RIGID, "2"),
    "foreground_weight": (RIGID, "2"), "finer_at": (RIGID, "0.5"), "window": (RIGID, "8"),
    "normalization": (RIGID, "meanstd"), "per_channel": (RIGID, None),
    "latent_scale": (RIGID, "0.5"), "sigma_data": (RIGID, "1"), "P_mean": (RIGID, "0"),
    "P_std": (RIGID, "2"), "unet_channels": (RIGID, "24"),
    "unet_multipliers": (RIGID, "1,2"), "unet_depth": (RIGID, "2"), "unet_attention": (RIGID, "2"),
    "steps_stage2": (RIGID[:-6] + RIGID[-4:], "3"), "batch_size": (RIGID, "3"),
    "lr_stage2": (RIGID, "1e-3"), "ema_half_life": (RIGID, "0.1"), "sample_steps": (RIGID, "2"),
    "churn": (RIGID, "0"), "seed": (RIGID, "1"),
    "objects": (RIGID, "0000,0002"), "arc": (RIGID, "30"),
    "shared_colours": (MOVING, None), "codebooks": (RIGID, "16"),
    "rows": (RIGID + ["--codebooks", "16"], "8"),
    "hash_rule": (RIGID + ["--codebooks", "16"], "paper"), "perceptual": (RIGID, "pixels"),
    "text": (RIGID, None), "context_dim": (TEXT, "8"), "transformer_depth": (TEXT, "2"),
    "parts": (MOVING, "3"), "keypoints": (MOVING, "27"), "pose_width": (MOVING, "8"),
    "ellipsoid": (MOVING, None), "skin_layout": (MOVING, None), "reach": (MOVING, "0.9,0.3,0.1"),
    "lr_pose": (MOVING, "1e-3"), "lr_parts": (MOVING, "0.1"), "clip": (MOVING, "0.01"),
    "growth": (MOVING, "0.1,0.4"), "detail": (MOVING, "0.1,0.4"), "split_at": (MOVING, "0.9"),
    "settle_at": (MOVING, "0.1"), "reprojection_weight": (MOVING, "2"),
    "equivariance_weight": (MOVING, "2"),
    # One of three parts lies where nothing is, and claims too little.
    "usage_weight": (MOVING + ["--parts", "3", "--reach", "0.01,0.01,9"], "50")}
# Of these, other tests say that they count.
ELSEWHERE = {"clip_filter": "test_data.py", "as_clips": "test_data.py",
             "max_megapixels": "test_data.py", "max_frames": "test_data.py", "t5": "t5",
             "guidance": "test_sample.py", "n_sheet": "sheet", "log_every": "log",
             "save_every": "saved", "precision": "bfloat16", "compile": "compiled"}


def test_every_setting_is_a_flag_that_some_test_turns():
    names = {field.name for field in dataclasses.fields(train.AllSettings)
             if field.metadata["group"] is not None}
    assert set(FLAGS) | set(ELSEWHERE) == names and not set(FLAGS) & set(ELSEWHERE)


@pytest.fixture(scope="module")
def as_it_is():
    """What a list of flags gives, computed once."""
    known = {}

    def get(arguments):
        if tuple(arguments) not in known:
            known[tuple(arguments)] = everything(arguments)
        return known[tuple(arguments)]

    return get


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_changes_what_is_made(name, as_it_is):
    arguments, value = FLAGS[name]
    if "--steps" not in arguments:
        other = {"steps_stage1": "--steps-stage2", "steps_stage2": "--steps-stage1"}[name]
        arguments = arguments + [other, "4"]
        before = as_it_is(arguments + [train.flag(name), "4"])
    else:
        before = as_it_is(arguments)
    changed = [train.flag(name), value]
    if value is None:                        # a switch: the other way round than it is
        args, settings = train.parse(arguments)
        on = getattr(settings, name)
        changed = [train.flag(name).replace("--", "--no-") if on else train.flag(name)]
    after = everything(arguments + changed)
    assert after.shape != before.shape or not torch.equal(after, before)


def test_the_same_flags_give_the_same_numbers(as_it_is):
    assert torch.equal(as_it_is(RIGID), everything(RIGID))


# ---- Settings ------------------------------------------------------------------------------------

# The paper's Tab. 5, column by column.
TABLE_5 = {
    "paper-tables": dict(n_objects=1676, n_views=91, decoder_depth=2, foreground_weight=10.0,
                         volume_side=128, unet_channels=128, unet_depth=2, rows=256, codebooks=256),
    "paper-chairs": dict(n_objects=15576, n_views=200, decoder_depth=4, foreground_weight=10.0,
                         volume_side=64, unet_channels=128, unet_depth=2, codebooks=0),
    "paper-celebv": dict(n_objects=44400, n_views=373, decoder_depth=2, foreground_weight=10.0,
                         volume_side=64, unet_channels=192, unet_depth=3, rows=8192, codebooks=256,
                         parts=10, keypoints=125, transformer_depth=1, clip_filter=True),
    "paper-mvimgnet": dict(n_objects=206990, n_views=30, decoder_depth=4, foreground_weight=10.0,
                           volume_side=64, unet_channels=192, unet_depth=3, rows=32768,
                           codebooks=256, transformer_depth=1),
    "paper-objaverse": dict(n_objects=300000, n_views=6, decoder_depth=4, foreground_weight=0.0,
                            volume_side=64, unet_channels=192, unet_depth=3, rows=32768,
                            codebooks=256, transformer_depth=2)}
ALL_COLUMNS = dict(
    embed_dim=1024, channels=512, start_side=4, latent_side=8, decoder_attention=(8, 16),
    norm="batch", views_per_step=4, n_samples=128, lr_stage1=5e-4, betas=(0.5, 0.999),
    perceptual_weight=10.0, unet_multipliers=(3, 4), unet_attention=(8, 4), lr_stage2=4.5e-4,
    sigma_data=0.5, normalization="robust", per_channel=False, sample_steps=64, guidance=3.0,
    context_dim=1024, finer_at=(), window=0)


@pytest.mark.parametrize("preset", TABLE_5)
def test_presets_hold_every_number_of_table_5(preset):
    settings = train.AllSettings(**train.PRESETS[preset])
    for name, value in (ALL_COLUMNS | TABLE_5[preset]).items():
        assert getattr(settings, name) == value, name
    assert settings.text == (preset in ("paper-celebv", "paper-mvimgnet", "paper-objaverse"))
    assert (settings.parts > 0) == (preset == "paper-celebv")


@pytest.mark.parametrize("preset", train.PRESETS)
def test_presets_build_with_the_shapes_of_table_5(preset):
    settings = train.AllSettings(**train.PRESETS[preset])
    vocabulary = ["word"] if settings.text else []
    with torch.device("meta"):
        decoder = train.autodecoder.build_decoder(settings, settings.n_objects)
        denoiser = diffusion.build_denoiser(settings, decoder.latent_shape, vocabulary)
        latent = decoder.decode_latent(torch.zeros(2, settings.embed_dim))
        volume = decoder.decode_volume(latent)
        text = denoiser.text(["", ""]) if settings.text else ()
        x = denoiser(latent, torch.ones(2), *text)
    assert x.shape == latent.shape and volume.shape[2:] == (settings.volume_side,) * 3
    if preset.startswith("paper"):
        side = 128 if preset == "paper-tables" else 64
        channels = 14 if preset == "paper-celebv" else 4
        assert latent.shape[1:] == (256, 8, 8, 8) and volume.shape == (2, channels) + (side,) * 3
    elif preset != "micro":
        assert volume.shape[-1] == 8 * latent.shape[-1]


def test_the_preset_follows_from_the_data_and_the_flags_from_the_preset(tmp_path):
    iio.imwrite(tmp_path / "a.gif", np.zeros((3, 8, 8, 3), np.uint8))
    for arguments, preset in [([], "tiny"), (["--cameras", "learned"], "tiny-video"),
                              (["--data", "puppets"], "tiny-video"),
                              (["--data", str(tmp_path)], "tiny-clips"),
                              (["--data", str(tmp_path), "--preset", "tiny-video"], "tiny-video")]:
        args, settings = train.parse([*arguments, "--seed", "7"])
        expected = train.AllSettings(**train.PRESETS[preset] | {"seed": 7})
        assert args.preset == preset and settings == expected
        assert args.out == Path(f"runs/{preset}-{Path(args.data).resolve().name}")


@pytest.mark.parametrize("arguments, says", [
    ("--latent-side 0", "--latent-side"), ("--volume-side 2", "volume_side 2"),
    ("--holdout 1", "--holdout 1"), ("--seed -1", "--seed"), ("--codebooks -4", "--codebooks"),
    ("--churn -5", "--churn"), ("--text --guidance nan", "--guidance"), ("--betas 0.5", "--betas"),
    ("--betas 0.5,1.5", "--betas"), ("--lr-stage2 inf", "--lr-stage2"),
    ("--cameras learned --growth 0.1", "--growth"),
    ("--cameras learned --growth 0.5,0.2", "begins at 0.5 of the run cannot end at 0.2"),
    ("--data puppets --detail 0.1,0.2,0.4,0.3", "--detail: what begins at 0.4"),
    ("--unet-channels 33", "do not fit"),
    ("--unet-multipliers 1.5,1", "whole numbers"), ("--unet-multipliers 0", "--unet-multipliers"),
    ("--text --context-dim 66", "do not fit"), ("--cameras learned --pose-width 0", "--pose-width"),
    ("--channels 400 --decoder-attention 8", "200 channels"),
    ("--decoder-attention 4", "sides 8, 16"), ("--finer-at 0.1,0.2,0.3", "4 pixels"),
    ("--window 3", "4 pixels"), ("--latent-side 5", "latent_side 5"),
    ("--unet-multipliers 1,1,1,1", "halved 3 times"),
    ("--data puppets --detail 0.3", "pairs of shares")])
def test_settings_that_cannot_work_are_refused_before_anything_is_read(arguments, says):
    flags = DATA + DECODER + DENOISER
    with pytest.raises(data.BadInput, match=says):
        train.parse([*flags, *arguments.split()])


@pytest.mark.parametrize("arguments, says", [
    ("--stage 1 --batch-size 4", "--batch-size is of stage 2"),
    ("--stage 1 --text", "--text is of stage 2"), ("--t5 folder", "--t5 goes with --text"),
    ("--guidance 2", "--guidance goes with --text"),
    ("--text --t5 folder --context-dim 8", "--context-dim is the width of our own"),
    ("--rows 8", "--rows goes with --codebooks"), ("--hash-rule paper", "goes with --codebooks"),
    ("--data puppets --arc 30", "--arc is for the built-in objects"),
    ("--no-shared-colours", "goes with --data puppets"),
    ("--clip-filter", "is for a folder of clips"), ("--data . --n-objects 4", "of a folder all"),
    ("--lr-pose 1", "here cameras are known"), ("--parts 6", "here cameras are known"),
    ("--cameras learned --parts 6", "rigid objects have one part"),
    ("--cameras learned --parts 1 --split-at 0.5", "needs --parts"),
    ("--steps 4 --steps-stage1 8", "leave out --steps-stage1"),
    ("--decoder runs/a", "--decoder goes with --stage 2"), ("--focal 2", "--focal"),
    ("--space volume", "--space"), ("--stpes 3", "--steps"), ("--preset huge", "huge")])
def test_flags_that_do_not_go_together_are_refused_by_name(arguments, says):
    with pytest.raises(data.BadInput, match=says):
        train.parse(arguments.split())


# ---- Stage 1's loop ------------------------------------------------------------------------------
def settings_of(**values):
    base = dict(size=16, n_objects=3, n_views=6, volume_side=16, embed_dim=8, channels=32,
                n_samples=8, finer_at=(), window=0, steps_stage1=4, steps_stage2=4)
    return train.AllSettings(**train.PRESETS["micro"] | base | values)


def test_coarse_to_fine_ends_at_full_size():
    settings = train.AllSettings(size=64, finer_at=(0.4, 0.85), steps_stage1=100)
    sizes = [train.picture_size(settings, step) for step in (0, 39, 40, 84, 85, 99)]
    assert sizes == [16, 16, 32, 32, 64, 64]
    assert train.picture_size(train.AllSettings(size=64), 0) == 64


def test_draw_frames_never_shows_a_heldout_view_and_covers_the_others():
    dataset = data.load("synthetic", 16, 3, n_objects=2, n_views=6)
    generator = torch.Generator().manual_seed(0)
    k = torch.tensor([0, 1])
    drawn = torch.stack([train.draw_frames(dataset, k, 4, generator) for _ in range(20)])
    assert not dataset.heldout[drawn].any()
    assert set(drawn.flatten().tolist()) == set(torch.nonzero(~dataset.heldout)[:, 0].tolist())
    assert (dataset.object_index[drawn] == k[:, None]).all()
    assert all(len(set(row.tolist())) == 4 for row in drawn.flatten(0, 1))   # four different ones
    many = train.draw_frames(dataset, k, 9, generator)           # more than the four there are
    assert many.shape == (2, 9)


def test_the_seed_decides_what_is_drawn_in_either_stage():
    for seed in (0, 7):
        settings = settings_of(seed=seed)
        one = train.start_stage1(settings, torch.nn.Linear(1, 1))
        two = train.start_stage2(settings, torch.randn(2, 2, 2, 2, 2), torch.nn.Linear(1, 1))
        for state, name in ((one, "stage 1"), (two, "stage 2")):
            expected = torch.rand(3, generator=sample.stream(seed, name))
            assert torch.equal(torch.rand(3, generator=state.generator), expected)


def test_all_objects_have_their_turn_before_one_comes_again():
    dataset = data.load("synthetic", 16, 3, n_objects=6, n_views=3)
    settings = settings_of(objects_per_step=2)
    state = train.start_stage1(settings, torch.nn.Linear(1, 1))
    for _ in range(3):
        turns = torch.cat([train.next_objects(settings, dataset, state) for _ in range(3)])
        assert sorted(turns.tolist()) == [0, 1, 2, 3, 4, 5]


def test_a_window_is_a_camera_with_other_intrinsics():
    # Rendering the window gives the pixels of the whole picture, cut out at the same place.
    volume = torch.rand(2, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    cameras = render.orbit(torch.arange(6.).reshape(2, 3), torch.tensor(0.4), 4.0)
    intrinsics = torch.tensor([1.4, 1.5, 0.5, 0.45]).expand(2, 3, 4)
    images, masks = render.render(volume, cameras, intrinsics, 32, 16)
    rgb, occupancy, cut = train.random_windows(images, masks, intrinsics, 12,
                                               torch.Generator().manual_seed(1))
    expected = render.render(volume, cameras, cut, 12, 16)
    torch.testing.assert_close(rgb, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(occupancy, expected[1], rtol=0, atol=1e-5)
    assert rgb.std() > 0.05


def test_a_step_sees_photos_of_the_right_size_through_the_right_intrinsics():
    dataset = data.load("synthetic", 32, 6, n_objects=2, n_views=6)
    settings = settings_of(size=32, finer_at=(0.5,), window=8, steps_stage1=10)
    state = train.start_stage1(settings, torch.nn.Linear(1, 1))
    frames = torch.tensor([[0, 1], [7, 8]])
    window, _, intrinsics = train.draw_coarse_to_fine(settings, dataset, frames, state)
    whole, _ = dataset.batch(frames, 16)                         # coarse in the first half
    assert window.shape == (2, 2, 3, 8, 8)
    torch.testing.assert_close(intrinsics[..., :2], 2 * dataset.intrinsics[frames][..., :2])
    for b in range(2):
        for v in range(2):
            # Where the centre moved to tells the corner: cx = (16 cx_whole - corner) / 8.
            corner = 16 * dataset.intrinsics[frames[b, v], 2:] - 8 * intrinsics[b, v, 2:]
            x, y = corner.round().int().tolist()
            assert torch.equal(window[b, v], whole[b, v, :, y:y + 8, x:x + 8])
    state.step = 5
    settings = dataclasses.replace(settings, window=0)
    images, _, intrinsics = train.draw_coarse_to_fine(settings, dataset, frames, state)
    assert torch.equal(images, dataset.batch(frames, 32)[0])
    assert torch.equal(intrinsics, dataset.intrinsics[frames])


def test_learning_rates_fall_linearly_to_nothing_in_both_stages():
    settings = settings_of(lr_stage1=0.4, lr_stage2=0.2, steps_stage1=4, steps_stage2=5)
    dataset = data.load_for(settings, "synthetic")
    state = train.new_stage1(settings, dataset, "cpu")
    rates = []
    for _ in train.train_stage1(settings, dataset, state):
        rates.append(state.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])
    latents = torch.randn(3, *state.autodecoder.latent_shape)
    denoiser = diffusion.Denoiser.from_settings(settings, state.autodecoder.latent_shape)
    state = train.start_stage2(settings, latents, denoiser)
    rates = []
    for _ in train.train_stage2(settings, state):
        rates.append(state.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.2, 0.16, 0.12, 0.08, 0.04])


def test_sheets_come_early_and_with_every_checkpoint(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(sample, "save_training_sheet",
                        lambda path, state, dataset: drawn.append(state.step))
    monkeypatch.setattr(train, "plot_log", lambda *_: None)
    monkeypatch.setattr(sample, "save_orbit", lambda *_: None)
    flags = ("--stage", "1", "--log-every", "4", "--save-every", "20")
    run(*flags, "--steps", "24", out=tmp_path)
    assert drawn == [4, 8, 16, 20, 24]
    drawn.clear()
    run(*flags, "--steps", "26", out=tmp_path, resume=True)
    assert drawn == [26]


def test_the_loss_of_stage_1_is_eq_1_and_eq_2_weighted():
    rgb, occupancy = torch.full((1, 1, 3, 8, 8), 0.5), torch.full((1, 1, 1, 8, 8), 0.75)
    images, masks = torch.full((1, 1, 3, 8, 8), 0.25), torch.ones(1, 1, 1, 8, 8)
    settings = train.Settings(perceptual_weight=2.0, foreground_weight=8.0)
    loss = train.stage1_loss(settings, lambda image: [image], rgb, occupancy, images, masks)
    assert loss.item() == pytest.approx(2 * 3 * 0.25 + 8 * 0.25)          # three pyramid levels


def test_objects_are_looked_at_from_where_a_typical_training_camera_stood():
    elevation = torch.tensor([0.2, 0.3, 0.5])
    cameras = render.orbit(torch.tensor([0.0, 2.0, 4.0]), elevation, torch.tensor([2.0, 4.0, 9.0]))
    view = train.turntable_view(argparse.Namespace(cam2world=cameras))
    assert view == {"distance": pytest.approx(4.0), "elevation": pytest.approx(0.3)}
    # Never from within the object, nor from under its floor.
    near = argparse.Namespace(cam2world=render.orbit(torch.zeros(3), -elevation, 1.0))
    assert train.turntable_view(near) == {"distance": 1.8, "elevation": pytest.approx(0.1)}


def test_a_run_compares_what_it_is_told_to_and_skips_what_is_empty(tmp_path, monkeypatch):
    seen = []

    def loop(settings, dataset, state, features, draw, renderer):
        seen.extend([features, draw, renderer])
        state.step = settings.steps_stage1
        yield 1.0, 1.0

    monkeypatch.setattr(train, "train_stage1", loop)
    run("--stage", "1", "--steps", "1", "--perceptual", "pixels", out=tmp_path)
    assert seen == [train.autodecoder.pixels, train.draw_coarse_to_fine, render.render_skipping]


@pytest.mark.slow
def test_one_object_overfits_to_over_30_db(tmp_path):
    run("--stage", "1", "--n-objects", "1", "--n-views", "12", "--size", "32", "--volume-side",
        "32", "--objects-per-step", "1", "--n-samples", "48", "--steps", "300", "--lr-stage1",
        "0.005", "--log-every", "50", "--save-every", "300", "--holdout", "0", out=tmp_path)
    trained = sample.open_run(tmp_path, stages=(1,))
    dataset = data.load("synthetic", 32, 0, n_objects=1, n_views=12)
    dataset.heldout[:] = True                            # score the views that it was trained on
    assert sample.score_heldout(trained, dataset)["psnr_heldout"] > 30


# ---- Stage 2's loop ------------------------------------------------------------------------------
@pytest.mark.parametrize("sigma_data, P_mean, P_std", [(0.5, -1.2, 1.2), (1.5, 0.3, 0.8)])
def test_the_first_loss_of_stage_2_is_that_of_c_skip_x_on_normalized_latents(
        sigma_data, P_mean, P_std):
    """A new denoiser answers c_skip x, so its loss is known: raw latents, another sigma_data, other
    noise levels or another batch give another number."""
    settings = settings_of(sigma_data=sigma_data, P_mean=P_mean, P_std=P_std, batch_size=8)
    latents = 30 + 7 * torch.randn(5, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    denoiser = diffusion.Denoiser.from_settings(settings, (4, 4, 4, 4))
    state = train.start_stage2(settings, latents, denoiser)
    first = next(train.train_stage2(settings, state))

    ordered = latents.flatten().double().numpy()
    q25, median, q75 = np.quantile(ordered, [0.25, 0.5, 0.75])
    clean = ((latents - median) / (0.7413 * (q75 - q25))).double()
    generator = sample.stream(settings.seed, "stage 2")
    k = torch.randint(5, (8,), generator=generator)
    sigma = (P_mean + P_std * torch.randn(8, generator=generator)).exp()
    sigma = sigma.double().view(8, 1, 1, 1, 1)
    noisy = clean[k] + sigma * torch.randn(8, 4, 4, 4, 4, generator=generator)
    guess = sigma_data**2 / (sigma**2 + sigma_data**2) * noisy
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data)**2
    expected = (weight * (guess - clean[k])**2).mean()
    assert first == pytest.approx(expected.item(), rel=1e-4)


class FewLayers(diffusion.Denoiser):
    """A denoiser of latents (2, 2, 2, 2) with three matrices in place of the U-Net: it is fast."""

    def __init__(self, sigma_data):
        super().__init__((2, 2, 2, 2), 8, (1,), 1, (), sigma_data)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(17, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(),
            torch.nn.Linear(64, 16))
        self.unet.forward = self.answer

    def answer(self, x, c_noise):
        return self.layers(torch.cat([x.flatten(1), c_noise[:, None]], 1)).view_as(x)


def test_stage_2_learns_a_set_of_two_latents_and_samples_are_these_two():
    """Far from unit scale, so that it takes the normalization and its undoing to find them, and the
    average's weights, which start as the untrained ones."""
    settings = settings_of(steps_stage2=400, batch_size=64, lr_stage2=5e-3, ema_half_life=20.0)
    pattern = torch.randn(2, 2, 2, 2, generator=torch.Generator().manual_seed(0)).sign()
    latents = torch.stack([50 + 20 * pattern, 50 - 20 * pattern])
    torch.manual_seed(0)
    state = train.start_stage2(settings, latents, FewLayers(settings.sigma_data))
    losses = list(train.train_stage2(settings, state))
    noise = torch.randn(32, 2, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    latent_hat = diffusion.edm_sampler(state.average, noise, 16, S_churn=0)
    drawn = state.normalizer.denormalize(latent_hat.float())
    apart = torch.cdist(drawn.flatten(1), latents.flatten(1)) / 4            # root mean square
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])
    assert apart.amin(1).median() < 6 and apart.amin(1).max() < 12           # of 40 between the two
    share = (apart.argmin(1) == 0).float().mean()
    assert 0.2 < share < 0.8


class Listener(FewLayers):
    """Hears text, and does not heed it."""

    def forward(self, x, sigma, *text):
        assert text in ((), ("tokens", "mask"))
        return super().forward(x, sigma)


def few_steps(loop, latents, settings):
    """The losses of a loop of stage 2, and its state afterwards."""
    torch.manual_seed(0)
    state = train.start_stage2(settings, latents, Listener(settings.sigma_data))
    return list(loop(settings, state)), state


def test_with_text_the_loop_of_stage_2_is_the_same_but_for_what_the_denoiser_hears(monkeypatch):
    monkeypatch.setattr(train, "caption_tokens", lambda state, k: ("tokens", "mask"))
    settings = settings_of(sigma_data=0.7, P_mean=0.5, P_std=0.9, lr_stage2=0.01,
                           ema_half_life=0.3, steps_stage2=5)
    latents = 3 + 2 * torch.randn(5, 2, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    losses, plain = few_steps(train.train_stage2, latents, settings)
    with_text, listened = few_steps(train.train_text, latents, settings)
    assert losses == with_text
    assert same(plain.average.state_dict(), listened.average.state_dict())


def test_the_checkpoint_of_stage_2_has_the_averaged_weights_and_what_undoes_the_normalization():
    settings = settings_of(latent_scale=0.5, lr_stage2=0.01)
    latents = 3 + 2 * torch.randn(5, 2, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    _, state = few_steps(train.train_stage2, latents, settings)
    checkpoint = train.stage2_checkpoint(settings, state)
    assert same(checkpoint["ema"], state.average.state_dict())
    assert not same(checkpoint["ema"], state.model.state_dict())
    undone = state.latents / 0.5 * checkpoint["s"] + checkpoint["m"]
    torch.testing.assert_close(undone, latents)


def test_captions_stand_in_the_order_of_the_objects_and_their_encoder_learns():
    settings = settings_of(text=True, context_dim=16)
    first = {"captions": ["b red", None, "a"], "fingerprint": "f"}
    _, state = train.new_stage2(settings, torch.randn(3, 16, 4, 4, 4), first, None, "cpu")
    assert state.captions == ["b red", "", "a"] and state.vocabulary == ["a", "b", "red"]
    assert state.encode is state.model.text and state.decoder == "f"


def test_stage_2_has_the_settings_of_the_stage_1_that_it_learns_from():
    theirs = settings_of(n_views=9, holdout=3, channels=64, betas=(0.1, 0.2), focal=2.0, clip=3.0)
    first = {"settings": vars(theirs), "names": ["a", "b"]}
    settings = train.settings_of_stage2(settings_of(batch_size=3, seed=8), first)
    of_stage1 = train.fields_of("data", "decoder", "stage 1", "moving", None)
    assert len(of_stage1) > 30
    for name in of_stage1:
        assert getattr(settings, name) == getattr(theirs, name), name
    assert settings.batch_size == 3 and settings.seed == 8


@pytest.mark.parametrize("flags", ["--max-frames 7", "--rows 8", "--keypoints 64", "--parts 3",
                                   "--no-shared-colours", "--arc 20", "--clip-filter"])
def test_flags_of_stage_1_are_compared_with_the_stage_1_that_is_there(flags):
    args, settings = train.parse(["--stage", "2", *DATA, *DECODER, *flags.split()])
    name = next(name for name in args.given if train.flag(name) in flags.replace("--no-", "--"))
    first = {"settings": vars(settings_of()), "names": ["a", "b"]}
    with pytest.raises(data.BadInput, match="the stage 1 there was trained with"):
        train.settings_of_stage2(settings, first, {name})
    first["settings"][name] = getattr(settings, name)        # as there: nothing to say
    train.settings_of_stage2(settings, first, {name})


def test_a_tenth_of_the_captions_is_left_out_and_the_rest_are_the_objects_own():
    heard = []
    state = argparse.Namespace(captions=["zero", "one", "two"], encode=heard.extend,
                               generator=torch.Generator().manual_seed(0))
    k = torch.randint(3, (3000,), generator=torch.Generator().manual_seed(1))
    train.caption_tokens(state, k)
    dropped = sum(caption == "" for caption in heard)
    assert dropped / 3000 == pytest.approx(0.1, abs=0.02)
    names = ["zero", "one", "two"]
    assert all(caption in ("", names[i]) for caption, i in zip(heard, k.tolist()))


# ---- A whole run ---------------------------------------------------------------------------------
def test_whole_pipeline_writes_what_it_names_and_finite_metrics(tmp_path, capsys, monkeypatch):
    renamed = {"lock"}
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (renamed.add(Path(b).name), replace(a, b)))
    run("--steps", "6", "--n-sheet", "2", out=tmp_path / "run")
    # Each file was written whole under another name first: see data.writing.
    assert renamed == {path.name for path in tmp_path.rglob("*") if path.is_file()}
    named = capsys.readouterr().out.splitlines()[-1].removeprefix("look at ").split(", ")
    assert len(named) >= 7 and all(Path(path).stat().st_size > 100 for path in named)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for key in ("psnr_heldout", "mask_heldout", "seconds_stage1", "seconds_stage2",
                "seconds_sampling", "seconds_total"):
        assert math.isfinite(metrics[key]) and metrics[key] > 0, key
    assert metrics["settings"]["n_objects"] == 4
    rows = log_rows(tmp_path / "run")
    assert [row[:2] for row in rows[1:]] == [[stage, step] for stage in "12" for step in "246"]
    # Another stage 2: scores of what the first one made are no longer true of the run.
    train.add_metrics(tmp_path / "run", train.Settings(), fd=1.0, text_colour=1.0)
    run("--stage", "2", "--steps", "2", out=tmp_path / "run")
    again = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert again["psnr_heldout"] == metrics["psnr_heldout"] and again["steps_stage2"] == 2
    assert not {"fd", "text_colour", "seconds_sampling"} & set(again)
    # Going on with a run that is finished changes nothing that they tell of.
    train.add_metrics(tmp_path / "run", train.Settings(), fd=1.0)
    run("--steps", "2", "--resume", out=tmp_path / "run")
    assert train.read_metrics(tmp_path / "run")["fd"] == 1.0


def test_the_first_sheet_has_as_many_objects_as_asked_for_over_their_nearest_ones(copied,
                                                                                 monkeypatch):
    seen = {}

    def watched(trained, folder, n, steps, seed, churn, nearest):
        seen.update(n=n, steps=steps, seed=seed, churn=churn, nearest=nearest)
        return None, []

    monkeypatch.setattr(sample, "save_any_samples", watched)
    monkeypatch.setattr(sample, "save_noise_strip",
                        lambda path, trained, steps: seen.update(of_strip=steps))
    settings = settings_of(n_sheet=3, sample_steps=5, churn=7.0)
    run("--stage", "2", "--steps", "2", "--seed", "4", out=copied)
    train.first_sampling(dataclasses.replace(settings, seed=4), copied, "cpu")
    assert seen == dict(n=3, steps=5, seed=4, churn=7.0, nearest=True, of_strip=5)


def test_main_hands_the_flags_on_to_both_stages_and_to_the_first_sampling(tmp_path, monkeypatch):
    seen = []

    def stage1(settings, dataset, folder, device, source, resume):
        seen.append((settings.seed, dataset.n_objects, folder, device, source, resume))

    def stage2(settings, folder, device, resume, given, decoder=None):
        seen.append((settings.seed, folder, device, resume, given))

    def sampling(settings, folder, device):
        seen.append((settings.seed, folder, device))
        return []

    monkeypatch.setattr(train, "run_stage1", stage1)
    monkeypatch.setattr(train, "run_stage2", stage2)
    monkeypatch.setattr(train, "first_sampling", sampling)
    monkeypatch.setattr(sample, "choose_device", lambda name: f"the {name}")
    monkeypatch.setattr(train, "look_ahead", lambda args, settings, device: "synthetic")
    run("--device", "gpu", "--seed", "7", out=tmp_path, resume=True)
    assert seen == [(7, 4, tmp_path, "the gpu", "synthetic", True),
                    (7, tmp_path, "the gpu", True, ()), (7, tmp_path, "the gpu")]
    seen.clear()
    run("--stage", "2", "--batch-size", "2", out=tmp_path)
    (_, _, _, resume, given), = seen
    assert not resume and {"batch_size", "channels"} <= given


def test_both_readings_train_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FAMILIES", (data.make_chair,))    # all that the first reading has
    monkeypatch.setattr(train, "first_sampling", lambda *_: [])
    flags = "--steps", "3", "--window", "0", "--seed", "3", "--holdout", "2"
    run(*flags, out=tmp_path / "below")
    _, settings = train.parse([*DATA, *DECODER, *DENOISER, *flags])
    train.learn(settings, tmp_path / "above")
    for stage, keys in ((1, ("model",)), (2, ("ema",))):
        above = torch.load(tmp_path / "above" / f"stage{stage}.pt", weights_only=True)
        below = sample.load_checkpoint(tmp_path / "below", stage)
        for key in keys:
            assert same(above[key], below[key]), key
        assert above["step"] == below["step"] == 3
        for key in {"names", "m", "s"} & above.keys():
            assert above[key] == below[key], key


def test_a_line_of_the_log_has_the_means_since_the_last_line(tmp_path):
    log = train.Log(tmp_path, 1, 0, 5, 2)
    for step, loss, error in ((1, 1.0, 0.1), (2, 3.0, 0.3), (3, 5.0, 0.01), (4, 7.0, 0.01),
                              (5, 9.0, 1.0)):
        log.add(step, loss, error)
    rows = log_rows(tmp_path)[1:]
    assert [row[:3] for row in rows] == [["1", "2", "2"], ["1", "4", "6"], ["1", "5", "9"]]
    assert [float(row[3]) for row in rows] == pytest.approx([6.990, 20.0, 0.0], abs=1e-3)


@pytest.mark.usefixtures("no_pictures")
def test_scores_go_with_the_stage_1_that_they_were_measured_on(copied):
    train.add_metrics(copied, train.Settings(), fd=1.0, text_colour=1.0)
    run("--stage", "1", "--steps", "6", out=copied, resume=True)
    metrics = train.read_metrics(copied)
    assert not {"fd", "text_colour"} & set(metrics) and metrics["steps_stage1"] == 6
    train.add_metrics(copied, train.Settings(), steps_stage2=7)
    run("--stage", "1", "--steps", "2", out=copied)              # another one, from the beginning
    assert "steps_stage2" not in train.read_metrics(copied)


def test_black_pictures_score_as_their_error_says():
    dataset = data.load("synthetic", 16, 6, n_objects=2, n_views=6)
    black = torch.nn.Module()
    black.forward = lambda k: torch.zeros(len(k), 4, 4, 4, 4)
    truth, masks = dataset.batch(torch.nonzero(dataset.heldout)[:, 0], 16)
    expected = (-10 * torch.log10(truth.square().flatten(1).mean(1))).mean()
    state = argparse.Namespace(autodecoder=black, posenet=None, device="cpu")
    scores = sample.score_heldout(state, dataset)
    assert scores["psnr_heldout"] == pytest.approx(float(expected), abs=1e-3)
    assert scores["mask_heldout"] == pytest.approx(float(masks.mean()), abs=1e-3)
    dataset.heldout[:] = False
    assert sample.score_heldout(state, dataset) == {}


# ---- Resuming ------------------------------------------------------------------------------------
@pytest.mark.usefixtures("no_pictures")
def test_resumed_run_has_the_bits_of_one_that_was_never_stopped(tmp_path, monkeypatch):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for stage, key in ((1, "model"), (2, "ema")):
        # Lines of the log end at 3, 6 and 8: the checkpoint at 4 is in the middle of one.
        flags = ("--stage", str(stage), "--steps", "8", "--log-every", "3")
        run(*flags, out=whole)
        with monkeypatch.context() as patch:
            interrupt_at(patch, 5)
            with pytest.raises(KeyboardInterrupt):
                run(*flags, out=halves)
        assert sample.load_checkpoint(halves, stage)["step"] == 4
        run(*flags, out=halves, resume=True)
        assert same(weights(whole, stage, key), weights(halves, stage, key))
        assert log_rows(whole) == log_rows(halves) and len(log_rows(whole)) == 1 + 3 * stage


@pytest.mark.usefixtures("no_pictures")
def test_resuming_goes_on_in_the_middle_of_a_round_of_objects(tmp_path, monkeypatch):
    flags = "--stage", "1", "--steps", "8", "--n-objects", "6", "--objects-per-step", "2"
    run(*flags, "--save-every", "5", out=tmp_path / "whole")         # rounds have 3 steps
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            run(*flags, "--save-every", "5", out=tmp_path / "halves")
    assert len(sample.load_checkpoint(tmp_path / "halves", 1)["order"]) == 2
    run(*flags, "--save-every", "5", out=tmp_path / "halves", resume=True)
    assert same(weights(tmp_path / "whole", 1), weights(tmp_path / "halves", 1))


@pytest.mark.slow
def test_both_stages_resumed_at_once_keep_the_whole_log(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "first_sampling", lambda *_: [])
    run("--steps", "8", out=tmp_path / "whole")
    run("--stage", "1", "--steps", "8", out=tmp_path / "halves")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            run("--stage", "2", "--steps", "8", out=tmp_path / "halves")
    run("--steps", "8", out=tmp_path / "halves", resume=True)
    rows = log_rows(tmp_path / "whole")
    assert rows == log_rows(tmp_path / "halves") and len(rows) == 9


@pytest.mark.slow
def test_same_seed_same_numbers_and_another_seed_others(stage1, tmp_path):
    for seed in ("0", "2"):
        run("--stage", "1", "--steps", "4", "--seed", seed, out=tmp_path / seed)
    assert same(weights(stage1, 1), weights(tmp_path / "0", 1))
    assert not same(weights(stage1, 1), weights(tmp_path / "2", 1))


def test_resuming_with_other_settings_names_the_flag(copied):
    with pytest.raises(data.BadInput, match="--lr-stage1 is 0.1 here but"):
        run("--stage", "1", "--steps", "4", "--lr-stage1", "0.1", out=copied, resume=True)
    with pytest.raises(data.BadInput, match="--seed is 5 here but 0"):        # other objects
        run("--stage", "1", "--steps", "8", "--seed", "5", out=copied, resume=True)
    with pytest.raises(data.BadInput, match="--channels 64: the stage 1 there was trained with 32"):
        run("--stage", "2", "--channels", "64", out=copied)
    with pytest.raises(data.BadInput, match="do not fit"):                    # of this stage 1
        run("--stage", "2", "--unet-multipliers", "1,1,1,1", out=copied)


def another(value):
    """Some other value of a setting's type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return "another" if isinstance(value, str) else (*value, 9)


@pytest.mark.parametrize("stage", [1, 2])
def test_every_setting_that_made_a_checkpoint_must_be_the_same_to_go_on(stage):
    groups = ("data", "decoder", "stage 1", "moving", None) if stage == 1 else ("stage 2", "text")
    names = [name for name in train.fields_of(*groups) if not name.startswith("steps_")]
    settings = settings_of()
    for name in names + ["seed"]:
        theirs = vars(settings) | {name: another(getattr(settings, name))}
        with pytest.raises(data.BadInput, match=f"{train.flag(name)} is"):
            if stage == 1:
                train.resume_stage1(settings, None, None, "x", {"settings": theirs}, "")
            else:
                train.resume_stage2(settings, None, "x", {"settings": theirs})


def test_resuming_brings_back_both_sources_of_random_numbers():
    state = argparse.Namespace(generator=torch.Generator().manual_seed(3), seconds=0.0,
                               optimizer=torch.optim.Adam([torch.zeros(1)]),
                               log=argparse.Namespace(means=dict))
    kept = train.for_resuming(state)["random"]
    before = torch.rand(1, generator=state.generator), torch.rand(1)
    train.restore_randomness(state, kept)
    assert before == (torch.rand(1, generator=state.generator), torch.rand(1))


@pytest.mark.usefixtures("no_pictures")
def test_training_anew_keeps_the_earlier_checkpoint(copied):
    before = weights(copied, 1)["linear.weight"]
    run("--stage", "1", "--steps", "2", "--seed", "5", out=copied)
    old = torch.load(copied / "stage1.old1.pt", weights_only=True)["model"]["linear.weight"]
    assert torch.equal(old, before)


@pytest.mark.slow
def test_checkpoints_from_before_a_flag_existed_had_its_default(tmp_path):
    run(*PUPPETS, "--stage", "1", "--steps", "2", out=tmp_path)
    checkpoint = sample.load_checkpoint(tmp_path, 1)
    del checkpoint["settings"]["settle_at"]
    train.save(tmp_path / "stage1.pt", checkpoint)
    run(*PUPPETS, "--stage", "1", "--steps", "4", out=tmp_path, resume=True)
    assert sample.load_checkpoint(tmp_path, 1)["step"] == 4


@pytest.mark.usefixtures("no_pictures")
def test_stage_2_of_another_stage_1_is_refused(copied):
    run("--stage", "2", "--steps", "2", out=copied)
    run("--stage", "1", "--steps", "2", "--seed", "5", out=copied)
    assert not (copied / "stage2.pt").exists()                   # it went with its stage 1
    shutil.copy(copied / "stage2.old1.pt", copied / "stage2.pt")
    with pytest.raises(data.BadInput, match="another stage 1"):
        sample.open_run(copied)
    with pytest.raises(data.BadInput, match="another stage 1; run without --resume"):
        run("--stage", "2", "--steps", "4", out=copied, resume=True)


@pytest.mark.slow
def test_stage_2_on_the_stage_1_of_another_run(stage1, tmp_path):
    run("--stage", "2", "--steps", "2", "--decoder", str(stage1), out=tmp_path / "b")
    assert not (stage1 / "stage2.pt").exists()
    assert same(weights(stage1, 1), weights(tmp_path / "b", 1))
    run("--stage", "1", "--steps", "3", out=tmp_path / "c")              # has its own stage 1
    ours = sample.load_checkpoint(tmp_path / "c", 1)["fingerprint"]
    with pytest.raises(data.BadInput, match="--resume"):
        run("--stage", "2", "--decoder", str(stage1), out=tmp_path / "c", resume=True)
    assert sample.load_checkpoint(tmp_path / "c", 1)["fingerprint"] == ours
    for resume in (False, True):
        run("--stage", "2", "--steps", "2", "--decoder", str(stage1), out=tmp_path / "c",
            resume=resume)
        kept = torch.load(tmp_path / "c" / "stage1.old1.pt", weights_only=True)
        assert kept["fingerprint"] == ours
    assert "psnr_heldout" not in json.loads((tmp_path / "c" / "metrics.json").read_text())


@pytest.mark.usefixtures("no_pictures")
def test_stage_2_of_another_seed_is_compared_with_the_objects_it_learned_from(tmp_path):
    run("--stage", "1", "--steps", "2", "--seed", "3", out=tmp_path)
    run("--stage", "2", "--steps", "2", "--seed", "4", out=tmp_path)
    trained = sample.open_run(tmp_path)
    assert trained.settings.seed == 4 and trained.data_settings.seed == 3
    dataset = data.load_for(trained.data_settings, trained.source)
    assert dataset.captions == trained.captions
    assert torch.equal(dataset.images, data.load("synthetic", 16, 6, 3, 4, 6).images)


# ---- Whole files, one run in a folder, nothing replaced ------------------------------------------
def names_in(folder):
    """Names of the files in a folder, without pictures and the lock."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".pt", ".csv", ".json"))


def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def torch_fails(*_):
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")


@pytest.mark.parametrize("fail, reason", [
    (no_room, "No space left on device"), (torch_fails, "unexpected pos")])
def test_a_file_is_written_whole_or_not_at_all(fail, reason, tmp_path, monkeypatch):
    path = tmp_path / "stage1.pt"
    path.write_text("good")
    with pytest.raises(data.BadInput, match=f"{path} cannot be written: .*{reason}"):
        with data.writing(path) as temporary:
            assert temporary.parent == tmp_path and temporary.suffix == ".pt"
            assert str(os.getpid()) in temporary.name
            temporary.write_text("half")
            fail()
    assert path.read_text() == "good" and names_in(tmp_path) == ["stage1.pt"]
    monkeypatch.setattr(os, "fsync", no_room)                    # as on some network disks
    with pytest.raises(data.BadInput, match="No space left"):
        train.save(path, {"stage": 1})
    assert path.read_text() == "good" and names_in(tmp_path) == ["stage1.pt"]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append("fsync"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    train.save(tmp_path / "a.pt", {"stage": 1})
    assert done == ["fsync", "replace"]


def test_fragments_go_with_the_process_that_wrote_them(tmp_path):
    ours, theirs = os.getpid(), os.getppid()
    kept = [f".stage1.{theirs}.tmp.pt", "stage1.tmp.pt", ".my.tmp.notes", "tmp.123.pt"]
    gone = [f".stage1.{ours}.tmp.pt", ".loss.4194999.tmp.png", f".lock.{10**30}.tmp"]
    for name in kept + gone:
        (tmp_path / name).write_text("x")
    data.make_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize("stage, step, kept", [
    (1, 0, 0), (1, 2, 1), (1, 3, 1), (1, 4, 2), (2, 0, 2), (2, 2, 3), (2, 4, 4)])
def test_rows_that_will_be_measured_again_are_dropped(tmp_path, stage, step, kept):
    """A run was killed after it had logged more than it had saved."""
    train.Log(tmp_path, 1, 0, 4, 2)
    rows = [[str(stage), str(step), "0.5", "20.0", "1"] for stage in (1, 2) for step in (2, 4)]
    with open(tmp_path / "log.csv", "a") as file:
        file.writelines(",".join(row) + "\n" for row in rows)
    assert train.read_rows(tmp_path / "log.csv") == rows
    assert train.earlier_rows(tmp_path / "log.csv", stage, step) == rows[:kept]


def test_no_earlier_row_is_lost_while_the_log_is_opened(tmp_path, monkeypatch):
    log = train.Log(tmp_path, 1, 0, 4, 2)
    for step in (1, 2, 3, 4):
        log.add(step, 1.0, 0.1)
    before = (tmp_path / "log.csv").read_text()
    monkeypatch.setattr(os, "replace", no_room)
    with pytest.raises(data.BadInput, match="log.csv cannot be written"):
        train.Log(tmp_path, 2, 0, 4, 2)
    assert (tmp_path / "log.csv").read_text() == before


@pytest.mark.parametrize("damage", ["1,4,0.5,20.0,8", "x,y\r\n", "\0\xff\r\n", "1,6,nan\r\n",
                                    "1,7,a,b,c\r\n", "1,8,0.1,,9,9\r\n", "," * 200_000])
def test_damaged_rows_of_the_log_are_left_out(tmp_path, damage):
    good = "stage,step,loss,psnr,ms_per_step\r\n1,2,0.5,20.0,8.0\r\n"
    (tmp_path / "log.csv").write_bytes((good + damage).encode("latin-1"))
    train.Log(tmp_path, 2, 0, 4, 2)
    assert log_rows(tmp_path)[1:] == [["1", "2", "0.5", "20.0"]]
    train.plot_log(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"a": 1'])
def test_damaged_metrics_are_measured_again(tmp_path, content):
    (tmp_path / "metrics.json").write_bytes(content)
    train.add_metrics(tmp_path, train.Settings(), fd=1.0)
    assert train.read_metrics(tmp_path)["fd"] == 1.0
    (tmp_path / "metrics.json").write_text('{"seconds_stage1": "x", "seconds_data": 2}')
    train.add_metrics(tmp_path, train.Settings())
    assert train.read_metrics(tmp_path)["seconds_total"] == 2


def test_a_second_run_in_a_folder_is_refused_and_a_crash_leaves_no_lock(copied):
    before = names_in(copied)
    with train.alone_in(copied):
        with pytest.raises(data.BadInput, match=f"{copied} is in use by process {os.getpid()} on"):
            run("--stage", "1", "--steps", "2", out=copied)
        assert names_in(copied) == before
    (copied / "lock").write_text("process 1 on mars")            # of a crash: a file, but no lock
    with train.alone_in(copied):
        assert (copied / "lock").read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.usefixtures("no_pictures")
def test_what_is_trained_anew_moves_aside_under_numbers_that_belong_together(copied, capsys):
    run("--stage", "2", "--steps", "2", out=copied)
    first = {path.name: path.read_bytes() for path in copied.iterdir()}
    capsys.readouterr()
    run("--stage", "2", "--steps", "3", out=copied)              # stage 2 alone: its stage 1 stays
    assert "stage2.pt -> stage2.old1.pt" in capsys.readouterr().out
    for name in ("stage2", "log", "metrics"):
        suffix = {"stage2": ".pt", "log": ".csv", "metrics": ".json"}[name]
        assert (copied / f"{name}.old1{suffix}").read_bytes() == first[name + suffix]
    assert (copied / "stage1.pt").read_bytes() == first["stage1.pt"]
    second = {path.name: path.read_bytes() for path in copied.iterdir()}
    run("--stage", "1", "--steps", "2", out=copied)              # the whole run
    for name in ("stage1.pt", "stage2.pt", "log.csv", "metrics.json"):
        stem, suffix = name.split(".")
        assert (copied / f"{stem}.old2.{suffix}").read_bytes() == second[name]
    assert not (copied / "stage2.pt").exists()
    assert [row[:2] for row in log_rows(copied)[1:]] == [["1", "2"]]


@pytest.mark.usefixtures("no_pictures")
def test_nothing_moves_where_training_is_refused(copied, monkeypatch):
    before = names_in(copied)
    for flags in (["--data", "nowhere"], ["--objects", "9999"], ["--perceptual", "none"],
                  ["--stage", "2", "--channels", "64"], ["--steps", "0"], ["--decoder", "nowhere"]):
        with pytest.raises(data.BadInput):
            run(*flags, out=copied)
    monkeypatch.setattr(data, "load_for", no_room)               # photos that cannot be read
    with pytest.raises(OSError):
        run("--stage", "1", "--steps", "2", out=copied)
    assert names_in(copied) == before


@pytest.mark.usefixtures("no_pictures")
def test_a_stage_1_that_goes_on_leaves_itself_and_its_stage_2_behind(copied, capsys):
    run("--steps", "4", out=copied, resume=True)
    before = {name: (copied / name).read_bytes() for name in names_in(copied)}
    run("--steps", "4", out=copied, resume=True)                 # finished: nothing to do
    assert not list(copied.glob("*.old*"))
    capsys.readouterr()
    run("--steps", "6", out=copied, resume=True)
    assert "stage1.pt -> stage1.old1.pt" in capsys.readouterr().out
    for name in ("stage1.pt", "stage2.pt", "log.csv"):
        assert train.aside(copied / name, 1).read_bytes() == before[name], name
    trained = sample.open_run(copied)                            # the two belong together again
    assert trained.settings.steps_stage2 == 6
    assert [row[:2] for row in log_rows(copied)[1:]] == [[s, n] for s in "12" for n in "246"]


@pytest.mark.usefixtures("no_pictures")
def test_another_decoder_moves_the_whole_run_aside_after_all_checks(stage1, tmp_path):
    run("--stage", "1", "--steps", "2", "--seed", "5", out=tmp_path)
    before = (tmp_path / "stage1.pt").read_bytes()
    flags = ("--stage", "2", "--steps", "2", "--decoder", str(stage1))
    with pytest.raises(data.BadInput, match="do not fit"):
        run(*flags, "--unet-multipliers", "1,1,1,1", out=tmp_path)
    assert not list(tmp_path.glob("*.old*"))
    run(*flags, out=tmp_path)
    assert (tmp_path / "stage1.old1.pt").read_bytes() == before
    assert (tmp_path / "stage1.pt").read_bytes() == (stage1 / "stage1.pt").read_bytes()
    assert train.read_metrics(tmp_path)["source"] == "synthetic"


# ---- On a GPU ------------------------------------------------------------------------------------
def test_bfloat16_is_what_a_network_computes_in_and_nothing_else():
    settings = settings_of(precision="bf16")
    torch.manual_seed(0)
    decoder = train.autodecoder.build_decoder(settings, 4).eval()
    k = torch.arange(4)
    inside = []
    decoder.head.register_forward_hook(lambda module, args, answer: inside.append(answer.dtype))
    exact = decoder(k)
    with train.sped_up(settings, decoder, "cpu"):
        rough = decoder(k)
    again = decoder(k)
    assert inside == [torch.float32, torch.bfloat16, torch.float32]
    assert rough.dtype == torch.float32 and torch.equal(again, exact)
    assert 0 < (rough - exact).abs().max() < 0.03 * exact.abs().max()
    rough.mean().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in decoder.parameters())


def test_gradients_of_small_convolutions_in_bfloat16_do_not_depend_on_what_lay_in_memory():
    """oneDNN's do: on some CPUs a tenth of these are nan."""
    was = torch.backends.mkldnn.enabled
    with train.sound_convolutions("bf16", "cpu"):
        for _ in range(100):
            rubbish = torch.full((2**18,), math.nan)       # what lies where gradients come to lie
            del rubbish
            x = torch.randn(3, 64, 2, 2, 2).bfloat16()
            weight = torch.randn(64, 64, 3, 3, 3).bfloat16().requires_grad_()
            answer = torch.nn.functional.conv3d(x, weight, padding=1)
            gradient, = torch.autograd.grad(answer.float().square().mean(), weight)
            assert gradient.isfinite().all()
    assert torch.backends.mkldnn.enabled == was
    with train.sound_convolutions("float32", "cpu"):
        assert torch.backends.mkldnn.enabled == was


@pytest.mark.usefixtures("no_pictures")
def test_both_stages_learn_in_bfloat16_nearly_what_they_learn_in_float32(tmp_path):
    run("--steps", "6", out=tmp_path / "exact")
    run("--steps", "6", "--precision", "bf16", out=tmp_path / "rough")
    exact, rough = (log_rows(tmp_path / name)[1:] for name in ("exact", "rough"))
    for a, b in zip(exact, rough):
        assert a[:2] == b[:2] and a[2] != b[2]
        assert float(b[2]) == pytest.approx(float(a[2]), rel=0.03)
    weights = sample.load_checkpoint(tmp_path / "rough", 1)["model"]
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float32}
    with pytest.raises(data.BadInput, match="--precision"):
        run("--precision", "int8", out=tmp_path / "other")


@pytest.mark.usefixtures("no_pictures")
def test_both_networks_are_compiled_if_asked(tmp_path, monkeypatch):
    compiled = []

    def note(forward):
        compiled.append(type(forward.__self__).__name__)
        return forward

    monkeypatch.setattr(torch, "compile", note)
    run("--steps", "2", out=tmp_path / "no")
    assert compiled == []
    run("--steps", "2", "--compile", out=tmp_path / "yes")
    assert compiled == ["AutoDecoder", "Denoiser"]


@pytest.fixture()
def on_meta(monkeypatch):
    """torch's "meta" device has shapes and no numbers: whoever reads one there, or brings a tensor
    that stayed on the CPU, fails as a GPU would wait, or fail. It has neither fused Adam nor
    random generators."""
    adam, place_samples = torch.optim.Adam, render.place_samples
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, fused, **kwargs: adam(*args, **kwargs))
    monkeypatch.setattr(render, "place_samples",
                        lambda near, far, n, generator=None: place_samples(near, far, n))


@pytest.mark.parametrize("flags", [RIGID, MOVING + ["--parts", "3"], TEXT],
                         ids=["rigid", "moving", "text"])
def test_no_step_of_training_or_sampling_waits_for_the_device(flags, on_meta):
    args, settings = train.parse(flags)
    dataset = data.load_for(settings, args.data)
    settings = train.fit_to_data(settings, args.cameras, dataset)
    state = train.new_stage1(settings, dataset, "meta")
    features = train.autodecoder.build_features(settings.perceptual, "meta")
    if state.posenet is None:
        steps = train.train_stage1(settings, dataset, state, features, train.draw_coarse_to_fine,
                                   render.render_skipping)
    else:
        steps = train.train_moving(settings, dataset, state, features, train.draw_coarse_to_fine)
    for loss, error in steps:                            # all of them: of what moves, parts split
        assert loss.device.type == error.device.type == "meta"
    latents = torch.randn(dataset.n_objects, *state.autodecoder.latent_shape)
    first = {"captions": dataset.captions, "fingerprint": ""}
    settings, state = train.new_stage2(settings, latents, first, None, "cpu")
    for module in (state.model, state.average):
        module.to("meta")
    state.latents = state.latents.to("meta")
    steps = (train.train_text if settings.text else train.train_stage2)(settings, state)
    assert next(steps).device.type == "meta"
    if not settings.text:
        noise = torch.randn(2, *latents.shape[1:], device="meta")
        assert diffusion.edm_sampler(state.average, noise, 3).device.type == "meta"


# ---- Signals -------------------------------------------------------------------------------------
def signal_at(monkeypatch, step, *numbers):
    """Sends signals to ourselves in a step of training, after its loss was logged."""
    add = train.Log.add

    def signalled(self, at, *losses):
        add(self, at, *losses)
        if at == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(train.Log, "add", signalled)


def exit_status(capsys, call):
    """What run_cli ends with, and the lines on stderr."""
    with pytest.raises(SystemExit) as stop:
        data.run_cli(call)
    return stop.value.code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("number, status, word", [
    (signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.usefixtures("no_pictures")
def test_a_signal_ends_training_after_the_step_and_it_goes_on_bit_for_bit(
        number, status, word, stage, copied, tmp_path_factory, monkeypatch, capsys):
    whole = tmp_path_factory.mktemp("whole")
    if stage == 1:
        (copied / "stage1.pt").unlink()
    else:
        shutil.copy(copied / "stage1.pt", whole)
    flags = ("--stage", str(stage), "--steps", "6")
    run(*flags, out=whole)
    monkeypatch.setattr(sys, "argv", ["train.py", "--some", "flags of mine"])
    handlers = signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_at(patch, 3, number)
        code, lines = exit_status(capsys, lambda: run(*flags, out=copied))
    assert code == status and lines == [
        f"stopped by {word}; stage {stage} is saved at step 3; go on with: python train.py --some "
        "'flags of mine' --resume"]
    assert signal.getsignal(number) == handlers
    assert sample.load_checkpoint(copied, stage)["step"] == 3
    run(*flags, out=copied, resume=True)
    assert same(weights(whole, stage), weights(copied, stage))
    assert log_rows(whole)[-3:] == log_rows(copied)[-3:]


@pytest.mark.usefixtures("no_pictures")
def test_a_second_signal_stops_at_once(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_at(patch, 3, signal.SIGTERM, signal.SIGINT)
        code, lines = exit_status(capsys, lambda: run("--stage", "1", "--steps", "6", out=tmp_path))
    assert (code, lines) == (130, ["stopped by Ctrl-C"])         # nothing was saved: no advice
    assert not (tmp_path / "stage1.pt").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_signal_in_the_last_step_ends_the_run_too(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_at(patch, 6, signal.SIGTERM)
        code, _ = exit_status(capsys, lambda: run("--stage", "1", "--steps", "6", out=tmp_path))
    assert code == 143 and sample.load_checkpoint(tmp_path, 1)["step"] == 6


def test_outside_of_the_loops_a_signal_stops_at_once_with_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "load_for", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    code, lines = exit_status(capsys, lambda: run("--stage", "1", out=tmp_path))
    assert (code, lines) == (143, ["stopped by SIGTERM"])


# ---- What is known before the data is read -------------------------------------------------------
def write_photos(folder, shade=200):
    """Two objects of four photos each, from all sides, in NeRF's layout."""
    for name in ("a", "b"):
        frames = []
        (folder / name).mkdir(parents=True)
        for i in range(4):
            rgba = np.zeros((16, 16, 4), np.uint8)
            rgba[5:11, 5:11] = (shade, 90, 10 * i, 255)
            iio.imwrite(folder / name / f"{i}.png", rgba)
            pose = render.orbit(math.pi / 2 * i, 0.3, 4.0)
            frames.append({"file_path": f"{i}.png", "transform_matrix": pose.tolist()})
        transforms = {"camera_angle_x": 0.6, "frames": frames}
        (folder / name / "transforms.json").write_text(json.dumps(transforms))
    return folder


OF_PHOTOS = DECODER + ["--size", "16", "--holdout", "2", "--unet-channels", "16",
                       "--unet-attention", "4", "--batch-size", "2", "--sample-steps", "2"]


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "here" / "photos")


@pytest.mark.parametrize("flags, says", [
    ("--text", "no object of stage 1 has a caption"), ("--text --t5 nowhere", "caption"),
    ("--perceptual vgg.pth", "--perceptual vgg.pth"), ("--objects c", "no object c"),
    ("--cameras learned --size 32 --keypoints 9", "--keypoints 9"),
    ("--cameras learned", "--size 16"), ("--out FILE/x", "FILE"),
    ("--batch-size 1000000 --unet-channels 8192 --unet-multipliers 64,64", "GiB of memory")])
def test_what_would_fail_later_is_refused_before_photos_are_read(flags, says, photos, tmp_path,
                                                                 monkeypatch):
    (tmp_path / "FILE").write_text("no folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", None)
    with pytest.raises((data.BadInput, OSError), match=says):
        train.main([*OF_PHOTOS, "--data", str(photos), *flags.split()])


def test_a_t5_that_is_none_is_refused_before_stage_1(photos, tmp_path, monkeypatch):
    (photos / "captions.txt").write_text("a: a red box\n")
    monkeypatch.setattr(data, "load", None)
    with pytest.raises(data.BadInput, match="T5|--t5"):
        train.main([*OF_PHOTOS, "--data", str(photos), "--out", str(tmp_path / "run"), "--text",
                    "--t5", str(tmp_path)])


@pytest.mark.parametrize("damaged", ["stage1.pt", "stage2.pt"])
@pytest.mark.usefixtures("no_pictures")
def test_damaged_checkpoints_and_other_settings_are_refused_before_photos_are_read(
        damaged, copied, tmp_path, monkeypatch):
    run("--stage", "2", "--steps", "2", out=copied)
    monkeypatch.setattr(data, "load", None)
    with pytest.raises(data.BadInput, match="--lr-stage1 is 0.1 here"):
        run("--steps", "4", "--lr-stage1", "0.1", out=copied, resume=True)
    with pytest.raises(data.BadInput, match="--lr-stage2 is 0.1 here"):
        run("--steps", "4", "--lr-stage2", "0.1", out=copied, resume=True)
    (copied / damaged).write_bytes(b"damaged")
    with pytest.raises(data.BadInput, match=damaged):
        run("--steps", "4", out=copied, resume=True)


@pytest.mark.usefixtures("no_pictures")
def test_photos_that_moved_or_changed_are_told_from_those_of_the_run(photos, tmp_path, monkeypatch):
    out = tmp_path / "run"
    flags = [*DECODER, "--size", "16", "--holdout", "2", "--stage", "1", "--out", str(out)]
    monkeypatch.chdir(photos.parent)
    train.main([*flags, "--data", "photos", "--steps", "1"])
    trained = sample.open_run(out, stages=(1,))
    assert trained.source == str(photos) == train.read_metrics(out)["source"]
    moved = tmp_path / "there"
    photos.rename(moved)
    with pytest.raises(data.BadInput, match=f"{photos}, which {out} was trained on, is not there"):
        evaluate.main(["--run", str(out)])
    evaluate.main(["--run", str(out), "--data", str(moved)])
    write_photos(tmp_path / "others", shade=90)
    for main in (lambda: evaluate.main(["--run", str(out), "--data", str(tmp_path / "others")]),
                 lambda: train.main([*flags, "--data", str(tmp_path / "others"), "--steps", "2",
                                     "--resume"])):
        with pytest.raises(data.BadInput, match="are not the photos that .* was trained on"):
            main()
    train.main([*flags, "--data", str(moved), "--steps", "2", "--resume"])
    assert sample.open_run(out, stages=(1,)).source == str(moved)
    with pytest.raises(data.BadInput, match=f"trained on {moved}; leave --data out"):
        train.main([*OF_PHOTOS, "--stage", "2", "--data", str(tmp_path / "others"), "--out",
                    str(out)])


@pytest.mark.usefixtures("no_pictures")
def test_two_folders_of_one_name_have_a_run_each(photos, tmp_path, monkeypatch):
    other = write_photos(tmp_path / "elsewhere" / "photos", shade=90)
    flags = ["--preset", "micro", *DECODER, "--size", "16", "--stage", "1", "--steps", "1"]
    monkeypatch.chdir(tmp_path)
    for resume in ([], ["--resume"]):
        for source in (photos, other):
            train.main([*flags, "--data", str(source), *resume])
    assert sorted(path.name for path in Path("runs").iterdir()) == ["micro-photos",
                                                                   "micro-photos-2"]
    args, _ = train.parse(["--stage", "2", "--preset", "micro", "--data", str(other)])
    assert args.out == Path("runs/micro-photos-2")
    (args.out / "metrics.json").unlink()                         # the checkpoint knows it, too
    args, _ = train.parse(["--preset", "micro", "--data", str(other)])
    assert args.out == Path("runs/micro-photos-2")


NUMBERS = [field for field in dataclasses.fields(train.AllSettings)
           if field.type in (int, float, tuple) and field.metadata["group"] is not None]


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_every_number_has_bounds(field):
    least, most = train.BOUNDS.get(field.name, train.OTHER_BOUNDS)
    for number in (math.nan, math.inf, -math.inf, most * 1.01 + 1, least - 1):
        value = number
        if field.type is tuple:
            value = (*(field.default or (0.5,))[:-1], number)
        settings = dataclasses.replace(settings_of(), **{field.name: value})
        with pytest.raises(data.BadInput, match=f"{train.flag(field.name)} must be between"):
            train.check_numbers(settings)


@pytest.mark.parametrize("flags, says", [
    ("--steps 0", "--steps"), ("--steps -3", "--steps"), ("--steps 1e9", "--steps"),
    ("--n-sheet 1e20", "--n-sheet"), ("--betas nan,0.9", "--betas"), ("--betas=", "--betas"),
    ("--unet-multipliers=", "--unet-multipliers"), ("--growth=", "--growth"),
    ("--unet-attention -1", "--unet-attention"), ("--unet-attention 4.5", "whole numbers"),
    ("--decoder-attention 1e400", "--decoder-attention"), ("--lr-stage1 -1e-3", "--lr-stage1")])
def test_numbers_of_the_command_line_are_refused_by_their_flags(flags, says):
    with pytest.raises(data.BadInput, match=says):
        train.parse(["--preset", "micro", "--cameras", "learned", "--keypoints", "8",
                     *flags.replace("--unet-attention -1", "--unet-attention=-1").split()])


def test_adam_takes_a_whole_number_for_a_beta():
    _, settings = train.parse(["--preset", "micro", "--betas", "0,0.9"])
    assert settings.betas == (0.0, 0.9) and isinstance(settings.betas[0], float)
    train.start_stage1(settings, torch.nn.Linear(1, 1))


@pytest.mark.parametrize("flags, says", [
    ("--n-objects 1000000 --n-views 1000", "frames 15258.8"),
    ("--embed-dim 65536 --channels 8192 --start-side 4 --decoder-attention=", "decoder, gradients"),
    ("--objects-per-step 64 --volume-side 512 --n-objects 64", "volumes of a step 256.0"),
    ("--n-samples 10000 --objects-per-step 64 --views-per-step 1000", "samples on rays")])
def test_what_cannot_fit_is_refused_in_the_first_seconds_with_its_size(flags, says, tmp_path,
                                                                       monkeypatch):
    monkeypatch.setattr(sample, "physical_memory", lambda: 16 * 2**30)
    monkeypatch.setattr(data, "load", None)
    with pytest.raises(data.BadInput, match=f"GiB of memory .*{says}.*there are 16.0"):
        train.main(["--preset", "micro", "--size", "16" if "frames" not in says else "64",
                    "--out", str(tmp_path / "run"), "--stage", "1", *flags.split()])
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_too_small_for_the_checkpoints_is_told_at_once(tmp_path, monkeypatch):
    usage = argparse.Namespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(data.BadInput, match="checkpoints take at least 0.*GiB"):
        run("--steps", "1", out=tmp_path / "run")


def test_where_the_system_does_not_tell_its_memory_nothing_is_refused(monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    assert sample.physical_memory() is None
    sample.check_memory({"frames": 2**80}, "")


# ---- What goes wrong -----------------------------------------------------------------------------
def test_a_person_gets_one_line_and_status_2():
    done = subprocess.run([sys.executable, ROOT / "train.py", "--data", "nowhere"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere: no such folder")
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


@pytest.mark.parametrize("arguments, says", [
    (["--out", str(ROOT / "README.md")], "README.md"),
    (["--stage", "2", *DENOISER], "stage1.pt"),
    (["--perceptual", "vgg.pth"], "vgg19-dcbb9e9d.pth"),
    (["--data", "puppets", "--cameras", "known"], "--cameras known"),
    (["--data", "puppets"], "--size 16"),
    (["--data", "puppets", "--size", "32", "--keypoints", "9"], "keypoints 9"),
    (["--device", "cuda:77"], "--device cpu"), (["--device", "mps"], "--device cpu")])
def test_bad_input_is_one_line_and_status_2_and_leaves_nothing(arguments, says, tmp_path, capsys):
    flags = [*DATA, *DECODER, "--steps", "1", "--out", str(tmp_path / "run"), *arguments]
    with pytest.raises(SystemExit) as stop:
        data.run_cli(lambda: train.main(flags))
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and says in stderr and len(stderr.splitlines()) == 1, stderr
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.tmp*"))


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_ctrl_c_while_torch_is_imported_ends_without_a_traceback(script, tmp_path):
    """A module called torch, which sends the signal, stands in for torch."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    done = subprocess.run([sys.executable, str(ROOT / script)], capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(tmp_path)))
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_a_decoder_of_another_run_needs_a_place_of_its_own():
    with pytest.raises(data.BadInput, match="--decoder goes with --out"):
        train.parse(["--stage", "2", "--decoder", "runs/other"])


def test_what_was_left_out_of_the_data_is_said_before_training(tmp_path, monkeypatch, capsys):
    photos = write_photos(tmp_path / "photos")
    (photos / "a" / "0.png").write_bytes(b"no picture")
    monkeypatch.setattr(train, "run_stage1", lambda *_: None)
    flags = [*DECODER, "--size", "16", "--holdout", "2", "--out", str(tmp_path / "run")]
    train.main(["--stage", "1", "--data", str(photos), *flags])
    assert "data    | 1 view left out: a/0.png: " in capsys.readouterr().out


def test_scripts_start_where_there_is_no_module_of_unix_alone(tmp_path):
    program = ("import sys; sys.modules['resource'] = None; sys.modules['fcntl'] = None; "
               "import train, sample, data; print(train.peak_memory_gib())")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "nan", done.stderr


def test_peak_memory_is_in_bytes_on_macos_and_in_kibibytes_elsewhere(monkeypatch):
    import resource
    monkeypatch.setattr(resource, "getrusage", lambda who: argparse.Namespace(ru_maxrss=3 * 2**30))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert train.peak_memory_gib() == 3
    monkeypatch.setattr(resource, "getrusage", lambda who: argparse.Namespace(ru_maxrss=3 * 2**20))
    monkeypatch.setattr(sys, "platform", "linux")
    assert train.peak_memory_gib() == 3


@pytest.mark.parametrize("script, flag", [
    ("train", "--clip-filter"), pytest.param("sample", "--interpolate", marks=pytest.mark.slow),
    pytest.param("data", "--holdout", marks=pytest.mark.slow), ("tests/evaluate", "--views")])
def test_help_lists_the_flags(script, flag):
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", "--help"], capture_output=True,
                          text=True)
    assert done.returncode == 0 and flag in done.stdout and not done.stderr


def commands_of_the_documents():
    """(script, arguments) of every command in their blocks, with loops and lists filled in."""
    for name in ("README.md", "docs/results.md"):
        blocks = re.findall(r"```sh\n(.*?)```", (ROOT / name).read_text(), re.S)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            line = re.sub(r"\$\(.*?\)|\$\w+", "7", line)
            found = re.match(r"\s*python (train|sample|data|tests/evaluate)\.py(.*)", line)
            if found:
                yield found[1], shlex.split(found[2], comments=True)


def test_every_command_of_the_documents_has_flags_that_fit_together(monkeypatch):
    # Folders named there are not here: what kind they are of is told by their names.
    def is_moving(source, as_clips):
        return source == "puppets" or "CLIPS" in source or as_clips

    monkeypatch.setattr(data, "is_moving", is_moving)
    commands = list(commands_of_the_documents())
    assert len(commands) > 15
    parsers = {"train": train.parse, "sample": sample.parse, "tests/evaluate": evaluate.parse}
    for script, arguments in commands:
        if script in parsers:
            parsers[script](arguments)


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    real, calls = train.autodecoder.foreground_loss, iter(range(100))

    def spoiled(occupancy, mask):
        return real(occupancy, mask) * (math.nan if next(calls) == 5 else 1)

    monkeypatch.setattr(train.autodecoder, "foreground_loss", spoiled)
    with pytest.raises(data.BadInput, match="nan at step 6; the last good checkpoint is kept, "):
        run("--stage", "1", "--steps", "8", out=tmp_path)
    kept = sample.load_checkpoint(tmp_path, 1)
    assert kept["step"] == 4 and all(torch.isfinite(v).all() for v in kept["model"].values())
    calls = iter(range(5, 100))                          # in the first step: there is none yet
    with pytest.raises(data.BadInput, match="nan at step 1; nothing had been saved"):
        run("--stage", "1", "--steps", "8", "--seed", "5", out=tmp_path)


@pytest.mark.usefixtures("no_pictures")
def test_weights_that_are_not_finite_never_replace_good_ones(tmp_path, monkeypatch):
    step, calls = torch.optim.Adam.step, iter(range(100))

    def spoiled(self, *args):
        step(self, *args)
        if next(calls) == 7:                             # the loss was finite, the gradient not
            self.param_groups[0]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.Adam, "step", spoiled)
    for stage in ("1", "2"):
        with pytest.raises(data.BadInput, match="not finite at step 8"):
            run("--stage", stage, "--steps", "8", out=tmp_path)
        assert sample.load_checkpoint(tmp_path, int(stage))["step"] == 4
        calls = iter(range(100))


def test_one_object_has_no_distribution_to_learn(tmp_path):
    run("--n-objects", "1", "--steps", "1", out=tmp_path)
    assert not (tmp_path / "stage2.pt").exists()                 # left out, and no mistake
    with pytest.raises(data.BadInput, match="one object has none"):
        run("--stage", "2", "--n-objects", "1", "--steps", "2", out=tmp_path)


# ---- Moving subjects -----------------------------------------------------------------------------
@pytest.mark.slow
def test_learned_poses_lower_the_loss_and_every_number_stays_finite(tmp_path):
    run(*PUPPETS, "--stage", "1", "--steps", "60", "--log-every", "10", "--growth", "0.03,0.15",
        "--split-at", "0.35", "--perceptual-weight", "1", "--foreground-weight", "1", out=tmp_path)
    losses = [float(row[2]) for row in log_rows(tmp_path)[1:]]
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]
    trained = sample.open_run(tmp_path, stages=(1,))
    assert int(trained.posenet.active) == 2                        # one part became two
    assert float(trained.autodecoder.growth) == 1.0
    for module in (trained.autodecoder, trained.posenet):
        assert all(value.isfinite().all() for value in module.state_dict().values())
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["psnr_mean_frame"] > 10


@pytest.mark.slow
def test_learned_poses_resume_to_the_same_bits(tmp_path, monkeypatch):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(*PUPPETS, "--stage", "1", "--steps", "8", out=whole)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            run(*PUPPETS, "--stage", "1", "--steps", "8", out=halves)
    run(*PUPPETS, "--stage", "1", "--steps", "8", out=halves, resume=True)
    for key in ("model", "posenet"):
        assert same(weights(whole, 1, key), weights(halves, 1, key))


def moving_state(**values):
    settings = settings_of(size=32, parts=2, keypoints=8, body=(0.3, 0.8, 0.3), lr_stage1=1.0,
                           lr_pose=2.0, lr_parts=0.25, growth=(0.4, 0.6), detail=(0.2, 0.6),
                           split_at=0.7, steps_stage1=100, **values)
    dataset = argparse.Namespace(n_objects=2)
    return settings, train.new_stage1(settings, dataset, "cpu")


def test_poses_rest_at_the_start_and_while_density_comes_in_and_parts_learn_slowly():
    settings, state = moving_state()
    expected = {0: 0.0, 4: 0.0, 5: 2 * 0.95, 39: 2 * 0.61, 40: 0.0, 59: 0.0, 60: 2 * 0.4,
                70: 2 * 0.3, 71: 2 * 0.29 * 0.25}
    for step, rate in expected.items():
        state.step = step
        train.follow_schedule(settings, state)
        decoder, poses = state.optimizer.param_groups
        assert decoder["lr"] == pytest.approx(1 - step / 100)
        assert poses["lr"] == pytest.approx(rate), step


def test_density_and_detail_come_in_when_they_should_and_one_part_becomes_many():
    settings, state = moving_state()
    for step, growth, detail, active in ((0, 0, 0, 1), (30, 0, 0.25, 1), (50, 0.5, 0.75, 1),
                                         (69, 1, 1, 1), (70, 1, 1, 2)):
        state.step = step
        train.follow_schedule(settings, state)
        assert float(state.autodecoder.growth) == pytest.approx(growth)
        assert float(state.autodecoder.detail[-1]) == pytest.approx(detail)
        assert all(state.autodecoder.detail[:-1] == 1)
        assert int(state.posenet.active) == active


def test_levels_of_detail_come_in_one_after_the_other_the_finest_last():
    settings, state = moving_state()
    settings = dataclasses.replace(settings, detail=(0.1, 0.3, 0.4, 0.8))
    for step, coarse, fine in ((20, 0.5, 0), (40, 1, 0), (60, 1, 0.5), (80, 1, 1)):
        state.step = step
        train.follow_schedule(settings, state)
        assert state.autodecoder.detail[-2:].tolist() == pytest.approx([coarse, fine])


def test_gradients_of_either_network_are_clipped_by_themselves(monkeypatch):
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def watched(parameters, most):
        parameters = list(parameters)
        clip(parameters, most)
        total = sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None)
        norms.append((len(parameters), most, total**0.5))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    args, settings = train.parse(MOVING + ["--clip", "0.001"])
    dataset = data.load_for(settings, "puppets")
    settings = train.fit_to_data(settings, None, dataset)
    state = train.new_stage1(settings, dataset, "cpu")
    next(train.train_moving(settings, dataset, state))
    assert [count for count, _, _ in norms] == [len(list(network.parameters())) for network in
                                                (state.autodecoder, state.posenet)]
    assert all(most == 0.001 and norm <= 0.0010001 for _, most, norm in norms)


def test_poses_that_are_not_finite_stop_training_with_a_line(tmp_path, monkeypatch):
    with pytest.raises(data.BadInput, match="stage 1: (poses are not finite|the loss is nan)"):
        run(*PUPPETS, "--stage", "1", "--steps", "8", "--lr-pose", "1e9", out=tmp_path)
    step = torch.optim.Adam.step

    def spoiled(self):
        step(self)
        self.param_groups[1]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.Adam, "step", spoiled)
    with pytest.raises(data.BadInput, match="not finite at step 1"):         # it saves there
        run(*PUPPETS, "--stage", "1", "--steps", "8", "--save-every", "1", out=tmp_path)
    assert not (tmp_path / "stage1.pt").exists()


@pytest.mark.slow
def test_the_mean_of_2d_points_is_fixed_once_it_has_settled(tmp_path):
    for settle_at, batches in (("0.5", 5), ("1.0", 8)):
        run(*PUPPETS, "--stage", "1", "--steps", "8", "--settle-at", settle_at, out=tmp_path)
        assert weights(tmp_path, 1, "posenet")["batches"] == batches      # that went into the mean


@pytest.mark.usefixtures("no_pictures")
def test_a_moving_run_keeps_the_poses_of_its_first_clip_and_is_looked_at_from_ahead(tmp_path):
    run(*PUPPETS, "--stage", "1", "--steps", "2", out=tmp_path)
    trained = sample.open_run(tmp_path, stages=(1,))
    dataset = data.load_for(trained.data_settings, "puppets")
    expected = sample.cameras_of(trained, dataset, dataset.frames_of(0, heldout=False))
    torch.testing.assert_close(trained.poses, expected)
    assert trained.poses.std(0).max() > 0 and trained.source == "puppets"
    assert trained.view == {"distance": 12.0, "elevation": 0.0}


def test_the_loss_of_learned_cameras_is_its_parts_weighted(monkeypatch):
    dataset = data.load("puppets", 32, n_objects=2, n_views=3)
    seen = []

    def posenet(pictures, settled):
        seen.append(pictures)
        losses = {"reprojection": 7.0, "centre": 11.0, "distance": 13.0}
        return torch.zeros(6, 1, 4, 4), torch.arange(6), losses

    def equivariance(points2d, pictures, u, generator):
        assert points2d == "points2d" and u.tolist() == [0, 3]   # of one view of each object
        assert torch.equal(pictures, seen[0][[0, 3]])
        return 17.0

    posenet.points2d = "points2d"
    monkeypatch.setattr(train.autodecoder, "equivariance_loss", equivariance)
    settings = settings_of(reprojection_weight=2.0, equivariance_weight=3.0)
    state = argparse.Namespace(posenet=posenet, device="cpu", step=0, generator=None)
    frames = torch.arange(6).view(2, 3)
    cameras, loss = train.learned_cameras(settings, state, dataset, frames)
    assert loss == 2 * 7 + 11 + 13 / 2 + 3 * 17 and cameras.shape == (2, 3, 1, 4, 4)
    assert torch.equal(seen[0], dataset.batch(torch.arange(6), 32)[0])


def test_the_mean_of_a_clips_training_frames_is_what_held_out_ones_are_compared_with():
    dataset = data.load("puppets", 16, 6, n_objects=2, n_views=6)
    dataset.images[:] = torch.tensor([0.2, 0.4, 0.4, 0.4, 0.6, 0.8]).repeat(2).mul(255).view(
        12, 1, 1, 1).byte()
    assert train.score_mean_frame(dataset) == pytest.approx(-10 * math.log10(0.4**2), abs=1e-3)
    dataset.images[:] = 80                                   # nothing moves: no error at all
    assert train.score_mean_frame(dataset) == pytest.approx(100)


def test_the_body_is_measured_from_what_is_nearly_always_covered():
    masks = torch.zeros(4, 32, 32, dtype=torch.uint8)
    position = (torch.arange(32) + 0.5) / 16 - 1
    ellipse = (position / 0.3)**2 + ((position / 0.7)**2)[:, None] < 1          # y down, x across
    masks[:] = 255 * ellipse
    masks[0, :, 20:] = 255                                       # an arm, in one frame of four
    dataset = data.load("puppets", 32, 0, n_objects=1, n_views=4)
    dataset.masks = masks
    assert train.measure_body(dataset) == pytest.approx((0.3, 0.7, 0.3), abs=0.02)
    # The arm in three fifths of 5000 frames, more than are looked at at a time: it belongs.
    wide, _, _ = train.measure_body(dataclasses.replace(dataset, masks=masks[:1].repeat(4, 1, 1)))
    for arms in (torch.arange(5000) < 3000, torch.arange(5000) >= 2000):
        many = dataclasses.replace(dataset, images=torch.zeros(5000, 32, 32, 3).byte(),
                                   masks=masks[1 - arms.long()], heldout=torch.zeros(5000) > 0)
        assert train.measure_body(many)[0] == pytest.approx(wide)


@pytest.mark.usefixtures("no_pictures")
def test_cameras_of_rigid_objects_can_be_learned_too(tmp_path):
    run("--cameras", "learned", "--arc", "60", "--size", "32", "--keypoints", "8", "--stage", "1",
        "--steps", "4", out=tmp_path)
    checkpoint = sample.load_checkpoint(tmp_path, 1)
    assert checkpoint["settings"]["parts"] == 1 and checkpoint["poses"].shape[1:] == (1, 4, 4)
    assert checkpoint["settings"]["focal"] == pytest.approx(4.35)


# ---- Text ----------------------------------------------------------------------------------------
@pytest.mark.usefixtures("no_pictures")
def test_words_from_captions_to_a_prompt(copied, capsys):
    run("--steps", "3", "--stage", "2", "--text", "--context-dim", "16", out=copied)
    assert {"chair", "table", "with"} <= set(sample.load_checkpoint(copied, 2)["vocabulary"])
    run("--steps", "5", "--stage", "2", "--text", "--context-dim", "16", out=copied, resume=True)
    assert sample.load_checkpoint(copied, 2)["step"] == 5
    sample.main(["--run", str(copied), "--prompt", "a crimson chair", "--n", "1", "--steps", "1"])
    assert "crimson" in capsys.readouterr().err


def test_t5_runs_once_and_its_tokens_are_kept_beside_the_run(t5_folder, copied, monkeypatch):
    text = ("--stage", "2", "--text", "--t5", str(t5_folder))
    run("--steps", "2", *text, out=copied)
    kept = sample.load_weights("--t5", copied / "text.pt", "")
    captions = sample.load_checkpoint(copied, 1)["captions"]
    assert kept["prompts"] == sorted({"", *captions})
    encode = diffusion.T5Encoder(t5_folder)
    for i, prompt in enumerate(kept["prompts"]):
        torch.testing.assert_close(kept["tokens"][i], encode([prompt])[0][0])
    monkeypatch.setattr(diffusion, "T5Encoder", None)                 # not called a second time
    run("--steps", "4", *text, out=copied, resume=True)
    (copied / "text.pt").write_bytes(b"damaged")
    with pytest.raises(data.BadInput, match="text.pt: not a file of weights"):
        run("--steps", "4", *text, out=copied)
