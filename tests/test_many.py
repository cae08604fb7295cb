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

# What each of the two does: one run after the other. The second one tells which files of the run it
# writes, renames or makes; and in some step it sends itself a signal, or ends. Of the pictures only
# the sheet is drawn: it comes in the middle of training, and from the first one alone.
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
    if os.environ["RANK"] == "1" and steps == run.get("stopped_at"):
        os.kill(os.getpid(), signal.SIGTERM)
    if os.environ["RANK"] == "1" and steps == run.get("ends_at"):
        os._exit(9)

def load_for(settings, source):
    print("this will take a while")
    return really_load_for(settings, source)

folder, runs = json.loads(sys.argv[1])
really_load_for, data.load_for = data.load_for, load_for
adam_step, torch.optim.Adam.step = torch.optim.Adam.step, step
train.plot_log = sample.save_orbit = sample.save_latent_histogram = lambda *_: None
train.first_sampling = lambda *_: []
sys.argv = ["train.py", "--some", "flags"]
if os.environ["RANK"] == "1":
    sys.addaudithook(note)
for run in runs:
    steps = 0
    os.environ["MASTER_PORT"] = str(run["port"])
    foreground_loss = train.autodecoder.foreground_loss
    if run.get("spoiled"):
        train.autodecoder.foreground_loss = lambda occupancy, mask: occupancy.mean() * float("nan")
    status = 0
    try:
        data.run_cli(lambda: train.main(run["flags"]))
    except SystemExit as end:
        status = end.code
    train.autodecoder.foreground_loss = foreground_loss
    if torch.distributed.is_initialized():   # else the end of the process closes the connections
        torch.distributed.destroy_process_group()
    print("status", status, file=sys.stderr, flush=True)
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


def statuses(process):
    """How its runs ended."""
    lines = process[1].splitlines()
    return [int(line.split()[1]) for line in lines if line.startswith("status ")]


def flags_of(folder, *others):
    return [*FLAGS, "--out", str(folder), *others]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Both stages by two processes in `whole`; the same in `parts`, stopped after three steps of
    stage 1, and of stage 2; `batch` with batch norm; one that diverges; and one whose second
    process ends."""
    folder = tmp_path_factory.mktemp("pair")
    resumed = flags_of(folder / "parts", "--resume")
    first, second = two_processes(folder, [
        {"flags": flags_of(folder / "whole")},
        {"flags": flags_of(folder / "parts"), "stopped_at": 3},
        {"flags": resumed, "stopped_at": 3 + 3},             # three more of stage 1 come first
        {"flags": resumed},
        {"flags": flags_of(folder / "batch", "--norm", "batch")},
        {"flags": flags_of(folder / "spoiled"), "spoiled": True},
        {"flags": flags_of(folder / "ended"), "ends_at": 5}])
    return SimpleNamespace(folder=folder, first=first, second=second)


# ---- What they learn -----------------------------------------------------------------------------
def states_of_two(make, settings, stage):
    """Two states, that draw what the first process draws, and what the second."""
    states = make(), make()
    for state, name in zip(states, (stage, f"{stage} rank 1")):
        state.generator = sample.stream(settings.seed, name)
    return states


def learn_jointly(settings):
    """Stage 1 by one process, on the objects, views and samples of both -> decoder, losses.

    Batch norm measures the objects of each by themselves.
    """
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
        if settings.norm == "batch":
            volumes = [decoder(half_of_k) for half_of_k in k.chunk(2)]
        else:
            volumes = decoder(k).chunk(2)
        pictures = []
        for volume, state, (_, frames, _, _, lens) in zip(volumes, states, drawn):
            cameras = dataset.cam2world[frames]
            pictures.append(render.render_skipping(
                volume, cameras, lens, settings.size, settings.n_samples, state.generator))
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
                settings.sigma_data, half.generator, settings.P_mean, settings.P_std) / 2
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        diffusion.ema_update(state.average, state.model, step + 1, settings.ema_half_life)
        losses.append(loss.item())
    return state, losses


def assert_near(found, model, idle=()):
    """A state dict and a network, to 1e-4; idle: names of weights that change nothing."""
    assert found.keys() == model.state_dict().keys()
    for name, weight in model.named_parameters():
        if name in idle:
            continue
        torch.testing.assert_close(found[name], weight.data, rtol=0, atol=1e-4, msg=name)


def logged(folder, stage):
    return [float(row[2]) for row in log_rows(folder)[1:] if row[0] == stage]


@pytest.mark.parametrize("run, norm", [("whole", "group"), ("batch", "batch")])
def test_two_processes_learn_what_one_learns_from_the_objects_of_both(run, norm, pair):
    _, settings = train.parse([*FLAGS, "--norm", norm])
    decoder, losses = learn_jointly(settings)
    assert logged(pair.folder / run, "1") == pytest.approx(losses, rel=1e-4)
    idle = ()
    if norm == "batch":
        # What these add to a channel, the head's batch norm takes away: their gradients are but
        # rounding, of which Adam makes whole steps.
        idle = ("levels.0.0.norm2.bias", "levels.0.0.shortcut.bias")
        assert len(decoder.levels) == 1
    assert_near(weights(pair.folder / run, 1), decoder, idle)


def test_two_processes_diffuse_what_one_diffuses_with_the_noise_of_both_and_its_text_too(pair):
    _, settings = train.parse(FLAGS)
    first = sample.load_checkpoint(pair.folder / "whole", 1)
    state, losses = diffuse_jointly(settings, first)
    assert logged(pair.folder / "whole", "2") == pytest.approx(losses, rel=1e-4)
    assert_near(weights(pair.folder / "whole", 2, "ema"), state.average)
    assert_near(weights(pair.folder / "whole", 2, "model"), state.model)
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
    assert statuses(pair.first)[:5] == [0, 143, 143, 0, 0]


def test_only_the_first_process_writes_and_speaks(pair):
    """Of the second one's lines all are the statuses of its runs: no word, and no file of a run."""
    out, err = pair.second
    assert out == "" and len(err.splitlines()) == len(statuses(pair.second)) == 6
    assert {"stage1.pt", "stage2.pt", "log.csv", "metrics.json", "lock"} <= {
        path.name for path in (pair.folder / "whole").iterdir()}


