"""Bound ln R_P of ResNet-20 with 865 weights from above, proved by computation.

    python benchmarks/path_bound.py

R_P counts the paths of the masked network (all weights one, sum instead of average pooling). In four steps:

1. **Positions.** The image x of a channel has the norm |x| = max(|Dx|_2, k max_c |D x_c|_2), with positive
   weights D that differ from level to level (``WEIGHTS``), x_c the image on one of the four parity classes of
   positions, and 1 <= k <= 2: k = 2 says that x is so smooth that each class has a quarter of its square.
   ``table`` bounds the norm N(m) of every kernel of m taps from one level to the next: a maximum over all 2^9
   sets of taps, with borders and strides as they are. For an operator A >= 0 and all v > 0, |A|_2^2 is at
   most max (A'Av)_i / v_i (Collatz, Wielandt). Where the norm before A bounds classes, |Ax|^2 is at most
   |A mu^-1/2|_2^2 sum mu_c |x_c|^2, and for mu_c = l + l_c that sum is at most l + sum l_c / k^2
   (``multipliers`` picks l and l_c >= 0).
2. **Channels.** So the channels' norms grow no faster than numbers in a network without positions, where a
   kernel of m taps is the number N(m) and a shortcut the number r. V(x) is the most that all layers after a
   level make of norms x: convex, homogeneous, growing with x, the same for every order of the channels.
3. **A layer** with n taps to give away: the maximum of V'(Mx) over M. V'(Mx) = max_g <g, Mx>, and for a given
   g the best M is greedy. Let N have a concave majorant of a few lines (``majorant``). A row of n_o taps is
   then worth H(n_o), H concave and piecewise linear, and all rows but one end in a corner of H: ``patterns``
   lists these cases. For a block, V(x) <= r V'(x) + max V'(B A x), as V' is convex. Where the shortcut is a
   layer, the two are looked at together if the branch comes near its best (``together``).
4. **Vectors.** V is bounded at the points of a grid of sorted vectors of K channels; between them a convex
   function is at most its interpolation. What is beyond K channels moves to the smallest of the first K: no
   sum of greatest entries falls, so V, convex and symmetric, does not fall either. Moreover V(x) <= G |x|_2,
   G being the product of sqrt(max sum N(m)^2) over layers. The smaller of the two values counts.

``WEIGHTS`` were found by subgradient steps (the bound for a given structure is convex in their logarithms);
any positive numbers give a bound. Rounding errors are far below 1e-9, by which all factors are enlarged.
"""

from __future__ import annotations

import itertools
import math
import time
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import fxprune
from fxprune import zoo
from fxprune.sparsity import budget

Array = NDArray[np.float64]
Pieces = list[tuple[float, float]]  # slopes and lengths, from zero on

WEIGHTS = """
-366 -292 -198 -92 -12 50 94 130 154 176 189 202 207 212 210 211 205 201 188 176 155 132 100 65 19 -34 -103
-186 -294 -401 -506 -593 -250 -224 -175 -90 -13 38 80 112 138 158 173 184 191 194 193 192 189 184 173 159 139
116 85 50 6 -47 -116 -202 -299 -389 -456 -492 -168 -153 -125 -74 -20 25 65 96 121 142 157 169 176 179 178 175
173 168 158 143 125 102 73 37 -7 -62 -135 -220 -293 -357 -410 -440 -100 -86 -68 -54 -24 14 48 81 104 127 144
154 161 166 163 160 157 151 142 128 109 85 57 23 -19 -79 -153 -217 -280 -331 -371 -392 -54 -28 -2 36 82 118
138 146 142 127 91 25 -67 -172 -258 -325 27 19 14 38 52 88 94 114 97 89 41 -6 -83 -146 -201 -237 87 77 31 41
23 69 44 86 41 61 -8 -20 -96 -118 -142 -176 91 59 23 9 -5 -28 -53 -96 132 72 -8 -74 -92 -63 -12 45 338 35 -108
-176 -188 -145 -20 263 -287 -269 -185 -93 -15 44 87 120 146 165 181 191 199 201 202 200 198 191 182 166 148
123 93 56 13 -42 -107 -194 -298 -399 -487 -529 -203 -190 -149 -84 -18 34 73 105 130 150 166 176 184 187 186
183 181 176 166 151 132 109 79 44 0 -54 -125 -214 -299 -371 -427 -476 -125 -121 -99 -63 -23 18 56 87 113 133
150 161 168 172 170 167 165 161 151 136 118 95 67 30 -13 -69 -146 -219 -285 -344 -386 -426 -34 -64 -31 36 91
129 146 149 142 127 93 39 -36 -155 -273 -359 -13 -8 10 34 70 97 121 125 125 103 68 4 -74 -160 -224 -279 69 34
36 14 62 49 100 68 101 43 43 -37 -77 -150 -166 -187 159 23 17 35 31 -16 -97 -154 100 64 12 -30 -48 -45 -36 -18
187 90 -51 -119 -136 -99 20 108
"""
"""Thousandths of ln D along a row, before, between and after the blocks, then inside each of them."""

