"""A trained run goes in; objects that never existed come out, as pictures.

    python sample.py --run runs/tiny-synthetic --n 8

    noise -- sample_latents --> latent F -- decode --> volume -- render_views --> pictures
             64 Heun steps                  G2                   from a turntable

Paper: Sec. 3.3 and App. C.2. Embeddings and G1 take no part: they have made the latents that
diffusion learned from. A new object has no embedding, and there was never a photo of it.
Shapes: n objects, V views, C channels, T frames of a film; volumes (4, D, H, W).
Read next: tests/, which hold every function against a case whose answer is known.
"""
import math
import os
from hashlib import sha256
from types import SimpleNamespace

if __name__ == "__main__":               # Ctrl-C while torch is imported: an end, no traceback
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import imageio.v3 as iio
import torch

import render
from autodecoder import AutoDecoder
from diffusion import Denoiser, edm_sampler
from normalize import RobustNormalizer

SIDE = 96                        # pixels of a picture on a sheet or in a film
FRAMES = 48                      # T of a turntable film


def load_run(folder, device="cpu"):
    """What training left in a folder -> `trained`, a namespace that the functions below take:
    networks and normalizer; settings, of stage 2; names of the training objects; and view, where
    the turntable's camera stands: distance, and elevation in radians."""
    # TRAP: without weights_only, loading a file runs whatever program somebody put into it.
    first = torch.load(f"{folder}/stage1.pt", map_location="cpu", weights_only=True)
    second = torch.load(f"{folder}/stage2.pt", map_location="cpu", weights_only=True)
    settings = SimpleNamespace(**first["settings"])
    autodecoder = AutoDecoder.from_settings(settings, len(first["names"]))
    autodecoder.load_state_dict(first["model"])
    settings = SimpleNamespace(**second["settings"])
    denoiser = Denoiser.from_settings(settings, autodecoder.latent_shape)
    denoiser.load_state_dict(second["ema"])          # averaged: those of the last step are restless
    normalizer = RobustNormalizer.from_settings(settings)
    normalizer.m, normalizer.s = second["m"], second["s"]
    for module in (autodecoder, denoiser, normalizer):
        module.to(device).eval().requires_grad_(False)    # eval: batch norm as training measured it
    return SimpleNamespace(
        settings=settings, device=device, names=first["names"], view=first["view"],
        autodecoder=autodecoder, denoiser=denoiser, normalizer=normalizer)


