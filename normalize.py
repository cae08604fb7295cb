"""Latent volumes F of the decoder go in; F_hat, of a scale that diffusion can rely on, come out.

Paper: Sec. 3.3 and Fig. 9: F_hat = (F - m) / s, with m the median and s = 0.7413 (Q75 - Q25), the
normalized interquartile range, which for a Gaussian equals the standard deviation.

Why not mean and standard deviation: densities have no upper bound, so a few latent values become
extreme (PAPER: 1e4 and more), and a handful of those decides both. Quartiles do not see them.

When: once, between the two stages. Stage 1 is over, the decoder is in evaluation mode (its batch
norms no longer move), and m and s are measured on G1(e) of ALL training objects. Stage 2 trains on
F_hat; a sampled F_hat goes through denormalize before G2 turns it into a volume.

Shapes: N training objects, C channels, D = H = W the latent's side.
Read next: diffusion.py
"""
import torch
from torch import nn

MODES = ("robust", "meanstd", "none")


class RobustNormalizer(nn.Module):
    """F_hat = spread (F - m) / s.

    mode         "robust": median and 0.7413 IQR (PAPER); "meanstd", "none": to compare with
    per_channel  False: one m and one s for all numbers; True: one for each channel. AMBIGUOUS in
                 the paper; one for all reads most natural
    spread       of the result. AMBIGUOUS: the formula gives 1, while sigma_data is 0.5 and Fig. 9
                 speaks of [-1, 1] (measured: docs/results.md)
    buffers      m, s: () or, per channel, (1, C, 1, 1, 1). Whoever samples needs the very numbers
                 that training used, so they travel inside the checkpoint
    """

    def __init__(self, mode="robust", per_channel=False, spread=1.0):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.mode = mode
        self.per_channel = per_channel
        self.spread = spread
        self.register_buffer("m", torch.zeros(()))
        self.register_buffer("s", torch.ones(()))

    @classmethod
    def from_settings(cls, settings):
        return cls(settings.normalization, settings.per_channel, settings.latent_scale)

    def fit(self, latents):
        """Measures m and s on latents F (N, C, D, H, W). Returns self.

        Raises ValueError where a latent is not finite.
        """
        if latents.ndim != 5:
            raise ValueError(f"latents must be (N, C, D, H, W), got {tuple(latents.shape)}")
        if not torch.isfinite(latents).all():
            raise ValueError("latents are not finite: stage 1 has diverged")
        # One row for each group of numbers that shares an m and an s.
        if self.per_channel:
            rows = latents.transpose(0, 1).flatten(1)       # (C, N D H W)
            shape = (1, -1, 1, 1, 1)
        else:
            rows = latents.reshape(1, -1)                   # (1, N C D H W)
            shape = ()
        m, s = measure(rows.double(), self.mode)
        # Where half of the numbers are equal the IQR is 0: leave their scale as it is.
        s = torch.where(s > 0, s, torch.ones_like(s))
        self.m = m.to(latents).reshape(shape)               # to the latents' type and device
        self.s = s.to(latents).reshape(shape)
        return self

    def normalize(self, latents):
        """F (N, C, D, H, W) -> F_hat, same shape."""
        return (latents - self.m) / self.s * self.spread

    def denormalize(self, latents_hat):
        """F_hat (N, C, D, H, W) -> F, same shape: what G2 expects."""
        return latents_hat / self.spread * self.s + self.m


def measure(rows, mode):
    """m and s of each row: rows (G, M) -> two of (G,)."""
    if mode == "none":
        return torch.zeros_like(rows[:, 0]), torch.ones_like(rows[:, 0])
    if mode == "meanstd":
        return rows.mean(1), rows.std(1)
    # Sorting, because torch.quantile refuses more than 16 million numbers.
    ordered = rows.sort(dim=1).values
    q25 = quantile(ordered, 0.25)
    median = quantile(ordered, 0.5)
    q75 = quantile(ordered, 0.75)
    return median, 0.7413 * (q75 - q25)                     # 1 / 0.7413 is the IQR of N(0, 1)


def quantile(ordered, q):
    """Quantile q of sorted rows, linear between neighbours as in numpy: (G, M) -> (G,)."""
    last = ordered.shape[1] - 1
    rank = q * last                                         # between two whole ranks, mostly
    below = int(rank)
    above = min(below + 1, last)
    return torch.lerp(ordered[:, below], ordered[:, above], rank - below)
