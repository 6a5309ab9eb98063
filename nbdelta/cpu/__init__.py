"""The CPU room: one file per stage, each a host function over a compiled kernel.

``chunk chunk_backward recurrent chunk_cumsum solve_tril gate`` are the stages. ``_simd`` emits
vector code for the processor of ``_vector_unit``, ``_matrix_unit`` what AMX multiplies; ``_tiles``
holds the operations on 16 x 16 tiles, ``_memory`` brings arrays of any layout and dtype to those
tiles and back, ``_call`` is what a kernel knows of a call, ``_jit`` compiles and ``_team`` runs.
"""
