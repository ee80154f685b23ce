"""CUDA kernels of the plugin nodes: sources, their compilation, and the functions that launch them."""
