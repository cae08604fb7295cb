"""A trained run goes in; numbers come out that say how good its objects are.

    python tests/evaluate.py --run RUN              256 samples x 10 views, and baselines: a table
    python tests/evaluate.py --run RUN --steps 8 --out FOLDER       the same with 8 sampler steps
    python tests/evaluate.py --compare RUN RUN ...  runs side by side, and compare.png

Paper: Sec. 4 and App. D. What is asked, and by which section below:
  are held-out views met?               Pictures: PSNR, SSIM, LPIPS
  do samples look like the data?        Two sets: Frechet and kernel distance (FID, KID)
  do they have the data's shapes?       Shapes: COV, MMD, 1-NNA (Eq. 3 to 5); memorization
  is what a caption asks for there?     Text
  are learned poses and cameras true?   What moves; Cameras
A run without stage 2 is asked the first and the last question only.

Shapes: N training objects, n samples, V views, K points of a cloud, H = W side of a picture.
Simplified: unless a file of Inception's weights is given, Frechet and kernel distance are on a
fixed random network: good for comparing runs with one another, and with no published number.
Read next: claims.py, which asks whether the paper is right.
"""
import copy
import json
import math
import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__":               # Ctrl-C while torch is imported: an end, no traceback
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import render  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from autodecoder import RandomFeatures, VGGFeatures  # noqa: E402
from data import BadInput  # noqa: E402
from diffusion import words  # noqa: E402

matplotlib.use("Agg")                        # draw into files: no screen is needed
import matplotlib.pyplot as plt  # noqa: E402

# ---- Pictures: SSIM and LPIPS --------------------------------------------------------------------
def ssim(a, b):
    """Structural similarity of pictures (n, 3, H, W) in [0, 1] -> (n,), 1 where they are equal.

    Wang et al. 2004: means m, variances v and the covariance within a Gaussian window, and of them
    (2 m_a m_b + c1) (2 cov + c2) / ((m_a^2 + m_b^2 + c1) (v_a + v_b + c2)), the mean of it over all
    places and channels. The window is 11 wide, of deviation 1.5, and stays within the picture.
    """
    offset = torch.arange(-5.0, 6.0, device=a.device)
    bell = (-(offset / 1.5) ** 2 / 2).exp()
    window = bell[:, None] * bell / bell.sum() ** 2                           # (11, 11), sum 1
    channels = a.shape[1]
    window = window.expand(channels, 1, 11, 11)

    def mean(x):
        return F.conv2d(x, window, groups=channels)                           # each channel alone

    mean_a, mean_b = mean(a), mean(b)
    variance_a = mean(a * a) - mean_a**2
    variance_b = mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2                # against 0 / 0 where pictures are black, or flat
    alike = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    most = (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return (alike / most).mean((1, 2, 3))


VGG16_FILE = "vgg16-397923af.pth"            # torchvision's, by its public name
VGG16_PLAN = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
VGG16_WIDTHS = (64, 128, 256, 512, 512)      # of its five stages, each up to a "M"ax pooling
LPIPS_FILE = "vgg.pth"                       # the linear layers of lpips v0.1, by their public name


class LPIPS(nn.Module):
    """Learned perceptual distance of pictures (n, 3, H, W) in [0, 1] -> (n,); 0 where equal.

    Zhang et al. 2018: sum over the stages of VGG-16 of the mean over places of w . (a - b)^2, where
    a and b are the maps' vectors at unit length and w >= 0 was learned from what people call alike.
    vgg16, linear: dicts of weights; ValueError where they are not what they should be
    """

    def __init__(self, vgg16, linear):
        super().__init__()
        # The last map of each stage: relu1_2, 2_2, 3_3, 4_3, 5_3.
        self.vgg = VGGFeatures(vgg16, VGG16_PLAN, tap=-1).eval().requires_grad_(False)
        self.weights = []
        for stage, width in enumerate(VGG16_WIDTHS):
            name = f"lin{stage}.model.1.weight"
            if name not in linear or linear[name].shape != (1, width, 1, 1):
                raise ValueError(f"not the layers of LPIPS: {name} should be (1, {width}, 1, 1)")
            self.weights.append(linear[name])

    def forward(self, a, b):
        total = 0
        for map_a, map_b, weight in zip(self.vgg(a), self.vgg(b), self.weights):
            unit_a = F.normalize(map_a, eps=1e-10)                            # over the channels
            unit_b = F.normalize(map_b, eps=1e-10)
            apart = (weight * (unit_a - unit_b) ** 2).sum(1)                  # (n, h, w)
            total = total + apart.mean((1, 2))
        return total


def load_lpips(vgg16, linear):
    """LPIPS from its two files."""
    vgg16_weights = sample.load_weights("--lpips", vgg16, VGG16_FILE)
    linear_weights = sample.load_weights("--lpips", linear, LPIPS_FILE)
    try:
        return LPIPS(vgg16_weights, linear_weights)
    except ValueError as error:
        raise BadInput(f"--lpips {vgg16} {linear}: {error}; expected torchvision's {VGG16_FILE} "
                       f"and, of lpips v0.1, {LPIPS_FILE}") from None


@torch.no_grad()
def score_views(trained, dataset, lpips=None, n_samples=96, chunk=8):
    """Means over held-out views -> dict psnr_heldout, dB, ssim_heldout and mask_heldout, what
    Eq. 2 measures; lpips: an LPIPS, for lpips_heldout. Empty where no view is held out."""
    if not dataset.heldout.any():
        return {}
    scores = sample.score_heldout(trained, dataset)
    values = {"ssim": [], "lpips": []}
    for frames in sample.frames_to_score(dataset).split(chunk):
        ours, _ = sample.render_frames(trained, dataset, frames, n_samples)   # (n, 3, H, W)
        true, _ = dataset.batch(frames, dataset.images.shape[1])
        values["ssim"].append(ssim(ours, true))
        if lpips is not None:
            values["lpips"].append(lpips(ours, true))
    for name, found in values.items():
        if found:
            scores[f"{name}_heldout"] = round(float(torch.cat(found).mean()), 4)
    return scores


# ---- Two sets of pictures: Frechet and kernel distance (Sec. 4.1) --------------------------------
N_FEATURES = 240                             # of a picture, see image_features
INCEPTION_FEATURES = 2048
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"     # torch-fidelity's, by public name


@torch.no_grad()
def image_features(images, chunk=256):
    """Features of pictures (n, 3, H, W) in [0, 1] -> (n, 240): means of a random network's maps.

    OURS: Inception cannot be had without a download. Distances are comparable among themselves,
    for pictures of the same size, and with no published FID. Why they mean something all the same:
    see autodecoder.RandomFeatures.
    """
    network = RandomFeatures()
    features = []
    for part in images.split(chunk):
        means = [maps.mean((2, 3)) for maps in network(part)]
        features.append(torch.cat(means, 1))
    return torch.cat(features)


def load_inception(path):
    """The features of published FID and KID: pictures (n, 3, H, W) in [0, 1] -> (n, 2048).

    Needs torch-fidelity, whose Inception gives the same numbers as the first one, of 2015.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise BadInput("--inception needs torch-fidelity: pip install torch-fidelity") from None
    # Its own loader would run what a file says: first make sure that there are only numbers in it.
    sample.load_weights("--inception", path, INCEPTION_FILE)
    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"], str(path))
    except (RuntimeError, TypeError):
        raise BadInput(f"--inception {path}: not Inception's weights; expected "
                       f"{INCEPTION_FILE}") from None

    def features(images):
        found = []
        for part in images.split(64):
            pixels = (part * 255).round().byte()
            found.append(network(pixels)[0])
        return torch.cat(found)

    return features


def check_features(a, b):
    """Refuses what is no two sets of features, (n, d) and (m, d), of two pictures or more each."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features must be (n, d) and (m, d) with n, m >= 2, got "
                         f"{tuple(a.shape)} and {tuple(b.shape)}")


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of features a (n, d), b (m, d), n, m >= 2.

    A, B are covariances: both sets are taken for Gaussians. The trace of (A B)^(1/2) is the sum of
    the square roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric: no complex
    numbers, no general matrix root.
    """
    check_features(a, b)
    a, b = a.double(), b.double()
    A = torch.atleast_2d(torch.cov(a.T))                                      # (d, d)
    B = torch.atleast_2d(torch.cov(b.T))
    values, vectors = torch.linalg.eigh(A)
    # Rounding makes eigenvalues that are 0 slightly negative.
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                   # A^(1/2)
    values = torch.linalg.eigvalsh(root @ B @ root)
    cross = values.clamp(min=0).sqrt().sum()                                  # tr (A B)^(1/2)
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float(means + A.trace() + B.trace() - 2 * cross)


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
        pairs = len(x) * (len(x) - 1)
        return (k.sum() - k.trace()) / pairs

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def true_features(dataset, features=image_features):
    """Features of all training views of a dataset -> (F, 240).

    OURS: of all of them; the paper takes ten of each object.
    """
    frames = torch.nonzero(~dataset.heldout)[:, 0]
    images, _ = dataset.batch(frames, dataset.images.shape[1])
    return features(images)


def others_of(trained):
    """As many built-in objects as a run has learned from, but others -> dataset; None
    where the data are no built-in objects, or chosen ones."""
    settings = trained.data_settings
    if trained.source != "synthetic" or settings.objects:
        return None
    first = settings.n_objects
    names = ",".join(f"{k:04d}" for k in range(first, 2 * first))
    return data.load("synthetic", settings.size, settings.holdout, settings.seed, 2 * first,
                     settings.n_views, arc=settings.arc, objects=names)


def render_from(trained, volumes, cameras, intrinsics, size, n_samples):
    """Colour of volumes (B, C, D, H, W) over black, from cameras as sample.cameras_of gives them:
    (B, V, 4, 4), or (B, V, P, 4, 4) of what moves -> (B, V, 3, size, size), on the CPU."""
    draw = render.render_skipping if trained.posenet is None else render.render_moving
    rgb, _ = draw(volumes, cameras.to(volumes), intrinsics.to(volumes), size, n_samples)
    return rgb.cpu()


@torch.no_grad()
def rendered_features(trained, volumes, dataset, views, seed=0, features=image_features):
    """Features of volumes (n, C, D, H, W), each seen from `views` cameras drawn from the training
    frames, at the data's size -> (n views, 240 or as many as features gives)."""
    generator = torch.Generator().manual_seed(seed)
    size = dataset.images.shape[1]
    train_frames = torch.nonzero(~dataset.heldout)[:, 0]
    found = []
    for part in volumes.split(2):            # two at a time are faster than eight: less memory
        drawn = torch.randint(len(train_frames), (len(part), views), generator=generator)
        frames = train_frames[drawn]                                          # (2, V)
        cameras = sample.cameras_of(trained, dataset, frames.flatten())
        cameras = cameras.unflatten(0, frames.shape)                          # (2, V, ..., 4, 4)
        rgb = render_from(trained, part, cameras, dataset.intrinsics[frames], size, 48)
        found.append(features(rgb.flatten(0, 1)))
    return torch.cat(found)


