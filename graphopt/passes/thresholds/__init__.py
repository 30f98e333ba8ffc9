"""What `fold-thresholds` is made of: chains in front of comparisons and signs, facts about parameters,
finite-valued functions of a sign."""
