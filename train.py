"""Photos go in; a trained decoder (stage 1) and a diffusion model (stage 2) come out.

    python train.py       both stages and a first sampling, in minutes; --help lists every setting
    train.learn(train.Settings(**train.MICRO), "runs/first")    both stages, by first readings alone

Paper: Sec. 3.2 (stage 1), Sec. 3.3 (stage 2), Tab. 5 and App. C.2 (the numbers).
Shapes: B objects a step, V views of each, C channels, H = W side of a picture, N dataset objects.
Simplified: float32, no data loader: the frames fit in memory, or are in a cache.
Read next: sample.py
"""
import copy
import dataclasses
import os
from types import SimpleNamespace

if __name__ == "__main__":               # Ctrl-C while torch is imported: an end, no traceback
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import torch

import autodecoder
import data
import diffusion
import render
import sample
from normalize import RobustNormalizer

# ---- Settings: the numbers of the method ---------------------------------------------------------
def option(default, group, help):
    """A field of Settings. Each is also a flag of the command line: help says what it means."""
    return dataclasses.field(default=default, metadata={"group": group, "help": help})


@dataclasses.dataclass
class Settings:
    """Defaults are the paper's for ShapeNet Chairs (Tab. 5), where it has such a number."""
    size: int = option(64, "data", "side of the pictures in pixels")
    holdout: int = option(6, "data", "1/n of the views is kept for scoring; 0: none")
    n_objects: int = option(15576, "data", "how many built-in objects to make")
    n_views: int = option(200, "data", "views of each built-in object")
    embed_dim: int = option(1024, "decoder", "length of the embedding e")
    channels: int = option(512, "decoder", "features of the first volume, halved at each doubling")
    start_side: int = option(4, "decoder", "side of the first volume")
    volume_side: int = option(64, "decoder", "side of the decoded volume")
    latent_side: int = option(8, "decoder", "side of the latent F, where G is cut into G1 and G2")
    decoder_depth: int = option(4, "decoder", "residual blocks per resolution")
    decoder_attention: tuple = option((8, 16), "decoder", "sides with self-attention")
    norm: str = option("batch", "decoder", "batch (the paper) or group")
    # OURS: the paper does not say how many steps, nor how many objects or latents are in one.
    steps_stage1: int = option(500_000, "stage 1", "training steps")
    objects_per_step: int = option(16, "stage 1", "objects in a step")
    views_per_step: int = option(4, "stage 1", "views of each object in a step")
    n_samples: int = option(128, "stage 1", "samples on a ray")
    lr_stage1: float = option(5e-4, "stage 1", "Adam's learning rate, decays linearly to 0")
    betas: tuple = option((0.5, 0.999), "stage 1", "of Adam")
    perceptual_weight: float = option(10.0, "stage 1", "weight of Eq. 1")
    foreground_weight: float = option(10.0, "stage 1", "weight of Eq. 2")
    normalization: str = option("robust", "stage 2", "robust (the paper), meanstd or none")
    per_channel: bool = option(False, "stage 2", "one median and IQR per channel")
    latent_scale: float = option(1.0, "stage 2", "spread of the latents after normalization")
    sigma_data: float = option(0.5, "stage 2", "EDM's assumed spread of normalized latents")
    P_mean: float = option(-1.2, "stage 2", "mean of the logarithm of the noise levels to learn")
    P_std: float = option(1.2, "stage 2", "its standard deviation")
    unet_channels: int = option(128, "stage 2", "width of the U-Net")
    unet_multipliers: tuple = option((3, 4), "stage 2", "its factor at each resolution")
    unet_depth: int = option(2, "stage 2", "residual blocks per resolution")
    unet_attention: tuple = option((8, 4), "stage 2", "sides with self-attention")
    steps_stage2: int = option(500_000, "stage 2", "training steps")
    batch_size: int = option(64, "stage 2", "latents in a step")
    # AMBIGUOUS: the text says 4.5e-4, Tab. 5 4.5e-5.
    lr_stage2: float = option(4.5e-4, "stage 2", "Adam's learning rate, decays linearly to 0")
    ema_half_life: float = option(2000.0, "stage 2", "of the averaged weights, in steps")
    seed: int = option(0, "run", "of everything random")


# For coursework: two CPU cores, two minutes. G1 is the linear layer alone, for the latent has the
# first volume's side. Rates are higher, for there are 500 times fewer steps. Weights of 1 are to
# Adam what 10 and 10 are: it divides gradients by their usual size.
MICRO = dict(
    size=32, n_objects=64, n_views=16, channels=32, volume_side=16, latent_side=4, decoder_depth=1,
    decoder_attention=(), steps_stage1=1000, objects_per_step=4, n_samples=24, lr_stage1=8e-3,
    perceptual_weight=1.0, foreground_weight=1.0, unet_channels=32, unet_multipliers=(1, 2),
    unet_depth=1, unet_attention=(4, 2), steps_stage2=1000, batch_size=16, lr_stage2=2e-3,
    ema_half_life=200.0)

# ---- Stage 1: the autodecoder (Sec. 3.2) ---------------------------------------------------------
def next_objects(settings, dataset, state):
    """Numbers (B,) of the step's objects: the next of a shuffled list, or else of a new one."""
    if len(state.order) < min(settings.objects_per_step, dataset.n_objects):
        state.order = torch.randperm(dataset.n_objects, generator=state.generator)
    k = state.order[:settings.objects_per_step]
    state.order = state.order[settings.objects_per_step:]
    return k


def draw_frames(dataset, k, views, generator):
    """Frame numbers (B, V): of each object in k (B,), V of its training views in random order."""
    rows = []
    for object_number in k.tolist():
        frames = dataset.frames_of(object_number, heldout=False)
        order = torch.randperm(len(frames), generator=generator)
        rows.append(frames[order.repeat(views)[:views]])   # fewer photos than V: some come twice
    return torch.stack(rows)


def draw_photos(settings, dataset, frames, state):
    """Frames (B, V) -> images (B, V, 3, H, W), masks (B, V, 1, H, W), intrinsics (B, V, 4), which
    are those of the pictures: whoever draws a part of a photo changes them."""
    images, masks = dataset.batch(frames, settings.size)
    intrinsics = dataset.intrinsics[frames]
    return images.to(state.device), masks.to(state.device), intrinsics.to(state.device)


def start_stage1(settings, decoder, device="cpu"):
    """What the loop of stage 1 carries, as it is before the first step."""
    decoder.to(device).train()
    # The loop sets the learning rate at every step. fused is the same, but faster.
    optimizer = torch.optim.Adam(decoder.parameters(), betas=settings.betas, fused=True)
    return SimpleNamespace(
        autodecoder=decoder, optimizer=optimizer, device=device, step=0,
        order=torch.empty(0, dtype=torch.int64), generator=sample.stream(settings.seed, "stage 1"))


def stage1_loss(settings, features, rgb, occupancy, images, masks):
    """Eq. 1 and Eq. 2, weighted. All pictures are (B, V, C, H, W); features: see pyramid_loss."""
    perceptual = autodecoder.pyramid_loss(features, rgb.flatten(0, 1), images.flatten(0, 1))
    foreground = autodecoder.foreground_loss(occupancy, masks)
    return settings.perceptual_weight * perceptual + settings.foreground_weight * foreground


def train_stage1(settings, dataset, state, features=autodecoder.pixels_and_gradients,
                 draw=draw_photos, renderer=render.render):
    """Learns decoder and embeddings from nothing but photos, masks and cameras. It yields each
    step's loss and mean squared error of colours, so that its caller may print, save or stop.
    features: what Eq. 1 compares; draw: what fetches photos; renderer: what makes their like."""
    while state.step < settings.steps_stage1:
        share = state.step / settings.steps_stage1
        state.optimizer.param_groups[0]["lr"] = settings.lr_stage1 * (1 - share)
        # PAPER: several views of the same object in one step; with one, 0.5 dB worse (Tab. 2).
        k = next_objects(settings, dataset, state)                                    # (B,)
        frames = draw_frames(dataset, k, settings.views_per_step, state.generator)    # (B, V)
        images, masks, intrinsics = draw(settings, dataset, frames, state)
        cameras = dataset.cam2world[frames].to(state.device)                          # (B, V, 4, 4)

        volume = state.autodecoder(k.to(state.device))                            # (B, 4, D, H, W)
        rgb, occupancy = renderer(volume, cameras, intrinsics, images.shape[-1],
                                  settings.n_samples, state.generator)
        loss = stage1_loss(settings, features, rgb, occupancy, images, masks)

        # The gradient reaches the decoder's weights and, through them, the embeddings of k.
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        state.step += 1
        yield loss.detach(), (rgb.detach() - images).square().mean()


def stage1_checkpoint(settings, dataset, state):
    """What sampling needs of stage 1; and where its camera stands: distance, elevation (rad)."""
    return {"stage": 1, "step": state.step, "settings": vars(settings), "names": dataset.names,
            "model": state.autodecoder.state_dict(), "view": {"distance": 4.0, "elevation": 0.4}}


# ---- Stage 2: diffusion on the decoder's latents (Sec. 3.3) --------------------------------------
def start_stage2(settings, latents, denoiser, device="cpu"):
    """What the loop of stage 2 carries. latents (N, C, s, s, s) are normalized here, once."""
    normalizer = RobustNormalizer.from_settings(settings).fit(latents)
    denoiser.to(device)
    average = copy.deepcopy(denoiser).requires_grad_(False)           # it will do the sampling
    # AMBIGUOUS: its betas. OURS: PyTorch's own, (0.9, 0.999).
    optimizer = torch.optim.Adam(denoiser.parameters(), fused=True)
    return SimpleNamespace(
        step=0, model=denoiser, average=average, optimizer=optimizer, normalizer=normalizer,
        latents=normalizer.normalize(latents), generator=sample.stream(settings.seed, "stage 2"))


def train_stage2(settings, state):
    """Learns how latents are distributed: to diffusion, they are data. Yields each step's loss."""
    while state.step < settings.steps_stage2:
        share = state.step / settings.steps_stage2
        state.optimizer.param_groups[0]["lr"] = settings.lr_stage2 * (1 - share)
        k = torch.randint(len(state.latents), (settings.batch_size,), generator=state.generator)
        loss = diffusion.edm_loss(state.model, state.latents[k], settings.sigma_data,
                                  state.generator, settings.P_mean, settings.P_std)
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        state.step += 1
        diffusion.ema_update(state.average, state.model, state.step, settings.ema_half_life)
        yield loss.detach()


def stage2_checkpoint(settings, state):
    """What sampling needs of stage 2. TRAP: m and s of the normalization belong to the weights:
    samples that are denormalized with other numbers are fog."""
    return {"stage": 2, "step": state.step, "settings": vars(settings),
            "ema": state.average.state_dict(), "m": state.normalizer.m, "s": state.normalizer.s}


def learn(settings, folder, device="cpu"):
    """Both stages on built-in objects: folder/stage1.pt and stage2.pt, for sample.load_run."""
    os.makedirs(folder, exist_ok=True)
    dataset = data.load_synthetic(settings.size, settings.holdout, settings.seed,
                                  settings.n_objects, settings.n_views)
    torch.manual_seed(settings.seed)                                  # of the initial weights
    decoder = autodecoder.AutoDecoder.from_settings(settings, dataset.n_objects)
    state = start_stage1(settings, decoder, device)
    for loss, _ in train_stage1(settings, dataset, state):
        print(f"stage 1 | {state.step}/{settings.steps_stage1} | loss {loss:.4f}")
    torch.save(stage1_checkpoint(settings, dataset, state), f"{folder}/stage1.pt")

    # Photos and cameras have done their work. All that stage 2 learns from is F = G1(e).
    latents = sample.training_latents(decoder, dataset.n_objects)     # (N, C, s, s, s)
    torch.manual_seed(settings.seed)             # so stage 2 begins alike, however stage 1 was made
    denoiser = diffusion.Denoiser.from_settings(settings, decoder.latent_shape)
    state = start_stage2(settings, latents, denoiser, device)
    for loss in train_stage2(settings, state):
        print(f"stage 2 | {state.step}/{settings.steps_stage2} | loss {loss:.4f}")
    torch.save(stage2_checkpoint(settings, state), f"{folder}/stage2.pt")


# ==== Second reading: subjects that move, text, resuming, logs, the command line ==================
#
# learn, above, is all that a paper would tell. What follows is what it takes to be used: by other
# data, for hours, by somebody who makes mistakes. Each section stands for itself:
#
#     settings and presets      what can be turned, and what does not go together
#     coarse to fine            full resolution on two CPU cores
#     subjects that move        a loop of its own: cameras are learned together with the decoder
#     text                      a loop of its own: the denoiser hears captions
#     log, saving, resuming     what is left of a run, and how it goes on
#     one run in a folder       nobody else writes there, and nothing is replaced without a word
#     many GPUs, many machines  each takes a share of every step
#     stage 1, stage 2          the loops with all of this around them
#     looking ahead             what can be known before the data is read; then the command line
#
# The loops of the first reading are used as they are. Where something must differ, either a
# function is handed in (features, draw), or there is a second loop that can be read beside the
# first: branches for every kind of data in one loop would hide the method from all of them.
import contextlib  # noqa: E402
import csv  # noqa: E402
import datetime  # noqa: E402
import hashlib  # noqa: E402
import io  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import platform  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import matplotlib  # noqa: E402
import torch.distributed as dist  # noqa: E402

