"""autodecoder.py: one decoder wherever it is cut, losses by hand; hash rows by hand, PnP, poses."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autodecoder
import render
from autodecoder import AutoDecoder, HashEmbedding, MovingDecoder, PoseNet, cayley, solve_pnp
from data import BadInput

F64 = torch.float64


def small(embedding=None, **sizes):
    """A decoder of 5 objects: 4^3 x 16 -> 8^3 x 8 = latent -> 16^3 x 4 -> 32^3 x 2."""
    torch.manual_seed(0)
    if embedding is None:
        embedding = nn.Embedding(5, 12)
    usual = dict(embed_dim=12, channels=16, volume_side=32, depth=2, attention=(8,))
    return AutoDecoder(embedding, **(usual | sizes))


def small_settings(**others):
    """All settings of a decoder and of a pose network, as small as `small`."""
    usual = dict(
        embed_dim=12, channels=16, start_side=4, volume_side=32, latent_side=8, decoder_depth=2,
        decoder_attention=(8,), norm="batch", codebooks=0, rows=256, hash_rule="spread",
        parts=0, keypoints=8, pose_width=16, focal=5.7, body=(0.3, 0.8, 0.3), ellipsoid=True,
        skin_layout=True, reach=())
    return SimpleNamespace(**(usual | others))


def shake(model):
    """No weight keeps its initial value, so that nothing is hidden behind a zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model


# ---- The decoder --------------------------------------------------------------------------------
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_decoder_is_the_same_wherever_it_is_cut(train, norm):
    k = torch.tensor([3, 0])
    volumes = []
    for side, width in [(4, 16), (8, 8), (16, 4)]:
        model = shake(small(latent_side=side, norm=norm)).train(train)   # the same weights
        latent = model.decode_latent(model.embed(k))
        assert latent.shape == (2, width, side, side, side)
        assert model.latent_shape == (width, side, side, side)
        volume = model.decode_volume(latent)
        assert torch.equal(volume, model(k))
        volumes.append(volume)
    assert torch.equal(volumes[0], volumes[1])
    assert torch.equal(volumes[0], volumes[2])
    assert volumes[0].shape == (2, 4, 32, 32, 32)
    assert volumes[0].std(0).max() > 1e-3                           # objects differ


def test_g1_ends_with_the_last_block_and_the_attention_of_the_latents_side():
    model = shake(small(latent_side=8, attention=(8, 16))).eval()
    k = torch.tensor([0, 1])
    before = model.decode_latent(model.embed(k))
    for module in model.levels[1]:                                  # 16^3: all of it is G2
        shake(module)
    assert torch.equal(model.decode_latent(model.embed(k)), before)
    for module in model.levels[0]:                                  # 8^3: all of it is G1
        was = before
        shake(module)
        before = model.decode_latent(model.embed(k))
        assert (before - was).abs().max() > 1e-3


def test_every_number_of_g2_is_softplus_of_minus_3_or_a_sigmoid():
    model = small(volume_side=16)
    raw = torch.tensor([3.0, 0.0, math.log(3), -math.log(3)]).view(1, 4, 1, 1, 1)
    volume = model.activate(raw.expand(2, 4, 16, 16, 16))
    expected = torch.tensor([math.log(2) * 8, 0.5, 0.75, 0.25]).view(1, 4, 1, 1, 1)
    torch.testing.assert_close(volume, expected.expand_as(volume))


def test_a_rigid_decoder_carries_no_constants():
    assert list(small(norm="group").buffers()) == []


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
    with torch.device("meta"):                                      # shapes, no numbers
        embedding = HashEmbedding(15576, 1024)
        model = AutoDecoder(embedding, volume_side=volume_side, latent_side=side)
        latent = model.decode_latent(model.embed(torch.zeros(2, dtype=torch.long)))
        volume = model.decode_volume(latent)
    assert model.embedding.table.shape == (256, 256, 4)
    assert latent.shape == (2, channels, side, side, side)
    assert volume.shape == (2, 4) + (volume_side,) * 3
    blocks = [[type(b).__name__ for b in level] for level in model.levels]
    assert blocks[:3] == [["ResidualBlock"] * 4 + ["SelfAttention"]] * 2 + [["ResidualBlock"] * 4]


def test_sides_that_do_not_double_are_refused():
    for sizes in (dict(volume_side=48), dict(latent_side=6), dict(latent_side=64),
                  dict(volume_side=2), dict(latent_side=2)):
        with pytest.raises(ValueError, match="volume_side .* latent_side"):
            small(**sizes)
    with pytest.raises(ValueError, match=r"latent .* \(8, 8, 8, 8\), got \(8, 4, 4, 4\)"):
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
    weight, bias = block.shortcut.weight.flatten(1), block.shortcut.bias
    expected = torch.einsum("oc,bcdhw->bodhw", weight, x) + bias.view(4, 1, 1, 1)
    for axis in (2, 3, 4):
        expected = expected.repeat_interleave(2, axis)
    torch.testing.assert_close(block(x), expected)
    assert (expected < 0).any()                      # the latent must not be cut off at zero


