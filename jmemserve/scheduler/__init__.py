"""Who does what when: batches of one instance, and requests among the instances. Plain values; no JAX, no clock."""
