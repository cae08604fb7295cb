"""The number of an object goes in; its volume of density and colour comes out. Stage 1.

Paper: Sec. 3.1 and App. B.1 (the decoder G); Sec. 3.2, Eq. 1 and 2 (its losses).

An autoencoder has an encoder, which looks at an object and sums it up in a vector. An AUTOdecoder
has none: every training object owns a vector, its embedding e, a row of a table that starts as
noise. The network turns e into a volume, the volume is rendered and compared with the photos, and
the gradient flows all the way back: into the network, and into the row of this one object.

    e (1024) -> Linear -> 4^3 x 512 -> 8^3 x 256 = latent -> 16^3 -> 32^3 -> 64^3 -> density, rgb
    |____________ G1: decode_latent ____________________| |_________ G2: decode_volume _________|

Each arrow that doubles a side is a level: residual blocks, the first of which doubles the side
and halves the channels; at 8^3 and 16^3 also self-attention. After stage 1, G is frozen. Stage
2 learns how latents (the paper's F) are distributed; a new object is a new latent, decoded by G2.

Shapes: B objects, C channels, D = H = W the side of a volume.
Simplified: Eq. 1 compares pixels and edges; the paper's VGG-19 is in the second reading.
Read next: normalize.py
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

# ---- What the decoder is built from (App. B.1) --------------------------------------------------
NORMS = {"batch": nn.BatchNorm3d}                    # PAPER. The second reading adds "group"


class Pointwise(nn.Linear):
    """A 1x1x1 convolution, a matrix for every voxel: (B, c_in, D, H, W) -> (B, c_out, D, H, W)."""

    def forward(self, x):
        # OURS: nn.Conv3d(c_in, c_out, 1) is the same, but its backward pass is slow on CPUs.
        x = super().forward(x.movedim(1, -1))        # nn.Linear wants the channels last
        return x.movedim(-1, 1)


class ResidualBlock(nn.Module):
    """x -> shortcut(x) + main(x). (B, c_in, D, H, W) -> (B, c_out, D, H, W), or 2 D, 2 H, 2 W.

    PAPER: the main path is two 3x3x3 convolutions, each with a norm; the shortcut ("residual path")
    is a 1x1x1 convolution; ReLU. OURS: where c_in = c_out, the shortcut is x itself.
    """

    def __init__(self, c_in, c_out, upsample=False, norm="batch"):
        super().__init__()
        self.upsample = upsample
        if upsample:
            # OURS: instead of the first 3x3x3, a transposed 4x4x4, which also doubles the side.
            self.conv1 = nn.ConvTranspose3d(c_in, c_out, 4, stride=2, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv3d(c_in, c_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv3d(c_out, c_out, 3, padding=1, bias=False)
        self.norm1 = NORMS[norm](c_out)              # has a bias: the convolutions need none
        self.norm2 = NORMS[norm](c_out)
        self.shortcut = nn.Identity() if c_in == c_out else Pointwise(c_in, c_out)

    def forward(self, x):
        # AMBIGUOUS: where the ReLUs stand. OURS: in front of the convolutions. One behind the sum
        # would leave no negative numbers, not even in the latent, which Fig. 9 shows bell-shaped.
        h = self.norm1(self.conv1(F.relu(x)))
        h = self.norm2(self.conv2(F.relu(h)))
        shortcut = self.shortcut(x)                  # before it is enlarged: the same, but cheaper
        if self.upsample:
            shortcut = F.interpolate(shortcut, scale_factor=2, mode="nearest")
        return shortcut + h


class SelfAttention(nn.Module):
    """Every voxel looks at every other: x + proj(attention(norm(x))). (B, C, D, H, W) -> same.

    A convolution sees its neighbours; this sees that the left armrest is like the right one. Its
    cost grows with the number of voxels squared: hence only at 8^3 and 16^3 (PAPER).
    AMBIGUOUS: the paper says no more. OURS: heads of about c = 64 channels, as in its U-Net (ADM).
    """

    def __init__(self, channels, head_channels=64):
        super().__init__()
        self.heads = max(1, channels // head_channels)
        if channels % self.heads:
            raise ValueError(f"attention: {self.heads} heads do not divide {channels} channels")
        self.norm = nn.GroupNorm(1, channels)        # one mean and one deviation for each object
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj.weight)             # so that it starts as the identity
        nn.init.zeros_(self.proj.bias)

    def forward(self, x):
        voxels = self.norm(x).flatten(2).transpose(1, 2)             # (B, DHW, C)
        qkv = self.qkv(voxels).unflatten(-1, (3, self.heads, -1))    # (B, DHW, 3, heads, c)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                         # (B, heads, DHW, c) each
        seen = F.scaled_dot_product_attention(q, k, v)               # softmax(q k^T / sqrt(c)) v
        seen = seen.transpose(1, 2).flatten(2)                       # (B, DHW, C)
        return x + self.proj(seen).transpose(1, 2).reshape(x.shape)


# ---- The decoder G: object number k -> embedding e -> latent (G1) -> volume (G2) ----------------
class AutoDecoder(nn.Module):
    """G(e) = G2(G1(e)), drawn on top of this file. Defaults: PAPER, for ShapeNet Chairs (Tab. 5).

    embedding     a module: object numbers k (B,) int64 -> e (B, embed_dim)
    embed_dim     length of e; PAPER: 64 costs more than any other change that was tried (Tab. 2)
    channels      features of the first volume, whose side is start_side
    volume_side   of the last: start_side, doubled some times (ValueError if it is not)
    latent_side   where G is cut into G1 and G2: one of the sides on the way (ValueError if not)
    depth         residual blocks of a level
    attention     sides whose level ends with self-attention
    norm          "batch" (PAPER), a key of NORMS
    out_channels  4: density and colour
    """

    def __init__(self, embedding, embed_dim=1024, channels=512, start_side=4, volume_side=64,
                 latent_side=8, depth=4, attention=(8, 16), norm="batch", out_channels=4):
        super().__init__()
        doublings = int(math.log2(volume_side / start_side))
        self.sides = [start_side * 2**i for i in range(doublings + 1)]        # 4, 8, 16, 32, 64
        widths = [max(1, channels // 2**i) for i in range(doublings + 1)]     # 512, 256, ... 32
        if volume_side not in self.sides or latent_side not in self.sides:
            raise ValueError(f"volume_side {volume_side} and latent_side {latent_side} must be "
                             f"among {self.sides}: start_side {start_side} and its doubles")
        self.volume_side = volume_side
        # AMBIGUOUS: where G1 ends. The paper says "after the first upsampling block". OURS: after
        # the whole level of that side, all its blocks and its attention: a cut between two sides.
        # Where it is the first volume's side, G1 has no level, only the linear layer.
        self.cut = self.sides.index(latent_side)     # levels[:cut] are G1's, levels[cut:] are G2's
        self.latent_shape = (widths[self.cut], latent_side, latent_side, latent_side)
        self.embedding = embedding
        self.linear = nn.Linear(embed_dim, channels * start_side**3)
        self.levels = nn.Sequential()                # levels[i] leads from sides[i] to sides[i + 1]
        for i in range(doublings):
            width = widths[i + 1]
            level = nn.Sequential(ResidualBlock(widths[i], width, upsample=True, norm=norm))
            for _ in range(depth - 1):
                level.append(ResidualBlock(width, width, norm=norm))
            if self.sides[i + 1] in attention:
                level.append(SelfAttention(width))
            self.levels.append(level)
        self.head = nn.Sequential(NORMS[norm](widths[-1]), Pointwise(widths[-1], out_channels))
        self.to(memory_format=torch.channels_last_3d)    # OURS: order in memory; faster on CPUs

    @classmethod
    def from_settings(cls, settings, n_objects, embedding=None, **others):
        """The decoder of these settings. embedding: if None, a table that starts as N(0, I)."""
        if embedding is None:
            embedding = nn.Embedding(n_objects, settings.embed_dim)
        return cls(embedding, embed_dim=settings.embed_dim, channels=settings.channels,
                   start_side=settings.start_side, volume_side=settings.volume_side,
                   latent_side=settings.latent_side, depth=settings.decoder_depth,
                   attention=settings.decoder_attention, norm=settings.norm, **others)

    def embed(self, k):
        return self.embedding(k)                     # k (B,) int64 -> e (B, embed_dim)

    def decode_latent(self, e):
        """G1: e (B, embed_dim) -> latent (B, C, s, s, s), s = latent_side."""
        side = self.sides[0]
        x = self.linear(e).unflatten(1, (-1, side, side, side))      # (B, 512, 4, 4, 4)
        x = x.contiguous(memory_format=torch.channels_last_3d)       # in memory as the weights are
        return self.levels[:self.cut](x)                             # (B, 256, 8, 8, 8)

    def decode_volume(self, latent):
        """G2: latent (B, C, s, s, s) -> volume (B, 4, D, H, W): density, red, green, blue."""
        if latent.shape[1:] != self.latent_shape:
            raise ValueError(f"a latent must be {self.latent_shape}, got {tuple(latent.shape[1:])}")
        return self.activate(self.decode_raw(latent))

    def decode_raw(self, latent):
        """G2 but for its last step: latent -> (B, 4, D, H, W), any real numbers."""
        x = latent.contiguous(memory_format=torch.channels_last_3d)
        x = self.levels[self.cut:](x)
        return self.head(x)

    def activate(self, raw):
        """The last step of G2, same shape: density >= 0 per world unit, colours in [0, 1]."""
        # OURS: where the network says 0 there is thin fog, of optical thickness softplus(-3) = 0.05
        # a voxel. TRAP: dense fog hides all that lies behind it, and what is hidden cannot learn.
        # Density is per world unit, and a voxel is 2 / D of them wide. Divided by that, the same
        # raw number makes a voxel equally opaque at every D.
        density = F.softplus(raw[:, :1] - 3) * (self.volume_side / 2)
        rgb = torch.sigmoid(raw[:, 1:])
        return torch.cat([density, rgb], dim=1).contiguous()         # in memory as in render.py

    def forward(self, k):
        """G: k (B,) int64 -> volume (B, 4, D, H, W)."""
        return self.decode_volume(self.decode_latent(self.embed(k)))


# ---- Losses (Sec. 3.2, Eq. 1 and 2) -------------------------------------------------------------
def pixels_and_gradients(image):
    """The f of Eq. 1: (B, 3, H, W) -> the picture itself, and its steps from pixel to pixel."""
    # OURS. Steps see edges: with pixels alone, a blurred edge is nearly as good as a sharp one.
    across = image.diff(dim=-1)                                      # (B, 3, H, W - 1)
    down = image.diff(dim=-2)                                        # (B, 3, H - 1, W)
    return [image, across, down]


def pyramid_loss(features, rendered, true, levels=3):
    """Eq. 1: sum over l and i of mean |f_i(D_l(rendered)) - f_i(D_l(true))|.

    features        f: (B, 3, H, W) -> list of maps (B, ...), one per i. PAPER: layers of VGG-19
    rendered, true  (B, 3, H, W) in [0, 1]; ValueError where their shapes differ
    levels          l = 0 to levels - 1; D_l halves l times, as in Unsupervised Volumetric Animation
    """
    if rendered.shape != true.shape:
        raise ValueError(f"rendered {tuple(rendered.shape)} and true {tuple(true.shape)} differ")
    loss = 0
    for _ in range(levels):
        distance = 0
        for made, goal in zip(features(rendered), features(true)):
            distance = distance + (made - goal).abs().mean()
        loss = loss + distance
        if min(rendered.shape[-2:]) < 4:
            break                                    # halved to one pixel, it would have no steps
        rendered = F.avg_pool2d(rendered, 2)         # a small picture shows coarse mistakes, such
        true = F.avg_pool2d(true, 2)                 # as a misplaced leg, as a whole
    return loss


def foreground_loss(occupancy, mask):
    """Eq. 2: mean |O - mask|; any shape, in [0, 1]. O is Eq. 7: how much of a ray is stopped."""
    # Without it a black object before a black background may as well be thin fog (Fig. 6).
    return (occupancy - mask).abs().mean()


# ==== Second reading: many objects, VGG-19, unknown cameras, what moves ==========================
from pathlib import Path                                             # noqa: E402
from typing import NamedTuple                                        # noqa: E402

from data import BadInput                                            # noqa: E402

# Shapes, besides those above: P parts, K keypoints of a part, n frames.


def group_norm(channels):
    """Group norm with 8 groups, or one a channel where there are fewer than 8 channels.

    OURS: for small batches. It looks at one object at a time, batch norm at all objects of a step.
    """
    groups = min(8, channels)
    if channels % groups:
        raise ValueError(f"group norm: {channels} channels cannot be divided into {groups} groups; "
                         "take a multiple of 8")
    return nn.GroupNorm(groups, channels)


NORMS["group"] = group_norm                                          # the other value of `norm`

# ---- Hash embedding (App. B.3, Eq. 9 to 11) -----------------------------------------------------
class HashEmbedding(nn.Module):
    """An embedding put together from pieces of shared codebooks, for very many objects.

    Piece i of object k is row m_i(k) of codebook i, m_i(k) = ((a_i k) mod 2^32) >> (32 - r) for
    codebooks of 2^r rows (multiplicative hashing; Eq. 9 to 11). AMBIGUOUS: the paper's text swaps
    its symbols n_c and n_h between definition and values, so here they are words:
      codebooks  pieces per embedding (256; each piece has dim / codebooks numbers)
      rows       entries per codebook, a power of two (256, 8192 or 32768)
    rule "paper": a_i = 2^31 + 2 i^2 + 1 as printed. TRAP: all of these lie just above 2^31, so
    objects k and k + 2 share almost every piece: of 1,676 objects only 1,176 embeddings differ.
    rule "spread" (OURS, the default): random odd a_i in [2^31, 2^32) from a fixed seed.
    raises ValueError where dim, rows or rule do not fit
    """

    def __init__(self, n_objects, dim, codebooks=256, rows=256, rule="spread"):
        super().__init__()
        if dim % codebooks:
            raise ValueError(f"dim {dim} must be a multiple of codebooks {codebooks}")
        bits = int(math.log2(rows)) if rows > 0 else 0               # r of Eq. 10
        if bits < 1 or 2**bits != rows:
            raise ValueError(f"rows must be a power of two, got {rows}")
        self.n_objects = n_objects
        self.shift = 32 - bits
        # Not in checkpoints: what a fixed rule gives need not be stored.
        self.register_buffer("a", hash_multipliers(codebooks, rule), persistent=False)
        self.table = nn.Parameter(torch.randn(codebooks, rows, dim // codebooks))

    @classmethod
    def from_settings(cls, settings, n_objects):
        return cls(n_objects, settings.embed_dim, settings.codebooks, settings.rows,
                   settings.hash_rule)

    def row_indices(self, k):
        """m_i(k) of every codebook (Eq. 10): k (B,) int64 -> (B, codebooks) int64."""
        # a < 2^32 and k < 2^31, so the product fits in the 63 bits of int64.
        product = self.a * k[:, None]
        modulo = product & 0xFFFFFFFF                                # mod 2^32: the lower 32 bits
        return modulo >> self.shift                                  # of these the upper r

    def forward(self, k):
        """k (B,) int64 in 0..N-1 -> e (B, dim)."""
        codebook = torch.arange(len(self.a), device=k.device)
        pieces = self.table[codebook, self.row_indices(k)]           # (B, codebooks, piece)
        return pieces.flatten(1)                                     # side by side


def hash_multipliers(codebooks, rule):
    """a_i of Eq. 11, odd numbers in [2^31, 2^32). -> (codebooks,) int64."""
    if rule == "paper":
        i = torch.arange(codebooks, dtype=torch.int64)
        return 2**31 + 2 * i**2 + 1
    if rule == "spread":
        generator = torch.Generator().manual_seed(0)
        return 2**31 + 2 * torch.randint(2**30, (codebooks,), generator=generator) + 1
    raise ValueError(f"rule must be 'paper' or 'spread', got {rule!r}")


# ---- What Eq. 1 may compare: VGG-19, or random filters ------------------------------------------

# Widths of 3x3 convolutions, each with a ReLU; "M" halves the side and begins the next stage.
VGG19_PLAN = (64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512)
VGG19_FILE = "vgg19-dcbb9e9d.pth"      # torchvision's ImageNet weights, by their public name


class VGGFeatures(nn.Module):
    """VGG up to stage 5: (B, 3, H, W) in [0, 1] -> list of one map a stage.

    weights  dict in torchvision's layout ("features.0.weight", ...)
    plan     widths of the layers; VGG-19, for Eq. 1, as it stands
    tap      which ReLU of a stage: 0 the first (PAPER: relu1_1, 2_1, 3_1, 4_1, 5_1), -1 the last
    Maps that pooling would shrink below one pixel are left out, so that small pictures work.
    raises ValueError where the weights do not have the names or shapes of the plan
    """

    def __init__(self, weights, plan=VGG19_PLAN, tap=0):
        super().__init__()
        self.tap = tap
        self.features = nn.Sequential()
        c_in = 3
        for width in plan:
            if width == "M":
                self.features.append(nn.MaxPool2d(2))
            else:
                self.features.append(nn.Conv2d(c_in, width, 3, padding=1))
                self.features.append(nn.ReLU())
                c_in = width
        own = self.state_dict()
        for name, value in own.items():
            if name not in weights or weights[name].shape != value.shape:
                raise ValueError(f"not VGG's weights: {name} should be {tuple(value.shape)}")
        self.load_state_dict({name: weights[name] for name in own})
        # Of ImageNet's pictures, to which these weights are used.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, image):
        x = (image - self.mean) / self.std
        stages = [[]]                                # of every stage, what its ReLUs return
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                if min(x.shape[-2:]) < 2:
                    break
                stages.append([])
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                stages[-1].append(x)
        return [maps[self.tap] for maps in stages]


class RandomFeatures(nn.Module):
    """Five random convolutional layers from a fixed seed: (B, 3, H, W) -> list of maps.

    OURS: what can be had without any download. Random filters still answer to edges, corners and
    textures (Saxe et al. 2011, "On random weights and unsupervised feature learning"; Ulyanov et
    al. 2018, "Deep image prior"), so distances between their maps see structure, not only pixels.
    """

    def __init__(self, widths=(16, 32, 64, 64, 64), seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList()
        c_in = 3
        for width in widths:
            layer = nn.Conv2d(c_in, width, 3, padding=1, padding_mode="replicate")
            spread = math.sqrt(2 / (9 * c_in))       # He's: the same spread from layer to layer
            with torch.no_grad():
                layer.weight.normal_(0, spread, generator=generator)
                layer.bias.uniform_(-0.1, 0.1, generator=generator)
            self.layers.append(layer)
            c_in = width

    def forward(self, image):
        x = image * 2 - 1
        maps = []
        for layer in self.layers:
            x = F.relu(layer(x))
            maps.append(x)
            if min(x.shape[-2:]) < 2:
                break
            x = F.avg_pool2d(x, 2)
        return maps


def pixels(image):
    """The picture itself. (B, 3, H, W) -> list of one map."""
    return [image]


def build_features(name, device):
    """The f of Eq. 1: by name, or from a file of VGG-19's weights. raises BadInput for others."""
    if name == "pixels":
        return pixels
    if name == "gradients":
        return pixels_and_gradients
    if name == "random":
        return RandomFeatures().requires_grad_(False).to(device)
    path = Path(name)
    if not path.is_file():
        raise BadInput(f"--perceptual {name}: not pixels, gradients, random, nor a file; VGG-19 "
                       f"weights are torchvision's {VGG19_FILE}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        return VGGFeatures(weights).requires_grad_(False).to(device)
    except ValueError as error:
        raise BadInput(f"--perceptual {name}: {error}; expected torchvision's "
                       f"{VGG19_FILE}") from None
    except Exception as error:                       # the loader of a damaged file raises anything
        raise BadInput(f"--perceptual {name}: not a file of weights ({type(error).__name__}); "
                       f"expected torchvision's {VGG19_FILE}") from None


# ---- Perspective-n-Point (App. B.1): from matches of 2D and 3D points to a pose -----------------
#
#     min over R, t of  sum_k |project(R X_k + t) - x_k|^2,     project(a, b, c) = (a / c, b / c)
#
# The camera here looks along +z, x right, y down. Five steps: normalize the points; guess, as if
# the camera were far away; improve (Gauss-Newton); take one last step, the only one that gradients
# flow through; undo the normalization. Read solve_pnp first, at the end.
#     X 3D points   Y normalized   Z = R Y turned   x 2D points   seen where Y is seen, to become x
#     r = seen - x   J = dr / dd   d a small step of the pose   g gradient   H curvature (Hessian)
# OURS: the paper takes EPnP. TRAP: that differentiates null vectors, whose gradient is infinite
# where singular values meet, as they do when predicted points draw together.


class ScaledPose(NamedTuple):
    """A pose of normalized points Y, in numbers that stay near 1 and do not blow up far away.

    A point goes to R Y + (u, 1) / rho. So rho is the size of the points over their distance, and u
    is where their middle is seen. As rho goes to 0, the camera moves away to infinity.
    """
    R: torch.Tensor                              # (B, 3, 3) rotation
    rho: torch.Tensor                            # (B, 1)
    u: torch.Tensor                              # (B, 2)


def cayley(h):
    """Rotation by 2 atan |h| about h: I + 2 ([h] + [h]^2) / (1 + h.h). h (..., 3) -> (..., 3, 3).

    Rational, so orthogonal for every h and, unlike Rodrigues' formula, without 0 / 0 at h = 0.
    """
    x, y, z = h.unbind(-1)
    o = torch.zeros_like(x)
    rows = [o, -z, y, z, o, -x, -y, x, o]
    cross = torch.stack(rows, dim=-1).unflatten(-1, (3, 3))          # [h]: [h] v = h x v
    eye = torch.eye(3, dtype=h.dtype, device=h.device)
    square = h.square().sum(-1)[..., None, None]                     # h.h
    return eye + 2 * (cross + cross @ cross) / (1 + square)


def normalize_points(X):
    """X (B, K, 3) -> Y = (X - c) / s, their middle c (B, 1, 3), their spread s (B, 1)."""
    c = X.mean(1, keepdim=True)
    variance = (X - c).square().sum(-1).mean(1, keepdim=True)
    s = (variance + 1e-4).sqrt()                 # never 0, even where all points are one
    return (X - c) / s[..., None], c, s


def see(pose, Y):
    """Where points Y (B, K, 3) are seen from a ScaledPose.

    Z = R Y,  depth = 1 + rho Z_z,  seen = (rho Z_xy + u) / depth: the point R Y + (u, 1) / rho, all
    of it times rho, which cancels. -> Z (B, K, 3), depth (B, K, 1), seen (B, K, 2)
    """
    rho = pose.rho[:, None]                                          # (B, 1, 1)
    u = pose.u[:, None]                                              # (B, 1, 2)
    Z = Y @ pose.R.mT
    depth = 1 + rho * Z[..., 2:]
    seen = (rho * Z[..., :2] + u) / depth
    return Z, depth, seen


def move(pose, d):
    """The pose after a small step d (..., 6): a turn (3), a change of rho (1), and of u (2)."""
    turn, d_rho, d_u = d.split([3, 1, 2], dim=-1)
    R = cayley(turn / 2) @ pose.R                # by about |turn| radians about the axis `turn`
    return ScaledPose(R, pose.rho + d_rho, pose.u + d_u)


def residual_and_jacobian(pose, Y, x):
    """r = seen - x, which is to become small, and J = dr / dd at d = 0, d as in move.

    seen = P_xy / P_z with P = rho Z + (u, 1). A small change dP of P changes it, by the quotient
    rule, by (dP_xy - seen dP_z) / P_z = a dP, where a has two rows:
        a_x = (1, 0, -seen_x) / depth        a_y = (0, 1, -seen_y) / depth
    And P changes with each of the six numbers of d:
        a turn w     dP = rho w x Z    so a dP = rho a.(w x Z) = rho w.(Z x a)    3 columns
        d_rho        dP = Z            so a dP = a Z                              1 column
        d_u          dP = (d_u, 0)     so a dP = d_u / depth                      2 columns
    returns r (B, 2K), J (B, 2K, 6): of every point x and y
    """
    Z, depth, seen = see(pose, Y)
    r = seen - x                                                     # (B, K, 2)
    Z = Z[:, :, None]                                                # (B, K, 1, 3) beside rows of a
    depth = depth[..., None]                                         # (B, K, 1, 1)
    rho = pose.rho[:, None, None]                                    # (B, 1, 1, 1)
    eye = torch.eye(2, dtype=Y.dtype, device=Y.device).expand(*seen.shape, 2)
    a = torch.cat([eye, -seen[..., None]], dim=-1) / depth           # (B, K, 2, 3)
    by_turn = torch.linalg.cross(Z.expand_as(a), a) * rho            # (B, K, 2, 3)
    by_rho = a @ Z.mT                                                # (B, K, 2, 1)
    by_u = eye / depth                                               # (B, K, 2, 2)
    J = torch.cat([by_turn, by_rho, by_u], dim=-1)                   # (B, K, 2, 6)
    return r.flatten(1), J.flatten(1, 2)


def largest_scale(Y, c, s):
    """The largest rho that is allowed (B, 1): the camera stays outside the ball of all points.

    Then every point, and the origin of X, has depth 1 + rho Z_z >= 0.1, never 0 or negative.
    """
    point = Y.norm(dim=-1).amax(1, keepdim=True)
    origin = c.norm(dim=-1) / s
    return 0.9 / torch.maximum(point, origin).clamp(min=1)


def scaled_orthography(Y, x, rho_max):
    """Two first guesses, as if the camera were far away (DeMenthon & Davis 1995, POSIT).

    Then depth is 1 and x = A Y + u, linear in A = rho (first two rows of R): least squares. Flat
    points leave A blind along their normal: there are two poses to every picture, one the mirror
    image of the other in depth. So both are tried. -> two ScaledPoses
    """
    K = Y.shape[1]
    u = x.mean(1)                                                    # Y has mean 0
    # A = (x - u)^T Y (Y^T Y)^-1, the inverse by eigenvalues lam and eigenvectors V; a ridge keeps
    # it finite for flat points, whose smallest eigenvalue, the first, is 0.
    lam, V = torch.linalg.eigh(Y.mT @ Y / K)                         # (B, 3), (B, 3, 3)
    ridge = 1e-3
    correlation = (x - u[:, None]).mT @ Y / K                        # (B, 2, 3)
    A = correlation @ (V / (lam + ridge)[:, None]) @ V.mT            # (B, 2, 3)
    # Where all 2D points are equal, A = 0 says nothing: start at R = I, not at chance.
    A = A + 1e-5 * torch.eye(2, 3, dtype=x.dtype, device=x.device)
    # What is missing along the flattest direction V_0 is q V_0^T. The rows of A + q V_0^T are rho
    # times two rows of a rotation, equally long and perpendicular: times its own transpose, it is
    # rho^2 I. As A V_0 = 0, that says A A^T + q q^T = rho^2 I; with A = U S Vh there are two
    # solutions, q = +-sqrt(S_0^2 - S_1^2) U_1.
    U, S, _ = torch.linalg.svd(A, full_matrices=False)
    length = (S[:, 0]**2 - S[:, 1]**2).clamp(min=0).sqrt()           # (B,)
    taken = length * ridge / (lam[:, 0] + ridge)                     # the ridge's share of it
    q = taken[:, None] * U[:, :, 1]                                  # (B, 2)
    correction = q[:, :, None] * V[:, None, :, 0]                    # (B, 2, 3)
    return (orthographic_pose(A + correction, u, rho_max),
            orthographic_pose(A - correction, u, rho_max))


def orthographic_pose(A, u, rho_max):
    """The pose whose rho (first two rows of R) is nearest to A (B, 2, 3)."""
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    rows = U @ Vh                                                    # nearest orthonormal rows
    third = torch.linalg.cross(rows[:, :1], rows[:, 1:])             # right-handed: r3 = r1 x r2
    rho = S.mean(1, keepdim=True)
    return ScaledPose(torch.cat([rows, third], dim=1), rho.minimum(rho_max), u)


def gauss_newton_step(pose, Y, x, rho_max, floor):
    """A better pose: r + J d is the residual after a small step d; least squares gives the best d.

        d = -(J^T J / K + mu I)^-1 J^T r / K
        mu = floor^2 + |r|^2 / K^2 + eps trace(J^T J / K)
    mu is the least curvature that is believed in (Levenberg-Marquardt). Points that are wrong by r
    leave the pose unsure by about sqrt(|r|^2 / K^2 H^-1), H = J^T J / K: where this is beyond a
    radian, mu outweighs H, and the pose stays.

    Y (B, K, 3), x (B, K, 2)   points, and where they are seen
    rho_max (B, 1)             of the nearest camera that is allowed
    floor                      a number: mu is its square at least, however well the points agree
    returns                    the better pose; error = |r|^2 (B,), mu (B, 1, 1) of the one given
    """
    K = x.shape[1]
    r, J = residual_and_jacobian(pose, Y, x)                         # (B, 2K), (B, 2K, 6)
    g = (J.mT @ r[..., None])[..., 0] / K                            # (B, 6) gradient
    H = J.mT @ J / K                                                 # (B, 6, 6) curvature
    error = r.square().sum(1)                                        # (B,)
    rounding = torch.finfo(x.dtype).eps * H.diagonal(dim1=1, dim2=2).sum(1)
    mu = (floor**2 + error / K**2 + rounding)[:, None, None]
    eye = torch.eye(6, dtype=x.dtype, device=x.device)
    d = -torch.linalg.solve(H + mu * eye, g)
    moved = move(pose, d)
    rho = moved.rho.clamp(min=0).minimum(rho_max)
    return ScaledPose(moved.R, rho, moved.u), error, mu


def refine(pose, Y, x, rho_max, steps, floor):
    """Gauss-Newton, as in EPnP's last stage (Lepetit et al. 2009). Returns what one step does.

    So error and mu are those before the last step, which hardly moves the pose any more.
    """
    for _ in range(steps):
        pose, error, mu = gauss_newton_step(pose, Y, x, rho_max, floor)
    return pose, error, mu


def choose_better(first, second):
    """Of two results of refine, for every object the one with less error -> pose, mu."""
    pose1, error1, mu1 = first
    pose2, error2, mu2 = second
    is_second = error2 < error1                                      # (B,)
    R = torch.where(is_second[:, None, None], pose2.R, pose1.R)
    rho = torch.where(is_second[:, None], pose2.rho, pose1.rho)
    u = torch.where(is_second[:, None], pose2.u, pose1.u)
    mu = torch.where(is_second[:, None, None], mu2, mu1)
    return ScaledPose(R, rho, u), mu


def error_gradient(pose, Y, x):
    """g = J^T r / K: half the gradient of the mean |r_k|^2 to the six numbers of move. (B, 6)."""
    r, J = residual_and_jacobian(pose, Y, x)
    return (J.mT @ r[..., None])[..., 0] / x.shape[1]


def last_newton_step(pose, Y, x, mu):
    """One more step, d = -H^-1 g, and the only one that gradients pass through.

    At the minimum g = 0, so d is all but 0: the step hardly moves the pose. But it has the right
    derivative. When the points change a little, the minimum moves so that g stays 0: H dd + dg = 0,
    dd = -H^-1 dg (implicit function theorem). This needs neither the way to the minimum nor the
    memory of it, so pose and H count as constants. H here is exact, with the second derivatives of
    r, which Gauss-Newton leaves out; no curvature is taken to be below mu, so gradients are finite.
    """
    def gradient_after(step):
        return error_gradient(move(pose, step), Y, x)

    with torch.no_grad():
        H = torch.func.jacfwd(gradient_after)(x.new_zeros(6))        # (B, 6, 6)
        lam, Q = torch.linalg.eigh((H + H.mT) / 2)                   # (B, 6), (B, 6, 6)
        curvature = lam.abs()[:, None].maximum(mu)                   # (B, 1, 6)
        inverse = Q / curvature @ Q.mT                               # (B, 6, 6)
    g = error_gradient(pose, Y, x)                                   # (B, 6)
    d = -(inverse @ g[..., None])[..., 0]
    return move(pose, d)


def undo_normalization(pose, c, s, rho_max, scale_floor):
    """The pose of the points themselves: R X + t = s (R Y + (u, 1) / rho). -> R, t."""
    # TRAP: d(1 / rho) / d rho = -1 / rho^2 explodes when the picture shrinks to a point. So below 2
    # scale_floor rho follows a parabola: it stays above scale_floor, and its gradient still says
    # "come nearer".
    rho = pose.rho.clamp(min=0)
    parabola = scale_floor + rho**2 / (4 * scale_floor)              # meets rho with slope 1
    rho = torch.where(rho < 2 * scale_floor, parabola, rho).minimum(rho_max)
    middle = torch.cat([pose.u, torch.ones_like(rho)], dim=1) * s / rho      # where c is, (B, 3)
    t = middle - (pose.R @ c.mT)[..., 0]
    return pose.R, t


def solve_pnp(points3d, points2d, steps=8, floor=3e-4, scale_floor=5e-3):
    """The pose that carries 3D points onto 2D points: x_k = (R X_k + t)_xy / (R X_k + t)_z.

    points3d (B, K, 3)  lengths near 1; K >= 4
    points2d (B, K, 2)  x / z and y / z in the camera
    steps of Gauss-Newton; floor: mu is at least its square; scale_floor: rho is at least that
    returns R (B, 3, 3) rotation, t (B, 3) with t_z > 0, with gradients to both kinds of points
    raises ValueError on other shapes
    """
    is_3d = points3d.ndim == 3 and points3d.shape[1] >= 4 and points3d.shape[2] == 3
    if not is_3d or points2d.shape != (*points3d.shape[:2], 2):
        raise ValueError(f"points3d {tuple(points3d.shape)} and points2d {tuple(points2d.shape)} "
                         "must be (B, K, 3) and (B, K, 2), K >= 4")
    Y, c, s = normalize_points(points3d)
    with torch.no_grad():
        rho_max = largest_scale(Y, c, s)
        first, second = scaled_orthography(Y, points2d, rho_max)
        first = refine(first, Y, points2d, rho_max, steps, floor)
        second = refine(second, Y, points2d, rho_max, steps, floor)
        pose, mu = choose_better(first, second)
    pose = last_newton_step(pose, Y, points2d, mu)
    return undo_normalization(pose, c, s, rho_max, scale_floor)


# ---- Learned poses (Sec. 3.2, App. B.1): a frame -> where each part is --------------------------
def convolution(c_in, c_out, stride=1):
    """3x3, group norm, ReLU. (n, c_in, H, W) -> (n, c_out, H / stride, W / stride)."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), group_norm(c_out), nn.ReLU())


def pixel_middles(n, device):
    """Middles of n pixels side by side, from -1 to 1: (n,)."""
    return (torch.arange(n, device=device) + 0.5) * 2 / n - 1


def soft_argmax(heat):
    """Mean position of heat maps (..., h, w) that sum to 1 -> (..., 2) x, y in [-1, 1], y down.

    The position of the largest value has no gradient; the mean, weighted with all values, has one.
    """
    h, w = heat.shape[-2:]
    across = heat.sum(-2)                                            # (..., w)
    down = heat.sum(-1)                                              # (..., h)
    x = (across * pixel_middles(w, heat.device)).sum(-1)
    y = (down * pixel_middles(h, heat.device)).sum(-1)
    return torch.stack([x, y], dim=-1)


class KeypointNet(nn.Module):
    """A 2D U-Net with soft-argmax: frames (n, 3, 64, 64) -> n_points positions (n, n_points, 2).

    Positions are in half widths of the picture, x right, y down, 0 in its middle. SIMPLIFIED: heat
    maps of 16 x 16, and a temperature of 0.5 (the predecessor: 0.1, on finer maps).
    """

    def __init__(self, n_points, width=32, temperature=0.5):
        super().__init__()
        self.temperature = temperature
        self.down = nn.ModuleList([
            convolution(3, width, stride=2),                         # 32 x 32
            convolution(width, 2 * width),                           # 16 x 16
            convolution(2 * width, 4 * width),                       # 8 x 8
            convolution(4 * width, 4 * width)])                      # 4 x 4
        self.up = nn.ModuleList([
            convolution(4 * width + 4 * width, 4 * width),           # 8 x 8
            convolution(4 * width + 2 * width, 2 * width)])          # 16 x 16
        self.heat = nn.Conv2d(2 * width, n_points, 1)

    def forward(self, frames):
        """frames (n, 3, 64, 64) in [0, 1] -> 2D points (n, n_points, 2) in half widths."""
        x = 2 * frames - 1
        skips = []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = skips.pop()                                              # the lowest, not yet pooled
        for layer in self.up:
            x = F.interpolate(x, scale_factor=2.0)
            x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x)
        logits = self.heat(x) / self.temperature                     # (n, n_points, 16, 16)
        heat = logits.flatten(2).softmax(-1).reshape(logits.shape)   # sums to 1 over each map
        return soft_argmax(heat)


class PoseNet(nn.Module):
    """Frame -> camera of each of P rigid parts, from 2D points seen and 3D points learned.

    A part that moves before a camera that stands still is the same as a part that stands still
    before a camera that moves: so the pose of a part is given as a camera of its own.

    parts, points   P; K for each part (a cube number: they start on a grid)
    focal           as a fraction of the picture's side (5.7: the paper's 0.175 rad)
    body            half axes of the ellipsoid that the subject starts as

    OURS: what soft-argmax returns is not used as it is. At first it says nothing, PnP makes
    nonsense of nothing, and nothing is learned. Its deviation from its own mean is added to where
    the 3D points would be seen at the default pose (upright, in front): all frames start from
    there. TRAP: that also fixes the gauge, which no loss does: the average pose is the default.
    """

    def __init__(self, parts, points, focal, body, width=32, temperature=0.5):
        super().__init__()
        side = round(points ** (1 / 3))
        if side**3 != points or side < 2:
            raise ValueError(f"keypoints {points} must be a cube: 8, 27, 64, 125")
        self.focal = focal
        self.half = 0.5 / focal                        # half a picture's width at depth 1
        self.distance = 1 / (0.95 * self.half)         # the cube's width is 95 % of the picture's
        ticks = torch.linspace(-1, 1, side)
        grid = torch.cartesian_prod(ticks, ticks, ticks)                     # (K, 3)
        # OURS: flat, depth +-0.2: 2D points then have less to say about depth, which nobody knows.
        grid = grid * torch.tensor([body[0], body[1], 0.2])
        self.canonical = nn.Parameter(grid.repeat(parts, 1, 1))              # (P, K, 3)
        self.keypoints = KeypointNet(parts * points, width, temperature)
        self.register_buffer("mean", torch.zeros(parts, points, 2))          # of the 2D points
        self.register_buffer("batches", torch.tensor(0))                     # in that mean
        self.register_buffer("active", torch.tensor(1))                      # parts in use
        # From this project's axes (y up, looking along -z) to PnP's (y down, looking along +z).
        self.register_buffer("flip", torch.tensor([1.0, -1, -1]), persistent=False)

    @classmethod
    def from_settings(cls, settings):
        return cls(settings.parts, settings.keypoints, settings.focal, settings.body,
                   settings.pose_width)

    def _apply(self, change, recurse=True):
        """What .to(device) does to all that a module holds. The two counters stay on the CPU: they
        are read in every step, and to read a number from a GPU is to wait for it."""
        counters = self.batches, self.active
        super()._apply(change, recurse)
        self.batches, self.active = counters
        return self

    def points2d(self, frames):
        """(n, 3, 64, 64) -> (n, P, K, 2) in half widths."""
        return self.keypoints(frames).unflatten(1, self.canonical.shape[:2])

    def project(self, R, t):
        """The first P parts' points under poses R (n, P, 3, 3), t (n, P, 3) -> (n, P, K, 2)."""
        parts = R.shape[1]
        X = self.canonical[:parts] * self.flip
        in_camera = X @ R.mT + t[..., None, :]                               # (n, P, K, 3)
        return in_camera[..., :2] / (in_camera[..., 2:] * self.half)

    def default_points(self):
        """Where the 3D points of all parts are seen upright and in front: (1, P, K, 2)."""
        parts = len(self.canonical)
        R = torch.eye(3, device=self.flip.device).expand(1, parts, 3, 3)
        t = self.flip.new_tensor([0, 0, self.distance]).expand(1, parts, 3)
        return self.project(R, t)

    def mean_points(self, u, settled):
        """What is subtracted from the raw 2D points u (n, P, K, 2): their mean -> (P, K, 2)."""
        if settled or not self.training:
            return self.mean
        mean = u.mean(0)
        with torch.no_grad():
            self.batches += 1
            share = max(0.05, 1 / int(self.batches))   # a plain mean at first, then a running one
            self.mean.lerp_(mean, share)
        return mean

    def solve(self, seen):
        """PnP for every part of every frame: seen (n, P, K, 2) -> R (n, P, 3, 3), t (n, P, 3)."""
        n, parts = seen.shape[:2]
        X = (self.canonical[:parts] * self.flip).expand(n, -1, -1, -1)
        R, t = solve_pnp(X.flatten(0, 1), (seen * self.half).flatten(0, 1), steps=4)
        return R.unflatten(0, (n, parts)), t.unflatten(0, (n, parts))

    def to_cam2world(self, R, t):
        """PnP's R X + t -> this project's cameras (n, P, 4, 4): R^T, and -R^T t, flipped."""
        turn = self.flip[:, None] * R.mT * self.flip                         # (n, P, 3, 3)
        position = -(turn @ (self.flip * t)[..., None])                      # (n, P, 3, 1)
        upper = torch.cat([turn, position], dim=-1)
        lower = t.new_tensor([0, 0, 0, 1]).expand(*t.shape[:2], 1, 4)
        return torch.cat([upper, lower], dim=-2)

    def forward(self, frames, settled=False):
        """frames (n, 3, 64, 64) -> cam2world (n, P, 4, 4) of the active parts; the raw 2D points
        (n, all parts, K, 2); losses (a dict of scalars).

        settled: subtract the running mean, as in evaluation, not the mean of these frames
        Losses: reprojection (the predecessor's); OURS, against a drift of all poses together:
        centre (the raw points' mean stays near the default pose) and distance (so does depth).
        """
        parts = int(self.active)
        u = self.points2d(frames)                                            # (n, all parts, K, 2)
        default = self.default_points()                                      # (1, all parts, K, 2)
        seen = u - self.mean_points(u, settled) + default
        seen = seen[:, :parts]
        R, t = self.solve(seen)

        missed = self.project(R, t) - seen
        drift = (u.mean(0, keepdim=True) - default)[:, :parts]
        nearness = (t[..., 2] / self.distance).log()
        losses = {"reprojection": missed.abs().mean(),
                  "centre": drift.abs().mean(),
                  "distance": nearness.abs().mean()}
        return self.to_cam2world(R, t), u, losses

    @torch.no_grad()
    def split(self, noise=0.02):
        """One part becomes P: all get its points and heat maps, a little noise tells them apart."""
        parts = len(self.canonical)
        weight = self.keypoints.heat.weight.data.unflatten(0, (parts, -1))   # (P, K, C, 1, 1)
        bias = self.keypoints.heat.bias.data.unflatten(0, (parts, -1))       # (P, K)
        for value in (self.canonical.data, self.mean, weight, bias):
            value[1:] = value[:1]
        for value in (weight, bias):
            value += noise * value.std() * torch.randn_like(value)
        self.active.fill_(parts)


