"""The front-end: everything between a client's bytes and the engine's requests and events."""
