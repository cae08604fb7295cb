"""diffusion.py: EDM's symbols by hand, a sampler driven by denoisers known in closed form, and the
way that text takes through the network."""
import copy
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import diffusion
from data import BadInput
from diffusion import (Denoiser, TextDenoiser, build_denoiser, edm_loss, edm_sampler, ema_update,
                       guided, preconditioning, sigma_steps)

F64 = torch.float64
TINY = dict(channels=8, multipliers=(1, 2), depth=1, attention=(4, 2))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=F64)


def volumes(values):
    """(B,) -> (B, 1, 1, 1, 1)"""
    return values.view(-1, 1, 1, 1, 1)


def gaussian_denoiser(a, mean=0.0):
    """E[x | x + sigma n] where x ~ N(mean, a^2): the best that any network could do."""
    def denoise(x, sigma):
        return mean + a**2 / (a**2 + sigma**2) * (x - mean)
    return denoise


def stirred(model):
    """The same model with no weight left at zero."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=seeded(p.numel())), alpha=0.1)
    return model.eval()


def tiny(latent_shape=(3, 4, 4, 4), **changes):
    torch.manual_seed(0)
    return stirred(Denoiser(latent_shape, **(TINY | changes)))


def tiny_text(latent_shape=(3, 4, 4, 4), context_dim=5, **changes):
    torch.manual_seed(0)
    return stirred(TextDenoiser(latent_shape, context_dim=context_dim, **(TINY | changes)))


def modules_of(model, kind):
    return [module for module in model.modules() if type(module) is kind]


# ---- Preconditioning and loss -------------------------------------------------------------------
@pytest.mark.parametrize("sigma, expected", [
    (0.5, (1 / 2, 0.125**0.5, 2**0.5, math.log(0.5) / 4)),
    (2.0, (1 / 17, 1 / 4.25**0.5, 1 / 4.25**0.5, math.log(2) / 4))])
def test_preconditioning_by_hand_at_sigma_one_half_and_two(sigma, expected):
    got = preconditioning(torch.tensor(sigma, dtype=F64), 0.5)
    assert [c.item() for c in got] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("a", [0.5, 1.2, 0.3])
def test_the_network_is_fed_and_must_answer_the_variances_of_the_second_reading(a):
    """Deviation a of the data: both 1 if that is sigma_data, else between 1 and (a / sd)^2."""
    sd = 0.5
    clean, noise = a * normal(200_000), normal(200_000, seed=1)
    for sigma in torch.tensor([0.002, 0.3, 1.0, 80.0], dtype=F64):
        c_skip, c_out, c_in, _ = preconditioning(sigma, sd)
        noisy = clean + sigma * noise
        total = sigma**2 + sd**2
        fed = (a**2 + sigma**2) / total
        answer = (sd**2 + a**2 * sigma**2 / sd**2) / total
        if a == sd:
            assert fed == pytest.approx(1) and answer == pytest.approx(1)
        low, high = sorted([1, (a / sd)**2])
        assert low - 1e-9 <= fed <= high + 1e-9 and low - 1e-9 <= answer <= high + 1e-9
        assert (c_in * noisy).var().item() == pytest.approx(fed.item(), rel=0.02)
        assert ((clean - c_skip * noisy) / c_out).var().item() == pytest.approx(answer.item(),
                                                                                rel=0.02)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0])
def test_a_new_denoiser_pays_the_variance_of_what_it_must_answer(sigma):
    a, sd = 1.2, 0.5
    model = Denoiser((3, 4, 4, 4), **TINY)
    x = a * normal(2000, 3, 4, 4, 4)
    with torch.no_grad():
        loss = edm_loss(model, x, sd, seeded(1), P_mean=math.log(sigma), P_std=0)
    expected = (sd**2 + a**2 * sigma**2 / sd**2) / (sigma**2 + sd**2)
    assert loss.item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_the_losss_weight_times_c_out_squared_is_one(sigma_data):
    """A denoiser of zeros that is off by c_out costs exactly 1, whatever sigmas are drawn."""
    def off_by_c_out(x, sigma):
        _, c_out, _, _ = preconditioning(sigma, sigma_data)
        return volumes(c_out).expand_as(x)
    loss = edm_loss(off_by_c_out, torch.zeros(64, 2, 2, 2, 2, dtype=F64), sigma_data)
    assert loss.item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("a, P_mean, P_std", [(0.5, -1.2, 1.2), (2.0, -1.2, 1.2), (2.0, 0.5, 0.3)])
def test_loss_of_the_ideal_denoiser_of_a_gaussian_is_its_closed_form(a, P_mean, P_std):
    """The error left is a^2 sigma^2 / (a^2 + sigma^2); times the weight, over ln sigma."""
    ideal = gaussian_denoiser(a)
    loss = edm_loss(lambda x, sigma: ideal(x, volumes(sigma)), a * normal(20_000, 1, 2, 2, 2), 0.5,
                    seeded(1), P_mean, P_std)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    s2 = np.exp(P_mean + P_std * nodes) ** 2
    expected = (weights * (a / 0.5)**2 * (s2 + 0.25) / (s2 + a * a)).sum() / weights.sum()
    assert loss.item() == pytest.approx(expected, rel=0.015)


def test_the_loss_draws_edms_noise_levels_and_unit_normal_noise_if_not_told_otherwise():
    seen = []

    def denoise(x, sigma):
        seen.append((x, sigma))
        return x
    edm_loss(denoise, torch.zeros(50_000, 1, 1, 1, 1), 0.5, seeded(0))
    noisy, sigma = seen[0]
    noise = noisy / volumes(sigma)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=0.02)
    assert sigma.log().std().item() == pytest.approx(1.2, abs=0.02)


def test_the_loss_cannot_forget_the_denoisers_sigma_data():
    with pytest.raises(TypeError, match="sigma_data"):
        edm_loss(tiny(), torch.zeros(1, 3, 4, 4, 4))


def test_the_losss_noise_is_its_generators():
    model, x = tiny(), torch.zeros(4, 3, 4, 4, 4)
    losses = [edm_loss(model, x, 0.5, seeded(seed)).item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


# ---- The network --------------------------------------------------------------------------------
def test_a_new_denoiser_is_c_skip_x_the_best_guess_without_knowledge():
    x, sigma = normal(2, 3, 4, 4, 4), torch.tensor([0.5, 2.0], dtype=F64)
    expected = x * volumes(torch.tensor([1 / 2, 1 / 17], dtype=F64))
    plain = Denoiser((3, 4, 4, 4), **TINY)
    with_text = TextDenoiser((3, 4, 4, 4), context_dim=5, **TINY)
    tokens, mask = torch.randn(2, 6, 5), torch.ones(2, 6, dtype=torch.bool)
    torch.testing.assert_close(plain(x, sigma), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(with_text(x, sigma, tokens, mask), expected, rtol=1e-13, atol=0)


def test_every_object_meets_its_own_sigma_and_no_other_object():
    model = tiny()
    x, sigma = normal(3, 3, 4, 4, 4), torch.tensor([0.1, 1.0, 30.0], dtype=F64)
    together = model(x, sigma)
    assert together.dtype == F64
    for b in range(3):
        alone = model(x[b:b + 1], sigma[b])
        torch.testing.assert_close(together[b], alone[0], rtol=1e-5, atol=1e-5)


def test_the_network_hears_the_noise_level_beyond_its_input():
    unet, x = tiny().unet, normal(1, 3, 4, 4, 4).float()
    quiet, loud = unet(x, torch.tensor([-0.5])), unet(x, torch.tensor([-0.4]))
    assert (quiet - loud).abs().max() > 1e-3


def test_the_denoiser_is_preconditioning_around_the_unet():
    model = tiny(sigma_data=0.7)
    x, sigma = normal(2, 3, 4, 4, 4), torch.tensor([0.4, 3.0], dtype=F64)
    c_skip, c_out, c_in, c_noise = preconditioning(sigma, 0.7)
    answer = model.unet((volumes(c_in) * x).float(), c_noise.float())
    expected = volumes(c_skip) * x + volumes(c_out) * answer
    torch.testing.assert_close(model(x, sigma), expected, rtol=1e-12, atol=1e-12)


def test_sigma_may_be_a_float_as_the_sampler_gives_it():
    model, x = tiny(), normal(2, 3, 4, 4, 4)
    assert torch.equal(model(x, 0.7), model(x, torch.tensor([0.7, 0.7], dtype=F64)))


def test_all_voxels_can_see_each_other():
    model = tiny(attention=(2,))
    x = normal(1, 3, 4, 4, 4)
    nudged = x.clone()
    nudged[0, 0, 0, 0, 0] += 1
    assert (model(nudged, 0.5) - model(x, 0.5)).abs().amax(1).min() > 1e-6


@pytest.mark.parametrize("attention, expected", [
    ((), []), ((8,), []), ((4,), [4, 4, 4]), ((2,), [2, 2, 2, 2]),
    ((4, 2), [4, 2, 2, 2, 2, 4, 4])])
def test_attention_stands_at_its_sides_and_nowhere_else(attention, expected):
    """Encoder, middle if its side has attention, decoder; with none, no module is built."""
    model, sides = tiny(attention=attention), []
    attentions = modules_of(model, diffusion.SelfAttention)
    for module in attentions:
        module.register_forward_hook(lambda module, inputs, out: sides.append(out.shape[-1]))
    model(normal(1, 3, 4, 4, 4), 0.5)
    assert sides == expected and len(attentions) == len(expected)
    assert any("Attention" in type(module).__name__ for module in model.modules()) == bool(expected)


@pytest.mark.parametrize("channels, groups", [
    (4, 1), (8, 2), (32, 8), (64, 16), (100, 25), (128, 32), (144, 24), (896, 32), (3, 1)])
def test_a_group_has_at_least_four_channels_as_edms_has(channels, groups):
    norm = diffusion.group_norm(channels)
    assert norm.num_groups == groups and norm.num_channels == channels


def test_the_last_layer_hears_a_channels_gain_and_offset():
    """Of `micro`'s U-Net; groups of a single channel would erase both."""
    model = tiny((16, 4, 4, 4), channels=32)
    x = normal(2, 16, 4, 4, 4).float()
    c_noise = torch.tensor([-0.3, 0.2])
    plain = model.unet(x, c_noise)

    def change(module, inputs):
        changed = inputs[0].clone()
        changed[:, 0] = 2 * changed[:, 0] + 1
        return (changed,)
    model.unet.last.register_forward_pre_hook(change)
    difference = model.unet(x, c_noise) - plain
    assert difference.norm() / plain.norm() > 1e-2


