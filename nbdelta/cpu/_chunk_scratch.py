"""Memory of a worker of the chunked kernel."""

from typing import NamedTuple

from nbdelta.cpu._jit import njit
from nbdelta.cpu._matrix_unit import DOTS, FLOATS, SQUARES
from nbdelta.cpu._vector_unit import W


class Scratch(NamedTuple):
    """Addresses of a worker's buffers. The strips come first, from the start of its memory on."""

    keys: int  # panels k and q; KDA: k e^G and q e^G
    queries: int
    key_words: int  # what the state and U are multiplied with as words: panels, for squares rows
    query_words: int
    update_words: int
    column_words: int  # squares: the panel of k, and the strip at work, as words
    state_words: int
    products: int  # squares: K S and Q S of every strip
    changes: int  # squares: what a block adds to a strip
    u: int  # squares: U of the strip at work, and e^(G_last - G) U
    updates: int  # KDA: k e^(G_last - G) as rows
    decays: int  # KDA: e^g token by token
    sums: int  # KDA: registers of pair sums, of two tokens and their twins, and of k.q
    a: int  # -A and P of the block, a row more each
    p: int
    kk: int  # products k.k and q.k of the block
    qk: int
    k: int  # staged rows, KDA: normalised; those of g and o only where the caller's do not serve
    q: int
    g: int
    v: int
    o: int
    decay: int  # e^G_last, one per channel
    bias: int  # dt_bias of the head
    gates: int  # five rows, see gate_products
    beta: int
    log_decay: int
    k_norm: int
    q_norm: int
    end: int


def strip_rows(KP, unit):
    """Rows of a strip: the state, U, e^(G_last - G) U, for dots words of state and U.

    Of squares the state and the words of U.
    """
    if unit == SQUARES:
        return KP + W
    return KP + 2 * W + ((KP + W) // 2 if unit == DOTS else 0)


def waiting_rows(KP, unit):
    """Rows behind a head's strips: what a squares' update needs, which waits for the next block."""
    return KP + KP // W if unit == SQUARES else 0


def layout(start, size, KP, VP, rows, unit):
    """Carve a worker's memory: padded head sizes, `rows` rows of heads, `size` bytes a number.

    Compiled into the kernel, and called as it is by the host, which wants to know the end.
    """
    row = W * size
    tokens, values, channels, square = KP * row, VP * row, KP * size, W * row
    half = tokens // 2 if unit != FLOATS else 0
    squared = 1 if unit == SQUARES else 0
    columns = half + square // 2  # whole squares of them
    keys = start + rows * row
    key_words = keys + 2 * tokens
    column_words = key_words + 3 * half
    products = column_words + squared * (columns + half)
    changes = products + squared * 2 * values
    u = changes + squared * tokens
    updates = u + squared * 2 * square
    decays = updates + tokens
    sums = decays + tokens
    a = sums + 5 * square
    kk = a + 2 * (square + row)
    k = kk + 2 * square
    v = k + 3 * tokens
    decay = v + 2 * values
    gates = decay + 2 * channels
    beta = gates + 5 * row
    return Scratch(
        keys, keys + tokens, key_words, key_words + half, key_words + 2 * half, column_words,
        column_words + columns, products, changes, u, updates, decays, sums,
        a, a + square + row, kk, kk + square, k, k + tokens, k + 2 * tokens, v, v + values,
        decay, decay + channels, gates, beta, beta + row, beta + 2 * row,
        beta + 3 * row, beta + 4 * row,
    )  # fmt: skip


# the same, for kernels
strip_rows_of, layout_of = njit()(strip_rows), njit()(layout)
waiting_rows_of = njit()(waiting_rows)
