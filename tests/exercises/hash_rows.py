"""Exercise 3: which rows of the codebooks make up an embedding (Eq. 9 to 11)."""
import torch

from .common import Claim, Picture, compare

TITLE = "rows of a hashed embedding"
PAPER = "App. B.3, Eq. 9 to 11"
EQUATION = """\
m_i(k) = ((a_i k) mod 2^32) >> (32 - r)        codebooks of 2^r rows
e(k)   = row m_0(k) of codebook 0, row m_1(k) of codebook 1, ... side by side"""
FILE = "autodecoder.py"
WRITE = ("HashEmbedding.row_indices", "HashEmbedding.forward")
TAKEN_OUT = ()
CHANGED = ()
MINUTES = 20
TASK = """\
self.a holds the a_i, (codebooks,) int64; self.shift is 32 - r; self.table is (codebooks, rows,
piece). All B objects and all codebooks at once: no loop is needed. forward picks pieces of
self.table, with the rows that row_indices names, and lays them side by side."""

NO_MODULO = "a_i k has up to 63 bits: of these, mod 2^32 leaves the lower 32, and is missing here"
LOW_BITS = ("those are the lower r of the 32 bits: >> (32 - r) keeps the upper ones, in which all "
            "bits of k have had a say")
WRONG_SHIFT = "shift by 32 - r, which is self.shift, so that r bits are left; not by r"
ORDER = ("pieces stand side by side, all numbers of piece 0 first, then piece 1: flatten "
         "(B, codebooks, piece)")
SAME_BOOK = "piece i comes from codebook i: index the table with [i, m_i], both at once"


# ---- Eq. 10 in Python's own numbers, which never overflow ----------------------------------------
def by_hand(given, modulo=2**32, shift=None, low=False):
    """m_i(k) of all objects and codebooks. Mistakes: another modulo or shift, the lower bits."""
    bits = given["bits"]
    shift = 32 - bits if shift is None else shift
    rows = []
    for k in given["k"].tolist():
        row = []
        for a in given["a"].tolist():
            product = a * k % modulo
            row.append(product % 2**bits if low else product >> shift)
        rows.append(row)
    return torch.tensor(rows).double()


def rows_in(given, answer):
    """The rows, also of those who have them the other way round: that is one claim's matter."""
    rows = answer["rows"]
    if tuple(rows.shape) == (len(given["a"]), len(given["k"])):
        return rows.T
    return rows


def mistakes_of(given):
    """What the likely mistakes come out as, and what is to be said of each."""
    return [(by_hand(given, modulo=2**70), NO_MODULO),
            (by_hand(given, modulo=2**31), "mod 2^32, not 2^31: as a mask 0xFFFFFFFF"),
            (by_hand(given, shift=given["bits"]), WRONG_SHIFT),
            (by_hand(given, low=True), LOW_BITS)]


def embedding(autodecoder, given):
    """Asks both functions: an embedding with a table that is given."""
    codebooks = len(given["a"])
    piece = given["table"].shape[-1]
    hashed = autodecoder.HashEmbedding(100, codebooks * piece, codebooks, 2**given["bits"])
    hashed.a = given["a"]
    hashed.table.data = given["table"]
    rows = hashed.row_indices(given["k"])
    answer = {"rows": rows}
    if given["with_pieces"]:
        answer["e"] = hashed(given["k"]).detach()
    return answer


def make(generator, k, bits, with_pieces=False, codebooks=5):
    """What is given: objects k, odd multipliers of 32 bits, a table."""
    a = 2**31 + 2 * torch.randint(2**30, (codebooks,), generator=generator) + 1
    table = torch.randn(codebooks, 2**bits, 3, generator=generator)
    return {"k": k, "a": a, "bits": bits, "table": table, "with_pieces": with_pieces}


def object_one(generator):
    return make(generator, torch.tensor([1]), bits=10)


def judge_object_one(given, answer):
    """a_i times 1 is under 2^32 by itself: only the shift counts."""
    hint = "object 1: m_i = a_i >> (32 - r), the upper r of 32 bits"
    return compare(rows_in(given, answer), by_hand(given), hint, mistakes_of(given), 1e-9)


def many_objects(generator):
    """As many as the paper has at most: products of 50 bits."""
    k = torch.randint(2, 300_000, (40,), generator=generator)
    return make(generator, k, bits=8)


def judge_many_objects(given, answer):
    hint = "take a_i k, then mod 2^32, then >> (32 - r), in this order, in int64"
    return compare(rows_in(given, answer), by_hand(given), hint, mistakes_of(given), 1e-9)


