"""What the kernels of the backward pass agree on: fields of the descriptor, chunks and blocks.

Sequences are cut into chunks of 64 tokens, at whose starts states are kept, and those into blocks
of 16. The decay from one token to another one is the product of the gates between them.
"""

from nbdelta.cuda._call import CHECKPOINTS, H0, LENGTH, ROOM, array_at, first_checkpoint, sequence
from nbdelta.cuda._chunk_form import first_chunk, sequence_of_chunk
from nbdelta.cuda._jit import device

CHUNK, BLOCK = 64, 16
BLOCKS = CHUNK // BLOCK

# arrays of the call, six fields each, behind those of the forward pass; dv is where o was, and G is
# the decay
GRADIENTS = DO, DHT, DQ, DKEY, DG, DBETA, DH0, DA_LOG, DDT_BIAS = range(LENGTH, LENGTH + 54, 6)
RAW_G = LENGTH + 54
# scratch, arrays of the compute dtype, [B, T, HV, ...]: factors of q and k and the effective beta;
# rows of M and P; E and dU; what tokens read of the state as q and as k, and what they write
FACTORS, PAIRS, ERRORS, DERRORS, READS_Q, READS_K, WRITES = range(LENGTH + 60, LENGTH + 102, 6)
# and [chunks, HV, ...]: dS at the end, wp and wa, S . dS, shares in the gradients of A_log and bias
DSTATES, WEIGHTS, KEPT, SHARES = range(LENGTH + 102, LENGTH + 126, 6)
BACKWARD_LENGTH = LENGTH + 126


@device
def chunk_of(desc, slot):
    """Sequence, batch index, first token and number of tokens (if any) of a chunk; its index."""
    seq = sequence_of_chunk(desc, slot)
    b, bos, eos = sequence(desc, seq)
    index = slot - first_chunk(desc, seq)
    first = bos + CHUNK * index
    # boundaries on the device may start late: numbers before the first sequence are no chunks
    count = min(CHUNK, eos - first) if index >= 0 else index
    return seq, b, first, count, index


@device
def state_at(desc, seq, index):
    """The array that has the state at the start of a chunk of a sequence, and its number there."""
    if index == 0:
        return array_at(desc, H0), seq
    return array_at(desc, CHECKPOINTS), min(first_checkpoint(desc, seq) + index, desc[ROOM]) - 1