def test_residual_block_has_its_relus_in_front_of_its_convolutions():
    block = autodecoder.ResidualBlock(3, 3).double().eval()
    shake(block)
    x = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)

    def normed(x, conv, norm):
        x = torch.nn.functional.conv3d(x, conv.weight, padding=1)
        mean, var, weight, bias = (v.view(3, 1, 1, 1) for v in (
            norm.running_mean, norm.running_var, norm.weight, norm.bias))
        return (x - mean) / (var + norm.eps).sqrt() * weight + bias

    h = normed(x.clamp(min=0), block.conv1, block.norm1)
    expected = x + normed(h.clamp(min=0), block.conv2, block.norm2)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)
    assert isinstance(small().head[0], torch.nn.BatchNorm3d)


def test_group_norm_has_8_groups_or_one_for_each_of_fewer_channels():
    assert autodecoder.group_norm(24).num_groups == 8
    assert autodecoder.group_norm(3).num_groups == 3


def test_a_width_that_cannot_be_divided_into_8_groups_is_refused_by_its_number():
    with pytest.raises(ValueError, match="10 channels cannot be divided into 8 groups"):
        small(channels=20, norm="group")                            # halved: 10
    small(channels=20, norm="batch")
    with pytest.raises(ValueError, match="12 channels cannot be divided into 8 groups"):
        PoseNet(1, 8, focal=5.7, body=(0.3, 0.8, 0.3), width=12)


def test_attention_over_a_width_that_its_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="200 channels"):
        autodecoder.SelfAttention(200)


