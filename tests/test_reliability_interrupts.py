"""Ctrl-C at any time: every case in a process of its own."""

import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest
from processes import DECODE, finish, run, start

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent in another way")

RULE = """
x = np.broadcast_to(np.full((1, 1, 1, 128), 0.05, np.float32), (1, 200_000, 64, 128))
small, g = x[:, :64, :1], np.broadcast_to(-x[:, :1, :1], x.shape)
out = np.zeros((1, 200_000, 64, 16), np.float32)
out += 1  # its pages are there before the clock starts
def begin():
    nbdelta.{name}(x, x, x[..., :16], g{gate}, None, out=out)
def again():
    return nbdelta.{name}(small, small, small, -small{gate}, None)[0]
"""

# a step of 2^18 heads, two seconds and more
STEP = """
x = np.broadcast_to(np.full((1, 1, 1, 1024), 0.02, np.float32), (1 << 15, 1, 8, 1024))
h0 = np.broadcast_to(np.full((1, 1, 1024, 128), 0.01, np.float32), (1 << 15, 8, 1024, 128))
out = np.zeros((1 << 15, 1, 8, 128), np.float32)
out += 1
def step(x, h0, **options):
    v, g = x[..., :128], -x[..., 0]
    return nbdelta.fused_recurrent_gated_delta_rule(x, x, v, g, None, initial_state=h0, **options)
def begin():
    step(x, h0, out=out)
def again():
    return step(x[:2], h0[:2])[0]
"""

# one number 2^30 times over; of the result, which is 4 GB, no more is there than was written
BLOCK = """
x = np.broadcast_to(np.float32(1e-3), (1, 1 << 18, 64, 64))
def begin():
    out = np.zeros(x.shape, np.float32)
    try:
        nbdelta.{name}(x, {arguments})
    finally:
        assert not out[0, -1, -1, -1], "the call had ended"
def again(out=None):
    return nbdelta.{name}(x[:, :64], {arguments})
"""

# has no `out`: two seconds and more
GATE = """
x = np.broadcast_to(np.float32(1e-3), (1, 1 << 18, 64, 64))
def begin():
    nbdelta.fused_gate(x)
def again():
    return nbdelta.fused_gate(x[:, :64])
"""

SOLVE = """
x = np.broadcast_to(np.float32(1e-3), (8192, 8192))
out = np.zeros(x.shape, np.float32)
def begin():
    try:
        nbdelta.solve_triangular(x, x, unit_diagonal=True, out=out)
    finally:
        assert not out[-1, -1], "the call had ended"
def again():
    return nbdelta.solve_triangular(x[:99, :99], x[:99], unit_diagonal=True)
"""

BACKWARD = """
import torch, traceback
def loss(T, H):
    x = torch.full((1, 1, 1, 128), 0.05, requires_grad=True)
    y = x.expand(1, T, H, 128)
    return nbdelta.chunk_gated_delta_rule(y, y, y, -y[..., 0], None)[0].sum(), x
# (the first batch writes to every page of the gradients, which the system clears then)
long, _ = loss(2_000, 128)
def begin():
    try:
        long.backward()
    except KeyboardInterrupt:
        assert "chunk_backward" in traceback.format_exc()
        raise
def again():
    value, x = loss(64, 1)
    value.backward()
    return x.grad.numpy()
"""

# little is done for a token of such heads, and there are many
TINY = """
x = np.broadcast_to(np.full((1, 1, 1, 8), 0.3, np.float32), (1, {T}, 512, 8))
def call(x):
    g = np.broadcast_to(np.float32(-0.3), x.shape[:3])
    return nbdelta.{name}(x, x, x[..., :1], g, None{options})[0]
def begin():
    call(x)
def again():
    return call(x[:, :64, :1])
"""