# ---- Noise -> latents -> volumes -> pictures (Sec. 3.3) ------------------------------------------
def stream(seed, name):
    """Random numbers for one use of a seed. TRAP: manual_seed(seed) in two places gives the same
    numbers twice: the noise of samples would be that of the training's first steps."""
    digest = sha256(f"{name} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))   # fits an int64


def latent_noise(trained, n, seed):
    """Unit normal noise (n, C, s, s, s). Object i depends on seed and i alone, not on n."""
    shape = trained.autodecoder.latent_shape
    return torch.stack([torch.randn(shape, generator=stream(seed, f"noise {i}")) for i in range(n)])


def sample_latents(trained, noise, steps=64, churn=40.0, seed=0, first=0):
    """Noise (n, C, s, s, s) -> latents F of new objects, as noise. steps, churn: see edm_sampler.

    These are objects first, first + 1, ... of a seed; the churn of each depends on these two
    numbers alone, whoever is made beside it.
    """
    latents = []
    for part in noise.split(64):                                       # 64 at a time: memory
        fresh = [stream(seed, f"churn {first + i}") for i in range(len(part))]
        latent_hat = edm_sampler(trained.denoiser, part.to(trained.device), steps, S_churn=churn,
                                 generator=fresh)
        # TRAP: G2 knows latents as they were before normalization: F = F_hat s + m.
        latents.append(trained.normalizer.denormalize(latent_hat.float()))
        first += len(part)
    return torch.cat(latents)


@torch.no_grad()
def decode(trained, latents):
    """G2: latents F (n, C, s, s, s) -> volumes (n, 4, D, H, W) of density and colour."""
    return torch.cat([trained.autodecoder.decode_volume(part) for part in latents.split(16)])


@torch.no_grad()
def training_latents(autodecoder, n_objects):
    """What stage 2 learns from: F = G1(e) of all N training objects, (N, C, s, s, s). In evaluation
    mode, or batch norm would let a latent depend on which others are decoded beside it."""
    k = torch.arange(n_objects, device=next(autodecoder.parameters()).device)
    e = autodecoder.eval().embed(k)                                    # (N, embed_dim)
    latents = torch.cat([autodecoder.decode_latent(part) for part in e.split(64)])
    return latents.contiguous()              # the decoder leaves them in another order of memory


def view_from(trained, azimuth):
    """A camera at an azimuth (radians) around the object: cam2world (4, 4), intrinsics (4,). OURS:
    through its lens a sphere of radius 1.3 fills the picture. The sphere's rim is seen at an angle
    of sine 1.3 / distance; half a picture over the tangent of that is the focal length."""
    distance = trained.view["distance"]
    cam2world = render.orbit(float(azimuth), trained.view["elevation"], distance)
    focal = 0.5 * math.sqrt(distance**2 - 1.3**2) / 1.3
    intrinsics = torch.tensor([focal, focal, 0.5, 0.5])
    return cam2world.to(trained.device), intrinsics.to(trained.device)


@torch.no_grad()
def render_views(trained, volumes, azimuths, size, n_samples=64, renderer=render.render):
    """Volumes (n, 4, D, H, W) from V azimuths (radians) -> rgb (n, V, 3, size, size) over black and
    occupancy (n, V, 1, size, size), on the CPU."""
    rgb = torch.empty(len(volumes), len(azimuths), 3, size, size)
    occupancy = torch.empty(len(volumes), len(azimuths), 1, size, size)
    for v, azimuth in enumerate(azimuths):
        cam2world, intrinsics = view_from(trained, azimuth)
        for i, volume in enumerate(volumes):                           # one at a time: memory
            colour, covered = renderer(volume[None], cam2world[None, None],
                                       intrinsics[None, None], size, n_samples)
            rgb[i, v] = colour[0, 0]
            occupancy[i, v] = covered[0, 0]
    return rgb, occupancy


def save_samples(trained, folder, n=8, steps=64, seed=0, churn=40.0):
    """n objects that never existed -> volumes (n, 4, D, H, W), paths of a sheet and a turntable."""
    noise = latent_noise(trained, n, seed)                             # (n, C, s, s, s)
    latents = sample_latents(trained, noise, steps, churn, seed)       # (n, C, s, s, s)
    volumes = decode(trained, latents)                                 # (n, 4, D, H, W)
    azimuths = [0.6 + 2 * math.pi * t / FRAMES for t in range(FRAMES)]     # 0.6: first from aside
    rgb, occupancy = render_views(trained, volumes, azimuths, SIDE)    # (n, T, ..., SIDE, SIDE)
    views = rgb + 1 - occupancy                # over white: black would swallow dark objects
    film = torch.cat(list(views), -1)          # side by side: (T, 3, SIDE, n SIDE)
    film = (film.clamp(0, 1) * 255).round().byte().movedim(1, -1)
    os.makedirs(folder, exist_ok=True)
    iio.imwrite(f"{folder}/samples.png", film[::FRAMES // 3].flatten(0, 1).numpy())   # 3 sides
    iio.imwrite(f"{folder}/turntable.gif", film.numpy(), duration=1000 / 15, loop=0)
    return volumes, [f"{folder}/samples.png", f"{folder}/turntable.gif"]


# ==== Second reading: checked loading, the baseline, text, what moves, figures, meshes, a page ====
# The same three steps for every kind of run, and everything else that one may want to see of it.
import base64  # noqa: E402
import contextlib  # noqa: E402
import dataclasses  # noqa: E402
import hashlib  # noqa: E402
import html  # noqa: E402
import itertools  # noqa: E402
import sys  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402
from string import Template  # noqa: E402

import matplotlib  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import data  # noqa: E402
from autodecoder import PoseNet, build_decoder  # noqa: E402
from data import BadInput, portraits  # noqa: E402
from diffusion import TOKENS, T5Encoder, build_denoiser, guided, words  # noqa: E402

matplotlib.use("Agg")                        # draw into files: no screen is needed
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

# ---- Checked loading: a checkpoint may come from a stranger --------------------------------------

# What a checkpoint must hold, and of which kind. Sampling needs the first two, resuming all.
IN_STAGE1 = {"digest": str, "settings": dict, "model": dict, "names": list, "captions": list,
             "source": str, "view": dict, "fingerprint": str, "portraits": torch.Tensor}
IN_STAGE2 = {"digest": str, "settings": dict, "ema": dict, "m": torch.Tensor, "s": torch.Tensor,
             "decoder": str, "vocabulary": list}
RESUMING = {"step": int, "seconds": float, "optimizer": dict, "random": dict, "log": dict}
RESUMING_STAGE1 = RESUMING | {"order": torch.Tensor}
RESUMING_STAGE2 = RESUMING | {"model": dict}
LEARNED_POSES = {"posenet": dict, "poses": torch.Tensor}


def load_checkpoint(folder, stage, resume=False):
    """Reads FOLDER/stage1.pt or stage2.pt: a dict of tensors and plain types (see train.save).

    resume  it must also hold what going on needs; where there is none yet, the answer is None
    Raises BadInput where there is none, it is damaged, or of another stage.
    """
    path = Path(folder) / f"stage{stage}.pt"
    if resume and not path.exists():
        return None
    if not path.exists():
        raise BadInput(f"{path} is not there: run `python train.py --stage {stage} --out {folder}` "
                       "with the same --data and --preset first")
    checkpoint = read_checkpoint(path)
    found = checkpoint.get("stage", "no")
    if found != stage:
        raise BadInput(f"{path} is a checkpoint of stage {found}, not {stage}; did files get "
                       "renamed?")
    check_holds(path, checkpoint, IN_STAGE1 if stage == 1 else IN_STAGE2)
    if stage == 1 and checkpoint["settings"].get("parts"):
        check_holds(path, checkpoint, LEARNED_POSES)
    if resume:
        check_holds(path, checkpoint, RESUMING_STAGE1 if stage == 1 else RESUMING_STAGE2)
    # TRAP: torch's own format would not notice: a weight with one bit turned is a weight, too.
    if content_digest(checkpoint) != checkpoint["digest"]:
        raise BadInput(f"{path} is damaged: what it holds is not what was saved; delete it and "
                       "train again, or use a copy")
    return checkpoint


def content_digest(checkpoint):
    """A short hash of all that a dict holds but its own "digest": every name, number and tensor."""
    digest = hashlib.sha256()
    content = {name: value for name, value in checkpoint.items() if name != "digest"}
    feed(digest, content)
    return digest.hexdigest()[:16]


def feed(digest, value):
    """Adds a value to a hash: a tensor, a plain value, or dicts and lists of them.

    In an order that does not hang on the order of writing; and with kinds and lengths, or [1, 2]
    and [12] would be the same.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        digest.update(f"dict {len(value)};".encode())
        for name in sorted(value, key=repr):
            feed(digest, name)
            feed(digest, value[name])
    elif isinstance(value, (list, tuple)):
        digest.update(f"list {len(value)};".encode())
        for entry in value:
            feed(digest, entry)
    else:
        digest.update(f"{type(value).__name__} {value!r};".encode())


def read_checkpoint(path):
    """The dict that a file holds, read by the safe loader alone: code in it is never run."""
    try:
        with warnings.catch_warnings():      # torch's, of a file that is about to be refused
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, PermissionError):
        raise                                # the file may be good: run_cli says the reason
    except Exception as error:               # the unpickler of a damaged file raises anything
        raise BadInput(f"{path} cannot be read as a checkpoint ({type(error).__name__}); if it is "
                       "damaged, delete it and train again") from None
    if not isinstance(checkpoint, dict):
        raise BadInput(f"{path} holds something else than a checkpoint; delete it and train again")
    return checkpoint


def check_holds(path, checkpoint, kinds):
    """Refuses a checkpoint in which one of the names of `kinds` is missing, or of another kind."""
    lacking = []
    for name, kind in kinds.items():
        if not isinstance(checkpoint.get(name), kind):
            lacking.append(name)
    if lacking:
        raise BadInput(f"{path} lacks {', '.join(lacking)}: it is damaged, or of another version; "
                       "train again")


def settings_of(checkpoint, path):
    """Its settings as a namespace; what this file asks of them is there, the rest restore tells."""
    settings = SimpleNamespace(**checkpoint["settings"])
    for name in ("size", "parts", "volume_side", "text", "t5", "sample_steps", "churn",
                 "guidance"):
        if not hasattr(settings, name):
            raise BadInput(f"{path} lacks the setting {name}: it is damaged, or of another "
                           "version; train again")
    return settings


def load_weights(flag, path, expected):
    """A file of weights that `flag` names -> dict; BadInput, saying what was expected."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        return dict(weights.items())
    except Exception as error:               # as above
        raise BadInput(f"{flag} {path}: not a file of weights ({type(error).__name__}); expected "
                       f"{expected}") from None


def restore(make, state_dict, path):
    """make() with a state dict loaded; what does not fit its own settings is bad input.

    make builds the module, and may fail in as many ways as settings can be wrong
    """
    try:
        module = make()
        module.load_state_dict(state_dict)
    except (RuntimeError, AttributeError, TypeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()[:100]
        raise BadInput(f"{path} does not fit the settings that it carries ({reason})") from None
    return module


def open_run(folder, device="cpu", stages=(1, 2)):
    """load_run for runs of every kind and from anybody. stages (1,): without diffusion.

    returns `trained`, as load_run does, and in it further
      data_settings     of stage 1: its seed, which may be another, made the training objects
      captions, source  of the training data, the latter an absolute path, or what made it up
      portraits         of that data, see data.py; run: the folder, for messages
      posenet           None where cameras are known; else also poses (T, P, 4, 4) of a clip
      encode            prompts to tokens; None where the run knows no text
    Raises BadInput where a checkpoint is missing, damaged, or does not belong to the other.
    """
    first = load_checkpoint(folder, 1)
    path = f"{folder}/stage1.pt"
    settings = settings_of(first, path)
    n_objects = len(first["names"])
    autodecoder = restore(lambda: build_decoder(settings, n_objects), first["model"], path)
    autodecoder = frozen(autodecoder, device)
    if 2 in stages:
        trained = open_stage2(folder, first, autodecoder, device)
    else:
        trained = SimpleNamespace(
            settings=settings, device=device, names=first["names"], view=first["view"],
            autodecoder=autodecoder, encode=None)
    trained.data_settings = settings
    trained.run = folder
    trained.captions = first["captions"]
    trained.source = first["source"]
    trained.portraits = first["portraits"]
    trained.posenet = None
    if settings.parts:
        posenet = restore(lambda: PoseNet.from_settings(settings), first["posenet"], path)
        trained.posenet = frozen(posenet, device)
        trained.poses = first["poses"].to(device)
    return trained


def frozen(module, device):
    """A network as it is used from now on: on its device, in evaluation mode, without gradients."""
    return module.to(device).eval().requires_grad_(False)


def open_stage2(folder, first, autodecoder, device):
    """load_run's namespace, of stage2.pt and what has been read: the checkpoint of stage 1, and
    the decoder.

    Latents mean nothing to another decoder than the one that they were learned from: it would make
    fog of them, without a word. So the two must belong together.
    """
    second = load_checkpoint(folder, 2)
    path = f"{folder}/stage2.pt"
    if second["decoder"] != first["fingerprint"]:
        raise BadInput(f"{path} was trained on another stage 1 than the one there now: run "
                       f"`python train.py --stage 2 --out {folder}` again")
    settings = settings_of(second, path)
    shape, vocabulary = autodecoder.latent_shape, second["vocabulary"]
    denoiser = restore(
        lambda: build_denoiser(settings, shape, vocabulary), second["ema"], path)
    normalizer = RobustNormalizer.from_settings(settings)
    normalizer.m, normalizer.s = second["m"], second["s"]
    trained = SimpleNamespace(
        settings=settings, device=device, names=first["names"], view=first["view"],
        autodecoder=autodecoder, denoiser=frozen(denoiser, device),
        normalizer=frozen(normalizer, device), encode=None)
    if settings.text:
        add_text(trained)
    return trained


# ---- The data of a run, once more ----------------------------------------------------------------
#
# A checkpoint has no photos. What reads them again later may find the folder moved, or other photos
# in it: scores and poses would then be of something else, and nothing would say so.


def are_same(portraits, others):
    """Whether two sets of portraits are of the same pictures, each within 2 % of all shades."""
    return portraits.shape == others.shape and (portraits - others).abs().max() < 0.02


def source_now(trained, source=None):
    """Where a run's data is: what --data says, or else where it was. BadInput where it is gone."""
    source = source or trained.source
    if source not in ("synthetic", "puppets") and not Path(source).exists():
        raise BadInput(f"{source}, which {trained.run} was trained on, is not there: say with "
                       "--data where its photos are now")
    return source


def other_photos(trained, source):
    """What is said where the data of a run is no longer what it was."""
    return BadInput(f"those in {source} are not the photos that {trained.run} was trained on: say "
                    "with --data where these are now")


def load_data(trained, source=None):
    """The Dataset that a run was trained on; source as in source_now. BadInput where it is another.
    """
    source = source_now(trained, source)
    dataset = data.load_for(trained.data_settings, source)
    if dataset.names != trained.names or not are_same(portraits(dataset), trained.portraits):
        raise other_photos(trained, source)
    return dataset


# ---- The mode of networks ------------------------------------------------------------------------
@contextlib.contextmanager
def evaluating(trained):
    """Evaluation mode while pictures are drawn; afterwards each network is in its mode again.

    trained: anything with autodecoder and posenet (or None), so also what a training loop carries.
    TRAP: without it, drawing in the middle of training would move batch norm's running statistics.
    """
    modules = [trained.autodecoder]
    if trained.posenet is not None:
        modules.append(trained.posenet)
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes):
            module.train(mode)


# ---- The baseline: direct latent sampling (Sec. 4) -----------------------------------------------
@torch.no_grad()
def latents_of(trained, embeddings):
    """F = G1(e): embeddings (n, embed_dim) -> (n, C, s, s, s)."""
    return torch.cat([trained.autodecoder.decode_latent(part) for part in embeddings.split(64)])


@torch.no_grad()
def training_embeddings(trained):
    """e of every training object: (N, embed_dim)."""
    k = torch.arange(len(trained.names), device=trained.device)
    return trained.autodecoder.embed(k)


def direct_latents(trained, n, seed, kind):
    """No diffusion: embeddings drawn at random and decoded by G1 -> latents (n, C, s, s, s).

    kind "normal": e ~ N(0, I) (PAPER), what the embeddings started as
    kind "fitted": e ~ N(mean, covariance) of the trained ones (the predecessor whitens them)
    The paper diffuses F instead because the embeddings are free to lie anywhere: nothing in stage 1
    makes the space between them mean anything.
    """
    generator = stream(seed, f"direct {kind}")
    e = training_embeddings(trained)                                   # (N, embed_dim)
    N, embed_dim = e.shape
    if kind == "normal":
        drawn = torch.randn(n, embed_dim, generator=generator).to(e)
        return latents_of(trained, drawn)
    # With fewer objects than dimensions the covariance is singular and has no Cholesky factor. But
    # with z ~ N(0, I), z^T (E - mean) / sqrt(N - 1) has just this covariance, for any N.
    mean = e.mean(0)
    z = torch.randn(n, N, generator=generator).to(e)
    drawn = mean + z @ (e - mean) / math.sqrt(max(1, N - 1))
    return latents_of(trained, drawn)


# ---- Text (Sec. 3.3): prompts and guidance -------------------------------------------------------
def add_text(trained):
    """Turns a run into one with text: adds encode and text_denoiser.

    trained.denoiser becomes the text_denoiser with nothing asked for, so that all that samples
    without a prompt need not know of text. Some captions were left out in training: the null prompt
    stands for all objects together.
    """
    trained.text_denoiser = trained.denoiser
    if trained.settings.t5:
        trained.encode = T5Encoder(trained.settings.t5, trained.device)
    else:
        trained.encode = trained.text_denoiser.text
    null = trained.encode([""])
    trained.denoiser = guided(trained.text_denoiser, null, null, 0)


def check_prompt(trained, prompt):
    """Refuses a prompt where the run knows no text; warns of words that will not be heard."""
    if trained.encode is None:
        raise BadInput("--prompt: this run knows no text; train its stage 2 with --text")
    unknown = list(dict.fromkeys(trained.encode.unknown(prompt)))      # each of them once
    if unknown:
        listed = ", ".join(unknown[:9])
        if len(unknown) > 9:
            listed += " ..."
        print(f"warning: no caption had {listed}: left out", file=sys.stderr)
    if len(words(prompt)) >= TOKENS:
        print(f"warning: only the first {TOKENS - 1} words of a prompt are read", file=sys.stderr)


def sample_prompts(trained, noise, prompts, steps=64, churn=40.0, seed=0, guidance=3.0):
    """sample_latents that listens: one prompt for each of the n noises.

    guidance  the w of D(x | nothing) + w (D(x | prompt) - D(x | nothing)): 1 is what was learned;
              with more, samples follow the prompt more closely and differ less (PAPER: 3)
    """
    told = SimpleNamespace(**vars(trained))                            # a copy, of other denoiser
    null = trained.encode([""])
    latents = []
    for first in range(0, len(noise), 64):
        chunk = slice(first, first + 64)
        context = trained.encode(prompts[chunk])
        told.denoiser = guided(trained.text_denoiser, context, null, guidance)
        latents.append(sample_latents(told, noise[chunk], steps, churn, seed, first=first))
    return torch.cat(latents)


def sample_prompt(trained, noise, steps, churn, seed, prompt=None, guidance=3.0):
    """The same prompt for all; None: no prompt, plain sample_latents."""
    if prompt is None:
        return sample_latents(trained, noise, steps, churn, seed)
    prompts = [prompt] * len(noise)
    return sample_prompts(trained, noise, prompts, steps, churn, seed, guidance)


# ---- What moves: its cameras and its views (Sec. 3.2, App. B.1) ----------------------------------
@torch.no_grad()
def cameras_of(trained, dataset, frames):
    """Cameras of frames (n,) of a dataset: known ones (n, 4, 4); or what the pose network sees in
    the pictures, one for each part, (n, P, 4, 4). trained: anything with posenet and device."""
    if trained.posenet is None:
        return dataset.cam2world[frames].to(trained.device)
    size = min(64, dataset.images.shape[1])                # PAPER: it looks at 64 x 64
    cameras = []
    for part in frames.split(64):
        images, _ = dataset.batch(part, size)
        seen, *_ = trained.posenet(images.to(trained.device))
        cameras.append(seen)
    return torch.cat(cameras)


def moving_view_from(trained, azimuth, pose):
    """view_from for a subject of P parts: cameras (P, 4, 4), intrinsics (4,).

    pose: a number in trained.poses. All parts' cameras turn together about the subject, so what is
    seen from another side is still in that pose.
    """
    distance = trained.posenet.distance
    cameras = render.turn_about(trained.poses[pose], azimuth, distance, trained.view["elevation"])
    focal = trained.posenet.focal                          # the lens of the clips
    intrinsics = torch.tensor([focal, focal, 0.5, 0.5])
    return cameras.to(trained.device), intrinsics.to(trained.device)


def draw_chunks(draw, volumes, cameras, intrinsics, size, n_samples=64):
    """One view of each of B volumes, eight at a time -> list of what `draw` returned each time.

    draw: a renderer of render.py; cameras: (4, 4), or (P, 4, 4) for what moves
    """
    answers = []
    for few in volumes.split(8):
        n = len(few)
        cameras_of_few = cameras.expand(n, 1, *cameras.shape)          # (n, 1, ..., 4, 4)
        lenses = intrinsics.expand(n, 1, 4)
        answers.append(draw(few, cameras_of_few, lenses, size, n_samples))
    return answers


@torch.no_grad()
def render_any_views(trained, volumes, azimuths, size, n_samples=64, pose=0):
    """render_views; and the same for subjects that move, (B, 4 + P, D, H, W), in one of their poses
    (a number in trained.poses)."""
    if trained.posenet is None:
        return render_views(trained, volumes, azimuths, size, n_samples, render.render_skipping)
    rgb, occupancy = [], []
    for azimuth in azimuths:
        cameras, intrinsics = moving_view_from(trained, azimuth, pose)
        answers = draw_chunks(render.render_moving, volumes, cameras, intrinsics, size, n_samples)
        rgb.append(torch.cat([colour for colour, _ in answers]).cpu())
        occupancy.append(torch.cat([covered for _, covered in answers]).cpu())
    return torch.cat(rgb, 1), torch.cat(occupancy, 1)


@torch.no_grad()
def geometry_views(trained, volumes, azimuth, size, pose=0):
    """One view of each of B volumes, rigid or moving -> dict of (B, C, size, size), on the CPU.

    rgb, occupancy, depth, normal and, of what moves, parts: see render.render_geometry
    """
    if trained.posenet is None:
        cameras, intrinsics = view_from(trained, azimuth)
        answers = draw_chunks(render.render_geometry, volumes, cameras, intrinsics, size)
    else:
        cameras, intrinsics = moving_view_from(trained, azimuth, pose)
        answers = draw_chunks(render.render_moving_geometry, volumes, cameras, intrinsics, size)
    views = {}
    for name in answers[0]:
        pictures = torch.cat([answer[name] for answer in answers])     # (B, 1, C, size, size)
        views[name] = pictures[:, 0].cpu()
    return views


# ---- How near is it to what was trained on, and to photos never seen? ----------------------------
def appearance(trained, volumes):
    """What the eye compares: colours at 32 x 32 from all sides -> (n, d), scaled so that a distance
    is a root-mean-square difference of colours."""
    azimuths = [-0.35, 0.0, 0.35]                          # a clip shows the front of its subject
    if trained.posenet is None:
        azimuths = [0.4 + quarter * math.pi / 2 for quarter in range(4)]
    rgb, _ = render_any_views(trained, volumes, azimuths, 32, n_samples=48)
    flat = rgb.flatten(1)                                              # (n, V 3 32 32)
    return flat / math.sqrt(flat.shape[1])


def nearest_training(trained, volumes, training_volumes):
    """The training object that looks most like each volume: index (n,) int64, distance (n,).

    A sample at no distance has been learned by heart: this is how one tells (Sec. 4).
    """
    ours = appearance(trained, volumes)
    theirs = appearance(trained, training_volumes)
    distance = torch.cdist(ours, theirs)                               # (n, N)
    return distance.argmin(1), distance.amin(1)


def render_frames(trained, dataset, frames, n_samples):
    """What the decoder makes of frames (n,) -> rgb (n, 3, S, S), occupancy (n, 1, S, S), on the
    CPU."""
    size = dataset.images.shape[1]
    volumes = trained.autodecoder(dataset.object_index[frames].to(trained.device))
    cameras = cameras_of(trained, dataset, frames)[:, None]            # (n, 1, 4, 4), one view each
    intrinsics = dataset.intrinsics[frames, None].to(trained.device)   # (n, 1, 4)
    draw = render.render_skipping if trained.posenet is None else render.render_moving
    rgb, occupancy = draw(volumes, cameras, intrinsics, size, n_samples)
    return rgb[:, 0].cpu(), occupancy[:, 0].cpu()


def frames_to_score(dataset, most=4096):
    """Numbers of the held-out frames, in order; where there are over `most`, of so many at random.

    OURS: to render 80,000 takes longer than many a training, and tells no more. At random, always
    the same: every 20th, say, could be the same view of each object.
    """
    heldout = torch.nonzero(dataset.heldout)[:, 0]
    order = torch.randperm(len(heldout), generator=stream(0, "frames to score"))
    return heldout[order[:most].sort().values]


@torch.no_grad()
def score_heldout(trained, dataset, n_samples=96):
    """How well views are met that training never saw -> dict of means over frames_to_score.

    psnr_heldout  dB, -10 log10(mean squared error of colours)
    mask_heldout  mean |O - mask|, what Eq. 2 measures
    {} for a dataset without held-out views. trained: autodecoder, posenet and device are enough.
    """
    if not dataset.heldout.any():
        return {}
    psnr, misses = [], []
    with evaluating(trained):
        for frames in frames_to_score(dataset).split(8):
            rgb, occupancy = render_frames(trained, dataset, frames, n_samples)
            images, masks = dataset.batch(frames, dataset.images.shape[1])
            error = (rgb - images).square().flatten(1).mean(1)         # (n,)
            psnr.append(-10 * error.clamp(min=1e-10).log10())          # at most 100 dB
            misses.append((occupancy - masks).abs().flatten(1).mean(1))
    mean_psnr = torch.cat(psnr).mean().item()
    mean_miss = torch.cat(misses).mean().item()
    return {"psnr_heldout": round(mean_psnr, 4), "mask_heldout": round(mean_miss, 4)}


# ---- Pictures, sheets and films ------------------------------------------------------------------
def on_white(rgb, occupancy):
    """Colour over white instead of black, for looking at: dark objects show. (..., 3, H, W)."""
    return rgb + 1 - occupancy


def to_uint8(pictures):
    """(..., 3, H, W) in [0, 1] -> numpy (..., H, W, 3) of bytes, as files hold them."""
    levels = (pictures.clamp(0, 1) * 255).round().byte()
    return levels.movedim(-3, -1).cpu().numpy()


def tile(rows):
    """Rows of pictures, a list of (n, 3, H, W) -> one picture (3, H', W'), 2 pixels between."""
    strips = []
    for row in rows:
        framed = [F.pad(picture, (1, 1, 1, 1), value=1.0) for picture in row]
        strips.append(torch.cat(framed, -1))
    return torch.cat(strips, -2)


def film_frames(views):
    """Pictures of n objects at T times (n, T, 3, H, W), four in a row -> frames (T, 3, H', W').

    A last row that is not full is left out.
    """
    columns = min(4, len(views))
    rows = []
    for first in range(0, len(views) - columns + 1, columns):
        rows.append(views[first:first + columns])
    return torch.stack([tile([row[:, t] for row in rows]) for t in range(views.shape[1])])


def save_figure(path, figure, **options):
    """Writes a figure of matplotlib, and forgets it; options: of savefig."""
    try:
        with data.writing(path) as temporary:
            figure.savefig(temporary, **options)
    finally:
        plt.close(figure)


def save_film(folder, name, frames, fps=15):
    """Writes frames (T, 3, H, W) as GIF and as MP4 -> the two paths.

    A GIF shows in a README and has 256 colours; an MP4 has all of them, and is a tenth of its size.
    """
    height, width = frames.shape[-2:]
    even = frames[..., :height - height % 2, :width - width % 2]       # as H.264 wants its sides
    frames = to_uint8(even)
    gif = Path(folder) / f"{name}.gif"
    mp4 = Path(folder) / f"{name}.mp4"
    # By way of memory. TRAP: where imageio finds the disk full it raises twice, once for nobody.
    content = iio.imwrite("<bytes>", frames, extension=".gif", duration=1000 / fps, loop=0)
    with data.writing(gif) as temporary:
        temporary.write_bytes(content)
    with data.writing(mp4) as temporary:
        iio.imwrite(temporary, frames, fps=fps, codec="libx264", macro_block_size=2)
        # TRAP: where ffmpeg finds the disk full, nobody says so. Its table of contents, "moov",
        # comes last: without it there is no film.
        if b"moov" not in temporary.read_bytes():
            raise OSError("ffmpeg could not finish it; is the disk full?")
    return [gif, mp4]


def middles(length, n):
    """Of the n equal parts of a length."""
    return [length / n * (i + 0.5) for i in range(n)]


def save_sheet(path, rows, labels, title="", below=()):
    """Writes rows of pictures, a list of (n, 3, H, W), as one PNG, with a label beside each row
    and, where `below` has some, under each column."""
    zoom = max(1, round(SIDE / rows[0].shape[-1]))                      # small ones are enlarged
    picture = tile(rows).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    _, height, width = picture.shape
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=100)
    axis = figure.add_axes([0, 0, 1, 1])                   # one pixel of the tile, one of the PNG
    axis.imshow(to_uint8(picture), interpolation="nearest")
    axis.set_yticks(middles(height, len(rows)), labels, fontsize=9)
    axis.set_xticks(middles(width, len(below)), below, fontsize=9)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=10)
    save_figure(path, figure, bbox_inches="tight", pad_inches=0.05)


# ---- Pictures of geometry ------------------------------------------------------------------------
def depth_picture(views):
    """Depth (..., 1, H, W) as grey: near is dark, the background white -> (..., 3, H, W)."""
    depth = views["depth"]
    hit = views["occupancy"] > 0.5
    seen = depth[hit]
    if not hit.any():
        seen = depth.new_tensor([0.0, 1.0])
    low, high = seen.min(), seen.max()
    span = (high - low).clamp(min=1e-6)
    grey = (0.1 + 0.8 * (depth - low) / span).clamp(0, 1)  # not quite black, not quite white
    grey = torch.where(hit, grey, torch.ones_like(grey))
    return grey.expand_as(views["rgb"])


def normal_picture(views):
    """Normals as colours: x, y, z in [-1, 1] become red, green, blue; the background is white."""
    hit = views["occupancy"] > 0.5
    return torch.where(hit, (views["normal"] + 1) / 2, torch.ones(()))


def parts_picture(views):
    """Which part is seen, a colour each, over white: parts (..., P, H, W) -> (..., 3, H, W)."""
    share = views["parts"]
    hue = torch.arange(share.shape[-3]) * 2.4              # radians: the golden angle never repeats
    waves = torch.stack([hue.cos(), (hue + 2.1).cos(), (hue + 4.2).cos()], -1)     # (P, 3)
    colours = 0.55 + 0.45 * waves
    painted = torch.einsum("...phw,pc->...chw", share, colours)
    return on_white(painted, views["occupancy"])


def geometry_rows(views):
    """Rows of a sheet and their labels: colour, depth, normals and, of what moves, parts."""
    colour = on_white(views["rgb"], views["occupancy"])
    rows = [colour, depth_picture(views), normal_picture(views)]
    labels = ["colour", "depth", "normals"]
    if "parts" in views:
        rows.append(parts_picture(views))
        labels.append("parts")
    return rows, labels


# ---- Figures of training -------------------------------------------------------------------------
def frames_to_show(dataset, n):
    """Up to n frame numbers, evenly from all held-out frames, so of many objects; where none are
    held out, from all. And which of the two it was, in a word."""
    frames = torch.nonzero(dataset.heldout)[:, 0]
    kind = "held-out"
    if len(frames) == 0:
        frames = torch.arange(len(dataset.heldout))
        kind = "training"
    places = torch.linspace(0, len(frames) - 1, min(n, len(frames))).long()
    return frames[places], kind


@torch.no_grad()
def save_training_sheet(path, state, dataset, n=8):
    """Truth over what the decoder makes of it, and its geometry, for n views.

    state: what a training loop carries; autodecoder, posenet and device are used
    """
    frames, kind = frames_to_show(dataset, n)
    size = dataset.images.shape[1]
    images, masks = dataset.batch(frames, size)
    draw = render.render_geometry if state.posenet is None else render.render_moving_geometry
    with evaluating(state):
        volumes = state.autodecoder(dataset.object_index[frames].to(state.device))
        cameras = cameras_of(state, dataset, frames)[:, None]          # (n, 1, 4, 4), one view each
        intrinsics = dataset.intrinsics[frames, None].to(state.device)
        pictures = draw(volumes, cameras, intrinsics, size, 96)
    views = {name: picture[:, 0].cpu() for name, picture in pictures.items()}
    (colour, *geometry), (_, *labels) = geometry_rows(views)
    truth = on_white(images, masks)
    shadow = 1 - views["occupancy"].expand(-1, 3, -1, -1)              # what Eq. 2 compares
    rows = [truth, colour, shadow] + geometry
    save_sheet(path, rows, ["truth", "render", "occupancy"] + labels, f"{kind} views")


@torch.no_grad()
def save_orbit(path, trained, n=4, columns=8):
    """The first n training objects from all sides; what moves only from the front, +-45 degrees."""
    n = min(n, len(trained.names))
    volumes = trained.autodecoder(torch.arange(n, device=trained.device))
    whole, first = 2 * math.pi, 0.0
    if trained.posenet is not None:
        whole = math.pi / 2
        first = -0.44 * whole
    azimuths = [first + whole * column / columns for column in range(columns)]
    rgb, occupancy = render_any_views(trained, volumes, azimuths, SIDE)
    views = on_white(rgb, occupancy)                                   # (n, columns, 3, ., .)
    labels = [name[-16:] for name in trained.names[:n]]
    step = math.degrees(whole) / columns
    save_sheet(path, list(views), labels, f"training objects, turned by {step:.0f} degrees")


def save_latent_histogram(path, latents):
    """The paper's Fig. 9: latents raw, after mean and deviation, after median and IQR.

    What to look for: how far the extremes lie out, in units of the bell's width.
    """
    titles = {"none": "raw latents", "meanstd": "(F - mean) / std",
              "robust": "(F - median) / (0.7413 IQR)"}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), constrained_layout=True)
    for axis, mode in zip(axes, titles):
        normalizer = RobustNormalizer(mode).fit(latents)
        values = normalizer.normalize(latents).flatten().cpu()
        low, high = values.min().item(), values.max().item()
        limit = 5.0                                                    # beyond it: in the last bars
        if mode == "none":
            limit = max(-low, high)
        axis.hist(values.clamp(-limit, limit).numpy(), bins=120, color="tab:blue")
        axis.set_yscale("log")
        axis.set_title(titles[mode])
        label = f"std {values.std():.2f}, extremes {low:.1f} and {high:.1f}"
        axis.set_xlabel(label, fontsize=9)
    save_figure(path, figure, dpi=100)


