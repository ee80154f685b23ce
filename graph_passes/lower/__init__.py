"""Lowering: what becomes of the fused model for a certain kind of weights and of KV buffers. The function stays."""