# ---- Shapes (App. D, Eq. 3 to 5) -----------------------------------------------------------------
def inside(part, points):
    """Which of the points (K, 3) are inside a primitive or on it: (K,) bool."""
    return (sums_of_sides(part, points) <= 1).all(1)


def sums_of_sides(part, points):
    """What each side of a primitive bounds by 1: points (K, 3) -> (K, sides)."""
    squares = part.to_unit(points) ** 2
    return squares @ part.sides.T if isinstance(part, data.Round) else squares


def sample_surface(parts, n, rng):
    """(n, 3) points, uniform on the outside of the union of a built-in object's primitives.

    A line through two random points of a sphere enters what is in the sphere in proportion to its
    area (Crofton), so rays are all it takes: as many per area for every part's own sphere.
    """
    radius = np.array([part.half.norm() for part in parts])
    share = radius**2 / sum(radius**2)                   # of the area of all the spheres
    found = torch.zeros(0, 3)
    while len(found) < n:
        for part, r, rays in zip(parts, radius, rng.multinomial(4 * n, share)):
            ends = torch.from_numpy(rng.normal(size=(2, rays, 3))).float()
            start, end = r * F.normalize(ends, dim=-1)                        # (rays, 3) each
            t = part.hit(part.centre + start, end - start)                    # inf: missed
            points = part.centre + start + t[:, None] * (end - start)
            points = points[t.isfinite()]
            # A hair outside: where two parts touch, neither face is on the outside of the union.
            outside = points + 1e-4 * part.normal_at(points)
            buried = [inside(other, outside) for other in parts]
            found = torch.cat([found, points[~torch.stack(buried).any(0)]])
    chosen = rng.permutation(len(found))[:n]
    return found[torch.from_numpy(chosen)]


def true_surface(dataset, k, n, seed=0):
    """(n, 3) points, uniform on the true outer surface of object k of a built-in dataset."""
    if dataset.shapes is None:
        raise ValueError("true_surface: only built-in objects have a known surface")
    return sample_surface(dataset.shapes[k], n, np.random.default_rng([seed, k]))


