"""diffusion.py: EDM's symbols by hand, and a sampler driven by denoisers known in closed form."""
import copy
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import diffusion   # noqa: E402
from data import BadInput   # noqa: E402
from diffusion import (Denoiser, edm_loss, edm_sampler, ema_update,   # noqa: E402
                       preconditioning, sigma_steps)

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gaussian_denoiser(a, mean=0.0):
    """E[x | x + sigma n] where x ~ N(mean, a^2): the best that any network could do."""
    return lambda x, sigma: mean + a**2 / (a**2 + sigma**2) * (x - mean)


def tiny(**kw):
    """A U-Net small enough to run in a test, with no weight left at zero."""
    torch.manual_seed(0)
    model = Denoiser(**{**dict(latent_channels=3, side=4, channels=8, multipliers=(1, 2), depth=1,
                               attention=(4, 2)), **kw}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape), alpha=0.1)
    return model


# ---- Preconditioning and loss -------------------------------------------------------------------


def test_preconditioning_by_hand_at_sigma_one_half_and_two():
    for sigma, expected in [(0.5, (1 / 2, 0.125**0.5, 2**0.5, math.log(0.5) / 4)),
                            (2.0, (1 / 17, 1 / 4.25**0.5, 1 / 4.25**0.5, math.log(2) / 4))]:
        c = preconditioning(torch.tensor(sigma, dtype=F64), 0.5)
        assert [v.item() for v in c] == pytest.approx(expected, rel=1e-14)


def test_c_in_and_c_out_give_the_network_unit_variance_at_every_sigma():
    x, n = 0.5 * normal(200_000), normal(200_000, seed=1)
    for sigma in torch.tensor([0.002, 0.3, 1.0, 80.0], dtype=F64):
        c_skip, c_out, c_in, _ = preconditioning(sigma, 0.5)
        y = x + sigma * n
        assert (c_in * y).std().item() == pytest.approx(1, abs=0.01)
        assert ((x - c_skip * y) / c_out).std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_the_losss_weight_times_c_out_squared_is_one(sigma_data):
    """A denoiser of zeros that is off by c_out costs exactly 1, whatever sigmas are drawn."""
    def off_by_c_out(x, sigma):
        return preconditioning(sigma, sigma_data)[1][:, None, None, None, None].expand_as(x)
    loss = edm_loss(off_by_c_out, torch.zeros(64, 2, 2, 2, 2, dtype=F64), sigma_data=sigma_data)
    assert loss.item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("a, P_mean, P_std", [(0.5, -1.2, 1.2), (2.0, -1.2, 1.2), (2.0, 0.5, 0.3)])
def test_loss_of_the_ideal_denoiser_of_a_gaussian_is_its_closed_form(a, P_mean, P_std):
    """The error left is a^2 sigma^2 / (a^2 + sigma^2); times the weight, over ln sigma."""
    denoise = gaussian_denoiser(a)
    loss = edm_loss(lambda x, s: denoise(x, s[:, None, None, None, None]),
                    a * normal(20_000, 1, 2, 2, 2), torch.Generator().manual_seed(1), P_mean, P_std)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    s2 = np.exp(P_mean + P_std * nodes) ** 2
    expected = (weights * (a / 0.5)**2 * (s2 + 0.25) / (s2 + a * a)).sum() / weights.sum()
    assert loss.item() == pytest.approx(expected, rel=0.015)


# ---- The network --------------------------------------------------------------------------------


def test_a_new_denoiser_is_c_skip_x_the_best_guess_without_knowledge():
    model = Denoiser(3, 4, channels=8, multipliers=(1, 2), depth=1, context_dim=5)
    x, sigma = normal(2, 3, 4, 4, 4), torch.tensor([0.5, 2.0], dtype=F64)
    out = model(x, sigma, context=torch.randn(2, 6, 5))
    expected = x * torch.tensor([1 / 2, 1 / 17], dtype=F64).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=0)


def test_every_sample_meets_its_own_sigma_and_no_other_sample():
    model = tiny()
    x, sigma = normal(3, 3, 4, 4, 4), torch.tensor([0.1, 1.0, 30.0], dtype=F64)
    together = model(x, sigma)
    for b in range(3):
        alone = model(x[b:b + 1], sigma[b])
        torch.testing.assert_close(together[b], alone[0], rtol=1e-5, atol=1e-5)
    raw = [(model(x[:1], s) - preconditioning(s, 0.5)[0] * x[:1]) / preconditioning(s, 0.5)[1]
           for s in (sigma[0], sigma[0] * 1.1)]
    assert (raw[0] - raw[1]).abs().max() > 1e-3 and together.dtype == F64