def test_where_the_first_process_fails_it_says_why_and_the_other_ends(pair):
    assert statuses(pair.first)[5] == 2 and statuses(pair.second)[5] == 1
    assert ("error: stage 1: the loss is nan at step 1; nothing had been saved; try a lower "
            "learning rate") in pair.first[1].splitlines()


def test_where_another_process_ends_the_first_one_says_so_and_ends(pair):
    assert len(statuses(pair.second)) == 6 and statuses(pair.first)[6] == 2
    line = pair.first[1].splitlines()[-2]
    assert line.startswith("error: another process of this run has ended") and "--resume" in line
    assert sample.load_checkpoint(pair.folder / "ended", 1)["step"] == 4


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
        f"error: {whole}/stage{stage}.pt was trained by 2 processes, not 1; go on with torchrun "
        "--nproc_per_node=2, or start anew with another --out"]
    assert {path.name: path.read_bytes() for path in whole.glob("*.pt")} == before


def test_a_checkpoint_from_before_there_were_many_is_of_one(as_two):
    with pytest.raises(data.BadInput, match="was trained by 1 process, not 2; go on with torchrun"):
        train.same_processes({"step": 3}, "x.pt")


@pytest.mark.parametrize("flags, says", [
    ("--preset micro --objects-per-step 3",
     "--objects-per-step 3 cannot be divided among 2 processes"),
    ("--preset micro --batch-size 5", "--batch-size 5 cannot be divided among 2 processes"),
    ("--cameras learned", "cameras are learned by one process alone")])
def test_what_two_cannot_share_is_refused(flags, says, as_two):
    with pytest.raises(data.BadInput, match=says):
        train.parse(flags.split())


