"""The method: divergence, loss, teacher, sampler."""
