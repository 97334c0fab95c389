"""What a run needs in memory: measured per phase by `meter`, predicted before it by `planner`.

Called by the experiment and the command line; imports the bottom of the import order only.
"""
