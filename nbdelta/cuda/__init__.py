"""CUDA kernels: twins of the files in `nbdelta.cpu`, with the same host functions.

``_jit.py`` compiles and launches, ``_call.py`` describes a call to a kernel, ``_memory.py`` reads
and writes numbers at addresses, ``_ptx.py`` holds the PTX instructions and ``_lanes.py`` their
twins in the simulator, ``_tiles.py`` and the other files of tiles what is made of them.
"""
