"""claims.py: its table fits train.py and evaluate.py; runs are kept, shared and told apart.

Two steps of training a stage, 8^3 volumes, four objects: nothing is learned, all is gone through.
"""
import json
import math
from types import SimpleNamespace

import pytest
import torch

import claims
import data
import evaluate
import sample
import train
from claims import Claim, Trial
from normalize import RobustNormalizer

TRIALS = [trial for claim in claims.CLAIMS for trial in claim.trials]
TABLE_OPTIONS = SimpleNamespace(out="runs/claims", vgg19=None)


def name_of(trial):
    return trial.name


# ---- The table -----------------------------------------------------------------------------------
def test_there_are_fifteen_claims_in_order():
    assert [claim.number for claim in claims.CLAIMS] == list(range(1, 16))


@pytest.mark.parametrize("trial", TRIALS, ids=name_of)
def test_flags_of_every_trial_are_understood(trial):
    for one in (trial, trial.decoder, trial.of):
        if one is not None:
            args, settings = train.parse(claims.training_flags(one, 0, TABLE_OPTIONS))
            assert settings.seed == 0 and args.out.name == f"{one.name}-0"
    args = evaluate.parse(claims.sampling_flags(trial, ("fd_direct", "cov")))
    assert not args.no_baselines and not args.no_shapes
    assert not trial.sampling or trial.of, "samples of another kind lie in a folder of their own"


def test_one_name_is_one_kind_of_run():
    kinds = {}
    for trial in TRIALS:
        for one in (trial, trial.decoder, trial.of):
            if one is not None:
                assert kinds.setdefault(one.name, one) == one


def test_preset_and_flags_of_a_trial_win_over_the_micro_preset():
    trial = Trial("x", "--preset tiny --decoder-depth 2")
    _, settings = train.parse(claims.training_flags(trial, 2, TABLE_OPTIONS))
    assert settings.volume_side == 32 and settings.decoder_depth == 2 and settings.seed == 2


@pytest.mark.parametrize("scores, is_sampled, baselines, shapes", [
    (("psnr_heldout", "seconds_stage1"), False, False, False), (("fd",), True, False, False),
    (("fd", "fd_direct"), True, True, False), (("mmd",), True, False, True),
    (("cov_direct",), True, True, True), (("text_parts",), True, False, False)])
def test_only_what_the_scores_need_is_done(scores, is_sampled, baselines, shapes):
    assert claims.needs_stage2(scores) == is_sampled
    args = evaluate.parse(claims.sampling_flags(claims.REFERENCE, scores))
    assert args.no_baselines != baselines and args.no_shapes != shapes


