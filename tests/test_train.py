"""Training: resuming is exact, one object overfits, and a stranger's mistakes get one line."""
import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import data
import render
import sample
import train

ROOT = Path(__file__).resolve().parents[1]
# The smallest run that still goes through everything.
SMALL = ["--n-objects", "4", "--n-views", "6", "--size", "16", "--volume-side", "16",
         "--embed-dim", "32", "--channels", "32", "--latent-side", "4", "--n-samples", "16",
         "--unet-channels", "32", "--unet-attention", "4,2", "--batch-size", "4",
         "--finer-at", "", "--log-every", "2", "--save-every", "4", "--sample-steps", "4"]


def run(*arguments, out, resume=False):
    train.main([*SMALL, "--out", str(out), *arguments] + ["--resume"] * resume)


def weights(out, stage, key="model"):
    return sample.load_checkpoint(out, stage)[key]


def interrupt_at(monkeypatch, step):
    """Makes training stop, as if killed, when it is about to log this step."""
    log = train.Progress.__call__

    def killed(self, at, *args):
        if at > step:
            raise KeyboardInterrupt
        return log(self, at, *args)

    monkeypatch.setattr(train.Progress, "__call__", killed)


def test_resumed_run_has_the_bits_of_one_that_was_never_stopped(tmp_path, monkeypatch):
    for stage, key in ((1, "model"), (2, "ema")):
        whole, halves = tmp_path / "whole", tmp_path / "halves"
        run("--stage", str(stage), "--steps", "8", out=whole)
        with monkeypatch.context() as patch:
            interrupt_at(patch, 6)                       # after the checkpoint at 4
            with pytest.raises(KeyboardInterrupt):
                run("--stage", str(stage), "--steps", "8", out=halves)
        assert sample.load_checkpoint(halves, stage)["step"] == 4
        run("--stage", str(stage), "--steps", "8", out=halves, resume=True)
        a, b = weights(whole, stage, key), weights(halves, stage, key)
        assert all(torch.equal(a[name], b[name]) for name in a)
        rows = [[r[:4] for r in csv.reader(open(folder / "log.csv"))] for folder in (whole, halves)]
        assert rows[0] == rows[1]


