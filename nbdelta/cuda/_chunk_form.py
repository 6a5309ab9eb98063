"""What the two kernels of the chunked rule agree on: sizes, where chunks lie, records, loading.

Every sequence is cut into segments of equal length (the checkpoint interval, or simply a chunk) and
a segment into chunks of `tokens`, of which the last may be shorter. Chunks have numbers, with gaps,
such that the number of a chunk and the chunk of a number follow from cu_seqlens alone.
"""

from typing import NamedTuple

from nbdelta.cuda._call import (
    CU_SEQLENS,
    EXTRA,
    GROUP,
    MAX_LENGTH,
    MIN_LENGTH,
    TILED,
    H,
    N,
    T,
    array_at,
    divided,
)
from nbdelta.cuda._jit import device
from nbdelta.cuda._memory import read_index
from nbdelta.cuda._ptx import copy_async
from nbdelta.cuda._tile_functions import int32, uint32, uint64
from nbdelta.cuda._tiles import BLOCK, triangle

# fields of the descriptor: what the kernels hand to each other, and the division into chunks
RECORDS, TILES, KEY_PLANE, VALUE_PLANE, SEGMENT, PER_SEGMENT = range(EXTRA, EXTRA + 6)


class Form(NamedTuple):
    """What both kernels are compiled for."""

    kind: str  # of the numbers that are multiplied: "bf16" or "f16"
    inputs: int  # planes of q, k and v
    planes: int  # planes of everything computed
    K: int  # padded head dimension: 64, 128 or 256
    tokens: int  # of a chunk: 16, 32 or 64
    per_channel: bool

    @property
    def parts(self):
        """Floats per cumulative gate: two, so that a strong gate leaves the weak ones intact."""
        return 1 if self.planes == 1 else 2

    @property
    def shares(self):
        """Warps that a state is shared out to: float32 of 256 channels is too much for one."""
        return 2 if self.K == 256 and self.planes == 3 else 1

    @property
    def share(self):
        """Channels of a state that a warp has."""
        return self.K // self.shares

    @property
    def blocks(self):
        """16 x 16 blocks in the lower triangle of a chunk."""
        return triangle(self.tokens // 16, 0)

    @property
    def triangle_plane(self):
        """Bytes of a plane of T or P."""
        return self.blocks * BLOCK

    @property
    def plane_bytes(self):
        """Bytes of a plane of a K or Q tile."""
        return self.tokens * self.K * 2

    @property
    def gate_pitch(self):
        """Bytes of a row of gates, with a gap against bank conflicts."""
        return 4 * self.K + 32

    @property
    def gate_part(self):
        """Bytes from one part of the gates to the next."""
        return self.tokens * self.gate_pitch

    @property
    def vector(self):
        """Bytes of one float32 per token."""
        return 4 * self.tokens

    @property
    def last(self):
        """Bytes of e^G_last."""
        return 4 * self.K if self.per_channel else 16

    @property
    def key_record(self):
        """Bytes of T, beta, with a gate per token beta e^G and e^(G_last - G), and e^G_last."""
        vectors = 1 if self.per_channel else 3
        return self.planes * self.triangle_plane + vectors * self.vector + self.last

    @property
    def query_record(self):
        """Bytes of P and, with a gate per token, scale e^G."""
        vectors = 0 if self.per_channel else 1
        return self.planes * self.triangle_plane + vectors * self.vector

    @property
    def record(self):
        """Bytes that the first kernel leaves to the second one, per chunk and value head."""
        return self.key_record + self.query_record

    @property
    def tile(self):
        """Bytes of e^G K, of scale e^G Q, or of e^(G_last - G) K; for a gate per channel."""
        return self.planes * self.plane_bytes


# -- chunks


@device
def first_chunk(desc, n):
    """Number of the first chunk of sequence n."""
    n, segment = uint32(n), uint32(desc[SEGMENT])
    cu = array_at(desc, CU_SEQLENS)
    if cu[0] == 0:
        segments = n * divided(uint32(desc[T] + segment - 1), segment)[0]
    else:
        # a sequence may have a segment more than its length says: that of its odd tokens
        bos = read_index(cu[1], cu[0] + n * cu[2])
        segments = divided(uint32(min(max(bos, 0), desc[T])), segment)[0] + n
    return int32(segments * uint32(desc[PER_SEGMENT]))


def count_chunks(T, N, segment, per_segment, packed):
    """How many numbers there are for chunks."""
    return (T // segment + N if packed else N * -(-T // segment)) * per_segment


@device
def sequence_of_chunk(desc, chunk):
    """The sequence that a number belongs to."""
    if desc[CU_SEQLENS] == 0:
        return int32(divided(uint32(chunk), uint32(first_chunk(desc, 1)))[0])
    low, high = int32(0), int32(desc[N] - 1)
    while low < high:
        middle = int32((low + high + 1) // 2)
        if first_chunk(desc, middle) <= chunk:
            low = middle
        else:
            high = int32(middle - 1)
    return low


@device
def own_key_head(desc, hv):
    """The head of q and k that a value head reads; `key_head` in fewer registers here."""
    if desc[TILED]:
        return divided(hv, uint32(desc[H]))[1]
    return divided(hv, uint32(desc[GROUP]))[0]


@device
def is_ours(desc, length):
    """Whether sequences of this length are not left to another kernel."""
    return desc[MIN_LENGTH] <= length <= desc[MAX_LENGTH]


@device
def chunk_span(desc, c, length, tokens):
    """First token of chunk c of a sequence of `length`, and how many it has (if it exists)."""
    segment = uint32(desc[SEGMENT])
    full, rest = divided(uint32(c), uint32(desc[PER_SEGMENT]))
    start = uint32(full * segment + rest * tokens)
    left = int32(segment - divided(start, segment)[1])
    start = int32(start)
    return start, int32(min(tokens, min(length - start, left)))


# -- tiles in shared memory


@device
def column_lane(lane, pitch):
    """A lane's row for ldmatrix: left operands, and right ones whose k runs along the rows."""
    return uint32((lane & 15) * pitch + (((lane >> 4) ^ (lane & 7)) << 4))


@device
def row_lane(lane, pitch):
    """A lane's row for ldmatrix: right operands whose k runs down the columns."""
    row = (lane & 7) + ((lane >> 4) << 3)
    return uint32(row * pitch + ((((lane >> 3) & 1) ^ (lane & 7)) << 4))


def make_load_rows(rows, K, threads):
    """Copying rows of 16-bit numbers into a tile; what is not there becomes zero."""
    units = K // 8
    step = threads // units
    turns = -(-rows // step)

    @device
    def load_rows(tile, source, pitch, t, count, valid):
        """`valid` 16-byte units in each of `count` rows, which are `pitch` bytes apart."""
        u, r = uint32(t % units), uint32(t // units)
        row = uint64(source) + uint64(r) * uint64(pitch) + uint64(u * 16)
        for i in range(turns):
            at = uint32(r + i * step)
            inside = int32(at) < count and int32(u) < valid
            # of size 0 nothing is read, but the address has to be a sound one
            copy_async(
                uint32(tile + at * 2 * K + ((u ^ (at & 7)) << 4)),
                row if inside else uint64(source),
                uint32(16 if inside else 0),
            )
            row += uint64(step) * uint64(pitch)

    return load_rows


def make_load_values(rows, columns, threads):
    """The same for a slice of V, whose short rows are placed so that no bank is met twice."""
    units = columns // 8
    step = threads // units
    turns = -(-rows // step)
    shift, mask = {2: (2, 1), 4: (1, 3), 8: (0, 7)}[units]

    @device
    def place(row, unit):
        """Offset of a 16-byte unit in the tile."""
        return uint32(row * 16 * units + ((unit ^ ((row >> shift) & mask)) << 4))

    @device
    def load_values(tile, source, pitch, t, count, valid):
        u, r = uint32(t % units), uint32(t // units)
        row = uint64(source) + uint64(r) * uint64(pitch) + uint64(u * 16)
        for i in range(turns):
            at = uint32(r + i * step)
            inside = int32(at) < count and int32(u) < valid
            if int32(at) < rows:
                copy_async(
                    uint32(tile + place(at, u)),
                    row if inside else uint64(source),
                    uint32(16 if inside else 0),
                )
            row += uint64(step) * uint64(pitch)

    return place, load_values