@torch.no_grad()
def surface_points(volume, n, seed=0):
    """n points (n, 3), uniform on the surface of a volume (4, D, H, W), where a voxel stops half of
    the light: exp(-density 2 / D) = 1/2; (0, 3) for an empty volume.

    Lines again, between two random points of the sphere around the cube: each place where one
    enters the surface is a point. OURS: the paper takes its points from meshes of marching cubes;
    so no mesh is needed.
    """
    generator = torch.Generator().manual_seed(seed)
    volume = volume.cpu()
    thickness = math.log(2)
    level = thickness * volume.shape[-1] / 2
    nothing = torch.zeros(0, 3)
    found = nothing
    if volume[0].max() <= level:
        return nothing
    full = render.not_empty(volume[None, :1], thickness)[0]  # elsewhere density is below the level
    # The longest line is sqrt(3) D voxels: its samples are less than 0.6 voxels apart.
    t = torch.linspace(0, 1, 3 * volume.shape[-1])
    for _ in range(20):                      # a speck is met by few lines: some day, stop trying
        ends = F.normalize(torch.randn(2, 2 * n, 3, generator=generator), dim=-1) * 3**0.5
        start, way = ends[0], ends[1] - ends[0]                               # (2n, 3)
        seen = render.look_into(full, start, way, t)                          # (2n, samples)
        # And the sample before each, which is outside where a line enters.
        seen[:, :-1] |= seen[:, 1:].clone()
        line, place = seen.nonzero().T
        points = start[line] + t[place, None] * way[line]
        density = torch.zeros(seen.shape)
        density[seen] = render.sample_volume(volume[None, :1], points[None])[0, :, 0]
        enters = (density[:, :-1] < level) & (density[:, 1:] >= level)
        i, j = enters.nonzero().T
        low, high = density[i, j], density[i, j + 1]
        share = (level - low) / (high - low)             # of the way: density is linear between
        at = torch.lerp(t[j], t[j + 1], share)
        found = torch.cat([found, start[i] + at[:, None] * way[i]])
        if len(found) >= n:
            chosen = torch.randperm(len(found), generator=generator)[:n]
            return found[chosen]
    return nothing


def debris(volume):
    """Share of a volume's solid voxels, which stop half of the light, that are not in its largest
    piece: (4, D, H, W) -> 0 (one piece) to 1; nan for an empty volume.

    All voxels of a piece come to have one number, the largest of theirs: over and over, each takes
    the largest of the 26 around it.
    """
    density = volume[0].cpu()
    solid = density * (2 / density.shape[-1]) > math.log(2)
    if not solid.any():
        return math.nan
    numbers = torch.arange(1, solid.numel() + 1).view(solid.shape) * solid
    while True:
        spread = render.largest_around(numbers[None])[0] * solid
        if torch.equal(spread, numbers):
            break
        numbers = spread
    _, sizes = numbers[solid].unique(return_counts=True)
    return 1 - float(sizes.max() / sizes.sum())


def clouds(dataset, volumes, n=2048):
    """Points on the true surfaces of all objects, or where nobody knows them on those of decoded
    training objects, volumes (N, C, D, H, W) -> (N, n, 3), empty volumes left out."""
    if dataset.shapes:
        return torch.stack([true_surface(dataset, k, n) for k in range(dataset.n_objects)])
    found = [surface_points(volume, n, seed=1) for volume in volumes]
    found = [points for points in found if len(points)]
    return torch.stack(found) if found else torch.zeros(0, n, 3)


def chamfer_distances(a, b):
    """Chamfer distances of all pairs of clouds a (n, K, 3), b (m, K, 3) -> (n, m).

    Eq. 3: mean over x of min over y of |x - y|^2, plus the same the other way round
    """
    # (x, 1, |x|^2) . (-2 y, |y|^2, 1) = |x - y|^2, as one matrix product.
    a = torch.cat([a, torch.ones_like(a[..., :1]), a.square().sum(-1, keepdim=True)], -1)
    b = torch.cat([-2 * b, b.square().sum(-1, keepdim=True), torch.ones_like(b[..., :1])], -1)
    distances = torch.empty(len(a), len(b))
    for i, cloud in enumerate(a):
        for j, other in enumerate(b.mT.contiguous()):                         # (5, K)
            to_other, to_cloud = [], []
            for points in cloud.split(256):              # so few that the processor's cache holds
                square = points @ other                                       # them: (256, K)
                to_other.append(square.amin(1))
                to_cloud.append(square.amin(0))
            to_other = torch.cat(to_other)                                    # (K,)
            to_cloud = torch.stack(to_cloud).amin(0)                          # (K,)
            distances[i, j] = to_other.clamp(min=0).mean() + to_cloud.clamp(min=0).mean()
    return distances


def nearest_clouds(a, b, same=False, coarse=256, keep=8):
    """Chamfer distances (n, m) of clouds a (n, K, 3), b (m, K, 3), but infinity for pairs that are
    not near; same: a is b, and nobody is his own neighbour.

    OURS: only nearest ones are asked for. Their first 256 points tell which come near, and of each
    row and column the 8 nearest are then measured in full: several times as fast, with the same
    neighbours.
    """
    near = torch.full((len(a), len(b)), torch.inf)
    if near.numel() == 0:
        return near
    for i in range(len(a)):
        first = i + 1 if same else 0                      # of each pair once
        near[i, first:] = chamfer_distances(a[i:i + 1, :coarse], b[first:, :coarse])[0]
    if same:
        near = torch.minimum(near, near.T)
    keep = min(keep, len(a), len(b))
    row_limit = near.kthvalue(keep, 1, keepdim=True)[0]                       # (n, 1)
    column_limit = near.kthvalue(keep, 0, keepdim=True)[0]                    # (1, m)
    wanted = (near <= torch.maximum(row_limit, column_limit)) & near.isfinite()
    if same:
        wanted = wanted.triu()
    distances = torch.full_like(near, torch.inf)
    for i, row in enumerate(wanted):
        j = row.nonzero()[:, 0]
        distances[i, j] = chamfer_distances(a[i:i + 1], b[j])[0]
    return torch.minimum(distances, distances.T) if same else distances


def check_clouds(name, clouds):
    """Refuses what is no set of at least two clouds, (n, K, 3)."""
    if clouds.ndim != 3 or clouds.shape[2] != 3 or len(clouds) < 2:
        raise ValueError(f"{name} must be (n, K, 3) with n >= 2, got {tuple(clouds.shape)}")


