"""From recipe files and a command line to one typed `Config`. Never imports torch."""
