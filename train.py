"""Photos go in; a trained decoder (stage 1) and diffusion model (stage 2) and pictures come out.

    python train.py                      both stages and a first sampling, built-in objects, minutes
    python train.py --stage 1 --data PHOTOS
    python train.py --stage 2 --data PHOTOS
    python train.py --help               every setting, with its value in `tiny`

Paper: Sec. 3.2 (stage 1), Sec. 3.3 (stage 2), Tab. 5 and App. C.2 (the paper-* presets).
Shapes: B objects a step, V views of each, C channels, H = W side of a picture, N dataset objects.
Simplified: one device, float32, no data loader: the frames fit in memory as bytes. (TRAP: torch's
"high" precision for matrix products would keep 10 bits of cameras and points on a GPU.)
In it: Settings; Checkpoints, log, metrics; Stage 1; Stage 2; Command line. At a first reading, the
presets, train_stage1 and train_stage2 are all: the rest starts, keeps and resumes runs.
Read next: tests/, which say in closed forms what the other files promise.
"""
import csv
import dataclasses
import hashlib
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch

import autodecoder
import data
import diffusion
import render
import sample
from data import BadInput

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# ---- Settings: every field is a flag ------------------------------------------------------------


def option(default, group, help):
    return dataclasses.field(default=default, metadata={"group": group, "help": help})


@dataclass
class Settings:
    """Everything a run depends on. Defaults are the paper's (Tab. 5, ShapeNet Chairs) where it has
    such a number; the presets override them."""
    size: int = option(64, "data", "side of the pictures in pixels")
    holdout: int = option(6, "data", "every n-th view of an object, or the last 1/n of a clip, is "
                          "kept for scoring; 0: none")
    objects: str = option("", "data", "use these objects only, e.g. obj2,obj5")
    n_objects: int = option(15576, "data", "how many synthetic objects to make")
    n_views: int = option(24, "data", "views of each synthetic object")
    arc: float = option(0.0, "data", "synthetic objects seen along an arc of +-ARC degrees, not "
                        "from all round; 0: all round")
    shared_colours: bool = option(True, "data", "of puppets: left pink, right cyan, skin and hair "
                                  "of human colours; else every puppet has its own")
    clip_filter: bool = option(False, "data", "the paper's: drop the first and last tenth of a "
                               "clip, frames under 25 % foreground, clips under 4 frames")
    embed_dim: int = option(1024, "decoder", "length of the embedding e")
    channels: int = option(512, "decoder", "features of the first volume, halved at each doubling")
    start_side: int = option(4, "decoder", "side of the first volume")
    volume_side: int = option(64, "decoder", "side of the decoded volume")
    latent_side: int = option(8, "decoder", "where G is cut into G1 and G2")
    decoder_depth: int = option(4, "decoder", "residual blocks per resolution")
    decoder_attention: tuple = option((8, 16), "decoder", "sides with self-attention")
    norm: str = option("batch", "decoder", "batch (the paper) or group")
    codebooks: int = option(0, "decoder", "hash embedding of so many pieces; 0: a full table")
    rows: int = option(256, "decoder", "entries per codebook, a power of two")
    hash_rule: str = option("spread", "decoder", "spread (ours) or paper (as printed)")
    parts: int = option(0, "decoder", "rigid parts whose poses are learned; 0: cameras are known")
    keypoints: int = option(125, "decoder", "learned 3D points of each part, a cube number")
    pose_width: int = option(32, "decoder", "features of the pose network")
    focal: float = option(5.7, "decoder", "focal length as a share of the picture's side, where "
                          "cameras are learned; known cameras' own is taken")
    body: tuple = option((), "decoder", "half axes of the ellipsoid that a moving subject starts "
                         "as; empty: from the masks")
    ellipsoid: bool = option(True, "decoder", "start from it, not from fog")
    skin_layout: bool = option(True, "decoder", "parts start spread over it, not all alike")
    reach: tuple = option((), "decoder", "half axes of what they spread over; empty: the ellipsoid")
    steps_stage1: int = option(500_000, "stage 1", "training steps")
    objects_per_step: int = option(16, "stage 1", "objects in a step")
    views_per_step: int = option(4, "stage 1", "views of each object in a step")
    n_samples: int = option(128, "stage 1", "samples on a ray")
    lr_stage1: float = option(5e-4, "stage 1", "Adam's learning rate, decays linearly to 0")
    perceptual: str = option("gradients", "stage 1", "what Eq. 1 compares: pixels, gradients, "
                             "random, or a path to " + autodecoder.VGG19_FILE)
    foreground_weight: float = option(10.0, "stage 1", "weight of Eq. 2")
    perceptual_weight: float = option(10.0, "stage 1", "weight of Eq. 1")
    finer_at: tuple = option((), "stage 1", "shares of the run at which pictures double in side, "
                             "to end at --size, e.g. 0.3,0.6; empty: full size throughout")
    betas: tuple = option((0.5, 0.999), "stage 1", "of Adam")
    lr_pose: float = option(5e-4, "stage 1", "learning rate of the pose network")
    lr_parts: float = option(1.0, "stage 1", "factor on it once one part has become many")
    clip: float = option(0.1, "stage 1", "largest gradient norm of either network, cameras learned")
    growth: tuple = option((0.03, 0.15), "stage 1", "shares of the run between which the learned "
                           "density replaces the ellipsoid")
    detail: tuple = option((), "stage 1", "pairs of shares of the run between which the decoder's "
                           "last levels come in, the finest last, e.g. 0.3,0.4,0.7,0.8")
    split_at: float = option(0.35, "stage 1", "share of the run after which one part becomes many")
    settle_at: float = option(0.9, "stage 1", "share of the run after which 2D points are centred "
                              "by their running mean, not by that of the step's frames")
    reprojection_weight: float = option(0.5, "stage 1", "2D points against projected 3D points")
    equivariance_weight: float = option(0.3, "stage 1", "2D points under warps of the frame")
    centre_weight: float = option(1.0, "stage 1", "mean 2D points against the default pose")
    distance_weight: float = option(0.5, "stage 1", "distance of parts against the default")
    usage_weight: float = option(1.0, "stage 1", "parts that claim less than half of 1/P")
    camera_noise: float = option(0.0, "stage 1", "turn every training camera by so many degrees "
                                 "(deviation), to see what wrong cameras cost")
    window: int = option(0, "stage 1", "of larger pictures render a random window of this side; "
                         "0: whole pictures")
    space: str = option("latent", "stage 2", "what is diffused: latent, or, for comparison, the "
                        "decoder's whole output: volume")
    text: bool = option(False, "stage 2", "learn from the captions, to sample from a --prompt")
    t5: str = option("", "stage 2", "folder of a T5 in transformers' layout; empty: a small text "
                     "encoder is learned")
    context_dim: int = option(1024, "stage 2", "width of that encoder's tokens; T5 has its own")
    text_dropout: float = option(0.1, "stage 2", "share of captions left out in training")
    unet_channels: int = option(128, "stage 2", "width of the U-Net")
    unet_multipliers: tuple = option((3, 4), "stage 2", "its factor at each resolution")
    unet_depth: int = option(2, "stage 2", "residual blocks per resolution")
    unet_attention: tuple = option((8, 4), "stage 2", "sides with self-attention")
    transformer_depth: int = option(1, "stage 2", "attention layers after a block")
    dropout: float = option(0.0, "stage 2", "dropout in the U-Net")
    sigma_data: float = option(0.5, "stage 2", "EDM's assumed spread of normalized latents")
    normalization: str = option("robust", "stage 2", "robust, meanstd or none")
    per_channel: bool = option(False, "stage 2", "one median and IQR per channel")
    latent_scale: float = option(1.0, "stage 2", "spread of latents after normalization")
    extreme: int = option(0, "stage 2", "make so many of all latents' numbers +-1e4, to see what "
                          "outliers cost")
    steps_stage2: int = option(500_000, "stage 2", "training steps")
    batch_size: int = option(64, "stage 2", "latents in a step")
    # AMBIGUOUS: Tab. 5 says 4.5e-5, the text 4.5e-4.
    lr_stage2: float = option(4.5e-4, "stage 2", "Adam's learning rate, decays linearly to 0")
    ema_half_life: float = option(2000.0, "stage 2", "of the averaged weights, in steps")
    sample_steps: int = option(64, "sampling", "steps of the sampler")
    churn: float = option(40.0, "sampling", "S_churn, fresh noise; 0: deterministic")
    guidance: float = option(3.0, "sampling", "how strongly a prompt is followed; 1: as learned")
    n_sheet: int = option(8, "sampling", "objects on the first sheet")
    seed: int = option(0, "run", "of everything random")
    log_every: int = option(50, "run", "steps between lines of the log")
    save_every: int = option(500, "run", "steps between checkpoints")


