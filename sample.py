"""A trained run goes in; objects that never existed come out, as pictures, films and meshes.

    python sample.py --run runs/tiny-synthetic --n 8

Paper: Sec. 3.3 and 4: noise -> 64 Heun steps -> denormalize -> G2 -> volume -> render. The first
decoder half and the embeddings are not used; with --direct they are all that is used (the paper's
baseline, direct latent sampling: draw an embedding, decode it with the whole G).

In it: Checkpoints (rebuilding the models), Generating (the method itself: at a first reading, this
is all), Scores (of pictures, shapes, text), Figures, Moving subjects, Meshes, Command line.
Training shares the first five.

Shapes: B objects, V views, n samples, C channels, H = W side of a picture.
Simplified: unless a file of Inception's weights is given, Frechet and kernel distances are on a
fixed random network: good for comparing runs with one another, not with published numbers.
Read next: train.py
"""
import contextlib
import hashlib
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import matplotlib
import torch
import torch.nn.functional as F
from torch import nn

import data
import render
from autodecoder import VGG16_FILE, VGG16_LAYERS, AutoDecoder, PoseNet, RandomFeatures, VGGFeatures
from data import BadInput
from diffusion import TOKENS, Denoiser, T5Encoder, edm_sampler, guided, words
from normalize import RobustNormalizer

matplotlib.use("Agg")                        # draw into files: no screen is needed
import matplotlib.pyplot as plt  # noqa: E402

# ---- Checkpoints --------------------------------------------------------------------------------

SAMPLING_NEEDS = {1: ("settings", "model", "names", "captions", "source", "view", "fingerprint"),
                  2: ("settings", "ema", "m", "s", "decoder", "vocabulary")}
RESUMING_NEEDS = {1: ("step", "seconds", "optimizer", "random", "order"),
                  2: ("step", "seconds", "optimizer", "random", "model")}

def load_checkpoint(run, stage, resume=False):
    """Reads RUN/stage1.pt or stage2.pt: a dict of tensors and plain types (see train.save).

    A checkpoint may come from a stranger, so only the safe loader touches it. Raises BadInput
    where there is none, it is damaged, or of another stage. With resume, it must also hold what
    going on needs, and where there is none the answer is None.
    """
    path = Path(run) / f"stage{stage}.pt"
    if not path.exists():
        if resume:
            return None
        raise BadInput(f"{path} is not there: run `python train.py --stage {stage} --out {run}` "
                       "with the same --data and --preset first")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:               # the unpickler of a damaged file raises anything
        raise BadInput(f"{path} cannot be read as a checkpoint ({type(error).__name__}); delete it "
                       "and train again") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("stage") != stage:
        found = checkpoint.get("stage", "no") if isinstance(checkpoint, dict) else "no"
        raise BadInput(f"{path} is a checkpoint of stage {found}, not {stage}; did files get "
                       "renamed?")
    needs = SAMPLING_NEEDS[stage] + (RESUMING_NEEDS[stage] if resume else ())
    if stage == 1 and (checkpoint.get("settings") or {}).get("parts"):
        needs += ("posenet", "poses")
    if lacking := [key for key in needs if key not in checkpoint]:
        raise BadInput(f"{path} lacks {', '.join(lacking)}: it is damaged, or of another version; "
                       "train again")
    return checkpoint


def build_autodecoder(s, n_objects):
    """The decoder that settings s (a dict) describe."""
    return AutoDecoder(
        n_objects, s["embed_dim"], s["channels"], s["start_side"], s["volume_side"],
        s["latent_side"], s["decoder_depth"], tuple(s["decoder_attention"]), s["norm"],
        s["codebooks"], s["rows"], s["hash_rule"], s["parts"], s["body"] if s["ellipsoid"] else (),
        s["skin_layout"], s["reach"])


def build_posenet(s):
    """The pose network that settings s (a dict) describe; None where cameras are known."""
    return PoseNet(s["parts"], s["keypoints"], s["focal"], s["body"], s["pose_width"]) \
        if s["parts"] else None


