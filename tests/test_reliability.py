"""What docs/reliability.md promises: every case in a process of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from processes import ALL_FUNCTIONS, run

# ---- threads ----


def test_sixteen_threads_on_a_cold_cache_beside_torch(tmp_path):
    """First calls of all functions at once, while torch's threads work: the bits of calls alone."""
    code = f"""
    {textwrap.indent(ALL_FUNCTIONS, "    ").strip()}
    done = threading.Event()
    def work():
        a = torch.ones(200, 200)
        while not done.wait(0.02):  # the compiler needs the cores
            a = torch.matmul(a, a) * 0 + 1
    beside = threading.Thread(target=work)
    beside.start()
    made, results, at_once = calls(), [None] * 16, threading.Barrier(16)
    def every(n):
        at_once.wait()
        order = [(n + i) % len(made) for i in range(len(made))]
        results[n] = dict(sorted((i, bits(made[i]())) for i in order))
    threads = [threading.Thread(target=every, args=(n,)) for n in range(16)]
    for t in threads: t.start()
    for t in threads: t.join()
    done.set()
    beside.join()
    alone = {{i: bits(call()) for i, call in enumerate(made)}}
    assert all(r == alone for r in results), results
    """
    run(code, cache=tmp_path)


def test_any_number_of_threads_has_the_same_bits():
    """NUMBA_NUM_THREADS of 1, 2 and unset, and set_num_threads before and inside calls."""
    code = ALL_FUNCTIONS + textwrap.dedent(
        """
        import numba
        first = [bits(call()) for call in calls()]
        for n in range(1, numba.config.NUMBA_NUM_THREADS + 1):
            numba.set_num_threads(n)
            assert [bits(call()) for call in calls()] == first

        class Changing:  # the number of threads, when a call asks for its memory
            def __init__(self, array):
                self.array = array
            def __dlpack_device__(self):
                return self.array.__dlpack_device__()
            def __dlpack__(self, **options):
                numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
                return self.array.__dlpack__(**options)

        numba.set_num_threads(1)
        x = make_inputs(1, 2, 70, 2, 4, 32, 48, "gda")
        x["beta"] = Changing(x["beta"])
        assert bits(nbdelta.chunk_gated_delta_rule(**x)) == first[0]
        print(*first)
        """
    )
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_NUM_THREADS"}
    printed = set()
    for threads in ("1", "2", None):
        chosen = {} if threads is None else {"NUMBA_NUM_THREADS": threads}
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env={**environment, **chosen}, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-2000:]
        printed.add(done.stdout)
    assert len(printed) == 1


# ---- processes ----

