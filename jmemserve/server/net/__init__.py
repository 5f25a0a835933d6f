"""Processes of one cluster: streams of messages between front-end and instances, and between instances."""