def shape_metrics(generated, reference, reference_apart=None):
    """COV, MMD and 1-NNA of clouds (n, 2048, 3) against (m, 2048, 3) -> dict cov, mmd, nna.

    reference_apart: nearest_clouds(reference, reference, same=True), where the caller has it

    cov  share of reference shapes that are the nearest one of some generated shape (Eq. 4)
    mmd  mean over reference shapes of the distance to the nearest generated one (Eq. 5)
    nna  share of all shapes whose nearest neighbour is of their own kind; 1 means that the two
         sets can be told apart (Lopez-Paz & Oquab 2017). Ideal, of sets from one distribution:
         (n (n - 1) + m (m - 1)) / ((n + m) (n + m - 1)), 0.5 if n = m, 0.55 for 256 and 128
    TRAP: more generated shapes make a better cov and mmd: compare equal n only.
    """
    check_clouds("generated", generated)
    check_clouds("reference", reference)
    across = nearest_clouds(generated, reference)                             # (n, m)
    generated_apart = nearest_clouds(generated, generated, same=True)         # (n, n)
    if reference_apart is None:
        reference_apart = nearest_clouds(reference, reference, same=True)     # (m, m)
    covered = across.argmin(1).unique()
    own_kind = (generated_apart.amin(1) < across.amin(1)).sum()
    own_kind += (reference_apart.amin(1) < across.amin(0)).sum()
    return {"cov": len(covered) / len(reference),
            "mmd": float(across.amin(0).mean()),
            "nna": int(own_kind) / (len(generated) + len(reference))}


# ---- Text: is what a caption asks for there? -----------------------------------------------------
COLOURS = list(data.COLOURS)
KINDS = ("chair", "table", "car", "van", "truck")
DETAILS = ("legs", "pedestal", "round", "slatted", "armrests", "shelf")
NO_COLOUR = -100                             # what cross_entropy leaves out


def asked_for(prompt):
    """What a caption of built-in objects asks for: its colours in order, [red, blue], and the set
    of its parts, {chair, legs}."""
    said = words(prompt)
    colours = [word for word in said if word in COLOURS]
    parts = {word for word in said if word in KINDS or word in DETAILS}
    return colours, parts


class AttributeReader(nn.Module):
    """Pictures of one built-in object from random sides -> what a caption would say of it.

    (n, V, 3, H, W) in [0, 1] -> logits of the first colour (n, 8), the second (n, 8), the kind
    (n, 5) and the details (n, 6)
    """

    def __init__(self, width=32):
        super().__init__()
        layers = []
        channels = 3
        for c_out in (width, 2 * width, 4 * width, 4 * width):
            layers += [nn.Conv2d(channels, c_out, 3, 2, 1), nn.GroupNorm(8, c_out), nn.ReLU()]
            channels = c_out
        self.layers = nn.Sequential(*layers)
        self.sizes = [len(COLOURS), len(COLOURS), len(KINDS), len(DETAILS)]
        self.last = nn.Sequential(nn.Linear(8 * width, 8 * width), nn.ReLU(),
                                  nn.Linear(8 * width, sum(self.sizes)))

    def forward(self, images):
        x = self.layers(images.flatten(0, 1)).flatten(2)                      # (n V, C, h w)
        x = torch.cat([x.mean(2), x.amax(2)], 1).unflatten(0, images.shape[:2])
        # The best view of each thing decides: a back is not seen from behind.
        logits = self.last(x.amax(1))                                         # (n, 27)
        return logits.split(self.sizes, 1)


@torch.no_grad()
def read_attributes(reader, images):
    """What reader sees -> for each object its two colours and the set of its parts."""
    first, second, kind, details = reader(images)
    seen = []
    for i in range(len(images)):
        colours = [COLOURS[first[i].argmax()], COLOURS[second[i].argmax()]]
        parts = {KINDS[kind[i].argmax()]}
        for name, logit in zip(DETAILS, details[i]):
            if logit > 0:
                parts.add(name)
        seen.append((colours, parts))
    return seen


def caption_targets(captions):
    """What the reader is to answer -> numbers of colours (N, 2) and kind (N,), details (N, 6) in
    {0, 1}. Where a caption has one colour only, the second is NO_COLOUR.
    """
    colours, kind, details = [], [], []
    for caption in captions:
        said, parts = asked_for(caption)
        numbers = [COLOURS.index(name) for name in said[:2]]
        colours.append(numbers + [NO_COLOUR] * (2 - len(numbers)))
        kind.append([name in parts for name in KINDS].index(True))
        details.append([name in parts for name in DETAILS])
    return torch.tensor(colours), torch.tensor(kind), torch.tensor(details).float()


