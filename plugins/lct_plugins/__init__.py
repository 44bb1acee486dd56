"""Attention kernels, one file per family; heavy imports stay inside functions."""
