"""Run records, the statistics over them, and the tables and pages made from them.

Called by the experiment and the command line; imports the bottom of the import order only.
"""