def test_attention_by_hand():
    attention = shake(autodecoder.SelfAttention(2, head_channels=1)).double()     # two heads of one
    x = torch.randn(1, 2, 3, 1, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    voxels = attention.norm(x).view(2, 3).T                                       # (3, 2)
    q, k, v = attention.qkv(voxels).view(3, 3, 2).unbind(1)                       # (3, 2) each
    seen = torch.zeros(3, 2, dtype=F64)
    for head in range(2):
        weights = torch.outer(q[:, head], k[:, head]).softmax(1)
        seen[:, head] = weights @ v[:, head]
    expected = x.view(2, 3) + attention.proj(seen).T
    torch.testing.assert_close(attention(x).view(2, 3), expected)


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


# ---- Settings reach the decoder -----------------------------------------------------------------
def blocks(model):
    """Class names of what every level is made of."""
    return [[type(block).__name__ for block in level] for level in model.levels]


TWO, EYE = ["ResidualBlock"] * 2, ["SelfAttention"]


@pytest.mark.parametrize("name, value, look, usual, changed", [
    ("embed_dim", 20, lambda m: (m.embedding.embedding_dim, m.linear.in_features), (12, 12),
     (20, 20)),
    ("channels", 32, lambda m: m.latent_shape[0], 8, 16),
    ("start_side", 8, lambda m: m.sides, [4, 8, 16, 32], [8, 16, 32]),
    ("volume_side", 16, lambda m: m.sides, [4, 8, 16, 32], [4, 8, 16]),
    ("latent_side", 16, lambda m: m.latent_shape, (8, 8, 8, 8), (4, 16, 16, 16)),
    ("decoder_depth", 1, blocks, [TWO + EYE, TWO, TWO], [TWO[:1] + EYE, TWO[:1], TWO[:1]]),
    ("decoder_attention", (16, 32), blocks, [TWO + EYE, TWO, TWO], [TWO, TWO + EYE, TWO + EYE]),
    ("norm", "group", lambda m: type(m.levels[0][0].norm1), nn.BatchNorm3d, nn.GroupNorm),
])
def test_every_setting_of_the_decoder_reaches_it(name, value, look, usual, changed):
    for build in (AutoDecoder.from_settings, autodecoder.build_decoder):
        assert look(build(small_settings(), 5)) == usual
        assert look(build(small_settings(**{name: value}), 5)) == changed
    moving = autodecoder.build_decoder(small_settings(parts=2, **{name: value}), 5)
    assert look(moving) == changed


def test_a_table_has_one_row_for_every_object():
    model = AutoDecoder.from_settings(small_settings(), 7)
    assert model.embedding.weight.shape == (7, 12)
    assert torch.equal(model.embed(torch.tensor([6, 2])), model.embedding.weight[[6, 2]])


def test_the_table_is_drawn_before_everything_else():
    """The same seed gives the same weights, whatever is added to the decoder later."""
    torch.manual_seed(3)
    model = AutoDecoder.from_settings(small_settings(), 7)
    torch.manual_seed(3)
    table = nn.Embedding(7, 12)
    linear = nn.Linear(12, 16 * 4**3)
    assert torch.equal(model.embedding.weight, table.weight)
    assert torch.equal(model.linear.weight, linear.weight)


@pytest.mark.parametrize("codebooks, embedding", [(0, nn.Embedding), (4, HashEmbedding)])
@pytest.mark.parametrize("parts, kind, channels", [(0, AutoDecoder, 4), (1, MovingDecoder, 4),
                                                   (3, MovingDecoder, 7)])
def test_build_decoder_picks_the_embedding_and_the_decoder(codebooks, embedding, parts, kind,
                                                           channels):
    settings = small_settings(codebooks=codebooks, parts=parts)
    model = autodecoder.build_decoder(settings, 5)
    assert type(model) is kind
    assert type(model.embedding) is embedding
    assert model(torch.tensor([4, 0])).shape == (2, channels, 32, 32, 32)


def test_every_setting_of_a_hash_embedding_reaches_it():
    settings = small_settings(codebooks=6, rows=8, hash_rule="paper")
    table = autodecoder.build_decoder(settings, 100).embedding
    assert table.n_objects == 100
    assert table.table.shape == (6, 8, 2)
    assert table.a.tolist() == [2**31 + 2 * i * i + 1 for i in range(6)]


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
    assert autodecoder.pyramid_loss(same, 0 * a, stripes).item() == pytest.approx(2.5)
    with pytest.raises(ValueError, match="rendered .* true"):
        autodecoder.pyramid_loss(same, a, b[:1])


def test_foreground_loss_by_hand():
    occupancy, mask = torch.tensor([0.0, 0.25, 1.0, 0.5]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert autodecoder.foreground_loss(occupancy, mask).item() == (0.75 + 0.5) / 4


# ---- What Eq. 1 may compare ---------------------------------------------------------------------
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
    maps = autodecoder.VGGFeatures(weights)(image)
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
    small_maps = autodecoder.VGGFeatures(weights)(image[..., :4, :4])
    assert [m.shape[-1] for m in small_maps] == [4, 2, 1]

    missing = {k: v for k, v in weights.items() if k != "features.28.weight"}
    misshapen = weights | {"features.5.weight": torch.zeros(128, 64, 1, 1)}
    for wrong, name in [(missing, "features.28.weight"), (misshapen, "features.5.weight")]:
        with pytest.raises(ValueError, match=f"VGG.*{name}"):
            autodecoder.VGGFeatures(wrong)


def test_another_plan_and_the_last_relu_of_each_stage():
    plan = (4, 4, "M", 6)
    torch.manual_seed(0)
    first, second, third = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 6, 3)
    weights = {}
    for i, layer in ((0, first), (2, second), (5, third)):
        weights[f"features.{i}.weight"] = layer.weight.detach()
        weights[f"features.{i}.bias"] = layer.bias.detach()
    image = torch.rand(1, 3, 8, 8)
    last = autodecoder.VGGFeatures(weights, plan, tap=-1)
    x = (image - last.mean) / last.std
    one = F.conv2d(x, first.weight, first.bias, padding=1).relu()
    two = F.conv2d(one, second.weight, second.bias, padding=1).relu()
    three = F.conv2d(F.max_pool2d(two, 2), third.weight, third.bias, padding=1).relu()
    torch.testing.assert_close(last(image), [two, three])
    torch.testing.assert_close(autodecoder.VGGFeatures(weights, plan)(image), [one, three])


def test_features_go_by_name_or_come_from_a_file(tmp_path):
    image = torch.rand(2, 3, 16, 16)
    for name, expected in (("pixels", [image]),
                           ("gradients", autodecoder.pixels_and_gradients(image)),
                           ("random", autodecoder.RandomFeatures()(image))):
        maps = autodecoder.build_features(name, "cpu")(image)
        torch.testing.assert_close(maps, expected, rtol=0, atol=0)
    random = autodecoder.build_features("random", "cpu")
    assert not any(p.requires_grad for p in random.parameters())

    path = tmp_path / "vgg19.pth"
    weights = vgg19_weights()
    del weights["classifier.0.weight"]                              # it has no numbers to be saved
    torch.save(weights, path)
    features = autodecoder.build_features(str(path), "cpu")
    assert [m.shape[1] for m in features(image)] == [64, 128, 256, 512, 512]
    assert not any(p.requires_grad for p in features.parameters())


def test_files_that_hold_no_weights_of_vgg19_are_refused_in_one_line(tmp_path):
    wrong = tmp_path / "wrong.pth"
    torch.save({"features.0.weight": torch.zeros(64, 3, 1, 1)}, wrong)
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"no weights")
    for path, reason in ((wrong, "features.0.weight should be \\(64, 3, 3, 3\\)"),
                         (damaged, "not a file of weights"),
                         (tmp_path / "missing.pth", "nor a file")):
        with pytest.raises(BadInput, match=f"--perceptual .*{reason}.*vgg19-dcbb9e9d") as caught:
            autodecoder.build_features(str(path), "cpu")
        assert "\n" not in str(caught.value)


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


def test_a_decoder_with_a_hash_embedding_learns_into_its_codebooks():
    model = small(HashEmbedding(10**6, 12, codebooks=4, rows=8))
    k = torch.tensor([999_999, 3])
    volume = model(k)
    assert volume.shape == (2, 4, 32, 32, 32)
    volume.sum().backward()
    assert model.embedding.table.grad.abs().amax((1, 2)).min() > 0


@pytest.mark.parametrize("kw, match", [(dict(codebooks=5), "dim 12 .* codebooks 5"),
                                       (dict(codebooks=3, rows=100), "rows .* 100"),
                                       (dict(codebooks=3, rows=1), "rows .* 1"),
                                       (dict(codebooks=3, rule="printed"), "rule .* 'printed'")])
def test_hash_settings_that_cannot_be_are_refused_by_name(kw, match):
    with pytest.raises(ValueError, match=match):
        HashEmbedding(10, 12, **kw)