from data import BadInput  # noqa: E402

matplotlib.use("Agg")                                    # draw into files: no screen is needed
import matplotlib.pyplot as plt  # noqa: E402

# ---- All settings, and the presets of the paper --------------------------------------------------
#
# Each setting is a flag of the command line, and each is there because a preset, a claim of
# docs/results.md or an exercise turns it. tests/test_train.py turns every one of them once, and
# asks that something that was built, trained or drawn is no longer the same.


@dataclasses.dataclass
class AllSettings(Settings):
    """What the second reading adds: other data, hash embeddings, text, subjects that move."""
    # Which objects there are, and what is seen of them.
    objects: str = option("", "data", "use these objects only, e.g. obj2,obj5")
    arc: float = option(0.0, "data", "built-in objects seen along an arc of +-ARC degrees, not "
                        "from all round; 0: all round")
    shared_colours: bool = option(True, "data", "of puppets: left pink, right cyan, skin and hair "
                                  "of human colours; else every puppet has its own")
    as_clips: bool = option(False, "data", "folders of frames, and strips of square frames in one "
                            "picture, are clips, as videos are")
    max_megapixels: float = option(64.0, "data", "larger pictures are not read")
    max_frames: int = option(2000, "data", "objects of more photos or frames are not read")
    clip_filter: bool = option(False, "data", "the paper's: drop the first and last tenth of a "
                               "clip, frames under 25 % foreground, clips under 4 frames")

    # PAPER: for 300,000 objects a full table of embeddings has 307 million numbers, and Adam keeps
    # two more for each of them. Hashed into 256 codebooks of 32,768 rows it has 34 million.
    codebooks: int = option(0, "decoder", "hash embedding of so many pieces; 0: a full table")
    rows: int = option(256, "decoder", "entries per codebook, a power of two")
    hash_rule: str = option("spread", "decoder", "spread (ours) or paper (as printed)")
    perceptual: str = option("gradients", "stage 1", "what Eq. 1 compares: pixels, gradients, "
                             "random, or a path to " + autodecoder.VGG19_FILE)

    # OURS, for slow machines: see "Coarse to fine". As they stand: whole pictures throughout.
    finer_at: tuple = option((), "stage 1", "shares of the run at which pictures double in side, "
                             "to end at --size, e.g. 0.3,0.6; empty: full size throughout")
    window: int = option(0, "stage 1", "of larger pictures render a random window of this side; "
                         "0: whole pictures")

    # Only stage 2 knows of text: what a caption says is a matter of which latents are likely.
    text: bool = option(False, "text", "learn from the captions, to sample from a --prompt")
    t5: str = option("", "text", "folder of a T5 in transformers' layout; empty: a small text "
                     "encoder is learned")
    context_dim: int = option(1024, "text", "width of that encoder's tokens; T5 has its own")
    transformer_depth: int = option(1, "text", "self- and cross-attention layers after a block")
    guidance: float = option(3.0, "text", "how strongly a prompt is followed; 1: as learned")

    # Learned cameras. First the two networks; then how a subject grows, as shares of the run, so
    # that a run of other length grows alike; then weights of the losses that hold poses in place.
    parts: int = option(0, "moving", "rigid parts whose poses are learned; 0: cameras are known")
    keypoints: int = option(125, "moving", "learned 3D points of each part, a cube number")
    pose_width: int = option(32, "moving", "features of the pose network")
    ellipsoid: bool = option(True, "moving", "subjects start as an ellipsoid, not as fog")
    skin_layout: bool = option(True, "moving", "parts start spread over it, not all alike")
    reach: tuple = option((), "moving", "half axes of what they spread over; empty: the ellipsoid")
    lr_pose: float = option(5e-4, "moving", "learning rate of the pose network")
    lr_parts: float = option(1.0, "moving", "factor on it once one part has become many")
    clip: float = option(0.1, "moving", "largest gradient norm of either network")
    growth: tuple = option((0.03, 0.15), "moving", "shares of the run between which the learned "
                           "density replaces the ellipsoid")
    detail: tuple = option((), "moving", "pairs of shares of the run between which the decoder's "
                           "last levels come in, the finest last, e.g. 0.3,0.4,0.7,0.8")
    split_at: float = option(0.35, "moving", "share of the run after which one part becomes many")
    settle_at: float = option(0.9, "moving", "share of the run after which 2D points are centred "
                              "by their running mean, not by that of the step's frames")
    reprojection_weight: float = option(0.5, "moving", "2D points against projected 3D points")
    equivariance_weight: float = option(0.3, "moving", "2D points under warps of the frame")
    usage_weight: float = option(1.0, "moving", "parts that claim less than half of 1/P")

    # What is drawn and written. PAPER: 64 steps. AMBIGUOUS: how much churn (see edm_sampler).
    sample_steps: int = option(64, "sampling", "steps of the sampler")
    churn: float = option(40.0, "sampling", "S_churn, fresh noise; 0: deterministic")
    n_sheet: int = option(8, "sampling", "objects on the first sheet")
    log_every: int = option(50, "run", "steps between lines of the log")
    save_every: int = option(500, "run", "steps between checkpoints")
    precision: str = option("float32", "run", "float32, or bf16: what the networks compute in")
    compile: bool = option(False, "run", "compile the networks, which takes minutes: for a GPU")

    # No flags: fit_to_data reads these two from the clips.
    focal: float = option(5.7, None, "focal length as a share of the picture's side")
    body: tuple = option((), None, "half axes of the ellipsoid that a moving subject starts as")


# The toy presets keep the paper's method, not its numbers.
PRESETS = {"micro": MICRO | dict(context_dim=64, sample_steps=32, finer_at=(0.4,))}
# Two CPU cores, 7 to 20 minutes. As in the paper, a latent's side is an eighth of its volume's.
# OURS: more noise than EDM's -1.2 and 1.2. Between sigma 80 and 10 it is decided whether a latent
# becomes a chair, a table or a vehicle; EDM hardly trains there, and chairs were rare (results.md).
PRESETS["tiny"] = PRESETS["micro"] | dict(
    size=64, n_objects=128, n_views=24, channels=64, volume_side=32, n_samples=32, unet_channels=64,
    unet_multipliers=(1, 1), P_mean=0.4, P_std=1.6, finer_at=(0.3, 0.6), window=32,
    steps_stage1=2200, steps_stage2=4000)

# Clips without cameras, two CPU cores, 40 minutes. First puppets, who turn. Eq. 1 and 2 weigh 10
# again, for now other losses stand beside them. Group norm, as few clips make a step: batch norm's
# means over so few subjects would jump from step to step.
VIDEO_DECODER = dict(embed_dim=64, channels=64, volume_side=32, norm="group", n_samples=20)
VIDEO_POSES = dict(parts=6, keypoints=27, pose_width=16, lr_pose=2e-3, lr_parts=0.5, clip=1.0)
PRESETS["tiny-video"] = PRESETS["tiny"] | VIDEO_DECODER | VIDEO_POSES | dict(
    growth=(0.24, 0.29), detail=(0.24, 0.29, 0.55, 0.65), split_at=0.35, finer_at=(0.35, 0.8),
    window=16, n_objects=16, n_views=48, lr_stage1=2e-3, betas=(0.9, 0.99), context_dim=64,
    perceptual_weight=10.0, foreground_weight=10.0, unet_multipliers=(1, 2), P_mean=-1.2,
    P_std=1.2, steps_stage1=7000, steps_stage2=1000)
# Then real people, who wave and bend. Nobody there turns, so the ellipsoid may go early, and the
# mean pose be fixed early (settle_at). Measured: docs/results.md.
PRESETS["tiny-clips"] = PRESETS["tiny-video"] | dict(
    window=32, lr_parts=1.0, finer_at=(0.2, 0.6), growth=(0.1, 0.15), split_at=0.2, settle_at=0.3,
    detail=(0.1, 0.15, 0.35, 0.45), pose_width=32, reach=(0.5, 0.75, 0.2))

# One GPU; not measured yet.
PRESETS["small"] = dict(
    n_objects=1024, n_views=24, channels=256, decoder_depth=2, n_samples=64, lr_stage1=1e-3,
    n_sheet=16, unet_channels=96, unet_multipliers=(2, 3), steps_stage1=20_000, steps_stage2=40_000,
    finer_at=(0.2, 0.5))
# PAPER: Tab. 5, a column each. What is not here is as in Settings. These want the paper's data
# and GPUs: here they are to be read, and tests build all of them, on torch's "meta" device.
LONG = dict(log_every=500, save_every=5000)
TABLE_5_TEXT = dict(unet_channels=192, unet_depth=3, text=True, codebooks=256)
PRESETS["paper-tables"] = LONG | dict(
    n_objects=1676, n_views=91, volume_side=128, decoder_depth=2, codebooks=256)
PRESETS["paper-chairs"] = LONG | dict(n_objects=15576, n_views=200)
PRESETS["paper-celebv"] = LONG | TABLE_5_TEXT | dict(
    n_objects=44_400, n_views=373, decoder_depth=2, rows=8192, parts=10, clip_filter=True,
    reprojection_weight=10.0, equivariance_weight=10.0, usage_weight=10.0)
PRESETS["paper-mvimgnet"] = LONG | TABLE_5_TEXT | dict(n_objects=206_990, n_views=30, rows=32768)
PRESETS["paper-objaverse"] = LONG | TABLE_5_TEXT | dict(
    n_objects=300_000, n_views=6, rows=32768, transformer_depth=2, foreground_weight=0.0)

# ---- Settings that cannot work are refused before anything is read or written --------------------
#
# A night's training must not end in the morning with "shapes do not match". So everything that can
# be known from the command line alone is checked first, and what is wrong is told by its flag.

# Least and most of each number, of lists: of each entry. Beyond lie typing errors, divisions by
# zero, empty volumes, training that learns nothing and does not say so, and what no machine can
# hold. Where the least is 0, that means "without it".
SHARE = (0, 1)                               # of a run
POSITIVE = (1e-12, 1e9)
OTHER_BOUNDS = (0, 1e9)                      # of what is not named here: weights, shares, factors
BOUNDS = {
    "size": (4, 4096), "holdout": (0, 1_000_000),
    "max_megapixels": (0.001, 10_000), "max_frames": (3, 10_000_000), "n_objects": (1, 10_000_000),
    "n_views": (1, 100_000), "arc": (0, 180), "embed_dim": (1, 65_536), "channels": (1, 8192),
    "start_side": (1, 512), "volume_side": (1, 512), "latent_side": (1, 512),
    "decoder_depth": (1, 64), "decoder_attention": (1, 512), "codebooks": (0, 65_536),
    "rows": (1, 2**24), "steps_stage1": (1, 10**9), "objects_per_step": (1, 100_000),
    "views_per_step": (1, 1000), "n_samples": (1, 10_000), "lr_stage1": POSITIVE,
    "betas": (0, 0.999999), "finer_at": SHARE, "window": (0, 4096),
    "latent_scale": (1e-6, 1e6), "sigma_data": (1e-6, 1e6), "P_mean": (-20, 20), "P_std": (0, 10),
    "unet_channels": (1, 8192), "unet_multipliers": (1, 64), "unet_depth": (1, 64),
    "unet_attention": (1, 512), "steps_stage2": (1, 10**9), "batch_size": (1, 1_000_000),
    "lr_stage2": POSITIVE, "ema_half_life": POSITIVE, "context_dim": (1, 65_536),
    "transformer_depth": (1, 64), "guidance": (0, 1000), "parts": (0, 100),
    "keypoints": (8, 1000), "pose_width": (1, 1024),
    "reach": (1e-6, 100), "lr_pose": POSITIVE, "clip": POSITIVE, "growth": SHARE, "detail": SHARE,
    "sample_steps": (1, 10_000), "churn": (0, 1e6), "n_sheet": (1, 1000),
    "log_every": (1, 10**9), "save_every": (1, 10**9), "seed": sample.SEEDS, "focal": POSITIVE}
CHOICES = {"norm": ("batch", "group"), "hash_rule": ("spread", "paper"),
           "normalization": ("robust", "meanstd", "none"), "precision": ("float32", "bf16")}
LENGTHS = {"betas": (2,), "growth": (2,), "reach": (0, 3)}   # of lists: how many numbers
WHOLE = ("decoder_attention", "unet_multipliers", "unet_attention")      # lists of whole numbers


def flag(name):
    """The flag of a setting: lr_stage1 -> --lr-stage1."""
    return "--" + name.replace("_", "-")


