"""MemServe: SGLang with a memory. Importing this package imports nothing else."""

__version__ = "0.1.0"
