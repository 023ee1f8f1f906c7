"""Triton kernels for CUDA: same files and signatures as torch_ops. The only folder that imports triton."""
