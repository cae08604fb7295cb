"""How fast is it? Every part beside a plainer version of itself, in turn, on this machine.

    python tests/bench.py                                all rows, some minutes
    python tests/bench.py render unet                    these
    python tests/bench.py --run runs/tiny-synthetic      with objects that were learned, not made up
    python tests/bench.py --device cuda --repeats 20

A row's times are medians of --repeats calls, after one that does not count; ours and the plainer
version take turns, as the speed of a laptop changes while it runs. `ratio` is the plainer one's
time over ours. `rate` is the share that our matrix products and convolutions reach of the
operations a second of one large matrix product here. `memory` is the most that the row's process
had; on a GPU, the most of its memory.

    render      a trained object: with empty space passed over, and sample by sample
    fog         the same where nothing is empty
    decoder     forward and backward: 1x1x1 as a matrix product and channels last, or as in papers
    unet        a step of the denoiser: with fused attention, and with its formula
    sampler     8 samples at once, and one by one
    steps       whole steps of both stages of a preset, and with the plain renderer, Adam, attention
    loading     built-in objects (no plainer version)
    hash        embeddings of 4,096 objects: hashed, and from a full table
    pnp         poses of 256 frames at once, and one by one
"""
import argparse
import dataclasses
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import autodecoder  # noqa: E402
import data  # noqa: E402
import diffusion  # noqa: E402
import render  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from data import BadInput  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
import evaluate  # noqa: E402


# ---- The clock -----------------------------------------------------------------------------------
def wait_for(device):
    """A GPU takes orders and answers later: without this, giving orders would be timed."""
    if device != "cpu":
        torch.cuda.synchronize()


def seconds_of(call, device):
    wait_for(device)
    began = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - began


def take_turns(calls, repeats, device):
    """Median seconds of each call, after one of each that does not count."""
    times = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(repeats):
        for call, own in zip(calls, times):
            own.append(seconds_of(call, device))
    return [statistics.median(own) for own in times]


def operations(call):
    """Multiplications and additions of its convolutions and matrix products."""
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops()


def matrix_rate(device):
    """Operations a second of one large matrix product, float32."""
    n = 2048 if device == "cpu" else 8192
    a = torch.randn(n, n, device=device)
    seconds, = take_turns([lambda: a @ a], 5, device)
    return 2 * n**3 / seconds


