"""What rows begin with alike, computed once: in a micro-batch, or before all of them."""
