"""CUDA kernels: twins of the files in `nbdelta.cpu`, with the same host functions.

``_jit.py`` compiles and launches, ``_call.py`` describes a call to a kernel, ``_memory.py`` reads
and writes numbers at addresses, ``_shared.py`` in shared memory. ``_tile_functions.py`` says how
tile functions are written, ``_ptx.py`` holds the PTX instructions that they are of and
``_lanes.py`` their twins in the simulator, ``_tiles.py`` and the other files of tiles what is made
of them.
"""
