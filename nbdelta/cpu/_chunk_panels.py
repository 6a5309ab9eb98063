"""What a block of the chunked kernel prepares: rows to panels, gates, and the triangles A and P."""

from functools import cache

from nbdelta.cpu._call import (
    BETA,
    BETA_FACTOR,
    EPS,
    RAW_GATE,
    SCALE,
    SIGMOID_BETA,
    G,
    K,
    array_at,
    at,
    real,
)
from nbdelta.cpu._channel_tiles import (
    SOME,
    clear_sums,
    decay_rows,
    few_pair_sums,
    finish_own,
    finish_pairs,
    prefix_columns,
    some_pair_sums,
    suffix_rows,
)
from nbdelta.cpu._jit import njit
from nbdelta.cpu._matrix_unit import (
    DOTS,
    FLOATS,
    SQUARES,
    half_rows,
    multiply_two,
    norms_of_halves,
    word_columns,
)
from nbdelta.cpu._memory import (
    fill_row,
    get,
    is_plain,
    load,
    load_tokens,
    save,
    transpose_tile,
)
from nbdelta.cpu._simd import itemsize, lanes_of, padded, rows_of_tile, whole_tiles
from nbdelta.cpu._tiles import (
    KEY_GATE,
    LAST,
    QUERY_GATE,
    SUFFIX,
    apply_norms,
    decay_pairs,
    gate_products,
    gram,
    inverse_norms,
    multiply_row,
    normalise,
    pack_columns,
    pair_rows,
    round_rows,
    sigmoid_row,
)
from nbdelta.cpu._vector_unit import W
from nbdelta.cpu.gate import (
    apply_gate,
    gate_factor,
    load_bias,
)

_once, _gram, _gram_of_pairs = half_rows(1), gram(False), gram(True)


@njit()
def token_rows(REAL, x, b, t, n, h, width, staged):
    """Address and step of 16 padded token rows: the caller's own where they serve, else a copy."""
    source = at(x, b, t, h)
    if n == W and is_plain(REAL, x[1], x[5], width):
        return source, x[3]
    load_tokens(REAL, x[1], source, x[3], x[5], n, width, staged)
    return staged, padded(REAL, width) * itemsize(REAL)


@njit()
def _load_16(REAL, x, b, t, n, hv, default, target):
    """N numbers of ``x[b, t:, hv]`` and zeros, or `default` where x is not given."""
    for i in range(W):
        value = REAL(0)
        if i < n:
            value = REAL(default)
            if x[0]:
                value = get(REAL, x[1], at(x, b, t + i, hv))
        save(REAL, target + i * itemsize(REAL), value)


@njit()
def load_beta(REAL, desc, b, t, n, hv, target):
    _load_16(REAL, array_at(desc, BETA), b, t, n, hv, 1.0, target)
    if desc[SIGMOID_BETA]:
        sigmoid_row(REAL, target, REAL(real(desc, BETA_FACTOR)), target)
        _clear_after(REAL, n, target)


@njit()
def _clear_after(REAL, n, target):
    """Padding tokens have gate 0 and beta 0: they change nothing."""
    for i in range(n, W):
        save(REAL, target + i * itemsize(REAL), REAL(0))


@njit()
def _load_token_gates(REAL, desc, b, t, n, hv, m):
    """16 log decays of a value head with one gate per token."""
    _load_16(REAL, array_at(desc, G), b, t, n, hv, 0.0, m.log_decay)
    if desc[RAW_GATE]:
        load_bias(REAL, desc, hv, 1, m.bias)
        apply_gate(REAL, desc, gate_factor(desc, hv), m.bias, m.log_decay, 1)
        _clear_after(REAL, n, m.log_decay)


@njit()
def stage_rows(REAL, desc, x, b, t, n, h, KP, staged, norm):
    """Bring 16 rows of k or q one behind the other, and the factors that normalise them, or 1."""
    rows, step = token_rows(REAL, x, b, t, n, h, desc[K], staged)
    eps = real(desc, EPS)
    inverse_norms(REAL, rows, step, KP, REAL(abs(eps)), norm, staged, KP * itemsize(REAL))
    if eps < 0:
        fill_row(REAL, REAL(1), norm)