def test_what_a_block_adds_at_1x1x1_depends_on_its_input():
    torch.manual_seed(0)
    block = stirred(diffusion.UNetBlock(32, 32, 16))
    x, emb = torch.randn(2, 32, 1, 1, 1), torch.zeros(2, 16)
    added = block(x, emb) - x
    assert (added[0] - added[1]).abs().max() > 1e-2


def test_the_noise_level_scales_and_shifts_every_channel_of_a_block_around_what_it_was():
    torch.manual_seed(0)
    block = stirred(diffusion.UNetBlock(8, 8, 16))
    x, scale, shift = torch.randn(2, 8, 2, 2, 2), torch.randn(8), torch.randn(8)
    with torch.no_grad():
        block.affine.weight.zero_()
        block.affine.bias.copy_(torch.cat([scale, shift]))
    h = block.norm2(block.conv1(nn.functional.silu(block.norm1(x))))
    h = h * (1 + scale.view(8, 1, 1, 1)) + shift.view(8, 1, 1, 1)
    expected = x + block.conv2(nn.functional.silu(h))
    torch.testing.assert_close(block(x, torch.randn(2, 16)), expected)


def test_one_object_of_a_unet_that_ends_at_1x1x1_is_the_same_as_beside_another():
    model = tiny((3, 2, 2, 2), channels=32, multipliers=(1, 1), attention=(2,)).double()
    x = normal(2, 3, 2, 2, 2)
    torch.testing.assert_close(model(x[:1], 0.5), model(x, 0.5)[:1], rtol=0, atol=1e-12)


