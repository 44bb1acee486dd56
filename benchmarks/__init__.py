"""Measurements of the library: cases as data, one interleaved harness, results with all they depend on."""
