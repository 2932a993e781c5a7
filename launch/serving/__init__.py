"""`tim serve`: a queue around one generator, a JSON API, and a page."""