def test_a_block_halves_or_doubles_the_side_if_it_is_told_to():
    x, emb = torch.randn(1, 8, 4, 4, 4), torch.zeros(1, 16)
    down = diffusion.UNetBlock(8, 12, 16, resample=nn.AvgPool3d(2))
    up = diffusion.UNetBlock(8, 12, 16, resample=nn.Upsample(scale_factor=2))
    assert down(x, emb).shape == (1, 12, 2, 2, 2) and up(x, emb).shape == (1, 12, 8, 8, 8)


@pytest.mark.parametrize("match, call", [
    ("must be B latents", lambda: tiny()(torch.zeros(3, 4, 4, 4), 1.0)),
    ("must be B latents", lambda: tiny()(torch.zeros(1, 3, 8, 8, 8), 1.0)),
    ("side 6 .* 2 times", lambda: built((3, 6, 6, 6), unet_multipliers=(1, 1, 1))),
    ("3 heads do not divide 200", lambda: built(unet_channels=200)),
    ("3 heads do not divide 200", lambda: built(unet_channels=200, text=True)),
    ("tokens must be", lambda: tiny_text()(torch.zeros(1, 3, 4, 4, 4), 1.0, torch.zeros(1, 6, 4),
                                           torch.ones(1, 6, dtype=torch.bool))),
    ("tokens must be", lambda: tiny_text()(torch.zeros(2, 3, 4, 4, 4), 1.0, torch.zeros(1, 6, 5),
                                           torch.ones(1, 6, dtype=torch.bool))),
    ("transformer_depth 0", lambda: tiny_text(transformer_depth=0)),
    ("no side has any", lambda: tiny_text(attention=(16,)))])
