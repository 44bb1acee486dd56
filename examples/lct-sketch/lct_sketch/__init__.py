"""A made-up video DiT and its lct-core adapter."""