STREAM = (2, 2, 2, 2, 1.15, 1.45, 1.8, 1, 1, 1)
HIDDEN = (2, 2, 2, 1, 1.3, 1.62, 1, 1, 1)
"""k of the norms: before, between and after the blocks; inside them."""

GRIDS = (((4, 8), (5, 8)), ((5, 8), (7, 6)), ((5, 6), (9, 4)))
"""By stage, for the stream and inside blocks: channels K, and the steps of the grid."""

LINES = ((3, 3), (3, 3), (3, 3), (3, 3), (3, 3), (3, 3), (3, 2), (2, 2), (2, 2))
"""Lines of the majorants in each block's convolutions."""

SLACK = 0.75
"""Branches further below the best than this part of the greatest shortcut are taken with that shortcut."""

SAFE = 1 + 1e-9
TAPS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
SETS = np.array([[number >> tap & 1 for tap in range(9)] for number in range(1, 512)], dtype=float)
SIZE = SETS.sum(1).astype(int)


class Level(NamedTuple):
    """Weights D of the norm (the same along rows and columns), and its k."""

    weights: Array
    k: float


class Block(NamedTuple):
    """Weights to keep in the two convolutions and in the shortcut (0: it is the identity)."""

    first: int
    second: int
    shortcut: int


def budgets() -> tuple[int, list[Block], int]:
    """Weights to keep in the first convolution, the blocks and the classifier."""
    kernels = fxprune.lower(fxprune.capture(zoo.resnet20(), torch.ones(1, 3, 32, 32))).kernels
    shapes = {name: tuple(kernel.shape) for name, kernel in kernels.items()}
    keep = budget.plan("erk", 1 - 865 / 270896, shapes).layers or {}
    parts = ("conv1", "conv2", "shortcut.0")
    blocks = [Block(*(keep.get(f"blocks.{b}.{part}.weight", 0) for part in parts)) for b in range(9)]
    return keep["conv.weight"], blocks, keep["fc.weight"]


def levels() -> tuple[list[Level], list[Level]]:
    """Those of the stream and those inside the blocks."""
    sizes = [32] * 4 + [16] * 3 + [8] * 3 + [32] * 3 + [16] * 3 + [8] * 3
    logs = np.split(np.array(WEIGHTS.split(), dtype=float) / 1000, np.cumsum(sizes)[:-1])
    every = [Level(np.exp(w), k) for w, k in zip(logs, STREAM + HIDDEN, strict=True)]
    return every[:10], every[10:]


def shifts(x: Array, stride: int) -> list[Array]:
    """List what each tap reads."""
    (height, width), padded = x.shape[-2:], np.pad(x, [(0, 0)] * (x.ndim - 2) + [(1, 1), (1, 1)])
    return [padded[..., 1 + i : 1 + i + height : stride, 1 + j : 1 + j + width : stride] for i, j in TAPS]