def test_arguments_that_do_not_fit_are_refused(match, call):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("generators", [1, 2, 4])
def test_generators_are_as_many_as_objects_or_refused(generators):
    with pytest.raises(RuntimeError, match="shape"):
        edm_sampler(gaussian_denoiser(1), torch.zeros(3, 2), 4,
                    generator=[seeded(i) for i in range(generators)])


def test_the_papers_unets_keep_the_latents_shape():
    x, sigma = torch.zeros(2, 256, 8, 8, 8, device="meta"), torch.ones(2, device="meta")
    tokens = torch.zeros(2, 32, 1024, device="meta")
    mask = torch.ones(2, 32, dtype=torch.bool, device="meta")
    with torch.device("meta"):
        chairs = Denoiser((256, 8, 8, 8))
        objaverse = TextDenoiser((256, 8, 8, 8), channels=192, depth=3, context_dim=1024,
                                 transformer_depth=2)
    assert chairs(x, sigma).shape == x.shape
    assert objaverse(x, sigma, tokens, mask).shape == x.shape


def test_every_weight_learns_those_behind_the_skip_connections_and_of_the_text_too():
    model = tiny_text(transformer_depth=2)
    tokens, mask = torch.randn(2, 6, 5), torch.ones(2, 6, dtype=torch.bool)
    model(normal(2, 3, 4, 4, 4), 0.5, tokens, mask).square().sum().backward()
    for name, p in model.named_parameters():
        per_output = p.grad.abs().reshape(len(p), -1).amax(1)
        if name.endswith("bias"):                      # of some, a norm or a softmax sees nothing
            assert per_output.max() > 0, name
            continue
        assert (per_output > 0).all(), name            # every output channel learns
        if p.ndim > 1:
            per_input = p.grad.abs().transpose(0, 1).flatten(1).amax(1)
            assert (per_input > 0).all(), name         # and every input channel counts


# ---- From settings ------------------------------------------------------------------------------
SETTINGS = dict(text=False, unet_channels=8, unet_multipliers=(1, 2), unet_depth=1,
                unet_attention=(4, 2), sigma_data=0.5, context_dim=16, transformer_depth=1)
OF_DENOISER = [("unet_channels", "channels", 16), ("unet_multipliers", "multipliers", (2, 3)),
               ("unet_depth", "depth", 2), ("unet_attention", "attention", (2,)),
               ("sigma_data", "sigma_data", 0.7)]
OF_TEXT = [("context_dim", "context_dim", 20), ("transformer_depth", "transformer_depth", 2)]


def built(latent_shape=(3, 4, 4, 4), **changes):
    return build_denoiser(SimpleNamespace(**(SETTINGS | changes)), latent_shape)


def described(model):
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return type(model), model.latent_shape, model.sigma_data, shapes


@pytest.mark.parametrize("field, argument, value", OF_DENOISER)
def test_from_settings_passes_each_setting_on(field, argument, value):
    shape = (3, 4, 4, 4)
    plain = Denoiser.from_settings(SimpleNamespace(**SETTINGS), shape)
    changed = Denoiser.from_settings(SimpleNamespace(**(SETTINGS | {field: value})), shape)
    by_hand = Denoiser(shape, **(TINY | {argument: value}))
    assert described(changed) == described(by_hand) != described(plain)


@pytest.mark.parametrize("field, argument, value", OF_DENOISER + OF_TEXT)
def test_from_settings_passes_each_setting_on_where_there_is_text(field, argument, value):
    shape = (3, 4, 4, 4)
    with_text = TINY | dict(context_dim=16, transformer_depth=1, vocabulary=WORDS)
    plain = TextDenoiser.from_settings(SimpleNamespace(**SETTINGS), shape, WORDS)
    changed = TextDenoiser.from_settings(SimpleNamespace(**(SETTINGS | {field: value})), shape,
                                         WORDS)
    by_hand = TextDenoiser(shape, **(with_text | {argument: value}))
    assert described(changed) == described(by_hand) != described(plain)


