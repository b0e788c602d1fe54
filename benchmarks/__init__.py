"""Speed and quality against peers: each module one command that prints a table and writes JSON."""
