"""HTTP: the routes of the FastAPI application. Knows nothing about how a ranking is made."""
