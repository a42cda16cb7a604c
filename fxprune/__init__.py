"""fxprune."""