TINY_VIDEO = dict(
    n_objects=16, n_views=48, embed_dim=64, channels=64, volume_side=32, latent_side=4,
    decoder_depth=1, decoder_attention=(), norm="group", parts=6, keypoints=27, objects_per_step=4,
    n_samples=20, lr_stage1=2e-3, pose_width=16, lr_pose=2e-3, lr_parts=0.5, betas=(0.9, 0.99),
    clip=1.0, steps_stage1=7000, finer_at=(0.35, 0.8), window=16, growth=(0.24, 0.29),
    detail=(0.24, 0.29, 0.55, 0.65), split_at=0.35, unet_channels=64, unet_multipliers=(1, 2),
    unet_depth=1, unet_attention=(4, 2), context_dim=64, steps_stage2=1000, batch_size=16,
    lr_stage2=2e-3, ema_half_life=200.0, sample_steps=32)
PAPER_TEXT = dict(unet_channels=192, unet_depth=3, text=True, codebooks=256)
PRESETS = {
    # Two CPU cores, minutes. The paper's ratios, not its numbers: latent side = volume side / 8.
    "tiny": dict(n_objects=128, channels=64, volume_side=32, latent_side=4, decoder_depth=1,
                 decoder_attention=(), objects_per_step=4, n_samples=32, lr_stage1=8e-3,
                 steps_stage1=2200, finer_at=(0.3, 0.6), window=32, perceptual_weight=1.0,
                 foreground_weight=1.0, unet_channels=64, unet_multipliers=(1, 2), unet_depth=1,
                 unet_attention=(4, 2), context_dim=64, steps_stage2=2000, batch_size=16,
                 lr_stage2=2e-3, ema_half_life=200.0, sample_steps=32),
    # Two CPU cores, a minute and a half: for coursework, and for trying many settings.
    "micro": dict(size=32, n_objects=64, n_views=16, channels=32, volume_side=16, latent_side=4,
                  decoder_depth=1, decoder_attention=(), objects_per_step=4, n_samples=24,
                  lr_stage1=8e-3, steps_stage1=1000, finer_at=(0.4,), perceptual_weight=1.0,
                  foreground_weight=1.0, unet_channels=32, unet_multipliers=(1, 2), unet_depth=1,
                  unet_attention=(4, 2), context_dim=64, steps_stage2=1000, batch_size=16,
                  lr_stage2=2e-3, ema_half_life=200.0, sample_steps=32),
    # Clips without cameras, two CPU cores, 40 minutes: puppets, which turn; and real people, who
    # wave and bend. Nobody there turns, so the ellipsoid may go early, and the mean pose be fixed
    # early (settle_at): 29.4 dB on held-out frames after 3,500 steps, 29.1 when that comes at 0.9.
    "tiny-video": TINY_VIDEO,
    "tiny-clips": TINY_VIDEO | dict(
        window=32, lr_parts=1.0, finer_at=(0.2, 0.6), growth=(0.1, 0.15),
        detail=(0.1, 0.15, 0.35, 0.45), split_at=0.2, settle_at=0.3,
        pose_width=32, reach=(0.5, 0.75, 0.2)),
    # One GPU; not measured yet.
    "small": dict(n_objects=1024, channels=256, volume_side=64, latent_side=8, decoder_depth=2,
                  n_samples=64, objects_per_step=16, steps_stage1=20_000, lr_stage1=1e-3,
                  finer_at=(0.2, 0.5), unet_channels=96, unet_multipliers=(2, 3),
                  steps_stage2=40_000, batch_size=64),
    "paper-tables": dict(n_objects=1676, n_views=91, volume_side=128, decoder_depth=2,
                         codebooks=256),
    "paper-chairs": dict(n_objects=15576, n_views=200),
    "paper-celebv": dict(n_objects=44_400, n_views=373, decoder_depth=2, parts=10, rows=8192,
                         reprojection_weight=10.0, equivariance_weight=10.0, usage_weight=10.0,
                         **PAPER_TEXT),
    "paper-mvimgnet": dict(n_objects=206_990, n_views=30, rows=32768, **PAPER_TEXT),
    "paper-objaverse": dict(n_objects=300_000, n_views=6, rows=32768, transformer_depth=2,
                            foreground_weight=0.0, **PAPER_TEXT),
}
MAY_BE_ZERO = {"holdout", "arc", "codebooks", "parts", "foreground_weight", "perceptual_weight",
               "lr_parts", "split_at", "settle_at", "reprojection_weight", "equivariance_weight",
               "centre_weight", "distance_weight", "usage_weight", "camera_noise", "window",
               "text_dropout", "transformer_depth", "dropout", "extreme", "churn", "guidance",
               "seed"}                       # all other numbers must be positive
