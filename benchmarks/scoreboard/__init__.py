"""Every backend of graphopt beside its peers, on the models that people deploy."""