def equivariance_loss(points2d, frames, u, generator):
    """Mean |A u(A frame) - u(frame)|: what moves with the picture is seen to move with it.

    points2d  maps frames (n, 3, H, W) to (n, ..., 2) in half widths; u = points2d(frames)
    A         a random rotation (+-17 degrees), scale (+-15 %) and shift (+-0.15) of every frame
    """
    chance = (torch.rand(4, len(u), generator=generator) - 0.5).to(u)        # (4, n) +-0.5
    angle = 0.6 * chance[0]
    scale = 1 + 0.3 * chance[1]
    x = 0.3 * chance[2]
    y = 0.3 * chance[3]
    cos = angle.cos() * scale
    sin = angle.sin() * scale
    A = torch.stack([cos, -sin, x, sin, cos, y], dim=-1).unflatten(-1, (2, 3))
    # affine_grid says where each pixel of the warped frame comes FROM: A maps its points back.
    grid = F.affine_grid(A, frames.shape, align_corners=False)
    warped = F.grid_sample(frames, grid, align_corners=False)
    found = points2d(warped).flatten(1, -2)                                  # (n, P K, 2)
    back = found @ A[:, :, :2].mT + A[:, None, :, 2]
    return (back - u.flatten(1, -2)).abs().mean()


# ---- The decoder of what moves (Sec. 3.2, App. B.1) ---------------------------------------------
def skinned_channels(parts):
    """Channels of a volume of P parts: density, colours, and skinning where there are several."""
    if parts > 1:
        return 4 + parts
    return 4


