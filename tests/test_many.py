"""train.py by two processes: they learn what one would learn from the objects of both, only the
first one writes, and they stop and go on together."""
import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import diffusion
import render
import sample
import train
from test_train import exit_status, log_rows, same, weights

ROOT = Path(__file__).resolve().parents[1]
# Group norm: batch norm would look at the objects of a process, not at all of a step. A step takes
# two of five objects for each process: every round ends in the middle of a step.
DATA = ["--n-objects", "5", "--n-views", "3", "--size", "8", "--holdout", "0"]
DECODER = ["--norm", "group", "--volume-side", "8", "--embed-dim", "8", "--channels", "32",
           "--latent-side", "4", "--n-samples", "4", "--finer-at", "", "--objects-per-step", "4",
           "--views-per-step", "2", "--lr-stage1", "1e-3"]
DENOISER = ["--unet-channels", "16", "--unet-attention", "2", "--batch-size", "4", "--text",
            "--context-dim", "8", "--lr-stage2", "1e-3"]
FLAGS = DATA + DECODER + DENOISER + ["--log-every", "1", "--save-every", "4", "--steps", "6"]

# What each of the two does: one run after the other. Files that it opens for writing, renames or
# makes are listed; the second one sends itself a signal in some step; of the pictures, the sheet is
# drawn, as it is drawn in the middle of training.
PROGRAM = """
import json, os, signal, sys
import torch
import data, sample, train

def note(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
        if str(args[0]).startswith(folder):
            print(event, args[0], file=sys.stderr)

def step(self, *args):
    global steps
    steps += 1
    adam_step(self, *args)
    if os.environ["RANK"] == "1" and steps == run["signal_at"]:
        os.kill(os.getpid(), signal.SIGTERM)

folder, runs = json.loads(sys.argv[1])
adam_step, torch.optim.Adam.step = torch.optim.Adam.step, step
train.plot_log = sample.save_orbit = sample.save_latent_histogram = lambda *_: None
train.first_sampling = lambda *_: []
sys.argv = ["train.py", "--some", "flags"]
if os.environ["RANK"] == "1":
    sys.addaudithook(note)
for run in runs:
    steps = 0
    os.environ["MASTER_PORT"] = str(run["port"])
    if run["spoiled"]:
        train.autodecoder.foreground_loss = lambda occupancy, mask: occupancy.mean() * float("nan")
    try:
        data.run_cli(lambda: train.main(run["flags"]))
        status = 0
    except SystemExit as end:
        status = end.code
        if status >= 128:                    # stopped: here is no end of the process to do it
            torch.distributed.destroy_process_group()
    print("status", status, file=sys.stderr)
"""


def free_ports(n):
    """Numbers of ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def two_processes(folder, runs):
    """PROGRAM by two processes, as torchrun starts them -> (stdout, stderr) of each."""
    for run, port in zip(runs, free_ports(len(runs))):
        run["port"] = port
    processes = []
    for rank in "01":
        environment = dict(
            os.environ, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1",
            GLOO_SOCKET_IFNAME="lo0" if sys.platform == "darwin" else "lo")
        command = [sys.executable, "-c", PROGRAM, json.dumps([str(folder), runs])]
        processes.append(subprocess.Popen(command, env=environment, text=True, cwd=folder,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    try:
        return [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()


def flags_of(folder, *others):
    return [*FLAGS, "--out", str(folder), *others]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Both stages by two processes in `whole`, and the same in three parts in `parts`: stopped in
    stage 1 after three steps, in stage 2 after three, then to the end. Then one that diverges."""
    folder = tmp_path_factory.mktemp("pair")
    runs = [{"flags": flags_of(folder / "whole"), "signal_at": None},
            {"flags": flags_of(folder / "parts"), "signal_at": 3},
            {"flags": flags_of(folder / "parts", "--resume"), "signal_at": 3 + 3},
            {"flags": flags_of(folder / "parts", "--resume"), "signal_at": None},
            {"flags": flags_of(folder / "spoiled"), "signal_at": None}]
    for run in runs:
        run["spoiled"] = "spoiled" in str(run["flags"])
    first, second = two_processes(folder, runs)
    return SimpleNamespace(folder=folder, first=first, second=second)