# ---- What only a claim needs ---------------------------------------------------------------------
def test_as_many_numbers_become_extreme_as_asked_for_and_robust_normalization_does_not_see_them():
    latents = torch.randn(50, 8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    extreme = claims.make_extreme(latents, 10)
    changed = extreme != latents
    assert changed.sum() == 10 and (extreme[changed].abs() == 1e4).all()
    assert -1e4 in extreme and 1e4 in extreme
    robust = RobustNormalizer("robust").fit(extreme)
    meanstd = RobustNormalizer("meanstd").fit(extreme)
    assert float(robust.s) == pytest.approx(1, abs=0.02) and float(meanstd.s) > 100


def test_shaken_cameras_turn_about_the_object_by_the_angle_asked_for_and_heldout_ones_stay():
    dataset = data.load("synthetic", 16, 6, 0, 20, 24)
    shaken = claims.shake_cameras(dataset, 5.0, 0).cam2world
    true = dataset.cam2world
    assert torch.equal(shaken[dataset.heldout], true[dataset.heldout])
    shaken, true = shaken[~dataset.heldout], true[~dataset.heldout]
    turn = shaken[:, :3, :3] @ true[:, :3, :3].mT                             # R, and X = R X
    torch.testing.assert_close(turn @ true[:, :3, 3:], shaken[:, :3, 3:], rtol=0, atol=1e-5)
    eye = torch.eye(3).expand_as(turn)
    torch.testing.assert_close(turn @ turn.mT, eye, rtol=0, atol=1e-5)
    cosine = (turn.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2
    angle = torch.rad2deg(cosine.clamp(-1, 1).acos())
    assert angle.square().mean().sqrt() == pytest.approx(5, rel=0.1)      # 400 cameras: +-0.18


# ---- Runs ----------------------------------------------------------------------------------------
SMALL = ("--n-objects 4 --n-views 6 --size 16 --volume-side 8 --latent-side 4 --embed-dim 16 "
         "--channels 16 --n-samples 8 --finer-at= --steps-stage1 2 --unet-channels 16 "
         "--unet-attention 4 --batch-size 4 --steps-stage2 2 --sample-steps 2")
SMALL_REFERENCE = Trial("reference", SMALL, seeds=(0, 1))


@pytest.fixture(autouse=True)
def few_samples_and_no_pictures(monkeypatch):
    """As few pictures as the covariance allows; and drawing takes longer than two steps."""
    monkeypatch.setattr(claims, "SAMPLES", 3)
    monkeypatch.setattr(claims, "SIDES_SEEN", 81)
    for name in ("save_training_sheet", "save_orbit", "save_latent_histogram"):
        monkeypatch.setattr(sample, name, lambda *arguments: None)
    monkeypatch.setattr(train, "plot_log", lambda *arguments: None)


def try_claim(folder, scores, *trials):
    """Runs one claim of these trials with its runs in a folder."""
    table = (Claim(7, "small is enough", scores, trials),)
    claims.main(["7", "--out", str(folder), "--device", "cpu"], table)


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_a_row_is_trained_for_every_seed_printed_and_then_kept(tmp_path, capsys):
    scores = ("psnr_heldout", "seconds_stage1")
    try_claim(tmp_path, scores, SMALL_REFERENCE, Trial("one-view", f"{SMALL} --views-per-step 1"))
    first = metrics_of(tmp_path / "reference-0")["psnr_heldout"]
    second = metrics_of(tmp_path / "reference-1")["psnr_heldout"]
    assert first != second
    assert not (tmp_path / "reference-0" / "stage2.pt").exists()              # is not needed
    assert metrics_of(tmp_path / "one-view-2")["settings"]["views_per_step"] == 1
    printed = capsys.readouterr().out
    assert "7. small is enough: medians (least to greatest)" in printed
    row = [line.split() for line in printed.splitlines() if line.startswith("reference")][0]
    assert float(row[1]) == pytest.approx((first + second) / 2, rel=1e-3)
    assert row[2] == f"({min(first, second):.4g}" and row[4] == f"{max(first, second):.4g})"

    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
    try_claim(tmp_path, scores, SMALL_REFERENCE)
    assert capsys.readouterr().out.count("is finished") == 2
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}


def test_a_run_of_other_settings_or_of_another_trial_is_trained_anew(tmp_path, capsys):
    scores = ("psnr_heldout",)
    try_claim(tmp_path, scores, Trial("run", SMALL, seeds=(0,)))
    try_claim(tmp_path, scores, Trial("run", f"{SMALL} --lr-stage1 0.001", seeds=(0,)))
    assert metrics_of(tmp_path / "run-0")["settings"]["lr_stage1"] == 0.001
    try_claim(tmp_path, scores, Trial("run", SMALL, seeds=(0,), degrees=5.0))
    assert metrics_of(tmp_path / "run-0")["degrees"] == 5.0
    assert "is finished" not in capsys.readouterr().out


def test_a_row_that_wants_samples_goes_on_with_the_stage_1_of_one_that_did_not(tmp_path):
    trial = Trial("reference", SMALL, seeds=(0,))
    try_claim(tmp_path, ("psnr_heldout",), trial)
    written = (tmp_path / "reference-0" / "stage1.pt").stat().st_mtime_ns
    try_claim(tmp_path, ("psnr_heldout", "fd"), trial)
    assert (tmp_path / "reference-0" / "stage1.pt").stat().st_mtime_ns == written
    metrics = metrics_of(tmp_path / "reference-0")
    assert metrics["samples"] == 3 and metrics["views"] == 81
    assert math.isfinite(metrics["fd"]) and not {"fd_direct", "empty"} & set(metrics)


@pytest.mark.slow
def test_special_latents_and_other_samples_share_one_stage_1(tmp_path, capsys):
    reference = Trial("reference", SMALL, seeds=(0,))
    try_claim(
        tmp_path, ("fd", "seconds_per_sample"),
        Trial("steps-1", of=reference, sampling="--steps 1", seeds=(0,)),
        Trial("extreme", SMALL, decoder=reference, extreme=10, seeds=(0,)),
        Trial("volumes", f"{SMALL} --per-channel --unet-attention 4", decoder=reference,
              whole_volumes=True, seeds=(0,)))
    assert metrics_of(tmp_path / "steps-1-0")["settings"]["sample_steps"] == 1
    assert not (tmp_path / "steps-1-0" / "stage2.pt").exists()
    decoders = {sample.load_checkpoint(tmp_path / name, 1)["fingerprint"]
                for name in ("reference-0", "extreme-0", "volumes-0")}
    assert len(decoders) == 1
    assert metrics_of(tmp_path / "extreme-0")["extreme"] == 10
    volumes = metrics_of(tmp_path / "volumes-0")
    assert volumes["whole_volumes"] is True and math.isfinite(volumes["fd"])

    capsys.readouterr()
    plain = Trial("extreme", SMALL, decoder=reference, seeds=(0,))            # not extreme
    steps = Trial("steps-1", of=reference, sampling="--steps 1", seeds=(0,))
    try_claim(tmp_path, ("fd",), steps, plain)
    assert capsys.readouterr().out.count("is finished") == 1
    assert metrics_of(tmp_path / "extreme-0")["extreme"] == 0


def test_whole_volumes_are_the_decoders_own_before_the_activations(tmp_path):
    try_claim(tmp_path, ("psnr_heldout",), Trial("run", SMALL, seeds=(0,)))
    plain = sample.open_run(tmp_path / "run-0", stages=(1,))
    whole = claims.open_whole_volumes(tmp_path / "run-0", "cpu", stages=(1,))
    raw = sample.training_latents(whole.autodecoder, len(whole.names))
    assert raw.shape == (4, 4, 8, 8, 8) and whole.autodecoder.latent_shape == (4, 8, 8, 8)
    expected = sample.decode(plain, sample.training_latents(plain.autodecoder, len(plain.names)))
    torch.testing.assert_close(sample.decode(whole, raw), expected)
    assert sample.latent_noise(whole, 2, 0).shape == (2, 4, 8, 8, 8)


def test_cameras_are_shaken_for_training_only(tmp_path, monkeypatch):
    given = {}
    run_stage1 = train.run_stage1

    def watched(settings, dataset, *arguments):
        given["cameras"] = dataset.cam2world
        run_stage1(settings, dataset, *arguments)

    monkeypatch.setattr(train, "run_stage1", watched)
    try_claim(tmp_path, ("psnr_heldout",), Trial("shaken", SMALL, seeds=(0,), degrees=5.0))
    true = data.load("synthetic", 16, 6, 0, 4, 6)
    moved = (given["cameras"] - true.cam2world).flatten(1).norm(dim=1) > 0
    assert torch.equal(moved, ~true.heldout)


def test_a_trial_whose_weights_are_not_there_says_so(tmp_path, capsys):
    trial = Trial("vgg19", f"{SMALL} --perceptual VGG19", seeds=(0,))
    try_claim(tmp_path, ("psnr_heldout", "mask_heldout"), trial)
    assert "needs a file (--vgg19)" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# ---- Command line --------------------------------------------------------------------------------
def test_the_list_has_every_claim_and_every_trial(capsys, tmp_path):
    claims.main(["--list", "--out", str(tmp_path / "runs")])
    printed = capsys.readouterr().out
    for claim in claims.CLAIMS:
        assert claim.text in printed
    for trial in TRIALS:
        assert f"      {trial.name}" in printed
    assert not (tmp_path / "runs").exists()
    claims.main(["--list", "7"])
    assert capsys.readouterr().out.splitlines()[0].startswith(" 7. four views")


def test_a_claim_that_is_not_there_is_refused():
    with pytest.raises(data.BadInput, match="no claim 16: --list"):
        claims.main(["7", "16"])