class MovingDecoder(AutoDecoder):
    """The decoder of subjects made of P rigid parts, each of which has a pose in every frame.

    Channels 4 to 3 + P of its volumes are skinning logits, the paper's V_lbs (for P > 1): their
    softmax says how much of a voxel follows part p. All stand in one canonical pose.

    OURS: poses and paint are learned together, and each spoils the other. So a subject starts as
    an ellipsoid that is only painted, and train.py lets shape and fine levels come in later:
      growth  share in [0, 1] of the learned density that is added to the ellipsoid's
      detail  (levels,) share in [0, 1] of every level that is in use; see faded
    Both are buffers, so that they are in the checkpoint.

    parts        P, from 1 on
    half_axes    of that ellipsoid; empty: it starts as fog
    skin_layout  parts start spread over it, or over one of half axes `reach`, not all alike
    sizes        embed_dim to norm, as AutoDecoder takes them
    """

    def __init__(self, embedding, parts, half_axes=(), skin_layout=True, reach=(), **sizes):
        super().__init__(embedding, out_channels=skinned_channels(parts), **sizes)
        prior = volume_prior(self.volume_side, parts, half_axes, skin_layout, reach)
        prior = prior.contiguous(memory_format=torch.channels_last_3d)
        self.register_buffer("prior", prior)
        self.register_buffer("growth", torch.tensor(1.0))
        self.register_buffer("detail", torch.ones(len(self.levels), device="cpu"))

    @classmethod
    def from_settings(cls, settings, n_objects, embedding=None):
        """As of AutoDecoder."""
        half_axes = settings.body if settings.ellipsoid else ()
        return super().from_settings(
            settings, n_objects, embedding, parts=settings.parts, half_axes=half_axes,
            skin_layout=settings.skin_layout, reach=settings.reach)

    def _apply(self, change, recurse=True):
        """What .to(device) does. `detail` stays on the CPU: faded reads it, see PoseNet._apply."""
        detail = getattr(self, "detail", None)         # AutoDecoder is built before there is one
        super()._apply(change, recurse)
        if detail is not None:
            self.detail = detail
        return self

    def decode_raw(self, latent):
        """The convolutions of G2, and the prior: latent -> (B, 4 or 4 + P, D, H, W), any number."""
        x = latent.contiguous(memory_format=torch.channels_last_3d)
        for i in range(self.cut, len(self.levels)):
            x = faded(self.levels[i], x, float(self.detail[i]))
        x = self.head(x)
        grown = x[:, :1] * self.growth
        return torch.cat([grown, x[:, 1:]], dim=1) + self.prior

    def activate(self, raw):
        """The rest of G2: -> density >= 0 per world unit, colours in [0, 1], skinning logits."""
        density = F.softplus(raw[:, :1]) * (self.volume_side / 2)
        # The fog around the ellipsoid would be seen against it: it comes in as its density grows.
        is_ellipsoid = self.prior[:, :1] >= -3
        density = density * torch.where(is_ellipsoid, 1.0, self.growth)
        rgb = torch.sigmoid(raw[:, 1:4])
        return torch.cat([density, rgb, raw[:, 4:]], dim=1)