# ---- Perspective-n-Point ------------------------------------------------------------------------
def scene(B, K, distance=12.0, radius=1.0, flat=None, seed=0):
    """Random points in a ball (or on z = 0, or on any plane) and poses -> X, x, R, t in float64."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(B, K, 3, dtype=F64, generator=g)
    X = X / X.norm(dim=-1, keepdim=True)
    X = X * radius * torch.rand(B, K, 1, dtype=F64, generator=g)**0.4
    turn, _ = torch.linalg.qr(torch.randn(B, 3, 3, dtype=F64, generator=g))
    R, _ = torch.linalg.qr(torch.randn(B, 3, 3, dtype=F64, generator=g))
    R = R * torch.linalg.det(R)[:, None, None]
    if flat:
        X = X * torch.tensor([1.0, 1, 0], dtype=F64)
    if flat == "tilted":
        X = X @ turn + 0.2
    sideways = (torch.rand(B, 2, dtype=F64, generator=g) - 0.5) * 0.1 * distance
    t = torch.cat([sideways, torch.full((B, 1), distance, dtype=F64)], 1)
    return X, project(X, R, t), R, t


def project(X, R, t):
    camera = X @ R.mT + t[:, None]
    return camera[..., :2] / camera[..., 2:]


def degrees(R, S):
    return 2 * torch.rad2deg(torch.asin(((R - S).flatten(1).norm(dim=1) / 8**0.5).clamp(max=1)))


def gradients(X, x, out=lambda R, t: R.flatten(1)):
    """Largest norm, over the outputs, of each object's gradient to X and x -> R, t, (B,), (B,)."""
    X = X.detach().requires_grad_()
    x = x.detach().clone().requires_grad_()
    R, t = solve_pnp(X, x)
    to_X, to_x = [], []
    for value in out(R, t).unbind(1):
        g_X, g_x = torch.autograd.grad(value.sum(), (X, x), retain_graph=True)
        to_X.append(g_X.flatten(1).norm(dim=1))
        to_x.append(g_x.flatten(1).norm(dim=1))
    return R, t, torch.stack(to_X).amax(0), torch.stack(to_x).amax(0)


def test_cayley_is_a_rotation_about_h_by_twice_its_arctangent():
    h = torch.tensor([[0, 0, 3**-0.5], [0, 0, 0]], dtype=F64)                    # 60 degrees, 0
    quarter = torch.tensor([[0.5, -3**0.5 / 2, 0], [3**0.5 / 2, 0.5, 0], [0, 0, 1]], dtype=F64)
    torch.testing.assert_close(cayley(h), torch.stack([quarter, torch.eye(3, dtype=F64)]))


def normalized_scene(distance=12.0, flat=None):
    """What the steps of solve_pnp work on -> X, Y, c, s, x, the true ScaledPose."""
    X, x, R, t = scene(6, 10, distance, flat=flat)
    Y, c, s = autodecoder.normalize_points(X)
    middle = t + (R @ c.mT)[..., 0]                                  # where c stands, (B, 3)
    pose = autodecoder.ScaledPose(R, s / middle[:, 2:], middle[:, :2] / middle[:, 2:])
    return X, Y, c, s, x, pose


def test_normalized_points_have_their_middle_at_0_and_spread_1():
    _, Y, _, _, _, _ = normalized_scene()
    assert Y.mean(1).abs().max() < 1e-12
    torch.testing.assert_close(Y.square().sum(-1).mean(1), torch.ones(6, dtype=F64), rtol=0,
                               atol=1e-3)


def test_normalized_points_at_their_scaled_pose_are_seen_where_the_points_are():
    for distance in (12.0, 3.0):
        X, Y, c, s, x, pose = normalized_scene(distance)
        _, _, seen = autodecoder.see(pose, Y)
        torch.testing.assert_close(seen, x, rtol=0, atol=1e-12)
        R, t = autodecoder.undo_normalization(pose, c, s, torch.ones(6, 1, dtype=F64), 5e-3)
        torch.testing.assert_close(project(X, R, t), x, rtol=0, atol=1e-12)


def test_the_largest_scale_leaves_every_point_and_the_origin_in_front_of_the_camera():
    _, Y, c, s, _, pose = normalized_scene()
    for shift in (0.0, 3.0):                                         # 3: the origin is far off
        far = c + shift
        pose = pose._replace(rho=autodecoder.largest_scale(Y, far, s))
        _, depth, _ = autodecoder.see(pose, Y)
        _, origin_depth, _ = autodecoder.see(pose, -far / s[..., None])
        assert depth.min() >= 0.1 - 1e-12
        assert origin_depth.min() >= 0.1 - 1e-12


def test_the_jacobian_is_the_derivative_of_the_residual():
    _, Y, _, _, x, pose = normalized_scene(3.0)
    pose = autodecoder.move(pose, torch.tensor([0.2, -0.1, 0.3, 0.05, 0.1, -0.1], dtype=F64))

    def residual(d):
        return autodecoder.residual_and_jacobian(autodecoder.move(pose, d), Y, x)[0]

    r, J = autodecoder.residual_and_jacobian(pose, Y, x)
    zero = torch.zeros(6, dtype=F64)
    torch.testing.assert_close(r, residual(zero))
    torch.testing.assert_close(J, torch.func.jacfwd(residual)(zero), rtol=0, atol=1e-12)
    half = torch.func.jacfwd(lambda d: residual(d).square().sum(1) / 20)(zero)
    torch.testing.assert_close(autodecoder.error_gradient(pose, Y, x), half, rtol=0, atol=1e-12)