def diffused_shape(s):
    """Channels and side of what settings s (a dict) diffuse: the latent F, or as in DiffRF (Mueller
    et al. 2023), with space "volume", the decoder's output before its activations."""
    if s["space"] == "volume":
        return 4 + s["parts"] * (s["parts"] > 1), s["volume_side"]
    return s["channels"] >> int(math.log2(s["latent_side"] // s["start_side"])), s["latent_side"]


def build_denoiser(s, vocabulary=()):
    """The diffusion network that settings s (a dict) describe; vocabulary: of its own encoder."""
    return Denoiser(
        *diffused_shape(s), s["unet_channels"], tuple(s["unet_multipliers"]), s["unet_depth"],
        tuple(s["unet_attention"]), s["context_dim"] * s["text"], s["transformer_depth"],
        s["sigma_data"], s["dropout"], vocabulary)


def build_normalizer(s):
    return RobustNormalizer(s["normalization"], s["per_channel"], s["latent_scale"])


@contextlib.contextmanager
def evaluating(run):
    """Batch norm and running means as in evaluation, for as long as pictures are drawn."""
    modules = [m for m in (run.autodecoder, run.posenet) if m is not None]
    were = [m.training for m in modules]
    try:
        yield [m.eval() for m in modules]
    finally:
        for module, was in zip(modules, were):
            module.train(was)


def restore(make, state, path):
    """make() with a state dict loaded; what does not fit its own settings is bad input."""
    try:
        module = make()
        module.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise BadInput(f"{path} does not fit the settings that it carries "
                       f"({str(error).splitlines()[-1].strip()[:100]})") from None
    return module


def load_run(run, device="cpu", stages=(1, 2)):
    """Rebuilds what training left in the folder RUN, ready to generate.

    returns a namespace: settings (dict), data_settings (stage 1's, whose --seed may have been
    another: it made the objects), autodecoder, view (dict: distance, elevation), names,
    captions, source (of the data), posenet (None where cameras are known), poses (T, P, 4, 4) of a
    training clip and, with stage 2, denoiser (the EMA weights), normalizer and encode (of text, or
    None)
    """
    first = load_checkpoint(run, 1)
    s = first["settings"]
    out = SimpleNamespace(settings=s, data_settings=s, device=device, **{
        key: first[key] for key in ("names", "captions", "view", "source")})
    out.autodecoder = restore(lambda: build_autodecoder(s, len(first["names"])), first["model"],
                              f"{run}/stage1.pt").to(device).eval().requires_grad_(False)
    out.posenet, out.poses = None, None
    if s["parts"]:
        out.posenet = restore(lambda: build_posenet(s), first["posenet"], f"{run}/stage1.pt")
        out.posenet.to(device).eval().requires_grad_(False)
        out.poses = first["poses"].to(device)
    if 2 in stages:
        second = load_checkpoint(run, 2)
        if second["decoder"] != first["fingerprint"]:
            raise BadInput(f"{run}/stage2.pt was trained on another stage 1 than the one there "
                           f"now: run `python train.py --stage 2 --out {run}` again")
        s = out.settings = second["settings"]
        out.data_settings = {**s, **first["settings"]}    # an older stage 1 may lack some flags
        out.denoiser = restore(lambda: build_denoiser(s, second["vocabulary"]), second["ema"],
                               f"{run}/stage2.pt").to(device).eval().requires_grad_(False)
        out.encode = T5Encoder(s["t5"], device) if s["text"] and s["t5"] else out.denoiser.text
        out.normalizer = build_normalizer(s)
        out.normalizer.m, out.normalizer.s = (second[k].to(device) for k in ("m", "s"))
    return out


def load_dataset(s, source):
    """The data that settings s (a dict) and the word of --data describe."""
    return data.load(source, s["size"], s["holdout"], s["seed"], s["n_objects"], s["n_views"],
                     s["objects"], s["arc"], s["shared_colours"], s["clip_filter"])


OF_SAMPLES = ("fd", "kd", "cov", "mmd", "nna", "memorization", "empty", "text_", "features",
              "samples", "views", "seconds_per_sample", "seconds_evaluation")


def add_metrics(run, settings, drop=(), **values):
    """Adds flat numbers to RUN/metrics.json, beside all settings (a dict).

    drop: beginnings of the names of older numbers that are no longer true
    """
    path = Path(run) / "metrics.json"
    try:
        metrics = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        metrics = {}                                     # damaged: it is written anew
    metrics = {k: v for k, v in metrics.items() if not k.startswith(tuple(drop))} | values
    metrics["seconds_total"] = round(sum(metrics.get(f"seconds_{part}", 0.0) for part in (
        "data", "stage1", "stage2", "sampling")), 1)
    metrics["peak_memory_gib"] = round(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)     # Linux counts in KiB
    metrics["settings"] = settings
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(metrics, indent=2) + "\n")
    os.replace(temporary, path)


# ---- Generating ---------------------------------------------------------------------------------


@torch.no_grad()
def latents_of(run, embeddings, chunk=64):
    """F = G1(e) of embeddings (n, embed_dim), or what is diffused instead -> (n, C, D, H, W)."""
    out = [run.autodecoder.decode_latent(e) for e in embeddings.split(chunk)]
    if run.settings["space"] == "volume":
        out = [run.autodecoder.decode_raw(latent) for latent in out]
    return torch.cat(out)


@torch.no_grad()
def training_latents(run, chunk=64):
    """F = G1(e), or what is diffused instead, of every training object -> (N, C, D, H, W)."""
    k = torch.arange(len(run.names), device=run.device)
    return latents_of(run, run.autodecoder.embed(k), chunk)


def sample_latents(run, noise, steps=64, churn=0.0, seed=0, watch=None, chunk=64, prompts=None,
                   guidance=3.0):
    """Noise (n, C, D, H, W), unit normal -> latents F of new objects, ready for decode_volume.

    prompts: n texts, followed as strongly as guidance says; None: unconditional
    churn: the paper only says that there is some; with EDM's values for it, those of ImageNet-64
    Sample i depends on noise i, seed and i alone, however many there are.
    """
    fresh, parts = [stream(seed, f"churn {i}") for i in range(len(noise))], []
    for i in range(0, len(noise), chunk):
        denoise = run.denoiser
        if run.encode:
            null = run.encode([""])
            given = run.encode(prompts[i:i + chunk]) if prompts else null
            denoise = guided(run.denoiser, given, null, guidance if prompts else 1)
        parts.append(edm_sampler(denoise, noise[i:i + chunk].to(run.device), steps, S_churn=churn,
                                 S_min=0.05, S_max=50.0, S_noise=1.003,
                                 generator=fresh[i:i + chunk], watch=watch))
    return run.normalizer.denormalize(torch.cat(parts).float())


def check_prompt(run, prompt):
    """Refuses a prompt where the run knows no text; warns of words that will not be heard."""
    if run.encode is None:
        raise BadInput("--prompt: this run knows no text; train its stage 2 with --text")
    if unknown := run.encode.unknown(prompt):
        print(f"warning: no caption had {', '.join(dict.fromkeys(unknown[:9]))}"
              f"{' ...' * (len(unknown) > 9)}: left out", file=sys.stderr)
    if len(words(prompt)) >= TOKENS:
        print(f"warning: only the first {TOKENS - 1} words of a prompt are read", file=sys.stderr)


def stream(seed, name):
    """A generator for one use of a seed. TRAP: with plain manual_seed(seed), "e ~ N(0, I)" repeated
    the very numbers that the embeddings had been initialised with, and decoded to training objects.
    """
    digest = hashlib.sha256(f"{name} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def latent_noise(run, n, seed):
    """(n, C, D, H, W) unit normal noise of the latents' shape; sample i depends on seed and i."""
    channels, side = diffused_shape(run.settings)
    shape = (channels, side, side, side)
    return torch.stack([torch.randn(shape, generator=stream(seed, f"noise {i}")) for i in range(n)])


@torch.no_grad()
def direct_latents(run, n, seed, kind):
    """The baseline: latents of embeddings drawn at random and decoded by G1 -> (n, C, D, H, W).

    kind "normal": e ~ N(0, I), what the embeddings started as
    kind "fitted": e ~ N(mean, covariance) of the trained embeddings (the predecessor whitens them)
    """
    generator = stream(seed, f"direct {kind}")
    k = torch.arange(len(run.names), device=run.device)
    e = run.autodecoder.embed(k)                                             # (N, 1024)
    if kind == "normal":
        draw = torch.randn(n, e.shape[1], generator=generator).to(e)
    else:
        # With fewer objects than dimensions the covariance is singular; drawing in the span of the
        # centred rows, e = mean + z^T (E - mean) / sqrt(N - 1), has just that covariance.
        z = torch.randn(n, len(e), generator=generator).to(e)
        draw = e.mean(0) + z @ (e - e.mean(0)) / math.sqrt(max(1, len(e) - 1))
    return latents_of(run, draw)


@torch.no_grad()
def cameras_of(run, dataset, frames):
    """Cameras of frames (n,) of a dataset: (n, 4, 4), or as the pose network sees them
    (n, P, 4, 4), whichever the run has."""
    if run.posenet is None:
        return dataset.cam2world[frames].to(run.device)
    size = min(64, dataset.images.shape[1])
    return torch.cat([run.posenet(dataset.batch(part, size)[0].to(run.device))[0]
                      for part in frames.split(64)])


def view_from(run, azimuth, elevation=None, pose=0):
    """A camera for looking at things, (4, 4), or (P, 4, 4) for parts in one of the run's poses.

    returns it and intrinsics (4,)
    """
    distance = run.view["distance"]
    elevation = run.view["elevation"] if elevation is None else elevation
    if run.posenet is not None:
        focal = run.posenet.focal
        camera = render.turn_about(run.poses[pose], azimuth, run.posenet.distance, elevation)
    else:
        # A sphere of radius 1.3 around the object fills the picture, wherever training cameras are.
        focal = 0.5 * math.sqrt(distance**2 - 1.3**2) / 1.3
        camera = render.orbit(torch.tensor(float(azimuth)), torch.tensor(elevation), distance)
    return camera.to(run.device), torch.tensor([focal, focal, 0.5, 0.5], device=run.device)


@torch.no_grad()
def render_views(run, volumes, azimuths, size, elevation=None, extras=False, n_samples=64, pose=0):
    """Pictures of volumes (B, 4, D, H, W) from a turntable of V azimuths (radians).

    returns render.render's dict, (B, V, C, size, size), on the CPU; one view at a time saves memory
    """
    parts = []
    for volume in volumes.split(8):
        views, n = [], len(volume)
        for azimuth in azimuths:
            camera, intrinsics = view_from(run, azimuth, elevation, pose)
            views.append(render.render(volume, camera.expand(n, 1, *camera.shape),
                                       intrinsics.expand(n, 1, 4), size, n_samples, extras=extras))
        parts.append({key: torch.cat([v[key].cpu() for v in views], 1) for key in views[0]})
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def decode(run, latents, chunk=16):
    """G2 in chunks: latents, or what is diffused instead -> volumes (n, 4, D, H, W)."""
    rest = (run.autodecoder.activate if run.settings["space"] == "volume" else
            run.autodecoder.decode_volume)
    with torch.no_grad():
        return torch.cat([rest(part) for part in latents.split(chunk)])


def looks(run, volumes):
    """What the eye compares: colours at 32 x 32 from four sides -> (n, d), scaled so that distances
    are root-mean-square differences of colours."""
    azimuths = ([0.4 + i * math.pi / 2 for i in range(4)] if run.posenet is None else
                [-0.35, 0.0, 0.35])
    x = render_views(run, volumes, azimuths, 32, n_samples=48)["rgb"].flatten(1)
    return x / math.sqrt(x.shape[1])


def nearest_training(run, volumes, training_volumes):
    """The training object that looks most like each volume: index (n,) int64, distance (n,)."""
    distance = torch.cdist(looks(run, volumes), looks(run, training_volumes))
    return distance.argmin(1), distance.amin(1)


# ---- Scores: pictures ---------------------------------------------------------------------------


FEATURES = 240                               # of a picture, see image_features


@torch.no_grad()
def image_features(images, chunk=256):
    """Features of pictures (n, 3, H, W) in [0, 1] -> (n, 240): means of a random network's maps.

    OURS: Inception cannot be had without a download. Distances are comparable among themselves,
    for pictures of the same size, and with no published FID. Why they mean something all the same:
    see autodecoder.RandomFeatures.
    """
    network = RandomFeatures()
    return torch.cat([torch.cat([m.mean((2, 3)) for m in network(part)], 1)
                      for part in images.split(chunk)])


INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"     # torch-fidelity's, by public name
LPIPS_FILE = "vgg.pth"                       # the linear layers of lpips v0.1, by their public name


def load_weights(flag, path, file):
    """A file of weights, which may come from a stranger -> dict; BadInput where it is none."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        return dict(weights.items())
    except Exception as error:               # the unpickler of a damaged file raises anything
        raise BadInput(f"{flag} {path}: not a file of weights ({type(error).__name__}); expected "
                       f"{file}") from None


def load_inception(path):
    """The features of published FID and KID: pictures (n, 3, H, W) in [0, 1] -> (n, 2048).

    Needs torch-fidelity, whose Inception gives the same numbers as the first one, of 2015.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise BadInput("--inception needs torch-fidelity: pip install torch-fidelity") from None
    # Its own loader would run what a file says: first make sure that there are only numbers in it.
    load_weights("--inception", path, INCEPTION_FILE)
    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"], str(path))
    except (RuntimeError, TypeError):
        raise BadInput(f"--inception {path}: not Inception's weights; expected "
                       f"{INCEPTION_FILE}") from None
    return lambda images: torch.cat([network((part * 255).round().byte())[0]
                                     for part in images.split(64)])


class LPIPS(nn.Module):
    """Learned perceptual distance of pictures (n, 3, H, W) in [0, 1] -> (n,); 0 where equal.

    Zhang et al. 2018: sum over the stages of VGG-16 of the mean over pixels of w . (a - b)^2, a and
    b the maps' vectors at unit length, w >= 0 learned from what people call alike.
    """

    def __init__(self, vgg16, linear):
        super().__init__()
        self.vgg = VGGFeatures(vgg16, VGG16_LAYERS).eval().requires_grad_(False)
        names = [f"lin{i}.model.1.weight" for i in range(5)]
        for name, width in zip(names, (64, 128, 256, 512, 512)):
            if name not in linear or linear[name].shape != (1, width, 1, 1):
                raise ValueError(f"not the layers of LPIPS: {name} should be (1, {width}, 1, 1); "
                                 f"expected {LPIPS_FILE}")
        self.weights = [linear[name] for name in names]

    def forward(self, a, b):
        pairs = zip(self.vgg(a), self.vgg(b), self.weights)
        return sum((w * (F.normalize(x, eps=1e-10) - F.normalize(y, eps=1e-10))**2)
                   .sum(1).mean((1, 2)) for x, y, w in pairs)


def load_lpips(vgg16, linear):
    """LPIPS from its two files."""
    try:
        return LPIPS(load_weights("--lpips", vgg16, VGG16_FILE),
                     load_weights("--lpips", linear, LPIPS_FILE))
    except ValueError as error:
        raise BadInput(f"--lpips: {error}") from None


def check_features(a, b):
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features must be (n, d) and (m, d) with n, m >= 2, got "
                         f"{tuple(a.shape)} and {tuple(b.shape)}")


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of features a (n, d), b (m, d), n, m >= 2.

    A, B are covariances. The trace of (A B)^(1/2) is the sum of the square roots of the eigenvalues
    of A^(1/2) B A^(1/2), which is symmetric: no complex numbers, no general matrix root.
    """
    check_features(a, b)
    a, b = a.double(), b.double()
    A, B = (torch.atleast_2d(torch.cov(x.T)) for x in (a, b))
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross)


def kernel_distance(a, b):
    """Squared maximum mean discrepancy of features a (n, d), b (m, d), n, m >= 2; kernel
    (x.y / d + 1)^3. Unbiased: its mean is 0 for equal distributions, so it may be below 0.

    Binkowski et al. 2018, "Demystifying MMD GANs"; on all samples, where they average subsets.
    """
    check_features(a, b)
    a, b = a.double(), b.double()

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):                           # the mean over pairs of different samples
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def ssim(a, b):
    """Structural similarity of pictures (n, 3, H, W) in [0, 1] -> (n,), 1 where they are equal.

    Wang et al. 2004: a Gaussian window of deviation 1.5, 11 wide, without padding; mean over
    pixels and channels.
    """
    at = torch.arange(-5.0, 6.0, device=a.device)
    g = (-(at / 1.5) ** 2 / 2).exp()
    window = (g[:, None] * g / g.sum() ** 2).expand(a.shape[1], 1, 11, 11)

    def mean(x):
        return F.conv2d(x, window, groups=x.shape[1])

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    value = ((2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
             / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return value.mean((1, 2, 3))


@torch.no_grad()
def score_heldout(run, dataset, lpips=None, n_samples=96, chunk=8):
    """Means over all held-out views -> dict psnr_heldout, dB, ssim_heldout and mask_heldout, what
    Eq. 2 measures: mean |O - mask|; {} without any.

    run: a namespace with autodecoder, posenet, device; PSNR is -10 log10(mean squared error);
    lpips: an LPIPS, for lpips_heldout
    """
    size, found = dataset.images.shape[1], []
    if not dataset.heldout.any():
        return {}
    with evaluating(run):
        for frame in torch.nonzero(dataset.heldout)[:, 0].split(chunk):
            volumes = run.autodecoder(dataset.object_index[frame].to(run.device))
            out = render.render(volumes, cameras_of(run, dataset, frame)[:, None],
                                dataset.intrinsics[frame, None].to(run.device), size, n_samples,
                                extras=False)
            ours, (true, mask) = out["rgb"][:, 0].cpu(), dataset.batch(frame, size)
            error = (ours - true).square().flatten(1).mean(1).clamp(min=1e-10)
            miss = (out["occupancy"][:, 0].cpu() - mask).abs().flatten(1).mean(1)
            found.append(torch.stack([-10 * error.log10(), ssim(ours, true), miss]
                                     + ([lpips(ours, true)] if lpips else [])))
    values = torch.cat(found, 1).mean(1).tolist()
    return {f"{name}_heldout": round(x, 4)
            for name, x in zip(("psnr", "ssim", "mask", "lpips"), values)}


@torch.no_grad()
def rendered_features(run, volumes, dataset, views, seed=0, features=image_features):
    """Features of volumes (n, 4, D, H, W), each seen from `views` cameras drawn from the training
    frames, at the data's size -> (n views, 240 or as many as features gives)."""
    generator, size = torch.Generator().manual_seed(seed), dataset.images.shape[1]
    train, found = torch.nonzero(~dataset.heldout)[:, 0], []
    for volume in volumes.split(2):      # 8 at a time need half as long again, in fetching memory
        frames = train[torch.randint(len(train), (len(volume), views), generator=generator)]
        cameras = cameras_of(run, dataset, frames.flatten()).unflatten(0, frames.shape)
        out = render.render(volume, cameras, dataset.intrinsics[frames].to(run.device), size, 48,
                            extras=False)
        found.append(features(out["rgb"].flatten(0, 1).cpu()))
    return torch.cat(found)


# ---- Scores: shapes (App. D, Eq. 3 to 5) ---------------------------------------------------------


def chamfer_distances(a, b):
    """Chamfer distances of all pairs of clouds a (n, K, 3), b (m, K, 3) -> (n, m).

    Eq. 3: mean over x of min over y of |x - y|^2, plus the same the other way round
    """
    # (x, 1, |x|^2) . (-2 y, |y|^2, 1) = |x - y|^2, as one matrix product.
    ones = torch.ones_like(a[..., :1]), torch.ones_like(b[..., :1])
    a = torch.cat([a, ones[0], a.square().sum(-1, keepdim=True)], -1)
    b = torch.cat([-2 * b, b.square().sum(-1, keepdim=True), ones[1]], -1)
    out, chunk = torch.empty(len(a), len(b)), max(1, 2**22 // (a.shape[1] * b.shape[1]))
    for i, x in enumerate(a):
        for j in range(0, len(b), chunk):                # 16 MiB at a time
            square = x @ b[j:j + chunk].mT                                    # (chunk, K, K)
            out[i, j:j + chunk] = (square.amin(1).clamp(min=0).mean(1)
                                   + square.amin(2).clamp(min=0).mean(1))
    return out


def nearest_clouds(a, b, same=False, coarse=256, keep=8):
    """Chamfer distances (n, m) of clouds a (n, K, 3), b (m, K, 3), but infinity for pairs that are
    not near; same: a is b, and nobody is his own neighbour.

    OURS: only nearest ones are asked for. Their first 256 points tell which come near, and of each
    row and column the 8 nearest are then measured in full: 5 times as fast for 48 clouds against
    112 (39 and 7 s), with the same neighbours.
    """
    near = torch.full((len(a), len(b)), torch.inf)
    for i in range(len(a)):
        j = i + 1 if same else 0                          # of each pair once
        near[i, j:] = chamfer_distances(a[i:i + 1, :coarse], b[j:, :coarse])[0]
    near = torch.minimum(near, near.T) if same else near
    keep = min(keep, len(a), len(b))
    limit = torch.maximum(near.kthvalue(keep, 1, keepdim=True)[0],
                          near.kthvalue(keep, 0, keepdim=True)[0])
    wanted = (near <= limit) & near.isfinite()
    out = torch.full_like(near, torch.inf)
    for i, row in enumerate(wanted.triu() if same else wanted):
        j = row.nonzero()[:, 0]
        out[i, j] = chamfer_distances(a[i:i + 1], b[j])[0]
    return torch.minimum(out, out.T) if same else out


def shape_metrics(generated, reference, apart=None):
    """COV, MMD and 1-NNA of clouds (n, 2048, 3) against (m, 2048, 3) -> dict cov, mmd, nna.

    apart: nearest_clouds(reference, reference, same=True), where the caller has it already

    cov  share of reference shapes that are the nearest one of some generated shape (Eq. 4)
    mmd  mean over reference shapes of the distance to the nearest generated one (Eq. 5)
    nna  share of all shapes whose nearest neighbour is of their own kind; 1 means that the two
         sets can be told apart (Lopez-Paz & Oquab 2017). Ideal, of sets from one distribution:
         (n (n - 1) + m (m - 1)) / ((n + m) (n + m - 1)), 0.5 if n = m, 0.55 for 256 and 128
    TRAP: more generated shapes make a better cov and mmd: compare equal n only.
    """
    for name, clouds in (("generated", generated), ("reference", reference)):
        if clouds.ndim != 3 or clouds.shape[2] != 3 or len(clouds) < 2:
            raise ValueError(f"{name} must be (n, K, 3) with n >= 2, got {tuple(clouds.shape)}")
    across = nearest_clouds(generated, reference)                             # (n, m)
    if apart is None:
        apart = nearest_clouds(reference, reference, same=True)               # (m, m)
    same = nearest_clouds(generated, generated, same=True)                    # (n, n)
    right = (same.amin(1) < across.amin(1)).sum() + (apart.amin(1) < across.amin(0)).sum()
    return {"cov": len(across.argmin(1).unique()) / len(reference),
            "mmd": float(across.amin(0).mean()),
            "nna": int(right) / (len(generated) + len(reference))}


@torch.no_grad()
def surface_points(volume, n, seed=0, samples=192):
    """n points (n, 3), uniform on the surface of a volume (4, D, H, W), where a voxel stops half of
    the light; None for an empty volume.

    Lines through two random points of a sphere enter a surface in proportion to its area (Crofton):
    each place where one does is a point. OURS: the paper takes its points from meshes of marching
    cubes; so no mesh is needed.
    """
    generator, volume = torch.Generator().manual_seed(seed), volume.cpu()
    level, found = math.log(2) * volume.shape[-1] / 2, torch.zeros(0, 3)
    for _ in range(20 if volume[0].max() > level else 0):
        ends = F.normalize(torch.randn(2, 2 * n, 3, generator=generator), dim=-1) * 3**0.5
        t = torch.linspace(0, 1, samples)[:, None]
        line = ends[0, :, None] + t * (ends[1] - ends[0])[:, None]            # (2n, samples, 3)
        density = render.sample_volume(volume[None, :1], line.reshape(1, -1, 3))
        density = density.reshape(line.shape[:2])
        i, j = ((density[:, :-1] < level) & (density[:, 1:] >= level)).nonzero().T
        low, high = density[i, j], density[i, j + 1]
        share = ((level - low) / (high - low))[:, None]
        found = torch.cat([found, torch.lerp(line[i, j], line[i, j + 1], share)])
        if len(found) >= n:
            return found[torch.randperm(len(found), generator=generator)[:n]]
    return None


# ---- Scores: text -------------------------------------------------------------------------------

KINDS = "chair", "table", "car", "van", "truck"
DETAILS = "legs", "pedestal", "round", "slatted", "armrests", "shelf"


def asked_for(prompt):
    """What a synthetic caption asks for: its colours in order, [red, blue], and set of parts."""
    said = words(prompt)
    return ([w for w in said if w in data.COLOURS],
            {w for w in said if w in KINDS or w in DETAILS})


class AttributeReader(nn.Module):
    """Pictures of one synthetic object from random sides -> what a caption would say of it.

    (n, V, 3, H, W) in [0, 1] -> logits of the first colour (n, 8), the second (n, 8), the kind
    (n, 5) and the details (n, 6)
    """

    def __init__(self, width=32):
        super().__init__()
        w = width
        self.layers = nn.Sequential(*[layer for a, b in zip((3, w, 2 * w, 4 * w),
                                                            (w, 2 * w, 4 * w, 4 * w))
                                      for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b),
                                                    nn.ReLU())])
        self.last = nn.Sequential(nn.Linear(8 * w, 8 * w), nn.ReLU(), nn.Linear(
            8 * w, 2 * len(data.COLOURS) + len(KINDS) + len(DETAILS)))

    def forward(self, images):
        x = self.layers(images.flatten(0, 1)).flatten(2)                      # (n V, C, h w)
        x = torch.cat([x.mean(2), x.amax(2)], 1).unflatten(0, images.shape[:2])
        # The best view of each thing decides: a back is not seen from behind.
        logits = self.last(x.amax(1))
        return logits.split([len(data.COLOURS)] * 2 + [len(KINDS), len(DETAILS)], 1)