def check_numbers(settings):
    """Numbers out of their bounds are refused here, each by its flag."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        numbers = value if field.type is tuple else (value,)
        if field.type not in (int, float, tuple):
            continue
        for number in numbers:
            bounds = BOUNDS.get(field.name, OTHER_BOUNDS)
            data.check_number(flag(field.name), number, bounds)
    for name, lengths in LENGTHS.items():
        value = getattr(settings, name)
        if len(value) not in lengths:
            raise BadInput(f"{flag(name)} takes {lengths[-1]} numbers, got {len(value)}")
    for name in ("growth", "detail"):                        # pairs of begin and end
        shares = getattr(settings, name)
        for begin, end in zip(shares[::2], shares[1::2]):
            if begin > end:
                raise BadInput(f"{flag(name)}: what begins at {begin} of the run cannot end at "
                               f"{end}")
    for name in WHOLE:
        if not all(isinstance(number, int) for number in getattr(settings, name)):
            raise BadInput(f"{flag(name)} takes whole numbers, e.g. 1,2")
    if not settings.unet_multipliers:
        raise BadInput("--unet-multipliers: the U-Net needs at least one")
    if settings.holdout == 1:
        raise BadInput("--holdout 1 would leave no view to learn from: 2 or more, or 0 for none")


def check_pictures(settings):
    """Pictures that cannot be halved as often as asked for, or are too small to say anything."""
    halvings = len(settings.finer_at)
    if settings.size % 2 ** halvings:
        raise BadInput(f"--size {settings.size} cannot be halved {halvings} times (--finer-at)")
    smallest = settings.size // 2 ** halvings
    if min(smallest, settings.window or settings.size) < 4:
        raise BadInput("pictures of less than 4 pixels say nothing: a larger --size or --window, "
                       "or a shorter --finer-at")


def check_models(settings):
    """Shapes that do not fit together.

    Both models are built, and the denoiser is called once, on torch's "meta" device: tensors there
    have shapes but no numbers, so that even the paper's sizes take neither memory nor time.
    """
    try:
        with torch.device("meta"):
            decoder = autodecoder.build_decoder(settings, 2)
            vocabulary = ["word"] if settings.text else []
            denoiser = diffusion.build_denoiser(settings, decoder.latent_shape, vocabulary)
            text = denoiser.text([""]) if settings.text else ()
            denoiser(torch.zeros(1, *decoder.latent_shape), torch.ones(1), *text)
    except (ValueError, RuntimeError, TypeError, AssertionError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"these settings do not fit together: {reason}") from None
    # Attention at a side that no level has is not an error of shapes: it would just not be there.
    sides = decoder.sides[1:]
    if settings.decoder_attention and not set(settings.decoder_attention) & set(sides):
        asked = ",".join(map(str, settings.decoder_attention))
        raise BadInput(f"--decoder-attention {asked}: volumes here have sides "
                       f"{', '.join(map(str, sides))}")
    # What is left fades in level by level, from the latent's side to the volume's.
    levels = len(decoder.sides) - 1 - decoder.sides.index(settings.latent_side)
    if len(settings.detail) % 2 or len(settings.detail) > 2 * levels:
        raise BadInput(f"--detail: {len(settings.detail)} numbers, but they are pairs of shares, "
                       f"at most one for each doubling from {settings.latent_side}^3 to "
                       f"{settings.volume_side}^3")


def check_poses(settings):
    """What the pose network needs, where cameras are learned."""
    # It halves its frames four times (autodecoder.KeypointNet).
    if settings.size % 16 or settings.size < 32:
        raise BadInput(f"--size {settings.size}: where cameras are learned it must be 32, 48, ...")
    settings = dataclasses.replace(settings, parts=max(1, settings.parts), body=(1.0, 1.0, 1.0))
    try:
        with torch.device("meta"):
            autodecoder.PoseNet.from_settings(settings)
    except ValueError as error:
        raise BadInput(f"--{error}") from None


def check(settings):
    """Raises BadInput, which names the flag, where settings cannot work."""
    check_numbers(settings)
    check_pictures(settings)
    check_models(settings)


def fields_of(*groups):
    """Names of the settings in these groups."""
    return [field.name for field in dataclasses.fields(AllSettings)
            if field.metadata["group"] in groups]


# What stage1.pt is made with. Stage 2 takes these from there: a decoder cannot be given another
# shape afterwards, and other data would be objects that it has no embeddings for.
STAGE1_GROUPS = ("data", "decoder", "stage 1", "moving", None)


def idle_flags(args, settings, learned):
    """Yields (names of flags, why they would change nothing).

    Such flags are refused, not ignored: whoever gives one expects it to do something, and would
    otherwise compare two runs that are the same.
    learned: whether cameras are learned, not known
    """
    if args.stage == 1:
        yield fields_of("stage 2", "text", "sampling"), "is of stage 2: leave it out here"
    if not settings.text:
        yield fields_of("text"), "goes with --text"
    if settings.t5:
        yield ["context_dim"], "is the width of our own text encoder; T5 has its own"
    if args.stage == 2:
        return                               # the rest is as in stage 1: see settings_of_stage2
    if not settings.codebooks:
        yield ["rows", "hash_rule"], "goes with --codebooks"
    if args.data != "synthetic":
        yield ["arc"], "is for the built-in objects, without --data"
    if args.data != "puppets":
        yield ["shared_colours"], "goes with --data puppets"
    if args.data in ("synthetic", "puppets"):
        yield ["clip_filter", "as_clips"], "is for a folder of clips"
        yield ["max_megapixels", "max_frames"], "is for a folder of photos or clips"
    else:
        yield ["n_objects", "n_views"], "is for built-in objects; of a folder all are taken"
    if not learned:
        yield fields_of("moving"), "is for clips, or --cameras learned; here cameras are known"
    if learned and settings.parts < 2:
        yield ["skin_layout", "reach", "split_at", "lr_parts", "usage_weight"], "needs --parts"


def refuse_idle_flags(args, settings, given, learned):
    """given: names of the settings that the command line holds."""
    for names, why in idle_flags(args, settings, learned):
        for name in names:
            if name in given:
                raise BadInput(f"{flag(name)} {why}")
    if args.steps is not None and {"steps_stage1", "steps_stage2"} & given:
        raise BadInput("--steps is of each stage that runs: leave out --steps-stage1 and -stage2")
    if args.decoder and args.stage != 2:
        raise BadInput("--decoder goes with --stage 2: it takes the place of stage 1")
    if args.decoder and not args.out:
        raise BadInput("--decoder goes with --out: where the new run is to be")


# ---- Coarse to fine: full resolution at the price of a low one (OURS) ----------------------------
#
# On a GPU one would render whole pictures throughout, as the paper does. On two CPU cores most of a
# step's time goes into samples on rays, so the toy presets begin with small pictures, and render
# only a window of the large ones. A coarse step is not wasted: where an object stands, how large it
# is and which colours it has, small pictures tell as well, at a fraction of the rays.


def picture_size(settings, step):
    """Side of the pictures at a step. OURS: coarse first, so that the first steps cost little."""
    share = step / settings.steps_stage1
    # Each doubling that is still to come halves the picture once: 16, 32, then 64 for two of them.
    still_to_come = [at for at in settings.finer_at if share < at]
    return settings.size // 2 ** len(still_to_come)


def random_windows(images, masks, intrinsics, side, generator):
    """A random side x side window of every picture (B, V, C, H, W), as a picture of its own.

    OURS: a window is a camera with other intrinsics, so full resolution costs what `side` costs,
    and Eq. 1 still sees neighbouring pixels, as it would not with scattered rays.
    returns images, masks (B, V, C, side, side), intrinsics (B, V, 4)
    """
    B, V, _, size, _ = images.shape
    corner = torch.randint(size - side + 1, (B, V, 2), generator=generator)       # x, y
    images_out = images.new_empty(B, V, 3, side, side)
    masks_out = masks.new_empty(B, V, 1, side, side)
    for b in range(B):
        for v in range(V):
            x, y = corner[b, v].tolist()
            images_out[b, v] = images[b, v, :, y:y + side, x:x + side]
            masks_out[b, v] = masks[b, v, :, y:y + side, x:x + side]
    # In pixels: the focal lengths stay, the centre moves by the corner. In shares of the new side:
    focal = intrinsics[..., :2] * size / side
    centre = (intrinsics[..., 2:] * size - corner) / side
    return images_out, masks_out, torch.cat([focal, centre], -1)


def draw_coarse_to_fine(settings, dataset, frames, state):
    """draw_photos, with pictures as large as the step wants them, or windows of them."""
    # First smaller, then cut out: the window then has `window` pixels of the size that it is at.
    images, masks = dataset.batch(frames, picture_size(settings, state.step))
    intrinsics = dataset.intrinsics[frames]
    if 0 < settings.window < images.shape[-1]:
        images, masks, intrinsics = random_windows(
            images, masks, intrinsics, settings.window, state.generator)
    return images.to(state.device), masks.to(state.device), intrinsics.to(state.device)


# ---- Subjects that move, cameras that nobody measured (Sec. 3.2, App. B.1) -----------------------
#
# The loop differs from train_stage1 in one line: where cameras come from. A pose network looks at
# the frame, sees where each part's 3D points are, and PnP makes of it a camera for each part
# (autodecoder.PoseNet); the loss of the pictures then teaches decoder and poses at once.
#
# The rest of this section is what keeps that from going wrong. TRAP: shape and pose explain the
# same pictures. A subject that is seen in one way only may as well be painted on a board, so poses
# need never be learned; and once they are, nothing holds them in place: turn all of them and the
# volume together, and every picture stays as it was. So
#
#     the first share of a run    an ellipsoid that cannot become a board is painted, coarsely; that
#                                 the paint moves from frame to frame teaches poses to turn
#     growth, detail              then learned density and fine levels come in, while poses rest
#     split_at                    one part becomes many: arms come to move by themselves
#     centre, distance            losses that keep all poses together from drifting


def measure_body(dataset):
    """Half axes (x, y, z) of the ellipsoid that subjects start as, from the training masks.

    OURS: as wide as what is nearly always covered, without the limbs. A wider one would have to be
    painted black at its rims, and could then not turn.
    """
    frames = torch.nonzero(~dataset.heldout)[:, 0]                                   # (frames,)
    covered = 0
    for part in frames.split(4096):          # of a cache there may be more than fit in memory
        _, masks = dataset.batch(part, 32)                                           # in [0, 1]
        covered = covered + masks.sum((0, 1))                                        # (32, 32)
    covered = covered / len(frames)
    # Where no pixel is covered in half of the frames, those that are covered most often count.
    solid = (covered > min(0.5, 0.9 * float(covered.max()))).float()
    position = (torch.arange(32) + 0.5) / 16 - 1                     # of pixels, -1 to 1
    half_axes = []
    for profile in (solid.sum(0) / solid.sum(), solid.sum(1) / solid.sum()):         # x, y
        mean = (profile * position).sum()
        variance = (profile * position**2).sum() - mean**2
        # A filled ellipse of half axis a has variance a^2 / 4 along it.
        half_axes.append(float((2 * variance.sqrt()).clamp(0.2, 0.95)))
    x, y = half_axes
    return x, y, min(x, y)                    # no frame tells the depth: the smaller of the two


def fit_to_data(settings, cameras, dataset):
    """Settings that follow from the data: whether cameras are learned, the lens, the ellipsoid.

    cameras: what --cameras said, or None
    """
    if cameras != "learned" and not dataset.moving:
        return dataclasses.replace(settings, parts=0)
    check_poses(settings)
    parts = 1                                 # of a rigid object, cameras unknown or not
    if dataset.moving:
        parts = max(1, settings.parts)
    focal = float(dataset.intrinsics[:, 0].median())
    return dataclasses.replace(settings, parts=parts, focal=focal, body=measure_body(dataset))


def start_moving(settings, decoder, posenet, device="cpu"):
    """As start_stage1, with the pose network and a second learning rate for it."""
    state = start_stage1(settings, decoder, device)
    state.posenet = posenet.to(device)
    # One optimizer, two groups: each has its own rate (set_moving_rates) and its own clipping.
    groups = [{"params": decoder.parameters()}, {"params": posenet.parameters()}]
    state.optimizer = torch.optim.Adam(groups, settings.lr_stage1, betas=settings.betas, fused=True)
    return state


def ramp(share, begin, end):
    """0 until begin, 1 from end on, and in between a straight line."""
    return min(1.0, max(0.0, (share - begin) / max(1e-9, end - begin)))


def set_moving_rates(settings, state, share):
    """Learning rates of the decoder and of the pose network, which rests now and then."""
    decoder_group, pose_group = state.optimizer.param_groups
    decoder_group["lr"] = settings.lr_stage1 * (1 - share)
    begin, end = settings.growth
    # OURS: poses rest while density and detail come in: then both fit the poses, not the poses
    # them. And at the very start, while the ellipsoid has no paint yet that could tell a turn.
    rests = share < begin / 8 or begin <= share < end
    pose_group["lr"] = 0.0 if rests else settings.lr_pose * (1 - share)
    # OURS: many parts can bend a body to look turned: what was learned of turning fades, unless
    # poses learn slowly from now on.
    if int(state.posenet.active) > 1:
        pose_group["lr"] *= settings.lr_parts


def follow_schedule(settings, state):
    """Sets what changes from step to step: learning rates, and how a moving subject grows.

    OURS: the ellipsoid stays, and is only painted, until turning has been learned from how the
    paint moves. It is painted coarsely (autodecoder.faded). Released at once, the volume becomes a
    flat cut-out that can no longer turn. Measured: docs/results.md.
    """
    share = state.step / settings.steps_stage1
    begin, end = settings.growth
    state.autodecoder.growth.fill_(ramp(share, begin, end))            # of the learned density
    # settings.detail has a pair of shares for each of the last levels; earlier ones are always in.
    last_levels = len(settings.detail) // 2
    for i in range(last_levels):
        level_begin, level_end = settings.detail[2 * i], settings.detail[2 * i + 1]
        state.autodecoder.detail[i - last_levels] = ramp(share, level_begin, level_end)
    set_moving_rates(settings, state, share)
    # PAPER (the predecessor): one part first, then its weights are copied to all parts. Many parts
    # from the start could bend a body so that it looks turned, and turning would not be learned.
    if share >= settings.split_at and int(state.posenet.active) < settings.parts:
        state.posenet.split()


def learned_cameras(settings, state, dataset, frames):
    """What the pose network sees in frames (B, V): cameras (B, V, P, 4, 4), and its own losses,
    weighted and added up.

    It looks at whole frames, always of the same size, however small the pictures are that the step
    renders, or the windows of them: where an arm is cannot be told from a piece of it.
    """
    size = min(64, dataset.images.shape[1])                                      # PAPER: 64
    pictures, _ = dataset.batch(frames.flatten(), size)                          # (B V, 3, 64, 64)
    pictures = pictures.to(state.device)
    # 2D points count by how far they are from their mean, which is that of the step's few frames.
    # Late in the run it is the running mean, as when sampling, so that poses no longer hang on
    # which frames happen to be in a step together.
    settled = state.step > settings.settle_at * settings.steps_stage1
    try:
        cameras, points2d, losses = state.posenet(pictures, settled=settled)
    except torch.linalg.LinAlgError:                      # points that are not finite
        raise Diverged("stage 1: poses are not finite", state.step + 1) from None
    # OURS: of one view of each object, or this would cost as much as all the rest.
    views = frames.shape[1]
    equivariance = autodecoder.equivariance_loss(
        state.posenet.points2d, pictures[::views], points2d[::views], state.generator)
    # OURS: centre and distance keep the poses of all frames together from drifting (a gauge): weak
    # springs, for a drift costs the pictures nothing and so meets no other resistance.
    loss = (settings.reprojection_weight * losses["reprojection"]
            + 1.0 * losses["centre"] + 0.5 * losses["distance"]
            + settings.equivariance_weight * equivariance)
    return cameras.unflatten(0, frames.shape), loss


def train_moving(settings, dataset, state, features=autodecoder.pixels_and_gradients,
                 draw=draw_photos):
    """train_stage1 for what moves: cameras are not given, but learned together with the decoder.

    A volume has P more channels: how much each voxel follows each part (skinning). The gradient of
    the pictures reaches poses through render_moving: a pose is better if the volume, seen from
    there, is more like the frame.
    """
    while state.step < settings.steps_stage1:
        follow_schedule(settings, state)
        k = next_objects(settings, dataset, state)                                    # (B,)
        frames = draw_frames(dataset, k, settings.views_per_step, state.generator)    # (B, V)
        images, masks, intrinsics = draw(settings, dataset, frames, state)
        cameras, pose_loss = learned_cameras(settings, state, dataset, frames)    # (B, V, P, 4, 4)

        volume = state.autodecoder(k.to(state.device))                        # (B, 4 + P, D, H, W)
        rgb, occupancy = render.render_moving(volume, cameras, intrinsics, images.shape[-1],
                                              settings.n_samples, state.generator)
        loss = pose_loss + stage1_loss(settings, features, rgb, occupancy, images, masks)
        if cameras.shape[2] > 1:
            # OURS: a part that nothing follows gets next to no gradient, and would stay idle.
            loss = loss + settings.usage_weight * autodecoder.usage_loss(volume)

        state.optimizer.zero_grad()
        loss.backward()
        # PnP's gradient can be large where points nearly coincide. Each network is clipped by
        # itself: one bad pose then costs the decoder nothing.
        for group in state.optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], settings.clip)
        state.optimizer.step()
        state.step += 1
        yield loss.detach(), (rgb.detach() - images).square().mean()


def score_mean_frame(dataset):
    """PSNR of held-out frames, dB, where each clip's mean training frame is the prediction.

    What anything that is learned must beat: of a subject that hardly moves it is high, and a PSNR
    alone does not tell whether poses were found.
    """
    size = dataset.images.shape[1]
    psnr = []
    for k in range(dataset.n_objects):
        training, _ = dataset.batch(dataset.frames_of(k, heldout=False), size)
        heldout, _ = dataset.batch(dataset.frames_of(k, heldout=True), size)
        error = (heldout - training.mean(0)).square().flatten(1).mean(1)
        psnr.append(-10 * error.clamp(min=1e-10).log10())    # at most 100 dB
    return float(torch.cat(psnr).mean())


# ---- Text (Sec. 3.3, App. B.2) -------------------------------------------------------------------
#
# The same diffusion, but the denoiser also reads what the object's caption says. Stage 1 knows
# nothing of it, so text can be added to any run whose objects have captions.

TEXT_DROPOUT = 0.1            # OURS: share of captions left out in training; the paper gives none


def vocabulary_of(captions):
    """All words of the captions, in order: what the small text encoder knows.

    In order, as the number of a word is its row in the encoder's table: a set has another order in
    every process, and a checkpoint's rows would then belong to other words.
    """
    found = set()
    for caption in captions:
        found.update(diffusion.words(caption))
    if not found:
        raise BadInput("--text: no object of stage 1 has a caption; add captions.txt, with a line "
                       "NAME: CAPTION for each, to the data and run stage 1 again")
    return sorted(found)


def t5_tokens(settings, captions, folder, device):
    """PAPER: T5 is frozen, so it runs once over all captions; its tokens are kept in text.pt.

    T5-11B is far larger than all else here: a step of training could not wait for it.
    returns an encoder of those captions and the empty one, as WordEncoder, and its tokens' width
    """
    path = folder / "text.pt"
    prompts = sorted({"", *captions})
    kept = None
    # What an earlier run left is good if it is whole, of the same T5 and of the same captions.
    if path.exists():
        kept = sample.load_weights("--t5", path, "what --t5 left there: delete it")
        if kept.get("digest") != sample.content_digest(kept):
            kept = None
    if kept is None or (kept["t5"], kept["prompts"]) != (settings.t5, prompts):
        encoder = diffusion.T5Encoder(settings.t5, device)
        pairs = [encoder([prompt]) for prompt in prompts]
        kept = {"t5": settings.t5, "prompts": prompts,
                "tokens": torch.cat([tokens for tokens, _ in pairs]),
                "mask": torch.cat([mask for _, mask in pairs])}
        save(path, kept)
    row_of = {prompt: row for row, prompt in enumerate(prompts)}

    def encode(given):
        rows = [row_of[prompt] for prompt in given]
        return kept["tokens"][rows].to(device), kept["mask"][rows].to(device)

    return encode, kept["tokens"].shape[-1]


def caption_tokens(state, k):
    """Tokens (B, 32, width) and mask (B, 32) of the captions of objects k (B,).

    PAPER: some captions are left out at random, so that the model learns the unconditional case,
    too, which classifier-free guidance needs.
    """
    dropped = torch.rand(len(k), generator=state.generator) < TEXT_DROPOUT
    captions = []
    for object_number, is_dropped in zip(k.tolist(), dropped.tolist()):
        captions.append("" if is_dropped else state.captions[object_number])
    return state.encode(captions)


def train_text(settings, state):
    """train_stage2 where the denoiser also hears what each object's caption says."""
    while state.step < settings.steps_stage2:
        share = state.step / settings.steps_stage2
        state.optimizer.param_groups[0]["lr"] = settings.lr_stage2 * (1 - share)
        k = torch.randint(len(state.latents), (settings.batch_size,), generator=state.generator)
        tokens, mask = caption_tokens(state, k)               # (B, 32, width), (B, 32)

        # edm_loss knows nothing of text: it gets a denoiser that has been told already.
        def denoise(x, sigma):
            return state.model(x, sigma, tokens, mask)

        loss = diffusion.edm_loss(denoise, state.latents[k], settings.sigma_data,
                                  state.generator, settings.P_mean, settings.P_std)
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        state.step += 1
        diffusion.ema_update(state.average, state.model, state.step, settings.ema_half_life)
        yield loss.detach()