def norms(inner: Array, outer: Array, stride: int, sets: Array, start: Array, steps: int) -> Array:
    """Upper bounds of |outer F inner| for each set F of taps, ``inner`` one image per set."""
    taps = sets.T[:, :, None, None]

    def square(v: Array) -> Array:
        y: Array = sum(t * x for t, x in zip(taps, shifts(v * inner, stride), strict=True)) * outer
        wide = np.zeros((len(y), *inner.shape[1:]))
        wide[:, ::stride, ::stride] = y * outer
        read = reversed(shifts(wide, 1))
        return np.asarray(sum(t * x for t, x in zip(taps, read, strict=True)) * inner)

    v = np.broadcast_to(start, inner.shape) + 1e-9
    for _ in range(steps):
        u = square(v)
        v = u / u.max((1, 2), keepdims=True) + 1e-7
    return np.asarray(np.sqrt((square(v) / v).max((1, 2))) * SAFE)


def multipliers(counts: Array, k: float) -> tuple[Array, float]:
    """mu by class and sqrt(l + sum l_c / k^2), from the best s: sum c s, sum s^2 <= 1, s <= 1 / k."""
    order, mu, least = np.argsort(-counts, kind="stable"), np.ones(4), 0.0
    c, capped = counts[order], 4
    for j in range(4):
        room, rest = 1 - j / k**2, float(np.linalg.norm(c[j:]))
        if room > 1e-12 and rest > 0 and c[j] * math.sqrt(room) <= rest / k * (1 + 1e-12):
            capped, least = j, rest / math.sqrt(room)
            break
    extra = np.zeros(4)
    extra[:capped] = np.maximum(c[:capped] * k - least, 0)
    mu[order] = np.where(least + extra > 0, least + extra, 1.0)
    return mu, math.sqrt(least + extra.sum() / k**2)


def by_class(source: Level, target: Level, stride: int, sets: Array, start: Array) -> Array:
    """Bounds of |F x| on a class of outputs (on all of them after a stride), the greatest of the classes."""
    inner, outer = (np.outer(level.weights, level.weights) for level in (source, target))
    relative = np.array([abs(i) * 2 + abs(j) for i, j in TAPS])
    counts = np.stack([sets[:, relative == c].sum(1) for c in range(4)], 1)
    chosen = [multipliers(row, source.k) for row in counts]
    mu, factor = np.array([m for m, _ in chosen]), np.array([f for _, f in chosen])
    best = np.zeros(len(sets))
    for p, q in itertools.product((0, 1), (0, 1)) if stride == 1 else [(0, 0)]:
        scale = np.ones((len(sets), *inner.shape))
        for a, b in itertools.product((0, 1), (0, 1)):
            scale[:, a::2, b::2] = mu[:, (a - p) % 2 * 2 + (b - q) % 2, None, None] ** -0.5
        scale /= inner
        mask = np.zeros_like(outer)
        mask[p :: 3 - stride, q :: 3 - stride] = 1
        best = np.maximum(best, factor * norms(scale, outer * mask, stride, sets, start * inner * scale, 25))
    return best * SAFE


def table(source: Level, target: Level, stride: int) -> Array:
    """N(0), ..., N(9). A set of taps and its transpose have one norm; the full kernel's is a square."""
    transposed = SETS.reshape(-1, 3, 3).transpose(0, 2, 1).reshape(-1, 9) @ 2 ** np.arange(9)
    chosen = np.flatnonzero(np.arange(1, 512) <= transposed)
    sets, inner = SETS[chosen], np.outer(source.weights, source.weights)
    outer = np.outer(target.weights, target.weights)
    size = len(source.weights)
    band = (np.tri(size, k=1) - np.tri(size, k=-2))[::stride]
    _, values, vectors = np.linalg.svd(target.weights[:, None] * band / source.weights)
    start = np.abs(np.outer(vectors[0], vectors[0]))
    found = norms(np.broadcast_to(1 / inner, (len(sets), *inner.shape)), outer, stride, sets, start, 40)
    found[-1] = values[0] ** 2 * SAFE
    if stride == 2:
        assert target.k == 1
        found = np.minimum(found, by_class(source, target, stride, sets, start))
    elif target.k > 1:
        found = np.maximum(found, target.k * by_class(source, target, stride, sets, start))
    return np.array([0.0] + [found[SIZE[chosen] == m].max() for m in range(1, 10)])


