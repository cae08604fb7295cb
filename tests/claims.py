"""Is the paper right? Fifteen of its claims, tried in small: rows of settings go in, numbers out.

    python tests/claims.py --list      what there is to try
    python tests/claims.py 7           trains what row 7 needs, with three seeds each, and prints it
    python tests/claims.py             all rows: the micro ones take minutes each, 5, 8, 9, 14 and
                                       15 hours

Runs lie in runs/claims/NAME-SEED. One that is finished, with all the numbers that a row wants and
these very settings, is kept and not trained again; so a stopped command goes on where it was.

Paper: Sec. 3 and 4, Tab. 2, Fig. 3, 6 and 9, App. B. What came out: docs/results.md.
A claim is a row of CLAIMS; a trial is one kind of run in it. What only a claim needs (latents made
extreme, cameras shaken, diffusion on whole volumes) is here, and reaches training as an argument.
Read next: evaluate.py, for what the numbers mean.
"""
import dataclasses
import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":               # Ctrl-C while torch is imported: an end, no traceback
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import data  # noqa: E402
import evaluate  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from autodecoder import VGG19_FILE, build_features, cayley  # noqa: E402
from data import BadInput  # noqa: E402

# ---- The table: one row a claim ------------------------------------------------------------------
@dataclass(frozen=True)
class Trial:
    """One kind of run, for each of its seeds; what is not named here is as in train.py's micro."""
    name: str                    # of the runs' folders, NAME-SEED
    flags: str = ""              # of train.py
    seeds: tuple = (0, 1, 2)
    decoder: "Trial" = None      # stage 1 is that of this trial
    of: "Trial" = None           # no run of its own: that trial's, sampled in another way
    sampling: str = ""           # flags of evaluate.py
    also: tuple = ()             # scores besides those of the row
    extreme: int = 0             # stage 2: so many of all latents' numbers are +-1e4
    whole_volumes: bool = False  # stage 2: diffuse what G2 makes, not F
    degrees: float = 0.0         # stage 1: training cameras are turned by so much (deviation)


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, the trials that it is judged by and the scores to look at."""
    number: int
    text: str
    scores: tuple
    trials: tuple


def every_third(first, last):
    """Names of built-in objects of one family: families take turns."""
    return ",".join(f"{k:04d}" for k in range(first, last + 1, 3))


REFERENCE = Trial("reference")
TINY = Trial("tiny", "--preset tiny")

# Row 3: volumes of 16^3 from a first one of 2^3, so that there are three places for the cut.
SIDES = "--start-side 2 --channels 64 --unet-attention 8,4,2,1 --latent-side"
SIDE_2 = Trial("side-2", f"{SIDES} 2")
SIDE_4 = Trial("side-4", f"{SIDES} 4")
SIDE_8 = Trial("side-8", f"{SIDES} 8 --steps-stage2 130")      # as long as side-4's 1,000 take

VEHICLES = f"--objects {every_third(2, 62)}"
ARC = (f"--preset tiny-video --arc 60 --n-objects 48 --objects {every_third(0, 45)} "
       "--finer-at 0.35,1.0")
TEXT = Trial("text", "--preset tiny --n-objects 512 --text --steps-stage1 5000 "
             "--steps-stage2 5000", seeds=(0,))

CLAIMS = (
    # Fig. 9: with mean and deviation, diffusion did not converge in the paper, whose latents had
    # extremes of 1e4 and more. Ours have none, so some are made.
    Claim(1, "robust normalization beats mean and deviation, and none",
          ("fd", "mmd"), (
              REFERENCE,
              Trial("meanstd", "--normalization meanstd", decoder=REFERENCE),
              Trial("unnormalized", "--normalization none", decoder=REFERENCE),
              Trial("extreme-robust", decoder=REFERENCE, extreme=10),
              Trial("extreme-meanstd", "--normalization meanstd", decoder=REFERENCE, extreme=10),
              Trial("extreme-unnormalized", "--normalization none", decoder=REFERENCE,
                    extreme=10))),
    # Sec. 3.3 and Fig. 9. AMBIGUOUS in the paper: see docs/results.md.
    Claim(2, "one median and range for all latents, at unit scale, with sigma_data 0.5",
          ("fd", "cov", "mmd"), (
              REFERENCE,
              Trial("per-channel", "--per-channel", decoder=REFERENCE),
              Trial("half-scale", "--latent-scale 0.5", decoder=REFERENCE),
              Trial("sigma-data-1", "--sigma-data 1", decoder=REFERENCE))),
    # Fig. 3: 8^3 of 64^3 wins; 4^3 overfits, 16^3 is slow and undertrained. The picture:
    # python tests/evaluate.py --compare runs/claims/side-*
    Claim(3, "a latent side of an eighth of the volume's (here 2^3 of 16^3) is the best compromise",
          ("fd", "cov", "seconds_per_sample"), (
              SIDE_2,
              SIDE_4,
              SIDE_8,
              Trial("side-2-steps-8", of=SIDE_2, sampling="--steps 8"),
              Trial("side-2-steps-16", of=SIDE_2, sampling="--steps 16"),
              Trial("side-2-steps-64", of=SIDE_2, sampling="--steps 64"),
              Trial("side-4-steps-8", of=SIDE_4, sampling="--steps 8"),
              Trial("side-4-steps-16", of=SIDE_4, sampling="--steps 16"),
              Trial("side-4-steps-64", of=SIDE_4, sampling="--steps 64"),
              Trial("side-8-steps-8", of=SIDE_8, sampling="--steps 8"),
              Trial("side-8-steps-16", of=SIDE_8, sampling="--steps 16"),
              Trial("side-8-steps-64", of=SIDE_8, sampling="--steps 64"))),
    # App. C.2, Fig. 3: more steps are better, and fresh noise on the way is.
    Claim(4, "64 steps of the sampler, with churn",
          ("fd", "seconds_per_sample"), (
              Trial("churn-40-steps-8", of=REFERENCE, sampling="--churn 40 --steps 8"),
              Trial("churn-40-steps-16", of=REFERENCE, sampling="--churn 40 --steps 16"),
              Trial("churn-40-steps-32", of=REFERENCE, sampling="--churn 40 --steps 32"),
              Trial("churn-40-steps-64", of=REFERENCE, sampling="--churn 40 --steps 64"),
              Trial("churn-0-steps-8", of=REFERENCE, sampling="--churn 0 --steps 8"),
              Trial("churn-0-steps-16", of=REFERENCE, sampling="--churn 0 --steps 16"),
              Trial("churn-0-steps-32", of=REFERENCE, sampling="--churn 0 --steps 32"),
              Trial("churn-0-steps-64", of=REFERENCE, sampling="--churn 0 --steps 64"))),
    # Sec. 4, direct latent sampling: _direct is the fitted Gaussian, the better of our two.
    Claim(5, "diffusion beats drawing embeddings at random",
          ("fd", "fd_direct", "kd", "kd_direct", "cov", "cov_direct", "mmd", "mmd_direct"), (
              REFERENCE,
              Trial("tiny-256", of=TINY, sampling="--n 256 --views 10"))),
    # Sec. 4.1, against DiffRF. A step costs so much more that 100 of them take as long.
    Claim(6, "diffusing latents beats diffusing whole volumes, at equal time",
          ("fd", "cov", "mmd", "seconds_stage2", "seconds_per_sample"), (
              REFERENCE,
              Trial("volumes", "--per-channel --unet-channels 16 --unet-multipliers 1,2,4 "
                    "--unet-attention 4 --steps-stage2 100", decoder=REFERENCE,
                    whole_volumes=True))),
    # Tab. 2, first row that lacks something: one frame instead of four costs 0.5 dB.
    Claim(7, "four views a step beat one",
          ("psnr_heldout", "seconds_stage1"), (
              REFERENCE,
              Trial("one-view", "--views-per-step 1"),
              Trial("one-view-2000", "--views-per-step 1 --steps-stage1 2000"))),
    # Tab. 2, next row: without it not worse, in the paper.
    Claim(8, "self-attention in the decoder helps",
          ("psnr_heldout", "seconds_stage1"), (
              REFERENCE,
              Trial("attention", "--decoder-attention 8"),
              TINY,
              Trial("tiny-attention", "--preset tiny --decoder-attention 8"))),
    # Tab. 2, next row: 0.1 dB. 3,300 steps of depth 1 take as long as 2,200 of depth 2.
    Claim(9, "deeper decoders are better",
          ("psnr_heldout", "seconds_stage1"), (
              REFERENCE,
              Trial("depth-2", "--decoder-depth 2"),
              Trial("depth-4", "--decoder-depth 4"),
              TINY,
              Trial("tiny-depth-2", "--preset tiny --decoder-depth 2"),
              Trial("tiny-3300", "--preset tiny --steps-stage1 3300"))),
    # Tab. 2, last row: 64 numbers instead of 1024 cost 1.2 dB, more than all else.
    Claim(10, "embeddings must be long (1024 here)",
          ("psnr_heldout",), (
              REFERENCE,
              Trial("embedding-64", "--embed-dim 64"),
              Trial("embedding-16", "--embed-dim 16"))),
    # Fig. 6: without Eq. 2, what has the background's colour turns to thin fog.
    Claim(11, "the foreground loss is needed by what is black, such as tyres",
          ("psnr_heldout", "mask_heldout"), (
              Trial("vehicles", VEHICLES),
              Trial("vehicles-without", f"{VEHICLES} --foreground-weight 0"))),
    # App. B.3: pieces of 256 codebooks. "paper" has the multipliers as printed.
    Claim(12, "hashed embeddings lose nothing",
          ("psnr_heldout",), (
              REFERENCE,
              Trial("hash-spread", "--codebooks 256"),
              Trial("hash-paper", "--codebooks 256 --hash-rule paper"))),
    # Eq. 1. The reference compares pixels and gradients.
    Claim(13, "a perceptual loss is better than pixels",
          ("psnr_heldout", "mask_heldout"), (
              REFERENCE,
              Trial("perceptual-pixels", "--perceptual pixels"),
              Trial("perceptual-random", "--perceptual random"),
              Trial("perceptual-vgg19", "--perceptual VGG19"))),
    # Sec. 3.2: cameras may be estimated, or learned. Rigid chairs on an arc have one part.
    Claim(14, "cameras need not be exact, nor known",
          ("psnr_heldout",), (
              REFERENCE,
              Trial("shaken-5", degrees=5.0),
              Trial("shaken-15", degrees=15.0),
              Trial("arc-known", f"{ARC} --cameras known", seeds=(0,)),
              Trial("arc-learned", f"{ARC} --cameras learned", seeds=(0,),
                    also=("rotation_error", "azimuth_scale", "mirrored")))),
    # Sec. 3.3: weight 3. One model, sampled with two seeds.
    Claim(15, "guidance trades diversity for agreement with the prompt",
          ("text_colour", "text_colour_chance", "text_parts", "text_parts_chance",
           "text_diversity"), (
              Trial("guidance-1", of=TEXT, seeds=(0,), sampling="--guidance 1"),
              Trial("guidance-3", of=TEXT, seeds=(0,), sampling="--guidance 3"),
              Trial("guidance-6", of=TEXT, seeds=(0,), sampling="--guidance 6"),
              Trial("guidance-1-again", of=TEXT, seeds=(0,), sampling="--guidance 1 --seed 1"),
              Trial("guidance-3-again", of=TEXT, seeds=(0,), sampling="--guidance 3 --seed 1"),
              Trial("guidance-6-again", of=TEXT, seeds=(0,), sampling="--guidance 6 --seed 1"))))


# ---- What only a claim needs ---------------------------------------------------------------------
def make_extreme(latents, n):
    """The same latents with n of all their numbers +-1e4, as the paper met them (Fig. 9), at random
    places."""
    latents = latents.clone(memory_format=torch.contiguous_format)
    generator = torch.Generator().manual_seed(0)
    place = torch.randperm(latents.numel(), generator=generator)[:n]
    sign = (-1.0) ** place.to(latents)                   # of odd places minus
    latents.view(-1)[place] = 1e4 * sign
    return latents


def shake_cameras(dataset, degrees, seed):
    """The same dataset, with every training camera turned about the object by N(0, degrees^2), each
    about another axis; held-out views keep theirs."""
    generator = sample.stream(seed, "camera noise")
    frames = len(dataset.heldout)
    axis = torch.randn(frames, 3, generator=generator)
    axis = axis / axis.norm(dim=1, keepdim=True)
    angle = torch.randn(frames, 1, generator=generator) * math.radians(degrees)
    angle[dataset.heldout] = 0
    turn = cayley(axis * (angle / 2).tan())                                   # (F, 3, 3)
    cameras = dataset.cam2world.clone()
    cameras[:, :3] = turn @ cameras[:, :3]
    return dataclasses.replace(dataset, cam2world=cameras)


class WholeVolumes(nn.Module):
    """A decoder that is cut into G1 and G2 at its very end: G1 has all convolutions, G2 only the
    activations. Diffusion then learns the volume itself, as in DiffRF (Mueller et al. 2023).

    To all else it is a decoder as any other, with latents of shape (4, D, H, W). Of these, density
    and colours differ in scale: normalize them per channel.
    """

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder
        side = decoder.volume_side
        self.latent_shape = (4, side, side, side)

    def embed(self, k):
        """k (B,) -> e (B, embed_dim)."""
        return self.decoder.embed(k)

    def decode_latent(self, e):
        """G1: e (B, embed_dim) -> (B, 4, D, H, W), any number."""
        latent = self.decoder.decode_latent(e)
        return self.decoder.decode_raw(latent)

    def decode_volume(self, raw):
        """G2: (B, 4, D, H, W) -> density >= 0, colours in [0, 1], same shape."""
        return self.decoder.activate(raw)

    def forward(self, k):
        """k (B,) -> volume (B, 4, D, H, W)."""
        return self.decoder(k)


def open_whole_volumes(folder, device, stages=(1, 2)):
    """sample.open_run for a run whose stage 2 diffuses whole volumes.

    Everything that samples, decodes and scores then works as it is.
    """
    trained = sample.open_run(folder, device, stages=(1,))
    trained.autodecoder = WholeVolumes(trained.autodecoder).eval()
    if 2 in stages:
        first = sample.load_checkpoint(folder, 1)
        stage2 = sample.open_stage2(folder, first, trained.autodecoder, device)
        trained = SimpleNamespace(**(vars(trained) | vars(stage2)))
    return trained


# ---- Runs: trained unless they are finished ------------------------------------------------------
SAMPLES = 128                    # scored of each run, from so many sides
SIDES_SEEN = 4
# Scores that need no stage 2; that training writes by itself; that need points on surfaces.
OF_STAGE1 = ("psnr_heldout", "mask_heldout", "ssim_heldout", "seconds_stage1", "rotation_error",
             "azimuth_scale", "mirrored")
FROM_TRAINING = ("psnr_heldout", "mask_heldout", "seconds_stage1", "seconds_stage2")
OF_SHAPES = ("cov", "mmd", "nna", "empty")
# Where a finished run's settings may be others than its flags': fit_to_data reads some from the
# data, and nothing that is learned depends on the rest.
MAY_DIFFER = ("parts", "focal", "body", "log_every", "save_every")
# What of a trial is no setting of train.py, and is kept in metrics.json, too.
SPECIAL = ("extreme", "whole_volumes", "degrees")


def folder_of(trial, seed, options):
    """Where a run lies. options: of the command line: out, device, vgg19."""
    return Path(options.out) / f"{trial.name}-{seed}"


def needs_vgg19(trial):
    """Whether a trial needs weights that have to be downloaded: --vgg19 FILE."""
    return "VGG19" in trial.flags


def lacks_file(trial, options):
    """Whether these were not given: then it is left out."""
    return needs_vgg19(trial) and options.vgg19 is None


def training_flags(trial, seed, options):
    """What train.py would be given; later flags win."""
    flags = ["--preset", "micro", *trial.flags.split()]
    if needs_vgg19(trial):
        flags[flags.index("VGG19")] = str(options.vgg19)
    return [*flags, "--seed", str(seed), "--out", str(folder_of(trial, seed, options))]


def sampling_flags(trial, scores):
    """What evaluate.py is given, but for --run, --out and --device; later flags win.

    What no score asks for is left out: baselines take as long again, each of them.
    """
    flags = ["--n", str(SAMPLES), "--views", str(SIDES_SEEN), *trial.sampling.split()]
    if not any("_direct" in name for name in scores):
        flags.append("--no-baselines")
    if not any(name.split("_")[0] in OF_SHAPES for name in scores):
        flags.append("--no-shapes")
    return flags


def needs_stage2(scores):
    """Whether there is a score that only samples have: else stage 1 is enough."""
    return any(name not in OF_STAGE1 for name in scores)


def wanted_settings(trial, seed, options):
    """The settings that a finished run of a trial has in its metrics.json: those of training, and
    the sampler's as they were when it was scored."""
    _, settings = train.parse(training_flags(trial.of or trial, seed, options))
    sampling = evaluate.parse(sampling_flags(trial, ()))
    if sampling.steps is not None:
        settings.sample_steps = sampling.steps
    if sampling.churn is not None:
        settings.churn = sampling.churn
    if sampling.guidance is not None:
        settings.guidance = sampling.guidance
    return settings


