"""Are the tests any good? Wrong lines, one at a time, each of which some test must catch.

    python tests/mutants.py                 all of them, three hours or so on one core
    python tests/mutants.py render train    those of these files
    python tests/mutants.py --list          which there are

A mutant is (file, right, wrong): `right` stands exactly once in the file, and is replaced by
`wrong` in a copy of the project, where the tests of that module then run, quick ones first, up to
the first that fails. A mutant survives if they all pass: then something is untested. The right
answer to a survivor is a test, not to take the mutant out.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ["render", "data", "autodecoder", "normalize", "diffusion", "sample", "train"]
# Tests of a module: its own file is enough for all of them.
TESTS = {name: [f"tests/test_{name}.py"] for name in FILES}
TESTS["train"].append("tests/test_many.py")
SECONDS = 1800                               # a mutant that hangs counts as caught after that long

# Wrong lines that a tired programmer could have written: all of them run, and all matter.
MUTANTS = [
    # ---- render.py: one ray, cameras, voxels, what moves
    ("render", "F.pad(tau_through[..., :-1], (1, 0))", "tau_through"),
    ("render", "stopped = -torch.expm1(-tau)", "stopped = 1 - torch.exp(-tau)"),
    ("render", "weights = T * stopped", "weights = stopped"),
    ("render", "v, u = torch.meshgrid", "u, v = torch.meshgrid"),
    ("render", "y = -(v - cy) / fy", "y = (v - cy) / fy"),
    ("render", "centres = (pixels + 0.5) / size", "centres = pixels / size"),
    ("render", "near = enters.amax(-1)", "near = enters.amin(-1)"),
    ("render", "F.grid_sample(volume, grid, align_corners=False)",
     "F.grid_sample(volume, grid, align_corners=True)"),
    ("render", "for axis in (4, 3, 2):", "for axis in (2, 3, 4):"),
    ("render", "normal = F.normalize(-inwards, dim=-1)", "normal = F.normalize(inwards, dim=-1)"),
    ("render", 'padding_mode="border"', 'padding_mode="zeros"'),
    ("render", "torch.maximum(volumes, torch.maximum(before, after))",
     "torch.maximum(volumes, before)"),
    ("render", "return full | vanished[:, None, None, None]", "return full"),
    ("render", "for axis in (2, 1, 0):", "for axis in (0, 1, 2):"),
    ("render", "values[seen] = sample_volume(volume[b:b + 1]",
     "values[seen] = sample_volume(volume[:1]"),
    ("render", "turned = vectors @ rotation ", "turned = vectors @ rotation.mT "),
    ("render", "box_interval(o.detach(), d.detach())", "box_interval(o, d)"),
    ("render", "cam2world @ torch.linalg.inv(front) @ turned",
     "cam2world @ turned @ torch.linalg.inv(front)"),

    # ---- data.py: made-up objects, photos into the cube, clips
    ("data", "pose = np.linalg.inv(world2cam) @ FLIP", "pose = world2cam @ FLIP"),
    ("data", "down, right, back, position, (height, width, f) = columns",
     "right, down, back, position, (height, width, f) = columns"),
    ("data", "intrinsics[:, 2:] -= corners.numpy()", "intrinsics[:, 2:] += corners.numpy()"),
    ("data", "window[:, :3] *= window[:, 3:] / 255", "window[:, 3:] *= 1"),
    ("data", "poses[:, :3] = turn @ poses[:, :3]", "poses[:, :3] = turn.T @ poses[:, :3]"),
    ("data", "azimuth = torch.from_numpy(np.radians(degrees)) ",
     "azimuth = torch.from_numpy(np.radians(-degrees)) "),
    ("data", "poses = moves[:, p].inverse() @ cam2world", "poses = moves[:, p] @ cam2world"),
    ("data", "still, raise_left)", "still, -raise_left)"),
    # ... and load, find, load_for
    ("data", "return (number + 1) % holdout == 0", "return number % holdout == 0"),
    ("data", "last_of(number, views[object_index], holdout)", "every_nth(number, holdout)"),
    ("data", ">= n_views - n_views // holdout", "> n_views - n_views // holdout"),
    ("data", "synthetic_object(one.origin, seed, n_views, size, arc)",
     "synthetic_object(one.origin, 0, n_views, size, arc)"),
    ("data", "puppet_object(one.origin, seed, n_views, size, shared_colours)",
     "puppet_object(one.origin, seed, n_views, size)"),
    ("data", 'reading = Reading(size, "", as_clips, clip_filter, max_megapixels, max_frames)',
     'reading = Reading(size, "", as_clips, False, max_megapixels, max_frames)'),
    ("data", "rgba = resample(photos, corners.tolist(), side, size) ",
     "rgba = resample(photos, corners.tolist(), side, 64) "),
    ("data", "settings.objects, settings.arc, settings.shared_colours",
     "settings.objects, 0.0, settings.shared_colours"),
    ("data", "load(source, settings.size, settings.holdout, settings.seed,",
     "load(source, settings.size, settings.seed, settings.holdout,"),
    ("data", "for number in sorted(photos):", "for number in sorted(photos, key=str):"),
    ("data", "else path.relative_to(root).as_posix()", "else path.stem"),
    ("data", "found = find_photos(folder, folder, reading)\n", "found = []\n"),
    # ... and what people bring
    ("data", "if not path.name.startswith(\".\") and (path.is_file()",
     "if (path.is_file()"),
    ("data", "turned in (6, 8) and fits(", "turned in (6, 8) and not fits("),
    ("data", "x, y = (0, 1) if upright else EXIF_UP[turned]", "x, y = (0, 1)"),
    ("data", "6: (-1, 0), 8: (1, 0)}", "6: (1, 0), 8: (-1, 0)}"),
    ("data", "return str(listed).replace(\"\\\\\", \"/\")", "return str(listed)"),
    ("data", "inside = alpha if has_mask(mask) else", "inside = alpha if False else"),
    ("data", "models.sort(key=lambda model: len(model[1]), reverse=True)",
     "models.sort(key=lambda model: len(model[1]))"),
    ("data", "poses[:, :3, 3] -= centre", "poses[:, :3, 3] -= 0 * centre"),
    ("data", "often_seen = in_frames > 0.5 * n_views",
     "often_seen = in_frames >= 0.5 * n_views"),
    ("data", "in_photo = ((uv >= left_top) & (uv < right_bottom)).all(1)",
     "in_photo = ((uv >= 0) & (uv < 1)).all(1)"),
    ("data", "others = is_solid(in_frames - in_frame.float(),",
     "others = is_solid(in_frames,"),
    ("data", "wrong = agreement < 0.6 * agreement.median()", "wrong = agreement < 0"),
    ("data", "rgb = rgb + one[..., :3] * inside", "rgb = rgb + one[..., :3] * 255.0"),
    ("data", "    camera = camera / factor\n", ""),
    ("data", "if height * width > reading.max_megapixels * 1e6:", "if height * width < 0:"),
    ("data", "if count > most:", "if count < 0:"),
    ("data", "decoder = ALPHA_DECODERS.get(told[\"codec\"], [])", "decoder = []"),
    ("data", "return names_once(found, reading)", "return found"),
    ("data", "for name, capture in zip(names, captures):\n            capture",
     "for name, capture in zip([one.name for one in chosen], captures):\n            capture"),
    ("data", "        if capture is not None:\n            yield",
     "        if True:\n            yield"),
    ("data", "return \", \".join(layouts), chosen[0].layout in MOVING",
     "return \", \".join(layouts), chosen[0].layout == PUPPETS"),
    ("data", "means.append(torch.cat([images, masks], 1).mean(0))",
     "means.append(torch.cat([images, images], 1).mean(0))"),
    # ... and caches
    ("data", "frames = frames[self.heldout[first:behind] == heldout]",
     "frames = frames[self.heldout[:len(frames)] == heldout]"),
    ("data", "mapped.madvise(mmap.MADV_DONTNEED)", "mapped.madvise(mmap.MADV_NORMAL)"),
    ("data", "st_size == n_bytes and hash_of(path) == its_hash", "st_size == n_bytes"),
    ("data", "is_sealed = about[\"own_hash\"] == hash_of_plain(about)",
     "is_sealed = \"own_hash\" in about"),
    ("data", "offset += flat.nbytes", "offset += len(flat)"),
    ("data", "number_frames(views[numbers].tolist(), holdout,",
     "number_frames(views[:len(numbers)].tolist(), holdout,"),
    ("data", "known_portraits=known_portraits[numbers]", "known_portraits=known_portraits"),
    ("data", "captions = [about[\"captions\"][k] for k in numbers]",
     "captions = about[\"captions\"]"),
    ("data", "return load_cache(Path(source), reading, holdout, objects)",
     "return load_cache(Path(source), reading, 6, objects)"),
    ("data", "return [Found(name, about[\"layout\"], k)", "return [Found(name, COIL, k)"),
    ("data", "return dict(zip(about[\"names\"], about[\"captions\"]))", "return {}"),
    ("data", "        if asked != made:\n", "        if asked is None:\n"),
    ("data", "if needed > free and n_written", "if free < 0 and n_written"),
    ("data", "        look_at_objects(names, contents, captions, reading)",
     "        look_at_objects(names, contents, names, reading)"),
    ("data", "if path.name not in (FRAMES, ABOUT)]", "if path.name in (FRAMES, ABOUT)]"),

    # ---- autodecoder.py: decoder, losses, hashing, poses, what moves
    ("autodecoder", "return shortcut + h", "return F.relu(shortcut + h)"),
    ("autodecoder", "true = F.avg_pool2d(true, 2)", "true = true[..., ::2, ::2]"),
    ("autodecoder", "return (occupancy - mask).abs().mean()",
     "return (occupancy - mask).square().mean()"),
    ("autodecoder", "channels=settings.channels", "channels=settings.embed_dim"),
    ("autodecoder", "return modulo >> self.shift", "return modulo % self.table.shape[1]"),
    ("autodecoder", "x = (image - self.mean) / self.std", "x = image"),
    ("autodecoder", "torch.linalg.cross(Z.expand_as(a), a)",
     "torch.linalg.cross(a, Z.expand_as(a))"),
    ("autodecoder", "is_second = error2 < error1", "is_second = error2 > error1"),
    ("autodecoder", "across = heat.sum(-2)", "across = heat.sum(-1)"),
    ("autodecoder", "seen = u - self.mean_points(u, settled) + default",
     "seen = u - self.mean_points(u, settled)"),
    ("autodecoder", "if settled or not self.training:", "if not self.training:"),
    ("autodecoder", "back = found @ A[:, :, :2].mT", "back = found @ A[:, :, :2]"),
    ("autodecoder", "grown = x[:, :1] * self.growth", "grown = x[:, :1]"),
    ("autodecoder", "return F.relu(0.5 - used * parts).mean()",
     "return F.relu(used * parts - 0.5).mean()"),

    # ---- normalize.py
    ("normalize", "return median, 0.7413 * (q75 - q25)", "return median, q75 - q25"),
    ("normalize", "return median, 0.7413 * (q75 - q25)",
     "return rows.mean(1), 0.7413 * (q75 - q25)"),
    ("normalize", "return (latents - self.m) / self.s * self.spread",
     "return (latents - self.m) / self.s"),
    ("normalize", "return latents_hat / self.spread * self.s + self.m",
     "return latents_hat * self.s + self.m"),
    ("normalize", "rows = latents.transpose(0, 1).flatten(1)",
     "rows = latents.reshape(latents.shape[1], -1)"),
    ("normalize", "[0.25, 0.5, 0.75]", "[0.05, 0.5, 0.95]"),
    ("normalize", "return rows.mean(1), rows.std(1)", "return rows.mean(1), rows.var(1)"),
    ("normalize", "settings.per_channel, settings.latent_scale)", "settings.per_channel)"),

    # ---- diffusion.py: preconditioning, loss, sampler, average, text
    ("diffusion", "c_skip = sigma_data**2 / total", "c_skip = sigma**2 / total"),
    ("diffusion", "c_out = sigma * sigma_data / total.sqrt()", "c_out = sigma / total.sqrt()"),
    ("diffusion", "/ (sigma * sigma_data)**2", "/ (sigma * sigma_data)"),
    ("diffusion", "i / max(1, steps - 1)", "i / steps"),
    ("diffusion", "x_next = noise.double() * sigmas[0]", "x_next = noise.double()"),
    ("diffusion", "added = math.sqrt(sigma_hat**2 - sigma**2)", "added = sigma_hat - sigma"),
    ("diffusion", "gamma = min(S_churn / steps, math.sqrt(2) - 1)", "gamma = S_churn / steps"),
    ("diffusion", "slope = (x_hat - denoised) / sigma_hat", "slope = (x_hat - denoised) / sigma"),
    ("diffusion", "x_next = x_hat + (sigma_next - sigma_hat) * (slope",
     "x_next = x_next + (sigma_next - sigma_hat) * (slope"),
    ("diffusion", "averaged.lerp_(current, 1 - decay)", "averaged.lerp_(current, decay)"),
    ("diffusion", "half_life = min(half_life, 0.1 * step)", "half_life = min(half_life, step)"),
    ("diffusion", "self.norm2(h) * (1 + scale) + shift", "self.norm2(h) * scale + shift"),
    ("diffusion", "sigma_data=settings.sigma_data,\n                   context_dim", "context_dim"),
    ("diffusion", "return without + weight * (with_text - without)",
     "return with_text + weight * (with_text - without)"),

    # ---- sample.py: every number arrives where it belongs
    ("sample", 'f"{name} {seed}"', 'f"{name}"'),
    ("sample", 'settings = SimpleNamespace(**second["settings"])',
     'settings = SimpleNamespace(**first["settings"])'),
    ("sample", 'stream(seed, f"churn {first + i}")', 'stream(seed, f"churn {i}")'),
    ("sample", "S_churn=churn,", ""),
    ("sample", "latents.append(trained.normalizer.denormalize(latent_hat.float()))",
     "latents.append(latent_hat.float())"),
    ("sample", 'orbit(float(azimuth), trained.view["elevation"], distance)',
     'orbit(float(azimuth), -trained.view["elevation"], distance)'),
    ("sample", "return rgb + 1 - occupancy", "return rgb + occupancy"),
    ("sample", "azimuths = torch.linspace(0, 2 * math.pi, FRAMES + 1)[:-1]",
     "azimuths = torch.linspace(0, 2 * math.pi, FRAMES)"),
    ("sample", 'if content_digest(checkpoint) != checkpoint["digest"]:',
     'if not checkpoint["digest"]:'),
    ("sample", "for name in sorted(value, key=repr):", "for name in value:"),
    ("sample", "if not are_same(portraits(dataset), trained.portraits[k:k + 1]):", "if False:"),
    ("sample", "if dataset.names != trained.names or not are_same(portraits(dataset), "
     "trained.portraits):", "if dataset.names != trained.names:"),
    ("sample", "latents = sample_latents(trained, noise, steps, churn, seed) ",
     "latents = sample_latents(trained, noise, steps, churn) "),
    ("sample", 'if second["decoder"] != first["fingerprint"]:', 'if not second["decoder"]:'),
    ("sample", "e = autodecoder.eval().embed(k)", "e = autodecoder.embed(k)"),
    ("sample", "trained.data_settings = settings", "trained.data_settings = trained.settings"),
    ("sample", 'if kind == "normal":', 'if kind == "fitted":'),
    ("sample", "guided(trained.text_denoiser, context, null, guidance)",
     "guided(trained.text_denoiser, context, null, 1)"),
    ("sample", "noise[chunk], steps, churn, seed, first=first)",
     "noise[chunk], steps, churn, seed)"),
    ("sample", "azimuth, distance, trained.view[\"elevation\"])", "azimuth, distance)"),
    ("sample", "intrinsics = dataset.intrinsics[frames, None].to(trained.device)",
     "intrinsics = dataset.intrinsics[:len(frames), None].to(trained.device)"),
    ("sample", "heldout = torch.nonzero(dataset.heldout)[:, 0]",
     "heldout = torch.nonzero(~dataset.heldout)[:, 0]"),
    ("sample", "return heldout[order[:most].sort().values]", "return heldout[:most]"),
    ("sample", "module.train(mode)", "module.train()"),
    ("sample", "likest = training_volumes[index.to(trained.device)]",
     "likest = training_volumes[:len(index)]"),
    ("sample", "latents = trained.normalizer.denormalize(denoised.float())",
     "latents = denoised.float()"),
    ("sample", "return (mixed / angle.sin()).float()", "return torch.lerp(a, b, t).float()"),
    ("sample", "sample_prompt(trained, noise, steps, 0.0, 0, prompt, guidance)",
     "sample_prompt(trained, noise, steps, 0.0, 0)"),
    ("sample", "settings.clip_filter = False", "settings.holdout = 0"),
    ("sample", "render_any_views(trained, volume, [0.0], SIDE, pose=pose)",
     "render_any_views(trained, volume, [0.0], SIDE)"),
    ("sample", "level = math.log(2) * side / 2", "level = math.log(2)"),
    ("sample", "points = zyx.flip(-1).float()", "points = zyx.float()"),
    ("sample", "red, green, blue = colour", "blue, green, red = colour"),
    ("sample", '"churn": settings.churn', '"churn": 40.0'),
    ("sample", "torch.tensor([args.identity], device=device)", "torch.tensor([0], device=device)"),
    ("sample", "open_run(args.run, device,", 'open_run(args.run, "cpu",'),
    # ... and the page of a run
    ("sample", 'alt="{html.escape(alt)}"', 'alt="{alt}"'),
    ("sample", "<figcaption>{html.escape(words)}", "<figcaption>{words}"),
    ("sample", "azimuth = first_azimuth(trained) + math.radians(degrees)",
     "azimuth = first_azimuth(trained) - math.radians(degrees)"),
    ("sample", "pose = t * len(trained.poses) // ORBIT", "pose = 0"),
    ("sample", "if next(calls) / 2 in shown:", "if next(calls) in shown:"),
    ("sample", "return sample_latents(watched, noise, steps, churn, seed), way",
     "return sample_latents(watched, noise, steps, churn), way"),
    ("sample", "for latent_hat in (held, believed):", "for latent_hat in (believed, held):"),
    ("sample", "object_index=k[dataset.object_index]", "object_index=dataset.object_index"),
    ("sample", "torch.cat([on_white(images, masks), on_white(rgb, occupancy)], -2)",
     "torch.cat([on_white(rgb, occupancy), on_white(images, masks)], -2)"),
    ("sample", "return 140 - 120 * (number - ticks[0])", "return 20 + 120 * (number - ticks[0])"),
    ("sample", "return (Path(args.run) / \"stage2.pt\").exists()", "return True"),

    # ---- train.py: the loops, and all that is wired around them
    ("train", '["lr"] = settings.lr_stage1 * (1 - share)\n        # PAPER',
     '["lr"] = settings.lr_stage1\n        # PAPER'),
    ("train", "share = state.step / settings.steps_stage1\n        state.optimizer",
     "share = state.step / settings.steps_stage2\n        state.optimizer"),
    ("train", "frames_of(object_number, heldout=False)", "frames_of(object_number)"),
    ("train", "state.order = state.order[settings.objects_per_step:]",
     "state.order = state.order[1:]"),
    ("train", 'sample.stream(settings.seed, "stage 1")', 'sample.stream(0, "stage 1")'),
    ("train", "settings.foreground_weight * foreground", "settings.perceptual_weight * foreground"),
    ("train", "torch.asin(position[:, 1] / distance)", "torch.asin(position[:, 2] / distance)"),
    ("train", "latents=normalizer.normalize(latents)", "latents=latents"),
    ("train", "edm_loss(state.model, state.latents[k], settings.sigma_data,",
     "edm_loss(state.model, state.latents[k], settings.latent_scale,"),
    ("train", "edm_loss(state.model, state.latents[k], settings.sigma_data,\n"
     "                                  state.generator, settings.P_mean, settings.P_std)",
     "edm_loss(state.model, state.latents[k], settings.sigma_data, state.generator)"),
    ("train", '"ema": state.average.state_dict()', '"ema": state.model.state_dict()'),
    ("train", "load_synthetic(settings.size, settings.holdout, settings.seed,",
     "load_synthetic(settings.size, settings.seed, settings.holdout,"),
    ("train", "torch.manual_seed(settings.seed)                              # initial weights",
     "torch.manual_seed(0)                              # initial weights"),
    ("train", "centre = (intrinsics[..., 2:] * size - corner) / side",
     "centre = intrinsics[..., 2:]"),
    ("train", "focal = float(dataset.intrinsics[:, 0].median())", "focal = settings.focal"),
    ("train", "rests = share < begin / 8 or begin <= share < end", "rests = False"),
    ("train", "settings.detail[2 * i], settings.detail[2 * i + 1]",
     "settings.detail[i], settings.detail[i + 1]"),
    ("train", "pictures[::views], points2d[::views]", "pictures[:views], points2d[:views]"),
    ("train", ' + 0.5 * losses["distance"]', ""),
    ("train", "for group in state.optimizer.param_groups:",
     "for group in state.optimizer.param_groups[:1]:"),
    ("train", "dataset.batch(dataset.frames_of(k, heldout=True), size)",
     "dataset.batch(dataset.frames_of(k, heldout=False), size)"),
    ("train", "tokens, mask = caption_tokens(state, k)",
     "tokens, mask = state.encode([state.captions[i] for i in k.tolist()])"),
    ("train", "generator=state.generator) < TEXT_DROPOUT",
     "generator=state.generator) > TEXT_DROPOUT"),
    ("train", "edm_loss(denoise, state.latents[k], settings.sigma_data,",
     "edm_loss(denoise, state.latents[k], settings.latent_scale,"),
    ("train", "psnr = -10 * math.log10(", "psnr = -20 * math.log10("),
    ("train", "if not name.startswith(tuple(drop)):", "if name not in drop:"),
    ("train", "OF_SAMPLES if goes_on else ()", "()"),
    ("train", 'RUN_FILES = ("stage1.pt", "stage2.pt", "log.csv", "metrics.json")',
     'RUN_FILES = ("stage1.pt", "stage2.pt", "log.csv")'),
    ("train", "if due or stopping:\n            save_stage1(", "if due:\n            save_stage1("),
    ("train", 'self.losses = list(means["losses"])', "self.losses = []"),
    ("train", "while any(aside(folder / name, number).exists() for name in RUN_FILES):",
     "while aside(folder / RUN_FILES[0], number).exists():"),
    ("train", "if source_in(folder) in (None, source):", "if source_in(folder) is None:"),
    ("train", 'if not sample.are_same(old["portraits"], state.portraits):', "if False:"),
    ("train", "covered = covered + masks.sum((0, 1))", "covered = masks.sum((0, 1))"),
    ("train", "resume = args.resume and stage2_goes_on(args.out)", "resume = args.resume"),
    ("train", "keep_aside(folder, copied=RUN_FILES)", "keep_aside(folder, copied=RUN_FILES[:1])"),
    ("train", 'if args.data_given and source != first["source"]:',
     "if args.data_given and not source:"),
    ("train", "learning |= bytes_of_a_step(settings, n_objects)", "learning |= {}"),
    ("train", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
    ("train", "if (int(row[0]), int(row[1])) <= (stage, step)]", "if int(row[0]) <= stage]"),
    ("train", 'torch.set_rng_state(saved["global"])', "torch.get_rng_state()"),
    ("train", 'for name in fields_of(*groups) + ["seed"]:', "for name in fields_of(*groups):"),
    ("train", 'same_settings(settings, old["settings"], STAGE1_GROUPS, path)',
     'same_settings(settings, old["settings"], ("stage 1",), path)'),
    ("train", 'state.order = own["order"]', "state.order = state.order[:0]"),
    ("train", "frames = dataset.frames_of(0, heldout=False)", "frames = dataset.frames_of(0)"),
    ("train", "state, features, draw_coarse_to_fine,\n", "state, features, draw_photos,\n"),
    ("train", "render.render_skipping)", "render.render)"),
    ("train", "losses = self.read_losses()\n        ms", "losses = self.losses\n        ms"),
    ("train", "settings = dataclasses.replace(settings, **theirs)",
     "settings = dataclasses.replace(settings)"),
    ("train", "state.encode = encode or denoiser.text",
     "state.encode = encode or state.average.text"),
    ("train", "state.captions = captions", "state.captions = sorted(captions)"),
    ("train", 'if old["decoder"] != state.decoder:', 'if not old["decoder"]:'),
    ("train", 'sample.restore(lambda: state.average, old["ema"], path)',
     'sample.restore(lambda: state.average, old["model"], path)'),
    ("train", "settings.n_sheet, settings.sample_steps, settings.seed,",
     "settings.n_sheet, 64, settings.seed,"),
    ("train", "both = args.stage is None and n_objects > 1", "both = args.stage is None"),
    ("train", "first_sampling(settings, args.out, device)",
     'first_sampling(settings, args.out, "cpu")'),
    # ... and many processes
    ("train", "network.forward = averaging(network, inner, device)", "network.forward = inner"),
    ("train", 'name = f"{name} rank {rank()}"', 'name = f"{name}"'),
    ("train", "objects_per_step=settings.objects_per_step // processes()",
     "objects_per_step=settings.objects_per_step"),
    ("train", "batch_size=settings.batch_size // processes()", "batch_size=settings.batch_size"),
    ("train", "if value % processes():", "if value < processes():"),
    ("train", 'name = "cuda:" + os.environ["LOCAL_RANK"]', 'name = "cuda:" + os.environ["RANK"]'),
    ("train", "Learner(network, forward), forward_sync_buffers=False)",
     "Learner(network, forward))"),
    ("train", "return total / processes()", "return total"),
    ("train", "dist.all_reduce(asked_of_any, dist.ReduceOp.MAX)",
     "dist.broadcast(asked_of_any, 0)"),
    ("train", "    if due or asked:\n        state.others", "    if due:\n        state.others"),
    ("train", 'return old["others"][rank() - 1]', "return old"),
    ("train", "if n != processes():", "if n > processes():"),
    ("train", "if rank() == 0:\n            raise\n", "if rank() >= 0:\n            raise\n"),
    ("train", "if rank() > 0:\n            sys.exit(1)", "if rank() < 0:\n            sys.exit(1)"),
]


def copy_of_the_project(folder):
    """The tracked files, without runs and pictures."""
    for name in FILES:
        shutil.copy(ROOT / f"{name}.py", folder)
    shutil.copy(ROOT / "README.md", folder)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("*.png", "*.gif"))


def apply(folder, name, right, wrong):
    """Writes the mutant of one file; says so where `right` is not there exactly once."""
    path = folder / f"{name}.py"
    text = (ROOT / f"{name}.py").read_text()
    if text.count(right) != 1:
        raise SystemExit(f"{name}.py: {text.count(right)} places say {right!r}: this mutant is out "
                         "of date")
    path.write_text(text.replace(right, wrong))
    return path


def pytest_collection_modifyitems(items):
    """Called by pytest, which is_caught tells of this file: what trains or writes files is last."""
    slow = {"tmp_path", "tmp_path_factory", "as_it_is"}
    items.sort(key=lambda item: len(slow.intersection(item.fixturenames)))


def is_caught(folder, name):
    """Whether a test of the module fails in this copy."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
               "-p", "tests.mutants", *TESTS[name]]
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True,
                              timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return True
    if done.returncode > 2:                  # 1: a test failed; 2: so did a test file's import
        raise SystemExit(f"pytest itself failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode != 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help=f"of these only: {', '.join(FILES)}")
    parser.add_argument("--list", action="store_true", help="print them and stop")
    args = parser.parse_args()
    unknown = set(args.files) - set(FILES)
    if unknown:
        parser.error(f"no such file: {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in MUTANTS if not args.files or mutant[0] in args.files]
    if args.list:
        for name, right, wrong in chosen:
            print(f"{name}.py: {right!r} -> {wrong!r}")
        return
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        copy_of_the_project(folder)
        for name in dict.fromkeys(name for name, _, _ in chosen):
            if is_caught(folder, name):
                raise SystemExit(f"tests of {name}.py fail as it is, without any wrong line")
        for number, (name, right, wrong) in enumerate(chosen, 1):
            began = time.time()
            path = apply(folder, name, right, wrong)
            caught = is_caught(folder, name)
            shutil.copy(ROOT / f"{name}.py", path)
            survivors += not caught
            print(f"{number}/{len(chosen)} {'caught' if caught else 'SURVIVES'} {name}.py: "
                  f"{right!r} -> {wrong!r} ({time.time() - began:.0f} s)", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} wrong lines were caught")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