def read_attributes(reader, images):
    """What reader sees -> for each object its two colours and the set of its parts."""
    first, second, kind, details = reader(images)
    names = list(data.COLOURS)
    return [([names[a], names[b]], {KINDS[c]} | {DETAILS[j] for j in d.nonzero()[:, 0].tolist()})
            for a, b, c, d in zip(first.argmax(1).tolist(), second.argmax(1).tolist(),
                                  kind.argmax(1).tolist(), details > 0)]


def fit_reader(dataset, epochs=12, seed=0):
    """An AttributeReader that has learned from a synthetic dataset's pictures and captions."""
    torch.manual_seed(seed)
    reader, size = AttributeReader(), dataset.images.shape[1]
    asked, colour = [asked_for(caption) for caption in dataset.captions], list(data.COLOURS).index
    colours = torch.tensor([[colour(c) for c in found[:2]] + [-100] * (2 - len(found))
                            for found, _ in asked])                           # (N, 2), -100: none
    kind = torch.tensor([[k in parts for k in KINDS] for _, parts in asked]).int().argmax(1)
    details = torch.tensor([[d in parts for d in DETAILS] for _, parts in asked]).float()
    # Most chairs have no armrests: what is rare counts for more, or it is seen too seldom.
    rare = (1 / details.mean(0) - 1).clamp(0.1, 10)
    optimizer, batch = torch.optim.Adam(reader.parameters()), 32
    steps = epochs * (dataset.n_objects // batch)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    views = dataset.object_index.bincount()[0]
    for step in range(steps):
        k = torch.randint(dataset.n_objects, (batch,))
        frames = k[:, None] * views + torch.rand(batch, views).argsort(1)[:, :4]
        images = dataset.batch(frames, size)[0]
        if step % 2:                         # decoded volumes are blurred: half of the time, so
            images = F.avg_pool3d(images, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
        if step % 4 > 1:                     # a caption is true of the mirror image, too
            images = images.flip(-1)
        first, second, what, which = reader(images)
        loss = (F.cross_entropy(first, colours[k, 0]) + F.cross_entropy(second, colours[k, 1])
                + F.cross_entropy(what, kind[k]) + len(DETAILS)
                * F.binary_cross_entropy_with_logits(which, details[k], pos_weight=rare))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return reader.eval().requires_grad_(False)


def reader_of(folder, s):
    """The reader for a run of settings s (a dict): learned once, minutes, then FOLDER/reader.pt."""
    path = Path(folder) / "reader.pt"
    if path.exists():
        state = load_weights("--run", path, "what --evaluate wrote: delete it")
        return restore(AttributeReader, state, path).eval().requires_grad_(False)
    # Of objects of another seed: neither the run's own nor those whose captions it is asked for.
    reader = fit_reader(data.load("synthetic", s["size"], 0, s["seed"] + 1, 2000, 6))
    torch.save(reader.state_dict(), path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
    return reader


def attribute_scores(prompts, seen):
    """Share of the colours and of the parts that prompts ask for which were seen -> two numbers."""
    right, asked = [0, 0], [0, 0]
    for prompt, (colours, parts) in zip(prompts, seen):
        wanted, wanted_parts = asked_for(prompt)
        right[0] += sum(a == b for a, b in zip(wanted, colours))
        right[1] += len(wanted_parts & parts)
        asked[0], asked[1] = asked[0] + len(wanted), asked[1] + len(wanted_parts)
    return [r / max(1, a) for r, a in zip(right, asked)]


@torch.no_grad()
def score_text(run, reader, n, steps, churn, guidance, seed):
    """How often what a caption asks for is seen in what is made of it -> dict of shares.

    The captions are of n synthetic objects beyond those that the run was trained on, and as a whole
    none of its own: known words in new combinations.
    text_colour, text_parts  colours, and kinds and parts, that the reader sees as asked for
    ..._chance  the same for objects made of the other captions: what no reading would give
    ..._true    the same for true pictures of such objects: what the reader can give at most
    text_diversity  median difference (see looks) of two objects made of the same caption
    """
    s, known = run.data_settings, set(run.captions)
    unseen = data.load("synthetic", s["size"], 0, s["seed"], s["n_objects"] + 2 * n, 8)
    pick = [k for k in range(s["n_objects"], unseen.n_objects)
            if unseen.captions[k] not in known][:n]
    prompts = [unseen.captions[k] for k in pick]
    frames = torch.stack([unseen.frames_of(k) for k in pick])                 # (n, 8)
    true = read_attributes(reader, unseen.batch(frames, s["size"])[0])

    def made(prompts, seed):
        noise = latent_noise(run, len(prompts), seed)
        return decode(run, sample_latents(run, noise, steps, churn, seed, prompts=prompts,
                                          guidance=guidance))

    volumes, again, seen = made(prompts, seed + 2), made(prompts[:32], seed + 3), []
    for part, v in zip(frames.split(8), volumes.split(8)):
        out = render.render(v, unseen.cam2world[part].to(v), unseen.intrinsics[part].to(v),
                            s["size"], 64, extras=False)
        seen += read_attributes(reader, out["rgb"].cpu())
    scores = {"": attribute_scores(prompts, seen), "_true": attribute_scores(prompts, true)}
    others = [attribute_scores(prompts[i:] + prompts[:i], seen) for i in range(1, len(prompts))]
    scores["_chance"] = torch.tensor(others).mean(0).tolist()
    apart = (looks(run, volumes[:32]) - looks(run, again)).norm(dim=1).median()
    return {"text_diversity": round(float(apart), 4)} | {
        f"text_{name}{key}": round(values[i], 4) for key, values in scores.items()
        for i, name in enumerate(("colour", "parts"))}


# ---- Scores: all of them ------------------------------------------------------------------------


def evaluate(run, dataset, n, views, steps, churn, seed, shapes=True, baselines=True, voxel=None,
             features=image_features):
    """What is generated against the training data, and baselines against the same -> dict.

    fd, kd         Frechet and kernel distance of n samples x `views` renders to all training views
                   (OURS: all of them; the paper takes ten of each object and 1,000 samples)
    cov, mmd, nna  see shape_metrics, with shapes: against the true shapes, or where nobody knows
                   them, against the decoded training objects
    empty          share of samples without any surface: they have no part in these three
    memorization   median distance (see looks) to the nearest training object
    The same with _voxel (of the run `voxel`, with --space volume), _direct (embeddings drawn from a
    fitted Gaussian), _direct_normal (from N(0, I)) and _train (training objects themselves: the
    floor; their nearest other, for memorization). And seconds_per_sample, of the first.
    """
    def made(one):
        return decode(one, sample_latents(one, latent_noise(one, n, seed + 1), steps, churn, seed))

    def now():                               # when a GPU has done what it was told to do
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.time()

    trained = decode(run, training_latents(run))
    began, ours = now(), made(run)
    seconds = (now() - began) / n
    variants = {"": ours} | ({"_voxel": made(voxel)} if voxel else {})
    if baselines:
        variants |= {"_direct": decode(run, direct_latents(run, n, seed, "fitted")),
                     "_direct_normal": decode(run, direct_latents(run, n, seed, "normal")),
                     "_train": trained[:n]}
    true = features(dataset.batch(torch.nonzero(~dataset.heldout)[:, 0],
                                  dataset.images.shape[1])[0])
    if shapes:
        reference = clouds(dataset, trained)
        reference_apart = nearest_clouds(reference, reference, same=True)
    known = looks(run, trained)
    scores = {"samples": n, "views": views, "seconds_per_sample": round(seconds, 4)}
    for key, volumes in variants.items():
        ours = rendered_features(run, volumes, dataset, views, features=features)
        scores[f"fd{key}"] = round(frechet_distance(ours, true), 5)
        scores[f"kd{key}"] = round(kernel_distance(ours, true), 7)
        apart = torch.cdist(looks(run, volumes), known)
        if key == "_train":
            apart.fill_diagonal_(torch.inf)
        scores[f"memorization{key}"] = round(float(apart.amin(1).median()), 4)
        if shapes:
            found = [p for i, v in enumerate(volumes)
                     if (p := surface_points(v, 2048, i)) is not None]
            scores[f"empty{key}"] = 1 - len(found) / len(volumes)
            if len(found) > 1:
                shape = shape_metrics(torch.stack(found), reference, reference_apart)
                scores |= {name + key: round(value, 5) for name, value in shape.items()}
    return scores


def clouds(dataset, volumes, n=2048):
    """Points on the true surfaces of all objects, or else on the decoded ones -> (N, 2048, 3)."""
    if dataset.shapes:
        return torch.stack([dataset.surface_points(k, n) for k in range(dataset.n_objects)])
    return torch.stack([p for v in volumes if (p := surface_points(v, n, 1)) is not None])


def print_scores(scores):
    """Scores as a table: a row for each kind of sample, a column for each number."""
    kinds = {"": "diffusion", "_voxel": "diffusion on volumes",
             "_direct": "direct sampling, fitted", "_direct_normal": "direct sampling, N(0, I)",
             "_train": "training objects"}
    names = ["fd", "kd", "memorization"] + ["cov", "mmd", "nna", "empty"] * ("empty" in scores)
    print(f"{'':28}" + "".join(f"{name:>14}" for name in names))
    for kind, title in kinds.items():
        if "fd" + kind in scores:
            print(f"{title:28}" + "".join(f"{scores.get(name + kind, math.nan):14.5g}"
                                          for name in names))
    for name, value in scores.items():
        if name.startswith(("text", "psnr", "ssim", "mask", "lpips", "sec")):
            print(f"{name.replace('_', ' '):28}{value:14.5g}")
    if scores.get("features") != "inception":
        print("fd and kd are on a fixed random network: not comparable with published FID and KID")


# ---- Figures ------------------------------------------------------------------------------------


def on_white(out):
    """Colour over a white background, for looking at: dark objects show. -> (..., 3, H, W)."""
    return out["rgb"] + 1 - out["occupancy"]


def depth_picture(out):
    """Depth as grey, near is dark, background white. -> (..., 3, H, W)."""
    depth, hit = out["depth"], out["occupancy"] > 0.5
    seen = depth[hit] if hit.any() else depth.new_tensor([0.0, 1.0])
    low, high = seen.min(), seen.max()
    grey = (0.1 + 0.8 * (depth - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return torch.where(hit, grey, torch.ones_like(grey)).expand_as(out["rgb"])


def normal_picture(out):
    """Normals as colours (x, y, z in [-1, 1] -> red, green, blue), background white."""
    return torch.where(out["occupancy"] > 0.5, (out["normal"] + 1) / 2, torch.ones(()))


def to_uint8(image):
    """(..., 3, H, W) in [0, 1] -> (..., H, W, 3) uint8 numpy."""
    return (image.clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()


def tile(rows):
    """A list of rows of pictures, each (n, 3, H, W) -> one picture (3, H', W'), 2 px apart."""
    return torch.cat([torch.cat([F.pad(p, (1, 1, 1, 1), value=1.0) for p in row], -1)
                      for row in rows], -2)


def parts_picture(out):
    """Which part was seen, as colours, background white. -> (..., 3, H, W)."""
    hue = torch.arange(out["parts"].shape[-3]) * 2.4                 # radians; the golden angle
    colours = 0.55 + 0.45 * torch.stack([(hue + shift).cos() for shift in (0.0, 2.1, 4.2)], -1)
    return torch.einsum("...phw,pc->...chw", out["parts"], colours) + 1 - out["occupancy"]


def save_sheet(path, rows, labels, title=""):
    """Writes labelled rows of pictures, each (n, 3, H, W), as one PNG; small ones are enlarged."""
    picture = tile(rows)
    zoom = max(1, round(96 / rows[0].shape[-1]))
    picture = picture.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    height, width = picture.shape[1:]
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=100)
    axis = figure.add_axes([0, 0, 1, 1])                 # one pixel of the tile is one of the PNG
    axis.imshow(to_uint8(picture), interpolation="nearest")
    step = height / len(rows)
    axis.set_yticks([step * (i + 0.5) for i in range(len(rows))], labels[:len(rows)], fontsize=9)
    axis.set_xticks([])
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.set_title(title, fontsize=10)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)


def save_film(folder, name, frames, fps=15):
    """Writes frames (T, 3, H, W) as GIF and MP4; returns the paths."""
    frames = to_uint8(frames[..., :frames.shape[-2] // 2 * 2, :frames.shape[-1] // 2 * 2])
    gif, mp4 = Path(folder) / f"{name}.gif", Path(folder) / f"{name}.mp4"
    iio.imwrite(gif, frames, duration=1000 / fps, loop=0)
    iio.imwrite(mp4, frames, fps=fps, codec="libx264", macro_block_size=2)
    return [gif, mp4]


def save_turntable(run, volumes, folder, name="turntable", size=96, frames=48):
    """A film of volumes (n, 4, D, H, W), up to four in a row, turning once -> paths.

    What has been seen from the front only swings by +-20 degrees, moving as the run's poses do.
    """
    azimuths = torch.linspace(0, 2 * math.pi, frames + 1)[:-1]
    if run.posenet is None:
        views = on_white(render_views(run, volumes, azimuths.tolist(), size))  # (n, T, 3, H, W)
    else:
        views = torch.cat([on_white(render_views(
            run, volumes, [math.radians(20) * math.sin(a)], size, pose=t % len(run.poses)))
            for t, a in enumerate(azimuths.tolist())], 1)
    columns = min(4, len(volumes))
    rows = [views[i:i + columns] for i in range(0, len(views) // columns * columns, columns)]
    return save_film(folder, name, torch.stack(
        [tile([row[:, t] for row in rows]) for t in range(frames)]))


def save_training_sheet(path, run, dataset, step, n=8):
    """Truth, render, occupancy, depth, normals, each time of the same n held-out (or any) views."""
    frames = torch.nonzero(dataset.heldout | ~dataset.heldout.any())[:, 0]
    frames = frames[torch.linspace(0, len(frames) - 1, min(n, len(frames))).long()]
    size = dataset.images.shape[1]
    truth, mask = dataset.batch(frames, size)
    with torch.no_grad(), evaluating(run):
        volumes = run.autodecoder(dataset.object_index[frames].to(run.device))
        out = render.render(volumes, cameras_of(run, dataset, frames)[:, None],
                            dataset.intrinsics[frames, None].to(run.device), size, 96)
    out = {key: value.cpu()[:, 0] for key, value in out.items()}              # (n, C, H, W)
    rows = [truth + 1 - mask, on_white(out), 1 - out["occupancy"].expand(-1, 3, -1, -1),
            depth_picture(out), normal_picture(out)]
    rows += [parts_picture(out)] if "parts" in out else []
    kind = "held-out" if dataset.heldout.any() else "training"
    save_sheet(path, rows, ["truth", "render", "occupancy", "depth", "normals", "parts"],
               f"{kind} views after {step} steps")


@torch.no_grad()
def save_orbit(path, run, n=4, columns=8):
    """The first n training objects of a run, from all sides."""
    objects = range(min(n, len(run.names)))
    volumes = run.autodecoder(torch.tensor(list(objects), device=run.device))
    whole = 2 * math.pi if run.posenet is None else math.pi / 2             # front only: +-45
    azimuths = [whole * (i / columns - (run.posenet is not None) * 0.44) for i in range(columns)]
    save_sheet(path, list(on_white(render_views(run, volumes, azimuths, 96))),
               [run.names[k][-16:] for k in objects],
               f"training objects, turned by {360 * whole / 2 / math.pi / columns:.0f} degrees")


def save_latent_histogram(path, latents):
    """The paper's Fig. 9: latents raw, after mean and deviation, after median and IQR."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), constrained_layout=True)
    for axis, mode in zip(axes, ("none", "meanstd", "robust")):
        x = RobustNormalizer(mode).fit(latents).normalize(latents).flatten().cpu()
        limit = 5.0 if mode != "none" else float(x.abs().max())
        axis.hist(x.clamp(-limit, limit).numpy(), bins=120, color="tab:blue")
        axis.set_yscale("log")
        axis.set_title({"none": "raw latents", "meanstd": "(F - mean) / std",
                        "robust": "(F - median) / (0.7413 IQR)"}[mode])
        axis.set_xlabel(f"std {x.std():.2f}, extremes {x.min():.1f} and {x.max():.1f}", fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def save_noise_strip(path, run, n=4, steps=32, seed=0, columns=8):
    """From noise to object: what the denoiser believes along the sampler's path, decoded."""
    shown, sigmas = [], []
    wanted = {round(i * (steps - 1) / (columns - 1)) for i in range(columns)}

    def watch(step, sigma, denoised):
        if step in wanted:
            sigmas.append(float(sigma))
            volumes = decode(run, run.normalizer.denormalize(denoised.float()))
            shown.append(on_white(render_views(run, volumes, [0.6], 80))[:, 0])

    sample_latents(run, latent_noise(run, n, seed), steps, seed=seed, watch=watch)
    strip = torch.stack(shown, 1)                                            # (n, columns, 3, H, W)
    save_sheet(path, list(strip), [f"seed {seed}, {i}" for i in range(n)],
               "denoised estimates at sigma = " + ", ".join(f"{s:.2g}" for s in sigmas))


def save_sample_sheet(folder, run, volumes, training_volumes):
    """Samples from four sides over their nearest training objects; and their depth and normals."""
    nearest, distance = nearest_training(run, volumes, training_volumes)
    azimuths = [0.6, 2.2, 3.7, 5.3] if run.posenet is None else [0.0, -0.35, 0.35, 0.0]
    ours = render_views(run, volumes, azimuths, 96, extras=True)
    theirs = render_views(run, training_volumes[nearest.to(run.device)], azimuths[:1], 96)
    n = min(len(volumes), 8)
    rows, labels = [], []
    for i in range(0, len(volumes) // n * n, n):
        rows += [on_white(ours)[i:i + n, v] for v in (0, 1, 2)] + [on_white(theirs)[i:i + n, 0]]
        labels += ["sample", "turned", "turned", "nearest\ntraining\nobject"]
    paths = [Path(folder) / "samples.png", Path(folder) / "geometry.png"]
    save_sheet(paths[0], rows, labels, f"{len(volumes)} samples; root-mean-square distance to the "
               f"nearest training object {distance.min():.3f} to {distance.max():.3f}")
    view = {key: value[:n, 0] for key, value in ours.items()}
    save_sheet(paths[1], [on_white(view), depth_picture(view), normal_picture(view)],
               ["colour", "depth", "normals"])
    return paths


# ---- Moving subjects ----------------------------------------------------------------------------


def load_driving(run, clip):
    """Poses of a clip (its name in the run's data, or a path) become run.poses, which all figures
    show subjects in -> its frames over white (T, 3, H, W)."""
    s, path = run.data_settings, Path(clip)
    source, name = run.source, clip
    if path.exists():
        source, name = path.parent, path.name if path.is_dir() else path.stem
    clips = load_dataset({**s, "holdout": 0, "objects": name, "clip_filter": False}, source)
    if not clips.moving:
        raise BadInput(f"--drive {clip}: not a clip")
    frames = clips.frames_of(0)
    run.poses = cameras_of(run, clips, frames)
    images, masks = clips.batch(frames, s["size"])
    return images + 1 - masks


@torch.no_grad()
def score_motion(run, dataset, n_samples=32):
    """Learned poses and parts against the true ones, which only puppets have -> dict of numbers.

    part_purity   share of pixels whose learned part is, most often, the part that they truly show
    yaw_correlation, yaw_slope  of true yaw and that of the part that shows torsos most often,
                  medians over the clips
    yaw_share     share of clips in which they correlate by 0.95 or more
    limb_correlation  of the angles of left arm, right arm, left leg, right leg with a linear
                  readout from the pose, as seen from the torso, of the part that shows the limb
                  most often; fitted to training frames, scored on held-out ones
    """
    size, poses, table = dataset.images.shape[1], [], 0
    for k in range(dataset.n_objects):
        frames = dataset.frames_of(k)
        cameras = cameras_of(run, dataset, frames)                            # (V, P, 4, 4)
        volume = run.autodecoder(torch.tensor([k], device=run.device))
        out = render.render(volume, cameras[None], dataset.intrinsics[frames][None].to(run.device),
                            size, n_samples)
        share, seen = out["parts"][0].cpu(), out["occupancy"][0, :, 0].cpu() > 0.5
        true = dataset.truth["parts"][frames].long()                          # (V, S, S), 0: none
        both = seen & (true > 0)
        hits = F.one_hot(share.argmax(1)[both] * 6 + true[both] - 1, 6 * share.shape[1])
        table = table + hits.sum(0).reshape(-1, 6)                            # (P, 6)
        poses.append(cameras.cpu())
    torso, *limbs = table[:, 1:].argmax(0).tolist()
    yaw, slope, true = [], [], dataset.truth["yaw"].split([len(p) for p in poses])
    for there, cameras in zip(true, poses):
        # Where the camera is as the subject sees it: to the left of one who has turned right.
        learned = -torch.atan2(cameras[:, torso, 0, 2], cameras[:, torso, 2, 2])
        yaw.append(correlation(there, learned))
        slope.append(yaw[-1] * float(learned.std() / there.std()))
    test, poses, limb_correlation = dataset.heldout, torch.cat(poses), []
    train = ~test if test.any() else test == 0
    for i, p in enumerate(limbs):
        pose = poses[:, torso] @ torch.linalg.inv(poses[:, p])                # of p, in the torso's
        x = F.pad(pose[:, :3].flatten(1), (0, 1), value=1.0).double()         # (F, 13)
        angle = dataset.truth["angles"][:, i].double()
        fit = torch.linalg.pinv(x[train], rtol=1e-4) @ angle[train]
        limb_correlation.append(round(correlation((x @ fit)[test], angle[test]), 4))
    return {"yaw_correlation": middle(yaw), "yaw_slope": middle(slope),
            "yaw_share": sum(c >= 0.95 for c in yaw) / len(yaw),
            "part_purity": round(float(table.amax(1).sum() / table.sum()), 4),
            "limb_correlation": limb_correlation}


@torch.no_grad()
def score_cameras(run, dataset):
    """Learned cameras of rigid objects against the true ones -> dict of numbers.

    rotation_error   degrees, median over all frames, after one rotation of the world for all and
                     one scale of all azimuths (under so long a lens both are anybody's guess)
    azimuth_scale    that scale: true over learned
    mirrored         share of objects that turn the wrong way, their depth reversed
    """
    frames = torch.arange(len(dataset.heldout))
    R, true = cameras_of(run, dataset, frames)[:, 0, :3, :3].cpu(), dataset.cam2world[:, :3, :3]
    U, _, Vh = torch.linalg.svd(torch.einsum("nij,nkj->ik", true, R))
    turn = U @ torch.diag(torch.tensor([1.0, 1, torch.det(U @ Vh)])) @ Vh     # Procrustes
    R = turn @ R
    a, b = (torch.atan2(x[:, 0, 2], x[:, 2, 2]) for x in (R, true))           # azimuths
    # The scale of least absolute error, a weighted median: mirrored objects must not move it.
    ratio, order = (b / a).sort()
    weight = a[order].abs().cumsum(0)
    scale = float(ratio[torch.searchsorted(weight, weight[-1] / 2)])
    wrong = [correlation(a[f], b[f]) < 0 for f in map(dataset.frames_of, range(dataset.n_objects))]
    zero = torch.zeros_like(a)
    R = render.orbit((scale - 1) * a, zero, 1.0)[:, :3, :3] @ R
    cosine = (torch.einsum("nij,nij->n", R, true) - 1) / 2
    error = torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))
    return {"rotation_error": middle(error.tolist()), "azimuth_scale": round(scale, 4),
            "mirrored": sum(wrong) / len(wrong)}


def correlation(a, b):
    """Pearson's, of two (n,); 0 where one is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-9))


def middle(values):
    return round(float(torch.tensor(values).median()), 4)


def save_motion(run, folder, volume, driving=None, size=96, columns=8):
    """One subject (1, C, D, H, W) in the run's poses: sheet, novel views, film -> paths.

    driving (T, 3, H, W): the frames that the poses come from, shown beside it
    """
    folder, T = Path(folder), len(run.poses)
    shown = [t * (T - 1) // (columns - 1) for t in range(columns)]
    outs = [render_views(run, volume, [0.0], size, extras=True, pose=t) for t in shown]
    out = {key: torch.cat([o[key][0] for o in outs]) for key in outs[0]}      # (columns, C, H, W)
    looks = [(on_white, "colour"), (depth_picture, "depth"), (normal_picture, "normals")]
    looks += [(parts_picture, "parts")]
    rows, labels = [look(out) for look, _ in looks], [name for _, name in looks]
    if driving is not None:
        big = F.interpolate(driving, size=(size, size), mode="nearest")
        rows, labels = [big[shown]] + rows, ["driving"] + labels
    save_sheet(folder / "motion.png", rows, labels)
    turns = [math.radians(a) for a in (-20, -10, 0, 10, 20)]
    out = {key: value[0] for key, value in render_views(
        run, volume, turns, size, extras=True, pose=T // 2).items()}
    save_sheet(folder / "views.png", [look(out) for look, _ in looks],
               [name for _, name in looks], "seen from -20, -10, 0, 10, 20 degrees")
    film = torch.cat([on_white(render_views(run, volume, [0.0], size, pose=t))[0]
                      for t in range(T)])                                     # (T, 3, H, W)
    if driving is not None:
        film = torch.cat([big, film], -1)
    return [folder / "motion.png", folder / "views.png"] + save_film(folder, "motion", film)


# ---- Meshes -------------------------------------------------------------------------------------


def find_marching_cubes():
    """scikit-image's function, or a line that says what to install."""
    try:
        from skimage.measure import marching_cubes
    except ImportError:
        raise BadInput("--mesh needs scikit-image: pip install scikit-image") from None
    return marching_cubes


def save_mesh(path, volume):
    """A coloured triangle mesh (PLY) of one volume (4, D, H, W), by marching cubes.

    The surface is put where one voxel stops half of the light. Needs scikit-image.
    """
    marching_cubes = find_marching_cubes()
    volume = volume[:4].cpu()                              # without skinning
    side = volume.shape[-1]
    density = F.pad(volume[0], (1,) * 6).numpy()           # padded: the surface is always closed
    level = math.log(2) * side / 2
    if density.max() <= level:
        raise BadInput(f"{path}: this sample is empty, no mesh written; try another --seed")
    index, faces, _, _ = marching_cubes(density, level)
    zyx = (torch.from_numpy(index.copy()) - 1 + 0.5) * 2 / side - 1           # voxel centres
    xyz = zyx.flip(-1).float()
    # Near a surface the colour of empty voxels mixes in: weigh colours by density.
    weighted = torch.cat([volume[:1], volume[:1] * volume[1:]])[None]
    colour = render.sample_volume(weighted, xyz[None])[0]                     # (n, 4)
    colour = (colour[:, 1:] / colour[:, :1].clamp(min=1e-6)).clamp(0, 1)
    lines = ["ply", "format ascii 1.0", f"element vertex {len(xyz)}", "property float x",
             "property float y", "property float z", "property uchar red", "property uchar green",
             "property uchar blue", f"element face {len(faces)}",
             "property list uchar int vertex_indices", "end_header"]
    rgb = (colour * 255).round().int()
    lines += [f"{x:.5f} {y:.5f} {z:.5f} {r} {g} {b}"
              for (x, y, z), (r, g, b) in zip(xyz.tolist(), rgb.tolist())]
    lines += [f"3 {a} {b} {c}" for a, b, c in faces.tolist()]
    Path(path).write_text("\n".join(lines) + "\n")


# ---- Command line -------------------------------------------------------------------------------


def save_samples(run, folder, n, steps, seed, churn, direct="", prompt=None, guidance=3.0):
    """Draws n objects and writes sheet, geometry, turntable (GIF, MP4) -> volumes, paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if direct:
        latents = direct_latents(run, n, seed, direct)
    else:
        latents = sample_latents(run, latent_noise(run, n, seed), steps, churn, seed,
                                 prompts=None if prompt is None else [prompt] * n,
                                 guidance=guidance)
    volumes = decode(run, latents)
    paths = save_sample_sheet(folder, run, volumes, decode(run, training_latents(run)))
    return volumes, paths + save_turntable(run, volumes, folder)


def save_interpolation(run, folder, seeds, steps, prompt=None, guidance=3.0, size=96, frames=36):
    """A film between the objects of two seeds, along the arc between their noises -> paths."""
    a, b = (latent_noise(run, 1, seed).double() for seed in seeds)
    angle = torch.acos((F.normalize(a.flatten(), dim=0) @ F.normalize(b.flatten(), dim=0)))
    share = torch.linspace(0, 1, frames, dtype=torch.float64)[:, None, None, None, None]
    # On the arc, not on the chord: noise half-way along a straight line would be too short.
    noise = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
    volumes = decode(run, sample_latents(                                 # no churn: a smooth map
        run, noise.float(), steps, guidance=guidance,
        prompts=None if prompt is None else [prompt] * frames))
    pictures = on_white(render_views(run, volumes, [0.6], size))[:, 0]
    paths = save_film(folder, "interpolation", torch.cat([pictures, pictures.flip(0)]))
    sheet = Path(folder) / "interpolation.png"
    save_sheet(sheet, [pictures[::frames // 8]], [f"seed {seeds[0]} to {seeds[1]}"])
    return [sheet] + paths


def evaluate_run(run, args, steps, churn, guidance):
    """--evaluate: prints all scores, and adds them to the run's metrics.json."""
    needed = 2048 if args.inception else FEATURES
    if args.n < 2 or args.n * args.views <= needed:
        raise BadInput(f"--evaluate: {args.n} samples x {args.views} views are too few for the "
                       f"covariance of {needed} features: --n {max(2, needed // 10 + 1)} "
                       "--views 10 is the least, --n 256 is usual")
    lpips = load_lpips(*args.lpips) if args.lpips else None
    features = load_inception(args.inception) if args.inception else image_features
    began, s = time.time(), run.settings
    dataset = load_dataset(run.data_settings, run.source)
    if dataset.names != run.names:
        raise BadInput(f"--evaluate: {run.source} no longer holds the objects of {args.run}")
    voxel = load_run(args.voxel, run.device) if args.voxel else None
    if voxel and (voxel.settings["space"], voxel.names) != ("volume", run.names):
        raise BadInput(f"--voxel {args.voxel}: not a run of the same objects with --space volume")
    scores = score_heldout(run, dataset, lpips)
    scores |= evaluate(run, dataset, args.n, args.views, steps, churn, args.seed,
                       baselines=args.baselines, voxel=voxel, features=features)
    scores["features"] = "inception" if args.inception else "random"
    if run.encode and run.source == "synthetic":
        scores |= score_text(run, reader_of(args.run, run.data_settings), min(args.n, 128), steps,
                             churn, guidance, args.seed)
    folder = Path(args.out or args.run)
    folder.mkdir(parents=True, exist_ok=True)
    s = s | {"sample_steps": steps, "churn": churn, "guidance": guidance}
    scores["seconds_evaluation"] = round(time.time() - began, 1)
    add_metrics(folder, s, OF_SAMPLES, **scores)
    print_scores(scores)
    print(f"wrote {folder / 'metrics.json'}")


COMPARED = ("psnr_heldout", "mask_heldout", "fd", "kd", "cov", "mmd", "nna", "memorization",
            "text_colour", "text_parts", "text_diversity", "seconds_stage1", "seconds_stage2",
            "seconds_per_sample")


def compare_runs(folders, path):
    """--compare: a row for each kind of run, medians (least to greatest) over its seeds; and its
    Frechet distance over the time that a sample takes, as in the paper's Fig. 3."""
    runs = []
    for folder in folders:
        try:
            runs.append(json.loads((Path(folder) / "metrics.json").read_text()))
            runs[-1]["settings"] |= {key: runs[-1].get(key) for key in ("samples", "views")}
        except (OSError, ValueError, KeyError, TypeError):
            raise BadInput(f"--compare {folder}: no metrics.json that training or --evaluate "
                           "wrote") from None
    # How many samples were scored is part of a kind, too: distances are biased by their number.
    differ = [name for name in runs[0]["settings"]
              if name not in ("seed", "log_every", "save_every")
              and len({str(run["settings"].get(name)) for run in runs}) > 1]

    def title(run, names):
        return ", ".join(f"{n} {str(run['settings'].get(n))[:20]}" for n in names) or "all alike"
    kinds, curves = {}, {}                                # a curve: all numbers of sampler steps
    for run in runs:
        kinds.setdefault(title(run, differ), []).append(run)
    shown = [name for name in COMPARED if any(name in run for run in runs)]
    table = [["", "runs"] + shown]
    for kind, group in kinds.items():
        table.append([kind, str(len(group))])
        found = dict.fromkeys(("fd", "seconds_per_sample"), [math.nan] * 3)
        for name in shown:
            values = sorted(run[name] for run in group if name in run)
            if values:
                found[name] = values[len(values) // 2], values[0], values[-1]
            table[-1].append("{:.4g} ({:.4g}, {:.4g})".format(*found[name]) if values else "-")
        (seconds, *_), (fd, low, high) = found["seconds_per_sample"], found["fd"]
        if math.isnan(seconds + fd):
            continue                                      # stage 1 alone has no such point
        curves.setdefault(title(group[0], [n for n in differ if n != "sample_steps"]), []).append(
            (seconds, fd, fd - low, high - fd))
    widths = [max(map(len, column)) + 2 for column in zip(*table)]
    for row in table:
        print(row[0].ljust(widths[0]) + "".join(map(str.rjust, row[1:], widths[1:])))
    if not curves:
        return
    figure, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
    for label, points in curves.items():
        x, y, *spread = zip(*sorted(points))
        axis.errorbar(x, y, spread, fmt="o-", capsize=3, label=label)
    axis.set(xlabel="seconds per sample", ylabel="Frechet distance: median, least, greatest",
             xscale="log", yscale="log")
    for side in (axis.xaxis, axis.yaxis):                 # 0.02 0.05 0.1, not 2 x 10^-2
        side.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        side.set_major_formatter("{x:g}")
        side.set_minor_formatter("")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"wrote {path}")


def choose_device(name):
    """"auto" -> a GPU where there is one; anything torch does not know is bad input."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise BadInput(f"--device {name} is not available here; try --device cpu") from None
    return name


def parse(arguments=None):
    """Command line -> args; flags that do not go together are bad input."""
    parser = data.Parser(description="Generate objects with a trained run.")
    add = parser.add_argument
    add("--run", default="runs/tiny-synthetic", help="folder that train.py wrote (%(default)s)")
    add("--n", type=int, default=8, help="how many objects (%(default)s)")
    add("--steps", type=int, default=0, help="sampler steps (default: the run's sample_steps)")
    add("--seed", type=int, default=0, help="object i depends on seed and i alone (%(default)s)")
    add("--churn", type=float, default=None, help="S_churn, 0 for a deterministic sampler "
        "(default: the run's)")
    add("--direct", choices=["normal", "fitted"], default="", help="baseline: no diffusion, draw "
        "the embedding from N(0, I) or from a Gaussian fitted to the trained ones")
    add("--prompt", help="what to make, where stage 2 was trained with --text")
    add("--guidance", type=float, default=None, help="how strongly the prompt is followed; 1: as "
        "learned, 0: not at all (default: the run's)")
    add("--interpolate", type=int, nargs=2, metavar="SEED", help="a film between two seeds")
    add("--drive", metavar="CLIP", help="moving subjects: in the poses of this clip, a name in the "
        "run's data or a path")
    add("--identity", type=int, metavar="K", help="training object K, not a new one")
    add("--evaluate", action="store_true", help="score --n samples (256 are usual) and baselines"
        " against the run's data: a table, and metrics.json")
    add("--views", type=int, default=10, help="renders of each sample for --evaluate (%(default)s)")
    add("--baselines", action=data.argparse.BooleanOptionalAction, default=True, help="for "
        "--evaluate: score direct sampling and the training objects, too")
    add("--voxel", metavar="RUN", help="for --evaluate: another run, of --space volume, to compare")
    add("--inception", metavar="FILE", help=f"for --evaluate: {INCEPTION_FILE}, for published FID "
        "and KID (needs torch-fidelity)")
    add("--lpips", nargs=2, metavar=("VGG16", "LINEAR"), help=f"for --evaluate: {VGG16_FILE} of "
        f"torchvision and {LPIPS_FILE} of lpips v0.1")
    add("--compare", nargs="+", metavar="RUN", help="scores of these runs side by side, seeds of "
        "one kind put together, and compare.png in --out")
    add("--mesh", action="store_true", help="also write coloured meshes, .ply (scikit-image)")
    add("--out", default="", help="folder for the results (default: RUN/samples; of --evaluate "
        "RUN, of --compare the current one)")
    add("--device", default="auto", help="cpu, cuda, ... (%(default)s)")
    args = parser.parse_args(arguments)
    if args.n < 1 or args.steps < 0:
        raise BadInput("--n and --steps must be at least 1")
    if not (0 <= (args.churn or 0) < math.inf and math.isfinite(args.guidance or 0)):
        raise BadInput("--churn must be 0 or more, and both it and --guidance finite")
    first_only = args.direct or args.identity is not None
    if args.interpolate and (first_only or args.interpolate[0] == args.interpolate[1]):
        raise BadInput("--interpolate is between the noises of two seeds; it does not go with "
                       "--direct or --identity")
    if args.prompt is not None and first_only:
        raise BadInput("--prompt is for what diffusion makes, not --direct or --identity")
    if args.evaluate and (first_only or args.prompt is not None):
        raise BadInput("--evaluate scores all kinds of samples: leave --direct, --identity and "
                       "--prompt out")
    if args.mesh:
        find_marching_cubes()                            # before the work, not after it
    return args


def main(arguments=None):
    """Reads the flags, draws the objects, names what was written."""
    args = parse(arguments)
    if args.compare:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        return compare_runs(args.compare, Path(args.out) / "compare.png")
    first_only = args.direct or args.identity is not None
    run = load_run(args.run, choose_device(args.device), (1,) if first_only else (1, 2))
    if args.prompt is not None:
        check_prompt(run, args.prompt)
    steps = args.steps or run.settings["sample_steps"]
    guidance = run.settings["guidance"] if args.guidance is None else args.guidance
    churn = run.settings["churn"] if args.churn is None else args.churn
    if args.evaluate:
        return evaluate_run(run, args, steps, churn, guidance)
    folder = Path(args.out or Path(args.run) / ("samples" + "-direct" * bool(args.direct)))
    if args.drive and run.posenet is None:
        raise BadInput(f"--drive: the objects of {args.run} do not move")
    driving = load_driving(run, args.drive) if args.drive else None
    if args.identity is None:
        volumes, paths = save_samples(run, folder, args.n, steps, args.seed, churn, args.direct,
                                      args.prompt, guidance)
    else:
        if not 0 <= args.identity < len(run.names):
            raise BadInput(f"--identity {args.identity}: the run has 0 to {len(run.names) - 1}")
        folder.mkdir(parents=True, exist_ok=True)
        volumes = run.autodecoder(torch.tensor([args.identity], device=run.device))
        paths = save_turntable(run, volumes, folder)
    if run.posenet is not None:
        paths += save_motion(run, folder, volumes[:1], driving)
    if args.interpolate:
        paths += save_interpolation(run, folder, args.interpolate, steps, args.prompt, guidance)
    if args.mesh:
        for i, volume in enumerate(volumes):
            paths.append(folder / f"sample{i}.ply")
            save_mesh(paths[-1], volume)
    print("wrote " + ", ".join(str(p) for p in paths))


if __name__ == "__main__":
    data.run_cli(main)