def shortcut(source: Level, target: Level, stride: int) -> float:
    """r: the norm of the identity, or of reading one class."""
    inner = np.outer(source.weights[::stride], source.weights[::stride])
    ratio = float((np.outer(target.weights, target.weights) / inner).max()) * SAFE
    return ratio * (max(1.0, target.k / source.k) if stride == 1 else target.k / source.k)


def entry(target: Level) -> Array:
    """As :func:`table`, for an image of ones."""
    images = np.einsum("st,tij->sij", SETS, np.array(shifts(np.ones((32, 32)), 1)))
    images *= np.outer(target.weights, target.weights)
    found = np.linalg.norm(images, axis=(1, 2))
    for a, b in itertools.product((0, 1), (0, 1)):
        found = np.maximum(found, target.k * np.linalg.norm(images[:, a::2, b::2], axis=(1, 2)))
    return np.array([0.0] + [found[SIZE == m].max() * SAFE for m in range(1, 10)])


class Grid:
    """Sorted vectors of ``channels`` numbers 1 = x_1 >= x_2 >= ... in steps of 1 / ``steps``."""

    def __init__(self, channels: int, steps: int) -> None:
        self.channels, self.steps = channels, steps
        tails = itertools.combinations_with_replacement(range(steps, -1, -1), channels - 1)
        points = np.array([(steps, *tail) for tail in tails])
        self.powers = (steps + 1) ** np.arange(channels - 1)
        self.index = np.full((steps + 1) ** (channels - 1), -1)
        self.index[points[:, 1:] @ self.powers] = np.arange(len(points))
        self.points: Array = points / steps

    def interpolate(self, values: Array, x: Array) -> Array:
        """Linear on the simplices of Kuhn's triangulation, homogeneous; rows of ``x`` are sorted."""
        y = x[:, 1:] / np.maximum(x[:, :1], 1e-300) * self.steps
        base = np.minimum(np.floor(y), self.steps - 1).astype(int)
        part = np.clip(y - base, 0, 1)
        order = np.argsort(-part, axis=1, kind="stable")
        part = np.take_along_axis(part, order, 1)
        edges = np.concatenate([np.ones((len(x), 1)), part, np.zeros((len(x), 1))], 1)
        code, result = base @ self.powers, np.zeros(len(x))
        for k in range(self.channels):
            weight, at = edges[:, k] - edges[:, k + 1], self.index[code]
            assert not ((at < 0) & (weight > 1e-12)).any()
            result += weight * values[at]
            code = code + self.powers[order[:, min(k, self.channels - 2)]]
        return np.asarray(result * x[:, 0] * SAFE**0.01)

    def merge(self, x: Array) -> Array:
        """Sorted rows, what is beyond the last channel spread over the smallest before it."""
        kept = np.zeros((len(x), self.channels))
        width = min(self.channels, x.shape[1])
        kept[:, :width], rest = x[:, :width], x[:, width:].sum(1)
        for j in range(self.channels - 1, 0, -1):
            lower = self.channels - j
            share = np.minimum(rest / lower, kept[:, j - 1] - kept[:, j])
            kept[:, j:] += share[:, None]
            rest = rest - share * lower
        return np.asarray(-np.sort(-(kept + np.maximum(rest, 0)[:, None] / self.channels), axis=1))