# ---- Log and metrics -----------------------------------------------------------------------------
#
# log.csv holds the course of a run, a row now and then; metrics.json its results, flat numbers and
# all settings, so that any two runs can be compared (tests/evaluate.py --compare). Look at the PSNR
# of stage 1, not at its loss: the loss changes its meaning when pictures grow. The loss of stage 2
# says even less: most of it is noise that nobody could predict, so it soon stands still, while
# samples go on getting better.

LOG_COLUMNS = ["stage", "step", "loss", "psnr", "ms_per_step"]


class Diverged(BadInput):
    """Numbers are no longer finite: mostly, the learning rate is too high."""

    def __init__(self, what, step):
        super().__init__(f"{what} at step {step}")


@contextlib.contextmanager
def telling_what_is_kept(path):
    """Around a loop: where it diverges, the line also says what is left, `path` or nothing."""
    try:
        yield
    except (Diverged, torch.linalg.LinAlgError) as error:
        if not isinstance(error, Diverged):                  # for a sheet, or poses to be saved
            error = "stage 1: poses are not finite"
        kept = "nothing had been saved"
        if path.exists():
            kept = f"the last good checkpoint is kept, {path}"
        raise BadInput(f"{error}; {kept}; try a lower learning rate") from None


def read_rows(path):
    """Rows of log.csv that are whole, as lists of words; what is damaged is left out: it can be
    measured again."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        words = line.strip().split(",")
        try:
            int(words[0]), int(words[1]), float(words[2]), float(words[3] or 0), float(words[4])
        except (ValueError, IndexError):
            continue                                     # the header, or a row that was cut off
        if len(words) == len(LOG_COLUMNS) and line.endswith("\n"):
            rows.append(words)
    return rows


def earlier_rows(path, stage, step):
    """Rows of log.csv up to `step` of `stage`; later ones, of a run that is redone, are dropped."""
    if stage == 1 and step == 0:
        return []                                            # a new run: the file begins anew
    return [row for row in read_rows(path) if (int(row[0]), int(row[1])) <= (stage, step)]


class Log:
    """One line on the screen and one row in log.csv, every log_every steps.

    means: what an earlier Log's means() gave, of a run that goes on; a line then has the means that
    it would have had.
    """

    def __init__(self, folder, stage, step, steps, log_every, means=None):
        self.path = folder / "log.csv"
        rows = earlier_rows(self.path, stage, step)
        # TRAP: opened for writing, the file would be empty until the first row: whoever is killed
        # before that has lost all earlier ones.
        with data.writing(self.path) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([LOG_COLUMNS] + rows)
        self.stage = stage
        self.steps = steps
        self.log_every = log_every
        self.begin(step)
        if means is not None:
            self.since = means["since"]
            self.start = time.time() - means["seconds"]
            self.losses = list(means["losses"])
            self.errors = list(means["errors"])

    def means(self):
        """What a checkpoint keeps of the line that is not yet written."""
        return {"since": self.since, "seconds": time.time() - self.start,
                "losses": self.read_losses(), "errors": [float(error) for error in self.errors]}

    def read_losses(self):
        """The losses since the last line, as numbers."""
        losses = [float(loss) for loss in self.losses]
        for number, loss in enumerate(losses, self.since + 1):
            # Once a weight is NaN, so are all numbers after it: to go on would waste the night.
            if not math.isfinite(loss):
                raise Diverged(f"stage {self.stage}: the loss is {loss}", number)
        return losses

    def begin(self, step):
        """Starts the next line's means."""
        self.since = step
        self.start = time.time()
        self.losses = []
        self.errors = []

    def add(self, step, loss, error=None):
        """Takes a step's loss and, of stage 1, the mean squared error of its colours."""
        # Kept as they are, and read when a line is due: reading a number waits for the device.
        self.losses.append(loss)
        if error is not None:
            self.errors.append(error)
        if step % self.log_every == 0 or step == self.steps:
            self.write(step)
            self.begin(step)

    def write(self, step):
        """The means since the last line: loss, PSNR of stage 1's pictures, time a step and left."""
        losses = self.read_losses()
        ms = 1000 * (time.time() - self.start) / (step - self.since)
        loss = sum(losses) / len(losses)
        psnr_cell, psnr_text = "", ""
        if self.errors:
            # Of the mean error, and at most 100 dB: a perfect picture has no finite PSNR.
            error = sum(float(error) for error in self.errors) / len(self.errors)
            psnr = -10 * math.log10(max(1e-10, error))
            psnr_cell, psnr_text = f"{psnr:.3f}", f"psnr {psnr:.1f} dB | "
        self.append([self.stage, step, f"{loss:.6g}", psnr_cell, f"{ms:.1f}"])
        # The rate of the last steps times those to come: too low while pictures are still to grow.
        minutes, seconds = divmod(int(ms / 1000 * (self.steps - step)), 60)
        head = f"stage {self.stage} | {step}/{self.steps} | loss {loss:.4f} | "
        print(f"{head}{psnr_text}{ms:.0f} ms/step | eta {minutes}m{seconds:02d}s", flush=True)

    def append(self, row):
        """Adds a row to the file, which is closed again: so it can be watched, and a full disk
        fails here, not at some later time."""
        try:
            with open(self.path, "a", newline="") as file:
                csv.writer(file).writerow(row)
        except OSError as error:
            raise BadInput(f"{self.path} cannot be written: {error.strerror}") from None


