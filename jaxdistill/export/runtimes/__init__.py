"""Programs that run an exported file where neither jaxdistill nor Flax is imported.

They are started by their path, in a process of their own, and are what a user may ship: copy one of
the scripts beside the exported file.
"""

__all__: list[str] = []