def agrees(metrics, settings, trial):
    """Whether a run of these metrics was made with these settings, in this trial's way."""
    found = metrics.get("settings", {})
    as_saved = json.loads(json.dumps(vars(settings)))    # lists for tuples
    for name, value in as_saved.items():
        if name not in MAY_DIFFER and (name not in found or found[name] != value):
            return False
    for name in SPECIAL:
        if metrics.get(name, 0) != getattr(trial, name):
            return False
    return True


def is_finished(trial, seed, scores, options):
    """Whether a run has all the scores, its settings agree, and as many samples were scored."""
    metrics = train.read_metrics(folder_of(trial, seed, options))
    if not all(name in metrics for name in scores):
        return False
    if not agrees(metrics, wanted_settings(trial, seed, options), trial):
        return False
    if not set(scores) - set(OF_STAGE1) - set(FROM_TRAINING):
        return True                                      # no samples are needed
    sampling = evaluate.parse(sampling_flags(trial, scores))
    return metrics.get("samples") == sampling.n and metrics.get("views") == sampling.views


def has_stage(folder, settings, stage, trial):
    """Whether a run's stage is trained to its end, with these settings."""
    metrics = train.read_metrics(folder)
    steps = getattr(settings, f"steps_stage{stage}")
    if metrics.get(f"steps_stage{stage}") != steps or not agrees(metrics, settings, trial):
        return False
    return (folder / f"stage{stage}.pt").exists()