class Value(NamedTuple):
    """Upper bounds of a V: at the points of a grid, and G."""

    grid: Grid
    values: Array
    steepness: float

    def __call__(self, x: Array) -> Array:
        inside = self.grid.interpolate(self.values, self.grid.merge(x))
        return np.asarray(np.minimum(inside, self.steepness * np.linalg.norm(x, axis=1)))


def majorant(gains: Array, lines: int) -> Pieces:
    """A concave function above ``gains`` (for 0 to 9 taps), of at most so many lines, closest at 9."""
    chords = [[(i, j) for i in range(m + 1) for j in range(m, 10)] for m in range(10)]
    rise = [
        [gains[i] + (gains[j] - gains[i]) * (m - i) / max(j - i, 1) for i, j in chords[m]] for m in range(10)
    ]
    hull = np.array([max(row) for row in rise])
    slopes = np.minimum.accumulate(np.diff(hull))
    new = [m for m in range(9) if m == 0 or slopes[m] < slopes[m - 1] - 1e-9]
    edges = [(float(slopes[m]), float(hull[m] - slopes[m] * m)) for m in new]
    taps, weight = np.arange(1, 10), np.array([1, 1, 1, 1, 1, 1, 1, 1.5, 4])
    choices = [[edges[0], *more] for r in range(lines) for more in itertools.combinations(edges[1:], r)]
    best = min(choices, key=lambda c: max((np.min([a * taps + b for a, b in c], 0) / hull[1:] - 1) * weight))
    ends = [(d - b) / (a - c) for (a, b), (c, d) in itertools.pairwise(best)] + [9.0]
    return [(a * SAFE, e - s) for (a, _), s, e in zip(best, [0.0, *ends[:-1]], ends, strict=True)]


@cache
def patterns(taps: int, lengths: tuple[float, ...]) -> tuple[NDArray[np.int64], ...]:
    """The rows' corners in each case; and of the one row that goes on beyond its own: place, corner, taps."""
    corners, found = np.cumsum([0, *lengths]), []

    def fill(corner: int, left: float, rows: tuple[int, ...]) -> None:
        if corner:
            for count in range(int(left / corners[corner] + 1e-9) + 1):
                fill(corner - 1, left - count * corners[corner], rows + (corner,) * count)
            return
        for at in {*rows, 0} if left > 1e-9 else {0}:
            if at < len(lengths) and lengths[at] > left + 1e-9:
                found.append((rows, rows.index(at) if at else len(rows), at, max(left, 0.0)))

    fill(len(lengths), float(taps), ())
    padded = np.zeros((len(found), 1 + max(len(case[0]) for case in found)), dtype=int)
    for row, case in zip(padded, found, strict=True):
        row[: len(case[0])] = case[0]
    return (padded, *(np.array([case[k] for case in found]) for k in (1, 2, 3)))


def cases(x: Array, taps: int, pieces: Pieces) -> Array:
    """The vectors M x that matter, sorted."""
    joint: dict[float, float] = {}
    for number, (slope, length) in itertools.product(x[x > 0], pieces):
        key = round(float(number * slope), 12)
        joint[key] = joint.get(key, 0.0) + length
    chain = sorted(joint.items(), reverse=True)
    slopes = np.array([slope for slope, _ in chain]) * SAFE
    rows, place, corner, left = patterns(taps, tuple(round(length, 9) for _, length in chain))
    worth = np.concatenate([[0], np.cumsum(slopes * [length for _, length in chain])])
    made = worth[rows]
    made[np.arange(len(made)), place] += slopes[corner] * left
    return np.asarray(-np.sort(-made, axis=1))


def before(grid: Grid, after: Value, taps: int, pieces: Pieces, steepness: float) -> Value:
    """V before a layer of so many taps, from V after it."""
    values = np.array([after(cases(x, taps, pieces)).max() for x in grid.points])
    steep = after.steepness * steepness
    return Value(grid, np.minimum(values, steep * np.linalg.norm(grid.points, axis=1)), steep)


