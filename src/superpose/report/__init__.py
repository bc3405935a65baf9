"""Reports made from records: no tensors, no torch."""