def peak_memory(device):
    """The most memory so far, in GiB."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    return train.peak_memory_gib()


# ---- What is timed -------------------------------------------------------------------------------
def settings_of(preset):
    return train.AllSettings(**train.PRESETS[preset])


def made_up_volumes(n, side):
    """Built-in objects as a decoder would draw them: (n, 4, side, side, side)."""
    place = (2 * torch.arange(side) + 1) / side - 1
    z, y, x = torch.meshgrid(place, place, place, indexing="ij")
    points = torch.stack([x, y, z], -1).reshape(-1, 3)
    volumes = torch.zeros(n, 4, side**3)
    for k in range(n):
        for part in data.synthetic_object(k, 0, 1, 8).shapes:
            inside = evaluate.inside(part, points)
            volumes[k, 0, inside] = 2.0 * side           # an optical thickness of 4 a voxel
            volumes[k, 1:, inside] = torch.tensor(part.colour).float()[:, None]
    return volumes.unflatten(2, (side, side, side))


def learned_volumes(run, n, side):
    """The first n training objects of a run, enlarged or reduced to this side."""
    trained = sample.open_run(run, "cpu", stages=(1,))
    latents = sample.training_latents(trained.autodecoder, len(trained.names))[:n]
    volumes = sample.decode(trained, latents)
    was = volumes.shape[-1]
    volumes = F.interpolate(volumes, size=(side, side, side), mode="trilinear")
    volumes[:, 0] *= side / was                          # a voxel is as opaque as it was
    return volumes


def objects(args, n, side):
    volumes = learned_volumes(args.run, n, side) if args.run else made_up_volumes(n, side)
    return volumes.to(args.device)


def three_cameras(n, device):
    """cam2world (n, 3, 4, 4) and intrinsics (n, 3, 4) all round."""
    cam2world = render.orbit(torch.tensor([0.3, 2.4, 4.5]), 0.4, 4.0)
    intrinsics = torch.tensor([1.45, 1.45, 0.5, 0.5])
    return cam2world.expand(n, 3, 4, 4).to(device), intrinsics.expand(n, 3, 4).to(device)


def pictures(renderer, volumes, backward):
    """A call that renders volumes at 64 x 64 with 128 samples, and sends a gradient back."""
    cameras = three_cameras(len(volumes), volumes.device)

    def call():
        leaf = volumes.clone().requires_grad_(backward)
        rgb, occupancy = renderer(leaf, *cameras, 64, 128, torch.Generator().manual_seed(0))
        if backward:
            (rgb.mean() + occupancy.mean()).backward()
    return call


def render_rows(args, volumes, what):
    """Forward, and with the way back; and how far apart the pictures are."""
    for backward, name in ((False, "forward"), (True, "forward + backward")):
        calls = [pictures(renderer, volumes, backward)
                 for renderer in (render.render_skipping, render.render)]
        yield f"{what}, {name}", calls
    cameras = three_cameras(len(volumes), volumes.device)
    ours, _ = render.render_skipping(volumes, *cameras, 64, 128)
    plain, _ = render.render(volumes, *cameras, 64, 128)
    apart = (ours - plain).abs()
    print(f"{what}: colours differ by {apart.max():.1e} at most, {apart.mean():.1e} on average")


def render_row(args):
    """A trained object: empty space passed over, and sample by sample."""
    yield from render_rows(args, objects(args, 2, 64), "render")


def fog_row(args):
    """The same where nothing is empty."""
    generator = torch.Generator().manual_seed(0)
    fog = torch.rand(2, 4, 64, 64, 64, generator=generator).to(args.device)
    yield from render_rows(args, fog, "fog")


class PlainPointwise(nn.Module):
    """autodecoder.Pointwise as papers write it, with the same weights."""

    def __init__(self, linear):
        super().__init__()
        self.conv = nn.Conv3d(linear.in_features, linear.out_features, 1)
        self.conv.weight.data = linear.weight.data[:, :, None, None, None].clone()
        self.conv.bias.data = linear.bias.data.clone()

    def forward(self, x):
        return self.conv(x)


def plain_decoder(decoder):
    """The same layers, 1x1x1 convolutions as such and voxels in the order that is usual."""
    for module in decoder.modules():
        for name, child in module.named_children():
            if isinstance(child, autodecoder.Pointwise):
                setattr(module, name, PlainPointwise(child))
    return decoder.to(memory_format=torch.contiguous_format)


def decoder_row(args):
    """Forward and backward of the decoder, eight objects."""
    settings = settings_of(args.preset)
    calls = []
    for change in (nn.Identity(), plain_decoder):
        decoder = change(autodecoder.AutoDecoder.from_settings(settings, 8)).to(args.device)
        k = torch.arange(8, device=args.device)
        calls.append(lambda decoder=decoder, k=k: decoder(k).mean().backward())
    yield "decoder", calls


def plain_attention(q, k, v):
    """softmax(q k^T / sqrt(c)) v, as the formula says."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.softmax(-1) @ v


def with_attention(attention, call):
    """The same call, with another function in the place of fused attention."""
    def changed():
        with mock.patch.object(diffusion, "scaled_dot_product_attention", attention):
            call()
    return changed


def step_of_stage2(settings, device):
    """A call that trains the denoiser for a step, on noise."""
    decoder = autodecoder.AutoDecoder.from_settings(settings, 2)
    denoiser = diffusion.Denoiser.from_settings(settings, decoder.latent_shape)
    latents = torch.randn(64, *decoder.latent_shape).to(device)
    settings = dataclasses.replace(settings, steps_stage2=10**9)
    steps = train.train_stage2(settings, train.start_stage2(settings, latents, denoiser, device))
    return lambda: next(steps)


def unet_row(args):
    """A step of stage 2."""
    call = step_of_stage2(settings_of(args.preset), args.device)
    plain = with_attention(plain_attention, call)
    yield "unet step", [call, plain]


def sampler_row(args):
    """Eight samples, eight steps each: 15 calls of the denoiser."""
    settings = settings_of(args.preset)
    shape = autodecoder.AutoDecoder.from_settings(settings, 2).latent_shape
    denoiser = diffusion.Denoiser.from_settings(settings, shape).to(args.device).eval()
    noise = torch.randn(8, *shape, device=args.device)

    def one_by_one():
        for row in noise.split(1):
            diffusion.edm_sampler(denoiser, row, 8)
    yield "sampler", [lambda: diffusion.edm_sampler(denoiser, noise, 8), one_by_one]


