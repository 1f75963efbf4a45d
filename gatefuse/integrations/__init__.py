"""Integrations with other projects. Nothing here imports them before it is needed."""
