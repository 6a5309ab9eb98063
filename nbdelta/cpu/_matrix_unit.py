"""The matrix unit of x86-64 processors (AMX): products of bfloat16 squares, summed in float32.

Registers of it, "tiles" to Intel, hold 16 rows of 64 bytes. They are no type of LLVM's that
llvmlite has, so the instructions are inline assembly with registers named, and a result goes
through memory. Where there is no such unit, the same products are made of pairs, for tests.
"""

import ctypes
import platform
import struct
import sys
from functools import cache

from nbdelta.cpu._simd import tile
from nbdelta.cpu._tiles import TOGETHER, store_square
from nbdelta.cpu._vector_unit import DOTS_BFLOAT16, W, features

# how q, k and v of bfloat16 are multiplied: as float32, by the dot products of pairs of
# AVX512-BF16, or by the matrix unit
FLOATS, DOTS, SQUARES = range(3)

# numbers of two tiles that are multiplied in one instruction, per row of the result
DEPTH = 2 * W
_LEFT, _RIGHT, _HALF_LEFT, _HALF_RIGHT = 4, 5, 6, 7
_SYSCALL_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18


def _configuration():
    """Bytes for ``ldtilecfg``: palette 1, then the bytes per row and the rows of each register."""
    widths, rows = [4 * W] * 8, [W] * 8
    widths[_HALF_LEFT], rows[_HALF_RIGHT] = 2 * W, W // 2
    return struct.pack("<BB14x8H16x8B8x", 1, 0, *widths, *rows)


HAS_TILES = (
    DOTS_BFLOAT16
    and {"+amx-tile", "+amx-bf16"} <= features()
    and (sys.platform, platform.machine()) == ("linux", "x86_64")
)


@cache
def unit_of_halves():
    """Return the quickest of `FLOATS`, `DOTS` and `SQUARES` on this machine.

    Linux gives the registers of the matrix unit to a process that asks; threads and forks inherit
    them. Where it does not, float32 is quicker than pairs: processors with the unit multiply pairs
    at half the rate.
    """
    if not HAS_TILES:
        return DOTS if DOTS_BFLOAT16 else FLOATS
    request = map(ctypes.c_long, (_SYSCALL_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA))
    return FLOATS if ctypes.CDLL(None).syscall(*request) else SQUARES


@tile
def begin_tiles(e, buffer):
    """Set up the registers of this thread, from 64 bytes at `buffer`, until `end_tiles`."""
    if HAS_TILES:
        for i, word in enumerate(struct.unpack("<8q", _configuration())):
            e.store(e.integer(word), buffer, 8 * i)
        e.instruction("ldtilecfg ($0)", buffer)


@tile
def end_tiles(e, buffer):
    """Empty the registers, so that the system need not save them."""
    if HAS_TILES:
        e.instruction("tilerelease")