def test_the_denoiser_is_preconditioning_around_the_unet():
    model = tiny(sigma_data=0.7)
    x, sigma = normal(2, 3, 4, 4, 4), torch.tensor([0.4, 3.0], dtype=F64)
    seen = {}
    model.unet.register_forward_hook(lambda m, inputs, out: seen.update(x=inputs[0], c=inputs[1],
                                                                       out=out))
    out = model(x, sigma)
    c_skip, c_out, c_in, c_noise = (c.view(2, 1, 1, 1, 1) for c in preconditioning(sigma, 0.7))
    torch.testing.assert_close(seen["x"].double(), c_in * x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(seen["c"].double(), c_noise.flatten(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out, c_skip * x + c_out * seen["out"], rtol=1e-6, atol=1e-6)


def test_all_voxels_can_see_each_other():
    model = tiny(attention=(2,))
    x = normal(1, 3, 4, 4, 4)
    nudged = x.clone()
    nudged[0, 0, 0, 0, 0] += 1
    assert (model(nudged, 0.5) - model(x, 0.5)).abs().amax(1).min() > 1e-6


def test_masked_padding_tokens_change_nothing_and_real_ones_do():
    model = tiny(context_dim=5, transformer_depth=2)
    x, sigma = normal(2, 3, 4, 4, 4), torch.tensor([0.3, 3.0], dtype=F64)
    context = normal(2, 6, 5, seed=1).float()
    mask = torch.arange(6) < torch.tensor([[4], [2]])                  # True for real tokens
    out = model(x, sigma, context, mask)
    assert torch.equal(out, model(x, sigma, torch.where(mask[..., None], context, 99.0), mask))
    cut = model(x[:1], sigma[:1], context[:1, :4])
    torch.testing.assert_close(out[:1], cut, rtol=1e-5, atol=1e-5)
    changed = context.clone()
    changed[0, 0] += 1
    difference = (out - model(x, sigma, changed, mask)).abs().amax((1, 2, 3, 4))
    assert difference[0] > 1e-4 and difference[1] == 0


def test_arguments_that_do_not_fit_are_refused():
    x, context = torch.zeros(1, 3, 4, 4, 4), torch.zeros(1, 6, 5)
    for match, call in [("context", lambda: tiny()(x, 1.0, context)),
                        ("context", lambda: tiny(context_dim=5)(x, 1.0)),
                        (r"x must be \(B, C, D, H, W\)", lambda: tiny()(x[0], 1.0)),
                        ("side 6 .* 2 times", lambda: tiny(side=6, multipliers=(1, 1, 1))),
                        ("steps", lambda: edm_sampler(gaussian_denoiser(1), x, 0))]:
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize("kw", [dict(), dict(channels=192, depth=3, context_dim=1024,
                                             transformer_depth=2)])
def test_the_papers_unet_keeps_the_latents_shape(kw):
    with torch.device("meta"):
        model = Denoiser(256, 8, **kw)
        text = torch.zeros(2, 32, 1024) if kw else None
        assert model(torch.zeros(2, 256, 8, 8, 8), torch.ones(2), text).shape == (2, 256, 8, 8, 8)


def test_one_sample_of_a_unet_that_ends_at_1x1x1_is_the_same_as_beside_another():
    model = tiny(side=2, channels=32, multipliers=(1, 1), attention=(2,)).double()
    x = normal(2, 3, 2, 2, 2)
    torch.testing.assert_close(model(x[:1], 0.5), model(x, 0.5)[:1], rtol=0, atol=1e-12)


def test_every_weight_of_the_unet_learns_those_behind_the_skip_connections_too():
    model = tiny(context_dim=5)
    model(normal(2, 3, 4, 4, 4), 0.5, torch.randn(2, 6, 5)).square().sum().backward()
    for name, p in model.named_parameters():
        grad = p.grad.abs().reshape(len(p), -1)
        if name.endswith("bias"):                      # of some, a norm or a softmax sees nothing
            assert grad.max() > 0, name
            continue
        assert (grad.amax(1) > 0).all(), name          # every output channel learns
        if p.ndim > 1:                                 # and every input channel counts
            assert (p.grad.abs().transpose(0, 1).flatten(1).amax(1) > 0).all(), name


# ---- The sampler (Algorithm 2) ------------------------------------------------------------------


def test_sigma_steps_go_from_sigma_max_to_sigma_min_and_then_zero():
    sigma = sigma_steps(18)
    assert sigma.shape == (19,) and sigma.dtype == F64 and sigma[-1] == 0
    assert sigma[[0, 17]].tolist() == pytest.approx([80, 0.002], rel=1e-12)
    middle = (80**(1 / 7) + 9 / 17 * (0.002**(1 / 7) - 80**(1 / 7)))**7
    assert sigma[9].item() == pytest.approx(middle, rel=1e-12) and (sigma.diff() < 0).all()
    assert sigma_steps(3, 1.0, 9.0, 2.0).tolist() == pytest.approx([9, 4, 1, 0])
    assert sigma_steps(1).tolist() == pytest.approx([80, 0])


def heun_error(steps, a=0.5):
    """Against the exact path x(sigma) ~ sqrt(a^2 + sigma^2) and the last step, Euler's, to 0."""
    noise = normal(100)
    exact = 80 * noise * math.sqrt((a**2 + 0.002**2) / (a**2 + 80**2)) * a**2 / (a**2 + 0.002**2)
    return (edm_sampler(gaussian_denoiser(a), noise, steps) - exact).norm() / exact.norm()


def test_heuns_error_falls_four_times_with_every_doubling_of_the_steps():
    errors = [heun_error(steps) for steps in (64, 128, 256, 512)]
    for coarse, fine in zip(errors, errors[1:]):
        assert coarse / fine == pytest.approx(4, rel=0.1)
    assert errors[0] < 5e-3


@pytest.mark.parametrize("churn", [dict(), dict(S_churn=40), dict(S_churn=80, S_min=0.05, S_max=50,
                                                                   S_noise=1.003)])
def test_the_ideal_denoiser_of_a_gaussian_gives_its_mean_and_spread_at_64_steps(churn):
    x = edm_sampler(gaussian_denoiser(0.5, mean=-0.8), normal(100_000), 64,
                    generator=torch.Generator().manual_seed(1), **churn)
    assert x.std().item() == pytest.approx(0.5, rel=0.03)
    assert x.mean().item() == pytest.approx(-0.8, abs=0.02)


@pytest.mark.parametrize("S_churn", [0, 30])
def test_the_ideal_denoiser_of_two_points_lands_on_them_in_their_proportion(S_churn):
    """Points -1 and 2 with odds 3 to 1: D is their mean, weighed by how likely each made x."""
    def denoise(x, sigma):
        log_odds = ((x + 1)**2 - (x - 2)**2) / (2 * sigma**2) - math.log(3)
        return -1 + 3 * torch.sigmoid(log_odds)
    x = edm_sampler(denoise, normal(20_000), 64, S_churn=S_churn,
                    generator=torch.Generator().manual_seed(1))
    assert torch.minimum((x + 1).abs(), (x - 2).abs()).max() < 1e-3
    assert (x > 0.5).double().mean().item() == pytest.approx(0.25, abs=0.02)


def test_one_step_is_the_denoisers_answer_at_sigma_max():
    noise = normal(7)
    x = edm_sampler(gaussian_denoiser(0.5, mean=3.0), noise, 1)
    torch.testing.assert_close(x, 3 + 0.25 / (0.25 + 6400) * (80 * noise - 3))


def test_the_state_is_float64_the_noise_is_scaled_and_watch_sees_every_step():
    seen, watched = [], []

    def denoise(x, sigma):
        seen.append((x.dtype, sigma.shape, sigma.item(), x.std().item()))
        return torch.full_like(x, 4.0)
    out = edm_sampler(denoise, normal(5000).float(), 5, sigma_max=20,
                      watch=lambda *step: watched.append(step))
    assert out.dtype == F64 and (out - 4).abs().max() < 1e-12
    assert all(dtype == F64 and shape == () for dtype, shape, _, _ in seen)
    assert len(seen) == 9 and seen[0][3] == pytest.approx(20, rel=0.03)  # 2 a step, the last but 1
    assert [step for step, _, _ in watched] == [0, 1, 2, 3, 4]
    expected = sigma_steps(5, sigma_max=20)[:-1].tolist()
    assert [float(s) for _, s, _ in watched] == pytest.approx(expected)
    assert all((denoised == 4).all() for _, _, denoised in watched)


def test_churn_repeats_from_its_generator_and_stays_within_its_range():
    def run(seed, **kw):
        return edm_sampler(gaussian_denoiser(0.5), normal(50), 8,
                           generator=torch.Generator().manual_seed(seed), **kw)
    plain = run(1)
    assert torch.equal(plain, run(2))                                  # no churn: nothing is drawn
    assert torch.equal(run(1, S_churn=20), run(1, S_churn=20))
    assert (run(1, S_churn=20) - run(2, S_churn=20)).abs().max() > 0.01
    assert torch.equal(run(1, S_churn=20, S_min=100), plain)           # no step above S_min
    assert torch.equal(run(1, S_churn=20, S_max=0.001), plain)         # none below S_max
    for S_churn, most in [(2, 2 / 8), (20, math.sqrt(2) - 1)]:          # 20 / 8 is cut
        levels = []
        run(0, S_churn=S_churn, S_min=1, S_max=50, watch=lambda i, s, d: levels.append(s.item()))
        gamma = [s / t - 1 for s, t in zip(levels, sigma_steps(8).tolist())]
        expected = [most if 1 <= t <= 50 else 0 for t in sigma_steps(8)[:-1].tolist()]
        assert gamma == pytest.approx(expected, abs=1e-12)


# ---- Averaged weights ---------------------------------------------------------------------------


def test_ema_forgets_half_in_its_half_life_and_the_random_start_at_once():
    model = torch.nn.Linear(2, 2, bias=False).double()
    average = copy.deepcopy(model)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(average.weight)
    for _ in range(50):
        ema_update(average, model, step=10_000, half_life=50)
    torch.testing.assert_close(average.weight, torch.full_like(average.weight, 0.5))
    torch.nn.init.zeros_(average.weight)
    ema_update(average, model, step=20, half_life=50)                  # half-life 2 steps, so early
    torch.testing.assert_close(average.weight, torch.full_like(average.weight, 1 - 0.5**0.5))
    ema_update(average, model, step=0, half_life=50)
    torch.testing.assert_close(average.weight, torch.ones_like(average.weight))
    assert (model.weight == 1).all()


# ---- Text ---------------------------------------------------------------------------------------

WORDS = ["a", "blue", "chair", "legs", "red", "with"]


def encoder(seed=0):
    torch.manual_seed(seed)
    return diffusion.WordEncoder(WORDS, 16).eval()


@torch.no_grad()
def test_the_word_encoder_hears_which_words_and_in_which_order():
    encode = encoder()
    tokens, mask = encode(["a red chair with blue legs", "a blue chair with red legs", ""])
    assert tokens.shape == (3, 32, 16) and mask.sum(1).tolist() == [7, 7, 1]
    assert (tokens[~mask] == 0).all()
    assert (tokens[0, 3] - tokens[1, 3]).abs().max() > 1e-3      # "chair"


@torch.no_grad()
def test_padding_and_the_rest_of_the_batch_change_no_token():
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
    assert encode(["red " * 1000])[1].sum() == 32


@torch.no_grad()
def test_guidance_is_linear_in_its_weight_and_exact_at_0_and_1():
    model, encode = tiny(context_dim=16).double(), encoder()
    text, null = ([y.double() if y.is_floating_point() else y for y in encode([p])]
                  for p in ("a red chair", ""))
    x, sigma = normal(2, 3, 4, 4, 4), torch.tensor(0.7, dtype=F64)
    D = {w: diffusion.guided(model, text, null, w)(x, sigma) for w in (0, 1, 2.0, 3.0)}
    both = [y.expand(2, *y.shape[1:]) for y in text]
    assert torch.equal(D[1], model(x, sigma, *both))
    assert (D[1] - D[0]).abs().max() > 1e-4
    for w in (2.0, 3.0):
        torch.testing.assert_close(D[w], D[0] + w * (D[1] - D[0]))


def test_guidance_calls_the_network_once_a_step():
    calls = []

    def denoiser(x, sigma, context, mask):
        calls.append(len(x))
        return x + context.mean()

    text, null = ((torch.full((1, 32, 4), v), torch.ones(1, 32, dtype=bool)) for v in (1.0, 0.0))
    for weight, size in ((0, 3), (1, 3), (3.0, 6)):
        diffusion.guided(denoiser, text, null, weight)(torch.zeros(3, 1, 2, 2, 2), 1.0)
        assert calls.pop() == size and not calls


def test_t5_without_transformers_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BadInput, match="pip install transformers"):
        diffusion.T5Encoder(tmp_path)


def test_t5_reads_32_tokens_zero_where_padded_and_an_empty_prompt_is_its_end(t5_folder, tmp_path):
    encode = diffusion.T5Encoder(t5_folder)
    tokens, mask = encode(["a red chair", "", "a " * 1000])
    assert encode.width == 16 and tokens.shape == (3, 32, 16)
    assert mask.sum(1).tolist() == [4, 1, 32] and (tokens[~mask] == 0).all()
    # Without padding the network itself says the same: padding changes nothing.
    ids = torch.tensor([[3, 4, 6, 1]])                                # a red chair </s>
    torch.testing.assert_close(tokens[0, :4], encode.model(input_ids=ids).last_hidden_state[0])
    assert not any(p.requires_grad for p in encode.model.parameters())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="google-t5/t5-11b"):
        diffusion.T5Encoder(tmp_path)
