"""figures.py: what is drawn is what the project's functions answer, and obeys its closed forms."""
import math
from types import SimpleNamespace

import imageio.v3 as iio
import pytest
import torch
from matplotlib.text import Annotation

import claims
import data
import figures
import render
import sample
from data import BadInput
from test_sample import make_run

F64 = torch.float64


@pytest.fixture(scope="module", autouse=True)
def small_pictures():
    """As always, but small: rendering takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "SCENE", 64)
        patch.setattr(figures, "VIEW", 40)
        patch.setattr(figures, "GRID", 64)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three rigid objects that nobody has trained, but dense; and a denoiser with an opinion."""
    return make_run(tmp_path_factory.mktemp("figures") / "rigid", lively=True)


@pytest.fixture(scope="module")
def trained(run):
    return sample.open_run(run)


def random(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def centre_of(axis):
    """Of an axis, in the figure: x and y from 0 to 1."""
    place = axis.get_position()
    return (place.x0 + place.x1) / 2, (place.y0 + place.y1) / 2


# ---- rays ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def fog():
    volume = torch.rand(4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    volume[0] *= 3
    return volume


def test_light_and_weights_are_those_of_equations_6_and_7(fog):
    rays = figures.cast_rays(fog)
    tau = rays.density * rays.edges.diff(dim=-1)
    light = torch.exp(tau - tau.cumsum(-1))
    torch.testing.assert_close(rays.light, light, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rays.weights, light * (1 - torch.exp(-tau)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rays.weights.sum(-1), rays.occupancy, rtol=1e-5, atol=1e-6)
    assert 0.5 < rays.occupancy.max() < 1


def test_the_cameras_picture_is_the_renderers(fog):
    cam2world, intrinsics = figures.CAMERA
    rgb, occupancy = render.render(fog[None], cam2world[None, None], intrinsics[None, None],
                                   figures.PIXELS, figures.SAMPLES)
    rays = figures.cast_rays(fog)
    torch.testing.assert_close(rays.colour.movedim(-1, 0), rgb[0, 0])
    torch.testing.assert_close(rays.occupancy, occupancy[0, 0, 0])


def test_rays_are_cut_between_two_faces_of_the_cube_and_leave_through_their_own_pixel(fog):
    rays = figures.cast_rays(fog)
    crosses = rays.far > rays.near
    assert crosses.any() and not crosses.all()
    for t in (rays.near, rays.far):
        on_face = (rays.o + t[..., None] * rays.d)[crosses].abs().amax(-1)
        torch.testing.assert_close(on_face, torch.ones_like(on_face))
    assert rays.points[crosses].abs().max() <= 1 + 1e-5
    corners = figures.pixel_corners(ahead=0.7)
    middles = (corners[:-1, :-1] + corners[1:, 1:]) / 2 - rays.o
    torch.testing.assert_close(middles / middles.norm(dim=-1, keepdim=True), rays.d)


def test_a_pixel_mixes_by_how_far_apart_place_and_colour_lie_and_is_to_be_full():
    weights = torch.tensor([[0.5, 0.0, 0.5], [0.4, 0.0, 0.4], [0.0, 1.0, 0.0]])
    rays = SimpleNamespace(
        weights=weights, occupancy=weights.sum(-1), t=torch.tensor([1.0, 2.0, 5.0]).expand(3, 3),
        rgb=torch.tensor([0.0, 9.0, 1.0])[:, None].expand(3, 3, 3))
    # Of 1 and 5 the deviation is 2; of black and white half of sqrt(3).
    expected = math.sqrt(3) * torch.tensor([1, 0.8**2, 0])
    torch.testing.assert_close(figures.variety(rays), expected)


@pytest.fixture(scope="module")
def seen_rays(trained):
    return figures.rays_numbers(trained)


def test_of_all_rays_through_the_first_objects_the_one_that_mixes_most_is_drawn(trained, seen_rays):
    numbers = seen_rays
    volumes = trained.autodecoder(torch.arange(3))
    most = max(figures.variety(figures.cast_rays(volume)).max().item() for volume in volumes)
    assert most > 0
    assert figures.variety(numbers.rays)[numbers.pixel].item() == pytest.approx(most)
    assert any(torch.equal(numbers.volume, volume) for volume in volumes)
    torch.testing.assert_close(figures.cast_rays(numbers.volume).colour, numbers.rays.colour)
    cam2world, lens = figures.OBSERVER
    rgb, _ = render.render(numbers.volume[None], cam2world[None, None], lens[None, None],
                           figures.SCENE, 64)
    torch.testing.assert_close(numbers.seen["rgb"], rgb[0, 0])


def test_the_observer_sees_what_is_before_the_object_and_not_what_is_behind_it():
    position = figures.voxel_positions(16)
    volume = torch.zeros(1, 4, 16, 16, 16)
    volume[0, 0] = 100.0 * (position.norm(dim=-1) < 0.5)
    cam2world, lens = figures.OBSERVER
    views = render.render_geometry(volume, cam2world[None, None], lens[None, None], 64, 64)
    seen = {name: pictures[0, 0] for name, pictures in views.items()}
    right, up, back, _ = cam2world[:3].T
    points = torch.stack([0.9 * back, -0.9 * back, 0.9 * right, 0.9 * right - 0.9 * back, up])
    x, y, in_sight = figures.project(seen, points)
    assert in_sight.tolist() == [True, False, True, True, True]
    torch.testing.assert_close(x[:2], torch.full((2,), 31.5), rtol=0, atol=1e-3)
    assert x[2] > 50 and y[4] < 14


def test_panels_and_swatch_are_of_that_ray(seen_rays):
    figure = figures.draw_rays(seen_rays)
    rays, pixel = seen_rays.rays, seen_rays.pixel
    _, thickness, light, weight = figure.axes
    for axis, values in ((thickness, rays.density), (light, rays.light)):
        drawn = axis.patches[0].get_data()
        assert drawn.values == pytest.approx(values[pixel].numpy())
        assert drawn.edges == pytest.approx(rays.edges[pixel].numpy())
    for i, bar in enumerate(weight.patches):
        assert bar.get_height() == pytest.approx(rays.weights[pixel][i].item())
        assert bar.get_x() == pytest.approx(rays.edges[pixel][i].item())
        assert bar.get_facecolor()[:3] == pytest.approx(rays.rgb[pixel][i].tolist())
    assert len(weight.patches) == figures.SAMPLES
    lines = [line for line in figure.axes[0].lines if line.get_color() == "black"]
    _, ray, near, far = lines                            # faint, in sight, and two marks on it
    assert ray.get_xdata()[0] < near.get_xdata() < far.get_xdata() < ray.get_xdata()[-1]
    swatch, = figure.artists
    assert swatch.get_facecolor()[:3] == pytest.approx(rays.colour[pixel].tolist())
    assert any(f"{rays.occupancy[pixel]:.2f}" in text.get_text() for text in figure.texts)


# ---- normalization -------------------------------------------------------------------------------
def test_the_deviation_grows_with_every_extreme_number_and_the_quartiles_hardly_move():
    latents = 3 * random(100, 16, 4, 4, 4) + 1
    numbers = figures.measure_latents(latents)
    n = torch.tensor(figures.EXTREMES)
    expected = (9 + n * 1e8 / latents.numel()).sqrt()
    torch.testing.assert_close(numbers.s["meanstd"], expected.double(), rtol=0.01, atol=0)
    torch.testing.assert_close(numbers.s["robust"], torch.full_like(expected, 3).double(),
                               rtol=0.03, atol=0)
    torch.testing.assert_close(numbers.m["robust"], torch.ones_like(expected).double(), rtol=0,
                               atol=0.03)
    assert figures.EXTREMES[0] == 0 and figures.SHOWN in figures.EXTREMES


def test_what_is_shown_normalized_is_the_latents_with_ten_extreme_numbers():
    latents = random(20, 16, 4, 4, 4)
    numbers = figures.measure_latents(latents)
    shown = figures.EXTREMES.index(figures.SHOWN)
    for mode in figures.MODES:
        back = numbers.latents_hat[mode] * numbers.s[mode][shown] + numbers.m[mode][shown]
        torch.testing.assert_close(back, claims.make_extreme(latents, figures.SHOWN))
    assert numbers.latents_hat["meanstd"].std() == pytest.approx(1, abs=1e-9)


def test_latents_are_those_of_all_training_objects(trained):
    numbers = figures.normalization_numbers(trained)
    for k in range(3):
        e = trained.autodecoder.embed(torch.tensor([k]))
        latent = trained.autodecoder.decode_latent(e)
        torch.testing.assert_close(numbers.latents[k:k + 1], latent)
    assert len(numbers.latents) == 3


def test_lines_and_steps_are_those_numbers():
    latents = 2 * random(50, 16, 4, 4, 4, dtype=torch.float32) + 1
    numbers = figures.measure_latents(latents)
    raw, divisors, normalized = figures.draw_normalization(numbers).axes
    shown = figures.EXTREMES.index(figures.SHOWN)
    for i, mode in enumerate(figures.MODES):
        assert raw.lines[i].get_ydata()[50] == pytest.approx(
            figures.bell(torch.tensor(0.0), numbers.m[mode][0], numbers.s[mode][0]).item())
        assert divisors.lines[i].get_xdata() == pytest.approx(figures.EXTREMES)
        assert divisors.lines[i].get_ydata() == pytest.approx(numbers.s[mode].numpy())
        assert divisors.texts[i].get_text() == f"{numbers.s[mode][shown]:.1f}"
        values, edges, _ = normalized.patches[i].get_data()
        counted = torch.histc(numbers.latents_hat[mode], len(values), edges[0], edges[-1])
        assert values / values.sum() == pytest.approx((counted / counted.sum()).numpy(), abs=1e-3)
        assert (values * (edges[1:] - edges[:-1])).sum() == pytest.approx(1)
    heights = [bar.get_height() for bar in raw.patches]
    assert sum(heights) * raw.patches[0].get_width() == pytest.approx(1)


def test_a_bell_is_the_density_of_a_gaussian():
    x = torch.tensor([1.0, 4.0], dtype=F64)
    expected = torch.tensor([1, math.exp(-0.5)], dtype=F64) / (3 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(figures.bell(x, 1.0, 3.0), expected)


# ---- preconditioning -----------------------------------------------------------------------------
@pytest.mark.parametrize("sigma", figures.SIGMAS)
@pytest.mark.parametrize("spread", [0.5, 1.1])
def test_what_f_is_fed_and_must_answer_has_variance_1_if_y_has_sigma_data(sigma, spread):
    y = spread * random(1, 64, 12, 12, 12)
    noise = random(1, 64, 12, 12, 12, seed=1)
    level = figures.precondition(y, noise, sigma, 0.5)
    total = sigma**2 + 0.5**2
    fed = (spread**2 + sigma**2) / total                 # these are 1 for a spread of 0.5
    wanted = (0.5**2 + spread**2 * sigma**2 / 0.5**2) / total
    assert level.fed.var().item() == pytest.approx(fed, rel=0.03)
    assert level.wanted.var().item() == pytest.approx(wanted, rel=0.03)
    torch.testing.assert_close(level.c_skip * level.x + level.c_out * level.wanted, y)
    torch.testing.assert_close(level.x, y + sigma * noise)


def test_what_f_answers_is_what_the_network_says_to_what_it_is_fed(trained):
    numbers = figures.preconditioning_numbers(trained)
    latent = sample.training_latents(trained.autodecoder, 3)[:1]
    torch.testing.assert_close(numbers.y, trained.normalizer.normalize(latent).double())
    noise = sample.latent_noise(trained, 1, 0).double()
    for sigma, level in zip(figures.SIGMAS, numbers.levels, strict=True):
        torch.testing.assert_close(level.x, numbers.y + sigma * noise)
        c_noise = torch.tensor([math.log(sigma) / 4])
        answer = trained.denoiser.unet(level.fed.float(), c_noise)
        torch.testing.assert_close(level.answered, answer.double(), rtol=1e-3, atol=1e-3)
        assert answer.std() > 0.01
        torch.testing.assert_close(level.denoised, trained.denoiser(level.x, sigma))
        torch.testing.assert_close(level.picture, figures.look_at(trained, level.denoised))


def test_a_latent_is_denormalized_before_it_is_decoded(trained):
    k = torch.tensor([1])
    latent = trained.autodecoder.decode_latent(trained.autodecoder.embed(k))
    rgb, occupancy = sample.render_views(trained, trained.autodecoder(k), [0.6], 24)
    pixels = figures.look_at(trained, trained.normalizer.normalize(latent), size=24)
    torch.testing.assert_close(pixels, (rgb + 1 - occupancy)[0, 0], rtol=1e-3, atol=1e-3)
    assert pixels.min() < 0.9


def test_a_run_with_text_is_drawn_as_one_that_is_told_nothing(tmp_path):
    trained = sample.open_run(make_run(tmp_path / "text", lively=True, text=True))
    level = figures.preconditioning_numbers(trained).levels[2]
    torch.testing.assert_close(level.denoised, trained.denoiser(level.x, level.sigma))


@pytest.mark.parametrize("channels, rows, columns", [(40, 3, 6), (14, 2, 6), (4, 1, 4)])
def test_a_mosaic_is_the_middle_slice_of_the_first_channels(channels, rows, columns):
    latent = torch.zeros(1, channels, 4, 4, 4)
    latent[0, :, 2] = torch.arange(channels)[:, None, None].float()
    latent[0, 0, 2, 0, 3] = -7.0
    mosaic = figures.mosaic(latent)
    assert mosaic.shape == (4 * rows, 4 * columns) and mosaic[0, 3] == -7
    for row in range(rows):
        for column in range(columns):
            assert mosaic[4 * row + 1, 4 * column + 1] == 6 * row + column


def test_a_noise_level_stands_above_the_middle_of_its_column(trained):
    figure = figures.draw_preconditioning(figures.preconditioning_numbers(trained))
    figure.canvas.draw()
    scales, *squares = figure.axes
    for i, sigma in enumerate(figures.SIGMAS):
        on_screen = scales.transData.transform((sigma, 0))
        x, _ = figure.transFigure.inverted().transform(on_screen)
        for row in range(len(figures.ROWS)):
            middle, _ = centre_of(squares[len(figures.SIGMAS) * row + i])
            assert x == pytest.approx(middle, abs=0.002)
    skip, out = (line.get_ydata() for line in scales.lines)
    sigma = scales.lines[0].get_xdata()
    assert skip == pytest.approx(0.25 / (sigma**2 + 0.25), rel=1e-4)
    assert out == pytest.approx(0.5 * sigma / (sigma**2 + 0.25)**0.5, rel=1e-4)


# ---- path ----------------------------------------------------------------------------------------
def of_a_gaussian(x, sigma):
    """The ideal D where the data is N(0, I): its path is x(sigma) ~ sqrt(1 + sigma^2)."""
    return x / (1 + sigma**2)


@pytest.fixture(scope="module")
def path(trained):
    return figures.path_numbers(trained)


def test_the_path_begins_with_noise_of_sigma_max_and_ends_with_a_sample_at_0(trained, path):
    noise = sample.latent_noise(trained, 1, 0)
    assert path.begins[0].sigma == pytest.approx(80, rel=1e-12)
    torch.testing.assert_close(path.begins[0].x, 80 * noise.double())
    assert len(path.begins) == figures.STEPS == len(path.trials) + 1
    assert path.sigmas[-1] == 0
    sampled = sample.sample_latents(trained, noise, figures.STEPS)
    torch.testing.assert_close(trained.normalizer.denormalize(path.end.float()), sampled)


def test_a_step_goes_up_between_s_min_and_s_max_and_there_alone(path):
    ups = 0
    for sigma, begin, sigma_next, trial in zip(path.sigmas.tolist(), path.begins,
                                               path.sigmas[1:].tolist(), path.trials):
        factor = math.sqrt(2) if figures.S_MIN <= sigma <= figures.S_MAX else 1
        assert begin.sigma == pytest.approx(sigma * factor)
        assert trial.sigma == pytest.approx(sigma_next)
        ups += factor > 1
    assert (figures.S_MIN, figures.S_MAX) == (0.05, 50) and 0 < ups < figures.STEPS - 2


def test_pictures_are_of_what_the_denoiser_answers_at_the_steps_that_are_named(trained, path):
    assert path.shown == [0, 2, 4, 6, 9, 11, 13, 15]
    for i, pixels in zip(path.shown, path.pictures):
        begin = path.begins[i]
        denoised = trained.denoiser(begin.x, begin.sigma)
        torch.testing.assert_close(pixels, figures.look_at(trained, denoised))


def test_many_small_steps_follow_the_true_path_and_one_is_heuns():
    begin = SimpleNamespace(sigma=2.0, x=2 * random(1, 3, 2, 2, 2))
    curve = figures.follow(of_a_gaussian, begin, 0.5, 40)
    assert len(curve) == 41 and curve[0].sigma == pytest.approx(2)
    assert curve[-1].sigma == pytest.approx(0.5)
    torch.testing.assert_close(curve[-1].x, begin.x * math.sqrt(1.25 / 5), rtol=1e-3, atol=0)

    _, end = figures.follow(of_a_gaussian, begin, 0.5, 1)
    slope = begin.x * 2 / 5                              # (x - D) / sigma = x sigma / (1 + sigma^2)
    euler = begin.x - 1.5 * slope
    heun = begin.x - 1.5 * (slope + euler * 0.5 / 1.25) / 2
    torch.testing.assert_close(end.x, heun)


def test_the_magnified_step_is_corrected_towards_the_path_and_begins_with_churn():
    noise = random(1, 64, 8, 8, 8)
    _, asked = figures.record(of_a_gaussian, noise, figures.STEPS,
                              generator=torch.Generator().manual_seed(0))
    sigmas = figures.diffusion.sigma_steps(figures.STEPS)
    step = figures.magnify(of_a_gaussian, sigmas, asked[0::2], asked[1::2])
    here, following = sigmas[step.i].item(), sigmas[step.i + 1].item()
    assert step.begin is asked[2 * step.i] and step.trial is asked[2 * step.i + 1]
    assert step.before.sigma == pytest.approx(here) and step.begin.sigma > here
    for asked_at_end in (step.trial, step.end, step.curve[-1]):
        assert asked_at_end.sigma == pytest.approx(following)
    true = step.curve[-1].x
    assert (step.end.x - true).norm() < 0.5 * (step.trial.x - true).norm()
    added = (step.begin.x - step.before.x).std().item()
    assert added == pytest.approx(1.003 * here, rel=0.02)      # sqrt(2 sigma^2 - sigma^2)
    assert len(step.curve) == 1 + 40


def test_the_number_that_is_magnified_is_not_the_largest_but_the_one_most_corrected():
    variance = torch.tensor([9.0, 0.05], dtype=F64)[:, None, None, None]         # of two channels

    def of_two_gaussians(x, sigma):
        return x * variance / (variance + sigma**2)

    _, asked = figures.record(of_two_gaussians, random(1, 2, 4, 4, 4), figures.STEPS)
    sigmas = figures.diffusion.sigma_steps(figures.STEPS)
    step = figures.magnify(of_two_gaussians, sigmas, asked[0::2], asked[1::2])
    correction = (step.end.x - step.trial.x).flatten().abs()
    assert correction[step.number] == correction.max()
    assert step.end.x.abs().argmax() < 64 <= step.number


def test_a_step_without_churn_is_not_magnified_even_if_it_is_corrected_most():
    def changes_its_mind(x, sigma):                      # between the second step and the third
        return of_a_gaussian(x, sigma) + (1e6 if sigma > 53 else 0)

    _, asked = figures.record(changes_its_mind, random(1, 2, 4, 4, 4), figures.STEPS)
    sigmas = figures.diffusion.sigma_steps(figures.STEPS)
    step = figures.magnify(changes_its_mind, sigmas, asked[0::2], asked[1::2])
    assert step.begin.sigma > sigmas[step.i]


def test_in_the_drawing_every_step_starts_where_the_last_one_ended(path):
    figure = figures.draw_path(path)
    left = figure.axes[0]
    arrows = [text for text in left.texts if isinstance(text, Annotation)]
    starts = [arrow.xyann for arrow in arrows]
    ends = [arrow.xy for arrow in arrows]
    assert starts[0] == (0, pytest.approx(80))
    assert ends[-1] == (figures.STEPS, figures.ZERO)
    for end, start in zip(ends, starts[1:]):
        assert start == pytest.approx(end)


# ---- skinning ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def puppet():
    return figures.skinning_numbers(None)


def test_weights_sum_to_1_and_lead_from_the_torso_to_the_left_arm(puppet):
    torch.testing.assert_close(puppet.weights.sum(0), torch.ones(200))
    assert puppet.part == data.LEFT_ARM and puppet.names[puppet.part] == "left arm"
    assert puppet.weights[data.TORSO, 0] > 0.99 and puppet.weights[data.LEFT_ARM, -40] > 0.99
    both = (puppet.weights[data.TORSO] > 0.2) & (puppet.weights[data.LEFT_ARM] > 0.2)
    assert both.any()
    assert puppet.points[0, 0].abs() < 0.1 and puppet.points[-1, 0] > 0.5


def test_weights_on_the_line_are_the_softmax_of_the_voxels_there(puppet):
    logits = puppet.volume[0, 4:]
    grid = ((puppet.points + 1) * figures.GRID / 2 - 0.5).round().long()
    nearest = logits[:, grid[:, 2], grid[:, 1], grid[:, 0]].softmax(0)
    assert (nearest - puppet.weights).abs().mean() < 0.02


def test_the_puppet_looks_in_every_pose_as_it_truly_does(puppet):
    for t, view in enumerate(puppet.views):
        size = view["rgb"].shape[-1]
        cam2world, intrinsics = data.fixed_camera(1)
        true, labels = data.raytrace_moving(puppet.parts, puppet.moves[t:t + 1], cam2world,
                                            intrinsics, size)
        mask, occupancy = true[0, ..., 3] > 0.5, view["occupancy"][0] > 0.5
        assert (mask & occupancy).sum() > 0.93 * (mask | occupancy).sum()
        both = mask & occupancy & (labels[0] > 0)
        is_right = view["parts"].argmax(0)[both] + 1 == labels[0][both]
        assert is_right.float().mean() > 0.93
        apart = (view["rgb"].movedim(0, -1) - true[0, ..., :3])[both].abs()
        assert apart.mean() < 0.08
        torch.testing.assert_close(view["parts"].sum(0), view["occupancy"][0])


def test_the_first_view_is_the_canonical_one_and_all_others_differ(puppet):
    cam2world, _ = data.fixed_camera(1)
    torch.testing.assert_close(puppet.cameras[0], cam2world.expand(6, 4, 4), rtol=0, atol=1e-5)
    assert puppet.views[0]["rgb"].shape[-1] > figures.VIEW
    for t in range(2, len(puppet.views)):
        assert (puppet.views[t]["rgb"] - puppet.views[1]["rgb"]).abs().mean() > 0.01


def test_a_part_is_painted_in_its_colour_and_a_mixture_in_between():
    shares = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 0.0]])[:, None]           # (P, 1, 3)
    colours = torch.tensor([[1.0, 0, 0], [0, 0, 1]])
    picture = figures.paint({"parts": shares, "occupancy": shares.sum(0, keepdim=True)}, colours)
    assert picture[:, 0].T.tolist() == [[1, 0, 0], [0.5, 0, 0.5], [1, 1, 1]]


def test_the_drawing_has_each_part_in_its_colour_and_below_one_part_alone(puppet):
    canonical, stacked, *rows = figures.draw_skinning(puppet).axes
    colours = figures.colours_of_parts(6)
    assert len({tuple(colour) for colour in colours.tolist()}) == 6
    alone = torch.full((6, 3), 0.85)
    alone[data.LEFT_ARM] = colours[data.LEFT_ARM]
    shown = [axis.images[0].get_array() for axis in (canonical, *rows)]
    assert (shown[0] == sample.to_uint8(figures.paint(puppet.views[0], colours))).all()
    for i, view in enumerate(puppet.views[1:]):
        seen = sample.on_white(view["rgb"], view["occupancy"])
        assert (shown[1 + i] == sample.to_uint8(seen)).all()
        assert (shown[5 + i] == sample.to_uint8(figures.paint(view, colours))).all()
        assert (shown[9 + i] == sample.to_uint8(figures.paint(view, alone))).all()
    assert len(stacked.collections) == 6
    top = stacked.collections[-1].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(1)
    # The line begins in the middle of the picture and ends in the arm, which is orange.
    x, y = canonical.lines[0].get_data()
    size = len(shown[0])
    assert x[0] == pytest.approx(size / 2, abs=0.05 * size) and x[-1] > 0.75 * size
    column, row = round(x[-60]), round(y[-60])
    apart = torch.tensor(shown[0][row, column]) / 255 - colours[data.LEFT_ARM]
    assert apart.abs().max() < 0.1


def test_a_moving_run_shows_what_it_has_learned(tmp_path):
    run = make_run(tmp_path / "moving", lively=True, parts=3)
    trained = sample.open_run(run, stages=(1,))
    rig = figures.skinning_numbers(trained)
    torch.testing.assert_close(rig.volume, trained.autodecoder(torch.tensor([0])))
    assert rig.cameras.shape == (5, 3, 4, 4) and rig.names == ["part 0", "part 1", "part 2"]
    torch.testing.assert_close(rig.cameras[0, 2], render.orbit(0.0, 0.0, trained.posenet.distance))
    for t, pose in ((1, 0), (4, 4)):
        cameras, lens = sample.moving_view_from(trained, 0.0, pose)
        torch.testing.assert_close(rig.cameras[t], cameras)
        torch.testing.assert_close(rig.intrinsics, lens)
    torch.testing.assert_close(rig.weights.sum(0), torch.ones(200))
    assert "moving" in rig.origin and "learned" in rig.origin
    figures.draw_skinning(rig)


def test_a_run_of_one_part_shows_the_built_in_puppet(tmp_path, puppet):
    trained = sample.open_run(make_run(tmp_path / "one", parts=1), stages=(1,))
    rig = figures.skinning_numbers(trained)
    assert rig.names == data.PARTS and rig.origin == puppet.origin and "not learned" in rig.origin


# ---- Files and flags -----------------------------------------------------------------------------
def test_figures_are_written_as_wide_as_a_readme_and_named(run, tmp_path, capsys):
    figures.main(["preconditioning", "path", "--run", str(run), "--out", str(tmp_path)])
    paths = [tmp_path / "figure-preconditioning.png", tmp_path / "figure-path.png"]
    assert capsys.readouterr().out.splitlines() == [f"wrote {path}" for path in paths]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    for path in paths:
        pixels = iio.imread(path)
        assert pixels.shape[1:] == (figures.WIDTH * figures.DPI, 3)
        assert (pixels % 5 == 0).all()
        assert (pixels == 255).all(-1).mean() > 0.3 and (pixels < 100).any()


def test_without_names_all_are_drawn_that_the_run_has_the_stages_for(run, tmp_path, capsys):
    assert figures.choose(figures.parse([])) == list(figures.FIGURES)
    assert figures.choose(figures.parse(["--run", str(run)])) == list(figures.FIGURES)
    alone = tmp_path / "run"
    alone.mkdir()
    (alone / "stage1.pt").write_bytes((run / "stage1.pt").read_bytes())
    figures.main(["--run", str(alone)])
    assert "has no stage 2: without path and preconditioning" in capsys.readouterr().out
    written = sorted(path.name for path in (alone / "figures").iterdir())
    assert written == [f"figure-{name}.png" for name in ("normalization", "rays", "skinning")]
    with pytest.raises(BadInput, match="stage2.pt is not there"):
        figures.main(["path", "--run", str(alone)])


@pytest.mark.parametrize("arguments, word", [
    (["rays", "windmill", "tower"], "no figure windmill, tower: there are rays"),
    (["--run", "/nowhere"], "/nowhere"), (["--runs", "x"], "did you mean --run")])
def test_what_cannot_be_drawn_is_refused_in_one_line(arguments, word, tmp_path):
    with pytest.raises(BadInput, match=word) as refused:
        figures.main([*arguments, "--out", str(tmp_path / "out")])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_without_a_run_a_small_one_is_trained_but_not_for_the_puppet(tmp_path, capsys, monkeypatch):
    few = dict(n_objects=3, n_views=4, steps_stage1=2, steps_stage2=2, objects_per_step=2)
    monkeypatch.setattr(figures, "SHORT", figures.SHORT | few)
    figures.main(["skinning", "--out", str(tmp_path)])
    assert "training" not in capsys.readouterr().out
    figures.main(["preconditioning", "--out", str(tmp_path)])
    told, written = capsys.readouterr().out.splitlines()
    assert "training a small one" in told and "figure-preconditioning.png" in written
    assert len(list(tmp_path.iterdir())) == 2
