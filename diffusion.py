"""Normalized latents go in; a network that turns noise into new ones comes out. Stage 2.

Paper: Sec. 3.3, App. B.2, C.2. The network is ADM's U-Net (Dhariwal and Nichol 2021) with every
operation made 3D; preconditioning, loss and sampler are EDM's (Karras et al. 2022, "Elucidating
the design space of diffusion-based generative models"), with EDM's symbols.

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)      the denoiser, F the U-Net
    dx/dsigma   = (x - D(x; sigma)) / sigma                the path from noise (sigma 80) to data

Shapes: B samples, C latent channels, D = H = W side, T tokens of text.
Simplified: no dropout schedule, no mixed precision, no augmentation.
Read next: sample.py
"""
import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from data import BadInput

# ---- Building blocks of the U-Net, in 3D --------------------------------------------------------


def zero_init(layer):
    """A layer that starts at 0, so that the block around it starts as the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class GroupNorm(nn.GroupNorm):
    """The same for a group of one single value, too (32 channels at 1^3), which torch refuses where
    there is one sample, and which becomes 0."""

    def forward(self, x):
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def group_norm(channels):
    return GroupNorm(math.gcd(32, channels), channels)


class UNetBlock(nn.Module):
    """ADM's residual block: x, noise embedding -> x, at the same, half or twice the side.

    x (B, c_in, D, H, W), emb (B, c_emb) -> (B, c_out, D', H', W'); resample None, "down" or "up"
    """

    def __init__(self, c_in, c_out, c_emb, resample=None, dropout=0.0):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv3d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(c_out), zero_init(nn.Conv3d(c_out, c_out, 3, padding=1))
        self.affine = nn.Linear(c_emb, 2 * c_out)
        self.skip = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.resample = {None: lambda x: x, "down": lambda x: F.avg_pool3d(x, 2),
                         "up": lambda x: F.interpolate(x, scale_factor=2, mode="nearest")}[resample]

    def forward(self, x, emb):
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        scale, shift = self.affine(emb)[..., None, None, None].chunk(2, 1)     # (B, c_out, 1, 1, 1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)       # the noise level steers every channel
        return self.skip(self.resample(x)) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """x + proj(attention(q from x, k and v from x or from the text)).

    x (B, C, D, H, W); context (B, T, c_context) and mask (B, T), True for real tokens, or None
    """

    def __init__(self, channels, c_context=None, head_channels=64):
        super().__init__()
        self.heads = max(1, channels // head_channels)
        self.norm = group_norm(channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(c_context or channels, 2 * channels)
        self.proj = zero_init(nn.Linear(channels, channels))

    def forward(self, x, context=None, mask=None):
        tokens = self.norm(x).flatten(2).transpose(1, 2)                          # (B, DHW, C)
        k, v = self.to_kv(tokens if context is None else context).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)              # (B, heads, ., c)
                   for y in (self.to_q(tokens), k, v))
        mask = None if mask is None else mask[:, None, None]                      # (B, 1, 1, T)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return x + self.proj(out).transpose(1, 2).reshape(x.shape)


class Stage(nn.Module):
    """One residual block, then `layers` times self-attention and, given text, cross-attention."""

    def __init__(self, c_in, c_out, c_emb, layers, c_context, resample=None, dropout=0.0):
        super().__init__()
        self.block = UNetBlock(c_in, c_out, c_emb, resample, dropout)
        self.self_attention = nn.ModuleList(Attention(c_out) for _ in range(layers))
        self.cross_attention = nn.ModuleList(
            Attention(c_out, c_context) for _ in range(layers if c_context else 0))
        self.takes_skip = False

    def forward(self, x, emb, context, mask):
        x = self.block(x, emb)
        for i, attention in enumerate(self.self_attention):
            x = attention(x)
            if self.cross_attention:
                x = self.cross_attention[i](x, context, mask)
        return x


class UNet3D(nn.Module):
    """F(x; c_noise, text): ADM's encoder, middle and decoder with skip connections.

    x (B, C, D, H, W), c_noise (B,) -> (B, C, D, H, W). Arguments: see Denoiser.
    """

    def __init__(self, latent_channels, side, channels, multipliers, depth, attention, c_context,
                 transformer_depth, dropout):
        super().__init__()
        c_emb, widths = 4 * channels, [channels * m for m in multipliers]
        if side % (1 << (len(widths) - 1)):
            raise ValueError(f"a latent of side {side} cannot be halved {len(widths) - 1} times")
        self.channels = channels
        self.embed = nn.Sequential(nn.Linear(channels, c_emb), nn.SiLU(),
                                   nn.Linear(c_emb, c_emb), nn.SiLU())

        def stage(c_in, c_out, level, resample=None):
            layers = transformer_depth if side >> level in attention and not resample else 0
            return Stage(c_in, c_out, c_emb, layers, c_context, resample, dropout)

        c = widths[0]
        self.first = nn.Conv3d(latent_channels, c, 3, padding=1)
        self.encoder, skips = nn.ModuleList(), [c]
        for level, width in enumerate(widths):
            if level > 0:
                self.encoder.append(stage(c, c, level, "down"))
                skips.append(c)
            for _ in range(depth):
                self.encoder.append(stage(c, width, level))
                c = width
                skips.append(c)
        self.middle = nn.ModuleList(
            Stage(c, c, c_emb, layers, c_context, dropout=dropout)
            for layers in (transformer_depth, 0))
        self.decoder = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(depth + 1):
                self.decoder.append(stage(c + skips.pop(), width, level))
                self.decoder[-1].takes_skip = True
                c = width
            if level > 0:
                self.decoder.append(stage(c, c, level - 1, "up"))
        self.last = nn.Sequential(group_norm(c), nn.SiLU(),
                                  zero_init(nn.Conv3d(c, latent_channels, 3, padding=1)))

    def forward(self, x, c_noise, context=None, mask=None):
        """x (B, C, D, H, W), c_noise (B,), context (B, T, c_context), mask (B, T) -> as x."""
        # OURS: c_noise = ln(sigma)/4 runs from -1.6 to 1.1. ADM's sinusoids were made for step
        # numbers up to 1000; the frequencies here go from 1/4 to 64 instead of from 1e-4 to 1.
        freqs = torch.logspace(-2, 6, self.channels // 2, base=2, device=x.device, dtype=x.dtype)
        angles = c_noise[:, None] * freqs                                       # (B, channels / 2)
        emb = self.embed(torch.cat([angles.cos(), angles.sin()], 1))            # (B, c_emb)
        x = self.first(x)
        skips = [x]
        for stage in self.encoder:
            x = stage(x, emb, context, mask)
            skips.append(x)
        for stage in self.middle:
            x = stage(x, emb, context, mask)
        for stage in self.decoder:
            if stage.takes_skip:
                x = torch.cat([x, skips.pop()], 1)
            x = stage(x, emb, context, mask)
        return self.last(x)


# ---- Text (Sec. 3.3, App. B.2): two encoders, one interface -------------------------------------

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
        self.width, self.number = width, {word: i + 1 for i, word in enumerate(vocabulary)}
        self.embed = nn.Embedding(len(vocabulary) + 1, width)         # row 0: the first token
        self.place = nn.Parameter(0.1 * torch.randn(TOKENS, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True,
                                           norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def unknown(self, prompt):
        """Its words that no caption had: they are left out."""
        return [word for word in words(prompt) if word not in self.number]

    def forward(self, prompts):
        """B prompts -> tokens (B, 32, width), 0 where padded; mask (B, 32), True for real ones."""
        rows = [[0] + [self.number[w] for w in words(p) if w in self.number] for p in prompts]
        device = self.place.device
        mask = torch.tensor([[i < len(row) for i in range(TOKENS)] for row in rows], device=device)
        rows = torch.tensor([(row + [0] * TOKENS)[:TOKENS] for row in rows], device=device)
        x = self.layers(self.embed(rows) + self.place, src_key_padding_mask=~mask)
        return x * mask[..., None], mask


class T5Encoder:
    """PAPER: frozen T5 (T5-11B: width 1024), from a local folder in transformers' layout.

    Same interface as WordEncoder; needs the package transformers, which is imported only here.
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
        self.device, self.width = device, self.model.config.d_model

    def unknown(self, prompt):
        return []                            # it spells what it does not know

    @torch.no_grad()
    def __call__(self, prompts):
        """B prompts -> tokens (B, 32, width), 0 where padded; mask (B, 32), True for real ones."""
        # An empty prompt is one token, the end: something to attend to.
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS,
                             return_tensors="pt").to(self.device)
        mask = ids["attention_mask"].bool()
        return self.model(**ids).last_hidden_state * mask[..., None], mask


