"""The fusions, one file each: what it matches, why that is right, the walk."""
