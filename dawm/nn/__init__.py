"""Networks and normalisers that are not of one part alone."""