def plot_log(folder):
    """Draws log.csv as loss.png: loss of both stages, PSNR of stage 1's own pictures."""
    rows = [dict(zip(LOG_COLUMNS, row)) for row in read_rows(folder / "log.csv")]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3), constrained_layout=True)
    titles = ["stage 1: loss", "stage 1: psnr of training views, dB", "stage 2: loss"]
    for axis, stage, key, title in zip(axes, "112", ("loss", "psnr", "loss"), titles):
        kept = [row for row in rows if row["stage"] == stage and row[key]]
        axis.plot([int(row["step"]) for row in kept], [float(row[key]) for row in kept])
        axis.set_title(title)
        axis.set_xlabel("step")
    sample.save_figure(folder / "loss.png", figure, dpi=90)


# Beginnings of the names of numbers that say how good samples are: of no use for another stage 2.
OF_SAMPLES = ("fd", "kd", "cov", "mmd", "nna", "memorization", "debris", "empty", "text_",
              "features", "samples", "views", "seconds_per_sample", "seconds_evaluation",
              "seconds_sampling")


def peak_memory_gib():
    """Most memory that this process has had so far; nan where the system does not tell."""
    try:
        import resource                                      # not on Windows
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss        # TRAP: its unit differs
    in_bytes = peak if sys.platform == "darwin" else 1024 * peak
    return round(in_bytes / 2**30, 2)


def read_metrics(folder):
    """What FOLDER/metrics.json holds; nothing where there is none, or a damaged one: it can be
    measured again, unlike weights, so training does not stop for its sake."""
    try:
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return metrics if isinstance(metrics, dict) else {}


def add_metrics(folder, settings, drop=(), **values):
    """Adds flat numbers to FOLDER/metrics.json, beside all settings.

    drop: beginnings of the names of older numbers that are no longer true
    """
    path = Path(folder) / "metrics.json"
    metrics = {}
    for name, value in read_metrics(folder).items():
        if not name.startswith(tuple(drop)):
            metrics[name] = value
    metrics |= values
    total = 0.0
    for name in ("seconds_data", "seconds_stage1", "seconds_stage2", "seconds_sampling"):
        seconds = metrics.get(name)
        if isinstance(seconds, (int, float)):                # of a damaged file it may be anything
            total += seconds
    metrics["seconds_total"] = round(total, 1)
    metrics["settings"] = dict(vars(settings))
    with data.writing(path) as temporary:
        temporary.write_text(json.dumps(metrics, indent=2) + "\n")


# ---- Saving and resuming -------------------------------------------------------------------------
#
# A run that is stopped and goes on with --resume gives the same bits, on one CPU, as one that never
# stopped: weights, optimizer, random numbers, the step, the objects whose turn is still to come and
# the means of the log's next line are all in the checkpoint. Steps after the last checkpoint are
# done again; whoever stops it by Ctrl-C loses none.
#
# Any of these left out would not be noticed: training goes on, only a little worse. Without Adam's
# means the first steps are as large as those of a new run; without the state of the generators the
# same objects and noises come twice. A test compares the bits.


def fingerprint(model):
    """A short hash of all weights: tells stage 2 which stage 1 its latents came from.

    TRAP: another stage 1, even of the same settings, has other latents. A denoiser of the one and a
    decoder of the other make fog, and nothing crashes.
    """
    digest = hashlib.sha256()
    # Sorted, names included: the same weights have the same hash, and swapped ones another.
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def refuse_divergence(stage, step, *models):
    """Before what they make is drawn or saved: a finite loss may have had gradients that are not,
    and weights that are NaN must not replace good ones."""
    for model in models:
        for name, value in model.named_parameters():
            if not torch.isfinite(value).all():
                raise Diverged(f"stage {stage}: {name} is not finite", step)


def for_resuming(state):
    """What going on needs besides: Adam's means, and where randomness comes from.

    The loops draw from the state's own generator; what draws without one (weights of new modules,
    the noise of PoseNet.split) uses torch's, which is "global".
    """
    saved = {"optimizer": state.optimizer.state_dict(), "random": randomness(state),
             "seconds": state.seconds, "log": state.log.means()}
    if processes() > 1:
        saved["others"] = state.others                       # see gather_others
    return saved


def randomness(state):
    """Where a process's random numbers stand."""
    return {"generator": state.generator.get_state(), "global": torch.get_rng_state()}


def restore_randomness(state, saved):
    """After this the same random numbers come as in a run that was never stopped."""
    state.generator.set_state(saved["generator"])
    torch.set_rng_state(saved["global"])


def same_settings(ours, theirs, groups, path, unknown=()):
    """Resuming needs the settings that the checkpoint was made with; says which one differs.

    A checkpoint from before a setting existed was made with what is its default now.
    unknown: names of settings that are not known yet, as the data has not been read
    """
    # How long, and how often it is written down, may change: "--resume --steps 4000" goes on.
    free = {"steps_stage1", "steps_stage2", "log_every", "save_every", *unknown}
    for name in fields_of(*groups) + ["seed"]:
        a = getattr(ours, name)
        b = theirs.get(name, getattr(AllSettings, name))
        if isinstance(b, list):                              # as other programs write tuples
            b = tuple(b)
        if name not in free and a != b:
            raise BadInput(f"{flag(name)} is {a} here but {b} in {path}; give the same flags to go "
                           "on, or another --out to start anew")


def save(path, checkpoint):
    """Writes a checkpoint, and in it a hash of all that it holds: see sample.load_checkpoint.

    checkpoint: a dict of tensors and plain types, so that torch's safe loader can read it
    """
    save_tensors(path, checkpoint | {"digest": sample.content_digest(checkpoint)})


def save_tensors(path, content):
    """torch.save, but the earlier file stays until the new one is whole (data.writing)."""
    # By way of memory. TRAP: where torch writes the file itself and the disk is full, it raises one
    # error while it handles another, and may end the program.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with data.writing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def is_due(settings, step, steps):
    """Whether a checkpoint is written after this step."""
    return step % settings.save_every == 0 or step == steps


# ---- One run in a folder -------------------------------------------------------------------------
#
# Two runs that write into one folder would leave a mixture of both, and neither would notice. So
# each holds a lock on it. And what a run of hours has left must not hang on a flag that somebody
# forgets: what would be replaced is kept under another name.

try:
    import fcntl                                             # Unix
except ImportError:
    fcntl = None
try:
    import msvcrt                                            # Windows
except ImportError:
    msvcrt = None


