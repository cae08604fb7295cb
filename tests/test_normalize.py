"""normalize.py: exact on Gaussians, blind to outliers, its own inverse."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from normalize import MODES, RobustNormalizer


def latents(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("n", [2, 5, 8, 1001])
def test_m_and_s_are_numpys_quartiles_exactly(n):
    x = latents(n, 3, 1, 1, 1) ** 3 + 2
    q25, median, q75 = np.quantile(x.numpy(), [0.25, 0.5, 0.75])
    normalizer = RobustNormalizer().fit(x)
    assert normalizer.m.item() == pytest.approx(median, rel=1e-14)
    assert normalizer.s.item() == pytest.approx(0.7413 * (q75 - q25), rel=1e-14)


def test_gaussian_data_gets_its_own_mean_and_deviation():
    x = latents(1000, 4, 5, 5, 5) * 2.5 - 0.7
    n = x.numel()
    robust = RobustNormalizer("robust").fit(x)
    plain = RobustNormalizer("meanstd").fit(x)
    # Sampling errors of median, IQR and deviation of a Gaussian: 1.25, 1.17 and 0.71 s / sqrt(n).
    assert robust.m.item() == pytest.approx(-0.7, abs=4 * 1.25 * 2.5 / n**0.5)
    assert robust.s.item() == pytest.approx(2.5, rel=1e-4 + 4 * 1.17 / n**0.5)
    assert plain.m.item() == pytest.approx(-0.7, abs=4 * 2.5 / n**0.5)
    assert plain.s.item() == pytest.approx(x.std().item(), rel=1e-12)
    assert robust.normalize(x).std().item() == pytest.approx(1, abs=0.01)


def test_outliers_of_a_million_in_every_thousandth_place_are_not_seen():
    x = latents(100, 10, 5, 5, 4) * 2 + 1
    spoilt = x.clone()
    spoilt.view(-1)[::1000] = 1e6
    clean = RobustNormalizer("robust").fit(x)
    robust = RobustNormalizer("robust").fit(spoilt)
    plain = RobustNormalizer("meanstd").fit(spoilt)
    assert robust.m.item() == pytest.approx(clean.m.item(), abs=0.005)
    assert robust.s.item() == pytest.approx(clean.s.item(), rel=0.01)
    assert plain.m > 900
    assert plain.s > 30_000


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_denormalize_undoes_normalize_and_the_result_has_the_spread_asked_for(mode, per_channel):
    x = latents(400, 3, 2, 2, 2) * torch.tensor([1.0, 5, 0.1]).view(3, 1, 1, 1) + 4
    fitted = RobustNormalizer(mode, per_channel).fit(x)                # spread 1
    half = RobustNormalizer(mode, per_channel, spread=0.5).fit(x)
    for normalizer in (fitted, half):
        there_and_back = normalizer.denormalize(normalizer.normalize(x))
        torch.testing.assert_close(there_and_back, x, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(half.normalize(x), fitted.normalize(x) / 2)
    expected = x if mode == "none" else (x - fitted.m) / fitted.s
    torch.testing.assert_close(fitted.normalize(x), expected)
    torch.testing.assert_close(half.denormalize(torch.zeros_like(x)), fitted.m.expand_as(x))


def test_per_channel_is_each_channel_on_its_own():
    x = latents(50, 3, 2, 3, 4) * torch.tensor([1.0, 5, 0.1]).view(3, 1, 1, 1)
    for mode in ("robust", "meanstd"):
        together = RobustNormalizer(mode, per_channel=True).fit(x)
        assert together.m.shape == together.s.shape == (1, 3, 1, 1, 1)
        for c in range(3):
            alone = RobustNormalizer(mode).fit(x[:, c:c + 1])
            assert alone.m.shape == ()
            assert together.m[0, c].item() == pytest.approx(alone.m.item(), rel=1e-12)
            assert together.s[0, c].item() == pytest.approx(alone.s.item(), rel=1e-12)
            torch.testing.assert_close(together.normalize(x)[:, c], alone.normalize(x[:, c]))


def test_a_constant_channel_stays_finite_and_comes_back():
    x = torch.cat([latents(20, 1, 2, 2, 2), torch.full((20, 1, 2, 2, 2), 3.0)], 1)
    for mode in ("robust", "meanstd"):
        normalizer = RobustNormalizer(mode, per_channel=True).fit(x)
        normalized = normalizer.normalize(x)
        assert (normalized[:, 1] == 0).all()
        assert (normalizer.denormalize(normalized)[:, 1] == 3).all()


def test_more_than_16_million_values_are_measured():
    n = 2**24 + 5                                        # torch.quantile refuses so many
    backwards = torch.arange(n, dtype=torch.float64).flip(0)
    normalizer = RobustNormalizer().fit(backwards.view(1, 1, 1, 1, n))
    assert normalizer.m.item() == (n - 1) / 2
    assert normalizer.s.item() == pytest.approx(0.7413 * (n - 1) / 2, rel=1e-14)


@pytest.mark.parametrize("per_channel", [False, True])
def test_two_buffers_are_all_that_a_checkpoint_must_carry_and_keep_the_datas_type(per_channel):
    x = latents(10, 2, 2, 2, 2).float()
    normalizer = RobustNormalizer("robust", per_channel).fit(x)
    other = RobustNormalizer()
    other.m = normalizer.m.clone()
    other.s = normalizer.s.clone()
    assert torch.equal(other.normalize(x), normalizer.normalize(x))
    assert dict(normalizer.named_buffers()).keys() == {"m", "s"}
    assert other.m.dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_latents_that_are_not_finite_are_refused(bad):
    x = latents(4, 2, 2, 2, 2)
    x[1, 1, 0, 1, 0] = bad
    with pytest.raises(ValueError, match="not finite"):
        RobustNormalizer().fit(x)


def test_latents_of_another_shape_are_refused_by_name():
    with pytest.raises(ValueError, match="latents must be .N, C, D, H, W., got .4, 8."):
        RobustNormalizer(per_channel=True).fit(latents(4, 8))


def test_an_unknown_mode_is_refused_by_name():
    with pytest.raises(ValueError, match="robust, meanstd, none.*'median'"):
        RobustNormalizer("median")


def test_settings_reach_the_normalizer():
    x = latents(40, 3, 2, 2, 2) * torch.tensor([1.0, 5, 0.1]).view(3, 1, 1, 1) + 4
    settings = SimpleNamespace(normalization="meanstd", per_channel=True, latent_scale=0.5)
    normalizer = RobustNormalizer.from_settings(settings).fit(x)
    torch.testing.assert_close(normalizer.m.flatten(), x.mean((0, 2, 3, 4)))
    deviation = normalizer.normalize(x).transpose(0, 1).flatten(1).std(1)
    torch.testing.assert_close(deviation, torch.full((3,), 0.5, dtype=torch.float64))