def test_one_of_the_two_first_guesses_is_right_where_depth_does_not_show():
    for flat in (None, "z = 0", "tilted"):
        _, Y, c, s, _, pose = normalized_scene(flat=flat)
        x = 0.2 * (Y @ pose.R.mT)[..., :2] + pose.u[:, None]         # scaled orthography
        guesses = autodecoder.scaled_orthography(Y, x, autodecoder.largest_scale(Y, c, s))
        off = torch.stack([(guess.R - pose.R).flatten(1).norm(dim=1) for guess in guesses])
        assert off.amin(0).max() < 0.01, flat
        if flat:
            assert off.amax(0).min() > 0.1, flat                     # the other is its mirror image
        for guess in guesses:
            torch.testing.assert_close(guess.u, pose.u)
            assert (guess.rho - 0.2).abs().max() < 2e-3


def test_the_better_of_two_poses_is_chosen_for_every_object_by_itself():
    one = autodecoder.ScaledPose(torch.zeros(2, 3, 3), torch.zeros(2, 1), torch.zeros(2, 2))
    two = autodecoder.ScaledPose(torch.ones(2, 3, 3), torch.ones(2, 1), torch.ones(2, 2))
    mu = torch.tensor([5.0, 6.0]).view(2, 1, 1)
    pose, chosen = autodecoder.choose_better((one, torch.tensor([1.0, 4.0]), mu),
                                             (two, torch.tensor([2.0, 3.0]), 10 * mu))
    for value in pose:
        assert value[0].eq(0).all()
        assert value[1].eq(1).all()
    assert chosen.flatten().tolist() == [5, 60]


@pytest.mark.parametrize("flat", [None, "z = 0", "tilted"])
@pytest.mark.parametrize("distance, radius", [(12.0, 0.5), (12.0, 1.0), (3.0, 1.0)])
@pytest.mark.parametrize("K", [6, 12, 125])
def test_exact_points_give_the_exact_pose(flat, distance, radius, K):
    X, x, R, t = scene(40, K, distance, radius, flat)
    for dtype, off in ((F64, 1e-6), (torch.float32, 1e-3)):
        R2, t2 = solve_pnp(X.to(dtype), x.to(dtype))
        torch.testing.assert_close(R2.to(F64), R, rtol=0, atol=off)
        torch.testing.assert_close(t2.to(F64), t, rtol=off, atol=off)


@pytest.mark.parametrize("flat, share", [(None, 0.99), ("z = 0", 0.97), ("tilted", 0.97)])
def test_four_points_are_enough_save_for_rare_ambiguous_ones(flat, share):
    for distance in (12.0, 3.0):
        X, x, R, t = scene(300, 4, distance, 1.0, flat)
        right = (solve_pnp(X, x)[0] - R).abs().amax((1, 2)) < 1e-6
        assert right.double().mean() >= share


def test_noisy_points_are_read_to_within_one_degree():
    g = torch.Generator().manual_seed(1)
    _, _, R, t = scene(300, 4)
    X = 0.3 * torch.randn(300, 125, 3, dtype=F64, generator=g)
    x = project(X, R, t) + 0.002 * torch.randn(300, 125, 2, dtype=F64, generator=g)
    assert degrees(solve_pnp(X, x)[0], R).median() < 0.75                # DLT: 6 to 10 degrees


def test_the_pose_is_where_the_reprojection_error_is_least():
    X, x, _, _ = scene(20, 30)
    x = x + 0.003 * torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    R, t = solve_pnp(X, x)
    d = torch.zeros(20, 6, dtype=F64, requires_grad=True)
    (project(X, cayley(d[:, :3]) @ R, t + d[:, 3:]) - x).square().sum().backward()
    assert d.grad.abs().max() < 1e-9


@pytest.mark.parametrize("flat, distance", [
    (None, 12.0), pytest.param(None, 3.0, marks=pytest.mark.slow),
    pytest.param("tilted", 3.0, marks=pytest.mark.slow)])
def test_gradients_match_finite_differences(flat, distance):
    X, x, _, _ = scene(1, 10, distance, 1.0, flat, seed=3)
    x = x + 0.002 * torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda X, x: solve_pnp(X, x, steps=20),
                                    (X.requires_grad_(), x.requires_grad_()), rtol=1e-5, atol=1e-5)


def test_gradients_stop_growing_where_predictions_collapse():
    X, x, _, _ = scene(50, 125, radius=0.6)
    middle = x.mean(1, keepdim=True)
    for collapse in (1, 0.1, 0.01, 1e-3, 1e-4, 0):
        R, t, to_X, to_x = gradients(X.float(), (middle + collapse * (x - middle)).float())
        assert to_X.max() < 10 and to_x.max() < 1 / 3e-4, collapse
        _, _, to_X, to_x = gradients(X.float(), (middle + collapse * (x - middle)).float(),
                                     lambda R, t: t)
        assert to_X.max() < 1e3 and to_x.max() < 1e4, collapse