def take_lock(file):
    """Whether the lock on an open file is ours now. The system takes it back when the process ends,
    however it ends: a crash leaves a file behind, but no lock."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass                             # some network disks know no locks: it goes without
    elif msvcrt is not None:
        file.seek(1_000_000)                 # TRAP: nobody else could read a byte that is locked
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        except OSError:
            pass                             # as above
    return True


@contextlib.contextmanager
def alone_in(folder):
    """Around a whole run: makes the folder, and refuses one that another run is writing into."""
    data.make_folder(folder)
    with open(folder / "lock", "a+b", buffering=0) as file:
        if not take_lock(file):
            file.seek(0)
            holder = file.read(200).decode(errors="replace").strip() or "another process"
            raise BadInput(f"{folder} is in use by {holder}: wait for it, or choose another --out")
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}".encode())
        except OSError as error:
            raise BadInput(f"{file.name} cannot be written: {error.strerror}") from None
        yield


def absolute_source(source):
    """Where data is, whatever folder one is in later: an absolute path; or what makes it up."""
    if source in ("synthetic", "puppets"):
        return source
    return str(Path(source).resolve())


def source_in(folder):
    """The source of the run in a folder, as absolute_source gives it; None where there is no run,
    and "" where nobody knows."""
    source = read_metrics(folder).get("source")
    if isinstance(source, str):
        return source
    path = folder / "stage1.pt"
    if not path.exists():
        return None
    try:
        return sample.read_checkpoint(path).get("source", "")
    except BadInput:
        return ""


def default_out(preset, source):
    """runs/PRESET-NAME, where NAME is the data's. Where that holds a run on other data of the same
    name, the first of runs/PRESET-NAME-2, -3, ... that does not."""
    first = f"{preset}-{Path(source).name}"
    for number in itertools.count(1):
        folder = Path("runs") / (first if number == 1 else f"{first}-{number}")
        if source_in(folder) in (None, source):
            return folder


def claim(folder, settings, source):
    """Notes whose data a folder is for: see default_out."""
    if source_in(folder) is None:
        add_metrics(folder, settings, source=source)


RUN_FILES = ("stage1.pt", "stage2.pt", "log.csv", "metrics.json")


def aside(path, number):
    """stage1.pt -> stage1.old1.pt."""
    return path.with_name(f"{path.stem}.old{number}{path.suffix}")


def keep_aside(folder, moved=(), copied=()):
    """Gives files of a run other names, the same free number for all; those copied stay, too."""
    moved = [folder / name for name in moved if (folder / name).exists()]
    copied = [folder / name for name in copied if (folder / name).exists()]
    if not any(path.suffix in (".pt", ".csv") for path in moved + copied):
        return                                               # a claim alone, and no run yet
    number = 1
    while any(aside(folder / name, number).exists() for name in RUN_FILES):
        number += 1
    # Copies first: they may find the disk full, and then all is as it was.
    for path in copied:
        with data.writing(aside(path, number)) as temporary:
            shutil.copyfile(path, temporary)
    for path in moved:
        os.replace(path, aside(path, number))
    names = [f"{path.name} -> {aside(path, number).name}" for path in moved + copied]
    print(f"kept    | of the earlier run in {folder}: {', '.join(names)}")


# ---- On a GPU ------------------------------------------------------------------------------------
@contextlib.contextmanager
def sound_convolutions(precision, device):
    """Within, gradients of convolutions can be relied on.

    TRAP: on CPUs torch 2.13 takes them from oneDNN. In bfloat16 that of a 3D convolution of 2^3
    voxels contains memory that nobody has written: nan, now and then. Torch's own are slower.
    """
    was = torch.backends.mkldnn.enabled
    if precision == "bf16" and torch.device(device).type == "cpu":
        torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = was


@contextlib.contextmanager
def sped_up(settings, network, device):
    """Within, the network's forward computes as --precision and --compile say.

    bfloat16 has float32's range, and 8 bits of its precision: enough between layers. Weights,
    losses, cameras, places of samples and the sampler's x stay float32.
    """
    forward = network.forward
    if settings.compile:
        forward = torch.compile(forward)

    def in_bf16(*arguments):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            answer = forward(*arguments)
        return answer.float()

    inner = in_bf16 if settings.precision == "bf16" else forward
    network.forward = inner
    if processes() > 1:
        network.forward = averaging(network, inner, device)
    try:
        with sound_convolutions(settings.precision, device):
            yield
    finally:
        del network.forward                              # the class's own is back


# ---- Many GPUs, many machines --------------------------------------------------------------------
#
#     torchrun --nproc_per_node=4 train.py ...      all flags mean what they mean to one process
#
# torchrun starts this program four times, a process for each GPU, and tells each in its environment
# which one it is. All have the same weights. Each draws its share of a step's objects, by a random
# stream of its own, and torch's DistributedDataParallel averages the gradients of all: so all take
# the same step, the one that a single process would take with all of these objects (on CPUs but for
# batch norm, which there takes each share's own mean).
#
# The first process, rank 0, does what one alone would do, with all files, words and pictures. The
# others help with the steps (assist), and neither write nor speak. TRAP: what is exchanged must be
# exchanged by all, in the same order; whoever is left out of one, or comes to another, waits for
# ever. So there are these and no others:
#
#     tell, told      before a stage, what it is: after all that may be refused
#     averaging       once, the weights; then the gradients, in loss.backward(); and on GPUs the
#                     means of batch norm, in forward
#     mean_of_all     after a step, its loss, for the log
#     after_step      then whether to stop, and what a checkpoint needs of each process
#
# Where one ends, its connections close, and so all end. SIMPLIFIED: each process has all frames, or
# maps all of a cache, and all latents; and all machines see the same data and the same --out.


def processes():
    """How many there are. One, without torchrun: then nothing below does anything."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """The number of this process among them, from 0 on."""
    return int(os.environ.get("RANK", 0))


def own_stream(seed, name):
    """sample.stream, another one in each process: were they the same, all would learn the same from
    the same objects. The first one has that of a process alone."""
    if rank() > 0:
        name = f"{name} rank {rank()}"
    return sample.stream(seed, name)


def share_of(settings):
    """The settings for the loops: of each step, the part of this process. All parts are equal, or
    the mean of their gradients would not be that of the objects."""
    return dataclasses.replace(
        settings, objects_per_step=settings.objects_per_step // processes(),
        batch_size=settings.batch_size // processes())


def check_processes(args, settings, learned):
    """Refuses what several processes cannot share; learned: whether cameras are learned."""
    divided = []
    if args.stage != 2:
        divided.append("objects_per_step")
    if args.stage != 1:
        divided.append("batch_size")
    for name in divided:
        value = getattr(settings, name)
        if value % processes():
            raise BadInput(f"{flag(name)} {value} cannot be divided among {processes()} processes")
    # The pose network takes 2D points from their mean over a step's frames, and keeps a running one
    # (PoseNet.mean_points): each process would have means of its own.
    if processes() > 1 and learned and args.stage != 2:
        raise BadInput("cameras are learned by one process alone: run stage 1 without torchrun")


def own_device(name):
    """sample.choose_device; of several processes on a machine with GPUs, each has its own one."""
    if processes() > 1 and name.startswith("cuda:"):
        raise BadInput(f"--device {name}: each process takes a GPU of its own; leave it out")
    if processes() > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        here = int(os.environ["LOCAL_WORLD_SIZE"])           # processes on this machine
        gpus = torch.cuda.device_count()
        if here > gpus:
            raise BadInput(f"{here} processes, but this machine has only {gpus} GPUs: torchrun "
                           f"--nproc_per_node={gpus}, or --device cpu")
        name = "cuda:" + os.environ["LOCAL_RANK"]
        torch.cuda.set_device(name)
    return sample.choose_device(name)


@contextlib.contextmanager
def together():
    """Around a whole run: the processes meet, and part."""
    if processes() == 1:
        yield
        return
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    data.STOP.start = f"torchrun --nnodes={machines} --nproc_per_node={here}"
    backend = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        backend = "cpu:gloo,cuda:nccl"
    # A day: the others wait while the first one reads photos, draws and scores.
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    try:
        yield
    except RuntimeError as error:
        # How one that waits hears that another has ended. Gloo's error is a plain RuntimeError:
        # only its text tells.
        if not isinstance(error, dist.DistError) and "peer" not in str(error):
            raise
        if rank() > 0:
            sys.exit(1)                                      # the first one says why
        raise BadInput("another process of this run has ended, and this one with it; go on with "
                       "--resume from what was saved") from None
    except data.Interrupted as interrupted:
        if rank() == 0:
            raise
        sys.exit(128 + interrupted.number)                   # as above
    dist.destroy_process_group()


def tell(stage, settings=None, device="cpu", source="", folder="", resume=False):
    """The first process tells the others what comes next; stage None: nothing more."""
    if processes() > 1:
        kind = torch.device(device).type
        dist.broadcast_object_list([(stage, settings, kind, source, folder, resume)])


def told():
    """What the first process tells: waits for it."""
    box = [None]
    dist.broadcast_object_list(box)
    return box[0]


class Learner(torch.nn.Module):
    """What DistributedDataParallel wants: a module that has a network's weights, and whose forward
    is what is to be called."""

    def __init__(self, network, forward):
        super().__init__()
        self.network = network
        self.forward = forward


def averaging(network, forward, device):
    """forward, after which loss.backward() gives each weight of the network the mean gradient of
    all processes.

    Each weight, however the loss came to depend on it: also those of the text encoder, which is
    called by itself. What is averaged are gradients as they arrive at weights.

    sped_up makes the answer the network's own forward: network(x) calls this lambda, it calls
    DistributedDataParallel, that Learner's forward, and that is the network's own of before.
    """
    if torch.device(device).type == "cuda":
        # Batch norm then measures the objects of all processes. On CPUs torch cannot do that: each
        # measures its own share, and what the first one measures is kept for sampling. This
        # exchanges modules within the network; their weights stay those that the optimizer has.
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    # TRAP: with it, each forward would exchange buffers; but sheets are drawn by the first alone.
    learner = torch.nn.parallel.DistributedDataParallel(
        Learner(network, forward), forward_sync_buffers=False)
    # TRAP: a module that is assigned to a module becomes a part of it, and the network would
    # contain itself. A function does not.
    return lambda *inputs: learner(*inputs)


def mean_of_all(number):
    """A number () that each process has measured, on its device -> the mean."""
    if processes() == 1:
        return number
    total = number.clone()
    dist.all_reduce(total)
    return total / processes()


def after_step(settings, state, steps, stop):
    """What all do next -> whether a checkpoint is due; the signal by which to stop, or 0.

    stop.asked is read once: a signal that came between two reads would stop the run, and nothing
    would have been saved. All processes get it, each in some step of its own (torchrun passes it
    on, and waits 30 seconds: --shutdown-timeout); the first to see it stops all after the same
    step.
    """
    due = is_due(settings, state.step, steps)
    asked = stop.asked or 0
    if processes() == 1:
        return due, asked
    asked_of_any = torch.tensor(asked)                       # on the CPU: it waits for no GPU
    dist.all_reduce(asked_of_any, dist.ReduceOp.MAX)
    asked = int(asked_of_any)
    if due or asked:
        state.others = gather_others(state)
    return due, asked


def gather_others(state):
    """What a checkpoint keeps of every process but the first: its random numbers and, of stage 1,
    the objects whose turn is still to come."""
    own = {"random": randomness(state), "order": getattr(state, "order", None)}
    of_all = [None] * processes()
    dist.all_gather_object(of_all, own)
    return of_all[1:]


def same_processes(old, path):
    """Refuses to go on from a checkpoint of more processes, or fewer: it has random numbers for as
    many as there were."""
    n = 1 + len(old.get("others", []))                       # none in those of one process
    if n != processes():
        trained_by = f"{n} processes" if n > 1 else "1 process"
        raise BadInput(f"{path} was trained by {trained_by}, not {processes()}; go on with "
                       f"torchrun --nproc_per_node={n}, or start anew with another --out")


def of_this_process(old):
    """The part of a checkpoint that has this process's own "random" and "order"."""
    if rank() == 0:
        return old
    return old["others"][rank() - 1]


def assist():
    """What every process but the first does: its share of each stage."""
    while True:
        stage, settings, kind, source, folder, resume = told()
        if stage is None:
            return
        device = own_device(kind)
        if stage == 1:
            assist_stage1(settings, device, source, folder, resume)
        else:
            assist_stage2(settings, device, folder, resume)


def assist_stage1(settings, device, source, folder, resume):
    """run_stage1 and learn_stage1 without a word."""
    with contextlib.redirect_stdout(io.StringIO()):          # how long it takes, the first one says
        dataset = data.load_for(settings, source)
    features = autodecoder.build_features(settings.perceptual, device)
    state = new_stage1(settings, dataset, device)
    state.portraits = sample.portraits(dataset)
    if resume:
        old = sample.load_checkpoint(folder, 1, resume=True)
        resume_stage1(settings, state, dataset, folder / "stage1.pt", old, source)
    with data.finishing_steps() as stop, sped_up(settings, state.autodecoder, device):
        for loss, error in steps_of_stage1(settings, dataset, state, features):
            mean_of_all(loss)                                # learn_stage1 waits for these two
            mean_of_all(error)
            _, stopping = after_step(settings, state, settings.steps_stage1, stop)
            if stopping:
                raise data.Interrupted(stopping)


def assist_stage2(settings, device, folder, resume):
    """run_stage2 and learn_stage2 without a word; both files are there, of the first process."""
    first = sample.load_checkpoint(folder, 1)
    trained = sample.open_run(folder, device, stages=(1,))
    latents = sample.training_latents(trained.autodecoder, len(trained.names))
    settings, state = new_stage2(settings, latents, first, folder, device)
    if resume:
        old = sample.load_checkpoint(folder, 2, resume=True)
        resume_stage2(settings, state, folder / "stage2.pt", old)
    with data.finishing_steps() as stop, sped_up(settings, state.model, device):
        for loss in steps_of_stage2(settings, state):
            mean_of_all(loss)                                # learn_stage2 waits for it
            _, stopping = after_step(settings, state, settings.steps_stage2, stop)
            if stopping:
                raise data.Interrupted(stopping)


# ---- Stage 1, from the first step or from a checkpoint -------------------------------------------
#
# Around the loop of the first reading: a state that is new or was saved, a log, checkpoints and
# pictures now and then, and scores at the end.


def new_stage1(settings, dataset, device):
    """The state before the first step: known cameras, or a pose network that learns them.

    The decoder is made first, whatever comes after: so one seed gives it the same weights always.
    """
    torch.manual_seed(settings.seed)                              # initial weights
    decoder = autodecoder.build_decoder(settings, dataset.n_objects)
    if settings.parts:
        posenet = autodecoder.PoseNet.from_settings(settings)
        state = start_moving(settings, decoder, posenet, device)
    else:
        state = start_stage1(settings, decoder, device)
        state.posenet = None
    state.generator = own_stream(settings.seed, "stage 1")
    state.seconds = 0.0
    return state


def resume_stage1(settings, state, dataset, path, old, source):
    """Puts a checkpoint's weights, optimizer and random numbers into a new state."""
    same_settings(settings, old["settings"], STAGE1_GROUPS, path)
    same_processes(old, path)
    # Row k of the embeddings is object k: other objects would wear the embeddings of these.
    if old["names"] != dataset.names:
        raise BadInput(f"{path} was trained on other objects than --data {source}")
    if not sample.are_same(old["portraits"], state.portraits):
        raise BadInput(f"those in --data {source} are not the photos that {path} was trained on: "
                       "give these, or another --out to start anew")
    sample.restore(lambda: state.autodecoder, old["model"], path)
    if state.posenet is not None:
        sample.restore(lambda: state.posenet, old["posenet"], path)
    state.optimizer.load_state_dict(old["optimizer"])
    own = of_this_process(old)
    restore_randomness(state, own["random"])
    state.step = old["step"]
    state.seconds = old["seconds"]
    state.order = own["order"]


def turntable_view(dataset):
    """Where samples are looked at from: distance and elevation of a typical training camera.

    From elsewhere one would see what no photo has shown: the sole of a shoe, the top of a shelf.
    Medians, as one camera far away says nothing of the others.
    """
    position = dataset.cam2world[:, :3, 3]
    distance = position.norm(dim=1)
    elevation = torch.asin(position[:, 1] / distance).median()
    # At least 1.8: the corners of the cube are sqrt(3) = 1.73 from its middle. And a little from
    # above, 6 to 34 degrees.
    return {"distance": max(1.8, float(distance.median())),
            "elevation": float(elevation.clamp(0.1, 0.6))}


def save_stage1(settings, state, dataset, folder, source):
    """stage1.pt: what the first reading saves, and what text, moving subjects and checks need."""
    refuse_divergence(1, state.step, state.autodecoder)
    checkpoint = stage1_checkpoint(settings, dataset, state)
    checkpoint |= for_resuming(state)
    checkpoint |= {"order": state.order, "fingerprint": fingerprint(state.autodecoder)}
    # The data may be gone when stage 2 learns from captions, and when samples are drawn.
    checkpoint |= {"source": source, "captions": dataset.captions, "view": turntable_view(dataset)}
    # ... or there again, but changed.
    checkpoint |= {"portraits": state.portraits}
    checkpoint |= {"posenet": None, "poses": None}
    if dataset.moving or state.posenet is not None:
        checkpoint["view"] = {"distance": 12.0, "elevation": 0.0}    # from ahead, as the clips are
    if state.posenet is not None:
        refuse_divergence(1, state.step, state.posenet)
        checkpoint["posenet"] = state.posenet.state_dict()
        # One clip's poses, to show others in: a subject that was sampled has none of its own.
        with torch.no_grad(), sample.evaluating(state):
            frames = dataset.frames_of(0, heldout=False)
            checkpoint["poses"] = sample.cameras_of(state, dataset, frames).cpu()
    save(folder / "stage1.pt", checkpoint)
    data.STOP.saved = f"stage 1 is saved at step {state.step}"


