"""`compare`: train several methods on the same rows, search their settings, and rank them."""
