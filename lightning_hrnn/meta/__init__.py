"""Meta-training: how the rule learns. Optimizer and tasks meet here; needs torch alone."""
