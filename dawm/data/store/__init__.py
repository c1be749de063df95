"""What the data touch on the disk: the cache, and Minari data sets that are written."""
