"""Folding deltas into their base, combining them, and verifying what comes of it.

Above `registry`, which finds, reads and keeps the deltas; below `cli`. Importing this package loads
nothing.
"""