# ---- Preconditioning and loss (EDM, Table 1) ----------------------------------------------------


def preconditioning(sigma, sigma_data):
    """c_skip, c_out, c_in, c_noise for noise levels sigma (any shape), same shape each.

    Chosen so that input and target of the network have unit variance at every sigma.
    """
    total = sigma**2 + sigma_data**2
    return (sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(),
            sigma.log() / 4)


class Denoiser(nn.Module):
    """D(x; sigma): the expected clean latent, given a noisy one.

    latent_channels, side  shape of the latents (256, 8)
    channels, multipliers  the U-Net's width (128) and its factor per resolution ((3, 4))
    depth                  residual blocks per resolution (2; 3 with text)
    attention              sides with self- (and cross-) attention ((8, 4))
    context_dim            width of the text tokens; 0: no text, no cross-attention
    transformer_depth      attention layers after each block (1; 2 for Objaverse)
    sigma_data             standard deviation of normalized latents (0.5)
    vocabulary             words of a WordEncoder of its own; empty: none
    """

    def __init__(self, latent_channels, side, channels=128, multipliers=(3, 4), depth=2,
                 attention=(8, 4), context_dim=0, transformer_depth=1, sigma_data=0.5, dropout=0.0,
                 vocabulary=()):
        super().__init__()
        self.text = WordEncoder(vocabulary, context_dim) if context_dim and vocabulary else None
        self.sigma_data, self.context_dim = sigma_data, context_dim
        self.unet = UNet3D(latent_channels, side, channels, multipliers, depth, attention,
                           context_dim, transformer_depth, dropout)

    def forward(self, x, sigma, context=None, mask=None):
        """x (B, C, D, H, W), sigma scalar or (B,), context (B, T, context_dim) or None -> as x."""
        if x.ndim != 5:
            raise ValueError(f"x must be (B, C, D, H, W), got {tuple(x.shape)}")
        if (context is not None) != bool(self.context_dim):
            raise ValueError("context must be given if, and only if, context_dim is not 0")
        dtype = self.unet.first.weight.dtype               # states may be float64, the net is not
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        c_skip, c_out, c_in, c_noise = preconditioning(sigma, self.sigma_data)
        c_skip, c_out, c_in = (c[:, None, None, None, None] for c in (c_skip, c_out, c_in))
        raw = self.unet((c_in * x).to(dtype), c_noise.to(dtype), context, mask)
        return c_skip * x + c_out * raw.to(x.dtype)


