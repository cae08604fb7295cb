"""Exercise 4: a residual block of the decoder (App. B.1): layers that fit, and ReLUs' places."""
import torch
import torch.nn.functional as F

from .common import Claim, Picture, compare, flaw

TITLE = "a residual block, and its shapes"
PAPER = "App. B.1"
EQUATION = """\
h = norm1(conv1(relu(x)))
h = norm2(conv2(relu(h)))
block(x) = shortcut(x) + h        (B, c_in, D, H, W) -> (B, c_out, D, H, W), or twice the sides"""
FILE = "autodecoder.py"
WRITE = ("ResidualBlock.__init__", "ResidualBlock.forward")
TAKEN_OUT = ()
CHANGED = ()
MINUTES = 25
TASK = """\
Checkpoints know the layers as conv1, conv2, norm1, norm2, shortcut: take these names.
- conv1, c_in to c_out: 3x3x3; with upsample, instead, nn.ConvTranspose3d of 4x4x4 and stride 2,
  which doubles the side. conv2, c_out to c_out: 3x3x3. Which padding keeps, or doubles, the side?
- norm1, norm2: NORMS[norm](c_out). A norm has a bias of its own: the convolutions need none.
- shortcut: a 1x1x1 convolution with bias, such as Pointwise above; where c_in = c_out, x
  itself (nn.Identity, say). With upsample, what comes out of it, in both cases, is enlarged by
  repetition (F.interpolate, nearest)."""

PADDING = "Do all sides fit? A 3x3x3 without padding takes one voxel away on each side"
NO_BIAS = "a norm follows, which takes any bias away and adds its own: bias=False"
BEHIND = ("a ReLU behind the sum leaves no negative numbers, not even in the latent, which must be "
          "bell-shaped: none there")
AFTER = "ReLUs stand in front of the convolutions, conv(relu(x)), not behind the norms"
IN_PLACE = ("the shortcut has to see x as it came, negative numbers too: relu before it, or in "
            "place (relu_, inplace=True), takes them away")
ENLARGE = "the shortcut is enlarged by repetition: mode='nearest', not interpolated"


# ---- The block, by functions alone ---------------------------------------------------------------
def by_hand(given, first=True, last=False, behind=False, spoilt=False, mode="nearest"):
    """What a block with these weights answers. Mistakes: no first ReLU, one after the last norm or
    behind the sum, a shortcut that sees relu(x), another way to enlarge it."""
    weights = {name: value.double() for name, value in given["weights"].items()}
    x = given["x"].double()

    def norm(h, name):
        return F.batch_norm(h, None, None, weights[f"{name}.weight"], weights[f"{name}.bias"], True)

    h = F.relu(x) if first else x
    if given["upsample"]:
        h = F.conv_transpose3d(h, weights["conv1.weight"], stride=2, padding=1)
    else:
        h = F.conv3d(h, weights["conv1.weight"], padding=1)
    h = F.relu(norm(h, "norm1"))
    h = norm(F.conv3d(h, weights["conv2.weight"], padding=1), "norm2")
    if last:
        h = F.relu(h)
    shortcut = F.relu(x) if spoilt else x
    if "shortcut.weight" in weights:
        shortcut = torch.einsum("oi,bidhw->bodhw", weights["shortcut.weight"], shortcut)
        shortcut = shortcut + weights["shortcut.bias"].view(-1, 1, 1, 1)
    if given["upsample"]:
        shortcut = F.interpolate(shortcut, scale_factor=2, mode=mode)
    return F.relu(shortcut + h) if behind else shortcut + h


def shapes_of_weights(given):
    """Names and shapes of what a checkpoint holds of a block."""
    c_in, c_out = given["c_in"], given["c_out"]
    shapes = {"conv1.weight": (c_out, c_in, 3, 3, 3), "conv2.weight": (c_out, c_out, 3, 3, 3)}
    if given["upsample"]:
        shapes["conv1.weight"] = (c_in, c_out, 4, 4, 4)
    for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
        shapes[name] = (c_out,)
    if c_in != c_out:
        shapes |= {"shortcut.weight": (c_out, c_in), "shortcut.bias": (c_out,)}
    return shapes


def make(generator, c_in, c_out, upsample, sides):
    """What is given: the sizes of a block, weights for it, an input."""
    given = {"c_in": c_in, "c_out": c_out, "upsample": upsample}
    given["x"] = torch.randn(2, c_in, *sides, generator=generator)
    weights = {}
    for name, shape in shapes_of_weights(given).items():
        weights[name] = 0.3 * torch.randn(shape, generator=generator)
    given["weights"] = weights
    return given


# ---- What is asked -------------------------------------------------------------------------------
def layers(autodecoder, given):
    """Which weights a block has."""
    block = autodecoder.ResidualBlock(given["c_in"], given["c_out"], given["upsample"])
    return {name: list(value.shape) for name, value in block.named_parameters()}


def forward(autodecoder, given):
    """What a block answers, with its own weights, or with those given where it has such."""
    block = autodecoder.ResidualBlock(given["c_in"], given["c_out"], given["upsample"])
    for name, value in block.named_parameters():
        if name in given["weights"] and given["weights"][name].numel() == value.numel():
            value.data = given["weights"][name].reshape(value.shape)
        else:
            value.data = torch.zeros_like(value)         # a bias that should not be there: no bias
    x = given["x"].clone()
    y = block(x).detach()
    return {"y": y, "x": x}


def same_sides(generator):
    """Three different sides: exchanged axes would be seen."""
    return make(generator, 4, 3, False, (3, 4, 5))


def twice_the_sides(generator):
    return make(generator, 4, 3, True, (2, 3, 4))


def equal_channels(generator):
    """Where the shortcut has nothing to learn."""
    return make(generator, 4, 4, False, (3, 4, 5))