def remember(folder, settings, trial):
    """Keeps what is special about a trial beside its run's settings."""
    special = {name: getattr(trial, name) for name in SPECIAL}
    train.add_metrics(folder, settings, **special)


def learn_decoder(trial, seed, options):
    """Stage 1 of a run, or a copy of the one that the trial names."""
    args, settings = train.parse(training_flags(trial, seed, options))
    if trial.decoder is not None:
        learn_decoder(trial.decoder, seed, options)
        args.out.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder_of(trial.decoder, seed, options) / "stage1.pt", args.out)
        return
    if has_stage(args.out, settings, 1, trial):
        return
    dataset = data.load_for(settings, args.data)
    settings = train.fit_to_data(settings, args.cameras, dataset)
    if trial.degrees:
        dataset = shake_cameras(dataset, trial.degrees, seed)
    with train.alone_in(args.out):
        train.run_stage1(settings, dataset, args.out, options.device, args.data)
        remember(args.out, settings, trial)


def learn_diffusion(trial, seed, options):
    """Stage 2 of a run, on the latents of its stage 1, or on what the trial makes of them."""
    args, settings = train.parse(training_flags(trial, seed, options))
    if has_stage(args.out, settings, 2, trial):
        return
    latents = None                           # stage 2's own: F = G1(e)
    if trial.extreme:
        trained = sample.open_run(args.out, options.device, stages=(1,))
        latents = sample.training_latents(trained.autodecoder, len(trained.names))
        latents = make_extreme(latents, trial.extreme)
    elif trial.whole_volumes:
        trained = open_whole_volumes(args.out, options.device, stages=(1,))
        # (N, 4, D, H, W): these are volumes.
        latents = sample.training_latents(trained.autodecoder, len(trained.names))
    with train.alone_in(args.out):
        train.run_stage2(settings, args.out, options.device, latents=latents)
        remember(args.out, settings, trial)


