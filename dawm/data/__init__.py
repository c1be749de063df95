"""Data: recorded episodes, the shapes they travel in, and the data module that draws batches."""
