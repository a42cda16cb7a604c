"""Find the channels that belong together, and count what they cost."""