def score_whole_volumes(folder, scores, options):
    """evaluate.py for a run that diffuses whole volumes: its scores, added to metrics.json."""
    trained = open_whole_volumes(folder, options.device)
    dataset = data.load_for(trained.data_settings, trained.source)
    settings = trained.settings
    args = evaluate.parse(sampling_flags(REFERENCE, scores))
    found = evaluate.evaluate(trained, dataset, args.n, args.views, settings.sample_steps,
                              settings.churn, args.seed, not args.no_shapes, not args.no_baselines)
    train.add_metrics(folder, settings, train.OF_SAMPLES, **found)
    evaluate.print_scores(found)


def finish(trial, seed, scores, options):
    """Trains and scores one run of a trial, or nothing where that was done before.

    Each step asks for itself whether it was done, so that what was stopped goes on from there, and
    a run that another row has trained is only scored.
    """
    folder = folder_of(trial, seed, options)
    if is_finished(trial, seed, scores, options):
        print(f"{folder} is finished")
        return
    print(f"{folder}: {describe(trial)}", flush=True)
    source = trial.of or trial               # whose networks they are
    learn_decoder(source, seed, options)
    if needs_stage2(scores):
        learn_diffusion(source, seed, options)
    if is_finished(trial, seed, scores, options):
        return                               # training itself gave all the scores
    if trial.whole_volumes:
        score_whole_volumes(folder, scores, options)
        return
    evaluate.main(["--run", str(folder_of(source, seed, options)), "--out", str(folder),
                   "--device", options.device, *sampling_flags(trial, scores)])


