"""The parity gate: what is fed to an engine, what it is held against, and by how much it may be off."""