def vary(images, step):
    """Pictures (B, V, 3, H, W) of a step of fit_reader, each fourth step in another way."""
    if step % 2:                             # decoded volumes are blurred: half of the time, so
        images = F.avg_pool3d(images, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    if step % 4 > 1:                         # a caption is true of the mirror image, too
        images = images.flip(-1)
    return images


def fit_reader(dataset, epochs=12, seed=0):
    """An AttributeReader that has learned from a built-in dataset's pictures and captions."""
    torch.manual_seed(seed)
    reader = AttributeReader()
    colours, kind, details = caption_targets(dataset.captions)
    # Most chairs have no armrests: what is rare counts for more, or it is seen too seldom.
    rare = (1 / details.mean(0) - 1).clamp(0.1, 10)
    batch = 32
    steps = epochs * (dataset.n_objects // batch)
    optimizer = torch.optim.Adam(reader.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    views = int(dataset.object_index.bincount()[0])      # of every object, one after the other
    for step in range(steps):
        k = torch.randint(dataset.n_objects, (batch,))                        # (B,)
        drawn = torch.rand(batch, views).argsort(1)[:, :4]                    # (B, 4)
        images, _ = dataset.batch(k[:, None] * views + drawn, dataset.images.shape[1])
        first, second, what, which = reader(vary(images, step))
        loss = F.cross_entropy(first, colours[k, 0]) + F.cross_entropy(second, colours[k, 1])
        loss = loss + F.cross_entropy(what, kind[k])
        details_loss = F.binary_cross_entropy_with_logits(which, details[k], pos_weight=rare)
        loss = loss + len(DETAILS) * details_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return reader.eval().requires_grad_(False)


def reader_of(folder, settings, n_objects=2000, epochs=12):
    """The reader for a run of these settings: learned once, minutes, then a file in FOLDER."""
    # Size and seed are in its name: another training in this folder may need another reader.
    path = Path(folder) / f"reader-{settings.size}-{settings.seed}.pt"
    if path.exists():
        weights = sample.load_weights("--run", path, "what evaluate.py wrote there: delete it")
        reader = AttributeReader()
        try:
            reader.load_state_dict(weights)
        except (RuntimeError, TypeError, AttributeError):
            raise BadInput(f"{path} holds no reader of attributes: delete it") from None
        return reader.eval().requires_grad_(False)
    # Of objects of another seed: neither the run's own nor those whose captions it is asked for.
    objects = data.load("synthetic", settings.size, 0, settings.seed + 1, n_objects, 6)
    reader = fit_reader(objects, epochs)
    train.save_tensors(path, reader.state_dict())
    return reader


def attribute_scores(prompts, seen):
    """Share of the colours and of the parts that prompts ask for which were seen -> two numbers."""
    colours_right = colours_asked = parts_right = parts_asked = 0
    for prompt, (colours, parts) in zip(prompts, seen):
        wanted_colours, wanted_parts = asked_for(prompt)
        for wanted, found in zip(wanted_colours, colours):
            if wanted == found:
                colours_right += 1
        colours_asked += len(wanted_colours)
        parts_right += len(wanted_parts & parts)
        parts_asked += len(wanted_parts)
    return colours_right / max(1, colours_asked), parts_right / max(1, parts_asked)


def chance_scores(prompts, seen):
    """attribute_scores of what was seen against all the other prompts, in turn: means of both."""
    scores = []
    for shift in range(1, len(prompts)):
        others = prompts[shift:] + prompts[:shift]
        scores.append(attribute_scores(others, seen))
    return torch.tensor(scores).mean(0).tolist()


def unseen_objects(trained, n):
    """n built-in objects beyond those of a run, with captions that none of its own has: known words
    in new combinations -> dataset, their numbers in it."""
    settings = trained.data_settings
    first = settings.n_objects
    objects = data.load("synthetic", settings.size, 0, settings.seed, first + 2 * n, 8)
    known = set(trained.captions)
    numbers = [k for k in range(first, objects.n_objects) if objects.captions[k] not in known]
    return objects, numbers[:n]


@torch.no_grad()
def score_text(trained, reader, n, steps, churn, guidance, seed):
    """How often what a caption asks for is seen in what is made of it -> dict of shares.

    text_colour, text_parts  colours, and kinds and parts, that the reader sees as asked for
    ..._chance  the same for objects made of the other captions: what no reading would give
    ..._true    the same for true pictures of such objects: what the reader can give at most
    text_diversity  median difference (see sample.appearance) of two objects made of one caption
    """
    objects, numbers = unseen_objects(trained, n)
    size = objects.images.shape[1]
    prompts = [objects.captions[k] for k in numbers]
    frames = torch.stack([objects.frames_of(k) for k in numbers])             # (n, 8)
    true = read_attributes(reader, objects.batch(frames, size)[0])

    def made_of(prompts, seed):
        noise = sample.latent_noise(trained, len(prompts), seed)
        latents = sample.sample_prompts(trained, noise, prompts, steps, churn, seed, guidance)
        return sample.decode(trained, latents)

    volumes = made_of(prompts, seed + 2)
    seen = []
    for part, group in zip(volumes.split(8), frames.split(8)):
        rgb = render_from(trained, part, objects.cam2world[group], objects.intrinsics[group],
                          size, 64)
        seen += read_attributes(reader, rgb)
    scores = {}
    for key, (colour, parts) in {"": attribute_scores(prompts, seen),
                                 "_true": attribute_scores(prompts, true),
                                 "_chance": chance_scores(prompts, seen)}.items():
        scores[f"text_colour{key}"] = round(colour, 4)
        scores[f"text_parts{key}"] = round(parts, 4)
    again = made_of(prompts[:32], seed + 3)
    apart = sample.appearance(trained, volumes[:32]) - sample.appearance(trained, again)
    scores["text_diversity"] = round(float(apart.norm(dim=1).median()), 4)
    return scores


# ---- What moves: learned poses and parts against the true ones of puppets ------------------------
def correlation(a, b):
    """Pearson's, of two (n,); 0 where one is constant."""
    a = a.double() - a.double().mean()
    b = b.double() - b.double().mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-9))


def rounded_median(values):
    """The (lower) median of a list of numbers, four digits."""
    return round(float(torch.tensor(values).median()), 4)


def count_parts(learned, occupancy, true):
    """How many pixels of each learned part show which true one -> (P, 6).

    learned (V, P, H, W) shares, occupancy (V, 1, H, W), true (V, H, W): 1 + the part, 0 for none
    """
    seen = (occupancy[:, 0] > 0.5) & (true > 0)                               # (V, H, W)
    pair = learned.argmax(1)[seen] * 6 + true[seen].long() - 1
    return pair.bincount(minlength=6 * learned.shape[1]).reshape(-1, 6)


def limb_readout(pose, angle, test):
    """Correlation of an angle with what a linear function of a pose says of it.

    pose (F, 4, 4) of a limb as seen from the torso, angle (F,) true, test (F,) bool: the frames
    that it is scored on; it is fitted to the others, or to the same where there are no others
    """
    x = F.pad(pose[:, :3].flatten(1), (0, 1), value=1.0).double()             # (F, 13)
    angle = angle.double()
    train_frames = ~test if test.any() else torch.ones_like(test)
    fit = torch.linalg.pinv(x[train_frames], rtol=1e-4) @ angle[train_frames]
    return correlation((x @ fit)[test], angle[test])


def score_yaw(poses, torso, yaws):
    """How well a torso's learned turning follows the true one -> dict, see score_motion.

    poses: of each clip (V, P, 4, 4); torso: its number; yaws: of each clip (V,), radians
    """
    correlations, slopes = [], []
    for cameras, true in zip(poses, yaws):
        # Where the camera is as the subject sees it: to the left of one who has turned right.
        learned = -torch.atan2(cameras[:, torso, 0, 2], cameras[:, torso, 2, 2])
        correlations.append(correlation(true, learned))
        slopes.append(correlations[-1] * float(learned.std() / true.std()))
    found = [c for c in correlations if c >= 0.95]
    return {"yaw_correlation": rounded_median(correlations), "yaw_slope": rounded_median(slopes),
            "yaw_share": len(found) / len(correlations)}


@torch.no_grad()
def score_motion(trained, dataset, n_samples=32):
    """Learned poses and parts against the true ones, which only puppets have -> dict of numbers.

    part_purity   share of pixels whose learned part is, most often, the part that they truly show
    yaw_correlation, yaw_slope  of true yaw and that of the part that shows torsos most often,
                  medians over the clips
    yaw_share     share of clips in which they correlate by 0.95 or more
    limb_correlation  of the angles of left arm, right arm, left leg, right leg with a linear
                  readout from the pose, as seen from the torso, of the part that shows the limb
                  most often; fitted to training frames, scored on held-out ones
    """
    size = dataset.images.shape[1]
    poses, table = [], 0
    for k in range(dataset.n_objects):
        frames = dataset.frames_of(k)
        cameras = sample.cameras_of(trained, dataset, frames)                 # (V, P, 4, 4)
        volume = trained.autodecoder(torch.tensor([k], device=trained.device))
        intrinsics = dataset.intrinsics[frames].to(trained.device)
        out = render.render_moving_geometry(volume, cameras[None], intrinsics[None], size,
                                            n_samples)
        table = table + count_parts(out["parts"][0].cpu(), out["occupancy"][0].cpu(),
                                    dataset.truth["parts"][frames])           # (P, 6)
        poses.append(cameras.cpu())
    # Which learned part shows each of the true ones most often; data.PARTS: head, torso, limbs.
    torso, *limbs = table[:, 1:].argmax(0).tolist()
    yaws = dataset.truth["yaw"].split([len(clip) for clip in poses])
    scores = score_yaw(poses, torso, yaws)
    scores["part_purity"] = round(float(table.amax(1).sum() / table.sum()), 4)
    scores["limb_correlation"] = []
    poses = torch.cat(poses)                                                  # (F, P, 4, 4)
    for i, limb in enumerate(limbs):
        pose = poses[:, torso] @ torch.linalg.inv(poses[:, limb])             # in the torso's axes
        found = limb_readout(pose, dataset.truth["angles"][:, i], dataset.heldout)
        scores["limb_correlation"].append(round(found, 4))
    return scores


# ---- Cameras that were learned, of rigid objects -------------------------------------------------
def align_world(R, true):
    """The one rotation of the world after which rotations R (F, 3, 3) are nearest to the true ones
    (Procrustes) -> (3, 3)."""
    U, _, Vh = torch.linalg.svd(torch.einsum("nij,nkj->ik", true, R))
    mirror = torch.diag(torch.tensor([1.0, 1.0, torch.det(U @ Vh)]))          # no reflection
    return U @ mirror @ Vh


def azimuth_of(R):
    """Azimuths (F,) of cameras with rotations (F, 3, 3), radians: their z axis points backwards."""
    return torch.atan2(R[:, 0, 2], R[:, 2, 2])


def azimuth_scale(learned, true):
    """The scale of least absolute error, true = scale learned: a weighted median of the ratios,
    which mirrored objects, whose ratio is negative, do not move."""
    ratio, order = (true / learned).sort()
    weight = learned[order].abs().cumsum(0)
    return float(ratio[torch.searchsorted(weight, weight[-1] / 2)])


@torch.no_grad()
def score_cameras(trained, dataset):
    """Learned cameras of rigid objects against the true ones -> dict of numbers.

    rotation_error   degrees, median over all frames, after one rotation of the world for all and
                     one scale of all azimuths (under so long a lens both are anybody's guess)
    azimuth_scale    that scale: true over learned
    mirrored         share of objects that turn the wrong way, their depth reversed
    """
    frames = torch.arange(len(dataset.heldout))
    cameras = sample.cameras_of(trained, dataset, frames)                     # (F, 1, 4, 4)
    true = dataset.cam2world[:, :3, :3]
    R = cameras[:, 0, :3, :3].cpu()
    R = align_world(R, true) @ R
    learned_azimuth, true_azimuth = azimuth_of(R), azimuth_of(true)
    scale = azimuth_scale(learned_azimuth, true_azimuth)
    mirrored = 0
    for k in range(dataset.n_objects):
        mine = dataset.frames_of(k)
        if correlation(learned_azimuth[mine], true_azimuth[mine]) < 0:
            mirrored += 1
    zero = torch.zeros_like(learned_azimuth)
    R = render.orbit((scale - 1) * learned_azimuth, zero, 1.0)[:, :3, :3] @ R
    # Of a rotation by an angle the trace is 1 + 2 cos(angle).
    cosine = (torch.einsum("nij,nij->n", R, true) - 1) / 2
    error = torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))
    return {"rotation_error": rounded_median(error.tolist()), "azimuth_scale": round(scale, 4),
            "mirrored": mirrored / dataset.n_objects}


