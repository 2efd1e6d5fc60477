"""The checks of `jaxdistill.search`, one function each, and what they measure."""

__all__: list[str] = []
