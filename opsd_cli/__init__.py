"""opsd: on-policy self-distillation from the command line. Importing this package imports nothing else."""

__version__ = "0.1.0"
