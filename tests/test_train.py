"""Training: resuming is exact, one object overfits, and a stranger's mistakes get one line."""
import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
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


def test_one_object_overfits_to_over_30_db(tmp_path):
    run("--stage", "1", "--n-objects", "1", "--n-views", "12", "--size", "32", "--volume-side",
        "32", "--objects-per-step", "1", "--n-samples", "48", "--steps", "300", "--lr-stage1",
        "0.005", "--log-every", "50", "--save-every", "300", "--holdout", "0", out=tmp_path)
    model = sample.load_run(tmp_path, stages=(1,)).autodecoder
    dataset = data.load("synthetic", 32, 0, n_objects=1, n_views=12)
    dataset.heldout[:] = True                            # score the views that it was trained on
    assert train.score_heldout(model, dataset, "cpu") > 30


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
    assert train.score_heldout(black, dataset, "cpu") == pytest.approx(float(expected), abs=1e-4)


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
        context = torch.zeros(2, 32, 1024) if s["context_dim"] else None
        x = denoiser(latent, torch.ones(2), context)
    with capsys.disabled():
        print(f"\n{preset}: autodecoder {count(decoder) / 1e6:.1f} M parameters, "
              f"denoiser {count(denoiser) / 1e6:.1f} M")
    assert x.shape == latent.shape and volume.shape[2:] == (s["volume_side"],) * 3
    assert volume.shape[-1] == 8 * latent.shape[-1] or preset == "paper-tables"
    if preset.startswith("paper"):
        assert latent.shape[1:] == (256, 8, 8, 8) and s["embed_dim"] == 1024
        side = {"paper-tables": 128}.get(preset, 64)
        assert volume.shape == (2, 4, side, side, side)


def call(*arguments):
    """Runs train.py as a person would -> (exit status, stderr)."""
    done = subprocess.run([sys.executable, ROOT / "train.py", *map(str, arguments)],
                          capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments, says", [
    (["--stpes", "3"], "--steps"),
    (["--preset", "huge"], "huge"),
    (["--data", "nowhere"], "nowhere"),
    (["--stage", "2"], "stage1.pt"),
    (["--steps", "0"], "--steps-stage1"),
    (["--lr-stage1", "nan"], "--lr-stage1"),
    (["--latent-side", "5"], "latent_side 5"),
    (["--unet-multipliers", "1,1,1,1"], "halved 3 times"),
    (["--perceptual", "vgg.pth"], "vgg19-dcbb9e9d.pth"),
    (["--preset", "paper-celebv"], "not built yet"),
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


def test_training_anew_keeps_the_earlier_checkpoint(tmp_path):
    run("--stage", "1", "--steps", "4", out=tmp_path)
    before = weights(tmp_path, 1)["linear.weight"]
    run("--stage", "1", "--steps", "4", "--seed", "5", out=tmp_path)
    old = torch.load(tmp_path / "stage1.old", weights_only=True)["model"]["linear.weight"]
    assert torch.equal(old, before)


def test_stage_2_of_another_stage_1_is_refused(tmp_path):
    run("--steps", "4", out=tmp_path)
    run("--stage", "1", "--steps", "4", "--seed", "5", out=tmp_path)
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


def test_one_object_has_no_distribution_to_learn(tmp_path):
    run("--stage", "1", "--n-objects", "1", "--steps", "2", out=tmp_path)
    with pytest.raises(data.BadInput, match="one object has none"):
        run("--stage", "2", "--steps", "2", out=tmp_path)