def test_build_denoiser_knows_text_if_and_only_if_the_settings_ask_for_it():
    shape = (3, 4, 4, 4)
    without = build_denoiser(SimpleNamespace(**SETTINGS), shape, WORDS)
    settings = SimpleNamespace(**(SETTINGS | dict(text=True)))
    own, frozen = build_denoiser(settings, shape, WORDS), build_denoiser(settings, shape)
    assert type(without) is Denoiser and type(own) is type(frozen) is TextDenoiser
    assert own.text.unknown("a green chair") == ["green"] and frozen.text is None


# ---- The sampler (Algorithm 2) ------------------------------------------------------------------
def test_sigma_steps_go_from_sigma_max_to_sigma_min_and_then_zero():
    sigma = sigma_steps(18)
    assert sigma.shape == (19,) and sigma.dtype == F64 and sigma[-1] == 0
    assert sigma[[0, 17]].tolist() == pytest.approx([80, 0.002], rel=1e-12)
    ninth = (80**(1 / 7) + 9 / 17 * (0.002**(1 / 7) - 80**(1 / 7)))**7
    assert sigma[9].item() == pytest.approx(ninth, rel=1e-12) and (sigma.diff() < 0).all()
    assert sigma_steps(3, 1.0, 9.0, 2.0).tolist() == pytest.approx([9, 4, 1, 0])
    assert sigma_steps(1).tolist() == pytest.approx([80, 0])


def heun_error(steps, a=0.5):
    """Against the exact path x(sigma) ~ sqrt(a^2 + sigma^2) and the last step, Euler's, to 0."""
    noise = normal(100)
    exact = 80 * noise * math.sqrt((a**2 + 0.002**2) / (a**2 + 80**2)) * a**2 / (a**2 + 0.002**2)
    samples = edm_sampler(gaussian_denoiser(a), noise, steps, S_churn=0)
    return (samples - exact).norm() / exact.norm()


def test_heuns_error_falls_four_times_with_every_doubling_of_the_steps():
    errors = [heun_error(steps) for steps in (64, 128, 256, 512)]
    for coarse, fine in zip(errors, errors[1:]):
        assert coarse / fine == pytest.approx(4, rel=0.1)
    assert errors[0] < 5e-3


@pytest.mark.parametrize("churn", [
    dict(S_churn=0), dict(S_min=0, S_max=math.inf, S_noise=1), dict(), dict(S_churn=80)])
def test_the_ideal_denoiser_of_a_gaussian_gives_its_mean_and_spread_at_64_steps(churn):
    x = edm_sampler(gaussian_denoiser(0.5, mean=-0.8), normal(100_000), 64, generator=seeded(1),
                    **churn)
    assert x.std().item() == pytest.approx(0.5, rel=0.03)
    assert x.mean().item() == pytest.approx(-0.8, abs=0.02)


@pytest.mark.parametrize("S_churn", [0, 30])
def test_the_ideal_denoiser_of_two_points_lands_on_them_in_their_proportion(S_churn):
    """Points -1 and 2 with odds 3 to 1: D is their mean, weighed by how likely each made x."""
    def denoise(x, sigma):
        log_odds = ((x + 1)**2 - (x - 2)**2) / (2 * sigma**2) - math.log(3)
        return -1 + 3 * torch.sigmoid(log_odds)
    x = edm_sampler(denoise, normal(20_000), 64, S_churn=S_churn, generator=seeded(1))
    assert torch.minimum((x + 1).abs(), (x - 2).abs()).max() < 1e-3
    assert (x > 0.5).double().mean().item() == pytest.approx(0.25, abs=0.02)


def test_one_step_is_the_denoisers_answer_at_sigma_max():
    noise = normal(7)
    x = edm_sampler(gaussian_denoiser(0.5, mean=3.0), noise, 1)
    torch.testing.assert_close(x, 3 + 0.25 / (0.25 + 6400) * (80 * noise - 3))


def test_the_state_is_float64_the_noise_is_scaled_and_sigma_falls_as_it_should():
    seen = []

    def denoise(x, sigma):
        seen.append((x.dtype, type(sigma), x.std().item(), sigma))
        return torch.full_like(x, 4.0)

    out = edm_sampler(denoise, normal(5000).float(), 5, S_churn=0, sigma_max=20)
    assert out.dtype == F64 and (out - 4).abs().max() < 1e-12
    assert all(dtype == F64 and kind is float for dtype, kind, *_ in seen)
    assert len(seen) == 9                                              # 2 a step, 1 in the last
    assert seen[0][2] == pytest.approx(20, rel=0.03)
    sigmas = sigma_steps(5, sigma_max=20).tolist()
    begins, ends = seen[0::2], seen[1::2]
    assert [sigma for *_, sigma in begins] == pytest.approx(sigmas[:-1])
    assert [sigma for *_, sigma in ends] == pytest.approx(sigmas[1:-1])


