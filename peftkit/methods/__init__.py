"""The methods, one file each: which parameters train, and what the delta holds of them."""