@njit()
def _stage_rows(REAL, desc, x, b, t, n, h, KP, staged, norm, words):
    stage_rows(REAL, desc, x, b, t, n, h, KP, staged, norm)


@njit()
def _stage_words(REAL, desc, x, b, t, n, h, KP, staged, norm, words):
    """Bring 16 rows of bfloat16 one behind the other, and the factors that normalise them, or 1."""
    rows, step, eps = at(x, b, t, h), x[3], real(desc, EPS)
    if n < W or x[5] != 2 or desc[K] % W:
        load_tokens(REAL, x[1], rows, x[3], x[5], n, desc[K], staged)
        round_rows(REAL, staged, KP, words)
        rows, step = words, 2 * KP
    norms_of_halves(REAL, rows, step, KP, REAL(abs(eps)), norm, words)
    if eps < 0:
        fill_row(REAL, REAL(1), norm)


@njit()
def _stage_words_in_place(REAL, desc, x, b, t, n, h, KP, staged, norm, words):
    _stage_words(REAL, desc, x, b, t, n, h, KP, staged, norm, staged)


@cache
def stage(PER_CHANNEL, unit):
    """Make what brings rows of k or q, and their norms; as words where nothing else is needed."""
    if unit == FLOATS or PER_CHANNEL:
        return _stage_rows
    return _stage_words if unit == SQUARES else _stage_words_in_place


