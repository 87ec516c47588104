"""An instance in its cluster: registration, pool agent, publisher, memory server."""
