"""Programs that run an exported file where neither jaxdistill nor Flax is imported.

Those that begin with ``run`` are started by their path, in a process of their own, and are what a
user may ship: copy one beside the exported file. ``make_litert`` and ``make_coreml`` make files of
a StableHLO program in the same way, ``check_coreml`` reads one back.
"""

__all__: list[str] = []
