"""Check that the captured graph computes what the model computes, in both modes."""
