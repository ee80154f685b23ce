"""ONNX Runtime on a GPU: sessions of an engine's graphs, and the memory that they read and write in place."""
