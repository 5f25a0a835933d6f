"""Between processes: authenticated frames over TCP, links of messages on top of them, and messages as bytes."""