IN_CHILDREN = """
import multiprocessing, sys
import numpy as np
import nbdelta
from nbdelta.testing import make_inputs

def work(seed):
    call = make_inputs(seed, 2, 90, 2, 4, 32, 32, "gda")
    o, _ = nbdelta.gated_delta_rule(**call)
    gradients = nbdelta.chunk_gated_delta_rule_bwd(**call, do=o)
    return b"".join(x.tobytes() for x in (o, *gradients) if x is not None)

if __name__ == "__main__":
    expected = [work(i) for i in range(4)]
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        for _ in range(3):
            assert pool.map(work, range(4)) == expected
            assert [work(i) for i in range(4)] == expected
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_and_their_parent_call(tmp_path, method):
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    script = tmp_path / "children.py"
    script.write_text(IN_CHILDREN)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(script), method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forks_while_another_thread_makes_its_first_call(tmp_path):
    """At any step of it, imports and compilation: no child waits for what it has no thread for."""
    call = """
    import numpy as np, nbdelta
    def call():
        return nbdelta.chunk_local_cumsum(np.ones((1, 64, 2), np.float32), 16)[0, 15, 0]
    """
    run(textwrap.dedent(call) + "assert call() == 16", cache=tmp_path)
    run(
        textwrap.dedent(call)
        + textwrap.dedent(
            """
            import os, signal, threading, time
            def first_calls():
                nbdelta.solve_tril(np.zeros((1, 32, 1, 16), np.float32))
                nbdelta.fused_gate(np.zeros((1, 8, 2), np.float32))
            other = threading.Thread(target=first_calls)
            other.start()
            children = []
            while other.is_alive() and len(children) < 8:
                time.sleep(0.1)
                child = os.fork()
                if child == 0:
                    try:
                        os._exit(int(call() != 16))
                    finally:
                        os._exit(2)
                children.append(child)
            other.join()
            ends, deadline = {}, time.monotonic() + 60
            while len(ends) < len(children) and time.monotonic() < deadline:
                for child in set(children) - set(ends):
                    pid, status = os.waitpid(child, os.WNOHANG)
                    if pid:
                        ends[child] = status
                time.sleep(0.1)
            for child in set(children) - set(ends):
                os.kill(child, signal.SIGKILL)
            assert children and set(ends.values()) == {0} and len(ends) == len(children), ends
            """
        ),
        cache=tmp_path,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_waits_for_locks_that_are_new_meanwhile():
    run(
        """
        import os, threading, time
        from nbdelta.forks import wait_for
        first, second, begun = threading.RLock(), threading.RLock(), threading.Event()
        wait_for(first)
        def work():
            with first:
                begun.set()
                time.sleep(0.3)
                wait_for(second)
                second.acquire()
            time.sleep(0.3)
            second.release()
        other = threading.Thread(target=work)
        other.start()
        begun.wait()
        child = os.fork()
        if child == 0:
            os._exit(not (first.acquire(timeout=5) and second.acquire(timeout=5)))
        assert os.waitpid(child, 0)[1] == 0
        other.join()
        # several threads that fork at once
        ends = []
        def forks():
            for _ in range(10):
                child = os.fork()
                if child == 0:
                    os._exit(not (first.acquire(timeout=5) and second.acquire(timeout=5)))
                ends.append(os.waitpid(child, 0)[1])
        threads = [threading.Thread(target=forks) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ends == [0] * 40, ends
        assert first.acquire(timeout=5) and second.acquire(timeout=5)
        """
    )


def test_workers_of_a_data_loader(tmp_path):
    script = tmp_path / "loader.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch, nbdelta
            from nbdelta.testing import make_inputs

            def item(i):
                call = make_inputs(i, 1, 40, 1, 2, 16, 16, "gda")
                arrays = {n: torch.from_numpy(x).requires_grad_() for n, x in call.items()}
                o, _ = nbdelta.gated_delta_rule(**arrays)
                (o * o).sum().backward()
                return torch.cat([o.detach(), arrays["v"].grad])

            class Data(torch.utils.data.Dataset):
                def __len__(self):
                    return 6
                def __getitem__(self, i):
                    return item(i)

            if __name__ == "__main__":
                first = item(0)
                loader = torch.utils.data.DataLoader(Data(), batch_size=2, num_workers=2)
                for n, batch in enumerate(loader):
                    for j in range(2):
                        assert torch.equal(batch[j], item(2 * n + j))
            """
        )
    )
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- long and hostile inputs ----


def test_more_than_two_to_the_31_numbers_in_an_array():
    """q and k of 2.6e9 numbers in little memory; the last head is that of a call alone."""
    run(
        """
        import numpy as np, nbdelta
        rng = np.random.default_rng(0)
        T, H = 20_100, 1024
        x = (rng.standard_normal((1, 1, 1, 128)) * 0.1).astype(np.float32)
        q = np.broadcast_to(x, (1, T, H, 128))
        assert q.size > 2**31
        v = np.broadcast_to(rng.standard_normal((1, T, 1, 1)).astype(np.float32), (1, T, H, 1))
        g = np.full((1, 1, 1), -0.1, np.float32)
        g = np.broadcast_to(g, (1, T, H))
        o, _ = nbdelta.chunk_gated_delta_rule(q, q, v, g, None)
        alone, _ = nbdelta.chunk_gated_delta_rule(
            q[:, :, :1].copy(), q[:, :, :1].copy(), v[:, :, :1].copy(), g[:, :, :1].copy(), None
        )
        assert np.array_equal(o[:, :, -1:], alone)
        assert np.array_equal(o[:, -100:, 512], alone[:, -100:, 0])
        """
    )


def test_tokens_and_rows_that_lie_far_apart():
    """Over more than 2^31 numbers, in memory of which few pages are there: the same bits."""
    run(
        """
        import mmap
        import numpy as np, nbdelta
        from nbdelta.testing import make_inputs

        def far(x, axis=1):
            # the last one of that axis lies 12 GB behind the first one
            strides = list(np.ascontiguousarray(x).strides)
            strides[axis] = (3 << 32) // x.shape[axis] // 64 * 64
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
            memory = mmap.mmap(-1, x.shape[axis] * strides[axis], flags=private)
            view = np.ndarray(x.shape, x.dtype, memory, strides=strides)
            view[...] = x
            return view

        def same(found, expected):
            for a, b in zip(found, expected, strict=True):
                assert (a is None and b is None) or np.array_equal(a, b)

        for gate in ("gda", "kda"):
            call = make_inputs(1, 1, 70, 2, 4, 32, 20, gate, states=1)
            distant = {n: far(x) for n, x in call.items()}
            for rule in (nbdelta.chunk_gated_delta_rule, nbdelta.fused_recurrent_gated_delta_rule):
                o, state = rule(**call, output_final_state=True)
                out = far(np.zeros_like(o))
                same(rule(**distant, output_final_state=True, out=out), (o, state))
            backward = nbdelta.chunk_gated_delta_rule_bwd
            same(backward(**distant, do=far(o), dht=far(state)), backward(**call, do=o, dht=state))
        x = np.random.default_rng(0).standard_normal((1, 70, 3, 16)).astype(np.float32)
        for axis in range(4):
            y = far(x, axis)
            same([nbdelta.fused_gate(y)], [nbdelta.fused_gate(x)])
            out = far(np.zeros_like(x), axis)
            same([nbdelta.solve_tril(y, out=out)], [nbdelta.solve_tril(x)])
            for along in range(4):
                near = nbdelta.chunk_local_cumsum(x, 16, axis=along)
                out = far(np.zeros_like(near), axis)
                same([nbdelta.chunk_local_cumsum(y, 16, axis=along, out=out)], [near])
        b = x[0, :40, 0]
        L = 2 * np.eye(40, dtype=np.float32) + b[:, :1] / 10  # above the diagonal it is not read
        for axis in range(2):
            out = far(np.zeros_like(b), axis)
            near = nbdelta.solve_triangular(L, b)
            same([nbdelta.solve_triangular(far(L, axis), far(b, axis), out=out)], [near])
        """
    )