def edm_loss(denoise, x, generator=None, P_mean=-1.2, P_std=1.2, sigma_data=0.5):
    """EDM's training loss: mean of weight(sigma) |D(x + sigma n; sigma) - x|^2.

    denoise  any callable (x, sigma) -> as x       x (B, C, D, H, W) clean, normalized latents
    ln sigma ~ N(P_mean, P_std^2); weight = (sigma^2 + sd^2) / (sigma sd)^2 = 1 / c_out^2, so that
    every noise level starts with a loss of about 1. Returns a scalar.
    """
    # Drawn on the CPU, where the generator lives: the same numbers on every device.
    normal = torch.randn(len(x), generator=generator).to(x)
    noise = torch.randn(x.shape, generator=generator).to(x)
    sigma = (P_mean + P_std * normal).exp()                                     # (B,)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data)**2
    error = (denoise(x + sigma[:, None, None, None, None] * noise, sigma) - x)**2
    return (weight * error.flatten(1).mean(1)).mean()


# ---- Sampling (EDM, Algorithm 2) ----------------------------------------------------------------


def guided(denoiser, context, null, weight):
    """Classifier-free guidance: D(x) = D(x | null) + weight (D(x | text) - D(x | null)).

    context, null  (tokens, mask), each for one prompt of B = 1 or for every sample
    returns a callable (x, sigma) -> as x, for edm_sampler. Weight 1 is the conditional model, 0 the
    unconditional one, each at one call of the network; else both go through it side by side.
    """
    def one(x, sigma, given):
        return denoiser(x, sigma, *(y.expand(len(x), *y.shape[1:]) for y in given))

    def both(x, sigma):
        pair = [torch.cat([a.expand(len(x), *a.shape[1:]), b.expand(len(x), *b.shape[1:])])
                for a, b in zip(context, null)]
        given, free = denoiser(torch.cat([x, x]), sigma, *pair).chunk(2)
        return free + weight * (given - free)

    if weight in (0, 1):
        return lambda x, sigma: one(x, sigma, context if weight == 1 else null)
    return both


