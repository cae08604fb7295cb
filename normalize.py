"""Latent volumes F of the decoder go in; F_hat, of a scale that diffusion can rely on, come out.

Paper: Sec. 3.3 and Fig. 9: F_hat = (F - m) / s, with m the median and s = 0.7413 (Q75 - Q25), the
normalized interquartile range (IQR), which for a Gaussian equals the standard deviation.
Why not mean and deviation: a few latents are extreme (PAPER: 1e4 and more, as densities have no
upper bound), and a handful of those decides both. Quartiles do not see them.
When: once, between the two stages, on F = G1(e) of ALL training objects, the decoder in evaluation
mode (its batch norms no longer move). Stage 2 learns F_hat; its samples are denormalized for G2.
Shapes: N training objects, C channels, D = H = W the latent's side.
Read next: diffusion.py
"""
import numpy as np
import torch
from torch import nn

MODES = ("robust", "meanstd", "none")


class RobustNormalizer(nn.Module):
    """F_hat = spread (F - m) / s, by mode: "robust" (PAPER); "meanstd" or "none", to compare with.

    per_channel  m, s are (1, C, 1, 1, 1) instead of (). AMBIGUOUS: the paper's formula names one m
                 and one s, so one for all channels is the more natural reading
    spread       of F_hat. AMBIGUOUS: the formula gives 1, yet diffusion assumes sigma_data = 0.5
                 and Fig. 9 speaks of [-1, 1] (measured: docs/results.md)
    """

    def __init__(self, mode="robust", per_channel=False, spread=1.0):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.mode = mode
        self.per_channel = per_channel
        self.spread = spread
        self.register_buffer("m", torch.zeros(()))          # in stage 2's checkpoint, as is s:
        self.register_buffer("s", torch.ones(()))           # sampling needs the very same numbers

    @classmethod
    def from_settings(cls, settings):
        return cls(settings.normalization, settings.per_channel, settings.latent_scale)

    def fit(self, latents):
        """Measures m and s on F (N, C, D, H, W), ValueError if not finite. Returns self."""
        if latents.ndim != 5:
            raise ValueError(f"latents must be (N, C, D, H, W), got {tuple(latents.shape)}")
        if not torch.isfinite(latents).all():
            raise ValueError("latents are not finite: stage 1 has diverged")
        rows = latents.reshape(1, -1)                       # what is in a row shares an m and an s
        shape = ()
        if self.per_channel:
            rows = latents.transpose(0, 1).flatten(1)       # (C, N D H W)
            shape = (1, -1, 1, 1, 1)
        m, s = measure(rows.double(), self.mode)
        s = torch.where(s > 0, s, torch.ones_like(s))       # IQR 0, half of them equal: divide by 1
        self.m = m.to(latents).reshape(shape)               # to the latents' type and device
        self.s = s.to(latents).reshape(shape)
        return self

    def normalize(self, latents):
        """F (N, C, D, H, W) -> F_hat, same shape."""
        return (latents - self.m) / self.s * self.spread

    def denormalize(self, latents_hat):
        """F_hat (N, C, D, H, W) -> F, same shape."""
        return latents_hat / self.spread * self.s + self.m


def measure(rows, mode):
    """m and s of each row: rows (1 or C, M) -> (1 or C,) each."""
    if mode == "none":
        return torch.zeros_like(rows[:, 0]), torch.ones_like(rows[:, 0])
    if mode == "meanstd":
        return rows.mean(1), rows.std(1)
    # numpy, for torch.quantile refuses more than 16 million numbers.
    quartiles = np.quantile(rows.cpu().numpy(), [0.25, 0.5, 0.75], axis=1)
    q25, median, q75 = torch.from_numpy(quartiles)
    return median, 0.7413 * (q75 - q25)                     # 1 / 0.7413 is the IQR of N(0, 1)
