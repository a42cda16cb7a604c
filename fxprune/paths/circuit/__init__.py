"""Compile the counting of one graph into flat arrays."""
