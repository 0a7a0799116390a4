"""What is done to a network: planned, carried out, folded, recorded and done again."""
