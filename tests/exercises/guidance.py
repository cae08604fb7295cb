"""Exercise 10: classifier-free guidance (Sec. 3.3): further along the way from null to text."""
import torch

from .common import Claim, Picture, compare

TITLE = "guidance by a prompt"
PAPER = "Sec. 3.3, App. B.2"
EQUATION = "D(x) = D(x | null) + weight (D(x | text) - D(x | null))"
FILE = "diffusion.py"
WRITE = ("guided",)
TAKEN_OUT = ()
CHANGED = ()
MINUTES = 20
TASK = """\
Return a function denoise(x, sigma), for the sampler. In it the denoiser is called as
denoiser(x, sigma, tokens, mask), with as many prompts as x has objects: repeated(context, len(x))
makes them so, and null as well; both have as many tokens. You may ask the network in one call or in
two: two calls are five lines. The published solution does it in one, and leaves out what a weight
of 0 or 1 does not need."""

OTHER_WEIGHT = ("that is D(x | text) + weight (D(x | text) - D(x | null)): then weight 0 would be "
                "D(x | text); start from D(x | null)")
EXCHANGED = "text and null are exchanged: the way leads from null to text"
ONE_MASK = "null has a mask of its own: the tokens that are real differ from the prompt's"
ONE_TEXT = "D(x | null) is asked with null's tokens, not with the prompt's"


# ---- A denoiser that is a formula ----------------------------------------------------------------
def by_hand(given, weight=None, null_mask="null", null_tokens="null"):
    """What guidance answers. Mistakes: another weight, or null asked with the prompt's mask."""
    weight = given["weight"] if weight is None else weight
    x, sigma = given["x"].double(), given["sigma"]

    def denoised(tokens, mask):
        tokens, mask = given[tokens].double(), given[mask]
        heard = (tokens * mask[..., None]).sum(1)                        # (B or 1, width)
        return x / (1 + sigma) + torch.tanh(x + heard[:, :, None, None, None])

    text = denoised("text_tokens", "text_mask")
    null = denoised(f"{null_tokens}_tokens", f"{null_mask}_mask")
    return null + weight * (text - null)


def guided(diffusion, given):
    """Asks for a guided denoiser, and that one for an answer."""
    sizes = []

    def denoiser(x, sigma, tokens, mask):
        sizes.append(len(x))
        if not len(x) == len(tokens) == len(mask):
            raise ValueError(f"{len(x)} objects, {len(tokens)} prompts, {len(mask)} masks")
        heard = (tokens * mask[..., None]).sum(1)
        sigma = torch.as_tensor(sigma)
        if sigma.numel() != 1:
            raise ValueError(f"sigma should be the number that denoise is given, not {sigma}")
        return x / (1 + sigma) + torch.tanh(x + heard[:, :, None, None, None])

    context = given["text_tokens"], given["text_mask"]
    null = given["null_tokens"], given["null_mask"]
    denoise = diffusion.guided(denoiser, context, null, given["weight"])
    return {"D": denoise(given["x"], given["sigma"]), "sizes": sizes}


def make(generator, n_prompts, weight):
    """What is given: 4 objects, prompts of 6 tokens, of which two or three are real; null, one."""
    numbers = torch.rand(2, generator=generator).tolist()
    text_mask = torch.tensor([[True, True, True, False, False, False]]).repeat(n_prompts, 1)
    text_mask[0, 2] = False
    null_mask = torch.tensor([[True, False, False, False, False, False]])
    return {"x": torch.randn(4, 3, 2, 2, 2, generator=generator), "sigma": 0.5 + numbers[0],
            "text_tokens": torch.randn(n_prompts, 6, 3, generator=generator),
            "null_tokens": torch.randn(1, 6, 3, generator=generator),
            "text_mask": text_mask, "null_mask": null_mask,
            "weight": weight if weight is not None else 2 + 2 * numbers[1]}


def some_weight(generator):
    """Between 2 and 4, not the 3 of the paper."""
    return make(generator, 1, None)


def mistakes_of(given):
    """What the likely mistakes come out as, and what is to be said of each."""
    weight = given["weight"]
    return [(by_hand(given, weight + 1), OTHER_WEIGHT), (by_hand(given, 1 - weight), EXCHANGED),
            (by_hand(given, null_mask="text"), ONE_MASK),
            (by_hand(given, null_tokens="text", null_mask="text"), ONE_TEXT)]


