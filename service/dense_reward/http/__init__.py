"""The HTTP edge: server, routes, request bodies, keys, limits of a connection, and the web page."""
