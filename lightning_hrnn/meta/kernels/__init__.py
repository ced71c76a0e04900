"""Losses and gradients of tasks, fused: what an inner step of meta-training costs besides the rule.

Autograd takes some fifty small operations for the gradient of a small network, hardly any of which lasts as long as it
takes to start it. Here one compiled operator does all instances of all networks of a population. `programs` turns a
task family into what the operator runs, or says that it cannot; `tasks` calls it. Families that it does not know stay
with autograd, which every fused gradient is checked against.
"""