def churned(seed, denoise=gaussian_denoiser(0.5), **settings):
    return edm_sampler(denoise, normal(50), 8, generator=seeded(seed), **settings)


def test_churn_repeats_from_its_generator_and_stays_within_its_range():
    plain = churned(1, S_churn=0)
    assert torch.equal(plain, churned(2, S_churn=0))                   # nothing is drawn
    assert torch.equal(churned(1, S_churn=20), churned(1, S_churn=20))
    assert (churned(1, S_churn=20) - churned(2, S_churn=20)).abs().max() > 0.01
    assert torch.equal(churned(1, S_min=100, S_max=1000), plain)       # no step above S_min
    assert torch.equal(churned(1, S_min=0, S_max=0.001), plain)        # none below S_max


@pytest.mark.parametrize("S_churn, gamma", [(2, 2 / 8), (20, math.sqrt(2) - 1)])    # 20 / 8 is cut
def test_churn_raises_sigma_by_its_share_of_a_step_at_most_to_sqrt_2_times(S_churn, gamma):
    asked = []

    def denoise(x, sigma):
        asked.append(sigma)
        return torch.zeros_like(x)

    churned(0, denoise, S_churn=S_churn, S_min=1, S_max=50)
    levels = asked[0::2]                               # of Heun's two, the one at a step's begin
    assert len(levels) == 8
    for level, sigma in zip(levels, sigma_steps(8).tolist()):
        inside = 1 <= sigma <= 50
        assert level / sigma - 1 == pytest.approx(gamma if inside else 0, abs=1e-12)


def test_churns_noise_has_the_deviation_that_its_rise_of_sigma_needs_times_s_noise():
    """A denoiser that always answers 0, in one churned step, from sigma 2 to sigma 0.5."""
    seen = []

    def denoise(x, sigma):
        seen.append((x, sigma))
        return torch.zeros_like(x)
    edm_sampler(denoise, torch.zeros(100_000), 2, S_churn=0.6, S_min=1, S_noise=1.5, sigma_max=2,
                sigma_min=0.5, generator=seeded(0))
    x, sigma_hat = seen[0]
    assert sigma_hat == pytest.approx(2 * 1.3)
    assert x.std().item() == pytest.approx(1.5 * math.sqrt(2.6**2 - 2**2), rel=0.01)


def test_the_default_churn_is_edms_for_imagenet_which_stands_in_for_the_papers():
    edms = dict(S_churn=40, S_min=0.05, S_max=50, S_noise=1.003)
    default = churned(1)
    assert torch.equal(default, churned(1, **edms))
    for name, other in [("S_churn", 0), ("S_min", 0.5), ("S_max", 5), ("S_noise", 1)]:
        assert not torch.equal(default, churned(1, **(edms | {name: other}))), name


def test_with_a_generator_each_an_object_is_the_same_however_many_others_there_are():
    denoise, noise = gaussian_denoiser(0.5), normal(3, 5)
    together = edm_sampler(denoise, noise, 8, generator=[seeded(0), seeded(1), seeded(2)])
    alone = edm_sampler(denoise, noise[2:], 8, generator=[seeded(2)])
    assert torch.equal(together[2:], alone)
    other = edm_sampler(denoise, noise[2:], 8, generator=[seeded(9)])
    assert not torch.equal(alone, other)


# ---- Averaged weights ---------------------------------------------------------------------------
def test_ema_forgets_half_in_its_half_life_and_the_random_start_at_once():
    model = nn.Linear(2, 2, bias=False).double()
    average = copy.deepcopy(model)
    nn.init.ones_(model.weight)
    nn.init.zeros_(average.weight)
    for _ in range(50):
        ema_update(average, model, step=10_000, half_life=50)
    torch.testing.assert_close(average.weight, torch.full_like(average.weight, 0.5))
    nn.init.zeros_(average.weight)
    ema_update(average, model, step=20, half_life=50)                  # half-life 2 steps, so early
    torch.testing.assert_close(average.weight, torch.full_like(average.weight, 1 - 0.5**0.5))
    ema_update(average, model, step=0, half_life=50)
    torch.testing.assert_close(average.weight, torch.ones_like(average.weight))
    assert (model.weight == 1).all()


