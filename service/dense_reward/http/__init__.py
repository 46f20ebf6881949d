"""HTTP: routes, requests and answers, keys, limits of a connection, the page."""