# ---- A row, as it is printed ---------------------------------------------------------------------
def row_of(trial, scores, options):
    """Words for a trial: its name, and of each score "median (least to greatest)" of its seeds."""
    if lacks_file(trial, options):
        return [trial.name] + ["needs a file (--vgg19)"] + ["-"] * (len(scores) - 1)
    runs = [train.read_metrics(folder_of(trial, seed, options)) for seed in trial.seeds]
    row = [trial.name]
    for name in scores:
        spread = evaluate.find_spread(runs, name)
        row.append("-" if spread is None else "{:.4g} ({:.4g} to {:.4g})".format(*spread))
    return row


def try_claim(claim, options):
    """Runs whatever a claim needs, and prints its row."""
    scores = claim.scores
    for trial in claim.trials:
        scores = (*scores, *trial.also)
        if lacks_file(trial, options):
            continue
        for seed in trial.seeds:
            finish(trial, seed, (*claim.scores, *trial.also), options)
    table = [["", *scores]]
    for trial in claim.trials:
        table.append(row_of(trial, scores, options))
    print(f"\n{claim.number}. {claim.text}: medians (least to greatest)")
    evaluate.print_table(table)
    print(flush=True)


def list_claims(claims):
    """--list: every claim with its scores, and what is special about each of its trials."""
    for claim in claims:
        print(f"{claim.number:2}. {claim.text}: {', '.join(claim.scores)}")
        for trial in claim.trials:
            print(f"      {trial.name:22}{describe(trial)}")