def save_noise_strip(path, trained, steps, n=4, seed=0, columns=8):
    """From noise to object: what the denoiser believes along the sampler's path, decoded.

    At high noise it can only answer with the mean of all objects; the lower the noise, the more it
    has decided.
    """
    asked = []

    def denoise(x, sigma):
        denoised = trained.denoiser(x, sigma)
        asked.append((sigma, denoised))
        return denoised

    noise = latent_noise(trained, n, seed)
    edm_sampler(denoise, noise.to(trained.device), steps, S_churn=0)
    believed = asked[0::2]                       # Heun asks twice a step: at its begin, at its end
    pictures, sigmas = [], []
    for column in range(columns):
        sigma, denoised = believed[round(column * (steps - 1) / (columns - 1))]
        latents = trained.normalizer.denormalize(denoised.float())
        rgb, occupancy = render_any_views(trained, decode(trained, latents), [0.6], 80)
        pictures.append(on_white(rgb, occupancy)[:, 0])
        sigmas.append(f"σ = {sigma:.2g}")
    strip = torch.stack(pictures, 1)                                   # (n, columns, 3, 80, 80)
    labels = [f"sample {i + 1}" for i in range(n)]
    save_sheet(path, list(strip), labels, "what the denoiser believes, as noise falls", sigmas)