CHOICES = {"norm": ("batch", "group"), "hash_rule": ("spread", "paper"),
           "normalization": ("robust", "meanstd", "none"), "space": ("latent", "volume")}


def parse(arguments=None):
    """Command line -> (args, Settings): a preset's values, then the flags that were given."""
    parser = data.Parser(description=__doc__.splitlines()[0], argument_default=None)
    add = parser.add_argument
    add("--stage", type=int, choices=[1, 2], help="one stage only (default: both, then sample)")
    add("--data", default="synthetic", help="'synthetic', 'puppets', or a folder of photos or "
        "clips (%(default)s)")
    add("--preset", choices=PRESETS, help="%(choices)s (default: tiny; for clips tiny-clips; for "
        "puppets, and where else cameras are learned, tiny-video)")
    add("--cameras", choices=["known", "learned"], help="learned: from nothing but the pictures "
        "(default: known, where the data has them)")
    add("--out", help="the run's folder (default: runs/PRESET-DATA)")
    add("--decoder", metavar="RUN", help="with --stage 2: on the stage 1 of that run, which is "
        "copied to --out")
    add("--steps", type=int, help="training steps of each stage that runs")
    add("--device", default="auto", help="cpu, cuda, ... (%(default)s)")
    add("--resume", action="store_true", help="go on from the checkpoints in --out")
    groups = {}
    for f in dataclasses.fields(Settings):
        name = f.metadata["group"]
        group = groups.setdefault(name, parser.add_argument_group(name))
        flags = [f"--{f.name.replace('_', '-')}"] + [f"--{f.name}"] * ("_" in f.name)
        kind = {bool: dict(action=data.argparse.BooleanOptionalAction),
                tuple: dict(type=number_list, metavar="A,B")}.get(
                    f.type, dict(type=f.type, metavar=f.type.__name__.upper(),
                                 choices=CHOICES.get(f.name)))
        tiny = PRESETS["tiny"].get(f.name, f.default)
        tiny = ",".join(map(str, tiny)) if f.type is tuple else tiny
        group.add_argument(*flags, **kind, help=(
            f"{f.metadata['help']} (tiny: {'empty' if tiny == '' else tiny})".replace("%", "%%")))
    args = parser.parse_args(arguments)
    made = args.data in ("synthetic", "puppets")
    args.preset = args.preset or (
        "tiny-clips" if not made and data.is_moving(args.data) else
        "tiny-video" if args.data == "puppets" or args.cameras == "learned" else "tiny")
    values = dict(PRESETS[args.preset])
    values |= {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)
               if getattr(args, f.name) is not None}
    for stage in (1, 2):
        if args.steps is not None and args.stage in (None, stage):
            values[f"steps_stage{stage}"] = args.steps
    settings = Settings(**values)
    check(settings)
    args.out = Path(args.out or f"runs/{args.preset}-{Path(args.data).resolve().name}")
    return args, settings


def number_list(text):
    """"8,16" -> (8, 16); "0.4,0.8" -> (0.4, 0.8); "" -> ()."""
    return tuple(float(x) if "." in x else int(x) for x in text.split(",") if x.strip())


def check_numbers(s):
    """Numbers out of their range are refused here, each by its flag."""
    for f in dataclasses.fields(s):
        value, zero = getattr(s, f.name), f.name in MAY_BE_ZERO
        if f.type in (int, float) and not (0 < value < math.inf or value == 0 and zero):
            raise BadInput(f"--{f.name.replace('_', '-')} must be "
                           f"{'0 or more' if zero else 'positive'}, got {value}")
    for name, lengths in (("betas", [2]), ("growth", [2]), ("body", [0, 3]), ("reach", [0, 3])):
        if len(value := getattr(s, name)) not in lengths:
            raise BadInput(f"--{name} takes {lengths[-1]} numbers, got {len(value)}")
    if not all(isinstance(m, int) and m > 0 for m in s.unet_multipliers or [0]):
        raise BadInput("--unet-multipliers must be whole numbers from 1 on, e.g. 1,2")
    if s.holdout == 1:
        raise BadInput("--holdout 1 would leave no view to learn from: 2 or more, or 0 for none")
    if not all(0 <= x < 1 for x in (*s.betas, s.dropout, s.text_dropout)):
        raise BadInput("--betas, --dropout and --text-dropout must be at least 0 and below 1")


