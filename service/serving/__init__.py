"""Processes and connections: uvicorn, with limits on what a client may hold."""