@pytest.mark.parametrize("K", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_no_input_gives_a_number_that_is_not_finite(K):
    g = torch.Generator().manual_seed(0)
    n = 250
    X, noise = torch.randn(n, K, 3, generator=g) * 0.5, torch.randn(n, K, 2, generator=g)
    flat = X * torch.tensor([1.0, 1, 0])
    line = X * torch.tensor([1.0, 0, 0])
    one = X[:, :1].expand_as(X)
    twins = X.clone()
    twins[:, 1:K // 2] = X[:, :1]
    camera = X + torch.tensor([0, 0, 0.3])                               # many points behind it
    depth = camera[..., 2:]
    behind = camera[..., :2] / torch.where(depth.abs() < 0.02, 0.02, depth)
    cases = [(X, behind)]
    for points in (X, flat, line, twins, one, X + 5, torch.zeros_like(X)):
        for size in (0, 2e-4, 0.05, 10):
            cases.append((points, noise * size))
    for points, x in cases:
        # 1e5: few points and nonsense make large gradients, but 1 / collapse^k would be 1e9
        R, t, to_X, to_x = gradients(points, x, lambda R, t: torch.cat([R.flatten(1), t], 1))
        for value in (R, t, to_X, to_x):
            assert value.isfinite().all()
        assert to_X.max() < 1e6 and to_x.max() < 1e6
        torch.testing.assert_close(R @ R.mT, torch.eye(3).expand_as(R), rtol=0, atol=1e-5)
        assert torch.linalg.det(R).min() > 0.999 and t[:, 2].min() > 0


def test_wrong_shapes_are_refused_by_name():
    for X, x in [((5, 6, 2), (5, 6, 2)), ((5, 6, 3), (5, 7, 2)), ((5, 3, 3), (5, 3, 2))]:
        with pytest.raises(ValueError, match="points3d"):
            solve_pnp(torch.zeros(X), torch.zeros(x))


# ---- Learned poses ------------------------------------------------------------------------------
def blob(centre, spread=0.15, side=64):
    """A Gaussian picture (side, side) around centre (x, y) in half widths, y down; it sums to 1."""
    middles = (torch.arange(side, dtype=F64) + 0.5) * 2 / side - 1
    distance2 = (middles - centre[0])**2 + (middles[:, None] - centre[1])**2
    picture = torch.exp(-distance2 / (2 * spread**2))
    return picture / picture.sum()


def test_soft_argmax_of_a_gaussian_is_its_mean():
    for centre in ((0.0, 0.0), (0.3, -0.2), (-0.25, 0.1)):
        mean = autodecoder.soft_argmax(blob(centre, 0.1))
        torch.testing.assert_close(mean, torch.tensor(centre, dtype=F64), rtol=0, atol=1e-9)


def test_equivariance_loss_is_zero_for_an_equivariant_predictor_only():
    frames = torch.stack([blob(c) for c in ((0.1, 0.2), (-0.2, 0.0), (0.0, -0.1))])[:, None]
    frames = frames.expand(-1, 3, -1, -1).float()

    def centroid(x):
        return autodecoder.soft_argmax(x[:, :1] / x[:, :1].sum((2, 3), keepdim=True))

    def loss(predict):
        return autodecoder.equivariance_loss(predict, frames, predict(frames),
                                             torch.Generator().manual_seed(0))

    assert loss(centroid) < 1e-3
    assert loss(lambda x: torch.zeros(3, 1, 2)) > 0.03
    assert loss(lambda x: centroid(x) * torch.tensor([-1.0, 1])) > 0.03          # mirrored


def posenet(parts=2, **kw):
    torch.manual_seed(0)
    return PoseNet(parts, 8, focal=5.7, body=(0.3, 0.8, 0.3), width=16, **kw)


def test_an_average_frame_is_seen_from_the_default_camera():
    net = posenet()
    frames = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    cameras, u, losses = net(frames)                   # one frame is its own mean
    expected = torch.eye(4)
    expected[2, 3] = net.distance
    torch.testing.assert_close(cameras[0, 0], expected, rtol=0, atol=2e-3)
    assert cameras.shape == (1, 1, 4, 4) and u.shape == (1, 2, 8, 2)
    assert losses["reprojection"] < 1e-4 and losses["distance"] < 1e-4


def test_points_that_shift_in_the_picture_shift_the_object():
    net = posenet().eval()
    frames = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    net.mean.copy_(net.points2d(frames)[0] - torch.tensor([0.1, 0.0]))   # all 0.1 to the right
    with torch.no_grad():
        camera = net(frames)[0][:, 0]                                          # (1, 4, 4)
    lens = torch.tensor([[5.7, 5.7, 0.5, 0.5]])
    where, depth = render.project(torch.zeros(1, 1, 3), camera, lens)
    torch.testing.assert_close(where[0, 0], torch.tensor([0.55, 0.5]), rtol=0, atol=1e-4)
    torch.testing.assert_close(depth[0, 0], torch.tensor(net.distance), rtol=0, atol=1e-2)


def test_points_seen_by_a_turned_camera_give_that_camera_back():
    net = posenet().eval()
    frames = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    lens = torch.tensor([5.7, 5.7, 0.5, 0.5])
    expected = render.orbit(0.4, 0.2, net.distance)
    default = render.orbit(0.0, 0.0, net.distance)
    turned = 2 * render.project(net.canonical, expected, lens)[0] - 1          # (P, K, 2)
    still = 2 * render.project(net.canonical, default, lens)[0] - 1
    net.mean.copy_(net.points2d(frames)[0] - (turned - still))
    camera = net(frames)[0][0, 0]
    torch.testing.assert_close(camera, expected, rtol=0, atol=1e-3)


def test_split_gives_every_part_the_pose_of_the_first_but_for_noise():
    net = posenet(parts=3).eval()
    net.canonical.data[0] += 0.1                       # unlike the other parts, as after training
    net.mean[0] += 0.1
    frames = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = net(frames)[0]
    net.split(noise=0.0)
    after = net(frames)[0]
    assert after.shape == (4, 3, 4, 4) and int(net.active) == 3
    torch.testing.assert_close(after, before.expand(4, 3, 4, 4), rtol=0, atol=1e-4)
    net.split(noise=0.02)
    assert (net.keypoints.heat.weight[:8] - net.keypoints.heat.weight[8:16]).abs().max() > 1e-4


def test_the_mean_of_the_points_is_plain_at_first_and_then_forgets():
    net = posenet(parts=1)
    u = torch.rand(40, 2, 1, 8, 2, generator=torch.Generator().manual_seed(0))
    for batch in u[:20]:
        assert torch.equal(net.mean_points(batch, settled=False), batch.mean(0))
    torch.testing.assert_close(net.mean, u[:20].mean((0, 1)))
    before = net.mean.clone()
    net.mean_points(u[20], settled=False)
    torch.testing.assert_close(net.mean, 0.95 * before + 0.05 * u[20].mean(0))
    settled = net.mean.clone()
    assert net.mean_points(u[21], settled=True) is net.mean          # as in evaluation
    assert net.eval().mean_points(u[22], settled=False) is net.mean
    assert torch.equal(net.mean, settled)


@pytest.mark.parametrize("name, value, look, usual, changed", [
    ("parts", 3, lambda net: len(net.canonical), 2, 3),
    ("keypoints", 27, lambda net: net.canonical.shape[1], 8, 27),
    ("focal", 2.0, lambda net: (net.focal, net.half), (5.7, 0.5 / 5.7), (2.0, 0.25)),
    ("body", (0.5, 0.6, 0.7), lambda net: net.canonical.detach()[0].amax(0)[:2].tolist(),
     pytest.approx([0.3, 0.8]), pytest.approx([0.5, 0.6])),
    ("pose_width", 8, lambda net: net.keypoints.heat.in_channels, 32, 16),
])
def test_every_setting_of_the_pose_network_reaches_it(name, value, look, usual, changed):
    assert look(PoseNet.from_settings(small_settings(parts=2))) == usual
    assert look(PoseNet.from_settings(small_settings(**{"parts": 2, name: value}))) == changed


# ---- The decoder of what moves ------------------------------------------------------------------
def moving(parts=4, **kw):
    """A moving decoder of 3 objects, 16^3, latent 4^3."""
    torch.manual_seed(0)
    usual = dict(half_axes=(0.3, 0.8, 0.3), embed_dim=16, channels=16, volume_side=16,
                 latent_side=4, depth=1, attention=(), norm="group")
    return MovingDecoder(nn.Embedding(3, 16), parts, **(usual | kw))


def test_usage_loss_is_zero_when_all_parts_are_used_and_a_quarter_when_one_of_two_is_not():
    volume = torch.zeros(1, 6, 4, 4, 4)
    volume[:, 0] = 1
    assert autodecoder.usage_loss(volume) == 0
    volume[:, 4] = 100
    torch.testing.assert_close(autodecoder.usage_loss(volume), torch.tensor(0.25))


def test_a_moving_subject_starts_as_an_opaque_ellipsoid_with_parts_spread_over_it():
    model = moving(parts=4)
    model.growth.fill_(0.0)
    volume = model(torch.arange(3))
    assert volume.shape == (3, 8, 16, 16, 16)
    assert torch.equal(volume[0, 0], volume[2, 0])               # no object's own density yet
    assert volume[0, 0, 8, 8, 8] > 20 and volume[0, 0, 8, 8, 1] < 0.1      # z, y, x
    centres = autodecoder.spread_points(4, (0.3, 0.8, 0.3))
    assert torch.cdist(centres, centres).add(10 * torch.eye(4)).min() > 0.25
    assert ((centres / torch.tensor([0.3, 0.8, 0.3])).norm(dim=1) < 1).all()


def test_a_part_claims_what_is_near_its_middle():
    body = (0.3, 0.8, 0.3)
    logits = autodecoder.volume_prior(16, 4, body, True)[0, 4:]      # (P, D, H, W)
    middles = autodecoder.spread_points(4, body)
    x, y, z = 1 / 16, -5 / 16, 3 / 16                                # middle of voxel [9, 5, 8]
    for p in range(4):
        distance2 = (middles[p] - torch.tensor([x, y, z])).square().sum()
        torch.testing.assert_close(logits[p, 9, 5, 8], -8 * distance2)


def test_parts_spread_as_far_as_they_are_told_to_reach_without_the_ellipsoid_growing():
    wide = autodecoder.volume_prior(16, 4, (0.2, 0.8, 0.2), True, reach=(0.9, 0.3, 0.1))[0]
    slim = autodecoder.volume_prior(16, 4, (0.2, 0.8, 0.2), True)[0]
    assert torch.equal(wide[0], slim[0])
    hands = wide[4:, 8, 8, [1, 14]].argmax(0)                    # the parts of two voxels far apart
    assert hands[0] != hands[1]
    x = wide[4:].flatten(1).argmax(1) % 16                       # of every part's middle, a column
    assert x.max() - x.min() > 4                                 # not all at one x


def test_a_level_that_has_not_come_in_smooths_and_at_full_share_is_itself():
    model = moving(parts=1)
    x = torch.randn(1, 8, 8, 8, 8)                               # what the last level is given
    level = model.levels[-1]
    assert torch.equal(autodecoder.faded(level, x, torch.tensor(1.0)), level(x))
    coarse = autodecoder.faded(level, x, torch.tensor(0.0))
    # Linear interpolation of a ramp is a ramp of half the slope.
    ramp = torch.arange(8.0)[:, None, None].expand(1, 8, 8, 8, 8)
    rows = autodecoder.faded(level, ramp, torch.tensor(0.0))[0, :, 1:-1]
    steps = rows.diff(dim=1)
    slope = level[0].shortcut(ramp).diff(dim=2)[:, :, :1, :1, :1] / 2
    torch.testing.assert_close(steps, slope[0].expand_as(steps), rtol=1e-4, atol=1e-5)
    half = autodecoder.faded(level, x, torch.tensor(0.5))
    torch.testing.assert_close(half, (coarse + level(x)) / 2)


def test_a_moving_decoder_that_is_all_there_is_the_rigid_one_but_for_its_ellipsoid_and_its_parts():
    fog = shake(moving(parts=1, half_axes=()))
    rigid = AutoDecoder(nn.Embedding(3, 16), embed_dim=16, channels=16, volume_side=16,
                        latent_side=4, depth=1, attention=(), norm="group")
    rigid.load_state_dict(fog.state_dict(), strict=False)
    k = torch.tensor([2, 0])
    torch.testing.assert_close(fog(k), rigid(k))
    solid = moving(parts=1)
    solid.load_state_dict(fog.state_dict() | {"prior": solid.prior})
    raw = rigid.decode_raw(rigid.decode_latent(rigid.embed(k)))
    expected = F.softplus(raw[:, 0] + solid.prior[:, 0]) * 8
    torch.testing.assert_close(solid(k)[:, 0], expected)
    torch.testing.assert_close(solid(k)[:, 1:], rigid(k)[:, 1:])


def test_growth_brings_in_the_learned_density_alone_and_the_fog_around_the_ellipsoid():
    model = shake(moving(parts=2))
    k = torch.tensor([2])
    raw = model.decode_raw(model.decode_latent(model.embed(k)))      # all there
    model.growth.fill_(0.25)
    volume = model(k)
    logit = model.prior[:, 0] + (raw[:, 0] - model.prior[:, 0]) / 4
    fog = torch.where(model.prior[:, 0] < -3, 0.25, 1.0)             # around the ellipsoid
    torch.testing.assert_close(volume[:, 0], F.softplus(logit) * 8 * fog)
    torch.testing.assert_close(volume[:, 1:4], raw[:, 1:4].sigmoid())
    torch.testing.assert_close(volume[:, 4:], raw[:, 4:])
    assert fog.min() == 0.25


def test_every_level_of_g2_comes_in_by_its_own_share():
    model = shake(moving(parts=1)).eval()
    latent = model.decode_latent(model.embed(torch.tensor([1])))
    model.detail.copy_(torch.tensor([1.0, 0.25]))
    x = model.levels[0](latent)
    x = autodecoder.faded(model.levels[1], x, torch.tensor(0.25))
    expected = model.head(x) + model.prior
    torch.testing.assert_close(model.decode_raw(latent), expected)


def test_growth_and_detail_are_in_the_checkpoint_and_detail_can_be_asked_without_numbers():
    model = moving(parts=2)
    assert {"prior", "growth", "detail"} < set(model.state_dict())
    assert model.growth == 1
    assert model.detail.tolist() == [1, 1]
    with torch.device("meta"):
        shapes_only = moving(parts=2)
        assert shapes_only(torch.tensor([0, 1])).shape == (2, 6, 16, 16, 16)
    assert shapes_only.detail.device.type == "cpu"


def test_every_setting_of_a_moving_decoder_reaches_its_prior():
    def prior(**others):
        return autodecoder.build_decoder(small_settings(parts=4, **others), 3).prior

    body, reach = (0.3, 0.8, 0.3), (0.9, 0.3, 0.1)
    volume_prior = autodecoder.volume_prior
    assert torch.equal(prior(), volume_prior(32, 4, body, True))
    assert torch.equal(prior(body=reach), volume_prior(32, 4, reach, True))
    assert torch.equal(prior(ellipsoid=False), volume_prior(32, 4, (), True))
    assert torch.equal(prior(skin_layout=False), volume_prior(32, 4, body, False))
    assert torch.equal(prior(reach=reach), volume_prior(32, 4, body, True, reach))
    different = [prior(), prior(body=reach), prior(ellipsoid=False), prior(skin_layout=False),
                 prior(reach=reach)]
    for i in range(5):
        for j in range(i):
            assert not torch.equal(different[i], different[j])
