"""The number of an object goes in; its voxel grid of density and colour comes out. Stage 1.

Paper: Sec. 3.1 and App. B.1 (the decoder G = G2 . G1), App. B.3 Eq. 9 to 11 (hash embedding),
Sec. 3.2 Eq. 1 (pyramidal perceptual loss) and Eq. 2 (foreground loss); Sec. 3.2 and App. B.1 for
what moves: 2D keypoints, PnP and the pose of every part.

An AUTOdecoder has no encoder: every training object owns an embedding e, a row of a table that is
learned together with the network, by nothing but comparing renders with photos.

    e (B, 1024) -> Linear -> 4^3 x 512 -> 8^3 x 256 = latent F -> 16^3 -> 32^3 -> 64^3 -> 4 channels
    \\______________ G1: decode_latent ___________________/  \\_______ G2: decode_volume ________/

Diffusion (stage 2) learns the distribution of F; G1 and the embeddings are not used to generate.

Shapes: B objects, C channels, N dataset objects, V views, D = H = W side of a volume, P parts,
K keypoints of a part, n frames.
Simplified: without a file of VGG-19 weights, Eq. 1 compares pixels and their gradients.
In it: Embeddings, The decoder and Losses: at a first reading, these are all. Between the last two,
for what moves or has no cameras: Perspective-n-Point and Learned poses.
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
    OURS: where the width stays, the residual path is the identity.

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
        if channels % self.heads:
            raise ValueError(f"attention over {channels} channels: not a multiple of its "
                             f"{self.heads} heads; below {2 * head_channels}, or a multiple of "
                             f"{head_channels}, fits")
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


def faded(level, x, share):
    """level(x) of a level that has come in by its share in [0, 1]; at 0 it only enlarges x.

    OURS, for what moves: a coarse volume blurs what it shows, so even far too small a turn finds
    the way downhill. Yaw after 1,000 steps, 16 puppets, seed 0: painted at 8^3 correlation 0.98,
    slope 0.75; enlarged by repetition, not smoothly, 0.93 and 0.63. See also train.py.
    """
    if share == 1:
        return level(x)
    coarse = F.interpolate(level[0].skip(x), scale_factor=2, mode="trilinear")
    return coarse if share == 0 else torch.lerp(coarse, level(x), share)


def spread_points(n, half_axes, rounds=20):
    """n points (n, 3) spread evenly in an ellipsoid: the middles of n clusters (Lloyd, k-means)."""
    cloud = torch.randn(4096, 3, generator=torch.Generator().manual_seed(0))
    # The norm of a point in a ball is the cube root of a uniform number.
    reach = torch.rand(4096, 1, generator=torch.Generator().manual_seed(1)) ** (1 / 3)
    cloud = cloud / cloud.norm(dim=1, keepdim=True) * reach * torch.tensor(half_axes)
    centres = cloud[:n]
    for _ in range(rounds):
        mine = (torch.cdist(cloud, centres).argmin(1)[:, None] == torch.arange(n)).float()
        centres = mine.T @ cloud / mine.sum(0)[:, None]                         # (n, 3)
    return centres


def volume_prior(side, parts, half_axes, skin_layout, reach=()):
    """What the decoder's last layer is added to: (1, 4 + P, side, side, side), 4 for P < 2.

    Density before its softplus: -3, thin fog; where poses are learned (parts > 0), an opaque
    ellipsoid of these half axes, if there are any. OURS: what is seen then lies in front from the
    start, and that decides the sign of yaw, which nothing else does under so long a lens.
    Skinning logits of part p: -8 |x - c_p|^2, the c_p spread over the ellipsoid, or over another of
    half axes `reach` (OURS: without this layout parts blur); 0 without skin_layout.
    """
    at = (torch.arange(side) + 0.5) * 2 / side - 1
    xyz = torch.stack(torch.meshgrid(at, at, at, indexing="ij")[::-1], -1)      # (D, H, W, 3)
    prior = torch.zeros(4 + (parts if parts > 1 else 0), side, side, side)
    prior[0] = -3
    if parts and half_axes:
        # One unit of logit for a tenth of the radius; not below -5: limbs must be able to grow.
        prior[0] = (10 - 10 * (xyz / torch.tensor(half_axes)).norm(dim=-1)).clamp(-5, 3)
    if parts > 1 and skin_layout:
        centres = spread_points(parts, reach or half_axes or (0.5, 0.8, 0.5))
        prior[4:] = -8 * (xyz - centres[:, None, None, None]).square().sum(-1)
    return prior[None]


class AutoDecoder(nn.Module):
    """G: object number -> embedding -> latent F (G1) -> volume of density and colour (G2).

    n_objects    rows of the embedding table        embed_dim    length of e (the paper: 1024)
    channels     features at the start (512), halved at every doubling of the side
    start_side   side of the first volume (4)       volume_side  of the last (64; 128 for Tables)
    latent_side  where G is cut into G1 and G2 (8); any side on the way can be chosen
    depth        residual blocks per resolution     attention    sides with self-attention
    norm         "batch" as in the paper, or "group"
    codebooks    0: a full table; else a HashEmbedding with so many codebooks of `rows` rows
    parts        0: a rigid object seen by known cameras; P: rigid parts whose poses are learned,
                 and for P > 1 as many skinning channels after the colours (logits)
    half_axes    of the ellipsoid that a moving subject starts as; empty: it starts as fog
    skin_layout  parts start spread over it, or over one of half axes `reach`, not all alike
    """

    def __init__(self, n_objects, embed_dim=1024, channels=512, start_side=4, volume_side=64,
                 latent_side=8, depth=4, attention=(8, 16), norm="batch", codebooks=0, rows=256,
                 hash_rule="spread", parts=0, half_axes=(), skin_layout=True, reach=()):
        super().__init__()
        doublings = int(math.log2(max(1, volume_side // start_side)))
        self.sides = [start_side << i for i in range(doublings + 1)]
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
        self.head = nn.Sequential(batch_or_group_norm(norm, widths[-1]),
                                  Pointwise(widths[-1], 4 + (parts if parts > 1 else 0)))
        self.register_buffer("prior", volume_prior(volume_side, parts, half_axes, skin_layout,
                                                     reach))
        self.register_buffer("growth", torch.tensor(1.0))  # share of the learned density in use
        # Of each level. On the CPU even where all else has no numbers ("meta"): it is asked for.
        self.register_buffer("detail", torch.ones(len(self.levels), device="cpu"))
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
        """G2: latent F -> volume (B, 4 or 4 + P, D, H, W): density >= 0 per world unit, colour in
        [0, 1], and of moving subjects skinning logits."""
        return self.activate(self.decode_raw(latent))

    def decode_raw(self, latent):
        """The convolutions of G2: latent F -> (B, 4 or 4 + P, D, H, W), any number."""
        expected = (self.latent_channels,) + (self.latent_side,) * 3
        if tuple(latent.shape[1:]) != expected:
            raise ValueError(f"latent must be (B, {', '.join(map(str, expected))}), "
                             f"got {tuple(latent.shape)}")
        x = latent.contiguous(memory_format=torch.channels_last_3d)
        for i in range(self.sides.index(self.latent_side), len(self.levels)):
            x = faded(self.levels[i], x, self.detail[i])
        x = self.head(x)
        return torch.cat([x[:, :1] * self.growth, x[:, 1:]], 1) + self.prior

    def activate(self, x):
        """The rest of G2: what decode_raw returns -> volume."""
        # OURS: density in units of "optical thickness 1 per voxel", so that a network output means
        # the same opacity at 32^3 and 128^3; it starts as thin fog (softplus(-3) = 0.05 a voxel).
        density = F.softplus(x[:, :1]) * (self.volume_side / 2)
        # While a subject grows, the fog around its ellipsoid comes in with its own density.
        density = density * torch.where(self.prior[:, :1] >= -3, 1.0, self.growth)
        return torch.cat([density, torch.sigmoid(x[:, 1:4]), x[:, 4:]], 1)

    def forward(self, k):
        """k (B,) int64 -> volume (B, 4 or 4 + P, D, H, W)."""
        return self.decode_volume(self.decode_latent(self.embed(k)))


# ---- Perspective-n-Point (App. B.1): min over R, t of sum_k |project(R X_k + t) - x_k|^2 ---------


def cayley(h):
    """Rotation by 2 atan |h| about h: I + 2 ([h] + [h]^2) / (1 + h.h). h (..., 3) -> (..., 3, 3).

    Rational, so orthogonal for every h and, unlike Rodrigues' formula, without 0 / 0 at h = 0.
    """
    x, y, z = h.unbind(-1)
    o = torch.zeros_like(x)
    cross = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))    # [h]
    eye = torch.eye(3, dtype=h.dtype, device=h.device)
    return eye + 2 * (cross + cross @ cross) / (1 + h.square().sum(-1)[..., None, None])


def reprojection(pose, d, Y, x):
    """Pose (R, rho, u) moved by d (..., 6), its r = (rho R Y + u) / (1 + rho r3.Y) - x, J = dr/dd.

    returns pose, gradient J^T r / K (B, 6), r (B, 2K), J (B, 2K, 6)
    """
    R, rho, u = cayley(d[..., :3] / 2) @ pose[0], pose[1] + d[..., 3:4], pose[2] + d[..., 4:]
    P = Y @ R.mT                                                            # (B, K, 3)
    depth = 1 + rho[:, None] * P[..., 2:]                                   # (B, K, 1) of s / rho
    seen = (rho[:, None] * P[..., :2] + u[:, None]) / depth                 # (B, K, 2)
    eye = torch.eye(2, dtype=x.dtype, device=x.device).expand(*seen.shape, 2)
    a = torch.cat([eye, -seen[..., None]], -1) / depth[..., None]           # d seen / d (rho P)
    J = torch.cat([torch.linalg.cross(P[:, :, None].expand_as(a), a) * rho[:, None, None],
                   a @ P[..., None], eye / depth[..., None]], -1).flatten(1, 2)
    r = (seen - x).flatten(1)
    return (R, rho, u), (J.mT @ r[..., None])[..., 0] / x.shape[1], r, J


def solve_pnp(points3d, points2d, steps=8, floor=3e-4, scale_floor=5e-3):
    """The pose that carries 3D points onto 2D points: x_k = (R X_k + t)_xy / (R X_k + t)_z.

    points3d (B, K, 3) lengths near 1; points2d (B, K, 2), x / z and y / z in the camera; K >= 4
    returns R (B, 3, 3) rotation, t (B, 3) with t_z > 0; raises ValueError on other shapes
    Start: scaled orthography (DeMenthon & Davis 1995, POSIT), a linear fit; then Gauss-Newton as
    in EPnP's last stage (Lepetit et al. 2009), but on R, rho = s / t_z and u = t_xy / t_z, s the
    spread of X. No gradient passes through these. It passes through one last Newton step alone,
    which gives the true gradient of the minimum (implicit function theorem): -H^-1 dg.
    OURS: EPnP differentiates null vectors, whose gradient is infinite where singular values meet,
    as they do when predicted points draw together; here no curvature is taken to be below mu.
    steps: of Gauss-Newton; floor: mu is at least its square; scale_floor: rho is at least that
    """
    X, x = points3d, points2d
    if X.ndim != 3 or X.shape[1] < 4 or X.shape[2] != 3 or x.shape != (*X.shape[:2], 2):
        raise ValueError(f"points3d {tuple(X.shape)} and points2d {tuple(x.shape)} must be "
                         "(B, K, 3) and (B, K, 2), K >= 4")
    (B, K, _), eye, zero = X.shape, torch.eye(6, dtype=x.dtype, device=x.device), x.new_zeros(6)
    c = X.mean(1, keepdim=True)                                             # (B, 1, 3)
    s = ((X - c).square().sum(-1).mean(1, keepdim=True) + 1e-4).sqrt()      # (B, 1), never 0
    Y = (X - c) / s[..., None]                                              # (B, K, 3)
    with torch.no_grad():
        # The camera stays outside the ball around the points (and the origin): all depths >= 0.1.
        far = torch.maximum(Y.norm(dim=-1).amax(1, True), c.norm(dim=-1) / s).clamp(min=1)
        u, rho_max = x.mean(1), 0.9 / far                                   # (B, 2), (B, 1)
        # x = A Y + u by least squares. Flat points leave A blind to their normal: what the ridge
        # takes is put back from |a1| = |a2|, a1.a2 = 0, with either sign: two starts, best kept.
        lam, V = torch.linalg.eigh(Y.mT @ Y / K)                            # (B, 3), (B, 3, 3)
        A = (x - u[:, None]).mT @ Y / K @ (V / (lam + 1e-3)[:, None]) @ V.mT         # (B, 2, 3)
        A = A + 1e-5 * eye[:2, :3]                # all 2D points equal: start at R = I, not chance
        U, S, _ = torch.linalg.svd(A, full_matrices=False)
        a = (S[:, 0]**2 - S[:, 1]**2).clamp(min=0).sqrt() * 1e-3 / (lam[:, 0] + 1e-3)
        a = a[:, None, None] * U[..., 1:] * V.mT[:, :1]                     # (B, 2, 3)
        U, S, Vh = torch.linalg.svd(torch.cat([A + a, A - a]), full_matrices=False)
        R = U @ Vh                                                          # (2B, 2, 3) polar
        R = torch.cat([R, torch.linalg.cross(R[:, :1], R[:, 1:])], 1)       # (2B, 3, 3)
        Y2, x2, cap = (torch.cat([v, v]) for v in (Y, x, rho_max))
        pose = R, S.mean(1, keepdim=True).minimum(cap), torch.cat([u, u])
        for _ in range(steps):
            _, g, r, J = reprojection(pose, zero, Y2, x2)
            H, error = J.mT @ J / K, r.square().sum(1)                      # (2B, 6, 6), (2B,)
            # The pose is unsure by about sqrt(error / K^2 H^-1): beyond a radian, do not move.
            rounding = torch.finfo(x.dtype).eps * H.diagonal(dim1=1, dim2=2).sum(1)
            mu = (floor**2 + error / K**2 + rounding)[:, None, None]
            R, rho, u = reprojection(pose, -torch.linalg.solve(H + mu * eye, g), Y2, x2)[0]
            pose = R, rho.clamp(min=0).minimum(cap), u
        best = error.view(2, B).argmin(0) * B + torch.arange(B, device=x.device)
        pose, mu = [v[best] for v in pose], mu[best]
        H = torch.func.jacfwd(lambda d: reprojection(pose, d, Y, x)[1])(zero)    # exact, with r''
        lam, Q = torch.linalg.eigh((H + H.mT) / 2)
        inverse = Q / lam.abs()[:, None].maximum(mu) @ Q.mT                 # (B, 6, 6)
    d = -(inverse @ reprojection(pose, zero, Y, x)[1][..., None])[..., 0]   # (B, 6)
    R, rho, u = reprojection(pose, d, Y, x)[0]
    # dt_z / drho = -s / rho^2 explodes when the picture shrinks to a point: below 2 scale_floor a
    # parabola, so that t_z <= s / scale_floor and its gradient still says "grow".
    rho, f = rho.clamp(min=0), scale_floor
    rho = torch.where(rho < 2 * f, f + rho**2 / (4 * f), rho).minimum(rho_max)
    return R, torch.cat([u, torch.ones_like(rho)], 1) * s / rho - (R @ c.mT)[..., 0]


# ---- Learned poses (Sec. 3.2, App. B.1): a frame -> where each part is ---------------------------


def convolution(c_in, c_out, stride=1):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.GroupNorm(8, c_out), nn.ReLU())


def soft_argmax(heat):
    """Mean position of heat maps (..., h, w) that sum to 1 -> (..., 2) x, y in [-1, 1], y down."""
    h, w = heat.shape[-2:]
    x, y = ((torch.arange(n, device=heat.device) + 0.5) * 2 / n - 1 for n in (w, h))
    return torch.stack([(heat.sum(-2) * x).sum(-1), (heat.sum(-1) * y).sum(-1)], -1)


class KeypointNet(nn.Module):
    """A 2D U-Net with soft-argmax: frames (n, 3, 64, 64) -> n_points positions (n, n_points, 2).

    Positions are in half widths of the picture, x right, y down, 0 in its middle. SIMPLIFIED: heat
    maps of 16 x 16, and a temperature of 0.5 (the predecessor: 0.1, on finer maps).
    """

    def __init__(self, n_points, width=32, temperature=0.5):
        super().__init__()
        w, self.temperature = width, temperature
        self.down = nn.ModuleList([convolution(3, w, 2), convolution(w, 2 * w),
                                   convolution(2 * w, 4 * w), convolution(4 * w, 4 * w)])
        self.up = nn.ModuleList([convolution(8 * w, 4 * w), convolution(6 * w, 2 * w)])
        self.heat = nn.Conv2d(2 * w, n_points, 1)

    def forward(self, frames):
        x, skips = 2 * frames - 1, []
        for layer in self.down:                                # sides 32, 16, 8, 4
            x = layer(x)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = skips.pop()
        for layer in self.up:                                  # sides 8, 16
            x = layer(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], 1))
        logits = self.heat(x) / self.temperature               # (n, n_points, 16, 16)
        return soft_argmax(logits.flatten(2).softmax(-1).reshape(logits.shape))


class PoseNet(nn.Module):
    """Frame -> camera of each of P rigid parts, from 2D points seen and 3D points learned.

    parts, points   P; K for each part (a cube number: they start on a grid)
    focal           as a fraction of the picture's side (5.7: the paper's 0.175 rad)
    body            half axes of the ellipsoid that the subject starts as

    OURS: what soft-argmax returns is not used as it is. At first it says nothing, PnP makes
    nonsense of nothing, and nothing is learned. Its deviation from its own mean is added to where
    the 3D points would be seen at the default pose (upright, in front): all frames start from
    there, and the gauge, which no loss fixes, is fixed: the average pose is the default pose.
    """

    def __init__(self, parts, points, focal, body, width=32, temperature=0.5):
        super().__init__()
        side = round(points ** (1 / 3))
        if side**3 != points or side < 2:
            raise ValueError(f"keypoints {points} must be a cube: 8, 27, 64, 125")
        self.focal, self.half = focal, 0.5 / focal     # half a picture's width at depth 1
        self.distance = 1 / (0.95 * self.half)         # the cube's width is 95 % of the picture's
        grid = torch.cartesian_prod(*[torch.linspace(-1, 1, side)] * 3)
        # OURS: flat, depth +-0.2: 2D points then have less to say about depth, which nobody knows.
        grid = grid * torch.tensor([body[0], body[1], 0.2])
        self.canonical = nn.Parameter(grid.repeat(parts, 1, 1))                 # (P, K, 3)
        self.keypoints = KeypointNet(parts * points, width, temperature)
        self.register_buffer("mean", torch.zeros(parts, points, 2))             # of the 2D points
        self.register_buffer("batches", torch.tensor(0))                        # in that mean
        self.register_buffer("active", torch.tensor(1))                         # parts in use
        self.register_buffer("flip", torch.tensor([1.0, -1, -1]), persistent=False)

    def points2d(self, frames):
        """(n, 3, 64, 64) -> (n, P, K, 2) in half widths."""
        return self.keypoints(frames).unflatten(1, self.canonical.shape[:2])

    def project(self, R, t):
        """3D points of the active parts under poses R (n, P, 3, 3), t (n, P, 3) -> (n, P, K, 2)."""
        X = self.canonical[:R.shape[1]] * self.flip    # PnP's camera: x right, y down, z ahead
        x = X @ R.mT + t[..., None, :]
        return x[..., :2] / (x[..., 2:] * self.half)

    def forward(self, frames, settled=False):
        """frames (n, 3, 64, 64) -> cam2world (n, P, 4, 4) of the active parts; the raw 2D points
        (n, all parts, K, 2); losses (a dict of scalars).

        settled: subtract the running mean, as in evaluation, not the mean of these frames
        Losses: reprojection (the predecessor's); OURS, against a drift of all poses together:
        centre (the raw points' mean stays near the default pose) and distance (so does depth).
        """
        P = int(self.active)
        u = self.points2d(frames)                                               # (n, P, K, 2)
        eye = torch.eye(3, device=u.device).expand(1, len(self.canonical), 3, 3)
        ahead = u.new_tensor([0, 0, self.distance]).expand(1, len(self.canonical), 3)
        default = self.project(eye, ahead)                                      # (1, P, K, 2)
        mean = self.mean
        if self.training and not settled:
            mean = u.mean(0)
            with torch.no_grad():
                self.batches += 1              # a plain mean at first, then a running one
                self.mean.lerp_(mean, max(0.05, 1 / int(self.batches)))
        seen = (u - mean + default)[:, :P]
        X = (self.canonical[:P] * self.flip).expand(len(u), -1, -1, -1)
        R, t = solve_pnp(X.flatten(0, 1), (seen * self.half).flatten(0, 1), steps=4)
        R, t = R.unflatten(0, (-1, P)), t.unflatten(0, (-1, P))
        losses = {"reprojection": (self.project(R, t) - seen).abs().mean(),
                  "centre": (u.mean(0, keepdim=True) - default)[:, :P].abs().mean(),
                  "distance": (t[..., 2] / self.distance).log().abs().mean()}
        turn = self.flip[:, None] * R.mT * self.flip           # R^T, in this project's axes
        where = -(turn @ (self.flip * t)[..., None])
        last = u.new_tensor([0, 0, 0, 1]).expand(len(u), P, 1, 4)
        return torch.cat([torch.cat([turn, where], -1), last], -2), u, losses

    @torch.no_grad()
    def split(self, noise=0.02):
        """One part becomes P: all get its points and heat maps, a little noise tells them apart."""
        P = len(self.canonical)
        heads = [v.data.unflatten(0, (P, -1)) for v in self.keypoints.heat.parameters()]
        for value in (self.canonical.data, self.mean, *heads):
            value[1:] = value[:1]
        for value in heads:
            value += noise * value.std() * torch.randn_like(value)
        self.active.fill_(P)


def equivariance_loss(points2d, frames, u, generator):
    """Mean |A u(A frame) - u(frame)|: what moves with the picture is seen to move with it.

    points2d  maps frames (n, 3, H, W) to (n, ..., 2) in half widths; u = points2d(frames)
    A         a random rotation (+-17 degrees), scale (+-15 %) and shift (+-0.15) of every frame
    """
    a, s, x, y = ((torch.rand(4, len(u), generator=generator) - 0.5)
                  * torch.tensor([[0.6], [0.3], [0.3], [0.3]])).to(u)
    c, s = a.cos() * (1 + s), a.sin() * (1 + s)
    A = torch.stack([c, -s, x, s, c, y], -1).unflatten(-1, (2, 3))              # (n, 2, 3)
    # affine_grid says where each pixel of the warped frame comes FROM: A maps its points back.
    grid = F.affine_grid(A, frames.shape, align_corners=False)
    warped = points2d(F.grid_sample(frames, grid, align_corners=False)).flatten(1, -2)
    back = warped @ A[:, :, :2].mT + A[:, None, :, 2]
    return (back - u.flatten(1, -2)).abs().mean()


def usage_loss(volume):
    """Keeps every part in use: how far the share of each part in the density is below half of 1/P.

    volume (B, 4 + P, D, H, W)
    """
    density, share = volume[:, :1], volume[:, 4:].softmax(1)
    used = (density * share).sum((2, 3, 4)) / density.sum((2, 3, 4)).clamp(min=1e-6)    # (B, P)
    return F.relu(0.5 - used * used.shape[1]).mean()


# ---- Losses (Eq. 1 and 2) -----------------------------------------------------------------------

VGG19_LAYERS = (64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512)
VGG16_LAYERS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
# Torchvision's ImageNet weights, by their public names.
VGG19_FILE, VGG16_FILE = "vgg19-dcbb9e9d.pth", "vgg16-397923af.pth"


class VGGFeatures(nn.Module):
    """VGG up to stage 5, read from a file of torchvision's layout ("features.0.weight", ...).

    (B, 3, H, W) in [0, 1] -> list of one map a stage: of VGG-19, for Eq. 1, after relu1_1, 2_1,
    3_1, 4_1, 5_1; of VGG-16, for LPIPS, after the last: relu1_2, 2_2, 3_3, 4_3, 5_3. Maps that
    pooling would shrink below one pixel are left out, so that small pictures work.
    raises ValueError where the weights do not have VGG's names or shapes
    """

    def __init__(self, weights, layers=VGG19_LAYERS):
        super().__init__()
        self.first, plan, layers, c_in = layers is VGG19_LAYERS, layers, [], 3
        which, file = ("VGG-19", VGG19_FILE) if self.first else ("VGG-16", VGG16_FILE)
        for width in plan:
            layers += ([nn.MaxPool2d(2)] if width == "M" else
                       [nn.Conv2d(c_in, width, 3, padding=1), nn.ReLU()])
            c_in = c_in if width == "M" else width
        self.features = nn.Sequential(*layers)
        own = self.state_dict()
        for name, value in own.items():
            if name not in weights or weights[name].shape != value.shape:
                raise ValueError(f"not {which} weights: {name} should be {tuple(value.shape)}; "
                                 f"expected torchvision's {file}")
        self.load_state_dict({name: weights[name] for name in own})
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, image):
        x, stages = (image - self.mean) / self.std, [[]]
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                if min(x.shape[-2:]) < 2:
                    break
                stages.append([])
            x = layer(x)
            stages[-1] += [x] if isinstance(layer, nn.ReLU) else []
        return [maps[0 if self.first else -1] for maps in stages]


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
    """The picture, and its differences between neighbours. (B, 3, H, W) -> list of three.

    OURS: the default where there is no VGG-19. Held-out dB after 400 steps, 32 objects, three
    seeds: 25.5, 25.1, 25.7; pixels alone 24.8, 24.3, 24.6; random features 23.9, 23.9, 23.5.
    """
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
        return VGGFeatures(weights).requires_grad_(False).to(device)
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
        if level > 0 and min(rendered.shape[-2:]) < 4:
            break                              # one pixel has no neighbours to differ from
        if level > 0:
            rendered, true = F.avg_pool2d(rendered, 2), F.avg_pool2d(true, 2)
        with torch.no_grad():
            goal = features(true)
        loss = loss + sum((a - b).abs().mean() for a, b in zip(features(rendered), goal))
    return loss


def foreground_loss(occupancy, mask):
    """Eq. 2: mean |O - mask|. Without it black objects turn into fog that nobody sees (Fig. 6)."""
    return (occupancy - mask).abs().mean()