@njit()
def _pairs(REAL, KP, n, m):
    """Triangles A and P of a block whose decay differs by channel.

    Two tokens j and j + 1 at a time, and then the two that have as many pairs as these do not.
    """
    size, lanes = itemsize(REAL), lanes_of(REAL)
    step, register = KP * size, lanes * size
    square, even = W * register, (n + 1) // 2 * 2
    own = m.sums + 4 * square
    clear_sums(REAL, own, W)
    for token in range(0, min(even, W // 2), 2):
        clear_sums(REAL, m.sums, 4 * W)
        one, other = m.sums, m.sums + square
        for j, first, second in (
            (token, one + token * register, other + (token + 1) * register),
            (W - 2 - token, other, one),
        ):
            done = 0 if j < even else KP
            while done < KP:
                i, later = j * step + done * size, even - 2 - j
                k, q, decays = m.k + i, m.q + i, m.decays + i
                if done + SOME * lanes <= KP:
                    some_pair_sums(
                        REAL, k, q, decays, step, later, first, second, own + j * register
                    )
                    done += SOME * lanes
                else:
                    few_pair_sums(
                        REAL, k, q, decays, step, later, first, second, own + j * register
                    )
                    done += W
        finish_pairs(REAL, one, m.gates, token, m.a, m.p)
        finish_pairs(REAL, other, m.gates, token + 1, m.a, m.p)
    finish_own(REAL, own, m.gates, m.p)


@cache
def head_gates(unit):
    PAIRS = unit != FLOATS

    @njit()
    def head_gates(REAL, desc, m, b, t, n, hv):
        """Gates and triangles of a value head with one gate per token."""
        row = W * itemsize(REAL)
        _load_token_gates(REAL, desc, b, t, n, hv, m)
        scale = REAL(real(desc, SCALE))
        gate_products(REAL, m.log_decay, m.beta, scale, m.gates)
        decay_pairs(REAL, m.kk, m.qk, m.gates, m.beta, scale, m.a, m.p)
        if PAIRS:
            # the words hold k and q as they are
            multiply_row(REAL, m.gates + KEY_GATE * row, m.k_norm)
            multiply_row(REAL, m.gates + QUERY_GATE * row, m.q_norm)
            multiply_row(REAL, m.gates + SUFFIX * row, m.k_norm)
        last = load(REAL, m.gates + LAST * row)
        for c in range(0, padded(REAL, desc[K]), W):
            fill_row(REAL, last, m.decay + c * itemsize(REAL))

    return head_gates


@cache
def channel_gates(unit):
    prefix_tile, suffix_tile = prefix_columns(unit == SQUARES), suffix_rows(False)
    PAIRS, SQUARED = unit == DOTS, unit == SQUARES

    @njit()
    def channel_gates(REAL, desc, m, b, t, n, hv):
        """Panels of a value head with one gate per token and channel."""
        size, KP, g = itemsize(REAL), padded(REAL, desc[K]), array_at(desc, G)
        row, step = W * size, KP * size
        if desc[RAW_GATE]:
            g_rows, g_step = m.g, step
            load_tokens(REAL, g[1], at(g, b, t, hv), g[3], g[5], n, desc[K], m.g)
            load_bias(REAL, desc, hv, desc[K], m.bias)
            factor = gate_factor(desc, hv)
            for i in range(n):
                apply_gate(REAL, desc, factor, m.bias, m.g + i * step, KP // W)
        else:
            g_rows, g_step = token_rows(REAL, g, b, t, n, hv, desc[K], m.g)
        decay_rows(REAL, g_rows, g_step, KP, m.decays, step)
        for i in range(0, row, size):
            save(REAL, m.gates + KEY_GATE * row + i, -load(REAL, m.beta + i))
        fill_row(REAL, REAL(real(desc, SCALE)), m.gates + QUERY_GATE * row)
        keys, queries, out_step, out_size = m.keys, m.queries, 0, row
        if SQUARED:
            keys, queries, out_step, out_size = m.key_words, m.query_words, 2 * KP, 2
        for c in range(0, KP, W):
            i, out = c * size, c * out_size
            for x, panel in ((m.k, keys), (m.q, queries)):
                prefix_tile(REAL, x + i, m.decays + i, step, panel + out, out_step, m.decay + i)
            if not SQUARED:  # theirs are made in `_keep_update`
                suffix_tile(REAL, m.k + i, m.decays + i, step, m.updates + c * row)
        _pairs(REAL, KP, whole_tiles(REAL, n), m)
        if PAIRS:
            pair_rows(REAL, m.keys, KP, m.key_words)
            pair_rows(REAL, m.queries, KP, m.query_words)

    return channel_gates


@cache
def key_head(PER_CHANNEL, unit):
    """Make what the value heads of a key head share."""
    return _normalised_rows if PER_CHANNEL else _KEY_HEADS[unit]


@njit()
def _normalised_rows(REAL, desc, m):
    if real(desc, EPS) >= 0:
        KP = padded(REAL, desc[K])
        for rows, norm in ((m.k, m.k_norm), (m.q, m.q_norm)):
            normalise(REAL, rows, KP, norm)


@njit()
def _key_head_of_squares(REAL, desc, m):
    KP = padded(REAL, desc[K])
    word_columns(REAL, m.key_words, 2 * KP, KP // 2, m.column_words)
    multiply_two(REAL, m.key_words, m.query_words, 2 * KP, m.column_words, KP, m.kk, m.qk)
    transpose_tile(REAL, m.qk, W * itemsize(REAL))
    apply_norms(REAL, m.k_norm, m.q_norm, m.kk, m.qk)


@njit()
def _key_head_of_pairs(REAL, desc, m):
    KP = padded(REAL, desc[K])
    # in this order, as each may write half a square too much
    word_columns(REAL, m.k, 2 * KP, KP // 2, m.key_words)
    word_columns(REAL, m.q, 2 * KP, KP // 2, m.query_words)
    _once(REAL, m.key_words, KP // 2, m.update_words)
    for first in range(0, W, rows_of_tile(REAL)):
        _gram_of_pairs(REAL, m.key_words, m.key_words, first, KP, m.kk)
        _gram_of_pairs(REAL, m.key_words, m.query_words, first, KP, m.qk)
    apply_norms(REAL, m.k_norm, m.q_norm, m.kk, m.qk)


@njit()
def _key_head_of_panels(REAL, desc, m):
    size, KP = itemsize(REAL), padded(REAL, desc[K])
    for c in range(0, KP, W):
        i, tile = c * size, c * W * size
        pack_columns(REAL, m.k + i, KP * size, m.k_norm, m.keys + tile)
        pack_columns(REAL, m.q + i, KP * size, m.q_norm, m.queries + tile)
    for first in range(0, W, rows_of_tile(REAL)):
        _gram(REAL, m.keys, m.keys, first, KP, m.kk)
        _gram(REAL, m.keys, m.queries, first, KP, m.qk)


_KEY_HEADS = {
    FLOATS: _key_head_of_panels, DOTS: _key_head_of_pairs, SQUARES: _key_head_of_squares,
}  # fmt: skip
