"""One instance and the cluster of them: decides with ``scheduler`` and ``kvpool``, does with JAX."""