def faded(level, x, share):
    """level(x) of a level that has come in by its share in [0, 1]; at 0 it only enlarges x.

    OURS: a coarse volume blurs what it shows, so that even far too small a turn finds the way
    downhill. Enlarged smoothly, not by repetition: edges between blocks would be detail again.
    """
    if share == 1:
        return level(x)
    coarse = F.interpolate(level[0].shortcut(x), scale_factor=2, mode="trilinear")
    if share == 0:
        return coarse
    return torch.lerp(coarse, level(x), share)


def volume_prior(side, parts, half_axes, skin_layout, reach=()):
    """What the network's output is added to: (1, 4 + P, side, side, side), 4 for one part.

    Density before its softplus: an opaque ellipsoid of these half axes; without any, -3, thin fog.
    OURS: what is seen then lies in front from the start. That decides the sign of yaw, which
    nothing else does under so long a lens.
    Skinning logits of part p: -8 |x - c_p|^2, the c_p spread over the ellipsoid, or over another of
    half axes `reach`; all 0 without skin_layout. OURS: without this layout parts blur.
    """
    position = voxel_positions(side)                                         # (D, H, W, 3)
    prior = torch.zeros(skinned_channels(parts), side, side, side)
    prior[0] = -3
    if half_axes:
        radius = (position / torch.tensor(half_axes)).norm(dim=-1)           # 1 on the surface
        # A tenth of the radius is one unit of logit; not below -5: limbs must be able to grow.
        prior[0] = (10 - 10 * radius).clamp(-5, 3)
    if parts > 1 and skin_layout:
        middles = spread_points(parts, reach or half_axes or (0.5, 0.8, 0.5))
        for p in range(parts):
            prior[4 + p] = -8 * (position - middles[p]).square().sum(-1)
    return prior[None]