# ---- Sheets and films of samples of every kind ---------------------------------------------------
def rows_of_eight(views):
    """Pictures of n objects from V sides (n, V, 3, H, W) -> rows of up to eight objects, a row for
    each side; V more rows for every further eight. A last group that is not full is left out."""
    columns = min(8, len(views))
    rows = []
    for first in range(0, len(views) - columns + 1, columns):
        group = views[first:first + columns]
        rows += list(group.transpose(0, 1))                            # V of (columns, 3, H, W)
    return rows


def save_sample_sheet(folder, trained, volumes, nearest=False):
    """samples.png, from three sides, and geometry.png, depth and normals -> the two paths.

    nearest  also a row of the training objects that look most like the samples. Every training
             object is decoded and rendered for it, which takes longer than sampling does.
    """
    azimuths = [0.6, 2.2, 3.7]
    if trained.posenet is not None:
        azimuths = [0.0, -0.35, 0.35]                                  # its back was never seen
    rgb, occupancy = render_any_views(trained, volumes, azimuths, SIDE)
    views = on_white(rgb, occupancy)                                   # (n, 3, 3, SIDE, SIDE)
    labels = ["sample", "turned", "turned"]
    title = f"{len(volumes)} samples"
    if nearest:
        latents = training_latents(trained.autodecoder, len(trained.names))
        training_volumes = decode(trained, latents)
        index, distance = nearest_training(trained, volumes, training_volumes)
        likest = training_volumes[index.to(trained.device)]
        rgb, occupancy = render_any_views(trained, likest, azimuths[:1], SIDE)
        views = torch.cat([views, on_white(rgb, occupancy)], 1)        # (n, 4, 3, SIDE, SIDE)
        labels.append("nearest\ntraining\nobject")
        title += ("; root-mean-square distance to the nearest training object "
                  f"{distance.min():.3f} to {distance.max():.3f}")
    rows = rows_of_eight(views)
    groups = len(rows) // len(labels)
    sheet, geometry = Path(folder) / "samples.png", Path(folder) / "geometry.png"
    save_sheet(sheet, rows, labels * groups, title)
    rows, labels = geometry_rows(geometry_views(trained, volumes[:8], azimuths[0], SIDE))
    save_sheet(geometry, rows[:3], labels[:3])                         # without the parts
    return [sheet, geometry]


