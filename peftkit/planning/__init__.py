"""What a recipe will need in memory, said before anything is loaded.

Called by the experiment and by the verb `plan`. Stands on the methods' own code, run on fake
tensors, so that there is no second description of them that could grow apart.
"""
