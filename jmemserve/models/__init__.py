"""Model families in Flax NNX: config.json -> module, and their weights from safetensors, Orbax or a seed.

One decoder serves every family; a family's file says how its config.json differs. To add one: a file, and a line in
``config.FAMILIES``.
"""

from jmemserve.models.config import ModelConfig, load_config

__all__ = ["ModelConfig", "load_config"]