def describe(trial):
    """A trial in words."""
    said = []
    if trial.of is not None:
        said.append(f"the run {trial.of.name}, {trial.sampling}")
    if trial.flags:
        said.append(trial.flags)
    if trial.extreme:
        said.append(f"{trial.extreme} numbers of all latents at +-1e4")
    if trial.whole_volumes:
        said.append("diffusion on whole volumes")
    if trial.degrees:
        said.append(f"training cameras turned by {trial.degrees:g} degrees")
    return "; ".join(said) or "no flags"


def parse(arguments=None, claims=CLAIMS):
    """Command line -> options; numbers of claims that are not there are bad input."""
    parser = data.Parser(description="Try the paper's claims in small.")
    parser.add_argument("numbers", nargs="*", type=int, metavar="N", help="rows (default: all)")
    parser.add_argument("--list", action="store_true", help="show the rows, and train nothing")
    parser.add_argument("--out", default="runs/claims", help="folder of the runs (%(default)s)")
    parser.add_argument("--vgg19", metavar="FILE", help=f"{VGG19_FILE}, for row 13")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (%(default)s)")
    options = parser.parse_args(arguments)
    known = [claim.number for claim in claims]
    for number in options.numbers:
        if number not in known:
            raise BadInput(f"no claim {number}: --list shows them")
    options.numbers = options.numbers or known
    return options


def main(arguments=None, claims=CLAIMS):
    """Tries the claims of these numbers, or all; claims: the table, of which tests have another."""
    options = parse(arguments, claims)
    if options.vgg19 is not None:
        build_features(options.vgg19, "cpu")             # refused now, not after nine runs
    chosen = [claim for claim in claims if claim.number in options.numbers]
    if options.list:
        list_claims(chosen)
        return
    options.device = sample.choose_device(options.device)
    for claim in chosen:
        try_claim(claim, options)


if __name__ == "__main__":
    data.run_cli(main)