def run_stage1(settings, dataset, folder, device, source, resume=False):
    """Stage 1 with log, checkpoints and pictures: FOLDER/stage1.pt, log.csv, training.png, ...

    dataset data.Dataset, folder a Path, source what --data said
    """
    # All that may be refused comes first: files are touched only when training can begin.
    features = autodecoder.build_features(settings.perceptual, device)
    path = folder / "stage1.pt"
    state = new_stage1(settings, dataset, device)
    source = absolute_source(source)
    state.portraits = sample.portraits(dataset)
    old = sample.load_checkpoint(folder, 1, resume=True) if resume else None
    if old is not None:
        resume_stage1(settings, state, dataset, path, old, source)
        keep_what_will_not_fit(settings, folder, old)
    else:
        keep_aside(folder, moved=RUN_FILES)
    goes_on = state.step < settings.steps_stage1
    # Where its photos are now; and scores of samples belong to the older stage 1: they go.
    add_metrics(folder, settings, OF_SAMPLES if goes_on else (), source=source)
    if goes_on:                                          # else the log has rows of stage 2 to keep
        means = None if old is None else old["log"]
        state.log = Log(folder, 1, state.step, settings.steps_stage1, settings.log_every, means)
    tell(1, settings, device, source, folder, resume=old is not None)
    with telling_what_is_kept(path), data.finishing_steps() as stop, \
            sped_up(settings, state.autodecoder, device):
        learn_stage1(settings, dataset, state, features, folder, source, stop)
    finish_stage1(settings, state, dataset, folder)


def keep_what_will_not_fit(settings, folder, old):
    """Before a stage 1 goes on: its stage 2 will not fit it any more, so both are kept as they are.

    old: the checkpoint of stage 1
    """
    if old["step"] >= settings.steps_stage1 or not (folder / "stage2.pt").exists():
        return
    if sample.load_checkpoint(folder, 2)["decoder"] == old["fingerprint"]:
        keep_aside(folder, copied=RUN_FILES)


def steps_of_stage1(settings, dataset, state, features):
    """The loop that suits the data, on this process's share of each step's objects."""
    settings = share_of(settings)
    if state.posenet is not None:
        return train_moving(settings, dataset, state, features, draw_coarse_to_fine)
    return train_stage1(settings, dataset, state, features, draw_coarse_to_fine,
                        render.render_skipping)