def voxel_positions(side):
    """Middles of the voxels of a volume in [-1, 1]^3: (D, H, W, 3), x y z."""
    middles = (torch.arange(side) + 0.5) * 2 / side - 1
    z, y, x = torch.meshgrid(middles, middles, middles, indexing="ij")
    return torch.stack([x, y, z], dim=-1)


def spread_points(n, half_axes, rounds=20):
    """n points (n, 3) spread evenly in an ellipsoid: the middles of n clusters (Lloyd, k-means)."""
    cloud = torch.randn(4096, 3, generator=torch.Generator().manual_seed(0))
    # The norm of a random point in a ball is the cube root of a uniform number.
    norm = torch.rand(4096, 1, generator=torch.Generator().manual_seed(1)) ** (1 / 3)
    cloud = cloud / cloud.norm(dim=1, keepdim=True) * norm * torch.tensor(half_axes)
    middles = cloud[:n]
    for _ in range(rounds):
        nearest = torch.cdist(cloud, middles).argmin(1)                      # (4096,)
        member = (nearest[:, None] == torch.arange(n)).float()               # (4096, n) 0 or 1
        middles = member.T @ cloud / member.sum(0)[:, None]                  # (n, 3)
    return middles


def usage_loss(volume):
    """Keeps every part in use: how far the share of each part in the density is below half of 1/P.

    volume (B, 4 + P, D, H, W)
    """
    density = volume[:, :1]                                                  # (B, 1, D, H, W)
    skin = volume[:, 4:].softmax(1)                                          # (B, P, D, H, W)
    whole = density.sum((2, 3, 4)).clamp(min=1e-6)                           # (B, 1)
    used = (density * skin).sum((2, 3, 4)) / whole                           # (B, P) sums to 1
    parts = used.shape[1]
    return F.relu(0.5 - used * parts).mean()


# ---- The decoder of all settings ----------------------------------------------------------------
def build_decoder(settings, n_objects):
    """The decoder that settings describe: rigid or moving, with a table or a hash embedding."""
    embedding = None                                                 # a table
    if settings.codebooks:
        embedding = HashEmbedding.from_settings(settings, n_objects)
    kind = MovingDecoder if settings.parts else AutoDecoder
    return kind.from_settings(settings, n_objects, embedding)