# ---- Text in the U-Net --------------------------------------------------------------------------
WORDS = ["a", "blue", "chair", "legs", "red", "with"]


@pytest.mark.parametrize("transformer_depth", [1, 2, 3])
def test_self_and_cross_attention_come_in_pairs_in_this_order(transformer_depth):
    block = diffusion.TextBlock(diffusion.UNetBlock(8, 8, 16, attention=True), 5, transformer_depth)
    called = []
    for module in block.modules():
        if isinstance(module, diffusion.SelfAttention):
            module.register_forward_hook(lambda module, *_: called.append(type(module).__name__))
    told = torch.zeros(1, 16), torch.zeros(1, 6, 5), torch.ones(1, 6, dtype=torch.bool)
    block(torch.zeros(1, 8, 2, 2, 2), *told)
    assert called == ["SelfAttention", "CrossAttention"] * transformer_depth


@pytest.mark.parametrize("transformer_depth", [1, 2])
def test_text_is_heard_at_the_sides_with_attention(transformer_depth):
    plain, with_text = tiny(), tiny_text(transformer_depth=transformer_depth)
    pairs = transformer_depth * len(modules_of(plain, diffusion.SelfAttention))
    assert len(modules_of(with_text, diffusion.CrossAttention)) == pairs
    assert len(modules_of(with_text, diffusion.SelfAttention)) == pairs


def test_the_text_denoiser_without_its_cross_attention_is_the_denoiser():
    plain, with_text = tiny(), tiny_text()
    for cross_attention in modules_of(with_text, diffusion.CrossAttention):
        diffusion.zero_init(cross_attention.proj)
    shared = {}
    for name, value in with_text.state_dict().items():
        if "cross_attention" not in name:
            shared[name.replace(".block.", ".")] = value
    plain.load_state_dict(shared)
    x, sigma = normal(2, 3, 4, 4, 4), torch.tensor([0.3, 3.0], dtype=F64)
    tokens, mask = torch.randn(2, 6, 5), torch.ones(2, 6, dtype=torch.bool)
    assert torch.equal(plain(x, sigma), with_text(x, sigma, tokens, mask))


@pytest.mark.parametrize("transformer_depth", [1, 2])
def test_masked_padding_tokens_change_nothing_and_real_ones_do(transformer_depth):
    model = tiny_text(transformer_depth=transformer_depth)
    x, sigma = normal(2, 3, 4, 4, 4), torch.tensor([0.3, 3.0], dtype=F64)
    tokens = normal(2, 6, 5, seed=1).float()
    mask = torch.arange(6) < torch.tensor([[4], [2]])                  # True for real tokens
    out = model(x, sigma, tokens, mask)
    assert torch.equal(out, model(x, sigma, torch.where(mask[..., None], tokens, 99.0), mask))
    cut = model(x[:1], sigma[:1], tokens[:1, :4], mask[:1, :4])
    torch.testing.assert_close(out[:1], cut, rtol=1e-5, atol=1e-5)
    changed = tokens.clone()
    changed[0, 0] += 1
    difference = (out - model(x, sigma, changed, mask)).abs().amax((1, 2, 3, 4))
    assert difference[0] > 1e-4 and difference[1] == 0


def test_the_loss_teaches_the_denoisers_own_word_encoder():
    model = tiny_text(context_dim=16, vocabulary=WORDS)
    tokens, mask = model.text(["a red chair", "a blue chair"])
    edm_loss(lambda x, sigma: model(x, sigma, tokens, mask), torch.randn(2, 3, 4, 4, 4),
             model.sigma_data).backward()
    learned = model.text.embed.weight.grad.abs().amax(1) > 0
    heard = [True] + [word in ("a", "red", "blue", "chair") for word in WORDS]
    assert learned.tolist() == heard


# ---- Guidance -----------------------------------------------------------------------------------
@torch.no_grad()
def test_guidance_is_linear_in_its_weight_and_exact_at_0_and_1():
    model, encode = tiny_text(context_dim=16).double(), encoder().double()
    text, null = encode(["a red chair"]), encode([""])
    x, sigma = normal(2, 3, 4, 4, 4), 0.7
    D = {weight: guided(model, text, null, weight)(x, sigma) for weight in (0, 1, 2.0, 3.0)}
    tokens, mask = encode(["a red chair", "a red chair"])
    torch.testing.assert_close(D[1], model(x, sigma, tokens, mask))
    tokens, mask = encode(["", ""])
    torch.testing.assert_close(D[0], model(x, sigma, tokens, mask))
    assert (D[1] - D[0]).abs().max() > 1e-4
    for weight in (2.0, 3.0):
        torch.testing.assert_close(D[weight], D[0] + weight * (D[1] - D[0]))


