"""What is minimised: divergences, clip, support, token weights, and the head computed in chunks."""