LONG = {
    **{name: RULE.format(name=name, gate="") for name in ("chunk_kda", "fused_recurrent_kda")},
    **{
        name: RULE.format(name=name, gate="[..., 0]")
        for name in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
    },
    "a step of many sequences": STEP,
    "tiny heads": TINY.format(name="chunk_gated_delta_rule", T=100_000, options=""),
    "tiny heads token by token": TINY.format(
        name="fused_recurrent_gated_delta_rule", T=100_000, options=""
    ),
    "gradients of tiny heads": TINY.format(
        name="chunk_gated_delta_rule_bwd", T=10_000, options=", do=x[..., :1]"
    ),
    "backward": BACKWARD,
    "chunk_local_cumsum": BLOCK.format(name="chunk_local_cumsum", arguments="64, out=out"),
    "solve_tril": BLOCK.format(name="solve_tril", arguments="out=out"),
    "solve_triangular": SOLVE,
    "fused_gate": GATE,
}


def cpu_seconds(process):
    """What all threads of a process have taken of the cores; 0 where the system does not say."""
    stat = Path(f"/proc/{process.pid}/stat")
    if not stat.exists():
        return 0.0
    user, system = stat.read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("name", LONG)
def test_ctrl_c_during_a_long_call(name):
    """The call ends within a second of the signal, before its end, and the next one works."""
    process = start(
        "import time\nimport numpy as np, nbdelta\n"
        + LONG[name]
        + textwrap.dedent(
            """
            first = again()
            print("begun", flush=True)
            try:
                begin()
            except KeyboardInterrupt:
                print("interrupted", time.monotonic(), time.process_time(), flush=True)
            assert np.array_equal(again(), first) and np.isfinite(first).all()
            """
        ),
        env={"NUMBA_NUM_THREADS": "2"},
    )
    assert process.stdout.readline() == "begun\n", finish(process)
    time.sleep(0.5)
    sent, used = time.monotonic(), cpu_seconds(process)
    process.send_signal(signal.SIGINT)
    out, _ = finish(process)
    word, at, used_by_then = out.split()
    assert word == "interrupted"
    # its two threads take up to twice the time of the clock, less where others have the cores
    assert min(float(at) - sent, float(used_by_then) - used) < 1.0


def test_less_work_at_once_where_it_takes_long():
    """As on a machine that other programs keep busy."""
    run(
        """
        import time
        import numpy as np
        from nbdelta.cpu import _team
        from nbdelta.cpu._call import ITEMS, LENGTH, NEXT
        desc, batches = np.zeros(LENGTH, np.int64), []
        class Slow:
            address = 0
            def __call__(self, address, worker):
                batches.append(desc[ITEMS] - desc[NEXT])
                time.sleep(1.1 * _team.LONG if len(batches) < 4 else 0.0)
        _team.run(Slow(), desc, 39, 64, 1, flops=_team.BATCH_FLOPS // 16)
        assert batches == [16, 8, 4, 2, 2, 2, 2, 2, 1], batches
        """
    )


def test_ctrl_c_at_any_step():
    """Hundreds of first calls, each interrupted a little later; then all threads work and end."""
    run(
        """
        import signal
        import numpy as np, nbdelta
        from nbdelta.cpu import _team
        from nbdelta.testing import make_inputs
        call = make_inputs(0, 4, 64, 4, 4, 32, 32, "gda")
        expected = nbdelta.chunk_gated_delta_rule(**call)[0]
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        def interrupted(delay):
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                nbdelta.chunk_gated_delta_rule(**call)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                return True
            return False
        cut = 0
        for n in range(600):
            _team._the_team().stop()
            _team._team = None
            cut += interrupted(2e-6 * (n + 1))
            assert np.array_equal(nbdelta.chunk_gated_delta_rule(**call)[0], expected)
        assert cut > 50, cut
        """,
        env={"NUMBA_NUM_THREADS": "2"},
    )


