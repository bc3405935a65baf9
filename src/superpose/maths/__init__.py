"""Mathematics on tensors alone: no names, no files, no methods' options."""
