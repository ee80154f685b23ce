"""Quantised weights: which parameters, by which method, and the file that they are written into."""
