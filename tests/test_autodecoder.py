"""autodecoder.py: hash rows by hand, one decoder wherever it is cut, losses by hand."""
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import autodecoder                                                    # noqa: E402
from autodecoder import AutoDecoder, HashEmbedding                    # noqa: E402


def small(seed=0, **kw):
    torch.manual_seed(seed)
    return AutoDecoder(**{**dict(n_objects=5, embed_dim=12, channels=16, volume_side=32, depth=2,
                                 attention=(8,)), **kw})


def shake(model):
    """No weight keeps its initial value, so that nothing is hidden behind a zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model


# ---- Hash embedding (Eq. 9 to 11) ---------------------------------------------------------------


def test_hash_rows_by_hand_with_the_printed_multipliers():
    rows = HashEmbedding(20000, 512, codebooks=256, rows=256, rule="paper").row_indices(
        torch.tensor([0, 1, 12345]))
    # Odd k: the 2^31 in a_i gives 128; 12345 (2 i^2 + 1) >> 24 adds 0, 14 and 95 (i = 0, 100, 255).
    assert rows[:, [0, 100, 255]].tolist() == [[0, 0, 0], [128, 128, 128], [128, 142, 223]]
    assert rows.shape == (3, 256)


@pytest.mark.parametrize("rule, rows", [("paper", 256), ("paper", 32768), ("spread", 256),
                                        ("spread", 8192)])
def test_hash_rows_follow_eq_10_in_plain_integers(rule, rows):
    table = HashEmbedding(2**31, 12, codebooks=3, rows=rows, rule=rule)
    a = [2**31 + 2 * i * i + 1 for i in range(3)] if rule == "paper" else table.a.tolist()
    assert all(2**31 <= x < 2**32 and x % 2 == 1 for x in a) and len(set(a)) == 3
    objects = [0, 1, 12345, 299_999, 2**31 - 1]                 # the last: 63 bits must hold a k
    expected = [[((x * k) % 2**32) // (2**32 // rows) for x in a] for k in objects]
    assert table.row_indices(torch.tensor(objects)).tolist() == expected


def test_printed_rule_collides_as_counted_and_the_spread_rule_does_not():
    k = torch.arange(1676)                                      # ABO Tables, 256 codebooks of 256
    rows = {rule: HashEmbedding(1676, 256, 256, 256, rule).row_indices(k)
            for rule in ("paper", "spread")}
    assert len(rows["paper"].unique(dim=0)) == 1176
    shared = {rule: (r[:-2] == r[2:]).float().mean().item() for rule, r in rows.items()}
    assert shared["paper"] == pytest.approx(0.995, abs=0.001)
    assert len(rows["spread"].unique(dim=0)) == 1676 and shared["spread"] < 0.02
    used = torch.tensor([len(column.unique()) for column in rows["spread"].T])
    assert (used > 128).float().mean() > 0.95                   # rows in use, of 256


def test_spread_multipliers_never_change():
    """They are not in the checkpoint: other numbers would scramble every trained hash table."""
    torch.manual_seed(5)
    a = HashEmbedding(9, 8, codebooks=4).a.tolist()
    assert a == [2945012831, 2957220225, 3074729463, 2982869711]


def test_an_embedding_is_its_pieces_side_by_side():
    table = HashEmbedding(100, 6, codebooks=3, rows=4)
    e, rows = table(torch.tensor([7, 42])), table.row_indices(torch.tensor([7, 42]))
    for b in range(2):
        pieces = [table.table[i, rows[b, i]] for i in range(3)]
        assert torch.equal(e[b], torch.cat(pieces))
    e[0].sum().backward()                                       # only the picked rows learn
    assert table.table.grad.count_nonzero() == 6


@pytest.mark.parametrize("kw, match", [(dict(codebooks=5), "dim 12 .* codebooks 5"),
                                       (dict(codebooks=3, rows=100), "rows .* 100"),
                                       (dict(codebooks=3, rule="printed"), "rule .* 'printed'")])
def test_hash_settings_that_cannot_be_are_refused_by_name(kw, match):
    with pytest.raises(ValueError, match=match):
        HashEmbedding(10, 12, **kw)


# ---- The decoder --------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kw", [dict(), dict(codebooks=4, rows=8, norm="group")])
def test_the_decoder_is_the_same_wherever_it_is_cut(train, kw):
    k = torch.tensor([3, 0])
    volumes = []
    for side, width in [(4, 16), (8, 8), (16, 4)]:
        model = shake(small(latent_side=side, **kw)).train(train)   # same seeds: the same weights
        latent = model.decode_latent(model.embed(k))
        assert latent.shape == (2, width, side, side, side) and model.latent_channels == width
        volumes.append(model.decode_volume(latent))
        assert torch.equal(volumes[-1], model(k))
    assert torch.equal(volumes[0], volumes[1]) and torch.equal(volumes[0], volumes[2])
    assert volumes[0].shape == (2, 4, 32, 32, 32) and volumes[0].std(0).max() > 1e-3


def test_density_is_not_negative_and_colour_within_0_and_1_even_for_wild_latents():
    model = small().eval()
    volume = model.decode_volume(torch.randn(2, 8, 8, 8, 8) * 1000)
    assert volume[:, 0].min() >= 0 and volume[:, 0].max() > 10
    assert volume[:, 1:].min() >= 0 and volume[:, 1:].max() <= 1 and volume.isfinite().all()


def test_a_new_decoder_is_fog_of_a_twentieth_a_voxel_whatever_the_side():
    for side in (16, 32):
        model = small(volume_side=side)
        torch.nn.init.zeros_(model.head[1].weight)
        torch.nn.init.zeros_(model.head[1].bias)
        density = model(torch.tensor([0, 1]))[:, 0]
        torch.testing.assert_close(density * (2 / side), torch.full_like(density, 0.0485873515))


@pytest.mark.parametrize("side, volume_side, channels", [(4, 64, 512), (8, 64, 256), (8, 128, 256),
                                                         (16, 64, 128)])
def test_the_papers_decoder_has_the_papers_shapes(side, volume_side, channels):
    with torch.device("meta"):
        model = AutoDecoder(15576, volume_side=volume_side, latent_side=side, codebooks=256)
        latent = model.decode_latent(model.embed(torch.zeros(2, dtype=torch.long)))
        volume = model.decode_volume(latent)
    assert model.embedding.table.shape == (256, 256, 4)
    assert latent.shape == (2, channels, side, side, side)
    assert volume.shape == (2, 4) + (volume_side,) * 3
    blocks = [[type(b).__name__ for b in level] for level in model.levels]
    assert blocks[:3] == [["ResidualBlock"] * 4 + ["SelfAttention"]] * 2 + [["ResidualBlock"] * 4]


def test_sides_that_do_not_double_are_refused():
    for kw in (dict(volume_side=48), dict(latent_side=6), dict(latent_side=64)):
        with pytest.raises(ValueError, match="volume_side .* latent_side"):
            small(**kw)
    with pytest.raises(ValueError, match=r"latent .* \(B, 8, 8, 8, 8\), got \(1, 8, 4, 4, 4\)"):
        small().decode_volume(torch.zeros(1, 8, 4, 4, 4))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_residual_block_doubles_the_side_and_changes_the_width(norm):
    x = torch.randn(2, 6, 4, 3, 5)
    assert autodecoder.ResidualBlock(6, 8, upsample=True, norm=norm)(x).shape == (2, 8, 8, 6, 10)
    assert autodecoder.ResidualBlock(6, 8, norm=norm)(x).shape == (2, 8, 4, 3, 5)


def test_residual_block_with_a_silent_main_path_is_a_1x1x1_convolution_with_both_signs():
    block = autodecoder.ResidualBlock(3, 4, upsample=True).eval()
    torch.nn.init.zeros_(block.norm2.weight)
    x = torch.randn(1, 3, 2, 2, 2)
    weight, bias = block.skip.weight.flatten(1), block.skip.bias
    expected = torch.einsum("oc,bcdhw->bodhw", weight, x) + bias.view(4, 1, 1, 1)
    for axis in (2, 3, 4):
        expected = expected.repeat_interleave(2, axis)
    torch.testing.assert_close(block(x), expected)
    assert (expected < 0).any()                      # the latent must not be cut off at zero


def test_attention_starts_as_the_identity_and_follows_a_permutation_of_the_voxels():
    attention = autodecoder.SelfAttention(8, head_channels=4).double()
    x = torch.randn(2, 8, 2, 3, 2, dtype=torch.float64)
    assert torch.equal(attention(x), x)
    shake(attention)
    order = torch.randperm(12)
    moved = attention(x.flatten(2)[..., order].view_as(x))
    torch.testing.assert_close(moved.flatten(2), attention(x).flatten(2)[..., order])
    nudged = x.clone()
    nudged[0, :, 0, 0, 0] += 1
    change = (attention(nudged) - attention(x)).abs().amax(1)
    assert change[0, 1, 2, 1] > 1e-6 and change[1].max() == 0   # every voxel of its own object


# ---- Losses (Eq. 1 and 2) -----------------------------------------------------------------------


def test_pyramid_loss_by_hand():
    a, b = torch.full((2, 3, 16, 16), 0.9), torch.full((2, 3, 16, 16), 0.4)
    same = autodecoder.pixels_and_gradients
    assert autodecoder.pyramid_loss(same, a, a) == 0
    assert autodecoder.pyramid_loss(same, a, b).item() == pytest.approx(3 * 0.5)     # three levels
    assert autodecoder.pyramid_loss(lambda x: [x, 2 * x], a, b, 2).item() == pytest.approx(3.0)
    stripes = torch.tensor([0.0, 1]).repeat(8).expand(2, 3, 16, 16)
    # Full size: pixels 1/2, steps along x 1, along y 0; halved twice: pixels 1/2 each, no steps.
    assert autodecoder.pyramid_loss(same, stripes, 0 * a).item() == pytest.approx(2.5)
    assert autodecoder.pyramid_loss(same, stripes.mT, 0 * a).item() == pytest.approx(2.5)
    with pytest.raises(ValueError, match="rendered .* true"):
        autodecoder.pyramid_loss(same, a, b[:1])


def test_foreground_loss_by_hand():
    occupancy, mask = torch.tensor([0.0, 0.25, 1.0, 0.5]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert autodecoder.foreground_loss(occupancy, mask).item() == (0.75 + 0.5) / 4


def vgg19_weights():
    """Random weights with the names and shapes of torchvision's whole VGG-19, classifier too."""
    generator = torch.Generator().manual_seed(0)
    weights, c_in = {}, 3
    for i, width in zip([0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34],
                        [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8):
        weight = torch.empty(width, c_in, 3, 3).uniform_(-1, 1, generator=generator)
        weights[f"features.{i}.weight"] = weight * (2 / c_in)**0.5 / 3
        weights[f"features.{i}.bias"] = torch.zeros(width)
        c_in = width
    weights["classifier.0.weight"] = torch.empty(4096, 25088, device="meta")
    return weights


def test_vgg19_gives_the_map_after_the_first_relu_of_each_stage():
    weights = vgg19_weights()
    image = torch.rand(1, 3, 36, 32, generator=torch.Generator().manual_seed(0))
    maps = autodecoder.VGG19Features(weights)(image)
    assert [tuple(m.shape[1:]) for m in maps] == [
        (64, 36, 32), (128, 18, 16), (256, 9, 8), (512, 4, 4), (512, 2, 2)]
    x = image.sub(torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
    x = x / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    stages = [(0, 2), (5, 7), (10, 12, 14, 16), (19, 21, 23, 25), (28,)]
    for stage, expected in zip(stages, maps):
        for i in stage:
            x = F.conv2d(x, weights[f"features.{i}.weight"], padding=1).relu()
            if i == stage[0]:
                torch.testing.assert_close(expected, x)
        x = F.max_pool2d(x, 2)
    small_maps = autodecoder.VGG19Features(weights)(image[..., :4, :4])
    assert [m.shape[-1] for m in small_maps] == [4, 2, 1]

    missing = {k: v for k, v in weights.items() if k != "features.28.weight"}
    misshapen = weights | {"features.5.weight": torch.zeros(128, 64, 1, 1)}
    for wrong, name in [(missing, "features.28.weight"), (misshapen, "features.5.weight")]:
        with pytest.raises(ValueError, match=f"{name}.*vgg19-dcbb9e9d"):
            autodecoder.VGG19Features(wrong)


def test_random_features_are_the_same_from_run_to_run_and_see_structure():
    torch.manual_seed(1)
    first = autodecoder.RandomFeatures()
    torch.manual_seed(2)
    second = autodecoder.RandomFeatures()
    image = torch.rand(1, 3, 32, 32)
    maps = first(image)
    assert all(torch.equal(a, b) for a, b in zip(maps, second(image)))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (16, 32, 32), (32, 16, 16), (64, 8, 8), (64, 4, 4), (64, 2, 2)]
    assert autodecoder.pyramid_loss(first, image, image.flip(-1)) > 0.1