def test_a_million_tokens():
    run(
        """
        import numpy as np, nbdelta
        from nbdelta.testing import make_inputs
        call = make_inputs(0, 1, 1_000_000, 1, 1, 16, 16, "gda")
        o, state = nbdelta.chunk_gated_delta_rule(**call, output_final_state=True)
        r, end = nbdelta.fused_recurrent_gated_delta_rule(**call, output_final_state=True)
        for a, b in ((o, r), (state, end)):
            assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)
        # gradients of both halves, one after the other: chunks have 128 tokens
        backward, half = nbdelta.chunk_gated_delta_rule_bwd, 128 * 3907
        names = list(call)
        whole = dict(zip(names, backward(**call, do=o)))
        first = {n: x[:, :half] for n, x in call.items()}
        second = {n: x[:, half:] for n, x in call.items()}
        _, middle = nbdelta.chunk_gated_delta_rule(**first, output_final_state=True)
        *late, dmiddle = backward(**second, do=o[:, half:], initial_state=middle)
        early = backward(**first, do=o[:, :half], dht=dmiddle)
        for n, a, b in zip(names, early, late):
            assert np.array_equal(np.concatenate([a, b], axis=1), whole[n]), n
        """
    )


def test_five_thousand_short_sequences():
    """Lengths 0 to 3, packed: the bits of each sequence alone."""
    run(
        """
        import numpy as np, nbdelta
        from nbdelta.testing import make_inputs
        rng = np.random.default_rng(0)
        lengths = rng.integers(0, 4, 5000)
        cu = np.concatenate([[0], np.cumsum(lengths)])
        call = make_inputs(1, 1, int(cu[-1]), 1, 2, 16, 24, "kda")
        h0 = rng.standard_normal((5000, 2, 16, 24)).astype(np.float32)
        for rule in (nbdelta.chunk_kda, nbdelta.fused_recurrent_kda, nbdelta.gated_delta_rule):
            o, state = rule(**call, initial_state=h0, output_final_state=True, cu_seqlens=cu)
            assert np.array_equal(state[lengths == 0], h0[lengths == 0])
            for n in range(0, 5000, 97):
                part = {k: x[:, cu[n]:cu[n + 1]] for k, x in call.items()}
                a, s = rule(**part, initial_state=h0[n:n + 1], output_final_state=True)
                assert np.array_equal(a, o[:, cu[n]:cu[n + 1]])
                assert np.array_equal(s[0], state[n])
        backward = nbdelta.chunk_gated_delta_rule_bwd
        *grads, dh0 = backward(**call, do=o, initial_state=h0, cu_seqlens=cu)
        assert not dh0[lengths == 0].any()
        for n in range(0, 5000, 97):
            part = {k: x[:, cu[n]:cu[n + 1]] for k, x in call.items()}
            *own, dh = backward(**part, do=o[:, cu[n]:cu[n + 1]], initial_state=h0[n:n + 1])
            assert np.array_equal(dh[0], dh0[n])
            for a, b in zip(own, grads, strict=True):
                assert np.array_equal(a, b[:, cu[n]:cu[n + 1]])
        """
    )


# ---- memory ----


def test_ten_thousand_calls_grow_by_less_than_two_megabytes():
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not say how much memory a process has")
    run(
        """
        import resource
        import numpy as np, nbdelta
        from nbdelta.testing import make_inputs
        call = make_inputs(0, 2, 1, 2, 4, 32, 32, "gda", states=2)
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        def step():
            nbdelta.fused_recurrent_gated_delta_rule(**call, inplace_final_state=True)
        for _ in range(500):
            step()
        before = resident()
        for _ in range(10_000):
            step()
        assert resident() - before < 2 << 20, resident() - before
        """
    )
