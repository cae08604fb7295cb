"""The number of an object goes in; its voxel grid of density and colour comes out. Stage 1.

Paper: Sec. 3.1 and App. B.1 (the decoder G = G2 . G1), App. B.3 Eq. 9 to 11 (hash embedding),
Sec. 3.2 Eq. 1 (pyramidal perceptual loss) and Eq. 2 (foreground loss).

An AUTOdecoder has no encoder: every training object owns an embedding e, a row of a table that is
learned together with the network, by nothing but comparing renders with photos.

    e (B, 1024) -> Linear -> 4^3 x 512 -> 8^3 x 256 = latent F -> 16^3 -> 32^3 -> 64^3 -> 4 channels
    \\______________ G1: decode_latent ___________________/  \\_______ G2: decode_volume ________/

Diffusion (stage 2) learns the distribution of F; G1 and the embeddings are not used to generate.

Shapes: B objects, C channels, N dataset objects, V views, D = H = W side of a volume.
Simplified: rigid objects only; no LPIPS. The skinning channels of the paper are not built.
Read next: normalize.py
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data import BadInput

# ---- Embeddings: one row per object, or hashed pieces (Eq. 9 to 11) -----------------------------


class HashEmbedding(nn.Module):
    """An embedding put together from pieces of shared codebooks, for very many objects.

    Piece i of object k is row m_i(k) of codebook i, m_i(k) = ((a_i k) mod 2^32) >> (32 - r) for
    codebooks of 2^r rows (multiplicative hashing; Eq. 9 to 11). The paper's text swaps its symbols
    n_c and n_h between definition and values, so here they are words:
      codebooks  pieces per embedding (256; each piece has dim / codebooks numbers)
      rows       entries per codebook, a power of two (256, 8192 or 32768)
    rule "paper": a_i = 2^31 + 2 i^2 + 1 as printed. All of these lie just above 2^31, so objects k
    and k + 2 share almost every piece: of 1,676 objects only 1,176 embeddings are distinct.
    rule "spread" (OURS, the default): random odd a_i in [2^31, 2^32) from a fixed seed.
    """

    def __init__(self, n_objects, dim, codebooks=256, rows=256, rule="spread"):
        super().__init__()
        if dim % codebooks:
            raise ValueError(f"dim {dim} must be a multiple of codebooks {codebooks}")
        if rows < 2 or rows & (rows - 1):
            raise ValueError(f"rows must be a power of two, got {rows}")
        i = torch.arange(codebooks, dtype=torch.int64)
        if rule == "paper":
            a = 2**31 + 2 * i**2 + 1
        elif rule == "spread":
            seed = torch.Generator().manual_seed(0)
            a = 2**31 + 2 * torch.randint(2**30, (codebooks,), generator=seed) + 1
        else:
            raise ValueError(f"rule must be 'paper' or 'spread', got {rule!r}")
        self.n_objects, self.shift = n_objects, 32 - int(math.log2(rows))
        self.register_buffer("a", a, persistent=False)
        self.table = nn.Parameter(torch.randn(codebooks, rows, dim // codebooks))

    def row_indices(self, k):
        """m_i(k) of every codebook (Eq. 10): k (B,) int64 -> (B, codebooks) int64."""
        # a < 2^32 and k < 2^31, so the product fits in the 63 bits of int64.
        return (self.a * k[:, None] & 0xFFFFFFFF) >> self.shift

    def forward(self, k):
        """k (B,) int64 in 0..N-1 -> e (B, dim)."""
        pieces = torch.arange(len(self.a), device=k.device)
        return self.table[pieces, self.row_indices(k)].flatten(1)     # (B, codebooks * piece)


# ---- The decoder (App. B.1) ---------------------------------------------------------------------


def batch_or_group_norm(kind, channels):
    return nn.BatchNorm3d(channels) if kind == "batch" else nn.GroupNorm(min(8, channels), channels)


class Pointwise(nn.Linear):
    """A 1x1x1 convolution, as the matrix product that it is. (B, c_in, ...) -> (B, c_out, ...).

    OURS: on CPUs the backward pass of the same nn.Conv3d takes 2 to 8 times as long.
    """

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """Main path: two 3x3x3 convolutions, each with a norm; residual path: 1x1x1; ReLU (App. B.1).

    (B, c_in, D, H, W) -> (B, c_out, D, H, W), or twice the side if `upsample`.
    """

    def __init__(self, c_in, c_out, upsample=False, norm="batch"):
        super().__init__()
        # OURS: a transposed convolution doubles the side in one step. Upsampling first and then
        # convolving does 27 products per output voxel instead of 8: 54 ms instead of 18 at 32^3.
        self.conv1 = (nn.ConvTranspose3d(c_in, c_out, 4, 2, 1, bias=False) if upsample else
                      nn.Conv3d(c_in, c_out, 3, 1, 1, bias=False))
        self.conv2 = nn.Conv3d(c_out, c_out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = (batch_or_group_norm(norm, c_out) for _ in range(2))
        self.skip = Pointwise(c_in, c_out) if c_in != c_out else nn.Identity()
        self.upsample = upsample

    def forward(self, x):
        # AMBIGUOUS: the paper does not say where the ReLUs stand. OURS: in front, so that what a
        # block returns, the latent among it, is bell-shaped (Fig. 9) and not cut off at zero.
        h = F.relu(self.norm1(self.conv1(F.relu(x))))
        h = self.norm2(self.conv2(h))
        x = self.skip(x)               # a 1x1x1 convolution commutes with upsampling: do it small
        if self.upsample:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return x + h


class SelfAttention(nn.Module):
    """Every voxel looks at every other: x + proj(attention(norm(x))). (B, C, D, H, W) -> same."""

    def __init__(self, channels, head_channels=64):
        super().__init__()
        self.heads = max(1, channels // head_channels)
        self.norm = nn.GroupNorm(1, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj.weight)           # starts as the identity
        nn.init.zeros_(self.proj.bias)

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)                        # (B, DHW, C)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)            # (B, heads, DHW, c)
                   for y in self.qkv(tokens).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.proj(out).transpose(1, 2).reshape(x.shape)


class AutoDecoder(nn.Module):
    """G: object number -> embedding -> latent F (G1) -> volume of density and colour (G2).

    n_objects    rows of the embedding table        embed_dim    length of e (the paper: 1024)
    channels     features at the start (512), halved at every doubling of the side
    start_side   side of the first volume (4)       volume_side  of the last (64; 128 for Tables)
    latent_side  where G is cut into G1 and G2 (8); any side on the way can be chosen
    depth        residual blocks per resolution     attention    sides with self-attention
    norm         "batch" as in the paper, or "group"
    codebooks    0: a full table; else a HashEmbedding with so many codebooks of `rows` rows
    """

    def __init__(self, n_objects, embed_dim=1024, channels=512, start_side=4, volume_side=64,
                 latent_side=8, depth=4, attention=(8, 16), norm="batch", codebooks=0, rows=256,
                 hash_rule="spread"):
        super().__init__()
        self.sides = [start_side << i for i in range(int(math.log2(volume_side // start_side)) + 1)]
        if self.sides[-1] != volume_side or latent_side not in self.sides:
            raise ValueError(f"volume_side {volume_side} and latent_side {latent_side} must be "
                             f"start_side {start_side} times a power of two, in this order")
        self.start_side, self.latent_side, self.volume_side = start_side, latent_side, volume_side
        widths = [max(1, channels >> i) for i in range(len(self.sides))]
        self.latent_channels = widths[self.sides.index(latent_side)]
        self.embedding = (HashEmbedding(n_objects, embed_dim, codebooks, rows, hash_rule)
                          if codebooks else nn.Embedding(n_objects, embed_dim))
        self.linear = nn.Linear(embed_dim, channels * start_side**3)
        self.levels = nn.ModuleList()          # levels[i] ends at side sides[i + 1]
        for side, c_in, c_out in zip(self.sides[1:], widths, widths[1:]):
            blocks = [ResidualBlock(c_in, c_out, upsample=True, norm=norm)]
            blocks += [ResidualBlock(c_out, c_out, norm=norm) for _ in range(depth - 1)]
            blocks += [SelfAttention(c_out)] if side in attention else []
            self.levels.append(nn.Sequential(*blocks))
        self.head = nn.Sequential(nn.BatchNorm3d(widths[-1]), Pointwise(widths[-1], 4))
        # Voxels are stored channels-last: convolutions are 1.2 x faster on CPUs.
        self.to(memory_format=torch.channels_last_3d)

    def embed(self, k):
        """k (B,) int64 -> e (B, embed_dim)."""
        return self.embedding(k)

    def decode_latent(self, e):
        """G1: e (B, embed_dim) -> latent F (B, latent_channels, s, s, s), s = latent_side."""
        s = self.start_side
        x = self.linear(e).reshape(len(e), -1, s, s, s)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        for level in self.levels[:self.sides.index(self.latent_side)]:
            x = level(x)
        return x

    def decode_volume(self, latent):
        """G2: latent F -> volume (B, 4, D, H, W): density >= 0 per world unit, colour in [0, 1]."""
        expected = (self.latent_channels,) + (self.latent_side,) * 3
        if tuple(latent.shape[1:]) != expected:
            raise ValueError(f"latent must be (B, {', '.join(map(str, expected))}), "
                             f"got {tuple(latent.shape)}")
        x = latent.contiguous(memory_format=torch.channels_last_3d)
        for level in self.levels[self.sides.index(self.latent_side):]:
            x = level(x)
        x = self.head(x)
        # OURS: density in units of "optical thickness 1 per voxel", so that a network output means
        # the same opacity at 32^3 and 128^3; it starts as thin fog (softplus(-3) = 0.05 a voxel).
        density = F.softplus(x[:, :1] - 3) * (self.volume_side / 2)
        return torch.cat([density, torch.sigmoid(x[:, 1:])], 1)

    def forward(self, k):
        """k (B,) int64 -> volume (B, 4, D, H, W)."""
        return self.decode_volume(self.decode_latent(self.embed(k)))


# ---- Losses (Eq. 1 and 2) -----------------------------------------------------------------------

VGG19_LAYERS = (64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512)
VGG19_FILE = "vgg19-dcbb9e9d.pth"            # torchvision's ImageNet weights, by their public name


class VGG19Features(nn.Module):
    """VGG-19 up to relu5_1, read from a file of torchvision's layout ("features.0.weight", ...).

    (B, 3, H, W) in [0, 1] -> list of the maps after relu1_1, 2_1, 3_1, 4_1, 5_1. Maps that pooling
    would shrink below one pixel are left out, so that small pictures work.
    raises ValueError where the weights do not have VGG-19's names or shapes
    """

    def __init__(self, weights):
        super().__init__()
        layers, c_in = [], 3
        for width in VGG19_LAYERS:
            layers += ([nn.MaxPool2d(2)] if width == "M" else
                       [nn.Conv2d(c_in, width, 3, padding=1), nn.ReLU()])
            c_in = c_in if width == "M" else width
        self.features = nn.Sequential(*layers)
        own = self.state_dict()
        for name, value in own.items():
            if name not in weights or weights[name].shape != value.shape:
                raise ValueError(f"not VGG-19 weights: {name} should be {tuple(value.shape)}; "
                                 f"expected torchvision's {VGG19_FILE}")
        self.load_state_dict({name: weights[name] for name in own})
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, image):
        x, maps, first_of_stage = (image - self.mean) / self.std, [], True
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                if min(x.shape[-2:]) < 2:
                    break
                first_of_stage = True
            x = layer(x)
            if isinstance(layer, nn.ReLU) and first_of_stage:
                maps.append(x)
                first_of_stage = False
        return maps


class RandomFeatures(nn.Module):
    """Five random convolutional layers from a fixed seed: (B, 3, H, W) -> list of maps.

    OURS: what can be had without any download. Random filters still answer to edges, corners and
    textures (Saxe et al. 2011, "On random weights and unsupervised feature learning"; Ulyanov et
    al. 2018, "Deep image prior"), so distances between their maps see structure, not only pixels.
    """

    def __init__(self, widths=(16, 32, 64, 64, 64), seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers, c_in = nn.ModuleList(), 3
        for width in widths:
            layer = nn.Conv2d(c_in, width, 3, padding=1, padding_mode="replicate")
            with torch.no_grad():              # He's scale keeps the spread from layer to layer
                layer.weight.normal_(0, math.sqrt(2 / (9 * c_in)), generator=generator)
                layer.bias.uniform_(-0.1, 0.1, generator=generator)
            self.layers.append(layer)
            c_in = width

    def forward(self, image):
        x, maps = image * 2 - 1, []
        for layer in self.layers:
            x = F.relu(layer(x))
            maps.append(x)
            if min(x.shape[-2:]) < 2:
                break
            x = F.avg_pool2d(x, 2)
        return maps


def pixels_and_gradients(image):
    """The picture, and its differences between neighbours. (B, 3, H, W) -> list of three."""
    return [image, image.diff(dim=-1), image.diff(dim=-2)]


def build_features(name, device):
    """The f of Eq. 1, by name or from a file of VGG-19 weights."""
    if name == "pixels":
        return lambda image: [image]
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
        return VGG19Features(weights).requires_grad_(False).to(device)
    except ValueError as error:
        raise BadInput(f"--perceptual {name}: {error}") from None
    except Exception as error:               # the unpickler of a damaged file raises anything
        raise BadInput(f"--perceptual {name}: not a file of weights ({type(error).__name__}); "
                       f"expected torchvision's {VGG19_FILE}") from None


def pyramid_loss(features, rendered, true, levels=3):
    """Eq. 1: sum over pyramid levels l and layers i of mean |f_i(D_l(rendered)) - f_i(D_l(true))|.

    features  maps a picture (B, 3, H, W) to a list of maps; VGG-19 in the paper
    rendered, true  (B, 3, H, W) in [0, 1]; D_l halves the picture l times (1, 1/2, 1/4)
    """
    if rendered.shape != true.shape:
        raise ValueError(f"rendered {tuple(rendered.shape)} and true {tuple(true.shape)} differ")
    loss = rendered.new_zeros(())
    for level in range(levels):
        if level > 0:
            rendered, true = F.avg_pool2d(rendered, 2), F.avg_pool2d(true, 2)
        with torch.no_grad():
            goal = features(true)
        loss = loss + sum((a - b).abs().mean() for a, b in zip(features(rendered), goal))
    return loss


def foreground_loss(occupancy, mask):
    """Eq. 2: mean |O - mask|. Without it black objects turn into fog that nobody sees (Fig. 6)."""
    return (occupancy - mask).abs().mean()
