"""jmemserve: MemServe in JAX, an LLM serving stack with one elastic memory pool per instance."""

__version__ = "0.1.0"