# ---- What they learn -----------------------------------------------------------------------------
def states_of_two(make, settings, stage):
    """Two states, that draw what the first process draws, and what the second."""
    states = make(), make()
    for state, name in zip(states, (stage, f"{stage} rank 1")):
        state.generator = sample.stream(settings.seed, name)
    return states


def learn_jointly(settings):
    """Stage 1 by one process, on the objects, views and samples of both -> decoder, losses."""
    dataset = data.load_for(settings, "synthetic")
    features = train.autodecoder.build_features(settings.perceptual, "cpu")
    states = states_of_two(lambda: train.new_stage1(settings, dataset, "cpu"), settings, "stage 1")
    decoder, optimizer = states[0].autodecoder, states[0].optimizer
    half = dataclasses.replace(settings, objects_per_step=settings.objects_per_step // 2)
    losses = []
    for step in range(settings.steps_stage1):
        optimizer.param_groups[0]["lr"] = settings.lr_stage1 * (1 - step / settings.steps_stage1)
        drawn = []
        for state in states:
            k = train.next_objects(half, dataset, state)
            frames = train.draw_frames(dataset, k, settings.views_per_step, state.generator)
            photos = train.draw_coarse_to_fine(settings, dataset, frames, state)
            drawn.append((k, frames, *photos))
        k, _, images, masks, _ = (torch.cat(both) for both in zip(*drawn))
        pictures = []
        for volume, state, (_, frames, _, _, lens) in zip(decoder(k).chunk(2), states, drawn):
            pictures.append(render.render_skipping(volume, dataset.cam2world[frames], lens,
                                                   settings.size, settings.n_samples,
                                                   state.generator))
        rgb, occupancy = (torch.cat(both) for both in zip(*pictures))
        loss = train.stage1_loss(settings, features, rgb, occupancy, images, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return decoder, losses


def diffuse_jointly(settings, first):
    """Stage 2 by one process, on the latents, captions and noise of both -> state, losses.

    first: the checkpoint of stage 1
    """
    decoder = train.autodecoder.build_decoder(settings, len(first["names"]))
    decoder.load_state_dict(first["model"])
    latents = sample.training_latents(decoder, len(first["names"])).detach()
    _, state = train.new_stage2(settings, latents, first, None, "cpu")
    states = states_of_two(lambda: SimpleNamespace(**vars(state)), settings, "stage 2")
    losses = []
    for step in range(settings.steps_stage2):
        state.optimizer.param_groups[0]["lr"] = settings.lr_stage2 * (
            1 - step / settings.steps_stage2)
        loss = 0
        for half in states:
            k = torch.randint(len(latents), (settings.batch_size // 2,), generator=half.generator)
            text = train.caption_tokens(half, k)
            loss = loss + diffusion.edm_loss(
                lambda x, sigma: state.model(x, sigma, *text), state.latents[k],
                settings.sigma_data, half.generator) / 2
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        diffusion.ema_update(state.average, state.model, step + 1, settings.ema_half_life)
        losses.append(loss.item())
    return state, losses


def assert_near(found, expected):
    """Two state dicts, to 1e-4."""
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4, msg=name)


def logged(folder, stage):
    return [float(row[2]) for row in log_rows(folder)[1:] if row[0] == stage]


def test_two_processes_learn_what_one_learns_from_the_objects_of_both(pair):
    _, settings = train.parse(FLAGS)
    decoder, losses = learn_jointly(settings)
    assert logged(pair.folder / "whole", "1") == pytest.approx(losses, rel=1e-4)
    assert_near(weights(pair.folder / "whole", 1), decoder.state_dict())
    moved = decoder.embedding.weight.grad.abs().sum(1) > 0
    assert moved.sum() >= 3                          # more objects than one process has in a step


def test_two_processes_diffuse_what_one_diffuses_with_the_noise_of_both_and_its_text_too(pair):
    _, settings = train.parse(FLAGS)
    first = sample.load_checkpoint(pair.folder / "whole", 1)
    state, losses = diffuse_jointly(settings, first)
    assert logged(pair.folder / "whole", "2") == pytest.approx(losses, rel=1e-4)
    assert_near(weights(pair.folder / "whole", 2, "ema"), state.average.state_dict())
    assert_near(weights(pair.folder / "whole", 2, "model"), state.model.state_dict())
    assert any(name.startswith("text.") for name in weights(pair.folder / "whole", 2))


# ---- Together ------------------------------------------------------------------------------------
def test_a_run_that_was_stopped_twice_has_the_bits_of_one_that_never_was(pair):
    whole, parts = pair.folder / "whole", pair.folder / "parts"
    for stage, keys in ((1, ["model"]), (2, ["model", "ema"])):
        for key in keys:
            assert same(weights(whole, stage, key), weights(parts, stage, key))
    assert log_rows(whole) == log_rows(parts) and len(log_rows(whole)) == 1 + 6 + 6


def test_one_that_is_asked_to_stop_stops_all_after_the_same_step_and_a_checkpoint_is_there(pair):
    lines = pair.first[1].splitlines()
    for stage in (1, 2):
        assert (f"stopped by SIGTERM; stage {stage} is saved at step 3; go on with: torchrun "
                "--nnodes=1 --nproc_per_node=2 train.py --some flags --resume") in lines
    assert [line for line in lines if line.startswith("status")] == [
        "status 0", "status 143", "status 143", "status 0", "status 2"]


def test_only_the_first_process_writes_and_speaks(pair):
    """Of the second one's lines all are the statuses of its runs: no word, and no file of a run."""
    out, err = pair.second
    assert out == "" and err.splitlines() == [
        "status 0", "status 143", "status 143", "status 0", "status 1"]
    assert {"stage1.pt", "stage2.pt", "log.csv", "metrics.json", "lock"} <= {
        path.name for path in (pair.folder / "whole").iterdir()}


def test_where_the_first_process_fails_it_says_why_and_the_others_end(pair):
    *_, line, status = pair.first[1].splitlines()
    assert line.startswith("error: stage 1: the loss is nan at step 1; nothing had been saved")
    assert status == "status 2" and pair.second[1].endswith("status 1\n")


@pytest.fixture
def as_two(monkeypatch):
    """This process takes itself for the first of two."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")


@pytest.mark.parametrize("stage", [1, 2])
def test_another_number_of_processes_is_refused_in_a_line(stage, pair, capsys):
    whole = pair.folder / "whole"
    before = {path.name: path.read_bytes() for path in whole.glob("*.pt")}
    flags = flags_of(whole, "--resume", "--steps", "8")
    if stage == 2:
        flags = [*DENOISER, "--out", str(whole), "--resume", "--stage", "2", "--steps", "8"]
    status, lines = exit_status(capsys, lambda: train.main(flags))
    assert status == 2 and lines == [
        f"error: {whole}/stage{stage}.pt was trained by 2 processes, but here are 1; go on with "
        "torchrun --nproc_per_node=2, or start anew with another --out"]
    assert {path.name: path.read_bytes() for path in whole.glob("*.pt")} == before


def test_a_checkpoint_from_before_there_were_many_is_of_one(as_two):
    with pytest.raises(data.BadInput, match="was trained by 1 process, but here are 2; go on with"):
        train.same_processes({"step": 3}, "x.pt")


@pytest.mark.parametrize("flags, says", [
    ("--objects-per-step 3", "--objects-per-step 3 cannot be divided among 2 processes"),
    ("--batch-size 5", "--batch-size 5 cannot be divided among 2 processes"),
    ("--stage 2 --batch-size 5", "--batch-size 5"), ("--cameras learned --size 32", "cameras"),
    ("--data puppets --size 32", "cameras are learned by one process alone")])
def test_what_two_cannot_share_is_refused(flags, says, as_two, monkeypatch):
    with pytest.raises(data.BadInput, match=says):
        train.parse(["--preset", "micro", *flags.split()])
    monkeypatch.setenv("WORLD_SIZE", "1")
    train.parse(["--preset", "micro", "--keypoints", "8", *flags.split()]
                if "32" in flags else ["--preset", "micro", *flags.split()])


def test_a_stage_is_asked_only_for_what_it_divides(as_two):
    train.parse(["--preset", "micro", "--stage", "1", "--objects-per-step", "4"])
    train.parse(["--preset", "micro", "--stage", "2", "--objects-per-step", "4"])