def judge(given, answer):
    """The formula itself, for one prompt that all objects share."""
    hint = "D(x | null) + weight (D(x | text) - D(x | null))"
    return compare(answer["D"], by_hand(given), hint, mistakes_of(given))


def weight_one(generator):
    return make(generator, 1, 1.0)


def weight_zero(generator):
    return make(generator, 1, 0.0)


def judge_ends(given, answer):
    """At the two weights where nothing is extrapolated."""
    wanted, other = ("text", "null") if given["weight"] == 1 else ("null", "text")
    hint = f"weight {given['weight']:g} is D(x | {wanted}) alone"
    mistakes = [(by_hand(given, 1 - given["weight"]), f"{hint}, and this is D(x | {other})"),
                (by_hand(given, given["weight"] + 1), OTHER_WEIGHT)]
    return compare(answer["D"], by_hand(given), hint, mistakes)


def prompts_of_their_own(generator):
    """Four prompts for four objects, of different lengths."""
    return make(generator, 4, None)


def judge_own(given, answer):
    """By what is wrong in all claims alike, too: that is paid for above."""
    for outcome, _ in mistakes_of(given):
        if not compare(answer["D"], outcome, "no"):
            return ""
    first = dict(given, text_tokens=given["text_tokens"][:1], text_mask=given["text_mask"][:1])
    mistakes = [(by_hand(first), "object b listens to prompt b, not all to the first one")]
    hint = "B prompts for B objects: each object has its own"
    return compare(answer["D"], by_hand(given), hint, mistakes)


CLAIMS = (
    Claim(4, "between and beyond: null + weight (text - null)", some_weight, guided, judge),
    Claim(2, "weight 1: as the prompt alone", weight_one, guided, judge_ends),
    Claim(2, "weight 0: as no prompt", weight_zero, guided, judge_ends),
    Claim(2, "as many prompts as objects: each its own", prompts_of_their_own, guided, judge_own))


# ---- The picture: where guidance leads -----------------------------------------------------------
def three_places(generator):
    return {}


def guided_points(diffusion, given):
    """A world of two numbers: anything is at (0, 0) or so, what the prompt says near (1, 0.5)."""
    def denoiser(x, sigma, tokens, mask):
        wanted = (tokens * mask[..., None]).sum(1)[:, :, None, None, None]
        return 0.2 * x + wanted

    text = torch.tensor([[[1.0, 0.5], [9.0, 9.0]]]), torch.tensor([[True, False]])
    null = torch.tensor([[[0.0, 0.0], [9.0, 9.0]]]), torch.tensor([[True, False]])
    x = torch.randn(60, 2, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    answers = []
    for weight in (0, 1, 3, 6):
        denoise = diffusion.guided(denoiser, text, null, weight)
        answers.append(denoise(x, 1.0).flatten(1))
    return torch.stack(answers)


def draw(figure, given, answer):
    axes = figure.subplots()
    for weight, points in zip((0, 1, 3, 6), answer):
        axes.scatter(*points.T.numpy(), s=8, label=f"weight {weight}")
    axes.set_xlim(-2, 8)
    axes.set_ylim(-2, 5)
    axes.legend(fontsize=8, loc="upper left")
    axes.set_title("answers; the prompt alone says (1, 0.5)", fontsize=9)


PICTURE = Picture(three_places, guided_points, draw)


# ---- Solutions that are wrong, and what must be said of them; and one that is right -------------
WRONG = (
    ("return without + weight * (with_text - without)",
     "return with_text + weight * (with_text - without)", OTHER_WEIGHT),
    ("all_masks = torch.cat([mask, null_mask])", "all_masks = torch.cat([mask, mask])", ONE_MASK),
    ("with_text, without = both.chunk(2)", "without, with_text = both.chunk(2)", EXCHANGED))


def guided_by_two_calls(denoiser, context, null, weight):
    def ask(text, x, sigma):
        tokens, mask = text
        if len(tokens) < len(x):
            tokens = torch.cat([tokens] * len(x))
            mask = torch.cat([mask] * len(x))
        return denoiser(x, sigma, tokens, mask)

    def extrapolated(x, sigma):
        return torch.lerp(ask(null, x, sigma), ask(context, x, sigma), weight)

    return extrapolated


UNUSUAL = {"guided": guided_by_two_calls}


def constant(denoiser, context, null, weight):
    return lambda x, sigma: x * 0 + 0.5


CONSTANT = {"guided": constant}
