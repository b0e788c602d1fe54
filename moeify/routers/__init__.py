"""Which expert serves a text that nobody has labelled: routers, what they cost, and text generated through them."""
