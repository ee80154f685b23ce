"""Building engines out of bundles: `cierzo build`."""
