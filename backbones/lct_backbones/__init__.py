"""Adapters of single-shot DiTs, one file per family."""