def test_ctrl_c_leaves_every_state_of_a_pool_old_or_new():
    """At several times in a call: whole heads, bit for bit."""
    run(
        """
        import signal, time
        import numba, numpy as np, nbdelta
        numba.set_num_threads(1)  # several batches of work on any machine
        rng = np.random.default_rng(0)
        N, T, H = 64, 1000, 8
        x = (rng.standard_normal((N, T, H, 64)) * 0.1).astype(np.float32)
        g = np.full((N, T, H), -0.01, np.float32)
        old = rng.standard_normal((N + 3, H, 64, 64)).astype(np.float32)
        slots = rng.permutation(N + 3)[:N]
        def call(pool):
            begin = time.perf_counter()
            nbdelta.fused_recurrent_gated_delta_rule(
                x, x, x, g, None, initial_state=pool, state_indices=slots, inplace_final_state=True
            )
            return time.perf_counter() - begin
        new = old.copy()
        call(new)
        whole = call(old.copy())
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        cut = 0
        for n in range(12):
            pool = old.copy()
            try:
                signal.setitimer(signal.ITIMER_REAL, whole * (n + 0.5) / 12)
                call(pool)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
            kept, made = (pool == old).all((2, 3)), (pool == new).all((2, 3))
            assert (kept | made).all()
            cut += kept[slots].any() and made[slots].any()
        assert cut > 2, cut
        """
    )


def test_ctrl_c_while_numba_is_imported(tmp_path):
    """At many steps of it, one after the other; the next call then imports what is missing."""
    code = """
import sys
import numpy as np, nbdelta
assert "numba" not in sys.modules
x = np.ones((1, 32, 2, 16), np.float32)
class Interrupting:
    seen, cut, every = set(), 0, 25
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("numba", "llvmlite", "nbdelta.cpu")) and name not in self.seen:
            self.seen.add(name)
            if len(self.seen) % self.every == 0:
                self.cut += 1
                raise KeyboardInterrupt
finder = Interrupting()
sys.meta_path.insert(0, finder)
for _ in range(100):
    try:
        assert nbdelta.chunk_local_cumsum(x, 16)[0, 15, 0, 0] == 16
        break
    except (KeyboardInterrupt, ImportError):  # which Numba's own C code makes of it
        pass
else:
    raise AssertionError("no call came to its end")
assert finder.cut > 5, finder.cut
print("works", finder.cut)
"""
    assert "works" in run(code, cache=tmp_path)


def test_ctrl_c_while_kernels_are_compiled(tmp_path):
    """The next call, and the next process, compile what is missing."""
    first = f"""
import nbdelta
print("begun", flush=True)
# of code as text Python would remember the interrupt, and end by it
decode = compile({DECODE!r}, "decode", "exec")
try:
    exec(decode)
except KeyboardInterrupt:
    print("interrupted")
"""
    for i in range(5):
        cache = tmp_path / str(i)
        process = start(first + DECODE, cache=cache)
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, errors = finish(process)
        if out == "interrupted\nworks\n":
            break
        # one that comes in the midst of a finalizer is lost, as Python then says
        assert out == "works\nworks\n"
        assert "Exception ignored" in errors and "KeyboardInterrupt" in errors
    else:
        pytest.fail("no interrupt was noticed")
    assert run(DECODE, cache=cache) == "works\n"


def test_no_more_threads_to_be_had():
    """As where an account has too many, or while Python ends: the caller works alone."""
    run(
        """
        import threading
        import numpy as np, nbdelta
        from nbdelta.testing import make_inputs
        call = make_inputs(0, 4, 64, 4, 4, 32, 32, "gda")
        begin = threading.Thread.start
        def refused(thread):
            raise RuntimeError("can't start new thread")
        threading.Thread.start = refused
        alone = [nbdelta.chunk_gated_delta_rule(**call)[0] for _ in range(2)]
        threading.Thread.start = begin
        assert all(np.array_equal(x, nbdelta.chunk_gated_delta_rule(**call)[0]) for x in alone)
        """,
        env={"NUMBA_NUM_THREADS": "2"},
    )