@torch.no_grad()
def test_guidance_leads_every_object_by_its_own_prompt():
    model, encode = tiny_text(context_dim=16).double(), encoder().double()
    x, null = normal(2, 3, 4, 4, 4), encode([""])
    together = guided(model, encode(["a red chair", "blue legs"]), null, 3.0)(x, 0.7)
    alone = guided(model, encode(["blue legs"]), null, 3.0)(x[1:], 0.7)
    torch.testing.assert_close(together[1:], alone)


def test_guidance_calls_the_network_once_a_step():
    calls = []

    def denoiser(x, sigma, tokens, mask):
        calls.append(len(x))
        assert len(tokens) == len(mask) == len(x)
        return x + tokens.mean()
    real = torch.ones(1, 32, dtype=torch.bool)
    text, null = (torch.ones(1, 32, 4), real), (torch.zeros(1, 32, 4), real)
    for weight, size in [(0, 3), (1, 3), (3.0, 6)]:
        guided(denoiser, text, null, weight)(torch.zeros(3, 1, 2, 2, 2), 1.0)
        assert calls.pop() == size and not calls


# ---- Text encoders ------------------------------------------------------------------------------
def encoder(seed=0):
    torch.manual_seed(seed)
    return diffusion.WordEncoder(WORDS, 16).eval()


@torch.no_grad()
def test_the_word_encoder_hears_which_words_and_in_which_order():
    encode = encoder()
    tokens, mask = encode(["a red chair with blue legs", "a blue chair with red legs", ""])
    assert tokens.shape == (3, 32, encode.width) and encode.width == 16
    assert (tokens[0, 3] - tokens[1, 3]).abs().max() > 1e-3            # "chair"


@torch.no_grad()
def test_a_captions_mask_is_true_for_its_words_and_the_first_token_alone():
    tokens, mask = encoder()(["a red chair", "", "red " * 1000])
    expected = torch.zeros(3, 32, dtype=torch.bool)
    expected[0, :4] = True
    expected[1, :1] = True
    expected[2, :] = True
    assert torch.equal(mask, expected)
    assert (tokens[~mask] == 0).all() and (tokens[mask].abs().amax(1) > 0).all()


@torch.no_grad()
def test_the_words_do_not_look_at_the_padding():
    encode = encoder()
    tokens, _ = encode(["a red chair"])
    encode.place[4:] = torch.randn(28, 16)
    changed, _ = encode(["a red chair"])
    torch.testing.assert_close(tokens, changed, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_rest_of_the_batch_changes_no_token():
    encode = encoder()
    alone, _ = encode(["a red chair"])
    beside, _ = encode(["a red chair", "a blue chair with red legs"])
    torch.testing.assert_close(alone[0], beside[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_unknown_words_are_named_and_left_out_and_a_prompt_of_none_is_the_null_prompt():
    encode = encoder()
    assert encode.unknown("A teal chair, with legs!") == ["teal"]
    for prompt in ("", "zebra teal", "!?"):
        assert torch.equal(encode([prompt])[0], encode([""])[0])
    assert torch.equal(encode(["a teal chair"])[0], encode(["a chair"])[0])


def test_t5_without_transformers_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BadInput, match="pip install transformers"):
        diffusion.T5Encoder(tmp_path)


def test_t5_reads_32_tokens_zero_where_padded_and_an_empty_prompt_is_its_end(t5_folder):
    encode = diffusion.T5Encoder(t5_folder)
    tokens, mask = encode(["a red chair", "", "a " * 1000])
    assert encode.width == 16 and tokens.shape == (3, 32, 16)
    assert mask.sum(1).tolist() == [4, 1, 32] and (tokens[~mask] == 0).all()
    # Without padding the network itself says the same: padding changes nothing.
    ids = torch.tensor([[3, 4, 6, 1]])                                # a red chair </s>
    torch.testing.assert_close(tokens[0, :4], encode.model(input_ids=ids).last_hidden_state[0])
    assert not any(p.requires_grad for p in encode.model.parameters())


def test_a_folder_that_holds_no_t5_is_refused_in_one_line(tmp_path):
    pytest.importorskip("transformers", reason="T5 is optional: pip install transformers")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="google-t5/t5-11b"):
        diffusion.T5Encoder(tmp_path)