def together(x: Array, block: Block, r: float, pieces: list[Pieces], middle: Value, after: Value) -> float:
    """V before a block at ``x``; its shortcut, a layer, is added to branches that come near the best."""
    straight = cases(x, block.shortcut, [(r, 1.0)])
    extra, hidden = after(straight), cases(x, block.first, pieces[0])
    worth = middle(hidden)
    floor = worth.max() - SLACK * extra.max()
    best = floor + extra.max()
    for h in np.unique(middle.grid.merge(hidden[worth >= floor]), axis=0):
        made = np.unique(cases(h, block.second, pieces[1]), axis=0)
        for row, alone in zip(made, after(made), strict=True):
            chosen = straight[extra + alone > best] if alone >= floor else straight[:0]
            if len(chosen):
                both = np.pad(chosen, [(0, 0), (0, len(row))])
                both[:, : len(row)] += row
                best = max(best, after(both).max())
    return float(best)


def frobenius(gains: Array, taps: int) -> float:
    """The greatest sqrt(sum N(m)^2) with so many taps in all."""
    best = [0.0]
    for n in range(1, taps + 1):
        best.append(max(best[n - m] + gains[m] ** 2 for m in range(1, min(9, n) + 1)))
    return math.sqrt(best[-1]) * SAFE


def through(block: Block, one: Array, two: Array, r: float, lines: tuple[int, int], after: Value,
            stream: Grid, hidden: Grid) -> Value:  # fmt: skip
    """V before a block."""
    pieces = [majorant(one, lines[0]), majorant(two, lines[1])]
    middle = before(hidden, after, block.second, pieces[1], frobenius(two, block.second))
    branch = before(stream, middle, block.first, pieces[0], frobenius(one, block.first))
    if not block.shortcut:
        assert stream is after.grid
        steep, values = branch.steepness + after.steepness * r, branch.values + after.values * r
    else:
        steep = branch.steepness + after.steepness * r * math.sqrt(block.shortcut) * SAFE
        values = np.array([together(x, block, r, pieces, middle, after) for x in stream.points])
    return Value(stream, np.minimum(values, steep * np.linalg.norm(stream.points, axis=1)), steep)


def solve() -> tuple[float, list[Value]]:
    """The bound, and V before each block and after the last."""
    first, blocks, last = budgets()
    stream, hidden = levels()
    grids = [(Grid(*o), Grid(*i)) for o, i in GRIDS]
    counts = np.array([10.0] * (last // 10) + [float(last % 10)])
    final = float(np.linalg.norm(1 / np.outer(stream[9].weights, stream[9].weights))) * SAFE
    start = final * (grids[2][0].points[:, : len(counts)] @ counts)
    values = [Value(grids[2][0], start, final * float(np.linalg.norm(counts)))]
    print("block   N(1)   N(9) of conv1   N(1)   N(9) of conv2      r   ln V(1, 0, ...)   ln G")
    for b in range(8, -1, -1):
        stride = 2 if blocks[b].shortcut else 1
        one, two = table(stream[b], hidden[b], stride), table(hidden[b], stream[b + 1], 1)
        r = shortcut(stream[b], stream[b + 1], stride)
        outside, inside = grids[(b + 1 - stride) // 3][0], grids[b // 3][1]
        values.insert(0, through(blocks[b], one, two, r, LINES[b], values[0], outside, inside))
        alone, steep = float(values[0](np.ones((1, 1)))[0]), values[0].steepness
        print(f"{b:5d} {one[1]:6.3f} {one[9]:6.3f} {two[1]:15.3f} {two[9]:6.3f} {r:15.3f}", end=" ")
        print(f"{math.log(alone):17.3f} {math.log(steep):6.3f}", flush=True)
    made = cases(np.ones(3), first, majorant(entry(stream[0]), 3))
    return math.log(values[0](made).max()) + 1e-9, values


def main() -> None:
    began = time.perf_counter()
    bound, _ = solve()
    print(f"ln R_P < {bound:.4f} ({time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    main()
