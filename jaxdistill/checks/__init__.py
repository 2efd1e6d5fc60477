"""The checks of `jaxdistill.preflight`, one function each, and what they measure."""

__all__: list[str] = []
