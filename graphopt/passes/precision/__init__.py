"""What `lower-precision` is made of."""
