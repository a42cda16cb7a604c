"""Write masks into modules, and read, check and remove them."""
