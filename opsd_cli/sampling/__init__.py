"""Where completions come from: samplers, decoders, the choice of one token."""
