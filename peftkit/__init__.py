"""peftkit: compare fine-tuning methods on one base model, and keep each result as a delta.

Importing this package loads nothing heavy; torch and its friends are imported where they are used.
"""

__version__ = "0.1.0"