def score_poses(trained, dataset):
    """Whatever of learned poses can be compared with the truth -> dict, empty where nothing can."""
    if trained.posenet is None:              # nothing was learned
        return {}
    if dataset.truth:                        # puppets
        return score_motion(trained, dataset)
    if dataset.moving:                       # clips of which nobody knows the truth
        return {}
    return score_cameras(trained, dataset)


# ---- All of it -----------------------------------------------------------------------------------
KINDS_OF_SAMPLES = {"": "diffusion", "_direct": "direct sampling, fitted",
                    "_direct_normal": "direct sampling, N(0, I)", "_train": "training objects"}


def now():
    """Seconds, when a GPU has done what it was told to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


def volumes_to_score(trained, n, steps, churn, seed, known, baselines):
    """The volumes (n, C, D, H, W) that evaluate scores, by their kind, and the seconds that each of
    the first kind took; known: the decoded training objects."""
    began = now()
    noise = sample.latent_noise(trained, n, seed + 1)
    latents = sample.sample_latents(trained, noise, steps, churn, seed)
    volumes = {"": sample.decode(trained, latents)}
    seconds = (now() - began) / n
    if baselines:
        for kind, drawn in (("_direct", "fitted"), ("_direct_normal", "normal")):
            latents = sample.direct_latents(trained, n, seed, drawn)
            volumes[kind] = sample.decode(trained, latents)
        volumes["_train"] = known[:n]
    return volumes, seconds


def memorization(trained, volumes, known, same):
    """Median distance of what volumes look like to the training object that looks most alike; same:
    they are the first of these themselves, and the nearest OTHER one counts."""
    apart = torch.cdist(sample.appearance(trained, volumes), known)           # (n, N)
    if same:
        apart.fill_diagonal_(torch.inf)
    return float(apart.amin(1).median())


def score_shapes(volumes, reference, reference_apart):
    """empty, and of the rest cov, mmd, nna against clouds (m, 2048, 3) -> dict."""
    found = [surface_points(volume, 2048, seed=i) for i, volume in enumerate(volumes)]
    found = [points for points in found if len(points)]
    scores = {"empty": 1 - len(found) / len(volumes)}
    if min(len(found), len(reference)) > 1:
        metrics = shape_metrics(torch.stack(found), reference, reference_apart)
        for name, value in metrics.items():
            scores[name] = round(value, 5)
    return scores


def evaluate(trained, dataset, n, views, steps, churn, seed, shapes=True, baselines=True,
             features=image_features):
    """What is generated against the training data, and baselines against the same -> dict.

    fd, kd         Frechet and kernel distance of n samples x `views` renders to all training views
                   (the paper: 1,000 samples x 10)
    cov, mmd, nna  see shape_metrics, with shapes: against the true shapes, or where nobody knows
                   them, against the decoded training objects
    empty          share of samples without any surface: they have no part in these three
    memorization   median distance (see sample.appearance) to the nearest training object
    debris         mean over the samples that are not empty: see there
    fd_unseen      of built-in objects: fd to as many others as were learned from, which copies of
                   what was learned do not lower
    The same with _direct (embeddings drawn from a fitted Gaussian), _direct_normal (from N(0, I))
    and _train (training objects themselves: the floor). And seconds_per_sample, of the first.
    """
    latents = sample.training_latents(trained.autodecoder, len(trained.names))
    known = sample.decode(trained, latents)                                   # (N, C, D, H, W)
    known_appearance = sample.appearance(trained, known)
    volumes, seconds = volumes_to_score(trained, n, steps, churn, seed, known, baselines)
    scores = {"samples": n, "views": views, "seconds_per_sample": round(seconds, 4)}
    true = true_features(dataset, features)
    others = others_of(trained)
    unseen = None if others is None else true_features(others, features)
    if shapes:
        reference = clouds(dataset, known)
        reference_apart = nearest_clouds(reference, reference, same=True)
    for kind, made in data.telling(list(volumes.items()), "scores  | kinds of sample"):
        ours = rendered_features(trained, made, dataset, views, features=features)
        scores[f"fd{kind}"] = round(frechet_distance(ours, true), 5)
        scores[f"kd{kind}"] = round(kernel_distance(ours, true), 7)
        if unseen is not None:
            scores[f"fd_unseen{kind}"] = round(frechet_distance(ours, unseen), 5)
        pieces = [share for share in map(debris, made) if not math.isnan(share)]
        if pieces:
            scores[f"debris{kind}"] = round(statistics.mean(pieces), 4)
        nearest = memorization(trained, made, known_appearance, same=kind == "_train")
        scores[f"memorization{kind}"] = round(nearest, 4)
        if shapes:
            for name, value in score_shapes(made, reference, reference_apart).items():
                scores[name + kind] = value
    return scores


def print_scores(scores):
    """Scores as a table: a row for each kind of sample, a column for each number; then the rest."""
    names = ["fd", "kd", "memorization", "debris"]
    if "fd_unseen" in scores:
        names.insert(1, "fd_unseen")
    if "empty" in scores:
        names += ["cov", "mmd", "nna", "empty"]
    if "fd" in scores:
        print(" " * 28 + "".join(f"{name:>14}" for name in names))
    for kind, title in KINDS_OF_SAMPLES.items():
        if f"fd{kind}" in scores:
            row = [scores.get(name + kind, math.nan) for name in names]
            print(f"{title:28}" + "".join(f"{value:14.5g}" for value in row))
    columns = {name + kind for name in names for kind in KINDS_OF_SAMPLES}
    for name, value in scores.items():
        if name not in columns:
            shown = f"{value:14.5g}" if isinstance(value, (int, float)) else f"  {value}"
            print(f"{name.replace('_', ' '):28}{shown}")
    if "fd" in scores and scores.get("features") != "inception":
        print("fd and kd are on a fixed random network: not comparable with published FID and KID")


def warn_of_few_views(views, features):
    """A covariance of d features needs more than d pictures: with fewer, fd is of their noise."""
    if views <= features:
        print(f"only {views} training views for {features} features: fd is unreliable")


# ---- Runs side by side ---------------------------------------------------------------------------
COMPARED = ("psnr_heldout", "mask_heldout", "fd", "fd_unseen", "kd", "cov", "mmd", "nna",
            "memorization", "debris", "text_colour", "text_parts", "text_diversity",
            "seconds_stage1", "seconds_stage2", "seconds_per_sample")
NOT_A_KIND = ("seed", "log_every", "save_every")         # settings that make no other kind of run


def read_metrics(folder):
    """What RUN/metrics.json holds -> dict. Its settings tell of the data, too, and of how many
    samples were scored, for distances are biased by their number."""
    try:
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
        for name in ("source", "samples", "views"):
            metrics["settings"][name] = metrics.get(name)
        for name in COMPARED:
            if not isinstance(metrics.get(name, 0), (int, float)):
                raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadInput(f"--compare {folder}: no metrics.json that train.py or evaluate.py "
                       "wrote") from None
    return metrics


def what_differs(runs):
    """Names of the settings in which runs are not all alike."""
    names = []
    everybodys = dict.fromkeys(name for run in runs for name in run["settings"])
    for name in everybodys:
        values = {str(run["settings"].get(name)) for run in runs}
        if len(values) > 1 and name not in NOT_A_KIND:
            names.append(name)
    return names


def title_of(run, names):
    """A run's settings of these names in words: "decoder_depth 4, norm group"."""
    words_of = [f"{name} {run['settings'].get(name)}" for name in names]
    return ", ".join(words_of) or "all alike"


