"""One module per engine, each run by the Python of that engine's own environment; only numpy is common to all."""
