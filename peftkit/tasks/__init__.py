"""The tasks: what a row is, how it is scored, and which model class it needs."""
