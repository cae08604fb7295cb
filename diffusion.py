"""Normalized latents go in; a network that turns noise into new ones comes out. Stage 2.

Paper: Sec. 3.3, App. B.2, C.2. Preconditioning, loss and sampler are EDM's (Karras et al. 2022),
with its symbols; the network is ADM's U-Net (Dhariwal and Nichol 2021), every operation made 3D.

    DDPM                                          EDM, here
    x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps     x = y + sigma n: y keeps its size, n ~ N(0, 1)
    a step number t from 1 to 1000                the noise level sigma itself, from 0.002 to 80
    the network answers the noise eps             the denoiser D(x; sigma) answers the clean y
    1000 random steps                             64 steps, each of two calls of D, along a curve
                                                  from sigma 80 to 0, with a little fresh noise

TRAP: the paper's latent is called F, too, and so is torch's functional in other files. Here the
latent is y, normalized, or x with noise, and F is the U-Net.
Shapes: B objects, C latent channels, s side of a latent; "as x": in the shape of x.
Simplified: no dropout, no mixed precision, no augmentation.
Read next: data.py
"""
import math

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

# ---- The denoiser and its loss (EDM, Table 1) ---------------------------------------------------
def preconditioning(sigma, sigma_data):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM, Table 1): these four, each as sigma.

    F alone would be fed numbers of size 80 at large sigma, and have to repeat its input at small.
    So c_in x, which it is fed, and (y - c_skip x) / c_out, which it must answer, have variance 1 at
    every sigma. TRAP: only if y has deviation sigma_data. PAPER: sigma_data is 0.5, while robust
    normalization makes the deviation about 1: then the variances lie between 1 and (1 / 0.5)^2.
    Kept all the same: sigma_data 1 was worse (docs/results.md, row 2 of the claims).
    """
    total = sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / total               # 1: little noise, keep x; 0: all noise, drop it
    c_out = sigma * sigma_data / total.sqrt()    # how far c_skip x is from y
    c_in = 1 / total.sqrt()
    c_noise = sigma.log() / 4                    # -1.6 at sigma 0.002, 1.1 at sigma 80
    return c_skip, c_out, c_in, c_noise


class Denoiser(nn.Module):
    """D(x; sigma): the mean of all clean latents y that may lie behind a noisy x: of all answers it
    has the least squared error. At sigma 80 it is nearly the mean of all data, at 0.002 nearly x;
    between, a blurred guess.
    latent_shape  (C, s, s, s); PAPER: (256, 8, 8, 8), and the other defaults, for Chairs (Tab. 5)
    channels      width of the U-Net, times `multipliers` at sides s, s/2, ...
    depth         residual blocks at each side
    attention     sides at which voxels see each other
    sigma_data    see preconditioning
    """

    def __init__(self, latent_shape, channels=128, multipliers=(3, 4), depth=2, attention=(8, 4),
                 sigma_data=0.5):
        super().__init__()
        self.latent_shape = tuple(latent_shape)
        self.sigma_data = sigma_data
        self.unet = UNet3D(self.latent_shape, channels, multipliers, depth, attention)

    @classmethod
    def from_settings(cls, settings, latent_shape):
        return cls(latent_shape, settings.unet_channels, settings.unet_multipliers,
                   settings.unet_depth, settings.unet_attention, settings.sigma_data)

    def forward(self, x, sigma, *told):
        """x (B, C, s, s, s), sigma a number or (B,) -> D, as x.

        told  what F's blocks are told besides x and sigma: nothing, in the blocks below.
        """
        if x.shape[1:] != self.latent_shape:
            raise ValueError(f"x must be B latents {self.latent_shape}, got {tuple(x.shape)}")
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        sigma = sigma[:, None, None, None, None]                            # (B, 1, 1, 1, 1)
        c_skip, c_out, c_in, c_noise = preconditioning(sigma, self.sigma_data)
        dtype = self.unet.first.weight.dtype     # float32, while the sampler's x is float64
        answer = self.unet((c_in * x).to(dtype), c_noise.flatten().to(dtype), *told)
        return c_skip * x + c_out * answer.to(x.dtype)


def edm_loss(denoise, y, sigma_data, generator=None, P_mean=-1.2, P_std=1.2):
    """EDM's loss: the mean of weight(sigma) |D(y + sigma n; sigma) - y|^2, a scalar.
    denoise: any callable (x, sigma (B,)) -> D, as x. y (B, C, s, s, s): clean, normalized latents.
    ln sigma ~ N(P_mean, P_std^2): mostly between 0.03 (hardly any noise) and 3 (hardly anything
    else). With weight = 1 / c_out^2 the loss is F's own squared error. F starts by answering 0, so
    the loss starts as the variance of what F must answer."""
    normal = torch.randn(len(y), generator=generator).to(y)     # drawn on the CPU: the same numbers
    noise = torch.randn(y.shape, generator=generator).to(y)     # on every device
    sigma = (P_mean + P_std * normal).exp()                                 # (B,)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data)**2           # (B,)
    x = y + sigma[:, None, None, None, None] * noise                        # (B, C, s, s, s)
    error = (denoise(x, sigma) - y)**2
    return (weight * error.flatten(1).mean(1)).mean()


@torch.no_grad()
def ema_update(average, model, step, half_life):
    """average <- decay average + (1 - decay) model, decay = 0.5^(1 / half_life), in steps.
    OURS, after EDM: the paper does not say. The average draws the samples: what a step learns of
    its own few latents cancels in it."""
    half_life = min(half_life, 0.1 * step)       # early on short, or the random start would linger
    decay = 0.5 ** (1 / max(half_life, 1e-8))
    for averaged, current in zip(average.parameters(), model.parameters()):
        averaged.lerp_(current, 1 - decay)


# ---- The sampler (EDM, Algorithm 2) -------------------------------------------------------------
@torch.no_grad()
def edm_sampler(denoise, noise, steps, S_churn=40, S_min=0.05, S_max=50, S_noise=1.003,
                sigma_min=0.002, sigma_max=80, rho=7, generator=None):
    """EDM's Algorithm 2: noise (B, ...) ~ N(0, 1) -> samples, as noise, float64.

    At sigma 80, data would hardly show: begin with noise alone. Let sigma fall to 0, and x follow
    dx/dsigma = (x - D(x; sigma)) / sigma: to halve sigma is to go half of the way to the guess D.
    At every sigma, the x of many samples are distributed as y + sigma n. (x - D) / sigma is what
    DDPM calls eps.
    denoise    any callable (x float64, sigma a float) -> D, as x
    steps      PAPER: 64; also 16 and 32
    S_churn    how much churn, at sigmas from S_min to S_max; 0: none. PAPER: some. AMBIGUOUS: how
               much. OURS: EDM's for ImageNet-64 (256 steps; to 96, gamma is at its cap)
    S_noise    > 1, as D takes away a little too much noise
    generator  of the churn, see fresh_noise
    """
    sigmas = sigma_steps(steps, sigma_min, sigma_max, rho).tolist()
    x_next = noise.double() * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        x_hat, sigma_hat = x_next, sigma         # a hat is EDM's for "churned"; F_hat's is another
        if S_churn > 0 and S_min <= sigma <= S_max:
            # Churn: a little back up, with fresh noise, which buries the errors made so far. At
            # most by sqrt(2): then as much noise comes in as was there, for variances add up.
            gamma = min(S_churn / steps, math.sqrt(2) - 1)
            sigma_hat = sigma * (1 + gamma)
            added = math.sqrt(sigma_hat**2 - sigma**2)
            x_hat = x_hat + added * S_noise * fresh_noise(x_hat, generator)
        denoised = denoise(x_hat, sigma_hat)
        slope = (x_hat - denoised) / sigma_hat                              # dx/dsigma
        x_next = x_hat + (sigma_next - sigma_hat) * slope                   # Euler
        if sigma_next > 0:                       # Heun: along the mean of the slopes at both ends
            slope_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x_hat + (sigma_next - sigma_hat) * (slope + slope_next) / 2
    return x_next


def sigma_steps(steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """sigma_i = (sigma_max^(1/rho) + i / (N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho and
    then 0, N = steps: (N + 1,) float64, CPU. Ever shorter steps, as the curve bends ever more."""
    i = torch.arange(steps, dtype=torch.float64)
    high, low = sigma_max**(1 / rho), sigma_min**(1 / rho)
    sigma = (high + i / max(1, steps - 1) * (low - high))**rho
    return torch.cat([sigma, torch.zeros(1, dtype=torch.float64)])


def fresh_noise(x, generator):
    """N(0, 1), as x. generator: one; or B of them, an object each: none depends on the others."""
    if not isinstance(generator, list):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    rows = [torch.randn(x.shape[1:], generator=own, dtype=x.dtype) for own in generator]
    return torch.stack(rows).reshape(x.shape).to(x.device)


# ---- F: ADM's U-Net in 3D (App. B.2) ------------------------------------------------------------
class UNet3D(nn.Module):
    """F(x; c_noise), ADM's U-Net: x (B, C, s, s, s), c_noise (B,) -> as x. Arguments: see Denoiser.
    In this order, for two multipliers and depth 2, at s = 8:
        8^3   first  block  block
        4^3   down   block  block  middle  middle  block  block  block
        8^3   up     block  block  block   last
    Each `block` after the middle is also handed the output of a module before it, the latest first:
    the skip connections.
    """

    def __init__(self, latent_shape, channels, multipliers, depth, attention):
        super().__init__()
        c_latent, side = latent_shape[:2]
        widths = [channels * multiplier for multiplier in multipliers]
        attends = [side // 2**level in attention for level in range(len(widths))]
        c_emb = 4 * channels
        # OURS: frequencies of c_noise from 1/4 to 64. ADM's are for step numbers up to 1000.
        self.freqs = nn.Buffer(torch.logspace(-2, 6, channels // 2, base=2), persistent=False)
        self.embed_noise = nn.Sequential(nn.Linear(channels, c_emb), nn.SiLU(),
                                         nn.Linear(c_emb, c_emb), nn.SiLU())
        c = widths[0]                            # width of x on its way
        self.first = nn.Conv3d(c_latent, c, 3, padding=1)
        self.downward = nn.ModuleList()
        for level, width in enumerate(widths):
            if level > 0:
                self.downward.append(UNetBlock(c, c, c_emb, resample=nn.AvgPool3d(2)))
            for _ in range(depth):
                self.downward.append(UNetBlock(c, width, c_emb, attends[level]))
                c = width
        self.middle = nn.ModuleList([UNetBlock(c, c, c_emb, attends[-1]), UNetBlock(c, c, c_emb)])
        skip_widths = [widths[0]] + [block.conv2.out_channels for block in self.downward]
        self.upward = nn.ModuleList()            # a list of blocks for each side
        self.ups = nn.ModuleList()               # and a block between two sides
        for width, attend in zip(widths[::-1], attends[::-1]):
            if len(self.upward) > 0:
                self.ups.append(UNetBlock(c, c, c_emb, resample=nn.Upsample(scale_factor=2)))
            self.upward.append(nn.ModuleList())
            for _ in range(depth + 1):
                self.upward[-1].append(UNetBlock(c + skip_widths.pop(), width, c_emb, attend))
                c = width
        self.last = nn.Sequential(group_norm(c), nn.SiLU(),
                                  zero_init(nn.Conv3d(c, c_latent, 3, padding=1)))

    def forward(self, x, c_noise, *told):
        """Down, through the middle and up again. told: see Denoiser."""
        angles = c_noise[:, None] * self.freqs                              # (B, channels / 2)
        emb = self.embed_noise(torch.cat([angles.cos(), angles.sin()], 1))  # (B, c_emb)
        x = self.first(x)
        skips = [x]
        for block in self.downward:
            x = block(x, emb, *told)
            skips.append(x)
        for block in self.middle:
            x = block(x, emb, *told)
        for i, blocks in enumerate(self.upward):
            if i > 0:
                x = self.ups[i - 1](x, emb, *told)
            for block in blocks:
                x = block(torch.cat([x, skips.pop()], dim=1), emb, *told)
        return self.last(x)


class UNetBlock(nn.Module):
    """ADM's residual block, steered by the noise level; then self-attention, if `attention`.
    x (B, width_in, s, s, s), emb (B, c_emb) -> (B, width_out, s', s', s'), s' by `resample`."""

    def __init__(self, width_in, width_out, c_emb, attention=False, resample=None):
        super().__init__()
        self.norm1 = group_norm(width_in)
        self.conv1 = nn.Conv3d(width_in, width_out, 3, padding=1)
        self.norm2 = group_norm(width_out)
        self.conv2 = zero_init(nn.Conv3d(width_out, width_out, 3, padding=1))
        self.affine = nn.Linear(c_emb, 2 * width_out)
        self.shortcut = nn.Identity()
        if width_in != width_out:
            self.shortcut = nn.Conv3d(width_in, width_out, 1)
        self.resample = nn.Identity() if resample is None else resample
        self.attention = SelfAttention(width_out) if attention else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(self.resample(silu(self.norm1(x))))
        scale, shift = self.affine(emb)[:, :, None, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(silu(h))
        return self.attention(self.shortcut(self.resample(x)) + h)


class SelfAttention(nn.Module):
    """x (B, C, s, s, s) -> x + proj(softmax(q k^T / sqrt(c)) v), as in autodecoder.py, but for the
    norm; and q has a layer of its own, for the second reading."""

    def __init__(self, channels):
        super().__init__()
        self.heads = max(1, channels // 64)      # of c channels each, 64 as in ADM
        self.norm = group_norm(channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(channels, 2 * channels)
        self.proj = zero_init(nn.Linear(channels, channels))

    def forward(self, x):
        voxels = self.norm(x).flatten(2).transpose(1, 2)                    # (B, s^3, C)
        qkv = torch.cat([self.to_q(voxels), self.to_kv(voxels)], dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(q, k, v).transpose(1, 2)        # (B, s^3, heads, c)
        return x + self.proj(seen.flatten(2)).transpose(1, 2).reshape(x.shape)


def group_norm(channels):
    """EDM's: 32 groups, or fewer, of at least 4 channels each. TRAP: a group of one channel erases
    that channel's mean and scale: what a layer says with them, the next cannot hear."""
    groups = max(1, min(32, channels // 4))
    while channels % groups != 0:                # OURS: EDM's widths always divide
        groups -= 1
    return nn.GroupNorm(groups, channels)


def zero_init(layer):
    """A layer that starts at 0, so that a block starts as its shortcut, and the U-Net answers 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# ==== Second reading: text (Sec. 3.3, App. B.2) ==================================================
#
# Shapes: T tokens of a prompt.

import re   # noqa: E402

from data import BadInput   # noqa: E402

# ---- If sigma_data is not the deviation of y ----------------------------------------------------
#
# Let that be a, sd be sigma_data, and total = sigma^2 + sd^2. Then, with EDM's preconditioning,
#
#     F is fed       c_in x                    of variance (a^2 + sigma^2) / total
#     F must answer  (y - c_skip x) / c_out    of variance (sd^2 + a^2 sigma^2 / sd^2) / total
#
# Both are 1 at every sigma if a = sd, and lie between 1 and (a / sd)^2 if not.

# ---- The U-Net that hears text ------------------------------------------------------------------
class CrossAttention(SelfAttention):
    """Every voxel looks at every token of the text: q from x, k and v from the tokens."""

    def __init__(self, channels, context_dim):
        super().__init__(channels)
        self.to_kv = nn.Linear(context_dim, 2 * channels)

    def forward(self, x, tokens, mask):
        """tokens (B, T, context_dim), mask (B, T), True for real ones."""
        voxels = self.norm(x).flatten(2).transpose(1, 2)                    # (B, s^3, C)
        q = self.split(self.to_q(voxels))
        k, v = self.to_kv(tokens).chunk(2, dim=-1)                          # (B, T, C)
        may_see = mask[:, None, None, :]                                    # (B, 1, 1, T)
        seen = scaled_dot_product_attention(q, self.split(k), self.split(v), attn_mask=may_see)
        seen = seen.transpose(1, 2).flatten(2)                              # (B, s^3, C)
        return x + self.proj(seen).transpose(1, 2).reshape(x.shape)

    def split(self, sequence):
        """(B, n, C) -> (B, heads, n, c): every head has its own share of the channels."""
        return sequence.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class TextBlock(nn.Module):
    """A block of the U-Net, and, if it has self-attention, cross-attention after that.

    transformer_depth counts such pairs, (self, cross), (self, cross), ...: PAPER: 1; 2 on
    Objaverse. The first pair's self-attention is the block's own.
    """

    def __init__(self, block, context_dim, transformer_depth):
        super().__init__()
        self.block = block
        self.self_attention = nn.ModuleList()          # of the second pair, the third, ...
        self.cross_attention = nn.ModuleList()         # of all pairs
        if not isinstance(block.attention, SelfAttention):
            return
        channels = block.conv2.out_channels
        for pair in range(transformer_depth):
            if pair > 0:
                self.self_attention.append(SelfAttention(channels))
            self.cross_attention.append(CrossAttention(channels, context_dim))

    def forward(self, x, emb, tokens, mask):
        x = self.block(x, emb)
        for pair, cross_attention in enumerate(self.cross_attention):
            if pair > 0:
                x = self.self_attention[pair - 1](x)
            x = cross_attention(x, tokens, mask)
        return x


class TextDenoiser(Denoiser):
    """D(x; sigma, text): a Denoiser each of whose blocks is told the text, too.

    context_dim        width of the text's tokens
    transformer_depth  pairs of self- and cross-attention in a block
    vocabulary         words of a WordEncoder of its own, which is `text`; empty: `text` is None,
                       and the tokens are made elsewhere (T5Encoder)
    denoiser           the other arguments of Denoiser
    """

    def __init__(self, latent_shape, *, context_dim, transformer_depth=1, vocabulary=(),
                 **denoiser):
        super().__init__(latent_shape, **denoiser)
        if transformer_depth < 1:
            raise ValueError(f"transformer_depth {transformer_depth}: text needs at least 1")
        self.context_dim = context_dim
        hearing = 0
        for blocks in (self.unet.downward, self.unet.middle, self.unet.ups, *self.unet.upward):
            for i, block in enumerate(blocks):
                blocks[i] = TextBlock(block, context_dim, transformer_depth)
                hearing += len(blocks[i].cross_attention)
        if hearing == 0:
            raise ValueError("text is heard where there is attention, but no side has any")
        self.text = WordEncoder(vocabulary, context_dim) if vocabulary else None

    @classmethod
    def from_settings(cls, settings, latent_shape, vocabulary=()):
        """The same as Denoiser's. vocabulary: see above."""
        return cls(latent_shape,
                   channels=settings.unet_channels,
                   multipliers=settings.unet_multipliers,
                   depth=settings.unet_depth,
                   attention=settings.unet_attention,
                   sigma_data=settings.sigma_data,
                   context_dim=settings.context_dim,
                   transformer_depth=settings.transformer_depth,
                   vocabulary=vocabulary)

    def forward(self, x, sigma, tokens, mask):
        """x and sigma as in Denoiser; tokens (B, T, context_dim), mask (B, T) -> as x."""
        if tokens.shape != (*mask.shape, self.context_dim) or len(mask) != len(x):
            raise ValueError(f"tokens must be ({len(x)}, T, {self.context_dim}) and mask "
                             f"({len(x)}, T), got {tuple(tokens.shape)} and {tuple(mask.shape)}")
        return super().forward(x, sigma, tokens, mask)


def build_denoiser(settings, latent_shape, vocabulary=()):
    """A TextDenoiser if the settings ask for text, else a Denoiser. ValueError: they do not fit."""
    side = latent_shape[1]
    halvings = len(settings.unet_multipliers) - 1
    if side % 2**halvings != 0:
        raise ValueError(f"a latent of side {side} cannot be halved {halvings} times")
    if settings.text:
        denoiser = TextDenoiser.from_settings(settings, latent_shape, vocabulary)
    else:
        denoiser = Denoiser.from_settings(settings, latent_shape)
    for module in denoiser.modules():
        if not isinstance(module, SelfAttention):
            continue
        channels = module.proj.in_features
        if channels % module.heads != 0:
            raise ValueError(f"attention: {module.heads} heads do not divide {channels} channels")
    return denoiser


# ---- Guidance -----------------------------------------------------------------------------------
def guided(denoiser, context, null, weight):
    """Classifier-free guidance: D(x) = D(x | null) + weight (D(x | text) - D(x | null)).

    PAPER: weight 3: further from what any object might be, towards what this text says, than the
    denoiser alone would go. Weight 1 is D(x | text), 0 is D(x | null).

    denoiser       a TextDenoiser that was trained with some captions left out, too
    context, null  (tokens, mask) of the prompts and of "", each of one prompt or of B
    returns        a callable (x, sigma a number) -> as x, for edm_sampler
    """
    def denoise(x, sigma):
        tokens, mask = repeated(context, len(x))
        null_tokens, null_mask = repeated(null, len(x))
        if weight == 1:
            return denoiser(x, sigma, tokens, mask)
        if weight == 0:
            return denoiser(x, sigma, null_tokens, null_mask)
        # Both go through the network side by side, as 2B objects.
        all_tokens = torch.cat([tokens, null_tokens])
        all_masks = torch.cat([mask, null_mask])
        both = denoiser(torch.cat([x, x]), sigma, all_tokens, all_masks)
        with_text, without = both.chunk(2)
        return without + weight * (with_text - without)

    return denoise


def repeated(text, n):
    """(tokens, mask) of one prompt, or of n -> of n."""
    tokens, mask = text
    return tokens.expand(n, -1, -1), mask.expand(n, -1)


# ---- Text encoders: two, with one interface -----------------------------------------------------
#
#     tokens, mask = encoder(prompts)     B strings -> tokens (B, 32, width), 0 where padded;
#                                         mask (B, 32), True for real ones
#     encoder.width                       of the tokens
#     encoder.unknown(prompt)             its words that will not be heard

TOKENS = 32                      # PAPER: a prompt is 32 tokens, the rest of them padding


def words(prompt):
    """The words of a prompt, in small letters."""
    return re.findall(r"[a-z0-9]+", prompt.lower())


class WordEncoder(nn.Module):
    """A small text encoder that needs no download, learned together with the denoiser.

    OURS: a transformer over the vocabulary of the captions: enough to tell "a red chair with blue
    legs" from "a blue chair with red legs". The first token is always there, so a prompt without
    words has something to attend to: it is the null prompt.
    """

    def __init__(self, vocabulary, width, layers=2):
        super().__init__()
        self.width = width
        self.number = {}                                   # of each word; 0 is the first token
        for word in vocabulary:
            self.number[word] = len(self.number) + 1
        self.embed = nn.Embedding(len(vocabulary) + 1, width)
        self.place = nn.Parameter(0.1 * torch.randn(TOKENS, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True,
                                           norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def unknown(self, prompt):
        """Its words that no caption had: they are left out."""
        return [word for word in words(prompt) if word not in self.number]

    def read(self, prompt):
        """Numbers of its tokens, at most 32."""
        numbers = [0]
        for word in words(prompt):
            if word in self.number:
                numbers.append(self.number[word])
        return numbers[:TOKENS]

    def forward(self, prompts):
        rows, real = [], []
        for prompt in prompts:
            numbers = self.read(prompt)
            n_padding = TOKENS - len(numbers)
            rows.append(numbers + [0] * n_padding)
            real.append([True] * len(numbers) + [False] * n_padding)
        rows = torch.tensor(rows, device=self.place.device)                 # (B, 32)
        mask = torch.tensor(real, device=self.place.device)                 # (B, 32)
        x = self.embed(rows) + self.place                                   # (B, 32, width)
        x = self.layers(x, src_key_padding_mask=~mask)
        return x * mask[..., None], mask


class T5Encoder:
    """PAPER: frozen T5 (T5-11B: width 1024), from a local folder in transformers' layout.

    Needs the package transformers, which is imported only here. Raises BadInput.
    """

    def __init__(self, folder, device="cpu"):
        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError:
            raise BadInput("T5 needs transformers: pip install transformers sentencepiece; without "
                           "it leave --t5 out: a small encoder is learned instead") from None
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model = T5EncoderModel.from_pretrained(folder, local_files_only=True)
        except Exception as error:           # anything, from a missing file to a damaged one
            raise BadInput(f"--t5 {folder}: not a T5 in transformers' layout, e.g. a clone of "
                           f"google-t5/t5-11b ({type(error).__name__})") from None
        self.model.to(device).eval().requires_grad_(False)
        self.device = device
        self.width = self.model.config.d_model

    def unknown(self, prompt):
        return []                            # it spells what it does not know

    @torch.no_grad()
    def __call__(self, prompts):
        # An empty prompt is one token, the end: something to attend to.
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS,
                             return_tensors="pt")
        ids = ids.to(self.device)
        mask = ids["attention_mask"].bool()                                 # (B, 32)
        tokens = self.model(**ids).last_hidden_state                        # (B, 32, width)
        return tokens * mask[..., None], mask
