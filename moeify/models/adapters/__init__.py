"""One short file for each family of networks: where its units lie, what it learns, how it is described and rebuilt."""
