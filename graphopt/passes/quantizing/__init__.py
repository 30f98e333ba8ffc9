"""What `quantize` is made of."""
