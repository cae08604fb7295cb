"""Latent volumes of the decoder go in; the same, with a scale that diffusion can rely on, come out.

Paper: Sec. 3.3 and Fig. 9: F_hat = (F - m) / s with m the median and s = 0.7413 (Q75 - Q25), the
normalized interquartile range, which for a Gaussian equals the standard deviation.

Why not mean and deviation: densities have no upper bound, so a few latent values become extreme
(1e4 and more in the paper), and a handful of those decides both. Quartiles do not see them.

Shapes: N training latents, C channels, D = H = W.
Read next: diffusion.py
"""
import torch
from torch import nn

MODES = ("robust", "meanstd", "none")


class RobustNormalizer(nn.Module):
    """F_hat = scale (F - m) / s; the buffers m and s travel inside the checkpoint.

    mode         "robust": median and 0.7413 IQR (PAPER); "meanstd", "none": to compare with
    per_channel  False: one m and s for all (AMBIGUOUS in the paper; global reads most natural);
                 True: one for each of the C channels
    scale        spread of the result. AMBIGUOUS: the formula says 1 while sigma_data is 0.5 and
                 Fig. 9 speaks of [-1, 1]; the README tells what we measured
    """

    def __init__(self, mode="robust", per_channel=False, scale=1.0):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.mode, self.per_channel, self.scale = mode, per_channel, scale
        self.register_buffer("m", torch.zeros(()))
        self.register_buffer("s", torch.ones(()))

    def fit(self, x):
        """Measures m and s on latents x (N, C, ...). Returns self. Raises on non-finite values."""
        if not torch.isfinite(x).all():
            raise ValueError("latents are not finite: stage 1 has diverged")
        # One row per group that shares m and s: all values, or those of one channel.
        rows = x.transpose(0, 1).flatten(1) if self.per_channel else x.reshape(1, -1)
        if self.mode == "robust":
            # Sorting, because torch.quantile refuses more than 16 million numbers.
            ordered = rows.double().sort(dim=1).values
            q25, m, q75 = (_quantile(ordered, q) for q in (0.25, 0.5, 0.75))
            s = 0.7413 * (q75 - q25)
        elif self.mode == "meanstd":
            m, s = rows.double().mean(1), rows.double().std(1)
        else:
            m, s = torch.zeros(len(rows)), torch.ones(len(rows))
        s = torch.where(s > 0, s, torch.ones_like(s))       # IQR 0: half of them are equal
        shape = (1, -1) + (1,) * (x.ndim - 2) if self.per_channel else ()
        self.m, self.s = (v.to(x.dtype).to(x.device).reshape(shape) for v in (m, s))
        return self

    def normalize(self, x):
        """F (N, C, ...) -> F_hat, same shape."""
        return (x - self.m) / self.s * self.scale

    def denormalize(self, x):
        """F_hat (N, C, ...) -> F, same shape: what G2 expects."""
        return x / self.scale * self.s + self.m


def _quantile(ordered, q):
    """Quantile of sorted rows (G, M) with linear interpolation, as numpy does it -> (G,)."""
    place = q * (ordered.shape[1] - 1)
    low = int(place)
    high = min(low + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, low], ordered[:, high], place - low)
