"""TensorRT and TensorRT-RTX, as far as building, loading and running an engine have it in common."""
