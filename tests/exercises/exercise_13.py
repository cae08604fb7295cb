"""Exercise 13: a reader for a layout that data.py does not know.

Somebody has photographed one object on a turntable, and tells how the files lie:

    MUG/frames/0001.png ...   square photos, all of one side, RGBA: alpha is the mask, 255 inside.
                              Colours outside of the mask are whatever the camera saw.
    MUG/cameras.csv           a heading line, then a line for each photo, in any order:

        frame,azimuth,elevation,distance,focal
        0002,350.5,20.0,3.5,96.0
        0001,10.5,20.0,3.5,96.0

    frame       name of the photo, without .png
    azimuth     degrees; 0 is in front; the object was turned: at 90 the camera stands at -x
    elevation   degrees above the horizon
    distance    of the camera from the middle of the object, which it looks at, in world units
    focal       focal length in pixels of the photo; the lens looks through the photo's middle
"""
import csv
from pathlib import Path

import imageio.v3 as iio
import torch
import torch.nn.functional as F

from data import Frames
from render import orbit


def load_turntable(folder, size):
    """The photos of such a folder as data.Frames, frames sorted by their names.

    folder  MUG above; its name is the object's
    size    side of the pictures to return; the photos' side is a multiple of it. A pixel is the
            mean of colour x mask over its square, rounded: what is outside of the mask is not seen
    returns Frames of one object, none of them held out; cameras in render.py's conventions
    """
    folder = Path(folder)
    with open(folder / "cameras.csv", newline="", encoding="utf8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["frame"])
    photos, cameras, intrinsics = [], [], []
    for row in rows:
        photo = torch.from_numpy(iio.imread(folder / "frames" / f"{row['frame']}.png"))
        photos.append(photo.permute(2, 0, 1).float() / 255)              # (4, side, side)
        azimuth = -torch.deg2rad(torch.tensor(float(row["azimuth"])))
        elevation = torch.deg2rad(torch.tensor(float(row["elevation"])))
        cameras.append(orbit(azimuth, elevation, float(row["distance"])))
        focal = float(row["focal"]) / len(photo)
        intrinsics.append([focal, focal, 0.5, 0.5])
    photos = torch.stack(photos)
    colour = photos[:, :3] * photos[:, 3:]
    pictures = F.interpolate(torch.cat([colour, photos[:, 3:]], 1), size=(size, size), mode="area")
    pictures = (pictures * 255).round().byte().permute(0, 2, 3, 1)       # (V, size, size, 4)
    n_frames = len(rows)
    return Frames(
        images=pictures[..., :3], masks=pictures[..., 3], cam2world=torch.stack(cameras),
        intrinsics=torch.tensor(intrinsics), heldout=torch.zeros(n_frames, dtype=torch.bool),
        object_index=torch.zeros(n_frames, dtype=torch.int64), names=[folder.name])
