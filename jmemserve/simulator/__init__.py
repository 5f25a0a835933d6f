"""A cluster on virtual time: the real router, gateway, schedulers and pools; only what takes time is a model."""