@tile
def multiply_two(e, a, b, step, right, n, out_a, out_b):
    """``out_x = x @ right`` for two left sides x, results of 16 rows of 16 numbers.

    A left side has 16 rows of n bfloat16 numbers, `step` bytes apart, the right side n / 2 rows of
    words: numbers 2 i and 2 i + 1 of every column joined. n is a multiple of 16.
    """
    if not HAS_TILES:
        for left, out in ((a, out_a), (b, out_b)):
            _multiply_pairs(e, left, step, right, n, out)
        return
    for i in (0, 1):
        e.instruction(f"tilezero %tmm{i}")

    def multiply(offset, left, right_side):
        e.instruction(f"tileloadd ($0,$1), %tmm{right_side}", right + offset * W, e.row)
        for i, x in enumerate((a, b)):
            e.instruction(f"tileloadd ($0,$1), %tmm{left}", x + offset, step)
            e.instruction(f"tdpbf16ps %tmm{right_side}, %tmm{left}, %tmm{i}")

    def whole(offset, carried):
        multiply(offset, _LEFT, _RIGHT)
        return carried

    def half(_, carried):
        multiply(n // DEPTH * e.row, _HALF_LEFT, _HALF_RIGHT)
        return carried

    e.loop(n // DEPTH * e.row, [], whole, e.row, maybe_empty=True)
    e.loop(n % DEPTH, [], half, W, maybe_empty=True)
    for i, out in enumerate((out_a, out_b)):
        e.instruction(f"tilestored %tmm{i}, ($0,$1)", out, e.row)


@tile
def multiply_rows(e, left, n, right, out):
    """``out = left @ right``: n rows of 32 bfloat16 numbers, n a multiple of 16, by 16 of words."""
    if HAS_TILES:
        e.instruction(f"tileloadd ($0,$1), %tmm{_RIGHT}", right, e.row)

    def body(offset, carried):
        if HAS_TILES:
            e.instruction("tilezero %tmm0")
            e.instruction(f"tileloadd ($0,$1), %tmm{_LEFT}", left + offset, e.row)
            e.instruction(f"tdpbf16ps %tmm{_RIGHT}, %tmm{_LEFT}, %tmm0")
            e.instruction("tilestored %tmm0, ($0,$1)", out + offset, e.row)
        else:
            _multiply_pairs(e, left + offset, e.row, right, DEPTH, out + offset)
        return carried

    e.loop(n * e.row, [], body, W * e.row)


def _multiply_pairs(e, left, step, right, n, out):
    for first in range(0, W, e.mr):
        rows = range(first, first + e.mr)

        def body(offset, acc, rows=rows):
            x = e.load_words(right + offset * W)
            return [e.dot(left + step * i + offset, 0, x, a) for i, a in zip(rows, acc)]

        acc = e.loop(e.integer(n) * 2, [e.splat(0.0)] * e.mr, body, 4)
        for i, a in zip(rows, acc):
            e.store(a, out, i * e.row)


# ---- what is multiplied ----


@tile
def norms_of_halves(e, x, x_step, n, eps, norm, copies):
    """norm[i] = 1 / sqrt(sum over n channels of x_i^2 + eps) for 16 rows of bfloat16, which are
    copied one behind the other.
    """
    sums, size = [], 2
    for token in range(0, W, TOGETHER):
        rows = range(token, token + TOGETHER)

        def body(offset, totals, rows=rows):
            new = []
            for i, total in zip(rows, totals):
                halves = e.load_halves(x + x_step * i + offset)
                e.store_halves(halves, copies + n * (size * i) + offset)
                x_i = e.from_halves(halves)
                new.append(e.fma(x_i, x_i, total))
            return new

        sums += e.loop(n * size, [e.splat(0.0)] * TOGETHER, body, W * size)
    e.store(1.0 / e.sqrt(e.sum_lanes(sums) + e.splat(eps)), norm)


@tile
def word_columns(e, rows, step, n, out):
    """16 rows of n words as columns; the last 16 of them may be half empty."""

    def body(offset, carried):
        for channel in range(0, W, e.lanes):
            for token in range(0, W, e.lanes):
                tokens = [rows + step * t + offset for t in range(token, token + e.lanes)]
                square = e.load_transposed(tokens, channel * e.size)
                store_square(e, square, out + offset * W, token, channel)
        return carried

    e.loop(n * e.size, [], body, e.row)


@cache
def half_rows(times):
    """Make the tile that writes the halves of rows of words as two rows, each so many times."""

    @tile
    def half_rows(e, words, n, out):
        step, width = times * e.row // 2, e.row // 2

        def body(offset, carried):
            for i, x in enumerate(e.halves_of(e.load_words(words + offset))):
                halves = e.halves(x)
                for j in range(times):
                    e.store_halves(halves, out + offset * times, i * step + j * width)
            return carried

        e.loop(n * e.row, [], body, e.row)

    return half_rows


@tile
def split_words(e, rows, out):
    """Write 16 rows as 16 rows of words, the sum of the first and the last 8."""
    for i in range(0, W, 2):
        pair = [e.load(rows, j * e.row) for j in (i, i + 1)]
        words = e.pair(*pair)
        e.store(words, out, i // 2 * e.row)
        rest = e.pair(*(x - y for x, y in zip(pair, e.halves_of(words))))
        e.store(rest, out, (i + W) // 2 * e.row)


@tile
def add_products(e, rows, n, decay, products, words):
    """``S = e^G_last S + K^T U`` for n channels, the last in `products`, and S as words."""

    def body(offset, carried):
        decay, words = carried
        new = []
        for i in (0, 1):
            x, s = (e.load(a + offset, i * e.row) for a in (products, rows))
            new.append(e.fma(e.bcast(decay, i * e.size), s, x))
            e.store(new[-1], rows + offset, i * e.row)
        e.store(e.pair(*new), words)
        return [decay + 2 * e.size, words + e.row]

    e.loop(n * e.row, [decay, words], body, 2 * e.row)
