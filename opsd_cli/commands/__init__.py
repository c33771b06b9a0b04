"""argv -> library call -> exit code. The only layer that prints or exits."""