def test_a_stage_is_asked_only_for_what_it_divides(as_two, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")                        # micro has 4 and 16
    train.parse(["--preset", "micro", "--stage", "1", "--objects-per-step", "3"])
    train.parse(["--preset", "micro", "--stage", "2", "--batch-size", "3"])


# ---- Their networks and devices ------------------------------------------------------------------
@pytest.fixture
def group_of_one(tmp_path):
    """What DistributedDataParallel needs, with nobody to talk to."""
    where = (tmp_path / "meeting").as_uri()
    torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def small_decoder():
    _, settings = train.parse(DATA + DECODER + ["--norm", "batch"])
    torch.manual_seed(0)
    return settings, train.autodecoder.build_decoder(settings, 3)


def test_many_processes_also_compute_in_bfloat16_and_compile(as_two, group_of_one, monkeypatch):
    settings, decoder = small_decoder()
    settings = dataclasses.replace(settings, precision="bf16", compile=True)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward: compiled.append(forward) or forward)
    k = torch.arange(3)
    with train.sound_convolutions("bf16", "cpu"), torch.autocast("cpu", torch.bfloat16):
        expected = decoder(k).float()
    wrapped = torch.nn.parallel.DistributedDataParallel.forward
    calls = []
    monkeypatch.setattr(torch.nn.parallel.DistributedDataParallel, "forward",
                        lambda self, *inputs: calls.append(self) or wrapped(self, *inputs))
    with train.sped_up(settings, decoder, "cpu"):
        rough = decoder(k)
        assert len(calls) == 1 and len(compiled) == 1
    assert torch.equal(rough, expected) and rough.dtype == torch.float32
    decoder(k)
    assert len(calls) == 1                               # the network's own forward is back
    assert decoder.state_dict().keys() == small_decoder()[1].state_dict().keys()


def test_on_gpus_batch_norm_measures_the_objects_of_all_processes(as_two, monkeypatch):
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel",    # it would ask for GPUs
                        lambda learner, **options: learner)
    _, decoder = small_decoder()
    before = decoder.state_dict()
    norms = [module for module in decoder.modules() if isinstance(module, torch.nn.BatchNorm3d)]
    train.averaging(decoder, decoder.forward, "cpu")
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in decoder.modules())
    train.averaging(decoder, decoder.forward, "cuda")
    joint = [module for module in decoder.modules() if isinstance(module, torch.nn.SyncBatchNorm)]
    assert len(joint) == len(norms) > 1
    # They have the weights that the optimizer knows, under the names that checkpoints know.
    assert all(new.weight is old.weight for new, old in zip(joint, norms))
    assert same(decoder.state_dict(), before)


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two GPUs, as far as they are only counted and chosen -> those that were."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(sample, "choose_device", lambda name: name)
    return chosen


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(as_two, two_gpus, monkeypatch):
    monkeypatch.setenv("RANK", "3")                              # on the second machine
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train.own_device("auto") == train.own_device("cuda") == "cuda:1"
    assert two_gpus == ["cuda:1", "cuda:1"] and train.own_device("cpu") == "cpu"
    with pytest.raises(data.BadInput, match="--device cuda:0: each process takes a GPU of its own"):
        train.own_device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(data.BadInput, match="3 processes, but this machine has only 2 GPUs"):
        train.own_device("auto")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert train.own_device("cuda:0") == "cuda:0"


# ---- By torchrun itself --------------------------------------------------------------------------
@pytest.mark.slow
def test_torchrun_starts_them_and_ends_all_where_one_fails(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")

    def start(*flags):
        return subprocess.run(
            [*torchrun, "train.py", "--stage", "1", *DATA, *DECODER, "--log-every", "1", "--out",
             str(tmp_path / "run"), *flags],
            cwd=ROOT, env=environment, capture_output=True, text=True)

    done = start("--steps", "2")
    assert done.returncode == 0, done.stderr
    assert [row[:2] for row in log_rows(tmp_path / "run")[1:]] == [["1", "1"], ["1", "2"]]
    assert done.stdout.count("look at ") == 1
    assert len(sample.load_checkpoint(tmp_path / "run", 1)["others"]) == 1
    failed = start("--size", "3")
    assert failed.returncode != 0 and not failed.stdout
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--size" in errors[0] and "exitcode  : 2" in failed.stderr