def find_spread(runs, name):
    """Median, least and greatest of a number over the runs that have it; None if none has.

    The median of two is their mean: the larger of them would flatter, or slander, a kind of run
    that has one seed more than another.
    """
    values = [run[name] for run in runs if name in run]
    if not values:
        return None
    return statistics.median(values), min(values), max(values)


def group_runs(runs, names):
    """Runs by their titles, in the order of their first ones -> dict of lists."""
    groups = {}
    for run in runs:
        groups.setdefault(title_of(run, names), []).append(run)
    return groups


def compared_table(groups):
    """Rows of words: a header, then one for each group of runs, "median (least, greatest)"."""
    everything = [run for group in groups.values() for run in group]
    names = [name for name in COMPARED if any(name in run for run in everything)]
    table = [["", "runs"] + names]
    for title, group in groups.items():
        row = [title, str(len(group))]
        for name in names:
            spread = find_spread(group, name)
            row.append("-" if spread is None else "{:.4g} ({:.4g}, {:.4g})".format(*spread))
        table.append(row)
    return table


def print_table(table):
    """Rows of words in columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in table) + 2 for i in range(len(table[0]))]
    for row in table:
        line = row[0].ljust(widths[0])
        for word, width in zip(row[1:], widths[1:]):
            line += word.rjust(width)
        print(line)


def compared_curves(groups, names):
    """Frechet distance over the time of a sample, as in the paper's Fig. 3: a curve holds all
    numbers of sampler steps -> dict of lists of (seconds, fd, least fd, greatest fd)."""
    curves = {}
    names = [name for name in names if name != "sample_steps"]
    for group in groups.values():
        seconds = find_spread(group, "seconds_per_sample")
        distance = find_spread(group, "fd")
        if seconds is None or distance is None:
            continue                                     # stage 1 alone has no such point
        curve = curves.setdefault(title_of(group[0], names), [])
        curve.append((seconds[0], *distance))
    return curves


def draw_curves(curves, path):
    """The figure of compared_curves, as PNG."""
    figure, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
    for label, points in curves.items():
        points.sort()
        seconds = [point[0] for point in points]
        median = [point[1] for point in points]
        down = [middle - least for _, middle, least, _ in points]
        up = [greatest - middle for _, middle, _, greatest in points]
        axis.errorbar(seconds, median, (down, up), fmt="o-", capsize=3, label=label)
    axis.set(xlabel="seconds per sample", ylabel="Frechet distance: median, least, greatest",
             xscale="log", yscale="log")
    for side in (axis.xaxis, axis.yaxis):                # 0.02 0.05 0.1, not 2 x 10^-2
        side.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        side.set_major_formatter("{x:g}")
        side.set_minor_formatter("")
    axis.legend(fontsize=7)
    sample.save_figure(path, figure, dpi=100)


def compare_runs(folders, path):
    """Prints a row for each kind of run, over its seeds, and draws their curves as `path`."""
    runs = [read_metrics(folder) for folder in folders]
    names = what_differs(runs)
    groups = group_runs(runs, names)
    print_table(compared_table(groups))
    curves = compared_curves(groups, names)
    if curves:
        draw_curves(curves, path)
        print(f"wrote {path}")


# ---- Command line --------------------------------------------------------------------------------
def parse(arguments=None):
    """Command line -> args; flags that do not go together are bad input."""
    parser = data.Parser(description="Score a trained run, or compare runs.")
    what = parser.add_argument_group("what to score")
    what.add_argument("--run", help="folder that train.py wrote (runs/tiny-synthetic)")
    what.add_argument("--data", help="where its data is now (default: where it was)")
    what.add_argument("--out", help="folder of metrics.json (default: RUN), of compare.png (the "
                      "current one)")
    what.add_argument("--device", help="cpu, cuda, ... (auto)")
    what.add_argument("--compare", nargs="+", metavar="RUN", help="no scoring: numbers of these "
                      "runs side by side, seeds of one kind put together, and compare.png")
    how = parser.add_argument_group("samples, of stage 2")
    how.add_argument("--n", type=int, help="how many (256)")
    how.add_argument("--views", type=int, help="renders of each (10)")
    how.add_argument("--steps", type=int, help="sampler steps (the run's sample_steps)")
    how.add_argument("--churn", type=float, help="S_churn (the run's)")
    how.add_argument("--guidance", type=float, help="how strongly captions are followed (the "
                     "run's)")
    how.add_argument("--seed", type=int, help="other samples (0)")
    scores = parser.add_argument_group("scores")
    scores.add_argument("--no-baselines", action="store_true", help="leave direct sampling and the "
                        "training objects out")
    scores.add_argument("--no-shapes", action="store_true", help="leave COV, MMD and 1-NNA out")
    scores.add_argument("--inception", metavar="FILE", help=f"{INCEPTION_FILE}, for published FID "
                        "and KID (needs torch-fidelity)")
    scores.add_argument("--lpips", nargs=2, metavar=("VGG16", "LINEAR"), help=f"{VGG16_FILE} of "
                        f"torchvision and {LPIPS_FILE} of lpips v0.1")
    args = parser.parse_args(arguments)
    check(args)
    return args


BOUNDS = sample.BOUNDS | {"n": (1, 100_000), "views": (1, 1000)}     # least, most
DEFAULTS = {"run": "runs/tiny-synthetic", "device": "auto", "n": 256, "views": 10, "seed": 0}


def check(args):
    """Refuses what cannot be meant, each flag by its name, and fills in the defaults."""
    if args.compare:
        for name, value in vars(args).items():
            if name in ("compare", "out"):
                continue
            if value is not None and value is not False:          # 0 was given, too
                raise BadInput(f"--compare reads what was scored before: leave "
                               f"--{name.replace('_', '-')} out")
    for name, bounds in BOUNDS.items():
        value = getattr(args, name)
        if value is not None:
            data.check_number(f"--{name}", value, bounds)
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    features = INCEPTION_FEATURES if args.inception else N_FEATURES
    if args.n < 2 or args.n * args.views <= features:
        least = max(2, features // args.views + 1)
        raise BadInput(f"{args.n} samples x {args.views} views are too few for the covariance of "
                       f"{features} features: --n {least} --views {args.views} is the least, "
                       "--n 256 --views 10 is usual")


def fill_in(args, trained):
    """--steps, --churn and --guidance, where they were not given, are those of the run."""
    settings = trained.settings
    args.steps = args.steps or settings.sample_steps
    if args.churn is None:
        args.churn = settings.churn
    if args.guidance is None:
        args.guidance = settings.guidance


def knows_captions(trained):
    """Whether a run has learned from captions that asked_for can read."""
    return trained.encode is not None and trained.source == "synthetic"


def score_samples(trained, dataset, args, features):
    """All that is asked of stage 2 -> dict."""
    reader = None
    if knows_captions(trained):              # first, so that a damaged one is refused at once
        reader = reader_of(args.run, trained.data_settings)
    scores = evaluate(trained, dataset, args.n, args.views, args.steps, args.churn, args.seed,
                      not args.no_shapes, not args.no_baselines, features)
    scores["features"] = "inception" if args.inception else "random"
    if reader is not None:
        scores |= score_text(trained, reader, min(args.n, 128), args.steps, args.churn,
                             args.guidance, args.seed)
    return scores


def evaluate_run(args):
    """Prints all scores of a run, and adds them to metrics.json."""
    device = sample.choose_device(args.device)
    lpips = load_lpips(*args.lpips) if args.lpips else None
    features = load_inception(args.inception) if args.inception else image_features
    generates = (Path(args.run) / "stage2.pt").exists()
    trained = sample.open_run(args.run, device, (1, 2) if generates else (1,))
    if args.guidance is not None and not knows_captions(trained):
        raise BadInput(f"--guidance: {args.run} knows no text, or not that of built-in objects, "
                       "whose captions are scored")
    folder = Path(args.out or args.run)
    data.make_folder(folder)
    dataset = sample.load_data(trained, args.data)
    began = time.time()
    fill_in(args, trained)
    scores = score_views(trained, dataset, lpips)
    scores |= score_poses(trained, dataset)
    settings = copy.copy(trained.settings)
    if generates:
        scores |= score_samples(trained, dataset, args, features)
        settings.sample_steps = args.steps
        settings.churn = args.churn
        settings.guidance = args.guidance
    else:
        print(f"{args.run} has no stage2.pt: held-out views and poses only")
    scores["seconds_evaluation"] = round(time.time() - began, 1)
    train.add_metrics(folder, settings, train.OF_SAMPLES, source=trained.source, **scores)
    print_scores(scores)
    if generates:
        warn_of_few_views(int((~dataset.heldout).sum()),
                          INCEPTION_FEATURES if args.inception else N_FEATURES)
    print(f"wrote {folder / 'metrics.json'}")


def main(arguments=None):
    """Scores one run, or compares several."""
    args = parse(arguments)
    if args.compare:
        folder = Path(args.out or ".")
        data.make_folder(folder)
        compare_runs(args.compare, folder / "compare.png")
    else:
        evaluate_run(args)


if __name__ == "__main__":
    data.run_cli(main)