def sigma_steps(steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Noise levels of the sampler, from sigma_max to sigma_min and then 0: (steps + 1,) float64."""
    i = torch.arange(steps, dtype=torch.float64)
    high, low = sigma_max**(1 / rho), sigma_min**(1 / rho)
    sigma = (high + i / max(1, steps - 1) * (low - high))**rho
    return torch.cat([sigma, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def edm_sampler(denoise, noise, steps, sigma_min=0.002, sigma_max=80, rho=7, S_churn=0,
                S_min=0, S_max=float("inf"), S_noise=1, generator=None, watch=None):
    """EDM's Algorithm 2: Heun's second-order steps, with churn (S_churn > 0) or without.

    denoise  any callable (x, sigma) -> expected clean x, with x in float64, sigma a 0-d tensor
    noise    (B, ...) unit normal, scaled by sigma_max in here      steps  the N of the schedule
    S_churn, S_min, S_max, S_noise   as in EDM: fresh noise added before each step
    generator of that noise: one for all, or a list of one for each sample
    watch    called with (step, sigma, denoised estimate) on the way, to draw it
    returns  samples as noise, float64
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    sigmas = sigma_steps(steps, sigma_min, sigma_max, rho).to(noise.device)

    def fresh():
        if isinstance(generator, list):
            return torch.stack([torch.randn(noise.shape[1:], generator=one, dtype=torch.float64)
                                for one in generator]).to(noise.device)
        return torch.randn(noise.shape, generator=generator, dtype=torch.float64).to(noise.device)

    x_next = noise.double() * sigmas[0]
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        gamma = min(S_churn / steps, math.sqrt(2) - 1) if S_min <= sigma <= S_max else 0.0
        sigma_hat, x_hat = sigma * (1 + gamma), x_next
        if gamma > 0:                               # churn: a little back up, with fresh noise
            x_hat = x_hat + (sigma_hat**2 - sigma**2).sqrt() * S_noise * fresh()
        denoised = denoise(x_hat, sigma_hat)
        if watch is not None:
            watch(i, sigma_hat, denoised)
        slope = (x_hat - denoised) / sigma_hat
        x_next = x_hat + (sigma_next - sigma_hat) * slope                   # Euler
        if sigma_next > 0:                                                  # Heun's correction
            slope_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x_hat + (sigma_next - sigma_hat) * (slope + slope_next) / 2
    return x_next


@torch.no_grad()
def ema_update(average, model, step, half_life):
    """average <- decay average + (1 - decay) model, decay = 0.5^(1 / half_life), in steps.

    Early on the half-life is at most a tenth of the steps so far, or the random start would linger.
    """
    decay = 0.5 ** (1 / max(1e-8, min(half_life, 0.1 * step)))
    for a, b in zip(average.parameters(), model.parameters()):
        a.lerp_(b, 1 - decay)
