"""Where rows and base folders come from, how splits stay apart, how batches are made.

Called by `modeling` (sources) and by the tasks; imports only the bottom of the order.
"""
