"""What may happen to the compiled kernels on the disk: every case in a process of its own."""

import os
import shutil
import subprocess
import sys

import pytest
from processes import DECODE, finish, run, start

# of all functions the one whose kernel is compiled in the shortest time; the cache is that of all
GATE = """
import numpy as np, nbdelta
x = np.linspace(-4, 4, 64, dtype=np.float32).reshape(1, 16, 4)
assert np.abs(nbdelta.fused_gate(x) + np.log1p(np.exp(x))).max() < 1e-5
print("works")
"""


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """A cache folder with the kernel of `GATE`."""
    folder = tmp_path_factory.mktemp("cache")
    run(GATE, cache=folder)
    return folder


@pytest.fixture
def filled(made_once, tmp_path):
    """A cache folder of a test's own, with the kernel of `GATE`."""
    return shutil.copytree(made_once, tmp_path / "filled")


def test_a_cache_folder_that_cannot_be_made(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    # Numba then goes on to the package folder
    assert "works" in run(DECODE, cache=blocked / "cache")


def test_no_folder_at_all():
    nowhere = "from numba.core import caching; caching.CacheImpl._locator_classes = []\n"
    out, errors = finish(start(nowhere + GATE))
    assert "works" in out
    assert "the cache cannot be used" in errors


@pytest.fixture
def stranger():
    """A command that goes on as an account without a home, which can read all and write nothing."""
    right = ("--inh-caps", "--ambient-caps", "--bounding-set")
    rights = [f"{kind}=-all,+dac_read_search" for kind in right]
    command = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", *rights]
    probe = [*command, sys.executable, "-c", "import nbdelta"]
    if shutil.which("setpriv") is None or subprocess.run(probe, cwd="/").returncode:
        pytest.skip("only root can become another account, and only where Linux's setpriv is")
    return command


def test_an_account_without_a_home(stranger):
    """Neither the package folder nor a home can be written to."""
    nowhere = {"HOME": None, "XDG_CACHE_HOME": None, "NUMBA_CACHE_DIR": None}
    out, errors = finish(start(DECODE, env=nowhere, before=stranger, cwd="/"))
    assert "works" in out
    assert errors.count("the cache cannot be used") == 1


def test_a_read_only_cache_folder(filled, stranger):
    files = {path: path.read_bytes() for path in filled.rglob("*.nb*")}
    assert len(files) >= 2
    out, errors = finish(start(GATE, cache=filled, before=stranger, cwd="/"))
    assert "works" in out
    assert errors.count("the cache cannot be used") <= 1
    assert files == {path: path.read_bytes() for path in filled.rglob("*.nb*")}


def test_a_cache_that_is_deleted_while_in_use(tmp_path):
    code = (
        GATE
        + f"""
import shutil
shutil.rmtree({str(tmp_path)!r})
"""
        + GATE
        + """
L = np.eye(16, dtype=np.float32)
assert np.array_equal(nbdelta.solve_triangular(L, x[0]), x[0])
"""
    )
    assert run(code, cache=tmp_path / "cache").count("works") == 2


def test_a_cache_that_is_deleted_again_and_again(tmp_path):
    """At any step of what is written to it: while kernels are compiled, and several threads are."""
    code = f"""
import shutil, threading
import numpy as np, nbdelta
x, done = np.ones((1, 32, 2, 16), np.float32), threading.Event()
def delete():
    while not done.is_set():
        shutil.rmtree({str(tmp_path / "cache")!r}, ignore_errors=True)
        done.wait(0.001)
deleting = threading.Thread(target=delete)
deleting.start()
found = [None, None]
def call(n):
    found[n] = nbdelta.chunk_local_cumsum(x, 16), nbdelta.solve_tril(x), nbdelta.fused_gate(x)
threads = [threading.Thread(target=call, args=(n,)) for n in range(2)]
for t in threads: t.start()
for t in threads: t.join()
done.set()
deleting.join()
assert all(np.array_equal(a, b) for a, b in zip(*found)) and found[0][0][0, 15, 0, 0] == 16
print("works")
"""
    out, errors = finish(start(code, cache=tmp_path / "cache"))
    assert "works" in out
    # it may be there for a moment, each time
    assert errors.count("RuntimeWarning") == errors.count("the cache cannot be used")
    assert "works" in run(GATE, cache=tmp_path / "cache")


def test_a_full_disk(tmp_path):
    """A file system of 64 KB, which a process of its own mounts for itself alone."""
    mount = f"mount -t tmpfs -o size=64k tmpfs '{tmp_path}'"
    full = f"dd if=/dev/zero of='{tmp_path}/filler' bs=1k count=56 status=none"
    private = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
    if shutil.which("unshare") is None or subprocess.run([*private, mount]).returncode:
        pytest.skip("no small file system can be mounted here, or not by this account")
    command = [*private, f'{mount}; {full}; "$@"', "sh"]
    out, errors = finish(start(GATE, cache=tmp_path / "cache", before=command))
    assert "works" in out
    assert errors.count("the cache cannot be used") == 1


LIMIT = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
"""
limits_files = pytest.mark.skipif(
    sys.platform == "win32", reason="there are no limits of file sizes"
)


@limits_files
def test_a_damaged_index_that_cannot_be_replaced(filled):
    """As on a full disk: not a byte may be written."""
    for path in filled.rglob("*.nbi"):
        path.write_bytes(path.read_bytes()[:20])
    out, errors = finish(start(LIMIT.format(0) + GATE, cache=filled))
    assert "works" in out
    assert errors.count("the cache cannot be used") == 1
    assert "works" in run(GATE, cache=filled)


@limits_files
def test_files_that_cannot_grow(tmp_path):
    """No file may grow beyond 8 KB, and the next process finds what was left behind."""
    out, errors = finish(start(LIMIT.format(8192) + GATE, cache=tmp_path))
    assert "works" in out
    assert errors.count("the cache cannot be used") == 1
    assert "works" in run(GATE, cache=tmp_path)


@pytest.mark.parametrize("damage", ["cut", "noise", "flipped"])
def test_damaged_cache_files(filled, damage):
    files = [p for p in filled.rglob("*") if p.suffix in (".nbi", ".nbc")]
    assert len(files) >= 2
    for path in files:
        data = bytearray(path.read_bytes())
        if damage == "cut":
            data = data[: len(data) // 2]
        elif damage == "noise":
            data = os.urandom(len(data))
        elif path.suffix == ".nbc":
            middle = len(data) // 2
            data[middle : middle + 64] = bytes(255 - x for x in data[middle : middle + 64])
        path.write_bytes(data)
    assert "works" in run(GATE, cache=filled)
    # and it was repaired
    out, errors = finish(start(GATE, cache=filled))
    assert "works" in out
    assert not errors


def test_four_cold_processes_on_one_cache(tmp_path):
    processes = [start(GATE, cache=tmp_path) for _ in range(4)]
    assert all("works" in finish(p)[0] for p in processes)
    assert "works" in run(GATE, cache=tmp_path)


def test_a_cache_of_a_machine_with_other_features(tmp_path):
    run(GATE, cache=tmp_path, env={"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""})
    before = len(list(tmp_path.rglob("*.nbc")))
    assert "works" in run(GATE, cache=tmp_path)
    assert len(list(tmp_path.rglob("*.nbc"))) > before