def test_resuming_goes_on_in_the_middle_of_a_round_of_objects(tmp_path, monkeypatch):
    flags = "--stage", "1", "--steps", "8", "--n-objects", "6", "--objects-per-step", "2"
    run(*flags, "--save-every", "5", out=tmp_path / "whole")         # rounds have 3 steps
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            run(*flags, "--save-every", "5", out=tmp_path / "halves")
    assert len(sample.load_checkpoint(tmp_path / "halves", 1)["order"]) == 2
    run(*flags, "--save-every", "5", out=tmp_path / "halves", resume=True)
    a, b = weights(tmp_path / "whole", 1), weights(tmp_path / "halves", 1)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_both_stages_resumed_at_once_keep_the_whole_log(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "first_sampling", lambda *_: [])
        run("--steps", "8", out=tmp_path / "whole")
        run("--stage", "1", "--steps", "8", out=tmp_path / "halves")
        interrupt_at(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            run("--stage", "2", "--steps", "8", out=tmp_path / "halves")
        patch.undo()
        patch.setattr(train, "first_sampling", lambda *_: [])
        run("--steps", "8", out=tmp_path / "halves", resume=True)
    rows = [[r[:4] for r in csv.reader(open(tmp_path / name / "log.csv"))]
            for name in ("whole", "halves")]
    assert rows[0] == rows[1] and len(rows[0]) == 9


def test_same_seed_same_numbers_and_another_seed_others(tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run("--stage", "1", "--steps", "4", "--seed", seed, out=tmp_path / name)
    a, b, c = (weights(tmp_path / name, 1)["linear.weight"] for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_whole_pipeline_writes_what_it_names_and_finite_metrics(tmp_path, capsys):
    run("--steps", "6", out=tmp_path / "run")
    named = capsys.readouterr().out.splitlines()[-1].removeprefix("wrote ").split(", ")
    assert len(named) >= 7 and all(Path(p).stat().st_size > 100 for p in named)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for key in ("psnr_heldout", "seconds_stage1", "seconds_stage2", "seconds_total",
                "peak_memory_gib", "fd", "fd_direct"):
        assert metrics[key] == pytest.approx(metrics[key]) and metrics[key] > 0, key
    assert metrics["settings"]["n_objects"] == 4
    # Another stage 2: scores of what the first one made are no longer true of the run.
    run("--stage", "2", "--steps", "2", out=tmp_path / "run")
    again = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert again["psnr_heldout"] == metrics["psnr_heldout"] and again["steps_stage2"] == 2
    assert not {"fd", "fd_direct", "memorization", "seconds_sampling"} & set(again)


def test_one_object_overfits_to_over_30_db(tmp_path):
    run("--stage", "1", "--n-objects", "1", "--n-views", "12", "--size", "32", "--volume-side",
        "32", "--objects-per-step", "1", "--n-samples", "48", "--steps", "300", "--lr-stage1",
        "0.005", "--log-every", "50", "--save-every", "300", "--holdout", "0", out=tmp_path)
    trained = sample.load_run(tmp_path, stages=(1,))
    dataset = data.load("synthetic", 32, 0, n_objects=1, n_views=12)
    dataset.heldout[:] = True                            # score the views that it was trained on
    assert sample.score_heldout(trained, dataset)["psnr_heldout"] > 30


def test_coarse_to_fine_ends_at_full_size():
    s = train.Settings(size=64, finer_at=(0.4, 0.85), steps_stage1=100)
    assert [train.picture_size(s, i) for i in (0, 39, 40, 84, 85, 99)] == [16, 16, 32, 32, 64, 64]
    assert train.picture_size(train.Settings(size=64), 0) == 64


def test_draw_frames_never_shows_a_heldout_view_and_covers_the_others():
    dataset = data.load("synthetic", 16, 3, n_objects=2, n_views=6)
    generator = torch.Generator().manual_seed(0)
    k = torch.tensor([0, 1])
    drawn = torch.stack([train.draw_frames(dataset, k, 4, generator) for _ in range(20)])
    assert not dataset.heldout[drawn].any()
    assert set(drawn.flatten().tolist()) == set(torch.nonzero(~dataset.heldout)[:, 0].tolist())
    assert (dataset.object_index[drawn] == k[:, None]).all()
    many = train.draw_frames(dataset, k, 9, generator)           # more than the four there are
    assert many.shape == (2, 9)


def test_perfect_model_scores_as_its_error_says(monkeypatch):
    # Black pictures: PSNR is -10 log10 of the mean squared colour of each held-out view.
    dataset = data.load("synthetic", 16, 6, n_objects=2, n_views=6)
    black = torch.nn.Module()
    black.forward = lambda k: torch.zeros(len(k), 4, 4, 4, 4)
    truth = dataset.batch(torch.nonzero(dataset.heldout)[:, 0], 16)[0]
    expected = (-10 * torch.log10(truth.square().flatten(1).mean(1))).mean()
    at = SimpleNamespace(autodecoder=black, posenet=None, device="cpu")
    scores = sample.score_heldout(at, dataset)
    assert scores["psnr_heldout"] == pytest.approx(float(expected), abs=1e-3)
    assert 0 < scores["ssim_heldout"] < 1


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("preset", train.PRESETS)
def test_presets_build_with_the_shapes_of_table_5(preset, capsys):
    s = train.dataclasses.asdict(train.Settings(**train.PRESETS[preset]))
    with torch.device("meta"):
        decoder = sample.build_autodecoder(s, s["n_objects"])
        denoiser = sample.build_denoiser(s)
        latent = decoder.decode_latent(torch.zeros(2, s["embed_dim"]))
        volume = decoder.decode_volume(latent)
        context = torch.zeros(2, 32, 1024) if s["text"] else None
        x = denoiser(latent, torch.ones(2), context)
    with capsys.disabled():
        print(f"\n{preset}: autodecoder {count(decoder) / 1e6:.1f} M parameters, "
              f"denoiser {count(denoiser) / 1e6:.1f} M")
    assert x.shape == latent.shape and volume.shape[2:] == (s["volume_side"],) * 3
    assert volume.shape[-1] == 8 * latent.shape[-1] or preset in ("paper-tables", "micro")
    if preset.startswith("paper"):
        assert latent.shape[1:] == (256, 8, 8, 8) and s["embed_dim"] == 1024
        side = {"paper-tables": 128}.get(preset, 64)
        channels = 14 if preset == "paper-celebv" else 4
        assert volume.shape == (2, channels, side, side, side)


def test_the_preset_follows_from_the_data_and_the_flags_from_the_preset(tmp_path):
    iio.imwrite(tmp_path / "a.gif", np.zeros((3, 8, 8, 3), np.uint8))
    for arguments, preset in [([], "tiny"), (["--cameras", "learned"], "tiny-video"),
                              (["--data", "puppets"], "tiny-video"),
                              (["--data", str(tmp_path)], "tiny-clips"),
                              (["--data", str(tmp_path), "--preset", "tiny-video"], "tiny-video")]:
        args, settings = train.parse([*arguments, "--seed", "7"])
        expected = train.Settings(**train.PRESETS[preset] | {"seed": 7})
        assert args.preset == preset and settings == expected
        assert args.out == Path(f"runs/{preset}-{Path(args.data).resolve().name}")


def call(*arguments):
    """Runs train.py as a person would -> (exit status, stderr)."""
    done = subprocess.run([sys.executable, ROOT / "train.py", *map(str, arguments)],
                          capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stderr


@pytest.mark.parametrize("script, flag", [("train", "--clip-filter"), ("sample", "--evaluate"),
                                          ("data", "--holdout")])
def test_help_lists_the_flags(script, flag):
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", "--help"], capture_output=True,
                          text=True)
    assert done.returncode == 0 and flag in done.stdout and not done.stderr


def commands_of_the_readme():
    """(script, arguments) of every command in its blocks, loops and lists of objects filled in."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        line = re.sub(r"\$\(.*?\)|\$\w+", "7", line)
        if found := re.match(r"\s*python (train|sample)\.py(.*)", line):
            yield found[1], shlex.split(found[2], comments=True)


def test_every_command_of_the_readme_has_flags_that_fit_together():
    commands = list(commands_of_the_readme())
    assert len(commands) > 20
    for script, arguments in commands:
        (train if script == "train" else sample).parse(arguments)
    side = "--preset micro --start-side 2 --channels 64 --unet-attention 8,4,2,1 --latent-side"
    for latent_side in "248":                            # row 3 of the claims
        train.parse([*side.split(), latent_side])


@pytest.mark.parametrize("arguments, says", [
    ("--latent-side 0", "--latent-side"), ("--volume-side 2", "volume_side 2"),
    ("--holdout 1", "--holdout 1"), ("--seed -1", "--seed"), ("--codebooks -4", "--codebooks"),
    ("--churn -5", "--churn"), ("--guidance nan", "--guidance"), ("--betas 0.5", "--betas"),
    ("--betas 0.5,1.5", "--betas"), ("--dropout 1", "--dropout"), ("--growth 0.1", "--growth"),
    ("--body 0.3,0.8", "--body"), ("--unet-channels 33", "do not fit"),
    ("--unet-multipliers 0.5,1", "whole numbers"), ("--unet-multipliers 0", "whole numbers"),
    ("--text --context-dim 66", "do not fit"), ("--pose-width 0", "--pose-width"),
    ("--channels 400 --decoder-attention 8", "200 channels"),
    ("--decoder-attention 4", "sides 8, 16"), ("--finer-at 0.1,0.2,0.3", "4 pixels"),
    ("--window 3", "4 pixels")])
def test_settings_that_cannot_work_are_refused_before_anything_is_read(arguments, says):
    with pytest.raises(data.BadInput, match=says):
        train.parse([*SMALL, *arguments.split()])


@pytest.mark.parametrize("arguments, says", [
    (["--data", "puppets", "--detail", "0.3"], "pairs of shares"),
    (["--out", ROOT / "README.md"], "README.md"),
    (["--stpes", "3"], "--steps"),
    (["--preset", "huge"], "huge"),
    (["--data", "nowhere"], "nowhere"),
    (["--stage", "2"], "stage1.pt"),
    (["--steps", "0"], "--steps-stage1"),
    (["--lr-stage1", "nan"], "--lr-stage1"),
    (["--latent-side", "5"], "latent_side 5"),
    (["--unet-multipliers", "1,1,1,1"], "halved 3 times"),
    (["--perceptual", "vgg.pth"], "vgg19-dcbb9e9d.pth"),
    (["--data", "puppets", "--cameras", "known"], "--cameras known"),
    (["--data", "puppets"], "--size 16"),
    (["--data", "puppets", "--size", "32", "--keypoints", "9"], "keypoints 9"),
    (["--device", "cuda:77"], "--device cpu"),
])
def test_bad_input_is_one_line_and_status_2_and_leaves_nothing(arguments, says, tmp_path):
    status, stderr = call(*SMALL, "--steps", 1, "--out", tmp_path / "run", *arguments)
    assert status == 2 and says in stderr and len(stderr.strip().splitlines()) == 1, stderr
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.tmp"))


def test_resuming_with_other_settings_names_the_flag(tmp_path):
    run("--stage", "1", "--steps", "4", out=tmp_path)
    with pytest.raises(data.BadInput, match="--lr-stage1 is 0.1 here but"):
        run("--stage", "1", "--steps", "4", "--lr-stage1", "0.1", out=tmp_path, resume=True)
    with pytest.raises(data.BadInput, match="--seed is 5 here but 0"):        # other objects
        run("--stage", "1", "--steps", "8", "--seed", "5", out=tmp_path, resume=True)
    with pytest.raises(data.BadInput, match="do not fit"):                    # of this stage 1
        run("--stage", "2", "--latent-side", "16", "--unet-multipliers", "1,1,1,1", out=tmp_path)


def test_training_anew_keeps_the_earlier_checkpoint(tmp_path):
    run("--stage", "1", "--steps", "4", out=tmp_path)
    before = weights(tmp_path, 1)["linear.weight"]
    run("--stage", "1", "--steps", "4", "--seed", "5", out=tmp_path)
    old = torch.load(tmp_path / "stage1.old", weights_only=True)["model"]["linear.weight"]
    assert torch.equal(old, before)


def test_stage_2_of_another_stage_1_is_refused(tmp_path):
    for stage, seed in (("1", "0"), ("2", "0"), ("1", "5")):
        run("--stage", stage, "--steps", "4", "--seed", seed, out=tmp_path)
    with pytest.raises(data.BadInput, match="another stage 1"):
        sample.load_run(tmp_path)


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        real = train.autodecoder.foreground_loss
        calls = iter(range(100))
        patch.setattr(train.autodecoder, "foreground_loss",
                      lambda o, m: real(o, m) * (float("nan") if next(calls) == 5 else 1))
        with pytest.raises(data.BadInput, match="nan at step 6"):
            run("--stage", "1", "--steps", "8", out=tmp_path)
    kept = sample.load_checkpoint(tmp_path, 1)
    assert kept["step"] == 4 and all(torch.isfinite(v).all() for v in kept["model"].values())


def test_weights_that_are_not_finite_never_replace_good_ones(tmp_path, monkeypatch):
    step, calls = torch.optim.Adam.step, iter(range(100))

    def spoiled(self, *args):
        step(self, *args)
        if next(calls) == 7:                             # the loss was finite, the gradient not
            self.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.Adam, "step", spoiled)
    for stage in ("1", "2"):
        with pytest.raises(data.BadInput, match="not finite at step 8"):
            run("--stage", stage, "--steps", "8", out=tmp_path)
        assert sample.load_checkpoint(tmp_path, int(stage))["step"] == 4
        calls = iter(range(100))


def test_one_object_has_no_distribution_to_learn(tmp_path):
    run("--stage", "1", "--n-objects", "1", "--steps", "2", out=tmp_path)
    with pytest.raises(data.BadInput, match="one object has none"):
        run("--stage", "2", "--steps", "2", out=tmp_path)


# ---- Moving subjects ----------------------------------------------------------------------------

PUPPETS = ["--data", "puppets", "--n-objects", "2", "--n-views", "12", "--size", "32", "--parts",
           "2", "--keypoints", "8", "--views-per-step", "2", "--objects-per-step", "2"]


def test_learned_poses_lower_the_loss_and_every_number_stays_finite(tmp_path, capsys):
    run(*PUPPETS, "--stage", "1", "--steps", "60", "--log-every", "10", "--growth", "0.03,0.15",
        "--split-at", "0.35", "--perceptual-weight", "1", "--foreground-weight", "1", out=tmp_path)
    rows = list(csv.DictReader(open(tmp_path / "log.csv")))
    losses = [float(r["loss"]) for r in rows]
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]
    trained = sample.load_run(tmp_path, stages=(1,))
    assert int(trained.posenet.active) == 2                        # one part became two
    assert float(trained.autodecoder.growth) == 1.0
    assert all(v.isfinite().all() for module in (trained.autodecoder, trained.posenet)
               for v in module.state_dict().values())
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["psnr_mean_frame"] > 10 and 0.2 < metrics["part_purity"] <= 1
    assert -1 <= metrics["yaw_correlation"] <= 1 and len(metrics["limb_correlation"]) == 4


def test_learned_poses_resume_to_the_same_bits(tmp_path, monkeypatch):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(*PUPPETS, "--stage", "1", "--steps", "8", out=whole)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            run(*PUPPETS, "--stage", "1", "--steps", "8", out=halves)
    run(*PUPPETS, "--stage", "1", "--steps", "8", out=halves, resume=True)
    for key in ("model", "posenet"):
        a, b = weights(whole, 1, key), weights(halves, 1, key)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_poses_that_are_not_finite_stop_training_with_a_line(tmp_path, monkeypatch):
    with pytest.raises(data.BadInput, match="stage 1: (poses are not finite|the loss is nan)"):
        run(*PUPPETS, "--stage", "1", "--steps", "8", "--lr-pose", "1e30", out=tmp_path)
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: step(self) or self.param_groups[1][
        "params"][0].data.fill_(float("nan")))
    with pytest.raises(data.BadInput, match="not finite at step 1"):         # it saves there
        run(*PUPPETS, "--stage", "1", "--steps", "8", "--save-every", "1", out=tmp_path)
    assert not (tmp_path / "stage1.pt").exists()


def test_the_mean_of_2d_points_is_fixed_once_it_has_settled(tmp_path):
    for settle_at, batches in (("0.5", 5), ("1.0", 8)):
        run(*PUPPETS, "--stage", "1", "--steps", "8", "--settle-at", settle_at, out=tmp_path)
        assert weights(tmp_path, 1, "posenet")["batches"] == batches      # that went into the mean


def test_checkpoints_from_before_a_flag_existed_had_its_default(tmp_path):
    run(*PUPPETS, "--stage", "1", "--steps", "2", out=tmp_path)
    checkpoint = sample.load_checkpoint(tmp_path, 1)
    del checkpoint["settings"]["settle_at"]
    train.save(tmp_path / "stage1.pt", checkpoint)
    run(*PUPPETS, "--stage", "1", "--steps", "4", out=tmp_path, resume=True)
    assert sample.load_checkpoint(tmp_path, 1)["step"] == 4


def test_cameras_of_rigid_objects_can_be_learned_too(tmp_path):
    run("--cameras", "learned", "--arc", "60", "--size", "32", "--keypoints", "8", "--stage", "1",
        "--steps", "4", out=tmp_path)
    checkpoint = sample.load_checkpoint(tmp_path, 1)
    assert checkpoint["settings"]["parts"] == 1 and checkpoint["poses"].shape[1:] == (1, 4, 4)
    assert checkpoint["settings"]["focal"] == pytest.approx(4.35)


def test_a_new_puppet_is_driven_by_a_clip(tmp_path, capsys):
    for stage in ("1", "2"):                             # by themselves: no first sampling
        run(*PUPPETS, "--stage", stage, "--steps", "4", out=tmp_path / "run")
    capsys.readouterr()
    for who in (["--n", "1", "--steps", "2"], ["--identity", "1"]):
        sample.main(["--run", str(tmp_path / "run"), "--drive", "0001", *who])
        named = capsys.readouterr().out.splitlines()[-1].removeprefix("wrote ").split(", ")
        assert {"motion.png", "views.png", "motion.gif"} <= {Path(p).name for p in named}
        assert all(Path(p).stat().st_size > 100 for p in named)
    for flags, says in ((["--drive", "0007"], "0007"), (["--identity", "5"], "0 to 1")):
        with pytest.raises(data.BadInput, match=says):
            sample.main(["--run", str(tmp_path / "run"), *flags])


def true_poses(run, dataset, frames):
    """What a perfect pose network would say of puppets: (n, 6, 4, 4)."""
    M = torch.eye(4).repeat(len(frames), 6, 1, 1)
    M[:, :, :3] = dataset.truth["poses"][frames]
    return torch.linalg.inv(M) @ dataset.cam2world[frames, None]


def blobs(k):
    """Puppet k of seed 0 as six opaque balls, each claimed by its part: (1, 10, 32, 32, 32)."""
    parts, _, _ = data.make_puppet(np.random.default_rng([0, 1000 + int(k)]))
    centres = torch.stack([torch.stack([p.centre for p in part]).mean(0) for part in parts])
    at = (torch.arange(32) + 0.5) / 16 - 1
    xyz = torch.stack(torch.meshgrid(at, at, at, indexing="ij")[::-1], -1)        # z, y, x -> xyz
    apart = (xyz - centres[:, None, None, None]).norm(dim=-1)                     # (6, D, H, W)
    solid = 50.0 * (apart.amin(0, keepdim=True) < 0.15)
    return torch.cat([solid, solid.expand(3, -1, -1, -1) * 0, -100 * apart])[None]


def test_perfect_poses_get_perfect_scores(tmp_path, monkeypatch):
    run(*PUPPETS, "--stage", "1", "--steps", "2", out=tmp_path)
    trained = sample.load_run(tmp_path, stages=(1,))
    puppets = data.load("puppets", 32, 6, 0, 2, 48)
    monkeypatch.setattr(sample, "cameras_of", true_poses)
    monkeypatch.setattr(trained.autodecoder, "forward", blobs)
    scores = sample.score_motion(trained, puppets)
    assert scores["yaw_correlation"] > 0.97 and scores["yaw_share"] == 1
    assert scores["yaw_slope"] == pytest.approx(1, abs=0.1)         # the arms turn by themselves
    assert scores["part_purity"] > 0.9 and min(scores["limb_correlation"]) > 0.9


def test_learned_cameras_are_scored_up_to_one_rotation_and_one_scale_of_azimuth(monkeypatch):
    dataset = data.load("synthetic", 16, 6, 0, 3, 24, arc=60)
    tilt = render.orbit(torch.tensor(0.3), torch.tensor(0.2), 1.0)[:3, :3]
    a = torch.atan2(dataset.cam2world[:, 0, 2], dataset.cam2world[:, 2, 2])

    def seen(noise, mirrored=()):
        turn = torch.where(torch.isin(dataset.object_index, torch.tensor(mirrored)), -a, a)
        cameras = render.orbit(turn / 2, torch.full_like(a, 0.2618), 12.0)           # 15 degrees
        wrong = render.orbit(noise * torch.arange(len(a)).cos(), 0 * a, 1.0)
        cameras[:, :3, :3] = tilt @ wrong[:, :3, :3] @ cameras[:, :3, :3]
        monkeypatch.setattr(sample, "cameras_of", lambda *_: cameras[:, None])
        return sample.score_cameras(None, dataset)

    assert seen(0.0)["rotation_error"] < 1 and seen(0.0)["azimuth_scale"] == pytest.approx(2, 0.02)
    assert 3 < seen(0.1)["rotation_error"] < 12
    one = seen(0.0, mirrored=[1])
    assert one["mirrored"] == pytest.approx(1 / 3) and one["azimuth_scale"] == pytest.approx(2, 0.1)


def test_stage_2_on_the_stage_1_of_another_run_and_on_whole_volumes(tmp_path):
    run("--stage", "1", "--steps", "2", out=tmp_path / "a")
    run("--stage", "2", "--steps", "2", "--decoder", str(tmp_path / "a"), "--space", "volume",
        out=tmp_path / "b")
    trained = sample.load_run(tmp_path / "b")
    noise = sample.latent_noise(trained, 2, 0)
    volumes = sample.decode(trained, sample.sample_latents(trained, noise, 2))
    assert volumes.shape == (2, 4, 16, 16, 16)
    assert not (tmp_path / "a" / "stage2.pt").exists()
    run("--stage", "1", "--steps", "3", out=tmp_path / "e")              # has its own stage 1
    ours = sample.load_checkpoint(tmp_path / "e", 1)["fingerprint"]
    with pytest.raises(data.BadInput, match="--resume"):
        run("--stage", "2", "--decoder", str(tmp_path / "a"), out=tmp_path / "e", resume=True)
    assert sample.load_checkpoint(tmp_path / "e", 1)["fingerprint"] == ours
    for resume in (False, True):
        run("--stage", "2", "--steps", "2", "--decoder", str(tmp_path / "a"),
            out=tmp_path / "e", resume=resume)
        assert torch.load(tmp_path / "e" / "stage1.old", weights_only=True)["fingerprint"] == ours
    assert "psnr_heldout" not in json.loads((tmp_path / "e" / "metrics.json").read_text())
    status, stderr = call("--decoder", tmp_path / "a", "--out", tmp_path / "c")
    assert status == 2 and "--stage 2" in stderr and not (tmp_path / "c").exists()
    sample.main(["--run", str(tmp_path / "b"), "--evaluate", "--n", "25", "--views", "10",
                 "--steps", "2", "--voxel", str(tmp_path / "b")])
    sample.main(["--run", str(tmp_path / "b"), "--evaluate", "--n", "25", "--steps", "1", "--out",
                 str(tmp_path / "d")])
    metrics = json.loads((tmp_path / "d" / "metrics.json").read_text())
    assert metrics["settings"]["sample_steps"] == 1 and np.isfinite(metrics["fd"])
    metrics = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert metrics["settings"]["sample_steps"] == 2
    for kind in ("", "_voxel", "_direct", "_direct_normal", "_train"):
        assert all(np.isfinite(metrics[name + kind]) for name in ("fd", "kd", "memorization"))
        assert 0 <= metrics["empty" + kind] <= 1
    assert metrics["samples"] == 25 and metrics["views"] == 10
    assert metrics["memorization_train"] > 0          # a training object is not its own nearest one
    # Scores of an earlier evaluation do not stay beside those of this one.
    sample.main(["--run", str(tmp_path / "b"), "--evaluate", "--n", "25", "--steps", "1",
                 "--no-baselines"])
    metrics = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert "fd" in metrics and not {"fd_direct", "fd_voxel", "cov_train"} & set(metrics)


def test_stage_2_of_another_seed_is_compared_with_the_objects_it_learned_from(tmp_path,
                                                                              monkeypatch):
    run("--stage", "1", "--steps", "2", "--seed", "3", out=tmp_path)
    run("--stage", "2", "--steps", "2", "--seed", "4", out=tmp_path)
    trained = sample.load_run(tmp_path)
    assert trained.settings["seed"] == 4
    seen = []
    monkeypatch.setattr(sample, "evaluate", lambda run, dataset, *_, **__: seen.append(dataset) or
                        {})
    sample.main(["--run", str(tmp_path), "--evaluate", "--n", "25", "--steps", "1"])
    assert seen[0].captions == trained.captions
    assert torch.equal(seen[0].images, data.load("synthetic", 16, 6, 3, 4, 6).images)


def test_shaken_cameras_turn_about_the_object_by_the_angle_asked_for_and_heldout_ones_stay():
    dataset = data.load("synthetic", 16, 6, 0, 20, 24)
    shaken, was = train.shake_cameras(dataset, 5.0, 0).cam2world, dataset.cam2world
    kept = dataset.heldout
    assert torch.equal(shaken[kept], was[kept])
    torch.testing.assert_close(shaken[:, :3, 3].norm(dim=1), was[:, :3, 3].norm(dim=1))
    turn = shaken[~kept, :3, :3] @ was[~kept, :3, :3].mT                  # R, and X = R X
    torch.testing.assert_close(turn @ was[~kept, :3, 3:], shaken[~kept, :3, 3:], rtol=0, atol=1e-5)
    torch.testing.assert_close(turn @ turn.mT, torch.eye(3).expand_as(turn), rtol=0, atol=1e-5)
    cosine = (turn.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2
    angle = torch.rad2deg(cosine.clamp(-1, 1).acos())
    assert angle.square().mean().sqrt() == pytest.approx(5, rel=0.1)      # 400 cameras: +-0.18


def test_as_many_numbers_become_extreme_as_asked_for_and_robust_normalization_does_not_see_them():
    latents = torch.randn(50, 8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    extreme = train.make_extreme(latents, 10)
    changed = extreme != latents
    assert changed.sum() == 10 and (extreme[changed].abs() == 1e4).all()
    spread = {mode: sample.build_normalizer({"normalization": mode, "per_channel": False,
                                             "latent_scale": 1.0}).fit(extreme).s
              for mode in ("robust", "meanstd")}
    assert float(spread["robust"]) == pytest.approx(1, abs=0.02) and float(spread["meanstd"]) > 100


def test_words_from_captions_to_a_prompt(tmp_path, capsys, monkeypatch):
    run("--steps", "2", "--stage", "1", out=tmp_path)
    run("--steps", "3", "--stage", "2", "--text", "--context-dim", "16", out=tmp_path)
    trained = sample.load_run(tmp_path)
    assert {"chair", "table", "with"} <= set(sample.load_checkpoint(tmp_path, 2)["vocabulary"])
    noise = sample.latent_noise(trained, 1, 0)
    red, blue, none, null = (
        sample.sample_latents(trained, noise, 2, prompts=prompts, guidance=1) for prompts in
        (["a red chair"], ["a blue table"], None, [""]))
    assert not torch.equal(red, blue) and torch.equal(none, null)
    sample.main(["--run", str(tmp_path), "--prompt", "a crimson chair", "--n", "1", "--steps", "1"])
    assert "crimson" in capsys.readouterr().err
    with monkeypatch.context() as patch:                 # an interpolation is of the prompt, too
        shown, decode = [], sample.decode
        patch.setattr(sample, "decode", lambda run, z: shown.append(z) or decode(run, z))
        sample.save_interpolation(trained, tmp_path, (3, 5), 1, "a red chair", 1.0)
        ends = torch.cat([sample.latent_noise(trained, 1, seed) for seed in (3, 5)])
        expected = sample.sample_latents(trained, ends, 1, prompts=["a red chair"] * 2, guidance=1)
        torch.testing.assert_close(shown[0][[0, -1]], expected, rtol=1e-4, atol=1e-4)
    torch.save(sample.AttributeReader().state_dict(), tmp_path / "reader.pt")    # knows nothing
    sample.main(["--run", str(tmp_path), "--evaluate", "--n", "25", "--steps", "1",
                 "--no-baselines"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("colour", "parts"):
        assert all(0 <= metrics[f"text_{name}{key}"] <= 1 for key in ("", "_true", "_chance"))
    assert metrics["text_diversity"] >= 0
    # The null prompt at any weight: given and free answer alike.
    torch.testing.assert_close(null, sample.sample_latents(trained, noise, 2, prompts=[""],
                                                           guidance=7.0), rtol=1e-4, atol=1e-4)


def test_t5_runs_once_and_its_tokens_are_kept_beside_the_run(t5_folder, tmp_path, monkeypatch):
    run("--steps", "2", "--stage", "1", out=tmp_path)
    text = ("--stage", "2", "--text", "--t5", str(t5_folder))
    run("--steps", "2", *text, out=tmp_path)
    kept = sample.load_weights("--t5", tmp_path / "text.pt", "")
    captions = sample.load_checkpoint(tmp_path, 1)["captions"]
    assert kept["prompts"] == sorted({"", *captions})
    encode = train.diffusion.T5Encoder(t5_folder)
    for i, prompt in enumerate(kept["prompts"]):
        torch.testing.assert_close(kept["tokens"][i], encode([prompt])[0][0])
    trained, noise = sample.load_run(tmp_path), sample.latent_noise(sample.load_run(tmp_path), 1, 0)
    red, blue = (sample.sample_latents(trained, noise, 2, prompts=[prompt], guidance=3)
                 for prompt in ("a red chair", "a blue table"))
    assert not torch.equal(red, blue)
    monkeypatch.setattr(train.diffusion, "T5Encoder", None)           # not called a second time
    run("--steps", "4", *text, "--resume", out=tmp_path)
    (tmp_path / "text.pt").write_bytes(b"damaged")
    with pytest.raises(data.BadInput, match="text.pt: not a file of weights"):
        run("--steps", "4", *text, out=tmp_path)