def learn_stage1(settings, dataset, state, features, folder, source, stop):
    """The steps themselves, and what is written meanwhile; stop: see data.finishing_steps."""
    began = time.time() - state.seconds
    # A sheet of renders comes with every checkpoint; before the first, whenever steps have doubled:
    # at the beginning objects change fast.
    drawn_at = max(state.step, settings.log_every // 2)
    networks = [network for network in (state.autodecoder, state.posenet) if network is not None]
    for loss, error in steps_of_stage1(settings, dataset, state, features):
        state.seconds = time.time() - began
        state.log.add(state.step, mean_of_all(loss), mean_of_all(error))
        due, stopping = after_step(settings, state, settings.steps_stage1, stop)
        if due or stopping:
            save_stage1(settings, state, dataset, folder, source)
        if stopping:
            raise data.Interrupted(stopping)
        if due or state.step >= 2 * drawn_at:
            # What goes wrong is seen here long before any number tells: empty pictures, objects
            # that are mirrored or upside down, fog around them.
            refuse_divergence(1, state.step, *networks)
            sample.save_training_sheet(folder / "training.png", state, dataset)
            plot_log(folder)
            drawn_at = state.step


def finish_stage1(settings, state, dataset, folder):
    """Pictures from all sides, and how well held-out views are met."""
    add_metrics(folder, settings, seconds_stage1=round(state.seconds, 1), steps_stage1=state.step,
                peak_memory_gib_stage1=peak_memory_gib())
    # Read back from the file: were something missing in there, it would be known now.
    trained = sample.open_run(folder, state.device, stages=(1,))
    sample.save_orbit(folder / "orbit.png", trained)
    scores = sample.score_heldout(state, dataset)
    if not scores:
        return
    add_metrics(folder, settings, **scores)
    line = (f"stage 1 | held-out views: {scores['psnr_heldout']:.2f} dB PSNR over "
            f"{len(sample.frames_to_score(dataset))}")
    if dataset.moving:
        mean = score_mean_frame(dataset)
        add_metrics(folder, settings, psnr_mean_frame=round(mean, 3))
        line += f"; the clips' mean frames: {mean:.2f} dB"
    print(line)


# ---- Stage 2, from the first step or from a checkpoint -------------------------------------------
#
# The same around the loop of stage 2. Its data are not photos but stage1.pt: so stage 2 can be
# trained in many ways on one stage 1 (--decoder), and what differs is then due to stage 2 alone.


def settings_of_stage2(settings, first, given=()):
    """Those of the data, the decoder and stage 1 are stage1.pt's; the rest are as asked for."""
    # Not asked for is not refused: a preset also names numbers of stage 1, and they give way.
    theirs = {}
    for name in fields_of(*STAGE1_GROUPS):
        theirs[name] = first["settings"].get(name, getattr(AllSettings, name))
        if name in given and getattr(settings, name) != theirs[name]:
            raise BadInput(f"{flag(name)} {getattr(settings, name)}: the stage 1 there was trained "
                           f"with {theirs[name]}; leave it out, or train stage 1 again")
    settings = dataclasses.replace(settings, **theirs)
    check(settings)                                       # once more: the latents may be others
    if len(first["names"]) < 2:
        raise BadInput("stage 2 learns a distribution of objects; one object has none. Use "
                       "--stage 1 alone, or --data with more objects")
    return settings


def new_stage2(settings, latents, first, folder, device):
    """The state before the first step, with or without text -> settings, state.

    With T5 the settings are others: its tokens have a width of their own (context_dim).
    """
    captions = [caption or "" for caption in first["captions"]]
    vocabulary, encode = [], None
    if settings.text:
        vocabulary = vocabulary_of(captions)                  # which also asks whether there is any
    if settings.text and settings.t5:
        encode, width = t5_tokens(settings, captions, folder, device)
        settings = dataclasses.replace(settings, context_dim=width)
        vocabulary = []                                   # T5 has its own
    torch.manual_seed(settings.seed)
    denoiser = diffusion.build_denoiser(settings, tuple(latents.shape[1:]), vocabulary)
    state = start_stage2(settings, latents, denoiser, device)
    state.generator = own_stream(settings.seed, "stage 2")
    # Our own encoder is part of the denoiser, and learns with it. T5 is frozen and stands outside.
    if settings.text:
        state.encode = encode or denoiser.text
        state.captions = captions
    state.vocabulary = vocabulary
    state.decoder = first["fingerprint"]
    state.seconds = 0.0
    return settings, state


def resume_stage2(settings, state, path, old):
    """Puts a checkpoint's weights, optimizer and random numbers into a new state."""
    same_settings(settings, old["settings"], ("stage 2", "text"), path)
    same_processes(old, path)
    # TRAP: m and s would be measured anew, on other latents, under weights that know the old ones.
    if old["decoder"] != state.decoder:
        raise BadInput(f"{path} was trained on another stage 1; run without --resume")
    sample.restore(lambda: state.model, old["model"], path)
    sample.restore(lambda: state.average, old["ema"], path)
    state.optimizer.load_state_dict(old["optimizer"])
    restore_randomness(state, of_this_process(old)["random"])
    state.step = old["step"]
    state.seconds = old["seconds"]


def save_stage2(settings, state, folder):
    """stage2.pt: what the first reading saves, and what text and checks need.

    Two sets of weights: "ema", the average, samples; "model" is what training goes on with.
    """
    refuse_divergence(2, state.step, state.model)
    checkpoint = stage2_checkpoint(settings, state)
    checkpoint |= for_resuming(state)
    checkpoint |= {"model": state.model.state_dict(), "decoder": state.decoder,
                   "vocabulary": state.vocabulary}
    save(folder / "stage2.pt", checkpoint)
    data.STOP.saved = f"stage 2 is saved at step {state.step}"


def run_stage2(settings, folder, device, resume=False, latents=None, given=(), decoder=None):
    """Stage 2 with log, checkpoints and pictures: FOLDER/stage2.pt, log.csv, latents.png.

    latents: to learn from instead of F = G1(e) of FOLDER/stage1.pt; for comparisons
    given: names of the settings that the command line holds
    decoder: a folder whose stage1.pt is to be FOLDER's; None: it is there already
    """
    first = sample.load_checkpoint(decoder or folder, 1)
    settings = settings_of_stage2(settings, first, given)
    if latents is None:
        trained = sample.open_run(decoder or folder, device, stages=(1,))
        latents = sample.training_latents(trained.autodecoder, len(trained.names))
    replaces = decoder is not None and brings_another(decoder, folder, first, resume)
    path = folder / "stage2.pt"
    old = sample.load_checkpoint(folder, 2, resume=True) if resume else None
    settings, state = new_stage2(settings, latents, first, folder, device)
    if old is not None:
        resume_stage2(settings, state, path, old)
    elif replaces:
        take_decoder(decoder, folder, settings, first)
    elif path.exists():
        keep_aside(folder, moved=["stage2.pt"], copied=["log.csv", "metrics.json"])
    sample.save_latent_histogram(folder / "latents.png", latents)
    m, s = state.normalizer.m.mean(), state.normalizer.s.mean()
    # A spread far above 1 says that a few latents are extreme (normalize.py).
    print(f"stage 2 | latents {tuple(latents.shape)} | median {m:.3f}, 0.7413 IQR {s:.3f}, "
          f"normalized spread {state.latents.std():.3f}")
    if state.step < settings.steps_stage2:
        add_metrics(folder, settings, OF_SAMPLES)        # those of an older stage 2 go
    means = None if old is None else old["log"]
    state.log = Log(folder, 2, state.step, settings.steps_stage2, settings.log_every, means)
    tell(2, settings, device, first["source"], folder, resume=old is not None)
    with telling_what_is_kept(path), data.finishing_steps() as stop, \
            sped_up(settings, state.model, device):
        learn_stage2(settings, state, folder, stop)
    add_metrics(folder, settings, seconds_stage2=round(state.seconds, 1), steps_stage2=state.step,
                peak_memory_gib_stage2=peak_memory_gib())


def steps_of_stage2(settings, state):
    """The loop with or without text, on this process's share of each step's latents."""
    train = train_text if settings.text else train_stage2
    return train(share_of(settings), state)


def learn_stage2(settings, state, folder, stop):
    """The steps themselves, and what is written meanwhile; stop: see data.finishing_steps."""
    began = time.time() - state.seconds
    for loss in steps_of_stage2(settings, state):
        state.seconds = time.time() - began
        state.log.add(state.step, mean_of_all(loss))
        due, stopping = after_step(settings, state, settings.steps_stage2, stop)
        if due or stopping:
            save_stage2(settings, state, folder)
        if stopping:
            raise data.Interrupted(stopping)
        if due:
            plot_log(folder)


def brings_another(decoder, folder, first, resume):
    """Whether --decoder RUN brings another stage 1 than FOLDER has; first: its checkpoint."""
    path = folder / "stage1.pt"
    if not path.exists():
        return True
    if sample.load_checkpoint(folder, 1)["fingerprint"] == first["fingerprint"]:
        return False                                         # it was copied before
    if resume:
        raise BadInput(f"{path} is another than that of --decoder {decoder}; run without "
                       "--resume, or with another --out")
    return True


def take_decoder(decoder, folder, settings, first):
    """--decoder RUN: copies its stage1.pt, so that stage 2 can be tried in many ways."""
    keep_aside(folder, moved=RUN_FILES)
    with data.writing(folder / "stage1.pt") as temporary:
        shutil.copyfile(Path(decoder) / "stage1.pt", temporary)
    add_metrics(folder, settings, source=first["source"])


# ---- Looking ahead: what can be known before the data is read ------------------------------------
#
# Photos may take minutes to read, stage 1 hours to train. What can be seen to go wrong after that,
# from the command line, names of files and checkpoints alone, is told in the first seconds.


def check_captions(args, found, names):
    """--text needs captions: refuses data that has none; found: all of it, names: what is used."""
    if args.data in ("synthetic", "puppets"):
        return                                               # they come with captions
    reading = data.Reading(size=64)                          # its notes are load's to tell
    captions = data.read_captions(Path(args.data), found, reading)
    vocabulary_of([captions.get(name) or "" for name in names])


def count_numbers(module):
    """How many numbers a network learns."""
    return sum(weight.numel() for weight in module.parameters())


def model_sizes(settings, n_objects):
    """Numbers in decoder and denoiser, built without memory: see check_models."""
    with torch.device("meta"):
        decoder = autodecoder.build_decoder(settings, n_objects)
        vocabulary = ["word"] if settings.text else []
        denoiser = diffusion.build_denoiser(settings, decoder.latent_shape, vocabulary)
    return count_numbers(decoder), count_numbers(denoiser)


def bytes_of_a_step(settings, n_objects):
    """Least memory of what a step of stage 1 makes, bytes: only what surely is there at once."""
    B = min(settings.objects_per_step, n_objects)
    channels = 4 + settings.parts
    volumes = B * channels * settings.volume_side**3
    side = settings.window or settings.size // 2 ** len(settings.finer_at)
    side = min(side, settings.size)
    samples = B * settings.views_per_step * side**2 * settings.n_samples
    # A volume and its gradient; a sample's channels, and where it is (x, y, z).
    return {"volumes of a step": 4 * 2 * volumes, "samples on rays": 4 * (channels + 3) * samples}


def check_size(args, settings, n_objects, device):
    """Refuses what fits neither into memory nor on the disk, as far as a few lines can tell."""
    decoder, denoiser = model_sizes(settings, n_objects)
    frames = {}
    if args.stage != 2 and args.data in ("synthetic", "puppets"):
        frames["frames"] = n_objects * settings.n_views * settings.size**2 * 4       # r, g, b, mask
    learning = {}                                            # on a GPU, it is not in this memory
    to_write = 0
    if args.stage != 2:
        if device == "cpu":
            learning = {"decoder, gradients and Adam": 4 * 4 * decoder}
            learning |= bytes_of_a_step(settings, n_objects)
        sample.check_memory(frames | learning, "smaller settings, or a smaller --preset")
        to_write += 4 * 3 * decoder                          # weights, and two of Adam's for each
    if args.stage != 1:
        if device == "cpu":
            learning = {"denoiser, average, gradients and Adam": 4 * 5 * denoiser}
        sample.check_memory(frames | learning, "smaller settings, or a smaller --preset")
        to_write += 4 * 4 * denoiser
    if not args.resume:                                      # else it is there already
        check_disk(args.out, to_write)


def check_disk(out, to_write):
    """Refuses checkpoints of more bytes than the disk has left; out: a folder, there or not."""
    folder = out.absolute()
    while not folder.exists() and folder != folder.parent:   # Windows: a drive that is not there
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if to_write > free:
        raise BadInput(f"checkpoints take at least {to_write / 2**30:.2f} GiB, and on the disk of "
                       f"{out} are {free / 2**30:.2f} left: another --out, or smaller settings")


def look_ahead(args, settings, device):
    """All checks that need neither data nor the folder to be ours -> the source of the data."""
    if args.stage == 2:
        first = sample.load_checkpoint(args.decoder or args.out, 1)
        source = absolute_source(args.data)
        if args.data_given and source != first["source"]:
            raise BadInput(f"--data {args.data}: stage 2 learns from stage 1 alone, and that was "
                           f"trained on {first['source']}; leave --data out, or train stage 1")
        settings = settings_of_stage2(settings, first, args.given)
        check_size(args, settings, len(first["names"]), device)
        return first["source"]
    reading = data.Reading(settings.size, as_clips=settings.as_clips)
    found = data.find(args.data, settings.n_objects, reading)
    chosen = data.choose(found, settings.objects, args.data)
    autodecoder.build_features(settings.perceptual, "cpu")
    if args.stage is None and len(chosen) > 1 and settings.text:
        check_captions(args, found, [one.name for one in chosen])
        if settings.t5:
            diffusion.T5Encoder(settings.t5)
    check_size(args, settings, len(chosen), device)
    return absolute_source(args.data)


def check_resuming(args, settings):
    """--resume: damaged checkpoints, and those of other settings, are refused at once."""
    if not args.resume or args.stage == 2:
        return                                               # run_stage2 reads no data before it
    first = sample.load_checkpoint(args.out, 1, resume=True)
    second = sample.load_checkpoint(args.out, 2, resume=True)
    if first is not None:
        path = args.out / "stage1.pt"
        from_data = ("parts", "focal", "body")               # see fit_to_data
        same_settings(settings, first["settings"], STAGE1_GROUPS, path, from_data)
        same_processes(first, path)
    if first is None or second is None or args.stage == 1:
        return
    # A stage 1 that goes on will have another stage 2.
    ends = first["step"] >= settings.steps_stage1
    if ends and second["decoder"] == first["fingerprint"]:
        from_text = ("context_dim",) if settings.t5 else ()
        path = args.out / "stage2.pt"
        same_settings(settings, second["settings"], ("stage 2", "text"), path, from_text)
        same_processes(second, path)


def stage2_goes_on(folder):
    """Whether a stage2.pt in a folder belongs to its stage1.pt; True where there is none."""
    if not (folder / "stage2.pt").exists():
        return True
    first = sample.load_checkpoint(folder, 1)
    return sample.load_checkpoint(folder, 2)["decoder"] == first["fingerprint"]


# ---- Command line --------------------------------------------------------------------------------
#
# A preset gives all settings, flags change some of them, the data decide a few (fit_to_data).
# Wrong input is one line that names the flag, and exit status 2 (data.run_cli).
#
# TRAP: torch can multiply matrices faster on a GPU, at "high" precision. Nowhere is it asked for:
# it keeps 10 bits of each number, and cameras and points on rays are multiplied by matrices, too.

# On the first sheet, samples stand over their nearest training objects where these are so few that
# all can be decoded and compared in seconds.
NEAREST_UP_TO = 256


def first_sampling(settings, folder, device):
    """Sheets, turntable and the strip from noise to object -> their paths."""
    began = time.time()
    trained = sample.open_run(folder, device)
    strip = folder / "noise_to_object.png"
    sample.save_noise_strip(strip, trained, steps=settings.sample_steps)
    _, paths = sample.save_any_samples(
        trained, folder / "samples", settings.n_sheet, settings.sample_steps, settings.seed,
        settings.churn, nearest=len(trained.names) <= NEAREST_UP_TO)
    add_metrics(folder, settings, seconds_sampling=round(time.time() - began, 1))
    return [strip] + paths


def number_list(text):
    """"8,16" -> (8, 16); "0.4,0.8" -> (0.4, 0.8); "" -> ()."""
    numbers = []
    for word in text.split(","):
        if word.strip():
            # Whole where it is written so: sides and widths are counted, shares are not.
            numbers.append(float(word) if "." in word or "e" in word else int(word))
    return tuple(numbers)


def add_setting(group, field):
    """One flag of the command line for one field of the settings; --help tells its value in `tiny`.

    No default here: None tells that a flag was not given, and the preset's value counts.
    """
    name = flag(field.name)
    tiny = PRESETS["tiny"].get(field.name, field.default)
    if field.type is tuple:
        tiny = ",".join(map(str, tiny))
    help_text = f"{field.metadata['help']} (tiny: {'empty' if tiny == '' else tiny})"
    help_text = help_text.replace("%", "%%")                 # argparse fills in %-signs
    if field.type is bool:
        group.add_argument(name, action=data.argparse.BooleanOptionalAction, help=help_text)
    elif field.type is tuple:
        group.add_argument(name, type=number_list, metavar="A,B", help=help_text)
    else:
        group.add_argument(name, type=field.type, choices=CHOICES.get(field.name),
                           metavar=None if field.name in CHOICES else field.type.__name__.upper(),
                           help=help_text)


HELP_OF_GROUPS = {"moving": "moving subjects, and cameras that are learned",
                  "text": "text: prompts", "run": "run: seeds, logs"}


def make_parser():
    """All flags: those of this file, then one for each setting, in groups."""
    parser = data.Parser(description=__doc__.splitlines()[0], argument_default=None)
    add = parser.add_argument
    add("--stage", type=int, choices=[1, 2], help="one stage only (default: both, then sample)")
    add("--data", help="'synthetic', 'puppets', a folder of photos or clips, or a cache of one, "
        "written by data.py --cache (synthetic)")
    add("--preset", choices=PRESETS, help="%(choices)s (default: tiny; for clips tiny-clips; for "
        "puppets, and where else cameras are learned, tiny-video)")
    add("--cameras", choices=["known", "learned"], help="learned: from nothing but the pictures "
        "(default: known, where the data has them)")
    add("--out", help="the run's folder (default: runs/PRESET-DATA, or where that holds a run on "
        "other data of this name, runs/PRESET-DATA-2, ...)")
    add("--decoder", metavar="RUN", help="with --stage 2: on the stage 1 of that run, which is "
        "copied to --out")
    add("--steps", type=int, help="training steps of each stage that runs")
    add("--device", default="auto", help="cpu, cuda, ... (%(default)s)")
    add("--resume", action="store_true", help="go on from the checkpoints in --out")
    groups = {}
    for field in dataclasses.fields(AllSettings):
        name = field.metadata["group"]
        if name is None:
            continue
        if name not in groups:
            groups[name] = parser.add_argument_group(HELP_OF_GROUPS.get(name, name))
        add_setting(groups[name], field)
    return parser


def choose_preset(args, clips):
    """--preset, or what suits the data; clips: whether --data is of what moves."""
    if args.preset:
        return args.preset
    if clips and args.data != "puppets":
        return "tiny-clips"
    if clips or args.cameras == "learned":
        return "tiny-video"
    return "tiny"


def parse(arguments=None):
    """Command line -> (args, settings): a preset's values, then the flags that were given.

    args.given: the names of the settings among these flags
    """
    args = make_parser().parse_args(arguments)
    args.data_given = args.data is not None
    if not args.data_given:
        args.data = "synthetic"
    clips = data.is_moving(args.data, bool(args.as_clips))
    args.preset = choose_preset(args, clips)
    values = dict(PRESETS[args.preset])
    args.given = set()
    for field in dataclasses.fields(AllSettings):
        # None: the flag was not given. (False was: it is what --no-... says.)
        value = getattr(args, field.name, None)
        if value is not None:
            values[field.name] = value
            args.given.add(field.name)
    # What would change nothing is refused before the settings are checked as a whole.
    learned = clips or args.cameras == "learned"
    refuse_idle_flags(args, AllSettings(**values), args.given, learned)
    if clips and args.cameras == "known":
        raise BadInput(f"--cameras known: {args.data} has none; leave it out, or say learned")
    if args.stage != 2 and not clips and values.get("parts", 0) > 1 and "parts" in args.given:
        raise BadInput(f"--parts {values['parts']}: rigid objects have one part; only clips of "
                       "what moves have more")
    if args.steps is not None:
        data.check_number("--steps", args.steps, BOUNDS["steps_stage1"])
    for stage in (1, 2):
        if args.steps is not None and args.stage in (None, stage):
            values[f"steps_stage{stage}"] = args.steps
    settings = AllSettings(**values)
    check(settings)
    settings.betas = tuple(float(beta) for beta in settings.betas)    # Adam wants no whole numbers
    if learned and args.stage != 2:
        check_poses(settings)
    check_processes(args, settings, learned)
    args.out = Path(args.out or default_out(args.preset, absolute_source(args.data)))
    return args, settings


def train_stages(args, settings, device):
    """Data, stage 1, stage 2, first samples: whichever --stage asks for -> paths of pictures."""
    paths = []
    n_objects = None
    if args.stage != 2:
        began = time.time()
        dataset = data.load_for(settings, args.data)
        n_objects = dataset.n_objects
        seconds = time.time() - began
        heldout = int(dataset.heldout.sum())
        training = len(dataset.heldout) - heldout
        print(f"data    | {dataset.layout}: {n_objects} objects, {training} training and {heldout} "
              f"held-out views, {settings.size}x{settings.size}, {seconds:.0f} s")
        for line in [*dataset.skipped, *dataset.remarks]:
            print(f"data    | {line}")
        settings = fit_to_data(settings, args.cameras, dataset)
        source = absolute_source(args.data)
        run_stage1(settings, dataset, args.out, device, source, args.resume)
        add_metrics(args.out, settings, seconds_data=round(seconds, 1))
        paths += [args.out / name for name in ("training.png", "orbit.png", "loss.png")]
    both = args.stage is None and n_objects > 1               # one object has no distribution
    if both:
        # Flags of stage 1 have gone into it just now: none of them is given to stage 2. And where
        # stage 1 has gone on, an earlier stage 2 belongs to what it was.
        resume = args.resume and stage2_goes_on(args.out)
        run_stage2(settings, args.out, device, resume, given=())
    if args.stage == 2:
        run_stage2(settings, args.out, device, args.resume, given=args.given,
                   decoder=args.decoder)
    if both or args.stage == 2:
        paths += [args.out / "latents.png", args.out / "loss.png"]
    if both:
        paths += first_sampling(settings, args.out, device)
    return paths


def main(arguments=None):
    """Trains. Of many processes the first one leads: see "Many GPUs, many machines"."""
    with together():
        if rank() == 0:
            lead(arguments)
        else:
            assist()


def lead(arguments):
    """Reads the flags, checks what can be checked, and trains."""
    args, settings = parse(arguments)
    device = own_device(args.device)
    source = look_ahead(args, settings, device)
    with alone_in(args.out):
        check_resuming(args, settings)
        claim(args.out, settings, source)
        paths = train_stages(args, settings, device)
    # A finished run that is only scored again has its training.png from before, or has lost it.
    pictures = [str(path) for path in dict.fromkeys(paths) if Path(path).exists()]
    print("look at " + ", ".join(pictures))
    tell(None)


if __name__ == "__main__":
    data.run_cli(main)
