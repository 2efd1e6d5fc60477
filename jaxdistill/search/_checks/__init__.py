"""The checks of `jaxdistill.search.preflight`, one function each, and what they measure."""

__all__: list[str] = []
