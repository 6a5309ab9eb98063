"""CUDA kernels: twins of the files in `nbdelta.cpu`, with the same host functions.

``_jit.py`` compiles and launches, ``_call.py`` describes a call to a kernel, ``_memory.py`` reads
and writes numbers at addresses, ``_ptx.py`` holds the PTX instructions, ``_tiles.py`` what is made
of them.
"""
