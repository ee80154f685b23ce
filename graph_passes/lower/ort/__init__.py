"""Replaces Cierzo's operators by those that ONNX Runtime has CUDA kernels for."""
