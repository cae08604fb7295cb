"""bench.py: the plainer versions do the same as ours, and the clock counts what it says."""
import argparse

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import autodecoder
import bench
import render
from data import BadInput


def test_calls_take_turns_and_the_first_of_each_does_not_count(monkeypatch):
    called = []
    ticks = iter([0, 9, 0, 4, 0, 7, 0, 5, 0, 8, 0, 6])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    seconds = bench.take_turns([lambda: called.append("a"), lambda: called.append("b")], 3, "cpu")
    assert called == ["a", "b"] * 4
    assert seconds == [8, 5]


def test_operations_are_those_of_products_and_convolutions():
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    assert bench.operations(lambda: a @ b) == 2 * 3 * 5 * 7
    conv = torch.nn.Conv3d(2, 4, 3, padding=1)
    assert bench.operations(lambda: conv(torch.zeros(1, 2, 6, 6, 6))) == 2 * 2 * 4 * 27 * 6**3


def test_the_plain_decoder_and_the_plain_attention_answer_as_ours_do():
    torch.manual_seed(0)
    decoder = autodecoder.AutoDecoder.from_settings(bench.settings_of("micro"), 2).eval()
    k = torch.arange(2)
    with torch.no_grad():
        ours = decoder(k)
        plain = bench.plain_decoder(decoder)
        assert not any(isinstance(m, autodecoder.Pointwise) for m in plain.modules())
        torch.testing.assert_close(plain(k), ours, rtol=1e-4, atol=1e-4)
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    torch.testing.assert_close(bench.plain_attention(q, k, v),
                               scaled_dot_product_attention(q, k, v))


def test_made_up_volumes_look_like_the_objects_that_they_are_made_of():
    volumes = bench.made_up_volumes(2, 32)
    assert volumes.shape == (2, 4, 32, 32, 32)
    for k in range(2):
        thing = bench.data.synthetic_object(k, 0, 2, 32)
        _, occupancy = render.render(volumes[k][None], thing.cam2world[None],
                                     thing.intrinsics[None], 32, 96)
        masks = thing.rgba[..., 3].float() / 255
        assert (occupancy[0, :, 0] - masks).abs().mean() < 0.05
        assert masks.mean() > 0.1


@pytest.mark.parametrize("row", ["decoder", "unet", "sampler", "pnp"])
def test_a_row_has_ours_and_a_plainer_version_and_both_run(row):
    args = argparse.Namespace(device="cpu", preset="micro", run=None, repeats=1)
    for name, calls in bench.ROWS[row](args):
        assert name and len(calls) == 2
        if row != "pnp":                                 # its plain version takes seconds
            calls[1]()
        calls[0]()


@pytest.mark.parametrize("arguments, word", [
    (["windmill"], "windmill"), (["--preset", "huge"], "huge"), (["--repeats", "0"], "--repeats"),
    (["--run", "/nowhere"], "/nowhere")])
def test_what_cannot_be_timed_is_refused_by_name(arguments, word):
    with pytest.raises(BadInput, match=word):
        bench.main(arguments)


@pytest.mark.slow
def test_a_row_is_timed_in_a_process_of_its_own(capfd):
    bench.main(["pnp", "--repeats", "1"])
    head, columns, row = capfd.readouterr().out.splitlines()
    assert "operations a second" in head and "ratio" in columns
    assert row.startswith("pnp ") and row.endswith(" GiB")
    assert float(row.split()[3]) > 5                     # 256 at once, and one by one
