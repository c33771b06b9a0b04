"""Speed on CPUs: matrix products and the memory allocator."""