def judge_shape(given, answer):
    """Shape and type; and that rows differ at all."""
    rows = answer["rows"]
    if rows.shape == (5, 40):
        return "that is (codebooks, B): a row of the result is an object, k[:, None]"
    if rows.shape != (40, 5):
        return f"a row for each object and each codebook, (40, 5) here, not {tuple(rows.shape)}"
    if rows.dtype != torch.int64:
        return f"rows index a table: int64, not {rows.dtype}"
    if len(rows.unique()) < 10:
        return "40 objects in 5 codebooks of 256 rows: hardly any two rows should be the same"
    return ""


def large_numbers(generator):
    """Products of 62 bits, which floats would round."""
    k = 2**30 + torch.randint(2**30, (30,), generator=generator)
    return make(generator, k, bits=15)


def judge_large_numbers(given, answer):
    hint = "with k up to 2^31 the product has 63 bits: int64 holds it, floats and int32 do not"
    return compare(rows_in(given, answer), by_hand(given), hint, mistakes_of(given), 1e-9)


def pieces(generator):
    """Of objects 0 and 1, whose rows are there whatever became of mod 2^32."""
    k = torch.tensor([0, 1, 1, 0, 1, 0])                 # rows are there, mod 2^32 or not
    return make(generator, k, bits=4, with_pieces=True)


def judge_pieces(given, answer):
    """Judged by the student's own rows, right or wrong."""
    rows = answer["rows"]
    right, of_first = [], []
    for b in range(6):
        right.append(torch.stack([given["table"][i, rows[b, i]] for i in range(5)]))
        of_first.append(torch.stack([given["table"][0, rows[b, i]] for i in range(5)]))
    right = torch.stack(right)                           # (B, codebooks, piece)
    of_first = torch.stack(of_first).flatten(1)
    mistakes = [(right.transpose(1, 2).flatten(1), ORDER), (of_first, SAME_BOOK)]
    hint = "e is (B, dim): for each object the pieces table[i, m_i], side by side"
    return compare(answer["e"], right.flatten(1), hint, mistakes)


CLAIMS = (
    Claim(1, "there is a row for each object and codebook, int64", many_objects, embedding,
          judge_shape),
    Claim(2, "of 32 bits the upper r are kept", object_one, embedding, judge_object_one),
    Claim(3, "products beyond 2^32 begin again at 0", many_objects, embedding,
          judge_many_objects),
    Claim(1, "the largest products are exact", large_numbers, embedding, judge_large_numbers),
    Claim(3, "piece i is row m_i of codebook i; pieces stand side by side", pieces, embedding,
          judge_pieces, "Rows are 0 to 2^r - 1, and self.table is (codebooks, rows, piece)"))


# ---- The picture: rows of the first objects ------------------------------------------------------
def first_objects(generator):
    return make(generator, torch.arange(48), bits=8, codebooks=48)


def draw(figure, given, answer):
    axes = figure.subplots()
    axes.imshow(answer["rows"].numpy(), vmin=0, vmax=255, interpolation="nearest")
    axes.set_xlabel("codebook i")
    axes.set_ylabel("object k")
    axes.set_title("m_i(k), of 256 rows: dark is 0, bright is 255", fontsize=9)


PICTURE = Picture(first_objects, embedding, draw)


# ---- Solutions that are wrong, and what must be said of them; and one that is right -------------
WRONG = (
    ("modulo = product & 0xFFFFFFFF", "modulo = product", NO_MODULO),
    ("return modulo >> self.shift", "return modulo & (2**(32 - self.shift) - 1)", LOW_BITS),
    ("return pieces.flatten(1) ", "return pieces.transpose(1, 2).flatten(1) ", ORDER))


def rows_by_division(self, k):
    columns = []
    for multiplier in self.a.tolist():
        wrapped = torch.remainder(k * multiplier, 2**32)
        columns.append(torch.div(wrapped, 2**self.shift, rounding_mode="floor"))
    return torch.stack(columns, dim=1)


def pieces_one_by_one(self, k):
    rows = self.row_indices(k)
    return torch.cat([codebook[rows[:, i]] for i, codebook in enumerate(self.table)], dim=-1)


UNUSUAL = {"HashEmbedding.row_indices": rows_by_division,
           "HashEmbedding.forward": pieces_one_by_one}


def same_rows(self, k):
    return torch.ones(len(k), len(self.a), dtype=torch.int64)


def same_embedding(self, k):
    return torch.zeros(len(k), self.table[:, 0].numel())


CONSTANT = {"HashEmbedding.row_indices": same_rows, "HashEmbedding.forward": same_embedding}
