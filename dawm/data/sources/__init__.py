"""Readers of recorded data, and what is known of data sets and environments."""