def step_of_stage1(args, settings, renderer, fused):
    """A call that trains the decoder for a step at the last, largest size of pictures."""
    dataset = data.load("synthetic", settings.size, n_objects=8, n_views=8)
    state = train.new_stage1(settings, dataset, args.device)
    if args.run:                                         # an untrained object is fog: nothing empty
        weights = sample.load_checkpoint(Path(args.run), 1)["model"]
        own = state.autodecoder.state_dict()
        kept = {name: value[:8] if name == "embedding.weight" else value
                for name, value in weights.items()}
        state.autodecoder.load_state_dict({name: kept[name] for name in own})
    if not fused:
        state.optimizer = torch.optim.Adam(state.autodecoder.parameters())
    settings = dataclasses.replace(settings, steps_stage1=10**9, finer_at=())
    steps = train.train_stage1(settings, dataset, state, draw=train.draw_coarse_to_fine,
                               renderer=renderer)
    return lambda: next(steps)


def steps_row(args):
    """Whole steps of both stages."""
    settings = settings_of(args.preset)
    yield f"{args.preset}, stage 1", [
        step_of_stage1(args, settings, render.render_skipping, fused=True),
        step_of_stage1(args, settings, render.render, fused=False)]
    call = step_of_stage2(settings, args.device)
    yield f"{args.preset}, stage 2", [call, with_attention(plain_attention, call)]


def loading_row(args):
    """Eight built-in objects, eight views each."""
    yield "loading", [lambda: data.load("synthetic", 64, n_objects=8, n_views=8)]


def hash_row(args):
    """Embeddings of 4,096 of 30,000 objects, and their gradient."""
    n, length = 30_000, 1024
    k = torch.randint(n, (4096,)).to(args.device)
    hashed = autodecoder.HashEmbedding(n, length, 256, 4096).to(args.device)
    calls = []
    for table in (hashed, nn.Embedding(n, length).to(args.device)):
        calls.append(lambda table=table: table(k).mean().backward())
    yield "hash", calls


def pnp_row(args):
    """256 poses of 27 points each."""
    generator = torch.Generator().manual_seed(0)
    points3d = torch.rand(256, 27, 3, generator=generator) - 0.5
    points2d = points3d[..., :2] / 4 + 0.01 * torch.randn(256, 27, 2, generator=generator)
    points3d, points2d = points3d.to(args.device), points2d.to(args.device)

    def one_by_one():
        for X, x in zip(points3d.split(1), points2d.split(1)):
            autodecoder.solve_pnp(X, x)
    yield "pnp", [lambda: autodecoder.solve_pnp(points3d, points2d), one_by_one]


ROWS = {"render": render_row, "fog": fog_row, "decoder": decoder_row, "unet": unet_row,
        "sampler": sampler_row, "steps": steps_row, "loading": loading_row, "hash": hash_row,
        "pnp": pnp_row}


# ---- The table -----------------------------------------------------------------------------------
def time_row(args):
    """One row, in a process of its own: its memory is then its own, too."""
    rate = matrix_rate(args.device)
    for name, calls in ROWS[args.row](args):
        seconds = take_turns(calls, args.repeats, args.device)
        share = operations(calls[0]) / seconds[0] / rate
        cells = [f"{name:30}", f"{1000 * seconds[0]:9.1f}"]
        if len(calls) > 1:
            cells += [f"{1000 * seconds[1]:9.1f}", f"{seconds[1] / seconds[0]:6.2f}"]
        else:
            cells += [" " * 9, " " * 6]
        memory = peak_memory(args.device)
        cells += [f"{100 * share:5.0f} %", f"{memory:6.2f} GiB" if memory else "not known"]
        print("  ".join(cells), flush=True)


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"these only: {', '.join(ROWS)}")
    parser.add_argument("--run", help="a trained run: its objects are drawn, its decoder trained")
    parser.add_argument("--preset", default="tiny", help="whose networks are timed (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=5, help="calls of each (%(default)s)")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    unknown = set(args.rows) - set(ROWS)
    if unknown:
        raise BadInput(f"no row {', '.join(sorted(unknown))}: there are {', '.join(ROWS)}")
    if args.preset not in train.PRESETS:
        raise BadInput(f"--preset {args.preset}: one of {', '.join(train.PRESETS)}")
    if args.run and not (Path(args.run) / "stage1.pt").exists():
        raise BadInput(f"--run {args.run}: stage1.pt is not there")
    data.check_number("--repeats", args.repeats, (1, 1000))
    return args


def main(arguments=None):
    args = parse(arguments)
    if args.row:
        return time_row(args)
    rate = matrix_rate(args.device) / 1e9
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
          f"{rate:.0f} billion operations a second in a matrix product", flush=True)
    print(f"{'':30}  {'ours, ms':>9}  {'plain, ms':>9}  {'ratio':>6}  {'rate':>7}  memory")
    for row in args.rows or ROWS:
        own = [sys.executable, __file__, "--row", row, *(arguments or sys.argv[1:])]
        subprocess.run(own, check=True)


if __name__ == "__main__":
    data.run_cli(main)
