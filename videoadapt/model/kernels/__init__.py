"""CUDA kernels in Triton. They are imported only where they run: `attention.has_kernel` says where.

Start with `temporal_attention.py`, then `add_norm.py`. Each file has a plain counterpart in `model/block.py`, and a
test compares the two.
"""
