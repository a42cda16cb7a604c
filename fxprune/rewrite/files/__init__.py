"""Write masks, weights and tickets to files, and read them."""
