"""Loading a base model, knowing which one it is, and choosing which parameters train.

Above `data` (it resolves names there), below methods, training and the registry.
"""