def save_turntable(trained, volumes, folder):
    """A film of volumes (n, 4, D, H, W) that turn once -> paths."""
    azimuths = torch.linspace(0, 2 * math.pi, FRAMES + 1)[:-1]         # the last is the first again
    rgb, occupancy = render_views(trained, volumes, azimuths.tolist(), SIDE,
                                  renderer=render.render_skipping)
    return save_film(folder, "turntable", film_frames(on_white(rgb, occupancy)))


def save_any_turntable(trained, volumes, folder):
    """save_turntable; for what moves a swing of +-20 degrees, while it goes through its poses."""
    if trained.posenet is None:
        return save_turntable(trained, volumes, folder)
    turns = torch.linspace(0, 2 * math.pi, FRAMES + 1)[:-1]
    views = []
    for t, turn in enumerate(turns.tolist()):
        azimuth = math.radians(20) * math.sin(turn)
        pose = t % len(trained.poses)
        rgb, occupancy = render_any_views(trained, volumes, [azimuth], SIDE, pose=pose)
        views.append(on_white(rgb, occupancy))                         # (n, 1, 3, SIDE, SIDE)
    return save_film(folder, "turntable", film_frames(torch.cat(views, 1)))


def save_any_samples(trained, folder, n, steps, seed, churn, direct=None, prompt=None,
                     guidance=3.0, nearest=False):
    """save_samples for runs of every kind, with the wishes of the command line -> volumes, paths.

    direct  "normal" or "fitted": see direct_latents; None: by diffusion
    prompt  what to make; None: anything           nearest  see save_sample_sheet
    """
    if direct is not None:
        latents = direct_latents(trained, n, seed, direct)
    else:
        noise = latent_noise(trained, n, seed)
        latents = sample_prompt(trained, noise, steps, churn, seed, prompt, guidance)
    volumes = decode(trained, latents)
    folder = Path(folder)
    data.make_folder(folder)
    paths = save_sample_sheet(folder, trained, volumes, nearest)
    return volumes, paths + save_any_turntable(trained, volumes, folder)


# ---- Between two objects -------------------------------------------------------------------------
def arc_between(a, b, shares):
    """Noises on the arc from a to b, both (1, C, s, s, s): at T shares in [0, 1], (T, C, s, s, s).

        (sin((1 - t) angle) a + sin(t angle) b) / sin(angle)
    On the arc, not on the chord: noise of so many numbers has all but always the same length, and
    half-way along a straight line it would be too short, unlike all that was trained on.
    """
    a, b = a.double(), b.double()
    cosine = F.normalize(a.flatten(), dim=0) @ F.normalize(b.flatten(), dim=0)
    angle = torch.acos(cosine)
    t = shares.double()[:, None, None, None, None]
    mixed = torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b
    return (mixed / angle.sin()).float()


def save_interpolation(trained, folder, seeds, steps, prompt=None, guidance=3.0, frames=36):
    """From the first object of one seed to that of another: sheet, film there and back -> paths."""
    a = latent_noise(trained, 1, seeds[0])
    b = latent_noise(trained, 1, seeds[1])
    noise = arc_between(a, b, torch.linspace(0, 1, frames, dtype=torch.float64))
    # Without churn, for then a latent is a smooth function of its noise: nothing jumps.
    latents = sample_prompt(trained, noise, steps, 0.0, 0, prompt, guidance)
    volumes = decode(trained, latents)
    rgb, occupancy = render_any_views(trained, volumes, [0.6], SIDE)
    pictures = on_white(rgb, occupancy)[:, 0]                          # (T, 3, SIDE, SIDE)
    shown = torch.linspace(0, frames - 1, 9).round().long()            # first is a, last is b
    sheet = Path(folder) / "interpolation.png"
    save_sheet(sheet, [pictures[shown]], [f"seed {seeds[0]} to {seeds[1]}"])
    there_and_back = torch.cat([pictures, pictures.flip(0)])
    return [sheet] + save_film(folder, "interpolation", there_and_back)


# ---- Driving: a subject in the poses of a clip (Sec. 3.2) ----------------------------------------
def load_driving(trained, clip, source=None):
    """Poses of a clip become trained.poses, in which all figures then show their subjects.

    clip     its name in the run's data, or a path
    source   where the run's data is now; None: where it was
    returns  its frames over white (T, 3, H, W)
    """
    settings = SimpleNamespace(**vars(trained.data_settings))          # a copy, for this clip alone
    settings.clip_filter = False
    if Path(clip).exists():
        source = clip
        settings.objects = ""
        settings.as_clips = True
    else:
        source = source_now(trained, source)
        settings.objects = clip
        check_clip(trained, settings, source)
    dataset = data.load_for(settings, source)
    if not dataset.moving:
        raise BadInput(f"--drive {clip}: not a clip")
    frames = dataset.frames_of(0)                                      # held-out ones, too
    trained.poses = cameras_of(trained, dataset, frames)               # (T, P, 4, 4)
    images, masks = dataset.batch(frames, settings.size)
    return on_white(images, masks)


def check_clip(trained, settings, source):
    """Refuses a clip of the run's data that is no longer what the run has seen.

    settings: the run's, but of this clip alone. One that the run left out cannot be compared.
    """
    if settings.objects in trained.names:
        k = trained.names.index(settings.objects)
        dataset = data.load_for(settings, source)
        if not are_same(portraits(dataset), trained.portraits[k:k + 1]):
            raise other_photos(trained, source)


def join_views(views):
    """n dicts of pictures (1, C, H, W), as of geometry_views -> one dict of (n, C, H, W)."""
    return {name: torch.cat([view[name] for view in views]) for name in views[0]}