def check(s):
    """Settings that cannot work are refused here, before anything is read or written."""
    check_numbers(s)
    levels = int(math.log2(max(1, s.volume_side // s.latent_side)))
    if len(s.detail) % 2 or len(s.detail) > 2 * levels:
        raise BadInput(f"--detail: {len(s.detail)} numbers, but they are pairs of shares, at most "
                       f"one for each doubling from {s.latent_side}^3 to {s.volume_side}^3")
    if s.size % 2 ** len(s.finer_at):
        raise BadInput(f"--size {s.size} cannot be halved {len(s.finer_at)} times (--finer-at)")
    if min(s.size >> len(s.finer_at), s.window or s.size) < 4:
        raise BadInput("pictures of less than 4 pixels say nothing: a larger --size or --window, "
                       "or a shorter --finer-at")
    try:
        with torch.device("meta"):                       # no memory, no time: shapes only
            sides = sample.build_autodecoder(vars(s), 2).sides[1:]
            channels, side = sample.diffused_shape(vars(s))
            denoiser = sample.build_denoiser(vars(s), ["word"] * s.text)
            text = denoiser.text([""]) if s.text else ()
            denoiser(torch.zeros(1, channels, side, side, side), torch.ones(1), *text)
    except (ValueError, RuntimeError, TypeError, AssertionError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"these settings do not fit together: {reason}") from None
    if s.decoder_attention and not set(s.decoder_attention) & set(sides):
        raise BadInput(f"--decoder-attention {','.join(map(str, s.decoder_attention))}: volumes "
                       f"here have sides {', '.join(map(str, sides))}")


def fit_to_data(s, cameras, dataset, source):
    """Settings that follow from the data: whether cameras are learned, the lens, the ellipsoid."""
    if cameras == "known" and dataset.moving:
        raise BadInput(f"--cameras known: {source} has none; leave it out, or say learned")
    if cameras != "learned" and not dataset.moving:
        return dataclasses.replace(s, parts=0)
    if s.size % 16 or s.size < 32:
        raise BadInput(f"--size {s.size}: where cameras are learned it must be 32, 48, 64, ...")
    # OURS: as wide as what is nearly always covered, without the limbs: a wider one would have to
    # be painted black at its rims, and could then not turn (yaw stayed at 0). The spread of a
    # filled ellipse of half axis a is a^2 / 4.
    mask = dataset.batch(torch.nonzero(~dataset.heldout)[:, 0], 32)[1].mean((0, 1))      # (32, 32)
    mask = torch.where(mask > min(0.5, 0.9 * float(mask.max())), 1.0, 0.0)
    at = (torch.arange(32) + 0.5) / 16 - 1
    rows = torch.stack([mask.sum(0), mask.sum(1)]) / mask.sum()                          # x, y
    spread = (rows * at**2).sum(1) - (rows * at).sum(1)**2
    x, y = (2 * spread.sqrt()).clamp(0.2, 0.95).tolist()
    parts = max(1, s.parts) if dataset.moving else 1
    s = dataclasses.replace(s, parts=parts, body=s.body or (x, y, min(x, y)),
                            focal=float(dataset.intrinsics[:, 0].median()))
    try:
        with torch.device("meta"):
            sample.build_posenet(vars(s))
    except ValueError as error:
        raise BadInput(str(error)) from None
    return s


# ---- Checkpoints, log, metrics ------------------------------------------------------------------

STALE = (*sample.OF_SAMPLES, "seconds_sampling")          # scores of a stage 2 that is replaced
DIVERGED = "{} at step {}; the last good checkpoint is kept; try a lower learning rate"


def save(path, checkpoint):
    """Writes a checkpoint under a temporary name, then renames it: never a half-written file."""
    temporary = path.with_suffix(".tmp")
    torch.save(checkpoint, temporary)
    os.replace(temporary, path)


def fingerprint(model):
    """A short hash of all weights: tells stage 2 which stage 1 its latents came from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def refuse_divergence(stage, step, *models):
    """Before each saving: a finite loss may have had gradients that are not, and weights that are
    NaN must not replace good ones."""
    for model in models:
        for name, value in model.named_parameters():
            if not torch.isfinite(value).all():
                raise BadInput(DIVERGED.format(f"stage {stage}: {name} is not finite", step))


def random_states(generator):
    """Where randomness comes from: after set_random_states a run goes on with the same bits."""
    return {"generator": generator.get_state(), "global": torch.get_rng_state()}


def set_random_states(generator, states):
    generator.set_state(states["generator"])
    torch.set_rng_state(states["global"])


def same_settings(ours, theirs, groups, path):
    """Resuming needs the settings that the checkpoint was made with; says which one differs."""
    free = {"steps_stage1", "steps_stage2", "log_every", "save_every"}
    for f in dataclasses.fields(Settings):
        if (f.metadata["group"] in groups or f.name == "seed") and f.name not in free:
            a, b = getattr(ours, f.name), theirs.get(f.name, f.default)
            if a != (tuple(b) if isinstance(b, list) else b):
                raise BadInput(f"--{f.name.replace('_', '-')} is {a} here but {b} in {path}; give "
                               "the same flags to go on, or another --out to start anew")


def open_log(path, stage, step):
    """log.csv, positioned after `step` of `stage`; later rows, from a run that is redone, go."""
    header = ["stage", "step", "loss", "psnr", "ms_per_step", "size"]
    rows = []
    if path.exists() and (stage == 2 or step > 0):
        with open(path, newline="") as file:
            rows = [r for r in list(csv.reader(file))[1:]
                    if len(r) == len(header) and (int(r[0]), int(r[1])) <= (stage, step)]
    file = open(path, "w", newline="")
    writer = csv.writer(file)
    writer.writerows([header] + rows)
    return file, writer


def plot_log(run):
    """Draws log.csv as loss.png: loss of both stages, PSNR of stage 1's own pictures."""
    with open(run / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(1, 3, figsize=(12, 3), constrained_layout=True)
    for axis, stage, key in zip(axes, "112", ("loss", "psnr", "loss")):
        points = [(int(r["step"]), float(r[key])) for r in rows if r["stage"] == stage and r[key]]
        axis.plot(*zip(*points) if points else ((), ()))
        axis.set_title(f"stage {stage}: {'psnr of training views, dB' if key == 'psnr' else key}")
        axis.set_xlabel("step")
    figure.savefig(run / "loss.png", dpi=90)
    plt.close(figure)


class Progress:
    """One line on the screen and one row in log.csv, every log_every steps."""

    def __init__(self, run, stage, step, steps, log_every):
        self.file, self.writer = open_log(run / "log.csv", stage, step)
        self.stage, self.steps, self.log_every = stage, steps, log_every
        self.start, self.since, self.losses, self.mses = time.time(), step, [], []

    def __call__(self, step, loss, mse=None, size=""):
        if not math.isfinite(loss):
            raise BadInput(DIVERGED.format(f"stage {self.stage}: the loss is {loss}", step))
        self.losses.append(loss)
        self.mses += [mse] if mse is not None else []
        if step % self.log_every and step != self.steps:
            return
        ms = 1000 * (time.time() - self.start) / (step - self.since)
        loss = sum(self.losses) / len(self.losses)
        psnr = -10 * math.log10(max(1e-10, sum(self.mses) / len(self.mses))) if self.mses else None
        eta = int(ms / 1000 * (self.steps - step))
        self.writer.writerow([self.stage, step, f"{loss:.6g}", f"{psnr:.3f}" if psnr else "",
                              f"{ms:.1f}", size])
        self.file.flush()
        print(f"stage {self.stage} | {step}/{self.steps} | loss {loss:.4f} | "
              + (f"psnr {psnr:.1f} dB | " if psnr else "")
              + f"{ms:.0f} ms/step | eta {eta // 60}m{eta % 60:02d}s", flush=True)
        self.start, self.since, self.losses, self.mses = time.time(), step, [], []


# ---- Stage 1: the autodecoder (Sec. 3.2) --------------------------------------------------------


def picture_size(settings, step):
    """Side of the pictures at a step: coarse first, so that the first steps cost little."""
    # OURS: 16, then 32, then 64 pixels: 98, 125 and 286 ms a step of `tiny` (the last 125 ms, too,
    # through a 32-pixel window).
    share = step / settings.steps_stage1
    halvings = sum(share < at for at in settings.finer_at)
    return settings.size >> halvings


def draw_frames(dataset, k, views, generator):
    """`views` different training frames of each object in k -> (B, V) frame numbers."""
    rows = []
    for i in k.tolist():
        frames = dataset.frames_of(i, heldout=False)
        pick = torch.randperm(len(frames), generator=generator)
        # An object with fewer views than asked for shows some of them twice.
        rows.append(frames[pick.repeat(math.ceil(views / len(frames)))[:views]])
    return torch.stack(rows)


def score_mean_frame(dataset):
    """PSNR of held-out frames, dB, where each clip's mean training frame is the prediction."""
    size, psnr = dataset.images.shape[1], []
    for k in range(dataset.n_objects):
        mean = dataset.batch(dataset.frames_of(k, heldout=False), size)[0].mean(0)
        error = dataset.batch(dataset.frames_of(k, heldout=True), size)[0] - mean
        psnr.append(-10 * error.square().flatten(1).mean(1).log10())
    return float(torch.cat(psnr).mean())


def shake_cameras(dataset, degrees, seed):
    """The same dataset, with every training camera turned about the object by N(0, degrees^2), each
    about another axis."""
    generator = sample.stream(seed, "camera noise")
    axis = torch.randn(len(dataset.heldout), 3, generator=generator)
    angle = torch.randn(len(axis), 1, generator=generator) * math.radians(degrees)
    angle[dataset.heldout] = 0
    turn = autodecoder.cayley(axis / axis.norm(dim=1, keepdim=True) * (angle / 2).tan())
    cameras = dataset.cam2world.clone()
    cameras[:, :3] = turn @ cameras[:, :3]
    return dataclasses.replace(dataset, cam2world=cameras)


def turntable_view(dataset):
    """Where samples are looked at from: distance and height of a typical training camera."""
    if dataset.moving:                                    # from straight ahead, as the clips are
        return {"distance": 12.0, "elevation": 0.0}
    position = dataset.cam2world[:, :3, 3]
    distance = position.norm(dim=1)
    elevation = torch.asin(position[:, 1] / distance).median()
    return {"distance": max(1.8, float(distance.median())),
            "elevation": float(elevation.clamp(0.1, 0.6))}


def start_stage1(s, dataset, run, device, source, resume):
    """Model, optimizer and random numbers as they are before the first step, or as they were saved.

    returns a namespace: autodecoder, posenet (None: cameras are known), optimizer, generator, step,
    seconds, device, order (objects still to come)
    """
    torch.manual_seed(s.seed)                             # initial weights
    at = SimpleNamespace(
        autodecoder=sample.build_autodecoder(vars(s), dataset.n_objects).to(device),
        posenet=sample.build_posenet(vars(s)), device=device, step=0, seconds=0.0,
        generator=sample.stream(s.seed, "stage 1"), order=torch.empty(0, dtype=torch.int64))
    groups = [{"params": at.autodecoder.parameters(), "peak": s.lr_stage1}]
    if at.posenet is not None:
        groups.append({"params": at.posenet.to(device).parameters(), "peak": s.lr_pose})
    # PAPER: Adam with betas (0.5, 0.999). OURS: fused: 3 ms a step of `tiny` instead of 17.
    at.optimizer = torch.optim.Adam(groups, s.lr_stage1, betas=s.betas, fused=True)
    path = run / "stage1.pt"
    old = sample.load_checkpoint(run, 1, resume=True) if resume else None
    if old:
        same_settings(s, old["settings"], ("data", "decoder", "stage 1"), path)
        if old["names"] != dataset.names:
            raise BadInput(f"{path} was trained on other objects than --data {source}")
        sample.restore(lambda: at.autodecoder, old["model"], path)
        if at.posenet is not None:
            sample.restore(lambda: at.posenet, old["posenet"], path)
        at.optimizer.load_state_dict(old["optimizer"])
        set_random_states(at.generator, old["random"])
        at.step, at.seconds, at.order = old["step"], old["seconds"], old["order"]
    else:
        (run / "metrics.json").unlink(missing_ok=True)
        if path.exists():
            os.replace(path, path.with_suffix(".old"))    # the last one is kept
    return at


def save_stage1(s, at, dataset, run, source):
    """Everything that going on, stage 2 and sampling need."""
    refuse_divergence(1, at.step, *filter(None, (at.autodecoder, at.posenet)))
    posenet, poses = None, None
    if at.posenet is not None:                            # one clip's poses, to show others in
        posenet = at.posenet.state_dict()
        with torch.no_grad(), sample.evaluating(at):
            poses = sample.cameras_of(at, dataset, dataset.frames_of(0, heldout=False)).cpu()
    save(run / "stage1.pt", {
        "stage": 1, "step": at.step, "settings": vars(s), "source": source,
        "names": dataset.names, "captions": dataset.captions, "view": turntable_view(dataset),
        "seconds": at.seconds, "model": at.autodecoder.state_dict(), "posenet": posenet,
        "poses": poses, "optimizer": at.optimizer.state_dict(), "order": at.order,
        "random": random_states(at.generator), "fingerprint": fingerprint(at.autodecoder)})


def ramp(share, begin, end):
    """0 until begin, then up to 1 at end."""
    return min(1.0, max(0.0, (share - begin) / max(1e-9, end - begin)))


def follow_schedule(s, at):
    """Sets what changes from step to step: learning rates, and how a moving subject grows."""
    share = at.step / s.steps_stage1
    for group in at.optimizer.param_groups:               # PAPER: linear decay
        group["lr"] = group["peak"] * (1 - share)
    if at.posenet is None:
        return
    # OURS: the ellipsoid stays, and is only painted, until turning has been learned from how the
    # paint moves. It is painted coarsely (see autodecoder.faded), and poses rest while density and
    # detail come in: then both fit the poses, not the poses them. Yaw correlation and slope, 16
    # puppets, one part, seed 0: 0.94 and 0.43 before; 0.97 and 0.51 after; without the rest, 0.88
    # and 0.24. Released at once, the volume becomes a flat cut-out that can no longer turn.
    begin, end = s.growth
    at.autodecoder.growth.fill_(ramp(share, begin, end))
    last = len(s.detail) // 2
    for i in range(last):
        at.autodecoder.detail[i - last] = ramp(share, *s.detail[2 * i:2 * i + 2])
    at.optimizer.param_groups[1]["lr"] *= begin / 8 <= share < begin or share >= end
    # OURS: many parts can bend a body to look turned: what was learned of turning fades, unless
    # poses now learn slowly.
    at.optimizer.param_groups[1]["lr"] *= s.lr_parts if int(at.posenet.active) > 1 else 1
    # PAPER (the predecessor): one part first, then its weights are copied to all parts.
    if share >= s.split_at and int(at.posenet.active) < s.parts:
        at.posenet.split()


def learned_cameras(s, at, dataset, frames):
    """What the pose network sees in frames (B, V): cameras (B, V, P, 4, 4), and its own losses."""
    size = min(64, dataset.images.shape[1])
    pictures = dataset.batch(frames.flatten(), size)[0].to(at.device)            # (B V, 3, 64, 64)
    try:
        cameras, u, losses = at.posenet(pictures, settled=at.step > s.settle_at * s.steps_stage1)
    except torch.linalg.LinAlgError:                      # points that are not finite
        raise BadInput(DIVERGED.format("stage 1: poses are not finite", at.step + 1)) from None
    # OURS: of one view of each object, or this would cost as much as all the rest.
    one = slice(None, None, frames.shape[1])
    losses["equivariance"] = autodecoder.equivariance_loss(
        at.posenet.points2d, pictures[one], u[one], at.generator)
    loss = sum(getattr(s, f"{name}_weight") * value for name, value in losses.items())
    return cameras.unflatten(0, frames.shape), loss


def train_stage1(s, dataset, run, device, source, resume=False):
    """Learns decoder and embeddings from photos; writes stage1.pt, log and figures.

    s Settings, dataset data.Dataset, run the folder (Path), source what --data said
    """
    features = autodecoder.build_features(s.perceptual, device)
    at = start_stage1(s, dataset, run, device, source, resume)
    if goes_on := at.step < s.steps_stage1:               # else the log has rows of stage 2 to keep
        log = Progress(run, 1, at.step, s.steps_stage1, s.log_every)
    began = time.time() - at.seconds
    while at.step < s.steps_stage1:
        follow_schedule(s, at)
        if len(at.order) < min(s.objects_per_step, dataset.n_objects):
            at.order = torch.randperm(dataset.n_objects, generator=at.generator)
        k, at.order = at.order[:s.objects_per_step], at.order[s.objects_per_step:]    # (B,)
        frames = draw_frames(dataset, k, s.views_per_step, at.generator)              # (B, V)
        images, masks = dataset.batch(frames, picture_size(s, at.step))           # (B, V, ., H, W)
        intrinsics = dataset.intrinsics[frames]                                       # (B, V, 4)
        if 0 < s.window < images.shape[-1]:
            images, masks, intrinsics = render.random_windows(
                images, masks, intrinsics, s.window, at.generator)
        images, masks = images.to(device), masks.to(device)
        cameras, loss = dataset.cam2world[frames].to(device), 0.0                     # (B, V, 4, 4)
        if at.posenet is not None:
            cameras, loss = learned_cameras(s, at, dataset, frames)
        volume = at.autodecoder(k.to(device))                                     # (B, 4, D, H, W)
        out = render.render(volume, cameras, intrinsics.to(device), images.shape[-1], s.n_samples,
                            jitter=at.generator, extras=False)
        loss = (loss + s.perceptual_weight * autodecoder.pyramid_loss(
                    features, out["rgb"].flatten(0, 1), images.flatten(0, 1))
                + s.foreground_weight * autodecoder.foreground_loss(out["occupancy"], masks))
        if volume.shape[1] > 4 and cameras.shape[2] > 1:
            loss = loss + s.usage_weight * autodecoder.usage_loss(volume)
        at.optimizer.zero_grad()
        loss.backward()
        if at.posenet is not None:                        # each network by itself
            for group in at.optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], s.clip)
        at.optimizer.step()
        at.step, at.seconds = at.step + 1, time.time() - began
        log(at.step, loss.item(), (out["rgb"].detach() - images).square().mean().item(),
            images.shape[-1])
        if at.step % s.save_every == 0 or at.step == s.steps_stage1:
            save_stage1(s, at, dataset, run, source)
            sample.save_training_sheet(run / "training.png", at, dataset, at.step)
            plot_log(run)
    finish_stage1(s, at, dataset, run, STALE if goes_on else ())


def finish_stage1(s, at, dataset, run, stale):
    """Pictures from all sides, and how well held-out views are met."""
    sample.add_metrics(run, vars(s), stale, seconds_stage1=round(at.seconds, 1),
                       steps_stage1=at.step)
    sample.save_orbit(run / "orbit.png", sample.load_run(run, at.device, stages=(1,)))
    scores = sample.score_heldout(at, dataset)
    if not scores:
        return
    sample.add_metrics(run, vars(s), **scores)
    line = (f"stage 1 | held-out views: {scores['psnr_heldout']:.2f} dB PSNR, "
            f"{scores['ssim_heldout']:.3f} SSIM over {int(dataset.heldout.sum())}")
    if dataset.moving:
        mean = score_mean_frame(dataset)
        sample.add_metrics(run, vars(s), psnr_mean_frame=round(mean, 3), **(
            {"psnr_one_part": scores["psnr_heldout"]} if s.parts == 1 else {}))
        line += f"; the clips' mean frames: {mean:.2f} dB"
    print(line)
    if dataset.truth or at.posenet is not None and not dataset.moving:
        score = sample.score_motion if dataset.truth else sample.score_cameras
        scores = score(sample.load_run(run, at.device, stages=(1,)), dataset)
        sample.add_metrics(run, vars(s), **scores)
        print("stage 1 | against the truth: "
              + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in scores.items()))


# ---- Stage 2: diffusion on latents (Sec. 3.3) ---------------------------------------------------


def start_stage2(s, run, device, resume):
    """Denoiser, its average, normalized latents and optimizer, new or as they were saved.

    The latents are those of RUN/stage1.pt, whose data and decoder settings replace those of s.
    returns s and a namespace: model, average, optimizer, generator, normalizer, latents, step, ...
    """
    first = sample.load_checkpoint(run, 1)
    decoder = sample.load_run(run, device, stages=(1,))
    s = dataclasses.replace(s, **{f.name: first["settings"].get(f.name, f.default)
                                  for f in dataclasses.fields(Settings)
                                  if f.metadata["group"] in ("data", "decoder", "stage 1")})
    check(s)                                              # once more: the latents may be others
    decoder.settings = vars(s)
    if len(decoder.names) < 2:
        raise BadInput("stage 2 learns a distribution of objects; one object has none. Use "
                       "--stage 1 alone, or --data with more objects")
    latents = make_extreme(sample.training_latents(decoder), s.extreme)      # (N, C, d, d, d)
    normalizer = sample.build_normalizer(vars(s)).fit(latents)
    sample.save_latent_histogram(run / "latents.png", latents)
    encode, width, vocabulary, captions = read_text(s, first["captions"], run, device)
    s = dataclasses.replace(s, context_dim=width)
    torch.manual_seed(s.seed)
    model, average = (sample.build_denoiser(vars(s), vocabulary).to(device)
                      for _ in range(2))
    average.requires_grad_(False).load_state_dict(model.state_dict())
    at = SimpleNamespace(
        model=model, average=average, normalizer=normalizer, latents=normalizer.normalize(latents),
        generator=sample.stream(s.seed, "stage 2"), step=0, seconds=0.0,
        optimizer=torch.optim.Adam(model.parameters(), s.lr_stage2, fused=True),
        decoder=first["fingerprint"], vocabulary=vocabulary, captions=captions,
        encode=encode or model.text)
    path = run / "stage2.pt"
    old = sample.load_checkpoint(run, 2, resume=True) if resume else None
    if old:
        same_settings(s, old["settings"], ("stage 2",), path)
        if old["decoder"] != at.decoder:
            raise BadInput(f"{path} was trained on another stage 1; run without --resume")
        sample.restore(lambda: model, old["model"], path)
        sample.restore(lambda: average, old["ema"], path)
        at.optimizer.load_state_dict(old["optimizer"])
        set_random_states(at.generator, old["random"])
        at.step, at.seconds = old["step"], old["seconds"]
    elif path.exists():
        os.replace(path, path.with_suffix(".old"))
    return s, at


def make_extreme(latents, n):
    """The same with n of their numbers +-1e4, as the paper met them (Fig. 9), at random places."""
    latents = latents.clone(memory_format=torch.contiguous_format)
    place = torch.randperm(latents.numel(), generator=torch.Generator().manual_seed(0))[:n]
    latents.flatten()[place] = 1e4 * (-1.0) ** place.to(latents)
    return latents


def read_text(s, captions, run, device):
    """What --text needs: an encoder, or None for the denoiser's own, the width of its tokens, its
    vocabulary, and the captions."""
    captions = [caption or "" for caption in captions]
    if not s.text:
        return None, s.context_dim, [], captions
    vocabulary = sorted({word for caption in captions for word in diffusion.words(caption)})
    if not vocabulary:
        raise BadInput("--text: no object of stage 1 has a caption; add captions.txt, with a line "
                       "NAME: CAPTION for each, to the data and run stage 1 again")
    if not s.t5:
        return None, s.context_dim, vocabulary, captions
    # PAPER: T5 is frozen, so it runs once; its tokens are kept beside the run.
    path, prompts = run / "text.pt", sorted({"", *captions})
    if path.exists():
        kept = sample.load_weights("--t5", path, "what --t5 left there: delete it")
    if not path.exists() or (kept["t5"], kept["prompts"]) != (s.t5, prompts):
        encoder = diffusion.T5Encoder(s.t5, device)
        tokens, mask = zip(*(encoder([prompt]) for prompt in prompts))
        kept = {"t5": s.t5, "prompts": prompts, "tokens": torch.cat(tokens),
                "mask": torch.cat(mask)}
        save(path, kept)
    row = {prompt: i for i, prompt in enumerate(prompts)}

    def encode(given):
        rows = [row[prompt] for prompt in given]
        return kept["tokens"][rows].to(device), kept["mask"][rows].to(device)
    return encode, kept["tokens"].shape[-1], [], captions


def caption_tokens(s, at, k):
    """Tokens and mask of the captions of objects k (B,), some left out at random; () without text.

    PAPER: a share of the captions is dropped, so that the model learns the unconditional case too.
    """
    if not s.text:
        return ()
    dropped = torch.rand(len(k), generator=at.generator) < s.text_dropout
    return at.encode(["" if d else at.captions[i] for i, d in zip(k.tolist(), dropped.tolist())])


def train_stage2(s, run, device, resume=False):
    """Learns the distribution of the latents of RUN/stage1.pt; writes stage2.pt, log, figures."""
    s, at = start_stage2(s, run, device, resume)
    print(f"stage 2 | latents {tuple(at.latents.shape)} | median {at.normalizer.m.mean():.3f}, "
          f"0.7413 IQR {at.normalizer.s.mean():.3f}, normalized spread {at.latents.std():.3f}")
    log = Progress(run, 2, at.step, s.steps_stage2, s.log_every)
    began = time.time() - at.seconds
    while at.step < s.steps_stage2:
        for group in at.optimizer.param_groups:
            group["lr"] = s.lr_stage2 * (1 - at.step / s.steps_stage2)
        k = torch.randint(len(at.latents), (s.batch_size,), generator=at.generator)
        text = caption_tokens(s, at, k)                                # (B, 32, width), (B, 32)
        loss = diffusion.edm_loss(lambda x, sigma: at.model(x, sigma, *text), at.latents[k],
                                  at.generator, sigma_data=s.sigma_data)
        at.optimizer.zero_grad()
        loss.backward()
        at.optimizer.step()
        at.step, at.seconds = at.step + 1, time.time() - began
        diffusion.ema_update(at.average, at.model, at.step, s.ema_half_life)
        log(at.step, loss.item())
        if at.step % s.save_every == 0 or at.step == s.steps_stage2:
            refuse_divergence(2, at.step, at.model)
            save(run / "stage2.pt", {
                "stage": 2, "step": at.step, "settings": vars(s),
                "decoder": at.decoder, "seconds": at.seconds, "model": at.model.state_dict(),
                "ema": at.average.state_dict(), "optimizer": at.optimizer.state_dict(),
                "m": at.normalizer.m, "s": at.normalizer.s, "vocabulary": at.vocabulary,
                "random": random_states(at.generator)})
            plot_log(run)
    sample.add_metrics(run, vars(s), STALE, seconds_stage2=round(at.seconds, 1),
                       steps_stage2=at.step, latent_median=float(at.normalizer.m.mean()),
                       latent_iqr=float(at.normalizer.s.mean()))


def first_sampling(s, dataset, run, device):
    """Sheets, turntable, the strip from noise to object and Frechet distances -> paths."""
    began = time.time()
    trained = sample.load_run(run, device)
    sample.save_noise_strip(run / "noise_to_object.png", trained, steps=s.sample_steps)
    volumes, paths = sample.save_samples(trained, run / "samples", s.n_sheet, s.sample_steps,
                                         s.seed, s.churn)
    # 128: enough pictures for the covariance of the features; sample.py --evaluate takes more.
    scores = sample.evaluate(trained, dataset, 128, 4, s.sample_steps, s.churn, s.seed,
                             shapes=False)
    sample.add_metrics(run, vars(s), seconds_sampling=round(time.time() - began, 1), **scores)
    sample.print_scores(scores)
    return [run / "noise_to_object.png"] + paths


def take_decoder(args):
    """--decoder RUN: copies its stage1.pt to --out, so that stage 2 can be tried in many ways."""
    if args.stage != 2:
        raise BadInput("--decoder goes with --stage 2: it takes the place of stage 1")
    theirs, path = sample.load_checkpoint(args.decoder, 1)["fingerprint"], args.out / "stage1.pt"
    if path.exists() and sample.load_checkpoint(args.out, 1)["fingerprint"] == theirs:
        return
    if path.exists() and args.resume:
        raise BadInput(f"{path} is another than that of --decoder {args.decoder}; run without "
                       "--resume, or with another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(args.decoder) / "stage1.pt", path.with_suffix(".tmp"))
    if path.exists():
        os.replace(path, path.with_suffix(".old"))        # the last one is kept
        (args.out / "metrics.json").unlink(missing_ok=True)
    os.replace(path.with_suffix(".tmp"), path)


# ---- Command line -------------------------------------------------------------------------------


def main(arguments=None):
    """Data, stage 1, stage 2, first samples: whichever --stage asks for."""
    args, s = parse(arguments)
    device = sample.choose_device(args.device)
    if args.decoder:
        take_decoder(args)
    paths, began = [], time.time()
    dataset = None
    if args.stage != 2:
        dataset = sample.load_dataset(vars(s), args.data)
        print(f"data    | {dataset.layout}: {dataset.n_objects} objects, "
              f"{int((~dataset.heldout).sum())} training and {int(dataset.heldout.sum())} held-out "
              f"views, {s.size}x{s.size}, {time.time() - began:.0f} s")
        seconds = time.time() - began
        args.out.mkdir(parents=True, exist_ok=True)
        s = fit_to_data(s, args.cameras, dataset, args.data)
        shaken = shake_cameras(dataset, s.camera_noise, s.seed) if s.camera_noise else dataset
        train_stage1(s, shaken, args.out, device, args.data, args.resume)
        sample.add_metrics(args.out, vars(s), seconds_data=round(seconds, 1))
        paths += [args.out / name for name in ("training.png", "orbit.png", "loss.png")]
    if args.stage != 1 and not (args.stage is None and dataset.n_objects < 2):
        train_stage2(s, args.out, device, args.resume)
        paths += [args.out / "latents.png", args.out / "loss.png"]
    if args.stage is None and dataset.n_objects >= 2:
        paths += first_sampling(s, dataset, args.out, device)
    print("wrote " + ", ".join(str(p) for p in dict.fromkeys(paths)))


if __name__ == "__main__":
    data.run_cli(main)
