"""The OpenAPI document: what every route takes and answers. It describes answers; nothing here writes them."""