def save_motion(trained, folder, volume, driving=None, columns=8):
    """One subject (1, C, D, H, W) in the run's poses: sheet, novel views, film -> paths.

    driving  (T, 3, H, W): the frames that the poses come from, shown beside it; None: not at hand
    """
    folder = Path(folder)
    T = len(trained.poses)
    shown = [column * (T - 1) // (columns - 1) for column in range(columns)]
    views = [geometry_views(trained, volume, 0.0, SIDE, pose) for pose in shown]
    rows, labels = geometry_rows(join_views(views))
    film = []
    for pose in range(T):
        rgb, occupancy = render_any_views(trained, volume, [0.0], SIDE, pose=pose)
        film.append(on_white(rgb, occupancy)[0, 0])
    film = torch.stack(film)                                           # (T, 3, SIDE, SIDE)
    if driving is not None:
        driving = F.interpolate(driving, size=(SIDE, SIDE), mode="nearest")
        rows = [driving[shown]] + rows
        labels = ["driving"] + labels
        film = torch.cat([driving, film], -1)
    save_sheet(folder / "motion.png", rows, labels)

    # PAPER: novel views of an animated subject, at these angles.
    turned = []
    for degrees in (-20, -10, 0, 10, 20):
        turned.append(geometry_views(trained, volume, math.radians(degrees), SIDE, T // 2))
    rows, labels = geometry_rows(join_views(turned))
    save_sheet(folder / "views.png", rows, labels, "seen from -20, -10, 0, 10, 20 degrees")
    return [folder / "motion.png", folder / "views.png"] + save_film(folder, "motion", film)


# ---- Meshes --------------------------------------------------------------------------------------
def import_marching_cubes():
    """scikit-image's function. Raises BadInput, which says what to install, where there is none."""
    try:
        from skimage.measure import marching_cubes
    except ImportError:
        raise BadInput("--mesh needs scikit-image: pip install scikit-image") from None
    return marching_cubes


def save_mesh(path, volume):
    """A coloured triangle mesh (PLY) of one volume (4 or more, D, H, W): density and colour.

    Fog has no surface; it is put where a voxel, 2 / D wide, stops half of the light:
    exp(-density 2 / D) = 1/2. A volume that nowhere is so dense has no mesh, which is said.
    Returns the list of what was written, path or nothing.
    """
    marching_cubes = import_marching_cubes()
    volume = volume[:4].cpu()                                          # skinning is not looked at
    side = volume.shape[-1]
    level = math.log(2) * side / 2
    # A border of nothing closes the surface where an object touches the faces of its cube.
    density = F.pad(volume[0], (1, 1, 1, 1, 1, 1)).numpy()
    if density.max() <= level:
        path.unlink(missing_ok=True)                                   # another sampling's
        print(f"{path}: this sample is empty, no mesh written; try another --seed")
        return []
    corners, faces, _, _ = marching_cubes(density, level)              # in voxels of that array
    voxels = torch.from_numpy(corners.copy()) - 1                      # without the border
    zyx = (voxels + 0.5) * 2 / side - 1                                # centres: see render.py
    points = zyx.flip(-1).float()                                      # (K, 3) x, y, z
    write_ply(path, points, surface_colours(volume, points), faces)
    return [path]


def surface_colours(volume, points):
    """Colours (K, 3) in 0..255 of a volume (4, D, H, W) at points (K, 3) of its surface.

    TRAP: near a surface the colour of empty voxels mixes in, which nothing has ever trained. So
    density x colour is interpolated, and then divided by the density.
    """
    density = volume[:1]
    weighted = torch.cat([density, density * volume[1:]])              # (4, D, H, W)
    values = render.sample_volume(weighted[None], points[None])[0]     # (K, 4)
    colours = values[:, 1:] / values[:, :1].clamp(min=1e-6)
    return (colours.clamp(0, 1) * 255).round().int()


def write_ply(path, points, colours, faces):
    """A PLY file, as text: corners (K, 3), their colours (K, 3), triangles of corner numbers."""
    lines = ["ply", "format ascii 1.0", f"element vertex {len(points)}"]
    for axis in "xyz":
        lines.append(f"property float {axis}")
    for colour in ("red", "green", "blue"):
        lines.append(f"property uchar {colour}")
    lines += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header"]
    for (x, y, z), colour in zip(points.tolist(), colours.tolist()):
        red, green, blue = colour
        lines.append(f"{x:.5f} {y:.5f} {z:.5f} {red} {green} {blue}")
    for a, b, c in faces.tolist():
        lines.append(f"3 {a} {b} {c}")
    with data.writing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


# ---- One page of a run ---------------------------------------------------------------------------
#
# page.html shows a run to somebody who has nothing but a browser. It is one file, which fetches
# nothing: pictures stand in it as text. All frames of a turning object are one large picture, of
# which the page shows one frame at a time: so all are there at once, and none flickers.

ON_PAGE = 8                      # objects that can be turned, at most
MOST_ON_PAGE = 64                # objects on the sheet: the page stays below 5 MB
ORBIT, ORBIT_COLUMNS = 36, 6     # frames of a turn: ten degrees from one to the next; in columns
ORBIT_SIDE = 160                 # pixels of such a frame
LEVELS = 16                      # of noise, from noise to object


def picture_tag(picture, alt):
    """A picture (3, H, W) as HTML that holds it. alt: what is said to those who do not see it."""
    # TRAP: JPEG would keep colours at a quarter of the pixels, and smear them; 0: at all of them.
    content = iio.imwrite("<bytes>", to_uint8(picture), extension=".jpeg", quality=88,
                          subsampling=0)
    text = base64.b64encode(content).decode()              # a third longer than the bytes
    height, width = picture.shape[-2:]
    # TRAP: names are those of folders, prompts anybody's: unescaped, one could be a program.
    return (f'<img src="data:image/jpeg;base64,{text}" alt="{html.escape(alt)}" '
            f'width="{width}" height="{height}">')


def figure_tag(picture, alt, words):
    """A picture on a card, and words below."""
    card = f'<div class="card">{picture_tag(picture, alt)}</div>'
    return f"<figure>{card}<figcaption>{html.escape(words)}</figcaption></figure>\n"


def frames_tag(frames, columns, alt):
    """Frames (T, 3, H, W) as one picture of T / columns rows, of which the first frame shows."""
    height, width = frames.shape[-2:]
    rows = [torch.cat(list(row), -1) for row in frames.split(columns)]
    tag = picture_tag(torch.cat(rows, -2), alt)
    shape = f"aspect-ratio: {width} / {height}; --columns: {columns}"
    return f'<div class="card frame" style="{shape}">{tag}</div>'


def viewer_tag(body, columns, words):
    """frames_tag's, in `body`, and a slider for them. words: what it says, of each frame."""
    told = html.escape("|".join(words))
    slider = (f'<input type="range" min="0" max="{len(words) - 1}" value="0" autocomplete="off" '
              'aria-label="frame">')
    controls = f'<div class="controls" hidden>{slider}<output></output></div>'
    return (f'<div class="viewer" data-columns="{columns}" data-words="{told}">\n{body}\n'
            f"{controls}\n</div>")


def section(title, body, text):
    """A heading, what there is to see, and what it teaches."""
    return f"<h2>{title}</h2>\n{body}\n<p>{text}</p>\n"


def left_out(title, reason):
    """What stands in the place of a section for which this run has nothing."""
    return f'<p class="left-out">{title}: left out, as {reason}.</p>\n'


def first_azimuth(trained):
    """Where objects are looked at from: aside; what moves, from ahead, as its clips were."""
    return 0.6 if trained.posenet is None else 0.0


def orbit_frames(trained, volume):
    """One object (1, C, D, H, W) that turns once -> (T, 3, S, S), and each frame's angle, in words.
    What moves swings by +-20 degrees, as its back was never seen, and goes through its poses."""
    frames, words = [], []
    for t in range(ORBIT):
        degrees, pose = 360 * t / ORBIT, 0
        if trained.posenet is not None:
            degrees = 20 * math.sin(math.radians(degrees))
            pose = t * len(trained.poses) // ORBIT
        azimuth = first_azimuth(trained) + math.radians(degrees)
        rgb, occupancy = render_any_views(trained, volume, [azimuth], ORBIT_SIDE, pose=pose)
        frames.append(on_white(rgb, occupancy)[0, 0])
        words.append(f"{degrees:.0f} degrees")
    return torch.stack(frames), words


def orbit_section(trained, volumes, labels):
    """Objects that turn with the mouse: one large, and all of them small, to be chosen from."""
    tags = []
    for i in data.telling(range(min(ON_PAGE, len(volumes))), "page    | orbits"):
        frames, words = orbit_frames(trained, volumes[i:i + 1])
        tags.append(frames_tag(frames, ORBIT_COLUMNS, f"{labels[i]}, turning"))
    choices = ""
    if len(tags) > 1:
        for tag in tags:
            choices += f'<button type="button">{tag}</button>\n'
    body = (f'<div class="turns"><div class="stage">{tags[0]}</div>\n'
            f'<div class="choices">\n{choices}</div></div>')
    text = ("Move the mouse or a finger across the large picture, or use the slider; choose "
            "another object by a click. No frame is a photo: each is a volume of density and "
            "colour, seen ray by ray through a camera on a circle around it (Sec. 3.1, Eq. 6).")
    if trained.posenet is not None:
        text += (" What moves was filmed from ahead alone: so it turns a little, while it goes "
                 "through the poses of a training clip (Sec. 3.2).")
    return section("Turn it", viewer_tag(body, ORBIT_COLUMNS, words), text)


def watched_sampling(trained, noise, steps, churn, seed, prompt=None, guidance=3.0):
    """sample_prompt, watched -> latents, and the way to them: at each of some noise levels (sigma,
    x, D), the noisy latents of the first four, and what the denoiser believed to be behind them."""
    denoiser = trained.denoiser
    if prompt is not None:
        context = trained.encode([prompt] * len(noise))
        denoiser = guided(trained.text_denoiser, context, trained.encode([""]), guidance)
    shown = torch.linspace(0, steps - 1, min(LEVELS, steps)).round().tolist()
    calls, way = itertools.count(), []

    def denoise(x, sigma):
        denoised = denoiser(x, sigma)
        # Heun asks twice a step: at its begin, which is looked at here, and half a step later.
        if next(calls) / 2 in shown:
            way.append((sigma, x[:4].float(), denoised[:4].float()))
        return denoised

    watched = SimpleNamespace(**vars(trained))             # a copy, of other denoiser
    watched.denoiser = denoise
    return sample_latents(watched, noise, steps, churn, seed), way


def noise_section(trained, way):
    """What the sampler held and, below, what it believed, from noise level to noise level."""
    frames, words = [], []
    for sigma, held, believed in data.telling(way, "page    | noise to object"):
        rows = []
        for latent_hat in (held, believed):
            volumes = decode(trained, trained.normalizer.denormalize(latent_hat))
            rgb, occupancy = render_any_views(trained, volumes, [first_azimuth(trained)], SIDE)
            rows.append(torch.cat(list(on_white(rgb, occupancy)[:, 0]), -1))
        frames.append(torch.cat(rows, -2))                 # (3, 2 SIDE, 4 SIDE)
        words.append(f"sigma = {sigma:.2g}")
    tag = frames_tag(torch.stack(frames), 1, "from noise to object: held above, believed below")
    width = 3 * frames[0].shape[-1]                        # one object alone would fill the page
    body = f'<div style="max-width: {width}px">{tag}</div>'
    text = ("Above, the noisy latents that the sampler holds, decoded as they are; below, what the "
            "denoiser believes to be behind the noise (Sec. 3.3, App. C.2). At first it has hardly "
            "anything to go by, and guesses; fresh noise on the way, the churn, lets it think "
            "again. Look for the level at which it has decided what each is to be: all after that "
            "is detail.")
    return section("From noise to object", viewer_tag(body, 1, words), text)


def sheet_section(trained, volumes, labels):
    """Every object as a column: colour, depth, normals and, of what moves, parts."""
    views = geometry_views(trained, volumes, first_azimuth(trained), SIDE)
    rows, kinds = geometry_rows(views)
    columns = torch.cat(rows, -2)                          # (n, 3, 3 SIDE, SIDE), or 4 SIDE
    listed = ", ".join(kinds)
    body = '<div class="sheet">\n'
    for column, label in zip(columns, labels):
        body += figure_tag(column, f"{label}: {listed}", label)
    text = (f"From top to bottom: {listed}. Near is dark; a normal's x, y, z are red, green, blue. "
            "Nobody measured a depth: shape is learned because one volume must explain pictures "
            "from many sides, and their masks (Sec. 3.2, Eq. 1 and 2). Depth and normals show what "
            "colour hides: fog, holes, loose parts.")
    return section("Shapes", body + "</div>", text)


def some_data(trained, source=None, most=6):
    """Some of the objects that a run was trained on, a Dataset; object_index has their numbers in
    the run. To read or draw all of them would take longer than the page.

    BadInput where they are not there, or others than the run has seen
    """
    source = source_now(trained, source)
    N = len(trained.names)
    k = torch.linspace(0, N - 1, min(most, N)).long()
    names = [trained.names[i] for i in k]
    settings = SimpleNamespace(**vars(trained.data_settings))          # a copy, for these alone
    settings.objects = ",".join(names)
    dataset = data.load_for(settings, source)
    if dataset.names != names or not are_same(portraits(dataset), trained.portraits[k]):
        raise other_photos(trained, source)
    return dataclasses.replace(dataset, object_index=k[dataset.object_index])


def truth_section(trained, source):
    """Photos above what the decoder makes of their objects; a line where there are no photos."""
    title = "Beside the truth"
    try:
        dataset = some_data(trained, source)
    except BadInput as error:
        # On the screen alone: where somebody's photos are is nobody else's business.
        print(f"page    | without held-out views: {error}", flush=True)
        return left_out(title, "the pictures that it was trained on are not at hand")
    frames, kind = frames_to_show(dataset, 6)
    images, masks = dataset.batch(frames, dataset.images.shape[1])
    rgb, occupancy = render_frames(trained, dataset, frames, n_samples=96)
    error = (rgb - images).square().flatten(1).mean(1)                 # (n,)
    psnr = -10 * error.clamp(min=1e-10).log10()
    pairs = torch.cat([on_white(images, masks), on_white(rgb, occupancy)], -2)
    body = '<div class="sheet wide">\n'
    for i, k in enumerate(dataset.object_index[frames].tolist()):
        alt = f"{trained.names[k]}: truth above, render below"
        body += figure_tag(pairs[i], alt, f"{trained.names[k]}: {psnr[i]:.1f} dB")
    text = ("Above the truth, below what the decoder makes of that object's embedding, through the "
            "same camera (Sec. 3.1). ")
    if kind == "held-out":
        text += ("These views were held out: training has never seen them, so what it learned are "
                 "shapes, not pictures by heart. ")
    else:
        text += "No view was held out: training has seen these. "
    text += ("The number is PSNR: the more alike, the higher; 10 dB more is a tenth of the squared "
             "error.")
    return section(title, body + "</div>", text)


def read_curve(path, stage, column):
    """A column of log.csv, 2: loss, 3: psnr -> (step, number) of a stage's rows that have it."""
    points = []
    for line in path.read_text(errors="replace").splitlines():
        cells = line.split(",")
        try:
            step, number = int(cells[1]), float(cells[column])
        except (ValueError, IndexError):
            continue                             # the header, a row cut off, a cell that is empty
        if cells[0] == str(stage) and math.isfinite(number):
            points.append((step, number))
    return points


def curve_tag(points, title):
    """A curve as SVG. It has no colours of its own: the page's are for light and for dark."""
    steps, numbers = zip(*points)
    ticks = MaxNLocator(4).tick_values(min(numbers), max(numbers))     # round numbers, beyond both
    height = max(ticks[-1] - ticks[0], 1e-9)
    width = max(steps[-1] - steps[0], 1)

    def y_of(number):
        return 140 - 120 * (number - ticks[0]) / height

    lines = f'<text x="0" y="10">{title}</text>'
    for tick in ticks:
        y = y_of(tick)
        lines += f'<path d="M30 {y:.1f}H230"/><text x="0" y="{y + 3:.1f}">{tick:.4g}</text>'
    lines += f'<text x="30" y="156">step {steps[0]}</text>'
    lines += f'<text x="230" y="156" text-anchor="end">{steps[-1]}</text>'
    places = []
    for step, number in points:
        x = 30 + 200 * (step - steps[0]) / width
        places.append(f"{x:.1f},{y_of(number):.1f}")
    lines += f'<polyline points="{" ".join(places)}"/>'
    told = f"{title}, from {numbers[0]:.4g} to {numbers[-1]:.4g}"
    return f'<svg viewBox="0 0 232 160" role="img" aria-label="{told}">{lines}</svg>\n'


def curves_section(path):
    """How training went, of log.csv."""
    title = "How it was learned"
    body = ""
    for stage, column, name in ((1, 3, "stage 1: PSNR, dB"), (1, 2, "stage 1: loss"),
                                (2, 2, "stage 2: loss")):
        points = read_curve(path, stage, column) if path.exists() else []
        if len(points) > 1:
            body += curve_tag(points, name)
    if body == "":
        return left_out(title, "this run has no log.csv, or none of two rows and more")
    text = ("Stage 1 learns the decoder, and an embedding for each object (Sec. 3.2). Look at its "
            "PSNR: its loss means something else whenever pictures become larger, and there both "
            "fall back. Stage 2 learns to take noise out of latents (Sec. 3.3). Its loss soon "
            "stands still, as most of it is noise that nobody could predict; samples go on getting "
            "better.")
    return section(title, f'<div class="curves">\n{body}</div>', text)


def page_of_samples(trained, args):
    """Title, lead and first sections of a page of new objects."""
    noise = latent_noise(trained, args.n, args.seed)
    latents, way = watched_sampling(
        trained, noise, args.steps, args.churn, args.seed, args.prompt, args.guidance)
    volumes = decode(trained, latents)
    labels = [f"sample {i}" for i in range(args.n)]
    channels, side, _, _ = trained.autodecoder.latent_shape
    lead = (f"An autodecoder has learned from pictures of {len(trained.names)} objects, and a "
            "diffusion model from the autodecoder's latents of them. These objects are new: noise "
            f"of seed {args.seed} became latents, {channels} x {side} x {side} x {side} numbers "
            "each; these became volumes of density and colour, and the volumes were rendered.")
    if args.prompt is not None:
        lead += f" Asked for was &ldquo;{html.escape(args.prompt)}&rdquo;."
    body = orbit_section(trained, volumes, labels)
    body += noise_section(trained, way)
    body += sheet_section(trained, volumes, labels)
    return "Objects that never existed", lead, body


def page_of_training_objects(trained, args):
    """The same of a run without stage 2, such as that of a single object."""
    labels = trained.names[:args.n]
    volumes = trained.autodecoder(torch.arange(len(labels), device=trained.device))
    lead = ("An autodecoder has learned from pictures of objects, one embedding for each. Here "
            f"embeddings are decoded: {len(labels)} of {len(trained.names)}. Nothing is new: that "
            "takes stage 2, which this run does not have.")
    body = orbit_section(trained, volumes, labels)
    body += left_out("From noise to object", "this run has no stage 2")
    body += sheet_section(trained, volumes, labels)
    return "Objects that were learned", lead, body


def save_page(trained, args, path):
    """page.html: of new objects or, where there is no stage 2, of training objects."""
    make = page_of_samples if hasattr(trained, "denoiser") else page_of_training_objects
    title, lead, body = make(trained, args)
    body += truth_section(trained, args.data)
    body += curves_section(Path(args.run) / "log.csv")
    run = html.escape(Path(args.run).resolve().name)       # not its whole path: pages get sent
    # In one pass: what is filled in is not looked through for more to fill in.
    page = PAGE.substitute(title=title, run=run, lead=lead, body=body)
    with data.writing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")       # TRAP: Windows would take another
    return path


# The page around it: $title, $run, $lead and $body are filled in.
PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<!-- The browser is told to fetch nothing: all that the page shows is in this file. -->
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title: $run</title>
<style>
:root { color-scheme: light dark; --paper: #faf9f6; --ink: #25272c; --quiet: #666a72;
        --line: #dedbd4; --accent: #2d6f9e; --card: #ffffff; --rim: #efede7; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17191d; --ink: #d9dbe1; --quiet: #9a9ea8;
          --line: #33373e; --accent: #8fc0e6; --card: #c9ccd3; --rim: #a4a9b3; }
}
* { box-sizing: border-box; }
body { max-width: 46rem; margin: 0 auto; padding: 3.5rem 1.25rem 5rem; background: var(--paper);
       color: var(--ink); font: 1rem/1.6 system-ui, sans-serif; }
h1 { margin: .3rem 0 1rem; font-size: 2.3rem; font-weight: 300; line-height: 1.15; }
h2 { margin: 3.5rem 0 1rem; font-size: 1.3rem; font-weight: 500; }
small, .left-out, figcaption, output { color: var(--quiet); }
.left-out { margin-top: 3.5rem; }
/* A picture is white behind its object. Multiplied with the card below it, white is the card's
   colour; which in the dark is grey, as on black dark objects would be lost. */
.card { border-radius: .6rem; overflow: hidden; isolation: isolate;
        background: radial-gradient(circle, var(--card), var(--rim)); }
img { display: block; width: 100%; height: auto; mix-blend-mode: multiply; }
/* A frame is a window, behind which a large picture of many frames is moved. */
.frame img { width: calc(100% * var(--columns)); pointer-events: none; user-select: none; }
.turns { display: grid; grid-template-columns: calc((200% - .5rem) / 3) 1fr; gap: .5rem; }
.choices { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; align-content: start; }
@media (max-width: 34rem) {                /* a phone: the picture, its slider, the choices */
  .viewer { display: flex; flex-direction: column; }
  .turns { display: contents; }
  .choices { order: 1; grid-template-columns: repeat(4, 1fr); margin-top: .6rem; }
}
.stage { cursor: ew-resize; touch-action: pan-y; }
button { padding: 0; border: 0; border-radius: .6rem; background: none; cursor: pointer; }
button[aria-pressed=true] { outline: 2px solid var(--accent); }
.controls { display: flex; gap: 1rem; align-items: center; margin-top: .6rem; }
.controls[hidden] { display: none; }
input { flex: 1; min-width: 0; accent-color: var(--accent); }
output { min-width: 7.5rem; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(4.9rem, 1fr)); gap: .5rem; }
.wide { grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); }
figure { margin: 0; }
figcaption { margin-top: .3rem; font-size: .8rem; line-height: 1.3; text-align: center;
             overflow-wrap: anywhere; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1rem; }
svg text { fill: var(--quiet); font-size: 10px; }
svg path { stroke: var(--line); }
polyline { fill: none; stroke: var(--accent); stroke-width: 1.5; stroke-linejoin: round; }
</style>
<small>3DVADER &middot; $run</small>
<h1>$title</h1>
<p>$lead</p>
$body
<p><small>Sections and equations are those of AutoDecoding Latent 3D Diffusion Models, arXiv
2307.05445. This page fetches nothing: it may be kept, and sent, as one file.</small></p>
<script>
// Without this script the first frames are still pictures. With it, a slider (and so the arrows of
// the keyboard, too) says which frame shows.
for (const viewer of document.querySelectorAll(".viewer")) {
  const words = viewer.dataset.words.split("|"), frames = words.length
  const columns = Number(viewer.dataset.columns), rows = frames / columns
  const slider = viewer.querySelector("input"), stage = viewer.querySelector(".stage")

  function show() {
    const frame = Number(slider.value)
    const x = -100 * (frame % columns) / columns, y = -100 * Math.floor(frame / columns) / rows
    for (const image of viewer.querySelectorAll(".frame img"))
      image.style.transform = "translate(" + x + "%, " + y + "%)"
    viewer.querySelector("output").textContent = words[frame]
    slider.setAttribute("aria-valuetext", words[frame])
  }
  slider.addEventListener("input", show)
  viewer.querySelector(".controls").hidden = false
  show()
  if (stage === null) continue                       // nothing to be turned

  // Once across the picture is one turn; after the last frame comes the first.
  let place = 0, last = null
  function turn(by) {
    place = ((place + by) % frames + frames) % frames
    slider.value = Math.floor(place)
    show()
  }
  stage.addEventListener("pointermove", event => {
    if (last !== null) turn(frames * (last - event.clientX) / stage.clientWidth)
    last = event.clientX
  })
  for (const end of ["pointerleave", "pointercancel", "pointerup"])
    stage.addEventListener(end, () => { last = null })
  slider.addEventListener("input", () => { place = Number(slider.value) })

  const choices = viewer.querySelectorAll("button")
  function choose(choice) {
    const large = stage.querySelector("img"), small = choice.querySelector("img")
    large.src = small.src
    large.alt = small.alt
    for (const other of choices) other.setAttribute("aria-pressed", other === choice)
  }
  for (const choice of choices) choice.addEventListener("click", () => choose(choice))
  if (choices.length > 0) choose(choices[0])
}
</script>
""")


# ---- Command line --------------------------------------------------------------------------------
def choose_device(name):
    """"auto" -> a GPU where there is one; a device that cannot do the work is bad input.

    OURS: double precision is asked for, as the sampler computes in it. Apple's "mps" has none: it
    would fail in the middle of the work.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, dtype=torch.float64, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        raise BadInput(f"--device {name} is not available here, or lacks double precision; try "
                       "--device cpu") from None
    return name


def make_parser():
    """The flags; None for one that was not given, so that parse can tell."""
    parser = data.Parser(description="Make new objects with a trained run.")
    add = parser.add_argument
    add("--run", default="runs/tiny-synthetic", help="folder that train.py wrote (%(default)s)")
    add("--out", help="folder for the results (default: RUN/samples; of --direct "
        "RUN/samples-direct)")
    add("--device", default="auto", help="cpu, cuda, ... (%(default)s)")

    add = parser.add_argument_group("new objects").add_argument
    add("--n", type=int, help="how many (default: 8)")
    add("--seed", type=int, help="object i depends on seed and i alone (default: 0)")
    add("--steps", type=int, help="of the sampler (default: the run's sample_steps)")
    add("--churn", type=float, help="S_churn, fresh noise on the way; 0: none (default: the run's)")
    add("--direct", choices=["normal", "fitted"], help="the baseline, no diffusion: draw the "
        "embedding from N(0, I), or from a Gaussian fitted to the trained ones")

    add = parser.add_argument_group("text, where stage 2 was trained with --text").add_argument
    add("--prompt", help="what to make")
    add("--guidance", type=float, help="how strongly it is followed; 1: as learned, 0: not at all "
        "(default: the run's)")

    add = parser.add_argument_group("subjects that move").add_argument
    add("--drive", metavar="CLIP", help="in the poses of this clip, a name in the run's data or a "
        "path")

    add = parser.add_argument_group("what is shown").add_argument
    add("--page", action="store_true", default=None, help="instead, a page for the browser, "
        "page.html: new objects to be turned, the way from noise to them, how training went")
    add("--data", metavar="FOLDER", help="of --page and --drive: where the run's data is now "
        "(default: where it was)")
    add("--identity", type=int, metavar="K", help="training object K, not new ones")
    add("--interpolate", type=int, nargs=2, metavar="SEED", help="also a film from the first "
        "object of one seed to that of another")
    add("--nearest", action="store_true", default=None, help="also the training objects that look "
        "most like the samples")
    add("--mesh", action="store_true", default=None, help="also coloured meshes, .ply (needs "
        "scikit-image)")
    return parser


# A flag; those that would do nothing beside it; why. No flag is ignored in silence.
ALONE = (
    ("identity", ("n", "seed", "steps", "churn", "direct", "prompt", "guidance", "interpolate",
                  "nearest"), "it shows a training object, nothing is drawn at random"),
    ("direct", ("steps", "churn", "prompt", "guidance", "interpolate"), "it is without diffusion"),
    ("page", ("identity", "direct", "drive", "interpolate", "nearest", "mesh"), "it is all that is "
     "drawn, of new objects"),
)


def parse(arguments=None):
    """Command line -> args; what cannot work together is bad input, before anything is read."""
    args = make_parser().parse_args(arguments)
    given = [name for name, value in vars(args).items() if value is not None]
    for flag, idle, reason in ALONE:
        for other in idle:
            if flag in given and other in given:
                raise BadInput(f"--{other} does not go with --{flag}: {reason}")
    if "guidance" in given and "prompt" not in given:
        raise BadInput("--guidance says how strongly a --prompt is followed, and there is none")
    if "data" in given and "drive" not in given and "page" not in given:
        raise BadInput(f"--data {args.data} is where a clip to --drive is, or what a --page shows, "
                       "and there is neither")
    check_numbers(args)
    if args.mesh:
        import_marching_cubes()                            # before the work, not after it
    return args


# Least and most of each number; also of tests/evaluate.py, whose flags mean the same.
SEEDS = (0, 2**63 - 1)                                     # what torch takes
BOUNDS = {"n": (1, 1000), "seed": SEEDS, "steps": (1, 10_000), "churn": (0, 1e6),
          "guidance": (-1000, 1000)}


def check_numbers(args):
    """Refuses numbers out of their range, by their flags."""
    for name, bounds in BOUNDS.items():
        value = getattr(args, name)
        if value is not None:
            data.check_number(f"--{name}", value, bounds)
    if args.page and args.n is not None:
        data.check_number("with --page, --n", args.n, (1, MOST_ON_PAGE))
    for seed in args.interpolate or ():
        data.check_number("--interpolate", seed, SEEDS)
    if args.interpolate and args.interpolate[0] == args.interpolate[1]:
        raise BadInput("--interpolate is between two seeds, and these are the same")


def physical_memory():
    """Bytes of memory that this machine has; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):          # not on Windows
        return None


def check_memory(parts, advice):
    """Refuses what cannot fit into memory, in the first seconds, not after an hour.

    parts: what is to be there at once, {what: bytes}, counted low: what may fit is let through
    """
    memory = physical_memory()
    needed = sum(parts.values())
    if memory is None or needed <= memory:
        return
    listed = ", ".join(f"{what} {size / 2**30:.1f}" for what, size in parts.items())
    raise BadInput(f"this takes at least {needed / 2**30:.1f} GiB of memory ({listed}), and there "
                   f"are {memory / 2**30:.1f}: {advice}")


def check_sample_memory(n, settings):
    """Volumes of n objects and the pictures of their film, at the same time."""
    numbers = (4 + settings.parts) * settings.volume_side**3
    pictures = 2 * 3 * FRAMES * SIDE**2                    # over black, then over white
    check_memory({"volumes": 4 * n * numbers, "pictures": 4 * n * pictures}, "a smaller --n")


def fill_in(args, settings):
    """Flags that were not given: what the run's settings say, or what --help says."""
    defaults = {
        "n": 8,
        "seed": 0,
        "steps": settings.sample_steps,
        "churn": settings.churn,
        "guidance": settings.guidance,
        "out": Path(args.run) / ("samples" if args.direct is None else "samples-direct"),
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check_run(args, trained):
    """Refuses what this run cannot do."""
    check_sample_memory(args.n, trained.data_settings)
    if args.prompt is not None:
        check_prompt(trained, args.prompt)
    if args.drive is not None and trained.posenet is None:
        raise BadInput(f"--drive: the objects of {args.run} do not move")
    last = len(trained.names) - 1
    if args.identity is not None and not 0 <= args.identity <= last:
        raise BadInput(f"--identity {args.identity}: the run has 0 to {last}")


def needs_diffusion(args):
    """Whether the flags ask for what stage 2 has learned. A page can do without, but not where a
    flag says how to sample: that would be ignored in silence."""
    if args.direct is not None or args.identity is not None:
        return False
    told = (args.seed, args.steps, args.churn, args.prompt)
    if args.page and all(value is None for value in told):
        return (Path(args.run) / "stage2.pt").exists()
    return True


def main(arguments=None):
    """Reads the flags, makes the objects, names what was written."""
    args = parse(arguments)
    device = choose_device(args.device)
    trained = open_run(args.run, device, (1, 2) if needs_diffusion(args) else (1,))
    fill_in(args, trained.settings)
    check_run(args, trained)
    folder = Path(args.out)
    data.make_folder(folder)             # before the data is read, which may take long
    if args.page:
        print(f"wrote {save_page(trained, args, folder / 'page.html')}")
        return
    driving = None
    if args.drive is not None:
        driving = load_driving(trained, args.drive, args.data)

    if args.identity is None:
        volumes, paths = save_any_samples(
            trained, folder, args.n, args.steps, args.seed, args.churn, args.direct, args.prompt,
            args.guidance, args.nearest)
    else:
        volumes = trained.autodecoder(torch.tensor([args.identity], device=device))
        paths = save_any_turntable(trained, volumes, folder)
    if trained.posenet is not None:
        paths += save_motion(trained, folder, volumes[:1], driving)
    if args.interpolate:
        paths += save_interpolation(
            trained, folder, args.interpolate, args.steps, args.prompt, args.guidance)
    if args.mesh:
        for i, volume in enumerate(volumes):
            paths += save_mesh(folder / f"sample{i}.ply", volume)
    print("wrote " + ", ".join(str(path) for path in paths))


if __name__ == "__main__":
    data.run_cli(main)