def judge_shape(given, answer):
    factor = 2 if given["upsample"] else 1
    sides = [factor * side for side in given["x"].shape[2:]]
    expected = (2, given["c_out"], *sides)
    if tuple(answer["y"].shape) != expected:
        return f"{tuple(given['x'].shape)} should become {expected}, not {tuple(answer['y'].shape)}"
    problem = flaw(answer["y"], expected)
    if not problem and answer["y"].std() < 1e-3:
        problem = "the answer is the same everywhere, whatever goes in"
    return problem


def judge_layers(given, answer):
    """By name and shape, as a checkpoint has them; a matrix may be a convolution of 1x1x1."""
    for name, shape in shapes_of_weights(given).items():
        if name not in answer:
            return f"there is no {name}: the layers are conv1, conv2, norm1, norm2 and shortcut"
        found = [side for side in answer[name] if side != 1]         # 1x1x1 or a matrix: the same
        if found != list(shape):
            return f"{name} should have the shape {shape}, and has {tuple(answer[name])}"
    if "conv1.bias" in answer or "conv2.bias" in answer:
        return NO_BIAS
    return ""


def judge_identity(given, answer):
    if "shortcut.weight" in answer:
        return "where c_in = c_out the shortcut is x itself: nn.Identity(), nothing to learn"
    return judge_layers(given, answer)


def judge_forward(given, answer):
    """With weights that are given: what a block of its own would answer is anybody's guess."""
    right = by_hand(given)
    mistakes = [(by_hand(given, behind=True), BEHIND),
                (by_hand(given, first=False, behind=True), BEHIND),
                (by_hand(given, first=False, last=True), AFTER),
                (by_hand(given, first=False), AFTER),
                (by_hand(given, spoilt=True), IN_PLACE)]
    if given["upsample"]:
        mistakes.append((by_hand(given, mode="trilinear"), ENLARGE))
    hint = "with given weights another answer is expected: shortcut(x) + norm2(conv2(relu(...)))"
    return compare(answer["y"], right, hint, mistakes, 1e-3)


CLAIMS = (
    Claim(2, "3x3x3 convolutions keep the sides", same_sides, forward, judge_shape, PADDING),
    Claim(2, "with upsample all sides double", twice_the_sides, forward, judge_shape, PADDING),
    Claim(2, "the layers have their names, shapes and biases", same_sides, layers, judge_layers),
    Claim(1, "where c_in = c_out the shortcut is x itself", equal_channels, layers,
          judge_identity),
    Claim(2, "with given weights the answer is h + shortcut", same_sides, forward, judge_forward,
          PADDING),
    Claim(1, "... and so it is where sides double", twice_the_sides, forward, judge_forward,
          PADDING))


# ---- The picture: a ball goes in -----------------------------------------------------------------
def ball(generator):
    given = make(generator, 4, 3, True, (12, 12, 12))
    middles = (2 * torch.arange(12) + 1) / 12 - 1
    z, y, x = torch.meshgrid(middles, middles, middles, indexing="ij")
    inside = ((x - 0.2)**2 + y**2 + z**2 < 0.4).float() - 0.3
    given["x"] = torch.stack([inside, -inside, x * inside, y * inside])[None].repeat(2, 1, 1, 1, 1)
    return given


def draw(figure, given, answer):
    middle = answer["y"][0, :, 12]
    for channel, axes in enumerate(figure.subplots(1, 3)):
        axes.imshow(middle[channel].numpy(), vmin=-1, vmax=1, cmap="coolwarm")
        axes.set_axis_off()
        axes.set_title(f"channel {channel}", fontsize=9)


PICTURE = Picture(ball, forward, draw)


# ---- Solutions that are wrong, and what must be said of them; and one that is right -------------
WRONG = (
    ("        return shortcut + h\n\n\nclass SelfAttention",
     "        return F.relu(shortcut + h)\n\n\nclass SelfAttention", BEHIND),
    ("h = self.norm1(self.conv1(F.relu(x)))", "h = self.norm1(self.conv1(F.relu_(x)))", IN_PLACE),
    ("self.conv2 = nn.Conv3d(c_out, c_out, 3, padding=1, bias=False)",
     "self.conv2 = nn.Conv3d(c_out, c_out, 3, padding=1)", NO_BIAS))


def block_of_convolutions(self, c_in, c_out, upsample=False, norm="batch"):
    super().__init__()
    self.upsample = upsample
    first = nn.Conv3d(c_in, c_out, (3, 3, 3), padding="same", bias=False)            # noqa: F821
    if upsample:
        first = nn.ConvTranspose3d(c_in, c_out, 4, 2, 1, bias=False)                 # noqa: F821
    self.conv1 = first
    self.conv2 = nn.Conv3d(c_out, c_out, (3, 3, 3), padding="same", bias=False)      # noqa: F821
    self.norm1, self.norm2 = NORMS[norm](c_out), NORMS[norm](c_out)                  # noqa: F821
    self.shortcut = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Sequential()  # noqa: F821


def forward_by_repetition(self, x):
    y = x
    for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
        y = norm(conv(y.clamp(min=0)))
    if self.upsample:                                    # first enlarged, then convolved
        for axis in (2, 3, 4):
            x = x.repeat_interleave(2, dim=axis)
    return y + self.shortcut(x)


UNUSUAL = {"ResidualBlock.__init__": block_of_convolutions,
           "ResidualBlock.forward": forward_by_repetition}


def no_layers(self, c_in, c_out, upsample=False, norm="batch"):
    super().__init__()
    self.c_out = c_out


def zeros(self, x):
    return x.new_zeros(len(x), self.c_out, *x.shape[2:])


CONSTANT = {"ResidualBlock.__init__": no_layers, "ResidualBlock.forward": zeros}
