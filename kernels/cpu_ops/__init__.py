"""C++ kernels for CPUs: same files and signatures as torch_ops. `library` compiles and loads them."""
